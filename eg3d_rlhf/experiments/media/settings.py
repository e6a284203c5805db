"""Values of flags of renderings and films. This file imports no torch, so that `--help` is quick."""

from typing import Any

FFHQ_FOV = 18.837  # degrees over the image's diagonal
CAMERAS: dict[str, dict[str, Any]] = {  # by data set: pivot in world units, field of view in degrees
    "FFHQ": {"pivot": (0.0, 0.0, 0.2), "fov": FFHQ_FOV},
    "AFHQ": {"pivot": (0.0, 0.0, -0.06), "fov": FFHQ_FOV},
    "Shapenet": {"pivot": (0.0, 0.0, 0.0), "fov": 45.0},
}
MODES = ("image", "image_depth", "image_raw")
