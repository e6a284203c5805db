"""A small design, judgements made to order, and simulated people who answer through the store."""

import time
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from eg3d_rlhf.people.label.entities import Choice, JudgementRow, Kind
from eg3d_rlhf.people.label.store import Store
from eg3d_rlhf.people.study.design import (
    Contender,
    StudyDesign,
    campaign_settings,
    contender_shape,
    study_pairs,
)
from tests.people.label.plans import answer_all

A = Contender(label="before", source="before.safetensors", generator="a" * 64)
B = Contender(label="after", source="after.safetensors", generator="b" * 64)


def small_design(**changes) -> StudyDesign:
    """Forty trials of two annotators."""
    settings = {
        "name": "small",
        "a": A,
        "b": B,
        "trials": 40,
        "annotators": 2,
        "annotators_per_pair": 2,
        "seed": 3,
        "resamples": 400,
        "created": "2001-01-01T00:00:00+00:00",
        **changes,
    }
    return StudyDesign(**settings)


def row(
    design: StudyDesign,
    id: int,
    chosen: str,
    *,
    annotator="ann",
    b_left=True,
    kind="pair",
    pair=None,
    **changes,
) -> JudgementRow:
    """A judgement; chosen is 'a', 'b', 'tie' or 'skip'."""
    pair = id if pair is None else pair
    seeds = design.seeds()[0]
    first, second = (contender_shape(design, of, seeds[pair % len(seeds)]) for of in (design.a, design.b))
    choice = {"b": "left" if b_left else "right", "a": "right" if b_left else "left"}.get(chosen, chosen)
    made = JudgementRow(
        id=id,
        campaign=design.name,
        mode="study",
        annotator=annotator,
        assignment=f"t{id}",
        sequence=id,
        pair=pair,
        kind=Kind(kind),
        left=second if b_left else first,
        right=first if b_left else second,
        first_is_left=not b_left,
        choice=Choice(choice),
        reason=None,
        expected="left" if kind == "gold" else None,
        milliseconds=3000,
        views=(),
        answered_at=None,
        received_at=1e9 + id,
        page_version="1",
        undone=False,
    )
    return replace(made, **changes)


@dataclass
class Person:
    """Answers through the store as the page would."""

    name: str
    preference: float = 0.7  # chance of preferring b
    shift: float = 0.0  # added to the chance of choosing the left
    gold: float = 1.0  # chance of a right answer to a pair whose answer is known
    milliseconds: int = 2500
    ties: float = 0.0

    def __post_init__(self):
        self.rng = np.random.default_rng([ord(c) for c in self.name])

    def answer(self, store: Store, campaign_id: int, design: StudyDesign, limit: int | None = None) -> int:
        """Answer until there is nothing more, or `limit` is reached; returns how many."""
        who = store.annotator_without_token(self.name).id
        values = {"milliseconds": self.milliseconds, "answered_at": time.time(), "page_version": "test"}
        choose = partial(self.choose, design=design)
        return len(answer_all(store, campaign_id, who, choose, limit or 10_000, ahead=1, **values))

    def choose(self, left, right, design: StudyDesign) -> Choice:
        rng = self.rng
        if left.generator == right.generator:  # one of the two is damaged
            best = Choice.LEFT if right.degradation else Choice.RIGHT
            worst = Choice.RIGHT if right.degradation else Choice.LEFT
            return best if rng.random() < self.gold else worst
        if rng.random() < self.ties:
            return Choice.TIE
        chance = (
            self.preference if left.generator == design.b.generator else 1 - self.preference
        ) + self.shift
        return Choice.LEFT if rng.random() < chance else Choice.RIGHT


def create(store: Store, design: StudyDesign) -> int:
    return store.create_campaign(campaign_settings(design), study_pairs(design))
