"""Test whether labels carry a learnable signal, by the accuracy of a stage's implicit reward on pairs of
prompts that were not trained on.

The margin of a pair is that of DPO, (e_ref - e)_preferred - (e_ref - e)_rejected, with e the flow-matching
errors (Wallace et al. 2023, equation 14). The margin is averaged over a few seeded times and noises, which
are the same for both samples of the pair, and for the policy and its reference. A pair is ordered correctly
if its margin is above 0. A margin of 0, as before the first update, counts one half. The test needs only
forward passes, and no evaluator.

To separate learnable labels from random answers, a network is chosen on pairs of some prompts, and its
accuracy is measured on pairs of others. A control is trained in the same way on the same pairs, with half of
each prompt's pairs inverted. The labels carry a learnable signal if three conditions hold: the interval of
the accuracy is above one half, the interval of the difference from the control is above 0, and the kept
network is not the untuned one.

A margin also grows if both errors rise and the rejected one rises more. The network then orders pairs well
but generates worse assets, which are also far from the preferred assets. This likelihood displacement is
reported if the interval of the preferred samples' rise in error is above 0.

Shapes: P pairs, K draws of a time and a noise.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from eg3d_rlhf.core.statistics import clustered_mean, clustered_rate, decimals_apart
from eg3d_rlhf.models.sparse import single
from eg3d_rlhf.tuning.flow.base.pairs import PreferencePair
from eg3d_rlhf.tuning.flow.base.sampling import evaluating
from eg3d_rlhf.tuning.flow.training.conditioned_stage import ConditionedStage
from eg3d_rlhf.tuning.flow.training.dpo import PairDraw, PairErrors, draw_pairs
from eg3d_rlhf.tuning.flow.training.reference import FrozenModel
from eg3d_rlhf.tuning.flow.training.settings import DpoConfig
from training.phases import derive_seed

DRAWS = 4  # K, the number of times and noises at which a pair is measured
MIN_PROMPTS = 3  # smallest number of labelled prompts; with fewer, no interval can exclude one half
# largest probability that at least one stage passes the test although all answers were given at random
FALSE_ALARMS = 0.05


class PairAccuracy:
    """Evaluator of networks on held-out pairs, with the same times and noises for every network.

    Args:
        conditioned_stage: stage of the networks.
        pairs: the P pairs, at least one.
        draws: number K of (time, noise) at which each pair is measured.
        batch: number of pairs in a forward pass.
        seed: seed of the times and noises.
    """

    def __init__(
        self,
        conditioned_stage: ConditionedStage,
        pairs: Sequence[PreferencePair],
        draws: int = DRAWS,
        batch: int = 8,
        seed: int = 0,
    ):
        assert pairs
        self.conditioned_stage = conditioned_stage
        self.stage = conditioned_stage.stage
        self.pairs = list(pairs)
        self.draws = draws
        self.batch = batch
        # derived by another name than in training, so that no time or noise of the training occurs here
        self.seed = derive_seed("held-out pairs", seed) % 2**31
        # reference errors by (draw, first pair of the batch); computed once, as a reference does not change
        self._reference_errors: dict[tuple[int, int], torch.Tensor] = {}

    def measure(self, model: torch.nn.Module, reference: FrozenModel) -> "Measured":
        """Measure each pair's margin, and its preferred sample's rise in error, as means over the K draws.

        Args:
            model: network to evaluate.
            reference: reference network; it must be the same at every call, since its errors are cached.
        """
        device = next(model.parameters()).device
        # rows: margin, rise of the preferred error, reference's preferred error
        measurement_sums = np.zeros((3, len(self.pairs)))
        for draw_number in range(self.draws):
            for batch_start in range(0, len(self.pairs), self.batch):
                batch_pairs = self.pairs[batch_start : batch_start + self.batch]
                cond = self.conditioned_stage.conditioning([pair.condition for pair in batch_pairs])
                # the number of the draw is passed as the epoch, so that each draw has another time and noise
                pair_draw = draw_pairs(
                    self.stage, batch_pairs, cond, None, DpoConfig(), self.seed, draw_number, device
                )
                if (draw_number, batch_start) not in self._reference_errors:
                    self._reference_errors[draw_number, batch_start] = reference.errors(self.stage, pair_draw)
                errors = PairErrors.split(
                    self._errors(model, pair_draw), self._reference_errors[draw_number, batch_start]
                )
                assert errors.ref_preferred is not None
                # [3, p]
                measurements = torch.stack(
                    [errors.delta(), errors.preferred - errors.ref_preferred, errors.ref_preferred]
                )
                measurement_sums[:, batch_start : batch_start + len(batch_pairs)] += (
                    measurements.double().cpu().numpy()
                )
        # means over the draws, [P] each
        margins, rises, reference_errors = measurement_sums / self.draws
        # one scale for all pairs: a quotient for each pair would be dominated by pairs of small errors
        return Measured(margins, rises / reference_errors.mean())

    @torch.no_grad()
    def _errors(self, model: torch.nn.Module, pair_draw: PairDraw) -> torch.Tensor:
        """Compute a network's flow-matching errors of p pairs with their times and noises, [2p]."""
        # `evaluating` switches dropout off for the time of the call
        with evaluating(model):
            v = self.stage.velocity(pair_draw.x_t, pair_draw.t, pair_draw.cond, model)
        return self.stage.path.errors(single(v), pair_draw.x_0, pair_draw.eps).float()

    def metrics(self, model: torch.nn.Module, reference: FrozenModel) -> dict[str, float]:
        """Return the metrics that are logged in training: accuracy, mean margin and mean rise in error."""
        measurement = self.measure(model, reference)
        return {
            "held_out_accuracy": float(score_order(measurement.margins).mean()),
            "held_out_margin": float(measurement.margins.mean()),
            "held_out_preferred": float(measurement.preferred.mean()),
        }


@dataclass(frozen=True)
class Measured:
    """Measurements of a network on P pairs, float64 [P] each."""

    margins: np.ndarray  # margins of DPO, see the module
    # rise of the error of the preferred samples, in units of the reference's mean error of them
    preferred: np.ndarray


def score_order(margins: np.ndarray) -> np.ndarray:
    """Score the order of pairs [P]: 1 if correct, 0 if wrong, one half for a margin of 0."""
    # np.sign gives -1, 0 or 1, which become 0, one half and 1
    return 0.5 * (1 + np.sign(margins))


def invert_half(pairs: Sequence[PreferencePair], seed: int) -> list[PreferencePair]:
    """Make the control's pairs: invert a random half of each prompt's pairs (exchange the two samples).

    If a prompt has an odd number of pairs, its halves differ by one pair. The larger and the smaller half are
    then inverted alternately from prompt to prompt. So the labels carry no signal on average over the
    prompts, and at most the signal of one pair within a prompt. The choice depends on ids alone: pairs of the
    same assets at another stage are inverted alike.
    """
    # sorted by id, so that the order of the list has no influence
    indices_by_prompt: dict[str, list[int]] = {}  # prompt -> indices of its pairs
    for pair_index, pair in sorted(enumerate(pairs), key=lambda numbered_pair: numbered_pair[1].id):
        indices_by_prompt.setdefault(pair.condition, []).append(pair_index)
    # the stream has the name of version 0.1, so that a seed inverts the same pairs as there
    rng = np.random.default_rng(derive_seed("shuffled", seed))
    inverted_indices = set[int]()
    invert_larger_half = bool(rng.integers(2))
    for prompt in rng.permutation(sorted(indices_by_prompt)).tolist():
        shuffled_indices = rng.permutation(indices_by_prompt[prompt])
        # + True rounds half of an odd number up, + False rounds it down
        inverted_count = (len(shuffled_indices) + invert_larger_half) // 2
        inverted_indices |= set(shuffled_indices[:inverted_count].tolist())
        # alternates only after an odd number, since the halves of an even number are equal
        invert_larger_half ^= len(shuffled_indices) % 2 == 1
    return [
        (
            replace(
                p,
                preferred=p.rejected,
                rejected=p.preferred,
                reward_preferred=p.reward_rejected,
                reward_rejected=p.reward_preferred,
            )
            if pair_index in inverted_indices
            else p
        )
        for pair_index, p in enumerate(pairs)
    ]


# The test.


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Accuracy of a network on pairs that were used neither to train nor to choose it."""

    accuracy: float  # in 0..1
    interval: tuple[float, float]  # lower and upper end of the interval of the accuracy
    margin: float  # mean margin over the pairs
    pairs: int  # number of pairs
    prompts: int  # number of prompts; its JSON key is "conditions"
    outcomes: tuple[float, ...] = ()  # [P], 1, 0 or one half for each pair; see score_order
    # (mean, low, high): mean rise in error of the preferred samples (see Measured) and its interval; None:
    # not measured
    preferred: tuple[float, float, float] | None = None

    def to_json(self) -> dict:
        """Return the accuracy as JSON."""
        return {
            "accuracy": self.accuracy,
            "interval": list(self.interval),
            "margin": self.margin,
            "pairs": self.pairs,
            "conditions": self.prompts,
            "preferred_error": None if self.preferred is None else list(self.preferred),
        }

    def __str__(self) -> str:
        low, high = self.interval
        # The interval decides whether the accuracy is above one half, so rounding must not hide its ends.
        digits = decimals_apart((low, high), 0.5, 3)
        return f"{self.accuracy:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def compute_confidence(stage_count: int) -> float:
    """Compute the confidence, in 0..1, of the two-sided intervals in a test of several stages.

    With this confidence, the probability that at least one stage passes the test by chance is at most
    FALSE_ALARMS. The confidence is 95 % for one or two stages.

    >>> compute_confidence(2), round(compute_confidence(4), 4)
    (0.95, 0.975)
    """
    # only one side of an interval can raise an alarm, hence the factor 2 (Bonferroni over the stages)
    return 1 - 2 * FALSE_ALARMS / max(stage_count, 2)


def check_enough(prompts: Sequence[str]) -> set[str]:
    """Return the different prompts among the prompts of held-out pairs, and check their number.

    Raises: ValueError if there are fewer than MIN_PROMPTS different prompts.
    """
    distinct_prompts = set(prompts)
    if len(distinct_prompts) < MIN_PROMPTS:
        raise ValueError(
            f"held-out pairs: labels of at least {MIN_PROMPTS} held-out prompts are needed, got"
            f" {len(distinct_prompts)}. Label assets of more prompts, or hold more prompts out."
        )
    return distinct_prompts


def compute_accuracy(
    margins: np.ndarray,
    prompts: Sequence[str],
    confidence: float = 0.95,
    preferred_rises: np.ndarray | None = None,
) -> Accuracy:
    """Compute the accuracy from the margins of pairs, with an interval that is clustered by their prompts.

    Args:
        margins: margins of the pairs, [P].
        prompts: prompts of the pairs, [P].
        confidence: confidence of the intervals, in 0..1.
        preferred_rises: rises in error of the preferred samples, [P], see Measured; None: not measured.

    Raises: ValueError for fewer prompts than MIN_PROMPTS.
    """
    distinct_prompts = check_enough(prompts)
    outcomes = score_order(margins)
    # pairs of one prompt are not independent, so prompts and not pairs are the units of the interval
    rate, low, high = clustered_rate(outcomes, prompts, confidence)
    preferred_rise = None if preferred_rises is None else clustered_mean(preferred_rises, prompts, confidence)
    return Accuracy(
        accuracy=rate,
        interval=(low, high),
        margin=float(margins.mean()),
        pairs=len(outcomes),
        prompts=len(distinct_prompts),
        outcomes=tuple(outcomes.tolist()),
        preferred=preferred_rise,
    )


@dataclass(frozen=True, kw_only=True)
class SignalTest:
    """Result of the test of a stage's labels against chance and the control."""

    learnable_signal: bool  # the result of the test
    why: str  # reason for the result, as part of a sentence
    # (mean, low, high): mean difference of the outcomes from the control and its interval; None: no control
    above_control: tuple[float, float, float] | None = None
    likelihood_displacement: bool = False  # whether the errors of the preferred samples rose


def signal_test(
    kept_step: int,
    tuned_accuracy: Accuracy,
    control_accuracy: Accuracy | None,
    prompts: Sequence[str],
    confidence: float = 0.95,
) -> SignalTest:
    """Test the labels of a stage for a learnable signal.

    Args:
        kept_step: number of updates of the network that was kept; 0: the untuned network was kept.
        tuned_accuracy: accuracy of the tuned network.
        control_accuracy: accuracy of the control on the same pairs; None: no control was trained.
        prompts: prompts of the pairs, [P].
        confidence: confidence of the interval of the difference from the control, in 0..1.
    """
    control_difference = None
    if control_accuracy is not None:
        # pair by pair: the difference of two accuracies on the same pairs varies less than either
        control_difference = clustered_mean(
            np.subtract(tuned_accuracy.outcomes, control_accuracy.outcomes), prompts, confidence
        )
    # The base has margins of 0, so that all its pairs count one half.
    if kept_step == 0:
        return SignalTest(
            learnable_signal=False,
            why="on the pairs to choose on, no update was better than the untuned network",
            above_control=control_difference,
        )
    if tuned_accuracy.interval[0] <= 0.5:
        return SignalTest(
            learnable_signal=False,
            why=f"the interval of the accuracy, {tuned_accuracy}, is not above 50 %",
            above_control=control_difference,
        )
    if control_difference is not None and control_difference.lo <= 0:
        why = (
            f"the accuracy is not above the control with randomised labels ({control_difference.mean:+.3f}"
            f" [{control_difference.lo:+.3f}, {control_difference.hi:+.3f}])"
        )
        return SignalTest(learnable_signal=False, why=why, above_control=control_difference)
    why = f"accuracy {tuned_accuracy} is above 50 %"
    if control_difference is not None:
        why += (
            f", and {control_difference.mean:+.3f} [{control_difference.lo:+.3f},"
            f" {control_difference.hi:+.3f}] above the control with randomised labels"
        )
    # reported beside the result: pairs can be ordered well by a network that generates worse assets
    # index 1 is the lower end of the interval
    likelihood_displaced = tuned_accuracy.preferred is not None and tuned_accuracy.preferred[1] > 0
    return SignalTest(
        learnable_signal=True,
        why=why,
        above_control=control_difference,
        likelihood_displacement=likelihood_displaced,
    )
