"""Write folders.tar.xz: what the commands of version 0.1 (commit 52ebe99) leave on a disk, of tiny networks.

    git worktree add BASE 52ebe99
    cd BASE && PYTHONPATH=$PWD OMP_NUM_THREADS=1 python .../tests/references/version_0_1/make.py OUT

Only code of that commit is imported. The script works in OUT/made, unless that folder exists already, and
packs it into OUT/folders.tar.xz; it takes three minutes on one core. The bytes differ from one time to the
next, since databases hold times and keys. All paths in the folders are relative to OUT/made, so a test
extracts the archive and works in the folder that it extracted it to.
"""

import dataclasses
import fnmatch
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import torch
from click.testing import CliRunner

from eg3d_rlhf.modes.reward_training import train as reward_train
from eg3d_rlhf.people.label.entities import Shape
from eg3d_rlhf.rewards import train, training_run
from eg3d_rlhf.rewards.slab_network import SMALL
from tests import tiny_runs
from tests.modes.flow_works import sides_of
from tests.people.label.serving import SAME, answer
from training import networks
from training.config import GanConfig, NetworkConfig

BASE = Path.cwd()
RUN = (
    "--data=data.zip",
    "--init=network.safetensors",
    "--batch=4",
    "--nrr-initial=8",
    "--device=cpu",
    "--glr=0.002",
    "--dlr=0.002",
    "--set=ema_kimg=0.02",
    "--density-reg-every=2",
    "--gen-pose-cond=True",
    "--reward=sigma",
    "--reward-ckpt=reward/reward.safetensors",
    "--lambda-r=10",
    "--reward-shaping=reference",
    "--reward-clip=-10,10",
    "--kimg=0.016",
    "--tick=0.008",
    "--snap=0",
    "--no-summary",
)
SMALL_SHAPES = ("--set=resolution=16", "--set=level=10", "--set=triangles=200", "--set=cache=../cache")
PROMPTS = [f"{colour} {shape}" for colour in ("red", "green", "blue", "pink") for shape in ("ball", "box")]
EG3D = ("-m", "eg3d_rlhf")
LEFT_OUT = (
    "cache/*",
    "seen/*",
    "*.png",
    "*/access.jsonl",
    "access.jsonl",
    "*/state.pt",
    "*-finished/checkpoint-*",
    "*.lock",
)


def tiny_network(seed: int, density: float) -> networks.Networks:
    """Two blocks of four channels; raw density crosses the surface's level all over the cube."""
    tiny_runs.NET.update(cbase=64, cmax=4)
    G, D = tiny_runs.networks_for(NetworkConfig(**tiny_runs.NET), 32, GanConfig(**tiny_runs.GAN))
    G["rendering_kwargs"].update(depth_resolution=4, depth_resolution_importance=4)
    G["sr_kwargs"]["block_channels"] = [4, 4]
    del G["use_noise"], G["mapping_kwargs"]["lr_multiplier"]
    G.update(
        z_dim=4,
        w_dim=8,
        plane_resolution=8,
        plane_channels=4,
        decoder_hidden_dim=4,
        neural_rendering_resolution=8,
    )
    torch.manual_seed(seed)
    nets = networks.build(G, D, {"name": "tiny", "resolution": 32})
    for generator in (nets.G, nets.G_ema):
        last = generator.decoder.net[2]
        with torch.no_grad():
            last.weight[0] *= density
            last.bias[0] = -85  # the median of the raw density is near 10 then
    return nets


def run(*words: str) -> None:
    """A command of version 0.1 in a process of its own."""
    print("$", *words, flush=True)
    subprocess.run(
        [sys.executable, *words],
        check=True,
        env={**os.environ, "PYTHONPATH": str(BASE), "OMP_NUM_THREADS": "1"},
    )


def answered(
    command: tuple[str, ...], database: str, better: Callable[[Shape, Shape], bool], most: int = 10_000
) -> None:
    """Serve a page, answer its pairs through its interface, and stop it."""
    environment = {**os.environ, "PYTHONPATH": str(BASE), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    words = [sys.executable, *EG3D, *command, "--port=0"]
    print("$", *words, flush=True)
    with subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = next(line for line in process.stdout if " at http" in line)
            url = next(word for word in line.split() if word.startswith("http")).rstrip("/")
            with httpx.Client(base_url=url, headers=SAME, timeout=120) as client:
                client.headers["X-CSRF-Token"] = client.get("/api/session").json()["csrf"]
                done = 0
                while done < most:
                    given = client.get("/api/assignments?count=10").json()
                    if not given["assignments"] and not given["waiting"]:
                        break
                    time.sleep(0.5 * given["waiting"])
                    for pair in given["assignments"][: most - done]:
                        choice = "left" if better(*sides_of(database, pair["assignment"])) else "right"
                        sent = answer(
                            client, pair["assignment"], f"key-{pair['assignment']}", choice, milliseconds=2500
                        )
                        assert sent.status_code == 201, sent.text
                        done += 1
            assert done, given
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(60)


def sound(left: Shape, right: Shape) -> bool:
    """Undamaged before damaged, then the lower seed."""
    return (bool(left.degradation), left.seed) < (bool(right.degradation), right.seed)


def train_tiny_reward() -> None:
    """The command `reward train` with a network of fewer channels than any preset has."""
    arch = dataclasses.replace(
        SMALL,
        feature_maps=(2, 4),
        groups=2,
        feature_channels=2,
        recon_channels=2,
        final_cells=(2, 2, 2),
        bottleneck_cells=(2, 2, 2),
        trunk=(8, 8),
        embedding=8,
        heads=(8, 4),
    )
    chosen = dataclasses.replace(
        training_run.preset("tiny"), network=arch.to_dict(), observe={"resolution": 24}
    )
    for module in (training_run, train):
        module.preset = lambda *_: chosen  # type: ignore[attr-defined]
    flags = [
        "--labels=labels.jsonl",
        "--network=network.safetensors",
        "--preset=tiny",
        "--epochs=2",
        "--out=reward",
        "--device=cpu",
    ]
    done = CliRunner().invoke(reward_train, flags, catch_exceptions=False)
    assert done.exit_code == 0, done.output


def make() -> None:
    """All folders, in the working directory."""
    tiny_runs.COUNT = 8
    tiny_runs.write_dataset(Path("data.zip"), resolution=32)
    networks.save("network.safetensors", tiny_network(0, 100))
    networks.save("other.safetensors", tiny_network(0, 110))

    labels = "sqlite:///labels.db"
    answered(
        (
            "label",
            "--network=network.safetensors",
            "--pairs=24",
            f"--db={labels}",
            "--campaign=heads",
            *SMALL_SHAPES,
        ),
        labels,
        sound,
    )
    run(*EG3D, "label", "export", "labels.jsonl", f"--db={labels}")
    run(*EG3D, "label", "export", "judgements.jsonl", f"--db={labels}", "--kind=judgements")
    train_tiny_reward()

    run(str(BASE / "train.py"), *RUN, "--outdir=runs", "--desc=finished")
    run(str(BASE / "train.py"), *RUN, "--outdir=runs", "--desc=stopped", "--kimg=0.008")

    study = (
        "study",
        "--a=network.safetensors",
        "--b=other.safetensors",
        "--n=8",
        "--annotators=1",
        "--gold-every=0",
        "--set=resamples=200",
        "--set=psi=1",
        *SMALL_SHAPES,
        "--outdir=study",
    )
    answered(study, "sqlite:///study/study.db", sound)

    Path("prompts.txt").write_text("".join(f"{prompt}\n" for prompt in PROMPTS))
    run(
        *EG3D,
        "flow",
        "new",
        "WORK",
        "--pipeline=toy",
        "--prompts=prompts.txt",
        "--each=2",
        "--device=cpu",
        "--set=split=0.35,0.5,0.15",
    )
    run(*EG3D, "flow", "draw", "WORK", "--device=cpu")
    answered(("flow", "label", "WORK", "--set=cache=../cache"), "sqlite:///WORK/labels.db", sound)
    tune = ("--steps=2", "--batch=4", "--set=held_out_every=1", "--set=lora_rank=1", "--set=warmup=0")
    run(*EG3D, "flow", "tune", "WORK", "--device=cpu", "--stage=structure", *tune)
    stage = (
        "--pairs=WORK/pairs",
        "--stage=structure",
        "--steps=2",
        "--batch=4",
        "--lora-rank=1",
        "--table-noises=2",
    )
    run(str(BASE / "train.py"), "--mode=circular-dpo", *stage, "--device=cpu", "--outdir=stages")


def expect() -> None:
    """What version 0.1 itself reads in them."""
    Path("expected").mkdir()
    shutil.copytree("study", "seen/study")
    run(*EG3D, "study", "report", "--outdir=seen/study", "--pictures=0")
    shutil.copyfile("seen/study/report.json", "expected/study.json")
    (finished,) = Path("runs").glob("*-finished")
    run(
        *EG3D,
        "report",
        "evaluate",
        "--before=network.safetensors",
        f"--run={finished}",
        "--only=reward-shift",
        "--n=16",
        "--device=cpu",
        "--out=seen/evaluate",
    )
    shutil.copyfile("seen/evaluate/data/reward-shift.json", "expected/reward-shift.json")


def pack(made: Path, archive: Path) -> None:
    """Everything but pictures, caches and what a second checkpoint or a training state would add."""
    with tarfile.open(archive, "w:xz", preset=9) as tar:
        for path in sorted(made.rglob("*")):
            name = path.relative_to(made).as_posix()
            if path.is_file() and not any(fnmatch.fnmatch(name, left_out) for left_out in LEFT_OUT):
                entry = tar.gettarinfo(path, name)
                entry.uid = entry.gid = 0
                entry.uname = entry.gname = ""
                with path.open("rb") as file:
                    tar.addfile(entry, file)


def main() -> None:
    out = Path(sys.argv[1]).resolve()
    made = out / "made"
    if not made.is_dir():
        made.mkdir(parents=True)
        os.chdir(made)
        make()
        expect()
    pack(made, out / "folders.tar.xz")
    print(f"{out / 'folders.tar.xz'}: {(out / 'folders.tar.xz').stat().st_size} bytes")


if __name__ == "__main__":
    main()
