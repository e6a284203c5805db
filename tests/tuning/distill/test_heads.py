"""Text to 3D on heads of people: assets are the generator's own shapes, the prior is of the head that a
prompt names, and a reward on the density corrects errors that images do not show.
"""

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import train
from eg3d_rlhf.core import bundled
from eg3d_rlhf.core.field import Bounds
from eg3d_rlhf.core.spec import SlabSpec
from eg3d_rlhf.generators import load_generator, ws_of_seeds
from eg3d_rlhf.generators.assets.asset import load_assets
from eg3d_rlhf.generators.assets.latents import Latents
from eg3d_rlhf.rewards.images.analytic import OneNose
from eg3d_rlhf.rewards.reward import load_reward
from eg3d_rlhf.tuning.distill import scene_heads as heads
from eg3d_rlhf.tuning.distill.config import Arm, DistillSettings, LoopConfig, SceneConfig
from eg3d_rlhf.tuning.distill.guidance.geometry import ObservedGeometry, shuffle_weights
from eg3d_rlhf.tuning.distill.scene import open_scene
from eg3d_rlhf.tuning.distill.scene_kinds import HEAD_SEEDS, HEADS, check_heads
from eg3d_rlhf.tuning.distill.schedule import NoiseSchedule
from tests.rejections import raising, rejected
from training.heads.people_mesh import head_grid

CPU = torch.device("cpu")
PROMPTS = ("head 3", "head 4")


def run(*flags):
    return CliRunner().invoke(train.main, ["--mode=distill", "--prior=heads", *map(str, flags)])


def settings(*arms, steps=2):
    return DistillSettings(
        prompts=PROMPTS,
        arms=arms,
        scene=SceneConfig(prior="heads", geometry_reward="sigma"),
        loop=LoopConfig(steps=steps, t_max="0.5", lr=0.1),
    )


def test_assets_are_the_generators_shapes_and_a_reward_reads_them_as_those(tmp_path):
    generator = load_generator().generator
    seeds = [3, 4]
    asset = Latents.from_seeds(seeds)
    field = generator.field(ws_of_seeds(generator, seeds))
    spec = SlabSpec.from_bounds(Bounds(), 24)
    reward = load_reward(bundled.REWARD)
    with torch.no_grad():
        assert torch.equal(asset.density_grid(spec), field.density_grid(spec))
        points = spec.points().reshape(-1, 3)[::7]
        assert torch.allclose(asset.density(points), field.density(points), atol=1e-3)
        assert torch.allclose(asset.colour(points), field.colour(points), atol=1e-4)
        assert torch.equal(reward.score(asset), reward.score(field))
    asset.save(tmp_path / "heads.safetensors")
    assert torch.equal(load_assets(tmp_path / "heads.safetensors").ws, asset.ws)
    with raising("0" * 12):
        Latents(1, generator="0" * 64)


def test_the_prior_knows_the_head_that_is_named_and_where_the_camera_stands():
    # [H, K, 3, R, R]
    prior = heads.mixture(PROMPTS)
    images = heads.modes((3, 4))
    x = prior.encode(images[0])
    named, other = (prior.log_prob(x, prior.embed([prompt] * len(x))) for prompt in PROMPTS)
    assert bool((named > other + 100).all())
    t = torch.full((len(x),), 100)
    noise = torch.zeros_like(x)
    cameras = heads.all_cameras().cameras[:, :16]
    mixed = NoiseSchedule(prior.alphas_cumprod).mix(x, noise, t)
    seen, inverted = (
        prior.predict_noise(mixed, t, prior.embed([PROMPTS[0]] * len(x)), c)
        for c in (cameras, cameras.flip(0))
    )
    assert float(seen.abs().max()) < 1e-3 and float(inverted[0].abs().max()) > 0.1
    with raising("--prompt", "'a cube'"):
        check_heads(("a cube",), None, is_comparison=False)


def test_a_scene_moves_every_asset_from_the_same_start_in_all_arms():
    chosen = settings("sds", "sds+geometry", "sds+geometry-inverted")
    scene = open_scene(chosen, CPU)
    before = {}
    after = {}
    for name in chosen.arms:
        work = scene.distillation(chosen, Arm.parse(name), 0)
        before[name] = work.asset.ws.detach().clone()
        for step in range(chosen.loop.steps):
            work.step(step)
        after[name] = work.asset.ws.detach()
    assert all(torch.equal(ws, before["sds"]) for ws in before.values())
    assert bool(((after["sds"] - before["sds"]).flatten(1).norm(dim=1) > 0).all())
    assert not torch.equal(after["sds+geometry"], after["sds"])
    assert not torch.equal(after["sds+geometry"], after["sds+geometry-inverted"])


def test_the_distance_to_the_named_head_is_that_of_its_surface(monkeypatch):
    heads.target_grid.cache_clear()
    monkeypatch.setattr(heads, "GRID", 32)
    grids = [head_grid(heads.target_head(number), 32) for number in (0, 1)]
    same = heads.distance(grids[0], grids[0])
    other = heads.distance(grids[1], grids[0])
    assert same == 0 and 0.001 < other < 0.05 and heads.distance(np.ones_like(grids[0]), grids[0]) == 0.5
    monkeypatch.setattr(heads, "shape_grids", lambda asset, n: np.stack([grids[int(asset)]]))
    assert heads.ShapeEvaluator().compare(torch.tensor(0), torch.tensor(1), ("head 0",)) == [0]
    assert heads.ShapeEvaluator().compare(torch.tensor(0), torch.tensor(1), ("head 1",)) == [1]


def test_controls_of_a_geometry_reward():
    learned = ObservedGeometry(load_reward(bundled.REWARD))
    field = Latents.from_seeds([3])
    dealt = shuffle_weights(learned, seed=0)
    with torch.no_grad():
        kept, other = (reward(field, ["head 3"], 0) for reward in (learned, dealt))
    assert not torch.allclose(other, kept)
    for old, new in zip(learned.reward.parameters(), dealt.reward.parameters(), strict=True):
        assert torch.equal(old.flatten().sort().values, new.flatten().sort().values)
    with raising("+geometry-random", "--geometry-reward"):
        shuffle_weights(OneNose(), 0)


def test_flags_of_the_heads():
    settings = json.loads(run("-n").stdout)
    assert settings["arms"] == ["sds", "sds+geometry", "sds+geometry-inverted", "sds+geometry-random"]
    scene = settings["scene"]
    assert (
        len(settings["prompts"]) * scene["assets"] == HEADS * HEAD_SEEDS
        and scene["geometry_reward"] == "sigma"
    )
    assert json.loads(run("-n", "--prompt=head 7").stdout)["arms"] == ["sds"]
    rejected(run("--method=dreamdpo"), "--method=dreamdpo", "sds", "--prior=heads")


@pytest.mark.long
def test_reward_and_judges_follow_its_sign(tmp_path):
    result = run("--show=0", "--jobs=1", f"--outdir={tmp_path}")
    assert result.exit_code == 0, result.output
    arms = json.loads((tmp_path / "00000-distill-heads-compare" / "compare.json").read_text())["arms"]
    kept, inverted, dealt = (
        arms[f"sds+geometry{twist}"]["changes"] for twist in ("", "-inverted", "-random")
    )
    for name in ("reward", "held-out reward", "utility"):
        assert (
            kept[name]["ci95"][0] > 0 > inverted[name]["ci95"][1] and kept[name]["mean"] > dealt[name]["mean"]
        ), name
    assert kept["back-of-head error"]["mean"] < 0 < inverted["back-of-head error"]["mean"]
