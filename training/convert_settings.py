"""Settings of the conversion of an image set; imports no torch."""

from dataclasses import dataclass

from training.config import check_choice

TRANSFORMS = ("center-crop", "center-crop-wide")


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """What happens to every image and label."""

    transform: str | None = None  # None: the whole image; else one of TRANSFORMS
    resolution: tuple[int, int] | None = None  # (width, height) in pixels; None keeps the size
    max_images: int | None = None  # the first so many in the order of names
    mirror: bool = False  # write every image mirrored as well, right after itself, with its pose mirrored
    labels: str = "check"  # 'check': all images or none have a label; 'drop': write none

    def __post_init__(self) -> None:
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
                " Raise it."
            )
        if self.transform is not None and self.resolution is None:
            raise ValueError(
                f"--transform={self.transform}: expected --resolution=WxH with it, got none. Add it."
            )
        if self.transform == "center-crop-wide" and self.size[0] < self.size[1]:
            got = "x".join(map(str, self.size))
            raise ValueError(f"--resolution: expected W >= H for center-crop-wide, got {got}. Swap them.")

    @property
    def size(self) -> tuple[int, int]:
        """The resolution, which goes with every transform."""
        assert self.resolution is not None
        return self.resolution
