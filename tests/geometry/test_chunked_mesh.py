"""Blockwise meshing against the full volume, mesh checks against meshes with known faults, and files."""

import mrcfile
import numpy as np
import pytest
import torch
import trimesh
from scipy.ndimage import gaussian_filter
from scipy.spatial import cKDTree

from eg3d_rlhf.core.spec import SlabSpec
from eg3d_rlhf.generators.eg3d import PlaneField as Field
from eg3d_rlhf.geometry.mesh import (
    count_edges,
    decimate,
    extract_mesh,
    extract_mesh_blockwise,
    face_volumes,
    find_parts,
    largest_part,
    vertex_normals,
)
from eg3d_rlhf.geometry.mesh_export import OUTSIDE, FieldGrid, export_mesh, save_mesh, write_mrc
from eg3d_rlhf.geometry.settings import MeshOptions
from tests.geometry.stand_in import StandIn, sigma_grid
from tests.rejections import raising

CENTRE = np.array([0.05, -0.1, 0.02])
RADIUS = 0.3
POINTS = 48
AXES = SlabSpec.cube(POINTS).axes()
PLANES = (1, 2, 7, 16, 47, 48, 100)


def ball(centre=CENTRE, radius=RADIUS) -> torch.Tensor:
    """sigma [X, Y, Z] that crosses level 10 on a sphere, with slope 100 per unit."""
    x, y, z = (axis.double() for axis in AXES)
    squares = ((x - centre[0]) ** 2)[:, None, None] + ((y - centre[1]) ** 2)[:, None] + (z - centre[2]) ** 2
    return (10 + 100 * (radius - squares.sqrt())).float()


def noise(kind: str) -> torch.Tensor:
    """Volumes with many parts, hollows and bodies at the border; 'steps' has grid points exactly on the
    level.
    """
    volume = np.random.RandomState(0).randn(21, 19, 17)
    if kind != "raw":
        volume = gaussian_filter(volume, 1.2)
        volume /= volume.std()
    return torch.from_numpy(np.round(volume) if kind == "steps" else volume).float()


def solid(mesh) -> trimesh.Trimesh:
    return trimesh.Trimesh(*mesh, process=False)


@pytest.mark.parametrize("planes", PLANES)
def test_a_sphere_across_blocks(planes):
    sigma = ball()
    mesh = extract_mesh_blockwise(lambda part: sigma[part], AXES, planes_per_block=planes)
    body = solid(mesh)
    assert body.is_watertight and body.is_winding_consistent
    assert body.volume == pytest.approx(4 / 3 * np.pi * RADIUS**3, rel=0.02)  # positive: outward
    np.testing.assert_allclose(body.center_mass, CENTRE, atol=1e-3)
    outward = (vertex_normals(*mesh) * (mesh[0] - CENTRE)).sum(axis=1) / RADIUS
    assert outward.min() > 0.99
    full_volume = extract_mesh(sigma.permute(2, 1, 0), AXES)
    assert_same_surface(mesh, full_volume)


@pytest.mark.parametrize("kind", ["raw", "smooth", "steps"])
@pytest.mark.parametrize("planes", [1, 5, 64])
def test_blocks_give_the_surface_of_the_full_volume(kind, planes):
    sigma = noise(kind)
    axes = [np.linspace(-0.5, 0.5, n) for n in sigma.shape]
    mesh = extract_mesh_blockwise(lambda part: sigma[part], axes, 0.0, planes)
    assert_same_surface(mesh, extract_mesh(sigma.permute(2, 1, 0), axes, 0.0))
    assert count_edges(mesh[1]).watertight
    # a reader that merges equal vertices changes nothing
    assert len(np.unique(mesh[0], axis=0)) == len(mesh[0])
    assert trimesh.Trimesh(*mesh).is_watertight


def assert_same_surface(mesh, other) -> None:
    """Check for the same triangles with the same orientation, in any order."""
    assert len(mesh[0]) == len(other[0]) and len(mesh[1]) == len(other[1])
    vertices, faces = mesh
    other_vertices, other_faces = other
    distance, match = cKDTree(other_vertices).query(vertices)
    assert distance.max() < 1e-6 and len(np.unique(match)) == len(vertices)
    rolled = []
    for f in (match[faces], other_faces):
        turns = (f.argmin(axis=1)[:, None] + np.arange(3)) % 3  # the lowest corner first
        rolled.append(np.take_along_axis(f, turns, axis=1))
    np.testing.assert_array_equal(*(r[np.lexsort(r.T)] for r in rolled))


def test_every_plane_is_asked_for_once_and_progress_ends_at_the_last():
    asked = []
    progress_calls = []
    sigma = ball()

    def sample(part):
        asked.extend(range(part.start, part.stop))
        return sigma[part]

    extract_mesh_blockwise(
        sample, AXES, planes_per_block=7, on_progress=lambda *call: progress_calls.append(call)
    )
    assert asked == list(range(POINTS))
    assert progress_calls[-1] == ("density", POINTS, POINTS) and len(progress_calls) == 7


def test_edges_of_a_tetrahedron_with_faults():
    faces = np.array([[0, 2, 1], [0, 1, 3], [1, 2, 3], [2, 0, 3]])
    assert count_edges(faces).watertight
    assert (count_edges(faces[:3]).open, count_edges(faces[:3]).shared) == (3, 0)
    flipped = faces.copy()
    flipped[0] = flipped[0][::-1]
    assert not count_edges(flipped).watertight and count_edges(flipped).shared == 3
    assert count_edges(np.concatenate([faces, faces])).shared == 12


def test_the_largest_part_is_the_largest_body_not_its_hollow():
    outer, hollow, small = (
        trimesh.creation.icosphere(subdivisions=s, radius=r) for s, r in ((1, 1.0), (4, 0.9), (3, 0.4))
    )
    hollow.invert()
    small.apply_translation([3, 0, 0])
    all_three = trimesh.util.concatenate([small, hollow, outer])
    assert find_parts(all_three.faces, len(all_three.vertices))[0] == 3
    vertices, faces, count = largest_part(all_three.vertices, all_three.faces)
    assert count == 3 and len(faces) == len(outer.faces) and len(vertices) == len(outer.vertices)
    assert face_volumes(vertices, faces).sum() == pytest.approx(outer.volume)


def test_decimation_keeps_a_sphere_closed_and_near():
    vertices, faces = extract_mesh(ball().permute(2, 1, 0), AXES)
    few = decimate(vertices, faces, 600)
    assert 550 <= len(few[1]) <= 660
    assert solid(few).is_watertight and solid(few).volume == pytest.approx(
        solid((vertices, faces)).volume, rel=0.02
    )
    assert decimate(vertices, faces, 10**6)[1] is faces


@pytest.mark.filterwarnings("ignore:decimate")
def test_decimation_of_a_ragged_surface_stays_closed():
    sigma = noise("smooth")
    axes = [np.linspace(-0.5, 0.5, n) for n in sigma.shape]
    mesh = extract_mesh_blockwise(lambda part: sigma[part], axes, 0.0)
    few = decimate(*mesh, len(mesh[1]) // 20)
    assert len(few[1]) <= len(mesh[1]) and count_edges(few[1]).watertight
    assert trimesh.Trimesh(*few).is_watertight


@pytest.fixture(scope="module")
def field() -> Field:
    G = StandIn(box_warp=1.2)
    return Field(G, torch.ones(1, 2, 3))


@pytest.mark.parametrize("layout", ["eg3d", "fixed"])
def test_blocks_of_a_field_are_the_grid(layout):
    G = StandIn(layout, box_warp=1.2)
    ws = torch.ones(1, 2, 3)
    spec = SlabSpec.cube(20, 1.2)
    grid = FieldGrid(Field(G, ws), 20)
    assert G.noise_modes == ["const"]
    blocks = torch.cat([grid(slice(0, 7)), grid(slice(7, 8)), grid(slice(8, 20))])
    torch.testing.assert_close(blocks, sigma_grid(G, ws, spec)[0].permute(2, 1, 0), rtol=1e-5, atol=1e-5)
    assert len(G.noise_modes) == 2  # one synthesis pass per field for any number of blocks


def test_a_border_is_cleared(field):
    full_volume = FieldGrid(field, 20)(slice(0, 20))
    trimmed = FieldGrid(field, 20, border=0.2)
    got = torch.cat([trimmed(slice(0, 3)), trimmed(slice(3, 10)), trimmed(slice(10, 20))])
    inside = torch.zeros_like(got, dtype=torch.bool)
    inside[4:16, 4:16, 4:16] = True
    torch.testing.assert_close(got[inside], full_volume[inside], rtol=1e-5, atol=1e-5)
    assert (got[~inside] == OUTSIDE).all()


def test_mrc_volume_reads_back_in_eg3ds_order(field, tmp_path):
    grid = FieldGrid(field, 21)
    progress_calls = []
    path = write_mrc(
        tmp_path / "new" / "a.mrc", grid, 21, 1.2 / 20, lambda *call: progress_calls.append(call)
    )
    assert mrcfile.validate(path)
    with mrcfile.open(path) as file:
        assert file.header.mode == 2 and file.data.shape == (21, 21, 21)
        np.testing.assert_allclose(file.data, grid(slice(0, 21)).numpy()[::-1], rtol=1e-6)
        assert float(file.header.dmax) == pytest.approx(float(file.data.max()))
        assert any("0.06" in label for label in file.get_labels())
    assert progress_calls[-1] == ("density", 21, 21)
    assert [p.name for p in path.parent.iterdir()] == ["a.mrc"]  # no temporary left


@pytest.mark.parametrize("suffix", [".ply", ".obj", ".glb"])
def test_colours_and_normals_read_back(tmp_path, suffix):
    vertices, faces = extract_mesh(ball().permute(2, 1, 0), AXES)
    normals = vertex_normals(vertices, faces)
    colors = np.random.RandomState(1).randint(0, 256, vertices.shape).astype(np.uint8)
    path = save_mesh(tmp_path / f"a{suffix}", vertices, faces, colors, normals)
    mesh = trimesh.load(path, process=False)
    if suffix == ".glb":
        (mesh,) = mesh.geometry.values()
    assert mesh.is_watertight and len(mesh.faces) == len(faces)
    np.testing.assert_allclose(mesh.vertices[mesh.faces], vertices[faces], atol=1e-6)
    np.testing.assert_allclose(
        mesh.visual.vertex_colors[mesh.faces][..., :3].astype(int), colors[faces].astype(int), atol=1
    )
    np.testing.assert_allclose(mesh.vertex_normals[mesh.faces], normals[faces], atol=1e-3)


def test_the_report_of_an_export(tiny_networks, tmp_path):
    from eg3d_rlhf.generators import load_generator, ws_of_seeds

    G = load_generator(tiny_networks).G
    tiny = Field(G, ws_of_seeds(G, [0]))
    level = float(FieldGrid(tiny, 16)(slice(0, 16)).median())
    mesh, report = export_mesh(tiny, MeshOptions(resolution=24, level=level))
    assert report.watertight and report.outward and report.components == 1
    assert report.normals_down_density > 0.95
    assert report.volume == pytest.approx(solid((mesh.vertices, mesh.faces)).volume, rel=1e-4)
    out = G.sample_mixed(torch.from_numpy(mesh.vertices)[None], None, ws_of_seeds(G, [0]), noise_mode="const")
    expected = (out["rgb"][0, :, :3].clamp(0, 1) * 255).round()
    assert (torch.from_numpy(mesh.colors).float() - expected).abs().max() <= 1
    sigma = out["sigma"][0, :, 0]
    inner = torch.from_numpy(np.abs(mesh.vertices).max(axis=1) < 0.49)
    spread = float(FieldGrid(tiny, 16)(slice(0, 16)).std())
    assert float((sigma[inner] - level).abs().median()) < 0.02 * spread  # the vertices lie on the level


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"resolution": 8}, ("16 to 1024", " 8")),
        ({"level": np.nan}, ("level", "nan")),
        ({"component": "some"}, ("'largest'", "'all'", "some")),
        ({"faces": 3}, ("faces", "4", "3")),
    ],
)
def test_options_out_of_range(settings, names):
    with raising(*names):
        MeshOptions(**settings)
