"""Networks from a snapshot. The architecture is built from constructor arguments in the file, each
checked by name and value; tensors are copied name by name.
"""

import dataclasses
import math
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from eg3d_rlhf.generators.pickles.pickle_reader import RejectedError, describe, shorten
from eg3d_rlhf.generators.pickles.snapshot import (
    ModuleRecord,
    Snapshot,
    TensorRecord,
    json_values,
    read,
    reporting_rejection,
    tensors,
)
from training import networks, storage
from training.discriminator import DualDiscriminator
from training.fullhead import ACTIVATIONS, HyPlaneHeadGenerator, PanoHeadGenerator, SphereHeadGenerator
from training.rendering.renderer import generate_planes
from training.superresolution import MODULES
from training.triplane import TriPlaneGenerator

# The constructor arguments and rendering options that a pickled network may have, and their plausible values.

# A predicate of accepted values, and the description of these values for messages.
Check = tuple[Callable[[Any], bool], str]


def integer_in(low: int, high: int) -> Check:
    """Accept integers from `low` to `high`."""
    return lambda v: type(v) is int and low <= v <= high, f"a whole number of {low} to {high}"


def or_none(check: Check) -> Check:
    """Accept None, and what `check` accepts."""
    return lambda v: v is None or check[0](v), f"{check[1]} or None"


def one_of(*values: Any) -> Check:
    """Accept exactly these values. The type counts, so that 1 is not True."""
    return lambda v: any(type(v) is type(w) and v == w for w in values), " or ".join(repr(v) for v in values)


NUMBER = (lambda v: type(v) in (int, float) and abs(v) < 1e9, "a number")
FLAG = one_of(True, False)
SIZE = integer_in(1, 1 << 16)
CHANNELS = integer_in(1, 1 << 24)
MODCONV = one_of(True, False, "inference_only")
FILTER = (lambda v: v == [1, 3, 3, 1], "[1, 3, 3, 1]")
HALF = integer_in(0, 32)
MAPPING = {
    "num_layers": integer_in(1, 64),
    "embed_features": or_none(SIZE),
    "layer_features": or_none(SIZE),
    "lr_multiplier": NUMBER,
    "w_avg_beta": or_none(NUMBER),
    "activation": one_of("lrelu", "relu", "linear", "swish"),
}
BLOCK: dict[str, Any] = {
    "fused_modconv_default": MODCONV,
    "use_noise": FLAG,
    "fp16_channels_last": FLAG,
    "architecture": one_of("skip"),
    "resample_filter": FILTER,
    "activation": one_of("lrelu"),
}
SYNTHESIS = {
    "channel_base": CHANNELS,
    "channel_max": SIZE,
    "num_fp16_res": HALF,
    "conv_clamp": or_none(NUMBER),
    **BLOCK,
}
G_OPTIONS = {
    "z_dim": SIZE,
    "c_dim": integer_in(0, 1 << 16),
    "w_dim": SIZE,
    "img_resolution": integer_in(4, 8192),
    "img_channels": one_of(3),
    "sr_num_fp16_res": HALF,
    "mapping_kwargs": {**MAPPING, "w_avg_beta": NUMBER},
    "sr_kwargs": SYNTHESIS,
    **SYNTHESIS,
}
D_OPTIONS = {
    "c_dim": integer_in(0, 1 << 16),
    "img_resolution": integer_in(4, 8192),
    "img_channels": one_of(3),
    "channel_base": CHANNELS,
    "channel_max": SIZE,
    "num_fp16_res": HALF,
    "conv_clamp": or_none(NUMBER),
    "cmap_dim": or_none(SIZE),
    "disc_c_noise": NUMBER,
    "architecture": one_of("resnet"),
    "mapping_kwargs": MAPPING,
    "block_kwargs": {
        "freeze_layers": integer_in(0, 64),
        "fp16_channels_last": FLAG,
        "activation": one_of("lrelu"),
        "resample_filter": FILTER,
    },
    "epilogue_kwargs": {
        "mbstd_group_size": or_none(SIZE),
        "mbstd_num_channels": integer_in(0, 64),
        "activation": one_of("lrelu"),
    },
}
FIXED = ("architecture", "resample_filter")  # only one value is accepted, and it is built into our networks
BUILT_IN_ACTIVATION = ("sr_kwargs", "block_kwargs", "epilogue_kwargs", "")  # these take no `activation` here

RAY_LIMIT = (lambda v: v == "auto" or NUMBER[0](v), "a number or 'auto'")
POSITIVE = (lambda v: type(v) in (int, float) and 0 < v < 1e6, "a number above 0")
RENDERING = {  # options that rendering needs; others are kept unchecked
    "c_gen_conditioning_zero": FLAG,
    "superresolution_noise_mode": one_of("none", "random", "const"),
    "sr_antialias": FLAG,
    "box_warp": POSITIVE,
    "depth_resolution": integer_in(1, 4096),
    "clamp_mode": one_of("softplus"),
    "ray_start": RAY_LIMIT,
    "ray_end": RAY_LIMIT,
    "superresolution_module": (
        lambda v: isinstance(v, str) and v.rpartition(".")[2] in MODULES,
        f"one of {', '.join(MODULES)}",
    ),
}
OPTIONAL_RENDERING = {
    "depth_resolution_importance": integer_in(0, 4096),
    "decoder_lr_mul": POSITIVE,
    "c_scale": NUMBER,
    "disparity_space_sampling": FLAG,
    "white_back": FLAG,
    "density_noise": NUMBER,
    "avg_camera_radius": POSITIVE,
    "avg_camera_pivot": (
        lambda v: isinstance(v, list) and len(v) == 3 and all(NUMBER[0](x) for x in v),
        "three numbers",
    ),
}


def check(values: dict, table: dict, where: str) -> None:
    """Check that every name is known and every value plausible. Raises: RejectedError for the first that
    is not.
    """
    for name, value in values.items():
        # The full name, such as mapping_kwargs.num_layers, escaped for the terminal.
        title = f"{where}{shorten(name)}"
        # An unknown argument might change the architecture, so it is not ignored.
        if name not in table:
            raise RejectedError(f"the unknown constructor argument {title}")
        rule = table[name]
        # nested arguments, such as mapping_kwargs
        if isinstance(rule, dict):
            if not isinstance(value, dict):
                raise RejectedError(f"{title} = {describe(value)} instead of a dictionary")
            check(value, rule, f"{title}.")
        elif not rule[0](value):
            raise RejectedError(f"{title} = {describe(value)} instead of {rule[1]}")


# The family of a generator is determined from the names and shapes of its tensors; classes and options follow
# from the family. The released files of all families have the same few class names, so these are not
# sufficient. No text in the file is used.

RENDER_MODE = "TriPlane_SingSph_flatten"  # the only published value of the option render_mode (HyPlaneHead)
_PLANES = 3  # planes of a layout
_CHANNELS = 32  # channels of a plane


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kind:
    """A family, as its pickles show it."""

    architecture: str  # the name in our network files
    cls: Any  # class of the network
    class_names: tuple[str, ...]  # possible classes of the pickled generator
    layouts: tuple[str, ...]  # possible plane layouts of the renderer
    rendering: dict  # required options in addition to EG3D's
    optional: dict = dataclasses.field(default_factory=dict)  # options that are checked if they occur


_HEAD = {
    "triplane_size": integer_in(4, 4096),
    "triplane_depth": integer_in(1, 64),
    "decoder_activation": one_of(*ACTIVATIONS),
    "use_torgb_raw": FLAG,
    "use_background": FLAG,
}
# options that only our own conversions write
_OURS = {"triplane_extent": POSITIVE, "side_margin": or_none(NUMBER)}
EG3D = Kind(
    architecture="eg3d",
    cls=TriPlaneGenerator,
    class_names=("TriPlaneGenerator",),
    layouts=("eg3d", "fixed"),
    rendering={},
)
PANOHEAD = Kind(
    architecture="panohead",
    cls=PanoHeadGenerator,
    class_names=("TriPlaneGenerator", "TriGridGenerator"),
    layouts=("panohead",),
    rendering=_HEAD,
    optional=_OURS,
)
SPHEREHEAD = Kind(
    architecture="spherehead",
    cls=SphereHeadGenerator,
    class_names=("TriPlaneGenerator",),
    layouts=(),
    rendering={**_HEAD, "triplane_depth": one_of(3)},
    optional={**_OURS, "parsing_flag": one_of(False)},
)
HYPLANEHEAD = Kind(
    architecture="hyplanehead",
    cls=HyPlaneHeadGenerator,
    class_names=("TriPlaneSingSphGenerator_flatten",),
    layouts=("panohead",),
    rendering={
        **_HEAD,
        "triplane_depth": one_of(1),
        "multiplane_num": one_of(1),
        "render_mode": one_of(RENDER_MODE),
        "sph2cir_flag": FLAG,
        "cir2squ_flag": FLAG,
    },
    optional=_OURS,
)
KINDS = EG3D, PANOHEAD, SPHEREHEAD, HYPLANEHEAD


def check_class(class_name: str) -> None:
    """Raise RejectedError for a generator of an unknown class."""
    # Without repetitions: several families share class names.
    known_classes = tuple(dict.fromkeys(name for kind in KINDS for name in kind.class_names))
    if class_name not in known_classes:
        raise RejectedError(
            f"a generator of class {describe(class_name)} instead of {' or '.join(map(repr, known_classes))}"
        )


def kind_of(class_name: str, shapes: dict[str, tuple[int, ...]], rendering: dict) -> Kind:
    """Determine the family of a generator from the names and shapes of its state dict.

    SphereHead has two stacks of convolutions. Of the others, HyPlaneHead and PanoHead have a network for the
    camera; HyPlaneHead has one map of 32 channels, PanoHead has 96 channels per slice. EG3D has no such
    network.

    Raises: RejectedError for a class of another family, other channels, or an unknown render_mode.
    """
    output_layers = [
        name for name in shapes if name.startswith("backbone.synthesis.b") and name.endswith(".torgb.weight")
    ]
    # the highest resolution; (length, name) sorts b64 before b128
    last = max(output_layers, key=lambda name: (len(name), name), default="")
    # the first axis is output channels
    channels = shapes[last][0] if last and shapes[last] else 0
    # The second stack of SphereHead.
    if "ConvA.0.weight" in shapes:
        kind = SPHEREHEAD
    elif not any(name.startswith("t_mapping.") for name in shapes):
        kind = EG3D
    elif "render_mode" in rendering and rendering["render_mode"] != RENDER_MODE:
        raise RejectedError(f"render_mode = {describe(rendering['render_mode'])} instead of {RENDER_MODE!r}")
    elif channels == _CHANNELS and "render_mode" in rendering:
        kind = HYPLANEHEAD
    elif channels and channels % (_PLANES * _CHANNELS) == 0:
        kind = PANOHEAD
    else:
        raise RejectedError(f"a full-head generator whose backbone gives {channels} channels")
    if class_name not in kind.class_names:
        raise RejectedError(
            f"a generator of class {describe(class_name)} with the tensors of {kind.architecture}"
        )
    return kind


G_NAMES = ("z_dim", "c_dim", "w_dim", "img_resolution", "img_channels")  # constructor arguments by position
D_NAMES = ("c_dim", "img_resolution", "img_channels")


def _arguments(module: ModuleRecord, names: tuple[str, ...], who: str) -> dict:
    """Return constructor arguments by name, from _init_args and _init_kwargs. All of `names` must be
    among them.
    """
    # Tensors and records among the arguments are rejected here.
    args = json_values(module.state.get("_init_args", ()))
    kwargs = json_values(module.state.get("_init_kwargs", {}))
    if not isinstance(args, list) or not isinstance(kwargs, dict) or len(args) > len(names):
        raise RejectedError(f"constructor arguments that are {describe(args)} and {describe(kwargs)}")
    return _with({**dict(zip(names, args, strict=False)), **kwargs}, names, who)


def _with(values: dict, names: Iterable[str], who: str) -> dict:
    """Return values that contain all of `names`. Raises: RejectedError for a missing one."""
    missing = [n for n in names if n not in values]
    if missing:
        raise RejectedError(f"{who} without {', '.join(missing)}")
    return values


def _ours(values: dict, where: str = "") -> dict:
    """Remove the arguments whose only accepted value is built into our networks."""
    built_in = FIXED + (("activation",) if where in BUILT_IN_ACTIVATION else ())
    return {k: _ours(v, k) if isinstance(v, dict) else v for k, v in values.items() if k not in built_in}


def generator_plan(module: ModuleRecord, name: str) -> "Plan":
    """Plan a generator of the family that its tensors show, with the plane layout of its renderer.

    Raises: RejectedError for another class, unknown names, implausible values, and unknown plane axes.
    """
    check_class(module.class_name)
    records = tensors(module, name)
    # EG3D's training adds this buffer
    records.pop("dataset_label_std", None)
    kwargs = _arguments(module, G_NAMES, "a generator")
    rendering_arguments = kwargs.pop("rendering_kwargs", {})
    # The attribute may have changed since the constructor ran, and counts.
    rendering = json_values(module.state.get("rendering_kwargs", rendering_arguments))
    check(kwargs, G_OPTIONS, "")
    if not isinstance(rendering, dict):
        raise RejectedError(f"rendering_kwargs that are {describe(rendering)}")
    # Only shapes are used; no tensor is read yet.
    kind = kind_of(module.class_name, {key: value.shape for key, value in records.items()}, rendering)
    required = {**RENDERING, **kind.rendering}
    # old checkpoints lack clamp_mode
    _with(rendering, [k for k in required if k != "clamp_mode"], "rendering_kwargs")
    accepted = {**required, **OPTIONAL_RENDERING, **kind.optional}
    check({k: v for k, v in rendering.items() if k in accepted}, accepted, "rendering_kwargs.")
    layout = {"plane_layout": plane_layout(module, kind)} if kind.layouts else {}
    return Plan(
        kind.cls, {**_ours(kwargs), "rendering_kwargs": rendering, **layout}, records, kind.architecture
    )


def _inside(module: ModuleRecord, part: str, name: str) -> Any:
    """Return a buffer or submodule of a module, or None."""
    children = module.state.get(part)
    return children.get(name) if isinstance(children, dict) else None


def plane_layout(module: ModuleRecord, kind: Kind) -> str:
    """Determine the plane layout from renderer.plane_axes. Raises: RejectedError for unknown axes, or
    none.
    """
    renderer = _inside(module, "_modules", "renderer")
    # A plain attribute of EG3D's renderer, not a buffer.
    axes = (
        renderer.state.get("plane_axes")
        if isinstance(renderer, ModuleRecord) and renderer.state is not None
        else None
    )
    if not isinstance(axes, TensorRecord) or axes.shape != (3, 3, 3):
        raise RejectedError("a generator whose renderer carries no plane_axes [3, 3, 3]")
    value = axes.tensor().to(torch.float32)
    # Bitwise comparison with the bases of each known layout.
    for layout in kind.layouts:
        if torch.equal(value, generate_planes(layout)):
            return layout
    raise RejectedError(f"plane_axes of no layout of {kind.architecture} ({', '.join(kind.layouts)})")


def neural_rendering_resolution(module: ModuleRecord) -> int:
    """Return the resolution that the generator last rendered at; EG3D's default is 64. Raises:
    RejectedError.
    """
    value = module.state.get("neural_rendering_resolution", 64)
    if type(value) is not int or not 1 <= value <= 4096:
        raise RejectedError(
            f"neural_rendering_resolution = {describe(value)} instead of a whole number of 1 to 4096"
        )
    return value


# Bytes by which tensors may exceed the size of the file, because small ones may share a storage.
SLACK = 1 << 24


@dataclasses.dataclass(frozen=True)
class Plan:
    """A network that has been checked but not built."""

    cls: type[torch.nn.Module]
    kwargs: dict
    tensors: dict[str, TensorRecord]
    architecture: str = networks.EG3D

    def build(self) -> torch.nn.Module:
        """Build the network with the tensors of the file."""
        # The arguments have passed all checks at this point.
        module = self.cls(**self.kwargs)
        module.load_state_dict({k: v.tensor() for k, v in self.tensors.items()}, strict=True)
        return module


def load(
    path: str | Path, device: str | torch.device = "cpu", freeze_layers: int | None = None
) -> networks.Networks:
    """Read an EG3D pickle (network-snapshot-*.pkl, ffhq512-128.pkl, ...) without running code in it.

    Args:
        freeze_layers: as in `training.networks.load`.
    Returns: as `training.networks.load`. `training_set` contains 'options' (training_set_kwargs), 'label_std'
    (dataset_label_std of G_ema) and 'augment' ('options' and 'p' of ADA) if the file has them. Such files do
    not contain cur_nimg, so it is 0.
    Raises: FileNotFoundError; ValueError, in one line, for any file that is no such pickle, with missing and
    unexpected names and wrong shapes.
    """
    return rebuild(read(path), freeze_layers).to(device)


def rebuild(snapshot: Snapshot, freeze_layers: int | None = None) -> networks.Networks:
    """Build the networks of a snapshot, see `load`."""
    plans = plan(snapshot, freeze_layers)
    built: dict[str, Any] = {name: p.build() for name, p in plans.items()}
    with reporting_rejection(snapshot.who):
        # Not part of the state dict; EG3D stores it as an attribute.
        for name in built.keys() - {"D"}:
            built[name].neural_rendering_resolution = neural_rendering_resolution(snapshot.networks[name])
        training_set = _training_set(snapshot)
    for name, module in built.items():
        # G and D are in training mode, as in a run
        module.train(name != "G_ema").requires_grad_(False)
    D_kwargs = plans["D"].kwargs if "D" in plans else None
    G_kwargs = plans["G_ema"].kwargs
    name = plans["G_ema"].architecture
    return networks.Networks(
        built.get("G"), built.get("D"), built["G_ema"], G_kwargs, D_kwargs, training_set, architecture=name
    )


def plan(snapshot: Snapshot, freeze_layers: int | None = None) -> dict[str, Plan]:
    """Check every network of a snapshot against the architecture that it claims, before memory is allocated.

    Raises: ValueError, in one line.
    """
    with reporting_rejection(snapshot.who):
        if "G_ema" not in snapshot.networks:
            raise RejectedError("a file without G_ema")
        plans: dict[str, Plan] = {}
        for name in ("G_ema", "G"):
            if (module := snapshot.networks.get(name)) is not None:
                neural_rendering_resolution(module)
                plans[name] = generator_plan(module, name)
        # G_ema is a moving average of G, so both must have one architecture.
        if "G" in plans and plans["G"].kwargs != plans["G_ema"].kwargs:
            ema_arguments = plans["G_ema"].kwargs
            g_arguments = plans["G"].kwargs
            differing = sorted(
                k for k in {**ema_arguments, **g_arguments} if ema_arguments.get(k) != g_arguments.get(k)
            )
            raise RejectedError(f"G and G_ema that differ in {', '.join(differing)}")
        D = snapshot.networks.get("D")
        if D is not None and D.class_name != "DualDiscriminator":
            print(
                f"Warning: {snapshot.who}: D of class {describe(D.class_name)} is ignored; only a"
                " DualDiscriminator is read.",
                file=sys.stderr,
            )
        elif D is not None:
            kwargs = _arguments(D, D_NAMES, "a discriminator")
            check(kwargs, D_OPTIONS, "")
            kwargs = _ours(kwargs)
            # Transfer learning: the caller's value replaces the one in the file.
            if freeze_layers is not None:
                kwargs["block_kwargs"] = {**kwargs.get("block_kwargs", {}), "freeze_layers": freeze_layers}
            plans["D"] = Plan(DualDiscriminator, kwargs, tensors(D, "D"))
        # Tensors are views of storages in the file, so their total size is about that of the file.
        total = sum(t.nbytes for p in plans.values() for t in p.tensors.values())
        if total > snapshot.size + SLACK:
            raise RejectedError(f"tensors of {total} bytes in a file of {snapshot.size}")
    for name, planned in plans.items():
        _check_shapes(planned, f"{snapshot.who} ({name})")
    return plans


def _check_shapes(planned: Plan, who: str) -> None:
    """Build a network on the meta device, where no memory is allocated, and compare names and shapes.

    Raises: ValueError if the arguments make no network, or another one than the tensors belong to.
    """
    try:
        with torch.device("meta"):
            module = planned.cls(**planned.kwargs)
    # sizes that torch cannot count, or layers without channels
    except (RuntimeError, ZeroDivisionError) as error:
        reason = shorten(str(error))
        raise ValueError(
            f"{who}: expected a network of possible size, got {reason}. Download the file again from"
            " its source."
        ) from None
    except ValueError as error:
        raise ValueError(f"{who}: {error}") from None
    kinds = sorted(
        {str(t.storage.dtype) for t in planned.tensors.values() if not t.storage.dtype.is_floating_point}
    )
    if kinds:
        raise ValueError(
            f"{who}: expected floating-point tensors, got {', '.join(kinds)}. Download the file again"
            " from its source."
        )
    if any(math.prod(t.shape) > 1 << 40 for t in planned.tensors.values()):
        raise ValueError(
            f"{who}: expected tensors of at most 2^40 elements, got a larger one. Download the file again"
            " from its source."
        )
    # Constant buffers such as filters are real even under the meta device, so their device has to match.
    state = {k: (v.shape, v.device) for k, v in module.state_dict().items()}
    # Names and shapes that do not match stay on the meta device; `load_strict` lists them all in one error.
    like = {
        k: state[k][1] if k in state and state[k][0] == t.shape else "meta"
        for k, t in planned.tensors.items()
    }
    storage.load_strict(
        module, {k: torch.empty(t.shape, device=like[k]) for k, t in planned.tensors.items()}, who
    )


def _training_set(snapshot: Snapshot) -> dict:
    """Return the description of the dataset in the file, see `load`. Raises: RejectedError."""
    options_of_file = snapshot.training_set
    path = options_of_file.get("path")
    described: dict = {
        "name": Path(path).stem if isinstance(path, str) else "",
        "resolution": options_of_file.get("resolution"),
    }
    if options_of_file:
        described["options"] = dict(options_of_file)
    # Standard deviation of the camera labels, which training adds to G.
    std = _inside(snapshot.networks["G_ema"], "_buffers", "dataset_label_std")
    if std is not None:
        if not isinstance(std, TensorRecord) or len(std.shape) != 1 or std.nbytes > 1 << 16:
            raise RejectedError("a dataset_label_std that is no vector")
        described["label_std"] = json_values([float(v) for v in std.tensor()])
    if snapshot.augment_pipe is not None:  # ADA's augmentation
        p = _inside(snapshot.augment_pipe, "_buffers", "p")
        if not isinstance(p, TensorRecord) or p.shape != ():
            raise RejectedError("an augment_pipe without its probability p")
        if not math.isfinite(value := float(p.tensor())):
            raise RejectedError(f"an augment_pipe with p = {value}")
        options = json_values(snapshot.augment_pipe.state.get("_init_kwargs", {}))
        described["augment"] = {
            "class_name": snapshot.augment_pipe.class_name,
            "options": options,
            "p": value,
        }
    return described
