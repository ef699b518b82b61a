"""Observing a model: each layer's window and full attention side by side, for learning, measuring and baselines."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cramlab.consolidation.patch.far_reads import Decision, FarReads, Seen
from cramlab.consolidation.patch.install import patched
from cramlab.hf.attention_sites import AttentionSite, base_model

Look = Callable[[int, Seen], Decision | None]


class Observer(FarReads):
    """Passes what one layer sees to a function, which may decide; where it returns None, the original answers.

    Args:
        index: index of the site, the function's first argument.
        look: the function.
        window: as for `FarReads`.
        n_sinks: as for `FarReads`.
    """

    def __init__(self, index: int, look: Look, *, window: int, n_sinks: int) -> None:
        super().__init__(window=window, n_sinks=n_sinks)
        self.index, self.look = index, look

    def decide(self, seen: Seen) -> Decision | None:
        """What the function returns."""
        return self.look(self.index, seen)


class Recorder(FarReads):
    """Decides as another patch does, and keeps which tokens of the first row of a batch read.

    Args:
        layer: the other patch, which is not installed itself.
    """

    def __init__(self, layer: FarReads) -> None:
        super().__init__(window=layer.window, n_sinks=layer.n_sinks)
        self.layer = layer
        self._calls: list[tuple[int, Tensor]] = []

    def decide(self, seen: Seen) -> Decision | None:
        """The decision of the other patch; a token reads when any of its heads does."""
        decision = self.layer.decide(seen)
        reads = torch.ones_like(seen.far) if decision is None else decision[0] > 0
        reads = reads.any(-1) if reads.ndim == 3 else reads
        self._calls.append((seen.start, (reads & seen.far)[0].cpu()))
        return decision

    @property
    def never_reads(self) -> bool:  # type: ignore[override]
        """What the other patch says."""
        return self.layer.never_reads

    def reads(self, n_tokens: int) -> Tensor:
        """Whether each of the first `n_tokens` tokens read, bool (T,); of calls on the same position, the last."""
        found = torch.zeros(n_tokens, dtype=torch.bool)
        for start, reads in self._calls:
            found[start : start + len(reads)] = reads[: max(0, n_tokens - start)]
        return found


def recorded(layers: Mapping[int, FarReads]) -> dict[int, Recorder]:
    """A recorder around each of these patches, by index of the block."""
    return {i: Recorder(layer) for i, layer in layers.items()}


def observe(
    model: nn.Module, sites: Sequence[AttentionSite], tokens: Tensor, look: Look, *, window: int, n_sinks: int
) -> Tensor:
    """Runs a model without its head and calls `look(i, seen)` for each site i.

    Args:
        model: a causal language model without a patch.
        sites: attention sub-layers to be observed.
        tokens: (B, T).
        look: may decide, as `FarReads.decide` does; None: the original answers.
        window: as for `FarReads`.
        n_sinks: as for `FarReads`.

    Returns:
        The last hidden states, (B, T, D).
    """
    layers = {site.layer: Observer(i, look, window=window, n_sinks=n_sinks) for i, site in enumerate(sites)}
    with patched(model, layers):
        return base_model(model)(input_ids=tokens, use_cache=False).last_hidden_state


def added_by_far(site: AttentionSite, seen: Seen, tokens: Any = ...) -> Tensor:
    """What the far read adds to the layer's output, (..., d_model).

    Args:
        site: the attention sub-layer.
        seen: what it sees.
        tokens: index into (B, T) of the wanted tokens; ...: all.
    """
    if not site.direct:
        return seen.added[tokens]
    heads = torch.stack([seen.full[tokens].flatten(-2), seen.near[tokens].flatten(-2)])
    outputs = site.out_proj.forward(heads)  # without hooks
    return outputs[0] - outputs[1]
