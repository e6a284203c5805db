"""Warnings about an image set that a job is about to use with a generator."""

import sys
from pathlib import Path

from eg3d_rlhf.generators import Generator
from training.camera_conventions import Scene
from training.dataset import ImageFolderDataset

# (path of a set, text of a warning) that this process has printed. Some jobs open their set several times.
_printed: set[tuple[Path, str]] = set()


def scene_of(generator: Generator, source: str) -> Scene:
    """Return the region that the cameras of a generator's training images have to show.

    Args: generator: the generator; source: its name for messages, such as --init=FILE.
    """
    cameras = generator.cameras
    side = generator.bounds.side
    return Scene(
        pivot=cameras.pivot,
        box_sides=(side, side),
        radius=cameras.radius,
        ray_range=cameras.span,
        pivot_tolerance=0.1,
        source=source,
    )


def warn_about_images(
    dataset: ImageFolderDataset,
    generator: Generator,
    source: str,
    is_strict: bool = False,
    is_printing: bool = True,
) -> None:
    """Print warnings on files that are skipped, and on cameras that hardly suit the generator, to stderr.

    A warning about a set is printed once in a process.

    Args:
        dataset: the image set.
        generator: generator that is trained on the set or compared with it.
        source: name of the generator for messages.
        is_strict: True: a warning about cameras is an error.
        is_printing: False: nothing is printed, on ranks other than the first.
    Raises: ValueError for a warning about cameras if `is_strict` is True.
    """
    camera_warning = dataset.camera_warning(scene_of(generator, source))
    if camera_warning is not None and is_strict:
        raise ValueError(f"--strict-cameras: {camera_warning}")
    for warning in [*dataset.notes(), *([] if camera_warning is None else [camera_warning])]:
        if is_printing and (dataset.path, warning) not in _printed:
            _printed.add((dataset.path, warning))
            print(f"Warning: {warning}", file=sys.stderr, flush=True)
