"""Settings of a judge: the server, the questions, the limits, and the files of answers.

The identity of a question is a hash of everything on which an answer depends: the model, the text, the views
and the settings of the requests. A calibration is valid for the same identity only.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

KEY_VARIABLE = "EG3D_RLHF_JUDGE_KEY"  # environment variable with the key of the server; there is no flag
LEAST_KAPPA = 0.2  # default of --least-kappa: smallest lower bound of kappa with which labels are used
LEAST_PAIRS = 50  # smallest number of calibrated pairs with which labels are used
OVERALL = "overall"  # criterion of labels that name none
GEOMETRY = "geometry_details"  # criterion of labels about shapes without colours
# Version of the requests; part of every identity. It is increased when texts or renders change.
PROTOCOL = 1
# Modes of views, in the order in which a judge is shown them.
VIEW_MODES = ("textured", "shaded", "normals")
_NAME = re.compile(r"[a-z0-9][a-z0-9_]{0,63}")


@dataclass(frozen=True, kw_only=True)
class Question:
    """One criterion, its question, and the kinds of views that a judge is shown for it."""

    name: str  # criterion: small letters, digits and underscores
    text: str  # question about a first and a second asset
    modes: tuple[str, ...] = ("textured",)  # view modes, some of VIEW_MODES

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ValueError(
                f"the criterion {self.name!r} must consist of 1 to 64 small letters, digits and underscores."
                " Rename it."
            )
        if not self.text.strip():
            raise ValueError(f"the question of the criterion {self.name} is empty. Write a question.")
        wrong_modes = sorted(set(self.modes) - set(VIEW_MODES))
        if wrong_modes or not self.modes:
            raise ValueError(
                f"the criterion {self.name} has the views {', '.join(wrong_modes) or 'none'}, but must have"
                f" some of {', '.join(VIEW_MODES)}. Correct them."
            )


# The six criteria of GPTEval3D (arXiv 2401.04092). Geometry is asked on views without texture, since judges
# otherwise take painted detail for shape (3D-DefectBench, arXiv 2607.10826).
QUESTIONS: dict[str, Question] = {
    question.name: question
    for question in (
        Question(
            name="text_asset_alignment",
            text="Which asset agrees better with the description: its objects, attributes and relations?",
        ),
        Question(
            name="3d_plausibility",
            text=(
                "Which asset is the more plausible and complete solid object from all sides, without missing"
                " or doubled parts, floating pieces, or a second face on its back?"
            ),
            modes=("textured", "shaded"),
        ),
        Question(
            name="texture_details",
            text="Which asset has the better texture: sharper, more detailed and more natural colours?",
        ),
        Question(
            name="geometry_details",
            text=(
                "Which asset has the better geometry: more detail where detail belongs, smooth surfaces"
                " elsewhere, and no holes, lumps or missing parts?"
            ),
            modes=("shaded", "normals"),
        ),
        Question(
            name="texture_geometry_coherency",
            text="Of which asset does the texture fit the geometry better, so that no part is only painted?",
            modes=("textured", "shaded"),
        ),
        Question(
            name=OVERALL,
            text="Which asset is better overall, when shape, texture and the description are all considered?",
        ),
    )
}


@dataclass(frozen=True, kw_only=True)
class JudgeSettings:
    """Server, questions, limits and files of a judge.

    Raises: ValueError for a value that is not allowed.
    """

    url: str = ""  # address of the server, such as http://127.0.0.1:8000/v1; a replay needs none
    model: str = ""  # name of the model, as the server knows it
    family: str = ""  # family of the model, such as qwen; studies compare it with the family that labelled
    questions: tuple[Question, ...] = (QUESTIONS[OVERALL],)  # asked one by one
    limit: int | None = None  # greatest number of calls, repeated attempts included; None: no limit
    budget: int | None = None  # greatest number of tokens that the server may count; None: no limit
    repeats: int = 1  # how often a question is asked in each order; 3 gives a majority
    logprobs: bool = False  # True: ask for log-probabilities, from which P(first) is computed
    answers: Path | None = None  # file of answers, which is read and extended; None: in memory alone
    replay: bool = False  # True: use the file of answers without a server
    parallel: int = 8  # calls at a time
    timeout: float = 120.0  # seconds until an attempt counts as failed
    backoff: float = 0.5  # seconds before the second attempt; the time doubles with each further attempt
    temperature: float = 0.0  # sampling temperature of the model
    max_tokens: int = 300  # greatest length of an answer, in tokens

    def __post_init__(self) -> None:
        if not self.replay and not self.url:
            raise ValueError(
                "--judge is missing. Pass the address of a chat-completions server, or --replay."
            )
        if self.replay and self.answers is None:
            raise ValueError("--replay needs a file of answers. Pass --answers=FILE.")
        if self.url and not self.url.startswith(("http://", "https://")):
            raise ValueError(
                f"--judge: the address {self.url!r} must start with http:// or https://. Pass, for example,"
                " http://127.0.0.1:8000/v1."
            )
        if not self.model:
            raise ValueError("--judge-model is missing. Pass the name of the model as the server knows it.")
        for flag, number in (("--judge-limit", self.limit), ("--judge-budget", self.budget)):
            if number is not None and number < 1:
                raise ValueError(f"{flag} must be at least 1, got {number}. Pass a larger number.")
        for name in ("repeats", "parallel", "max_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}. Raise it.")
        if not self.questions:
            raise ValueError("a judge needs at least one question. Pass a criterion.")
        # Verdicts are found by the name of their question.
        names = [question.name for question in self.questions]
        if len(set(names)) < len(names):
            raise ValueError(f"the criteria {', '.join(names)} name one twice. Remove one of the two.")

    @property
    def endpoint(self) -> str:
        """Return the address to which requests are posted; .../v1 and the whole address are accepted."""
        # Documentation of servers names either form.
        address = self.url.rstrip("/")
        return address if address.endswith("/chat/completions") else f"{address}/chat/completions"

    @property
    def request_settings(self) -> dict:
        """Return what an answer depends on besides images, question and model, in JSON types."""
        return {
            "protocol": PROTOCOL,
            "repeats": self.repeats,
            "logprobs": self.logprobs,
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
        }

    def identity(self, question: Question, views: Mapping) -> str:
        """Return the hash of model, question, views and settings, to which a calibration is bound.

        Args:
            question: question of the criterion.
            views: description of the rig (`renders.Rig.to_json`), in JSON types.
        """
        # imported here, because the module imports torch, and flags are checked before that
        from eg3d_rlhf.experiments.store import json_hash

        return json_hash(
            {
                "model": self.model,
                "question": question.text,
                "modes": list(question.modes),
                "views": dict(views),
                "settings": self.request_settings,
            }
        )


def main_criterion(has_files: bool, has_questions: bool) -> str:
    """Return the criterion of the main question of the label page.

    Without further questions the page asks which shape is better, and beside further questions which is
    better overall. Isosurfaces of a generator have no colours, so their question is about the shape in any
    case.

    Args:
        has_files: True if the campaign compares asset files.
        has_questions: True if the campaign has further questions.
    """
    return OVERALL if has_files and has_questions else GEOMETRY


def server_key() -> str:
    """Return the key of the server from the environment, or "". Keys are never flags or files."""
    return os.environ.get(KEY_VARIABLE, "")


def parse_questions(criteria: str, texts: tuple[str, ...] = ()) -> tuple[Question, ...]:
    """Return the questions of a list of criteria, and of texts NAME=TEXT as `label --questions` has them.

    Args:
        criteria: names of the six criteria, separated by commas; "" for none.
        texts: further questions NAME=TEXT. A text for one of the six replaces its question.

    Raises: ValueError for an unknown name, or for a text without a name.
    """
    questions: dict[str, Question] = {}
    for name in filter(None, (part.strip() for part in criteria.split(","))):
        if name not in QUESTIONS:
            raise ValueError(
                f"--judge-criteria: {name!r} is not one of {', '.join(QUESTIONS)}. Choose one of them, or"
                " write a question as NAME=TEXT."
            )
        questions[name] = QUESTIONS[name]
    for text in texts:
        # A question may contain the sign =, so only the first one separates.
        name, separator, question_text = text.partition("=")
        if not separator:
            raise ValueError(f"the question {text!r} has no name. Write NAME=TEXT.")
        questions[name.strip()] = as_question(name.strip(), question_text)
    return tuple(questions.values())


def as_question(name: str, value: object) -> Question:
    """Return the question of a criterion from the value of a line of --criteria=MAP.json.

    Args:
        name: criterion of the labels.
        value: name of one of the six criteria, the text of a question, or {"question": text, "views":
            [mode, ...]}.

    Raises: ValueError for another value.
    """
    if isinstance(value, str):
        # A text of its own for one of the six keeps the views of that criterion.
        known = QUESTIONS.get(value.strip(), QUESTIONS.get(name))
        # a free question about geometry must not be answered from painted detail
        modes = known.modes if known else ("shaded", "normals") if "geom" in name else ("textured",)
        text = QUESTIONS[value.strip()].text if value.strip() in QUESTIONS else value.strip()
        return Question(name=name, text=text, modes=modes)
    if isinstance(value, dict) and isinstance(value.get("question"), str):
        # Without views, the asset is shown as a viewer would show it.
        views = value.get("views", ["textured"])
        if isinstance(views, list) and all(isinstance(mode, str) for mode in views):
            return Question(name=name, text=value["question"], modes=tuple(views))
    raise ValueError(
        f"the question of the criterion {name} must be a text, the name of one of {', '.join(QUESTIONS)}, or"
        ' {"question": TEXT, "views": [...]}. Correct it.'
    )
