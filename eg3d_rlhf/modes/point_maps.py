"""The job `data point-maps`, which makes the point maps that SAM 3D Objects reads beside its images."""

from pathlib import Path

import click
import numpy as np

from eg3d_rlhf.core.cli import GroupedCommand, argument, option
from eg3d_rlhf.modes.shared_flags import FOLDER

IMAGE_SUFFIXES = (".png", ".webp")  # file types of images that are cut out, see `flow new`
DEPTH_SUFFIXES = (".npy", ".png", ".tif", ".tiff")  # file types of depth maps, in the order of the search


def check_folder(path: Path) -> None:
    """Raise FileNotFoundError if there is no folder at a path."""
    if not path.is_dir():
        raise FileNotFoundError(f"there is no folder {path}. Pass the path of a folder.")


@click.command("point-maps", cls=GroupedCommand)
@argument("depths", check_folder, metavar="DEPTHS", type=FOLDER)
@option(
    "--images",
    metavar="DIR",
    type=FOLDER,
    check=check_folder,
    required=True,
    help="Folder of images NAME.png. The point map of an image is written beside it, as NAME.npy.",
)
@option(
    "--focal",
    metavar="PIXELS",
    type=click.FloatRange(min=0, min_open=True),
    default=None,
    show_default="computed from --fov",
    help="Focal length of the camera, in pixels of the depth maps.",
)
@option(
    "--fov",
    metavar="DEGREES",
    type=click.FloatRange(min=0, max=180, min_open=True, max_open=True),
    default=None,
    show_default="computed from --focal",
    help="Horizontal field of view of the camera, instead of --focal.",
)
@option(
    "--unit",
    metavar="FLOAT",
    type=click.FloatRange(min=0, min_open=True),
    default=1.0,
    help="Factor of the stored depths, such as 0.001 for millimetres in 16-bit images.",
)
def point_maps(depths: Path, images: Path, focal: float | None, fov: float | None, unit: float) -> None:
    """Make point maps from depth maps and the focal length, for generators that read them beside images, such
    as SAM 3D Objects. DEPTHS is a folder with a depth map of each image, NAME.npy [h, w] or a 16-bit
    NAME.png: the depth along the optical axis, and 0 or NaN where there is no point.

    \b
    Example:
        eg3d-rlhf data point-maps DEPTHS --images=IMAGES --fov=55 --unit=0.001
    """
    from eg3d_rlhf.geometry.point_maps import depth_to_points, focal_of

    if (focal is None) == (fov is None):
        raise ValueError("--focal or --fov: give exactly one of them. Both state the same camera.")
    image_paths = [path for path in sorted(images.glob("*")) if path.suffix.lower() in IMAGE_SUFFIXES]
    if not image_paths:
        raise FileNotFoundError(
            f"--images: no image ({', '.join(IMAGE_SUFFIXES)}) was found in {images}. Name the folder of the"
            " images."
        )
    point_maps_by_path = {}
    # All are computed before the first is written, so that a mistake leaves no files.
    for image_path in image_paths:
        target_path = image_path.with_suffix(".npy")
        if target_path.exists():
            raise ValueError(f"--images: {target_path} exists already. Move it away to compute it again.")
        depth_path = next(
            (path for suffix in DEPTH_SUFFIXES if (path := depths / f"{image_path.stem}{suffix}").is_file()),
            None,
        )
        if depth_path is None:
            raise FileNotFoundError(
                f"DEPTHS: there is no depth map {image_path.stem} ({', '.join(DEPTH_SUFFIXES)}) in {depths}"
                f" for {image_path.name}. Add it, or remove the image."
            )
        depth = read_depth(depth_path) * unit
        pixels = focal if focal is not None else focal_of(fov or 0.0, depth.shape[1])
        try:
            point_maps_by_path[target_path] = depth_to_points(depth, pixels)
        except ValueError as error:
            raise ValueError(f"{depth_path}: {error}") from None
    for target_path, points in point_maps_by_path.items():
        np.save(target_path, points)
    all_depths = np.concatenate([points[..., 2].ravel() for points in point_maps_by_path.values()])
    click.echo(
        f"{len(point_maps_by_path)} point maps in {images}; median depth {np.nanmedian(all_depths):.3g},"
        f" {np.isnan(all_depths).mean():.0%} of the pixels without a point"
    )
    click.echo(f"next: eg3d-rlhf flow new WORK --pipeline=ROOT --images={images}")


def read_depth(path: Path) -> np.ndarray:
    """Read a depth map [h, w] in float64 from an array, or from an image of 16-bit or float values.

    Raises: ValueError for a file of another kind, or for an image of 8 bits or with several channels.
    """
    if path.suffix == ".npy":
        try:
            # allow_pickle is False by default, so code in the file is not executed
            depth = np.load(path)
        except (ValueError, OSError) as error:
            raise ValueError(
                f"{path}: the file is no array of numpy ({error}). Write it with np.save."
            ) from None
    else:
        from PIL import Image, UnidentifiedImageError

        try:
            with Image.open(path) as image:
                mode = image.mode
                depth = np.asarray(image)
        except (UnidentifiedImageError, OSError) as error:
            raise ValueError(
                f"{path}: the image cannot be read ({error}). Write it again, or save an array .npy."
            ) from None
        # 8 bits are the colours of a rendering of the depth, not depths
        if not (mode.startswith("I") or mode == "F"):
            raise ValueError(
                f"{path}: a depth map must have one channel of 16 bits or float values, got an image of the"
                f" mode {mode}. Save the depths as a 16-bit PNG or as .npy."
            )
    if depth.dtype.kind not in "fui":
        raise ValueError(f"{path}: a depth map must hold numbers, got {depth.dtype}. Save the depths.")
    return depth.astype(np.float64)
