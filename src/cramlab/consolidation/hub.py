"""The folder of a consolidation: here, or on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cramlab.consolidation.folder import RECORD, WEIGHTS
from cramlab.consolidation.in_use import FILE
from cramlab.errors import ConsolidationError

FILES = (RECORD, WEIGHTS, FILE)  # JSON and safetensors; nothing else is fetched and nothing is run


def folder_named(name: str | Path, *, revision: str | None = None, token: str | bool | None = None) -> Path:
    """The folder of a name: the folder itself where there is one, else a copy of the hub's repository `user/name`.

    Args:
        name: folder, or name of a repository.
        revision: branch, tag or commit of the repository.
        token: token for a private repository; None: the one that is logged in.

    Raises:
        ConsolidationError: when there is no such folder and the hub cannot give one.
    """
    path, text = Path(name), str(name)
    if path.exists() or isinstance(name, Path) or text.count("/") != 1 or text.startswith((".", "/", "~")):
        return path
    import huggingface_hub
    from huggingface_hub.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    where: dict[str, Any] = {"revision": revision, "token": token, "allow_patterns": list(FILES)}
    try:
        found = Path(huggingface_hub.snapshot_download(text, **where))
    except Exception as error:  # the hub's own, of the network, or of the name
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConsolidationError(
            f'"{text}" is not a folder here and could not be loaded from the hub, which may be out of reach '
            f"({reason}); give the folder of a consolidation, or a repository that you can reach"
        ) from error
    finally:
        logging.set_verbosity(before)
    if not (found / RECORD).exists():
        raise ConsolidationError(f'"{text}" on the hub holds no {RECORD}, so it is no consolidation; check the name')
    return found
