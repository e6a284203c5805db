"""The toy as a problem, and the tool that makes its networks."""

import json

import pytest
import torch
from click.testing import CliRunner

from eg3d_rlhf.modes import assets
from eg3d_rlhf.tuning.flow.toy.bundled import TOY_DEFAULTS, toy_problem
from eg3d_rlhf.tuning.flow.toy.judges import FinalOracle
from tests.tuning.flow.toy.drawing import drawn


def test_the_problem_is_whole():
    problem = toy_problem(seed=3, pairs_per_condition=2)
    assert [stage.name for stage in problem.pipeline.stages] == ["structure", "voxels"]
    assert len(problem.human_pairs("voxels")) == 2 * len(problem.train_conditions) == 128
    assert len(problem.held_out_conditions) == 96 and len(problem.choosing) == 32
    judges = [type(judge) for judge in (problem.reward, problem.chooser, problem.final)]
    assert len(set(judges)) == 3
    assets, names = drawn(4)
    assert torch.equal(problem.parts(assets, names)["colour"], FinalOracle().parts(assets, names)["colour"])


def test_the_identity_tells_problems_apart():
    one, same, other = (toy_problem(seed, pairs_per_condition=n).identity for seed, n in ((0, 2), (0, 2), (1, 2)))
    assert one == same != other and json.loads(json.dumps(one)) == one
    assert {"structure", "voxels", "reward"} < set(toy_problem().identity)
    assert toy_problem(0, pairs_per_condition=3).identity != one


def test_no_pairs_are_refused():
    with pytest.raises(ValueError, match="toy_problem: expected pairs_per_condition >= 1, got 0"):
        toy_problem(pairs_per_condition=0)


def test_the_loop_is_anchored():
    human, loop = TOY_DEFAULTS.human.dpo, TOY_DEFAULTS.loop.dpo
    assert loop.sft_weight > 0 and loop.beta > human.beta
    assert TOY_DEFAULTS.sft.dpo.kind == "sft" and TOY_DEFAULTS.choosing is not None


def test_the_tool_says_what_it_would_do():
    done = CliRunner().invoke(assets.toy_flow, ["reward", "--seed=3", "--dry-run"])
    assert done.exit_code == 0 and json.loads(done.output)["reward"]["seed"] == 3
    everything = json.loads(CliRunner().invoke(assets.toy_flow, ["--dry-run", "--steps=7"]).output)
    assert set(everything) == {"structure", "voxels", "reward"} and everything["voxels"]["steps"] == 7


def test_the_tool_makes_a_network(tmp_path):
    done = CliRunner().invoke(assets.toy_flow, ["structure", "--steps=2", f"--outdir={tmp_path}"])
    assert done.exit_code == 0 and "structure: loss" in done.output, done.output
    assert [path.name for path in tmp_path.iterdir()] == ["structure.safetensors"]
