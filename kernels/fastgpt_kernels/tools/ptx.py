"""What a Gluon kernel takes for granted of the compiler, read in its PTX.

In Gluon's source a partition is one thread. In truth it has warps, and one thread arrives at an
mbarrier, or starts a copy from shared memory, for all of them. That is right if all warps have
passed what comes before: Triton puts a barrier there if it thinks one is needed, and this looks
whether it did, in the order of the text:

- before an arrival: a barrier since the last access to shared memory and the last wait for wgmma or
  for copies out of shared memory, each of which warps start and await for themselves;
- before a copy or a reduction out of shared memory: since the last access a proxy fence by every
  thread, and after that a barrier;
- before an access that follows a wait for such copies: a barrier.
"""

from __future__ import annotations

import re

_BARRIER = re.compile(r"\bbar(rier)?(\.cta)?\.sync")
_ACCESS = re.compile(r"\b(ld|st|atom|red)(\.\w+)*\.shared|\bstmatrix\b|\bldmatrix\b")
_FENCE = re.compile(r"\bfence\.proxy\.async")
_PRODUCTS = re.compile(r"\bwgmma\.wait_group")
_COPIES = re.compile(r"\bcp\.async\.bulk\.wait_group")
_ARRIVE = re.compile(r"\bmbarrier\.arrive")
_COPY = re.compile(r"\bcp\.(reduce\.)?async\.bulk(\.\w+)*\.global\.shared")


def problems(text: str) -> list[str]:
    """What is not covered, each with the number of its line."""
    found = []
    # Since the last barrier: no access or wait; no wait for copies. Since the last access: a fence;
    # a barrier after that.
    together = left = fenced = ready = True
    for number, line in enumerate(text.splitlines(), 1):
        wrong = ""
        if _BARRIER.search(line):
            together, left, ready = True, True, fenced
        elif _ACCESS.search(line):
            if not left:
                wrong = "memory is touched before all warps have seen their copies leave it"
            together = fenced = ready = False
        elif _FENCE.search(line):
            fenced = True
        elif _PRODUCTS.search(line):
            together = False
        elif _COPIES.search(line):
            together = left = False
        elif _ARRIVE.search(line) and not together:
            wrong = "one thread arrives before all warps are there"
        elif _COPY.search(line) and not ready:
            wrong = "a copy starts before all warps have fenced"
        if wrong:
            found.append(f"PTX line {number}: {wrong}")
    return found
