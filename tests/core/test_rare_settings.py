"""Rare settings: no flags of their own, but by --set NAME=VALUE or from a file."""

import dataclasses
import json
import re

import click
import pytest
from click.testing import CliRunner

from eg3d_rlhf.core.cli import GroupedCommand, option, options_of
from tests.rejections import rejected
from training.config import knob


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ball:
    radius: float = knob(1.0, "Of the ball.", "Ball", above=0)
    seams: int = knob(2, "On it.", "Ball", low=0, high=9, rare=True)
    soft: bool = knob(False, "Whether it is.", "Ball", rare=True)


@click.command(cls=GroupedCommand)
@option("--also", group="Ball", rare=True, multiple=True, help="Further balls.")
@options_of(Ball)
@click.pass_context
def throw(context: click.Context, **values):
    """Throw a ball."""
    written = sorted(
        name
        for name in values
        if context.get_parameter_source(name) == click.core.ParameterSource.COMMANDLINE
    )
    if values["seams"] == 5:
        raise ValueError("--seams=5: expected an even number. Change --seams, or leave --radius out.")
    click.echo(json.dumps({**values, "written": written}))


def run(*flags: str) -> dict:
    result = CliRunner().invoke(throw, flags)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_what_is_not_given_is_none():
    assert run() == {"radius": None, "seams": None, "soft": None, "also": [], "written": []}


def test_they_arrive_as_flags_do():
    values = run("--radius=3", "--set", "seams=4", "--set=soft=true", "--set=also=a", "--set=also=b")
    assert values == {
        "radius": 3.0,
        "seams": 4,
        "soft": True,
        "also": ["a", "b"],
        "written": ["also", "radius", "seams", "soft"],
    }


def test_a_file_holds_rare_ones_and_flags_and_both_go_before_it(tmp_path):
    (path := tmp_path / "ball.json").write_text(
        json.dumps({"radius": 5, "seams": 3, "soft": None, "also": ["x"]})
    )
    assert run(f"--settings={path}") == {
        "radius": 5.0,
        "seams": 3,
        "soft": None,
        "also": ["x"],
        "written": ["also", "radius", "seams"],
    }
    values = run(f"--settings={path}", "--radius=2", "--set=seams=1")
    assert (values["radius"], values["seams"]) == (2.0, 1)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--seams=3"], ["--seams", "--set seams=VALUE"]),
        (["--set=seam=3"], ["seam", "seams", "--dry-run"]),
        (["--set=seams"], ["--set", "NAME=VALUE"]),
        (["--set=seams=many"], ["seams", "many"]),
        (["--set=seams=10"], ["seams", "10"]),
        (["--settings={tmp}/list.json"], ["--settings", "list.json"]),
        (["--settings={tmp}/torn.json"], ["--settings", "torn.json"]),
        (["--settings={tmp}/none.json"], ["none.json"]),
        (["--settings={tmp}/half.json"], ["seams", "2.5"]),
    ],
)
def test_a_mistake_is_one_line(flags, words, tmp_path):
    for name, text in {"list": "[]", "torn": "{", "half": '{"seams": 2.5}'}.items():
        (tmp_path / f"{name}.json").write_text(text)
    rejected(CliRunner().invoke(throw, [flag.format(tmp=tmp_path) for flag in flags]), *words)


def test_an_error_names_them_as_they_are_typed():
    rejected(CliRunner().invoke(throw, ["--set=seams=5"]), "--set seams=5", "--set seams=VALUE", "--radius")


def test_help_names_them():
    text = CliRunner().invoke(throw, ["--help"]).stdout
    assert "--set NAME=VALUE" in text and "--seams" not in text
    assert re.search(r"\bseams,\s+soft\b", text)
