"""Makes plain text of reStructuredText, Perl's POD, HTML and wiki markup, by rules that keep words and drop marks."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from typing import cast
from xml.etree import ElementTree


def from_rst(text: str) -> str:
    """Drops roles, targets, options and underlines of reStructuredText; the bodies of directives stay."""
    lines = []
    for line in text.split("\n"):
        if re.fullmatch(r"\s*([=\-~^\"'`#*+.:_])\1{2,}\s*", line):  # underline of a heading
            continue
        if re.match(r"\s*\.\. (_|\|)", line) or re.match(r"\s*:[a-zA-Z-]+:(\s|$)", line):  # a target, an option
            continue
        line = re.sub(r"^(\s*)\.\. (?:(?:[a-z]+:)?[a-z-]+:: ?|)", r"\1", line)  # a directive keeps its argument
        line = re.sub(r"(?::[a-zA-Z:+-]+:)?`([^`<]*[^`<\s])\s*<[^`>]*>`_{0,2}", r"\1", line)  # `words <target>`_
        line = re.sub(r":[a-zA-Z:+-]+:`[!~]?([^`]*)`", r"\1", line)  # :role:`words`
        line = re.sub(r"``?([^`]+)``?_{0,2}", r"\1", line)
        lines.append(re.sub(r"\*\*([^*\s][^*]*)\*\*", r"\1", line).rstrip())
    return _few_blank_lines("\n".join(lines))


_LESS, _GREATER = "\x01", "\x02"  # stand for escaped brackets while codes are resolved


def from_pod(text: str) -> str:
    """Drops the commands and formatting codes of Perl's plain old documentation."""
    text = re.sub(r"^=(?:begin|for)\b.*?^=(?:end|cut)\b[^\n]*$", "", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"^=(?:head\d|item|over|back|pod|cut|encoding)\b[ \t]*(?:\d+$|utf8$)?", "", text, flags=re.MULTILINE)
    text = re.sub(r"\b([BCFILSXZE])<<+ (.*?) >>+", _pod_code, text, flags=re.DOTALL)
    before = ""
    while before != text:  # codes stand inside one another
        before = text
        text = re.sub(r"\b([BCFILSXZE])<([^<>]*)>", _pod_code, text)
    return _few_blank_lines(text.replace(_LESS, "<").replace(_GREATER, ">"))


def _pod_code(found: re.Match[str]) -> str:
    code, inside = found[1], found[2]
    if code in "XZ":
        return ""
    if code == "E":
        return {"lt": _LESS, "gt": _GREATER}.get(inside, html.unescape(f"&{inside};"))
    return inside.split("|")[0] if code == "L" else inside


class _Words(HTMLParser):
    """Collects the words of a page without its head, scripts and navigation."""

    SILENT = frozenset({"head", "script", "style", "nav"})
    NAVIGATION = frozenset({"navheader", "navfooter", "docnav", "toc", "footer"})
    BLOCKS = frozenset({"p", "div", "li", "tr", "dt", "dd", "h1", "h2", "h3", "h4", "h5", "h6", "br", "pre", "table"})
    EMPTY = frozenset({"br", "hr", "img", "meta", "link", "input", "col", "wbr", "area", "base"})

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self._silent_depth = 0  # open elements since the one that is left out, itself included; 0: none is
        self._pre_depth = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Counts the depth of what is left out, and breaks lines at blocks."""
        classes = set((dict(attrs).get("class") or "").split())
        if tag not in self.EMPTY and (self._silent_depth or tag in self.SILENT or classes & self.NAVIGATION):
            self._silent_depth += 1
        self._pre_depth += tag == "pre"
        if tag in self.BLOCKS:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        """Ends what `handle_starttag` began."""
        if self._silent_depth and tag not in self.EMPTY:
            self._silent_depth -= 1
        self._pre_depth -= tag == "pre"
        if tag in self.BLOCKS:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        """Keeps words; outside of <pre>, white space is one blank."""
        if not self._silent_depth:
            self.parts.append(data if self._pre_depth else re.sub(r"\s+", " ", data))


def from_html(text: str) -> str:
    """Returns the words of a page without its head, scripts and navigation."""
    words = _Words()
    words.feed(text)
    words.close()
    lines = (line.rstrip() for line in "".join(words.parts).replace("\xa0", " ").split("\n"))
    return _few_blank_lines("\n".join(lines))


def wikipedia_pages(dump: bytes) -> Iterator[tuple[str, str]]:
    """Yields title and plain text of the articles in an XML dump, without redirections."""
    parser = ElementTree.XMLPullParser(["end"])
    parser.feed(dump)
    for _, element in cast("Iterator[tuple[str, ElementTree.Element]]", parser.read_events()):
        if element.tag.rpartition("}")[2] != "page":
            continue
        title = element.findtext("{*}title") or ""
        text = element.findtext("{*}revision/{*}text") or ""
        if element.findtext("{*}ns") == "0" and element.find("{*}redirect") is None and text:
            yield title, from_wiki(text)


def from_wiki(text: str) -> str:
    """Drops templates, tables, references, files and marks of wiki markup."""
    text = re.sub(r"<!--.*?-->|<ref[^>]*/>|<ref.*?</ref>|<math.*?</math>", "", text, flags=re.DOTALL | re.IGNORECASE)
    for pattern in (r"\{\{[^{}]*\}\}", r"\{\|(?:[^{}]|\{(?!\|)|(?<!\|)\})*?\|\}"):
        before = ""
        while before != text:  # templates stand inside one another
            before = text
            text = re.sub(pattern, "", text)
    before = ""
    while before != text:
        before = text
        text = re.sub(r"\[\[(?:File|Image|Category|[a-z]{2,3}(?:-[a-z]+)?):[^\[\]]*\]\]", "", text)
        text = re.sub(r"\[\[(?:[^\[\]|]*\|)?([^\[\]|]*)\]\]", r"\1", text)
    text = re.sub(r"\[https?://\S+ ?([^\]]*)\]", r"\1", text)
    text = re.sub(r"<[^>]+>|'{2,}|^=+\s*|\s*=+$|^[*#:;]+\s*", "", text, flags=re.MULTILINE)
    return _few_blank_lines(html.unescape(text))


def _few_blank_lines(text: str) -> str:
    """Leaves at most one blank line in a row, and none at the ends."""
    return re.sub(r"\n\s*\n\s*?\n+", "\n\n", text).strip("\n") + "\n"
