"""Old names of modules, classes and functions: each still works for one release and warns, naming the new one."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

# Old module -> new one, both below `cramlab`. A module of an old package that is not listed keeps its last name.
MODULES = {
    "audit": "auditing",
    "audit.errors": "errors",
    "audit.text": "text",
    "auditing.text": "text",
    "baselines.attention": "baselines.shared.attention",
    "baselines.packing": "baselines.shared.packing",
    "baselines.selected": "baselines.shared.selected",
    "cli_arguments": "cli.arguments",
    "cli_audit": "cli.audit",
    "cli_consolidate": "cli.consolidate",
    "cli_cost": "cli.cost",
    "cli_display": "cli.display",
    "cli_irregular": "cli.irregular",
    "hf.auto": "language_model.auto",
    "hf.calls": "consolidation.patch.calls",
    "hf.configuration": "language_model.configuration",
    "hf.configuration_gpt2": "language_model.configuration_gpt2",
    "hf.consolidated": "consolidation.rules.learned",
    "hf.consolidation_folder": "consolidation.folder",
    "hf.cram_cache": "language_model.cache",
    "hf.cram_gpt2": "language_model.cram_gpt2",
    "hf.errors": "errors",
    "hf.far_reads": "consolidation.patch.reads",
    "hf.fresh_weights": "language_model.fresh_weights",
    "hf.growing_cache": "consolidation.patch.growing_cache",
    "hf.install": "consolidation.patch.install",
    "hf.language_inputs": "language_model.inputs",
    "hf.lora": "consolidation.learn.lora",
    "hf.modeling": "language_model.modeling",
    "hf.packed_rows": "language_model.packed_rows",
    "hf.patch": "consolidation.patch.far_reads",
    "hf.pretrain": "language_model.text",
    "hf.text_run": "language_model.training",
    "hf.visibility": "consolidation.patch.visibility",
    "losses": "objective",
    "memory.decoder": "memory.decode",
    "memory.fused": "ops.dispatch",
    "memory.fused_read": "ops.read.fused",
    "memory.fused_read_kernels": "ops.read.kernels",
    "memory.fused_scan": "ops.scan.fused",
    "memory.fused_scan_kernels": "ops.scan.kernels",
    "memory.launches": "ops.dispatch",
    "memory.plain": "ops.plain",
    "memory.routing": "memory.router",
    "memory.salience": "memory.write_gate",
    "memory.selection": "ops.select.tokens",
    "memory.selection_kernels": "ops.select.kernels",
    "memory.window_attention": "ops.read.windows",
    "progress": "cli.progress",
    "retrofit": "consolidation",
    "retrofit.baselines": "consolidation.rules.baselines",
    "retrofit.consolidate": "consolidation.pipeline",
    "retrofit.distil": "consolidation.learn.gradients",
    "retrofit.fit": "consolidation.learn.ridge",
    "retrofit.learn": "consolidation.learn.closed_form",
    "retrofit.recover": "consolidation.learn.recovery",
    "retrofit.observe": "consolidation.patch.observe",
    "retrofit.risk": "consolidation.guarantee",
    "retrofit.rules": "consolidation.rules.baselines",
    "retrofit.text": "consolidation.documents",
    "training.boosting": "training.irregular.boosting",
    "training.irregular_study": "training.irregular.study",
    "training.irregular_transfer": "training.irregular.transfer",
}
# Present module, old attribute -> new module and attribute.
ATTRIBUTES = {
    "cramlab": {"load": ("cramlab", "load_consolidated"), "read_report": ("cramlab", "skip_counts")},
    "cramlab.language_model.training": {"ModelName": ("cramlab.language_model.run", "ModelName")},
    "cramlab.pretrained": {
        "load": ("cramlab.pretrained", "load_consolidated"),
        "read_report": ("cramlab.pretrained", "skip_counts"),
    },
    "cramlab.consolidation.config": {
        "RetrofitConfig": ("cramlab.consolidation.config", "ConsolidationConfig"),
    },
    "cramlab.consolidation.folder": {
        "read_record": ("cramlab.consolidation.folder", "load_record"),
        "saved_layers": ("cramlab.consolidation.folder", "load_layers"),
        "report": ("cramlab.consolidation.folder", "skip_counts"),
        "Report": ("cramlab.consolidation.folder", "SkipCounts"),
    },
    "cramlab.consolidation.guarantee": {"Promise": ("cramlab.consolidation.guarantee", "Guarantee")},
    "cramlab.consolidation.learn.gradients": {"batches": ("cramlab.consolidation.learn.steps", "batches")},
    "cramlab.consolidation.measure": {
        "Rows": ("cramlab.auditing.resume", "TensorRows"),
        "at_threshold": ("cramlab.consolidation.rules.learned", "at_threshold"),
        "original_loss": ("cramlab.consolidation.measure", "mean_loss"),
    },
    "cramlab.consolidation.patch.far_reads": {"Installation": ("cramlab.consolidation.patch.calls", "Installation")},
    "cramlab.consolidation.pipeline": {
        "PromiseError": ("cramlab.consolidation.calibration", "GuaranteeError"),
    },
    "cramlab.consolidation.rules.baselines": {
        name: ("cramlab.consolidation.compare.sublayers", name)
        for name in ("Instead", "cosine_importance", "linear_maps", "measured_without", "replaced")
    },
    "cramlab.consolidation.rules.learned": {
        name: ("cramlab.consolidation.patch", name)
        for name in (
            "Counts",
            "closed",
            "consolidatable_sites",
            "install",
            "installed",
            "patched",
            "remove",
        )
    },
    "cramlab.tasks.srcd": {"SRCDDataset": ("cramlab.tasks.task", "BatchStream")},
    "cramlab.tasks.copying": {"CopyingDataset": ("cramlab.tasks.task", "BatchStream")},
    "cramlab.tasks.relabelling": {"RelabellingDataset": ("cramlab.tasks.task", "BatchStream")},
    "cramlab.cli.cost": {
        "Shares": ("cramlab.training.cost", "Shares"),
        "Measured": ("cramlab.training.cost", "Measured"),
        "surroundings": ("cramlab.training.cost", "surroundings"),
        "mixer_cost": ("cramlab.training.cost", "mixer_cost"),
        "measured_shares": ("cramlab.training.cost", "measured_shares"),
    },
    "cramlab.tasks.irregular.sources": {
        "outcome": ("cramlab.tasks.irregular.survival", "outcome"),
        "PBC_CHANNELS": ("cramlab.tasks.irregular.survival", "PBC_CHANNELS"),
        "NAFLD_CHANNELS": ("cramlab.tasks.irregular.survival", "NAFLD_CHANNELS"),
    },
    "cramlab.tasks.irregular.series": {
        "Scaling": ("cramlab.tasks.irregular.batches", "Scaling"),
        "collate": ("cramlab.tasks.irregular.batches", "collate"),
        "cut_off": ("cramlab.tasks.irregular.batches", "cut_off"),
        "VISITS_KEPT": ("cramlab.tasks.irregular.batches", "VISITS_KEPT"),
    },
    "cramlab.training.irregular.study": {
        "KIND": ("cramlab.training.irregular.documents", "KIND"),
        "VERSION": ("cramlab.training.irregular.documents", "VERSION"),
        "FILE": ("cramlab.training.irregular.documents", "FILE"),
        "read": ("cramlab.training.irregular.documents", "load"),
    },
    "cramlab.auditing.result": {
        "assemble": ("cramlab.auditing.figures", "assemble"),
        "Measured": ("cramlab.auditing.figures", "Measured"),
        "peak_memory_bytes": ("cramlab.auditing.figures", "peak_memory_bytes"),
        "CausalSums": ("cramlab.auditing.causal", "CausalSums"),
    },
    "cramlab.auditing.run": {"loss_of": ("cramlab.auditing.causal", "loss_of")},
    "cramlab.training.irregular": {
        name: ("cramlab.training.irregular.fit", name)
        for name in ("MODELS", "FitConfig", "Start", "fresh_config", "label_metrics", "measure", "training_loss")
    },
}


def attribute(module: str, name: str) -> Any:
    """An attribute under its old name.

    Raises:
        AttributeError: when the module has no attribute of this name and never had.
    """
    if name not in ATTRIBUTES.get(module, {}):
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    new_module, new_name = ATTRIBUTES[module][name]
    _warn(f"{module}.{name}", f"{new_module}.{new_name}", stacklevel=4)
    return getattr(importlib.import_module(new_module), new_name)


def new_name(old: str) -> str | None:
    """The present name of an old module; None for a name that is not old."""
    path = old.removeprefix("cramlab.")
    if path in MODULES:
        return f"cramlab.{MODULES[path]}"
    package, _, last = path.rpartition(".")
    return f"cramlab.{MODULES[package]}.{last}" if package in MODULES else None


def register() -> None:
    """Lets Python find modules and attributes under their old names."""
    if not any(isinstance(finder, _OldNames) for finder in sys.meta_path):
        sys.meta_path.insert(0, _OldNames())


class _OldNames(MetaPathFinder):
    """Finds old modules, and gives old attributes to present modules."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not fullname.startswith("cramlab."):
            return None
        new = new_name(fullname)
        if new is not None:
            return ModuleSpec(fullname, _Moved(new)) if importlib.util.find_spec(new) else None
        spec = PathFinder.find_spec(fullname, path, target) if fullname in ATTRIBUTES else None
        if spec is not None and spec.loader is not None:
            _with_old_attributes(spec.loader)
        return spec


class _Moved(Loader):
    """Puts the present module under the old name, so that both names are one module."""

    def __init__(self, new: str) -> None:
        self.new = new

    def exec_module(self, module: ModuleType) -> None:
        old = module.__name__
        _warn(old, self.new, stacklevel=3)
        found = importlib.import_module(self.new)
        sys.modules[old] = _CallablePackage(old, found) if old == "cramlab.audit" else found


class _CallablePackage(ModuleType):
    """`cramlab.audit` as the old package, which can be called as the function of this name that has replaced it."""

    def __init__(self, name: str, package: ModuleType) -> None:
        super().__init__(name)
        self.__path__ = package.__path__
        self._package = package

    def __getattr__(self, name: str) -> Any:
        return getattr(self._package, name)

    def __call__(self, *args: Any, **settings: Any) -> Any:
        from cramlab.pretrained import audit

        return audit(*args, **settings)


def _with_old_attributes(loader: Any) -> None:
    """Gives the module that a loader executes a `__getattr__` for its old attributes."""
    execute = loader.exec_module

    def execute_then_add(module: ModuleType) -> None:
        execute(module)
        module.__dict__.setdefault("__getattr__", lambda name: attribute(module.__name__, name))

    loader.exec_module = execute_then_add


def _warn(old: str, new: str, stacklevel: int) -> None:
    warnings.warn(f"{old} is now {new}; the old name goes in the next release", DeprecationWarning, stacklevel)
