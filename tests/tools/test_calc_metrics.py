"""calc_metrics: FID and KID under a TorchScript detector, offline distances named as such, records, and
mistakes.
"""

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import nn

from eg3d_rlhf.generators import load_generator
from eg3d_rlhf.measures.image_metrics import MetricOptions, fake_batches
from eg3d_rlhf.modes import image_sets
from tests.tools.examples import run_example
from training.dataset import ImageFolderDataset


class Inception(nn.Module):
    """Has the interface of an Inception file for FID: uint8 images and return_features."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("weight", torch.randn(10, 48, generator=generator) / 7)

    def forward(self, images: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        pixels = nn.functional.adaptive_avg_pool2d(images.float() / 255, 4).flatten(1)
        features = torch.tanh(pixels @ self.weight.T)
        return features if return_features else features.softmax(dim=1)


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / "inception.pt"
    with torch.jit.optimized_execution(False):
        torch.jit.script(Inception()).save(str(path))
    return path


def run(*flags):
    return CliRunner().invoke(image_sets.metrics, [str(f) for f in flags])


def records(result):
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.stdout.splitlines()]


class Features(nn.Module):
    """The same detector as torchmetrics calls it."""

    num_features = 10

    def __init__(self):
        super().__init__()
        self.net = Inception()

    def forward(self, images):
        return self.net(images, return_features=True)


def as_bytes(images):
    return (images * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)


def test_fid_and_kid_equal_torchmetrics_with_the_same_detector(tiny_networks, tiny_data, inception):
    missing = "torchmetrics is not installed: pip install 'eg3d-rlhf[dev]'"
    fid_module, kid_module = (
        pytest.importorskip(f"torchmetrics.image.{name}", reason=missing) for name in ("fid", "kid")
    )
    flags = (
        f"--network={tiny_networks}",
        f"--data={tiny_data}",
        f"--inception={inception}",
        "--n=48",
        "--set=batch=8",
        "--set=seed=2",
    )
    results = {
        record["metric"]: record for record in records(run(*flags, "--metrics=fid,kid", "--set=mirror=True"))
    }
    data = ImageFolderDataset(tiny_data, c_dim=25, xflip=True)
    real = torch.from_numpy(np.stack([data[i][0] for i in range(len(data))]))
    options = MetricOptions(n=48, batch=8, seed=2)
    fake = torch.cat(
        [
            as_bytes(images)
            for images in fake_batches(load_generator(tiny_networks).generator, data.get_labels(), options)
        ]
    )
    assert fake.shape == (48, 3, 32, 32) and results["fid"]["reals"] == 48
    fid = fid_module.FrechetInceptionDistance(feature=Features(), normalize=False)
    kid = kid_module.KernelInceptionDistance(feature=Features(), subsets=1, subset_size=48, normalize=False)
    for metric in (fid, kid):
        metric.update(real, real=True)
        metric.update(fake, real=False)
    assert results["fid"]["results"]["fid"] == pytest.approx(float(fid.compute()), rel=1e-4)
    assert set(results["kid"]["results"]) == {"kid", "kid_std"}
    # subsets of all 48
    assert results["kid"]["results"]["kid"] == pytest.approx(float(kid.compute()[0]), rel=1e-4)


def test_without_inception_the_names_say_so(tiny_networks, tiny_data):
    result = run(f"--network={tiny_networks}", f"--data={tiny_data}", "--n=6", "--metrics=fid,kid")
    names = {"frechet_offline", "kernel_offline"}
    assert (
        {record["metric"] for record in records(result)} == names
        and '"fid' not in result.stdout
        and '"kid' not in result.stdout
    )
    for record in records(result):
        assert record["features"].startswith("head-factors-") and np.isfinite(
            record["results"][record["metric"]]
        )
    assert MetricOptions(metrics=("fid50k_full",)).images == 50_000


def test_the_run_folder_names_data_and_gets_the_records(tiny_networks, tiny_data, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "network-snapshot-000001.safetensors").write_bytes(tiny_networks.read_bytes())
    (folder / "training_options.json").write_text(json.dumps({"data": str(tiny_data), "mirror": True}))
    for _ in range(2):
        (record,) = records(run(f"--network={folder}", "--n=4", "--metrics=fid"))
    assert record["reals"] == 48 and record["snapshot"] == "network-snapshot-000001.safetensors"
    lines = (folder / "metric-frechet_offline.jsonl").read_text().splitlines()
    assert len(lines) == 2 and json.loads(lines[1])["results"] == record["results"]
    (record,) = records(
        run(
            f"--network={folder}",
            "--n=4",
            "--metrics=fid",
            "--set=mirror=False",
            f"--outdir={tmp_path / 'other'}",
        )
    )
    assert record["reals"] == 24 and (tmp_path / "other" / "metric-frechet_offline.jsonl").is_file()


def test_a_run_of_eg3ds_names_its_data(tiny_networks, tiny_data, tmp_path):
    (tmp_path / "network-snapshot-000001.safetensors").write_bytes(tiny_networks.read_bytes())
    theirs = {"training_set_kwargs": {"path": str(tiny_data), "xflip": True}}
    (tmp_path / "training_options.json").write_text(json.dumps(theirs))
    (settings,) = records(run(f"--network={tmp_path}", "--dry-run"))
    assert settings["data"] == str(tiny_data) and settings["mirror"] is True


def script(path):
    """A TorchScript file of another interface."""

    class Other(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images

    torch.jit.script(Other()).save(str(path))
    return path


@pytest.mark.parametrize(
    ("flags", "flag"),
    [
        (["--metrics=fid,ppl"], "--metrics"),
        (["--metrics=fid50k_full", "--n=10"], "--n"),
        (["--network={tmp}/none"], "--network"),
        (["--data={tmp}/none", "--n=4"], "--data"),
        (["--network={networks}"], "--data"),
        (["--data={data}", "--n=4"], "--data"),
        (["--inception={tmp}/none.pt", "--data={data}"], "--inception"),
        (["--inception={data}", "--data={data}"], "--inception"),
        (["--inception={other}", "--data={data}"], "--inception"),
    ],
)
def test_mistakes_end_in_one_line_that_names_the_flag(flags, flag, tiny_networks, tiny_data, tmp_path):
    paths = {
        "tmp": tmp_path,
        "networks": tiny_networks,
        "data": tiny_data,
        "other": script(tmp_path / "other.pt"),
    }
    result = run(*(text.format(**paths) for text in flags))
    assert result.exit_code == 2 and result.stderr.splitlines()[-1].startswith(f"Error: {flag}: "), (
        result.output
    )
    assert "Traceback" not in result.stderr


@pytest.mark.long
def test_example_of_the_help_runs(tmp_path):
    first, second = (json.loads(line) for line in run_example(image_sets.metrics, tmp_path).splitlines())
    assert (
        first["metric"] == "frechet_offline"
        and second["metric"] == "kernel_offline"
        and first["images"] == 64
    )
    assert 0 < first["results"]["frechet_offline"] < 1000


def test_faces_are_found_in_heads_of_people_and_not_in_noise(tiny_networks, tiny_data):
    (people,) = records(run("--data=synthetic:people64@n=12", "--metrics=faces", "--n=4"))
    assert (
        people["metric"] == "faces"
        and people["results"]["faces_reals"] >= 0.25
        and 0 <= people["results"]["faces"] <= 1
    )
    (noise,) = records(run(f"--network={tiny_networks}", f"--data={tiny_data}", "--metrics=faces", "--n=4"))
    assert noise["results"] == {"faces_reals": 0.0, "faces": 0.0}


def test_runs_repeat_and_seeds_differ(tiny_networks, tiny_data):
    flags = (f"--network={tiny_networks}", f"--data={tiny_data}", "--n=6", "--metrics=fid")
    first, again, other = (records(run(*flags, f"--set=seed={seed}"))[0]["results"] for seed in (0, 0, 1))
    assert first == again != other
