"""Functions that aggregate the scores of an ensemble's members into one reward.

The members are reward networks that were trained separately. This module does not import torch, because
`--help` lists the aggregates and must be quick.

Shapes: N samples, E members of the ensemble.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# Members agree on a sample if the standard deviation of their scores is below this value. The limit is needed
# because the gradient of the square root is infinite at 0.
_EPS = 1e-6


def mean(scores: "torch.Tensor", _strength: float) -> "torch.Tensor":
    """Average scores [E, N] over members: [N] (Lakshminarayanan et al. 2017, arXiv 1612.01474).

    The mean has a lower variance than the score of one member. It is not pessimistic: disagreement between
    members does not lower it. `_strength` is ignored, because this aggregate has no parameter.
    """
    return scores.mean(dim=0)


def lowest(scores: "torch.Tensor", _strength: float) -> "torch.Tensor":
    """Take the lowest of the members' scores [E, N] for each sample: [N].

    This is worst-case optimisation, WCO, of Coste et al. 2023 (arXiv 2310.02743). Only the member with the
    lowest score gets a gradient. `_strength` is ignored, because this aggregate has no parameter.
    """
    # amin splits the gradient evenly among equal members.
    return scores.amin(dim=0)


def lower_bound(scores: "torch.Tensor", k: float) -> "torch.Tensor":
    """Compute the lower bound mean - k * std of each sample's scores: [E, N] -> [N].

    Mean and standard deviation (std, with divisor E) are taken over the E members. Maximising the result
    lowers the scores of members that lie above mean + std / k. If members agree on a sample, std contributes
    no gradient.

    Args:
        scores: scores of the members, [E, N].
        k: number of standard deviations to subtract, above 0.
    """
    # [N], over members
    variance = scores.var(dim=0, correction=0)
    # clamp_min keeps the root's gradient finite, and the mask makes value and gradient 0 where members agree.
    std = variance.clamp_min(_EPS**2).sqrt() * (variance > _EPS**2)
    return scores.mean(dim=0) - k * std


def variance_penalty(scores: "torch.Tensor", weight: float) -> "torch.Tensor":
    """Compute the penalised mean - weight * variance of each sample's scores: [E, N] -> [N].

    This is uncertainty-weighted optimisation, UWO, of Coste et al. 2023 (arXiv 2310.02743). Mean and variance
    (with divisor E) are taken over the E members. Maximising the result lowers the scores of members that lie
    above mean + 1 / (2 weight).

    Args:
        scores: scores of the members, [E, N].
        weight: weight of the variance (lambda in the paper), above 0.
    """
    return scores.mean(dim=0) - weight * scores.var(dim=0, correction=0)


def soft_minimum(scores: "torch.Tensor", beta: float) -> "torch.Tensor":
    """Compute the soft minimum -beta log mean exp(-r / beta) of each sample's scores r: [E, N] -> [N].

    The mean is taken over the E members (arXiv 2606.09073). The result approaches the minimum as beta
    approaches 0, and the mean as beta grows. The gradients with respect to the scores of the members are in
    [0, 1] and sum to 1.

    Args:
        scores: scores of the members, [E, N].
        beta: temperature, in the unit of the scores, above 0.
    """
    # Subtracting the lowest score first avoids overflow, and makes the result exact where members agree.
    lowest_score = scores.detach().amin(dim=0)
    return lowest_score - beta * ((lowest_score - scores) / beta).exp().mean(dim=0).log()


@dataclass(frozen=True)
class _Kind:
    """Kind of aggregate: a function, and the default value and the name of its parameter, the strength."""

    join: "Callable[[torch.Tensor, float], torch.Tensor]"  # scores [E, N], strength -> [N]
    strength: float = 0.0  # default value
    strength_name: str = ""  # name of the strength in messages; '' if the aggregate has none


KINDS = {
    "mean": _Kind(mean),
    "min": _Kind(lowest),
    "lcb": _Kind(lower_bound, 1.0, "k"),
    "uwo": _Kind(variance_penalty, 0.5, "lambda"),
    "softmin": _Kind(soft_minimum, 0.5, "beta"),
}
# Kind that averages the weights of the networks and gives a single network, not an ensemble (WARM, arXiv
# 2401.12187)
AVERAGE = "warm"
CHOICES = (*KINDS, AVERAGE)


@dataclass(frozen=True)
class Aggregate:
    """Function that joins the scores of an ensemble's members into one reward.

    Raises: ValueError for an unknown kind, for a strength that is not above 0, and for a strength that was
        given although the kind has no such parameter.
    """

    kind: str = "mean"
    strength: float | None = None  # k of lcb, lambda of uwo, beta of softmin; None means the kind's default

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(
                f"--aggregate: expected one of {', '.join(CHOICES)}, got {self.kind!r}. Choose one of them."
            )
        # An unknown kind has been rejected above.
        aggregate_kind = KINDS[self.kind]
        if self.strength is not None and not aggregate_kind.strength_name:
            raise ValueError(
                f"--strength={self.strength} has no effect, because --aggregate={self.kind} has no strength."
                " Remove --strength."
            )
        if self.strength is not None and not (math.isfinite(self.strength) and self.strength > 0):
            raise ValueError(
                f"--strength: expected a value of {aggregate_kind.strength_name} above 0, got"
                f" {self.strength}. Without --strength, {aggregate_kind.strength} is used."
            )
        # The default is filled in, so that a file of the ensemble states the value that was used. A frozen
        # dataclass allows an assignment only through object.__setattr__.
        if self.strength is None and aggregate_kind.strength_name:
            object.__setattr__(self, "strength", aggregate_kind.strength)

    def __call__(self, scores: "torch.Tensor") -> "torch.Tensor":
        """Aggregate the members' scores [E, N] into one reward per sample, [N]. Differentiable.

        The scores must be standardised, so that no member dominates only by its scale. A constant that is
        added to all scores is added to the result. The order of members does not matter. For the same scores,
        mean >= softmin >= min.
        """
        # Kinds without a strength ignore the second argument.
        return KINDS[self.kind].join(scores, self.strength or 0.0)


def check_joining(kind: str | None, strength: float | None) -> None:
    """Raise ValueError if `ensembles.combine` would reject this kind or this strength.

    Args:
        kind: one of `CHOICES`, or None for the mean of raw scores.
        strength: strength of the aggregate, or None for the kind's default.
    """
    if kind not in (None, AVERAGE):
        Aggregate(kind, strength)
    elif strength is not None:
        raise ValueError(
            f"--strength={strength} applies only to --aggregate=lcb, uwo or softmin, but"
            f" {f'--aggregate={kind} was given' if kind else '--aggregate was not given'}. Remove --strength,"
            " or choose one of these aggregates."
        )
