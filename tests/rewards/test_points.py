"""Properties of the networks on clouds of points, and a reward of each kind from labels to tuning."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from eg3d_rlhf.generators import load_generator, ws_of_seeds
from eg3d_rlhf.modes import reward_training
from eg3d_rlhf.modes.labels import synthetic
from eg3d_rlhf.rewards.networks import preset, readers_of
from eg3d_rlhf.rewards.observations.clouds import self_scaled
from eg3d_rlhf.rewards.observations.points import LevelSetPoints
from eg3d_rlhf.rewards.points import CurveNetArch, PointNetArch, build
from eg3d_rlhf.rewards.points.curves import onward
from eg3d_rlhf.rewards.points.neighbours import ball, farthest_points, nearest
from eg3d_rlhf.rewards.reward import Reward, load_reward
from tests import tiny_runs

OURS = ("pointnet", "pointnet2", "curvenet")


def network(name: str, kind: str = "points", double: bool = True, **changes):
    """A preset's network, in eval mode."""
    torch.manual_seed(0)
    model = build({**preset(name, kind).network, **changes}).eval()
    return model.double() if double else model


def clouds(n: int = 3, points: int = 160, channels: int = 6, seed: int = 0) -> torch.Tensor:
    """Noisy spheres of radius 0.6 with normals, float64."""
    normals = torch.nn.functional.normalize(torch.randn(n, 3, points, generator=torch.Generator().manual_seed(seed)).double(), dim=1)
    return torch.cat([0.6 * normals + 0.05 * normals.roll(1, dims=2), normals], dim=1)[:, :channels]


@pytest.mark.parametrize("name", OURS)
def test_no_sample_depends_on_another_and_a_batch_may_be_one(name):
    model, cloud = network(name), clouds()
    for training in (False, True):
        model.train(training)
        together = model.score(cloud)
        torch.testing.assert_close(together, torch.cat([model.score(one[None]) for one in cloud]), rtol=1e-9, atol=1e-12)
        assert torch.equal(together, model.score(cloud)), "two calls agree to the bit"
    assert len(together.unique()) == 3 and not list(model.buffers())


@pytest.mark.parametrize(
    ("kind", "name", "changes"),
    [
        ("points", "pointnet", {}), ("points", "pointnet2", {"limit": 160}), ("points", "curvenet", {}),
        ("published-points", "paper-pointnet", {}), ("published-points", "paper-pointnet2", {"limit": 160, "start": "farthest"}),
    ],
)  # fmt: skip
def test_the_order_of_points_does_not_matter(kind, name, changes):
    model = network(name, kind, **changes)
    cloud = clouds(channels=model.arch.inputs)
    shuffled = cloud[:, :, torch.randperm(cloud.shape[2], generator=torch.Generator().manual_seed(1))]
    close = 1e-6 if name != "curvenet" else 1e-3  # its balls take the lowest indices
    torch.testing.assert_close(model.score(shuffled), model.score(cloud), rtol=close, atol=close)


@pytest.mark.parametrize("name", OURS)
def test_size_and_place_of_a_shape_change_ours(name):
    model, cloud = network(name), clouds(1)
    larger, moved = cloud.clone(), cloud.clone()
    larger[:, :3] *= 1.1
    moved[:, :3] += 0.05
    assert abs(model.score(larger) - model.score(cloud)) > 1e-6 and abs(model.score(moved) - model.score(cloud)) > 1e-6


@pytest.mark.parametrize("name", ["paper-pointnet", "paper-pointnet2", "paper-curvenet"])
def test_the_published_normalisation_hides_size_and_place(name):
    model, cloud = network(name, "published-points").eval(), clouds(1, 256, channels=3).transpose(1, 2)
    first, other = (model.score(self_scaled(raw).transpose(1, 2)) for raw in (cloud, cloud * 2.5 + torch.tensor([0.3, -1.0, 2.0])))
    torch.testing.assert_close(other, first, rtol=1e-6, atol=1e-9)


def test_a_point_twice_changes_nothing_in_published_pointnet():
    model, cloud = network("paper-pointnet", "published-points"), clouds(2, channels=3)
    twice = torch.cat([cloud, cloud[:, :, 5:9]], dim=2)
    torch.testing.assert_close(model.score(twice), model.score(cloud), rtol=1e-12, atol=0)


def test_every_point_of_ours_gets_a_gradient_where_few_of_the_published_do():
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
    assert index.tolist() == [[[1, 2], [5, 5]]] and counts.tolist() == [[2, 1]], "lowest index first, the first fills up"
    assert nearest(line, 2)[0, :, 0].tolist() == list(range(6)) and nearest(line, 9).shape == (1, 6, 6)


def test_curves_do_not_turn_back():
    direction = torch.tensor([[[1.0], [0.0]]])  # [N, C, Q]
    steps = torch.tensor([[[[2.0, -3.0, 0.0, -1.0]], [[0.0, 0.0, 5.0, 1.0]]]])  # [N, C, Q, K]
    torch.testing.assert_close(onward(direction, steps), torch.tensor([[[1.0, 0.0, 1.0, 1 - 0.5**0.5]]]))


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in ("points", "lifted-points", "published-points")
                                            for name in readers_of(kind).presets])  # fmt: skip
def test_presets_are_rebuilt_from_json(kind, name):
    described = preset(name, kind).network
    assert build(json.loads(json.dumps(described))).describe() == described


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: build({"network": "dgcnn"}), "reward network: expected one of pointnet, pointnet2, curvenet, got 'dgcnn'"),
        (lambda: build({"network": "pointnet", "layers": 3}), "PointNetArch: expected its own fields"),
        (lambda: PointNetArch(norm="instance"), "PointNetArch.norm: expected one of batch, layer, got 'instance'"),
        (lambda: CurveNetArch(blocks=((10, 5, 0.1, 4, True),)), "CurveNetArch.blocks"),
        (lambda: Reward(LevelSetPoints(), build({"network": "pointnet"})), r"expected clouds of 3 channels per point, got \[6, 512\]"),
        (lambda: network("pointnet").score(torch.zeros(6, 9)), r"expected clouds \[N, 6, P\], got \[6, 9\]"),
    ],
)
def test_what_does_not_fit_is_refused(make, text):
    with pytest.raises(ValueError, match=text):
        make()


def succeed(command, *flags) -> str:
    result = CliRunner().invoke(command, [str(flag) for flag in flags])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def labels(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("labels") / "labels.jsonl"
    succeed(synthetic, "--pairs=16", "--resolution=24", f"--out={path}")
    return path


LONG = [pytest.param(*other, marks=pytest.mark.long) for other in (("points", "pointnet2"), ("lifted-points", "pointnet"))]


@pytest.mark.parametrize(("kind", "name"), [("points", "pointnet"), *LONG])
def test_it_trains_and_tunes(kind, name, labels, tmp_path):
    succeed(
        reward_training.train, f"--observation={kind}", f"--preset={name}", "--resolution=24", "--points=96", f"--labels={labels}",
        f"--out={tmp_path / 'reward'}", "--epochs=1", "--fractions", 0.5, 0.25, 0.25,
    )
    reward = load_reward(tmp_path / "reward" / "reward.safetensors")
    assert reward.observation.kind == kind and reward.observation.points == 96
    generator = load_generator().generator
    field = generator.field(ws_of_seeds(generator, [5]).requires_grad_())
    reward.score(field).sum().backward()
    assert field.ws.grad.isfinite().all() and field.ws.grad.abs().sum() > 0
    data = tiny_runs.write_dataset(tmp_path / "data.zip", resolution=64)
    flags = [
        f"--reward={kind}", "--lambda-r=1", f"--reward-ckpt={tmp_path / 'reward' / 'reward.safetensors'}", f"--data={data}", "--kimg=0.008",
        "--tick=0.008", "--no-summary", f"--outdir={tmp_path / 'runs'}", "--device=cpu",
    ]
    result = tiny_runs.run(*flags)
    assert result.exit_code == 0, result.output
    lines = (tiny_runs.only_run(tmp_path / "runs") / "stats.jsonl").read_text().splitlines()
    assert lines and all("RLHF/reward" in json.loads(line) for line in lines)


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--observation=sigma", "--points=9"], "--points: expected nothing for observation sigma, got 9"),
        (["--observation=lifted-points", "--crop", *[0.1] * 6], "--crop: expected nothing for observation lifted-points"),
        (["--observation=lifted-points", "--resolution=16", "--points=300"], "--points: expected at most the 256 pixels"),
        (["--observation=points", "--preset=heads"], "reward preset: expected one of pointnet, pointnet2, curvenet, got 'heads'"),
    ],
)
def test_bad_flags_are_one_line(flags, text, tmp_path):
    result = CliRunner().invoke(reward_training.train, [*(str(f) for f in flags), f"--out={tmp_path / 'run'}"])
    assert result.exit_code == 2 and text in result.stderr and "Traceback" not in result.stderr and not (tmp_path / "run").exists()
