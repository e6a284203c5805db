"""What continuous integration runs: the linter, the type checker, then the fast tests."""

import shutil
import subprocess
import tomllib

import pytest

PROTOCOLS = ("field", "generators", "observations", "reward", "rlhf", "run", "seeds", "sigma", "preferences", "attribution", "metrics")


@pytest.mark.skipif(shutil.which("make") is None, reason="no make on this machine")
def test_make_test_runs_ruff_and_mypy_first(repo):
    assert (repo / ".ci" / "run").read_text().rstrip().endswith("make test")
    planned = subprocess.run(["make", "--dry-run", "test"], cwd=repo, capture_output=True, text=True, check=True).stdout
    places = [planned.index(words) for words in ("ruff check .", "bin/mypy", "-m pytest")]
    assert places == sorted(places)


def test_types_of_the_protocols_and_of_what_uses_them_are_checked(repo):
    settings = tomllib.loads((repo / "pyproject.toml").read_text())["tool"]["mypy"]
    assert {"eg3d_rlhf", "tools", "train.py"} <= set(settings["files"])
    left_out = [name for group in settings.get("overrides", []) if group.get("ignore_errors") for name in group["module"]]
    assert [name for name in left_out if name.split(".")[1:2] and name.split(".")[1] in PROTOCOLS] == []
