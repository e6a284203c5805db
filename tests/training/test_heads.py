"""The procedural heads: geometry, renderer, and the dataset written from them."""

import math
import zipfile
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from training.dataset import ImageFolderDataset
from training.heads.family import APPEARANCE_COUNT, APPEARANCE_NAMES, SHAPE_COUNT, draw_parameters
from training.heads.render import pixel_rays, render_heads
from training.heads.sdf import head_parts, head_sdf
from training.rendering.cameras import FFHQ_FOCAL, camera_position, intrinsics_matrix, look_at, mirror_pose
from training.synthetic_heads import HeadsOptions, head_parameters, load_truth, parse_name, resolve_dataset, write_heads


@pytest.fixture(scope="module")
def heads():
    """Four drawn heads seen from different sides: shape, appearance, poses, intrinsics."""
    drawn = [draw_parameters(np.random.default_rng([11, i])) for i in range(4)]
    shape, appearance = (torch.from_numpy(np.stack(column)) for column in zip(*drawn, strict=True))
    yaw = math.pi / 2 + torch.tensor([[-0.6], [-0.1], [0.3], [0.9]])
    poses = look_at(camera_position(yaw, math.pi / 2 + 0.3 * (yaw - 1.4), 2.7), torch.zeros(3))
    return shape, appearance, poses, intrinsics_matrix(FFHQ_FOCAL).expand(4, 3, 3)


def _extremes():
    eye = torch.eye(SHAPE_COUNT)
    return torch.cat([torch.zeros(1, SHAPE_COUNT), eye, -eye, torch.ones(1, SHAPE_COUNT), -torch.ones(1, SHAPE_COUNT)])


def test_fits_the_cube_with_a_sane_volume():
    axis = torch.linspace(-0.55, 0.55, 34)
    lattice = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), dim=-1).reshape(1, -1, 3)
    outside = lattice[0].abs().amax(dim=1) > 0.45
    for shape in _extremes():
        inside = head_sdf(lattice, shape[None])[0] < 0
        assert not (inside & outside).any()
        volume = float(inside.float().mean()) * 1.1**3
        assert 0.02 < volume < 0.10
    assert head_sdf(torch.zeros(1, 1, 3), torch.zeros(1, SHAPE_COUNT)) < -0.05


def test_parameters_move_the_parts_they_name():
    base = torch.zeros(1, SHAPE_COUNT)
    lattice = torch.rand(1, 4000, 3, generator=torch.Generator().manual_seed(0)) * 0.6 - 0.3
    reference = head_sdf(lattice, base)
    for k in range(SHAPE_COUNT):
        changed = base.clone()
        changed[0, k] = 1
        assert (head_sdf(lattice, changed) - reference).abs().max() > 5e-4, k


def test_heads_are_mirror_symmetric(heads):
    shape = heads[0]
    points = torch.rand(4, 500, 3, generator=torch.Generator().manual_seed(1)) - 0.5
    torch.testing.assert_close(head_sdf(points, shape), head_sdf(points * torch.tensor([-1.0, 1.0, 1.0]), shape), atol=1e-6, rtol=0)


def test_gradients_agree_with_differences():
    generator = torch.Generator().manual_seed(2)
    points = (torch.rand(2, 200, 3, generator=generator, dtype=torch.float64) - 0.5).requires_grad_()
    shape = (torch.rand(2, SHAPE_COUNT, generator=generator, dtype=torch.float64) - 0.5).requires_grad_()
    grads = torch.autograd.grad(head_sdf(points, shape).sum(), [points, shape])
    assert all(grad.isfinite().all() and (grad != 0).any() for grad in grads)
    for k in (0, 5, SHAPE_COUNT - 1):
        step = torch.zeros_like(shape)
        step[:, k] = 1e-6
        difference = (head_sdf(points, shape + step) - head_sdf(points, shape - step)).sum(dim=1) / 2e-6
        torch.testing.assert_close(grads[1][:, k], difference, rtol=1e-4, atol=1e-4)
    at_centres = torch.autograd.grad(head_sdf(torch.zeros(2, 1, 3, dtype=torch.float64), shape).sum(), shape)[0]
    assert at_centres.isfinite().all()


def test_depth_lies_on_the_surface(heads):
    image, depth = render_heads(*heads, 32)
    assert image.shape == (4, 3, 32, 32) and depth.shape == (4, 32, 32) and 0 <= image.min() and image.max() <= 1
    origins, directions = pixel_rays(heads[2], heads[3], 32)
    t = depth.flatten(1)
    hit = t.isfinite()
    assert (hit.float().mean(dim=1) > 0.25).all() and (hit.float().mean(dim=1) < 0.7).all()
    points = origins[:, None] + torch.where(hit, t, 0.0)[..., None] * directions
    distance = head_sdf(points, heads[0])[hit].abs()
    assert distance.max() < 4e-3 and distance.mean() < 5e-4
    for share in torch.linspace(0.7, 0.995, 12):  # nothing lies in front of the first hit
        before = head_sdf(origins[:, None] + torch.where(hit, t * share, 0.0)[..., None] * directions, heads[0])[hit]
        assert (before > -2e-3).all()


def test_colours_do_not_depend_on_the_view(heads):
    """A point keeps its colour when another camera looks at it: shading is fixed to the world."""
    shape, appearance, poses, k = (value[1:2] for value in heads)
    first, depth = render_heads(shape, appearance, poses, k, 33, supersample=1)
    target = poses[:, :3, 3] + depth[:, 16, 16, None] * poses[:, :3, 2]  # the surface point in the middle of the image
    moved = look_at(poses[:, :3, 3] + torch.tensor([[0.5, 0.3, 0.2]]), target)
    second = render_heads(shape, appearance, moved, k, 33, supersample=1)[0]
    torch.testing.assert_close(second[..., 16, 16], first[..., 16, 16], atol=0.01, rtol=0)


def test_mirrored_pose_gives_the_mirrored_image(heads):
    shape, appearance, poses, k = heads
    centred = appearance.clone()
    centred[:, APPEARANCE_NAMES.index("light_x")] = 0
    image, depth = render_heads(shape, centred, poses, k, 32)
    mirrored, mirrored_depth = render_heads(shape, centred, mirror_pose(poses), k, 32)
    both = depth.isfinite() & mirrored_depth.flip(-1).isfinite()
    assert (depth.isfinite() == mirrored_depth.flip(-1).isfinite()).float().mean() > 0.995
    assert (depth - mirrored_depth.flip(-1))[both].abs().quantile(0.99) < 1e-3
    assert (image - mirrored.flip(-1)).abs().mean() < 0.02


def test_result_does_not_depend_on_the_batch(heads):
    together = render_heads(*heads, 16)[1]
    alone = torch.cat([render_heads(*(value[i : i + 1] for value in heads), 16)[1] for i in range(4)])
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=0)


def test_flat_background(heads):
    image, depth = render_heads(*heads, 16, background="flat")
    corner = image[:, :, 0, 0]
    torch.testing.assert_close(corner, heads[1][:, -3:])
    with pytest.raises(ValueError, match="expected background to be one of"):
        render_heads(*heads, 16, background="sky")
    with pytest.raises(ValueError, match="render_heads: expected appearance"):
        render_heads(heads[0], heads[1][:2], *heads[2:], 16)
    with pytest.raises(ValueError, match=r"expected shape parameters \[N, 16\], got \[1, 3\]"):
        head_sdf(torch.zeros(1, 1, 3), torch.zeros(1, 3))
    with pytest.raises(ValueError, match=r"expected points \[N, P, 3\]"):
        head_parts(torch.zeros(1, 3), torch.zeros(1, SHAPE_COUNT))


def test_dataset_does_not_depend_on_the_process_count(tmp_path):
    options = HeadsOptions(resolution=16, n=35, seed=4)
    for processes in (1, 2):
        write_heads(options, tmp_path / f"{processes}" / "set.zip", processes, progress=False)
    for suffix in (".zip", ".npz"):
        one, two = ((tmp_path / p / "set").with_suffix(suffix).read_bytes() for p in "12")
        assert one == two
    assert sorted(p.name for p in (tmp_path / "1").iterdir()) == ["set.npz", "set.zip"]


def test_images_depend_on_seed_and_index_only():
    few, many = (head_parameters(HeadsOptions(n=n, seed=9), range(2, 5)) for n in (5, 500))
    assert all(np.array_equal(a, b) for a, b in zip(few, many, strict=True))
    other = head_parameters(HeadsOptions(seed=10), range(2, 5))
    assert not np.array_equal(few[0], other[0])
    shape, appearance, labels = few
    assert np.abs(shape).max() <= 1 and appearance.shape == (3, APPEARANCE_COUNT) and labels.shape == (3, 25)


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(zipfile.ZipFile, "writestr", Mock(side_effect=OSError(28, "No space left on device")))
    with pytest.raises(OSError, match=r"heads16-n1-\w+.zip: expected to write .*, got: No space left on device. Make room, or set EG3D_"):
        resolve_dataset("synthetic:heads16@n=1", tmp_path, processes=1, progress=False)
    assert not list(tmp_path.iterdir())


def test_resolve_writes_once_and_round_trips(tmp_path):
    name = "synthetic:heads16@n=5,seed=2,background=flat"
    path = resolve_dataset(name, tmp_path, processes=1, progress=False)
    stamp = path.stat().st_mtime_ns
    assert resolve_dataset(name, tmp_path) == path and path.stat().st_mtime_ns == stamp
    data, truth = ImageFolderDataset(path, resolution=16, c_dim=25), load_truth(path)
    np.testing.assert_array_equal(data.get_labels(), truth.labels)
    np.testing.assert_array_equal(head_parameters(parse_name(name), range(5))[0], truth.shape)
    assert truth.depth.shape == (5, 16, 16) and 2.2 < truth.depth[np.isfinite(truth.depth)].mean() < 2.8
    with zipfile.ZipFile(path) as archive:
        assert archive.namelist()[0] == "00000/img00000000.png" and archive.getinfo("dataset.json").compress_type == zipfile.ZIP_STORED
    assert resolve_dataset("some/folder") == type(path)("some/folder")
    path.with_suffix(".npz").unlink()
    with pytest.raises(ValueError, match="load_truth: expected .* beside the dataset, got none"):
        load_truth(path)


@pytest.mark.parametrize(
    "name, text",
    [
        ("synthetic:cats64", r"expected 'synthetic:heads<R>\[@key=value,...\]', got 'synthetic:cats64'"),
        ("synthetic:heads64@size=3", "expected one of the keys n, seed, background, yaw, pitch .* got 'size'"),
        ("synthetic:heads64@n=x", "expected n=<int> .* got 'x'"),
        ("synthetic:heads60", "resolution must be a multiple of 8 from 8 to 1024, got 60"),
        ("synthetic:heads64@n=0", "n must be >= 1 and seed >= 0"),
        ("synthetic:heads64@background=sky", "background must be one of white, flat"),
        ("synthetic:heads64@yaw=9", r"yaw must lie in \[0, 3.14\]"),
    ],
)
def test_name_errors(name, text):
    with pytest.raises(ValueError, match=text):
        parse_name(name)


def test_names_and_hashes_tell_sets_apart():
    assert parse_name("synthetic:heads64") == HeadsOptions()
    assert parse_name("synthetic:heads32@n=7,yaw=0.2@seed=3") == HeadsOptions(resolution=32, n=7, yaw=0.2, seed=3)
    assert HeadsOptions().stem() != HeadsOptions(seed=1).stem()
