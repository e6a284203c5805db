"""Crops of photographs whose pixels state their own position."""

import numpy as np
import PIL.Image
import pytest

from eg3d_rlhf.photographs.crops import cut_crop, outside_share
from eg3d_rlhf.photographs.face_geometry import CropFrame
from tests.rejections import raising

WIDTH = 400
HEIGHT = 300


def random_photograph() -> PIL.Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    return PIL.Image.fromarray(pixels)


def test_a_crop_of_the_same_size_copies_the_pixels():
    photograph = random_photograph()
    crop = cut_crop(photograph, CropFrame(centre=(150, 140), width=128), 128)
    assert np.array_equal(crop, np.array(photograph)[76:204, 86:214])


def test_a_quarter_turn_copies_the_pixels():
    photograph = random_photograph()
    crop = cut_crop(photograph, CropFrame(centre=(150, 140), width=128, angle=np.pi / 2), 128)
    # The x axis of the crop points down in the photograph.
    assert np.abs(crop.astype(int) - np.rot90(np.array(photograph)[76:204, 86:214], 1)).max() <= 1


@pytest.mark.parametrize("width", [90.0, 128.0, 230.0])
def test_pixels_of_a_crop_come_from_their_place(width):
    y, x = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    ramp = PIL.Image.fromarray(np.stack([x / 2, y / 2, 0 * x], axis=-1).round().astype(np.uint8))
    frame = CropFrame(centre=(190.0, 150.0), width=width, angle=0.3)
    crop = cut_crop(ramp, frame, 128).astype(float)
    middles = np.arange(128) + 0.5
    expected = frame.to_photograph(np.stack(np.meshgrid(middles, middles), axis=-1), 128)
    error = crop[..., :2] * 2 - expected
    assert np.abs(error.mean(axis=(0, 1))).max() < 0.05  # no shift, in pixels of the photograph
    assert np.abs(error).max() < 4  # the ramp has steps of 2


def test_a_reduced_crop_is_averaged():
    stripes = PIL.Image.fromarray(np.tile(np.array([[0, 255]], np.uint8), (HEIGHT, WIDTH // 2)))
    crop = cut_crop(stripes, CropFrame(centre=(200, 150), width=256), 64)
    assert crop.shape == (64, 64)
    assert np.abs(crop[8:-8, 8:-8].astype(float) - 127.5).max() < 6


def test_a_crop_is_reflected_outside_of_the_picture():
    photograph = random_photograph()
    crop = cut_crop(photograph, CropFrame(centre=(0, 150), width=128), 128)
    assert np.array_equal(crop[:, :64], crop[:, 64:][:, ::-1])
    assert np.array_equal(crop[:, 64:], np.array(photograph)[86:214, :64])


def test_a_crop_beside_the_picture_is_an_error():
    with raising("400 x 300"):
        cut_crop(random_photograph(), CropFrame(centre=(-500, 150), width=128))


def test_the_share_outside_is_the_area():
    rng = np.random.default_rng(3)
    assert outside_share(CropFrame(centre=(150, 140), width=128), (WIDTH, HEIGHT)) == 0
    assert outside_share(CropFrame(centre=(0, 0), width=128), (WIDTH, HEIGHT)) == pytest.approx(0.75)
    assert outside_share(CropFrame(centre=(-900, 0), width=128), (WIDTH, HEIGHT)) == 1
    for _ in range(5):
        centre = rng.uniform((0, 0), (WIDTH, HEIGHT))
        frame = CropFrame(centre=(centre[0], centre[1]), width=rng.uniform(50, 600), angle=rng.uniform(-3, 3))
        points = frame.to_photograph(rng.uniform(0, 1, (100_000, 2)), 1)
        share = ((points < 0) | (points > (WIDTH, HEIGHT))).any(axis=1).mean()
        assert outside_share(frame, (WIDTH, HEIGHT)) == pytest.approx(share, abs=0.01)
