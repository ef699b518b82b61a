import json
import re

import huggingface_hub.constants
import pytest

from cramlab.auditing import AuditConfig, AuditResult, controls
from cramlab.cli.main import main

pytest.importorskip("glassllm")
pytestmark = pytest.mark.usefixtures("short_stdlib")
SMALL = ["--tokens", "2000", "--set", "validation_tokens=600", "--set", "test_tokens=1500",
         "--set", "causal_tokens=256", "--set", "context=64", "--set", "n_bootstrap=100", "--threads", "1"]  # fmt: skip


FEWER = {"fit_tokens": 1600, "validation_tokens": 320, "test_tokens": 640, "causal_tokens": 256, "n_bootstrap": 100}


@pytest.fixture(scope="module")
def audited(tmp_path_factory, short_stdlib):
    """An audit whose planted control is a tenth as large; tests/auditing/test_audit.py tests it at its own size."""
    out = tmp_path_factory.mktemp("audit") / "glassllm"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(controls, "AuditConfig", lambda **sizes: AuditConfig(**sizes | FEWER))
        assert main(["audit", "glassllm", "--text", "stdlib", "--out", str(out), *SMALL]) == 0
    return out


def test_it_writes_a_record_and_a_page_and_nothing_else(audited):
    assert sorted(p.name for p in audited.iterdir()) == ["audit.html", "audit.json"]
    data = AuditResult.read(audited / "audit.json").data
    assert data["model"]["name"] == "glassllm"
    assert data["text"]["name"] == "stdlib"
    assert data["text"]["other"]["name"] == "prose"
    assert {"other-domain", "token", "position", "shuffled", "stream"} < set(data["probes"])
    assert set(data["controls"]) == {"planted", "random_weights"}
    assert data["config"]["context"] == 64
    assert data["examples"]["best"][0]["document_name"].endswith(".py")


def test_the_page_shows_everything_and_fetches_nothing(audited):
    page = (audited / "audit.html").read_text()
    for part in ("heat-r", "heat-r2", "depth-r", "loss-by-layer", "loss-by-share", "best", "worst", "rank", "planted",
                 "head-shares", "classes", "verdict", "distribution", "position"):  # fmt: skip
        assert f'id="{part}"' in page, part
    assert page.count("<svg") == 10
    assert "a teaching model" in page
    assert not re.search(r"\.[A-Z]", re.sub(r"<[^>]*>", "", page.split('id="verdict"')[1].split("</p>")[0]))
    assert 'src="http' not in page
    assert 'href="http' not in page


def test_a_finished_audit_is_kept(audited, capsys):
    before = (audited / "audit.json").read_bytes()
    again = ["audit", "glassllm", "--text", "stdlib", "--out", str(audited), *SMALL]
    assert main(again) == 1
    assert "--resume" in capsys.readouterr().err
    assert main([*again, "--resume", "--set", "seed=1"]) == 1
    assert "another model, text or config (seed)" in capsys.readouterr().err
    assert main([*again, "--resume", "--other-text", "none"]) == 1
    assert "another model, text or config (text)" in capsys.readouterr().err
    assert main([*again, "--resume"]) == 0
    assert (audited / "audit.json").read_bytes() == before
    assert "centred" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("glassllm", "--text", "/no/such"), "does not exist"),
        (("glassllm", "--text", "stdlib", "--set", "contxt=3"), 'did you mean "context"'),
        (("glassllm", "--text", "stdlib", "--set", "context=2"), "audit.context = 2"),
        (("glassllm", "--text", "stdlib", "--layers", "a"), '"a" is not a list of layer numbers, as in 0,5,11'),
        (("glassllm", "--text", "stdlib", "--layers", "9"), "layer 9 does not exist"),
        (("glassllm", "--text", "stdlib", "--device", "abacus"), '--device "abacus" cannot be used here'),
        (("--text", "stdlib"), "give either MODEL or --checkpoints"),
        (("glassllm", "--checkpoints", ".", "--text", "stdlib"), "give either MODEL or --checkpoints"),
        (("--checkpoints", "/no/such", "--text", "stdlib"), "/no/such does not exist"),
        (("--checkpoints", "tests/cli", "--text", "stdlib"), "holds no saved models"),
        (("gpt2-medium", "--text", "prose"), "out of reach"),
    ],
)
def test_bad_usage_exits_2_and_names_the_fix(argv, message, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert main(["audit", *argv, "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.json"))


def test_checkpoints_are_audited_by_the_command(tmp_path, capsys):
    from cramlab.auditing import read_corpus
    from cramlab.language_model.run import TextRunConfig
    from cramlab.language_model.text import prepare
    from cramlab.language_model.training import run_text

    documents = [(d.name, d.text[:2000]) for d in read_corpus("stdlib").documents[:100]]
    text = prepare(documents, tmp_path / "runs", vocab_size=300, held_out_frac=0.3)
    config = TextRunConfig(model="gpt2", vocab_size=300, context=16, n_layers=1, d_model=16, n_heads=2, n_steps=4,
                           first_checkpoint=2, n_checkpoints=2, batch_size=4)  # fmt: skip
    run_text(config, text, tmp_path / "runs")
    argv = ["audit", "--checkpoints", str(tmp_path / "runs"), "--text", str(tmp_path / "runs" / "held-out.jsonl"),
            "--out", str(tmp_path / "out"), *SMALL, "--set", "context=16", "--tokens", "300"]  # fmt: skip
    assert main(argv) == 0
    data = json.loads((tmp_path / "out" / "over_training.json").read_text())
    assert [p["step"] for p in data["points"]] == [0, 2, 4]
    assert (tmp_path / "out" / "over_training.html").exists()
    assert main(argv) == 1
    assert main([*argv, "--resume"]) == 0
    assert "gpt2-seed0: centred R2" in capsys.readouterr().out
