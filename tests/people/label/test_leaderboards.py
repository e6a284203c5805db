"""Leaderboards of a store's judgements: what counts as a game, generators' names, questions, and the commands."""

import csv
import dataclasses
import io
import json

import numpy as np
from click.testing import CliRunner

from eg3d_rlhf.people.label.commands import main
from eg3d_rlhf.people.label.entities import Answer, CampaignSettings, Choice, Mode, PlannedPair
from eg3d_rlhf.people.label.quality import as_text, generator_names, leaderboard_of, quality_report
from eg3d_rlhf.people.label.store import Store
from tests.people.label.test_quality import row, shape

NAN = float("nan")


def asset(generator: str, prompt: str, seed: int = 0):
    """One of a generator's, made for a prompt."""
    made = shape(seed, generator)
    return dataclasses.replace(
        made, source=f"/assets/{generator}/{prompt}.glb", psi=NAN, level=NAN, resolution=0, triangles=0, file="f" * 64, condition=prompt,
    )  # fmt: skip


def judged(count: int = 40, better: float = 0.75, **more) -> list:
    """Rows of two generators' assets over ten prompts and more."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(count):
        shapes = asset("trellis", f"prompt {i % 20}"), asset("hunyuan", f"prompt {i % 20}")
        choice = "left" if rng.random() < better else "right"
        rows.append(row(i, choice, shapes=shapes, annotator=f"n{i % 4}", **{"votes": {}, **more}))
    return rows


def test_games_are_first_answers_to_pairs_of_two_generators():
    rows = judged()
    others = [
        row(100, "skip", pair=100, shapes=(asset("trellis", "x"), asset("hunyuan", "x"))),
        row(101, "left", pair=101, shapes=(asset("trellis", "x", 1), asset("trellis", "x", 2))),
        row(102, "right", pair=0, annotator="n0", kind="repeat", shapes=(rows[0].left, rows[0].right)),
        row(103, "left", pair=103, kind="gold", expected="left", shapes=(asset("trellis", "x"), asset("hunyuan", "x"))),
        row(104, "left", pair=104, undone=True, shapes=(asset("trellis", "x"), asset("hunyuan", "x"))),
    ]  # fmt: skip
    board = leaderboard_of([*rows, *others])
    assert (board.games, board.annotators, board.prompts) == (40, 4, 20) and board == leaderboard_of(rows)
    assert [s.name for s in board.groups[0]] == ["trellis", "hunyuan"]


def test_both_bad_ties_and_votes_count_as_they_should():
    bad = [dataclasses.replace(r, choice=Choice.BAD, votes={"texture": "right"}) for r in judged()]
    board = leaderboard_of(bad)
    assert board.groups[0][0].points == board.groups[0][1].points and board.groups[0][0].both_bad == 40
    texture = leaderboard_of(bad, "texture").groups[0]
    assert [s.name for s in texture] == ["hunyuan", "trellis"] and texture[0].both_bad == 0 and texture[0].wins == 40
    assert [b["question"] for b in quality_report(bad)["leaderboards"]] == [None, "texture"]


def test_a_study_and_a_single_generator_have_none():
    assert leaderboard_of(judged(mode="study")).games == 0 and quality_report(judged(mode="study"))["leaderboards"] == []
    assert quality_report([row(i, "left") for i in range(30)])["leaderboards"] == []


def test_generators_have_names_that_people_know():
    def network(generator, source):
        return dataclasses.replace(shape(0, generator * 64), source=source)

    names = generator_names([network("a", ""), network("b", "/runs/1/net.safetensors"), asset("trellis", "x")])
    assert set(names.values()) == {"bundled generator", "net.safetensors", "trellis"}
    names = generator_names([network("a", "/runs/1/net.safetensors"), network("b", "/runs/2/net.safetensors")])
    assert set(names.values()) == {"1/net.safetensors", "2/net.safetensors"}
    names = generator_names([network("a", "/runs/1/net.safetensors"), network("b", "/runs/1/net.safetensors")])
    assert names["a" * 64] == "1/net.safetensors aaaaaaaa"


def test_assets_are_the_same_shape_in_every_row():
    rows = [row(i, "left", pair=0, annotator=f"n{i}", shapes=(asset("a", "x"), asset("b", "x"))) for i in range(3)]
    rows += [row(3, "left", pair=1, shapes=(asset("a", "x"), asset("c", "x")))]
    strengths = quality_report(rows)["bradley_terry"]
    assert {s["label"]: s["comparisons"] for s in strengths} == {"a: x.glb": 4, "b: x.glb": 3, "c: x.glb": 1}


def test_the_command_prints_text_json_and_csv(tmp_path):
    url = f"sqlite:///{tmp_path / 'labels.db'}"
    with Store.open(url) as store:
        pairs = [PlannedPair(first=asset("trellis", f"p{i}"), second=asset("hunyuan", f"p{i}")) for i in range(25)]
        campaign = store.create_campaign(CampaignSettings(name="c", gold_every=0, repeat_share=0, swap_share=0), pairs)
        ann = store.annotator_without_token("ann").id
        for i in range(25):
            (given,) = store.assignments(campaign, ann, 1)
            left = dict(store.shapes(campaign))[given.left].generator == "trellis"
            choice = Choice.TIE if i % 5 == 0 else Choice.LEFT if left == (i % 5 != 1) else Choice.RIGHT
            store.submit(campaign, ann, Answer(key=f"k{i}", assignment=given.token, choice=choice))
        alone = PlannedPair(first=shape(1), second=shape(1))
        store.create_campaign(CampaignSettings(name="one", mode=Mode.SINGLE, scale="thumbs", swap_share=0), [alone])

    def run(*args: str):
        return CliRunner().invoke(main, ["leaderboard", f"--db={url}", *args])

    text = run("--campaign=c").output
    assert " 1. trellis" in text and "at least" not in text and "this annotator alone" in text
    found = json.loads(run("--json").output)
    assert [(s["name"], s["n"], s["wins"], s["ties"]) for s in found["groups"][0]] == [("trellis", 25, 15, 5), ("hunyuan", 25, 5, 5)]
    table = list(csv.DictReader(io.StringIO(run("--csv").output)))
    assert [r["name"] for r in table] == ["trellis", "hunyuan"]
    assert float(table[0]["lo"]) < float(table[0]["points"]) < float(table[0]["hi"])
    assert "Name another" in run("--question=texture").output and "`status` lists them" in run("--campaign=x").output
    assert "compares nothing" in run("--campaign=one").output


def test_nothing_to_compare_is_said():
    assert as_text(leaderboard_of([])) == "No comparisons of two generators yet."


def test_the_simulations_are_printed():
    result = CliRunner().invoke(main, ["simulate", "shares", "--n=10"])
    assert result.exit_code == 0 and "within 93-97 %" in result.output
    shares = json.loads(CliRunner().invoke(main, ["simulate", "shares", "--n=10", "--json"]).output)["10"]
    assert 0.93 < np.mean([case["coverage"] for case in shares]) < 0.97
