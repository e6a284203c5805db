"""Estimate what the steps in a work folder cost, and how many answers show that labels carry a signal.

All figures are computed from the settings of the work folder, before anything is sampled. Times are

    time = (number of samples or updates) x (operations of one) / (operations per second of the device)

with the operations that estimate.py counts. The operations per second are measured on the device of this
machine, or SHARE_OF_PEAK of the peak rate of a named card.

The number of answers follows from the test of tune.py. The test orders held-out pairs, whose prompts were not
trained on, and needs an interval of the accuracy above one half. Pairs of a prompt are correlated, so with n
held-out pairs of k prompts, the effective number of pairs is n / (1 + (n / k - 1) PROMPT_CORRELATION). It
must reach the number of independent pairs that the exact binomial test needs for the power POWER. That number
is multiplied by ((t + z) / (q + z))^2, where z is the normal quantile of the power, and t and q are the
quantiles of Student's distribution with k - 1 degrees of freedom and of the normal distribution at the level
of the test, because the interval is computed with Student's quantile.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from eg3d_rlhf.people.study.power import decided_trials
from eg3d_rlhf.tuning.flow.training.accuracy import MIN_PROMPTS, compute_confidence
from eg3d_rlhf.tuning.flow.workspace.answers import choosing_count
from eg3d_rlhf.tuning.flow.workspace.estimate import Row
from eg3d_rlhf.tuning.flow.workspace.sampled_assets import IDENTITY
from eg3d_rlhf.tuning.flow.workspace.work_folder import BASE, CHOOSE, SHOWN, TEST, Work

ACCURACIES = (0.6, 0.7)  # accuracies on held-out pairs that labels should be able to show
POWER = 0.8  # probability with which the test shows an accuracy
TIES = 0.1  # assumed share of ties among the answers
# Assumed correlation of the outcomes of two held-out pairs of the same prompt. No value was measured.
PROMPT_CORRELATION = 0.05
# Assumed share of a card's peak rate that the networks attain. No value was measured on the cards.
SHARE_OF_PEAK = 0.3
STUDY_ARMS = 3  # generators of `flow study`: untuned, tuned and control


@dataclass(frozen=True)
class Card:
    """GPU with its figures from the manufacturer's data sheet."""

    memory: int  # memory in GB
    peak: float  # operations per second in bfloat16 on tensor cores without sparsity, in 1e12


CARDS = {
    "rtx-3090": Card(24, 71),
    "rtx-4090": Card(24, 165),
    "rtx-a6000": Card(48, 155),
    "l4": Card(24, 121),
    "l40s": Card(48, 362),
    "a100": Card(80, 312),
    "h100": Card(80, 989),
    "h200": Card(141, 989),
}


@dataclass(frozen=True, kw_only=True)
class LabelGoal:
    """Number of pairs to label so that the test shows an accuracy on held-out pairs."""

    accuracy: float  # true accuracy on held-out pairs, in 0..1
    held_out: int  # number of held-out pairs without a tie that the test needs
    prompts: int  # number of held-out prompts of the work folder
    pairs: int | None  # number of pairs to label; None: no number of pairs of these prompts is enough
    # Smallest number of prompts or images of a work folder of the same shares with which `pairs` exists.
    least_inputs: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Numbers of samples, pairs and answers of the steps in a work folder."""

    assets: int  # number of assets that `flow sample` generates
    study_assets: int  # number of assets that `flow study` generates, of all generators
    most_pairs: int  # number of different pairs of assets of the same prompt
    goals: Sequence[LabelGoal]

    @property
    def shows_something(self) -> bool:
        """True if at least one of the goals can be reached with the pairs of the sampled assets."""
        return any(goal.pairs is not None and goal.pairs <= self.most_pairs for goal in self.goals)


def make_plan(work: Work) -> Plan:
    """Compute the numbers of assets and pairs of a work folder from its settings."""
    shown_count = len(work.names(*SHOWN))
    return Plan(
        assets=work.each * shown_count,
        study_assets=STUDY_ARMS * work.each * len(work.names(TEST)),
        most_pairs=shown_count * math.comb(work.each, 2),
        goals=[label_goal(work, accuracy) for accuracy in ACCURACIES],
    )


def label_goal(work: Work, accuracy: float) -> LabelGoal:
    """Compute how many pairs must be labelled to show an accuracy; see the module for the formula.

    Args:
        work: work folder, which determines the number of prompts of each split.
        accuracy: true accuracy of the tuned network on held-out pairs.
    """
    choose_count = len(work.names(CHOOSE))
    shown_count = len(work.names(*SHOWN))
    input_count = len(work.names())
    held_out_prompts = choose_count - choosing_count(choose_count)
    alpha = 1 - compute_confidence(len(work.stages))
    held_out_share = held_out_prompts / shown_count
    pair_count = held_out_pairs(accuracy, held_out_prompts, alpha)
    # The smallest number of held-out prompts that is enough, and the number of inputs that has so many.
    least_prompts = next(k for k in range(MIN_PROMPTS, 10**6) if held_out_pairs(accuracy, k, alpha))
    # at least 1, since a split may have so few prompts that none of them is held out
    least_inputs = math.ceil(least_prompts * input_count / max(held_out_prompts, 1))
    return LabelGoal(
        accuracy=accuracy,
        held_out=pair_count or 0,
        prompts=held_out_prompts,
        pairs=None if pair_count is None else math.ceil(pair_count / held_out_share / (1 - TIES)),
        least_inputs=least_inputs,
    )


def held_out_pairs(accuracy: float, prompt_count: int, alpha: float) -> int | None:
    """Compute how many held-out pairs without a tie the test needs, see the module.

    Args:
        accuracy: true accuracy.
        prompt_count: number of prompts of the pairs.
        alpha: level of the two-sided test.
    Returns: number of pairs. The result is None if no number is enough, because there are too few prompts.
    """
    from scipy.special import ndtri, stdtrit

    if prompt_count < MIN_PROMPTS:
        return None
    z = ndtri(POWER)
    widening = (stdtrit(prompt_count - 1, 1 - alpha / 2) + z) / (ndtri(1 - alpha / 2) + z)
    independent_count = decided_trials(accuracy, alpha, POWER) * widening**2
    # n = independent_count (1 + (n / k - 1) c), solved for n
    denominator = 1 - independent_count * PROMPT_CORRELATION / prompt_count
    # Near 0, the number of pairs would be larger than any collection of assets has.
    if denominator <= 0.02:
        return None
    correlated_count = independent_count * (1 - PROMPT_CORRELATION) / denominator
    return math.ceil(max(independent_count, correlated_count))


@dataclass(frozen=True, kw_only=True)
class Times:
    """Estimated times on a device in seconds, and the operations from which they follow."""

    asset_operations: float  # operations of sampling one asset
    update_operations: float  # operations of one update of every tuned stage together
    rate: float  # operations per second
    sample: float  # sampling for the labels
    tune: float  # training, with the control
    study: float  # sampling for the study


def estimate_times(
    plan: Plan, rows: Sequence[Row], *, card: str | None, steps: int, batch: int, stages: Sequence[str]
) -> Times:
    """Estimate the times of all steps from the operations of one sample and of one update.

    Args:
        plan: numbers of samples.
        rows: estimates of all stages for a batch of one; with times if `card` is None.
        card: name of a card, a key of CARDS; None for the device on which the rows were measured.
        steps: number of updates of each training.
        batch: number of pairs of an update.
        stages: names of the stages that are tuned.
    """
    samples = [row for row in rows if row.what == "sample"]
    updates = [row for row in rows if row.what != "sample" and not row.recompute and row.stage in stages]
    if card is None:
        # every row has the same measured rate
        assert samples[0].seconds is not None
        rate = samples[0].flops / samples[0].seconds
    else:
        rate = SHARE_OF_PEAK * CARDS[card].peak * 1e12
    asset_operations = float(sum(row.flops for row in samples))
    update_operations = float(batch * sum(row.flops for row in updates))
    return Times(
        asset_operations=asset_operations,
        update_operations=update_operations,
        rate=rate,
        sample=plan.assets * asset_operations / rate,
        # 2: the control is trained for as long
        tune=2 * steps * update_operations / rate,
        study=plan.study_assets * asset_operations / rate,
    )


def bytes_per_asset(work: Work) -> float | None:
    """Return the mean size of a sampled asset with its latents in bytes, or None before the first asset."""
    folder = work.asset_folder(BASE)
    # Files of an asset begin with the number of its prompt and its seed; lists and notes do not count.
    sizes: dict[str, int] = {}
    for path in folder.glob("[0-9]*-[0-9]*") if (folder / IDENTITY).is_file() else ():
        stem = "-".join(path.name.split(".")[0].split("-")[:2])
        sizes[stem] = sizes.get(stem, 0) + path.stat().st_size
    return sum(sizes.values()) / len(sizes) if sizes else None


def generator_bytes(work: Work) -> int:
    """Return the size of the generator's files in bytes, which an export needs again."""
    # an entry is [hash, size in bytes, time of the last change]
    return sum(int(size) for _, size, *_ in work.files.values())
