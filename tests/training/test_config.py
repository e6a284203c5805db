"""Settings fields that are flags: names, texts, ranges and defaults stand in one place."""

import dataclasses
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from eg3d_rlhf.core.cli import GroupedCommand, options_from_settings
from tests.rejections import raising
from training.config import check_knobs, knob, number_text


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inner:
    steps: int = knob(3, "Updates.", "Training", metavar="UPDATES", low=1)
    lr: float | None = knob(None, "Learning rate.", "Training", above=0, shown="twice")
    share: float = knob(0.5, "Held out.", "Data", above=0, below=1)

    def __post_init__(self):
        check_knobs(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outer:
    kind: str = knob("a", "Kind.", "Data", choices=("a", "b"))
    inner: Inner = Inner()
    file: Path | None = knob(None, "Input.", "Data", flags=("--input",))
    mirror: bool = knob(False, "Mirror.", "Data")
    hidden: int = 7  # no flag


@click.command(cls=GroupedCommand)
@options_from_settings(Outer)
def command(**flags):
    click.echo(repr(sorted(flags.items())))


def test_flags_follow_from_the_fields():
    result = CliRunner().invoke(command, ["--steps=4", "--input=x", "--mirror=True", "--lr=0.1", "--kind=b"])
    given = {"kind": "b", "steps": 4, "lr": 0.1, "share": None, "file": Path("x"), "mirror": True}
    assert result.stdout.strip() == repr(sorted(given.items()))
    text = CliRunner().invoke(command, ["--help"]).stdout
    assert (
        text.index("Data:") < text.index("Training:")
        and "Updates.  [default: 3; x>=1]" in text
        and "[default: twice; x>0]" in text
        and "Kind.  [default: a]" in text
    )
    assert "hidden" not in text and "UPDATES" in text


@pytest.mark.parametrize("flag", ["--steps=0", "--lr=0", "--share=1", "--kind=c"])
def test_ranges_and_choices_of_flags(flag):
    assert CliRunner().invoke(command, [flag]).exit_code == 2


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ({"steps": 0}, ("steps", ">= 1", "0")),
        ({"lr": 0.0}, ("lr", "> 0")),
        ({"share": 1}, ("share", "< 1")),
    ],
)
def test_ranges_of_objects(values, names):
    with raising(*names):
        Inner(**values)


@pytest.mark.parametrize(
    "number, text",
    [
        (1234567.891, "1234567.891"),
        (1234567, "1234567"),
        (25000.0, "25000"),
        (0.016, "0.016"),
        (1e15, "1" + "0" * 15),
    ],
)
def test_numbers_keep_their_digits(number, text):
    assert number_text(number) == text
