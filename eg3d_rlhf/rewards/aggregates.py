"""Ways to make one reward of the scores of members that were trained apart.

The module imports no torch, since `--help` lists them.

Letters: N samples, E members.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_EPS = 1e-6  # standard deviations below this count as agreement: there the root has no gradient


def mean(scores: "torch.Tensor", _strength: float) -> "torch.Tensor":
    """Mean over members (Lakshminarayanan et al. 2017, arXiv 1612.01474): less variance than one member, no
    pessimism.
    """
    return scores.mean(dim=0)


def least(scores: "torch.Tensor", _strength: float) -> "torch.Tensor":
    """The lowest member ("worst case", Coste et al. 2023, arXiv 2310.02743); the gradient is that of the
    lowest alone.
    """
    return scores.amin(dim=0)


def lower_bound(scores: "torch.Tensor", k: float) -> "torch.Tensor":
    """mean - k sd, sd the population's. Pushes away from a member above mean + sd / k; no gradient from sd
    where members agree.
    """
    variance = scores.var(dim=0, correction=0)
    spread = variance.clamp_min(_EPS**2).sqrt() * (variance > _EPS**2)
    return scores.mean(dim=0) - k * spread


def variance_penalty(scores: "torch.Tensor", weight: float) -> "torch.Tensor":
    """mean - lambda var, var the population's (UWO of Coste et al. 2023). Pushes away from a member above
    mean + 1 / (2 lambda).
    """
    return scores.mean(dim=0) - weight * scores.var(dim=0, correction=0)


def soft_minimum(scores: "torch.Tensor", beta: float) -> "torch.Tensor":
    """-beta log mean exp(-r / beta) (arXiv 2606.09073): between min (beta to 0) and mean; every member's
    weight stays in [0, 1].
    """
    low = scores.detach().amin(dim=0)  # exact where members agree
    return low - beta * ((low - scores) / beta).exp().mean(dim=0).log()


@dataclass(frozen=True)
class _Kind:
    join: "Callable[[torch.Tensor, float], torch.Tensor]"  # scores [E, N], strength -> [N]
    strength: float = 0.0  # the default
    called: str = ""  # what the strength is called; '' where there is none


KINDS = {
    "mean": _Kind(mean),
    "min": _Kind(least),
    "lcb": _Kind(lower_bound, 1.0, "k"),
    "uwo": _Kind(variance_penalty, 0.5, "lambda"),
    "softmin": _Kind(soft_minimum, 0.5, "beta"),
}
# the average of the weights, which is a single network and not an ensemble (arXiv 2401.12187)
AVERAGE = "warm"
CHOICES = (*KINDS, AVERAGE)


@dataclass(frozen=True)
class Aggregate:
    """How members' scores become one.

    Raises: ValueError for an unknown kind, and a strength where none belongs or that is not above 0.
    """

    kind: str = "mean"
    strength: float | None = None  # k of lcb, lambda of uwo, beta of softmin; None: the default

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(
                f"--aggregate: expected one of {', '.join(CHOICES)}, got {self.kind!r}. Choose one of them."
            )
        known = KINDS[self.kind]
        if self.strength is not None and not known.called:
            raise ValueError(
                f"--strength: expected none for --aggregate={self.kind}, got {self.strength}. Leave it out."
            )
        if self.strength is not None and not (math.isfinite(self.strength) and self.strength > 0):
            raise ValueError(
                f"--strength: expected {known.called} above 0, got {self.strength}. The default is"
                f" {known.strength}."
            )
        if self.strength is None and known.called:
            object.__setattr__(self, "strength", known.strength)

    def __call__(self, scores: "torch.Tensor") -> "torch.Tensor":
        """Scores [E, N], standardised so that no member decides by its scale alone -> [N]. Differentiable.

        A constant added to all scores is added to the result, and the order of members does not matter;
        mean >= softmin >= min.
        """
        return KINDS[self.kind].join(scores, self.strength or 0.0)


def check_joining(kind: str | None, strength: float | None) -> None:
    """Raise ValueError where `combine` would refuse the kind or the strength."""
    if kind not in (None, AVERAGE):
        Aggregate(kind, strength)
    elif strength is not None:
        raise ValueError(
            f"--strength: expected --aggregate=lcb, uwo or softmin with it, got {kind or 'none'}. Leave it"
            " out."
        )
