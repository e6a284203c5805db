"""Stages: noise named by seeds, latents that belong to them, and models of the wrong convention."""

import math
from dataclasses import dataclass, field

import pytest
import torch

from eg3d_rlhf.models.sparse import collate, separate
from eg3d_rlhf.tuning.flow import stage as stages
from eg3d_rlhf.tuning.flow.problem import Problem
from eg3d_rlhf.tuning.flow.stage import DenseGrid, FlowStage, Sampling, SparseVoxels, check_convention
from tests.tuning.flow.closed_forms import Field, dense, pair_of, stage_of, tokens, voxels

STILL = Field(lambda x, t, cond: 0 * x)


def test_noise_of_a_seed_is_one_volume_read_at_the_voxels():
    stage, flat = stage_of(STILL, sparse=True), stage_of(STILL)
    a, b = voxels(0, 30), voxels(1, 40)
    (volume,) = separate(flat.noise([7], [None]))
    together = separate(stage.noise([7, 7, 8], [a.coords, b.coords, a.coords]))
    for sample, places in zip(together[:2], (a.coords, b.coords), strict=True):
        x, y, z = places.long().unbind(1)
        assert torch.equal(sample.coords, places) and torch.equal(sample.feats, volume[:, x, y, z].T)
    shared = {tuple(c): f for c, f in zip(a.coords.tolist(), together[0].feats.tolist(), strict=True)}
    common = [(f, shared[tuple(c)]) for c, f in zip(b.coords.tolist(), together[1].feats.tolist(), strict=True) if tuple(c) in shared]
    assert len(common) > 5 and all(f == g for f, g in common)
    assert not torch.equal(together[0].feats, together[2].feats)
    assert torch.equal(separate(stage.noise([8], [a.coords]))[0].feats, together[2].feats)  # whatever else is in the batch


def test_noise_is_standard_normal():
    stage = FlowStage(name="large", model=STILL, latents=DenseGrid(channels=8, resolution=16))
    noise = stage.noise([0, 1], [None, None])
    assert noise.shape == (2, 8, 16, 16, 16) and abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
    assert abs((noise[0] * noise[1]).mean()) < 0.02


def test_noise_wants_voxels_within_the_grid():
    stage = stage_of(STILL, sparse=True)
    for places in (None, torch.zeros(0, 3, dtype=torch.int32)):
        with pytest.raises(ValueError, match="FlowStage.noise of 'voxels': expected a voxel or more per sample, got none"):
            stage.noise([0], [places])
    with pytest.raises(ValueError, match="expected voxel indices from 0 to 3, got 0 to 4"):
        stage.noise([0], [torch.tensor([[0, 0, 4]])])


def test_latents_of_another_stage_are_refused():
    flat, sparse = stage_of(STILL), stage_of(STILL, sparse=True)
    flat.check("pair", dense(0))
    sparse.check("pair", voxels(0))
    for stage, latent, message in (
        (flat, voxels(0), "pair: expected a dense grid, got voxels. It is no latent of stage 'structure'"),
        (sparse, dense(0), "pair: expected voxels, got a dense grid"),
        (flat, torch.zeros(2, 4, 4, 8), r"expected \[2, 4, 4, 4\], got \[2, 4, 4, 8\]"),
        (sparse, stages.SparseSample(voxels(0).coords, torch.zeros(9, 3)), r"features: expected \[v, 2\], got \[9, 3\]"),
        (sparse, stages.SparseSample(torch.tensor([[0, -1, 0]]), torch.zeros(1, 2)), "expected voxel indices from 0 to 3, got -1 to 0"),
    ):
        with pytest.raises(ValueError, match=message):
            stage.check("pair", latent)


def _knows(mu: torch.Tensor) -> Field:
    """The exact velocity where all data is mu."""
    return Field(lambda x, t, cond: (x - mu) / t.clamp_min(1e-3))


def test_a_model_of_the_other_convention_is_refused():
    mu, cond = dense(3), tokens(4)
    good = _knows(mu)
    other = Field(lambda x, t, cond: -(x - mu) / (1 - t).clamp_min(1e-3))  # v'(x, t') = -v(x, 1 - t')
    x_0 = mu.expand(4, -1, -1, -1, -1).clone()
    check_convention(stage_of(good), x_0, cond)
    check_convention(stage_of(other, data_at_one=True), x_0, cond)
    check_convention(stage_of(STILL), x_0, cond)  # an untrained model says nothing either way
    with pytest.raises(ValueError, match="stage 'structure': expected velocities of the convention with noise at t = 1.*data_at_one=True"):
        check_convention(stage_of(other), x_0, cond)
    with pytest.raises(ValueError, match="of the convention with data at t = 1.*data_at_one=False"):
        check_convention(stage_of(good, data_at_one=True), x_0, cond)
    sparse = collate([voxels(i) for i in range(4)])
    still_at_zero = Field(lambda x, t, cond: -x / (1 - t).clamp_min(1e-3))
    with pytest.raises(ValueError, match="stage 'voxels'"):
        check_convention(stage_of(still_at_zero, sparse=True), sparse.with_feats(0 * sparse.feats), cond)


@dataclass
class Two:
    """A pipeline's stages alone."""

    stages: list = field(default_factory=lambda: [stage_of(STILL), stage_of(STILL, sparse=True)])


def test_a_stage_is_found_by_name_and_a_missing_one_refused():
    assert isinstance(stages.stage_of(Two(), "voxels").latents, SparseVoxels)
    with pytest.raises(ValueError, match="stage: expected one of structure, voxels, got 'slat'. Name a stage of this pipeline."):
        stages.stage_of(Two(), "slat")


def problem(**changes) -> Problem:
    judges = {"reward": lambda a, c: None, "chooser": lambda a, c: None, "final": lambda a, c: None}
    known = {"pipeline": Two(), "human_pairs": lambda name: [pair_of(0)], "train_conditions": ["a", "b"], "held_out_conditions": ["c"]}
    return Problem(**{**known, **judges, **changes})


def test_problems_that_would_fool_themselves_are_refused():
    made = problem()
    with pytest.raises(ValueError, match=r"apart from the trained, got \['a'\] in both"):
        problem(held_out_conditions=["c", "a"])
    with pytest.raises(ValueError, match=r"apart from the trained, got \['c'\] in both"):
        problem(choosing_conditions=["c"])
    assert list(made.choosing) == ["c"] and list(problem(choosing_conditions=["d"]).choosing) == ["d"]
    with pytest.raises(ValueError, match="Problem.final: expected a judge of its own"):
        problem(final=made.chooser, chooser=made.chooser)
    with pytest.raises(ValueError, match=r"stages of different names, got \['structure', 'structure'\]"):
        problem(pipeline=Two(stages=[stage_of(STILL)] * 2))
    assert len(problem(pipeline=Two(stages=[stage_of(STILL)])).pipeline.stages) == 1
    with pytest.raises(ValueError, match="train_conditions: expected one condition or more"):
        problem(train_conditions=[])


@pytest.mark.parametrize(
    "options", [{"steps": 0}, {"rescale_t": 0.0}, {"cfg_strength": -1.0}, {"cfg_interval": (0.9, 0.5)}, {"cfg_strength": math.nan}]
)
def test_sampling_settings_are_checked(options):
    with pytest.raises(ValueError, match="Sampling: expected steps >= 1, finite rescale_t > 0 .* Correct them."):
        Sampling(**options)


def test_stage_settings_are_checked():
    with pytest.raises(ValueError, match="FlowStage: expected a name, got ''"):
        FlowStage(name="", model=STILL, latents=DenseGrid(channels=2, resolution=1))
    with pytest.raises(ValueError, match="DenseGrid: expected channels and resolution >= 1, got 2 and 0"):
        DenseGrid(channels=2, resolution=0)
