"""The config of a GPT-2 with CRAM layers, registered with `AutoConfig` when this module is imported.

It has a module of its own because GPT-2's config cannot be imported before transformers' registry of models.
"""

from __future__ import annotations

from transformers.models.auto.configuration_auto import AutoConfig
from transformers.models.gpt2.configuration_gpt2 import GPT2Config

from cramlab.language_model.configuration import BringsModel


class CramGPT2Config(BringsModel, GPT2Config):
    """GPT-2's config. The CRAM layers are `CRAMConfig()` with `n_head` heads and a buffer of the whole context."""

    model_type = "cram_gpt2"
    model_module = "cramlab.language_model.cram_gpt2"


AutoConfig.register(CramGPT2Config.model_type, CramGPT2Config)
