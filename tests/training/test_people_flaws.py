"""Damage of the fourth edition of the heads: who has it, where it is, and that scans are solid."""

import numpy as np
import pytest
import torch
from scipy import ndimage

from tests.rejections import raising
from training.heads.editions import EDITIONS, scan_distance
from training.heads.people_damage import damaged_distance
from training.heads.people_flaws import NAMED, flaw_amounts, flaw_regions, flawed_distance
from training.heads.people_mesh import grid_points

N = 40  # grid points per edge


def unit_latents(count: int, seed: int = 0) -> torch.Tensor:
    z = torch.randn(count, 64, generator=torch.Generator().manual_seed(seed))
    return z / z.square().mean(dim=1, keepdim=True).sqrt()


def ellipsoid_head() -> tuple[torch.Tensor, torch.Tensor]:
    """Points [1, P, 3] of a grid, and about the signed distance [1, P] to an ellipsoid on a neck."""
    points = torch.from_numpy(grid_points(N).reshape(1, -1, 3)).float()
    x, y, z = points.unbind(-1)
    skull = ((x / 0.16) ** 2 + ((y - 0.02) / 0.24) ** 2 + (z / 0.2) ** 2).sqrt() - 1
    neck = torch.maximum(torch.hypot(x, z + 0.06) - 0.1, y)
    return points, torch.minimum(skull * 0.17, neck)


def scans(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    points, distance = ellipsoid_head()
    points = points.expand(len(z), -1, -1)
    distance = distance.expand(len(z), -1)
    return points, distance, flawed_distance(points, distance, z)


def latents_with(flat: float, swelling: float, count: int) -> torch.Tensor:
    z = unit_latents(600, seed=4)
    amounts = flaw_amounts(z)
    return z[(amounts[:, 0] == flat) & (amounts[:, 1] == swelling)][:count]


def test_half_of_the_people_have_each_flaw_independently():
    has_flaw = flaw_amounts(unit_latents(20_000)) > 0.5
    assert torch.allclose(has_flaw.double().mean(dim=0), torch.tensor(0.5).double(), atol=0.02)
    both = float((has_flaw[:, 0] & has_flaw[:, 1]).double().mean())
    assert both == pytest.approx(0.25, abs=0.02)


def test_the_identity_decides_and_not_the_scan_quality():
    z = unit_latents(50)
    other_scan = z.clone()
    other_scan[:, NAMED:] = unit_latents(50, seed=1)[:, NAMED:]
    assert torch.equal(flaw_amounts(z), flaw_amounts(other_scan))
    other_person = z.clone()
    other_person[:, :4] *= -1
    torch.testing.assert_close(flaw_amounts(other_person), 1 - flaw_amounts(z))


def test_intact_people_have_intact_scans():
    _, distance, scan = scans(latents_with(0, 0, 5))
    assert torch.equal(scan, distance)


def test_scans_are_solid():
    """A flat back removes a point together with all points behind it, so no scan has a cavity."""
    z = latents_with(1, 0, 6)
    _, distance, scan = scans(z)
    removed = ((distance < 0) & (scan >= 0)).unflatten(1, (N,) * 3)
    inside = (distance < 0).unflatten(1, (N,) * 3)
    assert (removed.flatten(1).sum(dim=1) > 100).all()
    # From front to back: the first removed point of a line, and all points of the head behind it.
    is_behind_removed = removed.flip(3).long().cumsum(dim=3).flip(3) > 0
    assert not (is_behind_removed & inside & ~removed).any()
    for swelling in (0, 1):
        _, _, scan = scans(latents_with(1, swelling, 3))
        for one_scan in scan:
            empty = (one_scan >= 0).reshape((N,) * 3).numpy()
            assert ndimage.label(np.pad(empty, 1, constant_values=True))[1] == 1


def test_the_face_is_never_changed():
    points, distance, scan = scans(latents_with(1, 1, 6))
    is_front = points[..., 2] > 0.04
    assert torch.equal((scan < 0)[is_front], (distance < 0)[is_front])


def test_flaws_lie_in_their_regions():
    z = latents_with(1, 1, 6)
    points, distance, scan = scans(z)
    regions = flaw_regions(points, distance, z)
    assert not (regions["flat"] & regions["swelling"]).any()
    is_missing = (distance < 0) & (scan >= 0)
    is_extra = (distance >= 0) & (scan < 0)
    # The rounding of edges reaches a little beyond.
    assert (is_missing & ~regions["flat"]).sum() < 0.05 * is_missing.sum()
    assert (is_extra & ~regions["swelling"]).sum() < 0.10 * is_extra.sum()
    # They exist for people without flaws, too.
    z = latents_with(0, 0, 4)
    points, distance, _ = scans(z)
    for region in flaw_regions(points, distance, z).values():
        assert (region.sum(dim=1) > 20).all()


def test_the_third_edition_is_unchanged_and_others_are_rejected():
    z = unit_latents(3)
    points, distance = ellipsoid_head()
    points = points.expand(3, -1, -1)
    distance = distance.expand(3, -1)
    expected = damaged_distance(points, distance, z[:, NAMED:])
    assert torch.equal(scan_distance(3, points, distance, z), expected)
    assert torch.equal(scan_distance(4, points, distance, z), flawed_distance(points, distance, z))
    assert set(EDITIONS) == {3, 4}
    with raising("edition", "5"):
        scan_distance(5, points, distance, z)
