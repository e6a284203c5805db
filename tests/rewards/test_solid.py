"""`--reward=solid` on fields: what it sees, what it pushes, what it leaves alone, and who refuses it."""

import numpy as np
import pytest
import torch

from eg3d_rlhf.core.field import Bounds
from eg3d_rlhf.core.spec import SlabSpec
from eg3d_rlhf.rewards.reward import Reward, load_reward, untaught
from eg3d_rlhf.rewards.solid import Solid, Soundness, occupancy
from tests import tiny_runs
from tests.rejections import raising, rejected


class Shells:
    """Hollow spheres with a hole of these radii, in world units; 0: none."""

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


def test_it_pushes_leaks_and_floaters_and_nothing_else(tmp_path):
    reward = load_reward(
        Reward(Solid(), untaught("solid", Shells(0.0)).network).save(tmp_path / "solid.safetensors")
    )
    sound = Shells(0.0)
    leaky = Shells(0.05)
    assert reward.observation == Solid() and reward.score(sound).item() == 0
    score = reward.score(leaky)
    score.sum().backward()
    assert score.item() < 0 and leaky.grown.grad > 0, "more density closes the hole"
    floating = Shells(0.0, floater=0.06)
    reward.score(floating).sum().backward()
    assert floating.grown.grad < 0, "less makes the floater go"


def test_mesh_validity_chooses_and_has_no_gradient():
    generator = Shells(0.0)
    reward = untaught("mesh-validity", generator)
    scores = reward.score(Shells(0.0, 0.05, 0.0))
    assert not scores.requires_grad and scores[0] == scores[2] and 0 < scores[1] <= scores[0] < 1
    assert (
        Soundness.from_dict({k: v for k, v in reward.observation.to_dict().items() if k != "kind"})
        == reward.observation
    )
    (grid,) = occupancy(Shells(0.0), SlabSpec.cube(32))
    assert grid.shape == (32, 32, 32) and 0 < grid.mean() < 0.2


def test_an_empty_shape_gets_nothing_and_one_that_is_not_finite_is_refused():
    empty = Shells(0.0)
    empty.level = 1e4
    assert (
        untaught("mesh-validity", Shells(0.0)).score(empty).item() == 0
        and untaught("solid", Shells(0.0)).score(empty).item() == 0
    )
    with torch.no_grad():
        empty.grown.fill_(np.nan)
    with raising("finite"):
        untaught("solid", Shells(0.0)).score(empty)


def test_kinds_that_learn_need_a_file_and_what_only_chooses_tunes_nothing(tmp_path):
    with raising("sigma"):
        untaught("sigma", Shells(0.0))
    result = tiny_runs.run(
        "--reward=mesh-validity", f"--outdir={tmp_path}", "--data=synthetic:people64@n=8", "--device=cpu"
    )
    rejected(result, "--reward=mesh-validity", "gradient")


@pytest.mark.long
def test_it_tunes_without_a_file_and_without_labels(tmp_path):
    data = tiny_runs.write_dataset(tmp_path / "data.zip", resolution=64)
    flags = [
        "--reward=solid",
        "--lambda-r=10",
        f"--data={data}",
        "--kimg=0.008",
        "--tick=0.008",
        "--no-summary",
        "--device=cpu",
    ]
    result = tiny_runs.run(*flags, f"--outdir={tmp_path / 'runs'}")
    assert result.exit_code == 0, result.output
    assert tiny_runs.only_run(tmp_path / "runs").name.endswith("solid-lambda10")
