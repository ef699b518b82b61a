import math

import pytest
import torch

from cramlab.batch import Predictions
from cramlab.metrics import AttentionUse, attention_use, consolidation_ratio, count, score
from cramlab.mixer import Trace
from cramlab.objective import LossConfig, TokenLosses, gate_loss, task_loss, token_losses
from cramlab.tasks.srcd import TINY
from cramlab.tasks.srcd_oracles import oracle


def batch_of(n=2):
    return TINY.dataset(seed=0, split="train", batch_size=n).batch(0)


def test_task_loss_is_mean_nats_plus_mean_squared_error():
    batch = batch_of()
    predictions = Predictions(level=batch.dynamics_target + 0.5, logits=torch.zeros(*batch.gaps.shape, TINY.n_values))
    losses = token_losses(predictions, batch)
    assert task_loss(losses, batch, LossConfig()).item() == pytest.approx(math.log(TINY.n_values) + 0.25, rel=1e-5)
    assert (losses.retrieval[~batch.retrieval_mask] == 0).all()
    only = torch.zeros_like(batch.valid)
    assert task_loss(losses, batch, LossConfig(), only).item() == 0.0


def test_a_share_weighs_a_token_and_does_not_change_what_is_divided_by():
    batch = batch_of()
    predictions = Predictions(level=batch.dynamics_target + 0.5, logits=torch.zeros(*batch.gaps.shape, TINY.n_values))
    losses, full = token_losses(predictions, batch), math.log(TINY.n_values) + 0.25
    quarter = torch.full_like(batch.gaps, 0.25)
    assert task_loss(losses, batch, LossConfig(), quarter).item() == pytest.approx(0.25 * full, rel=1e-5)
    first = torch.zeros_like(batch.gaps)
    first[0] = 1.0  # the other sequence does not count at all
    assert task_loss(losses, batch, LossConfig(), first).item() == pytest.approx(full, rel=1e-5)


def test_gate_loss_by_hand():
    batch = batch_of(1)
    zero = torch.zeros_like(batch.gaps)
    read = torch.zeros_like(batch.valid)
    read[0, :3] = True
    batch = batch._replace(retrieval_mask=torch.zeros_like(batch.valid).index_fill_(1, torch.tensor([0]), True))
    without = zero.clone()
    without[0, :3] = torch.tensor([5.0, 0.3, 0.0])
    config = LossConfig(read_price=0.1, benefit_cap=2.0, retrieval_emphasis=10.0)
    logit = torch.tensor([[1.0, -1.0, 0.5]])
    logit = torch.cat([logit, torch.zeros(1, batch.gaps.shape[1] - 3)], dim=1)
    loss = gate_loss(
        logit,
        TokenLosses(retrieval=zero, dynamics=zero),
        TokenLosses(retrieval=without, dynamics=zero),
        read,
        batch,
        config,
    )
    # pays by 4.9, capped at 2 and stressed tenfold; pays by 0.2; does not pay, by 0.1
    nats = [math.log(1 + math.exp(-1)), math.log(1 + math.exp(1)), math.log(1 + math.exp(0.5))]
    assert loss.item() == pytest.approx((20 * nats[0] + 0.2 * nats[1] + 0.1 * nats[2]) / 3, rel=1e-5)


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
    task_loss(token_losses(predictions, masked), masked, LossConfig()).backward()
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
