"""Settings of a GAN run with or without a reward: a dataclass for each part, one tree, and what decides
whether two runs compare.

Torch is not imported here. Which defaults hold for which networks and tasks: eg3d_rlhf/modes/gan.py.
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

# titles under which --help lists flags
REWARD = "Reward fine-tuning"
ROUNDS = "Preference rounds"
# tasks
SCRATCH = "scratch"
TUNING = "tuning"
REWARDED = "reward"
# who labels in rounds
SYNTHETIC = "synthetic"
PEOPLE = "people"
# what a round's tuning starts from
PRETRAINED = "pretrained"
LAST = "last"
SHAPINGS = ("none", "standardised", "softplus", "reference")  # see eg3d_rlhf.tuning.gan.phase
NOSE_FLOORS = ("window", "violators")  # see eg3d_rlhf.tuning.gan.phase
DEMO_KIMG = 0.6  # thousand images of the bundled tuning run
_rare_rounds_knob = functools.partial(knob, group=ROUNDS, rare=True)
_reward_knob = functools.partial(knob, group=REWARD, control=False)
_rare_reward_knob = functools.partial(_reward_knob, rare=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What does not change what is trained."""

    desc: str | None = knob(None, "Added to the run folder's name.", RUN, flag=False, control=False)
    device: str = knob(
        "auto", "Where to run.", RUN, choices=("auto", "cpu", "cuda"), flag=False, control=False
    )
    workers: int | None = knob(
        None,
        "Processes of one thread that read images ahead; 0: the training process. No result depends on it.",
        DATA,
        low=0,
        high=64,
        shown="one for each further core, at most 3; 0 for sets under 512 MB, which are kept in memory",
        control=False,
    )
    no_summary: bool = knob(
        False, "Skip the before/after evaluation that ends a reward run.", RUN, flag=False, control=False
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The real images."""

    data: str = knob(bundled.DATA, "Images in EG3D's format.", DATA, metavar="ZIP|DIR|synthetic:people64")
    cond: bool = knob(True, "Use the camera labels (required by this generator).", DATA)
    mirror: bool = knob(False, "Add mirrored images, with mirrored poses.", DATA)

    def __post_init__(self):
        if not self.cond:
            raise ValueError(
                "--cond: expected True, got False. Cameras come from the labels; a run without them is not"
                " possible."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """Settings of the reward phase."""

    lambda_r: float = _reward_knob(10.0, "Reward weight; 0 is the GAN run, bit for bit.", low=0)
    lambda_sigma: float = _reward_knob(0.01, "Density consistency weight.", low=0)
    lambda_front: float = _rare_reward_knob(0.0, "Front-growth penalty weight.", low=0)
    lambda_nose: float = _rare_reward_knob(
        0.0, "Weight of the nose floor: no face nearer to the frontal camera than any untuned one.", low=0
    )
    nose_floor: str = _rare_reward_knob(
        "window",
        "Its mean, over the window's pixels or the violators alone (published).",
        choices=NOSE_FLOORS,
    )
    consistency_gate: float = _reward_knob(
        1.0,
        "Share of the consistency weight for shapes that scored below the clip's HIGH before tuning; 1: the"
        " same for all.",
        metavar="SHARE",
        low=0,
        high=1,
    )
    reward_clip: str = _reward_knob(
        "-10,10",
        "Trust region of the shaped reward; qSHARE is a quantile of untuned ones, as in -10,q0.55.",
        metavar="LOW,HIGH|iqr|none",
    )
    reward_shaping: str = _reward_knob("none", "How the score enters the loss.", choices=SHAPINGS)
    consistency_resolution: int = _reward_knob(
        64, "Grid points per edge of the whole cube that is held to the reference.", low=2, flag=False
    )
    consistency_psi: float = _rare_reward_knob(
        0.7, "Truncation of the samples that are held to the reference.", metavar="PSI", low=0
    )
    truncation_psi: float = 1.0  # of the samples that are scored

    def __post_init__(self):
        check_knobs(self)
        _, high = clip_range(self.reward_clip)
        if self.consistency_gate == 1:
            return
        if self.lambda_sigma == 0:
            raise ValueError(
                f"--consistency-gate={self.consistency_gate:g}: expected --lambda-sigma above 0, got 0. Give"
                " it, or leave this out."
            )
        if high == float("inf") and self.reward_clip != "iqr":
            clip = f"--reward-clip with a HIGH, got {self.reward_clip}"
            raise ValueError(
                f"--consistency-gate={self.consistency_gate:g}: expected {clip}. Write e.g."
                " --reward-clip=-10,q0.55."
            )


def clip_range(spec: str, quantile: Callable[[float], float] | None = None) -> tuple[float, float]:
    """Bounds of the trust region as --reward-clip has them: LOW,HIGH, each a number, or qSHARE for a quantile
    of the untuned scores.

    Args: quantile: of the untuned shaped rewards, by share in 0..1. None: they are not known yet, and shares
        stand for their quantiles.
    Returns: low, high; infinite for none, and for iqr, whose bounds are the phase's.
    Raises: ValueError for anything else, and for bounds that are not LOW < HIGH.
    """
    if spec in ("none", "iqr"):
        return -float("inf"), float("inf")
    try:
        low, high = (_bound(part, quantile or float) for part in spec.split(","))
    except ValueError:
        low = high = math.nan
    # a number and a quantile are not, before the scores are known
    comparable = quantile is not None or spec.count("q") != 1
    if math.isnan(low) or comparable and not low < high:
        got = f"{spec!r}" if quantile is None else f"{spec!r}, with these scores {low:g},{high:g}"
        raise ValueError(
            f"--reward-clip: expected LOW,HIGH with LOW < HIGH, iqr or none, got {got}. Write e.g."
            " --reward-clip=-10,10."
        )
    return low, high


def _bound(part: str, quantile: Callable[[float], float]) -> float:
    number = float(part.removeprefix("q"))
    if math.isnan(number) or part.startswith("q") and not 0 <= number <= 1:
        raise ValueError(part)
    return quantile(number) if part.startswith("q") else number


@dataclasses.dataclass(frozen=True, kw_only=True)
class EarlyStopConfig:
    """Whether a run keeps another snapshot than its last, and which."""

    early_stop: float | None = _reward_knob(
        None,
        "Keep the snapshot that the second reward and the distance choose; a further one must gain more than"
        " this.",
        metavar="STANDARD-ERRORS",
        low=0,
        shown="off: the last",
    )
    early_stop_distance: float | None = _rare_reward_knob(
        None,
        "With --early-stop: largest mean |σ - σ_ref| of a snapshot that is kept, raw density.",
        metavar="DISTANCE",
        above=0,
        shown="any",
    )

    def __post_init__(self):
        check_knobs(self)
        if self.early_stop is None and self.early_stop_distance is not None:
            raise ValueError(
                f"--early-stop-distance={self.early_stop_distance:g}: expected --early-stop with it, got"
                " none. Add it."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoundConfig(Knobs):
    """How many rounds there are, and what one consists of."""

    rounds: int = knob(
        0,
        "Rounds of labels, rewards and tuning by --kimg each; 0: tune once, with --reward-ckpt.",
        ROUNDS,
        low=0,
    )
    round_pairs: int = knob(400, "Pairs to label in each round.", ROUNDS, metavar="PAIRS", low=1, high=10**5)
    round_labels: str = knob(
        SYNTHETIC,
        "Who labels: the programmatic annotator, or people, for whom the run waits.",
        ROUNDS,
        choices=(SYNTHETIC, PEOPLE),
    )
    round_doubtful: float = _rare_rounds_knob(
        0.5,
        "Share of pairs over which the last round's rewards disagree; the others, and the first round's, are"
        " random.",
        metavar="0..1",
        low=0,
        high=1,
    )
    round_members: int = _rare_rounds_knob(5, "Rewards in an ensemble.", low=1, high=100)
    round_preset: str | None = _rare_rounds_knob(
        None, "Rewards' architecture, see tools/train_reward.py.", metavar="NAME", shown="its default"
    )
    round_aggregate: str | None = _rare_rounds_knob(
        None,
        "What the ensemble's scores become.",
        metavar="NAME",
        shown="the mean of raw scores; see tools/train_reward.py",
    )
    round_start: str = _rare_rounds_knob(
        PRETRAINED, "Network that tuning starts from.", choices=(PRETRAINED, LAST)
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardSettings(Knobs):
    """Which reward tunes, what watches it, and how."""

    reward: str = knob(
        "none",
        "What scores the generator: a reward that reads sigma, or another observation.",
        REWARD,
        metavar="none|KIND",
    )
    reward_ckpt: str | None = _reward_knob(None, "Trained reward.", metavar="FILE", shown="bundled")
    heldout_reward: str | None = _reward_knob(
        None,
        "Second reward, never trained on, that must not fall while the first rises.",
        metavar="FILE",
        shown="bundled",
    )
    reference: str | None = _reward_knob(
        None, "Network that the tuned one is held to and compared with.", flag=False, shown="the initial one"
    )
    terms: RewardConfig = RewardConfig()
    keeping: EarlyStopConfig = EarlyStopConfig()
    rlr: float = _rare_reward_knob(0.0025, "Reward optimiser's learning rate.", above=0)
    control: str | None = _reward_knob(
        None,
        "Summary of the lambda_r = 0 run to quote.",
        metavar="RUN|FILE",
        shown="recorded in assets, where it is one",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that decides a run of the GAN mode; JSON and flags are flat, since no name comes twice."""

    task: str  # what decided the defaults
    run: RunConfig = RunConfig()
    data: DataConfig = DataConfig()
    net: NetworkConfig = NetworkConfig()
    gan: GanConfig = GanConfig()
    loop: LoopConfig = LoopConfig()
    reward: RewardSettings = RewardSettings()
    rounds: RoundConfig = RoundConfig()

    def to_dict(self) -> dict:
        return {"task": self.task, **values_of(self)}

    @classmethod
    def of(cls, values: Mapping) -> "Settings":
        """From values by name, such as a run's record; what is missing has its default, what is no setting is
        left out.
        """
        fresh = values["task"] == SCRATCH  # what the task decides and no flag
        return built(
            cls, {"ema_rampup": 0.05 if fresh else None, "ada_kimg": 500.0 if fresh else 100.0, **values}
        )

    def changed(self, **values) -> "Settings":
        return Settings.of({**self.to_dict(), **values})

    @property
    def title(self) -> str:
        """EG3D's naming: cfg-dataset-batchB-gammaX, with the reward's weight."""
        dataset = Path(self.data.data.replace(":", "-").split("@")[0]).stem
        name = f"{self.net.cfg}-{dataset}-batch{self.loop.batch}-gamma{self.gan.gamma:g}"
        if self.reward.reward != "none":
            name += f"-{self.reward.reward}-lambda{self.reward.terms.lambda_r:g}"
        if self.rounds.rounds:
            name += f"-rounds{self.rounds.rounds}"
        return name


# what a run folder records beside the settings, of which the hashes are compared by themselves
_RECORDED = frozenset({"task", "hashes", "launch", "processes", "versions"})


@functools.cache
def not_the_controls() -> frozenset[str]:
    """Return the names of a run's record whose values the run with lambda_r = 0 need not share.

    They are the knobs with control=False: the reward's own settings, names of files (their hashes count), and
    how a run is shown.
    """
    return _RECORDED | {field.name for field, _, knob in knobs_of(Settings) if not knob.control}


def control_differs(settings: dict, record: dict) -> list[str]:
    """What keeps a run with lambda_r = 0 from being the control of another: 'name got instead of expected',
    [] where nothing does.

    Args:
        settings: of the tuned run, as its folder records them, with the `hashes` of its inputs.
        record: of the control, likewise; settings that only one of the two knows are not compared.
    """
    names = sorted((settings.keys() & record.keys()) - not_the_controls())
    pairs = {name: (record[name], settings[name]) for name in names}
    pairs["lambda_r"] = record.get("lambda_r", 0), 0
    theirs = record.get("hashes", {})
    ours = settings.get("hashes", {})
    pairs |= {
        f"{name} (bytes)": (theirs[name][:8], ours[name][:8])
        for name in ("init", "reward")
        if name in ours and name in theirs
    }
    return [
        f"{name} {got} instead of {expected}" for name, (got, expected) in pairs.items() if got != expected
    ]
