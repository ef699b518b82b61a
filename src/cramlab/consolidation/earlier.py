"""Reading the folder of another consolidation, in order to calibrate it again.

Source: ours.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from cramlab.config import differing, from_dict, to_dict
from cramlab.consolidation.config import RECALIBRATED, REDRAWN, ConsolidationConfig
from cramlab.consolidation.documents import unused
from cramlab.consolidation.folder import load_layers
from cramlab.consolidation.learn.closed_form import Learned
from cramlab.errors import ConsolidationError
from cramlab.text import Corpus


def learned_before(
    model: nn.Module, start: Path, corpus: Corpus, config: ConsolidationConfig
) -> tuple[dict[str, Any], Learned, Corpus]:
    """Loads a folder, and finds the documents on which it may be calibrated.

    On the text and with the draw that the folder was learned with, its parts are the same again, so all documents are
    allowed. Otherwise only documents that nothing was learned from or chosen by are, without copies of the others;
    copies with small changes are not recognised.

    Args:
        model: the model that the folder was made for.
        start: the folder.
        corpus: text to calibrate and test on.
        config: config of the calibration.

    Returns:
        The record, gates and adapters, and the documents that are allowed.

    Raises:
        ConsolidationError: when the folder does not fit the model or the config, or when its record does not say which
            documents are allowed.
    """
    before, layers = load_layers(model, start)
    said = before["learned"]
    learned = Learned(
        layers=layers, benefit_gates=[], ranks=list(before["ranks"].values()),
        strengths=[(adapter, gate) for adapter, gate in said["strengths"]],
        sensitivity=said["sensitivity"], explained=said["explained"],
    )  # fmt: skip
    changed = differing(to_dict(config), to_dict(config_before(before, start)))
    for name, value in changed.items():
        if name not in RECALIBRATED + REDRAWN:
            raise ConsolidationError(
                f"consolidation.{name} = {value} cannot be changed with --from, as the gates and adapters depend on "
                f"it; leave it as in {start}, or learn again without --from"
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
            f"{start} was learned on {text['name']} of {learned_on['version']}; the {text['name']} of "
            f"{text['version']} is nearly the same text, so it cannot serve as held-out data. Pass other text"
        )
    return before, learned, unused(corpus, before["used_documents"])


def config_before(record: dict[str, Any], folder: Path) -> ConsolidationConfig:
    """The config that a folder was made with; fields that its record lacks have their defaults.

    Raises:
        ConsolidationError: when the record holds no config of this version.
    """
    try:
        return from_dict(record["config"], ConsolidationConfig())
    except (ValueError, TypeError) as error:
        raise ConsolidationError(
            f"{folder} has a config that this version cannot read ({error}); consolidate again"
        ) from error
