"""Normal maps against spheres and true heads; the shape critic: what it learns, what its file holds, and that training repeats."""

import json
import math

import pytest
import torch
from click.testing import CliRunner

from eg3d_rlhf.core.field import Bounds
from eg3d_rlhf.measures.distances import FeatureStatistics
from eg3d_rlhf.measures.shape_critic import (
    FEATURES,
    RESOLUTION,
    YAWS,
    CriticTraining,
    ShapeCritic,
    box,
    mirrored,
    normal_maps,
    train_critic,
    true_maps,
)
from eg3d_rlhf.measures.true_heads import RAMPS, head_distances, ramped, true_shapes
from eg3d_rlhf.modes import assets

SPEC = box(Bounds())
HALF = (RESOLUTION - 1) * SPEC.voxel / 2


def sphere(radius: float, centre=(0.0, 0.0, 0.0)) -> torch.Tensor:
    """Raw density [1, R, R, R] of a sphere placed from the box's own centre."""
    middle = torch.tensor([float((axis[0] + axis[-1]) / 2) for axis in SPEC.axes()])
    return ramped((SPEC.points() - middle - torch.tensor(centre)).norm(dim=-1) - radius)[None]


@pytest.mark.parametrize("centre", [(0.0, 0.0, 0.0), (0.08, 0.05, -0.04)])
def test_normals_of_a_sphere(centre):
    radius = 0.12
    for yaw, found in zip(YAWS, normal_maps(sphere(radius, centre))[0], strict=True):
        line = torch.linspace(-HALF, HALF, RESOLUTION)
        v, u = torch.meshgrid(line.flip(0), line, indexing="ij")
        u = u - (centre[0] * math.cos(yaw) - centre[2] * math.sin(yaw))  # the view's right is (cos, 0, -sin)
        v = v - centre[1]
        inside = u**2 + v**2 <= (0.85 * radius) ** 2
        expected = torch.stack([u, v, (radius**2 - u**2 - v**2).clamp_min(0).sqrt()]) / radius
        cosine = (found[:3] * expected).sum(dim=0)[inside]
        assert torch.rad2deg(cosine.clamp(-1, 1).acos()).max() < 6 and torch.rad2deg(cosine.clamp(-1, 1).acos()).mean() < 1.5
        area = found[3].sum() * SPEC.voxel**2
        assert area == pytest.approx(math.pi * radius**2, rel=0.02)


def test_an_empty_box_and_one_that_is_full():
    assert normal_maps(torch.full((1, *SPEC.shape), -5.0)).eq(0).all()
    full = normal_maps(torch.full((1, *SPEC.shape), 500.0), yaws=(0.0,))[0, 0]
    assert full[3].eq(1).all() and full[2, 1:-1, 1:-1].allclose(torch.tensor(1.0))
    with pytest.raises(ValueError, match="normal_maps: expected sigma"):
        normal_maps(torch.zeros(1, 8, 8, 8))


def test_heads_are_the_same_under_any_ramp_and_symmetric():
    distance = head_distances(true_shapes(2), SPEC)
    soft, steep = (normal_maps(ramped(distance, ramp)) for ramp in (RAMPS[0], RAMPS[-1]))
    assert (soft[:, :, 3] - steep[:, :, 3]).abs().mean() < 0.01 and (soft - steep).abs().mean() < 0.02
    torch.testing.assert_close(mirrored(soft).flip(1), soft, atol=2e-2, rtol=0)  # the left view mirrored is the right one
    assert not torch.allclose(soft[:, 0], soft[:, 2], atol=0.1)


QUICK = CriticTraining(latents=20, reference=40, epochs=6, batch=20)


def balls(n: int) -> torch.Tensor:
    """Maps [N, F, 4, R, R] of balls of several sizes: no heads."""
    spec, sizes = box(Bounds()), torch.linspace(0.12, 0.2, n)
    return normal_maps(ramped(spec.points().norm(dim=-1)[None] - sizes[:, None, None, None])).half()


@pytest.fixture(scope="module")
def material():
    shape = true_shapes(20, 500)
    return true_maps(shape, Bounds()), shape, true_maps(true_shapes(40, 600), Bounds()), {"balls": balls(20)}


@pytest.fixture(scope="module")
def critic(material):
    return train_critic(*material, QUICK)


def test_heads_are_told_from_balls(critic, material):
    assert critic.record["accuracy"] == 1 and critic.record["held_out"] == 8 and critic.record["parameters"] < 100_000
    heads = critic.logits(true_maps(true_shapes(6, 900), Bounds()).float())
    assert heads.min() > 0 > critic.logits(balls(5).float()).max()
    distances = critic.record["frechet"]
    assert distances["balls"] > 3 * distances["true heads, by halves"]


def test_equal_sets_have_distance_0_and_damage_moves_away(critic):
    distance = head_distances(true_shapes(24, 700), box(Bounds()))
    x, y, z = box(Bounds()).points().unbind(-1)
    waves = torch.sin(70 * x) * torch.sin(75 * y) * torch.sin(65 * z)
    true, same, small, large = (  # waves on the surface, in world units
        FeatureStatistics(FEATURES).update(critic.features(normal_maps(ramped(distance + a * waves)))) for a in (0, 0, 0.004, 0.012)
    )
    assert same.distance(true) == pytest.approx(0, abs=1e-6)
    assert 0.01 < small.distance(true) < large.distance(true)


def test_training_repeats(critic, material):
    again = train_critic(*material, QUICK)
    assert all(torch.equal(a, b) for a, b in zip(critic.critic.state_dict().values(), again.critic.state_dict().values(), strict=True))
    assert torch.equal(critic.true, again.true) and again.record == critic.record


def test_the_file_holds_all_and_stays_small(critic, material, tmp_path):
    path = tmp_path / "critic.safetensors"
    critic.save(path)
    loaded = ShapeCritic.load(path)
    maps = material[0][:3].float()
    assert torch.equal(loaded.logits(maps), critic.logits(maps)) and torch.equal(loaded.features(maps), critic.features(maps))
    assert loaded.record == json.loads(path.with_suffix(".json").read_text()) and path.stat().st_size < 600_000
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match="shape critic file"):
        ShapeCritic.load(path)


def run(*flags):
    return CliRunner().invoke(assets.critic, [str(flag) for flag in flags])


@pytest.mark.long
def test_the_tool(tiny_networks, tmp_path):
    out = tmp_path / "critic.safetensors"
    small = ("--latents=6", "--heads=8", "--reference=40", "--set=epochs=1", f"--out={out}")
    result = run(f"--fakes={tiny_networks}", *small)
    assert result.exit_code == 0, result.output
    assert "accuracy on 2 held-out shapes" in result.stdout and "shape Fréchet distance" in result.stdout
    (fakes,) = ShapeCritic.load(out).record["fakes"]
    assert fakes["network"] == f"{tiny_networks.parent.name}/{tiny_networks.name}" and fakes["seeds"] == [400_000, 400_005]


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--fakes={tmp}/none"], "--fakes: "), (["--fakes={net}", "--fakes={net}"], "--fakes: expected different networks"),
        (["--fakes={net}", "--latents=1"], "--latents"),
        (["--fakes={net}", "--latents=9", "--heads=8"], "as there are fakes, 9, got 8. Raise it."), ([], "--fakes"),
    ],
)
def test_mistakes_leave_nothing(flags, text, tiny_networks, tmp_path):
    result = run(*(flag.format(tmp=tmp_path, net=tiny_networks) for flag in flags), f"--out={tmp_path / 'x' / 'c.safetensors'}")
    assert result.exit_code == 2 and text in result.stderr and not (tmp_path / "x").exists()
