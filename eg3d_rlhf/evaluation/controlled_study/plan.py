"""Arms, seeds and label sets of the controlled study, and the commands that make its files."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from eg3d_rlhf.core import bundled
from eg3d_rlhf.evaluation.settings import (
    ARMS_WITHOUT_RUNS,
    INVERTED,
    LABELS,
    RANDOMISED,
    STEERED_TUNED,
)
from eg3d_rlhf.evaluation.trainings import PACKAGE, TRAIN_REWARD, Part
from eg3d_rlhf.experiments import version_0_1
from eg3d_rlhf.generators import load_generator
from eg3d_rlhf.preferences.labels import Preference, declare_control, invert, load_labels, write_labels
from eg3d_rlhf.rewards.reward import Reward, load_reward
from eg3d_rlhf.rewards.settings import BUNDLED_LABELS
from eg3d_rlhf.rewards.smoothness import IdentityReward, Smoothness

# arms that train a reward for each label set and each reward seed
ARMS_WITH_LABELS = (LABELS, RANDOMISED, INVERTED)
FIRST_SEED = 40_000  # further label sets use latents from this seed on
TUNING_FLAGS = ("--reward=sigma",)  # flags of train.py; all others are those of the demo


# Rewards of the arms.


def randomise(labels: Sequence[Preference], seed: int) -> list[Preference]:
    """Return the same pairs, each with a random winner.

    Args: seed: seed of the random winners.
    """
    # The constant 5 separates this random stream from others of the same seed. Each label is inverted with
    # probability one half.
    # The pairs stay the same. Only the information in the order
    # is removed, so differences to the labels arm are due to it.
    is_inverted = np.random.default_rng([seed, 5]).random(len(labels)) < 0.5
    return [
        invert(label) if must_invert else label
        for label, must_invert in zip(labels, is_inverted, strict=True)
    ]


def permute_weights(reward: Reward, seed: int) -> Reward:
    """Put the entries of each weight tensor of a reward's network into a random order, in place.

    The resulting control has the same distribution of weights, but has lost what the reward has learnt.

    Args: seed: seed of the random order.
    Returns: the reward with the permuted network.
    """
    generator = torch.Generator().manual_seed(seed)  # does not change the global random state
    tensor_by_name = reward.network.state_dict()  # shares memory with the network
    for weight_tensor in tensor_by_name.values():
        # `numel` entries are permuted within each tensor, so norms and histograms of every layer stay equal.
        weight_tensor.copy_(
            weight_tensor.flatten()[torch.randperm(weight_tensor.numel(), generator=generator)].view_as(
                weight_tensor
            )
        )
    # The provenance states the permutation, so that the file is not taken for a trained reward.
    return Reward(reward.observation, reward.network, {**reward.provenance, "permuted": seed})


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All arms, seeds and label sets of a study. Its methods return the commands (`Part`) that make the
    study's files.
    """

    out: Path  # folder of the study
    arms: Sequence[str]  # arms to run, names in ARMS
    seeds: Sequence[int]  # training seeds of tuning
    rewards: int  # number of training seeds of rewards, for each label set
    draws: int  # number of label sets
    latents: int  # number of held-out latents that are measured
    seed: int = 0  # shifts the held-out latents
    network: Path | None = None  # generator before tuning; None: the bundled generator
    labels: Path  # file of the first label set
    train: tuple[str, ...]  # further flags of tools/train_reward.py
    tune: tuple[str, ...]  # further flags of train.py

    def draw(self, label_set_index: int) -> Path:
        """Return the file of one label set.

        Args: label_set_index: index of the label set. Index 0 is the set that the user passed.
        """
        return (
            self.labels
            if label_set_index == 0
            else self.out / "labels" / f"draw{label_set_index}" / "labels.jsonl"
        )

    def labels_of(self, arm_name: str, label_set_index: int) -> Path:
        """Return the file of an arm's labels, which is a label set or a randomised or inverted copy of one.

        Args:
            arm_name: name of the arm in ARMS.
            label_set_index: index of the label set.
        """
        return (
            self.draw(label_set_index)
            if arm_name == LABELS
            else self.out / "labels" / f"{self.in_paths(arm_name)}{label_set_index}.jsonl"
        )

    def in_paths(self, arm_name: str) -> str:
        """Return the text that represents an arm in the names of files and folders. It is the arm's name,
        except in a folder that version 0.1 began.
        """
        # folders that version 0.1 began keep its names
        return version_0_1.arm_in_paths(self.out, arm_name)

    def label_parts(self) -> list[Part]:
        """List the commands that make the label sets after the first one, which the user passed."""
        # Each further set has as many pairs as the first set.
        # The file is read only if there are further sets, because listing the commands should be fast.
        pair_count = len(load_labels(self.labels)) if self.draws > 1 else 0
        network_flags = [f"--network={self.network}"] if self.network else []
        return [
            Part(
                f"labels, draw {label_set_index}",
                self.draw(label_set_index).parent,
                PACKAGE,
                (
                    "label",
                    "synthetic",
                    f"--pairs={pair_count}",
                    f"--seed={label_set_index}",
                    # Each set begins 20,000 latents after the previous one, so that sets share no latent.
                    f"--first-seed={FIRST_SEED + 20_000 * label_set_index}",
                    *network_flags,
                    f"--out={self.draw(label_set_index)}",
                ),
            )
            for label_set_index in range(1, self.draws)
        ]

    def bundled(self, arm_name: str, label_set_index: int, seed: int) -> bool:
        """Return True if a reward equals the bundled reward, so that it need not be trained.

        Args:
            arm_name: name of the arm.
            label_set_index: index of the label set.
            seed: training seed of the reward.
        """
        # Equality with the bundled reward needs the same labels, seed and
        # flags. Training is deterministic, so the result would be the same.
        return (
            (arm_name, label_set_index, seed) == (LABELS, 0, 0)
            and self.labels == BUNDLED_LABELS
            and not self.train
        )

    def reward_part(self, arm_name: str, label_set_index: int, seed: int) -> Part:
        """Return the command that trains a reward on an arm's labels.

        Args:
            arm_name: name of the arm.
            label_set_index: index of the label set.
            seed: training seed of the reward, and seed of the split into training, validation and test pairs.
        """
        network_flags = [f"--network={self.network}"] if self.network else []
        flags = [
            f"--labels={self.labels_of(arm_name, label_set_index)}",
            f"--seed={seed}",
            f"--set=split_seed={seed}",  # each seed also has its own training, validation and test pairs
            *network_flags,
            *self.train,
        ]
        folder = self.out / "rewards" / f"{self.in_paths(arm_name)}-d{label_set_index}-r{seed}"
        return Part(
            f"reward: {arm_name}, draw {label_set_index}, seed {seed}",
            folder,
            TRAIN_REWARD,
            (*flags, f"--run-dir={folder}"),
        )

    def reward_parts(self) -> list[Part]:
        """List the commands that train all rewards, except the reward that equals the bundled one."""
        arm_names = [arm_name for arm_name in ARMS_WITH_LABELS if arm_name in self.arms]
        return [
            self.reward_part(arm_name, label_set_index, reward_seed)
            for arm_name in arm_names
            for label_set_index in range(self.draws)
            for reward_seed in range(self.rewards)
            if not self.bundled(arm_name, label_set_index, reward_seed)
        ]

    def reward(self, arm_name: str, label_set_index: int = 0, seed: int = 0) -> Path:
        """Return the file of an arm's reward; `reward_parts` or `write_rewards` make this file.

        Args:
            arm_name: name of the arm.
            label_set_index: index of the label set.
            seed: training seed of the reward.
        """
        # Permuted rewards have one file for each reward seed of the labels arm.
        if arm_name in ARMS_WITH_LABELS:
            return (
                bundled.REWARD
                if self.bundled(arm_name, label_set_index, seed)
                else self.reward_part(arm_name, label_set_index, seed).folder / "reward.safetensors"
            )
        # The smoothness reward has no weights, so its file has no seed in its name.
        return self.out / "rewards" / f"{arm_name}{seed if arm_name == 'permuted' else ''}.safetensors"

    def steered(self, label_set_index: int) -> Path:
        """Return the file of the network whose latents all labels of a set move."""
        return self.out / "steered" / f"d{label_set_index}" / "steered.safetensors"

    def steering_parts(self) -> list[Part]:
        """List the commands that steer the network, if an arm is tuned from steered networks."""
        network_flags = [f"--network={self.network}"] if self.network else []
        return [
            Part(
                f"steering, draw {label_set_index}",
                self.steered(label_set_index).parent,
                PACKAGE,
                (
                    "steer",
                    f"--labels={self.draw(label_set_index)}",
                    *network_flags,
                    f"--out={self.steered(label_set_index)}",
                ),
            )
            for label_set_index in range(self.draws if STEERED_TUNED in self.arms else 0)
        ]

    def tunings(self) -> dict[tuple[str, int, int, int], Part]:
        """Return the commands that tune the generator, by (arm, training seed, index of the label set, reward
        seed).
        """
        # The key has four parts, so that results can be averaged
        # over label sets and reward seeds for each training seed.
        part_by_case = {}  # run by case
        for arm_name in self.arms:
            for tuning_case in self._cases(arm_name):
                seed, label_set_index, reward_seed = tuning_case
                # With λ_r = 0 the reward does not change the generator, so any reward can be passed.
                reward_path = (
                    self.reward(LABELS)
                    if arm_name == "no-reward"
                    else self.reward(
                        LABELS if arm_name == STEERED_TUNED else arm_name, label_set_index, reward_seed
                    )
                )
                # The steered network already has moved latents. Its
                # tuning then starts from fewer defective heads.
                network = self.steered(label_set_index) if arm_name == STEERED_TUNED else self.network
                flags = [
                    "--reward=smoothness" if arm_name == "smoothness" else TUNING_FLAGS[0],
                    f"--reward-ckpt={reward_path}",
                ]
                # The λ_r = 0 arm continues the adversarial training alone,
                # which separates its effect from that of the reward.
                flags += ["--lambda-r=0"] if arm_name == "no-reward" else []
                # Without --init, train.py starts from the bundled generator.
                flags += [f"--init={network}"] if network else []
                # The name of a folder states the training seed, the label set and the reward seed.
                part_by_case[arm_name, *tuning_case] = Part.keyed(
                    f"{self.in_paths(arm_name)}-s{seed}-d{label_set_index}-r{reward_seed}",
                    self.out / "runs",
                    # A pre-registered study runs all of its arms, also those with a weak reward.
                    [*flags, f"--seed={seed}", "--no-summary", "--weak-reward", *self.tune],
                )
        return part_by_case

    def _cases(self, arm_name: str) -> Iterator[tuple[int, int, int]]:
        """Yield (training seed, index of the label set, reward seed) of each tuning run of an arm."""
        if arm_name in ARMS_WITHOUT_RUNS:
            return
        # Arms without labels do not depend on the label set, so one run for each training seed suffices.
        label_set_count = self.draws if arm_name in (*ARMS_WITH_LABELS, STEERED_TUNED) else 1
        reward_count = self.rewards if arm_name in (*ARMS_WITH_LABELS, STEERED_TUNED, "permuted") else 1
        yield from (
            (seed, label_set_index, reward_seed)
            for seed in self.seeds
            for label_set_index in range(label_set_count)
            for reward_seed in range(reward_count)
        )


def write_labels_of_arms(plan: Plan) -> None:
    """Write the randomised and the inverted copy of every label set."""
    for label_set_index in range(plan.draws):
        labels = load_labels(plan.draw(label_set_index))
        for arm_name, arm_labels in (
            (RANDOMISED, randomise(labels, label_set_index)),
            (INVERTED, [invert(label) for label in labels]),
        ):
            if arm_name in plan.arms:
                labels_path = plan.labels_of(arm_name, label_set_index)
                labels_path.parent.mkdir(parents=True, exist_ok=True)
                write_labels(labels_path, arm_labels)
                # A reward that is trained on these labels states that it is a control.
                declare_control(labels_path, f"{arm_name} labels")


def write_rewards(plan: Plan) -> None:
    """Write the rewards that need no training: smoothness, and copies of rewards with permuted weights."""
    if "smoothness" in plan.arms:
        Reward(Smoothness.from_generator(load_generator(plan.network).generator), IdentityReward()).save(
            plan.reward("smoothness")
        )
    # The rewards of the labels arm must exist; each of them has a permuted copy.
    for seed in range(plan.rewards if "permuted" in plan.arms else 0):
        permute_weights(load_reward(plan.reward(LABELS, 0, seed)), seed).save(
            plan.reward("permuted", 0, seed)
        )


def check_steered(plan: Plan) -> None:
    """Raise ValueError if the labels of a set determine no direction, so that there is no steered network."""
    for label_set_index in range(plan.draws if STEERED_TUNED in plan.arms else 0):
        if not plan.steered(label_set_index).is_file():
            raise ValueError(
                f"--only: the labels {plan.draw(label_set_index)} determine no direction, so the arm"
                f" {STEERED_TUNED} has no network to begin from. Leave the arm out of --only, or pass more"
                " labels."
            )


def commands(plan: Plan) -> dict[str, list[str]]:
    """Return the command line of every step that labels, trains or tunes, by the step's name."""
    command_parts = [
        *plan.label_parts(),
        *plan.reward_parts(),
        *plan.steering_parts(),
        *plan.tunings().values(),
    ]
    return {part.name: part.command() for part in command_parts}
