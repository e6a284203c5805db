"""Settings of GAN training as dataclasses, and the constructor arguments of networks that follow from them.

The function `knob` defines a setting with its flag, range, help text and default in one place. Presets, which
give values to the settings, are in eg3d_rlhf/tuning/gan/presets.py.
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
# Modes of the synthesis network's noise inputs: constant, random, or 0.
NOISE_MODES = ("const", "random", "none")
# Types of the density regulariser, see `GanPhases.g_reg`.
REG_TYPES = ("l1", "monotonic-detach", "monotonic-fixed")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Knob:
    """Description of a settings field for the command line, which `knob` stores in the field's metadata."""

    help: str  # help text
    group: str  # title under which --help lists the flag
    metavar: str | None = None  # name of the value in --help, usually its unit; None: the name of its type
    choices: tuple[str, ...] | None = None  # allowed values; None: any value of the type
    low: float | None = None  # smallest allowed value
    high: float | None = None  # largest allowed value
    above: float | None = None  # the value must be larger than this
    below: float | None = None  # the value must be smaller than this
    name: str | None = None  # name of the flag; None: the name of the field
    flags: tuple[str, ...] = ()  # further spellings of the flag, besides --<name with dashes>
    shown: str | None = None  # text that --help shows as the default if the value is None
    flag: bool = True  # False: the field has no flag here; presets or the common flags of a mode set it
    # True: a run and its control (the same run with lambda_r = 0) must have the same value.
    control: bool = True
    # True: the field has no flag, and only --help-all lists it. --set NAME=VALUE or a file of --settings
    # sets it.
    rare: bool = False


def knob(default: object, help: str, group: str, **more) -> typing.Any:
    """Return a dataclass field that is also a flag of the command line.

    The flag has the name of the field, with dashes. `eg3d_rlhf.core.cli.options_from_settings` creates the
    flags, and `check_knobs` checks ranges and choices.

    Args:
        default: default value of the field.
        help: help text of the flag.
        group: title under which --help lists the flag.
        more: values of other fields of `Knob`.

    >>> gamma: float = knob(1.0, "R1 weight.", "GAN losses", low=0)
    """
    return dataclasses.field(default=default, metadata={"knob": Knob(help=help, group=group, **more)})


_gan_knob = functools.partial(knob, group=GAN)  # `knob` for the most frequent group


def knobs_of(settings_class: type) -> list[tuple[dataclasses.Field, type, Knob]]:
    """Return all fields of a settings dataclass and its nested dataclasses that `knob` has defined.

    Returns: list of (field, type of the field without None, `Knob` of the field), in the order of the fields.
    """
    field_knobs = []
    type_by_field = typing.get_type_hints(settings_class)
    # get_type_hints also resolves annotations that are texts, which `field.type` would return unresolved.
    for field in dataclasses.fields(settings_class):
        field_type = type_by_field[field.name]
        if isinstance(field_type, types.UnionType):
            # `int | None` -> int, because click needs the type of the values that users give.
            field_type = next(
                member_type
                for member_type in typing.get_args(field_type)
                if member_type is not types.NoneType
            )
        if dataclasses.is_dataclass(field_type):
            field_knobs += knobs_of(typing.cast(type, field_type))
        elif "knob" in field.metadata:
            field_knobs.append((field, field_type, field.metadata["knob"]))
    return field_knobs


def settings_to_values(settings: object) -> dict[str, typing.Any]:
    """Return the values of all fields that `knob` has defined, including nested settings, by field name."""
    value_by_field: dict[str, typing.Any] = {}
    for field in dataclasses.fields(settings):  # type: ignore[arg-type]
        field_value = getattr(settings, field.name)
        if dataclasses.is_dataclass(field_value):
            # One flat mapping suffices: like flags, fields of nested dataclasses have unique names.
            value_by_field |= settings_to_values(field_value)
        elif "knob" in field.metadata:
            value_by_field[field.name] = field_value
    return value_by_field


def settings_from_values(settings_class: type, value_by_field: Mapping) -> typing.Any:
    """Return a settings object with the given values of its fields.

    A field that is missing in `value_by_field` has its default. Names that are no fields are ignored.

    Args:
        settings_class: settings dataclass.
        value_by_field: values by name of the field. Nested settings take their values from the same mapping.
    """
    return settings_class(**_constructor_arguments(settings_class, value_by_field))


def _constructor_arguments(settings_class: typing.Any, value_by_field: Mapping) -> dict[str, typing.Any]:
    """Return the constructor arguments of `settings_class` for a flat mapping of values.

    See `settings_from_values` for the arguments.
    """
    arguments: dict[str, typing.Any] = {}
    for field in dataclasses.fields(settings_class):
        default_value = (
            field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        )
        # A nested dataclass gets its values from the flat mapping, unless the mapping contains it as
        # an object.
        if dataclasses.is_dataclass(default_value) and not isinstance(
            value_by_field.get(field.name), type(default_value)
        ):
            nested_arguments = _constructor_arguments(default_value, value_by_field)
            nested_settings = dataclasses.replace(default_value, **nested_arguments)  # type: ignore[type-var]
            arguments[field.name] = nested_settings
        elif field.name in value_by_field:
            arguments[field.name] = value_by_field[field.name]
    return arguments


def number_text(number: float) -> str:
    """Return a number with all its digits: counts of images need more than the six of the format g.

    >>> number_text(1234567.891), number_text(25000.0), number_text(0.016)
    ('1234567.891', '25000', '0.016')
    """
    # 12 digits hold every number of images in thousands, and round the last bits of a sum away.
    text = f"{number:.12g}"
    return text if "e+" not in text else f"{number:.0f}"


def check_choice(who: str, value: str, choices: Collection[str]) -> None:
    """Raise ValueError for a value that is not one of `choices`. `who` is the start of the message."""
    if value not in choices:
        raise ValueError(
            f"{who}: expected one of {', '.join(choices)}, got {value!r}. Use one of these values."
        )


def check_knobs(settings: typing.Any) -> None:
    """Check the values of a settings object against the ranges and choices of its knobs.

    The __post_init__ of a settings dataclass calls this function. None is always allowed.

    Raises: ValueError that names the field or its flag.
    """
    for field in dataclasses.fields(settings):
        field_knob = field.metadata.get("knob")
        field_value = getattr(settings, field.name)
        if field_knob is None or field_value is None:
            continue
        flag = (
            f"--set {field.name}"
            if field_knob.rare
            else "--" + (field_knob.name or field.name).replace("_", "-")
        )
        # In Python and in JSON, a setting has the name of its field.
        flag_and_name = flag if field.name in flag else f"{flag} ({field.name})"
        if isinstance(field_value, float) and not math.isfinite(field_value):
            # Infinity would pass a lower limit, and both would pass if the field has no limit.
            raise ValueError(f"{flag_and_name} must be a finite number, got {field_value}")
        if field_knob.choices is not None:
            check_choice(flag, field_value, field_knob.choices)
        limits = (  # (limit, sign for the message, function that returns True for a valid value)
            (field_knob.low, ">=", operator.ge),
            (field_knob.high, "<=", operator.le),
            (field_knob.above, ">", operator.gt),
            (field_knob.below, "<", operator.lt),
        )
        for limit, sign, is_valid in limits:
            if limit is not None and not is_valid(field_value, limit):
                raise ValueError(f"{flag_and_name} must be {sign} {number_text(limit)}, got {field_value}")


class Knobs:
    """Base class of settings whose only checks are the ranges and choices of their knobs."""

    def __post_init__(self):
        check_knobs(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """Settings of the training loop that do not depend on the models that it trains."""

    kimg: float = knob(
        25000.0, "Length of the training, in thousands of images.", OPT, metavar="KIMG", above=0
    )
    batch: int = knob(4, "Number of images per iteration, over all processes.", OPT, low=1, shown="required")
    # control=False: the following settings do not affect the result, so a run and its control may differ
    # in them.
    batch_gpu: int | None = knob(
        None,
        "Images per forward pass of each process. A smaller number needs less memory.",
        OPT,
        low=1,
        shown="the images of the process in a batch",
        control=False,
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
        "Interval between snapshots, in units of --tick. 0 writes a single snapshot, at the end.",
        OPT,
        metavar="TICKS",
        low=0,
        control=False,
    )
    checkpoint_ticks: int = knob(
        1,
        "Interval between checkpoints, in units of --tick. --resume continues a run from its last"
        " checkpoint.",
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
                f"--batch-gpu: expected a divisor of --batch={self.batch}, got {self.batch_gpu}. Use a number"
                f" that divides {self.batch}."
            )

    def tag(self, cur_nimg: int) -> str:
        """Return the part of a snapshot's file name that states the number of images.

        The text is the number of thousands of images, as in EG3D, for example "000012". If snapshots are less
        than 1,000 images apart, the remainder is appended, for example "000012-345".
        """
        is_below_one_kimg = 0 < self.tick * self.snap < 1
        return f"{cur_nimg // 1000:06d}" + (f"-{cur_nimg % 1000:03d}" if is_below_one_kimg else "")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GanConfig(Knobs):
    """Settings of adversarial training: losses, schedules, optimisers, G_ema and augmentation."""

    gamma: float = _gan_knob(10.0, "Weight gamma of the R1 penalty.", low=0, shown="required")
    aug: str = _gan_knob(
        "noaug",
        "Augmentation of D's inputs: noaug (none), ada (with an adaptive probability), or fixed (with the"
        " probability --p).",
        choices=("noaug", "ada", "fixed"),
    )
    p: float = _gan_knob(
        0.2, "Probability of each augmentation of D's inputs. It is used with --aug=fixed.", low=0, high=1
    )
    target: float = _gan_knob(
        0.6,
        "Target of adaptive augmentation: mean sign of D's logits for real images. It is used with"
        " --aug=ada.",
        low=0,
        high=1,
    )
    style_mixing_prob: float = _gan_knob(
        0.0, "Probability with which a batch mixes the styles of two latents.", low=0, high=1
    )
    gen_pose_cond: bool = _gan_knob(True, "Condition G's mapping network on the camera.")
    gpc_reg_prob: float = _gan_knob(
        0.5,
        "Final probability of replacing the camera that G is conditioned on by the camera of another sample."
        " The probability is 1 at the start of the training, and falls over --gpc-reg-fade-kimg.",
        low=0,
        high=1,
    )
    gpc_reg_fade_kimg: float = _gan_knob(
        1000.0,
        "Length of the fade of the camera swapping probability from 1 to --gpc-reg-prob, in thousands of"
        " images.",
        metavar="KIMG",
        low=0,
    )
    blur_fade_kimg: float = _gan_knob(
        200.0,
        "Length of the fade-out of the blur of D's inputs, in thousands of images. 0 turns the blur off.",
        metavar="KIMG",
        low=0,
    )
    nrr_initial: int = _gan_knob(
        64,
        "Resolution of volume rendering at the start of the training, in pixels per edge.",
        metavar="PIXELS",
        low=4,
        flags=("--neural-rendering-resolution-initial",),
    )
    nrr_final: int | None = _gan_knob(
        None,
        "Resolution of volume rendering at the end of the training, in pixels per edge. By default the"
        " resolution does not change.",
        metavar="PIXELS",
        low=4,
        flags=("--neural-rendering-resolution-final",),
    )
    nrr_fade_kimg: float = _gan_knob(
        1000.0,
        "Length of the fade from --nrr-initial to --nrr-final, in thousands of images.",
        metavar="KIMG",
        low=0,
        flags=("--neural-rendering-resolution-fade-kimg",),
    )
    density_reg: float = _gan_knob(
        0.25, "Weight of the density regularisation. 0 turns the regularisation off.", low=0
    )
    density_reg_every: int = _gan_knob(
        4, "Interval between steps of the density regularisation, in iterations.", metavar="ITERATIONS", low=1
    )
    density_reg_p_dist: float = _gan_knob(
        0.004, "Distance by which the density regularisation perturbs points, in world units.", low=0
    )
    reg_type: str = _gan_knob(
        "l1",
        "Type of the density regulariser: l1 penalises differences between neighbouring points."
        " monotonic-detach and monotonic-fixed also penalise a density that decreases from front to back."
        " With monotonic-detach, only the density at the back gets the gradient of this penalty; with"
        " monotonic-fixed, the density at the front gets it as well.",
        choices=REG_TYPES,
    )
    glr: float = knob(0.0025, "Learning rate of the generator G.", OPT, above=0)
    dlr: float = knob(0.002, "Learning rate of the discriminator D.", OPT, above=0)
    ema_kimg: float = knob(
        10.0,
        "Half-life of G_ema, the moving average of G's weights, in thousands of images.",
        OPT,
        metavar="KIMG",
        low=0,
        shown="batch * 10 / 32",
        rare=True,
    )
    amp: str = knob(
        "off",
        "Mixed precision. bf16 runs the main phases of G and D in bfloat16 (autocast); weights, losses, the"
        " R1 penalty, density and rendering remain in float32. off runs everything in float32.",
        OPT,
        choices=("off", "bf16"),
    )
    # Largest half-life of G_ema as a fraction of the images that the run has used; None: no limit.
    ema_rampup: float | None = 0.05
    # Smallest number of images, in thousands, in which ADA's probability can change by 1.
    ada_kimg: float = 500.0
    ada_interval: int = 4  # iterations between two changes of the augmentation probability
    d_reg_interval: int = 16  # iterations between two R1 steps
    blur_init_sigma: float = 10.0  # blur of D's inputs at the start, pixels
    dual_discrimination: bool = True  # D receives the raw image as well, and R1 covers it
    filter_mode: str = "antialiased"  # resizing of real images to the raw resolution: "antialiased" or "none"
    grid: tuple[int, int] = (8, 4)  # columns and rows of image snapshots


@dataclasses.dataclass(frozen=True, kw_only=True)
class NetworkConfig(Knobs):
    """Settings of the networks' architecture and initial weights."""

    cfg: str = knob(
        "heads64",
        "Preset of the networks and the renderer. ffhq, afhq and shapenet are EG3D's presets for photographs"
        " of faces, photographs of animal faces, and renders of objects. heads64 is a small preset for images"
        " of 64 pixels, such as synthetic:people64.",
        NET,
        choices=("ffhq", "afhq", "shapenet", "heads64"),
    )
    init: str = knob(
        "scratch",
        "Initial networks: bundled (the bundled networks), scratch (random weights), the path of a network"
        " file, or the path of a run folder.",
        NET,
        metavar="bundled|scratch|FILE|RUN",
        control=False,
    )
    start: str = knob(
        "G",
        "Network of --init whose weights become the initial weights of G: the generator G itself, or G_ema,"
        " the moving average of its weights.",
        NET,
        choices=("G", "G_ema"),
        rare=True,
    )
    cbase: int = knob(
        32768,
        "Channel base of the networks. A layer with R x R pixels has CBASE / R feature maps, but at most"
        " --cmax.",
        NET,
        low=1,
    )
    cmax: int = knob(512, "Largest number of feature maps of a layer.", NET, low=1)
    map_depth: int = knob(2, "Number of layers of G's mapping network.", NET, low=1)
    mbstd_group: int | None = knob(
        4, "Number of images in a group of D's minibatch standard deviation layer.", NET, low=1
    )
    freezed: int = knob(
        0,
        "Number of layers of D that are not trained, counted from the input (Freeze-D).",
        NET,
        metavar="LAYERS",
        low=0,
    )
    plane_layout: str = knob(
        "eg3d",
        "Layout of the three planes. eg3d is the layout of EG3D's released checkpoints, whose third plane has"
        " the axes of the second. fixed has three different planes.",
        NET,
        choices=("eg3d", "fixed"),
        rare=True,
    )
    sr_module: str | None = knob(
        None,
        "Class of the super-resolution module, a name in training/superresolution.py.",
        NET,
        metavar="CLASS",
        shown="chosen by the images' resolution",
    )
    sr_noise_mode: str = knob(
        "none",
        "Noise inputs of the super-resolution module: random noise, or none.",
        NET,
        choices=("random", "none"),
    )
    sr_num_fp16_res: int = knob(
        4,
        "Any number above 0 runs the super-resolution module in half precision on CUDA. 0 runs it in"
        " float32.",
        NET,
        low=0,
    )
    g_num_fp16_res: int = knob(
        0,
        "Number of the highest resolutions of G's backbone that run in half precision on CUDA.",
        NET,
        low=0,
    )
    d_num_fp16_res: int = knob(
        4, "Number of the highest resolutions of D that run in half precision on CUDA.", NET, low=0
    )
    c_scale: float = knob(1.0, "Factor on the camera label that G is conditioned on.", NET)
    disc_c_noise: float = knob(
        0.0,
        "Standard deviation of noise on D's camera labels, in units of the labels' standard deviation.",
        NET,
        low=0,
    )
    decoder_lr_mul: float = knob(1.0, "Factor on the learning rate of the tri-plane decoder.", NET, above=0)


# Rendering options (EG3D's rendering_kwargs) of all presets. Lengths are in world units.
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
# "auto" limits the samples of each ray to the cube. Outside the cube, the planes contain no features.
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
FAMILIES = {  # preset --cfg -> its rendering options
    "ffhq": _FACES,
    "afhq": {**_FACES, "avg_camera_pivot": [0, 0, -0.06]},
    "shapenet": _SHAPENET,
    "heads64": _HEADS,
}
SR_BY_RESOLUTION = {  # resolution of the training images -> super-resolution module of EG3D
    512: "SuperresolutionHybrid8XDC",
    256: "SuperresolutionHybrid4X",
    128: "SuperresolutionHybrid2X",
}


def networks_for(network_config: NetworkConfig, resolution: int, gan_config: GanConfig) -> tuple[dict, dict]:
    """Return the constructor arguments of new networks G and D.

    Args:
        network_config: settings of the networks.
        resolution: pixels per edge of the training images.
        gan_config: settings of adversarial training, some of which the rendering options contain.
    Returns: the arguments of G, and then the arguments of D, each a dict by name.
    Raises: ValueError if EG3D has no super-resolution module for this resolution, and `network_config` names
        no other module.
    """
    is_small_preset = network_config.cfg == "heads64"
    rendering_kwargs = {
        **_RENDERING,
        **FAMILIES[network_config.cfg],
        "image_resolution": resolution,
        "c_gen_conditioning_zero": not gan_config.gen_pose_cond,
        "gpc_reg_prob": gan_config.gpc_reg_prob if gan_config.gen_pose_cond else None,
        "density_reg": gan_config.density_reg,
        "density_reg_p_dist": gan_config.density_reg_p_dist,
        "reg_type": gan_config.reg_type,
        "c_scale": network_config.c_scale,
        "superresolution_noise_mode": network_config.sr_noise_mode,
        "decoder_lr_mul": network_config.decoder_lr_mul,
    }
    sr_module = network_config.sr_module or (
        "NoSuperresolution" if is_small_preset else SR_BY_RESOLUTION.get(resolution)
    )
    if sr_module is None:
        resolutions = ", ".join(map(str, SR_BY_RESOLUTION))
        raise ValueError(
            f"--data: expected images of {resolutions} pixels per edge for --cfg={network_config.cfg}, got"
            f" {resolution}. Resize the images with tools/dataset_tool.py, or name a super-resolution module"
            " with --sr-module."
        )
    # Network files contain the module with its path, which users need not write.
    rendering_kwargs["superresolution_module"] = (
        f"training.superresolution.{sr_module.removeprefix('training.superresolution.')}"
    )
    w_dim = 128 if is_small_preset else 512
    channel_kwargs = {"channel_base": network_config.cbase, "channel_max": network_config.cmax}
    # The small preset renders at the final resolution or at half of it, so a super-resolution module with few
    # feature maps suffices.
    sr_kwargs = (
        {"input_resolution": resolution // 2, "block_channels": [32, 16]}
        if is_small_preset
        else dict(channel_kwargs)
    )
    G_kwargs: dict[str, typing.Any] = {
        "z_dim": 64 if is_small_preset else 512,
        "c_dim": 25,
        "w_dim": w_dim,
        "img_resolution": resolution,
        "img_channels": 3,
        "mapping_kwargs": {"num_layers": network_config.map_depth},
        "rendering_kwargs": rendering_kwargs,
        "conv_clamp": None,
        "num_fp16_res": network_config.g_num_fp16_res,
        "sr_num_fp16_res": network_config.sr_num_fp16_res,
        # In training, ordinary convolutions are used instead of grouped convolutions, which is faster. EG3D
        # has the same setting.
        "fused_modconv_default": "inference_only",
        "plane_layout": network_config.plane_layout,
        "sr_kwargs": {**sr_kwargs, "fused_modconv_default": "inference_only"},
        **channel_kwargs,
    }
    if is_small_preset:
        G_kwargs.update(plane_resolution=64, plane_channels=16, decoder_hidden_dim=32, use_noise=False)
        # The training images are renders of heads that belong to latents. With StyleGAN's factor of 0.01 on
        # its learning rate, the mapping network would learn this correspondence too slowly.
        G_kwargs["mapping_kwargs"]["lr_multiplier"] = 1.0
        if sr_module == "NoSuperresolution":
            # Without super-resolution, the rendered features are the image, so there are three: RGB.
            G_kwargs["decoder_features"] = 3
    # In a short run, a camera embedding with StyleGAN's factor of 0.01 on the learning rate would learn too
    # little. D would then ignore the camera, and the shapes of G would remain flat.
    D_kwargs = {
        "c_dim": 25,
        "img_resolution": resolution,
        "img_channels": 3,
        "block_kwargs": {"freeze_layers": network_config.freezed},
        "mapping_kwargs": {"num_layers": 2, "lr_multiplier": 1.0} if is_small_preset else {},
        "epilogue_kwargs": {"mbstd_group_size": network_config.mbstd_group},
        "disc_c_noise": network_config.disc_c_noise,
        "num_fp16_res": network_config.d_num_fp16_res,
        "conv_clamp": 256,
        **channel_kwargs,
    }
    return G_kwargs, D_kwargs


Settings = TypeVar("Settings")


def from_dict(settings_class: type[Settings], value_by_field: Mapping, who: str = "") -> Settings:
    """Return a settings object from the JSON form of `dataclasses.asdict`.

    Args:
        settings_class: settings dataclass.
        value_by_field: values of the fields by name, as JSON values.
        who: name of the settings in messages; the name of the class by default.
    Raises: ValueError for a field that the class does not have, or if nested settings are no mapping.
    """
    who = who or settings_class.__name__
    type_by_field = typing.get_type_hints(settings_class)
    unknown_names = sorted(set(value_by_field) - set(type_by_field))
    if unknown_names:
        raise ValueError(
            f"{who}: this version of the program has no settings {', '.join(unknown_names)}. Use the version"
            " that wrote the file, or start a new run."
        )
    arguments = dict(value_by_field)
    # In JSON, nested dataclasses have become mappings, and tuples have become lists. Both are converted back.
    for field_name, field_value in value_by_field.items():
        if field_value is None:
            continue
        # The type itself and, for a type such as `A | None`, its members.
        for member_type in (type_by_field[field_name], *typing.get_args(type_by_field[field_name])):
            if isinstance(member_type, type) and dataclasses.is_dataclass(member_type):
                if not isinstance(field_value, Mapping):
                    raise ValueError(
                        f"{who}.{field_name}: expected a mapping from names to values, got {field_value!r}."
                        " Use the version that wrote the file, or start a new run."
                    )
                arguments[field_name] = from_dict(
                    typing.cast(type, member_type), field_value, f"{who}.{field_name}"
                )
            elif typing.get_origin(member_type) is tuple:
                arguments[field_name] = tuple(field_value)
    return settings_class(**arguments)
