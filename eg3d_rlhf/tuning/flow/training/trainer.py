"""Train one stage: adapters or all parameters, with early stopping on held-out data and exact resume.

A `Descent` subclass defines the objective: pair_training.py the ones on preference pairs (DPO, fine-tuning),
offline/ the ones on labels of single assets, online/ the ones on samples and their rewards. The folder of a
run holds:

    training_options.json    settings that the run was started with
    stats.jsonl, timing.jsonl    a line per `log_every` updates and per evaluation; equal runs write
                                 bitwise identical stats.jsonl
    warnings.json            warnings by name, each with the update at which it appeared
    samples/000100.png       renders of the same few assets at every evaluation (samples.py), if the
                             generator can be rendered
    checkpoint-*.safetensors, kept-*.safetensors    only during training: states to resume from, and the
                                                    best parameters
    policy/, result.json     written at the end

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
from training import checkpoint
from training.distributed import SINGLE, Ranks
from training.phases import LossNotFiniteError, cosine
from training.storage import read_tensors, write_tensors

WARNINGS = "warnings.json"
RESULT = "result.json"
POLICY = "policy"
SAMPLES = "samples"
# settings that a resumed run may change, since none of them changes what is trained
FREE = ("batch_gpu", "checkpoint_every", "log", "recompute", "samples")
KEPT = "kept parameters"


class Descent(ABC):
    """Objective of a training, with the policy's parameters and their optimiser. `run` does one update.

    Args: policy: the network in training; ranks: this process among those that train together.
    """

    columns: Sequence[tuple[str, str, str]] = ()  # of the status line: (figure, its name there, format)
    evaluates: bool = False  # whether `evaluate` returns figures

    def __init__(self, stage: FlowStage, config: StageTraining, policy: torch.nn.Module, ranks: Ranks):
        self.stage = stage
        self.training = config
        self.policy = policy
        self.ranks = ranks
        self.named = trained(policy)
        self.parameters = list(self.named.values())
        self.device = self.parameters[0].device
        self.optimizer = adamw(config, self.parameters)

    def lr(self, step: int) -> float:
        """Return the learning rate of an update, counted from 0."""
        config = self.training
        # step + 1: the first update of a warm-up would otherwise have the rate 0
        if config.schedule == "constant" or step < config.warmup:
            return config.lr * min(1.0, (step + 1) / max(config.warmup, 1))
        return cosine(config.lr, (step + 1 - config.warmup) / max(config.steps - config.warmup, 1))

    @abstractmethod
    def run(self, step: int) -> dict:
        """Do one update and return its figures: loss, grad_norm, number of examples, and others to log.

        `Progress` describes how figures are summarised.
        Raises: LossNotFiniteError for a loss or gradient that is not finite; the parameters are then
            unchanged.
        """

    @abstractmethod
    def signs(self, lines: Sequence[Mapping]) -> dict[str, str]:
        """Return warnings by name, as of the last line of stats.jsonl; the caller prints each once."""

    def evaluate(self) -> dict[str, float]:
        """Evaluate the current policy on held-out data, and return figures by name.

        They include `ACCURACY`, by which parameters are chosen if no win rate is measured.
        """
        return {}

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the state that a resumed run needs besides parameters and optimiser, by name."""
        return {}

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Restore the state that `tensors` returned; the mapping also holds other names."""
        return

    def ends(self, record: Mapping) -> str | None:
        """Return why training must stop after this line, or None to continue; the same on every rank."""
        return None

    def descend(self, step: int, totals: torch.Tensor, seen: str) -> list[float]:
        """Divide the summed gradients by their mass, clip them, and do one step of the optimiser.

        Args: totals: totals[0] is the mass (number of examples), totals[1] the mass times the loss; seen:
            names of the update's examples, for a message.
        Returns: mass, loss, norm of the gradient before clipping, then the other totals.
        Raises: LossNotFiniteError before the step, so that the parameters are unchanged.
        """
        # once, after passes and ranks are summed: the result does not depend on how a batch was divided
        for parameter in self.parameters:
            if parameter.grad is not None:
                parameter.grad /= totals[0]
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.training.clip)
        # sharded gradients give each rank a part of the norm
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        # one transfer to the CPU for all figures, since each one waits for the device
        mass, loss, *others, length = torch.cat([totals, norm.detach().reshape(1).to(totals)]).tolist()
        loss = loss / mass if mass else math.nan
        # before the step: AdamW would carry a NaN in its moments through all later updates
        if not math.isfinite(loss) or not math.isfinite(length):
            raise LossNotFiniteError(
                f"train_stage({self.stage.name}): expected a finite loss and gradient in update {step + 1},"
                f" got {loss:g} and {length:g} ({seen}, ...). Use a lower lr, a larger beta, or float32"
                " instead of bfloat16."
            )
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr(step)
        self.optimizer.step()
        return [mass, loss, length, *others]


def adamw(config: StageTraining, parameters: Sequence[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """Create the optimiser. Raises: ValueError if the settings need bitsandbytes and it is missing."""
    kind: Callable = torch.optim.AdamW
    if config.optimizer == "adamw8bit":
        try:
            # an optional dependency, imported only if it is used
            kind = importlib.import_module("bitsandbytes.optim").AdamW8bit
        except ImportError as error:
            raise ValueError(
                f"--set optimizer=adamw8bit: bitsandbytes cannot be imported: {error}. Run pip install"
                " bitsandbytes."
            ) from None
    return kind(parameters, lr=config.lr, weight_decay=config.weight_decay)


# Progress of a training, and the lines of stats.jsonl that summarise its updates.

WIN_RATE = "win_rate"
ACCURACY = "held_out_accuracy"
# figures that a line sums over its updates; the others are averaged over them
COUNTED = ("pairs", "samples")


@dataclass
class Progress:
    """State of a training besides its tensors; JSON."""

    step: int = 0  # updates done
    kept_step: int = 0  # update with the best win rate, or accuracy; the last if neither is measured
    best: float | None = None  # that win rate or accuracy, in 0..1
    since_best: int = 0  # evaluations since then
    ended: bool = False  # whether evaluations ended the training early
    sums: dict = field(default_factory=dict)  # sums over the updates since the last line

    def add(self, figures: dict) -> None:
        """Add an update's figures to the sums of the next line."""
        self.sums = _added(self.sums, {"updates": 1, **figures})

    def judged(self, rate: float, patience: int, max_drop: float) -> bool:
        """Record a win rate or an accuracy, and return whether it is the best so far.

        Of equal values the earlier one stays the best.
        """
        best = self.best is None or rate > self.best
        if best:
            self.best = rate
            self.kept_step = self.step
            self.since_best = 0
        else:
            self.since_best += 1
        assert self.best is not None
        self.ended = self.since_best >= patience or rate < self.best - max_drop
        return best

    def line(self, lr: float, evaluated: Mapping[str, float]) -> dict:
        """Summarise the updates since the last line, add what was evaluated, and start new sums."""
        sums = self.sums
        self.sums = {}
        record = {"step": self.step, **{name: sums[name] for name in COUNTED if name in sums}}
        # empty sums occur for the evaluation before the first update
        if sums:
            bins = sums.get("bins")  # figure -> sums of each time bin; a bin without pairs has no mean
            record |= {
                name: value / sums["updates"]
                for name, value in sums.items()
                if name not in (*COUNTED, "updates", "bins")
            }
            if bins:
                pairs = bins["pairs"]
                total = math.fsum(bins["pairs"])
                # the remaining lists hold sums over pairs, [TIME_BINS] each
                values = {name: of_bins for name, of_bins in bins.items() if name != "pairs"}
                per_bin = {
                    name: [x / n if n else None for x, n in zip(of_bins, pairs, strict=True)]
                    for name, of_bins in values.items()
                }
                record |= {name: math.fsum(of_bins) / total for name, of_bins in values.items()}
                record["time_bins"] = {"pairs": pairs, **per_bin}
            record["lr"] = lr
        return {**record, **evaluated}


def _added(a: Mapping, b: dict) -> dict:
    """Add two nested dictionaries of numbers and lists of numbers, element by element."""
    # the first update of a line
    if not a:
        return b
    plus: dict[type, Callable] = {dict: _added, list: lambda x, y: [p + q for p, q in zip(x, y, strict=True)]}
    return {k: plus[type(v)](a[k], v) if type(v) in plus else a[k] + v for k, v in b.items()}


def read_lines(path: Path) -> list[dict]:
    """Read the lines of a stats.jsonl; an absent file has none."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [version_0_1.flow_stats(json.loads(line)) for line in lines]


def shown(record: Mapping, steps: int, columns: Sequence[tuple[str, str, str]]) -> dict[str, str]:
    """Format a line's figures in fixed widths, for the status line.

    Args: columns: as Descent's; they stand between the columns that every training has.
    """
    fields = {"step": f"{record['step']:>6d}/{steps:<6d}"}
    evaluated = ((WIN_RATE, "win_rate", "<6.3f"), (ACCURACY, "held_out", "<6.3f"))
    for name, short, form in (
        ("loss", "loss", "<8.4f"),
        *columns,
        ("grad_norm", "grad", "<8.2e"),
        *evaluated,
    ):
        value = record.get(name)
        text = "" if value is None else format(value, form)
        # an absent figure is padded to the width of its format, such as 6 in "<6.3f", so that columns align
        fields[short] = text.ljust(int(form.lstrip("<+").split(".")[0]))
    return fields


NOTHING = 0.02  # a change of the win rate up to this is taken for noise
DROP = 0.1  # fall of the win rate that is reported when it is measured twice in a row

REGULARISE = "Regularise the loss (loser_weight=0.5 or sft_weight=0.5), raise beta, or train fewer updates."


def win_rates(lines: Sequence[Mapping]) -> list[tuple[int, float]]:
    """Return (update, win rate) of the lines that have a win rate."""
    return [(line["step"], line[WIN_RATE]) for line in lines if line.get(WIN_RATE) is not None]


def win_rate_signs(rates: Sequence[tuple[int, float]], remedy: str = REGULARISE) -> dict[str, str]:
    """Return warnings about a falling win rate, by name.

    A large fall counts at once, a smaller one only if it is measured twice in a row, because win rates of a
    few dozen assets are noisy.
    """
    if len(rates) < 2:
        return {}
    signs = {}
    step, last = rates[-1]
    _, start = rates[0]
    twice = max(rate for _, rate in rates[-2:])  # the better of the last two
    # 0.5 is a tie with the network that assets are compared with; a start below it is the level then
    level = min(0.5, start)
    if last < level - DROP or twice < level - NOTHING:
        signs["collapse"] = (
            f"step {step}: the held-out win rate is {last:.3f}, below that of the network before tuning."
            f" {remedy}"
        )
    # of equal rates the earliest
    best_step, best = max(rates, key=lambda entry: (entry[1], -entry[0]))
    if last < best - 2 * DROP or twice < best - DROP:
        signs["past-best"] = (
            f"step {step}: the held-out win rate fell to {last:.3f} from {best:.3f} at step {best_step}."
            f" {remedy}"
        )
    return signs


# The loop.


def policy_and_reference(
    stage: FlowStage, config: StageTraining
) -> tuple[torch.nn.Module, FrozenModel | None]:
    """Make the network to train, and its reference, or None if the loss needs none.

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


def recomputing(model: Any, on: bool) -> None:
    """Switch the recomputation of blocks in the backward pass, in networks that support it."""
    if hasattr(model, "recompute"):
        model.recompute = on


Draw = Callable[[torch.nn.Module, Path], Path]  # renders samples of a network into a file
# returns a network's held-out win rate in 0..1; every rank calls it, and rank 0's result counts
WinRate = Callable[[torch.nn.Module], float]


@dataclass(frozen=True, kw_only=True)
class StageResult:
    """Result of a training of a stage."""

    weights: Path  # folder that tuned_model reads
    kept_step: int  # number of updates that led to those weights; 0: the network that training began with
    stats: list[dict]  # lines of stats.jsonl
    warnings: list[str]  # known signs of failure that appeared

    def measured(self, name: str) -> list[list]:
        """Return [update, value] of every line that has the figure."""
        return [[line["step"], line[name]] for line in self.stats if line.get(name) is not None]

    def record(self) -> dict:
        """Return the record of a training that a store keeps, JSON."""
        return {
            "kept_step": self.kept_step,
            "warnings": list(self.warnings),
            "win_rates": self.measured(WIN_RATE),
        }


# makes a Descent from a run, the network to train, and its reference
Start = Callable[[Run, torch.nn.Module, FrozenModel | None], Descent]


def train(
    stage: FlowStage,
    config: StageTraining,
    known: dict,
    start: Start,
    out: Path,
    *,
    held_out: WinRate | None = None,
    ranks: Ranks = SINGLE,
    resume: bool = False,
    say: Callable[[str], None] = print,
    shards: bool = False,
    samples: Draw | None = None,
) -> StageResult:
    """Train a copy of a stage's network with the Descent that `start` makes.

    Args: known: JSON of all that decides the training besides the config; start: called with the run, the
        copy and its reference. held_out: called with the network every `held_out_every` updates: the
        parameters with the best win rate are kept, and those before the first update can be the best. resume:
        resume the run in the folder, if there is one; say: prints the status lines; shards: whether the
        Descent accepts a network whose parameters are sharded over ranks; samples: renders a few samples at
        every evaluation.
    Raises: see train_stage.
    """
    device = next(stage.model.parameters()).device
    if ranks.main:
        out.mkdir(parents=True, exist_ok=True)
    options = {
        "stage": stage.name,
        "precision": stage.precision,
        "config": asdict(config),
        "held_out": held_out is not None,
        **known,
    }
    devices = [device] if device.type == "cuda" else []
    # fork_rng: dropout seeds the global generators, which the caller must find unchanged
    with (
        Run(out, options, ranks=ranks, say=say, log=config.log) as run,
        torch.random.fork_rng(devices=devices),
    ):
        # rank 0 alone reads the folder: another rank might see it before or after a file is written
        begun, finished = ranks.broadcast([bool(recorded(out)), read_result(out)] if ranks.main else None)
        if not begun:
            run.begin()
        elif resume:
            run.resume(FREE)
        else:
            raise ValueError(
                f"train_stage: expected a new folder, but {out} holds a run. Resume it, or name another"
                " folder."
            )
        if finished is None:
            policy, reference = policy_and_reference(stage, config)
            if config.recompute != "auto":
                recomputing(policy, config.recompute == "on")
            # ranks start from rank 0's parameters, adapters included
            ranks.broadcast_(trained(policy).values())
            if ranks.world > 1 and config.lora is None and shards:
                if config.optimizer != "adamw":
                    raise ValueError(
                        f"--set optimizer={config.optimizer}: --tune=full on several processes needs adamw."
                        " Leave the setting out."
                    )
                shard(policy, ranks)
            finished = _Training(
                start(run, policy, reference), config, held_out, run, say, samples if config.samples else None
            ).train()
    return StageResult(**finished, weights=out / POLICY)


def trained(policy: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Return the parameters that are trained, by name."""
    return {name: p for name, p in policy.named_parameters() if p.requires_grad}


def read_result(folder: Path) -> dict | None:
    """Read the result and the lines of a finished training; return None for an unfinished one."""
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
        samples: Draw | None,
    ):
        self.samples = samples  # None: no renders are written
        self.updates = updates
        self.policy = updates.policy
        self.named = updates.named
        self.stage = updates.stage
        self.config = config
        self.held_out = held_out
        self.run = run
        self.ranks = run.ranks
        self.say = say
        self.evaluates = held_out is not None or updates.evaluates
        # the figure by which the best parameters are chosen
        self.chosen_by = WIN_RATE if held_out is not None else ACCURACY
        self.progress = Progress()  # replaced by `_resume` if there is a checkpoint
        self.lines: list[dict] = []  # of stats.jsonl
        self.warnings: dict[str, str] = {}  # by name
        self.named_steps = [0]  # updates whose kept parameters the checkpoints on the disk refer to

    # The loop.

    def train(self) -> dict:
        """Train to the end, and return the fields of StageResult as JSON."""
        self._resume()
        # the untuned network is evaluated, too: if no update improves it, it is kept
        if self.evaluates and self.progress.best is None:
            self._report(self._evaluate())
        with self.run.stoppable():
            while self.progress.step < self.config.steps and not self.progress.ended:
                # a signal may reach one rank alone, so all ranks agree before they stop
                if self.ranks.any(self.run.stop_requested is not None)[0]:
                    self._checkpoint()
                    signal = next(
                        name for name in self.ranks.gather(self.run.stop_requested) if name is not None
                    )
                    after = f"stopped after update {self.progress.step}"
                    raise StoppedError(
                        f"{signal}: training of stage {self.stage.name!r} {after}. Resume it to continue."
                    )
                self._update()
        return self._finish()

    def _update(self) -> None:
        """Do one update; then evaluate, write a line and write a checkpoint, where they are due."""
        progress = self.progress
        config = self.config
        try:
            progress.add(self.updates.run(progress.step))
        except LossNotFiniteError as error:
            # names of checkpoints hold the update with leading zeros, so the largest is the newest
            state = max(checkpoint.available(self.run.folder), default="none was written yet")
            raise LossNotFiniteError(f"{error} Last state: {state}.") from None
        progress.step += 1
        last = progress.step == config.steps
        evaluated = self.evaluates and (last or progress.step % config.held_out_every == 0)
        if evaluated or last or progress.step % config.log_every == 0:
            self._report(self._evaluate() if evaluated else {})
        # after the last update the policy itself is written
        if progress.step % config.checkpoint_every == 0 and not last:
            self._checkpoint()

    # Evaluations and lines.

    def _evaluate(self) -> dict[str, float]:
        """Evaluate the policy, and keep its parameters if they are the best so far.

        The win rate decides where one is measured, and the accuracy on held-out pairs otherwise.
        """
        with gathered(self.policy):
            rate = {} if self.held_out is None else {WIN_RATE: float(self.held_out(self.policy))}
            # rank 0's figures count, so that all ranks decide alike
            figures = self.ranks.broadcast(self.updates.evaluate() | rate)
            if self.samples is not None and self.ranks.main:
                path = self.samples(self.policy, self.run.folder / SAMPLES / f"{self.progress.step:06d}.png")
                self.run.picture(SAMPLES, path, self.progress.step)
        value = figures[self.chosen_by]
        assert 0 <= value <= 1
        # an accuracy on a few dozen pairs is too noisy to stop at one large fall
        max_drop = self.config.max_drop if self.chosen_by == WIN_RATE else math.inf
        if self.progress.judged(value, self.config.patience, max_drop):
            values = unsharded(self.named, self.ranks)
            if self.ranks.main:
                write_tensors(self._kept(self.progress.step), KEPT, values, {"step": self.progress.step})
        return figures

    @torch.no_grad()
    def _load(self, values: Mapping[str, torch.Tensor], policy: torch.nn.Module) -> None:
        """Copy values into the trained parameters of a policy, in place."""
        for name, parameter in trained(policy).items():
            parameter.copy_(like(values[name], parameter))

    def _report(self, evaluated: Mapping[str, float]) -> None:
        """Write the line of the updates since the last one, its status line, and new warnings."""
        progress = self.progress
        # the learning rate of the last update done; before the first update the line has no "lr"
        record = self.progress.line(self.updates.lr(self.progress.step - 1), evaluated)
        self.run.stats(record)
        at = shown(record, self.config.steps, self.updates.columns)
        stopped = None if progress.ended else self.updates.ends(record)
        progress.ended |= stopped is not None
        self.run.status(at, progress.step, progress.step if progress.ended else self.config.steps, "step")
        if not self.ranks.main:
            return
        # only rank 0 holds the lines and prints
        self.lines.append(record)
        signs = self.updates.signs(self.lines)
        fresh = {name: text for name, text in signs.items() if name not in self.warnings}
        for name, text in fresh.items():
            self.say(f"Warning ({name}): {text}")
        if fresh:
            self.warnings |= fresh
            self.run.write(WARNINGS, self.warnings)
        if stopped is not None:
            self.say(f"Stopped after update {progress.step}: {stopped}")
        elif progress.ended and progress.step < self.config.steps:
            best = f"the best, {progress.best:.3f} after update {progress.kept_step}, is kept"
            what = {WIN_RATE: "held-out win rate", ACCURACY: "accuracy on held-out pairs"}[self.chosen_by]
            self.say(
                f"Stopped early after update {progress.step}: the {what} is {evaluated[self.chosen_by]:.3f};"
                f" {best}."
            )

    # States, and the best parameters.

    def _kept(self, step: int) -> Path:
        """Return the file of the best parameters, as of an update."""
        return self.run.folder / f"kept-{step:09d}.safetensors"

    def _checkpoint(self) -> None:
        """Write a checkpoint, and delete old ones.

        The last two checkpoints stay, and the best parameters that they refer to.
        """
        tensors: dict[str, torch.Tensor] = {f"policy.{name}": p for name, p in self.named.items()}
        tensors = (
            unsharded(tensors | checkpoint.optimizer_tensors("optim", self.updates.optimizer), self.ranks)
            | self.updates.tensors()
        )
        meta = {"progress": asdict(self.progress), "lines": self.run.lines, "warnings": self.warnings}
        self.run.checkpoint(self.progress.step, tensors, meta)
        self.named_steps = [*self.named_steps, self.progress.kept_step][-checkpoint.KEEP :]
        # after the checkpoint: a run killed here still has what its newest state refers to
        if self.ranks.main:
            for path in {*self.run.folder.glob("kept-*.safetensors")} - {
                self._kept(step) for step in self.named_steps
            }:
                path.unlink()

    def _resume(self) -> None:
        """Restore the newest checkpoint; without one, remove what a killed run has left, and start anew."""
        lines = 0
        if self.ranks.broadcast(bool(checkpoint.available(self.run.folder)) if self.ranks.main else None):
            tensors, meta = self.run.read(previous=True)
            self._load({name: tensors[f"policy.{name}"] for name in self.named}, self.policy)
            # the file holds full tensors: each rank takes its part of the optimiser's moments
            for number, parameter in enumerate(self.updates.parameters):
                moments = [name for name in tensors if name.startswith(f"optim.{number}.")]
                tensors |= {name: like(tensors[name], parameter) for name in moments}
            checkpoint.restore_optimizer("optim", self.updates.optimizer, tensors)
            self.updates.restore(tensors)
            self.progress = Progress(**version_0_1.flow_progress(meta["progress"]))
            self.warnings = version_0_1.flow_warnings(meta["warnings"])
            lines = meta["lines"]
        self.named_steps = [self.progress.kept_step]
        # drops the lines of stats.jsonl that were written after the checkpoint
        self.run.go_on(self.progress.step, lines)
        self.run.write(WARNINGS, self.warnings)
        self.lines = read_lines(self.run.folder / STATS) if self.ranks.main else []

    def _finish(self) -> dict:
        """Write the policy and the result, and delete the checkpoints."""
        progress = self.progress
        result = None
        # gathering needs all ranks, so it comes before the part of rank 0
        values = {} if self.evaluates else unsharded(self.named, self.ranks)
        if self.ranks.main:
            if not self.evaluates:
                progress.kept_step = progress.step
            else:
                values = read_tensors(self._kept(progress.kept_step), KEPT)[0]
            divided = any(map(sharded, self.named.values()))
            # a sharded network cannot be saved by one rank: the values go into a new, unsharded one
            policy = policy_and_reference(self.stage, self.config)[0] if divided else self.policy
            self._load(values, policy)
            # the file keeps the spelling of version 0.1
            settings = version_0_1.former_settings(self.run.settings)
            meta = {**settings, "kept_step": progress.kept_step, self.chosen_by: progress.best}
            save_policy(policy, self.run.folder / POLICY, meta)
            warnings = [f"{name}: {text}" for name, text in self.warnings.items()]
            self.run.write(RESULT, {"kept_step": progress.kept_step, "warnings": warnings})
            # last of all, so that a run killed before this line can still be resumed
            for path in [*checkpoint.available(self.run.folder), *self.run.folder.glob("kept-*.safetensors")]:
                path.unlink()
            result = read_result(self.run.folder)
        return self.ranks.broadcast(result)
