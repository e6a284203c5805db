"""The gate before the application: every request passes all checks here, so that no route can forget one."""

from fastapi.responses import RedirectResponse
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from eg3d_rlhf.label.server import origins
from eg3d_rlhf.label.server.access_log import AccessLog, Entry, masked
from eg3d_rlhf.label.server.bodies import Disconnected, check_headers, check_length, read_body, replay
from eg3d_rlhf.label.server.errors import LOGGER, Refusal, failed, too_many
from eg3d_rlhf.label.server.headers import add_headers
from eg3d_rlhf.label.server.identity import COOKIE, Identities, Identity
from eg3d_rlhf.label.server.options import AppOptions
from eg3d_rlhf.label.server.rates import Buckets, address_key

OPEN = {("GET", "/health"), ("GET", "/login"), ("POST", "/login")}  # all that answers without a token when exposed
FORGET = f"{COOKIE}=; Max-Age=0; Path=/; HttpOnly; SameSite=Strict"


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
        origins.check_host(headers, self.options.exposed)
        origins.check_fetch(headers, method, path)
        check_length(headers, limits)
        identity = await self._identify(headers, method, path, entry)
        scope.setdefault("state", {})["identity"] = identity
        if method not in origins.SAFE_METHODS:
            if identity is None or identity.by != "token":
                origins.check_same_origin(headers, scope["scheme"])
            if identity is not None and identity.by != "token" and path != "/login":
                origins.check_csrf(identity.csrf, headers.get("x-csrf-token", ""))
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
        response = refusal.response()
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
