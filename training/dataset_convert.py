"""Conversion of an image set to the form that training reads: square PNGs, checked camera labels, a folder or
zip.

Worker processes decode, crop, resize and encode images. The parent writes them in order, so the result does
not depend on the number of workers. The target appears under its own name only when it is complete.

Shape letters: H, W = rows and columns of an image, C channels, R resolution.
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

from training.convert_settings import ConvertOptions
from training.dataset import LABELS_FILE, ImageFiles, in_order, label_array
from training.rendering.cameras import LABEL_NUMBERS, POSE_NUMBERS, mirror_label

ZIP_DATE = (2020, 1, 1, 0, 0, 0)  # constant, so that equal options give equal bytes
_CHUNK = 8  # images per task of a worker


@dataclass(frozen=True, kw_only=True)
class Converted:
    """Summary of a conversion."""

    images: int  # images written, mirrored copies included
    shape: tuple[int, int, int]  # (C, R, R)
    labels: int  # numbers per label, 0 for none (1 for class indices)
    enlarged: int  # number of source images smaller than the target
    cropped_labels: int  # number of camera labels whose intrinsics were adapted to a crop


def crop_box(options: ConvertOptions, width: int, height: int) -> tuple[int, int, int, int]:
    """Return the part of an image that is kept, (left, top, right, bottom) in pixels.

    It is the largest centred rectangle of the target's aspect ratio.
    """
    if options.transform is None:
        return 0, 0, width, height
    w, h = (1, 1) if options.transform == "center-crop" else options.size
    scale = min(width / w, height / h)  # of the largest rectangle that fits
    kept_w = max(1, round(w * scale))
    kept_h = max(1, round(h * scale))
    left = (width - kept_w) // 2
    top = (height - kept_h) // 2
    return left, top, left + kept_w, top + kept_h


def transform_image(image: PIL.Image.Image, options: ConvertOptions) -> PIL.Image.Image:
    """Crop and resize (Lanczos) an image; center-crop-wide then centres it on a black square of its width."""
    image = image.crop(crop_box(options, *image.size))
    if options.resolution is not None and image.size != options.resolution:
        image = image.resize(options.resolution, PIL.Image.Resampling.LANCZOS)
    if options.transform != "center-crop-wide":
        return image
    canvas = PIL.Image.new(image.mode, (image.width, image.width))  # black
    canvas.paste(image, (0, (image.width - image.height) // 2))
    return canvas


def transform_camera(label: np.ndarray, options: ConvertOptions, width: int, height: int) -> np.ndarray:
    """Return a camera label of 25 numbers after the crop and padding of its image. Resizing changes nothing.

    Intrinsics are in units of the image, x in its width and y in its height (EG3D's convention, on square
    images). A crop to w x h pixels therefore rescales them: f_x' = f_x W / w, c_x' = (c_x W - left) / w, and
    likewise in y. The black bars of center-crop-wide rescale y once more.

    Args:
        label: [25].
        options: transform and resolution.
        width, height: W and H of the source image, pixels.
    """
    left, top, right, bottom = crop_box(options, width, height)
    k = label[POSE_NUMBERS:].reshape(3, 3).copy()
    # Row 0 of the intrinsics holds f_x, skew and c_x, row 1 holds f_y and c_y.
    k[0] *= width / (right - left)
    k[1] *= height / (bottom - top)
    k[0, 2] -= left / (right - left)
    k[1, 2] -= top / (bottom - top)
    if options.transform == "center-crop-wide":
        w, h = options.size
        k[1] *= h / w
        k[1, 2] += ((w - h) // 2) / w
    return np.concatenate([label[:POSE_NUMBERS], k.reshape(-1)])


def png(image: PIL.Image.Image) -> bytes:
    """Return an image as the bytes of an PNG without compression, as EG3D writes it."""
    buffer = io.BytesIO()
    image.save(buffer, format="png", compress_level=0)
    return buffer.getvalue()


def _convert(files: ImageFiles, options: ConvertOptions, entries: list[str]) -> list[tuple]:
    """Convert some entries, in a worker process.

    Returns for each entry: PNGs of the image and, if requested, of its mirror; size (W, H) before; shape (C,
    H, W) after.
    """
    ready = []
    for entry in entries:
        source = files.decode(entry)  # a damaged entry is an error here, in the worker
        image = transform_image(source, options)
        images = [image, image.transpose(PIL.Image.Transpose.FLIP_LEFT_RIGHT)] if options.mirror else [image]
        shape = (len(image.getbands()), image.height, image.width)
        ready.append(([png(output) for output in images], source.size, shape))
    return ready


def read_labels(files: ImageFiles, options: ConvertOptions) -> list | None:
    """Return one checked label per image that is kept, as stored; None for a set without labels.

    Raises: ValueError if only some images have a label, or if one is malformed; see `label_array`.
    """
    stored = None if options.labels == "drop" or LABELS_FILE not in files.entries else files.read_labels()
    if stored is None:
        return None
    # Only the images that are kept are checked; a slice with None keeps all.
    names = files.images[: options.max_images]
    where = f"dataset {files.path}: {LABELS_FILE}"
    stored = stored[: len(names)]
    values = label_array(stored, names, where, None)
    # Mirroring a camera is defined; a mirrored label of another kind could be wrong, so it is not made.
    if options.mirror and values.ndim == 2 and values.shape[1] != LABEL_NUMBERS:
        raise ValueError(
            f"{where}: expected camera labels of {LABEL_NUMBERS} numbers to mirror, got {values.shape[1]}."
            " Leave out --mirror, or use --labels=drop."
        )
    return stored


def _output_labels(label, options: ConvertOptions, size: tuple[int, int]) -> list:
    """Return the labels of the outputs of one source image. Numbers that do not change stay as stored."""
    padded = options.transform == "center-crop-wide" and options.size[0] != options.size[1]
    if (
        isinstance(label, list)
        and len(label) == LABEL_NUMBERS
        and (padded or crop_box(options, *size) != (0, 0, *size))
    ):
        label = transform_camera(np.array(label, dtype=np.float64), options, *size).tolist()
    if not options.mirror:
        return [label]
    if not isinstance(label, list):
        return [label, label]  # a class index does not change when the image is mirrored
    return [label, mirror_label(torch.tensor([label], dtype=torch.float64))[0].tolist()]


def _check_shape(shape: tuple[int, int, int], first: tuple[int, int, int], entry: str, where: str) -> None:
    """Raise ValueError unless an image is square, a power of two in size, and like the first one."""
    _, height, width = shape
    # width & (width - 1) is 0 for powers of two only, the resolutions of StyleGAN2 networks.
    if height != width or width & (width - 1):
        wanted = "a square image whose side is a power of two"
        remedy = "Add --transform=center-crop --resolution=WxH."
        raise ValueError(f"{where}: entry {entry!r}: expected {wanted}, got {width}x{height}. {remedy}")
    if shape != first:
        wanted = f"{list(first)} (channels, height, width) as the first image"
        remedy = "Add --resolution, or convert it to RGB."
        raise ValueError(f"{where}: entry {entry!r}: expected {wanted}, got {list(shape)}. {remedy}")


def convert_dataset(
    source: str | Path,
    dest: str | Path,
    options: ConvertOptions,
    workers: int = 1,
    on_image: Callable[[int], object] = lambda count: None,
    overwrite: bool = False,
) -> Converted:
    """Write the images and labels of `source` to `dest`, with dataset.json.

    Args:
        source: folder or zip.
        dest: a .zip, stored without compression, or a folder.
        options: transforms.
        workers: number of processes.
        on_image: called with 1 for every source image that was written.
        overwrite: replace a zip that exists. A folder is never replaced.
    Raises: ValueError naming file, entry and remedy for anything missing, damaged or inconsistent; OSError
        for a full disk. In both cases `dest` stays as it was.
    """
    files = ImageFiles(Path(source))
    dest = Path(dest)
    labels = read_labels(files, options)
    entries = files.images[: options.max_images]
    target = options.resolution
    rows: list[list] = []
    first: tuple[int, int, int] | None = None
    enlarged = 0
    cropped = 0
    # The handle must not be shared with the workers, which are forked below.
    files.close()
    chunks = [entries[i : i + _CHUNK] for i in range(0, len(entries), _CHUNK)]
    killed = "dataset_tool: a worker process was killed. Free memory, or use --workers=1."
    converted = in_order(functools.partial(_convert, files, options), chunks, workers, killed)
    with writer(dest, Path(source), overwrite) as write, contextlib.closing(converted):
        for i, (images, size, shape) in enumerate(itertools.chain.from_iterable(converted)):
            first = first or shape
            _check_shape(shape, first, entries[i], f"dataset {files.path}")
            outputs = [None] * len(images) if labels is None else _output_labels(labels[i], options, size)
            for image, label in zip(images, outputs, strict=True):
                # EG3D's names: a thousand images per folder.
                rows.append([f"{len(rows) // 1000:05d}/img{len(rows):08d}.png", label])
                write(rows[-1][0], image)
            left, top, right, bottom = crop_box(options, *size)
            enlarged += target is not None and (right - left < target[0] or bottom - top < target[1])
            # `_output_labels` returns the stored object itself if the crop changed nothing.
            cropped += labels is not None and outputs[0] is not labels[i]
            on_image(1)
        write(LABELS_FILE, json.dumps({"labels": None if labels is None else rows}).encode())
    assert first is not None  # a set without images is an error when it is opened
    length = 0 if labels is None else len(labels[0]) if isinstance(labels[0], list) else 1
    return Converted(images=len(rows), shape=first, labels=length, enlarged=enlarged, cropped_labels=cropped)


@contextlib.contextmanager
def writer(dest: Path, source: Path, overwrite: bool) -> Iterator[Callable[[str, bytes], None]]:
    """Yield a function write(name, bytes), which writes into a temporary folder or zip beside `dest`.

    If the block ends without an error, the temporary one takes the place of `dest`.

    Raises: ValueError if dest is the source, exists, or has another suffix.
    """
    to_zip = dest.suffix.lower() == ".zip"
    # A folder that contains the source would be converted into itself.
    if dest.resolve() == source.resolve() or (not to_zip and source.resolve().is_relative_to(dest.resolve())):
        raise ValueError(f"--dest: expected another place than --source, got {dest}. Name a new one.")
    if not to_zip and dest.suffix.lower() in (".tar", ".gz", ".tgz", ".7z", ".rar"):
        raise ValueError(f"--dest: expected a .zip or a folder, got {dest.name}. Change the name.")
    if dest.is_dir() and (to_zip or any(dest.iterdir())):
        wanted = "a zip file" if to_zip else "an empty folder"
        raise ValueError(
            f"--dest: expected {wanted}, got a folder at {dest}{'' if to_zip else ' with content'}. Name"
            " another."
        )
    if dest.is_file() and not (to_zip and overwrite):
        raise ValueError(
            f"--dest: expected a new {'zip (or --overwrite)' if to_zip else 'folder'}, got the file {dest}."
            " Name another."
        )
    dest.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, hence on the same disk, where a rename is atomic.
    part = dest.with_name(f".{dest.name}.{os.getpid()}.tmp")
    try:
        if to_zip:
            with zipfile.ZipFile(part, "w", zipfile.ZIP_STORED) as archive:
                yield lambda name, data: archive.writestr(zipfile.ZipInfo(name, ZIP_DATE), data)
            # The bytes must be on the disk before the rename, else a crash could leave an empty file.
            with open(part, "rb") as file:
                os.fsync(file.fileno())
            os.replace(part, dest)
            return
        part.mkdir()

        def write(name: str, data: bytes) -> None:
            (part / name).parent.mkdir(exist_ok=True)
            (part / name).write_bytes(data)

        yield write
        if dest.is_dir():
            dest.rmdir()  # it is empty, as checked above; only POSIX can rename onto an empty folder
        os.replace(part, dest)
    except OSError as error:
        raise OSError(
            f"--dest: cannot write {dest} ({error}). Check the free space and the permissions there."
        ) from error
    finally:
        if part.is_dir():
            shutil.rmtree(part, ignore_errors=True)
        part.unlink(missing_ok=True)
