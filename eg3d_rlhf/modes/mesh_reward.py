"""`train.py --mode=mesh-reward` (also `reward mesh`): trains RewardCS, the mesh reward of the paper DreamCS.

The training is reconstructed from the paper, because its code was not published. It needs unpaired labels:
a set of preferred meshes and a set of other meshes. With --seeds, four variants (arms) are trained with each
seed and compared in a table.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from eg3d_rlhf.core.cli import combine_decorators, option, options_from_settings, seeds_of
from eg3d_rlhf.experiments.mode import Flags, Mode
from eg3d_rlhf.experiments.run_record import recorded, recorded_by
from eg3d_rlhf.modes import MODES
from eg3d_rlhf.rewards.meshes.settings import MeshRewardTraining
from training.input_paths import check_label_lines
from training.progress import tqdm

if TYPE_CHECKING:
    from eg3d_rlhf.experiments.run import Run
    from eg3d_rlhf.rewards.meshes.mesh_reward_training import MeshTraining

NAME = "mesh-reward"

flags = combine_decorators(
    options_from_settings(MeshRewardTraining, checks={"data": check_label_lines}),
    option(
        "--seeds",
        group="Run",
        metavar="LIST",
        show_default="none: one training",
        help=(
            "Training seeds, separated by commas. With each seed, four rewards are trained (weight 1 and"
            " weight 0 of the divergence term, randomised labels, face areas only), and a table that compares"
            " them is printed."
        ),
    ),
)


@dataclass(frozen=True, kw_only=True)
class MeshRewardRun:
    """Settings of one training, or of a table of trainings, which has one for each arm and seed."""

    training: MeshRewardTraining
    seeds: tuple[int, ...] | None = None  # training seeds of the table; None: one training


def resolve(flags: Flags) -> MeshRewardRun:
    """Build the settings of the run from the flags.

    Raises: ValueError that names a flag with a wrong value, or flags that exclude each other.
    """
    training = MeshRewardTraining(**flags.values_for(MeshRewardTraining))
    # A table trains all arms, so a single arm must not be selected.
    if flags["seeds"] is not None and (training.randomised or training.area_only):
        raise ValueError(
            "--seeds cannot be combined with --randomised or --area-only, because its table includes both"
            " variants. Remove --seeds, or the other flag."
        )
    seeds = None if flags["seeds"] is None else seeds_of("--seeds", flags["seeds"])
    return MeshRewardRun(training=training, seeds=seeds)


def make_record(run: MeshRewardRun, opened: object) -> Mapping:
    """Return the settings of a run as the JSON that its folder records. `opened` is not used."""
    return {**run.training.to_dict(), **({} if run.seeds is None else {"table_seeds": list(run.seeds)})}


def read_record(folder: Path, flags: Flags, ranks: object) -> MeshRewardRun:
    """Read the settings that `make_record` returned from a run folder, for --resume.

    Args:
        folder: folder of the run.
        flags: not used.
        ranks: not used.

    Raises: FileNotFoundError if the folder has no record; ValueError if another mode wrote it.
    """
    record_values = read_training_options(folder)
    field_names = MeshRewardTraining.__dataclass_fields__
    # The record also holds entries of the run, such as versions, which are no settings.
    record_values = {
        name: value for name, value in record_values.items() if name in {*field_names, "table_seeds"}
    }
    seeds = record_values.pop("table_seeds", None)
    # a path, or None for generated meshes
    data_path = record_values["data"]
    return MeshRewardRun(
        # JSON stores a path as text
        training=MeshRewardTraining(**{**record_values, "data": data_path and Path(data_path)}),
        seeds=seeds and tuple(seeds),
    )


def read_training_options(folder: Path) -> dict:
    """Read training_options.json of a run folder.

    Raises: FileNotFoundError if the folder has no record; ValueError if another mode wrote it.
    """
    # an empty record if the folder is no run folder
    record_values = dict(recorded(folder))
    if not set(MeshRewardTraining.__dataclass_fields__) <= record_values.keys():
        recorded_by(folder, NAME)  # raises an error that names the mode of the folder
    return record_values


def open_training(run_settings: MeshRewardRun, run: "Run") -> "MeshTraining | None":
    """Read or generate the labelled meshes of one training, and make its network.

    Args:
        run_settings: settings of the run.
        run: the run, whose inputs are set.

    Returns: the training; None for a table, whose trainings are opened one after the other.

    Raises: ValueError or OSError for meshes that cannot be read.
    """
    # imported here, because --help must not load these modules
    import torch

    from eg3d_rlhf.rewards.meshes.mesh_reward_training import MeshTraining, open_meshes

    # With one thread, sums have a fixed order, so the same command writes the same bytes on the same machine.
    torch.set_num_threads(1)
    training_settings = run_settings.training
    # Generated meshes are computed from the seed, so they have no input file.
    run.inputs = {} if training_settings.data is None else {"data": training_settings.data}
    if run_settings.seeds is not None:
        return None
    with mesh_progress_bar(training_settings) as progress_bar:
        return MeshTraining(training_settings, open_meshes(training_settings, progress_bar.update))


def mesh_progress_bar(training_settings: MeshRewardTraining) -> tqdm:
    """Make the progress bar over the meshes that are generated or read. The total is unknown for files."""
    return tqdm(
        total=None if training_settings.data else training_settings.shapes, desc="meshes", unit="mesh"
    )


def format_summary(summary: dict[str, dict]) -> list[str]:
    """Format the table of all trainings, one line per arm.

    Args:
        summary: metrics by arm: number of trainings, mean and range of the AUC (area under the ROC curve) on
            held-out meshes, AUC by kind of defect, and divergence of the score distributions.
    """
    table_lines = []
    for arm, arm_summary in summary.items():
        # lowest and highest AUC over the training seeds
        low_auc, high_auc = arm_summary["auc_range"]
        # AUC for each kind of defect, since an average may hide a kind that is not detected
        kind_text = "  ".join(
            f"{defect_kind} {auc:.3f}" for defect_kind, auc in arm_summary["auc_by_kind"].items()
        )
        divergence_text = (
            f"divergence {arm_summary['divergence']:6.3f}, at a fixed width"
            f" {arm_summary['divergence_fixed']:6.3f}"
        )
        table_lines.append(
            f"{arm:9s}  n {arm_summary['n']}  AUC {arm_summary['auc']:.3f} ({low_auc:.3f} to {high_auc:.3f})"
            f"  {divergence_text}  {kind_text}"
        )
    return table_lines


def work(run_settings: MeshRewardRun, training: "MeshTraining | None", run: "Run") -> None:
    """Run or resume one training, or all trainings of the table, and print the metrics on held-out meshes."""
    # imported here, because --help must not load these modules
    from eg3d_rlhf.rewards.evaluation import auc_interval, too_few_shapes
    from eg3d_rlhf.rewards.meshes.mesh_reward_training import REWARD, TABLE, run_table, run_training

    # a table: `open_training` returned no single training
    if training is None:
        with mesh_progress_bar(run_settings.training) as progress_bar:
            trained_table = run_table(
                run_settings.training, run.folder, run_settings.seeds or (), progress_bar.update, tqdm.write
            )
        click.echo("\n".join([*format_summary(trained_table["summary"]), f"rows in {run.folder / TABLE}"]))
        return
    metrics = run_training(training, run)
    kind_text = "".join(f", {defect_kind} {auc:.3f}" for defect_kind, auc in metrics["auc_by_kind"].items())
    preferred_count, other_count = metrics["n"]
    # the interval follows from the AUC and the numbers of meshes (Newcombe 2006)
    lowest_auc, highest_auc = auc_interval(metrics["auc"], preferred_count, other_count)
    metrics_text = (
        f"held-out AUC {metrics['auc']:.3f}, 95 % interval {lowest_auc:.3f} to {highest_auc:.3f}"
        f" ({preferred_count} preferred, {other_count} others{kind_text})"
    )
    click.echo(f"{metrics_text}; divergence {metrics['divergence']:.3f}")
    # an empty text unless there are too few held-out meshes for a useful interval
    if warning := too_few_shapes(preferred_count, other_count):
        click.echo(warning)
    click.echo(f"saved to {run.folder / REWARD}")


MESH_REWARD = Mode(
    name=NAME,
    settings=MeshRewardRun,
    open=open_training,
    work=work,
    # the name of the data is part of the folder's name
    title=lambda run, opened: (
        f"{NAME}-{run.training.data.stem if run.training.data else run.training.source}"
    ),
    flags=flags,
    resolve=resolve,
    record=make_record,
    recorded=read_record,
    check_resume=read_training_options,
    shown=lambda run: make_record(run, None),
    # the training is deterministic on a CPU with one thread, so a GPU is not used by default
    on_cpu=lambda run: True,
    help="""Train RewardCS, the mesh reward of the paper DreamCS, on unpaired labels: on generated meshes with
    known defects, or on your own meshes.

    The command writes reward.safetensors, its description reward.json, and the metrics on held-out meshes,
    report.json. The training runs on one thread, so that the same command writes the same bytes on the same
    machine.

    \b
    Example:
        eg3d-rlhf reward mesh --shapes=60 --steps=9 --set batch=8 --set patches=8 --set faces=8 --set width=16
    """,
)
MODES.add(NAME, MESH_REWARD)
main = MESH_REWARD.command
