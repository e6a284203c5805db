"""Campaigns that learn from their answers: `label --strategy=active` without reward files.

The campaign starts with random pairs. From the 25th label on, a linear reward is fitted to the answers so far
(`eg3d_rlhf.rewards.active_pairs`), and batches of 8 pairs are appended to the stored campaign: those that are
expected to reduce the variance of the reward's direction most. Every fifth pair is random, and only random
pairs measure the accuracy. Pairs that are stored never change.

Each appended pair states how it was chosen, as JSON in its field `explanation`:

    {"batch": 3, "random": false, "reward": SHA-256 of the reward, "reduction": 0.004, "assessment": {...}}

Annotators never receive this text, because it could influence their answers. Admins see a summary.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eg3d_rlhf.people.label.campaigns import Plan
from eg3d_rlhf.people.label.entities import PAIR_TOTAL, Kind, PlannedPair, Shape, StoredCampaign
from eg3d_rlhf.people.label.pairing import PairingOptions, random_seed_pairs
from eg3d_rlhf.people.label.store_labels import LabelFilters, store_preferences
from eg3d_rlhf.preferences.dataset import pair_of
from eg3d_rlhf.preferences.labels import Preference
from eg3d_rlhf.preferences.pair_strategies import FIRST_LABELS, LEARNT_BATCH, RANDOM_EVERY

if TYPE_CHECKING:
    from eg3d_rlhf.generators import LoadedGenerator
    from eg3d_rlhf.people.label.store import Store
    from eg3d_rlhf.rewards.observations import Observation

LEAST_CANDIDATES = 128  # smallest number of seeds from which a batch is chosen, if the campaign has as many
# Labelling is advised to stop where the agreement of halves, or the accuracy, rises by less than MIN_RISE
# over RISE_LABELS labels.
MIN_RISE = 0.02
RISE_LABELS = 50
SeedPair = tuple[int, int]  # in ascending order


def pairing_of(campaign: StoredCampaign) -> PairingOptions:
    """Return the options from which a campaign on a generator was planned."""
    plan_report = campaign.settings.extra["plan"]
    values = {name: plan_report[name] for name in PairingOptions.__dataclass_fields__}
    return PairingOptions(**{**values, "rewards": tuple(values["rewards"])})


def random_places(start: int, count: int) -> list[bool]:
    """Return for each of `count` pairs from number `start` on, counted from 0, whether it is random."""
    return [(number + 1) % RANDOM_EVERY == 0 for number in range(start, start + count)]


def candidate_seeds(pairing: PairingOptions, pair_count: int) -> range:
    """Return the seeds from which the reward chooses the pairs of a batch.

    They follow the seeds of the random pairs, and their number grows with the pairs.

    Args:
        pairing: options of the campaign.
        pair_count: number of pairs after the batch.
    """
    first = pairing.first_seed + 2 * pairing.pairs
    available_count = pairing.compared_shape_count - 2 * pairing.pairs
    return range(first, first + min(available_count, candidate_count(pairing.pool, pair_count)))


def candidate_count(pool: float, pair_count: int) -> int:
    """Return the number of seeds, used ones included, from which the pairs of a batch are chosen.

    Args: pool: seeds that are scored for each used seed; pair_count: number of pairs after the batch.
    """
    return max(LEAST_CANDIDATES, round(2 * pair_count * (pool - 1)))


class PairPlanner:
    """Appends pairs to a campaign that learns from its answers.

    Args:
        store: store of the campaign.
        campaign: campaign.
        generator: generator whose shapes the campaign compares.
        cache: folder in which observations of shapes are stored.
        unlabelled: number of unlabelled samples of the reward; None: the default.
        observation: observation that the reward reads; None: the density grid of `reward linear`.
    """

    def __init__(
        self,
        store: "Store",
        campaign: StoredCampaign,
        generator: "LoadedGenerator",
        cache: Path,
        unlabelled: int | None = None,
        observation: "Observation | None" = None,
    ):
        from eg3d_rlhf.rewards import linear

        self.store = store
        self.campaign = campaign
        self.generator = generator
        self.pairing = pairing_of(campaign)
        self.unlabelled = linear.UNLABELLED if unlabelled is None else unlabelled
        if observation is None:
            observation = linear.slab_of(generator.generator, linear.RESOLUTION)
        self.observation = observation
        first_seeds = linear.unlabelled_seeds(self.unlabelled, [])
        # Most observations are made before there are enough labels, so that annotators do not wait for them.
        self.observations = linear.observe_samples(
            generator,
            observation,
            [*first_seeds, *candidate_seeds(self.pairing, 0)],
            psi=self.pairing.psi,
            cache=cache,
        )

    def append_batch(self) -> bool:
        """Append a batch of pairs if the annotators will soon have no new pair.

        Returns: True if pairs were appended.
        """
        plan = self.store.plan(self.campaign.id)
        free_count = self.store.free_pair_count(self.campaign.id)
        if not plan.missing_count or free_count >= LEARNT_BATCH:
            return False
        labels = store_preferences(self.store, LabelFilters(campaign=self.campaign.settings.name))
        decided_pairs = {pair_of(label) for label in labels if not label.tie}
        has_enough_labels = len(decided_pairs) >= FIRST_LABELS
        # Ties and skips may use up the first pairs. Random pairs then follow.
        if not has_enough_labels and free_count:
            return False
        count = min(LEARNT_BATCH, plan.missing_count)
        planned_pairs = self._batch(plan, labels, count, learns=has_enough_labels)
        return self.store.append_pairs(self.campaign.id, planned_pairs, len(plan.pairs))

    def _batch(self, plan: Plan, labels: Sequence[Preference], count: int, learns: bool) -> list[PlannedPair]:
        """Choose the pairs of a batch.

        Args:
            plan: plan so far.
            labels: answers so far.
            count: number of pairs.
            learns: False if there are too few labels, so that all pairs are random.
        """
        planned = seed_pairs_of(plan)
        random_places_of_batch = random_places(plan.pair_count, count) if learns else [True] * count
        unused_random_pairs = (
            pair for pair in random_seed_pairs(self.pairing) if pair_key(*pair) not in planned
        )
        random_pairs = list(islice(unused_random_pairs, sum(random_places_of_batch)))
        chosen_pairs: list[tuple[int, int, float]] = []
        facts: dict[str, Any] = {"batch": batch_count(plan) + 1, "reward": None, "assessment": None}
        if learns:
            from eg3d_rlhf.rewards.active_pairs import ActiveReward

            try:
                reward = ActiveReward.fit(
                    self.generator, labels, self.observation, self.observations, self.unlabelled
                )
            # Answers that contradict each other about every pair determine no reward.
            except ValueError as error:
                print(
                    f"No reward can be fitted, so random pairs follow: {error}", file=sys.stderr, flush=True
                )
                return self._batch(plan, labels, count, learns=False)
            used_seeds = {seed for pair in planned for seed in pair}
            candidates = [
                seed
                for seed in candidate_seeds(self.pairing, plan.pair_count + count)
                if seed not in used_seeds
            ]
            labelled_pairs = {pair_of(label) for label in labels}
            pending_pairs = [pair for pair in planned if pair not in labelled_pairs]
            chosen_pairs = reward.choose(candidates, random_places_of_batch.count(False), pending_pairs)
            # A restarted worker reads the observations of this batch from the file.
            self.observations.save()
            random_keys = [pair for pair, record in planned.items() if record.get("random", True)]
            facts |= {"reward": reward.hash, "assessment": reward.assess(set(random_keys))}
        template = next(shape for shape in plan.shapes.values() if not shape.degradation)
        planned_pairs = []
        for is_random in random_places_of_batch:
            reduction = None
            # pop(0): in the order in which the reward chose them, the best pair first
            if is_random:
                first, second = random_pairs.pop(0)
            else:
                first, second, reduction = chosen_pairs.pop(0)
            explanation = json.dumps({**facts, "random": is_random, "reduction": reduction})
            planned_pairs.append(
                PlannedPair(
                    first=_with_seed(template, first),
                    second=_with_seed(template, second),
                    explanation=explanation,
                )
            )
        return planned_pairs


def _with_seed(template: Shape, seed: int) -> Shape:
    """Return a shape of a campaign with another seed."""
    return replace(template, seed=int(seed))


def pair_key(first_seed: int, second_seed: int) -> SeedPair:
    """Return a pair of seeds in ascending order, as `pair_of` does for a label."""
    return min(first_seed, second_seed), max(first_seed, second_seed)


def seed_pairs_of(plan: Plan) -> dict[SeedPair, Mapping[str, Any]]:
    """Return the record of each pair of a plan, {} for a pair of the start, by its seeds."""
    return {
        pair_key(plan.shapes[pair.first].seed, plan.shapes[pair.second].seed): (
            json.loads(pair.explanation) if pair.explanation else {}
        )
        for pair in plan.pairs.values()
        if pair.kind is Kind.PAIR
    }


def batch_count(plan: Plan) -> int:
    """Return the number of batches that were appended to a plan."""
    return max((record.get("batch", 0) for record in seed_pairs_of(plan).values()), default=0)


def learning_report(plan: Plan) -> dict[str, Any] | None:
    """Return how certain the reward of a campaign is by now, and whether more labels still help.

    Returns: JSON values, or None for a campaign that does not learn from its answers. "latest" is the newest
        assessment, None before the first one, and "rises" its rises over 50 labels.
    """
    total = plan.campaign.settings.extra.get(PAIR_TOTAL)
    if total is None:
        return None
    assessment_by_batch = {
        record["batch"]: record["assessment"]
        for record in seed_pairs_of(plan).values()
        if record.get("assessment")
    }
    assessments = [assessment_by_batch[batch] for batch in sorted(assessment_by_batch)]
    return {
        "pairs": plan.pair_count,
        "total": total,
        "first_labels": FIRST_LABELS,
        "rise_labels": RISE_LABELS,
        "latest": assessments[-1] if assessments else None,
        "rises": rises(assessments) if assessments else None,
    }


def rises(assessments: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Compare the newest assessment with the one about 50 labels earlier.

    Args: assessments: results of `ActiveReward.assess` in order of the number of labels.
    Returns: JSON values: "half_cosine" and "accuracy", their rises, None if they are not known yet; and
        "stop", True if one of the rises is known and below .02.
    """
    rise: dict[str, Any] = {"half_cosine": None, "accuracy": None}
    earlier = [
        assessment
        for assessment in assessments
        if assessment["labels"] <= assessments[-1]["labels"] - RISE_LABELS
    ]
    if earlier:
        for name in rise:
            values = (earlier[-1][name], assessments[-1][name])
            rise[name] = None if None in values else values[1] - values[0]
    return {**rise, "stop": any(value is not None and value < MIN_RISE for value in rise.values())}
