"""Settings of `train.py --mode=distill`: one tree from flags to JSON, and presets as a table with a row for
each kind of prior.
"""

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

ASSETS = "What is made"
REAL = "With a prior from files"
METHOD = "Method"
OPT = "Optimisation"
# of a reward: its sign turned, or replaced by noise; of one that looks at shapes, its weights shuffled
TWISTS = ("inverted", "random")
_TWIST = rf"(?:-({'|'.join(TWISTS)}))?"


@dataclass(frozen=True, kw_only=True)
class Method:
    """How assets are made: what a method's module adds to METHODS, and its presets to `methods.PRESETS`."""

    settings: type  # a dataclass of knobs
    guidance: "Callable[..., Guidance]"  # (prior, settings, views=, streams=, and what the next two say)
    noises: Callable[[Any], int]  # per step and picture, of its settings
    rewarded: bool = True  # takes reward=
    judged: bool = False  # takes judge=: a judge of pairs may rank in the reward's place


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
    """One column of a comparison: a method, what is done to its reward, and whether a reward looks at the
    geometry, too.
    """

    method: str
    twist: str | None = None
    geometry: bool = False
    geometry_twist: str | None = None

    @classmethod
    def parse(cls, text: str) -> "Arm":
        """'dreamdpo', 'dreamdpo-random', 'sds+geometry', 'sds+geometry-inverted'. Raises: ValueError."""
        pattern = rf"({'|'.join(METHODS)}){_TWIST}(\+geometry{_TWIST})?"
        parts = re.fullmatch(pattern, text.strip())
        if parts is None or (parts[2] and not METHODS[parts[1]].rewarded):
            raise ValueError(
                f"expected arms such as {', '.join(METHODS)}, with -{' or -'.join(TWISTS)} after a method"
                f" that has a reward, and +geometry at the end, twisted likewise, got {text.strip()!r}."
                " Correct it."
            )
        return cls(parts[1], parts[2], bool(parts[3]), parts[4])

    @property
    def name(self) -> str:
        shape = "+geometry" * self.geometry + (f"-{self.geometry_twist}" if self.geometry_twist else "")
        return self.method + (f"-{self.twist}" if self.twist else "") + shape


def ramp_of(text: str) -> Ramp:
    """'0.02', or a ramp 's0,v0,v1,s1': linear from v0 at step s0 to v1 at step s1. Raises: ValueError."""
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"expected a number or a ramp s0,v0,v1,s1, got {text!r}. Correct it.") from None
    return Ramp(numbers[0] if len(numbers) == 1 else numbers)


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How assets are optimised, whatever the method."""

    steps: int = knob(100, "Steps of each asset.", OPT, low=1)
    batch: int = _rare_opt_knob(55, "Assets that are optimised together; processes share the batches.", low=1)
    lr: float = _rare_opt_knob(0.05, "Learning rate of voxels or planes (Adam, betas 0.9 and 0.99).", above=0)
    lr_end: float = _rare_opt_knob(
        0.05, "Learning rates at the end, as a share of those at the start; linear in between.", low=0, high=1
    )
    decoder_lr: float = _rare_opt_knob(0.001, "Learning rate of decoders.", above=0)
    t_min: str = _rare_opt_knob(
        "0.02", "Least time, as a share of 1000: a number, or a ramp over steps s0,v0,v1,s1.", metavar="RAMP"
    )
    t_max: str = _rare_opt_knob("0.98", "Largest time, likewise.", metavar="RAMP")
    shared_time: bool = _rare_opt_knob(
        True, "One time for all views of an asset; priors that see views together need it."
    )
    sparsity: str = _rare_opt_knob(
        "0", "Weight of the mean opacity along rays: a number or a ramp.", metavar="RAMP"
    )
    opacity: str = _rare_opt_knob(
        "0", "Weight of the entropy of the opacity: a number or a ramp.", metavar="RAMP"
    )
    tick: int = _rare_opt_knob(20, "Steps between two lines of stats.jsonl.", low=1)
    checkpoint_ticks: int = _rare_opt_knob(3, "Lines between two states to go on from.", low=1)

    def __post_init__(self) -> None:
        check_knobs(self)
        for name in ("t_min", "t_max", "sparsity", "opacity"):
            try:
                ramp_of(getattr(self, name))
            except ValueError as error:
                raise ValueError(f"--set {name}: {error}") from None
        for step in (0, self.steps - 1):
            self.window.at(step)

    @property
    def window(self) -> TimeWindow:
        return TimeWindow(low=ramp_of(self.t_min), high=ramp_of(self.t_max))


@dataclass(frozen=True, kw_only=True)
class SceneConfig(Knobs):
    """What is made, and who has a say in it."""

    prior: str = _assets_knob(
        "bundled",
        "Diffusion model of pictures: the bundled problem's, in closed form or as a U-Net that learned it, "
        "the heads of people's, a Stable Diffusion folder, or an MVDream file.",
        metavar="bundled|bundled-unet|heads|DIR|FILE",
    )
    reward: str | None = _assets_knob(
        None,
        "What prefers: one-face, mode-distance, symmetry or mean-pixel with the bundled prior; a file of "
        "ImageReward, Reward3D or HPSv2, or a CLIP folder.",
        metavar="NAME|FILE",
        shown="none",
    )
    judge: str | None = _assets_knob(
        None,
        "Ranks pairs in the reward's place, for dreamdpo and psd: questions, with the bundled prior.",
        metavar="NAME",
        shown="none",
    )
    geometry_reward: str = _assets_knob(
        "none",
        "A reward on the shape itself, beside the method: sigma is the bundled reward of densities, "
        "solid closes leaks; with the bundled prior also one-nose and floaters, in closed form.",
        metavar="none|NAME|FILE",
    )
    assets: int = _assets_knob(1, "Assets of each prompt, of different seeds.", low=1)
    views: int = knob(4, "Views of each asset in a step.", REAL, low=1, rare=True)
    resolution: int = knob(
        64, "Rendered pixels per edge; the prior sees them enlarged to its own size.", REAL, low=8, rare=True
    )
    planes: int = knob(64, "Texels per edge of an asset's planes.", REAL, low=4, rare=True)
    amp: str = knob(
        "auto",
        "Half precision for the prior's network alone; auto: on a GPU.",
        REAL,
        choices=("auto", "off", "half"),
        rare=True,
    )


@dataclass(frozen=True, kw_only=True)
class DistillSettings:
    """Everything that decides a run."""

    prompts: tuple[str, ...]
    arms: tuple[str, ...]  # names of `Arm`s; one: no comparison
    scene: SceneConfig = field(default_factory=SceneConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    # settings of methods that flags have changed, by name
    guidance: Mapping[str, Any] = field(default_factory=dict)
    preset: str | None = None  # of a method, below `guidance`
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.prompts or len(set(self.prompts)) != len(self.prompts):
            raise ValueError(
                f"--prompt: expected different prompts, at least one, got {list(self.prompts)[:3]}. For more"
                " use --assets."
            )
        if not self.arms or len(set(self.arms)) != len(self.arms):
            raise ValueError(
                f"--compare: expected different arms, at least one, got {','.join(self.arms)}. Leave one out."
            )
        for name in self.arms:
            Arm.parse(name)

    def pairs(self) -> list[tuple[str, int]]:
        """(prompt, seed) of every asset: all prompts with the first seed, with the second, ..."""
        return [(prompt, seed) for seed in range(self.scene.assets) for prompt in self.prompts]

    def batches(self) -> list[list[tuple[str, int]]]:
        pairs = self.pairs()
        return [pairs[i : i + self.loop.batch] for i in range(0, len(pairs), self.loop.batch)]

    def to_dict(self) -> dict:
        return {**asdict(self), "prompts": list(self.prompts), "arms": list(self.arms)}

    @classmethod
    def of(cls, record: Mapping) -> "DistillSettings":
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
