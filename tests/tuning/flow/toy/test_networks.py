"""The toy's networks: samples of a batch do not see each other, and adapters find their layers."""

import pytest
import torch
from torch import nn

from eg3d_rlhf.models.sparse import SparseBatch, SparseSample
from eg3d_rlhf.tuning.flow.toy.bundled import Packing, StructureFlow, VoxelFlow, Width, surroundings
from eg3d_rlhf.tuning.flow.toy.pipeline import R

SMALL = Width(width=16, blocks=2, heads=2)


def voxels(*lengths: int) -> SparseBatch:
    generator = torch.Generator().manual_seed(0)
    samples = []
    for n in lengths:
        places = torch.randperm(R**3, generator=generator)[:n].sort().values
        coords = torch.stack([places // R**2, places // R % R, places % R], dim=1).int()
        samples.append(SparseSample(coords, torch.randn(n, 4, generator=generator)))
    return SparseBatch.join(samples)


def awake(network: nn.Module) -> nn.Module:
    """With an output that is not zero."""
    torch.manual_seed(1)
    nn.init.normal_(network.out_layer.weight)
    return network


@pytest.fixture(scope="module")
def cond():
    return torch.randn(3, 2, 28, generator=torch.Generator().manual_seed(5))


T = torch.tensor([0.1, 0.5, 0.9])


def test_untrained_networks_say_zero(cond):
    assert not StructureFlow(SMALL)(torch.randn(3, 1, R, R, R), T, cond).any()
    assert not VoxelFlow(SMALL)(voxels(5, 9, 2), T, cond).feats.any()


def test_voxels_of_a_sample_alone_and_in_a_batch(cond):
    network, batch = awake(VoxelFlow(SMALL)), voxels(5, 90, 1)
    together = network(batch, T, cond).samples()
    for i, sample in enumerate(batch.samples()):
        alone = network(SparseBatch.join([sample]), T[i : i + 1], cond[i : i + 1])
        torch.testing.assert_close(alone.feats, together[i].feats, atol=1e-5, rtol=1e-5)


def test_structures_alone_and_in_a_batch(cond):
    network, x = awake(StructureFlow(SMALL)), torch.randn(3, 1, R, R, R)
    alone = torch.cat([network(x[i : i + 1], T[i : i + 1], cond[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(alone, network(x, T, cond), atol=1e-5, rtol=1e-5)


def test_order_of_voxels_does_not_matter(cond):
    network, batch = awake(VoxelFlow(SMALL)), voxels(7)
    order = torch.randperm(7)
    turned = SparseBatch(batch.coords[order].contiguous(), batch.feats[order], 1)
    torch.testing.assert_close(network(turned, T[:1], cond[:1]).feats, network(batch, T[:1], cond[:1]).feats[order], atol=1e-5, rtol=1e-5)


class Echo(nn.Module):
    """Gives back the tokens."""

    position = None

    def forward(self, tokens, position, t, cond):
        return tokens


def test_patches_go_back_to_where_they_came_from(cond):
    network, x = StructureFlow(SMALL), torch.randn(3, 1, R, R, R)
    network.trunk, network.out_layer = Echo(), nn.Identity()
    assert torch.equal(network(x, T, cond), x)


def test_packing_goes_both_ways():
    batch = voxels(3, 1, 4)
    packing = Packing.of(batch)
    padded = packing.pad(batch.feats)
    assert padded.shape == (3, 4, 4) and torch.equal(packing.flat(padded), batch.feats) and Packing.of(batch) is packing
    assert packing.keep.squeeze().sum(1).tolist() == [3, 1, 4] and not padded[1, 1:].any()


def test_surroundings_by_hand():
    coords = torch.tensor([[0, 0, 0], [0, 0, 1], [7, 7, 7]], dtype=torch.int32)
    batch = SparseBatch.join([SparseSample(coords, torch.zeros(3, 4)), SparseSample(coords[:1], torch.zeros(1, 4))])
    seen = surroundings(batch).unflatten(1, (3, 3, 3))
    assert seen.sum((1, 2, 3)).tolist() == [2, 2, 1, 1] and seen[0, 1, 1, 2] == 1 and seen[1, 1, 1, 0] == 1


@pytest.mark.parametrize("network", [StructureFlow(), VoxelFlow()], ids=["structure", "voxels"])
def test_layers_that_adapters_sit_on(network):
    names = {name.rpartition(".")[2] for name, layer in network.named_modules() if isinstance(layer, nn.Linear)}
    assert {"to_qkv", "to_q", "to_kv", "to_out"} <= names


def test_condition_and_time_matter(cond):
    torch.manual_seed(0)
    for network, x in ((awake(StructureFlow(SMALL)), torch.randn(3, 1, R, R, R)), (awake(VoxelFlow(SMALL)), voxels(4, 5, 6))):
        outs = [network(x, t, c) for t, c in ((T, cond), (T, cond.flip(0)), (1 - T, cond))]
        plain, other_cond, other_t = (out if isinstance(out, torch.Tensor) else out.feats for out in outs)
        assert not torch.allclose(plain, other_cond) and not torch.allclose(plain, other_t)


def test_impossible_sizes_are_refused():
    with pytest.raises(ValueError, match="expected positive numbers and a width that the heads divide"):
        Width(width=30, heads=4)
