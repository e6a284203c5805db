"""Faces of rendered heads with known cameras are found where they are, and nothing else is found."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from eg3d_rlhf.models.face.finder import (
    Face,
    FaceFinder,
    Pyramid,
    Square,
    canonical_face,
    load_face_finder,
)
from tests.models.heads_in_images import (
    HEADS,
    VIEWS,
    background,
    eyes_in_image,
    paste,
    render,
)
from tests.rejections import raising

FRONTAL = render(1, 0)


@pytest.fixture(scope="module")
def finder() -> FaceFinder:
    return load_face_finder()


def eyes(face: Face) -> np.ndarray:
    """Return the centres of both eyes, [2, 2], each the mean of four landmarks."""
    return np.stack(
        [face.landmarks[points, :2].mean(axis=0) for points in ([33, 133, 159, 145], [362, 263, 386, 374])]
    )


def check_view(finder: FaceFinder, head: int, yaw: float, pitch: float) -> None:
    """Assert that one face is found in a view, and that its eyes are where the mesh has them."""
    (face,) = finder.find(render(head, yaw, pitch))
    assert face.score >= 0.6 and face.quarter_turns == 0
    # In pixels of 256. The mesh has centres of eyeballs and not of lids, which differ more from the side.
    tolerance = 4 if yaw == 0 else 8
    assert np.abs(eyes(face) - eyes_in_image(head, yaw, pitch)).max() < tolerance, (head, yaw, pitch)


@pytest.mark.parametrize("yaw", [-60, -30, 0, 60])
def test_a_head_is_found_with_its_eyes(finder, yaw):
    check_view(finder, 1, yaw, 0)


@pytest.mark.long
@pytest.mark.parametrize("head", range(HEADS))
def test_heads_are_found_in_all_views_up_to_60_degrees(finder, head):
    """These are 78 views in all."""
    for yaw, pitch in VIEWS:
        check_view(finder, head, yaw, pitch)


def test_landmarks_have_a_depth_towards_the_camera(finder):
    """From the front, the tip of the nose is nearest, and depths agree with those of the canonical face."""
    (face,) = finder.find(FRONTAL)
    canonical = canonical_face()
    pixels_per_cm = np.ptp(face.landmarks[:, 0]) / np.ptp(canonical[:, 0])
    assert face.landmarks[4, 2] < np.median(face.landmarks[:, 2])
    assert np.corrcoef(face.landmarks[:, 2], -canonical[:, 2])[0, 1] > 0.9
    depth_scale = np.std(face.landmarks[:, 2]) / np.std(canonical[:, 2]) / pixels_per_cm
    assert 0.6 < depth_scale < 1.4


def test_the_canonical_face_is_symmetric_in_cm_with_y_upwards():
    points = canonical_face()
    assert points.shape == (468, 3) and points.dtype == np.float64
    left_corner, right_corner, nose, chin, forehead = points[[33, 263, 4, 152, 10]]
    assert left_corner[0] < 0 < right_corner[0] and forehead[1] > nose[1] > chin[1]
    assert nose[2] == pytest.approx(points[:, 2].max(), abs=0.1)
    np.testing.assert_allclose(left_corner * [-1, 1, 1], right_corner, atol=1e-4)
    assert 8 < right_corner[0] - left_corner[0] < 10


@pytest.mark.parametrize("edge", [100, 300, 1100])
def test_a_face_is_found_at_any_size_and_place(finder, edge):
    scene = paste(background("blobs", 700, 900, seed=edge), FRONTAL, (430, 330), edge)
    (face,) = finder.find(scene)
    scale = edge / FRONTAL.shape[0]
    (alone,) = finder.find(FRONTAL)
    expected = (alone.landmarks[:, :2] - FRONTAL.shape[0] / 2) * scale + [430, 330]
    # 3 % of the face's width; the background is another one, and small images are blurred.
    assert np.abs(face.landmarks[:, :2] - expected).mean() < 0.03 * face.width
    assert face.box == (*face.landmarks[:, :2].min(0), *face.landmarks[:, :2].max(0))


@pytest.mark.parametrize("degrees", [30, 90, 150, 180, 270])
def test_a_rotated_face_has_rotated_landmarks(finder, degrees):
    scene = background("gradient", 600, 700)
    upright, rotated = (
        finder.find(paste(scene, FRONTAL, (350, 300), 400, angle))[0] for angle in (0, degrees)
    )
    angle = math.radians(degrees)
    # Counter-clockwise in the image, where y points downwards.
    rotation = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    expected = (upright.landmarks[:, :2] - [350, 300]) @ rotation.T + [350, 300]
    assert np.abs(rotated.landmarks[:, :2] - expected).mean() < 0.02 * upright.width
    # The depth does not depend on the rotation in the image.
    assert np.abs(rotated.landmarks[:, 2] - upright.landmarks[:, 2]).mean() < 0.04 * upright.width
    # An image that was turned counter-clockwise needs the rest of a full turn.
    assert rotated.quarter_turns == -round(degrees / 90) % 4


def test_positions_are_mapped_back_from_all_orientations(finder):
    """The detector sees the face at the same place, far from the image's middle, in all orientations."""
    scene = paste(background("grey", 330, 460), FRONTAL, (340, 110), 200)
    canvases = finder._canvases(scene, Pyramid(scene))
    for quarter_turns in range(4):
        boxes = finder._candidates(scene.shape[:2], canvases, quarter_turns).boxes
        centre = (boxes[0, :2] + boxes[0, 2:]) / 2
        assert np.abs(centre - [340, 118]).max() < 30, quarter_turns


def test_two_faces_are_sorted_by_width(finder):
    scene = paste(background("noise", 600, 800), FRONTAL, (180, 200), 200)
    scene = paste(scene, render(2, 30), (560, 350), 400)
    large, small = finder.find(scene)
    assert large.width > small.width
    assert abs(np.mean(large.box[::2]) - 560) < 100 and abs(np.mean(small.box[::2]) - 180) < 50


@pytest.mark.parametrize("kind", ["noise", "blobs", "gradient", "grey"])
def test_there_is_no_face_without_a_face(finder, kind):
    assert finder.find(background(kind, 480, 640, seed=4)) == []


@pytest.mark.parametrize("shape", [(1, 1), (1, 900), (700, 3)])
def test_thin_images_have_no_face(finder, shape):
    assert finder.find(background("noise", *shape)) == []


def test_results_repeat_and_the_image_is_unchanged(finder):
    scene = paste(background("noise", 300, 300), FRONTAL, (150, 150), 300)
    copy = scene.copy()
    first = finder.find(scene)
    second = load_face_finder().find(scene[:, ::-1][:, ::-1])
    assert np.array_equal(scene, copy)
    assert np.array_equal(first[0].landmarks, second[0].landmarks)


def test_other_images_are_rejected(finder):
    for image in (
        np.zeros((8, 8), np.uint8),
        np.zeros((8, 8, 4), np.uint8),
        np.zeros((8, 8, 3), np.float32),
        np.zeros((0, 8, 3), np.uint8),
    ):
        with raising(str(list(image.shape))):
            finder.find(image)


def test_a_crop_of_the_pyramid_is_the_mean_of_the_pixels_that_it_covers():
    random = np.random.default_rng(0)
    image = random.integers(0, 256, (2100, 1600, 3), dtype=np.uint8)
    pyramid = Pyramid(image)
    # Reduced by 8, at the corner of a strip. The reference is the mean over blocks.
    crop = pyramid.crop(Square(np.array([800.0, 1024.0]), 1024.0, 0.0), 128)
    blocks = image[512:1536, 288:1312].reshape(128, 8, 128, 8, 3).mean(axis=(1, 3))
    assert np.abs(crop - blocks).max() <= 2  # each of three halvings rounds
    # In the size of the image, pixels are copied; outside the image they are black.
    crop = pyramid.crop(Square(np.array([4.0, 4.0]), 16.0, 0.0), 16)
    assert np.array_equal(crop[4:, 4:], image[:12, :12]) and not crop[:4].any() and not crop[:, :4].any()
    # A square that is rotated by a quarter turn has its upper edge along the image's y axis.
    crop = pyramid.crop(Square(np.array([50.0, 60.0]), 20.0, math.pi / 2), 20)
    assert np.abs(crop.astype(int) - np.rot90(image[50:70, 40:60])).max() <= 1
    assert not pyramid.crop(Square(np.array([-900.0, 60.0]), 20.0, 0.0), 20).any()
    assert pyramid.resize(40, 30).shape == (30, 40, 3)


@pytest.mark.long
def test_a_large_image_needs_little_memory_beside_itself(tmp_path):
    """The copies of an image of 47 megapixels take a third of its memory, and the search adds a constant."""
    path = tmp_path / "head.npy"
    np.save(path, FRONTAL)
    # The largest memory of a process is that of its imports, so the count is reset here.
    program = (
        "import pathlib, re, sys, numpy, torch\n"
        "from eg3d_rlhf.models.face.finder import load_face_finder\n"
        "def bytes_of(name):\n"
        "    status = pathlib.Path('/proc/self/status').read_text()\n"
        "    return 1024 * int(re.search(rf'{name}:\\s+(\\d+) kB', status)[1])\n"
        "torch.set_num_threads(1)\n"
        "finder = load_face_finder()\n"
        "head = numpy.load(sys.argv[1])\n"
        "finder.find(head)\n"
        "image = head.repeat(30, 0).repeat(24, 1)\n"
        "pathlib.Path('/proc/self/clear_refs').write_text('5')\n"
        "before = bytes_of('VmRSS')\n"
        "faces = finder.find(image)\n"
        "print(len(faces), (bytes_of('VmHWM') - before) / image.nbytes)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True
    )
    count, share = (float(number) for number in done.stdout.split())
    print(f"memory of the search: {share:.2f} of the image's bytes")
    assert count == 1 and 0.25 < share < 0.6, done.stdout


@pytest.mark.gpu
def test_networks_run_on_the_device_of_the_finder():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    (on_cpu,) = load_face_finder().find(FRONTAL)
    (on_gpu,) = load_face_finder("cuda").find(FRONTAL)
    assert np.abs(on_cpu.landmarks - on_gpu.landmarks).max() < 0.5
