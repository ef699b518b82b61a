"""Packed rows: several documents in a row, none of which may see another.

Whatever says where documents begin is read, checked against the rest, and turned into one answer; a mixer is then given
a batch of documents instead of a batch of rows, so that everything that it carries begins anew with each.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cramlab.mixer import MixerOutput, Routing


class Packing(NamedTuple):
    """What transformers' collators say about packed rows.

    Attributes:
        position_ids: counts up within a document and starts again with the next, (B, T) or (1, T).
        seq_idx: number of the document, (B, T).
        cu_seq_lens_q: where documents begin, and the end of the last, (documents + 1,), of a single row.
        cu_seq_lens_k: the same.
        max_length_q: of a document, at least that of the longest.
        max_length_k: the same.
    """

    position_ids: Tensor | None = None
    seq_idx: Tensor | None = None
    cu_seq_lens_q: Tensor | None = None
    cu_seq_lens_k: Tensor | None = None
    max_length_q: int | Tensor | None = None
    max_length_k: int | Tensor | None = None


class Documents:
    """Where the documents of packed rows (B, T) lie.

    Attributes:
        there: which places of the batch of documents are tokens, bool (N, L).
        ends: the last token of each document that is not the last of its row, bool (B, T).
    """

    def __init__(self, number: Tensor) -> None:
        """Takes the number of each token's document, counted over all rows, never falling, int64 (B, T)."""
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
        """Entries (B, T, ...) of rows as entries of documents, (N, L, ...); anything where there is no token."""
        return entries.flatten(0, 1).index_select(0, self._apart).unflatten(0, self.there.shape)

    def together(self, entries: Tensor) -> Tensor:
        """The way back."""
        return entries.flatten(0, 1).index_select(0, self._together).unflatten(0, self.shape)

    def mix(self, mixer: nn.Module, x: Tensor, gaps: Tensor, valid: Tensor | None, routing: Routing) -> MixerOutput:
        """What a mixer answers to each document alone, laid out as the rows are; see `Mixer.forward`."""
        there = self.there if valid is None else self.there & self.apart(valid)
        audits = None if routing.audits is None else self.apart(routing.audits)
        mixed = mixer(self.apart(x), self.apart(gaps), None, valid=there, routing=routing._replace(audits=audits))
        without = mixed.y_without_reads
        return mixed._replace(
            y=self.together(mixed.y),
            y_without_reads=None if without is None else self.together(without),
            trace=type(mixed.trace)(*(None if part is None else self.together(part) for part in mixed.trace)),
        )


class Past(NamedTuple):
    """What a cache has seen.

    Attributes:
        n_tokens: of each row, padding included.
        empty: rows of which all of these were padding, bool (B,); None: there is none.
    """

    n_tokens: int = 0
    empty: Tensor | None = None


def documents(
    packing: Packing, shape: tuple[int, int], valid: Tensor | None = None, past: Past | None = None
) -> Documents | None:
    """The documents of rows; None where each row is one.

    Args:
        packing: as given.
        shape: B and T.
        valid: false on padding, bool (B, T); None: all are valid.
        past: what a cache has seen; None: nothing.

    Raises:
        ValueError: for what no packed rows can be meant by, for contradictions, and for packed rows with a cache.
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
                    f"max_length_{side} = {int(longest)}, but cu_seq_lens_{side} has {n_most} tokens in one"
                )
        elif longest is not None:
            raise ValueError(f"max_length_{side} is given without cu_seq_lens_{side}; give both, or neither")
    (name, found), *more = begins.items()
    for other, also in more:
        if not torch.equal(found, also):
            raise ValueError(
                f"{name} and {other} let documents begin at different tokens; give one of them, or mend it"
            )
    if not bool(found.any()):
        return None
    if past.n_tokens:
        raise ValueError(f"{name} packs several documents into a row, which cannot go on from past_key_values")
    first = torch.zeros_like(found)
    first[:, 0] = True
    return Documents((found | first).flatten().cumsum(0).view(shape) - 1)


def silent_tokens(valid: Tensor | None, packed: Documents | None) -> Tensor | None:
    """The tokens that predict none of the next: padding, and ends of documents, bool (B, T); None: there are none."""
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
    """The last valid token before each, int64 (B, T); -1: there is none."""
    token = torch.arange(shape[1], device=device).expand(shape)
    if valid is None:
        return token - 1
    last = token.where(valid, -1).cummax(dim=1).values
    return torch.cat([last.new_full((shape[0], 1), -1), last[:, :-1]], dim=1)


def _restarts(position: Tensor, before: Tensor, valid: Tensor | None, past: Past) -> Tensor:
    """Where positions start again, bool (B, T): at 0, or at what the row began with."""
    token = torch.arange(position.shape[1], device=position.device)
    follows = before >= 0
    step = position - position.gather(1, before.clamp(min=0))
    one_on = (step == 1) | (step == token - before)  # padding in between may be counted or not
    begins = follows & ~one_on
    counts = ~follows if valid is None else ~follows & valid
    own_first = position.where(counts, 0).amax(dim=1, keepdim=True)  # one token a row counts, or none
    wrong = begins & (position != 0) & (position != own_first)
    if valid is not None:
        begins, wrong = begins & valid, wrong & valid
    if bool(wrong.any()):
        row, at = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"position_ids[{row}, {at}] = {int(position[row, at])} neither follows the position before it nor starts "
            "again; positions count up by one, from 0 in each document"
        )
    _check_goes_on(own_first, past)
    return begins


def _check_goes_on(position: Tensor, past: Past) -> None:
    """Refuses positions (B, 1) that do not come after what a cache has seen, of which padding may count or not."""
    if not past.n_tokens:
        return
    least, most = (int(bound) for bound in position.aminmax())
    if most > past.n_tokens:
        raise ValueError(f"position_ids go on at {most}, and past_key_values ends at {past.n_tokens}; go on from there")
    if least < 1 and (past.empty is None or bool((position[:, 0] < 1).logical_and(~past.empty).any())):
        raise ValueError(
            f"position_ids start again at {least} after {past.n_tokens} tokens in past_key_values; go on from there, "
            "or leave the cache out"
        )


def _changes(name: str, number: Tensor, before: Tensor, valid: Tensor | None) -> Tensor:
    """Where the number of the document is another than before, bool (B, T)."""
    step = (number - number.gather(1, before.clamp(min=0))).masked_fill(before < 0, 0)
    step = step if valid is None else step.masked_fill(~valid, 0)
    if bool((step < 0).any()):
        raise ValueError(f"{name} falls along a row; number the documents of a row in their order")
    return step > 0


def _numbers(name: str, bounds: Any, shape: tuple[int, int], past: Past) -> Tensor:
    """The number of each token's document, (B, T), from where these begin."""
    if not isinstance(bounds, Tensor) or bounds.dim() != 1 or bounds.is_floating_point() or len(bounds) < 2:
        raise ValueError(f"{name} must be a tensor of integers, (documents + 1,)")
    if past.n_tokens:
        raise ValueError(f"{name} cannot be given with past_key_values; leave it out")
    if shape[0] != 1:
        raise ValueError(f"{name} is of a single row, and there are {shape[0]}; give position_ids or seq_idx instead")
    if int(bounds[0]) != 0 or int(bounds[-1]) != shape[1] or bool((bounds.diff() < 0).any()):
        raise ValueError(f"{name} must rise from 0 to the {shape[1]} tokens of the row")
    token = torch.arange(shape[1], device=bounds.device)
    return torch.bucketize(token, bounds.long(), right=True)[None]
