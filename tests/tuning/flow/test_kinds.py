"""Kinds of latents: noise named by seeds, latents that belong, pairs on disk, a step of DPO and samples, for every kind alike."""

import math
from dataclasses import replace

import pytest
import torch

from eg3d_rlhf.models.lora import LoraConfig
from eg3d_rlhf.models.policies import read_state, tuned_model
from eg3d_rlhf.models.sparse import (
    NamedBatch,
    NamedSample,
    SparseSample,
    collate,
    feats_of,
    mean_per_sample,
    parts_of,
    separate,
    with_feats,
)
from eg3d_rlhf.tuning.flow.conditions import Conditions, each, expanded, read_conditions, rows, where, write_conditions
from eg3d_rlhf.tuning.flow.dpo import DpoConfig
from eg3d_rlhf.tuning.flow.generate import generate, sample
from eg3d_rlhf.tuning.flow.pairs import PreferencePair, read_pairs, write_pairs
from eg3d_rlhf.tuning.flow.stage import DenseGrid, Dictionary, FlowStage, Sampling, SparseVoxels, TokenSet
from eg3d_rlhf.tuning.flow.train_pairs import train_stage
from tests.tuning.flow.tiny_flow import tiny_config

PLACES = torch.tensor([[0, 0, 0], [0, 1, 1], [2, 1, 0]], dtype=torch.int32)
KINDS = {
    "grid": DenseGrid(channels=2, resolution=3), "tokens": TokenSet(tokens=5, channels=3),
    "voxels": SparseVoxels(channels=2, resolution=3, given=4), "named": Dictionary(shapes={"shape": (5, 2), "pose": (1, 3)}),
}  # fmt: skip
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
        self.stages = [FlowStage(name="only", model=Scale(), latents=KINDS[name], sampling=Sampling(steps=2), lora_targets=("to_out",))]
        tokens = {c: {"a": torch.full([2, 3], float(i)), "b": torch.ones(4)} for i, c in enumerate("xy")}
        self.tokens = Conditions(tokens=tokens, zero_null=True)

    def conditions(self, names, stage):
        return self.tokens.of(names)

    def no_condition(self, n, stage):
        return self.tokens.null(n)

    def decode(self, x_0):
        return separate(x_0)


def given(name: str, n: int) -> list:
    return [SparseSample(PLACES, torch.full([3, 4], float(i))) if name == "voxels" else None for i in range(n)]


def latents(name: str, n: int, seed: int = 0) -> list:
    return separate(KINDS[name].noise("test", range(seed, seed + n), given(name, n)))


def pairs(name: str, n: int = 4) -> list[PreferencePair]:
    return [
        PreferencePair(id=str(i), condition="xy"[i % 2], stage="only", preferred=a, rejected=b)
        for i, (a, b) in enumerate(zip(latents(name, n), latents(name, n, seed=50), strict=True))
    ]


def same(a, b) -> bool:
    a, b = parts_of(a), parts_of(b)
    return set(a) == set(b) and all(torch.equal(a[key], b[key]) for key in a)


@EVERY
def test_a_seed_names_a_sample_wherever_it_stands(name):
    together, alone = latents(name, 3, seed=5), latents(name, 1, seed=6)
    assert torch.equal(feats_of(together[1]), feats_of(alone[0])) and not torch.equal(feats_of(together[0]), feats_of(together[1]))
    many = torch.cat([feats_of(one).flatten() for one in latents(name, 200)])
    assert abs(many.mean()) < 0.1 and abs(many.std() - 1) < 0.1


@EVERY
def test_latents_of_another_kind_are_refused_and_pairs_come_back_from_disk(name, tmp_path):
    made, stage = pairs(name), OneStage(name).stages[0]
    write_pairs(tmp_path, made, {})
    for old, new in zip(made, read_pairs(tmp_path, stage)[0], strict=True):
        assert same(old.preferred, new.preferred) and same(old.rejected, new.rejected)
    for other in set(KINDS) - {name}:
        with pytest.raises(ValueError, match="pair: expected .*It is no latent of stage 'only'"):
            stage.check("pair", latents(other, 1)[0])
        with pytest.raises(ValueError, match="expected two latents of one form"):
            replace(made[0], rejected=latents(other, 1)[0])


def test_what_else_is_refused():
    with pytest.raises(ValueError, match="expected tensors pose, shape, got pose, size"):
        KINDS["named"].check("pair", NamedSample({"size": torch.ones(5, 2), "pose": torch.ones(1, 3)}), "")
    with pytest.raises(ValueError, match=r"pair, pose: expected \[1, 3\], got \[1, 4\]"):
        KINDS["named"].check("pair", NamedSample({"shape": torch.ones(5, 2), "pose": torch.ones(1, 4)}), "")
    with pytest.raises(ValueError, match="expected 4 given features per voxel, got 0"):
        KINDS["voxels"].check("pair", SparseSample(PLACES, torch.ones(3, 2)), "")
    with pytest.raises(ValueError, match="given features on all samples or none, got 1 of 2"):
        collate([SparseSample(PLACES, torch.ones(3, 2)), latents("voxels", 1)[0]])
    with pytest.raises(ValueError, match="Dictionary: expected pose >= 1, got 0"):
        Dictionary(shapes={"pose": ()})
    with pytest.raises(ValueError, match="TokenSet: expected tokens and channels >= 1, got 0 and 3"):
        TokenSet(tokens=0, channels=3)
    with pytest.raises(ValueError, match="without '/'"):
        NamedSample({"a/b": torch.ones(1)})


def test_every_tensor_of_a_dictionary_counts_alike():
    values = NamedBatch({"large": torch.full([2, 100], 1.0), "small": torch.full([2, 1], 3.0)})
    assert mean_per_sample(values.feats, values).tolist() == [2.0, 2.0]
    with pytest.raises(ValueError, match="Return a tensor for each"):
        values.like({"large": torch.ones(2, 100)})


@EVERY
def test_one_stage_is_trained_its_adapter_kept_under_its_own_names_and_sampled(name, tmp_path):
    pipeline = OneStage(name)
    lora = LoraConfig(rank=1, alpha=2, targets=("to_out",))
    config = tiny_config(steps=2, log_every=1, dpo=DpoConfig(beta=20.0, condition_dropout=0.5), lora=lora)
    result = train_stage(pipeline, "only", pairs(name), config, tmp_path / "run", say=lambda text: None)
    assert result.stats[0]["loss"] == pytest.approx(math.log(2), abs=1e-3) and result.stats[-1]["grad_norm"] > 0
    names = {key for key in read_state(result.weights / "adapter_model.safetensors")}
    assert names == {f"base_model.model.to_out.lora_{part}.weight" for part in "AB"}
    tuned = tuned_model(pipeline.stages[0].model, result.weights, merge=True)
    assert set(tuned.state_dict()) == {"to_out.weight", "to_out.bias"}
    (asset,) = generate(pipeline, ["x"], [0], {"only": tuned}, stages_given={"only": given(name, 1)})
    assert feats_of(asset).isfinite().all()
    assert not torch.equal(feats_of(asset), feats_of(generate(pipeline, ["x"], [0], stages_given={"only": given(name, 1)})[0]))


@EVERY
def test_guidance_and_the_other_end_of_time_hold_for_every_kind(name):
    pipeline = OneStage(name)
    stage, noise = pipeline.stages[0], KINDS[name].noise("test", [3], given(name, 1))
    cond, null = pipeline.conditions(["y"], "only"), pipeline.no_condition(1, "only")
    with torch.no_grad():
        v, v_null = (feats_of(stage.velocity(noise, torch.ones(1), c)) for c in (cond, expanded(null, cond)))
    one = Sampling(steps=1, cfg_strength=2.0, cfg_interval=(0.0, 1.0))
    torch.testing.assert_close(feats_of(sample(stage, noise, cond, null, one)), feats_of(noise) - (3 * v - 2 * v_null))
    turned = replace(stage, data_at_one=True)
    assert torch.equal(feats_of(turned.velocity(noise, torch.ones(1), cond)), -feats_of(stage.velocity(noise, torch.zeros(1), cond)))
    assert set(turned.model.state_dict()) == {"to_out.weight", "to_out.bias"}


def test_conditions_by_name(tmp_path):
    made = OneStage("grid").tokens
    write_conditions(tmp_path / "c.safetensors", made)
    again = read_conditions(tmp_path / "c.safetensors")
    assert again.form == made.form == {"a": [2, 3], "b": [4]} and again.names == ("x", "y")
    cond = again.of(["y", "x"])
    assert rows(cond) == 2 and cond["a"][0].unique().tolist() == [1.0]
    dropped = where(torch.tensor([True, False]), again.null(1), cond)
    assert dropped["b"].sum(1).tolist() == [0.0, 4.0]
    with pytest.raises(ValueError, match="expected tensors a, b of each"):
        each(torch.add, cond, torch.ones(1))
    with pytest.raises(ValueError, match="one row per sample, got"):
        rows({"a": torch.ones(2), "b": torch.ones(3)})
    with pytest.raises(ValueError, match=r"stage: expected embeddings \[2, 3\], got \{'a': \[2, 3\], 'b': \[4\]\}. Embed them with DINO"):
        again.check("stage", [2, 3], "DINO")
    with pytest.raises(ValueError, match="expected tokens alone"):
        _ = again.size
