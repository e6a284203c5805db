"""Flags that select labels by their origin: people, or judges (vision-language models).

A command that learns from labels of judges also needs a calibration that has passed, or --uncalibrated.
"""

from pathlib import Path
from typing import Any

import click

from eg3d_rlhf.core.cli import combine_decorators, option
from eg3d_rlhf.preferences.provenance import LABELS_FROM, PEOPLE, LabelChoice
from training.input_paths import existing_file

# Names of the parameters of `learning_options`, in the order of the arguments of `choice_from_flags`
ORIGIN_FLAGS = ("labels_from", "calibrations", "uncalibrated")


def check_calibration(path: str) -> None:
    """Raise FileNotFoundError if there is no calibration file at a path."""
    existing_file(Path(path), "calibration that `judge calibrate` wrote")


def labels_from_option(group: str = "General", rare: bool = False) -> Any:
    """Return the decorator that adds --labels-from to a command that trains nothing.

    Args:
        group: title under which --help lists the flag.
        rare: True for a flag that only --help-all shows.
    """
    return option(
        "--labels-from",
        type=click.Choice(LABELS_FROM),
        default=PEOPLE,
        group=group,
        rare=rare,
        help="Whose labels are used. Judges are vision-language models; the numbers of both are printed.",
    )


def learning_options(group: str = "General", rare: bool = False) -> Any:
    """Return the decorator that adds --labels-from, --calibration and --uncalibrated.

    Args:
        group: title under which --help lists the flags.
        rare: True for flags that only --help-all shows.
    """
    return combine_decorators(
        labels_from_option(group, rare),
        option(
            "--calibration",
            "calibrations",
            metavar="FILE",
            multiple=True,
            check=check_calibration,
            group=group,
            rare=rare,
            show_default="none",
            help="calibration.json of a judge, which its labels need (`judge calibrate`). May be repeated.",
        ),
        option(
            "--uncalibrated",
            is_flag=True,
            group=group,
            rare=rare,
            help="Use labels of judges without a calibration that passed; all reports repeat this.",
        ),
    )


def choice_from_flags(labels_from: str, calibrations: tuple[str, ...], uncalibrated: bool) -> LabelChoice:
    """Return the selection of labels that the flags of `learning_options` state.

    Args:
        labels_from: value of --labels-from.
        calibrations: values of --calibration.
        uncalibrated: True if --uncalibrated was given.

    Raises: ValueError for flags that contradict each other, and for a file that is no calibration.
    """
    if labels_from == PEOPLE:
        for flag, value in (("--calibration", calibrations), ("--uncalibrated", uncalibrated)):
            if value:
                raise ValueError(
                    f"{flag} applies to labels of judges, but --labels-from=people leaves them out. Remove"
                    f" {flag}, or pass --labels-from=judges or all."
                )
        return LabelChoice()
    if uncalibrated and calibrations:
        raise ValueError(
            "--calibration cannot be combined with --uncalibrated. Remove --uncalibrated to apply the"
            " calibration."
        )
    # imported here, because the commands must print --help quickly
    from eg3d_rlhf.people.judge.gate import training_gate

    return LabelChoice(
        labels_from=labels_from,
        uncalibrated=uncalibrated,
        calibrations=calibrations,
        gate=training_gate(calibrations, uncalibrated),
    )
