"""transformers' own common tests of models, from its source distribution (`make slow` fetches it).

It ships the tests of modeling and configuration; those of generation and export are not in it.
"""

import importlib
import os
import sys
import types
import unittest
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from cramlab.language_model.modeling import CRAMForCausalLM, CRAMForCausalLMConfig

SOURCE = os.environ.get("TRANSFORMERS_SOURCE")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]
if SOURCE is None:
    pytest.skip("TRANSFORMERS_SOURCE names no folder with transformers' source", allow_module_level=True)


def _common():
    """`tests/test_modeling_common.py` of the source; the mix-ins that it imports and that are not shipped are empty."""
    absent = {
        "tests.exporters.test_export": "ExportTesterMixin",
        "tests.generation.test_utils": "GenerationTesterMixin",
    }
    packages = {"tests": [str(Path(SOURCE) / "tests")], "tests.exporters": [], "tests.generation": []}
    before = {name: sys.modules.get(name) for name in (*packages, *absent)}
    for name, path in packages.items():
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = path
    for name, mixin in absent.items():
        sys.modules[name] = types.ModuleType(name)
        setattr(sys.modules[name], mixin, type(mixin, (), {}))
    try:
        return importlib.import_module("tests.test_modeling_common")
    finally:
        for name, module in before.items():
            sys.modules.pop(name)
            if module is not None:
                sys.modules[name] = module


common = _common()


class Sizes:
    """What the common tests ask of a model's tester."""

    is_training = True
    batch_size, seq_length = 3, 7
    hidden_size, num_hidden_layers, num_attention_heads, vocab_size = 32, 2, 2, 99

    def get_config(self):
        return CRAMForCausalLMConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=48,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            memory_capacity=12,
            state_size=16,
            semantic_rank=8,
            pad_token_id=0,
        )

    def prepare_config_and_inputs_for_common(self):
        tokens = torch.randint(1, self.vocab_size, (self.batch_size, self.seq_length))
        return self.get_config(), {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


class TestCRAMForCausalLM(common.ModelTesterMixin, unittest.TestCase):
    all_model_classes = (CRAMForCausalLM,)
    has_attentions = False  # a token that does not read has no attention to show

    def setUp(self):
        self.model_tester = Sizes()

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        return inputs_dict | ({"labels": inputs_dict["input_ids"]} if return_labels else {})

    @unittest.skip("the tests of generation are not shipped; tests/hf/test_modeling.py has ours")
    def test_generation_tester_mixin_inheritance(self):
        pass

    @unittest.skip("one class: there is no base model without the head")
    def test_model_base_model_prefix(self):
        pass
