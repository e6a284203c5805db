"""Checks every request before it reaches the application, adds the headers of every response, and writes the
access log. The checks are in one place, so that no route can omit one.

The access log contains one JSON object per line and request. It never contains a token, session id, CSRF
value, body or query.

Fields:
    time          ISO 8601, UTC, milliseconds
    event         'request'; 'start' with mode, exposed and page_version when a server starts
    request       8 random hex digits, also sent as the header X-Request-Id
    address       of the client
    method        GET, POST, ...
    route         template of the route, such as '/api/shapes/{address}'; for an unknown address its path,
    with
                  long words replaced by '*'
    status        of the response; 0 if the client disconnected before it began
    milliseconds  from the request's headers to the last byte of the response
    bytes         of the response's body
    annotator     name, or null for an unknown client
    by            'token', 'session', 'local' or null: the kind of identification
    refused       short reason for a rejected request, absent otherwise

At 20 MB a file is renamed to FILE.1, up to FILE.5, and a new one is started.
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
from eg3d_rlhf.people.label.server.models import (
    LOGGER,
    REMEDIES,
    AccessRevoked,
    RequestError,
    no_database,
    too_many,
)
from eg3d_rlhf.people.label.server.options import LOOPBACK, AppOptions, Limits

SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
PAGES = ("/", "/login", "/admin")  # pages to which another site may link
_HOST = re.compile(r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+)(?::(\d{1,5}))?")
_LONG_WORD = re.compile(r"[^/]{16,}")  # a word of an unknown path that might be a token
_CLOSE = {"Connection": "close"}  # sent when the rest of the body is not read
# Requests that need no token when other machines can reach the server.
OPEN = {("GET", "/health"), ("GET", "/login"), ("POST", "/login")}
# Set-Cookie value that deletes the session cookie
FORGET = f"{COOKIE}=; Max-Age=0; Path=/; HttpOnly; SameSite=Strict"
COMMON_POLICY = "base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
# blob: allows what the page itself has loaded: textures of a GLB (connect-src, img-src) and videos
# (media-src). The worker reads Gaussian splats.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; media-src blob:;"
    f" worker-src 'self'; connect-src 'self' blob:; {COMMON_POLICY}"
)
FIXED = {
    "Server": "-",  # without a value granian sends its own name
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
    """Check that there is exactly one well-formed Host header. On loopback it must name this machine.
    Otherwise a foreign name that resolves to 127.0.0.1 could be used to read the page (DNS rebinding).

    Raises: RequestError 400, 421.
    """
    # Two Host headers could be read differently by a proxy and by this server.
    hosts = headers.getlist("host")
    match = _HOST.fullmatch(hosts[0]) if len(hosts) == 1 else None
    if match is None:
        raise RequestError(400, "Expected one valid Host header.", "Use the address that the server printed.")
    if not exposed and match.group(1).strip("[]").lower() not in LOOPBACK:
        raise RequestError(
            421,
            "This server can be reached only by the names of this machine.",
            "Open http://127.0.0.1 with the server's port.",
        )


def check_fetch(headers: Headers, method: str, path: str) -> None:
    """Reject what a browser requests for another site, except links to a page. Raises: RequestError 403."""
    # Scripts and old browsers do not send the header; their requests are checked by token or CSRF value.
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
    raise RequestError(403, "Another site has sent this request.", "Open the application's own page.")


def check_same_origin(headers: Headers, scheme: str) -> None:
    """Check that an unsafe request, which a browser authorises by a cookie, comes from this server's own
    pages.

    Raises: RequestError 403.
    """
    origins = headers.getlist("origin")
    sites = headers.getlist("sec-fetch-site")
    if not origins and not sites:
        raise RequestError(
            403,
            "Expected an Origin or Sec-Fetch-Site header.",
            "Scripts send 'Authorization: Bearer TOKEN' instead.",
        )
    expected = [f"{scheme}://{headers.get('host', '')}".lower()]
    if origins and [o.lower() for o in origins] != expected or sites and sites != ["same-origin"]:
        raise RequestError(
            403, "Another site has sent this request.", "Send it from the application's own page."
        )


class Disconnected(Exception):
    """Error of a client that disconnects before its request is complete."""


async def read_body(receive: Receive, limits: Limits) -> bytes:
    """Read the entire body, chunked or not. Raises: RequestError 408, 413; Disconnected."""
    parts = []
    size = 0
    try:
        # granian limits the time of the headers only.
        async with asyncio.timeout(limits.body_seconds):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise Disconnected
                parts.append(message.get("body", b""))
                size += len(parts[-1])
                # The size is checked while the body arrives: a chunked body has no Content-Length.
                if size > limits.body:
                    raise _too_large(limits)
                if not message.get("more_body", False):
                    return b"".join(parts)
    except TimeoutError:
        raise RequestError(408, "The request took too long to arrive.", "Send it again.", _CLOSE) from None


def _too_large(limits: Limits) -> RequestError:
    return RequestError(
        413, f"Expected a body of at most {limits.body} bytes.", "Send a smaller body.", _CLOSE
    )


@dataclass
class Entry:
    """Line of the access log for one request, completed while the request is processed."""

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
        """Return the fields of the line; times are in milliseconds."""
        values = asdict(self) | {"milliseconds": round(1000 * (time.perf_counter() - self.began), 1)}
        return {k: v for k, v in values.items() if k != "began" and (k != "refused" or v is not None)}


class PrivateFileHandler(RotatingFileHandler):
    """Rotating log handler whose files only their owner can read."""

    def _open(self):
        # The mode is given at creation, so that the file is never readable for others.
        return open(
            self.baseFilename,
            self.mode,
            encoding=self.encoding,
            opener=lambda path, flags: os.open(path, flags, 0o600),
        )


class AccessLog:
    """Access log in a file; without a path, lines are dropped."""

    def __init__(self, path: Path | None):
        self._logger = None
        if path is not None:
            path.parent.mkdir(0o700, parents=True, exist_ok=True)
            # not registered: other logging settings cannot change it
            self._logger = logging.Logger(f"access:{path}")
            self._logger.addHandler(
                PrivateFileHandler(path, maxBytes=20_000_000, backupCount=5, encoding="utf-8", delay=True)
            )

    def write(self, event: str, fields: dict) -> None:
        """Write one line."""
        if self._logger is None:
            return
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        self._logger.info("%s", json.dumps({"time": now, "event": event, **fields}))

    def close(self) -> None:
        for handler in self._logger.handlers if self._logger else ():
            handler.close()


class RequestChecks:
    """ASGI middleware that checks host, origin, size, identity, rate, CSRF value and content type, adds
    headers and writes the access log.
    """

    def __init__(self, app: ASGIApp, options: AppOptions, identities: Identities, log: AccessLog):
        self.app = app
        self.options = options
        self.identities = identities
        self.log = log
        self.annotators = Buckets(*options.limits.requests)
        self.anonymous = Buckets(*options.limits.anonymous)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            # The application has no websockets. 1008: policy violation.
            await send({"type": "websocket.close", "code": 1008})
        elif scope["type"] == "http":
            await self._http(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check one request, pass it to the application, and log it."""
        # Behind a trusted proxy this is already the client's address.
        address = (scope.get("client") or ("", 0))[0]
        # without 'http.response.pathsend': granian would read an export's file after the application has
        # removed it
        scope["extensions"] = {}
        entry = Entry(address, scope["method"][:16], _LONG_WORD.sub("*", scope["path"])[:200])
        # From here on every response gets the headers and is recorded.
        send = _recorded(send, entry, scope["scheme"] == "https")
        try:
            try:
                # The body was read by the checks, so the application gets it from a list of one element.
                body = [await self._admit(scope, receive, entry)]

                async def replay() -> Message:
                    return (
                        {"type": "http.request", "body": body.pop(), "more_body": False}
                        if body
                        else await receive()
                    )

                await self.app(scope, replay, send)
            except RequestError as rejection:
                entry.refused = rejection.error
                response: Response = rejection.response()
                if rejection.status == 401:  # a person without a session is sent to the login page
                    headers = Headers(scope=scope)
                    page = (
                        scope["method"] == "GET"
                        and scope["path"] in ("/", "/admin")
                        and "authorization" not in headers
                    )
                    response = RedirectResponse("/login", 303) if page else response
                    # An invalid session cookie is deleted. That of a revoked annotator stays: the login page
                    # recognises her by it and says that the access was revoked.
                    if f"{COOKIE}=" in headers.get("cookie", "") and not isinstance(rejection, AccessRevoked):
                        response.headers.append("Set-Cookie", FORGET)
                await response(scope, receive, send)
        except Disconnected:
            entry.refused = "disconnected"  # the response, if any, cannot be sent
        except (exc.DBAPIError, exc.TimeoutError) as error:
            answer = no_database(error)
            entry.refused = answer.error
            await answer.response()(scope, receive, send)
        except Exception:
            # The number also stands in the response, so that a report can be found in the log.
            LOGGER.exception("request %s failed", entry.request)
            # Once a response has begun, no other status can be sent.
            if entry.status == 0:
                await RequestError(500, "The server has an internal error.", REMEDIES[500]).response()(
                    scope, receive, send
                )
        finally:
            # The router has stored the route in the scope.
            route = scope.get("route")
            entry.route = getattr(route, "path", entry.route)
            entry.refused = entry.refused or scope.get("state", {}).get("refused")
            self.log.write("request", entry.fields())

    async def _admit(self, scope: Scope, receive: Receive, entry: Entry) -> bytes:
        """Check a request in order of cost and return its body. Raises: RequestError, Disconnected."""
        headers = Headers(scope=scope)
        method = scope["method"]
        path = scope["path"]
        limits = self.options.limits
        if len(scope.get("raw_path") or b"") + len(scope["query_string"]) > limits.url:
            raise RequestError(
                414, f"Expected an address of at most {limits.url} bytes.", "Use a shorter address."
            )
        if not path.isprintable():
            raise RequestError(
                400, "The address must consist of printable characters.", "Correct the address."
            )
        # granian limits the headers only where they arrive in several parts.
        if sum(len(name) + len(value) for name, value in headers.raw) > limits.headers:
            raise RequestError(
                431, f"Expected headers of at most {limits.headers} bytes.", "Send smaller headers.", _CLOSE
            )
        check_host(headers, self.options.exposed)
        check_fetch(headers, method, path)
        lengths = headers.getlist("content-length")  # checked before any byte of the body is read
        # isdigit() alone would accept digits of other scripts.
        if lengths and (len(lengths) > 1 or not (lengths[0].isascii() and lengths[0].isdigit())):
            raise RequestError(400, "Expected one Content-Length of digits.", "Correct the header.", _CLOSE)
        # A number of more than 20 digits is cut: it remains larger than the limit.
        if lengths and int(lengths[0][:20]) > limits.body:
            raise _too_large(limits)
        state = scope.setdefault("state", {})
        identity = state["identity"] = await self._identify(headers, method, path, entry)
        if method not in SAFE_METHODS:
            # A token in a header is no authority that a browser adds by itself, so it needs no CSRF check.
            if identity is None or identity.by != "token":
                check_same_origin(headers, scope["scheme"])
            if identity is not None and identity.by != "token" and path != "/login":
                if not hmac.compare_digest(
                    identity.csrf.encode(), headers.get("x-csrf-token", "").encode("utf-8", "replace")
                ):
                    remedy = "Request /api/session and send its 'csrf' as X-CSRF-Token."
                    raise RequestError(403, "Expected the X-CSRF-Token of this session.", remedy)
            _check_type(headers, path)
        body = await read_body(receive, limits)
        if b"\0" in body:  # JSON and forms in UTF-8 contain no NUL, JSON in UTF-16 does
            raise RequestError(400, "The body must be in UTF-8 without NUL.", "Send it in UTF-8.")
        return body

    async def _identify(self, headers: Headers, method: str, path: str, entry: Entry) -> Identity | None:
        """Return the identity of the client within its rate limit; None only for requests that need none.

        Raises: RequestError 401, 429.
        """
        public = (method, path) in OPEN
        address = address_key(entry.address)
        identity = None
        rejection = None
        try:
            if not public:
                # Looks into the database, so it runs in a thread.
                identity = await run_in_threadpool(self.identities.find, headers, entry.address)
        except RequestError as error:
            rejection = error
        if identity is not None:
            entry.annotator = identity.annotator.name
            entry.by = identity.by
        # A wrong token counts for the address as well: the limit is applied before the rejection.
        wait = self.annotators.take(str(identity.annotator.id)) if identity else self.anonymous.take(address)
        if wait:
            raise too_many(wait)
        if rejection is not None:
            raise rejection
        if identity is None and not public:
            raise RequestError(
                401,
                "This request needs a token or a session.",
                "Log in at /login, or send 'Authorization: Bearer TOKEN'.",
                {"WWW-Authenticate": "Bearer"},
            )
        return identity


def _check_type(headers: Headers, path: str) -> None:
    """Check the type of a body: JSON under /api, a form at /login. Raises: RequestError 415."""
    expected = (
        "application/json"
        if path.startswith("/api/")
        else "application/x-www-form-urlencoded"
        if path == "/login"
        else None
    )
    kind, _, rest = headers.get("content-type", "").partition(";")
    # Other parameters than charset end up here, too, and are rejected.
    charset = rest.strip().lower().removeprefix("charset=").strip('"')
    if expected is not None and (kind.strip().lower() != expected or charset not in ("", "utf-8")):
        raise RequestError(
            415, f"The Content-Type must be {expected}.", "Send the body in that format, in UTF-8."
        )
    # A compressed body could be small when it arrives and huge afterwards.
    if "content-encoding" in headers:
        raise RequestError(415, "The body must not have a Content-Encoding.", "Send it uncompressed.")


def _recorded(send: Send, entry: Entry, https: bool) -> Send:
    """Wrap `send` to add headers to the response and to record its status and size."""

    async def recorded(message: Message) -> None:
        if message["type"] == "http.response.start":
            entry.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["X-Request-Id"] = entry.request
            for name, value in (
                FIXED | ({"Strict-Transport-Security": "max-age=31536000"} if https else {})
            ).items():
                headers.setdefault(name, value)  # a response may have set its own value
        elif message["type"] == "http.response.body":
            # The bytes of the body, without headers.
            entry.bytes += len(message.get("body", b""))
        await send(message)

    return recorded
