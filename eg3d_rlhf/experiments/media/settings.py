"""Default values of the flags of rendering and film commands.

This module does not import torch, so that `--help` is fast.
"""

from typing import Any

FFHQ_FOV = 18.837  # field of view in degrees, over the diagonal of the image
# pivot [x, y, z] in world units and field of view in degrees, by data set of EG3D
CAMERAS: dict[str, dict[str, Any]] = {
    "FFHQ": {"pivot": (0.0, 0.0, 0.2), "fov": FFHQ_FOV},
    "AFHQ": {"pivot": (0.0, 0.0, -0.06), "fov": FFHQ_FOV},
    "Shapenet": {"pivot": (0.0, 0.0, 0.0), "fov": 45.0},
}
MODES = ("image", "image_depth", "image_raw")  # kinds of images, see media.rendering.render
