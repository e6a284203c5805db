"""Data classes that the parts of the labelling application exchange, and checks of their values.

A campaign is one set of pairs with its settings. It does not change after it is created. A pair names two
shapes in a fixed order, first and second. In a campaign that shows shapes one by one, both are the same
shape. An assignment shows a pair to an annotator and decides which shape is on the left. A judgement answers
an assignment and is never changed: an undo is a further record. Annotators see shapes, pairs and assignments
under random tokens only, which reveal nothing about the generators.
"""

import enum
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from eg3d_rlhf.preferences import GOOD
from training.config import check_knobs, knob


class Mode(enum.StrEnum):
    """Purpose of a campaign."""

    LABEL = "label"  # collecting preferences
    STUDY = "study"  # comparing two generators in a blind study
    SINGLE = "single"  # rating shapes one by one


class Kind(enum.StrEnum):
    """Reason for which a pair is shown."""

    PAIR = "pair"  # a pair of the plan, shown to collect a preference
    REPEAT = "repeat"  # the same annotator has answered it before, on the same sides
    SWAP = "swap"  # the same annotator has answered it before, on swapped sides
    GOLD = "gold"  # the answer is known: an attention check
    TRAINING = "training"  # an explained example; never counted


class Choice(enum.StrEnum):
    """Answers that an annotator can give."""

    LEFT = "left"
    RIGHT = "right"
    TIE = "tie"
    BAD = "bad"  # both are equally bad; only in campaigns with `both_bad`
    UP = "up"  # a single shape is good
    DOWN = "down"  # a single shape is bad
    SCORE_0, SCORE_1, SCORE_2, SCORE_3, SCORE_4, SCORE_5 = "012345"  # ratings of a single shape; 5 is best
    SKIP = "skip"  # no answer, with a reason; not counted as a preference

    @property
    def equal(self) -> bool:
        """True if the answer ranks both shapes equally."""
        return self in (Choice.TIE, Choice.BAD)

    @property
    def good(self) -> bool | None:
        """True or False for a good or bad rating of a single shape; None where pairs are compared."""
        # Only the values of scores are digits. GOOD is the lowest score that counts as a good shape.
        if self.value in "012345":
            return int(self.value) >= GOOD
        return {"up": True, "down": False}.get(self.value)

    def meets(self, expected: str | None) -> bool:
        """Return True if this is the known answer: 'left', 'right', or for a single shape 'up', 'down'."""
        # A score is compared with a known 'up' or 'down' through `good`.
        return self.value == expected or (
            self.good is not None and self.good == {"up": True, "down": False}.get(expected or "")
        )


VIEWS = (
    "front",
    "left",
    "right",
    "back",
    "above",
    "below",
)  # names of the page's view buttons; the settings name the initial view
SCALES = {  # valid answers besides a skip, by the scale in the campaign's settings
    "pairs": (Choice.LEFT, Choice.RIGHT, Choice.TIE, Choice.BAD),
    "thumbs": (Choice.UP, Choice.DOWN),
    "scores": tuple(map(Choice, "012345")),
}
# The page lists the reasons in this order. "broken" means that a shape did not appear on the screen. A shape
# with damage is not skipped: annotators compare it like any other.
SKIP_REASONS = ("unsure", "identical", "broken", "other")


DAMAGES = {  # added deliberately to a generator's shape -> its description for annotators
    "floaters": "lumps float loose in front of it",
    "holes": "pieces are bitten out of its front",
    "rough": "its surface is all bumps",
}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One isosurface of a generator, with all parameters that are needed to compute it again; or one asset
    file. Of an asset, `generator` is its label, `source` its path, psi and level are nan, and resolution and
    triangles are 0.
    """

    generator: str  # SHA-256 in hex of the generator's weights
    source: str  # network file; '' is the bundled generator. Never sent to a browser
    seed: int  # z = RandomState(seed).randn(z_dim)
    psi: float  # truncation psi, usually 0 to 1; 1: no truncation
    level: float  # sigma_raw at the isosurface
    resolution: int  # grid points per axis of the cube
    triangles: int  # approximate number after decimation
    # Damage that was added deliberately, a key of DAMAGES or of assets.damage; '' is none. Only gold pairs
    # and training pairs contain damaged shapes.
    degradation: str = ""
    file: str = ""  # SHA-256 in hex of the asset's file; "" for an isosurface
    condition: str = ""  # name of the prompt or input image; "" is none

    # The file of a shape is cached under eg3d_rlhf.people.label.shape_files.shape_key(shape).

    @classmethod
    def of_asset(cls, **fields) -> "Shape":
        """Make the shape of an asset file: the parameters of an isosurface get their empty values."""
        return cls(psi=math.nan, level=math.nan, resolution=0, triangles=0, **fields)


@dataclass(frozen=True, kw_only=True)
class PlannedPair:
    """A pair of a campaign before it is stored."""

    first: Shape
    second: Shape
    # PAIR, GOLD or TRAINING. Repeats and swaps are made from the answers of an annotator.
    kind: Kind = Kind.PAIR
    # 'first', 'second' or None: the known answer of gold and training pairs. For a single shape, 'first'
    # means 'up' and 'second' means 'down'.
    expected: str | None = None
    explanation: str = ""  # text of a training pair that is shown after the answer


@dataclass(frozen=True, kw_only=True)
class CampaignSettings:
    """Settings of a campaign, which do not change after it is created."""

    name: str
    mode: Mode = Mode.LABEL
    scale: str = "pairs"  # one of SCALES
    seed: int = 0  # decides pairs, order, sides, repeats and gold checks
    annotators_per_pair: int = knob(1, "Number of different annotators who answer each pair.", "Pairs", low=1)
    repeat_share: float = knob(
        0.05,
        "Share of trials that repeat an earlier pair of the annotator on the same sides.",
        "Pairs",
        metavar="0..0.5",
        low=0,
        high=0.5,
        rare=True,
    )
    swap_share: float = knob(
        0.05,
        "Share of trials that repeat an earlier pair of the annotator on swapped sides.",
        "Pairs",
        metavar="0..0.5",
        low=0,
        high=0.5,
        rare=True,
    )
    repeat_gap: int = knob(
        10,
        "Least number of trials between a pair and its repeat.",
        "Pairs",
        metavar="TRIALS",
        low=1,
        rare=True,
    )
    gold_every: int = knob(
        25,
        "One trial of this many is a gold check, whose answer is known. 0: no gold checks.",
        "Pairs",
        metavar="TRIALS",
        low=0,
        rare=True,
    )
    trials_per_annotator: int | None = knob(
        None, "Number of trials after which an annotator is finished.", "Pairs", low=1, shown="all", rare=True
    )
    view: str = knob("front", "View from which a shape is first shown.", "Pairs", choices=VIEWS, rare=True)
    show_render: bool = False  # annotators may also look at the RGB render
    both_bad: bool = False  # pairs only: annotators may answer that both shapes are bad
    questions: tuple[str, ...] = ()  # pairs only: further questions, see `Question`
    reveal: bool = False  # pairs only: show the names after an answer
    extra: Mapping = field(default_factory=dict)  # further JSON values that are stored with the campaign

    def __post_init__(self):
        check_knobs(self)
        if self.scale not in SCALES or (self.mode is Mode.SINGLE) == (self.scale == "pairs"):
            raise ValueError(
                f"scale: expected 'thumbs' or 'scores' for shapes one by one, and 'pairs' otherwise, got"
                f" {self.scale!r} for {self.mode}. Use one of the allowed scales."
            )
        if self.mode is Mode.SINGLE and self.swap_share:
            raise ValueError(
                f"--swap-share: expected 0 for shapes one by one, which have no sides, got {self.swap_share}."
                " Remove the option."
            )
        asked = [name for name in ("both_bad", "questions", "reveal") if getattr(self, name)]
        if self.mode is Mode.SINGLE and asked:
            raise ValueError(
                f"--{asked[0].replace('_', '-')} needs pairs, but this campaign shows shapes one by one."
                " Remove it."
            )
        if self.mode is Mode.STUDY and self.reveal:
            raise ValueError("reveal cannot be used in a study, which is blind. Remove it.")
        # A pair is repeated once, so no more than every second trial can be one.
        if self.repeat_share + self.swap_share > 0.5:
            raise ValueError(
                f"repeat_share and swap_share must add up to at most 0.5, got {self.repeat_share} and"
                f" {self.swap_share}. Reduce one of them."
            )


@dataclass(frozen=True, kw_only=True)
class AssignedPair:
    """An assignment as the server sends it to the page. Its tokens are random and reveal nothing."""

    token: str  # of the assignment, random
    left: str  # asset token of the shape on the left
    right: str
    training: bool  # the only property that the annotator may see


@dataclass(frozen=True, kw_only=True)
class Answer:
    """An answer as the page sends it."""

    key: str  # chosen by the page, unique per annotator; sending a key twice has no further effect
    assignment: str  # token
    choice: Choice
    reason: str | None = None  # of a skip
    milliseconds: int = 0  # from the time when both shapes are visible to the choice
    views: tuple[str, ...] = ()  # views and tools that were used: 'front', 'orbit', 'wireframe', ...
    answered_at: float | None = None  # the page's clock, seconds since 1970
    page_version: str = ""
    # question -> 'left', 'right' or 'tie', in addition to the choice
    votes: Mapping[str, str] = field(default_factory=dict)
    comment: str | None = None  # free text of the annotator


@dataclass(frozen=True, kw_only=True)
class JudgementRow:
    """A judgement with its campaign, assignment and shapes, as the store returns it for exports, quality
    reports and training.
    """

    id: int  # grows with time of receipt
    campaign: str
    mode: str
    annotator: str
    assignment: str
    sequence: int  # number of the assignment among the annotator's, from 1
    pair: int  # same number: same pair of shapes
    kind: Kind
    left: Shape
    right: Shape
    first_is_left: bool
    choice: Choice
    reason: str | None
    expected: str | None  # 'left' or 'right', 'up' or 'down', where the answer is known
    milliseconds: int
    views: tuple[str, ...]
    answered_at: float | None
    received_at: float  # the server's clock, seconds since 1970
    page_version: str
    undone: bool  # taken back later: does not count
    # question -> 'left', 'right' or 'tie'; empty if the campaign asks no further questions
    votes: Mapping[str, str] = field(default_factory=dict)
    comment: str | None = None


ROLES = ("annotator", "admin")
LOCAL = "local"  # name of the annotator who uses the server's machine


class ConflictError(ValueError):
    """Error of an answer to an assignment that is answered already, or of a key that was used before."""


@dataclass(frozen=True, kw_only=True)
class StoredCampaign:
    """A campaign as it is stored; it never changes."""

    id: int
    settings: CampaignSettings
    created: float  # seconds since 1970
    pairs: int  # count, gold and training included


@dataclass(frozen=True, kw_only=True)
class StoredAnnotator:
    """A person who may answer. An admin may also see results and manage annotators."""

    id: int
    name: str
    role: str  # one of ROLES
    created: float
    revoked: float | None  # time at which the token was withdrawn, seconds since 1970; None: valid


@dataclass(frozen=True, kw_only=True)
class Submitted:
    """Result of submitting an answer; the answer is on the disk when this is returned."""

    judgement: int  # id
    duplicate: bool  # the key was used before: nothing was written, this is the first result
    training: bool = False
    correct: bool | None = None  # of training pairs with a known answer, unless skipped
    explanation: str = ""  # of training pairs
    better: str | None = None  # the known answer of training pairs: 'left', 'right', 'up' or 'down'
    # names of the left and the right generator, if the campaign reveals them
    reveal: tuple[str, str] | None = None


@dataclass(frozen=True, kw_only=True)
class OwnAnswer:
    """An answer as its annotator sees it again. Like `AssignedPair` it reveals nothing else."""

    sequence: int  # number of the assignment among the annotator's, from 1
    assignment: str  # token
    left: str  # asset tokens
    right: str
    choice: Choice
    reason: str | None
    votes: Mapping[str, str]
    comment: str | None
    answered: float  # the server's clock, seconds since 1970
    changeable: bool  # may be undone and answered again


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Progress of an annotator in a campaign."""

    done: int  # number of answered trials, without training pairs
    training_left: int
    # Estimated number of trials: other annotators may take some of the same pairs in the meantime.
    total: int


# ---- further questions of a campaign of pairs
# A question is written as its name alone if it is one of QUESTIONS, for which the page has texts in all its
# languages, and as NAME=TEXT otherwise.

QUESTIONS = ("geometry", "texture", "prompt")
VOTES = tuple(choice.value for choice in (Choice.LEFT, Choice.RIGHT, Choice.TIE))
QUESTION_NAME = re.compile(r"[a-z][a-z0-9_-]{0,31}")
# Bounds that keep the question list readable on a phone's page; MAX_TEXT counts characters.
MAX_QUESTIONS = 6
MAX_TEXT = 120


@dataclass(frozen=True)
class Question:
    """A question about a pair, besides which shape is better."""

    name: str
    text: str | None  # None: the page has the text in its languages


def parse_questions(written: Iterable[str]) -> tuple[Question, ...]:
    """Parse the questions of a campaign's settings.

    Raises: ValueError for unknown names, texts of invalid length, and a name that occurs twice.
    """
    questions = []
    for entry in written:
        name, equals, text = (part.strip() for part in str(entry).partition("="))
        # `equals` is empty where there is no "=": then the name must be one that the page has texts for.
        if not QUESTION_NAME.fullmatch(name) or (not equals and name not in QUESTIONS):
            known = ", ".join(QUESTIONS)
            raise ValueError(
                f"--criteria: expected {known} or NAME=TEXT, where NAME consists of a to z, 0 to 9, _ and"
                f" -, got {entry!r}. Correct it."
            )
        # isprintable() rejects line breaks and control characters, which the page cannot show in a button.
        if equals and (not 1 <= len(text) <= MAX_TEXT or not text.isprintable()):
            got = repr(text[:40])
            raise ValueError(
                f"--criteria: the text of {name} must have 1 to {MAX_TEXT} printable characters, got {got}."
                " Correct it."
            )
        questions.append(Question(name, text if equals else None))
    names = [question.name for question in questions]
    if len(set(names)) < len(names) or len(names) > MAX_QUESTIONS:
        raise ValueError(
            f"--criteria: expected at most {MAX_QUESTIONS} different questions, got {', '.join(names)}."
            " Remove some."
        )
    return tuple(questions)


def check_votes(asked: Iterable[str], votes: Mapping[str, str], choice: Choice) -> None:
    """Check the votes of an answer. A skipped pair has no votes.

    Raises: ValueError unless every question, and no other, has a vote.
    """
    names = {question.name for question in parse_questions(asked)} if choice is not Choice.SKIP else set()
    if set(votes) != names or not set(votes.values()) <= set(VOTES):
        expected = (
            f"a vote of {', '.join(VOTES)} on each of {', '.join(sorted(names))}" if names else "no votes"
        )
        raise ValueError(
            # The message quotes at most MAX_QUESTIONS votes, so that its length is bounded.
            f"answer: expected {expected}, got {dict(list(votes.items())[:MAX_QUESTIONS])}. Reload the page."
        )


def check_stored(votes: str) -> None:
    """Check votes in JSON, as an exported file holds them. Raises: ValueError for invalid ones."""
    try:
        parsed = json.loads(votes)
        fits = isinstance(parsed, dict) and all(
            QUESTION_NAME.fullmatch(name) and vote in VOTES for name, vote in parsed.items()
        )
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(
            f"expected votes as JSON, from a question to one of {', '.join(VOTES)}, got {votes[:60]!r}."
            " Export again."
        )


def answers_to(question: str, rows: Iterable[JudgementRow]) -> list[JudgementRow]:
    """Return the judgements that have a vote on a question, with that vote in place of their choice."""
    return [replace(row, choice=Choice(row.votes[question])) for row in rows if question in row.votes]
