"""Bodies of the API's requests and responses, and what they may hold."""

from typing import Annotated, Literal

from fastapi import Path
from pydantic import BaseModel, ConfigDict, Field, model_validator

from eg3d_rlhf.label.entities import Choice, Progress

NAME = r"^\w(?:[\w .@+-]{0,78}[\w.@+-])?$"  # of an annotator: letters and digits of any script, and a few signs between them
Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,128}$")]  # keys and tokens
AssetPath = Annotated[str, Path(pattern=r"^[A-Za-z0-9_-]{1,128}$")]


class Sent(BaseModel):
    """A request's body: fields of exactly these types, and no others."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Judgement(Sent):
    """An answer to an assignment."""

    key: Word  # the page's own name for this answer: sent again, nothing changes
    assignment: Word
    choice: Literal["left", "right", "tie", "skip"]
    reason: Literal["broken", "identical", "unsure", "other"] | None = None  # entities.SKIP_REASONS
    milliseconds: Annotated[int, Field(ge=0, le=86_400_000)]
    views: Annotated[list[Annotated[str, Field(pattern=r"^[a-z0-9_-]{1,32}$")]], Field(max_length=64)]
    answered_at: Annotated[float, Field(ge=0, le=1e11)]
    page_version: Annotated[str, Field(pattern=r"^[A-Za-z0-9._+-]{0,64}$")]

    @model_validator(mode="after")
    def _reason_of_skips(self):
        if (self.choice == Choice.SKIP) != (self.reason is not None):
            raise ValueError("a skip needs a reason, and only a skip has one")
        return self


class Undo(Sent):
    """Takes back the last answer, or that to `assignment`."""

    key: Word
    assignment: Word | None = None


class NewAnnotator(Sent):
    """An annotator to be made."""

    name: Annotated[str, Field(pattern=NAME)]
    role: Literal["annotator", "admin"] = "annotator"


class Named(Sent):
    """An annotator by name."""

    name: Annotated[str, Field(pattern=NAME)]


class Error(BaseModel):
    """What every error looks like."""

    error: str
    remedy: str


class Session(BaseModel):
    """What the page needs to know of itself and its annotator."""

    annotator: str
    role: Literal["annotator", "admin"]
    csrf: str
    mode: Literal["label", "study"]
    title: str
    show_render: bool
    page_version: str
    skip_reasons: list[str]
    exposed: bool


class Preparing(BaseModel):
    """How far the shapes are."""

    done: int
    total: int
    seconds_left: float | None


class Assigned(BaseModel):
    """A pair to be judged."""

    assignment: str
    training: bool
    left: str
    right: str


class Assignments(BaseModel):
    """The next pairs, oldest first."""

    assignments: list[Assigned]
    progress: Progress
    waiting: bool
    preparation: Preparing


class Lesson(BaseModel):
    """What a training pair teaches."""

    correct: bool | None
    explanation: str


class Accepted(BaseModel):
    """A judgement is kept."""

    accepted: bool
    duplicate: bool
    training: Lesson | None
    progress: Progress


class Undone(BaseModel):
    """An answer is taken back; `assignment` is open again, null where there was nothing."""

    assignment: str | None
    progress: Progress


class AnnotatorLine(BaseModel):
    """An annotator as admins see her."""

    name: str
    role: str
    created: float
    revoked: float | None


class NewToken(BaseModel):
    """A token; it is shown this once."""

    name: str
    token: str
