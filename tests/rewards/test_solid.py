"""`--reward=solid` on fields: detected defects, gradients, unchanged shapes, and errors."""

import numpy as np
import pytest
import torch

from eg3d_rlhf.core.field import Bounds
from eg3d_rlhf.core.spec import SlabSpec
from eg3d_rlhf.rewards.reward import Reward, load_reward, untrained_reward
from eg3d_rlhf.rewards.solid import Solid, Soundness, occupancy
from tests import tiny_runs
from tests.rejections import raising, rejected


class Shells:
    """Hollow spheres with a hole of these radii, in world units; 0 for no hole."""

    bounds = Bounds()
    level = 10.0

    def __init__(self, *holes: float, floater: float = 0.0):
        self.holes = holes
        self.floater = floater
        self.grown = torch.zeros((), requires_grad=True)

    def __len__(self) -> int:
        return len(self.holes)

    def density_grid(self, grid: SlabSpec) -> torch.Tensor:
        points = grid.points()
        inside = 0.04 - (points.norm(dim=-1) - 0.3).abs()
        apart = self.floater - (points - torch.tensor([0.42, 0.42, 0.42])).norm(dim=-1)
        across = points[..., :2].norm(dim=-1)
        above = points[..., 2] > 0
        shells = [
            torch.where(above & (across < hole), torch.minimum(inside, across - hole), inside)
            for hole in self.holes
        ]
        return torch.stack([10 + 600 * torch.maximum(shell, apart) + self.grown for shell in shells])


def test_only_leaks_and_floaters_have_a_gradient(tmp_path):
    reward = load_reward(
        Reward(Solid(), untrained_reward("solid", Shells(0.0)).network).save(tmp_path / "solid.safetensors")
    )
    intact = Shells(0.0)
    leaky = Shells(0.05)
    assert reward.observation == Solid() and reward.score(intact).item() == 0
    score = reward.score(leaky)
    score.sum().backward()
    assert score.item() < 0 and leaky.grown.grad > 0, "a higher density closes the hole"
    floating = Shells(0.0, floater=0.06)
    reward.score(floating).sum().backward()
    assert floating.grown.grad < 0, "a lower density removes the floater"


def test_mesh_validity_ranks_shapes_and_has_no_gradient():
    generator = Shells(0.0)
    reward = untrained_reward("mesh-validity", generator)
    scores = reward.score(Shells(0.0, 0.05, 0.0))
    assert not scores.requires_grad and scores[0] == scores[2] and 0 < scores[1] <= scores[0] < 1
    assert (
        Soundness.from_dict({k: v for k, v in reward.observation.to_dict().items() if k != "kind"})
        == reward.observation
    )
    (grid,) = occupancy(Shells(0.0), SlabSpec.cube(32))
    assert grid.shape == (32, 32, 32) and 0 < grid.mean() < 0.2


def test_an_empty_shape_scores_zero_and_a_shape_that_is_not_finite_is_rejected():
    empty = Shells(0.0)
    empty.level = 1e4
    assert (
        untrained_reward("mesh-validity", Shells(0.0)).score(empty).item() == 0
        and untrained_reward("solid", Shells(0.0)).score(empty).item() == 0
    )
    with torch.no_grad():
        empty.grown.fill_(np.nan)
    with raising("finite"):
        untrained_reward("solid", Shells(0.0)).score(empty)


def test_trained_kinds_need_a_file_and_kinds_without_a_gradient_cannot_tune(tmp_path):
    with raising("sigma"):
        untrained_reward("sigma", Shells(0.0))
    result = tiny_runs.run(
        "--reward=mesh-validity", f"--outdir={tmp_path}", "--data=synthetic:people64@n=8", "--device=cpu"
    )
    rejected(result, "--reward=mesh-validity", "gradient")


@pytest.mark.long
def test_solid_tunes_without_a_file_and_without_labels(tmp_path):
    dataset_path = tiny_runs.write_dataset(tmp_path / "data.zip", resolution=64)
    flags = [
        "--reward=solid",
        "--lambda-r=10",
        f"--data={dataset_path}",
        "--kimg=0.008",
        "--tick=0.008",
        "--no-summary",
        "--device=cpu",
    ]
    result = tiny_runs.run(*flags, f"--outdir={tmp_path / 'runs'}")
    assert result.exit_code == 0, result.output
    assert tiny_runs.only_run(tmp_path / "runs").name.endswith("solid-lambda10")
