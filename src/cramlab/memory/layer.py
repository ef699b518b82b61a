"""The CRAM layer: working, episodic and semantic memory, wired by a router (paper sec. 4)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cramlab.memory.consolidation import consolidation_loss, quality
from cramlab.memory.episodic import Buffer, EpisodicMemory, EpisodicMemoryConfig
from cramlab.memory.routing import BenefitGate, GumbelRouter, RouterConfig, chance, gumbel_weights
from cramlab.memory.semantic import AdapterConfig, SemanticConfig, SlotsConfig
from cramlab.memory.working import WorkingMemory, WorkingMemoryConfig
from cramlab.mixer import Cost, Mixer, MixerOutput, Path, Routing, Trace, checked_inputs


@dataclass(frozen=True, kw_only=True)
class CRAMConfig:
    """A CRAM layer. The defaults are our best; `CRAMConfig.paper()` is the layer as the paper writes it.

    Attributes:
        working: continuous-time recurrence.
        episodic: buffer and attention.
        semantic: `SlotsConfig` or `AdapterConfig`.
        router: who decides.
    """

    working: WorkingMemoryConfig = field(default_factory=WorkingMemoryConfig)
    episodic: EpisodicMemoryConfig = field(default_factory=EpisodicMemoryConfig)
    semantic: SemanticConfig = field(default_factory=SlotsConfig)
    router: RouterConfig = field(default_factory=RouterConfig)

    @classmethod
    def paper(cls) -> CRAMConfig:
        """Adapter of rank d/16 and the Gumbel router that sees q, trained with Eq. 8."""
        return cls(semantic=AdapterConfig(), router=RouterConfig(name="gumbel", d_hidden=32))

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
    are weighted by pi and summed (paper).
    """

    def __init__(self, config: CRAMConfig, d_model: int) -> None:
        super().__init__()
        self.config, self.d_model = config, d_model
        self.working = WorkingMemory(config.working, d_model)
        self.norm = nn.LayerNorm(d_model, bias=False)
        self.episodic = EpisodicMemory(config.episodic, d_model)
        self.semantic = config.semantic.build(d_model)
        if config.router.name == "benefit":
            self.gate = BenefitGate(config.router, d_model, self.semantic.n_familiarity_features)
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
        """See `Mixer.forward`. `aux` holds "consolidation" (Eq. 5) and, for `gumbel`, the router terms of Eq. 8.

        Raises:
            ValueError: when x and gaps do not fit together, or a valid token has a gap that is negative or no number.
        """
        routing = routing or Routing()
        x, gaps = checked_inputs(x, gaps, valid, self.d_model)
        if state is None:
            n_batch = x.shape[0]
            state = CRAMState(working=self.working.initial_state(n_batch), buffer=self.episodic.initial_buffer(n_batch))
        working, working_state = self.working(x, gaps, state.working)
        h = self.norm(working)
        written = self.episodic.write(h, gaps, state.buffer, valid)
        if self.config.router.name == "gumbel":
            y, without, trace, aux = self._mix_soft(x, gaps, working, h, written, valid, routing)
        else:
            y, without, trace, aux = self._mix_hard(working, h, written, valid, routing)
        if valid is not None:
            y = torch.where(valid[..., None], y, 0.0)
        return MixerOutput(
            y=y,
            state=CRAMState(working=working_state, buffer=self.episodic.evict(written)),
            trace=trace,
            aux=aux,
            y_without_reads=without,
        )

    def _mix_hard(
        self, working: Tensor, h: Tensor, written: Buffer, valid: Tensor | None, routing: Routing
    ) -> tuple[Tensor, Tensor | None, Trace, dict[str, Tensor]]:
        """Each token takes a read or the semantic answer; reads are executed for their tokens alone."""
        answer = self.semantic(h)
        gate_logit: Tensor | None = None
        if self.config.router.name == "benefit":
            gate_logit = self.gate(h.detach(), self.semantic.familiarity(h.detach()))
        chosen = self._decide(h, gate_logit, routing)
        reads = chosen
        if routing.audits is not None:
            reads = chosen | routing.audits
        if valid is not None:
            chosen, reads = chosen & valid, reads & valid
        everyone = bool(reads.all())
        retrieved = self.episodic.read(h, None if everyone else reads, written)
        aux = {}
        if self.training:
            aux["consolidation"] = self._consolidation(h, retrieved, reads)
        y = working + torch.where(reads[..., None], retrieved, answer)
        trace = Trace(
            path=torch.where(chosen, int(Path.EPISODIC), int(Path.SEMANTIC)),
            attended=reads,
            scored=reads,
            gate_prob=chosen.to(h.dtype) if gate_logit is None else torch.sigmoid(gate_logit.detach()),
            gate_logit=gate_logit,
            quality=quality(answer, retrieved, reads, self.config.router.sigma),
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

    def _consolidation(self, h: Tensor, retrieved: Tensor, reads: Tensor) -> Tensor:
        """Eq. 5 on the tokens that read. Both sides are detached: it teaches the semantic memory and nothing else."""
        if not bool(reads.any()):
            return 0.0 * self.semantic(h[:1, :1].detach()).sum()
        return consolidation_loss(self.semantic(h.detach()[reads]), retrieved[reads])

    def _mix_soft(
        self,
        x: Tensor,
        gaps: Tensor,
        working: Tensor,
        h: Tensor,
        written: Buffer,
        valid: Tensor | None,
        routing: Routing,
    ) -> tuple[Tensor, Tensor | None, Trace, dict[str, Tensor]]:
        """The paper's sum of three weighted answers; every token is scored, because q needs r_E."""
        retrieved = self.episodic.read(h, None, written)
        answer = self.semantic(h)
        scored = torch.ones(h.shape[:2], dtype=torch.bool, device=h.device) if valid is None else valid
        q = quality(answer, retrieved, scored, self.config.router.sigma)
        q_known = torch.where(scored, q, 0.0)
        logits = self.gumbel(x, gaps, working, q_known)
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
            n_valid = scored.sum()
            reading = (path == Path.EPISODIC) & scored
            aux["consolidation"] = self._consolidation(h, retrieved, reading)
            aux["episodic_use"] = (probs[..., Path.EPISODIC] * scored).sum() / n_valid
            aux["semantic_use"] = (probs[..., Path.SEMANTIC] * q_known * scored).sum() / n_valid
        trace = Trace(
            path=path,
            attended=(path == Path.EPISODIC) & scored,
            scored=scored,
            gate_prob=probs[..., Path.EPISODIC].detach(),
            quality=q,
        )
        without = None
        if routing.counterfactual:
            silent = weights.clone()
            silent[..., Path.SEMANTIC] += silent[..., Path.EPISODIC]
            silent[..., Path.EPISODIC] = 0.0
            without = (answers * silent[..., None, :]).sum(dim=-1)
        return y, without, trace, aux

    def cost(self, seq_len: int, *, read_frac: float = 1.0) -> Cost:
        """See `Mixer.cost`. Hand arithmetic over the matrix products; elementwise work is left out."""
        d, work = self.d_model, self.config.working
        per_token = 2 * d * work.d_state * 3 + 2 * work.refine_steps * work.d_state**2
        per_token += 2 * work.d_state * 64  # the scan: one chunk of 64 tokens a product
        per_token += 2 * 2 * d * d  # keys and values, written for every token
        if isinstance(self.config.semantic, SlotsConfig):
            slots = self.config.semantic
            per_token += 2 * (d * slots.d_match + slots.n_slots * (slots.d_match + d))
        else:
            per_token += 2 * 2 * d * (self.config.semantic.rank or max(1, d // 16))
        if self.config.router.name == "benefit":
            per_token += 2 * (d + self.semantic.n_familiarity_features + 1) * self.config.router.d_hidden
        seen = (seq_len + 1) / 2
        if self.config.episodic.capacity is not None:
            seen = min(seen, self.config.episodic.capacity)
        a_read = 2 * 2 * d * d + 2 * 2 * d * seen  # query and output projection, scores and mixing
        held = seq_len if self.config.episodic.capacity is None else min(seq_len, self.config.episodic.capacity)
        return Cost(
            projection_flops=float(per_token * seq_len),
            read_flops=float(a_read * read_frac * seq_len),
            state_bytes=4 * (work.d_state + held * (2 * d + 1)),
        )
