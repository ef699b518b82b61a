"""Consolidating a pretrained model: which far reads can be left out, at what cost, with what guarantee."""
