"""Documents and their source."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from cramlab.errors import TextError

Message: TypeAlias = dict[str, str]  # "role" and "content"
Template: TypeAlias = Callable[[Sequence[Message]], str]
Chat = Literal["template", "plain"]


def joined(messages: Sequence[Message]) -> str:
    """Messages as plain text: role, colon and content, with a blank line between messages."""
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)


@dataclass(frozen=True)
class Document:
    """One text with its name: the unit of splitting, resampling and guarantees.

    Attributes:
        name: name, such as the path within a folder or the file and the number of the record.
        text: the text; that of a conversation is plainly `joined`, until `Corpus.written` applies a template.
        messages: messages of a conversation; (): the document is none.
    """

    name: str
    text: str
    messages: tuple[Message, ...] = ()


@dataclass(frozen=True)
class Corpus:
    """Documents and their source.

    Attributes:
        name: name of the source, without the folders above it.
        documents: documents in order of name.
        version: version of the source, such as that of Python; None: it has none.
        notes: what was chosen while it was read, such as the field of its records, a line each.
    """

    name: str
    documents: tuple[Document, ...]
    version: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """First 16 hex digits of the SHA-256 of all names and texts."""
        sha = hashlib.sha256()
        for document in self.documents:
            sha.update(f"{document.name}\0{document.text}\0".encode())
        return sha.hexdigest()[:16]

    def described(self) -> dict[str, str | None]:
        """Returns name, version and digest, as records hold them."""
        return {"name": self.name, "version": self.version, "digest": self.digest}

    def written(self, template: Template | None, chat: Chat = "template") -> Corpus:
        """Returns the corpus with every conversation as the text that a model is given.

        Args:
            template: chat template of the model's tokenizer; None: it has none.
            chat: "template" applies the template, "plain" keeps the messages plainly `joined`.

        Raises:
            TextError: when `chat` is unknown, the tokenizer has no template, or the template refuses a conversation.
        """
        if chat not in get_args(Chat):
            raise TextError(f'--chat (chat) = "{chat}" is unknown; give one of {", ".join(get_args(Chat))}')
        if not any(document.messages for document in self.documents):
            return self
        if chat == "plain":
            return dataclasses.replace(
                self, notes=(*self.notes, "conversations are joined as plain text (--chat plain)")
            )
        if template is None:
            raise TextError(
                f"{self.name} holds conversations, but the model's tokenizer has no chat template; join them as plain "
                'text with --chat plain (chat="plain"), or use a model that was made for chat'
            )
        written = tuple(_templated(document, template) for document in self.documents)
        notes = (*self.notes, "conversations go through the tokenizer's chat template")
        return dataclasses.replace(self, documents=written, notes=notes)


def _templated(document: Document, template: Template) -> Document:
    if not document.messages:
        return document
    try:
        return dataclasses.replace(document, text=template(document.messages))
    except Exception as error:  # templates are programs of the model's author and raise what they like
        raise TextError(
            f"{document.name}: the tokenizer's chat template refuses this conversation ({error}); mend or leave out "
            "the record, or join conversations as plain text with --chat plain"
        ) from error
