"""Bodies of the API's requests, responses and errors, and what they may hold. An error says what is wrong and
what to do.
"""

import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

from fastapi import FastAPI, Path, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, model_validator
from sqlalchemy.exc import DBAPIError, TimeoutError
from starlette.exceptions import HTTPException

from eg3d_rlhf.people.label.entities import Choice

LOGGER = logging.getLogger("eg3d_rlhf.people.label.server")
REMEDIES = {
    400: "Send what the application's description asks for.",
    404: "Check the address.",
    405: "Use another method.",
    500: "Tell the person who runs the server; the reason is in its output.",
}
# of an annotator: letters and digits of any script, and a few signs between them
NAME = r"^\w(?:[\w .@+-]{0,78}[\w.@+-])?$"
Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,128}$")]  # keys and tokens
AssetPath = Annotated[str, Path(pattern=r"^[A-Za-z0-9_-]{1,128}$")]
QuestionName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]{0,31}$")]


class Sent(BaseModel):
    """A request's body: fields of exactly these types, and no others."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Judgement(Sent):
    """An answer to an assignment."""

    key: Word  # the page's own name for this answer: sent again, nothing changes
    assignment: Word
    # which of them, the scale says
    choice: Literal["left", "right", "tie", "bad", "up", "down", "0", "1", "2", "3", "4", "5", "skip"]
    reason: Literal["broken", "identical", "unsure", "other"] | None = None  # entities.SKIP_REASONS
    milliseconds: Annotated[int, Field(ge=0, le=86_400_000)]
    views: Annotated[list[Annotated[str, Field(pattern=r"^[a-z0-9_-]{1,32}$")]], Field(max_length=64)]
    answered_at: Annotated[float, Field(ge=0, le=1e11)]
    page_version: Annotated[str, Field(pattern=r"^[A-Za-z0-9._+-]{0,64}$")]
    # on the campaign's questions
    votes: Annotated[dict[QuestionName, Literal["left", "right", "tie"]], Field(max_length=8)] = {}
    # printable: see eg3d_rlhf.people.label.judgements
    comment: Annotated[str, Field(min_length=1, max_length=500)] | None = None

    @model_validator(mode="after")
    def _reason_of_skips(self):
        if (self.choice == Choice.SKIP) != (self.reason is not None):
            raise ValueError("a skip needs a reason, and only a skip has one")
        return self


class Undo(Sent):
    """Takes back the last answer, or that to `assignment`."""

    key: Word
    assignment: Word | None = None


class Named(Sent):
    """An annotator by name."""

    name: Annotated[str, Field(pattern=NAME)]


class NewAnnotator(Named):
    """An annotator to be made."""

    role: Literal["annotator", "admin"] = "annotator"


class AnnotatorLine(BaseModel):
    """An annotator as admins see her."""

    name: str
    role: str
    created: float
    revoked: float | None


@dataclass(eq=False)
class Sparing(logging.Filter):
    """Filter that passes `burst` records of one wording in a period, and then says how many it left out."""

    burst: int = 5
    period: float = 60.0  # seconds
    _seen: dict[tuple, list] = field(default_factory=dict)  # wording -> [since, count]

    def filter(self, record: logging.LogRecord) -> bool:
        seen = self._seen.setdefault((record.levelno, str(record.msg)), [time.monotonic(), 0])
        if time.monotonic() - seen[0] > self.period:
            if seen[1] > self.burst:
                record.msg = f"{record.msg} (and {seen[1] - self.burst} more since the last such line)"
            seen[:] = time.monotonic(), 0
        seen[1] += 1
        return seen[1] <= self.burst


SPARING = Sparing()
LOGGER.addFilter(SPARING)


class Refusal(Exception):
    """A request that is not answered as asked."""

    def __init__(self, status: int, error: str, remedy: str, headers: Mapping[str, str] | None = None):
        super().__init__(error)
        self.status = status
        self.error = error
        self.remedy = remedy
        self.headers = dict(headers or {})

    def response(self) -> JSONResponse:
        return JSONResponse({"error": self.error, "remedy": self.remedy}, self.status, self.headers)


class Withdrawn(Refusal):
    """401 to somebody whose access was revoked: only who holds the token, or a session that it opened, is
    told so.
    """

    def __init__(self):
        super().__init__(
            401,
            "Your access was withdrawn.",
            "Ask the person who gave you the token.",
            {"WWW-Authenticate": "Bearer"},
        )


def note(request: Request, refusal: Refusal) -> Refusal:
    """Leave the reason for the access log; returns the refusal."""
    request.scope.setdefault("state", {})["refused"] = refusal.error
    return refusal


def too_many(seconds: float) -> Refusal:
    """429 with the seconds to wait."""
    wait = max(1, math.ceil(seconds))
    return Refusal(
        429, "Too many requests.", f"Wait {wait} seconds and try again.", {"Retry-After": str(wait)}
    )


def no_database(error: Exception) -> Refusal:
    """503, and a line in the log without the statement and its values."""
    reason = str(getattr(error, "orig", None) or error).strip().splitlines() or [type(error).__name__]
    LOGGER.error("database: %s", reason[0])
    return Refusal(503, "The database did not answer.", "Try again in a moment.", {"Retry-After": "2"})


def add_handlers(app: FastAPI) -> None:
    """Make every error of the application a `Refusal`'s response."""

    @app.exception_handler(Refusal)
    async def refused(request: Request, error: Refusal) -> JSONResponse:
        return note(request, error).response()

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        remedy = REMEDIES.get(error.status_code, REMEDIES[400])
        return note(request, Refusal(error.status_code, str(error.detail), remedy, error.headers)).response()

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        # fields and reasons of at most five mistakes; never the values, which may be long or hostile
        said = [
            f"{'.'.join(str(part) for part in item['loc'][:4])[:60]}: {item['msg'][:120]}"
            for item in error.errors()[:5]
        ]
        refusal = Refusal(
            422, f"Expected a valid request, got: {'; '.join(said)}.", "Correct the fields that are named."
        )
        return note(request, refusal).response()

    @app.exception_handler(DBAPIError)
    @app.exception_handler(TimeoutError)
    async def database(request: Request, error: Exception) -> JSONResponse:
        return note(request, no_database(error)).response()
