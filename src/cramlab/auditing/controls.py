"""Controls: a constructed model with known redundancy, which shows that the audit finds what it should."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from cramlab.auditing.config import AuditConfig
from cramlab.auditing.result import AuditResult
from cramlab.auditing.run import audit

VOCAB, D_TOKEN, N_HEADS, D_HEAD = 64, 32, 2, 4
# Per layer: share of its output's variance that a linear probe can predict, and whether the loss depends on it.
PLANTED = ((1.0, True), (0.8, True), (0.8, False), (0.0, False))


class _TokenPart(nn.Module):
    """Keeps the coordinates of the token and sets those that attention writes to zero."""

    def forward(self, stream: Tensor) -> Tensor:
        kept = torch.zeros_like(stream)
        kept[..., :D_TOKEN] = stream[..., :D_TOKEN]
        return kept


class _PlantedAttention(nn.Module):
    """Returns `sqrt(share) A h + sqrt(1 - share) e(earlier tokens)`; both terms have variance 1 per dimension."""

    def __init__(self, share: float, embedding: Tensor, d_model: int, first: int, generator: torch.Generator) -> None:
        super().__init__()
        d_heads = N_HEADS * D_HEAD
        self.share = share
        signal = torch.randn(D_TOKEN, d_heads, generator=generator)
        self.signal = nn.Parameter(signal / (embedding @ signal).std(dim=0, correction=0))
        noise = torch.randn(4_099, d_heads, generator=generator)
        self.noise = nn.Parameter((noise - noise.mean(dim=0)) / noise.std(dim=0, correction=0))
        self.out_proj = nn.Linear(d_heads, d_model, bias=False)
        with torch.no_grad():
            self.out_proj.weight.zero_()
            self.out_proj.weight[first : first + d_heads] = torch.eye(d_heads)

    def forward(self, hidden: Tensor, prefix: Tensor) -> Tensor:
        place = (prefix * 1_103 + 17 * int(100 * self.share)) % len(self.noise)
        known, unknown = hidden[..., :D_TOKEN] @ self.signal, self.noise[place]
        return self.out_proj(self.share**0.5 * known + (1 - self.share) ** 0.5 * unknown)


class _PlantedBlock(nn.Module):
    def __init__(self, attention: _PlantedAttention) -> None:
        super().__init__()
        self.norm, self.attention = _TokenPart(), attention

    def forward(self, stream: Tensor, prefix: Tensor) -> Tensor:
        return stream + self.attention(self.norm(stream), prefix)


class PlantedModel(nn.Module):
    """A causal language model whose attention has planted redundancy, see `PLANTED`.

    Layer 0 is fully predictable, so its probe costs no loss. Layer 1 is mostly predictable, but the loss depends on the
    rest: predictable, not removable. The head does not use layers 2 and 3: removable, whether predictable or not.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        d_heads = N_HEADS * D_HEAD
        d_model = D_TOKEN + len(PLANTED) * d_heads
        self.config = SimpleNamespace(model_type="planted", num_attention_heads=N_HEADS, vocab_size=VOCAB)
        self.base_model_prefix = "transformer"
        embedding = torch.randn(VOCAB, D_TOKEN, generator=generator)
        embedding = embedding - embedding.mean(dim=0)
        self.transformer = _PlantedBase(embedding, d_model, generator)
        self.head = nn.Linear(d_model, VOCAB, bias=False)
        with torch.no_grad():
            self.head.weight.normal_(std=0.5, generator=generator)
            self.head.weight[:, :D_TOKEN] = 0.0
            for i, (_, read) in enumerate(PLANTED):
                first = D_TOKEN + i * d_heads
                self.head.weight[:, first : first + d_heads] *= float(read)

    def forward(self, input_ids: Tensor, **_: Any) -> SimpleNamespace:
        """Returns an object with the logits of the next token, (B, T, vocabulary)."""
        return SimpleNamespace(logits=self.head(self.transformer(input_ids)[0]))

    @torch.no_grad()
    def write(self, n_documents: int, n_tokens: int, seed: int) -> list[Tensor]:
        """Samples documents (n_tokens,) from this model, so that it is their best possible model."""
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(VOCAB, (n_documents, n_tokens), generator=generator)
        for t in range(1, n_tokens):
            p = torch.softmax(self(tokens[:, :t]).logits[:, -1], dim=-1)
            tokens[:, t] = torch.multinomial(p, 1, generator=generator)[:, 0]
        return list(tokens)

    @torch.no_grad()
    def planted_r2(self, texts: list[Tensor]) -> list[float]:
        """Returns the centred R^2 of the best linear probe of each layer on these documents."""
        hidden = self.transformer.embedding[torch.cat(texts), :D_TOKEN]
        planted = []
        for attention in self.transformer.attentions:
            known = attention.share * float((hidden @ attention.signal).var(dim=0, correction=0).mean())
            planted.append(known / (known + 1 - attention.share))
        return planted


class _PlantedBase(nn.Module):
    def __init__(self, embedding: Tensor, d_model: int, generator: torch.Generator) -> None:
        super().__init__()
        padding = torch.zeros(VOCAB, d_model - D_TOKEN)
        self.embedding = nn.Parameter(torch.cat([embedding, padding], dim=1))
        d_heads = N_HEADS * D_HEAD
        self.attentions = [
            _PlantedAttention(share, embedding, d_model, D_TOKEN + i * d_heads, generator)
            for i, (share, _) in enumerate(PLANTED)
        ]
        self.blocks = nn.ModuleList(map(_PlantedBlock, self.attentions))

    def forward(self, input_ids: Tensor, **_: Any) -> tuple[Tensor]:
        prefix = torch.cumsum((input_ids + 1).square(), dim=1) - (input_ids + 1).square()
        stream = self.embedding[input_ids]
        for block in self.blocks:
            stream = block(stream, prefix)
        return (stream,)


def planted_control(seed: int = 0) -> dict[str, Any]:
    """Audits the planted model; returns the planted values beside the measured ones, by layer."""
    model = PlantedModel(seed).eval()
    config = AuditConfig(
        context=64, fit_tokens=16_000, validation_tokens=3_000, test_tokens=8_000, causal_tokens=4_096, seed=seed,
        batch_tokens=4_096,
    )  # fmt: skip
    texts = model.write(430, 64, seed)
    result = audit(model, texts, config)
    alone = result.data["loss"]["alone"]
    return {
        "layers": [
            {
                "planted_r2": planted,
                "read_by_the_loss": read,
                "r2": r2,
                "r": r,
                "loss": {kind: alone[i][kind] for kind in ("probe", "mean", "zero")},
            }
            for i, ((_, read), planted, r2, r) in enumerate(
                zip(PLANTED, model.planted_r2(texts), result.layers("r2"), result.layers("r"), strict=True)
            )
        ]
    }


def summary(result: AuditResult) -> dict[str, Any]:
    """Returns what the main record keeps of a control that is itself an audit."""
    return {
        "parts": result.data["text"]["parts"],
        "probes": {
            name: {"overall": probe["overall"], "layers": probe["layers"]}
            for name, probe in result.data["probes"].items()
            if name in ("hidden", "mean")
        },
    }
