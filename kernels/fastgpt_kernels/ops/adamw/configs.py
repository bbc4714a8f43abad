"""Launch config of AdamW."""

from __future__ import annotations

from fastgpt_kernels.configs import Config, Table

# One entry: the key says nothing. Not measured: 8 elements a thread are two 128-bit loads from each
# of four tensors in flight.
ADAMW: Table = {"default": {1: Config({"BLOCK": 2048}, num_warps=8)}}
