"""Make the files of assets/ that other jobs of the project produce: python -m builders.build PART"""

import json
import os
import shutil
import subprocess
import sys

import click
import torch

from eg3d_rlhf.core.cli import ASSETS, GroupedCommand, option
from training.heads import people
from training.storage import write_atomic

ROOT = ASSETS.parent
RUNS = ROOT / "runs" / "assets"
HELDOUT_LABELS = RUNS / "labels-heldout.jsonl"
HELDOUT_SEEDS = 20000  # seed of the first latent that is labelled for the held-out reward


def run(*commands: tuple[str, ...], **environment: str) -> None:
    """Print commands of eg3d-rlhf and run them at the same time.

    Args:
        commands: arguments of each command.
        environment: environment variables that are added for all commands.
    Raises: ValueError if a command fails.
    """
    processes = []
    for command in commands:
        print("$ eg3d-rlhf " + " ".join(command), flush=True)
        processes.append(
            subprocess.Popen(
                [sys.executable, "-m", "eg3d_rlhf", *command], cwd=ROOT, env={**os.environ, **environment}
            )
        )
    exit_codes = [process.wait() for process in processes]
    for command, exit_code in zip(commands, exit_codes, strict=True):
        if exit_code:
            raise ValueError(
                f"the command `eg3d-rlhf {' '.join(command)}` failed with exit code {exit_code}. Correct the"
                " cause that its message above states."
            )


def build_labels() -> None:
    """Label 2,000 pairs of the bundled generator, and 1,120 pairs of other seeds for the held-out reward.

    The two commands run at the same time, with one thread each.
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
    """Train the bundled reward and the held-out reward.

    The held-out reward is trained on other labels, from another initialisation. It is only monitored during
    tuning. The two trainings run at the same time, with one thread each.
    """
    commands = []
    for name, seed, labels_path in (
        ("reward", 0, ASSETS / "labels.jsonl"),
        ("reward-heldout", 1, HELDOUT_LABELS),
    ):
        shutil.rmtree(RUNS / name, ignore_errors=True)
        flags = (
            f"--labels={labels_path}",
            f"--seed={seed}",
            f"--set=split_seed={seed}",
            f"--run-dir={RUNS / name}",
            f"--cache={RUNS / name}-slabs",
        )
        commands.append(("reward", "train", *flags))
    run(*commands, OMP_NUM_THREADS="1")
    for name in ("reward", "reward-heldout"):
        for suffix in (".safetensors", ".json"):
            shutil.copyfile(RUNS / name / f"reward{suffix}", ASSETS / f"{name}{suffix}")


def build_control() -> None:
    """Run the demo with lambda_r = 0 as a control, and store its summary and settings in assets/."""
    run(("train", "--reward=sigma", "--lambda-r=0", f"--outdir={RUNS}", "--desc=control"))
    # Names of runs begin with an increasing number, so the largest name is the newest run.
    newest_run = max(RUNS.glob("*-control"))
    run_summary, run_settings = (
        json.loads((newest_run / name).read_text()) for name in ("summary.json", "training_options.json")
    )
    # Settings with paths and versions of this machine are left out.
    machine_settings = ("reward_ckpt", "heldout_reward", "versions", "launch")
    run_summary["settings"] = {
        name: value for name, value in run_settings.items() if name not in machine_settings
    }
    write_atomic(
        ASSETS / "control-summary.json", (json.dumps(run_summary, indent=1, sort_keys=True) + "\n").encode()
    )


def build_people() -> None:
    """Make the bundled generator of heads.

    The linear basis of heads is computed with the package anny, distances and colours of heads are computed
    at random points, and the generator and its discriminator are trained.
    """
    from builders import people as people_builder
    from builders import people_basis

    torch.set_num_threads(1)
    basis_description = people_basis.write(people.ASSET)
    print(
        f"basis: {basis_description['vertices']} vertices; median and 95 % quantile of the distance between"
        f" sampled and reconstructed vertices of heads: {basis_description['error_voxels']} voxels",
        flush=True,
    )
    # The basis was replaced, so a basis that was loaded before must not be used.
    people.load_basis.cache_clear()
    network_path = people_builder.make_generator(RUNS / "people", people_builder.RECIPES[3])
    shutil.copyfile(network_path, ASSETS / "generator.safetensors")


PARTS = {
    "people": build_people,
    "labels": build_labels,
    "rewards": build_rewards,
    "control": build_control,
}


@click.command("python -m builders.build", cls=GroupedCommand)
@click.argument("part", type=click.Choice(list(PARTS)))
@option("-n", "--dry-run", is_flag=True, help="Print a description of the part, and stop without making it.")
def build(part: str, dry_run: bool) -> None:
    """Make the files of one part of assets/ again. PART is people, labels, rewards or control.

    The part people trains the bundled generator of heads. The other parts run commands of eg3d-rlhf with
    fixed settings and copy their results to assets/.

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
