"""What an annotator is shown next, giving that out in short transactions, and how far she is.

The decision is pure: it follows from a hash of the campaign's seed, the annotator's name and the trial's
number. Training comes first, and is waited for, unless its shapes cannot be drawn; then trials: gold checks,
repeats and swapped repeats where her timetable has them, otherwise a new pair out of a window of the plan.
The window keeps the plan's order roughly, so that prepared and informative pairs come first, and lets
annotators meet on the same pairs; the order within it is each annotator's own.

A place of a pair is taken by one conditional update, and the database refuses more places than a pair has. An
assignment holds its place while the annotator is seen with it (its lease); after LEASE_SECONDS unanswered the
place goes back, and the annotator takes it again on her return if it is still free. An answer that arrives
later than that is kept all the same.
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

WINDOW = 64  # pairs to choose from
LEASE_SECONDS = 30 * 60
RENEW_SECONDS = 60  # leases younger than this are left alone, which saves a write
RELEASE_AT_ONCE = 500
KINDS = (Kind.PAIR, Kind.REPEAT, Kind.SWAP, Kind.GOLD)  # by their numbers in a timetable
Ready = Callable[[StoredPair], bool]
PAIR = Kind.PAIR.value
TRAINING = Kind.TRAINING.value

# built once: building a statement takes longer than running it
MINE = and_(a.c.campaign_id == bindparam("campaign"), a.c.annotator_id == bindparam("annotator"))
OPEN = and_(a.c.answered.is_(None), or_(a.c.released.is_(None), a.c.undone.is_not(None)))
_NAMES = ("id", "token", "pair_id", "sequence", "kind", "first_is_left", "leased", "released")
HELD = [a.c[name] for name in (*_NAMES, "answered", "undone")]
ROOM = and_(
    pairs.c.campaign_id == bindparam("campaign"), pairs.c.kind == PAIR, pairs.c.taken < pairs.c.places
)
HAD = (
    select(a.c.id)
    .where(a.c.annotator_id == bindparam("annotator"), a.c.pair_id == pairs.c.id, a.c.kind == PAIR)
    .exists()
)
OPEN_ONES = select(*HELD).where(MINE, OPEN)
PAST = (
    select(*HELD, j.c.choice).outerjoin_from(a, j, j.c.id == a.c.answered).where(MINE).order_by(a.c.sequence)
)
STAMP = select(
    func.count(),
    func.count(a.c.answered),
    func.count(a.c.released),
    func.count(a.c.undone),
    func.max(a.c.answered),
    func.max(a.c.undone),
).where(MINE)
PAGE = select(pairs.c.id, pairs.c.position).where(ROOM, not_(HAD), pairs.c.position > bindparam("after"))
PAGE = PAGE.order_by(pairs.c.position).limit(2 * WINDOW)
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
FREE = select(func.count()).select_from(pairs).where(ROOM)
FREE_BUT_HAD = (
    select(func.count())
    .select_from(a.join(pairs, pairs.c.id == a.c.pair_id))
    .where(MINE, a.c.kind == PAIR, ROOM)
)
FREE_TO_HER = select(pairs.c.id).where(ROOM, not_(HAD))


class Timetable:
    """Which of an annotator's trials are repeats, swaps and gold checks, by their place from 0, training
    aside: decided beforehand, so that the number of her trials is known; made as far as it is asked for.

    It looks like chance: a gold check at a random place of every `gold_every` trials, a repeat or a swap
    where its share has fallen behind a random threshold and a pair more than `repeat_gap` trials ago has not
    been repeated. What cannot be shown in its place (all that she could be asked again was skipped, no check
    is prepared) becomes a new pair; nothing moves for it.
    """

    def __init__(
        self, seed: int, annotator: str, repeat: float, swap: float, gap: int, gold_every: int, gold: int
    ):
        self._shares = ((1, repeat), (2, swap))
        self._gap = gap
        self._every = gold_every
        self._gold = gold
        self._random = [random.Random(f"{seed}\x1f{annotator}\x1f{kind.value}") for kind in KINDS]
        # places of new pairs
        self._kinds = array("B")
        self._new = array("L")
        self._shown = [0, 0, 0, 0]  # of each kind
        self._old = self._check = 0  # new pairs that may be repeated; place of this block's gold check
        self._lock = threading.Lock()

    def kind(self, place: int) -> Kind:
        with self._lock:
            while len(self._kinds) <= place:
                self._add()
            return KINDS[self._kinds[place]]

    def end(self, place: int, new: int) -> int:
        """How many trials there are in all when `new` >= 1 new pairs are shown from a place on."""
        with self._lock:
            while len(self._kinds) < place:
                self._add()
            last = bisect_left(self._new, place) + new - 1
            while len(self._new) <= last:
                self._add()
            return self._new[last] + 1

    def _add(self) -> None:
        place = len(self._kinds)
        kind = self._next(len(self._kinds))
        self._kinds.append(kind)
        self._shown[kind] += 1
        if kind == 0:
            self._new.append(place)

    def _next(self, place: int) -> int:
        if self._every and place % self._every == 0:
            self._check = place + int(self._random[3].random() * self._every)
        if self._old < len(self._new) and self._new[self._old] < place - self._gap:
            self._old += 1
        thresholds = [self._random[kind].random() for kind, _ in self._shares]
        if self._every and place == self._check and (self._every > 1 or self._shown[3] < self._gold):
            return 3
        for (kind, share), threshold in zip(self._shares, thresholds, strict=True):
            if (
                share * (place + 1) - self._shown[kind] > threshold
                and self._shown[1] + self._shown[2] < self._old
            ):
                return kind
        return 0


@lru_cache(maxsize=1000)
def _timetable(*what) -> Timetable:
    return Timetable(*what)


def timetable(settings: CampaignSettings, annotator: str, gold: int) -> Timetable:
    """An annotator's, by name. gold: how many gold checks the campaign has that can be shown."""
    every = settings.gold_every if gold else 0
    gold = gold if every == 1 else 0  # else they come again, and it does not matter how many there are
    return _timetable(
        settings.seed, annotator, settings.repeat_share, settings.swap_share, settings.repeat_gap, every, gold
    )


@dataclass(frozen=True, kw_only=True)
class Trial:
    """An assignment of the annotator's past, or one to be made."""

    pair: StoredPair
    sequence: int
    kind: Kind
    first_is_left: bool
    choice: str | None = None  # that counts; None: not answered


@dataclass
class Scheduler:
    """Decides for one annotator, given what she has been shown."""

    plan: Plan
    annotator: str  # name
    history: list[Trial]  # by sequence
    last: int  # highest sequence ever used
    ready: Ready
    lost: Ready = lambda pair: False  # it will never be ready

    def __post_init__(self):
        self.settings = self.plan.campaign.settings

    def uniform(self, *what) -> float:
        """A number in [0, 1) that the campaign's seed, the annotator and `what` decide."""
        text = "\x1f".join(str(part) for part in (self.settings.seed, self.annotator, *what))
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big") / 2**56

    def next(self, window: Sequence[StoredPair]) -> Trial | None:
        """The next assignment, given the pairs with room that this annotator has not had; None when there is
        nothing to show.
        """
        sequence = self.last + 1
        trials = [s for s in self.history if s.kind is not Kind.TRAINING]
        if not trials:
            had = {s.pair.id for s in self.history}
            lesson = next(
                (pair for pair in self.plan.training if pair.id not in had and not self.lost(pair)), None
            )
            if lesson is not None:
                return self._on_sides(lesson, sequence, Kind.TRAINING) if self.ready(lesson) else None
        limit = self.settings.trials_per_annotator
        if not window or (limit is not None and len(trials) >= limit):
            return None
        kind = timetable(self.settings, self.annotator, gold_checks(self.plan, self.lost)).kind(len(trials))
        given = None
        if kind is not Kind.PAIR:
            given = self._gold(trials, sequence) if kind is Kind.GOLD else self._again(kind, trials, sequence)
        return given or self._on_sides(
            min(window, key=lambda pair: self.uniform("order", pair.position)), sequence, Kind.PAIR
        )

    def _on_sides(self, pair: StoredPair, sequence: int, kind: Kind) -> Trial:
        return Trial(
            pair=pair, sequence=sequence, kind=kind, first_is_left=self.uniform(sequence, "side") < 0.5
        )

    def _gold(self, trials: list[Trial], sequence: int) -> Trial | None:
        had = [s.pair.id for s in trials if s.kind is Kind.GOLD]
        ready = [
            pair
            for pair in self.plan.gold
            if self.ready(pair) and (self.settings.gold_every > 1 or pair.id not in had)
        ]
        if not ready:
            return None
        rare = min(ready, key=lambda pair: (had.count(pair.id), self.uniform("which gold", pair.position)))
        return self._on_sides(rare, sequence, Kind.GOLD)

    def _again(self, kind: Kind, trials: list[Trial], sequence: int) -> Trial | None:
        """One of the annotator's own judgements of pairs, more than `repeat_gap` trials ago, that have not
        been repeated.
        """
        repeated = {s.pair.id for s in trials if s.kind in (Kind.REPEAT, Kind.SWAP)}
        answered = [
            s
            for s in trials
            if s.kind is Kind.PAIR and s.choice not in (None, Choice.SKIP) and s.pair.id not in repeated
        ]
        before = [
            s for s in answered if s.sequence < sequence - self.settings.repeat_gap and self.ready(s.pair)
        ]
        if not before:
            return None
        chosen = before[int(self.uniform(sequence, "which") * len(before))]
        return Trial(
            pair=chosen.pair,
            sequence=sequence,
            kind=kind,
            first_is_left=chosen.first_is_left != (kind is Kind.SWAP),
        )


@dataclass(frozen=True, kw_only=True)
class _Past:
    """What decides the annotator's next assignments, and a stamp that differs when any of it has changed."""

    stamp: tuple
    scheduler: Scheduler
    open: int
    lost: list[Row]  # released unanswered: the places are anybody's


@dataclass
class Issuer:
    """Issues one campaign's pairs to one annotator."""

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
        with self.database.read() as c:
            held = list(c.execute(OPEN_ONES, self.me))
            stale = any(row.leased < self.clock() - RENEW_SECONDS for row in held)
            short = len(held) < count
            window = self.window(c, ready) if short else []
        if short and len(window) < count and self.release_expired():
            with self.database.read() as c:
                window = self.window(c, ready)
        if stale or short:
            past = self._past(ready)
            if stale or past.lost or past.scheduler.next(window) is not None:
                with self.database.write(
                    (Lock.ANNOTATOR, self.annotator_id), (Lock.CAMPAIGN, self.campaign_id)
                ) as c:
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
                    held = list(c.execute(OPEN_ONES, self.me))
        # the last undone first, then the oldest
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
        window: list[StoredPair] = []
        position = -1
        while len(window) < WINDOW:
            page = list(c.execute(PAGE, {**self.me, "after": position}))
            window += [pair for row in page if ready(pair := self.plan.pairs[row.id])]
            if len(page) < 2 * WINDOW:
                break
            position = page[-1].position
        return window[:WINDOW]

    def _issue(self, c: Connection, count: int, window: list[StoredPair], past: "_Past") -> None:
        """Renew leases, take back lost places, and make assignments until `count` are open.

        The window was read before the lock was held. Where others have taken a pair of it since, it is read
        again, once: trying on through what many of them have left, statement by statement, would keep
        everybody else waiting.
        """
        now = self.clock()
        if past.open:
            c.execute(RENEW, {**self.me, "now": now, "before": now - RENEW_SECONDS})
        back = [row.id for row in past.lost if take_place(c, row.pair_id)]
        if back:
            c.execute(update(a).where(a.c.id.in_(back)).values(released=None, leased=now))
            past = self._past(past.scheduler.ready, c)
        scheduler = past.scheduler
        missing = count - past.open
        fresh = False
        while missing > 0 and (given := scheduler.next(window)):
            if given.kind is Kind.PAIR:
                if not take_place(c, given.pair.id):
                    window = (
                        [pair for pair in window if pair is not given.pair]
                        if fresh
                        else self.window(c, scheduler.ready)
                    )
                    fresh = True
                    continue
                window = [pair for pair in window if pair is not given.pair]
            c.execute(
                MAKE,
                {
                    "token": secrets.token_urlsafe(18),
                    "campaign_id": self.campaign_id,
                    "annotator_id": self.annotator_id,
                    "pair_id": given.pair.id,
                    "sequence": given.sequence,
                    "kind": given.kind.value,
                    "first_is_left": int(given.first_is_left),
                    "leased": self.clock(),
                },
            )
            scheduler.history.append(given)
            scheduler.last = given.sequence
            missing -= 1

    def _past(self, ready: Ready, c: Connection | None = None) -> "_Past":
        if c is None:
            with self.database.read() as c:
                return self._past(ready, c)
        stamp = tuple(c.execute(STAMP, self.me).one())  # before the rows: what comes in between is noticed
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
        scheduler = Scheduler(
            self.plan, self.annotator, history, rows[-1].sequence if rows else 0, ready, self.lost
        )
        lost = [row for row in rows if row.answered is None and not _open(row)]
        return _Past(
            stamp=stamp,
            scheduler=scheduler,
            open=sum(_open(row) for row in rows),
            lost=sorted(lost, key=lambda r: r.pair_id),
        )

    def release_expired(self) -> int:
        """Give back places whose annotator has not been seen for LEASE_SECONDS; returns how many."""
        now = self.clock()
        expired = {**self.me, "before": now - LEASE_SECONDS}
        with self.database.read() as c:
            if c.execute(EXPIRED, expired).first() is None:
                return 0
        with self.database.write((Lock.CAMPAIGN, self.campaign_id)) as c:
            rows = list(c.execute(EXPIRED.with_for_update(skip_locked=True, key_share=True), expired))
            for row in rows:
                c.execute(update(a).where(a.c.id == row.id).values(released=now, undone=None))
                c.execute(GIVE_BACK, {"pair": row.pair_id})
        return len(rows)


def _open(row: Row) -> bool:
    return row.answered is None and (row.released is None or row.undone is not None)


def take_place(c: Connection, pair_id: int) -> bool:
    """Take a place of a pair; whether there was one."""
    return c.execute(TAKE, {"pair": pair_id}).rowcount == 1


def gold_checks(plan: Plan, lost: Ready) -> int:
    """How many gold checks can be shown, now or once they are prepared."""
    return sum(not lost(pair) for pair in plan.gold)


class Reach:
    """How many new pairs an annotator has had and may still get: all that others do not take, and that can be
    drawn.

    Her own answers change nothing of it. What others take is looked up every time where few pairs are left,
    and else when the last figure is as many seconds old as there are thousands of pairs; so is whether there
    are any that cannot be drawn.
    """

    MANY = 500

    def __init__(self):
        # campaign and annotator -> (when, how many)
        self._known: dict[tuple[int, int], tuple[float, int]] = {}
        # campaign -> (when, whether a pair of it cannot be drawn)
        self._gaps: dict[int, tuple[float, bool]] = {}

    def count(self, c: Connection, plan: Plan, annotator_id: int, had: int, now: float, lost: Ready) -> int:
        who = (plan.campaign.id, annotator_id)
        when, reach = self._known.get(who, (-math.inf, 0))
        if reach - had <= self.MANY or not 0 <= now - when < len(plan.pairs) / 1000:
            reach = had + self._free(c, plan, {"campaign": who[0], "annotator": who[1]}, now, lost)
            self._known[who] = now, reach
        return reach

    def _free(self, c: Connection, plan: Plan, me: dict, now: float, lost: Ready) -> int:
        when, gaps = self._gaps.get(plan.campaign.id, (-math.inf, False))
        if not 0 <= now - when < len(plan.pairs) / 1000:
            gaps = any(lost(pair) for pair in plan.pairs.values())
            self._gaps[plan.campaign.id] = now, gaps
        if gaps:
            return sum(not lost(plan.pairs[row.id]) for row in c.execute(FREE_TO_HER, me))
        return c.execute(FREE, me).scalar_one() - c.execute(FREE_BUT_HAD, me).scalar_one()


def read_progress(
    c: Connection,
    plan: Plan,
    annotator_id: int,
    annotator: str,
    now: float,
    reach: Reach,
    lost: Ready = lambda pair: False,
) -> Progress:
    """See `Progress`. The total stays while nobody else takes pairs, or leaves them, and nothing of the
    timetable falls out.
    """
    counts = {
        row.kind: row
        for row in c.execute(ANSWERED, {"campaign": plan.campaign.id, "annotator": annotator_id})
    }
    settings = plan.campaign.settings
    training = counts.pop(TRAINING, None)
    shown = sum(row.shown for row in counts.values())
    done = sum(row.answered for row in counts.values())
    had = counts[PAIR].shown if PAIR in counts else 0
    to_show = reach.count(c, plan, annotator_id, had, now, lost) - had
    total = (
        timetable(settings, annotator, gold_checks(plan, lost)).end(shown, to_show) if to_show > 0 else shown
    )
    if settings.trials_per_annotator is not None:
        total = max(shown, min(total, settings.trials_per_annotator))
    begun = training.shown - training.answered if training else 0
    to_come = (
        0
        if shown
        else max(sum(not lost(pair) for pair in plan.training) - (training.shown if training else 0), 0)
    )
    return Progress(done=done, total=total, training_left=begun + to_come)
