"""The rows of the benchmark: what is timed against what, at which lengths."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from benchmarks.timing import as_graphs, core_ms, cuda_ms, side_by_side
from cramlab.baselines import TransformerConfig
from cramlab.memory import CRAMConfig, CRAMLayer, CRAMState, EpisodicMemoryConfig
from cramlab.memory.buffer import Buffer, Written
from cramlab.memory.decode import Decoder, GraphDecoder
from cramlab.memory.episodic import EpisodicMemory
from cramlab.memory.readers import select_readers
from cramlab.mixer import Bounds, Routing
from cramlab.model import Block, ModelConfig
from cramlab.ops import dispatch
from cramlab.ops.read import attention, fused
from cramlab.ops.scan import naive
from cramlab.ops.scan.decay import decay_scan

D, N_HEADS, READ_FRAC, WRITE_FRAC = 256, 4, 0.016, 0.1
RING = 3072  # slots of a decoding layer: as many as a tenth of 30,720 tokens fills
Row = dict[str, Any]


class Where(NamedTuple):
    """Device and type of the numbers."""

    device: torch.device = torch.device("cpu")
    dtype: torch.dtype = torch.float32

    @property
    def on_cpu(self) -> bool:
        """Where a long call takes seconds."""
        return self.device.type == "cpu"

    def rand(self, *shape: int) -> Tensor:
        """Normal numbers."""
        return torch.randn(*shape, device=self.device, dtype=self.dtype)

    def put(self, module: torch.nn.Module) -> Any:
        """The module, there."""
        return module.to(self.device, self.dtype)


CPU = Where()


def dense_kernel(where: Where) -> str:
    """The kernel of PyTorch that causal attention uses there, with the heads of these rows."""
    q = where.rand(1, N_HEADS, 64, D // N_HEADS)
    return SDPBackend(torch._fused_sdp_choice(q, q, q, is_causal=True)).name


def repeats_at(n_tokens: int, where: Where = CPU) -> int:
    """Number of repeats: fewer where one call takes seconds."""
    if not where.on_cpu:
        return 21
    return 15 if n_tokens <= 2048 else 7 if n_tokens <= 8192 else 3 if n_tokens <= 32768 else 1


def n_some(n_tokens: int, share: float) -> int:
    """Number of tokens that a share of them is, at least one."""
    return max(1, round(share * n_tokens))


def some(n_tokens: int, share: float, where: Where = CPU, n_batch: int = 1) -> Tensor:
    """Random tokens, always the same number of them, bool (B, N)."""
    chosen = torch.zeros(n_batch, n_tokens, dtype=torch.bool)
    for row in chosen:
        row[torch.randperm(n_tokens)[: n_some(n_tokens, share)]] = True
    return chosen.to(where.device)


def episodic(write: str, where: Where = CPU) -> EpisodicMemory:
    """An episodic memory that keeps everything that is written."""
    config = EpisodicMemoryConfig(n_heads=N_HEADS, capacity=None, write=write)  # type: ignore[arg-type]
    return where.put(EpisodicMemory(config, D))


def row(what: str, n_tokens: int, ways: dict[str, Callable[[], Any]], where: Where = CPU, **more: Any) -> Row:
    """Times the ways at one length."""
    found = side_by_side(
        ways,
        repeats=repeats_at(n_tokens, where),
        warmups=(1 if n_tokens <= 16384 else 0) if where.on_cpu else 3,
        clock=core_ms if where.on_cpu else cuda_ms,
    )
    return {"what": what, "n_tokens": n_tokens, "ways": found} | more


@torch.no_grad()
def scores(lengths: list[int], shares: tuple[float, ...] = (READ_FRAC,), where: Where = CPU) -> Iterator[Row]:
    """Times scores and weighted sums alone, over a full buffer."""
    for n in lengths:
        q, k, v = (where.rand(1, n, D) for _ in range(3))
        buffer = full_buffer(k, v)
        for share in shares:
            readers = select_readers(some(n, share, where))
            asked = readers.take(q)
            written = Written(buffer, torch.arange(n, device=where.device)[None], gapless=True, full=True)

            def routed(with_kernel: bool, given: Any = (readers, asked, written)) -> Tensor:
                readers, asked, written = given
                with dispatch.switched(with_kernel):
                    return readers.attend(asked, written, N_HEADS, None)

            ways: dict[str, Callable[[], Any]] = {
                "dense": lambda q=q, k=k, v=v: attention.dense(q, k, v, N_HEADS, causal=True),
                "routed": lambda routed=routed: routed(True),
            }
            if fused.usable(q, N_HEADS):
                ways["routed, without the fused kernel"] = lambda routed=routed: routed(False)
            yield row("scores only, full buffer", n, ways, where, read_frac=share)


def full_buffer(keys: Tensor, values: Tensor) -> Buffer:
    """A buffer with all slots filled."""
    nothing = torch.zeros(keys.shape[:2], device=keys.device)
    n_written = torch.full((len(keys),), keys.shape[1], device=keys.device)
    return Buffer(keys=keys, values=values, times=nothing, filled=nothing == 0, n_written=n_written)


@torch.no_grad()
def tier(lengths: list[int], where: Where = CPU, n_batch: int = 1) -> Iterator[Row]:
    """Times episodic memory with all projections, a tenth of the tokens written; reads replace a copy of the tokens.

    On an accelerator also as CUDA graphs, for which the numbers of readers and of entries are bounded beforehand, a
    quarter above the actual ones.
    """
    dense, routed = where.put(TransformerConfig(n_heads=N_HEADS).build(D)), episodic("salience", where)
    for n in lengths:
        h, gaps = where.rand(n_batch, n, D), torch.ones(n_batch, n, device=where.device)
        reads, writes = some(n, READ_FRAC, where, n_batch), some(n, WRITE_FRAC, where, n_batch)
        bounds = tuple(-(-5 * n_some(n, share) // 4) for share in (WRITE_FRAC, READ_FRAC))

        def everybody(h: Tensor = h) -> Tensor:
            return dense.w_out(attention.dense(*dense.w_qkv(h).chunk(3, dim=-1), N_HEADS, causal=True))

        def go(most: tuple[int | None, ...] = (None, None), given: Any = (h, gaps, reads, writes)) -> Tensor:
            h, gaps, reads, writes = given
            written = routed.write(h, gaps, routed.initial_buffer(len(h)), writes, most=most[0])
            readers = select_readers(reads & routed.can_read(written), most[1])
            return readers.put_onto(routed.read(h, readers, written), h)

        difference = float((go() - go(bounds)).abs().max())
        ways: dict[str, Callable[[], Any]] = {"dense": everybody, "routed": go}
        more: dict[str, Any] = {"n_batch": n_batch, "read_frac": READ_FRAC, "write_frac": WRITE_FRAC}
        more |= with_graphs(ways, {"dense": everybody, "routed": functools.partial(go, bounds)}, where)
        yield row("episodic tier with projections", n, ways, where, difference_with_bounds=difference, **more)


def cram_block(x: Tensor, read_frac: float = READ_FRAC, write: str = "salience", capacity: int | None = None) -> Block:
    """A block whose gates let the stated shares of x pass."""
    memory = EpisodicMemoryConfig(n_heads=N_HEADS, write=write, capacity=capacity)  # type: ignore[arg-type]
    config = CRAMConfig(episodic=memory)
    block = Block(ModelConfig(mixer=config, d_model=D, d_mlp=4 * D), config).eval().to(x.device, x.dtype)
    layer = block.mixer
    assert isinstance(layer, CRAMLayer)
    with torch.no_grad():
        for gate in (layer.gate, layer.episodic.salience):
            if gate is not None:
                torch.nn.init.normal_(gate.out.weight)
        x = block.mixer_norm(x)
        h = layer.norm(layer.working(x, torch.ones_like(x[..., 0]), layer.working.initial_state(len(x)))[0])
        logit = layer.gate(h, layer.semantic.recognise(h)).float()
        layer.gate.out.bias -= logit.quantile(1 - read_frac) / layer.gate.gain
        if layer.episodic.salience is not None:
            layer.episodic.salience.out.bias -= layer.episodic.salience(h).float().quantile(1 - WRITE_FRAC)
    return block


def transformer_block(where: Where = CPU) -> Block:
    """The control of equal width."""
    config = TransformerConfig(n_heads=N_HEADS)
    return where.put(Block(ModelConfig(mixer=config, d_model=D, d_mlp=4 * D), config).eval())


def forward(block: Block, x: Tensor, routing: Routing | None = None) -> tuple[Tensor, Any]:
    """A block's output and what its mixer returned."""
    mixed = block.mix(x, torch.ones(x.shape[:2], device=x.device), None, None, routing)
    return block.finish(x, mixed.y), mixed


def answer(block: Block, x: Tensor, routing: Routing | None = None) -> Tensor:
    """The output of a block, without what its mixer returned."""
    return forward(block, x, routing)[0]


@torch.no_grad()
def bounded(block: Block, x: Tensor, routing: Routing | None = None) -> Routing:
    """The same call with reads and writes bounded a quarter above those of its busiest sequence.

    Raises:
        ValueError: when another call, with writes audited by another chance, would come to these bounds.
    """
    routing = routing or Routing()
    done, again = (forward(block, x, routing)[1].trace for _ in range(2))
    most = Bounds(*(-(-5 * max(1, _most(chosen)) // 4) for chosen in (done.scored, done.written)))
    if _most(again.scored) > most.reads or _most(again.written) > most.writes:
        raise ValueError(f"bounds {most} are too narrow for {_most(again.scored)} reads, {_most(again.written)} writes")
    return routing._replace(bounds=most)


def _most(chosen: Tensor | None) -> int:
    """Largest number in any sequence of (B, T)."""
    assert chosen is not None
    return int(chosen.sum(dim=1).max())


def with_graphs(ways: dict[str, Callable[[], Any]], works: dict[str, Callable[[], Any]], where: Where) -> Row:
    """Adds to `ways` the calls that can be recorded as graphs; returns the errors of the others."""
    if where.on_cpu:
        return {}
    graphs, failed = as_graphs(works)
    ways.update(graphs)
    return failed


def loss(block: Block, x: Tensor, routing: Routing | None = None) -> Tensor:
    """Sum of all losses of a routed phase, without the model's own."""
    y, mixed = forward(block, x, routing)
    total = y.square().mean() + sum(mixed.aux.values())
    return total if mixed.trace.gate_logit is None else total + mixed.trace.gate_logit.square().mean()


def train(block: Block, x: Tensor, routing: Routing | None = None, go: Callable[..., Tensor] = loss) -> None:
    """Gradients of that loss."""
    torch.autograd.grad(go(block, x, routing), [x, *block.parameters()], allow_unused=True)


@torch.no_grad()
def layer_forward(lengths: list[int], where: Where = CPU, n_batch: int = 1) -> Iterator[Row]:
    """Times norm, mixer, norm and MLP of width 4 d, all gates on; on an accelerator also as bounded CUDA graphs."""
    control = transformer_block(where)
    for n in lengths:
        x = where.rand(n_batch, n, D)
        ours = cram_block(x)
        trace = forward(ours, x)[1].trace
        ways: dict[str, Callable[[], Any]] = {
            "transformer": lambda x=x: forward(control, x),
            "cram": lambda x=x, ours=ours: forward(ours, x),
        }
        shares = {"read_frac": float(trace.scored.float().mean()), "write_frac": float(trace.written.float().mean())}
        few = bounded(ours, x)
        works = ways | {"cram": lambda x=x, ours=ours, few=few: forward(ours, x, few)}
        more = with_graphs(ways, works, where)
        yield row("whole layer, forward", n, ways, where, n_batch=n_batch, **shares, **more)


def training_step(lengths: list[int], where: Where = CPU, n_batch: int = 1) -> Iterator[Row]:
    """Times forward and backward of a block; ours in a routed phase, without audits and with a tenth audited.

    On an accelerator also as CUDA graphs, bounded.
    """
    control = transformer_block(where).train()
    for n in lengths:
        x = where.rand(n_batch, n, D).requires_grad_()
        ours = cram_block(x.detach())
        with torch.no_grad():
            trace = forward(ours, x)[1].trace
        shares = {"read_frac": float(trace.scored.float().mean()), "write_frac": float(trace.written.float().mean())}
        ours.train()
        audits = some(n, 0.1, where, n_batch)
        ways: dict[str, Callable[[], Any]] = {
            "transformer": functools.partial(train, control, x),
            "cram": functools.partial(train, ours, x),
            "cram, a tenth audited": functools.partial(train, ours, x, Routing(audits=audits)),
        }
        works = ways | {
            "cram": functools.partial(train, ours, x, bounded(ours, x)),
            "cram, a tenth audited": functools.partial(train, ours, x, bounded(ours, x, Routing(audits=audits))),
        }
        failed = with_graphs(ways, works, where)
        yield row("layer, training step", n, ways, where, n_batch=n_batch, **shares, **failed)


@torch.no_grad()
def decode(contexts: list[int], n_layers: int = 4, n_steps: int = 30, where: Where = CPU) -> Iterator[Row]:
    """Times one token at a time after a context: the layers of transformers' Llama with its cache, and ours."""
    from transformers import DynamicCache, LlamaConfig, LlamaModel

    sizes = LlamaConfig(
        hidden_size=D,
        intermediate_size=4 * D,
        num_hidden_layers=n_layers,
        num_attention_heads=N_HEADS,
        num_key_value_heads=N_HEADS,
        vocab_size=8,
        max_position_embeddings=1 << 17,
    )
    llama = where.put(LlamaModel(sizes).eval())
    x = where.rand(1, 2048, D)
    blocks = [cram_block(x, capacity=RING) for _ in range(n_layers)]
    gaps = torch.ones(1, device=where.device, dtype=where.dtype)
    for context in contexts:
        cache = DynamicCache(config=llama.config)
        for i in range(n_layers):
            cache.update(*(where.rand(1, N_HEADS, context, D // N_HEADS) for _ in range(2)), i)
        held = min(round(WRITE_FRAC * context), RING)
        states = [
            CRAMState(
                working=_layer(block).working.initial_state(1),
                buffer=full_buffer(where.rand(1, held, D), where.rand(1, held, D)),
            )
            for block in blocks
        ]
        decoders = [Decoder(_layer(block), state) for block, state in zip(blocks, states, strict=True)]

        def theirs(cache: Any = cache) -> None:
            for t in range(n_steps):
                llama(inputs_embeds=x[:, t : t + 1], past_key_values=cache)
            cache.crop(-n_steps)

        def ours(decoders: list[Decoder] = decoders) -> None:
            for t in range(n_steps):
                cram_token(blocks, decoders, x[:, t], gaps)

        bytes_ = {
            "llama": n_layers * 2 * D * context * where.dtype.itemsize,
            "cram": sum(decoder.n_bytes for decoder in decoders),
        }
        ways, more = {"llama": theirs, "cram": ours}, {}
        if not where.on_cpu:
            token = x[:, 0].clone()
            graphs, more = as_graphs(steps_in_place(llama, blocks, states, token, context))
            for name, replay in graphs.items():
                ways[name] = functools.partial(replayed, replay, token, x[:, :n_steps])
        clock = core_ms if where.on_cpu else cuda_ms
        found = side_by_side(ways, repeats=3 if where.on_cpu else 11, clock=clock)
        yield {
            "what": "decode", "n_tokens": context, "ways": found, "n_steps": n_steps, "state_bytes": bytes_,
            "read_frac": READ_FRAC,
        } | more  # fmt: skip


def replayed(replay: Callable[[], Any], token: Tensor, x: Tensor) -> None:
    """A graph that reads `token`, for one token of x (B, N, D) after another."""
    for now in x.unbind(1):
        token.copy_(now)
        replay()


def _layer(block: Block) -> CRAMLayer:
    assert isinstance(block.mixer, CRAMLayer)
    return block.mixer


def cram_token(blocks: list[Block], decoders: list[Any], x: Tensor, gaps: Tensor) -> Tensor:
    """One token (B, D) through blocks whose mixers decode."""
    for block, decoder in zip(blocks, decoders, strict=True):
        x = block.finish(x, decoder.step(block.mixer_input(x), gaps))
    return x


def steps_in_place(
    llama: Any, blocks: list[Block], states: list[CRAMState], token: Tensor, context: int
) -> dict[str, Callable[[], Tensor]]:
    """One token (1, D) through both models, by name, in ways that never wait for the device, as a graph needs it.

    The Llama's cache is given every advantage: it copies nothing, and each step is one at that very context.
    """
    cache, gaps = cache_in_place(llama, token, context), torch.ones_like(token[:, 0])
    decoders = [GraphDecoder(_layer(block), state) for block, state in zip(blocks, states, strict=True)]

    def theirs() -> Tensor:
        return llama(inputs_embeds=token[:, None], past_key_values=cache).last_hidden_state[:, 0]

    return {"llama, in place": theirs, "cram": lambda: cram_token(blocks, decoders, token, gaps)}


def cache_in_place(llama: Any, like: Tensor, context: int) -> Any:
    """A cache of transformers with `n` entries and one more slot, which every step overwrites."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    class InPlaceLayer(DynamicLayer):
        def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
            self.keys[:, :, -1:], self.values[:, :, -1:] = key_states, value_states
            return self.keys, self.values

        def get_seq_length(self) -> int:
            return self.keys.shape[-2] - 1

    cache = DynamicCache(config=llama.config)
    for i in range(llama.config.num_hidden_layers):
        layer, shape = InPlaceLayer(), (1, N_HEADS, context + 1, D // N_HEADS)
        layer.lazy_initialization(like, like)
        layer.keys, layer.values = (like.new_empty(shape).normal_() for _ in range(2))
        cache.layers[i] = layer
    return cache


def cumulative_sum_scan(u: Tensor, gaps: Tensor, rates: Tensor, state: Tensor) -> Tensor:
    """Divides by the decay, sums, and multiplies again; even in double precision right only for short time spans."""
    clock = (gaps.double().cumsum(dim=1)[..., None] * rates.double())[..., None]
    return ((u.double() * clock.exp()).cumsum(dim=1) + state[:, None].double()).mul((-clock).exp()).float()


def associative_scan(u: Tensor, gaps: Tensor, rates: Tensor, state: Tensor) -> Tensor:
    """Doubling: after i rounds each token has summed over the 2^i before it."""
    decay = torch.exp(-rates * gaps[..., None])[..., None]
    s = torch.cat([u[:, :1] + decay[:, :1] * state[:, None], u[:, 1:]], dim=1)
    reach = 1
    while reach < s.shape[1]:
        s = torch.cat([s[:, :reach], s[:, reach:] + decay[:, reach:] * s[:, :-reach]], dim=1)
        decay = torch.cat([decay[:, :reach], decay[:, reach:] * decay[:, :-reach]], dim=1)
        reach *= 2
    return s


@torch.no_grad()
def scan(lengths: list[int]) -> Iterator[Row]:
    """Times the recurrence of the working memory, 8 timescales of 8 channels; errors are against a loop in float64."""
    rates = torch.logspace(0, -3, 8)
    for n in lengths:
        u, gaps, state = torch.randn(1, n, 8, 8), torch.rand(1, n) * 2, torch.zeros(1, 8, 8)
        given = (u, gaps, rates, state)
        ways = {
            "loop": lambda given=given: naive.decay_scan(*given),
            "cumulative sum": lambda given=given: cumulative_sum_scan(*given),
            "associative": lambda given=given: associative_scan(*given),
            "chunks of chunks (ours)": lambda given=given: decay_scan(*given)[0],
        }
        exact = naive.decay_scan(*(t.double() for t in given))
        errors = {name: float((way() - exact).abs().max()) for name, way in ways.items()}
        errors = {name: error if error == error and error < 1e30 else None for name, error in errors.items()}
        yield row("working memory scan", n, ways, max_error=errors)
