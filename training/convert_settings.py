"""Settings of the conversion of an image set (tools/dataset_tool.py).

This module does not import torch, so that the command starts quickly.
"""

import math
from dataclasses import dataclass

from training.config import check_choice

TRANSFORMS = ("center-crop", "center-crop-wide")
# Cures in the order in which they are applied, with the mistake that each of them corrects.
CURES = {
    "pixels": "the intrinsics are in pixels, or were divided by another size than that of the image",
    "transpose": "the matrices, or the rotations alone, are stored in column-major order",
    "world2cam": "the poses are world-to-camera",
    "opengl": "the camera axes are those of OpenGL and Blender (y up, z backward)",
    "zup": "the z axis of the world points up, as in Blender",
}


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """Transforms that are applied to every image and camera label of a set."""

    transform: str | None = None  # crop, one of TRANSFORMS; None: images are not cropped
    resolution: tuple[int, int] | None = None  # (width, height) of the result in pixels; None: no resizing
    max_images: int | None = None  # number of images to use, first in the order of names; None: all images
    mirror: bool = False  # True: write a mirrored copy after each image, with a mirrored camera pose
    # 'check': write the labels, and reject a set in which only some images have a label. 'drop': write
    # no labels.
    labels: str = "check"
    fix_cameras: tuple[str, ...] = ()  # cures of camera labels, names in CURES
    camera_scale: float = 1.0  # factor on the positions of the cameras
    strict_cameras: bool = False  # True: warnings about cameras are errors

    def __post_init__(self) -> None:
        # Messages name the flags of tools/dataset_tool.py, because users set these fields only there.
        if self.transform is not None:
            check_choice("--transform", self.transform, TRANSFORMS)
        check_choice("--labels", self.labels, ("check", "drop"))
        if self.resolution is not None and min(self.resolution) < 1:
            width, height = self.resolution
            raise ValueError(
                f"--resolution: expected at least 1 pixel along each axis, got {width}x{height}. Write"
                " --resolution=WxH, for example 512x512."
            )
        if self.max_images is not None and self.max_images < 1:
            raise ValueError(
                f"--max-images: expected at least 1, got {self.max_images}. Leave the flag out to convert all"
                " images."
            )
        if not (self.camera_scale > 0 and math.isfinite(self.camera_scale)):
            raise ValueError(
                f"--camera-scale: expected a number above 0, got {self.camera_scale:g}. Write, for example,"
                " 0.001 for positions in millimetres."
            )
        for flag, is_set in (
            ("--fix-cameras", bool(self.fix_cameras)),
            ("--camera-scale", self.camera_scale != 1),
            ("--strict-cameras", self.strict_cameras),
        ):
            if is_set and self.labels == "drop":
                raise ValueError(
                    f"{flag} has no effect with --labels=drop, which writes no labels. Remove one of them."
                )
        if self.transform is not None and self.resolution is None:
            raise ValueError(
                f"--transform={self.transform} needs a target size. Add --resolution=WxH, in pixels."
            )
        if self.transform == "center-crop-wide" and self.size[0] < self.size[1]:
            width, height = self.size
            raise ValueError(
                "--resolution: --transform=center-crop-wide needs a width of at least the height, got"
                f" {width}x{height}. Write --resolution={height}x{width}, or use --transform=center-crop."
            )

    @property
    def size(self) -> tuple[int, int]:
        """Target (width, height) in pixels.

        The property may be read only if `transform` is set, which requires a resolution.
        """
        assert self.resolution is not None
        return self.resolution


def parse_cures(flag_value: str | None) -> tuple[str, ...]:
    """Return the names in the value of --fix-cameras, in the order of application.

    Raises: ValueError for an unknown name or an empty value.
    """
    if flag_value is None:
        return ()
    names = [name.strip() for name in flag_value.split(",")]
    for name in names:
        if name not in CURES:
            raise ValueError(
                f"--fix-cameras: {name!r} is no cure. Write one or several of {', '.join(CURES)}, separated"
                " by commas."
            )
    return tuple(name for name in CURES if name in names)
