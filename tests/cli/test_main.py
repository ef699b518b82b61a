import argparse
import json
import os
import signal
import subprocess
import sys

import pytest

from cramlab.cli.main import _parser, main
from cramlab.cli.progress import ProgressDisplay
from cramlab.terminal import plain


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
        "score": ["--data", "--help", "--name", "--out", "predictions"],
        "audit": [
            *("--allow-pickle", "--batch-tokens", "--chat", "--checkpoints", "--device", "--help", "--layers"),
            *("--no-controls", "--other-text", "--out", "--resume", "--set", "--text", "--text-field", "--threads"),
            *("--tokens", "model"),
        ],
        "irregular": [
            *("--data", "--help", "--id", "--label", "--models", "--out", "--path", "--resume", "--seeds", "--source"),
            *("--time", "--value", "--ways"),
        ],
        "consolidate": [
            *("--allow-pickle", "--chat", "--device", "--from", "--further-text", "--help", "--max-loss-increase"),
            *("--out", "--resume", "--set", "--text", "--text-field", "--threads", "model"),
        ],
        "try": [
            *("--allow-pickle", "--device", "--help", "--seed", "--temperature", "--threads", "--tokens", "folder"),
            *("model", "prompt"),
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
    assert all(part in shown for part in ("keys and values", "write gate", "scores", "full attention from"))
    assert all(part in shown for part in ("MLP", "embedding and heads", "including audits"))
    assert "holds no config.json" in refused(capsys, "cost", str(tmp_path))


def test_report_writes_one_page(runs, tmp_path, capsys):
    page = tmp_path / "deep" / "page.html"
    assert main(["report", str(runs), "--out", str(page)]) == 0
    assert page.read_text().startswith("<!doctype html>")
    assert "--out is missing" in refused(capsys, "report", str(runs))
    assert "must end in .html" in refused(capsys, "report", str(runs), "--out", str(tmp_path / "page.pdf"))


def test_a_folder_without_what_a_command_reads_is_refused(tmp_path, capsys):
    assert "holds no checkpoint.pt" in refused(capsys, "eval", str(tmp_path))
    assert "holds no record" in refused(capsys, "report", str(tmp_path), "--out", str(tmp_path / "x.html"))
    assert "holds no record" in refused(capsys, "show", str(tmp_path))
    assert list(tmp_path.iterdir()) == []


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
        (("run", "srcd", "--out", f"{__file__}/deeper/x"), "is a file"),
        (("run", "srcd", "--out", ""), "is not a path"),
        (("run", "srcd", "--out", "x\0y"), "is not a path"),
        (("run", "", "--out", "x"), 'experiment "" is unknown'),
        (("run", "srcd/", "--out", "x"), 'mixer "" is unknown'),
        (("run", "srcd/../x", "--out", "x"), 'mixer "../x" is unknown'),
        (("run", "srcd/cram,cram", "--out", "x"), 'mixer "cram" is named twice'),
        (("run", "srcd", "--seed", str(2**63), "--out", "x"), "--seed 9223372036854775808 must be"),
        (("run", "srcd", "--seed", "1.5", "--out", "x"), "--seed '1.5' is not a whole number"),
        (("run", "srcd", "--jobs", "1e9", "--out", "x"), "--jobs '1e9' is not a whole number"),
        (("run", "srcd", "--out", "x", "--set", "training.accelerator=mps"), "training.accelerator"),
        (("run", "srcd", "--out", "x", "--set", "training.n_threads=1000000"), "training.n_threads = 1000000"),
        (("run", "srcd", "--out", "x", "--set", "training.test_seq_lens=0"), "training.test_seq_lens = (0,)"),
        (("run", "srcd", "--out", "x", "--set", "training.loss.read_price=1e400"), "must be finite"),
        (("run", "srcd", "--out", "x", "--set", "model.n_layers=1000000000"), "must be at most 1,024"),
        (("audit", "glassllm", "--text", "stdlib", "--out", "x", "--threads", "0"), "--threads 0 must be 1 or more"),
        (("audit", "glassllm", "--text", "stdlib", "--out", "x", "--set", "replaced_fracs="), "audit.replaced_fracs"),
        (("audit", "glassllm", "--text", "stdlib", "--out", "x", "--set", "strengths=0.5,nan"), "must each be finite"),
        (("consolidate", "glassllm", "--text", "stdlib", "--out", "x", "--threads", "-1"), "--threads -1 must be"),
        (("consolidate", "x", "--text", "stdlib", "--out", "x", "--max-loss-increase", "inf"), "above 0 and finite"),
        (("consolidate", "x", "--text", "stdlib", "--out", "x", "--max-loss-increase", "nan"), "above 0 and finite"),
        (("irregular", "--data", "pbcseq", "--seeds", "0", "--out", "x"), "--seeds 0 must be 1 or more"),
        (("irregular", "--data", "mimic3", "--out", "x"), "--data mimic3 needs --path"),
        (("irregular", "--data", "mimic3", "--path", "none", "--out", "x"), "--path none does not exist"),
        (("irregular", "--data", "pbcseq", "--path", ".", "--out", "x"), "--path goes with --data"),
        (("irregular", "--data", "pbcseq", "--source", ".", "--out", "x"), "--source . holds no record.json"),
        (("cost", "none"), "DIR none does not exist"),
        (("eval", "none"), "DIR none does not exist"),
        (("report", "none", "--out", "x.html"), "DIR none does not exist"),
        (("report", ".", "--out", ""), "is not a path"),
        (("report", ".", "--out", f"{__file__}/page.html"), "is a file"),
        (("eval", ""), "is not a path"),
        (("show", "srd"), 'did you mean "srcd"'),
    ],
)
def test_bad_usage_exits_2_names_the_fix_and_writes_nothing(argv, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    said = refused(capsys, *argv)
    assert message in said
    assert said.startswith("cramlab: ")
    assert said.count("\n") == 1
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
    command = [sys.executable, "-c", "import sys; from cramlab.cli.main import main; sys.exit(main(['ls']))"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


EVIL = {"markup": "[/x]", "control": "\x1b[2Jx", "surrogate": "\ud800", "formula": "$x^", "newline": "a\nb"}


@pytest.mark.parametrize("name", EVIL.values(), ids=EVIL)
def test_names_in_records_of_others_are_shown_as_they_are(runs, tmp_path, capsys, name):
    record = json.loads((runs / "transformer-seed0" / "record.json").read_text())
    failed = record | {"status": "failed", "seed": 1, "failure": {"step": 1, "term": name, "seed": 1, "message": name}}
    failed |= {"metrics": record["metrics"] | {"test": None}}
    for i, one in enumerate((record | {"mixer": name, "size": name}, failed)):
        (tmp_path / f"{i}.json").write_text(json.dumps(one))
    assert main(["show", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert plain(name) in shown
    assert "\x1b[2J" not in shown
    page = tmp_path / "page.html"
    assert main(["report", str(tmp_path), "--out", str(page)]) == 0
    assert plain(name) in page.read_text()
    assert "\x1b" not in page.read_text()


def test_a_page_under_a_name_that_is_no_text_is_written_and_said(runs, tmp_path, capfd):
    page = os.fsdecode(bytes(tmp_path) + b"/p\xff.html")
    assert main(["report", str(runs), "--out", page]) == 0
    assert os.path.exists(page)
    assert "report: " in capfd.readouterr().out


def end_at_step_30(_, row):
    if row["step"] == 30:
        signal.raise_signal(signal.SIGTERM)


def test_sigterm_ends_like_ctrl_c_and_the_run_goes_on(tmp_path, capsys, monkeypatch):
    arguments = ["run", "srcd/cram", "--size", "tiny", "--out", str(tmp_path), "--set", "training.n_test_tokens=64"]
    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(ProgressDisplay, "__call__", end_at_step_30)
        assert main(arguments) == 1
    assert capsys.readouterr().err == "cramlab: interrupted; the same command with --resume continues\n"
    assert signal.getsignal(signal.SIGTERM) == before
    assert sorted(p.name for p in (tmp_path / "cram-seed0").iterdir()) == ["checkpoint.pt", "config.json"]
    assert main([*arguments, "--resume"]) == 0


def test_settings_are_taken_in_any_order(tmp_path):
    pair = ["model.mixer.working.d_state=60", "model.mixer.working.n_timescales=6"]
    short = ["training.max_steps=1", "training.n_validation_tokens=64", "training.n_test_tokens=64"]
    for i, order in enumerate((pair, pair[::-1])):
        settings = [part for assignment in (*short, *order) for part in ("--set", assignment)]
        assert main(["run", "srcd/cram", "--size", "tiny", "--out", str(tmp_path / str(i)), *settings]) == 0


def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(tmp_path, capsys, monkeypatch):
    def full(path, data):
        path.open("wb").close()
        raise OSError(28, "No space left on device")

    arguments = ["run", "srcd/cram", "--size", "tiny", "--out", str(tmp_path), "--set", "training.max_steps=2"]
    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.write_bytes", full)
        assert main(arguments) == 1
    said = capsys.readouterr().err
    assert "No space left on device" in said
    assert "config.json" in said
    assert said.count("\n") == 1
    assert list((tmp_path / "cram-seed0").iterdir()) == []
    assert main(arguments) == 0
