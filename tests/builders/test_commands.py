"""Test the builders' commands, and the messages for the names of former jobs that they replaced."""

import importlib
import json
import runpy

import pytest
from click.testing import CliRunner

NAMES = ("face", "features", "people", "people_checks", "shapes", "toy_flow", "view_prior")


@pytest.mark.parametrize("name", NAMES)
def test_a_dry_run_prints_the_settings(name):
    command = getattr(importlib.import_module(f"builders.{name}"), name)
    done = CliRunner().invoke(command, ["--dry-run"])
    assert done.exit_code == 0 and json.loads(done.stdout), done.output


@pytest.mark.parametrize("part", ["people", "labels", "rewards", "control"])
def test_a_dry_run_of_a_part_makes_nothing(part, monkeypatch):
    from builders import build

    monkeypatch.setattr(build, "PARTS", {part: build.PARTS[part]})
    done = CliRunner().invoke(build.build, [part, "--dry-run"])
    assert done.exit_code == 0 and done.stdout.strip()


@pytest.mark.parametrize("job", ["build", "shapes", "features", "toy-flow", "view-prior"])
def test_an_old_job_names_its_builder(job, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["eg3d-rlhf", "assets", job, "--dry-run"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("eg3d_rlhf", run_name="__main__")
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and f"python -m builders.{job.replace('-', '_')}" in line
