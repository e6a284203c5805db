"""The image dataset: reading, mirroring, subsets, and the text of every error."""

import io
import json
import math
import pickle
import zipfile

import numpy as np
import PIL.Image
import pytest
import torch

from training.dataset import ImageFolderDataset
from training.rendering.cameras import LookAtPoseSampler, intrinsics_matrix, mirror_pose, pack_label

COUNT, SIZE = 6, 8
NAMES = [f"00000/img{i:08d}.png" for i in range(COUNT)]


def _png(pixels):
    buffer = io.BytesIO()
    PIL.Image.fromarray(pixels).save(buffer, format="png")
    return buffer.getvalue()


def _pixels(i, size=SIZE):
    return np.random.RandomState(i).randint(0, 256, (size, size, 3), dtype=np.uint8)


def _label(i):
    pose = LookAtPoseSampler.sample(math.pi / 2 + 0.1 * i, math.pi / 2, torch.zeros(3), radius=2.7)
    return pack_label(pose, intrinsics_matrix(4.2647))[0].tolist()


def _entries():
    return {name: _png(_pixels(i)) for i, name in enumerate(NAMES)}


def _write(path, entries=None, labels=True):
    """A zip of the entries; labels: True for cameras, None for no dataset.json, else its content."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in (entries or _entries()).items():
            archive.writestr(name, data)
        if labels is not None:
            rows = [[name, _label(i)] for i, name in enumerate(NAMES)] if labels is True else labels
            archive.writestr("dataset.json", json.dumps({"labels": rows}))
    return path


def test_zip_and_folder_agree(tmp_path):
    path = _write(tmp_path / "set.zip")
    with zipfile.ZipFile(path) as archive:
        archive.extractall(tmp_path / "set")
    for data in (ImageFolderDataset(path, c_dim=25), ImageFolderDataset(tmp_path / "set", c_dim=25)):
        assert len(data) == COUNT
        assert data.resolution == SIZE and data.num_channels == 3
        assert data.label_dim == 25 and data.label_std.shape == (25,)
        for i in range(COUNT):
            image, label = data[i]
            assert image.dtype == np.uint8 and label.dtype == np.float32
            np.testing.assert_array_equal(image, _pixels(i).transpose(2, 0, 1))
            np.testing.assert_allclose(label, _label(i), atol=1e-6)


def test_items_are_copies_and_workers_reopen_the_file(tmp_path):
    data = ImageFolderDataset(_write(tmp_path / "set.zip"))
    image, label = data[2]
    image[:], label[:] = 0, 0
    again = pickle.loads(pickle.dumps(data))
    assert data[2][0].any() and data[2][1].any() and np.array_equal(again[2][0], data[2][0])


def test_xflip_mirrors_image_and_pose(tmp_path):
    data = ImageFolderDataset(_write(tmp_path / "set.zip"), xflip=True)
    assert len(data) == 2 * COUNT
    image, label = data[1]
    flipped, mirrored = data[COUNT + 1]
    np.testing.assert_array_equal(flipped, image[:, :, ::-1])
    np.testing.assert_allclose(mirrored[:16].reshape(4, 4), mirror_pose(torch.from_numpy(label[:16].reshape(4, 4))).numpy())
    np.testing.assert_array_equal(mirrored[16:], label[16:])
    np.testing.assert_array_equal(np.stack([data.get_label(i) for i in range(len(data))]), data.get_labels())


def test_subset_matches_reference(fixtures_dir, tmp_path):
    with np.load(fixtures_dir / "eg3d" / "misc.npz") as values:
        raw, flipped = values["dataset/raw_idx_n20_max7_seed3_xflip"]
    mark = np.eye(SIZE, dtype=np.uint8)[..., None]
    entries = {f"{i:03d}.png": _png(np.full((SIZE, SIZE, 3), i, np.uint8) + mark) for i in range(20)}
    data = ImageFolderDataset(_write(tmp_path / "set.zip", entries, None), use_labels=False, max_size=7, xflip=True, random_seed=3)
    assert [int(data[i][0][0, 0].min()) for i in range(len(data))] == raw.tolist()
    unmirrored = [data[i][0][0, 0, 0] > data[i][0][0, 0, 1] for i in range(len(data))]
    assert unmirrored == [not f for f in flipped]


def test_class_labels_become_one_hot_and_null_means_none(tmp_path):
    data = ImageFolderDataset(_write(tmp_path / "a.zip", labels=[[name, i % 3] for i, name in enumerate(NAMES)]))
    assert data.label_dim == 3 and data.get_label(4).tolist() == [0, 1, 0]
    data = ImageFolderDataset(_write(tmp_path / "b.zip", labels=[]).with_name("a.zip"), use_labels=False)
    assert data.label_dim == 0 and data[0][1].shape == (0,)
    with zipfile.ZipFile(tmp_path / "c.zip", "w") as archive:
        archive.writestr("a.png", _png(_pixels(0)))
        archive.writestr("dataset.json", '{"labels": null}')
    assert not ImageFolderDataset(tmp_path / "c.zip").label_dim
    with pytest.raises(ValueError, match=r'expected labels of 25 numbers, got "labels": null. Add them'):
        ImageFolderDataset(tmp_path / "c.zip", c_dim=25)


def _changed(index, value):
    rows = [[name, _label(i)] for i, name in enumerate(NAMES)]
    rows[index][1] = value
    return rows


def _scaled():
    label = _label(1)
    label[0] *= 1.5
    return label


LABEL_ERRORS = {
    "missing file": (None, r"expected dataset.json with the camera labels, got none. Add it at the top .*use_labels=False"),
    "missing image": ([[n, _label(0)] for n in NAMES[:-2]], r"6 images, got none for 2 of them, the first being '00000/img00000004.png'"),
    "length": (_changed(3, [1.0] * 24), r"'00000/img00000003.png': expected a label of 25 numbers, got 24. A camera label is 16"),
    "not a list": (_changed(3, "x"), r"'00000/img00000003.png': expected a list of numbers like its neighbours, got 'x'"),
    "not numbers": (_changed(3, ["x"] * 25), r"dataset.json: expected labels to hold numbers only"),
    "nan": (_changed(3, [float("nan")] * 25), r"'00000/img00000003.png': expected finite numbers, got NaN or infinity"),
    "rotation": (_changed(1, _scaled()), r"'00000/img00000001.png': expected a rotation .*\(1 of 6 labels\). Store cam2world row-major"),
    "last row": (_changed(1, [*_label(1)[:12], 0, 0, 1, 1, *_label(1)[16:]]), r"last row to be 0 0 0 1, got \[0.0, 0.0, 1.0, 1.0\]"),
    "malformed": ([1, 2], r'dataset.json: expected {"labels": \[\[image name, label\], ...\]}, got something else'),
}


@pytest.mark.parametrize("case", LABEL_ERRORS)
def test_label_errors(tmp_path, case):
    labels, text = LABEL_ERRORS[case]
    with pytest.raises(ValueError, match=text) as caught:
        ImageFolderDataset(_write(tmp_path / "set.zip", labels=labels), c_dim=25)
    assert str(tmp_path / "set.zip") in str(caught.value)


def _with(name, data):
    return {**_entries(), name: data}


IMAGE_ERRORS = {
    "not square": (_png(_pixels(0)[:6]), r"img00000003.png': expected a square image, got 8x6. Crop"),
    "truncated": (_png(_pixels(0))[:90], r"img00000003.png': expected a whole image, got 90 bytes that cannot be decoded .*Replace"),
    "not an image": (b"hello", r"img00000003.png': expected a whole image, got 5 bytes that cannot be decoded"),
    "size": (_png(_pixels(0, 16)), r"img00000003.png': expected \[3, 8, 8\] .*'00000/img00000000.png', got \[3, 16, 16\]. All images"),
    "mode": (_png(np.zeros((8, 8, 4), np.uint8)), r"img00000003.png': expected an 8-bit RGB or greyscale image, got mode RGBA. Convert"),
}


@pytest.mark.parametrize("case", IMAGE_ERRORS)
def test_image_errors_on_access(tmp_path, case):
    data, text = IMAGE_ERRORS[case]
    dataset = ImageFolderDataset(_write(tmp_path / "set.zip", _with(NAMES[3], data)))
    assert dataset[2][0].shape == (3, SIZE, SIZE)
    with pytest.raises(ValueError, match=text):
        dataset[3]


def test_first_image_is_checked_at_construction(tmp_path):
    path = _write(tmp_path / "set.zip", _with(NAMES[0], b"hello"))
    with pytest.raises(ValueError, match="img00000000.png': expected a whole image"):
        ImageFolderDataset(path)


def test_file_errors(tmp_path):
    with pytest.raises(ValueError, match=r"none.zip: expected a folder or a .zip file, got a path that does not exist"):
        ImageFolderDataset(tmp_path / "none.zip")
    path = _write(tmp_path / "set.zip")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"set.zip: expected a zip archive, got a file .* truncated or of another kind"):
        ImageFolderDataset(path)
    damaged = bytearray(whole)
    start = whole.index(_png(_pixels(3)))
    damaged[start + 60 : start + 70] = bytes(10)
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"cannot read entry '00000/img00000003.png' .*damaged"):
        ImageFolderDataset(path)[3]
    with pytest.raises(ValueError, match=r"empty.zip: expected images \(.png.*got 1 other entries"):
        ImageFolderDataset(_write(tmp_path / "empty.zip", {"readme.txt": b""}, labels=None))
    with pytest.raises(ValueError, match=r"expected images of 16x16, got 8x8 in entry .* ask for resolution 8"):
        ImageFolderDataset(_write(tmp_path / "set.zip"), resolution=16)
    with pytest.raises(ValueError, match="max_size must be >= 1 or None, got 0"):
        ImageFolderDataset(path, max_size=0)
