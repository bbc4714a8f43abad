"""Training step: micro-batches forward and backward, clipping, optimizer.

A step is a pure function of the weights, the optimizer's state, the batch and (seed, step).
Dropout's generator is seeded anew for every step, so resuming needs no generator state.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastgpt.config import settings
from fastgpt.config.schema import Config
from fastgpt.errors import UserError
from fastgpt.model.device import Machine
from fastgpt.model.gpt import GPT
from fastgpt.train import cuda_graph, distributed, optim
from fastgpt.train.cuda_graph import StepGraph
from fastgpt.train.distributed import Ranks, like, local, matrix_scatter, whole
from fastgpt.train.muon import Muon
from fastgpt.train.optim import clip_and_check_finite
from fastgpt_kernels.linear import accumulates_in_fp32
from fastgpt_kernels.progress import describe_error


class NonFinite(Exception):
    """A loss or gradient norm of `step` that was not finite; its update did not happen."""

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

    `step` runs one step, `losses` evaluates, and `check` raises NonFinite if a step since the last
    call was not finite. On a GPU only `check` waits for the device.

    batch_size   splits the rows of a step into other micro-batches than the config's; the number
                 of rows stays
    micro_batch  rows that this rank takes at a time
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
        self.batch_size = batch_size or config.optim.batch_size
        self.accumulation = rows // self.batch_size
        self.micro_batch = self.ranks.micro_batch(rows, self.batch_size)

        # Distribute the model, and make the copies and gradients that its matmuls use.
        with self.ranks.raise_on_all_ranks():
            self.wrapped, self.layout = distributed.wrap(model, system, machine)
        if self.layout != "fsdp":  # FSDP gathers weights in the compute dtype itself
            model.make_weight_copies()
        # A single micro-batch's gradient is the sum, so accumulating in place would save nothing.
        self._sums = self.accumulation > 1 and not self.layout and accumulates_in_fp32(self.device)
        if self._sums:
            model.use_main_grads()
        self._static_grads = self._sums  # gradients whose addresses the backward pass knows

        self.optimizer = optim.make_optimizer(
            model, config.optim, matrix_scatter(self.layout), machine.compile
        )
        self.selected = model.kernels.selected
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=machine.dtype == "float16")
        mode = "max-autotune-no-cudagraphs" if system.max_autotune else None
        self.forward: Callable[..., Any] = self.wrapped
        if machine.compile and self.layout != "fsdp":  # FSDP's parts are compiled one by one
            # DDP cuts the graph at the end of a bucket, so that its reduction can begin.
            self.forward = torch.compile(self.wrapped, fullgraph=self.layout == "", mode=mode)

        # _bad is 1 from the first step whose loss or gradient norm was not finite, and _bad_steps
        # counts the steps since. The device then skips every update until `check` looks.
        self._bad, self._bad_steps = (torch.zeros((), device=self.device) for _ in range(2))
        self._last_step = 0
        self._guard_on_device = self.device.type == "cuda"
        self._clip_and_check: Callable[..., Any] = clip_and_check_finite
        if machine.compile and self._guard_on_device:
            self._clip_and_check = torch.compile(clip_and_check_finite, fullgraph=True)
        self._one = torch.ones((), device=self.device)
        self._graph: StepGraph | None = None

    @property
    def resolved(self) -> Config:
        """Config with the value found for each `auto`, as a run stores and shows it."""
        split = {"batch_size": self.batch_size, "gradient_accumulation_steps": self.accumulation}
        return settings.replace(self.config, **self.machine.settings, **split)

    def step(self, step: int, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Runs one update on a batch (rows, T + 1). Returns loss and norm, on the device."""
        optim.set_learning_rate(self.optimizer, optim.learning_rate(step, self.config.optim))
        self._last_step = step
        # The loss is averaged over the ranks in every step, so that all skip the same updates: an
        # infinite loss may have finite gradients, and loss scaling expects infinite ones.
        loss = self.ranks.mean(self._backward(step, tokens))
        return loss, self._update(loss)

    def _backward(self, step: int, tokens: Tensor) -> Tensor:
        """Accumulates the gradients of the mean loss over all micro-batches. Returns that loss."""
        self._seed(step)
        micro_batches = tokens.split(self.micro_batch)
        total: Tensor | None = None
        for i, micro_batch in enumerate(micro_batches, 1):
            with distributed.reducing(self.wrapped, last=i == len(micro_batches)):
                if self._graph is None:
                    loss = self.micro_step(micro_batch, len(micro_batches))
                else:
                    loss = self._graph(micro_batch)
            total = loss if total is None else total + loss
        assert total is not None
        return total

    def _seed(self, step: int) -> None:
        if self.config.model.dropout:
            seed = dropout_seed(self.config.run.seed, step)
            torch.manual_seed(dropout_seed(seed, self.ranks.rank) if self.ranks.rank else seed)

    def micro_step(self, tokens: Tensor, n_micro_batches: int) -> Tensor:
        """Accumulates a micro-batch's gradients. Returns its part of the mean loss."""
        loss = self._loss(tokens)
        if n_micro_batches > 1:
            loss = loss / n_micro_batches
        self.scaler.scale(loss).backward(self._one)  # spares PyTorch's fill of a new 1
        return loss.detach()

    def _loss(self, tokens: Tensor) -> Tensor:
        """Returns the mean loss of windows (B, T + 1): inputs and targets one token apart."""
        return self.forward(tokens[:, :-1], tokens[:, 1:])

    def _update(self, loss: Tensor) -> Tensor:
        """Clips the gradients and updates the weights if all is finite. Returns the norm."""
        self.scaler.unscale_(self.optimizer)
        grad_norm, divisor = self._judge(loss, self._bad, self._bad_steps)
        if divisor is not None:
            optim.divide_gradients(self.optimizer, self.model, divisor)
        if not self._guard_on_device:
            self.check()
        elif not self.scaler.is_enabled():
            self.optimizer.found_inf = self._bad  # type: ignore[attr-defined]
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.model.sync_weight_copies()
        self._zero_grad()
        return grad_norm

    def _judge(self, loss: Tensor, bad: Tensor, bad_steps: Tensor) -> tuple[Tensor, Tensor | None]:
        norms, max_norm = optim.gradient_norms(self.model), self.config.optim.grad_clip
        return self._clip_and_check(norms, loss, bad, bad_steps, max_norm, self.scaler.is_enabled())

    def _zero_grad(self) -> None:
        self.optimizer.zero_grad(set_to_none=not self._static_grads)

    def check(self) -> None:
        """Raises NonFinite if a step was not finite. Waits for the device."""
        if bad_steps := int(self._bad_steps):
            raise NonFinite(self._last_step - bad_steps + 1)

    @torch.no_grad()
    def losses(self, tokens: Tensor) -> Tensor:
        """Returns the loss of an evaluation batch (B, T + 1), on the device, without dropout."""
        self.model.eval()
        loss = self._loss(tokens).detach()
        self.model.train()
        return loss

    # --- before the first step: compilation and CUDA graphs --------------------------------------

    def warm_up(self, step: int, micro_batch: Tensor) -> None:
        """Compiles forward and backward on one micro-batch; changes no weight.

        If that fails, tries once more with an empty cache, since a cached library may be broken.
        Raises UserError if torch.compile cannot work here.
        """
        compiles = self.machine.compile or self.forward is not self.wrapped
        errors = compile_errors() if compiles else ()
        for first in (True, False):
            try:
                loss = self._backward(step, micro_batch)
                self._judge(loss, self._bad.clone(), self._bad_steps.clone())
                if isinstance(self.optimizer, Muon):
                    self.optimizer.warm_up()
                break
            except errors as e:
                said = describe_error(e)
                if not first or not may_pass_without_cache(e):
                    line = f"torch.compile failed ({said}); --compile=False goes without"
                    raise UserError(line) from e
                self._zero_grad()
                folder = use_private_compile_cache()
                print(f"torch.compile failed ({said}): compiling anew in {folder}", flush=True)
        self._zero_grad()
        self.machine.synchronize()

    def capture_if_it_pays(
        self, step: int, micro_batch: Callable[[], Tensor]
    ) -> tuple[bool, bool, str]:
        """Returns whether micro-steps should run as a CUDA graph, whether they now do, and why.

        They go on without one if it cannot be captured. Raises UserError if --cuda_graph=True asked
        for it.
        """
        system, tokens, n = self.config.system, micro_batch(), self.accumulation
        yes, reason = cuda_graph.wanted(system, self.machine, lambda: self.micro_step(tokens, n))
        self._zero_grad()
        if not yes:
            return False, False, reason
        try:
            self.capture(step, tokens)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as e:
            failed = (str(e).strip().splitlines() or [type(e).__name__])[0]
            if system.cuda_graph is True:
                raise UserError(f"--cuda_graph=True: {failed}; leave the flag out") from e
            return True, False, failed
        return True, True, reason

    def capture(self, step: int, micro_batch: Tensor) -> None:
        """Runs micro-batches of this shape as one CUDA graph from now on; changes no weight.

        The graph's loss and gradient norm are compared with those of a plain micro-step. Raises
        RuntimeError if they differ, or if something cannot be captured; then steps go on without.
        """
        n, seed = self.accumulation, dropout_seed(self.config.run.seed, step)

        def plain(tokens: Tensor) -> Tensor:
            return self.micro_step(tokens, n)

        def loss_and_norm(run: Callable[[Tensor], Tensor]) -> list[float]:
            self._zero_grad()
            torch.manual_seed(seed)
            loss = run(micro_batch)
            grads = [p.grad for p in self.model.parameters() if p.grad is not None]
            return torch.stack([loss, torch.nn.utils.get_total_norm(grads)]).tolist()

        try:
            wanted = loss_and_norm(plain)
            self._zero_grad()
            self._static_grads = True
            self._graph = StepGraph(plain, micro_batch)
            for a, b in zip(wanted, loss_and_norm(self._graph), strict=True):
                if not abs(b - a) <= 0.02 * abs(a):
                    raise RuntimeError(f"the graph gives {b:.6g}, the plain step {a:.6g}")
        except RuntimeError:
            self._drop_graph()
            raise
        finally:
            self._zero_grad()

    def _drop_graph(self) -> None:
        self._graph, self._static_grads = None, self._sums

    # --- checkpoints and diagnosis ---------------------------------------------------------------

    def non_finite_tensors(self) -> list[str]:
        """Returns the names of weights and moments that are not finite on any rank."""
        tensors = self.model.state_dict() | optim.state_tensors(self.optimizer, self.model)
        norms = torch.stack([*torch._foreach_norm([local(t) for t in tensors.values()], ord=1)])
        bad = self.ranks.sum((~norms.isfinite()).float()).tolist()
        return [name for name, is_bad in zip(tensors, bad, strict=True) if is_bad]

    def state_dict(self) -> dict[str, Any]:
        """Returns the state that a checkpoint's state.json needs besides the tensors."""
        return {"scaler": self.scaler.state_dict()}

    def load(self, model: dict[str, Tensor], optimizer: dict[str, Tensor], state: dict) -> None:
        """Loads a checkpoint's tensors. Raises UserError if they are another model's."""
        try:
            own = self.model.state_dict()
            self.model.load_state_dict({k: like(v, own.get(k, v)) for k, v in model.items()})
        except RuntimeError as e:
            raise UserError(
                f"checkpoint does not fit the model: {str(e).splitlines()[1].strip()}"
            ) from e
        optim.load_state_tensors(self.optimizer, self.model, optimizer)
        if state["scaler"]:  # empty if the run had none so far
            self.scaler.load_state_dict(state["scaler"])

    def diagnose(self, step: int, tokens: Tensor) -> dict[str, Any]:
        """Repeats a step's forward and backward without the update, and reports on each tensor."""
        self._drop_graph()
        self._zero_grad()
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=False)
        loss = self._backward(step, tokens)
        named = list(self.model.named_parameters())
        norms = {n: whole(p.grad.norm()).item() for n, p in named if p.grad is not None}
        weights = {n: whole(p.detach().norm()).item() for n, p in named}
        losses = self.ranks.gather(loss.item())
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


def compile_errors() -> tuple[type[Exception], ...]:
    """Returns the exceptions that compiling, or loading what was compiled before, can raise."""
    from torch._dynamo.exc import TorchDynamoException  # the import takes a second
    from torch._inductor.exc import CppCompileError, InductorError

    return TorchDynamoException, InductorError, CppCompileError, OSError, ImportError


def may_pass_without_cache(error: BaseException) -> bool:
    """Returns whether an empty cache may help: not where no C++ compiler works."""
    from torch._inductor.exc import InvalidCxxCompiler

    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, InvalidCxxCompiler) or "InvalidCxxCompiler" in str(seen):
            return False
        seen = seen.__cause__ or seen.__context__
    return True


def use_private_compile_cache() -> str:
    """Moves torch.compile's cache of this process to a new folder, and returns that.

    A kill or a full disk can leave a broken library behind. The shared folder stays as it is, since
    other projects and running jobs use it.
    """
    folder = tempfile.mkdtemp(prefix="fastgpt-compile-")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
    torch.compiler.reset()
    return folder
