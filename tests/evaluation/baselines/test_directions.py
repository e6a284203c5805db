"""Directions without labels: principal directions of a linear mapping, and storage."""

import numpy as np
import pytest
import torch

from eg3d_rlhf.core.field import CameraFamily
from eg3d_rlhf.evaluation.baselines import directions
from training.steering import Steering


class Linear:
    """Generator with a linear mapping, as far as principal directions need one."""

    cameras = CameraFamily()
    z_dim = 4

    def __init__(self):
        self.module = torch.nn.Linear(1, 1)
        self.matrix = torch.diag(torch.tensor([0.1, 3.0, 1.0, 0.0]))

    def mapping(self, z, c, truncation_psi=1.0, truncation_cutoff=None):
        return (z @ self.matrix + 2)[:, None].repeat(1, 3, 1) * truncation_psi


@pytest.fixture
def linear(monkeypatch):
    monkeypatch.setattr(directions, "camera", lambda generator, n=1: torch.zeros(n, 25))
    return Linear()


def test_principal_moves_are_the_axes_of_largest_variance_with_either_sign(linear):
    moves = directions.principal_moves(linear, 1.0, torch.device("cpu"), seed=0)
    # the last axis has no variance, so no sample can be moved along it
    assert len(moves) == 6
    assert abs(float(moves[0].direction[1])) > 0.99 and abs(float(moves[2].direction[2])) > 0.99
    assert torch.equal(moves[0].direction, -moves[1].direction)
    assert float(moves[0].std) == pytest.approx(3, rel=0.1)
    assert moves[0].mean.numpy() == pytest.approx(np.full(4, 2.0), abs=0.4)


@pytest.mark.parametrize("space", ["z", "w"])
def test_stored_moves_are_the_same_moves(space):
    mean = torch.arange(6.0) if space == "w" else None
    move = Steering(space, 6).set_direction(torch.arange(6.0) - 2, mean, 1.5 if space == "w" else 1.0)
    again = directions.from_arrays(directions.to_arrays(move, 3.0), 0.5)
    latents = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    expected = Steering(space, 6, 0.5).set_direction(
        torch.arange(6.0) - 2, mean, 1.5 if space == "w" else 1.0
    )
    assert torch.equal(again.move_z(latents), expected.move_z(latents))
    assert torch.equal(again.move_ws(latents[:, None]), expected.move_ws(latents[:, None]))
