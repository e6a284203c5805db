"""A level that is set once: in files, in meshes, in reports and in tuning."""

import json

import pytest
from click.testing import CliRunner

from eg3d_rlhf.core.field import LEVEL
from eg3d_rlhf.evaluation.comparison import load_comparison
from eg3d_rlhf.evaluation.comparison_sources import Sources
from eg3d_rlhf.generators import as_generator, load_generator, set_level, ws_of_seeds
from eg3d_rlhf.generators.density_samples import check_density, sample_density
from eg3d_rlhf.modes import samples
from eg3d_rlhf.modes.network_files import inspect_network
from eg3d_rlhf.preferences.labels import Preference
from eg3d_rlhf.rewards.reward import load_reward
from eg3d_rlhf.rewards.training_run import level_of_labels
from eg3d_rlhf.tuning.gan.reward_run import take_level
from tests.generators.density_balls import BallGenerator
from tests.rejections import raising, rejected
from training import networks


def test_a_file_carries_its_level(tiny_networks, tmp_path):
    loaded = load_generator(tiny_networks, level=-0.5)
    generator = loaded.generator
    field = generator.field(ws_of_seeds(generator, [1]))
    assert (generator.level, field.level, as_generator(loaded.nets.G).level) == (-0.5, -0.5, -0.5)
    networks.save(tmp_path / "leveled.safetensors", loaded.nets)
    again = load_generator(tmp_path / "leveled.safetensors")
    assert again.generator.level == -0.5 and again.hash == loaded.hash
    assert load_generator(tiny_networks).generator.level == LEVEL


def test_a_fixed_level_and_a_wrong_one_are_rejected(tiny_networks):
    class Fixed:
        level = 3.0

    nets = load_generator(tiny_networks).nets
    nets.G = None
    with raising("--set level", "nan"):
        set_level(nets, float("nan"))
    nets.G_ema = Fixed()
    nets.architecture = "fixed"
    with raising("--set level=4", "fixed", "3"):
        set_level(nets, 4.0)


def test_all_commands_propose_the_level_of_the_same_samples():
    generator = BallGenerator(peak=0.5, radius=0.3)
    generator.slope = 5
    usual = sample_density(generator).propose_level()
    for seeds, psi in (([100, 101], 0.7), (None, 1.0)):
        check = check_density(generator, seeds=seeds, psi=psi)
        assert (check.with_surface, check.proposed_level) == (0, usual)
    # the level keeps a distance to the smallest and the largest density
    samples_of_balls = sample_density(generator)
    highest = float(samples_of_balls.cubes.max())
    lowest = float(samples_of_balls.cubes.min())
    assert lowest + 0.04 * (highest - lowest) < usual < highest - 0.04 * (highest - lowest)


def test_a_sheet_without_shapes_is_an_error_that_proposes_a_level(tiny_networks, tiny_data, tmp_path):
    flags = [f"--network={tiny_networks}", f"--data={tiny_data}", f"--outdir={tmp_path / 'sheet'}"]
    flags += ["--latents=0-1", "--shapes=1"]
    message = rejected(CliRunner().invoke(samples.sheet, flags), "--network", "--set level=")
    assert not (tmp_path / "sheet").exists()
    level = float(message.split("--set level=")[1].split(":")[0])
    inspected = json.loads(CliRunner().invoke(inspect_network, [str(tiny_networks), "--json"]).stdout)
    assert inspected["density"]["proposed_level"] == level
    mesh_flags = [f"--network={tiny_networks}", "--seed=1", f"--out={tmp_path / 'm.ply'}", "--resolution=32"]
    rejected(CliRunner().invoke(samples.mesh, mesh_flags), f"--set level={level:g}")


def test_reports_take_the_level_of_the_tuned_network(tiny_networks, tiny_reward, tmp_path, capsys):
    loaded = load_generator(tiny_networks, level=-0.25)
    networks.save(tmp_path / "tuned.safetensors", loaded.nets)
    named = {"before": tiny_networks, "after": tmp_path / "tuned.safetensors", "reward_ckpt": tiny_reward}
    comparison = load_comparison(Sources(**named))
    assert [side.generator.level for side in comparison.generators().values()] == [-0.25, -0.25]
    assert "-0.25" in capsys.readouterr().err and comparison.inputs()["level"] == -0.25
    assert load_comparison(Sources(**named, level=1.5)).before.generator.level == 1.5
    usual = load_comparison(Sources(before=tiny_networks, after=tiny_networks, reward_ckpt=tiny_reward))
    assert "level" not in usual.inputs() and not capsys.readouterr().err


def test_labels_state_their_level_and_tuning_takes_that_of_the_reward(tiny_networks, tiny_reward, capsys):
    labels = [Preference(winner=1, loser=2, extra={"level": level}) for level in (-0.2, -0.24, -0.24)]
    assert level_of_labels(labels[:1]) == -0.2 and not capsys.readouterr().err
    assert level_of_labels(labels) == -0.24
    assert "-0.2 (1)" in capsys.readouterr().err
    assert level_of_labels([Preference(winner=1, loser=2)]) is None
    reward = load_reward(tiny_reward)
    nets = load_generator(tiny_networks).nets
    take_level(nets, reward, True)
    assert as_generator(nets.G_ema).level == LEVEL and not capsys.readouterr().out
    reward.provenance["level"] = -0.24
    take_level(nets, reward, True)
    assert as_generator(nets.G_ema).level == -0.24 and "-0.24" in capsys.readouterr().out


@pytest.mark.parametrize("same", [True, False])
def test_a_reward_shares_its_networks_with_its_copies_alone(tiny_reward, other_reward, same):
    other = load_reward(tiny_reward if same else other_reward)
    assert load_reward(tiny_reward).shares_network_with(other) is same
