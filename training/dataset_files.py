"""A dataset's files, read and checked: a folder or a zip of PNGs with dataset.json, in EG3D's format.

Shape letters: n images, L numbers per label.
"""

import io
import json
import zipfile
from pathlib import Path

import numpy as np
import PIL.Image

from training.rendering.cameras import LABEL_NUMBERS, POSE_NUMBERS

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
LABELS_FILE = "dataset.json"
_PIXEL_LIMIT = 1 << 28  # of one image; a larger header is refused before it is decoded
ROTATION_TOLERANCE = 1e-2  # largest entry of |R^T R - I|; single-precision poses from fitting pipelines reach 1e-4


class ImageFiles:
    """The images and labels of a folder or zip, read by entry name.

    Args:
        path: folder (searched recursively) or .zip file.
    Raises: ValueError naming the file and the remedy when the path is missing, not a zip, damaged, or without images.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        self._archive = None
        self._folder = self.path.is_dir()  # and not when it is read: it may vanish meanwhile
        if self._folder:
            entries = [p.relative_to(self.path).as_posix() for p in self.path.rglob("*") if p.is_file()]
        elif self.path.is_file():
            entries = self._open_archive().namelist()
        else:
            raise ValueError(f"dataset {self.path}: expected a folder or a .zip file, got a path that does not exist. Check --data.")
        self.entries = frozenset(entries)
        self.images = sorted(name for name in entries if name.lower().endswith(IMAGE_SUFFIXES))
        if not self.images:
            raise ValueError(
                f"dataset {self.path}: expected images ({', '.join(IMAGE_SUFFIXES)}), got {len(entries)} other entries. "
                "Point --data at the folder or zip that holds them."
            )

    def __getstate__(self):
        return {**self.__dict__, "_archive": None}  # a worker process opens the file anew: handles share their position

    def close(self) -> None:
        """Close the zip; it is reopened when needed."""
        if self._archive is not None:
            self._archive.close()
            self._archive = None

    def _open_archive(self) -> zipfile.ZipFile:
        if self._archive is None:
            try:
                self._archive = zipfile.ZipFile(self.path)
            except (zipfile.BadZipFile, OSError) as error:
                raise ValueError(
                    f"dataset {self.path}: expected a zip archive, got a file that cannot be read as one ({error}). "
                    "It is gone, truncated or of another kind: copy or build it again."
                ) from error
        return self._archive

    def read(self, entry: str) -> bytes:
        """Content of an entry; ValueError when it is damaged."""
        try:
            if self._folder:
                return (self.path / entry).read_bytes()
            return self._open_archive().read(entry)
        except (zipfile.BadZipFile, OSError, EOFError, KeyError) as error:
            raise ValueError(
                f"dataset {self.path}: cannot read entry {entry!r} ({error}). The file is gone or damaged: copy or build it again."
            ) from error

    def decode(self, entry: str) -> PIL.Image.Image:
        """An entry's picture, wholly read.

        Raises: ValueError when the entry is damaged, too large, or not an 8-bit greyscale or RGB image.
        """
        where, data = f"dataset {self.path}: entry {entry!r}", self.read(entry)
        try:
            with PIL.Image.open(io.BytesIO(data)) as image:
                if image.width * image.height > _PIXEL_LIMIT:
                    raise ValueError(f"{image.width}x{image.height} is too large")
                image = image.copy()
        except (OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError) as error:
            raise ValueError(
                f"{where}: expected a whole image, got {len(data)} bytes that cannot be decoded ({error}). Replace or remove the file."
            ) from error
        if image.mode not in ("L", "RGB"):
            raise ValueError(f"{where}: expected an 8-bit RGB or greyscale image, got mode {image.mode}. Convert it to RGB.")
        return image

    def read_image(self, entry: str) -> np.ndarray:
        """Pixels [C, H, W] uint8 of an entry, C = 1 or 3.

        Raises: ValueError as `decode`, and when the image is not square.
        """
        pixels = np.asarray(self.decode(entry))
        if pixels.shape[0] != pixels.shape[1]:
            raise ValueError(
                f"dataset {self.path}: entry {entry!r}: expected a square image, got {pixels.shape[1]}x{pixels.shape[0]}. "
                "Crop the images to squares."
            )
        return np.ascontiguousarray(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1))

    def read_labels(self) -> list | None:
        """One label per image in the order of `images`: numbers or ints as stored; None where dataset.json says "labels": null.

        Raises: ValueError when dataset.json is missing, malformed, or lacks an image.
        """
        if LABELS_FILE not in self.entries:
            raise ValueError(
                f"dataset {self.path}: expected {LABELS_FILE} with the camera labels, got none. Add it at the top of the set, "
                "or train without labels (use_labels=False, --cond=0)."
            )
        where = f"dataset {self.path}: {LABELS_FILE}"
        try:
            rows = json.loads(self.read(LABELS_FILE))["labels"]
            by_name = None if rows is None else {str(name): label for name, label in rows}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f'{where}: expected {{"labels": [[image name, label], ...]}}, got something else ({error!r}). Rewrite the file.'
            ) from error
        if by_name is None:
            return None
        missing = [name for name in self.images if by_name.get(name) is None]
        if missing:
            raise ValueError(
                f"{where}: expected a label for each of the {len(self.images)} images, got none for {len(missing)} of them, "
                f"the first being {missing[0]!r}. Add them, or remove the images."
            )
        return [by_name[name] for name in self.images]


def label_array(labels: list, names: list[str], where: str, c_dim: int | None) -> np.ndarray:
    """Labels as an array: float32 [n, L] for lists of numbers, int64 [n] for class indices.

    Args:
        labels: as stored, one per name. names: entry names for the messages. where: file for the messages.
        c_dim: required L, or None to accept any.
    Raises: ValueError when lengths differ from c_dim or from each other, values are not finite numbers, or a 25-number label does not hold
            a pose with a rotation; each message names the first such entry.
    """
    if all(isinstance(label, int) and not isinstance(label, bool) for label in labels):
        classes = np.array(labels, dtype=np.int64)
        if classes.min() < 0:
            raise ValueError(f"{where}: entry {names[int(classes.argmin())]!r}: expected a class index >= 0, got {classes.min()}.")
        _check_length(int(classes.max()) + 1, names[int(classes.argmax())], where, c_dim)
        return classes
    wanted = c_dim or (len(labels[0]) if isinstance(labels[0], list) else None)
    for name, label in zip(names, labels, strict=True):
        if not isinstance(label, list):
            raise ValueError(f"{where}: entry {name!r}: expected a list of numbers like its neighbours, got {label!r}. Rewrite its label.")
        _check_length(len(label), name, where, wanted)
    try:
        values = np.array(labels, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: expected labels to hold numbers only ({error}). Rewrite them.") from error
    finite = np.isfinite(values).all(axis=1)
    if not finite.all():
        first = names[int(finite.argmin())]
        raise ValueError(f"{where}: entry {first!r}: expected finite numbers, got NaN or infinity. Rewrite its label.")
    if values.shape[1] == LABEL_NUMBERS:
        check_poses(values, names, where)
    return values


def _check_length(length: int, name: str, where: str, wanted: int | None) -> None:
    if wanted is not None and length != wanted:
        note = " A camera label is 16 cam2world and 9 intrinsics numbers." if wanted == LABEL_NUMBERS else ""
        raise ValueError(f"{where}: entry {name!r}: expected a label of {wanted} numbers, got {length}.{note} Rewrite the labels.")


def check_poses(values: np.ndarray, names: list[str], where: str) -> None:
    """ValueError unless the first 16 numbers of every label [n, 25] are a row-major rigid cam2world matrix."""
    pose = values[:, :POSE_NUMBERS].reshape(-1, 4, 4).astype(np.float64)
    rotation = pose[:, :3, :3]
    deviation = np.abs(rotation.transpose(0, 2, 1) @ rotation - np.eye(3)).max(axis=(1, 2))
    bad = (deviation > ROTATION_TOLERANCE) | (np.linalg.det(rotation) < 0)
    if bad.any():
        i = int(bad.argmax())
        raise ValueError(
            f"{where}: entry {names[i]!r}: expected a rotation in the pose's upper-left 3x3, got one with |R^T R - I| = {deviation[i]:.3g} "
            f"and determinant {np.linalg.det(rotation[i]):.3g} ({int(bad.sum())} of {len(names)} labels). Store cam2world row-major, "
            "without scale or reflection."
        )
    bad = np.abs(pose[:, 3] - [0, 0, 0, 1]).max(axis=1) > ROTATION_TOLERANCE
    if bad.any():
        i = int(bad.argmax())
        raise ValueError(
            f"{where}: entry {names[i]!r}: expected the pose's last row to be 0 0 0 1, got {pose[i, 3].tolist()}. Store it row-major."
        )
