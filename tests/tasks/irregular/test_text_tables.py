"""Tables are read as the standard of CSV has them; whatever else a file holds is named with its line."""

import datetime

import pytest

from cramlab.tasks.irregular import DataError
from cramlab.tasks.irregular.text_tables import rows_of


@pytest.fixture
def read(tmp_path):
    def of(content, *expected):
        path = tmp_path / "a.csv"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return list(rows_of(path, expected or ("a", "b")))

    return of


@pytest.mark.parametrize(
    "content",
    [
        "a,b\n1,2\n",
        "\ufeffa,b\n1,2\n",
        "a,b\r\n1,2\r\n",
        'b,"a",c\n"2"," 1","x, y\nz"\n',
        "a,b\n\n1,2",
        " a , b \n 1 , 2 \n",
        "c,a,c,b\n0,1,0,2\n",
    ],
)
def test_all_of_these_hold_the_same_row(read, content):
    (row,) = read(content)
    assert row.fields == {"a": "1", "b": "2"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "lacks a, b; expected columns a, b, found nothing"),
        ("a\tb\n1\t2\n", "lacks a, b"),
        ("a,b,a\n1,2,3\n", "has column a more than once"),
        ("a,b\n1,2,5\n", 'line 2: expected columns a, b .2 fields in total., found "1, 2, 5"'),
        ("a,b\n1\n", 'line 2: expected columns a, b .2 fields in total., found "1"'),
        ('a,b\n1,2\n3,"4\n5,6\n', "line 3: unexpected end of data"),
        ('a,b\n1,"2"3\n', "line 2: "),
        ("a,b\n1," + "9" * 200_000 + "\n", "line 2: field larger than field limit"),
        (b"a,b\n\xff\xfe,2\n", "is not UTF-8 text"),
        ("a,b\n1,2\n".encode("utf-16"), "is not UTF-8 text"),
        (b"\x00\x01\x1b[2J\n", r"found \\x00\\x01\\x1b\[2J"),
    ],
)
def test_what_is_no_table_is_named(read, content, message):
    with pytest.raises(DataError, match=rf"a\.csv.*{message}"):
        read(content)


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(DataError, match="is not a file; expected a CSV file with columns a"):
        list(rows_of(tmp_path, ("a",)))


@pytest.mark.parametrize(("text", "value"), [("1", 1.0), ("-0.5", -0.5), (".5e-3", 0.0005), ("+7.", 7.0)])
def test_numbers(read, text, value):
    assert read(f"a\n{text}\n", "a")[0].number("a") == value


@pytest.mark.parametrize("text", ["nan", "inf", "-Infinity", "1e31", "1e999", "1_000", "NA", "0x10", "٣", "1 2", "1;5"])
def test_what_is_no_number_is_named(read, text):
    (row,) = read(f"a\n{text}\n", "a")
    with pytest.raises(DataError, match=r"line 2: column a holds .*, expected a number between"):
        row.number("a")
    with pytest.raises(DataError, match="expected a whole number"):
        row.whole("a")


def test_moments(read):
    good, date, zone, week = read("a\n2101-03-04 05:06:07\n2101-03-04\n2101-03-04 05:06:07Z\n2101-W03-1\n", "a")
    assert good.moment("a") == datetime.datetime(2101, 3, 4, 5, 6, 7)
    for row in (date, zone, week):
        with pytest.raises(DataError, match="expected YYYY-MM-DD HH:MM:SS without a time zone"):
            row.moment("a")
