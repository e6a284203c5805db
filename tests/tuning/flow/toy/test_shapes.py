"""Shapes, colours and conditions of the toy."""

from collections import Counter

import pytest
import torch
from scipy import ndimage

from eg3d_rlhf.tuning.flow.toy.pipeline import (
    CHOOSING,
    COLOURS,
    CONDITIONS,
    HELD_OUT,
    SHAPES,
    TRAINED,
    R,
    canonical_colours,
    canonical_shapes,
    classes,
    targets,
)


def test_every_shape_is_whole_and_mirrors_itself():
    shapes = canonical_shapes()
    assert shapes.shape == (16, 4, R, R, R)
    assert torch.equal(shapes, shapes.flip(2))
    assert all(ndimage.label(one.numpy())[1] == 1 for one in shapes.flatten(0, 1))


def test_lifted_shapes_lose_nothing_and_all_differ():
    shapes = canonical_shapes()
    small, small_lifted, large, large_lifted = shapes.unbind(1)
    assert torch.equal(small.roll(1, -1), small_lifted) and torch.equal(large.roll(1, -1), large_lifted)
    counts = shapes.flatten(2).sum(-1)
    assert 28 <= int(counts.min()) and int(counts.max()) <= 150
    assert len({tuple(one.flatten().tolist()) for one in shapes.flatten(0, 1)}) == 64


def test_conditions_are_divided_evenly():
    assert sorted([*TRAINED, *CHOOSING, *HELD_OUT]) == sorted(CONDITIONS) and len(set(CONDITIONS)) == 192
    assert [len(TRAINED), len(CHOOSING), len(HELD_OUT)] == [64, 32, 96]
    for names, of_shape in ((TRAINED, 4), (CHOOSING, 2), (HELD_OUT, 6)):
        colours, shapes = (Counter(words) for words in zip(*[name.split() for name in names], strict=True))
        assert set(shapes.values()) == {of_shape} and len(colours) == len(COLOURS) and max(colours.values()) - min(colours.values()) <= 2


def test_classes_and_targets_name_the_same():
    shapes, colours = classes(["red ball", "grey cross"])
    assert shapes.tolist() == [0, 7] and colours.tolist() == [0, 10]
    wanted, painted = targets(["grey cross"])
    assert torch.equal(wanted[0], canonical_shapes()[7])
    torch.testing.assert_close(painted[0, 3, 4, R - 1], torch.tensor(COLOURS["grey"]))
    assert (canonical_colours().diff(dim=1) > 0).all()


@pytest.mark.parametrize("name", ["ball", "ball red", "teal ball", "red  ball", ""])
def test_unknown_conditions_are_refused(name):
    with pytest.raises(ValueError, match=f"expected one of red, .* and one of {', '.join(SHAPES)}, as in 'red ball', got '{name}'"):
        classes([name])
