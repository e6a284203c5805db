"""How far judgements can be trusted: each annotator's pace, side bias, consistency and gold accuracy, and how far annotators agree.

Pure functions of the store's rows; `quality_report` is what the admin page shows. Judgements taken back and training rounds never count.
"""

import itertools
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from eg3d_rlhf.core.statistics import binomial_test, wilson_interval
from eg3d_rlhf.people.label.entities import Choice, JudgementRow, Kind, Mode, Shape
from eg3d_rlhf.people.label.leaderboards import leaderboard_of
from eg3d_rlhf.people.label.questions import answers_to, figures
from eg3d_rlhf.preferences.agreement import LEAST_UNITS, cohen_kappa, krippendorff_alpha
from eg3d_rlhf.preferences.bradley_terry import Comparison, bradley_terry, cycles


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
    """The answer without sides: 'first', 'second', 'tie' (both bad is one) or 'skip'; of a shape by itself, the answer."""
    if row.choice.equal:
        return Choice.TIE.value
    if row.choice not in (Choice.LEFT, Choice.RIGHT):
        return row.choice.value
    return "first" if (row.choice == Choice.LEFT) == row.first_is_left else "second"


def quality_report(rows: Iterable[JudgementRow], limits: QualityLimits | None = None) -> dict:
    """All figures as JSON types; None where there is nothing to say.

    Campaigns in study mode get no strengths: they would give away the result before the study is over. Shapes one by one have none.
    """
    limits, rows = limits or QualityLimits(), list(rows)
    kept, changed = counting(rows), {row.assignment for row in rows if row.undone}
    by_annotator: dict[str, list[JudgementRow]] = defaultdict(list)
    for row in kept:
        by_annotator[row.annotator].append(row)
    labelling = [r for r in kept if r.mode == Mode.LABEL]
    comparisons, names = _comparisons(labelling)
    return {
        "judgements": len(kept),
        "annotators": [annotator_quality(name, mine, limits, changed) for name, mine in sorted(by_annotator.items())],
        "agreement": agreement(kept),
        "bradley_terry": _strengths(comparisons, names, limits),
        "cycles": cycles(comparisons).to_dict(),
        "questions": by_question(kept),
        "leaderboards": leaderboards(kept),
        "timeline": timeline(kept),
    }


def annotator_quality(name: str, rows: Sequence[JudgementRow], limits: QualityLimits, changed: Collection[str] = ()) -> dict:
    """One annotator's figures from her counting rows, with flags in words.

    Args: changed: assignments whose answer was changed, perhaps after a look at an earlier one: they say nothing about consistency.
    """
    lasting = [row for row in rows if row.assignment not in changed]
    choices = Counter(r.choice for r in rows)
    left, right = choices[Choice.LEFT], choices[Choice.RIGHT]
    seconds = [r.milliseconds / 1000 for r in rows if r.choice != Choice.SKIP and r.milliseconds > 0]
    gold = [r for r in rows if r.kind == Kind.GOLD and r.expected is not None and r.choice != Choice.SKIP]
    gaps = [b - a for a, b in itertools.pairwise(sorted(r.received_at for r in rows))]
    worked = [gap for gap in gaps if gap <= limits.break_seconds]
    out = {
        "name": name, "judgements": len(rows), "ties": choices[Choice.TIE], "both_bad": choices[Choice.BAD], "skips": choices[Choice.SKIP],
        "last": rows[-1].received_at if rows else None,
        "skip_reasons": dict(Counter(r.reason or "other" for r in rows if r.choice == Choice.SKIP)),
        "median_seconds": statistics.median(seconds) if seconds else None,
        "per_hour": 3600 * len(worked) / sum(worked) if sum(worked) > 0 else None,
        **_share("good_share", sum(r.choice.good is True for r in rows), sum(r.choice.good is not None for r in rows)),
        **_share("left_share", left, left + right), "left_right_n": left + right, "left_p": binomial_test(left, left + right),
        **_consistency("self_consistency", lasting, Kind.REPEAT), **_consistency("swap_consistency", lasting, Kind.SWAP),
        **_share("gold_accuracy", sum(r.choice.meets(r.expected) for r in gold), len(gold), "gold_n", "gold_ci95"),
    }  # fmt: skip
    return {**out, "flags": _flags(out, limits)}


def agreement(rows: Iterable[JudgementRow]) -> dict:
    """Cohen's kappa of every two annotators who share pairs, and Krippendorff's alpha of all, over left out sides: first, second, tie.

    Below LEAST_UNITS common pairs there is no figure, and `needs` says how many more it takes.
    """
    answers: dict[int, dict[str, str]] = defaultdict(dict)  # to each pair, by annotator; gold aside, on which all should agree
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
        kappas.append({"a": a, "b": b, "kappa": result.value if result.lo is not None else None, "ci95": result.to_dict()["ci95"], **same})
    alpha = krippendorff_alpha(list(answers.values()))
    shown = alpha.value if alpha.lo is not None else None
    return {
        "cohen_kappa": kappas, "krippendorff_alpha": shown, "alpha_ci95": alpha.to_dict()["ci95"], "alpha_n": alpha.n,
        "alpha_needs": max(0, LEAST_UNITS - alpha.n), "least": LEAST_UNITS,
    }  # fmt: skip


def leaderboards(rows: Sequence[JudgementRow]) -> list[dict]:
    """Of shapes of two or more generators: overall, then of each question that was asked besides; none of a study."""
    if len({shape.generator for row in rows for shape in (row.left, row.right)}) < 2:
        return []
    asked = dict.fromkeys(name for row in rows for name in row.votes)
    found = {name: leaderboard_of(rows, name) for name in (None, *asked)}
    return [{"question": name, **board.to_dict()} for name, board in found.items() if board.games]


def by_question(rows: Iterable[JudgementRow]) -> list[dict]:
    """Of each question that was asked besides: counts, how far the votes go with the overall answer, and Krippendorff's alpha."""
    rows = [row for row in rows if row.kind != Kind.GOLD]
    names = dict.fromkeys(name for row in rows for name in row.votes)
    return [{**figures(name, rows), **_alpha(answers_to(name, rows))} for name in names]


def _alpha(rows: Iterable[JudgementRow]) -> dict:
    return {name: value for name, value in agreement(rows).items() if name != "cohen_kappa"}


def timeline(rows: Sequence[JudgementRow], bins: int = 240) -> list[dict]:
    """Judgements and median seconds over time: bins of whole minutes, at most `bins` between the first and the last."""
    if not rows:
        return []
    start, end = min(r.received_at for r in rows), max(r.received_at for r in rows)
    widths = itertools.chain((60, 300, 900, 3600, 4 * 3600), itertools.count(86400, 86400))  # minutes, hours and days, in seconds
    width = next(w for w in widths if (end - start) / w < bins - 1)
    filled: dict[int, list[JudgementRow]] = defaultdict(list)
    for row in rows:
        filled[int(row.received_at // width)].append(row)
    return [
        {
            "time": place * width, "seconds": width, "judgements": len(found),
            "median_seconds": statistics.median(r.milliseconds for r in found) / 1000,
            "annotators": dict(sorted(Counter(r.annotator for r in found).items())),
        }
        for place, found in sorted(filled.items())
    ]  # fmt: skip


def _share(name: str, hits: int, n: int, n_name: str | None = None, interval: str | None = None) -> dict:
    """A share with its count and Wilson interval, which few have none of: below LEAST_UNITS; None where nothing was counted."""
    bounds = list(wilson_interval(hits, n)) if n >= LEAST_UNITS else None
    found = {name: hits / n if n else None, interval or f"{name}_ci95": bounds, f"{name}_needs": max(0, LEAST_UNITS - n)}
    return {**found, **({n_name: n} if n_name else {})}


def _consistency(name: str, rows: Sequence[JudgementRow], kind: Kind) -> dict:
    """Share of repeats of a kind that were answered as the pair was the first time."""
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


def _flags(found: dict, limits: QualityLimits) -> list[str]:
    n, flags = found["judgements"], []
    if found["gold_n"] >= limits.gold_least and found["gold_accuracy"] < limits.gold_accuracy:
        flags.append(f"gold checks: {found['gold_accuracy']:.0%} of {found['gold_n']} right")
    if n >= limits.least:
        if found["median_seconds"] is not None and found["median_seconds"] < limits.fast_seconds:
            flags.append(f"fast: {found['median_seconds']:.1f} s in the median")
        if found["left_p"] < limits.side_p:
            flags.append(f"side bias: left in {found['left_share']:.0%} of {found['left_right_n']}")
        if found["good_share"] is not None and not limits.one_sided <= found["good_share"] <= 1 - limits.one_sided:
            flags.append(f"one-sided: good in {found['good_share']:.0%}")
        if found["skips"] > limits.skip_share * n:
            flags.append(f"skips {found['skips']} of {n}")
        if found["ties"] + found["both_bad"] > limits.tie_share * n:
            flags.append(f"ties {found['ties'] + found['both_bad']} of {n}")
    for name, words in (("self_consistency", "repeats"), ("swap_consistency", "swapped repeats")):
        bounds = found[f"{name}_ci95"]
        if bounds is not None and bounds[1] < limits.consistency:
            flags.append(f"inconsistent: {found[name]:.0%} of {found[f'{name}_n']} {words} answered as before")
    return flags


def _comparisons(rows: Sequence[JudgementRow]) -> tuple[list[Comparison], Callable[[Shape], str]]:
    """Comparisons of shapes, and how to name a shape: by its seed, and by its generator and psi where these differ."""
    shapes = {_same(s): s for r in rows for s in (r.left, r.right)}
    generators, psis = {s.generator for s in shapes.values()}, {s.psi for s in shapes.values() if not s.file}

    def name(shape: Shape) -> str:
        if shape.file:
            return f"{shape.generator}: {shape.source.rpartition('/')[2]}"
        more = [f"generator {shape.generator[:8]}"] * (len(generators) > 1) + [f"psi {shape.psi:g}"] * (len(psis) > 1)
        return ", ".join([f"seed {shape.seed}", *more])

    found = []
    for row in rows:
        left, right = shapes[_same(row.left)], shapes[_same(row.right)]
        if row.choice == Choice.SKIP or row.kind == Kind.GOLD or left is right:
            continue
        winner, loser = (left, right) if row.choice != Choice.RIGHT else (right, left)
        found.append(Comparison(winner, loser, row.choice.equal))
    return found, name


def _same(shape: Shape) -> tuple:
    """Equal for equal shapes, assets among them, whose psi and level are nan."""
    return shape.generator, shape.source, shape.seed, shape.file, f"{shape.psi} {shape.level} {shape.resolution}", shape.degradation


def _strengths(comparisons: list[Comparison], name: Callable[[Shape], str], limits: QualityLimits) -> list[dict]:
    """Strengths, best first, of shapes that met at least two others; the most compared where there are too many."""
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
            "label": name(result.items[i]), "strength": float(result.strength[i]),
            "ci95": [float(result.lo[i]), float(result.hi[i])] if times[result.items[i]] >= LEAST_UNITS else None,
            "comparisons": times[result.items[i]], "regularised": result.regularised,
        }
        for i in order
    ]  # fmt: skip
