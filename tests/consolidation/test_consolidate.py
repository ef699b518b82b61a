"""From text to a folder and back, on the small packaged model and through the command."""

import json
import re
import shutil

import pytest
import torch
from families import BUILD

import cramlab
from cramlab.auditing import read_corpus
from cramlab.cli.main import main
from cramlab.consolidation import calibration
from cramlab.consolidation import folder as consolidation_folder
from cramlab.consolidation.calibration import Calibration
from cramlab.consolidation.config import HELD_OUT, ConsolidationConfig
from cramlab.consolidation.documents import held_out_at, parts_of, running_contexts
from cramlab.consolidation.folder import RECORD, WEIGHTS, load_record, weights_digest
from cramlab.consolidation.guarantee import Guarantee
from cramlab.consolidation.in_use import DOCUMENTS, FILE, load_in_use
from cramlab.consolidation.learn.closed_form import Learned
from cramlab.consolidation.patch.install import closed, installed, remove
from cramlab.consolidation.setting import Setting
from cramlab.errors import ConsolidationError
from cramlab.hf.loading import load
from cramlab.report.consolidation_page import PAGE

pytest.importorskip("glassllm")
SIZES = {"context": 128, "window": 16, "fit_documents": 12, "sensitivity_documents": 3, "layers_per_document": 2,
         "gate_documents": 6, "validation_documents": 4, "calibration_documents": 30, "test_documents": 4,
         "tokens_per_document": 64, "adapter_bytes": 100_000, "max_rank": 8, "units": 4, "local_steps": 4,
         "end_steps": 6, "batch_contexts": 2, "learning_lengths": (64,), "calibrated_lengths": (96,)}  # fmt: skip
SET = [part for name, value in SIZES.items() for part in ("--set", f"{name}={str(value).strip('(),')}")]


def command(out, *more):
    return ["consolidate", "glassllm", "--text", "stdlib", "--max-loss-increase", "0.1", "--out", str(out), *SET,
            "--threads", "1", *more]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("consolidate") / "glassllm"
    assert main(command(out)) == 0
    return out


def test_the_folder_is_small_and_says_what_was_promised(folder):
    assert sorted(p.name for p in folder.iterdir()) == [RECORD, WEIGHTS, FILE, PAGE]
    assert (folder / WEIGHTS).stat().st_size < 150_000
    record = json.loads((folder / RECORD).read_text())
    assert record["promise"] == {"increase": 0.1, "bound": 0.5, "delta": 0.1}
    passed = [t for t in record["tested"] if t["p_value"] <= 0.1]
    assert record["skipped_frac"] == passed[-1]["skipped_frac"]
    assert passed[-1]["mean"] < passed[-1]["upper_bound"] <= 0.1
    assert record["test"]["documents"] == SIZES["test_documents"]
    (shorter,) = record["lengths"]
    assert (shorter["length"], shorter["documents"]) == (96, SIZES["calibration_documents"])
    assert {t["skipped_frac"]: t["p_value"] for t in shorter["tested"]}[record["skipped_frac"]] <= 0.1
    assert shorter["test"]["increase"] != record["test"]["increase"]
    assert 0 < record["test"]["skipped_frac"] <= 1
    assert record["model"]["family"] == "llama"


def test_it_loads_is_live_and_loses_what_the_record_says(folder):
    pretrained = load("glassllm")
    config = ConsolidationConfig(**SIZES)
    tokens = torch.stack(parts_of(pretrained, read_corpus("stdlib"), config)["test"])
    with torch.no_grad():
        original = pretrained.model(tokens, labels=tokens).loss
        model = cramlab.load_consolidated("glassllm", folder)
        assert cramlab.skip_counts(model).total.tokens == 0  # the probe left no trace
        patched = model(tokens, labels=tokens).loss
        record = json.loads((folder / RECORD).read_text())
        assert float(patched - original) == pytest.approx(record["test"]["increase"], abs=2e-3)
        found = cramlab.skip_counts(model)
        assert found.live
        assert set(found.layers) == {f"model.layers.{i}.self_attn" for i in range(4)}
        assert found.total.tokens == 4 * tokens.numel()
        assert found.total.skipped_frac == pytest.approx(record["test"]["skipped_frac"], abs=1e-6)
        assert "patch live on 4 attention modules" in str(found)
        with closed(model):
            assert not cramlab.skip_counts(model).live
            assert torch.equal(model(tokens, labels=tokens).loss, original)
        assert model.generate(tokens[:1, :40], max_new_tokens=5, do_sample=False).shape == (1, 45)
        remove(model)
    assert not cramlab.skip_counts(model).live


def without_digest(record):
    """A record as it was written before records held a digest of themselves."""
    return {name: value for name, value in record.items() if name != "record_sha256"}


@pytest.mark.parametrize(
    ("field", "value"),
    [("threshold", -1), ("threshold", 0.5), ("window", 17), ("n_sinks", 3), ("skipped_frac", 0.01),
     ("promise", {"increase": 0.001, "bound": 0.5, "delta": 0.1})],
)  # fmt: skip
def test_a_record_that_was_changed_by_hand_is_refused(field, value, folder, tmp_path):
    """The threshold carries the promise; the weights have had a digest of their own."""
    shutil.copytree(folder, tmp_path / "copy")
    record = json.loads((folder / RECORD).read_text())
    record[field] = value
    (tmp_path / "copy" / RECORD).write_text(json.dumps(record))
    with pytest.raises(ConsolidationError, match="was changed after it was written"):
        cramlab.load_consolidated("glassllm", tmp_path / "copy")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"threshold": float("nan")}, "NaN is not a JSON number"),
        ({"threshold": 1e308}, "threshold: 1e"),
        ({"ranks": {}}, "ranks"),
        ({"ranks": {"99": 4}}, r"no layers \[99\] to patch"),
        ({"ranks": {"x": 4}}, "ranks"),
        ({"units": 0}, "does not fit"),
        ({"n_sinks": 10**9}, "nothing is far"),
        ({"window": 10**9}, "nothing is far"),
    ],
)
def test_records_without_a_digest_are_looked_through(changes, message, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    record = without_digest(json.loads((folder / RECORD).read_text())) | changes
    (tmp_path / "copy" / RECORD).write_text(json.dumps(record))
    model = load("glassllm").model
    with pytest.raises(ConsolidationError, match=message):
        cramlab.load_consolidated(model, tmp_path / "copy")
    assert not installed(model)


@pytest.mark.parametrize("data", [b'{"format": 2, "x": "\xe1"}', '{"a": 1}'.encode("utf-16"), b"[" * 100_000, b"{"])
def test_a_record_that_is_no_json_is_named(data, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / RECORD).write_bytes(data)
    with pytest.raises(ConsolidationError, match=r"consolidation\.json is damaged"):
        cramlab.load_consolidated("glassllm", tmp_path / "copy")


def test_a_saved_model_has_its_consolidation_beside_it(folder, tmp_path):
    """The two lines of the warning bring both back."""
    model = cramlab.load_consolidated("glassllm", folder)
    tokens = torch.randint(0, 60, (1, 60))
    with pytest.warns(UserWarning, match=r"from_pretrained\(.*\)\ncramlab\.load_consolidated\(model, "):
        model.save_pretrained(tmp_path / "saved")
    again = type(model).from_pretrained(tmp_path / "saved")
    assert not installed(again)
    with torch.no_grad():
        assert torch.equal(cramlab.load_consolidated(again, tmp_path / "saved")(tokens).logits, model(tokens).logits)
        next(iter(installed(model).values())).gate.bias.add_(1.0)
    with pytest.warns(UserWarning, match=r"without the patch: layer 0's gate\.bias is not the one that was loaded"):
        model.save_pretrained(tmp_path / "trained")
    assert not (tmp_path / "trained" / RECORD).exists()


def test_wrong_weights_family_version_and_damage_are_refused(folder, tmp_path):
    model = load("glassllm").model
    with torch.no_grad():
        next(model.parameters())[0, 0] += 1e-3
    with pytest.raises(ConsolidationError, match="other weights"):
        cramlab.load_consolidated(model, folder)
    with pytest.raises(ConsolidationError, match='made for family "llama", this model is "gpt2"'):
        cramlab.load_consolidated(BUILD["gpt2"](), folder)

    def copy_with(**changes):
        shutil.copytree(folder, tmp_path / "copy", dirs_exist_ok=True)
        record = without_digest(json.loads((folder / RECORD).read_text())) | changes
        (tmp_path / "copy" / RECORD).write_text(json.dumps(record))
        return tmp_path / "copy"

    with pytest.raises(ConsolidationError, match="has format 99, this version of cramlab reads 2"):
        cramlab.load_consolidated("glassllm", copy_with(format=99))
    with pytest.raises(ConsolidationError, match="not the file that"):
        cramlab.load_consolidated("glassllm", copy_with(weights_sha256="0" * 64))
    with pytest.raises(ConsolidationError, match=r"damaged: promise.delta: 3"):
        cramlab.load_consolidated("glassllm", copy_with(promise={"increase": 0.1, "bound": 0.5, "delta": 3}))
    damaged = copy_with()
    (damaged / RECORD).write_text("{")
    with pytest.raises(ConsolidationError, match="damaged"):
        cramlab.load_consolidated("glassllm", damaged)
    (damaged / RECORD).unlink()
    with pytest.raises(ConsolidationError, match="unfinished"):
        cramlab.load_consolidated("glassllm", damaged)


def test_a_patch_that_the_model_does_not_ask_is_found_out(folder, monkeypatch):
    monkeypatch.setattr(consolidation_folder, "install", lambda model, layers, write: [
        site.attention.add_module("consolidated", layers[site.layer])
        for site in consolidation_folder.consolidatable_sites(model)
    ])  # fmt: skip
    with pytest.raises(ConsolidationError, match=r"layers.0.self_attn was not called"):
        cramlab.load_consolidated("glassllm", folder)


def test_loaded_weights_are_those_that_were_calibrated(folder):
    """Rounding to half precision comes before the thresholds: the folder keeps every bit."""
    from safetensors.torch import load_file

    model = cramlab.load_consolidated("glassllm", folder)
    kept = load_file(folder / WEIGHTS)
    for name, layer in installed(model).items():
        i = name.split(".")[2]
        for key, value in layer.state_dict().items():
            assert torch.equal(value, kept[f"{i}.{key}"].float())
        assert layer.units == SIZES["units"]
        assert layer.gate.weight[:, len(layer.shift) :].abs().max() > 0  # gradients have been there


def test_nothing_is_learned_from_documents_that_are_held_out(folder):
    pretrained, corpus, config = load("glassllm"), read_corpus("stdlib"), ConsolidationConfig(**SIZES)
    parts = parts_of(pretrained, corpus, config, read_corpus("prose"))
    learned = {
        tuple(tokens.tolist()) for group in ("learning", "fit", "gate", "sensitivity") for tokens in parts[group]
    }
    for group in HELD_OUT:
        assert not learned & {tuple(tokens.tolist()) for tokens in parts[group]}
    assert parts["further"]
    longer = held_out_at(pretrained, corpus, config, 200, 5)
    assert len(longer) == 5
    clean = [tuple(tokens.tolist()) for group in ("test", "calibration") for tokens in parts[group]]
    assert all(tuple(tokens[:128].tolist()) in clean for tokens in longer)
    assert [len(tokens) for tokens in running_contexts(pretrained, read_corpus("prose"), 64, 3, 0)] == [64, 64, 64]


def test_the_digest_does_not_see_the_patch(folder):
    model = load("glassllm").model
    before = weights_digest(model)
    cramlab.load_consolidated(model, folder)
    assert installed(model)
    assert weights_digest(model) == before


def test_finished_work_is_kept(folder, capsys):
    before = (folder / RECORD).read_bytes()
    assert main(command(folder)) == 1
    assert "--resume" in capsys.readouterr().err
    assert main(command(folder, "--resume", "--set", "seed=1")) == 1
    assert "another model, text or config (seed)" in capsys.readouterr().err
    assert main(command(folder, "--resume")) == 0
    assert (folder / RECORD).read_bytes() == before
    assert "guaranteed: at most +0.1 nats" in capsys.readouterr().out


def test_what_is_measured_in_use_is_of_the_first_test_documents(folder):
    pretrained, config, record = load("glassllm"), ConsolidationConfig(**SIZES), load_record(folder)
    tests = parts_of(pretrained, read_corpus("stdlib"), config)["test"][:DOCUMENTS]
    in_use = load_in_use(folder, record)
    assert "".join(in_use["sample"]["pieces"]) == pretrained.decode(tests[0].tolist())
    texts = {document.name: document.text for document in read_corpus("stdlib").documents}
    assert pretrained.encode(texts[in_use["sample"]["document"]])[:128] == tests[0].tolist()
    with torch.no_grad():
        original = torch.stack([pretrained.model(t[None], labels=t[None]).loss for t in tests]).mean()
        model = cramlab.load_consolidated(pretrained.model, folder)
        ours = torch.stack([model(t[None], labels=t[None]).loss for t in tests]).mean()
    assert in_use["increase"] == pytest.approx(float(ours - original), abs=1e-5)


def test_a_folder_without_its_measurements_gets_them_with_resume(folder, tmp_path, monkeypatch, capsys):
    """They are missing after a kill between learning and measuring, and in a folder of an earlier version."""
    out = tmp_path / "out"
    shutil.copytree(folder, out)
    kept = (out / FILE).stat().st_mtime_ns
    assert main(command(out, "--resume")) == 0
    assert (out / FILE).stat().st_mtime_ns == kept
    for name in (FILE, PAGE):
        (out / name).unlink()

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("cramlab.consolidation.in_use.costs", killed)
        assert main(command(out, "--resume")) == 1
    assert sorted(p.name for p in out.iterdir()) == [RECORD, WEIGHTS]
    assert main(["show", str(out)]) == 0
    assert "measures them with --resume" in " ".join(capsys.readouterr().out.split())
    assert main(command(out, "--resume")) == 0
    ours, theirs = (load_in_use(path, load_record(path)) for path in (out, folder))
    for found in (ours, theirs):
        for name in ("cost", "header", "seconds"):
            found.pop(name)
    assert ours == theirs
    assert "far reads made by layer" in capsys.readouterr().out


def test_python_returns_the_record_that_it_wrote(folder, tmp_path):
    record = cramlab.consolidate("glassllm", "stdlib", tmp_path, max_loss_increase=0.1, start=folder)
    assert record == load_record(tmp_path)
    assert (tmp_path / PAGE).exists()


def test_show_report_and_try_know_the_folder(folder, tmp_path, capsys):
    record = load_record(folder)
    for path in (folder, folder / RECORD):
        assert main(["show", str(path)]) == 0
        assert f"{record['test']['increase']:+.4f}" in capsys.readouterr().out
    before = (folder / PAGE).read_bytes()
    (folder / PAGE).unlink()
    assert main(["report", str(folder)]) == 0
    assert (folder / PAGE).read_bytes() == before
    assert main(["report", str(folder), "--out", str(tmp_path / "page.html")]) == 0
    assert (tmp_path / "page.html").read_bytes() == before
    capsys.readouterr()
    assert main(["try", "glassllm", str(folder), "--tokens", "6", "--threads", "1"]) == 0
    shown = capsys.readouterr().out
    assert "prompt: 96 tokens, 76 with far keys" in shown
    assert len(re.findall(r"^(?:original|consolidated): 6 tokens; prompt and first token", shown, flags=re.M)) == 2
    assert len(re.search(r"layers that read, of 4, by new token: ([\d ]+)", shown)[1].split()) == 6
    assert shown.count("\nlayer ") == 4
    assert "\x1b" not in shown
    assert main(["try", "glassllm", str(folder), "def f(", "--tokens", "3", "--temperature", "0.5"]) == 0
    assert "0 with far keys" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("",), "PROMPT is empty"),
        (("text", "--tokens", "0"), "--tokens 0 must be 1 or more"),
        (("text", "--temperature", "-1"), "--temperature -1 must be 0 or more"),
        (("text", "--temperature", "hot"), "--temperature 'hot' is not a number"),
        (("text", "--tokens", "200"), "exceed the model's context of 128"),
        (("text", "--device", "nowhere"), '--device "nowhere" cannot be used here'),
    ],
)
def test_a_trial_that_cannot_be_is_refused(argv, message, folder, capsys):
    assert main(["try", "glassllm", str(folder), *argv]) == 2
    assert message in capsys.readouterr().err


def test_work_cut_off_again_and_again_goes_on_to_the_same_result(folder, tmp_path, monkeypatch, capsys):
    from cramlab.auditing.resume import Stages

    run, out = Stages.run, tmp_path / "out"
    for stage in ("sensitivity", "end", "calibration-original"):

        def cut_off(self, name, items, step, into, n_tokens, stage=stage):
            def failing(item):
                if name == stage and item[0] == 2:
                    raise KeyboardInterrupt
                return step(item)

            return run(self, name, items, failing, into, n_tokens)

        monkeypatch.setattr(Stages, "run", cut_off)
        assert main(command(out, *(["--resume"] if out.exists() else []))) == 1
        assert "--resume continues" in capsys.readouterr().err
    monkeypatch.setattr(Stages, "run", run)
    assert (out / "state").exists()
    assert main(command(out)) == 1
    assert "unfinished" in capsys.readouterr().err
    assert main(command(out, "--resume")) == 0
    ours, theirs = (json.loads((path / RECORD).read_text()) for path in (out, folder))
    for record in (ours, theirs):
        record.pop("seconds")
        record.pop("record_sha256")
    assert ours == theirs
    assert (out / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()


def recalibrated(folder, out, *more, text="stdlib", promise="0.1"):
    argv = ["consolidate", "glassllm", "--text", text, "--max-loss-increase", promise, "--from", str(folder)]
    return main([*argv, "--out", str(out), "--threads", "1", *more])


def test_the_same_promise_calibrated_anew_is_the_same(folder, tmp_path):
    out = tmp_path / "again"
    assert recalibrated(folder, out) == 0
    assert sorted(p.name for p in out.iterdir()) == [RECORD, WEIGHTS, FILE, PAGE]
    assert (out / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()
    ours, theirs = (json.loads((path / RECORD).read_text()) for path in (out, folder))
    assert ours.pop("learned_on") == theirs["text"]
    for record in (ours, theirs):
        record.pop("seconds")
        record.pop("record_sha256")
    assert ours == theirs


def test_another_promise_needs_no_learning(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("cramlab.consolidation.pipeline.learn", None)
    safer = tmp_path / "safer"
    assert recalibrated(folder, safer, "--set", "bound_factor=4", promise="0.05") == 0
    record = json.loads((safer / RECORD).read_text())
    assert record["promise"] == {"increase": 0.05, "bound": 0.2, "delta": 0.1}
    elsewhere = tmp_path / "elsewhere"
    sizes = ("--set", "calibration_documents=24", "--set", "context=100")
    assert recalibrated(folder, elsewhere, *sizes, text="prose", promise="0.3") == 0
    record = json.loads((elsewhere / RECORD).read_text())
    assert (record["text"]["name"], record["learned_on"]["name"]) == ("prose", "stdlib")
    assert cramlab.skip_counts(cramlab.load_consolidated("glassllm", elsewhere)).live


@pytest.fixture(scope="module")
def own_text(tmp_path_factory):
    """A folder of documents, and what was consolidated on it."""
    root = tmp_path_factory.mktemp("own")
    for i, document in enumerate(d for d in read_corpus("stdlib").documents if len(d.text) > 4000):
        path = root / "texts" / ("sub" if i % 2 else "") / f"{i}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(document.text)
        if i == 100:
            break
    out = root / "learned"
    argv = ["consolidate", "glassllm", "--text", str(root / "texts"), "--max-loss-increase", "0.1", "--out", str(out)]
    assert main([*argv, *SET, "--threads", "1"]) == 0
    return root


@pytest.mark.parametrize("text", ["copy", "texts/sub", ".", "texts"])
def test_no_document_that_was_learned_from_gets_into_a_promise(text, own_text, tmp_path, monkeypatch):
    """Whatever it is called, and wherever it stands."""
    config = ConsolidationConfig(**SIZES)
    parts = parts_of(load("glassllm"), read_corpus(str(own_text / "texts")), config)
    learned_from = {tuple(t.tolist()) for part in ("fit", "gate", "sensitivity", "validation") for t in parts[part]}
    learned_from |= {tuple(t.tolist()) for t in parts["learning"]}
    if text == "copy" and not (own_text / "copy").exists():
        shutil.copytree(own_text / "texts", own_text / "copy")
    measured_on = []
    increases = Calibration.increases

    def seen(self, part, *given):
        measured_on.extend(self.setting.parts[part])
        return increases(self, part, *given)

    monkeypatch.setattr(Calibration, "increases", seen)
    few = ("--set", "calibration_documents=6", "--set", "test_documents=1", "--set", "validation_documents=1")
    more = (*few, "--set", "seed=3", "--set", "delta=0.9")
    assert recalibrated(own_text / "learned", tmp_path / "out", *more, text=str(own_text / text), promise="0.5") == 0
    assert len(measured_on) >= 8
    assert not learned_from & {tuple(t.tolist()) for t in measured_on}
    # once more, from what came out, with the same draw: nothing else is let in
    measured_on.clear()
    assert recalibrated(tmp_path / "out", tmp_path / "again", text=str(own_text / text), promise="0.6") == 0
    assert measured_on
    assert not learned_from & {tuple(t.tolist()) for t in measured_on}


def test_copies_of_held_out_documents_are_not_learned_from(own_text):
    config, pretrained = ConsolidationConfig(**SIZES), load("glassllm")
    corpus = read_corpus(str(own_text / "texts"))
    parts = parts_of(pretrained, corpus, config, corpus)
    held_out = {tuple(t.tolist()) for part in HELD_OUT for t in parts[part]}
    assert parts["further"]
    assert not held_out & {tuple(t.tolist()) for t in parts["further"]}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--set", "window=20"), "consolidation.window = 20 cannot be changed with --from"),
        (("--further-text", "prose"), "--further-text"),
        (("--set", "seed=3", "--set", "calibration_documents=300"), "are needed"),  # of those that are left
    ],
)
def test_what_another_folder_does_not_allow_is_refused(more, message, folder, capsys, tmp_path):
    assert recalibrated(folder, tmp_path / "out", *more) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda record: record["text"].update(digest="0" * 16), "nearly the same text"),
        (lambda record: (record["text"].update(digest="0" * 16), record.pop("used_documents")), "does not say which"),
        (lambda record: record["config"].update(seed=-1), "cannot read"),
        (lambda record: record["config"].update(zzz=1), "cannot read"),
    ],
)
def test_a_folder_that_cannot_tell_what_it_was_learned_from_is_refused(change, message, folder, capsys, tmp_path):
    older = tmp_path / "older"
    shutil.copytree(folder, older)
    record = without_digest(json.loads((older / RECORD).read_text()))
    change(record)
    (older / RECORD).write_text(json.dumps(record))
    assert recalibrated(older, tmp_path / "out") == 2
    assert message in capsys.readouterr().err


def test_finished_work_of_another_text_or_folder_is_not_taken_for_this(folder, capsys, tmp_path):
    out = tmp_path / "out"
    assert recalibrated(folder, out) == 0
    assert recalibrated(folder, out, "--resume") == 0
    for argv, name in ((command(out, "--resume"), "from"), (command(folder, "--resume"), "")):
        assert main(argv) == (1 if name else 0)
        assert not name or f"another model, text or config ({name})" in capsys.readouterr().err
    assert recalibrated(folder, out, "--resume", text="prose") == 1
    assert "another model, text or config (text)" in capsys.readouterr().err
    assert recalibrated(folder, folder, "--resume") == 1
    assert "another model, text or config (from)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("glassllm", "--text", "/no/such"), "does not exist"),
        (("glassllm", "--text", "stdlib", "--set", "windw=3"), 'did you mean "window"'),
        (("glassllm", "--text", "stdlib", "--set", "window=0"), "consolidation.window = 0"),
        (("glassllm", "--text", "stdlib", "--set", "context=30"), "nothing far beyond window 64"),
        (("glassllm", "--text", "stdlib", "--set", "end_loss=mse"), 'end_loss = "mse" does not fit; give "kl", "nats"'),
        (("glassllm", "--text", "stdlib", "--device", "nowhere"), '--device "nowhere" cannot be used here'),
        (("glassllm", "--text", "stdlib", "--set", "context=256"), "use at most 128"),
        (("glassllm", "--text", "stdlib", "--max-loss-increase", "0"), "must be above 0"),
        (
            ("glassllm", "--text", "stdlib", "--set", "calibration_documents=3"),
            "3 are too few to guarantee",
        ),
        (("glassllm", "--text", "prose", "--set", "context=128", "--set", "fit_documents=9999"), "are needed"),
    ],
)
def test_bad_usage_and_empty_promises_exit_2_with_the_figure(argv, message, capsys, tmp_path):
    assert main(["consolidate", *argv, "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.json"))


def test_a_promise_that_cannot_be_kept_is_refused_with_the_one_that_can(capsys, tmp_path, monkeypatch):
    """Every document loses 0.0002 nats here: on the stdlib of some Pythons this model gains from skipped reads."""
    measured = calibration.measured

    def costly(model, tokens, layers):
        return (calibration.mean_loss(model, tokens) + 0.0002, *measured(model, tokens, layers)[1:])

    monkeypatch.setattr(calibration, "measured", costly)
    out = tmp_path / "out"
    argv = [*command(out)[:-2], "--threads", "1", "--set", "local_steps=0", "--set", "end_steps=0"]
    assert main([*argv, "--max-loss-increase", "0.0001"]) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    found = re.search(r"(\d+)% of the far reads costs (\S+) on the 30 .* can guarantee is (\S+): ask", message)
    assert found is not None, message
    assert float(found[3]) > max(0.0001, float(found[2]))
    assert not list(out.glob("*.json"))
    assert main([*argv, "--max-loss-increase", f"{0.97 * float(found[3])}", "--resume"]) == 2
    assert main([*argv, "--max-loss-increase", found[3], "--resume"]) == 0  # it does pass, and what was learned is kept


def test_calibration_starts_where_as_many_documents_like_those_of_validation_would_pass():
    """At the promise on average is not enough: a start there would fail, and nothing safer could be tried after it."""
    config = ConsolidationConfig(**SIZES | {"skipped_fracs": (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)})
    means = dict(
        zip(("0.1", "0.2", "0.3", "0.4", "0.5", "0.6"), (0.0, 0.001, 0.006, 0.018, 0.019, 0.0195), strict=True)
    )
    asked = []

    class Planted(Calibration):
        def thresholds(self):
            return [0.0] * 6

        def increases(self, part, skipped_frac, threshold):
            name = f"{skipped_frac:g}"
            asked.append((part, name))
            n = getattr(config, f"{part.partition('-')[0]}_documents")
            return means[name] + 0.01 * torch.linspace(-1, 1, n, dtype=torch.float64)[:, None].expand(-1, 3)

    learned = Learned(layers={}, ranks=[], explained=[], sensitivity=[], strengths=[], benefit_gates=[])
    parts = {part: [torch.zeros(1)] * config.calibration_documents for part in ("calibration", "calibration-96")}
    run = Planted(Setting(None, [], config, parts, None), learned, "planted")
    guarantee = Guarantee(increase=0.02, bound=0.1, delta=0.1)
    calibrated = run.calibrate(guarantee)
    assert calibrated.skipped_frac == 0.3
    assert [name for part, name in asked if part == "calibration"] == ["0.1", "0.2", "0.3", "0.4"]
    assert [frac for frac, _ in calibrated.at_lengths[96]] == [0.1, 0.2, 0.3]  # only what passed at the context

    class WorseWhenShort(Planted):
        def increases(self, part, skipped_frac, threshold):
            return super().increases(part, skipped_frac, threshold) + 0.008 * part.endswith("-96")

    worse = WorseWhenShort(Setting(None, [], config, parts, None), learned, "planted").calibrate(guarantee)
    assert worse.skipped_frac == 0.2  # what every length passes
    assert [t.p_value <= 0.1 for _, t in worse.at_lengths[96]] == [True, True, False]
