"""Settings of a training run, and the presets that fill them.

A preset is a table row: what differs between FFHQ, AFHQ, ShapeNet and the bundled 64-pixel heads.
"""

import dataclasses
import types
import typing

from training.gan_phases import GanConfig


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
    flags: tuple[str, ...] = ()  # further spellings; the first one is --<name with dashes>
    shown: str | None = None  # the default in words, where the field's is not what applies


def knob(default: object, help: str, group: str, **more) -> typing.Any:
    """A dataclass field that is also a flag: of the field's name, with its help text, range and default.

    Args: more: see `Knob`. `eg3d_rlhf.cli.options_of` makes the flags, `check_knobs` applies ranges and choices.

    >>> gamma: float = knob(1.0, "R1 weight.", "GAN losses", low=0)
    """
    return dataclasses.field(default=default, metadata={"knob": Knob(help=help, group=group, **more)})


def knobs_of(kind: type) -> list[tuple[dataclasses.Field, type, Knob]]:
    """The knobs of a settings dataclass, those of nested ones in their places: (field, type without None, knob)."""
    found, hints = [], typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        if isinstance(hint, types.UnionType):
            hint = next(option for option in typing.get_args(hint) if option is not types.NoneType)
        if dataclasses.is_dataclass(hint):
            found += knobs_of(hint)
        elif "knob" in field.metadata:
            found.append((field, hint, field.metadata["knob"]))
    return found


def check_knobs(settings: object) -> None:
    """Apply the ranges and choices of a settings object's own knobs; for its __post_init__.

    Raises: ValueError naming the field.
    """
    for field in dataclasses.fields(settings):
        k, value = field.metadata.get("knob"), getattr(settings, field.name)
        if k is None or value is None:
            continue
        if k.choices is not None and value not in k.choices:
            raise ValueError(f"{field.name}: expected one of {', '.join(k.choices)}, got {value!r}. Choose one of them.")
        for limit, sign, holds in ((k.low, ">=", k.low is None or value >= k.low), (k.high, "<=", k.high is None or value <= k.high),
                                   (k.above, ">", k.above is None or value > k.above), (k.below, "<", k.below is None or value < k.below)):
            if not holds:
                raise ValueError(f"{field.name} must be {sign} {limit:g}, got {value}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Adam, before the correction for lazy regularisation."""

    lr: float  # learning rate, > 0
    beta1: float = 0.0
    beta2: float = 0.99
    eps: float = 1e-8

    def __post_init__(self):
        if not self.lr > 0:
            raise ValueError(f"lr must be > 0, got {self.lr}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """The training loop."""

    batch: int = 4  # images per iteration
    batch_gpu: int | None = None  # images per forward pass; None = batch
    total_kimg: float = 25000.0  # thousands of images
    kimg_per_tick: float = 4.0
    snapshot_ticks: int = 50  # network and image snapshots every this many ticks; 0 = at the end only
    checkpoint_ticks: int = 1  # resumable state every this many ticks
    ema_kimg: float = 10.0  # half-life of the moving average
    ema_rampup: float | None = 0.05  # limit the half-life to this share of the images seen; None = no ramp
    g_reg_interval: int = 4  # iterations between density regularisations
    d_reg_interval: int = 16  # iterations between R1
    ada_target: float | None = None  # target of mean sign(D(real)); None = augmentation strength is fixed
    ada_interval: int = 4
    ada_kimg: float = 500.0
    augment_p: float = 0.0  # initial augmentation probability
    seed: int = 0
    grid: tuple[int, int] = (8, 4)  # columns and rows of image snapshots

    def __post_init__(self):
        if self.batch < 1:
            raise ValueError(f"batch must be >= 1, got {self.batch}")
        if self.batch_gpu is not None and (self.batch_gpu < 1 or self.batch % self.batch_gpu):
            raise ValueError(f"batch_gpu must divide batch = {self.batch}, got {self.batch_gpu}")
        if self.total_kimg <= 0:
            raise ValueError(f"total_kimg must be > 0, got {self.total_kimg}")
        if self.kimg_per_tick <= 0:
            raise ValueError(f"kimg_per_tick must be > 0, got {self.kimg_per_tick}")
        if self.g_reg_interval < 1 or self.d_reg_interval < 1:
            raise ValueError("regularisation intervals must be >= 1")



_RENDERING = {
    "disparity_space_sampling": False, "clamp_mode": "softplus", "c_scale": 1.0, "superresolution_noise_mode": "none",
    "decoder_lr_mul": 1.0, "sr_antialias": True,
}
_FACES = {
    "depth_resolution": 48, "depth_resolution_importance": 48, "ray_start": 2.25, "ray_end": 3.3, "box_warp": 1,
    "avg_camera_radius": 2.7, "avg_camera_pivot": [0, 0, 0.2],
}
_SHAPENET = {
    "depth_resolution": 64, "depth_resolution_importance": 64, "ray_start": 0.1, "ray_end": 2.6, "box_warp": 1.6,
    "white_back": True, "avg_camera_radius": 1.7, "avg_camera_pivot": [0, 0, 0],
}
_HEADS = {
    "depth_resolution": 16, "depth_resolution_importance": 12, "ray_start": 2.2, "ray_end": 3.2, "box_warp": 1,
    "white_back": True, "avg_camera_radius": 2.7, "avg_camera_pivot": [0, 0, 0],
}
FAMILIES = {"ffhq": _FACES, "afhq": {**_FACES, "avg_camera_pivot": [0, 0, -0.06]}, "shapenet": _SHAPENET, "heads64": _HEADS}
SR_BY_RESOLUTION = {512: "SuperresolutionHybrid8XDC", 256: "SuperresolutionHybrid4X", 128: "SuperresolutionHybrid2X"}


def snapshot_tag(cur_nimg: int, config: LoopConfig) -> str:
    """What tells a run's snapshots apart in their names: thousands of images, as EG3D has it, and the images themselves where several
    snapshots fall into one thousand."""
    close = 0 < config.kimg_per_tick * config.snapshot_ticks < 1
    return f"{cur_nimg // 1000:06d}" + (f"-{cur_nimg % 1000:03d}" if close else "")


def networks_for(cfg: str, resolution: int, gan: GanConfig, **override) -> tuple[dict, dict]:
    """Constructor arguments of G and D.

    Args:
        cfg: a name in FAMILIES; resolution: pixels of the data.
        override: cbase, cmax, map_depth, mbstd_group, freezed, sr_module, sr_num_fp16_res, g_num_fp16_res, d_num_fp16_res, c_scale,
            disc_c_noise, sr_noise_mode, decoder_lr_mul, plane_layout.
    Raises: ValueError where no super-resolution module fits.
    """
    small = cfg == "heads64"
    rendering = {
        **_RENDERING, **FAMILIES[cfg], "image_resolution": resolution, "c_gen_conditioning_zero": gan.gpc_reg_prob is None,
        "gpc_reg_prob": gan.gpc_reg_prob, "density_reg": gan.density_reg, "density_reg_p_dist": gan.density_reg_p_dist,
        "reg_type": gan.reg_type, "c_scale": override["c_scale"], "superresolution_noise_mode": override["sr_noise_mode"],
        "decoder_lr_mul": override["decoder_lr_mul"],
    }
    sr_module = override["sr_module"] or ("SuperresolutionHybrid2X" if small else SR_BY_RESOLUTION.get(resolution))
    if sr_module is None:
        known = ", ".join(str(r) for r in SR_BY_RESOLUTION)
        raise ValueError(f"--data: expected images of {known} pixels for --cfg={cfg}, got {resolution}. Resize them or name --sr-module.")
    rendering["superresolution_module"] = f"training.superresolution.{sr_module.removeprefix('training.superresolution.')}"
    dim = 128 if small else 512
    channels = {"channel_base": override["cbase"], "channel_max": override["cmax"]}
    sr = {"input_resolution": resolution // 2, "block_channels": [32, 16]} if small else dict(channels)
    G = {
        "z_dim": 64 if small else 512, "c_dim": 25, "w_dim": dim, "img_resolution": resolution, "img_channels": 3,
        "mapping_kwargs": {"num_layers": override["map_depth"]}, "rendering_kwargs": rendering, "conv_clamp": None,
        "num_fp16_res": override["g_num_fp16_res"], "sr_num_fp16_res": override["sr_num_fp16_res"],
        "fused_modconv_default": "inference_only", "plane_layout": override["plane_layout"],
        "sr_kwargs": {**sr, "fused_modconv_default": "inference_only"}, **channels,
    }
    if small:
        G.update(plane_resolution=64, plane_channels=16, decoder_hidden_dim=32)
    D = {  # a short run leaves no time for a camera embedding that learns at a hundredth of the rate: D would not see poses, G stay flat
        "c_dim": 25, "img_resolution": resolution, "img_channels": 3, "block_kwargs": {"freeze_layers": override["freezed"]},
        "mapping_kwargs": {"num_layers": 2, "lr_multiplier": 1.0} if small else {},
        "epilogue_kwargs": {"mbstd_group_size": override["mbstd_group"]},
        "disc_c_noise": override["disc_c_noise"], "num_fp16_res": override["d_num_fp16_res"], "conv_clamp": 256, **channels,
    }
    return G, D
