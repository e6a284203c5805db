"""Implements the store of the labelling application: campaigns, annotators, assignments and append-only
judgements in SQLite or PostgreSQL.
"""

import hashlib
import re
import secrets
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence

from sqlalchemy import Connection, Row, Select, delete, insert, select, update

from eg3d_rlhf.people.label import campaigns, judgements
from eg3d_rlhf.people.label.assignments import Issuer, Reach, read_progress
from eg3d_rlhf.people.label.campaigns import Plan, StoredPair
from eg3d_rlhf.people.label.database import Database, Lock, annotators, prepare_tables, sessions
from eg3d_rlhf.people.label.entities import (
    LOCAL,
    ROLES,
    Answer,
    AssignedPair,
    CampaignSettings,
    ConflictError,
    JudgementRow,
    OwnAnswer,
    PlannedPair,
    Progress,
    Shape,
    StoredAnnotator,
    StoredCampaign,
    Submitted,
)
from eg3d_rlhf.people.label.judgements import comments, own_answers

# names of annotators: 1 to 80 characters, the first of them a letter, a digit or _
NAME = re.compile(r"\w[\w .@+-]{0,79}")
ANNOTATOR_COLUMNS = select(*(annotators.c[name] for name in StoredAnnotator.__dataclass_fields__))


class Store:
    """Database of a labelling application. It is thread-safe, and several processes may use one database.
    When a method that writes returns, its changes are on the disk.

    Imports and exports read and write the tables themselves, through `database`. `clock` returns seconds
    since 1970.
    """

    def __init__(self, database: Database, clock: Callable[[], float] = time.time):
        self.database = database
        self.clock = clock
        self._plans: dict[int, Plan] = {}  # cache by campaign id; a campaign never changes
        self._reach = Reach()  # cached counts of the pairs that are left for each annotator
        self._names: dict[int, str] = {}  # cache: annotator id -> name, which never changes

    @classmethod
    def open(cls, url: str, create: bool = True, clock: Callable[[], float] = time.time) -> "Store":
        """Open 'sqlite:///labels.db' or 'postgresql://user@host/database'. `create` makes a new one."""
        database = Database(url, create)
        try:
            prepare_tables(database, create)
        # BaseException: the connections are closed after an interrupt, too.
        except BaseException:
            database.close()
            raise
        return cls(database, clock)

    def close(self) -> None:
        self.database.close()

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    # --- campaigns

    def create_campaign(self, settings: CampaignSettings, pairs: Sequence[PlannedPair]) -> int:
        """Store a campaign with its plan. Returns its id. Raises: ValueError for an invalid plan."""
        with self.database.write((Lock.SCHEMA, 1)) as c:
            # The second result, the ids of the pairs, is needed by imports only.
            return campaigns.create(c, settings, pairs, self.clock())[0]

    def campaign(self, name: str | None = None) -> StoredCampaign | None:
        """Return the campaign of that name, or the newest of all; None if there is none."""
        with self.database.read() as c:
            stored = campaigns.list_campaigns(c, name)
        # Campaigns are listed oldest first.
        return stored[-1] if stored else None

    def campaigns(self) -> list[StoredCampaign]:
        """Return all campaigns, oldest first."""
        with self.database.read() as c:
            return campaigns.list_campaigns(c)

    def shapes(self, campaign_id: int) -> list[tuple[str, Shape]]:
        """Return (asset token, shape) of a campaign's shapes, in order of the plan."""
        return list(self._plan(campaign_id).shapes.items())

    def pairs(self, campaign_id: int) -> list[tuple[str, str]]:
        """Return the asset tokens of a campaign's pairs, in order of the plan."""
        return [(pair.first, pair.second) for pair in self._plan(campaign_id).pairs.values()]

    def training(self, campaign_id: int) -> list[StoredPair]:
        """Return the training pairs of a campaign, in order of the plan."""
        return self._plan(campaign_id).training

    # --- annotators: tokens and session ids are random and returned only once; the database holds their
    # SHA-256

    def add_annotator(self, name: str, role: str = "annotator") -> str:
        """Add an annotator. Returns the token, which cannot be read again.

        Raises: ValueError for an invalid role, and for a name that is invalid or too similar to another.
        """
        # Names stand in tables and logs, so spaces at the ends would be invisible.
        if not NAME.fullmatch(name) or name != name.strip():
            raise ValueError(
                f"annotator: expected a name of 1 to 80 letters, digits, spaces or . _ @ + -, got {name!r}."
                " Choose another."
            )
        if role not in ROLES:
            raise ValueError(
                f"annotator {name}: expected a role of {', '.join(ROLES)}, got {role!r}. Choose one of them."
            )
        token = secrets.token_urlsafe(24)  # 192 random bits
        with self.database.write((Lock.SCHEMA, 2)) as c:
            # LOCAL is reserved, also in a database that has no such annotator yet.
            check_name(name, [LOCAL, *c.execute(select(annotators.c.name)).scalars()])
            c.execute(
                insert(annotators).values(
                    # Only the hash is stored: a copy of the database gives no access.
                    name=name,
                    role=role,
                    token_hash=secret_hash(token),
                    created=self.clock(),
                )
            )
        return token

    def new_token(self, name: str, keep_session: str = "") -> str:
        """Replace the token of an annotator. Returns the new one, which cannot be read again.

        The old token and all sessions except `keep_session` become invalid. Judgements and assignments stay.
        A revoked annotator gets access again.
        """
        token = secrets.token_urlsafe(24)
        with self.database.write((Lock.SCHEMA, 2)) as c:
            annotator = _with_token(c, name)
            c.execute(
                update(annotators)
                .where(annotators.c.id == annotator.id)
                # The old hash is overwritten, which makes the old token invalid.
                .values(token_hash=secret_hash(token), revoked=None)
            )
            # An admin who replaces her own token stays logged in: her session is `keep_session`.
            ended = sessions.c.annotator_id == annotator.id, sessions.c.id_hash != secret_hash(keep_session)
            # Sessions do not depend on the token that opened them, so they are deleted explicitly.
            c.execute(delete(sessions).where(*ended))
        return token

    def revoke_annotator(self, name: str, keep_an_admin: bool = False) -> None:
        """Invalidate the token of an annotator and with it all sessions. Judgements stay.

        Args:
            name: of the annotator; if already revoked, nothing happens.
            keep_an_admin: raise ConflictError if this annotator is the last admin with access.
        """
        with self.database.write((Lock.SCHEMA, 2)) as c:
            annotator = _with_token(c, name)
            if annotator.revoked is not None:
                return
            # An imported admin has no token and cannot log in, so it does not count.
            others = ANNOTATOR_COLUMNS.where(
                annotators.c.role == "admin",
                annotators.c.revoked.is_(None),
                annotators.c.token_hash.is_not(None),
            )
            if (
                keep_an_admin
                and annotator.role == "admin"
                and _first(c, others.where(annotators.c.id != annotator.id)) is None
            ):
                raise ConflictError(
                    f"annotator {name}: is the last admin with access. Create another admin first."
                )
            # Sessions need no deletion: they are valid only while `revoked` is null.
            c.execute(update(annotators).where(annotators.c.id == annotator.id).values(revoked=self.clock()))

    def withdrawn(self, secret: str) -> bool:
        """Return True if a token, or the id of a session that has not expired, belongs to a revoked
        annotator.

        The page can then say that the access was revoked instead of asking for a login.
        """
        digest = secret_hash(secret)
        now = self.clock()
        with_session = select(sessions.c.annotator_id).where(
            sessions.c.id_hash == digest, sessions.c.expires > now
        )
        revoked = (
            annotators.c.revoked.is_not(None),
            # The secret is a token, or the id of a session.
            (annotators.c.token_hash == digest) | annotators.c.id.in_(with_session),
        )
        with self.database.read() as c:
            return _first(c, ANNOTATOR_COLUMNS.where(*revoked)) is not None

    def annotators(self) -> list[StoredAnnotator]:
        """Return all annotators, oldest first, revoked ones included."""
        with self.database.read() as c:
            return [
                StoredAnnotator(**row._mapping)
                for row in c.execute(ANNOTATOR_COLUMNS.order_by(annotators.c.id))
            ]

    def authenticate(self, token: str) -> StoredAnnotator | None:
        """Return the annotator of a valid token, or None."""
        with self.database.read() as c:
            # Revoking leaves the hash in place, so that `withdrawn` can recognise the token.
            return _first(
                c,
                ANNOTATOR_COLUMNS.where(
                    annotators.c.token_hash == secret_hash(token), annotators.c.revoked.is_(None)
                ),
            )

    def annotator_without_token(self, name: str, role: str = "annotator") -> StoredAnnotator:
        """Return the annotator of that name, added if new, without a token: for imports, and for LOCAL, who
        uses the server's machine.
        """
        with self.database.write((Lock.SCHEMA, 2)) as c:
            return find_or_add(c, name, role, self.clock())

    def open_session(self, annotator_id: int, seconds: float) -> str:
        """Start a session that expires after `seconds`. Returns its random id, which is the cookie's value.

        Expired sessions of all annotators are deleted.
        """
        # 256 random bits
        session_id = secrets.token_urlsafe(32)
        now = self.clock()
        record = {
            "id_hash": secret_hash(session_id),
            "annotator_id": annotator_id,
            "created": now,
            "expires": now + seconds,
        }
        with self.database.write() as c:
            # Here and not in a timer: logging in is rare, and the table stays small.
            c.execute(delete(sessions).where(sessions.c.expires <= now))
            c.execute(insert(sessions), record)
        return session_id

    def session(self, session_id: str) -> StoredAnnotator | None:
        """Return the annotator of a session; None if it is unknown, expired or revoked."""
        valid = (
            sessions.c.id_hash == secret_hash(session_id),
            sessions.c.expires > self.clock(),
            annotators.c.revoked.is_(None),
        )
        with self.database.read() as c:
            return _first(
                c, ANNOTATOR_COLUMNS.join(sessions, sessions.c.annotator_id == annotators.c.id).where(*valid)
            )

    def close_session(self, session_id: str) -> None:
        """Delete a session. An unknown one is no error: logging out twice is allowed."""
        with self.database.write() as c:
            c.execute(delete(sessions).where(sessions.c.id_hash == secret_hash(session_id)))

    # --- assignments and answers

    def assignments(
        self,
        campaign_id: int,
        annotator_id: int,
        count: int = 3,
        ready: Callable[[str], bool] | None = None,
        lost: Callable[[str], bool] | None = None,
    ) -> list[AssignedPair]:
        """Return up to `count` open assignments: the last undone one first, then the oldest. New assignments
        are issued until there are that many.

        There are fewer, or none, when the annotator is finished or must wait.

        Args:
            ready: `ready(asset)` is True if the shape is prepared; only pairs of two such shapes are issued.
            lost: `lost(asset)` is True if the shape can never be prepared. The annotator waits for training
                pairs whose shapes are not ready yet, but not for lost ones.
        """
        # A pair is ready when both of its shapes are.
        prepared = (lambda pair: ready(pair.first) and ready(pair.second)) if ready else (lambda pair: True)
        issuer = Issuer(
            self.database,
            self._plan(campaign_id),
            annotator_id,
            self._name(annotator_id),
            self.clock,
            _lost(lost),
        )
        return issuer.assignments(count, prepared)

    def submit(self, campaign_id: int, annotator_id: int, answer: Answer) -> Submitted:
        """Record an answer. The same answer with the same key has no further effect and gives the first
        result.

        Raises: ValueError for an invalid answer; ConflictError if the assignment is answered already.
        """
        # Before the transaction: an invalid answer must not take the lock.
        judgements.check_answer(answer)
        plan = self._plan(campaign_id)
        # The lock of one annotator: two of her answers cannot be recorded at the same time.
        with self.database.write((Lock.ANNOTATOR, annotator_id)) as c:
            return judgements.submit(c, plan, annotator_id, answer, self.clock())

    def undo(
        self, campaign_id: int, annotator_id: int, key: str, assignment: str | None = None
    ) -> str | None:
        """Take back the annotator's last answer that counts, or the answer to `assignment`, with a further
        record. A second call with the same key has no further effect.

        Returns: the token of the assignment that is open again; None if there was nothing to take back.
        """
        # As in `submit`, before the transaction takes its lock.
        judgements.check_text("key", key)
        plan = self._plan(campaign_id)
        with self.database.write((Lock.ANNOTATOR, annotator_id)) as c:
            return judgements.undo(c, plan, annotator_id, key, assignment, self.clock())

    def answers(
        self, campaign_id: int, annotator_id: int, before: int | None = None, count: int = 20
    ) -> list[OwnAnswer]:
        """Return the annotator's answers that count, without training pairs, newest assignment first.

        Args:
            before: only answers to assignments with a smaller sequence number; None: from the newest.
            count: the largest number of answers to return.
        """
        plan = self._plan(campaign_id)
        with self.database.read() as c:
            # The clock decides if a study has ended, after which answers cannot be changed.
            return own_answers(c, plan, annotator_id, before, count, self.clock())

    def comments(self, campaign_id: int, count: int = 200) -> list[Row]:
        """Return the newest comments of a campaign, at most `count`."""
        with self.database.read() as c:
            return comments(c, campaign_id, count)

    def progress(
        self, campaign_id: int, annotator_id: int, lost: Callable[[str], bool] | None = None
    ) -> Progress:
        """Return the annotator's progress; `lost` as for `assignments`."""
        plan = self._plan(campaign_id)
        name = self._name(annotator_id)
        with self.database.read() as c:
            return read_progress(c, plan, annotator_id, name, self.clock(), self._reach, _lost(lost))

    def tally(self) -> list[Row]:
        """Count each annotator's judgements in each campaign, training pairs and gold checks included.

        Returns: rows with campaign_id, name, judgements, last (time of the newest, seconds since 1970).
        """
        with self.database.read() as c:
            return judgements.tally(c)

    def judgements(
        self, campaign: str | None = None, annotators: Sequence[str] = (), include_undone: bool = False
    ) -> Iterator[JudgementRow]:
        """Yield judgements in order of receipt; without arguments those of all campaigns that count."""
        return judgements.read_judgements(self.database, campaign, annotators, include_undone)

    # --- caches of what never changes

    def _name(self, annotator_id: int) -> str:
        if annotator_id not in self._names:
            # A name is missing only for an annotator who was added since the last look-up.
            self._names.update({annotator.id: annotator.name for annotator in self.annotators()})
        if annotator_id not in self._names:
            raise LookupError(f"store: unknown id of an annotator: {annotator_id}. Log in again.")
        return self._names[annotator_id]

    def _plan(self, campaign_id: int) -> Plan:
        if campaign_id not in self._plans:
            with self.database.read() as c:
                # Two threads may load the same plan; the results are equal, so no lock is needed.
                self._plans[campaign_id] = campaigns.load_plan(c, campaign_id)
        return self._plans[campaign_id]


def _lost(lost: Callable[[str], bool] | None) -> Callable[[StoredPair], bool]:
    """Turn a test of one shape into a test of a pair: it is lost if one of its shapes is."""
    return (lambda pair: lost(pair.first) or lost(pair.second)) if lost else (lambda pair: False)


def secret_hash(secret: str) -> str:
    """Return the SHA-256 hex digest. The secrets have at least 192 random bits, so a slow hash, which
    protects passwords that people choose, would add nothing.
    """
    # Cookies and headers may contain lone surrogates, which UTF-8 cannot encode.
    return hashlib.sha256(secret.encode("utf-8", "backslashreplace")).hexdigest()


def find(c: Connection, name: str) -> StoredAnnotator | None:
    """Return the annotator of that name, or None."""
    return _first(c, ANNOTATOR_COLUMNS.where(annotators.c.name == name))


def _with_token(c: Connection, name: str) -> StoredAnnotator:
    """Return the annotator of that name. Raises: ValueError for an unknown one, and for LOCAL."""
    annotator = find(c, name)
    if annotator is None or name == LOCAL:
        raise ValueError(
            f"annotator: expected an annotator with a token, got {name!r}. `annotators` lists them."
        )
    return annotator


def find_or_add(c: Connection, name: str, role: str, now: float) -> StoredAnnotator:
    """Return the annotator of that name, added if new. No token leads to it: for local work and imports."""
    record = {"name": name, "role": role, "created": now}
    # The lock of the caller prevents that two processes add the same name.
    return find(c, name) or StoredAnnotator(
        **c.execute(insert(annotators).returning(*ANNOTATOR_COLUMNS.selected_columns), record).one()._mapping
    )


def _first(c: Connection, query: Select) -> StoredAnnotator | None:
    """Return the first row of a query as an annotator, or None."""
    row = c.execute(query).first()
    return None if row is None else StoredAnnotator(**row._mapping)


# ---- names of annotators that people can distinguish


def check_name(name: str, known: Iterable[str]) -> None:
    """Raise ValueError for a name that differs from one of `known` only in capitals, spaces or the form of
    its characters (Unicode's NFKC). Only new names are checked, so a database with such names remains usable.
    """
    # Equal names get their own message, which is easier to understand.
    for other in known:
        if other == name:
            raise ValueError(
                f"annotator: expected a new name, got {name!r}, which is in use. Choose another."
            )
        if _canonical(name) == _canonical(other):
            raise ValueError(
                f"annotator: {name!r} is too similar to {other!r}, which is in use. Choose another."
            )


def _canonical(name: str) -> str:
    # casefold() can give characters that are not in NFKC form, so the normalisation is applied again.
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", " ".join(name.split())).casefold())
