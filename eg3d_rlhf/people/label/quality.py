"""Computes quality figures of judgements: each annotator's pace, side bias, consistency and accuracy on gold
checks, and the agreement between annotators.

All functions are pure functions of the store's rows. The admin page shows the result of `quality_report`.
Judgements that were taken back and training pairs never count.
"""

import itertools
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from eg3d_rlhf.core.statistics import binomial_test, wilson_interval
from eg3d_rlhf.people.label.entities import VOTES, Choice, JudgementRow, Kind, Mode, Shape, answers_to
from eg3d_rlhf.preferences.agreement import LEAST_UNITS, cohen_kappa, krippendorff_alpha
from eg3d_rlhf.preferences.bradley_terry import Comparison, bradley_terry, cycles
from eg3d_rlhf.preferences.leaderboard import Game, Leaderboard, Standing, leaderboard


@dataclass(frozen=True, kw_only=True)
class QualityLimits:
    """Thresholds from which on something is flagged or left out."""

    gold_accuracy: float = 0.8  # share of correct gold checks; flagged below
    gold_least: int = 4  # least number of gold checks for a flag
    fast_seconds: float = 1.0  # median time to answer; flagged below
    least: int = 20  # least number of judgements for a flag of pace, sides, ties and skips
    side_p: float = 0.001  # p-value of a two-sided exact binomial test of left against right; flagged below
    one_sided: float = 0.03  # single shapes: flagged if the share of good or of bad ratings is below
    consistency: float = 0.65  # flagged if the entire confidence interval lies below
    skip_share: float = 0.3  # share of skips; flagged above
    tie_share: float = 0.7  # share of ties; flagged above
    break_seconds: float = 600.0  # a longer gap between two judgements counts as a break, not as work
    strengths: int = 400  # largest number of items in the Bradley-Terry fit; the most compared are kept


def counting(rows: Iterable[JudgementRow]) -> list[JudgementRow]:
    """Return the rows that count (not taken back, no training pairs) in order of receipt."""
    return sorted((r for r in rows if not r.undone and r.kind != Kind.TRAINING), key=lambda r: r.id)


def side_free(row: JudgementRow) -> str:
    """Return the answer independent of sides: 'first', 'second', 'tie' (also for 'bad') or 'skip'; for a
    single shape the answer itself.
    """
    if row.choice.equal:
        return Choice.TIE.value
    if row.choice not in (Choice.LEFT, Choice.RIGHT):
        return row.choice.value
    return "first" if (row.choice == Choice.LEFT) == row.first_is_left else "second"


def quality_report(rows: Iterable[JudgementRow], limits: QualityLimits | None = None) -> dict:
    """Compute all figures as JSON values; None where there are no data.

    Campaigns in study mode get no strengths, because these would reveal the result before the study is
    complete. Single shapes have no strengths.
    """
    limits = limits or QualityLimits()
    rows = list(rows)
    counted = counting(rows)
    # An answer that was changed may have been given after a look at an earlier answer to the same pair.
    changed = {row.assignment for row in rows if row.undone}
    by_annotator: dict[str, list[JudgementRow]] = defaultdict(list)
    for row in counted:
        by_annotator[row.annotator].append(row)
    # Studies stay blind until their report.
    labelling = [r for r in counted if r.mode == Mode.LABEL]
    comparisons, names = _comparisons(labelling)
    return {
        "judgements": len(counted),
        "annotators": [
            annotator_quality(name, theirs, limits, changed) for name, theirs in sorted(by_annotator.items())
        ],
        "agreement": agreement(counted),
        "bradley_terry": _strengths(comparisons, names, limits),
        "cycles": cycles(comparisons),
        "questions": by_question(counted),
        "leaderboards": leaderboards(counted),
        "timeline": timeline(counted),
    }


def annotator_quality(
    name: str, rows: Sequence[JudgementRow], limits: QualityLimits, changed: Collection[str] = ()
) -> dict:
    """Compute the figures of one annotator from her rows that count, with flags in words.

    Args:
        name: of the annotator.
        rows: her judgements that count.
        limits: thresholds of the flags.
        changed: assignments whose answer was changed. They are left out of the consistency, because the
            annotator may have looked at an earlier answer.
    """
    unchanged = [row for row in rows if row.assignment not in changed]
    choices = Counter(r.choice for r in rows)
    left = choices[Choice.LEFT]
    right = choices[Choice.RIGHT]
    # The page sends 0 milliseconds if it could not measure the time, and imported answers have 0, too.
    seconds = [r.milliseconds / 1000 for r in rows if r.choice != Choice.SKIP and r.milliseconds > 0]
    # A skipped check counts neither as correct nor as wrong.
    gold = [r for r in rows if r.kind == Kind.GOLD and r.expected is not None and r.choice != Choice.SKIP]
    # Time of work is the sum of the gaps between judgements, without breaks. It gives the pace per hour.
    gaps = [b - a for a, b in itertools.pairwise(sorted(r.received_at for r in rows))]
    worked = [gap for gap in gaps if gap <= limits.break_seconds]
    figures = {
        "name": name,
        "judgements": len(rows),
        "ties": choices[Choice.TIE],
        "both_bad": choices[Choice.BAD],
        "skips": choices[Choice.SKIP],
        "last": rows[-1].received_at if rows else None,
        "skip_reasons": dict(Counter(r.reason or "other" for r in rows if r.choice == Choice.SKIP)),
        "median_seconds": statistics.median(seconds) if seconds else None,
        "per_hour": 3600 * len(worked) / sum(worked) if sum(worked) > 0 else None,
        # good_share counts ratings of single shapes only; `good` is None for pairs.
        **_share(
            "good_share",
            sum(r.choice.good is True for r in rows),
            sum(r.choice.good is not None for r in rows),
        ),
        **_share("left_share", left, left + right),
        "left_right_n": left + right,
        # Sides are random, so the left one is expected in half of the answers.
        "left_p": binomial_test(left, left + right),
        **_consistency("self_consistency", unchanged, Kind.REPEAT),
        **_consistency("swap_consistency", unchanged, Kind.SWAP),
        **_share(
            "gold_accuracy", sum(r.choice.meets(r.expected) for r in gold), len(gold), "gold_n", "gold_ci95"
        ),
    }
    return {**figures, "flags": _flags(figures, limits)}


def agreement(rows: Iterable[JudgementRow]) -> dict:
    """Compute Cohen's kappa of every two annotators who share pairs, and Krippendorff's alpha of all
    annotators, over the answers independent of sides: first, second, tie.

    With fewer than LEAST_UNITS common pairs there is no figure, and `needs` is the number that is missing.
    """
    # Pair -> annotator -> answer. Gold checks are left out: agreement on them is expected and would inflate
    # kappa.
    answers: dict[int, dict[str, str]] = defaultdict(dict)
    for row in counting(rows):
        if row.kind != Kind.GOLD and row.choice != Choice.SKIP:
            # setdefault keeps the first answer: repeats of a pair do not count as agreement.
            answers[row.pair].setdefault(row.annotator, side_free(row))
    shared: dict[tuple[str, str], list[tuple[str, str]]] = defaultdict(list)
    for by_name in answers.values():
        # Sorted, so that a pair of annotators has one key.
        for a, b in itertools.combinations(sorted(by_name), 2):
            shared[a, b].append((by_name[a], by_name[b]))
    kappas = []
    for (a, b), pairs in sorted(shared.items()):
        result = cohen_kappa([x for x, _ in pairs], [y for _, y in pairs])
        same = _share("same", sum(x == y for x, y in pairs), result.n, "n")
        kappas.append(
            {
                "a": a,
                "b": b,
                "kappa": result.value if result.lo is not None else None,
                "ci95": result.to_dict()["ci95"],
                **same,
            }
        )
    # Units are pairs; annotators need not have answered the same ones.
    alpha = krippendorff_alpha(list(answers.values()))
    shown = alpha.value if alpha.lo is not None else None
    return {
        "cohen_kappa": kappas,
        "krippendorff_alpha": shown,
        "alpha_ci95": alpha.to_dict()["ci95"],
        "alpha_n": alpha.n,
        "alpha_needs": max(0, LEAST_UNITS - alpha.n),
        "least": LEAST_UNITS,
    }


def leaderboards(rows: Sequence[JudgementRow]) -> list[dict]:
    """Compute leaderboards of the generators: of the overall answers, and of each further question. There is
    none for a single generator, and studies never count.
    """
    if len({shape.generator for row in rows for shape in (row.left, row.right)}) < 2:
        # With one generator every game would be between the generator and itself.
        return []
    # A dictionary keeps the order of the questions and drops repeats.
    asked = dict.fromkeys(name for row in rows for name in row.votes)
    boards = {name: leaderboard_of(rows, name) for name in (None, *asked)}
    return [{"question": name, **board.to_dict()} for name, board in boards.items() if board.games]


def by_question(rows: Iterable[JudgementRow]) -> list[dict]:
    """Compute figures of each further question: counts, agreement of the votes with the overall answer, and
    Krippendorff's alpha.
    """
    rows = [row for row in rows if row.kind != Kind.GOLD]
    names = dict.fromkeys(name for row in rows for name in row.votes)
    agreements = {name: agreement(answers_to(name, rows)) for name in names}
    return [
        {**vote_figures(name, rows), **{k: v for k, v in agreements[name].items() if k != "cohen_kappa"}}
        for name in names
    ]


def vote_figures(question: str, rows: Iterable[JudgementRow]) -> dict:
    """Count the votes on a question, and how many of them choose the same side as the overall answer."""
    voted = [row for row in rows if question in row.votes]
    counts = Counter(row.votes[question] for row in voted)
    decided = [
        row
        for row in voted
        if row.choice in (Choice.LEFT, Choice.RIGHT) and row.votes[question] != Choice.TIE
    ]
    return {
        "name": question,
        "n": len(voted),
        **{vote: counts[vote] for vote in VOTES},
        "decided": len(decided),
        "as_overall": sum(row.votes[question] == row.choice for row in decided),
    }


def timeline(rows: Sequence[JudgementRow], bins: int = 240) -> list[dict]:
    """Compute judgements and median seconds over time, in at most `bins` bins of whole minutes."""
    if not rows:
        return []
    start = min(r.received_at for r in rows)
    end = max(r.received_at for r in rows)
    # The first width that gives few enough bins, in seconds: 1, 5, 15 minutes, 1, 4 hours, then whole days.
    widths = itertools.chain((60, 300, 900, 3600, 4 * 3600), itertools.count(86400, 86400))
    width = next(w for w in widths if (end - start) / w < bins - 1)
    # Bins begin at multiples of their width since 1970, not at the first judgement.
    filled: dict[int, list[JudgementRow]] = defaultdict(list)
    for row in rows:
        filled[int(row.received_at // width)].append(row)
    return [
        {
            "time": index * width,
            "seconds": width,
            "judgements": len(inside),
            "median_seconds": statistics.median(r.milliseconds for r in inside) / 1000,
            "annotators": dict(sorted(Counter(r.annotator for r in inside).items())),
        }
        for index, inside in sorted(filled.items())
    ]


def _share(name: str, hits: int, n: int, n_name: str | None = None, interval: str | None = None) -> dict:
    """Return a share, its count and its Wilson interval. The interval is None below LEAST_UNITS, and the
    share is None if nothing was counted.
    """
    bounds = list(wilson_interval(hits, n)) if n >= LEAST_UNITS else None
    figures = {
        name: hits / n if n else None,
        interval or f"{name}_ci95": bounds,
        f"{name}_needs": max(0, LEAST_UNITS - n),
    }
    return {**figures, **({n_name: n} if n_name else {})}


def _consistency(name: str, rows: Sequence[JudgementRow], kind: Kind) -> dict:
    """Compute the share of repeats that were answered like the first time, independent of sides."""
    first: dict[int, str] = {}
    hits = 0
    n = 0
    for row in rows:
        # A skipped repeat is no inconsistency: it contains no preference.
        if row.choice == Choice.SKIP:
            continue
        if row.kind == kind and row.pair in first:
            n += 1
            # Without sides, a repeat and a swapped repeat are compared in the same way.
            hits += side_free(row) == first[row.pair]
        elif row.kind == Kind.PAIR:
            first.setdefault(row.pair, side_free(row))
    return _share(name, hits, n, f"{name}_n")


def _flags(figures: dict, limits: QualityLimits) -> list[str]:
    """Describe in words which figures exceed their limits."""
    n = figures["judgements"]
    flags = []
    if figures["gold_n"] >= limits.gold_least and figures["gold_accuracy"] < limits.gold_accuracy:
        flags.append(f"gold checks: {figures['gold_accuracy']:.0%} of {figures['gold_n']} correct")
    # With few answers these figures vary too much to flag anybody.
    if n >= limits.least:
        if figures["median_seconds"] is not None and figures["median_seconds"] < limits.fast_seconds:
            flags.append(f"fast: {figures['median_seconds']:.1f} s median time")
        if figures["left_p"] < limits.side_p:
            flags.append(
                f"side bias: left in {figures['left_share']:.0%} of {figures['left_right_n']} answers"
            )
        if (
            figures["good_share"] is not None
            and not limits.one_sided <= figures["good_share"] <= 1 - limits.one_sided
        ):
            flags.append(f"one-sided: good in {figures['good_share']:.0%} of the ratings")
        if figures["skips"] > limits.skip_share * n:
            flags.append(f"skips {figures['skips']} of {n}")
        if figures["ties"] + figures["both_bad"] > limits.tie_share * n:
            flags.append(f"ties {figures['ties'] + figures['both_bad']} of {n}")
    # Only the upper bound matters: an annotator is flagged when chance alone is an unlikely explanation.
    for name, words in (("self_consistency", "repeats"), ("swap_consistency", "swapped repeats")):
        bounds = figures[f"{name}_ci95"]
        if bounds is not None and bounds[1] < limits.consistency:
            flags.append(
                f"inconsistent: {figures[name]:.0%} of {figures[f'{name}_n']} {words} answered as before"
            )
    return flags


def _comparisons(rows: Sequence[JudgementRow]) -> tuple[list[Comparison], Callable[[Shape], str]]:
    """Return comparisons of shapes and a function that names a shape: by its seed, and by its generator and
    psi where these differ.
    """
    # One object per shape: the comparisons refer to it, and the fit groups them by it.
    shapes = {_same(s): s for r in rows for s in (r.left, r.right)}
    generators = {s.generator for s in shapes.values()}
    psis = {s.psi for s in shapes.values() if not s.file}

    def name(shape: Shape) -> str:
        if shape.file:
            return f"{shape.generator}: {shape.source.rpartition('/')[2]}"
        # Multiplication by a truth value adds a part only where shapes differ in it.
        more = [f"generator {shape.generator[:8]}"] * (len(generators) > 1) + [f"psi {shape.psi:g}"] * (
            len(psis) > 1
        )
        return ", ".join([f"seed {shape.seed}", *more])

    comparisons = []
    for row in rows:
        left = shapes[_same(row.left)]
        right = shapes[_same(row.right)]
        if row.choice == Choice.SKIP or row.kind == Kind.GOLD or left is right:
            continue
        winner, loser = (left, right) if row.choice != Choice.RIGHT else (right, left)
        comparisons.append(Comparison(winner, loser, row.choice.equal))
    return comparisons, name


def _same(shape: Shape) -> tuple:
    """Return a key that is equal for equal shapes, also for assets, whose psi and level are nan."""
    # nan is unequal to itself, but its text is equal.
    return (
        shape.generator,
        shape.source,
        shape.seed,
        shape.file,
        f"{shape.psi} {shape.level} {shape.resolution}",
        shape.degradation,
    )


def _strengths(
    comparisons: list[Comparison], name: Callable[[Shape], str], limits: QualityLimits
) -> list[dict]:
    """Fit Bradley-Terry strengths to the shapes that are compared often enough, best first."""
    partners: dict[Any, set] = defaultdict(set)  # shape -> shapes that it was compared with
    times: Counter = Counter()
    for c in comparisons:
        partners[c.winner].add(c.loser)
        partners[c.loser].add(c.winner)
        times.update((c.winner, c.loser))
    # An item with one opponent has no reliable strength: it stays only if that opponent has several.
    ranked = {shape for shape, opponents in partners.items() if len(opponents) >= 2}
    ranked |= {other for shape in ranked for other in partners[shape]}
    kept = set(sorted(ranked, key=lambda s: (-times[s], s.generator, s.seed, s.psi))[: limits.strengths])
    used = [c for c in comparisons if c.winner in kept and c.loser in kept]
    if not used:
        return []
    result = bradley_terry(used)
    # A stable sort: shapes of equal strength stay in the order of the fit.
    order = np.argsort(-result.strength, kind="stable")
    return [
        {
            "label": name(result.items[i]),
            "strength": float(result.strength[i]),
            "ci95": (
                [float(result.lo[i]), float(result.hi[i])] if times[result.items[i]] >= LEAST_UNITS else None
            ),
            "comparisons": times[result.items[i]],
            "regularised": result.regularised,
        }
        for i in order
    ]


# ---- the leaderboard of a campaign's generators


def leaderboard_of(rows: Iterable[JudgementRow], question: str | None = None) -> Leaderboard:
    """Compute the leaderboard of the overall answers, or of the votes on a question.

    Each annotator's first answer to a pair counts. Repeats, gold checks, training pairs, skips and answers
    that were taken back do not, nor do pairs of one generator. Answers of studies never count, because they
    would reveal the result. Games are clustered by the prompt of the shapes; without a prompt by their common
    seed; otherwise by the pair.
    """
    counted = sorted(
        (r for r in rows if r.kind == Kind.PAIR and r.mode == Mode.LABEL and not r.undone), key=lambda r: r.id
    )
    counted = [r for r in counted if r.choice != Choice.SKIP and r.left.generator != r.right.generator]
    if question is not None:
        counted = answers_to(question, counted)
    names = generator_names(shape for r in counted for shape in (r.left, r.right))
    # Later entries of a dictionary replace earlier ones. Reversed order keeps the first answer to each pair.
    games = {(r.annotator, r.campaign, r.pair): _game(r, names) for r in reversed(counted)}
    return leaderboard(list(games.values())[::-1])


def _game(row: JudgementRow, names: dict[str, str]) -> Game:
    """Make a game of two generators; its cluster is the prompt, the seed or the pair."""
    left = names[row.left.generator]
    right = names[row.right.generator]
    winner = {Choice.LEFT: left, Choice.RIGHT: right}.get(row.choice)
    # Shapes of the same latent resemble each other, so their games are not independent.
    seed = row.left.seed if row.left.seed == row.right.seed and not row.left.file else None
    prompt = row.left.condition or (("seed", seed) if seed is not None else ("pair", row.campaign, row.pair))
    return Game(left, right, winner, row.annotator, prompt, row.choice == Choice.BAD)


def generator_names(shapes: Iterable[Shape]) -> dict[str, str]:
    """Name each generator: an asset by its label, a network by its file, with the folder or the beginning of
    the hash where several files share a name.
    """
    first = {shape.generator: shape for shape in shapes}
    paths = {key: Path(shape.source or "bundled generator") for key, shape in first.items() if not shape.file}
    names = {key: paths[key].name if key in paths else key for key in first}
    # First the folder is added to names that occur twice, then the hash to those that still do.
    for parts in (2, 3):
        times = Counter(names.values())
        for key in [key for key in paths if times[names[key]] > 1]:
            names[key] = "/".join(paths[key].parts[-2:]) + (f" {key[:8]}" if parts == 3 else "")
    return names


def as_text(board: Leaderboard) -> str:
    """Format a leaderboard as a table for a terminal."""
    if not board.groups and not board.few:
        return "There are no comparisons of two generators yet."
    width = max(len(s.name) for s in (*(s for group in board.groups for s in group), *board.few))
    lines = []
    for group in board.groups:
        lines += [
            f"{'':>3} {'generator':<{width}} points   95 %             n  score  won lost tied both bad"
        ]
        lines += [f"{place:>2}. {_line(standing, width)}" for place, standing in enumerate(group, 1)] + [""]
    return "\n".join([*lines, *board.notes()])


def _line(s: Standing, width: int) -> str:
    # A bound that cannot be computed, as after wins only, leaves the interval open on that side.
    ends = f"{_end(s.lo)} to {_end(s.hi)}"
    if s.lo is None or s.hi is None:
        ends = (
            "any" if s.lo == s.hi else f"at most {_end(s.hi)}" if s.lo is None else f"at least {_end(s.lo)}"
        )
    points = "–" if s.points is None else f"{s.points:.0f}"
    return (
        f"{s.name:<{width}} {points:>6}   {ends:<14} {s.games:>4}  {s.score:>4.0%} {s.wins:>5} {s.losses:>4}"
        f" {s.ties:>4} {s.both_bad:>8}"
    )


def _end(value: float | None) -> str:
    """Format an end of an interval in Elo points."""
    return "" if value is None else f"{value:.0f}"
