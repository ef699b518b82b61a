"""Operators without parameters: `read` (attention), `scan` (linear recurrence) and `select` (some tokens of many).

Each folder has the operator, its reference implementation in plain PyTorch (`naive`), and its Triton kernels
(`kernels`, `fused`).
"""
