"""How far an annotator is in a campaign, in two queries."""

from sqlalchemy import Connection, bindparam, func, select

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
FREE = select(func.count()).select_from(pairs).where(ROOM).scalar_subquery()
FREE_BUT_HAD = select(func.count()).select_from(a.join(pairs, pairs.c.id == a.c.pair_id)).where(MINE, a.c.kind == PAIR, ROOM)
RECENT = select(func.count()).select_from(j.join(a, (a.c.id == j.c.assignment_id) & (a.c.answered == j.c.id))).where(
    j.c.campaign_id == bindparam("campaign"), j.c.annotator_id == bindparam("annotator"), j.c.received_at > bindparam("since"),
    a.c.kind != TRAINING,
).scalar_subquery()  # fmt: skip
LEFT = select(FREE.label("free"), FREE_BUT_HAD.scalar_subquery().label("had"), RECENT.label("recent"))


def read_progress(c: Connection, plan: Plan, annotator_id: int, now: float) -> Progress:
    """See `Progress`. The total is exact once no pair is left; before, due repeats and gold checks are estimated from their shares."""
    me = {"campaign": plan.campaign.id, "annotator": annotator_id}
    counts = {row.kind: row for row in c.execute(ANSWERED, me)}
    left = c.execute(LEFT, {**me, "since": now - HOUR}).one()
    training = counts.pop(TRAINING, None)
    shown, done = sum(row.shown for row in counts.values()), sum(row.answered for row in counts.values())
    settings = plan.campaign.settings
    checks = 1 / settings.gold_every if settings.gold_every and plan.gold else 0
    new = max(1 - checks - settings.repeat_share - settings.swap_share, 0.1)  # share of the trials that show a new pair
    total = shown + round((left.free - left.had) / new)
    if settings.trials_per_annotator is not None:
        total = max(shown, min(total, settings.trials_per_annotator))
    begun = training.shown - training.answered if training else 0
    to_come = 0 if shown else len(plan.training) - (training.shown if training else 0)
    return Progress(done=done, total=total, training_left=begun + to_come, last_hour=left.recent)
