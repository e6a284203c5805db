"""Performs the analysis that the design prescribes: from judgements to win rates, tests, figures of
annotators and exclusions, as JSON values.

Win rates are computed from scores alone, by the same code for one study and for a thousand simulated ones. A
score is 1 if b was preferred, 0 if a was, 0.5 for a tie that counts half, and NaN for a trial that does not
count.

Letters: S studies, N trials, A annotators, L latents, G clusters, R resamples.
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

_CELLS = 2_000_000  # largest number of resampled values in memory
_LEAST = 0.05  # lower bound of the clustered variance, relative to that of independent trials


@dataclass
class SortedRows:
    """Rows of a study, sorted by the rules of the design into trials, gold checks and exclusions."""

    trials: list[JudgementRow]  # in order of receipt, at most the planned number
    late: int  # number of answers to pairs after the planned number or time
    gold: list[JudgementRow]  # answered gold checks, without skips
    annotators: dict[str, str] = field(default_factory=dict)  # annotators who are left out: name -> reason
    # fast trials of the other annotators, which are left out one by one
    fast: list[JudgementRow] = field(default_factory=list)


def analyse(
    design: StudyDesign, rows: Iterable[JudgementRow], interim: bool = False, now: datetime | None = None
) -> dict:
    """Compute all figures of a study.

    Args:
        design: of the study.
        rows: its judgements.
        interim: allow a report before the stopping rule is met.
        now: time of the report.

    Raises: ValueError before the stopping rule is met, and for judgements of another study.
    """
    # Answers that were taken back never count.
    rows = [r for r in rows if not r.undone]
    _check(design, rows)
    parts = sort_rows(design, rows)
    answered = len(parts.trials)
    complete = stopped(design, answered, now)
    if not complete and not interim:
        until = f", or until {design.until}" if design.until else ""
        raise ValueError(
            f"study {design.name}: the design requires {design.trials} answered trials{until}, and there are"
            f" {answered}. Wait for them, or mark the report with --interim."
        )
    fast = {r.id for r in parts.fast}
    # Trials of the primary result. Skips are among them: they use up a trial and have no score.
    primary = [r for r in parts.trials if r.annotator not in parts.annotators and r.id not in fast]
    # The sensitivity analysis repeats the estimate with the other rule for ties.
    other = "excluded" if design.ties == "half" else "half"
    sides = _sides(primary, design.ties)
    both = (sides["win_rate_b_left"], sides["win_rate_b_right"])
    return {
        "design": design.to_dict(),
        "interim": not complete,
        "answered": answered,
        "late": parts.late,
        "reported": (now or datetime.now(UTC)).isoformat(timespec="seconds"),
        "result": estimate(primary, design.ties, design.confidence, design.resamples),
        "sensitivity": {
            "without exclusions": estimate(parts.trials, design.ties, design.confidence),
            f"ties {other}": estimate(primary, other, design.confidence),
            "sides weighted equally": {
                "n": len(primary),
                "win_rate": None if None in both else sum(both) / 2,
            },
        },
        "sides": sides,
        "annotators": _annotators(design, parts),
        "exclusions": _exclusions(parts),
        "agreement": agreement(primary),
        "pairs": _pairs(primary, design.ties),
    }


def sort_rows(design: StudyDesign, rows: Sequence[JudgementRow]) -> SortedRows:
    """Sort rows into trials, gold checks and exclusions, by the rules of the design."""
    answers = sorted((r for r in rows if r.kind == Kind.PAIR), key=lambda r: r.id)
    end = datetime.fromisoformat(design.until).timestamp() if design.until else np.inf
    # Late answers are counted, but they are no trials: the number of trials was fixed in advance.
    trials = [r for r in answers if r.received_at <= end][: design.trials]
    gold = [r for r in rows if r.kind == Kind.GOLD and r.choice != Choice.SKIP]
    parts = SortedRows(trials=trials, late=len(answers) - len(trials), gold=gold)
    rules = design.exclusions
    for name in sorted({r.annotator for r in trials}):
        own_trials = [r for r in trials if r.annotator == name]
        correct = [r.choice == r.expected for r in gold if r.annotator == name]
        fast = [r for r in own_trials if is_fast(r, rules.fast_milliseconds)]
        if len(correct) >= rules.gold_least and sum(correct) < rules.gold_accuracy * len(correct):
            parts.annotators[name] = (
                f"gold checks: {sum(correct)} of {len(correct)} correct, below {rules.gold_accuracy:.0%}"
            )
        elif len(fast) > rules.fast_share * len(own_trials):
            parts.annotators[name] = (
                f"too fast: {len(fast)} of {len(own_trials)} trials took less than {rules.fast_milliseconds}"
                " ms"
            )
        # In an interim report, annotators cannot have answered a complete share yet.
        elif len(own_trials) < rules.least_share * min(design.share, len(trials) / design.annotators):
            parts.annotators[name] = f"incomplete: {len(own_trials)} of {design.share} trials"
        else:
            parts.fast += fast
    return parts


def is_fast(row: JudgementRow, milliseconds: int) -> bool:
    """Return True for a trial that was answered too fast for a look at both shapes. Skips may be fast."""
    return row.choice != Choice.SKIP and row.milliseconds < milliseconds


def score(row: JudgementRow, ties: str) -> float:
    """Return 1 if b (the pair's second shape) was preferred and 0 if a was; ties by the rule; NaN if the
    trial does not count.
    """
    return {"first": 0.0, "second": 1.0, "tie": 0.5 if ties == "half" else np.nan, "skip": np.nan}[
        side_free(row)
    ]


def _ties(rows: Sequence[JudgementRow]) -> int:
    """Count the rows that rank both shapes equally."""
    return sum(row.choice.equal for row in rows)


def estimate(rows: Sequence[JudgementRow], ties: str, confidence: float = 0.95, resamples: int = 0) -> dict:
    """Compute the win rate with every interval and test that the design names. They are None if no trial
    counts.

    Args:
        rows: trials.
        ties: "half" or "excluded".
        confidence: level of the intervals.
        resamples: of the bootstraps; 0: no bootstraps.
    """
    scores = np.array([score(r, ties) for r in rows])  # [N]
    choices = Counter(r.choice for r in rows)
    decided = [s for s, r in zip(scores, rows, strict=True) if r.choice in (Choice.LEFT, Choice.RIGHT)]
    wins = int(sum(decided))
    figures: dict = {
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
    if not figures["n"]:
        return {
            **figures,
            **dict.fromkeys(
                ("win_rate", "interval", "wilson", "p_clustered", "design_effect", "degrees_of_freedom")
            ),
        }
    # Names and pairs become indices 0 to A - 1 and 0 to L - 1.
    annotator, latent = (
        np.unique([getattr(r, name) for r in rows], return_inverse=True)[1] for name in ("annotator", "pair")
    )
    # One study: the arrays of `win_rate` have length 1.
    rates = win_rate(scores, annotator, latent, confidence)
    figures |= {
        "win_rate": float(rates.rate[0]),
        "interval": [float(end[0]) for end in rates.clustered],
        "wilson": [float(end[0]) for end in rates.wilson],
        "p_clustered": float(rates.p_clustered[0]),
        "design_effect": float(rates.design_effect[0]),
        "degrees_of_freedom": int(rates.degrees[0]),
    }
    if resamples:
        kinds = ("annotators", "latents", "both")
        bounds_by_kind = {
            kind: cluster_bootstrap(scores, annotator, latent, kind, confidence, resamples) for kind in kinds
        }
        figures["bootstrap"] = {
            kind: None if bounds is None else list(bounds) for kind, bounds in bounds_by_kind.items()
        }
    return figures


def _check(design: StudyDesign, rows: Sequence[JudgementRow]) -> None:
    """Raise ValueError for judgements of another study, and for a design that is newer than an answer."""
    foreign = {r.campaign for r in rows if r.campaign != design.name or r.mode != Mode.STUDY}
    if foreign:
        names = ", ".join(sorted(foreign))
        raise ValueError(
            f"study {design.name}: the database contains answers of {names}. Name the study's database with"
            " --db."
        )
    expected = (design.a.generator, design.b.generator)
    for row in rows:
        first, second = (row.left, row.right) if row.first_is_left else (row.right, row.left)
        if row.kind == Kind.PAIR and (first.generator, second.generator, first.seed) != (
            *expected,
            second.seed,
        ):
            raise ValueError(
                f"study {design.name}: answer {row.id} is not about its two generators and one latent. Name"
                " the study's database with --db."
            )
    begun = datetime.fromisoformat(design.created).timestamp()
    if rows and min(r.received_at for r in rows) < begun:
        raise ValueError(
            f"study {design.name}: the design of {design.created} is newer than the first answer, but a"
            " study must be designed before. Start a new study."
        )


def _sides(rows: Sequence[JudgementRow], ties: str) -> dict:
    """Compute figures of the sides: how often b was on the left, and how often the left side was chosen."""
    figures: dict = {"b_left": sum(not r.first_is_left for r in rows), "n": len(rows)}
    figures["p_random"] = binomial_test(figures["b_left"], figures["n"])
    for name, b_left in (("win_rate_b_left", True), ("win_rate_b_right", False)):
        # b is the second shape of a pair, so it is on the left where the first is not.
        scores = np.array([score(r, ties) for r in rows if r.first_is_left != b_left])
        figures[name] = float(np.nanmean(scores)) if np.sum(~np.isnan(scores)) else None
    decided = [r for r in rows if r.choice in (Choice.LEFT, Choice.RIGHT)]
    left = sum(r.choice == Choice.LEFT for r in decided)
    return {
        **figures,
        "left_share": left / len(decided) if decided else None,
        "left_ci": list(wilson_interval(left, len(decided))),
    }


def _annotators(design: StudyDesign, parts: SortedRows) -> list[dict]:
    """Compute the figures of each annotator with trials, excluded ones included."""
    table = []
    for name in sorted({r.annotator for r in parts.trials}):
        own_trials = [r for r in parts.trials if r.annotator == name]
        gold = [r.choice == r.expected for r in parts.gold if r.annotator == name]
        scores = np.array([score(r, design.ties) for r in own_trials])
        n = int(np.sum(~np.isnan(scores)))
        sides = _sides(own_trials, design.ties)
        choices = Counter(r.choice for r in own_trials)
        table.append(
            {
                "name": name,
                "trials": len(own_trials),
                "ties": _ties(own_trials),
                "skips": choices[Choice.SKIP],
                "n": n,
                "win_rate": float(np.nanmean(scores)) if n else None,
                "wilson": list(wilson_interval(float(np.nansum(scores)), n)),
                "left_share": sides["left_share"],
                "left_ci": sides["left_ci"],
                "gold_right": sum(gold),
                "gold_n": len(gold),
                "median_seconds": statistics.median(r.milliseconds for r in own_trials) / 1000,
                "fast": sum(is_fast(r, design.exclusions.fast_milliseconds) for r in own_trials),
                "excluded": parts.annotators.get(name),
            }
        )
    return table


def _exclusions(parts: SortedRows) -> list[dict]:
    """List what was left out, why, and how many trials that are."""
    trials = Counter(r.annotator for r in parts.trials)
    excluded = [
        {"what": f"annotator {name}", "reason": reason, "trials": trials[name]}
        for name, reason in sorted(parts.annotators.items())
    ]
    fast = Counter(r.annotator for r in parts.fast)
    excluded += [
        {"what": f"single trials of {name}", "reason": "answered too fast", "trials": n}
        for name, n in sorted(fast.items())
    ]
    if parts.late:
        excluded.append(
            {
                "what": "answers after the planned number or time",
                "reason": "the study was over",
                "trials": parts.late,
            }
        )
    return excluded


def _pairs(rows: Sequence[JudgementRow], ties: str) -> list[dict]:
    """Compute the win rate of each latent, from b's best to a's best."""
    scores: dict[int, list[float]] = defaultdict(list)
    for row in rows:
        value = score(row, ties)
        if not np.isnan(value):
            scores[row.left.seed].append(value)
    latents = [
        {"seed": seed, "win_rate": sum(values) / len(values), "n": len(values)}
        for seed, values in scores.items()
    ]
    # Among equal win rates, those with more answers come closer to the ends of the list.
    return sorted(
        latents, key=lambda p: (-p["win_rate"], -p["n"] if p["win_rate"] > 0.5 else p["n"], p["seed"])
    )


@dataclass(frozen=True, kw_only=True)
class WinRate:
    """Win rates of S studies with their intervals and tests; all arrays [S]."""

    n: np.ndarray  # number of trials that count
    rate: np.ndarray  # mean score
    wilson: tuple[np.ndarray, np.ndarray]  # ends of Wilson's interval, as if all trials were independent
    # ends of the interval to be reported; accounts for annotators and latents
    clustered: tuple[np.ndarray, np.ndarray]
    # Two-sided, against 0.5. It is below 1 - confidence exactly if `clustered` excludes 0.5.
    p_clustered: np.ndarray
    design_effect: np.ndarray  # variance divided by that of independent trials
    degrees: np.ndarray  # degrees of freedom of the t quantile


def win_rate(
    scores: np.ndarray, annotator: np.ndarray, latent: np.ndarray, confidence: float = 0.95
) -> WinRate:
    """Estimate the win rate with an interval that accounts for trials that share annotators and latents.

    Two-way clustered variance (Cameron, Gelbach and Miller 2011): V = V_annotators + V_latents - V_trials,
    each multiplied by G / (G - 1). The interval is Wilson's with effective size rate (1 - rate) / V and the t
    quantile with min(A, L) - 1 degrees of freedom, because the variance is estimated from that many clusters.
    With one annotator, V_annotators is left out, and the result is valid for that annotator only.

    Args:
        scores: [S, N] or [N], see the module's docstring.
        annotator: [N], index of the annotator of each trial.
        latent: [N], index of the latent of each trial.
        confidence: level of the intervals.

    Raises: ValueError for a study without a trial that counts.
    """
    # A single study is an array of one study.
    scores = np.atleast_2d(np.asarray(scores, dtype=np.float64))
    counted = ~np.isnan(scores)
    n = counted.sum(axis=1).astype(np.float64)
    if (n == 0).any():
        raise ValueError(
            "win_rate: expected at least one trial that counts in each study, got none. Collect answers"
            " first."
        )
    rate = np.where(counted, scores, 0).sum(axis=1) / n
    # A trial that does not count has no residual, so it contributes to no cluster.
    residual = np.where(counted, scores - rate[:, None], 0)  # [S, N]
    variance = {}
    clusters = {}
    for name, groups in (("annotator", annotator), ("latent", latent), ("trial", None)):
        variance[name], clusters[name] = _cluster_variance(residual, counted, n, groups)
    independent = variance["trial"]
    several_annotators = clusters["annotator"] > 1
    total = (
        np.where(several_annotators, variance["annotator"], independent) + variance["latent"] - independent
    )
    total = np.maximum(total, _LEAST * independent)  # the difference can be 0 or negative by chance
    degrees = np.maximum(
        1, np.minimum(np.where(several_annotators, clusters["annotator"], n), clusters["latent"]) - 1
    )
    binomial_variance = rate * (1 - rate)
    # The number of independent trials with this variance. With rate 0 or 1 all residuals are 0.
    effective = np.where(total > 0, binomial_variance / np.where(total > 0, total, 1), n)
    # The test uses the variance under the null hypothesis, 0.25 / effective, as Wilson's interval does.
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
    """Compute the variance of the mean from sums of residuals over clusters.

    Args:
        residual: [S, N]; 0 for trials that do not count.
        counted: [S, N] bool.
        n: [S], number of trials that count.
        groups: [N], index of each trial's cluster; None: each trial is a cluster.

    Returns: variance [S] and number of clusters with trials [S].
    """
    if groups is None:
        sums = residual
        present = n
    else:
        member = np.zeros((len(groups), int(np.max(groups)) + 1))  # [N, G], one-hot
        member[np.arange(len(groups)), groups] = 1
        sums = residual @ member
        present = ((counted @ member) > 0).sum(axis=1).astype(np.float64)
    # With one cluster the correction would divide by zero. Its residuals sum to 0, so the variance is 0
    # anyway.
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
    """Compute a percentile bootstrap of one study's win rate by resampling clusters; None if there is only
    one cluster.

    Args:
        scores: [N], and `annotator` and `latent` as in `win_rate`.
        over: 'annotators', 'latents', or 'both'. With 'both' annotators and latents are resampled, and trials
            are weighted by the product (pigeonhole bootstrap, Owen 2007). It is wider than necessary if
            trials differ more than clusters do.
        confidence: level of the interval.
        resamples: R.
        seed: random seed.
    """
    scores = np.asarray(scores, dtype=np.float64)
    keep = ~np.isnan(scores)
    sides = {"annotators": [annotator], "latents": [latent], "both": [annotator, latent]}[over]
    # Clusters without a trial that counts are no clusters here, so the indices are computed again.
    groups = [np.unique(side[keep], return_inverse=True)[1] for side in sides]
    counts = [int(g.max()) + 1 for g in groups]
    if min(counts) < 2:
        return None
    rng = np.random.default_rng(seed)
    rates = []
    values = scores[keep]
    # Chunks bound the memory of the weights [R, N].
    chunk = max(1, _CELLS // len(values))
    for start in range(0, resamples, chunk):
        size = min(chunk, resamples - start)
        weights = np.ones((size, len(values)))  # [R, N]
        for group, count in zip(groups, counts, strict=True):
            # Resampling `count` clusters with replacement gives each a multinomial weight, which its trials
            # share.
            weights *= rng.multinomial(count, np.full(count, 1 / count), size=size)[:, group]
        total = weights.sum(axis=1)
        # With 'both', all weights of a resample can be 0.
        rates.append((weights @ values)[total > 0] / total[total > 0])
    lo, hi = np.quantile(np.concatenate(rates), [0.5 - confidence / 2, 0.5 + confidence / 2])
    return Interval(float(lo), float(hi))
