"""Train one stage: adapters or all parameters, early stop by what is held out, exact resume. What is
minimised is a Descent's affair: pair_training.py has preference pairs' (DPO, fine-tuning), online/ that of
samples and their rewards.

    training_options.json    what the run was begun with
    stats.jsonl, timing.jsonl    a line per `log_every` updates and per evaluation; of stats.jsonl equal runs
                                 give equal bytes
    warnings.json            by name, each with the update that it was seen at
    samples/000100.png       the same few assets at every evaluation (samples.py), where there is a way to
                             draw them
    checkpoint-*.safetensors, kept-*.safetensors    while it runs: states to go on from, and the best
                                                    parameters
    policy/, result.json     when it is finished

Everything that is drawn derives from (seed, pair, pass over the pairs, update) alone: a resumed run equals an
uninterrupted one bit for bit, and neither passes per batch nor ranks change what is learned beyond rounding.
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
# settings that a resumed run may change
FREE = ("batch_gpu", "checkpoint_every", "log", "recompute", "samples")
KEPT = "kept parameters"


class Descent(ABC):
    """A policy's parameters on their way down; `run`, of what is minimised, is one update.

    Args: policy: the network in training; ranks: this process among those that train together.
    """

    columns: Sequence[tuple[str, str, str]] = ()  # of the status line: figure, its name there, format
    evaluates: bool = False  # whether `evaluate` has figures

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
        config = self.training
        if config.schedule == "constant" or step < config.warmup:
            return config.lr * min(1.0, (step + 1) / max(config.warmup, 1))
        return cosine(config.lr, (step + 1 - config.warmup) / max(config.steps - config.warmup, 1))

    @abstractmethod
    def run(self, step: int) -> dict:
        """One update -> loss, grad_norm, how many examples it saw, and what else is logged; see `Progress`.

        Raises: LossNotFiniteError for a loss or gradient that is not finite; the parameters are then as they
            were.
        """

    @abstractmethod
    def signs(self, lines: Sequence[Mapping]) -> dict[str, str]:
        """Warnings by name, as of the last line of stats.jsonl; the caller says each once."""

    def evaluate(self) -> dict[str, float]:
        """Figures of the policy as it is, from what is held out: `ACCURACY` among them, by which it is chosen
        where there is no judge.
        """
        return {}

    def tensors(self) -> dict[str, torch.Tensor]:
        """What there is to go on from besides the parameters and the optimiser, by name."""
        return {}

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Go on from what `tensors` gave; other names are among them."""
        return

    def ends(self, record: Mapping) -> str | None:
        """Why training must stop after this line, the same on every rank; None: it goes on."""
        return None

    def descend(self, step: int, totals: torch.Tensor, seen: str) -> list[float]:
        """Divide the summed gradients by totals[0], their mass, clip and step; totals[1] is the mass times
        the loss.

        Args: seen: names of what the update saw, for a message. Returns: mass, loss, norm of the gradient,
            then the other totals.
        """
        for parameter in self.parameters:
            if parameter.grad is not None:
                parameter.grad /= totals[0]
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.training.clip)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        mass, loss, *others, length = torch.cat([totals, norm.detach().reshape(1).to(totals)]).tolist()
        loss = loss / mass if mass else math.nan
        if not math.isfinite(loss) or not math.isfinite(length):
            raise LossNotFiniteError(
                f"train_stage({self.stage.name}): expected a finite loss and gradient in update {step + 1},"
                f" got {loss:g} and {length:g} ({seen}, ...). Use a lower lr or a larger beta, and float32"
                " where precision is bfloat16."
            )
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr(step)
        self.optimizer.step()
        return [mass, loss, length, *others]


def adamw(config: StageTraining, parameters: Sequence[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """Raises: ValueError where bitsandbytes is asked for and missing."""
    kind: Callable = torch.optim.AdamW
    if config.optimizer == "adamw8bit":
        try:
            kind = importlib.import_module("bitsandbytes.optim").AdamW8bit
        except ImportError as error:
            raise ValueError(
                f"--set optimizer=adamw8bit: expected bitsandbytes, got: {error}. Run pip install"
                " bitsandbytes."
            ) from None
    return kind(parameters, lr=config.lr, weight_decay=config.weight_decay)


# How far a training is, and the lines made of what its updates tell.

WIN_RATE = "win_rate"
ACCURACY = "held_out_accuracy"
# figures that a line has the sum of; of the others it has the mean over updates
COUNTED = ("pairs", "samples")


@dataclass
class Progress:
    """What changes besides tensors; JSON."""

    step: int = 0  # updates done
    kept_step: int = 0  # with the best win rate, or accuracy; the last where neither is measured
    best: float | None = None  # that one
    since_best: int = 0  # evaluations since
    ended: bool = False  # by them
    sums: dict = field(default_factory=dict)  # of the line under way

    def add(self, figures: dict) -> None:
        """Count an update's figures into the line under way."""
        self.sums = _added(self.sums, {"updates": 1, **figures})

    def judged(self, rate: float, patience: int, max_drop: float) -> bool:
        """Note a win rate, or an accuracy; whether it is the best so far. A tie goes to the earlier."""
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
        """The record of the line under way, which ends with it, and of what was evaluated."""
        sums = self.sums
        self.sums = {}
        record = {"step": self.step, **{name: sums[name] for name in COUNTED if name in sums}}
        if sums:
            bins = sums.get("bins")  # sums; a bin without pairs has no mean
            record |= {
                name: value / sums["updates"]
                for name, value in sums.items()
                if name not in (*COUNTED, "updates", "bins")
            }
            if bins:
                pairs = bins["pairs"]
                total = math.fsum(bins["pairs"])
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
    """Sums of numbers, and of lists of them, in nested values."""
    if not a:
        return b
    plus: dict[type, Callable] = {dict: _added, list: lambda x, y: [p + q for p, q in zip(x, y, strict=True)]}
    return {k: plus[type(v)](a[k], v) if type(v) in plus else a[k] + v for k, v in b.items()}


def read_lines(path: Path) -> list[dict]:
    """The lines of a stats.jsonl; none where there is none."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [version_0_1.flow_stats(json.loads(line)) for line in lines]


def shown(record: Mapping, steps: int, columns: Sequence[tuple[str, str, str]]) -> dict[str, str]:
    """A line's figures in fixed widths, for the status line; columns: as Descent's, between those that every
    training has.
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
        fields[short] = text.ljust(int(form.lstrip("<+").split(".")[0]))
    return fields


NOTHING = 0.02  # changes of a win rate that are within its noise
DROP = 0.1  # of a win rate, measured twice

REGULARISE = "Regularise the loss (loser_weight=0.5 or sft_weight=0.5), raise beta, or train fewer updates."


def win_rates(lines: Sequence[Mapping]) -> list[tuple[int, float]]:
    """(update, win rate) where one was measured."""
    return [(line["step"], line[WIN_RATE]) for line in lines if line.get(WIN_RATE) is not None]


def win_rate_signs(rates: Sequence[tuple[int, float]], remedy: str = REGULARISE) -> dict[str, str]:
    """A large fall counts at once, a smaller one when it is measured twice in a row: win rates of a few dozen
    assets are noisy.
    """
    if len(rates) < 2:
        return {}
    signs = {}
    step, last = rates[-1]
    _, start = rates[0]
    twice = max(rate for _, rate in rates[-2:])  # the better of the last two
    level = min(0.5, start)
    if last < level - DROP or twice < level - NOTHING:
        signs["collapse"] = (
            f"step {step}: the held-out win rate is {last:.3f}, worse than what it is compared with. {remedy}"
        )
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
    """A network to train, and what it is compared with, which takes no memory besides the stage's own; None
    where the loss needs none.
    """
    if config.lora is not None:
        policy = shared_copy(stage.model)
        add_lora(policy, config.lora, config.seed)
        return policy, AdapterOff(policy) if config.needs_reference else None
    policy = copy.deepcopy(stage.model)
    reference = shared_copy(stage.model)
    if any(p.dtype != torch.float32 for p in policy.parameters()):
        policy = policy.float()
        reference = reference.float()
    policy.requires_grad_(True)
    return policy, FrozenModel(reference, policy) if config.needs_reference else None


def recomputing(model: Any, on: bool) -> None:
    """Whether blocks are computed again in the backward pass, in networks that can."""
    if hasattr(model, "recompute"):
        model.recompute = on


Draw = Callable[[torch.nn.Module, Path], Path]  # a picture of what a network makes, into a file
# a network's held-out win rate, in 0..1; every rank asks, the first one's counts
Judge = Callable[[torch.nn.Module], float]


@dataclass(frozen=True, kw_only=True)
class StageResult:
    weights: Path  # folder that tuned_model reads
    kept_step: int  # updates behind those weights; 0: the network that training began with
    stats: list[dict]  # lines of stats.jsonl
    warnings: list[str]  # known failure signs that were seen

    def measured(self, name: str) -> list[list]:
        """Return [update, value] of a figure where it was measured."""
        return [[line["step"], line[name]] for line in self.stats if line.get(name) is not None]

    def record(self) -> dict:
        """Return what a store keeps of a training, JSON."""
        return {
            "kept_step": self.kept_step,
            "warnings": list(self.warnings),
            "win_rates": self.measured(WIN_RATE),
        }


# of a run, the network to train, and its reference
Start = Callable[[Run, torch.nn.Module, FrozenModel | None], Descent]


def train(
    stage: FlowStage,
    config: StageTraining,
    known: dict,
    start: Start,
    out: Path,
    *,
    held_out: Judge | None = None,
    ranks: Ranks = SINGLE,
    resume: bool = False,
    say: Callable[[str], None] = print,
    shards: bool = False,
    samples: Draw | None = None,
) -> StageResult:
    """Train a copy of a stage's network with the Descent that `start` makes of the run, the copy and its
    reference.

    Args: known: JSON of all that decides the training besides the config; shards: whether the Descent takes a
        network whose parameters are divided over ranks, as all of them are then trained. held_out: called
        with the network every `held_out_every` updates: the parameters with the best win rate are kept, those
        before the first update among them. resume: resume the run in the folder, if there is one; say: prints
        the status lines; samples: draws a picture at every evaluation.
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
    with (
        Run(out, options, ranks=ranks, say=say, log=config.log) as run,
        torch.random.fork_rng(devices=devices),
    ):
        begun, finished = ranks.broadcast([bool(recorded(out)), read_result(out)] if ranks.main else None)
        if not begun:
            run.begin()
        elif resume:
            run.resume(FREE)
        else:
            raise ValueError(
                f"train_stage: expected a new folder, got {out} with a run in it. Resume it, or name another."
            )
        if finished is None:
            policy, reference = policy_and_reference(stage, config)
            if config.recompute != "auto":
                recomputing(policy, config.recompute == "on")
            ranks.broadcast_(trained(policy).values())
            if ranks.world > 1 and config.lora is None and shards:
                if config.optimizer != "adamw":
                    raise ValueError(
                        f"--set optimizer={config.optimizer}: expected adamw for --tune=full over processes."
                        " Leave it out."
                    )
                shard(policy, ranks)
            finished = _Training(
                start(run, policy, reference), config, held_out, run, say, samples if config.samples else None
            ).train()
    return StageResult(**finished, weights=out / POLICY)


def trained(policy: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The parameters that training moves, by name."""
    return {name: p for name, p in policy.named_parameters() if p.requires_grad}


def read_result(folder: Path) -> dict | None:
    """What a finished training says of itself, and its lines; None of another."""
    if not (folder / RESULT).exists():
        return None
    return {**json.loads((folder / RESULT).read_text()), "stats": read_lines(folder / STATS)}


class _Training:
    def __init__(
        self,
        updates: Descent,
        config: StageTraining,
        held_out: Judge | None,
        run: Run,
        say: Callable[[str], None],
        samples: Draw | None,
    ):
        self.samples = samples
        self.updates = updates
        self.policy = updates.policy
        self.named = updates.named
        self.stage = updates.stage
        self.config = config
        self.held_out = held_out
        self.run = run
        self.ranks = run.ranks
        self.say = say
        self.judged = held_out is not None or updates.evaluates
        self.chosen_by = WIN_RATE if held_out is not None else ACCURACY
        self.progress = Progress()
        self.lines: list[dict] = []  # of stats.jsonl
        self.warnings: dict[str, str] = {}  # by name
        self.named_steps = [0]  # updates whose parameters the states on the disk name

    # The loop.

    def train(self) -> dict:
        """Train to the end; returns fields of StageResult as JSON."""
        self._resume()
        if self.judged and self.progress.best is None:
            self._report(self._evaluate())
        with self.run.stoppable():
            while self.progress.step < self.config.steps and not self.progress.ended:
                if self.ranks.any(self.run.stop_requested is not None)[0]:
                    self._checkpoint()
                    signal = next(
                        name for name in self.ranks.gather(self.run.stop_requested) if name is not None
                    )
                    after = f"stopped after update {self.progress.step}"
                    raise StoppedError(f"{signal}: training of stage {self.stage.name!r} {after}; resume it.")
                self._update()
        return self._finish()

    def _update(self) -> None:
        progress = self.progress
        config = self.config
        try:
            progress.add(self.updates.run(progress.step))
        except LossNotFiniteError as error:
            state = max(checkpoint.available(self.run.folder), default="none was written yet")
            raise LossNotFiniteError(f"{error} Last state: {state}.") from None
        progress.step += 1
        last = progress.step == config.steps
        judged = self.judged and (last or progress.step % config.held_out_every == 0)
        if judged or last or progress.step % config.log_every == 0:
            self._report(self._evaluate() if judged else {})
        if progress.step % config.checkpoint_every == 0 and not last:
            self._checkpoint()

    # Evaluations and lines.

    def _evaluate(self) -> dict[str, float]:
        """Measure, and keep the parameters if they are the best so far, by the judge where there is one."""
        with gathered(self.policy):
            rate = {} if self.held_out is None else {WIN_RATE: float(self.held_out(self.policy))}
            figures = self.ranks.broadcast(self.updates.evaluate() | rate)
            if self.samples is not None and self.ranks.main:
                path = self.samples(self.policy, self.run.folder / SAMPLES / f"{self.progress.step:06d}.png")
                self.run.picture(SAMPLES, path, self.progress.step)
        value = figures[self.chosen_by]
        assert 0 <= value <= 1
        # an accuracy on a few dozen pairs is noisier
        max_drop = self.config.max_drop if self.chosen_by == WIN_RATE else math.inf
        if self.progress.judged(value, self.config.patience, max_drop):
            values = unsharded(self.named, self.ranks)
            if self.ranks.main:
                write_tensors(self._kept(self.progress.step), KEPT, values, {"step": self.progress.step})
        return figures

    @torch.no_grad()
    def _load(self, values: Mapping[str, torch.Tensor], policy: torch.nn.Module) -> None:
        for name, parameter in trained(policy).items():
            parameter.copy_(like(values[name], parameter))

    def _report(self, evaluated: Mapping[str, float]) -> None:
        """End the line under way; say what it shows."""
        progress = self.progress
        record = self.progress.line(self.updates.lr(self.progress.step - 1), evaluated)
        self.run.stats(record)
        at = shown(record, self.config.steps, self.updates.columns)
        stopped = None if progress.ended else self.updates.ends(record)
        progress.ended |= stopped is not None
        self.run.status(at, progress.step, progress.step if progress.ended else self.config.steps, "step")
        if not self.ranks.main:
            return
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
        return self.run.folder / f"kept-{step:09d}.safetensors"

    def _checkpoint(self) -> None:
        """Write the state; the last two are kept, and the parameters that they name."""
        tensors: dict[str, torch.Tensor] = {f"policy.{name}": p for name, p in self.named.items()}
        tensors = (
            unsharded(tensors | checkpoint.optimizer_tensors("optim", self.updates.optimizer), self.ranks)
            | self.updates.tensors()
        )
        meta = {"progress": asdict(self.progress), "lines": self.run.lines, "warnings": self.warnings}
        self.run.checkpoint(self.progress.step, tensors, meta)
        self.named_steps = [*self.named_steps, self.progress.kept_step][-checkpoint.KEEP :]
        if self.ranks.main:
            for path in {*self.run.folder.glob("kept-*.safetensors")} - {
                self._kept(step) for step in self.named_steps
            }:
                path.unlink()

    def _resume(self) -> None:
        """Continue from the newest state, or clean up what a run left that was killed before its first."""
        lines = 0
        if self.ranks.broadcast(bool(checkpoint.available(self.run.folder)) if self.ranks.main else None):
            tensors, meta = self.run.read(previous=True)
            self._load({name: tensors[f"policy.{name}"] for name in self.named}, self.policy)
            for number, parameter in enumerate(self.updates.parameters):
                moments = [name for name in tensors if name.startswith(f"optim.{number}.")]
                tensors |= {name: like(tensors[name], parameter) for name in moments}
            checkpoint.restore_optimizer("optim", self.updates.optimizer, tensors)
            self.updates.restore(tensors)
            self.progress = Progress(**version_0_1.flow_progress(meta["progress"]))
            self.warnings = version_0_1.flow_warnings(meta["warnings"])
            lines = meta["lines"]
        self.named_steps = [self.progress.kept_step]
        self.run.go_on(self.progress.step, lines)
        self.run.write(WARNINGS, self.warnings)
        self.lines = read_lines(self.run.folder / STATS) if self.ranks.main else []

    def _finish(self) -> dict:
        """Write the policy, and delete what was there to go on from."""
        progress = self.progress
        result = None
        values = {} if self.judged else unsharded(self.named, self.ranks)
        if self.ranks.main:
            if not self.judged:
                progress.kept_step = progress.step
            else:
                values = read_tensors(self._kept(progress.kept_step), KEPT)[0]
            divided = any(map(sharded, self.named.values()))
            policy = policy_and_reference(self.stage, self.config)[0] if divided else self.policy
            self._load(values, policy)
            settings = version_0_1.former_settings(self.run.settings)
            meta = {**settings, "kept_step": progress.kept_step, self.chosen_by: progress.best}
            save_policy(policy, self.run.folder / POLICY, meta)
            warnings = [f"{name}: {text}" for name, text in self.warnings.items()]
            self.run.write(RESULT, {"kept_step": progress.kept_step, "warnings": warnings})
            for path in [*checkpoint.available(self.run.folder), *self.run.folder.glob("kept-*.safetensors")]:
                path.unlink()
            result = read_result(self.run.folder)
        return self.ranks.broadcast(result)
