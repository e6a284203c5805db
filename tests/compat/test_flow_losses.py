"""Paths, flow-matching losses, preference losses and sampler trajectories against values recorded from
TRELLIS and DSO.

The networks are elsewhere: here their recorded velocities and errors go in.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch

from eg3d_rlhf.models.sparse import SparseBatch, feats_of, spread, with_feats
from eg3d_rlhf.tuning.flow.base.sampling import sample, trajectory
from eg3d_rlhf.tuning.flow.base.stage import DenseGrid, FlowPath, FlowStage, Sampling, SparseVoxels
from eg3d_rlhf.tuning.flow.training.dpo import PairErrors, pair_loss
from eg3d_rlhf.tuning.flow.training.settings import DpoConfig
from tests.compat.absent import some
from tests.compat.reference import array_names
from tests.compat.trellis_reference import (
    FOLDER,
    each,
    prefix,
    read,
    sampling_of,
    trajectories,
)

PATH = FlowPath(sigma_min=1e-5)


@pytest.fixture
def path(request):
    return request.param


@pytest.fixture
def r(path) -> dict[str, torch.Tensor]:
    return read(path)


@each("fm_x0", "fm_t", "fm_noise", "fm_x_t", "fm_target", without="coords")
def test_path_and_target(r):
    torch.testing.assert_close(
        PATH.mix(r["fm_x0"], r["fm_t"], r["fm_noise"]), r["fm_x_t"], rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(PATH.velocity(r["fm_x0"], r["fm_noise"]), r["fm_target"], rtol=1e-5, atol=1e-6)


PREFERRED = [
    pytest.param(path, key, id=f"{path.stem}-{key}")
    for path in sorted(FOLDER.glob("*.npz"))
    for key in array_names(path)
    if key.startswith("dso_dpo_beta")
]


@pytest.mark.parametrize(
    ("path", "key"),
    some(PREFERRED, "this set has no dso_dpo_beta... in trellis", width=2),
    indirect=["path"],
)
def test_dso_preference_loss(r, key):
    """DSO halves its beta inside the loss; ours multiplies the margin as it is."""
    errors = PairErrors.split(r["dpo_mse_theta"], r["dpo_mse_ref"])
    config = DpoConfig(beta=0.5 * float(key.removeprefix("dso_dpo_beta")))
    torch.testing.assert_close(pair_loss(errors, config).mean(), r[key].reshape([]), rtol=1e-5, atol=1e-6)


@each("dpo_mse_theta", "dso_sft", "dso_dro")
@pytest.mark.parametrize("kind", ["sft", "dro"])
def test_dso_losses_without_a_reference(r, kind):
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
    side = int(noise.coords[:, 1:].max()) + 1 if sparse else feats_of(noise).shape[-1]
    kind = (SparseVoxels if sparse else DenseGrid)(channels=channels, resolution=side)
    return FlowStage(name="recorded", model=model, latents=kind, path=PATH, sampling=sampling)


def follow(stage: FlowStage, noise, cond, empty, x_t, x_0) -> None:
    got = list(trajectory(stage, noise, cond, empty))
    for (x, estimate), expected_x, expected_0 in zip(got, x_t, x_0, strict=True):
        torch.testing.assert_close(feats_of(x), expected_x, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(feats_of(estimate), expected_0, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("path", "name"), trajectories(), indirect=["path"])
def test_trajectories(r, name):
    """Follow the recorded trajectories of both stages."""
    at = prefix(name)
    x_t = r[f"{at}x_t"]
    x_0 = r[f"{at}x_0"]
    noise = r["smp_noise"]
    if "coords" in r:
        coords = r["coords"].int().contiguous()
        noise = SparseBatch(coords, noise, int(coords[:, 0].max()) + 1)
    sampling = sampling_of(r, name)
    cond = r.get("smp_cond", r["cond"])
    # the replay holds for any guidance; that of the second kind begins after the first step
    for guided in (sampling, replace(sampling, cfg_strength=3.0, cfg_interval=(0.5, 0.95))):
        stage = replay(noise, x_t, x_0, guided, r["smp_neg"])
        follow(stage, noise, cond, r["smp_neg"], x_t, x_0)
    if f"{at}out" in r:
        end = sample(stage, noise, cond, r["smp_neg"])
        torch.testing.assert_close(end, r[f"{at}out"], rtol=1e-5, atol=1e-5)


@each("coords", "fm_x0", "fm_t", "fm_noise")
def test_times_spread_over_voxels(r):
    coords = r["coords"].int().contiguous()
    x_0 = SparseBatch(coords, r["fm_x0"], int(coords[:, 0].max()) + 1)
    x_t = PATH.mix(x_0, r["fm_t"], x_0.with_feats(r["fm_noise"]))
    expected = (1 - r["fm_t"][coords[:, 0].long()])[:, None] * r["fm_x0"]
    expected = expected + (1e-5 + (1 - 1e-5) * spread(r["fm_t"], x_0)) * r["fm_noise"]
    torch.testing.assert_close(x_t.feats, expected)
