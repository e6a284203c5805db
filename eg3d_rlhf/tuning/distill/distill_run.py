"""Runs score distillation from its settings to finished assets: arms x batches of assets, in this process, on
worker processes, or on the processes of torchrun.

    parts/<arm>/<batch>/     a run of its own: its lines, checkpoints, and at the end assets.safetensors and
                             result.json
    stats.jsonl              the lines of all parts, when they are done

Arms of a comparison have the same prompts, starts, views, times and noises. The result does not depend on the
number of processes.
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

PARTS = "parts"
RESULT = "result.json"
ASSETS = "assets.safetensors"
CHANGEABLE = ("loop.checkpoint_ticks",)  # settings that a resumed run may change


class Part(NamedTuple):
    """A batch of assets under one arm, the unit of work."""

    arm: str  # name of an `Arm`
    batch: int  # index into `DistillSettings.batches`

    @property
    def name(self) -> str:
        """Name of the part, and of its folder below parts/."""
        return f"{self.arm}/{self.batch:03d}"

    @classmethod
    def from_name(cls, name: str) -> "Part":
        """Parse the result of `name`."""
        arm, batch = name.split("/")
        return cls(arm, int(batch))


def list_parts(settings: DistillSettings) -> list[Part]:
    """List all parts batch by batch, so that a stopped comparison has complete batches of all arms."""
    return [Part(arm, batch) for batch in range(len(settings.batches())) for arm in settings.arms]


def distil(
    settings: DistillSettings, scene: Scene, part: Part, folder: Path, report: Callable[[str], None] = print
) -> dict:
    """Optimise one part until its end, continuing from its last checkpoint.

    Args:
        settings: of the run.
        scene: the opened problem.
        part: arm and batch.
        folder: of the part.
        report: called with lines of progress.

    Returns: the result as JSON values. Raises: StoppedError after a signal, when the state is on the disk;
    LossNotFiniteError; ValueError and OSError of the scene.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # A resumed part is compared with these values: other settings are an error.
    options = {"part": part.name, **settings.to_dict()}
    with Run(folder, options, scene.inputs, say=lambda line: report(f"{part.name} {line}")) as run:
        if recorded(folder):
            run.resume(CHANGEABLE)
        else:
            run.begin()
        # A finished part is not repeated.
        if (folder / RESULT).exists():
            return json.loads((folder / RESULT).read_text())
        # Made before the checkpoint is read: it fixes the shapes of all tensors.
        work = scene.distillation(settings, Arm.parse(part.arm), part.batch)
        lines = []
        warned = set()
        step = 0
        kept_lines = 0
        if checkpoint.available(folder):
            # previous: if the newest checkpoint is damaged, the one before it is used.
            tensors, meta = run.read(previous=True)
            work.load(tensors, meta)
            step = meta["step"]
            lines = meta["records"]
            kept_lines = meta["lines"]
        # Lines of stats.jsonl after the checkpoint are removed; the steps behind them are repeated.
        run.go_on(step, kept_lines)
        loop = settings.loop
        with run.stoppable():
            while step < loop.steps:
                if run.stop_requested:
                    _checkpoint(run, work, step, lines)
                    raise StoppedError(f"{run.stop_requested} after step {step} of {part.name}.")
                work.step(step)
                step += 1
                # The last step always ends a tick.
                if step % loop.tick and step < loop.steps:
                    continue
                # The drift is measured once per tick, because it needs a render and a prediction.
                lines.append(work.tick.line(step, work.drift()))
                run.stats(lines[-1])
                run.status(status_columns(lines[-1], loop.steps), step, loop.steps, "step")
                for name, text in find_warnings(lines).items():
                    # Each warning is printed once per part; the result contains all of them.
                    if name not in warned:
                        report(f"Warning ({part.name}, {name}): {text}")
                    warned.add(name)
                if (step // loop.tick) % loop.checkpoint_ticks == 0:
                    _checkpoint(run, work, step, lines)
        finished = work.finished()
        # The assets are written before the result, which marks the part as finished.
        finished.save(folder / ASSETS)
        result = {
            "arm": part.arm,
            "batch": part.batch,
            "assets": len(finished),
            "last": lines[-1],
            "warnings": sorted(warned),
        }
        run.write(RESULT, result)
        # Checkpoints are large, and a finished part needs none.
        for path in checkpoint.available(folder):
            path.unlink()
        return result


def _checkpoint(run: Run, work: Distillation, step: int, lines: Sequence[dict]) -> None:
    """Write a checkpoint of a part."""
    tensors, meta = work.state()
    run.checkpoint(step, tensors, {**meta, "step": step, "records": list(lines), "lines": run.lines})


# --- several parts


def handler(settings: DistillSettings, folder: Path, device: str) -> Callable[[str], dict]:
    """Make the function that a worker process calls with the names of its parts."""
    # One thread per process: the work is parallel over parts already.
    torch.set_num_threads(1)
    scene = open_scene(settings, torch.device(device))
    return lambda name: distil(
        settings, scene, Part.from_name(name), folder / PARTS / name, partial(print, flush=True)
    )


def distil_all(settings: DistillSettings, scene: Scene, run: Run) -> None:
    """Perform all parts; with torchrun, the share of this process. Raises: as `distil`."""
    names = [part.name for part in list_parts(settings)]
    # Every world-th part: each process gets parts of all arms.
    own_parts = names[run.ranks.rank :: run.ranks.world]
    # torchrun has started the processes already, so each of them works alone.
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
                on_done=lambda name, result: bar.update() and None,
                expected=(ValueError, OSError, StoppedError),
            )
    # The parts of all processes must be complete before their lines are gathered.
    run.ranks.barrier()


def gather_stats(settings: DistillSettings, run: Run) -> None:
    """Write the lines of all parts to the stats.jsonl of the run, in the order of the parts."""
    run.go_on(0, 0)  # remove the lines of an earlier call
    for part in list_parts(settings):
        for line in (run.folder / PARTS / part.name / STATS).read_text().splitlines():
            run.stats({"arm": part.arm, "batch": part.batch, **json.loads(line)})
