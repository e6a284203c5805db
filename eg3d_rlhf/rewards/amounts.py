"""How many labels it takes to learn from and to say anything of the result, and what to say where there are fewer."""

import math
from collections.abc import Mapping, Sequence

from scipy.optimize import brentq
from scipy.special import ndtri

LEAST_TRAIN = 200  # pairs; a network that reads a slab remembers fewer by heart
LEAST_TEST = 54  # pairs; from then on the exact test tells a true accuracy of 0.7 from chance in four cases of five
LEAST_KIND = 27  # held-out single shapes of either kind


def too_few(counts: Mapping[str, int], fractions: Sequence[float]) -> str:
    """A line to print where pairs are too few to train or to judge the result, else ''.

    Args: counts: pairs by split; fractions: the splits' shares.
    """
    train, val, test = (counts[name] for name in ("train", "val", "test"))
    if train >= LEAST_TRAIN and val >= LEAST_TEST and test >= LEAST_TEST:
        return ""
    shares = zip((LEAST_TRAIN, LEAST_TEST, LEAST_TEST), fractions, strict=True)
    wanted = max(math.ceil(least / share) for least, share in shares if share)
    return (
        f"too few labels: {train} pairs to train, {val} to choose the epoch by and {test} to test; some {wanted} labels are wanted "
        f"({LEAST_TRAIN} to train, {LEAST_TEST} and {LEAST_TEST} held out). The figures below say little."
    )


def too_few_shapes(good: int, others: int) -> str:
    """The same for held-out labels of single shapes."""
    if min(good, others) >= LEAST_KIND:
        return ""
    return f"too few labels: {good} preferred and {others} other shapes are held out; {LEAST_KIND} of either are wanted."


def auc_interval(value: float, good: int, others: int, confidence: float = 0.95) -> tuple[float, float]:
    """Interval of an AUC from so many of either kind, inside 0..1 and for values of 0 and 1, too.

    Newcombe (2006), method 5: where |AUC - value| = z sqrt(V), V the variance of Hanley and McNeil (1982) at that AUC with equal numbers
    of both kinds: V = AUC (1 - AUC) (1 + N ((1 - AUC) / (2 - AUC) + AUC / (1 + AUC))) / (good others), N = (good + others) / 2 - 1.
    """
    z, n = float(ndtri(0.5 + confidence / 2)), (good + others) / 2 - 1

    def beyond(at: float) -> float:
        variance = at * (1 - at) * (1 + n * ((1 - at) / (2 - at) + at / (1 + at))) / (good * others)
        return (at - value) ** 2 - z * z * variance

    inside = min(max(value, 1e-9), 1 - 1e-9)  # at 0 and 1 themselves the variance is 0
    return (0.0 if value <= 0 else brentq(beyond, 0.0, inside), 1.0 if value >= 1 else brentq(beyond, inside, 1.0))
