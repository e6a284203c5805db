"""Settings of GAN training, a dataclass for each part, and the networks' arguments that follow from them.

A setting is a `knob`: flag, range, help and default in one place. Presets, which fill them, stand in
eg3d_rlhf/modes/gan.py.
"""

import dataclasses
import functools
import math
import operator
import types
import typing
from collections.abc import Collection, Mapping
from typing import TypeVar

# titles under which --help lists flags
RUN = "Run"
DATA = "Data"
NET = "Networks"
GAN = "GAN losses and schedule"
OPT = "Optimisation"
NOISE_MODES = ("const", "random", "none")  # of the synthesis network
REG_TYPES = ("l1", "monotonic-detach", "monotonic-fixed")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Knob:
    """What the command line needs to know of a settings field; see `knob`."""

    help: str
    group: str  # under which title --help lists it
    metavar: str | None = None  # unit
    choices: tuple[str, ...] | None = None
    low: float | None = None  # least value
    high: float | None = None  # largest value
    above: float | None = None  # the value must be larger
    below: float | None = None  # the value must be smaller
    name: str | None = None  # of the flag, where it is not the field's
    flags: tuple[str, ...] = ()  # further spellings; the first one is --<name with dashes>
    shown: str | None = None  # what None stands for; --help shows it where the value is None
    flag: bool = True  # False: recorded with the others, and decided by presets or a mode's common flags
    control: bool = True  # whether the run with lambda_r = 0, the control of another, has the same value
    rare: bool = False  # no flag of its own: --set NAME=VALUE, or a file of --settings


def knob(default: object, help: str, group: str, **more) -> typing.Any:
    """A dataclass field that is also a flag: of the field's name, with its help text, range and default.

    Args: more: see `Knob`. `eg3d_rlhf.core.cli.options_of` makes the flags, `check_knobs` applies ranges and
        choices.

    >>> gamma: float = knob(1.0, "R1 weight.", "GAN losses", low=0)
    """
    return dataclasses.field(default=default, metadata={"knob": Knob(help=help, group=group, **more)})


_gan_knob = functools.partial(knob, group=GAN)


def knobs_of(kind: type) -> list[tuple[dataclasses.Field, type, Knob]]:
    """The knobs of a settings dataclass, those of nested ones in their places: (field, type without None,
    knob).
    """
    knobs = []
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        if isinstance(hint, types.UnionType):
            hint = next(option for option in typing.get_args(hint) if option is not types.NoneType)
        if dataclasses.is_dataclass(hint):
            knobs += knobs_of(typing.cast(type, hint))
        elif "knob" in field.metadata:
            knobs.append((field, hint, field.metadata["knob"]))
    return knobs


def values_of(settings: object) -> dict[str, typing.Any]:
    """Every knob of a settings object by name, those of nested ones among them: JSON."""
    values: dict[str, typing.Any] = {}
    for field in dataclasses.fields(settings):  # type: ignore[arg-type]
        value = getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            values |= values_of(value)
        elif "knob" in field.metadata:
            values[field.name] = value
    return values


def built(kind: type, values: Mapping) -> typing.Any:
    """Settings from values by name; what is missing has its default, what is no setting is left out. Nested
    ones take theirs.
    """
    return kind(**_given(kind, values))


def _given(kind: typing.Any, values: Mapping) -> dict[str, typing.Any]:
    given: dict[str, typing.Any] = {}
    for field in dataclasses.fields(kind):
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if dataclasses.is_dataclass(default) and not isinstance(values.get(field.name), type(default)):
            changed = dataclasses.replace(default, **_given(default, values))  # type: ignore[type-var]
            given[field.name] = changed
        elif field.name in values:
            given[field.name] = values[field.name]
    return given


def check_choice(who: str, value: str, known: Collection[str]) -> None:
    """Raise ValueError, naming `who`, for a value that is not known."""
    if value not in known:
        raise ValueError(f"{who}: expected one of {', '.join(known)}, got {value!r}. Choose one of them.")


def check_knobs(settings: typing.Any) -> None:
    """Apply the ranges and choices of a settings object's own knobs; for its __post_init__.

    Raises: ValueError naming the field.
    """
    for field in dataclasses.fields(settings):
        k = field.metadata.get("knob")
        value = getattr(settings, field.name)
        if k is None or value is None:
            continue
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{field.name}: expected a finite number, got {value}. Set it.")
        if k.choices is not None:
            flag = f"--set {field.name}" if k.rare else "--" + (k.name or field.name).replace("_", "-")
            check_choice(flag, value, k.choices)
        limits = (
            (k.low, ">=", operator.ge),
            (k.high, "<=", operator.le),
            (k.above, ">", operator.gt),
            (k.below, "<", operator.lt),
        )
        for limit, sign, holds in limits:
            if limit is not None and not holds(value, limit):
                raise ValueError(f"{field.name} must be {sign} {limit:g}, got {value}")


class Knobs:
    """A settings dataclass that has nothing to check but its knobs."""

    def __post_init__(self):
        check_knobs(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """The training loop, whatever it trains."""

    kimg: float = knob(
        25000.0, "Length of the training, in thousands of images.", OPT, metavar="KIMG", above=0
    )
    batch: int = knob(4, "Images per iteration.", OPT, low=1, shown="required")
    batch_gpu: int | None = knob(None, "Images per forward pass.", OPT, low=1, shown="batch", control=False)
    tick: float = knob(4.0, "Status interval.", OPT, metavar="KIMG", above=0, control=False)
    snap: int = knob(50, "Snapshot interval; 0: at the end only.", OPT, metavar="TICKS", low=0, control=False)
    checkpoint_ticks: int = knob(
        1, "Resumable state interval.", OPT, metavar="TICKS", low=1, rare=True, control=False
    )
    seed: int = knob(0, "Random seed.", RUN, low=0, flag=False)

    def __post_init__(self):
        check_knobs(self)
        if self.batch_gpu is not None and self.batch % self.batch_gpu:
            raise ValueError(
                f"--batch-gpu: expected a divisor of --batch={self.batch}, got {self.batch_gpu}. Choose one"
                " that divides it."
            )

    def tag(self, cur_nimg: int) -> str:
        """What tells a run's snapshots apart in their names: thousands of images, as EG3D has it, and the
        images themselves where several snapshots fall into one thousand.
        """
        close = 0 < self.tick * self.snap < 1
        return f"{cur_nimg // 1000:06d}" + (f"-{cur_nimg % 1000:03d}" if close else "")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GanConfig(Knobs):
    """The GAN game: losses, what fades with the images seen, optimisers, moving average, augmentation."""

    gamma: float = _gan_knob(10.0, "R1 weight.", low=0, shown="required")
    aug: str = _gan_knob("noaug", "Augmentation of D's inputs.", choices=("noaug", "ada", "fixed"))
    p: float = _gan_knob(0.2, "Probability for --aug=fixed.", low=0, high=1)
    target: float = _gan_knob(0.6, "Target of sign(D(real)) for --aug=ada.", low=0, high=1)
    style_mixing_prob: float = _gan_knob(0.0, "Probability of style mixing.", low=0, high=1)
    gen_pose_cond: bool = _gan_knob(True, "Condition G on the camera.")
    gpc_reg_prob: float = _gan_knob(0.5, "Probability of swapping the conditioning camera.", low=0, high=1)
    gpc_reg_fade_kimg: float = _gan_knob(
        1000.0, "Length of the fade of --gpc-reg-prob from 1, in thousands of images.", metavar="KIMG", low=0
    )
    blur_fade_kimg: float = _gan_knob(
        200.0, "Length of the fade of the blur of D's inputs, in thousands of images.", metavar="KIMG", low=0
    )
    nrr_initial: int = _gan_knob(
        64, "Rendered resolution.", metavar="PIXELS", low=4, flags=("--neural-rendering-resolution-initial",)
    )
    nrr_final: int | None = _gan_knob(
        None,
        "Rendered resolution after the fade.",
        metavar="PIXELS",
        low=4,
        flags=("--neural-rendering-resolution-final",),
    )
    nrr_fade_kimg: float = _gan_knob(
        1000.0,
        "Length of the resolution fade, in thousands of images.",
        metavar="KIMG",
        low=0,
        flags=("--neural-rendering-resolution-fade-kimg",),
    )
    density_reg: float = _gan_knob(0.25, "Density regularisation weight; 0: off.", low=0)
    density_reg_every: int = _gan_knob(4, "Interval of the density regulariser.", metavar="ITERATIONS", low=1)
    density_reg_p_dist: float = _gan_knob(
        0.004, "Perturbation of the density regulariser, world units.", low=0
    )
    reg_type: str = _gan_knob("l1", "Type of the density regulariser.", choices=REG_TYPES)
    glr: float = knob(0.0025, "G learning rate.", OPT, above=0)
    dlr: float = knob(0.002, "D learning rate.", OPT, above=0)
    ema_kimg: float = knob(
        10.0, "Half-life of G_ema.", OPT, metavar="KIMG", low=0, shown="batch * 10 / 32", rare=True
    )
    amp: str = knob(
        "off",
        "bf16: main phases in bfloat16 (autocast); weights, losses, R1, density and rendering stay in"
        " float32.",
        OPT,
        choices=("off", "bf16"),
    )
    ema_rampup: float | None = 0.05  # limit the half-life to this share of the images seen; None = no ramp
    ada_kimg: float = 500.0  # images over which augmentation may grow by 1
    ada_interval: int = 4  # iterations between its steps
    d_reg_interval: int = 16  # iterations between R1
    blur_init_sigma: float = 10.0  # pixels
    dual_discrimination: bool = True
    filter_mode: str = "antialiased"
    grid: tuple[int, int] = (8, 4)  # columns and rows of image snapshots


@dataclasses.dataclass(frozen=True, kw_only=True)
class NetworkConfig(Knobs):
    """Which networks: a preset's, or those of a file."""

    cfg: str = knob("heads64", "Preset.", NET, choices=("ffhq", "afhq", "shapenet", "heads64"))
    init: str = knob("scratch", "Initial networks.", NET, metavar="bundled|scratch|FILE|RUN", control=False)
    start: str = knob("G", "With --init: weights that G starts from.", NET, choices=("G", "G_ema"), rare=True)
    cbase: int = knob(32768, "Channel multiplier.", NET, low=1)
    cmax: int = knob(512, "Largest number of feature maps.", NET, low=1)
    map_depth: int = knob(2, "Layers of G's mapping network.", NET, low=1)
    mbstd_group: int | None = knob(4, "Minibatch-std group size.", NET, low=1)
    freezed: int = knob(0, "Freeze the first layers of D.", NET, metavar="LAYERS", low=0)
    plane_layout: str = knob("eg3d", "Third plane.", NET, choices=("eg3d", "fixed"), rare=True)
    sr_module: str | None = knob(
        None, "Super-resolution module.", NET, metavar="CLASS", shown="by resolution"
    )
    sr_noise_mode: str = knob("none", "Noise in super-resolution.", NET, choices=("random", "none"))
    sr_num_fp16_res: int = knob(4, "Half precision in super-resolution (CUDA).", NET, low=0)
    g_num_fp16_res: int = knob(0, "Half-precision resolutions of the backbone (CUDA).", NET, low=0)
    d_num_fp16_res: int = knob(4, "Half-precision resolutions of D (CUDA).", NET, low=0)
    c_scale: float = knob(1.0, "Scale of the conditioning label.", NET)
    disc_c_noise: float = knob(0.0, "Label noise for D, in label standard deviations.", NET, low=0)
    decoder_lr_mul: float = knob(1.0, "Learning-rate multiplier of the decoder.", NET, above=0)


_RENDERING = {
    "disparity_space_sampling": False,
    "clamp_mode": "softplus",
    "c_scale": 1.0,
    "superresolution_noise_mode": "none",
    "decoder_lr_mul": 1.0,
    "sr_antialias": True,
}
_FACES = {
    "depth_resolution": 48,
    "depth_resolution_importance": 48,
    "ray_start": 2.25,
    "ray_end": 3.3,
    "box_warp": 1,
    "avg_camera_radius": 2.7,
    "avg_camera_pivot": [0, 0, 0.2],
}
_SHAPENET = {
    "depth_resolution": 64,
    "depth_resolution_importance": 64,
    "ray_start": 0.1,
    "ray_end": 2.6,
    "box_warp": 1.6,
    "white_back": True,
    "avg_camera_radius": 1.7,
    "avg_camera_pivot": [0, 0, 0],
}
_HEADS = {  # every ray covers the cube and nothing else: outside, a tri-plane decoder reads zeros
    "depth_resolution": 20,
    "depth_resolution_importance": 20,
    "importance_stratified": True,
    "ray_start": "auto",
    "ray_end": "auto",
    "box_warp": 1,
    "white_back": True,
    "avg_camera_radius": 2.7,
    "avg_camera_pivot": [0, 0, 0],
}
FAMILIES = {
    "ffhq": _FACES,
    "afhq": {**_FACES, "avg_camera_pivot": [0, 0, -0.06]},
    "shapenet": _SHAPENET,
    "heads64": _HEADS,
}
SR_BY_RESOLUTION = {
    512: "SuperresolutionHybrid8XDC",
    256: "SuperresolutionHybrid4X",
    128: "SuperresolutionHybrid2X",
}


def networks_for(net: NetworkConfig, resolution: int, gan: GanConfig) -> tuple[dict, dict]:
    """Constructor arguments of fresh G and D for images of `resolution` pixels.

    Raises: ValueError where no super-resolution module fits.
    """
    small = net.cfg == "heads64"
    rendering = {
        **_RENDERING,
        **FAMILIES[net.cfg],
        "image_resolution": resolution,
        "c_gen_conditioning_zero": not gan.gen_pose_cond,
        "gpc_reg_prob": gan.gpc_reg_prob if gan.gen_pose_cond else None,
        "density_reg": gan.density_reg,
        "density_reg_p_dist": gan.density_reg_p_dist,
        "reg_type": gan.reg_type,
        "c_scale": net.c_scale,
        "superresolution_noise_mode": net.sr_noise_mode,
        "decoder_lr_mul": net.decoder_lr_mul,
    }
    sr_module = net.sr_module or ("NoSuperresolution" if small else SR_BY_RESOLUTION.get(resolution))
    if sr_module is None:
        known = f"{', '.join(str(r) for r in SR_BY_RESOLUTION)} pixels for --cfg={net.cfg}"
        raise ValueError(
            f"--data: expected images of {known}, got {resolution}. Resize them or name --sr-module."
        )
    rendering["superresolution_module"] = (
        f"training.superresolution.{sr_module.removeprefix('training.superresolution.')}"
    )
    dim = 128 if small else 512
    channels = {"channel_base": net.cbase, "channel_max": net.cmax}
    sr = {"input_resolution": resolution // 2, "block_channels": [32, 16]} if small else dict(channels)
    G: dict[str, typing.Any] = {
        "z_dim": 64 if small else 512,
        "c_dim": 25,
        "w_dim": dim,
        "img_resolution": resolution,
        "img_channels": 3,
        "mapping_kwargs": {"num_layers": net.map_depth},
        "rendering_kwargs": rendering,
        "conv_clamp": None,
        "num_fp16_res": net.g_num_fp16_res,
        "sr_num_fp16_res": net.sr_num_fp16_res,
        "fused_modconv_default": "inference_only",
        "plane_layout": net.plane_layout,
        "sr_kwargs": {**sr, "fused_modconv_default": "inference_only"},
        **channels,
    }
    if small:
        G.update(plane_resolution=64, plane_channels=16, decoder_hidden_dim=32, use_noise=False)
        G["mapping_kwargs"]["lr_multiplier"] = 1.0  # latents name heads: the mapping has to learn it
        if sr_module == "NoSuperresolution":
            G["decoder_features"] = 3
    # a short run leaves no time for a camera embedding that learns at a hundredth of the rate: D would not
    # see poses, G stay flat
    D = {
        "c_dim": 25,
        "img_resolution": resolution,
        "img_channels": 3,
        "block_kwargs": {"freeze_layers": net.freezed},
        "mapping_kwargs": {"num_layers": 2, "lr_multiplier": 1.0} if small else {},
        "epilogue_kwargs": {"mbstd_group_size": net.mbstd_group},
        "disc_c_noise": net.disc_c_noise,
        "num_fp16_res": net.d_num_fp16_res,
        "conv_clamp": 256,
        **channels,
    }
    return G, D


Settings = TypeVar("Settings")


def from_dict(kind: type[Settings], values: Mapping, who: str = "") -> Settings:
    """A dataclass from what `dataclasses.asdict` made of it, after a journey through JSON.

    Raises: ValueError naming a field that is unknown or of the wrong sort.
    """
    who = who or kind.__name__
    hints = typing.get_type_hints(kind)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise ValueError(
            f"{who}: expected settings of this version, got unknown ones: {', '.join(unknown)}. Start a new"
            " run."
        )
    made = dict(values)
    for name, value in values.items():
        for option in (hints[name], *typing.get_args(hints[name])) if value is not None else ():
            if isinstance(option, type) and dataclasses.is_dataclass(option):
                if not isinstance(value, Mapping):
                    raise ValueError(
                        f"{who}.{name}: expected settings by name, got {value!r}. Start a new run."
                    )
                made[name] = from_dict(typing.cast(type, option), value, f"{who}.{name}")
            elif typing.get_origin(option) is tuple:
                made[name] = tuple(value)
    return kind(**made)
