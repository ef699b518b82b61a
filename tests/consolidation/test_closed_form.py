"""The stages sum what they say they sum, and leave the model alone."""

import pytest
import torch
from families import build, documents

import cramlab
import reproduction.decoders as decoders
from cramlab.auditing.resume import Stages
from cramlab.consolidation.config import ConsolidationConfig
from cramlab.consolidation.learn.closed_form import Learner
from cramlab.consolidation.measure import mean_loss, measured, token_losses
from cramlab.consolidation.patch.install import consolidatable_sites, patched
from cramlab.consolidation.patch.observe import added_by_far
from cramlab.consolidation.rules.baselines import static_window
from cramlab.consolidation.rules.learned import ConsolidatedAttention, at_threshold
from cramlab.consolidation.setting import Setting
from cramlab.hf.attention_sites import base_model

WINDOW, N_SINKS, N_TOKENS = 6, 2, 40
CONFIG = ConsolidationConfig(context=N_TOKENS, window=WINDOW, n_sinks=N_SINKS, layers_per_document=2,
                             tokens_per_document=20, max_rank=8, fit_documents=30, gate_documents=20,
                             validation_documents=10, sensitivity_documents=6)  # fmt: skip


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(params=["llama", "gpt2"])
def learner(request):
    return learner_of(build(request.param))


def learner_of(model):
    parts = {
        name: documents(getattr(CONFIG, f"{name}_documents"), N_TOKENS, seed=i)
        for i, name in enumerate(("fit", "gate", "validation", "sensitivity"))
    }
    return Learner(Setting(model, consolidatable_sites(model), CONFIG, parts, Stages(None, "", None)))


def test_token_losses_are_cross_entropy():
    model, tokens = build("llama"), documents(1, N_TOKENS)[0]
    logits = model(tokens[None]).logits[0, :-1].log_softmax(-1)
    torch.testing.assert_close(token_losses(model, tokens), -logits[torch.arange(N_TOKENS - 1), tokens[1:]])


def test_watching_leaves_the_model_bit_equal(learner):
    tokens = learner.setting.parts["fit"][0][None]
    plain = base_model(learner.setting.model)(tokens).last_hidden_state
    assert torch.equal(learner.setting.observe(tokens, lambda i, seen: None), plain)


def test_a_mixed_model_is_learned_in_the_layers_that_attend():
    """AFMoE sees everything in one layer of four, with a gate behind attention: its adapter predicts the gated read."""
    model = decoders.build("afmoe")
    learned = learner_of(model).learn()
    assert list(learned.layers) == [3]
    assert 0 < learned.explained[0] < 1
    tokens = documents(1, N_TOKENS)[0][None]
    plain = base_model(model)(tokens, use_cache=False).last_hidden_state
    with patched(model, at_threshold(learned.layers, float("inf"))):
        counts = cramlab.skip_counts(model)
        assert (list(counts.layers), counts.n_layers) == (["model.layers.3.self_attn"], 4)
        assert "on 1 attention modules in 4 layers; shares are over these modules" in str(counts)
        adapted = base_model(model)(tokens, use_cache=False).last_hidden_state
    with patched(model, static_window(consolidatable_sites(model), WINDOW, N_SINKS)):
        without = base_model(model)(tokens, use_cache=False).last_hidden_state
    assert (adapted - plain).square().mean() < (without - plain).square().mean()


def test_what_is_to_be_predicted_is_full_answer_minus_windows(learner):
    """The answers of the original and of a model that reads nothing, in the first layer, whose inputs are equal."""
    tokens, site = learner.setting.parts["fit"][0], learner.sites[0]
    answers = []
    handle = site.out_proj.register_forward_hook(lambda _, __, output: answers.append(output))
    learner.setting.model(tokens[None])
    with patched(learner.setting.model, {0: static_window(learner.sites, WINDOW, N_SINKS)[0]}):
        learner.setting.model(tokens[None])
    handle.remove()
    added = []

    def look(i, seen):
        if i == 0:
            added.append(added_by_far(site, seen))

    learner.setting.observe(tokens[None], look)
    torch.testing.assert_close(added[0], answers[0] - answers[1], rtol=1e-3, atol=1e-4)


def test_sensitivity_is_the_exact_difference_of_two_passes(learner):
    sums = learner._sensitivity()
    n = sums.scalars["documents"]
    assert n.tolist() == [4, 4, 4]  # six documents, two layers each, every layer as often
    slow = torch.zeros(3, dtype=torch.float64)
    order = torch.randperm(3, generator=torch.Generator().manual_seed(CONFIG.seed)).tolist()
    for document, tokens in enumerate(learner.setting.parts["sensitivity"]):
        for j in (2 * document, 2 * document + 1):
            i = order[j % 3]
            window = {i: static_window(learner.sites, WINDOW, N_SINKS)[i]}
            slow[i] += measured(learner.setting.model, tokens, window).loss - mean_loss(learner.setting.model, tokens)
    torch.testing.assert_close(sums.scalars["increase"], slow, rtol=1e-3, atol=1e-6)
    # A benefit is a difference of losses, which the last token has none of.
    assert 0 <= 6 * 2 * CONFIG.tokens_per_document - sum(float(m.n) for m in sums.moments) <= 12


def test_adapters_help_and_gates_rank_errors(learner):
    """On the documents that they were fitted on, the adapters leave less error, and the gate knows where more is."""
    learned = learner.learn()
    tokens, site = learner.setting.parts["gate"][0], learner.sites[1]
    layer = learned.layers[1]
    pairs = []

    def look(i, seen):
        if i == 1:
            added = added_by_far(site, seen)[seen.far]
            x = seen.features[seen.far]
            pairs.append(
                (
                    added.square().sum(-1),
                    (added - layer.adapt(x)).square().sum(-1),
                    layer.scores(x, seen.n_keys[seen.far]),
                )
            )

    for tokens in learner.setting.parts["gate"]:
        learner.setting.observe(tokens[None], look)
    before, after, scores = (torch.cat(part) for part in zip(*pairs, strict=True))
    assert after.mean() < before.mean()
    ranks = [x.argsort().argsort().double() for x in (after, scores)]
    assert torch.corrcoef(torch.stack(ranks))[0, 1] > 0.3
    # The score is the log of nats: without the log of the sensitivity, the mean log error.
    offset = float(scores.mean() - after.log().mean())
    assert offset == pytest.approx(torch.tensor(learned.sensitivity[1]).log().item(), abs=0.2)


def test_thresholds_order_reads(learner):
    learned = learner.learn()
    tokens = learner.setting.parts["validation"][0]
    shares = []
    for threshold in (-100.0, -5.0, -2.0, float("inf")):
        shares.append(measured(learner.setting.model, tokens, at_threshold(learned.layers, threshold)).skipped_frac)
    assert shares == sorted(shares)
    assert shares[0] == 0
    assert shares[-1] == 1
    assert isinstance(learned.layers[0], ConsolidatedAttention)
