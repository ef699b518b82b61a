"""Makes `settings.json`, which `cramlab.cli.settings` reads: `python -m cramlab.cli.make_settings`."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import Any

from cramlab.auditing import AuditConfig
from cramlab.cli.settings import FILE, LABELS
from cramlab.config import fields_of, leaves
from cramlab.consolidation.config import ConsolidationConfig
from cramlab.errors import ConfigError
from cramlab.experiments import EXPERIMENTS
from cramlab.experiments.variants import VARIANTS
from cramlab.files import write_json
from cramlab.names import Fields
from cramlab.tasks.srcd import SIZES

_EXAMPLE = ("srcd", "cram", "small")  # the run whose values the help shows


def collected() -> dict[str, Any]:
    """Collects the content of the file from the code.

    Returns:
        "experiments": for each its one-line description and, for each mixer ("" for the experiment's own), the
        numbers of the trees of its runs' configs. "sizes", "mixers": names. "trees": classes of nested configs.
        "commands": for each command with `--set` a title, the tree of its config, and by path the class that the field
        belongs to and the value. "configs": for each class its fields with one sentence each.
    """
    trees: list[Any] = []
    configs: dict[str, dict[str, str]] = {}
    experiments: dict[str, Any] = {}
    for name, experiment in EXPERIMENTS.items():
        of_mixer: dict[str, list[int]] = {}
        for mixer in ("", *VARIANTS):
            for run in _first_round(experiment, list(SIZES), [mixer] if mixer else None):
                _describe(run, configs)
                if (tree := _tree(run)) not in trees:
                    trees.append(tree)
                known = of_mixer.setdefault(mixer, [])
                if (number := trees.index(tree)) not in known:
                    known.append(number)
        experiments[name] = {"about": (experiment.__doc__ or "").splitlines()[0], "trees": of_mixer}
    experiment, mixer, size = _EXAMPLE
    (example,) = next(EXPERIMENTS[experiment](size=size, seed=0, mixers=[mixer]))
    titles = {
        "run": f"fields of --set, with their values in {experiment}/{mixer} at size {size}; "
        "cramlab show NAME --size S prints those of other runs:",
        "audit": "fields of --set, with their defaults:",
        "consolidate": "fields of --set, with their defaults:",
    }
    commands: dict[str, Any] = {}
    for command, config in (("run", example), ("audit", AuditConfig()), ("consolidate", ConsolidationConfig())):
        _describe(config, configs)
        values = {path: [owner, value] for path, owner, value in leaves(config)}
        if command == "run":
            values = {path: value for path, value in values.items() if path not in LABELS}
        commands[command] = {"title": titles[command], "tree": _tree(config), "values": values}
    return {
        "experiments": experiments,
        "sizes": list(SIZES),
        "mixers": list(VARIANTS),
        "trees": trees,
        "commands": commands,
        "configs": configs,
    }


def _first_round(experiment: Any, sizes: list[str], mixers: list[str] | None) -> list[Any]:
    """The configs of an experiment's first round at the first size that it has; none for mixers that it refuses."""
    for size in sizes:
        try:
            return next(experiment(size=size, seed=0, mixers=mixers))
        except (ConfigError, KeyError):
            continue
    return []


def _tree(config: Any) -> list[Any]:
    """The classes of a config and of the configs that its fields hold."""

    def plain(fields: Fields) -> list[Any]:
        return [fields.config, {name: plain(group) for name, group in fields.groups.items() if group is not None}]

    return plain(fields_of(config))


def _describe(config: Any, configs: dict[str, dict[str, str]]) -> None:
    """Adds the fields of a config and of the configs in it, with a sentence each, to `configs`."""
    about: dict[str, str] = {}
    for kind in reversed(type(config).__mro__):
        about |= _attributes(kind.__doc__ or "")
    names = [field.name for field in dataclasses.fields(config)]
    configs[type(config).__name__] = {name: about.get(name, "") for name in names}
    for value in (getattr(config, name) for name in names):
        if dataclasses.is_dataclass(value):
            _describe(value, configs)


def _attributes(doc: str) -> dict[str, str]:
    """The first sentence on each attribute in a docstring's section `Attributes`."""
    found: dict[str, str] = {}
    name = ""
    for line in inspect.cleandoc(doc).partition("Attributes:\n")[2].splitlines():
        if not line.startswith("    "):
            break
        if line.startswith("        "):
            found[name] += f" {line.strip()}"
        else:
            name, _, text = line.strip().partition(": ")
            found[name] = text
    return {name: text.split(". ")[0].rstrip(".") for name, text in found.items()}


if __name__ == "__main__":
    write_json(Path(__file__).with_name(FILE), collected())
