"""SlabSpec: the published slab's indices, what it stores, and what it refuses."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from eg3d_rlhf.core.spec import SlabSpec

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
    resolution=st.integers(32, 600), crop=st.tuples(*[fraction] * 6), box_warp=st.floats(0.1, 10), value_max=st.floats(0.1, 1e4)
)
def test_round_trip_through_json(resolution, crop, box_warp, value_max):
    spec = SlabSpec(resolution=resolution, crop=crop, box_warp=box_warp, value_max=value_max)
    again = SlabSpec.from_dict(json.loads(json.dumps(spec.to_dict())))
    assert again == spec
    assert hash(again) == hash(spec)
    assert again.digest() == spec.digest()


def test_digest_tells_specs_apart():
    specs = [SlabSpec(), SlabSpec(resolution=255), SlabSpec(box_warp=1.6), SlabSpec(value_max=1), SlabSpec.cube(256)]
    assert len({spec.digest() for spec in specs}) == len(specs)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"resolution": 1}, "integer resolution >= 2, got 1"),
        ({"resolution": 64.0}, "integer resolution >= 2, got 64.0"),
        ({"resolution": True}, "integer resolution"),
        ({"crop": (0.1, 0.1)}, "six fractions"),
        ({"crop": (0, 0, 0, 0, 0, 1.0)}, "six fractions"),
        ({"crop": None}, "six fractions"),
        ({"crop": (0.5, 0.5, 0, 0, 0, 0)}, "at least 2 points on x, got indices 128:128"),
        ({"box_warp": 0}, "box_warp > 0, got 0"),
        ({"box_warp": float("nan")}, "box_warp > 0"),
        ({"value_max": -1.0}, "value_max > 0, got -1.0"),
        ({"value_max": "100"}, "value_max > 0"),
    ],
)
def test_refuses_bad_values(values, message):
    with pytest.raises(ValueError, match=message):
        SlabSpec(**values)


def test_from_dict_refuses_missing_and_unknown_fields():
    values = SlabSpec().to_dict()
    with pytest.raises(ValueError, match="expected the fields"):
        SlabSpec.from_dict({**values, "colour": 1})
    del values["crop"]
    with pytest.raises(ValueError, match="expected the fields"):
        SlabSpec.from_dict(values)
    with pytest.raises(ValueError, match="got list"):
        SlabSpec.from_dict([1, 2])
