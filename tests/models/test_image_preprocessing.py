"""Cropping and resizing of images. The originals' own pixels are tested in tests/compat/test_family_*.py."""

import numpy as np
import pytest
import torch
from PIL import Image

from eg3d_rlhf.models.image_preprocessing import (
    ObjectCut,
    at_most,
    box_about,
    object_inputs,
    on_black,
    on_black_first,
    on_white,
    opencv,
    over_black,
    place_in_square,
    read_cut_out,
    short_side,
)
from tests.rejections import raising


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).integers(0, 256, shape, dtype=np.uint8)


def shown(box=(20, 10, 60, 50), size=(100, 80)) -> Image.Image:
    """Make a coloured box on a transparent background."""
    image = Image.new("RGBA", size, (0, 0, 0, 0))
    image.paste((200, 100, 50, 255), box)
    return image


@pytest.mark.parametrize("how", ["area", "cubic", "nearest"])
@pytest.mark.parametrize("size", [(20, 31), (5, 3), (37, 50), (8, 24)])
def test_resizing_keeps_what_is_even_and_both_axes_alike(how, size):
    even = np.full((16, 24, 4), 77, np.uint8)
    assert (opencv(even, size, how) == 77).all() and opencv(even, size, how).shape == (*size, 4)
    pixels = noise(16, 24)
    transposed = opencv(pixels.T.copy(), size[::-1], how).T
    # columns are first: rounded by another order
    assert np.abs(opencv(pixels, size, how).astype(int) - transposed).max() <= 1
    assert np.array_equal(opencv(pixels, (16, 24), how), pixels)


def test_area_is_the_mean_of_whole_blocks_and_nearest_their_first_pixel():
    pixels = noise(12, 20, 3)
    blocks = pixels.reshape(4, 3, 5, 4, 3)
    assert np.abs(opencv(pixels, (4, 5), "area") - blocks.mean((1, 3))).max() <= 0.5 + 1e-4
    assert np.array_equal(opencv(pixels, (4, 5), "nearest"), blocks[:, 0, :, 0])


def test_cubic_goes_through_a_straight_line_within_the_border():
    line = np.linspace(0, 200, 21).astype(np.uint8)[None].repeat(3, 0)
    wide = opencv(line, (3, 41), "cubic")[1].astype(int)
    assert (np.abs(np.diff(wide[4:-4]) - 5) <= 1).all()


def test_palettes_with_transparency_are_accepted_and_opaque_images_rejected_by_name(tmp_path):
    shown().quantize(16).save(tmp_path / "palette.png")
    assert Image.open(tmp_path / "palette.png").mode == "P"
    assert read_cut_out(tmp_path / "palette.png", lambda image: image.getchannel("A").getbbox()) == (
        20,
        10,
        60,
        50,
    )
    shown().convert("LA").save(tmp_path / "grey.png")
    assert read_cut_out(tmp_path / "grey.png", lambda image: image.mode) == "RGBA"
    shown().convert("RGB").save(tmp_path / "opaque.png")
    with raising("opaque.png", "(RGB)"):
        read_cut_out(tmp_path / "opaque.png", lambda image: image)
    shown((3, 3, 4, 4)).save(tmp_path / "dot.png")
    for cut in (
        lambda image: on_white(image, 8, 0.15),
        lambda image: on_black(image, 8),
        lambda image: on_black_first(image, (8,)),
    ):
        with raising("dot.png"):
            read_cut_out(tmp_path / "dot.png", cut)


def test_the_box_stands_in_the_middle_of_a_white_square():
    pixels, mask = on_white(shown(), 512, 0.15)
    rows, columns = (np.flatnonzero((mask > 0).any(axis)) for axis in (1, 0))
    assert pixels.shape == (512, 512, 3) and pixels[0, 0].tolist() == [255, 255, 255]
    assert abs(len(rows) / 512 - 0.85) < 0.02 and abs(len(columns) / 512 - 0.85) < 0.02
    assert abs(rows.mean() - 255.5) < 4 and abs(columns.mean() - 255.5) < 4
    assert np.abs(pixels[256, 256].astype(int) - (200, 100, 50)).max() <= 1
    assert place_in_square(np.asarray(shown()), 0.5).shape == (100, 100, 4)


def test_over_black_before_resizing_differs_from_after_it():
    image = shown((20, 10, 60, 50))
    first = on_black_first(image, (16,))[0]
    last = on_black(image, 16, margin=1.0)
    assert first.shape == last.shape == (3, 16, 16)
    assert at_most(image, 50).size == (50, 40) and at_most(image, 100) is image
    assert over_black(image)[0, 0].tolist() == [0, 0, 0] and over_black(image)[20, 30].tolist() == [
        200,
        100,
        50,
    ]


def test_the_shorter_side_and_the_middle():
    x = torch.rand(1, 3, 30, 20)
    assert torch.equal(short_side(x, 20), x[..., 5:25, :]) and short_side(x, 8).shape == (1, 3, 8, 8)


@pytest.mark.parametrize(
    ("place", "crop"),  # pixels shown: first and last of x, of y; and the square cut out, by hand
    [
        ((40, 59, 20, 39), (38, 18, 60, 40)),
        ((0, 30, 5, 14), (-3, -8, 33, 28)),
        ((10, 31, 7, 8), (8, -4, 32, 20)),
    ],
)
def test_the_square_and_its_pixels_are_those_of_trellis(place, crop):
    left, right, top, bottom = place
    pixels = np.zeros((60, 100, 4), np.uint8)
    y, x = np.mgrid[:60, :100]
    pixels[..., :3] = np.stack([2 * x + 20, 4 * y, 128 + 60 * np.sin(x / 9) * np.cos(y / 7)], -1)
    pixels[top : bottom + 1, left : right + 1, 3] = 205 + (x + y)[top : bottom + 1, left : right + 1] % 50
    # not quite opaque enough
    pixels[max(top - 1, 0), left : right + 1, 3] = np.maximum(
        pixels[max(top - 1, 0), left : right + 1, 3], 204
    )
    padded = np.pad(pixels, ((60, 60), (60, 60), (0, 0)))
    x0, y0, x1, y1 = (v + 60 for v in crop)
    square = Image.fromarray(padded[y0:y1, x0:x1]).resize((518, 518), Image.Resampling.LANCZOS)
    rgb, alpha = (
        np.asarray(part, np.float32) / np.float32(255)
        for part in (square.convert("RGB"), square.getchannel("A"))
    )
    want = np.floor(rgb * alpha[..., None] * np.float32(255)) / np.float32(255)
    got = on_black(Image.fromarray(pixels), 518)
    assert np.array_equal(got.permute(1, 2, 0).numpy(), want.astype(np.float32)) and got.max() > 0.5


def test_an_object_is_cut_out_by_its_mask_with_its_places():
    pixels = noise(20, 30, 4)
    pixels[..., 3] = 0
    pixels[6:13, 8:19, 3] = 255
    points = torch.full([20, 30, 3], float("nan"))
    points[4:, :, :] = torch.rand(16, 30, 3) + torch.tensor([0.0, 0.0, 2.0])
    cut = ObjectCut(size=12)
    inputs = object_inputs(pixels, points, cut)
    assert all(
        inputs[name].shape == (channels, 12, 12)
        for name, channels in (("image", 3), ("mask", 1), ("pointmap", 3))
    )
    assert box_about(torch.from_numpy(pixels[..., 3]), 1.2) == (3, 15, 7, 19)
    assert inputs["mask"].mean() > 0.4 and inputs["rgb_image_mask"].mean() < 0.2
    assert inputs["pointmap_shift"][2] > 2 and inputs["rgb_pointmap"].isnan().any()
    unit, shift = (inputs[f"pointmap_{name}"] for name in ("scale", "shift"))
    seen = inputs["pointmap"].flatten(1) * unit[:, None] + shift[:, None]
    assert seen[:, seen.isfinite().all(0)][2].median() == pytest.approx(2.5, abs=0.2)
    assert "pointmap" not in object_inputs(pixels, None, cut)
    with raising("mask"):
        object_inputs(pixels * 0, points, cut)
