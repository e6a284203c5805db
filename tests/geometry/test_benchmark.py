"""benchmarks/slab.py prints one JSON record with the promised keys, and the two paths agree in it."""

import json
import os
import subprocess
import sys

import pytest


@pytest.mark.long
def test_json_record(repo):
    command = [sys.executable, "benchmarks/slab.py", "--json", "--size", "bundled", "--layout", "both", "--repeats", "1", "--threads", "1"]
    done = subprocess.run(command, cwd=repo, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert record["max_abs_error"] < 1e-5
    assert record["grad_rel_error"] < 1e-4
    assert 0 < record["memory_ratio"] < 1
    assert min(record["forward_ratio"], record["train_ratio"]) > 0
    assert set(record["layouts"]) == {"eg3d", "fixed"}
    for result in record["layouts"].values():
        for times in (*result["forward"].values(), *result["train"].values()):
            assert 0 < times["min_s"] <= times["median_s"] <= times["max_s"]


def test_unknown_option_values_are_click_errors(repo):
    done = subprocess.run([sys.executable, "benchmarks/slab.py", "--size", "huge"], cwd=repo, capture_output=True, text=True)
    assert done.returncode == 2
    assert "'full', 'bundled'" in done.stderr
