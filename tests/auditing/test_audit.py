import dataclasses
import json

import pytest
import torch
from families import BUILD, CAUSAL, build, documents

from cramlab.auditing import AuditConfig, AuditError, AuditResult, audit, over_text
from cramlab.auditing.causal import causal_contexts
from cramlab.auditing.controls import PLANTED, PlantedModel, planted_control
from cramlab.auditing.redundancy import CLASSES, measure, position_bins, rank_grid, token_classes
from cramlab.auditing.resume import clear
from cramlab.auditing.split import split
from cramlab.hf.loading import Pretrained
from cramlab.records import RecordError
from cramlab.text import Corpus, Document

SMALL = AuditConfig(context=16, fit_tokens=240, validation_tokens=64, test_tokens=96, causal_tokens=64,
                    batch_tokens=32, n_bootstrap=50)  # fmt: skip


@pytest.fixture(scope="module")
def planted():
    return planted_control(seed=0)


@pytest.fixture(scope="module")
def gpt2():
    return audit(build("gpt2"), documents(), SMALL, other=documents(seed=1))


def test_planted_redundancy_is_found_within_its_interval(planted):
    for row, (share, _) in zip(planted["layers"], PLANTED, strict=True):
        value, low, high = row["r2"]
        assert row["planted_r2"] == pytest.approx(share, abs=0.01)
        assert value == pytest.approx(row["planted_r2"], abs=0.004)
        if 0 < share < 1:
            assert low < row["planted_r2"] < high
            assert high - low < 0.02
    assert planted["layers"][0]["r"][0] == pytest.approx(1, abs=1e-4)
    assert planted["layers"][1]["r"][0] == pytest.approx(1 - (1 - 0.8) ** 0.5, abs=0.04)  # R is no share of variance
    assert planted["layers"][3]["r2"][2] < 0.001


def test_the_planted_loss_tells_predictable_from_removable(planted):
    known, needed, unread, unknown = (row["loss"] for row in planted["layers"])
    assert abs(known["probe"][0]) < 1e-5
    assert known["zero"][1] > 0.3
    assert needed["probe"][1] > 0.1  # R2 of .8, and yet it costs
    assert needed["probe"][2] < needed["zero"][1]
    for loss in (unread, unknown):
        assert all(abs(value) < 1e-6 for kind in loss.values() for value in kind)


def test_controls_know_what_they_should_on_the_planted_model():
    model = PlantedModel().eval()
    config = AuditConfig(context=64, fit_tokens=8_000, validation_tokens=1_500, test_tokens=3_000, causal_tokens=0)
    result = audit(model, model.write(200, 64, seed=1), config)
    r2 = {name: [e[0] for e in result.layers("r2", name)] for name in result.data["probes"]}
    assert set(r2) == {"hidden", "stream", "mean", "token", "position", "shuffled"}
    for i, (share, _) in enumerate(PLANTED):
        assert r2["token"][i] == pytest.approx(share, abs=0.04)  # what is known is known from the token
        assert abs(r2["position"][i]) < 0.02
        assert abs(r2["shuffled"][i]) < 0.01
        assert r2["mean"][i] == 0
    assert result.data["loss"] is None
    assert "verdict" not in result.data


@pytest.mark.parametrize("name", BUILD)
def test_every_family_is_audited_from_end_to_end(name, tmp_path):
    result = audit(build(name), documents(), SMALL, mask_token=0)
    result.write(tmp_path / "audit.json")
    assert AuditResult.read(tmp_path / "audit.json").data["model"]["family"] == name
    assert ("stream" in result.data["probes"]) == (name not in ("bert", "roberta"))
    assert result.data["loss"]["kind"] == ("next-token" if name in CAUSAL else "masked-token")
    assert len(result.data["loss"]["alone"]) == 3
    assert result.data["by_class"][0]["tokens"] == 6
    counted = sum(sum(row) for row in result.data["distribution"]["layers"])
    assert counted == 3 * result.data["text"]["parts"]["test"]["tokens"] == 3 * 96


def test_an_encoder_without_a_head_has_no_loss():
    assert audit(build("bert").bert, documents(), SMALL).data["loss"] is None
    assert audit(build("bert"), documents(), SMALL).data["loss"] is None  # no mask token given


def test_figures_agree_with_a_plain_recomputation(gpt2):
    """R and centred R2 of one layer from stored activations and scikit-learn, on the audit's own split."""
    from sklearn.linear_model import Ridge

    from cramlab.auditing.capture import watching
    from cramlab.auditing.regression import Moments, RidgePath
    from cramlab.hf.attention_sites import attention_sites, base_model

    model, parts = build("gpt2"), split(documents(), SMALL, 25)
    site = attention_sites(model)[1]

    def activations(part):
        rows = []
        with torch.no_grad(), watching([site], lambda _, s: rows.append((s.hidden, s.answer))):
            for contexts in part:
                base_model(model)(input_ids=contexts.tokens)
        return (torch.cat(column).double() for column in zip(*rows, strict=True))

    x, y = activations(parts.fit)
    moments = Moments(24, 24)
    moments.update(x, y)
    strength = gpt2.data["probes"]["hidden"]["strengths"][1][0]
    ridge = Ridge(alpha=RidgePath(moments).alpha(strength)).fit(x.numpy(), y.numpy())
    test_x, test_y = activations(parts.test)
    error = test_y - torch.from_numpy(ridge.predict(test_x.numpy()))
    r = (1 - error.norm(dim=1) / test_y.norm(dim=1)).mean()
    r2 = 1 - error.square().sum() / (test_y - y.mean(dim=0)).square().sum()
    assert gpt2.layers("r")[1][0] == pytest.approx(float(r), abs=1e-4)
    assert gpt2.layers("r2")[1][0] == pytest.approx(float(r2), abs=1e-4)
    assert gpt2.data["by_rank"]["r2"][1][-1][0] == pytest.approx(float(r2), abs=1e-4)


def test_batches_do_not_matter(gpt2):
    single = audit(build("gpt2"), documents(), dataclasses.replace(SMALL, batch_tokens=16))
    for measured in ("r", "r2", "cosine"):
        ours, theirs = (torch.tensor(result.layers(measured)) for result in (gpt2, single))
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_layers_can_be_chosen(gpt2):
    some = audit(build("gpt2"), documents(), dataclasses.replace(SMALL, layers=(2, 0)))
    assert some.data["model"]["layers"] == [0, 2]
    assert some.layers("r")[1] == gpt2.layers("r")[2]
    assert some.data["loss"]["alone"][1] == gpt2.data["loss"]["alone"][2] | {"sites": [1]}
    with pytest.raises(AuditError, match="layer 3 does not exist; the model has layers 0 to 2"):
        audit(build("gpt2"), documents(), dataclasses.replace(SMALL, layers=(3,)))


class StopError(Exception):
    pass


@pytest.mark.parametrize("stage", ["fit", "other", "test", "causal"])
def test_an_audit_cut_off_in_any_stage_goes_on_to_the_same_result(stage, gpt2, tmp_path, monkeypatch):
    from cramlab.auditing.resume import Stages

    monkeypatch.setattr(Stages, "saving_frac", 1e9)
    stages = []

    def progress(name, done, n_tokens, seconds):
        stages.append(name)
        if name == stage and done >= n_tokens / 2:
            raise StopError

    first = Stages.__init__

    def every_document(self, folder, identity, progress, save_every_s=0.0, **more):
        first(self, folder, identity, progress, save_every_s, **more)

    monkeypatch.setattr(Stages, "__init__", every_document)
    arguments = (build("gpt2"), documents(), SMALL)
    with pytest.raises(StopError):
        audit(*arguments, other=documents(seed=1), out=tmp_path, progress=progress)
    n_before, stage_done = len(stages), stages.count(stage)
    resumed = audit(*arguments, other=documents(seed=1), out=tmp_path,
                    progress=lambda name, *_: stages.append(name))  # fmt: skip
    assert stages[n_before:][0] == stage  # nothing before it is done again
    assert stages[n_before:].count(stage) + stage_done == len([s for s in stages if s == stage])
    for name in ("probes", "by_class", "by_rank", "loss", "examples", "distribution"):
        assert resumed.data[name] == gpt2.data[name], name
    with pytest.raises(FileExistsError, match="another model, text or config"):
        audit(build("gpt2"), documents(), dataclasses.replace(SMALL, seed=1), out=tmp_path)
    clear(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_causal_part_goes_round_the_documents_and_sums_by_document():
    config = dataclasses.replace(SMALL, causal_tokens=80)
    result, parts = audit(build("gpt2"), documents(), config), split(documents(), SMALL, 25)
    assert result.data["text"]["parts"]["causal"] == {"documents": 3, "tokens": 80}
    rows, contexts = causal_contexts(parts, dataclasses.replace(SMALL, causal_tokens=10_000))
    assert sorted(contexts.tolist()) == sorted(t for c in parts.test for t in c.tokens.tolist())
    assert rows.tolist() == [0, 1, 2, 0, 1, 2]
    for row, tokens in zip(rows.tolist(), contexts, strict=True):
        assert any(torch.equal(tokens, own) for own in parts.test[row].tokens)
    with torch.no_grad():
        nats = [float(build("gpt2")(t[None], labels=t[None]).loss) for t in contexts[:5]]
    assert result.data["loss"]["nats_per_token"][0] == pytest.approx(sum(nats) / 5, rel=1e-4)


def test_the_random_weights_go_on_where_they_were_cut_off(tmp_path, monkeypatch):
    monkeypatch.setattr(over_text, "planted_control", lambda _: {"layers": []})
    pretrained = Pretrained(name="gpt2", model=build("gpt2"), encode=lambda text: [*map(int, text.split())], decode=str,
                            context=16)  # fmt: skip
    config = dataclasses.replace(SMALL, fit_tokens=480, validation_tokens=256, test_tokens=384)
    texts = (" ".join(map(str, ids.tolist())) for ids in documents(48))
    corpus = Corpus("numbers", tuple(Document(str(i), text) for i, text in enumerate(texts)))
    stages = []

    def progress(stage, *_):
        stages.append(stage)
        if stage == "random weights, test" and stages.count(stage) == 1:
            raise StopError

    with pytest.raises(StopError):
        over_text.audit_text(pretrained, corpus, config, out=tmp_path, progress=progress)
    n_before = len(stages)
    resumed = over_text.audit_text(pretrained, corpus, config, out=tmp_path, progress=progress)
    assert set(stages[n_before:]) == {"random weights, test"}
    whole = over_text.audit_text(pretrained, corpus, config)
    assert resumed.data["controls"] == whole.data["controls"]
    clear(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("given", "found"),
    [([[5, 6, 7]], "list"), (torch.arange(40), r"\(\) of torch.int64"), ([torch.zeros(1, 40).long()], r"\(1, 40\)"),
     ([torch.zeros(40)], r"\(40,\) of torch.float32")],
)  # fmt: skip
def test_documents_are_rows_of_token_ids(given, found):
    with pytest.raises(AuditError, match=f"document 0 is not a 1-D tensor of token ids but {found}"):
        audit(build("gpt2"), given, SMALL)


def test_a_model_that_counts_from_padding_has_fewer_positions():
    with pytest.raises(AuditError, match=r"audit\.context = 69 exceeds the model.s longest context, 68"):
        audit(build("roberta"), documents(12, 80), dataclasses.replace(SMALL, context=69))
    result = audit(build("roberta"), documents(12, 80), dataclasses.replace(SMALL, context=68))
    assert result.data["config"]["context"] == 68


def test_what_cannot_be_audited_is_refused_before_any_work():
    model, texts = build("gpt2"), documents()
    with pytest.raises(AuditError, match="training mode"):
        audit(build("gpt2").train(), texts, SMALL)
    with pytest.raises(AuditError, match=r"audit\.context = 65 exceeds the model.s longest context, 64"):
        audit(model, texts, dataclasses.replace(SMALL, context=65))
    with pytest.raises(AuditError, match="document 3 holds token 61, but the model has tokens 0 to 60"):
        audit(model, [*texts[:3], torch.full((40,), 61)], SMALL)
    with pytest.raises(AuditError, match="fewer tokens than features"):
        audit(model, documents(3, 16), SMALL)
    with pytest.raises(AuditError, match="shorter than a context"):
        audit(model, documents(4, 15), SMALL)


def test_a_model_that_sees_the_future_is_refused():
    model = build("gpt2")
    for block in model.transformer.h:
        block.attn.is_causal = False
    model.config._attn_implementation = "eager"
    model.transformer.config._attn_implementation = "eager"
    plain = model.transformer.forward

    def leaky(input_ids, **options):
        output = plain(input_ids=input_ids, **options)
        output.last_hidden_state = output.last_hidden_state + output.last_hidden_state.mean(dim=1, keepdim=True)
        return output

    model.transformer.forward = leaky
    with pytest.raises(AuditError, match="has no causal mask"):
        audit(model, documents(), SMALL)


def test_nan_in_the_weights_names_the_layer():
    model = build("llama")
    with torch.no_grad():
        model.model.layers[2].self_attn.v_proj.weight[0, 0] = float("nan")
    with pytest.raises(AuditError, match="layer 2: the heads' outputs of attention holds NaN"):
        audit(model, documents(), SMALL)


def test_one_document_leaves_intervals_open_instead_of_inventing_them(tmp_path):
    result = audit(build("gpt2"), documents(3, 64), dataclasses.replace(SMALL, fit_tokens=30, validation_tokens=5,
                                                                         test_tokens=5))  # fmt: skip
    assert result.data["text"]["parts"]["test"]["documents"] == 1
    result.write(tmp_path / "audit.json")
    value, low, high = AuditResult.read(tmp_path / "audit.json").overall("r")
    assert value is not None
    assert low is high is None


def test_another_document_is_refused(gpt2, tmp_path):
    path = tmp_path / "audit.json"
    gpt2.write(path)
    for change in ({"schema_version": 2}, {"kind": "run"}):
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
        with pytest.raises(RecordError, match="is no"):
            AuditResult.read(path)
    gpt2.write(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"colour": "red"}))
    with pytest.raises(RecordError, match="colour"):
        AuditResult.read(path)


def test_measures_are_the_definitions():
    truth, predicted = torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.tensor([[3.0, 0.0], [1.0, 0.0]])
    found = measure(truth, predicted)
    assert found.r.tolist() == pytest.approx([1 - 4 / 5, 0.0])
    assert found.cosine.tolist() == pytest.approx([3 / 5, 0.0])
    assert found.error.tolist() == [16.0, 1.0]
    assert found.energy.tolist() == [25.0, 0.0]


def test_tokens_positions_and_ranks_are_sorted_into_their_groups():
    tokens = torch.tensor([[5, 6, 7, 5, 6, 7, 8], [1, 1, 1, 1, 2, 2, 2]])
    names = [[CLASSES[c] for c in row] for row in token_classes(tokens, ngram=3).tolist()]
    assert names[0] == ["first", *["novel"] * 4, "repeated", "novel"]
    assert names[1] == ["first", "novel", "novel", "repeated", "novel", "novel", "novel"]
    assert position_bins(10) == [(0, 0), (1, 1), (2, 3), (4, 7), (8, 9)]
    assert rank_grid(24) == [0, 1, 2, 4, 8, 16, 24]
    assert rank_grid(1) == [0, 1]


def test_the_most_and_least_predictable_tokens_are_shown_in_their_text(gpt2):
    best, worst = (gpt2.data["examples"][name] for name in ("best", "worst"))
    assert len(best) == len(worst) == 12
    assert [e["r"] for e in best] == sorted((e["r"] for e in best), reverse=True)
    assert [e["r"] for e in worst] == sorted(e["r"] for e in worst)
    assert best[-1]["r"] > worst[-1]["r"]
    text = documents()[best[0]["document"]].tolist()
    shown = list(map(int, f"{best[0]['before']} {best[0]['token']} {best[0]['after']}".split()))
    assert any(text[i : i + len(shown)] == shown for i in range(len(text)))
