"""The baselines of a flow generator's folder WORK: choices and filters on made-up numbers, and the toy."""

import json

import numpy as np
import pytest
from click.testing import CliRunner

from eg3d_rlhf.evaluation.baselines import flows
from eg3d_rlhf.modes.report_baselines import baselines
from eg3d_rlhf.tuning.flow.workspace.work_folder import TEST, Work
from tests.modes.flow_works import flow
from tests.rejections import rejected


def test_the_best_sample_by_the_reward_is_chosen():
    rewards = np.array([[0.0, 2.0, 1.0, np.nan], [np.nan, -1.0, 5.0, 0.0]])
    candidates = {
        "reward": rewards,
        "vector": np.arange(16.0).reshape(2, 4, 2),
        "seconds": np.full((2, 4), 0.5),
    }
    two = flows.choose(candidates, 2)
    assert two["reward"].tolist() == [2, -1] and two["seconds"].tolist() == [1, 1]
    assert flows.choose(candidates, 4)["vector"].tolist() == [[2, 3], [12, 13]]


def test_an_asset_without_a_surface_has_the_lowest_score():
    base = {"heldout": np.array([1.0, np.nan, 3.0])}
    assert flows.fill_empty({"heldout": np.array([np.nan, 5.0, 2.0])}, base)["heldout"].tolist() == [1, 5, 2]


def test_metrics_by_prompt():
    prompts = ["a", "a", "b", "b"]
    base = {"heldout": np.array([0.0, 1.0, 2.0, 3.0]), "vector": np.array([[0.0], [2.0], [5.0], [5.0]])}
    assert flows.mean_spread(base["vector"], prompts) == 0.5
    after = {"heldout": np.array([1.0, 1.0, 2.0, 0.0]), "vector": 2 * base["vector"]}
    metrics = flows.compute_metrics(base, after, prompts)
    assert metrics["variety"] == 2 and metrics["gain"] == -0.5
    assert metrics["intact_degraded"] == 0.5  # of the two assets above the median, one falls
    filtered = flows.apply_mesh_filter(
        {**base, "parts": np.ones(4), "largest part: parts": np.zeros(4)}, "largest part"
    )
    assert filtered["parts"].sum() == 0 and "heldout" not in filtered


def test_the_toy(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(flows, "FACTORS", (1.0, 2.0))
    flow("new", "WORK", "--pipeline=toy", "--each=2")
    result = CliRunner().invoke(baselines, ["WORK", "--latents=4"])
    assert result.exit_code == 0, result.output
    data = json.loads((tmp_path / "WORK" / "baselines" / "baselines.json").read_text())
    # without a latent reward and a training, the other rungs are commands
    base, grid, largest_part, filled_holes = (
        [point["metrics"] for point in row["points"]] for row in data["rows"]
    )
    assert [row["key"] for row in data["rows"]][:2] == ["base", flows.GRID]
    assert len(data["missing"]) == 2 and len(grid) == 4
    base = base[0]
    assert base["gain"] == 0 and base["variety"] == 1
    assert largest_part[0]["parts"] == 1
    assert filled_holes[0]["open_share"] == pytest.approx(0)
    prompts, seeds = flows.FlowInputs(work=tmp_path / "WORK", assets=4).prompts_and_seeds(
        Work.open(tmp_path / "WORK"), TEST
    )
    assert data["seeds"] == seeds and set(prompts) <= set(Work.open(tmp_path / "WORK").names(TEST))
    rejected(CliRunner().invoke(baselines, ["WORK", "--psi=0.7"]), "--psi", "WORK")
    rejected(CliRunner().invoke(baselines, ["WORK", "--run=WORK"]), "--run", "tune-00")
