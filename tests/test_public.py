"""What `import cramlab` offers, and the old names."""

import importlib
import subprocess
import sys

import pytest

import cramlab
from cramlab import moved
from cramlab.auditing import AuditConfig, AuditResult
from cramlab.config import ConfigError
from cramlab.errors import AuditError, ConsolidationError, LoadError

REPORT_WHAT_IS_LOADED = "; print(*[name for name in ('torch', 'transformers', 'pydantic') if name in sys.modules])"


@pytest.mark.parametrize("module", ["cramlab"])
def test_importing_it_imports_nothing_heavy(module):
    code = f"import sys, {module}" + REPORT_WHAT_IS_LOADED
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == ""


@pytest.mark.parametrize("name", cramlab.__all__)
def test_a_public_name_is_what_its_module_defines(name):
    value = getattr(cramlab, name)
    module = importlib.import_module(value.__module__)
    assert getattr(module, name) is value
    assert name in dir(cramlab)


def test_the_names_for_type_checkers_are_those_that_are_imported():
    with open(cramlab.__file__) as file:
        block = file.read().partition("if TYPE_CHECKING:\n")[2].partition("\n\n")[0]
    lines = [line.split(maxsplit=3) for line in block.splitlines()]
    listed = {name.strip(): module for _, module, _, names in lines for name in names.split(",")}
    assert listed == cramlab._MODULE_OF
    assert sorted(listed) == sorted(cramlab.__all__)


def test_modules_are_attributes_and_other_names_are_refused():
    assert cramlab.metrics is importlib.import_module("cramlab.metrics")
    with pytest.raises(AttributeError, match="has no attribute 'train_all'"):
        _ = cramlab.train_all


def fresh(old):
    """Imports an old module as if for the first time."""
    sys.modules.pop(f"cramlab.{old}", None)
    with pytest.warns(DeprecationWarning, match=f"cramlab.{old} is now cramlab") as warned:
        module = importlib.import_module(f"cramlab.{old}")
    assert warned[-1].filename == importlib.__file__  # whoever imports, not the finder
    return module


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("old", sorted(set(moved.MODULES) - {"audit"}))
def test_an_old_module_is_the_new_one_and_warns(old):
    if old.endswith("kernels"):
        pytest.importorskip("triton")
    assert fresh(old) is importlib.import_module(f"cramlab.{moved.MODULES[old]}")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(("old", "new"), [("retrofit.config", "consolidation.config"), ("audit.run", "auditing.run")])
def test_a_module_of_an_old_package_keeps_its_last_name(old, new):
    assert fresh(old) is importlib.import_module(f"cramlab.{new}")


def test_a_module_that_never_was_is_not_found():
    for name in ("cramlab.retrofit.nothing", "cramlab.hf.nothing", "cramlab.nothing"):
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module(name)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("module", "old"), [(module, old) for module, names in moved.ATTRIBUTES.items() for old in names]
)
def test_an_old_attribute_is_the_new_one_and_warns(module, old):
    new_module, new = moved.ATTRIBUTES[module][old]
    with pytest.warns(DeprecationWarning, match=f"{module}.{old} is now {new_module}.{new}"):
        value = getattr(importlib.import_module(module), old)
    assert value is getattr(importlib.import_module(new_module), new)


def test_audit_is_the_function_and_the_old_package():
    code = (
        "import warnings; warnings.simplefilter('ignore'); import cramlab; assert callable(cramlab.audit); "
        "import cramlab.audit.config; from cramlab.audit import AuditConfig; "
        "from cramlab.auditing.config import AuditConfig as new; "
        "assert cramlab.audit.config.AuditConfig is AuditConfig is new; "
        "from cramlab.errors import LoadError\n"
        "try: cramlab.audit('no such folder', 'stdlib', context=64)\n"
        "except LoadError: print('called')"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == "called"


def test_the_verbs_refuse_before_they_load(tmp_path):
    with pytest.raises(ConfigError, match='did you mean "context"'):
        cramlab.audit("glassllm", "stdlib", contxt=64)
    with pytest.raises(ConfigError, match=r"consolidation\.window = 0"):
        cramlab.consolidate("glassllm", "stdlib", tmp_path, window=0)
    with pytest.raises(AuditError, match="does not exist"):
        cramlab.audit("glassllm", tmp_path / "nothing")
    with pytest.raises(AuditError, match="list of texts"):
        cramlab.audit("glassllm", [])
    with pytest.raises(ConsolidationError, match="nothing is learned"):
        cramlab.consolidate("glassllm", "stdlib", tmp_path, start=tmp_path, further_text="prose")
    model = cramlab.load_pretrained("glassllm")
    with pytest.raises(LoadError, match="without a tokenizer"):
        cramlab.audit(model.model, "stdlib")
    assert list(tmp_path.iterdir()) == []


def test_audit_takes_a_loaded_model_and_a_list_of_texts(tmp_path):
    sizes = {"context": 32, "fit_tokens": 1500, "validation_tokens": 300, "test_tokens": 600, "causal_tokens": 64}
    small = {"controls": False, "strengths": (1.0,), "layers": [0]} | sizes
    pretrained = cramlab.load_pretrained("glassllm")
    texts = [document.text[:2000] for document in cramlab.auditing.read_corpus("stdlib").documents[:80]]
    seen = []
    result = cramlab.audit(pretrained, texts, progress=lambda *row: seen.append(row), **small)
    assert seen
    assert result.data["config"]["context"] == 32
    written = cramlab.audit("glassllm", texts, tmp_path, **small)
    assert written.layers("r") == result.layers("r")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["audit.html", "audit.json"]
    with pytest.raises(FileExistsError, match="resume=True"):
        cramlab.audit("glassllm", texts, tmp_path, **small)
    with pytest.raises(FileExistsError, match=r"\(seed\)"):
        cramlab.audit("glassllm", texts, tmp_path, resume=True, seed=3, **small)
    kept = cramlab.audit("glassllm", texts, tmp_path, resume=True, config=AuditConfig(), **small)
    assert kept.data == AuditResult.read(tmp_path / "audit.json").data
