"""The toy as a pipeline: what the threshold leaves, what decoding carves and grows, what encoding finds
again.
"""

from collections import Counter

import pytest
import torch
from scipy import ndimage

from eg3d_rlhf.models.sparse import SparseBatch, SparseSample
from eg3d_rlhf.tuning.flow.toy.bundled import StructureFlow, VoxelFlow, Width
from eg3d_rlhf.tuning.flow.toy.names import COLOURS, PROMPTS
from eg3d_rlhf.tuning.flow.toy.toy_oracles import LabelOracle
from eg3d_rlhf.tuning.flow.toy.toy_pipeline import (
    CARVED,
    CHOOSING,
    GROWING,
    HELD_OUT,
    KEPT,
    TRAINED,
    Defects,
    R,
    ToyPipeline,
    canonical_colours,
    canonical_shapes,
    classes,
    draw_drafts,
    make_assets,
    targets,
)
from tests.rejections import raising
from tests.tuning.flow.toy.drawing import PERFECT, drawn

SMALL = Width(width=16, blocks=1, heads=2)


@pytest.fixture(scope="module")
def pipeline():
    return ToyPipeline(StructureFlow(SMALL), VoxelFlow(SMALL))


def decoded(pipeline, voxels: dict, colour=(0.2, 0.4, 0.6)):
    """The asset of voxels given as place: size."""
    coords = torch.tensor(list(voxels), dtype=torch.int32)
    feats = torch.tensor([[*colour, size] for size in voxels.values()]) * 2 - 1
    return pipeline.decode(SparseBatch.join([SparseSample(coords, feats)]))[0]


def places(asset) -> set:
    return {tuple(place) for place in asset.occupancy.nonzero().tolist()}


def test_advance_is_a_threshold(pipeline):
    x_0 = torch.randn(3, 1, R, R, R)
    for coords, one in zip(pipeline.advance("structure", x_0), x_0, strict=True):
        assert coords.dtype == torch.int32 and torch.equal(coords, (one[0] > 0).nonzero().int())


def test_an_empty_structure_keeps_its_largest_voxel(pipeline):
    x_0 = torch.full((1, 1, R, R, R), -1.0)
    x_0[0, 0, 1, 2, 3] = -0.5
    assert pipeline.advance("structure", x_0)[0].tolist() == [[1, 2, 3]]


def test_small_sizes_carve(pipeline):
    assert places(decoded(pipeline, {(0, 0, 0): KEPT, (3, 3, 3): CARVED})) == {(0, 0, 0)}


def test_two_growing_neighbours_fill_a_place_with_their_mean(pipeline):
    asset = decoded(pipeline, {(1, 1, 1): GROWING, (1, 1, 3): GROWING, (1, 2, 2): KEPT})
    assert places(asset) == {(1, 1, 1), (1, 1, 3), (1, 2, 2), (1, 1, 2)}
    torch.testing.assert_close(asset.colours[1, 1, 2], torch.tensor([0.2, 0.4, 0.6]))
    assert places(decoded(pipeline, {(1, 1, 1): GROWING, (1, 1, 3): KEPT})) == {(1, 1, 1), (1, 1, 3)}


def test_something_is_always_left(pipeline):
    assert places(decoded(pipeline, {(1, 1, 1): -0.4, (5, 5, 5): -0.2})) == {(5, 5, 5)}


def test_encoded_assets_decode_to_themselves(pipeline):
    assets, _ = drawn(32)
    encoded = pipeline.encode(assets)
    again = pipeline.decode(SparseBatch.join([one["voxels"] for one in encoded]))
    for asset, other, one in zip(assets, again, encoded, strict=True):
        assert torch.equal(asset.occupancy, other.occupancy)
        torch.testing.assert_close(asset.colours, other.colours)
        assert torch.equal(pipeline.advance("structure", one["structure"][None])[0], one["voxels"].coords)


def test_conditions_are_tokens_of_both_classes(pipeline):
    tokens = pipeline.conditioning(["red ball", "orange box"], "voxels")
    assert (
        tokens.shape == (2, 2, 28) and tokens.argmax(-1).tolist() == [[0, 16], [1, 17]] and tokens.sum() == 4
    )
    assert (
        pipeline.null_conditioning(3, "structure").shape == (3, 2, 28)
        and not pipeline.null_conditioning(3, "structure").any()
    )


# Shapes, colours and conditions of the toy.


def test_every_shape_is_whole_and_mirrors_itself():
    shapes = canonical_shapes()
    assert shapes.shape == (16, 4, R, R, R)
    assert torch.equal(shapes, shapes.flip(2))
    assert all(ndimage.label(one.numpy())[1] == 1 for one in shapes.flatten(0, 1))


def test_conditions_are_divided_evenly():
    assert sorted([*TRAINED, *CHOOSING, *HELD_OUT]) == sorted(PROMPTS) and len(set(PROMPTS)) == 192
    assert [len(TRAINED), len(CHOOSING), len(HELD_OUT)] == [64, 32, 96]
    for names, of_shape in ((TRAINED, 4), (CHOOSING, 2), (HELD_OUT, 6)):
        colours, shapes = (Counter(words) for words in zip(*[name.split() for name in names], strict=True))
        assert (
            set(shapes.values()) == {of_shape}
            and len(colours) == len(COLOURS)
            and max(colours.values()) - min(colours.values()) <= 2
        )


def test_classes_and_targets_name_the_same():
    shapes, colours = classes(["red ball", "grey cross"])
    assert shapes.tolist() == [0, 7] and colours.tolist() == [0, 10]
    wanted, painted = targets(["grey cross"])
    assert torch.equal(wanted[0], canonical_shapes()[7])
    torch.testing.assert_close(painted[0, 3, 4, R - 1], torch.tensor(COLOURS["grey"]))
    assert (canonical_colours().diff(dim=1) > 0).all()


@pytest.mark.parametrize("name", ["ball red", "teal ball", ""])
def test_unknown_prompts_are_rejected(name):
    with raising("prompt", repr(name)):
        classes([name])


# Drafts: what goes wrong with them, how much, and what repairs it.


NAMES = list(PROMPTS)


def geometry(defects: Defects) -> torch.Tensor:
    assets, names = drawn(256, 3, defects)
    return LabelOracle().parts(assets, names)["geometry"] / 4


def test_drafts_without_defects_are_what_was_asked_for():
    drafts = draw_drafts(NAMES, torch.Generator().manual_seed(0), PERFECT)
    shapes, colours = targets(NAMES)
    assert (drafts.structure[:, None] == shapes).flatten(2).all(2).any(1).all()
    assert torch.equal(drafts.features[..., :3], colours)
    assert all(
        torch.equal(asset.occupancy, one)
        for asset, one in zip(make_assets(drafts), drafts.structure, strict=True)
    )


def test_a_seed_repeats_and_another_does_not():
    first, same, other = (draw_drafts(NAMES, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first.features, same.features) and not torch.equal(first.structure, other.structure)


def test_strengths_differ_from_sample_to_sample():
    """The variance of the number of floaters is far above what one share for all would give."""
    only = Defects(floaters=0.1, holes=0, unrepaired=1, wrong=0)
    names = ["red box"] * 500
    drafts = draw_drafts(names, torch.Generator().manual_seed(0), only)
    counts = (drafts.structure & ~targets(names)[0].any(1)).flatten(1).sum(1).double()
    assert counts.var() > 2 * counts.mean()


def test_sizes_repair_floaters_and_holes():
    unrepaired = geometry(Defects(unrepaired=1, wrong=0)).mean()
    assert geometry(Defects(unrepaired=0, wrong=0)).mean() > 0.97 > unrepaired
    assert geometry(PERFECT).eq(1).all()
    assert geometry(Defects(floaters=0, holes=0, wrong=0.2)).mean() < 0.99


def test_latents_of_both_stages_lie_on_the_same_voxels():
    drafts = draw_drafts(NAMES[:5], torch.Generator().manual_seed(0))
    structure = drafts.latents("structure")
    voxels = drafts.latents("voxels")
    assert structure.shape == (5, 1, R, R, R) and set(structure.unique().tolist()) == {-1.0, 1.0}
    assert torch.equal((structure[:, 0] > 0).nonzero().int(), voxels.coords)
    sample, x, y, z = voxels.coords.long().unbind(1)
    torch.testing.assert_close(voxels.feats, drafts.features[sample, x, y, z] * 2 - 1)
