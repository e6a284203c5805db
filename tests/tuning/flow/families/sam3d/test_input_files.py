"""Input files of SAM 3D Objects: images and their point maps."""

import numpy as np
import pytest
from PIL import Image

from eg3d_rlhf.models.image_preprocessing import ObjectCut
from eg3d_rlhf.tuning.flow.families.sam3d import _check_point_maps, inputs_of
from tests.rejections import raising


def write(folder, name: str, orientation: int | None = None):
    image = Image.new("RGBA", (30, 20), (90, 90, 90, 0))
    image.paste((200, 100, 50, 255), (8, 5, 20, 15))
    exif = Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    image.save(folder / f"{name}.png", exif=exif)
    np.save(folder / f"{name}.npy", np.ones((20, 30, 3), np.float32))
    return folder / f"{name}.png"


def test_all_missing_point_maps_are_listed_at_once(tmp_path):
    paths = [write(tmp_path, name) for name in "abcd"]
    _check_point_maps(paths)
    for name in ("a", "c"):
        (tmp_path / f"{name}.npy").unlink()
    with raising("--images", "a.npy", "c.npy", "2", kind=FileNotFoundError) as caught:
        _check_point_maps(paths)
    assert "b.npy" not in str(caught.value)


@pytest.mark.parametrize("orientation", [3, 6])
def test_a_point_map_of_an_image_on_its_side_is_not_guessed(tmp_path, orientation):
    cut = ObjectCut(size=12)
    path = write(tmp_path, "turned", orientation)
    with raising(str(path), "turned.npy"):
        inputs_of(path, cut, reads_point_map=True)
    assert inputs_of(path, cut, reads_point_map=False)["image"].shape == (3, 12, 12)
    assert "pointmap" in inputs_of(write(tmp_path, "upright", 1), cut, reads_point_map=True)
