"""The kernels in a model of one's own: a block of a transformer, without the rest of fastgpt.

On a CPU, or without Triton, the same functions run plain PyTorch.
"""

import torch

from fastgpt_kernels import add_layer_norm, attention, bias_gelu, cross_entropy, layer_norm

device = "cuda" if torch.cuda.is_available() else "cpu"
B, T, C, heads, vocab = 2, 64, 128, 4, 256
torch.manual_seed(0)
embed = torch.nn.Embedding(vocab, C, device=device)
qkv, out = (torch.nn.Linear(C, n, device=device) for n in (3 * C, C))
up = torch.nn.Linear(C, 4 * C, device=device)
down = torch.nn.Linear(4 * C, C, device=device)
ones = torch.nn.Parameter(torch.ones(3, C, device=device))
layers = torch.nn.ModuleList([embed, qkv, out, up, down])
optimizer = torch.optim.AdamW([*layers.parameters(), ones], lr=3e-3)

ids = torch.randint(vocab, (B, T + 1), device=device)
for step in range(40):
    x = embed(ids[:, :-1])
    y = out(attention(qkv(layer_norm(x, ones[0])), heads))
    y, x = add_layer_norm(y, x, ones[1])
    h = bias_gelu(torch.nn.functional.linear(y, up.weight), up.bias)
    y, _ = add_layer_norm(down(h), x, ones[2])
    loss = cross_entropy(y @ embed.weight.T, ids[:, 1:])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 10 == 0 or step == 39:
        print(f"step {step}: loss {loss.item():.4f}")
