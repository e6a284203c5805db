"""Camera samplers against EG3D's values (misc.npz), and the geometry they must obey."""

import math
import re

import numpy as np
import pytest
import torch

from tests.compat.reference import ROOT, Draws, arrays, of_set, read_json
from training.rendering import cameras

RECIPE = read_json(ROOT / "eg3d" / "misc.json")
# of the stochastic cases: draw k is RandomState(DRAW_BASE + k)
DRAW_BASE = RECIPE.get("camera_draw_base", 500)


@pytest.fixture(scope="module")
def misc(fixtures_dir):
    with arrays(fixtures_dir / "eg3d" / "misc.npz") as data:
        return {name: data[name] for name in data.files if name.startswith(("lookat", "gauss", "fov"))}


def test_look_at_poses_match_reference(misc):
    poses = [name.removesuffix("/c2w") for name in misc if re.fullmatch("lookat/.*/c2w", name)]
    if not poses:
        pytest.skip("this set has no lookat/.../c2w")
    for pose in poses:
        h, v, r = misc[f"{pose}/hvr"]
        got = cameras.LookAtPoseSampler.sample(h, v, torch.from_numpy(misc[f"{pose}/pivot"]), radius=r)[0]
        np.testing.assert_allclose(got.numpy(), misc[f"{pose}/c2w"], atol=1e-6)


def test_gaussian_without_deviation(misc):
    (wanted,) = of_set(misc, "gauss_nostd/c2w")
    h, v, radius = RECIPE.get("gauss_nostd_hvr", [1.2, 1.7, 2])
    got = cameras.LookAtPoseSampler.sample(h, v, (0, 0, 0), radius=radius)
    np.testing.assert_allclose(got.numpy(), wanted, atol=1e-6)


def test_yaw_is_drawn_then_pitch(misc):
    (wanted,) = of_set(misc, "gauss_std/c2w")
    h, v, radius = RECIPE.get("gauss_std_hvr", [math.pi / 2, math.pi / 2, 2.7])
    deviations = RECIPE.get("gauss_std_deviations", [0.3, 0.15])
    with Draws(DRAW_BASE).injected():
        got = cameras.LookAtPoseSampler.sample(
            h, v, (0, 0, 0), *deviations, radius=radius, batch_size=len(wanted)
        )
    np.testing.assert_allclose(got.numpy(), wanted, atol=1e-6)


def test_fov_to_focal(misc):
    (angles,) = of_set(misc, "fov")
    for fov, focal in angles:
        k = cameras.FOV_to_intrinsics(fov)
        assert k.shape == (3, 3) and k[0, 2] == k[1, 2] == 0.5
        np.testing.assert_allclose([k[0, 0], k[1, 1]], focal, rtol=1e-6)


def test_poses_are_rotations_and_look_at_the_pivot():
    pivot = torch.tensor([0.1, -0.05, 0.2])
    poses = cameras.LookAtPoseSampler.sample(1.3, 1.8, pivot, 0.5, 0.3, radius=2.7, batch_size=7)
    r = poses[:, :3, :3]
    torch.testing.assert_close(r.mT @ r, torch.eye(3).expand(7, 3, 3), atol=1e-6, rtol=0)
    torch.testing.assert_close(torch.linalg.det(r), torch.ones(7))
    seen = torch.einsum("nij,nj->ni", r.mT, pivot - poses[:, :3, 3])
    torch.testing.assert_close(seen[:, :2], torch.zeros(7, 2), atol=1e-6, rtol=0)
    assert (seen[:, 2] > 0).all()


def test_label_round_trip_and_mirror():
    poses = cameras.LookAtPoseSampler.sample(
        math.pi / 2, math.pi / 2, (0, 0, 0), 0.5, 0.2, radius=2.7, batch_size=4
    )
    c = cameras.pack_label(poses, cameras.intrinsics_matrix(cameras.FFHQ_FOCAL))
    assert c.shape == (4, 25)
    back, k = cameras.unpack_label(c)
    assert torch.equal(back, poses) and torch.equal(k[0], cameras.intrinsics_matrix(cameras.FFHQ_FOCAL))
    mirrored = cameras.mirror_label(c)
    assert torch.equal(cameras.mirror_label(mirrored), c)
    left = cameras.LookAtPoseSampler.sample(math.pi / 2 - 0.4, 1.5, torch.zeros(3), radius=2.7)
    right = cameras.LookAtPoseSampler.sample(math.pi / 2 + 0.4, 1.5, torch.zeros(3), radius=2.7)
    torch.testing.assert_close(cameras.mirror_pose(left), right, atol=1e-6, rtol=0)
