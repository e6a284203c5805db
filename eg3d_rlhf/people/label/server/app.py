"""The application: its pages and routes behind the gate, log-in and log-out,
and the process that serves it.
"""

import base64
import contextlib
import gc
import gzip
import hashlib
import html
import json
import mimetypes
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qs

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers

from eg3d_rlhf.people.label.entities import StoredAnnotator
from eg3d_rlhf.people.label.server.gate import COMMON_POLICY, FORGET, AccessLog, Gate
from eg3d_rlhf.people.label.server.http_server import Server, listen
from eg3d_rlhf.people.label.server.identity import COOKIE, Identities, csrf_token
from eg3d_rlhf.people.label.server.models import Refusal, Withdrawn, add_handlers, note
from eg3d_rlhf.people.label.server.options import AppOptions, is_loopback
from eg3d_rlhf.people.label.server.routes import Admin, Context, Who, admin_api, label_api
from eg3d_rlhf.people.label.server.served_shapes import Addresses, PreparedShapes

SUFFIXES = {".html", ".js", ".css", ".svg", ".png", ".ico", ".txt", ".webmanifest"}
LOGIN_COOKIE = "login"
_HERE = Path(__file__).parent
_STYLE, _SCRIPT, _PAGE = ((_HERE / name).read_text() for name in ("login.css", "login.js", "login.html"))
# language -> key, or a refusal's status -> text
TEXTS: dict[str, dict[str, str]] = json.loads((_HERE / "login.json").read_text())
STYLE_SOURCE, SCRIPT_SOURCE = (  # for the Content-Security-Policy
    f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
    for text in (_STYLE, _SCRIPT)
)
NOT_KEPT = ("sw.js", "admin.html", "admin.js", "admin.css")  # for use without a network


def create_app(options: AppOptions) -> FastAPI:
    """The application for one campaign.

    Raises: ValueError where the campaign or the page's files are missing.
    """
    campaign = options.store.campaign(options.campaign)
    assert campaign is not None, options.campaign
    files = read_static(options.static)
    identities = Identities(options, campaign.settings.mode)
    log = AccessLog(options.access_log)
    shapes = PreparedShapes(options, campaign)
    context = Context(
        options=options,
        store=options.store,
        campaign=campaign,
        identities=identities,
        files=files,
        shapes=shapes,
        addresses=Addresses(identities.secret, shapes.shapes),
        page_version=hashlib.sha256(
            "".join(f"{name}{files[name].etag}" for name in sorted(files)).encode()
        ).hexdigest()[:12],
    )

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI):
        log.write(
            "start",
            {
                "mode": campaign.settings.mode.value,
                "exposed": options.exposed,
                "page_version": context.page_version,
            },
        )
        yield
        log.close()

    app = FastAPI(
        title="Labelling application",
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
    )
    app.add_middleware(Gate, options=options, identities=identities, log=log)
    add_handlers(app)
    for router in (pages, label_api, admin_api):
        app.include_router(router(context))
    return app


def serve(
    options: AppOptions,
    host: str = "127.0.0.1",
    port: int = 8000,
    *,
    certificate: Path | None = None,
    key: Path | None = None,
    proxy: str | None = None,
    on_listening: Callable[[str], None] = print,
) -> None:
    """Serve until interrupted; the preparation runs meanwhile."""
    if not options.exposed and not is_loopback(host):
        raise ValueError(
            f"serve: expected AppOptions(exposed=True) for host {host}, which other machines can reach."
        )
    app = create_app(options)
    listening = listen(host, port, options.limits)
    shown = f"[{host}]" if ":" in host.strip("[]") and not host.startswith("[") else host
    try:
        server = Server(app, listening, options.limits, certificate, key, proxy)
        if options.preparation is not None:
            options.preparation.start()
        on_listening(f"{'https' if certificate else 'http'}://{shown}:{listening.getsockname()[1]}/")
        gc.collect()
        # what is loaded by now stays: the garbage collector looks at requests and connections alone, often
        # and quickly
        gc.freeze()
        server.run()
    finally:
        if options.preparation is not None:
            options.preparation.stop()
        listening.close()


@dataclass(frozen=True)
class StaticFile:
    """A file of the page, kept in memory."""

    data: bytes
    packed: bytes  # gzip
    kind: str  # media type
    etag: str


def read_static(folder: Path) -> dict[str, StaticFile]:
    """The files that are served, by name: those of `folder` itself with a suffix of SUFFIXES."""
    contents = {
        p.name: p.read_bytes() for p in sorted(folder.glob("*")) if p.suffix in SUFFIXES and p.is_file()
    }
    missing = sorted({"index.html", "admin.html"} - set(contents))
    if missing:
        raise ValueError(
            f"{folder}: expected {' and '.join(missing)}, got {len(contents)} other files. Install the"
            " package again."
        )
    files = {}
    for name, data in contents.items():
        kind = mimetypes.guess_type(name)[0] or "application/octet-stream"
        kind = "text/javascript" if name.endswith(".js") else kind
        files[name] = StaticFile(
            data, gzip.compress(data, mtime=0), kind, f'"{hashlib.sha256(data).hexdigest()[:20]}"'
        )
    return files


def pages(context: Context) -> APIRouter:
    """The router."""
    router = APIRouter(include_in_schema=False)

    @router.get("/health")
    async def health() -> dict:
        return {"status": "ok"}

    @router.get("/")
    async def index(request: Request) -> Response:
        return _file(context.files["index.html"], request)

    @router.get("/admin")
    async def admin(request: Request, who: Admin) -> Response:
        return _file(context.files["admin.html"], request)

    @router.get("/sw.js")
    async def service_worker(request: Request) -> Response:
        """The page's service worker, at the root as it keeps what lies there; it changes with every file of
        the page.
        """
        kept = {name: file.etag for name, file in context.files.items() if name not in NOT_KEPT}
        head = f"self.PAGE = {json.dumps({'version': context.page_version, 'files': kept})};\n"
        headers = {"Cache-Control": "private, no-cache"}
        return Response(
            head.encode() + context.files["sw.js"].data, media_type="text/javascript", headers=headers
        )

    @router.get("/static/{name}")
    async def static(name: str, request: Request) -> Response:
        if name not in context.files:
            raise Refusal(404, "No such file.", "Check the address.")
        return _file(context.files[name], request)

    @router.get("/login")
    async def login_form(request: Request) -> Response:
        try:
            await run_in_threadpool(
                context.identities.find, Headers({"cookie": request.headers.get("cookie", "")}), ""
            )
        except Refusal as refusal:
            return _login_page(request, refusal, 200)
        return _login_page(request)

    @router.post("/login")
    async def login(request: Request) -> Response:
        token, link = _form_token(await request.body(), request.cookies.get(LOGIN_COOKIE, ""))
        address = request.client.host if request.client else ""
        seconds = context.options.limits.session_seconds
        try:
            known = await run_in_threadpool(context.identities.by_token, token, address)
            if link:
                await run_in_threadpool(_check_nobody_else, context, request, known)
        except Refusal as refusal:
            note(request, refusal)
            return _login_page(request, refusal)
        response = RedirectResponse("/", 303)
        _set_cookie(
            response,
            request,
            COOKIE,
            await run_in_threadpool(context.store.open_session, known.id, seconds),
            int(seconds),
        )
        response.delete_cookie(LOGIN_COOKIE, path="/login")
        return response

    @router.post("/logout")
    async def logout(who: Who) -> Response:
        if who.session:
            await run_in_threadpool(context.store.close_session, who.session)
        response = (
            JSONResponse({"closed": bool(who.session)})
            if who.by == "token"
            else RedirectResponse("/login", 303)
        )
        response.headers.append("Set-Cookie", FORGET)
        return response

    return router


def _file(file: StaticFile, request: Request) -> Response:
    headers = {"ETag": file.etag, "Cache-Control": "private, no-cache", "Vary": "Accept-Encoding"}
    if request.headers.get("if-none-match") == file.etag:
        return Response(None, 304, headers)
    if "gzip" in request.headers.get("accept-encoding", ""):
        return Response(file.packed, media_type=file.kind, headers={**headers, "Content-Encoding": "gzip"})
    return Response(file.data, media_type=file.kind, headers=headers)


def _check_nobody_else(context: Context, request: Request, known: StoredAnnotator) -> None:
    """A link, which anybody may have sent, takes nobody's place unasked. Raises: Refusal 409."""
    session = request.cookies.get(COOKIE, "")
    here = context.store.session(session) if session else None
    if here is not None and here.id != known.id:
        raise Refusal(
            409, "Somebody else is logged in here.", "Sign out on that page, then open the link again."
        )


def _form_token(body: bytes, cookie: str) -> tuple[str, bool]:
    """The token of a log-in form whose CSRF field fits the cookie, and whether it is from a link."""
    try:
        fields = parse_qs(
            body.decode("ascii"),
            keep_blank_values=True,
            strict_parsing=True,
            max_num_fields=4,
            errors="strict",
        )
    except ValueError:
        raise Refusal(400, "Expected a form with token and csrf.", "Use the log-in page.") from None
    if sorted({**fields, "link": []}) != ["csrf", "link", "token"] or any(
        len(values) != 1 for values in fields.values()
    ):
        raise Refusal(400, "Expected a form with token and csrf, each once.", "Use the log-in page.")
    if not cookie or not secrets.compare_digest(
        csrf_token(cookie, "login").encode(), fields["csrf"][0].encode()
    ):
        raise Refusal(
            403,
            "This form is not from the log-in page, or its cookie is gone.",
            "Load /login again, with cookies allowed.",
        )
    return fields["token"][0].strip(), fields.get("link") == ["yes"]


def _login_page(request: Request, refusal: Refusal | None = None, status: int | None = None) -> Response:
    cookie = secrets.token_urlsafe(24)
    page = login_page(request.headers.get("accept-language", ""), csrf_token(cookie, "login"), refusal)
    response = HTMLResponse(
        page, status or (refusal.status if refusal else 200), refusal.headers if refusal else None
    )
    response.headers["Vary"] = "Accept-Language"
    sources = f"style-src {STYLE_SOURCE}; script-src {SCRIPT_SOURCE}"  # these two texts and nothing else
    response.headers["Content-Security-Policy"] = f"default-src 'none'; {sources}; {COMMON_POLICY}"
    # under no-referrer a form is sent with 'Origin: null'
    response.headers["Referrer-Policy"] = "same-origin"
    _set_cookie(response, request, LOGIN_COOKIE, cookie, 3600, path="/login")
    return response


def _set_cookie(
    response: Response, request: Request, name: str, value: str, seconds: int, path: str = "/"
) -> None:
    https = request.url.scheme == "https"
    response.set_cookie(
        name, value, max_age=seconds, path=path, secure=https, httponly=True, samesite="strict"
    )


# ---- the log-in page in the reader's language, whole in one answer, as nobody who reads it is known yet; its
# script never varies


def language_of(accepted: str) -> str:
    """The language of TEXTS that an Accept-Language header (RFC 9110, 12.5.4) likes best; English where it
    names none of them.
    """
    weights: dict[str, float] = {}
    for part in accepted[:1000].split(","):
        tag, _, parameter = part.partition(";")
        code = tag.strip()[:2].lower()
        weight = parameter.strip().removeprefix("q=") or "1"
        if code in TEXTS and weight.replace(".", "", 1).isdecimal():
            weights[code] = max(weights.get(code, 0.0), float(weight))
    return max(weights, key=lambda code: weights[code]) if any(weights.values()) else "en"


def login_page(accepted: str, csrf: str, refusal: Refusal | None = None) -> str:
    """The page's HTML.

    Args: accepted: the Accept-Language header; csrf: the form's; refusal: of the attempt before.
    """
    language = language_of(accepted)
    texts = {key: html.escape(text) for key, text in TEXTS[language].items()}
    message = ""
    if refusal is not None:
        key = "withdrawn" if isinstance(refusal, Withdrawn) else str(refusal.status)
        said = texts.get(key, html.escape(f"{refusal.error} {refusal.remedy}"))
        message = f"<p role=alert>{said.replace('{seconds}', refusal.headers.get('Retry-After', ''))}</p>"
    return _PAGE.format(
        language=language,
        title=texts["title"],
        token=texts["token"],
        button=texts["button"],
        waiting=texts["waiting"],
        later=texts["later"],
        style=_STYLE,
        script=_SCRIPT,
        message=message,
        csrf=csrf,
    )
