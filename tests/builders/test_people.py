"""Test the basis of heads, the pool of their points, and the training of the bundled generator."""

import importlib.metadata
from unittest.mock import Mock

import numpy as np
import PIL.Image
import pytest

from builders import people_basis, people_renders, people_training
from builders.people_checks import check_backs, select_latents
from builders.people_pool import POINT_STEP, PoolOptions, draw_points
from builders.people_training import (
    FrontImages,
    FrontTraining,
    PeopleTraining,
    Pool,
    train,
    train_discriminator,
)
from tests.rejections import raising
from tests.training.test_people import head_distance, heads, latents
from training import networks
from training.heads import people
from training.heads.people_flaws import flaw_amounts

__all__ = ["heads", "latents"]


def test_without_its_package_the_basis_cannot_be_made(monkeypatch):
    monkeypatch.setattr(
        importlib.metadata, "version", Mock(side_effect=importlib.metadata.PackageNotFoundError)
    )
    with raising("anny=="):
        people_basis.build()
    monkeypatch.setattr(importlib.metadata, "version", Mock(return_value="0.1"))
    with raising("anny", "0.1"):
        people_basis.build()


@pytest.fixture(scope="module")
def pool(tmp_path_factory, latents, heads):
    """Write a pool with one small file of invented distances, since the package that computes true distances
    is not installed.
    """
    folder = tmp_path_factory.mktemp("pool")
    rng = np.random.default_rng(6)
    sizes = PoolOptions(face=100, eyes=50, rest=100, back=100, anywhere=50, walls=50)
    stored = [
        np.round(draw_points(head, people.load_basis(), sizes, rng) / POINT_STEP).astype(np.int16)
        for head in heads[:2]
    ]
    distance = [head_distance(head, at * POINT_STEP) for head, at in zip(heads, stored, strict=False)]
    colour = rng.integers(256, size=(2, sizes.total, 3)).astype(np.uint8)
    columns = {
        "z": latents[:2].astype(np.float32),
        "points": np.stack(stored),
        "distance": np.stack(distance).astype(np.float16),
    }
    np.savez(folder / "chunk-0000.npz", **columns, colour=colour)
    return folder


def test_a_run_that_goes_on_is_the_run_that_was_not_stopped(tmp_path, pool):
    points = {
        "heads": 2,
        "candidates": 300,
        "near": 80,
        "behind": 20,
        "hard": 20,
        "others": 20,
        "save_every": 1,
        "empty": 50,
        "debris": 10,
        "window": 8,
    }
    both = PeopleTraining(
        steps=(1, 1), lr=(0.01, 0.01), colour=(4.0, 4.0), planes=(64, 128), pictures=(0.0, 1.0), **points
    )
    first = PeopleTraining(steps=(1,), lr=(0.01,), colour=(4.0,), planes=(64,), pictures=(0.0,), **points)
    straight = networks.load(train(tmp_path / "straight", Pool(pool), both))
    train(tmp_path / "stopped", Pool(pool), first)
    went_on = networks.load(train(tmp_path / "stopped", Pool(pool), both))
    assert networks.state_hash(straight.G_ema) == networks.state_hash(went_on.G_ema)
    assert straight.cur_nimg == 4 and sum(p.numel() for p in straight.G.parameters()) < 600_000


def test_the_discriminator_learns_and_the_generator_stays(tmp_path, pool, monkeypatch):
    monkeypatch.setenv("EG3D_RLHF_CACHE", str(tmp_path))
    short = PeopleTraining(
        steps=(1,),
        lr=(0.01,),
        colour=(4.0,),
        planes=(64,),
        pictures=(0.0,),
        heads=2,
        candidates=300,
        near=80,
        behind=20,
        hard=20,
        others=20,
        empty=50,
        debris=10,
    )
    network = networks.load(train(tmp_path / "run", Pool(pool), short))
    before = [networks.state_hash(module) for module in (network.G_ema, network.D)]
    losses = train_discriminator(network, FrontTraining(data="synthetic:people64@n=4", steps=1, batch=4))
    after = [networks.state_hash(module) for module in (network.G_ema, network.D)]
    assert len(losses) == 1 and before[0] == after[0] and before[1] != after[1]


def test_the_fourth_edition_has_slices_and_another_damage(tmp_path, pool):
    sizes = {"heads": 2, "candidates": 300, "near": 80, "behind": 20, "hard": 20, "others": 20}
    common = {"steps": (1,), "lr": (0.01,), "colour": (4.0,), "planes": (64,), "pictures": (0.0,)}
    few = {**sizes, **common, "empty": 50, "debris": 10, "save_every": 1}
    third = networks.load(train(tmp_path / "3", Pool(pool), PeopleTraining(**few)))
    fourth = networks.load(
        train(tmp_path / "4", Pool(pool), PeopleTraining(**few, edition=4, plane_slices=2))
    )
    assert fourth.G_ema.plane_slices == 2 and "plane_slices" not in third.G_kwargs
    assert fourth.G_ema.state_dict().keys() == third.G_ema.state_dict().keys()
    assert networks.state_hash(third.G_ema) != networks.state_hash(fourth.G_ema)


def test_front_images_are_read_from_their_file(tmp_path, latents, monkeypatch):
    cache = tmp_path / "images.npz"
    first = FrontImages(latents[:2].astype(np.float32), 3, image_side=24, cache=cache)
    monkeypatch.setattr(people_training, "render_head", Mock(side_effect=AssertionError))
    again = FrontImages(latents[:2].astype(np.float32), 3, image_side=24, cache=cache)
    assert (first.images == again.images).all() and first.images.float().std() > 10
    with pytest.raises(AssertionError):  # other cameras
        FrontImages(latents[:2].astype(np.float32), 4, image_side=24, cache=cache)


@pytest.mark.long
def test_renders_show_every_kind_beside_the_ground_truth(tmp_path, monkeypatch):
    monkeypatch.setattr(people_renders, "PIXELS", 24)
    monkeypatch.setattr(people_renders, "POINTS", 24)
    G = people_training.fresh_networks(0, plane_slices=2).G_ema
    people_renders.write_renders(G, tmp_path / "renders" / "x.png")
    image = np.asarray(PIL.Image.open(tmp_path / "renders" / "x.png"))
    assert image.shape == (7 * 24, 8 * 24, 3)
    truth_rows = image.reshape(7, 24, 8, 24, 3)[2::2]
    assert truth_rows.std(axis=(1, 3, 4)).min() > 10  # a head in every cell
    amounts = flaw_amounts(people_renders.fixed_latents())
    assert amounts.tolist() == [[0, 0]] * 2 + [[1, 0]] * 2 + [[0, 1]] * 2 + [[1, 1]] * 2


def test_the_check_finds_the_second_face_of_the_third_edition():
    result = check_backs(people.ASSET.parent / "generator.safetensors", 3, "intact", 1)
    at_psi_1 = result["psi"]["1.0"]
    assert at_psi_1["relief_ratio"] > 1.3 and at_psi_1["correlation_with_front"] > 0.08
    assert abs(result["ground_truth"]["correlation_with_front"]) < 0.15
    assert not result["passed"] and 0 < at_psi_1["fine_fscore_back"] < 1
    for edition in (3, 4):
        intact = select_latents(edition, "intact", 50)
        damaged = select_latents(edition, "damaged", 50)
        assert not set(map(tuple, intact.tolist())) & set(map(tuple, damaged.tolist()))
    assert (flaw_amounts(intact) <= 0.02).all() and (flaw_amounts(damaged).amax(dim=1) >= 0.98).all()
    with raising("--latents", "900"):
        select_latents(4, "intact", 900)
