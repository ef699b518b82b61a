import io

from rich.console import Console

from cramlab.cli.progress import ProgressDisplay, time_left

ROW = {
    "name": "cram-seed0",
    "step": 50,
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


def test_a_terminal_sees_a_live_table():
    out = io.StringIO()
    with ProgressDisplay(
        ["cram-seed0", "transformer-seed0"], Console(file=out, force_terminal=True, width=160)
    ) as show:
        show(ROW)
        show(ROW | {"step": 60, "elapsed_s": 35.0, "validation": None})
    text = out.getvalue()
    for expected in ("60/150", "task 1.250", "0.900", "0.0150", "0:01:30", "starting"):
        assert expected in text


def test_a_file_sees_a_line_a_validation():
    out = io.StringIO()
    with ProgressDisplay(["cram-seed0"], Console(file=out, width=80)) as show:
        show(ROW)
        show(ROW | {"step": 60, "validation": None})
    (line,) = out.getvalue().splitlines()
    assert "step 50/150" in line
    assert "attention 1.0000 (optimum 0.0150)" in line


def test_time_left_follows_the_newest_pace():
    assert time_left(None, ROW) == "0:00:50"
    assert time_left(ROW, ROW | {"step": 60, "elapsed_s": 45.0}) == "0:03:00"
