"""Which of an annotator's trials are repeats, swaps and gold checks: decided beforehand, so that the number of her trials is known.

It follows from the campaign's seed and her name alone, and looks like chance: a gold check at a random place of every `gold_every`
trials, a repeat or a swap where its share has fallen behind a random threshold and a pair more than `repeat_gap` trials ago has not been
repeated. What cannot be shown in its place (all that she could be asked again was skipped, no check is prepared) becomes a new pair;
nothing moves for it.
"""

import random
import threading
from array import array
from bisect import bisect_left
from functools import lru_cache

from eg3d_rlhf.people.label.entities import CampaignSettings, Kind

ORDER = (Kind.PAIR, Kind.REPEAT, Kind.SWAP, Kind.GOLD)  # kinds by their numbers here


class Timetable:
    """Kinds of trials by their place, from 0, training aside; made as far as it is asked for."""

    def __init__(self, seed: int, annotator: str, repeat: float, swap: float, gap: int, gold_every: int, gold: int):
        self._shares, self._gap, self._every, self._gold = ((1, repeat), (2, swap)), gap, gold_every, gold
        self._random = [random.Random(f"{seed}\x1f{annotator}\x1f{kind.value}") for kind in ORDER]
        self._kinds, self._new = array("B"), array("L")  # places of new pairs
        self._shown = [0, 0, 0, 0]  # of each kind
        self._old = self._check = 0  # new pairs that may be repeated; place of this block's gold check
        self._lock = threading.Lock()

    def kind(self, place: int) -> Kind:
        """Of the trial at a place."""
        with self._lock:
            while len(self._kinds) <= place:
                self._add()
            return ORDER[self._kinds[place]]

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
        place, kind = len(self._kinds), self._next(len(self._kinds))
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
            if share * (place + 1) - self._shown[kind] > threshold and self._shown[1] + self._shown[2] < self._old:
                return kind
        return 0


@lru_cache(maxsize=1000)
def _timetable(*what) -> Timetable:
    return Timetable(*what)


def timetable(settings: CampaignSettings, annotator: str, gold: int) -> Timetable:
    """An annotator's, by name. gold: how many gold checks the campaign has that can be shown."""
    every = settings.gold_every if gold else 0
    gold = gold if every == 1 else 0  # else they come again, and it does not matter how many there are
    return _timetable(settings.seed, annotator, settings.repeat_share, settings.swap_share, settings.repeat_gap, every, gold)
