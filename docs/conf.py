"""How `make docs` builds the site: Markdown by MyST, notebooks run, commands, settings and public names read from the code; no network."""

import inspect
import re
import sys
from pathlib import Path

import click
from docutils import nodes
from docutils.statemachine import StringList
from sphinx.util.docutils import SphinxDirective

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

from eg3d_rlhf.modes.door import JOBS, PROGRAM, command_of  # noqa: E402 (of this checkout, installed or not)

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
autodoc_typehints = "none"  # signatures hold them
autodoc_member_order = "bysource"
python_maximum_signature_line_length = 100
html_theme = "furo"
html_title = "eg3d-rlhf"
html_copy_source = False
html_show_sphinx = False
pygments_style = "default"


class Commands(SphinxDirective):
    """Every job of `eg3d-rlhf` with what its --help prints, in the order of the help screen."""

    def run(self) -> list[nodes.Node]:
        lines: list[str] = []
        for job, (_, what) in JOBS.items():
            command, name = command_of(job), f"{PROGRAM} {job}"
            with click.Context(command, info_name=name, max_content_width=100, terminal_width=100) as context:
                shown = command.get_help(context).splitlines()
            lines += [f"## {name}", "", f"{what[0].upper()}{what[1:]}.", "", "```text", *shown, "```", ""]
        return self.parse_text_to_nodes(StringList(lines, "commands"), allow_section_headings=True)


def as_prose_and_listing(app, what: str, name: str, thing: object, options: object, lines: list[str]) -> None:
    """Docstrings are plain text: the first paragraph is prose, what follows stands as it was written."""
    first, _, rest = "\n".join(lines).strip("\n").partition("\n\n")
    prose = re.sub(r"`+([^`]+)`+", r"``\1``", first.replace("\\", "\\\\").replace("*", "\\*").replace("|", "\\|"))
    lines[:] = [*prose.splitlines(), ""]
    if rest:
        lines += ["::", "", *("    " + line for line in inspect.cleandoc(rest).splitlines()), ""]


def setup(app) -> None:
    app.add_directive("commands", Commands)
    app.connect("autodoc-process-docstring", as_prose_and_listing)
