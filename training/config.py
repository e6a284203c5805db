"""Settings of GAN training: a dataclass for each part, and the networks' arguments that follow from them.

A setting is defined by `knob`, which holds its flag, range, help text and default in one place. Presets,
which give values to the settings, are in eg3d_rlhf/modes/gan.py.
"""

import dataclasses
import functools
import math
import operator
import types
import typing
from collections.abc import Collection, Mapping
from typing import TypeVar

# Titles under which --help lists flags.
RUN = "Run"
DATA = "Data"
NET = "Networks"
GAN = "GAN losses and schedule"
OPT = "Optimisation"
NOISE_MODES = ("const", "random", "none")  # of the synthesis network
REG_TYPES = ("l1", "monotonic-detach", "monotonic-fixed")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Knob:
    """Description of a settings field for the command line; see `knob`."""

    help: str
    group: str  # title under which --help lists the flag
    metavar: str | None = None  # unit
    choices: tuple[str, ...] | None = None  # allowed values
    low: float | None = None  # smallest allowed value
    high: float | None = None  # largest allowed value
    above: float | None = None  # the value must be larger than this
    below: float | None = None  # the value must be smaller than this
    name: str | None = None  # name of the flag, if it differs from the field's
    flags: tuple[str, ...] = ()  # further spellings; the first one is always --<name with dashes>
    shown: str | None = None  # text that --help shows as the default where the value is None
    flag: bool = True  # False: stored with the others, but set by presets or a mode's common flags
    control: bool = True  # True: a run and its control, a run with lambda_r = 0, must have the same value
    rare: bool = False  # True: no flag of its own; set by --set NAME=VALUE, or in a file of --settings


def knob(default: object, help: str, group: str, **more) -> typing.Any:
    """Return a dataclass field that is also a flag with the field's name.

    Args:
        default: value of the field if it is not given.
        help: help text.
        group: title under which --help lists the flag.
        more: further fields of `Knob`.

    `eg3d_rlhf.core.cli.options_of` makes the flags; `check_knobs` applies ranges and choices.

    >>> gamma: float = knob(1.0, "R1 weight.", "GAN losses", low=0)
    """
    return dataclasses.field(default=default, metadata={"knob": Knob(help=help, group=group, **more)})


_gan_knob = functools.partial(knob, group=GAN)


def knobs_of(kind: type) -> list[tuple[dataclasses.Field, type, Knob]]:
    """Return the knobs of a settings dataclass, in order, with those of nested dataclasses in their places.

    Returns: list of (field, type without None, knob).
    """
    knobs = []
    hints = typing.get_type_hints(kind)
    # Types are read through get_type_hints, since fields hold them as text under postponed annotations.
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        if isinstance(hint, types.UnionType):
            # `int | None` -> int: click needs the type of a value that is given.
            hint = next(option for option in typing.get_args(hint) if option is not types.NoneType)
        if dataclasses.is_dataclass(hint):
            knobs += knobs_of(typing.cast(type, hint))
        elif "knob" in field.metadata:
            knobs.append((field, hint, field.metadata["knob"]))
    return knobs


def values_of(settings: object) -> dict[str, typing.Any]:
    """Return the value of every knob of a settings object by name, with those of nested objects, as JSON."""
    values: dict[str, typing.Any] = {}
    for field in dataclasses.fields(settings):  # type: ignore[arg-type]
        value = getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            # Flat: names of knobs are unique over nested dataclasses, as flags are.
            values |= values_of(value)
        elif "knob" in field.metadata:
            values[field.name] = value
    return values


def built(kind: type, values: Mapping) -> typing.Any:
    """Return settings from values by name.

    A field that is not in `values` has its default. Names that are no field are ignored. Nested settings take
    their values from the same mapping.
    """
    return kind(**_given(kind, values))


def _given(kind: typing.Any, values: Mapping) -> dict[str, typing.Any]:
    """Return the constructor arguments of `kind` from flat values."""
    given: dict[str, typing.Any] = {}
    for field in dataclasses.fields(kind):
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        # A nested dataclass is filled from the flat values, unless `values` holds it as an object already.
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
    """Check the ranges and choices of a settings object's knobs. Called by its __post_init__.

    Raises: ValueError naming the field.
    """
    for field in dataclasses.fields(settings):
        k = field.metadata.get("knob")
        value = getattr(settings, field.name)
        if k is None or value is None:
            continue
        if isinstance(value, float) and not math.isfinite(value):
            # Infinity would pass some of the limits below, and NaN would pass where there are none.
            raise ValueError(f"{field.name}: expected a finite number, got {value}. Give one.")
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
    """Base class of settings that need no check besides those of their knobs."""

    def __post_init__(self):
        check_knobs(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """Settings of the training loop, the same for everything that it trains."""

    kimg: float = knob(
        25000.0, "Length of the training, in thousands of images.", OPT, metavar="KIMG", above=0
    )
    batch: int = knob(4, "Images per iteration.", OPT, low=1, shown="required")
    # `control=False`: these may differ between a run and its control, since they do not change the result.
    batch_gpu: int | None = knob(
        None, "Images per forward pass, on each process.", OPT, low=1, shown="batch", control=False
    )
    tick: float = knob(
        4.0,
        "Interval between status lines, in thousands of images.",
        OPT,
        metavar="KIMG",
        above=0,
        control=False,
    )
    snap: int = knob(
        50,
        "Interval between snapshots, in ticks (see --tick). 0: one snapshot, at the end.",
        OPT,
        metavar="TICKS",
        low=0,
        control=False,
    )
    checkpoint_ticks: int = knob(
        1,
        "Interval between checkpoints, from which --resume continues, in ticks (see --tick).",
        OPT,
        metavar="TICKS",
        low=1,
        rare=True,
        control=False,
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
        """Return the part of a snapshot's file name that states the number of images.

        It is the number of thousands of images, as in EG3D. Where several snapshots fall into one thousand,
        the remaining images are appended.
        """
        close = 0 < self.tick * self.snap < 1
        return f"{cur_nimg // 1000:06d}" + (f"-{cur_nimg % 1000:03d}" if close else "")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GanConfig(Knobs):
    """Settings of the adversarial training: losses, schedules, optimisers, G_ema, augmentation."""

    gamma: float = _gan_knob(10.0, "Weight of the R1 penalty.", low=0, shown="required")
    aug: str = _gan_knob(
        "noaug",
        "Augmentation of D's inputs: none, adaptive (ADA), or with a fixed probability.",
        choices=("noaug", "ada", "fixed"),
    )
    p: float = _gan_knob(0.2, "Augmentation probability, with --aug=fixed.", low=0, high=1)
    target: float = _gan_knob(0.6, "Mean of sign(D(real)) that ADA aims at, with --aug=ada.", low=0, high=1)
    style_mixing_prob: float = _gan_knob(0.0, "Probability of style mixing.", low=0, high=1)
    gen_pose_cond: bool = _gan_knob(True, "Condition G on the camera.")
    gpc_reg_prob: float = _gan_knob(
        0.5, "Probability of swapping the camera that G is conditioned on, after its fade.", low=0, high=1
    )
    gpc_reg_fade_kimg: float = _gan_knob(
        1000.0,
        "Images, in thousands, over which the camera swapping probability falls from 1 to --gpc-reg-prob.",
        metavar="KIMG",
        low=0,
    )
    blur_fade_kimg: float = _gan_knob(
        200.0,
        "Images, in thousands, over which the blur of D's inputs fades out. 0: no blur.",
        metavar="KIMG",
        low=0,
    )
    nrr_initial: int = _gan_knob(
        64,
        "Resolution of volume rendering at the start.",
        metavar="PIXELS",
        low=4,
        flags=("--neural-rendering-resolution-initial",),
    )
    nrr_final: int | None = _gan_knob(
        None,
        "Resolution of volume rendering after its fade.",
        metavar="PIXELS",
        low=4,
        flags=("--neural-rendering-resolution-final",),
    )
    nrr_fade_kimg: float = _gan_knob(
        1000.0,
        "Images, in thousands, over which the resolution of volume rendering changes.",
        metavar="KIMG",
        low=0,
        flags=("--neural-rendering-resolution-fade-kimg",),
    )
    density_reg: float = _gan_knob(0.25, "Weight of the density regularisation. 0: none.", low=0)
    density_reg_every: int = _gan_knob(
        4, "Iterations between two steps of the density regularisation.", metavar="ITERATIONS", low=1
    )
    density_reg_p_dist: float = _gan_knob(
        0.004, "Distance by which the density regularisation perturbs points, in world units.", low=0
    )
    reg_type: str = _gan_knob("l1", "Type of the density regulariser.", choices=REG_TYPES)
    glr: float = knob(0.0025, "Learning rate of G.", OPT, above=0)
    dlr: float = knob(0.002, "Learning rate of D.", OPT, above=0)
    ema_kimg: float = knob(
        10.0,
        "Half-life of the moving average G_ema, in thousands of images.",
        OPT,
        metavar="KIMG",
        low=0,
        shown="batch * 10 / 32",
        rare=True,
    )
    amp: str = knob(
        "off",
        "bf16: run the main phases in bfloat16 (autocast). Weights, losses, R1, density and rendering stay in"
        " float32.",
        OPT,
        choices=("off", "bf16"),
    )
    ema_rampup: float | None = 0.05  # the half-life is at most this share of the images seen; None: no limit
    ada_kimg: float = 500.0  # thousands of images over which the augmentation probability can grow by 1
    ada_interval: int = 4  # iterations between two changes of the augmentation probability
    d_reg_interval: int = 16  # iterations between two R1 steps
    blur_init_sigma: float = 10.0  # pixels, before the fade
    dual_discrimination: bool = True  # D receives the raw image as well, and R1 covers it
    filter_mode: str = "antialiased"  # resizing of the real raw image; or "none"
    grid: tuple[int, int] = (8, 4)  # columns and rows of image snapshots


@dataclasses.dataclass(frozen=True, kw_only=True)
class NetworkConfig(Knobs):
    """Settings of the networks: those of a preset, or those of a file."""

    cfg: str = knob(
        "heads64",
        "Preset of the networks and the renderer.",
        NET,
        choices=("ffhq", "afhq", "shapenet", "heads64"),
    )
    init: str = knob(
        "scratch",
        "Initial networks: the bundled ones, random ones, a network file, or a run folder.",
        NET,
        metavar="bundled|scratch|FILE|RUN",
        control=False,
    )
    start: str = knob("G", "Weights that G starts from, with --init.", NET, choices=("G", "G_ema"), rare=True)
    cbase: int = knob(
        32768,
        "Channel multiplier: a layer at R pixels has CBASE / R feature maps, at most --cmax.",
        NET,
        low=1,
    )
    cmax: int = knob(512, "Largest number of feature maps of a layer.", NET, low=1)
    map_depth: int = knob(2, "Number of layers of G's mapping network.", NET, low=1)
    mbstd_group: int | None = knob(
        4, "Group size of the minibatch standard deviation layer of D.", NET, low=1
    )
    freezed: int = knob(0, "Number of first layers of D that stay frozen.", NET, metavar="LAYERS", low=0)
    plane_layout: str = knob(
        "eg3d",
        "Axes of the third plane: as in EG3D's code, or corrected.",
        NET,
        choices=("eg3d", "fixed"),
        rare=True,
    )
    sr_module: str | None = knob(
        None,
        "Class of the super-resolution module.",
        NET,
        metavar="CLASS",
        shown="chosen by the images' resolution",
    )
    sr_noise_mode: str = knob(
        "none", "Noise inputs of the super-resolution module.", NET, choices=("random", "none")
    )
    sr_num_fp16_res: int = knob(
        4, "Above 0: run the super-resolution module in half precision (CUDA only).", NET, low=0
    )
    g_num_fp16_res: int = knob(
        0, "Number of highest resolutions of G's backbone in half precision (CUDA only).", NET, low=0
    )
    d_num_fp16_res: int = knob(
        4, "Number of highest resolutions of D in half precision (CUDA only).", NET, low=0
    )
    c_scale: float = knob(1.0, "Scale of the camera label that G is conditioned on.", NET)
    disc_c_noise: float = knob(
        0.0, "Noise on D's camera labels, in standard deviations of the labels.", NET, low=0
    )
    decoder_lr_mul: float = knob(1.0, "Learning rate multiplier of the tri-plane decoder.", NET, above=0)


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
# "auto" lets every ray cover the cube and nothing else. Outside the cube a tri-plane decoder reads zeros.
_HEADS = {
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
    """Return the constructor arguments of new networks G and D.

    Args:
        net: settings of the networks.
        resolution: pixels of the training images.
        gan: settings of the adversarial training, on which the renderer depends.
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
            f"--data: expected images of {known}, got {resolution}. Resize the images, or choose a"
            " module with --sr-module."
        )
    rendering["superresolution_module"] = (
        f"training.superresolution.{sr_module.removeprefix('training.superresolution.')}"
    )
    dim = 128 if small else 512
    channels = {"channel_base": net.cbase, "channel_max": net.cmax}
    # The small preset renders at the final resolution or at
    # half of it, and needs few feature maps to enlarge that.
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
        # Training then runs ordinary convolutions instead of grouped ones, which is faster, as in EG3D.
        "fused_modconv_default": "inference_only",
        "plane_layout": net.plane_layout,
        "sr_kwargs": {**sr, "fused_modconv_default": "inference_only"},
        **channels,
    }
    if small:
        G.update(plane_resolution=64, plane_channels=16, decoder_hidden_dim=32, use_noise=False)
        # Each latent defines one ground-truth head. StyleGAN's factor of 0.01 on the mapping network's
        # learning rate would be too slow to learn that correspondence.
        G["mapping_kwargs"]["lr_multiplier"] = 1.0
        if sr_module == "NoSuperresolution":
            # Without super-resolution the rendered features are the image itself: RGB.
            G["decoder_features"] = 3
    # A short run leaves no time for a camera embedding that learns at a hundredth of the rate. D would not
    # use the camera, and G would stay flat.
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
    """Return a dataclass from what `dataclasses.asdict` made of one, after it was stored as JSON.

    Args:
        kind: class of the settings.
        values: fields by name.
        who: name of the settings in messages.
    Raises: ValueError naming a field that is unknown or of the wrong type.
    """
    who = who or kind.__name__
    hints = typing.get_type_hints(kind)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise ValueError(
            f"{who}: this version does not have the settings {', '.join(unknown)}. Start a new run."
        )
    made = dict(values)
    # JSON has neither dataclasses nor tuples: they come back as mappings and lists.
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
