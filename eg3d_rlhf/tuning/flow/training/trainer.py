"""Train one stage: adapters or all parameters, with early stopping on held-out data and exact resume.

A `Descent` subclass defines the objective. The objectives on preference pairs (DPO, fine-tuning) are in
pair_training.py, those on labels of single assets in offline/, and those on samples and their rewards in
online/. The folder of a run holds:

    training_options.json    settings that the run was started with
    stats.jsonl, timing.jsonl    one line for every `log_every` updates and for every evaluation; equal runs
                                 write bitwise identical stats.jsonl
    warnings.json            warnings by name, each with the update at which it appeared
    samples/000100.png       images of the same few assets at every evaluation (workspace/sample_strips.py),
                             if the assets can be rendered
    checkpoint-*.safetensors    states to resume from; deleted at the end of the training
    kept-*.safetensors       best parameters so far; deleted at the end of the training
    policy/, result.json     the trained network and the result, written at the end of the training

All random numbers depend on (seed, pair, pass over the pairs, update) alone. A resumed run is therefore
bitwise identical to an uninterrupted one, and the number of passes or ranks changes the result only by
rounding.
"""

import copy
import importlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from eg3d_rlhf.experiments import version_0_1
from eg3d_rlhf.experiments.process import StoppedError
from eg3d_rlhf.experiments.run import STATS, Run, recorded
from eg3d_rlhf.models.lora import add_lora
from eg3d_rlhf.models.policies import save_policy, shared_copy
from eg3d_rlhf.tuning.flow.base.stage import FlowStage
from eg3d_rlhf.tuning.flow.training.reference import AdapterOff, FrozenModel
from eg3d_rlhf.tuning.flow.training.settings import StageTraining
from eg3d_rlhf.tuning.flow.training.sharding import gathered, like, shard, sharded, unsharded
from training import checkpoint, rehearsal
from training.distributed import SINGLE, Ranks
from training.phases import LossNotFiniteError, cosine
from training.progress import log_bar
from training.storage import read_tensors, write_tensors

# names of files and folders in the folder of a run
WARNINGS = "warnings.json"
RESULT = "result.json"
POLICY = "policy"
SAMPLES = "samples"
# settings that a resumed run may change, since none of them changes what is trained
CHANGEABLE_SETTINGS = ("batch_gpu", "checkpoint_every", "log", "recompute", "samples")
KEPT = "kept parameters"  # kind of the files of the best parameters


class Descent(ABC):
    """Objective of a training, with the trained parameters and their optimiser. `run` does one update.

    Args:
        stage: stage whose network is trained.
        config: settings of the training.
        policy: network in training.
        ranks: this process among the processes that train together.
    """

    # columns of the status line: (name of the metric, title of the column, format)
    columns: Sequence[tuple[str, str, str]] = ()
    evaluates: bool = False  # whether `evaluate` returns metrics

    def __init__(self, stage: FlowStage, config: StageTraining, policy: torch.nn.Module, ranks: Ranks):
        self.stage = stage
        self.training = config
        self.policy = policy
        self.ranks = ranks
        self.trained_parameters = trained_parameters(policy)
        self.parameters = list(self.trained_parameters.values())
        self.device = self.parameters[0].device
        self.optimizer = adamw(config, self.parameters)

    def lr(self, step: int) -> float:
        """Return the learning rate of update number `step`, counted from 0."""
        config = self.training
        # step + 1: the first update of a warm-up would otherwise have the rate 0
        if config.schedule == "constant" or step < config.warmup:
            return config.lr * min(1.0, (step + 1) / max(config.warmup, 1))
        return cosine(config.lr, (step + 1 - config.warmup) / max(config.steps - config.warmup, 1))

    @abstractmethod
    def run(self, step: int) -> dict:
        """Do one update and return its metrics: loss, grad_norm, number of examples, and further ones to log.

        `Progress.line` summarises the metrics of several updates.

        Args: step: number of the update, counted from 0.
        Raises: LossNotFiniteError if the loss or the gradient is not finite; the parameters are then
            unchanged.
        """

    @abstractmethod
    def signs(self, lines: Sequence[Mapping]) -> dict[str, str]:
        """Return the warnings that the lines of stats.jsonl so far give reason for, by name.

        The caller prints each warning once.
        """

    def evaluate(self) -> dict[str, float]:
        """Evaluate the current policy on held-out data, and return metrics by name.

        The metrics include `ACCURACY`, by which the best parameters are chosen if no win rate is measured.
        The mapping is empty if the objective has no held-out data.
        """
        return {}

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return further tensors that a resumed run needs, by name.

        The parameters and the state of the optimiser are not among them.
        """
        return {}

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Restore the tensors that `tensors` returned. The mapping also holds tensors of other names."""
        return

    def ends(self, stats_line: Mapping) -> str | None:
        """Return the reason why training must stop after this line of stats.jsonl, or None if it continues.

        The result is the same on every rank.
        """
        return None

    def descend(self, step: int, totals: torch.Tensor, example_names: str) -> list[float]:
        """Divide the summed gradients by the number of examples, clip them, and do one step of the optimiser.

        Args:
            step: number of the update, counted from 0.
            totals: sums over all passes and ranks: the mass (number of examples), the mass times the loss,
                and further sums.
            example_names: names of some examples of the update, for an error message.

        Returns: the mass, the loss, the norm of the gradient before clipping, and the further sums.

        Raises: LossNotFiniteError before the optimiser's step, so that the parameters are unchanged.
        """
        # once, after passes and ranks are summed: the result does not depend on how a batch was divided
        for parameter in self.parameters:
            if parameter.grad is not None:
                parameter.grad /= totals[0]
        total_norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.training.clip)
        # sharded gradients give each rank a part of the norm
        total_norm = total_norm.full_tensor() if isinstance(total_norm, DTensor) else total_norm
        # one transfer to the CPU for all metrics, since each transfer waits for the device
        mass, loss_sum, *further_sums, grad_norm = torch.cat(
            [totals, total_norm.detach().reshape(1).to(totals)]
        ).tolist()
        # an update without examples has no mean loss; it is reported as an error below
        loss = loss_sum / mass if mass else math.nan
        # before the step: AdamW would carry a NaN in its moments through all later updates
        if not math.isfinite(loss) or not math.isfinite(grad_norm):
            raise LossNotFiniteError(
                f"train_stage({self.stage.name}): loss or gradient is not finite in update {step + 1}: the"
                f" loss is {loss:g} and the norm of the gradient {grad_norm:g} ({example_names}, ...). Use a"
                " lower lr, a larger beta, or float32 instead of bfloat16."
            )
        for param_group in self.optimizer.param_groups:
            param_group["lr"] = self.lr(step)
        self.optimizer.step()
        return [mass, loss, grad_norm, *further_sums]


def adamw(config: StageTraining, parameters: Sequence[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """Create the optimiser of the settings, AdamW or its variant of 8 bits.

    Raises: ValueError if the settings need the library bitsandbytes and it cannot be imported.
    """
    optimizer_class: Callable = torch.optim.AdamW
    if config.optimizer == "adamw8bit":
        try:
            # an optional dependency, imported only if it is used
            optimizer_class = importlib.import_module("bitsandbytes.optim").AdamW8bit
        except ImportError as error:
            raise ValueError(
                f"--set optimizer=adamw8bit: bitsandbytes cannot be imported: {error}. Run pip install"
                " bitsandbytes."
            ) from None
    return optimizer_class(parameters, lr=config.lr, weight_decay=config.weight_decay)


# Progress of a training, and the lines of stats.jsonl that summarise its updates.

WIN_RATE = "win_rate"
ACCURACY = "held_out_accuracy"
# metrics that a line sums over its updates; all other metrics are averaged over the updates
COUNTED = ("pairs", "samples")


@dataclass
class Progress:
    """Progress of a training, which checkpoints store as JSON beside the tensors."""

    step: int = 0  # number of updates done
    kept_step: int = 0  # update with the best win rate or accuracy; the last update if neither is measured
    best: float | None = None  # best win rate or accuracy so far, in 0..1
    since_best: int = 0  # number of evaluations since the best one
    ended: bool = False  # whether evaluations ended the training early
    sums: dict = field(default_factory=dict)  # sums over the updates since the last line

    def add(self, metrics: dict) -> None:
        """Add the metrics of an update to the sums for the next line of stats.jsonl."""
        self.sums = _added(self.sums, {"updates": 1, **metrics})

    def record_rate(self, rate: float, patience: int, max_drop: float) -> bool:
        """Record a win rate or an accuracy in 0..1, and return True if it is the best so far.

        Of equal values the earlier one stays the best. `ended` is set if there were `patience` evaluations in
        a row without a new best value, or if the value is more than `max_drop` below the best one.
        """
        is_best = self.best is None or rate > self.best
        if is_best:
            self.best = rate
            self.kept_step = self.step
            self.since_best = 0
        else:
            self.since_best += 1
        assert self.best is not None
        self.ended = self.since_best >= patience or rate < self.best - max_drop
        return is_best

    def line(self, lr: float, evaluation_metrics: Mapping[str, float]) -> dict:
        """Make a line of stats.jsonl from the updates since the last line, and start new sums.

        Args:
            lr: learning rate of the last update.
            evaluation_metrics: metrics of an evaluation, which the line repeats; empty if there was none.
        """
        sums = self.sums
        # the next line starts from empty sums
        self.sums = {}
        stats_line = {"step": self.step, **{name: sums[name] for name in COUNTED if name in sums}}
        # empty sums occur for the evaluation before the first update
        if sums:
            # name of a metric -> its sum over the pairs of each time bin, [TIME_BINS]
            bins = sums.get("bins")
            averaged_names = [name for name in sums if name not in (*COUNTED, "updates", "bins")]
            stats_line |= {name: sums[name] / sums["updates"] for name in averaged_names}
            if bins:
                bin_counts = bins["pairs"]  # number of pairs in each time bin
                total_count = math.fsum(bin_counts)
                time_bins = {"pairs": bin_counts}
                for name, bin_sums in bins.items():
                    if name == "pairs":
                        continue
                    stats_line[name] = math.fsum(bin_sums) / total_count
                    # a bin without pairs has no mean
                    bin_means = [
                        bin_sum / bin_count if bin_count else None
                        for bin_sum, bin_count in zip(bin_sums, bin_counts, strict=True)
                    ]
                    time_bins[name] = bin_means
                stats_line["time_bins"] = time_bins
            stats_line["lr"] = lr
        return {**stats_line, **evaluation_metrics}


def _added(sums_so_far: Mapping, added_values: dict) -> dict:
    """Add two nested dictionaries of numbers and lists of numbers, element by element."""
    # the first update of a line finds no sums
    if not sums_so_far:
        return added_values
    sums: dict[str, Any] = {}
    for key, value in added_values.items():
        if isinstance(value, dict):
            sums[key] = _added(sums_so_far[key], value)
        elif isinstance(value, list):
            sums[key] = [
                previous_element + added_element
                for previous_element, added_element in zip(sums_so_far[key], value, strict=True)
            ]
        else:
            sums[key] = sums_so_far[key] + value
    return sums


def read_lines(path: Path) -> list[dict]:
    """Read the lines of a stats.jsonl file. Return an empty list if the file does not exist."""
    json_lines = path.read_text().splitlines() if path.exists() else []
    return [version_0_1.flow_stats(json.loads(line)) for line in json_lines]


def format_columns(
    stats_line: Mapping, steps: int, columns: Sequence[tuple[str, str, str]]
) -> dict[str, str]:
    """Format a line of stats.jsonl for the status line: title of a column -> metric as text of fixed width.

    Args:
        stats_line: line of stats.jsonl.
        steps: number of updates of the whole training.
        columns: columns of the objective, see Descent; they are placed between those that every training
            has.
    """
    cells_by_title = {"step": f"{stats_line['step']:>6d}/{steps:<6d}"}
    evaluation_columns = ((WIN_RATE, "win_rate", "<6.3f"), (ACCURACY, "held_out", "<6.3f"))
    for name, title, number_format in (
        ("loss", "loss", "<8.4f"),
        *columns,
        ("grad_norm", "grad", "<8.2e"),
        *evaluation_columns,
    ):
        metric_value = stats_line.get(name)
        # a line has no value for a metric that was not measured
        cell = "" if metric_value is None else format(metric_value, number_format)
        # an absent metric is padded to the width of its format, such as 6 in "<6.3f", so that columns align
        cells_by_title[title] = cell.ljust(int(number_format.lstrip("<+").split(".")[0]))
    return cells_by_title


RATE_NOISE = 0.02  # largest change of the win rate that is taken for noise
DROP = 0.1  # fall of the win rate that is reported when it is measured twice in a row


def win_rates(lines: Sequence[Mapping]) -> list[tuple[int, float]]:
    """Return (number of the update, win rate) for every line that has a win rate."""
    return [(line["step"], line[WIN_RATE]) for line in lines if line.get(WIN_RATE) is not None]


def win_rate_signs(rates: Sequence[tuple[int, float]], remedy: str) -> dict[str, str]:
    """Return warnings about a falling win rate, by name.

    A large fall gives a warning at once. A smaller fall gives one only if it is measured twice in a row,
    because win rates of a few dozen assets are noisy. Fewer than two win rates give no warning.

    Args:
        rates: (number of the update, win rate in 0..1) of all evaluations so far.
        remedy: sentence at the end of each warning, which says what to do.
    """
    if len(rates) < 2:
        return {}
    signs = {}
    step, last_rate = rates[-1]
    _, first_rate = rates[0]
    better_recent_rate = max(rate for _, rate in rates[-2:])  # the better one of the last two
    # 0.5 is a tie with the network that assets are compared with; a lower first win rate is the level then
    base_level = min(0.5, first_rate)
    if last_rate < base_level - DROP or better_recent_rate < base_level - RATE_NOISE:
        signs["collapse"] = (
            f"step {step}: the held-out win rate is {last_rate:.3f}, below that of the network before tuning."
            f" {remedy}"
        )
    # of equal win rates the earliest one counts
    best_step, best_rate = max(rates, key=lambda step_and_rate: (step_and_rate[1], -step_and_rate[0]))
    if last_rate < best_rate - 2 * DROP or better_recent_rate < best_rate - DROP:
        signs["past-best"] = (
            f"step {step}: the held-out win rate fell to {last_rate:.3f} from {best_rate:.3f} at step"
            f" {best_step}. {remedy}"
        )
    return signs


# The loop.


def policy_and_reference(
    stage: FlowStage, config: StageTraining
) -> tuple[torch.nn.Module, FrozenModel | None]:
    """Make the network to train, and its reference. The reference is None if the loss needs none.

    The reference shares its memory with the stage's own network, except where full tuning converts both to
    float32.
    """
    if config.lora is not None:
        policy = shared_copy(stage.model)
        add_lora(policy, config.lora, config.seed)
        return policy, AdapterOff(policy) if config.needs_reference else None
    # full tuning: the policy is a copy, and the stage's own network is the reference
    policy = copy.deepcopy(stage.model)
    reference = shared_copy(stage.model)
    if any(p.dtype != torch.float32 for p in policy.parameters()):
        # updates at usual learning rates are below the resolution of bfloat16 weights and would be lost
        policy = policy.float()
        reference = reference.float()
    policy.requires_grad_(True)
    return policy, FrozenModel(reference, policy) if config.needs_reference else None


def set_recompute(model: Any, enabled: bool) -> None:
    """Switch the recomputation of blocks in the backward pass on or off.

    Networks without an attribute `recompute` do not support recomputation, and are left unchanged.
    """
    if hasattr(model, "recompute"):
        model.recompute = enabled


# function that renders samples of a network into an image file, and returns the path of the file
RenderSamples = Callable[[torch.nn.Module, Path], Path]
# function that returns a network's held-out win rate in 0..1; every rank calls it, and rank 0's result counts
WinRate = Callable[[torch.nn.Module], float]


@dataclass(frozen=True, kw_only=True)
class StageResult:
    """Result of the training of one stage."""

    weights: Path  # folder of the weights, as models.policies.tuned_model reads it
    kept_step: int  # number of updates that led to these weights; 0: the untuned network
    stats: list[dict]  # lines of stats.jsonl
    warnings: list[str]  # warnings that appeared during training, "<name>: <text>"

    def values_of(self, name: str) -> list[list]:
        """Return [number of the update, value] of every line of stats.jsonl that has this metric."""
        return [[line["step"], line[name]] for line in self.stats if line.get(name) is not None]

    def record(self) -> dict:
        """Return the part of the result that a store records with the artefact, as JSON."""
        return {
            "kept_step": self.kept_step,
            "warnings": list(self.warnings),
            "win_rates": self.values_of(WIN_RATE),
        }


# function from a run, the network to train and its reference to a Descent
Start = Callable[[Run, torch.nn.Module, FrozenModel | None], Descent]


def train(
    stage: FlowStage,
    config: StageTraining,
    further_options: dict,
    start: Start,
    out: Path,
    *,
    held_out: WinRate | None = None,
    ranks: Ranks = SINGLE,
    resume: bool = False,
    say: Callable[[str], None] = print,
    shards: bool = False,
    samples: RenderSamples | None = None,
) -> StageResult:
    """Train a copy of a stage's network by the objective (Descent) that `start` makes.

    Args:
        stage: stage whose network is copied and trained.
        config: settings of the training.
        further_options: everything else that decides the training, as JSON; it becomes part of
            training_options.json, and a resumed run must have the same.
        start: function that makes the Descent from the run, the copy and its reference.
        out: folder of the run.
        held_out: function that measures the win rate, called every `held_out_every` updates. The parameters
            with the best win rate are kept, and those before the first update can be the best. None: the
            accuracy on held-out pairs decides if the Descent measures it, and otherwise the last parameters
            are kept.
        ranks: this process among the processes that train together.
        resume: whether a run that is in the folder already is resumed; otherwise it is an error.
        say: function that prints the status lines.
        shards: whether the Descent accepts a network whose parameters are sharded over ranks.
        samples: function that renders a few samples at every evaluation; None: nothing is rendered.

    Raises: ValueError, LossNotFiniteError and StoppedError, see pair_training.train_stage.
    """
    device = next(stage.model.parameters()).device
    if ranks.is_main:
        out.mkdir(parents=True, exist_ok=True)
    options = {
        "stage": stage.name,
        "precision": stage.precision,
        "config": asdict(config),
        "held_out": held_out is not None,
        **further_options,
    }
    # the generators of these devices are restored at the end, besides that of the CPU
    cuda_devices = [device] if device.type == "cuda" else []
    # fork_rng: dropout seeds the global generators, which the caller must find unchanged
    with (
        Run(out, options, ranks=ranks, say=say, log=config.log) as run,
        torch.random.fork_rng(devices=cuda_devices),
    ):
        # rank 0 alone reads the folder: another rank might see it before or after a file is written
        has_run, finished_result = ranks.broadcast(
            [bool(recorded(out)), read_result(out)] if ranks.is_main else None
        )
        if not has_run:
            run.begin()
        elif resume:
            run.resume(CHANGEABLE_SETTINGS)
        else:
            raise ValueError(
                f"train_stage: the folder {out} already holds a run. Resume the run (resume=True), or choose"
                " another folder."
            )
        if finished_result is None:
            policy, reference = policy_and_reference(stage, config)
            if config.recompute != "auto":
                set_recompute(policy, config.recompute == "on")
            # ranks start from rank 0's parameters, adapters included
            ranks.broadcast_(trained_parameters(policy).values())
            if ranks.world > 1 and config.lora is None and shards:
                if config.optimizer != "adamw":
                    raise ValueError(
                        f"--set optimizer={config.optimizer}: --tune=full on several processes works with"
                        " optimizer=adamw only. Remove the setting, or train on one process."
                    )
                shard(policy, ranks)
            training = _Training(
                start(run, policy, reference), config, held_out, run, say, samples if config.samples else None
            )
            with rehearsal.section():
                finished_result = training.train()
    return StageResult(**finished_result, weights=out / POLICY)


def trained_parameters(policy: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Return the parameters of a network that are trained (`requires_grad`), by name."""
    return {name: p for name, p in policy.named_parameters() if p.requires_grad}


def read_result(folder: Path) -> dict | None:
    """Read the result and the lines of stats.jsonl of a training.

    Return None if the training is not finished.
    """
    # result.json is written last, so it marks the end
    if not (folder / RESULT).exists():
        return None
    return {**json.loads((folder / RESULT).read_text()), "stats": read_lines(folder / STATS)}


class _Training:
    """Loop of a training: updates, evaluations, lines, checkpoints and early stop."""

    def __init__(
        self,
        updates: Descent,
        config: StageTraining,
        held_out: WinRate | None,
        run: Run,
        say: Callable[[str], None],
        samples: RenderSamples | None,
    ):
        self.samples = samples  # None: no renders are written
        self.updates = updates
        self.policy = updates.policy
        self.trained_parameters = updates.trained_parameters
        self.stage = updates.stage
        self.config = config
        self.held_out = held_out
        self.run = run
        self.ranks = run.ranks
        self.say = say
        self.evaluates = held_out is not None or updates.evaluates
        # the metric by which the best parameters are chosen
        self.criterion = WIN_RATE if held_out is not None else ACCURACY
        self.progress = Progress()  # replaced by `_resume` if there is a checkpoint
        self.lines: list[dict] = []  # lines of stats.jsonl
        self.warnings: dict[str, str] = {}  # warnings that were printed, by name
        # updates whose kept parameters the checkpoints on the disk refer to
        self.referenced_steps = [0]

    # The loop.

    def train(self) -> dict:
        """Train to the end, and return the fields of StageResult except `weights`, as JSON."""
        self._resume()
        # the untuned network is evaluated, too: it is the result if no update improves it
        if self.evaluates and self.progress.best is None:
            self._report(self._evaluate())
        log_lines = log_bar(
            self.config.steps, self.progress.step, f"stage {self.stage.name}", "update", self.ranks.is_main
        )
        with self.run.stoppable(), log_lines:
            while self.progress.step < self.config.steps and not self.progress.ended:
                # a signal may reach one rank alone, so all ranks agree before they stop
                if self.ranks.any_rank(self.run.stop_requested is not None)[0]:
                    self._checkpoint()
                    # any rank may have received the signal; the other ranks report None
                    signal_name = next(
                        name for name in self.ranks.gather(self.run.stop_requested) if name is not None
                    )
                    raise StoppedError(
                        f"{signal_name}: the training of stage {self.stage.name!r} stopped after update"
                        f" {self.progress.step}. Resume the run to continue."
                    )
                self._update()
                log_lines.update()
                # one tick of a training is the interval between two lines
                if rehearsal.active() and self.progress.step % self.config.log_every == 0:
                    self._checkpoint()
                    break
        with rehearsal.timed(rehearsal.CHECKPOINTS, "final weights"):
            return self._finish()

    def _update(self) -> None:
        """Do one update. Then evaluate, write a line and write a checkpoint, each if it is due."""
        progress = self.progress
        config = self.config
        try:
            with rehearsal.timed(rehearsal.TRAINING, "updates", config.steps):
                progress.add(self.updates.run(progress.step))
        except LossNotFiniteError as error:
            # names of checkpoints hold the update with leading zeros, so the largest is the newest
            newest_checkpoint = max(checkpoint.available(self.run.folder), default=None)
            checkpoint_remark = (
                "No checkpoint was written yet."
                if newest_checkpoint is None
                else f"The last checkpoint is {newest_checkpoint}."
            )
            raise LossNotFiniteError(f"{error} {checkpoint_remark}") from None
        progress.step += 1
        is_last = progress.step == config.steps
        is_evaluated = self.evaluates and (is_last or progress.step % config.held_out_every == 0)
        if is_evaluated or is_last or progress.step % config.log_every == 0:
            self._report(self._evaluate() if is_evaluated else {})
        # after the last update no checkpoint is needed, since the policy itself is written
        if progress.step % config.checkpoint_every == 0 and not is_last:
            self._checkpoint()

    # Evaluations and lines.

    def _evaluate(self) -> dict[str, float]:
        """Evaluate the policy, and store its parameters if they are the best so far. Return the metrics.

        The win rate decides if it is measured, and otherwise the accuracy on held-out pairs.
        """
        # one evaluation before the first update, and one after the last
        planned_evaluations = 1 + math.ceil(self.config.steps / self.config.held_out_every)
        with (
            gathered(self.policy),
            rehearsal.timed(rehearsal.TRAINING, "evaluations", planned_evaluations),
        ):
            win_rate_metric = {} if self.held_out is None else {WIN_RATE: float(self.held_out(self.policy))}
            # the metrics of rank 0 count, so that all ranks decide alike
            metrics = self.ranks.broadcast(self.updates.evaluate() | win_rate_metric)
            if self.samples is not None and self.ranks.is_main:
                image_path = self.samples(
                    self.policy, self.run.folder / SAMPLES / f"{self.progress.step:06d}.png"
                )
                self.run.log_image(SAMPLES, image_path, self.progress.step)
        criterion_value = metrics[self.criterion]
        assert 0 <= criterion_value <= 1
        # an accuracy on a few dozen pairs is too noisy to stop at one large fall
        max_drop = self.config.max_drop if self.criterion == WIN_RATE else math.inf
        if self.progress.record_rate(criterion_value, self.config.patience, max_drop):
            best_tensors = unsharded(self.trained_parameters, self.ranks)
            if self.ranks.is_main:
                write_tensors(
                    self._kept(self.progress.step), KEPT, best_tensors, {"step": self.progress.step}
                )
        return metrics

    @torch.no_grad()
    def _load(self, tensors: Mapping[str, torch.Tensor], policy: torch.nn.Module) -> None:
        """Copy values (full tensors by name) into the trained parameters of a policy, in place."""
        for name, parameter in trained_parameters(policy).items():
            parameter.copy_(like(tensors[name], parameter))

    def _report(self, evaluation_metrics: Mapping[str, float]) -> None:
        """Write the line of the updates since the last line, the status line, and new warnings.

        Args: evaluation_metrics: metrics of an evaluation; empty if there was none.
        """
        progress = self.progress
        # the learning rate of the last update done; before the first update the line has no "lr"
        stats_line = self.progress.line(self.updates.lr(self.progress.step - 1), evaluation_metrics)
        self.run.stats(stats_line)
        formatted_columns = format_columns(stats_line, self.config.steps, self.updates.columns)
        # once an evaluation has ended the training, the objective need not decide
        stop_reason = None if progress.ended else self.updates.ends(stats_line)
        progress.ended |= stop_reason is not None
        self.run.status(
            formatted_columns, progress.step, progress.step if progress.ended else self.config.steps, "step"
        )
        if not self.ranks.is_main:
            return
        # only rank 0 holds the lines and prints
        self.lines.append(stats_line)
        signs = self.updates.signs(self.lines)
        new_warnings = {
            name: warning_text for name, warning_text in signs.items() if name not in self.warnings
        }
        for name, warning_text in new_warnings.items():
            self.say(f"Warning ({name}): {warning_text}")
        if new_warnings:
            self.warnings |= new_warnings
            self.run.write(WARNINGS, self.warnings)
        if stop_reason is not None:
            self.say(f"Training stopped after update {progress.step}: {stop_reason}")
        elif progress.ended and progress.step < self.config.steps:
            best_remark = f"the best value, {progress.best:.3f} after update {progress.kept_step}, is kept"
            criterion_name = {WIN_RATE: "held-out win rate", ACCURACY: "accuracy on held-out pairs"}[
                self.criterion
            ]
            self.say(
                f"Training stopped early after update {progress.step}: the {criterion_name} is"
                f" {evaluation_metrics[self.criterion]:.3f}; {best_remark}."
            )

    # States, and the best parameters.

    def _kept(self, step: int) -> Path:
        """Return the path for the parameters after update `step`, which are stored if they are the best."""
        return self.run.folder / f"kept-{step:09d}.safetensors"

    def _checkpoint(self) -> None:
        """Write a checkpoint, and delete old checkpoints and parameters.

        The last two checkpoints stay on the disk, and the best parameters that they refer to.
        """
        # there is no checkpoint after the last update
        planned_checkpoints = (self.config.steps - 1) // self.config.checkpoint_every
        with rehearsal.timed(rehearsal.CHECKPOINTS, "checkpoints", planned_checkpoints):
            self._write_checkpoint()

    def _write_checkpoint(self) -> None:
        """Write a checkpoint, and delete old ones, as `_checkpoint` describes."""
        tensors: dict[str, torch.Tensor] = {
            f"policy.{name}": p for name, p in self.trained_parameters.items()
        }
        tensors = (
            unsharded(tensors | checkpoint.optimizer_tensors("optim", self.updates.optimizer), self.ranks)
            | self.updates.tensors()
        )
        checkpoint_meta = {
            "progress": asdict(self.progress),
            "lines": self.run.lines,
            "warnings": self.warnings,
        }
        self.run.checkpoint(self.progress.step, tensors, checkpoint_meta)
        self.referenced_steps = [*self.referenced_steps, self.progress.kept_step][-checkpoint.KEEP :]
        # after the checkpoint: a run killed here still has what its newest state refers to
        if self.ranks.is_main:
            referenced_paths = {self._kept(step) for step in self.referenced_steps}
            for path in {*self.run.folder.glob("kept-*.safetensors")} - referenced_paths:
                path.unlink()

    def _resume(self) -> None:
        """Restore the newest checkpoint.

        If there is none, remove the lines that a killed run has left, and start from the first update.
        """
        line_count = 0  # number of lines of stats.jsonl at the checkpoint
        if self.ranks.broadcast(bool(checkpoint.available(self.run.folder)) if self.ranks.is_main else None):
            tensors, checkpoint_meta = self.run.read(previous=True)
            self._load({name: tensors[f"policy.{name}"] for name in self.trained_parameters}, self.policy)
            # the file holds full tensors: each rank takes its part of the optimiser's moments
            for parameter_index, parameter in enumerate(self.updates.parameters):
                moment_names = [name for name in tensors if name.startswith(f"optim.{parameter_index}.")]
                tensors |= {name: like(tensors[name], parameter) for name in moment_names}
            checkpoint.restore_optimizer("optim", self.updates.optimizer, tensors)
            self.updates.restore(tensors)
            self.progress = Progress(**version_0_1.flow_progress(checkpoint_meta["progress"]))
            self.warnings = version_0_1.flow_warnings(checkpoint_meta["warnings"])
            line_count = checkpoint_meta["lines"]
        self.referenced_steps = [self.progress.kept_step]
        # drops the lines of stats.jsonl that were written after the checkpoint
        self.run.continue_from(self.progress.step, line_count)
        self.run.write(WARNINGS, self.warnings)
        self.lines = read_lines(self.run.folder / STATS) if self.ranks.is_main else []

    def _finish(self) -> dict:
        """Write the policy and the result, and delete the checkpoints. Return the result of the training."""
        progress = self.progress
        training_result = None
        # gathering needs all ranks, so it comes before the part of rank 0
        kept_tensors = {} if self.evaluates else unsharded(self.trained_parameters, self.ranks)
        if self.ranks.is_main:
            if not self.evaluates:
                progress.kept_step = progress.step
            else:
                # read_tensors returns (tensors, description)
                kept_tensors = read_tensors(self._kept(progress.kept_step), KEPT)[0]
            is_sharded = any(map(sharded, self.trained_parameters.values()))
            # a sharded network cannot be saved by one rank: the values go into a new, unsharded one
            policy = policy_and_reference(self.stage, self.config)[0] if is_sharded else self.policy
            self._load(kept_tensors, policy)
            # the file keeps the spelling of version 0.1
            run_settings = version_0_1.former_settings(self.run.settings)
            policy_meta = {**run_settings, "kept_step": progress.kept_step, self.criterion: progress.best}
            save_policy(policy, self.run.folder / POLICY, policy_meta)
            warnings = [f"{name}: {warning_text}" for name, warning_text in self.warnings.items()]
            self.run.write(RESULT, {"kept_step": progress.kept_step, "warnings": warnings})
            # last of all, so that a run killed before this line can still be resumed
            for path in [*checkpoint.available(self.run.folder), *self.run.folder.glob("kept-*.safetensors")]:
                path.unlink()
            training_result = read_result(self.run.folder)
        return self.ranks.broadcast(training_result)
