"""A hashed table of bigrams: what a token and the token before it are known to mean, without any computation.

It is a semantic memory for identity: a familiar pair of tokens has an output of its own. It belongs to the model
and not to a layer, whose semantic memory sees the hidden state of a token but not its number.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cramlab.language_model.packed_rows import Documents
from cramlab.mixer import Cost

_PRIME = 2**31 - 1
_OF_PREVIOUS, _OF_TOKEN = 1_540_483_477, 668_265_263  # below the prime, so that the hash fits into 63 bits


class Bigrams(NamedTuple):
    """What the table knows about the tokens of a call.

    Attributes:
        rows: row of each token's bigram, (B, T, D).
        newest: newest valid token of each sequence, for the next call; `vocab_size` where there is none, int64 (B,).
    """

    rows: Tensor
    newest: Tensor


class BigramTable(nn.Module):
    """Rows of width D for hashed pairs of a token and the one before it, added to the residual stream of every block.

    Rows are zero at first, so that a fresh table changes nothing; each block has a learned scale, at first one. Pairs
    that share a slot share a row. Source: Engram (arXiv 2601.07372), reduced to one table without a gate; scales of
    the blocks as in nanochat.
    """

    def __init__(self, n_slots: int, vocab_size: int, d_model: int, n_layers: int) -> None:
        super().__init__()
        if n_slots < 1:
            raise ValueError(f"bigram_slots = {n_slots} must be 0 (no table) or more")
        self.vocab_size = vocab_size
        self.table = nn.Parameter(torch.zeros(n_slots, d_model))
        self.scale = nn.Parameter(torch.ones(n_layers))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Sets all rows to zero and all scales to one."""
        self.table.zero_()
        self.scale.fill_(1)

    def forward(
        self, tokens: Tensor, valid: Tensor | None, documents: Documents | None, before: Tensor | None
    ) -> Bigrams:
        """Looks up the bigrams of tokens.

        Args:
            tokens: token numbers, (B, T).
            valid: false on padding, which is passed over, bool (B, T); None: all tokens are valid.
            documents: the documents of packed rows, whose first tokens follow nothing; None: each row is one.
            before: `newest` of the previous call, (B,); None: the tokens are the first.
        """
        tokens = tokens.long()
        if documents is None:
            previous, newest = self._previous(tokens, valid, before)
        else:
            there = documents.there if valid is None else documents.there & documents.apart(valid)
            previous = documents.together(self._previous(documents.apart(tokens), there, None)[0])
            newest = tokens[:, -1]
        return Bigrams(F.embedding(self.slots(previous, tokens), self.table), newest)

    def slots(self, previous: Tensor, tokens: Tensor) -> Tensor:
        """Slot of each pair, computed in integers, so that every device finds the same, int64 (...)."""
        return (previous * _OF_PREVIOUS + tokens * _OF_TOKEN) % _PRIME % len(self.table)

    def onto(self, x: Tensor, bigrams: Bigrams, layer: int | Tensor) -> Tensor:
        """The residual stream (B, T, D) before a block, whose number may be a tensor (1,), with the rows added."""
        return x + (self.scale[layer] * bigrams.rows).to(x.dtype)

    def cost(self, seq_len: int) -> Cost:  # noqa: ARG002
        """Cost on one sequence: no matrix products, the bytes of the table, and one token number from call to call."""
        parameter_bytes = sum(p.numel() * p.element_size() for p in self.parameters())
        return Cost(projection_flops=0.0, read_flops=0.0, state_bytes=8, parameter_bytes=parameter_bytes)

    def _previous(self, tokens: Tensor, valid: Tensor | None, before: Tensor | None) -> tuple[Tensor, Tensor]:
        """The valid token before each token, (B, T), `vocab_size` where there is none; and the newest, (B,)."""
        first = tokens.new_full((len(tokens), 1), self.vocab_size) if before is None else before[:, None]
        known = torch.cat([first, tokens], dim=1)
        if valid is not None:  # the newest valid token up to each
            place = torch.arange(1, known.shape[1], device=tokens.device).where(valid, 0)
            known = known.gather(1, F.pad(place, (1, 0)).cummax(dim=1).values)
        return known[:, :-1], known[:, -1]
