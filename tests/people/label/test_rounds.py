"""Rounds whose labels come from people: the run makes a campaign and ends, refuses to go on without answers, and tunes with them."""

import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from eg3d_rlhf.core.spec import SlabSpec
from eg3d_rlhf.generators import load_generator, ws_of_seeds
from eg3d_rlhf.people.label.commands import main as label_main
from eg3d_rlhf.people.label.entities import Answer, Choice, Kind
from eg3d_rlhf.people.label.launch import label_command, round_labels
from eg3d_rlhf.people.label.server.identity import kept_secret
from eg3d_rlhf.people.label.server.served_shapes import Addresses
from eg3d_rlhf.people.label.shape_files import ShapeCache
from eg3d_rlhf.people.label.store import Store
from eg3d_rlhf.preferences.labels import load_labels
from eg3d_rlhf.rewards.reward import load_reward
from tests import tiny_rounds, tiny_runs
from tests.people.label.browser import needs_chromium, small

CAMPAIGN = "round-1"


@pytest.fixture(scope="module")
def shaped(tmp_path_factory):
    return tiny_rounds.write_networks(tmp_path_factory.mktemp("shaped") / "shaped.safetensors")


@pytest.fixture
def begun(shaped, tiny_data, tiny_reward, tmp_path, monkeypatch) -> Callable[[int], tuple[Path, str]]:
    """Starts a run of one round with so many pairs; returns its folder and the database's URL."""
    tiny_rounds.coarse(monkeypatch.setattr)

    def start(pairs: int) -> tuple[Path, str]:
        flags = tiny_rounds.flags(shaped, tiny_reward, tmp_path / "runs", f"--data={tiny_data}", "--round-labels=people", "--rounds=1")
        result = tiny_runs.run(*flags, f"--round-pairs={pairs}")
        assert result.exit_code == 0, result.output
        folder = tiny_runs.only_run(tmp_path / "runs")
        url = f"sqlite:///{folder / 'labels.db'}"
        assert f"Label with: {label_command(url, CAMPAIGN)}\n" in result.output and f"--resume={folder}" in result.output
        assert not (folder / "round-1").exists()
        return folder, url

    return start


def answer(url: str, count: int, choice: Choice = Choice.LEFT) -> None:
    """Somebody answers so many trials, or all there are."""
    with Store.open(url, create=False) as store:
        me = store.annotator_without_token("local", "admin").id
        campaign = store.campaign(CAMPAIGN).id
        for _ in range(count):
            (pair, *_) = store.assignments(campaign, me) or (None,)
            if pair is None:
                return
            store.submit(campaign, me, Answer(key=pair.token, assignment=pair.token, choice=choice, milliseconds=900))


def refused(folder: Path, *texts: str) -> None:
    result = tiny_runs.run(f"--resume={folder}")
    assert result.exit_code == 2 and len(result.stderr.splitlines()) == 1, result.output
    assert [text for text in texts if text not in result.stderr] == [] and not (folder / "round-1").exists()


def test_it_waits_for_answers_and_goes_on_with_them(begun):
    folder, url = begun(14)
    printed = shlex.split(label_command(url, CAMPAIGN))
    known = CliRunner().invoke(label_main, [*printed[2:], "--dry-run"])
    assert printed[:2] == ["python", "tools/label.py"] and known.exit_code == 0 and '"action": "resume"' in known.stdout
    refused(folder, "round-1: expected answers to at least 13 of 14 pairs, got 0. Label on: python tools/label.py --db=sqlite:///")
    answer(url, 9)
    refused(folder, "to at least 13 of 14 pairs, got ")
    answer(url, 99)
    result = tiny_runs.run(f"--resume={folder}")
    assert result.exit_code == 0, result.output
    (entry,) = tiny_rounds.ledger_of(folder)
    labels = load_labels(folder / "round-1" / "labels.jsonl")
    assert entry["labels"]["count"] == len(labels) >= 13 and entry["labels"]["noise"] is None and entry["labels"]["by"] == "people"
    assert {(label.generator, label.annotator, label.psi) for label in labels} == {(entry["labels"]["generator"], "local", 1.0)}
    assert all(label.winner == label.extra["left_seed"] for label in labels)
    assert "round  labels" in result.output and entry["tuned"]["generator"] != entry["labels"]["generator"]


def test_answers_without_a_preference_are_refused(begun):
    folder, url = begun(8)
    answer(url, 99, Choice.TIE)
    refused(folder, "split_by_seed: expected labels in every split, got none in train, val, test from 0 usable labels")


def test_labels_of_another_generator_are_refused(begun, tiny_networks):
    folder, url = begun(8)
    answer(url, 99)
    with pytest.raises(ValueError, match="round-1: expected judgements of generator .* Another network was labelled: restore the database"):
        round_labels(url, CAMPAIGN, load_generator(tiny_networks), 8)


@pytest.mark.long
@needs_chromium
def test_a_whole_round_on_labels_from_the_page(begun, shaped, page, repo, tmp_path):
    folder, url = begun(60)
    with Store.open(url, create=False) as store:
        shapes = dict(store.shapes(store.campaign(CAMPAIGN).id))
    for shape in shapes.values():  # stand-ins, so that nothing has to be drawn
        ShapeCache(tmp_path / "cache").put_mesh(shape, small(shape))
    better = solidity(shaped, sorted({shape.seed for shape in shapes.values()}))
    served = subprocess.Popen(
        [sys.executable, *shlex.split(label_command(url, CAMPAIGN))[1:], "--port=0", f"--cache={tmp_path / 'cache'}"], cwd=repo,
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        line = next(line for line in served.stdout if "label at" in line)
        label = page(re.search(r"http://127\.0\.0\.1:\d+", line).group()).open()
        addresses = Addresses(kept_secret(tmp_path / "cache" / "server.key"), shapes)
        while label.state("state") != "finished":
            left, right = (shapes[addresses.asset(label.state(f"pair.{side}"))] for side in ("left", "right"))
            if left.seed == right.seed:  # one of the two was damaged on purpose
                key = "ArrowRight" if left.degradation else "ArrowLeft"
            else:
                key = "ArrowLeft" if better[left.seed] > better[right.seed] else "ArrowRight"
            before = label.state("pair.assignment")
            label.answer(key)
            shown = "before => window.labelState.pair?.assignment !== before || window.labelState.state === 'explained'"
            label.page.wait_for_function(shown, arg=before, timeout=20_000)
            if label.state("state") == "explained":
                label.answer("Enter")
            label.page.wait_for_function("() => ['label', 'finished'].includes(window.labelState.state)", timeout=20_000)
        label.sent()
    finally:
        served.send_signal(signal.SIGINT)
        served.communicate(timeout=60)
    result = tiny_runs.run(f"--resume={folder}")
    assert result.exit_code == 0, result.output
    labels = load_labels(folder / "round-1" / "labels.jsonl")
    assert len({label.extra["pair"] for label in labels}) == 60 and {label.extra["kind"] for label in labels} >= {Kind.PAIR.value}
    assert all(better[label.winner] > better[label.loser] for label in labels)
    (entry,) = tiny_rounds.ledger_of(folder)
    reward = load_reward(folder / "round-1" / "reward" / "reward.safetensors")
    assert entry["labels"]["count"] == len(labels) and reward.provenance["generator"] == load_generator(shaped).hash
    assert sum(entry["reward"]["splits"].values()) == len(labels)
    assert entry["tuned"]["images"] == 8 and entry["tuned"]["generator"] == load_generator(folder / "round-1" / "tuning").hash


def solidity(network: Path, seeds: list[int]) -> dict[int, float]:
    """How much of the cube each seed fills, which the scripted annotator likes."""
    generator = load_generator(network).generator
    cubes = generator.field(ws_of_seeds(generator, seeds)).density_grid(SlabSpec.of(generator.bounds, 16))
    return dict(zip(seeds, np.asarray(cubes.flatten(1).mean(1)).tolist(), strict=True))
