"""The job `flow sample`: generates assets with WORK's generator, for people to compare."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from eg3d_rlhf.core.cli import GroupedCommand, choose_device, option, together
from eg3d_rlhf.experiments.mode import running
from eg3d_rlhf.modes.shared_flags import FOLDER, rare_option
from eg3d_rlhf.tuning.flow.workspace.work_folder import BASE, SHOWN, TEST, Work

if TYPE_CHECKING:
    from eg3d_rlhf.tuning.flow.workspace.sampled_assets import Drawing, Drawn

AGAIN = "The same command"
work_argument = click.argument("folder", metavar="WORK", type=FOLDER)
device_flag = option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    help="Device that runs the networks; auto is CUDA where available.",
)
timeout_flag = rare_option(
    "--timeout",
    metavar="MINUTES",
    type=click.FloatRange(min=0, min_open=True),
    default=30,
    help="With torchrun: longest time to wait for another process, in minutes.",
)
sampling_flags = together(
    rare_option(
        "--cells",
        metavar="N",
        type=click.IntRange(2),
        show_default="the family's",
        help=(
            "Cells per axis of the grid from which meshes are extracted: 128 for Hunyuan3D-2.1"
            " (published: 384)."
        ),
    ),
    rare_option(
        "--few-steps",
        metavar="N",
        type=click.IntRange(1),
        help=(
            "Sample in N steps without guidance, for networks conditioned on the step size (the structure"
            " stage of SAM 3D)."
        ),
    ),
    timeout_flag,
)


@click.command("sample", cls=GroupedCommand)
@work_argument
@device_flag
@sampling_flags
def sample(folder: Path, device: str, cells: int | None, few_steps: int | None, timeout: float) -> None:
    """Generate assets with the untuned generator, to be compared, and store the latents that they came from.
    Test prompts are left out: they are kept for `flow study`.

    The same command resumes after a stop. With torchrun, the processes share the work.

    \b
    Example:
        eg3d-rlhf flow sample WORK
    """
    from eg3d_rlhf.tuning.flow.workspace.sampled_assets import drawing_of

    work = Work.open(folder)
    family = work.check_pipeline()
    # torchrun's processes are joined here; a signal ends the work with a message
    with running(device, timeout, AGAIN) as ranks:
        # with torchrun every process has its own device
        where = choose_device(device) if ranks.world == 1 else ranks.device
        sampling = drawing_of(work, family, BASE, SHOWN, where, ranks, cells=cells, few_steps=few_steps)
        drawn = sample_with_bar(sampling)
        # one process prints
        if not ranks.main:
            return
    for line in lines_of(sampling, drawn):
        click.echo(line)
    # a family may add a remark about its samples
    if remark := family.remark(sampling.folder, work.lines(), sampling.pipeline):
        click.echo(remark)
    click.echo(f"{len(work.names(TEST))} prompts or images are kept for the test")
    click.echo(f"next: eg3d-rlhf flow label {folder}")


def sample_with_bar(sampling: "Drawing") -> "Drawn":
    """Generate the assets with a progress bar."""
    from training.progress import tqdm

    # assets of all ranks
    total = len(sampling.jobs)
    with tqdm(
        total=total,
        desc=f"sampling {sampling.folder.name}",
        unit="asset",
        disable=None if sampling.ranks.main else True,
    ) as bar:
        done = sampling.run(bar.update)
        bar.update(total - bar.n)  # assets that other ranks generated
    return done


def lines_of(sampling: "Drawing", drawn: "Drawn") -> list[str]:
    """Report the number of generated assets and of those left out."""
    lines = [f"{drawn.count} assets in {sampling.folder}"]
    # such samples cannot be shown or compared
    if drawn.left_out:
        lines.append(
            f"{len(drawn.left_out)} more samples have no surface and are left out: {drawn.left_out[0]}"
        )
    return lines
