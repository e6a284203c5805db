"""Test whether labels carry a learnable signal, by the accuracy of a stage's implicit reward on pairs of
prompts that were not trained on.

The margin of a pair is that of DPO, (e_ref - e)_preferred - (e_ref - e)_rejected, with e the flow-matching
errors (Wallace et al. 2023, equation 14). It is averaged over a few seeded times and noises that both samples
of the pair, the policy and its reference share. A pair is ordered correctly if its margin is above 0. A
margin of 0, as before the first update, counts one half. The test needs forward passes alone, and no
evaluator.

To separate learnable labels from random answers, a network is chosen on pairs of some prompts, and its
accuracy is measured on pairs of others. A control is trained in the same way on the same pairs, with half of
each prompt's pairs inverted. The labels carry a learnable signal if the interval of the accuracy is above one
half, that of the difference from the control is above 0, and an update was kept.

A margin also grows if both errors rise and the rejected one rises more. The network then orders pairs well
but generates worse assets, which are far from the preferred ones, too. This likelihood displacement is
reported if the interval of the preferred samples' rise in error is above 0.

Letters: P pairs, K draws of a time and a noise.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from eg3d_rlhf.core.statistics import clustered_mean, clustered_rate
from eg3d_rlhf.models.sparse import single
from eg3d_rlhf.tuning.flow.base.pairs import PreferencePair
from eg3d_rlhf.tuning.flow.base.sampling import evaluating
from eg3d_rlhf.tuning.flow.training.conditioned_stage import ConditionedStage
from eg3d_rlhf.tuning.flow.training.dpo import PairDraw, PairErrors, draw_pairs
from eg3d_rlhf.tuning.flow.training.reference import FrozenModel
from eg3d_rlhf.tuning.flow.training.settings import DpoConfig
from training.phases import derive_seed

DRAWS = 4  # K, times and noises of a pair
LEAST_CONDITIONS = 3  # prompts with labels; with fewer, no interval can exclude one half
# largest probability that one stage or more passes the test where all answers were given at random
FALSE_ALARMS = 0.05


class PairAccuracy:
    """Evaluator of networks on pairs that are not trained on, at the same times and noises for every network.

    Args: draws: K; batch: pairs per forward pass; seed: of times and noises.
    """

    def __init__(
        self,
        conditioned: ConditionedStage,
        pairs: Sequence[PreferencePair],
        draws: int = DRAWS,
        batch: int = 8,
        seed: int = 0,
    ):
        assert pairs
        self.conditioned = conditioned
        self.stage = conditioned.stage
        self.pairs = list(pairs)
        self.draws = draws
        self.batch = batch
        # a name of its own, so that no time or noise of the training occurs here
        self.seed = derive_seed("held-out pairs", seed) % 2**31
        # reference errors by (draw, first pair of the batch); computed once, as a reference does not change
        self._of_reference: dict[tuple[int, int], torch.Tensor] = {}

    def measure(self, model: torch.nn.Module, reference: FrozenModel) -> "Measured":
        """Average margins and rises in error over the draws.

        Args: reference: must be the same network at every call.
        """
        device = next(model.parameters()).device
        sums = np.zeros((3, len(self.pairs)))  # margin, rise of the preferred error, its reference error
        for draw in range(self.draws):
            for at in range(0, len(self.pairs), self.batch):
                part = self.pairs[at : at + self.batch]
                cond = self.conditioned.conditions([pair.condition for pair in part])
                # the draw takes the place of the epoch: another time and noise each
                drawn = draw_pairs(self.stage, part, cond, None, DpoConfig(), self.seed, draw, device)
                if (draw, at) not in self._of_reference:
                    self._of_reference[draw, at] = reference.errors(self.stage, drawn)
                errors = PairErrors.split(self._errors(model, drawn), self._of_reference[draw, at])
                assert errors.ref_preferred is not None
                # [3, p]
                figures = torch.stack(
                    [errors.delta(), errors.preferred - errors.ref_preferred, errors.ref_preferred]
                )
                sums[:, at : at + len(part)] += figures.double().cpu().numpy()
        margins, rises, reference_errors = sums / self.draws
        # one scale for all pairs: a quotient for each pair would be dominated by pairs of small errors
        return Measured(margins, rises / reference_errors.mean())

    @torch.no_grad()
    def _errors(self, model: torch.nn.Module, draw: PairDraw) -> torch.Tensor:
        """Compute a network's flow-matching errors [2p] of sampled pairs."""
        # `evaluating` switches dropout off for the time of the call
        with evaluating(model):
            v = self.stage.velocity(draw.x_t, draw.t, draw.cond, model)
        return self.stage.path.errors(single(v), draw.x_0, draw.eps).float()

    def figures(self, model: torch.nn.Module, reference: FrozenModel) -> dict[str, float]:
        """Return the figures that are logged in training: means of `measure` over the pairs."""
        measured = self.measure(model, reference)
        return {
            "held_out_accuracy": float(ordered(measured.margins).mean()),
            "held_out_margin": float(measured.margins.mean()),
            "held_out_preferred": float(measured.preferred.mean()),
        }


@dataclass(frozen=True)
class Measured:
    """Measurements of pairs, float64 [P] each."""

    margins: np.ndarray
    # rise of the error of the preferred samples, in units of the reference's mean error of them
    preferred: np.ndarray


def ordered(margins: np.ndarray) -> np.ndarray:
    """Score the order of pairs [P]: 1 if correct, 0 if wrong, one half for a margin of 0."""
    return 0.5 * (1 + np.sign(margins))


def half_inverted(pairs: Sequence[PreferencePair], seed: int) -> list[PreferencePair]:
    """Make the control's pairs: invert a random half of the pairs of each prompt.

    For an odd number of pairs, the larger and the smaller half are inverted in turn from prompt to prompt. So
    for every seed, no signal of the labels is left on average, and at most that of one pair in a prompt.
    The choice depends on ids alone: pairs of the same assets at another stage are inverted alike.
    """
    # sorted by id, so that the order of the list has no influence
    places: dict[str, list[int]] = {}
    for place, pair in sorted(enumerate(pairs), key=lambda entry: entry[1].id):
        places.setdefault(pair.condition, []).append(place)
    rng = np.random.default_rng(derive_seed("shuffled", seed))
    inverted_places = set[int]()
    more = bool(rng.integers(2))
    for condition in rng.permutation(sorted(places)).tolist():
        of_condition = rng.permutation(places[condition])
        inverted_places |= set(of_condition[: (len(of_condition) + more) // 2].tolist())
        # changes sides only after an odd number, which is where the halves differ
        more ^= len(of_condition) % 2 == 1
    return [
        (
            replace(
                p,
                preferred=p.rejected,
                rejected=p.preferred,
                reward_preferred=p.reward_rejected,
                reward_rejected=p.reward_preferred,
            )
            if place in inverted_places
            else p
        )
        for place, p in enumerate(pairs)
    ]


# The test.


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Accuracy of a network on pairs that were used neither to train nor to choose it."""

    accuracy: float  # in 0..1
    interval: tuple[float, float]  # of the accuracy
    margin: float  # mean over the pairs
    pairs: int  # number of pairs
    conditions: int  # number of prompts; the name is a JSON key
    outcomes: tuple[float, ...] = ()  # [P]; see ordered
    # rise in error of the preferred samples, see Measured, with its interval; None: not measured
    preferred: tuple[float, float, float] | None = None

    def shown(self) -> dict:
        """Return the accuracy as JSON."""
        return {
            "accuracy": self.accuracy,
            "interval": list(self.interval),
            "margin": self.margin,
            "pairs": self.pairs,
            "conditions": self.conditions,
            "preferred_error": None if self.preferred is None else list(self.preferred),
        }

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.accuracy:.3f} [{low:.3f}, {high:.3f}]"


def confidence_of(stages: int) -> float:
    """Compute the confidence of two-sided intervals for a test of several stages.

    All stages together raise a false alarm in at most FALSE_ALARMS of all cases. The confidence is 95 % for
    one or two stages.

    >>> confidence_of(2), round(confidence_of(4), 4)
    (0.95, 0.975)
    """
    # only one side of an interval can raise an alarm, hence the factor 2 (Bonferroni over the stages)
    return 1 - 2 * FALSE_ALARMS / max(stages, 2)


def check_enough(prompts: Sequence[str]) -> set[str]:
    """Return the set of the prompts of held-out pairs. Raises: ValueError for fewer than LEAST_CONDITIONS."""
    names = set(prompts)
    if len(names) < LEAST_CONDITIONS:
        remedy = "Label assets of more images or texts, or hold more of them out"
        raise ValueError(
            f"held-out pairs: expected {LEAST_CONDITIONS} prompts or more with labels, got {len(names)}."
            f" {remedy}."
        )
    return names


def accuracy_of(
    margins: np.ndarray,
    prompts: Sequence[str],
    confidence: float = 0.95,
    preferred: np.ndarray | None = None,
) -> Accuracy:
    """Compute the accuracy from the margins of pairs [P], with an interval clustered by their prompts [P].

    Args: preferred: see Measured.

    Raises: ValueError for fewer prompts than LEAST_CONDITIONS.
    """
    names = check_enough(prompts)
    outcomes = ordered(margins)
    # pairs of one prompt are not independent, so prompts and not pairs are the units of the interval
    rate, low, high = clustered_rate(outcomes, prompts, confidence)
    rise = None if preferred is None else clustered_mean(preferred, prompts, confidence)
    return Accuracy(
        accuracy=rate,
        interval=(low, high),
        margin=float(margins.mean()),
        pairs=len(outcomes),
        conditions=len(names),
        outcomes=tuple(outcomes.tolist()),
        preferred=rise,
    )


@dataclass(frozen=True, kw_only=True)
class SignalTest:
    """Result of the test of a stage's labels against chance and the control."""

    learnable_signal: bool  # the result of the test
    why: str  # reason of the result, as part of a sentence
    # mean difference of the outcomes and its interval; None: no control
    above_control: tuple[float, float, float] | None = None
    likelihood_displacement: bool = False


def signal_test(
    kept_step: int,
    tuned: Accuracy,
    control: Accuracy | None,
    prompts: Sequence[str],
    confidence: float = 0.95,
) -> SignalTest:
    """Test the labels of a stage for a learnable signal.

    Args: kept_step: number of updates of the tuned network, 0 for the base; control: accuracy of the control
        on the same pairs; prompts: [P], of the pairs.
    """
    above = None
    if control is not None:
        # pair by pair: the difference of two accuracies on the same pairs varies less than either
        above = clustered_mean(np.subtract(tuned.outcomes, control.outcomes), prompts, confidence)
    # The base has margins of 0, so that all its pairs count one half.
    if kept_step == 0:
        return SignalTest(
            learnable_signal=False,
            why="on the pairs to choose on, no update was better than the untuned network",
            above_control=above,
        )
    if tuned.interval[0] <= 0.5:
        return SignalTest(
            learnable_signal=False,
            why=f"the interval of the accuracy, {tuned}, includes 50 %",
            above_control=above,
        )
    if above is not None and above.lo <= 0:
        why = (
            f"it is not above the control with randomised labels ({above.mean:+.3f} [{above.lo:+.3f},"
            f" {above.hi:+.3f}])"
        )
        return SignalTest(learnable_signal=False, why=why, above_control=above)
    beside = (
        ""
        if above is None
        else (
            f", and {above.mean:+.3f} [{above.lo:+.3f}, {above.hi:+.3f}] above the control with randomised"
            " labels"
        )
    )
    why = f"accuracy {tuned} is above 50 %{beside}"
    # reported beside the result: pairs can be ordered well by a network that generates worse assets
    displaced = tuned.preferred is not None and tuned.preferred[1] > 0
    return SignalTest(learnable_signal=True, why=why, above_control=above, likelihood_displacement=displaced)
