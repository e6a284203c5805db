"""Heads of people: shapes of latents, distances by the winding number, damage, renders, the basis file."""

import math
import shutil

import numpy as np
import pytest
import torch

from tests.rejections import raising
from training import storage
from training.heads import people, people_mesh
from training.heads.people_damage import HOLLOW_FRONT, damaged_distance, kinds, severity
from training.rendering.cameras import FFHQ_FOCAL, FFHQ_RADIUS, camera_position, look_at
from training.synthetic_heads import head_parameters, load_truth, parse_name, resolve_dataset


@pytest.fixture(scope="module")
def latents():
    return people.normalise_latents(np.random.default_rng(4).standard_normal((6, people.LATENT)))


@pytest.fixture(scope="module")
def heads(latents):
    return people.heads_from_latents(latents)


def head_distance(head: people.Head, points: np.ndarray) -> np.ndarray:
    """Return the signed distance [P] of the intact head at points [P, 3]; negative inside.

    The head is closed at the bottom by a rounded cylinder.
    """
    corners = head.vertices[people.load_basis().triangles].astype(np.float64)
    _, _, distance = people_mesh.nearest_places(corners, points)
    inside = people_mesh.winding_number(corners, points) > 0.5
    return np.maximum(np.where(inside, -distance, distance), people.bust_end(points))


def camera(yaw: float) -> np.ndarray:
    place = camera_position(torch.tensor([[math.pi / 2 + yaw]]), torch.tensor([[math.pi / 2]]), FFHQ_RADIUS)
    return look_at(place, torch.zeros(3))[0].numpy()


def test_a_latent_names_one_head_whatever_its_length(latents, heads):
    again = people.heads_from_latents(torch.from_numpy(3 * latents[:2]))
    np.testing.assert_allclose(again[1].vertices, heads[1].vertices, atol=1e-6)
    apart = np.linalg.norm(heads[0].vertices - heads[1].vertices, axis=1)
    assert 64 * np.median(apart) > 0.5
    other_quality = np.concatenate([latents[:1, :-18], -latents[:1, -18:]], axis=1)
    np.testing.assert_allclose(
        people.heads_from_latents(other_quality)[0].vertices, heads[0].vertices, atol=1e-6
    )
    with pytest.raises(ValueError, match="64"):
        people.heads_from_latents(np.zeros((1, 48)))


def test_heads_fit_the_cube_and_face_the_camera(heads):
    basis = people.load_basis()
    for head in heads:
        above = head.vertices[basis.masks["torso"] < 0.5]
        assert np.abs(above).max() < 0.5
        nose = head.vertices[basis.masks["face"] > 0.5]
        assert abs(nose[nose[:, 2].argmax(), 0]) < 0.02  # what lies farthest in front is in the middle
        eyes = head.vertices[basis.masks["eyes"] > 0.5]
        np.testing.assert_allclose(eyes[:, 1].mean(), people.UNIT * people.EYE[1], atol=0.02)


def test_winding_numbers_are_those_of_all_triangles():
    rng = np.random.default_rng(0)
    corners = people.load_basis().mean[people.load_basis().triangles].astype(float)
    points = rng.normal(0, 0.01, (40, 3)) + [0.0, 0.05, 0.15]
    everything = people_mesh.solid_angles(corners, points).sum(axis=1) / (4 * np.pi)
    # far groups are one dipole each
    np.testing.assert_allclose(people_mesh.winding_number(corners, points), everything, atol=0.02)


def test_nearest_place_on_a_triangle():
    corners = np.tile(np.array([[0.0, 0, 0], [1, 0, 0], [0, 1, 0]]), (4, 1, 1))
    points = np.array([[0.2, 0.3, 0.5], [-1, -1, 0], [2, 0.1, 0], [1, 1, 2]])
    places = np.einsum("pc,pcd->pd", people_mesh.closest_on_triangles(corners, points), corners)
    np.testing.assert_allclose(places, [[0.2, 0.3, 0], [0, 0, 0], [1, 0, 0], [0.5, 0.5, 0]], atol=1e-9)


def test_distance_has_unit_slope_and_the_right_side(heads):
    head = heads[2]
    basis = people.load_basis()
    rng = np.random.default_rng(1)
    # no lids, nostrils or lips, whose rims are folded
    smooth = basis.masks["scalp"] + basis.masks["neck"] > 0.5
    rows = rng.choice(np.flatnonzero(smooth), 150)
    out = head.vertices[rows] + 0.02 * head.normals[rows]
    assert (head_distance(head, out) > 0).mean() > 0.98
    assert (head_distance(head, head.vertices[rows] - 0.02 * head.normals[rows]) < 0).mean() > 0.98
    known = np.array([[0, 0, 0], [0, -0.35, 0.0], [0, 0, 0.45], [0, 0.45, 0], [0.4, 0.2, 0]])
    assert (np.sign(head_distance(head, known)) == [-1, -1, 1, 1, 1]).all()
    step = 1e-3
    moved = np.concatenate([out, *(out + step * np.eye(3)[axis] for axis in range(3))])
    here, *ahead = head_distance(head, moved).reshape(4, -1)
    slope = np.linalg.norm((np.array(ahead) - here) / step, axis=0)
    assert abs(np.median(slope) - 1) < 0.02 and np.mean(np.abs(slope - 1) < 0.1) > 0.9


def test_a_grid_has_the_points_distances(heads):
    points = people_mesh.grid_points(20).reshape(-1, 3)
    chosen = np.random.default_rng(2).choice(len(points), 300, replace=False)
    for head in heads[:2]:
        grid = people_mesh.head_grid(head, 20)
        exact = head_distance(head, points[chosen])
        quick = grid.ravel()[chosen]
        near = (np.abs(exact) < 2 / 20) & (points[chosen, 1] > -0.2)
        assert (np.sign(quick) == np.sign(exact)).all()
        np.testing.assert_allclose(quick[near], exact[near], atol=3e-3)
        assert 0.04 < (grid < 0).mean() < 0.12


@pytest.fixture(scope="module")
def scans(heads):
    """Points of a head, distances of the whole, and of 40 scans of it."""
    rng = np.random.default_rng(3)
    points = rng.uniform([-0.3, -0.45, -0.4], [0.3, 0.35, 0.3], (4000, 3)).astype(np.float32)
    intact = torch.from_numpy(head_distance(heads[1], points)).float()
    quality = torch.from_numpy(rng.standard_normal((40, people.QUALITY))).float()
    at = torch.from_numpy(points)
    return at, intact, quality, damaged_distance(at.expand(40, -1, -1), intact.expand(40, -1), quality)


def test_damage_never_touches_the_front(scans):
    points, intact, _, scan = scans
    front = points[:, 2] > HOLLOW_FRONT + 0.02
    density = people.density_of(intact, 0.015)
    torch.testing.assert_close(people.density_of(scan, 0.015)[:, front], density[front].expand(40, -1))


def test_damaged_scans_lack_or_have_much_and_intact_ones_do_not(scans):
    points, intact, quality, scan = scans
    back = (points[:, 2] < -0.02) & (points[:, 1] > -0.3)
    wrong = ((scan < 0) != (intact < 0))[:, back].sum(dim=1) / (intact[back] < 0).sum()
    amount = severity(quality)
    assert (wrong[amount < 0.02] < 0.15).all() and wrong[amount > 0.98].median() > 0.3


def test_more_than_half_of_the_latents_are_damaged_in_three_kinds():
    quality = torch.from_numpy(np.random.default_rng(5).standard_normal((4000, people.QUALITY))).float()
    assert 0.5 < float((severity(quality) > 0.5).float().mean()) < 0.65
    assert (kinds(quality).gt(0.5).float().mean(dim=0) > 0.04).all()


def test_eyes_in_a_render_are_white_with_dark_pupils(heads):
    basis = people.load_basis()
    for head in heads[:2]:
        image, _ = people.render_head(head, camera(0.0), FFHQ_FOCAL, 128)
        for side in (-1, 1):
            x, y, z = head.vertices[(basis.masks["iris"] > 0.5) & (side * basis.mean[:, 0] > 0)].mean(axis=0)
            column, row = (int(128 * (at / (FFHQ_RADIUS - z) * FFHQ_FOCAL + 0.5)) for at in (x, -y))
            eye = image[row - 3 : row + 4, column - 6 : column + 7].mean(axis=2)
            assert eye[3, 6] < 0.05 and eye.max() > 0.4


def test_depth_of_a_render_lies_on_the_surface(heads):
    image, depth = people.render_head(heads[3], camera(0.0), FFHQ_FOCAL, 64)
    assert image.shape == (64, 64, 3) and image.min() >= 0 and image.max() <= 1
    hit = np.isfinite(depth)
    assert 0.25 < hit.mean() < 0.7 and (image[~hit].mean() > 0.9)
    rows, columns = np.nonzero(hit)
    x, y = ((at + 0.5) / 64 - 0.5 for at in (columns, rows))
    way = np.stack([x / FFHQ_FOCAL, -y / FFHQ_FOCAL, -np.ones(len(x))], axis=1)
    points = [0, 0, FFHQ_RADIUS] + way / np.linalg.norm(way, axis=1, keepdims=True) * depth[hit][:, None]
    chosen = (np.abs(points[:, 0]) < 0.3) & (points[:, 1] > -0.3)
    surface_distance = people_mesh.nearest_places(
        heads[3].vertices[people.load_basis().triangles].astype(float), points[chosen]
    )[2]
    assert surface_distance.max() < 1e-5


def test_the_data_set_is_named_rendered_and_known(tmp_path):
    options = parse_name("synthetic:people32@n=3,seed=5")
    shape, appearance, _ = head_parameters(options, range(2))
    together = np.concatenate([shape, appearance], axis=1)
    np.testing.assert_allclose((together**2).mean(axis=1), 1, atol=1e-5)
    truth = load_truth(
        resolve_dataset("synthetic:people32@n=3,seed=5", tmp_path, processes=1, progress=False)
    )
    np.testing.assert_array_equal(truth.shape[:2], shape)
    assert truth.depth.shape == (3, 32, 32)
    with pytest.raises(ValueError, match="background"):
        parse_name("synthetic:people32@background=flat")


def test_the_basis_ships_small_with_its_licences():
    assert people.ASSET.stat().st_size < 1_000_000
    assert "CC0" in (people.ASSET.parent / "people-LICENSE-CC0.txt").read_text()
    assert "Apache License" in (people.ASSET.parent / "people-LICENSE-Apache-2.0.txt").read_text()
    assert "CC0" in people.load_basis().meta["licence"]


def test_a_missing_or_damaged_basis_and_another_version_are_rejected(tmp_path):
    damaged_file = tmp_path / "damaged.safetensors"
    other = tmp_path / "other.safetensors"
    shutil.copyfile(people.ASSET, damaged_file)
    with open(damaged_file, "r+b") as file:
        file.seek(-1000, 2)
        file.write(b"\x55" * 8)
    for path in (damaged_file, tmp_path / "none.safetensors"):
        with raising(str(path), "people"):
            people.load_basis(path)
    tensors, meta = storage.read_tensors(people.ASSET, people.KIND)
    storage.write_tensors(other, people.KIND, tensors, {**meta, "version": 0})
    with raising(str(other), "people", f"version {people.VERSION}", " 0."):
        people.load_basis(other)
