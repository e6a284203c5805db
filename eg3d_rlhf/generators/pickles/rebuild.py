"""Construction of networks from a snapshot of EG3D.

A network is built from the constructor arguments in the file. The name and the value of each argument are
checked before. Then the tensors are copied into the network by their names.
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

# Tables of the constructor arguments and rendering options that a pickled network may have, with the
# accepted values.

# (predicate that returns True for accepted values, description of the accepted values for messages)
Check = tuple[Callable[[Any], bool], str]


def integer_in(low: int, high: int) -> Check:
    """Return a check that accepts integers from `low` to `high`, but not True and False."""
    return lambda v: type(v) is int and low <= v <= high, f"an integer from {low} to {high}"


def or_none(check: Check) -> Check:
    """Return a check that accepts None and the values that `check` accepts."""
    return lambda v: v is None or check[0](v), f"{check[1]} or None"


def one_of(*values: Any) -> Check:
    """Return a check that accepts exactly these values. Types are compared, too, because 1 == True in
    Python.
    """
    return (
        lambda v: any(type(v) is type(allowed_value) and v == allowed_value for allowed_value in values),
        " or ".join(repr(allowed_value) for allowed_value in values),
    )


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
# Arguments with a single accepted value. Our networks have this value built in, and no such argument.
FIXED = ("architecture", "resample_filter")
# Groups of arguments in which `activation` is such an argument, too. "" is the group of the network itself.
BUILT_IN_ACTIVATION = ("sr_kwargs", "block_kwargs", "epilogue_kwargs", "")

RAY_LIMIT = (lambda v: v == "auto" or NUMBER[0](v), "a number or 'auto'")
POSITIVE = (lambda v: type(v) in (int, float) and 0 < v < 1e6, "a number above 0")
RENDERING = {  # options that are required; options outside both tables are not checked
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
    """Check constructor arguments or options.

    Args:
        values: arguments by name.
        table: a `Check` by name, or a table for an argument that is a dictionary itself.
        where: start of the full name in messages, such as "mapping_kwargs.".
    Raises: RejectedError for the first name outside the table, or the first value that is not accepted.
    """
    for name, value in values.items():
        # `shorten` also escapes control characters, which must not reach the terminal.
        full_name = f"{where}{shorten(name)}"
        # An unknown argument might change the architecture, so it is not ignored.
        if name not in table:
            raise RejectedError(f"it has the unknown constructor argument {full_name}")
        rule = table[name]
        if isinstance(rule, dict):
            if not isinstance(value, dict):
                raise RejectedError(f"its {full_name} is {describe(value)} instead of a dictionary")
            check(value, rule, f"{full_name}.")
            continue
        is_accepted, accepted_values = rule
        if not is_accepted(value):
            raise RejectedError(f"its {full_name} is {describe(value)} instead of {accepted_values}")


# The family of a generator is determined from the names and shapes of its tensors. Its class in our code and
# its options follow from the family. The class name in the file is not sufficient, because released files of
# different families have the same class name.

RENDER_MODE = "TriPlane_SingSph_flatten"  # the only published value of the option render_mode (HyPlaneHead)
_PLANES = 3  # number of planes
_CHANNELS = 32  # number of channels of a plane


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kind:
    """Properties of the pickled networks of one family."""

    architecture: str  # name of the family in our network files
    cls: Any  # class of the network in our code
    class_names: tuple[str, ...]  # possible class names of the generator in pickles
    layouts: tuple[str, ...]  # possible plane layouts of the renderer; empty: the family has no plane axes
    rendering: dict  # checks of required rendering options, in addition to `RENDERING`
    optional: dict = dataclasses.field(default_factory=dict)  # checks of options that may be missing


_HEAD = {
    "triplane_size": integer_in(4, 4096),
    "triplane_depth": integer_in(1, 64),
    "decoder_activation": one_of(*ACTIVATIONS),
    "use_torgb_raw": FLAG,
    "use_background": FLAG,
}
# Options that only the conversions of this project write.
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
    class_names = [name for kind in KINDS for name in kind.class_names]
    if class_name not in class_names:
        # dict.fromkeys removes repetitions: several families have the same class name.
        known_classes = " or ".join(map(repr, dict.fromkeys(class_names)))
        raise RejectedError(f"its generator has the class {describe(class_name)} instead of {known_classes}")


def family_of(class_name: str, shapes: dict[str, tuple[int, ...]], rendering: dict) -> Kind:
    """Determine the family of a generator from the names and shapes of its tensors.

    SphereHead has a second stack of convolutions ("ConvA"). PanoHead and HyPlaneHead have a network for the
    camera ("t_mapping"), EG3D has none. The backbone of HyPlaneHead has 32 output channels, the backbone of
    PanoHead has 96 for each slice.

    Args:
        class_name: class name of the generator in the file.
        shapes: name -> shape of each tensor in its state dict.
        rendering: its rendering options.
    Raises: RejectedError if the class name contradicts the tensors, or for other numbers of channels or an
        unknown option render_mode.
    """
    output_layers = [
        name for name in shapes if name.startswith("backbone.synthesis.b") and name.endswith(".torgb.weight")
    ]
    # The layer of the highest resolution. The key (length, name) sorts "b64" before "b128".
    last_layer = max(output_layers, key=lambda name: (len(name), name), default="")
    # The first axis of a convolution's weight is its number of output channels.
    channels = shapes[last_layer][0] if last_layer and shapes[last_layer] else 0
    if "ConvA.0.weight" in shapes:
        kind = SPHEREHEAD
    elif not any(name.startswith("t_mapping.") for name in shapes):
        kind = EG3D
    elif "render_mode" in rendering and rendering["render_mode"] != RENDER_MODE:
        raise RejectedError(
            f"its render_mode is {describe(rendering['render_mode'])} instead of {RENDER_MODE!r}"
        )
    elif channels == _CHANNELS and "render_mode" in rendering:
        kind = HYPLANEHEAD
    elif channels and channels % (_PLANES * _CHANNELS) == 0:
        kind = PANOHEAD
    else:
        raise RejectedError(
            f"its generator has the tensors of a full-head generator, but a backbone with {channels} output"
            " channels"
        )
    if class_name not in kind.class_names:
        raise RejectedError(
            f"its generator has the class {describe(class_name)}, but the tensors of {kind.architecture}"
        )
    return kind


G_NAMES = ("z_dim", "c_dim", "w_dim", "img_resolution", "img_channels")  # constructor arguments by position
D_NAMES = ("c_dim", "img_resolution", "img_channels")


def _arguments(module: ModuleRecord, names: tuple[str, ...], who: str) -> dict:
    """Return the constructor arguments of a module by name.

    EG3D's pickles contain positional arguments (_init_args) and keyword arguments (_init_kwargs).

    Args:
        module: record of the module.
        names: names of the positional arguments in order. All of them must be present.
        who: name of the network in messages.
    Raises: RejectedError for a missing argument, or for values that are no JSON values.
    """
    args = json_values(module.state.get("_init_args", ()))
    kwargs = json_values(module.state.get("_init_kwargs", {}))
    if not isinstance(args, list) or not isinstance(kwargs, dict) or len(args) > len(names):
        raise RejectedError(f"its constructor arguments are {describe(args)} and {describe(kwargs)}")
    # strict=False: the other arguments are keyword arguments.
    return _with({**dict(zip(names, args, strict=False)), **kwargs}, names, who)


def _with(values: dict, names: Iterable[str], who: str) -> dict:
    """Return `values` unchanged. Raises: RejectedError, which begins with `who`, if one of `names`
    is missing.
    """
    missing_names = [name for name in names if name not in values]
    if missing_names:
        raise RejectedError(f"its {who} has no {', '.join(missing_names)}")
    return values


def _without_built_in(values: dict, group: str = "") -> dict:
    """Remove the constructor arguments that our networks do not have, because their value is built in.

    Args: values: checked arguments by name; group: name of the argument that `values` is the value of, or "".
    """
    built_in_names = FIXED + (("activation",) if group in BUILT_IN_ACTIVATION else ())
    supported = {}
    for name, value in values.items():
        if name not in built_in_names:
            supported[name] = _without_built_in(value, name) if isinstance(value, dict) else value
    return supported


def generator_plan(module: ModuleRecord, name: str) -> "Plan":
    """Check a pickled generator and plan its construction, without building it.

    Args: module: record of the generator; name: "G" or "G_ema".
    Raises: RejectedError for another class, unknown names of arguments, values that are not accepted, or
        unknown plane axes.
    """
    check_class(module.class_name)
    records = tensors(module, name)
    # EG3D's training adds this buffer, which the class of the network does not have.
    records.pop("dataset_label_std", None)
    kwargs = _arguments(module, G_NAMES, "generator")
    rendering_arguments = kwargs.pop("rendering_kwargs", {})
    # Training may change the attribute after the constructor has run. The renderer uses the attribute.
    rendering = json_values(module.state.get("rendering_kwargs", rendering_arguments))
    check(kwargs, G_OPTIONS, "")
    if not isinstance(rendering, dict):
        raise RejectedError(f"its rendering_kwargs are {describe(rendering)} instead of a dictionary")
    shapes = {key: record.shape for key, record in records.items()}
    kind = family_of(module.class_name, shapes, rendering)
    required_checks = {**RENDERING, **kind.rendering}
    # Old checkpoints have no clamp_mode. Their rendering is that of the only accepted value.
    _with(rendering, [key for key in required_checks if key != "clamp_mode"], "rendering_kwargs")
    all_checks = {**required_checks, **OPTIONAL_RENDERING, **kind.optional}
    checked_options = {key: value for key, value in rendering.items() if key in all_checks}
    check(checked_options, all_checks, "rendering_kwargs.")
    layout = {"plane_layout": plane_layout(module, kind)} if kind.layouts else {}
    all_kwargs = {**_without_built_in(kwargs), "rendering_kwargs": rendering, **layout}
    return Plan(kind.cls, all_kwargs, records, kind.architecture)


def _inside(module: ModuleRecord, part_name: str, name: str) -> Any:
    """Return a buffer or submodule of a module, or None if the module has none of this name.

    Args: part_name: "_buffers" or "_modules"; name: name of the buffer or submodule.
    """
    children = module.state.get(part_name)
    return children.get(name) if isinstance(children, dict) else None


def plane_layout(module: ModuleRecord, kind: Kind) -> str:
    """Determine the name of the plane layout from the tensor plane_axes of the renderer.

    Raises: RejectedError if the tensor is missing or belongs to none of the layouts of the family.
    """
    renderer = _inside(module, "_modules", "renderer")
    # plane_axes is an ordinary attribute of EG3D's renderer, not a buffer.
    axes = (
        renderer.state.get("plane_axes")
        if isinstance(renderer, ModuleRecord) and renderer.state is not None
        else None
    )
    if not isinstance(axes, TensorRecord) or axes.shape != (3, 3, 3):
        raise RejectedError("its generator has a renderer without plane_axes [3, 3, 3]")
    value = axes.tensor().to(torch.float32)
    # Axes of a layout are permutations, so they have to be exactly equal.
    for layout in kind.layouts:
        if torch.equal(value, generate_planes(layout)):
            return layout
    raise RejectedError(
        f"its plane_axes belong to no plane layout of the family {kind.architecture}"
        f" ({', '.join(kind.layouts)})"
    )


def neural_rendering_resolution(module: ModuleRecord) -> int:
    """Return the resolution of volume rendering at the end of the training, in pixels per edge.

    The result is EG3D's default of 64 if the file does not contain the resolution.

    Raises: RejectedError for a value outside 1 to 4096.
    """
    value = module.state.get("neural_rendering_resolution", 64)
    if type(value) is not int or not 1 <= value <= 4096:
        raise RejectedError(
            f"its neural_rendering_resolution is {describe(value)} instead of an integer from 1 to 4096"
        )
    return value


# Number of bytes by which the total size of tensors may exceed the size of the file, because several small
# tensors may share a storage.
SLACK = 1 << 24


@dataclasses.dataclass(frozen=True)
class Plan:
    """A network whose arguments have been checked, but which has not been built yet."""

    cls: type[torch.nn.Module]  # class of the network
    kwargs: dict  # constructor arguments
    tensors: dict[str, TensorRecord]  # name in the state dict -> tensor in the file
    architecture: str = networks.EG3D  # name of the family

    def build(self) -> torch.nn.Module:
        """Build the network and copy the tensors of the file into it."""
        module = self.cls(**self.kwargs)
        module.load_state_dict({name: record.tensor() for name, record in self.tensors.items()}, strict=True)
        return module


def load(
    path: str | Path, device: str | torch.device = "cpu", freeze_layers: int | None = None
) -> networks.Networks:
    """Read an EG3D pickle, such as network-snapshot-*.pkl or ffhq512-128.pkl, without running code from it.

    Args:
        path: path of the file.
        device: device of the networks.
        freeze_layers: number of first layers of D that stay frozen; None: the value in the file.
    Returns: the networks, as from `training.networks.load`. If the file contains them, `training_set` has the
        entries 'options' (training_set_kwargs), 'label_std' (dataset_label_std of G_ema) and 'augment'
        ('options' and 'p' of ADA). EG3D's files do not contain the number of images, so cur_nimg is 0.
    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no network pickle of EG3D, or its tensors do not fit its arguments. The
            message is one line.
    """
    return rebuild(read(path), freeze_layers).to(device)


def rebuild(snapshot: Snapshot, freeze_layers: int | None = None) -> networks.Networks:
    """Build the networks of a snapshot, see `load` for arguments, result and errors."""
    plans = plan(snapshot, freeze_layers)
    built_modules: dict[str, Any] = {name: network_plan.build() for name, network_plan in plans.items()}
    with reporting_rejection(snapshot.who):
        # The resolution is an attribute of the generators in EG3D, not part of the state dict.
        for name in built_modules.keys() - {"D"}:
            built_modules[name].neural_rendering_resolution = neural_rendering_resolution(
                snapshot.networks[name]
            )
        training_set = _training_set(snapshot)
    for name, module in built_modules.items():
        # G and D are in training mode, and G_ema is in eval mode, as in a training run.
        module.train(name != "G_ema").requires_grad_(False)
    D_kwargs = plans["D"].kwargs if "D" in plans else None
    G_kwargs = plans["G_ema"].kwargs
    name = plans["G_ema"].architecture
    return networks.Networks(
        built_modules.get("G"),
        built_modules.get("D"),
        built_modules["G_ema"],
        G_kwargs,
        D_kwargs,
        training_set,
        architecture=name,
    )


def plan(snapshot: Snapshot, freeze_layers: int | None = None) -> dict[str, Plan]:
    """Check the arguments and the tensors of every network of a snapshot, before memory is allocated.

    Args: freeze_layers: number of first layers of D that stay frozen; None: the value in the file.
    Returns: name ("G", "D" or "G_ema") -> plan of the network.
    Raises: ValueError with a message of one line.
    """
    with reporting_rejection(snapshot.who):
        if "G_ema" not in snapshot.networks:
            raise RejectedError("it contains no G_ema")
        plans: dict[str, Plan] = {}
        for name in ("G_ema", "G"):
            if (module := snapshot.networks.get(name)) is not None:
                # Only for its check; `rebuild` sets the resolution.
                neural_rendering_resolution(module)
                plans[name] = generator_plan(module, name)
        # G_ema is a moving average of G, so both must have the same architecture.
        if "G" in plans and plans["G"].kwargs != plans["G_ema"].kwargs:
            ema_arguments = plans["G_ema"].kwargs
            g_arguments = plans["G"].kwargs
            differing_names = sorted(
                name
                for name in {**ema_arguments, **g_arguments}
                if ema_arguments.get(name) != g_arguments.get(name)
            )
            raise RejectedError(f"its G and G_ema differ in {', '.join(differing_names)}")
        D = snapshot.networks.get("D")
        if D is not None and D.class_name != "DualDiscriminator":
            print(
                f"Warning: {snapshot.who}: the discriminator is ignored, because its class is"
                f" {describe(D.class_name)} and not DualDiscriminator.",
                file=sys.stderr,
            )
        elif D is not None:
            kwargs = _arguments(D, D_NAMES, "discriminator")
            check(kwargs, D_OPTIONS, "")
            kwargs = _without_built_in(kwargs)
            # In transfer learning, the caller's value replaces the value in the file.
            if freeze_layers is not None:
                kwargs["block_kwargs"] = {**kwargs.get("block_kwargs", {}), "freeze_layers": freeze_layers}
            plans["D"] = Plan(DualDiscriminator, kwargs, tensors(D, "D"))
        # Tensors are views of storages in the file, so their total size cannot exceed the file's by much.
        total_bytes = sum(
            record.nbytes for network_plan in plans.values() for record in network_plan.tensors.values()
        )
        if total_bytes > snapshot.size + SLACK:
            raise RejectedError(f"its tensors have {total_bytes} bytes, but the file has {snapshot.size}")
    for name, network_plan in plans.items():
        _check_shapes(network_plan, f"{snapshot.who} ({name})")
    return plans


def _check_shapes(network_plan: Plan, who: str) -> None:
    """Build a network on the meta device, where no memory is allocated, and compare names and shapes.

    Args: network_plan: plan of the network; who: file and network, for messages.
    Raises: ValueError if no network can be built from the arguments, or if its tensors have other names or
        shapes than the tensors of the file.
    """
    try:
        with torch.device("meta"):
            module = network_plan.cls(**network_plan.kwargs)
    # torch raises these errors for sizes that overflow, and for layers without channels.
    except (RuntimeError, ZeroDivisionError) as error:
        reason = shorten(str(error))
        raise ValueError(
            f"{who}: the network cannot be built from its constructor arguments: {reason}. Download the file"
            " again from its source."
        ) from None
    except ValueError as error:
        raise ValueError(f"{who}: {error}") from None
    records = network_plan.tensors
    dtypes = {record.storage.dtype for record in records.values()}
    other_dtypes = sorted(str(dtype) for dtype in dtypes if not dtype.is_floating_point)
    if other_dtypes:
        raise ValueError(
            f"{who}: expected floating-point tensors, got {', '.join(other_dtypes)}. Download the file again"
            " from its source."
        )
    for name, record in records.items():
        if math.prod(record.shape) > 1 << 40:
            raise ValueError(
                f"{who}: expected tensors of at most 2^40 elements, got {list(record.shape)} for"
                f" {shorten(name)}. Download the file again from its source."
            )
    # Empty tensors take the place of the file's tensors. Constant buffers such as filters are on the CPU
    # even within `torch.device("meta")`, so each empty tensor is created on the device of its counterpart.
    # A tensor with another name or shape is created on the meta device; `load_strict` lists all of these
    # in one error.
    state = module.state_dict()
    placeholders = {}
    for name, record in records.items():
        is_match = name in state and state[name].shape == record.shape
        device = state[name].device if is_match else torch.device("meta")
        placeholders[name] = torch.empty(record.shape, device=device)
    storage.load_strict(module, placeholders, who)


def _training_set(snapshot: Snapshot) -> dict:
    """Return the entry `training_set` of our network files for a snapshot, see `load`.

    Raises: RejectedError for values of another type.
    """
    options_of_file = snapshot.training_set
    path = options_of_file.get("path")
    description: dict = {
        "name": Path(path).stem if isinstance(path, str) else "",
        "resolution": options_of_file.get("resolution"),
    }
    if options_of_file:
        description["options"] = dict(options_of_file)
    # Standard deviation of the camera labels, a buffer that EG3D's training adds to G.
    label_std = _inside(snapshot.networks["G_ema"], "_buffers", "dataset_label_std")
    if label_std is not None:
        # 2^16 bytes are far more than a camera label needs.
        is_vector = isinstance(label_std, TensorRecord) and len(label_std.shape) == 1
        if not is_vector or label_std.nbytes > 1 << 16:
            raise RejectedError("its dataset_label_std is not a vector of at most 65536 bytes")
        description["label_std"] = json_values([float(value) for value in label_std.tensor()])
    if snapshot.augment_pipe is not None:
        probability_record = _inside(snapshot.augment_pipe, "_buffers", "p")
        if not isinstance(probability_record, TensorRecord) or probability_record.shape != ():
            raise RejectedError("its augment_pipe has no augmentation probability p")
        probability = float(probability_record.tensor())
        if not math.isfinite(probability):
            raise RejectedError(f"its augment_pipe has the augmentation probability p = {probability}")
        options = json_values(snapshot.augment_pipe.state.get("_init_kwargs", {}))
        description["augment"] = {
            "class_name": snapshot.augment_pipe.class_name,
            "options": options,
            "p": probability,
        }
    return description
