"""What is carried is the source's, what is frozen stays, and controls carry nothing."""

import dataclasses
import json

import pytest
import torch

from cramlab.cli.main import main
from cramlab.config import ConfigError
from cramlab.experiments.transfer import source_config
from cramlab.files import load_checkpoint
from cramlab.model import SequenceModel
from cramlab.tasks.irregular import split_people
from cramlab.training import train
from cramlab.training.irregular.fit import FitConfig, fit
from cramlab.training.irregular.study import Study
from cramlab.training.irregular.transfer import WAYS, Carried, begin

from .test_fit import planted

SHORT = FitConfig(max_epochs=2, encoding_epochs=1, batch_size=32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("source")
    config = source_config("cram", "tiny", 0)
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, max_steps=20))
    train(config, out / config.name)
    return out / config.name


@pytest.mark.parametrize("way", WAYS["cram"])
def test_ways_carry_and_train_what_they_say(folder, way):
    carried = Carried.from_run(folder)
    data = planted(12)
    start, config = begin(carried, way, SHORT, rate=0.25)
    torch.manual_seed(0)
    model = SequenceModel(start.model, data.input_spec)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    start.prepare(model)
    same = [torch.equal(value, carried.layers[name]) for name, value in model.state_dict().items()
            if name in carried.layers]  # fmt: skip
    assert all(same) == (way in ("embedding", "all"))
    assert torch.equal(model.state_dict()["answer_head.weight"], before["answer_head.weight"])
    frozen = {name.split(".")[0] for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == ({"layers"} if way in ("embedding", "untrained") else set())
    assert (config.encoding_epochs > 0) == (way == "scratch")
    assert config.audit_labels == (way in ("scratch", "no_encoding", "all"))
    if way == "random":
        assert start.model.mixer.router.random_frac == 0.25


def test_training_reads_are_those_of_the_epochs_up_to_the_best(folder):
    data = planted(40)
    splits = split_people(data.series, 0)
    start, config = begin(
        Carried.from_run(folder), "random", dataclasses.replace(SHORT, max_epochs=1, encoding_epochs=0), rate=1.0
    )
    found = fit(data, splits, "cram", config, 0, start)
    visits = sum(len(one.times) for one in splits["train"])
    assert found["train_visits"] == found["train_reads"] == visits
    start, config = begin(Carried.from_run(folder), "random", SHORT, rate=0.0)
    assert fit(data, splits, "cram", config, 0, start)["train_reads"] == 0


def test_the_command_carries_and_names_what_cannot_be(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("cramlab.tasks.irregular.load", lambda name, path: planted(60))
    monkeypatch.setattr("cramlab.training.irregular.fit.FitConfig", lambda: SHORT)
    command = ["irregular", "--data", "pbcseq", "--seeds", "1", "--out", str(tmp_path), "--source", str(folder)]
    assert main([*command, "--ways", "embedding,random"]) == 0
    document = json.loads((tmp_path / "pbcseq" / "cram-random-seed0" / "irregular.json").read_text())
    assert (document["model"], document["way"]) == ("cram", "random")
    assert document["source"]["variant"] == "source"
    rate = json.loads((tmp_path / "pbcseq" / "cram-embedding-seed0" / "irregular.json").read_text())["test"]
    router = document["config"]["model"]["mixer"]["router"]
    assert router["random_frac"] == pytest.approx(rate["attention_frac"])
    for more, said in ((["--models", "cram"], "does not go with --source"), (["--ways", "head"], '"head" is unknown'),
                       (["--ways", "random", "--out", str(tmp_path / "x")], "before it")):  # fmt: skip
        assert main([*command, "--resume", *more]) == 2
        assert said in capsys.readouterr().err
    with pytest.raises(ConfigError, match="holds no finished run"):
        Carried.from_run(tmp_path)


def test_documents_of_another_source_are_not_taken(folder, tmp_path):
    carried = Carried.from_run(folder)
    study = Study(planted(40), tmp_path, SHORT, carried)
    study.run("embedding", 0)
    assert study.held("embedding", 0) is not None
    with pytest.raises(FileExistsError, match=r"differs in asked.source_sha256\)"):
        dataclasses.replace(study, carried=dataclasses.replace(carried, sha256="0" * 64)).run("random", 0)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda average: average.popitem(), "checkpoint and record are of different models"),
        (lambda average: average.clear(), "checkpoint and record are of different models"),
        (lambda average: next(v for n, v in average.items() if "layers." in n).fill_(torch.nan), "are not finite"),
    ],
)
def test_sources_whose_checkpoint_is_of_something_else_are_named(folder, tmp_path, monkeypatch, damage, message):
    state = load_checkpoint(folder / "checkpoint.pt")
    average = {name: value for name, value in state["average"].items() if "layers." in name}
    damage(average)
    monkeypatch.setattr("cramlab.training.irregular.transfer.own_checkpoint", lambda *_: {"average": average})
    with pytest.raises(ConfigError, match=message):
        Carried.from_run(folder)
