"""The network before tuning, as runs record it."""

import json

import pytest
import torch
from click.testing import CliRunner

from eg3d_rlhf.core import bundled
from eg3d_rlhf.core.cli import file_hash
from eg3d_rlhf.experiments.network_before import network_before
from eg3d_rlhf.experiments.run import OPTIONS
from eg3d_rlhf.generators import load_generator, ws_of_seeds
from eg3d_rlhf.generators.stored_latents import LatentsFile
from eg3d_rlhf.modes import reports
from eg3d_rlhf.tuning.gan.steering import write_steered
from tests.rejections import raising, rejected
from training.steering import Steering


def write_record(folder, **record):
    folder.mkdir(parents=True)
    (folder / OPTIONS).write_text(json.dumps(record))
    return folder


@pytest.fixture
def network(tmp_path):
    path = tmp_path / "X.pkl"
    path.write_bytes(b"network")
    return path


def test_the_recorded_file(network, tmp_path):
    run = write_record(tmp_path / "run", init=str(network), hashes={"init": file_hash(network)})
    assert network_before([run]) == network_before([run / "network-snapshot-1.safetensors"]) == network
    # two runs from one network
    assert network_before([run, write_record(tmp_path / "second", init=str(network))]) == network


def test_the_bundled_generator(tmp_path):
    digest = file_hash(bundled.GENERATOR)
    records = [{}, {"init": "bundled"}, {"init": "elsewhere", "hashes": {"init": digest}}, {"lambda_r": 1.0}]
    for i, record in enumerate(records):
        assert network_before([write_record(tmp_path / str(i), **record)]) == bundled.GENERATOR
    assert network_before([]) == network_before([tmp_path / "file.safetensors"]) == bundled.GENERATOR


def test_a_round_is_compared_with_the_network_before_the_first_round(network, tmp_path):
    last = tmp_path / "last.safetensors"
    last.write_bytes(b"tuned")
    hashes = {"init": file_hash(last), "reference": file_hash(network)}
    run = write_record(tmp_path / "run", init=str(last), reference=str(network), hashes=hashes)
    assert network_before([run]) == network


def test_no_other_network_takes_its_place(network, tmp_path):
    digest = file_hash(network)
    moved = write_record(tmp_path / "moved", init=str(tmp_path / "gone.pkl"), hashes={"init": digest})
    changed = write_record(tmp_path / "changed", init=str(network), hashes={"init": "0" * 64})
    untrained = write_record(tmp_path / "untrained", init="scratch", hashes={})
    for run, names in ((moved, ("gone.pkl", digest[:12])), (changed, ("X.pkl", "000")), (untrained, ())):
        with raising("--network", str(run), *names):
            network_before([run], "--network")
    other = tmp_path / "Y.pkl"
    other.write_bytes(b"other")
    two = [write_record(tmp_path / path.stem, init=str(path), hashes={}) for path in (network, other)]
    with raising("--before", "X.pkl", "Y.pkl"):
        network_before(two)


def test_a_steered_network_is_compared_with_itself_before_steering(tiny_networks, tmp_path):
    for source, name in ((None, "bundled"), (tiny_networks, "own")):
        generator = load_generator(source)
        steering = Steering("z", generator.generator.z_dim).set_direction(
            torch.ones(generator.generator.z_dim)
        )
        write_steered(generator, steering, tmp_path / f"{name}.safetensors")
    assert network_before([tmp_path / "bundled.safetensors"]) == bundled.GENERATOR
    # the file does not state which file was steered, and the bundled generator was not
    with raising("--a", "own.safetensors"):
        network_before([tmp_path / "own.safetensors"], "--a")


def test_latents_are_compared_with_their_generator(tiny_networks, tmp_path):
    for source, before in ((None, bundled.GENERATOR), (tiny_networks, tiny_networks)):
        generator = load_generator(source)
        ws = ws_of_seeds(generator.generator, [1, 2])
        path = LatentsFile.of(generator, ws).save(tmp_path / f"{generator.hash[:8]}.safetensors")
        assert network_before([path]).samefile(before)


def test_the_figure_of_the_method_is_no_figure_of_another_generator(network, tmp_path):
    run = write_record(tmp_path / "run", init=str(network), hashes={"init": file_hash(network)})
    (run / "summary.json").write_text("{}")
    result = CliRunner().invoke(reports.method, [f"--run={run}", f"--out={tmp_path / 'x.png'}"])
    rejected(result, "--run", "X.pkl", str(run))
    assert not (tmp_path / "x.png").exists()
