"""The toy as a pipeline: what the threshold leaves, what decoding carves and grows, what encoding finds again."""

import pytest
import torch

from eg3d_rlhf.models.sparse import SparseBatch, SparseSample
from eg3d_rlhf.tuning.flow.toy.bundled import StructureFlow, VoxelFlow, Width
from eg3d_rlhf.tuning.flow.toy.pipeline import CARVED, GROWING, KEPT, R, ToyPipeline
from tests.tuning.flow.toy.drawing import drawn

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


def test_a_carved_place_does_not_grow_back(pipeline):
    asset = decoded(pipeline, {(1, 1, 1): GROWING, (1, 1, 2): CARVED, (1, 1, 3): GROWING})
    assert places(asset) == {(1, 1, 1), (1, 1, 3)}


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


def test_no_gradient_passes_from_the_asset(pipeline):
    x_0 = torch.randn(1, 1, R, R, R, requires_grad=True)
    coords = pipeline.advance("structure", x_0)[0]
    feats = torch.randn(len(coords), 4, requires_grad=True)
    asset = pipeline.decode(SparseBatch.join([SparseSample(coords, feats)]))[0]
    assert not coords.requires_grad and not asset.colours.requires_grad
    encoded = pipeline.encode([asset])[0]
    assert not encoded["structure"].requires_grad and not encoded["voxels"].feats.requires_grad


def test_conditions_are_tokens_of_both_classes(pipeline):
    tokens = pipeline.conditions(["red ball", "orange box"], "voxels")
    assert tokens.shape == (2, 2, 28) and tokens.argmax(-1).tolist() == [[0, 16], [1, 17]] and tokens.sum() == 4
    assert pipeline.no_condition(3, "structure").shape == (3, 2, 28) and not pipeline.no_condition(3, "structure").any()


def test_mistakes_are_refused(pipeline):
    with pytest.raises(ValueError, match="advance: expected a stage with another behind it, 'structure', got 'voxels'"):
        pipeline.advance("voxels", torch.zeros(1, 1, R, R, R))
    with pytest.raises(ValueError, match="stage: expected one of structure, voxels, got 'mesh'"):
        pipeline.conditions(["red ball"], "mesh")
