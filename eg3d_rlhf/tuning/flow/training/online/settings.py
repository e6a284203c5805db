"""Settings of online tuning, and the arms of its runs.

All losses share one flat set of settings, since most settings apply to several of them. losses.py has the
equations of the losses with their papers, and steps.py those of the sampler's steps. This file imports no
torch, so that `--help` is quick.
"""

import functools
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from statistics import fmean
from typing import TYPE_CHECKING, Any, ClassVar

from eg3d_rlhf.tuning.flow.base.settings import EVALUATORS
from eg3d_rlhf.tuning.flow.training.settings import CONTROLS, ArmsRun, Columns, StageTraining, train_knob
from training.config import check_knobs, knob

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
# Schedules of DiffusionNFT by name: functions from the number n of optimiser steps to the decay d in 0..1,
# see snapshot.decay. The numbers are those of the published programs.
DECAYS = {
    "copy": lambda n: 0.0,
    "slow": lambda n: min(0.001 * n, 0.5),
    "late": lambda n: 0.0 if n < 75 else min(0.0075 * (n - 75), 0.999),
    "dgpo": lambda n: min(0.001 * n, 0.3),
    "frozen": lambda n: 1.0,  # the sampling network never changes
}
SERVED = "Rewards from another process"  # title of a group of flags
_online = functools.partial(knob, group="Online")
_rare_online = functools.partial(_online, rare=True)
# The clip of ratios is this value divided by sqrt(elements of a sample): 1e-4 for ten thousand elements.
CLIP_SCALE = 1e-2


@dataclass(frozen=True, kw_only=True)
class OnlineConfig(StageTraining):
    """Settings of a training on samples that the policy itself generates.

    The defaults suit large generators.
    """

    loss: str = _online(
        "nft", "Loss that is minimised; docs/understand/losses.md compares the losses.", choices=LOSSES
    )
    steps: int = train_knob(300, "Number of updates in the training of a stage.", metavar="UPDATES", low=1)
    lr: float = train_knob(3e-4, "Learning rate of the AdamW optimiser.", above=0)
    warmup: int = train_knob(
        10,
        "Number of first updates in which the learning rate rises from 0.",
        metavar="UPDATES",
        low=0,
        rare=True,
    )
    group: int = _online(8, "Number of samples of one prompt, which are compared with each other.", low=2)
    batch: int = _online(
        8,
        "Number of prompts in an update, over all processes. Each prompt has one group of samples.",
        metavar="GROUPS",
        low=1,
    )
    batch_gpu: int | None = _rare_online(
        None,
        "Number of samples that a process computes in one pass. It changes the memory that an update takes,"
        " not its result.",
        metavar="SAMPLES",
        low=1,
        shown="all of a process",
    )
    passes: int = _rare_online(1, "Number of optimiser steps on the samples of one update.", low=1)
    kl: float = _online(
        0.03,
        "Weight of the distance from the untuned network in the loss. The distance is the squared difference"
        " of velocities for nft and dgpo, and the KL divergence of the sampler's steps for the other losses.",
        low=0,
    )
    advantage: str = _online(
        "batch",
        "How rewards become advantages. batch, group: the mean of the group is subtracted, and the"
        " difference is divided by the standard deviation of the whole batch or of the group; ranks: normal"
        " scores of the ranks in the group.",
        choices=OVER,
    )
    adv_clip: float = _rare_online(
        5.0,
        "Largest absolute value of an advantage. For nft it is also the factor C that scales advantages to a"
        " goodness in 0..1.",
        above=0,
    )
    max_drift: float | None = _rare_online(
        0.4,
        "Policy drift above which training stops. The drift is the mean squared change of the velocity,"
        " divided by the mean squared error of the reference's velocity.",
        above=0,
        shown="0.4",
        name="max_drift",
    )
    reset: int | None = _rare_online(
        None,
        "Number of updates between renewals of the reference, at which the current network becomes the"
        " reference.",
        metavar="UPDATES",
        low=1,
        shown="never",
    )
    sampler_steps: int | None = _rare_online(
        None, "Number of steps of the sampler in training.", low=2, shown="the stage's own"
    )
    # on the sampler's steps
    window: int | None = _online(
        None,
        "grpo, grpo-guard, dppo: number of consecutive sampler steps (a window) that add noise and are"
        " trained on. The other steps are the flow's own, without noise.",
        metavar="STEPS",
        low=1,
        shown="all but the last",
    )
    window_end: int | None = _rare_online(
        None,
        "End of the sampler steps in which windows may lie: the number of the last such step, counted from"
        " 1.",
        metavar="STEP",
        low=1,
        shown="two fifths of the steps",
    )
    window_moves: str = _rare_online(
        "random",
        "Movement of windows. random: every update has a random window; progressive: windows move from noisy"
        " steps to less noisy steps, and then start again.",
        choices=("random", "progressive"),
    )
    window_updates: int = _rare_online(
        25, "Number of updates before a progressive window moves.", metavar="UPDATES", low=1
    )
    trained_steps: int | None = _rare_online(
        None,
        "Number of sampler steps that are trained on if --window is not given. They are chosen at random in"
        " every update.",
        low=1,
        shown="all but the last",
    )
    sde_step: str = _online(
        "exact",
        "Kind of the sampler steps that add noise. exact: Flow-GRPO's process in closed form; cps:"
        " coefficients-preserving sampling; sde, dance: Euler steps of Flow-GRPO and of DanceGRPO.",
        choices=STEPS,
        rare=True,
    )
    noise: float = _online(
        0.7,
        "Level a of the noise that the sampler steps add; 0 would add none.",
        name="sde_noise",
        above=0,
        rare=True,
    )
    clip_range: float | None = _online(
        None,
        "Largest distance of the density ratio from 1 (the log density is averaged over a sample's elements)."
        " For dppo it limits the divergence of a step. For dgpo it limits the ratio exp(e_old - e), with e"
        " the error of the policy and e_old that of the sampling network.",
        above=0,
        shown="from the size of a sample",
    )
    # on finished samples
    curvature: float = _rare_online(
        1.0,
        "nft: factor b of the loss. A larger value keeps the policy closer to the sampling network.",
        above=0,
    )
    plain: bool = _rare_online(
        False, "nft: do not divide the squared errors by their mean size.", name="unweighted"
    )
    group_beta: float = _rare_online(
        100.0, "dgpo: factor beta of a group's margin, per unit of flow-matching error.", above=0
    )
    draws: int = _rare_online(
        2,
        "nft, dgpo: number of pairs of a time and a noise at which the loss of each sample is computed.",
        low=1,
        name="noise_samples",
    )
    decay: str = _rare_online(
        "slow",
        "nft, dgpo: schedule by which the sampling network follows the policy. copy: it equals the policy;"
        " slow, late, dgpo: it follows more and more slowly; frozen: it never changes.",
        choices=tuple(DECAYS),
    )
    guided: bool = _rare_online(
        False, "nft, dgpo: sample with the stage's guidance. The loss itself never uses guidance."
    )
    use: str = "reward"  # how rewards are used: unchanged, or as in a control (randomised, inverted)

    def __post_init__(self):
        super().__post_init__()
        # the ratio of densities compares two passes of one network, which must be the same function
        if self.lora is not None and self.lora.dropout:
            raise ValueError(
                "OnlineConfig.lora: online tuning needs adapters without dropout, got a dropout of"
                f" {self.lora.dropout}. Set the dropout of the adapters to 0 (--set lora_dropout=0)."
            )
        if self.loss == "dgpo" and self.batch_gpu is not None and self.batch_gpu % self.group:
            raise ValueError(
                f"--set batch_gpu: with the loss dgpo it must be a multiple of the group size {self.group},"
                f" got {self.batch_gpu}. Choose a multiple, or another --group."
            )
        if self.window is not None and self.trained_steps is not None:
            raise ValueError("--set trained_steps cannot be combined with --window. Remove one of them.")

    @property
    def on_steps(self) -> bool:
        """Return True if the loss acts on the densities of the sampler's steps."""
        return self.loss in ON_STEPS

    def choose_clip(self, element_count: float, std: float = 1.0) -> float:
        """Return the largest distance of the ratio from 1, or for dppo the largest divergence of a step.

        This is `clip_range` if it is set, otherwise a default that depends on the loss.

        Args:
            element_count: number of elements of a sample.
            std: standard deviation of the sampler's step, which scales the exponent of GRPO-Guard.
        """
        if self.clip_range is not None:
            return self.clip_range
        # Flow-DPPO and DGPO: their limits do not depend on the number of elements, as neither limits a ratio
        # that noise changes. The guard's exponent is multiplied by the step's std, so its clip is, too.
        fixed_clips = {"dppo": 1e-5, "dgpo": 1e-2}
        return fixed_clips.get(
            self.loss, CLIP_SCALE / element_count**0.5 * (std if self.loss == "grpo-guard" else 1.0)
        )

    def sampling(self, stage: "FlowStage") -> "Sampling":
        """Return the settings of the sampler in training.

        The spacing of times is the stage's own. Losses on the sampler's steps use the stage's own guidance;
        losses on finished samples use it only if `guided` is set.

        Raises: ValueError for more trained steps, or a longer window, than the sampler has steps.
        """
        sampling = replace(stage.sampling, steps=self.sampler_steps or stage.sampling.steps)
        noisy_count = sampling.steps - 1  # the last step has no noise, and so no density
        # losses on finished samples take any sampler, and by default no guidance
        if not self.on_steps:
            return sampling if self.guided else replace(sampling, cfg_strength=0.0)
        if noisy_count < 1:
            raise ValueError(
                f"--set sampler_steps: the loss {self.loss} needs at least 2 sampler steps, got"
                f" {sampling.steps}. Set 2 or more steps."
            )
        if self.trained_steps is not None and self.trained_steps > noisy_count:
            raise ValueError(
                f"--set trained_steps: got {self.trained_steps} of {sampling.steps} sampler steps, but only"
                f" {noisy_count} steps have noise (all except the last). Use fewer trained steps, or more"
                " sampler steps (--set sampler_steps)."
            )
        if self.window is not None:
            check_window(self.window, 0, self.find_window_end(sampling.steps), noisy_count)
        return sampling

    def find_window_end(self, step_count: int) -> int:
        """Return the end, exclusive, of the steps in which windows may lie, of `step_count` sampler steps."""
        # the first two fifths of the steps: noisy steps decide more of the shape
        assert self.window is not None
        return self.window_end or max(self.window, math.ceil(0.4 * step_count))


DPO = "dpo"  # arm that is trained on pairs


@dataclass(frozen=True, kw_only=True)
class Losses:
    """Settings of each kind of arm that generates samples during training."""

    nft: OnlineConfig
    grpo: OnlineConfig
    grpo_plain: OnlineConfig  # GRPO with noise at every step
    grpo_guard: OnlineConfig
    dppo: OnlineConfig
    dgpo: OnlineConfig

    def for_arm(self, arm: str) -> OnlineConfig:
        """Return the settings of a kind of arm, such as "grpo-guard"."""
        return getattr(self, arm.replace("-", "_"))


KINDS = (*(field.name.replace("_", "-") for field in fields(Losses)), DPO)
# every kind of arm, followed by its controls: "nft", "nft-randomised", "nft-inverted", "grpo", ...
ARMS = tuple(name for kind in KINDS for name in (kind, *(f"{kind}-{use}" for use in CONTROLS)))


def split_arm(arm: str) -> tuple[str, str]:
    """Split the name of an arm into its kind and its use of the rewards, see OnlineConfig.use.

    >>> split_arm("grpo-guard-randomised"), split_arm("dpo")
    (('grpo-guard', 'randomised'), ('dpo', 'reward'))
    """
    kind, _, use = arm.rpartition("-")  # kinds hold hyphens, too, as in "grpo-guard"
    return (kind, use) if use in CONTROLS else (arm, "reward")


PROBLEM_REWARD = "own"  # name of the problem's reward
JUDGE_PREFIX = "judge:"  # start of the name of a reward by a judge; the address of its server follows
_ADDRESS = re.compile(r"(?:judge:)?https?://[^/]*")


def is_served(name: str) -> bool:
    """Return True if a reward comes from another process: an address of a server, or judge: and one."""
    return _ADDRESS.match(name) is not None


def split_weight(reward_text: str) -> tuple[str, str]:
    """Split a part of --reward into the name and the weight; "" without a weight.

    The colon of a weight follows the path of an address, so that it is not taken for that of a port.

    >>> split_weight("solid:0.5"), split_weight("http://127.0.0.1:9000/score")
    (('solid', '0.5'), ('http://127.0.0.1:9000/score', ''))
    >>> split_weight("judge:http://127.0.0.1:8000/v1:2")
    ('judge:http://127.0.0.1:8000/v1', '2')
    """
    address = _ADDRESS.match(reward_text)
    start = address.group() if address else ""
    name, colon, weight_text = reward_text[len(start) :].partition(":")
    # An empty weight is an error of the user, which a colon alone shows.
    return start + name, weight_text or colon


@dataclass(frozen=True, kw_only=True)
class ServedConfig:
    """Settings of rewards that come from another process, see `served_rewards`."""

    reward_required: bool = False  # True: a sample without a score ends the run
    reward_timeout: float = knob(
        60.0,
        "Time after which a request to a reward server or to a judge counts as failed. It is repeated, with"
        " growing pauses, up to five times.",
        SERVED,
        metavar="SECONDS",
        above=0,
        rare=True,
    )
    reward_resolution: int = knob(
        192,
        "Edge of each of the nine views of a sample that a reward server or a judge is sent.",
        SERVED,
        metavar="PIXELS",
        low=32,
        rare=True,
    )
    judge_model: str | None = knob(
        None,
        "Name of the model of --reward=judge:URL, as the server knows it.",
        SERVED,
        metavar="NAME",
        shown="none; required with judge:URL",
    )
    judge_limit: int | None = knob(
        None,
        "Greatest number of calls of --reward=judge:URL in each process. Later samples get the reward 1/2.",
        SERVED,
        metavar="CALLS",
        low=1,
        shown="none; required with judge:URL",
    )
    judge_criteria: str = knob(
        "overall",
        "Criteria by which the judge compares a sample with an untuned asset of the same prompt, separated by"
        " commas, such as geometry_details,texture_details. The reward is their mean.",
        SERVED,
        metavar="LIST",
        rare=True,
    )
    answers: str | None = knob(
        None,
        "File of the judge's answers, which is read and extended, so that a run that was killed repeats no"
        " call.",
        SERVED,
        metavar="FILE",
        shown="none; in memory",
        rare=True,
    )

    def __post_init__(self):
        check_knobs(self)

    def check(self, names: Iterable[str]) -> None:
        """Raise ValueError if a judge lacks a setting, or a setting has no effect.

        Args: names: names of the rewards, see `parse_weights`.
        """
        names = list(names)
        judged = [name for name in names if name.startswith(JUDGE_PREFIX)]
        for field_name in ("judge_model", "judge_limit"):
            flag = f"--{field_name.replace('_', '-')}"
            is_given = getattr(self, field_name) is not None
            if judged and not is_given:
                raise ValueError(
                    f"{flag} is missing, which --reward={judged[0]} needs: a judge is asked twice about every"
                    f" sample and criterion. Pass {flag}."
                )
            if is_given and not judged:
                raise ValueError(f"{flag} has an effect only with --reward=judge:URL. Remove it.")
        if self.answers is not None and not judged:
            raise ValueError("--set answers has an effect only with --reward=judge:URL. Remove it.")
        if judged:
            # imported here, because other runs need no judge; raises ValueError for an unknown criterion
            from eg3d_rlhf.people.judge.settings import parse_questions

            parse_questions(self.judge_criteria)
        if self.reward_required and not any(map(is_served, names)):
            raise ValueError("--reward-required has an effect only with a reward from an address. Remove it.")

    def to_values(self) -> dict[str, Any]:
        """Return the settings that differ from their defaults, for the identity of a run."""
        return {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if getattr(self, field.name) != field.default
        }


def parse_weights(reward_list: str) -> dict[str, float]:
    """Parse the value of --reward to weights by name; a name without a weight has the weight 1.

    Raises: ValueError for a part that is not NAME or NAME:WEIGHT with a weight above 0.

    >>> parse_weights("own,solid:0.5")
    {'own': 1.0, 'solid': 0.5}
    """
    weights = {}
    for reward_text in reward_list.split(","):
        name, weight_text = split_weight(reward_text.strip())
        try:
            weights[name] = float(weight_text) if weight_text else 1.0
        except ValueError:
            weights[name] = 0.0  # the check below rejects it
        if not name or not 0 < weights[name] < float("inf"):
            raise ValueError(
                f"--reward: {reward_text.strip()!r} in {reward_list!r} is not NAME or NAME:WEIGHT with a"
                " finite weight above 0. Write the list for example as own,solid:0.5."
            )
    return weights


@dataclass(frozen=True, kw_only=True)
class OnlineRun(ArmsRun):
    """Settings of a run of online arms, with the columns of the table that ends the run."""

    NAME: ClassVar[str] = "online"
    TITLE: ClassVar[str] = "Online tuning against its base"
    MORE: ClassVar[str] = (
        " The mean reward of the untuned network is in brackets. Samples: number of samples that were"
        " generated in training. KL: divergence of the sampler's steps from those of the untuned network,"
        " averaged over elements, steps and samples."
    )
    BEFORE: ClassVar[Columns] = {
        "arm": lambda name, arm: name,
        "samples": lambda name, arm: round(fmean(arm["samples"])),
        "reward up on": lambda name, arm: f"{arm['reward']['up']:.0%} of prompts",
        "mean reward": lambda name, arm: f"{arm['reward']['mean']:+.3f} ({arm['reward']['base']:+.3f})",
    }
    AFTER: ClassVar[Columns] = {"KL": lambda name, arm: format_mean(arm["kl"])}
    ARMS: ClassVar[Collection[str]] = ARMS
    LISTED: ClassVar[str] = f"{', '.join(KINDS)}, or one with -{' or -'.join(CONTROLS)}"

    losses: Losses
    reward: str = PROBLEM_REWARD  # names of the trained rewards, with weights; see parse_weights
    gate: str | None = None  # comma-separated names of held-out rewards; None: no gate
    arms: tuple[str, ...] = ("nft",)
    served: ServedConfig = ServedConfig()  # rewards from another process

    def __post_init__(self):
        self.served.check(parse_weights(self.reward))
        super().__post_init__()

    def bench(self, opened: "Opened", seed: int) -> "OnlineBench":
        # imported here, since it imports torch
        from eg3d_rlhf.tuning.flow.training.online.online_arms import bench_of

        return bench_of(self, opened, seed)

    def has_table(self, problem: "Problem") -> bool:
        # the trained reward itself is an evaluator, so held-out prompts are enough
        return bool(problem.held_out_prompts)

    def row(
        self, arm: str, trainings: Sequence[Mapping], rates: Mapping, scores: Mapping, base: Mapping
    ) -> dict:
        tuned_rewards = scores["reward"]  # [K, C, S]
        untuned_rewards = base["reward"]  # [1, C, S]
        # share of prompts whose mean reward is higher than that of the untuned network, [K]
        improved_shares = (tuned_rewards.mean(2) > untuned_rewards.mean(2)).mean(1)
        return {
            "samples": [training["samples"] for training in trainings],
            "kl": [training["kl"] for training in trainings],
            "reward": {
                "up": float(improved_shares.mean()),
                "up_seeds": improved_shares.tolist(),
                "mean": float(tuned_rewards.mean()),
                "mean_seeds": tuned_rewards.mean((1, 2)).tolist(),
                "base": float(untuned_rewards.mean()),
            },
            "measures": {name: rate for name, rate in rates.items() if name not in EVALUATORS},
        }


def format_mean(values: Sequence[float | None]) -> str:
    """Format the mean of all values that are not None, with two significant digits.

    Return an empty text if all values are None.
    """
    # imported here, to keep `--help` quick
    import numpy as np

    measured_values = [value for value in values if value is not None]
    return f"{np.mean(measured_values):.2g}" if measured_values else ""


# Windows: the steps of the sampler that have noise and are trained on, the same for all samples of an update
# (MixGRPO; Flow-GRPO-Fast). Outside the window the sampler takes the flow's own steps: noise there would
# reach the reward as defects of the asset.
#
# Deviates: published windows that move past the last step shrink, and stay empty for the rest of the run.
# Here a window keeps its size: it begins at `steps - size` at the latest, and then stays or starts again.


def check_window(window_size: int, start: int, end: int, steps: int) -> None:
    """Raise ValueError if `window_size` consecutive steps do not fit into the steps from `start` to `end`.

    Args:
        window_size: number of steps in the window.
        start: first step that the window may contain, counted from 0.
        end: end of the steps that the window may contain, exclusive.
        steps: number of the sampler's steps that may have noise.
    """
    if not 0 <= start < end <= steps or not 1 <= window_size <= end - start:
        raise ValueError(
            f"--window: {window_size} consecutive steps do not fit into steps {start} to {end} ({end} not"
            f" included); the sampler adds noise only in steps 0 to {steps} ({steps} not included). Use a"
            " smaller window, another window_end (--set), or more sampler steps (--set sampler_steps)."
        )


def random_window(size: int, start: int, end: int, random_integer: Callable[[int, int], int]) -> range:
    """Choose a window of `size` consecutive steps at random.

    Args:
        size: number of steps in the window.
        start: first step that the window may contain, counted from 0.
        end: end of the steps that the window may contain, exclusive.
        random_integer: function that returns a random integer between two numbers, both included.
    """
    check_window(size, start, end, end)
    window_start = random_integer(start, end - size)
    return range(window_start, window_start + size)


def progressive_window(
    round_number: int, size: int, start: int, end: int, *, stride: int, rounds: int, repeat: bool
) -> range:
    """Return the window of an update; windows move from noisy steps to less noisy ones.

    Args:
        round_number: number of the update, counted from 0.
        size: number of steps in the window.
        start: first step that the window may contain, counted from 0.
        end: end of the steps that the window may contain, exclusive.
        stride: number of steps by which the window moves.
        rounds: number of updates after which the window moves.
        repeat: whether the window starts again at the first steps after it has reached the last ones. If
            False, it stays at the last steps.
    """
    check_window(size, start, end, end)
    # without repetitions: several starts near the end are cut to the same last window
    window_starts = list(
        dict.fromkeys(min(window_start, end - size) for window_start in range(start, end, stride))
    )
    move_count = round_number // rounds  # number of moves so far
    # `repeat` starts again at the first window; otherwise the last window stays
    window_start = window_starts[
        move_count % len(window_starts) if repeat else min(move_count, len(window_starts) - 1)
    ]
    return range(window_start, window_start + size)
