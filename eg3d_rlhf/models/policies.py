"""Files of networks and adapters, plain state dicts and both layouts that PEFT writes; tuned networks, which
are kept in folders of them, put on the base that they were tuned from, and swapped into a pipeline for a
while.

    plain          X.weight, X.bias
                   stock networks; adapters merged, or everything trained
    PEFT, full     base_model.model.X.base_layer.weight, X.lora_A.default.weight
                   state dict of a wrapped network (DSO's checkpoints)
    PEFT, adapter  base_model.model.X.lora_A.weight
                   adapter_model.safetensors beside adapter_config.json

The name that PEFT gives an adapter ("default") may be any one name, or none. The full layout does not hold
alpha: it is asked for.
A folder of a tuned network also has policy.json.
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
FILES = (ADAPTER, "adapter_model.bin", MODEL)  # looked for in a folder
Adapters = dict[str, tuple[torch.Tensor, torch.Tensor]]  # by layer: A [rank, in], B [out, rank]
_PART = re.compile(r"(?P<layer>.+)\.lora_(?P<part>[AB])(?:\.(?P<adapter>[^.]+))?\.weight")
_FOREIGN = re.compile(r"\.(lora_\w+|modules_to_save|original_module|ia3_\w+|vera_\w+)(\.|$)")
# PEFT's ways to start adapters that leave the base as it is
_PLAIN_START = (True, False, "gaussian", "orthogonal", "eva")
_UNSUPPORTED = {  # of PEFT's settings: what they must be here, where they are stated
    "peft_type": ("LORA",),
    "use_dora": (False,),
    "use_rslora": (False,),
    "fan_in_fan_out": (False,),
    "bias": ("none",),
    "lora_bias": (False,),
    "modules_to_save": (None, []),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "init_lora_weights": _PLAIN_START,
    "trainable_token_indices": (None,),
    "target_parameters": (None, []),
}


@dataclass(frozen=True, kw_only=True)
class Weights:
    """What a file holds, by the names of the network without adapters."""

    source: str  # file name, for messages
    plain: dict[str, torch.Tensor]  # the network's own tensors; none where the file holds adapters alone
    adapters: Adapters
    alpha: float | None  # None without adapters
    dropout: float = 0.0


def read_weights(path: str | Path, alpha: float | None = None) -> Weights:
    """Read a file of any layout above, or the folder that holds it.

    Args: alpha: of PEFT's full layout without an adapter_config.json beside it (DSO trained with twice the
        rank).
    Raises: FileNotFoundError; ValueError for what is damaged, foreign, not finite, or uses what this package
        has not.
    """
    file = Path(path)
    if not file.is_file():
        files = [file / name for name in FILES if (file / name).is_file()]
        if not files:
            raise FileNotFoundError(
                f"{path}: expected weights or a folder with {', '.join(FILES)}, got none. Check the path."
            )
        if len(files) > 1:
            names = " and ".join(f.name for f in files)
            raise ValueError(
                f"{path}: expected one file of weights, got {names}. Name the file instead of its folder."
            )
        file = files[0]
    state = read(file, "weights")
    check_finite(state, file.name)
    plain, adapters = split_state(state, file.name)
    if not adapters:
        return Weights(source=file.name, plain=plain, adapters={}, alpha=None)
    config = _read_config(file.with_name(CONFIG))
    stated = config.get("lora_alpha", alpha)
    if stated is None:
        raise ValueError(
            f"{file.name}: expected {CONFIG} beside adapters or their alpha given, got neither. Give alpha"
            " (DSO: 2 x rank)."
        )
    if alpha is not None and alpha != stated:
        raise ValueError(f"{file.name}: expected alpha {stated} as in {CONFIG}, got {alpha}. Leave it out.")
    ranks = {n for A, B in adapters.values() for n in (A.shape[0], B.shape[-1])} | (
        {config["r"]} if config else set()
    )
    if len(ranks) > 1 or any(A.ndim != 2 or B.ndim != 2 for A, B in adapters.values()):
        got = f"ranks {sorted(ranks)}"
        raise ValueError(
            f"{file.name}: expected adapters of linear layers, all of one rank, got {got}. Merge them in"
            " PEFT."
        )
    return Weights(
        source=file.name,
        plain=plain,
        adapters=adapters,
        alpha=float(stated),
        dropout=float(config.get("lora_dropout", 0.0)),
    )


def split_state(state: Mapping[str, torch.Tensor], who: str) -> tuple[dict[str, torch.Tensor], Adapters]:
    """The network's own tensors and the adapters of a state dict in any layout ->
    (by plain name, by layer).
    """
    wrapper = "module." if all(key.startswith("module.") for key in state) else ""  # of distributed training
    names = {key: key.removeprefix(wrapper).removeprefix(PREFIX) for key in state}
    adapter_keys = {key: match for key, name in names.items() if (match := _PART.fullmatch(name))}
    called = sorted({match["adapter"] or "" for match in adapter_keys.values()})
    if len(called) > 1:
        raise ValueError(
            f"{who}: expected one adapter, got those named {', '.join(called)}. Save the one to use alone."
        )
    foreign = [key for key in state if key not in adapter_keys and _FOREIGN.search(names[key])]
    if foreign:
        raise ValueError(
            f"{who}: expected A and B of linear layers, got {', '.join(foreign[:4])}. Only plain LoRA is"
            " read."
        )
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for key, match in adapter_keys.items():
        parts.setdefault(match["layer"], {})[match["part"]] = state[key]
    single = [layer for layer, both in parts.items() if len(both) < 2]
    if single:
        raise ValueError(
            f"{who}: expected A and B of every layer, got one of them at {', '.join(single[:4])}. Copy the"
            " file again."
        )
    plain = {}
    for key, value in state.items():
        if key not in adapter_keys:
            stem, _, leaf = names[key].rpartition(f"{BASE}.")
            plain[f"{stem}.{leaf}" if stem in parts else names[key]] = value
    return plain, {layer: (both["A"], both["B"]) for layer, both in parts.items()}


def _read_config(path: Path) -> dict:
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text())
        fits = isinstance(config, dict) and config["r"] >= 1 and config["lora_alpha"] > 0
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path.name}: expected PEFT's settings, got: {error!r}. Copy it again.") from None
    if not fits:
        raise ValueError(f"{path.name}: expected r >= 1 and lora_alpha > 0, got others. Copy it again.")
    for name, allowed in _UNSUPPORTED.items():
        if name in config and config[name] not in allowed:
            raise ValueError(
                f"{path.name}: expected {name} {allowed[0]!r}, got {config[name]!r}. Merge it in PEFT."
            )
    return config


def load_weights(model: nn.Module, weights: Weights) -> nn.Module:
    """Give a network without adapters what a file holds, in place; returns it.

    Tensors of the network that differ are replaced, in their types; none is written into, so that networks
    which share them are left alone. Where adapters are added, everything else is frozen.
    Raises: ValueError for missing, unexpected or misshapen tensors.
    """
    if adapted_layers(model):
        raise ValueError(
            f"{weights.source}: expected a network without adapters to load into, got one with. Give its"
            " base."
        )
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, (A, B) in weights.adapters.items():
        layer = modules.get(name)
        got = f"[{len(B)}, {A.shape[1]}]"
        expected = (
            f"[{layer.out_features}, {layer.in_features}]"
            if isinstance(layer, nn.Linear)
            else "no linear layer of that name"
        )
        if expected != got:
            raise ValueError(
                f"{weights.source}: expected adapters of this network, whose {name} is {expected}, got {got}."
                " Give their own base."
            )
    if weights.plain:
        replace_state(model, weights.plain, weights.source)
    if weights.adapters:
        assert weights.alpha is not None
        rank = len(next(iter(weights.adapters.values()))[0])  # all alike
        with torch.no_grad():
            for name, layer in attach(model, weights.adapters, rank, weights.alpha, weights.dropout).items():
                layer.lora_A.weight.copy_(weights.adapters[name][0])
                layer.lora_B.weight.copy_(weights.adapters[name][1])
    return model


def replace_state(model: nn.Module, state: Mapping[str, torch.Tensor], who: str) -> None:
    """Put a state dict in place of a network's own; equal ones keep the memory they had."""
    own = model.state_dict()
    check_fit(own, state, who)
    new = {name: state[name].to(old) for name, old in own.items()}  # onto its device, in its type
    model.load_state_dict({k: own[k] if torch.equal(own[k], new[k]) else new[k] for k in own}, assign=True)


def write_adapter(model: nn.Module, folder: str | Path, base: str | None = None) -> Path:
    """Write a network's adapters as PEFT reads them, each file atomically; returns the folder.

    Args: base: what PEFT calls base_model_name_or_path.
    Raises: ValueError for a network without adapters, or with adapters of several ranks.
    """
    folder = Path(folder)
    layers = adapted_layers(model)
    kinds = {(layer.rank, layer.alpha, layer.dropout) for layer in layers.values()}
    if len(kinds) != 1:
        raise ValueError(
            f"write_adapter: expected adapters of one kind, got {len(kinds)} kinds. Call add_lora first."
        )
    rank, alpha, dropout = kinds.pop()
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": int(alpha) if math.floor(alpha) == alpha else alpha,
        "lora_dropout": dropout,
        "target_modules": targets_of(model),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
    }
    write(folder / ADAPTER, {f"{PREFIX}{name}": value for name, value in adapter_state(model).items()})
    write_atomic(folder / CONFIG, (json.dumps(config, indent=2) + "\n").encode())
    return folder


def targets_of(model: nn.Module) -> list[str]:
    """Names by which PEFT finds the layers with adapters: last parts where they mean just these, else whole
    names.
    """
    layers = adapted_layers(model)
    short = sorted({name.rpartition(".")[2] for name in layers})
    inner = [f"{name}." for name in layers]
    others = [
        n
        for n, _ in model.named_modules(remove_duplicate=False)
        if n not in layers and not any(n.startswith(i) for i in inner)
    ]
    return sorted(layers) if any(matches(name, target) for name in others for target in short) else short


def write_merged(model: nn.Module, path: str | Path) -> Path:
    """Write a network as a plain state dict, adapters merged, in the base's types; returns the path. See
    lora.merge_rounding.
    """
    write(Path(path), merged_state(model))
    return Path(path)


META = "policy.json"


def shared_copy(model: nn.Module) -> nn.Module:
    """A frozen network like `model` whose parameters and buffers are the same memory: for adapters, which
    leave the base alone.

    To train it without adapters, use copy.deepcopy.
    """
    memo: dict[int, object] = {
        id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()
    }
    memo |= {id(b): b.detach() for b in model.buffers()}
    return copy.deepcopy(model, memo)


def tuned_model(
    base: nn.Module, weights: str | Path, *, alpha: float | None = None, merge: bool = False
) -> nn.Module:
    """The network that a file or folder of weights makes of a base; frozen, in eval mode. The base is left as
    it is.

    Tensors that tuning has not changed are the base's own memory.

    Args:
        weights: adapters or a full state dict, in any layout above; alpha: see read_weights.
        merge: work adapters into the weights, so that others can be added: a later round starts from there.
    Raises: FileNotFoundError; ValueError for weights of another network.
    """
    model = load_weights(shared_copy(base), read_weights(weights, alpha))
    if merge and adapted_layers(model):
        state = merged_state(model)
        model = shared_copy(base)
        replace_state(model, state, str(weights))
    return model.eval().requires_grad_(False)


def save_policy(model: nn.Module, folder: str | Path, meta: Mapping) -> Path:
    """Write a tuned network: its adapters if it has any, else all of it; returns the folder. Equal networks
    give equal bytes.

    Args: meta: JSON values for policy.json, such as the hash of the base, the step, the settings.
    Raises: ValueError for values that JSON cannot hold, or numbers that are not finite.
    """
    folder = Path(folder)
    adapted = bool(adapted_layers(model))
    check_finite(model.state_dict(), "save_policy")
    try:
        text = json.dumps(
            {"kind": "adapters" if adapted else "full", "meta": dict(meta)}, indent=1, sort_keys=True
        )
    except TypeError as error:
        raise ValueError(
            f"save_policy(meta): expected plain JSON values, got: {error}. Convert tensors and paths first."
        ) from None
    if adapted:
        write_adapter(model, folder)
    else:
        write_merged(model, folder / MODEL)
    for stale in [MODEL] if adapted else [ADAPTER, CONFIG]:
        (folder / stale).unlink(missing_ok=True)
    write_atomic(folder / META, (text + "\n").encode())
    return folder


def link(source: Path, target: Path) -> None:
    """The same file at another place: linked, or copied where the disk is another or has no links. What was
    there goes.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


def link_folder(source: Path, target: Path) -> None:
    """All files of a folder at another place; see `link`. One that is there already stays."""
    for file in sorted(path for path in source.rglob("*") if path.is_file() and source != target):
        link(file, target / file.relative_to(source))
