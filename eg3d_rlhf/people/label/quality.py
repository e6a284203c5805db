"""How far judgements can be trusted: each annotator's pace, side bias, consistency and gold accuracy, and how
far annotators agree.

Pure functions of the store's rows; `quality_report` is what the admin page shows. Judgements taken back and
training rounds never count.
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
    """From where on something is flagged or left out."""

    gold_accuracy: float = 0.8  # below: flagged
    gold_least: int = 4  # gold checks before accuracy is judged
    fast_seconds: float = 1.0  # a median below: flagged
    least: int = 20  # judgements before pace, sides, ties and skips are judged
    side_p: float = 0.001  # two-sided exact test of left against right: flagged below
    one_sided: float = 0.03  # of shapes one by one: flagged where fewer, or all but fewer, are good
    consistency: float = 0.65  # flagged where the whole interval lies below
    skip_share: float = 0.3  # above: flagged
    tie_share: float = 0.7  # above: flagged
    break_seconds: float = 600.0  # a longer gap between two judgements is a break and not counted as work
    strengths: int = 400  # items at most in the Bradley-Terry fit; the most compared are kept


def counting(rows: Iterable[JudgementRow]) -> list[JudgementRow]:
    """Rows that say something: not taken back, not training, in order of receipt."""
    return sorted((r for r in rows if not r.undone and r.kind != Kind.TRAINING), key=lambda r: r.id)


def side_free(row: JudgementRow) -> str:
    """The answer without sides: 'first', 'second', 'tie' (both bad is one) or 'skip'; of a shape by itself,
    the answer.
    """
    if row.choice.equal:
        return Choice.TIE.value
    if row.choice not in (Choice.LEFT, Choice.RIGHT):
        return row.choice.value
    return "first" if (row.choice == Choice.LEFT) == row.first_is_left else "second"


def quality_report(rows: Iterable[JudgementRow], limits: QualityLimits | None = None) -> dict:
    """All figures as JSON types; None where there is nothing to say.

    Campaigns in study mode get no strengths: they would give away the result before the study is over. Shapes
    one by one have none.
    """
    limits = limits or QualityLimits()
    rows = list(rows)
    kept = counting(rows)
    changed = {row.assignment for row in rows if row.undone}
    by_annotator: dict[str, list[JudgementRow]] = defaultdict(list)
    for row in kept:
        by_annotator[row.annotator].append(row)
    labelling = [r for r in kept if r.mode == Mode.LABEL]
    comparisons, names = _comparisons(labelling)
    return {
        "judgements": len(kept),
        "annotators": [
            annotator_quality(name, mine, limits, changed) for name, mine in sorted(by_annotator.items())
        ],
        "agreement": agreement(kept),
        "bradley_terry": _strengths(comparisons, names, limits),
        "cycles": cycles(comparisons),
        "questions": by_question(kept),
        "leaderboards": leaderboards(kept),
        "timeline": timeline(kept),
    }


def annotator_quality(
    name: str, rows: Sequence[JudgementRow], limits: QualityLimits, changed: Collection[str] = ()
) -> dict:
    """One annotator's figures from her counting rows, with flags in words.

    Args: changed: assignments whose answer was changed, perhaps after a look at an earlier one: they say
        nothing about consistency.
    """
    lasting = [row for row in rows if row.assignment not in changed]
    choices = Counter(r.choice for r in rows)
    left = choices[Choice.LEFT]
    right = choices[Choice.RIGHT]
    seconds = [r.milliseconds / 1000 for r in rows if r.choice != Choice.SKIP and r.milliseconds > 0]
    gold = [r for r in rows if r.kind == Kind.GOLD and r.expected is not None and r.choice != Choice.SKIP]
    gaps = [b - a for a, b in itertools.pairwise(sorted(r.received_at for r in rows))]
    worked = [gap for gap in gaps if gap <= limits.break_seconds]
    out = {
        "name": name,
        "judgements": len(rows),
        "ties": choices[Choice.TIE],
        "both_bad": choices[Choice.BAD],
        "skips": choices[Choice.SKIP],
        "last": rows[-1].received_at if rows else None,
        "skip_reasons": dict(Counter(r.reason or "other" for r in rows if r.choice == Choice.SKIP)),
        "median_seconds": statistics.median(seconds) if seconds else None,
        "per_hour": 3600 * len(worked) / sum(worked) if sum(worked) > 0 else None,
        **_share(
            "good_share",
            sum(r.choice.good is True for r in rows),
            sum(r.choice.good is not None for r in rows),
        ),
        **_share("left_share", left, left + right),
        "left_right_n": left + right,
        "left_p": binomial_test(left, left + right),
        **_consistency("self_consistency", lasting, Kind.REPEAT),
        **_consistency("swap_consistency", lasting, Kind.SWAP),
        **_share(
            "gold_accuracy", sum(r.choice.meets(r.expected) for r in gold), len(gold), "gold_n", "gold_ci95"
        ),
    }
    return {**out, "flags": _flags(out, limits)}


def agreement(rows: Iterable[JudgementRow]) -> dict:
    """Cohen's kappa of every two annotators who share pairs, and Krippendorff's alpha of all, over left out
    sides: first, second, tie.

    Below LEAST_UNITS common pairs there is no figure, and `needs` says how many more it takes.
    """
    # to each pair, by annotator; gold aside, on which all should agree
    answers: dict[int, dict[str, str]] = defaultdict(dict)
    for row in counting(rows):
        if row.kind != Kind.GOLD and row.choice != Choice.SKIP:
            answers[row.pair].setdefault(row.annotator, side_free(row))
    shared: dict[tuple[str, str], list[tuple[str, str]]] = defaultdict(list)
    for given in answers.values():
        for a, b in itertools.combinations(sorted(given), 2):
            shared[a, b].append((given[a], given[b]))
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
    """Of shapes of two or more generators: overall, then of each question that was asked besides; none of a
    study.
    """
    if len({shape.generator for row in rows for shape in (row.left, row.right)}) < 2:
        return []
    asked = dict.fromkeys(name for row in rows for name in row.votes)
    boards = {name: leaderboard_of(rows, name) for name in (None, *asked)}
    return [{"question": name, **board.to_dict()} for name, board in boards.items() if board.games]


def by_question(rows: Iterable[JudgementRow]) -> list[dict]:
    """Of each question that was asked besides: counts, how far the votes go with the overall answer, and
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
    """Counts of a question's votes, and how many chose the same side in all; JSON types."""
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
    """Judgements and median seconds over time: bins of whole minutes, at most `bins` between the first and
    the last.
    """
    if not rows:
        return []
    start = min(r.received_at for r in rows)
    end = max(r.received_at for r in rows)
    # minutes, hours and days, in seconds
    widths = itertools.chain((60, 300, 900, 3600, 4 * 3600), itertools.count(86400, 86400))
    width = next(w for w in widths if (end - start) / w < bins - 1)
    filled: dict[int, list[JudgementRow]] = defaultdict(list)
    for row in rows:
        filled[int(row.received_at // width)].append(row)
    return [
        {
            "time": place * width,
            "seconds": width,
            "judgements": len(judged),
            "median_seconds": statistics.median(r.milliseconds for r in judged) / 1000,
            "annotators": dict(sorted(Counter(r.annotator for r in judged).items())),
        }
        for place, judged in sorted(filled.items())
    ]


def _share(name: str, hits: int, n: int, n_name: str | None = None, interval: str | None = None) -> dict:
    """A share with its count and Wilson interval, which few have none of: below LEAST_UNITS; None where
    nothing was counted.
    """
    bounds = list(wilson_interval(hits, n)) if n >= LEAST_UNITS else None
    figures = {
        name: hits / n if n else None,
        interval or f"{name}_ci95": bounds,
        f"{name}_needs": max(0, LEAST_UNITS - n),
    }
    return {**figures, **({n_name: n} if n_name else {})}


def _consistency(name: str, rows: Sequence[JudgementRow], kind: Kind) -> dict:
    first: dict[int, str] = {}
    hits = n = 0
    for row in rows:
        if row.choice == Choice.SKIP:
            continue
        if row.kind == kind and row.pair in first:
            n += 1
            hits += side_free(row) == first[row.pair]
        elif row.kind == Kind.PAIR:
            first.setdefault(row.pair, side_free(row))
    return _share(name, hits, n, f"{name}_n")


def _flags(figures: dict, limits: QualityLimits) -> list[str]:
    n = figures["judgements"]
    flags = []
    if figures["gold_n"] >= limits.gold_least and figures["gold_accuracy"] < limits.gold_accuracy:
        flags.append(f"gold checks: {figures['gold_accuracy']:.0%} of {figures['gold_n']} right")
    if n >= limits.least:
        if figures["median_seconds"] is not None and figures["median_seconds"] < limits.fast_seconds:
            flags.append(f"fast: {figures['median_seconds']:.1f} s in the median")
        if figures["left_p"] < limits.side_p:
            flags.append(f"side bias: left in {figures['left_share']:.0%} of {figures['left_right_n']}")
        if (
            figures["good_share"] is not None
            and not limits.one_sided <= figures["good_share"] <= 1 - limits.one_sided
        ):
            flags.append(f"one-sided: good in {figures['good_share']:.0%}")
        if figures["skips"] > limits.skip_share * n:
            flags.append(f"skips {figures['skips']} of {n}")
        if figures["ties"] + figures["both_bad"] > limits.tie_share * n:
            flags.append(f"ties {figures['ties'] + figures['both_bad']} of {n}")
    for name, words in (("self_consistency", "repeats"), ("swap_consistency", "swapped repeats")):
        bounds = figures[f"{name}_ci95"]
        if bounds is not None and bounds[1] < limits.consistency:
            flags.append(
                f"inconsistent: {figures[name]:.0%} of {figures[f'{name}_n']} {words} answered as before"
            )
    return flags


def _comparisons(rows: Sequence[JudgementRow]) -> tuple[list[Comparison], Callable[[Shape], str]]:
    """Comparisons of shapes, and how to name a shape: by its seed, and by its generator and psi where these
    differ.
    """
    shapes = {_same(s): s for r in rows for s in (r.left, r.right)}
    generators = {s.generator for s in shapes.values()}
    psis = {s.psi for s in shapes.values() if not s.file}

    def name(shape: Shape) -> str:
        if shape.file:
            return f"{shape.generator}: {shape.source.rpartition('/')[2]}"
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
    """Equal for equal shapes, assets among them, whose psi and level are nan."""
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
    partners: dict[Any, set] = defaultdict(set)  # by shape
    times: Counter = Counter()
    for c in comparisons:
        partners[c.winner].add(c.loser)
        partners[c.loser].add(c.winner)
        times.update((c.winner, c.loser))
    ranked = {shape for shape, met in partners.items() if len(met) >= 2}
    ranked |= {other for shape in ranked for other in partners[shape]}
    kept = set(sorted(ranked, key=lambda s: (-times[s], s.generator, s.seed, s.psi))[: limits.strengths])
    used = [c for c in comparisons if c.winner in kept and c.loser in kept]
    if not used:
        return []
    result = bradley_terry(used)
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
    """The leaderboard of judgements, or of the votes on a question.

    Each annotator's first answer to a pair counts: no repeats, gold checks, practice, skips or answers taken
    back. Pairs of one generator say nothing of it. A study's answers never count: they would give its result
    away. Games are clustered by the shapes' condition; where they have none, by their seed if it is one, else
    by the pair.
    """
    kept = sorted(
        (r for r in rows if r.kind == Kind.PAIR and r.mode == Mode.LABEL and not r.undone), key=lambda r: r.id
    )
    kept = [r for r in kept if r.choice != Choice.SKIP and r.left.generator != r.right.generator]
    if question is not None:
        kept = answers_to(question, kept)
    names = generator_names(shape for r in kept for shape in (r.left, r.right))
    games = {(r.annotator, r.campaign, r.pair): _game(r, names) for r in reversed(kept)}
    return leaderboard(list(games.values())[::-1])


def _game(row: JudgementRow, names: dict[str, str]) -> Game:
    left = names[row.left.generator]
    right = names[row.right.generator]
    winner = {Choice.LEFT: left, Choice.RIGHT: right}.get(row.choice)
    seed = row.left.seed if row.left.seed == row.right.seed and not row.left.file else None
    prompt = row.left.condition or (("seed", seed) if seed is not None else ("pair", row.campaign, row.pair))
    return Game(left, right, winner, row.annotator, prompt, row.choice == Choice.BAD)


def generator_names(shapes: Iterable[Shape]) -> dict[str, str]:
    """What to call each generator: an asset's label; a network's file, with its folder or the hash's
    beginning where files share a name.
    """
    first = {shape.generator: shape for shape in shapes}
    paths = {key: Path(shape.source or "bundled generator") for key, shape in first.items() if not shape.file}
    names = {key: paths[key].name if key in paths else key for key in first}
    for parts in (2, 3):
        times = Counter(names.values())
        for key in [key for key in paths if times[names[key]] > 1]:
            names[key] = "/".join(paths[key].parts[-2:]) + (f" {key[:8]}" if parts == 3 else "")
    return names


def as_text(board: Leaderboard) -> str:
    """A table to read in a terminal."""
    if not board.groups and not board.few:
        return "No comparisons of two generators yet."
    width = max(len(s.name) for s in (*(s for group in board.groups for s in group), *board.few))
    lines = []
    for group in board.groups:
        lines += [
            f"{'':>3} {'generator':<{width}} points   95 %             n  score  won lost tied both bad"
        ]
        lines += [f"{place:>2}. {_line(standing, width)}" for place, standing in enumerate(group, 1)] + [""]
    return "\n".join([*lines, *board.notes()])


def _line(s: Standing, width: int) -> str:
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
    return "" if value is None else f"{value:.0f}"
