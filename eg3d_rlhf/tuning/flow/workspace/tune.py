"""Tune the stages of a generator on people's pairs, and test each stage against a control with randomised
labels.

The folder of a training contains:

    STAGE/                      tuned weights of a stage; missing if the labels carried no learnable signal
    control/STAGE/              weights of the control, which is trained in the same way on randomised labels
    training/STAGE/             files of the training, such as stats.jsonl
    training/control/STAGE/     files of the training of the control
    loop/, loop/control/        steps of the circular loop (Circular-DPO), with --loop
    report.json, report.md      results of the tests

The criterion of the test, its intervals and the control are defined in training/accuracy.py. A second call
with the same settings reuses all steps that are finished.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType

import torch

from eg3d_rlhf.core.cli import versions
from eg3d_rlhf.experiments.store import Artefact, Store
from eg3d_rlhf.experiments.table import markdown_rows, write
from eg3d_rlhf.models.policies import link_folder, shared_copy, tuned_model
from eg3d_rlhf.models.sparse import collate
from eg3d_rlhf.tuning.flow.base.pairs import PreferencePair
from eg3d_rlhf.tuning.flow.base.problem import Problem
from eg3d_rlhf.tuning.flow.base.settings import EVALUATORS
from eg3d_rlhf.tuning.flow.training.accuracy import (
    MIN_PROMPTS,
    Accuracy,
    PairAccuracy,
    compute_accuracy,
    compute_confidence,
    invert_half,
    signal_test,
)
from eg3d_rlhf.tuning.flow.training.circular.circular_loop import (
    CircularLoop,
    check,
    network_weights,
    randomised,
    run_loop,
)
from eg3d_rlhf.tuning.flow.training.circular.settings import PAIRS, RANDOMISED, CircularSettings
from eg3d_rlhf.tuning.flow.training.conditioned_stage import ConditionedStage
from eg3d_rlhf.tuning.flow.training.pair_training import train_stage
from eg3d_rlhf.tuning.flow.training.reference import FrozenModel
from eg3d_rlhf.tuning.flow.training.settings import TrainConfig
from eg3d_rlhf.tuning.flow.training.trainer import CHANGEABLE_SETTINGS, POLICY, StageResult
from eg3d_rlhf.tuning.flow.workspace.sample_strips import LoadNetwork
from eg3d_rlhf.tuning.flow.workspace.work_folder import Tuning
from training import rehearsal
from training.distributed import SINGLE, Ranks

REPORT = "report"
CONTROL = "control"
TRAINING = "training"
LOOP = "loop"
FINAL_DRAWS = 8  # number of random (time, noise) pairs with which the test evaluates each preference pair
# Largest number of pairs on which the accuracy of an evaluator is measured; each needs two decoded assets.
MAX_EVALUATED = 200
# Function that renders samples of a network. Its arguments are the name of the stage, the network and the
# file to write, and its result is the file; see sample_strips.py.
Samples = Callable[[str, torch.nn.Module, Path], Path]
NOTHING = "no learnable signal"
SIGNAL = "learnable signal"
DISPLACED = (
    "likelihood displacement: the flow-matching error of the preferred assets rose by {}, which usually means"
    " worse samples. {}"
)
# What the number of attempts means: each further attempt on the same pairs is a further chance to pass.
ATTEMPT = (
    "this is attempt {} on the same held-out pairs, after {}. The best of several attempts passes more often"
    " than 5 % of the time with random answers; label new pairs of further prompts to confirm a signal."
)


@dataclass(frozen=True, kw_only=True)
class StageLabels:
    """A stage with its preference pairs, in three groups whose prompts are disjoint."""

    conditioned_stage: ConditionedStage  # the stage with its conditioning
    train: Sequence[PreferencePair]  # pairs to train on
    choose: Sequence[PreferencePair]  # pairs by which checkpoints are chosen during training
    held_out: Sequence[PreferencePair]  # pairs of the test against the control

    @classmethod
    def from_problem(cls, problem: Problem, stage: str) -> "StageLabels":
        """Create the labels of a stage from the pairs of a problem.

        Raises: ValueError if there is no such stage, or if it has no pairs.
        """
        return cls(
            conditioned_stage=ConditionedStage.from_pipeline(problem.pipeline, stage),
            train=problem.train_pairs[stage],
            choose=problem.choosing_pairs(stage),
            held_out=problem.held_out_pairs(stage),
        )

    def check(self) -> None:
        """Raise ValueError if there are too few prompts with pairs to train on, to choose on or held out."""
        pairs_by_use = {"to train on": self.train, "to choose on": self.choose, "held out": self.held_out}
        # Prompts and not pairs are counted, because the intervals are over prompts: pairs of a prompt are not
        # independent.
        prompt_counts = {use: len({pair.condition for pair in pairs}) for use, pairs in pairs_by_use.items()}
        required_counts = {"to train on": 1, "to choose on": 1, "held out": MIN_PROMPTS}
        if any(prompt_counts[use] < required_counts[use] for use in prompt_counts):
            count_texts = ", ".join(f"{count} {use}" for use, count in prompt_counts.items())
            raise ValueError(
                f"tune({self.conditioned_stage.stage.name}): labels are needed for at least 1 prompt to"
                f" train on, 1 to choose on and {MIN_PROMPTS} held out for the test, but there are labels for"
                f" {count_texts}. Label assets of more prompts."
            )

    def randomised(self, seed: int) -> "StageLabels":
        """Return the labels of the control, in which half of the training pairs are inverted.

        These labels carry no signal. The pairs by which checkpoints are chosen keep people's labels.

        Args:
            seed: seed of the choice of the inverted pairs.
        """
        return replace(self, train=invert_half(self.train, seed))

    @contextlib.contextmanager
    def with_network(self, load: LoadNetwork | None) -> Iterator[None]:
        """Load the network of the stage for the block, and drop it afterwards.

        Args:
            load: function that loads the network of a stage; None: the stage has its network already.
        """
        stage = self.conditioned_stage.stage
        network_without_weights = stage.model
        try:
            if load is not None:
                stage.model = load(stage.name)
            yield
        finally:
            stage.model = network_without_weights


def check_labels(problem: Problem, settings: Tuning) -> dict[str, StageLabels]:
    """Return the labels of the stages that are tuned: name of a stage -> its labels.

    Raises: ValueError if there are too few labels, or if the circular loop cannot train the problem.
    """
    # By default all stages that have pairs, in the order of the generator.
    stage_names = settings.stages or [
        s.name for s in problem.pipeline.stages if s.name in problem.train_pairs
    ]
    labels_by_stage = {name: StageLabels.from_problem(problem, name) for name in stage_names}
    # All stages are checked before the first training, which may take hours.
    for stage_labels in labels_by_stage.values():
        stage_labels.check()
    if settings.loop:
        check(problem)
    return labels_by_stage


def tune(
    problem: Problem,
    settings: Tuning,
    folder: Path,
    *,
    labels: Mapping | None = None,
    earlier_attempts: Mapping[str, Sequence[str]] = MappingProxyType({}),
    ranks: Ranks = SINGLE,
    say: Callable[[str], None] = print,
    samples: Samples | None = None,
    load: LoadNetwork | None = None,
) -> dict:
    """Train the stages, test them on held-out labels, and write the report.

    Args:
        problem: tuning problem.
        settings: settings of the training.
        folder: folder of the training, see the module's docstring.
        labels: facts about the labels that the report repeats, name -> JSON value; None for no facts.
        earlier_attempts: name of a stage -> earlier trainings that were tested on the same held-out pairs.
        ranks: distributed ranks.
        say: function that prints a line; only rank 0 calls it.
        samples: function that renders samples at every evaluation; None for no images.
        load: function that loads the network of a stage. Only the network of the stage in training is then in
            memory. None: the problem's pipeline holds the networks of all stages, as the loop needs.
    Returns: the report, as values for JSON.
    Raises: ValueError before any training if there are too few labels, or if the circular loop cannot train
        the problem.
    """
    labels_by_stage = check_labels(problem, settings)
    say_main = say if ranks.is_main else lambda line: None
    accuracy_by_evaluator = evaluator_accuracies(problem) if ranks.is_main and settings.loop else {}
    for name, accuracy in accuracy_by_evaluator.items():
        is_above_chance = accuracy.interval[0] > 0.5
        say_main(
            f"Evaluator {name!r} agrees with people on {accuracy} of the pairs to which it was not"
            f" fitted{'' if is_above_chance else CHANCE}."
        )
    # choosing=None: checkpoints are chosen by labelled pairs, and not by the win rate of generated assets.
    circular = replace(settings.circular, choosing=None)
    seed = circular.seed
    loop_arguments = (circular, folder, ranks, say_main)
    if settings.loop:
        trained_results = _train_loop(problem, *loop_arguments)
    else:
        trained_results = _train_stages(
            labels_by_stage, problem.identity, *loop_arguments, samples=samples, load=load
        )
    control_results: Mapping[str, StageResult] = {}
    # The control has the same settings and seeds, and differs in its labels only.
    if settings.control:
        say_main(
            "Control: the same training on randomised labels (half of each prompt's answers are inverted)."
        )
        if settings.loop:
            control_results = _train_loop(randomised(problem, seed), *loop_arguments, control=True)
        else:
            randomised_stages = {name: stage.randomised(seed) for name, stage in labels_by_stage.items()}
            control_results = _train_stages(
                randomised_stages, problem.identity, *loop_arguments, control=True, load=load
            )
    report: dict = {}
    if ranks.is_main:
        with rehearsal.timed(rehearsal.SUMMARY, "test on held-out labels"):
            tests = _tests(
                labels_by_stage,
                trained_results,
                control_results,
                folder,
                seed + 1,  # so that the test has other times and noises than the training
                say,
                circular.human.dpo.remedy,
                load,
                earlier_attempts,
            )
        report = {
            **tests,
            "loop": settings.loop,
            "settings": asdict(settings),
            "problem": dict(problem.identity),
            "versions": versions(),
            "evaluators": {name: accuracy.to_json() for name, accuracy in accuracy_by_evaluator.items()},
            "labels": dict(labels or {}),
        }
        write(report, folder, REPORT, markdown)
    return ranks.broadcast(report)


# End of a line about an evaluator.
CHANCE = ". Its accuracy is not above chance, so its selections are random"


def _train_stages(
    stages: Mapping[str, StageLabels],
    identity: Mapping,
    circular: CircularSettings,
    folder: Path,
    ranks: Ranks,
    say: Callable[[str], None],
    control: bool = False,
    samples: Samples | None = None,
    load: LoadNetwork | None = None,
) -> dict[str, StageResult]:
    """Train the stages one after the other, each independently of the others.

    The result of a stage that was trained before is read from the store.

    Args:
        stages: name of a stage -> its labels.
        identity: identity of the problem, which is part of the names of artefacts.
        circular: settings; the field `human` contains those of the training.
        folder: folder of the training.
        ranks: distributed ranks.
        say: function that prints a line.
        control: True for the training of the control.
        samples: function that renders samples at every evaluation; None: nothing is rendered.
        load: function that loads the network of a stage; see `tune`.
    Returns: name of a stage -> result of its training.
    """
    store = Store(folder / TRAINING / (CONTROL if control else ""), ranks, hashed=False)
    results_by_stage = {}
    for name, labels in stages.items():
        say(f"Stage {name!r}{', control' if control else ''}:")
        config = circular.human.for_stage(labels.conditioned_stage.stage, circular.seed)
        # The inputs name the artefact. They do not contain the settings CHANGEABLE_SETTINGS, which have no
        # effect on the result.
        inputs = {
            "step": "train",
            "problem": dict(identity),
            "control": control,
            "stage": name,
            "config": {k: v for k, v in asdict(config).items() if k not in CHANGEABLE_SETTINGS},
        }

        # The default values are the loop's variables of this iteration; a closure would read their later
        # values.
        def train_into_folder(
            stage_folder: Path, name: str = name, labels: StageLabels = labels, config: TrainConfig = config
        ) -> tuple[list[Path], dict]:
            with labels.with_network(load):
                stage_result = train_stage(
                    labels.conditioned_stage,
                    labels.train,
                    config,
                    stage_folder,
                    unseen=labels.choose,
                    ranks=ranks,
                    resume=True,
                    say=say,
                    samples=None if samples is None else functools.partial(samples, name),
                )
            return [stage_result.weights], stage_result.record()

        artefact = store.make(name, inputs, train_into_folder)
        # Made from the artefact in both cases: the stage was trained now, or read from the store.
        results_by_stage[name] = StageResult(
            weights=artefact.folder / POLICY,
            kept_step=artefact.record["kept_step"],
            stats=[],  # not needed here
            warnings=artefact.record["warnings"],
        )
    return results_by_stage


def _train_loop(
    problem: Problem,
    circular: CircularSettings,
    folder: Path,
    ranks: Ranks,
    say: Callable[[str], None],
    control: bool = False,
) -> dict[str, StageResult]:
    """Train all stages with the circular loop.

    Args:
        problem: tuning problem; for the control, the result of `randomised`.
        circular: settings of the loop.
        folder: folder of the training.
        ranks: distributed ranks.
        say: function that prints a line.
        control: True for the training of the control.
    Returns: name of a stage -> result of its training.
    """
    subfolder = Path(CONTROL if control else "")
    loop = CircularLoop(
        problem=problem,
        settings=circular,
        store=Store(folder / LOOP / subfolder, ranks, say),
        ranks=ranks,
        use=RANDOMISED if control else PAIRS,
        say=say,
        bars=ranks.is_main,
    )
    artefacts_by_stage, _ = run_loop(loop)
    return {
        stage: _result_of_loop(loop, stage, artefacts, folder / TRAINING / subfolder / stage)
        for stage, artefacts in artefacts_by_stage.items()
    }


def _result_of_loop(
    loop: CircularLoop, stage: str, artefacts: Sequence[Artefact], folder: Path
) -> StageResult:
    """Return the result of a stage's trainings in the circular loop, and write its weights if needed.

    Args:
        loop: the circular loop.
        stage: name of the stage.
        artefacts: trainings of the stage in the rounds of the loop, in order.
        folder: folder for the weights, which are written only if the stage was trained in several rounds.
    """
    training_records = [artefact.record for artefact in artefacts]
    weights = network_weights(loop, stage, artefacts, folder)
    warnings = [
        warning_text for training_record in training_records for warning_text in training_record["warnings"]
    ]
    return StageResult(
        weights=weights,
        kept_step=sum(training_record["kept_step"] for training_record in training_records),
        stats=[],
        warnings=warnings,
    )


def _tests(
    labels_by_stage: Mapping[str, StageLabels],
    trained_results: Mapping[str, StageResult],
    control_results: Mapping[str, StageResult],
    folder: Path,
    seed: int,
    say: Callable[[str], None],
    remedy: str,
    load: LoadNetwork | None = None,
    earlier_attempts: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> dict:
    """Test every stage on its held-out pairs, and link the weights of the stages that pass into the folder.

    Args:
        labels_by_stage: name of a stage -> its labels.
        trained_results: name of a stage -> result of its training.
        control_results: name of a stage -> result of the training of the control; empty without a control.
        folder: folder of the training.
        seed: seed of the times and noises of the test.
        say: function that prints a line.
        remedy: sentence that says which settings to change against likelihood displacement.
        load: function that loads the network of a stage; see `tune`.
        earlier_attempts: see `tune`.
    Returns: part of the report with the results of the tests.
    """
    # The confidence level is corrected for the number of tests.
    confidence = compute_confidence(len(trained_results))
    stage_reports = {}
    for stage, stage_result in trained_results.items():
        stage_labels = labels_by_stage[stage]
        prompts = [pair.condition for pair in stage_labels.held_out]
        # The same object for the tuned network and the control, so that both get the same times and noises.
        control_accuracy = None
        with stage_labels.with_network(load):
            pair_accuracy = PairAccuracy(
                stage_labels.conditioned_stage, stage_labels.held_out, draws=FINAL_DRAWS, seed=seed
            )
            tuned_accuracy = _measure_accuracy(pair_accuracy, stage_result, confidence)
            if stage in control_results:
                control_accuracy = _measure_accuracy(pair_accuracy, control_results[stage], confidence)
        signal = signal_test(stage_result.kept_step, tuned_accuracy, control_accuracy, prompts, confidence)
        stage_reports[stage] = {
            "learnable_signal": signal.learnable_signal,
            "likelihood_displacement": signal.likelihood_displacement,
            "why": signal.why,
            "earlier_attempts": list(earlier_attempts.get(stage, ())),
            "pairs": len(stage_labels.train),
            "kept_step": stage_result.kept_step,
            "held_out": tuned_accuracy.to_json(),
            "control": None if control_accuracy is None else control_accuracy.to_json(),
            "above_control": None if signal.above_control is None else list(signal.above_control),
            "warnings": list(stage_result.warnings),
            "weights": stage if signal.learnable_signal else None,
        }
        say(f"Stage {stage!r}: {SIGNAL if signal.learnable_signal else NOTHING}: {signal.why}.")
        if earlier := earlier_attempts.get(stage):
            say(f"Stage {stage!r}: {ATTEMPT.format(len(earlier) + 1, ', '.join(earlier))}")
        if signal.likelihood_displacement:
            say(f"Stage {stage!r}: {DISPLACED.format(_rise(tuned_accuracy.to_json()), remedy)}")
        # The weights of a stage without a signal stay in training/, so that they are not exported by mistake.
        if signal.learnable_signal:
            link_folder(stage_result.weights, folder / stage)
        if stage in control_results:
            link_folder(control_results[stage].weights, folder / CONTROL / stage)
    passed_stages = [
        stage for stage, stage_report in stage_reports.items() if stage_report["learnable_signal"]
    ]
    if passed_stages:
        say(f"Tuned weights are in {', '.join(str(folder / stage) for stage in passed_stages)}.")
    else:
        say(f"{NOTHING.capitalize()}: the base generator is kept unchanged.")
    return {"stages": stage_reports, "kept": passed_stages, "confidence": confidence}


def _measure_accuracy(pair_accuracy: PairAccuracy, stage_result: StageResult, confidence: float) -> Accuracy:
    """Return the accuracy of a tuned network on held-out pairs, by its implicit reward (the margin of DPO).

    Args:
        pair_accuracy: held-out pairs with fixed times and noises.
        stage_result: result of the training, with the tuned weights.
        confidence: confidence level of the interval.
    """
    base_model = pair_accuracy.stage.model
    # The reference shares the weights of the base network, since a second copy would double the memory.
    measurement = pair_accuracy.measure(
        tuned_model(base_model, stage_result.weights), FrozenModel(shared_copy(base_model))
    )
    prompts = [pair.condition for pair in pair_accuracy.pairs]
    return compute_accuracy(measurement.margins, prompts, confidence, measurement.preferred)


def evaluator_accuracies(problem: Problem) -> dict[str, Accuracy]:
    """Measure how often the problem's evaluators order pairs of the last stage as people did.

    Each evaluator is measured on at most MAX_EVALUATED pairs of prompts to which it was not fitted. An
    evaluator is left out if there are pairs of fewer than MIN_PROMPTS such prompts.

    Returns: name of an evaluator -> its accuracy.
    """
    last_stage = problem.pipeline.stages[-1].name
    accuracies = {}
    train_pairs = problem.train_pairs[last_stage] if last_stage in problem.train_pairs else []
    other_pairs = [] if problem.unseen_pairs is None else problem.unseen_pairs[last_stage]
    for name in EVALUATORS:
        evaluator = getattr(problem, name)
        fitted_prompts = set(problem.fitted_to.get(name, ()))
        # A problem need not have all evaluators.
        if evaluator is None:
            continue
        pairs = [pair for pair in (*train_pairs, *other_pairs) if pair.condition not in fitted_prompts]
        # Every k-th pair in the order of the ids, which begin with the prompt, so that the selection covers
        # all prompts.
        stride = max(1, -(-len(pairs) // MAX_EVALUATED))
        pairs = sorted(pairs, key=lambda pair: pair.id)[::stride]
        if len({pair.condition for pair in pairs}) < MIN_PROMPTS:
            continue
        device = next(problem.pipeline.stages[-1].model.parameters()).device
        prompts = [pair.condition for pair in pairs]
        scores = []  # scores [n] of the preferred and of the rejected assets of the n pairs
        for role in ("preferred", "rejected"):
            # Decoded one at a time, which bounds the memory.
            assets = [problem.pipeline.decode(collate([getattr(pair, role)]).to(device))[0] for pair in pairs]
            scores.append(evaluator(assets, prompts).double().cpu())
        accuracies[name] = compute_accuracy((scores[0] - scores[1]).numpy(), prompts)
    return accuracies


# Reports for people to read.


def markdown(report: Mapping) -> str:
    """Format the report, which is the content of report.json, as Markdown text."""
    header = [
        "stage",
        "labels",
        "accuracy on held-out pairs",
        "with randomised labels",
        "difference",
        "error of the preferred",
        "kept update",
        "pairs, prompts",
    ]
    table_rows = []
    for stage, stage_report in report["stages"].items():
        tuned_accuracy = stage_report["held_out"]
        control_accuracy = stage_report["control"]
        result_text = f"**{SIGNAL}**" if stage_report["learnable_signal"] else NOTHING
        result_text += ", likelihood displacement" if stage_report["likelihood_displacement"] else ""
        # reports of earlier versions state no attempts
        if earlier := stage_report.get("earlier_attempts"):
            result_text += f", attempt {len(earlier) + 1}"
        difference_text = ""
        if stage_report["above_control"] is not None:
            difference, low, high = stage_report["above_control"]
            difference_text = f"{difference:+.3f} [{low:+.3f}, {high:+.3f}]"
        table_rows.append(
            [
                stage,
                result_text,
                _with_interval(tuned_accuracy),
                "" if control_accuracy is None else _with_interval(control_accuracy),
                difference_text,
                _rise(tuned_accuracy),
                stage_report["kept_step"],
                f"{tuned_accuracy['pairs']}, {tuned_accuracy['conditions']}",
            ]
        )
    passed_stages = ", ".join(report["kept"])
    title = f"{NOTHING.capitalize()}; the base generator is kept"
    if passed_stages:
        title = f"Learnable signal: {passed_stages}"
    markdown_lines = [
        f"# {title}",
        "",
        *markdown_rows(header, table_rows),
        "",
    ]
    markdown_lines += [
        (
            "The accuracy is the share of held-out pairs that the network's implicit reward orders as people"
            " did. The prompts of held-out pairs were used neither for training nor for choosing a"
            f" checkpoint. Brackets contain {report['confidence']:.1%} intervals over prompts. A stage has a"
            " learnable signal if the intervals of its accuracy and of the difference from the control are"
            " above chance; random answers pass in at most 5 % of first tunings on held-out pairs. The error"
            " of the preferred is the"
            " relative rise of the flow-matching error of preferred assets. A rise (likelihood displacement)"
            " usually means worse samples."
        ),
    ]
    markdown_lines += [
        line
        for stage, stage_report in report["stages"].items()
        if (earlier := stage_report.get("earlier_attempts"))
        for line in ("", f"Stage {stage}: {ATTEMPT.format(len(earlier) + 1, ', '.join(earlier))}")
    ]
    if report["evaluators"]:
        table_rows = [
            [name, _with_interval(accuracy), accuracy["pairs"]]
            for name, accuracy in report["evaluators"].items()
        ]
        markdown_lines += [
            "",
            "Accuracy of the evaluators on pairs to which they were not fitted:",
            "",
            *markdown_rows(["evaluator", "accuracy", "pairs"], table_rows),
        ]
    if report["labels"]:
        markdown_lines += [
            "",
            *(f"- {name.replace('_', ' ')}: {fact_text(value)}" for name, value in report["labels"].items()),
        ]
    warnings = [
        f"- {stage}: {warning_text}"
        for stage, stage_report in report["stages"].items()
        for warning_text in stage_report["warnings"]
    ]
    if warnings:
        markdown_lines += ["", "Warnings during training:", "", *warnings]
    return "\n".join(markdown_lines) + "\n"


def fact_text(value: object) -> str:
    """Format a fact about the labels; a mapping becomes "62 for shape, 10 for texture"."""
    if isinstance(value, Mapping):
        return ", ".join(f"{count} for {name}" for name, count in value.items())
    return str(value)


def _with_interval(accuracy: Mapping) -> str:
    """Format an accuracy, as Accuracy.to_json returns it, with its interval: "0.612 [0.550, 0.671]"."""
    low, high = accuracy["interval"]
    return f"{accuracy['accuracy']:.3f} [{low:.3f}, {high:.3f}]"


def _rise(accuracy: Mapping) -> str:
    """Format the relative rise of the preferred assets' error with its interval: "+1.2% [-0.3%, +2.6%]"."""
    return "{:+.1%} [{:+.1%}, {:+.1%}]".format(*accuracy["preferred_error"])
