"""Checks of every request before it reaches the application, headers of every response, and the access log.

The checks are in one place, so that no route can omit one.

The access log contains one line for each request, which is a JSON object. It never contains a token, session
id, CSRF value, body or query.

Fields:
    time          ISO 8601, UTC, milliseconds
    event         'request'; 'start' with mode, exposed and page_version when a server starts
    request       8 random hex digits, also sent as the header X-Request-Id
    address       IP address of the client
    method        GET, POST, ...
    route         template of the route, such as '/api/shapes/{address}'; for an unknown route the path of
                  the request, with long words replaced by '*'
    status        status of the response; 0 if the client disconnected before the response began
    milliseconds  time from the headers of the request to the last byte of the response
    bytes         number of bytes in the body of the response
    annotator     name of the annotator, or null for an unknown client
    by            kind of identification: 'token', 'session', 'local' or null
    rejected      short reason for a rejected request; absent if the request was not rejected

When the file reaches 20 MB, it is renamed to FILE.1, and a new file is started. FILE.1 to FILE.5 are kept.
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
_LONG_WORD = re.compile(r"[^/]{16,}")  # part of an unknown path that might be a token
_CLOSE = {"Connection": "close"}  # header of a response that is sent before the entire body was read
# Requests that need no token when other machines can reach the server.
OPEN = {("GET", "/health"), ("GET", "/login"), ("POST", "/login")}
# Set-Cookie value that deletes the session cookie
FORGET = f"{COOKIE}=; Max-Age=0; Path=/; HttpOnly; SameSite=Strict"
COMMON_POLICY = "base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
# "blob:" allows data that the page itself has loaded: textures of a GLB (connect-src, img-src) and videos
# (media-src). The worker (worker-src) reads Gaussian splats.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; media-src blob:;"
    f" worker-src 'self'; connect-src 'self' blob:; {COMMON_POLICY}"
)
# headers of every response
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
    """Check that a request has exactly one valid Host header.

    On a server that only this machine can reach, the header must name this machine. Otherwise another site
    could read the page through a name that resolves to 127.0.0.1 (DNS rebinding).

    Args:
        headers: headers of the request.
        exposed: True if other machines can reach the server.

    Raises:
        RequestError: 400 for a missing or invalid header, 421 for the name of another machine.
    """
    # Of two Host headers, a proxy could read one and this server the other.
    host_headers = headers.getlist("host")
    host_match = _HOST.fullmatch(host_headers[0]) if len(host_headers) == 1 else None
    if host_match is None:
        raise RequestError(
            400, "The request must have one valid Host header.", "Use the address that the server printed."
        )
    if not exposed and host_match.group(1).strip("[]").lower() not in LOOPBACK:
        raise RequestError(
            421,
            "This server can be reached only by the names of this machine.",
            "Open http://127.0.0.1 with the server's port.",
        )


def check_fetch(headers: Headers, method: str, path: str) -> None:
    """Reject requests that a browser sends for another site, except links to a page.

    Args:
        headers: headers of the request.
        method: HTTP method.
        path: path of the request.

    Raises:
        RequestError: 403 for a request of another site.
    """
    # Scripts and old browsers do not send the header; their requests are checked by token or CSRF value.
    fetch_site = headers.get("sec-fetch-site", "same-origin")
    if fetch_site in ("same-origin", "none"):
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
    """Check that a request comes from a page of this server.

    A browser adds the cookie also to a request that another site has caused, so an unsafe request needs this
    check.

    Args:
        headers: headers of the request.
        scheme: "http" or "https".

    Raises:
        RequestError: 403 for a request of another site, or without the headers that name its origin.
    """
    origin_headers = headers.getlist("origin")
    site_headers = headers.getlist("sec-fetch-site")
    if not origin_headers and not site_headers:
        raise RequestError(
            403,
            "The request must have an Origin or Sec-Fetch-Site header.",
            "From a script, send the header 'Authorization: Bearer TOKEN' instead of a cookie.",
        )
    own_origins = [f"{scheme}://{headers.get('host', '')}".lower()]
    # A header that is present must be right; lists, because a header could occur twice.
    if (
        origin_headers
        and [origin.lower() for origin in origin_headers] != own_origins
        or site_headers
        and site_headers != ["same-origin"]
    ):
        raise RequestError(
            403, "Another site has sent this request.", "Send it from the application's own page."
        )


class Disconnected(Exception):
    """Error of a client that disconnects before its request is complete."""


async def read_body(receive: Receive, limits: Limits) -> bytes:
    """Read the entire body of a request.

    Raises:
        RequestError: 408 if the body takes too long to arrive, 413 if it is too large.
        Disconnected: the client has disconnected.
    """
    body_parts = []
    body_size = 0  # bytes
    try:
        # granian limits only the time in which the headers must arrive.
        async with asyncio.timeout(limits.body_seconds):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise Disconnected
                body_parts.append(message.get("body", b""))
                body_size += len(body_parts[-1])
                # The size is checked while the body arrives: a chunked body has no Content-Length.
                if body_size > limits.body:
                    raise _too_large(limits)
                if not message.get("more_body", False):
                    return b"".join(body_parts)
    except TimeoutError:
        raise RequestError(
            408, "The request took too long to arrive.", "Send the request again.", _CLOSE
        ) from None


def _too_large(limits: Limits) -> RequestError:
    """Make the error of a body that is larger than the limit."""
    return RequestError(
        413, f"The body must have at most {limits.body} bytes.", "Send a smaller body.", _CLOSE
    )


@dataclass
class Entry:
    """Line of the access log for one request, see the docstring of this module.

    Its fields are set while the request is processed.
    """

    address: str
    method: str
    route: str
    request: str = field(default_factory=lambda: secrets.token_hex(4))
    status: int = 0
    bytes: int = 0
    annotator: str | None = None
    by: str | None = None
    rejected: str | None = None
    began: float = field(default_factory=time.perf_counter)  # seconds by the clock of time.perf_counter

    def fields(self) -> dict:
        """Return the fields of the line, with the time since `began` as `milliseconds`."""
        entry_values = asdict(self) | {"milliseconds": round(1000 * (time.perf_counter() - self.began), 1)}
        # the reason of a rejection is left out if there is none
        return {
            name: value
            for name, value in entry_values.items()
            if name != "began" and (name != "rejected" or value is not None)
        }


class PrivateFileHandler(RotatingFileHandler):
    """Rotating log handler whose files only their owner can read."""

    def _open(self):
        # The mode is set at creation, so that the file is not readable for others even for a moment.
        return open(
            self.baseFilename,
            self.mode,
            encoding=self.encoding,
            opener=lambda path, flags: os.open(path, flags, 0o600),
        )


class AccessLog:
    """Access log in a file.

    Args:
        path: path of the file, whose folder is made if it does not exist; None: no lines are written.
    """

    def __init__(self, path: Path | None):
        self._logger = None
        if path is not None:
            path.parent.mkdir(0o700, parents=True, exist_ok=True)
            # A logger that is not registered with the logging module is not changed by other logging
            # settings.
            self._logger = logging.Logger(f"access:{path}")
            self._logger.addHandler(
                PrivateFileHandler(path, maxBytes=20_000_000, backupCount=5, encoding="utf-8", delay=True)
            )

    def write(self, event: str, entry_fields: dict) -> None:
        """Write one line.

        Args:
            event: kind of the line, "request" or "start".
            entry_fields: further fields of the line.
        """
        if self._logger is None:
            return
        time_text = (
            datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        )
        self._logger.info("%s", json.dumps({"time": time_text, "event": event, **entry_fields}))

    def close(self) -> None:
        """Close the file."""
        for handler in self._logger.handlers if self._logger else ():
            handler.close()


class RequestChecks:
    """ASGI middleware that checks requests, adds headers to responses, and writes the access log.

    It checks the host, the origin and the size of a request, the identity of the client, the rate of the
    client's requests, the CSRF value and the content type.
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
            # The application has no websockets. The code 1008 means "policy violation".
            await send({"type": "websocket.close", "code": 1008})
        elif scope["type"] == "http":
            await self._http(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check one request, pass it to the application, and log it."""
        # Behind a trusted proxy, granian's wrapper has replaced the proxy's address by the client's address.
        client_address = (scope.get("client") or ("", 0))[0]
        # Without extensions there is no 'http.response.pathsend', with which granian would read the file of
        # an export after the application has deleted it.
        scope["extensions"] = {}
        log_entry = Entry(client_address, scope["method"][:16], _LONG_WORD.sub("*", scope["path"])[:200])
        # Every response that is sent through this function gets the headers and is recorded.
        send = _recorded(send, log_entry, scope["scheme"] == "https")
        try:
            try:
                # The checks have read the body. `replay` passes it to the application at the first call, and
                # empties the list, so that later calls wait for the client.
                unsent_body = [await self._admit(scope, receive, log_entry)]

                async def replay() -> Message:
                    if unsent_body:
                        return {"type": "http.request", "body": unsent_body.pop(), "more_body": False}
                    return await receive()

                await self.app(scope, replay, send)
            except RequestError as rejection:
                log_entry.rejected = rejection.error
                response: Response = rejection.response()
                if rejection.status == 401:
                    headers = Headers(scope=scope)
                    # A person who opens a page without a session is sent to the login page.
                    is_page = (
                        scope["method"] == "GET"
                        and scope["path"] in ("/", "/admin")
                        and "authorization" not in headers
                    )
                    response = RedirectResponse("/login", 303) if is_page else response
                    # An invalid session cookie is deleted. The cookie of a revoked annotator stays, because
                    # the login page reads it, and then states that the access was revoked.
                    if f"{COOKIE}=" in headers.get("cookie", "") and not isinstance(rejection, AccessRevoked):
                        response.headers.append("Set-Cookie", FORGET)
                await response(scope, receive, send)
        except Disconnected:
            log_entry.rejected = "disconnected"  # no response can be sent
        except (exc.DBAPIError, exc.TimeoutError) as error:
            error_response = no_database(error)
            log_entry.rejected = error_response.error
            await error_response.response()(scope, receive, send)
        except Exception:
            # The response has the same number in its header X-Request-Id, by which the log entry can be
            # found.
            LOGGER.exception("request %s failed", log_entry.request)
            # After a response has begun, another status cannot be sent.
            if log_entry.status == 0:
                await RequestError(500, "The server has an internal error.", REMEDIES[500]).response()(
                    scope, receive, send
                )
        finally:
            # The router has stored the route in the scope.
            route = scope.get("route")
            log_entry.route = getattr(route, "path", log_entry.route)
            log_entry.rejected = log_entry.rejected or scope.get("state", {}).get("rejected")
            self.log.write("request", log_entry.fields())

    async def _admit(self, scope: Scope, receive: Receive, log_entry: Entry) -> bytes:
        """Check a request, and return its body. Checks that cost less come first.

        Raises:
            RequestError: the request is rejected.
            Disconnected: the client has disconnected.
        """
        headers = Headers(scope=scope)
        method = scope["method"]
        path = scope["path"]
        limits = self.options.limits
        if len(scope.get("raw_path") or b"") + len(scope["query_string"]) > limits.url:
            raise RequestError(
                414, f"The address must have at most {limits.url} bytes.", "Use a shorter address."
            )
        if not path.isprintable():
            raise RequestError(
                400,
                "The address contains characters that cannot be printed.",
                "Use an address of printable characters.",
            )
        # granian limits the size of the headers only if they arrive in several parts.
        if sum(len(name) + len(value) for name, value in headers.raw) > limits.headers:
            raise RequestError(
                431, f"The headers must have at most {limits.headers} bytes.", "Send smaller headers.", _CLOSE
            )
        check_host(headers, self.options.exposed)
        check_fetch(headers, method, path)
        length_headers = headers.getlist("content-length")  # checked before any byte of the body is read
        # isdigit() alone is True for digits of other scripts as well.
        if length_headers and (
            len(length_headers) > 1 or not (length_headers[0].isascii() and length_headers[0].isdigit())
        ):
            raise RequestError(
                400,
                "The Content-Length header is invalid.",
                "Send one such header, which consists of digits.",
                _CLOSE,
            )
        # int() is slow for very many digits. The first 20 digits are enough to exceed the limit.
        if length_headers and int(length_headers[0][:20]) > limits.body:
            raise _too_large(limits)
        request_state = scope.setdefault("state", {})
        identity = request_state["identity"] = await self._identify(headers, method, path, log_entry)
        if method not in SAFE_METHODS:
            # A browser does not add a token by itself, as it does with a cookie, so a request with a token
            # needs no check against cross-site request forgery (CSRF).
            if identity is None or identity.by != "token":
                check_same_origin(headers, scope["scheme"])
            if identity is not None and identity.by != "token" and path != "/login":
                if not hmac.compare_digest(
                    identity.csrf.encode(), headers.get("x-csrf-token", "").encode("utf-8", "replace")
                ):
                    raise RequestError(
                        403,
                        "The X-CSRF-Token header of this session is missing or wrong.",
                        "Request /api/session, and send the value of its 'csrf' as X-CSRF-Token.",
                    )
            _check_type(headers, path)
        body = await read_body(receive, limits)
        # JSON and forms in UTF-8 contain no NUL, but JSON in UTF-16 does.
        if b"\0" in body:
            raise RequestError(400, "The body contains NUL characters.", "Send the body in UTF-8.")
        return body

    async def _identify(self, headers: Headers, method: str, path: str, log_entry: Entry) -> Identity | None:
        """Identify the client, and count the request for its rate limit.

        Returns:
            Identity of the client; None only for a request that needs no identity, see OPEN.

        Raises:
            RequestError: 401 for an unknown client, 429 if the rate limit is exceeded.
        """
        is_public = (method, path) in OPEN
        client_key = address_key(log_entry.address)
        identity = None
        rejection = None
        try:
            if not is_public:
                # `find` reads the database, so it runs in a thread and does not block the event loop.
                identity = await run_in_threadpool(self.identities.find, headers, log_entry.address)
        except RequestError as error:
            rejection = error
        if identity is not None:
            log_entry.annotator = identity.annotator.name
            log_entry.by = identity.by
        # The request counts for the rate limit before a wrong token is rejected, so wrong tokens are limited,
        # too.
        wait_seconds = (
            self.annotators.take(str(identity.annotator.id)) if identity else self.anonymous.take(client_key)
        )
        if wait_seconds:
            raise too_many(wait_seconds)
        if rejection is not None:
            raise rejection
        if identity is None and not is_public:
            raise RequestError(
                401,
                "This request needs a token or a session.",
                "Log in at /login, or send 'Authorization: Bearer TOKEN'.",
                {"WWW-Authenticate": "Bearer"},
            )
        return identity


def _check_type(headers: Headers, path: str) -> None:
    """Check the media type of a body: JSON under /api, and a form at /login.

    Raises:
        RequestError: 415 for another type or encoding.
    """
    if path.startswith("/api/"):
        expected_type = "application/json"
    elif path == "/login":
        expected_type = "application/x-www-form-urlencoded"
    else:
        expected_type = None
    media_type, _, type_parameters = headers.get("content-type", "").partition(";")
    # If there are other parameters, this text is no charset, and the request is rejected.
    charset = type_parameters.strip().lower().removeprefix("charset=").strip('"')
    if expected_type is not None and (
        media_type.strip().lower() != expected_type or charset not in ("", "utf-8")
    ):
        raise RequestError(
            415, f"The Content-Type must be {expected_type}.", "Send the body in this format and in UTF-8."
        )
    # A compressed body could be small when it arrives and huge afterwards.
    if "content-encoding" in headers:
        raise RequestError(
            415, "The body must not have a Content-Encoding.", "Send the body without compression."
        )


def _recorded(send: Send, log_entry: Entry, is_https: bool) -> Send:
    """Return a function that sends a message of a response, adds headers, and records status and size.

    Args:
        send: function that sends a message (ASGI).
        log_entry: line of the access log that receives status and size.
        is_https: True if the client is connected by https.
    """
    # Strict-Transport-Security: browsers use https for this server during the next year (31,536,000 seconds)
    fixed_headers = FIXED | ({"Strict-Transport-Security": "max-age=31536000"} if is_https else {})

    async def recorded(message: Message) -> None:
        if message["type"] == "http.response.start":
            log_entry.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["X-Request-Id"] = log_entry.request
            for name, value in fixed_headers.items():
                headers.setdefault(name, value)  # a value that a route has set is kept
        elif message["type"] == "http.response.body":
            log_entry.bytes += len(message.get("body", b""))
        await send(message)

    return recorded
