"""The table of names and settings, the refusals that it allows without torch, and the help made from it."""

import subprocess
import sys

import pytest

from cramlab.auditing import AuditConfig
from cramlab.cli.main import main
from cramlab.cli.make_settings import collected
from cramlab.cli.settings import check_fields, check_run, help_text, table
from cramlab.config import overridden
from cramlab.errors import ConfigError, UsageError
from cramlab.experiments import EXPERIMENTS

REFUSED = [
    "fly",
    "run srdc --out x",
    "run srcd/crm --out x",
    "run srcd --size huge --out x",
    "run srcd --out x --set task.seqlen=3",
    "run srcd --out {file}/x",
    "run srcd --out x --seed -1",
    "audit no/such/model --text stdlib --out x",
    "audit glassllm --text no-such-text --out x",
    "audit glassllm --text stdlib --out x --set contxt=3",
    "consolidate glassllm --text stdlib --out x --set windw=3",
    "consolidate glassllm --text stdlib --out x --from no-such-folder",
    "irregular --data pbseq --out x",
    "irregular --data pbcseq --path no-such-path --out x",
    "irregular --data pbcseq --source no-such-run --out x",
    "irregular --data mimic3 --out x",
    "eval no-such-folder",
    "cost no-such-folder",
    "report no-such-folder --out x.html",
    "show srdc",
]


def test_the_table_is_that_of_the_code():
    assert table() == collected(), "run python -m cramlab.cli.make_settings"


def test_bad_arguments_are_refused_and_help_is_shown_without_torch():
    code = (
        "import contextlib, sys\n"
        "from cramlab.cli.main import main\n"
        f"for line in {REFUSED!r}:\n"
        "    try: code = main(line.format(file=sys.executable).split())\n"
        "    except SystemExit as stopped: code = stopped.code\n"
        "    assert code == 2, line\n"
        "for line in ('--help', '--version', 'run --help', 'audit --help', 'consolidate --help'):\n"
        "    with contextlib.suppress(SystemExit): main(line.split())\n"
        "assert main(['ls']) == 0\n"
        "loaded = {'torch', 'numpy', 'pydantic', 'transformers', 'rich'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("name", "assignment"),
    [
        ("srcd", "task.seqlen=3"),
        ("srcd", "model.mixer.semantic.rank=8"),  # the control has no semantic memory
        ("srcd/cram", "model.mixer=3"),
        ("srcd/cram", "model.mixer.semantic"),
        ("srcd/cram", "training.max_steps.x=1"),
        ("srcd/cram-no-working", "model.mixer.working.d_state=8"),
        ("srcd/jamba", "model.mixer.n_heads=2"),
        ("transfer/cram", "task.n_pattern=3"),
    ],
)
def test_the_table_refuses_a_field_as_the_configs_do(name, assignment):
    with pytest.raises(ConfigError) as by_table:
        check_run(name, "tiny", [assignment])
    experiment, _, mixers = name.partition("/")
    configs = next(EXPERIMENTS[experiment](size="tiny", seed=0, mixers=mixers.split(",") if mixers else None))
    with pytest.raises(ConfigError) as by_configs:
        _ = [overridden(config, [assignment]) for config in configs]
    assert str(by_table.value) == str(by_configs.value)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_the_table_takes_every_field_of_an_experiment(experiment):
    for mixer, numbers in table()["experiments"][experiment]["trees"].items():
        name = f"{experiment}/{mixer}" if mixer else experiment
        assert numbers
        assert check_run(name, "small", ["task.seq_len=64", "training.loss.read_price=0"])[0] == experiment


def test_a_mixer_that_an_experiment_does_not_have_is_left_to_the_experiment(tmp_path, capsys):
    check_run("transfer/jamba", "tiny", ["anything=3"])
    assert main(["run", "transfer/jamba", "--size", "tiny", "--out", str(tmp_path)]) == 2
    assert "transfer has no runs of jamba" in capsys.readouterr().err


def test_the_other_commands_check_their_fields():
    check_fields("audit", ["context=3", "layers=1"])
    with pytest.raises(ConfigError, match='did you mean "context"'):
        check_fields("audit", ["contxt=3"])
    with pytest.raises(UsageError, match='did you mean "window"'):
        check_fields("consolidate", ["windw=3"])


def test_help_lists_every_field_that_show_prints_with_its_value(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    shown = help_text("run")
    assert main(["show", "srcd/cram"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("#")]
    listed = [line for line in lines if not line.startswith(("experiment", "size", "mixer", "seed", "variant"))]
    assert len(listed) > 50
    for line in listed:
        assert f"  {line}" in shown


@pytest.mark.parametrize(
    ("command", "field"), [("run", "task.seq_len"), ("audit", "context"), ("consolidate", "window")]
)
def test_every_field_has_a_sentence(command, field):
    known = table()
    values = known["commands"][command]["values"]
    assert field in values
    for path, (config, _) in values.items():
        assert known["configs"][config][path.rpartition(".")[2]], f"{config} says nothing of {path} under Attributes"


def test_values_in_help_are_the_defaults():
    values = table()["commands"]["audit"]["values"]
    assert values["context"] == ["AuditConfig", str(AuditConfig().context)]
