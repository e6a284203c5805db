"""The data set of heads of people: written once, whole, the same on any machine, and named by its options."""

import zipfile
from unittest.mock import Mock

import numpy as np
import pytest

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
        one, two = ((tmp_path / p / "set").with_suffix(suffix).read_bytes() for p in "12")
        assert one == two
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
    monkeypatch.setattr(zipfile.ZipFile, "writestr", Mock(side_effect=OSError(28, "No space left on device")))
    with pytest.raises(
        OSError,
        match=(
            r"people16-n1-\w+.zip: expected to write .*, got: No space left on device. Make room, or set"
            r" EG3D_"
        ),
    ):
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
    with pytest.raises(ValueError, match="load_truth: expected .* beside the dataset, got none"):
        load_truth(path)


@pytest.mark.parametrize(
    "name, text",
    [
        ("synthetic:cats64", "Use synthetic:people64"),
        ("synthetic:heads64", "Use synthetic:people64"),  # the mannequins of earlier versions
        ("synthetic:people64@size=3", "expected one of the keys n, seed, yaw, pitch .* got 'size'"),
        ("synthetic:people64@n=x", "expected n=<int> .* got 'x'"),
        ("synthetic:people60", "resolution must be a multiple of 8 from 8 to 1024, got 60"),
        ("synthetic:people64@n=0", "n must be >= 1 and seed >= 0"),
        ("synthetic:people64@yaw=9", r"yaw must lie in \[0, 3.14\]"),
    ],
)
def test_name_errors(name, text):
    with pytest.raises(ValueError, match=text):
        parse_name(name)


def test_names_and_hashes_tell_sets_apart():
    assert parse_name("synthetic:people64") == PeopleOptions()
    assert parse_name("synthetic:people32@n=7,yaw=0.2@seed=3") == PeopleOptions(
        resolution=32, n=7, yaw=0.2, seed=3
    )
    assert PeopleOptions().stem() != PeopleOptions(seed=1).stem()
