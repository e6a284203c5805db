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
from training import checkpoint
from training.progress import tqdm

PARTS = "parts"  # folder with the folders of the parts
RESULT = "result.json"
ASSETS = "assets.safetensors"
CHANGEABLE = ("loop.checkpoint_ticks",)  # settings that a resumed run may change


class Part(NamedTuple):
    """Part of a run: one batch of assets under one arm."""

    arm: str  # name of an `Arm`
    batch: int  # index into `DistillSettings.batches`

    @property
    def name(self) -> str:
        """Name of the part, which is also the path of its folder below parts/."""
        return f"{self.arm}/{self.batch:03d}"

    @classmethod
    def from_name(cls, name: str) -> "Part":
        """Parse the result of `name`."""
        arm, batch = name.split("/")
        return cls(arm, int(batch))


def list_parts(settings: DistillSettings) -> list[Part]:
    """List all parts of a run, batch by batch.

    In this order, an interrupted comparison has batches that all arms have finished.
    """
    return [Part(arm, batch) for batch in range(len(settings.batches())) for arm in settings.arms]


def distil(
    settings: DistillSettings, scene: Scene, part: Part, folder: Path, report: Callable[[str], None] = print
) -> dict:
    """Optimise the assets of one part, from its last checkpoint if there is one, to the end.

    Args:
        settings: settings of the run.
        scene: prior, renderer and rewards.
        part: arm and batch.
        folder: folder of the part.
        report: function that prints a line of progress.
    Returns: summary of the part, as values for JSON; the result of a finished part is read from its file.
    Raises: StoppedError if a signal ended the part, after its state is stored; LossNotFiniteError if the
    prior predicts NaN; ValueError or OSError if the scene cannot be made.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # `run.resume` raises an error if a resumed part has other settings than those in its folder.
    options = {"part": part.name, **settings.to_dict()}
    with Run(folder, options, scene.inputs, say=lambda line: report(f"{part.name} {line}")) as run:
        if recorded(folder):
            run.resume(CHANGEABLE)
        else:
            run.begin()
        # The file of results exists if the part is finished.
        if (folder / RESULT).exists():
            return json.loads((folder / RESULT).read_text())
        # The optimisation is made in any case; a checkpoint then overwrites its tensors.
        distillation = scene.distillation(settings, Arm.parse(part.arm), part.batch)
        lines = []
        printed_warnings = set()
        step = 0
        line_count = 0
        if checkpoint.available(folder):
            # previous=True: if the newest checkpoint is damaged, the one before it is read.
            tensors, meta = run.read(previous=True)
            distillation.load(tensors, meta)
            step = meta["step"]
            lines = meta["records"]
            line_count = meta["lines"]
        # Removes the lines of stats.jsonl that were written after the checkpoint, because their steps are
        # repeated.
        run.continue_from(step, line_count)
        loop = settings.loop
        with run.stoppable():
            while step < loop.steps:
                if run.stop_requested:
                    _checkpoint(run, distillation, step, lines)
                    raise StoppedError(f"{run.stop_requested} after step {step} of {part.name}.")
                distillation.step(step)
                step += 1
                # A tick ends after loop.tick steps, and after the last step.
                if step % loop.tick and step < loop.steps:
                    continue
                # The drift is measured once per tick only, because it needs a render and a prediction.
                lines.append(distillation.tick.line(step, distillation.drift()))
                run.stats(lines[-1])
                run.status(status_columns(lines[-1], loop.steps), step, loop.steps, "step")
                for name, text in find_warnings(lines).items():
                    # The same warning can apply in many ticks, but is printed once.
                    if name not in printed_warnings:
                        report(f"Warning ({part.name}, {name}): {text}")
                    printed_warnings.add(name)
                if (step // loop.tick) % loop.checkpoint_ticks == 0:
                    _checkpoint(run, distillation, step, lines)
        assets = distillation.finished()
        # The assets are written before the file of results, which marks the part as finished.
        assets.save(folder / ASSETS)
        result = {
            "arm": part.arm,
            "batch": part.batch,
            "assets": len(assets),
            "last": lines[-1],
            "warnings": sorted(printed_warnings),
        }
        run.write(RESULT, result)
        # Checkpoints are large, and a finished part does not need them.
        for path in checkpoint.available(folder):
            path.unlink()
        return result


def _checkpoint(run: Run, distillation: Distillation, step: int, lines: Sequence[dict]) -> None:
    """Write a checkpoint of a part after `step` steps, with the lines of stats.jsonl so far."""
    tensors, meta = distillation.state()
    run.checkpoint(step, tensors, {**meta, "step": step, "records": list(lines), "lines": run.lines})


# --- several parts


def handler(settings: DistillSettings, folder: Path, device: str) -> Callable[[str], dict]:
    """Return the function with which a worker process computes a part. Its argument is the name of the part.

    Args:
        settings: settings of the run.
        folder: folder of the run.
        device: name of the device.
    """
    # One thread per process, because several processes compute parts at the same time.
    torch.set_num_threads(1)
    scene = open_scene(settings, torch.device(device))
    return lambda name: distil(
        settings, scene, Part.from_name(name), folder / PARTS / name, partial(print, flush=True)
    )


def distil_all(settings: DistillSettings, scene: Scene, run: Run) -> None:
    """Compute all parts of a run. With torchrun, each process computes its share, and waits for the others.

    Raises: the errors of `distil`.
    """
    names = [part.name for part in list_parts(settings)]
    # With torchrun, the processes take parts in turn: rank r takes the parts r, r + world, r + 2 world, ...
    own_parts = names[run.ranks.rank :: run.ranks.world]
    # The processes of torchrun start no worker processes of their own.
    jobs = 1 if run.ranks.world > 1 else max(1, min(run.jobs, len(own_parts)))
    if jobs == 1:
        if run.ranks.world > 1:
            torch.set_num_threads(1)
        for name in own_parts:
            distil(
                settings, scene, Part.from_name(name), run.folder / PARTS / name, partial(print, flush=True)
            )
    else:
        print(
            f"{len(own_parts)} parts on {jobs} processes. Their output is in {run.folder / 'logs'}.",
            flush=True,
        )
        with tqdm(total=len(own_parts), unit="part", desc="distilling", dynamic_ncols=True) as bar:
            run_tasks(
                dict.fromkeys(own_parts, ()),
                handler,
                (settings, run.folder, run.device),
                jobs,
                run.folder / "logs",
                on_done=lambda name, result: bar.update() and None,  # called once per finished part
                expected=(ValueError, OSError, StoppedError),
            )
    # The parts of all processes must be complete before their lines are gathered.
    run.ranks.barrier()


def gather_stats(settings: DistillSettings, run: Run) -> None:
    """Write the stats.jsonl of the run, which contains the lines of all parts in the order of the parts."""
    run.continue_from(0, 0)  # removes the lines of an earlier call
    for part in list_parts(settings):
        for line in (run.folder / PARTS / part.name / STATS).read_text().splitlines():
            run.stats({"arm": part.arm, "batch": part.batch, **json.loads(line)})
