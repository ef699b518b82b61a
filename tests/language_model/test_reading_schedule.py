import pytest
import torch

pytest.importorskip("transformers")

from cramlab.config import ConfigError
from cramlab.language_model.reading_schedule import ReadingSchedule, quantile_threshold
from cramlab.language_model.run import TextRunConfig

CONFIG = TextRunConfig(
    n_steps=100, encoding_frac=0.5, least_gain=0.1, ramp_frac=0.2, cram={"gate_learns": "nats"}, reads_frac=0.1
)


def test_the_encoding_phase_ends_when_the_gain_of_reading_no_longer_grows():
    schedule = ReadingSchedule()
    for step, gain in [(5, 0.04), (10, 0.04), (15, 0.04), (20, 0.11), (25, 0.2), (30, 0.3)]:
        schedule.saw_gain(CONFIG, step, gain)  # flat below `least_gain`, then growing
        assert schedule.reads_all(CONFIG, step)
    schedule.saw_gain(CONFIG, 35, 0.31)
    assert schedule.reads_all(CONFIG, 35)  # 0.31 is well above 0.2, two evaluations before
    schedule.saw_gain(CONFIG, 40, 0.305)
    assert schedule.ended_at == 40
    assert not schedule.reads_all(CONFIG, 40)


def test_it_ends_after_its_share_of_the_steps_at_the_latest():
    schedule = ReadingSchedule()
    assert schedule.reads_all(CONFIG, 49)
    assert not schedule.reads_all(CONFIG, 50)
    assert schedule.ended_at == 50


def test_the_share_of_reads_falls_along_a_line():
    schedule = ReadingSchedule()
    assert schedule.share(CONFIG, 10) == 1.0
    schedule.ended_at = 40
    assert [round(schedule.share(CONFIG, step), 9) for step in (40, 50, 60, 99)] == [1.0, 0.55, 0.1, 0.1]


def test_one_threshold_for_all_layers_lets_the_share_of_reads_through():
    margins = [torch.arange(100.0).view(4, 25), torch.arange(100.0, 200.0).view(4, 25)]
    threshold = quantile_threshold(margins, n_layers=8, share=0.0125)  # of 8 x 100 tokens: 10 reads
    assert sum(int((margin > threshold).sum()) for margin in margins) == 10
    assert int((margins[0] > threshold).sum()) == 0
    everything = quantile_threshold(margins, n_layers=8, share=0.5)
    assert all(bool((margin > everything).all()) for margin in margins)


def test_the_threshold_follows_the_batches():
    schedule, scores = ReadingSchedule(), torch.randn(4000)
    for _ in range(100):
        threshold = 0.0 if schedule.threshold is None else schedule.threshold
        schedule.follow([scores - threshold], 1, 0.2)
    assert schedule.threshold is not None
    assert float((scores > schedule.threshold).float().mean()) == pytest.approx(0.2, abs=0.01)


def test_a_share_needs_gates_with_a_threshold():
    with pytest.raises(ConfigError, match=r'reads_frac = 0\.1 needs gates with a threshold.*"nats"'):
        TextRunConfig(reads_frac=0.1)
