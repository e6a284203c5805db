"""Tests of the move of latents along a direction that is part of a network's mapping."""

import math

import numpy as np
import pytest
import torch

from eg3d_rlhf.generators import as_generator, load_generator, load_networks, ws_of_seeds
from tests.rejections import raising
from training import networks, steering

Z = 64
W = 128


def z_steering(strength=1.0, seed=0):
    """Return a steering in z along a random direction."""
    direction = torch.randn(Z, generator=torch.Generator().manual_seed(seed))
    return steering.Steering("z", Z, strength).set_direction(direction)


def w_steering(strength=1.0, layers=None):
    """Return a steering in w along a random direction with random statistics."""
    rng = torch.Generator().manual_seed(3)
    return steering.Steering("w", W, strength, layers).set_direction(
        torch.randn(W, generator=rng), torch.randn(W, generator=rng), 0.7
    )


def random_z(n=200):
    return torch.randn(n, Z, generator=torch.Generator().manual_seed(1))


def test_move_in_z_against_float64_loop():
    """The move is z' = sqrt(Z - t^2) unit(z - a d) + t d, computed sample by sample in float64."""
    move = z_steering()
    z = random_z()
    d = move.direction.double().numpy()
    for latent, moved in zip(z.double().numpy(), move.move_z(z).double().numpy(), strict=True):
        scaled = latent * math.sqrt(Z) / np.linalg.norm(latent)
        a = scaled @ d
        if a < 1:
            rest = scaled - a * d
            expected = math.sqrt(Z - 1) * rest / np.linalg.norm(rest) + d
        else:
            expected = latent
        np.testing.assert_allclose(moved, expected, atol=2e-5)


@pytest.mark.parametrize("strength", [-1.0, 0.0, 0.5, 3.0])
def test_move_in_z_keeps_the_norm_and_reaches_the_threshold(strength):
    move = z_steering(strength)
    z = random_z()
    is_below = move.coordinates(z) < strength
    moved = move.move_z(z)
    assert is_below.any()
    torch.testing.assert_close(moved[is_below].norm(dim=1), torch.full((is_below.sum(),), math.sqrt(Z)))
    torch.testing.assert_close(
        move.coordinates(moved)[is_below], torch.full((is_below.sum(),), strength), atol=1e-5, rtol=0
    )
    # all other samples are bitwise unchanged
    assert torch.equal(moved[~is_below], z[~is_below])


def test_move_in_w_moves_each_layer_by_its_coordinate():
    move = w_steering(strength=0.5, layers=2)
    ws = torch.randn(50, 4, W, generator=torch.Generator().manual_seed(2))
    moved = move.move_ws(ws)
    coordinates = move.coordinates(ws)
    torch.testing.assert_close(
        move.coordinates(moved)[:, :2], coordinates[:, :2].clamp_min(0.5), atol=1e-4, rtol=0
    )
    # later layers, and layers beyond the threshold, are bitwise unchanged
    assert torch.equal(moved[:, 2:], ws[:, 2:])
    is_beyond = coordinates[:, :2] >= 0.5
    assert is_beyond.any()
    assert torch.equal(moved[:, :2][is_beyond], ws[:, :2][is_beyond])
    # the difference is parallel to the direction
    differences = (moved - ws)[:, :2].double()
    lengths = differences @ move.direction.double()
    torch.testing.assert_close(differences, lengths[..., None] * move.direction.double(), atol=1e-5, rtol=0)


def test_spaces_leave_the_other_latents_alone():
    z = random_z(4)
    ws = torch.randn(4, 3, W)
    assert w_steering().move_z(z) is z
    assert z_steering().move_ws(ws) is ws


def test_moves_are_differentiable():
    """The gradient agrees with finite differences in float64."""
    z = random_z(6).double().requires_grad_()
    ws = torch.randn(3, 2, W, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(z_steering().double().move_z, z)
    assert torch.autograd.gradcheck(w_steering().double().move_ws, ws)


@pytest.mark.parametrize("strength", [math.nan, math.inf, 8.0, -9.0])
def test_strength_must_be_finite_and_shorter_than_a_latent(strength):
    with raising("steering"):
        steering.Steering("z", Z, strength)


def test_wrong_arguments_are_rejected():
    with raising("steering"):
        steering.Steering("x", Z)
    with raising("layers"):
        steering.Steering("z", Z, layers=2)
    with raising("layers"):
        steering.Steering("w", W, layers=0)
    for direction in (torch.zeros(Z), torch.full((Z,), math.nan)):
        with raising("steering"):
            steering.Steering("z", Z).set_direction(direction)


def test_network_without_mapping_is_rejected():
    with raising("mapping"):
        steering.attach(torch.nn.Linear(2, 2), z_steering())


def test_attach_changes_the_mapping_and_detach_restores_it():
    network = load_networks(load_generator().path).G_ema
    plain_hash = networks.state_hash(network)
    plain_class = type(network)
    plain_ws = ws_of_seeds(network, range(20))
    move = z_steering()
    z = torch.from_numpy(np.stack([np.random.RandomState(seed).randn(Z) for seed in range(20)])).float()
    steering.attach(network, move)
    assert as_generator(network).architecture == "eg3d"
    assert isinstance(network, plain_class)
    assert networks.state_hash(network) != plain_hash
    steered_ws = ws_of_seeds(network, range(20))
    is_below = move.coordinates(z) < 1
    assert is_below.any() and not is_below.all()
    assert torch.equal(steered_ws[~is_below], plain_ws[~is_below])
    assert not torch.equal(steered_ws[is_below], plain_ws[is_below])
    # another strength is another network, although the direction is the same
    first_hash = networks.state_hash(network)
    steering.attach(network, z_steering(strength=2.0))
    assert networks.state_hash(network) != first_hash
    steering.detach(network)
    assert type(network) is plain_class
    assert networks.state_hash(network) == plain_hash
    assert torch.equal(ws_of_seeds(network, range(20)), plain_ws)
    assert steering.steering_of(network) is None


@pytest.mark.parametrize("move", [z_steering(0.5), w_steering(2.0, 3)])
def test_steering_survives_a_network_file(move, tmp_path):
    nets = load_networks(load_generator().path)
    plain_path = tmp_path / "plain.safetensors"
    networks.save(plain_path, nets, only_ema=True)
    steering.attach(nets.G_ema, move)
    steered_path = tmp_path / "steered.safetensors"
    networks.save(steered_path, nets, only_ema=True)
    read_nets = load_networks(steered_path)
    assert steering.steering_of(read_nets.G_ema).describe() == move.describe()
    assert networks.state_hash(read_nets.G_ema) == networks.state_hash(nets.G_ema)
    assert torch.equal(ws_of_seeds(read_nets.G_ema, range(4)), ws_of_seeds(nets.G_ema, range(4)))
    # a file without steering keeps its bytes
    steering.detach(read_nets.G_ema)
    restored_path = tmp_path / "restored.safetensors"
    networks.save(restored_path, read_nets, only_ema=True)
    assert restored_path.read_bytes() == plain_path.read_bytes()
