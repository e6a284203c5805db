"""The label format: round trips, the published table, and errors that name file, line and remedy."""

import json

import pytest

from eg3d_rlhf.preferences.labels import Preference, labels_hash, load_labels, write_labels
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
