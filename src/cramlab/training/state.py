"""Everything that training changes and a checkpoint holds: weights, their average, optimisers, progress."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from cramlab import records
from cramlab.batch import Batch
from cramlab.files import save_checkpoint
from cramlab.mixer import Trace
from cramlab.model import SequenceModel
from cramlab.ranks import Ranks
from cramlab.training.folder import CHECKPOINT, own_checkpoint, restoring, run_hash
from cramlab.training.practice import PracticeLog
from cramlab.training.progress import Progress
from cramlab.training.run import RunConfig, TrainingConfig
from cramlab.training.start import TransferConfig, start


@dataclass
class TrainingState:
    """A model in training.

    Attributes:
        plain: the model.
        average: exponential average of its weights.
        model: `plain` as Fabric runs it.
        averaged: the averaged model as Fabric runs it; this is what is validated, tested and saved for use.
        adamws: the optimisers, one for the gates and one for all other parameters.
        optimizers: the same as Fabric runs them.
        practice: counts of the encounters with each recurring pattern.
        progress: how far training has come.
        ranks: the processes that train the model together, all of which hold the same state.
    """

    plain: SequenceModel
    average: AveragedModel
    model: Any
    averaged: Any
    adamws: list[AdamW]
    optimizers: list[Any]
    practice: PracticeLog
    progress: Progress
    ranks: Ranks

    @classmethod
    def fresh(cls, config: RunConfig, out: Path, fabric: Fabric, ranks: Ranks) -> TrainingState:
        """The state before the first step; weights depend on the seed, or on the run that a transfer starts from."""
        training = config.training
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            plain = SequenceModel(config.model, config.task.input_spec)
        if isinstance(config, TransferConfig):
            start(config, plain, out)
        adamws = [AdamW(groups, weight_decay=training.weight_decay) for groups in parameter_groups(plain, training)]
        model, *optimizers = fabric.setup(plain, *adamws)
        average = AveragedModel(plain, multi_avg_fn=get_ema_multi_avg_fn(training.average_decay))
        return cls(
            plain=plain,
            average=average,
            model=model,
            averaged=fabric.setup_module(average.module, move_to_device=False),
            adamws=adamws,
            optimizers=optimizers,
            practice=PracticeLog(config.task.n_patterns),
            progress=Progress.begun(records.header(fabric.device), encoding=training.encoding_target > 0),
            ranks=ranks,
        )

    def save(self, config: RunConfig, out: Path) -> None:
        """Writes the checkpoint of the run in its folder."""
        state = {
            "config_hash": run_hash(config),
            "seed": config.seed,
            "model": self.plain.state_dict(),
            "average": self.average.state_dict(),
            "practice": self.practice.state(),
            "optimizers": [adamw.state_dict() for adamw in self.adamws],
            "progress": self.progress.to_dict(),
        }
        save_checkpoint(out / CHECKPOINT, state)

    def restore(self, config: RunConfig, out: Path) -> None:
        """Continues from the checkpoint in the run's folder.

        Raises:
            DamagedFileError: when it cannot be read, or belongs to another run.
        """
        with restoring(out / CHECKPOINT):
            saved = own_checkpoint(out, config)
            self.plain.load_state_dict(saved["model"])
            self.average.load_state_dict(saved["average"])
            self.practice.load(saved["practice"])
            for adamw, held in zip(self.adamws, saved["optimizers"], strict=True):
                adamw.load_state_dict(held)
            progress = Progress.from_dict(saved["progress"])
            progress.header = records.continued(progress.header, self.progress.header)
            self.progress = progress

    def set_learning_rate(self, rate: float) -> None:
        """Sets the rate of every parameter group, times the group's own factor."""
        for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
            group["lr"] = rate * group["rate"]

    def backward(self, fabric: Fabric, loss: Tensor, max_norm: float) -> Tensor:
        """Computes the gradients of a loss, averages them over the ranks and clips them.

        Returns the sum of the norms before clipping, scalar.
        """
        self.model.zero_grad()
        fabric.backward(loss)
        self.ranks.average_gradients(self.plain.parameters())
        norms = [
            fabric.clip_gradients(self.model, optimizer, max_norm=max_norm, error_if_nonfinite=False)
            for optimizer in self.optimizers
        ]
        # The norm of parameters that are all frozen is a zero on the CPU, whatever device they are on.
        return torch.stack([part.to(loss.device) for part in cast("list[Tensor]", norms)]).sum()

    def update(self, batch: Batch, traces: tuple[Trace, ...]) -> None:
        """Makes the optimiser step of a batch and counts its encounters; `batch` holds this rank's rows, on the CPU."""
        for optimizer in self.optimizers:
            optimizer.step()
        self.average.update_parameters(self.plain)
        self.practice.update(batch, traces, self.ranks)


def parameter_groups(model: SequenceModel, training: TrainingConfig) -> list[list[dict[str, Any]]]:
    """All parameters, as groups with a learning-rate factor each, in one list for every optimiser.

    The gates have an optimiser of their own. Their gradients are detached from the rest of the model and several times
    as large. Clipped together, the norm of the gates' gradients would set the step of all other parameters.
    """
    parts: dict[str, list[nn.Parameter]] = {"others": [], "semantic": [], "gates": []}
    for name, parameter in model.named_parameters():
        part = "gates" if ".gate." in name or ".salience." in name else "semantic" if ".semantic." in name else "others"
        parts[part].append(parameter)
    rates = {"others": 1.0, "semantic": training.semantic_rate}
    together = [{"params": parts[name], "rate": rate} for name, rate in rates.items() if parts[name]]
    return [together, [{"params": parts["gates"], "rate": 1.0}]] if parts["gates"] else [together]
