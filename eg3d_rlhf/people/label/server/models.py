"""Defines the bodies of the API's requests, responses and errors. An error has a reason and a remedy."""

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
    400: "Send a request as the description of the API defines it.",
    404: "Check the address.",
    405: "Use another method.",
    500: "Report this to the person who runs the server. Its output contains the reason.",
}
# Names of annotators: letters and digits of any script, and a few other characters between them.
NAME = r"^\w(?:[\w .@+-]{0,78}[\w.@+-])?$"
Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,128}$")]  # keys and tokens
AssetPath = Annotated[str, Path(pattern=r"^[A-Za-z0-9_-]{1,128}$")]
QuestionName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]{0,31}$")]


class Sent(BaseModel):
    """Body of a request: fields of exactly these types, and no others."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Judgement(Sent):
    """An answer to an assignment."""

    key: Word  # chosen by the page; sending an answer again with its key changes nothing
    assignment: Word
    # the campaign's scale decides which of them are valid
    choice: Literal["left", "right", "tie", "bad", "up", "down", "0", "1", "2", "3", "4", "5", "skip"]
    reason: Literal["broken", "identical", "unsure", "other"] | None = None  # entities.SKIP_REASONS
    milliseconds: Annotated[int, Field(ge=0, le=86_400_000)]  # at most one day
    views: Annotated[list[Annotated[str, Field(pattern=r"^[a-z0-9_-]{1,32}$")]], Field(max_length=64)]
    answered_at: Annotated[float, Field(ge=0, le=1e11)]  # the page's clock, seconds since 1970
    page_version: Annotated[str, Field(pattern=r"^[A-Za-z0-9._+-]{0,64}$")]
    # answers to the campaign's further questions
    votes: Annotated[dict[QuestionName, Literal["left", "right", "tie"]], Field(max_length=8)] = {}
    # printable: eg3d_rlhf.people.label.judgements checks that
    comment: Annotated[str, Field(min_length=1, max_length=500)] | None = None

    @model_validator(mode="after")
    def _reason_of_skips(self):
        if (self.choice == Choice.SKIP) != (self.reason is not None):
            raise ValueError("a skip needs a reason, and only a skip has one")
        return self


class Undo(Sent):
    """Takes back the last answer, or the answer to `assignment`."""

    key: Word
    assignment: Word | None = None


class Named(Sent):
    """Name of an annotator."""

    name: Annotated[str, Field(pattern=NAME)]


class NewAnnotator(Named):
    """Annotator to be added."""

    role: Literal["annotator", "admin"] = "annotator"


class AnnotatorLine(BaseModel):
    """Annotator as admins see her; times are in seconds since 1970."""

    name: str
    role: str
    created: float
    revoked: float | None


@dataclass(eq=False)
class RateFilter(logging.Filter):
    """Filter that passes `burst` records with the same text in a period, and later logs how many it has
    dropped.
    """

    burst: int = 5  # records per period
    period: float = 60.0  # seconds
    _seen: dict[tuple, list] = field(default_factory=dict)  # text -> [start of the period, count]

    def filter(self, record: logging.LogRecord) -> bool:
        """Return True for a record that is to be logged."""
        # The text before its arguments are inserted, so that records that differ in them only are counted
        # together.
        seen = self._seen.setdefault((record.levelno, str(record.msg)), [time.monotonic(), 0])
        # A new period begins. The record reports how many were dropped in the last one.
        if time.monotonic() - seen[0] > self.period:
            if seen[1] > self.burst:
                record.msg = f"{record.msg} (and {seen[1] - self.burst} more since the last line like this)"
            seen[:] = time.monotonic(), 0
        seen[1] += 1
        return seen[1] <= self.burst


RATE_FILTER = RateFilter()
LOGGER.addFilter(RATE_FILTER)


class RequestError(Exception):
    """Error of a request that is answered with a status, a reason and a remedy."""

    def __init__(self, status: int, error: str, remedy: str, headers: Mapping[str, str] | None = None):
        super().__init__(error)
        self.status = status
        self.error = error
        self.remedy = remedy
        # A copy: handlers add headers of their own.
        self.headers = dict(headers or {})

    def response(self) -> JSONResponse:
        """Return the error as JSON."""
        return JSONResponse({"error": self.error, "remedy": self.remedy}, self.status, self.headers)


class AccessRevoked(RequestError):
    """Error 401 of an annotator whose access was revoked. Only a client with her token, or with a session
    that it has opened, learns of it.
    """

    def __init__(self):
        super().__init__(
            401,
            "Your access was revoked.",
            "Ask the person who gave you the token.",
            {"WWW-Authenticate": "Bearer"},
        )


def note(request: Request, error: RequestError) -> RequestError:
    """Store the reason for the access log. Returns the error."""
    request.scope.setdefault("state", {})["refused"] = error.error
    return error


def too_many(seconds: float) -> RequestError:
    """Return error 429 with the seconds to wait."""
    # Retry-After has whole seconds.
    wait = max(1, math.ceil(seconds))
    return RequestError(
        429, "Too many requests.", f"Wait {wait} seconds and try again.", {"Retry-After": str(wait)}
    )


def no_database(error: Exception) -> RequestError:
    """Return error 503, and log the reason without the statement and its values, which may contain
    secrets.
    """
    # `orig` is the driver's error; SQLAlchemy's own text contains statement and values.
    reason = str(getattr(error, "orig", None) or error).strip().splitlines() or [type(error).__name__]
    LOGGER.error("database: %s", reason[0])
    return RequestError(503, "The database did not answer.", "Try again in a moment.", {"Retry-After": "2"})


def add_handlers(app: FastAPI) -> None:
    """Convert every error of the application to the response of a `RequestError`."""

    @app.exception_handler(RequestError)
    async def request_error(request: Request, error: RequestError) -> JSONResponse:
        return note(request, error).response()

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        # Errors of FastAPI itself, such as an unknown address.
        remedy = REMEDIES.get(error.status_code, REMEDIES[400])
        return note(
            request, RequestError(error.status_code, str(error.detail), remedy, error.headers)
        ).response()

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        # Fields and reasons of at most five mistakes. Values are left out: they may be long or hostile.
        mistakes = [
            f"{'.'.join(str(part) for part in item['loc'][:4])[:60]}: {item['msg'][:120]}"
            for item in error.errors()[:5]
        ]
        rejection = RequestError(
            422, f"The request is invalid: {'; '.join(mistakes)}.", "Correct these fields."
        )
        return note(request, rejection).response()

    @app.exception_handler(DBAPIError)
    @app.exception_handler(TimeoutError)
    async def database(request: Request, error: Exception) -> JSONResponse:
        return note(request, no_database(error)).response()
