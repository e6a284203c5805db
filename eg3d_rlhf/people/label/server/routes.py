"""Routes under /api, which the label page and the admin page use."""

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
from eg3d_rlhf.people.label.active import learning_report
from eg3d_rlhf.people.label.archive import export_judgements
from eg3d_rlhf.people.label.entities import (
    JUDGE,
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
from eg3d_rlhf.people.label.server.gold_checks import GoldReporter, limits_of
from eg3d_rlhf.people.label.server.identity import Identities, Identity
from eg3d_rlhf.people.label.server.models import RequestError
from eg3d_rlhf.people.label.server.options import AppOptions
from eg3d_rlhf.people.label.server.served_shapes import Addresses, PreparedShapes, respond
from eg3d_rlhf.people.label.store import Store
from eg3d_rlhf.people.label.store_labels import export_labels, export_unpaired
from eg3d_rlhf.preferences.provenance import ALL

IMMUTABLE = "private, max-age=31536000, immutable"  # an address always gives the same file
KEEP = 3.0  # shortest time in seconds for which a quality report is reused


@dataclass(frozen=True, kw_only=True)
class Context:
    """Objects of one server that its routes share."""

    options: AppOptions
    store: Store
    campaign: StoredCampaign
    identities: Identities
    shapes: PreparedShapes  # state of the preparation
    addresses: Addresses  # addresses of shapes, which differ between assignments
    files: dict  # files of the page: name -> app.StaticFile
    page_version: str  # text that changes when any file of the page changes; it is stored in judgements


# It does not block, so it is `async`. FastAPI runs other functions in a thread.
async def identity_of(request: Request) -> Identity:
    """Return the identity of the client, which the checks of requests have determined."""
    # RequestChecks has set it, and has rejected all requests without an identity.
    return request.scope["state"]["identity"]


async def admin_of(identity: Annotated[Identity, Depends(identity_of)]) -> Identity:
    """Return the identity of a client who is an admin.

    Raises:
        RequestError: 403 if the client is not an admin.
    """
    if not identity.admin:
        raise RequestError(
            403,
            "Only admins may open this address.",
            "Log in with the token of an admin. Run add-annotator NAME --admin of the command that serves"
            " this page (tools/label.py or tools/study.py) to add one.",
        )
    return identity


Requester = Annotated[Identity, Depends(identity_of)]
Admin = Annotated[Identity, Depends(admin_of)]


def _page_assignment(context: Context, assignment_token: str, left_token: str, right_token: str) -> dict:
    """Return an assignment as the page receives it: its token, the addresses of both shapes, and the prompt.

    Args:
        context: objects of the server.
        assignment_token: token of the assignment.
        left_token: asset token of the shape on the left.
        right_token: asset token of the shape on the right.
    """
    # Asset tokens are the same in all assignments, so annotators receive addresses instead.
    left_address = context.addresses.address(assignment_token, left_token)
    right_address = context.addresses.address(assignment_token, right_token)
    return {
        "assignment": assignment_token,
        "left": left_address,
        "right": right_address,
        "prompt": context.shapes.prompt(left_token, left_address),
    }


def _asset(context: Context, address: str) -> str:
    """Return the asset token of the shape at an address.

    Raises:
        RequestError: 404 if the address is invalid or the shape cannot be prepared.
    """
    # The error is the same for all invalid addresses, so that it contains no information about existing
    # shapes.
    asset_token = context.addresses.asset(address)
    if asset_token is None or not context.shapes.is_available(asset_token):
        raise RequestError(404, "There is no such shape.", "Request /api/assignments again.")
    return asset_token


def _progress(context: Context, requester: Identity) -> dict:
    """Return the progress of the client in the campaign, as JSON values."""
    return asdict(
        context.store.progress(context.campaign.id, requester.annotator.id, context.shapes.has_failed)
    )


def _check_may_answer(context: Context, requester: Identity) -> None:
    """Check that the client may answer. Admins may not answer in a blind study, because they can see results.

    Raises:
        RequestError: 403 for an admin in a blind study.
    """
    if context.shapes.blind and requester.admin:
        raise RequestError(
            403,
            "Admins can see results, so they cannot take part in a blind study.",
            "Log in with the token of an annotator.",
        )


def _work(router: APIRouter, context: Context) -> None:
    """Add the routes from which the label page gets its settings, assignments and earlier answers."""

    @router.get("/session")
    def session(requester: Requester):
        """Return the name and the role of the client, and the settings that the page needs."""
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
        """Return the next assignments of the annotator, and the progress.

        If there are no assignments, the field `waiting` is true while the annotator must wait for the
        preparation of shapes, and false when the annotator is finished.
        """
        _check_may_answer(context, requester)
        prepared_shapes = context.shapes
        # This is read before the assignments. If a shape became ready between both reads, the annotator would
        # otherwise seem to be finished.
        is_settled = prepared_shapes.is_settled()
        assigned_pairs = context.store.assignments(
            context.campaign.id,
            requester.annotator.id,
            count,
            prepared_shapes.is_ready,
            prepared_shapes.has_failed,
        )
        progress = _progress(context, requester)
        # There is no assignment now, but trials are left whose shapes are not prepared yet.
        is_waiting = (
            not assigned_pairs
            and not is_settled
            and (progress["done"] < progress["total"] or progress["training_left"] > 0)
        )
        # `training` is the only property of a pair that the page receives.
        page_assignments = [
            {**_page_assignment(context, pair.token, pair.left, pair.right), "training": pair.training}
            for pair in assigned_pairs
        ]
        # Practice pairs with a shape that cannot be prepared are not shown. The page states their number.
        practice_pairs = context.store.training(context.campaign.id)
        return JSONResponse(
            {
                "assignments": page_assignments,
                "progress": progress,
                "waiting": is_waiting,
                "practice_lost": sum(
                    prepared_shapes.has_failed(pair.first) or prepared_shapes.has_failed(pair.second)
                    for pair in practice_pairs
                ),
                "preparation": prepared_shapes.progress(),
            }
        )

    @router.get("/answers")
    def answers(
        requester: Requester,
        before: Annotated[int | None, Query(ge=0, le=2**31 - 1)] = None,
        count: Annotated[int, Query(ge=1, le=50)] = 20,
    ):
        """Return the answers of the client, newest assignment first, without practice pairs.

        A request of /api/undo with the token of an assignment takes its answer back.
        """
        _check_may_answer(context, requester)
        # One answer more than needed is read, to find out whether there are further answers.
        own_answers = context.store.answers(context.campaign.id, requester.annotator.id, before, count + 1)
        page_answers = [
            {
                **asdict(own_answer),
                **_page_assignment(context, own_answer.assignment, own_answer.left, own_answer.right),
            }
            for own_answer in own_answers[:count]
        ]
        return {"answers": page_answers, "more": len(own_answers) > count}


def label_api(context: Context) -> APIRouter:
    """Make the router of the label page."""
    router = APIRouter(prefix="/api")
    _work(router, context)

    @router.get("/shapes/{address}", response_class=Response)
    def shape(address: models.AssetPath, request: Request, requester: Requester) -> Response:
        """Return the file of a shape.

        It is a surface in the format "SHP1", a GLB, Gaussian splats in the format "GSP1", or a video. All
        files except videos are encoded with gzip. A client may request a part of a video.
        """
        prepared_shapes = context.shapes
        asset_token = _asset(context, address)
        if not prepared_shapes.is_ready(asset_token):
            raise RequestError(
                503, "Shapes are being prepared.", "Try again in a few seconds.", {"Retry-After": "5"}
            )
        # An address always has the same content. So it can be the ETag, and browsers need not request it
        # again.
        headers = {"ETag": f'"{address}"', "Cache-Control": IMMUTABLE}
        if request.headers.get("if-none-match") == headers["ETag"]:
            return Response(None, 304, headers)
        return respond(prepared_shapes.path(asset_token), request, headers)

    @router.get(
        "/prompts/{address}", response_class=Response, responses={200: {"content": {"image/webp": {}}}}
    )
    def prompt(address: models.AssetPath, requester: Requester) -> Response:
        """Return the image of the prompt from which an asset was generated."""
        image_path = context.shapes.prompt_image(_asset(context, address))
        if image_path is None:
            raise RequestError(404, "There is no such image.", "Request /api/assignments again.")
        return Response(
            image_path.read_bytes(),
            media_type="image/webp",
            headers={"ETag": f'"{address}"', "Cache-Control": IMMUTABLE},
        )

    @router.get(
        "/renders/{address}", response_class=Response, responses={200: {"content": {"image/png": {}}}}
    )
    def render(address: models.AssetPath, requester: Requester) -> Response:
        """Return the RGB render of a shape's latent, if the campaign shows renders.

        A study never shows renders, because they could reveal the generator.
        """
        shows_render = context.campaign.settings.show_render and not context.shapes.blind
        asset_token = _asset(context, address)
        image_path = (
            context.options.cache.render(context.shapes.shapes[asset_token]) if shows_render else None
        )
        if image_path is None:
            raise RequestError(404, "There is no such image.", "Use a campaign that shows renders.")
        return FileResponse(
            image_path, media_type="image/png", headers={"ETag": f'"{address}"', "Cache-Control": IMMUTABLE}
        )

    _judgements(router, context)
    return router


@contextmanager
def _store_errors(conflict_reason: str, conflict_remedy: str, value_remedy: str) -> Iterator[None]:
    """Convert errors of the store to the error responses 404, 409 and 422.

    Args:
        conflict_reason: reason in a response 409.
        conflict_remedy: instruction in a response 409.
        value_remedy: instruction in a response 422.
    """
    try:
        yield
    except LookupError:
        raise RequestError(
            404, "This annotator has no such assignment.", "Request /api/assignments again."
        ) from None
    except ConflictError:
        raise RequestError(409, conflict_reason, conflict_remedy) from None
    except ValueError as error:
        raise RequestError(422, str(error), value_remedy) from None


def _judgements(router: APIRouter, context: Context) -> None:
    """Add the routes for answers and undos."""
    gold_reporter = GoldReporter(context.store, context.campaign)

    @router.post("/judgements", status_code=201)
    def submit(body: models.Judgement, requester: Requester):
        """Store an answer. It is on the disk before the response is sent.

        If an answer is sent again with the same key, it is not stored again.
        """
        _check_may_answer(context, requester)
        # `Answer` contains an enum and a tuple, where the JSON of the request has a text and a list.
        answer_fields = body.model_dump() | {"choice": Choice(body.choice), "views": tuple(body.views)}
        conflict_reason = "This assignment is answered already, or another answer has the same key."
        with _store_errors(
            conflict_reason,
            "Undo that answer first, or continue with the next pair.",
            "Send an answer that the campaign allows.",
        ):
            submitted = context.store.submit(
                context.campaign.id, requester.annotator.id, Answer(**answer_fields)
            )
        if not submitted.training and not submitted.duplicate:
            gold_reporter.after_answer(requester.annotator.name)
        practice_result = (
            {"correct": submitted.correct, "better": submitted.better, "explanation": submitted.explanation}
            if submitted.training
            else None
        )
        revealed_names = (
            {"left": submitted.reveal[0], "right": submitted.reveal[1]} if submitted.reveal else None
        )
        reply_json = {
            "accepted": True,
            "duplicate": submitted.duplicate,
            "training": practice_result,
            "reveal": revealed_names,
            "progress": _progress(context, requester),
        }
        # 201 (Created) is sent only for the first of several equal requests.
        return JSONResponse(reply_json, 200 if submitted.duplicate else 201)

    @router.post("/undo")
    def undo(body: models.Undo, requester: Requester):
        """Take an answer back. Its assignment is open again."""
        _check_may_answer(context, requester)
        with _store_errors(
            "This answer cannot be undone, because the study is complete or the names of the generators were"
            " shown; or an answer has used the key.",
            "Continue with the next pair, or send the undo with a new key.",
            "Send a key of 1 to 128 letters, digits, _ and -.",
        ):
            assignment_token = context.store.undo(
                context.campaign.id, requester.annotator.id, body.key, body.assignment
            )
        return JSONResponse({"assignment": assignment_token, "progress": _progress(context, requester)})


def admin_api(context: Context) -> APIRouter:
    """Make the router of the admin page. All its routes may be used by admins only."""
    router = APIRouter(prefix="/api/admin", dependencies=[Depends(admin_of)])
    report_lock = threading.Lock()
    valid_until = 0.0  # time until which `cached_report` is reused, in seconds of time.monotonic
    cached_report: dict = {}

    @router.get("/quality")
    def quality() -> dict:
        """Return the quality report of the annotators and answers, and the progress of the preparation."""
        nonlocal cached_report, valid_until
        # Only one thread at a time computes the report. It is reused for ten times the duration of its
        # computation, so that many open pages use at most a tenth of one thread.
        with report_lock:
            # While this thread waited for the lock, another one may have computed the report.
            start_time = time.monotonic()
            if start_time >= valid_until:
                cached_report = quality_report(
                    context.store.judgements(
                        context.campaign.settings.name, include_undone=True, labels_from=ALL
                    ),
                    limits_of(context.campaign),
                )
                valid_until = time.monotonic() + max(KEEP, 10 * (time.monotonic() - start_time))
        return {
            **cached_report,
            # annotators never see it, because it could influence their answers
            "learning": learning_report(context.store.plan(context.campaign.id)),
            "preparation": {**context.shapes.progress(), "error": context.shapes.trouble()},
        }

    @router.get("/openapi.json", include_in_schema=False)
    def description(request: Request) -> JSONResponse:
        """Return the description of the API (OpenAPI)."""
        return JSONResponse(request.app.openapi())

    @router.get("/comments")
    def comments(count: Annotated[int, Query(ge=1, le=1000)] = 200):
        """Return comments of annotators on answers that count, newest first."""
        comment_rows = context.store.comments(context.campaign.id, count)
        return [
            {
                "annotator": comment_row.annotator,
                "received": comment_row.received_at,
                "choice": comment_row.choice,
                "comment": comment_row.comment,
            }
            for comment_row in comment_rows
        ]

    _annotators(router, context)

    @router.get(
        "/export",
        response_class=FileResponse,
        responses={200: {"content": {"text/csv": {}, "application/x-ndjson": {}}}},
    )
    def export(format: Annotated[Literal["csv", "jsonl", "judgements"], Query()] = "jsonl"):
        """Return an export of the campaign.

        The format "csv" or "jsonl" contains the labels in the format of `eg3d_rlhf.preferences.labels`. The
        format "judgements" contains all judgements without loss.
        """
        file_name = {"csv": "labels.csv", "jsonl": "labels.jsonl", "judgements": "judgements.jsonl"}[format]
        # The export is written into a temporary file and streamed from it, because it may be large.
        folder = tempfile.TemporaryDirectory(prefix="eg3d-label-export-")
        export_path = Path(folder.name) / file_name
        try:
            is_single = context.campaign.settings.mode is Mode.SINGLE
            write_export = (
                export_judgements
                if format == "judgements"
                else export_unpaired
                if is_single
                else export_labels
            )
            write_export(context.store, export_path, campaign=context.campaign.settings.name)
        # The folder is deleted after any error, also if the request is cancelled.
        except BaseException as error:
            folder.cleanup()
            # A study has no labels, and labels of single shapes cannot be written as CSV.
            if isinstance(error, ValueError):
                raise RequestError(
                    409, str(error), "Request the export with format=judgements, which contains all answers."
                ) from None
            raise
        media_type = "text/csv" if format == "csv" else "application/x-ndjson"
        # The background task deletes the file after it was sent.
        return FileResponse(
            export_path, media_type=media_type, filename=file_name, background=BackgroundTask(folder.cleanup)
        )

    return router


def _new_access(request: Request, name: str, token: str) -> dict:
    """Return a new token with its login link and QR code, as JSON values.

    The link contains the address under which the admin has reached the server.
    """
    # RequestChecks has checked the Host header, so a link may contain it.
    link = login_link(f"{request.url.scheme}://{request.headers['host']}", token)
    return {"name": name, "token": token, "link": link, "qr": qr_data(link)}


def _annotators(router: APIRouter, context: Context) -> None:
    """Add the routes that manage annotators."""

    @router.get("/annotators", response_model=list[models.AnnotatorLine])
    def annotators():
        """Return all people who may answer, also revoked ones. Judges cannot log in, and are not listed."""
        return [annotator for annotator in context.store.annotators() if annotator.role != JUDGE]

    @router.post("/annotators", status_code=201)
    def add(body: models.NewAnnotator, request: Request):
        """Add an annotator, and return the token, which cannot be read again later."""
        try:
            return _new_access(request, body.name, context.store.add_annotator(body.name, body.role))
        except ValueError as error:
            raise RequestError(409, str(error), "Choose another name.") from None

    @router.post("/annotators/token")
    def new_token(body: models.Named, request: Request, requester: Requester):
        """Replace the token of an annotator, who may have been revoked.

        The old token and the annotator's sessions become invalid, except the session of the client. Answers
        stay.
        """
        try:
            return _new_access(
                request, body.name, context.store.new_token(body.name, kept_session_id=requester.session)
            )
        except ValueError as error:
            raise RequestError(404, str(error), "Use a name that /api/admin/annotators lists.") from None

    @router.post("/annotators/revoke", response_model=list[models.AnnotatorLine])
    def revoke(body: models.Named, requester: Requester):
        """Revoke the access of an annotator, and return all annotators."""
        # Admins who revoked their own access by mistake could not undo it.
        if body.name == requester.annotator.name:
            raise RequestError(
                409,
                "You cannot revoke yourself.",
                "Ask another admin, or run revoke NAME of the command that serves this page (tools/label.py"
                " or tools/study.py).",
            )
        try:
            # If only this machine can reach the server, its user is an admin without a token, so that another
            # admin is not needed.
            context.store.revoke_annotator(body.name, must_keep_admin=context.options.exposed)
        except ConflictError as error:
            raise RequestError(409, str(error), "Add another admin first.") from None
        except ValueError as error:
            raise RequestError(404, str(error), "Use a name that /api/admin/annotators lists.") from None
        return annotators()
