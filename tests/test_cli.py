import argparse
import subprocess
import sys

import pytest

from cramlab.cli import _parser, main


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    assert main(["run", "srcd/transformer", "--size", "tiny", "--out", str(out), "--set", "training.max_steps=20"]) == 0
    return out


def refused(capsys, *argv):
    assert main(list(argv)) == 2
    return capsys.readouterr().err


def test_the_command_line_is_frozen():
    """A knob belongs into a config, where --set reaches it; a new flag needs a reason."""
    (commands,) = (a for a in _parser()._actions if isinstance(a, argparse._SubParsersAction))
    flags = {
        name: sorted(action.option_strings[-1] if action.option_strings else action.dest for action in parser._actions)
        for name, parser in commands.choices.items()
    }
    assert flags == {
        "run": ["--engine", "--help", "--jobs", "--out", "--resume", "--seed", "--set", "--size", "name"],
        "eval": ["--help", "dir"],
        "cost": ["--help", "dir"],
        "report": ["--help", "--out", "dirs"],
        "audit": [
            *("--allow-pickle", "--batch-tokens", "--checkpoints", "--device", "--help", "--layers", "--no-controls"),
            *("--other-text", "--out", "--resume", "--set", "--text", "--threads", "--tokens", "model"),
        ],
        "irregular": [
            *("--data", "--help", "--models", "--out", "--path", "--resume", "--seeds", "--source", "--ways"),
        ],
        "consolidate": [
            *("--allow-pickle", "--device", "--from", "--further-text", "--help", "--max-loss-increase", "--out"),
            *("--resume", "--set", "--text", "--threads", "model"),
        ],
        "ls": ["--help"],
        "show": ["--help", "--size", "name"],
    }


def test_run_writes_a_record_and_prints_the_table(runs, capsys):
    folder = runs / "transformer-seed0"
    assert sorted(p.name for p in folder.iterdir()) == ["checkpoint.pt", "config.json", "record.json"]
    assert main(["run", "srcd/transformer", "--size", "tiny", "--out", str(runs), "--resume",
                 "--set", "training.max_steps=20"]) == 0  # fmt: skip
    assert "attention_frac" in capsys.readouterr().out


def test_a_folder_in_use_fails_with_the_way_out(runs, capsys):
    assert main(["run", "srcd/transformer", "--size", "tiny", "--out", str(runs)]) == 1
    assert "--resume" in capsys.readouterr().err


def test_eval_prints_the_metrics(runs, capsys):
    assert main(["eval", str(runs)]) == 0
    assert "dynamics_mse" in capsys.readouterr().out


def test_cost_says_where_the_compute_goes_and_from_where_on_it_pays(tmp_path, capsys):
    small = ["--size", "tiny", "--set", "training.max_steps=4", "--set", "model.mixer.episodic.write=salience"]
    assert main(["run", "srcd/cram", *small, "--out", str(tmp_path)]) == 0
    capsys.readouterr()
    assert main(["cost", str(tmp_path / "cram-seed0")]) == 0
    shown = capsys.readouterr().out
    assert all(part in shown for part in ("keys and values", "write gate", "scores", "does not pay below"))
    assert all(part in shown for part in ("MLP", "embedding and heads", "with audits"))
    assert main(["cost", str(tmp_path)]) == 1
    assert "config.json" in capsys.readouterr().err


def test_report_writes_one_page(runs, tmp_path, capsys):
    page = tmp_path / "deep" / "page.html"
    assert main(["report", str(runs), "--out", str(page)]) == 0
    assert page.read_text().startswith("<!doctype html>")
    assert "should end in .html" in refused(capsys, "report", str(runs), "--out", str(tmp_path / "page.pdf"))


def test_what_is_not_there_fails(tmp_path, capsys):
    assert main(["eval", str(tmp_path)]) == 1
    assert "no checkpoint.pt" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "x"), "--out", str(tmp_path / "x.html")]) == 1
    assert "does not exist" in capsys.readouterr().err


def test_ls_and_show(runs, capsys):
    assert main(["ls"]) == 0
    assert "srcd" in capsys.readouterr().out
    assert main(["show", "srcd/cram", "--size", "tiny"]) == 0
    assert "model.mixer.semantic.rank = 256" in capsys.readouterr().out
    assert main(["show", str(runs)]) == 0
    assert "transformer" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("run", "srdc", "--out", "x"), 'did you mean "srcd"'),
        (("run", "srcd/trnsformer", "--out", "x"), 'did you mean "transformer"'),
        (("run", "srcd", "--size", "papr", "--out", "x"), 'did you mean "paper"'),
        (("run", "srcd", "--seed", "-1", "--out", "x"), "--seed -1"),
        (("run", "srcd", "--out", "x", "--set", "task.seqlen=3"), 'did you mean "seq_len"'),
        (("run", "srcd", "--out", "x", "--set", "task.seq_len=0"), "task.seq_len = 0"),
        (("run", "srcd", "--out", "x", "--set", "mixer=cram"), "would mislabel"),
        (("run", "srcd", "--out", "x", "--jobs", "0"), "--jobs 0"),
        (("run", "srcd/transformer", "--out", "x", "--set", "model.mixer.n_heads=3"), "n_heads = 3"),
        (("run", "srcd", "--out", "x", "--set", "training.accelerator=gpux"), "training.accelerator"),
        (("run", "srcd", "--out", "x", "--set", "training.weight_decay=-1"), "training.weight_decay"),
        (("run", "srcd", "--out", __file__), "is a file"),
        (("show", "srd"), 'did you mean "srcd"'),
    ],
)
def test_bad_usage_exits_2_names_the_fix_and_writes_nothing(argv, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, *argv)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("argv", [(), ("run",), ("fly",), ("run", "srcd", "--fast", "--out", "x")])
def test_argparse_refuses_with_2(argv, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(list(argv))
    assert stopped.value.code == 2


@pytest.mark.parametrize("argv", [("--version",), ("--help",), ("run", "--help"), ("report", "--help")])
def test_help_and_version(argv, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(list(argv))
    assert stopped.value.code == 0
    assert "cramlab" in capsys.readouterr().out


def test_output_that_nobody_reads_to_its_end_is_no_failure():
    command = [sys.executable, "-c", "import sys; from cramlab.cli import main; sys.exit(main(['ls']))"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0
