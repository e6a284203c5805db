"""w1 keeps what the reward prefers, w2 has mean one, and nothing is dropped without being counted."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eg3d_rlhf.models.sparse import SparseSample
from eg3d_rlhf.tuning.flow.circular.loop_pairs import same_structure, w1, w2, weigh, win_shares
from tests.tuning.flow.closed_forms import dense, pair_of, voxels


def scored(rewards, sparse=False, **columns):
    """A pair per (preferred, rejected) reward."""
    return [pair_of(i, sparse, reward_preferred=float(a), reward_rejected=float(b), **columns) for i, (a, b) in enumerate(rewards)]


def test_win_shares_count_wins_and_sum_to_one():
    rewards = torch.tensor([0.3, -1.0, 2.0, 0.3, 0.0])
    wins = [sum(1.0 if a > b else 0.5 for j, b in enumerate(rewards) if j != i and a >= b) for i, a in enumerate(rewards)]
    torch.testing.assert_close(win_shares(rewards), 2 * torch.tensor(wins, dtype=torch.float64) / 20)
    assert win_shares(rewards).sum().item() == pytest.approx(1)
    for bad in (torch.tensor([1.0]), torch.tensor([1.0, float("nan")])):
        with pytest.raises(ValueError, match="win_shares: expected finite rewards of two candidates or more"):
            win_shares(bad)


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
    assert report["pairs"] == 40 and report["kept"] == len(kept) and report["dropped"] == {"same_structure": 0, "w1": 40 - len(kept)}
    assert all(p.w1 > 0 for p in kept) and report["w1"]["min"] < 0 and report["reward_gap"]["min"] > 0


def test_w2_has_mean_one_over_the_kept_and_orders_by_gap():
    kept, report = weigh(scored([(a, 0.0) for a in (0.1, -3.0, 2.0, 0.7)]))
    gaps = torch.tensor([0.1, 2.0, 0.7], dtype=torch.float64)
    expected = torch.sigmoid(gaps) / torch.sigmoid(gaps).mean()
    torch.testing.assert_close(torch.tensor([p.w2 for p in kept], dtype=torch.float64), expected)
    assert report["w2"]["mean"] == pytest.approx(1) and report["w2"]["max"] / report["w2"]["min"] < 2  # after the filter, sigmoid > 1/2
    assert report["w2_norm"] == "dataset"
    raw, _ = weigh(scored([(2.0, 0.0)]), w2_norm="none")
    assert raw[0].w2 == pytest.approx(torch.sigmoid(torch.tensor(2.0)).item())
    batch, _ = weigh(scored([(2.0, 0.0)]), w2_norm="batch")
    assert batch[0].w2 == raw[0].w2 and batch[0].provenance["w2_norm"] == "batch"


def test_w2_is_normalised_over_the_kept_alone():
    gaps, keep = torch.tensor([1.0, -1.0, 3.0]), torch.tensor([True, False, True])
    weights = w2(gaps, keep)
    assert weights[keep].mean().item() == pytest.approx(1)
    assert weights[1] == pytest.approx(torch.sigmoid(gaps[1]) / torch.sigmoid(gaps)[keep].mean())
    with pytest.raises(ValueError, match="w2: expected norm one of dataset, batch, none, got 'mean'"):
        w2(gaps, keep, "mean")


def test_ablations_switch_one_column_each():
    pairs = scored([(1.0, 0.0), (0.0, 1.0), (2.0, 0.0)])
    unfiltered, report = weigh(pairs, use_w1=False)
    assert len(unfiltered) == 3 and unfiltered[1].w1 < 0 and report["dropped"]["w1"] == 0 and report["tau"] is None
    assert sum(p.w2 for p in unfiltered) / 3 == pytest.approx(1)
    unweighted, report = weigh(pairs, use_w2=False)
    assert len(unweighted) == 2 and all(p.w2 is None and p.w1 > 0 for p in unweighted) and report["w2"] is None
    neither, report = weigh([pair_of(0)], use_w1=False, use_w2=False)
    assert len(neither) == 1 and neither[0].w1 is None and report["w1"] is None


def test_tau_asks_for_more():
    """Three candidates' pairs of one condition: shares 2C/30 of six candidates."""
    pairs = scored([(5.0, 0.0), (4.0, 3.5), (3.0, 2.0)], condition="chair")
    best = torch.tensor(2 ** (10 / 30) - 1)
    kept, _ = weigh(pairs, tau=0.1)
    assert [p.id for p in kept] == ["pair-0"] and kept[0].w1 == pytest.approx(best.item())
    apart = [replace(p, condition=p.id) for p in pairs]  # candidates of other conditions do not count
    assert all(p.w1 == pytest.approx(1) for p in weigh(apart)[0])


def test_pairs_of_one_structure_are_dropped_and_counted():
    a, b = voxels(0), voxels(1)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    shuffled = SparseSample(a.coords[order], a.feats[order])
    one = pair_of(0, True)
    assert same_structure(replace(one, preferred=a, rejected=shuffled)) and not same_structure(replace(one, preferred=a, rejected=b))
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


def test_pairs_without_rewards_or_with_one_name_are_refused():
    with pytest.raises(ValueError, match="weigh: expected both rewards on every pair, got none on pair-1"):
        weigh([*scored([(1.0, 0.0)]), pair_of(1)])
    with pytest.raises(ValueError, match="weigh: expected every id once, got 1 repeated, such as 'pair-0'"):
        weigh(scored([(1.0, 0.0)]) * 2)
    with pytest.raises(ValueError, match="weigh: expected a finite tau, got nan"):
        weigh(scored([(1.0, 0.0)]), tau=float("nan"))
