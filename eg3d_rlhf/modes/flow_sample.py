"""`eg3d-rlhf flow sample`: assets of WORK's generator, to compare."""

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
    "--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", help="Where networks run."
)
timeout_flag = rare_option(
    "--timeout",
    metavar="MINUTES",
    type=click.FloatRange(min=0, min_open=True),
    default=30,
    help="With torchrun: longest wait for another process.",
)
drawing_flags = together(
    rare_option(
        "--cells",
        metavar="N",
        type=click.IntRange(2),
        show_default="the family's",
        help="Per axis of the grid that meshes are read on: 128 for Hunyuan3D-2.1, 384 as published.",
    ),
    rare_option(
        "--few-steps",
        metavar="N",
        type=click.IntRange(1),
        help=(
            "Draw in N steps, without guidance, where a network reads how long a step is (SAM 3D's"
            " structure)."
        ),
    ),
    timeout_flag,
)


@click.command("sample", cls=GroupedCommand)
@work_argument
@device_flag
@drawing_flags
def sample(folder: Path, device: str, cells: int | None, few_steps: int | None, timeout: float) -> None:
    """Assets of the generator as it is, to compare, with the latents that they came from; those of test
    conditions are not drawn.

    Where it was stopped, it goes on. torchrun's processes share the work.

    \b
    Example:
        eg3d-rlhf flow sample WORK
    """
    from eg3d_rlhf.tuning.flow.workspace.sampled_assets import drawing_of

    work = Work.open(folder)
    family = work.check_pipeline()
    with running(device, timeout, AGAIN) as ranks:
        where = choose_device(device) if ranks.world == 1 else ranks.device
        drawing = drawing_of(work, family, BASE, SHOWN, where, ranks, cells=cells, few_steps=few_steps)
        drawn = drawn_with_bar(drawing)
        if not ranks.main:
            return
    for line in lines_of(drawing, drawn):
        click.echo(line)
    if remark := family.remark(drawing.folder, work.lines(), drawing.pipeline):
        click.echo(remark)
    click.echo(f"{len(work.names(TEST))} conditions are kept for the test")
    click.echo(f"next: eg3d-rlhf flow label {folder}")


def drawn_with_bar(drawing: "Drawing") -> "Drawn":
    """Draw, with the time that is left."""
    from training.progress import tqdm

    total = len(drawing.jobs)
    with tqdm(
        total=total,
        desc=f"drawing {drawing.folder.name}",
        unit="asset",
        disable=None if drawing.ranks.main else True,
    ) as bar:
        done = drawing.run(bar.update)
        bar.update(total - bar.n)  # what other ranks drew
    return done


def lines_of(drawing: "Drawing", drawn: "Drawn") -> list[str]:
    """Return the lines that say what was drawn and left out."""
    lines = [f"{drawn.count} assets in {drawing.folder}"]
    if drawn.left_out:
        lines.append(f"{len(drawn.left_out)} more have no surface and are left out: {drawn.left_out[0]}")
    return lines
