"""cramlab: how much of a model's attention is really needed, and can it learn to need less?

The public names; everything else is found by its module: tasks in `cramlab.tasks`, the method in `cramlab.memory`,
training in `cramlab.training`, experiments in `cramlab.experiments`. Its language models are opened by the
Auto classes of transformers.
"""

from cramlab.batch import Batch, InputSpec, Predictions
from cramlab.language_model import auto
from cramlab.memory import CRAMConfig, CRAMLayer
from cramlab.metrics import score
from cramlab.mixer import Cost, Mixer, MixerOutput, Routing
from cramlab.model import ModelConfig, SequenceModel
from cramlab.pretrained import load, read_report
from cramlab.tasks.srcd import SRCDConfig

__all__ = [
    "Batch",
    "CRAMConfig",
    "CRAMLayer",
    "Cost",
    "InputSpec",
    "Mixer",
    "MixerOutput",
    "ModelConfig",
    "Predictions",
    "Routing",
    "SRCDConfig",
    "SequenceModel",
    "load",
    "read_report",
    "score",
]

auto.register()
