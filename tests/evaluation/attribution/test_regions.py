"""Regions: the boxes' first match, masks, landmarks, and landmarks of the procedural heads."""

import json

import numpy as np
import pytest
import torch

from eg3d_rlhf.core.spec import SlabSpec
from eg3d_rlhf.evaluation.attribution import regions
from training.heads.family import SHAPE_COUNT
from training.heads.sdf import head_sdf

SPEC = SlabSpec(resolution=48)


def region_at(partition, x, y, z):
    depth, height, width = partition.labels.shape
    index = [round(v * (n - 1)) for v, n in ((z, depth), (y, height), (x, width))]
    return partition.names[int(partition.labels[tuple(index)])]


@pytest.mark.parametrize(
    ("point", "name"),
    [((0.5, 0.79, 0.6), "brow"), ((0.26, 0.6, 0.7), "left eye orbit"), ((0.74, 0.6, 0.7), "right eye orbit"), ((0.5, 0.5, 0.8), "nose"),
     ((0.2, 0.4, 0.6), "left cheek"), ((0.8, 0.4, 0.6), "right cheek"), ((0.5, 0.3, 0.7), "mouth"), ((0.5, 0.1, 0.6), "chin and jaw"),
     ((0.5, 0.5, 0.1), regions.OTHER), ((0.3, 0.71, 0.6), "brow"), ((0.33, 0.56, 0.7), "left eye orbit")],
)  # fmt: skip
def test_face_boxes(point, name):
    assert region_at(regions.face_partition(SlabSpec(resolution=128)), *point) == name


def test_first_match_wins_and_nothing_is_left_out():
    partition = regions.face_partition(SlabSpec())
    assert sum(partition.counts()) == 128 * 141 * 129 and min(partition.counts()) > 0 and len(partition.names) == 9
    box = (0, 1, 0, 1, 0, 1)
    twice = regions.from_boxes([("first", box), ("second", box)], regions.unit_coordinates(SPEC))
    assert twice.counts() == [np.prod(SPEC.shape), 0, 0]


def test_left_and_right_mirror():
    partition = regions.face_partition(SPEC)
    other = [partition.names.index(n.replace("left", "*").replace("right", "left").replace("*", "right")) for n in partition.names]
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
    ("change", "text"),
    [("shape", r"\[D, H, W\]"), ("float", "integers"), ("name", "name for each label.*3"), ("json", "expected the regions' names"),
     ("one", "two regions"), ("none", "got nothing")],
)
def test_wrong_masks_are_named(tmp_path, change, text):
    volume = np.zeros(SPEC.shape, dtype=np.float32 if change == "float" else np.int64)
    if change != "one":
        volume[:, :5] = 3
    if change != "none":
        np.save(tmp_path / "m.npy", volume[1:] if change == "shape" else volume)
    if change != "json":
        (tmp_path / "m.json").write_text(json.dumps({"0": "a"} if change == "name" else {"0": "a", "3": "b"}))
    with pytest.raises((ValueError, FileNotFoundError), match=text):
        regions.read_masks(tmp_path / "m.npy", SPEC.shape)


def test_pickled_masks_are_refused(tmp_path):
    np.save(tmp_path / "m.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="npy"):
        regions.read_masks(tmp_path / "m.npy", SPEC.shape)


def average():
    return regions.head_landmarks(torch.zeros(1, SHAPE_COUNT))[0].double().numpy()


def test_landmark_partition_has_twelve_regions():
    partition = regions.landmark_partition(average(), SlabSpec(resolution=128))
    assert len(partition.names) == 12 and min(partition.counts()) > 0 and partition.names[-1] == "background"
    assert {name for name, _ in regions.GROUPS} <= set(partition.names)


def test_the_whole_head_has_eight_parts_and_nothing_is_left_over():
    points, spec = average(), SlabSpec(resolution=128)
    found = regions.head_partition(points, spec)
    assert found.names == (
        "front of camera", "crown", "neck and chest", "shoulders", "left side", "right side", "face", "back of the head",
    )
    assert min(found.counts()[1:]) > 0 and sum(found.counts()) == found.labels.numel()
    at = spec.points().double().flatten(0, 2)  # [D H W, 3]
    part = {name: at[found.labels.flatten() == i] for i, name in enumerate(found.names)}
    assert part["left side"][:, 0].max() < points[:, 0].min() and part["right side"][:, 0].min() > points[:, 0].max()
    assert part["neck and chest"][:, 1].max() < points[16, 1] < part["face"][:, 1].min() + 0.02
    assert part["crown"][:, 1].min() > points[33:51, 1].max()
    face = regions.head_partition(points, SlabSpec.cube(256))
    nearest = ((torch.from_numpy(points) + 0.5) * 255).round().long()
    held = {face.names[face.labels[z, y, x]] for x, y, z in nearest[33:].tolist()}  # brows, nose, eyes, lips
    assert held == {"face"}


def test_head_landmarks_lie_on_the_head_and_move_with_its_shape():
    shape = torch.zeros(2, SHAPE_COUNT)
    shape[1, 5] = 1.0  # nose_length
    points = regions.head_landmarks(shape)
    assert points.shape == (2, regions.COUNT, 3)
    assert head_sdf(points, shape).abs().amax() < 5e-3
    assert points[1, 54, 2] > points[0, 54, 2] + 0.01
    assert (points[0, 60:68, 0] < 0).all() and (points[0, 68:76, 0] > 0).all()
    assert points[0, 33:51, 1].min() > points[0, 60:76, 1].max() > points[0, 57, 1] > points[0, 76:96, 1].max() > points[0, 16, 1]


def test_fitted_landmarks_find_the_family_member():
    spec = SlabSpec.cube(48)
    shape = torch.zeros(1, SHAPE_COUNT)
    shape[0, 8], shape[0, 4] = 0.6, -0.5
    points = spec.points().reshape(1, -1, 3)
    sigma = (10 - 400 * head_sdf(points, shape)).reshape(1, *spec.shape)
    found = regions.fitted_landmarks(sigma, spec)
    truth = regions.head_landmarks(shape).numpy()
    assert np.linalg.norm(found - truth, axis=-1).mean() < 0.012


def test_heads_without_surface_are_named():
    with pytest.raises(ValueError, match="--regions=boxes"):
        regions.fitted_landmarks(torch.zeros(1, 16, 16, 16), SlabSpec.cube(16))


def test_back_projection():
    grid = np.stack(np.meshgrid(np.linspace(-1, 1, 8), np.linspace(1, -1, 8)), axis=-1)
    points = np.concatenate([grid, np.full((8, 8, 1), 0.3)], axis=-1)
    valid = np.ones((8, 8), dtype=bool)
    valid[:, 7] = False
    pixels = np.full((regions.COUNT, 2), 8.0)  # of a picture with 16 pixels per edge: the middle
    pixels[1] = [16, 1]  # beside the head: the nearest valid pixel stands for it
    found = regions.back_project(pixels, 16, points, valid)
    np.testing.assert_allclose(found[1], points[0, 6])
    assert np.abs(found[0][:2]).max() < 0.2 and found[0][2] == 0.3
    with pytest.raises(ValueError, match="surface in 0.0%"):
        regions.back_project(pixels, 16, points, np.zeros((8, 8), dtype=bool))


@pytest.mark.parametrize(
    ("values", "text"),
    [({"points": []}, "image_size"), ({"image_size": 0, "points": []}, "image_size"),
     ({"image_size": 64, "points": [[1, 2]]}, "98"),
     ({"image_size": 64, "points": [[1, 200]] * 98}, r"inside 0..64"),
     ({"image_size": 64, "seeds": {"x": [[1, 2]] * 98}}, "seeds as keys")],
)
def test_wrong_landmarks_are_named(tmp_path, values, text):
    (tmp_path / "l.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=text):
        regions.read_landmarks(tmp_path / "l.json")


def test_landmarks_by_seed(tmp_path):
    (tmp_path / "l.json").write_text(json.dumps({"image_size": 64, "seeds": {"5": [[1, 2]] * 98}}))
    found = regions.read_landmarks(tmp_path / "l.json")
    assert found.of(5).shape == (98, 2)
    with pytest.raises(ValueError, match="--landmarks.*seed 6"):
        found.of(6)
