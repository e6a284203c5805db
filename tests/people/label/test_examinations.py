"""The record of examined files: a stopped examination resumes, and unchanged files are examined once."""

import json

import pytest

from eg3d_rlhf.people.label.assets import examinations
from eg3d_rlhf.people.label.assets.examinations import RECORD, examine_and_record, examine_with_records
from eg3d_rlhf.people.label.assets.reading import Examined, examine_or_reason

SHAPE = "v 0 0 0\nv 1 0 0\nv 0 1 0\nv 0 0 {z}\nf 1 2 3\nf 1 2 4\n"


@pytest.fixture
def paths(tmp_path):
    for number in range(5):
        (tmp_path / f"{number}.obj").write_text(SHAPE.format(z=1 + number))
    return sorted(tmp_path.glob("*.obj"))


@pytest.fixture
def asked(monkeypatch):
    """Names of the files that are examined, call by call."""
    calls = []

    def examine(chunk, *args):
        calls.append([path.name for path in chunk])
        return examine_or_reason(chunk, *args)

    monkeypatch.setattr(examinations, "examine_or_reason", examine)
    return calls


def test_a_stopped_examination_resumes(paths, asked, monkeypatch):
    monkeypatch.setattr(examinations, "CHUNK", 2)
    counts = []

    def stop_at_three(done: int) -> None:
        counts.append(done)
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        examine_and_record(paths, stop_at_three)
    assert asked == [["0.obj", "1.obj"], ["2.obj", "3.obj"]] and counts == [0, 1, 2, 3]
    record = paths[0].parent / RECORD
    record.write_text(record.read_text() + '{"file": "2.o\n')  # half a line
    asked.clear()
    results = examine_and_record(paths)
    assert asked == [["2.obj", "3.obj"], ["4.obj"]]
    assert results == examine_or_reason(paths) and all(isinstance(result, Examined) for result in results)


def test_only_unchanged_files_are_taken_from_the_record(paths, asked):
    first = examine_and_record(paths)
    entries = [json.loads(line) for line in (paths[0].parent / RECORD).read_text().splitlines()]
    assert [entry["file"] for entry in entries] == [path.name for path in paths]
    asked.clear()
    assert examine_with_records(paths) == first and asked == []
    # a changed file, a defective file, and a file whose material may change without it
    paths[0].write_text(SHAPE.format(z=9))
    paths[1].write_text("broken")
    paths[2].write_text("mtllib m.mtl\n" + SHAPE.format(z=3))
    (paths[2].parent / "m.mtl").write_text("newmtl a\nKd 1 0 0\n")
    results = examine_and_record(paths)
    assert asked == [["0.obj", "1.obj", "2.obj"]]
    assert results[0].hash != first[0].hash and isinstance(results[1], str) and results[3:] == first[3:]
    asked.clear()
    (paths[2].parent / "m.mtl").write_text("newmtl a\nKd 0 1 0\n")
    again = examine_with_records(paths)
    assert asked == [["1.obj", "2.obj"]] and again[2].hash != results[2].hash
    assert examine_with_records([]) == []
