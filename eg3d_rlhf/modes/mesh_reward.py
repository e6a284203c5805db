"""`train.py --mode=mesh-reward`: trains RewardCS, the mesh reward of DreamCS (reconstructed), on unpaired
labels.

With --seeds it trains all arms and prints their table.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from eg3d_rlhf.core.cli import option, options_of, seeds_of, together
from eg3d_rlhf.experiments.mode import Flags, Mode
from eg3d_rlhf.modes import MODES
from eg3d_rlhf.rewards.meshes.settings import MeshRewardTraining
from training.progress import tqdm

if TYPE_CHECKING:
    from eg3d_rlhf.experiments.run import Run
    from eg3d_rlhf.rewards.meshes.mesh_reward_training import MeshTraining

NAME = "mesh-reward"

flags = together(
    options_of(MeshRewardTraining),
    option(
        "--seeds",
        group="Run",
        metavar="LIST",
        show_default="none: one training",
        help=(
            "Train every arm (lambda 1, lambda 0, randomised labels, face areas only) with these seeds and"
            " print a table."
        ),
    ),
)


@dataclass(frozen=True, kw_only=True)
class MeshRewardRun:
    """Settings of one training, or of the table of arms x seeds."""

    training: MeshRewardTraining
    seeds: tuple[int, ...] | None = None  # training seeds of the table; None: one training


def resolve(flags: Flags) -> MeshRewardRun:
    """Build the settings of the run from the flags. Raises: ValueError naming a flag that does not fit."""
    training = MeshRewardTraining(**flags.of(MeshRewardTraining))
    if flags["seeds"] is not None and (training.randomised or training.area_only):
        raise ValueError(
            "--seeds cannot be combined with randomised or area_only: the table includes these arms."
            " Remove one of them."
        )
    seeds = None if flags["seeds"] is None else seeds_of("--seeds", flags["seeds"])
    return MeshRewardRun(training=training, seeds=seeds)


def record(run: MeshRewardRun, opened: object) -> Mapping:
    """Return the settings as a run folder records them."""
    return {**run.training.to_dict(), **({} if run.seeds is None else {"table_seeds": list(run.seeds)})}


def read_record(folder: Path, flags: Flags, ranks: object) -> MeshRewardRun:
    """Read the settings that `record` wrote. Raises: FileNotFoundError; ValueError for the folder of another
    mode.
    """
    from eg3d_rlhf.experiments.run import recorded, recorded_by

    # an empty record if the folder is no run
    values = dict(recorded(folder))
    names = MeshRewardTraining.__dataclass_fields__
    if not set(names) <= values.keys():
        recorded_by(folder, NAME)  # raises an error that names the folder's mode
    values = {name: value for name, value in values.items() if name in {*names, "table_seeds"}}
    seeds = values.pop("table_seeds", None)
    # a path, or None for generated meshes
    data = values["data"]
    return MeshRewardRun(
        training=MeshRewardTraining(**{**values, "data": data and Path(data)}), seeds=seeds and tuple(seeds)
    )


def open_training(run_settings: MeshRewardRun, run: "Run") -> "MeshTraining | None":
    """Open the data and the network of a training; None for the table. Raises: ValueError, OSError."""
    import torch

    from eg3d_rlhf.rewards.meshes.mesh_reward_training import MeshTraining, meshes_of

    torch.set_num_threads(1)  # sums then have a fixed order, so the same machine writes the same bytes
    options = run_settings.training
    # generated meshes follow from the seed and need no file
    run.inputs = {} if options.data is None else {"data": options.data}
    if run_settings.seeds is not None:
        return None
    with bar(options) as shapes:
        return MeshTraining(options, meshes_of(options, shapes.update))


def bar(options: MeshRewardTraining) -> tqdm:
    """Make the progress bar over the meshes that are generated or read."""
    return tqdm(total=None if options.data else options.shapes, desc="meshes", unit="mesh")


def lines(summary: dict[str, dict]) -> list[str]:
    """Format the table, one line per arm."""
    rows = []
    for arm, row in summary.items():
        # lowest and highest over the training seeds
        low, high = row["auc_range"]
        kinds = "  ".join(f"{kind} {value:.3f}" for kind, value in row["auc_by_kind"].items())
        apart = f"divergence {row['divergence']:6.3f}, at a fixed width {row['divergence_fixed']:6.3f}"
        rows.append(
            f"{arm:9s}  n {row['n']}  AUC {row['auc']:.3f} ({low:.3f} to {high:.3f})  {apart}  {kinds}"
        )
    return rows


def work(run_settings: MeshRewardRun, training: "MeshTraining | None", run: "Run") -> None:
    """Run, or resume, the training or the table, and print the result."""
    from eg3d_rlhf.rewards.evaluation import auc_interval, too_few_shapes
    from eg3d_rlhf.rewards.meshes.mesh_reward_training import REWARD, TABLE, run_table, run_training

    # the table
    if training is None:
        with bar(run_settings.training) as shapes:
            made = run_table(
                run_settings.training, run.folder, run_settings.seeds or (), shapes.update, tqdm.write
            )
        click.echo("\n".join([*lines(made["summary"]), f"rows in {run.folder / TABLE}"]))
        return
    report = run_training(training, run)
    kinds = "".join(f", {kind} {value:.3f}" for kind, value in report["auc_by_kind"].items())
    good, others = report["n"]
    low, high = auc_interval(report["auc"], good, others)
    figures = (
        f"held-out AUC {report['auc']:.3f}, 95 % interval {low:.3f} to {high:.3f} ({good} preferred, {others}"
        f" others{kinds})"
    )
    click.echo(f"{figures}; divergence {report['divergence']:.3f}")
    # too few held-out meshes for a useful interval
    if short := too_few_shapes(good, others):
        click.echo(short)
    click.echo(f"saved to {run.folder / REWARD}")


MESH_REWARD = Mode(
    name=NAME,
    settings=MeshRewardRun,
    open=open_training,
    work=work,
    title=lambda run, opened: (
        f"{NAME}-{run.training.data.stem if run.training.data else run.training.source}"
    ),
    flags=flags,
    resolve=resolve,
    record=record,
    recorded=read_record,
    shown=lambda run: record(run, None),
    on_cpu=lambda run: True,
    help="""Train RewardCS (DreamCS, reconstructed), a mesh reward, on unpaired labels: generated meshes
    with known defects, or your own meshes.

    Writes reward.safetensors, its description reward.json, and the metrics on held-out meshes, report.json.
    It runs on one thread, so that the same command writes the same bytes on the same machine.

    \b
    Example:
        eg3d-rlhf reward mesh --shapes=60 --steps=9 --set batch=8 --set patches=8 --set faces=8 --set width=16
    """,
)
MODES.add(NAME, MESH_REWARD)
main = MESH_REWARD.command
