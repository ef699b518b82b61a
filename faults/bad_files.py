"""Damaged files of the library: records, configs, checkpoints, audits, consolidations and unfinished work.

Damage that cannot be noticed (another digit in a file without a digest) must only cause no traceback; where the library
keeps a digest, everything that it accepts must be what was written.
"""

from __future__ import annotations

import codecs
import copy
import functools
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from cramlab.cli import main as cli
from cramlab.consolidation import folder as consolidation_folder
from cramlab.consolidation import in_use
from cramlab.errors import ConsolidationError
from cramlab.hf.loading import load
from faults.apart import apart
from faults.bad_settings import thinned
from faults.cases import Case, Fault, FaultFoundError, answer, check_refusal
from faults.commands import WRITERS, Writer, contents, differences
from faults.kills import Places
from faults.material import copied, model_folder

Damage = Callable[[bytes, random.Random], bytes]

# Damage after which no file may be accepted.
GROSS: dict[str, Damage] = {
    "empty": lambda *_: b"",
    "cut at the start": lambda data, _: data[:5],
    "cut in the middle": lambda data, _: data[: len(data) // 2],
    "cut by one byte": lambda data, _: data.rstrip()[:-1],
    "a page that says 404": lambda *_: b"<!DOCTYPE html><title>404 Not Found</title>",
    "a git-lfs pointer": lambda *_: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n",
    "a picture": lambda *_: b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + bytes(range(256)),
    "an archive": lambda *_: b"PK\x03\x04" + bytes(64),
    "zeros": lambda data, _: bytes(len(data)),
    "UTF-16": lambda data, _: codecs.BOM_UTF16_LE + data.decode("latin-1").encode("utf-16-le"),
    "deep nesting": lambda *_: b"[" * 100_000,
    "deep objects": lambda *_: b'{"a":' * 50_000,
    "another JSON": lambda *_: b'{"hello": [1, 2, 3]}',
    "a list": lambda *_: b"[]",
    "null": lambda *_: b"null",
    "a number": lambda *_: b"1e999",
    "a string": lambda *_: b'"record"',
    "the second half": lambda data, _: data[len(data) // 2 :],
    "no UTF-8 at the start": lambda data, _: b"\xff\xfe" + data,
}


def flipped(data: bytes, rng: random.Random) -> bytes:
    """One bit is another."""
    place = rng.randrange(len(data))
    return data[:place] + bytes([data[place] ^ (1 << rng.randrange(8))]) + data[place + 1 :]


def cases(seed: int, share: float) -> Iterator[Case]:
    """All kinds of files."""
    for name in ("run", "audit", "consolidate"):
        assert WRITERS[name].wanted  # made here, once, and not in the process of every case
    for maker in (_records, _configs, _checkpoints, _audits, _consolidations, _unfinished):
        found = list(maker(seed))
        yield from thinned(found, share, seed)


def damages(seed: int, what: str, n_flips: int) -> Iterator[tuple[str, Damage, random.Random, bool]]:
    """For each way to damage a file: its name, the function, its random generator, and whether the damage is gross."""
    for name, damage in GROSS.items():
        yield name, damage, random.Random(f"{seed} {what} {name}"), True
    for i in range(n_flips):
        yield f"flipped bit {i}", flipped, random.Random(f"{seed} {what} {i}"), False


def changed_fields(data: Any, rng: random.Random, n: int) -> Iterator[tuple[str, Any]]:
    """Copies of JSON data with one field each removed or changed."""
    paths = list(_paths(data))
    for _ in range(n):
        path = rng.choice(paths)
        value = rng.choice([None, "x", -1, 10**30, float("nan"), float("inf"), [], {}, True, "\ud800", "GONE"])
        changed = copy.deepcopy(data)
        holder = functools.reduce(lambda held, key: held[key], path[:-1], changed)
        if value == "GONE" and isinstance(holder, dict):
            del holder[path[-1]]
        else:
            holder[path[-1]] = value
        yield f"{'.'.join(map(str, path))} = {value!r}", changed


def _paths(data: Any, before: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = data.items() if isinstance(data, dict) else enumerate(data[:2]) if isinstance(data, list) else ()
    for key, value in items:
        yield (*before, key)
        yield from _paths(value, (*before, key))


# Records: shown, and drawn in a report.


def _records(seed: int) -> Iterator[Case]:
    source = next(WRITERS["run"].finished.rglob("record.json"))
    for verb in ("show", "report"):
        for name, damage, rng, gross in damages(seed, f"record {verb}", 12):
            check = functools.partial(_record, verb, source, lambda data, d=damage, r=rng: d(data, r), gross)
            yield Case("damaged records", f"{verb} of a record: {name}", check, apart=True)
        changed = changed_fields(json.loads(source.read_text()), random.Random(f"{seed} {verb}"), 60)
        for i, (name, data) in enumerate(changed):
            text = json.dumps(data).encode()
            check = functools.partial(_record, verb, source, lambda _, t=text: t, False)
            yield Case("damaged records", f"{verb} of a record, field {i}: {name}", check, apart=True)
        for name in ("[/x]", "[bold]x", "\x1b[2Jx", "\ud800", "\u202e", "é", "a" * 10_000, "<script>alert(1)</script>"):
            data = json.loads(source.read_text()) | {"mixer": name}
            text = json.dumps(data).encode()
            check = functools.partial(_record, verb, source, lambda _, t=text: t, False)
            yield Case("damaged records", f"{verb} of a record by {name[:20]!r}", check, apart=True)


def _record(verb: str, source: Path, damage: Callable[[bytes], bytes], gross: bool) -> None:
    path = copied(source, "record").with_name("record.json")
    path.write_bytes(damage(source.read_bytes()))
    page = path.with_name("page.html")
    argv = [verb, str(path), *(["--out", str(page)] if verb == "report" else [])]
    given = answer(lambda: cli(argv))
    if given.code or gross:
        check_refusal(given)
    printed = given.out + given.err + (page.read_text(encoding="utf-8") if page.exists() else "")
    for evil in ("\x1b[2J", *(("<script>alert",) if verb == "report" else ())):
        if evil in printed:
            raise FaultFoundError(Fault.ACCEPTED, f"{evil!r} comes out as it was put in")


# A run's config and checkpoint: measured, costed, continued.


def _run_folder() -> Path:
    return next(WRITERS["run"].finished.rglob("checkpoint.pt")).parent


def _configs(seed: int) -> Iterator[Case]:
    source = _run_folder()
    for verb in ("eval", "cost", "run"):
        for name, damage, rng, gross in damages(seed, f"config {verb}", 6):
            check = functools.partial(_damaged_run, verb, "config.json", lambda d, f=damage, r=rng: f(d, r), gross)
            yield Case("damaged configs of runs", f"{verb}, config.json: {name}", check, apart=True)
        data = json.loads((source / "config.json").read_text())
        for i, (name, changed) in enumerate(changed_fields(data, random.Random(f"{seed} {verb}"), 50)):
            text = json.dumps(changed).encode()  # a change without effect on the output may be accepted
            check = functools.partial(_damaged_run, verb, "config.json", lambda _, t=text: t, False)
            yield Case("damaged configs of runs", f"{verb}, config.json, field {i}: {name}", check, apart=True)


def _checkpoints(seed: int) -> Iterator[Case]:
    for verb in ("eval", "cost", "run"):
        for name, damage, rng, gross in damages(seed, f"checkpoint {verb}", 25 if verb == "eval" else 10):
            check = functools.partial(_damaged_run, verb, "checkpoint.pt", lambda d, f=damage, r=rng: f(d, r), gross)
            yield Case("damaged checkpoints of runs", f"{verb}, checkpoint.pt: {name}", check, apart=True)


def _damaged_run(verb: str, file: str, damage: Callable[[bytes], bytes], gross: bool) -> None:
    """Damages one file of a folder; if it is accepted, the output must be that of the intact file."""
    source = _run_folder()
    out = copied(WRITERS["run"].finished, "run")
    folder = out / source.name
    (folder / file).write_bytes(damage((source / file).read_bytes()))
    if (folder / file).read_bytes() == (source / file).read_bytes():
        return
    if verb == "run":
        (folder / "record.json").unlink()
        given = WRITERS["run"].run(out, resume=True)
    else:
        given = answer(lambda: cli([verb, str(folder)]))
    if given.code or gross:
        check_refusal(given)
    if given.code:
        return
    if verb == "run":
        wrong = ", ".join(differences(contents(out), WRITERS["run"].wanted))
    else:
        whole = answer(lambda: cli([verb, str(source)]))
        wrong = "other figures" if whole.out != given.out else ""
    if wrong:
        raise FaultFoundError(Fault.WRONG, f"accepted without an error: {wrong}")


# Finished audits and consolidations: kept with --resume, loaded, calibrated again.


def _audits(seed: int) -> Iterator[Case]:
    for name, damage, rng, gross in damages(seed, "audit", 6):
        check = functools.partial(_resumed, WRITERS["audit"], "audit.json", lambda d, f=damage, r=rng: f(d, r), gross)
        yield Case("damaged audits and consolidations", f"audit --resume, audit.json: {name}", check, apart=True)


def _resumed(writer: Writer, file: str, damage: Callable[[bytes], bytes], gross: bool) -> None:
    out = copied(writer.finished, "done")
    (out / file).write_bytes(damage((writer.finished / file).read_bytes()))
    given = writer.run(out, resume=True)
    if given.code or gross:
        check_refusal(given)


def _consolidations(seed: int) -> Iterator[Case]:
    record, weights = consolidation_folder.RECORD, consolidation_folder.WEIGHTS
    for file, n_flips in ((record, 12), (weights, 12)):
        for name, damage, rng, _ in damages(seed, file, n_flips):
            change = functools.partial(damage_file, file, lambda d, f=damage, r=rng: f(d, r))
            yield Case("damaged audits and consolidations", f"load, {file}: {name}",
                       functools.partial(_loaded, change), apart=True)  # fmt: skip
    data = json.loads((WRITERS["consolidate"].finished / record).read_text())
    fields = {name: data[name] for name in (
        "format", "model", "weights_sha256", "window", "n_sinks", "threshold", "ranks", "units", "promise",
    ) if name in data}  # fmt: skip
    for i, (name, changed) in enumerate(changed_fields(fields, random.Random(f"{seed} consolidation"), 80)):
        text = json.dumps(data | changed if len(changed) == len(fields) else
                          {k: v for k, v in (data | changed).items() if k in changed or k not in fields})  # fmt: skip
        change = functools.partial(damage_file, record, lambda _, t=text: t.encode())
        yield Case("damaged audits and consolidations", f"load, {record}, field {i}: {name}",
                   functools.partial(_loaded, change), apart=True)  # fmt: skip
    for name, change in (("gone", _remove_weights), ("not a number", _nan_weights)):
        yield Case("damaged audits and consolidations", f"load, {weights}: {name}",
                   functools.partial(_loaded, change), apart=True)  # fmt: skip
    yield Case("damaged audits and consolidations", f"consolidate --resume, {weights}: gone", _resumed_without_weights,
               apart=True)  # fmt: skip
    for name, damage, rng, gross in damages(seed, in_use.FILE, 6):
        check = functools.partial(
            _resumed, WRITERS["consolidate"], in_use.FILE, lambda d, f=damage, r=rng: f(d, r), gross
        )
        yield Case("damaged audits and consolidations", f"consolidate --resume, {in_use.FILE}: {name}", check,
                   apart=True)  # fmt: skip


def damage_file(file: str, damage: Callable[[bytes], bytes], folder: Path) -> None:
    """Damages one file of a folder."""
    (folder / file).write_bytes(damage((folder / file).read_bytes()))


def _remove_weights(folder: Path) -> None:
    (folder / consolidation_folder.WEIGHTS).unlink()


def _nan_weights(folder: Path) -> None:
    tensors = load_file(folder / consolidation_folder.WEIGHTS)
    save_file({name: value * float("nan") for name, value in tensors.items()}, folder / consolidation_folder.WEIGHTS)


def _loaded(change: Callable[[Path], None]) -> None:
    """Checks that a changed folder is not loaded as if it were intact."""
    folder = copied(WRITERS["consolidate"].finished, "consolidation")
    before = contents(folder)
    change(folder)
    try:
        consolidation_folder.load(load(str(model_folder())).model, folder)
    except ConsolidationError as error:
        if len(str(error).splitlines()) != 1:
            raise FaultFoundError(Fault.UNCLEAR, f"several lines: {str(error)[:160]!r}") from error
        return
    if differences(contents(folder), before):
        raise FaultFoundError(Fault.ACCEPTED, "loaded without an error")


def _resumed_without_weights() -> None:
    out = copied(WRITERS["consolidate"].finished, "consolidation")
    _remove_weights(out)
    check_refusal(WRITERS["consolidate"].run(out, resume=True))


# Interrupted work, continued.


@functools.cache
def _cut_off(name: str) -> Path | None:
    """A folder of unfinished work, left by a process that died at one of its last writes."""
    out = WRITERS[name].fresh("unfinished")

    def die() -> None:
        with Places("before", {"audit": 3, "consolidate": 8}[name]):
            WRITERS[name].run(out)

    return out if apart(die, seconds=120).killed else None


def _unfinished(seed: int) -> Iterator[Case]:
    for name in ("audit", "consolidate"):
        folder = _cut_off(name)
        saved = sorted(folder.rglob("*.pt")) if folder else []
        for file in saved[:3]:
            relative = file.relative_to(folder) if folder else file
            for damage_name, damage, rng, _ in damages(seed, f"{name} {relative}", 4):
                check = functools.partial(_gone_on, name, relative, lambda d, f=damage, r=rng: f(d, r))
                yield Case("damaged unfinished work", f"{name} --resume, {relative}: {damage_name}", check, apart=True)


def _gone_on(name: str, file: Path, damage: Callable[[bytes], bytes]) -> None:
    """Checks that damaged unfinished work is refused, or that the final files equal those without damage."""
    folder = _cut_off(name)
    assert folder is not None
    out = copied(folder, "unfinished")
    (out / file).write_bytes(damage((out / file).read_bytes()))
    given = WRITERS[name].run(out, resume=True)
    if given.code:
        check_refusal(given)
    elif different := differences(contents(out), WRITERS[name].wanted):
        raise FaultFoundError(Fault.WRONG, f"accepted without an error: {', '.join(different)}")
