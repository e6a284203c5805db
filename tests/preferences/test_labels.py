"""The label format: round trips, the published table, and errors that name file, line and remedy."""

import json

import pytest

from eg3d_rlhf.preferences.labels import (
    Preference,
    control_of,
    declare_control,
    labels_hash,
    load_labels,
    write_labels,
)
from tests.rejections import raising

LABELS = [
    Preference(
        winner=3, loser=7, generator="ab" * 32, psi=0.7, annotator="anna", time="2026-01-02T03:04:05", clean=7
    ),
    Preference(winner=9, loser=2, tie=True, time=1.5),
    Preference(winner=0, loser=2**32 - 1),
]


@pytest.mark.parametrize("ending", [".jsonl", ".csv"])
def test_round_trip_keeps_every_field(tmp_path, ending):
    path = write_labels(tmp_path / f"labels{ending}", LABELS)
    assert load_labels(path) == LABELS
    assert labels_hash(load_labels(path)) == labels_hash(LABELS)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]  # no temporary file is left


def test_unknown_fields_survive(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"winner": 1, "loser": 2, "session": "x"}\n\n')
    assert load_labels(write_labels(tmp_path / "b.csv", load_labels(path)))[0].extra == {"session": "x"}


@pytest.mark.parametrize(("clean", "seed"), [(True, 1), (False, 2), (2, 2)])
def test_clean_is_a_seed_or_a_truth_value(tmp_path, clean, seed):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"winner": 1, "loser": 2, "clean": clean}) + "\n")
    assert load_labels(path)[0].clean == seed


@pytest.mark.parametrize(
    ("name", "text", "names"),
    [
        ("a.jsonl", '{"winner": 1, "loser": 2}\n{"winner": 1}\n', ("line 2", "loser")),
        ("a.jsonl", '{"winner": 1, "loser": 2\n', ("line 1", "JSON")),
        ("a.jsonl", "[1, 2]\n", ("line 1", "list")),
        ("a.jsonl", '{"winner": 1, "loser": 1}\n', ("line 1", "1")),
        ("a.jsonl", "", ("empty",)),
        ("a.jsonl", '{"winner": 1.5, "loser": 1}\n', ("winner", "1.5")),
        ("a.jsonl", '{"winner": -1, "loser": 1}\n', ("winner", "-1")),
        ("a.jsonl", '{"winner": 1, "loser": 2, "psi": 9}\n', ("psi", "9")),
        ("a.jsonl", '{"winner": 1, "loser": 2, "clean": 3}\n', ("clean", "1 or 2")),
        ("a.jsonl", '{"winner": 1, "loser": 2, "time": "noon"}\n', ("time", "noon")),
        ("a.csv", "winner,loser\n1,2\n3\n", ("line 3", "2", "1")),
        ("a.jsonl", '{"winner": 1, "loser": 2, "tie": "maybe"}\n', ("tie", "maybe")),
        ("a.csv", "first,second\n1,2\n", ("line 1", "winner", "'first'")),
        ("a.csv", "winner,loser\n1,x\n", ("line 2", "loser", "'x'")),
        ("a.txt", "", (".jsonl", ".csv")),
    ],
)
def test_errors_name_file_line_and_remedy(tmp_path, name, text, names):
    path = tmp_path / name
    path.write_text(text)
    with raising(name, *names):
        load_labels(path)


def test_a_missing_file_is_named(tmp_path):
    with raising("none.jsonl", kind=FileNotFoundError):
        load_labels(tmp_path / "none.jsonl")


def test_two_column_table_is_recognised(tmp_path):
    path = tmp_path / "ranked.csv"
    path.write_text(",rank1,rank2\n0,35539,23763\n1,36390,34268\n")
    assert [(p.winner, p.loser) for p in load_labels(path)] == [(35539, 23763), (36390, 34268)]


def test_published_table_imports(published_labels):
    labels = load_labels(published_labels)
    assert len(labels) == 4346
    assert (labels[0].winner, labels[0].loser) == (35539, 23763)


TABLE = [(3, 7), (9, 2), (0, 11)]
CRLF = "".join(f"{winner},{loser}\r\n" for winner, loser in TABLE)
SPREADSHEETS = {
    "mark.csv": ("winner,loser\r\n" + CRLF).encode("utf-8-sig"),
    "capitals.csv": ("Winner,LOSER\n" + CRLF).encode(),
    "semicolons.csv": ("winner;loser\r\n" + CRLF.replace(",", ";")).encode("utf-8-sig"),
    "named-delimiter.csv": ("sep=;\r\nwinner;loser\r\n" + CRLF.replace(",", ";")).encode(),
    "tabs.csv": ("winner\tloser\n" + CRLF.replace(",", "\t")).encode(),
    "tabs.tsv": ("winner\tloser\n" + CRLF.replace(",", "\t")).encode(),
    "utf16.csv": ("winner\tloser\r\n" + CRLF.replace(",", "\t")).encode("utf-16"),
    "utf16-be-unmarked.csv": ("winner,loser\r\n" + CRLF).encode("utf-16-be"),
    "index.csv": (
        ",winner,loser\n" + "".join(f"{i},{w}.0,{l}.0\n" for i, (w, l) in enumerate(TABLE))
    ).encode(),
    "empty-columns.csv": ("winner,loser,,\n" + CRLF.replace("\r\n", ",,\n")).encode(),
    "longer-rows.csv": ("winner,loser\n" + CRLF.replace("\r\n", ",,\n")).encode(),
    "quoted.csv": ('"winner","loser"\n' + "".join(f'"{w}","{l}"\n' for w, l in TABLE)).encode(),
    "CAPITALS.CSV": ("winner,loser\n" + CRLF).encode(),
    "ranked.csv": (";Rank1;Rank2\n" + "".join(f"{i};{w};{l}\n" for i, (w, l) in enumerate(TABLE))).encode(),
    "mark.jsonl": "".join(f'{{"winner": {w}, "loser": {l}}}\n' for w, l in TABLE).encode("utf-8-sig"),
    "utf16.jsonl": "".join(f'{{"winner": {w}, "loser": {l}}}\n' for w, l in TABLE).encode("utf-16"),
    "capitals.jsonl": "".join(f'{{"Winner": {w}, "Loser": {l}.0}}\n' for w, l in TABLE).encode(),
}


@pytest.mark.parametrize("name", SPREADSHEETS)
def test_tables_of_spreadsheets_and_of_pandas_are_read(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(SPREADSHEETS[name])
    labels = load_labels(path)
    assert [(label.winner, label.loser) for label in labels] == TABLE
    assert all(label.extra == {} for label in labels)


def test_capitals_that_name_another_column_stay_what_they_were(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("winner,loser,Time,tie\n1,2,noon,1.0\n")
    (label,) = load_labels(path)
    assert (label.time, label.extra, label.tie) == (None, {"Time": "noon"}, True)
    path.write_text("winner,Winner,loser\n1,2,3\n")
    (label,) = load_labels(path)
    assert (label.winner, label.loser, label.extra) == (1, 3, {"Winner": "2"})


@pytest.mark.parametrize(
    ("name", "data", "names"),
    [
        (
            "a.csv",
            "winner,loser,annotator\n1,2,Ann\n3,4,Jürgen\n".encode("cp1252"),
            ("line 3", "0xfc", "UTF-8"),
        ),
        ("a.jsonl", '{"winner": 1, "loser": 2, "annotator": "é"}\n'.encode("latin-1"), ("line 1", "0xe9")),
        ("a.csv", b"Winner,WINNER,Loser\n1,2,3\n", ("line 1", "winner")),
        ("a.csv", b"winner,loser\n3.5,2\n", ("line 2", "winner", "'3.5'")),
        ("a.csv", b"winner,loser\n1.2E+09,2\n", ("line 2", "winner", "'1.2E+09'")),
        ("a.xlsx", b"PK", (".csv",)),
    ],
)
def test_tables_that_cannot_be_read_are_named(tmp_path, name, data, names):
    path = tmp_path / name
    path.write_bytes(data)
    with raising(name, *names):
        load_labels(path)


def test_a_control_is_stated_beside_the_labels(tmp_path):
    path = write_labels(tmp_path / "labels.jsonl", LABELS)
    assert control_of(path) == control_of(None) == ""
    declare_control(path, "inverted")
    assert control_of(path) == "inverted"
    path.with_suffix(".meta.json").write_text('{"randomised": true}')
    assert control_of(path) != ""
