"""Properties of networks on point clouds, and rewards of each kind from labels to tuning."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from eg3d_rlhf.core.field import LEVEL, Bounds, CameraFamily, Rendering
from eg3d_rlhf.core.spec import SlabSpec
from eg3d_rlhf.generators import load_generator, ws_of_seeds
from eg3d_rlhf.modes import reward_training
from eg3d_rlhf.modes.label_files import synthetic
from eg3d_rlhf.rewards import observations
from eg3d_rlhf.rewards.point_layers import ball, farthest_points, nearest
from eg3d_rlhf.rewards.point_networks import PointNetArch, build
from eg3d_rlhf.rewards.points import (
    LevelSetPoints,
    LiftedPoints,
    PublishedPoints,
    choose_candidates,
    level_set,
    lift,
    mirror,
    self_scaled,
)
from eg3d_rlhf.rewards.presets import preset, presets_of
from eg3d_rlhf.rewards.reward import Reward, load_reward
from tests.rejections import raising

OURS = ("pointnet", "pointnet2", "curvenet")


def network(name: str, kind: str = "points", double: bool = True, **changes):
    """Create the network of a preset, in eval mode."""
    torch.manual_seed(0)
    model = build({**preset(name, kind).network, **changes}).eval()
    return model.double() if double else model


def clouds(n: int = 3, points: int = 160, channels: int = 6, seed: int = 0) -> torch.Tensor:
    """Return noisy spheres of radius 0.6 with normals, float64."""
    normals = torch.nn.functional.normalize(
        torch.randn(n, 3, points, generator=torch.Generator().manual_seed(seed)).double(), dim=1
    )
    return torch.cat([0.6 * normals + 0.05 * normals.roll(1, dims=2), normals], dim=1)[:, :channels]


@pytest.mark.parametrize("name", OURS)
def test_no_sample_depends_on_another_and_a_batch_may_be_one(name):
    model = network(name)
    cloud = clouds()
    for training in (False, True):
        model.train(training)
        together = model.score(cloud)
        torch.testing.assert_close(
            together, torch.cat([model.score(single[None]) for single in cloud]), rtol=1e-9, atol=1e-12
        )
        assert torch.equal(together, model.score(cloud)), "two calls are bitwise identical"
    assert len(together.unique()) == 3 and not list(model.buffers())


@pytest.mark.parametrize(
    ("kind", "name", "changes"),
    [
        ("points", "pointnet", {}),
        ("points", "pointnet2", {"limit": 160}),
        ("points", "curvenet", {}),
        ("published-points", "paper-pointnet", {}),
        ("published-points", "paper-pointnet2", {"limit": 160, "start": "farthest"}),
    ],
)
def test_the_order_of_points_does_not_matter(kind, name, changes):
    model = network(name, kind, **changes)
    cloud = clouds(channels=model.arch.inputs)
    shuffled = cloud[:, :, torch.randperm(cloud.shape[2], generator=torch.Generator().manual_seed(1))]
    close = 1e-6 if name != "curvenet" else 1e-3  # its balls take the lowest indices
    torch.testing.assert_close(model.score(shuffled), model.score(cloud), rtol=close, atol=close)


def test_mean_pooling_gives_every_point_a_gradient_and_maximum_pooling_few():
    for widths, pool, share in (((64, 128, 32), "max", 32 / 160), ((64, 128, 32), "max-mean", 1.0)):
        torch.manual_seed(0)
        model = build(PointNetArch(widths=widths, pool=pool).to_dict()).eval()
        cloud = clouds(1, channels=3).float().requires_grad_()
        model.score(cloud).sum().backward()
        reached = float((cloud.grad[0].abs().amax(dim=0) > 0).float().mean())
        assert reached == share if pool == "max-mean" else 0 < reached <= share


def test_neighbours_of_a_line():
    line = torch.zeros(1, 3, 6)
    line[0, 0] = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0, 10.0])
    assert farthest_points(line, 3).tolist() == [[0, 5, 4]]
    assert farthest_points(line, 2, "farthest").tolist() == [[5, 0]]
    index, counts = ball(line[:, :, [2, 5]], line, 1.5, 2)
    assert index.tolist() == [[[1, 2], [5, 5]]] and counts.tolist() == [[2, 1]], (
        "lowest index first, the first fills up"
    )
    assert nearest(line, 2)[0, :, 0].tolist() == list(range(6)) and nearest(line, 9).shape == (1, 6, 6)


@pytest.mark.parametrize(
    ("kind", "name"),
    [(kind, name) for kind in ("points", "lifted-points", "published-points") for name in presets_of(kind)],
)
def test_presets_are_rebuilt_from_json(kind, name):
    described = preset(name, kind).network
    assert build(json.loads(json.dumps(described))).describe() == described


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda: build({"network": "dgcnn"}), ("'dgcnn'", "pointnet")),
        (lambda: build({"network": "pointnet", "layers": 3}), ("layers",)),
        (lambda: build({"network": "pointnet", "widths": [64]}), ("widths", "(64,)")),
        (lambda: build({"network": "pointnet2", "radii": [0.2]}), ("radii", "(0.2,)")),
        (
            lambda: build({"network": "curvenet", "blocks": [[8, 4, 0.1, 3, True]]}),
            ("channels", "(8, 4, 0.1, 3, True)"),
        ),
        (
            lambda: Reward(LevelSetPoints(), build({"network": "pointnet"})),
            ("[6, 512]", "3"),
        ),
        (lambda: LevelSetPoints(points=0), ("points", "1", "0")),
        (lambda: LiftedPoints(seed=True), ("seed", "True")),
        (lambda: LiftedPoints(resolution=16, points=257), ("--points", "256", "257")),
        (lambda: observations.from_dict({"kind": "points"}), ("resolution", "[]")),
        (lambda: LevelSetPoints(spec=replace(GRID, lattice="skewed")), ("'skewed'",)),
        (
            lambda: LevelSetPoints(spec=SlabSpec.cube(4), points=999).observe(sphere(0.3)),
            ("999", "144"),
        ),
    ],
)
def test_settings_that_do_not_fit_are_rejected(make, names):
    with raising(*names):
        make()


def succeed(command, *flags) -> str:
    result = CliRunner().invoke(command, [str(flag) for flag in flags])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def labels(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("labels") / "labels.jsonl"
    succeed(synthetic, "--pairs=16", "--block=2", "--resolution=24", f"--out={path}")
    return path


LONG = [
    pytest.param(*other, marks=pytest.mark.long)
    for other in (("points", "pointnet2"), ("lifted-points", "pointnet"))
]


@pytest.mark.parametrize(("kind", "name"), [("points", "pointnet"), *LONG])
def test_it_trains_and_has_a_gradient(kind, name, labels, tmp_path):
    succeed(
        reward_training.train,
        f"--observation={kind}",
        f"--preset={name}",
        "--resolution=24",
        "--points=96",
        f"--labels={labels}",
        f"--run-dir={tmp_path / 'reward'}",
        "--epochs=1",
        "--set=fractions=0.5 0.25 0.25",
    )
    reward = load_reward(tmp_path / "reward" / "reward.safetensors")
    assert reward.observation.kind == kind and reward.observation.points == 96
    generator = load_generator().generator
    field = generator.field(ws_of_seeds(generator, [5]).requires_grad_())
    reward.score(field).sum().backward()
    assert field.ws.grad.isfinite().all() and field.ws.grad.abs().sum() > 0


# Clouds of known shapes, for which every point and its derivative has a closed form, and the files of
# rewards.


GRID = SlabSpec.cube(24)
RADIUS = 0.31
STEEPNESS = 50.0


@dataclass
class Ball:
    """Spheres of radius r [N] around `at`: density level + steepness (r - |p - at|), in front of an empty
    background.
    """

    r: torch.Tensor
    at: tuple[float, float, float] = (0.0, 0.0, 0.0)
    bounds: Bounds = Bounds()
    level: float = LEVEL
    far: float = 3.3

    def __len__(self):
        return len(self.r)

    def density_grid(self, grid):
        distance = (grid.points().to(self.r) - torch.tensor(self.at).to(self.r)).norm(dim=-1)
        return self.level + STEEPNESS * (self.r[:, None, None, None] - distance)

    def render(self, cameras, options):
        """Return exact depth; rays that miss get the far end and no opacity."""
        from training.rendering.cameras import RaySampler, unpack_label

        origins, directions = RaySampler()(*unpack_label(cameras.to(self.r)), options.resolution)
        from_centre = origins - torch.tensor(self.at).to(self.r)
        along = (from_centre * directions).sum(dim=2)
        inside = along**2 - (from_centre**2).sum(dim=2) + self.r[:, None] ** 2  # [N, M]
        depth = torch.where(
            inside > 0, -along - inside.clamp_min(1e-12).sqrt(), torch.full_like(inside, self.far)
        )
        shape = (len(self), 1, options.resolution, options.resolution)
        nothing = depth.new_zeros(0)
        return Rendering(nothing, nothing, depth.reshape(shape), (inside > 0).to(depth).reshape(shape))


def sphere(*radii):
    return Ball(torch.tensor(radii, dtype=torch.float64, requires_grad=True))


def test_points_of_a_sphere_lie_on_it_and_move_with_it():
    field = sphere(RADIUS, 0.2)
    grid = SlabSpec.cube(96)
    points, normals, has_surface = level_set(field.density_grid(grid), LEVEL, grid, 300, seed=0)
    radius = points.norm(dim=2)
    assert has_surface.all() and (radius - field.r[:, None]).abs().max() <= grid.voxel**2 / (8 * 0.2)
    index = points / grid.voxel + 47.5
    assert (index - index.round()).abs().gt(1e-5).sum(dim=2).max() == 1, "each lies on an edge of the grid"
    assert (normals * points / radius[..., None]).sum(dim=2).min() > 0.99
    torch.testing.assert_close(normals.norm(dim=2), torch.ones_like(radius))
    (moved,) = torch.autograd.grad(radius.mean(dim=1).sum(), field.r, retain_graph=True)
    torch.testing.assert_close(moved, torch.ones_like(moved), rtol=0, atol=0.02)
    (each,) = torch.autograd.grad(radius[0, 0], field.r)
    assert each[1] == 0, "shapes do not touch each other"


def test_the_derivative_of_a_point():
    small = SlabSpec.cube(3)
    density = torch.rand(
        1, 3, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    ).requires_grad_()
    assert torch.autograd.gradcheck(lambda d: level_set(d, 0.5, small, 6, seed=0)[:2], density)
    along_x = SlabSpec(resolution=2, crop=(0,) * 6)
    s_a = 0.2
    s_b = 0.9
    level = 0.4
    pair = torch.tensor([s_a, s_b], dtype=torch.float64).expand(2, 2, 2)[None].clone().requires_grad_()
    points = level_set(pair, level, along_x, 4, seed=0)[0]
    torch.testing.assert_close(
        points[..., 0], torch.full_like(points[..., 0], -0.5 + (level - s_a) / (s_b - s_a))
    )
    points[..., 0].sum().backward()
    torch.testing.assert_close(
        pair.grad[0, 0, 0, 0], torch.tensor(-(s_b - level) / (s_b - s_a) ** 2).double()
    )


def test_edges_without_slope_give_finite_gradients():
    flat = torch.full((1, 3, 3, 3), 0.5, dtype=torch.float64)
    flat[..., 0] -= 1e-9
    flat.requires_grad_()
    points, normals, has_surface = level_set(flat, 0.5, SlabSpec.cube(3), 9, seed=0)
    (points.sum() + normals.sum()).backward()
    assert has_surface.all() and flat.grad.isfinite().all()


def test_the_choice_of_points_repeats_and_changes_one_point_at_a_time():
    usable = torch.rand(1, 500, generator=torch.Generator().manual_seed(0)) < 0.4
    chosen, _ = choose_candidates(usable, 60, seed=3)
    assert usable[0, chosen[0]].all() and len(chosen[0].unique()) == 60
    assert torch.equal(chosen, choose_candidates(usable, 60, seed=3)[0]) and not torch.equal(
        chosen, choose_candidates(usable, 60, seed=4)[0]
    )
    usable[0, chosen[0, 7]] = False
    assert len(set(chosen[0].tolist()) ^ set(choose_candidates(usable, 60, seed=3)[0][0].tolist())) == 2
    few = torch.zeros(2, 100, dtype=torch.bool)
    few[0, [5, 8, 13]] = True
    chosen, usable_rows = choose_candidates(few, 7, seed=0)
    assert usable_rows[:, 0].tolist() == [True, False]
    assert sorted(chosen[0].bincount(minlength=100)[[5, 8, 13]].tolist()) == [2, 2, 3]


def test_a_shape_without_surface_is_zeros_without_gradient():
    for observation in (
        LevelSetPoints(spec=GRID, points=50),
        LiftedPoints(resolution=16, points=50, centre=(0.1, 0.0, 0.0)),
    ):
        field = sphere(RADIUS, -2.0)
        if isinstance(observation, LiftedPoints):
            field = Ball(field.r.clamp_min(1e-9) * 1.0)
            field.r.retain_grad()
        cloud = observation.observe(field)
        cloud.sum().backward()
        gradient = field.r.grad
        assert (
            cloud[1].abs().max() == 0
            and gradient[1] == 0
            and gradient.isfinite().all()
            and cloud[0].abs().max() > 0.3
        )


def test_our_clouds_depend_on_size_and_place_and_published_ones_do_not():
    ours = LevelSetPoints(spec=GRID, points=200)
    published = PublishedPoints(resolution=32, points=200)
    radius = ours.observe(sphere(0.2, 0.3))[:, :3].norm(dim=1).mean(dim=1)
    torch.testing.assert_close(radius, torch.tensor([0.4, 0.6]).double(), rtol=0, atol=0.01)
    cloud = torch.rand(2, 40, 3, dtype=torch.float64)
    torch.testing.assert_close(self_scaled(cloud * 3 + torch.tensor([1.0, -2.0, 0.5])), self_scaled(cloud))
    seen = published.observe(sphere(0.2)).detach()
    assert seen.shape == (1, *published.shape) and float(seen.abs().max()) == pytest.approx(0.999999)


def test_lifted_points_exclude_the_background():
    observation = LiftedPoints(resolution=48, points=300)
    field = Ball(torch.tensor([RADIUS], dtype=torch.float64), at=(0.05, 0.1, 0.0))
    cloud = observation.observe(field)[0] / 2  # world units
    torch.testing.assert_close(
        (cloud - torch.tensor([[0.05], [0.1], [0.0]])).norm(dim=0), torch.full((300,), RADIUS).double()
    )
    columns = lift(torch.ones(1, 1, 48, 48), CameraFamily().label())[0, :, 0].unique()
    assert len(columns) > 0 and len((cloud[0] * 1e4).round().unique()) > 100, (
        "points come from all columns of the image"
    )


def test_mirror_changes_only_x_of_positions_and_normals():
    cloud = torch.rand(2, 6, 10)
    mirrored = mirror(cloud, np.array([0.4, 0.6]))
    assert torch.equal(mirrored[1], cloud[1]) and torch.equal(
        mirrored[0, [1, 2, 4, 5]], cloud[0, [1, 2, 4, 5]]
    )
    assert torch.equal(mirrored[0, [0, 3]], -cloud[0, [0, 3]])
    assert torch.equal(mirror(mirrored, np.array([0.4, 0.6])), cloud)


@pytest.mark.parametrize(
    "observation",
    [
        LevelSetPoints(spec=GRID, points=9),
        LiftedPoints(resolution=20, points=9),
        PublishedPoints(points=100, seed=2),
    ],
)
def test_observations_survive_a_round_trip_through_json(observation):
    again = observations.from_dict(json.loads(json.dumps(observation.to_dict())))
    assert again == observation and type(again) is type(observation)


def test_another_generator_is_named():
    @dataclass
    class Other:
        bounds: Bounds = Bounds(2.0)
        cameras: CameraFamily = CameraFamily(radius=1.5)

    assert LevelSetPoints().misfits(Other()) == ["box_warp 1.0, got 2.0"]
    assert LiftedPoints().misfits(Other()) == ["radius 2.7, got 1.5", "box_side 1.0, got 2.0"]
    assert (
        LiftedPoints.from_generator(Other()).misfits(Other()) == []
        and LevelSetPoints.from_generator(Other(), crop=SlabSpec.crop).misfits(Other()) == []
    )
