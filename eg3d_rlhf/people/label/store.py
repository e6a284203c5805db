"""The store of the labelling application: campaigns, annotators, assignments and append-only judgements in
SQLite or PostgreSQL.
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

NAME = re.compile(r"\w[\w .@+-]{0,79}")
KNOWN = select(*(annotators.c[name] for name in StoredAnnotator.__dataclass_fields__))


class Store:
    """Thread-safe; several processes may use one database. Whatever a method has returned from writing is on
    the disk.

    Imports and exports read and write the tables themselves, through `database`; `clock` gives seconds since
    1970.
    """

    def __init__(self, database: Database, clock: Callable[[], float] = time.time):
        self.database = database
        self.clock = clock
        self._plans: dict[int, Plan] = {}  # a campaign never changes
        self._reach = Reach()
        self._names: dict[int, str] = {}

    @classmethod
    def open(cls, url: str, create: bool = True, clock: Callable[[], float] = time.time) -> "Store":
        """Open 'sqlite:///labels.db' or 'postgresql://user@host/database', made if it is new and `create`."""
        database = Database(url, create)
        try:
            prepare_tables(database, create)
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
        with self.database.write((Lock.SCHEMA, 1)) as c:
            return campaigns.create(c, settings, pairs, self.clock())[0]

    def campaign(self, name: str | None = None) -> StoredCampaign | None:
        with self.database.read() as c:
            stored = campaigns.listed(c, name)
        return stored[-1] if stored else None

    def campaigns(self) -> list[StoredCampaign]:
        with self.database.read() as c:
            return campaigns.listed(c)

    def shapes(self, campaign_id: int) -> list[tuple[str, Shape]]:
        return list(self._plan(campaign_id).shapes.items())

    def pairs(self, campaign_id: int) -> list[tuple[str, str]]:
        return [(pair.first, pair.second) for pair in self._plan(campaign_id).pairs.values()]

    def training(self, campaign_id: int) -> list[StoredPair]:
        return self._plan(campaign_id).training

    # --- annotators: tokens and session ids are random, given out once, and stored as SHA-256 only

    def add_annotator(self, name: str, role: str = "annotator") -> str:
        if not NAME.fullmatch(name) or name != name.strip():
            raise ValueError(
                f"annotator: expected a name of 1 to 80 letters, digits, spaces or . _ @ + -, got {name!r}."
                " Choose another."
            )
        if role not in ROLES:
            raise ValueError(
                f"annotator {name}: expected a role of {', '.join(ROLES)}, got {role!r}. Choose one of them."
            )
        token = secrets.token_urlsafe(24)
        with self.database.write((Lock.SCHEMA, 2)) as c:
            check_name(name, [LOCAL, *c.execute(select(annotators.c.name)).scalars()])
            c.execute(
                insert(annotators).values(
                    name=name, role=role, token_hash=secret_hash(token), created=self.clock()
                )
            )
        return token

    def new_token(self, name: str, keep_session: str = "") -> str:
        """A new token for an annotator, which is shown this once: the old one and all sessions end, the
        judgements and her place in the plan stay. Of somebody revoked, the access returns.
        """
        token = secrets.token_urlsafe(24)
        with self.database.write((Lock.SCHEMA, 2)) as c:
            annotator = _with_token(c, name)
            c.execute(
                update(annotators)
                .where(annotators.c.id == annotator.id)
                .values(token_hash=secret_hash(token), revoked=None)
            )
            ended = sessions.c.annotator_id == annotator.id, sessions.c.id_hash != secret_hash(keep_session)
            c.execute(delete(sessions).where(*ended))
        return token

    def revoke_annotator(self, name: str, keep_an_admin: bool = False) -> None:
        """Withdraw the token and what was opened with it; judgements stay."""
        with self.database.write((Lock.SCHEMA, 2)) as c:
            annotator = _with_token(c, name)
            if annotator.revoked is not None:
                return
            others = KNOWN.where(
                annotators.c.role == "admin",
                annotators.c.revoked.is_(None),
                annotators.c.token_hash.is_not(None),
            )
            if (
                keep_an_admin
                and annotator.role == "admin"
                and _one(c, others.where(annotators.c.id != annotator.id)) is None
            ):
                raise ConflictError(
                    f"annotator {name}: expected another admin with access, got none. Make one first."
                )
            c.execute(update(annotators).where(annotators.c.id == annotator.id).values(revoked=self.clock()))

    def withdrawn(self, secret: str) -> bool:
        """Whether a token, or the id of a session that would still last, is of somebody whose access was
        revoked.
        """
        digest = secret_hash(secret)
        now = self.clock()
        lasting = select(sessions.c.annotator_id).where(
            sessions.c.id_hash == digest, sessions.c.expires > now
        )
        theirs = (
            annotators.c.revoked.is_not(None),
            (annotators.c.token_hash == digest) | annotators.c.id.in_(lasting),
        )
        with self.database.read() as c:
            return _one(c, KNOWN.where(*theirs)) is not None

    def annotators(self) -> list[StoredAnnotator]:
        with self.database.read() as c:
            return [StoredAnnotator(**row._mapping) for row in c.execute(KNOWN.order_by(annotators.c.id))]

    def authenticate(self, token: str) -> StoredAnnotator | None:
        with self.database.read() as c:
            return _one(
                c, KNOWN.where(annotators.c.token_hash == secret_hash(token), annotators.c.revoked.is_(None))
            )

    def annotator_without_token(self, name: str, role: str = "annotator") -> StoredAnnotator:
        """The annotator of that name, made if new, to whom no token leads: for imports, and LOCAL, who sits
        at this machine.
        """
        with self.database.write((Lock.SCHEMA, 2)) as c:
            return find_or_add(c, name, role, self.clock())

    def open_session(self, annotator_id: int, seconds: float) -> str:
        """A login of so many seconds; returns the random id for the cookie. Sessions that have ended are
        cleared away.
        """
        session_id = secrets.token_urlsafe(32)
        now = self.clock()
        record = {
            "id_hash": secret_hash(session_id),
            "annotator_id": annotator_id,
            "created": now,
            "expires": now + seconds,
        }
        with self.database.write() as c:
            c.execute(delete(sessions).where(sessions.c.expires <= now))
            c.execute(insert(sessions), record)
        return session_id

    def session(self, session_id: str) -> StoredAnnotator | None:
        lasting = (
            sessions.c.id_hash == secret_hash(session_id),
            sessions.c.expires > self.clock(),
            annotators.c.revoked.is_(None),
        )
        with self.database.read() as c:
            return _one(c, KNOWN.join(sessions, sessions.c.annotator_id == annotators.c.id).where(*lasting))

    def close_session(self, session_id: str) -> None:
        """Log out; unknown ones are no error."""
        with self.database.write() as c:
            c.execute(delete(sessions).where(sessions.c.id_hash == secret_hash(session_id)))

    # --- work

    def assignments(
        self,
        campaign_id: int,
        annotator_id: int,
        count: int = 3,
        ready: Callable[[str], bool] | None = None,
        lost: Callable[[str], bool] | None = None,
    ) -> list[AssignedPair]:
        """Up to `count` open assignments, an undone one first, then the oldest; new ones are issued until
        there are so many.

        `ready(asset)`: issue only pairs both of whose shapes are prepared. Practice is waited for, unless a
        shape of it is `lost(asset)`: it will never be prepared. Fewer or none when the annotator is done or
        must wait.
        """
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
        """Record an answer. The same answer with the same key again changes nothing and gives the first
        result.
        """
        judgements.check_answer(answer)
        plan = self._plan(campaign_id)
        with self.database.write((Lock.ANNOTATOR, annotator_id)) as c:
            return judgements.submit(c, plan, annotator_id, answer, self.clock())

    def undo(
        self, campaign_id: int, annotator_id: int, key: str, assignment: str | None = None
    ) -> str | None:
        """Take back the annotator's last counting answer, or that of `assignment`, with a further record;
        idempotent by key.

        Returns the token of the assignment that is open again, None if there was nothing to take back.
        """
        judgements.check_text("key", key)
        plan = self._plan(campaign_id)
        with self.database.write((Lock.ANNOTATOR, annotator_id)) as c:
            return judgements.undo(c, plan, annotator_id, key, assignment, self.clock())

    def answers(
        self, campaign_id: int, annotator_id: int, before: int | None = None, count: int = 20
    ) -> list[OwnAnswer]:
        """The annotator's answers that count, practice aside, the pair that was handed out last first."""
        plan = self._plan(campaign_id)
        with self.database.read() as c:
            return own_answers(c, plan, annotator_id, before, count, self.clock())

    def comments(self, campaign_id: int, count: int = 200) -> list[Row]:
        with self.database.read() as c:
            return comments(c, campaign_id, count)

    def progress(
        self, campaign_id: int, annotator_id: int, lost: Callable[[str], bool] | None = None
    ) -> Progress:
        """How far the annotator is; `lost` as for `assignments`."""
        plan = self._plan(campaign_id)
        name = self._name(annotator_id)
        with self.database.read() as c:
            return read_progress(c, plan, annotator_id, name, self.clock(), self._reach, _lost(lost))

    def tally(self) -> list[Row]:
        """How much each annotator has done in each campaign, practice and checks included: campaign_id, name,
        judgements, last (when).
        """
        with self.database.read() as c:
            return judgements.tally(c)

    def judgements(
        self, campaign: str | None = None, annotators: Sequence[str] = (), include_undone: bool = False
    ) -> Iterator[JudgementRow]:
        return judgements.read_judgements(self.database, campaign, annotators, include_undone)

    # --- what does not change

    def _name(self, annotator_id: int) -> str:
        if annotator_id not in self._names:
            self._names.update({known.id: known.name for known in self.annotators()})
        if annotator_id not in self._names:
            raise LookupError(f"store: expected an annotator, got the unknown id {annotator_id}.")
        return self._names[annotator_id]

    def _plan(self, campaign_id: int) -> Plan:
        if campaign_id not in self._plans:
            with self.database.read() as c:
                self._plans[campaign_id] = campaigns.load_plan(c, campaign_id)
        return self._plans[campaign_id]


def _lost(lost: Callable[[str], bool] | None) -> Callable[[StoredPair], bool]:
    return (lambda pair: lost(pair.first) or lost(pair.second)) if lost else (lambda pair: False)


def secret_hash(secret: str) -> str:
    """SHA-256 hex. The secrets are 192 random bits and more: a slow hash would add nothing."""
    return hashlib.sha256(secret.encode("utf-8", "backslashreplace")).hexdigest()


def find(c: Connection, name: str) -> StoredAnnotator | None:
    """By name."""
    return _one(c, KNOWN.where(annotators.c.name == name))


def _with_token(c: Connection, name: str) -> StoredAnnotator:
    annotator = find(c, name)
    if annotator is None or name == LOCAL:
        raise ValueError(f"annotator: expected one with a token, got {name!r}. `annotators` lists them.")
    return annotator


def find_or_add(c: Connection, name: str, role: str, now: float) -> StoredAnnotator:
    """The annotator of that name, made if there is none, to whom no token leads: local work and imports."""
    record = {"name": name, "role": role, "created": now}
    return find(c, name) or StoredAnnotator(
        **c.execute(insert(annotators).returning(*KNOWN.selected_columns), record).one()._mapping
    )


def _one(c: Connection, query: Select) -> StoredAnnotator | None:
    row = c.execute(query).first()
    return None if row is None else StoredAnnotator(**row._mapping)


# ---- names of annotators that can be told apart


def check_name(name: str, known: Iterable[str]) -> None:
    """Raise ValueError for a name that equals one of `known` but for capitals, spaces or the form of its
    characters (Unicode's NFKC). Only new names are checked: a database that holds such names goes on working.
    """
    for other in known:
        if other == name:
            raise ValueError(
                f"annotator: expected a new name, got {name!r}, which is in use. Choose another."
            )
        if _plain(name) == _plain(other):
            raise ValueError(
                f"annotator: expected a name unlike the others, got {name!r}, which is too like {other!r}."
                " Choose another."
            )


def _plain(name: str) -> str:
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", " ".join(name.split())).casefold())
