"""Summaries of runs that differ in their training seed alone, side by side: each figure by seed, its mean, its spread, and its intervals.

An interval by seed is one over latents, as the run's own summary holds it; the interval over seeds is Student's t of the figures.
"""

from collections.abc import Mapping

import numpy as np

from eg3d_rlhf.core.statistics import t_mean_interval

FIGURES = {  # of a run's summary, with its interval there where it has one, and the words and form of the table
    "tuned_delta_mean": (None, "mean change of the reward", "+.3f"), "reward_delta_positive": (None, "positive reward deltas", ".0f"),
    "win_rate": ("win_rate_ci95", "judge prefers the tuned shape", ".1%"), "utility_before": (None, "utility before", ".3f"),
    "utility_after": (None, "utility after", ".3f"), "utility_true": (None, "utility of true heads", ".3f"),
    "gap_closed": ("gap_closed_ci95", "way to the true heads", ".1%"), "relief_share_before": (None, "relief of a face before", ".0%"),
    "relief_share": (None, "relief of a face after", ".0%"), "frechet_ratio": (None, "image Fréchet, after / before", ".3f"),
    "images": (None, "images", ".0f"), "seconds": (None, "seconds", ".0f"),
}  # fmt: skip


def spread(values: Mapping[str, float]) -> dict:
    """A figure by seed with its mean, sample deviation and 95 % interval over seeds."""
    known = np.array(list(values.values()), dtype=np.float64)
    interval = t_mean_interval(known) if len(known) > 1 else None
    return {"by_seed": dict(values), "mean": float(known.mean()), "std": float(known.std(ddof=1)) if interval else 0.0,
            "ci95_over_seeds": [interval.lo, interval.hi] if interval else None}


def over_seeds(records: Mapping[str, dict]) -> dict:
    """What `make seeds` writes: every figure that all summaries hold, and a row of `geometry` for each measure that all hold."""
    found: dict = {"seeds": [int(seed) for seed in records]}
    for name, (interval, _, _) in FIGURES.items():
        if all(record.get(name) is not None for record in records.values()):
            found[name] = spread({seed: float(record[name]) for seed, record in records.items()})
            if interval is not None:
                found[name]["ci95_by_seed"] = {seed: record[interval] for seed, record in records.items()}
    if all("frechet_verdict" in record for record in records.values()):
        found["frechet_ratio"]["verdicts"] = {seed: record["frechet_verdict"] for seed, record in records.items()}
    rows = {seed: {row["name"]: row for row in record["geometry"]} for seed, record in records.items()}
    shared = [name for name in next(iter(rows.values())) if all(name in own for own in rows.values())]
    found["geometry"] = [measure(name, {seed: own[name] for seed, own in rows.items()}) for name in shared]
    found["over_optimisation"] = {seed: len(record["over_optimisation"]) for seed, record in records.items()}
    return found


def measure(name: str, rows: Mapping[str, dict]) -> dict:
    """One measure of geometry: before, after and paired change by seed, the verdict of each."""
    change = spread({seed: row["paired"]["mean"] for seed, row in rows.items()})
    change["ci95_by_seed"] = {seed: [row["paired"]["mean_lo"], row["paired"]["mean_hi"]] for seed, row in rows.items()}
    return {"name": name, "higher_is_better": next(iter(rows.values()))["higher_is_better"],
            "before": spread({seed: row["before"] for seed, row in rows.items()}),
            "after": spread({seed: row["after"] for seed, row in rows.items()}), "change": change,
            "verdicts": {seed: row["verdict"] for seed, row in rows.items()}}


def table(found: dict) -> list[list[str]]:
    """Rows of cells: a figure's words, its value by seed, mean ± deviation over seeds."""
    names = [str(seed) for seed in found["seeds"]]
    rows = [["what", *(f"seed {name}" for name in names), "mean ± sd"]]
    for name, (_, words, form) in FIGURES.items():
        if name in found:
            one = found[name]
            verdicts = one.get("verdicts", {})
            cells = [f"{one['by_seed'][seed]:{form}} {verdicts.get(seed, '')}".strip() for seed in names]
            rows.append([words, *cells, f"{one['mean']:{form}} ± {one['std']:{form.lstrip('+')}}"])
    for row in found["geometry"]:
        change = row["change"]
        words = f"{row['name']}, change" + (" (higher is better)" if row["higher_is_better"] else "")
        cells = [f"{change['by_seed'][seed]:+.3g} {row['verdicts'][seed]}" for seed in names]
        rows.append([words, *cells, f"{change['mean']:+.3g} ± {change['std']:.2g}"])
    alarms = found["over_optimisation"]
    return [*rows, ["alarms of the watch", *(str(alarms[seed]) for seed in names), ""]]
