"""Official-format snapshots: values equal to those recorded with the original code, nothing lost on the way
to our format and back.
"""

import json
import os
import re
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import torch_utils
from eg3d_rlhf import generators
from eg3d_rlhf.generators import load_generator, pickles, ws_of_seeds
from eg3d_rlhf.generators.conversion import write
from eg3d_rlhf.generators.state_dicts import settings_unknown_to_eg3d
from eg3d_rlhf.modes import network_files
from tests.compat.absent import some
from tests.compat.reference import ROOT, Draws, relative_error, thinned
from tests.generators.pickles.hostile import heads
from tests.generators.pickles.writer import (
    HEAD_CLASSES,
    SnapshotWriter,
    dumps,
    head_generator,
    ref,
    stock_networks,
    tensor,
)
from tests.rejections import check_message, raising, rejected
from training import networks

FILES = sorted((ROOT / "eg3d_pickle").glob("snapshot_*.pkl"))
NO_SNAPSHOT = (
    "this set has no eg3d_pickle/snapshot_*.pkl: an official EG3D snapshot holds the source text of its"
    " authors; EG3D_PKL may name one"
)
USERS = [Path(os.environ["EG3D_PKL"])] if os.environ.get("EG3D_PKL") else []
BOUND = {"ws": 1e-5, "sigma": 1e-5, "image_raw": 1e-4, "image_depth": 1e-4, "image_sub": 1e-4, "logits": 1e-4}


@pytest.fixture(scope="module", params=some([pytest.param(p, id=p.stem) for p in FILES + USERS], NO_SNAPSHOT))
def loaded(request, fixtures_dir):
    """A snapshot's path and its networks."""
    return request.param, pickles.load(request.param)


def recorded(path: Path):
    """The original code's outputs beside a snapshot, and its description."""
    if not path.with_suffix(".npz").exists():
        pytest.skip(f"no recorded outputs beside {path.name}")
    return np.load(path.with_suffix(".npz")), json.loads(path.with_suffix(".json").read_text())


def outputs(G, ref, psi: float) -> dict:
    """Compute the outputs that were recorded of a generator, in the recorded way."""
    z, c, points = (torch.as_tensor(ref[k]) for k in ("z", "c", "points"))
    with torch.no_grad(), Draws(None).injected():
        ws = G.mapping(z, c, truncation_psi=psi)
        img = G.synthesis(ws, c, noise_mode="const")
        sigma = G.sample_mixed(points, None, ws, noise_mode="const")["sigma"]
    return {
        "ws": ws[:, 0],
        "sigma": sigma,
        "image_raw": img["image_raw"],
        "image_depth": img["image_depth"],
        "image_sub": thinned(img["image"], ref["image_sub"]) if "image_sub" in ref else img["image"],
        "_img": img,
        "_c": c,
    }


def test_recorded_outputs(loaded):
    path, nets = loaded
    arrays, described = recorded(path)
    compared = set()
    for name in ("G", "G_ema"):
        if f"{name}/z" not in arrays:
            continue
        expected = {k.removeprefix(f"{name}/"): arrays[k] for k in arrays if k.startswith(f"{name}/")}
        computed = outputs(getattr(nets, name).eval(), expected, described.get("truncation_psi", 0.7))
        for key in BOUND.keys() & expected.keys():
            assert relative_error(computed[key], expected[key]) <= BOUND[key], (name, key)
            compared.add(f"{name}/{key}")
        if f"D/logits_on_{name}" in arrays:
            with torch.no_grad():
                logits = nets.D.eval()(computed["_img"], computed["_c"])
            assert relative_error(logits, arrays[f"D/logits_on_{name}"]) <= BOUND["logits"]
            compared.add(f"D/logits_on_{name}")
    inputs = {k for k in arrays if k.rsplit("/", 1)[-1] in ("z", "c", "points")}
    assert compared == set(arrays) - inputs


def test_recorded_description(loaded):
    path, nets = loaded
    _, described = recorded(path)
    G = nets.G_ema
    for key in ("z_dim", "w_dim", "img_resolution", "neural_rendering_resolution", "rendering_kwargs"):
        assert getattr(G, key) == described[key], key
    assert G.renderer.plane_axes.tolist() == described["plane_axes"]
    snapshot = pickles.read(path)
    assert {k: len(pickles.tensors(v, k)) for k, v in snapshot.networks.items()} == described["num_tensors"]
    extra = 0 if nets.training_set.get("label_std") is None else 1
    assert len(G.state_dict()) + extra == described["num_tensors"]["G_ema"]
    assert nets.training_set["augment"]["p"] == described["augment"]
    assert nets.training_set["options"]["class_name"] == "training.dataset.ImageFolderDataset"


def test_to_our_format_and_back(loaded, tmp_path):
    path, nets = loaded
    out = tmp_path / "converted.safetensors"
    write(nets, out)
    assert_same(generators.load_networks(out), nets)
    assert generators.load_generator(out).hash == generators.load_generator(path).hash


def assert_same(a: networks.Networks, b: networks.Networks) -> None:
    for name in ("G", "D", "G_ema"):
        first = getattr(a, name)
        second = getattr(b, name)
        assert (first is None) == (second is None)
        if first is not None:
            assert networks.state_hash(first) == networks.state_hash(second), name
    for name in ("G", "G_ema"):
        first = getattr(a, name)
        second = getattr(b, name)
        if first is not None:
            assert first.neural_rendering_resolution == second.neural_rendering_resolution
            assert torch.equal(first.renderer.plane_axes, second.renderer.plane_axes)
            assert json.dumps(first.rendering_kwargs, sort_keys=True) == json.dumps(
                second.rendering_kwargs, sort_keys=True
            )
    assert (a.G_kwargs, a.D_kwargs, a.training_set, a.cur_nimg) == (
        b.G_kwargs,
        b.D_kwargs,
        b.training_set,
        b.cur_nimg,
    )


STD = torch.linspace(0, 1, 25)


@pytest.fixture(scope="module")
def marker(tmp_path_factory) -> Path:
    """Return the file that the source inside our snapshots would write."""
    return tmp_path_factory.mktemp("executed") / "marker"


@pytest.mark.parametrize(
    ("protocol", "numpy"),
    [
        (2, "numpy.core"),
        (3, "numpy._core"),
        (4, "numpy.core"),
        (5, "numpy._core"),
        *(
            pytest.param(protocol, numpy, marks=pytest.mark.long)
            for protocol, numpy in (
                (2, "numpy._core"),
                (3, "numpy.core"),
                (4, "numpy._core"),
                (5, "numpy.core"),
            )
        ),
    ],
)
def test_protocols_and_numpy_names(protocol, numpy, marker, tmp_path):
    nets = stock_networks("fixed" if protocol % 2 else "eg3d")
    writer = SnapshotWriter(protocol, numpy, source=f"open({str(marker)!r}, 'w').write('executed')")
    path = tmp_path / "x.pkl"
    path.write_bytes(
        writer.snapshot(
            nets, ("D", "G_ema") if protocol < 4 else ("G_ema",), STD, training_set_kwargs={"path": "a/b.zip"}
        )
    )
    reloaded = pickles.load(path)
    assert networks.state_hash(reloaded.G_ema) == networks.state_hash(nets.G_ema)
    assert reloaded.G is None and (reloaded.D is None) == (protocol >= 4)
    assert (
        reloaded.G_ema.plane_layout == nets.G_ema.plane_layout
        and reloaded.G_ema.neural_rendering_resolution == 8
    )
    assert not reloaded.G_ema.training and not any(p.requires_grad for p in reloaded.G_ema.parameters())
    assert reloaded.training_set["name"] == "b" and torch.equal(
        torch.tensor(reloaded.training_set["label_std"]), STD
    )
    assert not marker.exists()
    assert (
        pickles.read(path).protocol == protocol
        and f"{numpy}.multiarray.scalar" in pickles.read(path).name_counts
    )


def test_a_generator_by_itself_and_the_augmentation(tmp_path):
    nets = stock_networks()
    writer = SnapshotWriter()
    alone = pickles.parse(memoryview(dumps(writer.generator(nets.G_ema, nets.G_kwargs))), "alone")
    assert networks.state_hash(pickles.rebuild(alone).G_ema) == networks.state_hash(nets.G_ema)
    state = {"_buffers": {"p": tensor(torch.tensor(0.375))}, "_init_kwargs": {"xflip": 1}}
    augment = writer.persistent("AugmentPipe", state)
    snapshot = pickles.parse(memoryview(writer.snapshot(nets, ("G_ema",), augment_pipe=augment)), "augmented")
    assert pickles.rebuild(snapshot).training_set["augment"] == {
        "class_name": "AugmentPipe",
        "options": {"xflip": 1},
        "p": 0.375,
    }


def test_storages_of_another_device_or_precision():
    nets = stock_networks()
    data = SnapshotWriter(storage=ref("torch.cuda", "FloatStorage")).snapshot(nets, ("G_ema",))
    assert networks.state_hash(
        pickles.rebuild(pickles.parse(memoryview(data), "cuda")).G_ema
    ) == networks.state_hash(nets.G_ema)
    for dtype, name in ((torch.float16, "HalfStorage"), (torch.float64, "DoubleStorage")):
        value = torch.randn(3, 4).to(dtype)
        state = {"_buffers": {"x": tensor(value, ref("torch", name))}}
        content = dumps({"G_ema": SnapshotWriter().persistent("TriPlaneGenerator", state)})
        record = pickles.tensors(pickles.parse(memoryview(content), "x").networks["G_ema"], "x")["x"]
        assert torch.equal(record.tensor(), value) and record.tensor().dtype == dtype


def test_missing_unexpected_and_misshapen_names_are_listed():
    nets = stock_networks()
    writer = SnapshotWriter()
    G = writer.generator(nets.G_ema, nets.G_kwargs)
    modules = G.args[0]["state"]["_modules"]
    net = modules["decoder"].state["_modules"]["net"].state["_modules"]
    parameters = net["0"].args[0]["state"]["_parameters"]
    parameters["extra"] = parameters.pop("bias")
    parameters["weight"] = tensor(torch.zeros(3, 3))
    with raising(
        "file.pkl (G_ema)",
        "missing: decoder.net.0.bias",
        "unexpected: decoder.net.0.extra",
        "misshapen: decoder.net.0.weight",
        "[3, 3]",
        "[64, 32]",
    ):
        pickles.rebuild(pickles.parse(memoryview(dumps({"G_ema": G})), "file.pkl"))


def test_frozen_layers_of_D_are_chosen_on_loading(tmp_path):
    nets = stock_networks()
    path = tmp_path / "x.pkl"
    path.write_bytes(SnapshotWriter().snapshot(nets))
    reloaded = generators.load_networks(path, freeze_layers=2)
    assert "fromrgb.weight" in dict(reloaded.D.b128.named_buffers()) and networks.state_hash(
        reloaded.D
    ) == networks.state_hash(nets.D)
    assert (
        networks.state_hash(reloaded.G) == networks.state_hash(nets.G) != networks.state_hash(reloaded.G_ema)
    )


def test_a_run_folder_of_eg3d(tmp_path):
    nets = stock_networks()
    (tmp_path / "network-snapshot-000200.pkl").write_bytes(SnapshotWriter().snapshot(nets, ("G_ema",)))
    (tmp_path / "network-snapshot-000100.pkl").write_bytes(b"older")
    generator = generators.load_generator(tmp_path)
    assert generator.path.name == "network-snapshot-000200.pkl" and generator.hash == networks.state_hash(
        nets.G_ema
    )


def copy_params_and_buffers(src: torch.nn.Module, dst: torch.nn.Module, require_all: bool = False) -> None:
    """As a checkout of EG3D has it: by name, from one module to another."""
    named = {**dict(src.named_parameters()), **dict(src.named_buffers())}
    for name, value in [*dst.named_parameters(), *dst.named_buffers()]:
        assert name in named or not require_all, name
        if name in named:
            value.copy_(named[name].detach())


def test_the_recipe_in_the_docs(repo, tmp_path, monkeypatch):
    """Run the printed lines with a stand-in for EG3D's function: the generator is the same, with training's
    extra buffer.
    """
    nets = stock_networks("fixed")
    nets = networks.Networks(
        nets.G, nets.D, nets.G_ema, nets.G_kwargs, nets.D_kwargs, {"label_std": STD.tolist()}
    )
    assert settings_unknown_to_eg3d(nets) == []
    counts = write(nets, tmp_path / "ffhq.pt")
    assert counts["G_ema"] == len(nets.G_ema.state_dict()) + 1
    text = (repo / "docs" / "reference" / "checkpoints.md").read_text()
    (code,) = [c for c in re.findall(r"```python\n(.*?)```", text, re.S) if "copy_params_and_buffers" in c]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        torch_utils,
        "misc",
        types.SimpleNamespace(copy_params_and_buffers=copy_params_and_buffers),
        raising=False,
    )
    scope: dict = {}
    exec(code, scope)
    assert networks.state_hash(scope["G"]) == networks.state_hash(nets.G_ema)
    assert torch.equal(scope["G"].renderer.plane_axes, nets.G_ema.renderer.plane_axes)
    assert scope["G"].neural_rendering_resolution == nets.G_ema.neural_rendering_resolution
    assert torch.equal(scope["saved"]["G"]["dataset_label_std"], STD)


def test_the_fixtures_source_would_raise():
    """The tests above prove something: the embedded source is there, and raises."""
    if not FILES:
        pytest.skip(NO_SNAPSHOT)
    for path in FILES:
        assert b"raise RuntimeError" in path.read_bytes()


# Pickles of full heads are read as the family that their tensors show, and rejected in one line if they state
# options that the family does not have.


FAMILIES = sorted(HEAD_CLASSES)


@pytest.fixture(scope="module")
def touched(tmp_path_factory):
    return tmp_path_factory.mktemp("executed") / "touched"


@pytest.mark.parametrize(
    ("family", "protocol"),
    [
        pytest.param(
            family, protocol, marks=pytest.mark.long if protocol == 2 and family != "panohead" else ()
        )
        for family in FAMILIES
        for protocol in (2, 4)
    ],
)
def test_a_pickle_gives_its_family(family, protocol, touched, tmp_path, capsys):
    G, kwargs = head_generator(family)
    writer = SnapshotWriter(protocol, source=f"open({str(touched)!r}, 'w').write('executed')")
    masks = writer.persistent("MaskDualDiscriminatorV2", {"_init_kwargs": {"seg_resolution": 128}})
    path = tmp_path / "x.pkl"
    path.write_bytes(
        dumps({"G_ema": writer.generator(G, kwargs, torch.linspace(0, 1, 25)), "D": masks}, protocol)
    )
    loaded = load_generator(path)
    assert loaded.generator.architecture == loaded.nets.architecture == family and type(loaded.G) is type(G)
    assert loaded.hash == networks.state_hash(G) and loaded.G.neural_rendering_resolution == 8
    assert torch.equal(loaded.G.renderer.plane_axes, G.renderer.plane_axes)
    assert (
        "MaskDualDiscriminatorV2" in capsys.readouterr().err
        and loaded.nets.D is None
        and not touched.exists()
    )
    ws = ws_of_seeds(loaded.generator, [1])
    points = torch.rand(20, 3) - 0.5
    assert torch.equal(
        loaded.generator.field(ws).density(points), generators.as_generator(G).field(ws).density(points)
    )
    result = CliRunner().invoke(network_files.inspect_network, [str(path), "--n=4"])
    assert result.exit_code == 0 and type(G).__name__ in result.stdout, result.output
    result = CliRunner().invoke(network_files.convert, [str(path), f"--out={tmp_path / 'x.safetensors'}"])
    assert result.exit_code == 0, result.output
    again = load_generator(tmp_path / "x.safetensors")
    assert again.hash == loaded.hash and again.generator.architecture == family


REASONS = {
    "panohead: depth 0": ("triplane_depth", " 0 ", "1 to 64"),
    "panohead: mode": ("render_mode", "'Sphere'", "'TriPlane_SingSph_flatten'"),
    "panohead: odd size": (">= 4", "9"),
    "spherehead: parsing": ("parsing_flag", "True", "False"),
    "spherehead: class of another family": ("'TriPlaneSingSphGenerator_flatten'", "spherehead"),
    "hyplanehead: one flag": ("sph2cir_flag", "cir2squ_flag"),
    "hyplanehead: unknown argument": ("hook",),
    "hyplanehead: no size": ("rendering_kwargs", "triplane_size"),
}


def test_unknown_options_of_a_family_give_one_line_and_exit_code_2(touched, tmp_path):
    messages = {}
    for name, data in heads(str(touched)):
        path = tmp_path / "x.pkl"
        path.write_bytes(data)
        result = CliRunner().invoke(network_files.convert, [str(path), f"--out={tmp_path / 'x.safetensors'}"])
        messages[name] = rejected(result, str(path))
    assert len(messages) > 20
    for name, names in REASONS.items():
        check_message(messages[name], names)
    assert not touched.exists() and [p.name for p in tmp_path.iterdir()] == ["x.pkl"]


@pytest.mark.parametrize("family", FAMILIES)
def test_unknown_arguments_in_a_file_of_ours(family, tmp_path):
    G, kwargs = head_generator(family)
    fewer = {k: v for k, v in kwargs["rendering_kwargs"].items() if k != "triplane_size"}
    for change, word in (({"hook": 1}, "hook"), ({"rendering_kwargs": fewer}, "triplane_size")):
        path = tmp_path / "x.safetensors"
        networks.save(
            path, networks.Networks(None, None, G, {**kwargs, **change}, None, {}, architecture=family)
        )
        result = CliRunner().invoke(network_files.inspect_network, [str(path)])
        rejected(result, str(path), word)


def test_eg3d_is_not_taken_for_another_family():
    G, kwargs = head_generator("panohead")
    record = SnapshotWriter().generator(G, kwargs)
    del record.args[0]["state"]["_modules"]["t_mapping"]
    with raising("x.pkl", "plane_axes", "(eg3d, fixed)"):
        pickles.plan(pickles.parse(memoryview(dumps({"G_ema": record})), "x.pkl"))
