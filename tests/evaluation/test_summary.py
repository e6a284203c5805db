"""Table at the end of a reward run, and renders of geometry alone."""

import re

import pytest
import torch

from eg3d_rlhf.core.cli import aligned
from eg3d_rlhf.core.spec import SlabSpec
from eg3d_rlhf.evaluation import heldout_evaluators, summary
from eg3d_rlhf.evaluation.comparison import Comparison
from eg3d_rlhf.evaluation.heldout_evaluators import metric_entry
from eg3d_rlhf.evaluation.run_images import write_images
from eg3d_rlhf.evaluation.summary import IMAGES, MEASURES, notes, rows, table_of_heads, work
from eg3d_rlhf.experiments.media.sheet import explain_blank, shade
from eg3d_rlhf.measures.measure import Measure
from training.progress import tqdm

RECORD = {
    "reward_before": {"mean": 0.0, "std": 1.0},
    "reward_after": {"mean": 2.0, "std": 1.0},
    "reward_delta_positive": 97,
    "reward_delta_n": 100,
    "tuned_delta_mean": 2.0,
    "control_delta_mean": -0.1,
    "control_source": "control.json",
    "win_rate": 0.9,
    "win_rate_ci95": [0.85, 0.94],
    "win_rate_n": 200,
    "frechet_before": 4.0,
    "frechet_after": 4.4,
    "reward_test_accuracy": 0.9,
    "reward_test_accuracy_ci95": [0.85, 0.93],
    "reward_test_n": 300,
    "reward_test_against": "noise-free order",
    "over_optimisation": [],
    "seconds": 300.0,
    "device": "cpu",
    "frechet_ratio": 1.1,
    "frechet_outcome": "worse",
    "heads_n": 64,
    "defective_n": 40,
    "post_processing_chosen_on": 32,
    "post_processing_methods": {"post_processing": "largest", "strongest_post_processing": "closing 14"},
    "heads": {
        column: dict.fromkeys(MEASURES, value)
        for column, value in (
            ("before", 0.5),
            ("after", 0.25),
            ("post_processing", 0.4),
            ("strongest_post_processing", 0.3),
        )
    },
    "geometry": [
        metric_entry(
            Measure("depth", None, "lower", ""), 1.0, 2.0, {"mean": 1.0, "mean_lo": 0.5, "mean_hi": 1.5}
        ),
        metric_entry(
            Measure("critic", None, "higher", ""), 1.0, 2.0, {"mean": 1.0, "mean_lo": 0.5, "mean_hi": 1.5}
        ),
    ],
}


def row_of(table: dict, word: str) -> str:
    """The figure of the one row whose name holds `word`."""
    (figure,) = (figure for what, figure in table.items() if word in what)
    return figure


def test_rows_state_figures_and_failures():
    table = {what: figure for what, figure, _ in rows(RECORD)}
    assert {"97/100", "+2.000"} <= set(re.split(r"[ ,]+", row_of(table, "deltas")))
    assert "-0.100 (5.0%" in row_of(table, "lambda_r = 0") and "control.json" in row_of(table, "lambda_r = 0")
    assert row_of(table, "depth") == "1 -> 2 (worse: +1 [+0.5, +1.5])"
    assert row_of(table, "critic") == "1 -> 2 (better: +1 [+0.5, +1.5])"
    assert row_of(table, "Fréchet") == "4.000 -> 4.400 (x1.100, worse)"
    alarmed = {**RECORD, "over_optimisation": [{"fallen": ["depth"]}]}
    quiet, loud = (row_of({w: f for w, f, _ in rows(r)}, "over-optimisation") for r in (RECORD, alarmed))
    assert "depth" in loud and "depth" not in quiet


def test_the_table_of_heads_names_the_post_processing_and_the_cost_of_the_strongest():
    (_, *columns), *table = table_of_heads(RECORD)
    assert columns[:2] == ["before", "after"] and len(columns) == 4
    with_control = {**RECORD, "heads": {**RECORD["heads"], "control": {"error_reduction": 0.06}}}
    assert table_of_heads(with_control)[0][3] == "control" and table_of_heads(with_control)[3][3] == "6%"
    assert table[list(MEASURES).index("error_defective")][1:] == ("0.500", "0.250", "0.400", "0.000")
    lines = " ".join(notes(RECORD))
    methods = RECORD["post_processing_methods"]
    assert all(
        text in lines
        for text in ("64", "40", methods["post_processing"], methods["strongest_post_processing"], "30%")
    )
    nothing = {**RECORD, "heads": {column: dict.fromkeys(MEASURES) for column in RECORD["heads"]}}
    assert table_of_heads(nothing)[1][1:] == ("", "", "", "0.000") and notes(nothing)
    del nothing["heads"]
    assert table_of_heads(nothing) == [] and notes(nothing) == []


def test_rows_of_a_run_without_judge_or_control():
    record = {k: v for k, v in RECORD.items() if not k.startswith(("win_rate", "frechet"))}
    table = {
        what: figure
        for what, figure, _ in rows({**record, "control_delta_mean": None, "reward_test_accuracy": None})
    }
    full = [what for what, *_ in rows(RECORD)]
    # only the rows of the annotator, of the images and of the test pairs are missing
    assert len(table) == len(full) - 3 and set(table) < set(full)
    assert not any("Fréchet" in what or "accuracy" in what for what in table)
    assert not re.search(r"\d", row_of(table, "lambda_r = 0"))


def test_goals_of_the_demo_are_shown_for_its_data_alone():
    assert {"<= 420 s", "better"} <= {goal for *_, goal in rows(RECORD)}
    other_data = {key: value for key, value in RECORD.items() if key != "heads"}
    assert {goal for *_, goal in rows(other_data)} == {""}
    assert [row[:2] for row in rows(other_data)] == [row[:2] for row in rows(RECORD)]


def test_a_table_with_a_long_reason_fits_a_page():
    reason = "control.json records a run with other settings: " + "kimg is 2 instead of 0.6; " * 10
    other_control = {**RECORD, "control_delta_mean": None, "control_source": reason}
    lines = aligned(rows(other_control), 110).split("\n")
    assert max(map(len, lines)) <= 110 and len(lines) < len(RECORD) + 10
    assert all("kimg" not in line for line in lines)  # `finish` prints the reason below the table


def test_shading_shows_a_sphere_of_the_right_size():
    x, y, z = SlabSpec.cube(48).axes()
    radius = 0.3
    distance = (z[:, None, None] ** 2 + y[None, :, None] ** 2 + x[None, None, :] ** 2).sqrt()
    image = shade((10 + (radius - distance) * 100)[None], resolution=96)[0, 0]
    covered = (image < 1).float().mean().item()
    angle = torch.asin(torch.tensor(radius / 2.7))
    expected = torch.pi * (torch.tan(angle) * 4.2647) ** 2  # of the unit image
    assert abs(covered - expected.item()) < 0.02
    assert image[48, 48] > image[70, 48]  # lit from above and in front


@pytest.mark.parametrize("level", [10.0, float("nan")])
def test_a_cube_without_a_surface_states_the_reason_in_its_image(level):
    cubes = torch.stack([torch.full((8, 8, 8), 0.5), torch.linspace(-1, 1, 512).reshape(8, 8, 8)])
    images = shade(cubes, resolution=96, level=level)
    assert images.shape == (2, 1, 96, 96)
    for image in images[:, 0]:
        # grey letters in the middle of a white cell
        assert (image[:, :12] == 1).all() and 0.02 < (image < 0.9).float().mean() < 0.5


def test_the_reason_of_a_blank_cell_follows_the_densities():
    below, above, aside, broken = (
        explain_blank(low, high, 10.0) for low, high in ((-1, 2), (11, 12), (-1, 12), (float("nan"), 1))
    )
    assert len({below, above, aside, broken}) == 4
    assert "10" in below and "-1" in below and "10" in above and "10" not in aside


@pytest.mark.long
def test_several_processes_come_to_the_same(unchanged, tmp_path):
    alone, several = (Comparison(**{**vars(unchanged), "memory": {}}) for _ in range(2))
    (tmp_path / "several").mkdir()
    (tmp_path / "alone").mkdir()
    work(several, tmp_path / "several", 2)
    assert set(several.memory[IMAGES]) == set(write_images(alone, tmp_path / "alone"))
    there, here = (
        {p.name: p.read_bytes() for p in (tmp_path / name).rglob("*.p[nl][gy]")}
        for name in ("several", "alone")
    )
    assert there == here and "comparison.png" in there  # and meshes, where the surface has any
    known = set(several.memory)
    assert heldout_evaluators.geometry(several) == heldout_evaluators.geometry(
        alone
    ) and heldout_evaluators.shapes(several) == heldout_evaluators.shapes(alone)
    assert set(several.memory) == known  # nothing was computed again


def test_summary_of_one_process_shows_its_parts(monkeypatch):
    """One bar counts the rewards, all parts and the change of the surface."""
    bars = []

    class Bar(tqdm):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            bars.append(self)

    measured = []
    monkeypatch.setattr(summary, "tqdm", Bar)
    monkeypatch.setattr(summary, "reward_shift", lambda comparison: measured.append("rewards"))
    monkeypatch.setattr(summary, "once", lambda comparison, task, compute: measured.append(task))
    parts = [("views", "before"), ("views", "after")]
    monkeypatch.setattr(summary.heldout_evaluators, "list_parts", lambda comparison: parts)
    monkeypatch.setattr(
        summary.heldout_evaluators, "measure_part", lambda comparison, *part: measured.append(part)
    )
    summary.work_alone(None)
    assert measured == ["rewards", *parts, summary.CHANGE]
    assert [(bar.n, bar.total) for bar in bars] == [(4, 4)]
