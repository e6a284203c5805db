"""Construction of networks from a snapshot of EG3D.

The name and the value of each constructor argument in the file are checked. Then the network is built with
these arguments, and the tensors of the file are copied into it by their names.
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
    """Return a check that accepts exactly these values, with exactly these types.

    Types are compared, too, because 1 == True in Python.
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


def check(arguments: dict, check_by_name: dict, name_prefix: str) -> None:
    """Check that the names and values of constructor arguments or options are accepted.

    Args:
        arguments: arguments by name.
        check_by_name: a `Check` by name, or a table for an argument that is a dictionary itself.
        name_prefix: start of the full name in messages, such as "mapping_kwargs.".
    Raises: RejectedError for the first name outside the table, or the first value that is not accepted.
    """
    for argument_name, argument in arguments.items():
        # `shorten` also escapes control characters, which must not reach the terminal.
        full_name = f"{name_prefix}{shorten(argument_name)}"
        # An unknown argument might change the architecture, so it is not ignored.
        if argument_name not in check_by_name:
            raise RejectedError(f"it has the unknown constructor argument {full_name}")
        argument_check = check_by_name[argument_name]
        if isinstance(argument_check, dict):
            if not isinstance(argument, dict):
                raise RejectedError(f"its {full_name} is {describe(argument)} instead of a dictionary")
            check(argument, argument_check, f"{full_name}.")
            continue
        is_accepted, accepted_values = argument_check
        if not is_accepted(argument):
            raise RejectedError(f"its {full_name} is {describe(argument)} instead of {accepted_values}")


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
    class_names = [known_name for family in KINDS for known_name in family.class_names]
    if class_name not in class_names:
        # dict.fromkeys removes repetitions: several families have the same class name.
        known_classes = " or ".join(map(repr, dict.fromkeys(class_names)))
        raise RejectedError(f"its generator has the class {describe(class_name)} instead of {known_classes}")


def family_of(class_name: str, shape_by_name: dict[str, tuple[int, ...]], rendering_options: dict) -> Kind:
    """Determine the family of a generator from the names and shapes of its tensors.

    SphereHead has a second stack of convolutions ("ConvA"). PanoHead and HyPlaneHead have a network for the
    camera ("t_mapping"), EG3D has none. The backbone of HyPlaneHead has 32 output channels, the backbone of
    PanoHead has 96 for each slice.

    Args:
        class_name: class name of the generator in the file.
        shape_by_name: name -> shape of each tensor in the state dict of the generator.
        rendering_options: rendering options of the generator.
    Returns: the properties of the family.
    Raises: RejectedError if the class name contradicts the tensors, if the backbone has another number of
        output channels, or if the option render_mode is unknown.
    """
    output_layers = [
        tensor_name
        for tensor_name in shape_by_name
        if tensor_name.startswith("backbone.synthesis.b") and tensor_name.endswith(".torgb.weight")
    ]
    # The layer of the highest resolution. The key (length, name) sorts "b64" before "b128".
    last_layer = max(output_layers, key=lambda tensor_name: (len(tensor_name), tensor_name), default="")
    # The first axis of a convolution's weight is its number of output channels.
    channel_count = shape_by_name[last_layer][0] if last_layer and shape_by_name[last_layer] else 0
    if "ConvA.0.weight" in shape_by_name:
        family = SPHEREHEAD
    elif not any(tensor_name.startswith("t_mapping.") for tensor_name in shape_by_name):
        family = EG3D
    elif "render_mode" in rendering_options and rendering_options["render_mode"] != RENDER_MODE:
        raise RejectedError(
            f"its render_mode is {describe(rendering_options['render_mode'])} instead of {RENDER_MODE!r}"
        )
    elif channel_count == _CHANNELS and "render_mode" in rendering_options:
        family = HYPLANEHEAD
    elif channel_count and channel_count % (_PLANES * _CHANNELS) == 0:
        family = PANOHEAD
    else:
        raise RejectedError(
            f"its generator has the tensors of a full-head generator, but a backbone with {channel_count}"
            " output channels"
        )
    if class_name not in family.class_names:
        raise RejectedError(
            f"its generator has the class {describe(class_name)}, but the tensors of {family.architecture}"
        )
    return family


G_NAMES = ("z_dim", "c_dim", "w_dim", "img_resolution", "img_channels")  # constructor arguments by position
D_NAMES = ("c_dim", "img_resolution", "img_channels")
D_CLASS = "DualDiscriminator"  # the only class of discriminators that is read


def _arguments(module_record: ModuleRecord, positional_names: tuple[str, ...], who: str) -> dict:
    """Return the constructor arguments of a module by name.

    EG3D's pickles contain positional arguments (_init_args) and keyword arguments (_init_kwargs).

    Args:
        module_record: record of the module.
        positional_names: names of the positional arguments in order. All of them must be present.
        who: name of the network in messages.
    Raises: RejectedError for a missing argument, or for values that are no JSON values.
    """
    positional_arguments = json_values(module_record.state.get("_init_args", ()))
    keyword_arguments = json_values(module_record.state.get("_init_kwargs", {}))
    if not isinstance(positional_arguments, list) or not isinstance(keyword_arguments, dict):
        raise RejectedError(
            f"its {who} has the constructor arguments {describe(positional_arguments)} and"
            f" {describe(keyword_arguments)} instead of a list and a dictionary"
        )
    if len(positional_arguments) > len(positional_names):
        raise RejectedError(
            f"its {who} has {len(positional_arguments)} positional constructor arguments instead of at most"
            f" {len(positional_names)}"
        )
    # strict=False: the other arguments are keyword arguments.
    return _with(
        {**dict(zip(positional_names, positional_arguments, strict=False)), **keyword_arguments},
        positional_names,
        who,
    )


def _with(arguments: dict, required_names: Iterable[str], who: str) -> dict:
    """Return `arguments` unchanged, after a check that none of the required names is missing.

    Args:
        arguments: arguments or options by name.
        required_names: names that must be present.
        who: owner of the arguments in messages, such as "generator".
    Raises: RejectedError if a required name is missing.
    """
    missing_names = [required_name for required_name in required_names if required_name not in arguments]
    if missing_names:
        raise RejectedError(f"its {who} has no {', '.join(missing_names)}")
    return arguments


def _without_built_in(arguments: dict, group_name: str = "") -> dict:
    """Remove the constructor arguments that our networks do not have, because their value is built in.

    Args:
        arguments: checked arguments by name.
        group_name: name of the dictionary that contains the arguments, such as "block_kwargs"; "" for the
            arguments of the network itself.
    """
    built_in_names = FIXED + (("activation",) if group_name in BUILT_IN_ACTIVATION else ())
    supported_arguments = {}
    for argument_name, argument in arguments.items():
        if argument_name not in built_in_names:
            supported_arguments[argument_name] = (
                _without_built_in(argument, argument_name) if isinstance(argument, dict) else argument
            )
    return supported_arguments


def generator_plan(module_record: ModuleRecord, network_name: str) -> "Plan":
    """Check a pickled generator and plan its construction, without building it.

    Args: module_record: record of the generator; network_name: "G" or "G_ema".
    Raises: RejectedError for another class, unknown names of arguments, values that are not accepted, or
        unknown plane axes.
    """
    check_class(module_record.class_name)
    record_by_name = tensors(module_record, network_name)
    # EG3D's training adds this buffer, which the class of the network does not have.
    record_by_name.pop("dataset_label_std", None)
    arguments = _arguments(module_record, G_NAMES, "generator")
    rendering_arguments = arguments.pop("rendering_kwargs", {})
    # Training may change the attribute after the constructor has run. The renderer uses the attribute.
    rendering_options = json_values(module_record.state.get("rendering_kwargs", rendering_arguments))
    check(arguments, G_OPTIONS, "")
    if not isinstance(rendering_options, dict):
        raise RejectedError(f"its rendering_kwargs are {describe(rendering_options)} instead of a dictionary")
    shape_by_name = {
        tensor_name: tensor_record.shape for tensor_name, tensor_record in record_by_name.items()
    }
    family = family_of(module_record.class_name, shape_by_name, rendering_options)
    required_checks = {**RENDERING, **family.rendering}
    # Old checkpoints have no clamp_mode. Their rendering is that of the only accepted value.
    _with(
        rendering_options,
        [option_name for option_name in required_checks if option_name != "clamp_mode"],
        "rendering_kwargs",
    )
    all_checks = {**required_checks, **OPTIONAL_RENDERING, **family.optional}
    checked_options = {
        option_name: option_value
        for option_name, option_value in rendering_options.items()
        if option_name in all_checks
    }
    check(checked_options, all_checks, "rendering_kwargs.")
    layout_argument = {"plane_layout": plane_layout(module_record, family)} if family.layouts else {}
    all_arguments = {**_without_built_in(arguments), "rendering_kwargs": rendering_options, **layout_argument}
    return Plan(family.cls, all_arguments, record_by_name, family.architecture)


def _inside(module_record: ModuleRecord, attribute_name: str, child_name: str) -> Any:
    """Return the buffer or submodule `child_name` of a module, or None if it does not exist.

    Args: attribute_name: dictionary of the module that is searched, "_buffers" or "_modules".
    """
    children = module_record.state.get(attribute_name)
    return children.get(child_name) if isinstance(children, dict) else None


def plane_layout(module_record: ModuleRecord, family: Kind) -> str:
    """Determine the name of the plane layout from the tensor plane_axes of the renderer.

    Raises: RejectedError if the tensor is missing or belongs to none of the layouts of the family.
    """
    renderer_record = _inside(module_record, "_modules", "renderer")
    # plane_axes is an ordinary attribute of EG3D's renderer, not a buffer.
    axes_record = (
        renderer_record.state.get("plane_axes")
        if isinstance(renderer_record, ModuleRecord) and renderer_record.state is not None
        else None
    )
    if not isinstance(axes_record, TensorRecord) or axes_record.shape != (3, 3, 3):
        raise RejectedError("its generator has a renderer without plane_axes [3, 3, 3]")
    plane_axes = axes_record.tensor().to(torch.float32)
    # Axes of a layout are permutations, so they have to be exactly equal.
    for layout in family.layouts:
        if torch.equal(plane_axes, generate_planes(layout)):
            return layout
    raise RejectedError(
        f"its plane_axes belong to no plane layout of the family {family.architecture}"
        f" ({', '.join(family.layouts)})"
    )


def neural_rendering_resolution(module_record: ModuleRecord) -> int:
    """Return the resolution of volume rendering at the end of the training, in pixels per edge.

    The result is EG3D's default of 64 if the file does not contain the resolution.

    Raises: RejectedError for a value outside 1 to 4096.
    """
    resolution = module_record.state.get("neural_rendering_resolution", 64)
    if type(resolution) is not int or not 1 <= resolution <= 4096:
        raise RejectedError(
            f"its neural_rendering_resolution is {describe(resolution)} instead of an integer from 1 to 4096"
        )
    return resolution


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
        network = self.cls(**self.kwargs)
        network.load_state_dict(
            {tensor_name: tensor_record.tensor() for tensor_name, tensor_record in self.tensors.items()},
            strict=True,
        )
        return network


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
    plan_by_name = plan(snapshot, freeze_layers)
    D_record = snapshot.networks.get("D")
    if D_record is not None and "D" not in plan_by_name:
        print(
            f"Warning: {snapshot.who}: the discriminator is ignored, because its class is"
            f" {describe(D_record.class_name)} and not {D_CLASS}.",
            file=sys.stderr,
        )
    built_networks: dict[str, Any] = {
        network_name: network_plan.build() for network_name, network_plan in plan_by_name.items()
    }
    with reporting_rejection(snapshot.who):
        # The resolution is an attribute of the generators in EG3D, not part of the state dict.
        for network_name in built_networks.keys() - {"D"}:
            built_networks[network_name].neural_rendering_resolution = neural_rendering_resolution(
                snapshot.networks[network_name]
            )
        training_set = _training_set(snapshot)
    for network_name, network in built_networks.items():
        # G and D are in training mode, and G_ema is in eval mode, as in a training run.
        network.train(network_name != "G_ema").requires_grad_(False)
    D_kwargs = plan_by_name["D"].kwargs if "D" in plan_by_name else None
    G_kwargs = plan_by_name["G_ema"].kwargs
    family_name = plan_by_name["G_ema"].architecture
    return networks.Networks(
        built_networks.get("G"),
        built_networks.get("D"),
        built_networks["G_ema"],
        G_kwargs,
        D_kwargs,
        training_set,
        architecture=family_name,
    )


def plan(snapshot: Snapshot, freeze_layers: int | None = None) -> dict[str, Plan]:
    """Check the arguments and the tensors of every network of a snapshot, before memory is allocated.

    A discriminator of another class than `D_CLASS` is left out.

    Args:
        snapshot: contents of the file.
        freeze_layers: number of first layers of D that stay frozen; None: the value in the file.
    Returns: name ("G", "D" or "G_ema") -> plan of the network.
    Raises: ValueError with a message of one line, if a network, argument or tensor is not accepted.
    """
    with reporting_rejection(snapshot.who):
        if "G_ema" not in snapshot.networks:
            raise RejectedError("it contains no G_ema")
        plan_by_name: dict[str, Plan] = {}
        for network_name in ("G_ema", "G"):
            if (generator_record := snapshot.networks.get(network_name)) is not None:
                # Only for its check; `rebuild` sets the resolution.
                neural_rendering_resolution(generator_record)
                plan_by_name[network_name] = generator_plan(generator_record, network_name)
        # G_ema is a moving average of G, so both must have the same architecture.
        if "G" in plan_by_name and plan_by_name["G"].kwargs != plan_by_name["G_ema"].kwargs:
            ema_arguments = plan_by_name["G_ema"].kwargs
            g_arguments = plan_by_name["G"].kwargs
            differing_names = sorted(
                argument_name
                for argument_name in {**ema_arguments, **g_arguments}
                if ema_arguments.get(argument_name) != g_arguments.get(argument_name)
            )
            raise RejectedError(
                f"its G and G_ema differ in the constructor arguments {', '.join(differing_names)}"
            )
        D_record = snapshot.networks.get("D")
        if D_record is not None and D_record.class_name == D_CLASS:
            D_arguments = _arguments(D_record, D_NAMES, "discriminator")
            check(D_arguments, D_OPTIONS, "")
            D_arguments = _without_built_in(D_arguments)
            # In transfer learning, the caller's value replaces the value in the file.
            if freeze_layers is not None:
                D_arguments["block_kwargs"] = {
                    **D_arguments.get("block_kwargs", {}),
                    "freeze_layers": freeze_layers,
                }
            plan_by_name["D"] = Plan(DualDiscriminator, D_arguments, tensors(D_record, "D"))
        # Tensors are views of storages in the file, so their total size cannot exceed the file's by much.
        total_bytes = sum(
            tensor_record.nbytes
            for network_plan in plan_by_name.values()
            for tensor_record in network_plan.tensors.values()
        )
        if total_bytes > snapshot.size + SLACK:
            raise RejectedError(f"its tensors have {total_bytes} bytes, but the file has {snapshot.size}")
    for network_name, network_plan in plan_by_name.items():
        _check_shapes(network_plan, f"{snapshot.who} ({network_name})")
    return plan_by_name


def _check_shapes(network_plan: Plan, who: str) -> None:
    """Compare the tensors of the file with the network that the plan describes, by name and shape.

    The network is built on the meta device, where no memory is allocated.

    Args: network_plan: plan of the network; who: file and network, for messages.
    Raises: ValueError if no network can be built from the arguments, or if its tensors have other names or
        shapes than the tensors of the file.
    """
    try:
        with torch.device("meta"):
            meta_network = network_plan.cls(**network_plan.kwargs)
    # torch raises these errors for sizes that overflow, and for layers without channels.
    except (RuntimeError, ZeroDivisionError) as error:
        reason = shorten(str(error))
        raise ValueError(
            f"{who}: the network cannot be built from its constructor arguments: {reason}. Download the file"
            " again from its source."
        ) from None
    except ValueError as error:
        raise ValueError(f"{who}: {error}") from None
    record_by_name = network_plan.tensors
    dtypes = {tensor_record.storage.dtype for tensor_record in record_by_name.values()}
    integer_dtypes = sorted(str(dtype) for dtype in dtypes if not dtype.is_floating_point)
    if integer_dtypes:
        raise ValueError(
            f"{who}: expected floating-point tensors, got {', '.join(integer_dtypes)}. Download the file"
            " again from its source."
        )
    for tensor_name, tensor_record in record_by_name.items():
        if math.prod(tensor_record.shape) > 1 << 40:
            raise ValueError(
                f"{who}: expected tensors of at most 2^40 elements, got {list(tensor_record.shape)} for"
                f" {shorten(tensor_name)}. Download the file again from its source."
            )
    # Empty tensors take the place of the file's tensors. Constant buffers such as filters are on the CPU
    # even within `torch.device("meta")`, so each empty tensor is created on the device of its counterpart.
    # A tensor with another name or shape is created on the meta device; `load_strict` lists all of these
    # in one error.
    state_dict = meta_network.state_dict()
    placeholders = {}
    for tensor_name, tensor_record in record_by_name.items():
        is_match = tensor_name in state_dict and state_dict[tensor_name].shape == tensor_record.shape
        device = state_dict[tensor_name].device if is_match else torch.device("meta")
        placeholders[tensor_name] = torch.empty(tensor_record.shape, device=device)
    storage.load_strict(meta_network, placeholders, who)


def _training_set(snapshot: Snapshot) -> dict:
    """Return the entry `training_set` of our network files for a snapshot, see `load`.

    Raises: RejectedError for values of another type.
    """
    dataset_options = snapshot.training_set
    dataset_path = dataset_options.get("path")
    training_set_entry: dict = {
        "name": Path(dataset_path).stem if isinstance(dataset_path, str) else "",
        "resolution": dataset_options.get("resolution"),
    }
    if dataset_options:
        training_set_entry["options"] = dict(dataset_options)
    # Standard deviation of the camera labels, a buffer that EG3D's training adds to G.
    label_std_record = _inside(snapshot.networks["G_ema"], "_buffers", "dataset_label_std")
    if label_std_record is not None:
        # 2^16 bytes are far more than a camera label needs.
        is_vector = isinstance(label_std_record, TensorRecord) and len(label_std_record.shape) == 1
        if not is_vector or label_std_record.nbytes > 1 << 16:
            raise RejectedError("its dataset_label_std is not a vector of at most 65536 bytes")
        training_set_entry["label_std"] = json_values([float(value) for value in label_std_record.tensor()])
    if snapshot.augment_pipe is not None:
        probability_record = _inside(snapshot.augment_pipe, "_buffers", "p")
        if not isinstance(probability_record, TensorRecord) or probability_record.shape != ():
            raise RejectedError("its augment_pipe has no augmentation probability p")
        probability = float(probability_record.tensor())
        if not math.isfinite(probability):
            raise RejectedError(f"its augment_pipe has the augmentation probability p = {probability}")
        augment_options = json_values(snapshot.augment_pipe.state.get("_init_kwargs", {}))
        training_set_entry["augment"] = {
            "class_name": snapshot.augment_pipe.class_name,
            "options": augment_options,
            "p": probability,
        }
    return training_set_entry
