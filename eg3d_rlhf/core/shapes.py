"""Letters for the axes of tensors, and the check of tensor shapes at the public functions of the package.

Letters used in shape comments and in `check_shape` patterns:

    N  samples in a batch          P  pairs of samples (winner first)    C  channels
    D  depth slices, z axis (+z towards the camera)                      H  rows, y axis (+y up)
    W  columns, x axis (+x right)  M  entries of a feature vector        L  layers of the style vector
    F  views per sample            R  rays                               S  samples along a ray

Volumes are [N, C, D, H, W] = [N, C, z, y, x] everywhere inside the package; flips live in file readers and
writers.
"""

from collections.abc import Sequence

import torch


def check_shape(who: str, tensor: torch.Tensor, pattern: Sequence[int | str], what_to_do: str) -> None:
    """Raise ValueError unless `tensor` has the shape `pattern`.

    Args:
        who: name of the caller and argument, e.g. "RewardModel.score(slab)".
        pattern: one entry per axis. An int is the exact size. A letter of the legend allows any size >= 1,
            but the same size wherever the letter occurs again.
        what_to_do: the remedy, one sentence, which ends the message.
    Raises: ValueError for an object that is no tensor, another number of axes, or another size.
    """
    # For the message, e.g. [N, 1, 128, 141, 129].
    expected = "[" + ", ".join(str(p) for p in pattern) + "]"
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f"{who}: expected a tensor {expected}, got {type(tensor).__name__}. {what_to_do}")
    got = list(tensor.shape)
    # letter -> size at its first occurrence
    size_of_letter: dict[str, int] = {}
    fits = len(got) == len(pattern)
    # strict=False: a different number of axes is already recorded in `fits`.
    for size, allowed in zip(got, pattern, strict=False):
        fits = (
            fits
            and size >= 1
            and size == (allowed if isinstance(allowed, int) else size_of_letter.setdefault(allowed, size))
        )
    if not fits:
        raise ValueError(f"{who}: expected {expected}, got {got}. {what_to_do}")
