"""Pickles of full heads: read as the family that their tensors show, refused in one line where they state what it does not know."""

import pytest
import torch
from click.testing import CliRunner

from eg3d_rlhf import generators
from eg3d_rlhf.generators import load_generator, pickles, ws_of_seeds
from eg3d_rlhf.modes import network_files
from tests.generators.pickles.hostile import heads
from tests.generators.pickles.writer import HEAD_CLASSES, SnapshotWriter, dumps, head_generator
from training import networks

FAMILIES = sorted(HEAD_CLASSES)


@pytest.fixture(scope="module")
def marker(tmp_path_factory):
    return tmp_path_factory.mktemp("executed") / "marker"


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_pickle_gives_its_family(family, protocol, marker, tmp_path, capsys):
    G, kwargs = head_generator(family)
    writer = SnapshotWriter(protocol, source=f"open({str(marker)!r}, 'w').write('executed')")
    masks = writer.persistent("MaskDualDiscriminatorV2", {"_init_kwargs": {"seg_resolution": 128}})
    path = tmp_path / "x.pkl"
    path.write_bytes(dumps({"G_ema": writer.generator(G, kwargs, torch.linspace(0, 1, 25)), "D": masks}, protocol))
    loaded = load_generator(path)
    assert loaded.generator.architecture == loaded.nets.architecture == family and type(loaded.G) is type(G)
    assert loaded.hash == networks.state_hash(G) and loaded.G.neural_rendering_resolution == 8
    assert torch.equal(loaded.G.renderer.plane_axes, G.renderer.plane_axes)
    assert "MaskDualDiscriminatorV2" in capsys.readouterr().err and loaded.nets.D is None and not marker.exists()
    ws = ws_of_seeds(loaded.generator, [1])
    points = torch.rand(20, 3) - 0.5
    assert torch.equal(loaded.generator.field(ws).density(points), generators.of(G).field(ws).density(points))
    result = CliRunner().invoke(network_files.inspect_network, [str(path), "--n=4"])
    assert result.exit_code == 0 and type(G).__name__ in result.stdout, result.output
    result = CliRunner().invoke(network_files.convert, [str(path), f"--out={tmp_path / 'x.safetensors'}"])
    assert result.exit_code == 0, result.output
    again = load_generator(tmp_path / "x.safetensors")
    assert again.hash == loaded.hash and again.generator.architecture == family


REASONS = {
    "panohead: depth 0": "rendering_kwargs.triplane_depth = 0 instead of a whole number of 1 to 64",
    "panohead: mode": "render_mode = 'Sphere' instead of 'TriPlane_SingSph_flatten'",
    "panohead: odd size": "expected a power of two >= 4, got 9",
    "spherehead: parsing": "rendering_kwargs.parsing_flag = True instead of False",
    "spherehead: class of another family": "with the tensors of spherehead",
    "hyplanehead: one flag": "expected both or neither",
    "hyplanehead: unknown argument": "the unknown constructor argument hook",
    "hyplanehead: no size": "rendering_kwargs without triplane_size",
}


def test_what_a_family_does_not_know_is_one_line_and_exit_code_2(marker, tmp_path):
    told = {}
    for name, data in heads(str(marker)):
        path = tmp_path / "x.pkl"
        path.write_bytes(data)
        result = CliRunner().invoke(network_files.convert, [str(path), f"--out={tmp_path / 'x.safetensors'}"])
        assert result.exit_code == 2 and len(result.stderr.splitlines()) == 1, (name, result.output)
        assert result.stderr.startswith(f"Error: {path}"), name
        told[name] = result.stderr
    assert len(told) > 20 and {name: why for name, why in REASONS.items() if why not in told[name]} == {}
    assert not marker.exists() and [p.name for p in tmp_path.iterdir()] == ["x.pkl"]


@pytest.mark.parametrize("family", FAMILIES)
def test_unknown_arguments_in_a_file_of_ours(family, tmp_path):
    G, kwargs = head_generator(family)
    fewer = {k: v for k, v in kwargs["rendering_kwargs"].items() if k != "triplane_size"}
    for change, word in (({"hook": 1}, "hook"), ({"rendering_kwargs": fewer}, "triplane_size")):
        path = tmp_path / "x.safetensors"
        networks.save(path, networks.Networks(None, None, G, {**kwargs, **change}, None, {}, architecture=family))
        result = CliRunner().invoke(network_files.inspect_network, [str(path)])
        assert result.exit_code == 2 and len(result.stderr.splitlines()) == 1 and word in result.stderr, result.output


def test_eg3d_is_not_taken_for_another_family():
    G, kwargs = head_generator("panohead")
    record = SnapshotWriter().generator(G, kwargs)
    del record.args[0]["state"]["_modules"]["t_mapping"]
    with pytest.raises(ValueError, match="plane_axes of no layout of eg3d"):
        pickles.plan(pickles.parse(memoryview(dumps({"G_ema": record})), "x.pkl"))
