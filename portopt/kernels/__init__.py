"""Kernels: a traced program as one pass over raw memory, all tensors in one launch.

`llvm` prints a program as LLVM assembly, `compiler` makes machine code of it and keeps that on
disk, and `cpu` launches it on addresses. `triton` is the same for CUDA, and `slow` says why a step
goes without. `layout` asks arrays for their addresses, in a loop made of `loops`. Nothing here
knows a framework.
"""
