"""Each baseline against a slow obvious twin: outputs, gradients, and counted work."""

import dataclasses

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import softplus
from torch.utils.flop_counter import FlopCounterMode

from cramlab.baselines import (
    MemorizerConfig,
    MixtureOfDepthsConfig,
    RecurrenceConfig,
    SeqBoatConfig,
    SlidingWindowConfig,
    TransformerConfig,
    TransMambaConfig,
    jamba,
)
from cramlab.baselines.recurrence import selective_scan
from cramlab.baselines.shared.packing import pack
from cramlab.baselines.shared.selected import SelectedAttention

D = 16
CONFIGS = {
    "transformer": TransformerConfig(n_heads=2),
    "sliding-window": SlidingWindowConfig(n_heads=2, window=5),
    "recurrence": RecurrenceConfig(d_state=6, d_head=8),
    "seqboat": SeqBoatConfig(n_heads=2, recurrence=RecurrenceConfig(d_state=6, d_head=8)),
    "transmamba": TransMambaConfig(n_heads=2, switch_at=7),
    "mixture-of-depths": MixtureOfDepthsConfig(n_heads=2),
    "memorizer": MemorizerConfig(d_hidden=24),
}


def make(name):
    layer = CONFIGS[name].build(D)
    if hasattr(layer, "router"):  # fresh routers say the same of all tokens
        torch.nn.init.normal_(layer.router.weight)
        torch.nn.init.zeros_(layer.router.bias)
    return layer


def example(n_tokens, n_batch=3):
    return torch.randn(n_batch, n_tokens, D), torch.rand(n_batch, n_tokens)


def same_gradients(fast, slow, inputs):
    weight = torch.randn_like(fast)
    ours = torch.autograd.grad((fast * weight).sum(), inputs, allow_unused=True)
    theirs = torch.autograd.grad((slow * weight).sum(), inputs, allow_unused=True)
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.allclose(a, b, atol=1e-4, rtol=1e-3)


def one_by_one(x, log_decay, b, c, state):
    ys = []
    for t in range(x.shape[1]):
        state = torch.exp(log_decay[:, t, :, None, None]) * state + x[:, t, ..., None] * b[:, t, None, None]
        ys.append((state * c[:, t, None, None]).sum(-1))
    return torch.stack(ys, dim=1), state


@pytest.mark.parametrize("n_tokens", [1, 2, 63, 100])
def test_selective_scan_equals_a_loop(n_tokens):
    x = torch.randn(2, n_tokens, 3, 4, requires_grad=True)
    log_decay = (-torch.rand(2, n_tokens, 3)).requires_grad_()
    b, c = torch.randn(2, n_tokens, 5, requires_grad=True), torch.randn(2, n_tokens, 5, requires_grad=True)
    state = torch.randn(2, 3, 4, 5, requires_grad=True)
    fast, after = selective_scan(x, log_decay, b, c, state, chunk=16)
    slow, after_slow = one_by_one(x, log_decay, b, c, state)
    assert torch.allclose(fast, slow, atol=1e-4)
    assert torch.allclose(after, after_slow, atol=1e-4)
    same_gradients(fast, slow, [x, log_decay, b, c, state])


def test_selective_scan_survives_strong_decay():
    """Decays multiply to far below what a float can hold within a chunk."""
    x, b, c = torch.randn(1, 64, 1, 2), torch.randn(1, 64, 3), torch.randn(1, 64, 3)
    log_decay = torch.full((1, 64, 1), -50.0)
    state = torch.zeros(1, 1, 2, 3)
    assert torch.allclose(
        selective_scan(x, log_decay, b, c, state)[0], one_by_one(x, log_decay, b, c, state)[0], atol=1e-5
    )


def test_recurrence_equals_the_reference_implementation_of_mamba_2():
    transformers = pytest.importorskip("transformers")
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    config = transformers.Mamba2Config(
        hidden_size=D, state_size=6, expand=2, head_dim=8, num_heads=4, n_groups=1, conv_kernel=4, chunk_size=16,
        use_conv_bias=True, use_bias=False, time_step_limit=(0.0, float("inf")), layer_norm_epsilon=1e-5,
    )  # fmt: skip
    theirs, ours = Mamba2Mixer(config, layer_idx=0).eval(), make("recurrence")
    with torch.no_grad():
        ours.skip.normal_()
        ours.norm.weight.normal_()
        theirs.in_proj.weight.copy_(ours.w_in.weight)
        theirs.conv1d.weight.copy_(ours.conv.weight)
        theirs.conv1d.bias.copy_(ours.conv.bias)
        theirs.dt_bias.copy_(ours.step_bias)
        theirs.A_log.copy_(ours.log_rate)
        theirs.D.copy_(ours.skip)
        theirs.norm.weight.copy_(ours.norm.weight)
        theirs.out_proj.weight.copy_(ours.w_out.weight)
    x, gaps = example(50)
    x.requires_grad_()
    fast, slow = ours(x, gaps).y, theirs(x)
    assert torch.allclose(fast, slow, atol=1e-4)
    same_gradients(fast, slow, [x])


@pytest.mark.parametrize("n_tokens", [1, 4, 5, 6, 33])
def test_sliding_window_equals_masked_attention(n_tokens):
    layer, wide = make("sliding-window"), TransformerConfig(n_heads=2).build(D)
    wide.load_state_dict(layer.state_dict())
    x, gaps = example(n_tokens)
    x.requires_grad_()
    places = torch.arange(n_tokens)
    window = (places <= places[:, None]) & (places > places[:, None] - 5)
    q, k, v = wide.w_qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
    scores = (q @ k.transpose(-1, -2) / (D // 2) ** 0.5).masked_fill(~window, -torch.inf)
    slow = wide.w_out((torch.softmax(scores, dim=-1) @ v).transpose(1, 2).flatten(2))
    fast = layer(x, gaps).y
    assert torch.allclose(fast, slow, atol=1e-5)
    same_gradients(fast, slow, [x])


def among(attention, x, selected):
    """Sequence by sequence: attention over the selected tokens and nothing else."""
    y = torch.zeros_like(x)
    for b in range(len(x)):
        where = selected[b].nonzero().squeeze(-1)
        if len(where):
            q, k, v = attention.w_qkv(x[b, where]).unflatten(-1, (3, attention.n_heads, -1)).permute(1, 2, 0, 3)
            scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
            scores = scores.masked_fill(torch.ones(len(where), len(where)).triu(1).bool(), -torch.inf)
            answers = attention.w_out((torch.softmax(scores, dim=-1) @ v).transpose(0, 1).flatten(1))
            y = y.index_put((torch.tensor(b), where), answers)
    return y


@pytest.mark.parametrize("share", [0.0, 0.2, 1.0])
def test_selected_attention_equals_attention_over_the_selected(share):
    attention = SelectedAttention(D, 2)
    x, selected = torch.randn(3, 20, D, requires_grad=True), torch.rand(3, 20) < share
    fast, _ = attention(x, selected, attention.initial_cache(3))
    slow = among(attention, x, selected)
    assert torch.allclose(fast, slow, atol=1e-5)
    if share:
        same_gradients(fast, slow, [x, attention.w_qkv.weight, attention.w_out.weight])


@pytest.mark.parametrize("name", ["seqboat", "mixture-of-depths"])
def test_routers_learn_through_the_tokens_that_they_let_pass(name):
    layer, (x, gaps) = make(name), example(30)
    output = layer(x, gaps)
    assert 0.1 < output.trace.attended.float().mean() < 0.9
    output.y.square().sum().backward()
    assert layer.router.weight.grad.abs().max() > 0


def test_seqboat_scales_attention_by_the_probability_of_activation():
    layer, (x, gaps) = make("seqboat"), example(30)
    recurred = layer.recurrence(x, gaps).y
    h = layer.norm(x + recurred)
    probability = torch.softmax(layer.router(h) / layer.log_temperature.exp(), dim=-1)[..., 1]
    slow = recurred + probability[..., None] * among(layer.attention, h, probability > 0.5)
    assert torch.allclose(layer(x, gaps).y, slow, atol=1e-5)


def test_mixture_of_depths_pays_only_above_its_capacity():
    layer, (x, gaps) = make("mixture-of-depths"), example(30)
    torch.nn.init.constant_(layer.router.bias, -20.0)
    assert layer(x, gaps).aux["capacity"].item() == 0
    torch.nn.init.constant_(layer.router.bias, 20.0)
    assert layer(x, gaps).aux["capacity"].item() == pytest.approx(1 - layer.config.capacity, abs=1e-3)


def test_transmamba_attends_then_recurs_with_the_same_projections():
    layer, (x, gaps) = make("transmamba"), example(20)
    plain = TransformerConfig(n_heads=2).build(D)
    plain.w_qkv.weight.data, plain.w_out.weight.data = layer.w_qkv.weight.data, torch.eye(D)
    attended = plain(x, gaps).y
    q, k, v = layer.w_qkv(x).chunk(3, dim=-1)
    step = softplus(layer.w_step(x))
    heads = v.unflatten(-1, (2, -1)) * step[..., None]
    state = torch.zeros(3, 2, D // 2, D)
    recurred, _ = one_by_one(heads, -step * layer.log_rate.exp(), k * D**-0.5, q, state)
    slow = torch.cat([attended[:, :7], recurred.flatten(2)[:, 7:]], dim=1)
    output = layer(x, gaps)
    assert torch.allclose(output.y, layer.w_out(layer.norm(slow)), atol=1e-5)
    assert output.trace.attended.sum(dim=1).tolist() == [7, 7, 7]


def test_jamba_attends_in_one_of_eight_layers():
    assert [type(config) for config in jamba()].count(TransformerConfig) == 1
    assert len(jamba()) == 8


@pytest.mark.parametrize("name", CONFIGS)
def test_steps_over_padding_equal_the_tokens_alone(name):
    """Three sequences with padding on the left, inside and on the right, cut into calls of uneven length."""
    layer = make(name).eval()
    x, gaps = example(24)
    valid = torch.ones(3, 24, dtype=torch.bool)
    valid[0, :5], valid[1, 6:11], valid[2, 17:] = False, False, False
    rubbish = torch.where(valid[..., None], x, torch.nan)
    state, parts = None, []
    for tokens in (slice(0, 1), slice(1, 9), slice(9, 10), slice(10, 24)):
        output = layer(rubbish[:, tokens], gaps[:, tokens], state, valid=valid[:, tokens])
        state = output.state
        parts.append(output.y)
        assert not (output.trace.scored & ~valid[:, tokens]).any()
    y = torch.cat(parts, dim=1)
    assert (y[~valid] == 0).all()
    for b in range(3):
        alone = layer(x[b : b + 1, valid[b]], gaps[b : b + 1, valid[b]]).y[0]
        assert torch.allclose(y[b, valid[b]], alone, atol=1e-5)


def test_packing_is_undone():
    x, valid = torch.randn(2, 9, D), torch.rand(2, 9) < 0.6
    packed = pack(x, valid)
    assert torch.equal(packed.unpack(packed.x), torch.where(valid[..., None], x, 0.0))
    assert torch.equal(packed.lengths, valid.sum(dim=1))


@pytest.mark.parametrize("n_tokens", [64, 128])
@pytest.mark.parametrize("name", CONFIGS)
def test_cost_matches_counted_flops(name, n_tokens):
    """The plain kernel of attention scores the whole square; the costs say what the fused one does."""
    layer, (x, gaps) = make(name).eval(), example(n_tokens, n_batch=1)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        output = layer(x, gaps)
    cost = layer.cost(n_tokens, read_frac=float(output.trace.attended.float().mean()))
    square = 2 * n_tokens / (n_tokens + 1) if name == "transformer" else 1
    assert counter.get_total_flops() == pytest.approx(cost.projection_flops + square * cost.read_flops, rel=0.03)


@pytest.mark.parametrize(
    ("config", "changes", "field"),
    [
        (SlidingWindowConfig, {"window": 0}, "window = 0"),
        (RecurrenceConfig, {"d_state": 0}, "d_state = 0"),
        (SeqBoatConfig, {"n_heads": 0}, "n_heads = 0"),
        (TransMambaConfig, {"switch_at": 0}, "switch_at = 0"),
        (MixtureOfDepthsConfig, {"capacity": 0.0}, "capacity = 0.0"),
        (MemorizerConfig, {"d_hidden": 0}, "d_hidden = 0"),
    ],
)
def test_bad_sizes_are_refused_by_name(config, changes, field):
    with pytest.raises(ValueError, match=field):
        config(**changes)
    for name in ("sliding-window", "seqboat", "transmamba", "mixture-of-depths"):
        with pytest.raises(ValueError, match="n_heads = 3"):
            dataclasses.replace(CONFIGS[name], n_heads=3).build(D)
    with pytest.raises(ValueError, match="d_head = 5"):
        RecurrenceConfig(d_head=5).build(D)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_call_without_tokens_or_sequences_changes_nothing(name):
    layer = make(name).eval()
    x, gaps = example(6)
    with torch.no_grad():
        held = layer(x[:, :4], gaps[:, :4]).state
        empty = layer(x[:, :0], gaps[:, :0], held)
        assert empty.y.shape == (3, 0, D)
        torch.testing.assert_close(layer(x[:, 4:], gaps[:, 4:], empty.state).y, layer(x[:, 4:], gaps[:, 4:], held).y)
        assert layer(x[:0], gaps[:0]).y.shape == (0, 6, D)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_state_of_others_is_refused(name):
    layer = make(name).eval()
    x, gaps = example(6)
    with pytest.raises(ValueError, match="state is a dict; give the"):
        layer(x, gaps, {})
    if name != "memorizer":  # which keeps nothing
        with pytest.raises(ValueError, match="state holds 2 sequences and x 3"):
            layer(x, gaps, layer(x[:2], gaps[:2]).state)
