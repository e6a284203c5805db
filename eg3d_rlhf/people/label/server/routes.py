"""Defines the routes under /api: those of the label page, and those of the admin page."""

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
from eg3d_rlhf.people.label.server.models import RequestError
from eg3d_rlhf.people.label.server.options import AppOptions
from eg3d_rlhf.people.label.server.served_shapes import Addresses, PreparedShapes, respond
from eg3d_rlhf.people.label.store import Store
from eg3d_rlhf.people.label.store_labels import export_labels, export_unpaired

IMMUTABLE = "private, max-age=31536000, immutable"  # an address always gives the same file
KEEP = 3.0  # least time in seconds before a quality report is computed again


@dataclass(frozen=True, kw_only=True)
class Context:
    """Parts of one server, which its routes share."""

    options: AppOptions
    store: Store
    campaign: StoredCampaign
    identities: Identities
    shapes: PreparedShapes  # state of the preparation
    addresses: Addresses  # addresses of shapes, different in each assignment
    files: dict  # name -> app.StaticFile
    page_version: str  # changes with every file of the page; stored in judgements


# async, because it does not block: a plain function would run in a thread
async def identity_of(request: Request) -> Identity:
    """Return the identity that the checks of requests have determined."""
    # Set by RequestChecks, which has rejected all requests without an identity.
    return request.scope["state"]["identity"]


async def admin_of(identity: Annotated[Identity, Depends(identity_of)]) -> Identity:
    """Return the identity of an admin. Raises: RequestError 403."""
    if not identity.admin:
        raise RequestError(
            403,
            "Only admins may see this.",
            "Log in with an admin's token: tools/label.py add-annotator NAME --admin.",
        )
    return identity


Requester = Annotated[Identity, Depends(identity_of)]
Admin = Annotated[Identity, Depends(admin_of)]


def _shown(context: Context, assignment: str, left: str, right: str) -> dict:
    """Return an assignment as the page gets it: token, addresses of both shapes, prompt."""
    # Annotators never get the store's tokens, which are the same in all assignments.
    first, second = (context.addresses.address(assignment, asset) for asset in (left, right))
    return {
        "assignment": assignment,
        "left": first,
        "right": second,
        "prompt": context.shapes.prompt(left, first),
    }


def _asset(context: Context, address: str) -> str:
    """Return the store's token of the shape at an address. Raises: RequestError 404."""
    # Unknown and foreign addresses give the same answer, so that addresses cannot be tested.
    asset = context.addresses.asset(address)
    if asset is None or not context.shapes.known(asset):
        raise RequestError(404, "There is no such shape.", "Request /api/assignments again.")
    return asset


def _progress(context: Context, requester: Identity) -> dict:
    """Return the progress of the client as JSON values."""
    return asdict(context.store.progress(context.campaign.id, requester.annotator.id, context.shapes.lost))


def _check_may_answer(context: Context, requester: Identity) -> None:
    """Check that the client may answer: in a blind study, admins may not, because they can see results.

    Raises: RequestError 403.
    """
    if context.shapes.blind and requester.admin:
        raise RequestError(
            403,
            "Admins can see results, so they cannot take part in a blind study.",
            "Use an annotator's token.",
        )


def _work(router: APIRouter, context: Context) -> None:
    """Add the routes that give work to the label page."""

    @router.get("/session")
    def session(requester: Requester):
        """Return the client's name and role, and the settings that the page needs."""
        settings = context.campaign.settings
        return JSONResponse(
            {
                "annotator": requester.annotator.name,
                "role": "admin" if requester.admin else "annotator",
                "csrf": requester.csrf,
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
    def assignments(requester: Requester, count: Annotated[int, Query(ge=1, le=10)] = 3):
        """Return the next pairs, open ones first. If there are none and `waiting` is false, the
        annotator is finished.
        """
        _check_may_answer(context, requester)
        shapes = context.shapes
        # Read before the assignments: a shape that becomes ready in between must not look like the end.
        settled = shapes.settled()
        pairs = context.store.assignments(
            context.campaign.id, requester.annotator.id, count, shapes.ready, shapes.lost
        )
        progress = _progress(context, requester)
        # None is open, but trials are left whose shapes are not prepared yet.
        waiting = (
            not pairs
            and not settled
            and (progress["done"] < progress["total"] or progress["training_left"] > 0)
        )
        # `training` is the only property of a pair that the page gets.
        shown = [{**_shown(context, p.token, p.left, p.right), "training": p.training} for p in pairs]
        # Training pairs with a shape that cannot be prepared are skipped; the page shows their number.
        training = context.store.training(context.campaign.id)
        return JSONResponse(
            {
                "assignments": shown,
                "progress": progress,
                "waiting": waiting,
                "practice_lost": sum(
                    shapes.lost(pair.first) or shapes.lost(pair.second) for pair in training
                ),
                "preparation": shapes.progress(),
            }
        )

    @router.get("/answers")
    def answers(
        requester: Requester,
        before: Annotated[int | None, Query(ge=0, le=2**31 - 1)] = None,
        count: Annotated[int, Query(ge=1, le=50)] = 20,
    ):
        """Return the client's own answers without training pairs, newest assignment first. /api/undo with the
        assignment opens one again.
        """
        _check_may_answer(context, requester)
        # One more than requested shows whether there are further answers.
        rows = context.store.answers(context.campaign.id, requester.annotator.id, before, count + 1)
        shown = [
            {**asdict(answer), **_shown(context, answer.assignment, answer.left, answer.right)}
            for answer in rows[:count]
        ]
        return {"answers": shown, "more": len(rows) > count}


def label_api(context: Context) -> APIRouter:
    """Make the router of the label page."""
    router = APIRouter(prefix="/api")
    _work(router, context)

    @router.get("/shapes/{address}", response_class=Response)
    def shape(address: models.AssetPath, request: Request, requester: Requester) -> Response:
        """Return the surface of a shape ("SHP1"), or an asset: GLB or Gaussian splats ("GSP1"), all
        gzip-encoded, or a video, of which parts may be requested.
        """
        shapes = context.shapes
        asset = _asset(context, address)
        # In a study nothing is served before all shapes are ready.
        if not shapes.ready(asset):
            raise RequestError(
                503, "Shapes are being prepared.", "Try again in a few seconds.", {"Retry-After": "5"}
            )
        # The address identifies the content, so it can serve as ETag, and browsers need not ask again.
        headers = {"ETag": f'"{address}"', "Cache-Control": IMMUTABLE}
        if request.headers.get("if-none-match") == headers["ETag"]:
            return Response(None, 304, headers)
        return respond(shapes.path(asset), request, headers)

    @router.get(
        "/prompts/{address}", response_class=Response, responses={200: {"content": {"image/webp": {}}}}
    )
    def prompt(address: models.AssetPath, requester: Requester) -> Response:
        """Return the image that an asset was generated from."""
        path = context.shapes.prompt_image(_asset(context, address))
        if path is None:
            raise RequestError(404, "There is no such image.", "Request /api/assignments again.")
        return Response(
            path.read_bytes(),
            media_type="image/webp",
            headers={"ETag": f'"{address}"', "Cache-Control": IMMUTABLE},
        )

    @router.get(
        "/renders/{address}", response_class=Response, responses={200: {"content": {"image/png": {}}}}
    )
    def render(address: models.AssetPath, requester: Requester) -> Response:
        """Return the render of a shape's latent if the campaign shows renders; never in a study."""
        # A render could reveal the generator.
        shown = context.campaign.settings.show_render and not context.shapes.blind
        asset = _asset(context, address)
        path = context.options.cache.render(context.shapes.shapes[asset]) if shown else None
        if path is None:
            raise RequestError(404, "There is no such image.", "Use a campaign that shows renders.")
        return FileResponse(
            path, media_type="image/png", headers={"ETag": f'"{address}"', "Cache-Control": IMMUTABLE}
        )

    _judgements(router, context)
    return router


@contextmanager
def _store_errors(conflict: str, remedy: str, correct: str) -> Iterator[None]:
    """Convert errors of the store to responses: 404, 409 or 422.

    Args:
        conflict: text of a 409.
        remedy: what to do after a 409.
        correct: what to do after a 422.
    """
    try:
        yield
    except LookupError:
        raise RequestError(
            404, "This annotator has no such assignment.", "Request /api/assignments again."
        ) from None
    except ConflictError:
        raise RequestError(409, conflict, remedy) from None
    except ValueError as error:
        raise RequestError(422, str(error), correct) from None


def _judgements(router: APIRouter, context: Context) -> None:
    """Add the routes for answers and undos."""

    @router.post("/judgements", status_code=201)
    def submit(body: models.Judgement, requester: Requester):
        """Store an answer. It is on the disk when this responds. Sending it again with the same key
        changes nothing.
        """
        _check_may_answer(context, requester)
        # The store's `Answer` has an enumeration and a tuple where JSON has texts and a list.
        values = body.model_dump() | {"choice": Choice(body.choice), "views": tuple(body.views)}
        conflict = "This assignment is answered already, or another answer has the same key."
        with _store_errors(
            conflict, "Undo that answer first, or continue with the next pair.", "Correct the answer."
        ):
            submitted = context.store.submit(context.campaign.id, requester.annotator.id, Answer(**values))
        training = (
            {"correct": submitted.correct, "better": submitted.better, "explanation": submitted.explanation}
            if submitted.training
            else None
        )
        names = {"left": submitted.reveal[0], "right": submitted.reveal[1]} if submitted.reveal else None
        reply = {
            "accepted": True,
            "duplicate": submitted.duplicate,
            "training": training,
            "reveal": names,
            "progress": _progress(context, requester),
        }
        # 201 Created only for the first of several equal requests.
        return JSONResponse(reply, 200 if submitted.duplicate else 201)

    @router.post("/undo")
    def undo(body: models.Undo, requester: Requester):
        """Take an answer back with a further record. Its assignment is open again."""
        _check_may_answer(context, requester)
        with _store_errors(
            "This answer cannot be undone, or another answer has the same key.",
            "Request /api/assignments again.",
            "Correct the key.",
        ):
            token = context.store.undo(context.campaign.id, requester.annotator.id, body.key, body.assignment)
        return JSONResponse({"assignment": token, "progress": _progress(context, requester)})


def admin_api(context: Context) -> APIRouter:
    """Make the router of the admin page. Every route needs an admin."""
    router = APIRouter(prefix="/api/admin", dependencies=[Depends(admin_of)])
    lock = threading.Lock()
    until = 0.0
    report: dict = {}

    @router.get("/quality")
    def quality() -> dict:
        """Return figures about annotators and answers, and the progress of the preparation."""
        nonlocal report, until
        # One thread at a time computes the report, and it is reused for at least ten times as long as that
        # took. So the reports of many open pages take at most a tenth of one thread.
        with lock:
            # After waiting for the lock, another thread may have computed the report.
            if (began := time.monotonic()) >= until:
                report = quality_report(
                    context.store.judgements(context.campaign.settings.name, include_undone=True)
                )
                until = time.monotonic() + max(KEEP, 10 * (time.monotonic() - began))
        return {**report, "preparation": {**context.shapes.progress(), "error": context.shapes.trouble()}}

    @router.get("/openapi.json", include_in_schema=False)
    def description(request: Request) -> JSONResponse:
        """Return the description of the API (OpenAPI)."""
        return JSONResponse(request.app.openapi())

    @router.get("/comments")
    def comments(count: Annotated[int, Query(ge=1, le=1000)] = 200):
        """Return comments of annotators, newest first, without those on answers that were taken back."""
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
        """Return labels in the open label format as CSV or JSON lines, or all judgements without loss."""
        name = {"csv": "labels.csv", "jsonl": "labels.jsonl", "judgements": "judgements.jsonl"}[format]
        # A file and not memory: an export of a large campaign is streamed.
        folder = tempfile.TemporaryDirectory(prefix="eg3d-label-export-")
        path = Path(folder.name) / name
        try:
            single = context.campaign.settings.mode is Mode.SINGLE
            write = (
                export_judgements if format == "judgements" else export_unpaired if single else export_labels
            )
            write(context.store, path, campaign=context.campaign.settings.name)
        # The folder is deleted after any failure, also after a disconnected client.
        except BaseException as error:
            folder.cleanup()
            # A study has no labels, and labels of single shapes have no CSV form.
            if isinstance(error, ValueError):
                raise RequestError(409, str(error), "Request format=judgements.") from None
            raise
        kind = "text/csv" if format == "csv" else "application/x-ndjson"
        # The file is deleted after it was sent.
        return FileResponse(path, media_type=kind, filename=name, background=BackgroundTask(folder.cleanup))

    return router


def _new_access(request: Request, name: str, token: str) -> dict:
    """Return a new token with its link. The link has the address at which the admin has reached the
    server.
    """
    # The Host header was checked, so it can be used in a link.
    link = login_link(f"{request.url.scheme}://{request.headers['host']}", token)
    return {"name": name, "token": token, "link": link, "qr": qr_data(link)}


def _annotators(router: APIRouter, context: Context) -> None:
    """Add the routes that manage annotators."""

    @router.get("/annotators", response_model=list[models.AnnotatorLine])
    def annotators():
        """Return all annotators, revoked ones included."""
        return context.store.annotators()

    @router.post("/annotators", status_code=201)
    def add(body: models.NewAnnotator, request: Request):
        """Add an annotator. The token is returned only this once."""
        try:
            return _new_access(request, body.name, context.store.add_annotator(body.name, body.role))
        except ValueError as error:
            raise RequestError(409, str(error), "Choose another name.") from None

    @router.post("/annotators/token")
    def new_token(body: models.Named, request: Request, requester: Requester):
        """Replace a token, or give a revoked annotator a new one. The old token and all sessions become
        invalid, except the session of the client. Answers stay.
        """
        try:
            return _new_access(
                request, body.name, context.store.new_token(body.name, keep_session=requester.session)
            )
        except ValueError as error:
            raise RequestError(404, str(error), "Request /api/admin/annotators.") from None

    @router.post("/annotators/revoke", response_model=list[models.AnnotatorLine])
    def revoke(body: models.Named, requester: Requester):
        """Withdraw a token and end the annotator's sessions. Returns all annotators."""
        # An admin who revoked herself by mistake could not undo that.
        if body.name == requester.annotator.name:
            raise RequestError(
                409, "You cannot revoke yourself.", "Ask another admin, or run tools/label.py revoke NAME."
            )
        try:
            # On loopback the user of the machine is admin without a token, so no admin must remain.
            context.store.revoke_annotator(body.name, keep_an_admin=context.options.exposed)
        except ConflictError as error:
            raise RequestError(409, str(error), "Add another admin first.") from None
        except ValueError as error:
            raise RequestError(404, str(error), "Request /api/admin/annotators.") from None
        return annotators()
