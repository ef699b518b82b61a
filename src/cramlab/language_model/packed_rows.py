"""Packed rows: several documents in a row, none of which may see another.

Every argument that marks the documents is checked against the others. A mixer is then given a batch of documents
instead of a batch of rows, so that its state starts from zero in each document.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cramlab.mixer import MixerOutput, Routing


class Packing(NamedTuple):
    """Arguments by which transformers' collators mark the documents of packed rows.

    Attributes:
        position_ids: position within the document, which restarts with each document, (B, T) or (1, T).
        seq_idx: index of the document, (B, T).
        cu_seq_lens_q: starts of the documents of a single row and the end of the last, (documents + 1,).
        cu_seq_lens_k: the same.
        max_length_q: upper bound on the length of a document in tokens.
        max_length_k: the same.
    """

    position_ids: Tensor | None = None
    seq_idx: Tensor | None = None
    cu_seq_lens_q: Tensor | None = None
    cu_seq_lens_k: Tensor | None = None
    max_length_q: int | Tensor | None = None
    max_length_k: int | Tensor | None = None


class Documents:
    """Positions of the N documents in packed rows (B, T).

    Attributes:
        there: entries of the batch of documents that are tokens, bool (N, L).
        ends: last tokens of documents that are not the last of their row, bool (B, T).
    """

    def __init__(self, number: Tensor) -> None:
        """Takes the index of each token's document, counted over all rows, non-decreasing, int64 (B, T)."""
        self.shape, flat = number.shape, number.flatten()
        self.ends = F.pad(number[:, 1:] != number[:, :-1], (0, 1))
        lengths = torch.bincount(flat)
        first = lengths.cumsum(0) - lengths
        within = torch.arange(len(flat), device=flat.device) - first[flat]
        n_most = int(lengths.max())
        place = torch.arange(n_most, device=flat.device)
        self.there = place < lengths[:, None]
        self._apart = (first[:, None] + place).where(self.there, 0).flatten()
        self._together = flat * n_most + within

    def apart(self, entries: Tensor) -> Tensor:
        """Rows (B, T, ...) as documents, (N, L, ...); arbitrary values where there is no token."""
        return entries.flatten(0, 1).index_select(0, self._apart).unflatten(0, self.there.shape)

    def together(self, entries: Tensor) -> Tensor:
        """Documents (N, L, ...) as rows, (B, T, ...): the inverse of `apart`."""
        return entries.flatten(0, 1).index_select(0, self._together).unflatten(0, self.shape)

    def mix(self, mixer: nn.Module, x: Tensor, gaps: Tensor, valid: Tensor | None, routing: Routing) -> MixerOutput:
        """Runs a mixer on each document alone and returns its output as rows; see `Mixer.forward`."""
        there = self.there if valid is None else self.there & self.apart(valid)
        marks = {"audits": routing.audits, "skips": routing.skips}
        routing = routing._replace(**{name: self.apart(mark) for name, mark in marks.items() if mark is not None})
        mixed = mixer(self.apart(x), self.apart(gaps), None, valid=there, routing=routing)
        without = mixed.y_without_reads
        return mixed._replace(
            y=self.together(mixed.y),
            y_without_reads=None if without is None else self.together(without),
            trace=type(mixed.trace)(*(None if part is None else self.together(part) for part in mixed.trace)),
        )


class Past(NamedTuple):
    """Tokens in a cache.

    Attributes:
        n_tokens: number of tokens per row, padding included.
        empty: rows in which all of them were padding, bool (B,); None: there are no such rows.
    """

    n_tokens: int = 0
    empty: Tensor | None = None


def documents(
    packing: Packing, shape: tuple[int, int], valid: Tensor | None = None, past: Past | None = None
) -> Documents | None:
    """The documents of packed rows; None when each row is one document.

    Args:
        packing: the arguments that mark documents.
        shape: B and T.
        valid: false on padding, bool (B, T); None: all tokens are valid.
        past: tokens in the cache; None: there is no cache.

    Raises:
        ValueError: for arguments that mark no documents or contradict each other, and for packed rows with a cache.
    """
    others = any(part is not None for part in packing[1:])
    if (packing.position_ids is None and not others) or not shape[0] * shape[1]:
        return None
    past = past or Past()
    if shape[1] == 1 and not others:
        _check_goes_on(_rows("position_ids", packing.position_ids, shape), past)
        return None
    given = {name: value for name, value in packing._asdict().items() if value is not None}
    begins: dict[str, Tensor] = {}
    before = _valid_before(shape, valid, next((v.device for v in given.values() if isinstance(v, Tensor)), None))
    if packing.position_ids is not None:
        begins["position_ids"] = _restarts(_rows("position_ids", packing.position_ids, shape), before, valid, past)
    if packing.seq_idx is not None:
        begins["seq_idx"] = _changes("seq_idx", _rows("seq_idx", packing.seq_idx, shape), before, valid)
    for side in ("q", "k"):
        bounds, longest = given.get(f"cu_seq_lens_{side}"), given.get(f"max_length_{side}")
        if bounds is not None:
            number = _numbers(f"cu_seq_lens_{side}", bounds, shape, past)
            begins[f"cu_seq_lens_{side}"] = _changes(f"cu_seq_lens_{side}", number, before, valid)
            n_most = int(bounds.diff().max())
            if longest is not None and int(longest) < n_most:
                raise ValueError(
                    f"max_length_{side} = {int(longest)}, but cu_seq_lens_{side} has a document of {n_most} tokens"
                )
        elif longest is not None:
            raise ValueError(f"max_length_{side} is given without cu_seq_lens_{side}; give both, or neither")
    (name, found), *more = begins.items()
    for other, also in more:
        if not torch.equal(found, also):
            raise ValueError(f"{name} and {other} start documents at different tokens; give one of them, or correct it")
    if not bool(found.any()):
        return None
    if past.n_tokens:
        raise ValueError(f"{name} packs several documents into a row, which cannot continue past_key_values")
    first = torch.zeros_like(found)
    first[:, 0] = True
    return Documents((found | first).flatten().cumsum(0).view(shape) - 1)


def silent_tokens(valid: Tensor | None, packed: Documents | None) -> Tensor | None:
    """Tokens that do not predict the next token: padding and ends of documents, bool (B, T); None: there are none."""
    if valid is None:
        return None if packed is None else packed.ends
    return ~valid if packed is None else ~valid | packed.ends


def _rows(name: str, value: Any, shape: tuple[int, int]) -> Tensor:
    if not isinstance(value, Tensor) or value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise ValueError(f"{name} must be a tensor of integers, (batch, tokens) = {shape}")
    if value.dim() == 1:
        value = value[None]
    if value.dim() != 2 or value.shape[1] != shape[1] or value.shape[0] not in (1, shape[0]):
        raise ValueError(f"{name} has shape {tuple(value.shape)}; give (batch, tokens) = {shape}")
    return value.expand(shape)


def _valid_before(shape: tuple[int, int], valid: Tensor | None, device: torch.device | None) -> Tensor:
    """Index of the last valid token before each token, int64 (B, T); -1: there is none."""
    token = torch.arange(shape[1], device=device).expand(shape)
    if valid is None:
        return token - 1
    last = token.where(valid, -1).cummax(dim=1).values
    return torch.cat([last.new_full((shape[0], 1), -1), last[:, :-1]], dim=1)


def _restarts(position: Tensor, before: Tensor, valid: Tensor | None, past: Past) -> Tensor:
    """Tokens at which positions restart, at 0 or at the first position of the row, bool (B, T)."""
    token = torch.arange(position.shape[1], device=position.device)
    follows = before >= 0
    step = position - position.gather(1, before.clamp(min=0))
    one_on = (step == 1) | (step == token - before)  # padding in between may count or not
    begins = follows & ~one_on
    counts = ~follows if valid is None else ~follows & valid
    own_first = position.where(counts, 0).amax(dim=1, keepdim=True)  # one token a row counts, or none
    wrong = begins & (position != 0) & (position != own_first)
    if valid is not None:
        begins, wrong = begins & valid, wrong & valid
    if bool(wrong.any()):
        row, at = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"position_ids[{row}, {at}] = {int(position[row, at])} neither follows the position before it nor "
            "restarts; positions rise by one and start from 0 in each document"
        )
    _check_goes_on(own_first, past)
    return begins


def _check_goes_on(position: Tensor, past: Past) -> None:
    """Refuses positions (B, 1) that do not follow the tokens in a cache; padding there may be counted or not."""
    if not past.n_tokens:
        return
    least, most = (int(bound) for bound in position.aminmax())
    if most > past.n_tokens:
        raise ValueError(
            f"position_ids continue at {most}, but past_key_values ends at {past.n_tokens}; continue from there"
        )
    if least < 1 and (past.empty is None or bool((position[:, 0] < 1).logical_and(~past.empty).any())):
        raise ValueError(
            f"position_ids restart at {least} after {past.n_tokens} tokens in past_key_values; continue from there, "
            "or leave the cache out"
        )


def _changes(name: str, number: Tensor, before: Tensor, valid: Tensor | None) -> Tensor:
    """Tokens whose document differs from that of the token before, bool (B, T)."""
    step = (number - number.gather(1, before.clamp(min=0))).masked_fill(before < 0, 0)
    step = step if valid is None else step.masked_fill(~valid, 0)
    if bool((step < 0).any()):
        raise ValueError(f"{name} falls along a row; number the documents of a row in order")
    return step > 0


def _numbers(name: str, bounds: Any, shape: tuple[int, int], past: Past) -> Tensor:
    """Index of each token's document, (B, T), from the starts of the documents."""
    if not isinstance(bounds, Tensor) or bounds.dim() != 1 or bounds.is_floating_point() or len(bounds) < 2:
        raise ValueError(f"{name} must be a tensor of integers, (documents + 1,)")
    if past.n_tokens:
        raise ValueError(f"{name} cannot be given with past_key_values; leave it out")
    if shape[0] != 1:
        raise ValueError(
            f"{name} describes a single row, but there are {shape[0]}; give position_ids or seq_idx instead"
        )
    if int(bounds[0]) != 0 or int(bounds[-1]) != shape[1] or bool((bounds.diff() < 0).any()):
        raise ValueError(f"{name} must rise from 0 to the {shape[1]} tokens of the row")
    token = torch.arange(shape[1], device=bounds.device)
    return torch.bucketize(token, bounds.long(), right=True)[None]
