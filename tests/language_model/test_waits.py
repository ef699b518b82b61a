"""A training step never waits for its device. The meta device has no values, so reading one is an error."""

import contextlib
import dataclasses

import pytest
import torch

from cramlab.language_model import training
from cramlab.language_model.inputs import known_windows
from cramlab.language_model.reading_schedule import ReadingSchedule
from cramlab.language_model.run import TextRunConfig
from cramlab.language_model.text import PreparedText

BASE = TextRunConfig(
    vocab_size=32, context=12, n_layers=2, d_model=16, n_heads=2, batch_size=2, n_steps=40, warmup_steps=2,
    encoding_frac=0.1, ramp_frac=0.1, device="meta",
)  # fmt: skip
_DELTA = {"working": "delta", "rope": True, "qk_norm": True, "memory_layers": [0]}
ARMS = {
    "llama": {"model": "llama"},
    "random": {"cram": _DELTA | {"router": "random"}},
    "salience": {"cram": _DELTA | {"memory_write": "salience"}},
    "leaky": {},
    "nats": {"cram": _DELTA | {"gate_learns": "nats"}, "reads_frac": 0.2},
    "straight": {"cram": _DELTA | {"gate_learns": "straight"}, "reads_frac": 0.2, "window": 4},
    "bigrams": {"cram": _DELTA, "bigram_slots": 64},
}
READS_A_VALUE = r"meta tensor"


@pytest.fixture(autouse=True)
def _no_autocast(monkeypatch):
    """The meta device has none."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())


def steps(arm, numbers):
    """Trains by the steps with these numbers. Every token reads up to step 4."""
    config = dataclasses.replace(BASE, **ARMS[arm])
    tokens = torch.arange(200) % config.vocab_size
    model, optimizer = training.start(config)
    reading = ReadingSchedule()
    for number in numbers:
        training.train_step(model, optimizer, PreparedText(None, tokens, tokens), config, number, reading)


@pytest.mark.parametrize("arm", ARMS)
def test_no_step_reads_a_value_from_its_device(arm):
    steps(arm, (1, 8))  # encoding, and with gates


def test_the_loss_is_looked_at_now_and_then():
    with pytest.raises(RuntimeError, match=READS_A_VALUE):
        steps("nats", (20,))


def test_values_that_nobody_has_checked_are_read(monkeypatch):
    monkeypatch.setattr(training, "known_windows", lambda *_: contextlib.nullcontext())
    with pytest.raises(RuntimeError, match=READS_A_VALUE):
        steps("nats", (1,))


@pytest.mark.parametrize(
    ("windows", "message"),
    [
        (torch.tensor([[3, 32]]), "input_ids holds 32; the model's vocabulary ends at 31"),
        (torch.tensor([[-100, 3]]), "input_ids holds -100"),
        (torch.tensor([[3.0, 1.0]]), "input_ids has type torch.float32; give integers"),
        (torch.tensor([[3]]), "labels leave no token to predict"),
    ],
)
def test_windows_are_checked_where_they_are_made(windows, message):
    with pytest.raises(ValueError, match=message), known_windows(windows, 32):
        raise AssertionError("windows that cannot be trained on were let through")
