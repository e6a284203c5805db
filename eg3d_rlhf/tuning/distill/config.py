"""Defines the settings of `train.py --mode=distill`, text to 3D by score distillation.

`DistillSettings` contains all of them. The same values are read from flags and written to JSON.
"""

import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from eg3d_rlhf.core.registry import Registry
from eg3d_rlhf.tuning.distill.schedules_by_step import Ramp, TimeWindow
from training.config import Knobs, check_knobs, knob, settings_from_values

if TYPE_CHECKING:
    from eg3d_rlhf.core.interfaces import Guidance

# Titles of groups of flags in the help.
ASSETS = "Assets"
REAL = "With a prior from files"
METHOD = "Method"
OPT = "Optimisation"
# Controls of a comparison, which change the reward of an arm. "inverted" inverts the sign of a reward.
# "random" replaces a reward of images by random numbers, and shuffles the weights of a geometry reward.
TWISTS = ("inverted", "random")
_TWIST = rf"(?:-({'|'.join(TWISTS)}))?"  # optional suffix of an arm's name; its group is the control


@dataclass(frozen=True, kw_only=True)
class Method:
    """Registered distillation method: its settings, its guidance, and the models that it accepts.

    methods.py adds each method to METHODS, and its presets to PRESETS.
    """

    settings: type  # dataclass of the method's settings
    # Function that makes the guidance, with the arguments (prior, settings, views=, streams=). It also has
    # the argument reward= if `accepts_reward` is True, and judge= if `accepts_judge` is True.
    guidance: "Callable[..., Guidance]"
    # Function from the method's settings to the number of noises of an image in a step.
    noises: Callable[[Any], int]
    accepts_reward: bool = True  # True: the method uses a reward of images
    accepts_judge: bool = False  # True: a judge can rank pairs of images in place of the reward


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
    """Arm of a comparison: a distillation method, with rewards that may be changed for a control."""

    method: str  # name of the method in METHODS
    twist: str | None = None  # control of the reward of images, one of TWISTS; None: the reward is unchanged
    geometry: bool = False  # True: the arm has a geometry reward in addition
    geometry_twist: str | None = None  # control of the geometry reward, one of TWISTS; None: it is unchanged

    @classmethod
    def parse(cls, arm_text: str) -> "Arm":
        """Parse the name of an arm, such as 'dreamdpo', 'dreamdpo-random' or 'sds+geometry-inverted'.

        Raises: ValueError if the text is not the name of an arm.
        """
        arm_name = arm_text.strip()
        # Groups of the pattern: 1 method, 2 control, 3 "+geometry" with its control, 4 control of the
        # geometry.
        pattern = rf"({'|'.join(METHODS)}){_TWIST}(\+geometry{_TWIST})?"
        match = re.fullmatch(pattern, arm_name)
        if match is None:
            raise ValueError(
                f"{arm_name!r} is not an arm. An arm is a method ({', '.join(METHODS)}), then"
                f" -{' or -'.join(TWISTS)} for a control with a changed reward, and at the end +geometry or"
                f" +geometry-{' or +geometry-'.join(TWISTS)} for a geometry reward. Only the method is"
                " needed."
            )
        if match[2] and not METHODS[match[1]].accepts_reward:
            raise ValueError(
                f"{arm_name!r} is not an arm, because {match[1]} has no reward to which -{match[2]} could"
                f" apply. Write {match[1]}, or use a method with a reward."
            )
        return cls(match[1], match[2], bool(match[3]), match[4])

    @property
    def name(self) -> str:
        """Name of the arm, in the form that `parse` reads."""
        arm_name = self.method
        if self.twist:
            arm_name += f"-{self.twist}"
        if self.geometry:
            arm_name += "+geometry"
        if self.geometry_twist:
            arm_name += f"-{self.geometry_twist}"
        return arm_name


def parse_ramp(ramp_text: str) -> Ramp:
    """Parse a number, '0.02', or a ramp 's0,v0,v1,s1', which is linear from v0 at step s0 to v1 at step s1.

    Raises: ValueError if the text is not a list of numbers, or not a valid ramp.
    """
    try:
        numbers = tuple(float(number_text) for number_text in ramp_text.split(","))
    except ValueError:
        raise ValueError(
            f"{ramp_text!r} is not a list of numbers. Write a number, such as 0.02, or a ramp s0,v0,v1,s1."
        ) from None
    # `Ramp` checks the length and the order of the numbers.
    return Ramp(numbers[0] if len(numbers) == 1 else numbers)


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """Settings of the optimisation loop. They are the same for all distillation methods."""

    steps: int = knob(100, "Number of optimisation steps of each asset.", OPT, low=1)
    batch: int = _rare_opt_knob(
        55,
        "Largest number of assets that are optimised together in one batch. With several processes, each"
        " takes whole batches.",
        low=1,
    )
    lr: float = _rare_opt_knob(
        0.05,
        "Learning rate of an asset's voxels, planes or latents (Adam with betas 0.9 and 0.99).",
        above=0,
    )
    lr_end: float = _rare_opt_knob(
        0.05,
        "Learning rate in the last step, as a share of the learning rate in the first step. It changes"
        " linearly in between.",
        low=0,
        high=1,
    )
    decoder_lr: float = _rare_opt_knob(
        0.001, "Learning rate of the decoder that converts an asset's planes to density and colour.", above=0
    )
    t_min: str = _rare_opt_knob(
        "0.02",
        "Smallest diffusion time t that is sampled, as a share of 1000: a number, or a ramp s0,v0,v1,s1,"
        " which is linear from v0 at step s0 to v1 at step s1.",
        metavar="RAMP",
    )
    t_max: str = _rare_opt_knob(
        "0.98",
        "Largest diffusion time t that is sampled, as a share of 1000: a number, or a ramp s0,v0,v1,s1, which"
        " is linear from v0 at step s0 to v1 at step s1.",
        metavar="RAMP",
    )
    shared_time: bool = _rare_opt_knob(
        True, "Use the same diffusion time for all views of an asset. Multi-view priors need this."
    )
    sparsity: str = _rare_opt_knob(
        "0",
        "Weight of the regulariser that reduces the mean opacity along rays: a number, or a ramp s0,v0,v1,s1"
        " over the steps.",
        metavar="RAMP",
    )
    opacity: str = _rare_opt_knob(
        "0",
        "Weight of the regulariser that makes rays either opaque or transparent, by the entropy of their"
        " opacity: a number, or a ramp s0,v0,v1,s1 over the steps.",
        metavar="RAMP",
    )
    tick: int = _rare_opt_knob(
        20, "Number of steps that one line of stats.jsonl and of the progress log summarises.", low=1
    )
    checkpoint_ticks: int = _rare_opt_knob(
        3, "Number of ticks, that is, of lines of stats.jsonl, between two checkpoints.", low=1
    )

    def __post_init__(self) -> None:
        check_knobs(self)
        # Ramps are parsed in every step. They are checked here, so that an error appears before the run
        # begins.
        for setting_name in ("t_min", "t_max", "sparsity", "opacity"):
            try:
                parse_ramp(getattr(self, setting_name))
            except ValueError as error:
                raise ValueError(f"--set {setting_name}: {error}") from None
        # `at` raises an error if t_min is above t_max, which ramps can cause at the first or at the last
        # step.
        for step in (0, self.steps - 1):
            self.window.at(step)

    @property
    def window(self) -> TimeWindow:
        """Window from which diffusion times are sampled, made from t_min and t_max."""
        return TimeWindow(low=parse_ramp(self.t_min), high=parse_ramp(self.t_max))


@dataclass(frozen=True, kw_only=True)
class SceneConfig(Knobs):
    """Settings of the assets of a run, and of the prior, the rewards and the judge that guide them."""

    prior: str = _assets_knob(
        "bundled",
        "Diffusion model of images from which assets are distilled. bundled: the bundled toy problem, in"
        " closed form; bundled-unet: a U-Net that was trained on that problem; heads: renders of synthetic"
        " heads, in closed form; or the path of a Stable Diffusion folder or of an MVDream file.",
        metavar="bundled|bundled-unet|heads|DIR|FILE",
    )
    reward: str | None = _assets_knob(
        None,
        "Reward that scores images. With the bundled prior: one-face, mode-distance or mean-pixel."
        " With a prior from files: a file of ImageReward, Reward3D or HPSv2, or a CLIP folder.",
        metavar="NAME|FILE",
        shown="none",
    )
    judge: str | None = _assets_knob(
        None,
        "Judge that ranks pairs of images in place of the reward, for the methods dreamdpo and psd."
        " questions: yes/no questions in closed form, with the bundled prior; or the address of a"
        " chat-completions server with a vision-language model, such as http://127.0.0.1:8000/v1, which"
        " is asked in both orders. Its key is read from the environment variable EG3D_RLHF_JUDGE_KEY.",
        metavar="questions|URL",
        shown="none",
    )
    judge_model: str | None = _assets_knob(
        None,
        "Name of the model of --judge=URL, as the server knows it.",
        metavar="NAME",
        shown="none; required with --judge=URL",
    )
    judge_limit: int | None = _assets_knob(
        None,
        "Greatest number of calls of --judge=URL in the whole run. Later steps use no preference.",
        metavar="CALLS",
        low=1,
        shown="none; required with --judge=URL",
    )
    questions: str | None = _assets_knob(
        None,
        "Text file with one yes/no question per line for --judge=URL, of which yes is the better answer. The"
        " asset with more answers yes wins.",
        metavar="FILE",
        shown="the bundled problem's questions; otherwise which asset is better",
    )
    geometry_reward: str = _assets_knob(
        "none",
        "Reward that scores the shape, and whose gradient is added to that of the method. sigma: the bundled"
        " reward of densities; solid: a penalty on leaks and floaters; one-nose and floaters: rewards in"
        " closed form for the bundled prior; FILE: a trained reward of densities, depth, points or meshes.",
        metavar="none|NAME|FILE",
    )
    assets: int = _assets_knob(
        1, "Number of assets that are made from each prompt, with different seeds.", low=1
    )
    views: int = knob(
        4,
        "Number of views of each asset that a step renders. More views make the gradient less noisy, and a"
        " step takes proportionally longer.",
        REAL,
        low=1,
        rare=True,
    )
    resolution: int = knob(
        64,
        "Edge of the rendered views in pixels. They are resized to the size that the prior needs. Larger"
        " views show more detail, and need more time and memory.",
        REAL,
        low=8,
        rare=True,
    )
    planes: int = knob(
        64,
        "Edge of the three feature planes of an asset, in texels. Larger planes can store more detail, and"
        " need more memory.",
        REAL,
        low=4,
        rare=True,
    )
    amp: str = knob(
        "auto",
        "Precision of the prior's network. half: float16; off: float32; auto: float16 on a GPU, float32 on a"
        " CPU.",
        REAL,
        choices=("auto", "off", "half"),
        rare=True,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.has_served_judge:
            for name in ("judge_model", "judge_limit"):
                if getattr(self, name) is None:
                    flag_name = f"--{name.replace('_', '-')}"
                    raise ValueError(
                        f"{flag_name} is missing, which --judge={self.judge} needs: every step asks about"
                        f" every asset, twice. Pass {flag_name}."
                    )
            return
        for name in JUDGE_FIELDS:
            if getattr(self, name) is not None:
                flag_name = f"--{name.replace('_', '-')}"
                raise ValueError(
                    f"{flag_name} has an effect only with --judge=URL. Pass the address of a judge, or remove"
                    f" {flag_name}."
                )

    @property
    def has_served_judge(self) -> bool:
        """Return True if --judge is the address of a server."""
        return self.judge is not None and self.judge.startswith(("http://", "https://"))


JUDGE_FIELDS = ("judge_model", "judge_limit", "questions")  # settings of --judge=URL alone


@dataclass(frozen=True, kw_only=True)
class DistillSettings:
    """All settings that determine the result of a score distillation run."""

    prompts: tuple[str, ...]  # texts from which assets are made; all are different
    arms: tuple[str, ...]  # names of the arms, see `Arm.name`; a run with one arm is not a comparison
    scene: SceneConfig = field(default_factory=SceneConfig)  # assets, prior and rewards
    loop: LoopConfig = field(default_factory=LoopConfig)  # optimisation
    # Name -> value of the settings of methods that differ from the preset or from the method's defaults.
    guidance: Mapping[str, Any] = field(default_factory=dict)
    preset: str | None = None  # name of a preset of a method; `guidance` overrides its values
    seed: int = 0  # seed of all random streams

    def __post_init__(self) -> None:
        if not self.prompts:
            raise ValueError(
                "--prompt is missing. Pass at least one prompt, such as --prompt='a bust of a man'."
            )
        # Equal prompts would give equal assets, because random streams depend on prompt and seed.
        if len(set(self.prompts)) != len(self.prompts):
            raise ValueError(
                f"--prompt: some of the {len(self.prompts)} prompts are equal ({list(self.prompts)[:3]},"
                " ...). Pass each prompt once, and use --assets for several assets of a prompt."
            )
        if not self.arms:
            raise ValueError("--compare has no arm. Name at least one, such as --compare=sds,dreamdpo.")
        if len(set(self.arms)) != len(self.arms):
            raise ValueError(
                f"--compare={','.join(self.arms)} names an arm twice. Remove one of the equal names."
            )
        # Raises ValueError for an unknown method or control.
        for arm_name in self.arms:
            Arm.parse(arm_name)

    def pairs(self) -> list[tuple[str, int]]:
        """Return the pairs (prompt, seed) of all assets: all prompts with seed 0, then with seed 1, etc."""
        return [(prompt, seed) for seed in range(self.scene.assets) for prompt in self.prompts]

    def batches(self) -> list[list[tuple[str, int]]]:
        """Split the pairs (prompt, seed) of all assets into batches of assets that are optimised together."""
        pairs = self.pairs()
        # The split depends on the settings only, because each batch has its own random streams.
        return [pairs[i : i + self.loop.batch] for i in range(0, len(pairs), self.loop.batch)]

    def to_dict(self) -> dict:
        """Return the settings as values for JSON."""
        values = asdict(self)
        # Absent as in runs of earlier versions, so that these can be resumed.
        values["scene"] = {
            name: value
            for name, value in values["scene"].items()
            if name not in JUDGE_FIELDS or value is not None
        }
        # JSON has no tuples. With lists, the values equal those that are later read from the file.
        return {**values, "prompts": list(self.prompts), "arms": list(self.arms)}

    @classmethod
    def from_dict(cls, settings_json: Mapping) -> "DistillSettings":
        """Build the settings from the result of `to_dict`. Raises: ValueError for an invalid value."""
        scene = settings_from_values(SceneConfig, settings_json["scene"])
        loop = settings_from_values(LoopConfig, settings_json["loop"])
        return cls(
            **{
                **settings_json,
                "prompts": tuple(settings_json["prompts"]),
                "arms": tuple(settings_json["arms"]),
                "scene": scene,
                "loop": loop,
            }
        )
