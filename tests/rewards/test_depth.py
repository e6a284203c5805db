"""Rewards on depth maps from the command line: training, files, controls, errors; and properties of their
networks.
"""

import json
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from eg3d_rlhf.core.field import Bounds, CameraFamily
from eg3d_rlhf.generators import as_generator, ws_of_seeds
from eg3d_rlhf.models.resnet50 import ResNet50
from eg3d_rlhf.modes.reward_training import train as main
from eg3d_rlhf.preferences.dataset import with_permuted_shapes
from eg3d_rlhf.preferences.labels import Preference, write_labels
from eg3d_rlhf.rewards import observations
from eg3d_rlhf.rewards.cache import ObservationCache
from eg3d_rlhf.rewards.depth import (
    PUBLISHED_FOCAL,
    PUBLISHED_RESOLUTION,
    VIEWS,
    Depth,
    SmallDepth,
    build,
    mirror,
)
from eg3d_rlhf.rewards.evaluation import evaluate
from eg3d_rlhf.rewards.network_training import TrainData, train_reward
from eg3d_rlhf.rewards.reward import Reward, check_reward, load_reward
from eg3d_rlhf.rewards.settings import default_options, with_changes
from tests import tiny_runs
from tests.rejections import raising, rejected
from tests.rewards.ball import Ball
from torch_utils.ops.implementations import implementation

SIZE = 64


def far(seed):
    return np.random.RandomState(seed).uniform()


def humps(seeds):
    """Return a round hump per seed, whose position and height the seed determines, [N, 1, 2, 64, 64]."""
    y, x = np.meshgrid(np.linspace(-1, 1, SIZE), np.linspace(-1, 1, SIZE), indexing="ij")
    maps = []
    for seed in seeds:
        height, cx, cy = far(seed), *np.random.RandomState(seed + 1).uniform(-0.2, 0.2, 2)
        distance = (x - cx) ** 2 + (y - cy) ** 2
        seen = distance < 0.6
        maps.append(np.stack([seen * (0.4 + 0.2 * height * np.exp(-distance * 3)), seen]))
    return torch.tensor(np.stack(maps)[:, None], dtype=torch.float32)


def pairs(count, start=0):
    each = [sorted((a, a + 1), key=far, reverse=True) for a in range(start, start + 2 * count, 2)]
    return [Preference(winner=w, loser=l, clean=w) for w, l in each]


def trained(labels, options):
    store = ObservationCache(humps)
    train = labels[:96]
    val = labels[96:120]
    test = labels[120:]
    store.fill(s for label in labels for s in (label.winner, label.loser))
    train_state = train_reward(TrainData(train=train, val=val, store=store, observation=Depth()), options)
    return evaluate(train_state.model, store, test)["labels"]["accuracy"]


@pytest.mark.long
def test_the_small_network_learns_and_its_control_does_not():
    options = with_changes(default_options("small", "depth"), epochs=3)
    assert trained(pairs(200), options) > 0.85
    assert trained(with_permuted_shapes(pairs(200)), with_changes(options, epochs=1)) == pytest.approx(
        0.5, abs=0.2
    )


def test_wrong_faces_are_other_labelled_faces_and_depend_on_the_seed():
    labels = [
        Preference(winner=a, loser=b, clean=c, psi=0.7)
        for a, b, c in ((1, 2, 1), (3, 1, 1), (2, 3, 3), (7, 9, 9))
    ]
    permuted = with_permuted_shapes(labels, seed=4)
    other = {
        old: new
        for a, b in zip(labels, permuted, strict=True)
        for old, new in ((a.winner, b.winner), (a.loser, b.loser))
    }
    for a, b in zip(labels, permuted, strict=True):
        assert (other[a.winner], other[a.loser], other[a.clean]) == (b.winner, b.loser, b.clean)
    assert set(other.values()) == set(other) and all(old != new for old, new in other.items())
    assert permuted == with_permuted_shapes(labels, seed=4) and [b.psi for b in permuted] == [0.7] * 4


@pytest.mark.parametrize("views", [1, 3])
def test_scores_do_not_depend_on_mirroring_or_on_other_samples(views):
    torch.manual_seed(0)
    network = SmallDepth(views=views, resolution=16).eval()
    maps = torch.rand(3, views, 2, 16, 16)
    network.calibrate(lambda: maps)
    with torch.no_grad():
        torch.testing.assert_close(network.score(maps), network.score(maps.flip(1, 4)), rtol=0, atol=1e-5)
        torch.testing.assert_close(network.score(maps)[1:2], network.score(maps[1:2]), rtol=0, atol=1e-5)
        swapped = network.pair_margin(network.embed(maps[:1]), network.embed(maps[1:2]))
        torch.testing.assert_close(
            swapped, -network.pair_margin(network.embed(maps[1:2]), network.embed(maps[:1]))
        )


@pytest.fixture(scope="module")
def labels(tmp_path_factory):
    return write_labels(
        tmp_path_factory.mktemp("labels") / "labels.jsonl",
        [Preference(winner=s, loser=s + 1) for s in range(0, 24, 2)],
    )


def run(*flags):
    return CliRunner().invoke(
        main,
        ["--observation=depth", "--set=any_generator=true", "--device=cpu", *(str(flag) for flag in flags)],
    )


@pytest.fixture(scope="module")
def reward(labels, tiny_networks, tmp_path_factory):
    """Train a reward that reads three views of the tiny generator."""
    out = tmp_path_factory.mktemp("depth") / "run"
    flags = ("--epochs=1", "--set=fractions=0.5 0.25 0.25")
    result = run(
        "--preset=small-3", f"--network={tiny_networks}", f"--labels={labels}", f"--run-dir={out}", *flags
    )
    assert result.exit_code == 0, result.output
    assert re.search(r"\b\d+/\d+ = [01]\.\d{3}\b", result.output)  # of the test pairs
    return out / "reward.safetensors"


def test_the_file_states_the_observation(reward):
    description = json.loads(reward.with_suffix(".json").read_text())
    assert description["observation"]["kind"] == "depth" and description["observation"]["yaws"] == [
        1.0,
        0.0,
        -1.0,
    ]
    assert description["network"]["extractor"] == "small" and "wrong_faces" not in description["provenance"]
    assert load_reward(reward).observation.shape == (3, 2, 64, 64)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """Write weights of a ResNet-50 in the form of torchvision."""
    torch.manual_seed(5)
    path = tmp_path_factory.mktemp("backbone") / "resnet50.pth"
    torch.save(
        {**ResNet50().state_dict(), "fc.weight": torch.zeros(1000, 2048), "fc.bias": torch.zeros(1000)}, path
    )
    return path


def test_the_backbone_stays_out_of_files_and_in_eval_mode(backbone, tmp_path, monkeypatch):
    network = build({"extractor": "resnet50", "views": 1, "backbone": str(backbone)}).train()
    assert not network.external.training and not any(
        name.startswith("external") for name in network.state_dict()
    )
    buffers = {name: value.clone() for name, value in network.external.state_dict().items()}
    maps = torch.rand(1, 1, 1, 16, 16)
    network(maps).scalar.sum().backward()
    tiny_runs.assert_same(buffers, network.external.state_dict())
    assert all(
        (p.grad is None) == name.startswith(("external", "scalar_rwd_head_"))
        for name, p in network.named_parameters()
    )
    again = build(network.describe())
    again.load_state_dict(network.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(again.eval().score(maps), network.eval().score(maps), rtol=0, atol=0)
    moved = backbone.rename(tmp_path / "moved.pth")
    with raising("--backbone", str(backbone), kind=FileNotFoundError):
        build(network.describe())
    monkeypatch.setenv("EG3D_RLHF_BACKBONE", str(moved))
    assert build(network.describe()).describe() == network.describe()
    other = ResNet50().state_dict()
    torch.save({**other, "bn1.bias": other["bn1.bias"] + 1}, moved)
    with raising("--backbone", str(moved), network.describe()["backbone_sha256"][:12]):
        build(network.describe())


def test_mistakes_are_one_line_and_write_nothing(labels, tiny_networks, tmp_path):
    weights = tmp_path / "other.pth"
    torch.save({"conv1.weight": torch.zeros(64, 3, 3, 3)}, weights)
    for flags, names in (
        (["--preset=resnet50"], ("--backbone", "ResNet-50", "none")),
        (["--preset=resnet50", f"--backbone={tmp_path / 'none.pth'}"], ("--backbone", "none.pth")),
        (["--preset=resnet50", f"--backbone={weights}"], ("other.pth", "missing: bn1.bias")),
        ([f"--backbone={weights}"], ("--backbone", "small", "other.pth")),
        (["--resolution=32"], ("[1, 2, 64, 64]",)),
        (["--crop", *[0.1] * 6], ("--crop", "depth", "(0.1, 0.1, ")),
        (["--preset=heads"], ("'heads'",)),
    ):
        result = run(
            *flags, f"--network={tiny_networks}", f"--labels={labels}", f"--run-dir={tmp_path / 'run'}"
        )
        rejected(result, *names)
        assert not (tmp_path / "run").exists()


# Depth maps: closed forms, gradients through the renderer, shared synthesis for all views, and rejected
# generators.


PIXELS = 32


def small(views: int = 1) -> SmallDepth:
    torch.manual_seed(1)
    return SmallDepth(views=views, resolution=PIXELS).eval()


def test_depth_follows_a_ball_that_moves():
    centres = torch.zeros(1, 3)
    for moved in (0.02, -0.05):
        maps_before, maps_after = (
            Depth(resolution=PIXELS, masked=False, near=2.2, far=3.2, pivot=(0.0, 0.0, 0.0)).observe(
                Ball(centre)
            )[0, 0, 0]
            for centre in (centres, centres + torch.tensor([0.0, 0.0, moved]))
        )
        middle = slice(PIXELS // 2 - 2, PIXELS // 2 + 2)
        assert (maps_after - maps_before)[middle, middle].mean().item() == pytest.approx(
            moved / (3.2 - 2.2), rel=0.05
        ), "nearer is brighter"


@pytest.mark.parametrize("views", [1, 3])
def test_a_shapes_reward_has_the_gradient_of_central_differences(views):
    """Compare the gradient through both passes of the renderer with central differences."""
    observation = Depth(
        yaws=VIEWS[views], resolution=PIXELS, samples=64, near=2.2, far=3.2, pivot=(0.0, 0.0, 0.0)
    )
    network = small(views)

    def score(z):
        return network.score(
            observation.observe(Ball(torch.stack([torch.zeros_like(z), torch.zeros_like(z), z], dim=1)))
        ).sum()

    z = torch.tensor([-0.1], requires_grad=True)
    step = 0.002
    score(z).backward()
    with torch.no_grad():
        wanted = (score(z + step) - score(z - step)) / (2 * step)
    assert float(z.grad) == pytest.approx(float(wanted), rel=0.02)


def test_an_empty_scene_has_zero_values_and_finite_gradients():
    """Regression test: 0 / 0 in the marcher's mean depth made the gradients of all weights NaN."""
    centres = torch.tensor([[0.0, 0.0, 0.0], [9.0, 0.0, 0.0]], requires_grad=True)
    maps = Depth(resolution=8, near=2.2, far=3.2).observe(Ball(centres, size=0.01))
    assert maps[1].abs().max() < 1e-4 and maps.shape == (2, 1, 2, 8, 8)
    maps.sum().backward()
    assert centres.grad.isfinite().all()


@pytest.fixture(scope="module")
def generator(tiny_networks):
    return as_generator(tiny_runs.networks.load(tiny_networks).G_ema)


def test_views_of_a_sample_share_its_planes(generator, monkeypatch):
    calls = []
    synthesis = generator.module.backbone.synthesis.forward
    monkeypatch.setattr(
        generator.module.backbone.synthesis, "forward", lambda *a, **k: calls.append(1) or synthesis(*a, **k)
    )
    observation = replace(Depth.from_generator(generator, views=3, resolution=PIXELS), samples=4)
    reward = Reward(observation, small(3))
    ws = ws_of_seeds(generator, [1, 2]).requires_grad_()
    reward.score(generator.field(ws)).sum().backward()
    assert calls == [1] and ws.grad.abs().sum() > 0


def test_observations_repeat_and_keep_the_global_random_state(generator):
    observation = replace(Depth.from_generator(generator, resolution=8), samples=4)
    field = generator.field(ws_of_seeds(generator, [1]))
    torch.manual_seed(3)
    numbers_before = torch.rand(4)
    torch.manual_seed(3)
    assert torch.equal(observation.observe(field), observation.observe(field)) and torch.equal(
        numbers_before, torch.rand(4)
    )


def test_mirrored_views_change_places(generator):
    maps = torch.rand(2, 3, 2, 8, 8)
    assert torch.equal(mirror(mirror(maps)), maps) and torch.equal(mirror(maps)[:, 0], maps[:, 2].flip(-1))
    seen = Depth.from_generator(generator, views=3).augment(maps, np.array([0.1, 0.9]))
    assert torch.equal(seen[0], mirror(maps)[0]) and torch.equal(seen[1], maps[1])
    ball = torch.tensor([[0.1, 0.05, 0.0]])
    observation = Depth(yaws=VIEWS[3], resolution=PIXELS, near=2.2, far=3.2, pivot=(0.0, 0.0, 0.0))
    left, right = (
        observation.observe(Ball(centre)) for centre in (ball, ball * torch.tensor([-1.0, 1.0, 1.0]))
    )
    assert (mirror(left) - right).abs().mean() < 0.1 * left.abs().mean(), "up to the jitter of the rays"
    assert (left - right).abs().mean() > 0.5 * left.abs().mean()


def stand_in(**cameras):
    return SimpleNamespace(cameras=CameraFamily(**cameras), bounds=Bounds())


def test_a_generators_own_rays_and_cameras():
    ffhq = Depth.from_generator(stand_in(pivot=(0.0, 0.0, 0.2), span=(2.25, 3.3)), views=3, published=True)
    assert (ffhq.near, ffhq.far, ffhq.focal, ffhq.resolution, ffhq.samples) == (
        2.25,
        3.3,
        PUBLISHED_FOCAL,
        PUBLISHED_RESOLUTION,
        None,
    )
    assert ffhq.shape == (3, 1, 128, 128) and ffhq.pivot == (0.0, 0.0, 0.2)
    assert (Depth.from_generator(stand_in()).near, Depth.from_generator(stand_in()).far) == pytest.approx(
        (2.2, 3.2)
    )
    again = observations.from_dict(ffhq.to_dict())
    assert again == ffhq


def test_generators_without_depth_maps_are_rejected_in_one_line():
    for names, cameras, views in (
        (("--observation=depth", "0.5"), {"radius": 0.5}, 1),
        (("views", "1 or 3", " 2."), {}, 2),
    ):
        with raising(*names):
            Depth.from_generator(stand_in(**cameras), views=views)
    observation = Depth.from_generator(stand_in(), resolution=PIXELS)
    assert observation.misfits(stand_in()) == [] and len(observation.misfits(stand_in(radius=3.0))) == 2
    with raising("--reward-ckpt", "rays", "(2.2, 3.2)", "(1, 5)"):
        check_reward(Reward(observation, small()), stand_in(span=(1, 5)), "--reward-ckpt")


@pytest.mark.parametrize("kind", ["depth", "lifted-points"])
def test_training_may_render_maps_with_compiled_ops(kind, generator):
    """Stored values in half precision differ in their last bit at most; slabs use torch alone, which is
    bitwise repeatable.
    """
    assert observations.OBSERVATIONS["sigma"].ops == "torch" and observations.OBSERVATIONS[kind].ops == "auto"
    observation = observations.OBSERVATIONS[kind].from_generator(as_generator(generator), resolution=24)
    field = as_generator(generator).field(ws_of_seeds(as_generator(generator), [3, 4], 0.7, 14))
    with torch.no_grad():
        fast = observation.observe(field)
        with implementation("torch"):
            reference = observation.observe(field)
    torch.testing.assert_close(fast, reference, rtol=1e-3, atol=1e-4)
