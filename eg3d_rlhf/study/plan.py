"""From a design to a campaign: the pairs, drawn alike for both generators, gold checks and training."""

import numpy as np

from eg3d_rlhf import bundled
from eg3d_rlhf.generators import LoadedGenerator
from eg3d_rlhf.label.damage import DAMAGES
from eg3d_rlhf.label.pairing import known_answers
from eg3d_rlhf.label.records import CampaignSettings, Kind, Mode, PlannedPair, Shape
from eg3d_rlhf.study.design import Contender, StudyDesign

TRAINING_PAIRS = len(DAMAGES)  # one of each kind
GOLD_PAIRS = 24  # more than an annotator meets in most studies; beyond, the rarest come again


def contender(label: str, loaded: LoadedGenerator) -> Contender:
    """A generator as the design names it; the bundled one is known by its place, wherever that is."""
    source = "" if loaded.path == bundled.GENERATOR else str(loaded.path.resolve())
    return Contender(label=label, source=source, generator=loaded.hash)


def study_pairs(design: StudyDesign) -> list[PlannedPair]:
    """Training, then trials, with gold pairs in between so that they are prepared in time.

    `first` is a and `second` is b, from the same latent, at the same psi, level, resolution and number of triangles. A gold pair is one
    latent of one generator, whole and damaged; generators and kinds of damage take turns, so nothing but the damage gives the answer.
    """
    seeds, spare = design.seeds()
    trials = [PlannedPair(first=shape_of(design, design.a, seed), second=shape_of(design, design.b, seed)) for seed in seeds]
    rng = np.random.default_rng([design.seed, 1])
    training = known_answers([_alternating(design, i, spare[i]) for i in range(TRAINING_PAIRS)], Kind.TRAINING, rng)
    checks = spare[TRAINING_PAIRS : TRAINING_PAIRS + GOLD_PAIRS] if design.gold_every else []
    gold = known_answers([_alternating(design, i, seed) for i, seed in enumerate(checks)], Kind.GOLD, rng)
    return [*training, *_interleaved(trials, gold, design.gold_every)]


def campaign_settings(design: StudyDesign) -> CampaignSettings:
    """The campaign of a study; it keeps the design's hash."""
    return CampaignSettings(
        name=design.name, mode=Mode.STUDY, seed=design.seed, annotators_per_pair=design.annotators_per_pair,
        repeat_share=0.0, swap_share=0.0, gold_every=design.gold_every, trials_per_annotator=design.quota, show_render=False,
        extra={"design_hash": design.hash},
    )  # fmt: skip


def shape_of(design: StudyDesign, of: Contender, seed: int) -> Shape:
    """One contender's shape of a latent."""
    return Shape(
        generator=of.generator, source=of.source, seed=seed, psi=design.psi, level=design.level, resolution=design.resolution,
        triangles=design.triangles,
    )  # fmt: skip


def _alternating(design: StudyDesign, number: int, seed: int) -> Shape:
    """A shape of either contender: each kind of damage falls to both in turn."""
    return shape_of(design, (design.a, design.b)[number // len(DAMAGES) % 2], seed)


def _interleaved(trials: list[PlannedPair], gold: list[PlannedPair], every: int) -> list[PlannedPair]:
    """Gold pairs spread among the trials as densely as they will be asked for; those left over at the end."""
    out, waiting = [], list(gold)
    for i, pair in enumerate(trials):
        if waiting and i % every == 0:
            out.append(waiting.pop(0))
        out.append(pair)
    return out + waiting
