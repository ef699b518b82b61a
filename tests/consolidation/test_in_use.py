"""What is measured in use equals what a loaded model does, and belongs to one record alone."""

import json

import pytest
import torch
from consolidated import CONTEXT, SINKS, WINDOW, examples, make
from families import BUILD, CAUSAL, build

import cramlab
from cramlab.consolidation import cost_in_use
from cramlab.consolidation.folder import RECORD, load_record, record_digest
from cramlab.consolidation.in_use import FILE, _document, load_in_use, measure_in_use
from cramlab.consolidation.measure import token_losses
from cramlab.consolidation.patch.install import consolidatable_sites, installed, patched
from cramlab.consolidation.patch.observe import recorded
from cramlab.consolidation.rules.baselines import StaticHeads, WindowOnly
from cramlab.consolidation.trial import tried
from cramlab.errors import ConsolidationError
from cramlab.hf.attention_sites import attention_sites
from cramlab.hf.loading import load
from cramlab.hf.pieces import pieces
from cramlab.records import RecordError

pytest.importorskip("glassllm")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("consolidated") / "glass"
    make(out)
    pretrained = load("glassllm")
    measure_in_use(pretrained, out, examples(pretrained))
    assert not installed(pretrained.model)
    return out


@pytest.fixture(scope="module")
def in_use(folder):
    return load_in_use(folder, load_record(folder))


@torch.no_grad()
def test_losses_and_skipped_share_are_those_of_the_loaded_model(folder, in_use):
    documents = examples(load("glassllm"))
    original = load("glassllm").model
    model = cramlab.load_consolidated("glassllm", folder)
    differences = [token_losses(model, t) - token_losses(original, t) for _, t in documents]
    assert in_use["increase"] == pytest.approx(float(torch.stack(differences).mean()), abs=1e-6)
    assert in_use["skipped_frac"] == pytest.approx(cramlab.skip_counts(model).total.skipped_frac)
    assert 0.05 < in_use["skipped_frac"] < 0.95
    sample = in_use["sample"]
    torch.testing.assert_close(torch.tensor(sample["loss"][1:]), token_losses(model, documents[0][1]))
    torch.testing.assert_close(torch.tensor(sample["original"][1:]), token_losses(original, documents[0][1]))
    assert sample["loss"][0] is None


def test_reads_of_tokens_layers_and_places_agree(in_use):
    sample, reads = in_use["sample"], in_use["reads"]
    assert all(read == [] for read in sample["reads"][: WINDOW + SINKS])
    assert any(sample["reads"])
    edges, places = reads["edges"], torch.tensor(reads["by_place"])
    assert (edges[0], edges[-1]) == (WINDOW + SINKS, CONTEXT)
    widths = torch.tensor(edges).diff()
    by_layer = (places * widths[:, None]).sum(0) / widths.sum()
    torch.testing.assert_close(by_layer, torch.tensor(reads["by_layer"]))
    assert in_use["skipped_frac"] == pytest.approx(1 - float(by_layer.mean()), abs=1e-6)
    assert "".join(sample["pieces"]) == load("glassllm").decode(examples(load("glassllm"))[0][1].tolist())


def test_pairs_and_bytes_by_hand(in_use):
    cost = in_use["cost"]
    n_decoded, n_prompt = cost["decode"]["tokens"], cost["prompt"]["tokens"]
    assert n_decoded + n_prompt == CONTEXT
    assert cost["prompt"]["original"]["pairs"] == 4 * n_prompt * (n_prompt + 1) // 2
    keys = sum(range(n_prompt + 1, CONTEXT + 1))  # each decoded token sees all before and itself
    assert cost["decode"]["original"]["pairs"] == pytest.approx(4 * keys / n_decoded)
    config = load("glassllm").model.config
    one = 2 * config.num_key_value_heads * config.head_dim * 4  # key and value, float32
    assert cost["decode"]["original"]["key_bytes"] == pytest.approx(4 * one * keys / n_decoded)
    assert cost["bytes"]["cache"]["original"] == 4 * one * CONTEXT
    assert cost["bytes"]["cache"]["consolidated"] >= cost["bytes"]["cache"]["original"]
    assert cost["bytes"]["weights"] == 4 * sum(p.numel() for p in load("glassllm").model.parameters())
    for stage in ("prompt", "decode"):
        assert cost[stage]["consolidated"]["ms"]["median"] > 0
        assert cost[stage]["original"]["speedup"]["median"] == 1


@pytest.mark.parametrize("name", [name for name in CAUSAL if not name.startswith(("cram", "mistral"))])
@torch.no_grad()
def test_every_family_is_measured(name):
    """Without an error after the hours of learning."""
    model, tokens = build(name), torch.arange(2, 34)
    sites = consolidatable_sites(model)
    layers = {s.layer: WindowOnly(window=5, n_sinks=1) for s in sites}
    cost = cost_in_use.costs(model, layers, tokens)
    for stage in ("prompt", "decode"):
        assert cost[stage]["consolidated"]["pairs"] > 0
        assert cost[stage]["original"]["key_bytes"] > 0
    found = _document(model, sites, tokens, layers)
    assert found["reads"].shape == (len(sites), len(tokens))
    assert not found["reads"].any()
    assert found["skipped_frac"] == 1
    assert bool((found["changed"] > 0).all())
    assert not installed(model)


def test_both_models_decode_the_same_tokens_of_the_document(monkeypatch):
    seen = []

    class Seen(cost_in_use.Decoding):
        def __call__(self):
            super().__call__()
            seen.append(int(self.tokens[self.done - 1]))

    monkeypatch.setattr(cost_in_use, "Decoding", Seen)
    model = BUILD["llama"]().eval()
    sites = attention_sites(model)
    layers = {s.layer: StaticHeads(torch.ones(3, dtype=torch.bool), window=3, n_sinks=1) for s in sites}
    tokens = torch.arange(2, 42)
    with torch.no_grad():
        cost_in_use.costs(model, layers, tokens)
    assert seen == [t for t in tokens[-10:].tolist() for _ in range(2)]


@pytest.mark.parametrize("by_head", [False, True])
def test_a_recorder_decides_as_the_patch_does(by_head):
    model = BUILD["llama"]().eval()
    windowed = torch.tensor([True, False, True]) if by_head else torch.ones(3, dtype=torch.bool)
    layers = {s.layer: StaticHeads(windowed, window=3, n_sinks=1) for s in attention_sites(model)}
    tokens = torch.arange(2, 22)[None]
    with torch.no_grad():
        with patched(model, layers):
            expected = model(tokens).logits
        recorders = recorded(layers)
        with patched(model, recorders):
            assert torch.equal(model(tokens).logits, expected)
    for layer in recorders.values():
        assert layer.reads(20).tolist() == [by_head and i >= 4 for i in range(20)]
        assert layer.never_reads != by_head


def test_what_was_measured_for_another_record_is_left_out(folder, in_use, tmp_path):
    record = make(tmp_path, skipped_frac=0.5)
    assert load_in_use(tmp_path, record) is None
    (tmp_path / FILE).write_text(json.dumps(in_use))
    assert load_in_use(tmp_path, record) is None
    assert load_in_use(folder, load_record(folder))["record_sha256"] == record_digest(load_record(folder))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(format=2), "format"),
        (lambda d: d.pop("reads"), "reads"),
        (lambda d: d["sample"].update(loss=["x"]), r"sample\.loss"),
        (lambda d: d["cost"]["bytes"].update(weights=-1), "weights"),
        (lambda d: d["cost"]["prompt"]["consolidated"]["speedup"].update(median=0), "median"),
        (lambda d: d["layers"].append(9), r"reads\.by_layer does not fit"),
        (lambda d: d["reads"]["by_place"].pop(), r"reads\.by_place does not fit"),
        (lambda d: d["reads"]["by_place"][0].pop(), r"reads\.by_place does not fit"),
        (lambda d: d["reads"].update(edges=[5, 4]), r"reads\.edges does not fit"),
        (lambda d: d["changed"][1].pop(), "changed does not fit"),
        (lambda d: d["sample"]["pieces"].append("x"), "sample does not fit"),
        (lambda d: d["sample"]["reads"][0].append(4), r"sample\.reads does not fit"),
    ],
)
def test_a_damaged_file_is_refused_by_name(change, message, folder, in_use, tmp_path):
    data = json.loads(json.dumps(in_use))
    change(data)
    (tmp_path / FILE).write_text(json.dumps(data))
    with pytest.raises(RecordError, match=rf"in_use\.json is damaged.*{message}"):
        load_in_use(tmp_path, load_record(folder))
    (tmp_path / FILE).write_text("{")
    with pytest.raises(RecordError, match="is not JSON"):
        load_in_use(tmp_path, load_record(folder))


def test_pieces_are_the_text():
    """Also where a character has several tokens, and where a decoder drops a space at the start."""
    text = "naïve, 読む 🙂 end"
    data = list(text.encode())

    def decode(ids):
        return bytes(ids).decode("utf-8", errors="replace")

    assert "".join(pieces(decode, data)) == text
    assert pieces(decode, data)[2:4] == ["", "ï"]
    assert "".join(pieces(decode, data[:3])) == "na\ufffd"  # cut in a character
    assert "".join(pieces(decode, [255] * 20)) == "\ufffd" * 20
    words = ["▁one", "▁two", "s"]
    assert pieces(lambda ids: "".join(words[i] for i in ids).replace("▁", " ").lstrip(), [0, 1, 2]) == [
        "one", " two", "s"
    ]  # fmt: skip


@torch.no_grad()
def test_a_trial_is_what_both_models_generate(folder):
    pretrained = load("glassllm")
    prompt = pretrained.decode(examples(pretrained)[0][1][:50].tolist())
    trial = tried(pretrained, folder, prompt, n_tokens=8)
    ids = torch.tensor([pretrained.encode(prompt)])
    how = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert trial.original.text == pretrained.decode(pretrained.model.generate(ids, **how)[0, ids.shape[1] :].tolist())
    model = cramlab.load_consolidated("glassllm", folder)
    new = model.generate(ids, **how)
    assert trial.consolidated.text == pretrained.decode(new[0, ids.shape[1] :].tolist())
    assert len(trial.consolidated.token_ms) == 7
    made = cramlab.skip_counts(model).layers
    for layer, reads, share in zip(trial.layers, trial.reads, trial.prompt_reads, strict=True):
        counts = made[f"model.layers.{layer}.self_attn"]
        assert int(reads[1:].sum()) + round(float(share) * trial.n_far) == counts.far_reads
    assert trial.n_far == ids.shape[1] - WINDOW - SINKS


def test_a_trial_samples_from_a_seed_and_refuses_what_does_not_fit(folder):
    pretrained = load("glassllm")
    once, again = (tried(pretrained, folder, "def f", n_tokens=12, temperature=1.5, seed=3) for _ in range(2))
    assert once.original.text == again.original.text
    assert once.original.text != tried(pretrained, folder, "def f", n_tokens=12, temperature=1.5, seed=4).original.text
    assert once.n_far == 0
    with pytest.raises(ConsolidationError, match=r"exceed the model's context of 128; shorten either"):
        tried(pretrained, folder, "def f", n_tokens=128)
    with pytest.raises(ConsolidationError, match="no tokens"):
        tried(pretrained, folder, "")
    (folder.parent / "bare").mkdir(exist_ok=True)
    make(folder.parent / "bare")
    with pytest.raises(ConsolidationError, match="holds no sample text; give a prompt"):
        tried(pretrained, folder.parent / "bare")
    assert (folder.parent / "bare" / RECORD).exists()
