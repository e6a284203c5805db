"""Files of tuned networks and adapters.

Reads state dicts of networks and both layouts that PEFT writes. Tuned networks are stored in folders of such
files and are applied to the base that they were tuned from.

    network        X.weight, X.bias
                   stock networks; adapters merged, or everything trained
    PEFT, full     base_model.model.X.base_layer.weight, X.lora_A.default.weight
                   state dict of a wrapped network (DSO's checkpoints)
    PEFT, adapter  base_model.model.X.lora_A.weight
                   adapter_model.safetensors beside adapter_config.json

The name that PEFT gives an adapter ("default") may be any name, or be missing. The full layout does not hold
alpha, so the caller has to pass it. A folder of a tuned network also has policy.json.
"""

import copy
import json
import math
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from eg3d_rlhf.models.lora import BASE, adapted_layers, adapter_state, attach, matches, merged_state
from eg3d_rlhf.models.weights import check_finite, read, write
from training.storage import check_fit, write_atomic

PREFIX = "base_model.model."
ADAPTER = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
MODEL = "model.safetensors"
FILES = (ADAPTER, "adapter_model.bin", MODEL)  # names that are searched for in a folder
Adapters = dict[str, tuple[torch.Tensor, torch.Tensor]]  # layer -> A [rank, in], B [out, rank]
_PART = re.compile(r"(?P<layer>.+)\.lora_(?P<part>[AB])(?:\.(?P<adapter>[^.]+))?\.weight")
# Entries of PEFT's other kinds of adapters.
_FOREIGN = re.compile(r"\.(lora_\w+|modules_to_save|original_module|ia3_\w+|vera_\w+)(\.|$)")
# PEFT's initialisations that do not change the base's weights.
_BASE_UNCHANGED = (True, False, "gaussian", "orthogonal", "eva")
_SUPPORTED = {  # PEFT's setting -> values that are supported here, where the file states the setting
    "peft_type": ("LORA",),
    "use_dora": (False,),
    "use_rslora": (False,),
    "fan_in_fan_out": (False,),
    "bias": ("none",),
    "lora_bias": (False,),
    "modules_to_save": (None, []),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "init_lora_weights": _BASE_UNCHANGED,
    "trainable_token_indices": (None,),
    "target_parameters": (None, []),
}


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Content of a file of weights, by the names of the network without adapters."""

    source: str  # file name, for messages
    tensors: dict[str, torch.Tensor]  # the network's tensors; empty if the file holds only adapters
    adapters: Adapters
    alpha: float | None  # scale of the adapters' update, times 1 / rank; None without adapters
    dropout: float = 0.0  # share in 0..1 that the adapters were trained with


def read_weights(path: str | Path, alpha: float | None = None) -> Weights:
    """Read a file of any layout above, or the folder that holds it.

    Args: alpha: needed for PEFT's full layout without an adapter_config.json beside it (DSO trained with
        twice the rank).
    Raises: FileNotFoundError; ValueError for a file that is damaged, foreign, not finite, or that uses a
        feature of PEFT that is not supported here.
    """
    file = Path(path)
    if not file.is_file():
        files = [file / name for name in FILES if (file / name).is_file()]
        if not files:
            raise FileNotFoundError(
                f"{path}: expected weights or a folder with {', '.join(FILES)}, got none. Check the path."
            )
        # With several files it is unclear which one is meant, for example adapters and a merged network.
        if len(files) > 1:
            names = " and ".join(f.name for f in files)
            raise ValueError(
                f"{path}: the folder holds several files of weights: {names}. Name one of the files."
            )
        file = files[0]
    # Reads without executing anything; pickles are restricted to tensors.
    state = read(file, "weights")
    check_finite(state, file.name)
    tensors, adapters = split_state(state, file.name)
    if not adapters:
        return Weights(source=file.name, tensors=tensors, adapters={}, alpha=None)
    config = _read_config(file.with_name(CONFIG))
    # The file's alpha has precedence; the argument fills in for a missing file.
    stated = config.get("lora_alpha", alpha)
    if stated is None:
        raise ValueError(
            f"{file.name}: the adapters' alpha is unknown, because there is no {CONFIG} beside the file. Pass"
            " alpha (DSO: 2 x rank)."
        )
    if alpha is not None and alpha != stated:
        raise ValueError(
            f"{file.name}: expected alpha {stated} as in {CONFIG}, got {alpha}. Leave alpha out."
        )
    # All ranks that appear: rows of A, columns of B, and the file's own statement.
    ranks = {n for A, B in adapters.values() for n in (A.shape[0], B.shape[-1])} | (
        {config["r"]} if config else set()
    )
    if len(ranks) > 1 or any(A.ndim != 2 or B.ndim != 2 for A, B in adapters.values()):
        got = f"ranks {sorted(ranks)}"
        raise ValueError(
            f"{file.name}: expected adapters of linear layers that all have the same rank, got {got}. Merge"
            " them with PEFT."
        )
    return Weights(
        source=file.name,
        tensors=tensors,
        adapters=adapters,
        alpha=float(stated),
        dropout=float(config.get("lora_dropout", 0.0)),
    )


def split_state(state: Mapping[str, torch.Tensor], who: str) -> tuple[dict[str, torch.Tensor], Adapters]:
    """Split a state dict of any layout into the network's tensors and its adapters.

    Args: who: name that error messages begin with.
    Returns: tensors by the names of the network without adapters, and adapters by layer.
    """
    # torch's distributed wrapper puts "module." before every name.
    wrapper = "module." if all(key.startswith("module.") for key in state) else ""
    names = {key: key.removeprefix(wrapper).removeprefix(PREFIX) for key in state}
    adapter_keys = {key: match for key, name in names.items() if (match := _PART.fullmatch(name))}
    # None where the file leaves out the adapter's name.
    called = sorted({match["adapter"] or "" for match in adapter_keys.values()})
    if len(called) > 1:
        raise ValueError(
            f"{who}: expected one adapter, got several: {', '.join(called)}. Save only the one to be used."
        )
    # For example DoRA's magnitudes or other kinds of adapters.
    foreign = [key for key in state if key not in adapter_keys and _FOREIGN.search(names[key])]
    if foreign:
        raise ValueError(
            f"{who}: expected A and B of linear layers, got {', '.join(foreign[:4])}. Only ordinary LoRA is"
            " supported: merge the adapter with PEFT."
        )
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for key, match in adapter_keys.items():
        parts.setdefault(match["layer"], {})[match["part"]] = state[key]
    single = [layer for layer, both in parts.items() if len(both) < 2]
    if single:
        raise ValueError(
            f"{who}: expected A and B for every layer, got only one of the two for {', '.join(single[:4])}."
            " Copy the file again."
        )
    tensors = {}
    for key, value in state.items():
        if key not in adapter_keys:
            # A wrapped layer's weight is X.base_layer.weight; without the adapter it is called X.weight.
            stem, _, leaf = names[key].rpartition(f"{BASE}.")
            tensors[f"{stem}.{leaf}" if stem in parts else names[key]] = value
    return tensors, {layer: (both["A"], both["B"]) for layer, both in parts.items()}


def _read_config(path: Path) -> dict:
    if not path.is_file():
        # PEFT's full layout may come without this file.
        return {}
    try:
        config = json.loads(path.read_text())
        # rank and alpha are read; the rest only has to be supported.
        fits = isinstance(config, dict) and config["r"] >= 1 and config["lora_alpha"] > 0
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path.name}: expected PEFT's settings, got: {error!r}. Copy the file again."
        ) from None
    if not fits:
        raise ValueError(
            f"{path.name}: expected r >= 1 and lora_alpha > 0, got other values. Copy the file again."
        )
    # Settings that the file leaves out have PEFT's defaults, all of which are supported.
    for name, allowed in _SUPPORTED.items():
        if name in config and config[name] not in allowed:
            raise ValueError(
                f"{path.name}: expected {name} {allowed[0]!r}, got {config[name]!r}. Merge the adapter with"
                " PEFT."
            )
    return config


def load_weights(model: nn.Module, weights: Weights) -> nn.Module:
    """Load the content of a file into a network without adapters, in place, and return the network.

    Tensors that differ are replaced and keep the network's dtypes. No tensor is overwritten, so that networks
    which share them are not affected. If the file holds adapters, everything else is frozen.

    Raises: ValueError for missing, unexpected or misshapen tensors.
    """
    if adapted_layers(model):
        raise ValueError(
            f"{weights.source}: cannot be loaded into a network that has adapters. Pass the network's base."
        )
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, (A, B) in weights.adapters.items():
        layer = modules.get(name)
        got = f"[{len(B)}, {A.shape[1]}]"
        # B A must have the shape of the layer's weight, [out, in].
        expected = (
            f"[{layer.out_features}, {layer.in_features}]"
            if isinstance(layer, nn.Linear)
            else "not a linear layer of this network"
        )
        if expected != got:
            raise ValueError(
                f"{weights.source}: the adapter of {name} is {got}, but in this network the layer is"
                f" {expected}. Pass the network that the adapters were trained on."
            )
    # The full layout holds the base's tensors besides the adapters.
    if weights.tensors:
        replace_state(model, weights.tensors, weights.source)
    if weights.adapters:
        assert weights.alpha is not None
        # `read_weights` has checked that all adapters have the same rank.
        rank = len(next(iter(weights.adapters.values()))[0])
        with torch.no_grad():
            for name, layer in attach(model, weights.adapters, rank, weights.alpha, weights.dropout).items():
                layer.lora_A.weight.copy_(weights.adapters[name][0])
                layer.lora_B.weight.copy_(weights.adapters[name][1])
    return model


def replace_state(model: nn.Module, state: Mapping[str, torch.Tensor], who: str) -> None:
    """Replace a network's tensors by those of a state dict. Tensors that are equal keep their memory.

    Args: who: name that error messages begin with.
    """
    present = model.state_dict()
    check_fit(present, state, who)
    # Each tensor is moved to the device and dtype of the one that it replaces.
    new = {name: state[name].to(old) for name, old in present.items()}
    # Equal tensors stay the same memory, so a policy shares what tuning did not change with its base.
    merged = {k: present[k] if torch.equal(present[k], new[k]) else new[k] for k in present}
    model.load_state_dict(merged, assign=True)


def write_adapter(model: nn.Module, folder: str | Path, base: str | None = None) -> Path:
    """Write a network's adapters in PEFT's layout, each file atomically. Returns the folder.

    Args: base: PEFT's base_model_name_or_path.
    Raises: ValueError for a network without adapters, or with adapters of several ranks.
    """
    folder = Path(folder)
    layers = adapted_layers(model)
    kinds = {(layer.rank, layer.alpha, layer.dropout) for layer in layers.values()}
    if len(kinds) != 1:
        raise ValueError(
            f"write_adapter: expected adapters that share one rank, alpha and dropout, got {len(kinds)}"
            " combinations. Call add_lora once, on all target layers."
        )
    rank, alpha, dropout = kinds.pop()
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": rank,
        # PEFT declares lora_alpha as an integer
        "lora_alpha": int(alpha) if math.floor(alpha) == alpha else alpha,
        "lora_dropout": dropout,
        "target_modules": targets_of(model),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
    }
    # The weights come first, so that settings never describe missing weights.
    write(folder / ADAPTER, {f"{PREFIX}{name}": value for name, value in adapter_state(model).items()})
    write_atomic(folder / CONFIG, (json.dumps(config, indent=2) + "\n").encode())
    return folder


def targets_of(model: nn.Module) -> list[str]:
    """Return the names by which PEFT finds exactly the layers with adapters.

    These are last parts of names where they match only these layers, and otherwise full names.
    """
    layers = adapted_layers(model)
    short = sorted({name.rpartition(".")[2] for name in layers})
    inner = [f"{name}." for name in layers]
    # Modules that a short name must not match: all outside of the wrapped layers.
    others = [
        n
        for n, _ in model.named_modules(remove_duplicate=False)
        if n not in layers and not any(n.startswith(i) for i in inner)
    ]
    return sorted(layers) if any(matches(name, target) for name in others for target in short) else short


def write_merged(model: nn.Module, path: str | Path) -> Path:
    """Write a network as a state dict with merged adapters, in the base's dtypes. Returns the path.

    `lora.merge_rounding` measures what is lost by rounding.
    """
    write(Path(path), merged_state(model))
    return Path(path)


# Written beside the weights: the kind of policy and JSON values of the caller.
META = "policy.json"


def shared_copy(model: nn.Module) -> nn.Module:
    """Return a frozen copy of a network whose parameters and buffers share the memory of the original.

    It is meant for adapters, which leave the base unchanged. To train all weights, use copy.deepcopy.
    """
    # deepcopy takes objects from its memo instead of copying them: modules are new, tensors are shared.
    memo: dict[int, object] = {
        id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()
    }
    memo |= {id(b): b.detach() for b in model.buffers()}
    return copy.deepcopy(model, memo)


def tuned_model(
    base: nn.Module, weights: str | Path, *, alpha: float | None = None, merge: bool = False
) -> nn.Module:
    """Apply a file or folder of weights to a base. Returns the network frozen, in eval mode.

    The base is not changed. Tensors that tuning has not changed share the base's memory.

    Args:
        weights: adapters or a full state dict, in any layout above.
        alpha: see `read_weights`.
        merge: merge adapters into the weights, so that others can be added. A later round starts from there.
    Raises: FileNotFoundError; ValueError for the weights of another network.
    """
    model = load_weights(shared_copy(base), read_weights(weights, alpha))
    if merge and adapted_layers(model):
        # A network that has adapters cannot take further ones, so the merged weights go into a fresh copy.
        state = merged_state(model)
        model = shared_copy(base)
        replace_state(model, state, str(weights))
    return model.eval().requires_grad_(False)


def save_policy(model: nn.Module, folder: str | Path, meta: Mapping) -> Path:
    """Write a tuned network to a folder: its adapters if it has any, else the full network. Returns the
    folder.

    Equal networks give equal bytes.

    Args: meta: JSON values for policy.json, such as the hash of the base, the step and the settings.
    Raises: ValueError for values that JSON cannot represent, or weights that are not finite.
    """
    folder = Path(folder)
    adapted = bool(adapted_layers(model))
    # A run that diverged must not write a policy.
    check_finite(model.state_dict(), "save_policy")
    try:
        text = json.dumps(
            {"kind": "adapters" if adapted else "full", "meta": dict(meta)}, indent=1, sort_keys=True
        )
    except TypeError as error:
        raise ValueError(
            f"save_policy(meta): expected JSON values, got: {error}. Convert tensors and paths first."
        ) from None
    if adapted:
        write_adapter(model, folder)
    else:
        write_merged(model, folder / MODEL)
    # A folder that held the other kind before must not keep both: readers would not know which one to use.
    for stale in [MODEL] if adapted else [ADAPTER, CONFIG]:
        (folder / stale).unlink(missing_ok=True)
    # Written last: a folder with policy.json is complete.
    write_atomic(folder / META, (text + "\n").encode())
    return folder


def link(source: Path, target: Path) -> None:
    """Create a hard link to a file, or a copy where the file system has none. Replaces an existing target."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        # Other disks and some file systems do not support hard links.
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


def link_folder(source: Path, target: Path) -> None:
    """Link all files of a folder at another place; see `link`. If both are the same folder, nothing
    happens.
    """
    # Sorted, so that the order of writing does not depend on the file system.
    for file in sorted(path for path in source.rglob("*") if path.is_file() and source != target):
        link(file, target / file.relative_to(source))
