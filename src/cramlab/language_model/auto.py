"""Registers the library's models with transformers' Auto classes, whichever package is imported first.

transformers is not imported for this. An import hook waits for its registries; each import of a registry is followed by
the import of one of our configs, which registers itself.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

_MODELS, _GPT2 = "transformers.models.auto.modeling_auto", "transformers.models.gpt2.configuration_gpt2"
_CONFIGS = {
    "transformers.models.auto.configuration_auto": "cramlab.language_model.configuration",
    _MODELS: "cramlab.language_model.configuration_gpt2",
    _GPT2: "cramlab.language_model.configuration_gpt2",  # its import imports the registry halfway
}


class _Registering(MetaPathFinder):
    """Finds a registry as Python does, and registers our config after its execution."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(fullname, path, target) if fullname in _CONFIGS else None
        if spec is None or spec.loader is None:
            return None
        loader: Any = spec.loader
        execute = loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            _register(fullname)

        loader.exec_module = execute_and_register
        return spec


def register() -> None:
    """Registers the models, now or as soon as transformers' registries are imported."""
    sys.meta_path.insert(0, _Registering())
    for registry in _CONFIGS:
        if registry in sys.modules:
            _register(registry)


def _register(registry: str) -> None:
    """Imports a config, which registers itself; warns when the installed transformers is too old for it."""
    if registry in (_MODELS, _GPT2) and not _imported(registry):
        return  # the import of the other registry calls this again
    try:
        importlib.import_module(_CONFIGS[registry])
    except ImportError as error:
        warnings.warn(f"transformers' Auto classes will not know cramlab's models: {error}", stacklevel=2)


def _imported(registry: str) -> bool:
    """Whether the registry of models is complete, and GPT-2's config is complete or not yet imported."""
    models, gpt2 = sys.modules.get(_MODELS), sys.modules.get(_GPT2)
    ready = hasattr(gpt2, "GPT2Config") or (gpt2 is None and registry == _MODELS)
    return ready and hasattr(models, "AutoModelForCausalLM")
