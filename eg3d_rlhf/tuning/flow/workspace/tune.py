"""Tune a generator's stages on people's pairs, and test each stage against a control with randomised labels.

    STAGE/               weights, where they did; nothing where they did not: the base stays
    control/STAGE/       weights of the control, trained alike on randomised labels
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
from eg3d_rlhf.tuning.flow.base.pairs import PairsByStage, PreferencePair
from eg3d_rlhf.tuning.flow.base.problem import Problem
from eg3d_rlhf.tuning.flow.base.settings import EVALUATORS
from eg3d_rlhf.tuning.flow.training.accuracy import (
    LEAST_CONDITIONS,
    Accuracy,
    PairAccuracy,
    accuracy_of,
    confidence_of,
    half_inverted,
    signal_test,
)
from eg3d_rlhf.tuning.flow.training.circular.circular_loop import CircularLoop, check, run_loop, whole_weights
from eg3d_rlhf.tuning.flow.training.circular.settings import PAIRS, RANDOMISED, CircularSettings
from eg3d_rlhf.tuning.flow.training.conditioned_stage import ConditionedStage
from eg3d_rlhf.tuning.flow.training.pair_training import train_stage
from eg3d_rlhf.tuning.flow.training.reference import FrozenModel
from eg3d_rlhf.tuning.flow.training.settings import TrainConfig
from eg3d_rlhf.tuning.flow.training.trainer import FREE, POLICY, StageResult
from eg3d_rlhf.tuning.flow.workspace.work_folder import Tuning
from training.distributed import SINGLE, Ranks

REPORT = "report"
CONTROL = "control"
TRAINING = "training"
LOOP = "loop"
FINAL_DRAWS = 8  # times and noises of a pair in the test
MOST_EVALUATED = 200  # pairs on which the accuracy of an evaluator is measured: each takes two decoded assets
# (stage, network, file): a picture of what it makes, see samples.py
Samples = Callable[[str, torch.nn.Module, Path], Path]
NOTHING = "no learnable signal"
SIGNAL = "learnable signal"
DISPLACED = (
    "likelihood displacement: the error of the preferred assets rose by {}, so expect worse samples. Reduce"
    " the step: --set loser_weight below 1, a lower --lr, a larger --set beta."
)


@dataclass(frozen=True, kw_only=True)
class StageLabels:
    """A stage and its preference pairs. Conditions of the three kinds are disjoint."""

    conditioned: ConditionedStage
    train: Sequence[PreferencePair]
    choose: Sequence[PreferencePair]  # that choose among networks while training
    held_out: Sequence[PreferencePair]  # that test whether the labels were learnt

    @classmethod
    def from_problem(cls, problem: Problem, stage: str) -> "StageLabels":
        """Take a stage and its pairs. Raises: ValueError for a stage that is not there or has no pairs."""
        return cls(
            conditioned=ConditionedStage.from_pipeline(problem.pipeline, stage),
            train=problem.train_pairs[stage],
            choose=problem.choosing_pairs(stage),
            held_out=problem.held_out_pairs(stage),
        )

    def check(self) -> None:
        """Raise ValueError for too few pairs to train, to choose or to test on."""
        parts = {"to train on": self.train, "to choose on": self.choose, "to tell by": self.held_out}
        counts = {what: len({pair.condition for pair in pairs}) for what, pairs in parts.items()}
        least = {"to train on": 1, "to choose on": 1, "to tell by": LEAST_CONDITIONS}
        if any(counts[what] < least[what] for what in parts):
            got = ", ".join(f"{count} {what}" for what, count in counts.items())
            raise ValueError(
                f"tune({self.conditioned.stage.name}): expected labels of 1 condition to train on, 1 to"
                f" choose on and {LEAST_CONDITIONS} to tell by, got {got}. Label assets of more pictures or"
                " texts, or hold more of them out."
            )

    def randomised(self, seed: int) -> "StageLabels":
        """Return the control's labels: nothing is left to learn of the pairs that are trained on; those that
        choose are people's own.
        """
        return replace(self, train=half_inverted(self.train, seed))


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
    """Train, evaluate on held-out labels, and write the report; returns it.

    Args: labels: facts of the labels that the report repeats, JSON; say: prints lines, on rank 0 alone;
        samples: draws a picture at every evaluation.
    Raises: ValueError, before anything is trained, for too few labels to hold any out, and for a loop that
        cannot be.
    """
    names = settings.stages or [s.name for s in problem.pipeline.stages if s.name in problem.train_pairs]
    stages = {name: StageLabels.from_problem(problem, name) for name in names}
    for of_stage in stages.values():
        of_stage.check()
    if settings.loop:
        check(problem)
    say_main = say if ranks.main else lambda line: None
    evaluators = evaluator_accuracies(problem) if ranks.main and settings.loop else {}
    for name, found in evaluators.items():
        say_main(
            f"Evaluator {name!r} orders {found} of pairs that it was not fitted"
            f" to{'' if found.interval[0] > 0.5 else CHANCE}."
        )
    circular = replace(settings.circular, choosing=None)
    seed = circular.seed
    common = (circular, folder, ranks, say_main)
    if settings.loop:
        trained = _train_loop(problem, *common)
    else:
        trained = _train_stages(stages, problem.identity, *common, samples=samples)
    control: Mapping[str, StageResult] = {}
    if settings.control:
        say_main("The control: the same, with half of each condition's answers inverted.")
        if settings.loop:
            control = _train_loop(randomised(problem, seed), *common, control=True)
        else:
            inverted = {name: of_stage.randomised(seed) for name, of_stage in stages.items()}
            control = _train_stages(inverted, problem.identity, *common, control=True)
    report: dict = {}
    if ranks.main:
        report = {
            **_tests(stages, trained, control, folder, seed + 1, say),
            "loop": settings.loop,
            "settings": asdict(settings),
            "problem": dict(problem.identity),
            "versions": versions(),
            "evaluators": {name: found.shown() for name, found in evaluators.items()},
            "labels": dict(labels or {}),
        }
        write(report, folder, REPORT, markdown)
    return ranks.broadcast(report)


CHANCE = ": its accuracy is not above chance, so its selections are random"


def randomised(problem: Problem, seed: int) -> Problem:
    """Return the loop's problem for the control; see StageLabels.randomised."""
    pairs = PairsByStage(problem.train_pairs, lambda stage: half_inverted(problem.train_pairs[stage], seed))
    return replace(
        problem, train_pairs=pairs, identity={**problem.identity, "shuffled": seed}
    )  # hashed, as in 0.1


def _train_stages(
    stages: Mapping[str, StageLabels],
    identity: Mapping,
    circular: CircularSettings,
    folder: Path,
    ranks: Ranks,
    say: Callable[[str], None],
    control: bool = False,
    samples: Samples | None = None,
) -> dict[str, StageResult]:
    """Train stages one by one, each once. Args: identity: of the problem."""
    store = Store(folder / TRAINING / (CONTROL if control else ""), ranks, hashed=False)
    trained = {}
    for name, labels in stages.items():
        say(f"Stage {name!r}{', control' if control else ''}:")
        config = circular.human.at(labels.conditioned.stage, circular.seed)
        inputs = {
            "step": "train",
            "problem": dict(identity),
            "control": control,
            "stage": name,
            "config": {k: v for k, v in asdict(config).items() if k not in FREE},
        }

        def maker(
            place: Path, name: str = name, labels: StageLabels = labels, config: TrainConfig = config
        ) -> tuple[list[Path], dict]:
            result = train_stage(
                labels.conditioned,
                labels.train,
                config,
                place,
                unseen=labels.choose,
                ranks=ranks,
                resume=True,
                say=say,
                samples=None if samples is None else functools.partial(samples, name),
            )
            return [result.weights], result.record()

        done = store.make(name, inputs, maker)
        trained[name] = StageResult(
            weights=done.folder / POLICY,
            kept_step=done.record["kept_step"],
            stats=[],
            warnings=done.record["warnings"],
        )
    return trained


def _train_loop(
    problem: Problem,
    circular: CircularSettings,
    folder: Path,
    ranks: Ranks,
    say: Callable[[str], None],
    control: bool = False,
) -> dict[str, StageResult]:
    """Train all stages by the loop. Args: problem: of the control for the control."""
    place = Path(CONTROL if control else "")
    loop = CircularLoop(
        problem=problem,
        settings=circular,
        store=Store(folder / LOOP / place, ranks, say),
        ranks=ranks,
        use=RANDOMISED if control else PAIRS,
        say=say,
        bars=ranks.main,
    )
    lineage, _ = run_loop(loop)
    return {
        stage: _of_artefact(loop, stage, line, folder / TRAINING / place / stage)
        for stage, line in lineage.items()
    }


def _of_artefact(loop: CircularLoop, stage: str, line: Sequence[Artefact], place: Path) -> StageResult:
    """The network behind a stage of the loop; of several rounds the whole of it, written once."""
    records = [one.record for one in line]
    weights = whole_weights(loop, stage, line, place)
    warnings = [text for record in records for text in record["warnings"]]
    return StageResult(
        weights=weights, kept_step=sum(record["kept_step"] for record in records), stats=[], warnings=warnings
    )


def _tests(
    labels: Mapping[str, StageLabels],
    trained: Mapping[str, StageResult],
    control: Mapping[str, StageResult],
    folder: Path,
    seed: int,
    say: Callable[[str], None],
) -> dict:
    """Test every stage on its held-out pairs; put the weights of those that learnt in their places.

    Args: seed: of the times and noises of the test.
    """
    confidence = confidence_of(len(trained))
    stages = {}
    for stage, arm in trained.items():
        of_stage = labels[stage]
        conditions = [pair.condition for pair in of_stage.held_out]
        measured = PairAccuracy(of_stage.conditioned, of_stage.held_out, draws=FINAL_DRAWS, seed=seed)
        own = _measured(measured, arm, confidence)
        other = _measured(measured, control[stage], confidence) if stage in control else None
        test = signal_test(arm.kept_step, own, other, conditions, confidence)
        stages[stage] = {
            "learnable_signal": test.learnable_signal,
            "likelihood_displacement": test.likelihood_displacement,
            "why": test.why,
            "pairs": len(of_stage.train),
            "kept_step": arm.kept_step,
            "held_out": own.shown(),
            "control": None if other is None else other.shown(),
            "above_control": None if test.above_control is None else list(test.above_control),
            "warnings": list(arm.warnings),
            "weights": stage if test.learnable_signal else None,
        }
        say(f"Stage {stage!r}: {SIGNAL if test.learnable_signal else NOTHING}: {test.why}.")
        if test.likelihood_displacement:
            say(f"Stage {stage!r}: {DISPLACED.format(_rise(own.shown()))}")
        if test.learnable_signal:
            link_folder(arm.weights, folder / stage)
        if stage in control:
            link_folder(control[stage].weights, folder / CONTROL / stage)
    kept = [stage for stage, found in stages.items() if found["learnable_signal"]]
    say(
        f"Weights in {', '.join(str(folder / stage) for stage in kept)}."
        if kept
        else f"{NOTHING.capitalize()}: the base stays as it is."
    )
    return {"stages": stages, "kept": kept, "confidence": confidence}


def _measured(measured: PairAccuracy, arm: StageResult, confidence: float) -> Accuracy:
    base = measured.stage.model
    found = measured.measure(tuned_model(base, arm.weights), FrozenModel(shared_copy(base)))
    return accuracy_of(
        found.margins, [pair.condition for pair in measured.pairs], confidence, found.preferred
    )


def evaluator_accuracies(problem: Problem) -> dict[str, Accuracy]:
    """Measure how well the problem's evaluators order people's pairs of the last stage that they were not
    fitted to, MOST_EVALUATED at most each.
    """
    last = problem.pipeline.stages[-1].name
    found = {}
    people = problem.train_pairs[last] if last in problem.train_pairs else []
    unseen = [] if problem.unseen_pairs is None else problem.unseen_pairs[last]
    for name in EVALUATORS:
        evaluator = getattr(problem, name)
        fitted = set(problem.fitted_to.get(name, ()))
        if evaluator is None:
            continue
        pairs = [pair for pair in (*people, *unseen) if pair.condition not in fitted]
        pairs = sorted(pairs, key=lambda pair: pair.id)[:: max(1, -(-len(pairs) // MOST_EVALUATED))]
        if len({pair.condition for pair in pairs}) < LEAST_CONDITIONS:
            continue
        device = next(problem.pipeline.stages[-1].model.parameters()).device
        names = [pair.condition for pair in pairs]
        scores = [
            evaluator(
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
        "with randomised labels",
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
        said = f"**{SIGNAL}**" if found["learnable_signal"] else NOTHING
        said += ", likelihood displacement" if found["likelihood_displacement"] else ""
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
        "# " + (f"Learnable signal: {kept}" if kept else f"{NOTHING.capitalize()}; the base stays"),
        "",
        *markdown_rows(head, rows),
        "",
    ]
    lines += [
        (
            "Accuracy: share of pairs, of conditions that neither trained nor chose the network, that its"
            f" implicit reward orders as people did. Brackets: {data['confidence']:.1%} intervals over"
            " conditions. Learnable signal: both intervals are above chance, so that answers given at"
            " random pass in 5 % of tunings at most. Error of the preferred: what it rose by; where it rises"
            " (likelihood displacement), samples get worse."
        ),
    ]
    if data["evaluators"]:
        rows = [[name, _with_interval(found), found["pairs"]] for name, found in data["evaluators"].items()]
        lines += [
            "",
            "Evaluators, on pairs that they were not fitted to:",
            "",
            *markdown_rows(["evaluator", "accuracy", "pairs"], rows),
        ]
    if data["labels"]:
        lines += ["", *(f"- {name.replace('_', ' ')}: {value}" for name, value in data["labels"].items())]
    warnings = [f"- {stage}: {text}" for stage, found in data["stages"].items() for text in found["warnings"]]
    return "\n".join([*lines, *(["", "Warnings while training:", "", *warnings] if warnings else [])]) + "\n"


def _with_interval(found: Mapping) -> str:
    return f"{found['accuracy']:.3f} [{found['interval'][0]:.3f}, {found['interval'][1]:.3f}]"


def _rise(found: Mapping) -> str:
    return "{:+.1%} [{:+.1%}, {:+.1%}]".format(*found["preferred_error"])
