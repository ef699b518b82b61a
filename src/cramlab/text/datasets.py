"""Tables of records: Parquet files, folders that the library datasets saved, and data sets of the Hugging Face hub."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from cramlab.errors import TextError
from cramlab.text.corpus import Document
from cramlab.text.files import note, refuse_special, refuse_too_large
from cramlab.text.records import document_of, field_of

_HUB = re.compile(r"(?P<name>[\w.-]+(/[\w.-]+)?)(:(?P<config>[\w.-]+))?(@(?P<split>[\w.+\[\]:%-]+))?")


def from_parquet(path: Path, name: str, field: str | None, notes: list[str]) -> list[Document]:
    """Reads the documents of a Parquet file, one a row; of its columns only the one that holds the text.

    Raises:
        TextError: when pyarrow is missing, the file is damaged, or no column holds the text.
    """
    pyarrow = _pyarrow(path)
    import pyarrow.parquet as parquet

    try:
        file = parquet.ParquetFile(path)
        column = field_of(file.schema_arrow.names, field, str(path))
        table = file.read(columns=[column])
    except (pyarrow.ArrowException, OSError) as error:
        raise TextError(f"{path} cannot be read as Parquet ({error}); copy it again, or leave it out") from error
    return _rows(table, str(path), name, file.schema_arrow.names, column, notes)


def is_saved(folder: Path) -> bool:
    """Returns whether `save_to_disk` of the library datasets wrote a folder."""
    return (folder / "dataset_dict.json").is_file() or (
        (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    )


def from_saved(folder: Path, split: str | None, field: str | None, notes: list[str]) -> list[Document]:
    """Reads what `save_to_disk` of the library datasets wrote, which itself is not needed.

    Args:
        folder: the folder.
        split: name of the split; None: the only one.
        field: as for `files.documents_of`.
        notes: as for `files.documents_of`.

    Raises:
        TextError: when pyarrow is missing, a file is damaged, or the split is not there or not named.
    """
    pyarrow = _pyarrow(folder)
    if (folder / "dataset_dict.json").is_file():
        folder = folder / _split(_state(folder / "dataset_dict.json").get("splits", []), split, str(folder))
    elif split is not None:
        raise TextError(f'{folder} has no splits, so "@{split}" has no meaning; leave it out')
    state = _state(folder / "state.json")
    if state.get("_indices_data_files"):
        raise TextError(f"{folder} was saved with indices; save it again after flatten_indices()")
    files = [folder / data["filename"] for data in state.get("_data_files", [])]
    for file in files:
        refuse_special(file)
    refuse_too_large(folder, sum(file.stat().st_size for file in files))
    documents: list[Document] = []
    for file in files:
        try:
            with pyarrow.memory_map(str(file)) as source:
                table = pyarrow.ipc.open_stream(source).read_all()
        except (pyarrow.ArrowException, OSError) as error:
            raise TextError(f"{file} cannot be read as Arrow ({error}); copy it again") from error
        column = field_of(table.column_names, field, str(file))
        documents += _rows(table.select([column]), str(file), file.name, table.column_names, column, notes)
    return documents


def could_be_on_hub(source: str) -> bool:
    """Returns whether a text's name has the form of a data set of the hub: OWNER/NAME, with :CONFIG or @SPLIT."""
    found = _HUB.fullmatch(source)
    return found is not None and not source.startswith(".") and any(mark in source for mark in "/:@")


def from_hub(source: str, field: str | None, notes: list[str]) -> list[Document]:
    """Reads a data set of the hub, OWNER/NAME[:CONFIG][@SPLIT], through the library datasets.

    Args:
        source: name, config and split.
        field: as for `files.documents_of`.
        notes: as for `files.documents_of`.

    Raises:
        TextError: when the library is missing, the hub cannot be reached, or the split is not there or not named.
    """
    try:
        import datasets
    except ImportError as error:
        raise TextError(
            f'--text "{source}" is no file or folder here; a data set of the hub needs the library datasets: '
            'pip install "cramlab[datasets]"'
        ) from error
    found = _HUB.fullmatch(source)
    assert found is not None
    name, config, split = found["name"], found["config"], found["split"]
    try:
        splits = [split] if split is not None else datasets.get_dataset_split_names(name, config)
        table: Any = datasets.load_dataset(name, config, split=_split(splits, None, source))
    except TextError:
        raise
    except Exception as error:  # the library raises errors of many others
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise TextError(
            f'--text "{source}" is no file or folder here, and could not be loaded as a data set of the hub, which may '
            f"be out of reach; give a file or folder, or OWNER/NAME[:CONFIG][@SPLIT] ({reason})"
        ) from error
    column = field_of(table.column_names, field, source)
    refuse_too_large(source, table.data.nbytes)
    return _rows(table.select_columns([column]).with_format("arrow")[:], source, name.rpartition("/")[2],
                 table.column_names, column, notes)  # fmt: skip


def _rows(
    table: Any, where: str, name: str, columns: list[str], column: str, notes: list[str]
) -> list[Document]:  # fmt: skip
    """The documents of an Arrow table, from one of its columns."""
    note(notes, column, columns)
    rows = enumerate(table.column(column).to_pylist())
    return [document_of(f"{name}:{i}", value, column, f"{where}, row {i}") for i, value in rows]


def _split(splits: list[str], asked: str | None, where: str) -> str:
    if asked is None and len(splits) == 1:
        return splits[0]
    if asked is None or asked not in splits:
        missing = "" if asked is None else f', not "{asked}"'
        raise TextError(f"{where} has the splits {', '.join(splits)}{missing}; choose one: {where}@{splits[0]}")
    return asked


def _state(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise TextError(f"{path} is damaged ({error}); save the data set again") from error
    if not isinstance(found, dict):
        raise TextError(f"{path} holds no JSON object; save the data set again")
    return found


def _pyarrow(path: Path) -> Any:
    try:
        import pyarrow
        import pyarrow.ipc
    except ImportError as error:
        raise TextError(f'{path} needs pyarrow to be read; pip install "cramlab[parquet]"') from error
    return pyarrow
