"""The attention functions of original models that a patch can stand in for, and registering what stands in for them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, eager_mask, sdpa_mask

# Names of the attention functions of patched models in `config._attn_implementation`, by that of the original.
NAMES = {"sdpa": "cramlab", "eager": "cramlab_eager"}
Original = Callable[[nn.Module], Callable[..., Any]]  # from an attention module to its own attention function


def _sdpa(_: nn.Module) -> Callable[..., Any]:
    return sdpa_attention_forward


def _eager(module: nn.Module) -> Callable[..., Any]:
    return inspect.unwrap(type(module).forward).__globals__["eager_attention_forward"]


def register(names: Mapping[str, str], function: Callable[..., Any]) -> None:
    """Registers an attention function with transformers, with the masks of the original.

    Args:
        names: name for each of the original's attention functions, "sdpa" and "eager".
        function: takes an `Original`, then what transformers hands to an attention function.
    """
    for original, of, mask in (("sdpa", _sdpa, sdpa_mask), ("eager", _eager, eager_mask)):
        AttentionInterface.register(names[original], functools.partial(function, of))
        AttentionMaskInterface.register(names[original], mask)
