"""`train.py --mode=distill`: text to 3D by score distillation, of prompts with one method, or of all arms of a comparison."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path

import click
import torch

from eg3d_rlhf.core.cli import GroupedCommand, choose_device
from eg3d_rlhf.experiments.process import StoppedError, sigterm_interrupts
from eg3d_rlhf.experiments.run import Run, begun_by_this_launch, claim, next_free, recorded_by
from eg3d_rlhf.modes.distill_flags import BUNDLED, flag, method_flags, resolve, run_flags, what_flags
from eg3d_rlhf.tuning.distill import outputs
from eg3d_rlhf.tuning.distill.config import Arm, DistillSettings
from eg3d_rlhf.tuning.distill.methods import flat, settings_of
from eg3d_rlhf.tuning.distill.parts import distil_all, gather_stats
from eg3d_rlhf.tuning.distill.scene import Scene, open_scene
from training.distributed import Ranks, leave, process_group

MODE = "distill"
_WITH_RESUME = {"resume", "device", "workers", "timeout", "dry_run", "show"}


def read_run(folder: Path) -> tuple[DistillSettings, int]:
    """Settings of a run folder, and how many assets it shows. Raises: FileNotFoundError, ValueError for another folder."""
    record = recorded_by(folder, MODE)
    return DistillSettings.of(record["settings"]), record["show"]


def name_of(settings: DistillSettings, desc: str | None) -> str:
    """Of the run's folder."""
    what = "compare" if len(settings.arms) > 1 else settings.arms[0]
    prior = Path(settings.scene.prior).stem
    return f"{MODE}-{prior}-{what}" + (f"-{desc}" if desc else "")


def device_of(settings: DistillSettings, name: str, ranks: Ranks) -> str:
    """Where to run; the problems without files are for CPUs."""
    if settings.scene.prior in BUNDLED and name == "auto":
        return "cpu"
    return str(ranks.device if ranks.world > 1 else choose_device(name))


def work(settings: DistillSettings, scene: Scene, show: int, run: Run, device: str, workers: int, ranks: Ranks) -> None:
    """Do what is left of a run, and write what it gives."""
    if ranks.main:
        pairs, arms = len(settings.pairs()), len(settings.arms)
        print(f"Run folder {run.folder}. {pairs} assets x {arms} arm{'s' * (arms > 1)}, {settings.loop.steps} steps each.", flush=True)
    distil_all(settings, scene, run.folder, device, workers, ranks)
    leave()  # the other processes need not wait for pictures
    if ranks.main:
        gather_stats(settings, run)
        outputs.write(settings, scene, run, show)


def start(settings: DistillSettings, flags: Mapping, device: str, ranks: Ranks) -> Path:
    """A new run, or, after a restart by torchrun, the one that it began; returns the folder."""
    scene = open_scene(settings, torch.device(device))  # first, so that a mistake leaves no folder behind
    begun = begun_by_this_launch(flags["outdir"], ranks)
    folder = begun or claim(next_free(flags["outdir"], name_of(settings, flags["desc"])), ranks)
    with Run(folder, {"mode": MODE, "settings": settings.to_dict(), "show": flags["show"]}, scene.inputs, ranks=ranks) as run:
        if begun is None:
            run.begin()
        ranks.barrier()
        work(settings, scene, flags["show"], run, device, flags["workers"], ranks)
    return folder


def resume(folder: Path, flags: Mapping, device: str, ranks: Ranks) -> Path:
    """Go on with a run where it was; one that is finished is only written anew."""
    settings, show = read_run(folder)
    scene = open_scene(settings, torch.device(device))
    with Run(folder, {"mode": MODE, "settings": settings.to_dict(), "show": show}, scene.inputs, ranks=ranks) as run:
        run.resume()
        work(settings, scene, show, run, device, flags["workers"], ranks)
    return folder


@click.command("train.py --mode=distill", cls=GroupedCommand)
@run_flags
@what_flags
@method_flags
@click.pass_context
def distill(context: click.Context, **given) -> None:
    """Text to 3D by score distillation, with preferences in the gradient. Without flags: the bundled problem, all arms on the same seeds,
    and a table of win rates against plain score distillation. A run that was stopped goes on with --resume=RUN.

    \b
    Examples:
        python train.py --mode=distill
        python train.py --mode=distill --method=dreamdpo --prompt="a white head with a red nose"
    """
    written = {name for name in given if context.get_parameter_source(name) == click.core.ParameterSource.COMMANDLINE}
    if given["resume"] is not None and written - _WITH_RESUME:
        extra = ", ".join(sorted(flag("prompt" if name == "prompts" else name) for name in written - _WITH_RESUME))
        raise ValueError(f"{extra}: expected the run's own with --resume, got others. Leave out.")
    settings = read_run(given["resume"])[0] if given["resume"] is not None else resolve(given)
    if given["dry_run"]:
        methods = {name: flat(settings_of(Arm.parse(name).method, settings.guidance, settings.preset)) for name in settings.arms}
        click.echo(json.dumps({**settings.to_dict(), "methods": methods}, indent=2, sort_keys=True, default=lambda ramp: ramp.spec))
        return
    try:
        with sigterm_interrupts(), process_group(choose_device(given["device"]), given["timeout"]) as ranks:
            device = device_of(settings, given["device"], ranks)
            if given["resume"] is not None:
                folder = resume(given["resume"], given, device, ranks)
            else:
                folder = start(settings, given, device, ranks)
            if ranks.main:
                print(f"Done: {folder}", flush=True)
    except (StoppedError, KeyboardInterrupt) as stopped:
        why = f": {stopped}" if str(stopped) else "."
        click.echo(f"Stopped{why} --resume=RUN goes on from there.", err=True)
        sys.exit(130)
