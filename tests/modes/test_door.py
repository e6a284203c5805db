"""The command eg3d-rlhf: every job on one screen, quickly; each opens what it names; scripts of tools/ are
the same commands.
"""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from eg3d_rlhf.modes.door import JOBS, command_of, main
from tests.rejections import check_message

REPO = Path(__file__).parents[2]
QUIET = """
import os, sys, time
sys.argv = ["eg3d-rlhf", *sys.argv[1:]]
try:
    import runpy
    runpy.run_module("eg3d_rlhf", run_name="__main__", alter_sys=True)
except SystemExit:
    print(sorted({"torch", "scipy", "numpy"} & set(sys.modules)), time.process_time(), file=sys.stderr)
"""


def test_help_names_every_job_on_one_screen():
    printed = CliRunner().invoke(main, ["--help"]).stdout
    assert len(printed.splitlines()) <= 60 and max(map(len, printed.splitlines())) <= 80
    listed = [line[2:].split("  ")[0] for line in printed.split("Jobs:\n")[1].splitlines()]
    assert listed == list(JOBS)


@pytest.mark.parametrize("arguments", [["--help"], ["samples"], ["label", "annotators", "--help"]])
def test_help_loads_no_torch(arguments):
    done = subprocess.run([sys.executable, "-c", QUIET, *arguments], cwd=REPO, capture_output=True, text=True)
    modules, seconds = re.fullmatch(r"\[(.*)\] ([\d.]+)", done.stderr.splitlines()[-1]).groups()
    assert modules == "" and float(seconds) < 2  # 0.1 s on a quiet machine


@pytest.mark.parametrize("job", JOBS)
def test_a_job_opens_its_command(job):
    command = command_of(job)
    assert isinstance(command, click.Command)
    result = CliRunner().invoke(main, [*job.split(), "--help"])
    assert result.exit_code == 0 and result.stdout.startswith(f"Usage: eg3d-rlhf {job}"), result.output


def test_flags_reach_the_job():
    result = CliRunner().invoke(main, ["train", "--reward=sigma", "--lambda-r=10", "-n"])
    assert result.exit_code == 0 and json.loads(result.stdout)["lambda_r"] == 10
    wrong = CliRunner().invoke(main, ["samples", "mesh", "--out=head.stl"])
    assert wrong.exit_code == 2 and "--out" in wrong.stderr


@pytest.mark.parametrize("script", sorted(path.stem for path in (REPO / "tools").glob("[!_]*.py")))
def test_scripts_are_jobs(script, monkeypatch):
    monkeypatch.syspath_prepend(str(REPO / "tools"))
    module = importlib.import_module(f"tools.{script}")
    if hasattr(module, "main"):
        assert module.main in [command_of(job) for job in JOBS]


WITHOUT = """
import sys
# as where there are none
sys.modules |= dict.fromkeys(("fastapi", "granian", "sqlalchemy", "jinja2", "segno", "confusable_homoglyphs"))
import runpy
sys.argv = sys.argv[1:]
run = runpy.run_path if sys.argv[0].endswith(".py") else runpy.run_module
run(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize(
    "words", [["eg3d_rlhf", "label"], ["tools/label.py"], ["tools/study.py"]], ids=" ".join
)
def test_a_missing_extra_is_named_with_its_command(words):
    path = f"{REPO / 'tools'}:{REPO}"
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, *words],
        cwd=REPO,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    line = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and line.startswith("Error: "), done.stderr
    check_message(line, ("'eg3d-rlhf[label]'",))
    assert re.search(r"\b(fastapi|granian|sqlalchemy|jinja2|segno|confusable_homoglyphs)\b", line), line


HELP_AND_RUN = """
import importlib
import sys
from click.testing import CliRunner
from eg3d_rlhf.modes.door import command_of, main
for job in sys.argv[1:]:
    below = [f"{job} {name}" for name in getattr(command_of(job), "commands", ())]
    for words in [job, *below]:
        done = CliRunner().invoke(main, [*words.split(), "--help"])
        print(done.exit_code, done.stdout.partition(" [")[0])
    done = CliRunner().invoke(main, [*job.split(), *(["WORK"] if job.startswith("flow") else [])])
    print(done.exit_code, done.stderr.strip())
for script in ("label", "study"):
    importlib.import_module(f"tools.{script}")
"""


def test_help_needs_no_extra_and_jobs_name_it():
    """As that of sub-commands does not; `tools/` has the same commands."""
    jobs = ["label", "study", "flow label", "flow study"]
    blocked = WITHOUT.partition("import runpy")[0]
    path = f"{REPO / 'tools'}:{REPO}"
    done = subprocess.run(
        [sys.executable, "-c", blocked + HELP_AND_RUN, *jobs],
        cwd=REPO,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    lines = done.stdout.splitlines()
    refused = [
        line for line in lines if line.startswith("2 Error: ") and "pip install 'eg3d-rlhf[label]'" in line
    ]
    helped = [line for line in lines if line.startswith("0 Usage: eg3d-rlhf ")]
    assert len(refused) == len(jobs) and len(helped) > 15 and len(lines) == len(refused) + len(helped), (
        done.stdout + done.stderr
    )


def test_a_flow_is_drawn_tuned_and_exported_without_the_page():
    jobs = (
        "import sys; from eg3d_rlhf.modes.door import command_of; [command_of(job) for job in sys.argv[1:]]"
    )
    blocked = WITHOUT.partition("import runpy")[0]
    done = subprocess.run(
        [sys.executable, "-c", blocked + jobs, "flow draw", "flow tune", "flow export"],
        cwd=REPO,
        stderr=subprocess.PIPE,
    )
    assert done.returncode == 0, done.stderr


def test_an_output_that_nobody_reads_on_ends_a_job_without_a_word():
    reads, writes = os.pipe()
    os.close(reads)
    done = subprocess.run(
        [sys.executable, "-m", "eg3d_rlhf", "--help"],
        cwd=REPO,
        stdout=writes,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(writes)
    assert done.returncode == 1 and not done.stderr
