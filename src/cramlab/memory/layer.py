"""The CRAM layer: working, episodic and semantic memory, wired by a router (paper sec. 4)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cramlab.memory import launches
from cramlab.memory.consolidation import consolidation_loss, quality
from cramlab.memory.cost import cram_cost
from cramlab.memory.episodic import Buffer, EpisodicMemory, EpisodicMemoryConfig, Written
from cramlab.memory.routing import BenefitGate, GumbelRouter, RouterConfig, chance, gumbel_weights
from cramlab.memory.semantic import AdapterConfig, SemanticConfig
from cramlab.memory.working import NoWorkingMemory, WorkingMemory, WorkingMemoryConfig
from cramlab.mixer import Cost, Mixer, MixerOutput, Path, Routing, Trace, checked_inputs


@dataclass(frozen=True, kw_only=True)
class CRAMConfig:
    """A CRAM layer. The defaults are our best; `CRAMConfig.paper()` is the layer as the paper writes it.

    Attributes:
        working: continuous-time recurrence; None: the token itself, an ablation.
        episodic: buffer and attention.
        semantic: `AdapterConfig`, `SlotsConfig` or `NothingConfig`.
        router: who decides.
    """

    working: WorkingMemoryConfig | None = field(default_factory=WorkingMemoryConfig)
    episodic: EpisodicMemoryConfig = field(default_factory=EpisodicMemoryConfig)
    semantic: SemanticConfig = field(default_factory=AdapterConfig)
    router: RouterConfig = field(default_factory=RouterConfig)

    @classmethod
    def paper(cls) -> CRAMConfig:
        """Adapter of rank d/16 and the Gumbel router that sees q, to be trained with Eq. 8. See docs/method.md."""
        return cls(semantic=AdapterConfig(rank=None), router=RouterConfig(name="gumbel", d_hidden=32))

    def build(self, d_model: int) -> CRAMLayer:
        """A fresh layer."""
        return CRAMLayer(self, d_model)


class CRAMState(NamedTuple):
    """Carried from call to call: working-memory state and episodic buffer."""

    working: Tensor
    buffer: Buffer


class CRAMLayer(Mixer):
    """Three memories and a router.

    The working memory answers every token and prepares h. With every router but `gumbel`, a token then takes either
    a read of the buffer or the semantic answer, added to the working memory's (ours). With `gumbel` the three answers
    are weighted by pi and summed, and all of them look at x itself (paper).
    """

    def __init__(self, config: CRAMConfig, d_model: int) -> None:
        super().__init__()
        self.config, self.d_model = config, d_model
        self.working = NoWorkingMemory() if config.working is None else WorkingMemory(config.working, d_model)
        self.norm = nn.LayerNorm(d_model, bias=False)
        self.episodic = EpisodicMemory(config.episodic, d_model)
        self.semantic = config.semantic.build(d_model)
        if config.router.name == "benefit":
            self.gate = BenefitGate(config.router, d_model, self.semantic.rank)
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
        """See `Mixer.forward`.

        `aux` holds "consolidation" (Eq. 5), "salience" if a gate decides on writes, and the router terms of Eq. 8 for
        `gumbel`.

        Raises:
            ValueError: when x and gaps do not fit together, or a valid token has a gap that is negative or no number.
        """
        routing = routing or Routing()
        x, gaps = checked_inputs(x, gaps, valid, self.d_model)
        if state is None:
            n_batch = x.shape[0]
            state = CRAMState(working=self.working.initial_state(n_batch), buffer=self.episodic.initial_buffer(n_batch))
        if state.working.shape[0] != x.shape[0]:
            raise ValueError(
                f"state holds {state.working.shape[0]} sequences and x {x.shape[0]}; continue the same ones"
            )
        working, hidden, working_state = self.working(x, gaps, state.working)
        without: Tensor | None = None
        h = x if self.config.router.name == "gumbel" else self.norm(working)
        salience = None if self.episodic.salience is None else self.episodic.salience(h)
        writes = self._writes(salience, valid, routing)
        written = self.episodic.write(h, gaps, state.buffer, writes)
        if self.config.router.name == "gumbel":
            y, trace, aux = self._mix_soft(x, gaps, working, hidden, written, valid, routing)
        else:
            y, without, trace, aux = self._mix_hard(working, h, written, valid, routing)
        if self.training and salience is not None:
            assert writes is not None
            asks = trace.path == Path.EPISODIC  # by rule, without the audits
            aux["salience"] = self.episodic.salience_loss(salience, h, asks, writes, written)
        if valid is not None:
            y = torch.where(valid[..., None], y, 0.0)
        return MixerOutput(
            y=y,
            state=CRAMState(working=working_state, buffer=self.episodic.evict(written.buffer, full=written.full)),
            trace=trace._replace(written=writes),
            aux=aux,
            y_without_reads=without,
        )

    def _writes(self, salience: Tensor | None, valid: Tensor | None, routing: Routing) -> Tensor | None:
        """The tokens that are written, bool (B, T); None: all. While everybody reads, everything is kept."""
        if salience is None:
            return valid
        writes = torch.ones_like(salience, dtype=torch.bool) if routing.read_all else salience.detach() > 0
        if self.training and not routing.read_all:
            audit_frac = self.config.episodic.write_audit_frac
            writes = writes | chance(writes.shape, audit_frac, routing, writes.device)
        return writes if valid is None else writes & valid

    def _mix_hard(
        self, working: Tensor, h: Tensor, written: Written, valid: Tensor | None, routing: Routing
    ) -> tuple[Tensor, Tensor | None, Trace, dict[str, Tensor]]:
        """Each token takes a read or the semantic answer; reads are executed for their tokens alone."""
        recognised = self.semantic.recognise(h)
        answer = self.semantic.answer(recognised)
        gate_logit = self.gate(h, recognised) if self.config.router.name == "benefit" else None
        chosen = self._decide(h, gate_logit, routing)
        reads = chosen
        if routing.audits is not None and gate_logit is not None:  # only a gate that learns has use for an audit
            reads = chosen | routing.audits
        if valid is not None:
            chosen, reads = chosen & valid, reads & valid
        if self.episodic.salience is not None:  # before anything is written there is nothing to read
            can_read = self.episodic.can_read(written)
            chosen, reads = chosen & can_read, reads & can_read
        reader = reads.flatten().nonzero().squeeze(-1)  # their numbers, once: it waits for the device
        everyone = len(reader) == reads.numel()
        most = len(reader) if launches.bind(h.device) and len(h) == 1 else None  # known now, and another wait saved
        retrieved = self.episodic.read(h, None if everyone else reads, written, most=most)
        aux = {}
        if self.training:
            aux["consolidation"] = self._consolidation(h, retrieved, reader)
        y = working + torch.where(reads[..., None], retrieved, answer)
        trace = Trace(
            path=torch.where(chosen, int(Path.EPISODIC), int(Path.SEMANTIC)),
            attended=reads,
            scored=reads,
            gate_prob=chosen.to(h.dtype) if gate_logit is None else torch.sigmoid(gate_logit.detach()),
            gate_logit=gate_logit,
            quality=self._quality(answer, retrieved, reader),
        )
        return y, working + answer if routing.counterfactual else None, trace, aux

    def _decide(self, h: Tensor, gate_logit: Tensor | None, routing: Routing) -> Tensor:
        """The tokens that read by rule, bool (B, T)."""
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
                raise ValueError("the oracle router needs routing.oracle_reads; pass the batch's oracle_reads")
            return routing.oracle_reads
        assert gate_logit is not None
        return gate_logit.detach() > 0

    def _consolidation(self, h: Tensor, retrieved: Tensor, reader: Tensor) -> Tensor:
        """Eq. 5 on the tokens that read. Both sides are detached: it teaches the semantic memory and nothing else."""
        if not len(reader):
            return 0.0 * self.semantic(h[:1, :1].detach()).sum()
        h, retrieved = (t.detach().flatten(0, 1).index_select(0, reader) for t in (h, retrieved))
        return consolidation_loss(self.semantic(h), retrieved)

    def _quality(self, answer: Tensor, retrieved: Tensor, reader: Tensor) -> Tensor:
        """Eq. 6 for the tokens that read, NaN for the others, (B, T)."""
        unknown = torch.full((answer.shape[0] * answer.shape[1],), torch.nan, dtype=answer.dtype, device=answer.device)
        answer_, retrieved_ = (t.detach().flatten(0, 1).index_select(0, reader) for t in (answer, retrieved))
        q = quality(answer_, retrieved_, self.config.router.sigma)
        return unknown.to(q.dtype).index_copy_(0, reader, q).view(answer.shape[:2])

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
        """The paper's sum of three weighted answers to x; every token is scored, because q needs r_E."""
        scored = self.episodic.can_read(written) if valid is None else valid & self.episodic.can_read(written)
        everyone = self.episodic.salience is None
        retrieved = self.episodic.read(x, None if everyone else scored, written)
        answer = self.semantic(x)
        q = self._quality(answer, retrieved, scored.flatten().nonzero().squeeze(-1))
        q_known = torch.where(scored, q, 0.0)
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
            n_valid = scored.sum().clamp(min=1)
            reader = ((path == Path.EPISODIC) & scored).flatten().nonzero().squeeze(-1)
            aux["consolidation"] = self._consolidation(x, retrieved, reader)
            aux["episodic_use"] = (probs[..., Path.EPISODIC] * scored).sum() / n_valid
            aux["semantic_use"] = (probs[..., Path.SEMANTIC] * q_known * scored).sum() / n_valid
        trace = Trace(
            path=path,
            attended=(weights[..., Path.EPISODIC] > 0) & scored,
            scored=scored,
            gate_prob=probs[..., Path.EPISODIC].detach(),
            quality=q,
        )
        return y, trace, aux

    def cost(self, seq_len: int, *, read_frac: float = 1.0, write_frac: float = 1.0, training: bool = False) -> Cost:
        """See `Mixer.cost` and `cost.cram_cost`."""
        return cram_cost(self, seq_len, read_frac=read_frac, write_frac=write_frac, training=training)
