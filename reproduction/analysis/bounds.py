"""The paper's bounds as functions; statements, assumptions, proofs and counterexamples are in docs/theory.md."""

from __future__ import annotations

import math


def static_reads(n: int, *, f: float, eps: float, guess: float = 0.0) -> float:
    """Theorem 1: the least expected number of reads when answering without a read fails.

    Args:
        n: positions.
        f: share of them that need retrieval, 0 to 1.
        eps: share of wrong answers allowed to these, 0 to 1.
        guess: probability of a right answer without a read, 0 to 1; the paper's assumption is 0.

    Returns:
        `max(0, 1 - eps / (1 - guess)) f n`.
    """
    _check_shares(f=f, eps=eps, guess=guess)
    _check_count(n)
    if guess == 1:
        return 0.0
    return max(0.0, 1 - eps / (1 - guess)) * f * n


def consolidated_reads(n: int, *, f: float, eps_cons: float, delta: float, n_patterns: int = 1) -> float:
    """Corollary 1: most reads of a consolidated router for recurring positions, with probability 1 - delta.

    Args:
        n: positions.
        f: share of them that ask for a recurring pattern, 0 to 1.
        eps_cons: probability that such a position is still read, given all before it, 0 to 1.
        delta: probability with which more may be read, above 0.
        n_patterns: K, events over which the union is taken; 1 for a single fixed router.

    Returns:
        `eps_cons f n + sqrt(f n log(K / delta) / 2)`, never above f n. The paper writes n for f n in the second term.
    """
    _check_shares(f=f, eps_cons=eps_cons)
    _check_count(n)
    _check_union(delta, n_patterns)
    return min(f * n, eps_cons * f * n + math.sqrt(f * n * math.log(n_patterns / delta) / 2))


def separation_length(*, f: float, eps: float, eps_cons: float, delta: float, n_patterns: int = 1) -> float:
    """The least n at which Corollary 1 promises fewer reads than Theorem 1 demands; infinite if never.

    Args:
        f: share of positions that ask for a recurring pattern, above 0.
        eps: share of wrong answers allowed to the static router.
        eps_cons: share of these positions that the consolidated router still reads.
        delta: probability with which the corollary may fail.
        n_patterns: K.
    """
    _check_shares(f=f, eps=eps, eps_cons=eps_cons)
    _check_union(delta, n_patterns)
    if f == 0 or eps + eps_cons >= 1:
        return math.inf
    return math.log(n_patterns / delta) / (2 * f * (1 - eps - eps_cons) ** 2)


def consolidation_error(*, eps_approx: float, distance: float, n_steps: int, rate: float) -> float:
    """Convergence 1: gradient descent on a convex consolidation loss, full batches, fixed targets.

    Args:
        eps_approx: root of the least loss that the semantic memory can reach, 0 or more.
        distance: from the initial parameters to the best ones.
        n_steps: T, gradient steps.
        rate: their size, at most 1 / L for a loss whose gradient is L-Lipschitz.

    Returns:
        `eps_approx^2 + distance^2 / (2 T rate)`: the paper's, with its C.
    """
    if eps_approx < 0 or distance < 0:
        raise ValueError(f"eps_approx = {eps_approx} and distance = {distance} must not be negative")
    if n_steps < 1 or not rate > 0:
        raise ValueError(f"n_steps = {n_steps} and rate = {rate} must be positive")
    return eps_approx**2 + distance**2 / (2 * n_steps * rate)


def use_ratio(*, recurring_frac: float, eps: float) -> float:
    """Convergence 2: `1 - rho + eps`, attention use after consolidation over before it.

    Args:
        recurring_frac: rho, share of the earlier reads that asked for a recurring pattern.
        eps: share of the earlier reads that are such and are still made.
    """
    _check_shares(recurring_frac=recurring_frac, eps=eps)
    return min(1.0, 1 - recurring_frac + eps)


def fall_by_cause(*, before: float, query_frac: float, after: float) -> tuple[float, float]:
    """Splits a fall of attention into the factor of reads without a query and that of consolidation.

    Args:
        before: attention share before, at least `query_frac`.
        query_frac: share of tokens that query a binding.
        after: attention share after.

    Returns:
        `before / query_frac`, for which a router needs no memory, and `query_frac / after`, for which it does.
    """
    if not after > 0 or not 0 < query_frac <= before:
        raise ValueError(f"before = {before}, query_frac = {query_frac}, after = {after}: shares have to be positive")
    return before / query_frac, query_frac / after


def memoriser(*, recurring_frac: float, query_frac: float) -> tuple[float, float]:
    """The counterexample to Theorem 1 without its assumption: a model that has memorised all patterns and never reads.

    Args:
        recurring_frac: share of the queries that are recurring.
        query_frac: share of positions that ask.

    Returns:
        Its share of wrong answers to recurring queries (0), and the reads that the theorem would have demanded, as a
        share of positions (`query_frac recurring_frac`).
    """
    _check_shares(recurring_frac=recurring_frac, query_frac=query_frac)
    return 0.0, query_frac * recurring_frac


def state_bits(n_bindings: int, *, n_values: int, right: float, chance: float = 1.0) -> float:
    """Theorem 1b: the least state, in bits, from which a model that reads nothing answers bindings of its sequence.

    Args:
        n_bindings: m, written before some moment and asked for after it; values independent and uniform.
        n_values: equally likely values of each, V.
        right: least share of them that is answered right, 0 to 1.
        chance: least probability of this share, above 0.

    Returns:
        `(m KL(right || 1/V) + log(chance)) / log 2`, at least 0; KL in nats between two coins.
    """
    _check_shares(right=right)
    _check_count(n_bindings)
    if n_values < 2:
        raise ValueError(f"n_values = {n_values} must be at least 2")
    if not 0 < chance <= 1:
        raise ValueError(f"chance = {chance} is not a probability above 0")
    guess = 1 / n_values
    if right <= guess:
        return 0.0
    nats = right * math.log(right / guess)
    if right < 1:
        nats += (1 - right) * math.log((1 - right) / (1 - guess))
    return max(0.0, (n_bindings * nats + math.log(chance)) / math.log(2))


def _check_shares(**shares: float) -> None:
    for name, value in shares.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name} = {value} is not a share; give a number from 0 to 1")


def _check_count(n: int) -> None:
    if n < 1:
        raise ValueError(f"n = {n} must be at least 1")


def _check_union(delta: float, n_patterns: int) -> None:
    if not 0 < delta <= 1:
        raise ValueError(f"delta = {delta} is not a probability above 0")
    if n_patterns < 1:
        raise ValueError(f"n_patterns = {n_patterns} must be at least 1")
