"""The sweep: which cells there are, what they are measured by, and the front of known values."""

import itertools
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner

from eg3d_rlhf.evaluation import sweep
from eg3d_rlhf.evaluation.sweep import Cell, grid
from eg3d_rlhf.experiments.pages import Facts, Finding
from eg3d_rlhf.modes import report_studies
from eg3d_rlhf.modes.jobs import command_of
from eg3d_rlhf.modes.report_all import REPORTS, report_all, report_commands
from tests.rejections import raising, rejected

CELL = Cell(lambda_r=10, lambda_sigma=0.01, seed=0)


def test_grid_has_every_combination_and_one_control_for_each_seed():
    cells = grid([0, 1, 10], [0, 0.01], [3, 4])
    assert len(cells) == len(set(cells)) == 2 * (1 + 4) and cells[0] == Cell(
        lambda_r=0, lambda_sigma=0, seed=3
    )
    assert (
        sum(cell.lambda_r == 0 for cell in cells) == 2
        and sum(cell.lambda_r > 0 and cell.lambda_sigma == 0 for cell in cells) == 4
    )
    assert cells[0].setting == "control (λ_r = 0)" and cells[2].setting == "λ_r = 1, λ_σ = 0.01"


@pytest.mark.parametrize(
    ("lists", "flag"),
    [(([], [0], [0]), "--lambda-r"), (([1], [-1], [0]), "--lambda-sigma"), (([1], [1], []), "--seeds")],
)
def test_grids_that_are_none(lists, flag):
    with raising(flag):
        grid(*lists)


def test_pareto_against_loops():
    values = np.random.default_rng(0).integers(0, 4, size=(40, 3)).astype(float)
    expected = [
        not any((other >= measures).all() and (other > measures).any() for other in values)
        for measures in values
    ]
    assert sweep.pareto(values).tolist() == expected and 0 < sum(expected) < 40


def cell_finding(reward, distance, normals):
    steps = {
        name: {"mean": v, "lo": v - 0.1, "hi": v + 0.1}
        for name, v in zip(sweep.GOALS, (reward, distance, normals), strict=True)
    }
    return Finding(facts=Facts(n=4), data={"measures": steps, "network": "ab" * 32})


@pytest.mark.long
def test_front_of_known_settings(tiny_comparison, tmp_path):
    settings = {
        (0, 0.0): (0, 0, 0),
        (1, 0.0): (5, 2, 1),
        (1, 0.1): (4, 1, 0.5),
        (10, 0.0): (4.5, 3, 2),
        (10, 0.1): (4, 1, 0.4),
    }
    findings = {Cell(lambda_r=r, lambda_sigma=s, seed=0): cell_finding(*v) for (r, s), v in settings.items()}
    result = sweep.front(tiny_comparison, findings, tmp_path)
    on = {row["setting"]: row["front"] for row in result.rows}
    assert [name for name, text in on.items() if text] == [
        "control (λ_r = 0)",
        "λ_r = 1, λ_σ = 0",
        "λ_r = 10, λ_σ = 0.1",
    ]
    assert "3 of 5" in result.says[0] and "λ_r = 10, λ_σ = 0.1" in result.says[0]
    assert any(all(part in text for part in ("λ_σ = 0.1", "50.0%", "80.0%")) for text in result.says)
    assert any("--seeds" in text for text in result.says)
    for plot in (sweep.plot_front, sweep.plot_others):
        assert plot(json.loads(json.dumps(result.data))) is not None


def test_a_sweep_without_a_finished_training_is_named(tmp_path):
    unfinished = SimpleNamespace(network=lambda: None)
    with raising("--outdir", str(tmp_path), "2"):
        sweep.measure_cells({CELL: unfinished, replace(CELL, seed=9): unfinished}, None, tmp_path)


def test_cells_are_measured_against_before(tiny_comparison, tiny_pair):
    c = tiny_comparison
    path = sorted(tiny_pair[0].glob("network-snapshot-*"))[-1]
    findings = sweep.measure_cell(c, None, CELL, path)
    measures = findings.data["measures"]
    unchanged = sweep.measure_cell(c, None, CELL, c.before.path).data["measures"]
    delta = (c.scores(c.load(path), c.seeds()) - c.scores(c.before, c.seeds())).double().mean()
    assert (
        measures[sweep.REWARD]["mean"] == pytest.approx(float(delta)) and measures[sweep.DISTANCE]["mean"] > 0
    )
    assert {name: step["mean"] for name, step in unchanged.items()} == dict.fromkeys(
        unchanged, 0
    ) and sweep.IMAGES in measures


def flags_of(tmp_path, data, networks, reward):
    train = (
        "--batch=4 --nrr-initial=8 --glr=0.002 --dlr=0.002 --set=ema_kimg=0.02 --gen-pose-cond=True"
        " --tick=0.008"
    )
    return [
        f"--before={networks}",
        f"--reward-ckpt={reward}",
        f"--set=data={data}",
        "--lambda-r=10",
        "--lambda-sigma=0",
        "--kimg=0.008",
        f"--set=train_flags={train}",
        "--n=16",
        "--set=images=16",
        "--device=cpu",
        f"--outdir={tmp_path / 'sweep'}",
    ]


def test_mistakes_are_named_and_nothing_is_trained(tmp_path, tiny_data, tiny_networks, tiny_reward):
    flags = flags_of(tmp_path, tiny_data, tiny_networks, tiny_reward)
    wrong = CliRunner().invoke(report_studies.sweep, [*flags, "--lambda-r=1,x"])
    rejected(wrong, "--lambda-r", "1,x")
    # the sweep would measure against another network than the one that its cells start from
    for train_flags, own_flag in (("--init=X.pkl", "--before"), ("--reward-ckpt R", "--reward-ckpt")):
        wrong = CliRunner().invoke(report_studies.sweep, [*flags, f"--set=train_flags={train_flags}"])
        rejected(wrong, "train_flags", train_flags.split()[0], own_flag)
    studied = CliRunner().invoke(report_studies.controlled_study, ["-n", "--", "--init=X.pkl"])
    rejected(studied, "--init=X.pkl", "--network")
    planned = CliRunner().invoke(report_studies.sweep, [*flags, "--lambda-r=0,1", "--seeds=0,1", "--dry-run"])
    assert json.loads(planned.output)["cells"] == {
        f"{n}-s{s}": "new" for s, n in itertools.product((0, 1), ("r0-sigma0", "r1-sigma0"))
    }
    assert not (tmp_path / "sweep").exists()


@pytest.mark.long
def test_a_real_sweep_of_one_cell(tmp_path, tiny_data, tiny_networks, tiny_reward):
    flags = flags_of(tmp_path, tiny_data, tiny_networks, tiny_reward)
    done = CliRunner().invoke(report_studies.sweep, flags)
    assert done.exit_code == 0, done.output
    assert "λ_r = 10, λ_σ = 0" in done.output and (tmp_path / "sweep/index.html").is_file()
    logs = list(tmp_path.glob("sweep/cells/*/log.txt"))
    stamps = [log.stat().st_mtime_ns for log in logs]
    assert CliRunner().invoke(report_studies.sweep, flags).exit_code == 0
    assert [log.stat().st_mtime_ns for log in logs] == stamps and len(logs) == 1


def test_make_reports_plans_what_is_missing(tmp_path):
    planned = json.loads(CliRunner().invoke(report_all, [f"--outdir={tmp_path}", "--dry-run"]).output)
    tuned, control, *_ = planned.values()
    assert "--snap=1" in tuned and "--lambda-r=0" in control and "--lambda-r=0" not in tuned
    assert list(planned)[2:] == ["evaluate", "attribute", "embed", "sweep"] and planned["embed"][:3] == [
        "eg3d_rlhf",
        "report",
        "embed",
    ]
    assert list(
        json.loads(CliRunner().invoke(report_all, [f"--outdir={tmp_path}", "--only=embed", "-n"]).output)
    )[2:] == ["embed"]
    wrong = CliRunner().invoke(report_all, ["--only=nothing"])
    rejected(wrong, "--only", "nothing")


def test_the_commands_of_make_reports_are_understood(repo):
    """Every flag that the recipe passes exists."""
    runs = {"tuned": Path("a"), "control": Path("b")}
    for script, *words in report_commands(Path("out"), runs, 0, list(REPORTS)).values():
        command_of(" ".join(words[:2])).make_context(words[1], words[2:])
        assert (repo / script / "__main__.py").is_file()
