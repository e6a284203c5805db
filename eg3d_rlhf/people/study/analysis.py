"""Analysis of a study as its design prescribes it: win rates, tests, metrics of annotators, and exclusions.

A study compares two generators, a and b. Win rates are computed from scores, by the same code for one study
and for a thousand simulated studies. The score of a trial is 1 if b was preferred, 0 if a was preferred, 0.5
for a tie that counts half, and NaN if the trial does not count.

The intervals account for trials that share annotators and latents: the variance is clustered in two ways
(Cameron, Gelbach and Miller, "Robust Inference With Multiway Clustering", 2011), and the bootstrap over both
clusters is the pigeonhole bootstrap (Owen, "The pigeonhole bootstrap", 2007).

Shapes: S studies, N trials, A annotators, L latents, G clusters, R resamples.
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

_CELLS = 2_000_000  # largest number of resampled values that are in memory at the same time
_MIN_VARIANCE_RATIO = (
    0.05  # lower bound of the clustered variance, relative to the variance of independent trials
)


@dataclass
class SortedRows:
    """Judgements of a study, divided by the rules of the design into trials, gold checks and exclusions."""

    trials: list[JudgementRow]  # trials in order of receipt, at most the planned number
    late: int  # number of answers that arrived after the planned number of trials or after the end
    gold: list[JudgementRow]  # answered gold checks, without skips
    annotators: dict[str, str] = field(default_factory=dict)  # annotators who are left out: name -> reason
    # trials that were answered too fast, of annotators who are not left out; these trials are left out
    fast: list[JudgementRow] = field(default_factory=list)


def analyse(
    design: StudyDesign,
    judgement_rows: Iterable[JudgementRow],
    allow_interim: bool = False,
    now: datetime | None = None,
) -> dict:
    """Compute all results of a study.

    Args:
        design: design of the study.
        judgement_rows: judgements of the study.
        allow_interim: True allows an analysis before the stopping rule is met.
        now: time of the report; None: the current time.

    Returns:
        Dict in JSON types: "design", "interim" (True before the stopping rule is met), "answered" (number of
        answered trials), "late", "reported" (time), "result" (primary result, see `estimate`), "sensitivity"
        (name of another analysis -> its estimate), "sides" (see `_sides`), "annotators" (see `_annotators`),
        "exclusions" (see `_exclusions`), "agreement" (see `quality.agreement`) and "pairs" (see `_pairs`).

    Raises:
        ValueError: the stopping rule is not met and `allow_interim` is False, or a judgement belongs to
            another study.
    """
    # answers that were taken back never count
    judgement_rows = [judgement for judgement in judgement_rows if not judgement.undone]
    _check(design, judgement_rows)
    sorted_rows = sort_rows(design, judgement_rows)
    answered_count = len(sorted_rows.trials)
    is_complete = stopped(design, answered_count, now)
    if not is_complete and not allow_interim:
        end_text = f", or the time {design.until}" if design.until else ""
        raise ValueError(
            f"study {design.name}: the design requires {design.trials} answered trials{end_text}, but"
            f" {answered_count} trials are answered. Wait for the other answers, or pass --interim for an"
            " interim report."
        )
    fast_ids = {judgement.id for judgement in sorted_rows.fast}
    # Trials of the primary result. A skip is a trial without a score.
    primary_rows = [
        judgement
        for judgement in sorted_rows.trials
        if judgement.annotator not in sorted_rows.annotators and judgement.id not in fast_ids
    ]
    # The sensitivity analysis repeats the estimate with the other rule for ties.
    other_ties = "excluded" if design.ties == "half" else "half"
    side_metrics = _sides(primary_rows, design.ties)
    rates_by_side = (side_metrics["win_rate_b_left"], side_metrics["win_rate_b_right"])
    return {
        "design": design.to_dict(),
        "interim": not is_complete,
        "answered": answered_count,
        "late": sorted_rows.late,
        "reported": (now or datetime.now(UTC)).isoformat(timespec="seconds"),
        "result": estimate(primary_rows, design.ties, design.confidence, design.resamples),
        "sensitivity": {
            "without exclusions": estimate(sorted_rows.trials, design.ties, design.confidence),
            f"ties {other_ties}": estimate(primary_rows, other_ties, design.confidence),
            "sides weighted equally": {
                "n": len(primary_rows),
                "win_rate": None if None in rates_by_side else sum(rates_by_side) / 2,
            },
        },
        "sides": side_metrics,
        "annotators": _annotators(design, sorted_rows),
        "exclusions": _exclusions(sorted_rows),
        "agreement": agreement(primary_rows),
        "pairs": _pairs(primary_rows, design.ties),
    }


def sort_rows(design: StudyDesign, judgement_rows: Sequence[JudgementRow]) -> SortedRows:
    """Divide judgements into trials, gold checks and exclusions, by the rules of the design."""
    pair_rows = sorted(
        (judgement for judgement in judgement_rows if judgement.kind == Kind.PAIR),
        key=lambda judgement: judgement.id,
    )
    end_time = datetime.fromisoformat(design.until).timestamp() if design.until else np.inf
    # Answers after the planned number of trials are only counted, because this number was fixed in advance.
    trials = [judgement for judgement in pair_rows if judgement.received_at <= end_time][: design.trials]
    gold_rows = [
        judgement
        for judgement in judgement_rows
        if judgement.kind == Kind.GOLD and judgement.choice != Choice.SKIP
    ]
    sorted_rows = SortedRows(trials=trials, late=len(pair_rows) - len(trials), gold=gold_rows)
    exclusion_rules = design.exclusions
    for annotator in sorted({judgement.annotator for judgement in trials}):
        annotator_trials = [judgement for judgement in trials if judgement.annotator == annotator]
        gold_results = [
            judgement.choice == judgement.expected
            for judgement in gold_rows
            if judgement.annotator == annotator
        ]
        fast_trials = [
            judgement
            for judgement in annotator_trials
            if is_fast(judgement, exclusion_rules.fast_milliseconds)
        ]
        correct_count = sum(gold_results)
        # In an interim report no annotator may have answered the planned share, so the mean share so far is
        # used.
        expected_trial_count = min(design.trials_per_annotator, len(trials) / design.annotators)
        if len(
            gold_results
        ) >= exclusion_rules.gold_least and correct_count < exclusion_rules.gold_accuracy * len(gold_results):
            sorted_rows.annotators[annotator] = (
                f"gold checks: {correct_count} of {len(gold_results)} correct, below"
                f" {exclusion_rules.gold_accuracy:.0%}"
            )
        elif len(fast_trials) > exclusion_rules.fast_share * len(annotator_trials):
            sorted_rows.annotators[annotator] = (
                f"too fast: {len(fast_trials)} of {len(annotator_trials)} trials took less than"
                f" {exclusion_rules.fast_milliseconds} ms"
            )
        elif len(annotator_trials) < exclusion_rules.least_share * expected_trial_count:
            sorted_rows.annotators[annotator] = (
                f"incomplete: {len(annotator_trials)} of {design.trials_per_annotator} trials"
            )
        else:
            sorted_rows.fast += fast_trials
    return sorted_rows


def is_fast(judgement: JudgementRow, min_milliseconds: int) -> bool:
    """Return True if a trial was answered in less than `min_milliseconds`. A skip is never too fast."""
    return judgement.choice != Choice.SKIP and judgement.milliseconds < min_milliseconds


def score(judgement: JudgementRow, tie_rule: str) -> float:
    """Return the score of a trial.

    Args:
        judgement: judgement of a pair, whose second shape is of generator b.
        tie_rule: "half" or "excluded".

    Returns:
        1 if b was preferred, 0 if a was preferred, 0.5 for a tie that counts half, NaN if the trial does not
        count.
    """
    tie_score = 0.5 if tie_rule == "half" else np.nan
    return {"first": 0.0, "second": 1.0, "tie": tie_score, "skip": np.nan}[side_free(judgement)]


def _ties(judgement_rows: Sequence[JudgementRow]) -> int:
    """Count the judgements that rank both shapes equally."""
    return sum(judgement.choice.equal for judgement in judgement_rows)


def estimate(
    judgement_rows: Sequence[JudgementRow], tie_rule: str, confidence: float = 0.95, resample_count: int = 0
) -> dict:
    """Compute the win rate of b, with all intervals and tests that the design prescribes.

    Args:
        judgement_rows: trials.
        tie_rule: rule for ties, "half" or "excluded".
        confidence: level of the intervals.
        resample_count: number of resamples of each bootstrap; 0: no bootstraps.

    Returns:
        Dict in JSON types: numbers of trials that count ("n"), of wins, ties, skips, annotators and latents;
        the p-value "p_exact" of the binomial test without clustering; "win_rate"; "interval" (clustered) and
        "wilson" as [lower end, upper end]; "p_clustered"; "design_effect"; "degrees_of_freedom"; and
        "bootstrap" (clusters -> interval) if `resample_count` > 0. All values from "win_rate" on are None if
        no trial counts.
    """
    scores = np.array([score(judgement, tie_rule) for judgement in judgement_rows])  # [N]
    choice_counts = Counter(judgement.choice for judgement in judgement_rows)
    # scores of the trials that are no ties and no skips
    decided_scores = [
        trial_score
        for trial_score, judgement in zip(scores, judgement_rows, strict=True)
        if judgement.choice in (Choice.LEFT, Choice.RIGHT)
    ]
    b_wins = int(sum(decided_scores))
    estimates: dict = {
        "n": int(np.sum(~np.isnan(scores))),
        "b_wins": b_wins,
        "a_wins": len(decided_scores) - b_wins,
        "ties": _ties(judgement_rows),
        "skips": choice_counts[Choice.SKIP],
        "annotators": len({judgement.annotator for judgement in judgement_rows}),
        "latents": len({judgement.pair for judgement in judgement_rows}),
        "confidence": confidence,
        "p_exact": binomial_test(b_wins, len(decided_scores)) if decided_scores else None,
    }
    if not estimates["n"]:
        return {
            **estimates,
            **dict.fromkeys(
                ("win_rate", "interval", "wilson", "p_clustered", "design_effect", "degrees_of_freedom")
            ),
        }
    # Names of annotators become indices 0..A-1, and ids of pairs become 0..L-1, since each has one latent.
    annotator_indices, latent_indices = (
        np.unique([getattr(judgement, column_name) for judgement in judgement_rows], return_inverse=True)[1]
        for column_name in ("annotator", "pair")
    )
    # index 0: the arrays of `win_rate` have one element for each study, and this is one study
    win_rates = win_rate(scores, annotator_indices, latent_indices, confidence)
    estimates |= {
        "win_rate": float(win_rates.rate[0]),
        "interval": [float(interval_end[0]) for interval_end in win_rates.clustered],
        "wilson": [float(interval_end[0]) for interval_end in win_rates.wilson],
        "p_clustered": float(win_rates.p_clustered[0]),
        "design_effect": float(win_rates.design_effect[0]),
        "degrees_of_freedom": int(win_rates.degrees[0]),
    }
    if resample_count:
        cluster_kinds = ("annotators", "latents", "both")
        bounds_by_kind = {
            cluster_kind: cluster_bootstrap(
                scores, annotator_indices, latent_indices, cluster_kind, confidence, resample_count
            )
            for cluster_kind in cluster_kinds
        }
        estimates["bootstrap"] = {
            cluster_kind: None if interval_bounds is None else list(interval_bounds)
            for cluster_kind, interval_bounds in bounds_by_kind.items()
        }
    return estimates


def _check(design: StudyDesign, judgement_rows: Sequence[JudgementRow]) -> None:
    """Check that judgements belong to a study, and that its design is older than the first of them.

    Raises:
        ValueError: a judgement belongs to another study, or is older than the design.
    """
    other_campaigns = {
        judgement.campaign
        for judgement in judgement_rows
        if judgement.campaign != design.name or judgement.mode != Mode.STUDY
    }
    if other_campaigns:
        other_names = ", ".join(sorted(other_campaigns))
        raise ValueError(
            f"study {design.name}: the database contains answers of {other_names}. Pass the database of the"
            " study with --db."
        )
    for judgement in judgement_rows:
        first_shape, second_shape = (
            (judgement.left, judgement.right)
            if judgement.first_is_left
            else (judgement.right, judgement.left)
        )
        is_of_generators = (first_shape.generator, second_shape.generator) == (
            design.a.generator,
            design.b.generator,
        )
        if judgement.kind == Kind.PAIR and not (is_of_generators and first_shape.seed == second_shape.seed):
            raise ValueError(
                f"study {design.name}: the answer {judgement.id} does not compare the two generators of the"
                " study at one latent. Pass the database of the study with --db."
            )
    design_time = datetime.fromisoformat(design.created).timestamp()
    if judgement_rows and min(judgement.received_at for judgement in judgement_rows) < design_time:
        raise ValueError(
            f"study {design.name}: an answer was received before the design was made at {design.created},"
            " but a study must be designed before its first answer. Start a new study."
        )


def _sides(judgement_rows: Sequence[JudgementRow], tie_rule: str) -> dict:
    """Count the trials with b on the left, and compute how often annotators chose the left side.

    Args:
        judgement_rows: trials.
        tie_rule: rule for ties, "half" or "excluded".

    Returns:
        Dict in JSON types, in which a rate without trials is None: "b_left" (number of trials with b on the
        left), "n" (number of trials), "p_random" (p-value of random sides), "win_rate_b_left",
        "win_rate_b_right" (win rate of b on this side), and "left_share" with its interval "left_ci" (share
        of decided trials in which the left shape was preferred).
    """
    metrics: dict = {
        "b_left": sum(not judgement.first_is_left for judgement in judgement_rows),
        "n": len(judgement_rows),
    }
    # p-value of the hypothesis that the sides were random
    metrics["p_random"] = binomial_test(metrics["b_left"], metrics["n"])
    for rate_name, is_b_left in (("win_rate_b_left", True), ("win_rate_b_right", False)):
        # b is the second shape of a pair, so b is on the left if the first shape is not.
        scores = np.array(
            [
                score(judgement, tie_rule)
                for judgement in judgement_rows
                if judgement.first_is_left != is_b_left
            ]
        )
        metrics[rate_name] = float(np.nanmean(scores)) if np.sum(~np.isnan(scores)) else None
    decided_rows = [
        judgement for judgement in judgement_rows if judgement.choice in (Choice.LEFT, Choice.RIGHT)
    ]
    left_count = sum(judgement.choice == Choice.LEFT for judgement in decided_rows)
    return {
        **metrics,
        "left_share": left_count / len(decided_rows) if decided_rows else None,
        "left_ci": list(wilson_interval(left_count, len(decided_rows))),
    }


def _annotators(design: StudyDesign, sorted_rows: SortedRows) -> list[dict]:
    """Compute the metrics of every annotator who has answered trials, also of excluded annotators.

    Returns:
        One record per annotator, in JSON types. Its field "excluded" is the reason why the annotator is left
        out of the primary result, or None.
    """
    annotator_metrics = []
    for annotator in sorted({judgement.annotator for judgement in sorted_rows.trials}):
        annotator_trials = [judgement for judgement in sorted_rows.trials if judgement.annotator == annotator]
        gold_results = [
            judgement.choice == judgement.expected
            for judgement in sorted_rows.gold
            if judgement.annotator == annotator
        ]
        scores = np.array([score(judgement, design.ties) for judgement in annotator_trials])
        counted_trial_count = int(np.sum(~np.isnan(scores)))  # number of trials that count
        side_metrics = _sides(annotator_trials, design.ties)
        choice_counts = Counter(judgement.choice for judgement in annotator_trials)
        annotator_metrics.append(
            {
                "name": annotator,
                "trials": len(annotator_trials),
                "ties": _ties(annotator_trials),
                "skips": choice_counts[Choice.SKIP],
                "n": counted_trial_count,
                "win_rate": float(np.nanmean(scores)) if counted_trial_count else None,
                "wilson": list(wilson_interval(float(np.nansum(scores)), counted_trial_count)),
                "left_share": side_metrics["left_share"],
                "left_ci": side_metrics["left_ci"],
                "gold_right": sum(gold_results),
                "gold_n": len(gold_results),
                "median_seconds": statistics.median(judgement.milliseconds for judgement in annotator_trials)
                / 1000,
                "fast": sum(
                    is_fast(judgement, design.exclusions.fast_milliseconds) for judgement in annotator_trials
                ),
                "excluded": sorted_rows.annotators.get(annotator),
            }
        )
    return annotator_metrics


def _exclusions(sorted_rows: SortedRows) -> list[dict]:
    """Return a list of exclusions: "what" was left out, the "reason", and the number of "trials"."""
    trial_counts = Counter(judgement.annotator for judgement in sorted_rows.trials)
    exclusions = [
        {"what": f"annotator {annotator}", "reason": reason, "trials": trial_counts[annotator]}
        for annotator, reason in sorted(sorted_rows.annotators.items())
    ]
    fast_counts = Counter(judgement.annotator for judgement in sorted_rows.fast)
    exclusions += [
        {"what": f"single trials of {annotator}", "reason": "answered too fast", "trials": trial_count}
        for annotator, trial_count in sorted(fast_counts.items())
    ]
    if sorted_rows.late:
        exclusions.append(
            {
                "what": "answers after the planned number or time",
                "reason": "the study was over",
                "trials": sorted_rows.late,
            }
        )
    return exclusions


def _pairs(judgement_rows: Sequence[JudgementRow], tie_rule: str) -> list[dict]:
    """Compute the win rate of b for each latent.

    Returns records with seed, win_rate and n (number of trials), from the highest to the lowest win rate.
    """
    scores_by_seed: dict[int, list[float]] = defaultdict(list)
    for judgement in judgement_rows:
        trial_score = score(judgement, tie_rule)
        if not np.isnan(trial_score):
            scores_by_seed[judgement.left.seed].append(trial_score)
    latent_records = [
        {"seed": seed, "win_rate": sum(seed_scores) / len(seed_scores), "n": len(seed_scores)}
        for seed, seed_scores in scores_by_seed.items()
    ]

    # Of latents with equal win rates, the one with more trials is closer to the end of the list at which
    # b or a wins.
    def sort_key(latent_record: dict) -> tuple:
        signed_trial_count = -latent_record["n"] if latent_record["win_rate"] > 0.5 else latent_record["n"]
        return (-latent_record["win_rate"], signed_trial_count, latent_record["seed"])

    return sorted(latent_records, key=sort_key)


@dataclass(frozen=True, kw_only=True)
class WinRate:
    """Win rates of S studies, with their intervals and tests. All arrays have the shape [S]."""

    n: np.ndarray  # number of trials that count
    rate: np.ndarray  # mean score
    wilson: tuple[np.ndarray, np.ndarray]  # ends of Wilson's interval, as if all trials were independent
    # ends of the interval of the primary result, which accounts for trials that share annotators and latents
    clustered: tuple[np.ndarray, np.ndarray]
    # Two-sided p-value against 0.5. It is below 1 - confidence exactly if `clustered` excludes 0.5.
    p_clustered: np.ndarray
    design_effect: np.ndarray  # clustered variance, divided by the variance of independent trials
    degrees: np.ndarray  # degrees of freedom of the t quantile


def win_rate(
    scores: np.ndarray, annotator_indices: np.ndarray, latent_indices: np.ndarray, confidence: float = 0.95
) -> WinRate:
    """Estimate the win rate, with an interval that accounts for trials that share annotators and latents.

    The variance is clustered in two ways (Cameron, Gelbach and Miller 2011):

        V = V_annotators + V_latents - V_trials

    where each term is the variance of the mean from sums of residuals over G clusters, multiplied by G / (G -
    1). The interval is Wilson's interval with the number of trials replaced by rate (1 - rate) / V, and with
    the t quantile of min(A, L) - 1 degrees of freedom, because the variance is estimated from so few
    clusters. With a single annotator, V_annotators is replaced by V_trials, and the result is valid for this
    annotator only.

    Args:
        scores: scores of the trials, [S, N] or [N], see the docstring of this module.
        annotator_indices: index of the annotator of each trial, [N].
        latent_indices: index of the latent of each trial, [N].
        confidence: level of the intervals.

    Raises:
        ValueError: in a study no trial counts.
    """
    # a single study [N] becomes [1, N]
    scores = np.atleast_2d(np.asarray(scores, dtype=np.float64))
    is_counted = ~np.isnan(scores)
    trial_counts = is_counted.sum(axis=1).astype(np.float64)
    if (trial_counts == 0).any():
        raise ValueError(
            "win_rate: at least one trial of each study must count, but a study has no such trial. Collect"
            " answers first."
        )
    rates = np.where(is_counted, scores, 0).sum(axis=1) / trial_counts
    # The residual of a trial that does not count is 0, so that it does not change the sum of its cluster.
    residuals = np.where(is_counted, scores - rates[:, None], 0)  # [S, N]
    variances = {}
    cluster_counts = {}
    for cluster_name, cluster_indices in (
        ("annotator", annotator_indices),
        ("latent", latent_indices),
        ("trial", None),
    ):
        variances[cluster_name], cluster_counts[cluster_name] = _cluster_variance(
            residuals, is_counted, trial_counts, cluster_indices
        )
    independent_variance = variances["trial"]  # variance as if all trials were independent, [S]
    has_several_annotators = cluster_counts["annotator"] > 1
    clustered_variance = (
        np.where(has_several_annotators, variances["annotator"], independent_variance)
        + variances["latent"]
        - independent_variance
    )
    # The difference can be 0 or negative by chance, so the variance has a lower bound.
    clustered_variance = np.maximum(clustered_variance, _MIN_VARIANCE_RATIO * independent_variance)
    degrees_of_freedom = np.maximum(
        1,
        np.minimum(
            np.where(has_several_annotators, cluster_counts["annotator"], trial_counts),
            cluster_counts["latent"],
        )
        - 1,
    )
    binomial_variance = rates * (1 - rates)
    # Number of independent trials that would have this variance. With a rate of 0 or 1 all residuals, and so
    # the variance, are 0; n is used then. The inner np.where avoids a division by zero.
    effective_counts = np.where(
        clustered_variance > 0,
        binomial_variance / np.where(clustered_variance > 0, clustered_variance, 1),
        trial_counts,
    )
    # The test uses the variance 0.25 / effective under the null hypothesis of 0.5, like Wilson's interval.
    t_statistic = np.abs(rates - 0.5) / np.sqrt(
        0.25 / np.where(effective_counts > 0, effective_counts, trial_counts)
    )
    effective_counts = np.where(effective_counts > 0, effective_counts, trial_counts)
    return WinRate(
        n=trial_counts,
        rate=rates,
        wilson=wilson_ends(rates, trial_counts, ndtri(0.5 + confidence / 2)),
        clustered=wilson_ends(rates, effective_counts, student.ppf(0.5 + confidence / 2, degrees_of_freedom)),
        p_clustered=2 * student.sf(t_statistic, degrees_of_freedom),
        degrees=degrees_of_freedom,
        design_effect=np.where(
            independent_variance > 0,
            clustered_variance / np.where(independent_variance > 0, independent_variance, 1),
            1.0,
        ),
    )


def _cluster_variance(
    residuals: np.ndarray,
    is_counted: np.ndarray,
    trial_counts: np.ndarray,
    cluster_indices: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Compute the variance of the mean score from sums of residuals over clusters.

    Args:
        residuals: score minus mean score of each trial, [S, N]; 0 for trials that do not count.
        is_counted: True for trials that count, bool [S, N].
        trial_counts: number of trials that count, [S].
        cluster_indices: index of the cluster of each trial, [N]; None: each trial is a cluster.

    Returns:
        Variance [S], and number of clusters that contain trials which count [S].
    """
    if cluster_indices is None:
        residual_sums = residuals
        cluster_counts = trial_counts
    else:
        # [N, G], one-hot
        cluster_membership = np.zeros((len(cluster_indices), int(np.max(cluster_indices)) + 1))
        cluster_membership[np.arange(len(cluster_indices)), cluster_indices] = 1
        residual_sums = residuals @ cluster_membership  # [S, G]
        cluster_counts = ((is_counted @ cluster_membership) > 0).sum(axis=1).astype(np.float64)
    # The correction G / (G - 1) would divide by zero for one cluster. The residuals of one cluster sum to 0,
    # so the variance is 0 with any correction.
    correction = cluster_counts / np.maximum(cluster_counts - 1, 1)
    return (residual_sums**2).sum(axis=1) / trial_counts**2 * correction, cluster_counts


def cluster_bootstrap(
    scores: np.ndarray,
    annotator_indices: np.ndarray,
    latent_indices: np.ndarray,
    resampled_clusters: str,
    confidence: float = 0.95,
    resample_count: int = 4000,
    seed: int = 0,
) -> "Interval | None":
    """Compute a percentile bootstrap interval of one study's win rate by resampling clusters.

    Args:
        scores: scores of the trials, [N].
        annotator_indices: index of the annotator of each trial, [N].
        latent_indices: index of the latent of each trial, [N].
        resampled_clusters: clusters that are resampled: 'annotators', 'latents' or 'both'. With 'both', the
            weight of a trial is the product of the weights of its annotator and its latent (pigeonhole
            bootstrap, Owen 2007). This interval is too wide if the scores vary more between trials than
            between clusters.
        confidence: level of the interval.
        resample_count: number of resamples, R.
        seed: random seed.

    Returns:
        Interval, or None if all trials that count belong to one annotator or latent that would be resampled.
    """
    scores = np.asarray(scores, dtype=np.float64)
    is_counted = ~np.isnan(scores)
    clusterings = {
        "annotators": [annotator_indices],
        "latents": [latent_indices],
        "both": [annotator_indices, latent_indices],
    }[resampled_clusters]
    # The indices are computed again without the trials that do not count, so that every cluster has a trial.
    cluster_index_arrays = [
        np.unique(trial_clusters[is_counted], return_inverse=True)[1] for trial_clusters in clusterings
    ]
    cluster_counts = [int(cluster_indices.max()) + 1 for cluster_indices in cluster_index_arrays]
    if min(cluster_counts) < 2:
        return None
    rng = np.random.default_rng(seed)
    resampled_rates = []
    counted_scores = scores[is_counted]
    # The weights [R, N] are computed in chunks of resamples, so that they do not fill the memory.
    chunk_size = max(1, _CELLS // len(counted_scores))
    for start_index in range(0, resample_count, chunk_size):
        chunk_resample_count = min(chunk_size, resample_count - start_index)
        weights = np.ones((chunk_resample_count, len(counted_scores)))  # [R, N]
        for cluster_indices, cluster_count in zip(cluster_index_arrays, cluster_counts, strict=True):
            # If `cluster_count` clusters are resampled with replacement, the number of times that each is
            # drawn has a multinomial distribution. This number is the weight of its trials.
            weights *= rng.multinomial(
                cluster_count, np.full(cluster_count, 1 / cluster_count), size=chunk_resample_count
            )[:, cluster_indices]
        weight_sums = weights.sum(axis=1)
        # With 'both', all weights of a resample can be 0. Such a resample is left out.
        resampled_rates.append((weights @ counted_scores)[weight_sums > 0] / weight_sums[weight_sums > 0])
    lo, hi = np.quantile(np.concatenate(resampled_rates), [0.5 - confidence / 2, 0.5 + confidence / 2])
    return Interval(float(lo), float(hi))
