"""Import a reward that was released with the paper (arXiv 2606.27305), and compare its scores on two
lattices.

A lattice is the grid on which the density is evaluated. The published code evaluates it on a slightly skewed
grid, and this package on a straight one.

A release is a folder with `best_model.pt` (a state dict, or a dict that contains it under 'state_dict') and
`release_config.yaml` or `run_config.yaml`. Layer sizes are derived from the weights. The configuration is the
record of a training run: YAML with `${...}` references. Since it comes from an unknown source, it is parsed
as data only (without tags that create objects, and without aliases), and only these fields are read:

    data.dset_dict.selected_dtypes     the first entry, sigma_field_<N>, states N grid points per axis of the
                                       cube
    data.augmentations.tune            transform of fine-tuning, a self-normalisation to [lower, upper]
    data.augmentations.upper_norm      upper end of the range, if `tune` does not state it
    model                              num_groups, f_maps, layer_order, in_channels, is_segmentation,
                                       residual, input_size, external

The configuration does not state the crop: the published code derives it from N, with the shares that are
SlabSpec's default.
"""

import contextlib
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from eg3d_rlhf.core.cli import file_hash
from eg3d_rlhf.core.plain_yaml import read_yaml
from eg3d_rlhf.core.spec import LATTICES, SlabSpec
from eg3d_rlhf.generators import Generator, ws_of_seeds
from eg3d_rlhf.models.weights import read
from eg3d_rlhf.rewards.observations import SigmaSlab
from eg3d_rlhf.rewards.reward import Reward, fill_published
from eg3d_rlhf.rewards.slab_network import RewardModel
from eg3d_rlhf.rewards.slab_presets import PAPER, RewardArch

WEIGHTS = "best_model.pt"
CONFIG_NAMES = ("release_config.yaml", "run_config.yaml")
EXAMPLE_ARCH = RewardArch(feature_maps=(4, 8, 16), pool_size=256, trunk=(24, 24), embedding=32, heads=(16, 8))
_EXAMPLE_CONFIG = """\
data:
  dset_dict: {selected_dtypes: [sigma_field_32]}
  augmentations:
    upper_norm: 100
    tune: {_target_: transforms.normalise_sigma_self, lower: 0, upper: "${data.augmentations.upper_norm}"}
model:
  Conv3DModule: {in_channels: 1, f_maps: [4, 8, 16], num_groups: 8, layer_order: gcr, is_segmentation: false}
  mlp_global: {input_size: 256}
"""
_MAX_BYTES = 1 << 18  # largest configuration that is read
_MAX_STEPS = 64  # largest number of references that are followed for one value
_REFERENCE = re.compile(r"\$\{([^${}]*)\}")  # matches a reference that contains no further reference
# "lower" or "upper" for each name of an end of the range in published transforms
_ENDS = dict.fromkeys(("lo", "low", "lower", "lower_norm", "min"), "lower")
_ENDS |= dict.fromkeys(("hi", "high", "upper", "upper_norm", "max"), "upper")
# Keys of a transform that state how it is created and do not change its results
_NEUTRAL = ("_target_", "_partial_", "_convert_", "_recursive_", "keys")
# Settings of the configuration for which our network implements only this value
_FIXED = {"layer_order": "gcr", "in_channels": 1, "is_segmentation": False, "residual": True}
_REMEDY = (
    "Use --transform=published, which ignores this field and reads the published slab (256 points, values"
    " 0..100)."
)
# --transform=published does not ignore the node `model`.
_MODEL_REMEDY = "Replace this value in the configuration by the number with which the network was trained."


@dataclass(frozen=True, kw_only=True)
class ReleaseConfig:
    """Settings that the configuration of a released reward states."""

    resolution: int = 256  # number of grid points per axis of the cube
    value_max: float = 100.0  # upper end of the range to which densities are normalised
    groups: int = 8  # number of groups of every group normalisation
    # Numbers of channels of the U-Net's levels; None if the configuration does not state them. This value and
    # the next one are derived from the weights, too, and the two sources are compared.
    feature_maps: tuple[int, ...] | None = None
    # Length of the feature vector that the trunk reads; None if the configuration does not state it
    input_size: int | None = None


def import_release(source: str | Path, transform: str = "config", lattice: str = "straight") -> Reward:
    """Read a released reward, in eval mode. No code from its files is executed.

    The provenance of the result states the names and the SHA-256 hashes of the file of the weights and of the
    configuration.

    Args:
        source: path of the release. It is either the folder of the release, or the file of the weights, for
            example `swa_weights.pt`, whose folder contains the configuration.
        transform: "config" reads the grid and the range of the densities from the configuration; "published"
            uses the published grid of 256 points per axis and the range 0..100.
        lattice: lattice on which the reward evaluates densities, "straight" or "skewed".
    Raises: FileNotFoundError if a file is missing; ValueError if a file is damaged or is no reward, if its
        entries do not match the network, or if the configuration is not supported.
    """
    source = Path(source)
    weights_path = source / WEIGHTS if source.is_dir() else source
    folder = weights_path.parent
    state_dict = read(weights_path, "import_release")
    config_paths = [folder / name for name in CONFIG_NAMES if (folder / name).is_file()]
    if not config_paths:
        raise FileNotFoundError(
            f"import_release: {folder} contains neither {' nor '.join(CONFIG_NAMES)}. Copy the configuration"
            " of the release into this folder."
        )
    # Both files may exist, provided that they state the same values.
    if len({read_config(path, transform) for path in config_paths}) == 2:
        raise ValueError(
            f"import_release: {folder} contains two configurations with different values,"
            f" {' and '.join(CONFIG_NAMES)}. Remove the file that does not belong to {weights_path.name}."
        )
    config_path = config_paths[0]
    release_settings = read_config(config_path, transform)
    arch = arch_from_state(state_dict, release_settings)
    model = fill_published(RewardModel(arch), state_dict, f"import_release({weights_path.name})")
    spec = SlabSpec(
        resolution=release_settings.resolution, value_max=release_settings.value_max, lattice=lattice
    )
    if min(spec.shape) < arch.smallest_side:
        raise ValueError(
            f"import_release: the network needs slabs with at least {arch.smallest_side} points along each"
            f" axis, but {config_path.name} gives slabs of {list(spec.shape)} points. Use the configuration"
            " that belongs to these weights."
        )
    provenance = {
        "preset": "paper" if arch == PAPER else "release",
        "weights": weights_path.name,
        "weights_sha256": file_hash(weights_path),
        "config": config_path.name,
        "config_sha256": file_hash(config_path),
        "transform": transform,
        "trained_on_lattice": "skewed",
    }
    return Reward(SigmaSlab(spec), model, provenance).eval().requires_grad_(False)


def arch_from_state(state_dict: Mapping[str, torch.Tensor], release_settings: ReleaseConfig) -> RewardArch:
    """Derive the architecture of a network from the shapes of its weights.

    Half of the channels of the last convolution are reconstructions of the slab, and the other half is pooled
    to the features (4 + 4 in the paper). If the state dict lacks entries, the result is the paper's
    architecture: the strict loading that follows then reports the missing entries.

    Args:
        state_dict: state dict of the network.
        release_settings: settings from the configuration.
    Raises: ValueError if the configuration states sizes that differ from those of the weights.
    """

    def sizes(pattern: str) -> tuple[int, ...]:
        """Return the length of the first axis of each of several entries of the state dict.

        Args: pattern: name of an entry with {} in place of its number. The entries 0, 1, ... up to the first
            missing entry are read.
        Raises: KeyError if entry 0 is missing.
        """
        later_names = itertools.takewhile(state_dict.__contains__, map(pattern.format, itertools.count(1)))
        return tuple(len(state_dict[name]) for name in (pattern.format(0), *later_names))

    def hidden_sizes(name: str) -> tuple[int, ...]:
        """Return the hidden sizes of the `MLP` with this name."""
        # The doubled braces leave {} for the number of the layer.
        return (len(state_dict[f"{name}.input_layer.weight"]), *sizes(f"{name}.hidden_layers.{{}}.0.weight"))

    try:
        feature_maps = sizes("Conv3DModule.encoders.{}.basic_module.conv2.conv.weight")
        channel_count = len(state_dict["Conv3DModule.final_conv.weight"])
        trunk_sizes = hidden_sizes("MLP")
        head_sizes = hidden_sizes("scalar_rwd_head")
        pool_size = state_dict["MLP.input_layer.weight"].shape[1]
        embedding_size = len(state_dict["MLP.output_layer.weight"])
    # Errors of a missing entry, and of an entry that is no matrix
    except (KeyError, IndexError, TypeError):
        return replace(PAPER, groups=release_settings.groups)
    for name, weights_value, stated_value in (
        ("f_maps", feature_maps, release_settings.feature_maps),
        ("input_size", pool_size, release_settings.input_size),
    ):
        if stated_value is not None and stated_value != weights_value:
            raise ValueError(
                f"import_release: the configuration states {name} = {stated_value}, but the weights have"
                f" {weights_value}. Use weights and configuration of the same release."
            )
    return RewardArch(
        feature_maps=feature_maps,
        groups=release_settings.groups,
        recon_channels=channel_count // 2,
        feature_channels=channel_count - channel_count // 2,
        pool_size=pool_size,
        trunk=trunk_sizes,
        embedding=embedding_size,
        heads=head_sizes,
    )


@torch.no_grad()
def compare_lattices(
    reward: Reward, generator: Generator, seeds: Sequence[int], psi: float = 1.0
) -> Iterator[tuple[int, float, float]]:
    """Score shapes with their densities evaluated on the straight and on the skewed lattice.

    The published reward was trained on the skewed lattice.

    Args:
        reward: reward that reads slabs.
        generator: generator of the shapes.
        seeds: seeds of the shapes.
        psi: truncation psi of the latents w; 1 truncates nothing.
    Yields: for each seed, the seed, the reward on the straight lattice, and the reward on the skewed lattice.
    Raises: ValueError if the reward does not read slabs.
    """
    if not isinstance(reward.observation, SigmaSlab):
        raise ValueError(
            "compare_lattices: expected a reward that reads density grids (sigma), got a reward that reads"
            f" {reward.observation.kind}. Pass the file of a reward that reads density grids."
        )
    slabs = [SigmaSlab(replace(reward.observation.spec, lattice=lattice)) for lattice in LATTICES]
    for seed in seeds:
        # 14 is the default number of truncated layers, see `RewardRun.cutoff`.
        field = generator.field(ws_of_seeds(generator, [seed], psi, 14))
        straight, skewed = (float(reward.score_observed(slab.observe(field))) for slab in slabs)
        yield seed, straight, skewed


def write_example(folder: str | Path, seed: int = 0) -> Path:
    """Write a small untrained reward in the layout of a release, to test the import.

    Args:
        folder: folder to write to; it is created if it does not exist.
        seed: random seed of the weights.
    Returns: the folder.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = RewardModel(EXAMPLE_ARCH)
    torch.save(model.state_dict(), folder / WEIGHTS)
    (folder / CONFIG_NAMES[0]).write_text(_EXAMPLE_CONFIG)
    return folder


def read_config(path: str | Path, transform: str = "config") -> ReleaseConfig:
    """Read the fields of a release's configuration that the docstring of this module lists.

    Args:
        path: path of the YAML file.
        transform: "config" takes the grid and the range of values from the file; "published" takes 256 points
            per axis and the range 0..100.
    Raises: FileNotFoundError if the file does not exist; ValueError, which names the field, if a field is
        missing, not supported, or has a value that our network does not implement.
    """
    message_prefix = f"reward config {Path(path).name}"
    config_root = read_yaml(Path(path), message_prefix, _MAX_BYTES, max_aliases=0)
    model_settings = dict(_model_settings(config_root, message_prefix))
    if transform == "published":
        return ReleaseConfig(**model_settings)
    data_types = resolve(config_root, lookup(config_root, "data.dset_dict.selected_dtypes"), message_prefix)
    # The field is a list of types, or a single type.
    first_type = data_types[0] if isinstance(data_types, list) and data_types else data_types
    data_type = resolve(config_root, first_type, message_prefix)
    type_match = re.fullmatch(r"sigma_field_(\d{1,4})", data_type) if isinstance(data_type, str) else None
    if type_match is None:
        raise ValueError(
            f"{message_prefix}: data.dset_dict.selected_dtypes: expected sigma_field_<points> as the first"
            f" entry, got {data_type!r}. Rewards that read depth maps or point clouds cannot be imported. If"
            " the reward reads density grids and the field is missing, use --transform=published."
        )
    return ReleaseConfig(
        resolution=int(type_match[1]), value_max=_value_max(config_root, message_prefix), **model_settings
    )


def lookup(config_root: Mapping, key_path: str) -> Any:
    """Return the value at a path of keys such as "a.b.c", or None if there is no such value.

    Entries of lists are named by their index, for example "a.0".
    """
    node: Any = config_root
    for key in key_path.split("."):
        entries = {str(i): entry for i, entry in enumerate(node)} if isinstance(node, list) else node
        node = entries.get(key) if isinstance(entries, Mapping) else None
    return node


def resolve(config_root: Mapping, value: Any, message_prefix: str) -> Any:
    """Replace all references in a text by their values.

    A reference is `${a.b}`, a field of the file, or `${multiply:x,y}`, a product. If the text consists of one
    reference only, the result has the type of the field. A value that is no text is returned unchanged.

    Args:
        config_root: contents of the file.
        value: value to resolve.
        message_prefix: start of the messages.
    Raises: ValueError if a reference is malformed, names no field, or refers to itself.
    """
    for _ in range(_MAX_STEPS):
        reference = _REFERENCE.search(value) if isinstance(value, str) else None
        if reference is None:
            if isinstance(value, str) and "${" in value:
                raise ValueError(
                    f"{message_prefix}: the reference in {value[:80]!r} has no closing brace. Replace it by"
                    " its value."
                )
            return value
        expression = reference[1].strip()
        name, colon, arguments = expression.partition(":")
        if colon and name == "multiply":
            referenced_value = math.prod(
                _number(factor, f"{message_prefix}: ${{{expression}}}") for factor in arguments.split(",")
            )
        elif colon or (referenced_value := lookup(config_root, expression)) is None:
            raise ValueError(
                f"{message_prefix}: the reference ${{{expression[:80]}}} is neither a field of this file nor"
                " of the form"
                " ${multiply:x,y}. Replace it by its value."
            )
        if reference[0] == value.strip():
            value = referenced_value  # the target keeps its type, for example a list or a number
        elif isinstance(referenced_value, (str, int, float)):
            value = value[: reference.start()] + str(referenced_value) + value[reference.end() :]
        else:
            raise ValueError(
                f"{message_prefix}: the reference in {value[:80]!r} names a value of type"
                f" {type(referenced_value).__name__}, which cannot be part of a text. Replace the reference"
                " by its value."
            )
        # References that expand to several references would make the text longer in every step.
        if isinstance(value, str) and len(value) > 4096:
            break
    raise ValueError(
        f"{message_prefix}: references refer to themselves (a circle), more than {_MAX_STEPS} of them follow"
        " each other, or they expand to more than 4096 characters. Replace them by their values."
    )


def _number(value: Any, message_prefix: str, remedy: str = _REMEDY) -> int | float:
    """Convert a value to int or float. YAML 1.1 reads 1e-5 as text, so text is converted, too.

    Args:
        value: value of the configuration.
        message_prefix: start of the message, which names the file and the field.
        remedy: end of the message.
    Raises: ValueError for a value that is no number, or whose absolute value is 1e9 or more.
    """
    if isinstance(value, str):
        for number_type in (int, float):
            with contextlib.suppress(ValueError):
                value = number_type(value)
                break
    # The comparison is written with `not`, so that it also rejects NaN. bool is a subclass of int.
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e9:
        raise ValueError(f"{message_prefix}: expected a number below 1e9, got {value!r}. {remedy}")
    return value


def _value_max(config_root: Mapping, message_prefix: str) -> float:
    """Return the upper end of the range to which `data.augmentations.tune` normalises densities."""
    field_prefix = f"{message_prefix}: data.augmentations.tune"
    range_ends = {}
    transforms = list(
        _self_normalisations(config_root, lookup(config_root, "data.augmentations.tune"), field_prefix)
    )
    if len(transforms) > 1:
        raise ValueError(f"{field_prefix}: expected one self-normalisation, got {len(transforms)}. {_REMEDY}")
    for setting_name, value in transforms[0].items() if transforms else ():
        if setting_name in _ENDS:
            range_ends[_ENDS[setting_name]] = _number(
                resolve(config_root, value, field_prefix), f"{field_prefix}.{setting_name}"
            )
        elif setting_name not in _NEUTRAL:
            raise ValueError(
                f"{field_prefix}: the self-normalisation has the setting {setting_name!r}, which is not"
                f" supported. Only the two ends of the range are supported. {_REMEDY}"
            )
    if range_ends.get("lower", 0) != 0:
        raise ValueError(
            f"{field_prefix}: expected a range that starts at 0, got {range_ends['lower']}. {_REMEDY}"
        )
    if "upper" in range_ends:
        return float(range_ends["upper"])
    default_upper = lookup(config_root, "data.augmentations.upper_norm")
    if default_upper is None:
        raise ValueError(
            f"{field_prefix}: the upper end of the range is missing, here and in"
            f" data.augmentations.upper_norm. {_REMEDY}"
        )
    return float(
        _number(
            resolve(config_root, default_upper, field_prefix),
            f"{message_prefix}: data.augmentations.upper_norm",
        )
    )


def _self_normalisations(config_root: Mapping, node: Any, message_prefix: str) -> Iterator[Mapping]:
    """Yield the self-normalisations inside a transform.

    A transform is a mapping with the key `_target_` (which may be a composition of transforms), a list of
    transforms, or a mapping of named transforms.

    Raises: ValueError for any other transform.
    """
    pending_nodes = [node]
    # A reference may lead back to a node that contains it, so the number of steps is limited.
    for _ in range(_MAX_STEPS):
        if not pending_nodes:
            return
        node = resolve(config_root, pending_nodes.pop(), message_prefix)
        if isinstance(node, Mapping) and "_target_" in node:
            class_name = str(resolve(config_root, node["_target_"], message_prefix)).rpartition(".")[2]
            # Names differ between versions in case, underscores and spelling.
            simplified_name = class_name.lower().replace("_", "").replace("normalize", "normalise")
            if simplified_name == "compose":
                pending_nodes.append(node.get("transforms"))
            elif "normalise" in simplified_name and "self" in simplified_name:
                yield node
            else:
                raise ValueError(
                    f"{message_prefix}: expected a self-normalisation to a fixed range, got the transform"
                    f" {class_name[:60]!r}. {_REMEDY}"
                )
        elif isinstance(node, (list, Mapping)):
            pending_nodes += list(node.values() if isinstance(node, Mapping) else node)[:_MAX_STEPS]
        elif node is not None:
            raise ValueError(f"{message_prefix}: expected a transform, got {node!r}. {_REMEDY}")
    raise ValueError(
        f"{message_prefix}: the transform has more than {_MAX_STEPS} entries, or a reference that refers to"
        f" itself. {_REMEDY}"
    )


def _model_settings(config_root: Mapping, message_prefix: str) -> Iterator[tuple[str, Any]]:
    """Yield the settings of the network in the node `model`, as (name of a field of `ReleaseConfig`, value).

    Raises: ValueError for a value that our network does not implement.
    """
    if lookup(config_root, "model.external"):
        raise ValueError(
            f"{message_prefix}: model.external: this reward reads depth maps, and only rewards that read"
            " density grids can be imported. Train a reward on depth maps with --observation=depth instead."
        )
    for setting_path, setting_name, setting_value in _find_settings(config_root.get("model"), "model"):
        setting_value = resolve(config_root, setting_value, message_prefix)
        if setting_name in _FIXED and setting_value is not None and setting_value != _FIXED[setting_name]:
            raise ValueError(
                f"{message_prefix}: {setting_path}: expected {_FIXED[setting_name]!r}, got {setting_value!r}."
                " Our network does not implement this value, so this reward cannot be imported."
            )
        if setting_name == "num_groups":
            yield "groups", int(_number(setting_value, f"{message_prefix}: {setting_path}", _MODEL_REMEDY))
        elif setting_name == "f_maps" and isinstance(setting_value, list):
            channel_counts = [
                int(
                    _number(
                        resolve(config_root, entry, message_prefix),
                        f"{message_prefix}: {setting_path}",
                        _MODEL_REMEDY,
                    )
                )
                for entry in setting_value
            ]
            yield "feature_maps", tuple(channel_counts)
    input_size = resolve(config_root, lookup(config_root, "model.mlp_global.input_size"), message_prefix)
    if input_size is not None:
        yield (
            "input_size",
            int(_number(input_size, f"{message_prefix}: model.mlp_global.input_size", _MODEL_REMEDY)),
        )


def _find_settings(node: Any, path: str) -> Iterator[tuple[str, str, Any]]:
    """Find the settings of the network that this module reads, at any depth below a node.

    Args:
        node: value in the configuration; the result is empty for a value that is no mapping.
        path: path of the node, with dots between keys.
    Yields: path, key and value of each setting.
    """
    for child_key, child_node in node.items() if isinstance(node, Mapping) else ():
        if child_key in _FIXED or child_key in ("num_groups", "f_maps"):
            yield f"{path}.{child_key}", child_key, child_node
        else:
            yield from _find_settings(child_node, f"{path}.{child_key}")
