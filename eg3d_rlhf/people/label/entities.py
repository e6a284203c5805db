"""Data classes that the parts of the labelling application exchange, and checks of their values.

A labelling campaign is one set of pairs of shapes with its settings. It does not change after it is created.
A pair names two shapes in a fixed order, first and second. In a campaign that shows shapes one by one, both
are the same shape. An assignment shows a pair to an annotator and decides which shape is on the left. A
judgement is the answer to an assignment and is never changed: an undo is a further record. Annotators see
shapes, pairs and assignments under random tokens only, which contain no information about the generators.

A gold pair has an answer that is known in advance, and checks the attention of an annotator. A practice pair
(`Kind.TRAINING`) is an example whose correct answer is explained afterwards.
"""

import enum
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from eg3d_rlhf.preferences import GOOD
from eg3d_rlhf.preferences.provenance import MODEL_PREFIX
from training.config import check_knobs, knob


class Mode(enum.StrEnum):
    """Purpose for which the answers of a labelling campaign are collected."""

    LABEL = "label"  # collecting preferences
    STUDY = "study"  # comparing two generators in a blind study
    SINGLE = "single"  # rating shapes one by one


class Kind(enum.StrEnum):
    """Reason for which a pair is shown to an annotator."""

    PAIR = "pair"  # a pair of the plan, which is shown to collect a preference
    REPEAT = "repeat"  # a pair that the same annotator has answered, on the same sides as before
    SWAP = "swap"  # a pair that the same annotator has answered, on swapped sides
    GOLD = "gold"  # an attention check: a pair whose correct answer is known in advance
    TRAINING = "training"  # a practice pair: its correct answer is explained, and the answer is never counted


class Choice(enum.StrEnum):
    """Answers that an annotator can give."""

    LEFT = "left"
    RIGHT = "right"
    TIE = "tie"
    BAD = "bad"  # both shapes are equally bad; only in campaigns with `both_bad`
    UP = "up"  # a single shape is good
    DOWN = "down"  # a single shape is bad
    SCORE_0, SCORE_1, SCORE_2, SCORE_3, SCORE_4, SCORE_5 = "012345"  # ratings of a single shape; 5 is best
    SKIP = "skip"  # no answer, with a reason; not counted as a preference

    @property
    def equal(self) -> bool:
        """Return True if the answer ranks both shapes equally."""
        return self in (Choice.TIE, Choice.BAD)

    @property
    def good(self) -> bool | None:
        """Return True if the answer rates a single shape as good, and False if it rates the shape as bad.

        Return None for an answer about a pair and for a skip.
        """
        # Only the values of scores are digits. GOOD is the lowest score that counts as a good shape.
        if self.value in "012345":
            return int(self.value) >= GOOD
        return {"up": True, "down": False}.get(self.value)

    def meets(self, expected_answer: str | None) -> bool:
        """Return True if the answer agrees with the correct answer.

        Args:
            expected_answer: correct answer: 'left' or 'right'; for a single shape 'up' or 'down'; None if the
                correct answer is not known. No answer agrees with None.
        """
        # A score agrees with 'up' if it counts as good, and with 'down' if it does not.
        return self.value == expected_answer or (
            self.good is not None and self.good == {"up": True, "down": False}.get(expected_answer or "")
        )


# names of the view buttons of the page, one of which the settings choose as the initial view
VIEWS = ("front", "left", "right", "back", "above", "below")
# valid answers besides a skip, by the scale in the settings of the campaign
SCALES = {
    "pairs": (Choice.LEFT, Choice.RIGHT, Choice.TIE, Choice.BAD),
    "thumbs": (Choice.UP, Choice.DOWN),
    "scores": tuple(map(Choice, "012345")),
}
# Key of a campaign's `extra`: number of pairs after all batches are appended. Only campaigns that learn from
# their answers have it.
PAIR_TOTAL = "pair_total"

# Reasons for a skip, in the order in which the page lists them. "broken" means that a shape did not appear on
# the screen. A damaged shape is no reason to skip: annotators compare it like any other shape.
SKIP_REASONS = ("unsure", "identical", "broken", "other")


# Damage that is added deliberately to a shape of a generator -> its description for annotators.
DAMAGES = {
    "floaters": "lumps float loose in front of it",
    "holes": "pieces are bitten out of its front",
    "rough": "its surface is all bumps",
}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Isosurface of a generator, with all parameters that are needed to compute it again; or an asset file.

    For an asset file, `generator` is the label of the asset, `source` is the path of the file, psi and level
    are nan, and resolution and triangles are 0.
    """

    generator: str  # SHA-256 in hex of the generator's weights
    source: str  # path of the network file; '' is the bundled generator. It is never sent to a browser
    seed: int  # seed of the latent: z = RandomState(seed).randn(z_dim)
    psi: float  # truncation psi, usually 0 to 1; 1: no truncation
    level: float  # sigma_raw at the isosurface
    resolution: int  # grid points per axis of the cube
    triangles: int  # approximate number of triangles after decimation
    # Damage that was added deliberately: a key of DAMAGES or of assets.damage.DAMAGES; '' is no damage. Only
    # gold pairs and practice pairs contain damaged shapes.
    degradation: str = ""
    file: str = ""  # SHA-256 in hex of the asset file; "" for an isosurface
    condition: str = ""  # name of the prompt or input image; "" if there is none

    # eg3d_rlhf.people.label.shape_files.shape_key(shape) names the cached file of a shape.

    @classmethod
    def from_asset(cls, **other_fields) -> "Shape":
        """Make the shape of an asset file. The parameters of an isosurface get their empty values.

        Args:
            other_fields: values of all fields except psi, level, resolution and triangles.
        """
        return cls(psi=math.nan, level=math.nan, resolution=0, triangles=0, **other_fields)


@dataclass(frozen=True, kw_only=True)
class PlannedPair:
    """Pair of a campaign before it is stored."""

    first: Shape
    second: Shape
    # PAIR, GOLD or TRAINING. A plan contains no repeats or swaps: they depend on the answers of an annotator.
    kind: Kind = Kind.PAIR
    # Correct answer of a gold or practice pair: 'first' or 'second'; None for other pairs. For a single
    # shape, 'first' means 'up' and 'second' means 'down'.
    expected: str | None = None
    # Text of a practice pair that is shown after the answer. For an appended pair: how it was chosen, as JSON
    # (`active.PairPlanner`), which annotators do not see.
    explanation: str = ""


@dataclass(frozen=True, kw_only=True)
class CampaignSettings:
    """Settings of a labelling campaign, which do not change after it is created."""

    name: str
    mode: Mode = Mode.LABEL
    scale: str = "pairs"  # key of SCALES
    seed: int = 0  # random seed of pairs, order, sides, repeats and gold checks
    annotators_per_pair: int = knob(1, "Number of different annotators who answer each pair.", "Pairs", low=1)
    repeat_share: float = knob(
        0.05,
        "Share of an annotator's trials that repeat a pair on the same sides, which measures how consistently"
        " the annotator answers. 0: no such repeats.",
        "Pairs",
        metavar="0..0.5",
        low=0,
        high=0.5,
        rare=True,
    )
    swap_share: float = knob(
        0.05,
        "Share of an annotator's trials that repeat a pair with the sides swapped, which shows whether the"
        " annotator prefers a side. 0: no such repeats.",
        "Pairs",
        metavar="0..0.5",
        low=0,
        high=0.5,
        rare=True,
    )
    repeat_gap: int = knob(
        10,
        "Smallest number of trials between a pair and its repeat, so that the first answer does not"
        " influence the second one.",
        "Pairs",
        metavar="TRIALS",
        low=1,
        rare=True,
    )
    gold_every: int = knob(
        25,
        "Show one gold check per so many trials: a pair whose correct answer is known. 0: no gold checks.",
        "Pairs",
        metavar="TRIALS",
        low=0,
        rare=True,
    )
    trials_per_annotator: int | None = knob(
        None,
        "Largest number of trials of one annotator, repeats and gold checks included.",
        "Pairs",
        low=1,
        shown="all pairs",
        rare=True,
    )
    view: str = knob("front", "View from which a shape is first shown.", "Pairs", choices=VIEWS, rare=True)
    show_render: bool = False  # annotators may also look at the RGB render
    both_bad: bool = False  # annotators may answer that both shapes are bad; for pairs only
    questions: tuple[str, ...] = ()  # further questions, see `Question`; for pairs only
    reveal: bool = False  # the page shows the names of the generators after an answer; for pairs only
    extra: Mapping = field(default_factory=dict)  # further JSON values that are stored with the campaign

    def __post_init__(self):
        check_knobs(self)
        if self.scale not in SCALES or (self.mode is Mode.SINGLE) == (self.scale == "pairs"):
            raise ValueError(
                f"scale={self.scale!r} cannot be used in a campaign of mode {self.mode}. Use 'thumbs' or"
                " 'scores' if shapes are shown one by one, and 'pairs' otherwise."
            )
        if self.mode is Mode.SINGLE and self.swap_share:
            raise ValueError(
                f"--swap-share={self.swap_share} cannot be used in a campaign that shows shapes one by one,"
                " because a single shape has no sides. Remove the option."
            )
        pair_settings = [name for name in ("both_bad", "questions", "reveal") if getattr(self, name)]
        if self.mode is Mode.SINGLE and pair_settings:
            # the flag --criteria sets the field `questions`
            flag = {"questions": "--criteria"}.get(
                pair_settings[0], f"--{pair_settings[0].replace('_', '-')}"
            )
            raise ValueError(f"{flag} needs pairs, but this campaign shows shapes one by one. Remove {flag}.")
        if self.mode is Mode.STUDY and self.reveal:
            raise ValueError("--reveal cannot be used in a study, because a study is blind. Remove --reveal.")
        # Each pair is repeated at most once, so at most every second trial can be a repeat.
        if self.repeat_share + self.swap_share > 0.5:
            raise ValueError(
                f"--repeat-share={self.repeat_share} and --swap-share={self.swap_share} add up to more than"
                " 0.5. Reduce one of them, because each pair can be repeated only once."
            )


@dataclass(frozen=True, kw_only=True)
class AssignedPair:
    """Assignment as the server sends it to the page.

    Its tokens are random, so that they contain no information about the shapes.
    """

    token: str  # token of the assignment
    left: str  # asset token of the shape on the left
    right: str  # asset token of the shape on the right
    # True for a practice pair; the page shows the annotator no other property of the assignment
    training: bool


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Answer to an assignment as the page sends it."""

    # Text that the page chooses, unique per annotator. If an answer is sent twice with the same key, it is
    # recorded once.
    key: str
    assignment: str  # token of the assignment
    choice: Choice
    reason: str | None = None  # reason for a skip, one of SKIP_REASONS; None for other choices
    milliseconds: int = 0  # time from the moment at which both shapes are visible to the choice
    # names of views and tools that the annotator used, such as 'front' and 'orbit'
    views: tuple[str, ...] = ()
    answered_at: float | None = None  # time of the choice by the clock of the browser, seconds since 1970
    page_version: str = ""
    # votes on the further questions: name of the question -> 'left', 'right' or 'tie'
    votes: Mapping[str, str] = field(default_factory=dict)
    comment: str | None = None  # free text of the annotator


@dataclass(frozen=True, kw_only=True)
class JudgementRow:
    """Judgement with its campaign, assignment and shapes, for exports, quality reports and training."""

    id: int  # increases with the time of receipt
    campaign: str  # name of the campaign
    mode: str  # value of `Mode`
    annotator: str  # name of the annotator
    assignment: str  # token of the assignment
    sequence: int  # number of the assignment among the annotator's assignments, from 1
    pair: int  # number of the pair of shapes; equal numbers are equal pairs
    kind: Kind
    left: Shape
    right: Shape
    first_is_left: bool
    choice: Choice
    reason: str | None
    expected: str | None  # correct answer: 'left', 'right', 'up' or 'down'; None: not known
    milliseconds: int
    views: tuple[str, ...]
    answered_at: float | None
    received_at: float  # time of receipt by the clock of the server, seconds since 1970
    page_version: str
    undone: bool  # True if the annotator took the answer back later, so that it does not count
    # question -> 'left', 'right' or 'tie'; empty if the campaign asks no further questions
    votes: Mapping[str, str] = field(default_factory=dict)
    comment: str | None = None
    # Origin of the answer of a judge; None: the answer of a person. Keys: "model", "family", "calibration"
    # (SHA-256 of the file, or null) and "questions": name of a question, MAIN_QUESTION for the choice, ->
    # dict of "criterion", "judge", "answer" (see `preferences.provenance`) and "order_flip".
    judge: Mapping[str, Any] | None = None

    @property
    def provenance(self) -> dict[str, Any]:
        """Fields of `preferences.provenance` for the choice of the answer; {} for a person's answer."""
        return self.provenance_of(MAIN_QUESTION)

    def provenance_of(self, question: str) -> dict[str, Any]:
        """Return the fields of `preferences.provenance` for the vote on a question; {} for a person."""
        if self.judge is None:
            return {}
        asked = self.judge.get("questions", {}).get(question, {})
        return {
            "provenance": f"{MODEL_PREFIX}{self.judge['model']}",
            "calibration": str(self.judge.get("calibration") or ""),
            **{name: str(asked.get(name) or "") for name in ("judge", "answer", "criterion")},
        }


MAIN_QUESTION = ""  # key of the choice in the origin of a judge's answer; further questions have their names
ROLES = ("annotator", "admin")
JUDGE = "judge"  # role of an annotator that is a judge; it has no token and cannot log in
LOCAL = "local"  # name of the annotator who uses the server's machine


class ConflictError(ValueError):
    """Error of a request that contradicts the stored state, such as a second answer to one assignment."""


@dataclass(frozen=True, kw_only=True)
class StoredCampaign:
    """Labelling campaign as it is stored. Its settings never change; pairs may follow, see PAIR_TOTAL."""

    id: int
    settings: CampaignSettings
    created: float  # time of creation, seconds since 1970
    pairs: int  # number of pairs, gold and practice pairs included


@dataclass(frozen=True, kw_only=True)
class StoredAnnotator:
    """Person who may answer, or a judge. An admin may also see results and manage annotators."""

    id: int
    name: str
    role: str  # one of ROLES, or JUDGE
    created: float  # time of creation, seconds since 1970
    revoked: float | None  # time at which the access was revoked, seconds since 1970; None: not revoked


@dataclass(frozen=True, kw_only=True)
class Submitted:
    """Result of submitting an answer. The answer is on the disk before the result is returned."""

    judgement: int  # id of the judgement
    # True if the answer was recorded before: nothing was written, and this is the first result
    duplicate: bool
    training: bool = False  # True for a practice pair
    correct: bool | None = None  # True or False for a practice pair with a correct answer; None otherwise
    explanation: str = ""  # explanation of a practice pair
    better: str | None = None  # correct answer of a practice pair: 'left', 'right', 'up' or 'down'
    # names of the generators of the left and the right shape, if the campaign reveals them
    reveal: tuple[str, str] | None = None


@dataclass(frozen=True, kw_only=True)
class OwnAnswer:
    """Answer as the annotator who gave it can see it again.

    It contains no information about the shapes, see `AssignedPair`.
    """

    sequence: int  # number of the assignment among the annotator's assignments, from 1
    assignment: str  # token of the assignment
    left: str  # asset token of the shape on the left
    right: str  # asset token of the shape on the right
    choice: Choice
    reason: str | None
    votes: Mapping[str, str]
    comment: str | None
    answered: float  # time of receipt by the clock of the server, seconds since 1970
    changeable: bool  # True if the annotator may undo the answer and answer again


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Progress of an annotator in a campaign."""

    done: int  # number of answered trials, without practice pairs
    training_left: int  # number of practice pairs that are not answered yet
    # Estimated number of all trials. It is an estimate, because other annotators may be assigned some of the
    # same pairs in the meantime.
    total: int


# ---- further questions of a campaign of pairs
# The settings contain a question as its name alone if it is one of QUESTIONS, for which the page has texts in
# all its languages, and as NAME=TEXT otherwise.

QUESTIONS = ("geometry", "texture", "prompt")
VOTES = tuple(choice.value for choice in (Choice.LEFT, Choice.RIGHT, Choice.TIE))
QUESTION_NAME = re.compile(r"[a-z][a-z0-9_-]{0,31}")
# Limits that keep the list of questions readable on a phone; MAX_TEXT counts characters.
MAX_QUESTIONS = 6
MAX_TEXT = 120


@dataclass(frozen=True)
class Question:
    """Question about a pair, in addition to the question which shape is better."""

    name: str
    text: str | None  # None: the page has the text in its languages


def parse_questions(question_texts: Iterable[str]) -> tuple[Question, ...]:
    """Parse the questions in the settings of a campaign.

    Args:
        question_texts: questions as the settings contain them: a name of QUESTIONS, or NAME=TEXT.

    Raises:
        ValueError: a name is unknown or occurs twice, a text has an invalid length, or there are more than
            MAX_QUESTIONS questions.
    """
    questions = []
    for question_text in question_texts:
        name, separator, text = (part.strip() for part in str(question_text).partition("="))
        # `separator` is empty if there is no "=". The page must then have texts for the name.
        if not QUESTION_NAME.fullmatch(name) or (not separator and name not in QUESTIONS):
            raise ValueError(
                f"--criteria: {question_text!r} is not a valid question. Use one of {', '.join(QUESTIONS)},"
                " or NAME=TEXT, where NAME starts with a letter and consists of a to z, 0 to 9, _ and -."
            )
        # isprintable() is False for line breaks and control characters, which a button cannot show.
        if separator and (not 1 <= len(text) <= MAX_TEXT or not text.isprintable()):
            raise ValueError(
                f"--criteria: the text of the question {name} is {text[:40]!r}. Use a text of 1 to {MAX_TEXT}"
                " printable characters."
            )
        questions.append(Question(name, text if separator else None))
    question_names = [question.name for question in questions]
    if len(set(question_names)) < len(question_names):
        raise ValueError(
            f"--criteria: a question occurs more than once in {', '.join(question_names)}. Remove the"
            " repeated question."
        )
    if len(question_names) > MAX_QUESTIONS:
        raise ValueError(
            f"--criteria: {len(question_names)} questions were given ({', '.join(question_names)}), but at"
            f" most {MAX_QUESTIONS} are allowed. Remove some questions."
        )
    return tuple(questions)


def check_votes(questions: Iterable[str], votes: Mapping[str, str], choice: Choice) -> None:
    """Check the votes of an answer. Every question must have a vote, and a skipped pair must have no votes.

    Args:
        questions: questions as the settings of the campaign contain them.
        votes: name of a question -> vote.
        choice: choice of the answer.

    Raises:
        ValueError: a vote is missing, unknown or not allowed.
    """
    question_names = (
        {question.name for question in parse_questions(questions)} if choice is not Choice.SKIP else set()
    )
    if set(votes) != question_names or not set(votes.values()) <= set(VOTES):
        if question_names:
            rule_text = (
                f"each of the questions {', '.join(sorted(question_names))} needs a vote ({', '.join(VOTES)})"
            )
        else:
            rule_text = "this answer must have no votes"
        # The message quotes at most MAX_QUESTIONS votes, so that its length is bounded.
        quoted_votes = ", ".join(
            f"{vote!r} for {question!r}" for question, vote in list(votes.items())[:MAX_QUESTIONS]
        )
        raise ValueError(
            f"answer: {rule_text}, but the page sent {quoted_votes or 'no vote'}. Reload the page."
        )


def check_stored(votes: str) -> None:
    """Check the votes in a record of an exported file.

    Args:
        votes: JSON text.

    Raises:
        ValueError: the text is not a JSON object from names of questions to votes.
    """
    try:
        parsed_votes = json.loads(votes)
        is_valid = isinstance(parsed_votes, dict) and all(
            QUESTION_NAME.fullmatch(name) and vote in VOTES for name, vote in parsed_votes.items()
        )
    except ValueError:
        is_valid = False
    if not is_valid:
        raise ValueError(
            f"the votes {votes[:60]!r} are not a JSON object from names of questions to {', '.join(VOTES)}."
            " Export the campaign again."
        )


def check_judge_origin(origin: str) -> None:
    """Check the origin of a judge's answer in a record of an exported file.

    Args:
        origin: JSON text of the column `judge`.

    Raises:
        ValueError: the text is not a JSON object with the name of a model.
    """
    try:
        parsed_origin = json.loads(origin)
        is_valid = isinstance(parsed_origin, dict) and isinstance(parsed_origin.get("model"), str)
    except ValueError:
        is_valid = False
    if not is_valid:
        raise ValueError(
            f"the origin {origin[:60]!r} of a judge's answer is not a JSON object with the name of a model."
            " Export the campaign again."
        )


def answers_to(question: str, judgement_rows: Iterable[JudgementRow]) -> list[JudgementRow]:
    """Return the judgements that have a vote on a question, with that vote in place of their choice.

    Args:
        question: name of the question.
        judgement_rows: judgements.
    """
    return [
        replace(
            judgement,
            choice=Choice(judgement.votes[question]),
            judge=judgement.judge
            and {
                **judgement.judge,
                "questions": {MAIN_QUESTION: judgement.judge.get("questions", {}).get(question, {})},
            },
        )
        for judgement in judgement_rows
        if question in judgement.votes
    ]
