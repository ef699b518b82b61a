"""Whether a finished consolidation is the one that was requested.

Source: ours.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from cramlab.auditing.resume import tokens_digest
from cramlab.config import differing, to_dict
from cramlab.consolidation.config import GROUPS, HELD_OUT, ConsolidationConfig
from cramlab.consolidation.documents import Parts, held_out_of, parts_of
from cramlab.consolidation.earlier import config_before, learned_before
from cramlab.consolidation.folder import load_layers, load_record
from cramlab.errors import ConsolidationError
from cramlab.hf.loading import Pretrained
from cramlab.hf.weights import config_digest
from cramlab.text import Corpus

_OPTIONS = {"config_sha256": "model", "held_out_sha256": "tokenizer", "learned_from_sha256": "tokenizer"}


def made_of(model: nn.Module, parts: Parts) -> dict[str, str]:
    """Digests of the model's configuration and of all tokens, which a record holds; see `unlike`."""
    digests = {"config_sha256": config_digest(model), "held_out_sha256": tokens_digest([parts[p] for p in HELD_OUT])}
    learned_from = [parts[group] for group in GROUPS if group in parts and group not in HELD_OUT]
    return digests | ({"learned_from_sha256": tokens_digest(learned_from)} if learned_from else {})


def unlike(
    folder: Path,
    pretrained: Pretrained,
    corpus: Corpus,
    config: ConsolidationConfig,
    *,
    max_loss_increase: float,
    further: Corpus | None = None,
    start: Path | None = None,
) -> list[str]:
    """Names of the options in which a finished folder differs from a request: fields of the config, "text" and so on.

    Args:
        folder: folder of a finished consolidation.
        pretrained: as for `consolidate`.
        corpus: as for `consolidate`.
        config: as for `consolidate`.
        max_loss_increase: as for `consolidate`.
        further: as for `consolidate`.
        start: as for `recalibrate`; None: learned without --from.

    Raises:
        ConsolidationError: when the folder is damaged, was made for other weights, or by a version that stored no
            digests of the rest.
    """
    record, _ = load_layers(pretrained.model, folder)
    if "made_of" not in record:
        raise ConsolidationError(
            f"{folder} was written by an earlier version of cramlab, which stored no digests of the model's "
            "configuration and of the tokens, so it cannot be compared with this request. cramlab.load_consolidated "
            "still loads it; choose another --out"
        )
    options = list(differing(to_dict(config), to_dict(config_before(record, folder))))
    if ("learned_on" in record) != (start is not None):
        return [*options, "from"]
    changed = {
        "max-loss-increase": record["promise"]["increase"] != max_loss_increase,
        "text": record["text"] != corpus.described(),
    }
    if start is None:
        changed["further-text"] = record["further_text"] != (None if further is None else further.described())
    else:
        changed["from"] = load_record(start)["weights_sha256"] != record["weights_sha256"]
    options += [name for name, differs in changed.items() if differs]
    return options or _made_of_others(record, pretrained, corpus, config, further, start)


def _made_of_others(
    record: dict[str, Any],
    pretrained: Pretrained,
    corpus: Corpus,
    config: ConsolidationConfig,
    further: Corpus | None,
    start: Path | None,
) -> list[str]:
    """Names of the options that differ only in digests. The text is drawn and encoded for this, which takes longest."""
    if start is None:
        parts = parts_of(pretrained, corpus, config, further)
    else:
        _, _, allowed = learned_before(pretrained.model, start, corpus, config)
        parts = held_out_of(pretrained, allowed, config)
    now = made_of(pretrained.model, parts)
    return sorted({_OPTIONS[name] for name, value in now.items() if record["made_of"].get(name) != value})
