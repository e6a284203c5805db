"""The loop's pairs: what both sides share, what they may differ in, and how an interrupted making goes on."""

import copy
from dataclasses import replace

import pytest
import torch

from eg3d_rlhf.models.sparse import SparseSample
from eg3d_rlhf.tuning.flow.circular import loop_pairs
from eg3d_rlhf.tuning.flow.circular.loop_pairs import SAME, LoopPairsConfig, figures, make_in_chunks, make_loop_pairs, weigh, with_roles
from eg3d_rlhf.tuning.flow.pairs import read_pairs
from tests.tuning.flow.tiny_problem import TinyAsset, full, tiny_problem

CONFIG = LoopPairsConfig(per_pair=2, batch=8, chunk=5)


def tuned(model: torch.nn.Module, seed: int = 9, by: float = 0.3) -> torch.nn.Module:
    """A copy with other weights."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        g = torch.Generator().manual_seed(seed)
        for p in other.parameters():
            p.add_(by * torch.randn(p.shape, generator=g))
    return other


@pytest.fixture(scope="module")
def problem():
    return tiny_problem()


@pytest.fixture(scope="module")
def op(problem):
    return {"voxels": tuned(problem.pipeline.stages[1].model)}


@pytest.fixture(scope="module")
def made(problem, op):
    return make_loop_pairs(problem, op, CONFIG, seed=3)


def test_every_human_pair_gives_as_many_as_asked_with_op_preferred(problem, made):
    human = problem.human_pairs("structure")
    assert len(made) == 2 * len(human)
    assert [p.id for p in made[:3]] == [f"{human[0].id}/0", f"{human[0].id}/1", f"{human[1].id}/0"]
    assert {(p.stage, p.source, p.provenance["sampled_stage"]) for p in made} == {("structure", "loop", "voxels")}
    assert all(p.condition == human[i // 2].condition for i, p in enumerate(made))


def test_both_sides_stand_on_the_preferred_structure(problem, made):
    """Decoding only carves, so nothing outside the preferred one's voxels can be filled."""
    for pair, human in zip(made[::2], problem.human_pairs("structure"), strict=True):
        room = human.preferred[0] > 0
        assert not ((pair.preferred[0] > 0) & ~room).any() and not ((pair.rejected[0] > 0) & ~room).any()


def test_rewards_are_those_of_the_assets(made):
    for pair in made[:6]:
        for latent, reward in ((pair.preferred, pair.reward_preferred), (pair.rejected, pair.reward_rejected)):
            assert reward == pytest.approx(float(full([TinyAsset(latent[0] > 0, 0.0)], [""])))


def test_an_untuned_network_gives_identical_sides_from_the_same_noise(problem):
    same = make_loop_pairs(problem, {"voxels": copy.deepcopy(problem.pipeline.stages[1].model)}, CONFIG, seed=3)
    assert all(p.provenance[SAME] and torch.equal(p.preferred, p.rejected) and p.reward_preferred == p.reward_rejected for p in same)
    kept, report = weigh(same)
    assert kept == [] and report["dropped"]["same_structure"] == len(same)
    assert figures(same)["changed_structure"] == 0 and figures(same)["op_rewarded_where_changed"] is None


def test_marks_say_whether_the_structure_changed(made):
    assert [p.provenance[SAME] for p in made] == [torch.equal(p.preferred, p.rejected) for p in made]
    assert any(not p.provenance[SAME] for p in made)


def test_noise_belongs_to_seed_and_pair_whatever_the_batch(problem, op, made):
    part = problem.human_pairs("structure")[3:6]
    again = make_loop_pairs(problem, op, replace(CONFIG, batch=3), seed=3, pairs=part)
    for a, b in zip(again, made[6:12], strict=True):
        assert a.id == b.id and torch.equal(a.preferred, b.preferred) and a.provenance == b.provenance
    other = make_loop_pairs(problem, op, CONFIG, seed=4, pairs=part)
    assert [p.provenance["noise_seed"] for p in other] != [p.provenance["noise_seed"] for p in again]


def test_the_reference_may_be_an_earlier_network(problem, op, made):
    turned = make_loop_pairs(problem, {"voxels": problem.pipeline.stages[1].model}, CONFIG, seed=3, models_unop=op)
    assert all(torch.equal(a.preferred, b.rejected) and a.reward_preferred == b.reward_rejected for a, b in zip(turned, made, strict=True))


def test_of_three_stages_only_the_one_behind_differs():
    problem = tiny_problem(stages=3)
    models = {"voxels": tuned(problem.pipeline.stages[1].model), "detail": tuned(problem.pipeline.stages[2].model)}
    middle = make_loop_pairs(problem, models, CONFIG, seed=1, stage="voxels")
    assert isinstance(middle[0].preferred, SparseSample) and {p.provenance["sampled_stage"] for p in middle} == {"detail"}
    same_middle = {"voxels": problem.pipeline.stages[1].model, "detail": models["detail"]}
    first = make_loop_pairs(problem, same_middle, CONFIG, seed=1, stage="structure")
    assert all(p.provenance[SAME] for p in first)  # the last stage's tuning is on both sides


def test_mistakes(problem, op):
    with pytest.raises(ValueError, match="expected a stage with one behind it, got 'voxels', the last"):
        make_loop_pairs(problem, op, CONFIG, seed=0, stage="voxels")
    with pytest.raises(ValueError, match="expected a tuned network of stage 'voxels', got none"):
        make_loop_pairs(problem, {}, CONFIG, seed=0)
    broken = replace(problem, reward=lambda assets, conditions: torch.full([len(assets)], float("nan")))
    with pytest.raises(ValueError, match="expected finite rewards"):
        make_loop_pairs(broken, op, CONFIG, seed=0)
    with pytest.raises(ValueError, match="per_pair must be >= 1, got 0"):
        LoopPairsConfig(per_pair=0)


def test_the_extremes_of_a_human_pairs_samples_are_one_pair(problem, made):
    found = with_roles(made, "extremes")
    assert len(found) == len(problem.human_pairs("structure"))
    for pair, one, other in zip(found, made[::2], made[1::2], strict=True):
        best = max(one, other, key=lambda p: p.reward_preferred)
        worst = min(one, other, key=lambda p: p.reward_rejected)
        assert pair.preferred is best.preferred and pair.rejected is worst.rejected and pair.provenance["of"] == 2
        assert (pair.reward_preferred, pair.reward_rejected) == (best.reward_preferred, worst.reward_rejected)
        assert pair.provenance[SAME] == torch.equal(pair.preferred, pair.rejected)


def test_roles(made):
    turned = with_roles(made, "reward")
    assert all(p.reward_preferred >= p.reward_rejected for p in turned) and with_roles(made, "op") == list(made)
    swapped = [(a, b) for a, b in zip(made, turned, strict=True) if b.provenance.get("turned")]
    assert swapped and all(torch.equal(a.preferred, b.rejected) and torch.equal(a.rejected, b.preferred) for a, b in swapped)
    with pytest.raises(ValueError, match="expected op, reward, extremes, got 'winner'"):
        with_roles(made, "winner")


def test_an_interrupted_making_keeps_its_chunks(problem, op, made, tmp_path, monkeypatch):
    calls = []
    original = loop_pairs.make_loop_pairs

    def counted(*args, **kwargs):
        calls.append(len(kwargs["pairs"]))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(loop_pairs, "make_loop_pairs", counted)
    options = {"stage": "structure", "models_unop": {}}
    with pytest.raises(KeyboardInterrupt):
        make_in_chunks(tmp_path, problem, op, CONFIG, 3, **options)
    place, found = make_in_chunks(tmp_path, problem, op, CONFIG, 3, **options)
    assert calls == [5, 5, 5, 2]  # the first chunk was kept
    pairs, _ = read_pairs(place, problem.pipeline.stages[0])
    assert [p.id for p in pairs] == [p.id for p in made] and found["pairs"] == len(made)
    assert all(torch.equal(a.preferred, b.preferred) and a.reward_rejected == b.reward_rejected for a, b in zip(pairs, made, strict=True))
    assert not (tmp_path / "chunks").exists()
