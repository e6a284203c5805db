"""The reader of image files: orientation, modes, transparency, large and damaged files."""

import io
import subprocess
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps, features

from tests.rejections import raising
from training.image_reading import (
    MAX_PIXELS,
    UnusableImageError,
    read_image,
    skipped_lines,
    split_names,
    upright_size,
)

ORIENTATION = 0x0112


def encoded(image: Image.Image, suffix: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, Image.registered_extensions()[suffix], **options)
    return buffer.getvalue()


def exif(orientation: int) -> Image.Exif:
    block = Image.Exif()
    block[ORIENTATION] = orientation
    return block


def corners(mode: str = "RGB", size: tuple[int, int] = (48, 32)) -> Image.Image:
    """Make an image whose four quarters differ, so that each orientation looks different."""
    image = Image.new("RGB", size, (250, 20, 30))
    half_width = size[0] // 2
    half_height = size[1] // 2
    image.paste((20, 240, 30), (half_width, 0, size[0], half_height))
    image.paste((30, 40, 230), (0, half_height, half_width, size[1]))
    image.paste((120, 120, 120), (half_width, half_height, *size))
    if mode in ("RGBA", "LA"):
        alpha = Image.new("L", size, 0)
        alpha.paste(255, (half_width, 0, size[0], size[1]))
        image.putalpha(alpha)
    return image.convert(mode)


def array(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


# EXIF 2.32, table of tag 0x0112: what has to be done to the stored image
UPRIGHT = {
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.swapaxes(0, 1),
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: np.rot90(stored, 2).swapaxes(0, 1),
    8: lambda stored: np.rot90(stored, 1),
}


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tif", ".avif"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_the_orientation_of_a_photograph_is_applied_in_every_format(tmp_path, suffix, orientation):
    if suffix == ".avif" and not features.check("avif"):
        pytest.skip("Pillow without AVIF")
    for mode in ("RGB", "RGBA", "L"):
        image = corners(size=(48, 32)).convert(mode)
        if suffix == ".jpg" and mode == "RGBA":
            continue
        data = encoded(image, suffix, exif=exif(orientation))
        path = tmp_path / f"{mode}{suffix}"
        path.write_bytes(data)
        want = UPRIGHT[orientation](array(image.convert("RGB")))
        assert upright_size(path) == (want.shape[1], want.shape[0])
        for source in (data, path):
            got = read_image(source, "x", background=None)
            assert got.size == (want.shape[1], want.shape[0])
            # lossy formats blur the borders between the quarters; a wrong orientation differs by 100 and more
            assert np.abs(array(got.convert("RGB")) - want).mean() < 12


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA", "I;16", "P", "1"])
def test_the_orientation_is_applied_in_every_mode_and_with_a_kept_alpha(mode):
    if mode == "I;16":
        pixels = (np.arange(24 * 16).reshape(16, 24) * 150).astype(np.uint16)
        image = Image.fromarray(pixels)
    else:
        image = corners(mode)
    upright = read_image(encoded(image, ".png"), "x", background=None)
    turned = read_image(encoded(image, ".png", exif=exif(6)), "x", background=None)
    assert turned.mode == upright.mode
    assert np.array_equal(array(turned), np.rot90(array(upright), -1))


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif", ".webp", ".jpg"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_images_that_were_right_are_decoded_bitwise_as_before(tmp_path, mode, suffix):
    pixels = np.random.default_rng(3).integers(0, 256, (20, 20, 3), np.uint8)
    data = encoded(Image.fromarray(pixels).convert(mode), suffix)
    (tmp_path / f"a{suffix}").write_bytes(data)
    got = read_image(data, "x")
    with Image.open(io.BytesIO(data)) as stored:
        # WebP has no greyscale
        assert got.mode == stored.mode and np.array_equal(array(got), array(stored))
    assert np.array_equal(array(read_image(tmp_path / f"a{suffix}", "x")), array(got))


@pytest.mark.parametrize(
    ("suffix", "byte_order"), [(".png", "<"), (".tif", "<"), (".tif", ">")], ids=["png", "tif", "tif-big"]
)
def test_sixteen_bits_are_scaled_and_not_clipped(suffix, byte_order):
    values = np.linspace(0, 65535, 400).reshape(20, 20).round().astype(f"{byte_order}u2")
    mode = "I;16B" if byte_order == ">" else "I;16"
    image = Image.frombytes(mode, (20, 20), values.tobytes())
    got = read_image(encoded(image, suffix), "x")
    assert got.mode == "L"
    assert np.array_equal(array(got), np.rint(values.astype(float) / 257).astype(int))


def test_a_tiff_file_of_16_bits_in_which_zero_is_white_is_inverted():
    image = Image.fromarray(np.full((4, 4), 65535 // 4, np.uint16))
    assert array(read_image(encoded(image, ".tif"), "x")).max() == 64
    assert array(read_image(encoded(image, ".tif", tiffinfo={262: 0}), "x")).min() == 191


@pytest.mark.parametrize("mode", ["F", "I"])
def test_values_of_unknown_range_are_rejected_with_the_file_s_name(mode):
    image = Image.fromarray(np.full((4, 4), 0.5, np.float32)).convert(mode)
    with raising("depth.tif", "bits"):
        read_image(encoded(image, ".tif"), "depth.tif")


@pytest.mark.parametrize(
    ("name", "data"),
    {
        "cmyk.jpg": lambda: encoded(corners().convert("CMYK"), ".jpg", quality=95),
        "cmyk.tif": lambda: encoded(corners().convert("CMYK"), ".tif"),
        "palette.png": lambda: encoded(corners().quantize(8), ".png"),
        "palette.gif": lambda: encoded(corners().quantize(8), ".gif"),
        "palette.bmp": lambda: encoded(corners().quantize(8), ".bmp"),
        "rgb.tif": lambda: encoded(corners(), ".tif", compression="tiff_lzw"),
        "ycbcr.tif": lambda: encoded(corners().convert("YCbCr"), ".tif"),
    }.items(),
)
def test_other_modes_become_rgb(name, data):
    got = read_image(data(), name)
    assert got.mode == "RGB" and np.abs(array(got) - array(corners())).mean() < 12


def test_one_bit_becomes_black_and_white():
    bits = Image.fromarray(np.eye(8, dtype=bool))
    got = read_image(encoded(bits, ".png"), "x")
    assert got.mode == "L" and np.array_equal(array(got), 255 * np.eye(8, dtype=int))


def clear_palette() -> bytes:
    """A palette image whose colour 0, a red one, is transparent."""
    image = corners().quantize(4)
    red = image.getpixel((0, 0))
    return encoded(image, ".png", transparency=red)


@pytest.mark.parametrize(
    "data",
    [
        lambda: encoded(corners("RGBA"), ".png"),
        lambda: encoded(corners("LA"), ".png"),
        lambda: encoded(corners("RGBA"), ".webp", lossless=True),
        lambda: encoded(corners("RGBA"), ".tif"),
        lambda: encoded(corners("RGBA"), ".tif", tiffinfo={338: 1}),
        lambda: encoded(corners(), ".png", transparency=(250, 20, 30)),
        lambda: encoded(corners("L"), ".png", transparency=int(corners("L").getpixel((0, 0)))),
        clear_palette,
    ],
    ids=["rgba", "la", "webp", "tif", "premultiplied", "colour", "grey", "palette"],
)
def test_what_is_transparent_shows_the_background_and_no_hidden_colour(data):
    on_white = read_image(data(), "x")
    assert on_white.mode in ("L", "RGB")
    # the upper left quarter is transparent in each of these files
    assert (array(on_white)[:16, :24] == 255).all()
    assert (array(read_image(data(), "x", background="black"))[:16, :24] == 0).all()
    kept = read_image(data(), "x", background=None)
    assert kept.mode in ("LA", "RGBA")
    alpha = array(kept.getchannel("A"))
    assert (alpha[:16, :24] == 0).all() and (alpha[:16, 24:] == 255).all()
    # opaque pixels keep their values
    assert np.array_equal(array(kept)[:16, 24:, :-1].squeeze(), array(on_white)[:16, 24:].squeeze())


def test_partly_transparent_pixels_are_blended_with_alpha_as_weight():
    image = Image.new("RGBA", (4, 4), (100, 0, 200, 64))
    want = np.rint(np.array([100, 0, 200]) * 64 / 255 + 255 * (1 - 64 / 255))
    assert np.abs(array(read_image(encoded(image, ".png"), "x")) - want).max() <= 1


def test_a_transparent_grey_value_of_16_bits():
    pixels = np.full((4, 4), 20000, np.uint16)
    pixels[0] = 300
    data = encoded(Image.fromarray(pixels), ".png")
    # the chunk tRNS of a 16-bit grey image holds one number of 16 bits
    body = b"tRNS" + (300).to_bytes(2, "big")
    chunk = (2).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")
    at = data.index(b"IDAT") - 4
    got = read_image(data[:at] + chunk + data[at:], "x")
    assert got.mode == "L" and (array(got)[0] == 255).all() and (array(got)[1:] == 78).all()


def frames(count: int) -> list[Image.Image]:
    return [Image.new("RGB", (8, 8), (40 * i, 0, 0)) for i in range(count)]


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png", ".tif", ".avif"])
def test_animations_and_pages_are_unusable_and_a_single_frame_is_read(suffix):
    if suffix == ".avif" and not features.check("avif"):
        pytest.skip("Pillow without AVIF")
    first, *others = frames(3)
    data = encoded(first, suffix, save_all=True, append_images=others)
    with raising("a" + suffix, "3", kind=UnusableImageError):
        read_image(data, "a" + suffix)
    assert read_image(encoded(first, suffix, save_all=True), "x").size == (8, 8)


def test_a_tiff_file_with_a_preview_and_a_photograph_of_a_phone_are_one_image(tmp_path):
    preview = Image.new("RGB", (4, 4))
    preview.encoderinfo = {"tiffinfo": {254: 1}}
    data = encoded(corners(), ".tif", save_all=True, append_images=[preview])
    with Image.open(io.BytesIO(data)) as stored:
        stored.seek(1)
        assert stored.n_frames == 2 and stored.tag_v2[254] == 1
    assert read_image(data, "x").size == (48, 32)
    buffer = io.BytesIO()
    corners().save(buffer, "MPO", save_all=True, append_images=[Image.new("RGB", (8, 8))])
    assert read_image(buffer.getvalue(), "x").size == (48, 32)


def test_damaged_and_foreign_files_are_named_with_a_remedy(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 4), np.uint8)
    for suffix in (".png", ".webp", ".tif", ".jpg", ".gif", ".bmp"):
        image = Image.fromarray(noise) if suffix in (".png", ".webp", ".tif") else corners()
        data = encoded(image, suffix)
        for part in (data[: len(data) // 2], data[:31]):
            with warnings.catch_warnings(), raising("b" + suffix):
                # only the error is shown, and no warning of Pillow
                warnings.simplefilter("error")
                read_image(part, "b" + suffix)
    (tmp_path / "empty.png").write_bytes(b"")
    with raising("empty.png"):
        read_image(tmp_path / "empty.png", "empty.png")
    with raising("missing.png"):
        read_image(tmp_path / "missing.png", "missing.png")
    with raising("text.png"):
        read_image(b"not an image" * 10, "text.png")
    # formats that no suffix of ours stands for are not tried
    with raising("a.png"):
        read_image(encoded(corners(), ".ppm"), "a.png")


@pytest.mark.parametrize("brand", [b"heic", b"mif1", b"heix"])
def test_a_heic_image_is_recognised_under_every_name(brand):
    data = b"\x00\x00\x00\x18ftyp" + brand + b"\x00\x00\x00\x00mif1heic" + bytes(200)
    with raising("photo.jpg", "HEIC", kind=UnusableImageError):
        read_image(data, "photo.jpg")


def test_metadata_of_macos_is_recognised():
    with raising("._a.png", kind=UnusableImageError):
        read_image(b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X" + bytes(100), "._a.png")


def png_header(width: int, height: int) -> bytes:
    """A PNG file that states a size, and holds no pixels."""
    data = encoded(Image.new("RGB", (1, 1)), ".png")
    body = b"IHDR" + width.to_bytes(4, "big") + height.to_bytes(4, "big") + data[24:29]
    return data[:12] + body + zlib.crc32(body).to_bytes(4, "big") + data[33:]


@pytest.mark.parametrize("size", [(8000, 7500), (12000, 12000), (60000, 60000)])
def test_a_large_image_that_cannot_be_reduced_is_rejected_before_it_is_decoded(size):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with raising("huge.png", str(size[0]), kind=UnusableImageError):
            read_image(png_header(*size), "huge.png")
    assert Image.MAX_IMAGE_PIXELS is not None


def peak_megabytes(path: Path, background: str | None) -> tuple[tuple[int, int], float]:
    """Read an image in a process of its own. Return its size and the peak of the process's memory."""
    code = (
        "import re, sys, warnings; warnings.simplefilter('error')\n"
        "from pathlib import Path\n"
        "from training.image_reading import read_image\n"
        f"image = read_image(Path(sys.argv[1]), 'x', background={background!r})\n"
        # getrusage would count the memory of this process, too, from which the child is forked
        "peak = re.search(r'VmHWM:\\s*(\\d+) kB', Path('/proc/self/status').read_text())[1]\n"
        "print(*image.size, peak)"
    )
    output = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    width, height, kilobytes = map(int, output.stdout.split())
    return (width, height), kilobytes / 1024


def test_a_large_photograph_is_reduced_while_it_is_decoded(tmp_path):
    path = tmp_path / "large.jpg"
    with Image.new("RGB", (12000, 8400), (40, 120, 200)) as image:
        image.save(path, exif=exif(6), quality=40)
    size, megabytes = peak_megabytes(path, "white")
    assert size == (4200, 6000) and size[0] * size[1] <= MAX_PIXELS
    assert megabytes < 1000


@pytest.mark.long
@pytest.mark.parametrize("suffix", [".png", ".webp", ".tif", ".avif", ".jpg"])
@pytest.mark.parametrize("background", ["white", None])
def test_the_largest_images_need_less_than_a_gigabyte(tmp_path, suffix, background):
    if suffix == ".avif" and not features.check("avif"):
        pytest.skip("Pillow without AVIF")
    path = tmp_path / f"large{suffix}"
    image = Image.new("RGBA", (8000, 6250), (40, 120, 200, 0))
    image.paste((200, 100, 50, 255), (1000, 1000, 7000, 5000))
    options = {
        ".png": {"compress_level": 1},
        ".webp": {"lossless": True, "method": 0, "quality": 0},
        ".avif": {"speed": 10, "quality": 40},
        ".tif": {"compression": "tiff_lzw"},
        ".jpg": {"progressive": True, "subsampling": 0},
    }[suffix]
    (image.convert("RGB") if suffix == ".jpg" else image).save(path, exif=exif(8), **options)
    size, megabytes = peak_megabytes(path, background)
    assert size == (6250, 8000) and megabytes < 1000


def test_a_reduced_size_for_previews_is_still_large_enough():
    data = encoded(corners(size=(800, 640)), ".jpg", exif=exif(6))
    got = read_image(data, "x", needed_size=(200, 160))
    assert got.size == (160, 200)
    # another format is decoded in full
    assert read_image(encoded(corners(size=(80, 64)), ".png"), "x", needed_size=(20, 20)).size == (80, 64)


def test_files_that_are_not_read_are_counted_and_named_by_kind():
    names = [
        "b.PNG",
        "a.tif",
        "x/c.jpeg",
        "d.avif",
        "e.heic",
        "f.HEIC",
        "._b.PNG",
        "x/.DS_Store",
        "dataset.json",
    ]
    names += ["g.psd", "h.mp4", "more.zip", "b.npy", "x/", "__MACOSX/x/c.jpeg", "notes.docx", "Thumbs.db"]
    images, skipped = split_names(names)
    assert images == ["a.tif", "b.PNG", "d.avif", "x/c.jpeg"]
    lines = skipped_lines(skipped)
    assert len(lines) == len(skipped) and sum(map(len, skipped.values())) == 10
    for name in ("e.heic", "g.psd", "h.mp4", "more.zip", "notes.docx", "._b.PNG"):
        assert any(name in line for line in lines)
    heic_line = next(line for line in lines if "e.heic" in line)
    assert "2" in heic_line and "f.HEIC" in heic_line
    assert not any("dataset.json" in line or "b.npy" in line for line in lines)


def test_many_names_are_shortened():
    _, skipped = split_names(f"{i:03d}.heic" for i in range(200))
    (line,) = skipped_lines(skipped)
    assert "000.heic" in line and "199.heic" not in line and "200" in line and "197" in line


def test_the_reader_agrees_with_what_pillow_calls_upright():
    for orientation in UPRIGHT:
        data = encoded(corners(), ".png", exif=exif(orientation))
        with Image.open(io.BytesIO(data)) as stored:
            assert np.array_equal(array(read_image(data, "x")), array(ImageOps.exif_transpose(stored)))


def test_a_damaged_exif_block_does_not_make_an_image_unreadable():
    data = encoded(corners(), ".png", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff")
    assert np.array_equal(array(read_image(data, "x")), array(corners()))
