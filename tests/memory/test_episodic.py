"""The episodic memory: routed reads equal dense ones, what is scored, what is written, what the write gate learns."""

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cramlab.memory.episodic import EpisodicMemory, EpisodicMemoryConfig
from cramlab.memory.readers import All, Gathered, Nobody, Packed, select_readers
from cramlab.memory.write_gate import SalienceGate
from cramlab.ops import dispatch
from cramlab.ops.read import attention, fused, naive, windows
from cramlab.ops.select.tokens import first_tokens

D = 16
WRITES = ("all", "salience")


def make(**changes):
    return EpisodicMemory(EpisodicMemoryConfig(n_heads=2, **({"capacity": None} | changes)), D)


def example(n_tokens=50, n_batch=3):
    return torch.randn(n_batch, n_tokens, D, requires_grad=True), torch.rand(n_batch, n_tokens)


def written_by(memory, h, gaps, share=0.3):
    writes = None if memory.salience is None else torch.rand(gaps.shape) < share
    return memory.write(h, gaps, memory.initial_buffer(len(h)), writes)


def dense(memory, h, written):
    """Every token against every slot, by the reference implementation."""
    keys, values, _, filled, _ = written.buffer
    given = memory.w_query(h), written.last, keys, values, filled, memory.config.n_heads, memory.config.capacity
    return memory.w_out(naive.attend(*given))


def read(memory, h, reads, written, most=None):
    """Answers of the tokens that read, (B, T, D), and zero elsewhere."""
    readers = select_readers(reads, most)
    return readers.put_onto(memory.read(h, readers, written), torch.zeros_like(h))


def layouts(reads):
    """The same readers in every layout that can hold them."""
    counts = reads.sum(dim=1).tolist()
    yield Gathered(reads, reads.flatten().nonzero().squeeze(-1), counts)
    for more, waits in ((0, True), (0, False), (3, False)):
        yield Packed(reads, first_tokens(reads, max(counts) + more), waits=waits)
    if reads.all():
        yield All(reads)
    if not reads.any():
        yield Nobody(reads)


def gradients(y, weight, inputs):
    found = torch.autograd.grad((y * weight).sum(), inputs, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(inputs, found, strict=True)]


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("capacity", [None, 7])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 1.0])
def test_reads_equal_the_reference_implementation_in_every_layout(write, capacity, share):
    """Outputs and gradients, in a new buffer and in one with entries and empty places, with rows that read nothing."""
    memory = make(write=write, capacity=capacity)
    h, gaps = example(120)
    fresh = memory.initial_buffer(3)
    held = memory.evict(memory.write(h, gaps, fresh, torch.rand(gaps.shape) < 0.05).buffer)
    for buffer in (fresh, type(held)(*(part.detach() for part in held))):
        written = memory.write(h, gaps, buffer, None if write == "all" else torch.rand(gaps.shape) < 0.3)
        reads = (torch.rand(gaps.shape) < share) & memory.can_read(written)
        reads[1] &= share == 1
        slow = torch.where(reads[..., None], dense(memory, h, written), 0.0)
        weight = torch.randn_like(h)
        inputs = [h, *(p for n, p in memory.named_parameters() if "salience" not in n)]
        expected = gradients(slow, weight, inputs)
        for readers in layouts(reads):
            y = readers.put_onto(memory.read(h, readers, written), torch.zeros_like(h))
            assert torch.allclose(y, slow, atol=1e-6)
            for fast, right in zip(gradients(y, weight, inputs), expected, strict=True):
                assert torch.allclose(fast, right, atol=1e-5)


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_use_equals_the_reference_implementation_in_every_layout(write, share, monkeypatch):
    monkeypatch.setattr(attention, "_MOST_WEIGHTS", 1)  # several blocks of readers
    memory = make(write=write, capacity=30)
    h, gaps = example(400, n_batch=2)
    writes = torch.ones(gaps.shape, dtype=torch.bool) if write == "all" else torch.rand(gaps.shape) < 0.5
    written = memory.write(h, gaps, memory.initial_buffer(2), writes)
    asks = (torch.rand(gaps.shape) < share) & memory.can_read(written)
    last, own = written.last.where(asks, -1), written.last.where(writes, -1)
    slow = naive.use(memory.w_query(h), last, own, written.buffer.keys, written.buffer.filled, 2, 30)
    for askers in layouts(asks):
        assert torch.allclose(memory.use(h, askers, writes, written), slow, atol=1e-5)


def test_readers_are_laid_out_for_their_device(monkeypatch):
    some, everyone = torch.rand(3, 40) < 0.5, torch.ones(3, 40, dtype=torch.bool)
    assert [type(select_readers(reads)) for reads in (some, everyone)] == [Gathered, All]
    assert type(select_readers(everyone, 40)) is Packed
    monkeypatch.setattr(dispatch, "few_launches", lambda _: True)
    assert [type(select_readers(reads)) for reads in (some, everyone)] == [Packed, All]


@pytest.mark.parametrize("write", WRITES)
def test_no_parameter_goes_without_a_gradient_when_nobody_reads_or_writes(write):
    memory = make(write=write)
    h, gaps = example(10)
    nobody = torch.zeros(gaps.shape, dtype=torch.bool)
    written = memory.write(h, gaps, memory.initial_buffer(3), nobody)
    for readers in layouts(nobody):
        memory.zero_grad()
        readers.put_onto(memory.read(h, readers, written), torch.zeros_like(h)).sum().backward(retain_graph=True)
        assert all(p.grad is not None for n, p in memory.named_parameters() if "salience" not in n)


def counted_scores(monkeypatch):
    """(readers, places) of every computation of scores, in tiles or by PyTorch's kernel."""
    seen = []
    tiled, in_one = windows.score, F.scaled_dot_product_attention

    def counting(q, k):
        seen.append((q.shape[1], k.shape[1]))
        return tiled(q, k)

    def counting_in_one(q, k, *args, **kwargs):
        seen.append((q.shape[0] * q.shape[2], k.shape[2]))
        return in_one(q, k, *args, **kwargs)

    monkeypatch.setattr(windows, "score", counting)
    monkeypatch.setattr(F, "scaled_dot_product_attention", counting_in_one)
    return seen


@pytest.mark.parametrize("write", WRITES)
def test_only_readers_are_scored(monkeypatch, write):
    memory = make(write=write)
    h, gaps = example(400)
    written = written_by(memory, h, gaps)
    reads = (torch.rand(gaps.shape) < 0.3) & memory.can_read(written)
    monkeypatch.setattr(windows, "_WORTH_A_TILE", float("inf"))  # one tile, so that each reader counts once
    seen = counted_scores(monkeypatch)
    read(memory, h, reads, written)
    reads_frac = reads.float().mean().item()
    assert sum(readers for readers, _ in seen) == round(reads_frac * reads.numel())


@pytest.mark.parametrize("write", WRITES)
def test_readers_are_scored_only_against_what_they_see(monkeypatch, write):
    memory = make(write=write)
    h, gaps = example(2000)
    written = written_by(memory, h, gaps)
    reads = (torch.rand(gaps.shape) < 0.3) & memory.can_read(written)
    seen = counted_scores(monkeypatch)
    read(memory, h, reads, written)
    scored = sum(readers * places for readers, places in seen)
    visible = int((written.last[reads] + 1).sum())
    everything = int(reads.sum()) * written.buffer.n_places
    assert visible <= scored < 0.7 * everything  # the prefix is half of the buffer on average, plus the tiles' ends


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("most", [None, 200])
def test_the_fused_kernel_is_given_the_readers_and_no_others(monkeypatch, write, most):
    memory = make(write=write, capacity=30)
    h, gaps = example(400)
    asked = []

    def attend(q, last, *others):
        asked.append((last >= 0).sum(dim=1))
        return naive.attend(q, last, *others)

    fresh = memory.initial_buffer(3)
    held = memory.evict(memory.write(h, gaps, fresh, torch.rand(gaps.shape) < 0.05).buffer)
    for buffer in (fresh, held):
        writes = torch.rand(gaps.shape) < 0.3
        written = memory.write(h, gaps, buffer, writes)
        reads = (torch.rand(gaps.shape) < 0.3) & memory.can_read(written)
        if write == "all":  # what is not written there is padding, which does not read
            reads &= writes
        expected = read(memory, h, reads, written)
        with monkeypatch.context() as patched:
            patched.setattr(dispatch, "few_launches", lambda _: True)
            patched.setattr(fused, "attend", attend)
            patched.setattr(fused, "usable", lambda *_: True)
            found = read(memory, h, reads, written, most)
        assert torch.equal(asked.pop(), reads.sum(dim=1))
        assert torch.allclose(found, expected, atol=1e-6)


def test_a_bounded_buffer_is_scored_within_its_bound(monkeypatch):
    memory = make(capacity=20)
    h, gaps = example(400)
    reads = torch.zeros(gaps.shape, dtype=torch.bool)
    reads[:, 200:232] = True
    written = written_by(memory, h, gaps)
    seen = counted_scores(monkeypatch)
    read(memory, h, reads, written)
    assert sum(places for _, places in seen) == 3 * (20 + 31)


def test_counted_flops_fall_with_the_routed_share():
    memory = make()
    h, gaps = example(512, n_batch=1)
    counts = []
    for share in (1.0, 0.5, 0.1, 0.0):
        reads = torch.arange(512)[None] % 512 < int(512 * share)
        reads = reads[:, torch.randperm(512)]
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            read(memory, h, reads, memory.write(h, gaps, memory.initial_buffer(1), None))
        counts.append(counter.get_total_flops() - 2 * 2 * D * D * 512)  # less keys and values
    assert counts[0] > 1.7 * counts[1]
    assert counts[1] > 3 * counts[2]
    assert counts[3] == 0


@pytest.mark.parametrize("n_batch", [1, 3])
@pytest.mark.parametrize("spare", [0, 5])
def test_a_bound_on_what_is_written_or_read_changes_no_answer(n_batch, spare):
    memory = make(write="salience", capacity=9)
    h, gaps = example(60, n_batch)
    state = memory.evict(written_by(memory, h, gaps).buffer)
    for buffer in (memory.initial_buffer(n_batch), state):
        writes = torch.rand(gaps.shape) < 0.3
        most = int(writes.sum(dim=1).max()) + spare
        exact, bounded = (memory.write(h, gaps, buffer, writes, most=m) for m in (None, most))
        assert torch.equal(memory.can_read(exact), memory.can_read(bounded))
        reads = (torch.rand(gaps.shape) < 0.4) & memory.can_read(exact)
        most = int(reads.sum(dim=1).max()) + spare
        answers = read(memory, h, reads, exact), read(memory, h, reads, bounded, most)
        assert torch.allclose(*answers, atol=1e-6)
        kept = [memory.evict(written.buffer) for written in (exact, bounded)]
        assert torch.equal(kept[0].filled, kept[1].filled)
        there = kept[0].filled
        assert torch.equal(kept[0].n_written, kept[1].n_written)
        parts = zip(kept[0][:4], kept[1][:4], strict=True)
        assert all(torch.allclose(a[there], b[there], atol=1e-6) for a, b in parts)


def test_what_exceeds_a_bound_is_neither_written_nor_read():
    memory = make(write="salience")
    h, gaps = example(20)
    all_of_them, first = torch.ones(3, 20, dtype=torch.bool), torch.arange(20) < 8
    bounded = memory.write(h, gaps, memory.initial_buffer(3), all_of_them, most=8)
    exact = memory.write(h, gaps, memory.initial_buffer(3), all_of_them & first)
    assert torch.equal(bounded.buffer.filled, exact.buffer.filled)
    assert torch.equal(bounded.last, exact.last)
    y = read(memory, h, all_of_them, bounded, most=8)
    assert torch.allclose(y, read(memory, h, all_of_them & first, exact), atol=1e-6)


def test_what_is_known_of_a_buffer_without_looking_is_so():
    for write in WRITES:
        for n_batch in (1, 3):
            memory = make(write=write, capacity=5)
            h, gaps = example(30, n_batch)
            written = written_by(memory, h, gaps)
            assert written.gapless
            assert written.full == (write == "all" or n_batch == 1)
            assert not written.full or written.buffer.filled.all()
            places = torch.arange(written.buffer.n_places)
            assert (written.buffer.filled | (places > written.last[:, -1:])).all()
            known, seen = (memory.evict(written.buffer, full=full) for full in (written.full, False))
            assert all(torch.equal(a, b) for a, b in zip(known, seen, strict=True))
            again = memory.write(h, gaps, seen, torch.rand(gaps.shape) < 0.5)
            assert not again.gapless  # an empty place may lie in between


def test_only_what_is_written_gets_keys_and_values():
    memory = make(write="salience")
    h, gaps = example(100, n_batch=4)
    for share in (0.0, 0.1, 1.0):
        writes = torch.rand(gaps.shape) < share
        with FlopCounterMode(display=False) as counter:
            written = memory.write(h, gaps, memory.initial_buffer(4), writes)
        assert counter.get_total_flops() == 2 * 2 * D * D * int(writes.sum())
        buffer = written.buffer
        assert buffer.n_places == int(writes.sum(dim=1).max())
        assert torch.equal(buffer.filled.sum(dim=1), writes.sum(dim=1))
        for b in range(4):
            assert torch.allclose(buffer.keys[b, buffer.filled[b]], memory.w_key(h[b, writes[b]]), atol=1e-6)


@pytest.mark.parametrize("write", WRITES)
def test_a_buffer_holds_its_newest_entries_in_stated_bytes(write):
    memory = make(write=write, capacity=8)
    state = memory.initial_buffer(3)
    for _ in range(5):
        h, gaps = example(11)
        state = memory.evict(written_by(memory, h, gaps, share=0.9).buffer)
    assert state.n_places == 8
    assert state.n_bytes == 3 * (8 * (2 * D * 4 + 4 + 1) + 8)


def test_nothing_is_copied_when_nothing_is_written():
    memory = make(write="salience", capacity=8)
    h, gaps = example(20)
    state = memory.evict(written_by(memory, h, gaps).buffer)
    nobody = torch.zeros(3, 1, dtype=torch.bool)
    with torch.no_grad():
        after = memory.evict(memory.write(h[:, :1], gaps[:, :1], state, nobody).buffer)
    assert after.keys.data_ptr() == state.keys.data_ptr()
    assert torch.allclose(after.times, state.times + gaps[:, :1])


@pytest.mark.parametrize("write", WRITES)
def test_use_is_the_squared_weight_that_others_gave(write):
    memory = make(write=write)
    h, gaps = example(30, n_batch=2)
    writes = torch.rand(gaps.shape) < 0.5
    writes = writes if write == "salience" else torch.ones_like(writes)
    written = memory.write(h, gaps, memory.initial_buffer(2), writes)
    asks = torch.rand(gaps.shape) < 0.4
    use = memory.use(h, select_readers(asks & memory.can_read(written)), writes, written)
    slow = torch.zeros_like(use)
    for b in range(2):
        entries = writes[b].nonzero().flatten().tolist()
        for t in asks[b].nonzero().flatten().tolist():
            seen = [s for s in entries if s <= t]
            for head in range(2) if seen else ():
                part = slice(head * D // 2, (head + 1) * D // 2)
                q = memory.w_query(h[b, t])[part]
                k = torch.stack([memory.w_key(h[b, s])[part] for s in seen])
                for i, w in enumerate(torch.softmax(k @ q / (D // 2) ** 0.5, dim=0)):
                    if seen[i] != t:
                        slow[b, i] += w**2 / 2
    assert torch.allclose(use, slow, atol=1e-5)


def test_the_write_gate_learns_what_will_be_asked_for():
    """Tokens of one kind are keys that later tokens ask for, of the other kind nobody's business."""
    d = 64
    memory = EpisodicMemory(EpisodicMemoryConfig(n_heads=1, write="salience"), d)
    with torch.no_grad():
        for w in (memory.w_query, memory.w_key):
            w.weight.copy_(2 * torch.eye(d))
    optimizer = torch.optim.Adam(memory.salience.parameters(), lr=0.02)
    asked = torch.zeros(8, 60, dtype=torch.bool)
    asked[:, :10] = True  # then 40 others, then 10 that ask for the first
    asks = torch.zeros_like(asked)
    asks[:, 50:] = True
    mark = F.one_hot(torch.tensor(0), d)
    for _ in range(150):
        things = torch.randn(8, 60, d)
        things[:, 50:] = things[:, :10]
        things[..., 0] = 0
        h = things + 3 * asked[..., None] * mark
        written = memory.write(h, torch.ones(8, 60), memory.initial_buffer(8), torch.ones_like(asked))
        logit = memory.salience(h)
        loss = memory.salience_loss(logit, h, select_readers(asks), torch.ones_like(asked), written)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    keeps = logit > 0
    assert keeps[:, :10].float().mean() > 0.95
    assert keeps[:, 10:].float().mean() < 0.1


def test_a_fresh_gate_writes_everything_and_does_not_shape_its_input():
    gate = SalienceGate(D)
    h = torch.randn(2, 50, D, requires_grad=True)
    logit = gate(h)
    assert (logit > 0).float().mean() > 0.95
    gate.loss(logit, torch.rand(2, 50), 0.1, torch.rand(2, 50) < 0.5).backward()
    assert h.grad is None


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"write": "novel"}, "episodic.write "),
        ({"write_price": 0.0}, "episodic.write_price"),
        ({"write_audit_frac": 2.0}, "episodic.write_audit_frac"),
    ],
)
def test_bad_write_rules_are_refused_by_name(changes, field):
    with pytest.raises(ValueError, match=field):
        EpisodicMemoryConfig(**changes)


@pytest.mark.parametrize("n_batch", [1, 2])
def test_without_a_bound_and_without_a_kernel_hardly_more_is_scored_than_is_seen(n_batch, monkeypatch):
    """On an accelerator: not all places for all readers, which may be too large to hold."""
    monkeypatch.setattr(dispatch, "few_launches", lambda _: True)
    memory = EpisodicMemory(EpisodicMemoryConfig(n_heads=2), D)
    h, gaps = torch.randn(n_batch, 90, D), torch.rand(n_batch, 90)
    written = written_by(memory, h, gaps)
    seen = counted_scores(monkeypatch)
    read(memory, h, torch.rand(gaps.shape) < 0.5, written)
    assert len(seen) > 1
    assert seen[0][1] < 90
