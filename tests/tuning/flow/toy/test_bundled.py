"""The base networks: training, files, and what the bundled ones can and cannot do."""

import json

import pytest
import torch
from torch import nn

from eg3d_rlhf.models.sparse import SparseBatch, SparseSample
from eg3d_rlhf.tuning.flow.base.sampling import sample
from eg3d_rlhf.tuning.flow.toy.bundled import (
    FOLDER,
    NETWORKS,
    Packing,
    StructureFlow,
    VoxelFlow,
    Width,
    toy_problem,
)
from eg3d_rlhf.tuning.flow.toy.names import PROMPTS
from eg3d_rlhf.tuning.flow.toy.toy_oracles import FinalOracle, LabelOracle
from eg3d_rlhf.tuning.flow.toy.toy_pipeline import R
from tests.tuning.flow.toy.drawing import drawn


def test_bundled_files_are_small():
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 1_000_000
    assert {path.stem for path in FOLDER.iterdir()} == set(NETWORKS)


@pytest.fixture(scope="module")
def made():
    """64 assets of the bundled generator: what the first stage left to each, the asset, what is encoded of
    it, its condition.
    """
    toy = toy_problem().pipeline
    names = list(PROMPTS[::3])
    first, second = toy.stages
    cond = toy.conditioning(names, "structure")
    none = toy.null_conditioning(64, "structure")
    given = toy.advance("structure", sample(first, first.noise(range(64), [None] * 64), cond, none))
    assets = toy.decode(sample(second, second.noise(range(64), given), cond, none))
    again = [toy.advance("structure", one["structure"][None])[0] for one in toy.encode(assets)]
    return given, assets, again, names


def test_the_base_draws_what_it_is_asked_for_with_defects(made):
    """Headroom at both stages."""
    _, assets, _, names = made
    found = LabelOracle().parts(assets, names)
    assert 0.89 < found["geometry"].mean() / 4 < 0.96 and 0.01 < -found["colour"].mean() / 4 < 0.1
    others = [names[(i + 8) % 64] for i in range(64)]  # of another shape
    assert LabelOracle()(assets, names).mean() > LabelOracle()(assets, others).mean() + 1


def test_decoding_changes_the_structure_of_most_assets(made):
    given, _, again, _ = made
    assert sum(not torch.equal(a, b) for a, b in zip(given, again, strict=True)) > 32


# The toy's networks: samples of a batch do not see each other, and adapters find their layers.


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


def test_voxels_of_a_sample_alone_and_in_a_batch(cond):
    network = awake(VoxelFlow(SMALL))
    batch = voxels(5, 90, 1)
    together = network(batch, T, cond).samples()
    for i, latent in enumerate(batch.samples()):
        alone = network(SparseBatch.join([latent]), T[i : i + 1], cond[i : i + 1])
        torch.testing.assert_close(alone.feats, together[i].feats, atol=1e-5, rtol=1e-5)


def test_structures_alone_and_in_a_batch(cond):
    network = awake(StructureFlow(SMALL))
    x = torch.randn(3, 1, R, R, R)
    alone = torch.cat([network(x[i : i + 1], T[i : i + 1], cond[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(alone, network(x, T, cond), atol=1e-5, rtol=1e-5)


class Echo(nn.Module):
    """Gives back the tokens."""

    position = None

    def forward(self, tokens, position, t, cond):
        return tokens


def test_patches_go_back_to_where_they_came_from(cond):
    network = StructureFlow(SMALL)
    x = torch.randn(3, 1, R, R, R)
    network.trunk = Echo()
    network.out_layer = nn.Identity()
    assert torch.equal(network(x, T, cond), x)


def test_packing_goes_both_ways():
    batch = voxels(3, 1, 4)
    packing = Packing.from_batch(batch)
    padded = packing.pad(batch.feats)
    assert (
        padded.shape == (3, 4, 4)
        and torch.equal(packing.flat(padded), batch.feats)
        and Packing.from_batch(batch) is packing
    )
    assert packing.keep.squeeze().sum(1).tolist() == [3, 1, 4] and not padded[1, 1:].any()


# The toy as a problem, and the tool that makes its networks.


def test_the_problem_is_whole():
    problem = toy_problem(seed=3, pairs_per_condition=2)
    assert [stage.name for stage in problem.pipeline.stages] == ["structure", "voxels"]
    assert len(problem.train_pairs["voxels"]) == 2 * len(problem.train_prompts) == 128
    assert len(problem.held_out_prompts) == 96 and len(problem.choosing) == 32
    judges = [type(judge) for judge in (problem.reward, problem.chooser, problem.final)]
    assert len(set(judges)) == 3
    assets, names = drawn(4)
    assert torch.equal(problem.parts(assets, names)["colour"], FinalOracle().parts(assets, names)["colour"])


def test_the_identity_tells_problems_apart():
    one, same, other = (
        toy_problem(seed, pairs_per_condition=n).identity for seed, n in ((0, 2), (0, 2), (1, 2))
    )
    assert one == same != other and json.loads(json.dumps(one)) == one
    assert {"structure", "voxels", "reward"} < set(toy_problem().identity)
    assert toy_problem(0, pairs_per_condition=3).identity != one
