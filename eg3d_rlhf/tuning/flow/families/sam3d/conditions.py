"""Pictures, masks and point maps of objects as the embedder reads them.

An object is a picture <name>.png or .webp whose opacity is its mask, with all around it still in the colours, and a point map
<name>.npy [h, w, 3] of the same picture: places as seen from the camera, z forward, not finite where there is none.

Shape letters: H, W pixels, h, w points, s the side of a square.
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from eg3d_rlhf.core.shapes import check_shape
from eg3d_rlhf.models.sam3d.embedder import Embedder
from eg3d_rlhf.tuning.flow.conditions import read_array

MARGIN = 0.1  # around the mask's box, in sides of it


def inputs_of(path: Path, embedder: Embedder) -> dict[str, torch.Tensor]:
    """What the embedder is told of an object, [1, ., s, s] by name: cut out about the mask, and whole in the middle of a square.

    Raises: FileNotFoundError for a point map that is not there; ValueError for a picture that shows nothing, or a map of another shape.
    """
    image = Image.open(path)
    if image.mode != "RGBA" or image.getchannel("A").getextrema()[0] == 255:
        raise ValueError(f"{path}: expected the object's mask as opacity (RGBA), got {image.mode} without. Save the mask with the picture.")
    pixels = torch.from_numpy(np.asarray(image).astype(np.float32) / 255).permute(2, 0, 1)  # [4, H, W]
    mask = (pixels[3:] > 0.5).float()
    if not mask.any():
        raise ValueError(f"{path}: expected a mask of a pixel or more, got none. Choose another picture.")
    found = {"rgb_image": squared(pixels[:3], 0.0), "rgb_image_mask": squared(mask, 0.0)}
    found |= {"image": cut(pixels[:3], mask, 0.0), "mask": cut(mask, mask, 0.0)}
    if "pointmap" in embedder.names or "rgb_pointmap" in embedder.names:
        points = _points(path.with_suffix(".npy"), mask)
        found |= {"rgb_pointmap": squared(points, float("nan")), "pointmap": cut(points, mask, float("nan"))}
    return {name: tensor[None] for name, tensor in found.items() if name in embedder.names}


def _points(path: Path, mask: torch.Tensor) -> torch.Tensor:
    """A point map, [3, H, W] by the nearest point, in units of the object's median depth."""
    if not path.is_file():
        raise FileNotFoundError(f"conditions: expected a point map at {path}, got none. Make it by a depth network, and save it there.")
    points = read_array(path).float()
    check_shape(str(path), points, ["h", "w", 3], "Save one place per pixel.")
    points = points.permute(2, 0, 1)
    if points.shape[1:] != mask.shape[1:]:
        points = torch.nn.functional.interpolate(points[None], mask.shape[1:], mode="nearest")[0]
    depths = points[2][(mask[0] > 0) & points.isfinite().all(0)]
    if not len(depths) or float(depths.median()) <= 0:
        raise ValueError(f"{path}: expected places in front of the camera (z > 0) on the object, got none. Turn the axes.")
    return points / depths.median()


def squared(x: torch.Tensor, around: float) -> torch.Tensor:
    """[C, H, W] in the middle of a square [C, s, s]."""
    height, width = x.shape[1:]
    s = max(height, width)
    top, left = (s - height) // 2, (s - width) // 2
    return torch.nn.functional.pad(x, (left, s - width - left, top, s - height - top), value=around)


def cut(x: torch.Tensor, mask: torch.Tensor, around: float) -> torch.Tensor:
    """The square [C, s, s] of [C, H, W] about the box of mask [1, H, W], with a margin; what is outside has the value `around`."""
    rows, columns = (mask[0].any(axis).nonzero() for axis in (1, 0))
    (top, bottom), (left, right) = ((int(places[0]), int(places[-1]) + 1) for places in (rows, columns))
    s = max(1, round((1 + 2 * MARGIN) * max(bottom - top, right - left)))
    y, x0 = (top + bottom - s) // 2, (left + right - s) // 2
    pad = (max(0, -x0), max(0, x0 + s - x.shape[2]), max(0, -y), max(0, y + s - x.shape[1]))
    wide = torch.nn.functional.pad(x, pad, value=around)
    return wide[:, y + pad[2] : y + pad[2] + s, x0 + pad[0] : x0 + pad[0] + s]
