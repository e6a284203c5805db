"""Scores across generators: copies of the bundled one in other worlds are recovered, strange shapes are
called so, the page is made.
"""

import dataclasses
import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from eg3d_rlhf.core import bundled
from eg3d_rlhf.core.field import Bounds, RenderOptions, render_each
from eg3d_rlhf.core.spec import SlabSpec
from eg3d_rlhf.evaluation import foreign_scores as fs
from eg3d_rlhf.evaluation.foreign_scores import align, calibrate_density
from eg3d_rlhf.generators import load_generator, ws_of_seeds
from eg3d_rlhf.generators.placed import Placed, Placement, Similarity, scaled_density, ws_of_placed
from eg3d_rlhf.modes.score import main
from eg3d_rlhf.rewards.observations import observation_of
from eg3d_rlhf.rewards.reward import Reward, load_reward
from tests.generators.foreign import Foreign
from tests.rejections import raising, rejected

COPIES = {
    "scaled": {"scale": 1.3, "shift": (0.0, 0.05, -0.1)},
    "moved": {"shift": (0.03, -0.02, 0.04)},
    "mirrored": {"mirrored": True},
    "rescaled": {"gain": 4.0},
    "all": {"scale": 0.8, "shift": (-0.1, 0.02, 0.06), "mirrored": True, "gain": 0.5},
}
OPTIONS = fs.ScoreOptions(n=32, fit=12, known=32, resolution=40)


# Keys of moves.
SIDEWAYS = "half a voxel sideways"
UP = "half a voxel up"
FORWARD = "half a voxel forward"


@pytest.fixture(scope="module")
def reference():
    return load_generator()


@pytest.fixture(scope="module")
def trial(reference):
    made = {name: Foreign(reference.generator, **how) for name, how in COPIES.items()}
    copies = {name: dataclasses.replace(reference, generator=one, hash=name) for name, one in made.items()}
    return fs.Trial(
        reward=load_reward(bundled.REWARD),
        reward_hash="r",
        reference=reference,
        networks=copies,
        options=OPTIONS,
    )


@pytest.mark.parametrize(
    "name", ["scaled", *(pytest.param(one, marks=pytest.mark.long) for one in list(COPIES)[1:])]
)
def test_copies_are_recovered(trial, name):
    generator = trial.networks[name].generator
    truth = {"scale": 1.0, "shift": (0.0, 0.0, 0.0), **COPIES[name]}
    places, result = trial.placements(generator)
    assert result.similarity.scale == pytest.approx(truth["scale"], rel=0.01)
    np.testing.assert_allclose(result.similarity.shift, truth["shift"], atol=0.01 * generator.bounds.side)
    assert result.residual < 0.005
    calibrated = trial.measure_seeds(Placed(generator, places["calibrated"]), trial.seeds)
    assert np.corrcoef(calibrated.scores, trial.reference_measured.scores)[0, 1] >= 0.99
    assert trial.share_outside(calibrated.embedding) <= 0.1 + trial.share_outside(
        trial.reference_measured.embedding
    )


@pytest.mark.long
def test_the_finding_of_a_copy_says_what_it_is_worth(trial, tmp_path):
    small = dataclasses.replace(
        trial, options=dataclasses.replace(OPTIONS, n=16, fit=8, known=16, resolution=32)
    )
    result = fs.score(small, "rescaled", tmp_path)
    data = json.loads(json.dumps(result.data))
    assert data["reference"]["calibrated"]["mean"] > 0.95 and len(data["scores"]["raw"]) == 16
    assert set(data["agreement"]) == {"mirrored", SIDEWAYS, UP, FORWARD, "ψ 0.5"}
    assert data["agreement"]["ψ 0.5"]["mean"] < 1
    assert (tmp_path / next(iter(result.images.values()))).stat().st_size > 1000
    fs.plot_scores(
        {"networks": {"a": data["summary"]}, "reference": fs.summarise(small.reference_measured.scores)}
    )


def test_strange_shapes_lie_outside_and_unsteady_ranks_are_said(trial):
    data = {
        "alignment": {"scale": 1.0, "shift": (0, 0, 0), "residual": 0.1},
        "outside": dict.fromkeys(fs.STAGES, 0.7),
        "summary": dict.fromkeys(fs.STAGES, fs.summarise(np.arange(5.0))),
        "agreement": {
            "mirrored": {"mean": 0.5},
            UP: {"mean": 0.9},
            SIDEWAYS: None,
            "ψ 0.5": {"mean": 0.1},
        },
    }
    lines = fs.describe_scores(data)
    inside = fs.describe_scores({**data, "outside": dict.fromkeys(fs.STAGES, 0.1)})
    assert len(lines) == len(inside) + 1 and lines[0] not in inside  # a warning stands first
    assert "mirrored" in lines[-1] and SIDEWAYS in lines[-1] and UP not in lines[-1] and "ψ" not in lines[-1]
    steady = fs.describe_scores({**data, "agreement": {"mirrored": {"mean": 0.99}, "ψ 0.5": {"mean": 0.1}}})
    assert len(steady) == len(lines) - 1
    known = trial.reference_measured.embedding
    assert trial.share_outside(known + 100) == 1.0 and trial.share_outside(known) < 0.5


def test_a_place_is_a_change_of_coordinates(reference):
    """Density at points, on grids and in cameras agree with each other, and a placed foreign copy is the
    original.
    """
    inner = reference.generator
    ws = ws_of_seeds(inner, [1], 0.7)
    how = {"scale": 1.3, "shift": (0.0, 0.05, -0.1), "mirrored": True}
    place = Placement(Similarity(1.3, how["shift"]), inner.bounds, mirrored=True)
    back = Placed(Foreign(inner, **how), place).field(ws)
    spec = SlabSpec.from_bounds(inner.bounds, 20, crop=(0.3, 0.1, 0.2, 0.1, 0.3, 0.0))
    own = inner.field(ws).density_grid(spec)
    torch.testing.assert_close(back.density_grid(spec), own, rtol=1e-3, atol=1e-2)
    torch.testing.assert_close(
        back.density(spec.points().reshape(-1, 3)).unflatten(1, spec.shape), own, rtol=1e-3, atol=1e-2
    )
    mirrored = Placed(inner, Placement(mirrored=True, bounds=inner.bounds)).field(ws)
    (seen,) = render_each(mirrored, [inner.cameras.label(0.4)], RenderOptions(resolution=12))
    (other,) = render_each(inner.field(ws), [inner.cameras.label(-0.4)], RenderOptions(resolution=12))
    torch.testing.assert_close(seen.depth, other.depth.flip(-1), rtol=1e-3, atol=1e-2)


def test_a_reward_of_depth_sees_a_foreign_copy_as_the_original(reference):
    inner = reference.generator
    own = inner.cameras
    away = Placement(
        Similarity(1 / 1.3, (0.1 / 1.3, 0.0, 0.0)),
        Bounds(1.3 * inner.bounds.side, (-0.1, 0.0, 0.0)),
        cameras=dataclasses.replace(own, radius=1.3 * own.radius),
    )
    foreign = Placed(inner, away)
    depth = observation_of("depth", inner, resolution=16)
    assert depth.misfits(foreign) and not depth.misfits(
        placed := Placed(foreign, Placement(Similarity(1.3, (-0.1, 0, 0)), cameras=own))
    )
    ws = ws_of_placed(foreign, [1], 0.7, 14)
    assert torch.equal(ws, ws_of_seeds(inner, [1], 0.7))
    torch.testing.assert_close(
        depth.observe(placed.field(ws)), depth.observe(inner.field(ws)), rtol=1e-2, atol=1e-2
    )


def test_scaled_density_keeps_optical_depth():
    sigma = torch.tensor([-40.0, -16, -3, 0, 1, 10, 300], dtype=torch.float64)
    before, after = (torch.nn.functional.softplus(value - 1) for value in (sigma, scaled_density(sigma, 1.7)))
    torch.testing.assert_close(after, 1.7 * before, rtol=1e-5, atol=0)
    torch.testing.assert_close(scaled_density(sigma, 1.0), sigma, rtol=1e-5, atol=1e-5)
    assert scaled_density(torch.tensor([100.0]), 2.0).item() == pytest.approx(199)


def test_alignment_ignores_what_one_surface_lacks():
    rng = np.random.default_rng(0)
    sphere = rng.normal(size=(3000, 3))
    sphere /= np.linalg.norm(sphere, axis=1, keepdims=True)
    lacking = sphere[sphere[:, 1] > -0.8]
    result = align(lacking * 2 + [1, 0, 0], sphere)
    assert (
        result.similarity.scale == pytest.approx(2, rel=0.02)
        and np.abs(np.subtract(result.similarity.shift, (1, 0, 0))).max() < 0.04
    )


def test_densities_get_the_references_quantiles_and_the_level_its_level():
    rng = np.random.default_rng(0)
    theirs = np.exp(rng.normal(3, 1, 50_000)) - 10
    ours = rng.normal(5, 20, 40_000)
    mapping = calibrate_density(theirs, ours, 12.0, 10.0)
    assert mapping(torch.tensor([12.0])).item() == pytest.approx(10, abs=1e-4)
    made = mapping(torch.from_numpy(theirs)).numpy()
    for q in (0.1, 0.5, 0.9):
        assert np.quantile(made[theirs > 12], q) == pytest.approx(np.quantile(ours[ours > 10], q), abs=0.3)
        assert np.quantile(made[theirs < 12], q) == pytest.approx(np.quantile(ours[ours < 10], q), abs=0.3)
    rising = mapping(torch.linspace(-50, 800, 2000))
    assert (rising.diff() > 0).all()
    with raising("64", "0 densities"):
        calibrate_density(theirs, ours, 1e9, 10.0)


def run(*flags):
    return CliRunner().invoke(main, [str(flag) for flag in flags])


@pytest.fixture
def small(tiny_networks, tiny_reward, tmp_path):
    where = ["--device=cpu", f"--outdir={tmp_path / 'page'}"]
    return [f"--network={tiny_networks}", f"--reward={tiny_reward}", f"--reference={tiny_networks}", *where]


def test_mistakes_are_one_line(small, tmp_path):
    for flags, names in (
        ([f"--reward={tmp_path / 'none.safetensors'}"], ("--reward: ", "none.safetensors")),
        ([f"--network={tmp_path / 'none'}"], ("--network: ", str(tmp_path / "none"))),
        ([f"--reference={tmp_path / 'none'}"], ("--reference: ", str(tmp_path / "none"))),
        (["--set=fit=4"], ("fit", "4")),
    ):
        rejected(run(*small, *flags), *names)
        assert not (tmp_path / "page").exists()


def test_the_reference_is_the_generator_that_the_reward_names(reference, tmp_path):
    """It is never the bundled one by default, unless the reward was trained on its shapes."""
    reward = load_reward(bundled.REWARD)
    copied = tmp_path / "copy.safetensors"
    copied.write_bytes(bundled.GENERATOR.read_bytes())
    assert fs.load_trial([], None, None, "cpu", OPTIONS).reference.path == bundled.GENERATOR
    other = "0" * 64
    for name, provenance, names in (
        ("foreign", {**reward.provenance, "generator": other}, ("foreign.safetensors", other[:12])),
        ("nameless", {}, ("nameless.safetensors",)),
    ):
        path = Reward(reward.observation, reward.network, provenance).save(tmp_path / f"{name}.safetensors")
        with raising("--reference", *names):
            fs.load_trial([copied], path, None, "cpu", OPTIONS)
        found = fs.load_trial([], path, copied, "cpu", OPTIONS)
        assert found.reference.path == copied and [n.path for n in found.networks.values()] == [copied]


def test_outside_its_cube_a_generator_is_empty(reference):
    inner = reference.generator
    shown = Placed(inner, Placement(bounds=Bounds(2.0))).field(ws_of_seeds(inner, [1], 0.7))
    far = shown.density(torch.tensor([[0.0, 0.0, 0.9], [0.0, 0.0, 0.0]]))
    assert far[0, 0] < shown.level - 900 < far[0, 1]
    spec = SlabSpec.from_bounds(Bounds(2.0), 21)
    grid = shown.density_grid(spec)
    outer = spec.points().abs().amax(dim=-1) > 0.51
    assert (grid[0, outer] == grid[0, ~outer].min()).all()
