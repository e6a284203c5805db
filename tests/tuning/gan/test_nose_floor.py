"""The nose limit: the window's camera, its loss in closed form and in the reward phase; what the depth
reward's defaults are.
"""

import pytest
import torch

from eg3d_rlhf.core.seeds import STANDARDISATION
from eg3d_rlhf.generators import as_generator, ws_of_seeds
from eg3d_rlhf.modes.gan import resolve
from eg3d_rlhf.rewards.depth import Depth, SmallDepth
from eg3d_rlhf.rewards.reward import Reward
from eg3d_rlhf.tuning.gan import phase
from eg3d_rlhf.tuning.gan.phase import RewardConfig, RewardTerms
from tests import tiny_runs
from training.rendering.cameras import RaySampler

SIZE = 16


def test_the_loss_in_closed_form():
    depth = torch.full((2, 4, 5), 3.0)
    depth[0, 0, :2] = torch.tensor([2.0, 2.5])
    depth.requires_grad_()
    assert phase.floor_loss(depth, 2.75).tolist() == pytest.approx([(0.75 + 0.25) / 20, 0.0])
    assert phase.floor_loss(depth, 2.75, only_violators=True).tolist() == pytest.approx([0.5, 0.0])
    phase.floor_loss(depth, 2.75).sum().backward()
    assert (
        depth.grad[0, 0].tolist() == pytest.approx([-0.05, -0.05, 0, 0, 0]) and depth.grad[1].abs().sum() == 0
    )


@pytest.fixture(scope="module")
def parts(tiny_data, tiny_networks):
    return tiny_runs.networks.load(tiny_networks), tiny_runs.batch(tiny_data)


def test_the_window_is_a_part_of_the_published_map(parts):
    generator = as_generator(parts[0].G_ema)

    def rays(label, resolution):
        origins, directions = RaySampler()(
            label[:, :16].reshape(-1, 4, 4), label[:, 16:].reshape(-1, 3, 3), resolution
        )
        return origins[0, 0], directions[0].unflatten(0, (resolution, resolution))

    origin, window = rays(phase.window_camera(generator), phase.WINDOW_SIDE)
    full_origin, full_directions = rays(generator.cameras.label(), phase.DEPTH_MAP_SIDE)
    torch.testing.assert_close(origin, full_origin)
    torch.testing.assert_close(window, full_directions[53:73, 53:73], rtol=0, atol=1e-6)


def terms_of(parts, **config) -> RewardTerms:
    generator = as_generator(parts[0].G_ema)
    torch.manual_seed(0)
    reward = Reward(Depth.from_generator(generator, resolution=SIZE), SmallDepth(views=1, resolution=SIZE))
    return RewardTerms(
        parts[0].G,
        parts[0].G_ema,
        reward,
        RewardConfig(lambda_r=1.0, lambda_sigma=0.0, consistency_resolution=8, **config),
    )


def test_the_floor_is_the_nearest_of_untuned_faces_and_enters_the_loss(parts):
    terms = terms_of(parts, lambda_nose=2.0, reward_shaping="standardised")
    baseline = terms_of(parts, reward_shaping="standardised")
    assert (
        terms.initial_scores.shape == (STANDARDISATION.count,) == (200,) and baseline.state.nose_floor is None
    )
    floor = terms.state.nose_floor
    generator = terms.reference
    inside = floor(generator.field(ws_of_seeds(generator, [500_001], phase.NOSE_PSI)))
    assert inside.tolist() == [0.0], "one of those that it was made of"
    floor.floor += 0.2
    parts[0].G.requires_grad_(True)  # as the loop does
    (loss,) = terms.losses(parts[1])
    (without,) = baseline.losses(parts[1])
    assert loss.stats["RLHF/nose"].min() > 0 and "RLHF/nose" not in without.stats
    torch.testing.assert_close(loss.value, without.value + 2 * loss.stats["RLHF/nose"])
    loss.value.mean().backward()
    assert all(p.grad is None for p in floor.parameters()) and any(
        p.grad is not None for p in parts[0].G.parameters()
    )
    assert (
        "nose_floor.floor" in terms.state.state_dict()
        and "nose_floor.floor" not in baseline.state.state_dict()
    )


def test_the_defaults_of_a_depth_reward_are_the_published_ones():
    terms = resolve({"reward": "depth", "reward_ckpt": "depth.safetensors"}).reward.terms
    assert (terms.lambda_r, terms.lambda_sigma, terms.lambda_nose) == (1, 0, 1)
    assert (terms.reward_shaping, terms.reward_clip) == ("standardised", "-10,10")
    assert (
        resolve(
            {"reward": "depth", "reward_ckpt": "d.safetensors", "lambda_nose": 0.0, "lambda_r": 3.0}
        ).reward.terms.lambda_r
        == 3
    )
    assert resolve({"reward": "sigma"}).reward.terms.lambda_nose == 0
