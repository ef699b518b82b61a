import dataclasses
import json
import math
import pickle
from pathlib import Path

import numpy as np
import pytest

from cramlab import records
from cramlab.auditing.config import AuditConfig
from cramlab.config import ConfigError, changed_since, config_hash, from_dict, overridden, to_dict
from cramlab.consolidation.config import ConsolidationConfig
from cramlab.experiments import EXPERIMENTS
from cramlab.experiments.srcd import run_config
from cramlab.experiments.srcd_sweeps import SIZES
from cramlab.memory import AdapterConfig, CRAMConfig, SlotsConfig, WorkingMemoryConfig
from cramlab.model import ModelConfig
from cramlab.objective import LossConfig
from cramlab.tasks.srcd import SRCDConfig
from cramlab.training.irregular.fit import FitConfig
from cramlab.training.run import RunConfig, Stage, TrainingConfig
from reproduction.analysis.transition import DetectorConfig

CRAM = run_config(mixer="cram", size="tiny", seed=0)


@pytest.mark.parametrize("size", ["tiny", "small", "medium", "paper"])
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_configs_survive_json(name, size):
    if name in ("srcd_sweeps", "transition", "bounds", "transfer") and size not in SIZES:
        with pytest.raises(ConfigError, match="--size tiny or small"):
            next(EXPERIMENTS[name](size=size, seed=3, mixers=None))
        return
    if name == "mqar" and size in ("medium", "paper"):
        with pytest.raises(ConfigError, match="give --size tiny, quick, small"):
            next(EXPERIMENTS[name](size=size, seed=3, mixers=None))
        return
    for config in next(EXPERIMENTS[name](size=size, seed=3, mixers=None)):
        data = json.loads(json.dumps(to_dict(config)))
        on_srcd = type(config) is RunConfig and isinstance(config.task, SRCDConfig)
        like = run_config(mixer=config.mixer, size="tiny", seed=0) if on_srcd else config
        assert from_dict(data, like) == config


def test_hash_is_a_function_of_the_values():
    assert config_hash(CRAM) == config_hash(run_config(mixer="cram", size="tiny", seed=0))
    assert config_hash(CRAM) != config_hash(run_config(mixer="cram", size="tiny", seed=1))
    assert len(config_hash(CRAM)) == 16


@pytest.mark.parametrize(
    ("assignment", "get", "value"),
    [
        ("training.learning_rate=1e-3", lambda c: c.training.learning_rate, 1e-3),
        ("model.mixer.semantic.rank=7", lambda c: c.model.mixer.semantic.rank, 7),
        ("model.mixer.router.name=never", lambda c: c.model.mixer.router.name, "never"),
        ("model.mixer.episodic.capacity=64", lambda c: c.model.mixer.episodic.capacity, 64),
        ("model.mixer.episodic.capacity=none", lambda c: c.model.mixer.episodic.capacity, None),
        ("task.rebind_frac=0.2", lambda c: c.task.rebind_frac, 0.2),
        ("task.key_mode=token", lambda c: c.task.key_mode, "token"),
        ("training.loss.read_price=0", lambda c: c.training.loss.read_price, 0.0),
        ("training.test_seq_lens=48, 96", lambda c: c.training.test_seq_lens, (48, 96)),
        ("training.test_seq_lens=", lambda c: c.training.test_seq_lens, ()),
    ],
)
def test_override_changes_one_field(assignment, get, value):
    changed = overridden(CRAM, [assignment])
    assert get(changed) == value
    assert overridden(changed, [assignment]) == changed
    differing = [a != b for a, b in zip(_flat(to_dict(CRAM)), _flat(to_dict(changed)), strict=True)]
    assert sum(differing) <= 1


def _flat(data):
    if isinstance(data, dict):
        return [leaf for value in data.values() for leaf in _flat(value)]
    return [data]


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("training.learning_rat=1", 'did you mean "learning_rate"'),
        ("training.learning_rate", "write path=value"),
        ("training.max_steps=1.5", "a whole number"),
        ("task.key_mode=words", '"vector", "token"'),
        ("task=3", "is a group"),
        ("training.test_seq_lens=512,x", "values parted by commas, each a whole number"),
        ("training.stages=3", "does not fit"),
        ("task.seq_len.x=3", "no fields of its own"),
    ],
)
def test_bad_overrides_say_what_to_do(assignment, message):
    with pytest.raises(ConfigError, match=message):
        overridden(CRAM, [assignment])


def test_layers_of_an_audit_are_numbers_or_all():
    assert overridden(AuditConfig(), ["layers=0,3"]).layers == (0, 3)
    assert overridden(AuditConfig(layers=(0, 3)), ["layers=none"]).layers is None
    assert overridden(AuditConfig(), ["replaced_fracs=.5"]).replaced_fracs == (0.5,)


def test_values_that_a_config_refuses_are_refused_on_override():
    with pytest.raises(ValueError, match=r"training\.max_steps = 0"):
        overridden(CRAM, ["training.max_steps=0"])


def test_unknown_fields_and_types_are_refused_on_reading():
    data = to_dict(CRAM)
    data["task"]["colour"] = 1
    with pytest.raises(ConfigError, match=r"task\.colour"):
        from_dict(data, CRAM)
    with pytest.raises(ConfigError, match="TransformerConfig"):
        from_dict(to_dict(run_config(mixer="transformer", size="tiny", seed=0)), CRAM)


TOGETHER = [
    ("model.mixer.working.d_state=60", "model.mixer.working.n_timescales=6"),
    ("task.query_frac=0.2", "task.write_frac=0.3"),
    ("task.seq_len=2048", "task.n_patterns=100"),
    ("training.test_seq_lens=512", "task.n_patterns=40"),
]


@pytest.mark.parametrize("pair", TOGETHER)
def test_settings_that_fit_together_are_taken_in_any_order(pair):
    assert overridden(CRAM, pair) == overridden(CRAM, pair[::-1]) != CRAM
    assert overridden(CRAM, []) == CRAM


def test_settings_of_an_audit_fit_together_too():
    pair = ("window=100", "context=200")
    assert overridden(ConsolidationConfig(context=80), pair) == overridden(ConsolidationConfig(context=80), pair[::-1])


def test_of_one_field_set_twice_the_last_counts():
    changed = overridden(CRAM, ["training.max_steps=3", "task.seq_len=32", "training.max_steps=4"])
    assert (changed.training.max_steps, changed.task.seq_len) == (4, 32)


CLASSES = [SRCDConfig, ModelConfig, TrainingConfig, Stage, LossConfig, CRAMConfig, WorkingMemoryConfig, AdapterConfig,
           SlotsConfig, AuditConfig, ConsolidationConfig, FitConfig, DetectorConfig, RunConfig]  # fmt: skip


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf, 1.5j, {}, object(), [1]])
def test_no_field_takes_what_no_field_can_hold(kind, wrong):
    given = {"mixer": CRAMConfig()} if kind is ModelConfig else vars(CRAM) if kind is RunConfig else {}
    for field in dataclasses.fields(kind):
        with pytest.raises(ConfigError, match=field.name):
            kind(**given | {field.name: wrong})


@pytest.mark.parametrize(
    ("kind", "field", "wrong", "says"),
    [
        (TrainingConfig, "max_steps", 1.5, "training.max_steps = 1.5 does not fit; give a whole number"),
        (TrainingConfig, "max_steps", True, "give a whole number"),
        (TrainingConfig, "max_steps", np.int64(64), "training.max_steps = np.int64(64) does not fit"),
        (TrainingConfig, "max_steps", "64", 'training.max_steps = "64" does not fit'),
        (TrainingConfig, "learning_rate", True, "give a number"),
        (TrainingConfig, "learning_rate", 1e-300, "must be at least 1e-12"),
        (TrainingConfig, "learning_rate", 10**400, "give a number"),
        (TrainingConfig, "n_threads", 1_000_000, "must be at most 1,024"),
        (TrainingConfig, "accelerator", "gpu", 'training.accelerator = "gpu" does not fit; give "cpu", "cuda"'),
        (TrainingConfig, "test_seq_lens", (-1,), "training.test_seq_lens = (-1,) must each be at least 2"),
        (TrainingConfig, "test_seq_lens", [64], "give values parted by commas"),
        (TrainingConfig, "test_seq_lens", (64, 64), "give each once"),
        (TrainingConfig, "stages", (), "training.stages is empty"),
        (TrainingConfig, "stages", "x", "each a Stage"),
        (TrainingConfig, "loss", None, "give a LossConfig"),
        (TrainingConfig, "loss", to_dict(LossConfig()), "give a LossConfig"),
        (TrainingConfig, "colour", 1, 'has no "colour"'),
        (WorkingMemoryConfig, "refine_dt", -1.0, "model.mixer.working.refine_dt = -1.0 must be at least 1e-12"),
        (AdapterConfig, "rank", 0, "must be at least 1, or None"),
        (SRCDConfig, "seq_len", 1, "task.seq_len = 1 must be at least 2"),
        (SRCDConfig, "decay", 0.99999999, "task.decay = 0.99999999 must be at most 0.9999"),
        (ConsolidationConfig, "strengths", (0.1, math.nan), "consolidation.strengths = (0.1, nan) must each be finite"),
        (ConsolidationConfig, "strengths", (), "consolidation.strengths = () is empty"),
        (ConsolidationConfig, "bound_factor", 1.0, "consolidation.bound_factor = 1.0 must be above 1"),
        (AuditConfig, "replaced_fracs", (), "audit.replaced_fracs"),
        (AuditConfig, "layers", (3, 3), "no value twice"),
        (FitConfig, "encoding_epochs", 40, "fit.encoding_epochs = 40"),
        (Stage, "seq_len", 0, "training.stages[].seq_len = 0"),
    ],
)
def test_configs_made_in_python_are_checked_as_set_is(kind, field, wrong, says):
    with pytest.raises(ConfigError) as refused:
        kind(**{field: wrong})
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("wrong", [{"mixer": "../../x"}, {"mixer": "\x1b[2J"}, {"seed": 2**63}, {"task": None},
                                   {"variant": "a/b"}, {"experiment": ".."}])  # fmt: skip
def test_what_names_a_folder_is_a_plain_name(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        dataclasses.replace(CRAM, **wrong)


@pytest.mark.parametrize("wrong", [None, "cram", CRAMConfig, (), (CRAMConfig(), 3)])
def test_a_model_takes_configs_of_mixers(wrong):
    with pytest.raises(ConfigError, match=r"model\.mixer"):
        ModelConfig(mixer=wrong)


def test_lengths_that_the_task_cannot_have_are_refused_before_a_run():
    with pytest.raises(ConfigError, match=r"training\.test_seq_lens\[0\] = 512 .* task\.n_patterns = 16 is too few"):
        overridden(CRAM, ["training.test_seq_lens=512"])


def test_numbers_that_are_taken_become_plain_ones():
    config = TrainingConfig(learning_rate=1, weight_decay=np.float32(0.5), grad_clip=np.float64(2))
    assert [type(v) for v in (config.learning_rate, config.weight_decay, config.grad_clip)] == [float] * 3
    assert config_hash(config) == config_hash(TrainingConfig(learning_rate=1.0, weight_decay=0.5, grad_clip=2.0))


def test_configs_are_frozen_and_survive_pickling():
    assert pickle.loads(pickle.dumps(CRAM)) == CRAM
    with pytest.raises(dataclasses.FrozenInstanceError):
        CRAM.seed = 3


def test_records_of_before_keep_their_hashes():
    """Wherever a config is one of today but for younger fields, its data still give the hash that the record holds."""
    compared, results = 0, Path(__file__).parent.parent / "results"
    for path in records.find([results / folder for folder in ("srcd", "bounds", "srcd_deep")]):
        record = json.loads(path.read_text())
        config = from_dict(record["config"], run_config(mixer=record["mixer"], size="tiny", seed=0))
        if not changed_since(record["config"], config):
            assert config_hash(record["config"]) == record["config_hash"], path
            compared += 1
    assert compared > 10


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda d: [], r"config is a \[\], not a RunConfig"),
        (lambda d: d | {"task": None}, "task = None"),
        (lambda d: {k: v for k, v in d.items() if k != "task"}, "task is missing"),
        (lambda d: d | {"seed": "x"}, 'seed = "x"'),
        (lambda d: d | {"training": 3}, "training is a 3, not a TrainingConfig"),
        (lambda d: d | {"model": d["model"] | {"d_model": None}}, r"model\.d_model = None"),
        (lambda d: d | {"task": d["task"] | {"seq_len": -1}}, r"task\.seq_len = -1"),
        (lambda d: d | {"training": d["training"] | {"stages": {}}}, r"training\.stages = {}"),
        (lambda d: d | {"training": d["training"] | {"stages": [None]}}, r"training\.stages = \(None,\)"),
        (lambda d: d | {"training": d["training"] | {"loss": [1]}}, r"training\.loss is a \[1\]"),
    ],
)
def test_data_of_wrong_types_is_refused_by_field(change, says):
    with pytest.raises(ConfigError, match=says):
        from_dict(change(json.loads(json.dumps(to_dict(CRAM)))), CRAM)


def test_fields_younger_than_held_data_count_as_held_with_their_defaults():
    config = run_config(mixer="cram", size="tiny", seed=0)
    held = to_dict(config)
    del held["model"]["mixer"]["router"]["learns"], held["model"]["mixer"]["episodic"]["rope"]
    assert changed_since(held, config) == {}
    other = overridden(config, ["model.mixer.episodic.rope=true"])
    assert changed_since(held, other) == {"model.mixer.episodic.rope": False}
    held["seed"] = 5
    assert changed_since(held, config) == {"seed": 5}
