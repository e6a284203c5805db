"""A run of score distillation from its settings to finished assets: arms x batches of assets, here, on worker
processes, or on torchrun's.

    parts/<arm>/<batch>/     a run of its own: its lines, states, and at the end assets.safetensors and
                             result.json
    stats.jsonl              the lines of all parts, when they are done

Arms of a comparison see the same prompts, starts, views, times and noises. Nothing depends on how many
processes share the work.
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
from eg3d_rlhf.tuning.distill.distill_loop import Distillation, shown, signs
from eg3d_rlhf.tuning.distill.scene import Scene, open_scene
from training import checkpoint
from training.progress import tqdm

PARTS = "parts"
RESULT = "result.json"
ASSETS = "assets.safetensors"
FREE = ("loop.checkpoint_ticks",)  # settings that a resumed run may change


class Part(NamedTuple):
    """A batch of assets under one arm."""

    arm: str
    batch: int

    @property
    def name(self) -> str:
        return f"{self.arm}/{self.batch:03d}"

    @classmethod
    def of(cls, name: str) -> "Part":
        arm, batch = name.split("/")
        return cls(arm, int(batch))


def parts_of(settings: DistillSettings) -> list[Part]:
    """All parts: batch by batch, so that a stopped comparison has whole batches of all arms."""
    return [Part(arm, batch) for batch in range(len(settings.batches())) for arm in settings.arms]


def distil(
    settings: DistillSettings, scene: Scene, part: Part, folder: Path, say: Callable[[str], None] = print
) -> dict:
    """Optimise one part to its end, from where it was; returns its result, JSON.

    Raises: StoppedError after a signal, its state on the disk; LossNotFiniteError; what the pieces raise.
    """
    folder.mkdir(parents=True, exist_ok=True)
    options = {"part": part.name, **settings.to_dict()}
    with Run(folder, options, scene.inputs, say=lambda line: say(f"{part.name} {line}")) as run:
        if recorded(folder):
            run.resume(FREE)
        else:
            run.begin()
        if (folder / RESULT).exists():
            return json.loads((folder / RESULT).read_text())
        work = scene.distillation(settings, Arm.parse(part.arm), part.batch)
        lines = []
        seen = set()
        step = 0
        kept = 0
        if checkpoint.available(folder):
            tensors, meta = run.read(previous=True)
            work.load(tensors, meta)
            step = meta["step"]
            lines = meta["records"]
            kept = meta["lines"]
        run.go_on(step, kept)
        loop = settings.loop
        with run.stoppable():
            while step < loop.steps:
                if run.stop_requested:
                    _checkpoint(run, work, step, lines)
                    raise StoppedError(f"{run.stop_requested} after step {step} of {part.name}.")
                work.step(step)
                step += 1
                if step % loop.tick and step < loop.steps:
                    continue
                lines.append(work.tick.line(step, work.drift()))
                run.stats(lines[-1])
                run.status(shown(lines[-1], loop.steps), step, loop.steps, "step")
                for name, text in signs(lines).items():
                    if name not in seen:
                        say(f"Warning ({part.name}, {name}): {text}")
                    seen.add(name)
                if (step // loop.tick) % loop.checkpoint_ticks == 0:
                    _checkpoint(run, work, step, lines)
        finished = work.finished()
        finished.save(folder / ASSETS)
        result = {
            "arm": part.arm,
            "batch": part.batch,
            "assets": len(finished),
            "last": lines[-1],
            "warnings": sorted(seen),
        }
        run.write(RESULT, result)
        for path in checkpoint.available(folder):
            path.unlink()
        return result


def _checkpoint(run: Run, work: Distillation, step: int, lines: Sequence[dict]) -> None:
    tensors, meta = work.state()
    run.checkpoint(step, tensors, {**meta, "step": step, "records": list(lines), "lines": run.lines})


# Many parts.


def handler(settings: DistillSettings, folder: Path, device: str) -> Callable[[str], dict]:
    torch.set_num_threads(1)
    scene = open_scene(settings, torch.device(device))
    return lambda name: distil(
        settings, scene, Part.of(name), folder / PARTS / name, partial(print, flush=True)
    )


def distil_all(settings: DistillSettings, scene: Scene, run: Run) -> None:
    """Do all parts; with torchrun, this process's share of them. Raises: see `distil`."""
    names = [part.name for part in parts_of(settings)]
    mine = names[run.ranks.rank :: run.ranks.world]
    jobs = 1 if run.ranks.world > 1 else max(1, min(run.jobs, len(mine)))
    if jobs == 1:
        if run.ranks.world > 1:
            torch.set_num_threads(1)
        for name in mine:
            distil(settings, scene, Part.of(name), run.folder / PARTS / name, partial(print, flush=True))
    else:
        print(
            f"{len(mine)} parts on {jobs} processes; what they print is in {run.folder / 'logs'}.", flush=True
        )
        with tqdm(total=len(mine), unit="part", desc="distilling", dynamic_ncols=True) as bar:
            run_tasks(
                dict.fromkeys(mine, ()),
                handler,
                (settings, run.folder, run.device),
                jobs,
                run.folder / "logs",
                on_done=lambda name, result: bar.update() and None,
                expected=(ValueError, OSError, StoppedError),
            )
    run.ranks.barrier()


def gather_stats(settings: DistillSettings, run: Run) -> None:
    run.go_on(0, 0)
    for part in parts_of(settings):
        for line in (run.folder / PARTS / part.name / STATS).read_text().splitlines():
            run.stats({"arm": part.arm, "batch": part.batch, **json.loads(line)})
