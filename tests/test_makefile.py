"""What continuous integration runs: the linter, the type checker, then the fast tests."""

import shutil
import subprocess
import tomllib

import pytest


@pytest.mark.skipif(
    shutil.which("make") is None, reason="no make on this machine: install Debian's package make"
)
def test_make_test_runs_ruff_and_mypy_first(repo):
    assert (repo / ".ci" / "run").read_text().split()[-2:] == ["make", "test"]
    planned = subprocess.run(
        ["make", "--dry-run", "test"], cwd=repo, capture_output=True, text=True, check=True
    ).stdout
    places = [planned.index(words) for words in ("ruff check .", "bin/mypy", "-m pytest")]
    assert places == sorted(places)


def test_types_are_checked_everywhere(repo):
    settings = tomllib.loads((repo / "pyproject.toml").read_text())["tool"]["mypy"]
    assert {"eg3d_rlhf", "training", "torch_utils", "tools", "train.py"} <= set(settings["files"])
    assert not [group for group in settings.get("overrides", []) if group.get("ignore_errors")]
