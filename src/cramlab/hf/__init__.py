"""Opening Hugging Face models: loading them, checking their files, and finding their attention sub-layers.

To add a model family, add an entry to `attention_sites.FAMILIES`. `attention_sites` works without transformers;
everything else here needs the extra `hf` (`pip install "cramlab[hf]"`).
"""
