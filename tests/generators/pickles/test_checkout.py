"""eg3d-rlhf generator convert --out=NAME.pkl, and the way back of its plain state dicts."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner

from eg3d_rlhf.core import bundled
from eg3d_rlhf.generators import load_generator, load_networks, pickles, read_description
from eg3d_rlhf.generators.state_dicts import stock_content
from eg3d_rlhf.modes import network_files
from eg3d_rlhf.modes.gan import read_network_settings
from tests.generators.pickles.eg3d_checkout import READER, write_checkout
from tests.generators.pickles.writer import RENDERING, head_generator, stock_networks
from tests.rejections import raising, rejected
from training import networks

LABEL_STD = [0.25] * 25
OPTIONS = {"class_name": "training.dataset.ImageFolderDataset", "path": "faces.zip", "resolution": 128}
AUGMENT = {"class_name": "AugmentPipe", "options": {"xflip": 1}, "p": 0.25}


def convert(*flags):
    return CliRunner().invoke(network_files.convert, [str(flag) for flag in flags])


def tuned_networks(layout="fixed"):
    """Networks as a run leaves them: G and G_ema differ, and the file of --init had a training set."""
    nets = copy.copy(stock_networks(layout))
    nets.G = copy.deepcopy(nets.G)
    nets.G.state_dict()["backbone.mapping.w_avg"].add_(1)
    nets.training_set = {"name": "x", "label_std": LABEL_STD, "options": OPTIONS, "augment": AUGMENT}
    nets.cur_nimg = 600
    return nets


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """(networks, their .safetensors file, a checkout, the pickle that was written with it)."""
    folder = tmp_path_factory.mktemp("tuned")
    nets = tuned_networks()
    networks.save(folder / "network-snapshot-000001.safetensors", nets)
    checkout = write_checkout(folder / "clone", nets)
    # the folder of a run in place of a file
    result = convert(folder, f"--out={folder / 'tuned.pkl'}", f"--eg3d={checkout}")
    assert result.exit_code == 0 and result.stderr == "", result.output
    assert sorted(path.name for path in folder.iterdir()) == [
        "clone",
        "network-snapshot-000001.safetensors",
        "tuned.pkl",
    ]
    return nets, folder / "network-snapshot-000001.safetensors", checkout, folder / "tuned.pkl"


def test_the_checkout_alone_opens_the_pickle(files, tmp_path):
    nets, _, checkout, pickle_path = files
    program = tmp_path / "reader.py"
    program.write_text(READER)
    process = subprocess.run(
        [sys.executable, "-E", str(program), str(checkout / "eg3d"), str(pickle_path)],
        capture_output=True,
        text=True,
        check=True,
    )
    facts = json.loads(process.stdout)
    assert facts["keys"] == ["training_set_kwargs", "G", "D", "G_ema", "augment_pipe"]
    assert facts["classes"] == {
        "G": "TriPlaneGenerator",
        "D": "DualDiscriminator",
        "G_ema": "TriPlaneGenerator",
        "augment_pipe": "AugmentPipe",
    }
    for name in ("G", "D", "G_ema"):
        sums = {key: float(v.double().sum()) for key, v in getattr(nets, name).state_dict().items()}
        expected = sums if name == "D" else {**sums, "dataset_label_std": sum(LABEL_STD)}
        assert facts["sums"][name] == expected
    content = stock_content(nets)
    assert facts["init_kwargs"] == {"G": content["G_kwargs"], "D": content["D_kwargs"]}
    assert facts["init_kwargs"]["G"]["rendering_kwargs"] == RENDERING and facts["easy"] == "EasyDict"
    assert facts["axes"] == nets.G_ema.renderer.plane_axes.tolist()
    assert facts["resolution"] == [8, 8] and not any(facts["training"]) and not any(facts["gradients"])
    assert facts["training_set_kwargs"] == OPTIONS and facts["p"] == 0.25
    weight = nets.G_ema.backbone.mapping.fc0.weight
    torch.testing.assert_close(torch.tensor(facts["output"]), torch.ones(1, 4) @ weight[:, :4].T)


def test_the_pickle_is_read_here_without_its_code(files):
    nets, _, _, pickle_path = files
    read = pickles.load(pickle_path)
    for name in ("G", "D", "G_ema"):
        assert networks.state_hash(getattr(read, name)) == networks.state_hash(getattr(nets, name))
    assert read.G_kwargs["plane_layout"] == "fixed" and read.G_ema.neural_rendering_resolution == 8
    assert read.training_set["label_std"] == LABEL_STD and read.training_set["augment"] == AUGMENT


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        (["--out={d}/x.pkl"], ("--eg3d", "x.pkl")),
        (["--out={d}/x.pt", "--eg3d={checkout}"], ("--eg3d", "x.pkl")),
        (["--out={d}/x.safetensors", "--eg3d-python=python"], ("--eg3d-python", "x.pkl")),
        (["--out={d}/x.pkl", "--eg3d={d}"], ("--eg3d", "training/triplane.py")),
        (["--out={d}/x.pkl", "--eg3d={d}/none"], ("--eg3d", "none")),
        (["--out={d}/x.pkl", "--eg3d={checkout}", "--only-ema"], ("--only-ema", "x.pkl")),
    ],
)
def test_flags_that_do_not_fit(files, tmp_path, flags, names):
    result = convert(files[1], *[flag.format(d=tmp_path, checkout=files[2]) for flag in flags])
    # click prints its usage before an error of a path that does not exist
    assert result.exit_code == 2 and all(name in result.stderr for name in names), result.stderr
    assert list(tmp_path.iterdir()) == []


def test_networks_that_no_checkout_can_hold(files, tmp_path):
    only_ema = tmp_path / "ema.safetensors"
    networks.save(only_ema, files[0], only_ema=True)
    for source, names in (
        (bundled.GENERATOR, ("--out", "plane_resolution = 128")),
        (only_ema, ("--out", "G")),
    ):
        result = convert(source, f"--out={tmp_path / 'x.pkl'}", f"--eg3d={files[2]}")
        assert result.exit_code == 2 and not (tmp_path / "x.pkl").exists()
        assert all(name in result.stderr for name in names), result.stderr


def interpreter(folder, text):
    """An executable that stands for a Python interpreter."""
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_interpreters_and_checkouts_that_fail(files, tmp_path):
    """Each error names its flag and the cause, and leaves no file."""
    nets, source, checkout, _ = files
    out = tmp_path / "out" / "x.pkl"
    cases = [
        # no program, a program that is no interpreter, an environment without torch
        ("--eg3d-python", "no-such-python", {"interpreter": tmp_path / "no-such-python"}),
        ("--eg3d-python", "it broke", {"interpreter": interpreter(tmp_path, "echo it broke >&2; exit 3")}),
    ]
    for flag, cause, arguments in cases:
        with raising(flag, cause):
            pickles.write(nets, out, checkout, **arguments)
        assert list(out.parent.iterdir()) == []


@pytest.mark.parametrize(
    ("file", "old", "new", "flag", "cause"),
    [
        (
            "training/triplane.py",
            "import torch",
            "import no_such_package",
            "--eg3d-python",
            "no_such_package",
        ),
        ("training/triplane.py", ", **others", "", "--eg3d", "channel_base"),
        ("G.json", "mapping.w_avg", "mapping.w_mean", "--eg3d", "w_mean"),
        ("training/triplane.py", "root.renderer.plane_axes", "root.renderer.axes", "--eg3d", "plane_axes"),
    ],
)
@pytest.mark.long
def test_checkouts_of_other_versions(files, tmp_path, file, old, new, flag, cause):
    checkout = write_checkout(tmp_path / "clone", files[0])
    path = checkout / "eg3d" / file
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    result = convert(files[1], f"--out={tmp_path / 'x.pkl'}", f"--eg3d={checkout / 'eg3d'}")
    line = result.stderr.splitlines()[-1]
    assert result.exit_code == 2 and line.startswith(f"Error: {flag}:") and cause in line
    assert [path.name for path in tmp_path.iterdir()] == ["clone"]


# The way back of plain state dicts.


@pytest.fixture(scope="module")
def state_dicts(tmp_path_factory):
    """Stock networks and the bundled generator, whose sizes EG3D does not have, as .pt files."""
    folder = tmp_path_factory.mktemp("state-dicts")
    networks.save(folder / "stock.safetensors", tuned_networks())
    for source, name in ((folder / "stock.safetensors", "stock.pt"), (bundled.GENERATOR, "bundled.pth")):
        assert convert(source, f"--out={folder / name}").exit_code == 0
    return folder


@pytest.mark.parametrize("name", ["stock.pt", "bundled.pth"])
def test_a_state_dict_is_a_network_file(state_dicts, name):
    original = load_networks(state_dicts / "stock.safetensors" if name == "stock.pt" else bundled.GENERATOR)
    path = state_dicts / name
    read = load_networks(path)
    # the bundled file has no G
    present_names = ["G", "D", "G_ema"] if original.G else ["D", "G_ema"]
    for network_name in present_names:
        assert networks.state_hash(getattr(read, network_name)) == networks.state_hash(
            getattr(original, network_name)
        )
    fields = ("G_kwargs", "D_kwargs", "training_set", "cur_nimg", "architecture")
    assert all(getattr(read, field) == getattr(original, field) for field in fields)
    assert read.G_ema.neural_rendering_resolution == original.G_ema.neural_rendering_resolution
    assert read.D.training and not read.G_ema.training
    assert load_generator(path).hash == networks.state_hash(original.G_ema)
    assert read_description(path)["networks"] == present_names


def test_a_state_dict_starts_a_run(state_dicts):
    assert read_network_settings(str(state_dicts / "stock.pt")) == read_network_settings(
        str(state_dicts / "stock.safetensors")
    )


def test_state_dicts_of_version_0_1_are_read(state_dicts, tmp_path):
    """They have no record of ours; the layout follows from the axes."""
    content = torch.load(state_dicts / "stock.pt", weights_only=True)
    del content["eg3d_rlhf"]
    torch.save(content, tmp_path / "old.pt")
    read = load_networks(tmp_path / "old.pt")
    nets = tuned_networks()
    assert networks.state_hash(read.G) == networks.state_hash(nets.G)
    assert read.G_kwargs["plane_layout"] == "fixed"


def test_other_state_dicts(tmp_path):
    for name, content in (
        ("weights.pt", {"a": torch.zeros(1)}),
        ("list.pth", [torch.zeros(1)]),
        ("axes.pt", {"G_ema": {}, "G_kwargs": {}, "training_set": {}, "plane_axes": torch.zeros(3, 3, 3)}),
    ):
        torch.save(content, tmp_path / name)
        with raising(name):
            load_networks(tmp_path / name)
    (tmp_path / "noise.pt").write_bytes(b"noise")
    with raising("noise.pt"):
        load_networks(tmp_path / "noise.pt")
    with raising("absent.pt", kind=FileNotFoundError):
        load_networks(tmp_path / "absent.pt")


def test_other_families_have_no_state_dict(tmp_path):
    G, kwargs = head_generator("spherehead")
    path = tmp_path / "head.safetensors"
    networks.save(path, networks.Networks(None, None, G, kwargs, None, {}, architecture="spherehead"))
    result = convert(path, f"--out={tmp_path / 'head.pt'}")
    assert result.exit_code == 2 and not (tmp_path / "head.pt").exists()
    assert "--out" in result.stderr and "spherehead" in result.stderr


def test_inspect_reads_state_dicts(state_dicts):
    result = CliRunner().invoke(
        network_files.inspect_network, [str(state_dicts / "stock.pt"), "--n=2", "--json"]
    )
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert set(report["networks"]) == {"G", "D", "G_ema"} and report["family"] == "eg3d"
    rejected(CliRunner().invoke(network_files.inspect_network, [str(state_dicts / "none.pt")]), "none.pt")
