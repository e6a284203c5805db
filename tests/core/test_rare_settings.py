"""Rare settings: no flags of their own, but by --set NAME=VALUE or from a file."""

import dataclasses
import json
import re

import click
import pytest
from click.testing import CliRunner

from eg3d_rlhf.core.cli import GroupedCommand, option, options_from_settings
from tests.rejections import rejected
from training.config import knob


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ball:
    radius: float = knob(1.0, "Of the ball.", "Ball", above=0)
    seams: int = knob(2, "On it.", "Ball", low=0, high=9, rare=True)
    soft: bool = knob(False, "Whether it is.", "Ball", rare=True)


@click.command(cls=GroupedCommand)
@option("--also", group="Ball", rare=True, multiple=True, help="Further balls.")
@options_from_settings(Ball)
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


def test_missing_values_are_none():
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
        (["--set=seam=3"], ["seam", "seams", "--help-all"]),
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


def test_help_all_lists_them_and_help_names_help_all():
    text = CliRunner().invoke(throw, ["--help"]).stdout
    assert "--set NAME=VALUE" in text and "--help-all" in text and "seams" not in text
    lines = CliRunner().invoke(throw, ["--help-all"]).stdout.splitlines()
    (seams,) = (line for line in lines if line.strip().startswith("seams=INT"))
    assert "On it." in seams and "default: 2" in seams and "0<=x<=9" in seams
    assert "--seams" not in "".join(lines)
    assert any(line.strip().startswith("soft=BOOL") for line in lines)


def test_help_shows_what_the_command_resolves_to(monkeypatch):
    """Flags beside --help count, rare settings among them; a command that is rejected has no values."""

    def resolved(context: click.Context):
        if context.params["radius"] == 7:
            raise ValueError("--radius: expected another number, got 7. Change it.")
        return [{"radius": context.params["radius"] or 3.5}, Ball(seams=(context.params["seams"] or 4) + 1)]

    def shown(*flags: str) -> str:
        done = CliRunner().invoke(throw, [*flags, "--help-all"], terminal_width=200)
        assert done.exit_code == 0, done.output
        return done.stdout

    monkeypatch.setattr(throw, "resolved", resolved)
    assert re.search(r"--radius.*default: 3\.5;", shown()) and re.search(r"seams=.*default: 5;", shown())
    assert re.search(r"--radius.*default: 2;", shown("--radius=2"))
    assert re.search(r"seams=.*default: 7;", shown("--set=seams=6"))
    text = shown("--radius=7")
    assert "--radius: expected" in text and "default" not in re.search(r"--radius FLOAT.*", text)[0]


def test_an_error_names_the_rare_setting_that_a_flag_resembles():
    rejected(CliRunner().invoke(throw, ["--seam=3"]), "--seam", "--set seams=VALUE")
