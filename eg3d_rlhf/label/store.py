"""The store of the labelling application: campaigns, annotators, assignments and append-only judgements in SQLite or PostgreSQL."""

import time
from collections.abc import Callable, Iterator, Sequence

from eg3d_rlhf.label import campaigns, judgements
from eg3d_rlhf.label.accounts import Accounts
from eg3d_rlhf.label.assignments import FreePairs, Issuer, read_progress
from eg3d_rlhf.label.campaigns import Plan
from eg3d_rlhf.label.database import Database, Lock
from eg3d_rlhf.label.entities import (
    Answer,
    AssignedPair,
    CampaignSettings,
    JudgementRow,
    PlannedPair,
    Progress,
    Shape,
    StoredCampaign,
    Submitted,
)
from eg3d_rlhf.label.schema import migrate


class Store(Accounts):
    """Thread-safe; several processes may use one database. Whatever a method has returned from writing is on the disk.

    Imports and exports read and write the tables themselves, through `database`; `clock` gives seconds since 1970.
    """

    def __init__(self, database: Database, clock: Callable[[], float] = time.time):
        super().__init__(database, clock)
        self._plans: dict[int, Plan] = {}  # a campaign never changes
        self._free_pairs = FreePairs()
        self._names: dict[int, str] = {}

    @classmethod
    def open(cls, url: str, create: bool = True, clock: Callable[[], float] = time.time) -> "Store":
        """Open 'sqlite:///labels.db' or 'postgresql://user@host/database', made if it is new and `create`, migrated if it is older.

        Raises: ValueError for what is no store's URL or no store; OSError for what cannot be opened.
        """
        database = Database(url, create)
        try:
            migrate(database, create)
        except BaseException:
            database.close()
            raise
        return cls(database, clock)

    def close(self) -> None:
        """Close all connections."""
        self.database.close()

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    # --- campaigns

    def create_campaign(self, settings: CampaignSettings, pairs: Sequence[PlannedPair]) -> int:
        """Store a plan; returns the campaign's id. Raises: ValueError as `campaigns.create`."""
        with self.database.write((Lock.SCHEMA, 1)) as c:
            return campaigns.create(c, settings, pairs, self.clock())[0]

    def campaign(self, name: str | None = None) -> StoredCampaign | None:
        """The campaign of that name, or the newest."""
        with self.database.read() as c:
            found = campaigns.listed(c, name)
        return found[-1] if found else None

    def campaigns(self) -> list[StoredCampaign]:
        """All, oldest first."""
        with self.database.read() as c:
            return campaigns.listed(c)

    def shape_of_asset(self, campaign_id: int, asset: str) -> Shape | None:
        """What an asset token stands for."""
        return self._plan(campaign_id).shapes.get(asset)

    def shapes(self, campaign_id: int) -> list[tuple[str, Shape]]:
        """Asset tokens and shapes, each once, in order of the plan."""
        return list(self._plan(campaign_id).shapes.items())

    # --- work

    def assignments(
        self, campaign_id: int, annotator_id: int, count: int = 3, ready: Callable[[str], bool] | None = None
    ) -> list[AssignedPair]:
        """Up to `count` open assignments, an undone one first, then the oldest; new ones are issued until there are so many.

        `ready(asset)`: issue only pairs both of whose shapes are prepared. Fewer or none when the annotator is done or must wait.
        """
        prepared = (lambda pair: ready(pair.first) and ready(pair.second)) if ready else (lambda pair: True)
        return self._issuer(campaign_id, annotator_id).assignments(count, prepared)

    def submit(self, campaign_id: int, annotator_id: int, answer: Answer) -> Submitted:
        """Record an answer. A key that was used before changes nothing and gives the first result.

        Raises: ValueError for answers that cannot be stored; LookupError for an assignment that is not this annotator's;
        ConflictError when it is answered already, or the key was an undo's.
        """
        judgements.check_answer(answer)
        plan = self._plan(campaign_id)
        with self.database.write((Lock.ANNOTATOR, annotator_id)) as c:
            return judgements.submit(c, plan, annotator_id, answer, self.clock())

    def undo(self, campaign_id: int, annotator_id: int, key: str, assignment: str | None = None) -> str | None:
        """Take back the annotator's last counting answer, or that of `assignment`, with a further record; idempotent by key.

        Returns the token of the assignment that is open again, None if there was nothing to take back.
        Raises: LookupError for a foreign assignment; ConflictError when the key was an answer's; ValueError for an unfit key.
        """
        judgements.check_text("key", key)
        with self.database.write((Lock.ANNOTATOR, annotator_id)) as c:
            return judgements.undo(c, campaign_id, annotator_id, key, assignment, self.clock())

    def progress(self, campaign_id: int, annotator_id: int) -> Progress:
        """How far the annotator is."""
        plan = self._plan(campaign_id)
        with self.database.read() as c:
            return read_progress(c, plan, annotator_id, self.clock(), self._free_pairs)

    def judgements(
        self, campaign: str | None = None, annotators: Sequence[str] = (), include_undone: bool = False
    ) -> Iterator[JudgementRow]:
        """Choices in order of receipt."""
        return judgements.read_judgements(self.database, campaign, annotators, include_undone)

    # --- what does not change

    def _plan(self, campaign_id: int) -> Plan:
        plan = self._plans.get(campaign_id)
        if plan is None:
            with self.database.read() as c:
                plan = self._plans[campaign_id] = campaigns.load_plan(c, campaign_id)
        return plan

    def _issuer(self, campaign_id: int, annotator_id: int) -> Issuer:
        if annotator_id not in self._names:
            self._names.update({known.id: known.name for known in self.annotators()})
        if annotator_id not in self._names:
            raise LookupError(f"store: expected an annotator, got the unknown id {annotator_id}.")
        return Issuer(self.database, self._plan(campaign_id), annotator_id, self._names[annotator_id], self.clock)
