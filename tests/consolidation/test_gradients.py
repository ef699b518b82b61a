"""Gradient steps: hard reads are those of the gathered execution, prices hold the shares, the backbone stays."""

import copy
import math

import pytest
import torch
from families import build, documents
from torch.nn import functional as F

from cramlab.auditing.resume import Stages
from cramlab.consolidation.config import ConsolidationConfig
from cramlab.consolidation.learn.closed_form import Learned
from cramlab.consolidation.learn.gradients import Distiller, distilled, with_units
from cramlab.consolidation.learn.planting import LONGEST, SHORTEST, planted
from cramlab.consolidation.learn.rehearsal import end_loss, rehearse
from cramlab.consolidation.learn.steps import batches
from cramlab.consolidation.patch.install import patched
from cramlab.consolidation.rules.learned import ConsolidatedAttention, at_threshold, rounded
from cramlab.consolidation.setting import Setting
from cramlab.errors import ConsolidationError
from cramlab.hf.attention_sites import attention_sites

WINDOW, N_SINKS, N_TOKENS, UNITS = 6, 2, 40, 4
CONFIG = ConsolidationConfig(context=N_TOKENS, window=WINDOW, n_sinks=N_SINKS, units=UNITS, learning_fracs=(0.5, 0.75),
                        learning_rate=3e-3)  # fmt: skip


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(params=["llama", "gpt2"])
def setting(request):
    """Model, sites, random layers with units, a batch."""
    model = build(request.param)
    sites = attention_sites(model)
    generator = torch.Generator().manual_seed(0)
    layers = {}
    for site in sites:
        layer = ConsolidatedAttention.beside(site, rank=2, units=UNITS, window=WINDOW, n_sinks=N_SINKS)
        for tensor in layer.state_dict().values():
            tensor.copy_(0.1 * torch.randn(tensor.shape, generator=generator))
        layer.scale.add_(1)
        layers[site.layer] = layer.requires_grad_(False)
    return model, sites, layers, torch.stack(documents(4, N_TOKENS))


def random_layers(sites):
    """Layers without units."""
    layers = {site.layer: ConsolidatedAttention.beside(site, rank=2, window=WINDOW, n_sinks=N_SINKS) for site in sites}
    for layer in layers.values():
        for tensor in layer.state_dict().values():
            tensor.copy_(torch.randn(tensor.shape))
    return layers


def distiller_of(setting, n_steps=10, config=CONFIG, **options):
    model, sites, layers, _ = setting
    return Distiller(with_parts(model, sites, {}, config), layers, [1.0] * len(sites), n_steps, **options)


def with_parts(model, sites, parts, config=CONFIG):
    return Setting(model, sites, config, parts, Stages(None, "", None))


def lost(distiller, tokens, thresholds):
    """Loss and decisions without chance."""
    hidden, decisions = rehearse(distiller.setting, distiller.layers, tokens, thresholds)
    return end_loss(distiller.setting, hidden, tokens), decisions


def executed(model, layers, tokens, threshold, loss):
    """The loss as it will be at inference, readers gathered and nothing computed for the others; and the counts."""
    layers = at_threshold(layers, threshold)
    wanted = model(tokens).logits.log_softmax(-1)
    with patched(model, layers):
        logits = model(tokens).logits
    counts = [layer.counts for layer in layers.values()]
    if loss == "nats":
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()), counts
    return F.kl_div(logits.log_softmax(-1), wanted, reduction="sum", log_target=True) / tokens.numel(), counts


@pytest.mark.parametrize("loss", ["kl", "nats"])
def test_hard_reads_are_those_of_the_gathered_execution_in_loss_and_gradients(setting, loss):
    model, _, layers, tokens = setting
    config = ConsolidationConfig(**(vars(CONFIG) | {"end_loss": loss}))
    distiller = distiller_of(setting, config=config)
    threshold = float(distiller._first_thresholds(tokens)[0])
    given = [
        p for layer in layers.values() for n, p in layer.named_parameters() if not n.startswith(("gate", "offsets"))
    ]
    for parameter in given:
        parameter.requires_grad_()
    with torch.enable_grad():
        ours, decisions = lost(distiller, tokens, torch.full((len(tokens),), threshold))
        theirs, counts = executed(model, layers, tokens, threshold, loss)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        grads = [torch.autograd.grad(x, given) for x in (ours, theirs)]
    for mine, other in zip(*grads, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-2, atol=1e-3 * float(other.abs().max()))
    n_reads = [int((d.reads.bool() & d.far).sum()) for d in decisions]
    assert n_reads == [one.far_reads for one in counts]
    assert 0 < sum(n_reads) < len(layers) * len(tokens) * (N_TOKENS - WINDOW - N_SINKS)


def test_who_reads_all_says_what_the_original_says(setting):
    model, _, _, tokens = setting
    distiller = distiller_of(setting)
    loss, _ = lost(distiller, tokens, torch.full((4,), -1e9))
    assert float(loss) == pytest.approx(0, abs=1e-5)
    assert float(lost(distiller, tokens, torch.full((4,), 1e9))[0]) > 1e-3
    assert not any(p.requires_grad for layer in distiller.layers.values() for p in layer.parameters())
    assert model.config._attn_implementation == "sdpa"


def test_a_price_takes_the_gradient_off_a_common_shift_of_all_scores(setting):
    """What holds a share is the threshold; the price is the mean benefit there, so that scores need not drift."""
    tokens = setting[3][:1]
    distiller = distiller_of(setting, config=ConsolidationConfig(**(vars(CONFIG) | {"learning_fracs": (0.5,)})))
    biases = [layer.gate.bias for layer in setting[2].values()]
    seen = []
    distiller.optimizer.step = lambda: seen.append([b.grad.clone() for b in biases])
    distiller.end_step(0, tokens)
    shifts = torch.stack(seen[0])
    assert shifts.abs().max() > 1e-7
    assert abs(float(shifts.sum())) < 1e-4 * float(shifts.abs().max())
    assert torch.isfinite(distiller.history[0]).all()


def test_the_end_loss_falls_and_the_backbone_stays(setting):
    model, _, layers, tokens = setting
    before = copy.deepcopy(model.state_dict())
    plain = model(tokens).logits
    asked = [p.requires_grad for p in model.parameters()]
    distiller = distiller_of(setting, n_steps=40)
    first = distiller._first_thresholds(tokens)
    losses = [lost(distiller, tokens, first[[0, 1, 0, 1]])[0]]
    for step in range(40):
        distiller.end_step(step, tokens)
    losses.append(lost(distiller, tokens, distiller.thresholds[[0, 1, 0, 1]])[0])
    assert losses[1] < 0.8 * losses[0]
    assert torch.equal(model(tokens).logits, plain)
    assert [p.requires_grad for p in model.parameters()] == asked
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    # Thresholds hold the shares that they stand for.
    for threshold, frac in zip(distiller.thresholds.tolist(), CONFIG.learning_fracs, strict=True):
        _, counts = executed(model, layers, tokens, threshold, "kl")
        share = sum(one.far_reads for one in counts) / sum(one.far_tokens for one in counts)
        assert share == pytest.approx(1 - frac, abs=0.12)


def test_local_steps_leave_less_error(setting):
    tokens = setting[3]
    distiller = distiller_of(setting, n_steps=30)
    for step in range(30):
        distiller.local_step(step, tokens)
    losses = distiller.history[:, 0]
    assert losses[-5:].mean() < 0.9 * losses[:5].mean()


def test_new_units_say_nothing(setting):
    sites = setting[1]
    plain = random_layers(sites)
    grown = with_units(sites, plain, 5, seed=0, n_offsets=7)
    for i, layer in grown.items():
        features = torch.randn(3, len(layer.shift))
        torch.testing.assert_close(layer.adapt(features), plain[i].adapt(features))
        n_keys = torch.tensor([7, 20, 40])
        torch.testing.assert_close(layer.scores(features, n_keys), plain[i].scores(features, n_keys))
        assert layer.down.weight[2:].abs().min() > 0


def learned_of(setting):
    _, sites, layers, _ = setting
    n = len(sites)
    return Learned(layers=layers, benefit_gates=[], ranks=[2] * n, strengths=[], sensitivity=[1.0] * n, explained=[])


def test_a_router_alone_learns_gates_and_answers_with_the_window(setting):
    model, sites, layers, tokens = setting
    parts = {"learning": list(tokens), "further": []}
    found = distilled(with_parts(model, sites, parts), learned_of(setting), "router-only", 5)
    for i, layer in found.layers.items():
        features = torch.randn(3, len(layer.shift))
        assert layer.adapt(features).abs().max() == 0
        old = layers[i].gate.weight[:, : len(layer.shift)]
        assert not torch.equal(layer.gate.weight[:, : len(layer.shift)], old)
    with pytest.raises(ConsolidationError, match="0 documents are left to learn from"):
        distilled(with_parts(model, sites, {"learning": []}), learned_of(setting), "end", 5)


def test_every_source_meets_every_share():
    mine, other = ([torch.full((3,), i + base) for i in range(4)] for base in (0, 100))
    for size in (1, 8):
        met = set()
        config = ConsolidationConfig(batch_contexts=size)
        for step, batch in enumerate(batches({"learning": mine, "further": other}, config, 16 // size, seed=0)):
            for i, tokens in enumerate(batch):
                met.add((bool(tokens[0] >= 100), (step * size + i) // 2 % len(config.learning_fracs)))
        assert len(met) == 2 * len(config.learning_fracs)


def test_rounded_weights_are_those_that_the_folder_keeps(setting):
    rounded(setting[2])
    for layer in setting[2].values():
        assert all(torch.equal(p.half().float(), p) for p in layer.parameters())


def test_offsets_learn_and_are_linear_between_powers_of_two(setting):
    model, sites, _, tokens = setting
    config = ConsolidationConfig(**(vars(CONFIG) | {"learning_lengths": (20,), "batch_contexts": 2}))
    grown = with_units(sites, random_layers(sites), UNITS, seed=0, n_offsets=config.n_offsets)
    distiller = distiller_of((model, sites, grown, tokens), config=config)
    for step in range(3):
        distiller.end_step(step, tokens)
    for layer in grown.values():
        assert len(layer.offsets) == 7  # for 1, 2, 4, ... 64 keys; a token with far keys sees 9 to 40
        assert layer.offsets[3:].abs().min() > 0
        assert layer.offsets[:3].abs().max() == 0
        at_powers = layer.offset(torch.tensor([1, 2, 4, 8, 16, 32, 64, 128]))
        torch.testing.assert_close(at_powers, layer.offsets[[0, 1, 2, 3, 4, 5, 6, 6]])
        share = math.log2(24 / 16)
        between = (1 - share) * layer.offsets[4] + share * layer.offsets[5]
        torch.testing.assert_close(layer.offset(torch.tensor(24)), between)


def test_steps_draw_lengths_and_each_length_meets_both_sources_and_every_share():
    config = ConsolidationConfig(**(vars(CONFIG) | {"learning_lengths": (80, 20), "batch_contexts": 4}))
    mine, other = ([torch.arange(n) + base for n in (100, 40, 25)] for base in (0, 1000))
    met = set()
    for step, batch in enumerate(batches({"learning": mine, "further": other}, config, 60, seed=0)):
        assert batch.numel() == 160
        assert batch.shape[1] in (20, 40, 80)
        assert bool((batch.diff(dim=1) == 1).all())  # runs of one context
        for i, tokens in enumerate(batch):
            share = (step * len(batch) + i) // 2 % len(config.learning_fracs)
            met.add((batch.shape[1], bool(tokens[0] >= 1000), share))
    assert len(met) == 3 * 2 * 2
    again = list(batches({"learning": mine, "further": other}, config, 60, seed=0))
    assert torch.equal(again[-1], batch)


def test_a_planted_repeat_stands_in_both_halves_and_the_rest_stays():
    tokens = torch.arange(16 * 1000).view(16, 1000)
    foreign = 0
    for row, plain in zip(planted(tokens, 1.0, 68, torch.Generator().manual_seed(0)), tokens, strict=True):
        changed = (row != plain).nonzero().squeeze(1)
        early, late = changed[changed < 500], changed[changed >= 500]
        assert SHORTEST <= len(late) == int(late[-1] - late[0]) + 1 <= LONGEST
        begin = int((row[:500] == row[late[0]]).nonzero()[0])
        assert torch.equal(row[begin : begin + len(late)], row[late])
        assert late[0] - begin > 68
        assert len(early) in (0, len(late))
        foreign += bool(len(early))
    assert 0 < foreign < 16
    assert torch.equal(planted(tokens, 0.0, 68, torch.Generator()), tokens)
    assert torch.equal(planted(tokens[:, :128], 1.0, 68, torch.Generator()), tokens[:, :128])  # too short
