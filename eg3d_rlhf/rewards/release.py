"""Import the reward that was released with the paper, and compare its scores on both lattices.

A release is a folder with `best_model.pt` (a state dict, or one under 'state_dict') and `release_config.yaml`
or `run_config.yaml`. Layer sizes come from the weights. The configuration is the record of a training run:
YAML with `${...}` references. Since it comes from an unknown source, it is parsed as data only (without tags
that create objects, and without aliases), and only these fields are read:

    data.dset_dict.selected_dtypes     first entry sigma_field_<N>: the cube has N points per axis
    data.augmentations.tune            transform of fine-tuning: self-normalisation to [lower, upper]
    data.augmentations.upper_norm      the upper end, if `tune` does not state it
    model                              num_groups, f_maps, layer_order, in_channels, is_segmentation,
                                       residual, input_size, external

The crop is not a field: the published code derives it from N, with the fractions that are SlabSpec's default.
Shape letters: N samples, D, H, W = z, y, x.
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
_REFERENCE = re.compile(r"\$\{([^${}]*)\}")  # matches the innermost reference
# Names of the ends of a range in published transforms
_ENDS = dict.fromkeys(("lo", "low", "lower", "lower_norm", "min"), "lower")
_ENDS |= dict.fromkeys(("hi", "high", "upper", "upper_norm", "max"), "upper")
# Keys of a transform that state how it is created, and do not change what it computes
_NEUTRAL = ("_target_", "_partial_", "_convert_", "_recursive_", "keys")
# Values of the configuration that our network implements
_FIXED = {"layer_order": "gcr", "in_channels": 1, "is_segmentation": False, "residual": True}
_REMEDY = "Use --transform=published, which takes the published slab instead."


@dataclass(frozen=True, kw_only=True)
class ReleaseConfig:
    """Settings of a released reward that its weights do not show."""

    resolution: int = 256  # grid points per axis of the cube
    value_max: float = 100.0  # upper end of the self-normalised range
    groups: int = 8  # groups of every group normalisation
    feature_maps: tuple[int, ...] | None = None  # channels per level; None if the file does not state them
    input_size: int | None = None  # of the trunk; None if the file does not state it


def import_release(source: str | Path, transform: str = "config", lattice: str = "straight") -> Reward:
    """Read a released reward, in eval mode. No code from its files is executed.

    The provenance states both files and their SHA-256.

    Args:
        source: the folder, or the weights file itself, such as `swa_weights.pt`, beside its configuration.
        transform: see `read_config`.
        lattice: lattice on which the reward reads fields, see `SlabSpec`.

    Raises: FileNotFoundError; ValueError if a file is damaged or foreign, if entries do not fit, or if the
        configuration is not supported.
    """
    source = Path(source)
    file = source / WEIGHTS if source.is_dir() else source
    state = read(file, "import_release")
    configs = [file.parent / name for name in CONFIG_NAMES if (file.parent / name).is_file()]
    if not configs:
        raise FileNotFoundError(
            f"import_release: expected {' or '.join(CONFIG_NAMES)} in {file.parent}, found neither. Copy the"
            " configuration of the release into this folder."
        )
    # Both files may exist, provided that they state the same values.
    if len({read_config(path, transform) for path in configs}) == 2:
        raise ValueError(
            f"import_release: {file.parent} has two configurations with different values. Remove the wrong"
            " one."
        )
    config = configs[0]
    settings = read_config(config, transform)
    arch = arch_from_state(state, settings)
    model = fill_published(RewardModel(arch), state, f"import_release({file.name})")
    spec = SlabSpec(resolution=settings.resolution, value_max=settings.value_max, lattice=lattice)
    if min(spec.shape) < arch.smallest_side:
        raise ValueError(
            f"import_release: expected a slab with sides of at least {arch.smallest_side} points, got"
            f" {list(spec.shape)} from {config.name}. Use the configuration that belongs to these weights."
        )
    provenance = {
        "preset": "paper" if arch == PAPER else "release",
        "weights": file.name,
        "weights_sha256": file_hash(file),
        "config": config.name,
        "config_sha256": file_hash(config),
        "transform": transform,
        "trained_on_lattice": "skewed",
    }
    return Reward(SigmaSlab(spec), model, provenance).eval().requires_grad_(False)


def arch_from_state(state: Mapping[str, torch.Tensor], settings: ReleaseConfig) -> RewardArch:
    """Derive the architecture whose entries have the shapes of a state dict.

    If entries are missing, return the paper's architecture, so that the strict loading that follows can name
    them. Half of the last convolution's channels are reconstructions, and the other half is the feature (4 +
    4 in the paper).
    Raises: ValueError if the configuration states other sizes than the weights have.
    """

    # First dimension of the entries numbered 0, 1, ..., as far as they exist; entry 0 must exist.
    def sizes(pattern: str) -> tuple[int, ...]:
        names = [
            pattern.format(0),
            *itertools.takewhile(state.__contains__, map(pattern.format, itertools.count(1))),
        ]
        return tuple(len(state[name]) for name in names)

    def hidden(name: str) -> tuple[int, ...]:
        return (len(state[f"{name}.input_layer.weight"]), *sizes(f"{name}.hidden_layers.{{}}.0.weight"))

    try:
        maps = sizes("Conv3DModule.encoders.{}.basic_module.conv2.conv.weight")
        channels = len(state["Conv3DModule.final_conv.weight"])
        trunk = hidden("MLP")
        heads = hidden("scalar_rwd_head")
        pool_size = state["MLP.input_layer.weight"].shape[1]
        embedding = len(state["MLP.output_layer.weight"])
    # A missing or malformed entry
    except (KeyError, IndexError, TypeError):
        return replace(PAPER, groups=settings.groups)
    for name, got, expected in (
        ("f_maps", maps, settings.feature_maps),
        ("input_size", pool_size, settings.input_size),
    ):
        if expected is not None and expected != got:
            raise ValueError(
                f"import_release: the configuration states {name} = {expected}, but the weights have {got}."
                " Use weights and configuration of the same release."
            )
    return RewardArch(
        feature_maps=maps,
        groups=settings.groups,
        recon_channels=channels // 2,
        feature_channels=channels - channels // 2,
        pool_size=pool_size,
        trunk=trunk,
        embedding=embedding,
        heads=heads,
    )


@torch.no_grad()
def compare_lattices(
    reward: Reward, generator: Generator, seeds: Sequence[int], psi: float = 1.0
) -> Iterator[tuple[int, float, float]]:
    """Yield each seed with the rewards of its shape on the straight and on the skewed lattice.

    The published reward was trained on the skewed one.
    Raises: ValueError if the reward does not read slabs.
    """
    if not isinstance(reward.observation, SigmaSlab):
        raise ValueError(
            f"compare_lattices: expected a reward that reads slabs, got one that reads"
            f" {reward.observation.kind}. Use another reward."
        )
    slabs = [SigmaSlab(replace(reward.observation.spec, lattice=lattice)) for lattice in LATTICES]
    for seed in seeds:
        field = generator.field(ws_of_seeds(generator, [seed], psi, 14))
        straight, skewed = (float(reward.score_observed(slab.observe(field))) for slab in slabs)
        yield seed, straight, skewed


def write_example(folder: str | Path, seed: int = 0) -> Path:
    """Write a small untrained reward in the published layout, for tests of the import. Returns the folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = RewardModel(EXAMPLE_ARCH)
    torch.save(model.state_dict(), folder / WEIGHTS)
    (folder / CONFIG_NAMES[0]).write_text(_EXAMPLE_CONFIG)
    return folder


def read_config(path: str | Path, transform: str = "config") -> ReleaseConfig:
    """Read the fields that the module's docstring lists.

    Args: path: the YAML file; transform: 'config' takes grid and range from the file, 'published' takes 256
        points and [0, 100].
    Raises: FileNotFoundError; ValueError that names the field if it is missing, not supported, or different
        from what our network computes.
    """
    where = f"reward config {Path(path).name}"
    root = read_yaml(Path(path), where, _MAX_BYTES, aliases=0)
    settings = dict(_model_settings(root, where))
    if transform == "published":
        return ReleaseConfig(**settings)
    kinds = resolve(root, lookup(root, "data.dset_dict.selected_dtypes"), where)
    kind = resolve(root, kinds[0] if isinstance(kinds, list) and kinds else kinds, where)
    match = re.fullmatch(r"sigma_field_(\d{1,4})", kind) if isinstance(kind, str) else None
    if match is None:
        raise ValueError(
            f"{where}: data.dset_dict.selected_dtypes: expected sigma_field_<points> as the first entry, got"
            f" {kind!r}. Rewards on depth maps or point clouds cannot be imported. For a sigma-field reward"
            " without this field, use --transform=published."
        )
    return ReleaseConfig(resolution=int(match[1]), value_max=_value_max(root, where), **settings)


def lookup(root: Mapping, dotted: str) -> Any:
    """Return the value at `a.b.c` (list entries by number), or None if it does not exist."""
    value: Any = root
    for part in dotted.split("."):
        entries = {str(i): entry for i, entry in enumerate(value)} if isinstance(value, list) else value
        value = entries.get(part) if isinstance(entries, Mapping) else None
    return value


def resolve(root: Mapping, value: Any, where: str) -> Any:
    """Follow `${a.b}` and `${multiply:x,y}` in a scalar. Other values are returned as they are.

    Raises: ValueError if a reference is malformed, leads nowhere, or leads in a circle.
    """
    for _ in range(_MAX_STEPS):
        reference = _REFERENCE.search(value) if isinstance(value, str) else None
        if reference is None:
            if isinstance(value, str) and "${" in value:
                raise ValueError(
                    f"{where}: expected complete references, got {value[:80]!r}. Replace them by their value."
                )
            return value
        name, colon, rest = (inside := reference[1].strip()).partition(":")
        if colon and name == "multiply":
            target = math.prod(_number(factor, f"{where}: ${{{inside}}}") for factor in rest.split(","))
        elif colon or (target := lookup(root, inside)) is None:
            accepted = "${a field of this file} or ${multiply:x,y}"
            raise ValueError(
                f"{where}: expected {accepted}, got ${{{inside[:80]}}}. Replace the reference by its value."
            )
        if reference[0] == value.strip():
            value = target  # the value keeps its type, such as a list or a number
        elif isinstance(target, (str, int, float)):
            value = value[: reference.start()] + str(target) + value[reference.end() :]
        else:
            raise ValueError(
                f"{where}: expected a scalar inside {value[:80]!r}, got {type(target).__name__}. Replace the"
                " reference by its value."
            )
        # References that expand to more references can grow without a limit.
        if isinstance(value, str) and len(value) > 4096:
            break
    raise ValueError(
        f"{where}: references lead in a circle, or there are too many of them. Replace them by their values."
    )


def _number(value: Any, what: str) -> int | float:
    """Convert a value to int or float. YAML 1.1 reads 1e-5 as text, so text is converted, too."""
    for kind in (int, float) if isinstance(value, str) else ():
        with contextlib.suppress(ValueError):
            value = kind(value)
            break
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e9:
        raise ValueError(f"{what}: expected a number, got {value!r}. {_REMEDY}")
    return value


def _value_max(root: Mapping, where: str) -> float:
    """Return the upper end of the range to which `data.augmentations.tune` normalises."""
    what = f"{where}: data.augmentations.tune"
    bounds = {}
    transforms = list(_leaves(root, lookup(root, "data.augmentations.tune"), what))
    if len(transforms) > 1:
        raise ValueError(f"{what}: expected one self-normalisation, got {len(transforms)}. {_REMEDY}")
    for key, value in transforms[0].items() if transforms else ():
        if key in _ENDS:
            bounds[_ENDS[key]] = _number(resolve(root, value, what), f"{what}.{key}")
        elif key not in _NEUTRAL:
            raise ValueError(
                f"{what}: expected only the bounds of a self-normalisation, got the setting {key!r}."
                f" {_REMEDY}"
            )
    if bounds.get("lower", 0) != 0:
        raise ValueError(f"{what}: expected a range that starts at 0, got {bounds['lower']}. {_REMEDY}")
    if "upper" in bounds:
        return float(bounds["upper"])
    default = lookup(root, "data.augmentations.upper_norm")
    if default is None:
        raise ValueError(
            f"{what}: expected an upper end there or in data.augmentations.upper_norm, found neither."
            f" {_REMEDY}"
        )
    return float(_number(resolve(root, default, what), f"{where}: data.augmentations.upper_norm"))


def _leaves(root: Mapping, node: Any, what: str) -> Iterator[Mapping]:
    """Yield the self-normalisations inside a transform.

    A transform is one mapping with `_target_`, a list, a composition, or a mapping of named transforms.
    """
    pending = [node]
    # A reference may lead back to a node that contains it, so the number of steps is limited.
    for _ in range(_MAX_STEPS):
        if not pending:
            return
        node = resolve(root, pending.pop(), what)
        if isinstance(node, Mapping) and "_target_" in node:
            name = str(resolve(root, node["_target_"], what)).rpartition(".")[2]
            # Names differ between versions in case, underscores and spelling.
            simplified = name.lower().replace("_", "").replace("normalize", "normalise")
            if simplified == "compose":
                pending.append(node.get("transforms"))
            elif "normalise" in simplified and "self" in simplified:
                yield node
            else:
                raise ValueError(
                    f"{what}: expected a self-normalisation to a fixed range, got {name[:60]!r}. {_REMEDY}"
                )
        elif isinstance(node, (list, Mapping)):
            pending += list(node.values() if isinstance(node, Mapping) else node)[:_MAX_STEPS]
        elif node is not None:
            raise ValueError(f"{what}: expected a transform, got {node!r}. {_REMEDY}")
    raise ValueError(
        f"{what}: expected at most {_MAX_STEPS} entries and no circular references, got more. {_REMEDY}"
    )


def _model_settings(root: Mapping, where: str) -> Iterator[tuple[str, Any]]:
    """Yield the settings of the `model` node that the weights do not show.

    Values that our network does not implement raise ValueError.
    """
    if lookup(root, "model.external"):
        raise ValueError(
            f"{where}: model.external: this reward reads depth maps and not a sigma field. Only sigma-field"
            " rewards can be imported."
        )
    for path, key, value in _walk(root.get("model"), "model"):
        value = resolve(root, value, where)
        if key in _FIXED and value is not None and value != _FIXED[key]:
            raise ValueError(
                f"{where}: {path}: expected {_FIXED[key]!r}, got {value!r}. Our network does not implement"
                " this setting, so the reward cannot be used."
            )
        if key == "num_groups":
            yield "groups", int(_number(value, f"{where}: {path}"))
        elif key == "f_maps" and isinstance(value, list):
            yield (
                "feature_maps",
                tuple(int(_number(resolve(root, entry, where), f"{where}: {path}")) for entry in value),
            )
    size = resolve(root, lookup(root, "model.mlp_global.input_size"), where)
    if size is not None:
        yield "input_size", int(_number(size, f"{where}: model.mlp_global.input_size"))


def _walk(node: Any, path: str) -> Iterator[tuple[str, str, Any]]:
    """Yield (path, key, value) of the known keys under a node."""
    for key, value in node.items() if isinstance(node, Mapping) else ():
        if key in _FIXED or key in ("num_groups", "f_maps"):
            yield f"{path}.{key}", key, value
        else:
            yield from _walk(value, f"{path}.{key}")
