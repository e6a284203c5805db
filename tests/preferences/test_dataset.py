"""Splits share no seed, in any label graph; reference samples; agreement of labels."""

from hypothesis import given, settings
from hypothesis import strategies as st

from eg3d_rlhf.preferences.dataset import common_value, reference_seeds, split_by_seed
from eg3d_rlhf.preferences.labels import Preference
from tests.rejections import raising


def pairs(edges):
    return [Preference(winner=a, loser=b) for a, b in edges]


def seeds_of(part):
    return {s for label in part for s in (label.winner, label.loser)}


EDGE = st.tuples(st.integers(0, 60), st.integers(0, 60)).filter(lambda e: e[0] != e[1])


@settings(max_examples=60, deadline=None)
@given(st.lists(EDGE, min_size=40, max_size=120), st.integers(0, 9))
def test_no_seed_is_in_two_splits(edges, seed):
    labels = pairs(edges + [(1000 + 2 * i, 1001 + 2 * i) for i in range(20)])
    try:
        s = split_by_seed(labels, seed=seed)
    except ValueError as error:
        assert any(name in str(error) for name in ("train", "val", "test"))
        return
    parts = [seeds_of(p) for p in (s.train, s.val, s.test)]
    assert not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])
    assert len(s.train) + len(s.val) + len(s.test) + s.dropped == len(labels)


def test_disjoint_pairs_split_exactly_and_repeatably():
    labels = pairs((2 * i, 2 * i + 1) for i in range(2000))
    s = split_by_seed(labels, seed=4)
    assert s.counts() == {"train": 1400, "val": 300, "test": 300, "dropped": 0, "ties": 0}
    assert s == split_by_seed(labels, seed=4)
    assert s != split_by_seed(labels, seed=5)


def test_giant_component_is_cut_and_the_cost_reported():
    labels = pairs((i, (i + step) % 300) for i in range(300) for step in (1, 2))  # a ring: one component
    s = split_by_seed(labels)
    assert min(len(s.train), len(s.val), len(s.test)) > 30
    assert 0 < s.dropped < 40  # breadth-first runs cut few edges; a random deal would lose about 280


def test_ties_are_left_out_and_counted():
    labels = [*pairs((2 * i, 2 * i + 1) for i in range(20)), Preference(winner=100, loser=101, tie=True)]
    s = split_by_seed(labels)
    assert s.ties == 1 and 100 not in seeds_of(s.train + s.val + s.test)


def test_too_few_labels_and_bad_shares_are_explained():
    with raising("val", "test", "1"):
        split_by_seed(pairs([(1, 2)]))
    with raising("(0.5, 0.5, 0.5)"):
        split_by_seed(pairs([(1, 2)]), (0.5, 0.5, 0.5))


def test_reference_seeds_are_the_papers_and_avoid_labelled_seeds():
    seeds = reference_seeds()
    assert [len(seeds[k]) for k in ("train", "val", "test")] == [700, 150, 150]
    assert seeds["train"][0] == 100000 and seeds["test"][-1] == 100999
    assert (
        100005
        not in reference_seeds(10, unusable_seeds=[100005])["train"]
        + reference_seeds(10, unusable_seeds=[100005])["val"]
    )


def test_common_value_rejects_mixed_labels():
    labels = [
        Preference(winner=1, loser=2, psi=0.7),
        Preference(winner=3, loser=4),
        Preference(winner=5, loser=6, psi=1.0),
    ]
    assert common_value(labels[:2], "psi") == 0.7 and common_value(labels[1:2], "psi") is None
    with raising("psi", "0.7", "1.0"):
        common_value(labels, "psi")
