"""Every name of version 0.1 that changed is rejected with the present name, and stands on the page that lists
them; each present name exists.
"""

import importlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from eg3d_rlhf.core import renamed
from eg3d_rlhf.modes import MODES
from eg3d_rlhf.modes.jobs import JOBS, command_of, main
from tests.rejections import rejected

REPO = Path(__file__).parents[2]
PAGE = REPO / "docs" / "start" / "migrating.md"
ARGUMENTS = {
    "flow tune": ["WORK"],
    "samples images": ["--outdir=out", "--seeds=1"],
}  # what a command needs before its rare settings are read
PLACES = {mode: job for job, mode in renamed.MODES_OF_JOBS.items()}
FLAGS = [(job, old, now) for job, names in renamed.FLAGS.items() for old, now in names.items()]
VALUES = [
    (job, flag, old, now) for (job, flag), names in renamed.VALUES.items() for old, now in names.items()
]


def command_named(job: str) -> click.Command:
    """The command of a row of the table."""
    if job == "python -m benchmarks":
        return importlib.import_module("benchmarks.__main__").main
    mode = job.removeprefix("train --mode=")
    if mode != job and mode in MODES:
        return MODES[mode].command
    words = PLACES.get(job, job)
    if words in JOBS:
        return command_of(words)
    group, _, name = words.partition(" ")
    return command_of(group).commands[name]


def spellings(command: click.Command) -> set[str]:
    """Flags of a command, and its rare settings as "--set name"."""
    return {name for parameter in command.params for name in parameter.opts} | {
        f"--set {name}" for name in getattr(command, "rare", ())
    }


def typed(flag: str, value: str = "1") -> list[str]:
    """The words that a user types for a flag or a rare setting."""
    setting = flag.removeprefix("--set ")
    return [f"{flag}={value}"] if setting == flag else ["--set", f"{setting}={value}"]


@pytest.mark.parametrize(("old", "now"), renamed.JOBS.items())
def test_an_old_job_names_the_new_one(old, now):
    rejected(CliRunner().invoke(main, [*old.split(), "--help"]), old, now)
    job = now.removeprefix("eg3d-rlhf ")
    assert old not in JOBS and (job in JOBS or importlib.import_module(now.removeprefix("python -m ")))


@pytest.mark.parametrize(("job", "old", "now"), FLAGS)
def test_an_old_flag_names_the_new_one(job, old, now):
    command = command_named(job)
    assert command.job == job
    assert now in spellings(command) and old not in spellings(command)
    result = CliRunner().invoke(command, [*ARGUMENTS.get(job, ()), *typed(old)])
    rejected(result, old, now)


@pytest.mark.parametrize(("job", "flag", "old", "now"), VALUES)
def test_an_old_value_names_the_new_one(job, flag, old, now):
    command = command_named(job)
    assert command.job == job and flag in spellings(command)
    result = CliRunner().invoke(command, [*ARGUMENTS.get(job, ()), *typed(flag, old)])
    rejected(result, flag, old, now)


@pytest.mark.parametrize("job", renamed.COUNTED)
def test_a_number_of_trainings_is_not_taken_for_a_seed(job):
    result = CliRunner().invoke(command_named(job), ["--seeds=3"])
    rejected(result, "--seeds", "0,1,2", "3,")
    for seeds in ("0", "3,", "0,1"):
        renamed.check_seeds(job, seeds)
    renamed.check_seeds("report seeds", "3")  # always a list there


@pytest.mark.parametrize(
    ("words", "given", "wanted"),
    [("samples images", "--out=x", "--outdir"), ("generator convert", "--outdir=x", "--out")],
)
def test_a_file_and_a_folder_are_told_apart(words, given, wanted):
    rejected(CliRunner().invoke(main, [*words.split(), given]), given.partition("=")[0], wanted)


def test_settings_of_a_file_are_checked_too(tmp_path):
    (tmp_path / "s.json").write_text('{"anchor_gate": 0.5}')
    result = CliRunner().invoke(MODES["gan"].command, [f"--settings={tmp_path / 's.json'}"])
    rejected(result, "anchor_gate", "--consistency-gate")


@pytest.mark.parametrize(
    ("command", "now"),
    [
        (["train.py", "--anchor_gate=1"], "--consistency-gate"),
        (["tools/train_reward.py", "--out=x"], "--run-dir"),
        (["-m", "eg3d_rlhf", "report", "proof"], "controlled-study"),
        (["-m", "benchmarks", "--out=x"], "--outdir"),
    ],
    ids=lambda words: words[0] if isinstance(words, list) else words,
)
def test_every_entry_point_rejects(command, now):
    done = subprocess.run([sys.executable, *command], cwd=REPO, capture_output=True, text=True)
    rejected(done, now)


@pytest.mark.skipif(shutil.which("make") is None, reason="no make on this machine")
@pytest.mark.parametrize(("old", "now"), renamed.TARGETS.items())
def test_an_old_target_names_the_new_one(old, now):
    done = subprocess.run(["make", old], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 2 and now in done.stderr.splitlines()[0], done.stderr
    planned = subprocess.run(["make", "-n", now], cwd=REPO, capture_output=True, text=True)
    assert planned.returncode == 0 and f"eg3d-rlhf report {now}" in planned.stdout


def test_variables_are_read_by_the_makefile():
    text = (REPO / "Makefile").read_text()
    assert all(f"$({now})" in text and old not in text for old, now in renamed.VARIABLES.items())


def tables() -> dict[str, list[tuple[str, ...]]]:
    """The rows of the page's tables by the first word of their heading, without marks of code."""
    found: dict[str, list[tuple[str, ...]]] = {}
    heading = ""
    for line in PAGE.read_text().splitlines():
        if line.startswith("## "):
            heading = line.split()[1]
        elif line.startswith("| ") and not re.fullmatch(r"[| -]+", line):
            cells = tuple(cell.strip().replace("`", "") for cell in line.strip("| ").split(" | "))
            found.setdefault(heading, []).append(cells)
    return {name: rows[1:] for name, rows in found.items()}


def shown(job: str) -> str:
    """A command as the page names it."""
    return PLACES.get(job, job)


def test_the_page_has_the_same_tables():
    page = tables()
    assert sorted(page["Jobs"]) == sorted((f"eg3d-rlhf {old}", now) for old, now in renamed.JOBS.items())
    targets = [(f"make {old}", f"make {now}") for old, now in renamed.TARGETS.items()]
    assert sorted(page["Make"]) == sorted([*targets, *renamed.VARIABLES.items()])
    assert sorted(page["Flags"]) == sorted((shown(job), old, now) for job, old, now in FLAGS)
    assert sorted(page["Values"]) == sorted(
        (shown(job), f"{flag}={old}", f"{flag}={now}") for job, flag, old, now in VALUES
    )
    assert sorted(job for job, _, _ in page["Training"]) == sorted(map(shown, renamed.COUNTED))
    assert sorted(page["Files"]) == sorted(renamed.FILES.items())
