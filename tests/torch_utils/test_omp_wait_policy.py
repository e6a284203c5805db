"""Every entry point says how OpenMP's threads wait before it loads torch, unless the user did."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = ["train.py", *sorted(f"tools/{path.name}" for path in (ROOT / "tools").glob("[!_]*.py"))]
MODULES = ["benchmarks", "benchmarks.session", "torch_utils.build"]
REPORT_ENVIRONMENT = """
import os, runpy, sys


class Torch:
    def find_spec(name, *rest):
        if name == "torch":
            print(os.environ.get("OMP_WAIT_POLICY"), os.environ.get("GOMP_SPINCOUNT"), flush=True)
            os._exit(0)


sys.meta_path.insert(0, Torch)
kind, entry = sys.argv[1:]
sys.argv = [entry, "--help"]
sys.path.insert(0, os.path.dirname(os.path.abspath(entry)) if kind == "path" else os.getcwd())
try:
    if kind == "path":
        runpy.run_path(entry, run_name="__main__")
    else:
        runpy.run_module(entry, run_name="__main__", alter_sys=True)
except SystemExit:  # help that needs no torch
    print(os.environ.get("OMP_WAIT_POLICY"), os.environ.get("GOMP_SPINCOUNT"))
"""


def policy_when_torch_loads(kind: str, entry: str, **environment: str) -> str:
    """Return the environment when the entry point first asks for torch, where the process ends, or after
    help without it.
    """
    env = {
        k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "PYTHONPATH")
    } | environment
    done = subprocess.run(
        [sys.executable, "-c", REPORT_ENVIRONMENT, kind, entry],
        env=env,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    ("kind", "entry"),
    [*(("path", script) for script in SCRIPTS), *(("module", module) for module in MODULES)],
)
def test_set_before_torch(kind, entry):
    assert policy_when_torch_loads(kind, entry) == "passive 2000"


def test_the_users_own_stays():
    assert policy_when_torch_loads("path", "train.py", OMP_WAIT_POLICY="active") == "active None"
    assert policy_when_torch_loads("path", "train.py", GOMP_SPINCOUNT="0") == "passive 0"
