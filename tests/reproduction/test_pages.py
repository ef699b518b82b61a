"""Pages are renewed between their marks, and goals are written and shown in one way."""

import pytest

from reproduction import goals
from reproduction.pages.markdown import table
from reproduction.pages.renew import renew, renewed

PAGE = "one\n<!-- a: begin -->\nold\n<!-- a: end -->\ntwo\n<!-- b: begin -->\n<!-- b: end -->\n"


def test_only_what_stands_between_the_marks_changes(tmp_path):
    text = renewed(PAGE, {"a": "new\n"}, "page.md")
    assert text == PAGE.replace("\nold\n", "\n\nnew\n\n")
    assert renewed(text, {"a": "new\n"}, "page.md") == text
    (tmp_path / "page.md").write_text(PAGE)
    renew(tmp_path / "page.md", {"a": "new"})
    assert (tmp_path / "page.md").read_text() == text


def test_a_page_without_a_mark_is_refused():
    for page in ("nothing", "<!-- a: begin -->"):
        with pytest.raises(ValueError, match=r"page\.md lacks the marks <!-- a: begin -->"):
            renewed(page, {"a": ""}, "page.md")


def test_a_table_has_a_line_a_row():
    assert table(("x", "y"), [("1", "2")]) == "| x | y |\n| --- | --- |\n| 1 | 2 |\n"


def test_goals_are_written_and_rendered(tmp_path):
    folder = tmp_path / "results" / "goals"
    (tmp_path / "record.json").write_text("{}")
    met = goals.Goal(goal="fast", target="20 s", reached=12.5, interval=(12, 13.25), met=True, command="make",
                     record=["record.json"])  # fmt: skip
    missed = met | {"goal": "faster", "reached": 1234, "interval": None, "met": False}
    assert goals.write("house", [met, missed], folder) == folder / "house.json"
    assert goals.read("house", folder)[1]["met"] is False
    assert goals.render("house", folder).splitlines()[2:] == [
        "| fast | 20 s | 12.5 | 12 to 13.25 | yes |",
        "| faster | 20 s | 1,234 |  | **no** |",
    ]
    with pytest.raises(ValueError, match="has the fields"):
        goals.write("house", [{name: value for name, value in met.items() if name != "command"}], folder)
    with pytest.raises(ValueError, match="do not exist: nowhere"):
        goals.write("house", [met | {"record": ["nowhere"]}], folder)
