"""Compares arms with plain score distillation: win rates by a held-out evaluator that trains nothing, with
intervals, paired changes of measures, and Elo ratings.

Letters: N pairs of (prompt, seed); every arm has an asset for each.
"""

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Protocol

import numpy as np
import torch

from eg3d_rlhf.core.statistics import bootstrap_mean_interval, wilson_interval
from eg3d_rlhf.experiments.table import markdown_rows, with_interval
from eg3d_rlhf.generators.assets.asset import Asset
from eg3d_rlhf.preferences.bradley_terry import Judgement, elo

BASE = "sds"  # the arm with which all others are compared
INTERVAL = (
    "95 % Wilson interval over pairs of prompt and seed, ties count half; means: percentile bootstrap, 10,000"
    " resamples"
)
# The evaluator's answer -> winner, and points of the first arm. -1 is a tie.
_WINNER = {0: "a", 1: "b", -1: "tie"}
_POINTS = {0: 1.0, 1: 0.0, -1: 0.5}


class FinalEvaluator(Protocol):
    """Held-out evaluator of finished assets. It trains nothing, and its inputs are used by no reward."""

    def compare(self, first: Asset, second: Asset, prompts: Sequence[str]) -> list[int]:
        """Return 0 or 1 for the better one of each pair of assets [N], and -1 for a tie."""


def compare(
    assets: Mapping[str, Asset],
    pairs: Sequence[tuple[str, int]],
    evaluator: FinalEvaluator,
    measured: Mapping[str, Mapping[str, torch.Tensor]],
) -> tuple[dict, list[Judgement]]:
    """Compare all arms with each other.

    Args:
        assets: arm -> N assets, in the order of `pairs`.
        pairs: (prompt, seed) of each asset.
        evaluator: compares assets of two arms.
        measured: arm -> name -> figures [N] that are reported in addition. NaN where a measure does not
            apply; a measure that applies to no asset is left out.

    Returns: the table as JSON values, and all judgements.
    """
    # The command always adds the base, and all arms have the same pairs.
    assert BASE in assets and {len(made) for made in assets.values()} == {len(pairs)}
    prompts = [prompt for prompt, _ in pairs]
    # Elo resamples these names, so that games of the same pair stay together.
    names = [f"{prompt} #{seed}" for prompt, seed in pairs]
    # Every two arms are compared, because the Elo ratings use all games.
    answers = {(a, b): evaluator.compare(assets[a], assets[b], prompts) for a, b in combinations(assets, 2)}
    judgements = [
        Judgement(a, b, _WINNER[answer], name)
        for (a, b), answers_of_pair in answers.items()
        for answer, name in zip(answers_of_pair, names, strict=True)
    ]
    ratings = elo(judgements)
    arms = {}
    for arm in assets:
        if (BASE, arm) in answers:
            # The points are those of the base, which comes first in these answers.
            points = 1 - np.array([_POINTS[answer] for answer in answers[BASE, arm]])
        else:
            # Without games, which is the base itself, all are ties.
            points = np.array([_POINTS[answer] for answer in answers.get((arm, BASE), [-1] * len(pairs))])
        rating = ratings.ratings[arm]
        # Everything here becomes JSON: plain floats, no tensors.
        arms[arm] = {
            "win_rate": float(points.mean()),
            "ci95": list(wilson_interval(float(points.sum()), len(points))),
            "n": len(points),
            "ties": int((points == 0.5).sum()),
            "elo": {"mean": rating.elo, "ci95": [rating.lo, rating.hi]},
            "measures": {
                name: _mean(values)
                for name, values in measured[arm].items()
                if not bool(values.isnan().all())
            },
            "changes": {
                name: _mean(change)
                for name, values in measured[arm].items()
                if not bool((change := values - measured[BASE][name]).isnan().all())
            },  # differences of the same prompt and seed
        }
    return {
        "arms": arms,
        "base": BASE,
        "n": len(pairs),
        "interval": INTERVAL,
        "elo_regularised": ratings.regularised,
    }, judgements


def _mean(values: torch.Tensor) -> dict:
    """Return mean, bootstrap interval and count of the figures that are not NaN."""
    valid = values[~values.isnan()].double().cpu().numpy()
    # Measures that do not apply to an asset are NaN and are not counted.
    mean, lo, hi = bootstrap_mean_interval(valid)
    return {"mean": mean, "ci95": [lo, hi], "n": len(valid)}


def markdown(table: Mapping) -> str:
    """Format the table for a terminal."""
    arms = table["arms"]
    # The columns of the base, which all arms have.
    measures = list(arms[BASE]["measures"])
    rows = [
        [
            arm,
            "" if arm == BASE else with_interval(row),
            *(f"{row['measures'][name]['mean']:.3g}" for name in measures),
            with_interval(row["elo"], ".0f", "mean"),
        ]
        for arm, row in arms.items()
    ]
    lines = [
        f"{table['n']} pairs of prompt and seed, the same for all arms. Held-out evaluator:"
        f" {table['evaluator']}.",
        "",
        *markdown_rows(["arm", f"wins against {BASE}", *measures, "Elo"], rows),
    ]
    # The base has no changes against itself.
    others = {arm: row["changes"] for arm, row in arms.items() if arm != BASE}
    change_rows = [
        [arm, *(with_interval(changes[name], "+.3g", "mean") for name in measures)]
        for arm, changes in others.items()
    ]
    if measures and change_rows:
        lines += [
            "",
            f"Changes against {BASE}, by pairs:",
            "",
            *markdown_rows(["arm", *measures], change_rows),
        ]
    return "\n".join([*lines, "", f"Intervals in brackets: {table['interval']}.", ""])
