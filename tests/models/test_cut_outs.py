"""Files of images with transparent backgrounds: which are read, and which are listed as unusable."""

import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from eg3d_rlhf.models import image_preprocessing
from eg3d_rlhf.models.image_preprocessing import on_white, opencv, over_white, read_cut_out, usable_cut_outs
from tests.rejections import raising


def cut_out(size=(60, 40), box=(10, 5, 30, 35)) -> Image.Image:
    image = Image.new("RGBA", size, (0, 0, 0, 0))
    image.paste((200, 100, 50, 255), box)
    return image


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@pytest.mark.parametrize("suffix", [".png", ".webp", ".tif"])
def test_alpha_is_turned_with_the_colours(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    options = {"lossless": True} if suffix == ".webp" else {}
    cut_out().save(path, exif=turned(8), **options)
    image = read_cut_out(path, lambda image: image)
    assert image.mode == "RGBA" and image.size == (40, 60)
    # a quarter turn to the left: x becomes the distance from the bottom
    assert image.getchannel("A").getbbox() == (5, 30, 35, 50)
    assert image.getpixel((20, 40)) == (200, 100, 50, 255)


def test_all_faulty_images_are_listed_and_files_of_other_kinds_left_out(tmp_path):
    cut_out().save(tmp_path / "good.png")
    cut_out().convert("RGB").save(tmp_path / "opaque.png")
    Image.new("RGBA", (20, 20), (9, 9, 9, 0)).save(tmp_path / "clear.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "good.png").read_bytes()[:60])
    cut_out().save(tmp_path / "moving.webp", save_all=True, append_images=[cut_out(box=(0, 0, 5, 5))])
    with raising("opaque.png", "clear.png", "half.png", "3"):
        usable_cut_outs(sorted(tmp_path.iterdir()))
    for name in ("opaque.png", "clear.png", "half.png"):
        (tmp_path / name).unlink()
    paths, messages = usable_cut_outs(sorted(tmp_path.iterdir()))
    assert [path.name for path in paths] == ["good.png"]
    assert len(messages) == 1 and "moving.webp" in messages[0]


@pytest.mark.parametrize("block_values", [1, 300, 1 << 20])
def test_blocks_of_rows_do_not_change_a_value(monkeypatch, block_values):
    pixels = np.random.default_rng(1).integers(0, 256, (37, 23, 4), np.uint8)
    cases = [
        ("area", (20, 11)),
        ("area", (50, 11)),
        ("area", (70, 60)),
        ("cubic", (20, 40)),
        ("cubic", (5, 7)),
    ]
    monkeypatch.setattr(image_preprocessing, "_BLOCK_VALUES", 1 << 30)
    whole = [opencv(pixels, size, how) for how, size in cases] + [over_white(pixels)]
    monkeypatch.setattr(image_preprocessing, "_BLOCK_VALUES", block_values)
    parts = [opencv(pixels, size, how) for how, size in cases] + [over_white(pixels)]
    assert all(np.array_equal(a, b) for a, b in zip(whole, parts, strict=True))


@pytest.mark.long
def test_a_cut_out_of_fifty_megapixels_needs_less_than_a_gigabyte(tmp_path):
    with Image.new("RGBA", (8000, 6200), (0, 0, 0, 0)) as image:
        image.paste((200, 100, 50, 255), (1000, 1000, 7000, 5000))
        image.save(tmp_path / "large.png", compress_level=1)
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from eg3d_rlhf.models.image_preprocessing import on_white, read_cut_out\n"
        "image, mask = read_cut_out(Path(sys.argv[1]), lambda image: on_white(image, 224, 0.15))\n"
        "print(image.shape, Path('/proc/self/status').read_text())"
    )
    output = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "large.png"], capture_output=True, text=True, check=True
    ).stdout
    kilobytes = re.search(r"VmHWM:\s*(\d+) kB", output)
    assert "(224, 224, 3)" in output and kilobytes is not None and int(kilobytes[1]) < 1e6


def test_an_upright_cut_out_is_cropped_as_before(tmp_path):
    cut_out().save(tmp_path / "plain.png")
    cut_out().transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=turned(6))
    plain = read_cut_out(tmp_path / "plain.png", lambda image: on_white(image, 32, 0.15))
    upright = read_cut_out(tmp_path / "turned.png", lambda image: on_white(image, 32, 0.15))
    assert all(np.array_equal(a, b) for a, b in zip(plain, upright, strict=True))
    assert np.array_equal(plain[0], on_white(cut_out(), 32, 0.15)[0])
