"""Training images with camera labels, in EG3D's dataset format.

This module reads the files, defines the endless order in which images are used, and assembles batches. Worker
processes may read batches in advance. Their number does not change the batches.

Shapes: n is the number of images (of a set before mirroring, or of a batch), C of channels, R of pixels per
edge, and L of numbers in a label.
"""

import concurrent.futures
import concurrent.futures.process
import contextlib
import copy
import functools
import itertools
import json
import mmap
import multiprocessing
import os
import signal
import threading
import zipfile
import zlib
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch

from training.camera_conventions import Scene
from training.camera_labels import camera_warning, label_array
from training.distributed import Ranks
from training.image_reading import (
    IMAGE_SUFFIXES,
    UnusableImageError,
    check_header,
    joined_errors,
    left_out_lines,
    read_image,
    skipped_lines,
    split_names,
)
from training.input_paths import check_dataset
from training.rendering.cameras import LABEL_NUMBERS, mirror_label

LABELS_FILE = "dataset.json"  # name of the file with the labels inside a set
# Errors of reading a file of a folder or archive. RuntimeError: the archive has a password.
_ARCHIVE_ERRORS = (zipfile.BadZipFile, zlib.error, OSError, EOFError, KeyError, RuntimeError)


def parse_label_rows(data: bytes, file_description: str) -> dict[str, Any] | None:
    """Parse the bytes of a dataset.json, and return the label of each image name as stored.

    Args: data: content of the file; file_description: name of the file, for messages.
    Returns: labels by image name, or None for a set without labels ("labels": null).
    Raises: ValueError if the file has another form or names an image twice.
    """
    try:
        label_rows = json.loads(data)["labels"]
        if isinstance(label_rows, dict):
            raise ValueError("the value of labels is a mapping from names to labels")
        label_by_name = (
            None if label_rows is None else {str(image_name): label for image_name, label in label_rows}
        )
    except (ValueError, KeyError, TypeError) as error:
        reason = {KeyError: "there is no key labels", TypeError: "it is no JSON object of this form"}.get(
            type(error), str(error)
        )
        raise ValueError(
            f'{file_description}: expected {{"labels": [[image name, label], ...]}}, got another form:'
            f" {reason}. Write the file in this form."
        ) from error
    if label_by_name is not None and len(label_by_name) < len(label_rows):
        name_counts = Counter(str(image_name) for image_name, _ in label_rows)
        repeated_name, name_count = name_counts.most_common(1)[0]
        raise ValueError(
            f"{file_description}: {repeated_name!r} is named {name_count} times. The file has"
            f" {len(label_rows)} labels for {len(label_by_name)} names. Keep one label for each image."
        )
    return label_by_name


class ImageFiles:
    """Access to the image files and labels of a folder or zip archive.

    An entry is a file in the folder or archive. The name of an entry is the relative path of the file.

    Args:
        path: folder, which is searched recursively, or .zip file.
        flag: flag of the command line that names the path, for messages.
    Raises: ValueError if the path does not exist, is a damaged archive, or contains no images.
    """

    def __init__(self, path: Path, flag: str = "--data"):
        self.path = Path(path)
        self._archive: zipfile.ZipFile | None = None
        self.unused_labels: list[str] = []  # names in dataset.json without an image
        # Determined once. Otherwise, a folder that disappears would later be opened as an archive.
        self._is_folder = self.path.is_dir()
        check_dataset(self.path, flag)
        if self._is_folder:
            entries = [
                file_path.relative_to(self.path).as_posix()
                for file_path in self.path.rglob("*")
                if file_path.is_file()
            ]
        else:
            entries = self._open_archive().namelist()
        self.entries = frozenset(entries)
        # Files that are not read, such as HEIC images, are kept by their kind.
        self.images, self.skipped = split_names(entries, self._read_start)
        self._unusable_images: list[str] = []  # messages of `leave_out_unusable`
        self._grey_images: set[str] | None = None  # greyscale entries; None before the headers are read
        if not self.images:
            suffixes = ", ".join(IMAGE_SUFFIXES)
            archives = [entry for entry in sorted(entries) if entry.lower().endswith(".zip")]
            if archives and self._is_folder:
                remedy = f"Name the archive inside: {flag}={self.path / archives[0]}."
            elif archives:
                remedy = f"Unpack it, and name the archive inside, {archives[0]}, with {flag}."
            else:
                remedy = f"Check the path in {flag}."
            raise ValueError(
                f"dataset {self.path}: no images ({suffixes}) were found among {len(entries)} files."
                f" {' '.join(skipped_lines(self.skipped))} {remedy}"
            )

    def __getstate__(self):
        # Processes that share a file handle share its position, so each worker process opens the
        # archive again.
        return {**self.__dict__, "_archive": None}

    def close(self) -> None:
        """Close the archive. The next read opens it again."""
        if self._archive is not None:
            self._archive.close()
            self._archive = None

    def _open_archive(self) -> zipfile.ZipFile:
        """Return the archive, which is opened if necessary. Raises: ValueError for a damaged file."""
        if self._archive is None:
            try:
                self._archive = zipfile.ZipFile(self.path)
            except (zipfile.BadZipFile, OSError) as error:
                raise ValueError(
                    f"dataset {self.path}: the file cannot be opened as a zip archive ({error}). Copy it"
                    " again, or build it again with tools/dataset_tool.py."
                ) from error
        return self._archive

    def _read_start(self, entry: str) -> bytes:
        """Return the first bytes of an entry; b"" if it cannot be read."""
        try:
            if self._is_folder:
                with (self.path / entry).open("rb") as entry_file:
                    return entry_file.read(16)
            with self._open_archive().open(entry) as archived_file:
                return archived_file.read(16)
        except _ARCHIVE_ERRORS:
            return b""

    def notes(self) -> list[str]:
        """Return sentences about files that are not read, and about labels that belong to no image.

        Labels are known after `read_labels`.
        """
        label_lines = []
        if self.unused_labels:
            label_lines.append(
                f"dataset {self.path}: labels of {LABELS_FILE} without an image that is read:"
                f" {len(self.unused_labels)}, for example {self.unused_labels[0]!r}. Add these images, or"
                " remove the labels."
            )
        return [
            *(f"dataset {self.path}: {line}" for line in skipped_lines(self.skipped)),
            *left_out_lines(self._unusable_images),
            *label_lines,
        ]

    def leave_out_unusable(self) -> None:
        """Remove entries from `images` that are animations, HEIC images under another name, or too large.

        Only the headers are read. The entries are described by `notes`. Damaged entries are kept, so that
        `decode` rejects them.

        Raises: ValueError if no image is left.
        """
        usable_images = []
        self._grey_images = set()
        for entry in self.images:
            try:
                if self._has_grey_header(entry):
                    self._grey_images.add(entry)
            except UnusableImageError as error:
                self._unusable_images.append(str(error))
                continue
            except (ValueError, *_ARCHIVE_ERRORS):
                pass  # the entry is damaged
            usable_images.append(entry)
        if not usable_images:
            raise ValueError(joined_errors(self._unusable_images))
        self.images = usable_images

    def _has_grey_header(self, entry: str) -> bool:
        """Return True if an entry is a greyscale image. Raises: see `check_header`."""
        entry_description = f"dataset {self.path}: entry {entry!r}"
        if self._is_folder:
            return check_header(self.path / entry, entry_description)
        with self._open_archive().open(entry) as entry_file:
            return check_header(entry_file, entry_description)

    def grey_among_colour(self, entries: Sequence[str]) -> list[str]:
        """Return the greyscale images among entries, if other entries have colours, else an empty list."""
        if self._grey_images is None:
            self._grey_images = set()
            for entry in entries:
                # damaged entries are reported when they are decoded
                with contextlib.suppress(ValueError, *_ARCHIVE_ERRORS):
                    if self._has_grey_header(entry):
                        self._grey_images.add(entry)
        grey_entries = [entry for entry in entries if entry in self._grey_images]
        return grey_entries if len(grey_entries) < len(entries) else []

    def read(self, entry: str) -> bytes:
        """Return the bytes of an entry. Raises: ValueError if the entry is missing or damaged."""
        try:
            if self._is_folder:
                return (self.path / entry).read_bytes()
            return self._open_archive().read(entry)
        except _ARCHIVE_ERRORS as error:
            raise ValueError(
                f"dataset {self.path}: the entry {entry!r} is missing or damaged ({error}). Copy the set"
                " again, or build it again with tools/dataset_tool.py."
            ) from error

    def decode(self, entry: str) -> PIL.Image.Image:
        """Decode the image of an entry. All pixels are decoded, so that damage of the file is detected here.

        The image is upright, in the mode L or RGB, and on white if it is transparent; see `read_image`.

        Raises: UnusableImageError for an entry of a kind that is not read, such as an animation; ValueError
            for a damaged entry.
        """
        return read_image(self.read(entry), f"dataset {self.path}: entry {entry!r}")

    def read_image(self, entry: str) -> np.ndarray:
        """Return the pixels of an entry, uint8 [C, R, R] with C = 1 or 3.

        Raises: ValueError for the same reasons as `decode`, and if the image is not square.
        """
        pixels = np.asarray(self.decode(entry))
        height, width = pixels.shape[:2]
        if height != width:
            raise ValueError(
                f"dataset {self.path}: entry {entry!r}: expected a square image, got {width}x{height}."
                " Convert the set with tools/dataset_tool.py --transform=center-crop."
            )
        # [H, W] or [H, W, C] -> [C, H, W]
        return np.ascontiguousarray(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1))

    def read_labels(self) -> list | None:
        """Return the label of each image, in the order of `images`, or None for a set without labels.

        A label is a list of numbers or an integer, as in dataset.json. A set without labels has a
        dataset.json with "labels": null.

        Raises: ValueError if dataset.json is missing or malformed, or if it has no label for some image.
        """
        if LABELS_FILE not in self.entries:
            raise ValueError(
                f"dataset {self.path}: the file {LABELS_FILE} with the camera labels is missing. Add it at"
                " the top level of the set, as docs/guides/cameras.md shows."
            )
        file_description = f"dataset {self.path}: {LABELS_FILE}"
        label_by_name = parse_label_rows(self.read(LABELS_FILE), file_description)
        if label_by_name is None:
            return None
        # Labels of images that the set does not contain are not used. They are counted in `notes`.
        self.unused_labels = sorted(set(label_by_name).difference(self.images))
        unlabelled_names = [image_name for image_name in self.images if label_by_name.get(image_name) is None]
        if unlabelled_names:
            unused_text = (
                ""
                if not self.unused_labels
                else (
                    f" {len(self.unused_labels)} names in the file belong to no image, for example"
                    f" {self.unused_labels[0]!r}: names must be paths relative to the set."
                )
            )
            raise ValueError(
                f"{file_description}: {len(unlabelled_names)} of {len(self.images)} images have no label, for"
                f" example {unlabelled_names[0]!r}.{unused_text} Add their labels, or remove the images."
            )
        return [label_by_name[image_name] for image_name in self.images]


CACHE_LIMIT = 512 * 2**20  # a set whose decoded images have fewer bytes than this is kept in memory
_DRAWS = 1 << 12  # number of random numbers that the sampler draws in one call


class ImageFolderDataset(torch.utils.data.Dataset):
    """Images and labels of a folder or zip archive. `dataset[i]` is (uint8 [C, R, R], float32 [L]).

    Images are ordered by entry name. Labels come from dataset.json, {"labels": [[entry name, label], ...]}.
    Lists of numbers become rows, and integers become one-hot rows. With "labels": null, the set has no
    labels, and L is 0. Labels are checked at construction, images when they are read for the first time. If
    the decoded images of the set have less than 512 MB, they are kept in memory.

    Deviates: with xflip, camera labels of 25 numbers are mirrored with the images. EG3D does not change them,
        so its --mirror trains on wrong poses. Labels are required and checked unless use_labels is False.

    Args:
        path: folder or .zip file.
        resolution: required number of pixels per edge R; None accepts the resolution of the first image.
        use_labels: False: ignore the labels, so L is 0.
        max_size: number of images in a random subset, which keeps the order of the files; None: all images.
        xflip: True: append a horizontally mirrored copy of every image.
        random_seed: seed of the random subset.
        c_dim: required number of numbers L in a label, for example 25 for cameras; None accepts any.
    Raises: ValueError, which names the file or the entry, for missing, damaged or inconsistent data.
    """

    def __init__(
        self,
        path: str | Path,
        resolution: int | None = None,
        use_labels: bool = True,
        max_size: int | None = None,
        xflip: bool = False,
        random_seed: int = 0,
        c_dim: int | None = None,
    ):
        assert max_size is None or max_size >= 1
        self._files = ImageFiles(Path(path))
        # Start of the sentence that proposes how to correct camera labels.
        self._fixing = f"Convert the set with eg3d-rlhf data convert --source={path} --dest=CORRECTED.zip"
        self._labels = None  # float32 [n, L]
        if use_labels:
            labels_description = f"dataset {path}: {LABELS_FILE}"
            stored_labels = self._files.read_labels()
            if stored_labels is None and c_dim:
                raise ValueError(
                    f'{labels_description}: expected labels of {c_dim} numbers, got "labels": null. Add the'
                    " labels of the images, as docs/guides/cameras.md shows."
                )
            if stored_labels is not None:
                label_matrix = label_array(
                    stored_labels, self._files.images, labels_description, c_dim, self._fixing
                )
                # Class indices become one-hot rows of the identity matrix. Without a required length, the
                # highest index gives the number of classes.
                self._labels = (
                    np.eye(c_dim or label_matrix.max() + 1, dtype=np.float32)[label_matrix]
                    if label_matrix.ndim == 1
                    else label_matrix
                )
        raw_image_count = len(self._files.images)
        self._shape = self._files.read_image(self._files.images[0]).shape  # (C, R, R)
        if resolution is not None and resolution != self._shape[1]:
            raise ValueError(
                f"dataset {path}: expected images of {resolution}x{resolution} pixels, got"
                f" {self._shape[1]}x{self._shape[2]} in entry {self._files.images[0]!r}. Resize the set with"
                f" tools/dataset_tool.py --resolution={resolution}x{resolution}."
            )
        # A raw index is the index of a file. An index of the dataset counts the subset, and then its
        # mirrored copy.
        subset_indices = np.arange(raw_image_count, dtype=np.int64)
        if max_size is not None and max_size < raw_image_count:
            # EG3D's choice of the subset: the first max_size elements of a shuffled list, in the order
            # of files.
            np.random.RandomState(random_seed).shuffle(subset_indices)
            subset_indices = np.sort(subset_indices[:max_size])
        # Index of the dataset -> raw index
        self._raw_index = np.tile(subset_indices, 2) if xflip else subset_indices
        self._is_flipped = np.arange(len(self._raw_index)) >= len(subset_indices)
        # True: decoded images are kept in memory.
        self.in_memory = raw_image_count * int(np.prod(self._shape)) < CACHE_LIMIT
        self._cache: np.ndarray | None = None  # decoded images, uint8 [n, C, R, R]
        self._is_cached: np.ndarray | None = None  # bool [n], True for images that are in the cache

    def __getstate__(self):
        # The cache is not sent to other processes, because it is large and can be filled again.
        return {**self.__dict__, "_cache": None, "_is_cached": None}

    def __len__(self) -> int:
        return len(self._raw_index)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        image = self._raw_image(int(self._raw_index[index]))
        # [:, :, ::-1] mirrors the columns. The image is copied, so that a caller cannot change the cache.
        return (image[:, :, ::-1] if self._is_flipped[index] else image).copy(), self.get_label(index)

    def _raw_image(self, raw_index: int) -> np.ndarray:
        """Return the image [C, R, R] with a raw index, from memory if it has been decoded before.

        Raises: ValueError if the file is damaged or has another shape than the first image.
        """
        if self._cache is None and self.in_memory:
            # np.empty only reserves addresses. The system allocates memory when images are stored.
            self._cache = np.empty((len(self._files.images), *self._shape), np.uint8)
            self._is_cached = np.zeros(len(self._cache), bool)
        if self._cache is not None and self._is_cached is not None and self._is_cached[raw_index]:
            return self._cache[raw_index]
        entry = self._files.images[raw_index]
        image = self._files.read_image(entry)
        if image.shape != self._shape:
            raise ValueError(
                f"dataset {self._files.path}: entry {entry!r} has the channels and size {list(image.shape)},"
                f" but the first entry {self._files.images[0]!r} has {list(self._shape)}. Convert the set"
                " with tools/dataset_tool.py."
            )
        if self._cache is not None and self._is_cached is not None:
            self._cache[raw_index] = image
            self._is_cached[raw_index] = True
        return image

    def get_label(self, index: int) -> np.ndarray:
        """Return a copy of the label [L] of an image. The label of a mirrored image is mirrored.

        Args: index: index of the image in the dataset.
        """
        if self._labels is None:
            return np.zeros(0, np.float32)
        label = self._labels[self._raw_index[index]].copy()
        if self._is_flipped[index] and len(label) == LABEL_NUMBERS:
            return mirror_label(torch.from_numpy(label[None]))[0].numpy()
        return label

    def get_labels(self) -> np.ndarray:
        """Return the labels of all images, float32 [number of images, L].

        The labels of mirrored images are mirrored.
        """
        if self._labels is None:
            return np.zeros((len(self), 0), np.float32)
        label_rows = self._labels[self._raw_index]
        if self.label_dim == LABEL_NUMBERS and self._is_flipped.any():
            label_rows[self._is_flipped] = mirror_label(
                torch.from_numpy(label_rows[self._is_flipped])
            ).numpy()
        return label_rows

    def notes(self) -> list[str]:
        """Return sentences about files that are skipped, and labels that belong to no image."""
        return self._files.notes()

    def camera_warning(self, scene: Scene) -> str | None:
        """Return a sentence about cameras that are possible but hardly right, or None if all checks pass.

        Args: scene: region that the cameras have to show.
        """
        if self._labels is None or self.label_dim != LABEL_NUMBERS:
            return None
        return camera_warning(
            self._labels,
            self._files.images,
            f"dataset {self._files.path}: {LABELS_FILE}",
            scene,
            self._fixing,
        )

    def without_memory(self) -> "ImageFolderDataset":
        """Return a copy of the dataset for use in other processes.

        The copy opens the files itself at its first read, and keeps no images in memory.
        """
        # copy.copy uses __getstate__, so neither the cache nor the open archive is copied.
        dataset_copy = copy.copy(self)
        dataset_copy._files = copy.copy(self._files)
        dataset_copy.in_memory = False
        return dataset_copy

    def close(self) -> None:
        """Close the archive if it is open. The next read opens it again."""
        self._files.close()

    @property
    def path(self) -> Path:
        """Path of the folder or archive."""
        return self._files.path

    @property
    def num_channels(self) -> int:
        """Number of channels C of an image, 1 or 3."""
        return self._shape[0]

    @property
    def resolution(self) -> int:
        """Number of pixels per edge R of an image."""
        return self._shape[1]

    @property
    def label_dim(self) -> int:
        """Number of numbers L in a label; 0 for a set without labels."""
        return 0 if self._labels is None else self._labels.shape[1]


class InfiniteSampler(torch.utils.data.Sampler[int]):
    """Sampler of indices without end, with EG3D's windowed shuffle.

    The sampler starts with a random permutation `order` of 0, ..., n-1. At position k = 0, 1, 2, ... it
    yields order[i] with i = k mod n, if k mod num_replicas == rank. Then it swaps order[i] with the element
    that is r elements earlier (cyclically), where r is uniform in [0, window_size * n). Therefore an image is
    not used again for at least (1 - window_size) n positions. Every rank visits all positions, and so draws
    the same random numbers.

    Deviates: `start_index` (EG3D restarts from position 0), and the check of an empty dataset.

    Args:
        dataset: object whose length is n > 0.
        rank: index of this process, 0 <= rank < num_replicas.
        num_replicas: number of processes.
        shuffle: False: yield the indices in their order.
        seed: seed of the numpy RandomState.
        window_size: size of the window as a fraction of n, in [0, 1]. A window of fewer than 2 elements turns
            the swaps off.
        start_index: first position whose index is yielded, counted over all ranks. A resumed run passes the
            number of images that it has used. The swaps of earlier positions are repeated, which takes less
            than a microsecond each, so that the order continues exactly.
    Raises: ValueError for an empty dataset.
    """

    def __init__(
        self,
        dataset,
        rank: int = 0,
        num_replicas: int = 1,
        shuffle: bool = True,
        seed: int = 0,
        window_size: float = 0.5,
        start_index: int = 0,
    ):
        if len(dataset) == 0:
            raise ValueError(
                "InfiniteSampler: the dataset contains no images. Pass a dataset with at least one image."
            )
        assert 0 <= rank < num_replicas and 0 <= window_size <= 1 and start_index >= 0
        super().__init__()
        self.length = len(dataset)
        self.rank = rank
        self.num_replicas = num_replicas
        self.start_index = start_index
        self.shuffle = shuffle
        self.seed = seed
        self.window_size = window_size

    def __iter__(self) -> Iterator[int]:
        """Yield the indices of this rank without end."""
        n = self.length
        initial_order = np.arange(self.length)
        rng = np.random.RandomState(self.seed)
        window_length = int(np.rint(n * self.window_size)) if self.shuffle else 0
        if self.shuffle:
            rng.shuffle(initial_order)
        # A list is faster than an array for access to single elements.
        shuffled_indices: list[int] = initial_order.tolist()
        steps_back = iter(list[int]())
        for position in itertools.count():
            i = position % n
            if position >= self.start_index and position % self.num_replicas == self.rank:
                yield shuffled_indices[i]
            if window_length >= 2:
                if position % _DRAWS == 0:
                    # One call gives the same numbers as many single calls, and is much faster.
                    steps_back = iter(rng.randint(window_length, size=_DRAWS).tolist())
                j = (i - next(steps_back)) % n
                # The swap follows the yield, so an image is moved only after it has been used.
                shuffled_indices[i], shuffled_indices[j] = shuffled_indices[j], shuffled_indices[i]


# Worker processes that compute results in advance, in the order of the tasks.

AHEAD = 2  # number of tasks per worker that are submitted before their results are requested

# Function of a worker process. It is sent to the process once, not with every task.
_work: Callable | None = None


def _start_worker(process_task: Callable) -> None:
    """Initialise a worker process whose tasks call the function `process_task`."""
    global _work
    _work = process_task
    # The terminal sends Ctrl-C to all processes of the group. Workers ignore it, and the parent reacts.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # The default action replaces the parent's handler, which writes a checkpoint.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)  # the workers run in parallel already
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Wait for the end of the parent process, then end this worker. It runs in a thread of the worker.

    Without it, workers would remain after the parent was killed.
    """
    parent_process = multiprocessing.parent_process()
    assert parent_process is not None
    parent_process.join()  # returns when the parent has ended, for any reason
    os._exit(1)


def _run_task(task: object) -> object:
    """Call the worker's function with a task, and return the result."""
    assert _work is not None
    return _work(task)


def work_in_advance(
    process_task: Callable, tasks: Iterable, worker_count: int, death_message: str
) -> Generator:
    """Yield process_task(task) for every task, in order. Worker processes compute results in advance.

    Workers are forked when the first result is requested. AHEAD * worker_count results are computed in
    advance. Closing the generator ends the workers.

    Args:
        process_task: function of one task.
        tasks: arguments of `process_task`, possibly without end.
        worker_count: number of processes. With 0, or on systems without fork, this process computes each
            result when it is requested.
        death_message: message of the error if a worker process is killed.
    Raises: the errors of `process_task`; ValueError(death_message) if a worker was killed; OSError if no
        worker can be started.
    """
    if worker_count == 0 or "fork" not in multiprocessing.get_all_start_methods():
        yield from map(process_task, tasks)
        return
    with concurrent.futures.ProcessPoolExecutor(
        worker_count, multiprocessing.get_context("fork"), _start_worker, (process_task,)
    ) as process_pool:
        pending_results: deque[concurrent.futures.Future] = deque()
        try:
            for task in tasks:
                try:
                    pending_results.append(process_pool.submit(_run_task, task))
                except OSError as error:  # fork failed
                    raise OSError(
                        f"--workers: {worker_count} processes cannot be started: {error.strerror}. Use a"
                        " smaller number."
                    ) from error
                # The oldest result is yielded first, also if a later one is ready before.
                if len(pending_results) > AHEAD * worker_count:
                    yield pending_results.popleft().result()
            while pending_results:
                yield pending_results.popleft().result()
        except concurrent.futures.process.BrokenProcessPool as error:
            raise ValueError(death_message) from error
        finally:
            # shutdown() removes the processes from the pool, so they are listed before.
            started_processes = list(process_pool._processes.values())
            process_pool.shutdown(wait=True, cancel_futures=True)
            # If some workers could not be started, shutdown() does not end the others.
            for process in started_processes:
                process.terminate()


def in_order(process_task: Callable, tasks: Sequence, worker_count: int, death_message: str) -> Generator:
    """Yield process_task(task) for every task of a finite list, in order. See `work_in_advance` for the
    arguments.

    There are at most as many workers as tasks. A single worker would save no time, so this process does
    its work.
    """
    worker_count = min(worker_count, len(tasks))
    return work_in_advance(process_task, tasks, worker_count if worker_count > 1 else 0, death_message)


# Batches in the order of the sampler.

MAX_WORKERS = 3  # largest default number of workers, which is EG3D's default
WORKER_DEATH_MESSAGE = (
    "--workers: a process that reads images was killed, probably because the memory was full. Use a smaller"
    " number; with --workers=0 the main process reads the images."
)


def default_workers(dataset: ImageFolderDataset, ranks: Ranks) -> int:
    """Return the default number of processes that read images for each training process.

    The number is 0 for a set that is kept in memory. Otherwise it is the number of free cores, but at
    most three.
    """
    core_count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # The cores are divided among the training processes of this machine, and each of these needs one
    # core itself.
    return 0 if dataset.in_memory else max(0, min(MAX_WORKERS, core_count // ranks.neighbours - 1))


Batches = Generator[tuple[np.ndarray, np.ndarray], None, None]  # yields (images, labels)


def read_batches(
    dataset: ImageFolderDataset, image_order: Iterator[int], n: int, worker_count: int
) -> Batches:
    """Yield batches without end: images [n, C, R, R] uint8, and labels [n, L] float32.

    Workers decode images into shared memory, which is allocated once and reused. The images of a batch are
    therefore valid only until the next batch is requested.

    Args:
        dataset: images and labels.
        image_order: indices of images, without end.
        n: number of images in a batch.
        worker_count: number of processes that read in advance; 0: this process reads.
    Raises: ValueError for damaged data, or if a worker was killed.
    """
    # A slot is the memory of one batch. One more slot than batches in advance is needed, for the batch that
    # the caller is using.
    slot_count = AHEAD * worker_count + 1
    memory_shape = (slot_count, n, dataset.num_channels, dataset.resolution, dataset.resolution)
    # Anonymous shared memory (-1: no file). Forked workers write into the same pages, so images are not
    # copied between processes.
    images = np.frombuffer(mmap.mmap(-1, int(np.prod(memory_shape))), np.uint8).reshape(memory_shape)
    fill_slot = functools.partial(_fill, dataset.without_memory() if worker_count else dataset, images)
    # Slots are used cyclically, so a slot is reused only when its batch has been yielded and the caller has
    # requested another one.
    tasks = ((slot, list(itertools.islice(image_order, n))) for slot in itertools.cycle(range(slot_count)))
    with contextlib.closing(
        work_in_advance(fill_slot, tasks, worker_count, WORKER_DEATH_MESSAGE)
    ) as filled_slots:
        for slot, batch_labels in filled_slots:
            yield images[slot], batch_labels


def _fill(
    dataset: ImageFolderDataset, images: np.ndarray, task: tuple[int, list[int]]
) -> tuple[int, np.ndarray]:
    """Decode a batch into its slot of shared memory.

    Args:
        dataset: images and labels.
        images: shared memory [slots, n, C, R, R].
        task: index of the slot, and the n indices of the images.
    Returns: the index of the slot, and the labels [n, L].
    """
    slot, indices = task
    batch_labels = []
    for row, image_index in enumerate(indices):
        images[slot, row], image_label = dataset[image_index]
        batch_labels.append(image_label)
    return slot, np.stack(batch_labels)
