"""Every command that a page shows, in a block of code or within a sentence, is known with all of its flags
and settings.
"""

import importlib.util
import re
import shlex
from pathlib import Path

import click
import pytest

import train
from eg3d_rlhf.modes import MODES, ModeCommand, split_mode
from eg3d_rlhf.modes.jobs import JOBS, command_of

REPO = Path(__file__).resolve().parents[1]
PAGES = [REPO / "README.md", *(p for p in sorted((REPO / "docs").rglob("*.md")) if "lab-book" not in p.parts)]
SHOWN = re.compile(
    r"(?:python (?:train|tools/\w+)\.py|torchrun (?:--[\w-]+(?:=\S+)? )*(?:train|tools/\w+)\.py|eg3d-rlhf"
    r" [a-z])[^`\n]*"
)


def commands_of(text: str) -> list[str]:
    """Command lines of a page, without what is said beside them."""
    return [re.split(r"\s{2,}|\s#\s", line)[0].rstrip(" .,;:") for line in SHOWN.findall(text)]


def parsed(line: str) -> tuple[click.Command, list[str]] | None:
    """The command that a line starts, and its arguments; None where only a noun, or a job without flags, is
    named.
    """
    words = [word for word in shlex.split(line) if word not in ("...", "…", "|")]
    if words[0] == "eg3d-rlhf":
        job = " ".join(words[1:3]) if " ".join(words[1:3]) in JOBS else words[1]
        return (command_of(job), words[1 + len(job.split()) :]) if job in JOBS else None
    script = next(place for place, word in enumerate(words) if word.endswith(".py"))
    if words[script] == "train.py":
        return train.main, words[script + 1 :]
    spec = importlib.util.spec_from_file_location("tool", REPO / words[script])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main, words[script + 1 :]


def unknown(command: click.Command, arguments: list[str]) -> str:
    """What of the arguments is unknown; the empty string where all are known."""
    if isinstance(command, ModeCommand):
        mode, arguments = split_mode(arguments)
        if mode not in MODES:
            return ""  # a plugin's, which the page itself brings
        command = MODES[mode].command
    try:
        values, rest, _ = command.make_parser(click.Context(command)).parse_args(list(arguments))
    except click.UsageError as error:
        return error.format_message()
    if isinstance(command, click.Group) and rest:
        inner = command.get_command(click.Context(command), rest[0])
        return unknown(inner, rest[1:]) if inner is not None else f"no job {rest[0]}"
    rare = getattr(command, "rare", {})
    names = [word.partition("=")[2].partition("=")[0] for word in arguments if word.startswith("--set=")]
    names += [
        word.partition("=")[0]
        for flag, word in zip(arguments, arguments[1:], strict=False)
        if flag == "--set"
    ]
    return ", ".join(
        f"--set {name}" for name in names if name not in rare and name.isidentifier() and name.islower()
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPO)))
def test_a_page_names_no_flag_that_is_not_there(page):
    found = [(line, parsed(line)) for line in commands_of(page.read_text())]
    wrong = [(line, why) for line, known in found if known is not None and (why := unknown(*known))]
    assert wrong == []


def test_an_unknown_flag_is_seen():
    text = (
        "Say `eg3d-rlhf samples mesh --sead=3`, or\n\n    python train.py --mode=distill --set tau=1"
        " --lambda-r=10    # not\n"
    )
    mesh, distill = commands_of(text)
    assert "--sead" in unknown(*parsed(mesh)) and "--lambda-r" in unknown(*parsed(distill))
    setting = "python train.py --mode=distill --set nothing=1"
    assert unknown(*parsed(setting)) == "--set nothing"
