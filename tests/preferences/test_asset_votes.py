"""The open files of votes on assets: reading, writing, grouping by pair, and pairs from scores."""

import json

import pytest

from eg3d_rlhf.preferences.asset_votes import (
    AssetPair,
    AssetScore,
    has_scores,
    pairs_from_scores,
    plurality,
    read_asset_pairs,
    read_asset_scores,
    votes_by_pair,
    write_asset_votes,
)
from tests.rejections import raising


def lines(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_pairs_are_read_and_written_with_all_keys(tmp_path):
    record = {
        "winner": "a/x.glb",
        "loser": {"model": "b", "prompt": "x"},
        "prompt": "x",
        "criterion": "geometry",
        "weight": 0.75,
        "tie": False,
        "annotator": "ann",
        "provenance": "model: gpt",
        "source_row": 7,
        "licence": "MIT",
    }
    path = lines(tmp_path / "pairs.jsonl", record, {"winner": "a", "loser": "b", "tie": True})
    pairs = read_asset_pairs(path)
    assert pairs[0].loser == ("b", "x") and pairs[0].extra == {"licence": "MIT"}
    assert (pairs[1].weight, pairs[1].criterion, pairs[1].provenance) == (0.5, "overall", "people")
    assert pairs[0].to_dict() == record
    again = read_asset_pairs(write_asset_votes(tmp_path / "again.jsonl", pairs))
    assert again == pairs
    assert not has_scores(path)


def test_scores_are_read_and_written(tmp_path):
    record = {
        "asset": "a.glb",
        "score": 3,
        "low": 1,
        "high": 5,
        "criterion": "texture",
        "higher_is_better": False,
    }
    path = lines(tmp_path / "scores.jsonl", record)
    (score,) = read_asset_scores(path)
    assert (score.score, score.low, score.high, score.higher_is_better) == (3.0, 1.0, 5.0, False)
    assert read_asset_scores(write_asset_votes(tmp_path / "again.jsonl", [score])) == [score]
    assert has_scores(path)


@pytest.mark.parametrize(
    ("record", "names"),
    [
        ({"winner": "a"}, ("loser",)),
        ({"winner": "a", "loser": "a"}, ("a",)),
        ({"winner": "a", "loser": 3}, ("loser", "3")),
        ({"winner": "a", "loser": "b", "weight": 1.5}, ("weight", "1.5")),
        ({"winner": "a", "loser": "b", "weight": "1"}, ("weight",)),
        ({"winner": "a", "loser": "b", "weight": True}, ("weight",)),
        ({"winner": "a", "loser": "b", "tie": "no"}, ("tie", "no")),
        ({"winner": "a", "loser": "b", "provenance": "a model"}, ("provenance", "a model")),
        ({"winner": "a", "loser": "b", "source_row": 0}, ("source_row", "0")),
        ({"winner": {"model": "a"}, "loser": "b"}, ("winner",)),
    ],
)
def test_wrong_pairs_are_rejected_with_their_line(record, names, tmp_path):
    path = lines(tmp_path / "pairs.jsonl", {"winner": "a", "loser": "b"}, record)
    with raising("pairs.jsonl", "line 2", *names):
        read_asset_pairs(path)


@pytest.mark.parametrize(
    "record",
    [{"asset": "a"}, {"asset": "a", "score": "3"}, {"asset": "a", "score": 9, "high": 5}, {"score": 1}],
)
def test_wrong_scores_are_rejected(record, tmp_path):
    with raising("scores.jsonl", "line 1"):
        read_asset_scores(lines(tmp_path / "scores.jsonl", record))


def test_votes_count_by_pair_and_annotator():
    votes = [
        AssetPair(winner="a", loser="b", annotator="x"),
        AssetPair(winner="b", loser="a", annotator="y"),
        AssetPair(winner="b", loser="a", annotator="z", criterion="geometry"),
        AssetPair(winner="a", loser="b", annotator="w", tie=True),
        AssetPair(winner="a", loser="b", weight=0.2),
    ]
    overall, geometry = votes_by_pair(votes)
    sides = {overall.first: "first", overall.second: "second"}
    assert overall.votes == {"x": sides["a"], "y": sides["b"], "w": "tie", "row 5": sides["b"]}
    assert geometry.criterion == "geometry" and (geometry.first, geometry.second) == (
        overall.first,
        overall.second,
    )
    # repeated lines change nothing, and neither does the order of the two assets
    assert votes_by_pair(votes[:4] * 5) == votes_by_pair(votes[:4])
    assert plurality(["first", "second"]) == "tie" and plurality([]) is None
    assert plurality(["first", "tie", "first"]) == "first"


def test_the_winner_is_not_always_the_first():
    pairs = [AssetPair(winner=f"good/{i}", loser=f"bad/{i}") for i in range(200)]
    firsts = [vote.votes.popitem()[1] for vote in votes_by_pair(pairs)]
    assert 70 < firsts.count("first") < 130


def test_scores_become_pairs_with_a_margin():
    scores = [
        AssetScore(asset="a", score=1, prompt="p", annotator="x"),
        AssetScore(asset="b", score=3, prompt="p", annotator="x"),
        AssetScore(asset="b", score=4, prompt="p", annotator="x"),
        AssetScore(asset="c", score=3, prompt="p", annotator="x"),
        AssetScore(asset="d", score=9, prompt="q", annotator="x"),
        AssetScore(asset="a", score=2, prompt="p", annotator="y"),
    ]
    found = {frozenset((p.winner, p.loser)): p for p in pairs_from_scores(scores, margin=1)}
    assert set(found) == {frozenset("ab"), frozenset("ac"), frozenset("bc")}
    assert found[frozenset("ab")].winner == "b" and not found[frozenset("ab")].tie
    # the means 3.5 and 3 differ by less than the margin
    assert found[frozenset("bc")].tie and not found[frozenset("ac")].tie
    worse = [AssetScore(asset=a, score=s, higher_is_better=False) for a, s in (("a", 1), ("b", 2))]
    assert pairs_from_scores(worse, 0)[0].winner == "a"
    with raising("--margin"):
        pairs_from_scores(scores, -1)


def test_many_scores_give_a_bounded_choice_that_ignores_their_order():
    scores = [AssetScore(asset=f"{i}", score=i % 7) for i in range(900)]
    pairs = pairs_from_scores(scores, 1, max_pairs=50)
    assert len(pairs) == 50
    reversed_pairs = pairs_from_scores(scores[::-1], 1, max_pairs=50)
    assert {frozenset((p.winner, p.loser)) for p in pairs} == {
        frozenset((p.winner, p.loser)) for p in reversed_pairs
    }
