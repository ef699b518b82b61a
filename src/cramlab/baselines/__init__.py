"""Other mixers with the same interface (`Mixer`), one file each; `shared` holds machinery that several of them use."""

from cramlab.baselines.jamba import jamba
from cramlab.baselines.memorizer import Memorizer, MemorizerConfig
from cramlab.baselines.mixture_of_depths import MixtureOfDepths, MixtureOfDepthsConfig
from cramlab.baselines.recurrence import RecurrenceConfig, SelectiveRecurrence
from cramlab.baselines.seqboat import SeqBoat, SeqBoatConfig
from cramlab.baselines.sliding_window import SlidingWindowAttention, SlidingWindowConfig
from cramlab.baselines.transformer import CausalAttention, TransformerConfig
from cramlab.baselines.transmamba import TransMamba, TransMambaConfig

__all__ = [
    "CausalAttention",
    "Memorizer",
    "MemorizerConfig",
    "MixtureOfDepths",
    "MixtureOfDepthsConfig",
    "RecurrenceConfig",
    "SelectiveRecurrence",
    "SeqBoat",
    "SeqBoatConfig",
    "SlidingWindowAttention",
    "SlidingWindowConfig",
    "TransMamba",
    "TransMambaConfig",
    "TransformerConfig",
    "jamba",
]
