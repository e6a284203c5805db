"""The fixed rig of cameras with which a judge is shown assets.

Nine cameras look at the centre of the asset: eight at azimuths of 45 degrees, 5 degrees above the horizon,
and one from above. All have a field of view of 40 degrees, at the distance from which the bounding sphere of
the asset just fits. The first view is from +z, the front in our world, and azimuths increase towards +x; y
points up.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

# name of each view, in the order of the montage
VIEW_NAMES = (
    "front",
    "front right 45",
    "right 90",
    "back right 135",
    "back 180",
    "back left 225",
    "left 270",
    "front left 315",
    "above",
)


@dataclass(frozen=True, kw_only=True)
class Rig:
    """Cameras, size and grounds of the renders that a judge is shown."""

    resolution: int = 384  # pixels per side of a view
    elevation: float = 5.0  # degrees above the horizon of the eight views
    fov: float = 40.0  # field of view along a side of the image, degrees
    margin: float = 1.05  # factor on the distance at which the bounding sphere touches the image's border
    ground: int = 128  # grey of the ground, 0..255
    second_ground: int = 255  # grey of the second set of views, for assets that are hard to see on the first
    # A second set is made if the mean saturation of the foreground is below `pale_saturation`, and its mean
    # brightness above `pale_brightness`: such an asset nearly vanishes on one of the two grounds.
    pale_saturation: float = 0.15
    pale_brightness: float = 0.45
    # Fields are marched with fewer pixels, since each pixel needs a hundred evaluations of a network.
    field_resolution: int = 128

    @property
    def focal(self) -> float:
        """Return the focal length in sides of the image."""
        return 0.5 / math.tan(math.radians(self.fov) / 2)

    @property
    def distance(self) -> float:
        """Return the distance of the cameras from the centre, in radii of the bounding sphere."""
        return self.margin / math.sin(math.radians(self.fov) / 2)

    def cam2world(self) -> np.ndarray:
        """Return the poses [9, 4, 4] of the cameras with OpenCV axes, for a bounding sphere of radius 1."""
        # The view from above has azimuth 0, so that its lower border is the front.
        azimuths = [*range(0, 360, 45), 0]
        elevations = [self.elevation] * 8 + [90.0]
        poses = []
        for azimuth, elevation in zip(np.radians(azimuths), np.radians(elevations), strict=True):
            # From the centre to the camera.
            backward = np.array(
                [
                    np.sin(azimuth) * np.cos(elevation),
                    np.sin(elevation),
                    np.cos(azimuth) * np.cos(elevation),
                ]
            )
            # From above, the front of the asset is at the lower border of the image. The right direction
            # follows from the azimuth alone, so it is defined there, too.
            right = np.array([np.cos(azimuth), 0.0, -np.sin(azimuth)])
            down = np.cross(-backward, right)
            # Columns: right, down and forward axis of the camera, and its position.
            pose = np.eye(4)
            pose[:3] = np.stack([right, down, -backward, self.distance * backward], axis=1)
            poses.append(pose)
        return np.stack(poses)

    def to_json(self) -> dict[str, Any]:
        """Return the rig in JSON types, as part of the identity of a judge and of the keys of renders."""
        return {**asdict(self), "views": list(VIEW_NAMES)}
