"""Input files of SAM 3D Objects: images and their point maps."""

import numpy as np
import pytest
from PIL import Image

from eg3d_rlhf.geometry.point_maps import depth_to_points
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


def test_point_maps_of_other_axes_are_listed(tmp_path):
    """MoGe's axes, x right and y down, and maps with one axis turned; the right map is not named."""
    depth = 2 + np.random.default_rng(0).random((20, 30))
    depth[:4, :7] = np.nan
    points = depth_to_points(depth, focal=25.0)
    signs = {"right": (1, 1, 1), "moge": (-1, -1, 1), "x": (-1, 1, 1), "y": (1, -1, 1)}
    for name, sign in signs.items():
        write(tmp_path, name)
        np.save(tmp_path / f"{name}.npy", (points * sign).astype(np.float32))
    paths = [tmp_path / f"{name}.png" for name in signs]
    with raising("--images", "moge.npy (x and y)", "x.npy (x)", "y.npy (y)", "data point-maps") as caught:
        _check_point_maps(paths)
    assert "right.npy" not in str(caught.value)
    _check_point_maps(paths[:1])
