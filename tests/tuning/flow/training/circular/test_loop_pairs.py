"""Test the loop's pairs: what the tuned and the reference sample share, where they may differ, and how an
interrupted call resumes.
"""

import copy
import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eg3d_rlhf.models.sparse import SparseSample
from eg3d_rlhf.tuning.flow.base.pairs import read_pairs
from eg3d_rlhf.tuning.flow.training.circular.loop_pairs import (
    SAME,
    LoopPairMaker,
    make_in_chunks,
    same_structure,
    summarise_pairs,
    w1,
    weigh,
    win_shares,
    with_roles,
)
from eg3d_rlhf.tuning.flow.training.circular.settings import LoopPairsConfig
from tests.rejections import raising
from tests.tuning.flow.closed_forms import dense, pair_of, voxels
from tests.tuning.flow.tiny_problem import TinyAsset, full, tiny_problem

CONFIG = LoopPairsConfig(per_pair=2, batch=8, chunk=5)


def tuned(model: torch.nn.Module, seed: int = 9, by: float = 0.3) -> torch.nn.Module:
    """Return a copy of a network with other weights."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        g = torch.Generator().manual_seed(seed)
        for p in other.parameters():
            p.add_(by * torch.randn(p.shape, generator=g))
    return other


def make_loop_pairs(problem, tuned_models, config, seed, pairs=None, stage="structure", **options):
    make = LoopPairMaker.from_problem(problem, tuned_models, config, seed, stage=stage, **options)
    return make(problem.train_pairs[stage] if pairs is None else pairs)


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
    human = problem.train_pairs["structure"]
    assert len(made) == 2 * len(human)
    assert [p.id for p in made[:3]] == [f"{human[0].id}/0", f"{human[0].id}/1", f"{human[1].id}/0"]
    assert {(p.stage, p.source, p.provenance["sampled_stage"]) for p in made} == {
        ("structure", "loop", "voxels")
    }
    assert all(p.condition == human[i // 2].condition for i, p in enumerate(made))


def test_both_sides_stand_on_the_preferred_structure(problem, made):
    """Decoding only removes voxels, so no voxel outside the preferred structure can be filled."""
    for pair, human in zip(made[::2], problem.train_pairs["structure"], strict=True):
        room = human.preferred[0] > 0
        assert not ((pair.preferred[0] > 0) & ~room).any() and not ((pair.rejected[0] > 0) & ~room).any()


def test_rewards_are_those_of_the_assets(made):
    for pair in made[:6]:
        for latent, reward in (
            (pair.preferred, pair.reward_preferred),
            (pair.rejected, pair.reward_rejected),
        ):
            assert reward == pytest.approx(float(full([TinyAsset(latent[0] > 0, 0.0)], [""])))


def test_an_untuned_network_gives_identical_sides_from_the_same_noise(problem):
    same = make_loop_pairs(
        problem, {"voxels": copy.deepcopy(problem.pipeline.stages[1].model)}, CONFIG, seed=3
    )
    assert all(
        p.provenance[SAME]
        and torch.equal(p.preferred, p.rejected)
        and p.reward_preferred == p.reward_rejected
        for p in same
    )
    kept, report = weigh(same)
    assert kept == [] and report["dropped"]["same_structure"] == len(same)
    assert (
        summarise_pairs(same)["changed_structure"] == 0
        and summarise_pairs(same)["tuned_rewarded_where_changed"] is None
    )


def test_marks_say_whether_the_structure_changed(made):
    assert [p.provenance[SAME] for p in made] == [torch.equal(p.preferred, p.rejected) for p in made]
    assert any(not p.provenance[SAME] for p in made)


def test_noise_belongs_to_seed_and_pair_whatever_the_batch(problem, op, made):
    part = problem.train_pairs["structure"][3:6]
    again = make_loop_pairs(problem, op, replace(CONFIG, batch=3), seed=3, pairs=part)
    for a, b in zip(again, made[6:12], strict=True):
        assert a.id == b.id and torch.equal(a.preferred, b.preferred) and a.provenance == b.provenance
    other = make_loop_pairs(problem, op, CONFIG, seed=4, pairs=part)
    assert [p.provenance["noise_seed"] for p in other] != [p.provenance["noise_seed"] for p in again]


def test_the_reference_may_be_an_earlier_network(problem, op, made):
    turned = make_loop_pairs(
        problem, {"voxels": problem.pipeline.stages[1].model}, CONFIG, seed=3, reference_models=op
    )
    assert all(
        torch.equal(a.preferred, b.rejected) and a.reward_preferred == b.reward_rejected
        for a, b in zip(turned, made, strict=True)
    )


def test_of_three_stages_only_the_one_behind_differs():
    problem = tiny_problem(stages=3)
    models = {
        "voxels": tuned(problem.pipeline.stages[1].model),
        "detail": tuned(problem.pipeline.stages[2].model),
    }
    middle = make_loop_pairs(problem, models, CONFIG, seed=1, stage="voxels")
    assert isinstance(middle[0].preferred, SparseSample) and {
        p.provenance["sampled_stage"] for p in middle
    } == {"detail"}
    same_middle = {"voxels": problem.pipeline.stages[1].model, "detail": models["detail"]}
    first = make_loop_pairs(problem, same_middle, CONFIG, seed=1, stage="structure")
    assert all(p.provenance[SAME] for p in first)  # the last stage's tuning is on both sides


def test_rewards_that_are_not_finite_are_rejected(problem, op):
    broken = replace(problem, reward=lambda assets, conditions: torch.full([len(assets)], float("nan")))
    with raising("pairs", "NaN"):
        make_loop_pairs(broken, op, CONFIG, seed=0)


def test_roles(made):
    turned = with_roles(made, "reward")
    assert all(p.reward_preferred >= p.reward_rejected for p in turned) and with_roles(made, "tuned") == list(
        made
    )
    swapped = [(a, b) for a, b in zip(made, turned, strict=True) if b.provenance.get("inverted")]
    assert swapped and all(
        torch.equal(a.preferred, b.rejected) and torch.equal(a.rejected, b.preferred) for a, b in swapped
    )


def test_an_interrupted_making_keeps_its_chunks(problem, op, made, tmp_path, monkeypatch):
    calls = []
    original = LoopPairMaker.__call__

    def counted(self, pairs, on_pair=None):
        calls.append(len(pairs))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(self, pairs, on_pair)

    monkeypatch.setattr(LoopPairMaker, "__call__", counted)
    make = LoopPairMaker.from_problem(problem, op, CONFIG, 3, stage="structure")
    human = problem.train_pairs["structure"]
    with pytest.raises(KeyboardInterrupt):
        make_in_chunks(tmp_path, make, human)
    place, found = make_in_chunks(tmp_path, make, human)
    assert calls == [5, 5, 5, 2]  # the first chunk was kept
    pairs, _ = read_pairs(place, problem.pipeline.stages[0])
    assert [p.id for p in pairs] == [p.id for p in made] and found["pairs"] == len(made)
    assert all(
        torch.equal(a.preferred, b.preferred) and a.reward_rejected == b.reward_rejected
        for a, b in zip(pairs, made, strict=True)
    )
    assert not (tmp_path / "chunks").exists()


# w1 keeps what the reward prefers, w2 has mean one, and nothing is dropped without being counted.


def scored(rewards, sparse=False, **columns):
    """Make one pair for each (preferred, rejected) reward."""
    return [
        pair_of(i, sparse, reward_preferred=float(a), reward_rejected=float(b), **columns)
        for i, (a, b) in enumerate(rewards)
    ]


def test_win_shares_count_wins_and_sum_to_one():
    rewards = torch.tensor([0.3, -1.0, 2.0, 0.3, 0.0])
    wins = [
        sum(1.0 if a > b else 0.5 for j, b in enumerate(rewards) if j != i and a >= b)
        for i, a in enumerate(rewards)
    ]
    torch.testing.assert_close(win_shares(rewards), 2 * torch.tensor(wins, dtype=torch.float64) / 20)
    assert win_shares(rewards).sum().item() == pytest.approx(1)


@given(st.lists(st.sampled_from([-2.0, -0.5, 0.0, 1e-7, 0.25, 3.0, 1e6]), min_size=2, max_size=9))
@settings(max_examples=60, deadline=None)
def test_w1_is_positive_exactly_where_the_reward_gap_is(rewards):
    values = torch.tensor(rewards, dtype=torch.float64)
    i, j = torch.tensor(list(itertools.permutations(range(len(rewards)), 2))).unbind(1)
    assert torch.equal(w1(values, i, j).sign(), (values[i] - values[j]).sign())


def test_weigh_keeps_exactly_the_positive_gaps():
    g = torch.Generator().manual_seed(0)
    rewards = torch.randn(40, 2, generator=g)
    rewards[5] = rewards[5, 0]
    pairs = scored(rewards.tolist())
    kept, report = weigh(pairs)
    assert [p.id for p in kept] == [p.id for p in pairs if p.reward_preferred > p.reward_rejected]
    assert (
        report["pairs"] == 40
        and report["kept"] == len(kept)
        and report["dropped"] == {"same_structure": 0, "w1": 40 - len(kept)}
    )
    assert all(p.w1 > 0 for p in kept) and report["w1"]["min"] < 0 and report["reward_gap"]["min"] > 0


def test_w2_has_mean_one_over_the_kept_and_orders_by_gap():
    kept, report = weigh(scored([(a, 0.0) for a in (0.1, -3.0, 2.0, 0.7)]))
    gaps = torch.tensor([0.1, 2.0, 0.7], dtype=torch.float64)
    expected = torch.sigmoid(gaps) / torch.sigmoid(gaps).mean()
    torch.testing.assert_close(torch.tensor([p.w2 for p in kept], dtype=torch.float64), expected)
    # after the filter, sigmoid > 1/2
    assert report["w2"]["mean"] == pytest.approx(1) and report["w2"]["max"] / report["w2"]["min"] < 2


def test_ablations_switch_one_column_each():
    pairs = scored([(1.0, 0.0), (0.0, 1.0), (2.0, 0.0)])
    unfiltered, report = weigh(pairs, use_w1=False)
    assert len(unfiltered) == 3 and unfiltered[1].w1 < 0 and report["dropped"]["w1"] == 0
    assert sum(p.w2 for p in unfiltered) / 3 == pytest.approx(1)
    unweighted, report = weigh(pairs, use_w2=False)
    assert (
        len(unweighted) == 2 and all(p.w2 is None and p.w1 > 0 for p in unweighted) and report["w2"] is None
    )
    neither, report = weigh([pair_of(0)], use_w1=False, use_w2=False)
    assert len(neither) == 1 and neither[0].w1 is None and report["w1"] is None


def test_w1_counts_all_candidates_of_a_condition():
    """Three pairs of one prompt have six candidates, whose shares are 2C/30."""
    pairs = scored([(5.0, 0.0), (4.0, 3.5), (3.0, 2.0)], condition="chair")
    best = torch.tensor(2 ** (10 / 30) - 1)
    kept, _ = weigh(pairs)
    assert kept[0].w1 == pytest.approx(best.item()) and kept[1].w1 < 0.1
    apart = [replace(p, condition=p.id) for p in pairs]  # candidates of other conditions do not count
    assert all(p.w1 == pytest.approx(1) for p in weigh(apart)[0])


def test_pairs_of_one_structure_are_dropped_and_counted():
    a = voxels(0)
    b = voxels(1)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    shuffled = SparseSample(a.coords[order], a.feats[order])
    one = pair_of(0, True)
    assert same_structure(replace(one, preferred=a, rejected=shuffled)) and not same_structure(
        replace(one, preferred=a, rejected=b)
    )
    assert not same_structure(replace(one, preferred=a, rejected=SparseSample(a.coords, a.feats + 0.1)))
    grid = dense(0)
    assert same_structure(replace(pair_of(0), preferred=grid, rejected=grid * (1 + 1e-6)))
    assert not same_structure(pair_of(0))
    assert same_structure(replace(pair_of(0), provenance={"same_structure": True}))
    assert not same_structure(replace(pair_of(0, same=True), provenance={"same_structure": False}))
    pairs = scored([(1.0, 0.0), (2.0, 0.0)])
    pairs[0] = replace(pairs[0], rejected=pairs[0].preferred)
    kept, report = weigh(pairs)
    assert [p.id for p in kept] == ["pair-1"] and report["dropped"] == {"same_structure": 1, "w1": 0}
    assert weigh(pairs[:1])[0] == [] and weigh([])[1]["kept"] == 0


def test_pairs_without_rewards_or_with_one_name_are_rejected():
    with raising("weigh", "pair-1"):
        weigh([*scored([(1.0, 0.0)]), pair_of(1)])
    with raising("weigh", "1", "'pair-0'"):
        weigh(scored([(1.0, 0.0)]) * 2)
