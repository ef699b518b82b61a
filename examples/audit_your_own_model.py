"""Audit any Hugging Face model on any tokens, without files: how predictable is its attention, and is it removable?

The model here is tiny and random, so that this runs in seconds; load yours with `from_pretrained` instead.
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from cramlab.auditing import AuditConfig, audit

torch.manual_seed(0)
sizes = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 100,
}
model = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
documents = [torch.randint(100, (64,)) for _ in range(40)]  # yours: token ids, one tensor a document

config = AuditConfig(context=32, fit_tokens=1500, validation_tokens=300, test_tokens=600, causal_tokens=320)
result = audit(model, documents, config)

for layer, (r, r_of_mean, r2) in enumerate(
    zip(result.layers("r"), result.layers("r", "mean"), result.layers("r2"), strict=True)
):
    print(
        f"layer {layer}: R {r[0]:.2f} [{r[1]:.2f}, {r[2]:.2f}], of the mean {r_of_mean[0]:.2f}, centred R2 {r2[0]:.2f}"
    )
for row in result.data["loss"]["alone"]:
    value, low, high = row["probe"]
    print(f"probe instead of layer {row['sites'][0]}: {value:+.4f} nats per token [{low:+.4f}, {high:+.4f}]")
