"""A task and a mixer in files outside the package, from the command line to evaluation; the contract of a task."""

import dataclasses
import json
import re
import sys
from pathlib import Path

import pytest
import torch

from cramlab import extensions, records
from cramlab.batch import InputSpec, Predictions
from cramlab.cli.main import main
from cramlab.cli.settings import check_run, split_name
from cramlab.config import ConfigError, to_dict
from cramlab.errors import UsageError
from cramlab.experiments.srcd import run_config
from cramlab.memory import CRAMConfig
from cramlab.metrics import right_answers
from cramlab.mixer import Routing
from cramlab.model import ModelConfig, SequenceModel
from cramlab.objective import LossConfig, batch_terms, terms
from cramlab.tasks.check import check_task, reference_scores
from cramlab.tasks.copying import CopyingConfig
from cramlab.tasks.srcd import SRCDConfig
from cramlab.training import train
from cramlab.training.load import load_run

GUIDES = Path(__file__).parents[2] / "docs" / "guides"


def first_block(page):
    return re.search(r"```python\n(.*?)```", (GUIDES / page).read_text(encoding="utf-8"), flags=re.DOTALL)[1]


@pytest.fixture
def own_files(tmp_path, monkeypatch):
    """The guides' task and mixer as files of the working directory, under names that no other test imports."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(extensions, "_loaded", {})
    for module, page in (("own_lookup", "own-task.md"), ("own_average", "own-mixer.md")):
        sys.modules.pop(module, None)
        Path(f"{module}.py").write_text(first_block(page), encoding="utf-8")
    yield
    for module in ("own_lookup", "own_average"):
        sys.modules.pop(module, None)


def test_a_task_and_a_mixer_in_files_are_trained_evaluated_and_reported(own_files, forked, capsys):
    name = "own_lookup.py:LookupConfig/cram,own_average.py:AverageConfig"
    command = ["run", name, "--size", "tiny", "--out", "runs", "--jobs", "2"]
    few = ["training.max_steps=20", "training.n_test_tokens=512", "task.n_values=4"]
    command += [word for field in few for word in ("--set", field)]
    assert main(command) == 0
    record = records.read(Path("runs/own_average.AverageConfig-seed0/record.json"))
    assert record["experiment"] == "own_lookup.LookupConfig"
    assert record["config"]["task"]["type"] == "own_lookup.py:LookupConfig"
    assert record["config"]["task"]["n_values"] == 4
    assert record["metrics"]["test"]["dynamics_mse"] is None
    assert record["samples"][0]["kind"].count("q") == 8
    assert main([*command, "--resume"]) == 0
    extensions._loaded.clear()
    config, model = load_run(Path("runs/own_average.AverageConfig-seed0"))
    assert model.spec == config.task.input_spec == InputSpec(vocab_sizes=(2, 8, 5), n_continuous=1, n_classes=4)
    capsys.readouterr()
    assert main(["eval", "runs/cram-seed0"]) == 0
    assert "retrieval_acc_novel" in capsys.readouterr().out
    assert main(["report", "runs", "--out", "page.html"]) == 0
    assert "own_lookup.LookupConfig" in Path("page.html").read_text(encoding="utf-8")


def test_a_run_whose_file_is_gone_names_it(own_files, capsys):
    command = ["run", "srcd/own_average.py:AverageConfig", "--size", "tiny", "--out", "runs"]
    assert main([*command, "--set", "training.max_steps=2", "--set", "training.n_test_tokens=128"]) == 0
    Path("own_average.py").unlink()
    extensions._loaded.clear()
    assert main(["eval", "runs"]) == 2
    assert '"own_average.py:AverageConfig": there is no file own_average.py' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "reference", "wanted"),
    [
        ("", "missing.py:Task", "there is no file missing.py"),
        ("class Task: pass", "own_lookup.py:Tusk", 'has no class "Tusk"; did you mean "Task"?'),
        ("class Task: pass", "own_lookup.py:Task", "is not a config; decorate the class with @checked"),
        ("import no_such_module", "own_lookup.py:Task", "cannot be imported: ModuleNotFoundError"),
        (
            "import dataclasses\n@dataclasses.dataclass\nclass Task:\n    seq_len: int",
            "own_lookup.py:Task",
            "cannot be made without arguments",
        ),
    ],
)
def test_a_reference_that_cannot_be_loaded_says_why(own_files, text, reference, wanted):
    Path("own_lookup.py").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=re.escape(wanted)):
        extensions.load_class(reference)


def test_a_file_with_the_name_of_another_module_is_refused(own_files):
    Path("json.py").write_text(first_block("own-task.md"), encoding="utf-8")
    with pytest.raises(ConfigError, match='"json" is also the name of another module; rename the file'):
        extensions.load_class("json.py:LookupConfig")
    assert json.dumps(1) == "1"


def test_names_are_split_at_the_slash_after_the_class():
    assert split_name("a/b/my_task.py:Task/cram,c/m.py:M") == ("a/b/my_task.py:Task", "/", "cram,c/m.py:M")
    assert split_name("srcd/c/m.py:M") == ("srcd", "/", "c/m.py:M")
    assert check_run("my.py:Task/cram,m.py:M", "tiny") == ("my.py:Task", ["cram", "m.py:M"])
    for name, message in (("my.py:Task/cran", "did you mean"), ("my.py:Task/cram,cram", "named twice")):
        with pytest.raises(UsageError, match=message):
            check_run(name, "tiny")
    with pytest.raises(UsageError, match="would mislabel the run"):
        check_run("my.py:Task", "tiny", ["seed=3"])


def test_names_that_packages_declare_stand_for_their_references(monkeypatch):
    held = {"cramlab.tasks": {"lookup": "package.lookup:Task"}, "cramlab.mixers": {"average": "package.mixers:M"}}
    monkeypatch.setattr("cramlab.cli.settings.declared", held.get)
    assert check_run("lookup/average,cram", "tiny") == ("package.lookup:Task", ["package.mixers:M", "cram"])
    assert check_run("srcd/average", "tiny") == ("srcd", ["package.mixers:M"])


def broken(**changes):
    class Broken(CopyingConfig):
        def draw(self, indices, *, seed, split):
            batch = super().draw(indices, seed=seed, split=split)
            return batch._replace(**{name: change(batch) for name, change in changes.items()})

    return Broken(seq_len=8)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (broken(gaps=lambda b: -1 - b.gaps), "batch.gaps = .* is negative; sort the events by time"),
        (broken(discrete=lambda b: b.discrete + 70), r"batch.discrete\[..., 0\] is from 71 to 72"),
        (broken(valid=lambda b: b.valid.long()), "batch.valid is torch.int64"),
        (broken(horizons=lambda b: b.horizons * torch.nan), "batch.horizons is not finite"),
        (broken(retrieval_target=lambda b: b.retrieval_target + 64), "batch.retrieval_target is from"),
        (broken(pattern=lambda b: b.pattern + 101), "n_patterns = 100"),
        (broken(gaps=lambda b: torch.rand_like(b.gaps)), "draw gives other sequences when called again"),
        (broken(valid=lambda b: ~b.valid), "true on padding"),
    ],
)
def test_a_task_that_breaks_the_contract_is_refused_with_the_fix(task, message):
    with pytest.raises(ConfigError, match=message):
        check_task(task, seed=0)


def test_splits_that_hold_the_same_sequences_are_refused():
    class Same(SRCDConfig):
        def draw(self, indices, *, seed, split):
            return super().draw(indices, seed=seed, split="train")

    with pytest.raises(ConfigError, match='splits "train" and "validation" hold the same sequences'):
        check_task(Same(seq_len=16), seed=0)
    check_task(SRCDConfig(seq_len=16), seed=0)


def test_an_oracle_worse_than_the_floor_is_refused():
    def perfect(_, batch):
        logits = torch.nn.functional.one_hot(batch.retrieval_target, 64).float()
        return Predictions(level=batch.dynamics_target, logits=logits)

    def constant(_, batch):
        return Predictions(level=batch.dynamics_target, logits=torch.eye(64)[0].expand(*batch.gaps.shape, 64))

    class Right(CopyingConfig):
        oracle, floor = perfect, constant

    class Wrong(CopyingConfig):
        oracle, floor = constant, perfect

    scores = reference_scores(Right(seq_len=8), seed=0)
    assert scores["oracle_acc"] == 1.0
    assert scores["floor_acc"] < 0.1
    assert scores["oracle_reads_frac"] == 0.5
    with pytest.raises(ConfigError, match="the oracle must be the better one"):
        reference_scores(Wrong(seq_len=8), seed=0)


@pytest.mark.parametrize("counterfactual_layer", [0, 1])
def test_logits_of_the_asked_tokens_alone_give_the_same_losses_and_gradients(counterfactual_layer):
    task = CopyingConfig(seq_len=12, n_values=1024)
    batch = task.dataset(seed=0, split="train", batch_size=3).batch(0)
    found = []
    for only_asked in (False, True):
        torch.manual_seed(0)
        model = SequenceModel(ModelConfig(mixer=CRAMConfig(), n_layers=2, d_model=16), task.input_spec).train()
        audits = torch.rand(3, 12) < 0.5
        output = model(
            batch,
            routing=Routing(audits=audits),
            counterfactual_layer=counterfactual_layer,
            only_asked=only_asked,
        )
        losses = batch_terms(output, batch, LossConfig(), layer=counterfactual_layer)
        sum(losses.values()).backward()
        grads = {name: p.grad for name, p in model.named_parameters()}
        found.append((losses, grads, right_answers(output.predictions, batch), output.predictions.logits.shape))
    (slow, slow_grads, slow_hits, whole), (fast, fast_grads, fast_hits, some) = found
    assert whole == (3, 12, 1024)
    assert some == (18, 1024)
    assert slow.keys() == fast.keys()
    for name in slow:
        torch.testing.assert_close(fast[name], slow[name], rtol=1e-5, atol=1e-6)
    for name in slow_grads:
        torch.testing.assert_close(fast_grads[name], slow_grads[name], rtol=1e-4, atol=1e-6)
    assert torch.equal(slow_hits, fast_hits)


def test_a_loss_of_a_mixer_of_ones_own_is_part_of_the_objective():
    own = torch.tensor(0.25)
    found = terms(torch.tensor(1.0), {"sharpness": own, "capacity": own}, LossConfig(capacity_weight=2.0))
    assert {name: float(value) for name, value in found.items()} == {"task": 1.0, "capacity": 0.5, "sharpness": 0.25}


def test_records_name_the_classes_of_the_package_as_before():
    assert to_dict(CopyingConfig())["type"] == "CopyingConfig"
    assert dataclasses.is_dataclass(CopyingConfig)


def test_training_checks_a_task_from_outside_before_it_writes(tmp_path):
    config = run_config(mixer="transformer", size="tiny", seed=0)
    config = dataclasses.replace(config, task=broken(gaps=lambda b: -1 - b.gaps))
    with pytest.raises(ConfigError, match="sort the events by time"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
