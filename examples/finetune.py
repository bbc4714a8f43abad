"""Finetune: go on from a model's weights with other text, at a small and constant learning rate.

The weights are a Hugging Face GPT-2 folder, here one that `fastgpt export` makes of the newest run.
With `init_from="gpt2"` in place of `weights=` they are OpenAI's, downloaded once.
"""

from pathlib import Path

import fastgpt
from fastgpt.config.schema import ExportConfig
from fastgpt.weights.source import export

if not Path("exported").exists():
    export(ExportConfig(to="exported"))
Path("poem.txt").write_text("The rain in Spain stays mainly in the plain.\n" * 400)
run = fastgpt.fit(
    "laptop", init_from="weights", weights="exported", input="poem.txt", tokenizer="byte",
    learning_rate=1e-3, decay_lr=False, warmup_iters=0, max_iters=100, eval_interval=50,
    log_interval=20, sample_tokens=0,
)  # fmt: skip
model, tokenizer = fastgpt.load(run)
print("The rain" + fastgpt.generate(model, tokenizer, "The rain", max_new_tokens=40))
