"""Defines the settings of `train.py --mode=distill`: one tree from flags to JSON."""

import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from eg3d_rlhf.core.registry import Registry
from eg3d_rlhf.tuning.distill.schedules_by_step import Ramp, TimeWindow
from training.config import Knobs, built, check_knobs, knob

if TYPE_CHECKING:
    from eg3d_rlhf.core.interfaces import Guidance

ASSETS = "What is made"  # titles of groups of flags in the help
REAL = "With a prior from files"
METHOD = "Method"
OPT = "Optimisation"
# Controls. A twist of an image reward inverts its sign or replaces it by noise. A twist of a geometry reward
# inverts its sign or shuffles its weights.
TWISTS = ("inverted", "random")
_TWIST = rf"(?:-({'|'.join(TWISTS)}))?"


@dataclass(frozen=True, kw_only=True)
class Method:
    """A method of distillation. Its module adds it to METHODS, and its presets to `methods.PRESETS`."""

    settings: type  # a dataclass of knobs
    # (prior, settings, views=, streams=), also reward= and judge= as the next fields say
    guidance: "Callable[..., Guidance]"
    noises: Callable[[Any], int]  # number of noises per step and image, from the method's settings
    rewarded: bool = True  # accepts reward=
    judged: bool = False  # accepts judge=: a judge that ranks pairs in place of the reward


METHODS: Registry[Method] = Registry(
    "--method",
    dict.fromkeys(
        ("sds", "dreamdpo", "rewardsds", "dreamreward", "psd", "best-of-n"),
        "eg3d_rlhf.tuning.distill.methods",
    ),
)
_assets_knob = functools.partial(knob, group=ASSETS)
_rare_opt_knob = functools.partial(knob, group=OPT, rare=True)


@dataclass(frozen=True)
class Arm:
    """An arm of a comparison: a method, the control that is applied to its reward, and a geometry
    reward if there is one.
    """

    method: str  # a name of METHODS
    twist: str | None = None
    geometry: bool = False  # True: a geometry reward is added
    geometry_twist: str | None = None  # control of the geometry reward, one of TWISTS

    @classmethod
    def parse(cls, text: str) -> "Arm":
        """Parse 'dreamdpo', 'dreamdpo-random', 'sds+geometry', 'sds+geometry-inverted'. Raises:
        ValueError.
        """
        # Groups: method, twist, +geometry with its twist, twist of the geometry reward.
        pattern = rf"({'|'.join(METHODS)}){_TWIST}(\+geometry{_TWIST})?"
        parts = re.fullmatch(pattern, text.strip())
        # A method without a reward has nothing that could be inverted.
        if parts is None or (parts[2] and not METHODS[parts[1]].rewarded):
            raise ValueError(
                f"expected arms such as {', '.join(METHODS)}; -{' or -'.join(TWISTS)} may follow a method"
                f" that has a reward, and +geometry or +geometry-{' or +geometry-'.join(TWISTS)} may stand"
                f" at the end; got {text.strip()!r}. Correct it."
            )
        return cls(parts[1], parts[2], bool(parts[3]), parts[4])

    @property
    def name(self) -> str:
        """Name of the arm, which `parse` reads again."""
        # Multiplication by a truth value: "" without a geometry reward.
        shape = "+geometry" * self.geometry + (f"-{self.geometry_twist}" if self.geometry_twist else "")
        return self.method + (f"-{self.twist}" if self.twist else "") + shape


def parse_ramp(text: str) -> Ramp:
    """Parse '0.02', or a ramp 's0,v0,v1,s1': linear from v0 at step s0 to v1 at step s1. Raises:
    ValueError.
    """
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"expected a number or a ramp s0,v0,v1,s1, got {text!r}. Correct it.") from None
    # `Ramp` checks the length and the order of the numbers.
    return Ramp(numbers[0] if len(numbers) == 1 else numbers)


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """Settings of the optimisation, for all methods."""

    steps: int = knob(100, "Number of optimisation steps of each asset.", OPT, low=1)
    batch: int = _rare_opt_knob(
        55, "Number of assets that are optimised together. Processes share the batches.", low=1
    )
    lr: float = _rare_opt_knob(
        0.05, "Learning rate of voxels or planes (Adam with betas 0.9 and 0.99).", above=0
    )
    lr_end: float = _rare_opt_knob(
        0.05,
        "Learning rates at the end, as a share of those at the start. They change linearly.",
        low=0,
        high=1,
    )
    decoder_lr: float = _rare_opt_knob(0.001, "Learning rate of decoders.", above=0)
    t_min: str = _rare_opt_knob(
        "0.02",
        "Smallest time of the diffusion, as a share of 1000: a number, or a ramp over steps s0,v0,v1,s1.",
        metavar="RAMP",
    )
    t_max: str = _rare_opt_knob(
        "0.98", "Largest time of the diffusion, in the same form as t_min.", metavar="RAMP"
    )
    shared_time: bool = _rare_opt_knob(
        True, "Use the same time for all views of an asset. Multi-view priors need it."
    )
    sparsity: str = _rare_opt_knob(
        "0", "Weight of the mean opacity along rays: a number or a ramp over steps.", metavar="RAMP"
    )
    opacity: str = _rare_opt_knob(
        "0", "Weight of the entropy of the opacity: a number or a ramp over steps.", metavar="RAMP"
    )
    tick: int = _rare_opt_knob(20, "Number of steps between two lines of stats.jsonl.", low=1)
    checkpoint_ticks: int = _rare_opt_knob(
        3, "Number of lines of stats.jsonl between two checkpoints.", low=1
    )

    def __post_init__(self) -> None:
        check_knobs(self)
        # Errors are reported now and with the name of the setting, not in the first step.
        for name in ("t_min", "t_max", "sparsity", "opacity"):
            try:
                parse_ramp(getattr(self, name))
            except ValueError as error:
                raise ValueError(f"--set {name}: {error}") from None
        # The window is checked at both ends, because a ramp may cross the other one.
        for step in (0, self.steps - 1):
            self.window.at(step)

    @property
    def window(self) -> TimeWindow:
        """The window from which times are sampled."""
        return TimeWindow(low=parse_ramp(self.t_min), high=parse_ramp(self.t_max))


@dataclass(frozen=True, kw_only=True)
class SceneConfig(Knobs):
    """Settings of the assets, and of the models that guide them."""

    prior: str = _assets_knob(
        "bundled",
        "Diffusion model of images: of the bundled problem, in closed form (bundled) or as a trained U-Net "
        "(bundled-unet); of heads of people (heads); a Stable Diffusion folder; or an MVDream file.",
        metavar="bundled|bundled-unet|heads|DIR|FILE",
    )
    reward: str | None = _assets_knob(
        None,
        "Reward of images: one-face, mode-distance, symmetry or mean-pixel with the bundled prior; a file of "
        "ImageReward, Reward3D or HPSv2, or a CLIP folder.",
        metavar="NAME|FILE",
        shown="none",
    )
    judge: str | None = _assets_knob(
        None,
        "Judge that ranks pairs in place of the reward, for dreamdpo and psd: questions, with the bundled"
        " prior.",
        metavar="NAME",
        shown="none",
    )
    geometry_reward: str = _assets_knob(
        "none",
        "Reward of the shape itself, in addition to the method: sigma is the bundled reward of densities, "
        "solid penalises leaks and floaters; with the bundled prior also one-nose and floaters, in closed"
        " form.",
        metavar="none|NAME|FILE",
    )
    assets: int = _assets_knob(1, "Number of assets of each prompt, with different seeds.", low=1)
    views: int = knob(4, "Number of views of each asset in a step.", REAL, low=1, rare=True)
    resolution: int = knob(
        64,
        "Rendered pixels per edge. The prior gets the images resized to its own size.",
        REAL,
        low=8,
        rare=True,
    )
    planes: int = knob(64, "Number of texels per edge of an asset's planes.", REAL, low=4, rare=True)
    amp: str = knob(
        "auto",
        "Half precision for the prior's network only; auto: on a GPU.",
        REAL,
        choices=("auto", "off", "half"),
        rare=True,
    )


@dataclass(frozen=True, kw_only=True)
class DistillSettings:
    """All settings that determine the result of a run."""

    prompts: tuple[str, ...]  # all different
    arms: tuple[str, ...]  # names of `Arm`s; with one there is no comparison
    scene: SceneConfig = field(default_factory=SceneConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    # Settings of methods that flags have changed, by name.
    guidance: Mapping[str, Any] = field(default_factory=dict)
    preset: str | None = None  # name of a preset of a method; `guidance` overrides its values
    seed: int = 0  # of all random streams

    def __post_init__(self) -> None:
        # Equal prompts would give equal assets, because random streams depend on prompt and seed.
        if not self.prompts or len(set(self.prompts)) != len(self.prompts):
            raise ValueError(
                f"--prompt: expected at least one prompt, all different, got {list(self.prompts)[:3]}. For"
                " more assets of a prompt use --assets."
            )
        if not self.arms or len(set(self.arms)) != len(self.arms):
            raise ValueError(
                f"--compare: expected at least one arm, all different, got {','.join(self.arms)}. Remove one."
            )
        # Raises ValueError for an unknown method or control.
        for name in self.arms:
            Arm.parse(name)

    def pairs(self) -> list[tuple[str, int]]:
        """Return (prompt, seed) of every asset: all prompts with the first seed, then with the second, ..."""
        return [(prompt, seed) for seed in range(self.scene.assets) for prompt in self.prompts]

    def batches(self) -> list[list[tuple[str, int]]]:
        """Split the pairs into batches that are optimised together."""
        pairs = self.pairs()
        # The split is part of the settings: with other batches, random streams would differ.
        return [pairs[i : i + self.loop.batch] for i in range(0, len(pairs), self.loop.batch)]

    def to_dict(self) -> dict:
        """Return the settings as JSON values."""
        # JSON has no tuples: lists make the values equal to those that are read again.
        return {**asdict(self), "prompts": list(self.prompts), "arms": list(self.arms)}

    @classmethod
    def of(cls, record: Mapping) -> "DistillSettings":
        """Build the settings from the result of `to_dict`. Raises: ValueError."""
        scene = built(SceneConfig, record["scene"])
        loop = built(LoopConfig, record["loop"])
        return cls(
            **{
                **record,
                "prompts": tuple(record["prompts"]),
                "arms": tuple(record["arms"]),
                "scene": scene,
                "loop": loop,
            }
        )
