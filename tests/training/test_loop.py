import dataclasses
import functools
import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from cramlab import records
from cramlab.catalog import CRAM_RATE, MIXERS
from cramlab.config import overridden
from cramlab.experiments.srcd import run_config
from cramlab.files import load_checkpoint, only_process_in, save_checkpoint
from cramlab.memory import CRAMConfig
from cramlab.model import SequenceModel
from cramlab.objective import batch_terms
from cramlab.training import RunFailedError, Stage, schedule, train
from cramlab.training.evaluate import evaluate_checkpoint
from cramlab.training.jobs import run_jobs
from cramlab.training.progress import Progress
from cramlab.training.state import parameter_groups

FORK = multiprocessing.get_context("fork")
SMALLER = (
    "training.n_validation_tokens=512",
    "training.n_test_tokens=1024",
    "training.encoding_target=0.05",
)


def tiny(mixer="cram", seed=0, *overrides):
    """The size tiny with a quarter of its sequences a step."""
    config = overridden(run_config(mixer=mixer, size="tiny", seed=seed), (*SMALLER, *overrides))
    return dataclasses.replace(config, training=dataclasses.replace(config.training, stages=(Stage(batch_size=4),)))


def curve(record):
    return [(row["step"], row["loss"], row["validation"]) for row in record["series"]]


@pytest.mark.parametrize("mixer", ["cram", "transformer"])
def test_gates_have_an_optimizer_of_their_own_and_nothing_is_left_out(mixer):
    config = tiny(mixer, 0, *(["model.mixer.episodic.write=salience"] if mixer == "cram" else []))
    config = overridden(config, ["training.semantic_rate=10"])
    model = SequenceModel(config.model, config.task.input_spec)
    together, *apart = parameter_groups(model, config.training)
    gates = {id(p) for name, p in model.named_parameters() if ".gate." in name or ".salience." in name}
    assert {id(p) for group in apart for part in group for p in part["params"]} == gates
    assert len(apart) == (1 if mixer == "cram" else 0)
    found = [id(p) for group in (together, *apart) for part in group for p in part["params"]]
    assert sorted(found) == sorted(id(p) for p in model.parameters())
    assert [part["rate"] for part in together] == ([1.0, 10.0] if mixer == "cram" else [1.0])


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("opened", [-100.0, 100.0])
@pytest.mark.parametrize("encoding", [False, True])
def test_every_parameter_has_a_gradient_on_every_step(mixer, opened, encoding):
    """Whether everybody or nobody reads and writes; data parallel would wait for ever for one that has none."""
    config = tiny(mixer, 0, "training.audit_frac=0", "training.audit_supervised_frac=0")
    if isinstance(config.model.mixer, CRAMConfig):
        episodic = ("model.mixer.episodic.write=salience", "model.mixer.episodic.write_audit_frac=0")
        config = overridden(config, episodic)
    torch.manual_seed(0)
    model, progress = SequenceModel(config.model, config.task.input_spec).train(), Progress.begun({}, encoding=encoding)
    for name, gate in model.named_modules():
        if name.endswith((".gate", ".salience")):
            gate.out.bias.data.fill_(opened)
    batch = schedule.training_batch(config, progress)
    output = model(batch, routing=schedule.routing(config, progress, batch), counterfactual_layer=0)
    torch.stack(list(batch_terms(output, batch, config.training.loss, layer=0).values())).sum().backward()
    idle = ["layers.0.mixer.norm.weight"] if mixer in ("cram-paper", "cram-gumbel") else []  # they look at x itself
    assert [name for name, p in model.named_parameters() if p.grad is None] == idle


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    return out, train(tiny(), out)


def test_the_same_seed_gives_the_same_bits(uninterrupted, tmp_path):
    out, record = uninterrupted
    torch.manual_seed(123)
    again = train(tiny(), tmp_path)
    assert curve(again) == curve(record)
    assert again["metrics"] == record["metrics"]
    first, second = (load_checkpoint(folder / "checkpoint.pt")["model"] for folder in (out, tmp_path))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_another_seed_gives_another_run(uninterrupted, tmp_path):
    assert curve(train(tiny(seed=1), tmp_path)) != curve(uninterrupted[1])


def test_quality_is_in_the_series_where_somebody_reads(uninterrupted, tmp_path):
    quality = [row["quality"] for row in uninterrupted[1]["series"]]
    assert all(0 < q < 1 for q in quality)
    nobody_reads = train(tiny("recurrence"), tmp_path)
    assert {row["quality"] for row in nobody_reads["series"]} == {None}


def test_the_tiny_run_goes_through_both_phases(uninterrupted):
    record = uninterrupted[1]
    assert {row["phase"] for row in record["series"]} == {"encoding", "routed"}
    assert record["encoding_ended_step"] is not None
    last = record["series"][-1]
    assert last["train_reads_frac"] < 0.5
    assert record["metrics"]["test"]["reads_frac"] == record["metrics"]["test"]["attention_frac"] < 0.5
    assert set(last["loss"]) == {"task", "consolidation", "no_read", "gate"}
    assert last["train_reads_frac"] < record["train_reads_frac"] < 1.0  # of both phases


@pytest.mark.parametrize("mixer", ["cram-paper", "cram-random", "cram-never", "transformer"])
def test_other_mixers_train_and_are_counted(mixer, tmp_path):
    record = train(tiny(mixer, 0, "training.encoding_target=0"), tmp_path)
    expected = {"cram-paper": 1.0, "transformer": 1.0, "cram-random": CRAM_RATE, "cram-never": 0.0}[mixer]
    assert record["metrics"]["test"]["reads_frac"] == pytest.approx(expected, abs=0.008)
    if mixer == "cram-paper":
        assert {"episodic_price", "semantic_reward"} <= set(record["series"][-1]["loss"])
        assert record["train_reads_frac"] == 1.0
    if mixer == "cram-never":
        assert record["train_reads_frac"] == 0.0


def test_a_killed_process_resumes_on_the_same_curve(uninterrupted, tmp_path):
    """SIGKILL once the first checkpoint stands, at whatever line the process happens to be."""
    job = FORK.Process(target=train, args=(tiny(), tmp_path))
    job.start()
    deadline = time.monotonic() + 120
    while not (tmp_path / "checkpoint.pt").exists():
        assert job.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    job.kill()
    job.join()
    assert job.exitcode == -signal.SIGKILL
    assert not (tmp_path / "record.json").exists()
    step = load_checkpoint(tmp_path / "checkpoint.pt")["progress"]["step"]
    assert 0 < step < 60
    record = train(tiny(), tmp_path, resume=True)
    assert curve(record) == curve(uninterrupted[1])
    assert record["metrics"]["test"] == uninterrupted[1]["metrics"]["test"]


def test_a_half_written_checkpoint_never_takes_the_place_of_a_whole_one(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"step": 1})

    def die(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", die)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(path, {"step": 2})
    assert load_checkpoint(path) == {"step": 1}


def test_a_folder_in_use_is_never_overwritten(uninterrupted):
    out, record = uninterrupted
    with pytest.raises(FileExistsError, match="--resume"):
        train(tiny(), out)
    with pytest.raises(FileExistsError, match=r"training\.learning_rate"):
        train(tiny("cram", 0, "training.learning_rate=0.5"), out, resume=True)
    assert train(tiny(), out, resume=True) == records.read(out / "record.json")
    assert records.read(out / "record.json")["elapsed_s"] == record["elapsed_s"]


def test_a_loss_that_is_no_number_stops_the_run_and_leaves_a_record(tmp_path):
    config = tiny("cram", 5, "training.learning_rate=1e30", "training.warmup_steps=0")
    with pytest.raises(RunFailedError, match=r"term '(task|gradient)' is not finite at step \d+ with seed 5"):
        train(config, tmp_path)
    record = records.read(tmp_path / "record.json")
    assert record["status"] == "failed"
    assert record["failure"]["seed"] == 5
    assert record["failure"]["term"] == "task"
    assert record["metrics"]["test"] is None


def test_a_gradient_or_validation_that_is_no_number_stops_the_run_too(tmp_path):
    """One huge step at the very end: the loss before it was fine, the weights after it are not."""
    config = tiny("transformer", 0, "training.learning_rate=1e30", "training.warmup_steps=0", "training.max_steps=1")
    with pytest.raises(RunFailedError, match="is not finite at step 1"):
        train(overridden(config, ["training.cooldown_steps=0"]), tmp_path)
    assert records.read(tmp_path / "record.json")["status"] == "failed"
    assert not (tmp_path / "checkpoint.pt").exists()


def test_two_processes_never_share_a_folder(tmp_path):
    with only_process_in(tmp_path / "run"), pytest.raises(FileExistsError, match="another process"):
        train(tiny(), tmp_path / "run")


def in_a_session_of_its_own(work, *args):
    os.setsid()
    work(*args)


def test_runs_end_with_their_killed_parent(tmp_path, forked):
    endless = ("training.max_steps=100000", "training.patience_evals=100000")
    configs = [tiny("cram", 0, *endless), tiny("transformer", 0, *endless)]
    jobs = functools.partial(run_jobs, configs, tmp_path, resume=False, n_jobs=2)
    job = FORK.Process(target=in_a_session_of_its_own, args=(jobs,))
    job.start()
    deadline = time.monotonic() + 120
    while len(children := _processes_of_session(job.pid)) < 3:  # the parent and two more
        assert time.monotonic() < deadline
        time.sleep(0.05)
    job.kill()
    job.join()
    while _processes_of_session(job.pid):
        assert time.monotonic() < deadline, children
        time.sleep(0.2)


def _processes_of_session(session):
    """Living processes of a session, zombies left out."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, its_session = stat.read_text().rpartition(")")[2].split()[:4]
        except (OSError, ValueError):
            continue
        if int(its_session) == session and state != "Z":
            found.append(int(stat.parent.name))
    return found


def test_the_test_split_is_touched_once_and_only_at_the_end(tmp_path, monkeypatch):
    from cramlab.tasks import srcd

    drawn = []
    real = srcd.sample

    def spy(config, *, seed, split, index):
        drawn.append((split, index))
        return real(config, seed=seed, split=split, index=index)

    monkeypatch.setattr(srcd, "sample", spy)
    config = tiny()
    train(config, tmp_path)
    first = next(i for i, (split, _) in enumerate(drawn) if split == "test")
    assert all(split == "test" for split, _ in drawn[first:])
    n_sequences = config.training.n_test_tokens // config.task.seq_len
    evaluated = [index for split, index in drawn[first:] if split == "test"]
    assert evaluated[:n_sequences] == list(range(n_sequences))
    assert len(evaluated) == n_sequences + 3  # the three sequences drawn for the report are shown, not scored
    train_indices = [index for split, index in drawn if split == "train"]
    assert train_indices == list(range(len(train_indices)))  # no training sequence comes twice


def test_stages_follow_each_other_by_what_validation_shows(tmp_path):
    config = tiny()
    stages = (
        Stage(seq_len=32, batch_size=16, max_steps=100, until=0.0),
        Stage(seq_len=48, batch_size=8, max_steps=20),
        Stage(batch_size=4),
    )
    training = dataclasses.replace(config.training, stages=stages, max_steps=80, encoding_target=0.0)
    record = train(dataclasses.replace(config, training=training), tmp_path)
    lengths = {row["step"]: row["seq_len"] for row in record["series"]}
    assert (lengths[20], lengths[40], lengths[60], lengths[80]) == (32, 48, 64, 64)


def test_the_rate_cools_down_when_validation_stops_improving(tmp_path):
    config = tiny(
        "transformer", 0, "training.learning_rate=1e-9", "training.max_steps=500", "training.patience_evals=2"
    )
    config = overridden(config, ["training.encoding_target=0", "training.cooldown_steps=20"])
    record = train(config, tmp_path)
    assert record["cooldown_from_step"] is not None
    assert record["n_steps"] == record["cooldown_from_step"] + 20 < 500


def test_a_run_that_the_step_limit_ends_does_not_claim_to_have_converged(tmp_path):
    still = ("learning_rate=1e-9", "max_steps=100", "patience_evals=1", "encoding_target=0", "cooldown_steps=90")
    record = train(tiny("transformer", 0, *(f"training.{assignment}" for assignment in still)), tmp_path)
    assert record["cooldown_from_step"] is None
    assert record["n_steps"] == 100


def test_learning_rate_warms_up_stays_and_falls():
    config = tiny("cram", 0, "training.warmup_steps=10", "training.cooldown_steps=20", "training.max_steps=100")
    full = config.training.learning_rate

    def rate(step, **changes):
        return schedule.learning_rate(config, Progress(header={}, step=step, **changes))

    assert rate(0) == pytest.approx(full / 10)
    assert rate(9) == rate(50) == rate(79) == full
    assert rate(90) == pytest.approx(full / 2)
    assert rate(50, cooldown_from_step=40) == pytest.approx(full / 2)


def test_evaluating_the_checkpoint_gives_the_record_s_figures(uninterrupted):
    out, record = uninterrupted
    name, metrics = evaluate_checkpoint(out)
    assert name == "cram-seed0"
    assert metrics == record["metrics"]["test"]


def test_an_unfinished_run_is_not_measured_on_the_test_split(uninterrupted, tmp_path):
    shutil.copytree(uninterrupted[0], tmp_path / "run")
    (tmp_path / "run" / "record.json").unlink()
    with pytest.raises(records.RecordError, match="does not hold a finished run"):
        evaluate_checkpoint(tmp_path / "run")


def test_two_runs_side_by_side_equal_two_alone(uninterrupted, tmp_path, forked):
    rows = []
    configs = [tiny(), tiny("transformer")]
    found = run_jobs(configs, tmp_path, resume=False, n_jobs=2, progress=rows.append)
    assert [record["mixer"] for record in found] == ["cram", "transformer"]
    assert curve(found[0]) == curve(uninterrupted[1])
    assert {row["name"] for row in rows} == {"cram-seed0", "transformer-seed0"}


def test_one_failure_does_not_take_the_others_with_it(tmp_path, forked):
    bad = tiny("transformer", 0, "training.learning_rate=1e30", "training.warmup_steps=0")
    with pytest.raises(RunFailedError, match=r"transformer-seed0: .*not finite"):
        run_jobs([bad, tiny()], tmp_path, resume=False, n_jobs=2)
    assert records.read(tmp_path / "cram-seed0" / "record.json")["status"] == "finished"
    assert records.read(tmp_path / "transformer-seed0" / "record.json")["status"] == "failed"
