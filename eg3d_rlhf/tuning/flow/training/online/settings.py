"""Settings of online tuning, and the arms of its runs.

All losses share one flat set of settings, since most settings apply to several of them. This file imports no
torch, so that `--help` is quick.
"""

import functools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from statistics import fmean
from typing import TYPE_CHECKING, ClassVar

from eg3d_rlhf.tuning.flow.base.settings import EVALUATORS
from eg3d_rlhf.tuning.flow.training.settings import CONTROLS, ArmsRun, Columns, StageTraining, train_knob
from training.config import knob

if TYPE_CHECKING:
    from eg3d_rlhf.tuning.flow.base.problem import Problem
    from eg3d_rlhf.tuning.flow.base.stage import FlowStage, Sampling
    from eg3d_rlhf.tuning.flow.training.arm_runs import Opened
    from eg3d_rlhf.tuning.flow.training.online.online_arms import OnlineBench

ON_STEPS = ("grpo", "grpo-guard", "dppo")  # losses on the density of the sampler's steps
ON_LATENTS = ("nft", "dgpo")  # losses on finished samples, by any sampler
LOSSES = (*ON_LATENTS, *ON_STEPS)
OVER = ("batch", "group", "ranks")  # ways of normalising rewards
STEPS = ("exact", "cps", "sde", "dance")  # kinds of the sampler's steps with noise (steps.py)
DECAYS = {  # schedules of DiffusionNFT by name, as functions of the number n of optimiser steps
    "copy": lambda n: 0.0,
    "slow": lambda n: min(0.001 * n, 0.5),
    "late": lambda n: 0.0 if n < 75 else min(0.0075 * (n - 75), 0.999),
    "dgpo": lambda n: min(0.001 * n, 0.3),
    "frozen": lambda n: 1.0,  # the sampling network never changes
}
_online = functools.partial(knob, group="Online")
_rare_online = functools.partial(_online, rare=True)
NUMBERS = 1e-2  # divided by sqrt(elements of a sample), it is the clip of ratios: 1e-4 for ten thousand


@dataclass(frozen=True, kw_only=True)
class OnlineConfig(StageTraining):
    """Everything that decides a training besides its networks, prompts and rewards.

    The defaults suit large generators.
    """

    loss: str = _online(
        "nft", "Loss of an update; docs/understand/losses.md compares the losses.", choices=LOSSES
    )
    steps: int = train_knob(300, "Length of a stage's training.", metavar="UPDATES", low=1)
    lr: float = train_knob(3e-4, "AdamW's learning rate.", above=0)
    warmup: int = train_knob(
        10,
        "Length of the warm-up, in which the learning rate rises from 0.",
        metavar="UPDATES",
        low=0,
        rare=True,
    )
    group: int = _online(8, "Samples of one prompt that are compared with each other.", low=2)
    batch: int = _online(8, "Prompts per update, over all processes.", metavar="GROUPS", low=1)
    batch_gpu: int | None = _rare_online(
        None,
        "Samples per pass; decides memory, not the result.",
        metavar="SAMPLES",
        low=1,
        shown="all of a process",
    )
    passes: int = _rare_online(1, "Steps of the optimiser on the samples of an update.", low=1)
    kl: float = _online(
        0.03,
        "Weight of the distance from the untuned network: squared distance of velocities, or divergence of"
        " steps.",
        low=0,
    )
    advantage: str = _online(
        "batch",
        "Divisor of rewards after their group's mean is subtracted: standard deviation of the whole batch "
        "or of the group. ranks: normal scores of the ranks in the group.",
        choices=OVER,
    )
    adv_clip: float = _rare_online(5.0, "Largest advantage; nft: C, which scales it to goodness.", above=0)
    max_drift: float | None = _rare_online(
        0.4,
        "Largest policy drift: mean square of the velocity's change, relative to its error at the reference,"
        " above which training stops.",
        above=0,
        shown="0.4",
        name="max_drift",
    )
    reset: int | None = _rare_online(
        None,
        "Interval after which the current network becomes the reference.",
        metavar="UPDATES",
        low=1,
        shown="never",
    )
    sampler_steps: int | None = _rare_online(
        None, "Steps of the sampler in training.", low=2, shown="the stage's own"
    )
    # on the sampler's steps
    window: int | None = _online(
        None,
        "grpo, grpo-guard, dppo: number of steps with noise that are trained on; the other steps are the"
        " flow's own.",
        metavar="STEPS",
        low=1,
        shown="all but the last",
    )
    window_end: int | None = _rare_online(
        None,
        "Last step at which a window may end.",
        metavar="STEP",
        low=1,
        shown="after two fifths of the steps",
    )
    window_moves: str = _rare_online(
        "random",
        "Movement of windows. random: a new place for every update; progressive: from noisy steps to less"
        " noisy ones, repeatedly.",
        choices=("random", "progressive"),
    )
    window_updates: int = _rare_online(
        25, "Updates of a progressive window at one place.", metavar="UPDATES", low=1
    )
    trained_steps: int | None = _rare_online(
        None,
        "Without a window: number of steps that are trained on, chosen at random for every update.",
        low=1,
        shown="all but the last",
    )
    sde_step: str = _online("exact", "Kind of the steps with noise.", choices=STEPS, rare=True)
    noise: float = _online(0.7, "Noise level a of the sampler.", name="sde_noise", above=0, rare=True)
    clip_range: float | None = _online(
        None,
        "Clip of the ratio of densities (mean over a sample's elements), as a distance from 1; dppo: "
        "limit of the divergence; dgpo: clip of the ratio from errors.",
        above=0,
        shown="by the elements of a sample",
    )
    # on finished samples
    curvature: float = _rare_online(
        1.0, "nft: b. A larger value keeps the policy closer to the sampling network.", above=0
    )
    plain: bool = _rare_online(
        False, "nft: do not divide the loss by the size of the error.", name="unweighted"
    )
    group_beta: float = _rare_online(
        100.0, "dgpo: beta, the factor of a group's margin, per unit of error.", above=0
    )
    draws: int = _rare_online(2, "nft, dgpo: times and noises per sample.", low=1, name="noise_samples")
    decay: str = _rare_online(
        "slow", "nft, dgpo: schedule by which the sampling network follows the policy.", choices=tuple(DECAYS)
    )
    guided: bool = _rare_online(
        False, "nft, dgpo: sample with the stage's guidance; velocities are compared without it."
    )
    use: str = "reward"  # how rewards are used: unchanged, or as in a control (randomised, inverted)

    def __post_init__(self):
        super().__post_init__()
        # the ratio of densities compares two passes of one network, which must be the same function
        if self.lora is not None and self.lora.dropout:
            got = f"got {self.lora.dropout}"
            raise ValueError(
                f"OnlineConfig.lora: expected adapters without dropout, {got}: densities would be those of"
                " another network. Set the dropout to 0."
            )
        if self.loss == "dgpo" and self.batch_gpu is not None and self.batch_gpu % self.group:
            raise ValueError(
                f"--set batch_gpu: expected a multiple of the group size {self.group} with dgpo, got"
                f" {self.batch_gpu}. Give a multiple."
            )
        if self.window is not None and self.trained_steps is not None:
            raise ValueError("--set trained_steps: cannot be combined with --window. Leave one of them out.")

    @property
    def on_steps(self) -> bool:
        """Return whether the loss acts on the densities of the sampler's steps."""
        return self.loss in ON_STEPS

    def clip_of(self, numbers: float, std: float = 1.0) -> float:
        """Return the clip of this loss.

        Args: numbers: elements of a sample; std: of the step, which scales the guard's exponent.
        """
        if self.clip_range is not None:
            return self.clip_range
        # these two do not depend on the number of elements: neither limits a ratio that noise changes
        fixed = {"dppo": 1e-5, "dgpo": 1e-2}
        return fixed.get(self.loss, NUMBERS / numbers**0.5 * (std if self.loss == "grpo-guard" else 1.0))

    def sampling(self, stage: "FlowStage") -> "Sampling":
        """Return the sampler's settings in training, with the stage's own guidance and spacing of times.

        Raises: ValueError for more trained steps, or a longer window, than the sampler has steps.
        """
        sampling = replace(stage.sampling, steps=self.sampler_steps or stage.sampling.steps)
        most = sampling.steps - 1  # the last step has no noise, and so no density
        # losses on finished samples take any sampler, and by default no guidance
        if not self.on_steps:
            return sampling if self.guided else replace(sampling, cfg_strength=0.0)
        if most < 1 or self.trained_steps is not None and self.trained_steps > most:
            got = f"{self.trained_steps or 1} of {sampling.steps}"
            raise ValueError(
                f"--trained-steps: expected at most all steps of the sampler except the last, got {got}."
                " Change one of the two."
            )
        if self.window is not None:
            check_window(self.window, 0, self.last_window(sampling.steps), most)
        return sampling

    def last_window(self, steps: int) -> int:
        """Return the step at which windows end at the latest, for a sampler with a number of steps."""
        # the first two fifths: noisy steps decide more of the shape
        assert self.window is not None
        return self.window_end or max(self.window, math.ceil(0.4 * steps))


DPO = "dpo"  # arm that is trained on pairs


@dataclass(frozen=True, kw_only=True)
class Losses:
    """Settings of each arm that samples during training."""

    nft: OnlineConfig
    grpo: OnlineConfig
    grpo_plain: OnlineConfig  # GRPO with noise at every step
    grpo_guard: OnlineConfig
    dppo: OnlineConfig
    dgpo: OnlineConfig

    def of(self, arm: str) -> OnlineConfig:
        """Return the settings of an arm by its name."""
        return getattr(self, arm.replace("-", "_"))


KINDS = (*(field.name.replace("_", "-") for field in fields(Losses)), DPO)
# every kind, and its controls
ARMS = tuple(name for kind in KINDS for name in (kind, *(f"{kind}-{use}" for use in CONTROLS)))


def divided(arm: str) -> tuple[str, str]:
    """Split the name of an arm into its kind and its use of the rewards.

    >>> divided("grpo-guard-randomised"), divided("dpo")
    (('grpo-guard', 'randomised'), ('dpo', 'reward'))
    """
    kind, _, use = arm.rpartition("-")  # kinds hold hyphens, too, as in "grpo-guard"
    return (kind, use) if use in CONTROLS else (arm, "reward")


OWN = "own"  # name of the problem's reward


def weighed(text: str) -> dict[str, float]:
    """Parse the value of --reward to weights by name. Raises: ValueError for other text.

    >>> weighed("own,solid:0.5")
    {'own': 1.0, 'solid': 0.5}
    """
    weights = {}
    for part in text.split(","):
        name, colon, weight = part.strip().partition(":")
        try:
            weights[name] = float(weight) if colon else 1.0
        except ValueError:
            weights[name] = 0.0  # the check below rejects it
        if not name or not 0 < weights[name] < float("inf"):
            raise ValueError(
                f"--reward: expected names with commas, each with or without :WEIGHT above 0, got {text!r}."
                " Correct the list, for example solid:0.5."
            )
    return weights


@dataclass(frozen=True, kw_only=True)
class OnlineRun(ArmsRun):
    """Settings of a run of online arms, and the layout of its table."""

    NAME: ClassVar[str] = "online"
    TITLE: ClassVar[str] = "Online tuning against its base"
    MORE: ClassVar[str] = (
        " In brackets after a mean reward: the untuned network's. Samples: number generated in training. KL:"
        " divergence of a sampler's steps from the untuned network's, mean over elements, steps and samples."
    )
    BEFORE: ClassVar[Columns] = {
        "arm": lambda name, arm: name,
        "samples": lambda name, arm: round(fmean(arm["samples"])),
        "reward up on": lambda name, arm: f"{arm['reward']['up']:.0%} of prompts",
        "mean reward": lambda name, arm: f"{arm['reward']['mean']:+.3f} ({arm['reward']['base']:+.3f})",
    }
    AFTER: ClassVar[Columns] = {"KL": lambda name, arm: mean_of(arm["kl"])}
    ARMS: ClassVar[Collection[str]] = ARMS
    LISTED: ClassVar[str] = f"{', '.join(KINDS)}, or one with -{' or -'.join(CONTROLS)}"

    losses: Losses
    reward: str = OWN  # names, with weights
    gate: str | None = None  # names of held-out rewards
    arms: tuple[str, ...] = ("nft",)

    def __post_init__(self):
        weighed(self.reward)
        super().__post_init__()

    def bench(self, opened: "Opened", seed: int) -> "OnlineBench":
        from eg3d_rlhf.tuning.flow.training.online.online_arms import bench_of

        return bench_of(self, opened, seed)

    def has_table(self, problem: "Problem") -> bool:
        # the trained reward itself is an evaluator, so held-out prompts are enough
        return bool(problem.held_out_conditions)

    def row(
        self, arm: str, trainings: Sequence[Mapping], rates: Mapping, scores: Mapping, base: Mapping
    ) -> dict:
        tuned = scores["reward"]  # [K, C, S]
        untuned = base["reward"]  # [1, C, S]
        up = (tuned.mean(2) > untuned.mean(2)).mean(1)  # [K], share of prompts with a higher mean reward
        return {
            "samples": [training["samples"] for training in trainings],
            "kl": [training["kl"] for training in trainings],
            "reward": {
                "up": float(up.mean()),
                "up_seeds": up.tolist(),
                "mean": float(tuned.mean()),
                "mean_seeds": tuned.mean((1, 2)).tolist(),
                "base": float(untuned.mean()),
            },
            "measures": {name: rate for name, rate in rates.items() if name not in EVALUATORS},
        }


def mean_of(values: Sequence[float | None]) -> str:
    """Format a mean with two digits; return an empty text if nothing was measured."""
    # imported here, to keep `--help` quick
    import numpy as np

    known = [value for value in values if value is not None]
    return f"{np.mean(known):.2g}" if known else ""


# Windows: the steps of the sampler that have noise and are trained on, the same for all samples of an update
# (MixGRPO; Flow-GRPO-Fast). Outside the window the sampler takes the flow's own steps: noise there would
# reach the reward as defects of the asset.
#
# Deviates: published windows that move past the last step shrink, and stay empty for the rest of the run.
# Here a window keeps its size: it begins at `steps - size` at the latest, and then stays or starts again.


def check_window(size: int, low: int, high: int, steps: int) -> None:
    """Raise ValueError for a window of `size` steps that does not fit into low..high.

    Args: steps: number of the sampler's steps that may have noise.
    """
    if not 0 <= low < high <= steps or not 1 <= size <= high - low:
        got = f"{size} of steps {low} to {high}"
        raise ValueError(
            f"window: expected 1 or more of the sampler's steps 0 to {steps}, got {got}. The last step has no"
            " noise. Use a smaller window or more steps."
        )


def random_window(size: int, low: int, high: int, draw: Callable[[int, int], int]) -> range:
    """Choose a window of `size` steps in low..high at random.

    Args: high: end of the steps that it may cover, exclusive; draw: returns a random integer between two
        numbers, both included.
    """
    check_window(size, low, high, high)
    begin = draw(low, high - size)
    return range(begin, begin + size)


def progressive_window(
    round_number: int, size: int, low: int, high: int, *, stride: int, rounds: int, again: bool
) -> range:
    """Return the window of a round, which moves from noisy steps to less noisy ones.

    It moves by `stride` steps after every `rounds` rounds. At the end it stays, or begins anew (`again`).
    """
    check_window(size, low, high, high)
    # without repetitions: several starts near the end are cut to the same last window
    begins = list(dict.fromkeys(min(begin, high - size) for begin in range(low, high, stride)))
    place = round_number // rounds  # number of moves so far
    begin = begins[place % len(begins) if again else min(place, len(begins) - 1)]
    return range(begin, begin + size)
