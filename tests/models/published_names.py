"""Rename vision transformers back to the names of their published files, to write such files in tests."""

import re
from collections.abc import Mapping

import torch

NAMES = (  # transformers -> torch hub's DINOv2 and BLIP's image encoder, in turn
    ("embeddings.position_embeddings", "pos_embed"),
    ("embeddings.patch_embeddings.projection.", "patch_embed.proj."),
    ("embeddings.", ""),
    ("encoder.layer.", "blocks."),
    (".attention.attention.qkv.", ".attn.qkv."),
    (".attention.output.dense.", ".attn.proj."),
    (".layer_scale1.lambda1", ".ls1.gamma"),
    (".layer_scale2.lambda1", ".ls2.gamma"),
    (".layernorm_before.", ".norm1."),
    (".layernorm_after.", ".norm2."),
    (".intermediate.dense.", ".mlp.fc1."),
    (".output.dense.", ".mlp.fc2."),
    ("layernorm.", "norm."),
)


def published(state: Mapping[str, torch.Tensor], prefix: str = "") -> dict[str, torch.Tensor]:
    """Return a state dict with the published names below `prefix`; queries, keys and values are fused."""
    renamed = {}
    for name, tensor in state.items():
        if not name.startswith(prefix):
            renamed[name] = tensor
            continue
        part = re.fullmatch(r"(.+\.attention\.attention\.)(query|key|value)(\..+)", name)
        if part is not None:
            tensor = torch.cat([state[f"{part[1]}{kind}{part[3]}"] for kind in ("query", "key", "value")])
            name = f"{part[1]}qkv{part[3]}"
        name = name.removeprefix(prefix)
        for ours, theirs in NAMES:
            name = name.replace(ours, theirs)
        renamed[prefix + name] = tensor
    return renamed
