"""The crop of a density grid follows the generator: bundled, EG3D FFHQ or measured; reports of it."""

import json
import math

import pytest
import torch
from click.testing import CliRunner

from eg3d_rlhf.core.field import Bounds
from eg3d_rlhf.core.spec import SlabSpec
from eg3d_rlhf.experiments import version_0_1
from eg3d_rlhf.generators import as_generator, load_generator, load_networks, ws_of_seeds
from eg3d_rlhf.generators.density_samples import sample_density
from eg3d_rlhf.modes.reward_crop import crop_command
from eg3d_rlhf.modes.reward_training import train as train_reward
from eg3d_rlhf.preferences.labels import Preference, write_labels
from eg3d_rlhf.rewards import crop_report
from eg3d_rlhf.rewards.observations import observation_of
from eg3d_rlhf.rewards.reward import load_reward
from eg3d_rlhf.rewards.slab_crops import (
    BUNDLED_CROPS,
    PAPER_CROP,
    choose_crop,
    measured_crop,
    recognised,
    surface_inside,
)
from tests.generators.density_balls import BallGenerator, ellipsoid_networks
from tests.generators.pickles.writer import SnapshotWriter, stock_networks
from tests.rejections import raising, rejected
from training import networks

# A head at the pivot of EG3D FFHQ: z from -0.19 to 0.39.
CENTRE = (0.0, 0.02, 0.1)
AXES = (0.2, 0.26, 0.29)


def ellipsoid_points(count: int = 20_000) -> torch.Tensor:
    """Points on the ellipsoid [count, 3], in world units."""
    directions = torch.nn.functional.normalize(
        torch.randn(count, 3, generator=torch.Generator().manual_seed(0)), dim=1
    )
    return directions * torch.tensor(AXES) + torch.tensor(CENTRE)


def share_inside(points: torch.Tensor, spec: SlabSpec) -> float:
    """Share of world points inside the outermost grid points of a slab."""
    corners = [(float(axis[0]), float(axis[-1])) for axis in spec.axes()]
    inside = torch.ones(len(points), dtype=torch.bool)
    for axis, (low, high) in enumerate(corners):
        inside &= (points[:, axis] >= low) & (points[:, axis] <= high)
    return float(inside.double().mean())


def small(cfg: str):
    """Networks of a preset with few channels and one head."""
    return ellipsoid_networks(cfg, CENTRE, AXES, 128, cbase=1024, cmax=8)


def test_the_bundled_generator_and_what_was_tuned_from_it_have_its_crop(tmp_path):
    nets = load_networks(load_generator().path)
    assert recognised(as_generator(nets.G_ema)) == "bundled"
    with torch.no_grad():
        for parameter in nets.G_ema.parameters():
            parameter.add_(1e-3)
    # training adds this buffer
    nets.G_ema.register_buffer("dataset_label_std", torch.ones(25))
    tuned = as_generator(nets.G_ema)
    assert choose_crop([tuned]).crop == BUNDLED_CROPS["sigma"]
    assert observation_of("sigma", tuned).shape == (1, 39, 45, 36)
    assert observation_of("points", tuned).spec.crop == BUNDLED_CROPS["points"]


def test_ffhq_is_recognised_by_its_rendering_options_alone():
    generator = as_generator(small("ffhq").G_ema)
    assert recognised(generator) == "ffhq"
    assert observation_of("sigma", generator, resolution=256).spec == SlabSpec()
    assert recognised(as_generator(stock_networks().G_ema)) == "ffhq"
    for cfg in ("afhq", "shapenet"):
        assert recognised(as_generator(small(cfg).G_ema)) is None


@pytest.mark.parametrize(
    "name,value", [("avg_camera_radius", 2.6), ("box_warp", 2), ("avg_camera_pivot", [0, 0, 0])]
)
def test_other_rendering_options_are_not_ffhq(name, value):
    generator = as_generator(small("ffhq").G_ema)
    options = generator.module.rendering_kwargs
    before = options[name]
    try:
        options[name] = value
        assert recognised(generator) is None
    finally:
        options[name] = before


@pytest.mark.parametrize(
    "centre,radius,bounds",
    [
        ((0.0, 0.05, 0.2), 0.25, Bounds()),
        ((0.1, -0.3, 0.0), 0.15, Bounds()),
        ((0.0, 0.0, -0.2), 0.6, Bounds(1.6)),
        ((0.4, -0.2, 1.3), 0.5, Bounds(2.0, (0.5, 0.0, 1.0))),
    ],
)
def test_a_measured_crop_contains_the_surface(centre, radius, bounds):
    generator = BallGenerator(centre=centre, radius=radius, bounds=bounds)
    choice = choose_crop([generator])
    assert (choice.origin, choice.level) == ("measured", 10.0)
    assert observation_of("sigma", generator).spec == SlabSpec.from_bounds(bounds, 64, crop=choice.crop)
    for resolution in (32, 64, 256):
        spec = SlabSpec.from_bounds(bounds, resolution, crop=choice.crop)
        points = torch.nn.functional.normalize(
            torch.randn(5000, 3, generator=torch.Generator().manual_seed(1)), dim=1
        ) * radius + torch.tensor(centre)
        assert share_inside(points, spec) == 1
    x_low, x_high, y_low, y_high, z_low, z_high = choice.crop
    assert x_low == x_high  # training mirrors left and right
    assert all(low + high <= 0.5 for low, high in ((x_low, x_high), (y_low, y_high), (z_low, z_high)))
    # no larger than needed: half of the cube, or the ball with the margin of two grid points
    y_edge = (1 - y_low - y_high) * bounds.side
    assert y_edge <= max(0.5 * bounds.side, 2 * radius + 0.13 * bounds.side) + 1e-6


def test_single_specks_do_not_enlarge_the_box():
    samples = sample_density(BallGenerator(centre=(0, 0, 0.1)))
    expected = measured_crop(samples, 10.0)
    samples.cubes[0, 3, 3, 3] = 50
    assert measured_crop(samples, 10.0) == expected


def test_a_network_without_a_surface_is_measured_at_the_proposed_level():
    generator = BallGenerator(centre=(0, 0, 0.15), peak=5.0, radius=0.2)
    generator.slope = 25
    choice = choose_crop([generator])
    assert choice.level is not None and choice.level < 5
    assert choose_crop([generator], level=choice.level).crop == choice.crop
    generator.slope = 0
    assert choose_crop([generator]).crop == (0,) * 6


def test_the_crop_of_several_generators_contains_all_their_shapes():
    generators = [BallGenerator(centre=(0, y, 0), radius=0.2) for y in (-0.25, 0.25)]
    crops = [choose_crop([generator]).crop for generator in generators]
    assert choose_crop(generators).crop == tuple(map(min, *crops)) != crops[0]


def test_the_report_counts_the_surface_of_a_reward(tmp_path):
    generator = BallGenerator(radius=0.3)
    half = SlabSpec(resolution=64, crop=(0, 0, 0, 0, 0.5, 0))  # the front half
    report = crop_report.compute(generator, half)
    assert report["inside"] == pytest.approx(0.5, abs=0.02) and report["level"] == 10.0
    assert report["box"][2] == pytest.approx([32 / 63 - 0.5, 0.5]) and report["cube"][0] == [-0.5, 0.5]
    for view in report["views"].values():
        counts = torch.tensor([view["inside"], view["outside"]])
        assert counts.sum() == report["points"] and counts.shape == (2, 64, 64)
    # rows of the side view are y, columns are z: everything inside lies in the right half
    side = torch.tensor(report["views"]["side"]["inside"])
    assert side[:, :32].sum() == 0 and side[:, 33:].sum() > 0
    json_path, png_path = crop_report.write(report, tmp_path)
    assert json.loads(json_path.read_text()) == report and png_path.read_bytes()[:4] == b"\x89PNG"
    empty = crop_report.compute(BallGenerator(peak=5.0, radius=math.inf), half)
    assert empty["inside"] is None and crop_report.summary(empty)


def test_command_draws_the_crop(tmp_path):
    result = CliRunner().invoke(crop_command, [f"--outdir={tmp_path / 'a'}"])
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "a" / "crop.json").read_text())
    assert tuple(report["crop"]) == BUNDLED_CROPS["sigma"] and 0.4 < report["inside"] < 0.8
    assert (tmp_path / "a" / "crop.png").is_file()
    flags = [f"--outdir={tmp_path / 'b'}", *"--crop 0 0 0 0 0 0".split()]
    assert CliRunner().invoke(crop_command, flags).exit_code == 0
    assert json.loads((tmp_path / "b" / "crop.json").read_text())["inside"] == 1
    assert CliRunner().invoke(crop_command, [*flags, "--set", "level=3"]).exit_code == 0
    assert json.loads((tmp_path / "b" / "crop.json").read_text())["level"] == 3
    rejected(CliRunner().invoke(crop_command, [*flags[:1], "--set", "level=1000"]), "level=1000")


def labels_of(path, generator_hash: str, count: int = 14):
    """File of labels of disjoint pairs."""
    return write_labels(
        path, [Preference(winner=2 * i, loser=2 * i + 1, generator=generator_hash) for i in range(count)]
    )


def dry_run(*flags: str) -> dict:
    """Return the settings that train_reward prints."""
    result = CliRunner().invoke(train_reward, [*flags, "--dry-run"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_settings_of_a_training_follow_the_network(tmp_path):
    files = {}
    for cfg in ("ffhq", "afhq"):
        files[cfg] = tmp_path / f"{cfg}.safetensors"
        networks.save(files[cfg], small(cfg))
    bundled = dry_run()
    assert (bundled["train"]["preset"], bundled["resolution"]) == ("heads", 64)
    assert tuple(bundled["crop"]) == BUNDLED_CROPS["sigma"]
    published = dry_run(f"--network={files['ffhq']}")
    assert (published["train"]["preset"], published["resolution"]) == ("paper", 256)
    assert tuple(published["crop"]) == PAPER_CROP
    quick = dry_run(f"--network={files['ffhq']}", "--preset=tiny")
    assert (quick["train"]["preset"], tuple(quick["crop"])) == ("tiny", PAPER_CROP)
    other = dry_run(f"--network={files['afhq']}")
    assert other["train"]["preset"] == "heads" and isinstance(other["crop"], str)
    given = dry_run(f"--network={files['afhq']}", *"--crop 0 0 0 0 0.1 0.2".split())
    assert given["crop"] == [0, 0, 0, 0, 0.1, 0.2]
    for flags in (["--observation=depth"], "--crop 0 0 0 0 0 0".split()):
        assert dry_run(*flags, "--set", "level=3")["level"] == 3


def test_a_training_records_its_measured_crop(tmp_path):
    """The default network takes the shape of the measured slab; the run, its reward and its report agree."""
    network = tmp_path / "afhq.safetensors"
    networks.save(network, small("afhq"))
    generator = load_generator(network)
    labels = labels_of(tmp_path / "labels.jsonl", generator.hash)
    run = tmp_path / "run"
    flags = [
        f"--network={network}",
        f"--labels={labels}",
        f"--run-dir={run}",
        "--epochs=1",
        "--resolution=32",
    ]
    result = CliRunner().invoke(train_reward, flags)
    assert result.exit_code == 0, result.output
    reward = load_reward(run / "reward.safetensors")
    crop = choose_crop([generator.generator]).crop
    assert reward.observation.spec.crop == crop
    assert tuple(reward.network.arch.slab_shape) == reward.observation.spec.shape != (39, 45, 36)
    assert tuple(json.loads((run / "training_options.json").read_text())["crop"]) == crop
    report = json.loads((run / "crop.json").read_text())
    assert tuple(report["crop"]) == crop and report["inside"] > 0.99 and (run / "crop.png").is_file()
    field = generator.generator.field(ws_of_seeds(generator.generator, [1]))
    assert reward.score(field).shape == (1,)
    rejected(
        CliRunner().invoke(train_reward, [*flags[:2], "--set", "level=5000", f"--run-dir={tmp_path / 'x'}"]),
        "level=5000",
    )


def test_runs_of_earlier_versions_keep_their_crop():
    run = {"mode": "reward", "observation": "sigma", "crop": None}
    assert version_0_1.options(run)["crop"] == list(PAPER_CROP)
    assert version_0_1.options({**run, "level": None})["crop"] is None
    assert version_0_1.options({**run, "observation": "depth"})["crop"] is None


def test_crops_are_checked_against_the_network():
    with raising("slab"):
        load_reward().network.check((1, 33, 36, 32))


@pytest.mark.long
def test_the_paper_s_crop_contains_a_face_of_ffhq(tmp_path, monkeypatch):
    """A stand-in for ffhq512-128.pkl: released sizes, names and rendering options, a head at FFHQ's pivot."""
    nets = ellipsoid_networks("ffhq", CENTRE, AXES)
    assert sum(parameter.numel() for parameter in nets.G_ema.parameters()) == 30_662_136
    monkeypatch.chdir(tmp_path)
    with open("ffhq512-128.pkl", "wb") as file:
        file.write(SnapshotWriter().snapshot(nets, ("G_ema",)))
    loaded = load_generator("ffhq512-128.pkl")
    generator = loaded.generator
    surface = ellipsoid_points()
    # the field is what it is meant to be
    sigma = generator.field(ws_of_seeds(generator, [3])).density(surface)
    assert (sigma - 10).abs().max() < 0.5
    in_front = surface[surface[:, 2] > -0.1]
    # the command of docs/guides/eg3d.md
    labels_of("labels.jsonl", loaded.hash, 8)
    command = ["--network=ffhq512-128.pkl", "--labels=labels.jsonl", "--run-dir=runs/reward"]
    settings = dry_run(*command)
    published = SlabSpec(resolution=settings["resolution"], crop=settings["crop"])
    assert published == SlabSpec() and share_inside(in_front, published) == 1
    result = CliRunner().invoke(train_reward, [*command, "--preset=tiny", "--epochs=1"])
    assert result.exit_code == 0, result.output
    read = load_reward("runs/reward/reward.safetensors").observation.spec
    assert read.crop == PAPER_CROP and share_inside(in_front, read) > 0.99
    samples = sample_density(generator)
    measured = SlabSpec(resolution=64, crop=measured_crop(samples, 10.0))
    assert share_inside(surface, measured) >= 0.99
    # the crop of the bundled generator ends where the face begins
    bundled = SlabSpec(resolution=64, crop=BUNDLED_CROPS["sigma"])
    assert share_inside(in_front, bundled) < 0.8 and share_inside(surface, bundled) < 0.8
    points = samples.surface_points(10.0)
    assert float(surface_inside(points, bundled).double().mean()) < 0.8
    assert float(surface_inside(points, measured).double().mean()) >= 0.99
