"""Small image sets: pixels, cameras, zips in EG3D's form."""

import io
import json
import math
import zipfile

import numpy as np
import PIL.Image
import torch

from training.rendering.cameras import LookAtPoseSampler, intrinsics_matrix, pack_label


def pixels(i: int, width: int = 16, height: int = 16) -> np.ndarray:
    return np.random.RandomState(i).randint(0, 256, (height, width, 3), dtype=np.uint8)


def png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.fromarray(array).save(buffer, format="png")
    return buffer.getvalue()


def camera(i: int) -> list[float]:
    pose = LookAtPoseSampler.sample(math.pi / 2 + 0.1 * i, math.pi / 2 - 0.05 * i, torch.zeros(3), radius=2.7)
    return pack_label(pose, intrinsics_matrix(4.2647))[0].tolist()


def write_zip(path, entries, labels="none"):
    """A zip of entries by name; labels: what dataset.json holds under that name, "none" for no such file."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
        if labels != "none":
            archive.writestr("dataset.json", json.dumps({"labels": labels}))
    return path


def floats(size: int) -> bytes:
    """An image file of floating-point numbers, which the reader of images rejects."""
    buffer = io.BytesIO()
    PIL.Image.fromarray(np.full((size, size), 0.5, np.float32)).save(buffer, format="tiff")
    return buffer.getvalue()
