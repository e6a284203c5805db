"""Labels of any kind -> r: sums, closed forms, what shuffling keeps, and rejected lines."""

import json
import math

import numpy as np
import pytest

from eg3d_rlhf.preferences.bradley_terry import Comparison, bradley_terry
from eg3d_rlhf.preferences.label_scores import (
    KnownAssets,
    contrast,
    goodness_for_use,
    goodness_from_pairs,
    goodness_from_probabilities,
    goodness_from_ranks,
    goodness_from_scores,
    goodness_from_votes,
    normal_scores,
    read_goodness,
    standardised_by_rater,
)
from tests.rejections import raising

RNG = np.random.default_rng(0)
NAMES = [f"a{i}" for i in range(7)]
ANY = {
    "ranks": lambda: goodness_from_ranks(dict(zip(NAMES, RNG.integers(1, 5, 7).tolist(), strict=True))),
    "votes": lambda: goodness_from_votes(
        [(NAMES[i], bool(good)) for i, good in zip(RNG.integers(0, 7, 30), RNG.random(30) < 0.8, strict=True)]
    ),
    "a thumb each": lambda: goodness_from_votes(zip(NAMES, [True] * 6 + [False], strict=True)),
    "scores": lambda: goodness_from_scores(zip(NAMES, 3 * RNG.standard_normal(7), strict=True)),
    "probabilities": lambda: goodness_from_probabilities(
        [(name, p) for name in NAMES for p in RNG.random(3)]
    ),
    "pairs": lambda: goodness_from_pairs(
        [Comparison(*RNG.choice(NAMES, 2, replace=False).tolist(), tie=bool(i % 5 == 0)) for i in range(25)]
    ),
}


@pytest.mark.parametrize("kind", ANY)
def test_r_lies_in_0_to_1_and_has_the_mean_of_one_half(kind):
    for _ in range(20):
        goodness_values = list(ANY[kind]().values())
        assert (
            min(goodness_values) >= 0
            and max(goodness_values) <= 1
            and math.isclose(np.mean(goodness_values), 0.5, abs_tol=1e-12)
        )


def test_ranks():
    assert goodness_from_ranks({"a": 1, "b": 2}) == {"a": 1, "b": 0}
    assert goodness_from_ranks({"a": 7, "b": 7}) == {"a": 0.5, "b": 0.5} and goodness_from_ranks(
        {"a": 3}
    ) == {"a": 0.5}
    ranks = dict(zip(NAMES, [2, 9, 2, 4, 1, 4, 4], strict=True))
    expected = {
        a: (
            (sum(ranks[b] > ranks[a] for b in NAMES) + sum(ranks[b] == ranks[a] for b in NAMES if b != a) / 2)
            / 6
        )
        for a in NAMES
    }
    assert goodness_from_ranks(ranks) == pytest.approx(expected)
    assert goodness_from_ranks(dict(reversed(ranks.items()))) == pytest.approx(expected)


def test_votes_are_shares_with_a_prior_of_the_condition():
    good = np.array([3, 0, 1])
    n = np.array([4, 1, 2])
    share = 4 / 7
    votes = [(name, i < g) for name, g, k in zip("abc", good, n, strict=True) for i in range(k)]
    advantage = 2 * (good + 2 * share) / (n + 2) - 1
    expected = 0.5 + (advantage - advantage.mean()) / 2
    assert list(goodness_from_votes(votes).values()) == pytest.approx(expected)


def test_one_pair_is_laplace_and_several_are_bradley_terry():
    assert goodness_from_pairs([Comparison("a", "b")]) == pytest.approx({"a": 2 / 3, "b": 1 / 3})
    assert goodness_from_pairs(
        [Comparison("a", "b")] * 3 + [Comparison("b", "a"), Comparison("a", "b", True)]
    )["a"] == pytest.approx(4.5 / 7)
    chain = [
        Comparison("a", "b"),
        Comparison("b", "c"),
        Comparison("c", "a"),
        Comparison("a", "c"),
        Comparison("a", "b"),
    ]
    fit = bradley_terry(chain)
    theta = dict(zip(fit.items, fit.strength, strict=True))

    def beats(i, j):
        return 1 / (1 + math.exp(theta[j] - theta[i]))

    expected = np.array([(beats(i, j) + beats(i, k)) / 2 for i, j, k in ("abc", "bac", "cab")])
    goodness = goodness_from_pairs(chain)
    assert [goodness[name] for name in "abc"] == pytest.approx(expected - expected.mean() + 0.5)
    beside = goodness_from_pairs([*chain, Comparison("x", "y")])  # that nothing links to them
    assert beside["x"] == pytest.approx(2 / 3) and beside["a"] == pytest.approx(goodness["a"])


def test_scores_do_not_depend_on_a_raters_scale_and_level():
    scores = RNG.integers(1, 6, 12).astype(float)
    strict = standardised_by_rater([("strict", s) for s in scores])
    assert standardised_by_rater([("kind", 3 * s + 20) for s in scores]) == pytest.approx(strict)
    assert np.mean(strict) == pytest.approx(0) and np.std(strict) == pytest.approx(1)
    assert standardised_by_rater([("always", 5.0)] * 3) == [0, 0, 0]


def test_members_that_differ_are_near_one_half():
    sure = goodness_from_probabilities([("a", 0.9), ("b", 0.1)])
    torn = goodness_from_probabilities([("a", 1.0), ("a", 0.2), ("b", 0.4), ("b", 0.6)])
    assert sure["a"] == pytest.approx(0.9) and torn["a"] == pytest.approx(0.55)


def test_normal_scores_have_mean_0_deviation_1_and_the_order_of_r():
    r = RNG.random(9)
    scores = normal_scores(r)
    assert (
        scores.mean() == pytest.approx(0)
        and scores.std() == pytest.approx(1)
        and (scores.argsort() == r.argsort()).all()
    )
    assert normal_scores([1, 0]).tolist() == [1, -1] and normal_scores([0.3] * 4).tolist() == [0] * 4
    assert normal_scores(-r) == pytest.approx(-scores)
    order = RNG.permutation(9)
    assert normal_scores(r[order]) == pytest.approx(scores[order])


def test_controls_keep_what_they_should():
    of = {name: "xyz"[i % 3] for i, name in enumerate(f"a{i}" for i in range(30))}
    r = dict(zip(of, RNG.random(30).tolist(), strict=True))
    shuffled = goodness_for_use(r, of, "randomised", 5)
    again = goodness_for_use(r, of, "randomised", 5)
    assert shuffled == again != r and goodness_for_use(r, of, "labels", 5) == r and list(shuffled) == list(r)
    for condition in "xyz":
        assert sorted(shuffled[a] for a in r if of[a] == condition) == sorted(
            r[a] for a in r if of[a] == condition
        )
    inverted_r = goodness_for_use(r, of, "inverted", 5)
    assert all(inverted_r[name] == 1 - r[name] for name in r)


def test_assets_alone_in_their_prompt_have_no_training_signal():
    of = {"a": "x", "b": "x", "c": "y", "d": "z", "e": "z"}
    assert contrast({"a": 1.0, "b": 0.0, "c": 0.5, "d": 0.7, "e": 0.3}, {"x", "y"}, of) == {
        "a": 1.0,
        "b": 0.0,
    }


# Files.

KNOWN = KnownAssets(prompt_of={"a": "x", "b": "x", "c": "x", "d": "y"})


def written(tmp_path, *records):
    path = tmp_path / "labels.jsonl"
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return path


def thumb(asset, value, **more):
    return {"asset": asset, "condition": "x", "thumb": value, **more}


def test_every_kind_is_read(tmp_path):
    thumbs = read_goodness(
        written(tmp_path, thumb("a", True), "", thumb("b", False), thumb("c", True)), KNOWN
    )
    assert thumbs == goodness_from_votes([("a", True), ("b", False), ("c", True)])
    scores = written(
        tmp_path,
        *({"asset": a, "score": s, "rater": r} for a, s, r in (("a", 5, "p"), ("b", 1, "p"), ("c", 3, "q"))),
    )
    # a standard deviation is A = 1/2
    assert read_goodness(scores, KNOWN) == pytest.approx({"a": 0.75, "b": 0.25, "c": 0.5})
    ranks = written(
        tmp_path,
        {"asset": "a", "rank": 2},
        {"asset": "b", "rank": 1},
        {"asset": "c", "rank": 3},
        {"asset": "d", "rank": 1},
    )
    assert read_goodness(ranks, KNOWN) == {"a": 0.5, "b": 1.0, "c": 0.0, "d": 0.5}
    pairs = written(
        tmp_path, {"preferred": "a", "rejected": "b"}, {"preferred": "b", "rejected": "c", "tie": True}
    )
    assert read_goodness(pairs, KNOWN) == goodness_from_pairs(
        [Comparison("a", "b"), Comparison("b", "c", True)]
    )
    members = written(
        tmp_path,
        *(
            {"asset": a, "p": p, "rater": m}
            for a, p, m in (("a", 0.9, "1"), ("a", 0.7, "2"), ("b", 0.4, "1"))
        ),
    )
    assert read_goodness(members, KNOWN) == pytest.approx({"a": 0.7, "b": 0.3})


def test_a_rater_whose_name_is_the_number_0_is_a_rater(tmp_path):
    """Scores are standardised by rater, so lines of rater 0 must not join those without a rater."""
    named = [("a", 0.0), ("b", 1.0)]
    unnamed = [("a", 10.0), ("b", 40.0), ("c", 11.0)]
    other_lines = [{"asset": asset, "score": score} for asset, score in unnamed]
    goodness = [
        read_goodness(
            written(tmp_path, *other_lines, *({"asset": a, "score": s, key: rater} for a, s in named)), KNOWN
        )
        for key in ("rater", "annotator")
        for rater in (0, "0", "ann")
    ]
    assert goodness == [goodness[0]] * 6
    pooled = written(tmp_path, *other_lines, *({"asset": a, "score": s} for a, s in named))
    assert read_goodness(pooled, KNOWN) != goodness[0]


def test_the_labelling_tools_fields_are_read_and_files_stand_for_assets(tmp_path):
    known = KnownAssets(
        prompt_of={"000001": "chair", "000002": "chair"},
        files={(tmp_path / "shapes" / f"{i}.glb").resolve(): f"00000{i}" for i in (1, 2)},
    )
    rows = [
        {
            "mesh": "shapes/1.glb",
            "prompt": "a chair",
            "label": 1,
            "generator": "g",
            "condition": "chair",
            "annotator": "ann",
        },
        {
            "mesh": str(tmp_path / "shapes/2.glb"),
            "prompt": "a chair",
            "label": 0,
            "condition": "chair",
            "rater": "ann",
        },
    ]
    assert read_goodness(written(tmp_path, *rows), known) == goodness_from_votes(
        [("000001", True), ("000002", False)]
    )


MISTAKES = {
    "all good": (
        [thumb("a", True), thumb("b", True)],
        ("lines 1 to 2", "good"),
    ),
    "ties": (
        [{"asset": n, "rank": 3} for n in "abc"],
        ("lines 1 to 3", "ties"),
    ),
    "scores alike": ([{"asset": n, "score": 3} for n in "abc"], ("scores", "lines 1 to 3")),
    "alone": (
        [thumb("a", True), {"asset": "d", "thumb": False}],
        ("lines 1 to 2", "condition"),
    ),
    "unknown": (
        [thumb("a", True), thumb("nose", True)],
        ("line 2", "4 ", "(a, b, c, ...)", "'nose'"),
    ),
    "condition": (
        [thumb("d", True)],
        ("line 1", "'y'", "'d'", "'x'"),
    ),
    "two kinds": (
        [thumb("a", True), {"asset": "b", "rank": 1}],
        ("line 2", "line 1", "thumb", "rank"),
    ),
    "no label": ([{"asset": "a"}], ("line 1", "thumb", "label", "score", "rank")),
    "thumb": ([thumb("a", 3)], ("line 1", "thumb", "3")),
    "score": ([{"asset": "a", "score": "good"}], ("line 1", "score", "'good'")),
    "nan": (['{"asset": "a", "score": NaN}'], ("line 1", "score", "nan")),
    "p": ([{"asset": "a", "p": 3}], ("line 1", " p ", "0 to 1", "3")),
    "two ranks": (
        [{"asset": "a", "rank": 1}, {"asset": "a", "rank": 2}],
        ("line 2", "'a'", "rank"),
    ),
    "itself": ([{"preferred": "a", "rejected": "a"}], ("line 1", "rejected")),
    "apart": ([{"preferred": "a", "rejected": "d"}], ("line 1", "'d'")),
    "no asset": ([{"thumb": True}], ("line 1", "asset", "thumb")),
    "no JSON": (["{"], ("line 1", "JSON")),
    "empty": ([], ("line 1", "empty")),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_name_file_line_and_remedy(case, tmp_path):
    records, names = MISTAKES[case]
    with raising("labels.jsonl", "line", *names):
        read_goodness(written(tmp_path, *records), KNOWN)


def test_no_file(tmp_path):
    with raising("--labels", "none.jsonl", kind=FileNotFoundError):
        read_goodness(tmp_path / "none.jsonl", KNOWN)
