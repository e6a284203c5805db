"""The web application: its pages and routes behind the checks of requests, login and logout, and the process
that serves it.
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
from eg3d_rlhf.people.label.server.http_server import Server, listen
from eg3d_rlhf.people.label.server.identity import COOKIE, Identities, csrf_token
from eg3d_rlhf.people.label.server.models import AccessRevoked, RequestError, add_handlers, note
from eg3d_rlhf.people.label.server.options import AppOptions, is_loopback
from eg3d_rlhf.people.label.server.request_checks import COMMON_POLICY, FORGET, AccessLog, RequestChecks
from eg3d_rlhf.people.label.server.routes import Admin, Context, Requester, admin_api, label_api
from eg3d_rlhf.people.label.server.served_shapes import Addresses, PreparedShapes

# suffixes of files in the static folder that are served
SUFFIXES = {".html", ".js", ".css", ".svg", ".png", ".ico", ".txt", ".webmanifest"}
LOGIN_COOKIE = "login"  # name of the cookie that belongs to a login form
_HERE = Path(__file__).parent
_STYLE, _SCRIPT, _PAGE = ((_HERE / name).read_text() for name in ("login.css", "login.js", "login.html"))
# language -> key of a text, or status of an error -> text
TEXTS: dict[str, dict[str, str]] = json.loads((_HERE / "login.json").read_text())
# hashes that allow the inline style and script in the Content-Security-Policy
STYLE_SOURCE, SCRIPT_SOURCE = (
    f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
    for text in (_STYLE, _SCRIPT)
)
# files that the service worker does not store for use without a network
NOT_STORED = ("sw.js", "admin.html", "admin.js", "admin.css")


def create_app(options: AppOptions) -> FastAPI:
    """Make the application for one campaign.

    Raises: ValueError if the files of the page are missing.
    """
    campaign = options.store.campaign(options.campaign)
    # The commands create the campaign before they serve it.
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
        # The version changes with every file of the page. Judgements and the service worker contain it.
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
        # The application serves until the context ends.
        yield
        log.close()

    app = FastAPI(
        # No documentation pages: they would load scripts from elsewhere. Admins read /api/admin/openapi.json.
        title="Labelling application",
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
    )
    # The only middleware: nothing is processed before the checks.
    app.add_middleware(RequestChecks, options=options, identities=identities, log=log)
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
    """Serve until interrupted, and prepare shapes in the meantime.

    Args:
        options: of the application.
        host: address to listen on.
        port: 0 takes a free one.
        certificate: PEM file; with `key`, the server uses https.
        key: PEM file of the private key.
        proxy: addresses of reverse proxies whose X-Forwarded headers are trusted.
        on_listening: called with the server's address.

    Raises: ValueError, OSError.
    """
    # A second line of defence: without tokens, other machines must never reach the server.
    if not options.exposed and not is_loopback(host):
        raise ValueError(
            f"serve: other machines can reach host {host}. Use AppOptions(exposed=True), which requires"
            " tokens."
        )
    # Before the port is opened: errors of the files must not leave a half-started server.
    app = create_app(options)
    listening = listen(host, port, options.limits)
    printed_host = f"[{host}]" if ":" in host.strip("[]") and not host.startswith("[") else host
    try:
        server = Server(app, listening, options.limits, certificate, key, proxy)
        if options.preparation is not None:
            options.preparation.start()
        # getsockname gives the port that was chosen for port 0.
        on_listening(f"{'https' if certificate else 'http'}://{printed_host}:{listening.getsockname()[1]}/")
        gc.collect()
        # Objects that exist now stay until the end. Frozen, they are skipped by the garbage collector, which
        # then examines only requests and connections and takes little time.
        gc.freeze()
        server.run()
    finally:
        if options.preparation is not None:
            options.preparation.stop()
        listening.close()


@dataclass(frozen=True)
class StaticFile:
    """A file of the page, in memory."""

    data: bytes
    packed: bytes  # the same, compressed with gzip
    kind: str  # media type
    etag: str  # from a hash of the content


def read_static(folder: Path) -> dict[str, StaticFile]:
    """Read the files that are served, by name: those of `folder` itself with a suffix of SUFFIXES.

    Raises: ValueError if a page is missing.
    """
    contents = {
        p.name: p.read_bytes() for p in sorted(folder.glob("*")) if p.suffix in SUFFIXES and p.is_file()
    }
    missing = sorted({"index.html", "admin.html"} - set(contents))
    if missing:
        raise ValueError(
            f"{folder}: expected {' and '.join(missing)}, found {len(contents)} other files. Install the"
            " package again."
        )
    files = {}
    for name, data in contents.items():
        kind = mimetypes.guess_type(name)[0] or "application/octet-stream"
        # Some systems map .js to another type, which browsers reject for modules.
        kind = "text/javascript" if name.endswith(".js") else kind
        files[name] = StaticFile(
            data, gzip.compress(data, mtime=0), kind, f'"{hashlib.sha256(data).hexdigest()[:20]}"'
        )
    return files


def pages(context: Context) -> APIRouter:
    """Make the router of the pages, login and logout."""
    router = APIRouter(include_in_schema=False)

    @router.get("/health")
    async def health() -> dict:
        return {"status": "ok"}

    @router.get("/")
    async def index(request: Request) -> Response:
        return _file(context.files["index.html"], request)

    @router.get("/admin")
    async def admin(request: Request, requester: Admin) -> Response:
        return _file(context.files["admin.html"], request)

    @router.get("/sw.js")
    async def service_worker(request: Request) -> Response:
        """Return the service worker. It is served at the root, because it handles requests of its folder
        only. A change of any file of the page changes it, so that browsers install it again.
        """
        stored = {name: file.etag for name, file in context.files.items() if name not in NOT_STORED}
        head = f"self.PAGE = {json.dumps({'version': context.page_version, 'files': stored})};\n"
        # no-cache: the browser must ask for a new service worker every time.
        headers = {"Cache-Control": "private, no-cache"}
        return Response(
            head.encode() + context.files["sw.js"].data, media_type="text/javascript", headers=headers
        )

    @router.get("/static/{name}")
    async def static(name: str, request: Request) -> Response:
        # A look-up in a dictionary, not in a folder: no name can leave the folder.
        if name not in context.files:
            raise RequestError(404, "No such file.", "Check the address.")
        return _file(context.files[name], request)

    @router.get("/login")
    async def login_form(request: Request) -> Response:
        # Only the cookie is passed on: without an address and a token, no limit of wrong tokens is used up.
        try:
            await run_in_threadpool(
                context.identities.find, Headers({"cookie": request.headers.get("cookie", "")}), ""
            )
        except RequestError as rejection:
            return _login_page(request, rejection, 200)
        return _login_page(request)

    @router.post("/login")
    async def login(request: Request) -> Response:
        token, link = _form_token(await request.body(), request.cookies.get(LOGIN_COOKIE, ""))
        address = request.client.host if request.client else ""
        seconds = context.options.limits.session_seconds
        try:
            annotator = await run_in_threadpool(context.identities.by_token, token, address)
            # A person who types a token wants to change the login; a link may come from anybody.
            if link:
                await run_in_threadpool(_check_no_other_login, context, request, annotator)
        except RequestError as rejection:
            note(request, rejection)
            return _login_page(request, rejection)
        # 303: the browser requests the page with GET, so reloading it does not send the token again.
        response = RedirectResponse("/", 303)
        _set_cookie(
            response,
            request,
            COOKIE,
            await run_in_threadpool(context.store.open_session, annotator.id, seconds),
            int(seconds),
        )
        # A form can be used once.
        response.delete_cookie(LOGIN_COOKIE, path="/login")
        return response

    @router.post("/logout")
    async def logout(requester: Requester) -> Response:
        if requester.session:
            await run_in_threadpool(context.store.close_session, requester.session)
        response = (
            JSONResponse({"closed": bool(requester.session)})
            if requester.by == "token"
            else RedirectResponse("/login", 303)
        )
        # Also without a session: the browser may have an expired cookie.
        response.headers.append("Set-Cookie", FORGET)
        return response

    return router


def _file(file: StaticFile, request: Request) -> Response:
    """Return a file, compressed if the browser accepts that, or 304 if its copy is current."""
    headers = {"ETag": file.etag, "Cache-Control": "private, no-cache", "Vary": "Accept-Encoding"}
    if request.headers.get("if-none-match") == file.etag:
        return Response(None, 304, headers)
    if "gzip" in request.headers.get("accept-encoding", ""):
        return Response(file.packed, media_type=file.kind, headers={**headers, "Content-Encoding": "gzip"})
    return Response(file.data, media_type=file.kind, headers=headers)


def _check_no_other_login(context: Context, request: Request, annotator: StoredAnnotator) -> None:
    """Check that a link does not replace the session of another annotator. A link can come from anybody, and
    answers would then be recorded under another name.

    Raises: RequestError 409.
    """
    session = request.cookies.get(COOKIE, "")
    current = context.store.session(session) if session else None
    if current is not None and current.id != annotator.id:
        raise RequestError(
            409,
            "Another person is logged in here.",
            "Sign out on that page, then open the link again.",
        )


def _form_token(body: bytes, cookie: str) -> tuple[str, bool]:
    """Read a login form whose CSRF field matches the cookie.

    Returns: the token, and True if it comes from a link. Raises: RequestError 400, 403.
    """
    try:
        fields = parse_qs(
            # Forms are percent-encoded, so other bytes are an error.
            body.decode("ascii"),
            keep_blank_values=True,
            strict_parsing=True,
            max_num_fields=4,
            errors="strict",
        )
    except ValueError:
        raise RequestError(400, "The form must contain token and csrf.", "Use the login page.") from None
    # Adding `link` makes the comparison independent of that optional field.
    if sorted({**fields, "link": []}) != ["csrf", "link", "token"] or any(
        len(values) != 1 for values in fields.values()
    ):
        raise RequestError(400, "The form must contain token and csrf once.", "Use the login page.")
    # compare_digest takes the same time for all wrong values.
    if not cookie or not secrets.compare_digest(
        csrf_token(cookie, "login").encode(), fields["csrf"][0].encode()
    ):
        raise RequestError(
            403,
            "This form is not from the login page, or its cookie is missing.",
            "Load /login again, with cookies allowed.",
        )
    return fields["token"][0].strip(), fields.get("link") == ["yes"]


def _login_page(
    request: Request, rejection: RequestError | None = None, status: int | None = None
) -> Response:
    """Return the login page with a new cookie and the CSRF value that belongs to it."""
    cookie = secrets.token_urlsafe(24)
    page = login_page(request.headers.get("accept-language", ""), csrf_token(cookie, "login"), rejection)
    response = HTMLResponse(
        page, status or (rejection.status if rejection else 200), rejection.headers if rejection else None
    )
    response.headers["Vary"] = "Accept-Language"
    # allow these two inline texts and nothing else
    sources = f"style-src {STYLE_SOURCE}; script-src {SCRIPT_SOURCE}"
    response.headers["Content-Security-Policy"] = f"default-src 'none'; {sources}; {COMMON_POLICY}"
    # With no-referrer, browsers would send the form with 'Origin: null', which the checks reject.
    response.headers["Referrer-Policy"] = "same-origin"
    _set_cookie(response, request, LOGIN_COOKIE, cookie, 3600, path="/login")
    return response


def _set_cookie(
    response: Response, request: Request, name: str, value: str, seconds: int, path: str = "/"
) -> None:
    """Set a cookie that scripts cannot read and that browsers do not send from other sites."""
    https = request.url.scheme == "https"
    response.set_cookie(
        name, value, max_age=seconds, path=path, secure=https, httponly=True, samesite="strict"
    )


# ---- the login page in the reader's language. It is one response without further files, because these need a
# login. Its script is always the same, so that its hash is.


def language_of(accepted: str) -> str:
    """Return the language of TEXTS with the highest weight in an Accept-Language header (RFC 9110, 12.5.4),
    or English if the header names none of them.
    """
    weights: dict[str, float] = {}
    # The length is limited, because anybody can send this header.
    for part in accepted[:1000].split(","):
        tag, _, parameter = part.partition(";")
        code = tag.strip()[:2].lower()
        weight = parameter.strip().removeprefix("q=") or "1"
        if code in TEXTS and weight.replace(".", "", 1).isdecimal():
            weights[code] = max(weights.get(code, 0.0), float(weight))
    # A weight of 0 means "not acceptable".
    return max(weights, key=lambda code: weights[code]) if any(weights.values()) else "en"


def login_page(accepted: str, csrf: str, rejection: RequestError | None = None) -> str:
    """Return the HTML of the login page.

    Args:
        accepted: the Accept-Language header.
        csrf: value of the form's hidden field.
        rejection: error of the attempt before.
    """
    language = language_of(accepted)
    texts = {key: html.escape(text) for key, text in TEXTS[language].items()}
    # Everything that is inserted into the page is escaped.
    message = ""
    if rejection is not None:
        key = "withdrawn" if isinstance(rejection, AccessRevoked) else str(rejection.status)
        text = texts.get(key, html.escape(f"{rejection.error} {rejection.remedy}"))
        message = f"<p role=alert>{text.replace('{seconds}', rejection.headers.get('Retry-After', ''))}</p>"
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
