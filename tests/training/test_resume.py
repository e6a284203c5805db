"""A run that was killed and resumed is bitwise identical to the straight run.

Damaged and foreign checkpoints are rejected.
"""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.rejections import raising, rejected
from tests.tiny_runs import assert_same, build_loop, build_networks, only_run, run, train_flags, whole_run
from training import checkpoint, networks, storage
from training.augment import AugmentPipe

KILL_AT = 6  # iterations: half a tick after the first checkpoint
KILLED_RUN = f"""
import os, signal, sys
import train
from training.loop import TrainingLoop
step = TrainingLoop.step
def mortal_step(self):
    step(self)
    if self.batch_idx == {KILL_AT}:
        os.kill(os.getpid(), signal.SIGKILL)
TrainingLoop.step = mortal_step
train.main(sys.argv[1:])
"""
FLAGS = (
    "--kimg=0.064",
    "--tick=0.016",
    "--snap=2",
    "--aug=ada",
    "--style-mixing-prob=0.5",
    "--mirror=True",
    "--blur-fade-kimg=0.04",
)


@pytest.fixture(scope="module")
def straight(tiny_data, tiny_networks, tmp_path_factory) -> Path:
    """Folder of a whole run of 16 iterations with a tick and a checkpoint every 4."""
    return whole_run(tiny_data, tiny_networks, tmp_path_factory.mktemp("straight"), *FLAGS)


def assert_equal_runs(first: Path, second: Path) -> None:
    """Equal statistics, final checkpoint (weights, moments, counters) and final networks."""
    assert (first / "stats.jsonl").read_text() == (second / "stats.jsonl").read_text()
    for name, kind in (
        ("checkpoint-000000064.safetensors", "checkpoint"),
        ("network-snapshot-000000-064.safetensors", "network"),
    ):
        (a, meta_a), (b, meta_b) = (storage.read_tensors(folder / name, kind) for folder in (first, second))
        assert_same(a, b)
        assert meta_a == meta_b


def test_killed_and_resumed_equals_straight(straight, tiny_data, tiny_networks, tmp_path, repo):
    command = [sys.executable, "-c", KILLED_RUN, *train_flags(tiny_data, tiny_networks, tmp_path, *FLAGS)]
    env = {**os.environ, "PYTHONPATH": str(repo), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    killed = subprocess.run(command, env=env, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    folder = only_run(tmp_path)
    assert [p.name for p in checkpoint.available(folder)] == ["checkpoint-000000016.safetensors"]
    # a write that the signal cut short
    (folder / ".checkpoint-000000032.safetensors.1.tmp").write_bytes(b"half")
    with open(folder / "stats.jsonl", "a") as file:  # and a line that came after the checkpoint
        file.write('{"tick": 2, "nimg')
    result = run(f"--resume={folder}")
    assert result.exit_code == 0, result.output
    assert_equal_runs(straight, folder)
    assert not list(folder.glob(".*"))


def test_two_checkpoints_are_kept_and_nothing_temporary(straight):
    assert [p.name for p in checkpoint.available(straight)] == [
        "checkpoint-000000048.safetensors",
        "checkpoint-000000064.safetensors",
    ]
    assert not list(straight.glob("*tmp*")) and not list(straight.glob(".*"))
    lines = [json.loads(line) for line in (straight / "stats.jsonl").read_text().splitlines()]
    assert [(line["tick"], line["nimg"]) for line in lines] == [(1, 16), (2, 32), (3, 48), (4, 64)]
    options = json.loads((straight / "training_options.json").read_text())
    assert options["aug"] == "ada" and set(options["hashes"]) == {"init"} and "torch" in options["versions"]


@pytest.fixture
def damaged(straight, tmp_path) -> Path:
    """A copy of the run whose newest checkpoint is cut short."""
    folder = tmp_path / "damaged"
    shutil.copytree(straight, folder)
    newest = checkpoint.available(folder)[-1]
    newest.write_bytes(newest.read_bytes()[:-5000])
    return folder


def test_a_damaged_checkpoint_is_rejected_by_default(damaged):
    before = (damaged / "stats.jsonl").read_text()
    result = run(f"--resume={damaged}")
    rejected(
        result,
        "--resume: ",
        str(damaged / "checkpoint-000000064.safetensors"),
        "--resume-previous",
        "checkpoint-000000048.safetensors",
    )
    assert (damaged / "stats.jsonl").read_text() == before


def test_the_previous_checkpoint_gives_the_same_run(straight, damaged):
    result = run(f"--resume={damaged}", "--resume-previous")
    assert result.exit_code == 0, result.output
    assert_equal_runs(straight, damaged)


def test_two_damaged_checkpoints_are_an_error_even_then(damaged):
    older = checkpoint.available(damaged)[0]
    older.write_bytes(b"")
    line = rejected(run(f"--resume={damaged}", "--resume-previous"), str(older))
    assert "--resume-previous" not in line


def test_a_named_checkpoint_is_used(straight, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(straight, folder)
    result = run(f"--resume={folder / 'checkpoint-000000048.safetensors'}")
    assert result.exit_code == 0, result.output
    assert_equal_runs(straight, folder)


def test_foreign_files_are_rejected(straight, tiny_networks, tmp_path):
    rejected(run(f"--resume={tiny_networks}"), "--resume: ", tiny_networks.name, "'network'")
    (tmp_path / "notes.txt").write_text("hello")
    rejected(run(f"--resume={tmp_path / 'notes.txt'}"), "--resume: ", "notes.txt")


def test_a_checkpoint_of_other_networks_is_rejected(straight, tiny_data, tmp_path):
    loop = build_loop(tiny_data, tmp_path, nets=None, augment_pipe=AugmentPipe().requires_grad_(False))
    loop.trained_object.nets.D = torch.nn.Linear(2, 2)
    with raising("(D)", "bias", "weight", "b16"):
        loop.resume(straight)


def test_writing_is_atomic(tmp_path, monkeypatch):
    path = tmp_path / "a.bin"
    storage.write_atomic(path, b"old")

    full = os.strerror(errno.ENOSPC)

    def fail(*_):
        raise OSError(errno.ENOSPC, full)

    monkeypatch.setattr(storage.os, "fsync", fail)
    with raising(str(path), full, kind=OSError):
        storage.write_atomic(path, b"new")
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["a.bin"]


def test_a_run_made_longer_equals_the_longer_run(straight, tiny_data, tiny_networks, tmp_path):
    folder = whole_run(tiny_data, tiny_networks, tmp_path, *FLAGS, "--kimg=0.032")
    result = run(f"--resume={folder}", "--kimg=0.064")
    assert result.exit_code == 0, result.output
    assert_equal_runs(straight, folder)


def test_another_initial_network_is_rejected_by_name(straight, tiny_data, tiny_networks, tmp_path):
    init = tmp_path / "init.safetensors"
    init.write_bytes(tiny_networks.read_bytes())
    folder = whole_run(tiny_data, init, tmp_path / "runs", *FLAGS, "--kimg=0.016")
    networks.save(init, build_networks(seed=9))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    result = run(f"--resume={folder}", "--kimg=0.032")
    rejected(result, "--resume: ", f"init {init}")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    init.write_bytes(tiny_networks.read_bytes())
    assert run(f"--resume={folder}", "--kimg=0.032").exit_code == 0


def test_a_run_without_a_checkpoint_is_told_from_a_wrong_path(straight, tmp_path):
    """A run that was killed before its first checkpoint can only be started again."""
    killed = tmp_path / "killed"
    killed.mkdir()
    shutil.copy(straight / "training_options.json", killed)
    begun = run(f"--resume={killed}")
    (tmp_path / "empty").mkdir()
    empty = run(f"--resume={tmp_path / 'empty'}")
    rejected(begun, "--resume", str(killed), "without --resume")
    rejected(empty, "--resume", str(tmp_path / "empty"))
    assert begun.stderr.replace(str(killed), "") != empty.stderr.replace(str(tmp_path / "empty"), "")


def test_flags_with_the_values_of_the_run_may_be_repeated(straight, tmp_path):
    copy = tmp_path / straight.name
    shutil.copytree(straight, copy)
    # the finished run has nothing left to do
    assert run(f"--resume={copy}", "--tick=0.016", "--snap=2", "--aug=ada").exit_code == 0
    rejected(run(f"--resume={copy}", "--tick=0.016", "--snap=3"), "--snap=3", "--resume")
