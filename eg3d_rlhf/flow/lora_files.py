"""Files of networks and adapters: plain state dicts, and both layouts that PEFT writes.

    plain          X.weight, X.bias                                                  stock networks; adapters merged, or everything trained
    PEFT, full     base_model.model.X.base_layer.weight, X.lora_A.default.weight     state dict of a wrapped network (DSO's checkpoints)
    PEFT, adapter  base_model.model.X.lora_A.weight                                  adapter_model.safetensors beside adapter_config.json

The name that PEFT gives an adapter ("default") may be any one name, or none. The full layout does not hold alpha: it is asked for.
"""

import json
import math
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import nn

from eg3d_rlhf.flow.lora import BASE, adapted_layers, adapter_state, attach, matches, merged_state
from eg3d_rlhf.reward.reward import check_state
from training.storage import write_atomic

PREFIX = "base_model.model."
ADAPTER, CONFIG, MODEL = "adapter_model.safetensors", "adapter_config.json", "model.safetensors"
FILES = (ADAPTER, "adapter_model.bin", MODEL)  # looked for in a folder
Adapters = dict[str, tuple[torch.Tensor, torch.Tensor]]  # by layer: A [rank, in], B [out, rank]
_PART = re.compile(r"(?P<layer>.+)\.lora_(?P<part>[AB])(?:\.(?P<adapter>[^.]+))?\.weight")
_FOREIGN = re.compile(r"\.(lora_\w+|modules_to_save|original_module|ia3_\w+|vera_\w+)(\.|$)")
_PLAIN_START = (True, False, "gaussian", "orthogonal", "eva")  # PEFT's ways to start adapters that leave the base as it is
_UNSUPPORTED = {  # of PEFT's settings: what they must be here, where they are stated
    "peft_type": ("LORA",), "use_dora": (False,), "use_rslora": (False,), "fan_in_fan_out": (False,), "bias": ("none",),
    "lora_bias": (False,), "modules_to_save": (None, []), "rank_pattern": ({}, None), "alpha_pattern": ({}, None),
    "init_lora_weights": _PLAIN_START, "trainable_token_indices": (None,), "target_parameters": (None, []),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Weights:
    """What a file holds, by the names of the network without adapters."""

    source: str  # file name, for messages
    plain: dict[str, torch.Tensor]  # the network's own tensors; none where the file holds adapters alone
    adapters: Adapters
    alpha: float | None  # None without adapters
    dropout: float = 0.0

    @property
    def rank(self) -> int:
        """Of the adapters, all alike."""
        return len(next(iter(self.adapters.values()))[0])


def read_weights(path: str | Path, alpha: float | None = None) -> Weights:
    """Read a file of any layout above, or the folder that holds it.

    Args: alpha: of PEFT's full layout without an adapter_config.json beside it (DSO trained with twice the rank).
    Raises: FileNotFoundError; ValueError for what is damaged, foreign, not finite, or uses what this package has not.
    """
    file = _file_of(Path(path))
    plain, adapters = split_state(read_state(file), file.name)
    if not adapters:
        return Weights(source=file.name, plain=plain, adapters={}, alpha=None)
    config = _read_config(file.with_name(CONFIG))
    stated = config.get("lora_alpha", alpha)
    if stated is None:
        raise ValueError(f"{file.name}: expected {CONFIG} beside adapters or their alpha given, got neither. Give alpha (DSO: 2 x rank).")
    if alpha is not None and alpha != stated:
        raise ValueError(f"{file.name}: expected alpha {stated} as in {CONFIG}, got {alpha}. Leave it out.")
    _check_ranks(file.name, adapters, config.get("r"))
    return Weights(source=file.name, plain=plain, adapters=adapters, alpha=float(stated), dropout=float(config.get("lora_dropout", 0.0)))


def _file_of(path: Path) -> Path:
    if path.is_file():
        return path
    found = [path / name for name in FILES if (path / name).is_file()]
    if not found:
        raise FileNotFoundError(f"{path}: expected weights or a folder with {', '.join(FILES)}, got none. Check the path.")
    if len(found) > 1:
        names = " and ".join(f.name for f in found)
        raise ValueError(f"{path}: expected one file of weights, got {names}. Name the file instead of its folder.")
    return found[0]


def read_state(file: Path) -> dict[str, torch.Tensor]:
    """Tensors by name of a .safetensors or torch file; nothing in it is run. Raises: ValueError."""
    try:
        if file.suffix == ".safetensors":
            state = safetensors.torch.load_file(file)
        else:
            state = torch.load(file, map_location="cpu", weights_only=True)
    except (safetensors.SafetensorError, RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{file.name}: expected tensors by name, got: {reason}. Truncated or foreign? Copy it again.") from None
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not state or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise ValueError(f"{file.name}: expected a dict of tensors, got {type(state).__name__}. Export the weights alone.")
    bad = [k for k, v in state.items() if v.is_floating_point() and not bool(v.isfinite().all())]
    if bad:
        raise ValueError(f"{file.name}: expected finite numbers, got others in {', '.join(bad[:4])}. Use an earlier checkpoint.")
    return dict(state)


def split_state(state: Mapping[str, torch.Tensor], who: str) -> tuple[dict[str, torch.Tensor], Adapters]:
    """The network's own tensors and the adapters of a state dict in any layout -> (by plain name, by layer)."""
    wrapper = "module." if all(key.startswith("module.") for key in state) else ""  # of distributed training
    names = {key: key.removeprefix(wrapper).removeprefix(PREFIX) for key in state}
    found = {key: match for key, name in names.items() if (match := _PART.fullmatch(name))}
    called = sorted({match["adapter"] or "" for match in found.values()})
    if len(called) > 1:
        raise ValueError(f"{who}: expected one adapter, got those named {', '.join(called)}. Save the one to use alone.")
    foreign = [key for key in state if key not in found and _FOREIGN.search(names[key])]
    if foreign:
        raise ValueError(f"{who}: expected A and B of linear layers, got {', '.join(foreign[:4])}. Only plain LoRA is read.")
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for key, match in found.items():
        parts.setdefault(match["layer"], {})[match["part"]] = state[key]
    single = [layer for layer, both in parts.items() if len(both) < 2]
    if single:
        raise ValueError(f"{who}: expected A and B of every layer, got one of them at {', '.join(single[:4])}. Copy the file again.")
    plain = {_without_base(names[key], parts): value for key, value in state.items() if key not in found}
    return plain, {layer: (both["A"], both["B"]) for layer, both in parts.items()}


def _without_base(name: str, layers: Mapping[str, object]) -> str:
    owner, _, leaf = name.rpartition(".")
    stem = owner.removesuffix(BASE)
    return f"{stem}.{leaf}" if owner.endswith(BASE) and stem in layers else name


def _read_config(path: Path) -> dict:
    """adapter_config.json, or nothing where there is none."""
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
            raise ValueError(f"{path.name}: expected {name} {allowed[0]!r}, got {config[name]!r}. Merge it in PEFT.")
    return config


def _check_ranks(who: str, adapters: Adapters, rank: int | None) -> None:
    ranks = {n for A, B in adapters.values() for n in (A.shape[0], B.shape[-1])} | ({rank} if rank else set())
    if len(ranks) > 1 or any(A.ndim != 2 or B.ndim != 2 for A, B in adapters.values()):
        raise ValueError(f"{who}: expected adapters of linear layers, all of one rank, got ranks {sorted(ranks)}. Merge them in PEFT.")


def load_weights(model: nn.Module, weights: Weights) -> nn.Module:
    """Give a network without adapters what a file holds, in place; returns it.

    Tensors of the network that differ are replaced, in their types; none is written into, so that networks which share them are left alone.
    Where adapters are added, everything else is frozen.
    Raises: ValueError for missing, unexpected or misshapen tensors.
    """
    if adapted_layers(model):
        raise ValueError(f"{weights.source}: expected a network without adapters to load into, got one with. Give its base.")
    _check_layers(model, weights)
    if weights.plain:
        replace_state(model, weights.plain, weights.source)
    if weights.adapters:
        layers = attach(model, weights.adapters, weights.rank, weights.alpha, weights.dropout)
        with torch.no_grad():
            for name, layer in layers.items():
                layer.lora_A.weight.copy_(weights.adapters[name][0])
                layer.lora_B.weight.copy_(weights.adapters[name][1])
    return model


def _check_layers(model: nn.Module, weights: Weights) -> None:
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, (A, B) in weights.adapters.items():
        layer = modules.get(name)
        own = f"[{layer.out_features}, {layer.in_features}]" if isinstance(layer, nn.Linear) else "no linear layer of that name"
        if own != f"[{len(B)}, {A.shape[1]}]":
            got = f"[{len(B)}, {A.shape[1]}]"
            raise ValueError(f"{weights.source}: expected adapters of this network, whose {name} is {own}, got {got}. Give their own base.")


def replace_state(model: nn.Module, state: Mapping[str, torch.Tensor], who: str) -> None:
    """Put a state dict in place of a network's own; equal ones keep the memory they had."""
    own = model.state_dict()
    check_state(who, model, state)
    new = {name: state[name].to(old) for name, old in own.items()}  # onto its device, in its type
    model.load_state_dict({k: own[k] if torch.equal(own[k], new[k]) else new[k] for k in own}, assign=True)


def write_adapter(model: nn.Module, folder: str | Path, base: str | None = None) -> Path:
    """Write a network's adapters as PEFT reads them, each file atomically; returns the folder.

    Args: base: what PEFT calls base_model_name_or_path.
    Raises: ValueError for a network without adapters, or with adapters of several ranks.
    """
    folder, layers = Path(folder), adapted_layers(model)
    kinds = {(layer.rank, layer.alpha, layer.dropout) for layer in layers.values()}
    if len(kinds) != 1:
        raise ValueError(f"write_adapter: expected adapters of one kind, got {len(kinds)} kinds. Call add_lora first.")
    rank, alpha, dropout = kinds.pop()
    config = {
        "peft_type": "LORA", "task_type": None, "base_model_name_or_path": base, "inference_mode": True, "r": rank,
        "lora_alpha": int(alpha) if math.floor(alpha) == alpha else alpha, "lora_dropout": dropout, "target_modules": targets_of(model),
        "bias": "none", "fan_in_fan_out": False, "init_lora_weights": True, "modules_to_save": None,
    }  # fmt: skip
    _write_tensors(folder / ADAPTER, {f"{PREFIX}{name}": value for name, value in adapter_state(model).items()})
    write_atomic(folder / CONFIG, (json.dumps(config, indent=2) + "\n").encode())
    return folder


def targets_of(model: nn.Module) -> list[str]:
    """Names by which PEFT finds the layers with adapters: last parts where they mean just these, else whole names."""
    layers = adapted_layers(model)
    short = sorted({name.rpartition(".")[2] for name in layers})
    inner = [f"{name}." for name in layers]
    others = [n for n, _ in model.named_modules(remove_duplicate=False) if n not in layers and not any(n.startswith(i) for i in inner)]
    return sorted(layers) if any(matches(name, target) for name in others for target in short) else short


def write_merged(model: nn.Module, path: str | Path) -> Path:
    """Write a network as a plain state dict, adapters merged, in the base's types; returns the path. See lora.merge_rounding."""
    _write_tensors(Path(path), merged_state(model))
    return Path(path)


def _write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    plain = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}  # safetensors refuses shared storage
    write_atomic(path, safetensors.torch.save(plain, metadata={"format": "pt"}))
