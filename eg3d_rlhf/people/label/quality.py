"""Quality metrics of judgements: speed, side bias, consistency and gold accuracy of annotators, and their
agreement.

All functions depend only on the judgements that they receive. The admin page shows the result of
`quality_report`. Judgements that were taken back and answers to practice pairs never count. The agreement of
annotators is measured by Cohen's kappa and Krippendorff's alpha (preferences.agreement), the strengths of
shapes by the model of Bradley and Terry (preferences.bradley_terry).
"""

import itertools
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from eg3d_rlhf.core.statistics import binomial_test, wilson_interval
from eg3d_rlhf.people.label.entities import VOTES, Choice, JudgementRow, Kind, Mode, Shape, answers_to
from eg3d_rlhf.preferences.agreement import LEAST_UNITS, cohen_kappa, krippendorff_alpha
from eg3d_rlhf.preferences.bradley_terry import Comparison, bradley_terry, cycles
from eg3d_rlhf.preferences.leaderboard import Game, Leaderboard, Standing, leaderboard
from eg3d_rlhf.preferences.provenance import select_labels


@dataclass(frozen=True, kw_only=True)
class QualityLimits:
    """Thresholds at which an annotator is flagged, or a value is left out."""

    gold_accuracy: float = 0.8  # share of correct gold checks below which an annotator is flagged
    gold_least: int = 4  # smallest number of gold checks for this flag
    fast_seconds: float = 1.0  # median time to answer, in seconds, below which an annotator is flagged
    least: int = 20  # smallest number of judgements for the flags of speed, sides, ties and skips
    # p-value below which an annotator is flagged, of a two-sided exact binomial test of left against right
    side_p: float = 0.001
    # single shapes: share of good ratings, or of bad ratings, below which an annotator is flagged
    one_sided: float = 0.03
    # share of consistent repeats; an annotator is flagged if the entire confidence interval lies below it
    consistency: float = 0.65
    skip_share: float = 0.3  # share of skips above which an annotator is flagged
    tie_share: float = 0.7  # share of ties above which an annotator is flagged
    # longest time between two judgements that counts as work, in seconds; a longer time is a break
    break_seconds: float = 600.0
    # largest number of items in the Bradley-Terry fit, which are the items with the most comparisons
    strengths: int = 400


def counting(judgement_rows: Iterable[JudgementRow]) -> list[JudgementRow]:
    """Return the judgements that count, in order of receipt: not taken back, and not of a practice pair."""
    counted_rows = (
        judgement for judgement in judgement_rows if not judgement.undone and judgement.kind != Kind.TRAINING
    )
    return sorted(counted_rows, key=lambda judgement: judgement.id)


def side_free(judgement: JudgementRow) -> str:
    """Return the answer of a judgement in a form that does not depend on the sides.

    Returns:
        'first' or 'second' for the preferred shape of the pair, 'tie' also for "both are bad", or 'skip'. For
        a single shape, the answer itself.
    """
    if judgement.choice.equal:
        return Choice.TIE.value
    if judgement.choice not in (Choice.LEFT, Choice.RIGHT):
        return judgement.choice.value
    return "first" if (judgement.choice == Choice.LEFT) == judgement.first_is_left else "second"


def quality_report(judgement_rows: Iterable[JudgementRow], limits: QualityLimits | None = None) -> dict:
    """Compute all quality metrics of judgements.

    Campaigns in study mode get no Bradley-Terry strengths, because these would reveal the result before the
    study is complete. Single shapes have no strengths either.

    Answers of judges (vision-language models) are counted under "label_use" and used for nothing else.

    Args:
        judgement_rows: judgements, also those that were taken back, and those of judges.
        limits: thresholds of the flags; None: the default thresholds.

    Returns:
        Dict in JSON types, in which a metric without data is None: "judgements" (number of judgements that
        count), "label_use" (numbers of judgements of people and of judges, see `LabelUse`, with its "text"),
        "annotators" (see `annotator_quality`), "agreement" (see `agreement`), "bradley_terry" (see
        `_strengths`), "cycles" (see `bradley_terry.cycles`), "questions" (see `by_question`), "leaderboards"
        (see `leaderboards`) and "timeline" (see `timeline`).
    """
    limits = limits or QualityLimits()
    all_rows = list(judgement_rows)
    use = select_labels(counting(all_rows), lambda judgement: judgement.provenance)[1]
    judgement_rows = [judgement for judgement in all_rows if judgement.judge is None]
    counted_rows = counting(judgement_rows)
    # assignments whose answer was changed
    changed_assignments = {judgement.assignment for judgement in judgement_rows if judgement.undone}
    rows_by_annotator: dict[str, list[JudgementRow]] = defaultdict(list)
    for judgement in counted_rows:
        rows_by_annotator[judgement.annotator].append(judgement)
    # judgements of studies are left out, because a study stays blind until its report
    label_rows = [judgement for judgement in counted_rows if judgement.mode == Mode.LABEL]
    comparisons, name_of_shape = _comparisons(label_rows)
    return {
        "judgements": len(counted_rows),
        "label_use": {**use.to_dict(), "text": use.text("answers")},
        "annotators": [
            annotator_quality(name, annotator_rows, limits, changed_assignments)
            for name, annotator_rows in sorted(rows_by_annotator.items())
        ],
        "agreement": agreement(counted_rows),
        "bradley_terry": _strengths(comparisons, name_of_shape, limits),
        "cycles": cycles(comparisons),
        "questions": by_question(counted_rows),
        "leaderboards": leaderboards(counted_rows),
        "timeline": timeline(counted_rows),
    }


def annotator_quality(
    name: str,
    judgement_rows: Sequence[JudgementRow],
    limits: QualityLimits,
    changed_assignments: Collection[str] = (),
) -> dict:
    """Compute the quality metrics of one annotator, and flags in words.

    Args:
        name: name of the annotator.
        judgement_rows: judgements of the annotator that count.
        limits: thresholds of the flags.
        changed_assignments: tokens of assignments whose answer was changed. They are left out of the
            consistency, because the annotator may have looked at an earlier answer to the same pair.

    Returns:
        Dict in JSON types, in which a metric without data is None: the name, counts of judgements and skips,
        speed, side bias, consistency and gold accuracy, and under "flags" a list of sentences about metrics
        that violate a threshold.
    """
    unchanged_rows = [
        judgement for judgement in judgement_rows if judgement.assignment not in changed_assignments
    ]
    choice_counts = Counter(judgement.choice for judgement in judgement_rows)
    left_count = choice_counts[Choice.LEFT]
    right_count = choice_counts[Choice.RIGHT]
    # The time is 0 milliseconds if the page could not measure it, and for imported answers.
    answer_seconds = [
        judgement.milliseconds / 1000
        for judgement in judgement_rows
        if judgement.choice != Choice.SKIP and judgement.milliseconds > 0
    ]
    # A skipped gold check counts neither as correct nor as wrong.
    gold_rows = [
        judgement
        for judgement in judgement_rows
        if judgement.kind == Kind.GOLD and judgement.expected is not None and judgement.choice != Choice.SKIP
    ]
    # The working time is the sum of the gaps between judgements, without breaks.
    receipt_times = sorted(judgement.received_at for judgement in judgement_rows)
    gaps = [later - earlier for earlier, later in itertools.pairwise(receipt_times)]
    work_gaps = [work_gap for work_gap in gaps if work_gap <= limits.break_seconds]
    metrics = {
        "name": name,
        "judgements": len(judgement_rows),
        "ties": choice_counts[Choice.TIE],
        "both_bad": choice_counts[Choice.BAD],
        "skips": choice_counts[Choice.SKIP],
        "last": judgement_rows[-1].received_at if judgement_rows else None,
        "skip_reasons": dict(
            Counter(
                judgement.reason or "other" for judgement in judgement_rows if judgement.choice == Choice.SKIP
            )
        ),
        "median_seconds": statistics.median(answer_seconds) if answer_seconds else None,
        "per_hour": 3600 * len(work_gaps) / sum(work_gaps) if sum(work_gaps) > 0 else None,
        # `good` is None for answers to pairs, so only ratings of single shapes are counted.
        **_share(
            "good_share",
            sum(judgement.choice.good is True for judgement in judgement_rows),
            sum(judgement.choice.good is not None for judgement in judgement_rows),
        ),
        **_share("left_share", left_count, left_count + right_count),
        "left_right_n": left_count + right_count,
        # Sides are random, so an unbiased annotator chooses the left side in half of the answers.
        "left_p": binomial_test(left_count, left_count + right_count),
        **_consistency("self_consistency", unchanged_rows, Kind.REPEAT),
        **_consistency("swap_consistency", unchanged_rows, Kind.SWAP),
        **_share(
            "gold_accuracy",
            sum(judgement.choice.meets(judgement.expected) for judgement in gold_rows),
            len(gold_rows),
            "gold_n",
            "gold_ci95",
        ),
    }
    return {**metrics, "flags": _flags(metrics, limits)}


def agreement(judgement_rows: Iterable[JudgementRow]) -> dict:
    """Compute Cohen's kappa of every two annotators, and Krippendorff's alpha of all annotators.

    The compared answers are "first", "second" and "tie", which do not depend on the sides. Two annotators
    have a kappa if they answered at least one common pair.

    Args:
        judgement_rows: judgements.

    Returns:
        Dict in JSON types: "cohen_kappa" (list with one record for each two annotators),
        "krippendorff_alpha", "alpha_ci95", "alpha_n" (number of common pairs), "alpha_needs" (number of
        common pairs that are missing for alpha) and "least" (LEAST_UNITS). With fewer than LEAST_UNITS common
        pairs, kappa or alpha is None.
    """
    # id of a pair -> name of an annotator -> answer. Gold checks are left out, because their correct answer
    # is obvious, so that annotators agree on them more than on other pairs.
    answers_by_pair: dict[int, dict[str, str]] = defaultdict(dict)
    for judgement in counting(judgement_rows):
        if judgement.kind != Kind.GOLD and judgement.choice != Choice.SKIP:
            # setdefault keeps the first answer of an annotator, so that repeats of a pair are not counted.
            answers_by_pair[judgement.pair].setdefault(judgement.annotator, side_free(judgement))
    shared_answers: dict[tuple[str, str], list[tuple[str, str]]] = defaultdict(list)
    for answer_by_name in answers_by_pair.values():
        # The names are sorted, so that two annotators have only one key.
        for first_name, second_name in itertools.combinations(sorted(answer_by_name), 2):
            two_answers = (answer_by_name[first_name], answer_by_name[second_name])
            shared_answers[first_name, second_name].append(two_answers)
    kappas = []
    for (first_name, second_name), answer_pairs in sorted(shared_answers.items()):
        first_answers, second_answers = zip(*answer_pairs, strict=True)
        kappa = cohen_kappa(list(first_answers), list(second_answers))
        equal_count = sum(first_answer == second_answer for first_answer, second_answer in answer_pairs)
        same_share_fields = _share("same", equal_count, kappa.n, "n")
        kappas.append(
            {
                "a": first_name,
                "b": second_name,
                "kappa": kappa.value if kappa.lo is not None else None,
                "ci95": kappa.to_dict()["ci95"],
                **same_share_fields,
            }
        )
    # The units of alpha are the pairs. Each annotator may have answered other pairs.
    alpha = krippendorff_alpha(list(answers_by_pair.values()))
    return {
        "cohen_kappa": kappas,
        "krippendorff_alpha": alpha.value if alpha.lo is not None else None,
        "alpha_ci95": alpha.to_dict()["ci95"],
        "alpha_n": alpha.n,
        "alpha_needs": max(0, LEAST_UNITS - alpha.n),
        "least": LEAST_UNITS,
    }


def leaderboards(judgement_rows: Sequence[JudgementRow]) -> list[dict]:
    """Compute leaderboards of the generators: one of the main question, and one of each further question.

    Judgements of studies are not used. The list is empty if the judgements are about a single generator.
    """
    generators = {judgement.left.generator for judgement in judgement_rows} | {
        judgement.right.generator for judgement in judgement_rows
    }
    if len(generators) < 2:
        return []
    # A dictionary removes repetitions and keeps the order of the questions.
    questions = dict.fromkeys(question for judgement in judgement_rows for question in judgement.votes)
    # None is the main question, which shape is better
    board_by_question = {
        question: leaderboard_of(judgement_rows, question) for question in (None, *questions)
    }
    return [
        {"question": question, **question_board.to_dict()}
        for question, question_board in board_by_question.items()
        if question_board.games
    ]


def by_question(judgement_rows: Iterable[JudgementRow]) -> list[dict]:
    """Count the votes on each further question, and compute their agreement.

    The record of a question contains the counts of `vote_figures`, and Krippendorff's alpha of the annotators
    with the keys of `agreement`. Gold checks are left out.
    """
    judgement_rows = [judgement for judgement in judgement_rows if judgement.kind != Kind.GOLD]
    question_names = dict.fromkeys(name for judgement in judgement_rows for name in judgement.votes)
    agreements = {name: agreement(answers_to(name, judgement_rows)) for name in question_names}
    return [
        {
            **vote_figures(name, judgement_rows),
            **{key: value for key, value in agreements[name].items() if key != "cohen_kappa"},
        }
        for name in question_names
    ]


def vote_figures(question: str, judgement_rows: Iterable[JudgementRow]) -> dict:
    """Count the votes on a question, and the votes that agree with the answer to the main question.

    Args:
        question: name of the question.
        judgement_rows: judgements.

    Returns:
        {"name", "n": number of votes, "left", "right", "tie", "decided": number of judgements in which
        neither the vote nor the answer is a tie, "as_overall": number of those in which both choose the same
        side}
    """
    voted_rows = [judgement for judgement in judgement_rows if question in judgement.votes]
    vote_counts = Counter(judgement.votes[question] for judgement in voted_rows)
    decided_rows = [
        judgement
        for judgement in voted_rows
        if judgement.choice in (Choice.LEFT, Choice.RIGHT) and judgement.votes[question] != Choice.TIE
    ]
    return {
        "name": question,
        "n": len(voted_rows),
        **{vote: vote_counts[vote] for vote in VOTES},
        "decided": len(decided_rows),
        "as_overall": sum(judgement.votes[question] == judgement.choice for judgement in decided_rows),
    }


def timeline(judgement_rows: Sequence[JudgementRow], max_bins: int = 240) -> list[dict]:
    """Compute the number of judgements and the median time to answer over time.

    Args:
        judgement_rows: judgements.
        max_bins: largest number of intervals of time.

    Returns:
        One record per interval of time that contains judgements: "time" (start, in seconds since 1970),
        "seconds" (length), "judgements" (number), "median_seconds" (median time to answer) and "annotators"
        (name -> number of judgements). [] if there are no judgements.
    """
    if not judgement_rows:
        return []
    start_time = min(judgement.received_at for judgement in judgement_rows)
    end_time = max(judgement.received_at for judgement in judgement_rows)
    # possible lengths of an interval in seconds: 1, 5, 15 minutes, 1, 4 hours, 1 day, 2 days, ...
    bin_lengths = itertools.chain((60, 300, 900, 3600, 4 * 3600), itertools.count(86400, 86400))
    # The shortest one with which there are few enough intervals. "- 1", because the judgements may begin and
    # end within an interval.
    bin_seconds = next(
        bin_seconds for bin_seconds in bin_lengths if (end_time - start_time) / bin_seconds < max_bins - 1
    )
    # interval number i begins at i * width seconds since 1970
    rows_by_bin: dict[int, list[JudgementRow]] = defaultdict(list)
    for judgement in judgement_rows:
        rows_by_bin[int(judgement.received_at // bin_seconds)].append(judgement)
    return [
        {
            "time": index * bin_seconds,
            "seconds": bin_seconds,
            "judgements": len(bin_rows),
            "median_seconds": statistics.median(judgement.milliseconds for judgement in bin_rows) / 1000,
            "annotators": dict(sorted(Counter(judgement.annotator for judgement in bin_rows).items())),
        }
        for index, bin_rows in sorted(rows_by_bin.items())
    ]


def _share(
    share_key: str, hit_count: int, n: int, n_key: str | None = None, interval_key: str | None = None
) -> dict:
    """Return the share hit_count / n with its Wilson interval, under keys that begin with `share_key`.

    Args:
        share_key: key of the share. It is None if n is 0.
        hit_count: number of cases that the share counts.
        n: number of all cases.
        n_key: key of n; None: n is not returned.
        interval_key: key of the interval; None: <share_key>_ci95. The interval is None if n < LEAST_UNITS.

    Returns:
        Dict with the share, the interval, under <share_key>_needs the number of cases that are missing for an
        interval, and n under `n_key`.
    """
    interval_bounds = list(wilson_interval(hit_count, n)) if n >= LEAST_UNITS else None
    share_values = {
        share_key: hit_count / n if n else None,
        interval_key or f"{share_key}_ci95": interval_bounds,
        f"{share_key}_needs": max(0, LEAST_UNITS - n),
    }
    return {**share_values, **({n_key: n} if n_key else {})}


def _consistency(share_key: str, judgement_rows: Sequence[JudgementRow], repeat_kind: Kind) -> dict:
    """Compute the share of repeats whose answer prefers the same shape as the first answer.

    Args:
        share_key: key of the share, see `_share`.
        judgement_rows: judgements of one annotator, in order of receipt.
        repeat_kind: kind of the repeats, REPEAT or SWAP.
    """
    first_answers: dict[int, str] = {}  # id of a pair -> first answer, independent of sides
    consistent_count = 0
    repeat_count = 0
    for judgement in judgement_rows:
        # A skip contains no preference, so it is neither consistent nor inconsistent.
        if judgement.choice == Choice.SKIP:
            continue
        if judgement.kind == repeat_kind and judgement.pair in first_answers:
            repeat_count += 1
            consistent_count += side_free(judgement) == first_answers[judgement.pair]
        elif judgement.kind == Kind.PAIR:
            first_answers.setdefault(judgement.pair, side_free(judgement))
    return _share(share_key, consistent_count, repeat_count, f"{share_key}_n")


def _flags(metrics: dict, limits: QualityLimits) -> list[str]:
    """Return one sentence about each metric of an annotator that violates a threshold of `limits`."""
    judgement_count = metrics["judgements"]
    flags = []
    if metrics["gold_n"] >= limits.gold_least and metrics["gold_accuracy"] < limits.gold_accuracy:
        flags.append(f"gold checks: {metrics['gold_accuracy']:.0%} of {metrics['gold_n']} correct")
    # With few answers, these metrics vary too much to flag an annotator.
    if judgement_count >= limits.least:
        if metrics["median_seconds"] is not None and metrics["median_seconds"] < limits.fast_seconds:
            flags.append(f"fast: {metrics['median_seconds']:.1f} s median time")
        if metrics["left_p"] < limits.side_p:
            flags.append(
                f"side bias: left in {metrics['left_share']:.0%} of {metrics['left_right_n']} answers"
            )
        if (
            metrics["good_share"] is not None
            and not limits.one_sided <= metrics["good_share"] <= 1 - limits.one_sided
        ):
            flags.append(f"one-sided: good in {metrics['good_share']:.0%} of the ratings")
        if metrics["skips"] > limits.skip_share * judgement_count:
            flags.append(f"skips {metrics['skips']} of {judgement_count}")
        if metrics["ties"] + metrics["both_bad"] > limits.tie_share * judgement_count:
            flags.append(f"ties {metrics['ties'] + metrics['both_bad']} of {judgement_count}")
    # An annotator is flagged if even the upper end of the interval is below the limit, because chance is then
    # an unlikely explanation.
    for metric_name, repeat_words in (
        ("self_consistency", "repeats"),
        ("swap_consistency", "swapped repeats"),
    ):
        interval_bounds = metrics[f"{metric_name}_ci95"]
        if interval_bounds is not None and interval_bounds[1] < limits.consistency:
            flags.append(
                f"inconsistent: {metrics[metric_name]:.0%} of {metrics[f'{metric_name}_n']} {repeat_words}"
                " answered as before"
            )
    return flags


def _comparisons(judgement_rows: Sequence[JudgementRow]) -> tuple[list[Comparison], Callable[[Shape], str]]:
    """Convert judgements to comparisons of shapes. Also return a function that gives the name of a shape.

    The name of a sample is its seed, and also its generator and psi if the shapes differ in them. The name of
    an asset is its generator and its file name. Skips and gold checks are left out.
    """
    # Equal shapes become one object, by which the fit groups the comparisons.
    shape_by_key: dict[tuple, Shape] = {}
    for judgement in judgement_rows:
        shape_by_key[_shape_key(judgement.left)] = judgement.left
        shape_by_key[_shape_key(judgement.right)] = judgement.right
    generators = {shape.generator for shape in shape_by_key.values()}
    psis = {shape.psi for shape in shape_by_key.values() if not shape.file}

    def name_of_shape(shape: Shape) -> str:
        if shape.file:
            return f"{shape.generator}: {shape.source.rpartition('/')[2]}"
        name_parts = [f"seed {shape.seed}"]
        if len(generators) > 1:
            name_parts.append(f"generator {shape.generator[:8]}")
        if len(psis) > 1:
            name_parts.append(f"psi {shape.psi:g}")
        return ", ".join(name_parts)

    comparisons = []
    for judgement in judgement_rows:
        left_shape = shape_by_key[_shape_key(judgement.left)]
        right_shape = shape_by_key[_shape_key(judgement.right)]
        if judgement.choice == Choice.SKIP or judgement.kind == Kind.GOLD or left_shape is right_shape:
            continue
        winner, loser = (
            (left_shape, right_shape) if judgement.choice != Choice.RIGHT else (right_shape, left_shape)
        )
        comparisons.append(Comparison(winner, loser, judgement.choice.equal))
    return comparisons, name_of_shape


def _shape_key(shape: Shape) -> tuple:
    """Return a key that is equal for equal shapes, also for assets, whose psi and level are nan."""
    # nan is unequal to itself, but its text "nan" is equal.
    return (
        shape.generator,
        shape.source,
        shape.seed,
        shape.file,
        f"{shape.psi} {shape.level} {shape.resolution}",
        shape.degradation,
    )


def _strengths(
    comparisons: list[Comparison], name_of_shape: Callable[[Shape], str], limits: QualityLimits
) -> list[dict]:
    """Fit Bradley-Terry strengths of the shapes that are compared with enough other shapes.

    Args:
        comparisons: comparisons of shapes.
        name_of_shape: function (shape) -> name.
        limits: thresholds, of which `strengths` is used.

    Returns:
        One record per shape, strongest first: "label" (name of the shape), "strength" in log-odds, "ci95",
        "comparisons" (number) and "regularised" (True if a prior keeps the strengths finite). [] if no shape
        is compared with two others.
    """
    opponents_by_shape: dict[Any, set] = defaultdict(set)  # shape -> shapes with which it was compared
    comparison_counts: Counter = Counter()  # shape -> number of its comparisons
    for comparison in comparisons:
        opponents_by_shape[comparison.winner].add(comparison.loser)
        opponents_by_shape[comparison.loser].add(comparison.winner)
        comparison_counts.update((comparison.winner, comparison.loser))
    # The strength of a shape with a single opponent is not reliable. Such a shape is included only if its
    # opponent has several opponents.
    ranked_shapes = {
        shape for shape, shape_opponents in opponents_by_shape.items() if len(shape_opponents) >= 2
    }
    ranked_shapes |= {opponent for shape in ranked_shapes for opponent in opponents_by_shape[shape]}
    # The shapes with the most comparisons are fitted. The other keys only make the order definite.
    ordered_shapes = sorted(
        ranked_shapes, key=lambda shape: (-comparison_counts[shape], shape.generator, shape.seed, shape.psi)
    )
    fitted_shapes = set(ordered_shapes[: limits.strengths])
    fitted_comparisons = [
        comparison
        for comparison in comparisons
        if comparison.winner in fitted_shapes and comparison.loser in fitted_shapes
    ]
    if not fitted_comparisons:
        return []
    strength_fit = bradley_terry(fitted_comparisons)
    # With a stable sort, shapes of equal strength stay in the order of the fit.
    ranked_indices = np.argsort(-strength_fit.strength, kind="stable")
    return [
        {
            "label": name_of_shape(strength_fit.items[item_index]),
            "strength": float(strength_fit.strength[item_index]),
            "ci95": (
                [float(strength_fit.lo[item_index]), float(strength_fit.hi[item_index])]
                if comparison_counts[strength_fit.items[item_index]] >= LEAST_UNITS
                else None
            ),
            "comparisons": comparison_counts[strength_fit.items[item_index]],
            "regularised": strength_fit.regularised,
        }
        for item_index in ranked_indices
    ]


# ---- the leaderboard of a campaign's generators


def leaderboard_of(judgement_rows: Iterable[JudgementRow], question: str | None = None) -> Leaderboard:
    """Compute the leaderboard of the generators whose shapes were compared.

    The first answer of each annotator to a pair counts. Repeats, gold checks, practice pairs, skips, answers
    that were taken back and pairs of one generator do not count. Answers of studies never count, because they
    would reveal the result. Comparisons are clustered by the prompt of the shapes; without a prompt by their
    common seed; and otherwise by the pair.

    Args:
        judgement_rows: judgements.
        question: name of a further question, whose votes are used; None: the main question, which shape is
            better.
    """
    counted_rows = [
        judgement
        for judgement in judgement_rows
        if judgement.kind == Kind.PAIR and judgement.mode == Mode.LABEL and not judgement.undone
    ]
    counted_rows.sort(key=lambda judgement: judgement.id)  # in order of receipt
    counted_rows = [
        judgement
        for judgement in counted_rows
        if judgement.choice != Choice.SKIP and judgement.left.generator != judgement.right.generator
    ]
    if question is not None:
        counted_rows = answers_to(question, counted_rows)
    name_by_generator = generator_names(
        itertools.chain.from_iterable((judgement.left, judgement.right) for judgement in counted_rows)
    )
    # Later entries of a dictionary replace earlier ones. In reversed order, the first answer to each pair
    # remains.
    game_by_key = {
        (judgement.annotator, judgement.campaign, judgement.pair): _game(judgement, name_by_generator)
        for judgement in reversed(counted_rows)
    }
    return leaderboard(list(game_by_key.values())[::-1])


def _game(judgement: JudgementRow, name_by_generator: dict[str, str]) -> Game:
    """Convert a judgement to a comparison of two generators, which belongs to a cluster.

    Args:
        judgement: judgement of a pair of shapes of two generators.
        name_by_generator: hash of a generator, or label of an asset -> name.
    """
    left_name = name_by_generator[judgement.left.generator]
    right_name = name_by_generator[judgement.right.generator]
    winner_name = {Choice.LEFT: left_name, Choice.RIGHT: right_name}.get(judgement.choice)  # None for a tie
    # Comparisons of the same prompt or latent are not independent, so they form a cluster.
    cluster: Hashable
    if judgement.left.condition:
        cluster = judgement.left.condition
    elif judgement.left.seed == judgement.right.seed and not judgement.left.file:
        cluster = ("seed", judgement.left.seed)
    else:
        cluster = ("pair", judgement.campaign, judgement.pair)
    return Game(
        left_name, right_name, winner_name, judgement.annotator, cluster, judgement.choice == Choice.BAD
    )


def generator_names(shapes: Iterable[Shape]) -> dict[str, str]:
    """Return a readable name of each generator. The keys are hashes and, for assets, labels.

    The name of a network is the name of its file. If several networks have the same name, the folder of the
    file is added, and if that is not enough, the beginning of the hash. The name of the generator of assets
    is its label.
    """
    shape_by_generator = {shape.generator: shape for shape in shapes}
    path_by_generator = {
        generator: Path(shape.source or "bundled generator")
        for generator, shape in shape_by_generator.items()
        if not shape.file
    }
    name_by_generator = {
        generator: path_by_generator[generator].name if generator in path_by_generator else generator
        for generator in shape_by_generator
    }
    for adds_hash in (False, True):
        name_counts = Counter(name_by_generator.values())
        for generator in [
            generator for generator in path_by_generator if name_counts[name_by_generator[generator]] > 1
        ]:
            folder_and_file = "/".join(path_by_generator[generator].parts[-2:])
            name_by_generator[generator] = folder_and_file + (f" {generator[:8]}" if adds_hash else "")
    return name_by_generator


def as_text(board: Leaderboard) -> str:
    """Format a leaderboard as a table for a terminal."""
    if not board.groups and not board.few:
        return "There are no comparisons of two generators yet."
    # `few` are the generators with too few comparisons for a rank
    all_standings = [*itertools.chain.from_iterable(board.groups), *board.few]
    name_width = max(len(standing.name) for standing in all_standings)
    table_lines = []
    for rank_group in board.groups:
        table_lines += [
            f"{'':>3} {'generator':<{name_width}} points   95 %             n  score  won lost tied both bad"
        ]
        table_lines += [
            f"{rank:>2}. {_line(standing, name_width)}" for rank, standing in enumerate(rank_group, 1)
        ] + [""]
    return "\n".join([*table_lines, *board.notes()])


def _line(standing: Standing, name_width: int) -> str:
    """Format a line of a leaderboard.

    Args:
        standing: result of one generator.
        name_width: width of the column of names, in characters.
    """
    # An end of the interval that cannot be computed is None, for example if a generator has won every
    # comparison.
    if standing.lo is None and standing.hi is None:
        interval_text = "any"
    elif standing.lo is None:
        interval_text = f"at most {_end(standing.hi)}"
    elif standing.hi is None:
        interval_text = f"at least {_end(standing.lo)}"
    else:
        interval_text = f"{_end(standing.lo)} to {_end(standing.hi)}"
    points_text = "–" if standing.points is None else f"{standing.points:.0f}"
    return (
        f"{standing.name:<{name_width}} {points_text:>6}   {interval_text:<14} {standing.games:>4}"
        f"  {standing.score:>4.0%} {standing.wins:>5} {standing.losses:>4} {standing.ties:>4}"
        f" {standing.both_bad:>8}"
    )


def _end(interval_end: float | None) -> str:
    """Format an end of an interval in Elo points; None becomes an empty text."""
    return "" if interval_end is None else f"{interval_end:.0f}"
