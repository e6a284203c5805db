"""Settings of a GAN run with or without a reward: a dataclass for each part, in one tree.

`control_differs` decides whether a run can be the control of another. This module does not import torch. The
defaults of each preset of networks and each task are in eg3d_rlhf/modes/gan.py.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from pathlib import Path

from eg3d_rlhf.core import bundled
from training.config import (
    DATA,
    RUN,
    GanConfig,
    Knobs,
    LoopConfig,
    NetworkConfig,
    built,
    check_knobs,
    knob,
    knobs_of,
    values_of,
)

# Titles under which --help lists flags.
REWARD = "Reward fine-tuning"
ROUNDS = "Preference rounds"
# Tasks: training from random weights, or from a network without a reward, or with one.
SCRATCH = "scratch"  # random initial weights
TUNING = "tuning"  # from a network, adversarial training only
REWARDED = "reward"  # from a network, with a reward
# Values of --round-labels.
SYNTHETIC = "synthetic"  # simulated annotator
PEOPLE = "people"
# Values of --round-start: the network from which a round's tuning starts.
PRETRAINED = "pretrained"  # the network of --init, in every round
LAST = "last"  # the tuned network of the round before
SHAPINGS = ("none", "standardised", "softplus", "reference")  # see eg3d_rlhf.tuning.gan.phase
NOSE_FLOORS = ("window", "violators")  # see eg3d_rlhf.tuning.gan.phase
DEMO_KIMG = 0.6  # length of the bundled tuning run, in thousands of images
# `control=False`: a run and its control may differ in these, since the control has no reward. `rare`: no flag
# of their own.
_rare_rounds_knob = functools.partial(knob, group=ROUNDS, rare=True)
_reward_knob = functools.partial(knob, group=REWARD, control=False)
_rare_reward_knob = functools.partial(_reward_knob, rare=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Settings that do not affect results."""

    desc: str | None = knob(None, "Text to add to the run folder's name.", RUN, flag=False, control=False)
    device: str = knob(
        "auto",
        "Device to run on; auto: a GPU if there is one.",
        RUN,
        choices=("auto", "cpu", "cuda"),
        flag=False,
        control=False,
    )
    workers: int | None = knob(
        None,
        "Number of single-threaded processes that read images in advance. 0: read in the training process."
        " Results do not depend on it.",
        DATA,
        low=0,
        high=64,
        shown="one per further core, at most 3; 0 for sets under 512 MB, which are kept in memory",
        control=False,
    )
    no_summary: bool = knob(
        False,
        "Skip the evaluation before and after tuning that ends a reward run.",
        RUN,
        flag=False,
        control=False,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Settings of the real images."""

    data: str = knob(
        bundled.DATA, "Training images, in EG3D's format.", DATA, metavar="ZIP|DIR|synthetic:people64"
    )
    cond: bool = knob(True, "Use the camera labels. This generator requires them.", DATA)
    mirror: bool = knob(False, "Add mirrored images, with mirrored poses.", DATA)

    def __post_init__(self):
        if not self.cond:
            raise ValueError(
                "--cond: expected True, because this generator takes its cameras from the labels, got False."
                " Leave --cond out."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """Settings of the reward phase."""

    lambda_r: float = _reward_knob(
        10.0, "Weight of the reward. With 0, the run is bitwise identical to GAN training.", low=0
    )
    lambda_sigma: float = _reward_knob(0.01, "Weight of the density-consistency term.", low=0)
    lambda_front: float = _rare_reward_knob(
        0.0, "Weight of the penalty on density that grows in front of the reference surface.", low=0
    )
    lambda_nose: float = _rare_reward_knob(
        0.0, "Weight of the penalty on faces nearer to the frontal camera than any untuned face.", low=0
    )
    nose_floor: str = _rare_reward_knob(
        "window",
        "Pixels over which the penalty of --lambda-nose is averaged: all of its window, or only those that"
        " are too"
        " near (violators, as published).",
        choices=NOSE_FLOORS,
    )
    consistency_gate: float = _reward_knob(
        1.0,
        "Weight of the density-consistency term for shapes that scored below HIGH of --reward-clip before"
        " tuning,"
        " as a share of its weight for the others. 1: the same for all.",
        metavar="SHARE",
        low=0,
        high=1,
    )
    reward_clip: str = _reward_knob(
        "-10,10",
        "Bounds of the shaped reward (trust region). qSHARE is a quantile of the untuned scores, as in"
        " -10,q0.55.",
        metavar="LOW,HIGH|iqr|none",
    )
    reward_shaping: str = _reward_knob(
        "none", "Function of the score that the reward phase maximises.", choices=SHAPINGS
    )
    consistency_resolution: int = _reward_knob(
        64, "Grid points per edge of the cube on which the densities are compared.", low=2, flag=False
    )
    consistency_psi: float = _rare_reward_knob(
        0.7, "Truncation of the samples of the density-consistency term.", metavar="PSI", low=0
    )
    truncation_psi: float = 1.0  # truncation of the samples that the reward scores

    def __post_init__(self):
        check_knobs(self)
        _, high = clip_range(self.reward_clip)  # raises an error for a malformed value
        if self.consistency_gate == 1:
            return  # all samples have the same weight; nothing to check
        if self.lambda_sigma == 0:
            raise ValueError(
                f"--consistency-gate={self.consistency_gate:g} scales the term of --lambda-sigma, which is 0."
                " Set --lambda-sigma above 0, or leave --consistency-gate out."
            )
        # The upper bound separates the two groups of shapes. That of iqr is finite, but not known here.
        if high == float("inf") and self.reward_clip != "iqr":
            raise ValueError(
                f"--consistency-gate={self.consistency_gate:g} needs a --reward-clip with an upper bound"
                f" HIGH, got {self.reward_clip}. Write e.g. --reward-clip=-10,q0.55."
            )


def clip_range(spec: str, quantile: Callable[[float], float] | None = None) -> tuple[float, float]:
    """Return the bounds of the trust region for a value of --reward-clip.

    Args:
        spec: LOW,HIGH, each a number or qSHARE for a quantile of the untuned scores; iqr; none.
        quantile: function from a share in 0..1 to the quantile of the untuned shaped rewards. None: they are
            not known yet, and shares stand for their quantiles.
    Returns: low, high. They are infinite for none, and for iqr, whose bounds the reward phase computes.
    Raises: ValueError for any other value, and for bounds that are not LOW < HIGH.
    """
    # iqr has bounds as well, but they follow from scores that only the reward phase has.
    if spec in ("none", "iqr"):
        return -float("inf"), float("inf")
    try:
        low, high = (_bound(part, quantile or float) for part in spec.split(","))
    except ValueError:
        low = high = math.nan  # malformed; reported below
    # Before the scores are known, a number cannot be compared with a quantile; two quantiles can.
    comparable = quantile is not None or spec.count("q") != 1
    if math.isnan(low) or comparable and not low < high:
        got = f"{spec!r}" if quantile is None else f"{spec!r}, with these scores {low:g},{high:g}"
        raise ValueError(
            f"--reward-clip: expected LOW,HIGH with LOW < HIGH, iqr or none, got {got}. Write e.g."
            " --reward-clip=-10,10."
        )
    return low, high


def _bound(part: str, quantile: Callable[[float], float]) -> float:
    """Return one bound. Raises: ValueError for text that is neither a number nor qSHARE."""
    number = float(part.removeprefix("q"))
    # float() also accepts "nan", which would pass no comparison.
    if math.isnan(number) or part.startswith("q") and not 0 <= number <= 1:
        raise ValueError(part)
    return quantile(number) if part.startswith("q") else number


@dataclasses.dataclass(frozen=True, kw_only=True)
class EarlyStopConfig:
    """Settings of the choice of the snapshot that a run keeps."""

    early_stop: float | None = _reward_knob(
        None,
        "Keep the snapshot that the held-out reward and the distance from the reference choose, not the last"
        " one. A"
        " snapshot that is further away must gain more than this, in standard errors.",
        metavar="STANDARD-ERRORS",
        low=0,
        shown="off: keep the last one",
    )
    early_stop_distance: float | None = _rare_reward_knob(
        None,
        "With --early-stop: largest distance of the snapshot that is kept, mean |σ - σ_ref| of raw"
        " densities.",
        metavar="DISTANCE",
        above=0,
        shown="no limit",
    )

    def __post_init__(self):
        check_knobs(self)
        # The limit is part of the rule, and would silently have no effect.
        if self.early_stop is None and self.early_stop_distance is not None:
            raise ValueError(
                f"--early-stop-distance={self.early_stop_distance:g} works with --early-stop only. Add"
                " --early-stop, or remove it."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoundConfig(Knobs):
    """Settings of preference rounds."""

    rounds: int = knob(
        0,
        "Number of preference rounds: labels, rewards, and tuning by --kimg each. 0: tune once, with"
        " --reward-ckpt.",
        ROUNDS,
        low=0,
    )
    round_pairs: int = knob(
        400, "Number of pairs to label in each round.", ROUNDS, metavar="PAIRS", low=1, high=10**5
    )
    round_labels: str = knob(
        SYNTHETIC,
        "Source of labels: the simulated annotator, or people, for whom the run waits.",
        ROUNDS,
        choices=(SYNTHETIC, PEOPLE),
    )
    round_doubtful: float = _rare_rounds_knob(
        0.5,
        "Share of pairs that are chosen by the disagreement of the last round's rewards. The others, and all"
        " pairs of the first round, are random.",
        metavar="0..1",
        low=0,
        high=1,
    )
    round_members: int = _rare_rounds_knob(
        5, "Number of rewards in the ensemble of a round.", low=1, high=100
    )
    round_preset: str | None = _rare_rounds_knob(
        None,
        "Architecture of the rewards, see tools/train_reward.py.",
        metavar="NAME",
        shown="the default of --reward",
    )
    round_aggregate: str | None = _rare_rounds_knob(
        None,
        "Function that combines the scores of the ensemble, see tools/train_reward.py.",
        metavar="NAME",
        shown="the mean of raw scores",
    )
    round_start: str = _rare_rounds_knob(
        PRETRAINED,
        "Network that the tuning of a round starts from: the pretrained one, or that of the last round.",
        choices=(PRETRAINED, LAST),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardSettings(Knobs):
    """Settings of the reward that tunes, of the held-out reward, and of the terms of the loss."""

    reward: str = knob(
        "none",
        "Kind of the reward that tunes the generator, such as sigma; none: GAN training only.",
        REWARD,
        metavar="none|KIND",
    )
    reward_ckpt: str | None = _reward_knob(
        None, "File of the trained reward.", metavar="FILE", shown="bundled"
    )
    heldout_reward: str | None = _reward_knob(
        None,
        "File of a held-out reward, which is measured but not trained on. It should not fall while the first"
        " rises.",
        metavar="FILE",
        shown="bundled",
    )
    reference: str | None = _reward_knob(
        None,
        "Network that the tuned one is compared with, in the density-consistency term and in reports.",
        flag=False,
        shown="the initial one",
    )
    terms: RewardConfig = RewardConfig()  # loss terms
    keeping: EarlyStopConfig = EarlyStopConfig()  # which snapshot is kept
    rlr: float = _rare_reward_knob(0.0025, "Learning rate of the reward phase.", above=0)
    control: str | None = _reward_knob(
        None,
        "Summary of the control run, the one with lambda_r = 0, to quote.",
        metavar="RUN|FILE",
        shown="the one in assets that fits, if there is one",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """All settings of a run of the GAN mode. JSON and flags are flat, since no name occurs twice."""

    task: str  # SCRATCH, TUNING or REWARDED; it determined the defaults
    run: RunConfig = RunConfig()  # device, workers, name
    data: DataConfig = DataConfig()  # training images
    net: NetworkConfig = NetworkConfig()  # architecture or initial networks
    gan: GanConfig = GanConfig()  # adversarial losses and schedules
    loop: LoopConfig = LoopConfig()  # length, batch, intervals
    reward: RewardSettings = RewardSettings()  # reward and loss terms
    rounds: RoundConfig = RoundConfig()  # preference rounds

    def to_dict(self) -> dict:
        """Return all settings by name, as JSON."""
        return {"task": self.task, **values_of(self)}

    @classmethod
    def of(cls, values: Mapping) -> "Settings":
        """Return settings from values by name, such as those that a run stored.

        A missing value has its default. Names that are no setting are ignored.
        """
        # Two settings depend on the task and are not flags. As in EG3D, a run that starts from a network has
        # no EMA ramp-up, and its ADA reacts faster.
        fresh = values["task"] == SCRATCH
        return built(
            cls, {"ema_rampup": 0.05 if fresh else None, "ada_kimg": 500.0 if fresh else 100.0, **values}
        )

    def changed(self, **values) -> "Settings":
        """Return a copy with some settings changed, by name."""
        return Settings.of({**self.to_dict(), **values})

    @property
    def title(self) -> str:
        """Name of a run as in EG3D, cfg-dataset-batchB-gammaX, with the reward's weight."""
        # "synthetic:people64@n=500" -> "synthetic-people64": a
        # folder name must not contain a colon on every system.
        dataset = Path(self.data.data.replace(":", "-").split("@")[0]).stem
        name = f"{self.net.cfg}-{dataset}-batch{self.loop.batch}-gamma{self.gan.gamma:g}"
        if self.reward.reward != "none":
            name += f"-{self.reward.reward}-lambda{self.reward.terms.lambda_r:g}"
        if self.rounds.rounds:
            name += f"-rounds{self.rounds.rounds}"
        return name


# Entries that a run folder stores beside the settings. Their hashes are compared separately.
_RECORDED = frozenset({"task", "hashes", "launch", "processes", "versions"})


@functools.cache
def not_the_controls() -> frozenset[str]:
    """Return the names in a run's record whose values a control, the run with lambda_r = 0, need not share.

    They are the knobs with control=False: the settings of the reward itself, names of files (whose hashes
    count), and how a run is displayed.
    """
    return _RECORDED | {field.name for field, _, knob in knobs_of(Settings) if not knob.control}


def control_differs(settings: dict, record: dict) -> list[str]:
    """Return what prevents a run with lambda_r = 0 from being the control of another.

    Args:
        settings: settings of the tuned run, as its folder stores them, with the `hashes` of its inputs.
        record: the same of the control. Settings that only one of the two has are not compared.
    Returns: texts 'name value instead of expected'; [] if nothing differs.
    """
    # Only names that both records have: an older version may lack newer settings.
    names = sorted((settings.keys() & record.keys()) - not_the_controls())
    pairs = {name: (record[name], settings[name]) for name in names}
    # Set separately: the weights must differ, and the control's must be 0.
    pairs["lambda_r"] = record.get("lambda_r", 0), 0
    theirs = record.get("hashes", {})
    ours = settings.get("hashes", {})
    # Files are compared by content. Eight digits of a hash are enough to show the difference.
    pairs |= {
        f"{name} (bytes)": (theirs[name][:8], ours[name][:8])
        for name in ("init", "reward")
        if name in ours and name in theirs
    }
    return [
        f"{name} {got} instead of {expected}" for name, (got, expected) in pairs.items() if got != expected
    ]
