"""What SAM 3D is told: tokens of a picture, of the object's mask and of a point map, each cut out about the object and whole.

Pictures and masks go through a DINOv2 each, points through a small transformer over the points of a patch. Every kind has a gated
feed-forward to the flow's width, and an offset that says whether it is of the cutting or the whole; all tokens stand behind each other.

Shape letters: N samples, E channels of an encoder, W of the condition, p patch edge in pixels, h patches per side, L tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from eg3d_rlhf.models.dinov2 import MEAN, STD

HEAD = 64  # channels of a head, in all of DINOv2
REMAPS = ("linear", "sinh", "exp")


class Attention(nn.Module):
    """Self-attention [N, L, E], named as in vision transformers: `qkv` and `proj`."""

    def __init__(self, channels: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # [N, H, L, D] each
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))


class Scale(nn.Module):
    """A factor for each channel."""

    def __init__(self, channels: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.gamma


class VisionBlock(nn.Module):
    """x + attn(norm1(x)), then x + mlp(norm2(x)); in DINOv2 each branch has a factor per channel."""

    def __init__(self, channels: int, heads: int, hidden: int, scaled: bool, eps: float):
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(channels, eps=eps) for _ in range(2))
        self.attn = Attention(channels, heads)
        self.mlp = nn.ModuleDict(dict(fc1=nn.Linear(channels, hidden), fc2=nn.Linear(hidden, channels)))
        if scaled:
            self.ls1, self.ls2 = Scale(channels), Scale(channels)
        self.scaled = scaled

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        attended = self.attn(self.norm1(x))
        x = x + (self.ls1(attended) if self.scaled else attended)
        fed = self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))
        return x + (self.ls2(fed) if self.scaled else fed)


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """One DINOv2; sizes are those of its tensors."""

    channels: int  # E
    depth: int
    hidden: int
    patch: int  # p
    places: int  # 1 + h^2 of the learnt positions
    registers: int
    input_size: int  # pixels, to which pictures are brought
    prenorm_features: bool = False  # tokens before the last norm, normalised without parameters; else the last norm's, without registers

    def __post_init__(self):
        side = round((self.places - 1) ** 0.5)
        if self.channels % HEAD or side * side + 1 != self.places or self.input_size % self.patch:
            raise ValueError(f"VisionConfig: expected heads of {HEAD}, a square of positions, patches that divide pictures, got {self}.")

    @classmethod
    def of(cls, state: Mapping[str, torch.Tensor], input_size: int, prenorm_features: bool) -> "VisionConfig":
        """From a state dict. Raises: ValueError for one that is no DINOv2."""
        try:
            return cls(
                channels=state["pos_embed"].shape[2], depth=len({name.split(".")[1] for name in state if name.startswith("blocks.")}),
                hidden=len(state["blocks.0.mlp.fc1.weight"]), patch=state["patch_embed.proj.weight"].shape[2],
                places=state["pos_embed"].shape[1], registers=state["register_tokens"].shape[1] if "register_tokens" in state else 0,
                input_size=input_size, prenorm_features=prenorm_features,
            )
        except (KeyError, IndexError) as error:
            raise ValueError(f"DINOv2: expected its tensors, got none fit for {error}. Name a file with the embedder in it.") from None


class Vision(nn.Module):
    """DINOv2, in its own names: pictures [N, 3, ., .] of 0..1 -> tokens [N, L, E], the whole's first."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config, channels = config, config.channels
        self.cls_token, self.mask_token = nn.Parameter(torch.zeros(1, 1, channels)), nn.Parameter(torch.zeros(1, channels))
        self.pos_embed = nn.Parameter(torch.zeros(1, config.places, channels))
        if config.registers:
            self.register_tokens = nn.Parameter(torch.zeros(1, config.registers, channels))
        self.patch_embed = nn.ModuleDict(dict(proj=nn.Conv2d(3, channels, config.patch, config.patch)))
        self.blocks = nn.ModuleList(VisionBlock(channels, channels // HEAD, config.hidden, True, 1e-6) for _ in range(config.depth))
        self.norm = nn.LayerNorm(channels, eps=1e-6)

    def positions(self, side: int) -> torch.Tensor:
        """Of the whole and of side^2 patches, [1, 1 + side^2, E]; other numbers of patches than learnt by bicubic interpolation."""
        one, grid = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        learnt = round(grid.shape[1] ** 0.5)
        if side == learnt:
            return self.pos_embed
        grid = grid.transpose(1, 2).unflatten(2, (learnt, learnt))
        grid = F.interpolate(grid, (side, side), mode="bicubic", antialias=True)
        return torch.cat([one, grid.flatten(2).transpose(1, 2)], 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        size = self.config.input_size
        x = F.interpolate(x, (size, size), mode="bilinear", antialias=True) if x.shape[2:] != (size, size) else x
        x = x.expand(-1, 3, -1, -1)  # a mask is a grey picture
        mean, std = (torch.tensor(v, device=x.device).view(3, 1, 1) for v in (MEAN, STD))
        h = self.patch_embed["proj"](((x - mean) / std).to(self.cls_token.dtype)).flatten(2).transpose(1, 2)  # [N, h^2, E]
        h = torch.cat([self.cls_token.expand(len(h), -1, -1), h], 1) + self.positions(size // self.config.patch)
        registers = self.config.registers
        if registers:
            h = torch.cat([h[:, :1], self.register_tokens.expand(len(h), -1, -1), h[:, 1:]], 1)
        for block in self.blocks:
            h = block(h)
        if self.config.prenorm_features:
            return F.layer_norm(h, h.shape[-1:])
        h = self.norm(h)
        return torch.cat([h[:, :1], h[:, 1 + registers :]], 1)


@dataclass(frozen=True, kw_only=True)
class PointConfig:
    """What the file says of the points' network."""

    input_size: int = 256  # points per side, to which maps are brought
    patch_size: int = 8  # p
    embed_dim: int = 768  # E
    num_heads: int = 16
    mlp_ratio: float = 2.0
    depth: int = 1
    remap_output: str = "linear"  # what is done to coordinates first; see remapped

    def __post_init__(self):
        if self.remap_output not in REMAPS or self.input_size % self.patch_size or self.embed_dim % self.num_heads:
            raise ValueError(f"PointConfig: expected remap_output {', '.join(REMAPS)} and sizes that divide, got {self}. Correct the file.")


class PointPatches(nn.Module):
    """Point maps [N, 3, ., .], not finite where there is no point -> tokens [N, h^2, E], one for the points of each patch."""

    def __init__(self, config: PointConfig):
        super().__init__()
        self.config, channels, p = config, config.embed_dim, config.patch_size
        side = config.input_size // p
        self.point_proj = nn.Linear(3, channels)
        self.invalid_xyz_token = nn.Parameter(torch.zeros(channels))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, channels))
        self.pos_embed_window = nn.Parameter(torch.zeros(1, 1 + p * p, channels))
        self.pos_embed = nn.Parameter(torch.zeros(1, channels, side, side))
        hidden = int(config.mlp_ratio * channels)
        self.blocks = nn.ModuleList(VisionBlock(channels, config.num_heads, hidden, False, 1e-5) for _ in range(config.depth))

    def forward(self, points: torch.Tensor) -> torch.Tensor:
        size, p = self.config.input_size, self.config.patch_size
        points = F.interpolate(points, (size, size), mode="nearest") if points.shape[2:] != (size, size) else points
        there = points.isfinite().all(1)  # [N, s, s]
        places = remapped(points.where(there[:, None], 1.0), self.config.remap_output).movedim(1, -1)  # [N, s, s, 3]
        h = torch.where(there[..., None], self.point_proj(places.to(self.point_proj.weight.dtype)), self.invalid_xyz_token)
        h = h.unflatten(2, (-1, p)).unflatten(1, (-1, p)).transpose(2, 3).flatten(3, 4).flatten(1, 2)  # [N, h^2, p^2, E]
        patches, h = h.shape[1], h.flatten(0, 1)
        h = torch.cat([self.cls_token.expand(len(h), -1, -1), h], 1) + self.pos_embed_window
        for block in self.blocks:
            h = block(h)
        return h[:, 0].unflatten(0, (-1, patches)) + self.pos_embed.flatten(2).transpose(1, 2)


def remapped(points: torch.Tensor, how: str) -> torch.Tensor:
    """Coordinates [N, 3, ...]: as they are; their inverse hyperbolic sines; or x / z, y / z and log z ("exp": what undoes it)."""
    if how == "linear":
        return points
    if how == "sinh":
        return points.asinh()
    z = points[:, 2:].clamp_min(1e-6)
    return torch.cat([points[:, :2] / z, z.log()], 1)


class GatedFeedForward(nn.Module):
    """w2(silu(w1 x) * w3 x)."""

    def __init__(self, channels: int, hidden: int, out_channels: int):
        super().__init__()
        self.w1, self.w3 = (nn.Linear(channels, hidden, bias=False) for _ in range(2))
        self.w2 = nn.Linear(hidden, out_channels, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


Inputs = Sequence[tuple[str, str]]  # (name of an input, whether it is of the cutting or the whole), in order


class Embedder(nn.Module):
    """Pictures, masks and point maps by name [N, ., ., .] -> condition tokens [N, L, W]."""

    def __init__(self, encoders: Sequence[tuple[nn.Module, int, Inputs]], hidden: Sequence[int], channels: int, pre_norm: bool):
        """Args: encoders: with their channels and what goes through each; hidden: of their feed-forwards; channels: W."""
        super().__init__()
        self.inputs = [inputs for _, _, inputs in encoders]
        self.frames = list(dict.fromkeys(frame for inputs in self.inputs for _, frame in inputs))
        self.module_list = nn.ModuleList(encoder for encoder, _, _ in encoders)
        self.projection_nets = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(size) if pre_norm else nn.Identity(), GatedFeedForward(size, width, channels))
            for (_, size, _), width in zip(encoders, hidden, strict=True)
        )
        self.idx_emb = nn.Parameter(torch.zeros(len(self.frames), channels))

    @property
    def names(self) -> list[str]:
        """Of what it is told."""
        return [name for inputs in self.inputs for name, _ in inputs]

    def forward(self, given: Mapping[str, torch.Tensor]) -> torch.Tensor:
        missing = [name for name in self.names if name not in given]
        if missing:
            raise ValueError(f"conditions: expected {', '.join(self.names)}, got no {', '.join(missing)}. Give them all.")
        found = []
        for encoder, project, inputs in zip(self.module_list, self.projection_nets, self.inputs, strict=True):
            for name, frame in inputs:
                found.append(project(encoder(given[name])) + self.idx_emb[self.frames.index(frame)])
        return torch.cat(found, 1)


class Backbone(nn.Module):
    """Holds a DINOv2 under the name that the files give it."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.backbone = Vision(config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.backbone(x)
