"""Train RewardCS (DreamCS, reconstructed), a reward of meshes, from unpaired labels: drawn meshes with known defects, or your own.

Writes reward.safetensors, its description reward.json, and the figures of held-out meshes, report.json. One thread: the same command
writes the same bytes on the same machine.

\b
Example:
    python tools/train_mesh_reward.py --shapes=60 --patches=8 --faces=8 --width=16 --steps=20 --batch=8 --out=runs/example/mesh-reward
"""

import json
from pathlib import Path

import _repository  # noqa: F401
import click
import torch
from tqdm import tqdm

from eg3d_rlhf.core.cli import GroupedCommand, option, options_of
from eg3d_rlhf.rewards.amounts import auc_interval, too_few_shapes
from eg3d_rlhf.rewards.meshes.train import REWARD, TABLE, TRAIN, MeshRewardTraining, run_table, run_training


def lines(summary: dict[str, dict]) -> list[str]:
    """The table, line by line."""
    made = []
    for arm, row in summary.items():
        low, high = row["auc_range"]
        kinds = "  ".join(f"{kind} {value:.3f}" for kind, value in row["auc_by_kind"].items())
        apart = f"D {row['divergence']:6.3f}, at one width {row['divergence_fixed']:6.3f}"
        made.append(f"{arm:9s}  n {row['n']}  AUC {row['auc']:.3f} ({low:.3f} to {high:.3f})  {apart}  {kinds}")
    return made


@click.command(cls=GroupedCommand, help=__doc__)
@options_of(MeshRewardTraining)
@option("--turns/--no-turns", default=True, group=TRAIN, help="Turn meshes by random quarters about the upward axis, and mirror them.")
@option("--shuffled", is_flag=True, group=TRAIN, help="A control: deal the labels anew. AUC must then be near one half.")
@option("--area-only", is_flag=True, group=TRAIN, help="A control: read areas alone. It must not see a second nose.")
@option("--table", "seeds", metavar="SEEDS", type=click.IntRange(min=1), default=None, show_default="off",
        help="Train every arm (lambda 1 and 0, shuffled, areas alone) with so many seeds and print their table; finished arms are kept.")
@option("--out", metavar="FOLDER", type=click.Path(path_type=Path, file_okay=False), default=None,
        show_default="runs/mesh-reward-<source>-s<seed>", help="Folder to write.")
@option("--resume", is_flag=True, help="Continue the run in --out.")
@option("--dry-run", is_flag=True, help="Print the resolved settings as JSON and stop.")
def main(seeds: int | None, out: Path | None, resume: bool, dry_run: bool, **settings) -> None:
    options = MeshRewardTraining(**{name: value for name, value in settings.items() if value is not None})
    out = out or Path("runs") / f"mesh-reward-{options.data.stem if options.data else options.source}-s{options.seed}"
    if seeds is not None and (options.shuffled or options.area_only or resume):
        raise ValueError("--table: expected neither --shuffled, --area-only nor --resume, got one of them. The table has its own arms.")
    if dry_run:
        click.echo(json.dumps({"out": str(out), **options.to_dict()}, indent=1))
        return
    torch.set_num_threads(1)
    with tqdm(total=None if options.data else options.shapes, desc="meshes", unit="mesh") as bar:
        if seeds is not None:
            found = run_table(options, out, seeds, bar.update, tqdm.write)
            click.echo("\n".join([*lines(found["summary"]), f"rows in {out / TABLE}"]))
            return
        report = run_training(options, out, resume, bar.update)
    if report is None:
        click.echo(f"Stopped; continue with --resume --out={out}")
        return
    kinds = "".join(f", {kind} {value:.3f}" for kind, value in report["auc_by_kind"].items())
    good, others = report["n"]
    low, high = auc_interval(report["auc"], good, others)
    figures = f"held-out AUC {report['auc']:.3f}, 95 % interval {low:.3f} to {high:.3f} ({good} preferred, {others} others{kinds})"
    click.echo(f"{figures}; D {report['divergence']:.3f}")
    if short := too_few_shapes(good, others):
        click.echo(short)
    click.echo(f"saved to {out / REWARD}")


if __name__ == "__main__":
    main()
