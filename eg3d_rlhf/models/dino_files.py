"""DINOv2's weights where programs leave them on this machine: torch hub's checkpoint, as TRELLIS fetches it, or transformers' folder.

Nothing is downloaded. Torch hub's names are those of the authors; the network has those of transformers.
"""

import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from eg3d_rlhf.models.dinov2 import Dino, DinoConfig
from eg3d_rlhf.models.policies import read_state
from training.storage import load_strict

HUB = {  # torch hub's name -> that of transformers' weights
    f"dinov2_vit{letter}14{reg}": f"facebook/dinov2{'-with-registers' if reg else ''}-{size}"
    for letter, size in (("s", "small"), ("b", "base"), ("l", "large")) for reg in ("", "_reg")
}
HEAD = 64  # channels of a head, of all of them
RENAMED = (  # torch hub -> transformers, in turn
    (r"^(cls_token|mask_token|register_tokens)$", r"embeddings.\1"), (r"^pos_embed$", "embeddings.position_embeddings"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."), (r"^blocks\.", "encoder.layer."), (r"^norm\.", "layernorm."),
    (r"\.attn\.proj\.", ".attention.output.dense."), (r"\.ls([12])\.gamma$", r".layer_scale\1.lambda1"),
)  # fmt: skip


def read_dino(name: str, device: str | torch.device = "cpu") -> Dino:
    """The network of torch hub's name, of a folder of transformers, or of a checkpoint of torch hub; frozen, in float32.

    Raises: FileNotFoundError naming the places; ValueError for weights that do not fit.
    """
    places = list(_places(name))
    path = next((p for p in places if p.is_file()), None)
    if path is None:
        looked = ", ".join(map(str, places))
        raise FileNotFoundError(
            f"{name}: expected its weights on this machine, got none at {looked}. Fetch them once yourself, or give embeddings in files."
        )
    state = read_state(path)
    beside = path.with_name("config.json")
    if path.suffix == ".pth":
        state = renamed(state)
        config = config_of(state, str(path))
    elif beside.is_file():
        config = _read_config(beside)
    else:
        raise FileNotFoundError(f"{name}: expected config.json beside {path.name}, got none. Restore the folder.")
    with torch.device("meta"):
        model = Dino(config)
    model = model.to_empty(device=device)
    load_strict(model, state, str(path))
    return model.eval().requires_grad_(False)


def _places(name: str) -> Iterator[Path]:
    """Where weights of that name may lie, in order."""
    path = Path(name)
    if path.suffix == ".pth":
        yield path
        return
    folders = [path] if path.is_dir() else []
    if name in HUB:
        home = Path(os.environ.get("TORCH_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "torch")
        yield home / "hub" / "checkpoints" / f"{name.removesuffix('_reg')}{'_reg4' if name.endswith('_reg') else ''}_pretrain.pth"
    cache = Path(os.environ.get("HF_HUB_CACHE") or Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface") / "hub")
    folders += sorted((cache / f"models--{HUB.get(name, name).replace('/', '--')}" / "snapshots").glob("*"))
    yield from (folder / "model.safetensors" for folder in folders)


def _read_config(path: Path) -> DinoConfig:
    try:
        content = json.loads(path.read_text())
        if not isinstance(content, dict) or not str(content.get("model_type")).startswith("dinov2"):
            raise ValueError("its model_type is not dinov2")
        registers = content.get("num_register_tokens", 4 if content["model_type"] == "dinov2_with_registers" else 0)
        return DinoConfig.of({**content, "num_register_tokens": registers})
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: expected the settings of a DINOv2, got: {error}. Restore the file.") from None


def renamed(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A checkpoint of torch hub under the names of transformers; queries, keys and values apart."""
    found: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        for old, new in RENAMED:
            name = re.sub(old, new, name)
        stem, fused, leaf = name.partition(".attn.qkv.")
        if fused:
            parts = tensor.chunk(3)
            found |= {f"{stem}.attention.attention.{kind}.{leaf}": p for kind, p in zip(("query", "key", "value"), parts, strict=True)}
        else:
            found[name] = tensor
    return found


def config_of(state: Mapping[str, torch.Tensor], who: str) -> DinoConfig:
    """The network that a state dict is of, by its shapes. Raises: ValueError for what is no DINOv2."""
    try:
        size = state["embeddings.cls_token"].shape[-1]
        patch = state["embeddings.patch_embeddings.projection.weight"].shape[-1]
        grid = math.isqrt(state["embeddings.position_embeddings"].shape[1] - 1)
        inner = state["encoder.layer.0.mlp.fc1.weight"].shape[0]
    except (KeyError, IndexError) as error:
        raise ValueError(f"{who}: expected a DINOv2 with blocks of two layers, got none of {error}. Name another checkpoint.") from None
    registers = state.get("embeddings.register_tokens", torch.zeros(1, 0, size)).shape[1]
    layers = len({name.split(".")[2] for name in state if name.startswith("encoder.layer.")})
    return DinoConfig(
        hidden_size=size, num_hidden_layers=layers, num_attention_heads=max(1, size // HEAD), mlp_ratio=inner // size,
        image_size=patch * grid, patch_size=patch, num_register_tokens=registers,
    )
