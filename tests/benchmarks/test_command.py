"""`python -m benchmarks`: the command line with fake rows, and real rows on tiny inputs."""

import json
import os
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner

from benchmarks import __main__ as run
from benchmarks.rows import all_rows
from tests.benchmarks import fake
from tests.rejections import rejected


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """Run the command with these rows."""
    threads = torch.get_num_threads()

    def call(rows, *flags):
        monkeypatch.setattr(run, "all_rows", lambda: rows)
        return CliRunner().invoke(
            run.main,
            ["--threads=1", "--no-memory", "--repeats=2", f"--outdir={tmp_path / 'out'}", *map(str, flags)],
        )

    yield call
    torch.set_num_threads(threads)


def test_results_land_in_the_folder(bench, tmp_path):
    result = bench([fake.row()])
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "out" / "latest.json").read_text())["threads"] == 1
    assert (tmp_path / "out" / "latest.md").read_text() in result.stdout


def test_disagreement_gives_exit_code_1_and_says_where(bench):
    result = bench([fake.row("wrong", error=0.1), fake.row("right")])
    assert result.exit_code == 1
    (error,) = (line for line in result.stderr.splitlines() if line.startswith("Error: "))
    assert all(word in error for word in ("wrong", "full", "cpu")) and "| right |" in result.stdout


@pytest.mark.parametrize(("slow", "code"), [(0.004, 1), (0.08, 0)])
def test_compare_flags_a_regression_and_passes_an_improvement(bench, tmp_path, slow, code):
    old = tmp_path / "old.json"
    assert bench([fake.row(fast=0.01, slow=0.04)]).exit_code == 0
    (tmp_path / "out" / "latest.json").rename(old)
    result = bench([fake.row(fast=0.01, slow=slow)], f"--compare={old}")
    assert result.exit_code == code, result.output
    flagged = [line for line in result.stderr.splitlines() if line.startswith("Regression: ")]
    assert len(flagged) == code
    assert all(word in line for line in flagged for word in ("sleep", "full", "cpu"))


def test_list_runs_nothing(bench):
    calls = []
    result = bench(
        [fake.row("first", calls=calls), fake.row("second", size="bundled", calls=calls)], "--list"
    )
    assert result.exit_code == 0 and calls == []
    assert [line.split() for line in result.stdout.splitlines()] == [
        [size, name, "at", "least", "1.5x,", "aim", "3x"]
        for size, name in (("full", "first"), ("bundled", "second"))
    ]


def test_mistakes_are_one_line(bench, tmp_path):
    result = bench([fake.row()], "--rows=nothing")
    rejected(result, "--rows", "'nothing'", "--list")
    if not torch.cuda.is_available():
        assert bench([fake.row()], "--device=cuda").exit_code == 2


def test_a_quick_run_leaves_the_real_figures_alone(bench, tmp_path):
    assert bench([fake.row()], "--quick").exit_code == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["quick.json", "quick.md"]
    assert json.loads((tmp_path / "out" / "quick.json").read_text())["rows"][0]["met"] is None


@pytest.mark.parametrize(
    "row",
    [row for row in all_rows() if "all phases" not in row.name],
    ids=lambda row: f"{row.name}, {row.size}",
)
def test_both_paths_of_every_row_agree_on_tiny_inputs(row):
    from benchmarks.session import Options, run_row

    record = run_row(row, Options(quick=True, repeats=1, meter=None))
    assert record["fast_s"] > 0 and record["reference_s"] > 0


def test_peak_memory_is_what_a_path_allocates(repo):
    """Also after a larger peak earlier in the process, which is one of its own: what other tests freed is
    used again.
    """
    code = """
import torch
from benchmarks import session
earlier = torch.ones(80_000_000)
del earlier
meter = session.PeakMeter("cpu")
block = torch.ones(30_000_000)  # 120 MB
del block
print(meter.extra_bytes())
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=repo, capture_output=True, text=True)
    assert done.returncode == 0 and 100e6 < float(done.stdout) < 200e6, done


@pytest.mark.long
def test_a_real_row_end_to_end_with_memory(repo, tmp_path):
    command = [
        sys.executable,
        "-m",
        "benchmarks",
        "--rows=op bias_act, forward",
        "--quick",
        "--memory",
        "--threads=1",
        f"--outdir={tmp_path}",
    ]
    done = subprocess.run(
        command, cwd=repo, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "quick.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["op bias_act, forward"]
    assert rows[0]["extra_memory_mb"] > 0 and rows[0]["reference_extra_memory_mb"] > 0
