"""The rungs of `report baselines`, from cheap to dear, and the inputs of a report.

A rung is one way to improve samples. A rung with a strength has several points, from weak to strong; the
others have one point. This module computes nothing.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

NOTHING = "nothing"
TRUNCATION = "truncation"
BEST_OF = "best-of"
FILTER = "filter"
PRINCIPAL = "principal-direction"
EIGENVECTOR = "eigenvector"
STEERING = "steering"
SEARCH = "search"
NETWORK = "tuning"
KINDS = (NOTHING, TRUNCATION, BEST_OF, FILTER, PRINCIPAL, EIGENVECTOR, STEERING, SEARCH, NETWORK)

TUNED = "tuned"  # keys of the rungs that a run of train.py made
STEERED_TUNED = "steered-tuned"
CONTROL = "control"  # tuned with λ_r = 0; the reference of images, no rung
STEERED_CONTROL = "steered-control"

BEST_OF_COUNTS = (2, 4, 8)  # numbers of samples among which the reward chooses
TRUNCATIONS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4)  # factors on --psi
MOVES = (-1.0, -0.5, 0.5, 1.0, 1.5, 2.0)  # thresholds t of moves along a direction, in standard deviations
STEPS = (5, 10, 20)  # steps of the search in w
LABEL_COUNTS = (25, 100)  # labels of steering, beside all labels
# A filter is applied where it changes more than this share of the volume: from never to everywhere.
SHARES = (math.inf, 0.5, 0.4, 0.3, 0.2, 0.15, 0.1, 0.05, 0.0)
CLOSING_RADII = (4, 8, 11, 14)  # voxels of a 64^3 grid
BACK_FILTERS = (
    "morphological closing",
    "median back",
    "mean back",
    "psi 0 at the back",
)  # families that know a back
GENERAL_FILTERS = ("morphological closing", "largest part", "fill holes", "blur .75")


@dataclass(frozen=True, kw_only=True)
class CollateralBound:
    """Largest collateral change at which a point is still shown. A metric that is None is not checked."""

    identity: float = 0.95  # smallest share of latents that keep their identity
    front: float = 0.1  # largest median distance by which fronts move, voxels of a 64^3 grid
    variety: float = 0.95  # smallest variety, relative to the untuned samples
    harm: float = 0.02  # largest share of intact samples that are degraded

    def exceeded_by(self, metrics: Mapping[str, float | None]) -> list[str]:
        """Return the names of the metrics of a point that exceed the bound."""

        def is_above(name: str, bound: float) -> bool:
            value = metrics.get(name)
            return value is not None and value > bound

        def is_below(name: str, bound: float) -> bool:
            value = metrics.get(name)
            return value is not None and value < bound

        checks = {
            "identity_kept": is_below("identity_kept", self.identity),
            "front_moved_voxels": is_above("front_moved_voxels", self.front),
            "variety": is_below("variety", self.variety),
            # One degraded sample is always allowed, since a share of few intact samples says little.
            "intact_degraded": is_above(
                "intact_degraded", max(self.harm, 1 / (metrics.get("intact") or math.inf))
            ),
        }
        return [name for name, is_exceeded in checks.items() if is_exceeded]


@dataclass(frozen=True, kw_only=True)
class Rung:
    """One way to improve samples."""

    key: str  # name in JSON and in the store
    title: str  # name in the table
    kind: str  # a name of KINDS
    strengths: tuple[float, ...] = (0.0,)  # from weak to strong; a single entry for a rung without strength
    strength_name: str = ""  # symbol of the strength in the table; "" for a rung without strength
    labels: int | None = 0  # number of labels that it needs, directly or for its reward; None: unknown
    networks: tuple[Path, ...] = ()  # network file of each training seed, for the kind NETWORK

    @property
    def is_same_sample(self) -> bool:
        """Return True if the rung changes the samples of the latents, False if it shows other samples."""
        return self.kind != BEST_OF

    def strength_text(self, strength: float) -> str:
        """Format a strength for the table, for example 't 1.5'; '' for a rung without strength."""
        if self.kind == FILTER and math.isinf(strength):
            return "never applied"
        return f"{self.strength_name} {strength:g}" if self.strength_name else ""


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Files and settings of a report. It is passed to worker processes, so it holds no networks."""

    network: Path | None  # generator before tuning; None: the bundled generator
    reward: Path  # reward that the rungs may use
    heldout_reward: Path | None  # reward that no rung uses
    labels: Path | None  # file of labels for steering
    runs: tuple[Path, ...] = ()  # tuned networks or runs, one for each training seed
    controls: tuple[Path, ...] = ()  # the same with λ_r = 0
    steered_runs: tuple[Path, ...] = ()  # tuned from a steered network
    steered_controls: tuple[Path, ...] = ()  # the same with λ_r = 0
    data: str = ""  # dataset of the image distance; "": none
    latents: int = 64  # number of held-out latents
    validation: int = 32  # number of validation latents, on which settings are chosen by the reward
    psi: float = 1.0  # truncation of all samples
    seed: int = 0  # shifts the held-out latents
    device: str = "cpu"
    has_ground_truth: bool = False  # True if each latent has a ground-truth head
    only: tuple[str, ...] = KINDS  # kinds of rungs that are measured


def label_subsets(label_count: int) -> list[int]:
    """Return the numbers of labels with which steering is measured: 25, 100 and all, as far as available."""
    return [*(count for count in LABEL_COUNTS if count < label_count), label_count]


def list_rungs(inputs: Inputs, label_count: int, reward_labels: int | None) -> list[Rung]:
    """List the rungs from cheap to dear.

    Args:
        inputs: files and settings of the report.
        label_count: number of labels in the file of `inputs.labels`; 0 without one.
        reward_labels: number of labels with which the reward was trained, which rungs need that use it; None
            if it is unknown.
    """
    has_back = inputs.has_ground_truth
    # With a ground truth, the filters act at the back alone, because the evaluator measures errors there.
    filter_names = BACK_FILTERS if has_back else GENERAL_FILTERS
    rungs = [
        Rung(key=NOTHING, title="nothing", kind=NOTHING),
        Rung(
            key=TRUNCATION,
            title="truncation",
            kind=TRUNCATION,
            # Relative to the psi of the report, so that the weakest point is close to the samples before.
            strengths=tuple(inputs.psi * factor for factor in TRUNCATIONS),
            strength_name="ψ",
        ),
        *(
            Rung(
                # Each count is a rung of its own, because its cost
                # for each sample is proportional to the count.
                key=f"{BEST_OF}-{count}",
                title=f"best of {count} by the reward",
                kind=BEST_OF,
                strengths=(float(count),),
                # A rung that uses the reward also needs the labels with which the reward was trained.
                labels=reward_labels,
            )
            for count in BEST_OF_COUNTS
        ),
        *(
            Rung(
                key=f"{FILTER} {name}",
                title=f"weighed filter: {name}",
                kind=FILTER,
                strengths=SHARES,
                strength_name="above share",
                labels=reward_labels,
            )
            for name in filter_names
        ),
        Rung(
            key=PRINCIPAL,
            title="principal direction of w, chosen by the reward",
            kind=PRINCIPAL,
            strengths=MOVES,
            strength_name="t",
            labels=reward_labels,
        ),
    ]
    # This direction needs to know where the back of a head is.
    if has_back:
        rungs.append(
            Rung(
                key=EIGENVECTOR,
                title="direction that changes backs most, chosen by the reward",
                kind=EIGENVECTOR,
                strengths=MOVES,
                strength_name="t",
                labels=reward_labels,
            )
        )
    rungs += [
        Rung(
            key=f"{STEERING}-{count}",
            title=f"steering by {count:,} labels",
            kind=STEERING,
            strengths=MOVES,
            strength_name="t",
            # Steering needs no trained reward, so these are its only labels.
            labels=count,
        )
        for count in (label_subsets(label_count) if label_count else [])
    ]
    rungs.append(
        Rung(
            key=SEARCH,
            title="search in w where the reward is low",
            kind=SEARCH,
            strengths=tuple(map(float, STEPS)),
            strength_name="steps",
            labels=reward_labels,
        )
    )
    # Networks come last: they cost a training, but nothing for each sample afterwards.
    trained_rungs = (
        (TUNED, "tuning", inputs.runs),
        (STEERED_TUNED, "steering, then tuning", inputs.steered_runs),
    )
    rungs += [
        Rung(key=key, title=title, kind=NETWORK, labels=reward_labels, networks=networks)
        for key, title, networks in trained_rungs
        if networks
    ]
    return [rung for rung in rungs if rung.kind in (NOTHING, *inputs.only)]


def control_rungs(inputs: Inputs) -> list[Rung]:
    """List the λ_r = 0 networks, whose images are the reference of the trained rungs."""
    return [
        Rung(key=key, title=key, kind=NETWORK, networks=networks)
        for key, networks in ((CONTROL, inputs.controls), (STEERED_CONTROL, inputs.steered_controls))
        if networks
    ]


def reference_of(rung: Rung, keys: Sequence[str]) -> str:
    """Return the key of the rung whose images are the reference of a rung's images.

    Args:
        rung: the rung.
        keys: keys of all measured rungs and controls.
    """
    # Continued training changes images even without a reward. The
    # λ_r = 0 network separates this change from that of the reward.
    reference = {TUNED: CONTROL, STEERED_TUNED: STEERED_CONTROL}.get(rung.key, NOTHING)
    if reference == STEERED_CONTROL and reference not in keys:
        reference = CONTROL
    return reference if reference in keys else NOTHING
