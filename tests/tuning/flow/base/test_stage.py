"""Stages: noise named by seeds, latents that belong to them, and models of the wrong convention."""

import math
from dataclasses import dataclass, field, replace

import pytest
import torch

from eg3d_rlhf.models.lora_settings import LoraConfig
from eg3d_rlhf.models.policies import tuned_model
from eg3d_rlhf.models.sparse import (
    NamedBatch,
    NamedSample,
    SparseBatch,
    SparseSample,
    collate,
    feats_of,
    mean_per_sample,
    parts_of,
    separate,
    spread,
    with_feats,
)
from eg3d_rlhf.models.weights import read
from eg3d_rlhf.tuning.flow.base import stage as stages
from eg3d_rlhf.tuning.flow.base.conditioning import (
    Conditioning,
    each,
    expanded,
    read_conditioning,
    rows,
    where,
    write_conditioning,
)
from eg3d_rlhf.tuning.flow.base.pairs import PreferencePair, read_pairs, write_pairs
from eg3d_rlhf.tuning.flow.base.problem import Problem
from eg3d_rlhf.tuning.flow.base.sampling import generate, sample, trajectory
from eg3d_rlhf.tuning.flow.base.stage import (
    DenseGrid,
    Dictionary,
    FlowPath,
    FlowStage,
    Sampling,
    SparseVoxels,
    TokenSet,
    check_convention,
    opposite,
)
from eg3d_rlhf.tuning.flow.training.conditioned_stage import ConditionedStage
from eg3d_rlhf.tuning.flow.training.pair_training import train_stage
from eg3d_rlhf.tuning.flow.training.settings import DpoConfig
from tests.rejections import raising
from tests.tuning.flow import closed_forms
from tests.tuning.flow.closed_forms import Field, dense, pair_of, stage_of, tokens, voxels
from tests.tuning.flow.tiny_flow import tiny_config

STILL = Field(lambda x, t, cond: 0 * x)


def test_noise_of_a_seed_is_one_volume_read_at_the_voxels():
    stage = stage_of(STILL, sparse=True)
    flat = stage_of(STILL)
    a = voxels(0, 30)
    b = voxels(1, 40)
    (volume,) = separate(flat.noise([7], [None]))
    together = separate(stage.noise([7, 7, 8], [a.coords, b.coords, a.coords]))
    for voxel_sample, places in zip(together[:2], (a.coords, b.coords), strict=True):
        x, y, z = places.long().unbind(1)
        assert torch.equal(voxel_sample.coords, places) and torch.equal(
            voxel_sample.feats, volume[:, x, y, z].T
        )
    shared = {tuple(c): f for c, f in zip(a.coords.tolist(), together[0].feats.tolist(), strict=True)}
    common = [
        (f, shared[tuple(c)])
        for c, f in zip(b.coords.tolist(), together[1].feats.tolist(), strict=True)
        if tuple(c) in shared
    ]
    assert len(common) > 5 and all(f == g for f, g in common)
    assert not torch.equal(together[0].feats, together[2].feats)
    # whatever else is in the batch
    assert torch.equal(separate(stage.noise([8], [a.coords]))[0].feats, together[2].feats)


def test_noise_wants_voxels_within_the_grid():
    stage = stage_of(STILL, sparse=True)
    for places in (None, torch.zeros(0, 3, dtype=torch.int32)):
        with raising("'voxels'", "voxel", "none"):
            stage.noise([0], [places])
    with raising("voxel", "0 to 3", "0 to 4"):
        stage.noise([0], [torch.tensor([[0, 0, 4]])])


def test_latents_of_another_stage_are_refused():
    flat = stage_of(STILL)
    sparse = stage_of(STILL, sparse=True)
    flat.check("pair", dense(0))
    sparse.check("pair", voxels(0))
    for stage, latent, names in (
        (flat, voxels(0), ("pair", "grid", "voxels", "'structure'")),
        (sparse, dense(0), ("pair", "voxels", "grid", "'voxels'")),
        (flat, torch.zeros(2, 4, 4, 8), ("pair", "[2, 4, 4, 4]", "[2, 4, 4, 8]")),
        (
            sparse,
            stages.SparseSample(voxels(0).coords, torch.zeros(9, 3)),
            ("pair", "features", "[v, 2]", "[9, 3]"),
        ),
        (
            sparse,
            stages.SparseSample(torch.tensor([[0, -1, 0]]), torch.zeros(1, 2)),
            ("pair", "voxel", "0 to 3", "-1 to 0"),
        ),
    ):
        with raising(*names):
            stage.check("pair", latent)


def _knows(mu: torch.Tensor) -> Field:
    """The exact velocity where all data is mu."""
    return Field(lambda x, t, cond: (x - mu) / t.clamp_min(1e-3))


def test_a_model_of_the_other_convention_is_refused():
    mu = dense(3)
    cond = tokens(4)
    good = _knows(mu)
    other = Field(lambda x, t, cond: -(x - mu) / (1 - t).clamp_min(1e-3))  # v'(x, t') = -v(x, 1 - t')
    x_0 = mu.expand(4, -1, -1, -1, -1).clone()
    check_convention(stage_of(good), x_0, cond)
    check_convention(stage_of(other, data_at_one=True), x_0, cond)
    check_convention(stage_of(STILL), x_0, cond)  # an untrained model says nothing either way
    with raising("'structure'", "t = 1", "data_at_one=True"):
        check_convention(stage_of(other), x_0, cond)
    with raising("'structure'", "t = 1", "data_at_one=False"):
        check_convention(stage_of(good, data_at_one=True), x_0, cond)
    sparse = collate([voxels(i) for i in range(4)])
    still_at_zero = Field(lambda x, t, cond: -x / (1 - t).clamp_min(1e-3))
    with raising("'voxels'", "data_at_one"):
        check_convention(stage_of(still_at_zero, sparse=True), sparse.with_feats(0 * sparse.feats), cond)


@dataclass
class Two:
    """A pipeline's stages alone."""

    stages: list = field(default_factory=lambda: [stage_of(STILL), stage_of(STILL, sparse=True)])


def test_a_stage_is_found_by_name_and_a_missing_one_refused():
    assert isinstance(stages.stage_of(Two(), "voxels").latents, SparseVoxels)
    with raising("stage", "structure", "voxels", "'slat'"):
        stages.stage_of(Two(), "slat")


def problem(**changes) -> Problem:
    judges = {"reward": lambda a, c: None, "chooser": lambda a, c: None, "final": lambda a, c: None}
    known = {
        "pipeline": Two(),
        "train_pairs": {"voxels": [pair_of(0)]},
        "train_prompts": ["a", "b"],
        "held_out_prompts": ["c"],
    }
    return Problem(**{**known, **judges, **changes})


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 0},
        {"rescale_t": 0.0},
        {"cfg_strength": -1.0},
        {"cfg_interval": (0.9, 0.5)},
        {"cfg_strength": math.nan},
    ],
)
def test_sampling_settings_are_checked(options):
    with raising("Sampling", *options, *map(str, options.values())):
        Sampling(**options)
    with raising("Sampling.time_scale", "0.0"):
        Sampling(time_scale=0.0)


def test_problems_that_would_fool_themselves_are_refused():
    made = problem()
    for changes, *names in (
        ({"held_out_prompts": ["c", "a"]}, "Problem", "'a'"),
        ({"choosing_prompts": ["c"]}, "Problem", "'c'"),
        ({"final": made.chooser, "chooser": made.chooser}, "Problem.final"),
    ):
        with raising(*names):
            problem(**changes)
    with raising("FlowPath", "schedule", "cosine"):
        FlowPath(schedule="cosine")
    assert list(made.choosing) == ["c"] and list(problem(choosing_prompts=["d"]).choosing) == ["d"]


# The path between data and noise: its ends, its derivative, its times, and the other convention, which maps
# onto it exactly.


def batches() -> list[tuple]:
    """x_0 and eps in float64, dense and on voxels."""
    g = torch.Generator().manual_seed(0)
    dense = [torch.randn(3, 2, 4, 4, 4, generator=g, dtype=torch.float64) for _ in range(2)]
    sparse = SparseBatch.join([closed_forms.voxels(i, 4 + i) for i in range(3)]).to(torch.float64)
    return [
        tuple(dense),
        (sparse, sparse.with_feats(torch.randn(sparse.feats.shape, generator=g, dtype=torch.float64))),
    ]


@pytest.mark.parametrize("x_0, eps", batches())
@pytest.mark.parametrize("sigma_min", [0.0, 1e-5, 0.1])
def test_ends_derivative_and_data(x_0, eps, sigma_min):
    path = FlowPath(sigma_min=sigma_min)
    n = torch.ones(3, dtype=torch.float64)
    torch.testing.assert_close(feats_of(path.mix(x_0, n, eps)), feats_of(eps))
    torch.testing.assert_close(feats_of(path.mix(x_0, 0 * n, eps)), feats_of(x_0) + sigma_min * feats_of(eps))
    t = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    v = path.velocity(x_0, eps)
    ahead, behind = (feats_of(path.mix(x_0, t + h, eps)) for h in (1e-3, -1e-3))
    torch.testing.assert_close((ahead - behind) / 2e-3, feats_of(v))  # exact: the path is straight
    torch.testing.assert_close(feats_of(path.data(path.mix(x_0, t, eps), t, v)), feats_of(x_0))


@pytest.mark.parametrize("x_0, eps", batches())
def test_the_papers_convention_maps_exactly(x_0, eps):
    """Circular-DPO, equations 1-4: x(t') = (1 - t') x0' + t' x1' with x0' noise and x1' data, target
    x1' - x0'.
    """
    # 1 - t has no rounding
    path = FlowPath(sigma_min=0.0)
    t = torch.tensor([3, 512, 1001], dtype=torch.float64) / 1024
    wide = spread(t, x_0)
    guess = with_feats(x_0, torch.sin(feats_of(x_0)))
    paper_t, paper_guess = opposite(t, guess)
    paper_wide = spread(paper_t, x_0)
    noise = feats_of(eps)
    data = feats_of(x_0)
    paper_x = (1 - paper_wide) * noise + paper_wide * data
    paper_target = data - noise
    assert torch.equal(paper_t, 1 - t) and torch.equal(1 - paper_wide, wide)
    assert torch.equal(feats_of(path.mix(x_0, t, eps)), paper_x)
    assert torch.equal(feats_of(path.velocity(x_0, eps)), -paper_target)
    assert torch.equal(feats_of(paper_guess), -feats_of(guess))
    per_sample = mean_per_sample((feats_of(paper_guess) - paper_target).square(), x_0)
    assert torch.equal(path.errors(guess, x_0, eps), per_sample)
    back_t, back = opposite(paper_t, paper_guess)
    assert torch.equal(back_t, t) and torch.equal(feats_of(back), feats_of(guess))


def test_a_model_of_the_other_convention_samples_the_same():
    """Their Euler runs from 0 up: x += (t'_next - t') v'(x, t')."""
    paper = closed_forms.Field(lambda x, t, cond: (1 + t) * x - t * t)
    stage = closed_forms.stage_of(paper, data_at_one=True)
    noise = closed_forms.dense(1)[None]
    x = closed_forms.dense(1)[None]
    for i in range(8):
        x = x + (1 / 8) * paper.function(x, torch.tensor(i / 8), None)
    *_, (got, _) = trajectory(stage, noise, closed_forms.tokens(1), None)
    torch.testing.assert_close(got, x)
    assert torch.cat([t for t, _, _ in paper.calls]).tolist() == [i / 8 for i in range(8)]


def test_times_follow_their_schedules():
    z = torch.logit(FlowPath().times(20_000, torch.Generator().manual_seed(0)))
    assert abs(z.mean() - 1) < 0.03 and abs(z.std() - 1) < 0.03
    z = torch.logit(FlowPath(mean=-0.5, std=2.0).times(20_000, torch.Generator().manual_seed(0)))
    assert abs(z.mean() + 0.5) < 0.06 and abs(z.std() - 2) < 0.06
    t = FlowPath(schedule="uniform").times(20_000, torch.Generator().manual_seed(0))
    assert abs(t.mean() - 0.5) < 0.01 and abs(t.var() - 1 / 12) < 0.003 and 0 <= t.min() and t.max() < 1
    again = FlowPath(schedule="uniform").times(20_000, torch.Generator().manual_seed(0))
    assert torch.equal(t, again)


def test_errors_reach_the_velocity_alone():
    path = FlowPath()
    x_0, eps = batches()[0]
    v = torch.zeros_like(x_0, requires_grad=True)
    path.errors(v, x_0, eps).sum().backward()
    torch.testing.assert_close(v.grad, -2 * path.velocity(x_0, eps) / x_0[0].numel())


@pytest.mark.parametrize(
    "t",
    [
        torch.tensor([0.5, 1000.0, 0.1]),
        torch.tensor([-0.1, 0.5, 0.5]),
        torch.tensor([float("nan"), 0.5, 0.5]),
    ],
)
def test_times_of_another_range_are_refused(t):
    with raising("FlowPath.mix(t)", f"{t.min():g}", f"{t.max():g}"):
        FlowPath().mix(torch.zeros(3, 1, 2, 2, 2), t, torch.zeros(3, 1, 2, 2, 2))


# Kinds of latents: noise named by seeds, latents that belong, pairs on disk, a step of DPO and samples, for
# every kind alike.


PLACES = torch.tensor([[0, 0, 0], [0, 1, 1], [2, 1, 0]], dtype=torch.int32)
KINDS = {
    "grid": DenseGrid(channels=2, resolution=3),
    "tokens": TokenSet(tokens=5, channels=3),
    "voxels": SparseVoxels(channels=2, resolution=3, given=4),
    "named": Dictionary(shapes={"shape": (5, 2), "pose": (1, 3)}),
}
EVERY = pytest.mark.parametrize("name", list(KINDS))


class Scale(torch.nn.Module):
    """v = a number times x_t, shifted by the condition; on voxels by what is given, too."""

    def __init__(self):
        super().__init__()
        self.to_out = torch.nn.Linear(1, 1)

    def forward(self, x_t, t, cond):
        shift = cond["a"].mean() + cond["b"].mean()
        if getattr(x_t, "given", None) is not None:
            shift = shift + x_t.given.mean()
        return with_feats(x_t, self.to_out(feats_of(x_t).unsqueeze(-1)).squeeze(-1) + shift)


class OneStage:
    """A pipeline of one stage of a kind; conditions are two tensors by name."""

    def __init__(self, name: str):
        torch.manual_seed(0)
        self.stages = [
            FlowStage(
                name="only",
                model=Scale(),
                latents=KINDS[name],
                sampling=Sampling(steps=2),
                lora_targets=("to_out",),
            )
        ]
        tokens = {c: {"a": torch.full([2, 3], float(i)), "b": torch.ones(4)} for i, c in enumerate("xy")}
        self.tokens = Conditioning(tokens=tokens, zero_null=True)

    def conditioning(self, names, stage):
        return self.tokens.select(names)

    def null_conditioning(self, n, stage):
        return self.tokens.null(n)

    def decode(self, x_0):
        return separate(x_0)


def given(name: str, n: int) -> list:
    return [
        SparseSample(PLACES, torch.full([3, 4], float(i))) if name == "voxels" else None for i in range(n)
    ]


def latents(name: str, n: int, seed: int = 0) -> list:
    return separate(KINDS[name].noise("test", range(seed, seed + n), given(name, n)))


def pairs(name: str, n: int = 4) -> list[PreferencePair]:
    return [
        PreferencePair(id=str(i), condition="xy"[i % 2], stage="only", preferred=a, rejected=b)
        for i, (a, b) in enumerate(zip(latents(name, n), latents(name, n, seed=50), strict=True))
    ]


def same(a, b) -> bool:
    a = parts_of(a)
    b = parts_of(b)
    return set(a) == set(b) and all(torch.equal(a[key], b[key]) for key in a)


@EVERY
def test_a_seed_names_a_sample_wherever_it_stands(name):
    together = latents(name, 3, seed=5)
    alone = latents(name, 1, seed=6)
    assert torch.equal(feats_of(together[1]), feats_of(alone[0])) and not torch.equal(
        feats_of(together[0]), feats_of(together[1])
    )
    many = torch.cat([feats_of(one).flatten() for one in latents(name, 200)])
    assert abs(many.mean()) < 0.1 and abs(many.std() - 1) < 0.1


@EVERY
def test_latents_of_another_kind_are_refused_and_pairs_come_back_from_disk(name, tmp_path):
    made = pairs(name)
    stage = OneStage(name).stages[0]
    write_pairs(tmp_path, made, {})
    for old, new in zip(made, read_pairs(tmp_path, stage)[0], strict=True):
        assert same(old.preferred, new.preferred) and same(old.rejected, new.rejected)
    for other in set(KINDS) - {name}:
        with raising("pair", "'only'"):
            stage.check("pair", latents(other, 1)[0])
        with raising("pair '0'"):
            replace(made[0], rejected=latents(other, 1)[0])


def test_what_else_is_refused():
    with raising("pair", "pose", "shape", "size"):
        KINDS["named"].check("pair", NamedSample({"size": torch.ones(5, 2), "pose": torch.ones(1, 3)}), "")
    with raising("pair", "pose", "[1, 3]", "[1, 4]"):
        KINDS["named"].check("pair", NamedSample({"shape": torch.ones(5, 2), "pose": torch.ones(1, 4)}), "")
    with raising("pair", "voxel", "4 given", "0"):
        KINDS["voxels"].check("pair", SparseSample(PLACES, torch.ones(3, 2)), "")
    with raising("collate", "1 of 2"):
        collate([SparseSample(PLACES, torch.ones(3, 2)), latents("voxels", 1)[0]])
    with raising("'/'", "a/b"):
        NamedSample({"a/b": torch.ones(1)})


def test_every_tensor_of_a_dictionary_counts_alike():
    values = NamedBatch({"large": torch.full([2, 100], 1.0), "small": torch.full([2, 1], 3.0)})
    assert mean_per_sample(values.feats, values).tolist() == [2.0, 2.0]
    with raising("large", "small"):
        values.like({"large": torch.ones(2, 100)})


@EVERY
def test_one_stage_is_trained_its_adapter_kept_under_its_own_names_and_sampled(name, tmp_path):
    pipeline = OneStage(name)
    lora = LoraConfig(rank=1, alpha=2, targets=("to_out",))
    config = tiny_config(steps=2, log_every=1, dpo=DpoConfig(beta=20.0, condition_dropout=0.5), lora=lora)
    result = train_stage(
        ConditionedStage.from_pipeline(pipeline, "only"),
        pairs(name),
        config,
        tmp_path / "run",
        say=lambda text: None,
    )
    assert (
        result.stats[0]["loss"] == pytest.approx(math.log(2), abs=1e-3) and result.stats[-1]["grad_norm"] > 0
    )
    names = {key for key in read(result.weights / "adapter_model.safetensors", "test")}
    assert names == {f"base_model.model.to_out.lora_{part}.weight" for part in "AB"}
    tuned = tuned_model(pipeline.stages[0].model, result.weights, merge=True)
    assert set(tuned.state_dict()) == {"to_out.weight", "to_out.bias"}
    (asset,) = generate(pipeline, ["x"], [0], {"only": tuned}, stages_given={"only": given(name, 1)})
    assert feats_of(asset).isfinite().all()
    assert not torch.equal(
        feats_of(asset), feats_of(generate(pipeline, ["x"], [0], stages_given={"only": given(name, 1)})[0])
    )


@EVERY
def test_guidance_and_the_other_end_of_time_hold_for_every_kind(name):
    pipeline = OneStage(name)
    stage = pipeline.stages[0]
    noise = KINDS[name].noise("test", [3], given(name, 1))
    cond = pipeline.conditioning(["y"], "only")
    null = pipeline.null_conditioning(1, "only")
    with torch.no_grad():
        v, v_null = (feats_of(stage.velocity(noise, torch.ones(1), c)) for c in (cond, expanded(null, cond)))
    one = Sampling(steps=1, cfg_strength=2.0, cfg_interval=(0.0, 1.0))
    torch.testing.assert_close(
        feats_of(sample(stage, noise, cond, null, one)), feats_of(noise) - (3 * v - 2 * v_null)
    )
    turned = replace(stage, data_at_one=True)
    assert torch.equal(
        feats_of(turned.velocity(noise, torch.ones(1), cond)),
        -feats_of(stage.velocity(noise, torch.zeros(1), cond)),
    )
    assert set(turned.model.state_dict()) == {"to_out.weight", "to_out.bias"}


def test_conditions_by_name(tmp_path):
    made = OneStage("grid").tokens
    write_conditioning(tmp_path / "c.safetensors", made)
    again = read_conditioning(tmp_path / "c.safetensors")
    assert again.form == made.form == {"a": [2, 3], "b": [4]} and again.names == ("x", "y")
    cond = again.select(["y", "x"])
    assert rows(cond) == 2 and cond["a"][0].unique().tolist() == [1.0]
    dropped = where(torch.tensor([True, False]), again.null(1), cond)
    assert dropped["b"].sum(1).tolist() == [0.0, 4.0]
    with raising("conditioning", "a, b"):
        each(torch.add, cond, torch.ones(1))
    with raising("a: 2, b: 3"):
        rows({"a": torch.ones(2), "b": torch.ones(3)})
    with raising("stage", "[2, 3]", "a [2, 3], b [4]", "DINO"):
        again.check("stage", [2, 3], "DINO")
