"""LoRA beside the linear maps of a model, for as long as a context manager is open (Hu et al. 2022, by peft)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from cramlab.errors import ConsolidationError

if TYPE_CHECKING:
    from peft import PeftModel

Weights = dict[str, Tensor]


@contextlib.contextmanager
def lora(model: nn.Module, rank: int, seed: int, weights: Mapping[str, Tensor] | None = None) -> Iterator[PeftModel]:
    """While open, every linear map of the blocks has LoRA; afterwards the model is the original, bit for bit.

    Args:
        model: a causal language model of transformers, without a patch.
        rank: rank of each map's LoRA.
        seed: seed of the maps down; the maps up start at zero, so that no output changes.
        weights: weights of the LoRA, see `weights_of`; None: the initial ones.

    Yields:
        The model as peft wraps it; `model` itself has the LoRA as well.

    Raises:
        ConsolidationError: when peft is missing.
    """
    try:
        from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
    except ImportError as error:
        raise ConsolidationError('recovery by LoRA needs the package peft; pip install "cramlab[recovery]"') from error
    asked = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        transposed = any(isinstance(module, Conv1D) for module in model.modules())  # as GPT-2 stores its maps
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM",
                            fan_in_fan_out=transposed)  # fmt: skip
        changed = get_peft_model(model, config)  # type: ignore[arg-type]
    try:
        if weights is not None:
            set_peft_model_state_dict(changed, dict(weights))
        yield changed  # type: ignore[misc]
    finally:
        changed.unload()  # type: ignore[operator]
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(asked[name])


def weights_of(changed: PeftModel) -> Weights:
    """Copies of the weights of the LoRA alone."""
    from peft import get_peft_model_state_dict

    return {name: weight.detach().clone() for name, weight in get_peft_model_state_dict(changed).items()}
