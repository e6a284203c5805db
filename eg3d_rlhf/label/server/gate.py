"""The gate before the application: every request passes all checks here, so that no route can forget one, and gets its headers here."""

import asyncio
import base64
import hashlib
import hmac
import re

from fastapi.responses import RedirectResponse, Response
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from eg3d_rlhf.label.server.access_log import AccessLog, Entry, masked
from eg3d_rlhf.label.server.errors import LOGGER, Refusal, failed, too_many
from eg3d_rlhf.label.server.identity import COOKIE, Buckets, Identities, Identity, address_key
from eg3d_rlhf.label.server.options import LOOPBACK, AppOptions, Limits

SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
PAGES = ("/", "/login", "/admin")  # a link on another site may lead here
_HOST = re.compile(r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+)(?::(\d{1,5}))?")
_CLOSE = {"Connection": "close"}  # the rest of the body is not waited for
OPEN = {("GET", "/health"), ("GET", "/login"), ("POST", "/login")}  # all that answers without a token when exposed
FORGET = f"{COOKIE}=; Max-Age=0; Path=/; HttpOnly; SameSite=Strict"
_COMMON = "base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
POLICY = (
    f"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; {_COMMON}"
)
FIXED = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "accelerometer=(), camera=(), geolocation=(), gyroscope=(), microphone=(), payment=(), usb=()",
    "Content-Security-Policy": POLICY,
    "Cache-Control": "no-store",
}


def policy_of_style(style: str) -> str:
    """Content-Security-Policy of a page without script whose one <style> element holds exactly `style`."""
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    return f"default-src 'none'; style-src 'sha256-{digest}'; {_COMMON}"


def add_headers(headers: MutableHeaders, https: bool) -> None:
    """Add what a response does not set itself."""
    for name, value in FIXED.items():
        headers.setdefault(name, value)
    if https:
        headers.setdefault("Strict-Transport-Security", "max-age=31536000")


def check_host(headers: Headers, exposed: bool) -> None:
    """Exactly one well-formed Host; on loopback a name of this machine, so that no foreign name can be pointed at it (DNS rebinding).

    Raises: Refusal 400 or 421.
    """
    hosts = headers.getlist("host")
    found = _HOST.fullmatch(hosts[0]) if len(hosts) == 1 else None
    if found is None:
        raise Refusal(400, "Expected one valid Host header.", "Use the address that the server printed.")
    if not exposed and found.group(1).strip("[]").lower() not in LOOPBACK:
        raise Refusal(421, "This server answers only to this machine's own names.", "Open http://127.0.0.1 with the server's port.")


def check_fetch(headers: Headers, method: str, path: str) -> None:
    """Refuse what a browser says another site asked for, but for links to a page.

    Raises: Refusal 403.
    """
    site = headers.get("sec-fetch-site", "same-origin")
    if site in ("same-origin", "none"):
        return
    if method == "GET" and path in PAGES and headers.get("sec-fetch-mode") == "navigate" and headers.get("sec-fetch-dest") == "document":
        return
    raise Refusal(403, "Another site asked for this.", "Open the application's own page.")


def check_same_origin(headers: Headers, scheme: str) -> None:
    """An unsafe request that a browser authorises by itself must come from this server's own pages.

    Raises: Refusal 403.
    """
    origins, sites = headers.getlist("origin"), headers.getlist("sec-fetch-site")
    if not origins and not sites:
        raise Refusal(403, "Expected an Origin or Sec-Fetch-Site header.", "Scripts send 'Authorization: Bearer TOKEN' instead.")
    own = [f"{scheme}://{headers.get('host', '')}".lower()]
    if origins and [o.lower() for o in origins] != own or sites and sites != ["same-origin"]:
        raise Refusal(403, "Another site sent this.", "Send it from the application's own page.")


def check_csrf(expected: str, got: str) -> None:
    """Raises: Refusal 403 unless both are equal."""
    if not hmac.compare_digest(expected.encode(), got.encode("utf-8", "replace")):
        raise Refusal(403, "Expected the X-CSRF-Token of this session.", "Ask for /api/session and send its 'csrf' as X-CSRF-Token.")


class Disconnected(Exception):
    """The client left before its request was complete."""


def check_headers(headers: Headers, limits: Limits) -> None:
    """Refuse headers that are too large; the HTTP parser does so only where they arrive in several reads.

    Raises: Refusal 431.
    """
    if sum(len(name) + len(value) for name, value in headers.raw) > limits.headers:
        raise Refusal(431, f"Expected headers of at most {limits.headers} bytes.", "Send less.", _CLOSE)


def check_length(headers: Headers, limits: Limits) -> None:
    """Refuse a declared length that is wrong or too large, before a byte of the body is read.

    Raises: Refusal 400, 413.
    """
    lengths = headers.getlist("content-length")
    if not lengths:
        return
    if len(lengths) > 1 or not (lengths[0].isascii() and lengths[0].isdigit()):
        raise Refusal(400, "Expected one Content-Length of digits.", "Correct the header.", _CLOSE)
    if int(lengths[0][:20]) > limits.body:
        raise _too_large(limits)


async def read_body(receive: Receive, limits: Limits) -> bytes:
    """The whole body, chunked or not.

    Raises: Refusal 408, 413; Disconnected.
    """
    parts, size = [], 0
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


def replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that hands out `body` once, then what the client does."""
    handed = False

    async def received() -> Message:
        nonlocal handed
        if not handed:
            handed = True
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return received


def _too_large(limits: Limits) -> Refusal:
    return Refusal(413, f"Expected a body of at most {limits.body} bytes.", "Send less.", _CLOSE)


class Gate:
    """ASGI middleware: host, origin, size, identity, rate, CSRF and content type; adds headers and writes the access log."""

    def __init__(self, app: ASGIApp, options: AppOptions, identities: Identities, log: AccessLog):
        self.app, self.options, self.identities, self.log = app, options, identities, log
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
        entry = Entry(address, scope["method"][:16], masked(scope["path"]))
        send = _recorded(send, entry, scope["scheme"] == "https")
        try:
            try:
                body = await self._admit(scope, receive, entry)
                await self.app(scope, replay(body, receive), send)
            except Refusal as refusal:
                entry.refused = refusal.error
                await self._refusal(refusal, scope)(scope, receive, send)
        except Disconnected:
            entry.refused = "disconnected"
        except Exception:
            LOGGER.exception("request %s failed", entry.request)
            if entry.status == 0:
                await failed().response()(scope, receive, send)
        finally:
            route = scope.get("route")
            entry.route = getattr(route, "path", entry.route)
            entry.refused = entry.refused or scope.get("state", {}).get("refused")
            self.log.write("request", entry.fields())

    async def _admit(self, scope: Scope, receive: Receive, entry: Entry) -> bytes:
        """All checks; returns the body and leaves the identity in scope['state']."""
        headers, method, path, limits = Headers(scope=scope), scope["method"], scope["path"], self.options.limits
        if len(scope.get("raw_path") or b"") + len(scope["query_string"]) > limits.url:
            raise Refusal(414, f"Expected an address of at most {limits.url} bytes.", "Ask for less.")
        if not path.isprintable():
            raise Refusal(400, "Expected printable characters in the address.", "Correct the address.")
        check_headers(headers, limits)
        check_host(headers, self.options.exposed)
        check_fetch(headers, method, path)
        check_length(headers, limits)
        identity = await self._identify(headers, method, path, entry)
        scope.setdefault("state", {})["identity"] = identity
        if method not in SAFE_METHODS:
            if identity is None or identity.by != "token":
                check_same_origin(headers, scope["scheme"])
            if identity is not None and identity.by != "token" and path != "/login":
                check_csrf(identity.csrf, headers.get("x-csrf-token", ""))
            _check_type(headers, path)
        body = await read_body(receive, limits)
        if b"\0" in body:  # in UTF-8, neither JSON nor a form has one; JSON in UTF-16 has
            raise Refusal(400, "Expected a body in UTF-8 without NUL.", "Send it in UTF-8.")
        return body

    async def _identify(self, headers: Headers, method: str, path: str, entry: Entry) -> Identity | None:
        """Who asks, within her rate; None only for what is open to everybody.

        Raises: Refusal 401, 429.
        """
        public = (method, path) in OPEN
        address, identity, refusal = address_key(entry.address), None, None
        try:
            identity = None if public else await run_in_threadpool(self.identities.find, headers, entry.address)
        except Refusal as error:
            refusal = error
        if identity is not None:
            entry.annotator, entry.by = identity.annotator.name, identity.by
        wait = self.annotators.take(str(identity.annotator.id)) if identity else self.strangers.take(address)
        if wait:
            raise too_many(wait)
        if refusal is not None:
            raise refusal
        if identity is None and not public:
            raise Refusal(401, "Expected a token or a session.", "Log in at /login, or send 'Authorization: Bearer TOKEN'.",
                          {"WWW-Authenticate": "Bearer"})
        return identity

    def _refusal(self, refusal: Refusal, scope: Scope) -> ASGIApp:
        """The response: a person without a session is sent to the login page."""
        response: Response = refusal.response()
        if refusal.status == 401:
            headers = Headers(scope=scope)
            page = scope["method"] == "GET" and scope["path"] in ("/", "/admin") and "authorization" not in headers
            response = RedirectResponse("/login", 303) if page else response
            if f"{COOKIE}=" in headers.get("cookie", ""):
                response.headers.append("Set-Cookie", FORGET)
        return response


def _check_type(headers: Headers, path: str) -> None:
    """Bodies are JSON under /api, a form at /login.

    Raises: Refusal 415.
    """
    expected = "application/json" if path.startswith("/api/") else "application/x-www-form-urlencoded" if path == "/login" else None
    kind, _, rest = headers.get("content-type", "").partition(";")
    charset = rest.strip().lower().removeprefix("charset=").strip('"')
    if expected is not None and (kind.strip().lower() != expected or charset not in ("", "utf-8")):
        raise Refusal(415, f"Expected Content-Type {expected}.", "Send the body in that form, in UTF-8.")
    if "content-encoding" in headers:
        raise Refusal(415, "Expected a body without Content-Encoding.", "Send it uncompressed.")


def _recorded(send: Send, entry: Entry, https: bool) -> Send:
    """A `send` that adds the headers and notes status and size."""

    async def recorded(message: Message) -> None:
        if message["type"] == "http.response.start":
            entry.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["X-Request-Id"] = entry.request
            add_headers(headers, https)
        elif message["type"] == "http.response.body":
            entry.bytes += len(message.get("body", b""))
        await send(message)

    return recorded
