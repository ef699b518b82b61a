"""Operators without parameters.

`read` is attention, `gated_decode` attention of one token a sequence behind a gate, `scan` linear recurrences, `conv` a
short convolution before keys, and `select` takes some tokens of many.

Each folder has the operator, its reference implementation in plain PyTorch (`naive`), and its Triton kernels
(`kernels`, `fused`).
"""
