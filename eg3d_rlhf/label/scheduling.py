"""What an annotator is shown next: a pure decision per trial.

It follows from a hash of the campaign's seed, the annotator's name and the trial's number. Training comes first, then trials: one gold
check at a hashed place of every `gold_every` trials, repeats and swapped repeats as their shares fall due, otherwise a new pair out of a
window of the plan. The window keeps the plan's order roughly, so that prepared and informative pairs come first, and lets annotators meet
on the same pairs; the order within it is each annotator's own.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from eg3d_rlhf.label.campaigns import Plan, StoredPair
from eg3d_rlhf.label.entities import Choice, Kind

WINDOW = 64  # pairs to choose from
Ready = Callable[[StoredPair], bool]


@dataclass(frozen=True, kw_only=True)
class Shown:
    """An assignment of the annotator's past, as far as it decides what follows."""

    pair: int  # id
    sequence: int
    kind: Kind
    first_is_left: bool
    choice: str | None  # that counts; None: not answered


@dataclass(frozen=True, kw_only=True)
class Next:
    """An assignment to be made."""

    pair: StoredPair
    sequence: int
    kind: Kind
    first_is_left: bool


@dataclass
class Scheduler:
    """Decides for one annotator, given what she has been shown."""

    plan: Plan
    annotator: str  # name
    history: list[Shown]  # by sequence
    last: int = 0  # highest sequence ever used
    ready: Ready = field(default=lambda pair: True)

    def __post_init__(self):
        self.settings = self.plan.campaign.settings

    def uniform(self, *what) -> float:
        """A number in [0, 1) that the campaign's seed, the annotator and `what` decide."""
        text = "\x1f".join(str(part) for part in (self.settings.seed, self.annotator, *what))
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big") / 2**56

    def next(self, window: Sequence[StoredPair]) -> Next | None:
        """The next assignment, given the pairs with room that this annotator has not had; None when there is nothing to show."""
        sequence = self.last + 1
        training = self.training()
        if training:
            return self._on_sides(training[0], sequence, Kind.TRAINING)
        trials = [s for s in self.history if s.kind is not Kind.TRAINING]
        limit = self.settings.trials_per_annotator
        if not window or (limit is not None and len(trials) >= limit):
            return None
        return self._gold(trials, sequence) or self._again(trials, sequence) or self._new(window, sequence)

    def training(self) -> list[StoredPair]:
        """Examples still to be shown: those prepared, until the first trial."""
        if any(s.kind is not Kind.TRAINING for s in self.history):
            return []
        had = {s.pair for s in self.history}
        return [pair for pair in self.plan.training if pair.id not in had and self.ready(pair)]

    def shown(self, given: Next) -> None:
        """Take an assignment into the history."""
        now = Shown(pair=given.pair.id, sequence=given.sequence, kind=given.kind, first_is_left=given.first_is_left, choice=None)
        self.history.append(now)
        self.last = given.sequence

    def _on_sides(self, pair: StoredPair, sequence: int, kind: Kind) -> Next:
        return Next(pair=pair, sequence=sequence, kind=kind, first_is_left=self.uniform(sequence, "side") < 0.5)

    def _gold(self, trials: list[Shown], sequence: int) -> Next | None:
        every = self.settings.gold_every
        if every == 0:
            return None
        block, place = divmod(len(trials), every)
        if place != int(self.uniform("gold", block) * every):
            return None
        had = [s.pair for s in trials if s.kind is Kind.GOLD]
        ready = [pair for pair in self.plan.gold if self.ready(pair) and (every > 1 or pair.id not in had)]
        if not ready:
            return None
        rare = min(ready, key=lambda pair: (had.count(pair.id), self.uniform("which gold", pair.position)))
        return self._on_sides(rare, sequence, Kind.GOLD)

    def _again(self, trials: list[Shown], sequence: int) -> Next | None:
        """A repeat or a swap when its share is due: how much it is behind, against a hashed threshold, so that it cannot be foreseen."""
        for kind, share in ((Kind.REPEAT, self.settings.repeat_share), (Kind.SWAP, self.settings.swap_share)):
            due = share * (len(trials) + 1) - sum(s.kind is kind for s in trials)
            if share == 0 or due <= self.uniform(sequence, kind.value):
                continue
            before = self._repeatable(trials, sequence)
            if before:
                chosen = before[int(self.uniform(sequence, "which") * len(before))]
                left = chosen.first_is_left if kind is Kind.REPEAT else not chosen.first_is_left
                return Next(pair=self.plan.pairs[chosen.pair], sequence=sequence, kind=kind, first_is_left=left)
        return None

    def _repeatable(self, trials: list[Shown], sequence: int) -> list[Shown]:
        """Own judgements of pairs, at least `repeat_gap` trials ago, that have not been repeated."""
        repeated = {s.pair for s in trials if s.kind in (Kind.REPEAT, Kind.SWAP)}
        latest = sequence - 1 - self.settings.repeat_gap
        answered = [s for s in trials if s.kind is Kind.PAIR and s.choice not in (None, Choice.SKIP) and s.sequence <= latest]
        return [s for s in answered if s.pair not in repeated and self.ready(self.plan.pairs[s.pair])]

    def _new(self, window: Sequence[StoredPair], sequence: int) -> Next:
        first = min(window, key=lambda pair: self.uniform("order", pair.position))
        return self._on_sides(first, sequence, Kind.PAIR)
