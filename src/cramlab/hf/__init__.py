"""Opening Hugging Face models: loading them, checking their files, and finding their attention sub-layers.

No family is listed: `structure` finds attention by what the modules of a model do. `structure` and `attention_sites`
work without transformers; everything else here needs the extra `hf` (`pip install "cramlab[hf]"`).
"""
