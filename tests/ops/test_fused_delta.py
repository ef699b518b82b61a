"""The delta rule with its kernels equals its definition, outputs and gradients. On a CPU in Triton's interpreter."""

import kernels
import pytest
import torch
from kernels import DEVICE
from torch.nn import functional as F

from cramlab.ops import dispatch
from cramlab.ops.scan import delta_fused, delta_naive
from cramlab.ops.scan.delta import delta_rule, delta_rule_by_tokens

pytestmark = [kernels.wanted, kernels.protest]
SIZES = [(1, 1, 16, 16), (2, 3, 8, 5), (1, 2, 64, 64), (1, 1, 20, 40), (1, 1, 128, 128)]  # B, H, K, V


@pytest.fixture(autouse=True)
def _with_kernels(monkeypatch):
    monkeypatch.setattr(dispatch, "usable", lambda _: True)


def inputs(n_tokens, n_batch=2, n_heads=3, d_key=8, d_value=5):
    def normal(*shape):
        return torch.randn(*shape, device=DEVICE)

    q, k = (F.normalize(normal(n_batch, n_tokens, n_heads, d_key), dim=-1) for _ in range(2))
    v, beta = normal(n_batch, n_tokens, n_heads, d_value), torch.sigmoid(normal(n_batch, n_tokens, n_heads))
    log_decay = -3 * torch.rand(n_batch, n_tokens, n_heads, device=DEVICE) ** 4
    return [q, k, v, beta, log_decay, normal(n_batch, n_heads, d_key, d_value)]


def close(found, wanted, limit=2e-5):
    """Equal to `limit` of the largest number: near the rounding of 32 bits, and far below that of 19."""
    found, wanted = found.detach().double(), wanted.detach().double()
    torch.testing.assert_close(found, wanted, rtol=limit, atol=limit * float(wanted.abs().max()))


def compare(ours, theirs, given, exact):
    """Two ways to compute the same outputs, and their gradients by `given` and `exact`."""
    for fast, slow in zip(ours, theirs, strict=True):
        close(fast, slow)
    weights = [torch.randn_like(y) for y in ours]
    grads = [
        torch.autograd.grad(sum((y * w).sum() for y, w in zip(outputs, weights, strict=True)), leaves)
        for outputs, leaves in ((ours, given), (theirs, exact))
    ]
    for fast, slow in zip(*grads, strict=True):
        close(fast, slow, 5e-5)


def leaves(given):
    """Copies in 32 and in 64 bits, whose gradients are wanted."""
    return ([t.detach().to(dtype).requires_grad_() for t in given] for dtype in (torch.float32, torch.float64))


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("n_tokens", [2, 64, 133])
def test_the_rule_equals_its_definition_with_gradients(sizes, n_tokens):
    given, exact = leaves(inputs(n_tokens, *sizes))
    compare(delta_rule(*given), delta_rule_by_tokens(*exact), given, exact)


@pytest.mark.parametrize("chunk", [3, 16, 24])
def test_chunks_of_any_length(chunk):
    given, exact = leaves(inputs(50))
    compare(delta_rule(*given, chunk=chunk), delta_rule_by_tokens(*exact), given, exact)


@pytest.mark.parametrize("alike", [1.0, 0.999])
def test_equal_keys_that_overwrite_one_another(alike):
    """Here powers of the triangular matrix grow to 1e17, though its inverse has no entry beyond 1."""
    q, k, v, beta, log_decay, state = inputs(150, 1, 2, 16, 16)
    k = F.normalize(alike * k[:, :1] + (1 - alike) * k, dim=-1)
    given, exact = leaves([q, k, v, torch.ones_like(beta), torch.zeros_like(log_decay), state])
    compare(delta_rule(*given), delta_rule_by_tokens(*exact), given, exact)


def test_gaps_that_leave_nothing():
    given = inputs(200, 1)
    given[4][:, ::17] = -1e30
    given, exact = leaves(given)
    compare(delta_rule(*given), delta_rule_by_tokens(*exact), given, exact)


def test_padding_leaves_the_state_alone():
    q, k, v, beta, log_decay, state = inputs(90)
    valid = torch.rand(2, 90, 1, device=DEVICE) > 0.4
    padded = delta_rule(q, k, v, beta * valid, log_decay * valid, state)
    for b in range(2):
        there = valid[b, :, 0]
        alone = delta_rule_by_tokens(*(t[b : b + 1, there] for t in (q, k, v, beta, log_decay)), state[b : b + 1])
        close(padded[0][b, there], alone[0][0])
        close(padded[1][b], alone[1][0])


def test_a_state_goes_on():
    *tokens, state = inputs(150)
    answers, last = delta_rule(*tokens, state)
    first, middle = delta_rule(*(t[:, :70] for t in tokens), state)
    second, end = delta_rule(*(t[:, 70:] for t in tokens), middle)
    close(torch.cat([first, second], dim=1), answers)
    close(end, last)


@pytest.mark.parametrize("types", ["fffff", "ffhhf", "ffbbb", "hhhhh"])
def test_inputs_of_16_bits_are_solved_in_32(types):
    """The outputs and each gradient are rounded once, to the type of the values and of its input."""
    names = {"f": torch.float32, "b": torch.bfloat16, "h": torch.float16}
    *tokens, state = inputs(100, 1, 2, 16, 20)
    given = [t.to(names[name]).requires_grad_() for t, name in zip(tokens, types, strict=True)]
    given.append(state.requires_grad_())
    exact = [t.detach().double().requires_grad_() for t in given]
    ours, theirs = delta_rule(*given), delta_rule_by_tokens(*exact)
    weights = [torch.randn_like(y) for y in ours]
    grads = [
        torch.autograd.grad(ys, leaves, [w.to(y.dtype) for y, w in zip(ys, weights, strict=True)])
        for ys, leaves in ((ours, given), (theirs, exact))
    ]
    assert [y.dtype for y in ours] == [given[2].dtype, torch.float32]
    for fast, slow in zip((*ours, *grads[0]), (*theirs, *grads[1]), strict=True):
        close(fast, slow, {torch.float32: 2e-5, torch.float16: 2**-10, torch.bfloat16: 2**-7}[fast.dtype])


@pytest.mark.parametrize("sizes", [*SIZES, (2, 2, 32, 32), (3, 4, 64, 64)])
def test_products_of_bfloat16_are_summed_in_32_bits(sizes):
    """Errors stay those of rounding a factor of each product once, also after many chunks."""
    *tokens, state = inputs(260, *sizes)
    given = [t.to(torch.bfloat16).requires_grad_() for t in tokens[:3]]
    given += [t.requires_grad_() for t in (*tokens[3:], state)]
    exact = [t.detach().double().requires_grad_() for t in given]
    ours, theirs = delta_rule(*given), delta_rule_by_tokens(*exact)
    weights = [torch.randn_like(y) for y in ours]
    grads = [
        torch.autograd.grad(ys, leaves, [w.to(y.dtype) for y, w in zip(ys, weights, strict=True)])
        for ys, leaves in ((ours, given), (theirs, exact))
    ]
    assert [y.dtype for y in ours] == [torch.bfloat16, torch.float32]
    for fast, slow in zip((*ours, *grads[0]), (*theirs, *grads[1]), strict=True):
        error = (fast.detach().double() - slow.detach()).norm() / slow.detach().norm()
        assert float(error) < 2**-5
    late, wanted = ours[0][:, 200:].detach().double(), theirs[0][:, 200:].detach()
    assert float((late - wanted).norm() / wanted.norm()) < 2**-5


def test_inputs_are_read_where_they_stand():
    """Heads of one projection, and inputs whose channels are not beside one another."""
    *_, beta, log_decay, state = inputs(70, 2, 3, 16, 16)
    q, k, v = (F.normalize(t, dim=-1) for t in torch.randn(2, 70, 3, 48, device=DEVICE).split(16, dim=-1))
    both = torch.cat([q, k, v], dim=-1).split(16, dim=-1)
    across = [t.transpose(1, 3).contiguous().transpose(1, 3) for t in (q, k, v)]
    wanted = delta_rule(q, k, v, beta, log_decay, state)
    for given in (both, across):
        assert not any(t.is_contiguous() for t in given)
        for found, same in zip(delta_rule(*given, beta, log_decay, state), wanted, strict=True):
            assert torch.equal(found, same)


@pytest.mark.parametrize("which", [0, 1])
def test_a_gradient_of_one_output_alone(which):
    given, exact = leaves(inputs(70, 1))
    ours, theirs = delta_rule(*given), delta_rule_by_tokens(*exact)
    compare(ours[which : which + 1], theirs[which : which + 1], given[1:], exact[1:])


def test_gradients_have_no_gradients():
    given = [t.requires_grad_() for t in inputs(20, 1)]
    (grad,) = torch.autograd.grad(delta_rule(*given)[0].sum(), given[0], create_graph=True)
    with pytest.raises(RuntimeError, match="autograd"):
        torch.autograd.grad(grad.sum(), given[1])


def parts(n_chunks, n_states=2, chunk=8, d_key=8, d_value=5):
    def normal(*shape):
        return torch.randn(*shape, device=DEVICE)

    seen, kept = (normal(n_chunks, n_states, chunk, d_key) / 4 for _ in range(2))
    ends = torch.rand(n_chunks, n_states, device=DEVICE)
    return normal(n_chunks, n_states, chunk, d_value), seen, kept, ends, normal(n_states, d_key, d_value)


@pytest.mark.parametrize("n_chunks", [1, 2, 7])
@pytest.mark.parametrize("d_value", [5, 33, 100])
def test_states_pass_as_in_the_reference_and_back(n_chunks, d_value):
    """Backwards all outputs have a gradient, also the states between chunks; columns are those of several programs."""
    own, seen, kept, ends, state = parts(n_chunks, d_value=d_value)
    found = [torch.empty(n_chunks, *state.shape, device=DEVICE), torch.empty_like(own), torch.empty_like(state)]
    delta_fused._pass_state(own, seen, kept, ends, state, None, tuple(found))
    exact = [t.double() for t in (own, seen, kept, ends, state)]
    exact[0].requires_grad_()
    exact[4].requires_grad_()
    wanted = delta_naive.pass_state(*exact)
    for fast, slow in zip(found, wanted, strict=True):
        close(fast, slow)
    to_before, to_corrections, to_last = (torch.randn_like(t) for t in found)
    delta_fused._pass_state(to_corrections, kept, seen, ends, to_last, to_before, tuple(found))
    weights = [t.double() for t in (to_before, to_corrections, to_last)]
    to_own, to_state = torch.autograd.grad(wanted, (exact[0], exact[4]), weights)
    close(found[1], to_own)
    close(found[2], to_state)


def test_nothing_to_pass():
    *tokens, state = inputs(70)
    answers, last = delta_rule(*(t[:0] for t in tokens), state[:0])
    assert (answers.shape, last.shape) == ((0, 70, 3, 5), (0, 3, 8, 5))


def test_the_operators_are_registered_as_pytorch_requires():
    given = [t.requires_grad_() for t in inputs(5, 1, 2)]
    torch.library.opcheck(delta_fused._delta_rule, (*given, 4))
    given = [t.detach() for t in given]
    output, last, *parts = delta_fused._delta_rule(*given, 4)
    torch.library.opcheck(delta_fused._delta_rule_backward, (output, last, *given[:5], *parts))


def test_what_does_not_fit_a_program_is_left_to_the_reference():
    def usable(d_key, d_value, chunk, dtype=torch.float32):
        given = (torch.zeros(1, 2, 1, width, dtype=dtype) for width in (d_key, d_key, d_value))
        return delta_fused.usable(*given, torch.zeros(1, 2, 1), torch.zeros(1, 2, 1), chunk=chunk)

    assert usable(128, 128, 64)
    assert not usable(128, 128, 65)
    assert not usable(64, 64, 64, torch.float64)
    assert not usable(129, 64, 64)
    assert not usable(64, 129, 64)


def test_one_token_needs_no_kernel(monkeypatch):
    monkeypatch.setattr(delta_fused, "delta_rule", None)
    given = inputs(1)
    assert torch.equal(delta_rule(*given)[0], delta_rule_by_tokens(*given)[0])
