"""How far an annotator is in a campaign, in two or three queries."""

import math

from sqlalchemy import Connection, bindparam, func, literal, select

from eg3d_rlhf.label.campaigns import Plan
from eg3d_rlhf.label.issuing import MINE, OPEN, PAIR, ROOM
from eg3d_rlhf.label.records import Kind
from eg3d_rlhf.label.schema import assignments as a
from eg3d_rlhf.label.schema import judgements as j
from eg3d_rlhf.label.schema import pairs
from eg3d_rlhf.label.stored import Progress

HOUR = 3600
TRAINING = Kind.TRAINING.value

ANSWERED = select(a.c.kind, func.count(a.c.answered).label("answered"), func.count().label("shown"))
ANSWERED = ANSWERED.where(MINE, a.c.answered.is_not(None) | OPEN).group_by(a.c.kind)
FREE = select(func.count()).select_from(pairs).where(ROOM)
FREE_BUT_HAD = select(func.count()).select_from(a.join(pairs, pairs.c.id == a.c.pair_id)).where(MINE, a.c.kind == PAIR, ROOM)
RECENT = select(func.count()).select_from(j.join(a, (a.c.id == j.c.assignment_id) & (a.c.answered == j.c.id))).where(
    j.c.campaign_id == bindparam("campaign"), j.c.annotator_id == bindparam("annotator"), j.c.received_at > bindparam("since"),
    a.c.kind != TRAINING,
).scalar_subquery()  # fmt: skip
HAD_AND_RECENT = select(FREE_BUT_HAD.scalar_subquery().label("had"), RECENT.label("recent"))
ONLY_RECENT = select(literal(0).label("had"), RECENT.label("recent"))


class FreePairs:
    """How many pairs have room: counted every time where few are left, and where many are, when the last count is SECONDS old."""

    MANY, SECONDS = 500, 2.0

    def __init__(self):
        self._counted: dict[int, tuple[float, int]] = {}  # campaign -> (when, how many)

    def count(self, c: Connection, campaign_id: int, now: float) -> int:
        """Pairs of a campaign with room, exact from MANY down."""
        when, free = self._counted.get(campaign_id, (-math.inf, 0))
        if free <= self.MANY or not 0 <= now - when < self.SECONDS:
            free = c.execute(FREE, {"campaign": campaign_id}).scalar_one()
            self._counted[campaign_id] = now, free
        return free


def read_progress(c: Connection, plan: Plan, annotator_id: int, now: float, free_pairs: FreePairs) -> Progress:
    """See `Progress`. The total is exact once no pair is left; before, due repeats and gold checks are estimated from their shares."""
    me = {"campaign": plan.campaign.id, "annotator": annotator_id}
    counts = {row.kind: row for row in c.execute(ANSWERED, me)}
    settings = plan.campaign.settings
    free = free_pairs.count(c, plan.campaign.id, now)
    shared = settings.annotators_per_pair > 1 or free <= FreePairs.MANY  # else pairs with room are ones that nobody was shown
    left = c.execute(HAD_AND_RECENT if shared else ONLY_RECENT, {**me, "since": now - HOUR}).one()
    training = counts.pop(TRAINING, None)
    shown, done = sum(row.shown for row in counts.values()), sum(row.answered for row in counts.values())
    checks = 1 / settings.gold_every if settings.gold_every and plan.gold else 0
    new = max(1 - checks - settings.repeat_share - settings.swap_share, 0.1)  # share of the trials that show a new pair
    total = shown + round((free - left.had) / new)
    if settings.trials_per_annotator is not None:
        total = max(shown, min(total, settings.trials_per_annotator))
    begun = training.shown - training.answered if training else 0
    to_come = 0 if shown else len(plan.training) - (training.shown if training else 0)
    return Progress(done=done, total=total, training_left=begun + to_come, last_hour=left.recent)
