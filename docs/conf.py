"""How `make docs` builds the site: Markdown by MyST, notebooks run, commands, settings and public names read
from the code; no network.
"""

import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import click
from docutils import nodes
from docutils.statemachine import StringList
from sphinx.util.docutils import SphinxDirective

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

import eg3d_rlhf  # noqa: E402 (of this checkout, installed or not)
from eg3d_rlhf.core.cli import GroupedCommand  # noqa: E402
from eg3d_rlhf.modes import MODES, gan  # noqa: E402
from eg3d_rlhf.modes.jobs import JOBS, PROGRAM, command_of  # noqa: E402
from eg3d_rlhf.tuning.gan import presets  # noqa: E402
from training.config import knobs_of  # noqa: E402

project = "eg3d-rlhf"
copyright = "the authors of eg3d-rlhf"
extensions = ["myst_nb", "sphinx.ext.autodoc"]
myst_enable_extensions: list[str] = []  # a dollar is a dollar
myst_heading_anchors = 4
nb_execution_mode = "force"
nb_execution_in_temp = True
nb_execution_timeout = 120
nb_execution_raise_on_error = True
nb_execution_show_tb = True
autodoc_member_order = "bysource"
python_maximum_signature_line_length = 100
html_theme = "furo"
html_title = "eg3d-rlhf"
html_copy_source = False
html_show_sphinx = False
pygments_style = "default"


def commands() -> Iterator[tuple[str, str, click.Command]]:
    """Every job in the order of the help screen, `train` once for each of its modes: (as it is typed, what it
    does, command).
    """
    for job, (_, what) in JOBS.items():
        if job == "train":
            for mode in MODES:
                yield f"{PROGRAM} train --mode={mode}", "train.py, from any folder", MODES[mode].command
        else:
            yield f"{PROGRAM} {job}", what, command_of(job)


def context_of(name: str, command: click.Command) -> click.Context:
    context = click.Context(command, info_name=name, max_content_width=100, terminal_width=100)
    if isinstance(command, GroupedCommand):
        command.prepare_help(context)  # the defaults that this command uses
    return context


class Commands(SphinxDirective):
    """What --help prints of every job."""

    def run(self) -> list[nodes.Node]:
        lines: list[str] = []
        for name, what, command in commands():
            with context_of(name, command) as context:
                shown = command.get_help(context).splitlines()
            lines += [f"## {name}", "", f"{what[0].upper()}{what[1:]}.", "", "```text", *shown, "```", ""]
        return self.parse_text_to_nodes(StringList(lines, "commands"), allow_section_headings=True)


class RareSettings(SphinxDirective):
    """What `--set NAME=VALUE` takes in every job that has such settings."""

    def run(self) -> list[nodes.Node]:
        lines: list[str] = []
        for name, _, command in commands():
            rare = getattr(command, "rare", {})
            if rare:
                lines += [f"### {name}", "", "| setting | value | meaning |", "| --- | --- | --- |"]
            with context_of(name, command) as context:
                for setting, words in command.rare_records(context) if rare else ():
                    name, _, value = setting.partition("=")
                    cells = (f"`{name}`", f"`{value}`", " ".join(words.split()))
                    lines.append(
                        "| " + " | ".join(re.sub(r"([|<*])", r"\\\1", cell) for cell in cells) + " |"
                    )
            lines.append("")
        return self.parse_text_to_nodes(StringList(lines, "settings"), allow_section_headings=True)


class Presets(SphinxDirective):
    """Rows of the GAN mode's presets: what each sets that the settings' own defaults do not."""

    def run(self) -> list[nodes.Node]:
        lines = ["| family | task | sets |", "| --- | --- | --- |"]
        defaults = {
            knob.name or field.name: field.default for kind in gan.GROUPS for field, _, knob in knobs_of(kind)
        }
        for (family, task), row in presets.PRESETS.items():
            changed = {name: value for name, value in row.items() if value not in (None, defaults.get(name))}
            required = [f"`{name}` required" for name in ("gamma", "batch") if row[name] is None]
            settings = ", ".join(
                [
                    *required,
                    *(
                        f"`{name}` {value:g}" if type(value) is float else f"`{name}` {value}"
                        for name, value in changed.items()
                    ),
                ]
            )
            lines.append(f"| {family} | {task} | {settings} |")
        return self.parse_text_to_nodes(StringList(lines, "presets"))


class PublicNames(SphinxDirective):
    """Docstrings of what the package offers by its own name."""

    def run(self) -> list[nodes.Node]:
        lines: list[str] = []
        for name in eg3d_rlhf.__all__:
            shown = (
                (f".. autoclass:: eg3d_rlhf.{name}", "   :members:")
                if inspect.isclass(getattr(eg3d_rlhf, name))
                else (f".. autofunction:: eg3d_rlhf.{name}",)
            )
            lines += [f"## {name}", "", "```{eval-rst}", *shown, "```", ""]
        return self.parse_text_to_nodes(StringList(lines, "names"), allow_section_headings=True)


def as_prose_and_listing(app, what: str, name: str, thing: object, options: object, lines: list[str]) -> None:
    """Docstrings are plain text: paragraphs are prose, examples and what is indented stand as they were
    written.
    """
    shown: list[str] = []
    for block in re.split(r"\n\s*\n(?=\S)", "\n".join(lines).strip("\n")):
        if block.startswith(">>>") or "\n " in block:
            shown += ["::", "", *(f"    {line}" for line in block.splitlines()), ""]
        else:
            shown += [re.sub(r"`+([^`]+)`+", r"``\1``", re.sub(r"([\\*|_])", r"\\\1", block)), ""]
    lines[:] = "\n".join(shown).splitlines()


def setup(app) -> None:
    for name, directive in {
        "commands": Commands,
        "rare-settings": RareSettings,
        "presets": Presets,
        "public-names": PublicNames,
    }.items():
        app.add_directive(name, directive)
    app.connect("autodoc-process-docstring", as_prose_and_listing)
