"""Whether a finished consolidation is the one that is asked for.

Source: ours.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from cramlab.auditing.resume import tokens_digest
from cramlab.auditing.text import Corpus
from cramlab.config import differing, to_dict
from cramlab.consolidation.config import GROUPS, HELD_OUT, RetrofitConfig
from cramlab.consolidation.documents import Parts, held_out_of, parts_of
from cramlab.consolidation.earlier import learned_before
from cramlab.consolidation.folder import read_record, saved_layers
from cramlab.errors import ConsolidationError
from cramlab.hf.loading import Pretrained
from cramlab.hf.weights import config_digest

_SAID = {"config_sha256": "model", "held_out_sha256": "tokenizer", "learned_from_sha256": "tokenizer"}


def made_of(model: nn.Module, parts: Parts) -> dict[str, str]:
    """What a record holds, besides the digest of the weights, to tell whose work it is; see `unlike`."""
    found = {"config_sha256": config_digest(model), "held_out_sha256": tokens_digest([parts[p] for p in HELD_OUT])}
    learned_from = [parts[group] for group in GROUPS if group in parts and group not in HELD_OUT]
    return found | ({"learned_from_sha256": tokens_digest(learned_from)} if learned_from else {})


def unlike(
    folder: Path,
    pretrained: Pretrained,
    corpus: Corpus,
    config: RetrofitConfig,
    *,
    max_loss_increase: float,
    further: Corpus | None = None,
    start: Path | None = None,
) -> list[str]:
    """In what a folder is not what these would make: fields of the config, and "max-loss-increase", "text" and so on.

    Args:
        folder: of a finished consolidation.
        pretrained: as for `consolidate`, like all that follows.
        corpus: see there.
        config: see there.
        max_loss_increase: see there.
        further: see there.
        start: of `recalibrate`; None: learned anew.

    Raises:
        ConsolidationError: when the folder is damaged, was made for other weights, or by a version that kept no digests
            of the rest, so that nobody can tell.
    """
    record, _ = saved_layers(pretrained.model, folder)
    if "made_of" not in record:
        raise ConsolidationError(
            f"{folder} is of an earlier version of cramlab, which kept no digest of the model's configuration and of "
            "tokens, so nobody can tell whether it is the one asked for. cramlab.load_consolidated takes it as before; "
            "choose another --out"
        )
    found = differing(to_dict(config), record["config"])
    if ("learned_on" in record) != (start is not None):
        return [*found, "from"]
    changed = {
        "max-loss-increase": record["promise"]["increase"] != max_loss_increase,
        "text": record["text"] != corpus.described(),
    }
    if start is None:
        changed["further-text"] = record["further_text"] != (None if further is None else further.described())
    else:
        changed["from"] = read_record(start)["weights_sha256"] != record["weights_sha256"]
    names = [*found, *(name for name, is_so in changed.items() if is_so)]
    return names or _made_of_others(record, pretrained, corpus, config, further, start)


def _made_of_others(
    record: dict[str, Any],
    pretrained: Pretrained,
    corpus: Corpus,
    config: RetrofitConfig,
    further: Corpus | None,
    start: Path | None,
) -> list[str]:
    """What only tokens tell, once everything that is said of them agrees."""
    if start is None:
        parts = parts_of(pretrained, corpus, config, further)
    else:
        _, _, allowed = learned_before(pretrained.model, start, corpus, config)
        parts = held_out_of(pretrained, allowed, config)
    now = made_of(pretrained.model, parts)
    return sorted({_SAID[name] for name, value in now.items() if record["made_of"].get(name) != value})
