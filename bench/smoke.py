"""python -m bench smoke [op ...]: is each op right on this device, at GPT-2's size?

One case an op and implementation, forward and backward, against its specification, each op in a
process of its own that may hang or crash. All are looked at, whatever fails.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import torch

from bench import results, setup
from fastgpt_kernels import OPS
from fastgpt_kernels.plans.child import Child, Failed
from fastgpt_kernels.plans.tune import Question, names
from fastgpt_kernels.registry import Sizes, specs

GPT2 = Sizes(batch_size=8, block_size=1024)
SMALL = Sizes(2, 16, 2, 64, 61, 64)
LIMIT_S = 120.0


def main(argv: list[str]) -> int:
    parser = setup.Parser("smoke", __doc__)
    parser.add_argument("ops", nargs="*", help="such as attention; default: all of the model's")
    args, flags = parser.parse(argv)
    if unknown := [op for op in args.ops if op not in OPS]:
        parser.error(f"no op {unknown[0]!r}: there are {', '.join(OPS)}")
    with parser.user_errors():
        device = setup.device_of(flags)
    gpu = device.type == "cuda"
    setup.say_small()
    dtype, sizes = (torch.bfloat16, GPT2) if gpu else (torch.float32, SMALL)
    result = results.Result("smoke", argv, {"sizes": asdict(sizes)})
    for op in specs("model"):
        if args.ops and op.name not in args.ops:
            continue
        for case in (sizes, replace(sizes, dropout=0.2)) if op.name == "attention" else (sizes,):
            dropout = f" dropout {case.dropout:g}" if case.dropout else ""
            question = Question(op.name, device, dtype, False, case)
            there = {**question.what, "device": str(device)}
            child = Child("fastgpt_kernels.plans.measure:OpBench", there)
            for name in names(op, question):
                row: dict[str, Any] = {"key": f"{op.name}{dropout} {name}", "problem": ""}
                try:
                    child.ask("check", {"implementation": name}, timeout=LIMIT_S)
                    ms = child.ask("turn", {"implementation": name}, timeout=LIMIT_S)
                    row["samples_ms"] = [ms]
                except Failed as e:
                    row["problem"] = str(e)
                print(f"  {row['key']}: {row['problem'] or 'right'}", flush=True)
                result.rows.append(row)
                result.save(args.out)
            child.close()
    wrong = [row for row in result.rows if row["problem"]]
    print(f"{len(result.rows) - len(wrong)} right, {len(wrong)} not")
    result.end(args.out)
    # Another library's failure is its row's; this command's are our kernels' and plain PyTorch's.
    return 1 if any(row["key"].endswith((" triton", " eager")) for row in wrong) else 0
