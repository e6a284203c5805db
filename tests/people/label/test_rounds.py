"""Rounds whose labels come from people: the run makes a campaign and ends, stops again without answers, and
tunes with them.
"""

import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from eg3d_rlhf.generators import load_generator
from eg3d_rlhf.modes.label import main as label_main
from eg3d_rlhf.people.label.entities import Answer, Choice
from eg3d_rlhf.people.label.launch import label_command, round_labels
from eg3d_rlhf.people.label.store import Store
from eg3d_rlhf.preferences.labels import load_labels
from tests import tiny_rounds, tiny_runs
from tests.rejections import raising, rejected

CAMPAIGN = "round-1"


@pytest.fixture(scope="module")
def shaped(tmp_path_factory):
    return tiny_rounds.write_networks(tmp_path_factory.mktemp("shaped") / "shaped.safetensors")


@pytest.fixture
def begun(shaped, tiny_data, tiny_reward, tmp_path, monkeypatch) -> Callable[[int], tuple[Path, str]]:
    """Starts a run of one round with so many pairs; returns its folder and the database's URL."""
    tiny_rounds.coarse(monkeypatch.setattr)

    def start(pairs: int) -> tuple[Path, str]:
        flags = tiny_rounds.flags(
            shaped,
            tiny_reward,
            tmp_path / "runs",
            f"--data={tiny_data}",
            "--round-labels=people",
            "--rounds=1",
        )
        result = tiny_runs.run(*flags, f"--round-pairs={pairs}")
        assert result.exit_code == 0, result.output
        folder = tiny_runs.only_run(tmp_path / "runs")
        url = f"sqlite:///{folder / 'labels.db'}"
        assert (
            f"Label with: {label_command(url, CAMPAIGN)}\n" in result.output
            and f"--resume={folder}" in result.output
        )
        assert not (folder / "round-1").exists()
        return folder, url

    return start


def answer(url: str, count: int, choice: Choice = Choice.LEFT) -> None:
    """Answer so many trials, or all there are, as one annotator."""
    with Store.open(url, create=False) as store:
        me = store.annotator_without_token("local", "admin").id
        campaign = store.campaign(CAMPAIGN).id
        for _ in range(count):
            pair, *_ = store.assignments(campaign, me) or (None,)
            if pair is None:
                return
            store.submit(
                campaign, me, Answer(key=pair.token, assignment=pair.token, choice=choice, milliseconds=900)
            )


def stops(folder: Path, *names: str) -> None:
    rejected(tiny_runs.run(f"--resume={folder}"), *names)
    assert not (folder / "round-1").exists()


def test_it_waits_for_answers_and_goes_on_with_them(begun):
    folder, url = begun(14)
    printed = shlex.split(label_command(url, CAMPAIGN))
    known = CliRunner().invoke(label_main, [*printed[2:], "--dry-run"])
    assert (
        printed[:2] == ["python", "tools/label.py"]
        and known.exit_code == 0
        and '"action": "resume"' in known.stdout
    )
    stops(folder, "round-1", "13 of 14", "0", label_command(url, CAMPAIGN))
    answer(url, 9)
    stops(folder, "round-1", "13 of 14")
    answer(url, 99)
    # two test pairs cannot show that the round's reward is above chance
    weak = tiny_runs.run(f"--resume={folder}")
    assert weak.exit_code == 2 and "--weak-reward" in weak.stderr.splitlines()[-1]
    result = tiny_runs.run(f"--resume={folder}", "--weak-reward")
    assert result.exit_code == 0, result.output
    (entry,) = tiny_rounds.ledger_of(folder)
    labels = load_labels(folder / "round-1" / "labels.jsonl")
    assert (
        entry["labels"]["count"] == len(labels) >= 13
        and entry["labels"]["noise"] is None
        and entry["labels"]["by"] == "people"
    )
    assert {(label.generator, label.annotator, label.psi) for label in labels} == {
        (entry["labels"]["generator"], "local", 1.0)
    }
    assert all(label.winner == label.extra["left_seed"] for label in labels)
    assert "round  labels" in result.output and entry["tuned"]["generator"] != entry["labels"]["generator"]


def test_answers_without_a_preference_are_rejected(begun):
    folder, url = begun(8)
    answer(url, 99, Choice.TIE)
    stops(folder, "split_by_seed", "train", "val", "test", "0")


def test_labels_of_another_generator_are_rejected(begun, tiny_networks):
    folder, url = begun(8)
    answer(url, 99)
    generator = load_generator(tiny_networks)
    with raising("round-1", generator.hash[:12]):
        round_labels(url, CAMPAIGN, generator, 8)
