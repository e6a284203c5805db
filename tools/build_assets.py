"""Regenerate the files of assets/, one part at a time: generator, critic, labels, rewards, control.

Every part is a run of another command of this project with fixed settings; this tool names them and copies the results into place.

\b
Example:
    python tools/build_assets.py labels --dry-run
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import _repository  # noqa: F401
import click

from eg3d_rlhf.cli import ASSETS, GroupedCommand, option
from eg3d_rlhf.evaluation.comparison import snapshots
from training.storage import write_atomic

ROOT = Path(__file__).resolve().parents[1]
GENERATOR_KIMG = 18  # stopped early on purpose: heads, hair and eyes stand, their shapes are split, dented and rough
RUNS = ROOT / "runs" / "assets"
EARLY = (0.125, 0.25, 0.375, 0.5)  # shares of the generator's images at which its shapes teach the shape critic
WATCH_LABELS = RUNS / "labels-watch.jsonl"
WATCH_SEEDS = 20000  # first of the seeds that the second reward learns from


def call(*command: str) -> None:
    """Run a command of the project and print it first.

    Raises: ValueError where it fails.
    """
    print("$ python " + " ".join(command), flush=True)
    code = subprocess.call([sys.executable, *command], cwd=ROOT)
    if code:
        raise ValueError(f"build_assets: expected `python {command[0]}` to succeed, got exit code {code}. Its message stands above.")


def newest(pattern: str) -> Path:
    """The newest folder under runs/assets that matches."""
    return sorted(RUNS.glob(pattern))[-1]


def generator() -> None:
    """Train the GAN from scratch on synthetic heads and keep its last snapshot."""
    call("train.py", "--init=scratch", f"--kimg={GENERATOR_KIMG}", f"--outdir={RUNS}", "--desc=generator")
    snapshot = sorted(newest("*-generator").glob("network-snapshot-*.safetensors"))[-1]
    shutil.copyfile(snapshot, ASSETS / "generator.safetensors")


def early_snapshots(run: Path) -> list[Path]:
    """The snapshots of a run nearest to an eighth, a quarter, three eighths and half of its images, none later than half.

    Raises: ValueError where there is none.
    """
    found = snapshots(run)
    half = [(kimg, path) for kimg, path in found if 0 < kimg <= found[-1][0] / 2]
    if not half:
        raise ValueError(f"build_assets: expected snapshots from the first half of {run.name}, got none. Train it with a smaller --snap.")
    nearest = (min(half, key=lambda one: abs(one[0] - share * found[-1][0])) for share in EARLY)
    return list(dict.fromkeys(path for _, path in nearest))


def critic() -> None:
    """Train the shape critic on early snapshots of the generator's run, which are varied and are not the network that it will judge."""
    call("tools/train_critic.py", *(f"--fakes={path}" for path in early_snapshots(newest("*-generator"))))


def labels() -> None:
    """Label 2,000 pairs of the bundled generator's seeds, and 2,000 of others; the annotator is calibrated on the first 512 of each."""
    call("tools/label_synthetic.py", f"--out={ASSETS / 'labels.jsonl'}", "--pairs=2000", "--calibrate=512")
    call("tools/label_synthetic.py", f"--out={WATCH_LABELS}", "--pairs=2000", "--calibrate=512", f"--first-seed={WATCH_SEEDS}", "--seed=1")


def rewards() -> None:
    """Train the reward, and a second one from other labels and another initialisation that only watches."""
    for name, seed, source in (("reward", 0, ASSETS / "labels.jsonl"), ("reward-watch", 1, WATCH_LABELS)):
        out = RUNS / name
        shutil.rmtree(out, ignore_errors=True)
        given = (f"--labels={source}", f"--seed={seed}", f"--split-seed={seed}", f"--out={out}", f"--cache={RUNS / 'slabs'}")
        call("tools/train_reward.py", *given)
        for suffix in (".safetensors", ".json"):
            shutil.copyfile(out / f"reward{suffix}", ASSETS / f"{name}{suffix}")


def control() -> None:
    """Run the demo with lambda_r = 0 and keep its summary, and the settings that other runs are compared with."""
    call("train.py", "--reward=sigma", "--lambda-r=0", f"--outdir={RUNS}", "--desc=control")
    record, settings = (json.loads((newest("*-control") / name).read_text()) for name in ("summary.json", "training_options.json"))
    of_machine = ("reward_ckpt", "reward_watch", "versions", "launch")
    record["settings"] = {name: value for name, value in settings.items() if name not in of_machine}
    write_atomic(ASSETS / "control-summary.json", (json.dumps(record, indent=1, sort_keys=True) + "\n").encode())


PARTS = {"generator": generator, "critic": critic, "labels": labels, "rewards": rewards, "control": control}


@click.command(cls=GroupedCommand, help=__doc__)
@click.argument("part", type=click.Choice(list(PARTS)))
@option("--dry-run", is_flag=True, help="Say what would be done and stop.")
def main(part: str, dry_run: bool) -> None:
    if dry_run:
        click.echo(PARTS[part].__doc__)
        return
    RUNS.mkdir(parents=True, exist_ok=True)
    PARTS[part]()


if __name__ == "__main__":
    main()
