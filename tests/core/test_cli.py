"""train.py from the outside: its flags, its dry run, and one line with exit code 2 for every mistake a user
can make.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import train
from eg3d_rlhf.core import bundled
from eg3d_rlhf.core.cli import choose_device
from eg3d_rlhf.modes.gan import GAN, resolve
from eg3d_rlhf.tuning.gan.reward_run import open_networks
from tests import tiny_runs
from tests.rejections import rejected

REPO = Path(__file__).parents[2]


def run(*flags: str):
    return CliRunner().invoke(train.main, [str(f) for f in flags])


def test_help_loads_no_tensors():
    """Check that --help and a wrong flag do not import torch, numpy or scipy, which takes seconds."""
    code = (
        "import sys, train\ntry:\n    train.main(sys.argv[1:])\nfinally:\n    print({'torch', 'numpy',"
        " 'scipy'} & sys.modules.keys())"
    )
    for flags in (["--help"], ["--batch=0"]):
        done = subprocess.run([sys.executable, "-c", code, *flags], capture_output=True, text=True, cwd=REPO)
        assert done.stdout.splitlines()[-1] == "set()", done.stderr
    assert "--lambda-r" in run("--help").stdout


def test_eg3d_spellings_with_underscores_mean_the_same():
    eg3d = (
        "--gen_pose_cond=False --neural_rendering_resolution_initial=32 --density_reg=0.5 --blur_fade_kimg=3"
        " --gpc_reg_prob=0.4 --sr_noise_mode=none --reg_type=monotonic-detach --decoder_lr_mul=2"
        " --disc_c_noise=0.1 --style_mixing_prob=0.1 --cbase=2048 --map-depth=3 --gpus=1 --metrics=none"
    ).split()
    ours = [flag.replace("_", "-") for flag in eg3d]
    first = run("-n", "--init=scratch", *eg3d)
    second = run("-n", "--init=scratch", *ours)
    assert first.exit_code == 0 and first.stdout == second.stdout and first.stderr == ""
    assert json.loads(first.stdout)["density_reg"] == 0.5


def test_flags_without_effect_are_named_and_those_that_differ_rejected(tmp_path):
    result = run("-n", "--workers=3", "--metrics=fid50k_full", "--nobench=True")
    (warning,) = result.stderr.splitlines()
    assert result.exit_code == 0 and "--metrics" in warning and "--nobench" in warning
    assert json.loads(result.stdout)["workers"] == 3
    rejected(run("-n", "--gpus=8"), "--gpus", "1", "8", "torchrun --nproc-per-node=8")
    for name in ("ffhq.pkl", "tuned.pt"):
        rejected(run(f"--resume={name}"), "--resume", f"--init={name}")


def test_dry_run_prints_the_settings_as_json_and_touches_nothing(tmp_path):
    result = run("-n", "--reward=sigma", "--lambda-r=3", f"--outdir={tmp_path / 'runs'}", "--desc=x")
    assert result.exit_code == 0, result.stderr
    settings = json.loads(result.stdout)
    assert list(settings) == sorted(settings)
    expected = {
        "reward": "sigma",
        "lambda_r": 3.0,
        "init": "bundled",
        "data": bundled.DATA,
        "batch": 4,
        "reward_clip": "-10,q0.55",
    }
    assert {k: settings[k] for k in expected} == expected
    filled = ("kimg", "glr", "dlr", "rlr", "gamma", "tick", "snap", "ema_kimg", "nrr_initial", "reward_ckpt")
    assert None not in [settings[k] for k in filled]
    assert not (tmp_path / "runs").exists()


def test_published_presets_keep_eg3ds_defaults():
    flags = ("-n", "--cfg=ffhq", "--data=x.zip", "--gamma=1", "--batch=16")
    settings = json.loads(run(*flags).stdout)
    expected = {
        "init": "scratch",
        "glr": 0.0025,
        "dlr": 0.002,
        "kimg": 25000,
        "cbase": 32768,
        "cmax": 512,
        "ema_kimg": 5.0,
        "blur_fade_kimg": 100.0,
        "nrr_initial": 64,
        "plane_layout": "eg3d",
        "gen_pose_cond": False,
        "tick": 4,
        "snap": 50,
    }
    assert {k: settings[k] for k in expected} == expected


MISTAKES = {  # flags -> what the line names
    "clip": (["--reward=sigma", "--reward-clip=5,1"], ["--reward-clip", "'5,1'"]),
    "gate without a clip": (
        ["--reward=sigma", "--consistency-gate=0.1", "--reward-clip=none"],
        ["--consistency-gate=0.1", "--reward-clip", "none"],
    ),
    "clip words": (["--reward=sigma", "--reward-clip=wide"], ["--reward-clip", "'wide'"]),
    "batch split": (["--batch=8", "--batch-gpu=3"], ["--batch-gpu", "--batch=8", "3"]),
    "no data": (["--cfg=ffhq", "--gamma=1", "--batch=8"], ["Error: --data: ", "--cfg=ffhq"]),
    "no gamma": (["--cfg=ffhq", "--data=x.zip", "--batch=8"], ["Error: --gamma: ", "--cfg=ffhq"]),
    "no batch": (["--cfg=ffhq", "--data=x.zip", "--gamma=1"], ["Error: --batch: ", "--cfg=ffhq"]),
    "reward from scratch": (["--reward=sigma", "--init=scratch"], ["--reward=sigma", "--init=scratch"]),
    "unconditional": (["--cond=False"], ["--cond", "True", "False"]),
    "missing data": (["--data={tmp}/missing.zip"], ["--data", "{tmp}/missing.zip", ".zip"]),
    "bad synthetic name": (["--data=synthetic:cats"], ["--data", "'synthetic:cats'", "synthetic:people"]),
    "missing control": (["--reward=sigma", "--control={tmp}/none"], ["--control", "{tmp}/none"]),
    "missing resume": (["--resume={tmp}/none"], ["--resume", "{tmp}/none"]),
    "empty resume": (["--resume={tmp}"], ["--resume", "{tmp}", "checkpoint-"]),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_in_flags(case, tmp_path):
    flags, names = MISTAKES[case]
    resumed = "--resume" in flags[0]
    result = run(
        *(f.format(tmp=tmp_path) for f in flags), *([] if resumed else [f"--outdir={tmp_path / 'runs'}"])
    )
    rejected(result, *(name.format(tmp=tmp_path) for name in names))
    assert not (tmp_path / "runs").exists()


@pytest.fixture
def attempt(tiny_data, tiny_networks, tmp_path):
    """Run the tiny set-up with flags that must fail; nothing may be left behind."""

    def go(*flags: str, **paths):
        result = run(
            *tiny_runs.train_flags(
                paths.get("data", tiny_data), paths.get("init", tiny_networks), tmp_path / "runs", *flags
            )
        )
        assert not (tmp_path / "runs").exists()
        return result

    return go


BAD_FILES = {  # what is changed of the tiny set-up -> what the line names
    "missing network": (
        lambda where, **_: {"init": where / "missing"},
        "--init: ",
        "/missing",
    ),
    "folder without networks": (
        lambda where, **_: {"init": where},
        "--init: ",
        "network-snapshot-*.safetensors",
    ),
    "truncated network": (
        lambda where, networks, **_: {
            "init": written(where / "cut.safetensors", networks.read_bytes()[:-1000])
        },
        "--init: ",
        "cut.safetensors",
    ),
    "a reward for a network": (
        lambda reward, **_: {"init": reward},
        "--init: ",
        "tiny.safetensors",
        "header",
    ),
    "no discriminator": (
        lambda where, **_: {"init": without_discriminator(where)},
        "--init: ",
        "G, D and G_ema",
    ),
    "another resolution": (
        lambda where, **_: {"data": tiny_runs.write_dataset(where / "large.zip", resolution=64)},
        "--data: ",
        "32",
        "64",
    ),
    "grey data": (
        lambda where, **_: {"data": tiny_runs.write_dataset(where / "grey.zip", mode="L")},
        "--data: ",
        "grey.zip",
        "RGB",
    ),
    "minibatch-std groups": (
        lambda **_: {"flags": ["--batch=6"]},
        "--batch: ",
        "minibatch standard deviation",
        "4",
        "6",
        "--mbstd-group",
    ),
    "groups of a part": (
        lambda **_: {"flags": ["--batch=12", "--batch-gpu=6"]},
        "--batch-gpu: ",
        "minibatch standard deviation",
        "4",
        "6",
        "--mbstd-group",
    ),
    "conditioning": (
        lambda **_: {"flags": ["--gen-pose-cond=False"]},
        "--gen-pose-cond: ",
        "False",
        "False",
    ),
    "missing reward": (
        lambda where, **_: {"flags": ["--reward=sigma", f"--reward-ckpt={where}/none.safetensors"]},
        "--reward-ckpt: ",
        "/none.safetensors",
    ),
    "missing watch": (
        lambda where, reward, **_: {
            "flags": ["--reward=sigma", f"--reward-ckpt={reward}", f"--heldout-reward={where}/none"]
        },
        "--heldout-reward: ",
        "/none",
    ),
}


def written(path, content: bytes):
    path.write_bytes(content)
    return path


def without_discriminator(where):
    tiny_runs.networks.save(where / "ema.safetensors", tiny_runs.build_networks(), only_ema=True)
    return where / "ema.safetensors"


@pytest.mark.parametrize("case", BAD_FILES)
def test_flags_of_parts_that_cannot_be_tuned_are_named(case, attempt, tiny_networks, tiny_reward, tmp_path):
    change, *names = BAD_FILES[case]
    (tmp_path / "inputs").mkdir()
    changed = change(where=tmp_path / "inputs", networks=tiny_networks, reward=tiny_reward)
    rejected(attempt(*changed.pop("flags", ()), **changed), *names)


def test_data_of_sizes_that_networks_do_not_have(tmp_path):
    odd, large = (tiny_runs.write_dataset(tmp_path / f"{size}.zip", resolution=size) for size in (40, 256))
    published = ("--cfg=ffhq", "--gamma=1", "--batch=4")
    for flags, names in (
        (("--init=scratch", f"--data={odd}"), ("resolution", "two", "40")),
        ((*published, f"--data={odd}"), ("--data: ", "512, 256, 128", "40")),
        (
            (*published, f"--data={large}", "--cbase=512", "--cmax=8", "--nrr-final=160"),
            ("--nrr-initial", "--nrr-final", "128", "160"),
        ),
    ):
        rejected(run(*flags, f"--outdir={tmp_path / 'runs'}"), *names)
        assert not (tmp_path / "runs").exists()


def test_freezing_applies_to_loaded_networks(tiny_data, tiny_networks, tmp_path):
    flags = tiny_runs.train_flags(tiny_data, tiny_networks, tmp_path, "--freezed=2")
    D = open_networks(resolve(GAN.command.make_context("train", flags).params), tiny_runs.RESOLUTION).D
    assert "b32.conv0.weight" in dict(D.named_buffers()) and "b32.conv1.weight" in dict(D.named_parameters())


def test_cuda_where_there_is_none(attempt, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    rejected(attempt("--device=cuda"), "--device: ", "CUDA", "--device=cpu")


def test_an_unknown_mode_names_those_that_are_known():
    known = ("gan", "circular-dpo", "online", "grpo", "offline", "distill")
    rejected(run("--mode=gann", "--kimg=1"), "--mode", *(f" {name}," for name in known), "'gann'")


def test_flags_of_another_mode_are_rejected_by_name():
    rejected(run("--ablate=a..i"), "--ablate", "--mode=circular-dpo")
    rejected(run("--mode=circular-dpo", "--gamma=1"), "--gamma", "--mode=gan")


def test_clicks_own_errors_exit_with_2():
    for flags in (["--lambda-r=-1"], ["--batch=0"], ["--cfg=cats"], ["--aug=some"], ["--nonsense"]):
        result = run(*flags)
        assert result.exit_code == 2 and flags[0].split("=")[0] in result.stderr


def test_flags_that_existing_networks_cannot_follow_are_named():
    assert run("-n").stderr == "" and run("-n", "--init=scratch", "--map-depth=8").stderr == ""
    (warning,) = run("-n", "--map-depth=8", "--cmax=64").stderr.splitlines()
    assert "--cmax" in warning and "--map-depth" in warning


def test_float32_on_a_gpu_is_float32(monkeypatch):
    """PyTorch's default computes convolutions in TF32, which EG3D's training switches off."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    try:
        for name in ("auto", "cuda"):
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
            assert choose_device(name).type == "cuda"
            assert not torch.backends.cuda.matmul.allow_tf32 and not torch.backends.cudnn.allow_tf32
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize(
    ("device", "words"),
    [("mps", ("mps", "--device=cpu")), ("cuda:1", ("CUDA_VISIBLE_DEVICES=1",)), ("gpu", ("--device=cuda",))],
)
def test_a_device_that_is_no_choice_is_named_with_a_remedy(device, words):
    result = CliRunner().invoke(train.main, [f"--device={device}"])
    assert result.exit_code == 2 and all(word in result.stderr for word in words)
