"""What the parts of the labelling application hand to each other, and what the store answers with.

A campaign is one set of pairs with its settings, frozen when it is made. A pair names two shapes in a fixed
order, first and second; where shapes are judged one by one, the two are the same.
Showing a pair to an annotator is an assignment, which decides the sides. A judgement answers an assignment
and is never changed: taking it back is a further record. Annotators meet shapes, pairs and assignments under
random tokens alone.
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
    """What a campaign is for."""

    LABEL = "label"  # collecting preferences
    STUDY = "study"  # comparing two generators, blind
    SINGLE = "single"  # judging shapes one by one


class Kind(enum.StrEnum):
    """Why a pair is shown."""

    PAIR = "pair"  # for its own sake
    REPEAT = "repeat"  # the same annotator has answered it before, on the same sides
    SWAP = "swap"  # the same annotator has answered it before, on swapped sides
    GOLD = "gold"  # the answer is known: an attention check
    TRAINING = "training"  # an explained example; never counted


class Choice(enum.StrEnum):
    """What an annotator can answer."""

    LEFT = "left"
    RIGHT = "right"
    TIE = "tie"
    BAD = "bad"  # both: of equal rank, and neither any good; where the campaign asks for it
    UP = "up"  # of a shape by itself
    DOWN = "down"
    SCORE_0, SCORE_1, SCORE_2, SCORE_3, SCORE_4, SCORE_5 = "012345"  # the same on a scale, 5 is best
    SKIP = "skip"  # with a reason; says nothing about the pair

    @property
    def equal(self) -> bool:
        return self in (Choice.TIE, Choice.BAD)

    @property
    def good(self) -> bool | None:
        """What is said of a shape by itself; None where pairs are compared."""
        if self.value in "012345":
            return int(self.value) >= GOOD
        return {"up": True, "down": False}.get(self.value)

    def meets(self, expected: str | None) -> bool:
        """Whether it is the known answer: 'left' or 'right', or, of a shape by itself, 'up' or 'down'."""
        return self.value == expected or (
            self.good is not None and self.good == {"up": True, "down": False}.get(expected or "")
        )


VIEWS = ("front", "left", "right", "back", "above", "below")  # of the page
SCALES = {  # what may be answered, a skip aside, by the scale of a campaign's settings
    "pairs": (Choice.LEFT, Choice.RIGHT, Choice.TIE, Choice.BAD),
    "thumbs": (Choice.UP, Choice.DOWN),
    "scores": tuple(map(Choice, "012345")),
}
# as the page lists them; "broken" means that a shape did not appear: one that is damaged is to be judged
SKIP_REASONS = ("unsure", "identical", "broken", "other")


DAMAGES = {  # done on purpose to a generator's shape, with what a person sees
    "floaters": "lumps float loose in front of it",
    "holes": "pieces are bitten out of its front",
    "rough": "its surface is all bumps",
}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One isosurface: all that is needed to draw it again. Or one asset, which is the file itself: then
    `generator` is its label, `source` its path, psi and level are nan, resolution and triangles 0.
    """

    generator: str  # sha256 hex of the generator's weights
    source: str  # network file it is loaded from; '' is the bundled generator. Never leaves the server
    seed: int  # z = RandomState(seed).randn(z_dim)
    psi: float  # truncation
    level: float  # raw density of the surface
    resolution: int  # grid points per axis of the cube
    triangles: int  # decimated to about so many
    # damage done on purpose, one of DAMAGES, of assets.damage's; '' is none. Gold and training pairs have it
    degradation: str = ""
    file: str = ""  # sha256 hex of the asset's file as it lay on the disk; "" is an isosurface of a generator
    condition: str = ""  # name of the prompt or input picture it was made for; "" is none

    # the file of a shape is cached under eg3d_rlhf.people.label.shape_files.shape_key(shape)

    @classmethod
    def of_asset(cls, **fields) -> "Shape":
        return cls(psi=math.nan, level=math.nan, resolution=0, triangles=0, **fields)


@dataclass(frozen=True, kw_only=True)
class PlannedPair:
    """A pair of a campaign before it is stored."""

    first: Shape
    second: Shape
    # PAIR, GOLD or TRAINING; repeats and swaps arise from what an annotator has answered
    kind: Kind = Kind.PAIR
    # 'first', 'second' or None: the answer of gold and training pairs; second of a shape alone is 'down'
    expected: str | None = None
    explanation: str = ""  # of training pairs, shown after the answer


@dataclass(frozen=True, kw_only=True)
class CampaignSettings:
    """Frozen when the campaign is made."""

    name: str
    mode: Mode = Mode.LABEL
    scale: str = "pairs"  # one of SCALES
    seed: int = 0  # decides pairs, order, sides, repeats and gold checks
    annotators_per_pair: int = knob(1, "Different annotators to judge each pair.", "Pairs", low=1)
    repeat_share: float = knob(
        0.05, "Trials that repeat one, same sides.", "Pairs", metavar="0..0.5", low=0, high=0.5, rare=True
    )
    swap_share: float = knob(
        0.05, "Trials that repeat one, swapped sides.", "Pairs", metavar="0..0.5", low=0, high=0.5, rare=True
    )
    repeat_gap: int = knob(
        10, "Trials at least between a pair and its repeat.", "Pairs", metavar="TRIALS", low=1, rare=True
    )
    gold_every: int = knob(
        25, "One gold check in so many trials; 0: none.", "Pairs", metavar="TRIALS", low=0, rare=True
    )
    trials_per_annotator: int | None = knob(
        None, "An annotator is done after so many.", "Pairs", low=1, shown="all", rare=True
    )
    view: str = knob("front", "Where a shape is first looked at from.", "Pairs", choices=VIEWS, rare=True)
    show_render: bool = False  # the RGB picture may be asked for
    both_bad: bool = False  # of pairs: 'bad' may be answered
    questions: tuple[str, ...] = ()  # of pairs: asked besides which is better; see Question
    reveal: bool = False  # of pairs: after an answer the generators' names are told. Never in a study
    extra: Mapping = field(default_factory=dict)  # what the maker wishes to keep with it: JSON types

    def __post_init__(self):
        check_knobs(self)
        if self.scale not in SCALES or (self.mode is Mode.SINGLE) == (self.scale == "pairs"):
            raise ValueError(
                f"scale: expected thumbs or scores for shapes one by one, else pairs, got {self.scale!r} for"
                f" {self.mode}."
            )
        if self.mode is Mode.SINGLE and self.swap_share:
            raise ValueError(
                f"--swap-share: expected 0 for shapes one by one, which have no sides, got {self.swap_share}."
                " Leave it out."
            )
        asked = [name for name in ("both_bad", "questions", "reveal") if getattr(self, name)]
        if self.mode is Mode.SINGLE and asked:
            raise ValueError(
                f"--{asked[0].replace('_', '-')}: expected pairs, got shapes one by one. Leave it out."
            )
        if self.mode is Mode.STUDY and self.reveal:
            raise ValueError("reveal: expected no names in a study, which is blind. Leave it out.")
        if self.repeat_share + self.swap_share > 0.5:
            raise ValueError(
                f"repeat_share and swap_share must add up to 0..0.5, got {self.repeat_share} and"
                f" {self.swap_share}"
            )


@dataclass(frozen=True, kw_only=True)
class AssignedPair:
    """An assignment as the server hands it to the page; tokens tell nothing."""

    token: str  # of the assignment, random
    left: str  # asset token of the shape on the left
    right: str
    training: bool  # the only kind an annotator may know


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One answer as it arrives."""

    key: str  # chosen by the page, unique per annotator: sending it again changes nothing
    assignment: str  # token
    choice: Choice
    reason: str | None = None  # of a skip
    milliseconds: int = 0  # from the shapes being visible to the choice
    views: tuple[str, ...] = ()  # what the annotator used: 'front', 'left', 'orbit', 'wireframe', ...
    answered_at: float | None = None  # the page's clock, seconds since 1970
    page_version: str = ""
    # question -> 'left', 'right' or 'tie', besides the choice
    votes: Mapping[str, str] = field(default_factory=dict)
    comment: str | None = None  # a remark in the annotator's words


@dataclass(frozen=True, kw_only=True)
class JudgementRow:
    """A judgement with everything known about it, as the store returns it for export,
    quality and training.
    """

    id: int  # grows with time of receipt
    campaign: str
    mode: str
    annotator: str
    assignment: str
    sequence: int  # place of the assignment among the annotator's, from 1
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
    # question -> 'left', 'right' or 'tie'; empty where nothing more was asked
    votes: Mapping[str, str] = field(default_factory=dict)
    comment: str | None = None


ROLES = ("annotator", "admin")
LOCAL = "local"  # whoever sits at the machine that the server runs on


class ConflictError(ValueError):
    """An answer to something that is answered already, or a key that was used for something else."""


@dataclass(frozen=True, kw_only=True)
class StoredCampaign:
    """A campaign as it was made; it never changes."""

    id: int
    settings: CampaignSettings
    created: float  # seconds since 1970
    pairs: int  # count, gold and training included


@dataclass(frozen=True, kw_only=True)
class StoredAnnotator:
    """Somebody who may answer; an admin may also see results and name annotators."""

    id: int
    name: str
    role: str  # one of ROLES
    created: float
    revoked: float | None  # when the token was withdrawn


@dataclass(frozen=True, kw_only=True)
class Submitted:
    """What became of an answer; it is on the disk when this is returned."""

    judgement: int  # id
    duplicate: bool  # the key was known: nothing was written, this is the first result
    training: bool = False
    correct: bool | None = None  # of training pairs with a known answer, unless skipped
    explanation: str = ""  # of training pairs
    better: str | None = None  # the known answer of training pairs: 'left', 'right', 'up' or 'down'
    # the generators' names, left and right, where the campaign tells them
    reveal: tuple[str, str] | None = None


@dataclass(frozen=True, kw_only=True)
class OwnAnswer:
    """An answer as its annotator sees it again; like `AssignedPair` it tells nothing more."""

    sequence: int  # place of the pair among the annotator's
    assignment: str  # token
    left: str  # asset tokens
    right: str
    choice: Choice
    reason: str | None
    votes: Mapping[str, str]
    comment: str | None
    answered: float  # the server's clock, seconds since 1970
    changeable: bool  # may be taken back and answered anew


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far an annotator is in a campaign."""

    done: int  # trials that are answered; training aside
    total: int  # trials there will be, as far as can be told while others take from the same pairs
    training_left: int


# ---- questions that a campaign of pairs asks besides which one is better
# written as the name alone where it is one of QUESTIONS, whose texts the page has in its languages, else as
# NAME=TEXT

QUESTIONS = ("geometry", "texture", "prompt")
VOTES = tuple(choice.value for choice in (Choice.LEFT, Choice.RIGHT, Choice.TIE))
QUESTION_NAME = re.compile(r"[a-z][a-z0-9_-]{0,31}")
# characters
MAX_QUESTIONS = 6
MAX_TEXT = 120


@dataclass(frozen=True)
class Question:
    """Something that is asked of a pair."""

    name: str
    text: str | None  # None: the page knows it


def parse_questions(written: Iterable[str]) -> tuple[Question, ...]:
    """Questions as a campaign's settings hold them.

    Raises: ValueError for unknown ones, for texts that do not fit, and for one twice.
    """
    questions = []
    for entry in written:
        name, equals, text = (part.strip() for part in str(entry).partition("="))
        if not QUESTION_NAME.fullmatch(name) or (not equals and name not in QUESTIONS):
            known = ", ".join(QUESTIONS)
            raise ValueError(
                f"--criteria: expected {known} or NAME=TEXT, the name in a to z, 0 to 9, _ and -, got"
                f" {entry!r}. Correct it."
            )
        if equals and (not 1 <= len(text) <= MAX_TEXT or not text.isprintable()):
            got = repr(text[:40])
            raise ValueError(
                f"--criteria: expected {name}= a text of 1 to {MAX_TEXT} printable characters, got {got}."
                " Correct it."
            )
        questions.append(Question(name, text if equals else None))
    names = [question.name for question in questions]
    if len(set(names)) < len(names) or len(names) > MAX_QUESTIONS:
        raise ValueError(
            f"--criteria: expected at most {MAX_QUESTIONS}, each once, got {', '.join(names)}. Leave some"
            " out."
        )
    return tuple(questions)


def check_votes(asked: Iterable[str], votes: Mapping[str, str], choice: Choice) -> None:
    """Raises: ValueError unless every question, and no other, has a vote;
    of what is skipped there is none.
    """
    names = {question.name for question in parse_questions(asked)} if choice is not Choice.SKIP else set()
    if set(votes) != names or not set(votes.values()) <= set(VOTES):
        wanted = (
            f"a vote of {', '.join(VOTES)} on each of {', '.join(sorted(names))}" if names else "no votes"
        )
        raise ValueError(
            f"answer: expected {wanted}, got {dict(list(votes.items())[:MAX_QUESTIONS])}. Reload the page."
        )


def check_stored(votes: str) -> None:
    """Raises: ValueError for what cannot be read as votes again."""
    try:
        parsed = json.loads(votes)
        fits = isinstance(parsed, dict) and all(
            QUESTION_NAME.fullmatch(name) and vote in VOTES for name, vote in parsed.items()
        )
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(
            f"expected votes as JSON, question to one of {', '.join(VOTES)}, got {votes[:60]!r}. Export"
            " again."
        )


def answers_to(question: str, rows: Iterable[JudgementRow]) -> list[JudgementRow]:
    """The judgements that have a vote on a question, with the vote as their choice."""
    return [replace(row, choice=Choice(row.votes[question])) for row in rows if question in row.votes]
