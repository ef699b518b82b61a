"""The text of each token, such that the pieces side by side are the text of all."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_UNFINISHED = "\ufffd"  # a decoder's character for bytes that are not a whole character yet


def pieces(decode: Callable[[list[int]], str], ids: Sequence[int]) -> list[str]:
    """The text that each token adds to the text of the tokens before.

    A token alone may decode to less (a space at the start is dropped) or to part of a character; so each token is
    decoded together with the last whole ones. A character of several tokens stands at its last token.

    Args:
        decode: from token ids to text.
        ids: token ids.

    Returns:
        One text for each token; the empty text for a token that only begins a character.
    """
    found: list[str] = []
    before, begin = 0, 0  # tokens that give context, and the first whose text has not been given
    for end in range(1, len(ids) + 1):
        known = decode(list(ids[before:begin]))
        text = decode(list(ids[before:end]))
        if text.endswith(_UNFINISHED) and end < len(ids) and end - begin < 8:  # a character has four bytes at most
            found.append("")
            continue
        found.append(text[len(known) :])
        before, begin = begin, end
    return found
