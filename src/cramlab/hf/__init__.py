"""Hugging Face models: where their attention sits, how they are loaded. The only place that imports transformers.

`attention_sites` looks at modules alone and works without transformers installed; everything else here needs the extra
`hf` (`pip install "cramlab[hf]"`).
"""
