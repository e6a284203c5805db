"""The analysis that the design prescribes: from judgements to win rates, tests, annotators and exclusions, as JSON types.

Letters: N trials.
"""

import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

import numpy as np

from eg3d_rlhf.label.entities import Choice, JudgementRow, Kind, Mode
from eg3d_rlhf.label.quality import agreement
from eg3d_rlhf.metrics.statistics import binomial_test, wilson_interval
from eg3d_rlhf.study.design import StudyDesign, stopped
from eg3d_rlhf.study.estimate import cluster_bootstrap, win_rate


@dataclass
class Sorted:
    """The study's rows, taken apart by the design's rules."""

    trials: list[JudgementRow]  # the planned number at most, in order of receipt
    late: int  # answers to pairs beyond that number
    gold: list[JudgementRow]
    annotators: dict[str, str] = field(default_factory=dict)  # left out: name -> reason
    fast: list[JudgementRow] = field(default_factory=list)  # single trials left out of annotators who stay

    def kept(self) -> list[JudgementRow]:
        """Trials of the primary result, skips among them."""
        out = {r.id for r in self.fast}
        return [r for r in self.trials if r.annotator not in self.annotators and r.id not in out]


def analyse(design: StudyDesign, rows: Iterable[JudgementRow], interim: bool = False, now: datetime | None = None) -> dict:
    """All figures of a study.

    Raises: ValueError before the stopping rule is met (unless `interim`, which marks the result), for rows of another study, and for
    answers from before the design was written.
    """
    rows = [r for r in rows if not r.undone]
    _check(design, rows)
    found = sort_rows(design, rows)
    answered = len(found.trials)
    over = stopped(design, answered, now)
    if not over and not interim:
        until = f", or until {design.until}" if design.until else ""
        raise ValueError(
            f"study {design.name}: expected {design.trials} answered trials{until}, got {answered}. Wait for them, as designed; --interim "
            "shows what there is and marks the report."
        )
    kept = found.kept()
    other = "excluded" if design.ties == "half" else "half"
    return {
        "design": design.to_dict(), "interim": not over, "answered": answered, "late": found.late,
        "reported": (now or datetime.now(UTC)).isoformat(timespec="seconds"),
        "result": estimate(kept, design.ties, design.confidence, design.resamples),
        "sensitivity": {
            "without exclusions": estimate(found.trials, design.ties, design.confidence),
            f"ties {other}": estimate(kept, other, design.confidence),
            "sides weighted equally": _side_adjusted(kept, design.ties),
        },
        "sides": _sides(kept, design.ties), "annotators": _annotators(design, found), "exclusions": _exclusions(found),
        "agreement": agreement(kept), "pairs": _pairs(kept, design.ties),
    }  # fmt: skip


def sort_rows(design: StudyDesign, rows: Sequence[JudgementRow]) -> Sorted:
    """Trials, gold checks and exclusions, by the design's rules."""
    answers = sorted((r for r in rows if r.kind == Kind.PAIR), key=lambda r: r.id)
    end = datetime.fromisoformat(design.until).timestamp() if design.until else np.inf
    trials = [r for r in answers if r.received_at <= end][: design.trials]
    gold = [r for r in rows if r.kind == Kind.GOLD and r.choice != Choice.SKIP]
    found = Sorted(trials=trials, late=len(answers) - len(trials), gold=gold)
    rules = design.exclusions
    for name in sorted({r.annotator for r in trials}):
        mine = [r for r in trials if r.annotator == name]
        right = [r.choice == r.expected for r in gold if r.annotator == name]
        fast = [r for r in mine if is_fast(r, rules.fast_milliseconds)]
        if len(right) >= rules.gold_least and sum(right) < rules.gold_accuracy * len(right):
            found.annotators[name] = f"gold checks: {sum(right)} of {len(right)} right, below {rules.gold_accuracy:.0%}"
        elif len(fast) > rules.fast_share * len(mine):
            found.annotators[name] = f"too fast: {len(fast)} of {len(mine)} trials under {rules.fast_milliseconds} ms"
        elif len(mine) < rules.least_share * min(design.share, len(trials) / design.annotators):
            found.annotators[name] = f"incomplete: {len(mine)} of {design.share} trials"
        else:
            found.fast += fast
    return found


def is_fast(row: JudgementRow, milliseconds: int) -> bool:
    """Whether a trial was answered too soon to have been looked at; skipping may be quick."""
    return row.choice != Choice.SKIP and row.milliseconds < milliseconds


def score(row: JudgementRow, ties: str) -> float:
    """1 where b (the pair's second shape) was preferred, 0 where a was; ties by the rule; NaN where the trial does not count."""
    if row.choice == Choice.SKIP:
        return np.nan
    if row.choice == Choice.TIE:
        return 0.5 if ties == "half" else np.nan
    return float((row.choice == Choice.LEFT) != row.first_is_left)


def estimate(rows: Sequence[JudgementRow], ties: str, confidence: float = 0.95, resamples: int = 0) -> dict:
    """Win rate with every interval and test that the design names; figures are None without a trial that counts.

    Args: resamples: of the bootstraps; 0: none.
    """
    scores = np.array([score(r, ties) for r in rows])  # [N]
    choices = Counter(r.choice for r in rows)
    decided = [s for s, r in zip(scores, rows, strict=True) if r.choice in (Choice.LEFT, Choice.RIGHT)]
    wins = int(sum(decided))
    out: dict = {
        "n": int(np.sum(~np.isnan(scores))), "b_wins": wins, "a_wins": len(decided) - wins, "ties": choices[Choice.TIE],
        "skips": choices[Choice.SKIP], "annotators": len({r.annotator for r in rows}), "latents": len({r.pair for r in rows}),
        "confidence": confidence, "p_exact": binomial_test(wins, len(decided)) if decided else None,
    }  # fmt: skip
    if not out["n"]:
        return {**out, **dict.fromkeys(("win_rate", "interval", "wilson", "p_clustered", "design_effect", "degrees_of_freedom"))}
    annotator, latent = (np.unique([getattr(r, name) for r in rows], return_inverse=True)[1] for name in ("annotator", "pair"))
    found = win_rate(scores, annotator, latent, confidence)
    out |= {
        "win_rate": float(found.rate[0]), "interval": _pair(found.clustered), "wilson": _pair(found.wilson),
        "p_clustered": float(found.p_clustered[0]), "design_effect": float(found.design_effect[0]),
        "degrees_of_freedom": int(found.degrees[0]),
    }  # fmt: skip
    if resamples:
        kinds = ("annotators", "latents", "both")
        drawn = {over: cluster_bootstrap(scores, annotator, latent, over, confidence, resamples) for over in kinds}
        out["bootstrap"] = {over: None if bounds is None else list(bounds) for over, bounds in drawn.items()}
    return out


def _pair(bounds) -> list[float]:
    return [float(bounds.lo[0]), float(bounds.hi[0])]


def _check(design: StudyDesign, rows: Sequence[JudgementRow]) -> None:
    foreign = {r.campaign for r in rows if r.campaign != design.name or r.mode != Mode.STUDY}
    if foreign:
        names = ", ".join(sorted(foreign))
        raise ValueError(f"study {design.name}: expected its own answers, got some of {names}. Name the right database.")
    expected = (design.a.generator, design.b.generator)
    for row in rows:
        first, second = (row.left, row.right) if row.first_is_left else (row.right, row.left)
        if row.kind == Kind.PAIR and (first.generator, second.generator, first.seed) != (*expected, second.seed):
            raise ValueError(
                f"study {design.name}: expected pairs of its two generators and one latent, got others in answer {row.id}. Name the right "
                "database."
            )
    begun = datetime.fromisoformat(design.created).timestamp()
    if rows and min(r.received_at for r in rows) < begun:
        raise ValueError(
            f"study {design.name}: expected the design to be older than the first answer, got one created at {design.created}, after it. "
            "A study cannot be designed over answers that exist; start a new one."
        )


def _sides(rows: Sequence[JudgementRow], ties: str) -> dict:
    """How the sides fell and what they did: the win rate with b on either side; None where there is none."""
    out: dict = {"b_left": sum(not r.first_is_left for r in rows), "n": len(rows)}
    out["p_random"] = binomial_test(out["b_left"], out["n"])
    for name, b_left in (("win_rate_b_left", True), ("win_rate_b_right", False)):
        scores = np.array([score(r, ties) for r in rows if r.first_is_left != b_left])
        out[name] = float(np.nanmean(scores)) if np.sum(~np.isnan(scores)) else None
    decided = [r for r in rows if r.choice in (Choice.LEFT, Choice.RIGHT)]
    left = sum(r.choice == Choice.LEFT for r in decided)
    return {**out, "left_share": left / len(decided) if decided else None, "left_ci": list(wilson_interval(left, len(decided)))}


def _side_adjusted(rows: Sequence[JudgementRow], ties: str) -> dict:
    sides = _sides(rows, ties)
    both = (sides["win_rate_b_left"], sides["win_rate_b_right"])
    return {"n": sides["n"], "win_rate": None if None in both else sum(both) / 2}


def _annotators(design: StudyDesign, found: Sorted) -> list[dict]:
    """One line per annotator, those left out among them; the rates are over all her trials."""
    table = []
    for name in sorted({r.annotator for r in found.trials}):
        mine = [r for r in found.trials if r.annotator == name]
        gold = [r.choice == r.expected for r in found.gold if r.annotator == name]
        scores = np.array([score(r, design.ties) for r in mine])
        n = int(np.sum(~np.isnan(scores)))
        sides, choices = _sides(mine, design.ties), Counter(r.choice for r in mine)
        table.append({
            "name": name, "trials": len(mine), "ties": choices[Choice.TIE], "skips": choices[Choice.SKIP], "n": n,
            "win_rate": float(np.nanmean(scores)) if n else None, "wilson": list(wilson_interval(float(np.nansum(scores)), n)),
            "left_share": sides["left_share"], "left_ci": sides["left_ci"], "gold_right": sum(gold), "gold_n": len(gold),
            "median_seconds": statistics.median(r.milliseconds for r in mine) / 1000,
            "fast": sum(is_fast(r, design.exclusions.fast_milliseconds) for r in mine), "excluded": found.annotators.get(name),
        })  # fmt: skip
    return table


def _exclusions(found: Sorted) -> list[dict]:
    """Everything that was answered and does not count, with the reason and the number of trials."""
    trials = Counter(r.annotator for r in found.trials)
    out = [{"what": f"annotator {name}", "reason": reason, "trials": trials[name]} for name, reason in sorted(found.annotators.items())]
    fast = Counter(r.annotator for r in found.fast)
    out += [{"what": f"single trials of {name}", "reason": "answered too fast", "trials": n} for name, n in sorted(fast.items())]
    if found.late:
        out.append({"what": "answers after the planned number or time", "reason": "the study was over", "trials": found.late})
    return out


def _pairs(rows: Sequence[JudgementRow], ties: str) -> list[dict]:
    """Each latent's mean score and answers, best for b first."""
    scores: dict[int, list[float]] = defaultdict(list)
    for row in rows:
        value = score(row, ties)
        if not np.isnan(value):
            scores[row.left.seed].append(value)
    out = [{"seed": seed, "win_rate": sum(values) / len(values), "n": len(values)} for seed, values in scores.items()]
    return sorted(out, key=lambda p: (-p["win_rate"], -p["n"] if p["win_rate"] > 0.5 else p["n"], p["seed"]))
