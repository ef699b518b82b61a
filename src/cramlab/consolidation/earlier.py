"""What the folder of another consolidation holds, to be calibrated anew.

Source: ours.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from cramlab.auditing.text import Corpus
from cramlab.config import differing, from_dict, to_dict
from cramlab.consolidation.closed_form import Learned
from cramlab.consolidation.config import RECALIBRATED, REDRAWN, RetrofitConfig
from cramlab.consolidation.documents import unused
from cramlab.consolidation.folder import saved_layers
from cramlab.errors import ConsolidationError


def learned_before(
    model: nn.Module, start: Path, corpus: Corpus, config: RetrofitConfig
) -> tuple[dict[str, Any], Learned, Corpus]:
    """What a folder holds, to be measured anew: its record, adapters and gates, and the documents to measure on.

    On the very text and with the draw that it was learned with, all of them, as its parts are the same then; else those
    that nothing was learned from or chosen by, and no copies of these. Changed copies are not recognised.

    Raises:
        ConsolidationError: when it does not fit the model or the config, or when the record cannot tell.
    """
    before, layers = saved_layers(model, start)
    said = before["learned"]
    learned = Learned(
        layers=layers, benefit_gates=[], ranks=list(before["ranks"].values()),
        strengths=[(adapter, gate) for adapter, gate in said["strengths"]],
        sensitivity=said["sensitivity"], explained=said["explained"],
    )  # fmt: skip
    changed = differing(to_dict(config), to_dict(config_before(before, start)))
    for name in changed:
        if name not in RECALIBRATED + REDRAWN:
            raise ConsolidationError(
                f"retrofit.{name} belongs to what was learned; leave it as {start} has it, or learn anew without --from"
            )
    learned_on, text = before.get("learned_on") or before["text"], corpus.described()
    drawn_alike = "learned_on" not in before and not set(changed) & set(REDRAWN)
    if drawn_alike and text["digest"] == learned_on["digest"]:
        return before, learned, corpus
    if "used_documents" not in before:
        raise ConsolidationError(
            f"{start} does not say which documents it was learned from; give the text and the numbers of documents "
            "that it was learned with, or consolidate again"
        )
    packaged = text["version"] is not None and text["name"] == learned_on["name"]
    if packaged and text["digest"] != learned_on["digest"]:
        raise ConsolidationError(
            f"{start} was learned on {text['name']} of {learned_on['version']}, and this is that of {text['version']}, "
            "where documents that were learned from stand with small changes; give other text, or that version"
        )
    return before, learned, unused(corpus, before["used_documents"])


def config_before(record: dict[str, Any], folder: Path) -> RetrofitConfig:
    """What a folder was made with; a field that it does not know has its default.

    Raises:
        ConsolidationError: when it is no config of this version.
    """
    try:
        return from_dict(record["config"], RetrofitConfig())
    except (ValueError, TypeError) as error:
        raise ConsolidationError(
            f"{folder} has a config that this version cannot read ({error}); consolidate again"
        ) from error
