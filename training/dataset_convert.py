"""Conversion of an image set to EG3D's dataset format: square PNGs and camera labels in a folder or
zip archive.

Worker processes decode, crop, resize and encode images. The parent process writes them in order, so the
result does not depend on the number of workers. The result has a temporary name until it is complete.

Shapes: H and W are the numbers of rows and columns of an image, C is the number of channels, R of pixels
per edge.
"""

import contextlib
import functools
import io
import itertools
import json
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL.Image
import torch

from training.camera_conventions import Scene, describe_cameras
from training.camera_cures import apply_cures, is_divided, size_is_inferred
from training.camera_labels import camera_warning, check_numbers, parse_labels
from training.convert_settings import ConvertOptions
from training.dataset import LABELS_FILE, ImageFiles, in_order
from training.image_reading import joined_errors, name_list
from training.rendering.cameras import LABEL_NUMBERS, POSE_NUMBERS, mirror_label

# Date of all files in an archive (year, month, day, hour, minute, second). It is constant, so that archives
# are reproducible.
ZIP_DATE = (2020, 1, 1, 0, 0, 0)
_CHUNK = 8  # number of images in a task of a worker


@dataclass(frozen=True, kw_only=True)
class Converted:
    """Summary of a conversion."""

    images: int  # number of images that were written, including mirrored copies
    shape: tuple[int, int, int]  # (C, R, R) of an image
    labels: int  # number of numbers in a label; 0 without labels, 1 for class indices
    enlarged: int  # number of source images that are smaller than the target
    cropped_labels: int  # number of camera labels whose intrinsics were adapted to a crop
    # Number of camera labels whose intrinsics belonged to another size than that of the image, which the
    # cure `pixels` took from the principal point.
    inferred_sizes: int
    cameras: str | None  # line on distance, focal length and direction of the cameras; None without cameras
    warnings: tuple[str, ...]  # sentences on skipped files, unused labels and cameras


def crop_box(options: ConvertOptions, width: int, height: int) -> tuple[int, int, int, int]:
    """Return the rectangle of a source image that is not cropped away.

    It is the largest centred rectangle with the aspect ratio of the target. Without a transform it is the
    full image.

    Args: options: transform and resolution; width, height: size of the source image in pixels.
    Returns: (left, top, right, bottom) in pixels.
    """
    if options.transform is None:
        return 0, 0, width, height
    # Aspect ratio of the rectangle.
    ratio_width, ratio_height = (1, 1) if options.transform == "center-crop" else options.size
    pixels_per_unit = min(width / ratio_width, height / ratio_height)
    crop_width = max(1, round(ratio_width * pixels_per_unit))
    crop_height = max(1, round(ratio_height * pixels_per_unit))
    left_edge = (width - crop_width) // 2
    top_edge = (height - crop_height) // 2
    return left_edge, top_edge, left_edge + crop_width, top_edge + crop_height


def transform_image(image: PIL.Image.Image, options: ConvertOptions) -> PIL.Image.Image:
    """Crop an image and resize it with a Lanczos filter.

    With center-crop-wide, the result is then centred on a black square of its width.
    """
    image = image.crop(crop_box(options, *image.size))
    if options.resolution is not None and image.size != options.resolution:
        image = image.resize(options.resolution, PIL.Image.Resampling.LANCZOS)
    if options.transform != "center-crop-wide":
        return image
    canvas = PIL.Image.new(image.mode, (image.width, image.width))  # black
    canvas.paste(image, (0, (image.width - image.height) // 2))
    return canvas


def transform_camera(label: np.ndarray, options: ConvertOptions, width: int, height: int) -> np.ndarray:
    """Adapt a camera label [25] to the crop and the padding of its image. Resizing does not change the label.

    In EG3D's labels, intrinsics are divided by the image size: x by the width and y by the height. A crop of
    a W x H image to w x h pixels therefore changes the focal length f_x and the principal point c_x to f_x' =
    f_x W / w and c_x' = (c_x W - left_edge) / w, and the values of y accordingly. The black bars of
    center-crop-wide scale y again.

    Args:
        label: camera label [25].
        options: transform and resolution.
        width, height: size W and H of the source image in pixels.
    Returns: the adapted label [25].
    """
    left_edge, top_edge, right_edge, bottom_edge = crop_box(options, width, height)
    intrinsics = label[POSE_NUMBERS:].reshape(3, 3).copy()
    # Row 0 contains f_x, the skew and c_x; row 1 contains f_y and c_y.
    intrinsics[0] *= width / (right_edge - left_edge)
    intrinsics[1] *= height / (bottom_edge - top_edge)
    intrinsics[0, 2] -= left_edge / (right_edge - left_edge)
    intrinsics[1, 2] -= top_edge / (bottom_edge - top_edge)
    if options.transform == "center-crop-wide":
        # The image of w x h pixels becomes a square of w x w pixels with bars of (w - h) // 2 rows.
        w, h = options.size
        intrinsics[1] *= h / w
        intrinsics[1, 2] += ((w - h) // 2) / w
    return np.concatenate([label[:POSE_NUMBERS], intrinsics.reshape(-1)])


def png(image: PIL.Image.Image) -> bytes:
    """Encode an image as a PNG without compression, as EG3D writes it."""
    png_buffer = io.BytesIO()
    image.save(png_buffer, format="png", compress_level=0)
    return png_buffer.getvalue()


def _convert(
    files: ImageFiles, options: ConvertOptions, grey_entries: frozenset[str], entries: list[str]
) -> list[tuple | str]:
    """Convert the images of some entries, in a worker process.

    Args:
        files: source set.
        options: transforms.
        grey_entries: greyscale images that become RGB, because other images of the set are RGB.
        entries: names of the entries.
    Returns: for each entry, a tuple of the PNGs (the image, and its mirrored copy if requested), the size (W,
        H) of the source image, and the shape (C, H, W) of the result. For a damaged entry, the message of the
        error.
    """
    conversion_results: list[tuple | str] = []
    for entry in entries:
        try:
            source_image = files.decode(entry)
        except ValueError as error:
            # Returned as text, so that all damaged images are listed at once.
            conversion_results.append(str(error))
            continue
        if entry in grey_entries:
            source_image = source_image.convert("RGB")
        image = transform_image(source_image, options)
        images = [image, image.transpose(PIL.Image.Transpose.FLIP_LEFT_RIGHT)] if options.mirror else [image]
        converted_shape = (len(image.getbands()), image.height, image.width)
        conversion_results.append(
            ([png(output_image) for output_image in images], source_image.size, converted_shape)
        )
    return conversion_results


def read_labels(files: ImageFiles, options: ConvertOptions) -> list | None:
    """Read and check the labels of the images that are converted.

    Returns: the labels in their stored form, or None if the set has no labels or `options.labels` is "drop".
    Raises: ValueError if only some images have a label, if a label is malformed or has another length than a
        camera label, or if the numbers of a camera label are impossible, also after the cures of `options`.
    """
    if options.labels == "drop" or LABELS_FILE not in files.entries:
        return None
    stored_labels = files.read_labels()
    if stored_labels is None:
        return None
    # With max_images = None, the slice contains all images.
    image_names = files.images[: options.max_images]
    stored_labels = stored_labels[: len(image_names)]
    file_description = f"dataset {files.path}: {LABELS_FILE}"
    # Class indices are accepted, lists of numbers only as cameras.
    c_dim = None if any(isinstance(label, int) for label in stored_labels) else LABEL_NUMBERS
    label_values = parse_labels(stored_labels, image_names, file_description, c_dim)
    if label_values.ndim == 2:
        if "pixels" in options.fix_cameras and is_divided(label_values).all():
            raise ValueError(
                f"{file_description}: --fix-cameras=pixels has no effect, because the intrinsics are divided"
                " by the image size already. Remove pixels from --fix-cameras."
            )
        # The sizes of images are unknown before they are decoded. The cure `pixels` then gives a principal
        # point of 0.5, and the written labels are checked once more.
        cured_labels = apply_cures(label_values, options.fix_cameras, options.camera_scale)
        _check_cameras(cured_labels, label_values, image_names, file_description, options)
    elif options.fix_cameras or options.camera_scale != 1 or options.strict_cameras:
        raise ValueError(
            f"{file_description}: --fix-cameras, --camera-scale and --strict-cameras need camera labels of"
            f" {LABEL_NUMBERS} numbers, but the labels are class indices. Remove these flags."
        )
    return stored_labels


def _check_cameras(
    labels: np.ndarray,
    uncured_labels: np.ndarray,
    image_names: list[str],
    file_description: str,
    options: ConvertOptions,
) -> list[str]:
    """Check camera labels, and return the warnings.

    Args:
        labels: camera labels after the cures [n, 25].
        uncured_labels: camera labels before the cures [n, 25].
        image_names: name of each image, for messages.
        file_description: name of the file of the labels, for messages.
        options: `strict_cameras` turns the warnings into errors.
    Raises: ValueError for impossible numbers, and for a warning if `options.strict_cameras` is True.
    """
    has_cures = bool(options.fix_cameras) or options.camera_scale != 1
    fixing = "Write" if has_cures else "Add"
    check_numbers(labels, image_names, file_description, fixing, uncured_labels)
    warning = camera_warning(labels, image_names, file_description, Scene(), fixing, uncured_labels)
    if warning is None:
        return []
    if options.strict_cameras:
        raise ValueError(f"--strict-cameras: {warning}")
    return [warning]


def _is_cropped(options: ConvertOptions, source_size: tuple[int, int]) -> bool:
    """Return True if the transform crops or pads an image, which changes its intrinsics."""
    is_padded = options.transform == "center-crop-wide" and options.size[0] != options.size[1]
    return is_padded or crop_box(options, *source_size) != (0, 0, *source_size)


def _output_labels(label, options: ConvertOptions, source_size: tuple[int, int]) -> list:
    """Return the labels of the images that are made from one source image.

    Args:
        label: label of the source image as stored: a list of numbers, or an integer class index.
        options: transforms.
        source_size: (width, height) of the source image in pixels.
    Returns: the label, and the label of the mirrored copy if requested. A label that does not change is the
        same object as `label`.
    """
    is_camera = isinstance(label, list)  # `read_labels` accepts lists only of this kind
    if is_camera and (options.fix_cameras or options.camera_scale != 1):
        label = apply_cures(
            np.array([label], dtype=np.float64),
            options.fix_cameras,
            options.camera_scale,
            np.array([source_size], dtype=np.float64),
        )[0].tolist()
    if is_camera and _is_cropped(options, source_size):
        label = transform_camera(np.array(label, dtype=np.float64), options, *source_size).tolist()
    if not options.mirror:
        return [label]
    if not isinstance(label, list):
        return [label, label]  # a class index does not change when the image is mirrored
    return [label, mirror_label(torch.tensor([label], dtype=torch.float64))[0].tolist()]


def _check_shape(
    image_shape: tuple[int, int, int], first_shape: tuple[int, int, int], entry: str, set_description: str
) -> None:
    """Raise ValueError unless an image is square, of a power-of-two size, and as large as the first image.

    The numbers of channels must be equal, too.

    Args:
        image_shape: (C, H, W) of the converted image.
        first_shape: (C, H, W) of the first converted image.
        entry: name of the source image, for messages.
        set_description: name of the set, for messages.
    """
    channels, height, width = image_shape
    # width & (width - 1) is 0 only for powers of two, which are the resolutions of StyleGAN2 networks.
    if height != width or width & (width - 1):
        raise ValueError(
            f"{set_description}: entry {entry!r}: expected a square image whose side is a power of two, got"
            f" {width}x{height}. Add --transform=center-crop and, for example, --resolution=512x512."
        )
    if channels != first_shape[0]:
        raise ValueError(
            f"{set_description}: entry {entry!r}: the image has {channels} channels, but the first image has"
            f" {first_shape[0]}. Convert all images to RGB."
        )
    if image_shape != first_shape:
        raise ValueError(
            f"{set_description}: entry {entry!r}: the image has {width}x{height} pixels, but the first image"
            f" has {first_shape[2]}x{first_shape[1]}. Add --resolution={first_shape[2]}x{first_shape[1]}."
        )


def convert_dataset(
    image_files: ImageFiles,
    source_labels: list | None,
    dest: str | Path,
    options: ConvertOptions,
    workers: int = 1,
    on_image: Callable[[int], object] = lambda count: None,
    overwrite: bool = False,
) -> Converted:
    """Convert an image set to EG3D's dataset format.

    Args:
        image_files: source set.
        source_labels: its labels, from `read_labels`.
        dest: path of the result, a .zip file (without compression) or a folder.
        options: transforms.
        workers: number of processes.
        on_image: function that is called with 1 after each source image, to show progress.
        overwrite: True: replace an existing .zip file. A folder is never replaced.
    Returns: a summary of the conversion.
    Raises: ValueError for missing, damaged or inconsistent data; OSError if the result cannot be written, for
        example because the disk is full. In both cases `dest` is not changed.
    """
    dest = Path(dest)
    entries = image_files.images[: options.max_images]
    target_size = options.resolution
    label_rows: list[list] = []
    camera_labels: list[list[float]] = []  # written labels of the images that are not mirrored
    source_sizes: list[tuple[int, int]] = []  # (width, height) of the source images in pixels
    first_shape: tuple[int, int, int] | None = None
    enlarged_count = 0
    cropped_count = 0
    unsuitable_images: list[str] = []
    grey_entries = image_files.grey_among_colour(entries)
    # The workers, which are forked below, must not share the open file.
    image_files.close()
    entry_chunks = [entries[i : i + _CHUNK] for i in range(0, len(entries), _CHUNK)]
    death_message = "dataset_tool: a worker process was killed. Free memory, or use --workers=1."
    conversion_results = in_order(
        functools.partial(_convert, image_files, options, frozenset(grey_entries)),
        entry_chunks,
        workers,
        death_message,
    )
    with open_writer(dest, image_files.path, overwrite) as write, contextlib.closing(conversion_results):
        for i, conversion_result in enumerate(itertools.chain.from_iterable(conversion_results)):
            if isinstance(conversion_result, str):
                unsuitable_images.append(conversion_result)
                continue
            images, source_size, converted_shape = conversion_result
            first_shape = first_shape or converted_shape
            try:
                _check_shape(converted_shape, first_shape, entries[i], f"dataset {image_files.path}")
            except ValueError as error:
                # The first image decides the size. If it is unsuitable, so are the others, most likely.
                if not label_rows:
                    raise
                unsuitable_images.append(str(error))
                continue
            output_labels = (
                [None] * len(images)
                if source_labels is None
                else _output_labels(source_labels[i], options, source_size)
            )
            for image, output_label in zip(images, output_labels, strict=True):
                # The names are EG3D's, with 1,000 images in a folder.
                image_name = f"{len(label_rows) // 1000:05d}/img{len(label_rows):08d}.png"
                label_rows.append([image_name, output_label])
                write(image_name, image)
            left_edge, top_edge, right_edge, bottom_edge = crop_box(options, *source_size)
            enlarged_count += target_size is not None and (
                right_edge - left_edge < target_size[0] or bottom_edge - top_edge < target_size[1]
            )
            if isinstance(output_labels[0], list):
                camera_labels.append(output_labels[0])
                source_sizes.append(source_size)
                cropped_count += _is_cropped(options, source_size)
            on_image(1)
        if unsuitable_images:
            raise ValueError(joined_errors(unsuitable_images))
        warnings = image_files.notes()
        if grey_entries:
            warnings.append(
                f"dataset {image_files.path}: greyscale images were converted to RGB, because other images"
                f" have colours ({len(grey_entries)}): {name_list(grey_entries)}."
            )
        inferred_sizes = 0
        if camera_labels:
            # Crops have changed the labels, and `pixels` has used the sizes of the images.
            uncured_labels = np.array(source_labels, dtype=np.float64)
            warnings += _check_cameras(
                np.array(camera_labels, dtype=np.float64),
                uncured_labels,
                entries,
                f"dataset {image_files.path}: {LABELS_FILE}",
                options,
            )
            if "pixels" in options.fix_cameras:
                inferred_sizes = int(size_is_inferred(uncured_labels, np.array(source_sizes)).sum())
        write(LABELS_FILE, json.dumps({"labels": None if source_labels is None else label_rows}).encode())
    assert first_shape is not None  # `ImageFiles` rejects a set without images
    if source_labels is None:
        label_length = 0
    else:
        label_length = len(source_labels[0]) if isinstance(source_labels[0], list) else 1
    return Converted(
        images=len(label_rows),
        shape=first_shape,
        labels=label_length,
        enlarged=enlarged_count,
        cropped_labels=cropped_count,
        inferred_sizes=inferred_sizes,
        cameras=describe_cameras(np.array(camera_labels), Scene()) if camera_labels else None,
        warnings=tuple(warnings),
    )


@contextlib.contextmanager
def open_writer(dest: Path, source: Path, overwrite: bool) -> Iterator[Callable[[str, bytes], None]]:
    """Yield a function write(name, data), which adds a file to a new folder or zip archive.

    The folder or archive has a temporary name beside `dest`. If the block ends without an error, it is
    renamed to `dest`, otherwise it is deleted.

    Args:
        dest: path of the result, a .zip file or a folder.
        source: path of the source set.
        overwrite: True: replace an existing .zip file.
    Raises: ValueError if `dest` exists already, would contain or replace the source, or is another kind of
        archive; OSError if it cannot be written.
    """
    is_zip_output = dest.suffix.lower() == ".zip"
    if dest.resolve() == source.resolve():
        raise ValueError(f"--dest: {dest} is also the --source. Name another file or folder.")
    if not is_zip_output and source.resolve().is_relative_to(dest.resolve()):
        raise ValueError(f"--dest: the folder {dest} contains the --source. Name another folder.")
    if not is_zip_output and dest.suffix.lower() in (".tar", ".gz", ".tgz", ".7z", ".rar"):
        raise ValueError(
            f"--dest: only .zip files and folders can be written, got {dest.name}. Write"
            f" --dest={dest.with_suffix('.zip')}."
        )
    if dest.is_dir() and is_zip_output:
        raise ValueError(f"--dest: {dest} is an existing folder, not a zip file. Name another file.")
    if dest.is_dir() and any(dest.iterdir()):
        raise ValueError(f"--dest: the folder {dest} is not empty. Name a new or empty folder.")
    if dest.is_file() and not is_zip_output:
        raise ValueError(f"--dest: {dest} is an existing file, not a folder. Name another folder.")
    if dest.is_file() and not overwrite:
        raise ValueError(
            f"--dest: the file {dest} exists already. Add --overwrite to replace it, or name another file."
        )
    dest.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder as the result, hence on the same disk, where renaming is atomic.
    temporary_path = dest.with_name(f".{dest.name}.{os.getpid()}.tmp")
    try:
        if is_zip_output:
            with zipfile.ZipFile(temporary_path, "w", zipfile.ZIP_STORED) as archive:
                yield lambda name, data: archive.writestr(zipfile.ZipInfo(name, ZIP_DATE), data)
            # The bytes must be on the disk before the file is renamed, otherwise a crash could leave an
            # empty file.
            with open(temporary_path, "rb") as archive_file:
                os.fsync(archive_file.fileno())
            os.replace(temporary_path, dest)
            return
        temporary_path.mkdir()

        def write(name: str, data: bytes) -> None:
            """Write one file of the set."""
            (temporary_path / name).parent.mkdir(exist_ok=True)
            (temporary_path / name).write_bytes(data)

        yield write
        if dest.is_dir():
            dest.rmdir()  # it is empty, as checked above; not every system can rename onto an existing folder
        os.replace(temporary_path, dest)
    except OSError as error:
        raise OSError(
            f"--dest: {dest} cannot be written ({error}). Check the free space and the permissions of this"
            " folder."
        ) from error
    finally:
        # After success there is nothing left to delete.
        if temporary_path.is_dir():
            shutil.rmtree(temporary_path, ignore_errors=True)
        temporary_path.unlink(missing_ok=True)
