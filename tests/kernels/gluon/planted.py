"""Bugs to plant in the kernels for Hopper, one each, and how many seeds find them.

    python -m tests.kernels.gluon.planted [SEEDS [SECTION]]

For each: of how many seeds the order of accesses tells, and of how many the values alone.
"""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.kernels.gluon.cases import (  # isort: skip
    Problem, Run, found, run_backward, run_by_head, run_forward,
)  # fmt: skip
from fastgpt_kernels import attention_hopper


@dataclass(frozen=True)
class Bug:
    """Text of a kernel's file and what takes its place; each must be there once."""

    name: str
    edits: Sequence[tuple[str, str]]
    found_as: str = ""  # in the message; "" may be any


def without(*lines: str, found_as: str = "") -> Bug:
    return Bug("no " + lines[0].strip(), [("".join(f"{line}\n" for line in lines), "")], found_as)


def instead(old: str, new: str, name: str = "", found_as: str = "") -> Bug:
    return Bug(name or f"{new.strip()} for {old.strip()}", [(old, new)], found_as)


# fmt: off
# Not among them: k freed before its product. The producer also waits for the v of that step.
FREE_K = "    arrive_all(k_empty.index(k_slot))"
WAIT_O = "    o, next_p, decay, p = warpgroup_mma_wait(0, deps=[o, next_p, decay, p])\n"
FREE_V = "    arrive_all(v_empty.index(v_slot))\n"
BAR_Q = "            bar = q_full.index(q_slot)\n            mbarrier.wait(q_empty.index(q_slot), "
EXPECT = "mbarrier.expect(bar, TILE * HEAD * 2)\n"
LOAD_K = "                load(kv_tiles, [batch, key, column + C]"
FORWARD = [
    without("    mbarrier.wait(v_full.index(v_slot), count // STAGES & 1)", found_as="race"),
    without("            mbarrier.wait(q_full.index(q_slot), done // 2 & 1)", found_as="race"),
    instead("k_full.index(k_slot), (count + 1) // STAGES & 1",
            "k_full.index(k_slot), count // STAGES & 1", "parity of the tile before"),
    instead(BAR_Q + "done // 2 & 1 ^ 1)\n", BAR_Q + "done // 2 & 1)\n", "producer's parity of q",
            "deadlock"),
    instead("parity = count // STAGES & 1 ^ 1", "parity = count // STAGES & 1", "", "deadlock"),
    without("                mbarrier.wait(v_empty.index(slot), parity)", found_as="race"),
    without("            mbarrier.wait(q_empty.index(q_slot), done // 2 & 1 ^ 1)", found_as="race"),
    Bug("v freed before its product", [(WAIT_O + FREE_V, FREE_V + WAIT_O)], "race"),
    Bug("k and v freed for each other", [(FREE_K, FREE_K.replace("k_e", "v_e")),
                                         (FREE_V, FREE_V.replace("v_e", "k_e"))]),
    instead("k_empty = mbarriers(STAGES, 2)", "k_empty = mbarriers(STAGES, 1)"),
    instead("v_empty = mbarriers(STAGES, 2)", "v_empty = mbarriers(STAGES, 3)", "", "deadlock"),
    instead("s = warpgroup_mma_wait(1, deps=[s])", "s = warpgroup_mma_wait(2, deps=[s])", "",
            "used before its wait"),
    instead("warpgroup_mma(p, v_s.index(v_slot), o", "warpgroup_mma(p, v_s.index(k_slot), o"),
    instead(EXPECT + LOAD_K, EXPECT.replace(" * 2", "") + LOAD_K, "half of k's bytes expected"),
    instead(EXPECT + "            for i", EXPECT.replace(" * 2", "") + "            for i",
            "half of q's bytes expected"),
    instead("    fence_async_shared()\n    barrier()\n    memory", "    barrier()\n    memory",
            "no fence after the init", "no fence"),
    instead("for i in range(0, last + 1):", "for i in range(0, last + 2):", "a tile too many"),
    instead("            fence_async_shared()\n", "", "no fence before y's copy", "no fence"),
    without("            tma.store_wait(pendings=0)", found_as="race"),
    instead("rows, 1) >= gl", "rows, 1) > gl", "a row does not see its own key", "off by"),
    instead("    return o, next_p", "    o = o / gl.expand_dims(decay, 1)\n    return o, next_p",
            "o is not rescaled", "off by"),
]
SHARED = [
    without("    mbarrier.wait(empty.index(slot), count // STAGES & 1 ^ 1)", found_as="arriv"),
    instead("2 * ROWS * HEAD * 2 + 2 * ROWS * 4", "2 * ROWS * HEAD * 2 + ROWS * 4",
            "delta's bytes are not expected"),
    instead("stat_s.index(slot * 2).slice", "stat_s.index(slot).slice", "lse of another slot"),
    instead("return q, g, p, dp, p_left, delta", "return q, g, p, dp, p_left, lse", "", "off by"),
    instead("s = warpgroup_mma_wait(1,", "s = warpgroup_mma_wait(2,", "", "used before"),
    instead("index(slot * 2 + i).slice(ROW,", "index(slot * 2 + i).slice(64 - ROW,",
            "dq's halves are swapped", "off by"),
]
DS_ARRIVE = "                arrive_all(ds_full)\n"
DS_FENCE = "                fence_async_shared()\n"
DQ_LEFT = "        tma.store_wait(pendings=0)  # the tile before has left dq_s\n"
DQ_BEGIN = "        dq = warpgroup_mma_wait(0, deps=[_begin"
FREE_DS = "        arrive_all(ds_empty)\n"
FREE_Q = "        arrive_all(empty.index(slot))  # its matmuls are done\n"
OUT = "    store(out_tiles, [batch, row, column], tile)\n"
PARTS = "        for i in gl.static_range(ROWS // PART):\n            q,"
BACKWARD = [
    instead(DS_FENCE + DS_ARRIVE, DS_ARRIVE, "no fence before dS is handed over", "no fence"),
    instead(DS_FENCE + DS_ARRIVE, DS_ARRIVE + DS_FENCE, "the fence comes after the arrival"),
    instead("if i == ROWS // PART - 1:", "if i == 0:", "dS handed over after its first part"),
    instead("        fence_async_shared()\n        barrier()\n        reduce_add",
            "        barrier()\n        reduce_add", "no fence before the reduction", "no fence"),
    without("        tma.store_wait(pendings=0)  # the tile before has left dq_s", found_as="race"),
    instead(DQ_LEFT, DQ_LEFT.replace("=0", "=1"), "one reduction may be under way", "race"),
    instead(OUT + "    tma.store_wait(pendings=0)\n", OUT, "no wait at the end", "under way"),
    instead("    tma.store_wait(pendings=0)\n    barrier()\n    tile.store", "    tile.store",
            "dk over dv before it has left", "race"),
    without("            if i == 0:", "                mbarrier.wait(ds_empty, count & 1 ^ 1)"),
    without("        mbarrier.wait(ds_full, count & 1)", found_as="race"),
    instead("mbarrier.wait(ds_full, count & 1)", "mbarrier.wait(ds_full, count & 1 ^ 1)",
            "parity of dS"),
    instead("ds_full = mbarriers(1, 2)", "ds_full = mbarriers(1, 1)"),
    instead("ds_empty = mbarriers(1, 2)", "ds_empty = mbarriers(1, 1)"),
    Bug("dS freed early", [(FREE_DS, ""), (DQ_BEGIN, FREE_DS + DQ_BEGIN)]),
    Bug("q freed before its products", [(FREE_Q, ""), (PARTS, FREE_Q + PARTS)]),
    instead("dv, dk = warpgroup_mma_wait(0,", "dv, dk = warpgroup_mma_wait(1,", "", "used before"),
    without("        mbarrier.wait(full.index(slot), count // STAGES & 1)", found_as="race"),
    without("    mbarrier.wait(kv_full, 0)", found_as="race"),
    Bug("one buffer for both halves of dq", [("dq_s.index(GROUP).store", "dq_s.index(0).store"),
        ("HALF_COLUMN], dq_s.index(GROUP))", "HALF_COLUMN], dq_s.index(0))")], "race"),
    instead(FREE_Q, "        late = operands[4].index(slot * 2 + 1).load(None)\n" + FREE_Q,
            "delta is loaded after the fence", "no fence"),
]
DS_SLOT = "            mbarrier.wait(ds_full.index(slot ^ 1), count - 1 >> 1 & 1)\n"
DQ_WAIT = "            mbarrier.wait(dq_empty.index(GROUP), count - walks & 1)\n"
DQ_STORE = "            dq_s.index(GROUP).store(dq)\n            fence_async_shared()\n"
DQ_ARRIVE = "            arrive_all(dq_full.index(GROUP))\n"
SENT = "                    tma.store_wait(pendings=0)\n"
OUT_LEFT = "            tma.store_wait(pendings=0)\n            arrive_all(kv_empty)\n"
BY_HEAD = [
    without("            _wait_for_sums()", found_as="landed"),
    instead("            _wait_for_sums()", "            tma.store_wait(pendings=0)",
            "the sums have been read, but may not be in memory", "landed"),
    instead("if n == 0:", "if n == -1:", "the first key tile adds instead of storing", "off by"),
    instead("gl.where(n > 0,", "gl.where(n > -1,", "the first key tile takes what lies in memory"),
    instead("(tiles - 1 - before)", "(tiles - 2 - before)", "dq of another row tile"),
    instead(DS_SLOT, "            pass\n", "dS of the tile before is not awaited", "race"),
    Bug("dS stored before both have multiplied", [
        (DS_SLOT, "            pass\n"),
        ("            dq = _begin_dq(", DS_SLOT + "            dq = _begin_dq(")], "race"),
    without("            mbarrier.wait(ds_full.index(count & 1), count >> 1 & 1)", found_as="race"),
    instead("count - 1 >> 1 & 1", "count >> 1 & 1", "parity of dS"),
    instead("if i == TILE // PART - 1:", "if i == 0:", "dS handed over after its first part"),
    instead("            fence_async_shared()\n            arrive_all(ds_full",
            "            arrive_all(ds_full", "no fence before dS is handed over", "no fence"),
    instead("ds_s.index(slot * 2 + GROUP)", "ds_s.index(GROUP)", "one slot for dS"),
    instead("_begin_dq(k_s, ds_s, slot ^ 1,", "_begin_dq(k_s, ds_s, slot,", "dq of this tile"),
    instead("dq, dv = warpgroup_mma_wait(1", "dq, dv = warpgroup_mma_wait(2", "", "used before"),
    instead(DQ_WAIT, "", "dq_s overwritten before it has left"),
    instead("count - walks & 1)", "count & 1)", "parity of dq_s"),
    instead(DQ_STORE, DQ_STORE.split("\n")[0] + "\n", "no fence after dq", "no fence"),
    instead(DQ_STORE + DQ_ARRIVE, DQ_ARRIVE + DQ_STORE, "dq handed over before it is stored"),
    instead(SENT, "", "dq_s let go before it is read", "race"),
    instead("dq_full.index(i), sent & 1)", "dq_full.index(i), sent & 1 ^ 1)"),
    instead("dq_empty = mbarriers(2, 1)", "dq_empty = mbarriers(2, 2)", "", "deadlock"),
    without("            mbarrier.wait(sum_full.index(GROUP), walks & 1)", found_as="race"),
    instead("expect(sum_full.index(i), 64 * 64 * 4)", "expect(sum_full.index(i), 64 * 64 * 2)"),
    without("                mbarrier.wait(out_full.index(i), walks & 1)"),
    instead("            fence_async_shared()\n            arrive_all(out_full",
            "            arrive_all(out_full", "no fence after the results", "no fence"),
    instead(OUT_LEFT, "            arrive_all(kv_empty)\n", "keys released before dv has left"),
    instead("mbarrier.wait(kv_empty, walks & 1 ^ 1)", "pass", "keys loaded too early"),
    without("            mbarrier.wait(kv_full, walks & 1)", found_as="race"),
    instead("GROUP, True, True, PART", "GROUP, False, True, PART", "the diagonal has no mask"),
    instead("GROUP, True, False, PART", "GROUP, False, False, PART", "the last tile has no mask"),
    instead("(dq * scale)", "(dq * 1.0)", "dq is not scaled", "off by"),
    instead("out_s.index(i * 2 + 1))", "out_s.index(i * 2))", "dk for dq", "off by"),
    instead("    arrive_all(empty.index(slot))  # its matmuls are done\n", "", "", "deadlock"),
]
# fmt: on


def edited(module: Any, bug: Bug, section: str = "") -> str:
    """Returns the text of a module's file with a bug in a section, the part under "# --- section".

    Raises ValueError if the bug's place is not there, or not once.
    """
    text = Path(module.__file__).read_text()
    start = text.index(f"# --- {section}") if section else 0
    end = text.find("\n# --- ", start) % (len(text) + 1) if section else len(text)  # -1 is the end
    part = text[start:end]
    for old, new in bug.edits:
        if part.count(old) != 1:
            raise ValueError(f"{bug.name}: {old!r} is {part.count(old)} times in {module.__name__}")
        part = part.replace(old, new)
    return text[:start] + part + text[end:]


@contextmanager
def planted(module: Any, bug: Bug, section: str = "") -> Iterator[Any]:
    """Yields a copy of a kernel's module with a bug."""
    text = edited(module, bug, section)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"buggy_{Path(module.__file__).name}"
        path.write_text(text)
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec and spec.loader
        made = importlib.util.module_from_spec(spec)
        sys.modules[path.stem] = made
        try:
            spec.loader.exec_module(made)
            yield made
        finally:
            del sys.modules[path.stem]


ALL: list[tuple[str, Run, Problem, list[Bug]]] = [
    ("Forward", run_forward, Problem(512, programs=1), FORWARD),
    ("Backward -", run_backward, Problem(512), SHARED),
    ("Backward: a tile", run_backward, Problem(512), BACKWARD),
    ("Backward: a head", run_by_head, Problem(384, n_head=2, programs=1), BY_HEAD),
]


def main(seeds: int = 10, first: str = "") -> int:
    missed = 0
    for section, run, problem, bugs in [x for x in ALL if x[0].startswith(first)]:
        for bug in bugs:
            with planted(attention_hopper, bug, section) as buggy:
                order, values = (
                    [f for s in range(seeds) if (f := found(run, problem, buggy, s, strict))]
                    for strict in (True, False)
                )
            missed += not order
            counts = f"{len(order)}/{seeds} with order, {len(values)}/{seeds} by values"
            print(f"{bug.name[:60]:60} {counts}\n    {(order or ['-'])[0][:150]}", flush=True)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main(int((sys.argv + ["10"])[1]), "".join(sys.argv[2:])))
