"""The field start: latents name heads of the family, the target's level set is their surface, and a few steps move G towards it."""

import copy

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from scipy import stats

import train
from eg3d_rlhf.modes.gan import PRESETS
from eg3d_rlhf.tuning.gan.settings import SCRATCH, Settings
from tests import tiny_runs
from training import networks, starts
from training.config import networks_for
from training.gan_phases import Batch, GanPhases
from training.heads.family import APPEARANCE_COUNT, APPEARANCE_NAMES, SHAPE_COUNT, draw_parameters
from training.heads.render import pixel_rays, render_heads, shade, union_field
from training.heads.sdf import head_geometry, head_sdf
from training.rendering.renderer import DETACHED
from training.starts import field_phase, held_density, named_heads, picture_phase, raw_density
from training.synthetic_heads import HeadsOptions, head_parameters


def test_latents_name_heads_with_the_distribution_of_the_family():
    shape, appearance = named_heads(torch.randn(1500, 64, generator=torch.Generator().manual_seed(0)))
    rng = np.random.default_rng(1)
    drawn = [np.stack(values) for values in zip(*(draw_parameters(rng) for _ in range(1500)), strict=True)]
    assert shape.shape == (1500, SHAPE_COUNT) and appearance.shape == (1500, APPEARANCE_COUNT)
    for named, family in zip((shape, appearance), drawn, strict=True):
        for i in range(named.shape[1]):
            assert stats.ks_2samp(named[:, i].numpy(), family[:, i]).pvalue > 1e-4, i


def test_only_the_direction_of_a_latent_counts_and_neighbours_are_alike():
    z = torch.randn(4, 64, generator=torch.Generator().manual_seed(2))
    assert all(torch.equal(a, b) for a, b in zip(named_heads(z), named_heads(z * 2.0), strict=True))
    near = named_heads(z + 1e-4)[0]
    assert (near - named_heads(z)[0]).abs().max() < 1e-3
    with pytest.raises(ValueError, match="at least 48"):
        named_heads(z[:, :32])


@pytest.fixture
def heads():
    return tuple(torch.from_numpy(values) for values in head_parameters(HeadsOptions(), range(3))[:2])


@pytest.mark.parametrize("edge", [0.03, 0.015])
def test_the_targets_level_set_is_the_surface_whatever_the_edge(heads, edge):
    torch.manual_seed(0)
    truth = starts.draw_points(*heads, edge, near=600, anywhere=300)
    sdf = head_sdf(truth.points, heads[0])
    assert torch.equal(truth.density > starts.LEVEL, sdf < 0)
    assert truth.density.min() == starts.OUTSIDE and truth.density.max() <= starts.INSIDE
    near, rest = sdf[:, :600].abs().mean(), sdf[:, 600:].abs().mean()
    assert near < rest / 3
    assert (truth.points[:, 600:].abs() > 0.5).any() and truth.points.abs().max() <= 0.5 + starts.OUTER


def test_the_targets_colours_are_those_of_the_rendered_images(heads):
    cameras = torch.from_numpy(head_parameters(HeadsOptions(), range(3))[2])
    poses, intrinsics = cameras[:, :16].reshape(-1, 4, 4), cameras[:, 16:].reshape(-1, 3, 3)
    image, depth = render_heads(*heads, poses, intrinsics, 32, supersample=1)
    origins, directions = pixel_rays(poses, intrinsics, 32)
    hit = depth.reshape(3, -1).isfinite()
    points = origins[:, None] + torch.where(hit, depth.reshape(3, -1), 0.0).unsqueeze(-1) * directions
    a = dict(zip(APPEARANCE_NAMES, heads[1].unsqueeze(-1).unbind(1), strict=True))
    g = head_geometry(heads[0])
    colours = shade(union_field(g), *(x.contiguous() for x in points.unbind(-1)), g, a).clamp(0, 1)
    seen = image.flatten(2).mT
    assert (colours - seen)[hit].abs().max() < 1e-5


def test_the_loss_is_zero_at_the_truth_and_grows_with_the_error(heads):
    torch.manual_seed(0)
    truth = starts.draw_points(*heads, 0.03, near=60, anywhere=30)
    shape, colour = starts.field_loss(truth.density, truth.colour, truth, 2.0)
    assert not shape.any() and not colour.any()
    shape, colour = starts.field_loss(truth.density + 5, truth.colour - 0.1, truth, 2.0)
    assert torch.allclose(shape, torch.full((3,), 0.5)) and torch.allclose(colour, torch.full((3,), 0.2))


def config(**more):
    field = {"field_kimg": 1.0, "field_lr": 0.002}
    return Settings.of({"task": SCRATCH, **PRESETS["heads64", SCRATCH], "gen_pose_cond": False, "cbase": 256, **field, **more})


def test_a_few_steps_move_the_field_towards_the_named_heads():
    s = config(field_kimg=100.0)
    torch.manual_seed(0)
    G = networks.build(*networks_for(s.net, 64, s.gan), {}).G
    phase = field_phase(G, s.gan)
    G.requires_grad_(True)
    losses = []
    for i in range(40):
        torch.manual_seed(i % 4)
        batch = Batch(None, None, torch.randn(2, G.z_dim), torch.zeros(2, 25), 0)
        (loss,) = phase.losses(batch)
        losses.append(float(loss.value.mean().detach()))
        phase.optimizer.zero_grad()
        loss.value.mean().backward()
        phase.optimizer.step()
    assert np.mean(losses[-4:]) < 0.8 * np.mean(losses[:4])


def test_the_field_of_other_data_is_not_known(tmp_path):
    data = tiny_runs.write_dataset(tmp_path / "x.zip", 64)
    result = CliRunner().invoke(train.main, ["--cfg=heads64", "--init=scratch", f"--data={data}"])
    assert result.exit_code == 2 and "--set field_kimg: expected --data=synthetic:heads" in result.stderr


def steps_of(phase, nets, count: int = 24) -> list[dict[str, float]]:
    """Statistics of a phase over a few steps on the same four batches."""
    cameras = torch.from_numpy(head_parameters(HeadsOptions(), range(2))[2])
    stats = []
    nets.G.requires_grad_(True)
    for i in range(count):
        torch.manual_seed(i % 4)
        (loss,) = phase.losses(Batch(None, None, torch.randn(2, nets.G.z_dim), cameras, 0))
        stats.append({name.rsplit("/")[-1]: float(value.detach().mean()) for name, value in loss.stats.items()})
        phase.optimizer.zero_grad()
        loss.value.mean().backward()
        phase.optimizer.step()
    return stats


def small_networks(s):
    torch.manual_seed(0)
    nets = networks.build(*networks_for(s.net, 16, s.gan), {})
    nets.G.rendering_kwargs.update(depth_resolution=8, depth_resolution_importance=8)
    nets.G.decoder.net[2].bias[0] = 6.0  # what is transparent learns from no picture
    return nets


@pytest.mark.long
def test_pictures_move_towards_those_of_the_named_heads():
    s = config(nrr_initial=16, field_kimg=0.0, picture_kimg=100.0)
    nets = small_networks(s)
    stats = steps_of(picture_phase(nets.G, s.gan), nets)
    assert np.mean([x["picture"] for x in stats[-4:]]) < 0.8 * np.mean([x["picture"] for x in stats[:4]])


@pytest.mark.long
def test_a_held_density_stays_while_pictures_are_learnt(monkeypatch):
    s = config(nrr_initial=16, field_kimg=0.0, picture_kimg=100.0, picture_hold=1.0)
    nets = small_networks(s)
    before = copy.deepcopy(nets.G)
    for name, value in (("CANDIDATES", 600), ("HELD_NEAR", 120), ("HELD_ANYWHERE", 60)):
        monkeypatch.setattr(starts, name, value)
    phase = picture_phase(nets.G, s.gan)
    steps_of(phase, nets)
    assert all(torch.equal(a, b) for a, b in zip(phase.state.parameters(), before.parameters(), strict=True))
    free = small_networks(s)
    steps_of(picture_phase(free.G, config(nrr_initial=16, field_kimg=0.0, picture_kimg=100.0).gan), free)
    z = torch.randn(4, nets.G.z_dim, generator=torch.Generator().manual_seed(3))
    points, was = held_density(before, z)
    assert points.abs().max() <= 0.5
    drift = [float((raw_density(G, G.planes(G.mapping(z, torch.zeros(4, 25))), points) - was).abs().mean()) for G in (nets.G, free.G)]
    assert drift[0] < 0.5 * drift[1]


def test_a_detached_density_gets_no_gradient_from_a_picture():
    s = config(picture_kimg=1.0)
    G = small_networks(s).G.requires_grad_(True)
    c = torch.from_numpy(head_parameters(HeadsOptions(), range(1))[2])
    ws = G.mapping(torch.randn(1, G.z_dim), torch.zeros(1, 25))
    for detached in (False, True):
        G.zero_grad()
        image = G.render(G.planes(ws.detach()), ws, c, 16, {**G.rendering_kwargs, DETACHED: detached})["image"]
        image.square().sum().backward()
        density_row, colour_rows = G.decoder.net[2].weight.grad[0], G.decoder.net[2].weight.grad[1:]
        assert colour_rows.any() and density_row.any() != detached


def test_pictures_come_between_field_and_game():
    s = config(picture_kimg=2.0)
    nets = networks.build(*networks_for(s.net, 64, s.gan), {})
    phases = {p.name: p for p in [*GanPhases(nets.G, nets.D, s.gan).phases(), field_phase(nets.G, s.gan), picture_phase(nets.G, s.gan)]}
    due = {n: {name for name, p in phases.items() if p.due(0, n)} for n in (999, 1000, 2999, 3000)}
    assert due == {999: {"Gfield"}, 1000: {"Gpicture"}, 2999: {"Gpicture"}, 3000: {"Dmain", "Dreg", "Gmain", "Greg"}}
