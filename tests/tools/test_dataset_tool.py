"""Dataset conversion: pixels, names, labels, mirrored and cropped cameras, archives, and the text of every
error.
"""

import errno
import io
import json
import os
import re
import stat
import zipfile

import numpy as np
import PIL.Image
import pytest
import torch
from click.testing import CliRunner

from eg3d_rlhf.modes import image_sets
from tests.pictures import camera, floats, pixels, png, write_zip
from tests.rejections import check_message
from training.convert_settings import ConvertOptions
from training.dataset import ImageFolderDataset
from training.dataset_convert import transform_camera, transform_image
from training.rendering.cameras import mirror_label

COUNT = 11


def source(tmp_path, width=16, height=16, labels=camera, name="source.zip"):
    entries = {f"b/{i:02d}.png": png(pixels(i, width, height)) for i in range(COUNT)}
    rows = "none" if labels is None else [[entry, labels(i)] for i, entry in enumerate(entries)]
    return write_zip(tmp_path / name, entries, rows)


def run(src, dest, *flags):
    return CliRunner().invoke(
        image_sets.convert, [f"--source={src}", f"--dest={dest}", "--workers=1", *flags]
    )


def converted(src, dest, *flags):
    result = run(src, dest, *flags)
    assert result.exit_code == 0, result.output
    return result


def test_pixels_names_and_labels_are_kept(tmp_path):
    src = source(tmp_path)
    dest = tmp_path / "out.zip"
    result = converted(src, dest)
    line, cameras = result.stdout.splitlines()
    assert all(word in line for word in ("11 images", "16x16", "RGB", "25"))
    # the distance, the focal length, and the angle between axis and centre
    assert all(number in cameras for number in ("2.70", "4.26", "0.00")) and "Warning" not in result.stderr
    with zipfile.ZipFile(dest) as archive:
        infos = archive.infolist()
        assert {info.compress_type for info in infos} == {zipfile.ZIP_STORED}
        assert [info.filename for info in infos] == [
            *(f"00000/img{i:08d}.png" for i in range(COUNT)),
            "dataset.json",
        ]
        rows = json.loads(archive.read("dataset.json"))["labels"]
    # numbers as stored, bitwise identical
    assert rows == [[f"00000/img{i:08d}.png", camera(i)] for i in range(COUNT)]
    data = ImageFolderDataset(dest, c_dim=25)
    for i in range(COUNT):
        np.testing.assert_array_equal(data[i][0], pixels(i).transpose(2, 0, 1))


def test_folders_in_and_out_agree_with_zips(tmp_path):
    src = source(tmp_path)
    with zipfile.ZipFile(src) as archive:
        archive.extractall(tmp_path / "folder")
    (tmp_path / "out").mkdir()  # an empty folder may be there
    converted(tmp_path / "folder", tmp_path / "out", "--max-images=5", "--resolution=8x8")
    converted(src, tmp_path / "out.zip", "--max-images=5", "--resolution=8x8")
    first = ImageFolderDataset(tmp_path / "out", c_dim=25)
    second = ImageFolderDataset(tmp_path / "out.zip", c_dim=25)
    assert len(first) == len(second) == 5 and first.resolution == 8
    for i in range(5):
        np.testing.assert_array_equal(first[i][0], second[i][0])
        np.testing.assert_array_equal(first[i][1], second[i][1])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "out", "out.zip", "source.zip"]
    assert stat.S_IMODE((tmp_path / "out.zip").stat().st_mode) == stat.S_IMODE(src.stat().st_mode)


def test_workers_do_not_change_a_byte(tmp_path):
    src = source(tmp_path)
    converted(src, tmp_path / "a.zip", "--mirror", "--resolution=8x8")
    converted(src, tmp_path / "b.zip", "--mirror", "--resolution=8x8", "--workers=2")
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()


def test_mirroring_mirrors_pixels_and_poses(tmp_path):
    converted(source(tmp_path), tmp_path / "out.zip", "--mirror")
    data = ImageFolderDataset(tmp_path / "out.zip", c_dim=25)
    reference = ImageFolderDataset(source(tmp_path), c_dim=25, xflip=True)
    assert len(data) == 2 * COUNT
    for i in range(COUNT):
        for ours, theirs in ((2 * i, i), (2 * i + 1, COUNT + i)):
            np.testing.assert_array_equal(data[ours][0], reference[theirs][0])
            np.testing.assert_allclose(data[ours][1], reference[theirs][1], atol=1e-7)


def test_class_labels_and_sets_without_labels(tmp_path):
    converted(source(tmp_path, labels=lambda i: i % 3, name="classes.zip"), tmp_path / "a.zip", "--mirror")
    assert ImageFolderDataset(tmp_path / "a.zip").get_labels().argmax(axis=1).tolist() == [
        i // 2 % 3 for i in range(2 * COUNT)
    ]
    for name, src, flags in (
        ("b", source(tmp_path, labels=None, name="bare.zip"), ()),
        ("c", source(tmp_path), ("--labels=drop",)),
    ):
        converted(src, tmp_path / f"{name}.zip", *flags)
        with zipfile.ZipFile(tmp_path / f"{name}.zip") as archive:
            assert json.loads(archive.read("dataset.json")) == {"labels": None}


def test_center_crop_takes_the_middle_square(tmp_path):
    src = source(tmp_path, width=24, height=16, labels=None)
    converted(src, tmp_path / "out.zip", "--transform=center-crop", "--resolution=16x16")
    data = ImageFolderDataset(tmp_path / "out.zip", use_labels=False)
    np.testing.assert_array_equal(data[3][0], pixels(3, 24, 16)[:, 4:20].transpose(2, 0, 1))


def test_center_crop_wide_centres_the_image_on_black():
    options = ConvertOptions(transform="center-crop-wide", resolution=(16, 8))
    image = np.asarray(transform_image(PIL.Image.fromarray(pixels(0, 16, 12) | 1), options))
    assert image.shape == (16, 16, 3)
    assert not image[:4].any() and not image[12:].any()
    np.testing.assert_array_equal(image[4:12], (pixels(0, 16, 12) | 1)[2:10])


@pytest.mark.parametrize("transform", ["center-crop", "center-crop-wide"])
@pytest.mark.parametrize("size", [(40, 32), (30, 50), (64, 32)])
def test_cameras_follow_the_crop(transform, size):
    """A marked pixel of the source and its ray's direction end at the same place of the result."""
    width, height = size
    options = ConvertOptions(
        transform=transform, resolution=(32, 16) if transform.endswith("wide") else (32, 32)
    )
    label = np.array(camera(1))
    label[[18, 21]] = 0.45, 0.55  # off the centre
    image = np.zeros((height, width), np.uint8)
    x = width // 2 + 3
    y = height // 2 - 2
    image[y - 1 : y + 2, x - 1 : x + 2] = 255
    # K^-1 of the pixel's centre
    ray = [((x + 0.5) / width - label[18]) / label[16], ((y + 0.5) / height - label[21]) / label[20]]
    result = np.asarray(transform_image(PIL.Image.fromarray(image), options), np.float64)
    rows, columns = np.indices(result.shape)
    seen = [
        ((columns + 0.5) * result).sum() / result.sum() / result.shape[1],
        ((rows + 0.5) * result).sum() / result.sum() / len(result),
    ]
    after = transform_camera(label, options, width, height)
    np.testing.assert_array_equal(after[:16], label[:16])
    expected = [after[16] * ray[0] + after[18], after[20] * ray[1] + after[21]]
    np.testing.assert_allclose(seen, expected, atol=0.3 / 32)


def test_cropped_set_says_so_and_mirrors_after_the_crop(tmp_path):
    src = source(tmp_path, width=24, height=16)
    result = converted(src, tmp_path / "out.zip", "--transform=center-crop", "--resolution=32x32", "--mirror")
    # a line for what was enlarged, and one for the labels that follow the crop
    _, enlarged, cropped, _ = result.stdout.splitlines()
    assert "11 " in enlarged and "32x32" in enlarged and "11 " in cropped
    labels = ImageFolderDataset(tmp_path / "out.zip", c_dim=25).get_labels()
    assert labels[0, 16] == pytest.approx(4.2647 * 1.5, rel=1e-5) and labels[0, 20] == pytest.approx(
        4.2647, rel=1e-5
    )
    np.testing.assert_allclose(labels[1::2], mirror_label(torch.from_numpy(labels[::2])).numpy(), atol=1e-6)


def entries_with(name, data):
    return {**{f"{i}.png": png(pixels(i)) for i in range(3)}, name: data}


def rows_with(index, value):
    rows = [[f"{i}.png", camera(i)] for i in range(3)]
    rows[index][1] = value
    return rows


ROWS = rows_with(0, camera(0))
MISTAKES = {  # entries, labels, flags, what the message names
    "resolution": (entries_with("1.png", png(pixels(1))), ROWS, ["--resolution=64"], "--resolution"),
    "no size": (entries_with("1.png", png(pixels(1))), ROWS, ["--transform=center-crop"], "--resolution"),
    "tall": (
        entries_with("1.png", png(pixels(1))),
        ROWS,
        ["--transform=center-crop-wide", "--resolution=8x16"],
        "--resolution",
    ),
    "not square": (entries_with("0.png", png(pixels(0, 16, 8))), ROWS, [], "'0.png'.*16x8"),
    "no power": (entries_with("1.png", png(pixels(1))), ROWS, ["--resolution=12x12"], "12x12"),
    "sizes": (entries_with("2.png", png(pixels(2, 32, 32))), ROWS, [], "'2.png'.*--resolution"),
    "mode": (entries_with("1.png", floats(16)), ROWS, [], "'1.png'.*floating-point"),
    "cut": (entries_with("1.png", png(pixels(1))[:80]), ROWS, [], "'1.png'.*80 bytes"),
    "cut, in a worker": (entries_with("1.png", png(pixels(1))[:80]), ROWS, ["--workers=2"], "'1.png'"),
    "one label missing": (entries_with("1.png", png(pixels(1))), ROWS[:2], [], "'2.png'"),
    "rotation": (
        entries_with("1.png", png(pixels(1))),
        rows_with(1, [2 * v for v in camera(1)]),
        [],
        "'1.png'.*rotation",
    ),
    "other labels": (
        entries_with("1.png", png(pixels(1))),
        [[f"{i}.png", [1.0]] for i in range(3)],
        [],
        "'0.png'.*25.*--labels=drop",
    ),
    "no images": ({"a.txt": b""}, ROWS, [], "--source"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_end_in_one_line_and_leave_nothing(case, tmp_path):
    entries, labels, flags, message = MISTAKES[case]
    src = write_zip(tmp_path / "source.zip", entries, labels)
    result = run(src, tmp_path / "out.zip", *flags)
    assert result.exit_code == 2, result.output
    assert re.match(f"Error: .*{message}", result.stderr.splitlines()[-1]), result.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["source.zip"]


def test_targets_that_exist_are_safe(tmp_path):
    src = source(tmp_path)
    dest = tmp_path / "out.zip"
    full = tmp_path / "full"
    dest.write_bytes(b"old")
    full.mkdir()
    (full / "a").write_bytes(b"")
    for target, message in (
        (dest, "--overwrite"),
        (full, "empty"),
        (src, "--source"),
        (tmp_path / "x.tar", ".zip"),
        (tmp_path, "contains"),
    ):
        result = run(src, target)
        assert result.exit_code == 2 and message in result.stderr, result.stderr
    assert dest.read_bytes() == b"old" and [p.name for p in full.iterdir()] == ["a"]
    (tmp_path / "bad.zip").write_bytes(src.read_bytes()[:-200])
    assert run(tmp_path / "bad.zip", dest, "--overwrite").exit_code == 2 and dest.read_bytes() == b"old"
    converted(src, dest, "--overwrite")
    assert len(ImageFolderDataset(dest, c_dim=25)) == COUNT


def test_a_disk_error_ends_in_one_line(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    src = source(tmp_path)
    monkeypatch.setattr(zipfile.ZipFile, "writestr", fail)
    result = run(src, tmp_path / "out.zip")
    *progress, error = result.stderr.splitlines()
    assert result.exit_code == 2 and len(progress) <= 1 and error.startswith("Error: ")
    check_message(error, ("--dest", str(tmp_path / "out.zip"), os.strerror(errno.ENOSPC)))
    assert [p.name for p in tmp_path.iterdir()] == ["source.zip"]


def test_dry_run_writes_nothing(tmp_path):
    result = converted(source(tmp_path), tmp_path / "out.zip", "--dry-run", "--max-images=4")
    assert json.loads(result.stdout)["images"] == 4 and not (tmp_path / "out.zip").exists()


def encoded(image: PIL.Image.Image, format_name: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format_name, **options)
    return buffer.getvalue()


def orientation(value: int) -> PIL.Image.Exif:
    block = PIL.Image.Exif()
    block[0x0112] = value
    return block


def test_photographs_are_converted_as_people_see_them(tmp_path):
    stored = PIL.Image.fromarray(pixels(0))
    clear = PIL.Image.fromarray(np.dstack([pixels(1), np.zeros((16, 16), np.uint8)]))
    entries = {
        "turned.tif": encoded(stored, "TIFF", exif=orientation(6)),
        "clear.png": png(np.asarray(clear)),
        "palette.gif": encoded(stored.quantize(256), "GIF"),
    }
    rows = [[name, camera(i)] for i, name in enumerate(entries)]
    converted(write_zip(tmp_path / "source.zip", entries, rows), tmp_path / "out.zip")
    data = ImageFolderDataset(tmp_path / "out.zip", c_dim=25)
    # in the order of the names: clear.png, palette.gif, turned.tif
    assert (data[0][0] == 255).all()
    assert data[1][0].shape == (3, 16, 16)
    np.testing.assert_array_equal(data[2][0], np.rot90(pixels(0), -1).transpose(2, 0, 1))


def test_files_that_are_not_images_of_the_set_are_named_and_labels_stay_with_their_images(tmp_path):
    frames = [PIL.Image.new("RGB", (16, 16), (i, 0, 0)) for i in (0, 90)]
    entries = {f"{i}.png": png(pixels(i)) for i in range(4)}
    entries["1.webp"] = encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:])
    entries["0.jpg"] = b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00mif1heic" + bytes(90)
    entries |= {"._0.png": b"\x00\x05\x16\x07" + bytes(90), "z.heic": b"x", "__MACOSX/1.png": b"y"}
    rows = [[f"{i}.png", camera(i)] for i in range(4)]
    src = write_zip(tmp_path / "source.zip", entries, rows)
    with zipfile.ZipFile(src) as archive:
        archive.extractall(tmp_path / "folder")
    for path in (src, tmp_path / "folder"):
        dest = tmp_path / f"from-{path.name.removesuffix('.zip')}.zip"
        output = converted(path, dest).stderr
        for name in ("1.webp", "0.jpg", "._0.png", "z.heic"):
            assert name in output
        data = ImageFolderDataset(dest, c_dim=25)
        assert len(data) == 4
        for i in range(4):
            np.testing.assert_array_equal(data[i][0], pixels(i).transpose(2, 0, 1))
            np.testing.assert_array_equal(data[i][1], np.float32(camera(i)))


def test_all_damaged_images_are_listed_at_once(tmp_path):
    # one ends in its pixels, the other one in its header
    entries = {f"{i}.png": png(pixels(i))[: {1: 80, 3: 20}.get(i)] for i in range(5)}
    rows = [[name, camera(i)] for i, name in enumerate(entries)]
    result = run(write_zip(tmp_path / "source.zip", entries, rows), tmp_path / "out.zip")
    check_message(result.stderr.splitlines()[-1], ("'1.png'", "'3.png'"))
    assert result.exit_code == 2 and "'2.png'" not in result.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["source.zip"]


def test_a_set_of_files_that_are_not_read_is_rejected_with_the_remedy_for_them(tmp_path):
    src = write_zip(tmp_path / "source.zip", {f"{i}.heic": b"x" for i in range(3)}, None)
    result = run(src, tmp_path / "out.zip")
    check_message(result.stderr.splitlines()[-1], ("--source", "0.heic", "3"))


def test_grey_images_and_jpeg_bytes_under_another_suffix_join_a_set_of_colours(tmp_path):
    grey = PIL.Image.fromarray((np.arange(256, dtype=np.uint16) * 257).reshape(16, 16))
    buffers = [io.BytesIO(), io.BytesIO()]
    grey.save(buffers[0], "png")
    PIL.Image.fromarray(pixels(2, 16, 16)).save(buffers[1], "jpeg")
    entries = {
        "a.png": png(pixels(1, 16, 16)),
        "b.png": buffers[0].getvalue(),
        "c.heic": buffers[1].getvalue(),
    }
    src = write_zip(tmp_path / "mixed.zip", entries, [[name, camera(i)] for i, name in enumerate(entries)])
    result = converted(src, tmp_path / "out.zip")
    assert "b.png" in result.stderr and "c.heic" not in result.stderr
    data = ImageFolderDataset(tmp_path / "out.zip", c_dim=25)
    assert len(data) == 3 and data.num_channels == 3
    np.testing.assert_array_equal(data[1][0], np.broadcast_to(np.arange(256).reshape(16, 16), (3, 16, 16)))
    only_grey = write_zip(tmp_path / "grey.zip", {"b.png": entries["b.png"]}, "none")
    converted(only_grey, tmp_path / "grey-out.zip")
    assert ImageFolderDataset(tmp_path / "grey-out.zip", use_labels=False).num_channels == 1
