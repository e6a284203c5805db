"""Arms of a comparison against plain score distillation: win rates by a held-out evaluator, with
intervals, paired changes, and Elo.

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

BASE = "sds"
INTERVAL = (
    "95 % Wilson interval over pairs of prompt and seed, ties count half; means: percentile bootstrap, 10,000"
    " resamples"
)
_WINNER = {0: "a", 1: "b", -1: "tie"}
_POINTS = {0: 1.0, 1: 0.0, -1: 0.5}


class FinalJudge(Protocol):
    """Compares finished assets; it trains nothing, and no reward reads what it reads."""

    def compare(self, first: Asset, second: Asset, prompts: Sequence[str]) -> list[int]:
        """0 or 1 for the better one of each pair of assets [N], -1 for a tie."""


def compare(
    assets: Mapping[str, Asset],
    pairs: Sequence[tuple[str, int]],
    judge: FinalJudge,
    measured: Mapping[str, Mapping[str, torch.Tensor]],
) -> tuple[dict, list[Judgement]]:
    """The table as JSON, and every judgement behind it.

    Args:
        assets: N of every arm, in the order of the pairs (prompt, seed). measured: by arm, by name, figures
            [N] to report beside the win rates; NaN where one does not apply, and one that applies to none is
            left out.
    """
    assert BASE in assets and {len(made) for made in assets.values()} == {len(pairs)}
    prompts = [prompt for prompt, _ in pairs]
    names = [f"{prompt} #{seed}" for prompt, seed in pairs]
    answers = {(a, b): judge.compare(assets[a], assets[b], prompts) for a, b in combinations(assets, 2)}
    judgements = [
        Judgement(a, b, _WINNER[answer], name)
        for (a, b), said in answers.items()
        for answer, name in zip(said, names, strict=True)
    ]
    rated = elo(judgements)
    arms = {}
    for arm in assets:
        if (BASE, arm) in answers:
            won = 1 - np.array([_POINTS[answer] for answer in answers[BASE, arm]])
        else:
            # sds itself ties
            won = np.array([_POINTS[answer] for answer in answers.get((arm, BASE), [-1] * len(pairs))])
        rating = rated.ratings[arm]
        arms[arm] = {
            "win_rate": float(won.mean()),
            "ci95": list(wilson_interval(float(won.sum()), len(won))),
            "n": len(won),
            "ties": int((won == 0.5).sum()),
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
            },  # paired
        }
    return {
        "arms": arms,
        "base": BASE,
        "n": len(pairs),
        "interval": INTERVAL,
        "elo_regularised": rated.regularised,
    }, judgements


def _mean(values: torch.Tensor) -> dict:
    known = values[~values.isnan()].double().cpu().numpy()
    mean, lo, hi = bootstrap_mean_interval(known)
    return {"mean": mean, "ci95": [lo, hi], "n": len(known)}


def markdown(table: Mapping) -> str:
    arms = table["arms"]
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
        f"{table['n']} pairs of prompt and seed, the same for all arms. The evaluator: {table['evaluator']}.",
        "",
        *markdown_rows(["arm", f"wins against {BASE}", *measures, "Elo"], rows),
    ]
    others = {arm: row["changes"] for arm, row in arms.items() if arm != BASE}
    changed = [
        [arm, *(with_interval(changes[name], "+.3g", "mean") for name in measures)]
        for arm, changes in others.items()
    ]
    if measures and changed:
        lines += ["", f"Changes against {BASE}, paired:", "", *markdown_rows(["arm", *measures], changed)]
    return "\n".join([*lines, "", f"Brackets: {table['interval']}.", ""])
