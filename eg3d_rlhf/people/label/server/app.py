"""Web application of the label server: its pages, login and logout, and the function that serves it.

All requests pass through the checks of request_checks.py first. The routes under /api are in routes.py.
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

# suffixes of the files in the folder `static` that are served
SUFFIXES = {".html", ".js", ".css", ".svg", ".png", ".ico", ".txt", ".webmanifest"}
LOGIN_COOKIE = "login"  # name of the cookie whose value the CSRF field of a login form must match
_HERE = Path(__file__).parent
_STYLE, _SCRIPT, _PAGE = ((_HERE / name).read_text() for name in ("login.css", "login.js", "login.html"))
# language -> (key of a text, or HTTP status of an error) -> text
TEXTS: dict[str, dict[str, str]] = json.loads((_HERE / "login.json").read_text())
# hashes that allow the inline style and script in the Content-Security-Policy
STYLE_SOURCE, SCRIPT_SOURCE = (
    f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
    for text in (_STYLE, _SCRIPT)
)
# files that the service worker of the page does not store for use without a network
NOT_STORED = ("sw.js", "admin.html", "admin.js", "admin.css")


def create_app(options: AppOptions) -> FastAPI:
    """Make the web application for one labelling campaign.

    Raises:
        ValueError: files of the page are missing.
    """
    campaign = options.store.campaign(options.campaign)
    # Every command creates the campaign before it serves it.
    assert campaign is not None, options.campaign
    static_files = read_static(options.static)
    identities = Identities(options, campaign.settings.mode)
    access_log = AccessLog(options.access_log)
    addresses = Addresses(identities.secret, (token for token, _ in options.store.shapes(campaign.id)))
    prepared_shapes = PreparedShapes(options, campaign, addresses.add)
    context = Context(
        options=options,
        store=options.store,
        campaign=campaign,
        identities=identities,
        files=static_files,
        shapes=prepared_shapes,
        addresses=addresses,
        # The version changes when any file of the page changes. It is stored in judgements, and it makes
        # browsers load the page again.
        page_version=hashlib.sha256(
            "".join(f"{name}{static_files[name].etag}" for name in sorted(static_files)).encode()
        ).hexdigest()[:12],
    )

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI):
        access_log.write(
            "start",
            {
                "mode": campaign.settings.mode.value,
                "exposed": options.exposed,
                "page_version": context.page_version,
            },
        )
        # ASGI servers enter this context at the start, and leave it at the end.
        yield
        access_log.close()

    app = FastAPI(
        # FastAPI's documentation pages are switched off, because they load scripts from other servers. Admins
        # can read the description of the API at /api/admin/openapi.json.
        title="Labelling application",
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
    )
    # This is the only middleware, so no part of a request is processed before the checks.
    app.add_middleware(RequestChecks, options=options, identities=identities, log=access_log)
    add_handlers(app)
    for make_router in (pages, label_api, admin_api):
        app.include_router(make_router(context))
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
    """Serve the web application until it is interrupted, and prepare shapes in the meantime.

    Args:
        options: options of the server.
        host: address to listen on.
        port: port to listen on; 0: any free port.
        certificate: PEM file of the certificate; with `key`, the server uses https. None: http.
        key: PEM file of the private key of the certificate.
        proxy: addresses of reverse proxies whose X-Forwarded headers are trusted; None: no proxy.
        on_listening: function that is called with the URL of the server when it listens.

    Raises:
        ValueError: a flag or a file is invalid.
        OSError: the server cannot listen on the address.
    """
    # The commands check this as well. Without tokens, other machines must not be able to reach the server.
    if not options.exposed and not is_loopback(host):
        raise ValueError(
            f"serve: other machines can reach the host {host}, but tokens are not required. Pass"
            " AppOptions(exposed=True), which requires tokens."
        )
    # The application is made before the port is opened, so that errors of its files occur before the server
    # can be reached.
    app = create_app(options)
    listening_socket = listen(host, port, options.limits)
    # in a URL, an IPv6 address is written in brackets
    printed_host = f"[{host}]" if ":" in host.strip("[]") and not host.startswith("[") else host
    try:
        server = Server(app, listening_socket, options.limits, certificate, key, proxy)
        if options.preparation is not None:
            options.preparation.start()
        # getsockname returns the port that the system has chosen for port 0.
        on_listening(
            f"{'https' if certificate else 'http'}://{printed_host}:{listening_socket.getsockname()[1]}/"
        )
        gc.collect()
        # Objects that exist now are needed until the end. After `freeze`, the garbage collector skips them,
        # and only examines objects of requests and connections, which takes little time.
        gc.freeze()
        server.run()
    finally:
        if options.preparation is not None:
            options.preparation.stop()
        listening_socket.close()


@dataclass(frozen=True)
class StaticFile:
    """File of the label page or the admin page, in memory."""

    data: bytes  # content
    packed: bytes  # content, compressed with gzip
    kind: str  # media type
    etag: str  # value of the ETag header, a hash of the content in quotation marks


def read_static(folder: Path) -> dict[str, StaticFile]:
    """Read the files of the page, by name. Files in subfolders, and files with other suffixes, are not read.

    Args:
        folder: folder of the files.

    Raises:
        ValueError: the file of a page is missing.
    """
    content_by_name = {
        path.name: path.read_bytes()
        for path in sorted(folder.glob("*"))
        if path.suffix in SUFFIXES and path.is_file()
    }
    missing_pages = sorted({"index.html", "admin.html"} - set(content_by_name))
    if missing_pages:
        raise ValueError(
            f"{folder}: the file {' and '.join(missing_pages)} is missing. Install the package eg3d-rlhf"
            " again."
        )
    file_by_name = {}
    for name, file_content in content_by_name.items():
        media_type = mimetypes.guess_type(name)[0] or "application/octet-stream"
        # Some systems assign another media type to .js, which browsers reject for modules.
        media_type = "text/javascript" if name.endswith(".js") else media_type
        file_by_name[name] = StaticFile(
            file_content,
            gzip.compress(file_content, mtime=0),
            media_type,
            f'"{hashlib.sha256(file_content).hexdigest()[:20]}"',
        )
    return file_by_name


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
        """Return the script of the service worker, which stores the page for use without a network.

        It is served at the root, because a service worker handles requests of its own folder only. The script
        contains the version of the page, so that browsers install it again when any file of the page has
        changed.
        """
        etag_by_name = {name: file.etag for name, file in context.files.items() if name not in NOT_STORED}
        script_head = f"self.PAGE = {json.dumps({'version': context.page_version, 'files': etag_by_name})};\n"
        # no-cache: the browser must ask the server every time whether the script has changed.
        headers = {"Cache-Control": "private, no-cache"}
        return Response(
            script_head.encode() + context.files["sw.js"].data, media_type="text/javascript", headers=headers
        )

    @router.get("/static/{name}")
    async def static(name: str, request: Request) -> Response:
        # The name is looked up in a dictionary, so that no name can lead out of the folder.
        if name not in context.files:
            raise RequestError(404, "There is no such file.", "Check the address.")
        return _file(context.files[name], request)

    @router.get("/login")
    async def login_form(request: Request) -> Response:
        # `find` is called with the cookie alone, and without an address or a token, so that it does not count
        # as an attempt with a wrong token. It raises an error for a revoked annotator, which the page shows.
        try:
            await run_in_threadpool(
                context.identities.find, Headers({"cookie": request.headers.get("cookie", "")}), ""
            )
        except RequestError as rejection:
            return _login_page(request, rejection, 200)
        return _login_page(request)

    @router.post("/login")
    async def login(request: Request) -> Response:
        token, is_link = _form_token(await request.body(), request.cookies.get(LOGIN_COOKIE, ""))
        address = request.client.host if request.client else ""
        seconds = context.options.limits.session_seconds
        try:
            annotator = await run_in_threadpool(context.identities.by_token, token, address)
            # A person who types a token may replace another login. A link can come from anybody.
            if is_link:
                await run_in_threadpool(_check_no_other_login, context, request, annotator)
        except RequestError as rejection:
            note(request, rejection)
            return _login_page(request, rejection)
        # 303: the browser requests the next page with GET, so that reloading it does not send the token
        # again.
        response = RedirectResponse("/", 303)
        _set_cookie(
            response,
            request,
            COOKIE,
            await run_in_threadpool(context.store.open_session, annotator.id, seconds),
            int(seconds),
        )
        # A login form can be used only once.
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
        # The cookie is deleted also if there is no session, because the browser may have an expired cookie.
        response.headers.append("Set-Cookie", FORGET)
        return response

    return router


def _file(static_file: StaticFile, request: Request) -> Response:
    """Return the response with a file of the page.

    The file is compressed if the browser accepts gzip. If the browser's copy is current, the response is the
    status 304 without content.
    """
    response_headers = {
        "ETag": static_file.etag,
        "Cache-Control": "private, no-cache",
        "Vary": "Accept-Encoding",
    }
    if request.headers.get("if-none-match") == static_file.etag:
        return Response(None, 304, response_headers)
    if "gzip" in request.headers.get("accept-encoding", ""):
        return Response(
            static_file.packed,
            media_type=static_file.kind,
            headers={**response_headers, "Content-Encoding": "gzip"},
        )
    return Response(static_file.data, media_type=static_file.kind, headers=response_headers)


def _check_no_other_login(context: Context, request: Request, annotator: StoredAnnotator) -> None:
    """Check that a login link does not replace the session of another annotator.

    A link can come from anybody. If it changed the login, the following answers would be recorded under
    another name.

    Raises:
        RequestError: 409 if another annotator is logged in.
    """
    session_id = request.cookies.get(COOKIE, "")
    current_annotator = context.store.session(session_id) if session_id else None
    if current_annotator is not None and current_annotator.id != annotator.id:
        raise RequestError(
            409,
            "Another person is logged in here.",
            "Sign out on that page, then open the link again.",
        )


def _form_token(body: bytes, cookie_value: str) -> tuple[str, bool]:
    """Read a login form, and check that its CSRF field matches the cookie.

    Args:
        body: body of the request.
        cookie_value: value of the cookie LOGIN_COOKIE.

    Returns:
        The token, and True if it comes from a login link, or False if a person has typed it.

    Raises:
        RequestError: 400 for an invalid form, 403 if the CSRF field and the cookie do not match.
    """
    try:
        form_fields = parse_qs(
            # A form is percent-encoded, so it contains ASCII characters only.
            body.decode("ascii"),
            keep_blank_values=True,
            strict_parsing=True,
            max_num_fields=4,
            errors="strict",
        )
    except ValueError:
        raise RequestError(
            400,
            "The login form cannot be read. It must be URL-encoded and contain the fields token and csrf.",
            "Use the login page.",
        ) from None
    # The field `link` is optional. It is added here, so that forms with and without it pass the comparison.
    if sorted({**form_fields, "link": []}) != ["csrf", "link", "token"] or any(
        len(field_values) != 1 for field_values in form_fields.values()
    ):
        raise RequestError(
            400, "The form must contain the fields token and csrf exactly once.", "Use the login page."
        )
    # compare_digest takes the same time for all wrong values, so that the value cannot be guessed by
    # measuring time.
    if not cookie_value or not secrets.compare_digest(
        csrf_token(cookie_value, "login").encode(), form_fields["csrf"][0].encode()
    ):
        raise RequestError(
            403,
            "This form does not come from the login page, or its cookie is missing.",
            "Allow cookies, and load /login again.",
        )
    return form_fields["token"][0].strip(), form_fields.get("link") == ["yes"]


def _login_page(
    request: Request, rejection: RequestError | None = None, status: int | None = None
) -> Response:
    """Return the login page with a new cookie, and the CSRF value that belongs to it.

    Args:
        request: request of the client.
        rejection: error that the page shows; None: no error.
        status: HTTP status; None: the status of the error, or 200 if there is none.
    """
    cookie_value = secrets.token_urlsafe(24)
    page_html = login_page(
        request.headers.get("accept-language", ""), csrf_token(cookie_value, "login"), rejection
    )
    response = HTMLResponse(
        page_html,
        status or (rejection.status if rejection else 200),
        rejection.headers if rejection else None,
    )
    response.headers["Vary"] = "Accept-Language"
    # the page may use its inline style sheet and its inline script, and no other style or script
    policy_sources = f"style-src {STYLE_SOURCE}; script-src {SCRIPT_SOURCE}"
    response.headers["Content-Security-Policy"] = f"default-src 'none'; {policy_sources}; {COMMON_POLICY}"
    # With the policy no-referrer, browsers would send the form with 'Origin: null', which the checks reject.
    response.headers["Referrer-Policy"] = "same-origin"
    _set_cookie(response, request, LOGIN_COOKIE, cookie_value, 3600, path="/login")
    return response


def _set_cookie(
    response: Response, request: Request, name: str, cookie_value: str, seconds: int, path: str = "/"
) -> None:
    """Set a cookie that scripts cannot read, and that browsers do not add to requests from other sites.

    Args:
        response: response to which the cookie is added.
        request: request of the client; over https, the cookie is sent over https only.
        name: name of the cookie.
        cookie_value: value of the cookie.
        seconds: time until the cookie expires.
        path: path of the pages for which browsers send the cookie.
    """
    is_https = request.url.scheme == "https"
    response.set_cookie(
        name, cookie_value, max_age=seconds, path=path, secure=is_https, httponly=True, samesite="strict"
    )


# ---- the login page in the language of the reader. It is one response without further files, because loading
# other files needs a login. Its script contains no variable text, so that its hash is constant.


def language_of(accept_language: str) -> str:
    """Return the language of the login page that a browser prefers.

    Args:
        accept_language: value of the Accept-Language header (RFC 9110, section 12.5.4).

    Returns:
        The language of TEXTS with the highest weight in the header, or "en" if the header names none of them.
    """
    weight_by_language: dict[str, float] = {}
    # The length is limited, because anybody can send this header.
    for language_range in accept_language[:1000].split(","):
        tag, _, weight_parameter = language_range.partition(";")
        language_code = tag.strip()[:2].lower()
        weight_text = weight_parameter.strip().removeprefix("q=") or "1"
        if language_code in TEXTS and weight_text.replace(".", "", 1).isdecimal():
            weight_by_language[language_code] = max(
                weight_by_language.get(language_code, 0.0), float(weight_text)
            )
    # A weight of 0 means "not acceptable".
    return (
        max(weight_by_language, key=lambda code: weight_by_language[code])
        if any(weight_by_language.values())
        else "en"
    )


def login_page(accept_language: str, csrf: str, rejection: RequestError | None = None) -> str:
    """Return the HTML of the login page.

    Args:
        accept_language: value of the Accept-Language header.
        csrf: value of the hidden field `csrf` of the form.
        rejection: error of the last login attempt, which the page shows; None: no error.
    """
    language = language_of(accept_language)
    # every text that is inserted into the page is escaped
    escaped_texts = {key: html.escape(text) for key, text in TEXTS[language].items()}
    message_html = ""
    if rejection is not None:
        text_key = "withdrawn" if isinstance(rejection, AccessRevoked) else str(rejection.status)
        message_text = escaped_texts.get(text_key, html.escape(f"{rejection.error} {rejection.remedy}"))
        message_html = (
            f"<p role=alert>{message_text.replace('{seconds}', rejection.headers.get('Retry-After', ''))}</p>"
        )
    return _PAGE.format(
        language=language,
        title=escaped_texts["title"],
        token=escaped_texts["token"],
        button=escaped_texts["button"],
        waiting=escaped_texts["waiting"],
        later=escaped_texts["later"],
        style=_STYLE,
        script=_SCRIPT,
        message=message_html,
        csrf=csrf,
    )
