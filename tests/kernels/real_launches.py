"""What fastgpt itself launches, and which of it the gate does not compile; run by test_aot.

    python -m tests.kernels.real_launches sm_90

For each preset, without and with dropout and biases: the passes of a step of the Trainer, and its
evaluation, on meta tensors. Prints a line for each kernel that `uses` of the ops'
rooms leave out.
"""

import itertools
import sys
from unittest import mock

import torch

from fastgpt.config import settings
from fastgpt.config.presets import PRESETS
from fastgpt.model import ops
from fastgpt.model.build import build
from fastgpt.model.device import Machine
from fastgpt.model.gpt import GPT
from fastgpt.train.trainer import Trainer
from fastgpt_kernels.specs import spec_modules
from fastgpt_kernels.tools.launches import Launch, record_all, recording

TRITON = {f"op.{op}": "triton" for op in ("linear", "mlp")}  # eager if nobody asks


def train(preset: str, bias: bool, dropout: float, ours: bool, dtype: str) -> None:
    vocab_size = 50257 if "gpt2" in preset or "finetune" in preset else 65
    config = settings.replace(PRESETS[preset](), n_layer=2, bias=bias, dropout=dropout)
    config = settings.replace(config, gradient_accumulation_steps=1, compile=False)
    if ours:
        config = settings.replace(config, **TRITON)
    machine = Machine(torch.device("meta"), dtype)
    model = build(config, vocab_size, machine)
    trainer = Trainer(model, config, machine)
    trainer._guard_on_device = True
    batch, length = config.optim.batch_size, config.model.block_size
    tokens = torch.empty(batch, length + 1, dtype=torch.int64, device="meta")
    trainer._backward(0, tokens)  # PyTorch's AdamW has no step on meta tensors
    with torch.no_grad():
        model.eval()
        model(tokens[:, :-1], tokens[:, 1:])


def main(arch: str) -> int:
    covered = {launch.key for launch in record_all(arch, spec_modules())[0]}
    missing: dict[str, Launch] = {}
    dtype = "float16" if arch == "sm_75" else "bfloat16"

    def obstacle(op, name, device, dtype, sizes) -> str:
        reason = op.unsupported_reason(name, arch, dtype, sizes) if name == "triton" else None
        return reason or ""

    with (
        recording(arch) as launches,
        mock.patch.object(ops, "_obstacle", obstacle),
        mock.patch.object(GPT, "init_weights", lambda self, seed: self),
        mock.patch.object(torch.nn.Embedding, "reset_parameters", lambda self: None),
        mock.patch.object(torch.nn.Linear, "reset_parameters", lambda self: None),
    ):
        for preset, extras, ours in itertools.product(PRESETS, (False, True), (False, True)):
            train(preset, extras, 0.2 * extras, ours, dtype)
            for launch in launches:
                if launch.key not in covered and launch.key not in missing:
                    missing[launch.key] = launch
                    print(f"{preset}: {launch.detail}")
            launches.clear()
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
