"""Bodies of the requests, responses and errors of the API. An error has a reason and a remedy."""

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
    """Body of a request. Its fields must have exactly the declared types, and further fields are rejected."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Judgement(Sent):
    """Answer to an assignment."""

    key: Word  # text that the page chooses; an answer that is sent again with its key has no further effect
    assignment: Word  # token of the assignment
    # the scale of the campaign decides which of these choices are valid
    choice: Literal["left", "right", "tie", "bad", "up", "down", "0", "1", "2", "3", "4", "5", "skip"]
    reason: Literal["broken", "identical", "unsure", "other"] | None = None  # entities.SKIP_REASONS
    milliseconds: Annotated[int, Field(ge=0, le=86_400_000)]  # at most one day
    views: Annotated[list[Annotated[str, Field(pattern=r"^[a-z0-9_-]{1,32}$")]], Field(max_length=64)]
    # time by the clock of the browser, seconds since 1970
    answered_at: Annotated[float, Field(ge=0, le=1e11)]
    page_version: Annotated[str, Field(pattern=r"^[A-Za-z0-9._+-]{0,64}$")]
    # votes on the further questions of the campaign: name of the question -> vote
    votes: Annotated[dict[QuestionName, Literal["left", "right", "tie"]], Field(max_length=8)] = {}
    # eg3d_rlhf.people.label.judgements also checks that the comment is printable
    comment: Annotated[str, Field(min_length=1, max_length=500)] | None = None

    @model_validator(mode="after")
    def _reason_of_skips(self):
        if (self.choice == Choice.SKIP) != (self.reason is not None):
            raise ValueError("a skip needs a reason, and only a skip has one")
        return self


class Undo(Sent):
    """Request to take back an answer."""

    key: Word  # text that the page chooses; an undo that is sent again with its key has no further effect
    assignment: Word | None = None  # token of the assignment; None: the last answer is taken back


class Named(Sent):
    """Name of an annotator."""

    name: Annotated[str, Field(pattern=NAME)]


class NewAnnotator(Named):
    """Annotator who shall be added."""

    role: Literal["annotator", "admin"] = "annotator"


class AnnotatorLine(BaseModel):
    """Annotator as the admin page shows the person; times are in seconds since 1970."""

    name: str
    role: str
    created: float
    revoked: float | None


@dataclass(eq=False)
class RateFilter(logging.Filter):
    """Filter that limits how often records with the same text are logged.

    In each period it passes `burst` records of a text. The first record of the next period states how many
    were dropped.
    """

    burst: int = 5  # largest number of records of a text in one period
    period: float = 60.0  # length of a period in seconds
    # (level, text) -> [start of the period, number of records in it]
    _periods: dict[tuple, list] = field(default_factory=dict)

    def filter(self, record: logging.LogRecord) -> bool:
        """Return True if a record shall be logged."""
        # record.msg is the text before its arguments are inserted. Records that differ only in their
        # arguments are counted together.
        period_record = self._periods.setdefault((record.levelno, str(record.msg)), [time.monotonic(), 0])
        period_start, record_count = period_record
        # A new period begins. Its first record states how many records were dropped in the previous period.
        if time.monotonic() - period_start > self.period:
            if record_count > self.burst:
                record.msg = (
                    f"{record.msg} (and {record_count - self.burst} more since the last line like this)"
                )
            period_record[:] = time.monotonic(), 0
        period_record[1] += 1
        return period_record[1] <= self.burst


RATE_FILTER = RateFilter()
LOGGER.addFilter(RATE_FILTER)


class RequestError(Exception):
    """Error that the server sends as the response to a request.

    Args:
        status: HTTP status.
        error: reason, a full sentence.
        remedy: instruction that says what to do.
        headers: further headers of the response.
    """

    def __init__(self, status: int, error: str, remedy: str, headers: Mapping[str, str] | None = None):
        super().__init__(error)
        self.status = status
        self.error = error
        self.remedy = remedy
        # a copy, because handlers add headers
        self.headers = dict(headers or {})

    def response(self) -> JSONResponse:
        """Return the response with the reason and the remedy as JSON."""
        return JSONResponse({"error": self.error, "remedy": self.remedy}, self.status, self.headers)


class AccessRevoked(RequestError):
    """Error 401 of an annotator whose access was revoked.

    It is raised only for a client that has the annotator's token, or a session that was opened with it.
    """

    def __init__(self):
        super().__init__(
            401,
            "Your access was revoked.",
            "Ask the person who gave you the token.",
            {"WWW-Authenticate": "Bearer"},
        )


def note(request: Request, error: RequestError) -> RequestError:
    """Store the reason of an error for the access log, and return the error."""
    request.scope.setdefault("state", {})["rejected"] = error.error
    return error


def too_many(seconds: float) -> RequestError:
    """Return the error 429 of a client that sends too many requests.

    Args:
        seconds: time after which the client may send the next request.
    """
    # the header Retry-After is an integer
    wait_seconds = max(1, math.ceil(seconds))
    return RequestError(
        429,
        "Too many requests.",
        f"Wait {wait_seconds} seconds and try again.",
        {"Retry-After": str(wait_seconds)},
    )


def no_database(error: Exception) -> RequestError:
    """Log an error of the database, and return the error 503 for the client.

    The log contains the reason, but not the SQL statement and its values, which may contain secrets.
    """
    # `orig` is the error of the driver. The text of SQLAlchemy's error contains the statement and its values.
    reason_lines = str(getattr(error, "orig", None) or error).strip().splitlines() or [type(error).__name__]
    LOGGER.error("database: %s", reason_lines[0])
    return RequestError(503, "The database did not answer.", "Try again in a moment.", {"Retry-After": "2"})


def add_handlers(app: FastAPI) -> None:
    """Add handlers that convert every error of the application to the response of a `RequestError`."""

    @app.exception_handler(RequestError)
    async def request_error(request: Request, error: RequestError) -> JSONResponse:
        return note(request, error).response()

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        # FastAPI itself raises this error, for example for an unknown path.
        remedy = REMEDIES.get(error.status_code, REMEDIES[400])
        return note(
            request, RequestError(error.status_code, str(error.detail), remedy, error.headers)
        ).response()

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        # The message contains field and reason of at most five mistakes. It contains no values, because they
        # may be long or malicious.
        mistake_texts = [
            f"{'.'.join(str(part) for part in mistake['loc'][:4])[:60]}: {mistake['msg'][:120]}"
            for mistake in error.errors()[:5]
        ]
        rejection = RequestError(
            422,
            f"The request is invalid: {'; '.join(mistake_texts)}.",
            "Send these fields as the description of the API defines them.",
        )
        return note(request, rejection).response()

    @app.exception_handler(DBAPIError)
    @app.exception_handler(TimeoutError)
    async def database(request: Request, error: Exception) -> JSONResponse:
        return note(request, no_database(error)).response()
