"""The library's models are known to transformers' Auto classes once both packages have been imported, in any order.

transformers is not imported for it: where its registries have not been imported yet, the import of each is followed by
that of a config of ours, which registers itself.
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
    _GPT2: "cramlab.language_model.configuration_gpt2",  # who asks for GPT-2's config first imports the registry in it
}


class _Registering(MetaPathFinder):
    """Finds a registry as Python does, and registers our config when it has been executed."""

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
    """Imports what registers itself; a transformers that is too old for us must not fail because of us."""
    if registry in (_MODELS, _GPT2) and not _imported(registry):
        return  # the other of the two follows, and its turn comes again
    try:
        importlib.import_module(_CONFIGS[registry])
    except ImportError as error:
        warnings.warn(f"transformers' Auto classes will not know cramlab's models: {error}", stacklevel=2)


def _imported(registry: str) -> bool:
    """Whether the registry of models is whole, and GPT-2's config is whole or has not been asked for."""
    models, gpt2 = sys.modules.get(_MODELS), sys.modules.get(_GPT2)
    ready = hasattr(gpt2, "GPT2Config") or (gpt2 is None and registry == _MODELS)
    return ready and hasattr(models, "AutoModelForCausalLM")
