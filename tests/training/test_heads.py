"""The data set of heads of people: written once, whole, the same on any machine, and named by its options."""

import errno
import os
import zipfile
from unittest.mock import Mock

import numpy as np
import pytest

from tests.rejections import raising
from training.dataset import ImageFolderDataset
from training.heads import people
from training.synthetic_heads import (
    PeopleOptions,
    head_parameters,
    load_truth,
    parse_name,
    resolve_dataset,
    write_heads,
)


def test_dataset_does_not_depend_on_the_process_count(tmp_path):
    options = PeopleOptions(resolution=16, n=35, seed=4)
    for processes in (1, 2):
        write_heads(options, tmp_path / f"{processes}" / "set.zip", processes, progress=False)
    for suffix in (".zip", ".npz"):
        first, second = ((tmp_path / p / "set").with_suffix(suffix).read_bytes() for p in "12")
        assert first == second
    assert sorted(p.name for p in (tmp_path / "1").iterdir()) == ["set.npz", "set.zip"]


def test_images_depend_on_seed_and_index_only():
    few, many = (head_parameters(PeopleOptions(n=n, seed=9), range(2, 5)) for n in (5, 500))
    assert all(np.array_equal(a, b) for a, b in zip(few, many, strict=True))
    other = head_parameters(PeopleOptions(seed=10), range(2, 5))
    assert not np.array_equal(few[0], other[0])
    shape, appearance, labels = few
    assert (
        shape.shape == (3, people.SHAPE)
        and shape.shape[1] + appearance.shape[1] == people.LATENT
        and labels.shape == (3, 25)
    )


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    full = os.strerror(errno.ENOSPC)
    monkeypatch.setattr(zipfile.ZipFile, "writestr", Mock(side_effect=OSError(errno.ENOSPC, full)))
    with raising("people16-n1-", ".zip", full, "EG3D_", kind=OSError):
        resolve_dataset("synthetic:people16@n=1", tmp_path, processes=1, progress=False)
    assert not list(tmp_path.iterdir())


def test_resolve_writes_once_and_round_trips(tmp_path):
    name = "synthetic:people16@n=5,seed=2"
    path = resolve_dataset(name, tmp_path, processes=1, progress=False)
    stamp = path.stat().st_mtime_ns
    assert resolve_dataset(name, tmp_path) == path and path.stat().st_mtime_ns == stamp
    data = ImageFolderDataset(path, resolution=16, c_dim=25)
    truth = load_truth(path)
    np.testing.assert_array_equal(data.get_labels(), truth.labels)
    np.testing.assert_array_equal(head_parameters(parse_name(name), range(5))[0], truth.shape)
    assert truth.depth.shape == (5, 16, 16) and 2.2 < truth.depth[np.isfinite(truth.depth)].mean() < 2.8
    with zipfile.ZipFile(path) as archive:
        assert (
            archive.namelist()[0] == "00000/img00000000.png"
            and archive.getinfo("dataset.json").compress_type == zipfile.ZIP_STORED
        )
    assert resolve_dataset("some/folder") == type(path)("some/folder")
    path.with_suffix(".npz").unlink()
    with raising(path.with_suffix(".npz").name):
        load_truth(path)


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("synthetic:cats64", ("synthetic:cats64", "synthetic:people64")),
        # the mannequins of earlier versions
        ("synthetic:heads64", ("synthetic:heads64", "synthetic:people64")),
        ("synthetic:people64@size=3", ("seed", "yaw", "pitch", "'size'")),
        ("synthetic:people64@n=x", ("type int", "'x'")),
        ("synthetic:people60", ("resolution", "8 to 1024", "60")),
        ("synthetic:people64@n=0", ("n=0", "seed")),
        ("synthetic:people64@yaw=9", ("yaw", "3.14", "9")),
    ],
)
def test_name_errors(name, named):
    with raising(*named):
        parse_name(name)


def test_names_and_hashes_tell_sets_apart():
    assert parse_name("synthetic:people64") == PeopleOptions()
    assert parse_name("synthetic:people32@n=7,yaw=0.2@seed=3") == PeopleOptions(
        resolution=32, n=7, yaw=0.2, seed=3
    )
    assert PeopleOptions().stem() != PeopleOptions(seed=1).stem()
