import dataclasses

import pytest
import torch

from cramlab import model
from cramlab.baselines import TransformerConfig
from cramlab.catalog import MIXERS
from cramlab.memory import CRAMConfig, RouterConfig
from cramlab.mixer import Path, Routing
from cramlab.model import ModelConfig, SequenceModel
from cramlab.tasks.srcd import TINY

TOKEN = dataclasses.replace(TINY, key_mode="token")


def make(mixer=None, task=TINY, **changes):
    config = ModelConfig(mixer=mixer or CRAMConfig(), d_model=32, d_mlp=40, n_frequencies=4, **changes)
    model = SequenceModel(config, task.input_spec).eval()
    for block in model.blocks:  # a fresh gate says the same of all tokens; let it disagree
        with torch.no_grad():
            if hasattr(block.mixer, "gate"):
                block.mixer.gate.out.weight.normal_(0, 3.0)
                block.mixer.gate.out.bias.zero_()
            if hasattr(block.mixer, "router"):
                block.mixer.router.weight.normal_()
                block.mixer.router.bias.zero_()
    return model


def batch_of(task=TINY, n=3):
    return task.dataset(seed=0, split="train", batch_size=n).batch(0)


def cut(batch, tokens):
    fields = {name: value[:, tokens] for name, value in batch._asdict().items() if isinstance(value, torch.Tensor)}
    return batch._replace(**fields, slices={name: mask[:, tokens] for name, mask in batch.slices.items()})


@pytest.mark.parametrize("task", [TINY, TOKEN], ids=["vector", "token"])
@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("name", MIXERS)
def test_every_mixer_predicts_and_has_finite_gradients(name, norm, task):
    model = make(MIXERS[name](), task, n_layers=2, norm=norm).train()
    batch = batch_of(task)
    generator = torch.Generator().manual_seed(0)
    routing = Routing(oracle_reads=batch.oracle_reads, temperature=1.0, generator=generator)
    output = model(batch, routing=routing)
    assert output.predictions.level.shape == batch.gaps.shape
    assert output.predictions.logits.shape == (*batch.gaps.shape, task.n_values)
    (output.predictions.level.sum() + output.predictions.logits.sum()).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", [n for n in MIXERS if n not in ("cram-random", "cram-oracle")])
@pytest.mark.parametrize("n_layers", [1, 3])
def test_steps_equal_one_pass(name, n_layers):
    model, batch = make(MIXERS[name](), n_layers=n_layers), batch_of()
    whole = model(batch)
    state, levels, logits = None, [], []
    for tokens in (slice(0, 1), slice(1, 30), slice(30, 31), slice(31, 64)):
        output = model(cut(batch, tokens), state)
        state = output.state
        levels.append(output.predictions.level)
        logits.append(output.predictions.logits)
    assert torch.allclose(torch.cat(levels, dim=1), whole.predictions.level, atol=1e-4)
    assert torch.allclose(torch.cat(logits, dim=1), whole.predictions.logits, atol=1e-4)


@pytest.mark.parametrize(
    "name", [n for n in MIXERS if n not in ("cram-random", "cram-oracle", "cram-paper", "cram-gumbel")]
)
def test_padded_tokens_change_nothing(name):
    model, batch = make(MIXERS[name](), n_layers=2), batch_of()
    valid = batch.valid.clone()
    valid[:, :5] = False
    valid[0, 50:] = False
    rubbish = torch.where(valid[..., None], batch.continuous, torch.nan)
    ids = torch.where(valid[..., None], batch.discrete, 10**6)
    padded_batch = batch._replace(valid=valid, continuous=rubbish, discrete=ids)
    padded_batch = padded_batch._replace(gaps=torch.where(valid, batch.gaps, torch.nan))
    padded = model(padded_batch).predictions.level
    padded[valid].sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    alone = model(cut(batch, slice(5, None))).predictions.level
    assert torch.allclose(padded[1:, 5:], alone[1:], atol=1e-4)
    assert torch.allclose(padded[0, 5:50], alone[0, :45], atol=1e-4)


def test_targets_are_not_looked_at():
    model, batch = make(), batch_of()
    changed = batch._replace(
        retrieval_target=batch.retrieval_target + 1,
        dynamics_target=batch.dynamics_target + 1,
        oracle_reads=~batch.oracle_reads,
        retrieval_mask=~batch.retrieval_mask,
    )
    assert torch.equal(model(changed).predictions.logits, model(batch).predictions.logits)


@pytest.mark.parametrize("n_layers", [1, 2, 3])
def test_counterfactual_equals_a_second_pass_without_the_reads(n_layers):
    """With every other layer as it was: one layer goes without, the rest follow from what they then see."""
    batch = batch_of()
    model = make(n_layers=n_layers)
    layer = n_layers - 1
    output = model(batch, counterfactual_layer=layer)
    block = model.blocks[layer]
    block.mixer.config = dataclasses.replace(CRAMConfig(), router=RouterConfig(name="never"))
    expected = model(batch)
    read = output.traces[layer].attended
    assert 0 < read.sum() < read.numel()
    assert torch.allclose(output.without_reads.logits[read], expected.predictions.logits[read], atol=1e-5)
    assert torch.allclose(output.without_reads.level[read], expected.predictions.level[read], atol=1e-5)
    assert (output.without_reads.logits[~read] == 0).all()


def test_counterfactual_of_a_lower_layer_runs_the_upper_ones_again():
    batch, model = batch_of(), make(n_layers=2)
    output = model(batch, counterfactual_layer=0)
    model.blocks[0].mixer.config = dataclasses.replace(CRAMConfig(), router=RouterConfig(name="never"))
    expected = model(batch)
    assert torch.allclose(output.without_reads.logits, expected.predictions.logits, atol=1e-5)


def test_gathering_the_tokens_that_read_changes_no_gradient():
    model, batch = make(), batch_of()
    x, mixed = torch.randn(*batch.valid.shape, 32), torch.randn(*batch.valid.shape, 32)
    where = torch.rand(batch.valid.shape) < 0.3
    weight = torch.randn(*batch.valid.shape, TINY.n_values) * where[..., None]
    parameters = [*model.blocks[-1].mlp_in.parameters(), *model.answer_head.parameters()]
    gathered = torch.autograd.grad((model._predict_some(where, x, mixed, batch).logits * weight).sum(), parameters)
    whole = model._predict(model.blocks[-1].finish(x, mixed), batch.continuous[..., 0])
    full = torch.autograd.grad((whole.logits * weight).sum(), parameters)
    for a, b in zip(gathered, full, strict=True):
        assert torch.allclose(a, b, atol=1e-4)


def test_second_passes_are_handed_over_to_be_counted():
    model, batch = make(n_layers=3), batch_of()
    assert len(model(batch, counterfactual_layer=0).counterfactual_traces) == 2
    assert len(model(batch, counterfactual_layer=2).counterfactual_traces) == 0


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_a_block_finishes_part_by_part_what_it_finishes_at_once(norm, monkeypatch):
    """Without gradients the MLP works in parts; with them on the whole."""
    monkeypatch.setattr(model, "_CACHED_TOKENS", 7)
    block = make(norm=norm).blocks[0]
    x, mixed = torch.randn(2, 50, block.mlp_in.in_features), torch.randn(2, 50, block.mlp_in.in_features)
    whole = block.finish(x, mixed)
    with torch.no_grad():
        assert torch.allclose(block.finish(x, mixed), whole, atol=1e-6)
        assert torch.allclose(block.finish(x[0], mixed[0]), whole[0], atol=1e-6)


def test_transformer_without_a_mask_equals_one_with_a_trivial_mask():
    model, batch = make(TransformerConfig()), batch_of()
    valid = batch.valid.clone()
    valid[:, -1] = False
    masked = model(batch._replace(valid=valid)).predictions.logits[:, :-1]
    assert torch.allclose(masked, model(batch).predictions.logits[:, :-1], atol=1e-5)


def test_transformer_cost_matches_counted_flops():
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    layer = TransformerConfig(n_heads=2).build(32)
    # The fused kernel counts as nothing, the plain one as two products over the whole square of scores.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        layer(torch.randn(1, 128, 32), torch.rand(1, 128))
    cost = layer.cost(128)
    assert cost.projection_flops + 2 * cost.read_flops * 128 / 129 == pytest.approx(counter.get_total_flops(), rel=0.01)


@pytest.mark.parametrize(
    ("changes", "field"),
    [({"n_layers": 0}, "model.n_layers"), ({"norm": "mid"}, "model.norm"), ({"d_mlp": 0}, "model.d_mlp")],
)
def test_bad_models_are_refused_by_name(changes, field):
    with pytest.raises(ValueError, match=field):
        ModelConfig(mixer=CRAMConfig(), **changes)
    with pytest.raises(ValueError, match="n_heads"):
        ModelConfig(mixer=TransformerConfig(n_heads=3), d_model=32).mixer.build(32)


def test_audits_are_of_the_layer_that_is_asked_what_its_reads_are_worth():
    model, batch = make(n_layers=3), batch_of()
    everything = torch.ones_like(batch.valid)
    by_rule = model(batch, routing=Routing())
    output = model(batch, routing=Routing(audits=everything), counterfactual_layer=0)
    assert output.traces[0].scored.all()
    assert not by_rule.traces[0].scored.all()
    for trace in output.traces[1:]:
        assert torch.equal(trace.scored, trace.path == Path.EPISODIC)
        assert not trace.scored.all()
    assert all(trace.scored.all() for trace in model(batch, routing=Routing(audits=everything)).traces)
