"""Mesh validation: its counts, damaged files as rows, and rejected inputs."""

import csv
import json
import os

import numpy as np
import pytest
import trimesh
from click.testing import CliRunner

from eg3d_rlhf.evaluation import mesh_validation as census
from eg3d_rlhf.evaluation.mesh_validation import (
    REQUIREMENTS,
    answer_requests,
    badness,
    generator_name,
    medians,
    paired,
    shares,
)
from eg3d_rlhf.modes.jobs import main

pytest.importorskip("igl", reason="extra solid")
GOOD = {
    "closed": True,
    "manifold": True,
    "oriented": True,
    "inverted_bodies": 0,
    "bodies": 1,
    "hidden": 0.0,
    "thick_p01": 0.1,
    "stands": "stands",
    "crossing": 0.0,
    "open_length": 0.0,
    "faces": 12,
    "parts": 1,
    "buried": 0.0,
    "thick_median": 0.2,
    "tip": 9.0,
    "bend": 1.0,
    "solidity": None,
    "reason": "",
}


def rows(generator: str, count: int, good: int) -> list[dict]:
    return [
        {**GOOD, "generator": generator, "file": f"{generator}/{i}.glb", "closed": i < good}
        for i in range(count)
    ]


def test_shares_have_the_intervals_of_the_specification():
    result = {
        (row["generator"], row["demand"]): row for row in shares([*rows("a", 100, 91), *rows("b", 100, 0)])
    }
    assert [round(result["a", "closed"][end], 2) for end in ("share", "lo", "hi")] == [0.91, 0.84, 0.95]
    assert [round(result["b", "closed"][end], 3) for end in ("share", "lo", "hi")] == [0, 0, 0.037]
    assert len(result) == 2 * len(REQUIREMENTS) and result["a", "stands"]["share"] == 1


def test_rejected_files_and_missing_values_count_for_nothing():
    given = [*rows("a", 4, 4), {"generator": "a", "file": "a/x.glb", "reason": "expected more"}]
    assert {row["of"] for row in shares(given)} == {4}
    result = medians(given)
    assert "solidity" not in {row["measure"] for row in result} and all(
        row["lo"] <= row["median"] <= row["hi"] for row in result
    )


def test_pairs_are_files_of_one_name():
    (result,) = [row for row in paired([*rows("a", 10, 9), *rows("b", 10, 2)]) if row["demand"] == "closed"]
    first, second = (key for key in result if key.startswith("only"))
    assert (result["pairs"], result[first], result[second]) == (10, 7, 0)
    assert result["p"] == pytest.approx(2 / 2**7)
    assert badness(rows("a", 1, 0)[0]) > badness(rows("a", 1, 1)[0])


def test_generators_are_folders_or_what_an_expression_finds(tmp_path):
    path = tmp_path / "trellis" / "seed1" / "chair.glb"
    assert (
        generator_name(path, tmp_path, None) == "trellis"
        and generator_name(path, tmp_path, r"seed\d") == "seed1"
    )
    assert (
        generator_name(path, tmp_path, r"/(\w+)\.glb") == "chair"
        and generator_name(tmp_path / "a.glb", tmp_path, None) == tmp_path.name
    )


def test_a_process_that_dies_is_a_row_and_the_next_file_is_measured(tmp_path, monkeypatch):
    """The first request ends its process, as a parser that crashes would."""
    worker = tmp_path / "eg3d_rlhf" / "evaluation"
    worker.mkdir(parents=True)
    (worker / "mesh_validation_worker.py").write_text(
        "import json, os, sys\nfor line in sys.stdin:\n    number = json.loads(line)['number']\n"
        "    number == 1 and os._exit(9)\n    print(json.dumps({'number': number}), flush=True)\n"
    )
    monkeypatch.setattr(census, "_ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)  # the module that is found first
    result = dict(answer_requests([{"number": i} for i in range(4)], process_count=2))
    assert result == {0: {"number": 0}, 1: {"reason": census.ENDED}, 2: {"number": 2}, 3: {"number": 3}}
    assert "PYTHONPATH" not in os.environ or str(tmp_path) not in os.environ["PYTHONPATH"]


@pytest.mark.long
def test_the_command_writes_rows_page_and_tables(tmp_path):
    folder = tmp_path / "assets"
    out = tmp_path / "out"
    for generator, box in (("good", trimesh.creation.box()), ("open", trimesh.creation.box())):
        (folder / generator).mkdir(parents=True)
        if generator == "open":
            box.update_faces(np.arange(len(box.faces)) > 1)
        box.export(folder / generator / "chair.glb")
    (folder / "open" / "broken.glb").write_bytes(b"<html>")
    done = CliRunner().invoke(
        main, ["check-assets", str(folder), f"--outdir={out}", "--samples=500", "--jobs=1"]
    )
    assert done.exit_code == 0, done.output
    assert "2 meshes measured, 1 not" in done.output
    assert any("broken.glb" in line and "GLB" in line for line in done.output.splitlines())
    with (out / "data" / "files.csv").open() as file:
        result = {row["file"]: row for row in csv.DictReader(file)}
    assert result["good/chair.glb"]["closed"] == "True" and result["open/chair.glb"]["closed"] == "False"
    assert result["open/broken.glb"]["reason"] and not result["open/broken.glb"].get("closed")
    page = (out / "index.html").read_text()
    assert (
        "1e-05" in page
        and "0.01 thick" in page
        and page.count("<img alt=") >= 2
        and "data:image/png;base64,iVBOR" in page
    )
    assert {row["demand"] for row in json.loads((out / "data" / "shares.json").read_text())["rows"]} == set(
        REQUIREMENTS
    )


@pytest.mark.parametrize(
    "flags, word",
    [
        (["--weld=0.01"], "--weld"),
        (["--by=("], "--by"),
        ([], "FOLDER"),
        (["--samples=1"], "--samples"),
        (["--outdir={tmp}"], "--outdir"),
    ],
)
def test_bad_input_is_one_line(tmp_path, flags, word):
    (tmp_path / "empty").mkdir()
    done = CliRunner().invoke(
        main, ["check-assets", str(tmp_path / "empty"), *(flag.format(tmp=tmp_path) for flag in flags)]
    )
    assert done.exit_code == 2 and word in done.stderr


def test_a_folder_of_damaged_files_is_rejected(tmp_path):
    (tmp_path / "a.glb").write_bytes(b"nothing")
    done = CliRunner().invoke(
        main, ["check-assets", str(tmp_path), f"--outdir={tmp_path / 'out'}", "--jobs=1"]
    )
    assert done.exit_code == 2 and "a.glb" in done.stderr and not (tmp_path / "out").exists()
