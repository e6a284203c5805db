"""What the label page asks: its session, pairs, shapes; and what it sends: judgements and undos."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Annotated

from fastapi import APIRouter, Query, Request
from fastapi.responses import FileResponse, JSONResponse, Response

from eg3d_rlhf.label.records import SKIP_REASONS, Answer, Choice
from eg3d_rlhf.label.server import models
from eg3d_rlhf.label.server.context import Context, Who
from eg3d_rlhf.label.server.errors import Refusal
from eg3d_rlhf.label.server.identity import Identity
from eg3d_rlhf.label.store import ConflictError

_ERRORS = {status: {"model": models.Error} for status in (400, 401, 403, 404, 409, 413, 415, 421, 422, 429, 503)}
IMMUTABLE = "private, max-age=31536000, immutable"


def label_api(context: Context) -> APIRouter:
    """The router."""
    router = APIRouter(prefix="/api", responses=_ERRORS)
    _session(router, context)
    _assignments(router, context)
    _shapes(router, context)
    _judgements(router, context)
    return router


def _progress(context: Context, who: Identity) -> dict:
    return asdict(context.store.progress(context.campaign.id, who.annotator.id))


def _judge(context: Context, who: Identity) -> None:
    """Refuse, in a study, answers of those who can see results."""
    if context.blind and who.admin:
        raise Refusal(403, "Admins see results, so they cannot take part in a blind study.", "Use an annotator's token.")


def _session(router: APIRouter, context: Context) -> None:
    @router.get("/session", response_model=models.Session)
    def session(who: Who):
        """The page's session."""
        settings = context.campaign.settings
        return JSONResponse({
            "annotator": who.annotator.name, "role": "admin" if who.admin else "annotator", "csrf": who.csrf, "mode": settings.mode.value,
            "title": context.options.title, "show_render": settings.show_render and not context.blind,
            "page_version": context.page_version, "skip_reasons": list(SKIP_REASONS), "exposed": context.options.exposed,
        })  # fmt: skip


def _assignments(router: APIRouter, context: Context) -> None:
    @router.get("/assignments", response_model=models.Assignments)
    def assignments(who: Who, count: Annotated[int, Query(ge=1, le=10)] = 3):
        """The next pairs; those that are open come first. None and not waiting: finished."""
        _judge(context, who)
        shelf, settled = context.shelf, context.shelf.settled()
        pairs = context.store.assignments(context.campaign.id, who.annotator.id, count, shelf.ready)
        progress = _progress(context, who)
        waiting = not pairs and not settled and (progress["done"] < progress["total"] or progress["training_left"] > 0)
        found = [{"assignment": p.token, "training": p.training, "left": p.left, "right": p.right} for p in pairs]
        return JSONResponse({"assignments": found, "progress": progress, "waiting": waiting, "preparation": shelf.progress()})


def _shapes(router: APIRouter, context: Context) -> None:
    binary = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}

    @router.get("/shapes/{asset}", response_class=Response, responses={200: {"content": binary}, 304: {"description": "Not Modified"}})
    def shape(asset: models.AssetPath, request: Request, who: Who) -> Response:
        """A shape's surface, quantised and indexed ("SHP1"), gzip-encoded."""
        shelf = context.shelf
        if not shelf.known(asset):
            raise Refusal(404, "No such shape.", "Ask for /api/assignments again.")
        if not shelf.ready(asset):
            raise Refusal(503, "Shapes are being prepared.", "Try again in a few seconds.", {"Retry-After": "5"})
        headers = {"ETag": f'"{asset}"', "Cache-Control": IMMUTABLE}
        if request.headers.get("if-none-match") == headers["ETag"]:
            return Response(None, 304, headers)
        return Response(shelf.body(asset), media_type="application/octet-stream", headers={**headers, "Content-Encoding": "gzip"})

    @router.get("/renders/{asset}", response_class=Response, responses={200: {"content": {"image/png": {}}}})
    def render(asset: models.AssetPath, who: Who) -> Response:
        """The picture of a shape, where the campaign shows it; never in a study."""
        shape = context.shelf.shape(asset) if context.campaign.settings.show_render and not context.blind else None
        path = context.options.cache.render(shape) if shape is not None else None
        if path is None:
            raise Refusal(404, "No such picture.", "Pictures are shown where the campaign allows them.")
        return FileResponse(path, media_type="image/png", headers={"ETag": f'"{asset}"', "Cache-Control": IMMUTABLE})


@contextmanager
def _refusals(conflict: str, remedy: str, correct: str) -> Iterator[None]:
    """What the store refuses, as responses: 404, 409 (`conflict` and its `remedy`) or 422 (`correct` says how)."""
    try:
        yield
    except LookupError:
        raise Refusal(404, "No such assignment of this annotator.", "Ask for /api/assignments again.") from None
    except ConflictError:
        raise Refusal(409, conflict, remedy) from None
    except ValueError as error:
        raise Refusal(422, str(error), correct) from None


def _judgements(router: APIRouter, context: Context) -> None:
    @router.post("/judgements", status_code=201, response_model=models.Accepted, responses={200: {"model": models.Accepted}})
    def judge(body: models.Judgement, who: Who):
        """Keep an answer. It is kept for good once this responds; sent again with the same key, nothing changes."""
        _judge(context, who)
        values = body.model_dump() | {"choice": Choice(body.choice), "views": tuple(body.views)}
        with _refusals("This assignment is answered already.", "Undo that answer first, or go on.", "Correct the answer."):
            kept = context.store.submit(context.campaign.id, who.annotator.id, Answer(**values))
        lesson = {"correct": kept.correct, "explanation": kept.explanation} if kept.training else None
        found = {"accepted": True, "duplicate": kept.duplicate, "training": lesson, "progress": _progress(context, who)}
        return JSONResponse(found, 200 if kept.duplicate else 201)

    @router.post("/undo", response_model=models.Undone)
    def undo(body: models.Undo, who: Who):
        """Take an answer back by a further record; its assignment is open again."""
        _judge(context, who)
        with _refusals("This cannot be undone, or the key was an answer's.", "Ask for /api/assignments again.", "Correct the key."):
            token = context.store.undo(context.campaign.id, who.annotator.id, body.key, body.assignment)
        return JSONResponse({"assignment": token, "progress": _progress(context, who)})
