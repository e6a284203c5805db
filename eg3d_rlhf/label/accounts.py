"""Annotators, their tokens and their login sessions. Tokens and session ids are random, given out once, and stored as SHA-256 only."""

import hashlib
import re
import secrets

from sqlalchemy import Connection, Row, delete, insert, select, update

from eg3d_rlhf.label.entities import LOCAL, ROLES, StoredAnnotator
from eg3d_rlhf.label.schema import annotators, sessions

NAME = re.compile(r"\w[\w .@+-]{0,79}")


def secret_hash(secret: str) -> str:
    """SHA-256 hex. The secrets are 192 random bits and more: a slow hash would add nothing."""
    return hashlib.sha256(secret.encode("utf-8", "backslashreplace")).hexdigest()


def add(c: Connection, name: str, role: str, now: float) -> str:
    """A new annotator; returns the token. Raises: ValueError for a name in use, one that cannot be shown safely, and unknown roles."""
    if not NAME.fullmatch(name) or name != name.strip():
        raise ValueError(f"annotator: expected a name of 1 to 80 letters, digits, spaces or . _ @ + -, got {name!r}. Choose another.")
    if role not in ROLES:
        raise ValueError(f"annotator {name}: expected a role of {', '.join(ROLES)}, got {role!r}. Choose one of them.")
    if name == LOCAL or find(c, name) is not None:
        raise ValueError(f"annotator: expected a new name, got {name!r}, which is in use. Choose another.")
    token = secrets.token_urlsafe(24)
    c.execute(insert(annotators).values(name=name, role=role, token_hash=secret_hash(token), created=now))
    return token


def revoke(c: Connection, name: str, now: float) -> None:
    """Withdraw a token and end the sessions. Raises: ValueError for an unknown name."""
    found = find(c, name)
    if found is None or name == LOCAL:
        raise ValueError(f"annotator: expected one with a token, got {name!r}. `annotators` lists them.")
    if found.revoked is None:
        c.execute(update(annotators).where(annotators.c.id == found.id).values(revoked=now))
    c.execute(delete(sessions).where(sessions.c.annotator_id == found.id))


def find(c: Connection, name: str) -> StoredAnnotator | None:
    """By name."""
    return _one(c.execute(select(annotators).where(annotators.c.name == name)).first())


def listed(c: Connection) -> list[StoredAnnotator]:
    """All, oldest first."""
    return [_one(row) for row in c.execute(select(annotators).order_by(annotators.c.id))]


def by_token(c: Connection, token: str) -> StoredAnnotator | None:
    """Whoever has this token, unless it was revoked."""
    return _one(c.execute(select(annotators).where(annotators.c.token_hash == secret_hash(token), annotators.c.revoked.is_(None))).first())


def add_without_token(c: Connection, name: str, role: str, now: float) -> StoredAnnotator:
    """The annotator of that name, made if there is none, to whom no token leads: local work and imports."""
    if find(c, name) is None:
        c.execute(insert(annotators).values(name=name, role=role, created=now))
    return find(c, name)


def open_session(c: Connection, annotator_id: int, seconds: float, now: float) -> str:
    """A new session of so many seconds; returns its id. Sessions that have ended are cleared away."""
    c.execute(delete(sessions).where(sessions.c.expires <= now))
    session_id = secrets.token_urlsafe(32)
    c.execute(insert(sessions).values(id_hash=secret_hash(session_id), annotator_id=annotator_id, created=now, expires=now + seconds))
    return session_id


def by_session(c: Connection, session_id: str, now: float) -> StoredAnnotator | None:
    """Whose session it is, while it lasts."""
    query = select(annotators).join(sessions, sessions.c.annotator_id == annotators.c.id)
    query = query.where(sessions.c.id_hash == secret_hash(session_id), sessions.c.expires > now, annotators.c.revoked.is_(None))
    return _one(c.execute(query).first())


def close_session(c: Connection, session_id: str) -> None:
    """End a session; unknown ones are no error."""
    c.execute(delete(sessions).where(sessions.c.id_hash == secret_hash(session_id)))


def _one(row: Row | None) -> StoredAnnotator | None:
    if row is None:
        return None
    return StoredAnnotator(id=row.id, name=row.name, role=row.role, created=row.created, revoked=row.revoked)
