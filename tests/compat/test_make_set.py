"""Run the reference tests on another set of values: nothing of tests/references is fixed in them."""

import os
import re
import subprocess
import sys

import pytest


@pytest.mark.long
def test_the_reference_tests_run_on_another_set(repo, tmp_path):
    folder = str(tmp_path / "set")
    make = [sys.executable, "-m", "tests.compat.make_set", folder, "--seed=3"]
    subprocess.run(make, cwd=repo, check=True, capture_output=True)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-m",
        "not long",
        "tests/compat",
    ]
    environment = {**os.environ, "EG3D_RLHF_FIXTURES": folder, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=repo, env=environment, capture_output=True, text=True)
    counts = {
        word: int(count) for count, word in re.findall(r"(\d+) (passed|failed|skipped|errors?)", done.stdout)
    }
    assert done.returncode == 0 and counts.keys() <= {"passed", "skipped"}, done.stdout[-3000:]
    assert counts["passed"] > 5 * counts["skipped"]
