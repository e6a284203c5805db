"""Tune a generator's stages on people's pairs, and test each stage against a control with randomised labels.

    STAGE/               tuned weights; absent if the labels carried no learnable signal
    control/STAGE/       weights of the control, trained in the same way on randomised labels
    training/STAGE/      files of a training, such as stats.jsonl; training/control/STAGE/: of the control
    loop/, loop/control/ the steps of the circular loop, with --loop
    report.json, report.md

The criterion, its intervals and the control are defined in accuracy.py. A second call with the same settings
reuses all finished work.
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
FINAL_DRAWS = 8  # random (time, noise) draws per pair in the test
MOST_EVALUATED = 200  # pairs on which an evaluator's accuracy is measured; each needs two decoded assets
# (stage, network, file to write) -> the file, an image of the network's samples; see sample_strips.py
Samples = Callable[[str, torch.nn.Module, Path], Path]
NOTHING = "no learnable signal"
SIGNAL = "learnable signal"
DISPLACED = (
    "likelihood displacement: the error of the preferred assets rose by {}, so expect worse samples. Reduce"
    " the step: --set loser_weight below 1, a lower --lr, a larger --set beta."
)


@dataclass(frozen=True, kw_only=True)
class StageLabels:
    """A stage and its preference pairs. The prompts of the three groups of pairs are disjoint."""

    conditioned: ConditionedStage
    train: Sequence[PreferencePair]
    choose: Sequence[PreferencePair]  # for the choice among checkpoints during training
    held_out: Sequence[PreferencePair]  # for the test against the randomised-label control

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
        parts = {"to train on": self.train, "to choose on": self.choose, "to test on": self.held_out}
        # prompts are counted, not pairs: intervals are over prompts, whose pairs are not independent
        counts = {use: len({pair.condition for pair in pairs}) for use, pairs in parts.items()}
        least = {"to train on": 1, "to choose on": 1, "to test on": LEAST_CONDITIONS}
        if any(counts[use] < least[use] for use in parts):
            got = ", ".join(f"{count} {use}" for use, count in counts.items())
            raise ValueError(
                f"tune({self.conditioned.stage.name}): expected labels for at least 1 prompt to train on, 1"
                f" to choose on and {LEAST_CONDITIONS} to test on, got {got}. Label assets of more prompts,"
                " or hold out more of them."
            )

    def randomised(self, seed: int) -> "StageLabels":
        """Return the control's labels: half of the training pairs are inverted, so that they carry no signal.

        The pairs that choose checkpoints keep people's labels.
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
    """Train the stages, test them on held-out labels, and write and return the report.

    Args: labels: facts about the labels that the report repeats, JSON; say: prints a line, on rank 0 only;
        samples: renders an image of samples at every evaluation.
    Raises: ValueError, before anything is trained, for too few labels to hold any out, and for a problem that
        the loop cannot train.
    """
    # by default every stage that has pairs, in the order of the pipeline
    names = settings.stages or [s.name for s in problem.pipeline.stages if s.name in problem.train_pairs]
    stages = {name: StageLabels.from_problem(problem, name) for name in names}
    # all stages are checked before the first one is trained, which may take hours
    for of_stage in stages.values():
        of_stage.check()
    if settings.loop:
        check(problem)
    say_main = say if ranks.main else lambda line: None
    evaluators = evaluator_accuracies(problem) if ranks.main and settings.loop else {}
    for name, accuracy in evaluators.items():
        above_chance = accuracy.interval[0] > 0.5
        say_main(
            f"Evaluator {name!r} orders {accuracy} of pairs that it was not fitted"
            f" to{'' if above_chance else CHANCE}."
        )
    # checkpoints are chosen on labelled pairs here, not by a reward of generated assets
    circular = replace(settings.circular, choosing=None)
    seed = circular.seed
    common = (circular, folder, ranks, say_main)
    if settings.loop:
        trained = _train_loop(problem, *common)
    else:
        trained = _train_stages(stages, problem.identity, *common, samples=samples)
    control: Mapping[str, StageResult] = {}
    # the control has the same settings and seeds; only its labels differ
    if settings.control:
        say_main(
            "Control: the same training on randomised labels (half of each prompt's answers are inverted)."
        )
        if settings.loop:
            control = _train_loop(randomised(problem, seed), *common, control=True)
        else:
            randomised_stages = {name: of_stage.randomised(seed) for name, of_stage in stages.items()}
            control = _train_stages(randomised_stages, problem.identity, *common, control=True)
    report: dict = {}
    # seed + 1: other times and noises than with the seed of the training
    if ranks.main:
        report = {
            **_tests(stages, trained, control, folder, seed + 1, say),
            "loop": settings.loop,
            "settings": asdict(settings),
            "problem": dict(problem.identity),
            "versions": versions(),
            "evaluators": {name: accuracy.shown() for name, accuracy in evaluators.items()},
            "labels": dict(labels or {}),
        }
        write(report, folder, REPORT, markdown)
    return ranks.broadcast(report)


CHANCE = ": its accuracy is not above chance, so its selections are random"


def randomised(problem: Problem, seed: int) -> Problem:
    """Return the loop's problem with the control's labels; see StageLabels.randomised."""
    pairs = PairsByStage(problem.train_pairs, lambda stage: half_inverted(problem.train_pairs[stage], seed))
    # the identity is hashed into the names of artefacts, so its key keeps the spelling of version 0.1
    return replace(problem, train_pairs=pairs, identity={**problem.identity, "shuffled": seed})


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
    """Train the stages one by one; a stage that is already trained is read from the store.

    Args: identity: the problem's, which names the artefacts.
    """
    store = Store(folder / TRAINING / (CONTROL if control else ""), ranks, hashed=False)
    trained = {}
    for name, labels in stages.items():
        say(f"Stage {name!r}{', control' if control else ''}:")
        # settings that do not change the result are left out of the inputs, so that they may change
        config = circular.human.at(labels.conditioned.stage, circular.seed)
        inputs = {
            "step": "train",
            "problem": dict(identity),
            "control": control,
            "stage": name,
            "config": {k: v for k, v in asdict(config).items() if k not in FREE},
        }

        # defaults bind the loop's variables now: the store may call the function in a later iteration
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
        # the same fields for a reused stage, whose statistics are not read again
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
    """Train all stages with the circular loop. Args: problem: for the control, the one of `randomised`."""
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
    """Describe the network that the loop's rounds made of a stage, and write its weights to `place`."""
    records = [artefact.record for artefact in line]
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
    """Test every stage on its held-out pairs, and link the weights of the stages that pass into `folder`.

    Args: seed: of the times and noises of the test.
    """
    # several stages are tested at once, so the level is corrected for their number
    confidence = confidence_of(len(trained))
    stages = {}
    for stage, arm in trained.items():
        of_stage = labels[stage]
        prompts = [pair.condition for pair in of_stage.held_out]
        # one object for both arms: tuned network and control see the same times and noises
        measured = PairAccuracy(of_stage.conditioned, of_stage.held_out, draws=FINAL_DRAWS, seed=seed)
        tuned = _measured(measured, arm, confidence)
        control_accuracy = _measured(measured, control[stage], confidence) if stage in control else None
        test = signal_test(arm.kept_step, tuned, control_accuracy, prompts, confidence)
        stages[stage] = {
            "learnable_signal": test.learnable_signal,
            "likelihood_displacement": test.likelihood_displacement,
            "why": test.why,
            "pairs": len(of_stage.train),
            "kept_step": arm.kept_step,
            "held_out": tuned.shown(),
            "control": None if control_accuracy is None else control_accuracy.shown(),
            "above_control": None if test.above_control is None else list(test.above_control),
            "warnings": list(arm.warnings),
            "weights": stage if test.learnable_signal else None,
        }
        say(f"Stage {stage!r}: {SIGNAL if test.learnable_signal else NOTHING}: {test.why}.")
        if test.likelihood_displacement:
            say(f"Stage {stage!r}: {DISPLACED.format(_rise(tuned.shown()))}")
        # weights of a stage without a signal stay in training/, so that they are not exported by mistake
        if test.learnable_signal:
            link_folder(arm.weights, folder / stage)
        if stage in control:
            link_folder(control[stage].weights, folder / CONTROL / stage)
    kept = [stage for stage, tested in stages.items() if tested["learnable_signal"]]
    say(
        f"Tuned weights are in {', '.join(str(folder / stage) for stage in kept)}."
        if kept
        else f"{NOTHING.capitalize()}: the base generator is kept unchanged."
    )
    return {"stages": stages, "kept": kept, "confidence": confidence}


def _measured(measured: PairAccuracy, arm: StageResult, confidence: float) -> Accuracy:
    """Measure the accuracy of an arm's network on held-out pairs, by its implicit reward."""
    base = measured.stage.model
    # the reference shares the base's weights: a second copy would double the memory
    margins = measured.measure(tuned_model(base, arm.weights), FrozenModel(shared_copy(base)))
    prompts = [pair.condition for pair in measured.pairs]
    return accuracy_of(margins.margins, prompts, confidence, margins.preferred)


def evaluator_accuracies(problem: Problem) -> dict[str, Accuracy]:
    """Measure how often the problem's evaluators order pairs of the last stage as people did.

    Each evaluator is measured on at most MOST_EVALUATED pairs of prompts that it was not fitted to.
    Evaluators with pairs of too few prompts are left out.
    """
    last = problem.pipeline.stages[-1].name
    accuracies = {}
    people = problem.train_pairs[last] if last in problem.train_pairs else []
    unseen = [] if problem.unseen_pairs is None else problem.unseen_pairs[last]
    for name in EVALUATORS:
        evaluator = getattr(problem, name)
        fitted = set(problem.fitted_to.get(name, ()))
        # a problem may lack some evaluators
        if evaluator is None:
            continue
        pairs = [pair for pair in (*people, *unseen) if pair.condition not in fitted]
        # every k-th pair in the order of ids, so that the selection covers all prompts
        pairs = sorted(pairs, key=lambda pair: pair.id)[:: max(1, -(-len(pairs) // MOST_EVALUATED))]
        # too few prompts for an interval over prompts
        if len({pair.condition for pair in pairs}) < LEAST_CONDITIONS:
            continue
        device = next(problem.pipeline.stages[-1].model.parameters()).device
        names = [pair.condition for pair in pairs]
        # decoded one at a time, which bounds memory; [n] scores for each side
        scores = [
            evaluator(
                [problem.pipeline.decode(collate([getattr(pair, side)]).to(device))[0] for pair in pairs],
                names,
            )
            .double()
            .cpu()
            for side in ("preferred", "rejected")
        ]
        accuracies[name] = accuracy_of((scores[0] - scores[1]).numpy(), names)
    return accuracies


# Reports for people to read.


def markdown(data: Mapping) -> str:
    """Format the report as Markdown, from its JSON alone."""
    head = [
        "stage",
        "labels",
        "accuracy on held-out pairs",
        "with randomised labels",
        "difference",
        "error of the preferred",
        "kept update",
        "pairs, prompts",
    ]
    rows = []
    for stage, tested in data["stages"].items():
        tuned = tested["held_out"]
        control = tested["control"]
        above = tested["above_control"]  # (difference, low, high) to the control's accuracy
        result = f"**{SIGNAL}**" if tested["learnable_signal"] else NOTHING
        result += ", likelihood displacement" if tested["likelihood_displacement"] else ""
        rows.append(
            [
                stage,
                result,
                _with_interval(tuned),
                "" if control is None else _with_interval(control),
                "" if above is None else f"{above[0]:+.3f} [{above[1]:+.3f}, {above[2]:+.3f}]",
                _rise(tuned),
                tested["kept_step"],
                f"{tuned['pairs']}, {tuned['conditions']}",
            ]
        )
    kept = ", ".join(data["kept"])
    lines = [
        "# "
        + (f"Learnable signal: {kept}" if kept else f"{NOTHING.capitalize()}; the base generator is kept"),
        "",
        *markdown_rows(head, rows),
        "",
    ]
    lines += [
        (
            "Accuracy: share of held-out pairs that the network's implicit reward orders as people did. The"
            " prompts of held-out pairs were used neither for training nor for choosing a checkpoint."
            f" Brackets: {data['confidence']:.1%} intervals over prompts. Learnable signal: both intervals"
            " are above chance, so that random answers pass in at most 5 % of tunings. Error of the"
            " preferred: relative rise of the flow-matching error of preferred assets; a rise (likelihood"
            " displacement) means worse samples."
        ),
    ]
    if data["evaluators"]:
        rows = [[name, _with_interval(held), held["pairs"]] for name, held in data["evaluators"].items()]
        lines += [
            "",
            "Evaluators, on pairs that they were not fitted to:",
            "",
            *markdown_rows(["evaluator", "accuracy", "pairs"], rows),
        ]
    if data["labels"]:
        lines += ["", *(f"- {name.replace('_', ' ')}: {value}" for name, value in data["labels"].items())]
    warnings = [
        f"- {stage}: {text}" for stage, tested in data["stages"].items() for text in tested["warnings"]
    ]
    return "\n".join([*lines, *(["", "Warnings while training:", "", *warnings] if warnings else [])]) + "\n"


def _with_interval(accuracy: Mapping) -> str:
    """Format an accuracy and its interval."""
    low, high = accuracy["interval"]
    return f"{accuracy['accuracy']:.3f} [{low:.3f}, {high:.3f}]"


def _rise(accuracy: Mapping) -> str:
    """Format the relative rise of the preferred assets' error, and its interval."""
    return "{:+.1%} [{:+.1%}, {:+.1%}]".format(*accuracy["preferred_error"])
