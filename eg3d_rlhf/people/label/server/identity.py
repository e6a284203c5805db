"""Identifies the client of a request by a bearer token, a session cookie or, on loopback, as the user of the
server's machine; limits the rates of requests.
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
from eg3d_rlhf.people.label.server.models import AccessRevoked, RequestError, too_many
from eg3d_rlhf.people.label.server.options import AppOptions

COOKIE = "session"
_WORDS = 256  # largest number of characters of a token or session id
KEYS = 10_000  # largest number of buckets; the least recently used one is deleted


class Buckets:
    """Token buckets, one per key: `burst` tokens, refilled at `rate` per second. Thread-safe."""

    def __init__(self, rate: float, burst: float, clock: Callable[[], float] = time.monotonic):
        self.rate = rate
        self.burst = burst
        self.clock = clock
        # key -> (tokens, time of that level); the last used key is at the end
        self._levels: OrderedDict[str, tuple[float, float]] = OrderedDict()
        self._lock = threading.Lock()

    def take(self, key: str, count: float = 1.0) -> float:
        """Take tokens from a key's bucket, or put them back if `count` < 0.

        Returns: 0 if there were enough, else the seconds until there are; then nothing is taken.
        """
        with self._lock:
            now = self.clock()
            # A new key has a full bucket.
            level, since = self._levels.pop(key, (self.burst, now))
            level = min(self.burst, level + (now - since) * self.rate)
            enough = level >= count
            # Inserted again at the end, which marks the key as recently used.
            self._levels[key] = (min(self.burst, level - count) if enough else level, now)
            if len(self._levels) > KEYS:
                self._levels.popitem(last=False)
            return 0.0 if enough else (count - level) / self.rate


def address_key(address: str) -> str:
    """Return the key by which addresses are limited: an IPv4 address, or the /64 network of an IPv6 address,
    which belongs to one subscriber.
    """
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return address  # a Unix socket or a test client has no IP address
    # ::ffff:192.0.2.1 is an IPv4 address on a socket for both versions.
    mapped = getattr(ip, "ipv4_mapped", None)
    if mapped is not None:
        return str(mapped)
    return str(ip) if ip.version == 4 else str(ipaddress.ip_network(f"{ip}/64", strict=False))


@dataclass(frozen=True)
class Identity:
    """An annotator and the way she was identified."""

    annotator: StoredAnnotator
    by: str  # 'token', 'session' or 'local'
    admin: bool
    csrf: str = ""  # required value of X-CSRF-Token; '' for a token, which browsers do not send by themselves
    session: str = ""  # session id, for logging out


class Identities:
    """Identification of clients. All methods block while they use the database."""

    def __init__(self, options: AppOptions, mode: Mode):
        self.store = options.store
        self.exposed = options.exposed
        self.blind = mode is Mode.STUDY
        self.guesses = Buckets(*options.limits.guesses)
        self.secret = options.secret or server_secret(options.cache.folder / "server.key")
        self._local = None if options.exposed else self.store.annotator_without_token(LOCAL, "admin")

    def find(self, headers: Headers, address: str) -> Identity | None:
        """Return the identity of a client, or None. A wrong bearer token is an error even if there is a
        session.

        Raises: RequestError 401, 429.
        """
        # Two Authorization headers are ambiguous, so they count as a wrong token.
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
        # On loopback a request without a session comes from the user of this machine.
        if self._local is not None:
            return self._identity(self._local, "local", csrf_token(self.secret, "local"))
        if _plausible(session) and self.store.withdrawn(session):
            raise AccessRevoked
        return None

    def by_token(self, token: str, address: str) -> StoredAnnotator:
        """Return the annotator of a token. Raises: RequestError 401, 429.

        A token has 192 random bits, so guessing needs no limit: a correct token is accepted even after many
        wrong ones from the same address. After many wrong ones the error is 429 instead of 401, which users
        of scripts and readers of the access log notice.
        """
        annotator = self.store.authenticate(token) if _plausible(token) else None
        if annotator is None:
            # Only the owner of a token learns that it was revoked.
            if _plausible(token) and self.store.withdrawn(token):
                raise AccessRevoked
            if wait := self.guesses.take(address_key(address)):
                raise too_many(wait)
            remedy = "Ask the person who gave it to you for a new token."
            raise RequestError(
                401, "The token is unknown or was revoked.", remedy, {"WWW-Authenticate": "Bearer"}
            )
        return annotator

    def _identity(self, annotator: StoredAnnotator, by: str, csrf: str = "", session: str = "") -> Identity:
        # In a blind study, results are shown only for an admin's token, not to the user of this machine.
        admin = (by == "local" and not self.blind) or (by != "local" and annotator.role == "admin")
        return Identity(annotator, by, admin, csrf, session)


def _plausible(token: str) -> bool:
    """Return True for a text that can be a token or session id. Others are not looked up in the database."""
    return 16 <= len(token) <= _WORDS and token.isascii() and token.isprintable()


def server_secret(path: Path) -> bytes:
    """Return 32 random bytes that are stored in a file, readable for its owner only. Pages that are open
    remain valid when the server restarts.
    """
    path.parent.mkdir(0o700, parents=True, exist_ok=True)
    # O_EXCL: of several servers that start together, one creates the file and all read it.
    with (
        contextlib.suppress(FileExistsError),
        os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file,
    ):
        file.write(os.urandom(32))
    # Read again in any case: another server may have created the file.
    secret = path.read_bytes()
    # A file that was cut off, or edited.
    if len(secret) != 32:
        raise ValueError(
            f"{path}: expected 32 bytes, got {len(secret)}. Delete the file; the server creates it again."
        )
    return secret


def csrf_token(key: str | bytes, purpose: str) -> str:
    """Return the HMAC-SHA256 of a purpose. The key must be unknown to other sites: the session's id, or the
    server's secret.
    """
    return hmac.new(
        key.encode() if isinstance(key, str) else key, purpose.encode(), hashlib.sha256
    ).hexdigest()
