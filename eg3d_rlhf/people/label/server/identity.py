"""Who asks: a bearer token, a session cookie, or on loopback whoever sits at this machine; and how often one
may.
"""

import contextlib
import hashlib
import hmac
import ipaddress
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from starlette.datastructures import Headers
from starlette.requests import cookie_parser

from eg3d_rlhf.people.label.entities import LOCAL, Mode, StoredAnnotator
from eg3d_rlhf.people.label.server.models import Refusal, Withdrawn, too_many
from eg3d_rlhf.people.label.server.options import AppOptions

COOKIE = "session"
_WORDS = 256  # characters of a token or session id at most
KEYS = 10_000  # buckets kept; the least recently used is forgotten


class Buckets:
    """One bucket of `burst` tokens per key, refilled at `rate` a second. Thread-safe."""

    def __init__(self, rate: float, burst: float, clock: Callable[[], float] = time.monotonic):
        self.rate = rate
        self.burst = burst
        self.clock = clock
        self._levels: OrderedDict[str, tuple[float, float]] = OrderedDict()  # key -> (tokens, when)
        self._lock = threading.Lock()

    def take(self, key: str, count: float = 1.0) -> float:
        """Take tokens (put back where `count` < 0). Returns 0, or the seconds until there are enough; then
        nothing is taken.
        """
        with self._lock:
            now = self.clock()
            level, since = self._levels.pop(key, (self.burst, now))
            level = min(self.burst, level + (now - since) * self.rate)
            enough = level >= count
            self._levels[key] = (min(self.burst, level - count) if enough else level, now)
            if len(self._levels) > KEYS:
                self._levels.popitem(last=False)
            return 0.0 if enough else (count - level) / self.rate


def address_key(address: str) -> str:
    """What counts as one address: an IPv4 address, or the /64 network of an IPv6 one, which belongs to one
    subscriber.
    """
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return address
    mapped = getattr(ip, "ipv4_mapped", None)
    if mapped is not None:
        return str(mapped)
    return str(ip) if ip.version == 4 else str(ipaddress.ip_network(f"{ip}/64", strict=False))


@dataclass(frozen=True)
class Identity:
    """An annotator and how she is known."""

    annotator: StoredAnnotator
    by: str  # 'token', 'session' or 'local'
    admin: bool
    csrf: str = ""  # what X-CSRF-Token must be; '' with a token, which no browser sends by itself
    session: str = ""  # id, to close it


class Identities:
    """Finds the identity behind a request. Its methods block."""

    def __init__(self, options: AppOptions, mode: Mode):
        self.store = options.store
        self.exposed = options.exposed
        self.blind = mode is Mode.STUDY
        self.guesses = Buckets(*options.limits.guesses)
        self.secret = options.secret or kept_secret(options.cache.folder / "server.key")
        self._local = None if options.exposed else self.store.annotator_without_token(LOCAL, "admin")

    def find(self, headers: Headers, address: str) -> Identity | None:
        """The identity, or None. A wrong bearer token is refused, never ignored. Raises: Refusal 401, 429."""
        if "authorization" in headers:
            scheme, _, token = headers["authorization"].partition(" ")
            bearer = (
                token.strip()
                if scheme.lower() == "bearer" and len(headers.getlist("authorization")) == 1
                else ""
            )
            return self._identity(self.by_token(bearer, address), "token")
        session = cookie_parser(headers.get("cookie", "")).get(COOKIE, "")
        annotator = self.store.session(session) if _plausible(session) else None
        if annotator is not None:
            return self._identity(annotator, "session", csrf_token(session, "csrf"), session)
        if self._local is not None:
            return self._identity(self._local, "local", csrf_token(self.secret, "local"))
        if _plausible(session) and self.store.withdrawn(session):
            raise Withdrawn
        return None

    def by_token(self, token: str, address: str) -> StoredAnnotator:
        """The annotator whose token this is.

        A token has 192 random bits and needs no limit to be safe: a right one is let in whatever others have
        sent. Many wrong ones of an address are refused in another way, which whoever runs a script or reads
        the access log will notice.
        """
        annotator = self.store.authenticate(token) if _plausible(token) else None
        if annotator is None:
            # told to who holds the token, and to nobody else
            if _plausible(token) and self.store.withdrawn(token):
                raise Withdrawn
            if wait := self.guesses.take(address_key(address)):
                raise too_many(wait)
            remedy = "Ask the person who gave it to you for a new one."
            raise Refusal(401, "Unknown or revoked token.", remedy, {"WWW-Authenticate": "Bearer"})
        return annotator

    def _identity(self, annotator: StoredAnnotator, by: str, csrf: str = "", session: str = "") -> Identity:
        # In a blind study not even the person at this machine sees results without an admin's token.
        admin = (by == "local" and not self.blind) or (by != "local" and annotator.role == "admin")
        return Identity(annotator, by, admin, csrf, session)


def _plausible(token: str) -> bool:
    return 16 <= len(token) <= _WORDS and token.isascii() and token.isprintable()


def kept_secret(path: Path) -> bytes:
    """32 random bytes, kept in a file that only its owner reads, so that open pages survive a restart of the
    server.
    """
    path.parent.mkdir(0o700, parents=True, exist_ok=True)
    with (
        contextlib.suppress(FileExistsError),
        os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file,
    ):
        file.write(os.urandom(32))
    secret = path.read_bytes()
    if len(secret) != 32:
        raise ValueError(f"{path}: expected 32 bytes, got {len(secret)}. Delete the file; it is made again.")
    return secret


def csrf_token(key: str | bytes, purpose: str) -> str:
    """HMAC-SHA256 of the purpose under a key that other sites cannot know: the session's id, or the server's
    secret.
    """
    return hmac.new(
        key.encode() if isinstance(key, str) else key, purpose.encode(), hashlib.sha256
    ).hexdigest()
