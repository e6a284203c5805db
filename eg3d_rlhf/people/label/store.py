"""Store of the labelling application in SQLite or PostgreSQL.

It contains labelling campaigns, annotators, assignments, and judgements, which are only ever added.
"""

import hashlib
import re
import secrets
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence

from sqlalchemy import Connection, Row, Select, delete, insert, select, update

from eg3d_rlhf.people.label import campaigns, judgements
from eg3d_rlhf.people.label.assignments import FREE, Issuer, Reach, read_progress, timetable
from eg3d_rlhf.people.label.campaigns import Plan, StoredPair
from eg3d_rlhf.people.label.database import Database, Lock, annotators, prepare_tables, sessions
from eg3d_rlhf.people.label.entities import (
    JUDGE,
    LOCAL,
    ROLES,
    Answer,
    AssignedPair,
    CampaignSettings,
    ConflictError,
    JudgementRow,
    Kind,
    OwnAnswer,
    PlannedPair,
    Progress,
    Shape,
    StoredAnnotator,
    StoredCampaign,
    Submitted,
)
from eg3d_rlhf.people.label.judgements import comments, own_answers
from eg3d_rlhf.preferences.provenance import PEOPLE

# name of an annotator: 1 to 80 characters, of which the first is a letter, a digit or _
NAME = re.compile(r"\w[\w .@+-]{0,79}")
ANNOTATOR_COLUMNS = select(*(annotators.c[name] for name in StoredAnnotator.__dataclass_fields__))


class Store:
    """Database of a labelling application.

    The object is thread-safe, and several processes may use one database. When a method that writes returns,
    its changes are on the disk. Imports and exports use the tables directly, through the attribute
    `database`.

    Args:
        database: database with the tables of a label store.
        clock: function that returns the time in seconds since 1970.
    """

    def __init__(self, database: Database, clock: Callable[[], float] = time.time):
        self.database = database
        self.clock = clock
        self._plans: dict[int, Plan] = {}  # cache by campaign id; see `plan`
        self._reach = Reach()  # cached counts of the pairs that are left for each annotator
        self._names: dict[int, str] = {}  # cache: annotator id -> name, which never changes

    @classmethod
    def open(cls, url: str, create: bool = True, clock: Callable[[], float] = time.time) -> "Store":
        """Open a label store.

        Args:
            url: 'sqlite:///labels.db' or 'postgresql://user@host/database'.
            create: True creates the store if there is none.
            clock: function that returns the time in seconds since 1970.

        Raises:
            FileNotFoundError: there is no store, and `create` is False.
            ValueError: the URL is invalid, or the database belongs to another program.
            OSError: the database cannot be reached.
        """
        database = Database(url, create)
        try:
            prepare_tables(database, create)
        # BaseException, so that the connections are closed after KeyboardInterrupt as well
        except BaseException:
            database.close()
            raise
        return cls(database, clock)

    def close(self) -> None:
        """Close the connections to the database."""
        self.database.close()

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    # --- campaigns

    def create_campaign(
        self, campaign_settings: CampaignSettings, planned_pairs: Sequence[PlannedPair]
    ) -> int:
        """Store a new campaign with its pairs, and return its id.

        Raises:
            ValueError: the name, the settings or the pairs are invalid.
        """
        with self.database.write((Lock.SCHEMA, 1)) as connection:
            # The second result, which is the ids of the pairs, is used by imports only.
            return campaigns.create(connection, campaign_settings, planned_pairs, self.clock())[0]

    def append_pairs(self, campaign_id: int, planned_pairs: Sequence[PlannedPair], pair_count: int) -> bool:
        """Append pairs to a campaign that learns from its answers. See `campaigns.append`.

        Args:
            campaign_id: id of the campaign.
            planned_pairs: pairs of new shapes.
            pair_count: number of pairs of all kinds for which the new pairs were chosen.

        Returns:
            False if another process has appended pairs in the meantime, so that nothing was stored.
        """
        campaign = self.plan(campaign_id).campaign
        with self.database.write((Lock.CAMPAIGN, campaign_id)) as connection:
            return campaigns.append(connection, campaign, planned_pairs, pair_count)

    def free_pair_count(self, campaign_id: int) -> int:
        """Return the number of pairs that have a free slot, so that they can still be assigned."""
        with self.database.read() as connection:
            return int(connection.execute(FREE, {"campaign": campaign_id}).scalar_one())

    def campaign(self, name: str | None = None) -> StoredCampaign | None:
        """Return the campaign of a name, or the newest campaign if `name` is None.

        Returns None if there is no such campaign.
        """
        with self.database.read() as connection:
            stored_campaigns = campaigns.list_campaigns(connection, name)
        # Campaigns are listed oldest first.
        return stored_campaigns[-1] if stored_campaigns else None

    def campaigns(self) -> list[StoredCampaign]:
        """Return all campaigns, oldest first."""
        with self.database.read() as connection:
            return campaigns.list_campaigns(connection)

    def shapes(self, campaign_id: int) -> list[tuple[str, Shape]]:
        """Return (asset token, shape) for every shape of a campaign, in order of the plan."""
        return list(self.plan(campaign_id).shapes.items())

    def pairs(self, campaign_id: int) -> list[tuple[str, str]]:
        """Return the asset tokens (first, second) of every pair of a campaign, in order of the plan."""
        return [(pair.first, pair.second) for pair in self.plan(campaign_id).pairs.values()]

    def training(self, campaign_id: int) -> list[StoredPair]:
        """Return the practice pairs of a campaign, in order of the plan."""
        return self.plan(campaign_id).training

    # --- annotators. Tokens and session ids are random, and are returned only once. The database contains
    # their SHA-256.

    def add_annotator(self, name: str, role: str = "annotator") -> str:
        """Add an annotator, and return the login token. The token cannot be read again later.

        Args:
            name: name of the annotator, see NAME.
            role: one of ROLES.

        Raises:
            ValueError: the role is unknown, or the name is invalid, in use or too similar to another name.
        """
        # Spaces at the ends of a name would be invisible in tables and logs.
        if not NAME.fullmatch(name) or name != name.strip():
            raise ValueError(
                f"annotator: the name {name!r} is invalid. Choose a name of 1 to 80 letters, digits, spaces"
                " or . _ @ + - that starts with a letter, a digit or _ and does not end in a space."
            )
        if role not in ROLES:
            raise ValueError(
                f"annotator {name}: the role {role!r} is unknown. Choose one of {', '.join(ROLES)}."
            )
        token = secrets.token_urlsafe(24)  # 192 random bits
        with self.database.write((Lock.SCHEMA, 2)) as connection:
            # The name LOCAL is reserved, also in a database that has no annotator of this name yet.
            check_name(name, [LOCAL, *connection.execute(select(annotators.c.name)).scalars()])
            connection.execute(
                insert(annotators).values(
                    # Only the hash of the token is stored, so a copy of the database gives no access.
                    name=name,
                    role=role,
                    token_hash=secret_hash(token),
                    created=self.clock(),
                )
            )
        return token

    def new_token(self, name: str, kept_session_id: str = "") -> str:
        """Replace the login token of an annotator, and return the new token. It cannot be read again later.

        The old token and the annotator's sessions become invalid. Judgements and assignments stay. A revoked
        annotator gets access again.

        Args:
            name: name of the annotator.
            kept_session_id: id of a session that stays valid; "": no session.

        Raises:
            ValueError: there is no annotator of this name who can have a token.
        """
        token = secrets.token_urlsafe(24)
        with self.database.write((Lock.SCHEMA, 2)) as connection:
            annotator = _with_token(connection, name)
            connection.execute(
                update(annotators)
                .where(annotators.c.id == annotator.id)
                # Overwriting the old hash makes the old token invalid.
                .values(token_hash=secret_hash(token), revoked=None)
            )
            # Sessions do not depend on the token that opened them, so they are deleted explicitly. The
            # session in which an admin replaces the own token is kept.
            ended_sessions = (
                sessions.c.annotator_id == annotator.id,
                sessions.c.id_hash != secret_hash(kept_session_id),
            )
            connection.execute(delete(sessions).where(*ended_sessions))
        return token

    def revoke_annotator(self, name: str, must_keep_admin: bool = False) -> None:
        """Revoke the access of an annotator: the token and all sessions become invalid. Judgements stay.

        Args:
            name: name of the annotator. If the access was revoked before, nothing changes.
            must_keep_admin: True raises an error if this annotator is the last admin with access.

        Raises:
            ValueError: there is no annotator of this name who can have a token.
            ConflictError: the annotator is the last admin, and `must_keep_admin` is True.
        """
        with self.database.write((Lock.SCHEMA, 2)) as connection:
            annotator = _with_token(connection, name)
            if annotator.revoked is not None:
                return
            # An imported admin without a token cannot log in, and is not counted.
            admin_query = ANNOTATOR_COLUMNS.where(
                annotators.c.role == "admin",
                annotators.c.revoked.is_(None),
                annotators.c.token_hash.is_not(None),
            )
            if (
                must_keep_admin
                and annotator.role == "admin"
                and _first(connection, admin_query.where(annotators.c.id != annotator.id)) is None
            ):
                raise ConflictError(
                    f"annotator {name} is the last admin with access. Create another admin first."
                )
            # Sessions need not be deleted: they are valid only while `revoked` is null.
            connection.execute(
                update(annotators).where(annotators.c.id == annotator.id).values(revoked=self.clock())
            )

    def withdrawn(self, secret: str) -> bool:
        """Return True if a secret belongs to a revoked annotator.

        The page then states that the access was revoked, instead of asking for a login.

        Args:
            secret: token, or id of a session. The id of an expired session belongs to no annotator.
        """
        hashed_secret = secret_hash(secret)
        now = self.clock()
        session_owner = select(sessions.c.annotator_id).where(
            sessions.c.id_hash == hashed_secret, sessions.c.expires > now
        )
        revoked_owner = (
            annotators.c.revoked.is_not(None),
            (annotators.c.token_hash == hashed_secret) | annotators.c.id.in_(session_owner),
        )
        with self.database.read() as connection:
            return _first(connection, ANNOTATOR_COLUMNS.where(*revoked_owner)) is not None

    def annotators(self) -> list[StoredAnnotator]:
        """Return all annotators, also revoked ones, in the order in which they were added."""
        with self.database.read() as connection:
            return [
                StoredAnnotator(**annotator_row._mapping)
                for annotator_row in connection.execute(ANNOTATOR_COLUMNS.order_by(annotators.c.id))
            ]

    def authenticate(self, token: str) -> StoredAnnotator | None:
        """Return the annotator of a token, or None if the token is unknown or revoked."""
        with self.database.read() as connection:
            # The hash of a revoked token stays in the table, so that `withdrawn` can recognise the token.
            return _first(
                connection,
                ANNOTATOR_COLUMNS.where(
                    annotators.c.token_hash == secret_hash(token), annotators.c.revoked.is_(None)
                ),
            )

    def annotator_without_token(self, name: str, role: str = "annotator") -> StoredAnnotator:
        """Return the annotator of a name, who is added without a token if there is none.

        Imports need such annotators, and so does LOCAL, the person who uses the machine of the server.

        Args:
            name: name of the annotator.
            role: role of an annotator who is added.
        """
        with self.database.write((Lock.SCHEMA, 2)) as connection:
            return find_or_add(connection, name, role, self.clock())

    def open_session(self, annotator_id: int, seconds: float) -> str:
        """Start a login session, and return its id, which is the value of the login cookie.

        Expired sessions of all annotators are deleted.

        Args:
            annotator_id: id of the annotator.
            seconds: time until the session expires.
        """
        session_id = secrets.token_urlsafe(32)  # 256 random bits
        now = self.clock()
        session_values = {
            "id_hash": secret_hash(session_id),
            "annotator_id": annotator_id,
            "created": now,
            "expires": now + seconds,
        }
        with self.database.write() as connection:
            # A login is a rare event, so this is often enough to keep the table small, and no timer is
            # needed.
            connection.execute(delete(sessions).where(sessions.c.expires <= now))
            connection.execute(insert(sessions), session_values)
        return session_id

    def session(self, session_id: str) -> StoredAnnotator | None:
        """Return the annotator of a session.

        Returns None if the session is unknown or has expired, or if the annotator's access is revoked.
        """
        valid_session = (
            sessions.c.id_hash == secret_hash(session_id),
            sessions.c.expires > self.clock(),
            annotators.c.revoked.is_(None),
        )
        with self.database.read() as connection:
            return _first(
                connection,
                ANNOTATOR_COLUMNS.join(sessions, sessions.c.annotator_id == annotators.c.id).where(
                    *valid_session
                ),
            )

    def close_session(self, session_id: str) -> None:
        """Delete a session. An unknown id is no error, so that a person can log out twice."""
        with self.database.write() as connection:
            connection.execute(delete(sessions).where(sessions.c.id_hash == secret_hash(session_id)))

    # --- assignments and answers

    def assignments(
        self,
        campaign_id: int,
        annotator_id: int,
        needed_count: int = 3,
        readiness_test: Callable[[str], bool] | None = None,
        failure_test: Callable[[str], bool] | None = None,
    ) -> list[AssignedPair]:
        """Return up to `needed_count` open assignments of an annotator, and make new ones if there are fewer.

        The assignment whose answer was undone last comes first, and then the oldest one. There are fewer than
        `needed_count` assignments, or none, if the annotator is finished or must wait for the preparation of
        shapes.

        Args:
            campaign_id: id of the campaign.
            annotator_id: id of the annotator.
            needed_count: number of assignments that the page needs.
            readiness_test: function that returns True for the asset token of a prepared shape. Only pairs of
                two prepared shapes are assigned. None: all shapes are prepared.
            failure_test: function that returns True for the asset token of a shape that can never be
                prepared. An annotator waits for practice pairs that are not prepared yet, but not for such
                ones. None: no shape has failed.
        """

        def is_pair_ready(pair: StoredPair) -> bool:
            return readiness_test is None or (readiness_test(pair.first) and readiness_test(pair.second))

        issuer = Issuer(
            self.database,
            self.plan(campaign_id),
            annotator_id,
            self._name(annotator_id),
            self.clock,
            _pair_failure_test(failure_test),
        )
        return issuer.assignments(needed_count, is_pair_ready)

    def submit(self, campaign_id: int, annotator_id: int, answer: Answer) -> Submitted:
        """Record an answer. If an answer is submitted twice with one key, it is recorded once.

        Returns:
            Result of the submission. The second submission of an answer gets the result of the first one.

        Raises:
            ValueError: the answer is invalid.
            ConflictError: the assignment has an answer already, or another answer has used the key.
            LookupError: the annotator has no such assignment.
        """
        # The answer is checked before the transaction, so that an invalid answer does not take the lock.
        judgements.check_answer(answer)
        plan = self.plan(campaign_id)
        # With the annotator's lock, two answers of one annotator are recorded one after the other.
        with self.database.write((Lock.ANNOTATOR, annotator_id)) as connection:
            return judgements.submit(connection, plan, annotator_id, answer, self.clock())

    def undo(
        self, campaign_id: int, annotator_id: int, key: str, assignment: str | None = None
    ) -> str | None:
        """Take back an answer of an annotator, by adding a record. The answer itself stays in the store.

        Args:
            campaign_id: id of the campaign.
            annotator_id: id of the annotator.
            key: text that the page chooses for this undo. A second call with the same key has no effect.
            assignment: token of the assignment whose answer is taken back; None: the annotator's last answer
                that counts.

        Returns:
            Token of the assignment that is open again; None if there was no answer to take back.

        Raises:
            ConflictError: the answer may not be changed any more, or an answer has used the key.
            LookupError: the annotator has no such assignment.
        """
        # The key is checked before the transaction, so that an invalid key does not take the lock.
        judgements.check_text("key", key)
        plan = self.plan(campaign_id)
        with self.database.write((Lock.ANNOTATOR, annotator_id)) as connection:
            return judgements.undo(connection, plan, annotator_id, key, assignment, self.clock())

    def answers(
        self, campaign_id: int, annotator_id: int, before_sequence: int | None = None, max_count: int = 20
    ) -> list[OwnAnswer]:
        """Return the answers of an annotator that count, newest assignment first, without practice pairs.

        Args:
            campaign_id: id of the campaign.
            annotator_id: id of the annotator.
            before_sequence: sequence number; only answers to assignments with a smaller number are returned.
                None: no restriction.
            max_count: largest number of answers that are returned.
        """
        plan = self.plan(campaign_id)
        with self.database.read() as connection:
            # The time decides whether a study has ended. After its end, answers cannot be changed.
            return own_answers(connection, plan, annotator_id, before_sequence, max_count, self.clock())

    def comments(self, campaign_id: int, max_count: int = 200) -> list[Row]:
        """Return the newest comments of a campaign, newest first.

        Args:
            campaign_id: id of the campaign.
            max_count: largest number of comments that are returned.

        Returns:
            Rows with annotator (name), received_at (seconds since 1970), choice and comment.
        """
        with self.database.read() as connection:
            return comments(connection, campaign_id, max_count)

    def progress(
        self, campaign_id: int, annotator_id: int, failure_test: Callable[[str], bool] | None = None
    ) -> Progress:
        """Return the progress of an annotator in a campaign.

        Args:
            campaign_id: id of the campaign.
            annotator_id: id of the annotator.
            failure_test: function that returns True for the asset token of a shape that can never be
                prepared. None: no shape has failed.
        """
        plan = self.plan(campaign_id)
        annotator_name = self._name(annotator_id)
        with self.database.read() as connection:
            return read_progress(
                connection,
                plan,
                annotator_id,
                annotator_name,
                self.clock(),
                self._reach,
                _pair_failure_test(failure_test),
            )

    def size(self, campaign_id: int, annotator: str) -> tuple[int, int]:
        """Return the number of pairs of a campaign, and of the trials of an annotator who answers all pairs.

        Trials are the pairs, their repeats and the gold checks, without practice pairs. Their number is the
        one that the page shows to this annotator at the start, if no shape fails.

        Args:
            campaign_id: id of the campaign.
            annotator: name of the annotator, who need not be stored yet.
        """
        plan = self.plan(campaign_id)
        settings = plan.campaign.settings
        pair_count = plan.pair_count + plan.missing_count
        # every campaign has at least one pair
        trial_count = timetable(settings, annotator, len(plan.gold)).end(0, pair_count)
        return pair_count, min(trial_count, settings.trials_per_annotator or trial_count)

    def tally(self) -> list[Row]:
        """Count the judgements of each annotator in each campaign, including gold checks.

        Practice pairs are not counted.

        Returns:
            Rows with campaign_id, name and role (of the annotator), judgements (number of judgements that
            count) and last (time of receipt of the newest judgement, seconds since 1970).
        """
        with self.database.read() as connection:
            return judgements.tally(connection)

    def answer_count(self, campaign: str) -> int:
        """Count the judgements of a campaign, without practice pairs and answers that were taken back."""
        return sum(judgement.kind is not Kind.TRAINING for judgement in self.judgements(campaign))

    def judgements(
        self,
        campaign: str | None = None,
        annotators: Sequence[str] = (),
        include_undone: bool = False,
        labels_from: str = PEOPLE,
    ) -> Iterator[JudgementRow]:
        """Yield judgements in order of receipt.

        Args:
            campaign: name of the campaign; None: all campaigns.
            annotators: names of the annotators; empty: all annotators.
            include_undone: True yields judgements that were taken back as well.
            labels_from: "people", "judges" or "all"; by default the answers of judges are not yielded.
        """
        return judgements.read_judgements(self.database, campaign, annotators, include_undone, labels_from)

    # --- caches of names, which never change, and of plans

    def _name(self, annotator_id: int) -> str:
        """Return the name of an annotator.

        Raises:
            LookupError: there is no annotator with this id.
        """
        if annotator_id not in self._names:
            # Only an annotator who was added after the last query is missing.
            self._names.update({annotator.id: annotator.name for annotator in self.annotators()})
        if annotator_id not in self._names:
            raise LookupError(f"store: there is no annotator with the id {annotator_id}. Log in again.")
        return self._names[annotator_id]

    def plan(self, campaign_id: int) -> Plan:
        """Return the plan of a campaign, which the first call loads. It is loaded again after pairs were
        appended.

        Raises:
            LookupError: there is no campaign with this id.
        """
        plan = self._plans.get(campaign_id)
        has_changed = False
        # Only a campaign that still lacks pairs can have changed.
        if plan is not None and plan.missing_count:
            with self.database.read() as connection:
                has_changed = campaigns.next_position(connection, campaign_id) != len(plan.pairs)
        if plan is None or has_changed:
            with self.database.read() as connection:
                # If two threads load the same plan at once, their results are equal, so no lock is needed.
                plan = self._plans[campaign_id] = campaigns.load_plan(connection, campaign_id)
        return plan


def _pair_failure_test(failure_test: Callable[[str], bool] | None) -> Callable[[StoredPair], bool]:
    """Return a test of a pair: True if one of its two shapes has failed.

    Args:
        failure_test: test of the asset token of a shape; None: no shape has failed.
    """
    if failure_test is None:
        return lambda pair: False
    return lambda pair: failure_test(pair.first) or failure_test(pair.second)


def secret_hash(secret: str) -> str:
    """Return the SHA-256 of a token or session id as hexadecimal digits.

    A slow hash protects passwords that people choose. These secrets have at least 192 random bits, so a fast
    hash is sufficient.
    """
    # Cookies and headers may contain lone surrogates, which UTF-8 cannot encode.
    return hashlib.sha256(secret.encode("utf-8", "backslashreplace")).hexdigest()


def find(connection: Connection, name: str) -> StoredAnnotator | None:
    """Return the annotator of a name, or None if there is none."""
    return _first(connection, ANNOTATOR_COLUMNS.where(annotators.c.name == name))


def _with_token(connection: Connection, name: str) -> StoredAnnotator:
    """Return the annotator of a name who can have a token.

    Raises:
        ValueError: there is no annotator of this name, or the name is LOCAL.
    """
    annotator = find(connection, name)
    # A judge answers through a command, and must never log in to the page of people.
    if annotator is None or name == LOCAL or annotator.role == JUDGE:
        raise ValueError(
            f"annotator: there is no annotator {name!r} who logs in with a token. The command `annotators`"
            " lists all names; use one of them."
        )
    return annotator


def find_or_add(connection: Connection, name: str, role: str, now: float) -> StoredAnnotator:
    """Return the annotator of a name, who is added without a token if there is none.

    Args:
        connection: connection with a write transaction that has the lock (Lock.SCHEMA, 2).
        name: name of the annotator.
        role: role of an annotator who is added.
        now: time at which the annotator is added, seconds since 1970.
    """
    annotator_values = {"name": name, "role": role, "created": now}
    # The lock of the caller prevents two processes from adding the same name.
    return find(connection, name) or StoredAnnotator(
        **connection.execute(
            insert(annotators).returning(*ANNOTATOR_COLUMNS.selected_columns), annotator_values
        )
        .one()
        ._mapping
    )


def _first(connection: Connection, annotator_query: Select) -> StoredAnnotator | None:
    """Return the first row of a query as an annotator, or None."""
    annotator_row = connection.execute(annotator_query).first()
    return None if annotator_row is None else StoredAnnotator(**annotator_row._mapping)


# ---- names of annotators that people can distinguish


def check_name(name: str, used_names: Iterable[str]) -> None:
    """Check that a new name can be distinguished from the names in use.

    Names are too similar if they differ only in capitals, spaces or the form of their characters (Unicode's
    NFKC). Only new names are checked, so a database that contains similar names remains usable.

    Args:
        name: new name.
        used_names: names in use.

    Raises:
        ValueError: the name equals a name in use, or is too similar to it.
    """
    for used_name in used_names:
        # Equal names get their own message, which is easier to understand.
        if used_name == name:
            raise ValueError(f"annotator: the name {name!r} is in use. Choose another name.")
        if _canonical(name) == _canonical(used_name):
            raise ValueError(
                f"annotator: the name {name!r} is too similar to {used_name!r}, which is in use. Choose"
                " another name."
            )


def _canonical(name: str) -> str:
    """Return the form of a name in which names that are too similar are equal."""
    # casefold() can give characters that are not in NFKC form, so the normalisation is applied again.
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", " ".join(name.split())).casefold())
