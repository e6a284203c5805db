"""Audit before a tuning: does a judge's verdict on two samples of one generator depend on their order?

Pairs of independent samples of an untuned generator often differ less than a judge can see. Its verdict then
follows the order of presentation, and such pairs carry no preference that could be learnt (94 % of verdicts
in arXiv 2606.20364). Random answers flip half of the pairs.
"""

import itertools
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from eg3d_rlhf.core.statistics import wilson_interval
from eg3d_rlhf.people.judge.verdicts import Verdict
from eg3d_rlhf.preferences.asset_votes import TIE

RANDOM_FLIPS = 0.5  # share of order flips of a judge that answers at random
Sample = TypeVar("Sample")
# What to do where pairs carry no preference.
REMEDY = (
    "Use contrastive pairs: several seeds of which the best and the worst are chosen, another guidance scale,"
    " damaged copies, or another generator."
)


def disjoint_pairs(
    samples_by_prompt: Mapping[Hashable, Sequence[Sample]], count: int, seed: int = 0
) -> list[tuple[Sample, Sample]]:
    """Draw pairs of samples of the same prompt, so that no sample is in two pairs.

    Pairs without a common sample are independent, so that the interval of a share of them is valid.

    Args:
        samples_by_prompt: prompt -> its samples.
        count: greatest number of pairs.
        seed: random seed of the order.

    Returns: pairs, spread over the prompts; fewer than `count` if there are no more.
    """
    # The order within a prompt is random, since lists are often sorted by quality.
    rng = np.random.default_rng(seed)
    # Pairs by their number within a prompt; the first ones of all prompts come first.
    rounds: dict[int, list[tuple[Sample, Sample]]] = defaultdict(list)
    for samples in samples_by_prompt.values():
        order = rng.permutation(len(samples)).tolist()
        # the last sample of an odd number stays alone
        for number, (first, second) in enumerate(zip(order[::2], order[1::2], strict=False)):
            rounds[number].append((samples[first], samples[second]))
    return list(itertools.chain.from_iterable(rounds[number] for number in sorted(rounds)))[:count]


def audit(verdicts: Sequence[Verdict]) -> dict[str, dict[str, Any]]:
    """Compute the share of order flips by criterion, with Wilson's interval over pairs.

    Args: verdicts: verdicts on disjoint pairs.

    Returns: criterion -> {n, order_flips, order_flips_interval, ties, first_share, unreadable, learnable} in
        JSON types. `learnable` is True if the upper end of the interval lies below one half.
    """
    results = {}
    for criterion in dict.fromkeys(verdict.criterion for verdict in verdicts):
        # A limit may have ended the run before some pairs.
        asked = [verdict for verdict in verdicts if verdict.criterion == criterion and verdict.is_asked]
        # An unreadable pair is no order flip, and is counted apart.
        readable = [verdict for verdict in asked if verdict.outcome is not None]
        count = len(readable)
        flips = sum(verdict.is_order_flip for verdict in readable)
        # Valid because the pairs are disjoint.
        interval = wilson_interval(flips, count) if count else None
        # Pairs of ties name no position.
        shares = [verdict.first_share for verdict in readable if verdict.first_share is not None]
        results[criterion] = {
            "n": count,
            "order_flips": flips / count if count else None,
            "order_flips_interval": None if interval is None else [float(end) for end in interval],
            "ties": sum(verdict.outcome == TIE for verdict in readable) / count if count else None,
            "first_share": sum(shares) / len(shares) if shares else None,
            "unreadable": len(asked) - count,
            # A judge that calls all pairs ties flips none of them, and gives no preference either.
            "learnable": interval is not None
            and interval.hi < RANDOM_FLIPS
            and any(verdict.outcome != TIE for verdict in readable),
        }
    return results
