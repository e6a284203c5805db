"""Resume of killed inversions, which gives the same bytes; and the command line."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from eg3d_rlhf.core.spec import SlabSpec
from eg3d_rlhf.evaluation.inversion import inversion_report as report
from eg3d_rlhf.evaluation.inversion import inversion_runs as running
from eg3d_rlhf.evaluation.inversion.inversion_runs import Inversions, Setup
from eg3d_rlhf.evaluation.inversion.projector import Objective, cube_grid
from eg3d_rlhf.evaluation.inversion.targets import Evaluators, measure, parse_camera, rotated_camera
from eg3d_rlhf.experiments.run import STATS, Run
from eg3d_rlhf.generators import camera
from eg3d_rlhf.modes import inversion as invert
from eg3d_rlhf.rewards.observations import SigmaSlab
from eg3d_rlhf.rewards.reward import Reward
from tests.evaluation.inversion.conftest import CONFIG
from tests.rejections import rejected


class Killed(Exception):
    """Stands for SIGKILL."""


@pytest.fixture
def setup(loaded, perceptual, prior, cases, reward, guidance):
    def make(**change):
        return Setup(
            loaded=loaded,
            perceptual=perceptual,
            prior=prior,
            guidance=guidance,
            evaluators=Evaluators(reward=reward),
            cases=cases,
            weights=[0.0, 0.3],
            config=dataclasses.replace(CONFIG, **change),
        )

    return make


def go(folder: Path, setup: Setup) -> Inversions:
    folder.mkdir(exist_ok=True)
    with Run(folder, {}, say=lambda line: None) as run:
        inversions = Inversions(run, setup)
        inversions.run_missing()
    return inversions


def contents(folder: Path) -> dict[str, bytes]:
    """Bytes of everything that a run comes to, by name."""
    kept = [folder / STATS, *(folder / "targets").rglob("*.*")]
    return {
        str(path.relative_to(folder)): path.read_bytes() for path in kept if not path.name.startswith(".")
    }


@pytest.mark.parametrize("in_w", [False, True])
def test_killed_anywhere_it_goes_on_to_the_same_bytes(setup, cases, tmp_path, monkeypatch, in_w):
    monkeypatch.setattr(running, "EVERY", 2)
    short = setup(reward_in_w=in_w, w_steps=4, pivot_steps=3)
    short = dataclasses.replace(short, cases=cases[:1], weights=[0.3]) if in_w else short
    whole = contents(go(tmp_path / "straight", short).run.folder)
    assert {"targets/seed5/0.3.json", "targets/seed5/0.3.safetensors"} <= set(whole)
    count = [0]
    kills = [0]
    real = running.storage.write_atomic

    def write(path, data):  # every seventh time the process dies: before the file is written, or after
        count[0] += 1
        late = count[0] % 14 == 0
        if late:
            real(path, data)
        if count[0] % 7 == 0:
            kills[0] += 1
            raise Killed
        real(path, data)

    monkeypatch.setattr(running.storage, "write_atomic", write)
    for _attempt in range(30):
        try:
            go(tmp_path / "killed", short)
            break
        except Killed:
            continue
    assert kills[0] >= 2
    assert contents(tmp_path / "killed") == whole


def test_the_arms_share_the_latent_and_weight_0_is_the_run_without_a_reward(setup, tmp_path):
    both = go(tmp_path / "both", setup())
    alone = dataclasses.replace(setup(), guidance=None, weights=[0.0])
    plain = go(tmp_path / "plain", alone)
    for name in ("w.safetensors", "w.json", "0.safetensors", "0.json"):
        assert (plain.folder(plain.setup.cases[0]) / name).read_bytes() == (
            both.folder(both.setup.cases[0]) / name
        ).read_bytes()
    assert (
        sum("w" == json.loads(line)["stage"] for line in (tmp_path / "both" / STATS).read_text().splitlines())
        == 2 * CONFIG.w_steps
    )


def test_what_is_measured(setup, tmp_path):
    inversions = go(tmp_path / "run", setup())
    records = inversions.records()
    assert [(r["target"], r["arm"]) for r in records] == [
        (t, a) for t in ("seed5", "seed6") for a in ("truth", "w", "0", "0.3")
    ]
    last = records[-1]
    assert set(last) == {"target", "arm", *report.BY_NAME} - {"evaluator"} and set(records[0]) == {
        "target",
        "arm",
        "reward",
    }
    assert last["moved"] > 0 and records[1]["moved"] == 0
    summary = report.summarise(records, [0.0, 0.3])
    change = summary["measures"]["psnr"]["paired"]["0.3"]["mean"]
    assert change == pytest.approx(
        np.mean([records[3]["psnr"] - records[2]["psnr"], records[7]["psnr"] - records[6]["psnr"]])
    )
    assert "moved" in summary["measures"] and "evaluator" not in summary["measures"]


def test_the_truth_itself_has_no_error(loaded, perceptual, prior, cases, setup):
    case = cases[0]
    generator = loaded.generator
    pivot = generator.field(case.truth.ws).density_grid(cube_grid(generator))
    exact = measure(
        generator, case, case.truth.ws, pivot, Objective(CONFIG, case.target, perceptual), Evaluators()
    )
    other = measure(
        generator, case, cases[1].truth.ws, pivot, Objective(CONFIG, case.target, perceptual), Evaluators()
    )
    assert exact["moved"] == 0 < other["moved"]
    assert all(exact[name] > other[name] for name in ("psnr", "psnr_side"))
    assert all(exact[name] < other[name] for name in ("mse", "depth", "depth_side", "perceptual"))


def rows(psnrs, rewards, evaluators):
    return [
        {"target": f"t{i}", "arm": arm, "psnr": p + i, "reward": r + i, "evaluator": j + i}
        for i in range(4)
        for arm, p, r, j in zip(("0", "0.1", "1"), psnrs, rewards, evaluators, strict=True)
    ]


def test_knee_and_over_optimisation():
    result = report.summarise(rows((30, 29.8, 29), (1, 2, 3), (5, 6, 4)), [0.0, 0.1, 1.0])
    assert (result["knee"], result["reward_rises"]) == ("0.1", True)
    assert result["over_optimised"] == result["clearly_over_optimised"] == ["1"]
    result = report.summarise(rows((30, 29.6, 29.7), (1, 3, 2), (5, 5, 5)), [0.0, 0.1, 1.0])
    assert (result["knee"], result["reward_rises"], result["over_optimised"]) == ("1", False, [])


def test_cameras(generator):
    assert torch.equal(parse_camera(generator, "0.2,-0.1"), camera(generator, 0.2, -0.1))
    text = ",".join(str(v) for v in camera(generator, 0.3)[0].tolist())
    assert torch.allclose(parse_camera(generator, text), camera(generator, 0.3))
    about = rotated_camera(camera(generator), 0.4, generator.cameras.pivot)
    assert any(torch.allclose(about, camera(generator, yaw), atol=1e-5) for yaw in (0.4, -0.4))


# The tool.

SHORT = ("--set=w_steps=3", "--set=pivot_steps=2", "--device=cpu", "--set=turns=2", "--set=shape_res=16")


@pytest.fixture
def tool(tiny_networks, tiny_reward):
    def call(*flags):
        return CliRunner().invoke(
            invert.main,
            [f"--network={tiny_networks}", f"--reward-ckpt={tiny_reward}", *SHORT, *map(str, flags)],
        )

    return call


@pytest.fixture
def picture(tmp_path, cases):
    pixels = ((cases[0].target.image[0].permute(1, 2, 0) + 1) * 127.5).clamp(0, 255).byte().numpy()
    Image.fromarray(pixels).save(tmp_path / "head.png")
    return tmp_path / "head.png"


@pytest.mark.long
def test_an_image_from_start_to_page(tool, picture, tmp_path, monkeypatch):
    for name, value in {"CELL": 32, "FILM": 16, "GRID": 32, "RAYS": 16, "SAMPLES": 6}.items():
        monkeypatch.setattr(report, name, value)
    Image.new("L", (32, 32), 255).save(tmp_path / "mask.png")
    result = tool(
        f"--image={picture}",
        f"--mask={tmp_path / 'mask.png'}",
        "--camera=0.1,0",
        "--weights=0,0.5",
        f"--outdir={tmp_path}/runs",
    )
    assert result.exit_code == 0, result.output
    out = tmp_path / "runs" / "00000-inversion"
    results = json.loads((out / "inversion.json").read_text())
    assert (
        results["perceptual"].startswith("head-factors-")
        and results["perceptual"] in result.stdout
        and results["evaluator"] == "none"
    )
    assert {record["arm"] for record in results["records"]} == {
        "truth",
        "w",
        "0",
        "0.5",
    } and "psnr" in results["measures"]
    page = (out / "index.html").read_text()
    assert "data:image/png" in page and 'id="steps"' in page
    for name in ("strip.png", "orbit.mp4", "0.safetensors"):
        assert (out / "targets" / "head" / name).stat().st_size > 0
    before = contents(out)
    finished = []
    monkeypatch.setattr(invert, "finish", lambda *how: finished.append(how))
    again = CliRunner().invoke(invert.main, [f"--resume={out}"])
    assert again.exit_code == 0 and len(finished) == 1 and contents(out) == before
    rejected(CliRunner().invoke(invert.main, [f"--resume={out}", "--camera=0.2,0"]), "--camera", "--resume")
    Image.new("RGB", (32, 32)).save(picture)
    rejected(CliRunner().invoke(invert.main, [f"--resume={out}"]), "--resume", str(picture))


MISTAKES = {  # flags -> what the line names
    "no target": ([], ["--image", "--latents"]),
    "weights": (["--latents=1", "--weights=0,-1"], ["--weights", ">= 0", "-1"]),
    "latents": (["--latents=3-1"], ["--latents", "3-1"]),
    "camera": (["--latents=1", "--camera=1,2,3"], ["--camera", "25 numbers", "3"]),
    "camera file": (
        ["--latents=1", "--camera={tmp}/none.json"],
        ["--camera", "YAW,PITCH", "25 numbers", "none.json"],
    ),
    "large image": (["--image={tmp}/large.png"], ["--image", "32 x 32", "40 x 32"]),
    "empty mask": (["--image={tmp}/fit.png", "--mask={tmp}/fit.png"], ["--mask", "white"]),
    "no image": (["--image={tmp}/text.png"], ["--image", "text.png"]),
    "mask of a seed": (["--latents=1", "--mask={tmp}/fit.png"], ["--mask", "--latents"]),
    "start": (
        ["--image={tmp}/fit.png", "--set=start=truth"],
        ["--set start=", "mean", "--image", "truth"],
    ),
    "features": (
        ["--latents=1", "--set=perceptual={tmp}/text.png"],
        ["--set perceptual=", "TorchScript", "text.png"],
    ),
    "another box": (
        ["--latents=1", "--reward-ckpt={tmp}/wide.safetensors"],
        ["--reward-ckpt", "box_warp", "2.0", "1"],
    ),
    "nothing to resume": (["--resume={tmp}"], ["--resume", "{tmp}", "training_options.json"]),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_one_line_and_leave_nothing(case, tool, reward, tmp_path):
    Image.new("RGB", (40, 32)).save(tmp_path / "large.png")
    Image.new("RGB", (32, 32)).save(tmp_path / "fit.png")
    (tmp_path / "text.png").write_text("none")
    Reward(SigmaSlab(SlabSpec(resolution=24, box_warp=2.0)), reward.network).save(
        tmp_path / "wide.safetensors"
    )
    before = sorted(tmp_path.iterdir())
    flags, names = MISTAKES[case]
    more = [flag.format(tmp=tmp_path) for flag in flags]
    result = (
        CliRunner().invoke(invert.main, more)
        if case == "nothing to resume"
        else tool(f"--outdir={tmp_path / 'runs'}", *more)
    )
    rejected(result, *(name.format(tmp=tmp_path) for name in names))
    assert sorted(tmp_path.iterdir()) == before


def test_a_dry_run_says_what_would_be_done(tool, tmp_path):
    result = tool(
        "--latents=1-2", "--weights=1,0", "--preset=published", f"--outdir={tmp_path / 'runs'}", "--dry-run"
    )
    assert result.exit_code == 0, result.output
    results = json.loads(result.stdout)
    assert (
        results["weights"] == [0, 1]
        and results["config"]["w_steps"] == 3
        and not (tmp_path / "runs").exists()
    )
    assert results["config"]["fresh_rays"] is True and results["config"]["lambda_mse"] == 0.1
