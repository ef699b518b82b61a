import dataclasses
import io

from rich.console import Console

from cramlab.cli.curves import curve
from cramlab.cli.progress import ProgressDisplay, announcement, most_tokens, time_left
from cramlab.experiments.srcd import run_config
from cramlab.training.run import Stage

ROW = {
    "name": "cram-seed0",
    "step": 50,
    "n_tokens": 50 * 1000,
    "max_steps": 150,
    "elapsed_s": 25.0,
    "seq_len": 64,
    "phase": "encoding",
    "cooling_down": False,
    "last": False,
    "loss": {"task": 1.25, "gate": 0.5},
    "validation": {
        "retrieval_acc_recurring": 0.9,
        "retrieval_acc_novel": None,
        "attention_frac": 1.0,
        "oracle_attention_frac": 0.015,
    },
}
RUNS = {"cram-seed0": 150_000, "transformer-seed0": 150_000}


def test_a_terminal_sees_a_live_table_and_curves():
    out = io.StringIO()
    with ProgressDisplay(RUNS, Console(file=out, force_terminal=True, width=160, height=40)) as show:
        show(ROW)
        later = ROW["validation"] | {"attention_frac": 0.05, "retrieval_acc_novel": 0.5}
        show(ROW | {"step": 60, "elapsed_s": 35.0, "validation": later})
    text = out.getvalue()
    for expected in ("60/150", "task 1.250", "0.900", "0.0150", "0:01:30", "starting", "attention, 1 to 0.012"):
        assert expected in text
    assert any(0x2800 < ord(character) < 0x2900 for character in text)


def test_a_terminal_without_unicode_or_room_sees_the_table_alone():
    for encoding, height in (("ascii", 40), ("utf-8", 6)):
        out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        with ProgressDisplay(RUNS, Console(file=out, force_terminal=True, width=160, height=height)) as show:
            show(ROW)
        out.seek(0)
        text = out.read()
        assert "50/150" in text
        assert "attention, 1 to" not in text


def test_a_file_sees_a_line_a_validation():
    out = io.StringIO()
    with ProgressDisplay(RUNS, Console(file=out, width=80)) as show:
        show(ROW)
        show(ROW | {"step": 60, "validation": None})
    (line,) = out.getvalue().splitlines()
    assert "step 50/150" in line
    assert "attention 1.0000 (optimum 0.0150)" in line


def test_the_third_row_announces_the_time_once():
    out = io.StringIO()
    with ProgressDisplay(RUNS, Console(file=out, width=80)) as show:
        for i in range(1, 6):
            show(ROW | {"step": 10 * i, "n_tokens": 10_000 * i, "elapsed_s": 10.0 * i, "validation": None})
    (line,) = out.getvalue().splitlines()
    assert "2 runs take at most about 4 minutes" in line  # 120 s for this one, 150 s for the other, one after another


def test_the_time_of_runs_side_by_side_is_that_of_the_longest():
    rows = [{"elapsed_s": 10.0, "n_tokens": 1000}, {"elapsed_s": 12.0, "n_tokens": 2000}]
    assert "1 run take" in announcement({"a": rows}, {"a": 32_000})
    assert "60 seconds" in announcement({"a": rows}, {"a": 32_000})
    assert "60 seconds" in announcement({"a": rows, "b": rows}, {"a": 32_000, "b": 32_000})
    assert "2 minutes" in announcement({"a": rows}, {"a": 32_000, "b": 30_000})


def test_most_tokens_counts_every_stage():
    config = run_config(mixer="cram", size="small", seed=0)
    stages = (Stage(seq_len=64, batch_size=2, max_steps=10), Stage(batch_size=3))
    training = dataclasses.replace(config.training, stages=stages, max_steps=25)
    assert most_tokens(dataclasses.replace(config, training=training)) == 10 * 2 * 64 + 15 * 3 * 256
    training = dataclasses.replace(training, max_steps=5)
    assert most_tokens(dataclasses.replace(config, training=training)) == 5 * 2 * 64


def test_time_left_follows_the_newest_pace():
    assert time_left(None, ROW) == "0:00:50"
    assert time_left(ROW, ROW | {"step": 60, "elapsed_s": 45.0}) == "0:03:00"


def dots(lines):
    """(column, row from the bottom) of every dot."""
    return {
        (2 * x + column, 4 * len(lines) - 1 - (4 * y + row))
        for y, line in enumerate(lines)
        for x, character in enumerate(line)
        for column in (0, 1)
        for row in range(4)
        if (ord(character) - 0x2800) >> ((0, 1, 2, 6), (3, 4, 5, 7))[column][row] & 1
    }


def test_a_curve_goes_through_its_points():
    lines = curve([(0, 0.0), (7, 7.0)], low=0.0, high=7.0, width=4, height=2)
    assert dots(lines) == {(i, i) for i in range(8)}
    falling = curve([(0, 1.0), (2, 0.1), (4, 0.01)], low=0.01, high=1.0, width=1, height=1, log=True)
    assert {(0, 3), (1, 0)} <= dots(falling)
    assert {(0, 2), (1, 2)} & dots(falling)  # 0.1 lies halfway on a logarithmic axis
    assert dots(curve([(0, 9.0), (1, -9.0)], low=0.0, high=1.0, width=1, height=1)) >= {(0, 3), (1, 0)}
    assert dots(curve([(0, float("nan"))], low=0.0, high=1.0, width=1, height=1)) == set()
    assert dots(curve([(5, 0.5)], low=0.0, high=1.0, width=2, height=1)) == {(0, 1)}
