"""Settings of online tuning: one flat set for all losses, since most of it is common to them; and the arms of
its runs. This file imports no torch, so that `--help` is quick.
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
OVER = ("batch", "group", "ranks")
STEPS = ("exact", "cps", "sde", "dance")  # kinds of the sampler's steps that draw noise (steps.py)
DECAYS = {  # by name, as DiffusionNFT has them; of the number n of optimiser steps
    "copy": lambda n: 0.0,
    "slow": lambda n: min(0.001 * n, 0.5),
    "late": lambda n: 0.0 if n < 75 else min(0.0075 * (n - 75), 0.999),
    "dgpo": lambda n: min(0.001 * n, 0.3),
    "frozen": lambda n: 1.0,  # offline: samples stay those of the network that drew them
}
_online = functools.partial(knob, group="Online")
_rare_online = functools.partial(_online, rare=True)
NUMBERS = 1e-2  # times 1 / sqrt(numbers of a sample): the clip of ratios, 1e-4 at ten thousand


@dataclass(frozen=True, kw_only=True)
class OnlineConfig(StageTraining):
    """Everything that decides a training besides its networks, conditions and rewards; the defaults suit
    large generators.
    """

    loss: str = _online(
        "nft", "What an update minimises; docs/understand/losses.md says which needs what.", choices=LOSSES
    )
    steps: int = train_knob(300, "Length of a stage's training.", metavar="UPDATES", low=1)
    lr: float = train_knob(3e-4, "AdamW's learning rate.", above=0)
    warmup: int = train_knob(
        10, "Over which the learning rate rises from 0.", metavar="UPDATES", low=0, rare=True
    )
    group: int = _online(8, "Samples of one condition, compared with each other.", low=2)
    batch: int = _online(8, "Conditions per update, over all processes.", metavar="GROUPS", low=1)
    batch_gpu: int | None = _rare_online(
        None, "Per pass: decides memory, not the result.", metavar="SAMPLES", low=1, shown="all of a process"
    )
    passes: int = _rare_online(1, "Steps of the optimiser on the samples of an update.", low=1)
    kl: float = _online(
        0.03,
        "Weight of the distance from the untuned network: of velocities, or the divergence of steps.",
        low=0,
    )
    advantage: str = _online(
        "batch",
        "What rewards are divided by, each less its group's mean: the deviation of all such differences of "
        "an update, or of its group's; ranks: normal scores in the group.",
        choices=OVER,
    )
    adv_clip: float = _rare_online(5.0, "Largest advantage; nft: the C that makes goodness of it.", above=0)
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
        "After which the network of the moment is the reference.",
        metavar="UPDATES",
        low=1,
        shown="never",
    )
    sampler_steps: int | None = _rare_online(
        None, "Of the sampler in training.", low=2, shown="the stage's own"
    )
    # on the sampler's steps
    window: int | None = _online(
        None,
        "grpo, grpo-guard, dppo: steps that draw noise and are trained on; the others are the flow's own.",
        metavar="STEPS",
        low=1,
        shown="all but the last",
    )
    window_end: int | None = _rare_online(
        None, "Where windows end at the latest.", metavar="STEP", low=1, shown="after two fifths of the steps"
    )
    window_moves: str = _rare_online(
        "random",
        "How windows move: anew for every update, or from noisy steps to quiet ones and again.",
        choices=("random", "progressive"),
    )
    window_updates: int = _rare_online(25, "Of a progressive window at one place.", metavar="UPDATES", low=1)
    trained_steps: int | None = _rare_online(
        None,
        "Without a window: how many of the steps are trained on, drawn for every update.",
        low=1,
        shown="all but the last",
    )
    sde_step: str = _online("exact", "Kind of the steps that draw.", choices=STEPS, rare=True)
    noise: float = _online(0.7, "Level of the sampler's noise, a.", name="sde_noise", above=0, rare=True)
    clip_range: float | None = _online(
        None,
        "Of ratios of densities (of their mean over a sample's numbers), about 1; dppo: of the "
        "divergence; dgpo: of errors.",
        above=0,
        shown="by the numbers of a sample",
    )
    # on finished samples
    curvature: float = _rare_online(1.0, "nft: b, of the network that draws; large: stays near it.", above=0)
    plain: bool = _rare_online(
        False, "nft: leave out the weight that divides by the error.", name="unweighted"
    )
    group_beta: float = _rare_online(100.0, "dgpo: beta, per unit of error.", above=0)
    draws: int = _rare_online(2, "nft, dgpo: times and noises per sample.", low=1, name="noise_samples")
    decay: str = _rare_online("slow", "nft, dgpo: how the network that draws follows.", choices=tuple(DECAYS))
    guided: bool = _rare_online(
        False, "nft, dgpo: samples by the stage's guidance; velocities are compared without it."
    )
    use: str = "reward"  # as it is, or a control's: randomised, inverted

    def __post_init__(self):
        super().__post_init__()
        if self.lora is not None and self.lora.dropout:
            got = f"got {self.lora.dropout}"
            raise ValueError(
                f"OnlineConfig.lora: expected adapters without dropout, {got}: densities would be those of"
                " another network."
            )
        if self.loss == "dgpo" and self.batch_gpu is not None and self.batch_gpu % self.group:
            raise ValueError(
                f"--set batch_gpu: expected whole groups of {self.group} with dgpo, got {self.batch_gpu}."
                " Give a multiple."
            )
        if self.window is not None and self.trained_steps is not None:
            raise ValueError("--set trained_steps: expected it or --window, got both. Leave one out.")

    @property
    def on_steps(self) -> bool:
        return self.loss in ON_STEPS

    def clip_of(self, numbers: float, std: float = 1.0) -> float:
        """The clip of this loss.

        Args: numbers: of a sample; std: of the step, which scales the guard's exponent.
        """
        if self.clip_range is not None:
            return self.clip_range
        fixed = {"dppo": 1e-5, "dgpo": 1e-2}  # neither is of a mean over numbers that noise moves
        return fixed.get(self.loss, NUMBERS / numbers**0.5 * (std if self.loss == "grpo-guard" else 1.0))

    def sampling(self, stage: "FlowStage") -> "Sampling":
        """Of the sampler in training: the stage's own guidance and spacing of times.

        Raises: ValueError for steps that it has not.
        """
        sampling = replace(stage.sampling, steps=self.sampler_steps or stage.sampling.steps)
        most = sampling.steps - 1
        if not self.on_steps:
            return sampling if self.guided else replace(sampling, cfg_strength=0.0)
        if most < 1 or self.trained_steps is not None and self.trained_steps > most:
            got = f"{self.trained_steps or 1} of {sampling.steps}"
            raise ValueError(
                f"--trained-steps: expected at most all steps of the sampler but the last, got {got}. Change"
                " one."
            )
        if self.window is not None:
            check_window(self.window, 0, self.last_window(sampling.steps), most)
        return sampling

    def last_window(self, steps: int) -> int:
        """Where windows end at the latest, of a sampler of so many steps: noisy steps decide more of the
        shape.
        """
        assert self.window is not None
        return self.window_end or max(self.window, math.ceil(0.4 * steps))


DPO = "dpo"


@dataclass(frozen=True, kw_only=True)
class Losses:
    """Settings of each arm that draws samples."""

    nft: OnlineConfig
    grpo: OnlineConfig
    grpo_plain: OnlineConfig
    grpo_guard: OnlineConfig
    dppo: OnlineConfig
    dgpo: OnlineConfig

    def of(self, arm: str) -> OnlineConfig:
        return getattr(self, arm.replace("-", "_"))


KINDS = (*(field.name.replace("_", "-") for field in fields(Losses)), DPO)
ARMS = tuple(name for kind in KINDS for name in (kind, *(f"{kind}-{use}" for use in CONTROLS)))


def divided(arm: str) -> tuple[str, str]:
    """Kind and use of the rewards of an arm.

    >>> divided("grpo-guard-randomised"), divided("dpo")
    (('grpo-guard', 'randomised'), ('dpo', 'reward'))
    """
    kind, _, use = arm.rpartition("-")
    return (kind, use) if use in CONTROLS else (arm, "reward")


OWN = "own"


def weighed(text: str) -> dict[str, float]:
    """Weights by name. Raises: ValueError for what is none.

    >>> weighed("own,solid:0.5")
    {'own': 1.0, 'solid': 0.5}
    """
    found = {}
    for part in text.split(","):
        name, colon, weight = part.strip().partition(":")
        try:
            found[name] = float(weight) if colon else 1.0
        except ValueError:
            found[name] = 0.0
        if not name or not 0 < found[name] < float("inf"):
            raise ValueError(
                f"--reward: expected names with commas, each with :WEIGHT above 0 or without, got {text!r}."
                " Correct it."
            )
    return found


@dataclass(frozen=True, kw_only=True)
class OnlineRun(ArmsRun):
    NAME: ClassVar[str] = "online"
    TITLE: ClassVar[str] = "Online tuning against its base"
    MORE: ClassVar[str] = (
        " In brackets behind a mean reward the untuned network's. Samples: drawn by a training. KL: of the"
        " steps of one sampler from the untuned network's, mean over numbers, steps and samples."
    )
    BEFORE: ClassVar[Columns] = {
        "arm": lambda name, arm: name,
        "samples": lambda name, arm: round(fmean(arm["samples"])),
        "reward up on": lambda name, arm: f"{arm['reward']['up']:.0%} of conditions",
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
        return bool(problem.held_out_conditions)

    def row(
        self, arm: str, trainings: Sequence[Mapping], rates: Mapping, scores: Mapping, base: Mapping
    ) -> dict:
        own = scores["reward"]
        untuned = base["reward"]
        up = (own.mean(2) > untuned.mean(2)).mean(1)  # [K], share of conditions
        return {
            "samples": [training["samples"] for training in trainings],
            "kl": [training["kl"] for training in trainings],
            "reward": {
                "up": float(up.mean()),
                "up_seeds": up.tolist(),
                "mean": float(own.mean()),
                "mean_seeds": own.mean((1, 2)).tolist(),
                "base": float(untuned.mean()),
            },
            "measures": {name: rate for name, rate in rates.items() if name not in EVALUATORS},
        }


def mean_of(values: Sequence[float | None]) -> str:
    """In two digits; nothing where none was measured."""
    import numpy as np

    known = [value for value in values if value is not None]
    return f"{np.mean(known):.2g}" if known else ""


# Which steps of the sampler draw noise and are trained on: a window, the same for all samples of an update
# (MixGRPO; Flow-GRPO-Fast). Outside it the sampler takes the flow's own steps: noise there would reach the
# reward as defects of the asset.
#
# Deviates: published windows that move past the last step shrink, and then stand empty while the run goes on.
# These stay whole: a window begins at `steps - size` at the latest, and, there, stays or starts again.


def check_window(size: int, low: int, high: int, steps: int) -> None:
    """Args: steps: of the sampler that may draw noise.

    Raises: ValueError for a window of `size` steps that low..high cannot hold.
    """
    if not 0 <= low < high <= steps or not 1 <= size <= high - low:
        got = f"{size} of steps {low} to {high}"
        raise ValueError(
            f"window: expected 1 or more of the sampler's steps 0 to {steps}, got {got}. The last step draws"
            " nothing."
        )


def random_window(size: int, low: int, high: int, draw: Callable[[int, int], int]) -> range:
    """Args: high: the end of what it may cover; draw: an integer of low..high, both included."""
    check_window(size, low, high, high)
    begin = draw(low, high - size)
    return range(begin, begin + size)


def progressive_window(
    round_number: int, size: int, low: int, high: int, *, stride: int, rounds: int, again: bool
) -> range:
    """From noisy steps to quiet ones: it moves by `stride` every so many `rounds`; at the end it stays, or
    begins again.
    """
    check_window(size, low, high, high)
    begins = list(dict.fromkeys(min(begin, high - size) for begin in range(low, high, stride)))
    place = round_number // rounds
    begin = begins[place % len(begins) if again else min(place, len(begins) - 1)]
    return range(begin, begin + size)
