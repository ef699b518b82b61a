"""Checks that this machine can train a run, before anything is written."""

from __future__ import annotations

import dataclasses
import os

import torch

from cramlab.config import ConfigError
from cramlab.model import SequenceModel
from cramlab.training.run import RunConfig, TrainingConfig

_BYTES_A_PARAMETER = 20  # the weight, its gradient, two moments of AdamW, the average
_BYTES_A_NUMBER = 4


def check_model(config: RunConfig) -> None:
    """Builds one layer of each kind on the device "meta", and estimates the memory that a step needs.

    Raises:
        ConfigError: when sizes do not fit together, or a lower bound on the memory exceeds that of this machine.
    """
    n_kinds = len(config.model.mixer) if isinstance(config.model.mixer, tuple) else 1
    n_built = min(n_kinds, config.model.n_layers)  # the other layers are copies of these
    try:
        with torch.device("meta"):
            model = SequenceModel(dataclasses.replace(config.model, n_layers=n_built), config.task.input_spec)
    except ConfigError:
        raise
    except (ValueError, RuntimeError) as error:  # sizes that do not fit, or exceed the largest tensor
        raise ConfigError(str(error).splitlines()[0]) from error
    in_blocks = sum(p.numel() for block in model.blocks for p in block.parameters())
    around = sum(p.numel() for p in model.parameters()) - in_blocks
    n_parameters = around + in_blocks * config.model.n_layers // n_built
    n_tokens = max(stage.batch_size * config.task_at(stage).seq_len for stage in config.training.stages)
    a_token = _BYTES_A_NUMBER * (config.model.d_model + config.model.d_mlp) * config.model.n_layers
    needed, there = n_parameters * _BYTES_A_PARAMETER + n_tokens * a_token, memory_bytes()
    if needed > there:
        raise ConfigError(
            f"{config.name} has {n_parameters:,} parameters and up to {n_tokens:,} tokens a step: more than "
            f"{needed / 2**30:,.0f} GiB, and this machine has {there / 2**30:,.0f}; lower model.d_model, model.d_mlp, "
            "model.n_layers, task.seq_len, or the stages' batch_size"
        )


def memory_bytes() -> int:
    """Memory of this machine, in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def check_accelerator(training: TrainingConfig) -> None:
    """Raises `ConfigError` unless the accelerator is available and supports the precision."""
    there = {"cpu": True, "auto": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not there[training.accelerator]:
        names = ", ".join(f'"{name}"' for name, is_there in there.items() if is_there)
        raise ConfigError(
            f'training.accelerator = "{training.accelerator}" is not available on this machine; give {names}'
        )
    if training.devices > 1 and training.accelerator not in ("cpu", "cuda"):
        raise ConfigError(
            f'training.devices = {training.devices} needs training.accelerator = "cpu" or "cuda"; give one of them'
        )
    if training.accelerator == "cuda" and training.devices > (n_cuda := torch.cuda.device_count()):
        raise ConfigError(f"training.devices = {training.devices} exceeds the {n_cuda} of this machine; give {n_cuda}")
    on_cpu = training.accelerator == "cpu" or not (there["cuda"] or there["mps"])
    on_mps = training.accelerator in ("mps", "auto") and there["mps"] and not there["cuda"]
    if (on_cpu and training.precision == "16-mixed") or (on_mps and training.precision == "64-true"):
        raise ConfigError(
            f'training.precision = "{training.precision}" is not supported by training.accelerator = '
            f'"{training.accelerator}" on this machine; give "32-true"'
        )
