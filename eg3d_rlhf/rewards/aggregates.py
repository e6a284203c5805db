"""Aggregate the scores of ensemble members that were trained separately into one reward.

This module does not import torch, because `--help` lists the aggregates.

Letters: N samples, E members.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# Standard deviations below this count as agreement. The gradient of the square root is infinite at 0.
_EPS = 1e-6


def mean(scores: "torch.Tensor", _strength: float) -> "torch.Tensor":
    """Average over members (Lakshminarayanan et al. 2017, arXiv 1612.01474).

    The variance is lower than that of one member. The mean is not pessimistic.
    """
    return scores.mean(dim=0)


def least(scores: "torch.Tensor", _strength: float) -> "torch.Tensor":
    """Take the lowest member's score ("worst case", Coste et al. 2023, arXiv 2310.02743).

    Only the lowest member gets a gradient.
    """
    # amin splits the gradient evenly among equal members.
    return scores.amin(dim=0)


def lower_bound(scores: "torch.Tensor", k: float) -> "torch.Tensor":
    """Compute mean - k sd, with sd the standard deviation of the population.

    A member with a score above mean + sd / k is pushed down. Where members agree, sd gives no gradient.
    """
    # [N], over members
    variance = scores.var(dim=0, correction=0)
    # clamp_min keeps the root's gradient finite, and the mask makes value and gradient 0 where members agree.
    spread = variance.clamp_min(_EPS**2).sqrt() * (variance > _EPS**2)
    return scores.mean(dim=0) - k * spread


def variance_penalty(scores: "torch.Tensor", weight: float) -> "torch.Tensor":
    """Compute mean - lambda var, with var the variance of the population (UWO of Coste et al. 2023).

    A member with a score above mean + 1 / (2 lambda) is pushed down.
    """
    return scores.mean(dim=0) - weight * scores.var(dim=0, correction=0)


def soft_minimum(scores: "torch.Tensor", beta: float) -> "torch.Tensor":
    """Compute -beta log mean exp(-r / beta) (arXiv 2606.09073).

    The value lies between the minimum, for beta to 0, and the mean. The weight of every member is in [0, 1].
    """
    # Subtracting the lowest score first avoids overflow, and makes the result exact where members agree.
    low = scores.detach().amin(dim=0)
    return low - beta * ((low - scores) / beta).exp().mean(dim=0).log()


@dataclass(frozen=True)
class _Kind:
    """Function of an aggregate, with the default and the name of its strength."""

    join: "Callable[[torch.Tensor, float], torch.Tensor]"  # scores [E, N], strength -> [N]
    strength: float = 0.0  # default value
    strength_name: str = ""  # name of the strength in messages; '' if the aggregate has none


KINDS = {
    "mean": _Kind(mean),
    "min": _Kind(least),
    "lcb": _Kind(lower_bound, 1.0, "k"),
    "uwo": _Kind(variance_penalty, 0.5, "lambda"),
    "softmin": _Kind(soft_minimum, 0.5, "beta"),
}
# Average of the weights, which gives a single network and not an ensemble (arXiv 2401.12187)
AVERAGE = "warm"
CHOICES = (*KINDS, AVERAGE)


@dataclass(frozen=True)
class Aggregate:
    """Function that joins the scores of members into one reward.

    Raises: ValueError for an unknown kind, for a strength that is not above 0, and for a strength of a kind
        that has none.
    """

    kind: str = "mean"
    strength: float | None = None  # k of lcb, lambda of uwo, beta of softmin; None means the kind's default

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(
                f"--aggregate: expected one of {', '.join(CHOICES)}, got {self.kind!r}. Choose one of them."
            )
        # An unknown kind has been rejected above.
        known = KINDS[self.kind]
        if self.strength is not None and not known.strength_name:
            raise ValueError(
                f"--strength: --aggregate={self.kind} has no strength, got {self.strength}. Remove"
                " --strength."
            )
        if self.strength is not None and not (math.isfinite(self.strength) and self.strength > 0):
            raise ValueError(
                f"--strength: expected {known.strength_name} above 0, got {self.strength}. The default is"
                f" {known.strength}."
            )
        # The default is filled in, so that a file of the ensemble states the value that was used.
        if self.strength is None and known.strength_name:
            object.__setattr__(self, "strength", known.strength)

    def __call__(self, scores: "torch.Tensor") -> "torch.Tensor":
        """Aggregate scores [E, N] -> [N]. Differentiable.

        The scores must be standardised, so that no member dominates only by its scale. A constant that is
        added to all scores is added to the result, the order of members does not matter, and mean >= softmin
        >= min.
        """
        # Kinds without a strength ignore the second argument.
        return KINDS[self.kind].join(scores, self.strength or 0.0)


def check_joining(kind: str | None, strength: float | None) -> None:
    """Raise ValueError if `combine` would reject this kind or this strength."""
    if kind not in (None, AVERAGE):
        Aggregate(kind, strength)
    elif strength is not None:
        raise ValueError(
            f"--strength: applies only to --aggregate=lcb, uwo or softmin, got --aggregate={kind or 'none'}."
            " Remove --strength."
        )
