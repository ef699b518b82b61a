"""The one question on which ways to compute the same thing are chosen: do launches bind, or work?"""

from __future__ import annotations

import torch


def bind(device: torch.device) -> bool:
    """Whether few launches and few waits are worth some work that nobody looks at: so on an accelerator."""
    return device.type != "cpu"
