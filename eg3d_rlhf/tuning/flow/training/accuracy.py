"""Whether people's labels taught a stage anything: the accuracy of its implicit reward on pairs of conditions
that it never saw.

The margin of a pair is that of DPO, (e_ref - e)_preferred - (e_ref - e)_rejected with e the flow-matching
errors (Wallace et al. 2023, equation 14), at a few seeded times and noises that both members, the policy and
its reference share. A pair is ordered rightly where the margin is above 0; at 0, as before the first update,
it counts half. It takes forward passes alone, and no evaluator.

Answers given at random are told from learnable ones so: a network is chosen on pairs of some conditions, its
accuracy is taken on pairs of others, and beside it that of a control, trained alike on the same pairs with
half of each condition's turned over. Labels are learnt where the interval of the accuracy is above one half,
that of the difference from the control is above 0, and an update was kept.

A margin grows too where both errors rise, if the rejected ones' rises more: the network then orders pairs
well and draws worse assets, far from what people preferred as well. It runs away where the error of the
preferred ones rose, by an interval above 0.

Letters: P pairs, K draws.
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

DRAWS = 4  # times and noises of a pair
LEAST_CONDITIONS = 3  # with labels, that a verdict is given on; of fewer no interval can leave one half out
# largest probability that one stage or more passes the test where all answers were given at random
FALSE_ALARMS = 0.05


class PairAccuracy:
    """Pairs that are not trained on, measured the same way whatever the network.

    Args: draws: K; batch: pairs at once; seed: of times and noises.
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
        self.seed = derive_seed("held-out pairs", seed) % 2**31
        # errors by draw and place: a reference does not change
        self._of_reference: dict[tuple[int, int], torch.Tensor] = {}

    def measure(self, model: torch.nn.Module, reference: FrozenModel) -> "Measured":
        """Means over the draws. Args: reference: the same at every call."""
        device = next(model.parameters()).device
        sums = np.zeros((3, len(self.pairs)))
        for draw in range(self.draws):
            for at in range(0, len(self.pairs), self.batch):
                part = self.pairs[at : at + self.batch]
                cond = self.conditioned.conditions([pair.condition for pair in part])
                drawn = draw_pairs(self.stage, part, cond, None, DpoConfig(), self.seed, draw, device)
                if (draw, at) not in self._of_reference:
                    self._of_reference[draw, at] = reference.errors(self.stage, drawn)
                errors = PairErrors.split(self._errors(model, drawn), self._of_reference[draw, at])
                assert errors.ref_preferred is not None
                found = torch.stack(
                    [errors.delta(), errors.preferred - errors.ref_preferred, errors.ref_preferred]
                )
                sums[:, at : at + len(part)] += found.double().cpu().numpy()
        margins, more, before = sums / self.draws
        return Measured(margins, more / before.mean())

    @torch.no_grad()
    def _errors(self, model: torch.nn.Module, draw: PairDraw) -> torch.Tensor:
        with evaluating(model):
            v = self.stage.velocity(draw.x_t, draw.t, draw.cond, model)
        return self.stage.path.errors(single(v), draw.x_0, draw.eps).float()

    def figures(self, model: torch.nn.Module, reference: FrozenModel) -> dict[str, float]:
        """What is logged while training; see margins."""
        found = self.measure(model, reference)
        return {
            "held_out_accuracy": float(ordered(found.margins).mean()),
            "held_out_margin": float(found.margins.mean()),
            "held_out_preferred": float(found.preferred.mean()),
        }


@dataclass(frozen=True)
class Measured:
    """Of pairs, float64 [P] each."""

    margins: np.ndarray
    # what the error of the preferred ones rose by, in units of the reference's mean error of them
    preferred: np.ndarray


def ordered(margins: np.ndarray) -> np.ndarray:
    """1 where a pair is ordered rightly, 0 where wrongly, one half at a margin of 0; [P]."""
    return 0.5 * (1 + np.sign(margins))


def half_inverted(pairs: Sequence[PreferencePair], seed: int) -> list[PreferencePair]:
    """The control's pairs: of each condition half, drawn, are turned over; of an odd number, which half is
    larger alternates.

    Nothing of the labels is left to learn in the mean, whatever the draw, and in no condition by more than
    one pair. The draw goes by ids: pairs of the same assets at another stage are turned alike.
    """
    places: dict[str, list[int]] = {}
    for place, pair in sorted(enumerate(pairs), key=lambda entry: entry[1].id):
        places.setdefault(pair.condition, []).append(place)
    rng = np.random.default_rng(derive_seed("shuffled", seed))
    turned = set[int]()
    more = bool(rng.integers(2))
    for condition in rng.permutation(sorted(places)).tolist():
        of_condition = rng.permutation(places[condition])
        turned |= set(of_condition[: (len(of_condition) + more) // 2].tolist())
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
            if place in turned
            else p
        )
        for place, p in enumerate(pairs)
    ]


# The test.


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Of a network on pairs that neither trained nor chose it."""

    accuracy: float
    interval: tuple[float, float]
    margin: float  # mean
    pairs: int
    conditions: int
    outcomes: tuple[float, ...] = ()  # [P]; see ordered
    # rise of their error, see Measured, with its interval; None: of no network
    preferred: tuple[float, float, float] | None = None

    def shown(self) -> dict:
        """JSON."""
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
    """Of two-sided intervals, so that all stages together raise a false alarm in FALSE_ALARMS of cases at
    most: 95 % for one or two.

    >>> confidence_of(2), round(confidence_of(4), 4)
    (0.95, 0.975)
    """
    return 1 - 2 * FALSE_ALARMS / max(stages, 2)


def check_enough(conditions: Sequence[str]) -> set[str]:
    """Those of held-out pairs, each once. Raises: ValueError for fewer than LEAST_CONDITIONS."""
    names = set(conditions)
    if len(names) < LEAST_CONDITIONS:
        remedy = "Label more pictures or texts, or hold more of them out"
        raise ValueError(
            f"held-out pairs: expected {LEAST_CONDITIONS} conditions or more with labels, got {len(names)}."
            f" {remedy}."
        )
    return names


def accuracy_of(
    margins: np.ndarray,
    conditions: Sequence[str],
    confidence: float = 0.95,
    preferred: np.ndarray | None = None,
) -> Accuracy:
    """Of the margins of pairs [P] and their conditions [P], which are the interval's clusters.

    Args: preferred: see Measured.

    Raises: ValueError for fewer conditions than LEAST_CONDITIONS.
    """
    names = check_enough(conditions)
    right = ordered(margins)
    rate, low, high = clustered_rate(right, conditions, confidence)
    rise = None if preferred is None else clustered_mean(preferred, conditions, confidence)
    return Accuracy(
        accuracy=rate,
        interval=(low, high),
        margin=float(margins.mean()),
        pairs=len(right),
        conditions=len(names),
        outcomes=tuple(right.tolist()),
        preferred=rise,
    )


@dataclass(frozen=True, kw_only=True)
class SignalTest:
    """Result of the test of a stage's labels against chance and the control."""

    learnable_signal: bool
    why: str
    # mean difference of the outcomes and its interval; None: no control
    above_control: tuple[float, float, float] | None = None
    likelihood_displacement: bool = False


def signal_test(
    kept_step: int,
    tuned: Accuracy,
    control: Accuracy | None,
    conditions: Sequence[str],
    confidence: float = 0.95,
) -> SignalTest:
    """Args: kept_step: updates behind the network, 0: the base; control: of the same pairs; conditions: [P]
    of the pairs.
    """
    above = None
    if control is not None:
        above = clustered_mean(np.subtract(tuned.outcomes, control.outcomes), conditions, confidence)
    if kept_step == 0:
        return SignalTest(
            learnable_signal=False,
            why="no update was better than none on the pairs to choose on",
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
    displaced = tuned.preferred is not None and tuned.preferred[1] > 0
    return SignalTest(learnable_signal=True, why=why, above_control=above, likelihood_displacement=displaced)
