"""Which constructor arguments and rendering options a network of a pickle may state, and their plausible values."""

from collections.abc import Callable
from typing import Any

from eg3d_rlhf.generators.pickles.machine import Refusal, brief, brief_text
from training.superresolution import MODULES

Check = tuple[Callable[[Any], bool], str]  # whether a value is admitted; what is, in words


def whole(low: int, high: int) -> Check:
    """Whole numbers of a range."""
    return lambda v: type(v) is int and low <= v <= high, f"a whole number of {low} to {high}"


def maybe(check: Check) -> Check:
    """None, too."""
    return lambda v: v is None or check[0](v), f"{check[1]} or None"


def one_of(*values: Any) -> Check:
    """These alone."""
    return lambda v: any(type(v) is type(w) and v == w for w in values), " or ".join(repr(v) for v in values)


NUMBER = (lambda v: type(v) in (int, float) and abs(v) < 1e9, "a number")
FLAG = one_of(True, False)
SIZE, CHANNELS = whole(1, 1 << 16), whole(1, 1 << 24)
MODCONV = one_of(True, False, "inference_only")
FILTER = (lambda v: v == [1, 3, 3, 1], "[1, 3, 3, 1]")
HALF = whole(0, 32)
MAPPING = {
    "num_layers": whole(1, 64), "embed_features": maybe(SIZE), "layer_features": maybe(SIZE), "lr_multiplier": NUMBER,
    "w_avg_beta": maybe(NUMBER), "activation": one_of("lrelu", "relu", "linear", "swish"),
}
BLOCK: dict[str, Any] = {
    "fused_modconv_default": MODCONV, "use_noise": FLAG, "fp16_channels_last": FLAG, "architecture": one_of("skip"),
    "resample_filter": FILTER, "activation": one_of("lrelu"),
}
SYNTHESIS = {"channel_base": CHANNELS, "channel_max": SIZE, "num_fp16_res": HALF, "conv_clamp": maybe(NUMBER), **BLOCK}
G_OPTIONS = {
    "z_dim": SIZE, "c_dim": whole(0, 1 << 16), "w_dim": SIZE, "img_resolution": whole(4, 8192), "img_channels": one_of(3),
    "sr_num_fp16_res": HALF, "mapping_kwargs": {**MAPPING, "w_avg_beta": NUMBER}, "sr_kwargs": SYNTHESIS, **SYNTHESIS,
}
D_OPTIONS = {
    "c_dim": whole(0, 1 << 16), "img_resolution": whole(4, 8192), "img_channels": one_of(3), "channel_base": CHANNELS,
    "channel_max": SIZE, "num_fp16_res": HALF, "conv_clamp": maybe(NUMBER), "cmap_dim": maybe(SIZE), "disc_c_noise": NUMBER,
    "architecture": one_of("resnet"), "mapping_kwargs": MAPPING,
    "block_kwargs": {
        "freeze_layers": whole(0, 64), "fp16_channels_last": FLAG, "activation": one_of("lrelu"), "resample_filter": FILTER,
    },
    "epilogue_kwargs": {"mbstd_group_size": maybe(SIZE), "mbstd_num_channels": whole(0, 64), "activation": one_of("lrelu")},
}
FIXED = ("architecture", "resample_filter")  # one value is admitted, ours is built in
BUILT_IN_ACTIVATION = ("sr_kwargs", "block_kwargs", "epilogue_kwargs", "")  # where ours takes no `activation`

RAY_LIMIT = (lambda v: v == "auto" or NUMBER[0](v), "a number or 'auto'")
POSITIVE = (lambda v: type(v) in (int, float) and 0 < v < 1e6, "a number above 0")
RENDERING = {  # needed to render; others are kept as they are
    "c_gen_conditioning_zero": FLAG, "superresolution_noise_mode": one_of("none", "random", "const"), "sr_antialias": FLAG,
    "box_warp": POSITIVE, "depth_resolution": whole(1, 4096), "clamp_mode": one_of("softplus"),
    "ray_start": RAY_LIMIT, "ray_end": RAY_LIMIT,
    "superresolution_module": (lambda v: isinstance(v, str) and v.rpartition(".")[2] in MODULES, f"one of {', '.join(MODULES)}"),
}
OPTIONAL_RENDERING = {
    "depth_resolution_importance": whole(0, 4096), "decoder_lr_mul": POSITIVE, "c_scale": NUMBER, "disparity_space_sampling": FLAG,
    "white_back": FLAG, "density_noise": NUMBER, "avg_camera_radius": POSITIVE,
    "avg_camera_pivot": (lambda v: isinstance(v, list) and len(v) == 3 and all(NUMBER[0](x) for x in v), "three numbers"),
}


def check(values: dict, table: dict, where: str) -> None:
    """Every name known, every value plausible. Raises: Refusal naming the first that is not."""
    for name, value in values.items():
        title = f"{where}{brief_text(name)}"
        if name not in table:
            raise Refusal(f"the unknown constructor argument {title}")
        rule = table[name]
        if isinstance(rule, dict):
            if not isinstance(value, dict):
                raise Refusal(f"{title} = {brief(value)} instead of a dictionary")
            check(value, rule, f"{title}.")
        elif not rule[0](value):
            raise Refusal(f"{title} = {brief(value)} instead of {rule[1]}")
