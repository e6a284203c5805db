"""A mesh encoder of MeshMAE's shape (Liang et al. 2022), with its state-dict names.

A patch of F faces becomes one token: LayerNorm(Linear(10 F numbers, face by face)) + MLP(mean of the face centres). Pre-norm transformer,
final LayerNorm. Patches that are not there neither attend nor are attended to, and take no part in the maximum; the published code pads
with zeros that do both.

Letters: A meshes, P patches, F faces of a patch, C width, H heads.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from eg3d_rlhf.core.interfaces import Patches
from eg3d_rlhf.core.shapes import check_shape

NUMBERS = 10  # of a face
_OTHERS = ("cls_token", "classifier.", "head.", "decoder", "mask_token", "to_points", "to_features", "build_up_points")  # MeshMAE's, unused


@dataclass(frozen=True, kw_only=True)
class EncoderOptions:
    """Size. MeshMAE's own: 64 faces, width 768, 12 blocks, 12 heads."""

    faces: int = 64  # of a patch
    width: int = 64
    depth: int = 3
    heads: int = 4

    def __post_init__(self) -> None:
        if min(self.faces, self.width, self.heads) < 1 or self.depth < 0 or self.width % self.heads:
            raise ValueError(f"EncoderOptions: expected positive numbers and a width that the heads divide, got {self}. Correct it.")


class Attention(nn.Module):
    """Multi-head self-attention with a key mask."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        """[A, P, C], keep [A, 1, 1, P] bool -> [A, P, C]."""
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each [A, H, P, C / H]
        return self.proj(F.scaled_dot_product_attention(q, k, v, attn_mask=keep).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two layers with GELU."""

    def __init__(self, width: int):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., C] -> [..., C]."""
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width)

    def forward(self, x: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        """[A, P, C], keep [A, 1, 1, P] -> [A, P, C]."""
        x = x + self.attn(self.norm1(x), keep)
        return x + self.mlp(self.norm2(x))


class MeshEncoder(nn.Module):
    """Patches to tokens [A, P, C]. Differentiable in features and centres."""

    def __init__(self, options: EncoderOptions):
        super().__init__()
        width = options.width
        self.options = options
        self.to_patch_embedding = nn.Sequential(nn.Flatten(2), nn.Linear(NUMBERS * options.faces, width), nn.LayerNorm(width))
        self.pos_embedding = nn.Sequential(nn.Linear(3, 128), nn.GELU(), nn.Linear(128, width))
        self.blocks = nn.ModuleList(Block(width, options.heads) for _ in range(options.depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, patches: Patches) -> torch.Tensor:
        """[A, P, F, ...] -> [A, P, C]; what stands at masked patches means nothing.

        Raises: ValueError for patches of another number of faces.
        """
        check_shape("MeshEncoder(features)", patches.features, ("A", "P", self.options.faces, NUMBERS), "Use the reward's own patches.")
        x = self.to_patch_embedding(patches.features) + self.pos_embedding(patches.centres.mean(dim=2))
        keep = (patches.mask | ~patches.mask.any(dim=1, keepdim=True))[:, None, None]  # a mesh without patches attends to all of nothing
        for block in self.blocks:
            x = block(x, keep)
        return self.norm(x)


def masked_max(tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Largest of the tokens [A, P, C] that are there, [A, C]; 0 where none is."""
    found = tokens.masked_fill(~mask[..., None], -torch.inf).amax(dim=1)
    return torch.where(mask.any(dim=1, keepdim=True), found, 0.0)


def load_meshmae(encoder: MeshEncoder, tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Take over the trunk of a MeshMAE state dict; returns the names that were left out (class token, heads, decoder).

    Raises: ValueError where a part of the trunk is missing or of another size.
    """
    given = {name.removeprefix("module.").removeprefix("encoder."): value for name, value in tensors.items()}
    left = sorted(name for name in given if name.startswith(_OTHERS))
    try:
        encoder.load_state_dict({name: value for name, value in given.items() if name not in left})
    except RuntimeError as error:
        words = " ".join(str(error).split())
        raise ValueError(f"load_meshmae: expected MeshMAE's trunk of {encoder.options}, got: {words[:300]}. Choose its sizes.") from error
    return left
