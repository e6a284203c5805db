"""The training loop: phases in order, ticks, snapshots, checkpoints. Knows neither a GAN nor a reward: a
subject gives the batches.

Random numbers derive from (seed, images seen, phase name, place in the batch) alone, so that a resumed run
matches an uninterrupted one, a further phase changes no draw of the others, and neither ranks nor
accumulation rounds change what a sample meets.
"""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from torch_utils.training_stats import Collector
from training import checkpoint, storage
from training.config import LoopConfig
from training.distributed import SINGLE, Ranks
from training.phases import GradientSum, Layout, LossNotFiniteError, MovingAverages, Phase, sum_over_ranks


class TrainingLoop:
    """Runs phases on one device, alone or as one of several ranks.

    Args:
        subject: what is trained, with the methods of `training.gan.Gan`; phases: in the order in which they
            run; config: loop settings.
        files: where everything is written, `eg3d_rlhf.experiments.run.Run`.
        options: the resolved configuration, stored in checkpoints.
        on_tick: called once per tick, on rank 0, with (loop, stats); returns fields to add to the status
            line.
        ranks: this process among those of the run; all build the same loop.
        carries: further modules that checkpoints hold, by name.
    """

    def __init__(
        self,
        subject: Any,
        phases: list[Phase],
        config: LoopConfig,
        files: Any,
        *,
        options: dict | None = None,
        on_tick: Callable[["TrainingLoop", dict], dict[str, str]] | None = None,
        ranks: Ranks = SINGLE,
        carries: Mapping[str, torch.nn.Module] | None = None,
    ):
        self.subject = subject
        self.phases = phases
        self.config = config
        self.files = files
        self.options = options or {}
        self.on_tick = on_tick
        self.ranks = ranks
        self.carries = carries or {}
        self.device = subject.device
        self.layout = Layout(config.batch, ranks, config.batch_gpu)
        self.cur_nimg = 0
        self.batch_idx = 0
        self.cur_tick = 0
        self.next_tick: int | None = None  # images at which the tick under way ends
        self.stats = Collector()
        self.collectors = {"stats": self.stats, **subject.collectors}
        self.stopped: str | None = None  # name of the signal that ended the run early

    # One iteration.

    def step(self) -> None:
        """Run every phase that is due on what the subject has fetched."""
        for phase in self.phases:
            if self.batch_idx % phase.interval == 0:
                self._run_phase(phase)
        self.batch_idx += 1
        self.subject.after_step(self.cur_nimg, self.batch_idx)
        self.cur_nimg += self.config.batch

    def _run_phase(self, phase: Phase) -> None:
        layout = self.layout
        batch = self.subject.batch_for(phase.name, self.cur_nimg)
        averages = MovingAverages(self.subject.moving, layout.total)
        gradients = GradientSum(phase.module.parameters(), layout.here)
        bad = torch.zeros(1, device=self.device)
        phase.optimizer.zero_grad(set_to_none=True)
        phase.module.requires_grad_(True)
        for turn in range(layout.here):
            rows = batch(turn)
            with layout.draws(turn):
                self._backward(phase, rows, bad)
            averages.end_round()
            gradients.end_round()
        gradients.finish()
        phase.module.requires_grad_(False)
        sum_over_ranks(self.ranks, phase.module.parameters(), [*averages.steps, bad])
        averages.finish()
        if self.ranks.world > 1 and bad:
            raise self._not_finite(phase, "one on another rank that is not")
        for parameter in phase.module.parameters():
            if parameter.grad is not None:
                torch.nan_to_num(parameter.grad, nan=0, posinf=1e5, neginf=-1e5, out=parameter.grad)
        phase.optimizer.step()

    def _backward(self, phase: Phase, batch: Any, bad: torch.Tensor) -> None:
        """Add the gradients of one round; a loss that is not finite is noted in `bad`, or an error where no
        other rank waits.
        """
        for loss in phase.losses(batch):
            value = loss.value.mean()
            if not torch.isfinite(value):
                if self.ranks.world == 1:
                    raise self._not_finite(phase, str(value.item()))
                bad += 1
            (value * (phase.gain / self.layout.total)).backward()
            for name, stat in loss.stats.items():
                self.stats.report(name, stat)
                self.subject.observe(name, stat)

    def _not_finite(self, phase: Phase, got: str) -> LossNotFiniteError:
        good = self.files.last_checkpoint or "none was written yet"
        return LossNotFiniteError(
            f"phase {phase.name}, iteration {self.batch_idx} ({self.cur_nimg} images): expected a finite"
            f" loss, got {got}. Last good checkpoint: {good}. Resume from it with a lower learning rate."
        )

    # The whole run.

    def run(self) -> None:
        """Train to `kimg`, writing status lines, statistics, snapshots and checkpoints.

        SIGTERM and SIGINT end it after the current iteration, with a checkpoint; `stopped` then names the
        signal.
        Raises: ValueError where a loss or the data fail, OSError where the folder cannot be written; both
            name the last checkpoint.
        """
        config = self.config
        files = self.files
        self.ranks.broadcast_(t for m in self._modules().values() for t in (*m.parameters(), *m.buffers()))
        with files.writing():
            if self.ranks.main:
                files.folder.mkdir(parents=True, exist_ok=True)
            self.subject.begin(self.cur_nimg, files.folder if self.ranks.main else None)
        files.go_on(self.cur_nimg / 1000)
        total = round(config.kimg * 1000)
        interval = round(config.tick * 1000)
        self.next_tick = self.next_tick or self.cur_nimg + interval
        try:
            with files.stoppable():
                while self.cur_nimg < total:
                    if not self._may_go_on():
                        return
                    self.step()
                    if self.cur_nimg >= min(self.next_tick, total):
                        self.next_tick = self.cur_nimg + interval
                        self._tick(done=self.cur_nimg >= total)
        finally:
            self.subject.end()

    def _may_go_on(self) -> bool:
        """Fetch the next images; False, after a checkpoint, where a rank was asked to stop, an error where
        one cannot read its data.
        """
        error = None
        folder = self.files.folder
        try:
            with self.files.waiting():
                self.subject.fetch()
        except (ValueError, OSError) as caught:
            error = caught
        request = self.files.stop_requested  # a signal to the whole group also ends those that read images
        stop, failed = self.ranks.any(request is not None, error is not None)
        if not stop and not failed:
            return True
        with self.files.writing():
            self.save_checkpoint()
        if not stop:
            cause = next(
                text
                for text in self.ranks.gather(None if error is None else str(error).strip())
                if text is not None
            )
            go_on = f"continue with --resume={folder}, from {self.files.last_checkpoint.name}"
            raise ValueError(f"{cause} Stopped at {self.cur_nimg} images; {go_on}.") from error
        self.stopped = next(name for name in self.ranks.gather(request) if name is not None)
        if self.ranks.main:
            print(
                f"{self.stopped}: stopped at {self.cur_nimg} images. Continue with --resume={folder}",
                flush=True,
            )
        return False

    def _tick(self, done: bool) -> None:
        config = self.config
        kimg = self.cur_nimg / 1000
        self.cur_tick += 1
        stats = self.stats.flush(self.ranks.sum_)
        with self.files.writing():
            if self.ranks.main:
                own = self.subject.report(stats)
                more = {**(self.on_tick(self, stats) if self.on_tick is not None else {}), **own}
                self.files.stats({"tick": self.cur_tick, "nimg": self.cur_nimg, **stats})
                self.files.status(
                    {"tick": f"{self.cur_tick:<5d}", "kimg": f"{kimg:<8.2f}"}, kimg, config.kimg, "kimg", more
                )
                if done or (config.snap > 0 and self.cur_tick % config.snap == 0):
                    self.subject.snapshot(self.files.folder, self.cur_nimg)
            if done or self.cur_tick % config.checkpoint_ticks == 0:
                self.save_checkpoint()

    # Checkpoints.

    def _modules(self) -> dict[str, torch.nn.Module]:
        return {
            **self.subject.modules(),
            **{f"phase_{p.name}": p.state for p in self.phases if p.state is not None},
            **self.carries,
        }

    def _optimizers(self) -> dict[str, torch.optim.Optimizer]:
        found: dict[str, torch.optim.Optimizer] = {}
        for phase in self.phases:
            name = f"optim_{phase.name}" if phase.own_optimizer else f"optim_{phase.name[0]}"
            assert found.setdefault(name, phase.optimizer) is phase.optimizer, (
                f"{phase.name}: another {name}; set own_optimizer"
            )
        return found

    def save_checkpoint(self) -> Path:
        """Write the resumable state of this moment, on rank 0; all ranks take part. Returns its path."""
        every = self.ranks.gather({name: collector.state() for name, collector in self.collectors.items()})
        tensors = {f"{name}.{k}": v for name, m in self._modules().items() for k, v in m.state_dict().items()}
        for name, optimizer in self._optimizers().items():
            tensors.update(checkpoint.optimizer_tensors(name, optimizer))
        meta = {
            "cur_nimg": self.cur_nimg,
            "batch_idx": self.batch_idx,
            "cur_tick": self.cur_tick,
            "stats_lines": self.files.lines,
            "next_tick": self.next_tick,
            "rank_stats": every,
            "options": self.options,
            **self.subject.meta(),
        }
        return self.files.checkpoint(self.cur_nimg, tensors, meta)

    def resume(self, source: Path | None = None, fall_back: bool = False) -> None:
        """Continue exactly where a checkpoint of this run was written; later lines of stats.jsonl are
        dropped. All ranks take part.
        """
        tensors, meta = self.files.read(source, fall_back)
        for name, module in self._modules().items():
            part = {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")}
            storage.load_strict(module, part, f"{self.files.last_checkpoint} ({name})")
        for name, optimizer in self._optimizers().items():
            checkpoint.restore_optimizer(name, optimizer, tensors)
        self.cur_nimg = meta["cur_nimg"]
        self.batch_idx = meta["batch_idx"]
        self.cur_tick = meta["cur_tick"]
        self.next_tick = meta["next_tick"]
        # Each rank's own sums, so that the order of additions stays; another number of ranks shares those of
        # the old ones.
        every = meta["rank_stats"]
        for name, collector in self.collectors.items():
            sums = {key: [0.0, 0.0, 0.0] for key in every[0][name]}
            for state in every[self.ranks.rank :: self.ranks.world]:
                sums = {
                    key: [a + b for a, b in zip(value, state[name].get(key, [0.0] * 3), strict=True)]
                    for key, value in sums.items()
                }
            collector.restore(sums)
        self.subject.restore(meta)
        self.files.go_on(self.cur_nimg / 1000, meta["stats_lines"])
        if self.ranks.main:
            print(f"Resumed from {self.files.last_checkpoint} at {self.cur_nimg} images.", file=sys.stderr)
