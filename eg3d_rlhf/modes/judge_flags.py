"""Flags of a judge, which several commands share, so that each has one name and one meaning.

`judge_options("judge judge-model ...")` adds them to a command, and `judge_settings` makes the settings from
their values. The key of the server has no flag: it is read from the environment variable EG3D_RLHF_JUDGE_KEY.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from eg3d_rlhf.core.cli import Decorator, combine_decorators, option
from eg3d_rlhf.modes.shared_flags import COUNT, FILE
from eg3d_rlhf.people.judge.settings import (
    LEAST_KAPPA,
    QUESTIONS,
    JudgeSettings,
    Question,
)
from training.input_paths import existing_file

GROUP = "Judge"  # title under which --help lists the flags


def check_calibration(path: Path) -> None:
    """Raise FileNotFoundError if there is no file of a calibration at a path."""
    existing_file(path, "calibration.json that `eg3d-rlhf judge calibrate` wrote")


def check_address(text: str) -> None:
    """Raise ValueError unless a text is an address of a server."""
    if not text.startswith(("http://", "https://")):
        raise ValueError(
            f"--judge: the address {text!r} must start with http:// or https://. Pass, for example,"
            " http://127.0.0.1:8000/v1."
        )


# Keys: names of the options. Values: arguments of `option`.
_FLAGS: dict[str, dict[str, Any]] = {
    "judge": {
        "metavar": "URL",
        "check": check_address,
        "help": (
            "Address of a chat-completions server with a vision-language model, such as"
            " http://127.0.0.1:8000/v1. A key is read from the environment variable EG3D_RLHF_JUDGE_KEY."
        ),
    },
    "judge-model": {"metavar": "NAME", "help": "Name of the model, as the server knows it."},
    "judge-family": {
        "metavar": "NAME",
        "help": "Family of the model, such as qwen, by which studies distinguish judges.",
    },
    "judge-criteria": {
        "metavar": "LIST",
        "help": f"Criteria that are asked, separated by commas: {', '.join(QUESTIONS)}.",
    },
    "judge-limit": {
        "metavar": "CALLS",
        "type": COUNT,
        "show_default": "no limit",
        "help": "Greatest number of calls, repeated attempts included; the run then ends early.",
    },
    "judge-budget": {
        "metavar": "TOKENS",
        "type": COUNT,
        "show_default": "no limit",
        "help": "Number of tokens, as the server counts them, after which no further call is sent.",
    },
    # A majority of three costs three times as much, so the default is one.
    "judge-repeats": {
        "metavar": "INT",
        "type": COUNT,
        "default": JudgeSettings.repeats,
        "help": "How often each question is asked in each order; their majority counts.",
    },
    # Servers batch their requests; more than they can batch only wait there.
    "judge-parallel": {
        "metavar": "INT",
        "type": COUNT,
        "default": JudgeSettings.parallel,
        "help": "Number of calls at a time.",
    },
    # The default lets a model on a CPU answer.
    "judge-timeout": {
        "metavar": "SECONDS",
        "type": click.FloatRange(min=0, min_open=True),
        "default": JudgeSettings.timeout,
        "help": "Time after which an attempt of a call counts as failed.",
    },
    # Only some servers return log-probabilities, so they are not asked for by default.
    "logprobs": {
        "is_flag": True,
        "help": "Compute P(first) from log-probabilities, where the server gives them.",
    },
    "answers": {
        "metavar": "FILE",
        "type": FILE,
        "help": "File of answers, which is read and extended, so that an interrupted run resumes.",
    },
    "replay": {
        "is_flag": True,
        "default": False,
        "help": "Use the answers in the file of --answers, without a server.",
    },
    "calibration": {
        "metavar": "FILE",
        "type": FILE,
        "check": check_calibration,
        "help": "calibration.json of this judge, which `eg3d-rlhf judge calibrate` wrote.",
    },
    "uncalibrated": {
        "is_flag": True,
        "help": "Use labels of a judge without a calibration that passes; every later report says so.",
    },
    # 0.2 is the lower end of "fair" agreement in the scale of Landis and Koch (1977).
    "least-kappa": {
        "metavar": "FLOAT",
        "type": click.FloatRange(-1, 1),
        "default": LEAST_KAPPA,
        "help": "Value that the lower end of kappa's 95 % interval with people must exceed.",
    },
}


def judge_options(names: str, rare: str = "", **changes: str | dict[str, Any]) -> Decorator:
    """Return a decorator that adds flags of a judge to a command, in the order of their names.

    Args:
        names: names of options (keys of _FLAGS), separated by spaces.
        rare: names of further options, which only --help-all shows and --set NAME=VALUE sets.
        changes: changes for this command, by the name of the option with underscores. A text replaces the
            help text; a dictionary replaces any arguments of `option`.
    """
    # `option` keeps the order of the names in --help.
    decorators = []
    for name in (*names.split(), *rare.split()):
        # click names parameters with underscores, flags have dashes.
        change = changes.get(name.replace("-", "_"), {})
        arguments = {
            "group": GROUP,
            "default": None,
            **_FLAGS[name],
            **({"help": change} if isinstance(change, str) else change),
        }
        decorators.append(option(f"--{name}", name.replace("-", "_"), rare=name in rare.split(), **arguments))
    return combine_decorators(*decorators)


def judge_settings(values: Mapping[str, Any], questions: tuple[Question, ...]) -> JudgeSettings | None:
    """Make the settings of a judge from its flags; None if neither --judge nor --replay is given.

    Args:
        values: values of the command's parameters by name; parameters that the command lacks may be missing.
        questions: questions that are asked.

    Raises: ValueError for flags that contradict each other; FileNotFoundError without a file to replay.
    """
    if values.get("judge") is None and not values.get("replay"):
        # A flag that would do nothing is an error that names it.
        for name in ("judge_model", "judge_family", "judge_limit", "judge_budget", "answers"):
            if values.get(name) is not None:
                flag = "--" + name.replace("_", "-")
                raise ValueError(f"{flag} needs a judge. Pass --judge=URL as well, or remove {flag}.")
        return None
    # Field of the settings -> value of the flag.
    fields = {
        "url": values.get("judge"),
        "model": values.get("judge_model"),
        "family": values.get("judge_family"),
        "limit": values.get("judge_limit"),
        "budget": values.get("judge_budget"),
        "repeats": values.get("judge_repeats"),
        "parallel": values.get("judge_parallel"),
        "timeout": values.get("judge_timeout"),
        "logprobs": values.get("logprobs"),
        "answers": values.get("answers"),
        "replay": values.get("replay"),
    }
    # A missing replay is rejected here, before anything is rendered.
    if values.get("replay") and values.get("answers") is not None:
        existing_file(values["answers"], "file of a judge's answers with --answers, to use with --replay")
    # None: not given, so the default of the setting applies
    return JudgeSettings(
        questions=questions, **{name: value for name, value in fields.items() if value is not None}
    )
