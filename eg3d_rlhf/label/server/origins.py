"""From where a request may come: the Host header on loopback, and no other site on the user's behalf."""

import hashlib
import hmac
import re

from starlette.datastructures import Headers

from eg3d_rlhf.label.server.errors import Refusal
from eg3d_rlhf.label.server.options import LOOPBACK

SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
PAGES = ("/", "/login", "/admin")  # a link on another site may lead here
_HOST = re.compile(r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+)(?::(\d{1,5}))?")


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


def csrf_token(key: str | bytes, purpose: str) -> str:
    """HMAC-SHA256 of the purpose under a key that other sites cannot know: the session's id, or the server's secret."""
    return hmac.new(key.encode() if isinstance(key, str) else key, purpose.encode(), hashlib.sha256).hexdigest()


def check_csrf(expected: str, got: str) -> None:
    """Raises: Refusal 403 unless both are equal."""
    if not hmac.compare_digest(expected.encode(), got.encode("utf-8", "replace")):
        raise Refusal(403, "Expected the X-CSRF-Token of this session.", "Ask for /api/session and send its 'csrf' as X-CSRF-Token.")
