"""What a Gluon kernel takes for granted of the compiler, read in its PTX.

In Gluon's source a partition is one thread. In truth it has warps, and one thread arrives at an
mbarrier, or starts a copy from shared memory, for all of them. That is right if all warps have
passed what comes before: Triton puts a barrier there if it thinks one is needed, and this looks
whether it did, in the order of the text:

- before an arrival: a barrier since the last access to shared memory and the last wait for wgmma;
- before a copy or a reduction out of shared memory: since the last access a proxy fence by every
  thread, and after that a barrier.
"""

from __future__ import annotations

import re

_BARRIER = re.compile(r"\bbar(rier)?\.sync|\bbarrier\.cta")
_ACCESS = re.compile(r"\b(ld|st|atom|red)(\.\w+)*\.shared|\bstmatrix\b|\bldmatrix\b")
_FENCE = re.compile(r"\bfence\.proxy\.async")
_WAIT = re.compile(r"\bwgmma\.wait_group")
_ARRIVE = re.compile(r"\bmbarrier\.arrive")
_COPY = re.compile(r"\bcp\.(reduce\.)?async\.bulk(\.\w+)*\.global\.shared")


def problems(text: str) -> list[str]:
    """What is not covered, each with the number of its line."""
    found = []
    waited = True  # a barrier since the last access and wgmma's wait
    fenced = ready = True  # a fence since the last access; a barrier since that
    for number, line in enumerate(text.splitlines(), 1):
        if _BARRIER.search(line):
            waited, ready = True, fenced
        elif _ACCESS.search(line):
            waited = fenced = ready = False
        elif _FENCE.search(line):
            fenced = True
        elif _WAIT.search(line):
            waited = False
        elif _ARRIVE.search(line) and not waited:
            found.append(f"PTX line {number}: one thread arrives before all warps are there")
        elif _COPY.search(line) and not ready:
            found.append(f"PTX line {number}: a copy starts before all warps have fenced")
    return found
