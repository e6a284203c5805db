"""Table of `report solid`: controls look sound and are not rewarded; best of n; both kinds of generator."""

import json
from dataclasses import asdict

import numpy as np
import pytest
from click.testing import CliRunner

from eg3d_rlhf.evaluation import solids as report
from eg3d_rlhf.geometry import solids
from eg3d_rlhf.geometry.solids import HEADS
from eg3d_rlhf.modes.report_shapes import solid
from eg3d_rlhf.tuning.flow.training.settings import ArmsSource
from tests.rejections import raising
from tests.tuning.flow.tiny_points import write_folder

N = 32
PLACES = np.stack(np.meshgrid(*[(np.arange(N) + 0.5) / N - 0.5] * 3, indexing="ij"))


def shell(hole: float) -> np.ndarray:
    distance = np.linalg.norm(PLACES, axis=0)
    return (np.abs(distance - 0.25) < 0.06) & ~((np.hypot(PLACES[0], PLACES[1]) < hole) & (PLACES[2] > 0))


def arch() -> np.ndarray:
    x, y, z = np.abs(PLACES)
    return (x < 0.3) & (y < 0.3) & (z < 0.1) & ~((x < 0.16) & (PLACES[1] < 0.1))


def test_controls_are_sound_and_get_nothing_for_it():
    shapes = [arch()] * 4
    lines = report.table(
        {"itself": shapes, "a ball": [report.ball(arch())] * 4}, shapes, 1, HEADS, lambda: None
    )
    assert lines["itself"]["change"] == 0 and lines["itself"]["reward"] == lines["untuned"]["reward"]
    solids_of = [name for name in report.CONTROLS if "hull" in name or "ball" in name]
    assert len(solids_of) == 2
    for name in (*solids_of, "a ball"):
        assert (
            lines[name]["solid"] > 0.9 and lines[name]["reward"] < 0.1 and lines[name]["change_ci95"][1] < 0
        )
    assert abs(report.ball(arch()).sum() / arch().sum() - 1) < 0.05
    text = "\n".join(report.markdown(lines, HEADS))
    assert "stand" not in text and "| closing 4 |" in text and "closed" in text


def test_a_cure_is_a_gain_and_closed():
    sick = [shell(0.05)] * 4
    cured = [np.linalg.norm(PLACES, axis=0) < 0.31] * 4
    lines = report.table({"cured": cured}, sick, 2, HEADS, lambda: None)
    assert (
        lines["cured"]["change_ci95"][0] > 0.05 and lines["cured"]["closed"] == 1 > lines["untuned"]["closed"]
    )
    (best,) = (line for name, line in lines.items() if name.startswith("best"))
    assert best["n"] == 2


def test_the_best_of_each_group():
    assert report.best_of_groups(np.array([0.1, 0.9, 0.3, 0.8, 0.2, 0.5]), 2).tolist() == [1, 3]


@pytest.mark.parametrize("flags", [["--pipeline=toy"], pytest.param([], marks=pytest.mark.long)])
def test_the_command(flags, tmp_path):
    result = CliRunner().invoke(solid, [*flags, "--n=4", f"--out={tmp_path / 'solid.json'}"])
    assert result.exit_code == 0, result.output
    lines = json.loads((tmp_path / "solid.json").read_text())["lines"]
    untuned, best, *controls = lines
    assert untuned == "untuned" and "4" in best and controls == list(report.CONTROLS)
    assert lines[best]["reward"] >= lines[untuned]["reward"] > 0 and "| untuned |" in result.output
    assert all(
        0 <= line[name] <= 1
        for line in lines.values()
        for name in (*solids.TERMS, "solid", "fidelity", "reward", "closed")
    )


def test_missing_inputs_are_rejected(tmp_path):
    toy = "--pipeline=toy"
    alone = [["--stage=structure"], [f"--conditioning={tmp_path}"]]
    for flags in ([str(tmp_path / "none")], [toy, "--stage=roof"], ["--n=2"], *alone, [toy, str(tmp_path)]):
        result = CliRunner().invoke(solid, flags)
        assert result.exit_code == 2 and "Traceback" not in result.output, flags


def test_a_folder_is_opened_as_its_runs_were(tmp_path):
    root = write_folder(tmp_path / "ROOT")
    runs = [tmp_path / name for name in "abc"]
    for run, seed in zip(runs, (3, 3, 4), strict=True):
        run.mkdir()
        source = ArmsSource(pipeline="elsewhere", conditions="c.safetensors", seed=seed)
        (run / "training_options.json").write_text(json.dumps({"run": {"source": asdict(source)}}))
    same = report.source_of(str(root), None, runs[:2])
    assert (same.pipeline, same.conditions, same.seed) == (str(root), "c.safetensors", 3)
    assert report.source_of(str(root), tmp_path / "d", runs[:1]).conditions == str(tmp_path / "d")
    assert report.source_of("toy", None, runs).seed == ArmsSource.seed
    for others in (runs, [runs[0], tmp_path]):
        with raising("--seed"):
            report.source_of(str(root), None, others)


def test_nothing_stays_nothing():
    assert not any(change(np.zeros((8, 8, 8), dtype=bool)).any() for change in report.CONTROLS.values())
