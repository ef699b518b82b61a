"""Bad settings: for every field of every config, by --set and in Python, and for every flag of every command."""

from __future__ import annotations

import collections
import dataclasses
import functools
import importlib
import itertools
import json
import math
import pkgutil
import random
import types
import typing
from collections.abc import Iterator
from typing import Any, Literal, Union, get_args, get_origin
from unittest import mock

import cramlab
from cramlab.auditing import AuditConfig
from cramlab.catalog import MIXERS
from cramlab.cli import main as cli
from cramlab.config import to_dict
from cramlab.consolidation.config import ConsolidationConfig
from cramlab.experiments import EXPERIMENTS
from cramlab.memory import CRAMConfig
from cramlab.model import ModelConfig
from cramlab.tasks.srcd import SRCDConfig
from cramlab.training.run import RunConfig, TrainingConfig
from faults.cases import Case, Fault, FaultFoundError, answer, check_refusal
from faults.commands import AUDIT, CONSOLIDATE, RUN, WRITERS
from faults.material import fresh, model_folder, stays, texts

NAN, INF = math.nan, math.inf
# Values that a field of each kind must refuse, as text of --set.
TEXT_FOR = {
    float: ("nan", "inf", "-inf", "1e400", "x", "", "é", "1;2"),
    int: ("nan", "inf", "1.5", "1e3", "x", "", "é", "0b1", "1 2"),
    bool: ("maybe", "", "nan", "2"),
    str: (),
}
# Values that such a field may refuse or accept, and must then work with.
PLAUSIBLE = {float: ("-1", "0", "1e-300", "1e300"), int: ("-1", "0", "1"), bool: (), str: ("", "é", "../x")}
HUGE = {float: ("1e30",), int: ("9" * 25,), bool: (), str: ()}
# The same in Python.
VALUE_FOR = {
    float: (NAN, INF, -INF, 10**400, "x", "0.5", "", None, (), [0.5], {}, 1j),
    int: (NAN, INF, 1.5, True, "x", "64", "", None, (), [1], {}, 1j),
    bool: ("x", "", None, 2, NAN, ()),
    str: (None, 5, NAN, (), b"x"),
}
RUN_NAMES = ("experiment", "size", "mixer", "seed", "variant")  # --set refuses them by name


def cases(seed: int, share: float) -> Iterator[Case]:
    """Settings by --set, in Python, in two orders, and flags."""
    yield from _by_set("run", "--set of cramlab run", share, seed)
    yield from _by_set("audit", "--set of cramlab audit", share, seed)
    yield from _by_set("consolidate", "--set of cramlab consolidate", share, seed)
    yield from _in_python(share, seed)
    yield from _in_two_orders(share, seed)
    yield from _flags(share, seed)


def thinned(found: list[Any], share: float, seed: int) -> list[Any]:
    """A share of a list, at least one, in its order, drawn with the seed."""
    n = max(1, round(share * len(found)))
    return found if n >= len(found) else [found[i] for i in sorted(random.Random(seed).sample(range(len(found)), n))]


def kind_of(hint: Any) -> tuple[type, bool, bool]:
    """Plain type that a field holds, whether None is allowed, and whether it holds a sequence of them."""
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    for option in options:
        if option in (bool, int, float, str):
            return option, type(None) in options, False
        if get_origin(option) is Literal:
            return str, type(None) in options, False
        if get_origin(option) is tuple and get_args(option)[0] in (int, float, str):
            return get_args(option)[0], type(None) in options, True
    return object, type(None) in options, False


def leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Path and type hint of every field that --set can change."""
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{prefix}{field.name}.")
        elif kind_of(hints[field.name])[0] is not object:
            yield f"{prefix}{field.name}", hints[field.name]


def _argv(command: str, mixer: str = "cram") -> list[str]:
    """A small call of a command; what follows sets fields."""
    match command:
        case "run":
            return ["run", f"srcd/{mixer}", "--size", "tiny", "--seed", "0", *RUN, "--set=training.max_steps=2"]
        case "audit":
            return ["audit", str(model_folder()), "--text", str(texts()), "--other-text", "none", "--no-controls",
                    *AUDIT]  # fmt: skip
        case _:
            return ["consolidate", str(model_folder()), "--text", str(texts()), "--max-loss-increase", "0.5",
                    *CONSOLIDATE]  # fmt: skip


def _run_config(mixer: str) -> RunConfig:
    return next(EXPERIMENTS["srcd"](size="tiny", seed=0, mixers=[mixer]))[0]


def _by_set(command: str, test: str, share: float, seed: int) -> Iterator[Case]:
    """Every field with harmful, doubtful and huge values, and malformed assignments."""
    configs: dict[str, Any] = {"audit": AuditConfig(), "consolidate": ConsolidationConfig()}
    if command == "run":
        found = [("cram", path, hint) for path, hint in leaves(_run_config("cram")) if path not in RUN_NAMES]
        for mixer in MIXERS:
            known = {path for _, path, _ in found}
            found += [(mixer, path, hint) for path, hint in leaves(_run_config(mixer).model, "model.")
                      if path not in known]  # fmt: skip
    else:
        found = [("", path, hint) for path, hint in leaves(configs[command])]
    tried = []
    for mixer, path, hint in found:
        kind, optional, sequence = kind_of(hint)
        wrong = [v for v in TEXT_FOR[kind] if not (sequence and v in ("", "1 2")) and not (optional and v == "")]
        if get_origin(hint) is Literal:
            wrong += ["nonsense", "é", ""]
        tried += [(mixer, f"{path}={value}", "harmful") for value in wrong]
        tried += [(mixer, f"{path}={value}", "doubtful") for value in PLAUSIBLE[kind] if kind is not str]
        tried += [(mixer, f"{path}={value}", "huge") for value in HUGE[kind]]
    one = found[0][1]
    tried += [(found[0][0], text, "harmful") for text in (
        "x", "=", "=1", ".=1", f"{one}", f"{one}.deeper=1", f".{one}=1", f"{one}.=1", "nope=1", f"{one}x=1", "é=1",
    )]  # fmt: skip
    if command == "run":
        tried += [("cram", f"{group}=1", "harmful") for group in ("training", "model", "task", "model.mixer")]
        tried += [("cram", f"{name}=1", "harmful") for name in RUN_NAMES]
    for mixer, assignment, expected in thinned(tried, share, seed):
        name = f"{' '.join(_argv(command, mixer)[:2]) if command == 'run' else command} --set {assignment}"
        yield Case(test, name, functools.partial(_set, command, mixer, assignment, expected),
                   apart=expected == "doubtful")  # fmt: skip


def _set(command: str, mixer: str, assignment: str, expected: str) -> None:
    """Checks that harmful values are refused before anything is written, and that others are refused or work."""
    out = fresh("set")
    argv = [*_argv(command, mixer), f"--set={assignment}", "--out", str(out)]
    if expected == "huge":
        with mock.patch("cramlab.training.jobs.run_jobs", return_value=[]):
            given = answer(lambda: cli(argv)) if command == "run" else None
        if given is not None and given.code:
            check_refusal(given)
        return
    given = answer(lambda: cli(argv))
    if expected == "harmful":
        check_refusal(given, [*filter(None, assignment.partition("=")[0].split(".")), "--set", "field"])
        if given.code == 2 and out.exists():
            raise FaultFoundError(Fault.LEFTOVER, f"refused, and {out.name} was made all the same")
    elif given.code:
        check_refusal(given)
    elif command == "run" and (bad := _not_finite(out)):
        raise FaultFoundError(Fault.WRONG, f"exit code 0, and the record's {bad} is not finite")


def _not_finite(out: Any) -> str:
    """The first loss of a run's record that is not finite."""
    for path in out.rglob("record.json"):
        for row in json.loads(path.read_text(encoding="utf-8"))["series"]:
            for name, value in row["loss"].items():
                if value is None or not math.isfinite(value):
                    return name
    return ""


# Arguments of classes that cannot be built without any.
EXAMPLES: dict[str, dict[str, Any]] = collections.defaultdict(dict) | {
    "ModelConfig": {"mixer": CRAMConfig()},
    "RunConfig": {
        "experiment": "e", "size": "tiny", "mixer": "cram", "seed": 0, "task": SRCDConfig(),
        "model": ModelConfig(mixer=CRAMConfig()), "training": TrainingConfig(),
    },
    "Promise": {"increase": 0.02, "bound": 0.1, "delta": 0.1},
}  # fmt: skip


@functools.cache
def config_classes() -> tuple[type, ...]:
    """Every dataclass of the library that is a config, and the classes that they are made of."""
    found: dict[str, type] = {}
    for module in pkgutil.walk_packages(cramlab.__path__, "cramlab."):
        if any(name in module.name for name in ("kernels", "ray_jobs", "__main__")):
            continue
        for value in vars(importlib.import_module(module.name)).values():
            if not (isinstance(value, type) and dataclasses.is_dataclass(value)):
                continue
            named = value.__name__.endswith("Config") or value.__name__ in ("Stage", "Promise")
            if named and value.__module__.startswith("cramlab.") and not hasattr(value, "model_type"):
                found[value.__name__] = value
    return tuple(found[name] for name in sorted(found))


def _in_python(share: float, seed: int) -> Iterator[Case]:
    """Every field of every config class with values of wrong types, NaN and infinities."""
    tried = []
    for cls in config_classes():
        given = EXAMPLES["RunConfig" if issubclass(cls, RunConfig) else cls.__name__]
        for name, hint in typing.get_type_hints(cls).items():
            kind, optional, sequence = kind_of(hint)
            if name not in {field.name for field in dataclasses.fields(cls) if field.init}:
                continue
            values: list[Any]
            if kind is object:
                mapping = get_origin(hint) is dict  # which may be empty
                values = [5, "x", NAN, *([] if mapping else [{}]), *([] if optional else [None])]
            elif sequence:
                values = [(value,) for value in VALUE_FOR[kind]] + [5, NAN, *([] if optional else [None])]
            else:
                values = [value for value in VALUE_FOR[kind] if not (optional and value is None)]
            if get_origin(hint) is Literal:
                values += ["nonsense", "", "é"]
            tried += [(cls, given, name, value) for value in values]
    for i, (cls, given, name, value) in enumerate(tried):
        label = repr(value) if len(repr(value)) < 40 else f"{repr(value)[:8]}..."
        if len(tried) * share >= len(tried) or i in _chosen(len(tried), share, seed):
            yield Case("configs built in Python", f"{cls.__name__}({name}={label}) #{i}",
                       functools.partial(_built, cls, given, name, value))  # fmt: skip


@functools.cache
def _chosen(n: int, share: float, seed: int) -> frozenset[int]:
    return frozenset(thinned(list(range(n)), share, seed))


def _built(cls: type, given: dict[str, Any], name: str, value: Any) -> None:
    """Checks that building the config raises a ValueError that names the field."""
    try:
        cls(**given | {name: value})
    except ValueError as error:
        if name not in str(error):
            raise FaultFoundError(Fault.UNCLEAR, f"{name} is not named in {str(error)[:160]!r}") from error
        return
    raise FaultFoundError(Fault.ACCEPTED, f"{cls.__name__}({name}={value!r}) was built")


# Settings that depend on each other: the outcome must be the same in any order.
TOGETHER = (
    ("task.query_frac", ("0.05", "0.2", "0.4")), ("task.write_frac", ("0.1", "0.3", "0.6")),
    ("task.seq_len", ("64", "256")), ("task.n_patterns", ("4", "16", "100")), ("task.recurring_frac", ("0.1", "0.9")),
    ("task.key_mode", ("token", "vector")), ("task.n_values", ("8", "64")), ("task.n_novel_keys", ("4", "1024")),
    ("model.d_model", ("24", "30", "128")), ("model.mixer.episodic.n_heads", ("3", "4", "5")),
    ("model.mixer.router.name", ("gumbel", "never", "benefit")), ("model.n_layers", ("1", "2")),
)  # fmt: skip


def _in_two_orders(share: float, seed: int) -> Iterator[Case]:
    """Pairs and triples of settings, forwards and backwards."""
    rng = random.Random(seed)
    for i in range(max(2, round(share * 120))):
        fields = rng.sample(TOGETHER, rng.choice((2, 2, 3)))
        chosen = [f"{path}={rng.choice(values)}" for path, values in fields]
        yield Case("--set in any order", f"order #{i}: {' '.join(chosen)}", functools.partial(_orders, chosen))


def _orders(assignments: list[str]) -> None:
    found = {}
    for order in itertools.permutations(assignments):
        taken: list[Any] = []

        def engine(configs: list[RunConfig], *_: Any, taken: list[Any] = taken, **__: Any) -> list[Any]:
            taken.extend(map(to_dict, configs))
            return []

        argv = ["run", "srcd/cram", "--size", "tiny", "--out", str(fresh("order"))]
        with mock.patch("cramlab.training.jobs.run_jobs", engine):
            given = answer(lambda argv=argv, order=order: cli([*argv, *(f"--set={text}" for text in order)]))
        if given.code:
            check_refusal(given)
        found[order] = taken
    if any(taken != next(iter(found.values())) for taken in found.values()):
        said = "; ".join(f"{' '.join(order)}: {'accepted' if taken else 'refused'}" for order, taken in found.items())
        raise FaultFoundError(Fault.WRONG, f"the outcome depends on the order: {said}"[:240])


def _flags(share: float, seed: int) -> Iterator[Case]:
    """Flags with invalid values."""
    nothing, folder, file = "/no/such/thing", str(texts()), str(sorted(texts().iterdir())[0])
    run, run_folder = _argv("run"), str(WRITERS["run"].finished)
    audit, consolidate = _argv("audit"), _argv("consolidate")
    irregular = ["irregular", "--data", "physionet2012", "--path", str(stays())]
    out = ["--out", "OUT"]
    numbers = ("-1", "0", "1.5", "x", "", "nan", "é", "9" * 30)
    calls = [["run", name, *out] for name in (
        "", "x", "srcd/", "srcd/x", "/", "srcd/cram,cram", "srcd/cram,,", "srcd/cram/cram", "é", "srcd /cram",
        "../srcd",
    )]  # fmt: skip
    calls += [[*run, flag, value, *out] for flag in ("--jobs",) for value in numbers if value != "9" * 30]
    calls += [[*run, "--seed", value, *out] for value in ("-1", "1.5", "x", "", "nan", str(2**64), str(-(2**63)))]
    calls += [[*run, "--size", value, *out] for value in ("", "x", "Tiny", "é")]
    calls += [[*run, "--engine", "x", *out], [*run, "--out", file], [*run], [*run, "--nope", *out]]
    calls += [[*run, "--set", "training.n_threads=1000000", *out]]
    for flag in ("--threads", "--tokens", "--batch-tokens"):
        usual = [word for word in audit if not word.startswith("--set=fit_tokens")]  # which would win
        calls += [[*usual, flag, value, *out] for value in numbers if not (flag != "--threads" and value == "9" * 30)]
    calls += [[*audit, "--layers", value, *out] for value in ("", "x", "-1", "1,", "99", "0,0,x", "1.5", "²")]
    calls += [[*audit, "--device", value, *out] for value in ("", "x", "cuda:99", "é")]
    calls += [[*audit, "--other-text", value, *out] for value in (nothing, "", "x")]
    for words in (["audit"], ["consolidate", "--max-loss-increase", "0.5"]):
        sets = AUDIT if words[0] == "audit" else CONSOLIDATE
        for model in (nothing, "", "x", file, folder, "no/such", "é/é", run_folder, "/dev/null", "."):
            calls.append([words[0], model, *words[1:], "--text", folder, *sets, *out])
        for text in (nothing, "", "x", run_folder, "/dev/null"):
            calls.append([words[0], str(model_folder()), *words[1:], "--text", text, *sets, *out])
    calls += [["audit", "--text", folder, *out], [*audit, "--checkpoints", folder, *out]]
    calls += [["audit", "--checkpoints", where, "--text", folder, *out] for where in (nothing, folder, file, "")]
    calls += [[*consolidate, "--threads", value, *out] for value in numbers]
    calls += [[*consolidate, "--max-loss-increase", v, *out] for v in ("nan", "inf", "-1", "0", "x", "", "1e400")]
    calls += [[*consolidate, "--device", value, *out] for value in ("", "x", "cuda:99", "meta")]
    calls += [[*consolidate, "--from", where, *out] for where in (nothing, folder, file, run_folder)]
    calls += [[*consolidate, "--further-text", where, *out] for where in (nothing, "", "x")]
    calls += [[*irregular, "--seeds", value, *out] for value in ("-1", "0", "1.5", "x", "", "nan")]
    calls += [[*irregular, "--models", value, *out] for value in ("", "x", "cram,", ",", "é", "cram,x")]
    calls += [[*irregular, "--ways", "x", *out], [*irregular, "--source", nothing, *out]]
    calls += [[*irregular, "--source", where, *out] for where in (folder, file, run_folder)]
    calls += [["irregular", "--data", data, "--path", str(stays()), *out] for data in ("x", "", "mimic3",
               "person-activity")]  # fmt: skip
    calls += [["irregular", "--data", "physionet2012", "--path", where, *out] for where in (nothing, file, folder)]
    calls += [["irregular", "--data", "physionet2012", *out]]
    calls += [[verb, where] for verb in ("eval", "cost", "show") for where in (nothing, folder, file, "", "é")]
    calls += [["report", where, "--out", "PAGE"] for where in (nothing, folder, file, "")]
    calls += [["report", run_folder, "--out", where] for where in ("/dev/null", "x.txt", "", f"{file}/x.html")]
    calls += [[], ["x"], ["--nope"], ["show"], ["eval"], ["report", run_folder], ["show", "srcd", "--size", "x"]]
    for call in thinned(calls, share, seed):
        yield Case("flags and names", f"flags: {_short(call)}", functools.partial(_flag, call), apart=True)


def _short(call: list[str]) -> str:
    """A call without scratch folders and usual settings, so that its name is the same in every run."""
    text = " ".join(word or "''" for word in call)
    for sets in (RUN, AUDIT, CONSOLIDATE):
        text = text.replace(" " + " ".join(sets), " SETS")
    for path, name in ((model_folder(), "MODEL"), (texts(), "TEXTS"), (stays(), "STAYS"),
                       (WRITERS["run"].finished, "RUN")):  # fmt: skip
        text = text.replace(str(path), name)
    return text


def _flag(call: list[str]) -> None:
    out = fresh("flag")
    known = {"OUT": str(out), "PAGE": str(out.with_suffix(".html"))}
    check_refusal(answer(lambda: cli([known.get(word, word) for word in call])))
