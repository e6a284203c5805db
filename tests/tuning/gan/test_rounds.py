"""Preference rounds: what they leave, that a run which was cut off anywhere ends as the straight one, and
that nothing edited is read.
"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from eg3d_rlhf.core import bundled
from eg3d_rlhf.core.cli import file_hash
from eg3d_rlhf.generators import load_generator
from eg3d_rlhf.preferences.labels import load_labels
from eg3d_rlhf.rewards.reward import load_reward
from eg3d_rlhf.tuning.gan import reward_run as gan_run
from eg3d_rlhf.tuning.gan import rounds
from eg3d_rlhf.tuning.gan.early_stop import consistency
from eg3d_rlhf.tuning.gan.rounds import Ledger, run_rounds, table
from tests import tiny_rounds, tiny_runs
from tests.rejections import raising, rejected
from tests.tiny_rounds import ledger_of
from training import checkpoint


class Script:
    """Steps that write their names; 'wait' lists those that have to wait once."""

    def __init__(self, folder: Path, *wait: tuple[int, str]):
        self.folder = folder
        self.wait = list(wait)
        self.done = []

    def __getattr__(self, step):
        def run(number, ledger):
            if (number, step) in self.wait:
                self.wait.remove((number, step))
                return None
            self.done.append((number, step))
            path = self.folder / f"{step}-{number}"
            path.write_text(step)
            return {"figure": number / 3}, [path]

        return run


def test_steps_run_in_order_wait_and_go_on(tmp_path):
    work = Script(tmp_path, (1, "labels"), (2, "reward"))
    assert [run_rounds(2, Ledger(tmp_path), work) for _ in range(3)] == [False, False, True]
    assert work.done == [(n, step) for n in (1, 2) for step in rounds.STEPS]
    again = Ledger(tmp_path)
    assert run_rounds(2, again, work) and len(work.done) == 6, "what is done is not done again"
    assert [path.name for path in again.files("tuned")] == ["tuned-1", "tuned-2"] and again.rounds[1][
        "labels"
    ]["figure"] == 2 / 3


@pytest.mark.parametrize(
    "edit",
    [
        lambda text: text.replace('"figure": 0.333', '"figure": 0.334'),
        lambda text: text[:-40],
        lambda text: "[]",
        lambda text: '{"rounds": []}',
    ],
    ids=["figure", "cut", "other", "bare"],
)
@pytest.mark.parametrize("earlier", [False, True], ids=["now", "version 0.1"])
def test_an_edited_ledger_is_rejected(tmp_path, edit, earlier):
    run_rounds(1, Ledger(tmp_path), Script(tmp_path))
    path = tmp_path / "ledger" / "round-1-labels" / "done.json"
    if earlier:
        shutil.rmtree(tmp_path / "ledger")
        path = tmp_path / rounds.LEDGER
    path.write_text(edit(path.read_text()))
    with raising("ledger"):
        Ledger(tmp_path)


def test_what_version_0_1_has_done_is_not_done_again(tmp_path):
    """It wrote ledger.json alone, which has kept its form."""
    run_rounds(2, Ledger(tmp_path), Script(tmp_path, (2, "tuned")))
    known = Ledger(tmp_path).rounds
    shutil.rmtree(tmp_path / "ledger")
    work = Script(tmp_path)
    again = Ledger(tmp_path)
    assert again.rounds == known and run_rounds(2, again, work) and work.done == [(2, "tuned")]
    shutil.rmtree(tmp_path / "ledger")
    (tmp_path / "reward-1").write_text("other")
    with raising("reward-1"):
        Ledger(tmp_path)


def test_a_file_that_the_ledger_names_must_be_as_it_was(tmp_path):
    run_rounds(1, Ledger(tmp_path), Script(tmp_path))
    digest = file_hash(tmp_path / "labels-1")[:12]
    (tmp_path / "labels-1").write_text("other")
    with raising("labels-1", digest, file_hash(tmp_path / "labels-1")[:12]):
        Ledger(tmp_path)
    (tmp_path / "labels-1").unlink()
    with raising("labels-1", "missing"):
        Ledger(tmp_path)


@pytest.fixture(scope="module")
def shaped(tmp_path_factory):
    return tiny_rounds.write_networks(tmp_path_factory.mktemp("shaped") / "shaped.safetensors")


@pytest.fixture(scope="module", autouse=True)
def coarse():
    """Quick annotators and rewards."""
    with pytest.MonkeyPatch.context() as patch:
        tiny_rounds.coarse(patch.setattr)
        yield


@pytest.fixture(scope="module")
def straight(shaped, tiny_reward, tmp_path_factory):
    """Folder of two rounds without an interruption."""
    outdir = tmp_path_factory.mktemp("straight")
    result = tiny_runs.run(*tiny_rounds.flags(shaped, tiny_reward, outdir))
    assert result.exit_code == 0, result.output
    assert len(result.output.split("round  labels  pooled")[1].splitlines()) >= 3
    return tiny_runs.only_run(outdir)


def test_what_two_rounds_leave(straight, shaped):
    first, second = ledger_of(straight)
    labels = [load_labels(straight / f"round-{n}" / "labels.jsonl") for n in (1, 2)]
    before = load_generator(shaped)
    tuned = [load_generator(straight / entry["tuned"]["files"][0][0]) for entry in (first, second)]
    assert {label.generator for label in labels[0]} == {before.hash} and {
        label.generator for label in labels[1]
    } == {tuned[0].hash}
    seeds = [{s for label in part for s in (label.winner, label.loser)} for part in labels]
    assert [len(part) for part in seeds] == [28, 28] and not seeds[0] & seeds[1] and min(seeds[0]) >= 10_000
    assert load_labels(straight / "round-2" / "pooled.jsonl") == labels[0] + labels[1]
    assert (first["labels"]["chosen_by_doubt"], second["labels"]["chosen_by_doubt"]) == (0, 7)
    assert second["labels"]["temperature"] == first["labels"]["temperature"], (
        "later labels have the noise of the first"
    )
    for entry, part in zip((first, second), labels, strict=True):
        assert entry["labels"]["count"] == 14 and entry["labels"]["noise"] == np.mean(
            [x.clean != x.winner for x in part]
        )
    known = load_reward(straight / "round-2" / "reward" / "reward.safetensors")
    assert known.provenance["generators"] == [before.hash, tuned[0].hash] and len(known.members()) == 2
    assert second["reward"]["pooled"] == sum(second["reward"]["splits"].values()) == 28
    for entry, network in zip((first, second), tuned, strict=True):
        assert entry["tuned"]["generator"] == network.hash != before.hash and entry["tuned"]["images"] == 8
        assert entry["tuned"]["distance"] == pytest.approx(consistency(network.G, before.G, 32).mean())
        assert set(entry["tuned"]["monitored"]) == {"reward", "heldout", "utility"}
    assert json.loads((straight / "summary.json").read_text())["rounds"] == [first, second]
    assert len(table(Ledger(straight))) == 3


def test_a_round_is_an_ordinary_run_from_the_pretrained_network(straight, shaped, tiny_reward, tmp_path):
    reward = straight / "round-2" / "reward" / "reward.safetensors"
    without_rounds = [flag for flag in tiny_rounds.FLAGS if "round" not in flag]
    flags = tiny_runs.train_flags(
        tiny_rounds.DATA,
        shaped,
        tmp_path,
        f"--heldout-reward={tiny_reward}",
        f"--reward-ckpt={reward}",
        *without_rounds,
    )
    assert tiny_runs.run(*flags).exit_code == 0
    first, second = (
        load_generator(folder).hash
        for folder in (tiny_runs.only_run(tmp_path), straight / "round-2" / "tuning")
    )
    assert first == second


def test_a_finished_run_is_not_done_again(straight):
    before = {path: file_hash(path) for path in straight.rglob("*.safetensors")}
    result = tiny_runs.run(f"--resume={straight}")
    assert result.exit_code == 0 and "training" not in result.output
    assert all(line in result.output for line in table(Ledger(straight)))
    assert {path: file_hash(path) for path in straight.rglob("*.safetensors")} == before
    result = tiny_runs.run(f"--resume={straight}", "--kimg=1")
    rejected(result, "--kimg", "--resume", "1")


class CutError(BaseException):
    """Stands for a kill."""


def cut(monkeypatch, where, name: str, after: bool, times: int = 1) -> None:
    """Let a function end the process the `times`-th time that it is called, before or after its work."""
    original = getattr(where, name)
    left = [times]

    def mortal(*args, **kwargs):
        left[0] -= 1
        if left[0] == 0 and not after:
            raise CutError
        result = original(*args, **kwargs)
        if left[0] == 0:
            raise CutError
        return result

    monkeypatch.setattr(where, name, mortal)


CUTS = {  # where, function, after its work, at which call
    "before labels are written": (rounds, "write_labels", False, 1),
    "before labels are noted": (Ledger, "note", False, 1),
    "in the rewards": ("eg3d_rlhf.rewards.network_training", "_epoch", True, 14),
    "rewards are stored": (Ledger, "note", False, 2),
    "before tuning": (gan_run, "build", False, 1),
    "in tuning": ("training.loop.TrainingLoop", "step", True, 2),
    "after tuning": (Ledger, "note", False, 3),
    "tuning is noted": (Ledger, "note", True, 3),
    "second round's labels": (Ledger, "note", False, 4),
    "second round's rewards": ("eg3d_rlhf.rewards.training_run", "assess", True, 2),
    "all but the summary": (rounds, "table", False, 1),
}


def assert_equal_rounds(first: Path, second: Path) -> None:
    """Equal ledgers, but for what names the machine's clock, and equal files that they name."""
    first_ledger = ledger_of(first)
    second_ledger = ledger_of(second)
    assert first_ledger == second_ledger
    names = [name for entry in first_ledger for step in rounds.STEPS for name, _ in entry[step]["files"]]
    assert len(names) == 2 * (1 + 3 + 1) and [file_hash(first / n) for n in names] == [
        file_hash(second / n) for n in names
    ]


@pytest.mark.long
@pytest.mark.parametrize("case", CUTS)
def test_cut_off_anywhere_a_run_ends_as_the_straight_one(
    case, straight, shaped, tiny_reward, tmp_path, monkeypatch
):
    where, name, after, times = CUTS[case]
    with monkeypatch.context() as patch:
        if isinstance(where, str):
            module, _, member = where.rpartition(".")
            where = getattr(sys.modules[module], member) if where not in sys.modules else sys.modules[where]
        cut(patch, where, name, after, times)
        with pytest.raises(CutError):
            tiny_runs.run(*tiny_rounds.flags(shaped, tiny_reward, tmp_path))
    folder = tiny_runs.only_run(tmp_path)
    result = tiny_runs.run(f"--resume={folder}", "--workers=1")
    assert result.exit_code == 0, result.output
    assert_equal_rounds(straight, folder)


@pytest.mark.long
def test_going_on_from_the_last_network_keeps_the_first_as_the_reference(
    straight, shaped, tiny_reward, tmp_path
):
    result = tiny_runs.run(*tiny_rounds.flags(shaped, tiny_reward, tmp_path, "--set=round_start=last"))
    assert result.exit_code == 0, result.output
    folder = tiny_runs.only_run(tmp_path)
    first, second = ledger_of(folder)
    assert (
        first["tuned"]["generator"]
        == ledger_of(straight)[0]["tuned"]["generator"]
        != second["tuned"]["generator"]
    )
    options = json.loads((folder / "round-2" / "tuning" / "training_options.json").read_text())
    assert options["init"] == str(folder / first["tuned"]["files"][0][0]) and options["reference"] == str(
        shaped
    )
    assert set(options["hashes"]) == {"init", "reference", "reward", "heldout"} and options["rounds"] == 0
    assert second["tuned"]["generator"] != ledger_of(straight)[1]["tuned"]["generator"]
    state = checkpoint.read(folder / "round-2" / "tuning")[0]
    assert torch.equal(
        state["phase_Grlhf.G_ref.decoder.net.2.bias"], load_generator(shaped).G.decoder.net[2].bias
    )


MISTAKES = {
    "no reward": (["--rounds=2"], ("--rounds", "--reward=sigma")),
    "a reward": (
        ["--reward=sigma", "--rounds=2", f"--reward-ckpt={bundled.REWARD}"],
        ("--reward-ckpt", "--rounds"),
    ),
    "no rounds": (
        ["--reward=sigma", "--round-pairs=9"],
        ("--round-pairs", "--rounds"),
    ),
    "other data": (
        ["--reward=sigma", "--rounds=1", "--data=x.zip"],
        ("--round-labels", "people", "--data=x.zip", "synthetic"),
    ),
    "too few": (
        ["--reward=sigma", "--rounds=1", "--round-pairs=2"],
        ("--round-pairs", "val", "test"),
    ),
    "held out": (
        ["--reward=sigma", "--rounds=3", "--round-pairs=50000"],
        ("--round-pairs", "200000", "10000"),
    ),
    "preset": (
        ["--reward=sigma", "--rounds=1", "--set=round_preset=huge"],
        ("--set round_preset", "tiny", "'huge'"),
    ),
    "aggregate": (
        ["--reward=sigma", "--rounds=1", "--set=round_aggregate=median"],
        ("--set round_aggregate=", "'median'"),
    ),
    "heldout reward": (
        ["--reward=sigma", "--rounds=1", "--heldout-reward=none.safetensors"],
        ("--heldout-reward", "none.safetensors"),
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_one_line_and_leave_nothing(case, shaped, tmp_path):
    more, names = MISTAKES[case]
    data = [] if any(flag.startswith("--data") for flag in more) else [f"--data={tiny_rounds.DATA}"]
    flags = [
        f"--init={shaped}",
        f"--outdir={tmp_path / 'runs'}",
        "--batch=4",
        "--nrr-initial=8",
        "--device=cpu",
        *data,
        *more,
    ]
    result = tiny_runs.run(*flags)
    rejected(result, *names)
    assert not (tmp_path / "runs").exists()
