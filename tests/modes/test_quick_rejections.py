"""Wrong paths are rejected before torch is imported, which takes seconds, by every command."""

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import click
import pytest

from eg3d_rlhf.modes import MODES
from eg3d_rlhf.modes.jobs import JOBS, command_of
from tests.rejections import rejected

# Runs command lines in one process, in which an import of torch ends the command. For each, its exit code and
# its standard error are printed as JSON.
PROGRAM = """
import contextlib, io, json, sys

class Imported(BaseException):
    pass

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            raise Imported

from eg3d_rlhf.modes.jobs import main
sys.meta_path.insert(0, Finder())
results = []
for arguments in json.load(sys.stdin):
    with contextlib.redirect_stderr(io.StringIO()) as errors:
        try:
            main(arguments, prog_name="eg3d-rlhf")
        except SystemExit as end:
            code = end.code
        except Imported:
            code = "torch was imported"
    results.append((code, errors.getvalue()))
print(json.dumps(results))
"""
# Metavars of paths contain one of these words.
PATH_WORDS = ("FILE", "DIR", "FOLDER", "RUN", "ZIP", "PATH", "ROOT", "WORK", "CHECKOUT")
# Parameters that name a file or folder to write, or one that need not exist.
WRITTEN = {
    "out",
    "outdir",
    "dest",
    "run_dir",
    "cache",
    "artefacts",
    "access_log",
    "settings",
    "answers",
    "export",
}
# Other parameters without a check, and why.
UNCHECKED = {
    ("train --mode=gan", "data"): "not with --dry-run, and after other flags; see the test",
    ("flow tune", "labels"): "the answers in WORK decide whether it is read",
    ("flow export", "sources"): "the function checks them before its imports",
    ("flow export", "weights"): "a text STAGE=PATH",
    ("flow export", "root"): "needs --weights",
    ("report attribute", "regions"): "a name or a file, by the comparison",
    ("generator invert", "camera"): "numbers or a file",
    ("generator convert", "eg3d_python"): "an interpreter, which may be found by PATH",
    ("train --mode=distill", "prompts"): "a text, or a file if it exists",
    ("train --mode=distill", "prior"): "a name or a file",
    ("train --mode=distill", "reward"): "a name or a file, by the prior",
    ("train --mode=distill", "geometry_reward"): "a name or a file",
}
for job in (
    "reward latent",
    *(f"train --mode={name}" for name in ("circular-dpo", "online", "grpo", "offline")),
):
    for parameter_name in ("pipeline", "pairs", "conditioning"):
        UNCHECKED[job, parameter_name] = "checked together, because --pipeline decides which of them apply"
for job in ("reward train", "train --mode=reward"):
    UNCHECKED[job, "backbone"] = "the preset decides whether it is read"


def commands() -> dict[str, click.Command]:
    """Words of each job and of each mode of train.py -> its command."""
    jobs = {job: command_of(job) for job in JOBS if job != "train"}
    return jobs | {f"train --mode={name}": MODES[name].command for name in MODES}


def parameters_of(command: click.Command) -> list[tuple[click.Parameter, bool]]:
    """Parameters of a command, and whether each is a setting without a flag."""
    rare = getattr(command, "rare", {}).values()
    return [(parameter, False) for parameter in command.params] + [(parameter, True) for parameter in rare]


def checks_itself(parameter: click.Parameter) -> bool:
    """Return True if a wrong path is rejected while the command line is parsed, or right after."""
    exists = isinstance(parameter.type, click.Path) and parameter.type.exists
    return exists or getattr(parameter, "check", None) is not None


def line_with(
    words: str, command: click.Command, wrong: click.Parameter, is_rare: bool, path: str
) -> list[str]:
    """Command line whose parameter `wrong` is `path`. Other required parameters have some value."""
    arguments = words.split()
    for parameter in command.params:
        if parameter is wrong or not parameter.required:
            continue
        value = "0" if parameter.name == "latents" else path
        arguments.append(value if isinstance(parameter, click.Argument) else f"{parameter.opts[0]}={value}")
    if isinstance(wrong, click.Argument):
        return [*arguments, path]
    return [*arguments, *(["--set", f"{wrong.name}={path}"] if is_rare else [f"{wrong.opts[0]}={path}"])]


@pytest.mark.timeout(60)
def test_wrong_paths_are_rejected_before_torch_is_imported(tmp_path: Path):
    path = str(tmp_path / "missing" / "file.jsonl")
    lines = []
    for words, command in commands().items():
        for parameter, is_rare in parameters_of(command):
            # a new folder WORK need not exist
            if checks_itself(parameter) and (words, parameter.name) != ("flow new", "folder"):
                lines.append(line_with(words, command, parameter, is_rare, path))
        # Required parameters are missing.
        if any(parameter.required for parameter in command.params):
            lines.append(words.split())
    lines.append(["train", f"--data={path}"])
    # The program is that of this folder, whatever else is installed.
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        input=json.dumps(lines),
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
    )
    assert result.returncode == 0, result.stderr
    outcomes = json.loads(result.stdout.splitlines()[-1])
    wrong = [(line, outcome) for line, outcome in zip(lines, outcomes, strict=True) if outcome[0] != 2]
    assert wrong == []
    assert len(lines) > 150
    for line, (code, errors) in zip(lines, outcomes, strict=True):
        # click prints the usage before its own errors
        if not errors.startswith("Usage"):
            names = ("missing",) if len(line) > 2 else ()
            rejected(types.SimpleNamespace(exit_code=code, stdout="", stderr=errors), *names)


def test_every_path_of_an_input_has_a_check():
    missing = [
        (words, parameter.name)
        for words, command in commands().items()
        for parameter, _ in parameters_of(command)
        if any(word in (parameter.metavar or "").replace("_", "|").split("|") for word in PATH_WORDS)
        and parameter.name not in WRITTEN
        and not checks_itself(parameter)
        and (words, parameter.name) not in UNCHECKED
    ]
    assert missing == []
