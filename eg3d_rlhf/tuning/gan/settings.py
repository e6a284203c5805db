"""Settings of a GAN run, with or without a reward.

`Settings` holds one dataclass for each part of a run. `control_differs` compares two runs and lists why one
of them cannot be the control of the other. The defaults of each preset of networks and of each task are in
eg3d_rlhf/tuning/gan/presets.py. This module does not import torch, so that `train.py --help` starts quickly.
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
    check_knobs,
    knob,
    knobs_of,
    settings_from_values,
    settings_to_values,
)

# Titles under which --help lists flags.
REWARD = "Reward fine-tuning"
ROUNDS = "Preference rounds"
# Tasks of the GAN mode.
SCRATCH = "scratch"  # random initial weights
TUNING = "tuning"  # from a network, adversarial training only
REWARDED = "reward"  # from a network, with a reward
# Values of --round-labels.
SYNTHETIC = "synthetic"  # a simulated annotator labels
PEOPLE = "people"  # people label, in the labelling application
# Values of --round-start: the network from which a round's tuning starts.
PRETRAINED = "pretrained"  # the network of --init, in every round
LAST = "last"  # the tuned network of the round before
BUNDLED_STUDY = "bundled-study"  # value of --preset, see BUNDLED_STUDY in presets.py
SHAPINGS = ("none", "standardised", "softplus", "reference")  # values of --reward-shaping, see gan/phase.py
NOSE_FLOORS = ("window", "violators")  # values of the setting nose_floor, see floor_loss in gan/phase.py
DEMO_KIMG = 0.6  # length of the bundled tuning run, in thousands of images
# `control=False`: a run and its control may have different values of the setting, since the control has no
# reward. `rare=True`: the setting has no flag of its own; it is set by --set and listed by --help-all.
_rare_rounds_knob = functools.partial(knob, group=ROUNDS, rare=True)
_reward_knob = functools.partial(knob, group=REWARD, control=False)
_rare_reward_knob = functools.partial(_reward_knob, rare=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Settings that do not affect results."""

    desc: str | None = knob(None, "Text to add to the run folder's name.", RUN, flag=False, control=False)
    device: str = knob(
        "auto",
        "Device that the run uses. auto: the GPU if there is one, else the CPU.",
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
        shown="one for each core but the first, at most 3; 0 for data sets below 512 MB",
        control=False,
    )
    strict_cameras: bool = knob(
        False,
        "Reject training images whose cameras look wrong for the generator. Without this flag they cause a"
        " warning.",
        DATA,
        flag=False,
        control=False,
    )
    no_summary: bool = knob(
        False,
        "Skip the evaluation at the end of a reward run, which compares the generator before and after"
        " tuning.",
        RUN,
        flag=False,
        control=False,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Settings of the real images."""

    data: str = knob(
        bundled.DATA,
        "Training images with camera labels, in EG3D's format; or synthetic:people64, the synthetic heads"
        " that this package renders.",
        DATA,
        metavar="ZIP|DIR|synthetic:people64",
    )
    cond: bool = knob(
        True,
        "Use the camera labels of the images. Only True is possible, because the generator takes its cameras"
        " from these labels.",
        DATA,
    )
    mirror: bool = knob(False, "Add a mirrored copy of every image, with the mirrored camera.", DATA)

    def __post_init__(self):
        if not self.cond:
            raise ValueError(
                "--cond=False is not possible, because this generator takes its cameras from the labels."
                " Leave --cond out, or write --cond=True."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """Settings of the reward phase."""

    lambda_r: float = _reward_knob(
        10.0,
        "Weight of the reward in the loss. With 0, the run is bitwise identical to GAN training.",
        low=0,
    )
    lambda_sigma: float = _reward_knob(
        0.01,
        "Weight of the density-consistency term, which penalises changes of the density by tuning.",
        low=0,
    )
    lambda_front: float = _rare_reward_knob(
        0.0,
        "Weight of the penalty on density that grows between the frontal camera and the surface of the"
        " untuned shape.",
        low=0,
    )
    lambda_nose: float = _rare_reward_knob(
        0.0,
        "Weight of the penalty on faces that come nearer to the frontal camera than any face before tuning.",
        low=0,
    )
    nose_floor: str = _rare_reward_knob(
        "window",
        "Pixels over which the penalty of lambda_nose is averaged. window: all pixels of the depth window;"
        " violators: only the pixels that are too near, as in the published method.",
        choices=NOSE_FLOORS,
    )
    consistency_gate: float = _reward_knob(
        1.0,
        "Factor of the density-consistency term for shapes that scored below the upper bound of --reward-clip"
        " before tuning. All other shapes have the factor 1.",
        metavar="SHARE",
        low=0,
        high=1,
    )
    reward_clip: str = _reward_knob(
        "-10,10",
        "Bounds of the shaped reward (trust region); beyond them it has no gradient. A bound is a number, or"
        " qSHARE for a quantile of the rewards before tuning, as in -10,q0.55. iqr: the quartiles, moved"
        " outwards by 1.5 interquartile ranges. none: no bounds.",
        metavar="LOW,HIGH|iqr|none",
    )
    reward_shaping: str = _reward_knob(
        "none",
        "Function of the score that the reward phase maximises. none: the score itself; standardised: the"
        " score, shifted and scaled by its mean and its standard deviation before tuning; softplus:"
        " -softplus(-2 score), which is nearly constant for large scores; reference: the probability of"
        " winning against samples of the untuned generator.",
        choices=SHAPINGS,
    )
    consistency_resolution: int = _reward_knob(
        64, "Grid points per edge of the cube on which the densities are compared.", low=2, flag=False
    )
    consistency_psi: float = _rare_reward_knob(
        0.7,
        "Truncation psi of the samples on which the density-consistency term compares densities.",
        metavar="PSI",
        low=0,
    )
    # Truncation of the samples that the reward phase scores. Not a flag; 1 is no truncation, as in training.
    truncation_psi: float = 1.0

    def __post_init__(self):
        check_knobs(self)
        _, high = clip_range(self.reward_clip)  # raises an error for a malformed value
        if self.consistency_gate == 1:
            return  # all samples have the same weight; nothing to check
        if self.lambda_sigma == 0:
            raise ValueError(
                f"--consistency-gate={self.consistency_gate:g} has no effect, because it scales the"
                " density-consistency term and --lambda-sigma is 0. Set --lambda-sigma above 0, or leave"
                " --consistency-gate out."
            )
        # The upper bound separates the two groups of shapes. `clip_range` returns infinity for iqr as well:
        # its finite bound is computed later, from the scores of the untuned generator.
        if high == float("inf") and self.reward_clip != "iqr":
            raise ValueError(
                f"--consistency-gate={self.consistency_gate:g} needs a finite upper bound in --reward-clip,"
                f" which is {self.reward_clip}. Write e.g. --reward-clip=-10,q0.55."
            )


def clip_range(clip_text: str, quantile: Callable[[float], float] | None = None) -> tuple[float, float]:
    """Return the bounds of the trust region for a value of --reward-clip.

    Args:
        clip_text: value of --reward-clip: "LOW,HIGH", "iqr" or "none". LOW and HIGH are each a number, or
            qSHARE for a quantile of the shaped rewards of the untuned generator.
        quantile: function from a share in 0..1 to that quantile. With None, before the rewards are computed,
            this function only checks `clip_text`, and returns the share in place of the quantile.
    Returns: lower and upper bound. Both are infinite for "none", and also for "iqr", whose bounds
    `phase.clip_bounds` computes.
    Raises: ValueError for any other value, and for bounds that are not LOW < HIGH.
    """
    # iqr has bounds as well, but they follow from scores that only the reward phase has.
    if clip_text in ("none", "iqr"):
        return -float("inf"), float("inf")
    try:
        # Unpacking fails with ValueError, too, if there are not exactly two bounds.
        low, high = (_parse_bound(bound_text, quantile or float) for bound_text in clip_text.split(","))
    except ValueError:
        low = high = math.nan  # marks a malformed value, for the error below
    # Without the rewards, a number cannot be compared with a quantile (one "q"); two quantiles can.
    is_comparable = quantile is not None or clip_text.count("q") != 1
    if math.isnan(low) or is_comparable and not low < high:
        given_value = f"{clip_text!r}"
        if quantile is not None:
            given_value += f", which is {low:g},{high:g} with the rewards of the untuned generator"
        raise ValueError(
            f"--reward-clip: expected LOW,HIGH with LOW < HIGH, iqr or none, got {given_value}. Write e.g."
            " --reward-clip=-10,10."
        )
    return low, high


def _parse_bound(bound_text: str, quantile: Callable[[float], float]) -> float:
    """Convert the text of a bound, a number or qSHARE, to the bound. Raises: ValueError for other texts."""
    bound_value = float(bound_text.removeprefix("q"))
    # float() accepts "nan" as well, for which every comparison is False.
    if math.isnan(bound_value) or bound_text.startswith("q") and not 0 <= bound_value <= 1:
        raise ValueError(bound_text)
    return quantile(bound_value) if bound_text.startswith("q") else bound_value


@dataclasses.dataclass(frozen=True, kw_only=True)
class EarlyStopConfig:
    """Settings of the early stop, which chooses the snapshot that a run keeps."""

    early_stop: float | None = _reward_knob(
        None,
        "Keep the snapshot with the best held-out reward instead of the last snapshot. A snapshot whose"
        " densities are further from the untuned generator replaces a nearer one only if its held-out reward"
        " is higher by more than this number of standard errors.",
        metavar="STANDARD-ERRORS",
        low=0,
        shown="off: keep the last snapshot",
    )
    early_stop_distance: float | None = _rare_reward_knob(
        None,
        "Largest distance from the untuned generator that the snapshot chosen by --early-stop may have,"
        " measured as the mean |σ - σ_ref| of raw densities.",
        metavar="DISTANCE",
        above=0,
        shown="no limit",
    )

    def __post_init__(self):
        check_knobs(self)
        # Without --early-stop no snapshot is chosen, so the limit would silently have no effect.
        if self.early_stop is None and self.early_stop_distance is not None:
            raise ValueError(
                f"--set early_stop_distance={self.early_stop_distance:g} has no effect without --early-stop."
                " Add --early-stop=STANDARD-ERRORS, or remove early_stop_distance."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoundConfig(Knobs):
    """Settings of preference rounds."""

    rounds: int = knob(
        0,
        "Number of preference rounds. Each round labels pairs of samples, trains rewards on all labels and"
        " tunes the generator for the length of --kimg. 0: tune once, with the reward of --reward-ckpt.",
        ROUNDS,
        low=0,
    )
    round_pairs: int = knob(
        400, "Number of pairs of samples to label in each round.", ROUNDS, metavar="PAIRS", low=1, high=10**5
    )
    round_labels: str = knob(
        SYNTHETIC,
        "Source of the labels. synthetic: the simulated annotator; people: people, in the labelling"
        " application. With people the run stops in each round; continue it with --resume when the labels are"
        " complete.",
        ROUNDS,
        choices=(SYNTHETIC, PEOPLE),
    )
    round_doubtful: float = _rare_rounds_knob(
        0.5,
        "Share of the pairs of a round that are those on which the rewards of the round before disagree most."
        " All other pairs, and all pairs of the first round, are random.",
        metavar="0..1",
        low=0,
        high=1,
    )
    round_members: int = _rare_rounds_knob(
        5, "Number of rewards in the ensemble that each round trains.", low=1, high=100
    )
    round_preset: str | None = _rare_rounds_knob(
        None,
        "Architecture of the rewards, one of the values of --preset of tools/train_reward.py.",
        metavar="NAME",
        shown="the default of --reward",
    )
    round_aggregate: str | None = _rare_rounds_knob(
        None,
        "Function that combines the scores of the ensemble, one of the values of --aggregate of"
        " tools/train_reward.py.",
        metavar="NAME",
        shown="the mean of raw scores",
    )
    round_start: str = _rare_rounds_knob(
        PRETRAINED,
        "Network from which the tuning of a round starts. pretrained: the network of --init; last: the tuned"
        " network of the round before.",
        choices=(PRETRAINED, LAST),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardSettings(Knobs):
    """Settings of the reward that tunes the generator, of the held-out reward, and of the loss terms."""

    reward: str = knob(
        "none",
        "Kind of the reward that tunes the generator, such as sigma (density) or solid. none: GAN training"
        " without a reward.",
        REWARD,
        metavar="none|KIND",
    )
    preset: str | None = _reward_knob(
        None,
        "Settings of tuning with a reward, apart from the network and the adversarial losses. bundled-study:"
        " the settings with which the bundled heads were tuned, that is a standardised reward that is clipped"
        " at a quantile, and density consistency that is weighed per sample.",
        choices=(BUNDLED_STUDY,),
        shown="the paper's settings; with --cfg=heads64 those of bundled-study",
    )
    reward_ckpt: str | None = _reward_knob(
        None,
        "File of the trained reward that tunes the generator.",
        metavar="FILE",
        shown="with --cfg=heads64 the bundled reward",
    )
    heldout_reward: str | None = _reward_knob(
        None,
        "File of a held-out reward. The run measures it at every tick, and does not tune by it. If it falls"
        " while the reward of --reward-ckpt rises, the run warns of over-optimisation.",
        metavar="FILE",
        shown="with --cfg=heads64 the bundled held-out reward",
    )
    reference: str | None = _reward_knob(
        None,
        "Network with which the tuned network is compared, in the density-consistency term and in reports.",
        flag=False,
        shown="the initial network",
    )
    level: float | None = _rare_reward_knob(
        None,
        "Raw density at the surface of the shapes. The snapshots of the run contain it, so later commands"
        " need no level.",
        shown="the level of the reward's labels, else that in the file of --init, else 10",
    )
    terms: RewardConfig = RewardConfig()  # loss terms
    keeping: EarlyStopConfig = EarlyStopConfig()  # early stop: choice of the snapshot that the run keeps
    rlr: float = _rare_reward_knob(0.0025, "Learning rate of the reward phase (Adam).", above=0)
    control: str | None = _reward_knob(
        None,
        "Folder or summary file of a control run, that is, the same run with --lambda-r=0. Its results are"
        " quoted in the summary of this run.",
        metavar="RUN|FILE",
        shown="the summary in assets whose settings match this run, if there is one",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """All settings of a run of the GAN mode.

    In JSON and as flags, all settings form one flat list of names. This is possible because no name occurs
    in two parts.
    """

    task: str  # SCRATCH, TUNING or REWARDED; the defaults of other settings depend on it
    run: RunConfig = RunConfig()  # device, workers, name
    data: DataConfig = DataConfig()  # training images
    net: NetworkConfig = NetworkConfig()  # architecture or initial networks
    gan: GanConfig = GanConfig()  # adversarial losses and schedules
    loop: LoopConfig = LoopConfig()  # length, batch, intervals
    reward: RewardSettings = RewardSettings()  # reward and loss terms
    rounds: RoundConfig = RoundConfig()  # preference rounds

    def to_dict(self) -> dict:
        """Return all settings as a flat dictionary from name to JSON value."""
        return {"task": self.task, **settings_to_values(self)}

    @classmethod
    def from_values(cls, values: Mapping) -> "Settings":
        """Build the settings from a flat dictionary, such as the one that a run stored.

        Args:
            values: setting's name -> value. "task" is required. A missing setting gets its default. Names
                that are not settings are ignored.
        """
        # Two settings depend on the task and are not flags. As in EG3D, a run that starts from a network has
        # no EMA ramp-up, and its ADA reacts faster.
        starts_from_scratch = values["task"] == SCRATCH
        task_defaults = {
            "ema_rampup": 0.05 if starts_from_scratch else None,
            "ada_kimg": 500.0 if starts_from_scratch else 100.0,
        }
        # Values that the run stored take precedence.
        return settings_from_values(cls, {**task_defaults, **values})

    def changed(self, **values) -> "Settings":
        """Return a copy of the settings in which the named settings have the given values."""
        return Settings.from_values({**self.to_dict(), **values})

    @property
    def title(self) -> str:
        """Title of the run for its folder's name.

        The title is cfg-dataset-batchB-gammaX as in EG3D. The reward with its weight and the number of rounds
        follow, if the run has them.
        """
        # "synthetic:people64@n=500" -> "synthetic-people64", because some systems allow no colon in the name
        # of a folder.
        dataset = Path(self.data.data.replace(":", "-").split("@")[0]).stem
        title_text = f"{self.net.cfg}-{dataset}-batch{self.loop.batch}-gamma{self.gan.gamma:g}"
        if self.reward.reward != "none":
            title_text += f"-{self.reward.reward}-lambda{self.reward.terms.lambda_r:g}"
        if self.rounds.rounds:
            title_text += f"-rounds{self.rounds.rounds}"
        return title_text


# Entries of a run's record that are not settings. `control_differs` compares the hashes on its own.
_RECORDED = frozenset({"task", "hashes", "launch", "processes", "versions"})


@functools.cache
def not_the_controls() -> frozenset[str]:
    """Return the names of the values in a run's record that may differ between a run and its control.

    The control is the run with lambda_r = 0. The names are those of the settings with control=False, and of
    the entries of the record that are not settings. Settings with control=False are the settings of the
    reward, the settings that only affect the display, and the paths of files, since files are compared by
    their hashes.
    """
    return _RECORDED | {field.name for field, _, knob in knobs_of(Settings) if not knob.control}


def control_differs(tuned_record: dict, control_record: dict) -> list[str]:
    """List the differences for which a run cannot be the control of a tuned run.

    Args:
        tuned_record: record of the tuned run: its settings by name, and the hashes of its input files
            ("hashes").
        control_record: record of the possible control, in the same form. Settings that only one of the two
            records has are not compared.
    Returns: one text for each difference, "NAME VALUE instead of EXPECTED-VALUE". The list is empty if the
    run can be the control.
    """
    # Only names that both records have: the record of an older version may lack newer settings.
    setting_names = sorted((tuned_record.keys() & control_record.keys()) - not_the_controls())
    # name -> (value of the control, expected value)
    compared_values = {
        setting_name: (control_record[setting_name], tuned_record[setting_name])
        for setting_name in setting_names
    }
    # A special case: the control's lambda_r must not equal that of the tuned run, but 0.
    compared_values["lambda_r"] = control_record.get("lambda_r", 0), 0
    control_hashes = control_record.get("hashes", {})
    tuned_hashes = tuned_record.get("hashes", {})
    # Files are compared by content. Eight digits of a hash are enough to show that files differ.
    compared_values |= {
        f"{role} (bytes)": (control_hashes[role][:8], tuned_hashes[role][:8])
        for role in ("init", "reward")
        if role in tuned_hashes and role in control_hashes
    }
    return [
        f"{setting_name} {control_value} instead of {expected_value}"
        for setting_name, (control_value, expected_value) in compared_values.items()
        if control_value != expected_value
    ]
