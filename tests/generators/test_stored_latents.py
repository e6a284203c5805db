"""A file of latents is a generator: its shapes are those of its style vectors, whatever the truncation."""

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from eg3d_rlhf.core.seeds import LATENTS
from eg3d_rlhf.core.spec import SlabSpec
from eg3d_rlhf.generators import load_generator, read_description, ws_of_seeds
from eg3d_rlhf.generators.stored_latents import LatentsFile, load_stored, load_stored_generator
from eg3d_rlhf.modes.jobs import main
from eg3d_rlhf.people.study.planning import common_shapes
from eg3d_rlhf.rewards.reward import check_reward, load_reward
from tests import tiny_runs
from tests.rejections import raising, rejected
from training import networks

SEEDS = (7, 3, 11)


@pytest.fixture(scope="module")
def loaded(tiny_networks):
    return load_generator(tiny_networks)


@pytest.fixture(scope="module")
def moved_ws(loaded):
    """Style vectors that no seed gives: one offset for all layers."""
    ws = ws_of_seeds(loaded.generator, SEEDS)
    return ws + torch.linspace(-0.2, 0.2, ws.shape[2])


@pytest.fixture(scope="module")
def latents_file(loaded, moved_ws, tmp_path_factory):
    path = tmp_path_factory.mktemp("latents") / "improved.safetensors"
    return LatentsFile.of(loaded, moved_ws, SEEDS, psi=0.8, facts={"steps": 3}).save(path)


@pytest.fixture(scope="module")
def other_network(tmp_path_factory):
    path = tmp_path_factory.mktemp("other") / "other.safetensors"
    networks.save(path, tiny_runs.build_networks(seed=5))
    return path


def test_the_file_comes_back(latents_file, moved_ws, loaded):
    stored, owner = load_stored(latents_file)
    assert torch.equal(stored.ws, moved_ws) and tuple(stored.seeds) == SEEDS
    assert (stored.psi, stored.facts, stored.generator) == (0.8, {"steps": 3}, loaded.hash)
    assert owner.hash == loaded.hash


def test_seeds_are_the_latents_in_order_under_any_truncation(latents_file, moved_ws, loaded):
    stored = load_generator(latents_file)
    spec = SlabSpec(resolution=16)
    for psi in (1.0, 0.3):
        assert torch.equal(ws_of_seeds(stored.generator, [2, 0], psi), moved_ws[[2, 0]])
    with torch.no_grad():
        grid = stored.generator.field(ws_of_seeds(stored.generator, [1])).density_grid(spec)
        assert torch.equal(grid, loaded.generator.field(moved_ws[[1]]).density_grid(spec))
    assert stored.generator.bounds == loaded.generator.bounds
    assert stored.generator.level == loaded.generator.level
    with raising("seeds", "3"):
        ws_of_seeds(stored.generator, [3])


def test_its_hash_is_neither_the_generators_nor_that_of_other_latents(
    latents_file, loaded, moved_ws, tmp_path
):
    other = LatentsFile.of(loaded, moved_ws + 1, SEEDS).save(tmp_path / "other.safetensors")
    hashes = {loaded.hash, load_generator(latents_file).hash, load_generator(other).hash}
    assert len(hashes) == 3


def test_a_reward_of_the_generator_fits_without_a_warning(latents_file, tiny_reward, loaded, capsys):
    reward = load_reward(tiny_reward)
    reward.provenance["generator"] = loaded.hash
    check_reward(reward, load_generator(latents_file).generator)
    assert capsys.readouterr().err == ""


def test_a_study_compares_files_of_the_same_seeds_only(latents_file, loaded, moved_ws, tmp_path):
    before = LatentsFile.of(loaded, moved_ws + 1, SEEDS).save(tmp_path / "before.safetensors")
    others = LatentsFile.of(loaded, moved_ws, (1, 2, 3)).save(tmp_path / "others.safetensors")
    assert common_shapes(load_generator(before), load_generator(latents_file)) == 3
    with raising("--a", "--b"):
        common_shapes(load_generator(others), load_generator(latents_file))


def test_latents_of_another_generator_are_rejected(latents_file, other_network, tmp_path, loaded, moved_ws):
    with raising("improved.safetensors", load_generator(other_network).hash[:12]):
        load_stored_generator(latents_file, other_network)
    gone = LatentsFile(ws=moved_ws, generator=loaded.hash, network=str(tmp_path / "gone.safetensors"))
    with pytest.raises(FileNotFoundError, match=r"gone\.safetensors"):
        load_generator(gone.save(tmp_path / "latents.safetensors"))
    with raising("seeds"):
        LatentsFile.of(loaded, moved_ws, (1, 2)).save(tmp_path / "bad.safetensors")


def test_it_cannot_be_tuned(latents_file):
    description = read_description(latents_file)
    assert description["networks"] == ["G_ema"] and description["architecture"] == "stored-latents"


def test_images_of_a_file_are_named_by_the_number_of_the_latent(latents_file, tiny_networks, tmp_path):
    arguments = ["samples", "images", f"--latents={latents_file}", f"--outdir={tmp_path}"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in tmp_path.glob("*.png")) == [f"seed000{i}.png" for i in range(3)]
    rejected(CliRunner().invoke(main, [*arguments, "--psi=0.5"]), "--psi")


def test_label_takes_a_file_and_rejects_held_out_seeds(latents_file, loaded, moved_ws, tmp_path):
    shared_arguments = ["label", "--pairs=1", "--dry-run", f"--db=sqlite:///{tmp_path / 'l.db'}"]
    result = CliRunner().invoke(main, [*shared_arguments, f"--latents={latents_file}"])
    assert result.exit_code == 0, result.output
    settings = json.loads(result.stdout)
    assert settings["network"] == str(latents_file.resolve())
    assert (settings["first_seed"], settings["psi"]) == (0, 0.8)
    held_out = LatentsFile.of(loaded, moved_ws, LATENTS.take(3)).save(tmp_path / "held-out.safetensors")
    message = rejected(
        CliRunner().invoke(main, [*shared_arguments, f"--latents={held_out}"]), str(LATENTS.first)
    )
    assert "--latents" in message
    rejected(CliRunner().invoke(main, [*shared_arguments, f"--network={held_out}"]), "--network", "--latents")
    rejected(CliRunner().invoke(main, [*shared_arguments, f"--latents={latents_file}", "--psi=0.5"]), "--psi")


def test_the_latents_of_a_file_can_be_numbered_from_a_list(latents_file):
    generator = load_generator(latents_file).generator
    assert np.array_equal(
        ws_of_seeds(generator, range(3)).numpy(), torch.cat([ws_of_seeds(generator, [i]) for i in range(3)])
    )
