"""Scripts as parts: they run once for a command and its files, resume after a stop, and stop together."""

import hashlib
import json
import os
import threading
from types import SimpleNamespace

import pytest

from eg3d_rlhf.evaluation import trainings
from eg3d_rlhf.evaluation.trainings import Part, make
from tests.rejections import raising

SCRIPT = "import os, sys; memory = b'x' * 30_000_000; print(sys.argv[1], os.environ.get('OMP_NUM_THREADS'))"


@pytest.fixture
def training(fake_train, tmp_path):
    return Part.keyed("run", tmp_path / "cells", ["--seed=1"])


def script_part(tmp_path, *flags, text=SCRIPT, name="part"):
    script = tmp_path / f"{name}.py"
    script.write_text(text)
    return Part(name, tmp_path / name, str(script), flags)


def test_a_finished_training_is_not_run_again(training, fake_train):
    finished = []
    make([[training]], on_done=finished.append)
    assert (
        training.finished() and training.state() == "finished" and training.network().parent == training.run
    )
    make([[training]], on_done=finished.append)
    assert finished == [training, training] and len(fake_train.calls()) == 1
    assert fake_train.calls()[0] == f"--seed=1 --outdir={training.folder}"


def test_an_interrupted_training_goes_on(training, fake_train):
    fake_train.mode("stop")
    with raising("run", str(training.folder / trainings.LOG)):
        make([[training]])
    assert training.state() == "begun" and training.network() is None
    fake_train.mode("train")
    make([[training]])
    assert training.finished() and fake_train.calls()[1].startswith(f"--resume={training.run}")


def test_a_training_that_fails_is_named_with_its_last_line(training, fake_train):
    fake_train.mode("fail")
    with raising("run", "status 1", "ValueError: --batch", str(training.folder / trainings.LOG)):
        make([[training]])
    assert not training.finished()


def test_a_run_without_the_needed_file_is_not_finished(fake_train, tmp_path):
    part = Part.keyed("run", tmp_path, ["--seed=1"], "summary.json")
    with raising("run", str(part.folder / trainings.LOG)):
        make([[part]])
    (part.run / "summary.json").touch()
    make([[part]])
    assert part.finished() and len(fake_train.calls()) == 2


def test_other_flags_and_files_are_other_folders(fake_train, tmp_path):
    (tmp_path / "reward").write_text("one")
    flags = ["--seed=1", f"--reward-ckpt={tmp_path / 'reward'}"]
    folders = [Part.keyed("run", tmp_path, words).folder for words in (flags, flags, [*flags, "--batch=4"])]
    (tmp_path / "reward").write_text("trained anew")
    folders.append(Part.keyed("run", tmp_path, flags).folder)
    assert folders[0] == folders[1] and len(set(folders)) == 3


def test_a_part_is_finished_with_its_own_command_and_files_alone(tmp_path, monkeypatch):
    part = script_part(tmp_path, "--flag")
    make([[part]], thread_count=3)
    cost = part.artefact().record
    assert part.finished() and cost["seconds"] > 0 and cost["megabytes"] > 30
    assert (part.folder / trainings.LOG).read_text() == "--flag 3\n"
    other = script_part(tmp_path, "--flag", "--n=3")
    assert not other.finished()
    with monkeypatch.context() as patched:
        patched.setattr(Part, "files", lambda self: {"generator.safetensors": "another"})
        assert not part.finished()
    (part.folder / "stale").touch()
    make([[other]])
    assert not (part.folder / "stale").exists() and other.finished() and not part.finished()


def as_version_0_1_left_it(part, **more):
    """Replace the store's files by the record that version 0.1 wrote."""
    known = json.loads((part.folder / "inputs.json").read_text())
    for name in ("inputs.json", "done.json"):
        (part.folder / name).unlink(missing_ok=True)
    (part.folder / trainings.EARLIER).write_text(json.dumps({**known, **more}))


def test_what_version_0_1_made_is_found_and_what_it_began_goes_on(training, fake_train, tmp_path):
    make([[training]])
    as_version_0_1_left_it(training, seconds=3.0, megabytes=500.0)
    make([[training]])
    assert training.artefact().record == {"seconds": 3.0, "megabytes": 500.0} and len(fake_train.calls()) == 1
    fake_train.mode("stop")
    other = Part.keyed("run", tmp_path / "cells", ["--seed=2"])
    with raising("run"):
        make([[other]])
    as_version_0_1_left_it(other)
    assert other.state() == "begun"
    fake_train.mode("train")
    make([[other]])
    assert other.finished() and fake_train.calls()[-1].startswith(f"--resume={other.run}")


def test_the_folders_names_are_those_of_version_0_1(tmp_path, monkeypatch):
    """Else every training would be made again. Its digits were those of the SHA-256 of this text."""
    monkeypatch.setattr(Part, "files", lambda self: {"generator.safetensors": "ab"})
    part = Part.keyed("seed0", tmp_path, ["--reward=sigma", "--lambda-r=10", "--seed=0"])
    text = '[["--reward=sigma", "--lambda-r=10", "--seed=0"], {"generator.safetensors": "ab"}]'
    assert part.folder.name == f"seed0-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def test_an_interrupted_reward_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(trainings, "TRAIN_REWARD", str(tmp_path / "part.py"))
    part = script_part(tmp_path, "--flag", text="raise SystemExit(2)")
    with raising("part", "status 2"):
        make([[part]])
    assert part.continued() == part.command()
    (part.folder / "state.pt").touch()
    assert part.continued() == [part.script, f"--resume={part.folder}"] and not part.finished()


def test_a_failure_stops_the_others(tmp_path):
    slow = script_part(tmp_path, text="import time\ntime.sleep(60)", name="slow")
    wrong = script_part(tmp_path, text="raise SystemExit('--flag')", name="wrong")
    ended = threading.Timer(30, lambda: None)
    ended.start()
    with raising("wrong", "--flag", "status 1"):
        make([[slow], [wrong]], process_count=2)
    assert ended.is_alive() and not slow.finished()
    ended.cancel()


@pytest.mark.parametrize(("platform", "unit"), [("linux", 1024), ("darwin", 1)])
def test_the_peak_memory_of_a_part_is_in_megabytes(tmp_path, monkeypatch, platform, unit):
    """macOS states bytes; before, a process of 300 MB had 314,572,800 MB there."""
    part = script_part(tmp_path, "--flag")
    monkeypatch.setattr(trainings.sys, "platform", platform)
    usage = SimpleNamespace(ru_maxrss=300_000_000 // unit)
    monkeypatch.setattr(trainings.os, "wait4", lambda pid, options: (*os.waitpid(pid, options), usage))
    part.folder.mkdir()
    _, cost = trainings._Children(quiet=True, threads=None).run(part)
    assert cost["megabytes"] == pytest.approx(300, rel=1e-5)
