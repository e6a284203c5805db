"""Selection of the pair that an annotator is shown next, and computation of the annotator's progress.

The selection depends on a hash of the campaign's seed, the annotator's name and the number of the trial, so
it can be repeated. Practice pairs come first. The annotator waits until their shapes are prepared, unless a
shape can never be prepared. After them come the trials. A timetable states which trials are gold checks,
repeats, and repeats on swapped sides. Every other trial shows a new pair from a window: the first WINDOW
pairs of the plan that are still open for this annotator. So the order of the plan is kept approximately:
prepared and informative pairs come first, and annotators answer the same pairs. The order within the window
differs between annotators.

A pair has one slot for each annotator who shall answer it (column `places`; `taken` counts the slots in use).
One conditional update takes a slot, and the database rejects more slots than a pair has. An assignment has a
lease, which is renewed while the annotator's page requests assignments. After LEASE_SECONDS without a
request, the assignment is released: its slot can be taken by other annotators. When the annotator returns,
the slot is taken again if it is still free. An answer that arrives after the release is stored like any other
answer.
"""

import hashlib
import math
import random
import secrets
import threading
from array import array
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from sqlalchemy import Connection, Row, and_, bindparam, func, insert, not_, or_, select, update

from eg3d_rlhf.people.label.campaigns import Plan, StoredPair
from eg3d_rlhf.people.label.database import Database, Lock, assignments, judgements, pairs
from eg3d_rlhf.people.label.entities import AssignedPair, CampaignSettings, Choice, Kind, Progress

WINDOW = 64  # number of open pairs from which the next pair is chosen
LEASE_SECONDS = 30 * 60  # time without a request after which an unanswered assignment is released
RENEW_SECONDS = 60  # smallest age of a lease that is renewed; renewing younger leases would only cost writes
RELEASE_AT_ONCE = 500  # largest number of assignments that one write transaction releases
KINDS = (Kind.PAIR, Kind.REPEAT, Kind.SWAP, Kind.GOLD)  # a timetable stores indices into this tuple
# Test of a pair. A `readiness_test` returns True if both shapes are prepared, and a `failure_test` if one of
# them can never be prepared.
PairTest = Callable[[StoredPair], bool]
PAIR = Kind.PAIR.value
TRAINING = Kind.TRAINING.value

# These statements are built once, because building a statement takes longer than running it.
# Condition: assignments of one annotator in one campaign.
MINE = and_(
    assignments.c.campaign_id == bindparam("campaign"), assignments.c.annotator_id == bindparam("annotator")
)
# Condition: assignments that wait for an answer, see `_is_open`.
OPEN = and_(
    assignments.c.answered.is_(None), or_(assignments.c.released.is_(None), assignments.c.undone.is_not(None))
)
# columns that `Issuer` reads of an assignment
_NAMES = ("id", "token", "pair_id", "sequence", "kind", "first_is_left", "leased", "released")
ASSIGNMENT_COLUMNS = [assignments.c[name] for name in (*_NAMES, "answered", "undone")]
# Condition: pairs of the plan that have a free slot.
WITH_FREE_SLOT = and_(
    pairs.c.campaign_id == bindparam("campaign"), pairs.c.kind == PAIR, pairs.c.taken < pairs.c.places
)
# Condition: pairs that were assigned to the annotator.
ASSIGNED_BEFORE = (
    select(assignments.c.id)
    .where(
        assignments.c.annotator_id == bindparam("annotator"),
        assignments.c.pair_id == pairs.c.id,
        assignments.c.kind == PAIR,
    )
    .exists()
)
OPEN_ASSIGNMENTS = select(*ASSIGNMENT_COLUMNS).where(MINE, OPEN)
# All assignments of an annotator, with the choice that counts, or null if there is none.
PAST = (
    select(*ASSIGNMENT_COLUMNS, judgements.c.choice)
    .outerjoin_from(assignments, judgements, judgements.c.id == assignments.c.answered)
    .where(MINE)
    .order_by(assignments.c.sequence)
)
# Numbers that change when an assignment of the annotator is added, answered, undone or released.
STAMP = select(
    func.count(),
    func.count(assignments.c.answered),
    func.count(assignments.c.released),
    func.count(assignments.c.undone),
    func.max(assignments.c.answered),
    func.max(assignments.c.undone),
).where(MINE)
# The next pairs of the plan with a free slot that were not assigned to the annotator, in order of the plan.
PAGE = select(pairs.c.id, pairs.c.position).where(
    WITH_FREE_SLOT, not_(ASSIGNED_BEFORE), pairs.c.position > bindparam("after")
)
PAGE = PAGE.order_by(pairs.c.position).limit(2 * WINDOW)
# Unanswered assignments of other annotators whose lease has expired.
EXPIRED = (
    select(assignments.c.id, assignments.c.pair_id)
    .where(
        assignments.c.campaign_id == bindparam("campaign"),
        assignments.c.annotator_id != bindparam("annotator"),
        assignments.c.kind == PAIR,
        assignments.c.answered.is_(None),
        assignments.c.released.is_(None),
        assignments.c.leased < bindparam("before"),
    )
    .limit(RELEASE_AT_ONCE)
)
# Takes a slot of a pair if one is free. The condition and the update are one statement, so that two processes
# cannot take the same slot.
TAKE = (
    update(pairs)
    .where(pairs.c.id == bindparam("pair"), pairs.c.taken < pairs.c.places)
    .values(taken=pairs.c.taken + 1)
)
INSERT = insert(assignments)
GIVE_BACK = update(pairs).where(pairs.c.id == bindparam("pair")).values(taken=pairs.c.taken - 1)
RENEW = (
    update(assignments)
    .where(MINE, OPEN, assignments.c.leased < bindparam("before"))
    .values(leased=bindparam("now"))
)
# Numbers of answered and of shown assignments of the annotator, by kind.
COUNTS = select(
    assignments.c.kind, func.count(assignments.c.answered).label("answered"), func.count().label("shown")
)
COUNTS = COUNTS.where(MINE, assignments.c.answered.is_not(None) | OPEN).group_by(assignments.c.kind)
# Number of pairs with a free slot, and number of those that were assigned to the annotator before.
FREE = select(func.count()).select_from(pairs).where(WITH_FREE_SLOT)
FREE_ASSIGNED_BEFORE = (
    select(func.count())
    .select_from(assignments.join(pairs, pairs.c.id == assignments.c.pair_id))
    .where(MINE, assignments.c.kind == PAIR, WITH_FREE_SLOT)
)
FREE_FOR_ANNOTATOR = select(pairs.c.id).where(WITH_FREE_SLOT, not_(ASSIGNED_BEFORE))


class Timetable:
    """Plan that states for each trial of an annotator whether it is a new pair, a repeat or a gold check.

    The position of a trial is counted from 0, without practice pairs. The kinds of all trials are decided in
    advance, so that the number of trials can be computed. They look random: every block of `gold_every`
    trials has one gold check at a random position. A trial is a repeat if there were fewer repeats so far
    than `repeat_share` of the trials, by more than a random threshold, and if a pair from more than
    `repeat_gap` trials ago has not been repeated. The same rule, with `swap_share`, decides which trials are
    repeats on swapped sides.

    If a planned repeat or gold check cannot be shown (all pairs that could be repeated were skipped, or no
    gold pair is prepared), a new pair is shown in its place, and the kinds of all other positions stay as
    they are.

    Args:
        seed: seed of the campaign.
        annotator: name of the annotator.
        repeat_share: share of repeats among the trials, 0..0.5.
        swap_share: share of repeats on swapped sides among the trials, 0..0.5.
        repeat_gap: number of trials that must lie between a pair and its repeat.
        gold_every: number of trials in a block, of which one is a gold check; 0: no gold checks.
        gold_count: largest number of gold checks if every trial could be one (`gold_every` = 1).
    """

    def __init__(
        self,
        seed: int,
        annotator: str,
        repeat_share: float,
        swap_share: float,
        repeat_gap: int,
        gold_every: int,
        gold_count: int,
    ):
        self._shares = ((1, repeat_share), (2, swap_share))  # (index into KINDS, share)
        self._gap = repeat_gap
        self._every = gold_every
        self._gold_count = gold_count
        # Each kind has its own random stream, so that its positions do not depend on the other kinds.
        self._random = [random.Random(f"{seed}\x1f{annotator}\x1f{kind.value}") for kind in KINDS]
        # Both arrays are extended when a position beyond their end is needed.
        self._kinds = array("B")  # index into KINDS, by position
        self._new_positions = array("L")  # positions of the new pairs, ascending
        self._counts = [0, 0, 0, 0]  # number of positions of each kind so far, in the order of KINDS
        self._repeatable = 0  # number of new pairs that lie far enough back to be repeated
        self._gold_position = 0  # position of the gold check in the current block
        self._lock = threading.Lock()

    def kind(self, position: int) -> Kind:
        """Return the kind of the trial at a position."""
        with self._lock:
            while len(self._kinds) <= position:
                self._add()
            return KINDS[self._kinds[position]]

    def end(self, position: int, new_count: int) -> int:
        """Return the total number of trials if `new_count` >= 1 further new pairs are shown.

        Args:
            position: number of trials that have been shown.
            new_count: number of new pairs that are shown from this position on.
        """
        with self._lock:
            while len(self._kinds) < position:
                self._add()
            # index of the last new pair: bisect_left counts the new pairs before `position`
            last_index = bisect_left(self._new_positions, position) + new_count - 1
            while len(self._new_positions) <= last_index:
                self._add()
            return self._new_positions[last_index] + 1

    def _add(self) -> None:
        """Append the kind of the next position."""
        position = len(self._kinds)
        kind_index = self._next(position)
        self._kinds.append(kind_index)
        self._counts[kind_index] += 1
        if kind_index == 0:  # a new pair
            self._new_positions.append(position)

    def _next(self, position: int) -> int:
        """Choose the kind of the trial at a position, as an index into KINDS."""
        # At the start of a block, the position of its gold check is drawn from the stream of gold checks (3).
        if self._every and position % self._every == 0:
            self._gold_position = position + int(self._random[3].random() * self._every)
        # At most one new pair is added per position, so one comparison per position is enough.
        if (
            self._repeatable < len(self._new_positions)
            and self._new_positions[self._repeatable] < position - self._gap
        ):
            self._repeatable += 1
        # The thresholds are drawn at every position, also where they are not used. Otherwise later numbers of
        # a stream would depend on the other kinds.
        thresholds = [self._random[kind_index].random() for kind_index, _ in self._shares]
        # If every trial could be a gold check, their number is limited to the number of gold pairs.
        if (
            self._every
            and position == self._gold_position
            and (self._every > 1 or self._counts[3] < self._gold_count)
        ):
            return 3
        for (kind_index, share), threshold in zip(self._shares, thresholds, strict=True):
            # trials of this kind below its share so far
            deficit = share * (position + 1) - self._counts[kind_index]
            # every pair is repeated or swapped at most once
            repeated_count = self._counts[1] + self._counts[2]
            if deficit > threshold and repeated_count < self._repeatable:
                return kind_index
        return 0


@lru_cache(maxsize=1000)
def _timetable(*arguments) -> Timetable:
    """Return the `Timetable` with these arguments. Equal arguments give the same object."""
    # The cache keeps the positions that were computed, since a timetable is extended in place.
    return Timetable(*arguments)


def timetable(campaign_settings: CampaignSettings, annotator: str, gold_count: int) -> Timetable:
    """Return the timetable of an annotator.

    Args:
        campaign_settings: settings of the campaign.
        annotator: name of the annotator.
        gold_count: number of gold pairs that can be shown.
    """
    gold_every = campaign_settings.gold_every if gold_count else 0
    # The number of gold pairs has an influence only if every trial is a gold check, because gold pairs are
    # shown again otherwise. Replacing it by 0 then keeps the cache small.
    gold_count = gold_count if gold_every == 1 else 0
    return _timetable(
        campaign_settings.seed,
        annotator,
        campaign_settings.repeat_share,
        campaign_settings.swap_share,
        campaign_settings.repeat_gap,
        gold_every,
        gold_count,
    )


@dataclass(frozen=True, kw_only=True)
class Trial:
    """Assignment that an annotator has, or that is about to be made."""

    pair: StoredPair
    sequence: int  # number of the assignment among the annotator's assignments, from 1
    kind: Kind
    first_is_left: bool
    choice: str | None = None  # choice that counts; None: not answered


@dataclass
class Scheduler:
    """Selection of an annotator's next assignment, which depends on the earlier assignments."""

    plan: Plan
    annotator: str  # name of the annotator
    history: list[Trial]  # earlier assignments, in order of `sequence`
    last_sequence: int  # largest sequence number that was ever used; 0: none
    readiness_test: PairTest
    failure_test: PairTest = lambda pair: False

    def __post_init__(self):
        self.settings = self.plan.campaign.settings

    def uniform(self, *key_parts) -> float:
        """Return a pseudo-random number in [0, 1), a hash of the seed, the annotator and `key_parts`."""
        # A random generator has a state. A hash has none, so the number can be computed again in any order
        # and process. 7 bytes are 56 bits, more than the 53 bits of a float's mantissa.
        hash_input = "\x1f".join(str(part) for part in (self.settings.seed, self.annotator, *key_parts))
        return int.from_bytes(hashlib.sha256(hash_input.encode()).digest()[:7], "big") / 2**56

    def next(self, window: Sequence[StoredPair]) -> Trial | None:
        """Return the next assignment, or None if the annotator is finished or must wait.

        Args:
            window: prepared pairs with a free slot that were not assigned to this annotator.
        """
        sequence = self.last_sequence + 1
        trials = [trial for trial in self.history if trial.kind is not Kind.TRAINING]
        # Practice pairs come before the first trial only. Later the annotator does not need them any more.
        if not trials:
            assigned_ids = {trial.pair.id for trial in self.history}
            practice_pairs = (
                pair
                for pair in self.plan.training
                if pair.id not in assigned_ids and not self.failure_test(pair)
            )
            practice_pair = next(practice_pairs, None)
            if practice_pair is not None:
                # the annotator waits for a practice pair that is not prepared yet
                if not self.readiness_test(practice_pair):
                    return None
                return self._on_random_sides(practice_pair, sequence, Kind.TRAINING)
        max_trials = self.settings.trials_per_annotator
        # If no new pair is left, there are no further repeats or gold checks either.
        if not window or (max_trials is not None and len(trials) >= max_trials):
            return None
        gold_count = count_gold_pairs(self.plan, self.failure_test)
        trial_kind = timetable(self.settings, self.annotator, gold_count).kind(len(trials))
        trial = None
        if trial_kind is Kind.GOLD:
            trial = self._gold(trials, sequence)
        elif trial_kind is not Kind.PAIR:
            trial = self._repeat(trial_kind, trials, sequence)
        if trial is not None:
            return trial
        # A new pair, also in place of a repeat or gold check that cannot be shown. The pair with the smallest
        # hash is chosen, which gives every annotator another order.
        new_pair = min(window, key=lambda pair: self.uniform("order", pair.position))
        return self._on_random_sides(new_pair, sequence, Kind.PAIR)

    def _on_random_sides(self, pair: StoredPair, sequence: int, trial_kind: Kind) -> Trial:
        """Make a trial whose first shape is on the left with probability one half."""
        return Trial(
            pair=pair, sequence=sequence, kind=trial_kind, first_is_left=self.uniform(sequence, "side") < 0.5
        )

    def _gold(self, trials: list[Trial], sequence: int) -> Trial | None:
        """Choose a prepared gold pair that the annotator has been shown least often.

        Returns None if no gold pair is prepared, or if every trial is a gold check and all have been shown.
        """
        shown_ids = [trial.pair.id for trial in trials if trial.kind is Kind.GOLD]
        ready_pairs = [
            pair
            for pair in self.plan.gold
            if self.readiness_test(pair) and (self.settings.gold_every > 1 or pair.id not in shown_ids)
        ]
        if not ready_pairs:
            return None
        # Among pairs that were shown equally often a hash decides, so that the order differs between
        # annotators.
        gold_pair = min(
            ready_pairs,
            key=lambda pair: (shown_ids.count(pair.id), self.uniform("which gold", pair.position)),
        )
        return self._on_random_sides(gold_pair, sequence, Kind.GOLD)

    def _repeat(self, repeat_kind: Kind, trials: list[Trial], sequence: int) -> Trial | None:
        """Choose a pair that the annotator answered more than `repeat_gap` trials ago, and show it again.

        Every pair is repeated at most once. Returns None if no pair can be repeated.
        """
        repeated_ids = {trial.pair.id for trial in trials if trial.kind in (Kind.REPEAT, Kind.SWAP)}
        # A skipped pair has no answer with which the answer to a repeat could be compared.
        answered_trials = [
            trial
            for trial in trials
            if trial.kind is Kind.PAIR
            and trial.choice not in (None, Choice.SKIP)
            and trial.pair.id not in repeated_ids
        ]
        repeatable_trials = [
            trial
            for trial in answered_trials
            if trial.sequence < sequence - self.settings.repeat_gap and self.readiness_test(trial.pair)
        ]
        if not repeatable_trials:
            return None
        trial_index = int(self.uniform(sequence, "which") * len(repeatable_trials))
        earlier_trial = repeatable_trials[trial_index]
        return Trial(
            pair=earlier_trial.pair,
            sequence=sequence,
            kind=repeat_kind,
            # "!=" negates the sides for a swap, and keeps them for a repeat
            first_is_left=earlier_trial.first_is_left != (repeat_kind is Kind.SWAP),
        )


@dataclass(frozen=True, kw_only=True)
class _AssignmentState:
    """Assignments of one annotator, as they were read from the database to choose the next ones."""

    stamp: tuple  # result of STAMP, which changes whenever this state changes
    scheduler: Scheduler
    open_count: int  # number of open assignments
    # assignments that were released without an answer; their slots are free for all annotators
    released_rows: list[Row]


@dataclass
class Issuer:
    """Assignment of the pairs of one campaign to one annotator."""

    database: Database
    plan: Plan
    annotator_id: int
    annotator: str  # name of the annotator
    clock: Callable[[], float]  # returns the time in seconds since 1970
    failure_test: PairTest = lambda pair: False

    def __post_init__(self):
        self.campaign_id = self.plan.campaign.id
        # values of the parameters that all statements above have
        self.parameters = {"campaign": self.campaign_id, "annotator": self.annotator_id}

    def assignments(self, needed_count: int, readiness_test: PairTest) -> list[AssignedPair]:
        """Return up to `needed_count` open assignments, and make new ones if there are fewer.

        Args:
            needed_count: number of assignments that the page needs.
            readiness_test: function that returns True for a pair whose shapes are both prepared.
        """
        with self.database.read() as connection:
            open_rows = list(connection.execute(OPEN_ASSIGNMENTS, self.parameters))
            must_renew = any(row.leased < self.clock() - RENEW_SECONDS for row in open_rows)
            has_too_few = len(open_rows) < needed_count
            window = self.window(connection, readiness_test) if has_too_few else []
        # Expired leases of other annotators are released only when new pairs run out, which saves writes.
        if has_too_few and len(window) < needed_count and self.release_expired():
            with self.database.read() as connection:
                window = self.window(connection, readiness_test)
        if must_renew or has_too_few:
            assignment_state = self._read_state(readiness_test)
            # Most requests have nothing to write. They are answered without waiting for the lock.
            if (
                must_renew
                or assignment_state.released_rows
                or assignment_state.scheduler.next(window) is not None
            ):
                with self.database.write(
                    (Lock.ANNOTATOR, self.annotator_id), (Lock.CAMPAIGN, self.campaign_id)
                ) as connection:
                    # Another request of this annotator may have written before the lock was taken. The state
                    # is then read again.
                    if tuple(connection.execute(STAMP, self.parameters).one()) != assignment_state.stamp:
                        assignment_state = self._read_state(readiness_test, connection)
                    self._issue(connection, needed_count, window, assignment_state)
                    open_rows = list(connection.execute(OPEN_ASSIGNMENTS, self.parameters))
        # The assignment whose answer was undone last comes first. All others follow in order of their number.
        ordered_rows = sorted(open_rows, key=lambda row: (-(row.undone or 0), row.sequence))
        assigned_pairs = []
        for row in ordered_rows[:needed_count]:
            pair = self.plan.pairs[row.pair_id]
            left_token, right_token = (
                (pair.first, pair.second) if row.first_is_left else (pair.second, pair.first)
            )
            assigned_pairs.append(
                AssignedPair(
                    token=row.token, left=left_token, right=right_token, training=row.kind == Kind.TRAINING
                )
            )
        return assigned_pairs

    def window(self, connection: Connection, readiness_test: PairTest) -> list[StoredPair]:
        """Read the first WINDOW pairs of the plan that can be assigned to this annotator now.

        These are the pairs that have a free slot, were not assigned to the annotator, and are prepared.
        """
        window: list[StoredPair] = []
        last_position = -1
        # Pairs are read in pages, which are larger than the window because some pairs are not prepared.
        while len(window) < WINDOW:
            page_rows = list(connection.execute(PAGE, {**self.parameters, "after": last_position}))
            candidate_pairs = [self.plan.pairs[row.id] for row in page_rows]
            window += [pair for pair in candidate_pairs if readiness_test(pair)]
            # a page that is not full is the last one
            if len(page_rows) < 2 * WINDOW:
                break
            last_position = page_rows[-1].position
        return window[:WINDOW]

    def _issue(
        self,
        connection: Connection,
        needed_count: int,
        window: list[StoredPair],
        assignment_state: "_AssignmentState",
    ) -> None:
        """Renew leases, take released slots again, and make assignments until `needed_count` are open.

        The window was read before the lock was taken. If another annotator has taken the last slot of one of
        its pairs in the meantime, the window is read again, but only once. Trying its pairs one by one would
        need a statement for each of them, and every other annotator would wait for the lock.

        Args:
            connection: connection with an open write transaction.
            needed_count: number of open assignments that the page needs.
            window: pairs that can be assigned, see `window`.
            assignment_state: state of the annotator's assignments.
        """
        now = self.clock()
        if assignment_state.open_count:
            connection.execute(RENEW, {**self.parameters, "now": now, "before": now - RENEW_SECONDS})
        # Slots of released assignments are taken again if they are still free.
        regained_ids = [
            row.id for row in assignment_state.released_rows if take_slot(connection, row.pair_id)
        ]
        if regained_ids:
            connection.execute(
                update(assignments)
                .where(assignments.c.id.in_(regained_ids))
                .values(released=None, leased=now)
            )
            assignment_state = self._read_state(assignment_state.scheduler.readiness_test, connection)
        scheduler = assignment_state.scheduler
        missing_count = needed_count - assignment_state.open_count
        was_reread = False  # True when the window was read under the lock
        while missing_count > 0 and (trial := scheduler.next(window)):
            if trial.kind is Kind.PAIR:
                if not take_slot(connection, trial.pair.id):
                    window = (
                        [pair for pair in window if pair is not trial.pair]
                        if was_reread
                        else self.window(connection, scheduler.readiness_test)
                    )
                    was_reread = True
                    continue
                window = [pair for pair in window if pair is not trial.pair]
            connection.execute(
                INSERT,
                {
                    "token": secrets.token_urlsafe(18),  # 144 random bits: it cannot be guessed
                    "campaign_id": self.campaign_id,
                    "annotator_id": self.annotator_id,
                    "pair_id": trial.pair.id,
                    "sequence": trial.sequence,
                    "kind": trial.kind.value,
                    "first_is_left": int(trial.first_is_left),
                    "leased": self.clock(),
                },
            )
            scheduler.history.append(trial)
            scheduler.last_sequence = trial.sequence
            missing_count -= 1

    def _read_state(
        self, readiness_test: PairTest, connection: Connection | None = None
    ) -> "_AssignmentState":
        """Read the state that determines the next assignments of the annotator.

        Args:
            readiness_test: function that returns True for a pair whose shapes are both prepared.
            connection: connection to read from; None: a new one.
        """
        if connection is None:
            with self.database.read() as connection:
                return self._read_state(readiness_test, connection)
        # The stamp is read before the rows. If the rows change between both statements, the stamp is
        # outdated, and a later comparison with a new stamp notices it.
        stamp = tuple(connection.execute(STAMP, self.parameters).one())
        assignment_rows = list(connection.execute(PAST, self.parameters))
        history = [
            Trial(
                pair=self.plan.pairs[assignment_row.pair_id],
                sequence=assignment_row.sequence,
                kind=Kind(assignment_row.kind),
                first_is_left=bool(assignment_row.first_is_left),
                choice=assignment_row.choice,
            )
            for assignment_row in assignment_rows
            if assignment_row.answered is not None or _is_open(assignment_row)
        ]
        # Sequence numbers of released assignments are not used again, so the last row decides and not the
        # history.
        last_sequence = assignment_rows[-1].sequence if assignment_rows else 0
        scheduler = Scheduler(
            self.plan, self.annotator, history, last_sequence, readiness_test, self.failure_test
        )
        released_rows = [
            assignment_row
            for assignment_row in assignment_rows
            if assignment_row.answered is None and not _is_open(assignment_row)
        ]
        return _AssignmentState(
            stamp=stamp,
            scheduler=scheduler,
            open_count=sum(_is_open(assignment_row) for assignment_row in assignment_rows),
            # All writers update the rows of `pairs` in the same order, which avoids deadlocks.
            released_rows=sorted(released_rows, key=lambda assignment_row: assignment_row.pair_id),
        )

    def release_expired(self) -> int:
        """Release the assignments of other annotators whose lease is older than LEASE_SECONDS.

        At most RELEASE_AT_ONCE assignments are released. Returns their number.
        """
        now = self.clock()
        expiry_parameters = {**self.parameters, "before": now - LEASE_SECONDS}
        # Most of the time no lease has expired, and this first query needs no lock.
        with self.database.read() as connection:
            if connection.execute(EXPIRED, expiry_parameters).first() is None:
                return 0
        with self.database.write((Lock.CAMPAIGN, self.campaign_id)) as connection:
            # skip_locked: an assignment that is being answered at this moment is not released.
            expired_rows = list(
                connection.execute(
                    EXPIRED.with_for_update(skip_locked=True, key_share=True), expiry_parameters
                )
            )
            for expired_row in expired_rows:
                connection.execute(
                    update(assignments)
                    .where(assignments.c.id == expired_row.id)
                    .values(released=now, undone=None)
                )
                connection.execute(GIVE_BACK, {"pair": expired_row.pair_id})
        return len(expired_rows)


def _is_open(assignment_row: Row) -> bool:
    """Return True if an assignment waits for an answer.

    It has no answer that counts, and it was not released, or its answer was undone after the release.
    """
    return assignment_row.answered is None and (
        assignment_row.released is None or assignment_row.undone is not None
    )


def take_slot(connection: Connection, pair_id: int) -> bool:
    """Take a slot of a pair for an annotator. Returns False if no slot was free."""
    return connection.execute(TAKE, {"pair": pair_id}).rowcount == 1


def count_gold_pairs(plan: Plan, failure_test: PairTest) -> int:
    """Return the number of gold pairs that can be shown, now or after their preparation.

    Args:
        plan: plan of the campaign.
        failure_test: function that returns True for a pair that can never be prepared.
    """
    return sum(not failure_test(pair) for pair in plan.gold)


class Reach:
    """Cache of the number of new pairs that an annotator can answer in total.

    This is the number of new pairs that were assigned to the annotator, plus the number of other pairs with a
    free slot whose shapes can be prepared. The annotator's own answers do not change the sum, but assignments
    of other annotators do. If few pairs are left, they are counted at every call. Otherwise the last count is
    used for one second per 1,000 pairs of the plan. Whether the plan contains a pair that can never be
    prepared is also checked again only after this time.
    """

    MANY = 500  # number of pairs left above which a slightly outdated result is used

    def __init__(self):
        # (campaign id, annotator id) -> (time of the count, result)
        self._cached_counts: dict[tuple[int, int], tuple[float, int]] = {}
        # campaign id -> (time of the check, True if some pair can never be prepared)
        self._cached_failures: dict[int, tuple[float, bool]] = {}

    def count(
        self,
        connection: Connection,
        plan: Plan,
        annotator_id: int,
        assigned_count: int,
        now: float,
        failure_test: PairTest,
    ) -> int:
        """Return the number of new pairs that the annotator can answer in total.

        Args:
            connection: connection to read from.
            plan: plan of the campaign.
            annotator_id: id of the annotator.
            assigned_count: number of new pairs that were assigned to the annotator.
            now: time in seconds since 1970.
            failure_test: function that returns True for a pair that can never be prepared.
        """
        cache_key = (plan.campaign.id, annotator_id)
        counted_at, reach_count = self._cached_counts.get(cache_key, (-math.inf, 0))
        # "0 <=" makes a result invalid that was counted before the clock was set back.
        is_recent = 0 <= now - counted_at < len(plan.pairs) / 1000
        if reach_count - assigned_count <= self.MANY or not is_recent:
            query_parameters = {"campaign": plan.campaign.id, "annotator": annotator_id}
            reach_count = assigned_count + self._free(connection, plan, query_parameters, now, failure_test)
            self._cached_counts[cache_key] = now, reach_count
        return reach_count

    def _free(
        self, connection: Connection, plan: Plan, query_parameters: dict, now: float, failure_test: PairTest
    ) -> int:
        """Count the pairs that were not assigned to the annotator, have a free slot and can be prepared."""
        checked_at, any_pair_failed = self._cached_failures.get(plan.campaign.id, (-math.inf, False))
        if not 0 <= now - checked_at < len(plan.pairs) / 1000:
            any_pair_failed = any(failure_test(pair) for pair in plan.pairs.values())
            self._cached_failures[plan.campaign.id] = now, any_pair_failed
        if any_pair_failed:
            free_rows = connection.execute(FREE_FOR_ANNOTATOR, query_parameters)
            return sum(not failure_test(plan.pairs[row.id]) for row in free_rows)
        # If no pair has failed, the rows need not be read: two counts in the database are faster.
        return (
            connection.execute(FREE, query_parameters).scalar_one()
            - connection.execute(FREE_ASSIGNED_BEFORE, query_parameters).scalar_one()
        )


def read_progress(
    connection: Connection,
    plan: Plan,
    annotator_id: int,
    annotator: str,
    now: float,
    reach: Reach,
    failure_test: PairTest = lambda pair: False,
) -> Progress:
    """Compute the progress of an annotator.

    The total number of trials changes only when other annotators take or release pairs, or when a planned
    repeat or gold check cannot be shown.

    Args:
        connection: connection to read from.
        plan: plan of the campaign.
        annotator_id: id of the annotator.
        annotator: name of the annotator.
        now: time in seconds since 1970.
        reach: cache of the number of pairs that annotators can answer.
        failure_test: function that returns True for a pair that can never be prepared. By default, no pair
            has failed.
    """
    # kind of assignments -> row with the numbers of shown and of answered assignments
    counts_by_kind = {
        row.kind: row
        for row in connection.execute(COUNTS, {"campaign": plan.campaign.id, "annotator": annotator_id})
    }
    campaign_settings = plan.campaign.settings
    # Practice pairs do not count as trials, so their row is removed from the counts.
    practice_row = counts_by_kind.pop(TRAINING, None)
    practice_shown_count = practice_row.shown if practice_row else 0
    practice_answered_count = practice_row.answered if practice_row else 0
    shown_count = sum(row.shown for row in counts_by_kind.values())
    answered_count = sum(row.answered for row in counts_by_kind.values())
    assigned_count = counts_by_kind[PAIR].shown if PAIR in counts_by_kind else 0
    new_count = (
        reach.count(connection, plan, annotator_id, assigned_count, now, failure_test) - assigned_count
    )
    # Pairs that will be appended can be answered as well.
    new_count += plan.missing_count
    total_count = shown_count
    if new_count > 0:
        gold_count = count_gold_pairs(plan, failure_test)
        total_count = timetable(campaign_settings, annotator, gold_count).end(shown_count, new_count)
    if campaign_settings.trials_per_annotator is not None:
        total_count = max(shown_count, min(total_count, campaign_settings.trials_per_annotator))
    # practice pairs that are shown but not answered yet
    practice_left_count = practice_shown_count - practice_answered_count
    # Further practice pairs are shown only before the first trial.
    if not shown_count:
        practice_count = sum(not failure_test(pair) for pair in plan.training)
        practice_left_count += max(practice_count - practice_shown_count, 0)
    return Progress(done=answered_count, total=total_count, training_left=practice_left_count)
