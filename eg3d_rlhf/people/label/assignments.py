"""Decides which pair an annotator is shown next, issues it in short transactions, and computes her progress.

The decision is a pure function of a hash of the campaign's seed, the annotator's name and the number of the
trial. Training pairs come first. They are waited for, unless their shapes can never be prepared. After them
come the trials: gold checks, repeats and swapped repeats where the annotator's timetable has them, and
otherwise a new pair from a window of the plan. Choosing within a window keeps the plan's order approximately,
so that prepared and informative pairs come first and annotators answer the same pairs. The order within the
window differs from annotator to annotator.

One conditional update takes a place of a pair, and the database rejects more places than a pair has. An
assignment keeps its place while the annotator's page asks for it (its lease). After LEASE_SECONDS without an
answer the place is given back. When the annotator returns, she gets the place again if it is still free. An
answer that arrives after the lease has expired is stored like any other.
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
from eg3d_rlhf.people.label.database import Database, Lock, pairs
from eg3d_rlhf.people.label.database import assignments as a
from eg3d_rlhf.people.label.database import judgements as j
from eg3d_rlhf.people.label.entities import AssignedPair, CampaignSettings, Choice, Kind, Progress

WINDOW = 64  # number of open pairs of the plan from which the next one is chosen
LEASE_SECONDS = 30 * 60  # without a request for so long, the place of an unanswered pair is given back
RENEW_SECONDS = 60  # younger leases are not renewed, which saves a write transaction
RELEASE_AT_ONCE = 500  # bounds the length of one write transaction
KINDS = (Kind.PAIR, Kind.REPEAT, Kind.SWAP, Kind.GOLD)  # a timetable stores the index of a kind
# A test of a pair: True if its shapes are prepared, or if they can never be.
Ready = Callable[[StoredPair], bool]
PAIR = Kind.PAIR.value
TRAINING = Kind.TRAINING.value

# These statements are built once, because building a statement takes longer than running it.
MINE = and_(a.c.campaign_id == bindparam("campaign"), a.c.annotator_id == bindparam("annotator"))
OPEN = and_(a.c.answered.is_(None), or_(a.c.released.is_(None), a.c.undone.is_not(None)))
_NAMES = ("id", "token", "pair_id", "sequence", "kind", "first_is_left", "leased", "released")
HELD = [a.c[name] for name in (*_NAMES, "answered", "undone")]
WITH_PLACES = and_(
    pairs.c.campaign_id == bindparam("campaign"), pairs.c.kind == PAIR, pairs.c.taken < pairs.c.places
)
ASSIGNED_BEFORE = (
    select(a.c.id)
    .where(a.c.annotator_id == bindparam("annotator"), a.c.pair_id == pairs.c.id, a.c.kind == PAIR)
    .exists()
)
OPEN_ASSIGNMENTS = select(*HELD).where(MINE, OPEN)
# All assignments of an annotator with the choice that counts, if there is one.
PAST = (
    select(*HELD, j.c.choice).outerjoin_from(a, j, j.c.id == a.c.answered).where(MINE).order_by(a.c.sequence)
)
# A stamp of the annotator's assignments: it changes when one is added, answered, undone or released.
STAMP = select(
    func.count(),
    func.count(a.c.answered),
    func.count(a.c.released),
    func.count(a.c.undone),
    func.max(a.c.answered),
    func.max(a.c.undone),
).where(MINE)
# The next open pairs that the annotator does not have yet, in order of the plan.
PAGE = select(pairs.c.id, pairs.c.position).where(
    WITH_PLACES, not_(ASSIGNED_BEFORE), pairs.c.position > bindparam("after")
)
PAGE = PAGE.order_by(pairs.c.position).limit(2 * WINDOW)
# Assignments of other annotators whose lease has expired.
EXPIRED = (
    select(a.c.id, a.c.pair_id)
    .where(
        a.c.campaign_id == bindparam("campaign"),
        a.c.annotator_id != bindparam("annotator"),
        a.c.kind == PAIR,
        a.c.answered.is_(None),
        a.c.released.is_(None),
        a.c.leased < bindparam("before"),
    )
    .limit(RELEASE_AT_ONCE)
)
# Takes a place of a pair, if there is one: the condition and the update are one statement.
TAKE = (
    update(pairs)
    .where(pairs.c.id == bindparam("pair"), pairs.c.taken < pairs.c.places)
    .values(taken=pairs.c.taken + 1)
)
MAKE = insert(a)
GIVE_BACK = update(pairs).where(pairs.c.id == bindparam("pair")).values(taken=pairs.c.taken - 1)
RENEW = update(a).where(MINE, OPEN, a.c.leased < bindparam("before")).values(leased=bindparam("now"))
ANSWERED = select(a.c.kind, func.count(a.c.answered).label("answered"), func.count().label("shown"))
ANSWERED = ANSWERED.where(MINE, a.c.answered.is_not(None) | OPEN).group_by(a.c.kind)
FREE = select(func.count()).select_from(pairs).where(WITH_PLACES)
FREE_ASSIGNED_BEFORE = (
    select(func.count())
    .select_from(a.join(pairs, pairs.c.id == a.c.pair_id))
    .where(MINE, a.c.kind == PAIR, WITH_PLACES)
)
FREE_FOR_ANNOTATOR = select(pairs.c.id).where(WITH_PLACES, not_(ASSIGNED_BEFORE))


class Timetable:
    """Positions of an annotator's repeats, swaps and gold checks among her trials, counted from 0 without
    training pairs. They are decided in advance, so that the number of her trials is known, and computed as
    far as needed.

    The positions look random. There is a gold check at a random position in every block of `gold_every`
    trials. A repeat or a swap comes where its share is below a random threshold and a pair from more than
    `repeat_gap` trials ago has not been repeated. If such a trial cannot be shown (all pairs that could be
    repeated were skipped, or no gold check is prepared), a new pair takes its position, and no other position
    changes.
    """

    def __init__(
        self, seed: int, annotator: str, repeat: float, swap: float, gap: int, gold_every: int, gold: int
    ):
        self._shares = ((1, repeat), (2, swap))
        self._gap = gap
        self._every = gold_every
        self._gold = gold
        # One random stream per kind: the positions of one kind do not depend on those of another.
        self._random = [random.Random(f"{seed}\x1f{annotator}\x1f{kind.value}") for kind in KINDS]
        # Both arrays grow on demand: kind by position, and positions of the new pairs.
        self._kinds = array("B")
        self._new = array("L")
        self._shown = [0, 0, 0, 0]  # number of trials of each kind so far
        self._old = 0  # number of new pairs that are old enough to be repeated
        self._check = 0  # position of this block's gold check
        self._lock = threading.Lock()

    def kind(self, place: int) -> Kind:
        """Return the kind of the trial at a position."""
        with self._lock:
            while len(self._kinds) <= place:
                self._add()
            return KINDS[self._kinds[place]]

    def end(self, place: int, new: int) -> int:
        """Return the total number of trials if `new` >= 1 new pairs are shown from a position on."""
        with self._lock:
            while len(self._kinds) < place:
                self._add()
            # The new pair that comes last: the number of new pairs before `place`, plus `new`, counted from
            # 0.
            last = bisect_left(self._new, place) + new - 1
            while len(self._new) <= last:
                self._add()
            return self._new[last] + 1

    def _add(self) -> None:
        """Append the kind of the next position."""
        place = len(self._kinds)
        kind = self._next(len(self._kinds))
        self._kinds.append(kind)
        self._shown[kind] += 1
        if kind == 0:
            self._new.append(place)

    def _next(self, place: int) -> int:
        """Choose the kind at a position: an index into KINDS."""
        if self._every and place % self._every == 0:  # a block begins: choose where its gold check comes
            self._check = place + int(self._random[3].random() * self._every)
        if self._old < len(self._new) and self._new[self._old] < place - self._gap:
            self._old += 1
        # The thresholds are drawn at every position, used or not, so that the stream does not depend on them.
        thresholds = [self._random[kind].random() for kind, _ in self._shares]
        # If every trial could be a gold check, their number is limited to the gold pairs that exist.
        if self._every and place == self._check and (self._every > 1 or self._shown[3] < self._gold):
            return 3
        for (kind, share), threshold in zip(self._shares, thresholds, strict=True):
            # The deficit of this kind so far exceeds its threshold in [0, 1), and a pair is left to repeat.
            if (
                share * (place + 1) - self._shown[kind] > threshold
                and self._shown[1] + self._shown[2] < self._old
            ):
                return kind
        return 0


@lru_cache(maxsize=1000)
def _timetable(*arguments) -> Timetable:
    # A timetable grows with its use, so the cache also keeps what was computed.
    return Timetable(*arguments)


def timetable(settings: CampaignSettings, annotator: str, gold: int) -> Timetable:
    """Return the timetable of an annotator, by name.

    Args:
        gold: number of gold pairs that can be shown.
    """
    every = settings.gold_every if gold else 0
    # Gold pairs are shown again when all have been shown, unless every trial is one. Their number matters
    # only then, and leaving it out otherwise keeps the cache small.
    gold = gold if every == 1 else 0
    return _timetable(
        settings.seed, annotator, settings.repeat_share, settings.swap_share, settings.repeat_gap, every, gold
    )


@dataclass(frozen=True, kw_only=True)
class Trial:
    """An assignment that the annotator has, or one that is about to be made."""

    pair: StoredPair
    sequence: int  # number among the annotator's assignments, from 1
    kind: Kind
    first_is_left: bool
    choice: str | None = None  # choice that counts; None: not answered


@dataclass
class Scheduler:
    """Decides what one annotator is shown next, given what she has been shown."""

    plan: Plan
    annotator: str  # name
    history: list[Trial]  # in order of `sequence`
    last: int  # highest sequence ever used
    ready: Ready
    lost: Ready = lambda pair: False  # True for a pair that can never be prepared

    def __post_init__(self):
        self.settings = self.plan.campaign.settings

    def uniform(self, *what) -> float:
        """Return a number in [0, 1) that depends only on the campaign's seed, the annotator and `what`."""
        # A hash instead of a generator with a state: the decision can be repeated in any order and process.
        # 7 bytes are 56 bits, more than the 53 bits of a float.
        text = "\x1f".join(str(part) for part in (self.settings.seed, self.annotator, *what))
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big") / 2**56

    def next(self, window: Sequence[StoredPair]) -> Trial | None:
        """Return the next assignment, or None if there is nothing to show.

        Args:
            window: open pairs that this annotator does not have yet.
        """
        sequence = self.last + 1
        trials = [s for s in self.history if s.kind is not Kind.TRAINING]
        # Training pairs come before the first trial only: a campaign does not return to them.
        if not trials:
            assigned = {s.pair.id for s in self.history}
            example = next(
                (pair for pair in self.plan.training if pair.id not in assigned and not self.lost(pair)), None
            )
            if example is not None:
                return self._on_sides(example, sequence, Kind.TRAINING) if self.ready(example) else None
        limit = self.settings.trials_per_annotator
        # Without a new pair there are no repeats or gold checks either: a campaign ends with its pairs.
        if not window or (limit is not None and len(trials) >= limit):
            return None
        kind = timetable(self.settings, self.annotator, gold_checks(self.plan, self.lost)).kind(len(trials))
        trial = None
        if kind is not Kind.PAIR:
            trial = self._gold(trials, sequence) if kind is Kind.GOLD else self._again(kind, trials, sequence)
        # A planned repeat or gold check that cannot be shown becomes a new pair.
        return trial or self._on_sides(
            min(window, key=lambda pair: self.uniform("order", pair.position)), sequence, Kind.PAIR
        )

    def _on_sides(self, pair: StoredPair, sequence: int, kind: Kind) -> Trial:
        """Make a trial whose sides are random."""
        return Trial(
            pair=pair, sequence=sequence, kind=kind, first_is_left=self.uniform(sequence, "side") < 0.5
        )

    def _gold(self, trials: list[Trial], sequence: int) -> Trial | None:
        """Choose a prepared gold pair, one that the annotator has had least often; None if there is none."""
        assigned = [s.pair.id for s in trials if s.kind is Kind.GOLD]
        ready = [
            pair
            for pair in self.plan.gold
            if self.ready(pair) and (self.settings.gold_every > 1 or pair.id not in assigned)
        ]
        if not ready:
            return None
        # Among equally frequent ones a hash decides, so that annotators get them in different orders.
        rarest = min(
            ready, key=lambda pair: (assigned.count(pair.id), self.uniform("which gold", pair.position))
        )
        return self._on_sides(rarest, sequence, Kind.GOLD)

    def _again(self, kind: Kind, trials: list[Trial], sequence: int) -> Trial | None:
        """Repeat an answer that the annotator gave to a pair more than `repeat_gap` trials ago and that has
        not been repeated; None if there is none.
        """
        repeated = {s.pair.id for s in trials if s.kind in (Kind.REPEAT, Kind.SWAP)}
        # A skipped pair has no answer that a repeat could be compared with.
        answered = [
            s
            for s in trials
            if s.kind is Kind.PAIR and s.choice not in (None, Choice.SKIP) and s.pair.id not in repeated
        ]
        repeatable = [
            s for s in answered if s.sequence < sequence - self.settings.repeat_gap and self.ready(s.pair)
        ]
        if not repeatable:
            return None
        chosen = repeatable[int(self.uniform(sequence, "which") * len(repeatable))]
        return Trial(
            # A repeat shows the same sides, a swap the other ones.
            pair=chosen.pair,
            sequence=sequence,
            kind=kind,
            first_is_left=chosen.first_is_left != (kind is Kind.SWAP),
        )


@dataclass(frozen=True, kw_only=True)
class _Past:
    """State that determines the annotator's next assignments, with a stamp that changes whenever it does."""

    stamp: tuple
    scheduler: Scheduler
    open: int  # number of open assignments
    lost: list[Row]  # released without an answer: their places are free for all annotators


@dataclass
class Issuer:
    """Issues pairs of one campaign to one annotator."""

    database: Database
    plan: Plan
    annotator_id: int
    annotator: str  # name
    clock: Callable[[], float]
    lost: Ready = lambda pair: False

    def __post_init__(self):
        self.campaign_id = self.plan.campaign.id
        self.me = {"campaign": self.campaign_id, "annotator": self.annotator_id}

    def assignments(self, count: int, ready: Ready) -> list[AssignedPair]:
        """Return up to `count` open assignments, and issue new ones if there are fewer."""
        with self.database.read() as c:
            held = list(c.execute(OPEN_ASSIGNMENTS, self.me))
            stale = any(row.leased < self.clock() - RENEW_SECONDS for row in held)
            short = len(held) < count
            window = self.window(c, ready) if short else []
        # Only when new pairs run out is it worth looking for places that other annotators have abandoned.
        if short and len(window) < count and self.release_expired():
            with self.database.read() as c:
                window = self.window(c, ready)
        if stale or short:
            past = self._past(ready)
            # Most requests have nothing to write. They are answered without waiting for the lock.
            if stale or past.lost or past.scheduler.next(window) is not None:
                with self.database.write(
                    (Lock.ANNOTATOR, self.annotator_id), (Lock.CAMPAIGN, self.campaign_id)
                ) as c:
                    # Another request of this annotator may have written in the meantime.
                    self._issue(
                        c,
                        count,
                        window,
                        (
                            past
                            if tuple(c.execute(STAMP, self.me).one()) == past.stamp
                            else self._past(ready, c)
                        ),
                    )
                    held = list(c.execute(OPEN_ASSIGNMENTS, self.me))
        # The assignment that was undone last comes first, then the oldest.
        order = sorted(held, key=lambda row: (-(row.undone or 0), row.sequence))
        shown = []
        for row in order[:count]:
            pair = self.plan.pairs[row.pair_id]
            left, right = (pair.first, pair.second) if row.first_is_left else (pair.second, pair.first)
            shown.append(
                AssignedPair(token=row.token, left=left, right=right, training=row.kind == Kind.TRAINING)
            )
        return shown

    def window(self, c: Connection, ready: Ready) -> list[StoredPair]:
        """Read the next WINDOW pairs that are open, not yet assigned to this annotator, and ready."""
        window: list[StoredPair] = []
        position = -1
        while len(window) < WINDOW:
            page = list(c.execute(PAGE, {**self.me, "after": position}))
            window += [pair for row in page if ready(pair := self.plan.pairs[row.id])]
            # A short page is the last one. Pages are larger than the window, because some pairs are not
            # ready.
            if len(page) < 2 * WINDOW:
                break
            position = page[-1].position
        return window[:WINDOW]

    def _issue(self, c: Connection, count: int, window: list[StoredPair], past: "_Past") -> None:
        """Renew leases, take back released places, and make assignments until `count` are open.

        The window was read before the lock was held. If other annotators have taken one of its pairs since,
        it is read again, once. Trying all its pairs one by one would hold the lock for as many statements,
        and every other annotator would wait.
        """
        now = self.clock()
        if past.open:
            c.execute(RENEW, {**self.me, "now": now, "before": now - RENEW_SECONDS})
        # Released places that are still free are taken back, in order of the pairs.
        regained = [row.id for row in past.lost if take_place(c, row.pair_id)]
        if regained:
            c.execute(update(a).where(a.c.id.in_(regained)).values(released=None, leased=now))
            past = self._past(past.scheduler.ready, c)
        scheduler = past.scheduler
        missing = count - past.open
        reread = False  # True once the window was read under the lock
        while missing > 0 and (trial := scheduler.next(window)):
            if trial.kind is Kind.PAIR:
                if not take_place(c, trial.pair.id):
                    window = (
                        [pair for pair in window if pair is not trial.pair]
                        if reread
                        else self.window(c, scheduler.ready)
                    )
                    reread = True
                    continue
                window = [pair for pair in window if pair is not trial.pair]
            c.execute(
                MAKE,
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
            scheduler.last = trial.sequence
            missing -= 1

    def _past(self, ready: Ready, c: Connection | None = None) -> "_Past":
        """Read the annotator's state, in a transaction of its own unless `c` is given."""
        if c is None:
            with self.database.read() as c:
                return self._past(ready, c)
        # The stamp is read before the rows: a change between both reads makes it differ later.
        stamp = tuple(c.execute(STAMP, self.me).one())
        rows = list(c.execute(PAST, self.me))
        history = [
            Trial(
                pair=self.plan.pairs[r.pair_id],
                sequence=r.sequence,
                kind=Kind(r.kind),
                first_is_left=bool(r.first_is_left),
                choice=r.choice,
            )
            for r in rows
            if r.answered is not None or _open(r)
        ]
        # Sequence numbers are never reused, also not those of released assignments.
        scheduler = Scheduler(
            self.plan, self.annotator, history, rows[-1].sequence if rows else 0, ready, self.lost
        )
        released = [row for row in rows if row.answered is None and not _open(row)]
        # Sorted by pair: all writers update rows of `pairs` in the same order, which avoids deadlocks.
        return _Past(
            stamp=stamp,
            scheduler=scheduler,
            open=sum(_open(row) for row in rows),
            lost=sorted(released, key=lambda r: r.pair_id),
        )

    def release_expired(self) -> int:
        """Give back places of annotators who were not seen for LEASE_SECONDS. Returns their number."""
        now = self.clock()
        expired = {**self.me, "before": now - LEASE_SECONDS}
        # The look without a lock is cheap, and most of the time nothing has expired.
        with self.database.read() as c:
            if c.execute(EXPIRED, expired).first() is None:
                return 0
        with self.database.write((Lock.CAMPAIGN, self.campaign_id)) as c:
            # skip_locked: an assignment that is being answered at this moment keeps its place.
            rows = list(c.execute(EXPIRED.with_for_update(skip_locked=True, key_share=True), expired))
            for row in rows:
                c.execute(update(a).where(a.c.id == row.id).values(released=now, undone=None))
                c.execute(GIVE_BACK, {"pair": row.pair_id})
        return len(rows)


def _open(row: Row) -> bool:
    """Return True if an assignment waits for an answer: not released, or undone after its release."""
    return row.answered is None and (row.released is None or row.undone is not None)


def take_place(c: Connection, pair_id: int) -> bool:
    """Take a place of a pair. Returns False if none was free."""
    return c.execute(TAKE, {"pair": pair_id}).rowcount == 1


def gold_checks(plan: Plan, lost: Ready) -> int:
    """Count the gold pairs that can be shown, now or after their preparation."""
    return sum(not lost(pair) for pair in plan.gold)


class Reach:
    """Cached number of new pairs that an annotator has had and may still get: all with a free place whose
    shapes can be prepared.

    The annotator's answers do not change this number, but other annotators' assignments do. Where few pairs
    are left, it is counted at every call. Otherwise the last count is used for one second per 1,000 pairs of
    the plan. The question whether some pairs can never be prepared is treated in the same way.
    """

    MANY = 500  # with more pairs left than this, a count may be slightly out of date

    def __init__(self):
        # (campaign, annotator) -> (time of the count, count)
        self._known: dict[tuple[int, int], tuple[float, int]] = {}
        # campaign -> (time of the check, True if some pair can never be prepared)
        self._gaps: dict[int, tuple[float, bool]] = {}

    def count(self, c: Connection, plan: Plan, annotator_id: int, had: int, now: float, lost: Ready) -> int:
        """Return the number of pairs that the annotator has had (`had`) and may still get."""
        key = (plan.campaign.id, annotator_id)
        when, reach = self._known.get(key, (-math.inf, 0))
        # 0 <= now - when also excludes a clock that was set back.
        if reach - had <= self.MANY or not 0 <= now - when < len(plan.pairs) / 1000:
            reach = had + self._free(c, plan, {"campaign": key[0], "annotator": key[1]}, now, lost)
            self._known[key] = now, reach
        return reach

    def _free(self, c: Connection, plan: Plan, me: dict, now: float, lost: Ready) -> int:
        """Count the pairs that the annotator may still get."""
        when, gaps = self._gaps.get(plan.campaign.id, (-math.inf, False))
        if not 0 <= now - when < len(plan.pairs) / 1000:
            gaps = any(lost(pair) for pair in plan.pairs.values())
            self._gaps[plan.campaign.id] = now, gaps
        if gaps:
            return sum(not lost(plan.pairs[row.id]) for row in c.execute(FREE_FOR_ANNOTATOR, me))
        # Two counts in the database are faster than reading all rows, which only `lost` needs.
        return c.execute(FREE, me).scalar_one() - c.execute(FREE_ASSIGNED_BEFORE, me).scalar_one()


def read_progress(
    c: Connection,
    plan: Plan,
    annotator_id: int,
    annotator: str,
    now: float,
    reach: Reach,
    lost: Ready = lambda pair: False,
) -> Progress:
    """Compute the progress of an annotator. The total changes only when other annotators take or release
    pairs, or when a trial of the timetable cannot be shown.

    Args:
        annotator: name.
        now: seconds since 1970.
        reach: cache of the number of pairs that she can get.
        lost: True for a pair that can never be prepared.
    """
    counts = {
        row.kind: row
        for row in c.execute(ANSWERED, {"campaign": plan.campaign.id, "annotator": annotator_id})
    }
    settings = plan.campaign.settings
    training = counts.pop(TRAINING, None)
    shown = sum(row.shown for row in counts.values())
    done = sum(row.answered for row in counts.values())
    assigned = counts[PAIR].shown if PAIR in counts else 0
    to_show = reach.count(c, plan, annotator_id, assigned, now, lost) - assigned
    total = (
        timetable(settings, annotator, gold_checks(plan, lost)).end(shown, to_show) if to_show > 0 else shown
    )
    if settings.trials_per_annotator is not None:
        total = max(shown, min(total, settings.trials_per_annotator))
    # Training pairs that are shown but not answered yet, and those that will be shown before the first trial.
    begun = training.shown - training.answered if training else 0
    to_come = (
        0
        if shown
        else max(sum(not lost(pair) for pair in plan.training) - (training.shown if training else 0), 0)
    )
    return Progress(done=done, total=total, training_left=begun + to_come)
