"""Ways to compute the same training step, each behind one face: `warm_up` and `step`.

Ours go through `train.trainer.Trainer`, with model and op table as `fastgpt train` makes them.
The others get the training loop that their own users write: autocast, clipping, fused AdamW.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench import setup
from fastgpt.config import settings
from fastgpt.config.schema import Config
from fastgpt.errors import UserError
from fastgpt.model.build import build as build_model
from fastgpt.model.device import DTYPES, synchronize
from fastgpt.train import optim
from fastgpt.train.trainer import Trainer

PEER, HF = "peer", "hf"
EAGER = {"kernels": "eager", "compile": False}
COMPILED = {"kernels": "eager", "compile": True}
FAST = {"kernels": "triton", "compile": True}


@dataclass(frozen=True)
class Variant:
    """One contender. `kind` is ours, peer or hf; `settings` by flat name, over the run's own."""

    name: str
    settings: Mapping[str, Any] = field(default_factory=EAGER.copy)
    kind: str = "ours"
    graph: bool = False  # one CUDA graph a micro-step, if `fastgpt train` would make one
    path: str = ""  # a peer's checkout
    root: str = ""  # another checkout, whose fastgpt and kernels are measured; empty: this one


def contenders(names: str, peer_path: str, gpu: bool) -> tuple[list[Variant], dict[str, str]]:
    """The variants asked for, and why others are not there. Raises UserError.

    names  comma-separated; settings of its own may follow each: muon:lr_schedule=wsd
    """
    peer = str(Path(peer_path).expanduser().resolve()) if peer_path else ""
    peer_name = Path(peer).name or "peer"
    if peer and not Path(peer, "model.py").is_file():
        raise UserError(f"--peer-path={peer_path}: there is no model.py in it")
    fast = FAST if gpu else EAGER
    known = {
        "eager": Variant("eager"),
        "adamw": Variant("adamw", {**fast, "optimizer": "adamw"}, graph=gpu),
        "muon": Variant("muon", {**fast, "optimizer": "muon"}, graph=gpu),
        "compile": Variant("compile", COMPILED),
        "kernels": Variant("kernels", {"kernels": "triton", "compile": False}),
        "kernels+compile": Variant("kernels+compile", FAST, graph=True),
        "peer": Variant(f"{peer_name}, eager", kind=PEER, path=peer),
        "peer+compile": Variant(f"{peer_name}, compile", COMPILED, PEER, path=peer),
        "hf": Variant("transformers, eager", kind=HF),
        "hf+compile": Variant("transformers, compile", COMPILED, HF),
    }
    if names:
        chosen = []
        for name in names.split(","):
            known_name, *more = name.split(":")
            if known_name not in known:
                raise UserError(f"--variants: no {known_name!r}; there are {', '.join(known)}")
            if known_name.startswith("peer") and not peer:
                raise UserError(f"--variants: {known_name} needs --peer-path")
            variant = known[known_name]
            if more:
                variant = replace(variant, name=name, settings={**variant.settings, **_with(more)})
            chosen.append(variant)
        return chosen, {}
    ours = ["eager", "compile", "kernels", "kernels+compile"] if gpu else ["eager"]
    skipped = {} if gpu else {"compile": "not built without a GPU unless --variants names it"}
    skipped |= {} if gpu else {"kernels": "no GPU", "kernels+compile": "no GPU"}
    others = ["peer"] if peer else []
    if importlib.util.find_spec("transformers") is None:
        skipped["transformers"] = "not installed"
    else:
        others.append("hf")
    return [known[n] for n in (*ours, *(f"{o}+compile" if gpu else o for o in others))], skipped


def _with(assignments: list[str]) -> dict[str, Any]:
    """Settings from ["lr_schedule=wsd", ...]. Raises UserError for the first bad one."""
    flags = dict(a.partition("=")[::2] for a in assignments)
    found = settings.to_dict(settings.apply_flags(Config(), flags))
    return {name: found[name] for name in flags}


class Stepper(Protocol):
    """A model in training. Tokens are (rows, T + 1) on the device."""

    choices: list[str]
    graphed: bool  # whether steps replay a CUDA graph, whose memory no allocator counts

    def warm_up(self, tokens: Tensor) -> None: ...

    def step(self, step: int, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """One update; loss and gradient norm, on the device."""
        ...

    def evaluate(self, tokens: Tensor) -> Tensor: ...


def autocast(device: torch.device, dtype: str) -> AbstractContextManager:
    """Mixed precision for the forward pass; nothing for float32."""
    if dtype == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, DTYPES[dtype])


class Ours:
    """fastgpt.train.trainer.Trainer."""

    def __init__(self, variant: Variant, config: Config, vocab_size: int):
        machine = setup.machine(config)
        self.trainer = Trainer(build_model(config, vocab_size, machine), config, machine)
        choices = self.trainer.selected
        self.choices = [f"{c.op}: {c.implementation} ({c.reason})" for c in choices]
        self.may_graph, self.graphed = variant.graph, False
        self.step, self.evaluate = self.trainer.step, self.trainer.losses

    def warm_up(self, tokens: Tensor) -> None:
        micro_batch = tokens[: self.trainer.batch_size]
        self.trainer.warm_up(0, micro_batch)
        if self.may_graph:
            _, self.graphed, why = self.trainer.capture_if_it_pays(0, lambda: micro_batch)
            self.choices.append(f"CUDA graph: {'yes' if self.graphed else 'no'} ({why})")


class Peer:
    """Another project's model in the loop that its own users run."""

    def __init__(self, model: nn.Module, config: Config):
        self.config, self.device = config, torch.device(config.system.device)
        self.model = model.to(self.device).train()
        self.params = [p for p in self.model.parameters() if p.requires_grad]
        o = config.optim
        groups = [
            {"params": [p for p in self.params if p.ndim >= 2], "weight_decay": o.weight_decay},
            {"params": [p for p in self.params if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(
            groups, lr=o.learning_rate, betas=(o.beta1, o.beta2), fused=True
        )
        self.scaler = torch.amp.GradScaler(
            self.device.type, enabled=config.system.dtype == "float16"
        )
        self.forward = torch.compile(self.loss) if config.system.compile else self.loss
        self.choices, self.graphed = ["its own model, autocast, fused AdamW"], False

    def loss(self, idx: Tensor, targets: Tensor) -> Tensor:
        raise NotImplementedError

    def _backward(self, tokens: Tensor) -> Tensor:
        micro_batches = tokens.split(self.config.optim.batch_size)
        total = torch.zeros((), device=self.device)
        for micro_batch in micro_batches:
            with autocast(self.device, self.config.system.dtype):
                loss = self.forward(micro_batch[:, :-1], micro_batch[:, 1:]) / len(micro_batches)
            self.scaler.scale(loss).backward()
            total += loss.detach()
        return total

    def warm_up(self, tokens: Tensor) -> None:
        self._backward(tokens[: self.config.optim.batch_size])
        self.optimizer.zero_grad(set_to_none=True)
        synchronize(self.device)

    def step(self, step: int, tokens: Tensor) -> tuple[Tensor, Tensor]:
        optim.set_learning_rate(self.optimizer, optim.learning_rate(step, self.config.optim))
        loss = self._backward(tokens)
        self.scaler.unscale_(self.optimizer)
        clip = self.config.optim.grad_clip or float("inf")
        grad_norm = nn.utils.clip_grad_norm_(self.params, clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return loss, grad_norm

    @torch.no_grad()
    def evaluate(self, tokens: Tensor) -> Tensor:
        self.model.eval()
        with autocast(self.device, self.config.system.dtype):
            loss = self.forward(tokens[:, :-1], tokens[:, 1:])
        self.model.train()
        return loss


class NanoGPT(Peer):
    """The model.py of a nanoGPT checkout, imported from there; weights start as ours do."""

    def __init__(self, variant: Variant, config: Config, vocab_size: int):
        module = _import_model(Path(variant.path))
        # Its train.py takes 50304 for GPT-2's vocabulary and a data set's own otherwise.
        rows = 50304 if vocab_size == 50257 else vocab_size
        same = ("block_size", "n_layer", "n_head", "n_embd", "dropout", "bias")
        sizes = {name: getattr(config.model, name) for name in same}
        model = module.GPT(module.GPTConfig(vocab_size=rows, **sizes))
        weights = setup.first_weights(config, vocab_size)
        weights["transformer.wte.weight"] = weights["transformer.wte.weight"][:rows]
        missing, unexpected = model.load_state_dict(weights, strict=False)
        left = [k for k in missing if k != "lm_head.weight" and not k.endswith("attn.bias")]
        if left or unexpected:
            raise UserError(f"{variant.path}: not nanoGPT's model: {(left + unexpected)[0]}")
        super().__init__(model, config)

    def loss(self, idx: Tensor, targets: Tensor) -> Tensor:
        # Its targets are viewed, not reshaped: they have to be contiguous, as its loader's are.
        return self.model(idx.contiguous(), targets.contiguous())[1]


class HuggingFace(Peer):
    """transformers' GPT2LMHeadModel with our weights; biases that ours lacks are frozen at zero."""

    def __init__(self, variant: Variant, config: Config, vocab_size: int):
        from transformers import GPT2Config, GPT2LMHeadModel

        m = config.model
        sizes = {"n_positions": m.block_size, "vocab_size": vocab_size}
        sizes |= {"n_embd": m.n_embd, "n_layer": m.n_layer, "n_head": m.n_head}
        without: dict[str, Any] = {"use_cache": False, "bos_token_id": None, "eos_token_id": None}
        gelu = "gelu" if m.gelu == "erf" else "gelu_new"
        dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), m.dropout)
        settings = GPT2Config(**sizes, **dropout, **without, activation_function=gelu)
        model = GPT2LMHeadModel(settings)
        weights = setup.first_weights(config, vocab_size)
        weights["transformer.wte.weight"] = weights["transformer.wte.weight"][:vocab_size]
        for name, p in model.named_parameters():
            if name in weights:
                # transformers keeps these (in, out), as GPT-2's first code did.
                turned = name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight"))
                p.data.copy_(weights[name].T if turned else weights[name])
            else:
                p.data.zero_()
                p.requires_grad_(False)
        super().__init__(model, config)

    def loss(self, idx: Tensor, targets: Tensor) -> Tensor:
        logits = self.model(input_ids=idx).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def _import_model(folder: Path) -> Any:
    path = folder / "model.py"
    spec = importlib.util.spec_from_file_location("bench_peer_model", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise UserError(f"--peer-path={folder}: there is no model.py in it")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def build(variant: Variant, config: Config, vocab_size: int) -> Stepper:
    """The variant's model and optimizer on the config's device. Raises UserError."""
    config = setup.with_values(config, dict(variant.settings))
    exact = config.system.dtype == "float32" and not config.system.tf32
    torch.set_float32_matmul_precision("highest" if exact else "high")  # peers' too
    torch.manual_seed(config.run.seed)
    kinds: dict[str, Callable[..., Stepper]] = {"ours": Ours, PEER: NanoGPT, HF: HuggingFace}
    return kinds[variant.kind](variant, config, vocab_size)
