"""A generator family from outside the package works with the public tools: labelled, scored,
exported, evaluated.
"""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
from click.testing import CliRunner

import train
from eg3d_rlhf.core import bundled, registry
from eg3d_rlhf.core.field import RenderOptions
from eg3d_rlhf.core.spec import SlabSpec
from eg3d_rlhf.experiments.media.rendering import camera
from eg3d_rlhf.generators import load_generator, load_networks, ws_of_seeds
from eg3d_rlhf.modes import reports, samples
from eg3d_rlhf.rewards.observations import SigmaSlab
from eg3d_rlhf.rewards.reward import Reward, check_reward, load_reward
from eg3d_rlhf.rewards.slab_network import RewardModel
from eg3d_rlhf.rewards.slab_presets import RewardArch
from tests import tiny_runs
from tests.rejections import raising, rejected
from training import networks, storage
from training.rendering.cameras import mirror_label

PLUGIN = Path(__file__).with_name("mirrored.py")
SCALE = 1.25
CENTRE = (0.05, -0.03, 0.02)
PSI = 0.7
PARTS = ("reward-shift", "surfaces")
MORE = (
    "view-consistency",
    "sigma-statistics",
    "canonical-depth",
    "reward-strips",
    "diversity",
    "over-optimisation",
)


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """(file of the foreign family around the bundled network, the network inside as a generator); the plugin
    is named, not imported.
    """
    inner = load_generator()
    patch = pytest.MonkeyPatch()
    patch.setenv(registry.VARIABLE, str(PLUGIN))
    registry.load_plugins()
    G = inner.generator.module
    kwargs = {"scale": SCALE, "centre": CENTRE}
    kwargs["inner"] = {**inner.nets.G_kwargs, "neural_rendering_resolution": G.neural_rendering_resolution}
    network = sys.modules[PLUGIN.stem].MirroredNetwork(**kwargs).eval().requires_grad_(False)
    network.inner.load_state_dict(G.state_dict())
    path = tmp_path_factory.mktemp("foreign") / "mirrored.safetensors"
    networks.save(
        path, networks.Networks(None, None, network, kwargs, None, {"name": "heads"}, architecture="mirrored")
    )
    yield path, inner.generator
    patch.undo()
    tiny_runs.forget_plugin("mirrored")


def test_tuning_names_the_missing_input(foreign, tiny_data, tmp_path):
    unheard = tmp_path / "unheard.safetensors"
    storage.write_tensors(
        unheard, "network", {}, {"architecture": "unheard-of", "G_kwargs": {}, "D_kwargs": None}
    )
    known = ("eg3d", "hyplanehead", "panohead", "spherehead", "assets", "mirrored", "'unheard-of'")
    lacks = {foreign[0]: ("mirrored.safetensors", "G_ema"), unheard: known}
    for init, names in lacks.items():
        result = CliRunner().invoke(
            train.main, [f"--init={init}", f"--data={tiny_data}", f"--outdir={tmp_path}"]
        )
        rejected(result, "--init", *names)


@pytest.fixture(scope="module")
def pair(foreign):
    """(the foreign generator, the one inside, ws of one latent)."""
    path, inner = foreign
    generator = load_generator(path).generator
    return generator, inner, ws_of_seeds(generator, [1], PSI)


def run(tool, *flags):
    result = CliRunner().invoke(tool, [str(flag) for flag in flags])
    assert result.exit_code == 0, (result.output, result.exception)
    return result


def inside(points: torch.Tensor) -> torch.Tensor:
    """Points of the foreign world in the one inside."""
    return (points - torch.tensor(CENTRE)) / SCALE * torch.tensor([-1.0, 1.0, 1.0])


def test_density_and_colour_are_those_inside_at_the_mirrored_point(pair):
    generator, inner, ws = pair
    points = torch.rand(200, 3, generator=torch.Generator().manual_seed(0)) * 0.8 - 0.4
    field = generator.field(ws)
    inner_field = inner.field(ws)
    torch.testing.assert_close(field.density(points), inner_field.density(inside(points)))
    torch.testing.assert_close(field.colour(points), inner_field.colour(inside(points)))
    grid = SlabSpec.from_bounds(generator.bounds, 20)
    # a cube about the box is the inner cube, x reversed
    mirrored = inner_field.density_grid(SlabSpec.from_bounds(inner.bounds, 20)).flip(-1)
    torch.testing.assert_close(field.density_grid(grid), mirrored, rtol=1e-3, atol=1e-3)


def test_a_mirrored_camera_gives_the_mirrored_image(pair):
    generator, inner, ws = pair
    label = camera(generator.cameras, 0.3, -0.1)
    moved = label.clone()
    moved[:, [3, 7, 11]] = (label[:, [3, 7, 11]] - torch.tensor(CENTRE)) / SCALE
    options = RenderOptions(resolution=12)
    torch.manual_seed(0)
    seen = generator.field(ws).render(label, options)
    torch.manual_seed(0)
    inner_render = inner.field(ws).render(mirror_label(moved), options)
    assert torch.equal(seen.image, inner_render.image.flip(-1)) and torch.equal(
        seen.depth, SCALE * inner_render.depth.flip(-1)
    )
    assert seen.opacity.max() > 0.9


def test_its_mesh_lies_in_its_bounds_mirrored_and_watertight(foreign, tmp_path):
    path = foreign[0]
    out = tmp_path / "mirrored.ply"
    flags = ["--seed=1", f"--trunc={PSI}", "--resolution=48"]
    run(samples.mesh, f"--network={path}", f"--out={out}", *flags)
    run(samples.mesh, f"--out={tmp_path / 'own.ply'}", *flags)
    mesh = trimesh.load(out)
    inner_mesh = trimesh.load(tmp_path / "own.ply")
    assert mesh.is_watertight and mesh.is_winding_consistent and mesh.volume > 0
    assert json.loads(out.with_name("mirrored.ply.json").read_text())["options"]["level"] == 10
    expected = np.sort((inner_mesh.bounds * [-1, 1, 1]) * SCALE + CENTRE, axis=0)
    np.testing.assert_allclose(mesh.bounds, expected, atol=2e-3)
    assert (np.abs(mesh.bounds - CENTRE) <= SCALE / 2 + 1e-3).all()
    assert mesh.volume == pytest.approx(inner_mesh.volume * SCALE**3, rel=1e-2)


@pytest.fixture(scope="module")
def reward(pair, tmp_path_factory):
    """File of an untrained reward that reads slabs of the foreign generator,
    mirrored ones of the one inside.
    """
    torch.manual_seed(3)
    arch = RewardArch(
        feature_maps=(8, 16),
        patch=2,
        input_scale=0.02,
        pooling="grid",
        trunk=(16, 16),
        embedding=16,
        heads=(8, 8),
        groups=4,
        final_cells=(2, 2, 2),
        bottleneck_cells=(1, 1, 1),
    )
    observation = SigmaSlab.from_generator(pair[0], resolution=24, crop=SlabSpec.crop)
    return Reward(observation, RewardModel(arch)).save(
        tmp_path_factory.mktemp("reward") / "mirrored.safetensors"
    )


def test_a_reward_for_its_box_scores_it_and_the_bundled_reward_is_rejected(pair, reward):
    generator, inner, ws = pair
    reward_of_box = load_reward(reward)
    bundled_reward = load_reward(bundled.REWARD)
    check_reward(reward_of_box, generator)
    # the crop is the same on both sides of x
    slab = (
        SigmaSlab.from_generator(inner, resolution=24, crop=SlabSpec.crop).observe(inner.field(ws)).flip(-1)
    )
    torch.testing.assert_close(
        reward_of_box.score(generator.field(ws)), reward_of_box.score_observed(slab), rtol=1e-4, atol=1e-5
    )
    with raising("box_warp", "1.0", "1.25", "(0.05, -0.03, 0.02)"):
        check_reward(bundled_reward, generator)


@pytest.mark.parametrize("parts", [PARTS, pytest.param(MORE, marks=pytest.mark.long)], ids=["few", "many"])
def test_tuning_it_is_evaluated(parts, foreign, reward, tmp_path):
    """Another density in the network inside stands for tuning."""
    nets = load_networks(foreign[0])
    nets.G_ema.inner.decoder.net[2].weight[0, ::2] *= 1.2
    networks.save(after := tmp_path / "after.safetensors", nets)
    flags = [f"--before={foreign[0]}", f"--after={after}", "--n=16", f"--outdir={tmp_path / 'out'}"]
    run(reports.evaluate, *flags, f"--reward-ckpt={reward}", f"--only={','.join(parts)}")
    for part in parts:
        assert json.loads((tmp_path / "out" / "data" / f"{part}.json").read_text())["rows"], part
    result = CliRunner().invoke(reports.evaluate, [*flags, f"--reward-ckpt={bundled.REWARD}"])
    rejected(result, "box_warp", "1.0", "1.25")
