"""The analysis that the design prescribes: from judgements to win rates, tests, annotators and exclusions, as
JSON types.

What is known about a win rate follows from scores alone; the same code serves one study and a thousand
simulated ones. A score is 1 where b was preferred, 0 where a was, 0.5 for a tie that counts half, NaN for a
trial that does not count.

Letters: S studies, N trials, A annotators, L latents, R resamples.
"""

import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

import numpy as np
from scipy.special import ndtri
from scipy.stats import t as student

from eg3d_rlhf.core.statistics import Interval, binomial_test, wilson_ends, wilson_interval
from eg3d_rlhf.people.label.entities import Choice, JudgementRow, Kind, Mode
from eg3d_rlhf.people.label.quality import agreement, side_free
from eg3d_rlhf.people.study.design import StudyDesign, stopped

_CELLS = 2_000_000  # resampled values held at once
_LEAST = 0.05  # of the variance of independent trials: no design is so lucky


@dataclass
class Sorted:
    """The study's rows, taken apart by the design's rules."""

    trials: list[JudgementRow]  # the planned number at most, in order of receipt
    late: int  # answers to pairs beyond that number
    gold: list[JudgementRow]
    annotators: dict[str, str] = field(default_factory=dict)  # left out: name -> reason
    fast: list[JudgementRow] = field(default_factory=list)  # single trials left out of annotators who stay


def analyse(
    design: StudyDesign, rows: Iterable[JudgementRow], interim: bool = False, now: datetime | None = None
) -> dict:
    """All figures of a study."""
    rows = [r for r in rows if not r.undone]
    _check(design, rows)
    parts = sort_rows(design, rows)
    answered = len(parts.trials)
    over = stopped(design, answered, now)
    if not over and not interim:
        until = f", or until {design.until}" if design.until else ""
        wrong = f"expected {design.trials} answered trials{until}, got {answered}"
        raise ValueError(
            f"study {design.name}: {wrong}. Wait for them, as designed, or mark the report with --interim."
        )
    fast = {r.id for r in parts.fast}
    # of the primary result, skips among them
    kept = [r for r in parts.trials if r.annotator not in parts.annotators and r.id not in fast]
    other = "excluded" if design.ties == "half" else "half"
    sides = _sides(kept, design.ties)
    both = (sides["win_rate_b_left"], sides["win_rate_b_right"])
    return {
        "design": design.to_dict(),
        "interim": not over,
        "answered": answered,
        "late": parts.late,
        "reported": (now or datetime.now(UTC)).isoformat(timespec="seconds"),
        "result": estimate(kept, design.ties, design.confidence, design.resamples),
        "sensitivity": {
            "without exclusions": estimate(parts.trials, design.ties, design.confidence),
            f"ties {other}": estimate(kept, other, design.confidence),
            "sides weighted equally": {"n": len(kept), "win_rate": None if None in both else sum(both) / 2},
        },
        "sides": sides,
        "annotators": _annotators(design, parts),
        "exclusions": _exclusions(parts),
        "agreement": agreement(kept),
        "pairs": _pairs(kept, design.ties),
    }


def sort_rows(design: StudyDesign, rows: Sequence[JudgementRow]) -> Sorted:
    """Trials, gold checks and exclusions, by the design's rules."""
    answers = sorted((r for r in rows if r.kind == Kind.PAIR), key=lambda r: r.id)
    end = datetime.fromisoformat(design.until).timestamp() if design.until else np.inf
    trials = [r for r in answers if r.received_at <= end][: design.trials]
    gold = [r for r in rows if r.kind == Kind.GOLD and r.choice != Choice.SKIP]
    parts = Sorted(trials=trials, late=len(answers) - len(trials), gold=gold)
    rules = design.exclusions
    for name in sorted({r.annotator for r in trials}):
        mine = [r for r in trials if r.annotator == name]
        right = [r.choice == r.expected for r in gold if r.annotator == name]
        fast = [r for r in mine if is_fast(r, rules.fast_milliseconds)]
        if len(right) >= rules.gold_least and sum(right) < rules.gold_accuracy * len(right):
            parts.annotators[name] = (
                f"gold checks: {sum(right)} of {len(right)} right, below {rules.gold_accuracy:.0%}"
            )
        elif len(fast) > rules.fast_share * len(mine):
            parts.annotators[name] = (
                f"too fast: {len(fast)} of {len(mine)} trials under {rules.fast_milliseconds} ms"
            )
        elif len(mine) < rules.least_share * min(design.share, len(trials) / design.annotators):
            parts.annotators[name] = f"incomplete: {len(mine)} of {design.share} trials"
        else:
            parts.fast += fast
    return parts


def is_fast(row: JudgementRow, milliseconds: int) -> bool:
    """Whether a trial was answered too soon to have been looked at; skipping may be quick."""
    return row.choice != Choice.SKIP and row.milliseconds < milliseconds


def score(row: JudgementRow, ties: str) -> float:
    """1 where b (the pair's second shape) was preferred, 0 where a was; ties by the rule; NaN where the trial
    does not count.
    """
    return {"first": 0.0, "second": 1.0, "tie": 0.5 if ties == "half" else np.nan, "skip": np.nan}[
        side_free(row)
    ]


def _ties(rows: Sequence[JudgementRow]) -> int:
    return sum(row.choice.equal for row in rows)


def estimate(rows: Sequence[JudgementRow], ties: str, confidence: float = 0.95, resamples: int = 0) -> dict:
    """Win rate with every interval and test that the design names; figures are None without a trial that
    counts.
    """
    scores = np.array([score(r, ties) for r in rows])  # [N]
    choices = Counter(r.choice for r in rows)
    decided = [s for s, r in zip(scores, rows, strict=True) if r.choice in (Choice.LEFT, Choice.RIGHT)]
    wins = int(sum(decided))
    out: dict = {
        "n": int(np.sum(~np.isnan(scores))),
        "b_wins": wins,
        "a_wins": len(decided) - wins,
        "ties": _ties(rows),
        "skips": choices[Choice.SKIP],
        "annotators": len({r.annotator for r in rows}),
        "latents": len({r.pair for r in rows}),
        "confidence": confidence,
        "p_exact": binomial_test(wins, len(decided)) if decided else None,
    }
    if not out["n"]:
        return {
            **out,
            **dict.fromkeys(
                ("win_rate", "interval", "wilson", "p_clustered", "design_effect", "degrees_of_freedom")
            ),
        }
    annotator, latent = (
        np.unique([getattr(r, name) for r in rows], return_inverse=True)[1] for name in ("annotator", "pair")
    )
    rates = win_rate(scores, annotator, latent, confidence)
    out |= {
        "win_rate": float(rates.rate[0]),
        "interval": [float(end[0]) for end in rates.clustered],
        "wilson": [float(end[0]) for end in rates.wilson],
        "p_clustered": float(rates.p_clustered[0]),
        "design_effect": float(rates.design_effect[0]),
        "degrees_of_freedom": int(rates.degrees[0]),
    }
    if resamples:
        kinds = ("annotators", "latents", "both")
        drawn = {
            over: cluster_bootstrap(scores, annotator, latent, over, confidence, resamples) for over in kinds
        }
        out["bootstrap"] = {over: None if bounds is None else list(bounds) for over, bounds in drawn.items()}
    return out


def _check(design: StudyDesign, rows: Sequence[JudgementRow]) -> None:
    foreign = {r.campaign for r in rows if r.campaign != design.name or r.mode != Mode.STUDY}
    if foreign:
        names = ", ".join(sorted(foreign))
        raise ValueError(
            f"study {design.name}: expected its own answers, got some of {names}. Name the right database."
        )
    expected = (design.a.generator, design.b.generator)
    for row in rows:
        first, second = (row.left, row.right) if row.first_is_left else (row.right, row.left)
        if row.kind == Kind.PAIR and (first.generator, second.generator, first.seed) != (
            *expected,
            second.seed,
        ):
            wrong = f"expected pairs of its two generators and one latent, got others in answer {row.id}"
            raise ValueError(f"study {design.name}: {wrong}. Name the right database.")
    begun = datetime.fromisoformat(design.created).timestamp()
    if rows and min(r.received_at for r in rows) < begun:
        wrong = f"expected a design older than the first answer, got one of {design.created}"
        raise ValueError(
            f"study {design.name}: {wrong}. A study cannot be designed over answers that exist; start a new"
            " one."
        )


def _sides(rows: Sequence[JudgementRow], ties: str) -> dict:
    out: dict = {"b_left": sum(not r.first_is_left for r in rows), "n": len(rows)}
    out["p_random"] = binomial_test(out["b_left"], out["n"])
    for name, b_left in (("win_rate_b_left", True), ("win_rate_b_right", False)):
        scores = np.array([score(r, ties) for r in rows if r.first_is_left != b_left])
        out[name] = float(np.nanmean(scores)) if np.sum(~np.isnan(scores)) else None
    decided = [r for r in rows if r.choice in (Choice.LEFT, Choice.RIGHT)]
    left = sum(r.choice == Choice.LEFT for r in decided)
    return {
        **out,
        "left_share": left / len(decided) if decided else None,
        "left_ci": list(wilson_interval(left, len(decided))),
    }


def _annotators(design: StudyDesign, parts: Sorted) -> list[dict]:
    table = []
    for name in sorted({r.annotator for r in parts.trials}):
        mine = [r for r in parts.trials if r.annotator == name]
        gold = [r.choice == r.expected for r in parts.gold if r.annotator == name]
        scores = np.array([score(r, design.ties) for r in mine])
        n = int(np.sum(~np.isnan(scores)))
        sides = _sides(mine, design.ties)
        choices = Counter(r.choice for r in mine)
        table.append(
            {
                "name": name,
                "trials": len(mine),
                "ties": _ties(mine),
                "skips": choices[Choice.SKIP],
                "n": n,
                "win_rate": float(np.nanmean(scores)) if n else None,
                "wilson": list(wilson_interval(float(np.nansum(scores)), n)),
                "left_share": sides["left_share"],
                "left_ci": sides["left_ci"],
                "gold_right": sum(gold),
                "gold_n": len(gold),
                "median_seconds": statistics.median(r.milliseconds for r in mine) / 1000,
                "fast": sum(is_fast(r, design.exclusions.fast_milliseconds) for r in mine),
                "excluded": parts.annotators.get(name),
            }
        )
    return table


def _exclusions(parts: Sorted) -> list[dict]:
    trials = Counter(r.annotator for r in parts.trials)
    out = [
        {"what": f"annotator {name}", "reason": reason, "trials": trials[name]}
        for name, reason in sorted(parts.annotators.items())
    ]
    fast = Counter(r.annotator for r in parts.fast)
    out += [
        {"what": f"single trials of {name}", "reason": "answered too fast", "trials": n}
        for name, n in sorted(fast.items())
    ]
    if parts.late:
        out.append(
            {
                "what": "answers after the planned number or time",
                "reason": "the study was over",
                "trials": parts.late,
            }
        )
    return out


def _pairs(rows: Sequence[JudgementRow], ties: str) -> list[dict]:
    scores: dict[int, list[float]] = defaultdict(list)
    for row in rows:
        value = score(row, ties)
        if not np.isnan(value):
            scores[row.left.seed].append(value)
    out = [
        {"seed": seed, "win_rate": sum(values) / len(values), "n": len(values)}
        for seed, values in scores.items()
    ]
    return sorted(out, key=lambda p: (-p["win_rate"], -p["n"] if p["win_rate"] > 0.5 else p["n"], p["seed"]))


@dataclass(frozen=True, kw_only=True)
class WinRate:
    """Win rates of S studies; arrays [S]."""

    n: np.ndarray  # trials that count
    rate: np.ndarray  # mean score
    wilson: tuple[np.ndarray, np.ndarray]  # ends, as if all trials were independent
    clustered: tuple[np.ndarray, np.ndarray]  # ends; allows for annotators and latents; the interval to quote
    # two-sided, against 0.5; below 1 - confidence just where `clustered` leaves 0.5 out
    p_clustered: np.ndarray
    design_effect: np.ndarray  # variance over that of independent trials
    degrees: np.ndarray  # of freedom of the t quantile


def win_rate(
    scores: np.ndarray, annotator: np.ndarray, latent: np.ndarray, confidence: float = 0.95
) -> WinRate:
    """Win rate with an interval that allows for trials sharing annotators and latents.

    Two-way clustered variance (Cameron, Gelbach and Miller 2011): V = V_annotators + V_latents - V_trials,
    each times G / (G - 1). The interval is Wilson's with effective size rate (1 - rate) / V and the t
    quantile with min(A, L) - 1 degrees of freedom: the variance is known no better than from so many
    clusters. With one annotator V_annotators is left out: it then speaks of that annotator alone.
    """

    scores = np.atleast_2d(np.asarray(scores, dtype=np.float64))
    counted = ~np.isnan(scores)
    n = counted.sum(axis=1).astype(np.float64)
    if (n == 0).any():
        raise ValueError(
            "win_rate: expected at least one trial that counts, got none. Collect answers first."
        )
    rate = np.where(counted, scores, 0).sum(axis=1) / n
    residual = np.where(counted, scores - rate[:, None], 0)  # [S, N]
    variance = {}
    clusters = {}
    for name, groups in (("annotator", annotator), ("latent", latent), ("trial", None)):
        variance[name], clusters[name] = _cluster_variance(residual, counted, n, groups)
    independent = variance["trial"]
    several = clusters["annotator"] > 1
    total = np.where(several, variance["annotator"], independent) + variance["latent"] - independent
    total = np.maximum(total, _LEAST * independent)  # V can be 0 or below by chance
    degrees = np.maximum(1, np.minimum(np.where(several, clusters["annotator"], n), clusters["latent"]) - 1)
    spread = rate * (1 - rate)
    effective = np.where(total > 0, spread / np.where(total > 0, total, 1), n)
    statistic = np.abs(rate - 0.5) / np.sqrt(0.25 / np.where(effective > 0, effective, n))
    effective = np.where(effective > 0, effective, n)
    return WinRate(
        n=n,
        rate=rate,
        wilson=wilson_ends(rate, n, ndtri(0.5 + confidence / 2)),
        clustered=wilson_ends(rate, effective, student.ppf(0.5 + confidence / 2, degrees)),
        p_clustered=2 * student.sf(statistic, degrees),
        degrees=degrees,
        design_effect=np.where(independent > 0, total / np.where(independent > 0, independent, 1), 1.0),
    )


def _cluster_variance(
    residual: np.ndarray, counted: np.ndarray, n: np.ndarray, groups: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Variance of the mean from sums of residuals over clusters,
    and how many clusters have trials; [S] each.
    """
    if groups is None:
        sums = residual
        present = n
    else:
        member = np.zeros((len(groups), int(np.max(groups)) + 1))  # [N, G]
        member[np.arange(len(groups)), groups] = 1
        sums = residual @ member
        present = ((counted @ member) > 0).sum(axis=1).astype(np.float64)
    correction = present / np.maximum(present - 1, 1)
    return (sums**2).sum(axis=1) / n**2 * correction, present


def cluster_bootstrap(
    scores: np.ndarray,
    annotator: np.ndarray,
    latent: np.ndarray,
    over: str,
    confidence: float = 0.95,
    resamples: int = 4000,
    seed: int = 0,
) -> "Interval | None":
    """Percentile bootstrap of one study's win rate over whole clusters; None where there is one cluster only.

    `over`: 'annotators', 'latents', or 'both' (Owen's pigeonhole bootstrap, 2007: both resampled, trials
    weighted by the product; wider than needed where trials differ more than clusters do). Args: scores [N]
    and the rest as in `win_rate`.
    """
    scores = np.asarray(scores, dtype=np.float64)
    keep = ~np.isnan(scores)
    sides = {"annotators": [annotator], "latents": [latent], "both": [annotator, latent]}[over]
    groups = [np.unique(side[keep], return_inverse=True)[1] for side in sides]
    counts = [int(g.max()) + 1 for g in groups]
    if min(counts) < 2:
        return None
    rng = np.random.default_rng(seed)
    rates = []
    values = scores[keep]
    chunk = max(1, _CELLS // len(values))
    for start in range(0, resamples, chunk):
        size = min(chunk, resamples - start)
        weights = np.ones((size, len(values)))  # [R, N]
        for group, count in zip(groups, counts, strict=True):
            weights *= rng.multinomial(count, np.full(count, 1 / count), size=size)[:, group]
        total = weights.sum(axis=1)
        rates.append((weights @ values)[total > 0] / total[total > 0])  # with both, no trial may be left
    lo, hi = np.quantile(np.concatenate(rates), [0.5 - confidence / 2, 0.5 + confidence / 2])
    return Interval(float(lo), float(hi))
