"""Annotators, their tokens and their login sessions. Tokens and session ids are random, given out once, and stored as SHA-256 only."""

import hashlib
import re
import secrets
from collections.abc import Callable

from sqlalchemy import Connection, Row, delete, insert, select, update

from eg3d_rlhf.label.database import Database, Lock
from eg3d_rlhf.label.entities import LOCAL, ROLES, StoredAnnotator
from eg3d_rlhf.label.schema import annotators, sessions

NAME = re.compile(r"\w[\w .@+-]{0,79}")


class Accounts:
    """Who may answer: the part of the store that knows annotators and sessions."""

    def __init__(self, database: Database, clock: Callable[[], float]):
        self.database, self.clock = database, clock
        self._local: StoredAnnotator | None = None

    def add_annotator(self, name: str, role: str = "annotator") -> str:
        """A new annotator; returns the token, which is shown this once.

        Raises: ValueError for a name in use, one that cannot be shown safely, and unknown roles.
        """
        if not NAME.fullmatch(name) or name != name.strip():
            raise ValueError(f"annotator: expected a name of 1 to 80 letters, digits, spaces or . _ @ + -, got {name!r}. Choose another.")
        if role not in ROLES:
            raise ValueError(f"annotator {name}: expected a role of {', '.join(ROLES)}, got {role!r}. Choose one of them.")
        token = secrets.token_urlsafe(24)
        with self.database.write((Lock.SCHEMA, 2)) as c:
            if name == LOCAL or find(c, name) is not None:
                raise ValueError(f"annotator: expected a new name, got {name!r}, which is in use. Choose another.")
            c.execute(insert(annotators).values(name=name, role=role, token_hash=secret_hash(token), created=self.clock()))
        return token

    def revoke_annotator(self, name: str) -> None:
        """Withdraw the token and end the sessions; judgements stay. Raises: ValueError for an unknown name."""
        with self.database.write((Lock.SCHEMA, 2)) as c:
            found = find(c, name)
            if found is None or name == LOCAL:
                raise ValueError(f"annotator: expected one with a token, got {name!r}. `annotators` lists them.")
            if found.revoked is None:
                c.execute(update(annotators).where(annotators.c.id == found.id).values(revoked=self.clock()))
            c.execute(delete(sessions).where(sessions.c.annotator_id == found.id))

    def annotators(self) -> list[StoredAnnotator]:
        """All, oldest first."""
        with self.database.read() as c:
            return listed(c)

    def authenticate(self, token: str) -> StoredAnnotator | None:
        """Whoever has this token, unless it was revoked."""
        with self.database.read() as c:
            return _one(c.execute(select(annotators).where(annotators.c.token_hash == secret_hash(token), annotators.c.revoked.is_(None))))

    def local_annotator(self) -> StoredAnnotator:
        """Whoever sits at this machine: an admin without a token."""
        if self._local is None:
            self._local = self.annotator_without_token(LOCAL, "admin")
        return self._local

    def annotator_without_token(self, name: str, role: str = "annotator") -> StoredAnnotator:
        """The annotator of that name, made if new, with no token: for imports."""
        with self.database.write((Lock.SCHEMA, 2)) as c:
            return find_or_add(c, name, role, self.clock())

    def open_session(self, annotator_id: int, seconds: float) -> str:
        """A login of so many seconds; returns the random id for the cookie. Sessions that have ended are cleared away."""
        session_id, now = secrets.token_urlsafe(32), self.clock()
        record = {"id_hash": secret_hash(session_id), "annotator_id": annotator_id, "created": now, "expires": now + seconds}
        with self.database.write() as c:
            c.execute(delete(sessions).where(sessions.c.expires <= now))
            c.execute(insert(sessions), record)
        return session_id

    def session(self, session_id: str) -> StoredAnnotator | None:
        """Whose login it is, while it lasts and the token is not revoked."""
        own = (sessions.c.id_hash == secret_hash(session_id), sessions.c.expires > self.clock(), annotators.c.revoked.is_(None))
        query = select(annotators).join(sessions, sessions.c.annotator_id == annotators.c.id).where(*own)
        with self.database.read() as c:
            return _one(c.execute(query))

    def close_session(self, session_id: str) -> None:
        """Log out; unknown ones are no error."""
        with self.database.write() as c:
            c.execute(delete(sessions).where(sessions.c.id_hash == secret_hash(session_id)))


def secret_hash(secret: str) -> str:
    """SHA-256 hex. The secrets are 192 random bits and more: a slow hash would add nothing."""
    return hashlib.sha256(secret.encode("utf-8", "backslashreplace")).hexdigest()


def find(c: Connection, name: str) -> StoredAnnotator | None:
    """By name."""
    return _one(c.execute(select(annotators).where(annotators.c.name == name)))


def find_or_add(c: Connection, name: str, role: str, now: float) -> StoredAnnotator:
    """The annotator of that name, made if there is none, to whom no token leads: local work and imports."""
    known = find(c, name)
    if known is None:
        record = {"name": name, "role": role, "created": now}
        known = _annotator(c.execute(insert(annotators).returning(annotators), record).one())
    return known


def listed(c: Connection) -> list[StoredAnnotator]:
    """All, oldest first."""
    return [_annotator(row) for row in c.execute(select(annotators).order_by(annotators.c.id))]


def _one(result) -> StoredAnnotator | None:
    row = result.first()
    return None if row is None else _annotator(row)


def _annotator(row: Row) -> StoredAnnotator:
    return StoredAnnotator(id=row.id, name=row.name, role=row.role, created=row.created, revoked=row.revoked)
