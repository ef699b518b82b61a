"""The CRAM layer: working, episodic and semantic memory, wired by a router (paper sec. 4)."""

from __future__ import annotations

from dataclasses import field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cramlab.config import ConfigError, Size, checked
from cramlab.memory.buffer import Buffer, Written
from cramlab.memory.consolidation import consolidation_loss, consolidation_sums, quality
from cramlab.memory.cost import CostedLayer, cram_cost
from cramlab.memory.delta import DeltaMemoryConfig
from cramlab.memory.episodic import EpisodicMemory, EpisodicMemoryConfig
from cramlab.memory.readers import All, Nobody, Readers, select_readers
from cramlab.memory.router import BenefitGate, GumbelRouter, RouterConfig, chance, gumbel_weights
from cramlab.memory.semantic import AdapterConfig, Nothing, SemanticConfig
from cramlab.memory.window import window_answers
from cramlab.memory.working import NoWorkingMemory, WorkingMemoryConfig
from cramlab.mixer import Bounds, Cost, Mixer, MixerOutput, Path, Routing, Trace, check_state, checked_inputs
from cramlab.ops.select.tokens import running_sum
from cramlab.ranks import count_over_ranks


@checked("model.mixer")
class CRAMConfig:
    """Config of a CRAM layer. The defaults are our best; `CRAMConfig.paper()` is the layer of the paper.

    Attributes:
        working: `WorkingMemoryConfig` (leaky integrators), `DeltaMemoryConfig` (a gated delta rule), or None: the token
            itself, an ablation.
        episodic: config of the buffer and its attention.
        semantic: `AdapterConfig`, `SlotsConfig` or `NothingConfig`.
        router: config of the router, which decides which memory is used.
        window: every token attends to this many of the newest entries, and a benefit gate sees the answer; a token
            that reads sees all entries instead. None: a token that does not read attends to none.
    """

    working: WorkingMemoryConfig | DeltaMemoryConfig | None = field(default_factory=WorkingMemoryConfig)
    episodic: EpisodicMemoryConfig = field(default_factory=EpisodicMemoryConfig)
    semantic: SemanticConfig = field(default_factory=AdapterConfig)
    router: RouterConfig = field(default_factory=RouterConfig)
    window: Size | None = None

    def __post_init__(self) -> None:
        """Each error names the field, the value and the fix."""
        if self.window is None:
            return
        capacity = self.episodic.capacity
        if capacity is not None and self.window > capacity:
            raise ConfigError(
                f"model.mixer.window = {self.window} exceeds model.mixer.episodic.capacity = {capacity}; "
                "change one of them"
            )
        if self.router.name == "gumbel":
            raise ConfigError(
                f'model.mixer.window = {self.window} is of no use with the router "gumbel", with which every token '
                "reads; leave it out"
            )

    @classmethod
    def paper(cls) -> CRAMConfig:
        """Adapter of rank d_model / 16 and Gumbel router, to be trained with Eq. 8. See docs/method.md."""
        return cls(semantic=AdapterConfig(rank=None), router=RouterConfig(name="gumbel", d_hidden=32))

    def build(self, d_model: int) -> CRAMLayer:
        """A newly initialised layer."""
        return CRAMLayer(self, d_model)


class CRAMState(NamedTuple):
    """State between calls: that of the working memory, and the episodic buffer."""

    working: Tensor
    buffer: Buffer


class CRAMLayer(Mixer):
    """Three memories and a router.

    The working memory gives an output for every token and computes h. With every router but `gumbel`, the output adds
    to it either
    a read of the buffer or the semantic output, to which a window adds its own (ours). With `gumbel` the output is the
    sum of the three outputs weighted by pi, and all three memories see x itself (paper).
    """

    def __init__(self, config: CRAMConfig, d_model: int) -> None:
        super().__init__()
        self.config, self.d_model = config, d_model
        self.working = NoWorkingMemory() if config.working is None else config.working.build(d_model)
        self.norm = nn.LayerNorm(d_model, bias=False)
        self.episodic = EpisodicMemory(config.episodic, d_model)
        self.semantic = config.semantic.build(d_model)
        if config.router.name == "benefit":
            self.gate = BenefitGate(config.router, d_model, self.semantic.rank + (d_model if config.window else 0))
        elif config.router.name == "gumbel":
            self.gumbel = GumbelRouter(config.router, d_model)

    def forward(
        self,
        x: Tensor,
        gaps: Tensor,
        state: CRAMState | None = None,
        *,
        valid: Tensor | None = None,
        routing: Routing | None = None,
    ) -> MixerOutput:
        """Implements `Mixer.forward`.

        In training, `aux` holds "consolidation" (Eq. 5) unless there is no semantic memory, "salience" if a gate
        decides on writes, and for `gumbel` the router terms of Eq. 8.

        Raises:
            ValueError: if the shapes of x and gaps do not fit, if a valid token has a gap that is negative or not
                finite (not checked in compiled code or while a CUDA graph is recorded), or for impossible bounds.
        """
        x, gaps = checked_inputs(x, gaps, valid, self.d_model)
        check_state(state, CRAMState, x.shape[0])
        routing = self._bounded(routing or Routing(), x)
        bounds = routing.bounds
        if state is None:
            n_batch = x.shape[0]
            state = CRAMState(self.working.initial_state(n_batch, x), self.episodic.initial_buffer(n_batch, x))
        working, hidden, working_state = self.working(x, gaps, state.working, valid)
        without: Tensor | None = None
        h = x if self.config.router.name == "gumbel" else self.norm(working)
        salience = None if self.episodic.salience is None else self.episodic.salience(h)
        writes = self._writes(salience, valid, routing)
        written = self.episodic.write(
            h, gaps, state.buffer, writes, most=None if bounds is None or salience is None else bounds.writes
        )
        if self.config.router.name == "gumbel":
            y, trace, aux = self._mix_soft(x, gaps, working, hidden, written, valid, routing)
        else:
            y, without, trace, aux = self._mix_hard(working, h, written, valid, routing)
        if self.training and salience is not None:
            assert writes is not None
            asks = trace.path == int(Path.EPISODIC)  # by rule, without audits; `int`, as the compiler takes no enum
            most = None if bounds is None else bounds.reads
            askers = select_readers(asks & self.episodic.can_read(written), most)
            aux["salience"] = self.episodic.salience_loss(
                salience, h, askers, writes, written, by_sequence=routing.by_sequence
            )
        if valid is not None:
            y = torch.where(valid[..., None], y, 0.0)
        buffer = self.episodic.evict(written.buffer, full=written.full, waits=bounds is None)
        return MixerOutput(
            y=y,
            state=CRAMState(working=working_state, buffer=buffer),
            trace=trace._replace(written=writes),
            aux=aux,
            y_without_reads=without,
        )

    def _writes(self, salience: Tensor | None, valid: Tensor | None, routing: Routing) -> Tensor | None:
        """The tokens to write, bool (B, T); None: all. While every token is made to read, every token is written."""
        if salience is None:
            return valid
        writes = torch.ones_like(salience, dtype=torch.bool) if routing.read_all else salience.detach() > 0
        if self.training and not routing.read_all:
            audit_frac = self.config.episodic.write_audit_frac
            writes = writes | chance(writes.shape, audit_frac, routing, writes.device)
        writes = writes if valid is None else writes & valid
        return writes if routing.bounds is None else _first(writes, routing.bounds.writes)

    def _bounded(self, routing: Routing, x: Tensor) -> Routing:
        """Cuts the bounds to the T tokens of x (B, T, D), and drops them if there are no tokens."""
        bounds = routing.bounds
        if bounds is None:
            return routing
        reads_all = routing.read_all and bounds.reads < x.shape[1]
        if self.config.router.name == "gumbel" or reads_all:
            who = "routing.read_all" if routing.read_all else 'router "gumbel"'
            raise ValueError(f"routing.bounds = {bounds} cannot hold: with {who} every token reads; leave bounds out")
        if min(bounds) < 1:
            raise ValueError(f"routing.bounds = {bounds} must be at least 1 each")
        possible = Bounds(*(min(most, x.shape[1]) for most in bounds)) if x.numel() else None
        return routing._replace(bounds=possible)

    def _mix_hard(
        self, working: Tensor, h: Tensor, written: Written, valid: Tensor | None, routing: Routing
    ) -> tuple[Tensor, Tensor | None, Trace, dict[str, Tensor]]:
        """Each token takes a read or the semantic output. Only the tokens that read are scored."""
        recognised = self.semantic.recognise(h)
        answer, nearby = self.semantic.answer(recognised), None
        if self.config.window is not None:
            can_read, fixed = self._can_read(written, valid), routing.bounds is not None
            nearby = window_answers(self.episodic, h, written, can_read, self.config.window, fixed=fixed)
            answer = answer + nearby
        gate_logit = self.gate_margin(h, recognised, nearby) if self.config.router.name == "benefit" else None
        chosen = self._decide(h, gate_logit, routing)
        chosen = chosen if routing.skips is None else chosen & ~routing.skips
        asked = chosen if gate_logit is None or routing.audits is None else chosen | routing.audits
        readers = self._readers(asked, written, valid, routing)
        retrieved = self.episodic.read(h, readers, written)
        found = readers.put_onto(retrieved, answer)
        weight = None if gate_logit is None else self.gate.weight(gate_logit, chosen)
        y = working + (found if weight is None else weighed(answer, found, weight))
        without = working + answer if routing.counterfactual else None
        known = quality(readers.take(answer.detach()), retrieved, self.config.router.sigma).to(h.dtype)
        unknown = torch.full(chosen.shape, torch.nan, dtype=h.dtype, device=h.device)
        chosen = chosen & readers.mask
        learns = self.training and not isinstance(self.semantic, Nothing)
        missing = retrieved if nearby is None else retrieved - readers.take(nearby)
        aux = {"consolidation": self._consolidation(h, missing, readers, routing)} if learns else {}
        trace = Trace(
            path=torch.where(chosen, int(Path.EPISODIC), int(Path.SEMANTIC)),
            attended=readers.mask,
            scored=readers.mask,
            gate_prob=chosen.to(h.dtype) if gate_logit is None else torch.sigmoid(gate_logit.detach()),
            gate_logit=gate_logit,
            quality=readers.put_onto(known, unknown),
        )
        return y, without, trace, aux

    def gate_margin(self, h: Tensor, recognised: Tensor, nearby: Tensor | None) -> Tensor:
        """Output of the benefit gate, (...).

        Args:
            h: (..., D).
            recognised: hidden activations of the semantic memory, (..., rank).
            nearby: output of the window, (..., D); None: there is no window.
        """
        return self.gate(h, recognised if nearby is None else torch.cat([recognised, nearby], dim=-1))

    def _readers(self, asked: Tensor, written: Written, valid: Tensor | None, routing: Routing) -> Readers:
        """The tokens that ask, bool (B, T), and can read. Nothing waits for the device if no data decides who reads."""
        if self.config.router.name == "never":
            return Nobody(asked)
        most = None if routing.bounds is None else routing.bounds.reads
        everyone = self.config.router.name == "always" or routing.read_all
        everyone = everyone and valid is None and routing.skips is None and self.episodic.salience is None
        if everyone and (most is None or most >= asked.shape[1]):
            return All(asked)
        return select_readers(asked & self._can_read(written, valid), most)

    def _can_read(self, written: Written, valid: Tensor | None) -> Tensor:
        """True for valid tokens that see at least one entry, bool (B, T)."""
        can_read = self.episodic.can_read(written)
        return can_read if valid is None else valid & can_read

    def _decide(self, h: Tensor, gate_logit: Tensor | None, routing: Routing) -> Tensor:
        """The tokens that read by the decision of the router, bool (B, T)."""
        shape = h.shape[:2]
        name = self.config.router.name
        if name == "never":
            return torch.zeros(shape, dtype=torch.bool, device=h.device)
        if routing.read_all or name == "always":
            return torch.ones(shape, dtype=torch.bool, device=h.device)
        if name == "random":
            return chance(shape, self.config.router.random_frac, routing, h.device)
        if name == "oracle":
            if routing.oracle_reads is None:
                raise ValueError(
                    "routing.oracle_reads = None does not suit the oracle router; pass the batch's oracle_reads"
                )
            return routing.oracle_reads
        assert gate_logit is not None
        return gate_logit.detach() > 0

    def _consolidation(self, h: Tensor, missing: Tensor, readers: Readers, routing: Routing) -> Tensor:
        """Eq. 5 on the tokens that read. It teaches the semantic memory what would be `missing` without their reads.

        The mean over these tokens, or with `routing.by_sequence` the sums of the sequences, (B,).
        """
        rows, n_sequences = readers.take(h.detach()), len(h)
        if not rows.numel():  # nothing to learn from, but other ranks wait for gradients and counts
            nothing = h.new_zeros(1, self.d_model)
            answer = self.semantic(nothing)
            if routing.by_sequence:
                return (0.0 * answer.sum()).expand(n_sequences)
            return consolidation_loss(answer, nothing, torch.zeros(1, dtype=torch.bool, device=h.device))
        answer = self.semantic(rows)
        if not routing.by_sequence:
            return consolidation_loss(answer, missing, readers.present)
        sequence = torch.arange(n_sequences, device=h.device)[:, None].expand(h.shape[:2])
        return consolidation_sums(answer, missing, readers.take(sequence), n_sequences, readers.present)

    def _mix_soft(
        self,
        x: Tensor,
        gaps: Tensor,
        working: Tensor,
        hidden: Tensor,
        written: Written,
        valid: Tensor | None,
        routing: Routing,
    ) -> tuple[Tensor, Trace, dict[str, Tensor]]:
        """The paper's weighted sum of the three outputs for x. Every token is scored, because q needs r_E."""
        scored = self._can_read(written, valid)
        readers = All(scored) if self.episodic.salience is None else select_readers(scored)
        retrieved = readers.put_onto(self.episodic.read(x, readers, written), torch.zeros_like(x))
        answer = self.semantic(x)
        q = quality(answer, retrieved, self.config.router.sigma)
        q_known, q = torch.where(scored, q, 0.0), torch.where(scored, q, torch.nan)
        logits = self.gumbel(x, gaps, hidden, q_known)
        if routing.read_all:
            weights = torch.zeros_like(logits)
            weights[..., Path.EPISODIC] = 1.0
        else:
            weights = gumbel_weights(logits, routing)
        answers = torch.stack([working, retrieved, answer], dim=-1)  # (B, T, D, 3), in the order of Path
        y = (answers * weights[..., None, :]).sum(dim=-1)
        path = weights.argmax(dim=-1)
        probs = torch.softmax(logits, dim=-1)
        aux = {}
        if self.training:
            n_scored = count_over_ranks(scored.sum())
            teachers = select_readers((path == int(Path.EPISODIC)) & scored)
            aux["consolidation"] = self._consolidation(x, teachers.take(retrieved), teachers, routing)
            uses = {
                "episodic_use": probs[..., Path.EPISODIC] * scored,
                "semantic_use": probs[..., Path.SEMANTIC] * q_known * scored,
            }
            for name, use in uses.items():
                aux[name] = use.sum(dim=1) if routing.by_sequence else use.sum() / n_scored
        trace = Trace(
            path=path,
            attended=(weights[..., Path.EPISODIC] > 0) & scored,
            scored=scored,
            gate_prob=probs[..., Path.EPISODIC].detach(),
            quality=q,
        )
        return y, trace, aux

    def cost(self, seq_len: int, *, read_frac: float = 1.0, write_frac: float = 1.0, training: bool = False) -> Cost:
        """Implements `Mixer.cost` and `cost.cram_cost`."""
        layer = CostedLayer(
            d_model=self.d_model,
            working=self.working,
            episodic=self.episodic,
            semantic=self.semantic,
            router=self.config.router,
            window=self.config.window,
            parameter_bytes=sum(p.numel() * p.element_size() for p in self.parameters()),
        )
        return cram_cost(layer, seq_len, read_frac=read_frac, write_frac=write_frac, training=training)


def weighed(answer: Tensor, read: Tensor, weight: Tensor) -> Tensor:
    """Answers (..., D) of which a share `weight` (...) is replaced by the read (..., D)."""
    return answer + weight.to(answer.dtype)[..., None] * (read - answer)


def _first(chosen: Tensor, most: int) -> Tensor:
    """The first `most` chosen tokens of each sequence, bool (B, T)."""
    return chosen & (running_sum(chosen) <= most)
