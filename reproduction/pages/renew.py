"""Renewal of generated parts of a page, which stand between a begin mark and an end mark.

A page holds `<!-- NAME: begin -->`, the generated text and `<!-- NAME: end -->`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from cramlab.files import write_text


def renewed(page: str, sections: Mapping[str, str], name: str) -> str:
    """The text of a page with new sections between its marks.

    Args:
        page: text of the page.
        sections: generated texts by the name in their marks.
        name: name of the page in messages.

    Raises:
        ValueError: the page lacks a mark of a section.
    """
    for mark, text in sections.items():
        begin, end = f"<!-- {mark}: begin -->", f"<!-- {mark}: end -->"
        before, first, rest = page.partition(begin)
        _, second, after = rest.partition(end)
        if not first or not second:
            raise ValueError(f"{name} lacks the marks {begin} and {end}; add them where the section belongs")
        page = f"{before}{begin}\n\n{text.strip()}\n\n{end}{after}"
    return page


def renew(path: Path, sections: Mapping[str, str]) -> None:
    """Rewrites a page with new sections between its marks."""
    write_text(path, renewed(path.read_text(encoding="utf-8"), sections, path.name))
