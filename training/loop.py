"""Training loop: runs phases in order and writes status lines, snapshots and checkpoints.

The loop is the same for every model. What is trained, and on which data, is decided by the `subject`, an
object with the methods of `training.gan.Gan`, and by the phases, each an optimisation step on one network.

All random numbers derive from (seed, images seen, phase name, place in the batch) and from nothing else.
Therefore a resumed run matches an uninterrupted one, an additional phase does not change the random numbers
of the others, and the numbers of ranks and of accumulation rounds do not change what a sample receives.
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
    """Runner of training phases on one device, alone or as one of several ranks.

    Args:
        subject: object that is trained. It has the methods of `training.gan.Gan`.
        phases: optimisation steps, in the order in which they run.
        config: settings of the loop.
        files: run folder and log, an `eg3d_rlhf.experiments.run.Run`.
        options: resolved configuration, stored in checkpoints.
        on_tick: called once per tick, on rank 0, with (loop, stats). It returns fields to add to the status
            line.
        ranks: this process among the processes of the run. All of them build the same loop.
        carries: further modules to store in checkpoints, by name.
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
        self.cur_nimg = 0  # images seen so far, over all ranks
        self.batch_idx = 0  # iterations so far
        self.cur_tick = 0  # status intervals so far
        self.next_tick: int | None = None  # number of images at which the current tick ends
        self.stats = Collector()
        # Checkpoints store the unfinished sums of these collectors, so that the first tick after a resume
        # reports the same means as an uninterrupted run.
        self.collectors = {"stats": self.stats, **subject.collectors}
        self.stopped: str | None = None  # name of the signal that ended the run early

    # One iteration.

    def step(self) -> None:
        """Run every phase that is due on the batch that the subject has fetched."""
        # The order matters: each phase sees the weights that the phases before it have just updated.
        for phase in self.phases:
            if self.batch_idx % phase.interval == 0:
                self._run_phase(phase)
        self.batch_idx += 1
        # The subject receives the number of images before this iteration and the number of iterations with
        # it. EG3D counts the same way, so the moving average and ADA change at the same iterations.
        self.subject.after_step(self.cur_nimg, self.batch_idx)
        self.cur_nimg += self.config.batch

    def _run_phase(self, phase: Phase) -> None:
        """Accumulate the gradients of all rounds, sum them over ranks, and take one optimiser step."""
        layout = self.layout
        batch = self.subject.batch_for(phase.name, self.cur_nimg)
        averages = MovingAverages(self.subject.moving, layout.total)
        gradients = GradientSum(phase.module.parameters(), layout.here)
        # A count on the device instead of a Python number: it is
        # summed over ranks together with the gradients.
        nonfinite_count = torch.zeros(1, device=self.device)
        phase.optimizer.zero_grad(set_to_none=True)
        # Between phases all parameters are frozen. Only this phase's network receives gradients, although the
        # losses also run the other network.
        phase.module.requires_grad_(True)
        for turn in range(layout.here):
            # The order matters: `batch(turn)` seeds torch, and the losses below draw from that seed.
            rows = batch(turn)
            with layout.draws(turn):
                self._backward(phase, rows, nonfinite_count)
            averages.end_round()
            gradients.end_round()
        gradients.finish()
        phase.module.requires_grad_(False)
        sum_over_ranks(self.ranks, phase.module.parameters(), [*averages.steps, nonfinite_count])
        averages.finish()
        # With one rank, `_backward` has already raised. With several, all ranks must stop at the same place:
        # a rank that raised earlier would leave the others waiting in the sum above.
        if self.ranks.world > 1 and nonfinite_count:
            raise self._not_finite(phase, "a loss on another rank that is not finite")
        for parameter in phase.module.parameters():
            if parameter.grad is not None:
                # As EG3D does: a finite loss can still have infinite gradients, and one of them would ruin
                # Adam's moments for the rest of the run.
                torch.nan_to_num(parameter.grad, nan=0, posinf=1e5, neginf=-1e5, out=parameter.grad)
        phase.optimizer.step()

    def _backward(self, phase: Phase, batch: Any, nonfinite_count: torch.Tensor) -> None:
        """Add the gradients of one round.

        A loss that is not finite raises an error in a run of one rank. In a run of several, it is counted in
        `nonfinite_count`, since the other ranks wait for this one.
        """
        # `losses` is a generator: the graph of one term is freed before the next term is computed, which
        # keeps the peak memory at that of the largest term.
        for loss in phase.losses(batch):
            value = loss.value.mean()  # [N] -> []
            if not torch.isfinite(value):
                if self.ranks.world == 1:
                    raise self._not_finite(phase, str(value.item()))
                nonfinite_count += 1
            # Rounds are of equal size, so the mean over the batch is the mean of the rounds' means. Gradients
            # are summed over rounds and ranks; the division by their number turns the sum into that mean.
            (value * (phase.gain / self.layout.total)).backward()
            for name, stat in loss.stats.items():
                self.stats.report(name, stat)
                self.subject.observe(name, stat)

    def _not_finite(self, phase: Phase, got: str) -> LossNotFiniteError:
        """Return the error for a loss `got` that is NaN or infinite."""
        checkpoint_name = self.files.last_checkpoint or "none was written yet"
        return LossNotFiniteError(
            f"phase {phase.name}, iteration {self.batch_idx} ({self.cur_nimg} images): expected a finite"
            f" loss, got {got}. Last good checkpoint: {checkpoint_name}. Resume from it with a lower learning"
            " rate."
        )

    # The whole run.

    def run(self) -> None:
        """Train to `kimg` and write status lines, statistics, snapshots and checkpoints.

        SIGTERM and SIGINT end the run after the current iteration, with a checkpoint. `stopped` then holds
        the signal's name.

        Raises:
            ValueError: a loss is not finite, or the data cannot be read.
            OSError: the folder cannot be written. Both messages name the last checkpoint.
        """
        config = self.config
        files = self.files
        # Ranks may have built their modules with different random numbers. All of them start from rank 0's.
        self.ranks.broadcast_(t for m in self._modules().values() for t in (*m.parameters(), *m.buffers()))
        with files.writing():
            if self.ranks.main:
                files.folder.mkdir(parents=True, exist_ok=True)
            self.subject.begin(self.cur_nimg, files.folder if self.ranks.main else None)
        files.go_on(self.cur_nimg / 1000)
        total = round(config.kimg * 1000)
        interval = round(config.tick * 1000)
        # A resumed run keeps the end of the tick that its checkpoint was written in.
        self.next_tick = self.next_tick or self.cur_nimg + interval
        try:
            with files.stoppable():
                while self.cur_nimg < total:
                    if not self._fetch_or_stop():
                        return
                    self.step()
                    # The last tick may be shorter than the others: the end of the run always closes it.
                    if self.cur_nimg >= min(self.next_tick, total):
                        self.next_tick = self.cur_nimg + interval
                        self._tick(done=self.cur_nimg >= total)
        finally:
            # After an error as well: worker processes that read images would otherwise outlive the run.
            self.subject.end()

    def _fetch_or_stop(self) -> bool:
        """Fetch the next images and return True, or write a checkpoint and return False.

        Returns False if any rank received a signal. Raises ValueError if any rank cannot read its data.
        """
        error = None
        folder = self.files.folder
        try:
            with self.files.waiting():
                self.subject.fetch()
        except (ValueError, OSError) as caught:
            # Not raised yet: the other ranks do not know of it and would wait for this one.
            error = caught
        # Read after the fetch: a signal to the whole process group (Ctrl-C)
        # also ends the worker processes that read images, so the fetch may
        # fail because of it. The signal, not that failure, is then the reason.
        request = self.files.stop_requested
        stop, failed = self.ranks.any(request is not None, error is not None)
        if not stop and not failed:
            return True
        # Nothing of this iteration has been computed, so the state is that after the previous one.
        with self.files.writing():
            self.save_checkpoint()
        if not stop:
            cause = next(
                text
                for text in self.ranks.gather(None if error is None else str(error).strip())
                if text is not None
            )
            advice = f"continue with --resume={folder}, from {self.files.last_checkpoint.name}"
            raise ValueError(f"{cause} Stopped at {self.cur_nimg} images; {advice}.") from error
        self.stopped = next(name for name in self.ranks.gather(request) if name is not None)
        if self.ranks.main:
            print(
                f"{self.stopped}: stopped at {self.cur_nimg} images. Continue with --resume={folder}",
                flush=True,
            )
        return False

    def _tick(self, done: bool) -> None:
        """Write the status line and, at their intervals and at the end, snapshot and checkpoint."""
        config = self.config
        kimg = self.cur_nimg / 1000
        self.cur_tick += 1
        # Every rank takes part in the sums, so this stands outside the branch of rank 0.
        stats = self.stats.flush(self.ranks.sum_)
        with self.files.writing():
            if self.ranks.main:
                # `report` may add to `stats`, and `on_tick` reads them: keep this order.
                subject_fields = self.subject.report(stats)
                tick_fields = self.on_tick(self, stats) if self.on_tick is not None else {}
                more = {**tick_fields, **subject_fields}
                self.files.stats({"tick": self.cur_tick, "nimg": self.cur_nimg, **stats})
                self.files.status(
                    {"tick": f"{self.cur_tick:<5d}", "kimg": f"{kimg:<8.2f}"}, kimg, config.kimg, "kimg", more
                )
                if done or (config.snap > 0 and self.cur_tick % config.snap == 0):
                    self.subject.snapshot(self.files.folder, self.cur_nimg)
            if done or self.cur_tick % config.checkpoint_ticks == 0:
                # All ranks: the checkpoint gathers their statistics.
                self.save_checkpoint()

    # Checkpoints.

    def _modules(self) -> dict[str, torch.nn.Module]:
        """Return every module whose state a checkpoint holds, by the prefix of its names there."""
        return {
            **self.subject.modules(),
            **{f"phase_{p.name}": p.state for p in self.phases if p.state is not None},
            **self.carries,
        }

    def _optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Return each optimiser once, by the prefix of its names in a checkpoint: optim_G, optim_D, ..."""
        optimizers: dict[str, torch.optim.Optimizer] = {}
        for phase in self.phases:
            # Phases of one network share its optimiser: Gmain and Greg both give optim_G. A phase with its
            # own optimiser (the reward's) is stored under its whole name.
            name = f"optim_{phase.name}" if phase.own_optimizer else f"optim_{phase.name[0]}"
            assert optimizers.setdefault(name, phase.optimizer) is phase.optimizer, (
                f"{phase.name}: another {name}; set own_optimizer"
            )
        return optimizers

    def save_checkpoint(self) -> Path:
        """Write the resumable state on rank 0 and return its path. All ranks must call this."""
        # Each rank has summed the statistics of its own samples since the last tick.
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
        """Continue exactly where a checkpoint of this run was written.

        Lines of stats.jsonl that were written after the checkpoint are dropped. All ranks must call this.
        """
        tensors, meta = self.files.read(source, fall_back)
        for name, module in self._modules().items():
            # The dot in the prefix keeps "G." apart from "G_ema.".
            part = {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")}
            storage.load_strict(module, part, f"{self.files.last_checkpoint} ({name})")
        for name, optimizer in self._optimizers().items():
            checkpoint.restore_optimizer(name, optimizer, tensors)
        self.cur_nimg = meta["cur_nimg"]
        self.batch_idx = meta["batch_idx"]
        self.cur_tick = meta["cur_tick"]
        self.next_tick = meta["next_tick"]
        # Each rank takes back its own sums, so that floating-point additions keep their order. A run with
        # another number of ranks distributes the old ranks' sums over the new ones.
        every = meta["rank_stats"]
        for name, collector in self.collectors.items():
            # Three sums per statistic, see training_stats.Collector;
            # ranks beyond the old number start at zero.
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
