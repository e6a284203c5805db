"""Bradley-Terry strengths against closed forms and a published table, Elo ratings, and cycles."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from eg3d_rlhf.modes import label_files
from eg3d_rlhf.preferences.bradley_terry import Comparison, Judgement, bradley_terry, cycles, elo
from tests.rejections import raising, rejected

# Ratings from closed forms; intervals by simulation; the tool from the outside.


def of(wins: int, losses: int, ties: int = 0) -> list[Judgement]:
    return [Judgement("x", "y", w) for w, n in (("a", wins), ("b", losses), ("tie", ties)) for _ in range(n)]


def gap(tournament) -> float:
    return tournament.ratings["x"].elo - tournament.ratings["y"].elo


def test_two_methods_have_the_log_odds_in_elo():
    assert gap(elo(of(30, 10), resample_count=0)) == pytest.approx(400 * math.log10(3))
    # draws win for both
    assert gap(elo(of(30, 10, 20), resample_count=0)) == pytest.approx(400 * math.log10(50 / 30))
    assert gap(elo(of(30, 10, 20), tie_rule="davidson", resample_count=0)) == pytest.approx(
        400 * math.log10(3)
    )
    assert sum(r.elo for r in elo(of(30, 10), resample_count=0).ratings.values()) == pytest.approx(2000)


def test_held_ratings_stay_and_new_ones_are_relative_to_them():
    tournament = elo(of(30, 10), given_ratings={"y": 1270.0}, resample_count=50)
    assert (
        tournament.ratings["y"].elo == 1270.0
        and tournament.ratings["y"].lo == tournament.ratings["y"].hi == 1270.0
    )
    assert tournament.ratings["x"].elo == pytest.approx(1270 + 400 * math.log10(3))
    assert tournament.ratings["x"].lo < tournament.ratings["x"].elo < tournament.ratings["x"].hi
    with raising("given_strengths"):
        elo(of(3, 1), given_ratings={"x": 1.0, "y": 2.0})


def write(path: Path, records) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def records(wins: int, losses: int, criterion: str = "overall"):
    return [
        {**j._asdict(), "prompt": str(k), "criterion": criterion, "more": 1}
        for k, j in enumerate(of(wins, losses))
    ]


def call(*arguments):
    return CliRunner().invoke(label_files.elo, [str(a) for a in arguments])


def test_the_tool_rates_each_criterion_and_continues_from_its_file(tmp_path):
    judgement_file = write(tmp_path / "j.jsonl", records(30, 10) + records(10, 30, "texture"))
    out = tmp_path / "elo.json"
    done = call(judgement_file, f"--out={out}")
    assert done.exit_code == 0, done.output
    tables = json.loads(out.read_text())
    assert list(tables) == ["overall", "texture"] and list(tables["overall"]["ratings"]) == ["x", "y"]
    assert list(tables["texture"]["ratings"]) == ["y", "x"] and tables["overall"]["prompts"] == 40
    assert f"| x | {tables['overall']['ratings']['x']['elo']:.1f} |" in done.output
    new = write(tmp_path / "new.jsonl", [{"a": "new", "b": "x", "winner": w} for w in "ab"])
    again = call(judgement_file, new, f"--held={out}")
    assert "texture" in again.stderr and "overall" not in again.stderr
    assert (
        again.exit_code == 0 and f"| new | {tables['overall']['ratings']['x']['elo']:.1f} |" in again.output
    )


@pytest.mark.parametrize(
    "text", ['{"a": "x"', '{"a": "x", "b": "y"}', '{"a": "x", "b": "x", "winner": "a"}', ""]
)
def test_damaged_files_are_rejected_in_one_line(tmp_path, text):
    path = tmp_path / "j.jsonl"
    path.write_text(text + "\n")
    done = call(path, f"--out={tmp_path / 'o.json'}")
    rejected(done, "j.jsonl")
    assert not (tmp_path / "o.json").exists()


def test_held_needs_a_file_of_the_tool(tmp_path):
    judgement_file = write(tmp_path / "j.jsonl", records(3, 1))
    done = call(judgement_file, f"--held={judgement_file}")
    rejected(done, "--held", str(judgement_file), "--out")


# Strengths against closed forms and a published table; cycles against counting by hand.


def drawn_games(wins: dict) -> list[Comparison]:
    """{(winner, loser): times}."""
    return [Comparison(a, b) for (a, b), n in wins.items() for _ in range(n)]


def strength(result, item) -> float:
    return float(result.strength[result.items.index(item)])


def test_two_items_have_the_log_odds_and_its_variance():
    strengths = bradley_terry(drawn_games({("a", "b"): 30, ("b", "a"): 10}))
    assert strength(strengths, "a") - strength(strengths, "b") == pytest.approx(math.log(3))
    contrast = np.array([1.0, -1.0])
    assert contrast @ strengths.covariance @ contrast == pytest.approx(1 / 30 + 1 / 10)
    assert (
        strengths.strength.sum() == pytest.approx(0)
        and not strengths.regularised
        and strengths.tie_weight == 0
    )


def test_two_items_with_ties_have_davidsons_closed_form():
    ties = [Comparison("a", "b", True)] * 5 + [Comparison("b", "a", True)] * 7
    strengths = bradley_terry(drawn_games({("a", "b"): 18, ("b", "a"): 8}) + ties)
    assert strength(strengths, "a") - strength(strengths, "b") == pytest.approx(math.log(18 / 8))
    assert strengths.tie_weight == pytest.approx(12 / math.sqrt(18 * 8))


def test_the_american_league_of_1987():
    # Agresti, Categorical Data Analysis
    teams = ("Milwaukee", "Detroit", "Toronto", "New York", "Boston", "Cleveland", "Baltimore")
    rows = (
        [0, 7, 9, 7, 7, 9, 11],
        [6, 0, 7, 5, 11, 9, 9],
        [4, 6, 0, 7, 7, 8, 12],
        [6, 8, 6, 0, 6, 7, 10],
        [6, 2, 6, 7, 0, 7, 12],
        [4, 4, 5, 6, 6, 0, 6],
        [2, 4, 1, 3, 1, 7, 0],
    )
    strengths = bradley_terry(
        drawn_games({(teams[i], teams[j]): n for i, row in enumerate(rows) for j, n in enumerate(row)})
    )
    over_baltimore = [strength(strengths, team) - strength(strengths, "Baltimore") for team in teams]
    assert over_baltimore == pytest.approx([1.58, 1.44, 1.29, 1.25, 1.11, 0.68, 0.0], abs=6e-3)
    i = strengths.items.index("Milwaukee")
    j = strengths.items.index("Baltimore")
    error = math.sqrt(
        strengths.covariance[i, i] + strengths.covariance[j, j] - 2 * strengths.covariance[i, j]
    )
    assert error == pytest.approx(0.343, abs=2e-3)


def test_the_score_equations_hold_at_the_maximum():
    rng = np.random.default_rng(0)
    pairs = [
        Comparison(*rng.choice(8, 2, replace=False).tolist(), tie=bool(rng.random() < 0.2))
        for _ in range(300)
    ]
    strengths = bradley_terry(pairs)
    points = np.zeros(8)
    expected = np.zeros(8)
    draws = 0.0
    s = {item: math.exp(strength(strengths, item)) for item in range(8)}
    for a, b, tie in pairs:
        points[a] += 0.5 if tie else 1
        points[b] += 0.5 if tie else 0
        root = strengths.tie_weight * math.sqrt(s[a] * s[b])
        total = s[a] + s[b] + root
        expected[a] += (s[a] + root / 2) / total
        expected[b] += (s[b] + root / 2) / total
        draws += root / total
    assert expected == pytest.approx(points, abs=1e-6) and draws == pytest.approx(
        sum(p.tie for p in pairs), abs=1e-6
    )


def test_an_unbeaten_item_is_held_by_the_prior_and_reported():
    strengths = bradley_terry(drawn_games({("a", "b"): 5, ("b", "c"): 3, ("c", "b"): 2}))
    assert (
        strengths.regularised
        and np.isfinite(strengths.strength).all()
        and strengths.strength.argmax() == strengths.items.index("a")
    )
    separate = bradley_terry(drawn_games({("a", "b"): 5, ("b", "a"): 2, ("c", "d"): 4, ("d", "c"): 4}))
    assert separate.regularised and strength(separate, "c") == pytest.approx(
        strength(separate, "d"), abs=1e-9
    )


def test_pairs_without_a_majority_make_no_cycle():
    circle = drawn_games({("a", "b"): 1, ("b", "c"): 1, ("c", "a"): 1})
    assert cycles(circle) == {
        "triples": 1,
        "cyclic": 1,
        "share": 1.0,
        "share_by_chance": 0.25,
        "largest_knot": 3,
    }
    assert (
        cycles(circle + drawn_games({("a", "c"): 1}))["share"] is None
        and cycles([Comparison("a", "b", True)])["largest_knot"] == 0
    )


def test_cycles_agree_with_a_loop():
    rng = np.random.default_rng(2)
    beats = {
        (a, b) if rng.random() < 0.5 else (b, a)
        for a, b in itertools.combinations(range(12), 2)
        if rng.random() < 0.8
    }
    triples = cyclic = 0
    for trio in itertools.combinations(range(12), 3):
        edges = [e for e in itertools.permutations(trio, 2) if e in beats]
        triples += len(edges) == 3
        cyclic += len(edges) == 3 and len({winner for winner, _ in edges}) == 3
    counted = cycles([Comparison(*e) for e in beats])
    assert (counted["triples"], counted["cyclic"]) == (triples, cyclic) and cyclic > 0
