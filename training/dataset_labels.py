"""Checks of dataset labels, vectorised over the whole set.

Shape letters: n images, L numbers per label.
"""

import numpy as np

from training.rendering.cameras import LABEL_NUMBERS, POSE_NUMBERS

ROTATION_TOLERANCE = 1e-2  # largest entry of |R^T R - I|; single-precision poses from fitting pipelines reach 1e-4


def label_array(labels: list, names: list[str], where: str, c_dim: int | None) -> np.ndarray:
    """Labels as an array: float32 [n, L] for lists of numbers, int64 [n] for class indices.

    Args:
        labels: as stored, one per name. names: entry names for the messages. where: file for the messages.
        c_dim: required L, or None to accept any.

    Raises:
        ValueError: when lengths differ from c_dim or from each other, values are not finite numbers, or a 25-number label does not hold
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
