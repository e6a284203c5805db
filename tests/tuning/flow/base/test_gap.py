"""The gap between the stages is real: torch finds no way from the asset to the first stage; the loop crosses
it, towards what is preferred.
"""

from dataclasses import replace

import pytest
import torch

from eg3d_rlhf.core.statistics import bootstrap_mean_interval
from eg3d_rlhf.experiments.store import Store
from eg3d_rlhf.models.policies import tuned_model
from eg3d_rlhf.models.sparse import feats_of, with_feats
from eg3d_rlhf.modes.circular_dpo import TOY_RUN
from eg3d_rlhf.tuning.flow.base.pairs import read_pairs
from eg3d_rlhf.tuning.flow.base.sampling import scores, times, wins
from eg3d_rlhf.tuning.flow.toy.bundled import toy_problem
from eg3d_rlhf.tuning.flow.training.circular.circular_loop import CircularLoop, run_loop
from eg3d_rlhf.tuning.flow.training.circular.loop_pairs import select_and_weigh
from eg3d_rlhf.tuning.flow.training.conditioned_stage import ConditionedStage
from eg3d_rlhf.tuning.flow.training.pair_training import train_stage

NOISES = 12  # assets per condition


def sampled_with_gradient(stage, noise, cond):
    """The Euler sampler without guidance, with gradients of the network."""
    x = noise
    points = times(replace(stage.sampling, steps=3))
    for t, until in zip(points[:-1], points[1:], strict=True):
        v = stage.model(x, torch.full([len(cond)], t), cond)
        x = with_feats(x, feats_of(x) - (t - until) * feats_of(v))
    return x


@pytest.fixture(scope="module")
def problem():
    return toy_problem()


def test_no_gradient_passes_from_the_asset_to_the_first_stage(problem):
    pipeline = problem.pipeline
    names = list(problem.held_out_prompts[:2])
    first, last = pipeline.stages
    for stage in (first, last):
        stage.model.requires_grad_(True)
    try:
        cond = pipeline.conditioning(names, first.name)
        x_0 = sampled_with_gradient(first, first.noise([1, 2], [None, None]), cond)
        assert x_0.requires_grad
        given = pipeline.advance(first.name, x_0)
        assert not any(places.requires_grad for places in given)
        y_0 = sampled_with_gradient(last, last.noise([3, 4], given), pipeline.conditioning(names, last.name))
        value = feats_of(y_0).sum()  # all that the asset is made of
        to_first = torch.autograd.grad(
            value, list(first.model.parameters()), allow_unused=True, retain_graph=True
        )
        to_last = torch.autograd.grad(value, list(last.model.parameters()), allow_unused=True)
        assert all(g is None for g in to_first)
        assert any(g is not None and bool((g != 0).any()) for g in to_last)
        assert not problem.reward(pipeline.decode(y_0), names).requires_grad
    finally:
        for stage in (first, last):
            stage.model.requires_grad_(False)


@pytest.mark.long
def test_the_loop_changes_structure_in_the_direction_of_the_preference(problem, tmp_path):
    """With the last stage as it came out of the first step on both sides, the tuned structures are better in
    geometry, by a judge that neither labelled nor chose. And it is the preference that decides: by the bare
    margin, without anchors, the pairs as they are beat the same pairs turned over. (Anchored, even those
    would gain, since both sides stand on structures that people preferred.)
    """
    loop = CircularLoop(problem=problem, settings=TOY_RUN, store=Store(tmp_path), say=lambda line: None)
    lines, _ = run_loop(loop)
    conditions = [name for name in problem.held_out_prompts for _ in range(NOISES)]
    seeds = list(range(len(conditions)))

    def geometry(assets, names):
        return problem.parts(assets, names)["geometry"]

    def judged(structure):
        models = loop.models({"voxels": lines["voxels"]}) | structure
        return scores(problem.pipeline, geometry, conditions, seeds, models, batch_size=96)

    def rate(a, b):
        return bootstrap_mean_interval(wins(a, b).view(-1, NOISES).mean(1).double().numpy())

    better = rate(judged(loop.models({"structure": lines["structure"]})), judged({}))
    assert better.lo > 0.5, better
    pairs = loop.pairs("structure", {"voxels": lines["voxels"]})
    kept, _ = select_and_weigh(read_pairs(pairs.folder / "pairs", "structure")[0], TOY_RUN.weighing)
    turned = [replace(p, preferred=p.rejected, rejected=p.preferred) for p in kept]
    straight = rate(
        *(
            judged(_by_the_bare_margin(problem, side, tmp_path / name))
            for name, side in (("a", kept), ("b", turned))
        )
    )
    assert straight.lo > 0.5, straight


def _by_the_bare_margin(problem, pairs, out):
    """The first stage after a short training without anchors or early stop."""
    stage = problem.pipeline.stages[0]
    config = TOY_RUN.loop
    config = replace(config, dpo=replace(config.dpo, loser_weight=1.0, sft_weight=0.0), steps=60)
    result = train_stage(
        ConditionedStage(stage, problem.pipeline),
        pairs,
        config.for_stage(stage, TOY_RUN.seed),
        out,
        say=lambda line: None,
    )
    return {stage.name: tuned_model(stage.model, result.weights, merge=True)}
