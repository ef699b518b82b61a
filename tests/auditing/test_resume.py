"""An audit goes on, or counts as finished, for the very model, text and settings alone."""

import json

import pytest
import torch
from families import build, documents
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from cramlab.auditing import AuditConfig, audit
from cramlab.auditing.resume import Identity, identity
from cramlab.cli.main import main
from cramlab.hf.loading import load

CONFIG = AuditConfig(context=20, fit_tokens=600, validation_tokens=100, test_tokens=200, causal_tokens=40)


def changed(name, change):
    model = build(name)
    with torch.no_grad():
        change(model)
    return model


OTHERS = {
    "the last number of a weight": lambda m: m.model.layers[0].mlp.up_proj.weight[-1, -1].add_(1e-3),
    "the configuration": lambda m: setattr(m.config, "rms_norm_eps", 0.5),
    "the precision": lambda m: m.double(),
}


@pytest.mark.parametrize("what", OTHERS)
def test_another_model_has_another_identity(what):
    texts = [documents(4)]
    assert identity(build("llama"), texts, CONFIG) == identity(build("llama"), texts, CONFIG)
    assert identity(changed("llama", OTHERS[what]), texts, CONFIG) != identity(build("llama"), texts, CONFIG)


def test_tokens_count_with_their_documents_and_groups():
    model, a, b = build("gpt2"), torch.arange(3), torch.arange(4)
    cases = [[[a, b]], [[b, a]], [[a], [b]], [[torch.cat([a, b])]], [[a]], [[a, b], []], [[torch.arange(2), b]]]
    found = {Identity.of(model, case).tokens for case in cases}
    assert len(found) == len(cases)
    assert identity(model, [[a]], CONFIG) != identity(model, [[a]], AuditConfig(context=21))


def cut_off(model, out, texts):
    def stop(stage, *_):
        if stage == "test":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        audit(model, texts, CONFIG, out=out, progress=stop)
    return out


def test_unfinished_sums_go_on_for_the_same_model_and_text_alone(tmp_path):
    texts = documents(60)
    out = cut_off(build("llama"), tmp_path, texts)
    for model in (changed("llama", change) for change in OTHERS.values()):
        with pytest.raises(FileExistsError, match="unfinished work on another model, text or config"):
            audit(model, texts, CONFIG, out=out)
    other = [*texts[:-1], texts[-1].flip(0)]
    with pytest.raises(FileExistsError, match="unfinished work on another model, text or config"):
        audit(build("llama"), other, CONFIG, out=out)
    resumed, whole = (audit(build("llama"), texts, CONFIG, out=place).data for place in (out, None))
    for data in (resumed, whole):
        for name in ("seconds", "peak_memory_bytes"):
            data.pop(name)
    assert resumed == whole


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """Two models of one name, and a text."""
    folder = tmp_path_factory.mktemp("given")
    bytes_alone = Tokenizer(models.BPE(vocab={chr(i): i - 60 for i in range(60, 121)}, merges=[], unk_token=chr(60)))
    bytes_alone.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    for place, model in (("A", build("gpt2")), ("B", changed("gpt2", lambda m: m.transformer.h[0].ln_1.bias.add_(1)))):
        model.save_pretrained(folder / place / "model")
        PreTrainedTokenizerFast(tokenizer_object=bytes_alone).save_pretrained(folder / place / "model")
    (folder / "texts").mkdir()
    generator = torch.Generator().manual_seed(0)
    for i in range(60):
        letters = torch.randint(97, 121, (50,), generator=generator).tolist()
        (folder / "texts" / f"{i}.txt").write_text("".join(map(chr, letters)))
    return folder


def command(given, out, *more, model="A/model", no_controls=True):
    sizes = {"context": 20, "fit_tokens": 600, "validation_tokens": 200, "test_tokens": 200, "causal_tokens": 40,
             "n_bootstrap": 10}  # fmt: skip
    sets = [part for name, value in sizes.items() for part in ("--set", f"{name}={value}")]
    argv = ["audit", str(given / model), "--text", str(given / "texts"), "--other-text", "none", "--out", str(out)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cramlab.pretrained.render_audit", lambda _: "")  # drawing takes longer than all else
        return main([*argv, *sets, *(["--no-controls"] if no_controls else []), *more])


@pytest.fixture(scope="module")
def finished(given, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished")
    assert command(given, out) == 0
    return out


def refused(given, out, capsys, *more, **options):
    assert command(given, out, "--resume", *more, **options) == 1
    return capsys.readouterr().err


def test_a_finished_audit_is_kept_for_the_same_model_alone(given, finished, capsys):
    before = (finished / "audit.json").read_bytes()
    assert command(given, finished, "--resume") == 0
    assert "another model, text or config (model)" in refused(given, finished, capsys, model="B/model")
    assert "(text)" in refused(given, finished, capsys, "--other-text", "prose")
    assert "(context)" in refused(given, finished, capsys, "--set", "context=19")
    assert "(context)" in refused(given, finished, capsys, "--set", "context=30")  # not what the model shortens it to
    assert (finished / "audit.json").read_bytes() == before


def test_controls_belong_to_what_is_asked_for(given, finished, capsys):
    assert "(controls)" in refused(given, finished, capsys, no_controls=False)


def test_another_tokenizer_is_another_audit(given, finished, tmp_path, capsys):
    same = given / "C" / "model"
    load(str(given / "A/model")).model.save_pretrained(same)
    for file in (given / "A" / "model").glob("tokenizer*"):
        held = json.loads(file.read_text())
        if "model" in held:
            held["model"]["vocab"] |= {"a": held["model"]["vocab"]["b"], "b": held["model"]["vocab"]["a"]}
        (same / file.name).write_text(json.dumps(held))
    assert "(tokenizer)" in refused(given, finished, capsys, model="C/model")


def test_sums_left_behind_by_a_kill_are_removed(given, finished):
    (finished / "state").mkdir()
    (finished / "state" / "fit.pt").touch()
    assert command(given, finished, "--resume") == 0
    assert not (finished / "state").exists()


def test_a_record_of_before_can_be_read_and_is_not_taken_for_another(given, finished, tmp_path, capsys):
    from cramlab.auditing import AuditResult

    data = json.loads((finished / "audit.json").read_text())
    for part, names in (("model", ("sha256", "config_sha256")), ("text", ("tokens_sha256", "copies"))):
        for name in names:
            del data[part][name]
    (tmp_path / "audit.json").write_text(json.dumps(data))
    assert AuditResult.read(tmp_path / "audit.json").data == data
    assert "by an earlier version of cramlab, which stored no digest" in refused(given, tmp_path, capsys)
