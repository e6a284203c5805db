"""Errors as the server sends them: a status, what is wrong and what to do, as JSON."""

import logging
import math
from collections.abc import Mapping

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from sqlalchemy.exc import DBAPIError, TimeoutError
from starlette.exceptions import HTTPException

LOGGER = logging.getLogger("eg3d_rlhf.label.server")
_REMEDIES = {
    400: "Send what the application's description asks for.",
    404: "Check the address.",
    405: "Use another method.",
    500: "Tell the person who runs the server; the reason is in its output.",
}


class Refusal(Exception):
    """A request that is not answered as asked."""

    def __init__(self, status: int, error: str, remedy: str, headers: Mapping[str, str] | None = None):
        super().__init__(error)
        self.status, self.error, self.remedy, self.headers = status, error, remedy, dict(headers or {})

    def response(self) -> JSONResponse:
        """The refusal as a response."""
        return JSONResponse({"error": self.error, "remedy": self.remedy}, self.status, self.headers)


def note(request: Request, refusal: Refusal) -> Refusal:
    """Leave the reason for the access log; returns the refusal."""
    request.scope.setdefault("state", {})["refused"] = refusal.error
    return refusal


def too_many(seconds: float) -> Refusal:
    """429 with the seconds to wait."""
    wait = max(1, math.ceil(seconds))
    return Refusal(429, "Too many requests.", f"Wait {wait} seconds and try again.", {"Retry-After": str(wait)})


def failed() -> Refusal:
    """500, with nothing about the reason."""
    return Refusal(500, "The server made a mistake.", _REMEDIES[500])


def add_handlers(app: FastAPI) -> None:
    """Make every error of the application a `Refusal`'s response."""

    @app.exception_handler(Refusal)
    async def refused(request: Request, error: Refusal) -> JSONResponse:
        return note(request, error).response()

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        remedy = _REMEDIES.get(error.status_code, _REMEDIES[400])
        return note(request, Refusal(error.status_code, str(error.detail), remedy, error.headers)).response()

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        refusal = Refusal(422, f"Expected a valid request, got: {_said(error)}.", "Correct the fields that are named.")
        return note(request, refusal).response()

    @app.exception_handler(DBAPIError)
    @app.exception_handler(TimeoutError)
    async def database(request: Request, error: Exception) -> JSONResponse:
        LOGGER.error("database: %s", error)
        refusal = Refusal(503, "The database did not answer.", "Try again in a moment.", {"Retry-After": "2"})
        return note(request, refusal).response()


def _said(error: RequestValidationError) -> str:
    """Fields and reasons of at most five mistakes; never the values, which may be long or hostile."""
    said = [f"{'.'.join(str(part) for part in item['loc'][:4])[:60]}: {item['msg'][:120]}" for item in error.errors()[:5]]
    return "; ".join(said)
