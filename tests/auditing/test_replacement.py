import pytest
import torch
from families import BUILD, CAUSAL, build, documents

from cramlab.auditing.config import AuditConfig
from cramlab.auditing.probes import SiteFit, SiteProbe, TableProbe
from cramlab.auditing.regression import LinearProbe, Moments, ReducedRank, RidgePath
from cramlab.auditing.replacement import (
    KINDS,
    MaskedToken,
    NextToken,
    Remembered,
    Replacement,
    answerers,
    losses,
    plan,
    replacing,
)
from cramlab.hf.attention_sites import attention_sites
from cramlab.hf.loading import reading_all

TOKENS = torch.stack(documents(3, 12))


def fits(sites, validation=(0.1, 0.9, 0.5)):
    """Random probes: nothing here depends on what they answer."""
    found = []
    for i in range(len(sites)):
        generator = torch.Generator().manual_seed(i)
        probe = LinearProbe(torch.randn(24, 24, generator=generator), torch.randn(24, generator=generator))
        moments = Moments(24, 24)
        moments.update(torch.randn(50, 24, generator=generator), torch.randn(50, 24, generator=generator))
        found.append(
            SiteFit(
                probes={
                    "hidden": SiteProbe(sees="hidden", heads=probe, layer=probe),
                    "mean": SiteProbe(sees="nothing", heads=TableProbe(torch.zeros(1, 24)),
                                      layer=TableProbe(torch.full((1, 24), 0.5))),
                },
                reduced=ReducedRank(RidgePath(moments), 1.0), strengths={}, validation_r2=validation[i],
            )
        )  # fmt: skip
    return found


def logits(model, tokens=TOKENS):
    with torch.no_grad(), reading_all(model):
        return model(tokens).logits


@pytest.mark.parametrize("name", BUILD)
def test_an_answer_replaced_by_itself_changes_nothing(name):
    model = build(name)
    before = logits(model)
    with replacing(attention_sites(model), {i: lambda _, answer: answer for i in range(3)}):
        assert torch.equal(logits(model), before)
    with replacing(attention_sites(model), {1: lambda _, answer: answer + 1}):
        assert not torch.allclose(logits(model), before)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("name", BUILD)
def test_what_is_remembered_is_what_would_have_been_computed(name):
    model = build(name)
    sites = attention_sites(model)
    memory = Remembered(sites)
    with memory.remembering():
        before = logits(model)
    calls = []
    handle = sites[0].out_proj.register_forward_hook(lambda *_: calls.append(0))
    with memory.up_to(2):
        assert torch.equal(logits(model), before)
        assert not calls  # layer 0 was not run
        with replacing(sites, {2: lambda _, answer: 0 * answer}):
            short = logits(model)
    handle.remove()
    with replacing(sites, {2: lambda _, answer: 0 * answer}):
        assert torch.equal(logits(model), short)
    assert all("forward" not in vars(site.block) for site in sites)


def test_blocks_get_their_forward_back_after_an_error():
    model = build("gpt2")
    sites = attention_sites(model)
    original = sites[0].block.forward
    sites[0].block.forward = original  # as accelerate does
    memory = Remembered(sites)
    with memory.remembering():
        before = logits(model)
    with pytest.raises(RuntimeError), memory.up_to(3):
        raise RuntimeError
    assert vars(sites[0].block)["forward"] is original
    assert "forward" not in vars(sites[1].block)
    assert torch.equal(logits(model), before)


def test_zero_is_the_model_without_the_layer():
    model = build("gpt2")
    sites = attention_sites(model)
    dropped = Replacement(kind="zero", sites=(1,))
    with replacing(sites, answerers(dropped, fits(sites), 0)):
        replaced = logits(model)
    with torch.no_grad():
        sites[1].out_proj.weight.zero_()
        sites[1].out_proj.bias.zero_()
    torch.testing.assert_close(replaced, logits(model))


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_answers_as_it_should(kind):
    site_fit = fits(attention_sites(build("gpt2")))[0]
    hidden, truth = torch.randn(2, 8, 24), torch.randn(2, 8, 24)
    (answer,) = answerers(Replacement(kind=kind, sites=(0,)), [site_fit], 0).values()
    expected = {
        "probe": site_fit.probes["hidden"].layer(hidden), "mean": torch.full_like(truth, 0.5),
        "zero": torch.zeros_like(truth),
    }  # fmt: skip
    torch.testing.assert_close(answer(hidden, truth), expected[kind])


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_shares_of_tokens_are_exact_and_the_best_are_the_best(share):
    site_fit = fits(attention_sites(build("gpt2")))[0]
    hidden = torch.randn(3, 8, 24)
    predicted = site_fit.probes["hidden"].layer(hidden)
    scale = torch.rand(3, 8)  # R of each token: the truth is the prediction, off by this much
    truth = predicted * (1 + scale[..., None])

    def replaced(choice, seed=0):
        replacement = Replacement(kind="zero", sites=(0,), share=share, choice=choice)
        (answer,) = answerers(replacement, [site_fit], seed).values()
        return (answer(hidden, truth) == 0).all(dim=-1)

    best = replaced("best")
    assert best.sum(dim=1).tolist() == [round(8 * share)] * 3
    for row, s in zip(best, scale, strict=True):
        assert s[row].max() < s[~row].min()
    assert replaced("random").sum(dim=1).tolist() == [round(8 * share)] * 3
    assert torch.equal(replaced("random"), replaced("random"))
    assert not torch.equal(replaced("random"), replaced("random", seed=1))


def test_the_plan_orders_layers_by_validation():
    found = plan(fits([None] * 3), AuditConfig(replaced_fracs=(0.5,)))
    assert [r.sites for r in found["alone"][::3]] == [(0,), (1,), (2,)]
    assert [r.sites for r in found["cumulative"][::3]] == [(1, 2), (1, 2, 0)]
    assert [(r.share, r.choice) for r in found["partial"][::3]] == [(0.5, "random"), (0.5, "best")]
    assert [r.kind for r in found["partial"]] == [*KINDS] * 2


@pytest.mark.parametrize("name", CAUSAL)
def test_losses_are_those_of_the_model(name):
    model = build(name)
    sites = attention_sites(model)
    replacements = [Replacement(kind="probe", sites=(2,)), Replacement(kind="zero", sites=(0, 1))]
    with torch.no_grad(), reading_all(model):
        found = losses(model, NextToken(), sites, fits(sites), replacements, TOKENS, seed=0)
        own = [float(model(row[None], labels=row[None]).loss) for row in TOKENS]
        with replacing(sites, answerers(replacements[1], fits(sites), 0)):
            dropped = [float(model(row[None], labels=row[None]).loss) for row in TOKENS]
    assert (found[:, 0] / 11).tolist() == pytest.approx(own, rel=1e-4)
    assert (found[:, 2] / 11).tolist() == pytest.approx(dropped, rel=1e-4)


def test_the_masked_loss_hides_what_it_asks_for():
    model, loss = build("bert"), MaskedToken(mask_token=0)
    assert loss.n_tokens(TOKENS, 0).tolist() == [2.0] * 3  # 15% of 12
    hidden = loss._hidden(TOKENS, 0)
    with torch.no_grad():
        found = loss(model, TOKENS, 0)
        labels = TOKENS.masked_fill(~hidden, -100)
        own = [float(model(t[None].masked_fill(h[None], 0), labels=la[None]).loss) * 2
               for t, h, la in zip(TOKENS, hidden, labels, strict=True)]  # fmt: skip
    assert found.tolist() == pytest.approx(own, rel=1e-4)
