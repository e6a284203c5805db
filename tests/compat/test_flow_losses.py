"""Paths, flow-matching losses, preference losses and sampler trajectories against values recorded from
TRELLIS and DSO.

The networks are elsewhere: here their recorded velocities and errors go in.
"""

import numpy as np
import pytest
import torch

from eg3d_rlhf.models.sparse import SparseBatch, feats_of, spread, with_feats
from eg3d_rlhf.tuning.flow.dpo import DpoConfig, PairErrors, pair_loss
from eg3d_rlhf.tuning.flow.generate import sample, trajectory
from eg3d_rlhf.tuning.flow.stage import DenseGrid, FlowPath, FlowStage, Sampling, SparseVoxels

STRUCTURE = pytest.mark.parametrize("name", ["ss_flow_p1", "ss_flow_p2"])
PATH = FlowPath(sigma_min=1e-5)
SAMPLERS = {  # as they were recorded
    "euler": {"cfg_strength": 0.0, "rescale_t": 1.0},
    "cfg": {"cfg_strength": 5.0, "cfg_interval": (0.0, 1.0), "rescale_t": 3.0},
    "interval": {"cfg_strength": 7.5, "cfg_interval": (0.5, 0.95), "rescale_t": 3.0},
}


@pytest.fixture
def recorded(fixtures_dir):
    def load(name: str) -> dict[str, torch.Tensor]:
        with np.load(fixtures_dir / "trellis" / f"{name}.npz") as data:
            keys = [k for k in data.files if not k.startswith(("sd/", "ref/")) and k != "config_json"]
            return {k: torch.as_tensor(data[k]) for k in keys}

    return load


@STRUCTURE
def test_path_and_target(recorded, name):
    r = recorded(name)
    torch.testing.assert_close(
        PATH.mix(r["fm_x0"], r["fm_t"], r["fm_noise"]), r["fm_x_t"], rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(PATH.velocity(r["fm_x0"], r["fm_noise"]), r["fm_target"], rtol=1e-5, atol=1e-6)


@STRUCTURE
@pytest.mark.parametrize("beta", [1, 500])
def test_dso_preference_loss(recorded, name, beta):
    """DSO halves its beta inside the loss; ours multiplies the margin as it is."""
    r = recorded(name)
    errors = PairErrors.split(r["dpo_mse_theta"], r["dpo_mse_ref"])
    config = DpoConfig(beta=0.5 * beta)
    torch.testing.assert_close(
        pair_loss(errors, config).mean(), r[f"dso_dpo_beta{beta}"].reshape([]), rtol=1e-5, atol=1e-6
    )


@STRUCTURE
@pytest.mark.parametrize("kind", ["sft", "dro"])
def test_dso_losses_without_a_reference(recorded, name, kind):
    r = recorded(name)
    config = DpoConfig(kind=kind)
    loss = pair_loss(PairErrors.split(r["dpo_mse_theta"]), config).mean()
    torch.testing.assert_close(loss, r[f"dso_{kind}"].reshape([]), rtol=1e-5, atol=1e-6)


class Replay(torch.nn.Module):
    """Answers with recorded velocities at their times; with guidance on, split so that only the right mixture
    gives them back.
    """

    def __init__(
        self, points: list[float], velocities: list[torch.Tensor], sampling: Sampling, empty: torch.Tensor
    ):
        super().__init__()
        self.points = points
        self.velocities = velocities
        self.sampling = sampling
        self.empty = empty

    def forward(self, x_t, t, cond):
        assert (t == t[0]).all()
        step = int(np.argmin(np.abs(np.array(self.points[:-1]) - float(t[0]))))
        assert self.points[step] == pytest.approx(float(t[0]), abs=1e-6)
        v = self.velocities[step]
        w = self.sampling.cfg_strength
        low, high = self.sampling.cfg_interval
        guided = w > 0 and low <= self.points[step] <= high
        unguided = torch.equal(cond, self.empty.expand_as(cond))
        assert guided or not unguided
        if guided:  # (1 + w)(v + w d) - w (v + (1 + w) d) = v
            v = v + (0.1 * (1 + w) if unguided else 0.1 * w)
        return with_feats(x_t, v)


def replay(noise, x_t: torch.Tensor, x_0: torch.Tensor, sampling: Sampling, empty: torch.Tensor) -> FlowStage:
    """A stage whose model knows a recorded run: x_0 = (1 - s) x - (s + (1 - s) t) v at each step, solved for
    v.
    """
    r = sampling.rescale_t
    s = PATH.sigma_min
    points = [r * t / (1 + (r - 1) * t) for t in np.linspace(1, 0, sampling.steps + 1)]
    before = [feats_of(noise), *x_t[:-1]]
    velocities = [
        ((1 - s) * x - e) / (s + (1 - s) * t) for x, e, t in zip(before, x_0, points[:-1], strict=True)
    ]
    model = Replay(points, velocities, sampling, empty)
    sparse = isinstance(noise, SparseBatch)
    channels = feats_of(noise).shape[1]
    kind = (SparseVoxels if sparse else DenseGrid)(channels=channels, resolution=64)
    return FlowStage(name="recorded", model=model, latents=kind, path=PATH, sampling=sampling)


def follow(stage: FlowStage, noise, cond, empty, x_t, x_0) -> None:
    got = list(trajectory(stage, noise, cond, empty))
    for (x, estimate), expected_x, expected_0 in zip(got, x_t, x_0, strict=True):
        torch.testing.assert_close(feats_of(x), expected_x, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(feats_of(estimate), expected_0, rtol=1e-5, atol=1e-5)


@STRUCTURE
@pytest.mark.parametrize("kind", SAMPLERS)
def test_trajectories_of_the_first_stage(recorded, name, kind):
    r = recorded(name)
    x_t = r[f"smp_{kind}_x_t"]
    x_0 = r[f"smp_{kind}_x_0"]
    sampling = Sampling(steps=len(x_t), **SAMPLERS[kind])
    stage = replay(r["smp_noise"], x_t, x_0, sampling, r["smp_neg"])
    follow(stage, r["smp_noise"], r["smp_cond"], r["smp_neg"], x_t, x_0)
    end = sample(stage, r["smp_noise"], r["smp_cond"], r["smp_neg"])
    torch.testing.assert_close(end, r[f"smp_{kind}_out"], rtol=1e-5, atol=1e-5)


def test_trajectory_of_the_second_stage(recorded):
    r = recorded("slat_flow")
    coords = r["coords"].int().contiguous()
    noise = SparseBatch(coords, r["smp_noise"], int(coords[:, 0].max()) + 1)
    sampling = Sampling(steps=len(r["smp_x_t"]), cfg_strength=3.0, cfg_interval=(0.5, 0.95), rescale_t=3.0)
    stage = replay(noise, r["smp_x_t"], r["smp_x_0"], sampling, r["smp_neg"])
    follow(stage, noise, r["cond"], r["smp_neg"], r["smp_x_t"], r["smp_x_0"])


def test_times_spread_over_voxels(recorded):
    r = recorded("slat_flow")
    coords = r["coords"].int().contiguous()
    x_0 = SparseBatch(coords, r["fm_x0"], int(coords[:, 0].max()) + 1)
    x_t = PATH.mix(x_0, r["fm_t"], x_0.with_feats(r["fm_noise"]))
    expected = (1 - r["fm_t"][coords[:, 0].long()])[:, None] * r["fm_x0"]
    expected = expected + (1e-5 + (1 - 1e-5) * spread(r["fm_t"], x_0)) * r["fm_noise"]
    torch.testing.assert_close(x_t.feats, expected)
