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

_CONFIGS = {
    "transformers.models.auto.configuration_auto": "cramlab.hf.configuration",
    "transformers.models.auto.modeling_auto": "cramlab.hf.configuration_gpt2",
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
    try:
        importlib.import_module(_CONFIGS[registry])
    except ImportError as error:
        warnings.warn(f"transformers' Auto classes will not know cramlab's models: {error}", stacklevel=2)
