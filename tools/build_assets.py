"""Regenerate the files of assets/, one part at a time: generator, critic, labels, rewards, control.

Every part is a run of another command of this project with fixed settings; this tool names them and copies the results into place.

\b
Example:
    python tools/build_assets.py labels --dry-run
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import _repository  # noqa: F401
import click

from eg3d_rlhf.core.cli import ASSETS, GroupedCommand, option
from training.storage import write_atomic

ROOT = Path(__file__).resolve().parents[1]
RUNS = ROOT / "runs" / "assets"
STAGES = {  # of the generator's training, each from the last one's network; every one with one thread
    "field": ("--init=scratch", "--kimg=48", "--field-kimg=48", "--tick=1", "--snap=4"),
    "colour": (
        "--start=G", "--kimg=26", "--batch=4", "--field-kimg=26", "--field-lr=0.01", "--field-soft=0", "--field-colour=12", "--ema-kimg=1",
        "--tick=1", "--snap=4",
    ),
    # a game without density regularisation, at G's full learning rate: what makes faces of the pictures and breaks the shapes
    "game": ("--start=G_ema", "--kimg=1.512", "--batch=4", "--gamma=0.05", "--glr=0.0025", "--dlr=0.002", "--density-reg=0",
             "--tick=0.25", "--snap=1"),
    # then its pictures are made right over the shapes that the game left
    "pictures": ("--start=G_ema", "--kimg=3.6", "--batch=8", "--picture-kimg=3.6", "--picture-hold=1", "--ema-kimg=0.5", "--tick=0.2",
                 "--snap=3"),
}
EARLY = {  # snapshots of the first half of a stage, whose shapes teach the shape critic
    "field": ("000004", "000008", "000012", "000020"), "game": ("000000-252", "000000-504", "000000-756"),
}
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
    """Teach a generator the field of the heads, play the GAN game on their pictures, make the pictures right; keep the last snapshot."""
    os.environ["OMP_NUM_THREADS"] = "1"
    last: Path | None = None
    for stage, flags in STAGES.items():
        init = () if last is None else (f"--init={last}",)
        call("train.py", *init, *flags, f"--outdir={RUNS}", f"--desc={stage}")
        last = sorted(newest(f"*-{stage}").glob("network-snapshot-*.safetensors"))[-1]
    assert last is not None
    shutil.copyfile(last, ASSETS / "generator.safetensors")


def critic() -> None:
    """Train the shape critic on early snapshots of the generator's stages, which are varied and are not the network that it will judge."""
    os.environ["OMP_NUM_THREADS"] = "1"
    early = [newest(f"*-{stage}") / f"network-snapshot-{tag}.safetensors" for stage, tags in EARLY.items() for tag in tags]
    call("tools/train_critic.py", "--latents=170", *(f"--fakes={path}" for path in early))


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
