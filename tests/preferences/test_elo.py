"""Ratings from closed forms; intervals by simulation; the tool from the outside."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from eg3d_rlhf.modes import labels
from eg3d_rlhf.preferences.elo import Judgement, elo, read_judgements


def of(wins: int, losses: int, ties: int = 0) -> list[Judgement]:
    return [Judgement("x", "y", w) for w, n in (("a", wins), ("b", losses), ("tie", ties)) for _ in range(n)]


def gap(found) -> float:
    return found.ratings["x"].elo - found.ratings["y"].elo


def test_two_methods_have_the_log_odds_in_elo():
    assert gap(elo(of(30, 10), resamples=0)) == pytest.approx(400 * math.log10(3))
    assert gap(elo(of(30, 10, 20), resamples=0)) == pytest.approx(400 * math.log10(50 / 30))  # draws win for both
    assert gap(elo(of(30, 10, 20), draws="davidson", resamples=0)) == pytest.approx(400 * math.log10(3))
    assert sum(r.elo for r in elo(of(30, 10), resamples=0, mean=1200).ratings.values()) == pytest.approx(2400)


def test_swapping_the_sides_changes_nothing():
    swapped = [Judgement(j.b, j.a, {"a": "b", "b": "a"}.get(j.winner, j.winner)) for j in of(9, 4, 3)]
    assert gap(elo(swapped, resamples=0)) == pytest.approx(gap(elo(of(9, 4, 3), resamples=0)))


def test_held_ratings_stay_and_the_new_one_is_measured_against_them():
    found = elo(of(30, 10), held={"y": 1270.0}, resamples=50)
    assert found.ratings["y"].elo == 1270.0 and found.ratings["y"].lo == found.ratings["y"].hi == 1270.0
    assert found.ratings["x"].elo == pytest.approx(1270 + 400 * math.log10(3))
    assert found.ratings["x"].lo < found.ratings["x"].elo < found.ratings["x"].hi
    with pytest.raises(ValueError, match="Hold fewer"):
        elo(of(3, 1), held={"x": 1.0, "y": 2.0})


def test_a_method_that_never_lost_is_held_by_a_prior_that_says_so():
    found = elo(of(20, 0), resamples=20)
    assert found.regularised and 0 < gap(found) < 2000
    against = elo(of(20, 0), held={"y": 1000.0}, resamples=0)
    assert against.regularised and 0 < gap(against) < 2000


def test_intervals_cover_the_truth():
    rng, inside, truth = np.random.default_rng(0), 0, 400 * math.log10(0.65 / 0.35)
    for _ in range(16):
        prompts = [str(k) for k in range(40) for _ in range(3)]
        won = rng.random(120) < 0.65
        judgements = [Judgement("x", "y", "a" if w else "b", prompt) for w, prompt in zip(won, prompts, strict=True)]
        found = elo(judgements, resamples=40)
        half = truth / 2
        inside += found.ratings["x"].lo <= 1000 + half <= found.ratings["x"].hi
    assert 13 <= inside <= 16


@pytest.mark.parametrize(("judgements", "text"), [([], "Judge some pairs"), ([Judgement("x", "y", "c")], "a, b or tie")])
def test_refusals(judgements, text):
    with pytest.raises(ValueError, match=text):
        elo(judgements)
    with pytest.raises(ValueError, match="Choose one"):
        elo(of(1, 1), draws="half")


def write(path: Path, records) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def records(wins: int, losses: int, criterion: str = "overall"):
    return [{**j._asdict(), "prompt": str(k), "criterion": criterion, "more": 1} for k, j in enumerate(of(wins, losses))]


def call(*arguments):
    return CliRunner().invoke(labels.elo, [str(a) for a in arguments])


def test_the_tool_rates_each_criterion_and_goes_on_from_its_own_file(tmp_path):
    source, out = write(tmp_path / "j.jsonl", records(30, 10) + records(10, 30, "texture")), tmp_path / "elo.json"
    done = call(source, f"--out={out}", "--resamples=40")
    assert done.exit_code == 0, done.output
    tables = json.loads(out.read_text())
    assert list(tables) == ["overall", "texture"] and list(tables["overall"]["ratings"]) == ["x", "y"]
    assert list(tables["texture"]["ratings"]) == ["y", "x"] and tables["overall"]["prompts"] == 40
    assert f"| x | {tables['overall']['ratings']['x']['elo']:.1f} |" in done.output
    new = write(tmp_path / "new.jsonl", [{"a": "new", "b": "x", "winner": w} for w in "ab"])
    again = call(source, new, f"--held={out}", "--resamples=40")
    assert "texture: left out" in again.stderr
    assert again.exit_code == 0 and f"| new | {tables['overall']['ratings']['x']['elo']:.1f} |" in again.output


@pytest.mark.parametrize(("text", "says"), [
    ('{"a": "x"', "line 1: expected JSON"), ('{"a": "x", "b": "y"}', "texts a, b and winner"),
    ('{"a": "x", "b": "x", "winner": "a"}', "two methods"), ('{"a": "x", "b": "y", "winner": "z"}', "two methods"), ("", "got none"),
])  # fmt: skip
def test_damaged_files_are_refused_in_one_line(tmp_path, text, says):
    path = tmp_path / "j.jsonl"
    path.write_text(text + "\n")
    with pytest.raises(ValueError, match=says):
        read_judgements(path)
    done = call(path, f"--out={tmp_path / 'o.json'}")
    assert done.exit_code == 2 and done.stderr.startswith("Error: ") and done.stderr.count("\n") == 1
    assert not (tmp_path / "o.json").exists()


def test_held_needs_a_file_of_the_tool(tmp_path):
    source = write(tmp_path / "j.jsonl", records(3, 1))
    done = call(source, f"--held={source}")
    assert done.exit_code == 2 and "--held" in done.stderr and done.stderr.count("\n") == 1
