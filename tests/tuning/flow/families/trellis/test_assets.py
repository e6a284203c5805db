"""Gaussians: their files, the voxels that they fill, and their renders against closed forms."""

import math

import torch

from eg3d_rlhf.geometry.splat_rendering import View, render, views_around
from eg3d_rlhf.tuning.flow.families.trellis_assets import (
    SH_C0,
    SplatAsset,
    find_best_share,
    find_filled_voxels,
    read_ply,
    voxel_features,
    write_ply,
)
from tests.rejections import raising


def splats(means, colours=None, scales=0.02, opacities=0.5) -> SplatAsset:
    means = torch.tensor(means).float().view(-1, 3)
    n = len(means)
    colours = torch.ones(n, 3) if colours is None else torch.tensor(colours).float()
    return SplatAsset(
        means=means,
        features_dc=(colours - 0.5) / SH_C0,
        scales=torch.as_tensor(scales).float().expand(n, 3),
        rotations=torch.tensor([1.0, 0, 0, 0]).expand(n, 4),
        opacities=torch.as_tensor(opacities).float().expand(n),
    )


def front(focal=1.0) -> View:
    """Return a camera two units in front of the origin, looking along +z."""
    return View(torch.eye(3), torch.tensor([0.0, 0.0, -2.0]), focal)


def test_ply_round_trip(tmp_path):
    generator = torch.Generator().manual_seed(0)
    asset = SplatAsset(
        means=torch.randn(7, 3, generator=generator),
        features_dc=torch.randn(7, 3, generator=generator),
        scales=torch.rand(7, 3, generator=generator) + 0.01,
        opacities=torch.rand(7, generator=generator) * 0.9 + 0.05,
        rotations=torch.nn.functional.normalize(torch.randn(7, 4, generator=generator), dim=1),
    )
    write_ply(tmp_path / "a.ply", asset)
    got = read_ply(tmp_path / "a.ply")
    for name, tensor in vars(asset).items():
        assert torch.allclose(getattr(got, name), tensor, atol=1e-5), name


def test_unsuitable_ply_files_are_rejected(tmp_path):
    with raising(str(tmp_path / "a.ply"), kind=FileNotFoundError):
        read_ply(tmp_path / "a.ply")
    write_ply(tmp_path / "a.ply", splats([[0, 0, 0]]))
    intact = (tmp_path / "a.ply").read_bytes()
    for damaged in (
        intact[:-4],
        intact.replace(b"f_dc_0", b"red___"),
        b"solid",
        intact.replace(b"binary_little_endian", b"ascii"),
    ):
        (tmp_path / "a.ply").write_bytes(damaged)
        with raising("a.ply"):
            read_ply(tmp_path / "a.ply")


def test_voxels_that_are_filled():
    def at(x, y, z):  # centres of voxels
        return [(v + 0.5) / 8 - 0.5 for v in (x, y, z)]

    asset = splats(
        [at(1, 2, 3), at(1, 2, 3), at(0, 7, 4), at(5, 5, 5), [0.6, 0, 0]],
        opacities=torch.tensor([0.6, 0.6, 0.9, 0.1, 1.0]),
    )
    assert find_filled_voxels(asset, 8).tolist() == [[0, 7, 4], [1, 2, 3]]  # mean opacity 2.2 / 3
    assert find_filled_voxels(asset, 8, share=0.1).tolist() == [[0, 7, 4], [1, 2, 3], [5, 5, 5]]
    with raising("voxels", "-0.5..0.5"):
        find_filled_voxels(splats([[0.6, 0, 0]]), 8)


def test_an_image_of_one_gaussian_is_its_closed_form():
    size = 28
    focal = 2.0
    scale = 0.05
    opacity = 0.7
    image = render(splats([[0.1, -0.05, 0.0]], [[1.0, 0.5, 0.25]], scale, opacity), front(focal), size)
    f = focal * size
    jacobian = torch.tensor([[f / 2, 0, -f * 0.1 / 4], [0, f / 2, f * 0.05 / 4]])
    sharp = scale**2 * jacobian @ jacobian.T
    covariance = sharp + 0.1 * torch.eye(2)
    y, x = torch.meshgrid(torch.arange(size) + 0.5, torch.arange(size) + 0.5, indexing="ij")
    d = torch.stack([x - (size / 2 + f * 0.05), y - (size / 2 - f * 0.025)], -1)
    alpha = (
        opacity
        * (sharp.det() / covariance.det()).sqrt()
        * torch.exp(-0.5 * torch.einsum("hwi,ij,hwj->hw", d, covariance.inverse(), d))
    )
    near = d.norm(dim=-1) < 4  # pixels; further out the renderer cuts it off
    for channel, value in zip(image, (1.0, 0.5, 0.25), strict=True):
        assert torch.allclose(channel[near], value * alpha[near], atol=1e-4)
    assert float(image.max()) > 0.6


def test_gaussians_in_front_hide_those_at_larger_depth():
    both = splats([[0, 0, 0.2], [0, 0, -0.2]], [[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]], 0.2, 0.99)
    image = render(both, front(), 15)
    assert float(image[0, 7, 7]) > 0.9 and float(image[1, 7, 7]) < 0.05
    assert not render(splats([[0, 0, -3.0]]), front(), 14).any()  # behind the camera


def test_cameras_look_at_the_centre_from_all_sides_upright():
    views = views_around(50)
    positions = torch.stack([v.position for v in views])
    assert (
        torch.allclose(positions.norm(dim=1), torch.full((50,), 2.0))
        and float(positions.mean(0).norm()) < 0.1
    )
    for view in views:
        assert torch.allclose(view.rotation @ view.rotation.T, torch.eye(3), atol=1e-5)
        assert math.isclose(float(view.rotation.det()), 1, abs_tol=1e-5)
        assert torch.allclose(view.project(torch.zeros(1, 3)), torch.full((1, 2), 0.5), atol=1e-5)
        centre, above = view.project(torch.tensor([[0.0, 0, 0], [0, 0, 0.1]]))
        assert float(above[1]) < float(centre[1])


def test_features_of_a_voxel_are_those_of_its_place_on_the_images():
    class Rows:
        """Encoder whose features are the row and the column of a patch."""

        size = 518

        def patches(self, images):
            assert images.shape == (1, 3, 518, 518)
            grid = torch.arange(37.0)
            return torch.stack(torch.meshgrid(grid, grid, indexing="ij"))[None]

    places = torch.tensor([[4, 4, 4], [4, 4, 6]]).int()
    computed = voxel_features(splats([[0.0, 0, 0]], scales=0.001), places, Rows(), resolution=9, view_count=4)
    assert torch.allclose(computed[0], torch.tensor([18.0, 18.0]), atol=1e-3)  # the middle of 37
    assert float(computed[1, 0]) < 17  # higher up: smaller rows


def test_the_share_is_that_at_which_assets_fill_the_voxels_they_were_made_on():
    """The voxels of the asset have ten times the opacity of voxels with stray Gaussians."""
    g = torch.Generator().manual_seed(2)
    assets = []
    voxels = []
    for _ in range(3):
        places = torch.randperm(8**3, generator=g)[:60]
        source, strays = (torch.stack([p // 64, p // 8 % 8, p % 8], 1) for p in (places[:40], places[40:]))
        means = (torch.cat([source, strays]) + 0.5) / 8 - 0.5
        opacities = torch.cat([torch.full([40], 0.9), torch.full([20], 0.09)])
        assets.append(splats(means.tolist(), opacities=opacities))
        voxels.append(source)
    best = find_best_share(assets, voxels, 8)
    assert best["iou"] == 1.0 and 0.09 / 0.63 < best["share"] < 0.9 / 0.63
    for asset, source in zip(assets, voxels, strict=True):
        assert sorted(find_filled_voxels(asset, 8, best["share"]).tolist()) == sorted(source.tolist())
