"""A Llama with the bigram table of CRAM language models, so that both can be trained with the same table."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from cramlab.language_model.bigrams import Bigrams, BigramTable


class _Layer(LlamaDecoderLayer):
    """A layer whose residual stream first gets the rows of the bigrams.

    Its number is a tensor, (1,), so that one compiled graph serves all layers.
    """

    number: Tensor

    def __init__(self, config: LlamaConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.register_buffer("number", torch.tensor([layer_idx]), persistent=False)

    def forward(self, hidden_states: Tensor, *args: Any, bigrams: tuple[BigramTable, Bigrams], **kwargs: Any) -> Tensor:
        table, found = bigrams
        return super().forward(table.onto(hidden_states, found, self.number), *args, **kwargs)


class LlamaWithBigrams(LlamaForCausalLM):
    """For training comparisons: whole sequences of token numbers, no cache and no packed rows."""

    def __init__(self, config: LlamaConfig, bigram_slots: int) -> None:
        super().__init__(config)
        n_layers = config.num_hidden_layers
        self.model.layers = nn.ModuleList(_Layer(config, i) for i in range(n_layers))
        self.bigrams = BigramTable(bigram_slots, config.vocab_size, config.hidden_size, n_layers)
        self.post_init()

    def forward(  # type: ignore[override]
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """One pass without a cache.

        Args:
            input_ids: token numbers, (B, T).
            attention_mask: 0 on padding, (B, T); None: there is none.
            labels: as in `LlamaForCausalLM`.
            kwargs: `use_cache`, which is ignored, and `logits_to_keep`.

        Raises:
            ValueError: for any other argument.
        """
        kwargs.pop("use_cache", None)
        for name, value in kwargs.items():
            if value is not None and name != "logits_to_keep":
                raise ValueError(f"{name} cannot be honoured by a Llama with a bigram table; leave it out")
        found = self.bigrams(input_ids, None if attention_mask is None else attention_mask.bool(), None, None)
        kwargs |= {"attention_mask": attention_mask, "labels": labels, "bigrams": (self.bigrams, found)}
        return super().forward(input_ids=cast("Any", input_ids), use_cache=False, **kwargs)
