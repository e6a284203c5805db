"""eg3d-rlhf generator inspect and convert from the outside, and `.pkl` wherever a network is named."""

import json

import pytest
import torch
from click.testing import CliRunner

import train
from eg3d_rlhf import generators
from eg3d_rlhf.core import bundled
from eg3d_rlhf.core.cli import file_hash
from eg3d_rlhf.modes import network_files
from tests import tiny_runs
from tests.generators.pickles.hostile import calls
from tests.generators.pickles.writer import SnapshotWriter, stock_networks
from tests.rejections import rejected
from tests.tools.examples import run_example
from training import networks


def run(tool, *args):
    return CliRunner().invoke(tool, [str(a) for a in args])


@pytest.fixture(scope="module")
def pkl(tmp_path_factory):
    """A snapshot with all three networks."""
    path = tmp_path_factory.mktemp("pkl") / "network-snapshot-000100.pkl"
    path.write_bytes(SnapshotWriter().snapshot(stock_networks(), label_std=torch.linspace(0, 1, 25)))
    return path


@pytest.mark.parametrize(
    "tool", [network_files.convert, network_files.inspect_network], ids=lambda command: command.name
)
def test_the_example_in_the_help_runs(tool, repo, tmp_path):
    (tmp_path / "assets").symlink_to(repo / "assets")
    assert run_example(tool, tmp_path)


def test_inspect_a_pickle(pkl):
    result = run(network_files.inspect_network, pkl, "--json", "--n=16")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    nets = stock_networks()
    assert (
        report["sha256"] == file_hash(pkl)
        and report["bytes"] == pkl.stat().st_size
        and report["protocol"] == 4
    )
    assert (
        report["globals"]["torch.storage._load_from_bytes"] >= 1 and "torch.FloatStorage" in report["globals"]
    )
    assert report["networks"]["G_ema"]["hash"] == networks.state_hash(nets.G_ema) and set(
        report["networks"]
    ) == {"G", "D", "G_ema"}
    elements = sum(v.numel() for v in nets.G.state_dict().values())
    assert report["networks"]["G"]["parameters"] + report["networks"]["G"]["buffers"] == elements
    assert report["generator"]["planes"] == {"layout": "eg3d", "resolution": 256, "channels": 32}
    assert (
        report["generator"]["superresolution"] == "SuperresolutionHybrid2X"
        and report["generator"]["neural_rendering_resolution"] == 8
    )
    w_avg = nets.G_ema.backbone.mapping.w_avg
    assert report["psi"]["w_avg_norm"] == pytest.approx(float(w_avg.norm()))
    ws = generators.ws_of_seeds(nets.G_ema, range(16))[:, 0]
    assert report["psi"]["distance_mean"] == pytest.approx(float((ws - w_avg).norm(dim=1).mean()))


def test_inspect_our_file_and_a_run_folder(tmp_path):
    (tmp_path / "network-snapshot-000001.safetensors").write_bytes(bundled.GENERATOR.read_bytes())
    for source in (bundled.GENERATOR, tmp_path):
        result = run(network_files.inspect_network, source, "--n=4")
        assert result.exit_code == 0, result.output
        assert f"sha256: {file_hash(bundled.GENERATOR)}" in result.stdout and "layout: fixed" in result.stdout
        assert "w_avg_norm" in result.stdout and "globals" not in result.stdout


def test_inspecting_a_hostile_file_lists_the_names_it_refers_to(tmp_path):
    path = tmp_path / "x.pkl"
    path.write_bytes(dict(calls(str(tmp_path / "marker")))["os.system, protocol 4"])
    result = run(network_files.inspect_network, path)
    rejected(result, str(path), "os.system")
    assert not (tmp_path / "marker").exists()


def test_convert_a_pickle(pkl, tmp_path):
    for name, extra in (("a.safetensors", ["--only-ema"]), ("b.pt", [])):
        result = run(network_files.convert, pkl, f"--out={tmp_path / name}", *extra)
        assert result.exit_code == 0 and name in result.stdout and result.stderr == "", result.output
    nets = stock_networks()
    alone = networks.load(tmp_path / "a.safetensors")
    assert (
        networks.state_hash(alone.G_ema) == networks.state_hash(nets.G_ema)
        and alone.G is None
        and alone.D is None
    )
    saved = torch.load(tmp_path / "b.pt", weights_only=True)
    assert (
        set(saved["G"]) == {*nets.G.state_dict(), "dataset_label_std"}
        and "plane_layout" not in saved["G_kwargs"]
    )


@pytest.mark.parametrize(
    ("args", "names"),
    [
        (["{pkl}", "--out=x.bin"], ("--out", "x.bin")),
        (["{pkl}", "--out={pkl}/../there.safetensors"], ("--out", "there.safetensors")),
        (["missing.pkl", "--out=x.pt"], ("missing.pkl",)),
    ],
)
def test_convert_mistakes(args, names, pkl, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (pkl.parent / "there.safetensors").touch()
    result = run(network_files.convert, *[a.format(pkl=pkl).replace(f"{pkl.name}/../", "") for a in args])
    rejected(result, *names)
    assert list(tmp_path.iterdir()) == []


def test_convert_warns_where_a_checkout_cannot_follow(tmp_path):
    result = run(network_files.convert, bundled.GENERATOR, f"--out={tmp_path / 'x.pt'}")
    assert result.exit_code == 0 and "plane_resolution = 128" in result.stderr


def test_a_pickle_as_the_start_of_training(pkl, tmp_path):
    """--init=X.pkl gets as far as comparing the data with the networks."""
    data = tiny_runs.write_dataset(tmp_path / "tiny.zip")
    result = CliRunner().invoke(
        train.main,
        [
            f"--init={pkl}",
            f"--data={data}",
            "--cfg=ffhq",
            "--gamma=1",
            "--batch=4",
            f"--outdir={tmp_path / 'runs'}",
        ],
    )
    rejected(result, "--data", "--init", "128", "32")
