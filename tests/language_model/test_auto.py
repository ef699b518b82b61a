"""`import cramlab` is enough for the Auto classes of transformers, whichever is imported first."""

import importlib
import importlib.util
import subprocess
import sys

import pytest
from families import build
from tiny_cram import make

from cramlab.language_model import auto

OPEN = """
import sys
{first}
assert {imported} == ("transformers" in sys.modules)
import cramlab
from transformers import AutoConfig, AutoModelForCausalLM
assert type(AutoConfig.from_pretrained(r"{folder}/cram")).__name__ == "CRAMForCausalLMConfig"
for name, kind in (("cram", "CRAMForCausalLM"), ("cram_gpt2", "CramGPT2LMHeadModel")):
    assert type(AutoModelForCausalLM.from_pretrained(r"{folder}/" + name)).__name__ == kind
"""


@pytest.mark.parametrize(
    ("first", "imported"), [("import cramlab", False), ("import transformers.modeling_layers", True)]
)
def test_a_saved_model_is_opened_whichever_is_imported_first(tmp_path, first, imported):
    make().save_pretrained(tmp_path / "cram")
    build("cram_gpt2").save_pretrained(tmp_path / "cram_gpt2")
    code = OPEN.format(first=first, imported=imported, folder=tmp_path)
    done = subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_whoever_asks_for_the_config_of_gpt2_first_is_served():
    code = (
        "import cramlab; from cramlab.language_model.run import TextRunConfig; "
        "from transformers import AutoConfig; "
        "assert type(AutoConfig.for_model('cram_gpt2')).__name__ == 'CramGPT2Config'"
    )
    done = subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_other_modules_are_found_as_before():
    finder = auto._Registering()
    assert finder.find_spec("json", None) is None
    assert finder.find_spec("transformers.models.auto.configuration_auto", []) is None


def test_a_transformers_that_is_too_old_is_warned_about_and_goes_on(monkeypatch):
    def fails(name):
        raise ImportError("no such thing")

    monkeypatch.setattr(importlib, "import_module", fails)
    with pytest.warns(UserWarning, match="will not know cramlab's models: no such thing"):
        auto._register(next(iter(auto._CONFIGS)))
