"""What the admin page asks: quality while it grows, annotators and their tokens, exports."""

import tempfile
import threading
import time
from pathlib import Path
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import FileResponse, JSONResponse
from starlette.background import BackgroundTask

from eg3d_rlhf.label.exchange import export_judgements, export_labels
from eg3d_rlhf.label.quality import quality_report
from eg3d_rlhf.label.server import models
from eg3d_rlhf.label.server.context import Context, admin_of
from eg3d_rlhf.label.server.errors import Refusal

KEEP = 3.0  # seconds for which a report is not computed again
_ERRORS = {status: {"model": models.Error} for status in (400, 401, 403, 404, 409, 413, 415, 421, 422, 429, 503)}


def admin_api(context: Context) -> APIRouter:
    """The router; every route of it needs an admin."""
    router = APIRouter(prefix="/api/admin", dependencies=[Depends(admin_of)], responses=_ERRORS)
    report = _Report(context)

    @router.get("/quality")
    def quality() -> dict:
        """Quality of annotators and answers, and how far the shapes are."""
        return {**report.get(), "preparation": {**context.shelf.progress(), "error": context.shelf.trouble()}}

    @router.get("/openapi.json", include_in_schema=False)
    def description(request: Request) -> JSONResponse:
        return JSONResponse(request.app.openapi())

    _annotators(router, context)
    _export(router, context)
    return router


def _annotators(router: APIRouter, context: Context) -> None:
    @router.get("/annotators", response_model=list[models.AnnotatorLine])
    def annotators():
        """All annotators, revoked ones included."""
        found = context.store.annotators()
        return [{"name": a.name, "role": a.role, "created": a.created, "revoked": a.revoked} for a in found]

    @router.post("/annotators", status_code=201, response_model=models.NewToken)
    def add(body: models.NewAnnotator):
        """Make an annotator; the token is shown this once."""
        try:
            return {"name": body.name, "token": context.store.add_annotator(body.name, body.role)}
        except ValueError as error:
            raise Refusal(409, str(error), "Choose another name.") from None

    @router.post("/annotators/revoke", response_model=list[models.AnnotatorLine])
    def revoke(body: models.Named):
        """Withdraw a token; the annotator's sessions end too. Returns all annotators."""
        try:
            context.store.revoke_annotator(body.name)
        except (ValueError, LookupError) as error:
            raise Refusal(404, str(error), "Ask for /api/admin/annotators.") from None
        return annotators()


def _export(router: APIRouter, context: Context) -> None:
    @router.get("/export", response_class=FileResponse, responses={200: {"content": {"text/csv": {}, "application/x-ndjson": {}}}})
    def export(format: Annotated[Literal["csv", "jsonl", "judgements"], Query()] = "jsonl"):
        """Labels in the open form, as CSV or JSON lines, or all judgements without loss."""
        name = {"csv": "labels.csv", "jsonl": "labels.jsonl", "judgements": "judgements.jsonl"}[format]
        folder = tempfile.TemporaryDirectory(prefix="eg3d-label-export-")
        path = Path(folder.name) / name
        try:
            (export_judgements if format == "judgements" else export_labels)(context.store, path, campaign=context.campaign.settings.name)
        except BaseException as error:
            folder.cleanup()
            if isinstance(error, ValueError):  # a study holds no labels
                raise Refusal(409, str(error), "Ask for format=judgements.") from None
            raise
        kind = "text/csv" if format == "csv" else "application/x-ndjson"
        return FileResponse(path, media_type=kind, filename=name, background=BackgroundTask(folder.cleanup))


class _Report:
    """The quality report, computed by one thread at a time and kept for a moment: it may take longer than a submission may wait."""

    def __init__(self, context: Context):
        self._context, self._lock = context, threading.Lock()
        self._found: dict = {}
        self._until = 0.0

    def get(self) -> dict:
        """The report."""
        with self._lock:
            if time.monotonic() >= self._until:
                began = time.monotonic()
                rows = self._context.store.judgements(self._context.campaign.settings.name, include_undone=True)
                self._found = quality_report(rows)
                self._until = time.monotonic() + max(KEEP, 10 * (time.monotonic() - began))
            return self._found
