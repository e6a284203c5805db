"""Accuracy on held-out labels that the file of a reward states, and its check before the reward is used.

A reward whose accuracy is not above chance orders shapes at random, so a generator that is tuned by it
changes in a random direction. Jobs that tune reject such a reward unless --weak-reward is given; jobs that
only rank print a warning. Exempt are rewards without labels (such as solid), declared controls, and
runs in which the reward has no weight.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eg3d_rlhf.rewards.evaluation import MIN_TEST, MIN_TRAIN, auc_interval
from eg3d_rlhf.rewards.presets import presets_of
from eg3d_rlhf.rewards.reward import Reward, read_provenance

WEAK_REWARD = "--weak-reward"  # flag with which jobs that tune accept a weak reward
CHANCE = 0.5  # accuracy and AUC of a reward that orders shapes at random
CONTROL = (
    "control"  # entry of a provenance that declares the reward to be a control, with the kind of control
)


@dataclass(frozen=True, kw_only=True)
class StatedAccuracy:
    """Accuracy of a reward on held-out labels, or its AUC if its labels are of single shapes."""

    name: str  # "accuracy" or "AUC"
    value: float  # 0..1
    low: float  # lower end of the 95 % interval
    high: float  # upper end of the 95 % interval
    count: int  # number of held-out pairs, or of held-out shapes or meshes
    unit: str  # noun in the plural of what `count` counts
    training_count: int | None = None  # number of training pairs; None if the file does not state it

    @property
    def is_weak(self) -> bool:
        """True if the reward is not above chance: its interval includes one half, or lies below."""
        return self.low <= CHANCE

    def __str__(self) -> str:
        """Return the accuracy with its interval and the number of pairs, as text for a message."""
        return (
            f"held-out {self.name} {self.value:.3f}, 95 % interval {self.low:.3f} to {self.high:.3f}"
            f" ({self.count} {self.unit})"
        )


def accuracy_of(provenance: Mapping[str, Any]) -> StatedAccuracy | None:
    """Return the accuracy that the provenance of a reward states, or None if it states none.

    Args:
        provenance: facts about the training of a reward of shapes, of a mesh reward (its entry "held_out") or
            of a reward of latents (its entry "evaluation").
    """
    if (rate := provenance.get("test_accuracy")) and rate.get("accuracy") is not None:
        low, high = rate["interval_95"]
        return StatedAccuracy(
            name="accuracy",
            value=rate["accuracy"],
            low=low,
            high=high,
            # files of earlier versions do not state the number of pairs
            count=rate.get("pairs", rate["n"]),
            unit="pairs",
            training_count=(provenance.get("pairs") or {}).get("train"),
        )
    if held_out := provenance.get("held_out"):
        low, high = auc_interval(held_out["auc"], *held_out["n"])
        return StatedAccuracy(
            name="AUC", value=held_out["auc"], low=low, high=high, count=sum(held_out["n"]), unit="meshes"
        )
    if evaluation := provenance.get("evaluation"):
        value, low, high = evaluation["latent"]["accuracy"]
        return StatedAccuracy(
            name="accuracy", value=value, low=low, high=high, count=evaluation["pairs"], unit="pairs"
        )
    return None


def declared_control(provenance: Mapping[str, Any]) -> str:
    """Return the kind of control that a provenance declares, and '' for a reward that is no control."""
    if provenance.get(CONTROL):
        return str(provenance[CONTROL])
    if provenance.get("wrong_faces"):
        return "labels of other shapes"
    # The value is the seed of the permutation, which may be 0.
    if "permuted" in provenance:
        return "permuted weights"
    training = provenance.get("training")
    if isinstance(training, Mapping) and training.get("randomised"):
        return "randomised labels"
    return "face areas only" if isinstance(training, Mapping) and training.get("area_only") else ""


@dataclass(frozen=True, kw_only=True)
class RewardUse:
    """Use of a reward by a job, on which the treatment of a weak reward depends."""

    tunes: bool = False  # True if a generator or a latent is optimised by the reward; False: it only ranks
    allows_weak: bool = False  # True if the user accepted a weak reward
    is_main: bool = True  # False on the other processes of a run, which print nothing
    remedy: str = WEAK_REWARD  # flag of this job with which the user accepts a weak reward


RANKING = RewardUse()


def announce_reward(reward: Reward, flag: str, use: RewardUse = RANKING) -> None:
    """Print the stated accuracy of a reward, and reject or warn of a weak one; see `announce_accuracy`.

    A reward of a kind that needs no training has no labels, and nothing is printed.
    """
    if presets_of(reward.observation.kind):
        announce_accuracy(reward.provenance, flag, use)


def announce_file(path: Path, flag: str, use: RewardUse = RANKING) -> None:
    """Print the stated accuracy of a reward's file; see `announce_accuracy`. No weights are read.

    Args: path: file of a reward of shapes, as `load_reward` reads it.
    """
    kind, provenance = read_provenance(path)
    if presets_of(kind):
        announce_accuracy(provenance, flag, use)


def announce_accuracy(provenance: Mapping[str, Any], flag: str, use: RewardUse = RANKING) -> None:
    """Print one line on the accuracy that a reward states, and warnings on stderr.

    There is a warning if the file states no accuracy, if there were few labels, or if the reward is weak and
    is not rejected.

    Args:
        provenance: facts about the training of the reward, see `accuracy_of`.
        flag: flag that named the reward, with which the messages begin.
        use: use of the reward.
    Raises: ValueError if the job tunes by the reward and the reward is weak, unless the user accepted it or
        it is a declared control.
    """

    def warn(text: str) -> None:
        """Print a warning on stderr."""
        if use.is_main:
            print(f"Warning: {flag}: {text}", file=sys.stderr, flush=True)

    label_use = provenance.get("label_use") or {}
    if label_use.get("uncalibrated"):
        # --uncalibrated was chosen for the training, and every later use repeats it.
        warn(
            f"this reward was trained on labels of judges ({', '.join(label_use.get('judges', {}))}) that are"
            " uncalibrated: no calibration against people has passed. Measure what it chooses or tunes with"
            " people."
        )
    accuracy = accuracy_of(provenance)
    control = declared_control(provenance)
    if accuracy is None and provenance.get("inputs"):
        _announce_joined(provenance["inputs"], flag, use, warn)
        return
    if accuracy is None:
        if not control:
            warn(
                "the file of this reward states no accuracy on held-out labels, so nothing shows that it is"
                " above chance. Measure it on labels of your own before you trust its scores."
            )
        return
    if use.is_main:
        control_text = f"; this reward is a declared control ({control})" if control else ""
        # Jobs that only rank may print JSON on stdout.
        stream = sys.stdout if use.tunes else sys.stderr
        print(f"{flag}: {accuracy}{control_text}.", file=stream, flush=True)
    if control:
        return
    if accuracy.is_weak:
        problem = (
            f"this reward is not above chance: {accuracy}. What it chooses or tunes is as good as random"
        )
        remedy = "Label more pairs, and train the reward again"
        if use.tunes and not use.allows_weak:
            raise ValueError(
                f"{flag}: {problem}. {remedy}; or add {use.remedy} to use this reward nonetheless."
            )
        warn(f"{problem}. {remedy}.")
    elif accuracy.unit == "pairs" and (
        accuracy.count < MIN_TEST
        or (accuracy.training_count is not None and accuracy.training_count < MIN_TRAIN)
    ):
        training_text = (
            "" if accuracy.training_count is None else f"{accuracy.training_count} pairs for training and "
        )
        warn(
            f"this reward has few labels ({training_text}{accuracy.count} for the test). {MIN_TRAIN} pairs"
            f" for training are usually enough to learn; {MIN_TEST} for the test are needed to measure the"
            " accuracy, which is uncertain here. Label more pairs."
        )


def describe_inputs(inputs: Sequence[Mapping[str, Any]]) -> str:
    """Return what is known of the accuracy of rewards that were joined, as text for a message.

    Args: inputs: entry "inputs" of the provenance of an ensemble, see `reward.stated_inputs`.
    """
    input_texts = []
    for input_entry in inputs:
        control = declared_control(input_entry)
        accuracy_text = str(accuracy_of(input_entry) or "no stated accuracy")
        input_texts.append(
            f"{input_entry['name']}: {accuracy_text}{f', a declared control ({control})' if control else ''}"
        )
    return "; ".join(input_texts)


def _announce_joined(
    inputs: Sequence[Mapping[str, Any]], flag: str, use: RewardUse, warn: Callable[[str], None]
) -> None:
    """Print what is known of the accuracy of an ensemble that `reward join` wrote; see `announce_accuracy`.

    The ensemble is weak if no member is shown to be above chance: a combination of random orders is random.

    Args:
        inputs: entry "inputs" of the provenance.
        warn: function that prints a warning.
    Raises: ValueError if the job tunes by the reward and all members are weak, as in `announce_accuracy`.
    """
    known_text = f"the accuracy of this ensemble was not measured. Its members: {describe_inputs(inputs)}"
    accuracies = [accuracy_of(input_entry) for input_entry in inputs if not declared_control(input_entry)]
    if not accuracies:  # all members are declared controls
        if use.is_main:
            print(f"{flag}: {known_text}.", file=sys.stdout if use.tunes else sys.stderr, flush=True)
    elif all(accuracy is not None and accuracy.is_weak for accuracy in accuracies):
        problem = f"no member of this ensemble is above chance, and {known_text}"
        remedy = "Label more pairs, and train the rewards again"
        if use.tunes and not use.allows_weak:
            raise ValueError(
                f"{flag}: {problem}. {remedy}; or add {use.remedy} to use this reward nonetheless."
            )
        warn(f"{problem}. {remedy}.")
    else:
        warn(f"{known_text}.")
