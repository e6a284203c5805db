"""What a released reward's configuration says about its input: grid, value range, and settings that its weights do not show.

The file is the record of a training run: YAML with `${...}` references. It comes from elsewhere, so it is read as plain data (no tags that
build objects, no aliases), and of its fields only those below are looked at:

    data.dset_dict.selected_dtypes     first entry sigma_field_<N>: the cube has N points per axis
    data.augmentations.tune            the transform of fine-tuning: self-normalisation to [lower, upper]
    data.augmentations.upper_norm      the upper end, where `tune` leaves it out
    model                              num_groups, f_maps, layer_order, in_channels, is_segmentation, residual, input_size, external

The crop is no field: the published code derives it from N with the fractions that are SlabSpec's default.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONFIG_NAMES = ("release_config.yaml", "run_config.yaml")
_MAX_BYTES = 1 << 18
_MAX_DEPTH = 64
_MAX_STEPS = 64  # references followed for one value
_REFERENCE = re.compile(r"\$\{([^${}]*)\}")  # innermost first
_GRID = re.compile(r"sigma_field_(\d{1,4})")
_LOWER = ("lo", "low", "lower", "lower_norm", "min")
_UPPER = ("hi", "high", "upper", "upper_norm", "max")
_NEUTRAL = ("_target_", "_partial_", "_convert_", "_recursive_", "keys")  # of a transform: how it is built, not what it computes
_FIXED = {"layer_order": "gcr", "in_channels": 1, "is_segmentation": False, "residual": True}  # what our network computes
_REMEDY = "Pass --transform=published to use the published slab instead."


@dataclass(frozen=True, kw_only=True)
class ReleaseConfig:
    """The fields that decide how a released reward is fed and built."""

    resolution: int = 256  # grid points per axis of the cube
    value_max: float = 100.0  # upper end of the self-normalised range
    groups: int = 8  # of every group normalisation
    feature_maps: tuple[int, ...] | None = None  # channels per level, None where the file does not say
    input_size: int | None = None  # of the trunk, None where the file does not say


def read_config(path: str | Path, transform: str = "config") -> ReleaseConfig:
    """Read the fields listed at the top of this file.

    Args: path of the YAML file; transform: 'config' takes grid and range from it, 'published' takes 256 points and [0, 100].
    Raises: FileNotFoundError; ValueError naming the field for anything that is missing, not understood, or not what our network computes.
    """
    root = read_yaml(path)
    where = f"reward config {Path(path).name}"
    settings = dict(_model_settings(root, where))
    if transform == "published":
        return ReleaseConfig(**settings)
    return ReleaseConfig(resolution=_resolution(root, where), value_max=_value_max(root, where), **settings)


def read_yaml(path: str | Path) -> dict:
    """A small YAML file as plain dicts, lists and scalars; no object of any other kind is built.

    Raises: FileNotFoundError; ValueError for a file that is large, no YAML, uses tags or aliases, or holds no mapping.
    """
    import yaml  # only here: nothing else needs it

    path = Path(path)
    where = f"reward config {path.name}"
    if not path.is_file():
        raise FileNotFoundError(f"{where}: expected a file at {path}, got none. Name the configuration with --config.")
    if path.stat().st_size > _MAX_BYTES:
        raise ValueError(f"{where}: expected at most {_MAX_BYTES >> 10} KiB, got {path.stat().st_size >> 10}. Is it another file?")
    try:
        text = path.read_text(encoding="utf-8")
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):  # lazily, so that what is refused is not read to its end
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if isinstance(event, yaml.AliasEvent) or depth > _MAX_DEPTH:
                raise ValueError("it uses aliases (*name)" if depth <= _MAX_DEPTH else f"it nests deeper than {_MAX_DEPTH} levels")
        root = yaml.load(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{where}: expected plain YAML without tags and aliases, got: {reason}. Copy the released file again.") from error
    if not isinstance(root, dict):
        raise ValueError(f"{where}: expected a mapping at the top, got {type(root).__name__}. Is it another file?")
    return root


def lookup(root: Mapping, dotted: str) -> Any:
    """The value at `a.b.c` (list entries by number), None where it does not exist."""
    value: Any = root
    for part in dotted.split("."):
        if isinstance(value, list) and part.isdigit() and int(part) < len(value):
            value = value[int(part)]
        elif isinstance(value, Mapping) and part in value:
            value = value[part]
        else:
            return None
    return value


def resolve(root: Mapping, value: Any, where: str) -> Any:
    """Follow `${a.b}` and `${multiply:x,y}` in a scalar; anything else is returned as it is.

    Raises: ValueError for a reference to nothing, an unknown resolver, or references that do not end.
    """
    for _ in range(_MAX_STEPS):
        found = _REFERENCE.search(value) if isinstance(value, str) else None
        if found is None:
            if isinstance(value, str) and "${" in value:
                raise ValueError(f"{where}: expected whole references, got {value[:80]!r}. Write the value out.")
            return value
        target = _referenced(root, found[1].strip(), where)
        if found[0] == value.strip():
            value = target  # keeps its type
        elif isinstance(target, (str, int, float)):
            value = value[: found.start()] + str(target) + value[found.end() :]
        else:
            raise ValueError(f"{where}: expected a scalar inside {value[:80]!r}, got {type(target).__name__}. Write the value out.")
        if isinstance(value, str) and len(value) > 4096:
            break
    raise ValueError(f"{where}: expected references that end, got a circle. Write the values out.")


def _referenced(root: Mapping, inside: str, where: str) -> Any:
    """Value of what stands between `${` and `}`."""
    name, colon, arguments = inside.partition(":")
    if colon and name == "multiply":
        product: float = 1
        for argument in arguments.split(","):
            product = product * _number(argument, f"{where}: ${{{inside}}}")
        return product
    target = None if colon else lookup(root, inside)
    if target is None:
        raise ValueError(f"{where}: expected ${{a field of this file}} or ${{multiply:x,y}}, got ${{{inside[:80]}}}. Write the value out.")
    return target


def _number(value: Any, what: str) -> int | float:
    """An int or float; YAML 1.1 reads 1e-5 as text."""
    if isinstance(value, str):
        try:
            value = int(value)
        except ValueError:
            try:
                value = float(value)
            except ValueError:
                pass
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e9:
        raise ValueError(f"{what}: expected a number, got {value!r}. {_REMEDY}")
    return value


def _resolution(root: Mapping, where: str) -> int:
    """Points per axis, from data.dset_dict.selected_dtypes."""
    kinds = resolve(root, lookup(root, "data.dset_dict.selected_dtypes"), where)
    kind = resolve(root, kinds[0] if isinstance(kinds, list) and kinds else kinds, where)
    match = _GRID.fullmatch(kind) if isinstance(kind, str) else None
    if match is None:
        raise ValueError(
            f"{where}: data.dset_dict.selected_dtypes: expected sigma_field_<points> first, got {kind!r}. Rewards on depth maps or point "
            "clouds are not read; for a sigma-field reward without this field pass --transform=published."
        )
    return int(match[1])


def _value_max(root: Mapping, where: str) -> float:
    """Upper end of the range that `data.augmentations.tune` normalises to."""
    default = lookup(root, "data.augmentations.upper_norm")
    what = f"{where}: data.augmentations.tune"
    found = list(_leaves(root, lookup(root, "data.augmentations.tune"), what))
    bounds = {}
    if len(found) > 1:
        raise ValueError(f"{what}: expected one self-normalisation, got {len(found)}. {_REMEDY}")
    for key, value in found[0].items() if found else ():
        end = "lower" if key in _LOWER else "upper" if key in _UPPER else None
        if end is None and key not in _NEUTRAL:
            raise ValueError(f"{what}: expected the bounds of a self-normalisation, got the setting {key!r}. {_REMEDY}")
        if end is not None:
            bounds[end] = _number(resolve(root, value, what), f"{what}.{key}")
    if bounds.get("lower", 0) != 0:
        raise ValueError(f"{what}: expected a range that starts at 0, got {bounds['lower']}. {_REMEDY}")
    if "upper" not in bounds:
        if default is None:
            raise ValueError(f"{what}: expected an upper end there or in data.augmentations.upper_norm, got neither. {_REMEDY}")
        bounds["upper"] = _number(resolve(root, default, what), f"{where}: data.augmentations.upper_norm")
    return float(bounds["upper"])


def _leaves(root: Mapping, node: Any, what: str) -> Iterator[Mapping]:
    """The self-normalisations inside a transform: one mapping with `_target_`, a list, a composition, or a mapping of named ones."""
    pending = [node]
    for _ in range(_MAX_STEPS):  # references may lead back to where they stand
        if not pending:
            return
        node = resolve(root, pending.pop(), what)
        if isinstance(node, Mapping) and "_target_" in node:
            name = str(resolve(root, node["_target_"], what)).rpartition(".")[2]
            plain = name.lower().replace("_", "").replace("normalize", "normalise")
            if plain == "compose":
                pending.append(node.get("transforms"))
            elif "normalise" in plain and "self" in plain:
                yield node
            else:
                raise ValueError(f"{what}: expected a self-normalisation to a fixed range, got {name[:60]!r}. {_REMEDY}")
        elif isinstance(node, (list, Mapping)):
            pending += list(node)[:_MAX_STEPS] if isinstance(node, list) else list(node.values())[:_MAX_STEPS]
        elif node is not None:
            raise ValueError(f"{what}: expected a transform, got {node!r}. {_REMEDY}")
    raise ValueError(f"{what}: expected at most {_MAX_STEPS} entries and references that end, got more. {_REMEDY}")


def _model_settings(root: Mapping, where: str) -> Iterator[tuple[str, Any]]:
    """Settings of the `model` node that the weights do not show, checked against what our network computes."""
    if lookup(root, "model.external"):
        raise ValueError(f"{where}: model.external: expected none for a sigma-field reward, got one: this reward reads depth maps.")
    for path, key, value in _walk(root.get("model"), "model"):
        value = resolve(root, value, where)
        if key in _FIXED and value is not None and value != _FIXED[key]:
            raise ValueError(f"{where}: {path}: expected {_FIXED[key]!r}, got {value!r}. Its scores cannot be reproduced.")
        if key == "num_groups":
            yield "groups", int(_number(value, f"{where}: {path}"))
        elif key == "f_maps" and isinstance(value, list):
            yield "feature_maps", tuple(int(_number(resolve(root, entry, where), f"{where}: {path}")) for entry in value)
    size = resolve(root, lookup(root, "model.mlp_global.input_size"), where)
    if size is not None:
        yield "input_size", int(_number(size, f"{where}: model.mlp_global.input_size"))


def _walk(node: Any, path: str) -> Iterator[tuple[str, str, Any]]:
    """(path, key, value) of the known keys under a node."""
    if not isinstance(node, Mapping):
        return
    for key, value in node.items():
        if key in _FIXED or key in ("num_groups", "f_maps"):
            yield f"{path}.{key}", key, value
        else:
            yield from _walk(value, f"{path}.{key}")
