"""Tune a generator's stages on people's pairs, and say of every stage whether its labels taught it anything.

    STAGE/               weights, where they did; nothing where they did not: the base stays
    control/STAGE/       weights of the control, trained alike on shuffled labels
    training/STAGE/      stats.jsonl and what else a training keeps (train.py); training/control/STAGE/ the
                         control's
    loop/, loop/control/ the steps of the loop, where it was asked for
    report.json, report.md

The rule, its intervals and the control are those of accuracy.py. Everything is found again by a second call
with the same settings.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from eg3d_rlhf.core.cli import versions
from eg3d_rlhf.experiments.store import Artefact, Store
from eg3d_rlhf.experiments.table import markdown_rows, write
from eg3d_rlhf.models.policies import link_folder, shared_copy, tuned_model
from eg3d_rlhf.models.sparse import collate
from eg3d_rlhf.tuning.flow.base.evaluation import JUDGES
from eg3d_rlhf.tuning.flow.base.pairs import PairsByStage, PreferencePair
from eg3d_rlhf.tuning.flow.base.problem import Problem
from eg3d_rlhf.tuning.flow.base.stage import stage_of
from eg3d_rlhf.tuning.flow.training.accuracy import (
    LEAST_CONDITIONS,
    Accuracy,
    PairAccuracy,
    Verdict,
    accuracy_of,
    confidence_of,
    turned_by_coin,
    verdict,
)
from eg3d_rlhf.tuning.flow.training.circular.loop import (
    CircularLoop,
    CircularSettings,
    check,
    run_loop,
    whole_weights,
)
from eg3d_rlhf.tuning.flow.training.circular.loop_pairs import PAIRS, SHUFFLED
from eg3d_rlhf.tuning.flow.training.pair_training import train_stage
from eg3d_rlhf.tuning.flow.training.reference import FrozenModel
from eg3d_rlhf.tuning.flow.training.trainer import StageResult
from training.distributed import SINGLE, Ranks

REPORT = "report"
CONTROL = "control"
TRAINING = "training"
LOOP = "loop"
FINAL_DRAWS = 8  # times and noises of a pair behind a verdict
MOST_JUDGED = 200  # pairs that a judge's own accuracy is taken on: each takes two decoded assets
# (stage, network, file): a picture of what it makes, see samples.py
Samples = Callable[[str, torch.nn.Module, Path], Path]
NOTHING = "the labels teach nothing"
AWAY = (
    "it runs away: the error of the preferred ones rose by {}, so expect worse assets. Keep nearer: --set"
    " loser_weight below 1, a lower --lr, a larger --set beta."
)


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """What is trained, and with what beside it."""

    circular: CircularSettings  # `human` is how stages learn from people's pairs; the rest is the loop's
    stages: tuple[str, ...] = ()  # none: all that have pairs
    # stages before the last learn from what the one behind made better, in place of people's pairs
    loop: bool = False
    control: bool = True


def tune(
    problem: Problem,
    settings: Tuning,
    folder: Path,
    *,
    labels: Mapping | None = None,
    ranks: Ranks = SINGLE,
    say: Callable[[str], None] = print,
    samples: Samples | None = None,
) -> dict:
    """Train, judge by held-out labels, and write the report; returns it.

    Args: labels: facts of the labels that the report repeats, JSON; say: prints lines, on rank 0 alone;
        samples: draws a picture at every evaluation.
    Raises: ValueError, before anything is trained, for too few labels to hold any out, and for a loop that
        cannot be.
    """
    stages = list(settings.stages) or [
        stage.name for stage in problem.pipeline.stages if pairs_of(problem, stage.name)
    ]
    told = {stage: check_pairs_to_tell(problem, stage) for stage in stages}
    if settings.loop:
        check(problem)
    say_main = say if ranks.main else lambda line: None
    judges = judge_accuracies(problem) if ranks.main and settings.loop else {}
    for name, found in judges.items():
        say_main(
            f"Judge {name!r} orders {found} of pairs that it was not fitted"
            f" to{'' if found.interval[0] > 0.5 else DEAF}."
        )
    trained = _arm(problem, settings, stages, folder, ranks, say_main, samples=samples)
    control: Mapping[str, StageResult] = {}
    if settings.control:
        say_main("The control: the same, with half of each condition's answers turned over.")
        control = _arm(
            shuffled(problem, settings.circular.seed), settings, stages, folder, ranks, say_main, control=True
        )
    report: dict = {}
    if ranks.main:
        report = _report(problem, settings, told, trained, control, folder, say)
        report |= {
            "judges": {name: found.shown() for name, found in judges.items()},
            "labels": dict(labels or {}),
        }
        write(report, folder, REPORT, markdown)
    return ranks.broadcast(report)


DEAF = ": it knows no more than a coin, and what is chosen by it is chosen by chance"


def pairs_of(problem: Problem, stage: str) -> list[PreferencePair]:
    """Return the pairs to train a stage on; none where the stage has none."""
    return list(problem.train_pairs[stage]) if stage in problem.train_pairs else []


def check_pairs_to_tell(problem: Problem, stage: str) -> list[PreferencePair]:
    """Pairs that tell whether a stage's labels were learnt.

    Raises: ValueError for too few to train, to choose and to tell.
    """
    stage_of(problem.pipeline, stage)
    held = problem.held_out_pairs(stage)
    parts: dict[str, Sequence[PreferencePair]] = {
        "to train on": problem.train_pairs[stage],
        "to choose on": problem.choosing_pairs(stage),
        "to tell by": held,
    }
    counts = {what: len({pair.condition for pair in pairs}) for what, pairs in parts.items()}
    least = {"to train on": 1, "to choose on": 1, "to tell by": LEAST_CONDITIONS}
    if any(counts[what] < least[what] for what in parts):
        got = ", ".join(f"{count} {what}" for what, count in counts.items())
        raise ValueError(
            f"tune({stage}): expected labels of 1 condition to train on, 1 to choose on and"
            f" {LEAST_CONDITIONS} to tell by, got {got}. Label assets of more pictures or texts, or hold more"
            " of them out."
        )
    return held


def shuffled(problem: Problem, seed: int) -> Problem:
    """The control's problem: nothing is left to learn of the pairs that are trained on; those that choose are
    people's own.
    """

    pairs = PairsByStage(problem.train_pairs, lambda stage: turned_by_coin(problem.train_pairs[stage], seed))
    return replace(problem, train_pairs=pairs, identity={**problem.identity, "shuffled": seed})


def _arm(
    problem: Problem,
    settings: Tuning,
    stages: Sequence[str],
    folder: Path,
    ranks: Ranks,
    say: Callable[[str], None],
    control: bool = False,
    samples: Samples | None = None,
) -> dict[str, StageResult]:
    """Train all stages once. `problem` is the control's for the control."""
    place = Path(CONTROL) if control else Path()
    circular = replace(settings.circular, choosing=None)
    if settings.loop:
        store = Store(folder / LOOP / place, ranks, say)
        use = SHUFFLED if control else PAIRS
        loop = CircularLoop(
            problem=problem, settings=circular, store=store, ranks=ranks, use=use, say=say, bars=ranks.main
        )
        lineage, _ = run_loop(loop)
        return {
            stage: _of_artefact(loop, stage, line, folder / TRAINING / place / stage)
            for stage, line in lineage.items()
        }
    trained = {}
    for stage in stages:
        say(f"Stage {stage!r}{', control' if control else ''}:")
        config = circular.human.at(stage_of(problem.pipeline, stage), circular.seed)
        trained[stage] = train_stage(
            problem.pipeline,
            stage,
            problem.train_pairs[stage],
            config,
            folder / TRAINING / place / stage,
            unseen=problem.choosing_pairs(stage),
            ranks=ranks,
            resume=True,
            say=say,
            samples=None if samples is None else functools.partial(samples, stage),
        )
    return trained


def _of_artefact(loop: CircularLoop, stage: str, line: Sequence[Artefact], place: Path) -> StageResult:
    """The network behind a stage of the loop; of several rounds the whole of it, written once."""
    records = [one.record for one in line]
    weights = whole_weights(loop, stage, line, place)
    warnings = [text for record in records for text in record["warnings"]]
    return StageResult(
        weights=weights, kept_step=sum(record["kept_step"] for record in records), stats=[], warnings=warnings
    )


def _report(
    problem: Problem,
    settings: Tuning,
    told: Mapping[str, list[PreferencePair]],
    trained: Mapping[str, StageResult],
    control: Mapping[str, StageResult],
    folder: Path,
    say: Callable[[str], None],
) -> dict:
    """Verdicts of all stages, and the weights of those that learnt in their places."""
    confidence = confidence_of(len(trained))
    stages = {}
    for stage, arm in trained.items():
        pairs = told.get(stage) or check_pairs_to_tell(problem, stage)
        conditions = [pair.condition for pair in pairs]
        measured = PairAccuracy(
            problem.pipeline, stage, pairs, draws=FINAL_DRAWS, seed=settings.circular.seed + 1
        )
        own, other = (
            _measured(problem, stage, measured, found, confidence) for found in (arm, control.get(stage))
        )
        assert own is not None
        said = verdict(arm.kept_step, own, other, conditions, confidence)
        stages[stage] = _told(stage, arm, own, other, said, len(pairs_of(problem, stage)))
        say(f"Stage {stage!r}: {'learnt' if said.learnt else NOTHING}: {said.why}.")
        if said.runs_away:
            say(f"Stage {stage!r}: {AWAY.format(_rise(stages[stage]['held_out']))}")
        if said.learnt:
            link_folder(arm.weights, folder / stage)
        if stage in control:
            link_folder(control[stage].weights, folder / CONTROL / stage)
    kept = [stage for stage, found in stages.items() if found["learnt"]]
    say(
        f"Weights in {', '.join(str(folder / stage) for stage in kept)}."
        if kept
        else f"{NOTHING.capitalize()}: the base stays as it is."
    )
    return {
        "stages": stages,
        "kept": kept,
        "confidence": confidence,
        "loop": settings.loop,
        "settings": asdict(settings),
        "problem": dict(problem.identity),
        "versions": versions(),
    }


def _measured(
    problem: Problem, stage: str, measured: PairAccuracy, arm: StageResult | None, confidence: float
) -> Accuracy | None:
    if arm is None:
        return None
    base = stage_of(problem.pipeline, stage).model
    found = measured.measure(tuned_model(base, arm.weights), FrozenModel(shared_copy(base)))
    return accuracy_of(
        found.margins, [pair.condition for pair in measured.pairs], confidence, found.preferred
    )


def _told(
    stage: str, arm: StageResult, own: Accuracy, other: Accuracy | None, said: Verdict, pairs: int
) -> dict:
    above = said.above_control
    return {
        "learnt": said.learnt,
        "runs_away": said.runs_away,
        "why": said.why,
        "pairs": pairs,
        "kept_step": arm.kept_step,
        "held_out": own.shown(),
        "control": None if other is None else other.shown(),
        "above_control": None if above is None else list(above),
        "warnings": list(arm.warnings),
        "weights": stage if said.learnt else None,
    }


def judge_accuracies(problem: Problem) -> dict[str, Accuracy]:
    """How well the problem's judges order people's pairs of the last stage that they were not fitted to,
    MOST_JUDGED at most each.
    """
    last = problem.pipeline.stages[-1].name
    found = {}
    unseen = [] if problem.unseen_pairs is None else problem.unseen_pairs[last]
    for name in JUDGES:
        judge = getattr(problem, name)
        fitted = set(problem.fitted_to.get(name, ()))
        if judge is None:
            continue
        pairs = [pair for pair in (*pairs_of(problem, last), *unseen) if pair.condition not in fitted]
        pairs = sorted(pairs, key=lambda pair: pair.id)[:: max(1, -(-len(pairs) // MOST_JUDGED))]
        if len({pair.condition for pair in pairs}) < LEAST_CONDITIONS:
            continue
        device = next(problem.pipeline.stages[-1].model.parameters()).device
        names = [pair.condition for pair in pairs]
        scores = [
            judge(
                [problem.pipeline.decode(collate([getattr(pair, side)]).to(device))[0] for pair in pairs],
                names,
            )
            .double()
            .cpu()
            for side in ("preferred", "rejected")
        ]
        found[name] = accuracy_of((scores[0] - scores[1]).numpy(), names)
    return found


# For people.


def markdown(data: Mapping) -> str:
    """The report, from its JSON alone."""
    head = [
        "stage",
        "labels",
        "accuracy on held-out pairs",
        "with shuffled labels",
        "difference",
        "error of the preferred",
        "kept update",
        "pairs, conditions",
    ]
    rows = []
    for stage, found in data["stages"].items():
        own = found["held_out"]
        other = found["control"]
        above = found["above_control"]
        said = (
            ("**learnt**, runs away" if found["runs_away"] else "**learnt**") if found["learnt"] else NOTHING
        )
        rows.append(
            [
                stage,
                said,
                _with_interval(own),
                "" if other is None else _with_interval(other),
                "" if above is None else f"{above[0]:+.3f} [{above[1]:+.3f}, {above[2]:+.3f}]",
                _rise(own),
                found["kept_step"],
                f"{own['pairs']}, {own['conditions']}",
            ]
        )
    kept = ", ".join(data["kept"])
    lines = [
        "# " + (f"Learnt: {kept}" if kept else f"{NOTHING.capitalize()}; the base stays"),
        "",
        *markdown_rows(head, rows),
        "",
    ]
    lines += [
        (
            "Accuracy: share of pairs, of conditions that neither trained nor chose the network, that its"
            f" implicit reward orders as people did. Brackets: {data['confidence']:.1%} intervals over"
            " conditions. Learnt: both intervals above what chance gives, so that answers given at random"
            " pass in 5 % of tunings at most. Error of the preferred: what it rose by; where it rises, the"
            " network runs from the rejected ones, and assets get worse."
        ),
    ]
    if data["judges"]:
        rows = [[name, _with_interval(found), found["pairs"]] for name, found in data["judges"].items()]
        lines += [
            "",
            "Judges, on pairs that they were not fitted to:",
            "",
            *markdown_rows(["judge", "accuracy", "pairs"], rows),
        ]
    if data["labels"]:
        lines += ["", *(f"- {name.replace('_', ' ')}: {value}" for name, value in data["labels"].items())]
    warnings = [f"- {stage}: {text}" for stage, found in data["stages"].items() for text in found["warnings"]]
    return "\n".join([*lines, *(["", "Warnings while training:", "", *warnings] if warnings else [])]) + "\n"


def _with_interval(found: Mapping) -> str:
    return f"{found['accuracy']:.3f} [{found['interval'][0]:.3f}, {found['interval'][1]:.3f}]"


def _rise(found: Mapping) -> str:
    return "{:+.1%} [{:+.1%}, {:+.1%}]".format(*found["preferred_error"])
