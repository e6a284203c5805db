"""Reading a dataset's files: a folder or a zip of PNGs with dataset.json, in EG3D's format."""

import io
import json
import zipfile
from pathlib import Path

import numpy as np
import PIL.Image

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
LABELS_FILE = "dataset.json"


class ImageFiles:
    """The images and labels of a folder or zip, read by entry name.

    Args:
        path: folder (searched recursively) or .zip file.

    Raises:
        ValueError: naming the file and the remedy when the path is missing, not a zip, damaged, or without images.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        self._archive = None
        if self.path.is_dir():
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
                    "It is truncated or of another kind: copy or build it again."
                ) from error
        return self._archive

    def read(self, entry: str) -> bytes:
        """Content of an entry; ValueError when it is damaged."""
        try:
            if self.path.is_dir():
                return (self.path / entry).read_bytes()
            return self._open_archive().read(entry)
        except (zipfile.BadZipFile, OSError, EOFError, KeyError) as error:
            raise ValueError(
                f"dataset {self.path}: cannot read entry {entry!r} ({error}). The file is damaged: copy or build it again."
            ) from error

    def read_image(self, entry: str) -> np.ndarray:
        """Pixels [C, H, W] uint8 of an entry, C = 1 or 3.

        Raises:
            ValueError: when the entry is not a readable, square, 8-bit greyscale or RGB image.
        """
        where = f"dataset {self.path}: entry {entry!r}"
        data = self.read(entry)
        try:
            with PIL.Image.open(io.BytesIO(data)) as image:
                mode = image.mode
                pixels = np.asarray(image)
        except (OSError, SyntaxError, ValueError) as error:
            raise ValueError(
                f"{where}: expected a whole image, got {len(data)} bytes that cannot be decoded ({error}). Replace the file."
            ) from error
        if mode not in ("L", "RGB"):
            raise ValueError(f"{where}: expected an 8-bit RGB or greyscale image, got mode {mode}. Convert it to RGB.")
        if pixels.shape[0] != pixels.shape[1]:
            raise ValueError(f"{where}: expected a square image, got {pixels.shape[1]}x{pixels.shape[0]}. Crop the images to squares.")
        return np.ascontiguousarray(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1))

    def read_labels(self) -> list | None:
        """One label per image in the order of `images`: numbers or ints as stored; None where dataset.json says "labels": null.

        Raises:
            ValueError: when dataset.json is missing, malformed, or lacks an image.
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
