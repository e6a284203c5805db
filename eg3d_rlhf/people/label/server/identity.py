"""Identification of clients, and limits of their rates of requests.

A client is identified by a bearer token or a session cookie. On a server that only its own machine can reach,
a client without either is the user of this machine.
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

COOKIE = "session"  # name of the session cookie
_MAX_SECRET = 256  # largest number of characters of a token or session id
KEYS = 10_000  # largest number of buckets; the least recently used one is deleted


class Buckets:
    """Token buckets for rate limits, one for each key. The object is thread-safe.

    Args:
        rate: number of tokens per second that are added to a bucket.
        burst: number of tokens that a full bucket contains.
        clock: function that returns the time in seconds.
    """

    def __init__(self, rate: float, burst: float, clock: Callable[[], float] = time.monotonic):
        self.rate = rate
        self.burst = burst
        self.clock = clock
        # key -> (number of tokens, time at which this was their number); the last used key is at the end
        self._levels: OrderedDict[str, tuple[float, float]] = OrderedDict()
        self._lock = threading.Lock()

    def take(self, key: str, taken_tokens: float = 1.0) -> float:
        """Take tokens from the bucket of a key.

        Args:
            key: key of the bucket.
            taken_tokens: number of tokens; a negative number puts tokens back.

        Returns:
            0 if the bucket contained enough tokens. Otherwise nothing is taken, and the number of seconds is
            returned after which the bucket will contain enough tokens.
        """
        with self._lock:
            now = self.clock()
            # A new key has a full bucket.
            token_count, counted_at = self._levels.pop(key, (self.burst, now))
            token_count = min(self.burst, token_count + (now - counted_at) * self.rate)
            has_enough = token_count >= taken_tokens
            # `pop` has removed the key. Inserting it at the end marks it as recently used.
            self._levels[key] = (
                min(self.burst, token_count - taken_tokens) if has_enough else token_count,
                now,
            )
            if len(self._levels) > KEYS:
                self._levels.popitem(last=False)
            return 0.0 if has_enough else (taken_tokens - token_count) / self.rate


def address_key(address: str) -> str:
    """Return the key under which requests from an address are counted.

    For an IPv4 address it is the address. For an IPv6 address it is the /64 network, which belongs to one
    subscriber.
    """
    try:
        ip_address = ipaddress.ip_address(address)
    except ValueError:
        return address  # clients of a Unix socket and of tests have no IP address
    # An IPv4 client of a socket for both versions has an address such as ::ffff:192.0.2.1.
    ipv4_address = getattr(ip_address, "ipv4_mapped", None)
    if ipv4_address is not None:
        return str(ipv4_address)
    return (
        str(ip_address)
        if ip_address.version == 4
        else str(ipaddress.ip_network(f"{ip_address}/64", strict=False))
    )


@dataclass(frozen=True)
class Identity:
    """Annotator who has sent a request, and the kind of identification."""

    annotator: StoredAnnotator
    by: str  # kind of identification: 'token', 'session' or 'local'
    admin: bool  # True if the client may see results and manage annotators
    # Required value of the header X-CSRF-Token. It is '' for a token, because browsers do not add it by
    # themselves.
    csrf: str = ""
    session: str = ""  # id of the session, which a logout ends; '' if there is none


class Identities:
    """Identification of clients. All methods block while they use the database.

    Args:
        options: options of the server.
        mode: mode of the served campaign.
    """

    def __init__(self, options: AppOptions, mode: Mode):
        self.store = options.store
        self.exposed = options.exposed
        self.blind = mode is Mode.STUDY
        self.guesses = Buckets(*options.limits.guesses)
        self.secret = options.secret or server_secret(options.cache.folder / "server.key")
        self._local = None if options.exposed else self.store.annotator_without_token(LOCAL, "admin")

    def find(self, headers: Headers, address: str) -> Identity | None:
        """Return the identity of a client, or None if the client is unknown.

        Args:
            headers: headers of the request.
            address: IP address of the client.

        Raises:
            RequestError: 401 for a wrong or revoked token, also if there is a valid session; 429 after too
                many wrong tokens from the address.
        """
        # Two Authorization headers are ambiguous. They are treated like a wrong token.
        if "authorization" in headers:
            scheme, _, token = headers["authorization"].partition(" ")
            bearer_token = (
                token.strip()
                if scheme.lower() == "bearer" and len(headers.getlist("authorization")) == 1
                else ""
            )
            return self._identity(self.by_token(bearer_token, address), "token")
        session_id = cookie_parser(headers.get("cookie", "")).get(COOKIE, "")
        annotator = self.store.session(session_id) if _plausible(session_id) else None
        if annotator is not None:
            return self._identity(annotator, "session", csrf_token(session_id, "csrf"), session_id)
        # `_local` exists only if no other machine can reach the server.
        if self._local is not None:
            return self._identity(self._local, "local", csrf_token(self.secret, "local"))
        if _plausible(session_id) and self.store.withdrawn(session_id):
            raise AccessRevoked
        return None

    def by_token(self, token: str, address: str) -> StoredAnnotator:
        """Return the annotator of a token.

        A token has 192 random bits and cannot be guessed, so a correct token is accepted even after many
        wrong tokens from the same address. After many wrong tokens the error is 429 instead of 401. Users of
        scripts and readers of the access log notice that.

        Args:
            token: token that the client has sent.
            address: IP address of the client.

        Raises:
            RequestError: 401 for a wrong or revoked token, 429 after too many wrong tokens from the address.
        """
        annotator = self.store.authenticate(token) if _plausible(token) else None
        if annotator is None:
            # Only a client that has the token gets the information that it was revoked.
            if _plausible(token) and self.store.withdrawn(token):
                raise AccessRevoked
            if wait_seconds := self.guesses.take(address_key(address)):
                raise too_many(wait_seconds)
            raise RequestError(
                401,
                "The token is unknown or was revoked.",
                "Ask the person who gave you the token for a new one.",
                {"WWW-Authenticate": "Bearer"},
            )
        return annotator

    def _identity(
        self, annotator: StoredAnnotator, identification: str, csrf: str = "", session: str = ""
    ) -> Identity:
        """Make the identity of an annotator, and decide whether the annotator is an admin. See `Identity`."""
        # In a blind study the user of this machine may take part, and must not see results. An admin logs in
        # with a token there.
        is_admin = (identification == "local" and not self.blind) or (
            identification != "local" and annotator.role == "admin"
        )
        return Identity(annotator, identification, is_admin, csrf, session)


def _plausible(token: str) -> bool:
    """Return True if a text can be a token or session id. Other texts are not looked up in the database."""
    return 16 <= len(token) <= _MAX_SECRET and token.isascii() and token.isprintable()


def server_secret(path: Path) -> bytes:
    """Return 32 random bytes from a file, which is created if it does not exist, readable for its owner only.

    Since the bytes are stored, pages that are open remain valid when the server restarts.

    Raises:
        ValueError: the file does not contain 32 bytes.
    """
    path.parent.mkdir(0o700, parents=True, exist_ok=True)
    # With O_EXCL only one of several servers that start at the same time creates the file.
    with (
        contextlib.suppress(FileExistsError),
        os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as secret_file,
    ):
        secret_file.write(os.urandom(32))
    # The file may have been created by another server, so it is read in any case.
    secret_bytes = path.read_bytes()
    if len(secret_bytes) != 32:
        raise ValueError(
            f"{path}: the file contains {len(secret_bytes)} bytes instead of 32. Delete the file, which the"
            " server then creates again."
        )
    return secret_bytes


def csrf_token(key: str | bytes, purpose: str) -> str:
    """Return a CSRF value: the HMAC-SHA256 of the name of its purpose, as hexadecimal digits.

    Args:
        key: secret that other sites cannot have: the id of a session, or the secret of the server.
        purpose: name of the use, so that values of different uses differ.
    """
    return hmac.new(
        key.encode() if isinstance(key, str) else key, purpose.encode(), hashlib.sha256
    ).hexdigest()
