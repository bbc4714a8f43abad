"""Whether a step's numbers are sound, and by how much its gradients are scaled down.

A dozen operations on single numbers, on the device, where nothing waits for them. One by one each
is a launch; compiled they are one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

ADDENDS = 100  # One kernel adds up so many numbers from different places; stacking them is another.


@torch.no_grad()
def verdict(
    norms: Sequence[Tensor],
    loss: Tensor,
    bad: Tensor,
    bad_steps: Tensor,
    max_norm: float,
    of_loss_alone: bool,
) -> tuple[Tensor, Tensor | None]:
    """Returns the gradients' norm and what they are to be divided by; all are fp32 scalars.

    norms          of each parameter's gradient
    bad            in place: 1 from the first step on whose loss or norm was not finite
    bad_steps      in place: how many steps there were since, with it
    max_norm       of the gradients after the division, as in torch.nn.utils.clip_grads_with_norm_;
                   0: they are not divided
    of_loss_alone  an infinite norm is no fault: with loss scaling it is how the scale is found
    """
    if torch.compiler.is_compiling() and len(norms) <= ADDENDS:
        norm = torch.sqrt(sum((x * x for x in norms), torch.zeros_like(loss)))
    else:
        norm = torch.linalg.vector_norm(torch.stack([*norms]))
    divisor = ((norm + 1e-6) / max_norm).clamp(min=1.0) if max_norm else None
    finite = loss if of_loss_alone else loss + norm
    bad.copy_(torch.maximum(bad, (~torch.isfinite(finite)).to(bad.dtype)))
    bad_steps.add_(bad)
    return norm, divisor
