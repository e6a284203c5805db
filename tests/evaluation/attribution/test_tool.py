"""eg3d-rlhf report attribute from end to end: a network against itself, and rejected settings."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from eg3d_rlhf.core import bundled
from eg3d_rlhf.core.registry import VARIABLE
from eg3d_rlhf.evaluation.attribution.regions import PARTS
from eg3d_rlhf.generators import load_generator
from eg3d_rlhf.modes.reports import attribute as main
from eg3d_rlhf.rewards.ensembles import build_network
from eg3d_rlhf.rewards.observations import OBSERVATIONS
from eg3d_rlhf.rewards.reward import Reward
from training import networks

pytest.importorskip("captum", reason="captum is not installed: pip install 'eg3d-rlhf[attribution]'")
SAME = [f"--after={bundled.GENERATOR}", "--device=cpu"]


def call(*arguments):
    return CliRunner().invoke(main, [*SAME, *arguments])


def check_error(result, *names):
    """Assert exit code 2, and one error that names these; a line of progress may stand before it."""
    *progress, line = result.stderr.splitlines()
    assert result.exit_code == 2 and line.startswith("Error: ") and len(progress) <= 1, result.stderr
    assert all(name in line for name in names), line


def test_dry_run_is_json(tmp_path):
    result = json.loads(call("--dry-run", "--n=3", f"--outdir={tmp_path}").stdout)
    assert (
        result["regions"] == "people"
        and result["psi"] == 1
        and result["n"] == 3
        and result["method"] == "exact"
    )
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["--method=antithetic", "--set=permutations=5"], ["--set permutations=", "even", "5"]),
        (["--regions=none.npy"], ["--regions", "none.npy"]),
        (["--set=steps=99999"], ["steps", "99999"]),
        (["--set=step=4"], ["--set", "'step'"]),
        (["--settings=nowhere.json"], ["--settings", "nowhere.json"]),
        (["--regions=landmarks"], ["--set landmarks", "--regions=landmarks"]),
        (["--regions=people", "--set=psi=0.7"], ["--set psi", "0.7"]),
        (["--set=landmarks=none.json"], ["--set landmarks=", "none.json"]),
        (["--set=landmarks=x.json", "--regions=boxes"], ["--set landmarks", "--regions=landmarks"]),
    ],
)
def test_wrong_settings(tmp_path, arguments, names):
    check_error(call(*arguments, "--n=2", f"--outdir={tmp_path / 'out'}"), *names)


@pytest.mark.long
def test_no_change_attributes_nothing(tmp_path):
    arguments = [
        "--regions=boxes",
        "--n=2",
        "--set=randomisations=2",
        "--set=checked=1",
        f"--outdir={tmp_path}",
    ]
    result = call(*arguments)
    assert result.exit_code == 0, result.output
    data = json.loads((tmp_path / "data" / "shapley.json").read_text())["data"]
    assert {v for latent in data["values"] for v in latent} == {0.0} and data["largest_relative_gap"] == 0
    page = (tmp_path / "index.html").read_text()
    assert "srcdoc=" in page and (tmp_path / "data" / "regions.png").is_file()
    before = (tmp_path / "data" / "shapley.json").stat().st_mtime_ns
    assert call(*arguments).exit_code == 0
    assert (tmp_path / "data" / "shapley.json").stat().st_mtime_ns == before  # nothing is computed again


@pytest.fixture
def changed(tmp_path):
    """The bundled generator with another density."""
    path = tmp_path / "changed.safetensors"
    nets = networks.load(bundled.GENERATOR)
    with torch.no_grad():
        nets.G_ema.decoder.net[2].weight[0, ::2] *= 1.2
        nets.G_ema.decoder.net[2].bias[0] -= 20  # the surface moves inwards
    networks.save(path, nets)
    return path


def test_a_reward_that_reads_no_slab_is_divided_by_labels_of_its_own_shape(tmp_path, changed, monkeypatch):
    """Boxes, landmarks and the surface are places of a slab: refused by name, or left out."""
    monkeypatch.setenv(VARIABLE, str(Path(__file__).parents[2] / "rewards" / "frontal_depth.py"))
    torch.manual_seed(0)
    observation = OBSERVATIONS["frontal-depth"].from_generator(load_generator().generator)
    reward = Reward(observation, build_network("frontal-depth", {"resolution": 16})).save(
        tmp_path / "depth.safetensors"
    )
    flags = [
        f"--after={changed}",
        f"--reward-ckpt={reward}",
        "--device=cpu",
        "--n=2",
        "--set=randomisations=2",
        "--set=checked=1",
    ]
    flags.append(f"--outdir={tmp_path / 'out'}")
    boxes = CliRunner().invoke(main, [*flags, "--regions=boxes"])
    check_error(boxes, "--regions=boxes", "frontal-depth", "[16, 16]", "--regions=FILE")
    np.save(tmp_path / "halves.npy", np.repeat([[0, 1]], 8, axis=1).repeat(16, axis=0))
    (tmp_path / "halves.json").write_text('["left", "right"]')
    result = CliRunner().invoke(main, [*flags, f"--regions={tmp_path / 'halves.npy'}"])
    assert result.exit_code == 0, (result.output, result.exception)
    folder = tmp_path / "out" / "data"
    data = json.loads((folder / "shapley.json").read_text())["data"]
    assert data["names"] == ["left", "right"] and data["largest_relative_gap"] < 0.01
    assert np.sum(data["values"]) == pytest.approx(2 * data["difference"]["mean"], rel=0.02) != 0
    assert all(
        entry["complete"] for entry in json.loads((folder / "methods.json").read_text())["data"]["integrated"]
    )
    assert not (folder / "surface.json").exists()


@pytest.mark.long
def test_the_parts_of_heads_of_people_divide_the_difference(tmp_path, changed):
    arguments = [
        f"--after={changed}",
        "--device=cpu",
        "--n=2",
        "--set=randomisations=2",
        "--set=checked=1",
        f"--outdir={tmp_path / 'out'}",
    ]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    data = json.loads((tmp_path / "out" / "data" / "shapley.json").read_text())["data"]
    assert (
        data["names"] == list(PARTS)
        and np.sum(data["values"]) == pytest.approx(2 * data["difference"]["mean"], rel=1e-4) != 0
    )
    assert "back" in result.output and (tmp_path / "out" / "data" / "regions.png").is_file()
