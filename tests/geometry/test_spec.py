"""SlabSpec: the published slab's indices, the stored fields, and rejected values."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from eg3d_rlhf.core.spec import SlabSpec
from eg3d_rlhf.geometry.mesh import extract_mesh
from eg3d_rlhf.geometry.slab import sigma_at
from tests.compat.reference import arrays, of_set, read_json
from tests.geometry.stand_in import StandIn, sample_slab, sigma_grid
from tests.rejections import raising

fraction = st.floats(0, 0.45)


def test_default_is_the_published_slab():
    spec = SlabSpec()
    assert spec.index_ranges == ((64, 192), (64, 205), (102, 231))
    assert spec.shape == (129, 141, 128)
    x, y, z = spec.axes()
    assert (len(z), len(y), len(x)) == spec.shape
    assert x.dtype == torch.float32
    assert x[0] == pytest.approx(64 / 255 - 0.5)
    assert z[-1] == pytest.approx(230 / 255 - 0.5)


def test_cube_reaches_the_faces_of_the_box():
    spec = SlabSpec.cube(5, box_warp=1.6)
    assert spec.shape == (5, 5, 5)
    for axis in spec.axes():
        torch.testing.assert_close(axis, torch.tensor([-0.8, -0.4, 0.0, 0.4, 0.8]))
    assert spec.voxel == pytest.approx(0.4)


@given(
    resolution=st.integers(32, 600),
    crop=st.tuples(*[fraction] * 6),
    box_warp=st.floats(0.1, 10),
    value_max=st.floats(0.1, 1e4),
)
def test_round_trip_through_json(resolution, crop, box_warp, value_max):
    spec = SlabSpec(resolution=resolution, crop=crop, box_warp=box_warp, value_max=value_max)
    again = SlabSpec.from_dict(json.loads(json.dumps(spec.to_dict())))
    assert again == spec
    assert hash(again) == hash(spec)
    assert again.digest() == spec.digest()


def test_digest_tells_specs_apart():
    specs = [
        SlabSpec(),
        SlabSpec(resolution=255),
        SlabSpec(box_warp=1.6),
        SlabSpec(value_max=1),
        SlabSpec.cube(256),
    ]
    assert len({spec.digest() for spec in specs}) == len(specs)


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ({"resolution": 1}, ("resolution", ">= 2", " 1")),
        ({"resolution": 64.0}, ("resolution", "64.0")),
        ({"resolution": True}, ("resolution", "True")),
        ({"crop": (0.1, 0.1)}, ("crop", "(0.1, 0.1)")),
        ({"crop": (0, 0, 0, 0, 0, 1.0)}, ("crop", "(0, 0, 0, 0, 0, 1.0)")),
        ({"crop": None}, ("crop", "None")),
        ({"crop": (0.5, 0.5, 0, 0, 0, 0)}, (" x", "128:128", "2")),
        ({"box_warp": 0}, ("box_warp", "> 0", " 0.")),
        ({"box_warp": float("nan")}, ("box_warp", "nan")),
        ({"value_max": -1.0}, ("value_max", "-1.0")),
        ({"value_max": "100"}, ("value_max", "'100'")),
    ],
)
def test_rejects_bad_values(values, names):
    with raising(*names):
        SlabSpec(**values)


def test_from_dict_rejects_missing_and_unknown_fields():
    values = SlabSpec().to_dict()
    with raising("'colour'", str(sorted({*values, "colour"}))):
        SlabSpec.from_dict({**values, "colour": 1})
    del values["crop"]
    with raising("'crop'", str(sorted(values))):
        SlabSpec.from_dict(values)
    with raising("list", "box_warp"):
        SlabSpec.from_dict([1, 2])


# The skewed lattice of the published reward's training data: its points, its densities, and functions that
# reject it.


SMALL = {"resolution": 20, "crop": (0.25, 0.25, 0.25, 0.20, 0.40, 0.10)}


def loop_points(resolution: int, ranges, box_warp: float = 1.0) -> np.ndarray:
    """Points [D, H, W, 3] by the authors' rule: one running number over the cube, divided without rounding
    down.
    """
    n = resolution
    (x0, x1), (y0, y1), (z0, z1) = ranges
    out = np.empty((z1 - z0, y1 - y0, x1 - x0, 3))
    for i in range(x0, x1):
        for j in range(y0, y1):
            for k in range(z0, z1):
                number = (i * n + j) * n + k
                index = np.array([number / n / n % n, number / n % n, number % n])
                out[k - z0, j - y0, i - x0] = index * (box_warp / (n - 1)) - box_warp / 2
    return out


@pytest.mark.parametrize(("resolution", "box_warp"), [(20, 1.0), (33, 1.6)])
def test_points_follow_the_authors_rule(resolution, box_warp):
    spec = SlabSpec(resolution=resolution, box_warp=box_warp, lattice="skewed")
    points = spec.points()
    assert points.dtype == torch.float32 and points.shape == (*spec.shape, 3)
    np.testing.assert_allclose(
        points.numpy(), loop_points(resolution, spec.index_ranges, box_warp), rtol=0, atol=2e-7 * box_warp
    )


def test_published_slab_has_the_reference_coordinates_to_the_last_bit(fixtures_dir):
    reference = arrays(fixtures_dir / "reward" / "slab_axes.npz")
    index, coords = of_set(reference, "idx_xyz", "coords_xyz")
    slab = read_json(fixtures_dir / "reward" / "recipe.json").get("slab", {})
    points = SlabSpec(**{**slab, "lattice": "skewed"}).points().numpy()
    x, y, z = index.T
    np.testing.assert_array_equal(points[z, y, x], coords)


def test_densities_are_those_of_the_loops_points(stand_in):
    spec = SlabSpec(**SMALL, lattice="skewed")
    ws = torch.randn(2, 2, 3, generator=torch.Generator().manual_seed(7))
    points = torch.from_numpy(loop_points(20, spec.index_ranges)).reshape(-1, 3).float()
    expected = sigma_at(stand_in.planes(ws, "const"), stand_in.renderer.plane_axes, stand_in.weights, points)
    sigma = sigma_grid(stand_in, ws, spec)
    # coordinates differ by rounding
    torch.testing.assert_close(sigma.flatten(1), expected, rtol=1e-4, atol=2e-4)
    straight = sigma_grid(stand_in, ws, SlabSpec(**SMALL))
    assert sigma.shape == straight.shape and (sigma - straight).abs().max() > 0.01
    slab = sample_slab(stand_in, ws, spec)
    assert slab.shape == (2, 1, *spec.shape) and slab.amin() == 0 and slab.amax() == pytest.approx(100)


def test_functions_that_need_axes_reject_a_skewed_lattice():
    spec = SlabSpec(**SMALL, lattice="skewed")
    ws = torch.zeros(1, 2, 3)
    with raising("'skewed'", "points()"):
        spec.axes()
    with raising("impl='separable'", "'skewed'"):
        sigma_grid(StandIn(), ws, spec, impl="separable")
    with raising("axes", "'skewed'"):
        extract_mesh(torch.zeros(spec.shape), spec)
    with raising("straight", "skewed", "'bent'"):
        SlabSpec(lattice="bent")


def test_descriptions_of_straight_slabs_stay_as_they_were():
    straight = SlabSpec(**SMALL)
    skewed = SlabSpec(**SMALL, lattice="skewed")
    assert set(straight.to_dict()) == {"resolution", "crop", "box_warp", "value_max"}
    assert skewed.to_dict()["lattice"] == "skewed" and straight.digest() != skewed.digest()
    for spec in (straight, skewed):
        assert SlabSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    with raising("straight", "skewed", " 1"):
        SlabSpec.from_dict({**straight.to_dict(), "lattice": 1})
