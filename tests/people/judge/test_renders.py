"""Renders for a judge: cameras, shading of meshes, splats and fields, montages, and the cache."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from eg3d_rlhf.core.field import Bounds
from eg3d_rlhf.generators.assets.grids import Voxels
from eg3d_rlhf.geometry.files import ply
from eg3d_rlhf.geometry.files.triangles import scene_triangles
from eg3d_rlhf.people.judge.gold_pairs import DEGREES, KINDS, damaged_model, damaged_splats
from eg3d_rlhf.people.judge.renders import RenderCache, montages_of
from eg3d_rlhf.people.judge.rig import VIEW_NAMES, Rig
from eg3d_rlhf.people.judge.view_maps import (
    ColouredMesh,
    field_maps,
    images_of,
    is_pale,
    mesh_maps,
    model_maps,
    splat_maps,
)
from eg3d_rlhf.people.label.assets.reading import read_asset
from eg3d_rlhf.tuning.flow.families.trellis_assets import SH_C0, SplatAsset, write_ply
from tests.people.judge.assets import SMALL, ball, write_ball
from tests.rejections import raising

FRONT, RIGHT, BACK, LEFT, ABOVE = (
    VIEW_NAMES.index(n) for n in ("front", "right 90", "back 180", "left 270", "above")
)


def splat_file(path, up="y"):
    """Splats on an ellipsoid whose colour tells the side: red at +z (front), green at +x, blue at +y."""
    generator = torch.Generator().manual_seed(0)
    points = torch.nn.functional.normalize(torch.randn(1500, 3, generator=generator), dim=1)
    colours = (points[:, [2, 0, 1]] * 0.5 + 0.5).clamp(0.02, 0.98)
    means = points * torch.tensor([0.3, 0.45, 0.25])
    if up == "z":
        # the inverse of (x, y, z) -> (x, z, -y)
        means = means[:, [0, 2, 1]] * torch.tensor([1.0, -1.0, 1.0])
    write_ply(
        path,
        SplatAsset(
            means=means,
            features_dc=(colours - 0.5) / SH_C0,
            scales=torch.full((1500, 3), 0.03),
            rotations=torch.tensor([1.0, 0, 0, 0]).expand(1500, 4),
            opacities=torch.full((1500,), 0.95),
        ),
    )
    return path


def sides_mesh() -> ColouredMesh:
    points, faces = ball()
    directions = points / np.array([0.5, 0.7, 0.4])
    return ColouredMesh(
        vertices=points, faces=faces, colours=(directions[:, [2, 0, 1]] * 0.5 + 0.5).clip(0, 1)
    )


def dominant(maps, view) -> np.ndarray:
    """Mean colour at the centre of a view."""
    middle = SMALL.resolution // 2
    return maps.colours[view, middle - 2 : middle + 2, middle - 2 : middle + 2].mean(axis=(0, 1))


def test_the_rig_sees_every_side_from_its_distance():
    poses = Rig().cam2world()
    assert poses.shape == (9, 4, 4)
    assert np.allclose(poses[:, :3, :3] @ poses[:, :3, :3].transpose(0, 2, 1), np.eye(3))
    assert np.allclose(np.linalg.det(poses[:, :3, :3]), 1)
    positions = poses[:, :3, 3] / Rig().distance
    # every camera looks at the origin
    assert np.allclose(poses[:, :3, 2], -positions)
    assert np.allclose(positions[RIGHT], [np.cos(np.radians(5)), np.sin(np.radians(5)), 0])
    assert np.allclose(positions[ABOVE], [0, 1, 0])
    # the image's down axis never points up
    assert (poses[:8, 1, 1] < 0).all()


@pytest.mark.parametrize("kind", ["mesh", "splats", "splats z", "field"])
def test_meshes_splats_and_fields_show_their_sides(kind, tmp_path):
    if kind == "mesh":
        maps = mesh_maps(sides_mesh(), SMALL)
    elif kind == "field":
        n = 20
        z, y, x = torch.meshgrid(*[torch.linspace(-1, 1, n)] * 3, indexing="ij")
        voxels = Voxels(1, n)
        with torch.no_grad():
            voxels.shape.copy_(((1 - (x**2 + y**2 + z**2) / 0.5) * 40)[None])
            voxels.paint.copy_(torch.stack([z, x, y])[None] * 3)
        maps = field_maps(voxels, SMALL)
    else:
        up = "z" if kind.endswith("z") else "y"
        splats = ply.read_splats(memoryview(splat_file(tmp_path / "a.ply", up).read_bytes()))
        maps = splat_maps(splats, SMALL, up)
    assert maps.colours.shape == (9, 24, 24, 3) and maps.normals.shape == (9, 24, 24, 3)
    assert ((maps.opacity > 0.5).mean(axis=(1, 2)) > 0.1).all()
    # red grows towards +z, green towards +x, blue towards +y
    assert dominant(maps, FRONT)[0] > dominant(maps, BACK)[0] + 0.4
    assert dominant(maps, RIGHT)[1] > dominant(maps, LEFT)[1] + 0.4
    assert dominant(maps, ABOVE)[2] > dominant(maps, FRONT)[2] + 0.2
    # normals at the centre of a view point to the camera, and at its upper edge upwards
    middle = SMALL.resolution // 2
    assert maps.normals[FRONT, middle, middle, 2] > 0.9
    column = np.flatnonzero(np.linalg.norm(maps.normals[FRONT, :, middle], axis=1) > 0.5)
    assert maps.normals[FRONT, column[0], middle, 1] > 0.3 > -0.3 > maps.normals[FRONT, column[-1], middle, 1]


def test_geometry_is_shown_without_colours():
    maps = mesh_maps(sides_mesh(), SMALL)
    plain = maps._replace(colours=maps.colours * 0.3)
    for mode, is_equal in (("shaded", True), ("normals", True), ("textured", False)):
        assert np.array_equal(images_of(maps, mode, 128), images_of(plain, mode, 128)) is is_equal
    shaded = images_of(maps, "shaded", 128)
    assert (np.ptp(shaded.astype(int), axis=-1) == 0).all()
    # the corners of a view show the ground
    assert (shaded[:, 0, 0] == 128).all()


def test_pale_assets_have_a_second_ground():
    maps = mesh_maps(sides_mesh(), SMALL)
    pale = maps._replace(colours=np.repeat(maps.opacity[..., None] * 0.95, 3, axis=-1))
    dark = maps._replace(colours=np.repeat(maps.opacity[..., None] * 0.1, 3, axis=-1))
    assert [is_pale(m, SMALL) for m in (maps, pale, dark)] == [False, True, False]
    montages = montages_of(pale, SMALL)
    assert {mode: len(images) for mode, images in montages.items()} == {
        "textured": 2,
        "shaded": 1,
        "normals": 1,
    }
    for png, ground in zip(montages["textured"], (128, 255), strict=True):
        image = np.asarray(Image.open(io.BytesIO(png)))
        assert image.shape == (3 * (24 + 28), 3 * 24, 3) and (image[0, 0] == ground).all()


def test_an_asset_is_rendered_once_and_its_content_decides(tmp_path):
    first = write_ball(tmp_path / "a" / "chair.glb", bumps=0.1)
    copy = write_ball(tmp_path / "b" / "table.glb", bumps=0.1)
    other = write_ball(tmp_path / "a" / "other.glb", bumps=0.2)
    cache = RenderCache(tmp_path / "cache", SMALL)
    renders = cache.views_of(first)
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.png")}
    again = RenderCache(tmp_path / "cache", SMALL).views_of_all([first, copy])
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.png")} == written
    assert again[copy].folder == renders.folder
    assert cache.views_of(other).hashes("shaded") != renders.hashes("shaded")
    for mode in ("textured", "shaded", "normals"):
        images = renders.images(mode)
        assert renders.sizes(mode) == [len(image) for image in images]
    (tmp_path / "bad.glb").write_bytes(b"glTF but not really")
    with raising("bad.glb"):
        cache.views_of(tmp_path / "bad.glb")


def extents(vertices, faces):
    used = vertices[np.unique(faces)]
    return used.min(axis=0), used.max(axis=0)


@pytest.mark.parametrize("kind", KINDS)
def test_damage_grows_with_its_degree(kind, tmp_path):
    model = read_asset(write_ball(tmp_path / "a.glb"))
    vertices, faces = scene_triangles(model)
    low, high = extents(vertices, faces)
    results = [scene_triangles(damaged_model(model, kind, degree, seed=3)) for degree in DEGREES]
    counts = [len(result[1]) for result in results]
    if kind == "hole":
        assert len(faces) > counts[0] > counts[1]
    elif kind == "missing_back":
        assert len(faces) > counts[0] > counts[1]
        assert extents(*results[1])[0][2] > low[2] + 0.3 * (high - low)[2]
    elif kind == "flattened":
        depths = [np.ptp(extents(*result), axis=0)[2] for result in results]
        assert np.allclose(depths, np.array([0.6, 0.2]) * (high - low)[2], rtol=1e-4)
    elif kind == "floater":
        assert counts == [len(faces) + 2 * 8, len(faces) + 6 * 8]
    else:
        # the front is on both sides: positions of the severe copy are symmetric in z
        points, triangles = results[1]
        used = points[np.unique(triangles)]
        centre = (low + high)[2] / 2
        mirrored = used * [1, 1, -1] + [0, 0, 2 * centre]
        assert all(np.linalg.norm(used - point, axis=1).min() < 1e-5 for point in mirrored[::7])
    # the same arguments give the same copy
    again = scene_triangles(damaged_model(model, kind, "mild", seed=3))
    assert np.array_equal(again[0], results[0][0]) and np.array_equal(again[1], results[0][1])
    assert model_maps(damaged_model(model, kind, "severe"), SMALL).opacity.max() == 1


@pytest.mark.parametrize("up", ["y", "z"])
@pytest.mark.parametrize("kind", KINDS)
def test_splats_are_damaged_likewise(kind, up, tmp_path):
    splats = ply.read_splats(memoryview(splat_file(tmp_path / "a.ply", up).read_bytes()))
    maps = splat_maps(splats, SMALL, up)
    damaged = splat_maps(damaged_splats(splats, kind, "severe", up=up), SMALL, up)
    assert np.abs(damaged.opacity - maps.opacity).max() > 0.3 or kind == "mirrored"
    if kind == "mirrored":
        # the back now has the colour of the front, and both were different
        assert abs(dominant(damaged, BACK)[0] - dominant(damaged, FRONT)[0]) < 0.1
        assert abs(dominant(maps, BACK)[0] - dominant(maps, FRONT)[0]) > 0.4
    if kind == "flattened":
        # seen from the side, the asset is narrow
        assert damaged.opacity[RIGHT].sum() < 0.6 * maps.opacity[RIGHT].sum()
    with raising("melted"):
        damaged_splats(splats, "melted", "mild")


def test_bounds_of_a_field_decide_the_cameras():
    small = Voxels(1, 8)
    with torch.no_grad():
        small.shape.fill_(50.0)
    assert isinstance(small.bounds, Bounds)
    maps = field_maps(small, SMALL)
    assert maps.opacity[:, 12, 12].min() > 0.9
