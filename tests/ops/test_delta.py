"""The gated delta rule in chunks equals its definition, token by token, outputs and gradients."""

import pytest
import torch
from torch.nn import functional as F

from cramlab.ops.scan.delta import delta_rule, delta_rule_by_tokens


def inputs(n_tokens, *, n_batch=2, n_heads=3, d_key=8, d_value=5, longest=3.0, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    q, k = (F.normalize(normal(n_batch, n_tokens, n_heads, d_key), dim=-1) for _ in range(2))
    v = normal(n_batch, n_tokens, n_heads, d_value)
    beta = torch.sigmoid(normal(n_batch, n_tokens, n_heads))
    log_decay = -longest * torch.rand(n_batch, n_tokens, n_heads, generator=generator, dtype=torch.float64) ** 4
    state = normal(n_batch, n_heads, d_key, d_value)
    return [t.to(dtype) for t in (q, k, v, beta, log_decay, state)]


@pytest.mark.parametrize("n_tokens", [0, 1, 2, 7, 8, 9, 37])
def test_chunks_equal_the_definition_with_gradients(n_tokens):
    ours, theirs = ([t.clone().requires_grad_() for t in inputs(n_tokens)] for _ in range(2))
    for given, way in ((ours, lambda *a: delta_rule(*a, chunk=8)), (theirs, delta_rule_by_tokens)):
        answers, state = way(*given)
        given.append((answers, state))
        if n_tokens:
            (answers.sin().sum() + state.cos().sum()).backward()
    for found, wanted in zip(ours.pop(), theirs.pop(), strict=True):
        torch.testing.assert_close(found, wanted)
    for found, wanted in zip(ours, theirs, strict=True):
        if n_tokens:
            torch.testing.assert_close(found.grad, wanted.grad)


def test_in_32_bits_after_gaps_that_leave_nothing():
    q, k, v, beta, log_decay, state = inputs(200, dtype=torch.float32)
    log_decay[:, ::17] = -1e30
    exact = delta_rule_by_tokens(*(t.double() for t in (q, k, v, beta, log_decay, state)))
    for found, wanted in zip(delta_rule(q, k, v, beta, log_decay, state), exact, strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=2e-5)


def test_a_sequence_cut_in_two_equals_the_whole():
    *tokens, state = inputs(50)
    answers, last = delta_rule(*tokens, state, chunk=16)
    first, middle = delta_rule(*(t[:, :23] for t in tokens), state, chunk=16)
    second, end = delta_rule(*(t[:, 23:] for t in tokens), middle, chunk=16)
    torch.testing.assert_close(torch.cat([first, second], dim=1), answers)
    torch.testing.assert_close(end, last)


def test_a_token_without_strength_and_decay_changes_nothing():
    q, k, v, beta, log_decay, state = inputs(12)
    beta[:, 5:], log_decay[:, 5:] = 0, 0
    _, after = delta_rule(*(t[:, :5] for t in (q, k, v, beta, log_decay)), state)
    _, last = delta_rule(q, k, v, beta, log_decay, state)
    torch.testing.assert_close(last, after)


def test_a_key_written_once_is_recalled_exactly_and_overwritten_by_a_second_write():
    key = F.normalize(torch.ones(1, 1, 1, 4), dim=-1)
    first, second = torch.tensor([1.0, 2.0]), torch.tensor([-3.0, 0.5])
    k = key.expand(1, 2, 1, 4)
    v = torch.stack([first, second])[None, :, None]
    one, zero = torch.ones(1, 2, 1), torch.zeros(1, 2, 1)
    answers, _ = delta_rule(k, k, v, one, zero, torch.zeros(1, 1, 4, 2))
    torch.testing.assert_close(answers[0, :, 0], torch.stack([first, second]))


def test_16_bits_keep_a_state_of_32():
    given = [t.bfloat16() for t in inputs(20)[:5]]
    answers, state = delta_rule(*given, torch.zeros(2, 3, 8, 5))
    assert answers.dtype == torch.bfloat16
    assert state.dtype == torch.float32


@pytest.mark.parametrize("n_tokens", [1, 20])
def test_autocast_leaves_the_recurrence_in_32_bits(n_tokens):
    """In a step of decoding and in chunks, outputs and gradients."""
    found = []
    for enabled in (False, True):
        given = [t.requires_grad_() for t in inputs(n_tokens, dtype=torch.float32)]
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            answers, state = delta_rule(*given)
        found.append([answers, state, *torch.autograd.grad(answers.sum() + state.sum(), given)])
    assert all(torch.equal(plain, cast) for plain, cast in zip(*found, strict=True))
