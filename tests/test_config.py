import json

import pytest

from cramlab.audit.config import AuditConfig
from cramlab.config import ConfigError, config_hash, from_dict, overridden, to_dict
from cramlab.experiments import EXPERIMENTS
from cramlab.experiments.srcd import run_config
from cramlab.experiments.srcd_sweeps import SIZES
from cramlab.training.run import RunConfig

CRAM = run_config(mixer="cram", size="tiny", seed=0)


@pytest.mark.parametrize("size", ["tiny", "small", "medium", "paper"])
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_configs_survive_json(name, size):
    if name in ("srcd_sweeps", "transition", "bounds", "transfer") and size not in SIZES:
        with pytest.raises(ConfigError, match="--size tiny or small"):
            next(EXPERIMENTS[name](size=size, seed=3, mixers=None))
        return
    for config in next(EXPERIMENTS[name](size=size, seed=3, mixers=None)):
        data = json.loads(json.dumps(to_dict(config)))
        like = run_config(mixer=config.mixer, size="tiny", seed=0) if type(config) is RunConfig else config
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
        ("training.test_seq_lens=512, 1024", lambda c: c.training.test_seq_lens, (512, 1024)),
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
