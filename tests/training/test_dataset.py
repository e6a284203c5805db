"""The image dataset: reading, mirroring, subsets, and the text of every error."""

import pickle
import re
import zipfile

import numpy as np
import pytest
import torch

from tests import pictures
from tests.compat.absent import some
from tests.compat.reference import ROOT, array_names, arrays
from tests.pictures import camera, floats, png, write_zip
from tests.rejections import raising
from training.dataset import ImageFolderDataset
from training.rendering.cameras import mirror_pose

COUNT = 6
SIZE = 8
NAMES = [f"00000/img{i:08d}.png" for i in range(COUNT)]


def pixels(i, width=SIZE, height=SIZE):
    return pictures.pixels(i, width, height)


def rows(**changed):
    """A camera for each image, those of numbers named by `changed` replaced."""
    return [[name, changed.get(f"at{i}", camera(i))] for i, name in enumerate(NAMES)]


def write(path, labels=None, **entries):
    """The set, with entries of numbers replaced."""
    data = {name: entries.get(f"at{i}", png(pixels(i))) for i, name in enumerate(NAMES)}
    return write_zip(path, data, rows() if labels is None else labels)


def test_zip_and_folder_agree(tmp_path):
    path = write(tmp_path / "set.zip")
    with zipfile.ZipFile(path) as archive:
        archive.extractall(tmp_path / "set")
    for data in (ImageFolderDataset(path, c_dim=25), ImageFolderDataset(tmp_path / "set", c_dim=25)):
        assert len(data) == COUNT
        assert data.resolution == SIZE and data.num_channels == 3
        assert data.label_dim == 25
        for i in range(COUNT):
            image, label = data[i]
            assert image.dtype == np.uint8 and label.dtype == np.float32
            np.testing.assert_array_equal(image, pixels(i).transpose(2, 0, 1))
            np.testing.assert_allclose(label, camera(i), atol=1e-6)


def test_items_are_copies_and_workers_reopen_the_file(tmp_path):
    data = ImageFolderDataset(write(tmp_path / "set.zip"))
    image, label = data[2]
    image[:] = 0
    label[:] = 0
    again = pickle.loads(pickle.dumps(data))
    assert data[2][0].any() and data[2][1].any() and np.array_equal(again[2][0], data[2][0])


def test_xflip_mirrors_image_and_pose(tmp_path):
    data = ImageFolderDataset(write(tmp_path / "set.zip"), xflip=True)
    assert len(data) == 2 * COUNT
    image, label = data[1]
    flipped, mirrored = data[COUNT + 1]
    np.testing.assert_array_equal(flipped, image[:, :, ::-1])
    np.testing.assert_allclose(
        mirrored[:16].reshape(4, 4), mirror_pose(torch.from_numpy(label[:16].reshape(4, 4))).numpy()
    )
    np.testing.assert_array_equal(mirrored[16:], label[16:])
    np.testing.assert_array_equal(np.stack([data.get_label(i) for i in range(len(data))]), data.get_labels())


# the chosen images, and which are mirrored, by what the array's name says: images, most, seed
SUBSET = re.compile(r"dataset/raw_idx_n(\d+)_max(\d+)_seed(\d+)(_xflip)?")
SUBSETS = [name for name in array_names(ROOT / "eg3d" / "misc.npz") if SUBSET.fullmatch(name)]


@pytest.mark.parametrize("name", some(SUBSETS, "this set has no dataset/raw_idx_... in eg3d/misc.npz"))
def test_subset_matches_reference(name, tmp_path):
    raw, flipped = arrays(ROOT / "eg3d" / "misc.npz")[name]
    count, most, seed = map(int, SUBSET.fullmatch(name).groups()[:3])
    mark = np.eye(SIZE, dtype=np.uint8)[..., None]
    entries = {f"{i:03d}.png": png(np.full((SIZE, SIZE, 3), i, np.uint8) + mark) for i in range(count)}
    data = ImageFolderDataset(
        write_zip(tmp_path / "set.zip", entries),
        use_labels=False,
        max_size=most,
        xflip=name.endswith("_xflip"),
        random_seed=seed,
    )
    assert [int(data[i][0][0, 0].min()) for i in range(len(data))] == raw.tolist()
    unmirrored = [data[i][0][0, 0, 0] > data[i][0][0, 0, 1] for i in range(len(data))]
    assert unmirrored == [not f for f in flipped]


def test_class_labels_become_one_hot_and_null_means_none(tmp_path):
    data = ImageFolderDataset(write(tmp_path / "a.zip", [[name, i % 3] for i, name in enumerate(NAMES)]))
    assert data.label_dim == 3 and data.get_label(4).tolist() == [0, 1, 0]
    # the set need not have images of the highest class; classes are no cameras
    more = ImageFolderDataset(tmp_path / "a.zip", c_dim=5)
    assert more.label_dim == 5 and more.get_label(4).tolist() == [0, 1, 0, 0, 0]
    with raising("a.zip", NAMES[2], "2"):
        ImageFolderDataset(tmp_path / "a.zip", c_dim=2)
    with raising("a.zip", NAMES[0], "25"):
        ImageFolderDataset(tmp_path / "a.zip", c_dim=25)
    data = ImageFolderDataset(tmp_path / "a.zip", use_labels=False)
    assert data.label_dim == 0 and data[0][1].shape == (0,)
    bare = write_zip(tmp_path / "c.zip", {"a.png": png(pixels(0))}, None)
    assert not ImageFolderDataset(bare).label_dim
    with raising("c.zip", "25", '"labels": null'):
        ImageFolderDataset(bare, c_dim=25)


LABEL_ERRORS = {  # labels, what the message names
    "missing file": ("none", "dataset.json", "camera labels"),
    "missing image": ([[n, camera(0)] for n in NAMES[:-2]], "2 of", f"'{NAMES[4]}'"),
    "length": (rows(at3=[1.0] * 24), f"'{NAMES[3]}'", "24"),
    "not a list": (rows(at3="x"), f"'{NAMES[3]}'", "'x'"),
    "not numbers": (rows(at3=["x"] * 25), "dataset.json", "numbers"),
    "nan": (rows(at3=[float("nan")] * 25), f"'{NAMES[3]}'", "finite"),
    "rotation": (rows(at1=[1.5 * camera(1)[0], *camera(1)[1:]]), f"'{NAMES[1]}'", "rotation", "1 of 6"),
    "last row": (rows(at1=[*camera(1)[:12], 0, 0, 1, 1, *camera(1)[16:]]), f"'{NAMES[1]}'", "0 0 0 1"),
    "malformed": ([1, 2], "dataset.json"),
}


@pytest.mark.parametrize("case", LABEL_ERRORS)
def test_label_errors(tmp_path, case):
    labels, *names = LABEL_ERRORS[case]
    with raising(str(tmp_path / "set.zip"), *names):
        ImageFolderDataset(write(tmp_path / "set.zip", labels), c_dim=25)


IMAGE_ERRORS = {
    "not square": (png(pixels(0)[:6]), "8x6"),
    "truncated": (png(pixels(0))[:90], "90 bytes"),
    "not an image": (b"hello", "5 bytes"),
    "size": (png(pixels(0, 16, 16)), "[3, 16, 16]"),
    "mode": (floats(8), "floating-point"),
}


@pytest.mark.parametrize("case", IMAGE_ERRORS)
def test_image_errors_on_access(tmp_path, case):
    data, text = IMAGE_ERRORS[case]
    dataset = ImageFolderDataset(write(tmp_path / "set.zip", at3=data))
    assert dataset[2][0].shape == (3, SIZE, SIZE)
    with raising("set.zip", f"'{NAMES[3]}'", text):
        dataset[3]


def test_file_errors(tmp_path):
    def read(path, *names, **kwargs):
        with raising(str(path), *names):
            ImageFolderDataset(path, **kwargs)[3]

    read(tmp_path / "none.zip")
    path = write(tmp_path / "set.zip")
    read(path, "8x8", "16", resolution=16)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    read(path)
    start = content.index(png(pixels(3)))
    damaged = bytearray(content)
    damaged[start + 60 : start + 70] = bytes(10)
    path.write_bytes(damaged)
    read(path, f"'{NAMES[3]}'")
    read(write_zip(tmp_path / "empty.zip", {"readme.txt": b""}), "1 files")


def test_an_archive_with_a_password_is_named(tmp_path):
    path = write(tmp_path / "secret.zip")
    content = bytearray(path.read_bytes())
    # bit 0 of the flags, in the header of each file and in the list of files at the end
    for signature, offset in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        at = content.find(signature)
        while at >= 0:
            content[at + offset] |= 1
            at = content.find(signature, at + 4)
    path.write_bytes(content)
    with raising(str(path), "password"):
        ImageFolderDataset(path, use_labels=False)[0]


def test_a_label_without_an_image_is_named(tmp_path):
    absolute = [[f"/absolute/{name}", label] for name, label in rows()]
    with raising(NAMES[0], "/absolute/"):
        ImageFolderDataset(write(tmp_path / "set.zip", absolute))
    with raising("dataset.json", "labels"):
        ImageFolderDataset(write(tmp_path / "map.zip", dict(rows())))
