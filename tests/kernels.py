"""Where the Triton kernels are tested: on CUDA, or with TRITON_INTERPRET=1 in Triton's interpreter on a CPU."""

import importlib.util
import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
wanted = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or (DEVICE == "cpu" and not INTERPRETED),
    reason="wants Triton, and CUDA or TRITON_INTERPRET=1",
)
# The interpreter takes arrays of one number for numbers, which NumPy up to 2.3 allows under protest.
protest = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")


if INTERPRETED:  # it would take the bits of bfloat16 for integers where it multiplies
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    multiply = InterpreterBuilder.create_dot

    def widened(x):
        if x.dtype.scalar != tl.bfloat16:
            return x
        return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self, a, b, *more):
        return multiply(self, widened(a), widened(b), *more)

    InterpreterBuilder.create_dot = create_dot
