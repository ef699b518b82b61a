"""A causal language model of CRAM layers with the interface of transformers: model, cache, training."""
