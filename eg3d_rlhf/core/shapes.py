"""Check of tensor shapes at the public functions of the package, and the letters that stand for axes.

Shape comments and the patterns of `check_shape` use these letters:

    N  samples in a batch          P  pairs of samples (winner first)    C  channels
    D  depth slices, z axis (+z towards the camera)                      H  rows, y axis (+y up)
    W  columns, x axis (+x right)  M  entries of a feature vector        L  layers of the style vector
    F  views per sample            R  rays                               S  samples along a ray

Volumes are [N, C, D, H, W] = [N, C, z, y, x] everywhere inside the package. Only file readers and writers
flip or permute axes.
"""

from collections.abc import Sequence

import torch


def check_shape(caller_name: str, tensor: torch.Tensor, pattern: Sequence[int | str], remedy: str) -> None:
    """Raise ValueError unless `tensor` has the shape `pattern`.

    Args:
        caller_name: name of the calling function and its argument, for example "RewardModel.score(slab)".
        tensor: the tensor to check.
        pattern: one element for each axis. An int is the exact size. A letter of the list above allows any
            size >= 1, but equal letters need equal sizes.
        remedy: sentence that ends the message and says what the user can do.
    Raises: ValueError if the object is no tensor, has another number of axes, or has another size on an axis.
    """
    # For the message, e.g. [N, 1, 128, 141, 129].
    expected_shape = "[" + ", ".join(str(axis) for axis in pattern) + "]"
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(
            f"{caller_name}: expected a tensor of shape {expected_shape}, got {type(tensor).__name__}."
            f" {remedy}"
        )
    given_shape = list(tensor.shape)
    size_of_letter: dict[str, int] = {}
    is_match = len(given_shape) == len(pattern)
    # strict=False: a different number of axes is already recorded in `is_match`.
    for axis_size, axis in zip(given_shape, pattern, strict=False):
        # setdefault stores the size at the first occurrence of a letter, and returns it at later ones.
        required_size = axis if isinstance(axis, int) else size_of_letter.setdefault(axis, axis_size)
        is_match = is_match and axis_size >= 1 and axis_size == required_size
    if not is_match:
        raise ValueError(f"{caller_name}: expected shape {expected_shape}, got {given_shape}. {remedy}")
