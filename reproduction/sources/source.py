"""A source of text: a package of a known version with its documents."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cramlab.text import Document


@dataclass(frozen=True)
class Source:
    """A package and the documents in it.

    Attributes:
        name: name of the package.
        version: version of the package.
        licence: licence that the package states; None: it states none that can be read by machine.
        documents: documents in order of name; the name begins with that of the package.
    """

    name: str
    version: str
    licence: str | None
    documents: tuple[Document, ...]

    def described(self) -> dict[str, Any]:
        """Returns what corpus.json holds on the source."""
        return {
            "name": self.name,
            "version": self.version,
            "licence": self.licence,
            "files": len(self.documents),
            "characters": sum(len(document.text) for document in self.documents),
        }
