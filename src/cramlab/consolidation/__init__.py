"""Consolidating a pretrained model: which far reads can be skipped, at which loss, with which guarantee.

`patch` splits attention in two and lets a rule decide who reads; `rules` holds the rules; `learn` learns gates and
adapters; `pipeline` runs all steps, from text to the folder that `folder` writes; `compare` sets the result beside
other methods. `patch.sites` says which layers of a model can be
patched, after a proof on a few tokens.
"""
