"""Sharing a consolidation: saved to a folder with a card, or pushed to the Hugging Face hub, and loaded from there."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from cramlab.consolidation.folder import RECORD, WEIGHTS, load_record, load_weights
from cramlab.consolidation.hub import folder_named
from cramlab.consolidation.in_use import FILE, load_in_use
from cramlab.errors import ConsolidationError
from cramlab.files import only_process_in, write_bytes, write_json, write_text
from cramlab.pretrained import Model, load_consolidated
from cramlab.report.card import CARD, render_card
from cramlab.report.consolidation_page import PAGE, render_consolidation


@dataclass(frozen=True)
class Consolidation:
    """Gates and adapters for a pretrained model, with the record of their guarantee.

    Example: `cramlab.Consolidation.from_pretrained("runs/less").push_to_hub("user/less")`.

    Attributes:
        name: name that it was loaded by.
        folder: where its files are.
        record: the record of `consolidation.json`.
        in_use: what was measured in use; None where the folder holds no such measurement.
    """

    name: str
    folder: Path
    record: dict[str, Any]
    in_use: dict[str, Any] | None

    @classmethod
    def from_pretrained(
        cls, name: str | Path, *, revision: str | None = None, token: str | bool | None = None
    ) -> Consolidation:
        """Loads a consolidation without its model. Its files are JSON and safetensors; no code is run.

        Args:
            name: folder that `consolidate` or `save_pretrained` wrote, or name of a repository of the hub.
            revision: branch, tag or commit of the repository.
            token: token for a private repository; None: the one that is logged in.

        Raises:
            ConsolidationError: when it is not found, unfinished or damaged.
            RecordError: when the measurements in use are damaged.
        """
        folder = folder_named(name, revision=revision, token=token)
        record = load_record(folder)
        load_weights(folder, record)  # refuses damaged files
        return cls(str(name), folder, record, load_in_use(folder, record))

    def load_into(self, model: Model, *, trust_remote_code: bool = False) -> nn.Module:
        """Loads the consolidation into its model, see `cramlab.load_consolidated`."""
        return load_consolidated(model, self.folder, trust_remote_code=trust_remote_code)

    def report(self, out: str | Path | None = None) -> Path:
        """Writes the page again, by default as `report.html` into the folder, and returns its path."""
        path = self.folder / PAGE if out is None else Path(out)
        write_text(path, render_consolidation(self.record, self.in_use))
        return path

    def card(self, repository: str | None = None, *, base_model: str | None = None, licence: str | None = None) -> str:
        """The card in Markdown; see `save_pretrained`.

        Args:
            repository: name that others load the folder by; None: its present name.
            base_model: see `save_pretrained`.
            licence: see `save_pretrained`.
        """
        return render_card(self.record, self.in_use, repository=repository or self.name, base_model=base_model,
                           licence=licence)  # fmt: skip

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        sample: bool = False,
        repository: str | None = None,
        base_model: str | None = None,
        licence: str | None = None,
    ) -> None:
        """Writes the consolidation into another folder: its files, a page, and a card (`README.md`).

        A card that is there already is kept.

        Args:
            save_directory: the folder, made if needed.
            sample: whether to keep the sample text, which is part of a document that the model was tested on.
            repository: name that others will load the folder by, for the card; None: the folder.
            base_model: name that others load the model by, for the card; None: the one in the record.
            licence: name of a licence for the card's header; None: the header names none.

        Raises:
            FileExistsError: when the folder holds another consolidation, or is the one that this was loaded from.
        """
        out = Path(save_directory)
        ours = (self.folder / RECORD).read_bytes()
        if out.exists() and out.samefile(self.folder):
            raise FileExistsError(f"{out} is the folder of this consolidation itself; choose another one")
        if (out / RECORD).exists() and (out / RECORD).read_bytes() != ours:
            raise FileExistsError(f"{out} holds another consolidation; choose another folder")
        in_use = None if self.in_use is None else self.in_use | ({} if sample else {"sample": None})
        card = self.card(repository or out.resolve().name, base_model=base_model, licence=licence)
        with only_process_in(out):
            write_bytes(out / WEIGHTS, (self.folder / WEIGHTS).read_bytes())
            if in_use is not None:
                write_json(out / FILE, in_use)
            write_text(out / PAGE, render_consolidation(self.record, in_use))
            if not (out / CARD).exists():
                write_text(out / CARD, card)
            write_bytes(out / RECORD, ours)  # last: a folder without a record is unfinished

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        commit_message: str = "Upload consolidation",
        sample: bool = False,
        base_model: str | None = None,
        licence: str | None = None,
    ) -> str:
        """Uploads the consolidation to the Hugging Face hub, which becomes a repository of models if needed.

        Args:
            repo_id: `user/name`.
            private: whether a new repository is private; None: as the account has it.
            token: token with write access; None: the one that is logged in.
            commit_message: message of the commit.
            sample: see `save_pretrained`.
            base_model: see `save_pretrained`.
            licence: see `save_pretrained`.

        Returns:
            Address of the commit.

        Raises:
            ConsolidationError: when the hub refuses, or cannot be reached.
        """
        import huggingface_hub

        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, sample=sample, repository=repo_id, base_model=base_model, licence=licence)
            api = huggingface_hub.HfApi(token=token)
            try:
                made = api.create_repo(repo_id, private=private, exist_ok=True)
                commit = api.upload_folder(repo_id=made.repo_id, folder_path=folder, commit_message=commit_message)
            except Exception as error:  # the hub's own, of the network, or of the name
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                raise ConsolidationError(
                    f'"{repo_id}" could not be pushed to the hub ({reason}); check the name, the network and the token'
                ) from error
        return str(commit.commit_url)
