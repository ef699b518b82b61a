"""Pages as a test reads them: their parts, and what a browser makes of them."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest


class Page(HTMLParser):
    """Collects tags, ids, table cells and everything that a browser would fetch."""

    VOID = frozenset(("meta", "br", "link", "img", "hr", "input"))

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.cells, self.heads, self.fetched, self.count = [], set(), [], [], [], {}
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.count[tag] = self.count.get(tag, 0) + 1
        self.ids.add(attributes.get("id"))
        self.fetched += [value for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in self.VOID:
            self.open.append(tag)
        if tag in ("td", "th"):
            (self.cells if tag == "td" else self.heads).append("")

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            (self.cells if self.open[-1] == "td" else self.heads)[-1] += data


def in_browser(text, width, folder, numbers):
    """Opens a page in headless Chromium, refuses one that scrolls sideways, and returns numbers that a script finds.

    An iframe of the given width holds the page, as a headless window cannot be made narrower than 500 pixels.

    Args:
        text: the page.
        width: width of the window, pixels.
        folder: where the files are written.
        numbers: JavaScript expression of a list of numbers, from `inside`, the page's document.
    """
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium is installed")
    (folder / "page.html").write_text(text, encoding="utf-8")
    (folder / "frame.html").write_text(
        f"""<iframe id="page" src="page.html" style="width: {width}px; height: 800px; border: 0"></iframe><script>
        onload = () => {{ const inside = document.getElementById("page").contentDocument;
        const root = inside.documentElement;
        document.title = "measured " + JSON.stringify([root.clientWidth, root.scrollWidth, ...{numbers}]) + " end"; }};
        </script>""",
        encoding="utf-8",
    )
    dump = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files", "--dump-dom",
         "--window-size=1400,900", f"--user-data-dir={folder}/profile", str(folder / "frame.html")],
        check=True, capture_output=True, text=True, timeout=120,
    ).stdout  # fmt: skip
    page, content, *found = json.loads(re.search(r"measured (.*?) end", dump)[1])
    assert page >= width - 20  # a scroll bar takes the rest
    assert content <= page
    return found
