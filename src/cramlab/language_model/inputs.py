"""Checks of the arguments of a CRAM language model, before anything runs: they are honoured or refused."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.modeling_utils import PreTrainedModel

from cramlab.value_checks import checks_values, values_known

IGNORED = -100  # label of a token without a target
_FEW = 64  # up to this many numbers, Python is faster than a kernel


def check_tokens(input_ids: Any, inputs_embeds: Any, vocab_size: int, model: PreTrainedModel) -> None:
    """Checks for a batch of token numbers (B, T) or of embeddings (B, T, D).

    Raises:
        ValueError: unless exactly one of the two is given, with the right shape, type and range.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("give exactly one of input_ids and inputs_embeds")
    if input_ids is not None:
        _check_whole("input_ids", input_ids)
        if input_ids.dim() != 2:
            raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}; give (batch, tokens)")
        _check_range("input_ids", input_ids, vocab_size)
        return
    width, dtype = model.config.hidden_size, model.dtype
    if not isinstance(inputs_embeds, Tensor) or inputs_embeds.dim() != 3 or inputs_embeds.shape[-1] != width:
        shape = f"has shape {tuple(inputs_embeds.shape)}" if isinstance(inputs_embeds, Tensor) else "is not a tensor"
        raise ValueError(f"inputs_embeds {shape}; give (batch, tokens, {width})")
    mixed = torch.is_autocast_enabled(inputs_embeds.device.type) and inputs_embeds.is_floating_point()
    if inputs_embeds.dtype != dtype and not mixed:
        raise ValueError(f"inputs_embeds has type {inputs_embeds.dtype} and the model {dtype}; convert one of them")


@contextmanager
def known_windows(windows: Tensor, vocab_size: int) -> Iterator[None]:
    """Checks windows of text (B, T), tokens and labels in one, once; models then skip it in the `with` block.

    Windows on the host are checked at once. A model that is given a copy on an accelerator would wait for all the work
    that is queued there.

    Raises:
        ValueError: for another type or range, or a single token a window, which leaves nothing to predict.
    """
    _check_whole("input_ids", windows)
    _check_range("input_ids", windows, vocab_size)
    check_some_target(targets(windows, None, (windows.shape[0], windows.shape[1]), vocab_size), None)
    with values_known():
        yield


def valid_tokens(attention_mask: Any, shape: tuple[int, int], n_past: int, seen: Tensor | None) -> Tensor | None:
    """The tokens that are not padding, bool (B, T); None: all tokens are valid.

    Args:
        attention_mask: 1 on tokens and 0 on padding, (B, T), or (B, n_past + T) with the tokens in the cache.
        shape: B and T.
        n_past: number of tokens in the cache.
        seen: which of the first of them were valid, bool (B, up to `n_past`); None: all.

    Raises:
        ValueError: for another shape, for other numbers, and for another mask of the tokens in the cache.
    """
    if attention_mask is None:
        return None
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2:
        given = f"has {attention_mask.dim()} dimensions" if isinstance(attention_mask, Tensor) else "is not a tensor"
        raise ValueError(
            f"attention_mask {given}; a recurrence cannot hide a token from only some later tokens: "
            "give (batch, tokens) with 1 on tokens and 0 on padding"
        )
    n_batch, n_tokens = shape
    whole = attention_mask.shape == (n_batch, n_past + n_tokens)
    if not whole and attention_mask.shape != shape:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; give {shape}"
            + (f", or {(n_batch, n_past + n_tokens)} with the tokens in the cache" if n_past else "")
        )
    ones = attention_mask == 1
    if seen is None and bool(ones.all()):
        return None
    given = attention_mask != 0
    if not bool((ones | ~given).all()):
        raise ValueError("attention_mask holds numbers other than 0 and 1; give 1 on tokens and 0 on padding")
    if whole and n_past:
        before, given = given[:, :n_past], given[:, n_past:]
        n_seen = 0 if seen is None else seen.shape[1]
        if not bool(before[:, n_seen:].all()) or (seen is not None and not torch.equal(before[:, :n_seen], seen)):
            raise ValueError(
                "attention_mask hides other tokens of past_key_values than in the call that read them, and a recurrent "
                "state cannot forget tokens; run the context again without the cache"
            )
    return None if bool(given.all()) else given


def targets(
    labels: Any, shift_labels: Any, shape: tuple[int, int], vocab_size: int, absent: Tensor | None = None
) -> Tensor:
    """The token that each token is to predict, int64 (B, T), -100 where there is none.

    Args:
        labels: the tokens, (B, T), -100 where there is no loss.
        shift_labels: the targets, (B, T); None: the labels shifted by one.
        shape: B and T.
        vocab_size: number of tokens of the model.
        absent: tokens that predict nothing, such as padding, bool (B, T); None: there are none.

    Raises:
        ValueError: for another shape, type or range.
    """
    for name, given in (("labels", labels), ("shift_labels", shift_labels)):
        if given is None:
            continue
        _check_whole(name, given)
        if given.shape != shape:
            raise ValueError(f"{name} has shape {tuple(given.shape)}; give one label per token, {shape}")
        _check_range(name, given, vocab_size, IGNORED)
    target = F.pad(labels, (0, 1), value=IGNORED)[:, 1:] if shift_labels is None else shift_labels
    target = target.long().contiguous()
    return target if absent is None else target.masked_fill(absent, IGNORED)


def check_some_target(target: Tensor, n_items: Any) -> None:
    """Refuses a loss without a target, which would be NaN.

    Raises:
        ValueError: when there is no target, unless the number of targets of a larger batch is given.
    """
    if not checks_values():
        return
    if n_items is None and not bool((target != IGNORED).any()):
        raise ValueError("labels leave no token to predict: all are -100, or have no token before them")
    if n_items is not None and not bool((torch.as_tensor(n_items) > 0).all()):
        raise ValueError(f"num_items_in_batch = {n_items} must be positive: labels leave no token to predict")


def kept(x: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    """The tokens of x (B, T, D) to compute logits for: the last `logits_to_keep`, all for 0, or those with its indices.

    Raises:
        ValueError: for a negative number, or indices out of range.
    """
    if not isinstance(logits_to_keep, Tensor):
        if logits_to_keep < 0:
            raise ValueError(f"logits_to_keep = {logits_to_keep} must be 0 (all tokens) or more")
        return x[:, -logits_to_keep:] if logits_to_keep else x
    if logits_to_keep.dim() == 0:
        return kept(x, int(logits_to_keep))
    if logits_to_keep.dtype != torch.bool:
        _check_whole("logits_to_keep", logits_to_keep)
    n_tokens = x.shape[1]
    fits = logits_to_keep.dtype != torch.bool or len(logits_to_keep) == n_tokens
    if logits_to_keep.dim() != 1 or not fits:
        raise ValueError(f"logits_to_keep has shape {tuple(logits_to_keep.shape)}; give the indices of tokens, 1-D")
    if logits_to_keep.dtype != torch.bool and logits_to_keep.numel():
        least, most = (int(bound) for bound in logits_to_keep.aminmax())
        if least < -n_tokens or most >= n_tokens:
            raise ValueError(f"logits_to_keep asks for token {most if most >= n_tokens else least} of {n_tokens}")
    return x[:, logits_to_keep.to(x.device)]


def check_nothing_else(unknown: Mapping[str, Any]) -> None:
    """Refuses unknown arguments.

    Raises:
        ValueError: for the first of them that is neither None nor false.
    """
    for name, value in unknown.items():
        silent = value is None or value is False
        if name == "is_causal":
            silent = value is None or value is True
        if not silent:
            raise ValueError(f"{name} is unknown to a CRAM language model; leave it out")


def check_no_types(token_type_ids: Tensor | None) -> None:
    """Refuses token types other than 0. Tokenizers return zeros for models without token types too.

    Raises:
        ValueError: for any other type.
    """
    if token_type_ids is not None and bool((token_type_ids != 0).any()):
        raise ValueError("token_type_ids holds types other than 0, but the model has a single type; leave them out")


def _check_whole(name: str, given: Any) -> None:
    if not isinstance(given, Tensor):
        raise ValueError(f"{name} is a {type(given).__name__}; give a tensor of integers")
    if given.is_floating_point() or given.is_complex() or given.dtype == torch.bool:
        raise ValueError(f"{name} has type {given.dtype}; give integers")


def _check_range(name: str, given: Tensor, vocab_size: int, absent: int | None = None) -> None:
    """Checks the range of the numbers; compiled code skips this."""
    if not given.numel() or not checks_values():
        return
    numbers = given.flatten().tolist() if given.numel() <= _FEW else [int(bound) for bound in given.aminmax()]
    least, most = min(numbers), max(numbers)
    if most >= vocab_size:
        raise ValueError(f"{name} holds {most}; the model's vocabulary ends at {vocab_size - 1}")
    if least < 0 and (absent is None or bool(((given < 0) & (given != absent)).any())):
        wrong = least if absent is None else int(given[(given < 0) & (given != absent)][0])
        raise ValueError(
            f"{name} holds {wrong}; tokens are numbered from 0" + (f", with {absent} for none" if absent else "")
        )
