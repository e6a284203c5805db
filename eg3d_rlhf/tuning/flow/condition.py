"""What a flow is told: one tensor of tokens, or several tensors by name, a row per sample.

Shape letters: N samples, L tokens, E their size.
"""

from collections.abc import Callable, Mapping

import torch

Condition = torch.Tensor | Mapping[str, torch.Tensor]  # [N, L, E], or by name [N, ...]


def each(change: Callable[..., torch.Tensor], condition: Condition, *others: Condition) -> Condition:
    """The condition with each of its tensors changed, together with those of others of the same form."""
    if isinstance(condition, torch.Tensor):
        return change(condition, *others)
    named = [other for other in others if not isinstance(other, torch.Tensor) and set(other) == set(condition)]
    if len(named) < len(others):
        raise ValueError(f"conditions: expected tensors {', '.join(condition)} of each, got others. The empty condition has the same.")
    return {name: change(tensor, *(other[name] for other in named)) for name, tensor in condition.items()}


def to_device(condition: Condition, device: torch.device | str) -> Condition:
    """On another device."""
    return each(lambda tensor: tensor.to(device), condition)


def tensor_of(condition: Condition) -> torch.Tensor:
    """One of its tensors, for the device that all are on."""
    return condition if isinstance(condition, torch.Tensor) else next(iter(condition.values()))


def rows(condition: Condition) -> int:
    """N. Raises: ValueError where tensors differ in it."""
    if isinstance(condition, torch.Tensor):
        return len(condition)
    counts = {name: len(tensor) for name, tensor in condition.items()}
    if len(set(counts.values())) != 1:
        raise ValueError(f"conditions: expected tensors of one row per sample, got {counts}. Collate them alike.")
    return next(iter(counts.values()))


def expanded(empty: Condition, condition: Condition) -> Condition:
    """The empty condition, given once or for each sample, as many times as the other has rows."""
    return each(lambda null, full: null.expand_as(full) if len(null) == 1 else null, empty, condition)


def where(mask: torch.Tensor, yes: Condition, no: Condition) -> Condition:
    """Row by row, `yes` where mask [N] is true."""
    return each(lambda a, b: torch.where(mask.to(b.device).view(-1, *[1] * (b.ndim - 1)), a.to(b), b), yes, no)


def twice(condition: Condition) -> Condition:
    """All rows, then all again."""
    return each(lambda tensor: tensor.repeat(2, *[1] * (tensor.ndim - 1)), condition)
