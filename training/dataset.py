"""Training images with camera labels, in EG3D's dataset format, and the endless order in which they are drawn.

Shape letters: n images before mirroring, C channels, R resolution, L numbers per label.
"""

import copy
import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from training.dataset_files import LABELS_FILE, ImageFiles, label_array
from training.rendering.cameras import LABEL_NUMBERS, mirror_label

CACHE_LIMIT = 512 * 2**20  # bytes of decoded images up to which a set is kept in memory
_DRAWS = 1 << 12  # random numbers drawn at once


class ImageFolderDataset(torch.utils.data.Dataset):
    """Images and labels of a folder or zip: `dataset[i]` -> (uint8 [C, R, R], float32 [L]).

    Images are ordered by entry name. Labels come from dataset.json, {"labels": [[entry name, label], ...]}: lists of numbers become
    float32 rows, ints become one-hot rows, "labels": null means none. Labels are checked at construction, images when first read. Sets of
    less than 512 MB (decoded) are kept in memory once decoded.

    Deviates: with xflip, 25-number camera labels of the mirrored half are mirrored as well (EG3D leaves them, so that its --mirror trains
    on wrong poses); labels are required and checked unless use_labels is False.

    Args:
        path: folder or .zip; resolution: required image size in pixels; None takes the first image's.
        use_labels: False gives labels of length 0; c_dim: required label length L, e.g. 25 for cameras; None accepts any.
        max_size: at most this many images, a random subset (of random_seed) in file order; None for all.
        xflip: append a horizontally mirrored copy of every image.
    Raises: ValueError naming file, entry and remedy for anything that is missing, damaged or inconsistent.
    """

    def __init__(
        self, path: str | Path, resolution: int | None = None, use_labels: bool = True, max_size: int | None = None, xflip: bool = False,
        random_seed: int = 0, c_dim: int | None = None,
    ):
        if max_size is not None and max_size < 1:
            raise ValueError(f"ImageFolderDataset: max_size must be >= 1 or None, got {max_size}.")
        self._files = ImageFiles(Path(path))
        self._labels = None  # float32 [n, L]
        if use_labels:
            where, stored = f"dataset {path}: {LABELS_FILE}", self._files.read_labels()
            if stored is None and c_dim:
                raise ValueError(f'{where}: expected labels of {c_dim} numbers, got "labels": null. Add them, or train without labels.')
            if stored is not None:
                labels = label_array(stored, self._files.images, where, c_dim)
                self._labels = np.eye(labels.max() + 1, dtype=np.float32)[labels] if labels.ndim == 1 else labels
        n = len(self._files.images)
        self._shape = self._files.read_image(self._files.images[0]).shape
        if resolution is not None and resolution != self._shape[1]:
            raise ValueError(
                f"dataset {path}: expected images of {resolution}x{resolution}, got {self._shape[1]}x{self._shape[2]} in entry "
                f"{self._files.images[0]!r}. Resize the set, or ask for resolution {self._shape[1]}."
            )
        keep = np.arange(n, dtype=np.int64)
        if max_size is not None and max_size < n:
            np.random.RandomState(random_seed).shuffle(keep)
            keep = np.sort(keep[:max_size])
        self._raw_index = np.tile(keep, 2) if xflip else keep
        self._flipped = np.arange(len(self._raw_index)) >= len(keep)
        self.in_memory = n * int(np.prod(self._shape)) < CACHE_LIMIT  # whether images stay there once decoded
        self._cache = self._known = None

    def __getstate__(self):
        return {**self.__dict__, "_cache": None, "_known": None}

    def __len__(self) -> int:
        return len(self._raw_index)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        image = self._raw_image(int(self._raw_index[index]))
        return (image[:, :, ::-1] if self._flipped[index] else image).copy(), self.get_label(index)

    def _raw_image(self, raw: int) -> np.ndarray:
        """Image [C, R, R] of a raw index, from memory if it has been decoded before."""
        if self._cache is None and self.in_memory:
            self._cache = np.empty((len(self._files.images), *self._shape), np.uint8)  # pages are claimed as they are filled
            self._known = np.zeros(len(self._cache), bool)
        if self._cache is not None and self._known[raw]:
            return self._cache[raw]
        image = self._files.read_image(self._files.images[raw])
        if image.shape != self._shape:
            where, first = f"dataset {self._files.path}: entry {self._files.images[raw]!r}", self._files.images[0]
            raise ValueError(
                f"{where}: expected {list(self._shape)} (channels, height, width) as in {first!r}, got {list(image.shape)}. "
                "All images must have one size and kind."
            )
        if self._cache is not None:
            self._cache[raw] = image
            self._known[raw] = True
        return image

    def get_label(self, index: int) -> np.ndarray:
        """A copy of the label [L] of image `index`, mirrored where the image is."""
        if self._labels is None:
            return np.zeros(0, np.float32)
        label = self._labels[self._raw_index[index]].copy()
        if self._flipped[index] and len(label) == LABEL_NUMBERS:
            return mirror_label(torch.from_numpy(label[None]))[0].numpy()
        return label

    def get_labels(self) -> np.ndarray:
        """Labels of all images [len, L], as `get_label` gives them."""
        if self._labels is None:
            return np.zeros((len(self), 0), np.float32)
        labels = self._labels[self._raw_index]
        if self.label_dim == LABEL_NUMBERS and self._flipped.any():
            labels[self._flipped] = mirror_label(torch.from_numpy(labels[self._flipped])).numpy()
        return labels

    def without_memory(self) -> "ImageFolderDataset":
        """The same set for other processes: with a handle of its own, which is opened when first read, and no image kept."""
        other = copy.copy(self)
        other._files, other.in_memory = copy.copy(self._files), False  # neither copy takes what __getstate__ leaves out
        return other

    def close(self) -> None:
        """Close the zip, if one is open; reading opens it again."""
        self._files.close()

    @property
    def num_channels(self) -> int:
        """C: 1 or 3."""
        return self._shape[0]

    @property
    def resolution(self) -> int:
        """R, pixels."""
        return self._shape[1]

    @property
    def label_dim(self) -> int:
        """L; 0 without labels."""
        return 0 if self._labels is None else self._labels.shape[1]

    @property
    def label_std(self) -> np.ndarray:
        """Standard deviation [L] of each number over the stored labels of the whole set (before subset and mirroring)."""
        return np.zeros(0, np.float32) if self._labels is None else self._labels.std(axis=0)


class InfiniteSampler(torch.utils.data.Sampler[int]):
    """Endless sampler with EG3D's windowed shuffle.

    An initial permutation of 0 .. n-1 is walked cyclically. At position k, with i = k mod n, the entry order[i] is yielded if
    k mod num_replicas == rank; then it is swapped with the entry r places earlier (cyclically), r uniform in [0, window), so that an image
    comes back after at least (1 - window) n other positions. Every rank walks all positions, hence the same draws.

    Deviates: `start_index` (EG3D restarts from position 0) and an argument check; the order itself is EG3D's.

    Args:
        dataset: anything with a length, not 0.
        rank, num_replicas: this process and their number; 0 <= rank < num_replicas.
        shuffle: False walks 0 .. n-1 in order.
        seed: of the numpy RandomState.
        window_size: window as a fraction of n, in [0, 1]; a window under 2 places disables reshuffling.
        start_index: position at which to begin, counted over all ranks: the images consumed before a resumed run. The positions before it
            are replayed without yielding (well under a microsecond each), so the order continues exactly.
    Raises: ValueError on an empty dataset or values outside those ranges.
    """

    def __init__(
        self, dataset, rank: int = 0, num_replicas: int = 1, shuffle: bool = True, seed: int = 0, window_size: float = 0.5,
        start_index: int = 0,
    ):
        if len(dataset) == 0:
            raise ValueError("InfiniteSampler: expected at least one image, got an empty dataset. Check the path and max_size.")
        if not (0 <= rank < num_replicas and 0 <= window_size <= 1 and start_index >= 0):
            raise ValueError(
                "InfiniteSampler: expected 0 <= rank < num_replicas, 0 <= window_size <= 1 and start_index >= 0, got "
                f"rank={rank}, num_replicas={num_replicas}, window_size={window_size}, start_index={start_index}."
            )
        super().__init__()
        self.length, self.rank, self.num_replicas, self.start_index = len(dataset), rank, num_replicas, start_index
        self.shuffle, self.seed, self.window_size = shuffle, seed, window_size

    def __iter__(self) -> Iterator[int]:
        n, order, random = self.length, np.arange(self.length), np.random.RandomState(self.seed)
        window = int(np.rint(n * self.window_size)) if self.shuffle else 0
        if self.shuffle:
            random.shuffle(order)
        order, back = order.tolist(), iter(())
        for position in itertools.count():
            i = position % n
            if position >= self.start_index and position % self.num_replicas == self.rank:
                yield order[i]
            if window >= 2:
                if position % _DRAWS == 0:  # many at once give the same numbers as one by one
                    back = iter(random.randint(window, size=_DRAWS).tolist())
                j = (i - next(back)) % n
                order[i], order[j] = order[j], order[i]
