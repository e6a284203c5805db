"""Train one stage: adapters or all parameters, early stop on a held-out win rate, exact resume. What is minimised is a Descent's affair:
`train_stage` is for preference pairs (DPO, fine-tuning), `train` for any.

    training_options.json    what the run was begun with
    stats.jsonl, timing.jsonl    a line per `log_every` updates and per win rate; of stats.jsonl equal runs give equal bytes
    warnings.json            by name, each with the update that it was seen at
    checkpoint-*.safetensors, kept-*.safetensors    while it runs: states to go on from, and the parameters with the best win rate
    policy/, result.json     when it is finished

Everything that is drawn derives from (seed, pair, pass over the pairs, update) alone: a resumed run equals an uninterrupted one bit for
bit, and neither passes per batch nor ranks change what is learned beyond rounding.
"""

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from eg3d_rlhf.experiments.run import STATS, Run, recorded
from eg3d_rlhf.models.lora import add_lora
from eg3d_rlhf.models.policies import save_policy, shared_copy
from eg3d_rlhf.models.sparse import collate, parts_of
from eg3d_rlhf.tuning.flow.condition import to_device
from eg3d_rlhf.tuning.flow.descent import Descent, StageTraining
from eg3d_rlhf.tuning.flow.pairs import PreferencePair, check_unique
from eg3d_rlhf.tuning.flow.progress import Progress, read_lines, shown
from eg3d_rlhf.tuning.flow.reference import AdapterOff, CachedErrors, FrozenModel, Reference
from eg3d_rlhf.tuning.flow.stage import FlowStage, Pipeline, check_convention, stage_of
from eg3d_rlhf.tuning.flow.update import TrainConfig, Updates
from training import checkpoint
from training.distributed import SINGLE, Ranks
from training.phases import LossNotFiniteError
from training.storage import checksum, read_tensors, write_tensors

WARNINGS, RESULT, POLICY = "warnings.json", "result.json", "policy"
FREE = ("batch_gpu", "checkpoint_every")  # settings that a resumed run may change
KEPT = "kept parameters"
UNBOUNDED = (
    "dro has no lower bound and no reference: the rejected ones' error may grow without end, and the network with it. Give "
    "--loser-weight below 1, a held-out judge or few updates."
)


def origin(stage: FlowStage, pairs: Sequence[PreferencePair]) -> dict[str, str]:
    """Hashes of the network that training starts from and of the pairs."""
    latents: dict[str, torch.Tensor] = {}
    for name, latent in ((f"{p.id}/{side}", getattr(p, side)) for p in pairs for side in ("preferred", "rejected")):
        latents |= {f"{name}/{key}": value for key, value in parts_of(latent).items()}
    columns = [[p.id, p.condition, p.source, p.w2, p.provenance.get("w2_norm")] for p in pairs]
    return {"base": checksum(stage.model.state_dict(), type(stage.model).__name__), "pairs": checksum(latents, columns)}


def policy_and_reference(stage: FlowStage, config: StageTraining) -> tuple[torch.nn.Module, FrozenModel | None]:
    """A network to train, and what it is compared with, which takes no memory besides the stage's own; None where the loss needs none."""
    if config.lora is not None:
        policy = shared_copy(stage.model)
        add_lora(policy, config.lora, config.seed)
        return policy, AdapterOff(policy) if config.needs_reference else None
    policy = copy.deepcopy(stage.model).float().requires_grad_(True)
    return policy, FrozenModel(shared_copy(stage.model).float(), policy) if config.needs_reference else None


Judge = Callable[[torch.nn.Module], float]  # a network's held-out win rate, in 0..1


class StoppedError(Exception):
    """SIGTERM or SIGINT arrived; the state of that moment is on the disk."""


@dataclass(frozen=True, kw_only=True)
class StageResult:
    """A finished training."""

    weights: Path  # folder that tuned_model reads
    kept_step: int  # updates behind those weights; 0: the network that training began with
    stats: list[dict]  # lines of stats.jsonl
    warnings: list[str]  # known failure signs that were seen


def train_stage(
    pipeline: Pipeline, stage_name: str, pairs: Sequence[PreferencePair], config: TrainConfig, out: Path, *, held_out: Judge | None = None,
    ranks: Ranks = SINGLE, resume: bool = False, say: Callable[[str], None] = print,
) -> StageResult:
    """Train a copy of a stage's network on pairs; the stage's own is left as it is, and is the reference.

    Args:
        pairs: of that stage. held_out: called with the network every `held_out_every` updates, on rank 0; the parameters with the best win
            rate are kept, those before the first update among them. Without it the last ones are.
        out: folder for everything written, see the module; resume: go on with the run in it, if there is one.
        say: prints the status lines.
    Raises: ValueError, before anything is written, for no pairs, pairs of another stage, ids that occur twice, latents that the stage
        cannot have, and a network whose data lie at the other end of time; for settings or folders that do not fit, and losses that are
        not finite;
        StoppedError after a signal.
    """
    stage = stage_of(pipeline, stage_name)
    check_pairs(pipeline, stage, pairs)
    if config.dpo.kind == "dro":
        say(f"Warning: {UNBOUNDED}")

    def start(run: Run, policy: torch.nn.Module, frozen: FrozenModel | None) -> Descent:
        reference: Reference | None = frozen
        if config.cache_reference and reference is not None:
            identity = {
                **{name: run.settings[name] for name in ("base", "pairs", "stage")}, "seed": config.seed, "path": asdict(stage.path),
                "noise": config.dpo.noise, "condition_dropout": config.dpo.condition_dropout, "bf16": config.bf16, "draws": config.draws,
            }  # fmt: skip
            reference = CachedErrors(reference, identity, run.folder / "reference", run.ranks)
        return Updates(pipeline, stage, pairs, config, policy, trained(policy).values(), reference, run.ranks)

    known = ranks.broadcast(origin(stage, pairs) if ranks.main else None)
    return train(stage, config, known, start, Path(out), held_out=held_out, ranks=ranks, resume=resume, say=say)


def check_pairs(pipeline: Pipeline, stage: FlowStage, pairs: Sequence[PreferencePair]) -> None:
    """Raise ValueError for what cannot be trained on; see train_stage."""
    who = f"train_stage({stage.name})"
    if not pairs:
        raise ValueError(f"{who}: expected pairs to learn from, got none. Make or label some.")
    check_unique(who, pairs)
    for pair in pairs:
        if pair.stage != stage.name:
            raise ValueError(f"{who}: expected pairs of this stage, got {pair.id!r} of {pair.stage!r}. Train that stage on it.")
        for side in ("preferred", "rejected"):
            stage.check(f"{who}, pair {pair.id!r}, {side}", getattr(pair, side))
    device, some = next(stage.model.parameters()).device, pairs[:8]
    cond = to_device(pipeline.conditions([pair.condition for pair in some], stage.name), device)
    check_convention(stage, collate([pair.preferred for pair in some]).to(device), cond)


Start = Callable[[Run, torch.nn.Module, FrozenModel | None], Descent]  # of a run, the network to train, and its reference


def train(
    stage: FlowStage, config: StageTraining, known: dict, start: Start, out: Path, *, held_out: Judge | None = None, ranks: Ranks = SINGLE,
    resume: bool = False, say: Callable[[str], None] = print,
) -> StageResult:
    """Train a copy of a stage's network as the Descent does it that `start` makes of the run, the copy and its reference.

    Args: known: JSON of all that decides the training besides the config; others: see train_stage.
    Raises: see train_stage.
    """
    device = next(stage.model.parameters()).device
    if ranks.main:
        out.mkdir(parents=True, exist_ok=True)
    options = {"stage": stage.name, "config": asdict(config), "held_out": held_out is not None, **known}
    with Run(out, options, ranks=ranks, say=say) as run, torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        begun, finished = ranks.broadcast([bool(recorded(out)), read_result(out)] if ranks.main else None)
        if not begun:
            run.begin()
        elif resume:
            run.resume(FREE)
        else:
            raise ValueError(f"train_stage: expected a new folder, got {out} with a run in it. Resume it, or name another.")
        if finished is None:
            policy, reference = policy_and_reference(stage, config)
            ranks.broadcast_(trained(policy).values())
            finished = _Training(start(run, policy, reference), config, held_out, run, say).train()
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
    """The loop of one training."""

    def __init__(self, updates: Descent, config: StageTraining, held_out: Judge | None, run: Run, say: Callable[[str], None]):
        self.updates, self.policy, self.named = updates, updates.policy, trained(updates.policy)
        self.stage, self.config, self.held_out, self.run, self.ranks, self.say = updates.stage, config, held_out, run, run.ranks, say
        self.ema = {name: p.detach().clone() for name, p in self.named.items()} if config.ema is not None else {}
        self.progress = Progress()
        self.lines: list[dict] = []  # of stats.jsonl
        self.warnings: dict[str, str] = {}  # by name
        self.named_steps = [0]  # updates whose parameters the states on the disk name

    # The loop.

    def train(self) -> dict:
        """Train to the end; returns fields of StageResult as JSON."""
        self._resume()
        if self.held_out is not None and self.progress.best is None:
            self._report(self._win_rate())
        with self.run.stoppable():
            while self.progress.step < self.config.steps and not self.progress.ended:
                if self.ranks.any(self.run.stop_requested is not None)[0]:
                    self._checkpoint()
                    signal = next(name for name in self.ranks.gather(self.run.stop_requested) if name is not None)
                    after = f"stopped after update {self.progress.step}"
                    raise StoppedError(f"{signal}: training of stage {self.stage.name!r} {after}; resume it.")
                self._update()
        return self._finish()

    def _update(self) -> None:
        progress, config = self.progress, self.config
        try:
            progress.add(self.updates.run(progress.step))
        except LossNotFiniteError as error:
            state = max(checkpoint.available(self.run.folder), default="none was written yet")
            raise LossNotFiniteError(f"{error} Last state: {state}.") from None
        progress.step += 1
        decay = min(config.ema or 0.0, progress.step / (9 + progress.step))  # it rises from 0.1: the first updates do not weigh for long
        for name, average in self.ema.items():
            average.lerp_(self.named[name].detach(), 1 - decay)
        last = progress.step == config.steps
        judged = self.held_out is not None and (last or progress.step % config.held_out_every == 0)
        if judged or last or progress.step % config.log_every == 0:
            self._report(self._win_rate() if judged else None)
        if progress.step % config.checkpoint_every == 0 and not last:
            self._checkpoint()

    # Win rates and lines.

    def _win_rate(self) -> float:
        """Measure, and keep the parameters if it is the best so far."""
        rate = None
        if self.ranks.main and self.held_out is not None:
            own = {name: p.detach().clone() for name, p in self.named.items()} if self.ema else {}
            self._load(self.ema)
            try:
                rate = float(self.held_out(self.policy))
            finally:
                self._load(own)
        rate = self.ranks.broadcast(rate)
        if not 0 <= rate <= 1:
            raise ValueError(f"train_stage({self.stage.name}): expected a held-out win rate from 0 to 1, got {rate}. Correct the judge.")
        if self.progress.judged(rate, self.config) and self.ranks.main:
            write_tensors(self._kept(self.progress.step), KEPT, self._values(), {"step": self.progress.step})
        return rate

    def _values(self) -> dict[str, torch.Tensor]:
        """What is measured and kept: the moving average where there is one."""
        return {name: (self.ema or self.named)[name].detach() for name in self.named}

    @torch.no_grad()
    def _load(self, values: dict[str, torch.Tensor]) -> None:
        for name, value in values.items():
            self.named[name].copy_(value)

    def _report(self, rate: float | None) -> None:
        """End the line under way; say what it shows."""
        progress, record = self.progress, self.progress.line(self.updates.lr(self.progress.step - 1), rate)
        self.run.stats(record)
        at = shown(record, self.config.steps, self.updates.columns)
        self.run.status(at, progress.step, progress.step if progress.ended else self.config.steps, "step")
        if not self.ranks.main:
            return
        self.lines.append(record)
        found = self.updates.signs(self.lines)
        fresh = {name: text for name, text in found.items() if name not in self.warnings}
        for name, text in fresh.items():
            self.say(f"Warning ({name}): {text}")
        if fresh:
            self.warnings |= fresh
            self.run.write(WARNINGS, self.warnings)
        if progress.ended and progress.step < self.config.steps:
            best = f"the best, {progress.best:.3f} after update {progress.kept_step}, is kept"
            self.say(f"Stopped early after update {progress.step}: the held-out win rate is {rate:.3f}; {best}.")

    # States, and the parameters with the best win rate.

    def _kept(self, step: int) -> Path:
        return self.run.folder / f"kept-{step:09d}.safetensors"

    def _checkpoint(self) -> None:
        """Write the state; the last two are kept, and the parameters that they name."""
        self.updates.save()
        tensors = {f"policy.{name}": p for name, p in self.named.items()} | {f"ema.{name}": p for name, p in self.ema.items()}
        tensors |= checkpoint.optimizer_tensors("optim", self.updates.optimizer)
        meta = {"progress": asdict(self.progress), "lines": self.run.lines, "warnings": self.warnings}
        self.run.checkpoint(self.progress.step, tensors, meta)
        self.named_steps = [*self.named_steps, self.progress.kept_step][-checkpoint.KEEP :]
        if self.ranks.main:
            for path in {*self.run.folder.glob("kept-*.safetensors")} - {self._kept(step) for step in self.named_steps}:
                path.unlink()

    def _resume(self) -> None:
        """Continue from the newest state, or clean up what a run left that was killed before its first."""
        lines = 0
        if self.ranks.broadcast(bool(checkpoint.available(self.run.folder)) if self.ranks.main else None):
            tensors, meta = self.run.read(previous=True)
            self._load({name: tensors[f"policy.{name}"] for name in self.named})
            for name, average in self.ema.items():
                average.copy_(tensors[f"ema.{name}"])
            checkpoint.restore_optimizer("optim", self.updates.optimizer, tensors)
            self.progress, self.warnings, lines = Progress(**meta["progress"]), dict(meta["warnings"]), meta["lines"]
        self.named_steps = [self.progress.kept_step]
        self.run.go_on(self.progress.step, lines)
        self.run.write(WARNINGS, self.warnings)
        self.lines = read_lines(self.run.folder / STATS) if self.ranks.main else []

    def _finish(self) -> dict:
        """Write the policy, and delete what was there to go on from."""
        progress, result = self.progress, None
        if self.ranks.main:
            if self.held_out is None:
                progress.kept_step = progress.step
            self._load(self._values() if self.held_out is None else read_tensors(self._kept(progress.kept_step), KEPT)[0])
            meta = {**self.run.settings, "kept_step": progress.kept_step, "win_rate": progress.best}
            save_policy(self.policy, self.run.folder / POLICY, meta)
            warnings = [f"{name}: {text}" for name, text in self.warnings.items()]
            self.run.write(RESULT, {"kept_step": progress.kept_step, "warnings": warnings})
            for path in [*checkpoint.available(self.run.folder), *self.run.folder.glob("kept-*.safetensors")]:
                path.unlink()
            result = read_result(self.run.folder)
        return self.ranks.broadcast(result)
