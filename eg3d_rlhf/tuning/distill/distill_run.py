"""Runs score distillation from its settings to finished assets.

The assets of each arm are split into batches. A part of the run is one batch under one arm. Parts are
computed in this process, on worker processes, or on the processes of torchrun. The folder of a run contains:

    parts/<arm>/<batch>/     folder of a part, with its own stats.jsonl and checkpoints, and at the end
                             assets.safetensors and result.json
    stats.jsonl              lines of all parts, written when all parts are finished

All arms of a comparison have the same prompts, starting assets, views, times and noises. The result does not
depend on the number of processes.
"""

import json
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from eg3d_rlhf.experiments.pool import run_tasks
from eg3d_rlhf.experiments.process import StoppedError
from eg3d_rlhf.experiments.run import STATS, Run, recorded
from eg3d_rlhf.tuning.distill.config import Arm, DistillSettings
from eg3d_rlhf.tuning.distill.distill_loop import Distillation, find_warnings, status_columns
from eg3d_rlhf.tuning.distill.scene import Scene, open_scene
from eg3d_rlhf.tuning.distill.served_judge import ServedJudge
from training import checkpoint, rehearsal
from training.progress import log_bar, tqdm

PARTS = "parts"  # folder with the folders of the parts
RESULT = "result.json"
ASSETS = "assets.safetensors"
CHANGEABLE = ("loop.checkpoint_ticks",)  # settings that a resumed run may change


class Part(NamedTuple):
    """Part of a run: one batch of assets under one arm."""

    arm: str  # name of the arm, see `Arm.name`
    batch: int  # index into `DistillSettings.batches`

    @property
    def name(self) -> str:
        """Name of the part, which is also the path of its folder below parts/."""
        return f"{self.arm}/{self.batch:03d}"

    @classmethod
    def from_name(cls, name: str) -> "Part":
        """Parse the name of a part, such as 'sds/000', in the form of the property `name`."""
        arm, batch = name.split("/")
        return cls(arm, int(batch))


def list_parts(settings: DistillSettings) -> list[Part]:
    """List all parts of a run, batch by batch.

    In this order, an interrupted comparison has batches that all arms have finished.
    """
    return [Part(arm, batch) for batch in range(len(settings.batches())) for arm in settings.arms]


def distil(
    settings: DistillSettings,
    scene: Scene,
    part: Part,
    folder: Path,
    print_line: Callable[[str], None] = print,
) -> dict:
    """Optimise the assets of one part, from its last checkpoint if there is one, to the end.

    Args:
        settings: settings of the run.
        scene: prior, renderer and rewards.
        part: arm and batch.
        folder: folder of the part.
        print_line: function that prints a line of progress.
    Returns: summary of the part, as values for JSON: "arm", "batch", "assets" (their number), "last" (metrics
    of the last tick) and "warnings" (their names). The summary of a finished part is read from its file.
    Raises: StoppedError if a signal ended the part, after its state is stored; LossNotFiniteError if the
    prior predicts NaN; ValueError or OSError if the scene cannot be made.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # `run.resume` raises an error if a resumed part has other settings than those in its folder.
    recorded_settings = {"part": part.name, **settings.to_dict()}
    with Run(
        folder, recorded_settings, scene.inputs, say=lambda line: print_line(f"{part.name} {line}")
    ) as run:
        if recorded(folder):
            run.resume(CHANGEABLE)
        else:
            run.begin()
        # The file of results exists if the part is finished.
        if (folder / RESULT).exists():
            return json.loads((folder / RESULT).read_text())
        # The optimisation is made in any case; a checkpoint then overwrites its tensors.
        distillation = scene.distillation(settings, Arm.parse(part.arm), part.batch)
        stats_lines = []
        printed_warnings = set()
        step = 0
        line_count = 0
        if checkpoint.available(folder):
            # previous=True: if the newest checkpoint is damaged, the one before it is read.
            checkpoint_tensors, metadata = run.read(previous=True)
            distillation.load(checkpoint_tensors, metadata)
            step = metadata["step"]
            stats_lines = metadata["records"]
            line_count = metadata["lines"]
        # Removes the lines of stats.jsonl that were written after the checkpoint, because their steps are
        # repeated.
        run.continue_from(step, line_count)
        loop = settings.loop
        planned_ticks = math.ceil(loop.steps / loop.tick)
        log_lines = log_bar(loop.steps, step, part.name, "step")
        with run.stoppable(), rehearsal.section(), log_lines:
            while step < loop.steps:
                if run.stop_requested:
                    _checkpoint(run, distillation, step, stats_lines)
                    raise StoppedError(
                        f"{run.stop_requested}: part {part.name} stopped after step {step}. Resume the run to"
                        " continue."
                    )
                with rehearsal.timed(rehearsal.TRAINING, "steps", loop.steps):
                    distillation.step(step)
                step += 1
                log_lines.update()
                # A tick ends after loop.tick steps, and after the last step.
                if step % loop.tick and step < loop.steps:
                    continue
                # The drift is measured once per tick only, because it needs a render and a prediction.
                with rehearsal.timed(rehearsal.TRAINING, "measurements of a tick", planned_ticks):
                    stats_lines.append(distillation.tick.line(step, distillation.drift()))
                run.stats(stats_lines[-1])
                run.status(status_columns(stats_lines[-1], loop.steps), step, loop.steps, "step")
                for warning_name, warning_text in find_warnings(stats_lines).items():
                    # The same warning can apply in many ticks, but is printed once.
                    if warning_name not in printed_warnings:
                        print_line(f"Warning ({part.name}, {warning_name}): {warning_text}")
                    printed_warnings.add(warning_name)
                if (step // loop.tick) % loop.checkpoint_ticks == 0 or rehearsal.active():
                    with rehearsal.timed(
                        rehearsal.CHECKPOINTS, "checkpoints", planned_ticks // loop.checkpoint_ticks
                    ):
                        _checkpoint(run, distillation, step, stats_lines)
                if rehearsal.active():
                    break
        finished_assets = distillation.finished()
        # The assets are written before the file of results, which marks the part as finished.
        finished_assets.save(folder / ASSETS)
        part_summary = {
            "arm": part.arm,
            "batch": part.batch,
            "assets": len(finished_assets),
            "last": stats_lines[-1],
            "warnings": sorted(printed_warnings),
        }
        run.write(RESULT, part_summary)
        # Checkpoints are large, and a finished part does not need them.
        for path in checkpoint.available(folder):
            path.unlink()
        return part_summary


def _checkpoint(run: Run, distillation: Distillation, step: int, stats_lines: Sequence[dict]) -> None:
    """Write a checkpoint of a part.

    Args:
        run: run of the part.
        distillation: optimisation whose state is written.
        step: number of finished steps.
        stats_lines: lines of stats.jsonl so far, which a resumed part needs for its warnings.
    """
    tensors, metadata = distillation.state()
    run.checkpoint(
        step, tensors, {**metadata, "step": step, "records": list(stats_lines), "lines": run.lines}
    )


# --- several parts


def handler(settings: DistillSettings, folder: Path, device: str) -> Callable[[str], dict]:
    """Return the function with which a worker process computes a part.

    Its argument is the name of a part, and its result is the summary that `distil` returns.

    Args:
        settings: settings of the run.
        folder: folder of the run.
        device: name of the device.
    """
    # One thread per process, because several processes compute parts at the same time.
    torch.set_num_threads(1)
    scene = open_scene(settings, torch.device(device))
    return lambda part_name: distil(
        settings, scene, Part.from_name(part_name), folder / PARTS / part_name, partial(print, flush=True)
    )


def distil_all(settings: DistillSettings, scene: Scene, run: Run) -> None:
    """Compute all parts of a run. With torchrun, each process computes its share, and waits for the others.

    Raises: the errors of `distil`.
    """
    if rehearsal.active():
        return rehearse(settings, scene, run)
    part_names = [part.name for part in list_parts(settings)]
    # With torchrun, the processes take parts in turn: rank r takes the parts r, r + world, r + 2 world, ...
    own_part_names = part_names[run.ranks.rank :: run.ranks.world]
    # The processes of torchrun start no worker processes of their own.
    process_count = 1 if run.ranks.world > 1 else max(1, min(run.jobs, len(own_part_names)))
    if isinstance(scene.judge, ServedJudge):
        if run.ranks.world > 1:
            raise ValueError(
                "--judge=URL cannot be combined with torchrun, because the limit on calls holds for one"
                " process. Start the run without torchrun."
            )
        # One process, so that all parts share the limit on calls and the file of answers.
        process_count = 1
        scene.judge.open(run.folder)
    if process_count == 1:
        if run.ranks.world > 1:
            torch.set_num_threads(1)
        for part_name in own_part_names:
            distil(
                settings,
                scene,
                Part.from_name(part_name),
                run.folder / PARTS / part_name,
                partial(print, flush=True),
            )
    else:
        print(
            f"{len(own_part_names)} parts on {process_count} processes. Their output is in"
            f" {run.folder / 'logs'}.",
            flush=True,
        )
        with tqdm(
            total=len(own_part_names), unit="part", desc="distilling", dynamic_ncols=True
        ) as progress_bar:
            run_tasks(
                dict.fromkeys(own_part_names, ()),
                handler,
                (settings, run.folder, run.device),
                process_count,
                run.folder / "logs",
                on_done=lambda part_name, part_summary: (
                    progress_bar.update() and None
                ),  # called once per finished part
                expected=(ValueError, OSError, StoppedError),
            )
    if isinstance(scene.judge, ServedJudge):
        scene.judge.close()
    # The parts of all processes must be complete before their lines are gathered.
    run.ranks.barrier()


def rehearse(settings: DistillSettings, scene: Scene, run: Run) -> None:
    """Do the first tick of the first batch of each arm.

    Args:
        settings: settings of the run.
        scene: prior, renderer and rewards.
        run: the run, with its folder, its ranks and its number of processes.
    """
    batch_count = len(settings.batches())
    part_count = batch_count * len(settings.arms)
    # as in `distil_all`: processes of torchrun or of --jobs divide the parts
    process_count = run.ranks.world if run.ranks.world > 1 else max(1, min(run.jobs, part_count))
    thread_count = torch.get_num_threads()
    torch.set_num_threads(1 if process_count > 1 else thread_count)
    try:
        # the processes with the most parts decide the time: -(-a // b) divides and rounds up
        with rehearsal.section(times=-(-part_count // process_count) / len(settings.arms)):
            for arm in settings.arms:
                part = Part(arm, 0)
                # every rank does the same part, so the other ranks have folders of their own
                parts_name = PARTS if run.ranks.is_main else f"{PARTS}-{run.ranks.rank}"
                folder = run.folder / parts_name / part.name
                distil(settings, scene, part, folder, partial(print, flush=True))
    finally:
        torch.set_num_threads(thread_count)
    run.ranks.barrier()


def gather_stats(settings: DistillSettings, run: Run) -> None:
    """Write the stats.jsonl of the run, which contains the lines of all parts in the order of the parts."""
    run.continue_from(0, 0)  # removes the lines of an earlier call
    for part in list_parts(settings):
        for stats_line in (run.folder / PARTS / part.name / STATS).read_text().splitlines():
            run.stats({"arm": part.arm, "batch": part.batch, **json.loads(stats_line)})
