"""Settings of the conversion of an image set.

This module does not import torch, so that the command line starts quickly.
"""

from dataclasses import dataclass

from training.config import check_choice

TRANSFORMS = ("center-crop", "center-crop-wide")


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """Transforms that are applied to every image and label."""

    transform: str | None = None  # None: keep the whole image; else one of TRANSFORMS
    resolution: tuple[int, int] | None = None  # (width, height) in pixels; None: keep the size
    max_images: int | None = None  # use only the first images, in the order of names; None: all
    mirror: bool = False  # also write each image mirrored, right after the original, with a mirrored pose
    labels: str = "check"  # 'check': all images have a label or none has; 'drop': write no labels

    def __post_init__(self) -> None:
        # Messages name the flags of tools/dataset_tool.py, the only place where users give these settings.
        if self.transform is not None:
            check_choice("--transform", self.transform, TRANSFORMS)
        check_choice("--labels", self.labels, ("check", "drop"))
        if (
            self.resolution is not None
            and min(self.resolution) < 1
            or self.max_images is not None
            and self.max_images < 1
        ):
            raise ValueError(
                f"--resolution, --max-images: expected at least 1, got {self.resolution}, {self.max_images}."
                " Raise the value."
            )
        if self.transform is not None and self.resolution is None:
            raise ValueError(
                f"--transform={self.transform} needs a target size. Add --resolution=WxH, in pixels."
            )
        if self.transform == "center-crop-wide" and self.size[0] < self.size[1]:
            got = "x".join(map(str, self.size))
            raise ValueError(f"--resolution: expected W >= H for center-crop-wide, got {got}. Swap them.")

    @property
    def size(self) -> tuple[int, int]:
        """Target (width, height) in pixels. Every transform requires it."""
        assert self.resolution is not None
        return self.resolution
