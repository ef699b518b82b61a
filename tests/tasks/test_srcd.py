import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch.utils.data import DataLoader

from cramlab.metrics import Scores, score
from cramlab.tasks.srcd import (
    MEDIUM,
    PAPER,
    QUERY,
    SIZES,
    SMALL,
    SPLITS,
    TINY,
    WRITE,
    SRCDConfig,
    collate,
    patterns,
    sample,
)
from cramlab.tasks.srcd_oracles import chance_acc, floor, memoriser_acc, oracle

TOKEN = dataclasses.replace(SMALL, key_mode="token")
MODES = pytest.mark.parametrize("config", [SMALL, TOKEN], ids=["vector", "token"])


def draw(config, n, *, seed=0, split="train", start=0):
    return [sample(config, seed=seed, split=split, index=i) for i in range(start, start + n)]


def stacked(samples, name):
    return np.stack([s[name] for s in samples])


def within_binomial(n_hits, n, p):
    """Inside the central 99.99% of Binomial(n, p): a right generator fails once in ten thousand seeds."""
    low, high = stats.binom.interval(0.9999, n, p)
    return low <= n_hits <= high


def test_presets_are_the_issue_sizes():
    assert (SMALL.seq_len, MEDIUM.seq_len, PAPER.seq_len) == (256, 512, 2048)
    assert (PAPER.query_frac, PAPER.n_patterns, PAPER.recurring_frac) == (0.05, 100, 0.7)
    assert PAPER.expected_attention_frac == pytest.approx(0.015)
    assert TINY.seq_len < SMALL.seq_len


@MODES
def test_a_sequence_depends_on_config_seed_split_and_index_alone(config):
    first = sample(config, seed=3, split="train", index=5)
    np.random.seed(99)
    torch.manual_seed(99)
    sample(config, seed=3, split="train", index=4)
    again = sample(config, seed=3, split="train", index=5)
    assert all(np.array_equal(first[name], again[name]) for name in first)
    for other in (
        sample(config, seed=4, split="train", index=5),
        sample(config, seed=3, split="test", index=5),
        sample(config, seed=3, split="train", index=6),
    ):
        assert not np.array_equal(first["level"], other["level"])


@MODES
def test_batches_do_not_depend_on_how_the_stream_is_cut(config):
    whole = next(iter(config.dataset(seed=0, split="train", batch_size=4)))
    halves = list(itertools.islice(config.dataset(seed=0, split="train", batch_size=2), 2))
    for name in ("discrete", "continuous", "gaps", "retrieval_target"):
        joined = torch.cat([getattr(h, name) for h in halves])
        assert torch.equal(getattr(whole, name), joined)


@MODES
def test_every_query_was_written_once_and_before(config):
    for s in draw(config, 20):
        queries = np.flatnonzero(s["kind"] == QUERY)
        assert (s["write_position"][queries] < queries).all()
        assert (s["kind"][s["write_position"][queries]] == WRITE).all()
        assert (s["value"][s["write_position"][queries]] == s["answer"][queries]).all()
        assert len(set(s["write_position"][queries])) == len(queries)
        if config.key_mode == "token":
            written = s["key_id"][s["kind"] == WRITE]
            assert len(set(written)) == len(written)
            assert (s["key_id"][queries] == s["key_id"][s["write_position"][queries]]).all()


@MODES
def test_recurring_and_novel_queries_differ_in_nothing_but_history(config):
    samples = draw(config, 600)
    delay = {}
    for name in ("recurring", "novel"):
        delay[name] = np.concatenate(
            [np.flatnonzero(s[name]) - s["write_position"][np.flatnonzero(s[name])] for s in samples]
        )
    assert stats.ks_2samp(delay["recurring"], delay["novel"]).pvalue > 1e-4
    places = {n: np.concatenate([np.flatnonzero(s[n]) for s in samples]) for n in delay}
    assert stats.ks_2samp(places["recurring"], places["novel"]).pvalue > 1e-4


@pytest.mark.parametrize("config", [SMALL, TOKEN, dataclasses.replace(SMALL, rebind_frac=0.2)], ids=str)
def test_statistics_match_the_docstring(config):
    samples = draw(config, 400)
    n = 400 * config.seq_len
    kind, recurring, novel = (stacked(samples, name) for name in ("kind", "recurring", "novel"))
    rebound = stacked(samples, "rebound")
    # Counts a sequence are rounded at random to keep their mean, so they vary less than a binomial.
    assert within_binomial((kind == QUERY).sum(), n, config.query_frac)
    assert within_binomial((kind == WRITE).sum(), n, config.write_frac)
    assert within_binomial(recurring.sum(), (kind == QUERY).sum(), config.recurring_frac)
    assert within_binomial(rebound.sum(), recurring.sum(), config.rebind_frac)
    assert ((recurring | novel) == (kind == QUERY)).all()
    assert within_binomial((novel | rebound).sum(), n, config.expected_attention_frac)
    gaps = stacked(samples, "gap").ravel()
    assert gaps.min() >= 1
    assert stats.kstest(gaps, lambda x: 1 - x**-config.gap_shape).pvalue > 1e-4
    noise = (
        stacked(samples, "next_level")
        - config.decay * stacked(samples, "level")
        - config.beta * np.sin(config.omega * stacked(samples, "horizon"))
    )
    assert noise.std() == pytest.approx(config.noise_std, rel=0.02)
    assert abs(noise.mean()) < 5 * config.noise_std / math.sqrt(noise.size)
    assert np.array_equal(stacked(samples, "horizon")[:, :-1], stacked(samples, "gap")[:, 1:])
    assert np.allclose(stacked(samples, "next_level")[:, :-1], stacked(samples, "level")[:, 1:])


def test_short_sequences_keep_the_shares_on_average():
    config = dataclasses.replace(SMALL, seq_len=50)  # 2.5 queries and 5 writes
    kinds = stacked(draw(config, 800), "kind")
    assert set((kinds == QUERY).sum(axis=1)) == {2, 3}
    assert within_binomial((kinds == QUERY).sum(), kinds.size, 0.05)


def test_splits_never_share_novel_bindings_of_token_keys():
    bindings = {split: set() for split in SPLITS}
    for split in SPLITS:
        for s in draw(TOKEN, 300, split=split):
            fresh = (s["kind"] == WRITE) & (s["key_id"] >= TOKEN.n_patterns)
            bindings[split] |= set(zip(s["key_id"][fresh].tolist(), s["value"][fresh].tolist(), strict=True))
    for a, b in itertools.combinations(SPLITS, 2):
        assert bindings[a]
        assert not bindings[a] & bindings[b]
    ids = {split: {key for key, _ in bindings[split]} for split in SPLITS}
    assert len(ids["train"] & ids["test"]) > 0.9 * TOKEN.n_novel_keys  # the ids themselves are all trained


def test_splits_never_share_novel_bindings_of_vector_keys():
    keys = {}
    for split in SPLITS:
        samples = draw(SMALL, 100, split=split)
        fresh = stacked(samples, "kind") == WRITE
        known = patterns(SMALL, 0).keys
        written = stacked(samples, "key")[fresh]
        novel = np.linalg.norm(written[:, None] - known[None], axis=-1).min(axis=1) > 0.5
        keys[split] = written[novel]
    for a, b in itertools.combinations(SPLITS, 2):
        assert torch.cdist(torch.tensor(keys[a]), torch.tensor(keys[b])).min() > 6 * SMALL.key_noise


def test_recurring_patterns_are_the_same_at_every_length_and_split():
    known = patterns(SMALL, 7)
    assert np.array_equal(known.keys, patterns(PAPER, 7).keys)
    assert not np.array_equal(known.keys, patterns(SMALL, 8).keys)
    for split in SPLITS:
        s = sample(TOKEN, seed=7, split=split, index=0)
        recurring = np.flatnonzero(s["recurring"])
        assert (s["answer"][recurring] == known.values[s["key_id"][recurring]]).all()


def test_rebound_keys_mean_another_value():
    config = dataclasses.replace(TOKEN, rebind_frac=0.5)
    for s in draw(config, 20):
        usual = patterns(config, 0).values[np.where(s["recurring"], s["key_id"], 0)]
        assert ((s["answer"] != usual) == s["rebound"])[s["recurring"]].all()


@pytest.mark.parametrize(
    "config", [SMALL, TOKEN, dataclasses.replace(SMALL, rebind_frac=0.3), PAPER], ids=["vector", "token", "rebind", "N"]
)
def test_the_oracle_is_exact(config):
    batch = config.dataset(seed=0, split="test", batch_size=8).batch(0)
    scores = score(oracle(config, batch), batch)
    assert scores.retrieval_acc() == 1.0
    n = scores.n_levels
    low, high = (config.dynamics_floor * q / n for q in stats.chi2.interval(0.9999, n))
    assert low < scores.dynamics_mse < high


@MODES
def test_floors_are_where_arithmetic_puts_them(config):
    data = config.dataset(seed=0, split="test", batch_size=100)
    totals = {name: Scores() for name in ("majority", "last_value", "memoriser")}
    n_last = n_queries = 0
    for batch in (data.batch(0), data.batch(100)):
        for name in totals:
            totals[name] = totals[name] + score(floor(name, config, batch, seed=0), batch)
    for s in draw(config, 200, split="test"):
        writes = np.flatnonzero(s["kind"] == WRITE)
        for q in np.flatnonzero(s["kind"] == QUERY):
            n_last += s["value"][writes[writes < q][-1]] == s["answer"][q]
            n_queries += 1
    n = totals["majority"].n_queries["all"]
    assert n == n_queries
    share = np.bincount(patterns(config, 0).values, minlength=config.n_values).max() / config.n_patterns
    p_majority = config.recurring_frac * share + (1 - config.recurring_frac) / config.n_values
    assert within_binomial(totals["majority"].n_correct["all"], n, p_majority)
    assert totals["last_value"].n_correct["all"] == n_last
    assert totals["last_value"].retrieval_acc() < 0.2
    assert within_binomial(totals["memoriser"].n_correct["all"], n, memoriser_acc(config))
    assert totals["memoriser"].retrieval_acc("recurring") == 1.0
    guess = np.random.default_rng(0).integers(config.n_values, size=n)
    answers = np.concatenate([s["answer"][s["answer"] >= 0] for s in draw(config, 200, split="test")])
    assert within_binomial((guess == answers).sum(), n, chance_acc(config))


def test_the_memoriser_fails_on_rebound_keys():
    config = dataclasses.replace(SMALL, rebind_frac=0.5)
    batch = config.dataset(seed=0, split="test", batch_size=64).batch(0)
    scores = score(floor("memoriser", config, batch, seed=0), batch)
    assert scores.retrieval_acc("rebound") == 0.0
    assert within_binomial(scores.n_correct["all"], scores.n_queries["all"], memoriser_acc(config))


def test_least_attention_is_novel_and_rebound_queries():
    config = dataclasses.replace(SMALL, rebind_frac=0.3)
    batch = config.dataset(seed=0, split="test", batch_size=8).batch(0)
    assert torch.equal(batch.oracle_reads, batch.slices["novel"] | batch.slices["rebound"])
    assert (batch.oracle_reads <= batch.retrieval_mask).all()


def test_inputs_do_not_hold_the_answer():
    s = sample(SMALL, seed=0, split="test", index=0)
    changed = dict(s)
    changed["answer"] = np.where(s["answer"] >= 0, (s["answer"] + 1) % SMALL.n_values, -1)
    changed["next_level"] = s["next_level"] + 1
    a, b = collate(SMALL, [s]), collate(SMALL, [changed])
    assert torch.equal(a.discrete, b.discrete)
    assert torch.equal(a.continuous, b.continuous)
    assert (a.discrete[..., 1][a.retrieval_mask] == SMALL.n_values).all()


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"query_frac": 1.5}, "task.query_frac"),
        ({"write_frac": 0.01}, "task.write_frac"),
        ({"n_patterns": 5}, "task.n_patterns"),
        ({"key_mode": "tokens"}, "task.key_mode"),
        ({"key_mode": "token", "n_novel_keys": 10}, "task.n_novel_keys"),
        ({"n_values": 1}, "task.n_values"),
        ({"n_values": 8, "key_mode": "token"}, "task.n_values"),
        ({"decay": 1.5}, "task.decay"),
        ({"decay": math.nan}, "task.decay"),
        ({"gap_shape": math.nan}, "task.gap_shape"),
        ({"noise_std": -1.0}, "task.noise_std"),
        ({"seq_len": 0}, "task.seq_len"),
        ({"gap_shape": 0.0}, "task.gap_shape"),
    ],
)
def test_what_cannot_be_generated_is_refused_by_name(changes, field):
    with pytest.raises(ValueError, match=field.replace(".", r"\.")):
        dataclasses.replace(SMALL, **changes)


def test_unknown_split_is_refused():
    with pytest.raises(ValueError, match="train, validation, test"):
        SMALL.dataset(seed=0, split="dev", batch_size=2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": -1}, "seed = -1 must be a whole number from 0"),
        ({"seed": 0.5}, "seed = 0.5"),
        ({"batch_size": 0}, "batch_size = 0 must be at least 1"),
        ({"batch_size": True}, "batch_size = True"),
        ({"start": -1}, "start = -1"),
    ],
)
def test_streams_that_do_not_exist_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        SMALL.dataset(**{"seed": 0, "split": "test", "batch_size": 2} | changes)
    with pytest.raises(ValueError, match="index = -1"):
        sample(SMALL, seed=0, split="test", index=-1)
    with pytest.raises(ValueError, match='split "dev" is unknown'):
        sample(SMALL, seed=0, split="dev", index=0)


def test_sequences_that_make_no_batch_are_named():
    one = sample(TINY, seed=0, split="test", index=0)
    for samples, message in (
        ([], "give at least one sequence"),
        ([one, {n: v for n, v in one.items() if n != "gap"}], r'samples\[1\]\["gap"\] is missing; the config requires'),
        ([one | {"level": one["level"][:-1]}], r'samples\[0\]\["level"\] has shape \(63,\)'),
        ([one | {"key": one["key"][:, :3]}], r'"key"\] has shape \(64, 3\); the config requires shape \(64, 16\)'),
    ):
        with pytest.raises(ValueError, match=message):
            collate(TINY, samples)


def test_predictors_refuse_batches_of_another_config():
    batch = TINY.dataset(seed=0, split="test", batch_size=2).batch(0)
    other = dataclasses.replace(TINY, key_mode="token")
    with pytest.raises(ValueError, match=r"batch has 2 discrete and 17 continuous channels, .* 3 and 1"):
        oracle(other, batch)
    with pytest.raises(ValueError, match="give the config that made the batch"):
        floor("memoriser", other, batch, seed=0)
    with pytest.raises(ValueError, match='floor "best" is unknown; give one of majority, last_value, memoriser'):
        floor("best", TINY, batch, seed=0)


def test_workers_of_a_loader_share_the_stream():
    data = TINY.dataset(seed=0, split="train", batch_size=2)
    loaded = itertools.islice(DataLoader(data, batch_size=None, num_workers=2), 4)
    for i, batch in enumerate(loaded):
        assert torch.equal(batch.gaps, data.batch(2 * i).gaps)


def test_every_size_yields_batches():
    for config in SIZES.values():
        batch = config.dataset(seed=0, split="validation", batch_size=2).batch(0)
        assert batch.gaps.shape == (2, config.seq_len)
        assert batch.continuous.shape[-1] == config.input_spec.n_continuous
        assert isinstance(config, SRCDConfig)
