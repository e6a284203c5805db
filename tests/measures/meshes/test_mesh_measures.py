"""Invariances of measures of meshes, their expected changes, and errors; tests/compat/test_solid_meshes.py
has closed forms.
"""

import sys

import numpy as np
import pytest
import trimesh

from eg3d_rlhf.measures.meshes import space as space_module
from eg3d_rlhf.measures.meshes.clean import clean_mesh
from eg3d_rlhf.measures.meshes.edges import Edges
from eg3d_rlhf.measures.meshes.mesh_measures import inside_distance, measure_mesh, stability
from eg3d_rlhf.measures.meshes.settings import MeasureOptions
from eg3d_rlhf.measures.meshes.space import OFFSET, Space, directions, sample

pytest.importorskip("igl", reason="extra solid")
# measures that are estimated from random samples
SAMPLED = (
    "hidden",
    "buried",
    "sheet",
    "inverted",
    "thin",
    "thick_p05",
    "thick_median",
    "gap_median",
    "overhang",
)


def joined(*meshes: trimesh.Trimesh) -> tuple[np.ndarray, np.ndarray]:
    mesh = trimesh.util.concatenate(meshes)
    return np.asarray(mesh.vertices), np.asarray(mesh.faces)


def moved(mesh: trimesh.Trimesh, *by: float) -> trimesh.Trimesh:
    return mesh.copy().apply_translation(by)


def lamp() -> tuple[np.ndarray, np.ndarray]:
    """Build a body with many defects: an open shade, a wall inside, a floater, and two bodies that
    overlap.
    """
    shade = trimesh.creation.icosphere(subdivisions=2, radius=0.4)
    shade.update_faces(shade.triangles_center[:, 1] > -0.2)
    inner = trimesh.creation.icosphere(subdivisions=1, radius=0.2)
    foot = trimesh.creation.box((0.5, 0.06, 0.3))
    pole = trimesh.creation.box((0.05, 0.6, 0.05))
    return joined(
        shade,
        inner,
        moved(foot, 0.05, -0.6, 0),
        moved(pole, 0, -0.35, 0),
        moved(inner.copy().apply_scale(0.2), 0.6, 0.4, 0.1),
    )


def same(first: dict, other: dict, *but: str) -> None:
    for name, value in first.items():
        if name in {"edge_L", *but}:
            continue
        tolerance = 0.03 if name in SAMPLED else 1e-6
        assert other[name] == (pytest.approx(value, abs=tolerance) if isinstance(value, float) else value), (
            name
        )


@pytest.fixture(scope="module")
def lamp_measures() -> dict:
    return measure_mesh(clean_mesh(*lamp()))


def test_neither_scale_nor_place_nor_order_matters(lamp_measures):
    vertices, faces = lamp()
    rng = np.random.default_rng(0)
    order = rng.permutation(len(faces))
    number = rng.permutation(len(vertices))
    shuffled = np.empty_like(vertices)
    shuffled[number] = vertices
    other = clean_mesh(shuffled * 137.0 + [5, -3, 9], np.roll(number[faces[order]], 1, axis=1))
    same(lamp_measures, measure_mesh(other), "gap_p01", "gap_p05", "thick_p01")
    assert other.edge == pytest.approx(137 * lamp_measures["edge_L"])


def test_rotation_about_the_upward_axis_and_the_choice_of_that_axis(lamp_measures):
    vertices, faces = lamp()
    quarter = vertices[:, [2, 1, 0]] * [1, 1, -1]
    same(
        lamp_measures, measure_mesh(clean_mesh(quarter, faces)), "gap_p01", "gap_p05", "thick_p01", "symmetry"
    )
    lying = np.stack([vertices[:, 0], -vertices[:, 2], vertices[:, 1]], axis=1)
    same(lamp_measures, measure_mesh(clean_mesh(lying, faces, up="z")))


def test_subdivision_changes_only_shares_of_edges(lamp_measures):
    fine = trimesh.Trimesh(*lamp(), process=False).subdivide()
    measures = measure_mesh(clean_mesh(fine.vertices, fine.faces))
    for name in ("open_length", "main_area", "area", "volume", "tip", "parts", "rims", "genus", "overhang"):
        assert measures[name] == pytest.approx(lamp_measures[name], rel=1e-3), name
    assert measures["thin"] == pytest.approx(lamp_measures["thin"], abs=0.02)
    assert measures["open_share"] < 0.7 * lamp_measures["open_share"]  # so open_share is not used as a reward


def test_measures_of_a_lamp(lamp_measures):
    assert (
        not lamp_measures["closed"]
        and lamp_measures["oriented"]
        and lamp_measures["parts"] == 5
        and lamp_measures["rims"] == 1
    )
    assert (
        lamp_measures["crossing"] > 0
        and lamp_measures["overlap"] is None
        and lamp_measures["mass"] == "voxels"
    )
    assert 0.05 < lamp_measures["hidden"] < 0.4 and lamp_measures["stands"] == "barely"


def test_two_crossing_spheres_cross_and_nested_ones_do_not():
    ball = trimesh.creation.icosphere(subdivisions=2)
    crossing = measure_mesh(clean_mesh(*joined(ball, moved(ball, 0.7, 0.1, 0))))
    nested = measure_mesh(clean_mesh(*joined(ball, ball.copy().apply_scale(0.5))))
    assert 0 < crossing["crossing"] < 0.5 and nested["crossing"] == 0
    # two balls share a lens
    r = 1.0
    d = float(np.hypot(0.7, 0.1))
    lens = np.pi * (4 * r + d) * (2 * r - d) ** 2 / 12 / (8 * np.pi / 3)
    assert crossing["overlap"] == pytest.approx(lens, abs=0.01) and nested["overlap"] == pytest.approx(
        1 / 9, abs=1e-3
    )


def test_cavities_do_not_count_as_inverted_bodies():
    ball = trimesh.creation.icosphere(subdivisions=2)
    hollow = ball.copy().apply_scale(0.6)
    hollow.invert()
    inside = measure_mesh(clean_mesh(*joined(ball, hollow)))
    beside = measure_mesh(clean_mesh(*joined(ball, moved(hollow, 3, 0, 0))))
    assert (inside["cavities"], inside["inverted_bodies"], inside["overlap"]) == (
        1,
        0,
        pytest.approx(0, abs=1e-9),
    )
    assert 0.15 < inside["inner"] < 0.25 and beside["inner"] < 0.02  # .6^3
    assert (beside["cavities"], beside["inverted_bodies"], beside["overlap"]) == (
        1,
        1,
        pytest.approx(0, abs=1e-9),
    )


def test_hull_mass_changes_the_stability():
    """A table whose top is off its legs falls by its own mass and stands by the mass of its hull."""
    top = trimesh.creation.cylinder(
        0.4, 0.05, transform=trimesh.transformations.rotation_matrix(np.pi / 2, [1, 0, 0])
    )
    legs = [
        moved(trimesh.creation.box((0.04, 0.51, 0.04)), 0.3 * np.cos(t), -0.255, 0.3 * np.sin(t))
        for t in (0, 2.094, 4.189)
    ]
    table = clean_mesh(*joined(moved(top, -0.25, 0.015, 0), *legs))
    assert measure_mesh(table)["stands"] == "tips"
    assert measure_mesh(table, MeasureOptions(hull_mass=True))["tip"] > 0
    assert [stability(degrees) for degrees in (-1, 0, 1, 3)] == ["tips", "tips", "barely", "stands"]


@pytest.mark.parametrize(
    "foot, point, wanted",
    [
        ([[0, 0], [1, 0], [1, 1], [0, 1], [0.5, 0.5]], [0.5, 0.4], 0.4),
        ([[0, 0], [1, 0], [1, 1], [0, 1]], [2, 2], -(2**0.5)),
        ([[0, 0], [1, 0], [0.5, 0]], [0.5, 0.3], -0.3),
        ([[0, 0], [1, 0]], [2, 0], -1.0),
        ([[1, 1]], [1, 1], 0.0),
    ],
)
def test_distance_to_the_border_of_the_foot(foot, point, wanted):
    assert inside_distance(np.array(foot, float), np.array(point, float)) == pytest.approx(wanted)


def test_rays_and_sides_do_not_depend_on_the_installed_libraries(monkeypatch):
    mesh = clean_mesh(*lamp())
    points, normals = sample(mesh, 500, seed=2)
    fast = Space(mesh)
    slow = Space(mesh)
    monkeypatch.setitem(sys.modules, "embreex", None)
    assert slow._scene is None and (fast._scene is None or fast._scene is not None)
    for sign in (1, -1):
        ours, theirs = (
            space.first_hits(points + sign * OFFSET * normals, sign * normals)[0] for space in (fast, slow)
        )
        assert np.mean(np.isclose(ours, theirs, atol=1e-5)) > 0.99  # some hit an edge
    exact = fast.winding(points + 0.01)
    monkeypatch.setattr(space_module, "_FEW", 0)
    assert ((fast.winding(points + 0.01) > 0.5) == (exact > 0.5)).all()


def test_crossing_faces_equal_those_of_a_loop():
    """Compare with Moeller and Trumbore's test of every edge with every face, in float64."""
    edges = Edges(clean_mesh(*lamp()))
    vertices = edges.mesh.vertices
    faces = edges.mesh.faces
    a, side, other = vertices[faces[:, 0]], *(vertices[faces[:, i]] - vertices[faces[:, 0]] for i in (1, 2))
    wanted = np.zeros(len(faces), dtype=bool)
    for low, high in edges.ends:
        along = vertices[high] - vertices[low]
        h = np.cross(along, other)
        with np.errstate(all="ignore"):
            inverse = 1 / (side * h).sum(axis=1)
            s = vertices[low] - a
            q = np.cross(s, side)
            u = (s * h).sum(axis=1) * inverse
            v = q @ along * inverse
            t = (other * q).sum(axis=1) * inverse
            through = (
                (u >= 0)
                & (v >= 0)
                & (u + v <= 1)
                & (t > OFFSET)
                & (t < 1 - OFFSET)
                & ~np.isin(faces, [low, high]).any(axis=1)
            )
        wanted |= through
        if through.any():
            wanted |= np.isin(faces, [low, high]).sum(axis=1) == 2
    assert wanted.any() and (Space(edges.mesh).crossing_faces(edges) == wanted).all()


def test_directions_are_even():
    rays = directions(64, seed=3)
    assert np.allclose(np.linalg.norm(rays, axis=1), 1) and np.abs(rays.mean(axis=0)).max() < 0.02
    assert np.abs(rays.T @ rays / 64 - np.eye(3) / 3).max() < 0.02


@pytest.mark.parametrize(
    "vertices, faces, word",
    [
        (np.zeros((0, 3)), np.zeros((0, 3), int), "triangle"),
        (np.eye(3), np.array([[0, 1, 3]]), "indices"),
        (np.full((3, 3), np.nan), np.array([[0, 1, 2]]), "finite"),
        (np.array([[1, 0, 0], [0, np.inf, 0], [0, 0, 1]]), np.array([[0, 1, 2]]), "finite"),
        (np.ones((3, 3)), np.array([[0, 1, 2]]), "size"),
        (np.eye(3)[:, :1] * [1, 2, 3], np.array([[0, 1, 2]]), "area"),
        (np.eye(4)[:, :3], np.array([[0, 1, 2, 3]]), "triangles"),
        (np.eye(3) * 1e308 - 9e307, np.array([[0, 1, 2]]), ""),
    ],
)
def test_defective_meshes_are_rejected(vertices, faces, word):
    if word:
        with pytest.raises(ValueError, match=word):
            clean_mesh(vertices, faces)
    else:
        assert measure_mesh(clean_mesh(vertices, faces))["open_edges"] == 3  # huge, but valid


def test_settings_out_of_range_and_missing_libraries(monkeypatch):
    ball = trimesh.creation.icosphere(subdivisions=1)
    with pytest.raises(ValueError, match="--weld"):
        clean_mesh(ball.vertices, ball.faces, tolerance=1e-3)
    with pytest.raises(ValueError, match="--up"):
        clean_mesh(ball.vertices, ball.faces, up="x")
    with pytest.raises(ValueError, match="samples"):
        MeasureOptions(samples=1)
    monkeypatch.setitem(sys.modules, "igl", None)
    with pytest.raises(ValueError, match=r"eg3d-rlhf\[solid\]"):
        measure_mesh(clean_mesh(ball.vertices, ball.faces))
