"""How many documents of a text serve each purpose, and what that does to the guarantee; decided before any work.

Fields of the config that the user has not set are chosen from what the text holds: documents as long as a context where
there are enough, else also shorter ones, else fewer, else pieces of long ones.

Source: ours.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from cramlab.auditing.copies import Originals
from cramlab.consolidation.config import PARTS, ConsolidationConfig
from cramlab.consolidation.documents import distinct, first_tokens, order_of
from cramlab.consolidation.guarantee import Guarantee
from cramlab.consolidation.pieces import n_usable, pieces_of
from cramlab.errors import ConsolidationError
from cramlab.hf.attention_sites import attention_sites
from cramlab.hf.loading import Pretrained
from cramlab.text import Corpus

_LEAST = {"test": 2, "validation": 2, "gate": 2, "sensitivity": 2, "fit": 4}
_CALIBRATING = 0.4  # share of scarce documents that calibrate
_LOOKED_AT = 4096  # documents whose lengths are looked at, at most
_MOST_TIMES = 4  # as many short documents as parts have at most, in multiples of the config's numbers
_LEAST_WINDOW = 8  # tokens


@dataclass(frozen=True)
class Plan:
    """What was chosen.

    Attributes:
        config: the config, with the fields that were free.
        said: what was chosen and what it does to the guarantee, a line each.
    """

    config: ConsolidationConfig
    said: tuple[str, ...]


def planned(
    pretrained: Pretrained,
    corpus: Corpus,
    config: ConsolidationConfig,
    *,
    free: Collection[str],
    increase: float,
    parts: Sequence[str] = PARTS,
) -> Plan:
    """Chooses the fields of a config that are free, so that the text suffices.

    Args:
        pretrained: model and tokenizer.
        corpus: the text.
        config: config whose numbers are kept where the text allows.
        free: names of the fields that may be changed.
        increase: guaranteed increase, nats per token.
        parts: parts that are drawn; without "fit" nothing is learned.

    Raises:
        ConsolidationError: when the text has too few documents and too few pieces; says what would do.
    """
    choice = _Choice(pretrained, corpus, config, free, parts)
    config = choice.made()
    return Plan(config, tuple(choice.said(config, increase)))


class _Choice:
    """One choice; arguments as for `planned`."""

    def __init__(
        self,
        pretrained: Pretrained,
        corpus: Corpus,
        config: ConsolidationConfig,
        free: Collection[str],
        parts: Sequence[str],
    ) -> None:
        self.pretrained, self.corpus, self.free, self.parts = pretrained, corpus, free, parts
        context = min(config.context, pretrained.context) if "context" in free else config.context
        window = min(config.window, max(_LEAST_WINDOW, context // 8)) if "window" in free else config.window
        self.config = dataclasses.replace(config, context=context, window=window)
        fewest = Guarantee(increase=1.0, bound=config.bound_factor, delta=config.delta).fewest_documents()
        self.least = _LEAST | {"calibration": fewest}
        self.sparse = math.ceil(4 / 3 * fewest / _CALIBRATING)  # with fewer documents hardly anything passes
        self.n_seen = self.n_copies = 0

    def made(self) -> ConsolidationConfig:
        """The config with what was chosen."""
        config = self.config
        if config.unit == "piece" or config.context > self.pretrained.context:  # the latter is refused later
            return config
        wanted = sum(self._sizes(config).values())
        enough = self._count(config, wanted) >= wanted
        if not self._changeable() or (enough and (self.n_seen <= 2 * wanted or "shortest" not in self.free)):
            return config  # a guarantee for a few long documents among many short ones would be of little use
        if "shortest" in self.free:
            config = self._with_short_documents()
        sizes = self._sizes(config)
        n = self._count(config, sum(sizes.values()))
        documents = self._shared(n, sizes)
        if documents is not None and n >= min(self.sparse, sum(sizes.values())):
            return self._sized(config, documents)
        if "unit" in self.free and set(self.parts) == set(PARTS):
            cut = dataclasses.replace(self.config, unit="piece")
            n_pieces = n_usable(self._count_pieces(cut))
            pieces = self._shared(n_pieces, self._sizes(cut))
            if pieces is not None and (documents is None or n_pieces >= self.sparse):
                return self._sized(cut, pieces)
        if documents is not None:
            return self._sized(config, documents)
        raise self._too_little(config, n, sizes)

    def _changeable(self) -> bool:
        return any(name in self.free for name in ("shortest", "unit", *(f"{part}_documents" for part in self.parts)))

    def _sizes(self, config: ConsolidationConfig) -> dict[str, int]:
        return {part: getattr(config, f"{part}_documents") for part in self.parts}

    def _sized(self, config: ConsolidationConfig, sizes: Mapping[str, int]) -> ConsolidationConfig:
        """The config with these sizes; fewer documents tell what a layer's error costs of more layers each."""
        changes: dict[str, Any] = {f"{part}_documents": n for part, n in sizes.items()}
        if "sensitivity" in sizes and "layers_per_document" in self.free:
            wanted = self.config.sensitivity_documents * self.config.layers_per_document
            n_layers = len(attention_sites(self.pretrained.model))
            more = min(n_layers, -(-wanted // sizes["sensitivity"]))
            changes["layers_per_document"] = max(config.layers_per_document, more)
        return dataclasses.replace(config, **changes)

    def _count(self, config: ConsolidationConfig, most: int) -> int:
        """Number of distinct documents that are long enough, up to `most`; `n_seen` is how many were looked at."""
        originals = Originals()
        found = [i for i, _ in islice(distinct(self.pretrained, self.corpus, config, originals), most)]
        order = order_of(self.corpus, config.seed)
        self.n_seen = order.index(found[-1]) + 1 if len(found) == most else len(order)
        self.n_copies = originals.n_copies
        return len(found)

    def _count_pieces(self, config: ConsolidationConfig) -> int:
        originals = Originals()
        order = order_of(self.corpus, config.seed)
        n = sum(1 for _ in pieces_of(self.pretrained, self.corpus, config, order, originals))
        self.n_copies = originals.n_copies
        return n

    def _with_short_documents(self) -> ConsolidationConfig:
        """The config with a least length, a shorter window where most documents would be too short, and more documents.

        The number of documents grows so that their tokens remain about as many.
        """
        config, order = self.config, order_of(self.corpus, self.config.seed)[:_LOOKED_AT]
        lengths = [len(first_tokens(self.pretrained, self.corpus.documents[i], config.context)) for i in order]
        sizes, window = self._sizes(config), config.window
        wanted = min(sum(sizes.values()), len(lengths) / 2)
        while "window" in self.free and window > _LEAST_WINDOW:
            if sum(n >= self._shortest(window) for n in lengths) >= wanted:
                break
            window = max(_LEAST_WINDOW, window // 2)
        usable = [n for n in lengths if n >= self._shortest(window)]
        if not usable:  # a shorter window does not help
            return dataclasses.replace(config, shortest=self._shortest(config.window))
        times = min(_MOST_TIMES, max(1.0, config.context * len(usable) / sum(usable)))
        more = {
            f"{part}_documents": math.ceil(times * n) for part, n in sizes.items() if f"{part}_documents" in self.free
        }
        return dataclasses.replace(config, window=window, shortest=self._shortest(window), **more)

    def _shortest(self, window: int) -> int:
        """Least length of a document of which a fair part is far."""
        return min(self.config.context, max(2 * window, window + self.config.n_sinks + 2))

    def _shared(self, n: int, sizes: Mapping[str, int]) -> dict[str, int] | None:
        """Shares out `n` documents; None: there are too few.

        Those that calibrate come first, as the guarantee rests on them.
        """
        fixed = {part: size for part, size in sizes.items() if f"{part}_documents" not in self.free}
        wanted = {part: size for part, size in sizes.items() if part not in fixed}
        left = n - sum(fixed.values())
        if left >= sum(wanted.values()):
            return dict(sizes)
        if left < sum(min(self.least[part], size) for part, size in wanted.items()):
            return None
        shares = {part: min(self.least[part], size) for part, size in wanted.items()}
        if "calibration" in wanted:
            frac = max(_CALIBRATING, wanted["calibration"] / sum(wanted.values()))
            rest = sum(size for part, size in shares.items() if part != "calibration")
            shares["calibration"] = min(
                wanted["calibration"], max(shares["calibration"], min(int(frac * left), left - rest))
            )
        spare = left - sum(shares.values())
        others = [part for part in wanted if part != "calibration"]
        missing = {part: wanted[part] - shares[part] for part in others}
        for part in others:  # the last gets what rounding leaves
            more = spare * missing[part] // max(1, sum(missing.values())) if part != others[-1] else spare
            shares[part] += min(more, missing[part])
            spare -= min(more, missing[part])
            missing[part] = 0
        return dict(sizes) | shares

    def _too_little(self, config: ConsolidationConfig, n: int, sizes: Mapping[str, int]) -> ConsolidationError:
        fixed = {part: size for part, size in sizes.items() if f"{part}_documents" not in self.free}
        least = sum(fixed.get(part, self.least[part]) for part in self.parts)
        left_out = f" and {self.n_copies} copies of these" if self.n_copies else ""
        chosen = f" (of which {', '.join(f'{n} {part}' for part, n in fixed.items())} were asked for)" if fixed else ""
        return ConsolidationError(
            f"the text has {n} documents of at least {config.least_tokens} tokens{left_out}, but {least} are "
            f"needed{chosen} for a guarantee with confidence {1 - config.delta:g}, and {sum(sizes.values())} are "
            f"recommended; give more text, or one long text of {least + 2 * len(PARTS)} contexts of {config.context} "
            "tokens, which is cut into pieces"
        )

    def said(self, config: ConsolidationConfig, increase: float) -> list[str]:
        """What is said before the work begins."""
        sizes, unit = self._sizes(config), f"{config.unit}s"
        n_learn = sum(size for part, size in sizes.items() if part in ("fit", "gate", "sensitivity"))
        least = f"{config.least_tokens} to " if config.least_tokens < config.context else ""
        learn = f"{n_learn} to learn from, " if n_learn else ""
        lines = [
            f"text: {self.corpus.name} has {_documents(len(self.corpus.documents))}; {sum(sizes.values())} {unit} of "
            f"{least}{config.context} tokens are used (shorter ones are left out): {learn}{sizes['validation']} to "
            f"validate, {sizes['calibration']} to calibrate and {sizes['test']} to test on; the window has "
            f"{config.window} tokens"
        ]
        guarantee = Guarantee(increase=increase, bound=config.bound_factor * increase, delta=config.delta)
        if guarantee.fewest_documents() > config.calibration_documents:
            return lines  # refused next, with the number that would do
        room = guarantee.room(config.calibration_documents)
        usual = guarantee.room(64)
        line = (
            f"guarantee: at most {increase:g} nats per token with confidence {1 - config.delta:g}. "
            f"{config.calibration_documents} {unit} can show it for a threshold that costs at most {room:.2g} on them"
        )
        if config.calibration_documents < 64:
            wider = f" ask for --max-loss-increase {increase * usual / room:.2g}, or" * (room > 0.1 * usual)
            line += f" (64 {unit}: {usual:.2g}); for as much room,{wider} give more text"
        lines.append(line)
        if config.unit == "piece":
            lines.append(weaker(len(self.corpus.documents), config))
        return lines


def weaker(n_documents: int, config: ConsolidationConfig) -> str:
    """The sentence on a guarantee that counts pieces, which commands print and records hold."""
    return (
        f"weaker guarantee: it rests on {config.calibration_documents} pieces of {_documents(n_documents)}, which "
        "depend on each other and are counted as if they did not; the parts are blocks of the text with unused pieces "
        "between them; it says nothing about other documents"
    )


def _documents(n: int) -> str:
    return "one document" if n == 1 else f"{n:,} documents"
