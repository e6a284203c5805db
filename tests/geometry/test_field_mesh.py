"""The surface from bounds and bricks against marching cubes on the whole volume."""

import numpy as np
import pytest
import torch

from eg3d_rlhf.generators.eg3d import PlaneField as Field
from eg3d_rlhf.geometry import brick_bounds, mesh_export
from eg3d_rlhf.geometry.brick_bounds import bounds_of_size
from eg3d_rlhf.geometry.mesh import (
    bricks_along,
    count_edges,
    extract_mesh,
    extract_mesh_blockwise,
)
from eg3d_rlhf.geometry.mesh_export import FieldGrid, extract_field_mesh
from eg3d_rlhf.geometry.slab import SeparableDensity
from tests.geometry.stand_in import StandIn, random_planes
from tests.geometry.test_chunked_mesh import assert_same_surface
from tests.rejections import raising


def smooth_field(layout: str = "eg3d", texels: int = 6, seed: int = 5, scale: float = 1.0) -> Field:
    """A field whose planes have few texels, so that it varies slowly from brick to brick."""
    G = StandIn(layout, box_warp=1.2)
    G.basis = random_planes(3, 4, texels, texels, seed=seed) * scale
    return Field(G, torch.ones(1, 2, 3))


def volume_of(grid: FieldGrid) -> torch.Tensor:
    """[X, Y, Z], with nothing left out."""
    return grid(slice(0, grid.resolution))


def level_of(grid: FieldGrid, share: float) -> float:
    """A level that `share` of the points that are not trimmed lie below."""
    return float(volume_of(grid)[(grid.inside,) * 3].quantile(share))


def whole_surface(grid: FieldGrid, level: float):
    """The oracle: marching cubes on the whole volume in one call."""
    return extract_mesh(volume_of(grid).permute(2, 1, 0), grid.axes, level)


@pytest.mark.parametrize("layout", ["eg3d", "fixed"])
@pytest.mark.parametrize(
    ("resolution", "border", "share"),
    [(22, 0, 0.5), (23, 0.0, 0.9), (24, 0.2, 0.3), (31, 0.1, 0.7), (56, 0.0, 0.97)],
)
def test_the_surface_equals_that_of_the_full_volume(layout, resolution, border, share):
    grid = FieldGrid(smooth_field(layout), resolution, border)
    level = level_of(grid, share)
    mesh = extract_field_mesh(grid, level)
    assert_same_surface(mesh, whole_surface(grid, level))
    assert count_edges(mesh[1]).watertight and len(np.unique(mesh[0], axis=0)) == len(mesh[0])


@pytest.mark.parametrize(
    ("refine", "dense"),
    [(-1.0, 2.0), (2.0, 2.0), (2.0, -1.0)],
    ids=["finer bounds", "single bricks", "whole layers"],
)
@pytest.mark.parametrize("scale", [0.5, 40.0])
def test_every_way_of_evaluating_gives_the_same_surface(monkeypatch, refine, dense, scale):
    monkeypatch.setattr(brick_bounds, "_REFINE_SHARE", refine)
    monkeypatch.setattr(mesh_export, "_DENSE_SHARE", dense)
    grid = FieldGrid(smooth_field(texels=12, scale=scale), 41)
    level = level_of(grid, 0.8)
    mesh = extract_field_mesh(grid, level)
    assert_same_surface(mesh, extract_mesh_blockwise(grid, grid.axes, level))
    assert count_edges(mesh[1]).watertight


@pytest.mark.parametrize("size", [4, 8])
@pytest.mark.parametrize(("layout", "scale"), [("eg3d", 1.0), ("fixed", 1.0), ("eg3d", 40.0)])
def test_bounds_hold_and_decide(layout, size, scale):
    grid = FieldGrid(smooth_field(layout, scale=scale), 67)
    level = level_of(grid, 0.9)
    bounds = bounds_of_size(grid.separable(), level, size)
    count = bricks_along(67, size)
    assert bounds.undecided.shape == (count,) * 3
    values = np.full((count * size + 1,) * 3, -1e6)
    values[1:68, 1:68, 1:68] = volume_of(grid).numpy()
    windows = np.lib.stride_tricks.sliding_window_view(values, (size + 1,) * 3)[::size, ::size, ::size]
    crossed = (windows.min(axis=(3, 4, 5)) < level) & (windows.max(axis=(3, 4, 5)) > level)
    assert crossed.any() and not (crossed & ~bounds.undecided).any()
    assert bounds.undecided.mean() < (0.9 if size == 8 else 0.6)


def test_density_far_from_the_surface_is_not_evaluated(monkeypatch):
    evaluated = []
    part = SeparableDensity.part

    def counted(self, *ranges):
        values = part(self, *ranges)
        evaluated.append(values.numel())
        return values

    monkeypatch.setattr(SeparableDensity, "part", counted)
    grid = FieldGrid(smooth_field(texels=3), 96)
    extract_field_mesh(grid, level_of(grid, 0.97))
    assert 0 < sum(evaluated) < 0.35 * 96**3


@pytest.mark.parametrize("size", [7, 8, 9, 15, 16, 17])
def test_a_box_whose_corners_lie_on_corners_of_bricks(size):
    """Edges of the surface run through, along and just past the faces that bricks share; half of the boxes
    touch the border.
    """
    for first in (0, 7, 8):
        volume = np.full((26, 25, 24), -1.0, dtype=np.float32)
        volume[first : first + size, first : first + size, first : first + size] = 1.0
        axes = [np.linspace(-1, 1, n) for n in volume.shape]
        for planes in (1, 8, 30):
            mesh = extract_mesh_blockwise(lambda part, volume=volume: volume[part], axes, 0.0, planes)
            assert_same_surface(mesh, extract_mesh(volume.transpose(2, 1, 0), axes, 0.0))
            assert count_edges(mesh[1]).watertight


def test_errors_equal_those_of_the_full_volume():
    field = smooth_field()
    for level in (1e4, -1e4):
        with raising(f"level {level:g}") as fast:
            extract_field_mesh(FieldGrid(field, 24), level)
        with pytest.raises(ValueError) as slow:
            whole_surface(FieldGrid(field, 24), level)
        assert str(fast.value).split(", got")[0] == str(slow.value).split(", got")[0]
    for plane in range(3):
        not_finite = smooth_field()
        not_finite.planes[0, plane, 0, 2, 2] = torch.nan
        with raising("finite"):
            extract_field_mesh(FieldGrid(not_finite, 24), 0.0)


def test_a_level_below_the_trimmed_borders_density():
    grid = FieldGrid(smooth_field(scale=300.0), 30, 0.1)
    level = min(level_of(grid, 0.02), -1500.0)
    assert_same_surface(extract_field_mesh(grid, level), whole_surface(grid, level))


@pytest.mark.filterwarnings("ignore:field. the planes are not axis-aligned")
def test_planes_that_are_not_axis_aligned_go_through_all_points():
    G = StandIn()
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0)))[0]
    G.renderer.plane_axes = G.renderer.plane_axes @ turn
    grid = FieldGrid(Field(G, torch.ones(1, 2, 3)), 20)
    assert grid.separable() is None
    level = level_of(grid, 0.5)
    assert_same_surface(extract_field_mesh(grid, level), whole_surface(grid, level))


class Points:
    """A field without separable form around another."""

    def __init__(self, field):
        self.bounds = field.bounds
        self.level = field.level
        self.density = field.density

    def __len__(self):
        return 1


@pytest.mark.parametrize("border", [0.0, 0.2])
@pytest.mark.parametrize("form", ["planes", "points"])
@pytest.mark.parametrize("side", [-1, 1])
def test_a_level_that_is_not_crossed_is_answered_with_the_range(form, border, side):
    """The trimmed border is no density: a field above the level everywhere is rejected in both cases."""
    field = smooth_field() if form == "planes" else Points(smooth_field())
    grid = FieldGrid(field, 24, border)
    inside = volume_of(grid)[(grid.inside,) * 3]
    low = float(inside.min())
    high = float(inside.max())
    with raising(f"{low:g}", f"{high:g}"):
        extract_field_mesh(FieldGrid(field, 24, border), low - 1 if side < 0 else high + 1)
    vertices, faces = extract_field_mesh(grid, (low + high) / 2)
    assert len(vertices) and count_edges(faces).watertight
