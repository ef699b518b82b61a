import math

import pytest
import torch

from cramlab.batch import Predictions
from cramlab.metrics import AttentionUse, attention_use, consolidation_ratio, count, score
from cramlab.mixer import Trace
from cramlab.objective import (
    Judged,
    LossConfig,
    TokenLosses,
    gate_loss,
    nats_loss,
    next_token_losses,
    task_loss,
    terms,
    token_losses,
)
from cramlab.tasks.srcd import TINY
from cramlab.tasks.srcd_oracles import oracle


def batch_of(n=2):
    return TINY.dataset(seed=0, split="train", batch_size=n).batch(0)


def test_task_loss_is_mean_nats_plus_mean_squared_error():
    batch = batch_of()
    predictions = Predictions(level=batch.dynamics_target + 0.5, logits=torch.zeros(*batch.gaps.shape, TINY.n_values))
    losses = token_losses(predictions, batch)
    assert task_loss(losses, LossConfig()).item() == pytest.approx(math.log(TINY.n_values) + 0.25, rel=1e-5)
    assert (losses.retrieval[~batch.retrieval_mask] == 0).all()
    only = torch.zeros_like(batch.valid)
    assert task_loss(losses, LossConfig(), only).item() == 0.0


def test_a_share_weighs_a_token_and_does_not_change_what_is_divided_by():
    batch = batch_of()
    predictions = Predictions(level=batch.dynamics_target + 0.5, logits=torch.zeros(*batch.gaps.shape, TINY.n_values))
    losses, full = token_losses(predictions, batch), math.log(TINY.n_values) + 0.25
    quarter = torch.full_like(batch.gaps, 0.25)
    assert task_loss(losses, LossConfig(), quarter).item() == pytest.approx(0.25 * full, rel=1e-5)
    first = torch.zeros_like(batch.gaps)
    first[0] = 1.0  # the other sequence does not count at all
    assert task_loss(losses, LossConfig(), first).item() == pytest.approx(full, rel=1e-5)


def test_gate_loss_by_hand():
    batch = batch_of(1)
    zero = torch.zeros_like(batch.gaps)
    read = torch.zeros_like(batch.valid)
    read[0, :3] = True
    masks = {
        "retrieval_mask": torch.zeros_like(batch.valid).index_fill_(1, torch.tensor([0]), True),
        "dynamics_mask": batch.valid,
    }
    without = zero.clone()
    without[0, :3] = torch.tensor([5.0, 0.3, 0.0])
    config = LossConfig(read_price=0.1, benefit_cap=2.0, retrieval_emphasis=10.0)
    logit = torch.tensor([[1.0, -1.0, 0.5]])
    logit = torch.cat([logit, torch.zeros(1, batch.gaps.shape[1] - 3)], dim=1)
    loss = gate_loss(
        logit,
        TokenLosses(retrieval=zero, dynamics=zero, **masks),
        TokenLosses(retrieval=without, dynamics=zero, **masks),
        read,
        config,
    )
    # pays by 4.9, capped at 2 and stressed tenfold; pays by 0.2; does not pay, by 0.1
    nats = [math.log(1 + math.exp(-1)), math.log(1 + math.exp(1)), math.log(1 + math.exp(0.5))]
    assert loss.item() == pytest.approx((20 * nats[0] + 0.2 * nats[1] + 0.1 * nats[2]) / 3, rel=1e-5)


def terms_token_by_token(task, aux, config, judged, ramp, n_targets):
    """`objective.terms` as plain sums over tokens."""
    found = {"task": task}
    for name, weight in (("capacity", config.capacity_weight), ("consolidation", config.consolidation_weight),
                         ("salience", config.gate_weight)):  # fmt: skip
        if name in aux:
            found[name] = weight * aux[name]
    if "episodic_use" in aux:
        found["episodic_price"] = ramp * config.episodic_price * aux["episodic_use"]
        found["semantic_reward"] = -ramp * config.semantic_reward * aux["semantic_use"]
        return found
    trace, with_reads, without, _ = judged
    sums, counts, gate, n_read = {"retrieval": 0.0, "dynamics": 0.0}, {"retrieval": 0, "dynamics": 0}, 0.0, 0
    for b, t in torch.ones_like(trace.attended).nonzero().tolist():
        if not trace.attended[b, t]:
            continue
        share = max(1 - float(trace.gate_prob[b, t]), config.no_read_floor)
        for part in sums:
            if getattr(without, f"{part}_mask")[b, t] and share > 0:
                sums[part] = sums[part] + share * getattr(without, part)[b, t]
                counts[part] += 1
        n_read += 1
        margin = (without.total - with_reads.total)[b, t].item() - config.read_price
        weight = min(abs(margin), config.benefit_cap)
        weight *= config.retrieval_emphasis if with_reads.retrieval_mask[b, t] else 1.0
        chance = torch.sigmoid(trace.gate_logit[b, t])
        gate = gate - weight * torch.log(chance if margin > 0 else 1 - chance)
    means = {part: sums[part] / (n_targets or max(counts[part], 1)) for part in sums}
    found["no_read"] = config.no_read_weight * (means["retrieval"] + config.dynamics_weight * means["dynamics"])
    found["gate"] = config.gate_weight * gate / (n_targets or max(n_read, 1))
    return found


@pytest.mark.parametrize("floor", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("n_targets", [None, 7])
def test_the_objective_is_the_sum_over_tokens_that_it_says(floor, n_targets):
    draw = torch.Generator().manual_seed(1)
    retrieval_mask, dynamics_mask, read = (torch.rand(3, 9, generator=draw) < p for p in (0.4, 0.7, 0.6))
    found, gradients = [], []
    for compose in (terms, terms_token_by_token):
        draw.manual_seed(2)
        logit, *values = (torch.randn(3, 9, generator=draw, dtype=torch.float64) for _ in range(5))
        leaves = [logit.requires_grad_(), *(value.abs().requires_grad_() for value in values)]
        with_reads, without = (
            TokenLosses(retrieval=a * retrieval_mask, dynamics=b * dynamics_mask, retrieval_mask=retrieval_mask,
                        dynamics_mask=dynamics_mask)
            for a, b in ((leaves[1], leaves[2]), (leaves[3], leaves[4]))
        )  # fmt: skip
        trace = Trace.of_reads(read, logit.dtype)
        trace = trace._replace(gate_logit=logit, gate_prob=torch.sigmoid(logit.detach()))
        config = LossConfig(dynamics_weight=3.0, gate_weight=0.7, no_read_floor=floor, consolidation_weight=0.5)
        aux = {name: torch.tensor(2.0, dtype=torch.float64) for name in ("capacity", "consolidation", "salience")}
        how = {"price_ramp": 0.5, "n_targets": n_targets and torch.tensor(n_targets)}
        judged = Judged(trace, with_reads, without)
        if compose is terms:
            found.append(terms(torch.tensor(1.5, dtype=torch.float64), aux, config, judged, **how))
        else:
            found.append(compose(torch.tensor(1.5, dtype=torch.float64), aux, config, judged, 0.5, n_targets))
        sum(found[-1].values()).backward()
        gradients.append([leaf.grad if leaf.grad is not None else torch.zeros_like(leaf) for leaf in leaves])
    assert list(found[0]) == list(found[1]) == ["task", "capacity", "consolidation", "salience", "no_read", "gate"]
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], msg=name)
    torch.testing.assert_close(gradients[0], gradients[1])
    assert gradients[0][0].abs().sum() > 0
    assert gradients[0][3].abs().sum() > 0


def test_the_gumbel_router_pays_its_prices_in_place_of_a_gate():
    aux = {"episodic_use": torch.tensor(0.4), "semantic_use": torch.tensor(0.2), "consolidation": torch.tensor(1.0)}
    config = LossConfig(episodic_price=0.3, semantic_reward=0.5)
    slow = terms_token_by_token(torch.tensor(1.0), aux, config, None, 0.5, None)
    assert terms(torch.tensor(1.0), aux, config, price_ramp=0.5) == slow
    assert float(slow["episodic_price"]) == pytest.approx(0.06)


def test_a_language_model_s_losses_are_those_of_its_targets():
    target = torch.tensor([[1, -100, 2], [0, 0, -100]])
    logits = torch.randn(2, 3, 4)
    losses = next_token_losses(logits, target, ignored=-100)
    for b, t in torch.ones(2, 3).nonzero().tolist():
        scored = target[b, t] != -100
        assert losses.retrieval_mask[b, t] == scored
        expected = -torch.log_softmax(logits[b, t], dim=0)[target[b, t]] if scored else torch.tensor(0.0)
        torch.testing.assert_close(losses.total[b, t], expected)


def test_targets_off_the_mask_are_never_read():
    batch = batch_of()
    keep = torch.zeros_like(batch.valid)
    keep[:, ::2] = True
    masked = batch._replace(
        dynamics_mask=keep,
        dynamics_target=torch.where(keep, batch.dynamics_target, torch.nan),
        retrieval_target=torch.where(batch.retrieval_mask, batch.retrieval_target, -1),
    )
    logits = torch.randn(*batch.gaps.shape, TINY.n_values, requires_grad=True)
    level = torch.randn(batch.gaps.shape, requires_grad=True)
    predictions = Predictions(level=level, logits=logits)
    task_loss(token_losses(predictions, masked), LossConfig()).backward()
    assert torch.isfinite(logits.grad).all()
    assert torch.isfinite(level.grad).all()
    assert math.isfinite(score(predictions, masked).dynamics_mse)


def test_negative_weights_are_refused_by_name():
    with pytest.raises(ValueError, match=r"training\.loss\.read_price"):
        LossConfig(read_price=-1.0)


def test_scores_add_up():
    a, b = batch_of(2), TINY.dataset(seed=0, split="train", batch_size=2).batch(2)
    both = TINY.dataset(seed=0, split="train", batch_size=4).batch(0)
    apart = score(oracle(TINY, a), a) + score(oracle(TINY, b), b)
    together = score(oracle(TINY, both), both)
    assert apart.n_correct == together.n_correct
    assert apart.n_queries == together.n_queries
    assert apart.dynamics_mse == pytest.approx(together.dynamics_mse)
    assert math.isnan(apart.retrieval_acc("rebound"))
    assert together.n_queries["all"] == together.n_queries["recurring"] + together.n_queries["novel"]


def test_score_counts_what_is_right():
    batch = batch_of(2)
    right = oracle(TINY, batch)
    wrong = Predictions(level=right.level, logits=right.logits.roll(1, dims=-1))
    assert score(wrong, batch).retrieval_acc() == 0.0
    assert score(right, batch).retrieval_acc() == 1.0
    shifted = Predictions(level=batch.dynamics_target + 2.0, logits=right.logits)
    assert score(shifted, batch).dynamics_mse == pytest.approx(4.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda level, logits: (level[:1], logits), r"predictions\.level has shape \(1, 64\); give \(2, 64\)"),
        (lambda level, logits: (level[..., None], logits), r"predictions\.level has shape \(2, 64, 1\)"),
        (lambda level, logits: (level, logits[..., 0]), r"predictions\.logits has shape .*give \(2, 64, n_classes\)"),
        (lambda level, logits: (level, logits[..., :1]), r"logits has 1 classes, but an answer is class \d+; give"),
        (lambda level, logits: (level.long(), logits), r"predictions\.level is torch.int64; give .* floating-point"),
        (lambda level, logits: (level, logits.numpy()), r"predictions\.logits is ndarray; give a tensor"),
        (lambda level, logits: (level, logits.bool()), r"predictions\.logits is torch.bool"),
        (lambda level, logits: (level.to("meta"), logits), r"predictions\.level is on meta, the batch on cpu"),
        (
            lambda level, logits: (level * torch.inf, logits),
            r"predictions\.level is not finite at 128 of the 128 tokens",
        ),
        (lambda level, logits: (level, logits * torch.nan), r"predictions\.logits is NaN at \d+ of the \d+ tokens"),
    ],
)
def test_predictions_that_do_not_fit_are_named(change, message):
    batch = batch_of(2)
    with pytest.raises(ValueError, match=message):
        score(Predictions(*change(*oracle(TINY, batch))), batch)


def test_what_is_not_scored_may_be_anything():
    batch = batch_of(2)
    right = oracle(TINY, batch)
    unasked = torch.where(batch.retrieval_mask[..., None], right.logits, torch.nan)
    assert score(Predictions(right.level, unasked), batch) == score(right, batch) == count(right, batch)
    ruled_out = torch.where(right.logits > 0, 0.0, -torch.inf)
    assert score(Predictions(right.level, ruled_out), batch).retrieval_acc() == 1.0


def test_three_shares_stay_apart_and_padding_is_not_counted():
    def mask(*values):
        return torch.tensor([values], dtype=torch.bool)

    trace = Trace(
        path=torch.zeros(1, 4, dtype=torch.int64),
        attended=mask(1, 0, 0, 1),
        scored=mask(1, 1, 0, 1),
        gate_prob=torch.tensor([[0.9, 0.3, 0.0, 1.0]]),
    )
    use = attention_use([trace, trace], mask(1, 1, 1, 0))
    assert use.fracs() == pytest.approx({"gate_mean_frac": 0.4, "attention_frac": 1 / 3, "reads_frac": 2 / 3})
    assert (use + use).fracs() == pytest.approx(use.fracs())
    assert AttentionUse().fracs()["reads_frac"] == 0.0


def test_consolidation_ratio():
    assert consolidation_ratio(0.015, 1.0) == 0.015
    assert math.isnan(consolidation_ratio(0.1, 0.0))


def test_a_gate_of_nats_is_taught_the_capped_benefit_of_each_read():
    masks = {
        "retrieval_mask": torch.tensor([[True, True, True, False]]),
        "dynamics_mask": torch.zeros(1, 4, dtype=torch.bool),
    }
    zero = torch.zeros(1, 4)
    with_reads = TokenLosses(retrieval=torch.tensor([[1.0, 2.0, 1.0, 0.0]]), dynamics=zero, **masks)
    without = TokenLosses(retrieval=torch.tensor([[1.5, 1.0, 9.0, 0.0]]), dynamics=zero, **masks)
    read = torch.tensor([[True, True, True, False]])
    margin = torch.tensor([[0.2, 0.0, 1.0, 5.0]])
    loss = nats_loss(margin, with_reads, without, read, LossConfig(benefit_cap=4.0), torch.tensor(0.1))
    # predicted 0.3, 0.1 and 1.1; saved 0.5, -1 and 8, which is capped
    assert loss.item() == pytest.approx((0.2**2 + 1.1**2 + 2.9**2) / 3)
