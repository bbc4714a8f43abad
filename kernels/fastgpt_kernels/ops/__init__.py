"""The ops: a folder, or room, each.

op.py        the public function, declared as a PyTorch op through `fastgpt_kernels.register`
kernels.py   the Triton kernels and their launchers
configs.py   launch configs by architecture and size
record.py    what the op tells the rest of the program, see `fastgpt_kernels.record`
"""
