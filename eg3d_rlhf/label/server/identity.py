"""Who asks: a bearer token, a session cookie, or on loopback whoever sits at this machine."""

import hashlib
import hmac
import os
from dataclasses import dataclass
from pathlib import Path

from starlette.datastructures import Headers
from starlette.requests import cookie_parser

from eg3d_rlhf.label.entities import Mode, StoredAnnotator
from eg3d_rlhf.label.server.errors import Refusal, too_many
from eg3d_rlhf.label.server.options import AppOptions
from eg3d_rlhf.label.server.rates import Guesses, address_key

COOKIE = "session"
_WORDS = 256  # characters of a token or session id at most


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
        self.store, self.exposed, self.blind = options.store, options.exposed, mode is Mode.STUDY
        self.guesses = Guesses(options.limits.guesses, options.limits.all_guesses)
        self._secret = options.secret or kept_secret(options.cache.folder / "server.key")
        self._local = None if options.exposed else self.store.local_annotator()

    def find(self, headers: Headers, address: str) -> Identity | None:
        """The identity, or None. A wrong bearer token is refused, never ignored.

        Raises: Refusal 401, 429.
        """
        if "authorization" in headers:
            return self._identity(self.by_token(_bearer(headers), address), "token")
        session = cookie_parser(headers.get("cookie", "")).get(COOKIE, "")
        annotator = self.store.session(session) if _plausible(session) else None
        if annotator is not None:
            return self._identity(annotator, "session", csrf_token(session, "csrf"), session)
        if self._local is not None:
            return self._identity(self._local, "local", csrf_token(self._secret, "local"))
        return None

    def by_token(self, token: str, address: str) -> StoredAnnotator:
        """The annotator whose token this is.

        Raises: Refusal 401, or 429 where too many were wrong.
        """
        annotator, wait = self.guesses.attempt(
            address_key(address), token, lambda: self.store.authenticate(token) if _plausible(token) else None
        )
        if wait:
            raise too_many(wait)
        if annotator is None:
            remedy = "Ask whoever runs this server for a new one, which the command add-annotator makes."
            raise Refusal(401, "Unknown or revoked token.", remedy, {"WWW-Authenticate": "Bearer"})
        return annotator

    def _identity(self, annotator: StoredAnnotator, by: str, csrf: str = "", session: str = "") -> Identity:
        # In a blind study not even the person at this machine sees results without an admin's token.
        admin = (by == "local" and not self.blind) or (by != "local" and annotator.role == "admin")
        return Identity(annotator, by, admin, csrf, session)


def _bearer(headers: Headers) -> str:
    scheme, _, token = headers["authorization"].partition(" ")
    return token.strip() if scheme.lower() == "bearer" and len(headers.getlist("authorization")) == 1 else ""


def _plausible(token: str) -> bool:
    """Whether it is worth asking the store."""
    return 16 <= len(token) <= _WORDS and token.isascii() and token.isprintable()


def kept_secret(path: Path) -> bytes:
    """32 random bytes, kept in a file that only its owner reads, so that open pages survive a restart of the server."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(os.urandom(32))
    except FileExistsError:
        pass
    secret = path.read_bytes()
    if len(secret) != 32:
        raise ValueError(f"{path}: expected 32 bytes, got {len(secret)}. Delete the file; it is made again.")
    return secret


def csrf_token(key: str | bytes, purpose: str) -> str:
    """HMAC-SHA256 of the purpose under a key that other sites cannot know: the session's id, or the server's secret."""
    return hmac.new(key.encode() if isinstance(key, str) else key, purpose.encode(), hashlib.sha256).hexdigest()
