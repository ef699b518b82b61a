"""Pages are renewed between their marks, and goals are written and shown in one way."""

import re

import pytest

from reproduction import goals
from reproduction.decoders import DECODERS
from reproduction.pages import families, performance, performance_summary
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


def section(mark):
    return re.search(f"<!-- {mark}: begin -->(.*?)<!-- {mark}: end -->", performance.SUMMARY.read_text(), re.DOTALL)[1]


def test_pages_of_performance_are_made_from_the_records():
    tables = {
        performance.SUMMARY: performance_summary.sections(performance.RESULTS),
        performance.TABLES: performance.sections(),
    }
    for path, sections in tables.items():
        page = path.read_text(encoding="utf-8")
        assert page.count(": begin -->") == len(sections)
        assert renewed(page, sections, path.name) == page, "run python -m reproduction.pages.performance"


def test_the_page_of_performance_is_short():
    assert len(performance.SUMMARY.read_text(encoding="utf-8").splitlines()) <= 150
    for mark, made in performance_summary.sections(performance.RESULTS).items():
        assert 3 <= len(made.splitlines()) <= 12, f"{mark}: at most ten rows below the head"
    assert performance.FIGURE.exists()


def test_short_rows_are_rows_of_the_full_tables():
    """Medians of the short table of layers stand in the full table too, which is made by other code."""
    full = performance.TABLES.read_text(encoding="utf-8")
    cells = [line.strip("| ").split(" | ") for line in full.splitlines() if line.startswith("| whole layer, forward |")]
    medians = {(row[1], row[3]): float(row[4].split()[0].replace(",", "")) for row in cells if len(row) == 6}
    rows = [line.strip("| ").split(" | ") for line in section("layer").splitlines() if re.match(r"\| \d", line)]
    assert len(rows) == len(performance_summary.LENGTHS)
    for n, *ms in (row[:3] for row in rows):
        assert ms == [f"{medians[n, way]:,.0f}" for way in ("transformer", "cram")]


def test_the_page_of_families_is_made_from_its_record_and_its_record_from_the_list():
    record = families.read()
    assert renewed(families.PAGE.read_text(), families.sections(record), "") == families.PAGE.read_text()
    assert [row["model_type"] for row in record["rows"]] == list(DECODERS)
    for row in record["rows"]:
        for found, wanted in ((row["audited"], "audited"), (row["patched"], "patched")):
            layers = getattr(DECODERS[row["model_type"]], wanted)
            assert found == ([] if isinstance(layers, str) else list(layers))
        assert isinstance(DECODERS[row["model_type"]].patched, str) == (row["refusal"] is not None)
