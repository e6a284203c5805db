"""Flags and steps of commands in which a judge answers the pairs of a campaign in place of people.

`label`, `flow label`, `study` and `flow study` share them. The page is not served then.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from eg3d_rlhf.core.cli import check_extra, combine_decorators
from eg3d_rlhf.modes.judge_flags import judge_options, judge_settings
from eg3d_rlhf.people.judge.settings import QUESTIONS, JudgeSettings
from eg3d_rlhf.people.label import launch
from eg3d_rlhf.people.label.db_flag import sqlite_file

if TYPE_CHECKING:
    from eg3d_rlhf.people.judge.calibration import Calibration
    from eg3d_rlhf.people.label.store import Store

EXTRA = "judge"  # optional dependencies of the client
ANSWERS = "judge-answers.jsonl"  # name of the file of answers beside the database
# Names of the parameters of `judge_labelling_options`
PARAMETERS = (
    "judge",
    "judge_model",
    "judge_family",
    "judge_limit",
    "calibration",
    "judge_budget",
    "judge_repeats",
    "judge_parallel",
    "judge_timeout",
    "logprobs",
    "answers",
    "replay",
)
SERVER_PARAMETERS = ("host", "port", "certificate", "key", "proxy", "access_log", "title")


def judge_labelling_options() -> Any:
    """Return the decorator that adds the flags of a judge that answers pairs."""
    return combine_decorators(
        judge_options(
            "judge judge-model judge-family judge-limit calibration",
            "judge-budget judge-repeats judge-parallel judge-timeout logprobs answers replay",
            judge={
                "show_default": "none; people answer in the browser",
                "help": (
                    "Address of a chat-completions server with a vision-language model, such as"
                    " http://127.0.0.1:8000/v1, which answers all open pairs in both orders under its own"
                    " name. Its answers never count as those of people. A key is read from the"
                    " environment variable EG3D_RLHF_JUDGE_KEY."
                ),
            },
            judge_limit={"show_default": "no limit"},
            answers={"show_default": f"{ANSWERS} beside the database"},
        ),
    )


@dataclass(frozen=True, kw_only=True)
class JudgeRequest:
    """Judge that answers the pairs of a campaign, as the flags of a command describe it."""

    settings: JudgeSettings
    calibration: Path | None

    def to_json(self) -> dict[str, Any]:
        """Return the settings as --dry-run prints them."""
        return {
            "judge": self.settings.url or None,
            "judge_model": self.settings.model,
            "judge_family": self.settings.family,
            "judge_limit": self.settings.limit,
            "answers": None if self.settings.answers is None else str(self.settings.answers),
            "replay": self.settings.replay,
            "calibration": None if self.calibration is None else str(self.calibration),
        }


def judge_request(ctx: click.Context, values: Mapping[str, Any], db: str) -> JudgeRequest | None:
    """Return the judge of a command, or None if people answer.

    Args:
        ctx: context of the command.
        values: values of the command's parameters.
        db: URL of the database, beside which the answers are stored by default.

    Raises: ValueError for flags that contradict each other, or if the family is missing.
    """
    values = dict(values)
    if values.get("judge") is None and not values.get("replay") and values.get("calibration") is not None:
        raise ValueError(
            "--calibration needs a judge here. Pass --judge=URL as well, or remove --calibration."
        )
    if values.get("answers") is None and (values.get("judge") is not None or values.get("replay")):
        path = sqlite_file(db)
        values["answers"] = (path.parent if path else Path("runs/labels")) / ANSWERS
    # The questions are those of the campaign, which may not exist yet.
    settings = judge_settings(values, (QUESTIONS["overall"],))
    if settings is None:
        return None
    if not settings.family:
        raise ValueError(
            "--judge-family is missing. Pass the family of the model, such as qwen, so that a study can"
            " distinguish the judge of its labels and its own."
        )
    page_flags = launch.named_flags(ctx, launch.given_flags(ctx) & set(SERVER_PARAMETERS))
    if page_flags:
        raise ValueError(
            f"{', '.join(page_flags)} cannot be combined with --judge, because no page is served. Remove the"
            " flag."
        )
    check_extra(EXTRA)
    return JudgeRequest(settings=settings, calibration=values.get("calibration"))


def read_calibration(request: JudgeRequest) -> "Calibration | None":
    """Read the calibration of a judge; None if no file was passed.

    Raises: ValueError for a file of another kind, or of another model.
    """
    # imported here, because --help must not load this module
    from eg3d_rlhf.people.judge.calibration import Calibration

    if request.calibration is None:
        return None
    calibration = Calibration.read(request.calibration)
    if calibration.model != request.settings.model:
        raise ValueError(
            f"--calibration: {request.calibration} belongs to the model {calibration.model}, but"
            f" --judge-model is {request.settings.model}. Pass the calibration of this model."
        )
    return calibration


def answer_with_judge(
    store: "Store",
    campaign: str,
    request: JudgeRequest,
    origin: Mapping[str, Any] | None = None,
) -> None:
    """Let a judge answer the open pairs of a campaign, and print what it did and what it cost.

    Args:
        store: the opened database.
        campaign: name of the campaign.
        request: the judge.
        origin: further fields of the origin of each answer.
    """
    # imported here, because --help must not load these modules
    from eg3d_rlhf.people.judge.labelling import label_with_judge
    from eg3d_rlhf.people.judge.renders import RenderCache

    result = label_with_judge(
        store,
        campaign,
        request.settings,
        cache=RenderCache(),
        calibration=read_calibration(request),
        origin=origin,
        echo=click.echo,
    )
    for line in result.lines():
        click.echo(line)
