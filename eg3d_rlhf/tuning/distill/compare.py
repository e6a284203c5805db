"""Compares the arms of a run with score distillation without a reward (sds).

A held-out evaluator, which is not used in training, compares the assets of every two arms. The result is a
table with win rates against sds and their intervals, paired changes of measures, and Elo ratings.

Shapes: N pairs of (prompt, seed); every arm has one asset for each pair.
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
# Answer of the evaluator (0: first asset, 1: second asset, -1: tie) -> winner in `Judgement`.
_WINNER = {0: "a", 1: "b", -1: "tie"}
# Answer of the evaluator -> points of the first asset.
_POINTS = {0: 1.0, 1: 0.0, -1: 0.5}


class FinalEvaluator(Protocol):
    """Interface of a held-out evaluator, which compares the finished assets of two arms.

    Neither training nor a reward uses this evaluator or its measurements.
    """

    def compare(self, first: Asset, second: Asset, prompts: Sequence[str]) -> list[int]:
        """Compare N assets of one arm with N assets of another arm.

        Args:
            first: N assets of the first arm.
            second: N assets of the second arm.
            prompts: N prompts.
        Returns: list of N answers. An answer is 0 if the asset of the first arm is better, 1 if the asset of
        the second arm is better, and -1 for a tie.
        """


def compare(
    assets_by_arm: Mapping[str, Asset],
    pairs: Sequence[tuple[str, int]],
    evaluator: FinalEvaluator,
    measured_by_arm: Mapping[str, Mapping[str, torch.Tensor]],
) -> tuple[dict, list[Judgement]]:
    """Compare all arms with each other.

    Args:
        assets_by_arm: name of an arm -> N assets, in the order of `pairs`. It contains the arm sds.
        pairs: (prompt, seed) of each of the N assets.
        evaluator: held-out evaluator.
        measured_by_arm: name of an arm -> name of a measure -> values [N], which are reported in addition. A
            value is NaN if the measure does not apply to the asset. A measure that applies to no asset is
            left out.
    Returns: two results. The first is the table as values for JSON; its key "arms" has a dictionary for each
    arm. The second is a list with the judgements of all comparisons.
    """
    assert BASE in assets_by_arm and {len(arm_assets) for arm_assets in assets_by_arm.values()} == {
        len(pairs)
    }
    prompts = [prompt for prompt, _ in pairs]
    # The bootstrap of the Elo ratings resamples these names, so that all judgements of a pair stay together.
    pair_names = [f"{prompt} #{seed}" for prompt, seed in pairs]
    # Every two arms are compared, because the Elo ratings use the judgements of all arms.
    answers_by_arms = {
        (arm_a, arm_b): evaluator.compare(assets_by_arm[arm_a], assets_by_arm[arm_b], prompts)
        for arm_a, arm_b in combinations(assets_by_arm, 2)
    }
    judgements = []
    for (first_arm, second_arm), arm_answers in answers_by_arms.items():
        for answer, pair_name in zip(arm_answers, pair_names, strict=True):
            judgements.append(Judgement(first_arm, second_arm, _WINNER[answer], pair_name))
    ratings = elo(judgements)
    row_by_arm = {}
    for arm in assets_by_arm:
        if (BASE, arm) in answers_by_arms:
            # Here the base is the first arm, to which the points of `_POINTS` refer.
            arm_points = 1 - np.array([_POINTS[answer] for answer in answers_by_arms[BASE, arm]])
        else:
            # The base has no answers against itself, which count as ties.
            arm_points = np.array(
                [_POINTS[answer] for answer in answers_by_arms.get((arm, BASE), [-1] * len(pairs))]
            )
        rating = ratings.ratings[arm]
        # Differences from the base for the same prompt and seed.
        changes_by_measure = {
            measure_name: measure_values - measured_by_arm[BASE][measure_name]
            for measure_name, measure_values in measured_by_arm[arm].items()
        }
        # All entries are Python numbers, because the table is written as JSON.
        row_by_arm[arm] = {
            "win_rate": float(arm_points.mean()),
            "ci95": list(wilson_interval(float(arm_points.sum()), len(arm_points))),
            "n": len(arm_points),
            "ties": int((arm_points == 0.5).sum()),
            "elo": {"mean": rating.elo, "ci95": [rating.lo, rating.hi]},
            "measures": {
                measure_name: _mean(measure_values)
                for measure_name, measure_values in measured_by_arm[arm].items()
                if not bool(measure_values.isnan().all())
            },
            "changes": {
                measure_name: _mean(measure_values)
                for measure_name, measure_values in changes_by_measure.items()
                if not bool(measure_values.isnan().all())
            },
        }
    return {
        "arms": row_by_arm,
        "base": BASE,
        "n": len(pairs),
        "interval": INTERVAL,
        "elo_regularised": ratings.regularised,
    }, judgements


def _mean(measure_values: torch.Tensor) -> dict:
    """Return the mean of the values [N] that are not NaN, its bootstrap interval, and their number."""
    # A value is NaN if the measure does not apply to the asset.
    valid_values = measure_values[~measure_values.isnan()].double().cpu().numpy()
    mean, low, high = bootstrap_mean_interval(valid_values)
    return {"mean": mean, "ci95": [low, high], "n": len(valid_values)}


def markdown(table: Mapping) -> str:
    """Return the table of `compare` as Markdown text, for a terminal."""
    row_by_arm = table["arms"]
    measure_names = list(row_by_arm[BASE]["measures"])  # all arms have the same measures
    table_rows = [
        [
            arm,
            "" if arm == BASE else with_interval(arm_row),
            *(f"{arm_row['measures'][measure_name]['mean']:.3g}" for measure_name in measure_names),
            with_interval(arm_row["elo"], ".0f", "mean"),
        ]
        for arm, arm_row in row_by_arm.items()
    ]
    table_lines = [
        f"{table['n']} pairs of prompt and seed, the same for all arms. Held-out evaluator:"
        f" {table['evaluator']}.",
        "",
        *markdown_rows(["arm", f"wins against {BASE}", *measure_names, "Elo"], table_rows),
    ]
    change_rows = []
    for arm, arm_row in row_by_arm.items():
        if arm != BASE:
            change_cells = (
                with_interval(arm_row["changes"][measure_name], "+.3g", "mean")
                for measure_name in measure_names
            )
            change_rows.append([arm, *change_cells])
    if measure_names and change_rows:
        table_lines += [
            "",
            f"Mean differences from {BASE}, paired by prompt and seed:",
            "",
            *markdown_rows(["arm", *measure_names], change_rows),
        ]
    return "\n".join([*table_lines, "", f"Intervals in brackets: {table['interval']}.", ""])
