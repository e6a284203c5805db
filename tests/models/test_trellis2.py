"""TRELLIS.2's networks: names, rotary positions, features beside the latent, splits of voxels."""

from dataclasses import replace

import pytest
import torch

from eg3d_rlhf.models.sparse import SparseBatch, SparseSample
from eg3d_rlhf.models.trellis2 import (
    BLOCK,
    SPLIT,
    FlowConfig,
    StructureFlow,
    VoxelDecoder,
    VoxelDecoderConfig,
    VoxelFlow,
    angles_of,
    rotate,
    split,
)

FLOW = dict(
    resolution=4, in_channels=3, out_channels=3, model_channels=24, cond_channels=5, num_blocks=1, num_heads=2, mlp_ratio=2, share_mod=True,
    qk_rms_norm=True, qk_rms_norm_cross=True,
)
BLOCKS = {
    "blocks.0.modulation": [144], "blocks.0.norm2.weight": [24], "blocks.0.norm2.bias": [24],
    "blocks.0.self_attn.to_qkv.weight": [72, 24], "blocks.0.self_attn.to_qkv.bias": [72],
    "blocks.0.self_attn.q_rms_norm.gamma": [2, 12], "blocks.0.self_attn.k_rms_norm.gamma": [2, 12],
    "blocks.0.self_attn.to_out.weight": [24, 24], "blocks.0.self_attn.to_out.bias": [24],
    "blocks.0.cross_attn.to_q.weight": [24, 24], "blocks.0.cross_attn.to_q.bias": [24],
    "blocks.0.cross_attn.to_kv.weight": [48, 5], "blocks.0.cross_attn.to_kv.bias": [48],
    "blocks.0.cross_attn.q_rms_norm.gamma": [2, 12], "blocks.0.cross_attn.k_rms_norm.gamma": [2, 12],
    "blocks.0.cross_attn.to_out.weight": [24, 24], "blocks.0.cross_attn.to_out.bias": [24],
    "blocks.0.mlp.mlp.0.weight": [48, 24], "blocks.0.mlp.mlp.0.bias": [48], "blocks.0.mlp.mlp.2.weight": [24, 48],
    "blocks.0.mlp.mlp.2.bias": [24],
}  # fmt: skip
FLOW_NAMES = BLOCKS | {
    "t_embedder.mlp.0.weight": [24, 256], "t_embedder.mlp.0.bias": [24], "t_embedder.mlp.2.weight": [24, 24],
    "t_embedder.mlp.2.bias": [24], "adaLN_modulation.1.weight": [144, 24], "adaLN_modulation.1.bias": [144],
    "input_layer.weight": [24, 3], "input_layer.bias": [24], "out_layer.weight": [3, 24], "out_layer.bias": [3],
}  # fmt: skip
DECODER = dict(
    model_channels=(16, 8), latent_channels=3, num_blocks=(1, 0), block_type=(BLOCK, BLOCK), up_block_type=(SPLIT,), block_args=({}, {})
)
DECODER_NAMES = {
    "from_latent.weight": [16, 3], "from_latent.bias": [16], "blocks.0.0.norm.weight": [16], "blocks.0.0.norm.bias": [16],
    "blocks.0.0.conv.weight": [16, 3, 3, 3, 16], "blocks.0.0.conv.bias": [16], "blocks.0.0.mlp.0.weight": [64, 16],
    "blocks.0.0.mlp.0.bias": [64], "blocks.0.0.mlp.2.weight": [16, 64], "blocks.0.0.mlp.2.bias": [16],
    "blocks.0.1.norm1.weight": [16], "blocks.0.1.norm1.bias": [16], "blocks.0.1.conv1.weight": [64, 3, 3, 3, 16],
    "blocks.0.1.conv1.bias": [64], "blocks.0.1.conv2.weight": [8, 3, 3, 3, 8], "blocks.0.1.conv2.bias": [8],
    "blocks.0.1.to_subdiv.weight": [8, 16], "blocks.0.1.to_subdiv.bias": [8], "output_layer.weight": [7, 8], "output_layer.bias": [7],
}  # fmt: skip


def shapes(module):
    return {name: list(tensor.shape) for name, tensor in module.state_dict().items()}


def voxels(seed=0, size=2, side=4, channels=3):
    g = torch.Generator().manual_seed(seed)
    samples = []
    for i in range(size):
        coords = torch.cartesian_prod(*[torch.arange(side)] * 3)[torch.randperm(side**3, generator=g)[: 6 + 3 * i]]
        samples.append(SparseSample(coords.int(), torch.randn(len(coords), channels, generator=g)))
    return SparseBatch.join(samples)


def inputs(size=2):
    g = torch.Generator().manual_seed(3)
    return torch.rand(size, generator=g), torch.randn(size, 4, 5, generator=g)


def built(kind, **changes):
    torch.manual_seed(0)
    return kind(FlowConfig(**{**FLOW, **changes}))


@pytest.mark.parametrize("kind", [StructureFlow, VoxelFlow])
def test_names_and_shapes_of_the_flows(kind):
    assert shapes(built(kind)) == FLOW_NAMES
    own = {name for name in shapes(built(kind, share_mod=False)) if "odulation" in name}
    assert own == {"blocks.0.adaLN_modulation.1.weight", "blocks.0.adaLN_modulation.1.bias"}


def test_the_released_size():
    config = dict(model_channels=1536, cond_channels=1024, num_heads=12, mlp_ratio=5.3334, share_mod=True, dtype="bfloat16",
                  qk_rms_norm=True, qk_rms_norm_cross=True, initialization="scaled")
    with torch.device("meta"):
        flows = [VoxelFlow(FlowConfig(resolution=64, in_channels=64, out_channels=32, num_blocks=n, **config)) for n in (1, 2)]
    one, two = (sum(p.numel() for p in flow.parameters()) for flow in flows)
    assert flows[0].blocks[0].mlp.mlp[0].weight.shape == (8192, 1536)
    assert round((one + 29 * (two - one)) / 1e9, 2) == 1.29  # "1.3B"


def test_rotation_keeps_norms_and_turns_planes():
    x, coords = torch.randn(7, 2, 32, dtype=torch.float64), torch.randint(0, 64, (7, 3))
    angles = angles_of(coords, 32)
    for adjacent in (True, False):
        turned = rotate(x.float(), angles, adjacent).double()
        torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1), rtol=1e-6, atol=1e-6)
        first = slice(0, 2) if adjacent else slice(0, 17, 16)  # the first plane turns by coordinate 1 itself
        angle = coords[:, 0].double()
        matrix = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).view(7, 1, 2, 2)
        torch.testing.assert_close(turned[..., first], (matrix @ x[..., first, None])[..., 0], rtol=1e-5, atol=1e-5)
    assert angles.shape == (7, 16) and torch.equal(angles[:, 15], torch.zeros(7))  # 16 planes: 5 for each axis, 1 left


def test_a_key_and_a_query_meet_by_the_difference_of_their_places():
    q, k, far = torch.randn(1, 1, 24), torch.randn(1, 1, 24), torch.tensor([[5, -3, 9]])
    here, there = torch.tensor([[1, 2, 3]]), torch.tensor([[4, 0, 2]])

    def product(a, b):
        return (rotate(q, angles_of(a, 24)) * rotate(k, angles_of(b, 24))).sum()

    torch.testing.assert_close(product(here, there), product(here + far, there + far), rtol=1e-4, atol=1e-5)
    assert (product(here, there) - product(here, there + far)).abs() > 1e-2


def test_a_flow_sees_no_shift_of_all_voxels_but_one_of_some():
    flow, x, (t, cond) = built(VoxelFlow, resolution=32), voxels(), inputs()
    moved = x.coords.clone()
    moved[:, 1:] += torch.tensor([9, 2, 17], dtype=torch.int32)
    some = x.coords.clone()
    some[0, 1:] += 4
    with torch.no_grad():
        before, after, other = (flow(SparseBatch(c, x.feats, 2), t, cond).feats for c in (x.coords, moved, some))
    torch.testing.assert_close(before, after, rtol=1e-4, atol=1e-5)
    assert (before - other).abs().max() > 1e-4


def test_on_all_voxels_both_flows_are_the_same_network():
    dense, sparse, (t, cond) = built(StructureFlow), built(VoxelFlow), inputs(1)
    sparse.load_state_dict(dense.state_dict())
    x = torch.randn(1, 3, 4, 4, 4)
    coords = dense.places().int()
    with torch.no_grad():
        full = dense(x, t, cond)
        read = sparse(SparseBatch.join([SparseSample(coords, x[0].flatten(1).T.contiguous())]), t, cond).feats
    torch.testing.assert_close(full[0].flatten(1).T, read, rtol=1e-5, atol=1e-6)


def test_features_beside_the_latent_widen_the_input_and_nothing_else():
    plain, wide = built(VoxelFlow), built(VoxelFlow, in_channels=7)
    changed = {name for name, shape in shapes(wide).items() if shape != FLOW_NAMES[name]}
    assert changed == {"input_layer.weight"} and wide.input_layer.weight.shape == (24, 7)
    state = plain.state_dict()
    wide.load_state_dict(state | {"input_layer.weight": torch.nn.functional.pad(state["input_layer.weight"], (0, 4))})
    x, (t, cond) = voxels(), inputs()
    more = replace(x, given=torch.randn(len(x.feats), 4))
    with torch.no_grad():
        assert torch.equal(wide(more, t, cond).feats, plain(x, t, cond).feats)  # read by zeros
        wide.input_layer.weight[:, 3:] = 1
        assert not torch.equal(wide(more, t, cond).feats, plain(x, t, cond).feats)
    with pytest.raises(ValueError, match="VoxelFlow.x_t: expected 4 given features beside the latent, got 0"):
        wide(x, t, cond)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pe_mode": "ape"}, "expected pe_mode 'rope' and dtype float32, float16, bfloat16, got 'ape'"),
        ({"num_heads": 5}, "expected model_channels to divide by heads"), ({"in_channels": 2}, "in_channels >= out_channels"),
        ({"num_heads": 8}, "expected heads of an even number of channels, 6 or more"),
    ],
)
def test_flows_that_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        FlowConfig(**{**FLOW, **changes})


def test_names_and_shapes_of_the_decoders():
    assert shapes(VoxelDecoder(VoxelDecoderConfig(**DECODER))) == DECODER_NAMES
    told = VoxelDecoder(VoxelDecoderConfig(**DECODER, pred_subdiv=False, out_channels=6))
    assert set(DECODER_NAMES) - set(shapes(told)) == {"blocks.0.1.to_subdiv.weight", "blocks.0.1.to_subdiv.bias"}


@pytest.mark.parametrize("fastest", [True, False])
def test_split_moves_channels_into_space(fastest):
    coords = torch.tensor([[0, 1, 2, 3], [1, 0, 0, 0]], dtype=torch.int32)
    x = SparseBatch(coords, torch.arange(32.0).view(2, 16), 2)
    there = torch.zeros(2, 8, dtype=torch.bool)
    there[0, 0] = there[0, 1] = there[1, 4] = True
    out = split(x, there, fastest)
    one, four = ([1, 0, 0], [0, 0, 1]) if fastest else ([0, 0, 1], [1, 0, 0])
    assert out.coords.tolist() == [[0, 2, 4, 6], [0, 2 + one[0], 4, 6 + one[2]], [1, *four]]
    assert out.feats.tolist() == [[0, 1], [2, 3], [24, 25]]  # child 4 of the second: channels 8 and 9 of its 16
    every = split(x, torch.ones(2, 8, dtype=torch.bool), fastest)
    assert torch.equal(every.feats.flatten(), x.feats.flatten()) and len(torch.unique(every.coords, dim=0)) == 16


def test_a_decoder_that_is_told_finds_the_voxels_of_the_one_that_says():
    torch.manual_seed(1)
    says, told = (VoxelDecoder(VoxelDecoderConfig(**DECODER, **more)) for more in ({}, dict(pred_subdiv=False, out_channels=6)))
    x = voxels()
    with torch.no_grad():
        shape, children = says(x)
        colours, _ = told(x, children)
        coarse, none = says(x, levels=0)
    assert shape.feats.shape[1] == 7 and colours.feats.shape[1] == 6 and torch.equal(shape.coords, colours.coords)
    assert len(shape.coords) == int(children[0].sum()) and children[0].any(1).all() and none == []
    assert torch.equal(coarse.coords, x.coords)
    with pytest.raises(ValueError, match="expected the children of 1 splits, got None"):
        told(x)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_blocks": (1,)}, "for every level"), ({"block_type": (BLOCK, "SparseResBlock3d")}, "got SparseResBlock3d. Others are"),
        ({"model_channels": (16, 7)}, "channels that eight children can share"),
    ],
)
def test_decoders_that_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        VoxelDecoderConfig(**{**DECODER, **changes})
