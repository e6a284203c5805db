"""Read and write the files of tuned networks and of adapters.

A policy is a tuned flow model. It is stored in a folder, either as a complete network or as low-rank adapters
(see lora.py) for the base network that was tuned. Files of three layouts can be read. X stands for the name
of a layer:

    network        X.weight, X.bias
                   complete network: not tuned, tuned in all weights, or with merged adapters
    PEFT, full     base_model.model.X.base_layer.weight, X.lora_A.default.weight
                   state dict of a network with adapters of the library PEFT (for example DSO's checkpoints)
    PEFT, adapter  base_model.model.X.lora_A.weight
                   adapters alone: adapter_model.safetensors beside adapter_config.json

PEFT puts the name of the adapter ("default") into the keys. It may be another name, or be missing. The layout
"PEFT, full" does not contain alpha, so the caller has to pass it. The folder of a policy also has
policy.json.
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
from eg3d_rlhf.models.lora_settings import POLICY_FILE
from eg3d_rlhf.models.weights import check_finite, read, write
from training.storage import check_fit, write_atomic

PREFIX = "base_model.model."  # what PEFT puts before all names
ADAPTER = "adapter_model.safetensors"  # PEFT's file of adapters
CONFIG = "adapter_config.json"  # PEFT's file of settings
MODEL = "model.safetensors"  # file of a complete network
FILES = (ADAPTER, "adapter_model.bin", MODEL)  # names of the files of weights that a folder may contain
Adapters = dict[str, tuple[torch.Tensor, torch.Tensor]]  # by layer: A [rank, in] and B [out, rank]
# Names of the matrices of an adapter, for example blocks.0.to_q.lora_A.default.weight
_PART = re.compile(r"(?P<layer>.+)\.lora_(?P<part>[AB])(?:\.(?P<adapter>[^.]+))?\.weight")
# Names of entries that belong to other kinds of PEFT adapters
_FOREIGN = re.compile(r"\.(lora_\w+|modules_to_save|original_module|ia3_\w+|vera_\w+)(\.|$)")
# PEFT's initialisations that do not change the base's weights.
_BASE_UNCHANGED = (True, False, "gaussian", "orthogonal", "eva")
_SUPPORTED = {  # PEFT's settings, and the values that are supported here if the file contains the setting
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
    """Content of a file of weights, with the names of the network without adapters."""

    source: str  # name of the file, for error messages
    tensors: dict[str, torch.Tensor]  # tensors of the network; empty if the file contains only adapters
    adapters: Adapters  # adapters by layer; empty if the file has none
    # Scale of the adapters, whose update is multiplied by alpha / rank; None without adapters
    alpha: float | None
    dropout: float = 0.0  # dropout with which the adapters were trained, 0..1


def read_weights(path: str | Path, alpha: float | None = None) -> Weights:
    """Read a file of weights in any of the layouts of this module.

    Args:
        path: file, or a folder that contains exactly one such file.
        alpha: scale of the adapters. It is needed for adapters without an adapter_config.json beside the file
            (for DSO's checkpoints, twice the rank).

    Raises: FileNotFoundError if there is no such file; ValueError for a file that is damaged, contains values
        that are not finite, or uses a feature of PEFT that is not supported.
    """
    weight_file = Path(path)
    if not weight_file.is_file():
        weight_files = [weight_file / file_name for file_name in FILES if (weight_file / file_name).is_file()]
        if not weight_files:
            raise FileNotFoundError(
                f"{path}: no weights were found there. Pass a file of weights or a folder with one of"
                f" {', '.join(FILES)}."
            )
        # Several files may contain different weights, for example adapters and a merged network.
        if len(weight_files) > 1:
            file_names = " and ".join(weights_file.name for weights_file in weight_files)
            raise ValueError(
                f"{path}: the folder contains several files of weights: {file_names}. Pass the path of one"
                " file."
            )
        weight_file = weight_files[0]
    # `read` executes no code from the file.
    state_dict = read(weight_file, "weights")
    check_finite(state_dict, weight_file.name)
    tensors, adapters = split_state(state_dict, weight_file.name)
    if not adapters:
        return Weights(source=weight_file.name, tensors=tensors, adapters={}, alpha=None)
    peft_config = _read_config(weight_file.with_name(CONFIG))
    # The argument is used only if there is no settings file.
    used_alpha = peft_config.get("lora_alpha", alpha)
    if used_alpha is None:
        raise ValueError(
            f"{weight_file.name}: the adapters' alpha is unknown, because there is no {CONFIG} beside the"
            f" file. Copy {CONFIG} into its folder, or state the scale (flow export: --set alpha=NUMBER;"
            " for DSO's checkpoints, twice the rank)."
        )
    if alpha is not None and alpha != used_alpha:
        raise ValueError(
            f"{weight_file.name}: the argument `alpha` is {alpha}, but {CONFIG} states {used_alpha}. Leave"
            " out the argument, so that the value of the file is used."
        )
    # The rank is the number of rows of A and of columns of B. The settings state it, too.
    ranks = {peft_config["r"]} if peft_config else set()
    for A, B in adapters.values():
        ranks |= {A.shape[0], B.shape[-1]}
    if any(A.ndim != 2 or B.ndim != 2 for A, B in adapters.values()):
        raise ValueError(
            f"{weight_file.name}: only adapters of linear layers are supported, but some of the tensors A and"
            " B are not matrices. Merge the adapters with PEFT."
        )
    if len(ranks) > 1:
        raise ValueError(
            f"{weight_file.name}: all adapters must have the same rank, but the ranks are {sorted(ranks)}."
            " Merge the adapters with PEFT."
        )
    return Weights(
        source=weight_file.name,
        tensors=tensors,
        adapters=adapters,
        alpha=float(used_alpha),
        dropout=float(peft_config.get("lora_dropout", 0.0)),
    )


def split_state(state_dict: Mapping[str, torch.Tensor], who: str) -> tuple[dict[str, torch.Tensor], Adapters]:
    """Split a state dict of any layout into the tensors of the network and its adapters.

    Args:
        state_dict: state dict.
        who: name that error messages begin with.

    Returns: the tensors with the names of the network without adapters, and the adapters by layer.
    Raises: ValueError for several adapters, other kinds of adapters, and adapters of which a matrix is
        missing.
    """
    # torch's distributed wrapper puts "module." before every name.
    wrapper_prefix = "module." if all(state_key.startswith("module.") for state_key in state_dict) else ""
    base_name_by_key = {
        state_key: state_key.removeprefix(wrapper_prefix).removeprefix(PREFIX) for state_key in state_dict
    }
    match_by_key = {
        state_key: part_match
        for state_key, base_name in base_name_by_key.items()
        if (part_match := _PART.fullmatch(base_name))
    }
    # The group is None in a file that does not contain the name of the adapter.
    adapter_names = sorted({part_match["adapter"] or "" for part_match in match_by_key.values()})
    if len(adapter_names) > 1:
        raise ValueError(
            f"{who}: the file contains several adapters: {', '.join(adapter_names)}. Save only the adapter"
            " that is to be used."
        )
    # For example the magnitudes of DoRA
    foreign_keys = [
        state_key
        for state_key in state_dict
        if state_key not in match_by_key and _FOREIGN.search(base_name_by_key[state_key])
    ]
    if foreign_keys:
        raise ValueError(
            f"{who}: only LoRA adapters with A and B are supported, but the file contains"
            f" {', '.join(foreign_keys[:4])}. Merge the adapter with PEFT."
        )
    matrices_by_layer: dict[str, dict[str, torch.Tensor]] = {}  # by layer: the matrices "A" and "B"
    for state_key, part_match in match_by_key.items():
        matrices_by_layer.setdefault(part_match["layer"], {})[part_match["part"]] = state_dict[state_key]
    incomplete_layers = [
        layer_name for layer_name, layer_matrices in matrices_by_layer.items() if len(layer_matrices) < 2
    ]
    if incomplete_layers:
        raise ValueError(
            f"{who}: an adapter needs the matrices A and B, but one of them is missing for the layers"
            f" {', '.join(incomplete_layers[:4])}. Copy the file again."
        )
    tensors = {}
    for state_key, tensor in state_dict.items():
        if state_key not in match_by_key:
            # X.base_layer.weight, the weight of a layer with an adapter, is X.weight in the base network.
            layer_name, _, parameter_name = base_name_by_key[state_key].rpartition(f"{BASE}.")
            tensors[
                f"{layer_name}.{parameter_name}"
                if layer_name in matrices_by_layer
                else base_name_by_key[state_key]
            ] = tensor
    adapters = {
        layer_name: (layer_matrices["A"], layer_matrices["B"])
        for layer_name, layer_matrices in matrices_by_layer.items()
    }
    return tensors, adapters


def _read_config(path: Path) -> dict:
    """Read PEFT's settings of adapters. Returns an empty dictionary if the file does not exist.

    Raises: ValueError if the file is damaged or contains a setting that is not supported.
    """
    if not path.is_file():
        # Files of the layout "PEFT, full" may have no settings beside them.
        return {}
    try:
        peft_config = json.loads(path.read_text())
        is_valid = isinstance(peft_config, dict) and peft_config["r"] >= 1 and peft_config["lora_alpha"] > 0
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path.name}: this file does not contain PEFT's settings ({error!r}). Copy the file again."
        ) from None
    if not is_valid:
        raise ValueError(
            f"{path.name}: the settings must be an object with r >= 1 and lora_alpha > 0. Copy the file"
            " again."
        )
    # Settings that the file does not contain have PEFT's defaults, all of which are supported.
    for setting_name, supported_values in _SUPPORTED.items():
        if setting_name in peft_config and peft_config[setting_name] not in supported_values:
            raise ValueError(
                f"{path.name}: {setting_name} must be {supported_values[0]!r}, got"
                f" {peft_config[setting_name]!r}, which is not supported. Merge the adapter with PEFT."
            )
    return peft_config


def load_weights(model: nn.Module, weights: Weights) -> nn.Module:
    """Load the content of a file into a network without adapters, in place, and return the network.

    Tensors that differ are replaced by new tensors of the same dtype. No tensor is overwritten, so networks
    that share tensors with this network are not affected. If the file contains adapters, all other parameters
    are frozen.

    Args:
        model: network without adapters.
        weights: content of a file, see `read_weights`.

    Raises: ValueError if the network has adapters, or for tensors that are missing, superfluous or of another
        shape.
    """
    if adapted_layers(model):
        raise ValueError(
            f"{weights.source}: the weights cannot be loaded into a network that has adapters. Pass a network"
            " without adapters."
        )
    modules_by_name = dict(model.named_modules(remove_duplicate=False))
    for layer_name, (A, B) in weights.adapters.items():
        layer = modules_by_name.get(layer_name)
        if not isinstance(layer, nn.Linear):
            raise ValueError(
                f"{weights.source}: {layer_name} has an adapter, but is not a linear layer of this network."
                " Pass the network with which the adapters were trained."
            )
        # B A must have the shape of the layer's weight, [out, in].
        if (layer.out_features, layer.in_features) != (len(B), A.shape[1]):
            raise ValueError(
                f"{weights.source}: the adapter of {layer_name} has the shape [{len(B)}, {A.shape[1]}], but"
                f" the layer of this network has [{layer.out_features}, {layer.in_features}]. Pass the"
                " network with which the adapters were trained."
            )
    # Files of the layout "PEFT, full" contain the tensors of the base network, too.
    if weights.tensors:
        replace_state(model, weights.tensors, weights.source)
    if weights.adapters:
        assert weights.alpha is not None
        # `read_weights` has checked that all adapters have the same rank.
        rank = len(next(iter(weights.adapters.values()))[0])
        with torch.no_grad():
            for layer_name, layer in attach(
                model, weights.adapters, rank, weights.alpha, weights.dropout
            ).items():
                layer.lora_A.weight.copy_(weights.adapters[layer_name][0])
                layer.lora_B.weight.copy_(weights.adapters[layer_name][1])
    return model


def replace_state(model: nn.Module, state_dict: Mapping[str, torch.Tensor], who: str) -> None:
    """Replace the tensors of a network by those of a state dict, without overwriting their memory.

    Tensors that are equal are not replaced. A policy therefore shares all tensors with its base that the
    tuning did not change.

    Args:
        model: network, changed in place.
        state_dict: state dict.
        who: name that error messages begin with.

    Raises: ValueError for tensors that are missing, superfluous or of another shape.
    """
    present_state = model.state_dict()
    check_fit(present_state, state_dict, who)
    new_state = {}
    for tensor_name, present_tensor in present_state.items():
        new_tensor = state_dict[tensor_name].to(
            present_tensor
        )  # to the device and dtype of the present tensor
        new_state[tensor_name] = present_tensor if torch.equal(present_tensor, new_tensor) else new_tensor
    # assign=True: the network refers to these tensors and does not copy them.
    model.load_state_dict(new_state, assign=True)


def write_adapter(model: nn.Module, folder: str | Path, base_name: str | None = None) -> Path:
    """Write the adapters of a network in PEFT's layout, and return the folder.

    Each file is written atomically.

    Args:
        model: network with adapters.
        folder: folder for adapter_model.safetensors and adapter_config.json.
        base_name: value of PEFT's setting base_model_name_or_path, the name of the base network.

    Raises: ValueError for a network without adapters, or with adapters of different rank, alpha or dropout.
    """
    folder = Path(folder)
    layers = adapted_layers(model)
    settings_combinations = {(layer.rank, layer.alpha, layer.dropout) for layer in layers.values()}
    if len(settings_combinations) != 1:
        raise ValueError(
            "write_adapter: all adapters must have the same rank, alpha and dropout, but the network has"
            f" {len(settings_combinations)} combinations of them. Use add_lora once, for all target layers."
        )
    rank, alpha, dropout = settings_combinations.pop()
    peft_config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base_name,
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
    # The weights are written first, so that the settings never exist without their weights.
    write(
        folder / ADAPTER,
        {f"{PREFIX}{tensor_name}": tensor for tensor_name, tensor in adapter_state(model).items()},
    )
    write_atomic(folder / CONFIG, (json.dumps(peft_config, indent=2) + "\n").encode())
    return folder


def targets_of(model: nn.Module) -> list[str]:
    """Return the names of target layers by which PEFT finds exactly the layers with adapters.

    These are the last parts of the layers' names, if they match no other layer, and otherwise the full names.
    """
    layers = adapted_layers(model)
    short_names = sorted({layer_name.rpartition(".")[2] for layer_name in layers})
    inner_prefixes = [f"{layer_name}." for layer_name in layers]
    # Modules that a short name must not match: all but the layers
    # with adapters and the modules inside of them
    other_modules = [
        layer_name
        for layer_name, _ in model.named_modules(remove_duplicate=False)
        if layer_name not in layers and not any(layer_name.startswith(prefix) for prefix in inner_prefixes)
    ]
    is_ambiguous = any(matches(layer_name, target) for layer_name in other_modules for target in short_names)
    return sorted(layers) if is_ambiguous else short_names


def write_merged(model: nn.Module, path: str | Path) -> Path:
    """Write the state dict of a network with merged adapters, and return the path.

    The dtypes are those of the base network. `lora.merge_rounding` measures the rounding error.

    Args:
        model: network with adapters.
        path: .safetensors file to write.
    """
    write(Path(path), merged_state(model))
    return Path(path)


# File beside the weights, with the kind of policy ("adapters" or "full") and values of the caller
META = POLICY_FILE


def shared_copy(model: nn.Module) -> nn.Module:
    """Return a copy of a network whose parameters and buffers share the memory of the original.

    The parameters of the copy have no gradient. The copy is meant for adapters, which do not change the base.
    To train all weights, use copy.deepcopy.
    """
    # deepcopy does not copy an object whose id is in its memo, but takes the value of the memo. Modules are
    # therefore new, and tensors are shared.
    memo: dict[int, object] = {
        id(parameter): nn.Parameter(parameter.detach(), requires_grad=False)
        for parameter in model.parameters()
    }
    memo |= {id(buffer): buffer.detach() for buffer in model.buffers()}
    return copy.deepcopy(model, memo)


def tuned_model(
    base: nn.Module, weights_path: str | Path, *, alpha: float | None = None, merge: bool = False
) -> nn.Module:
    """Apply a file or folder of weights to a base network.

    The base network is not changed. Tensors that the tuning did not change share its memory.

    Args:
        base: network without adapters.
        weights_path: file or folder of adapters or of a complete network, see `read_weights`.
        alpha: scale of the adapters, see `read_weights`.
        merge: True merges adapters into the weights, so that further adapters can be added to the result.

    Returns: a new network in evaluation mode, without gradients of its parameters.
    Raises: FileNotFoundError if there are no weights; ValueError for the weights of another network.
    """
    model = load_weights(shared_copy(base), read_weights(weights_path, alpha))
    if merge and adapted_layers(model):
        # The merged weights are loaded into a new copy of the base, which has no adapters.
        merged_tensors = merged_state(model)
        model = shared_copy(base)
        replace_state(model, merged_tensors, str(weights_path))
    return model.eval().requires_grad_(False)


def save_policy(model: nn.Module, folder: str | Path, meta: Mapping) -> Path:
    """Write a tuned network to a folder, and return the folder.

    If the network has adapters, only these are written; otherwise the complete network is written. Equal
    networks give equal bytes.

    Args:
        model: tuned network.
        folder: folder of the policy.
        meta: JSON values for policy.json, such as the hash of the base, the step and the settings.

    Raises: ValueError for values that JSON cannot represent, or weights that are not finite.
    """
    folder = Path(folder)
    has_adapters = bool(adapted_layers(model))
    # Weights that are not finite come from a run that diverged.
    check_finite(model.state_dict(), "save_policy")
    try:
        policy_json = json.dumps(
            {"kind": "adapters" if has_adapters else "full", "meta": dict(meta)}, indent=1, sort_keys=True
        )
    except TypeError as error:
        raise ValueError(
            f"save_policy: meta must contain only JSON values ({error}). Convert tensors and paths first."
        ) from None
    if has_adapters:
        write_adapter(model, folder)
    else:
        write_merged(model, folder / MODEL)
    # An earlier policy in this folder may have been a complete network if this one has adapters, and the
    # other way round. `read_weights` rejects a folder that contains a complete network and adapters.
    for obsolete_file in [MODEL] if has_adapters else [ADAPTER, CONFIG]:
        (folder / obsolete_file).unlink(missing_ok=True)
    # policy.json is written last, so that a folder with this file is complete.
    write_atomic(folder / META, (policy_json + "\n").encode())
    return folder


def link(source_path: Path, target_path: Path) -> None:
    """Create a hard link to a file at the path `target_path`. An existing file at this path is replaced.

    If the file system does not support the link, the file is copied.

    Args:
        source_path: existing file.
        target_path: path of the link.
    """
    target_path.parent.mkdir(parents=True, exist_ok=True)
    target_path.unlink(missing_ok=True)
    try:
        os.link(source_path.resolve(), target_path)
    except OSError:
        # A hard link cannot lead to another disk, and some file systems have none.
        shutil.copyfile(source_path, target_path)


def link_folder(source_folder: Path, target_folder: Path) -> None:
    """Create links to all files of the folder `source_folder` in the folder `target_folder`, see `link`.

    Subfolders are included. If the two paths are equal, nothing is done.

    Args:
        source_folder: folder of the files.
        target_folder: folder in which the links are created.
    """
    if source_folder == target_folder:
        return
    # Sorted, so that the order of writing does not depend on the file system.
    for source_file in sorted(path for path in source_folder.rglob("*") if path.is_file()):
        link(source_file, target_folder / source_file.relative_to(source_folder))
