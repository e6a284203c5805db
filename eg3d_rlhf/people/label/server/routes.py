"""The routes under /api: what the label page asks and sends, and what the admin page asks."""

import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import FileResponse, JSONResponse, Response
from starlette.background import BackgroundTask

from eg3d_rlhf.people.label.access import login_link, qr_data
from eg3d_rlhf.people.label.archive import export_judgements
from eg3d_rlhf.people.label.entities import (
    SKIP_REASONS,
    Answer,
    Choice,
    ConflictError,
    Mode,
    StoredCampaign,
    parse_questions,
)
from eg3d_rlhf.people.label.quality import quality_report
from eg3d_rlhf.people.label.server import models
from eg3d_rlhf.people.label.server.identity import Identities, Identity
from eg3d_rlhf.people.label.server.models import Refusal
from eg3d_rlhf.people.label.server.options import AppOptions
from eg3d_rlhf.people.label.server.served_shapes import Addresses, PreparedShapes, respond
from eg3d_rlhf.people.label.store import Store
from eg3d_rlhf.people.label.store_labels import export_labels, export_unpaired

IMMUTABLE = "private, max-age=31536000, immutable"
KEEP = 3.0  # seconds for which a quality report is not computed again


@dataclass(frozen=True, kw_only=True)
class Context:
    """One server's parts."""

    options: AppOptions
    store: Store
    campaign: StoredCampaign
    identities: Identities
    shapes: PreparedShapes
    addresses: Addresses
    files: dict  # name -> app.StaticFile
    page_version: str  # changes with any file of the page; judgements name it


async def identity_of(request: Request) -> Identity:  # async: nothing to wait for, and no thread
    """The identity that the gate has found."""
    return request.scope["state"]["identity"]


async def admin_of(identity: Annotated[Identity, Depends(identity_of)]) -> Identity:
    """The identity of an admin. Raises: Refusal 403."""
    if not identity.admin:
        raise Refusal(
            403,
            "Only admins may see this.",
            "Log in with an admin's token: tools/label.py add-annotator NAME --admin.",
        )
    return identity


Who = Annotated[Identity, Depends(identity_of)]
Admin = Annotated[Identity, Depends(admin_of)]


def _shown(context: Context, assignment: str, left: str, right: str) -> dict:
    first, second = (context.addresses.of(assignment, asset) for asset in (left, right))
    return {
        "assignment": assignment,
        "left": first,
        "right": second,
        "prompt": context.shapes.prompt(left, first),
    }


def _asset(context: Context, address: str) -> str:
    """The store's token of the shape at an address. Raises: Refusal 404."""
    asset = context.addresses.asset(address)
    if asset is None or not context.shapes.known(asset):
        raise Refusal(404, "No such shape.", "Ask for /api/assignments again.")
    return asset


def _progress(context: Context, who: Identity) -> dict:
    return asdict(context.store.progress(context.campaign.id, who.annotator.id, context.shapes.lost))


def _judge(context: Context, who: Identity) -> None:
    """Refuse, in a study, answers of those who can see results."""
    if context.shapes.blind and who.admin:
        raise Refusal(
            403, "Admins see results, so they cannot take part in a blind study.", "Use an annotator's token."
        )


def _work(router: APIRouter, context: Context) -> None:
    @router.get("/session")
    def session(who: Who):
        """The page's session."""
        settings = context.campaign.settings
        return JSONResponse(
            {
                "annotator": who.annotator.name,
                "role": "admin" if who.admin else "annotator",
                "csrf": who.csrf,
                "mode": settings.mode.value,
                "scale": settings.scale,
                "title": context.options.title,
                "show_render": settings.show_render and not context.shapes.blind,
                "page_version": context.page_version,
                "skip_reasons": list(SKIP_REASONS),
                "exposed": context.options.exposed,
                "both_bad": settings.both_bad,
                "questions": [asdict(question) for question in parse_questions(settings.questions)],
                "reveal": settings.reveal,
                "up": settings.extra.get("up", "y"),
                "view": settings.view,
            }
        )

    @router.get("/assignments")
    def assignments(who: Who, count: Annotated[int, Query(ge=1, le=10)] = 3):
        """The next pairs; those that are open come first. None and not waiting: finished."""
        _judge(context, who)
        shapes = context.shapes
        settled = shapes.settled()
        pairs = context.store.assignments(
            context.campaign.id, who.annotator.id, count, shapes.ready, shapes.lost
        )
        progress = _progress(context, who)
        waiting = (
            not pairs
            and not settled
            and (progress["done"] < progress["total"] or progress["training_left"] > 0)
        )
        shown = [{**_shown(context, p.token, p.left, p.right), "training": p.training} for p in pairs]
        practice = context.store.training(context.campaign.id)
        return JSONResponse(
            {
                "assignments": shown,
                "progress": progress,
                "waiting": waiting,
                "practice_lost": sum(
                    shapes.lost(pair.first) or shapes.lost(pair.second) for pair in practice
                ),
                "preparation": shapes.progress(),
            }
        )

    @router.get("/answers")
    def answers(
        who: Who,
        before: Annotated[int | None, Query(ge=0, le=2**31 - 1)] = None,
        count: Annotated[int, Query(ge=1, le=50)] = 20,
    ):
        """One's own answers, practice aside: the pair that was handed out last first. /api/undo by assignment
        opens one again.
        """
        _judge(context, who)
        rows = context.store.answers(context.campaign.id, who.annotator.id, before, count + 1)
        shown = [
            {**asdict(answer), **_shown(context, answer.assignment, answer.left, answer.right)}
            for answer in rows[:count]
        ]
        return {"answers": shown, "more": len(rows) > count}


def label_api(context: Context) -> APIRouter:
    """The router."""
    router = APIRouter(prefix="/api")
    _work(router, context)

    @router.get("/shapes/{address}", response_class=Response)
    def shape(address: models.AssetPath, request: Request, who: Who) -> Response:
        """A shape's surface ("SHP1"), or an asset: a GLB or Gaussians ("GSP1"), gzip-encoded all; or a video,
        of which parts may be had.
        """
        shapes = context.shapes
        asset = _asset(context, address)
        if not shapes.ready(asset):
            raise Refusal(
                503, "Shapes are being prepared.", "Try again in a few seconds.", {"Retry-After": "5"}
            )
        headers = {"ETag": f'"{address}"', "Cache-Control": IMMUTABLE}
        if request.headers.get("if-none-match") == headers["ETag"]:
            return Response(None, 304, headers)
        return respond(shapes.path(asset), request, headers)

    @router.get(
        "/prompts/{address}", response_class=Response, responses={200: {"content": {"image/webp": {}}}}
    )
    def prompt(address: models.AssetPath, who: Who) -> Response:
        """The picture that an asset was made from."""
        path = context.shapes.prompt_picture(_asset(context, address))
        if path is None:
            raise Refusal(404, "No such picture.", "Ask for /api/assignments again.")
        return Response(
            path.read_bytes(),
            media_type="image/webp",
            headers={"ETag": f'"{address}"', "Cache-Control": IMMUTABLE},
        )

    @router.get(
        "/renders/{address}", response_class=Response, responses={200: {"content": {"image/png": {}}}}
    )
    def render(address: models.AssetPath, who: Who) -> Response:
        """The picture of a shape, where the campaign shows it; never in a study."""
        shown = context.campaign.settings.show_render and not context.shapes.blind
        asset = _asset(context, address)
        path = context.options.cache.render(context.shapes.shapes[asset]) if shown else None
        if path is None:
            raise Refusal(404, "No such picture.", "Pictures are shown where the campaign allows them.")
        return FileResponse(
            path, media_type="image/png", headers={"ETag": f'"{address}"', "Cache-Control": IMMUTABLE}
        )

    _judgements(router, context)
    return router


@contextmanager
def _refusals(conflict: str, remedy: str, correct: str) -> Iterator[None]:
    """What the store refuses, as responses: 404, 409 (`conflict` and its `remedy`) or 422 (`correct` says
    how).
    """
    try:
        yield
    except LookupError:
        raise Refusal(
            404, "No such assignment of this annotator.", "Ask for /api/assignments again."
        ) from None
    except ConflictError:
        raise Refusal(409, conflict, remedy) from None
    except ValueError as error:
        raise Refusal(422, str(error), correct) from None


def _judgements(router: APIRouter, context: Context) -> None:
    @router.post("/judgements", status_code=201)
    def judge(body: models.Judgement, who: Who):
        """Keep an answer. It is kept for good once this responds; sent again with the same key, nothing
        changes.
        """
        _judge(context, who)
        values = body.model_dump() | {"choice": Choice(body.choice), "views": tuple(body.views)}
        conflict = "This assignment is answered already, or the key was another answer's."
        with _refusals(conflict, "Undo that answer first, or go on.", "Correct the answer."):
            kept = context.store.submit(context.campaign.id, who.annotator.id, Answer(**values))
        lesson = (
            {"correct": kept.correct, "better": kept.better, "explanation": kept.explanation}
            if kept.training
            else None
        )
        names = {"left": kept.reveal[0], "right": kept.reveal[1]} if kept.reveal else None
        reply = {
            "accepted": True,
            "duplicate": kept.duplicate,
            "training": lesson,
            "reveal": names,
            "progress": _progress(context, who),
        }
        return JSONResponse(reply, 200 if kept.duplicate else 201)

    @router.post("/undo")
    def undo(body: models.Undo, who: Who):
        """Take an answer back by a further record; its assignment is open again."""
        _judge(context, who)
        with _refusals(
            "This cannot be undone, or the key was an answer's.",
            "Ask for /api/assignments again.",
            "Correct the key.",
        ):
            token = context.store.undo(context.campaign.id, who.annotator.id, body.key, body.assignment)
        return JSONResponse({"assignment": token, "progress": _progress(context, who)})


def admin_api(context: Context) -> APIRouter:
    """The router; every route of it needs an admin."""
    router = APIRouter(prefix="/api/admin", dependencies=[Depends(admin_of)])
    lock = threading.Lock()
    until = 0.0
    kept: dict = {}

    @router.get("/quality")
    def quality() -> dict:
        """Quality of annotators and answers, and how far the shapes are."""
        nonlocal kept, until
        # one thread at a time computes it, and it is kept for a moment: it may take longer than a submission
        # may wait
        with lock:
            if (began := time.monotonic()) >= until:
                kept = quality_report(
                    context.store.judgements(context.campaign.settings.name, include_undone=True)
                )
                until = time.monotonic() + max(KEEP, 10 * (time.monotonic() - began))
        return {**kept, "preparation": {**context.shapes.progress(), "error": context.shapes.trouble()}}

    @router.get("/openapi.json", include_in_schema=False)
    def description(request: Request) -> JSONResponse:
        return JSONResponse(request.app.openapi())

    @router.get("/comments")
    def comments(count: Annotated[int, Query(ge=1, le=1000)] = 200):
        """What annotators remarked, newest first; remarks of answers that were taken back are left out."""
        rows = context.store.comments(context.campaign.id, count)
        return [
            {
                "annotator": row.annotator,
                "received": row.received_at,
                "choice": row.choice,
                "comment": row.comment,
            }
            for row in rows
        ]

    _annotators(router, context)

    @router.get(
        "/export",
        response_class=FileResponse,
        responses={200: {"content": {"text/csv": {}, "application/x-ndjson": {}}}},
    )
    def export(format: Annotated[Literal["csv", "jsonl", "judgements"], Query()] = "jsonl"):
        """Labels in the open form, as CSV or JSON lines, or all judgements without loss."""
        name = {"csv": "labels.csv", "jsonl": "labels.jsonl", "judgements": "judgements.jsonl"}[format]
        folder = tempfile.TemporaryDirectory(prefix="eg3d-label-export-")
        path = Path(folder.name) / name
        try:
            single = context.campaign.settings.mode is Mode.SINGLE
            write = (
                export_judgements if format == "judgements" else export_unpaired if single else export_labels
            )
            write(context.store, path, campaign=context.campaign.settings.name)
        except BaseException as error:
            folder.cleanup()
            # a study holds no labels, and those of single shapes are no table
            if isinstance(error, ValueError):
                raise Refusal(409, str(error), "Ask for format=judgements.") from None
            raise
        kind = "text/csv" if format == "csv" else "application/x-ndjson"
        return FileResponse(path, media_type=kind, filename=name, background=BackgroundTask(folder.cleanup))

    return router


def _handed_over(request: Request, name: str, token: str) -> dict:
    """A new token with its link, at the address by which the admin has reached the server."""
    link = login_link(f"{request.url.scheme}://{request.headers['host']}", token)
    return {"name": name, "token": token, "link": link, "qr": qr_data(link)}


def _annotators(router: APIRouter, context: Context) -> None:
    @router.get("/annotators", response_model=list[models.AnnotatorLine])
    def annotators():
        """All annotators, revoked ones included."""
        return context.store.annotators()

    @router.post("/annotators", status_code=201)
    def add(body: models.NewAnnotator, request: Request):
        """Make an annotator; the token is shown this once."""
        try:
            return _handed_over(request, body.name, context.store.add_annotator(body.name, body.role))
        except ValueError as error:
            raise Refusal(409, str(error), "Choose another name.") from None

    @router.post("/annotators/token")
    def new_token(body: models.Named, request: Request, who: Who):
        """Replace a token, or give one to somebody revoked: the old token and sessions end, but the one that
        asks; the work stays.
        """
        try:
            return _handed_over(
                request, body.name, context.store.new_token(body.name, keep_session=who.session)
            )
        except ValueError as error:
            raise Refusal(404, str(error), "Ask for /api/admin/annotators.") from None

    @router.post("/annotators/revoke", response_model=list[models.AnnotatorLine])
    def revoke(body: models.Named, who: Who):
        """Withdraw a token; the annotator's sessions end too. Returns all annotators."""
        if body.name == who.annotator.name:
            raise Refusal(
                409, "You cannot revoke yourself.", "Another admin can, or tools/label.py revoke NAME."
            )
        try:
            context.store.revoke_annotator(body.name, keep_an_admin=context.options.exposed)
        except ConflictError as error:
            raise Refusal(409, str(error), "Make another admin first.") from None
        except ValueError as error:
            raise Refusal(404, str(error), "Ask for /api/admin/annotators.") from None
        return annotators()
