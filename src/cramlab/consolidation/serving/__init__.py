"""Decoding of consolidated models without a decision on the host: fixed shapes, gates evaluated on the device.

`gates` executes one layer, `step` a whole model.
"""

from cramlab.consolidation.serving.step import DecodeStep

__all__ = ["DecodeStep"]
