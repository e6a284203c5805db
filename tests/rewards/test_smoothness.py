"""Smoothness reward: spheres have the theoretical curvature, and bumps lower the score."""

import pytest
import torch

from eg3d_rlhf.core.field import Bounds
from eg3d_rlhf.core.spec import SlabSpec
from eg3d_rlhf.rewards.presets import preset
from eg3d_rlhf.rewards.reward import Reward, load_reward
from eg3d_rlhf.rewards.smoothness import IdentityReward, Smoothness, roughness
from tests.rejections import raising

CUBE = SlabSpec.cube(48)


def distance() -> torch.Tensor:
    return CUBE.points().norm(dim=-1)


@pytest.mark.parametrize("radius", [0.1, 0.2, 0.3])
def test_roughness_of_a_sphere_is_its_squared_curvature(radius):
    squared_curvature = roughness(10 + (radius - distance())[None] * 600, 10.0, 1 / 47)
    assert squared_curvature.item() == pytest.approx(2 / radius**2, rel=0.08)


class Bumpy:
    """A sphere with waves of a given height, and one without."""

    bounds = Bounds()
    level = 10.0

    def __init__(self, height: torch.Tensor):
        self.height = height

    def density_grid(self, grid):
        places = grid.points()
        waves = torch.cos(40 * places).prod(dim=-1)
        return torch.stack(
            [
                10 + (0.25 - places.norm(dim=-1) + height * waves) * 600
                for height in (self.height, 0 * self.height)
            ]
        )


def test_bumps_lower_the_score_and_have_a_gradient(tmp_path):
    reward = load_reward(Reward(Smoothness(CUBE), IdentityReward()).save(tmp_path / "smooth.safetensors"))
    height = torch.tensor(0.01, requires_grad=True)
    rough, smooth = reward.score(Bumpy(height))
    assert rough < smooth - 0.5
    rough.backward()
    assert height.grad is not None and height.grad < 0
    assert torch.isfinite(reward.score(Bumpy(torch.tensor(0.0)))).all() and reward.observation == Smoothness(
        CUBE
    )
    with raising("smoothness"):
        preset(kind="smoothness")  # needs no training
