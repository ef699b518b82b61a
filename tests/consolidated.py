"""A folder of a consolidation that was not learned: random gates and adapters for the packaged teaching model."""

import dataclasses

import torch

from cramlab import records
from cramlab.config import to_dict
from cramlab.consolidation.config import ConsolidationConfig
from cramlab.consolidation.folder import save
from cramlab.consolidation.guarantee import Guarantee
from cramlab.consolidation.patch.install import consolidatable_sites
from cramlab.consolidation.rules.learned import ConsolidatedAttention, rounded
from cramlab.hf.loading import load

WINDOW, SINKS, CONTEXT = 12, 2, 80
TEXT = "def read(path):\n    with open(path) as file:\n        return file.read()  # naïve\n\n" * 12


def make(folder, **changes):
    """Writes record and weights, and returns the record; `changes` replace fields of it."""
    pretrained = load("glassllm")
    generator = torch.Generator().manual_seed(1)
    layers = {}
    for site in consolidatable_sites(pretrained.model):
        layer = ConsolidatedAttention.beside(site, rank=2, units=2, window=WINDOW, n_sinks=SINKS)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.normal_(std=0.03, generator=generator)
        layers[site.layer] = layer.at(0.0)
    rounded(layers)
    config = ConsolidationConfig(context=CONTEXT, window=WINDOW, n_sinks=SINKS, units=2, calibration_documents=31)
    header = records.header(torch.device("cpu"))
    tested = [
        {"skipped_frac": share, "candidate": i, "p_value": p, "mean": mean, "upper_bound": mean + 0.011, "n_capped": i}
        for i, (share, p, mean) in enumerate([(0.5, 0.0123, 0.0125), (0.6, 0.0456, 0.0237), (0.7, 0.4, 0.0462)])
    ]
    return save(
        folder,
        layers,
        pretrained.model,
        {
            "cramlab": "0.1.0", "revision": None, "versions": header["versions"], "hardware": header["hardware"],
            "name": "glassllm", "note": "random gates | for tests", "further_text": None,
            "text": {"name": "own <text>", "version": None, "digest": "0" * 16},
            "config": to_dict(config), "promise": dataclasses.asdict(Guarantee(increase=0.043, bound=0.21, delta=0.1)),
            "skipped_frac": 0.6, "tested": tested,
            "test": {"documents": 7, "increase": 0.0213, "standard_error": 0.0021, "skipped_frac": 0.617,
                     "pairs_frac": 0.443},
            "learned": {"sensitivity": [1.0] * 4, "explained": [0.5] * 4, "strengths": [[1.0, 1.0]] * 4},
            "gradients": {"chosen": "end", "validation": {}, "losses": {}}, "seconds": {},
        } | changes,
    )  # fmt: skip


def examples(pretrained):
    """Names and tokens of three documents."""
    ids = torch.tensor(pretrained.encode(TEXT))
    return [(f"document {i}", ids[3 * i : 3 * i + CONTEXT]) for i in range(3)]
