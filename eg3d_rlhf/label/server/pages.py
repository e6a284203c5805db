"""The pages and their files, log-in and log-out."""

import gzip
import hashlib
import html
import mimetypes
import secrets
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qs

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.concurrency import run_in_threadpool

from eg3d_rlhf.label.server.errors import Refusal, note
from eg3d_rlhf.label.server.gate import FORGET, policy_of_style
from eg3d_rlhf.label.server.identity import COOKIE, csrf_token
from eg3d_rlhf.label.server.routes import Admin, Context, Who

SUFFIXES = {".html", ".js", ".css", ".svg", ".png", ".ico", ".txt", ".webmanifest"}
LOGIN_COOKIE = "login"
STYLE, PAGE = ((Path(__file__).parent / name).read_text() for name in ("login.css", "login.html"))


@dataclass(frozen=True)
class StaticFile:
    """A file of the page, kept in memory."""

    data: bytes
    packed: bytes  # gzip
    kind: str  # media type
    etag: str


def read_static(folder: Path) -> dict[str, StaticFile]:
    """The files that are served, by name: those of `folder` itself with a suffix of SUFFIXES.

    Raises: ValueError where the pages are missing.
    """
    found = {p.name: p.read_bytes() for p in sorted(folder.glob("*")) if p.suffix in SUFFIXES and p.is_file()}
    missing = sorted({"index.html", "admin.html"} - set(found))
    if missing:
        raise ValueError(f"{folder}: expected {' and '.join(missing)}, got {len(found)} other files. Install the package again.")
    files = {}
    for name, data in found.items():
        kind = mimetypes.guess_type(name)[0] or "application/octet-stream"
        kind = "text/javascript" if name.endswith(".js") else kind
        files[name] = StaticFile(data, gzip.compress(data, mtime=0), kind, f'"{hashlib.sha256(data).hexdigest()[:20]}"')
    return files


def version_of(files: dict[str, StaticFile]) -> str:
    """Changes with any file of the page; judgements name it."""
    return hashlib.sha256("".join(f"{name}{file.etag}" for name, file in sorted(files.items())).encode()).hexdigest()[:12]


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

    @router.get("/static/{name}")
    async def static(name: str, request: Request) -> Response:
        if name not in context.files:
            raise Refusal(404, "No such file.", "Check the address.")
        return _file(context.files[name], request)

    @router.get("/login")
    async def login_page(request: Request) -> Response:
        return _login_page(request)

    @router.post("/login")
    async def login(request: Request) -> Response:
        token = _form_token(await request.body(), request.cookies.get(LOGIN_COOKIE, ""))
        address = request.client.host if request.client else ""
        try:
            session = await run_in_threadpool(_open_session, context, token, address)
        except Refusal as refusal:
            note(request, refusal)
            return _login_page(request, refusal)
        response = RedirectResponse("/", 303)
        _set_cookie(response, request, COOKIE, session, int(context.options.limits.session_seconds))
        response.delete_cookie(LOGIN_COOKIE, path="/login")
        return response

    @router.post("/logout")
    async def logout(who: Who) -> Response:
        if who.session:
            await run_in_threadpool(context.store.close_session, who.session)
        response = JSONResponse({"closed": bool(who.session)}) if who.by == "token" else RedirectResponse("/login", 303)
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


def _open_session(context: Context, token: str, address: str) -> str:
    annotator = context.identities.by_token(token, address)
    return context.store.open_session(annotator.id, context.options.limits.session_seconds)


def _form_token(body: bytes, cookie: str) -> str:
    """The token of a log-in form whose CSRF field fits the cookie.

    Raises: Refusal 400, 403.
    """
    try:
        fields = parse_qs(body.decode("ascii"), keep_blank_values=True, strict_parsing=True, max_num_fields=4, errors="strict")
    except ValueError:
        raise Refusal(400, "Expected a form with token and csrf.", "Use the log-in page.") from None
    if sorted(fields) != ["csrf", "token"] or any(len(values) != 1 for values in fields.values()):
        raise Refusal(400, "Expected a form with token and csrf, each once.", "Use the log-in page.")
    if not cookie or not secrets.compare_digest(csrf_token(cookie, "login").encode(), fields["csrf"][0].encode()):
        raise Refusal(403, "This form is not from the log-in page, or its cookie is gone.", "Load /login again, with cookies allowed.")
    return fields["token"][0].strip()


def _login_page(request: Request, refusal: Refusal | None = None) -> Response:
    cookie = secrets.token_urlsafe(24)
    message = f"<p role=alert>{html.escape(f'{refusal.error} {refusal.remedy}')}</p>" if refusal else ""
    page = PAGE.format(style=STYLE, message=message, csrf=csrf_token(cookie, "login"))
    response = HTMLResponse(page, refusal.status if refusal else 200, refusal.headers if refusal else None)
    response.headers["Content-Security-Policy"] = policy_of_style(STYLE)
    response.headers["Referrer-Policy"] = "same-origin"  # under no-referrer a form is sent with 'Origin: null'
    _set_cookie(response, request, LOGIN_COOKIE, cookie, 3600, path="/login")
    return response


def _set_cookie(response: Response, request: Request, name: str, value: str, seconds: int, path: str = "/") -> None:
    https = request.url.scheme == "https"
    response.set_cookie(name, value, max_age=seconds, path=path, secure=https, httponly=True, samesite="strict")
