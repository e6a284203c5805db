"""The command eg3d-rlhf: every job on one screen, quickly; each opens what it names; scripts of tools/ are
the same commands.
"""

import importlib
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from eg3d_rlhf.modes.jobs import JOBS, command_of, main
from tests.rejections import check_message, rejected

REPO = Path(__file__).parents[2]
QUIET = """
import os, sys, time
sys.argv = ["eg3d-rlhf", *sys.argv[1:]]
try:
    import runpy
    runpy.run_module("eg3d_rlhf", run_name="__main__", alter_sys=True)
except SystemExit:
    heavy = {"torch", "scipy", "numpy", "PIL", "matplotlib"} & set(sys.modules)
    print(sorted(heavy), time.process_time(), file=sys.stderr)
"""


def test_help_names_every_job_on_one_screen():
    printed = CliRunner().invoke(main, ["--help"]).stdout
    assert len(printed.splitlines()) <= 70 and max(map(len, printed.splitlines())) <= 80
    listed = [line[2:].split("  ")[0] for line in printed.split("Jobs:\n")[1].splitlines()]
    assert listed == list(JOBS)


MODES = ("gan", "circular-dpo", "online", "grpo", "offline", "distill", "reward", "mesh-reward")
QUICK = (
    "--help",
    "samples",
    "label annotators --help",
    "train --reward=sigma --help-all",
    "train --mode=distill --prior=heads --help",
    *(f"train --mode={mode} --help-all" for mode in MODES),
    *(f"{job} --help" for job in JOBS),
)
WITH_NUMPY = tuple(
    f"{job} --help"
    for job in ("label", "study", "flow label", "flow study", "flow plan", "flow status", "data point-maps")
)


@pytest.mark.parametrize("words", QUICK)
def test_help_loads_no_torch(words):
    arguments = words.split()
    done = subprocess.run([sys.executable, "-c", QUIET, *arguments], cwd=REPO, capture_output=True, text=True)
    modules, seconds = re.fullmatch(r"\[(.*)\] ([\d.]+)", done.stderr.splitlines()[-1]).groups()
    allowed = "'numpy'" if words in WITH_NUMPY else ""
    assert modules in ("", allowed) and float(seconds) < 2  # 0.1 s on a quiet machine


@pytest.mark.parametrize("job", JOBS)
def test_a_job_opens_its_command(job):
    command = command_of(job)
    assert isinstance(command, click.Command)
    result = CliRunner().invoke(main, [*job.split(), "--help"])
    assert result.exit_code == 0 and result.stdout.startswith(f"Usage: eg3d-rlhf {job}"), result.output


@pytest.mark.parametrize(
    ("typed", "job"),
    [
        ("sample mesh", "samples/mesh"),
        ("samples mehs", "samples/mesh"),
        ("report evalaute", "report/evaluate"),
        ("chek-assets FOLDER", "check-assets"),
        ("lable", "label"),
        ("flw", "flow"),
        ("qqq", None),
    ],
)
def test_a_mistyped_job_is_told_the_nearest(typed, job):
    line = rejected(CliRunner().invoke(main, typed.split()), "--help")
    assert re.findall("`([a-z/-]+)`", line.replace(" ", "/")) == ([] if job is None else [job])


@pytest.mark.parametrize("job", ["", *JOBS, "label add-annotator"])
def test_every_entry_point_has_a_version(job):
    result = CliRunner().invoke(main, [*job.split(), "--version"])
    assert result.exit_code == 0 and re.fullmatch(r"eg3d-rlhf \d+\.\d+\.\d+\S*\n", result.stdout), (
        result.output
    )


def test_the_version_is_the_packages():
    version = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["version"]
    assert CliRunner().invoke(main, ["--version"]).stdout.split()[1] == version


COMPLETED = """
import os, sys
from click.testing import CliRunner
from eg3d_rlhf.modes.jobs import main
for words in sys.argv[1:]:
    *before, last = words.split(" ")
    env = {"_EG3D_RLHF_COMPLETE": "bash_complete", "COMP_WORDS": " ".join(["eg3d-rlhf", *before, last])}
    done = CliRunner(env={**env, "COMP_CWORD": str(len(before) + 1)}).invoke(main, prog_name="eg3d-rlhf")
    print(done.exit_code, *(line.partition(",")[2] for line in done.stdout.splitlines()))
print(*{"torch"} & sys.modules.keys())
"""


def test_the_shell_completes_jobs_and_flags_without_torch():
    words = [
        "",
        "sam",
        "samples ",
        "samples m",
        "label ",
        "label add-annotator --q",
        "train --mode=gan --lambda-",
    ]
    done = subprocess.run(
        [sys.executable, "-c", COMPLETED, *words], cwd=REPO, capture_output=True, text=True, check=True
    )
    nouns, samples, *of_samples, label, flags, modes, heavy = done.stdout.splitlines()
    assert nouns.split()[1:] == list(dict.fromkeys(job.split()[0] for job in JOBS))
    assert samples.split() == ["0", "samples"]
    assert [line.split()[1:] for line in of_samples] == [["images", "videos", "mesh", "sheet"], ["mesh"]]
    assert {"synthetic", "elo", "export", "add-annotator"} <= set(label.split())
    assert flags.split() == ["0", "--qr"] and {"--lambda-r", "--lambda-sigma"} <= set(modes.split())
    assert heavy == "", done.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_of_completion_is_printed(shell):
    done = CliRunner(env={"_EG3D_RLHF_COMPLETE": f"{shell}_source"}).invoke(main, prog_name="eg3d-rlhf")
    assert done.exit_code == 0 and f"_EG3D_RLHF_COMPLETE={shell}_complete" in done.stdout


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
sys.modules |= dict.fromkeys(("fastapi", "granian", "sqlalchemy", "jinja2", "segno"))
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
    assert re.search(r"\b(fastapi|granian|sqlalchemy|jinja2|segno)\b", line), line


HELP_AND_RUN = """
import importlib
import sys
from click.testing import CliRunner
from eg3d_rlhf.modes.jobs import command_of, main
for job in sys.argv[1:]:
    below = [f"{job} {name}" for name in getattr(command_of(job), "commands", ())]
    for words in [job, *below]:
        done = CliRunner().invoke(main, [*words.split(), "--help"])
        print(done.exit_code, done.stdout.partition(" [")[0])
    # a job of flow needs a work folder first
    if not job.startswith("flow"):
        done = CliRunner().invoke(main, job.split())
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
    assert len(refused) == 2 and len(helped) > 15 and len(lines) == len(refused) + len(helped), (
        done.stdout + done.stderr
    )


def test_a_flow_is_drawn_tuned_and_exported_without_the_page():
    jobs = (
        "import sys; from eg3d_rlhf.modes.jobs import command_of; [command_of(job) for job in sys.argv[1:]]"
    )
    blocked = WITHOUT.partition("import runpy")[0]
    done = subprocess.run(
        [sys.executable, "-c", blocked + jobs, "flow sample", "flow tune", "flow export"],
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
