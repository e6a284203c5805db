"""Labels of images: conversion of dataset.json's labels to arrays, with the checks of their numbers.

Shapes: n is the number of images, L the number of numbers in a label.
"""

import numpy as np

from training.camera_conventions import Scene, describe_remedy, diagnose, number_faults
from training.rendering.cameras import LABEL_NUMBERS, POSE_NUMBERS


def label_array(
    labels: list, image_names: list[str], file_description: str, c_dim: int | None, fixing: str = ""
) -> np.ndarray:
    """Check labels and convert them to an array.

    Args:
        labels: label of each image as stored: a list of numbers, or an integer class index.
        image_names: entry name of each image, for messages.
        file_description: name of the file, for messages.
        c_dim: required number of numbers L in a label, or None to accept any.
        fixing: see `check_numbers`.
    Returns: an array float32 [n, L] if the labels are lists of numbers, or an array int64 [n] if they are
        class indices.
    Raises: ValueError for malformed labels (`parse_labels`), and for camera labels with impossible numbers
        (`check_numbers`).
    """
    label_values = parse_labels(labels, image_names, file_description, c_dim)
    if label_values.ndim == 2 and label_values.shape[1] == LABEL_NUMBERS:
        check_numbers(label_values, image_names, file_description, fixing)
    return label_values


def parse_labels(
    labels: list, image_names: list[str], file_description: str, c_dim: int | None
) -> np.ndarray:
    """Convert labels to an array, without a check of cameras. See `label_array` for arguments and result.

    Raises: ValueError if the lengths differ from c_dim or from each other, or if a value is no finite number
        or a negative class index. The message names the first such image.
    """
    # bool is a subclass of int in Python, but true and false are no class indices.
    if all(isinstance(label, int) and not isinstance(label, bool) for label in labels):
        class_indices = np.array(labels, dtype=np.int64)
        if class_indices.min() < 0:
            raise ValueError(
                f"{file_description}: entry {image_names[int(class_indices.argmin())]!r}: expected a class"
                f" index >= 0, got {class_indices.min()}. Correct the label in the file."
            )
        class_count = int(class_indices.max()) + 1
        # A class index is no camera, also if it would fit into a label of as many numbers.
        if c_dim == LABEL_NUMBERS:
            raise ValueError(
                f"{file_description}: entry {image_names[0]!r}: expected a camera label of {LABEL_NUMBERS}"
                f" numbers, got the class index {class_indices[0]}. Write the cameras of the images, as"
                " docs/guides/cameras.md shows."
            )
        # The set need not have images of all classes.
        if c_dim is not None and class_count > c_dim:
            raise ValueError(
                f"{file_description}: entry {image_names[int(class_indices.argmax())]!r}: expected a class"
                f" index from 0 to {c_dim - 1}, because labels have {c_dim} numbers, got {class_count - 1}."
                " Correct the labels in the file."
            )
        return class_indices
    # If no length is required, all labels need the length of the first one.
    required_length = c_dim or (len(labels[0]) if isinstance(labels[0], list) else None)
    for image_name, label in zip(image_names, labels, strict=True):
        if not isinstance(label, list):
            raise ValueError(
                f"{file_description}: entry {image_name!r}: expected a list of numbers as for other images,"
                f" got {label!r}. Correct the label in the file."
            )
        _check_length(len(label), image_name, file_description, required_length)
    try:
        label_matrix = np.array(labels, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{file_description}: a label contains a value that is no number ({error}). Correct the label in"
            " the file."
        ) from error
    is_finite = np.isfinite(label_matrix).all(axis=1)  # [n]
    if not is_finite.all():
        # argmin returns the index of the first False.
        first_invalid_name = image_names[int(is_finite.argmin())]
        raise ValueError(
            f"{file_description}: entry {first_invalid_name!r}: expected finite numbers, got NaN or infinity."
            " Correct the label in the file."
        )
    return label_matrix


def _check_length(
    label_length: int, image_name: str, file_description: str, required_length: int | None
) -> None:
    """Raise ValueError if a label has another length than required.

    Args:
        label_length: number of numbers in the label.
        image_name: name of the image, for the message.
        file_description: name of the file with the labels, for the message.
        required_length: required number of numbers; None: any number is accepted.
    """
    if required_length is not None and label_length != required_length:
        is_camera = required_length == LABEL_NUMBERS
        note_text = ""
        if is_camera:
            note_text = " A camera label has 16 numbers of cam2world and 9 of the intrinsics."
            if label_length == POSE_NUMBERS:
                note_text += " The intrinsics are missing: append fx 0 0.5 0 fy 0.5 0 0 1, in image sizes."
        raise ValueError(
            f"{file_description}: entry {image_name!r}: expected a label of {required_length} numbers, got"
            f" {label_length}.{note_text} Correct the labels in the file, or leave them out with data convert"
            " --labels=drop."
        )


def check_numbers(
    label_matrix: np.ndarray,
    image_names: list[str],
    file_description: str,
    fixing: str,
    uncured_labels: np.ndarray | None = None,
) -> None:
    """Raise ValueError for camera labels whose numbers are impossible, with the likely mistake and its cure.

    The pose must be rigid and end with 0 0 0 1. Of the intrinsics, the focal lengths must be in (0, 20] and
    the principal point in [0, 1], in image sizes, and the other numbers must be those of a camera matrix.

    Args:
        label_matrix: camera labels [n, 25].
        image_names: entry name of each image, for messages.
        file_description: name of the file, for messages.
        fixing: start of the sentence whose end are the flags of `data convert` that correct the labels, such
            as "Add". Empty: no flags are proposed.
        uncured_labels: labels before the cures that the user chose [n, 25]; None: `label_matrix`.
    """
    fault = next(number_faults(label_matrix), None)
    if fault is None:
        return
    first_index = int(fault.is_faulty.argmax())
    diagnosis = diagnose(label_matrix, image_names, Scene(), uncured_labels)
    raise ValueError(
        f"{file_description}: entry {image_names[first_index]!r}: {fault.describe(first_index)}"
        f" ({int(fault.is_faulty.sum())} of {len(image_names)} labels)."
        f" {describe_remedy(diagnosis, fixing) or fault.remedy}"
    )


def camera_warning(
    label_matrix: np.ndarray,
    image_names: list[str],
    file_description: str,
    scene: Scene,
    fixing: str,
    uncured_labels: np.ndarray | None = None,
) -> str | None:
    """Return a sentence about cameras that are possible but hardly right, or None if all checks pass.

    Args: see `check_numbers`; scene: region that the cameras have to show.
    """
    diagnosis = diagnose(label_matrix, image_names, scene, uncured_labels)
    if not diagnosis.findings:
        return None
    return f"{file_description}: {'; '.join(diagnosis.findings)}. {describe_remedy(diagnosis, fixing)}"
