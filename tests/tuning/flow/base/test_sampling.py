"""Assets by condition and seed, and how often one generator's beat another's."""

import pytest
import torch

from eg3d_rlhf.tuning.flow.base.sampling import (
    HeldOut,
    crossed,
    generate,
    scores,
    stage_noise,
    voxels_for,
    wins,
)
from tests.rejections import raising
from tests.tuning.flow.tiny_flow import NAMES, LinearFlow, TinyPipeline, likes_target


def shifted(channels: int, by: float) -> LinearFlow:
    """A network whose data lie higher."""
    model = LinearFlow(channels)
    with torch.no_grad():
        model.to_out.weight[:, 2 * channels] = -by
    return model


def same(a, b, exact=False) -> bool:
    close = torch.equal if exact else lambda x, y: torch.allclose(x, y, atol=1e-5)
    return len(a) == len(b) and all(
        torch.equal(x.coords, y.coords) and close(x.feats, y.feats) for x, y in zip(a, b, strict=True)
    )


def test_a_seed_is_an_asset_whatever_the_batch():
    pipeline = TinyPipeline()
    names, seeds = crossed(NAMES, 3, 0)
    assets = generate(pipeline, names, seeds, batch_size=4)
    assert len(assets) == 9
    assert same(assets, generate(pipeline, names, seeds, batch_size=4), exact=True)
    assert same(assets, generate(pipeline, names, seeds, batch_size=16))
    assert same(assets[5:7], generate(pipeline, names[5:7], seeds[5:7]))
    assert not same(assets[:1], generate(pipeline, names[:1], [seeds[0] + 1]))


def test_noise_differs_between_stages_and_is_shared_on_shared_voxels():
    structure, voxels = TinyPipeline().stages
    corner = torch.zeros(1, 3, dtype=torch.int32)
    both = torch.tensor([[0, 0, 0], [1, 0, 1]], dtype=torch.int32)
    a, b = stage_noise(voxels, [7, 7], [corner, both]).samples()
    assert torch.equal(a.feats[0], b.feats[0])
    assert stage_noise(structure, [7], [None])[0, 0, 0, 0, 0] not in a.feats


def test_networks_are_swapped_for_the_call_alone():
    pipeline = TinyPipeline()
    names, seeds = crossed(NAMES, 3, 0)
    own = [s.model for s in pipeline.stages]
    base = generate(pipeline, names, seeds)
    last = generate(pipeline, names, seeds, {"voxels": shifted(2, 1.0)})
    first = generate(pipeline, names, seeds, {"structure": shifted(1, 2.0)})
    assert [s.model for s in pipeline.stages] == own
    assert all(
        torch.equal(x.coords, y.coords) and bool((y.feats > x.feats).all())
        for x, y in zip(base, last, strict=True)
    )
    assert sum(len(x.coords) for x in first) > sum(len(x.coords) for x in base)


def test_a_later_stage_can_be_given_its_voxels():
    pipeline = TinyPipeline()
    names, seeds = crossed(NAMES, 3, 0)
    base = generate(pipeline, names, seeds)
    given = voxels_for(pipeline, "voxels", names, seeds, batch_size=4)
    assert all(torch.equal(places, asset.coords) for places, asset in zip(given, base, strict=True))
    assert voxels_for(pipeline, "structure", names, seeds) == [None] * 9
    other = {"structure": shifted(1, 9.0)}  # is not run
    assert same(generate(pipeline, names, seeds, other, stages_given={"voxels": given}, batch_size=2), base)


def test_what_does_not_fit_is_refused():
    pipeline = TinyPipeline()
    empty = torch.zeros(0, 3, dtype=torch.int32)
    for arguments, names in [
        ((["a"], [1], {"colours": LinearFlow(1)}), ("structure", "voxels", "'colours'")),
        ((["a"], [1], None, 4, {"voxels": [empty]}), ("'voxels'", "none")),
    ]:
        with raising(*names):
            generate(pipeline, *arguments)


def test_crossed_gives_every_condition_the_same_number_of_noises_of_its_own():
    names, seeds = crossed(NAMES, 4, 0)
    assert [names.count(n) for n in NAMES] == [4, 4, 4] and len(set(seeds)) == 12
    assert crossed(NAMES[1:], 4, 0) == (names[4:], seeds[4:]) and crossed(NAMES, 4, 1)[1] != seeds


def test_held_out_compares_asset_by_asset():
    pipeline = TinyPipeline()
    names, seeds = crossed(NAMES, 8, 0)
    held_out = HeldOut(pipeline=pipeline, stage="voxels", reward=likes_target, prompts=names, seeds=seeds)
    assert held_out(pipeline.stages[1].model) == 0.5
    better = shifted(2, 0.7)
    rate = held_out(better)
    assert rate > 0.6
    base = scores(pipeline, likes_target, names, seeds)
    won = wins(scores(pipeline, likes_target, names, seeds, {"voxels": better}, batch_size=5), base)
    assert rate == pytest.approx(float(won.double().mean()))
    ahead = HeldOut(
        pipeline=pipeline,
        stage="structure",
        reward=likes_target,
        prompts=names,
        seeds=seeds,
        other_models={"voxels": better},
        baseline_models={"voxels": better},
    )
    assert ahead(pipeline.stages[0].model) == 0.5


def test_scores_that_are_not_finite_are_refused():
    def broken(assets, conditions):
        return torch.full([len(assets)], float("nan"))

    with raising("function", "[nan]"):
        scores(TinyPipeline(), broken, ["a"], [0])
