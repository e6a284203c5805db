"""Builds TRELLIS's models from their files, without running code from them."""

import ctypes
import dataclasses
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from eg3d_rlhf.flow.lora_files import read_state, split_state
from eg3d_rlhf.flow.trellis.files import find_weights, read_json
from eg3d_rlhf.flow.trellis.flows import LatentFlow, LatentFlowConfig, StructureFlow, StructureFlowConfig
from eg3d_rlhf.flow.trellis.latent_autoencoder import GaussianDecoder, GaussianDecoderConfig, LatentEncoder, LatentEncoderConfig
from eg3d_rlhf.flow.trellis.structure_vae import StructureDecoder, StructureEncoder, StructureVAEConfig
from training.storage import load_strict

ARCHITECTURES = {  # TRELLIS's names of classes; it also writes them with "Elastic" in front, which changes nothing here
    "SparseStructureFlowModel": (StructureFlow, StructureFlowConfig),
    "SparseStructureEncoder": (StructureEncoder, StructureVAEConfig),
    "SparseStructureDecoder": (StructureDecoder, StructureVAEConfig),
    "SLatFlowModel": (LatentFlow, LatentFlowConfig),
    "SLatEncoder": (LatentEncoder, LatentEncoderConfig),
    "SLatGaussianDecoder": (GaussianDecoder, GaussianDecoderConfig),
}


def build_model(content: Mapping, who: str) -> nn.Module:
    """An untrained model of what a JSON file describes: {"name": class, "args": {...}}.

    Raises: ValueError for another class, or arguments that it does not have.
    """
    name, args = content.get("name"), content.get("args")
    entry = ARCHITECTURES.get(str(name).removeprefix("Elastic"))
    if entry is None or not isinstance(args, Mapping):
        raise ValueError(f"{who}: expected a name among {', '.join(ARCHITECTURES)} and args, got {name!r}. Name a file of TRELLIS.")
    model, config = entry
    known = {field.name for field in dataclasses.fields(config)}
    foreign = sorted(set(args) - known)
    needed = sorted(f.name for f in dataclasses.fields(config) if _required(f) and f.name not in args)
    if foreign or needed:
        raise ValueError(f"{who}: expected the args of {name}, got unknown {foreign}, missing {needed}. Name a file of TRELLIS.")
    return model(config(**args))


def _required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def load_model(
    stem: Path, *, weights: Path | None = None, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> nn.Module:
    """A model from <stem>.json and its weights, in evaluation mode.

    Args:
        stem: path without ending; weights: another file for them, as a training checkpoint (.pt).
        dtype: of the layers that TRELLIS has in half precision, others are float32; None keeps the types of the file.

    Raises: FileNotFoundError; ValueError for files that do not fit each other, and for weights that are not finite.
    """
    json_file = stem.with_name(stem.name + ".json")
    weights = weights or find_weights(stem)
    if not json_file.is_file() or weights is None:
        raise FileNotFoundError(f"{stem.name}: expected {json_file} and weights beside it, got one of them or neither. Restore the files.")
    state, content = base_state(weights), read_json(json_file)
    model = empty_model(content, str(json_file))
    types = {name: tensor.dtype for name, tensor in state.items()}
    if dtype is not None:
        halved = _halved(content, str(json_file))
        types = {name: dtype if name in halved else torch.float32 for name in types}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name in types and tensor.is_floating_point():
            tensor.data = tensor.data.to(types[name])
    model = model.to_empty(device=device)
    load_strict(model, state, str(weights))
    return model.eval()


def base_state(path: Path) -> dict[str, torch.Tensor]:
    """Named tensors of a model by itself, from a safetensors file or a training checkpoint.

    Raises: FileNotFoundError; ValueError for a damaged file, adapters, or weights that are not finite.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"weights: expected a file, got none at {path}. Check the path.")
    state, adapters = split_state(read_state(Path(path)), Path(path).name)
    if adapters:
        raise ValueError(f"{path}: expected the weights of a model, got adapters. Give them as tuned weights of their base.")
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}


def empty_model(content: Mapping, who: str) -> nn.Module:
    """`build_model` without memory for weights, on the meta device."""
    with torch.device("meta"):
        return build_model(content, who)


def _halved(content: Mapping, who: str) -> set[str]:
    """Names of the tensors that TRELLIS has in half precision."""
    model = empty_model({**content, "args": {**content["args"], "use_fp16": True}}, who)
    return {name for name, tensor in model.state_dict().items() if tensor.dtype == torch.float16}


M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
THRESHOLD = 1 << 20  # bytes


def return_freed_memory() -> bool:
    """Have glibc return every freed tensor of 1 MiB or more to the system, from now on in this process. False where there is no glibc.

    By itself glibc comes to keep freed blocks of up to 32 MiB for later, in a heap that the few tensors kept between a network's blocks
    then break into pieces too small to use: a pass over TRELLIS's flows grew by 15 times what it keeps.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, THRESHOLD))
