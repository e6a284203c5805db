"""Regions: the boxes' first match, masks, landmarks, and parts of heads of people."""

import json

import numpy as np
import pytest
import torch

from eg3d_rlhf.core.spec import SlabSpec
from eg3d_rlhf.evaluation.attribution import regions
from eg3d_rlhf.generators import latents
from tests.rejections import raising
from training.heads import people

SPEC = SlabSpec(resolution=48)


def region_at(partition, x, y, z):
    depth, height, width = partition.labels.shape
    index = [round(v * (n - 1)) for v, n in ((z, depth), (y, height), (x, width))]
    return partition.names[int(partition.labels[tuple(index)])]


@pytest.mark.parametrize(
    ("point", "words"),
    [
        ((0.5, 0.79, 0.6), ["brow"]),
        ((0.26, 0.6, 0.7), ["left", "eye"]),
        ((0.74, 0.6, 0.7), ["right", "eye"]),
        ((0.5, 0.5, 0.8), ["nose"]),
        ((0.2, 0.4, 0.6), ["left", "cheek"]),
        ((0.8, 0.4, 0.6), ["right", "cheek"]),
        ((0.5, 0.3, 0.7), ["mouth"]),
        ((0.5, 0.1, 0.6), ["chin"]),
        ((0.5, 0.5, 0.1), [regions.OTHER]),
        ((0.3, 0.71, 0.6), ["brow"]),
        ((0.33, 0.56, 0.7), ["left", "eye"]),
    ],
)
def test_face_boxes(point, words):
    name = region_at(regions.face_partition(SlabSpec(resolution=128)), *point)
    assert all(word in name for word in words)


def test_first_match_wins_and_nothing_is_left_out():
    partition = regions.face_partition(SlabSpec())
    assert (
        sum(partition.counts()) == 128 * 141 * 129
        and min(partition.counts()) > 0
        and len(partition.names) == 9
    )
    box = (0, 1, 0, 1, 0, 1)
    twice = regions.partition_from_boxes([("first", box), ("second", box)], regions.unit_coordinates(SPEC))
    assert twice.counts() == [np.prod(SPEC.shape), 0, 0]


def test_left_and_right_mirror():
    partition = regions.face_partition(SPEC)
    other = [
        partition.names.index(n.replace("left", "*").replace("right", "left").replace("*", "right"))
        for n in partition.names
    ]
    assert torch.equal(torch.tensor(other)[partition.labels.flip(-1)], partition.labels)
    assert {name for name, _ in regions.FACE_BOXES} == set(partition.names) - {regions.OTHER}


def test_masks(tmp_path):
    volume = np.zeros(SPEC.shape, dtype=np.uint8)
    volume[:, :5], volume[:, 5:9] = 7, 3
    np.save(tmp_path / "mask.npy", volume)
    (tmp_path / "mask.json").write_text(json.dumps({"0": "rest", "7": "chin", "3": "mouth"}))
    partition = regions.read_masks(tmp_path / "mask.npy", SPEC.shape)
    assert partition.names == ("rest", "mouth", "chin") and partition.counts()[2] == (volume == 7).sum()


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ("shape", ["m.npy", str(list(SPEC.shape))]),
        ("float", ["m.npy", str(list(SPEC.shape))]),
        ("name", ["m.json", "[3]"]),
        ("json", ["m.json"]),
        ("one", ["m.npy", "label 0"]),
        ("none", ["m.npy"]),
    ],
)
def test_wrong_masks_are_named(tmp_path, change, names):
    volume = np.zeros(SPEC.shape, dtype=np.float32 if change == "float" else np.int64)
    if change != "one":
        volume[:, :5] = 3
    if change != "none":
        np.save(tmp_path / "m.npy", volume[1:] if change == "shape" else volume)
    if change != "json":
        (tmp_path / "m.json").write_text(json.dumps({"0": "a"} if change == "name" else {"0": "a", "3": "b"}))
    with raising(*names, kind=FileNotFoundError if change in ("none", "json") else ValueError):
        regions.read_masks(tmp_path / "m.npy", SPEC.shape)


def test_pickled_masks_are_rejected(tmp_path):
    np.save(tmp_path / "m.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with raising("m.npy"):
        regions.read_masks(tmp_path / "m.npy", SPEC.shape)


def average():
    """Landmarks of a plain face: a contour from ear to ear, and what lies inside it,
    about a sphere's front.
    """
    t = np.interp(range(33), [0, 8, 24, 32], np.radians([150, 180, 360, 390]))
    contour = np.stack([0.15 * np.cos(t), -0.02 + 0.16 * np.sin(t)], axis=1)
    brow = np.stack([np.linspace(-0.09, -0.02, 9), np.full(9, 0.06)], axis=1)
    bridge = np.stack([np.zeros(4), np.linspace(0.03, -0.02, 4)], axis=1)
    base = np.stack([np.linspace(-0.025, 0.025, 5), np.full(5, -0.045)], axis=1)

    def ring(x, y, a, b, n):
        w = np.linspace(0, 2 * np.pi, n, endpoint=False)
        return np.stack([x + a * np.cos(w), y + b * np.sin(w)], axis=1)

    parts = [
        contour,
        brow,
        brow * [-1, 1],
        bridge,
        base,
        ring(-0.055, 0.02, 0.025, 0.012, 8),
        ring(0.055, 0.02, 0.025, 0.012, 8),
        ring(0, -0.09, 0.04, 0.02, 12),
        ring(0, -0.09, 0.03, 0.01, 8),
        np.array([[-0.055, 0.02], [0.055, 0.02]]),
    ]
    flat = np.concatenate(parts)
    return np.concatenate([flat, 0.22 - 4 * (flat[:, :1] ** 2 + 0.3 * flat[:, 1:] ** 2)], axis=1)


def test_landmark_partition_has_twelve_regions():
    partition = regions.landmark_partition(average(), SlabSpec(resolution=128))
    assert len(partition.names) == 12 and min(partition.counts()) > 0 and partition.names[-1] == "background"
    assert {name for name, _ in regions.GROUPS} <= set(partition.names)


def test_the_whole_head_has_eight_parts_and_nothing_is_left_over():
    points = average()
    spec = SlabSpec(resolution=128)
    result = regions.head_partition(points, spec)
    assert len(set(result.names)) == 8
    _, crown, neck, _, left, right, face, _ = result.names
    assert min(result.counts()[1:]) > 0 and sum(result.counts()) == result.labels.numel()
    at = spec.points().double().flatten(0, 2)  # [D H W, 3]
    part = {name: at[result.labels.flatten() == i] for i, name in enumerate(result.names)}
    assert "left" in left and part[left][:, 0].max() < points[:, 0].min()
    assert "right" in right and part[right][:, 0].min() > points[:, 0].max()
    assert "neck" in neck and part[neck][:, 1].max() < points[16, 1] < part[face][:, 1].min() + 0.02
    assert part[crown][:, 1].min() > points[33:51, 1].max()
    fine = regions.head_partition(points, SlabSpec.cube(256))
    nearest = ((torch.from_numpy(points) + 0.5) * 255).round().long()
    held = {fine.names[fine.labels[z, y, x]] for x, y, z in nearest[33:].tolist()}  # brows, nose, eyes, lips
    assert held == {face}


@pytest.fixture(scope="module")
def head():
    return people.heads_from_latents(latents([3], people.LATENT))[0]


def test_every_vertex_of_a_head_has_a_part():
    parts = regions.part_of_vertices()
    basis = people.load_basis()
    assert np.bincount(parts, minlength=len(regions.PARTS)).min() > 20
    place = {name: basis.mean[parts == i] for i, name in enumerate(regions.PARTS)}
    assert (
        place["back"][:, 2].max() < 0.03
        and place["face"][:, 2].min() > 0
        and place["torso"][:, 1].max() < place["lips"][:, 1].min()
    )
    assert np.abs(place["ears"][:, 0]).min() > np.abs(place["lips"][:, 0]).max()


def test_voxels_belong_to_the_part_of_the_nearest_vertex(head):
    result = regions.people_partition(head, SPEC)
    assert result.names == regions.PARTS and sum(result.counts()) == result.labels.numel()
    at = SPEC.points()
    rear = at[..., 2] < -0.15
    inside = (at[..., 1].abs() < 0.1) & (at[..., 0].abs() < 0.03)
    assert {regions.PARTS[i] for i in result.labels[rear & inside].unique().tolist()} <= {"back", "neck"}
    change = torch.randn(2, *SPEC.shape, generator=torch.Generator().manual_seed(0))
    # what the parts add up to
    assert torch.allclose(result.sums(change).sum(dim=-1), change.double().sum(dim=(1, 2, 3)))


def test_back_projection():
    grid = np.stack(np.meshgrid(np.linspace(-1, 1, 8), np.linspace(1, -1, 8)), axis=-1)
    points = np.concatenate([grid, np.full((8, 8, 1), 0.3)], axis=-1)
    valid = np.ones((8, 8), dtype=bool)
    valid[:, 7] = False
    pixels = np.full((regions.COUNT, 2), 8.0)  # of a picture with 16 pixels per edge: the middle
    pixels[1] = [16, 1]  # beside the head: the nearest valid pixel stands for it
    result = regions.back_project(pixels, 16, points, valid)
    np.testing.assert_allclose(result[1], points[0, 6])
    assert np.abs(result[0][:2]).max() < 0.2 and result[0][2] == 0.3
    with raising("0.0%", "--regions=boxes"):
        regions.back_project(pixels, 16, points, np.zeros((8, 8), dtype=bool))


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ({"points": []}, ["image_size"]),
        ({"image_size": 0, "points": []}, ["image_size"]),
        ({"image_size": 64, "points": [[1, 2]]}, ["98"]),
        ({"image_size": 64, "points": [[1, 200]] * 98}, ["0..64"]),
        ({"image_size": 64, "seeds": {"x": [[1, 2]] * 98}}, ["seeds", "'x'"]),
    ],
)
def test_wrong_landmarks_are_named(tmp_path, values, names):
    (tmp_path / "l.json").write_text(json.dumps(values))
    with raising("l.json", *names):
        regions.read_landmarks(tmp_path / "l.json")


def test_landmarks_by_seed(tmp_path):
    (tmp_path / "l.json").write_text(json.dumps({"image_size": 64, "seeds": {"5": [[1, 2]] * 98}}))
    result = regions.read_landmarks(tmp_path / "l.json")
    assert result.landmarks_of_seed(5).shape == (98, 2)
    with raising("--landmarks", "seed 6", "5"):
        result.landmarks_of_seed(6)
