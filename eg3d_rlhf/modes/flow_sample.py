"""The job `flow sample`: generates assets with the untuned generator of a WORK folder, for people to
compare.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from eg3d_rlhf.core.cli import GroupedCommand, argument, choose_device, combine_decorators, option
from eg3d_rlhf.core.device_option import DEVICE
from eg3d_rlhf.experiments.mode import running
from eg3d_rlhf.modes.shared_flags import FOLDER, rare_option
from eg3d_rlhf.tuning.flow.workspace.work_folder import BASE, SHOWN, TEST, Work

if TYPE_CHECKING:
    from eg3d_rlhf.tuning.flow.workspace.sampled_assets import AssetSampling, SamplingSummary

AGAIN = "The same command"
# Work.open reads work.json, and rejects any other folder before torch is imported.
work_argument = argument("folder", Work.open, metavar="WORK", type=FOLDER)
device_flag = option(
    "--device",
    type=DEVICE,
    default="auto",
    help="Device that runs the networks; auto selects CUDA if it is available.",
)
timeout_flag = rare_option(
    "--timeout",
    metavar="MINUTES",
    type=click.FloatRange(min=0, min_open=True),
    default=30,
    help="Longest time for which a process of torchrun waits for another process, in minutes.",
)
sampling_flags = combine_decorators(
    rare_option(
        "--cells",
        metavar="N",
        type=click.IntRange(2),
        show_default="by generator; 128 for Hunyuan3D-2.1",
        help=(
            "Number of cells per axis of the grid from which meshes are extracted. More cells give finer"
            " meshes and need more time and memory. The published program of Hunyuan3D-2.1 uses 384."
        ),
    ),
    rare_option(
        "--few-steps",
        metavar="N",
        type=click.IntRange(1),
        show_default="none; the generator's own sampler is used",
        help=(
            "Number of sampling steps without guidance, for networks that are conditioned on the step size,"
            " such as the structure stage of SAM 3D."
        ),
    ),
    timeout_flag,
)


@click.command("sample", cls=GroupedCommand)
@work_argument
@device_flag
@sampling_flags
def sample(folder: Path, device: str, cells: int | None, few_steps: int | None, timeout: float) -> None:
    """Generate assets with the untuned generator, for people to compare, and store their latents. Assets of
    the prompts of the study are not generated here: `flow study` generates them after the training.

    The same command resumes an interrupted run. Under torchrun, the processes share the assets.

    \b
    Example:
        eg3d-rlhf flow sample WORK
    """
    # Imported here, so that --help is printed without loading these modules.
    from eg3d_rlhf.modes.flow_next import next_line
    from eg3d_rlhf.tuning.flow.workspace.sampled_assets import make_sampling

    # Raises an error if the folder is no WORK, or if the files of the generator have changed since `flow
    # new`.
    work = Work.open(folder)
    family = work.check_pipeline()
    # `running` opens the process group of torchrun. If a signal stops the run, it prints how to resume.
    with running(device, timeout, AGAIN) as ranks:
        # Under torchrun, every process has its own device.
        target_device = choose_device(device) if ranks.world == 1 else ranks.device
        sampling = make_sampling(
            work, family, BASE, SHOWN, target_device, ranks, cells=cells, few_steps=few_steps
        )
        summary = sample_with_bar(sampling)
        # Only the first process prints.
        if not ranks.is_main:
            return
    for report_line in sampling_report(sampling, summary):
        click.echo(report_line)
    # A family may add a remark about its samples; the empty text means that there is none.
    if remark := family.remark(sampling.folder, work.lines(), sampling.pipeline):
        click.echo(remark)
    click.echo(f"{len(work.names(TEST))} prompts or images are kept for the study")
    click.echo(next_line(work))


def sample_with_bar(sampling: "AssetSampling") -> "SamplingSummary":
    """Generate all assets of `sampling`, divided among the ranks, with a progress bar on the first rank.

    Returns: the number of assets that can be shown, and the reasons for the others.
    """
    # imported here, because --help must not load this module
    from training.progress import tqdm

    # assets of all ranks
    asset_count = len(sampling.jobs)
    with tqdm(
        total=asset_count,
        desc=f"sampling {sampling.folder.name}",
        unit="asset",
        leave=False,  # the report of the command states the number of assets
        disable=not sampling.ranks.is_main,
    ) as progress_bar:
        sampling_summary = sampling.run(progress_bar.update)
        progress_bar.update(asset_count - progress_bar.n)  # counts the assets that other ranks generated
    return sampling_summary


def sampling_report(sampling: "AssetSampling", sampling_summary: "SamplingSummary") -> list[str]:
    """Return lines with the number of generated assets, and the number of samples that cannot be shown.

    Args:
        sampling: the sampled folder.
        sampling_summary: the summary that `sample_with_bar` returned.
    """
    report_lines = [f"{sampling_summary.count} assets in {sampling.folder}"]
    # The line quotes one reason only, because all samples mostly fail for the same reason.
    if sampling_summary.left_out:
        report_lines.append(
            f"{len(sampling_summary.left_out)} more samples have no surface and are left out:"
            f" {sampling_summary.left_out[0]}"
        )
    return report_lines
