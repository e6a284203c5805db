"""Training images with camera labels, in EG3D's dataset format.

This module reads the files, defines the endless order in which images are used, and assembles batches. Worker
processes may read batches in advance; their number does not change the batches.

Shape letters: n images (of a set before mirroring, or of a batch), C channels, R resolution, L numbers per
label.
"""

import concurrent.futures
import concurrent.futures.process
import contextlib
import copy
import functools
import io
import itertools
import json
import mmap
import multiprocessing
import os
import signal
import threading
import zipfile
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import PIL.Image
import torch

from training.distributed import Ranks
from training.rendering.cameras import LABEL_NUMBERS, POSE_NUMBERS, mirror_label

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
LABELS_FILE = "dataset.json"
_PIXEL_LIMIT = 1 << 28  # pixels of one image; a file that declares more is rejected before it is decoded
# Largest entry of |R^T R - I|. Poses in single precision from fitting pipelines reach 1e-4.
ROTATION_TOLERANCE = 1e-2


class ImageFiles:
    """The images and labels of a folder or zip, read by entry name.

    Args:
        path: folder (searched recursively) or .zip file.
    Raises: ValueError naming the file and the remedy if the path is missing, not a zip, damaged, or without
        images.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        self._archive: zipfile.ZipFile | None = None
        # Stored, not asked for at each read: the folder may disappear meanwhile.
        self._folder = self.path.is_dir()
        if self._folder:
            entries = [p.relative_to(self.path).as_posix() for p in self.path.rglob("*") if p.is_file()]
        elif self.path.is_file():
            entries = self._open_archive().namelist()
        else:
            raise ValueError(
                f"dataset {self.path}: expected a folder or a .zip file, got a path that does not exist."
                " Check --data."
            )
        self.entries = frozenset(entries)
        self.images = sorted(name for name in entries if name.lower().endswith(IMAGE_SUFFIXES))
        if not self.images:
            known = ", ".join(IMAGE_SUFFIXES)
            raise ValueError(
                f"dataset {self.path}: expected images ({known}), got {len(entries)} other entries. Check"
                " --data."
            )

    def __getstate__(self):
        # A worker process opens the file again: processes that share a handle share its position.
        return {**self.__dict__, "_archive": None}

    def close(self) -> None:
        """Close the zip. It is opened again when needed."""
        if self._archive is not None:
            self._archive.close()
            self._archive = None

    def _open_archive(self) -> zipfile.ZipFile:
        """Return the open zip."""
        if self._archive is None:
            try:
                self._archive = zipfile.ZipFile(self.path)
            except (zipfile.BadZipFile, OSError) as error:
                got = f"a file that is missing, truncated or of another kind ({error})"
                raise ValueError(
                    f"dataset {self.path}: expected a zip archive, got {got}. Copy or build it again."
                ) from error
        return self._archive

    def read(self, entry: str) -> bytes:
        """Return the content of an entry. Raises: ValueError if it is damaged."""
        try:
            if self._folder:
                return (self.path / entry).read_bytes()
            return self._open_archive().read(entry)
        except (zipfile.BadZipFile, OSError, EOFError, KeyError) as error:
            why = f"cannot read entry {entry!r} ({error}), which is missing or damaged"
            raise ValueError(f"dataset {self.path}: {why}. Copy or build the set again.") from error

    def decode(self, entry: str) -> PIL.Image.Image:
        """Return an entry as a completely decoded image.

        Raises: ValueError if the entry is damaged, too large, or not an 8-bit greyscale or RGB image.
        """
        where = f"dataset {self.path}: entry {entry!r}"
        data = self.read(entry)
        try:
            with PIL.Image.open(io.BytesIO(data)) as image:
                # The header states the size; pixels are decoded by copy() only.
                if image.width * image.height > _PIXEL_LIMIT:
                    raise ValueError(f"{image.width}x{image.height} is too large")
                decoded = image.copy()
        except (OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError) as error:
            got = f"{len(data)} bytes that cannot be decoded ({error})"
            raise ValueError(f"{where}: expected an image, got {got}. Replace or remove it.") from error
        if image.mode not in ("L", "RGB"):
            raise ValueError(
                f"{where}: expected an 8-bit RGB or greyscale image, got mode {decoded.mode}. Convert it to"
                " RGB."
            )
        return decoded

    def read_image(self, entry: str) -> np.ndarray:
        """Return the pixels of an entry, uint8 [C, H, W] with C = 1 or 3.

        Raises: ValueError like `decode`, and if the image is not square.
        """
        pixels = np.asarray(self.decode(entry))
        height, width = pixels.shape[:2]
        if height != width:
            raise ValueError(
                f"dataset {self.path}: entry {entry!r}: expected a square image, got {width}x{height}."
                " Crop it."
            )
        # [H, W] or [H, W, C] -> [C, H, W]
        return np.ascontiguousarray(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1))

    def read_labels(self) -> list | None:
        """Return one label per image, in the order of `images`; None if dataset.json has "labels": null.

        Labels are returned as they are stored, as lists of numbers or as integers.

        Raises: ValueError if dataset.json is missing, malformed, or lacks an image.
        """
        if LABELS_FILE not in self.entries:
            raise ValueError(
                f"dataset {self.path}: expected {LABELS_FILE} with the camera labels, got none. Add it at the"
                " top of the set."
            )
        where = f"dataset {self.path}: {LABELS_FILE}"
        try:
            rows = json.loads(self.read(LABELS_FILE))["labels"]
            by_name = None if rows is None else {str(name): label for name, label in rows}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f'{where}: expected {{"labels": [[image name, label], ...]}}, got {error!r}. Rewrite the'
                " file."
            ) from error
        if by_name is None:
            return None
        # Labels of images that the set does not contain are ignored.
        missing = [name for name in self.images if by_name.get(name) is None]
        if missing:
            wanted = f"a label for each of the {len(self.images)} images"
            got = f"none for {len(missing)} of them"
            raise ValueError(
                f"{where}: expected {wanted}, got {got}, the first being {missing[0]!r}. Add them, or remove"
                " the images."
            )
        return [by_name[name] for name in self.images]


def label_array(labels: list, names: list[str], where: str, c_dim: int | None) -> np.ndarray:
    """Return labels as an array: float32 [n, L] for lists of numbers, int64 [n] for class indices.

    Args:
        labels: as stored, one per name.
        names: entry names, for messages.
        where: file, for messages.
        c_dim: required L, or None to accept any.
    Raises: ValueError if lengths differ from c_dim or from each other, if values are not finite numbers, or
        if a label of 25 numbers does not contain a pose with a rotation. Each message names the first such
        entry.
    """
    # bool is a subclass of int, but true and false are not class indices.
    if all(isinstance(label, int) and not isinstance(label, bool) for label in labels):
        classes = np.array(labels, dtype=np.int64)
        if classes.min() < 0:
            raise ValueError(
                f"{where}: entry {names[int(classes.argmin())]!r}: expected a class index >= 0, got"
                f" {classes.min()}. Rewrite its label."
            )
        _check_length(int(classes.max()) + 1, names[int(classes.argmax())], where, c_dim)
        return classes
    # Without a required length, that of the first label counts for all.
    wanted = c_dim or (len(labels[0]) if isinstance(labels[0], list) else None)
    for name, label in zip(names, labels, strict=True):
        if not isinstance(label, list):
            raise ValueError(
                f"{where}: entry {name!r}: expected a list of numbers like its neighbours, got {label!r}."
                " Rewrite its label."
            )
        _check_length(len(label), name, where, wanted)
    try:
        values = np.array(labels, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: expected labels to hold numbers only ({error}). Rewrite them.") from error
    finite = np.isfinite(values).all(axis=1)  # [n]
    if not finite.all():
        first = names[int(finite.argmin())]
        raise ValueError(
            f"{where}: entry {first!r}: expected finite numbers, got NaN or infinity. Rewrite its label."
        )
    if values.shape[1] == LABEL_NUMBERS:
        check_poses(values, names, where)
    return values


def _check_length(length: int, name: str, where: str, wanted: int | None) -> None:
    """Raise ValueError if a label does not have `wanted` numbers."""
    if wanted is not None and length != wanted:
        note = " A camera label is 16 cam2world and 9 intrinsics numbers." if wanted == LABEL_NUMBERS else ""
        raise ValueError(
            f"{where}: entry {name!r}: expected a label of {wanted} numbers, got {length}.{note} Rewrite the"
            " labels."
        )


def check_poses(values: np.ndarray, names: list[str], where: str) -> None:
    """Raise ValueError unless the first 16 numbers of all labels are a row-major rigid cam2world matrix.

    Args:
        values: [n, 25].
        names: entry names, for messages.
        where: file, for messages.
    """
    # Double precision, so that the check itself adds no error.
    pose = values[:, :POSE_NUMBERS].reshape(-1, 4, 4).astype(np.float64)
    rotation = pose[:, :3, :3]
    error = np.abs(rotation.transpose(0, 2, 1) @ rotation - np.eye(3)).max(axis=(1, 2))
    # A negative determinant is a reflection, which R^T R does not show.
    bad = (error > ROTATION_TOLERANCE) | (np.linalg.det(rotation) < 0)
    if bad.any():
        i = int(bad.argmax())
        got = (
            f"|R^T R - I| = {error[i]:.3g} and determinant {np.linalg.det(rotation[i]):.3g}"
            f" ({int(bad.sum())} of {len(names)} labels)"
        )
        raise ValueError(
            f"{where}: entry {names[i]!r}: expected a rotation in the pose, got {got}. Store a rigid"
            " cam2world, row-major."
        )
    # A column-major pose has its translation in the last row.
    bad = np.abs(pose[:, 3] - [0, 0, 0, 1]).max(axis=1) > ROTATION_TOLERANCE
    if bad.any():
        i = int(bad.argmax())
        got = pose[i, 3].tolist()
        raise ValueError(
            f"{where}: entry {names[i]!r}: expected the pose's last row to be 0 0 0 1, got {got}. Store it"
            " row-major."
        )


CACHE_LIMIT = 512 * 2**20  # bytes of decoded images up to which a set is kept in memory
_DRAWS = 1 << 12  # random numbers that the sampler draws at once


class ImageFolderDataset(torch.utils.data.Dataset):
    """Images and labels of a folder or zip: `dataset[i]` -> (uint8 [C, R, R], float32 [L]).

    Images are ordered by entry name. Labels come from dataset.json, {"labels": [[entry name, label], ...]}.
    Lists of numbers become float32 rows, integers become one-hot rows, and "labels": null means that there
    are none. Labels are checked at construction, images when they are first read. Sets of less than 512 MB
    (decoded) are kept in memory once they are decoded.

    Deviates: with xflip, camera labels of 25 numbers are mirrored with the images. EG3D leaves them, so its
    --mirror trains on wrong poses. Labels are required and checked unless use_labels is False.

    Args:
        path: folder or .zip.
        resolution: required image size in pixels; None accepts that of the first image.
        use_labels: False gives labels of length 0.
        max_size: largest number of images, a random subset (of random_seed) in file order; None for all.
        xflip: append a horizontally mirrored copy of every image.
        random_seed: seed of the subset.
        c_dim: required label length L, e.g. 25 for cameras; None accepts any.
    Raises: ValueError naming file, entry and remedy for anything that is missing, damaged or inconsistent.
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
        self._labels = None  # float32 [n, L]
        if use_labels:
            where = f"dataset {path}: {LABELS_FILE}"
            stored = self._files.read_labels()
            if stored is None and c_dim:
                raise ValueError(
                    f'{where}: expected labels of {c_dim} numbers, got "labels": null. Add them, or train'
                    " without labels."
                )
            if stored is not None:
                labels = label_array(stored, self._files.images, where, c_dim)
                # Class indices become one-hot rows.
                self._labels = (
                    np.eye(labels.max() + 1, dtype=np.float32)[labels] if labels.ndim == 1 else labels
                )
        n = len(self._files.images)
        self._shape = self._files.read_image(self._files.images[0]).shape  # (C, R, R)
        if resolution is not None and resolution != self._shape[1]:
            got = f"{self._shape[1]}x{self._shape[2]} in entry {self._files.images[0]!r}"
            raise ValueError(
                f"dataset {path}: expected images of {resolution}x{resolution}, got {got}. Resize the set."
            )
        # Raw indices count the files; indices of the dataset count the subset, and then its mirrored copy.
        keep = np.arange(n, dtype=np.int64)
        if max_size is not None and max_size < n:
            # EG3D's choice of the subset: the first ones of a shuffled list, in file order.
            np.random.RandomState(random_seed).shuffle(keep)
            keep = np.sort(keep[:max_size])
        self._raw_index = np.tile(keep, 2) if xflip else keep
        self._flipped = np.arange(len(self._raw_index)) >= len(keep)
        self.in_memory = n * int(np.prod(self._shape)) < CACHE_LIMIT  # whether decoded images are kept
        self._cache: np.ndarray | None = None  # uint8 [n, C, R, R]
        self._known: np.ndarray | None = None  # bool [n], whether the image is in the cache

    def __getstate__(self):
        # The cache is large and can be filled again; it is not sent to other processes.
        return {**self.__dict__, "_cache": None, "_known": None}

    def __len__(self) -> int:
        return len(self._raw_index)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        image = self._raw_image(int(self._raw_index[index]))
        # Copies, so that a caller may change them without changing the cache.
        return (image[:, :, ::-1] if self._flipped[index] else image).copy(), self.get_label(index)

    def _raw_image(self, raw: int) -> np.ndarray:
        """Return the image [C, R, R] of a raw index, from memory if it has been decoded before."""
        if self._cache is None and self.in_memory:
            # np.empty reserves addresses only; memory is used page by page, as images are stored.
            self._cache = np.empty((len(self._files.images), *self._shape), np.uint8)
            self._known = np.zeros(len(self._cache), bool)
        if self._cache is not None and self._known is not None and self._known[raw]:
            return self._cache[raw]
        image = self._files.read_image(self._files.images[raw])
        if image.shape != self._shape:
            where = f"dataset {self._files.path}: entry {self._files.images[raw]!r}"
            wanted = f"as in {self._files.images[0]!r}"
            raise ValueError(
                f"{where}: expected channels and size {list(self._shape)} {wanted}, got {list(image.shape)}."
                " Convert it."
            )
        if self._cache is not None and self._known is not None:
            self._cache[raw] = image
            self._known[raw] = True
        return image

    def get_label(self, index: int) -> np.ndarray:
        """Return a copy of the label [L] of image `index`, mirrored if the image is."""
        if self._labels is None:
            return np.zeros(0, np.float32)
        label = self._labels[self._raw_index[index]].copy()
        if self._flipped[index] and len(label) == LABEL_NUMBERS:
            return mirror_label(torch.from_numpy(label[None]))[0].numpy()
        return label

    def get_labels(self) -> np.ndarray:
        """Return the labels of all images [len, L], as `get_label` returns them."""
        if self._labels is None:
            return np.zeros((len(self), 0), np.float32)
        labels = self._labels[self._raw_index]
        if self.label_dim == LABEL_NUMBERS and self._flipped.any():
            labels[self._flipped] = mirror_label(torch.from_numpy(labels[self._flipped])).numpy()
        return labels

    def without_memory(self) -> "ImageFolderDataset":
        """Return the same set for use in other processes.

        It has its own file handle, which is opened at the first read, and keeps no images.
        """
        other = copy.copy(self)
        # copy.copy uses __getstate__, so neither copy takes the cache or the open file.
        other._files = copy.copy(self._files)
        other.in_memory = False
        return other

    def close(self) -> None:
        """Close the zip, if one is open. Reading opens it again."""
        self._files.close()

    @property
    def num_channels(self) -> int:
        """Number of channels C, 1 or 3."""
        return self._shape[0]

    @property
    def resolution(self) -> int:
        """Resolution R in pixels."""
        return self._shape[1]

    @property
    def label_dim(self) -> int:
        """Label length L; 0 without labels."""
        return 0 if self._labels is None else self._labels.shape[1]


class InfiniteSampler(torch.utils.data.Sampler[int]):
    """Endless sampler with EG3D's windowed shuffle.

    The sampler walks cyclically over an initial permutation of 0 .. n-1. At position k, with i = k mod n, it
    yields order[i] if k mod num_replicas == rank. Then it swaps this entry with the one r places earlier
    (cyclically), r uniform in [0, window). An image therefore returns after at least (1 - window) n other
    positions. Every rank walks over all positions, and so has the same random numbers.

    Deviates: `start_index` (EG3D restarts from position 0) and the check of arguments. The order itself is
        EG3D's.

    Args:
        dataset: object with a length above 0.
        rank, num_replicas: this process and the number of processes; 0 <= rank < num_replicas.
        shuffle: False: walk over 0 .. n-1 in order.
        seed: seed of the numpy RandomState.
        window_size: window as a fraction of n, in [0, 1]. A window below 2 places turns reshuffling off.
        start_index: position at which to begin, counted over all ranks: the number of images that the run has
            used before it is resumed. The positions before it are replayed without yielding, well under a
            microsecond each, so the order continues exactly.
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
                "InfiniteSampler: expected at least one image, got an empty dataset. Check the path and"
                " max_size."
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
        """Yield this rank's indices without end."""
        n = self.length
        order = np.arange(self.length)
        random = np.random.RandomState(self.seed)
        window = int(np.rint(n * self.window_size)) if self.shuffle else 0
        if self.shuffle:
            random.shuffle(order)
        shuffled: list[int] = order.tolist()  # a list is faster than an array for single entries
        back = iter(list[int]())
        for position in itertools.count():
            i = position % n
            if position >= self.start_index and position % self.num_replicas == self.rank:
                yield shuffled[i]
            if window >= 2:
                if position % _DRAWS == 0:
                    # Many numbers at once are the same as one by one, and much faster.
                    back = iter(random.randint(window, size=_DRAWS).tolist())
                j = (i - next(back)) % n
                # After the yield: an image moves only once it has been used.
                shuffled[i], shuffled[j] = shuffled[j], shuffled[i]


# Tasks that worker processes do in advance, with results in the order of the tasks

AHEAD = 2  # tasks per worker that are running or finished before their results are requested

_work: Callable | None = None  # in a worker process: its function, sent once instead of with every task


def _start_worker(work: Callable) -> None:
    """Prepare a worker process."""
    global _work
    _work = work
    # The terminal sends Ctrl-C to the whole process group. The parent decides what happens.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # not the parent's handler, which writes a checkpoint
    torch.set_num_threads(1)  # the processes themselves are the parallelism
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this worker if the parent process was killed, so that no process remains."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()  # returns when the parent has ended, for any reason
    os._exit(1)


def _run_task(task: object) -> object:
    """Run the worker's function on a task."""
    assert _work is not None
    return _work(task)


def ahead(work: Callable, tasks: Iterable, workers: int, killed: str) -> Generator:
    """Yield work(task) of every task in order; AHEAD * workers tasks are done in advance.

    `tasks` may be endless. Workers are forked when the first result is requested. They import nothing, and
    have one additional thread, which ends them with their parent. Closing the generator ends them.

    Args:
        work: function of a task.
        tasks: its arguments.
        workers: number of processes. With 0, or where processes cannot fork, tasks are done in this process,
            one at a time, when their result is requested.
        killed: message of the error if a worker is killed.
    Raises: the errors of `work`; ValueError(killed) if a worker died; OSError if none can be started.
    """
    if workers == 0 or "fork" not in multiprocessing.get_all_start_methods():
        yield from map(work, tasks)
        return
    with concurrent.futures.ProcessPoolExecutor(
        workers, multiprocessing.get_context("fork"), _start_worker, (work,)
    ) as pool:
        pending: deque[concurrent.futures.Future] = deque()
        try:
            for task in tasks:
                try:
                    pending.append(pool.submit(_run_task, task))
                except OSError as error:  # from fork
                    raise OSError(
                        f"--workers: cannot start {workers} processes: {error.strerror}. Use fewer."
                    ) from error
                # Results are yielded in the order of the tasks, also when later ones are ready before.
                if len(pending) > AHEAD * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except concurrent.futures.process.BrokenProcessPool as error:
            raise ValueError(killed) from error
        finally:
            started = list(pool._processes.values())  # before shutdown, which drops them
            pool.shutdown(wait=True, cancel_futures=True)
            # If only some workers could be started, shutdown does not reach these.
            for process in started:
                process.terminate()


def in_order(work: Callable, tasks: Sequence, workers: int, killed: str) -> Generator:
    """Return `ahead` with at most as many workers as tasks. A single worker would be this process itself."""
    workers = min(workers, len(tasks))
    return ahead(work, tasks, workers if workers > 1 else 0, killed)


# Batches in the sampler's order

MOST_WORKERS = 3  # EG3D's default
KILLED = (
    "--workers: a process that reads images was killed. Free memory, or use fewer; --workers=0 reads in"
    " the main process."
)


def default_workers(dataset: ImageFolderDataset, ranks: Ranks) -> int:
    """Return the default number of processes that read images.

    It is 0 for a set that is kept in memory, otherwise one per core that training leaves free, at most three.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # One core of each process's share computes.
    return 0 if dataset.in_memory else max(0, min(MOST_WORKERS, cores // ranks.neighbours - 1))


Batches = Generator[tuple[np.ndarray, np.ndarray], None, None]


def read_batches(dataset: ImageFolderDataset, order: Iterator[int], n: int, workers: int) -> Batches:
    """Yield batches without end: images [n, C, R, R] uint8 and labels [n, L] float32 of the indices in
    `order`.

    Workers decode into shared memory that is allocated once: AHEAD batches for each of them, and the batch
    that was yielded last. The images of a batch are therefore valid until the next one is requested.

    Args:
        dataset: images and labels.
        order: indices, without end.
        n: images per batch.
        workers: number of processes; 0 reads in this one.
    Raises: ValueError like the dataset does, or if a worker was killed.
    """
    slots = AHEAD * workers + 1
    # One slot more than tasks in advance: the batch that the caller is using.
    size = (slots, n, dataset.num_channels, dataset.resolution, dataset.resolution)
    # Anonymous shared memory: forked workers write into the same pages, so no image is sent through a pipe.
    images = np.frombuffer(mmap.mmap(-1, int(np.prod(size))), np.uint8).reshape(size)
    work = functools.partial(_fill, dataset.without_memory() if workers else dataset, images)
    # Slots are used in turn. With AHEAD * workers + 1 of them, none is reused before its batch was yielded.
    tasks = ((slot, list(itertools.islice(order, n))) for slot in itertools.cycle(range(slots)))
    with contextlib.closing(ahead(work, tasks, workers, KILLED)) as filled:
        for slot, labels in filled:
            yield images[slot], labels


def _fill(
    dataset: ImageFolderDataset, images: np.ndarray, task: tuple[int, list[int]]
) -> tuple[int, np.ndarray]:
    """Decode one batch into its slot of `images` [slots, n, C, R, R]; return the slot and labels [n, L]."""
    slot, rows = task
    labels = []
    for place, row in enumerate(rows):
        images[slot, place], label = dataset[row]
        labels.append(label)
    return slot, np.stack(labels)
