"""The gate before the application: every request passes all checks here, so that no route can forget one, and
gets its headers here.

Access log: one JSON object a line for each request; no token, session, CSRF value, body or query ever enters
it.

Fields:
    time          ISO 8601, UTC, milliseconds
    event         'request'; 'start' with mode, exposed and version when a server starts
    request       8 random hex digits, also sent as the header X-Request-Id
    address       of the client
    method        GET, POST, ...
    route         template of the route, as '/api/shapes/{address}'; of an unknown address its path, long
                  words replaced by '*'
    status        of the response; 0 where the client left before it began
    milliseconds  from the request's head to the response's last byte
    bytes         of the response's body
    annotator     name, or null where nobody is known
    by            'token', 'session', 'local' or null: how she is known
    refused       short reason of a refusal, else absent

A file is continued as FILE.1 ... FILE.5 at 20 MB each.
"""

import asyncio
import datetime
import hmac
import json
import logging
import os
import re
import secrets
import time
from dataclasses import asdict, dataclass, field
from logging.handlers import RotatingFileHandler
from pathlib import Path

from fastapi.responses import RedirectResponse, Response
from sqlalchemy import exc
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from eg3d_rlhf.people.label.server.identity import COOKIE, Buckets, Identities, Identity, address_key
from eg3d_rlhf.people.label.server.models import LOGGER, REMEDIES, Refusal, Withdrawn, no_database, too_many
from eg3d_rlhf.people.label.server.options import LOOPBACK, AppOptions, Limits

SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
PAGES = ("/", "/login", "/admin")  # a link on another site may lead here
_HOST = re.compile(r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+)(?::(\d{1,5}))?")
_LONG_WORD = re.compile(r"[^/]{16,}")  # of an unknown path: what might be a token
_CLOSE = {"Connection": "close"}  # the rest of the body is not waited for
# all that answers without a token when exposed
OPEN = {("GET", "/health"), ("GET", "/login"), ("POST", "/login")}
FORGET = f"{COOKIE}=; Max-Age=0; Path=/; HttpOnly; SameSite=Strict"
COMMON_POLICY = "base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
# blob: is what the page has loaded itself, textures of a GLB (connect-src, img-src) and videos; the worker
# reads Gaussians
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; media-src blob:;"
    f" worker-src 'self'; connect-src 'self' blob:; {COMMON_POLICY}"
)
FIXED = {
    "Server": "-",  # granian names itself where nothing is sent
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": (
        "accelerometer=(), camera=(), geolocation=(), gyroscope=(), microphone=(), payment=(), usb=()"
    ),
    "Content-Security-Policy": POLICY,
    "Cache-Control": "no-store",
}


def check_host(headers: Headers, exposed: bool) -> None:
    """Exactly one well-formed Host; on loopback a name of this machine, so that no foreign name can be
    pointed at it (DNS rebinding).
    """
    hosts = headers.getlist("host")
    match = _HOST.fullmatch(hosts[0]) if len(hosts) == 1 else None
    if match is None:
        raise Refusal(400, "Expected one valid Host header.", "Use the address that the server printed.")
    if not exposed and match.group(1).strip("[]").lower() not in LOOPBACK:
        raise Refusal(
            421,
            "This server answers only to this machine's own names.",
            "Open http://127.0.0.1 with the server's port.",
        )


def check_fetch(headers: Headers, method: str, path: str) -> None:
    """Refuse what a browser says another site asked for, but for links to a page. Raises: Refusal 403."""
    site = headers.get("sec-fetch-site", "same-origin")
    if site in ("same-origin", "none"):
        return
    if (
        method == "GET"
        and path in PAGES
        and headers.get("sec-fetch-mode") == "navigate"
        and headers.get("sec-fetch-dest") == "document"
    ):
        return
    raise Refusal(403, "Another site asked for this.", "Open the application's own page.")


def check_same_origin(headers: Headers, scheme: str) -> None:
    """An unsafe request that a browser authorises by itself must come from this server's own pages."""
    origins = headers.getlist("origin")
    sites = headers.getlist("sec-fetch-site")
    if not origins and not sites:
        raise Refusal(
            403,
            "Expected an Origin or Sec-Fetch-Site header.",
            "Scripts send 'Authorization: Bearer TOKEN' instead.",
        )
    ours = [f"{scheme}://{headers.get('host', '')}".lower()]
    if origins and [o.lower() for o in origins] != ours or sites and sites != ["same-origin"]:
        raise Refusal(403, "Another site sent this.", "Send it from the application's own page.")


class Disconnected(Exception):
    """The client left before its request was complete."""


async def read_body(receive: Receive, limits: Limits) -> bytes:
    """The whole body, chunked or not. Raises: Refusal 408, 413; Disconnected."""
    parts = []
    size = 0
    try:
        async with asyncio.timeout(limits.body_seconds):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise Disconnected
                parts.append(message.get("body", b""))
                size += len(parts[-1])
                if size > limits.body:
                    raise _too_large(limits)
                if not message.get("more_body", False):
                    return b"".join(parts)
    except TimeoutError:
        raise Refusal(408, "The request took too long to arrive.", "Send it again.", _CLOSE) from None


def _too_large(limits: Limits) -> Refusal:
    return Refusal(413, f"Expected a body of at most {limits.body} bytes.", "Send less.", _CLOSE)


@dataclass
class Entry:
    """One request as it proceeds."""

    address: str
    method: str
    route: str
    request: str = field(default_factory=lambda: secrets.token_hex(4))
    status: int = 0
    bytes: int = 0
    annotator: str | None = None
    by: str | None = None
    refused: str | None = None
    began: float = field(default_factory=time.perf_counter)

    def fields(self) -> dict:
        values = asdict(self) | {"milliseconds": round(1000 * (time.perf_counter() - self.began), 1)}
        return {k: v for k, v in values.items() if k != "began" and (k != "refused" or v is not None)}


class PrivateFileHandler(RotatingFileHandler):
    """Its files can be read by their owner alone."""

    def _open(self):
        return open(
            self.baseFilename,
            self.mode,
            encoding=self.encoding,
            opener=lambda path, flags: os.open(path, flags, 0o600),
        )


class AccessLog:
    """Writes the lines; without a path, drops them."""

    def __init__(self, path: Path | None):
        self._logger = None
        if path is not None:
            path.parent.mkdir(0o700, parents=True, exist_ok=True)
            self._logger = logging.Logger(f"access:{path}")  # not registered: nobody else's settings reach it
            self._logger.addHandler(
                PrivateFileHandler(path, maxBytes=20_000_000, backupCount=5, encoding="utf-8", delay=True)
            )

    def write(self, event: str, fields: dict) -> None:
        if self._logger is None:
            return
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        self._logger.info("%s", json.dumps({"time": now, "event": event, **fields}))

    def close(self) -> None:
        for handler in self._logger.handlers if self._logger else ():
            handler.close()


class Gate:
    """ASGI middleware: host, origin, size, identity, rate, CSRF and content type; adds headers and writes the
    access log.
    """

    def __init__(self, app: ASGIApp, options: AppOptions, identities: Identities, log: AccessLog):
        self.app = app
        self.options = options
        self.identities = identities
        self.log = log
        self.annotators = Buckets(*options.limits.requests)
        self.strangers = Buckets(*options.limits.strangers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        elif scope["type"] == "http":
            await self._http(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        address = (scope.get("client") or ("", 0))[0]
        # no 'http.response.pathsend': granian reads such a file after the application has removed it
        scope["extensions"] = {}
        entry = Entry(address, scope["method"][:16], _LONG_WORD.sub("*", scope["path"])[:200])
        send = _recorded(send, entry, scope["scheme"] == "https")
        try:
            try:
                body = [await self._admit(scope, receive, entry)]

                async def replay() -> Message:
                    return (
                        {"type": "http.request", "body": body.pop(), "more_body": False}
                        if body
                        else await receive()
                    )

                await self.app(scope, replay, send)
            except Refusal as refusal:
                entry.refused = refusal.error
                response: Response = refusal.response()
                if refusal.status == 401:  # a person without a session is sent to the login page
                    headers = Headers(scope=scope)
                    page = (
                        scope["method"] == "GET"
                        and scope["path"] in ("/", "/admin")
                        and "authorization" not in headers
                    )
                    response = RedirectResponse("/login", 303) if page else response
                    # by it the login page knows her
                    if f"{COOKIE}=" in headers.get("cookie", "") and not isinstance(refusal, Withdrawn):
                        response.headers.append("Set-Cookie", FORGET)
                await response(scope, receive, send)
        except Disconnected:
            entry.refused = "disconnected"
        except (exc.DBAPIError, exc.TimeoutError) as error:
            answer = no_database(error)
            entry.refused = answer.error
            await answer.response()(scope, receive, send)
        except Exception:
            LOGGER.exception("request %s failed", entry.request)
            if entry.status == 0:
                await Refusal(500, "The server made a mistake.", REMEDIES[500]).response()(
                    scope, receive, send
                )
        finally:
            route = scope.get("route")
            entry.route = getattr(route, "path", entry.route)
            entry.refused = entry.refused or scope.get("state", {}).get("refused")
            self.log.write("request", entry.fields())

    async def _admit(self, scope: Scope, receive: Receive, entry: Entry) -> bytes:
        headers = Headers(scope=scope)
        method = scope["method"]
        path = scope["path"]
        limits = self.options.limits
        if len(scope.get("raw_path") or b"") + len(scope["query_string"]) > limits.url:
            raise Refusal(414, f"Expected an address of at most {limits.url} bytes.", "Ask for less.")
        if not path.isprintable():
            raise Refusal(400, "Expected printable characters in the address.", "Correct the address.")
        # the parser looks only where they come in parts
        if sum(len(name) + len(value) for name, value in headers.raw) > limits.headers:
            raise Refusal(431, f"Expected headers of at most {limits.headers} bytes.", "Send less.", _CLOSE)
        check_host(headers, self.options.exposed)
        check_fetch(headers, method, path)
        lengths = headers.getlist("content-length")  # looked at before a byte of the body is read
        if lengths and (len(lengths) > 1 or not (lengths[0].isascii() and lengths[0].isdigit())):
            raise Refusal(400, "Expected one Content-Length of digits.", "Correct the header.", _CLOSE)
        if lengths and int(lengths[0][:20]) > limits.body:
            raise _too_large(limits)
        state = scope.setdefault("state", {})
        identity = state["identity"] = await self._identify(headers, method, path, entry)
        if method not in SAFE_METHODS:
            if identity is None or identity.by != "token":
                check_same_origin(headers, scope["scheme"])
            if identity is not None and identity.by != "token" and path != "/login":
                if not hmac.compare_digest(
                    identity.csrf.encode(), headers.get("x-csrf-token", "").encode("utf-8", "replace")
                ):
                    remedy = "Ask for /api/session and send its 'csrf' as X-CSRF-Token."
                    raise Refusal(403, "Expected the X-CSRF-Token of this session.", remedy)
            _check_type(headers, path)
        body = await read_body(receive, limits)
        if b"\0" in body:  # in UTF-8, neither JSON nor a form has one; JSON in UTF-16 has
            raise Refusal(400, "Expected a body in UTF-8 without NUL.", "Send it in UTF-8.")
        return body

    async def _identify(self, headers: Headers, method: str, path: str, entry: Entry) -> Identity | None:
        """Who asks, within her rate; None only for what is open to everybody. Raises: Refusal 401, 429."""
        public = (method, path) in OPEN
        address = address_key(entry.address)
        identity = None
        refusal = None
        try:
            identity = (
                None if public else await run_in_threadpool(self.identities.find, headers, entry.address)
            )
        except Refusal as error:
            refusal = error
        if identity is not None:
            entry.annotator = identity.annotator.name
            entry.by = identity.by
        wait = self.annotators.take(str(identity.annotator.id)) if identity else self.strangers.take(address)
        if wait:
            raise too_many(wait)
        if refusal is not None:
            raise refusal
        if identity is None and not public:
            raise Refusal(
                401,
                "Expected a token or a session.",
                "Log in at /login, or send 'Authorization: Bearer TOKEN'.",
                {"WWW-Authenticate": "Bearer"},
            )
        return identity


def _check_type(headers: Headers, path: str) -> None:
    """Bodies are JSON under /api, a form at /login. Raises: Refusal 415."""
    expected = (
        "application/json"
        if path.startswith("/api/")
        else "application/x-www-form-urlencoded"
        if path == "/login"
        else None
    )
    kind, _, rest = headers.get("content-type", "").partition(";")
    charset = rest.strip().lower().removeprefix("charset=").strip('"')
    if expected is not None and (kind.strip().lower() != expected or charset not in ("", "utf-8")):
        raise Refusal(415, f"Expected Content-Type {expected}.", "Send the body in that form, in UTF-8.")
    if "content-encoding" in headers:
        raise Refusal(415, "Expected a body without Content-Encoding.", "Send it uncompressed.")


def _recorded(send: Send, entry: Entry, https: bool) -> Send:
    async def recorded(message: Message) -> None:
        if message["type"] == "http.response.start":
            entry.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["X-Request-Id"] = entry.request
            for name, value in (
                FIXED | ({"Strict-Transport-Security": "max-age=31536000"} if https else {})
            ).items():
                headers.setdefault(name, value)  # where the response does not set it itself
        elif message["type"] == "http.response.body":
            entry.bytes += len(message.get("body", b""))
        await send(message)

    return recorded
