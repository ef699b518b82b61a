"""A table of one's own becomes irregular series; order, duplicates, units and labels are checked."""

import datetime
import re

import numpy as np
import pytest

from cramlab.cli.main import main
from cramlab.tasks.irregular import DataError
from cramlab.tasks.irregular.own_table import Columns, own_table

COLUMNS = Columns(id="customer", time="day", values=("amount", "items"), label="left")
HEAD = "customer,day,amount,items,left\n"


def table(tmp_path, text, name="bought.csv"):
    path = tmp_path / name
    path.write_text(HEAD + text)
    return path


def test_rows_become_visits_in_order_of_time(tmp_path):
    data = own_table(table(tmp_path, "b,4,1,,no\na,30,5,2,yes\na,10,7,,yes\nb,1,3,3,no\na,30,,9,\n"), COLUMNS)
    a, b = data.series
    assert (a.person, a.times.tolist()) == ("a", [10, 30])
    np.testing.assert_array_equal(a.values, [[7, np.nan], [5, 9]])
    assert (a.labels.tolist(), b.labels.tolist()) == ([-1, 1], [-1, 0])
    assert (data.name, data.channels, data.n_classes, data.time_unit) == ("bought", ("amount", "items"), 2, 11.5)
    assert re.search(r"last visit of an id; the median gap is 11\.5", data.notes[0])
    assert data.notes[1].startswith("2 rows earlier")
    assert data.notes[2].startswith("1 values replaced")


def test_labels_that_change_are_predicted_at_every_visit_and_repeated_rows_count_once(tmp_path):
    data = own_table(table(tmp_path, "a,0,1,1,no\na,0,1,1,no\na,1,2,1,yes\nb,0,1,1,\nb,5,1,2,no\n"), COLUMNS)
    assert [one.labels.tolist() for one in data.series] == [[0, 1], [-1, 0]]
    assert "every visit" in data.what
    assert data.notes[1].startswith("1 rows that repeat")


def test_dates_are_days_and_other_units_are_doubted(tmp_path):
    rows = "".join(f"c{i},2024-01-0{1 + v} 12:00:00,{1 + i / 10},1,{i % 2}\n" for i in range(6) for v in range(3))
    rows += "z,2024-01-01,4000,1,0\nz,2024-12-31,5000,1,0\n"
    data = own_table(table(tmp_path, rows), COLUMNS)
    assert data.series[0].times[0] == (datetime.date(2024, 1, 1) - datetime.date(1970, 1, 1)).days + 0.5
    assert data.time_unit == 1
    assert [note for note in data.notes if "unit the same" in note] == [
        "1 ids have values of amount 100 times above or below the others; is the unit the same?",
        "1 ids have gaps of day 100 times above or below the others; is the unit the same?",
    ]


def test_parquet_holds_the_same_series(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = table(tmp_path, "a,0,1.5,1,no\na,2,,1,no\nb,1,2,1,yes\nb,9,1,,yes\n")
    columns = {
        "customer": ["a", "a", "b", "b"], "day": [0, 2, 1, 9], "amount": [1.5, None, 2.0, 1.0],
        "items": [1, 1, 1, None], "left": ["no", "no", "yes", "yes"],
    }  # fmt: skip
    parquet.write_table(pyarrow.table(columns), tmp_path / "bought.parquet")
    assert own_table(tmp_path / "bought.parquet", COLUMNS).digest() == own_table(path, COLUMNS).digest()
    (tmp_path / "text.parquet").write_text("no")
    with pytest.raises(DataError, match="not a Parquet file"):
        own_table(tmp_path / "text.parquet", COLUMNS)


@pytest.mark.parametrize(
    ("rows", "named"),
    [
        ("", "holds no row"),
        (",0,1,1,no\n", r'line 2: column customer holds "", expected an id'),
        ("a,,1,1,no\n", "column day holds"),
        ("a,soon,1,1,no\n", 'column day holds "soon", expected a number, or a date'),
        ("a,2024-01-01,1,1,no\na,3,1,1,no\n", "line 3: column day .* a date as in the rows before"),
        ("a,0,much,1,no\n", 'column amount holds "much"'),
        ("a,0,1,1,no\na,0,1,1,yes\n", 'column left holds "yes", expected "no" as on line 2'),
        ("a,0,1,1,no\na,1,1,1,no\n", "1 different labels"),
        ("a,0,1,1,no\nb,1,1,1,yes\n", "no id has visits at two times"),
    ],
)
def test_what_cannot_be_read_is_refused_with_its_place(rows, named, tmp_path):
    with pytest.raises(DataError, match=named):
        own_table(table(tmp_path, rows), COLUMNS)


def test_a_column_has_one_role():
    with pytest.raises(DataError, match="column day has two roles"):
        Columns(id="customer", time="day", values=("day",), label="left")


def test_the_command_trains_on_a_table_and_refuses_what_is_missing(tmp_path, capsys):
    rng = np.random.default_rng(0)
    rows = "".join(
        f"c{i},{5 * v + rng.integers(5)},{rng.normal() + i % 2:.3f},1,{i % 2}\n" for i in range(40) for v in range(3)
    )
    path = str(table(tmp_path, rows))
    given = ["irregular", "--data", path, "--id", "customer", "--time", "day", "--out", str(tmp_path / "runs")]
    assert main([*given, "--value", "amount"]) == 2
    assert "needs --label COLUMN" in capsys.readouterr().err
    assert main(["irregular", "--data", "pbcseq", "--id", "customer", "--out", str(tmp_path / "runs")]) == 2
    assert "--id goes with a table of your own" in capsys.readouterr().err
    assert main(["irregular", "--data", "bought", "--out", str(tmp_path / "runs")]) == 2
    assert "is no file .csv or .parquet" in capsys.readouterr().err
    assert main([*given, "--value", "amount,items", "--label", "left", "--models", "recurrence", "--seeds", "1"]) == 0
    said = capsys.readouterr().out
    assert "predicted at the last visit" in said
    assert "bought recurrence-seed0: AUC" in said
    assert (tmp_path / "runs" / "bought" / "recurrence-seed0" / "irregular.json").is_file()
