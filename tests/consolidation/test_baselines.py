"""Baselines mean what their names say, at their limits and against direct computation."""

import pytest
import torch
from families import build, documents
from transformers import DynamicCache

from cramlab.auditing.regression import Moments
from cramlab.consolidation.compare import sublayers
from cramlab.consolidation.measure import mean_loss, measured
from cramlab.consolidation.patch.far_reads import FarReads
from cramlab.consolidation.patch.install import patched
from cramlab.consolidation.patch.observe import added_by_far, observe
from cramlab.consolidation.rules import baselines
from cramlab.consolidation.rules.learned import ConsolidatedAttention, at_threshold
from cramlab.hf.attention_sites import affine_map, attention_sites

WINDOW, N_SINKS, N_TOKENS = 6, 2, 40


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def setting():
    model = build("llama")
    sites = attention_sites(model)
    layers = {}
    for site in sites:
        layers[site.layer] = ConsolidatedAttention.beside(site, rank=2, window=WINDOW, n_sinks=N_SINKS)
        for parameter in layers[site.layer].parameters():
            parameter.data = 0.1 * torch.randn(parameter.shape)
    return model, sites, layers, documents(1, N_TOKENS)[0]


def test_reading_all_costs_nothing_and_reading_none_is_the_window(setting):
    model, sites, layers, tokens = setting
    base = mean_loss(model, tokens)
    everyone = measured(model, tokens, baselines.some_layers(layers, without=[]))
    assert everyone.loss == pytest.approx(base, abs=1e-5)
    assert everyone.skipped_frac == 0
    window = measured(model, tokens, baselines.static_window(sites, WINDOW, N_SINKS))
    assert window.skipped_frac == 1
    assert abs(window.loss - base) > 1e-3
    half = measured(model, tokens, baselines.some_layers(layers, without=[0]))
    assert half.skipped_frac == pytest.approx(1 / 3)


def test_chance_skips_its_share(setting):
    model, _, layers, tokens = setting
    shares = [measured(model, tokens, baselines.by_chance(layers, 0.7, seed)).skipped_frac for seed in range(5)]
    assert sum(shares) / 5 == pytest.approx(0.7, abs=0.1)
    assert len(set(shares)) > 1


def test_the_oracle_at_its_limits_and_between(setting):
    model, sites, layers, tokens = setting

    def at(threshold):
        return measured(model, tokens, baselines.oracle(sites, layers, [1.0, 2.0, 3.0], threshold))

    assert at(-torch.inf).loss == pytest.approx(mean_loss(model, tokens), abs=1e-6)
    never = measured(model, tokens, at_threshold(layers, torch.inf))
    assert at(torch.inf).loss == pytest.approx(never.loss, abs=1e-5)
    assert at(torch.inf).skipped_frac == 1
    middle = baselines.oracle_threshold(model, sites, layers, [1.0, 2.0, 3.0], [tokens], 0.5)
    assert 0.3 < at(middle).skipped_frac < 0.7


def test_chance_is_that_of_a_place_however_the_tokens_come(setting):
    model, _, layers, tokens = setting
    with patched(model, baselines.by_chance(layers, 0.5, 0)):
        whole = model(tokens[None]).logits
        cache = DynamicCache(config=model.config)
        parts = [model(part, past_key_values=cache).logits for part in tokens[None].split([20, 18, 1, 1], dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("frac", [0.0, 4 / 9, 1.0])
def test_static_heads_are_those_chosen_afterwards_in_one_pass_and_with_a_cache(family, frac):
    """Against both reads computed for every head, and one of them taken."""
    model, tokens = build(family), torch.stack(documents(2, N_TOKENS))
    sites, importance = attention_sites(model), torch.rand(3, 3)
    windowed = torch.zeros(9, dtype=torch.bool)
    windowed[importance.flatten().argsort()[: round(9 * frac)]] = True
    windowed = windowed.view(3, 3)

    class Chosen(FarReads):
        def decide(self, seen):
            weight = (~windowed[self.index]).double().expand(*seen.far.shape, -1)
            return None if frac == 0 else (weight.to(seen.hidden.dtype), None)

    twins = {}
    for i, site in enumerate(sites):
        twins[site.layer] = Chosen(window=WINDOW, n_sinks=N_SINKS)
        twins[site.layer].index = i
    with patched(model, twins):
        wanted = model(tokens).logits
    with patched(model, baselines.static_heads(sites, importance, frac, WINDOW, N_SINKS)):
        torch.testing.assert_close(model(tokens).logits, wanted, rtol=1e-3, atol=1e-4)
        cache = DynamicCache(config=model.config)
        parts = [model(part, past_key_values=cache).logits for part in tokens.split([20, 18, 1, 1], dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), wanted, rtol=1e-3, atol=1e-4)


def test_static_heads_at_their_limits(setting):
    model, sites, _, tokens = setting
    importance = torch.rand(3, 3)
    none, third, every = (
        measured(model, tokens, baselines.static_heads(sites, importance, frac, WINDOW, N_SINKS))
        for frac in (0.0, 1 / 3, 1.0)
    )
    assert none.loss == pytest.approx(mean_loss(model, tokens), abs=1e-6)
    window = measured(model, tokens, baselines.static_window(sites, WINDOW, N_SINKS))
    assert every.loss == pytest.approx(window.loss, abs=1e-5)
    assert third.skipped_frac == pytest.approx(1 / 3)


def test_a_dropped_layer_says_nothing(setting):
    model, sites, _, tokens = setting
    got = sublayers.measured_without(model, tokens, sites, [1])
    assert got.skipped_frac == pytest.approx(1 / 3)
    assert got.pairs_frac == pytest.approx(2 / 3)
    sites[1].out_proj.weight.zero_()
    assert got.loss == pytest.approx(mean_loss(model, tokens), abs=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_linear_map_in_place_of_a_layer_is_executed_and_taken_out_again(family):
    model, tokens = build(family), documents(1, N_TOKENS)[0]
    sites = attention_sites(model)
    plain = model(tokens[None]).logits
    linear = torch.nn.Linear(sites[1].d_model, sites[1].d_model)
    answers = []
    handle = sites[1].attention.register_forward_hook(lambda *_: answers.append("attention"))
    with sublayers.replaced(model, sites, {1: sublayers.Instead(linear)}):
        other = model(tokens[None]).logits
    assert not answers
    handle.remove()
    assert not torch.equal(other, plain)
    assert torch.equal(model(tokens[None]).logits, plain)
    linear.weight.data.zero_()
    linear.bias.data.zero_()
    silent = sublayers.measured_without(model, tokens, sites, [1])
    assert sublayers.measured_without(model, tokens, sites, [1], [None, linear, None]).loss == silent.loss


def sums_of(model, sites, documents):
    """Sums as the learner makes them, and the rows themselves."""
    sums = [Moments(ConsolidatedAttention.n_features(s.d_model, s.d_heads, s.n_heads), s.d_model) for s in sites]
    rows = [[] for _ in sites]

    def look(i, seen):
        added = added_by_far(sites[i], seen)[seen.far]
        sums[i].update(seen.features[seen.far], added)
        weight, bias = affine_map(sites[i])
        answer = seen.full[seen.far].flatten(1).double() @ weight + bias
        rows[i].append((seen.features[seen.far][:, : sites[i].d_model], answer))

    for tokens in documents:
        observe(model, sites, tokens[None], look, window=WINDOW, n_sinks=N_SINKS)
    return sums, [tuple(torch.cat(part) for part in zip(*found, strict=True)) for found in rows]


def test_linear_maps_are_regressions_on_the_whole_answer(setting):
    model, sites, _, _ = setting
    sums, rows = sums_of(model, sites, documents(12, N_TOKENS))
    probes = sublayers.linear_maps(sites, sums, sums, [1e-6])
    for probe, (hidden, answer) in zip(probes, rows, strict=True):
        x = torch.cat([hidden.double(), torch.ones(len(hidden), 1, dtype=torch.float64)], dim=1)
        slow = x @ torch.linalg.lstsq(x, answer).solution
        torch.testing.assert_close(probe(hidden).double(), slow, rtol=1e-2, atol=1e-3)


def test_importances_are_those_computed_token_by_token(setting):
    model, sites, _, tokens = setting
    found = sublayers.cosine_importance(model, sites, [tokens])
    states = []
    handle = sites[0].norm.register_forward_hook(lambda _, args, __: states.append(args[0]))
    handle_2 = sites[0].attention.register_forward_hook(lambda _, __, output: states.append(output[0]))
    model(tokens[None])
    handle.remove()
    handle_2.remove()
    before, after = states[0][0], states[0][0] + states[1][0]
    slow = 1 - torch.nn.functional.cosine_similarity(before, after, dim=-1).mean()
    assert float(found[0]) == pytest.approx(float(slow), rel=1e-4)
    heads = baselines.head_importance(model, sites, [1.0, 1.0, 2.0], [tokens], WINDOW, N_SINKS)
    twice = baselines.head_importance(model, sites, [2.0, 1.0, 2.0], [tokens], WINDOW, N_SINKS)
    assert heads.shape == (3, 3)
    torch.testing.assert_close(twice[0], 2 * heads[0])
    torch.testing.assert_close(twice[1:], heads[1:])
