"""TRELLIS.2's networks: names, rotary positions, given features, splits of voxels."""

from dataclasses import replace

import pytest
import torch

from eg3d_rlhf.models.sparse import SparseBatch, SparseSample
from eg3d_rlhf.models.trellis2 import (
    BLOCK,
    MERGE,
    SPLIT,
    FlowConfig,
    StructureFlow,
    VoxelDecoder,
    VoxelDecoderConfig,
    VoxelEncoderConfig,
    VoxelFlow,
    angles_of,
    merge,
    rotate,
    split,
)
from tests.rejections import raising

FLOW = dict(
    resolution=4,
    in_channels=3,
    out_channels=3,
    model_channels=24,
    cond_channels=5,
    num_blocks=1,
    num_heads=2,
    mlp_ratio=2,
    share_mod=True,
    qk_rms_norm=True,
    qk_rms_norm_cross=True,
    pe_mode="rope",
)
DECODER = dict(
    model_channels=(16, 8),
    latent_channels=3,
    num_blocks=(1, 0),
    block_type=(BLOCK, BLOCK),
    up_block_type=(SPLIT,),
    block_args=({}, {}),
)
ENCODER = dict(
    model_channels=(8, 16),
    latent_channels=3,
    num_blocks=(0, 1),
    block_type=(BLOCK, BLOCK),
    down_block_type=(MERGE,),
)


def shapes(module):
    return {name: list(tensor.shape) for name, tensor in module.state_dict().items()}


def voxels(seed=0, size=2, side=4, channels=3):
    g = torch.Generator().manual_seed(seed)
    samples = []
    for i in range(size):
        coords = torch.cartesian_prod(*[torch.arange(side)] * 3)[
            torch.randperm(side**3, generator=g)[: 6 + 3 * i]
        ]
        samples.append(SparseSample(coords.int(), torch.randn(len(coords), channels, generator=g)))
    return SparseBatch.join(samples)


def inputs(size=2):
    g = torch.Generator().manual_seed(3)
    return torch.rand(size, generator=g), torch.randn(size, 4, 5, generator=g)


def built(kind, **changes):
    torch.manual_seed(0)
    return kind(FlowConfig(**{**FLOW, **changes}))


def test_a_key_and_a_query_meet_by_the_difference_of_their_places():
    q = torch.randn(1, 1, 24)
    k = torch.randn(1, 1, 24)
    far = torch.tensor([[5, -3, 9]])
    here = torch.tensor([[1, 2, 3]])
    there = torch.tensor([[4, 0, 2]])

    def product(a, b):
        return (rotate(q, angles_of(a, 24)) * rotate(k, angles_of(b, 24))).sum()

    torch.testing.assert_close(product(here, there), product(here + far, there + far), rtol=1e-4, atol=1e-5)
    assert (product(here, there) - product(here, there + far)).abs() > 1e-2


def test_a_flow_sees_no_shift_of_all_voxels_but_one_of_some():
    flow = built(VoxelFlow, resolution=32)
    x = voxels()
    t, cond = inputs()
    moved = x.coords.clone()
    moved[:, 1:] += torch.tensor([9, 2, 17], dtype=torch.int32)
    some = x.coords.clone()
    some[0, 1:] += 4
    with torch.no_grad():
        before, after, other = (
            flow(SparseBatch(c, x.feats, 2), t, cond).feats for c in (x.coords, moved, some)
        )
    torch.testing.assert_close(before, after, rtol=1e-4, atol=1e-5)
    assert (before - other).abs().max() > 1e-4


def test_on_all_voxels_both_flows_are_the_same_network():
    dense = built(StructureFlow)
    sparse = built(VoxelFlow)
    t, cond = inputs(1)
    sparse.load_state_dict(dense.state_dict())
    x = torch.randn(1, 3, 4, 4, 4)
    coords = dense.places().int()
    with torch.no_grad():
        full = dense(x, t, cond)
        read = sparse(SparseBatch.join([SparseSample(coords, x[0].flatten(1).T.contiguous())]), t, cond).feats
    torch.testing.assert_close(full[0].flatten(1).T, read, rtol=1e-5, atol=1e-6)


def test_features_beside_the_latent_widen_the_input_and_nothing_else():
    narrow = built(VoxelFlow)
    wide = built(VoxelFlow, in_channels=7)
    changed = {name for name, shape in shapes(wide).items() if shape != shapes(narrow)[name]}
    assert changed == {"input_layer.weight"} and wide.input_layer.weight.shape == (24, 7)
    state = narrow.state_dict()
    wide.load_state_dict(
        state | {"input_layer.weight": torch.nn.functional.pad(state["input_layer.weight"], (0, 4))}
    )
    x = voxels()
    t, cond = inputs()
    more = replace(x, given=torch.randn(len(x.feats), 4))
    with torch.no_grad():
        assert torch.equal(wide(more, t, cond).feats, narrow(x, t, cond).feats)  # read by zeros
        wide.input_layer.weight[:, 3:] = 1
        assert not torch.equal(wide(more, t, cond).feats, narrow(x, t, cond).feats)
    with raising("VoxelFlow.x_t", " 4 ", " 0."):
        wide(x, t, cond)


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"pe_mode": "ape"}, ("pe_mode", "'rope'", "'ape'")),
        ({"dtype": "f8"}, ("dtype", "float32, fp32", "'f8'")),
        ({"num_heads": 5}, ("model_channels=24", "5 heads")),
        ({"in_channels": 2}, ("in_channels",)),
        ({"num_heads": 8}, ("rope_freq", "6", " 3 ")),
    ],
)
def test_unsupported_flows_are_rejected(changes, names):
    with raising(*names):
        FlowConfig(**{**FLOW, **changes})


def test_a_flow_without_pe_mode_adds_its_positions_which_is_not_read():
    with raising("pe_mode", "'rope'", "'ape'"):
        FlowConfig(**{name: value for name, value in FLOW.items() if name != "pe_mode"})


def test_split_moves_channels_into_space_and_merge_back():
    coords = torch.tensor([[0, 1, 2, 3], [1, 0, 0, 0]], dtype=torch.int32)
    x = SparseBatch(coords, torch.arange(32.0).view(2, 16), 2)
    there = torch.zeros(2, 8, dtype=torch.bool)
    there[0, 0] = there[0, 1] = there[1, 4] = True
    out = split(x, there)
    assert out.coords.tolist() == [[0, 2, 4, 6], [0, 3, 4, 6], [1, 0, 0, 1]]
    # child 4 of the second: channels 8 and 9 of its 16
    assert out.feats.tolist() == [[0, 1], [2, 3], [24, 25]]
    back = merge(out)
    assert torch.equal(back.coords, coords) and torch.equal(
        back.feats, x.feats * there.repeat_interleave(2, 1)
    )
    every = split(x, torch.ones(2, 8, dtype=torch.bool))
    assert (
        torch.equal(every.feats.flatten(), x.feats.flatten()) and len(torch.unique(every.coords, dim=0)) == 16
    )
    with raising("children", f" {len(x.feats)} "):
        split(x, torch.zeros(2, 8, dtype=torch.bool))


def test_a_decoder_with_given_children_makes_the_voxels_of_the_one_that_predicts_them():
    torch.manual_seed(1)
    predicting, receiving = (
        VoxelDecoder(VoxelDecoderConfig(**DECODER, **more))
        for more in ({}, dict(pred_subdiv=False, out_channels=6))
    )
    x = voxels()
    with torch.no_grad():
        shape, children = predicting(x)
        colours, _ = receiving(x, children)
        coarse, none = predicting(x, split_count=0)
    assert (
        shape.feats.shape[1] == 7
        and colours.feats.shape[1] == 6
        and torch.equal(shape.coords, colours.coords)
    )
    assert len(shape.coords) == int((children[0] > 0).sum()) and none == []
    assert torch.equal(coarse.coords, x.coords)
    with raising("VoxelDecoder", " 1 ", "None"):
        receiving(x)


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"num_blocks": (1,)}, ("num_blocks", "2, 1, 2")),
        ({"block_type": (BLOCK, "SparseResBlock3d")}, ("SparseResBlock3d", BLOCK)),
        ({"model_channels": (16, 7)}, ("7",)),
    ],
)
def test_unsupported_decoders_are_rejected(changes, names):
    with raising(*names):
        VoxelDecoderConfig(**{**DECODER, **changes})
    changes = {name: value[::-1] if isinstance(value, tuple) else value for name, value in changes.items()}
    with raising(*names):
        VoxelEncoderConfig(**{**ENCODER, **changes})
