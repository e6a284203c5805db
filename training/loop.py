"""Training loop, which runs phases in order and writes status lines, snapshots and checkpoints.

The loop is the same for every model. The models and the data belong to the object `trained_object`, which has
the methods of `training.gan.Gan`. A phase is an optimisation step on one network.

All random numbers depend only on the seed, the number of images so far, the name of the phase, and the index
of the image in the batch. Therefore a resumed run matches an uninterrupted one, an additional phase does not
change the random numbers of other phases, and an image gets the same random numbers for any number of ranks
and accumulation rounds.
"""

import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from torch_utils.training_stats import Collector
from training import checkpoint, rehearsal, storage
from training.config import LoopConfig
from training.distributed import SINGLE, Ranks
from training.phases import GradientSum, Layout, LossNotFiniteError, MovingAverages, Phase, sum_over_ranks
from training.progress import log_bar


class TrainingLoop:
    """Training loop on one device, as a single process or as one of several ranks.

    Args:
        trained_object: object that holds the models and the data, with the methods of `training.gan.Gan`.
        phases: optimisation steps, in the order of their execution.
        config: settings of the loop.
        files: run folder and log, an `eg3d_rlhf.experiments.run.Run`.
        options: resolved settings of the run, which are stored in checkpoints.
        on_tick: function (loop, stats) that rank 0 calls at the end of each tick. It returns further fields
            of the status line by name.
        ranks: position of this process among the processes of the run. All processes build the same loop.
        carries: further modules whose states are stored in checkpoints, by name.
    """

    def __init__(
        self,
        trained_object: Any,
        phases: list[Phase],
        config: LoopConfig,
        files: Any,
        *,
        options: dict | None = None,
        on_tick: Callable[["TrainingLoop", dict], dict[str, str]] | None = None,
        ranks: Ranks = SINGLE,
        carries: Mapping[str, torch.nn.Module] | None = None,
    ):
        self.trained_object = trained_object
        self.phases = phases
        self.config = config
        self.files = files
        self.options = options or {}
        self.on_tick = on_tick
        self.ranks = ranks
        self.carries = carries or {}
        self.device = trained_object.device
        self.layout = Layout(config.batch, ranks, config.batch_gpu)
        self.cur_nimg = 0  # number of images so far, over all ranks
        self.batch_idx = 0  # number of iterations so far
        self.cur_tick = 0  # number of ticks (intervals between status lines) so far
        self.next_tick: int | None = None  # number of images at the end of the current tick
        self.stats = Collector()
        # Checkpoints contain the sums of these collectors since the last tick. The first tick of a resumed
        # run then reports the same means as in an uninterrupted run.
        self.collectors = {"stats": self.stats, **trained_object.collectors}
        self.stopped: str | None = None  # name of the signal that ended the run early

    # Methods of one iteration.

    def step(self) -> None:
        """Run one iteration on the fetched batch: every phase whose interval divides the index of the
        iteration.
        """
        # The order matters, because each phase uses the weights that earlier phases have updated.
        for phase in self.phases:
            if self.batch_idx % phase.interval == 0:
                planned_steps = math.ceil(self._iterations() / phase.interval)
                with rehearsal.timed(rehearsal.TRAINING, f"phase {phase.name}", planned_steps):
                    self._run_phase(phase)
        self.batch_idx += 1
        # As in EG3D, the arguments are the number of images before this iteration, and the number of
        # iterations including this one. G_ema and ADA are then updated in the same iterations as in EG3D.
        with rehearsal.timed(rehearsal.TRAINING, "moving average", self._iterations()):
            self.trained_object.after_step(self.cur_nimg, self.batch_idx)
        self.cur_nimg += self.config.batch

    def _iterations(self) -> int:
        """Return the number of iterations of the whole run."""
        return math.ceil(self.config.kimg * 1000 / self.config.batch)

    def _run_phase(self, phase: Phase) -> None:
        """Accumulate the gradients of all rounds, sum them over ranks, and update the weights once."""
        layout = self.layout
        batch_of_round = self.trained_object.batch_for(phase.name, self.cur_nimg)
        moving_averages = MovingAverages(self.trained_object.moving, layout.total)
        gradient_sum = GradientSum(phase.module.parameters(), layout.rounds_per_rank)
        # A tensor on the device, because it is summed over ranks together with the gradients.
        nonfinite_count = torch.zeros(1, device=self.device)
        phase.optimizer.zero_grad(set_to_none=True)
        # Outside of this block all parameters are frozen. Only the network of this phase gets gradients,
        # although the losses also run other networks.
        phase.module.requires_grad_(True)
        for round_index in range(layout.rounds_per_rank):
            # This call comes first, because it seeds torch for the losses below.
            batch = batch_of_round(round_index)
            with layout.random_rows(round_index):
                self._backward(phase, batch, nonfinite_count)
            moving_averages.end_round()
            gradient_sum.end_round()
        gradient_sum.finish()
        phase.module.requires_grad_(False)
        sum_over_ranks(self.ranks, phase.module.parameters(), [*moving_averages.steps, nonfinite_count])
        moving_averages.finish()
        # With one rank, `_backward` has raised the error already. With several ranks, all of them have to
        # raise it here, because a rank that stopped earlier would leave the others waiting in the sum above.
        if self.ranks.world > 1 and nonfinite_count:
            raise self._not_finite(phase, "NaN or infinity on at least one rank")
        for parameter in phase.module.parameters():
            if parameter.grad is not None:
                # As in EG3D. A finite loss can have infinite gradients, and a single one would make Adam's
                # moments invalid for the remaining run.
                torch.nan_to_num(parameter.grad, nan=0, posinf=1e5, neginf=-1e5, out=parameter.grad)
        phase.optimizer.step()

    def _backward(self, phase: Phase, batch: Any, nonfinite_count: torch.Tensor) -> None:
        """Add the gradients of one round to the parameters' gradients.

        Args:
            phase: phase whose losses are computed.
            batch: inputs of the round.
            nonfinite_count: counter [1] of losses that are not finite, for runs of several ranks.
        Raises: LossNotFiniteError for such a loss in a run of one rank. With several ranks, the loss is
            counted, because the other ranks wait for this one.
        """
        # `losses` is a generator, so the graph of a loss is freed before the next loss is computed. The peak
        # memory is therefore that of the largest graph.
        for loss in phase.losses(batch):
            mean_loss = loss.value.mean()  # [N] -> []
            if not torch.isfinite(mean_loss):
                if self.ranks.world == 1:
                    raise self._not_finite(phase, str(mean_loss.item()))
                nonfinite_count += 1
            # Rounds have equal size, so the mean over the batch is the mean over rounds of their means.
            # Gradients are summed over rounds and ranks, so each is divided by the total number of rounds.
            (mean_loss * (phase.gain / self.layout.total)).backward()
            for stat_name, stat_values in loss.stats.items():
                self.stats.report(stat_name, stat_values)
                self.trained_object.observe(stat_name, stat_values)

    def _not_finite(self, phase: Phase, loss_text: str) -> LossNotFiniteError:
        """Return the error for a loss that is NaN or infinite.

        Args: phase: phase of the loss; loss_text: value or description of the loss.
        """
        position_text = f"phase {phase.name}, iteration {self.batch_idx} ({self.cur_nimg} images)"
        if self.cur_nimg == 0 and phase is self.phases[0]:
            # No weight has been updated yet, so the learning rate cannot be the cause.
            advice_text = "No weight was updated before. Check the training data and the initial networks"
        elif self.files.last_checkpoint is None:
            advice_text = "No checkpoint was written before. Start the run again with a lower learning rate"
        else:
            advice_text = f"Resume from {self.files.last_checkpoint} with a lower learning rate"
        return LossNotFiniteError(f"{position_text}: expected a finite loss, got {loss_text}. {advice_text}.")

    # Methods of the complete run.

    def run(self) -> None:
        """Train until `config.kimg`, and write status lines, statistics, snapshots and checkpoints.

        After SIGTERM or SIGINT, the current iteration is completed and a checkpoint is written. The attribute
        `stopped` is then the name of the signal.

        Raises:
            ValueError: a loss is not finite, or the data cannot be read. The message names the
                last checkpoint.
            OSError: the folder cannot be written. The message names the last checkpoint.
        """
        config = self.config
        files = self.files
        # Ranks may have initialised their modules with different random numbers, so all get the state of
        # rank 0.
        state_tensors = []
        for module in self._modules().values():
            state_tensors += [*module.parameters(), *module.buffers()]
        self.ranks.broadcast_(state_tensors)
        with files.writing():
            if self.ranks.is_main:
                files.folder.mkdir(parents=True, exist_ok=True)
            self.trained_object.begin(self.cur_nimg, files.folder if self.ranks.is_main else None)
        files.continue_from(self.cur_nimg / 1000)
        image_count = round(config.kimg * 1000)
        images_per_tick = round(config.tick * 1000)
        if rehearsal.active():
            # A rehearsal ends as a run does that has a single tick.
            image_count = min(image_count, images_per_tick)
        # In a resumed run, the end of the current tick comes from the checkpoint.
        self.next_tick = self.next_tick or self.cur_nimg + images_per_tick
        try:
            with (
                files.stoppable(),
                log_bar(image_count, self.cur_nimg, "training", "image", self.ranks.is_main) as log_lines,
            ):
                while self.cur_nimg < image_count:
                    if not self._fetch_or_stop():
                        return
                    self.step()
                    log_lines.update(self.cur_nimg - log_lines.n)
                    # The end of the run also ends the last tick, which may be shorter than the others.
                    if self.cur_nimg >= min(self.next_tick, image_count):
                        self.next_tick = self.cur_nimg + images_per_tick
                        self._tick(is_last=self.cur_nimg >= image_count)
        finally:
            # Also after an error, because the worker processes that read images have to be ended.
            self.trained_object.end()

    def _fetch_or_stop(self) -> bool:
        """Fetch the next images.

        If a rank received a signal or cannot read its data, a checkpoint is written.

        Returns: True if the training continues, False if a rank received a signal.
        Raises: ValueError if a rank cannot read its data.
        """
        read_error = None
        folder = self.files.folder
        try:
            with (
                self.files.waiting(),
                rehearsal.timed(rehearsal.TRAINING, "reading of images", self._iterations()),
            ):
                self.trained_object.fetch()
        except (ValueError, OSError) as error:
            # The error is raised below, after all ranks have been informed. Otherwise they would wait for
            # this one.
            read_error = error
        # The signal is read after the fetch. Ctrl-C sends a signal to all processes of the group, and also
        # ends the workers that read images, so the fetch may fail because of the signal.
        signal_name = self.files.stop_requested
        is_stopped, has_failed = self.ranks.any_rank(signal_name is not None, read_error is not None)
        if not is_stopped and not has_failed:
            return True
        # This iteration has not changed any state yet, so the checkpoint is that of the previous iteration.
        with self.files.writing():
            self.save_checkpoint()
        if not is_stopped:
            error_texts = self.ranks.gather(None if read_error is None else str(read_error).strip())
            first_error_text = next(error_text for error_text in error_texts if error_text is not None)
            raise ValueError(
                f"{first_error_text} The run stopped at {self.cur_nimg} images. Continue with"
                f" --resume={folder}, which reads {self.files.last_checkpoint.name}."
            ) from read_error
        self.stopped = next(
            stopped_by for stopped_by in self.ranks.gather(signal_name) if stopped_by is not None
        )
        if self.ranks.is_main:
            print(
                f"{self.stopped}: the run stopped at {self.cur_nimg} images. Continue with --resume={folder}",
                flush=True,
            )
        return False

    def _tick(self, is_last: bool) -> None:
        """Write the status line and the statistics, and at their intervals a snapshot and a checkpoint.

        Args: is_last: True at the end of the run, where a snapshot and a checkpoint are always written.
        """
        config = self.config
        kimg = self.cur_nimg / 1000
        planned_ticks = max(1, math.ceil(config.kimg / config.tick))
        self.cur_tick += 1
        # All ranks have to call `flush`, because it sums over ranks.
        stats = self.stats.flush(self.ranks.sum_)
        with self.files.writing():
            if self.ranks.is_main:
                # `report` comes first, because it may add statistics that `on_tick` reads.
                with rehearsal.timed(rehearsal.TRAINING, "measurements of a tick", planned_ticks):
                    object_fields = self.trained_object.report(stats)
                    tick_fields = self.on_tick(self, stats) if self.on_tick is not None else {}
                further_fields = {**tick_fields, **object_fields}
                self.files.stats({"tick": self.cur_tick, "nimg": self.cur_nimg, **stats})
                self.files.status(
                    {"tick": f"{self.cur_tick:<5d}", "kimg": f"{kimg:<8.3f}"},
                    kimg,
                    config.kimg,
                    "kimg",
                    further_fields,
                )
                if is_last or (config.snap > 0 and self.cur_tick % config.snap == 0):
                    # The last tick always has a snapshot, also if it is no multiple of `snap`.
                    planned_snapshots = math.ceil(planned_ticks / config.snap) if config.snap > 0 else 1
                    with rehearsal.timed(rehearsal.CHECKPOINTS, "snapshots", planned_snapshots):
                        self.trained_object.snapshot(self.files.folder, self.cur_nimg)
            if is_last or self.cur_tick % config.checkpoint_ticks == 0:
                planned_checkpoints = math.ceil(planned_ticks / config.checkpoint_ticks)
                with rehearsal.timed(rehearsal.CHECKPOINTS, "checkpoints", planned_checkpoints):
                    # All ranks have to call it, because the checkpoint contains the statistics of all of
                    # them.
                    self.save_checkpoint()

    # Methods on checkpoints.

    def _modules(self) -> dict[str, torch.nn.Module]:
        """Return the modules whose states a checkpoint contains, by the prefix of their tensors' names."""
        return {
            **self.trained_object.modules(),
            **{f"phase_{phase.name}": phase.state for phase in self.phases if phase.state is not None},
            **self.carries,
        }

    def _optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Return the optimisers by the prefix of their tensors' names in a checkpoint, such as optim_G."""
        optimizer_by_name: dict[str, torch.optim.Optimizer] = {}
        for phase in self.phases:
            # Phases of one network share an optimiser: the first letter of Gmain and of Greg gives optim_G.
            # The optimiser of a phase with `own_optimizer` has the full name of the phase.
            optimizer_name = f"optim_{phase.name}" if phase.own_optimizer else f"optim_{phase.name[0]}"
            assert optimizer_by_name.setdefault(optimizer_name, phase.optimizer) is phase.optimizer, (
                f"phase {phase.name} has another optimiser than other phases of {optimizer_name}. Set"
                " own_optimizer=True."
            )
        return optimizer_by_name

    def save_checkpoint(self) -> Path:
        """Write a checkpoint on rank 0 and return its path. All ranks must call this method."""
        # Each rank has sums of statistics over its own images since the last tick.
        rank_stats = self.ranks.gather(
            {collector_name: collector.state() for collector_name, collector in self.collectors.items()}
        )
        tensors = {}
        for module_name, module in self._modules().items():
            for tensor_name, tensor in module.state_dict().items():
                tensors[f"{module_name}.{tensor_name}"] = tensor
        for optimizer_name, optimizer in self._optimizers().items():
            tensors.update(checkpoint.optimizer_tensors(optimizer_name, optimizer))
        meta = {
            "cur_nimg": self.cur_nimg,
            "batch_idx": self.batch_idx,
            "cur_tick": self.cur_tick,
            "stats_lines": self.files.lines,
            "next_tick": self.next_tick,
            "rank_stats": rank_stats,
            "options": self.options,
            **self.trained_object.meta(),
        }
        return self.files.checkpoint(self.cur_nimg, tensors, meta)

    def resume(self, run_or_file: Path | None = None, fall_back: bool = False) -> None:
        """Restore the state of a checkpoint. All ranks must call this method.

        Lines of stats.jsonl that were written after the checkpoint are deleted.

        Args:
            run_or_file: path of a run folder, or of a checkpoint file; None: the folder of this run.
            fall_back: True: if the checkpoint is damaged, use the previous one.
        """
        tensors, meta = self.files.read(run_or_file, fall_back)
        for module_name, module in self._modules().items():
            # With the dot, the prefix "G" does not match the names of "G_ema".
            prefix = f"{module_name}."
            module_tensors = {
                tensor_name.removeprefix(prefix): tensor
                for tensor_name, tensor in tensors.items()
                if tensor_name.startswith(prefix)
            }
            storage.load_strict(module, module_tensors, f"{self.files.last_checkpoint} ({module_name})")
        for optimizer_name, optimizer in self._optimizers().items():
            checkpoint.restore_optimizer(optimizer_name, optimizer, tensors)
        self.cur_nimg = meta["cur_nimg"]
        self.batch_idx = meta["batch_idx"]
        self.cur_tick = meta["cur_tick"]
        self.next_tick = meta["next_tick"]
        # Each rank restores its own sums, so that floating-point additions have the same order as without
        # the interruption. With another number of ranks, the sums of the old ranks are distributed over
        # the new ones.
        rank_stats = meta["rank_stats"]
        for collector_name, collector in self.collectors.items():
            # A statistic has three sums, see training_stats.Collector. With more ranks than before, some of
            # them get no old sums, and begin at 0.
            sums_by_name = {stat_name: [0.0, 0.0, 0.0] for stat_name in rank_stats[0][collector_name]}
            for old_rank_state in rank_stats[self.ranks.rank :: self.ranks.world]:
                for stat_name, restored_sums in sums_by_name.items():
                    old_sums = old_rank_state[collector_name].get(stat_name, [0.0, 0.0, 0.0])
                    sums_by_name[stat_name] = [
                        restored_sum + old_sum
                        for restored_sum, old_sum in zip(restored_sums, old_sums, strict=True)
                    ]
            collector.restore(sums_by_name)
        self.trained_object.restore(meta)
        self.files.continue_from(self.cur_nimg / 1000, meta["stats_lines"])
        if self.ranks.is_main:
            print(
                f"The run continues from {self.files.last_checkpoint} at {self.cur_nimg} images.",
                file=sys.stderr,
            )
