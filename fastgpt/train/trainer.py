"""Training step: micro-batches forward and backward, clipping, optimizer, weight copies.

A step is a pure function of the weights, the optimizer's state, the batch and (seed, step).
Dropout's generator is seeded anew for every step, so resuming needs no generator state.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from fastgpt.config import settings
from fastgpt.config.schema import Config
from fastgpt.errors import UserError
from fastgpt.model.device import Machine
from fastgpt.model.gpt import GPT
from fastgpt.train import cuda_graph, distributed, optim
from fastgpt.train.cuda_graph import StepGraph
from fastgpt.train.distributed import MatrixScatter, Ranks, like, local, whole
from fastgpt.train.muon import Muon
from fastgpt_kernels.linear import accumulates_in_fp32
from fastgpt_kernels.progress import describe_error


class NonFinite(Exception):
    """Loss or gradient norm of `step` that is not finite. Its update was skipped."""

    def __init__(self, step: int):
        super().__init__(f"step {step}")
        self.step = step


def dropout_seed(seed: int, step: int) -> int:
    """Returns a generator seed for a step, mixed by SplitMix64's finaliser."""
    z = (seed + (step + 1) * 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return (z ^ (z >> 31)) % 2**63


class Trainer:
    """Model, optimizer, and all other state that a step changes.

    `step` runs one step and `losses` evaluates. `check` waits for the device and raises NonFinite
    for the first step whose loss or gradient norm was not finite.

    batch_size   splits a step's rows into other micro-batches than the config's
    micro_batch  rows of this rank's micro-batches
    """

    def __init__(
        self,
        model: GPT,
        config: Config,
        machine: Machine,
        ranks: Ranks | None = None,
        batch_size: int = 0,
    ):
        system, rows = config.system, config.optim.rows
        decay = config.optim.lr_decay_iters or config.run.max_iters
        config = settings.replace(config, lr_decay_iters=decay)
        self.model, self.config, self.machine = model, config, machine
        self.device, self.ranks = machine.device, ranks or Ranks()
        self.selected = model.kernels.selected
        self.batch_size = batch_size or config.optim.batch_size
        self.micro_batch = self.ranks.micro_batch(rows, self.batch_size)
        self.n_micro_batches = rows // self.ranks.size // self.micro_batch

        # Distribute the model, and make the copies and gradients that its matmuls use.
        with self.ranks.raise_on_all_ranks():
            self.wrapped, self.layout = distributed.wrap(model, system, machine)
        if self.layout != "fsdp":  # FSDP gathers weights in the compute dtype itself
            model.make_weight_copies()
        # A single micro-batch's gradient is the sum, so accumulating in place would save nothing.
        several = self.n_micro_batches > 1
        self._main_grads = several and not self.layout and accumulates_in_fp32(self.device)
        if self._main_grads:
            model.use_main_grads()

        self.optimizer = optim.make_optimizer(
            model, config.optim, MatrixScatter(self.layout), machine.compile
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=machine.dtype == "float16")
        self.forward: Callable[..., Any] = self.wrapped
        if machine.compile and self.layout != "fsdp":  # FSDP's parts are compiled one by one
            mode = "max-autotune-no-cudagraphs" if system.max_autotune else None
            # DDP cuts the graph at the end of a bucket, so that its reduction can begin.
            self.forward = torch.compile(self.wrapped, fullgraph=self.layout == "", mode=mode)
        self._clip_and_check: Callable[..., Any] = optim.clip_and_check_finite
        if machine.compile and self.device.type == "cuda":
            self._clip_and_check = torch.compile(optim.clip_and_check_finite, fullgraph=True)
        self.graph: StepGraph | None = None

        # Updates skipped since the first step that was not finite. The host reads it in `check`.
        self._skipped = torch.zeros((), device=self.device)
        self._last_step = 0
        self._one = torch.ones((), device=self.device)

    @property
    def resolved(self) -> Config:
        """Config with the value found for each `auto`, as a run stores and shows it."""
        split = {"batch_size": self.batch_size}
        split["gradient_accumulation_steps"] = self.config.optim.rows // self.batch_size
        return settings.replace(self.config, **self.machine.settings, **split)

    @property
    def _skips(self) -> bool:  # the optimizer's kernels divide gradients and skip updates
        return getattr(self.optimizer, "_step_supports_amp_scaling", False)

    # --- the step --------------------------------------------------------------------------------

    def step(self, step: int, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Runs one update on a batch (rows, T + 1). Returns loss and norm, on the device."""
        # 1. Learning rate of this step.
        self._last_step = step
        optim.set_learning_rate(self.optimizer, optim.learning_rate(step, self.config.optim))

        # 2. Forward and backward of all micro-batches. Every rank gets the mean loss, so that all
        # skip the same updates: an infinite loss may have finite gradients.
        loss = self._backward(step, tokens)
        if self.layout:
            self.ranks.mean(loss)

        # 3. Clipping by the norm of all gradients, and the check that loss and norm are finite.
        self.scaler.unscale_(self.optimizer)
        grad_norm = self._clip(loss)

        # 4. Update, which the optimizer's kernels skip from the first bad step on. By `scaler.step`
        # they would skip infinite gradients only.
        self.optimizer.step() if self._skips else self.scaler.step(self.optimizer)
        self.scaler.update()

        # 5. Weight copies for the next matmuls, and gradients that begin at zero.
        self.model.sync_weight_copies()
        self._zero_grad()
        return loss, grad_norm

    def _backward(self, step: int, tokens: Tensor) -> Tensor:
        """Accumulates the gradients of the mean loss over all micro-batches. Returns that loss."""
        if self.config.model.dropout:
            seed = dropout_seed(self.config.run.seed, step)
            torch.manual_seed(dropout_seed(seed, self.ranks.rank) if self.ranks.rank else seed)
        losses: list[Tensor] = []
        micro_step, micro_batches = self.graph or self.micro_step, tokens.split(self.micro_batch)
        for i, micro_batch in enumerate(micro_batches, 1):
            if self.layout:
                distributed.reduce_gradients(self.wrapped, i == len(micro_batches))
            losses.append(micro_step(micro_batch))
        return sum(losses[1:], losses[0])

    def micro_step(self, tokens: Tensor) -> Tensor:
        """Accumulates a micro-batch's gradients. Returns its part of the step's mean loss."""
        loss = self._loss(tokens)
        if self.n_micro_batches > 1:
            loss = loss / self.n_micro_batches
        self.scaler.scale(loss).backward(self._one)  # spares PyTorch's fill of a new 1
        return loss.detach()

    def _loss(self, tokens: Tensor) -> Tensor:
        """Returns the mean loss of windows (B, T + 1): inputs and targets one token apart."""
        return self.forward(tokens[:, :-1], tokens[:, 1:])

    def _clip(self, loss: Tensor) -> Tensor:
        """Lets the optimizer divide the gradients or skip its update. Returns their norm."""
        max_norm, scaled = self.config.optim.grad_clip, self.scaler.is_enabled()
        norms, fused = optim.gradient_norms(self.model), cast(Any, self.optimizer)
        norm, divisor, skip = self._clip_and_check(norms, loss, self._skipped, max_norm, scaled)
        if self._skips:  # it reads every gradient anyway
            fused.grad_scale, fused.found_inf = divisor, skip
            return norm
        self.check()  # on mps
        if divisor is not None:
            grads = [p.grad for p in self.model.parameters() if p.grad is not None]
            torch._foreach_div_(grads, divisor)
        return norm

    def _zero_grad(self) -> None:
        """Frees the gradients, or zeroes those whose addresses the backward pass knows."""
        stay = self._main_grads or self.graph is not None
        self.optimizer.zero_grad(set_to_none=not stay)

    def check(self) -> None:
        """Raises NonFinite if a step was not finite. Waits for the device."""
        if skipped := int(self._skipped):
            raise NonFinite(self._last_step - skipped + 1)

    @torch.no_grad()
    def losses(self, tokens: Tensor) -> Tensor:
        """Returns the loss of an evaluation batch (B, T + 1), on the device, without dropout."""
        self.model.eval()
        loss = self._loss(tokens).detach()
        self.model.train()
        return loss

    # --- before the first step: compilation and CUDA graphs --------------------------------------

    def warm_up(self, step: int, micro_batch: Tensor) -> None:
        """Compiles a step's kernels on one micro-batch; changes no weight.

        If that fails, tries once more with an empty cache: a kill or a full disk can leave a broken
        library behind. Raises UserError if torch.compile cannot work here.
        """
        from torch._dynamo.exc import TorchDynamoException  # the import takes a second
        from torch._inductor.exc import CppCompileError, InductorError

        errors = (TorchDynamoException, InductorError, CppCompileError, OSError, ImportError)
        for last in (False, True):
            try:
                self._clip(self._backward(step, micro_batch))
                if isinstance(self.optimizer, Muon):
                    self.optimizer.warm_up()
                break
            except errors as e:
                failed = f"torch.compile failed ({describe_error(e)})"
                if last:
                    raise UserError(f"{failed}; pass --compile=False") from e
                self._zero_grad()
                print(f"{failed}: compiling anew in {use_private_compile_cache()}", flush=True)
        self._skipped.zero_()
        self._zero_grad()
        self.machine.synchronize()

    def capture(self, step: int, micro_batch: Tensor) -> str:
        """Captures the micro-step as a CUDA graph if it was asked for, or if launching is slow.

        Returns the outcome with its reason. Changes no weight. The graph's loss and gradient norm
        are compared with those of a plain micro-step. Raises UserError if --cuda_graph=True and it
        cannot be captured.
        """
        asked = self.config.system.cuda_graph
        wanted, why = cuda_graph.wanted(
            self.config.system, self.machine, lambda: self.micro_step(micro_batch)
        )
        if not wanted:
            self._zero_grad()
            return f"no CUDA graph ({why})"
        try:
            plain = self._loss_and_norm(step, micro_batch)
            self._zero_grad()
            self.graph = StepGraph(self.micro_step, micro_batch)
            for a, b in zip(plain, self._loss_and_norm(step, micro_batch), strict=True):
                if not abs(b - a) <= 0.02 * abs(a):
                    raise RuntimeError(f"the graph gives {b:.6g}, the plain step {a:.6g}")
            return f"each micro-batch is one CUDA graph ({why})"
        except RuntimeError as e:
            self.graph = None
            if isinstance(e, torch.OutOfMemoryError):
                raise
            said = describe_error(e)
            if asked is True:
                raise UserError(f"--cuda_graph=True: {said}; leave the flag out") from e
            return f"no CUDA graph ({said})"
        finally:
            self._zero_grad()

    def _loss_and_norm(self, step: int, micro_batch: Tensor) -> list[float]:
        """Returns the loss and the gradient norm of a micro-step, by the graph if there is one."""
        self._zero_grad()
        torch.manual_seed(dropout_seed(self.config.run.seed, step))
        loss = (self.graph or self.micro_step)(micro_batch)
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        return torch.stack([loss, torch.nn.utils.get_total_norm(grads)]).tolist()

    # --- checkpoints and diagnosis ---------------------------------------------------------------

    def non_finite_tensors(self) -> list[str]:
        """Returns the names of weights and moments that are not finite on any rank."""
        tensors = self.model.state_dict() | optim.state_tensors(self.optimizer, self.model)
        norms = torch.stack([*torch._foreach_norm([local(t) for t in tensors.values()], ord=1)])
        bad = self.ranks.sum((~norms.isfinite()).float()).tolist()
        return [name for name, is_bad in zip(tensors, bad, strict=True) if is_bad]

    def load(self, model: dict[str, Tensor], optimizer: dict[str, Tensor], scaler: dict) -> None:
        """Loads a checkpoint's tensors. Raises UserError if they are another model's."""
        try:
            own = self.model.state_dict()
            self.model.load_state_dict({k: like(v, own.get(k, v)) for k, v in model.items()})
        except RuntimeError as e:
            said = str(e).splitlines()[1].strip()
            raise UserError(f"checkpoint does not fit the model: {said}") from e
        optim.load_state_tensors(self.optimizer, self.model, optimizer)
        if scaler:  # empty if the run had none so far
            self.scaler.load_state_dict(scaler)

    def diagnose(self, step: int, tokens: Tensor) -> dict[str, Any]:
        """Repeats a step's forward and backward without the update, and reports on each tensor."""
        self.graph = None
        self._zero_grad()
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=False)
        losses = self.ranks.gather(self._backward(step, tokens).item())
        named = list(self.model.named_parameters())
        norms = {n: whole(p.grad.norm()).item() for n, p in named if p.grad is not None}
        weights = {n: whole(p.detach().norm()).item() for n, p in named}
        self._zero_grad()
        bad = [n for n in weights if not math.isfinite(norms.get(n, 0.0) + weights[n])]
        return {
            "step": step,
            "loss": repr(sum(losses) / len(losses)),
            "bad_ranks": [r for r, x in enumerate(losses) if not math.isfinite(x)],
            "learning_rate": optim.learning_rate(step, self.config.optim),
            "gradient_norms": {n: repr(v) for n, v in norms.items()},
            "weight_norms": {n: repr(v) for n, v in weights.items()},
            "not_finite": sorted(bad),
        }


def use_private_compile_cache() -> str:
    """Moves torch.compile's cache of this process to a new folder, and returns that.

    The shared folder stays as it is, since other projects and running jobs use it.
    """
    folder = tempfile.mkdtemp(prefix="fastgpt-compile-")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
    torch.compiler.reset()
    return folder
