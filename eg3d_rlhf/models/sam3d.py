"""SAM 3D's networks: the flow of shape and pose, the flow on the shape's voxels, and what both are told of a
picture.

In the first, the shape's tokens and those of the pose go through a transformer with layers for each
(a mixture of transformers). Its latent is a dictionary of tensors. Each has an input layer, positions and an
output layer of its own; those that share a transformer are one group of tokens. Self-attention is over the
tokens of all groups, but the shape sees itself alone, and the others see its keys and values without
gradient: the shape does not depend on the pose, and no error of the pose pulls at it (Chen et al. 2025, SAM
3D; Liang et al. 2024, Mixture-of-Transformers). The step size d of a shortcut model (Frans et al. 2024) is
embedded as the time is, and added to it; d = 0 is the plain flow.

Shape letters as in trellis/blocks.py; T_g tokens of a group g, S tokens of a tensor of the dictionary, A its
channels; of the embedder N samples, E channels of an encoder, W of the condition, p patch edge in pixels, h
patches per side, L tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from eg3d_rlhf.core.shapes import check_shape
from eg3d_rlhf.models.attention import Block, attend
from eg3d_rlhf.models.dino import Dino, DinoConfig, standardised
from eg3d_rlhf.models.trellis import blocks
from eg3d_rlhf.models.trellis.flows import LatentFlow, LatentFlowConfig

SHAPE = "shape"  # the tensor of the dictionary that is protected, a group by itself
Tokens = dict[str, torch.Tensor]  # by group [N, T_g, C], or by name of the dictionary [N, S, A]


@dataclass(frozen=True, kw_only=True)
class LatentConfig:
    """One tensor of the dictionary."""

    in_channels: int  # A
    tokens: int  # S
    # of the grid that the tokens lie on; None: on none, and their positions are learnt
    resolution: int | None = None

    def __post_init__(self):
        if min(self.in_channels, self.tokens) < 1 or (
            self.resolution is not None and self.resolution**3 != self.tokens
        ):
            raise ValueError(
                f"LatentConfig: expected channels, tokens >= 1, resolution^3 of them on a grid, got {self}."
                " Correct it."
            )


@dataclass(frozen=True, kw_only=True)
class MixtureConfig(blocks.ConditionedConfig):
    """What the first flow's file says of its network."""

    latents: Mapping[str, LatentConfig]  # in order
    # group -> what is in it; others are alone
    latent_share_transformer: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    is_shortcut_model: bool = False  # whether it reads a step size
    use_fp16: bool = False  # type of the blocks as built; files bring their own
    time_scale: float = 1000.0  # by which times and step sizes are multiplied before they are embedded

    def __post_init__(self):
        inside = [name for names in self.latent_share_transformer.values() for name in names]
        if not self.latents or set(inside) - set(self.latents) or len(set(inside)) < len(inside):
            got = f"{', '.join(self.latents) or 'none'} in {dict(self.latent_share_transformer)}"
            raise ValueError(
                f"MixtureConfig: expected latents, each in one group at most, got {got}. Correct the file."
            )
        if self.groups.get(SHAPE) != (SHAPE,) or self.model_channels % self.heads or not self.qk_rms_norm:
            got = f"{self.groups}, {self.model_channels} / {self.heads}, qk_rms_norm {self.qk_rms_norm}"
            raise ValueError(
                f"MixtureConfig: expected a latent {SHAPE!r} in no list, channels that heads divide and"
                f" qk_rms_norm, got {got}. Correct it."
            )

    @property
    def groups(self) -> dict[str, tuple[str, ...]]:
        """Names of the dictionary by group, in order."""
        shared = {name: group for group, names in self.latent_share_transformer.items() for name in names}
        groups: dict[str, tuple[str, ...]] = {}
        for name in self.latents:
            group = shared.get(name, name)
            groups.setdefault(group, tuple(self.latent_share_transformer.get(group, (name,))))
        return groups


class LatentLayers(nn.Module):
    """In and out of the transformer, for one tensor of the dictionary."""

    def __init__(self, config: LatentConfig, channels: int):
        super().__init__()
        self.input_layer = nn.Linear(config.in_channels, channels)
        self.out_layer = nn.Linear(channels, config.in_channels)
        if config.resolution is None:
            self.pos_emb = nn.Parameter(torch.randn(config.tokens, channels) / channels**0.5)  # [S, C]
        else:  # sines and cosines of the grid's points, in files all the same
            points = torch.cartesian_prod(*[torch.arange(config.resolution)] * 3)
            self.register_buffer("pos_emb", blocks.position_embedding(points, channels))

    def read(self, x: torch.Tensor) -> torch.Tensor:
        """[N, S, A] -> [N, S, C]."""
        return self.input_layer(x) + self.pos_emb

    def write(self, h: torch.Tensor) -> torch.Tensor:
        """[N, S, C] -> [N, S, A]."""
        return self.out_layer(F.layer_norm(h, h.shape[-1:]).to(self.out_layer.weight.dtype))


class MixedAttention(nn.Module):
    """Self-attention over several groups of tokens, with linear layers for each."""

    def __init__(self, channels: int, heads: int, groups: tuple[str, ...]):
        super().__init__()
        self.heads = heads
        self.to_qkv = nn.ModuleDict({g: nn.Linear(channels, 3 * channels) for g in groups})
        self.q_rms_norm, self.k_rms_norm = (
            nn.ModuleDict({g: blocks.HeadRMSNorm(heads, channels // heads) for g in groups}) for _ in range(2)
        )
        self.to_out = nn.ModuleDict({g: nn.Linear(channels, channels) for g in groups})

    def forward(self, x: Tokens) -> Tokens:
        q = Tokens()
        k = Tokens()
        v = Tokens()
        for g, h in x.items():
            # [N, T_g, H, D]
            q[g], k[g], v[g] = self.to_qkv[g](h).unflatten(-1, (3, self.heads, -1)).unbind(-3)
            q[g] = self.q_rms_norm[g](q[g])
            k[g] = self.k_rms_norm[g](k[g])
        seen = {SHAPE: attend(q[SHAPE], k[SHAPE], v[SHAPE])}
        others = [g for g in x if g != SHAPE]
        if others:
            keys, values = (
                torch.cat([*[part[g] for g in others], part[SHAPE].detach()], 1) for part in (k, v)
            )
            seen |= {g: attend(q[g], keys, values) for g in others}
        return {g: self.to_out[g](seen[g].flatten(-2)) for g in x}


class MixedBlock(nn.Module):
    """As `blocks.ModulatedBlock`, with layers for each group;
    the modulation of the time is the same for all.
    """

    def __init__(self, config: MixtureConfig):
        super().__init__()
        channels = config.model_channels
        heads = config.heads
        groups = tuple(config.groups)
        layout = dict(qk_rms_norm=config.qk_rms_norm_cross)
        self.norm2 = nn.ModuleDict({g: blocks.LayerNorm32(channels, affine=True) for g in groups})
        self.self_attn = MixedAttention(channels, heads, groups)
        self.cross_attn = nn.ModuleDict(
            {g: blocks.CrossAttention(channels, config.cond_channels, heads, **layout) for g in groups}
        )
        self.mlp = nn.ModuleDict({g: blocks.FeedForward(channels, config.mlp_ratio) for g in groups})
        self.norm = blocks.LayerNorm32(channels)  # without parameters: one will do
        if not config.share_mod:
            self.adaLN_modulation = blocks.modulation(channels)
        self.share_mod = config.share_mod

    def forward(self, x: Tokens, time: torch.Tensor, cond: torch.Tensor) -> Tokens:
        """Tokens by group [N, T_g, C], time [N, C] (shared modulation: [N, 6 C]) and cond
        [N, L, E] -> tokens.
        """
        layout = blocks.DenseLayout()
        values = time if self.share_mod else self.adaLN_modulation(time)
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = (
            layout.per_token(v) for v in values.chunk(6, -1)
        )
        attended = self.self_attn({g: self.norm(h) * (1 + scale) + shift for g, h in x.items()})
        found = Tokens()
        for g, h in x.items():
            h = h + gate * attended[g]
            h = h + self.cross_attn[g](self.norm2[g](h), cond, layout)
            found[g] = h + mlp_gate * self.mlp[g](self.norm(h) * (1 + mlp_scale) + mlp_shift)
        return found


class MixtureFlow(nn.Module):
    """model(x_t by name [N, S, A], t [N] in 0..1, cond [N, L, E], step [N] in 0..1) -> velocities, like x_t.

    The shape may be given alone: its velocity is the same to the bit. Times are the network's own: t = 1 is
    data.
    Differentiable in: everything but t and step; what is not the shape's, not in the shape's.
    """

    def __init__(self, config: MixtureConfig):
        super().__init__()
        self.config = config
        self.recompute = config.use_checkpoint
        channels = config.model_channels
        self.t_embedder = blocks.TimeEmbedder(channels)
        if config.is_shortcut_model:
            self.d_embedder = blocks.TimeEmbedder(channels)
        if config.share_mod:
            self.adaLN_modulation = blocks.modulation(channels)
        self.latent_mapping = nn.ModuleDict(
            {name: LatentLayers(one, channels) for name, one in config.latents.items()}
        )
        self.blocks = nn.ModuleList(MixedBlock(config) for _ in range(config.num_blocks))
        if config.use_fp16:
            blocks.convert_torso(self.blocks, torch.float16)

    def forward(
        self,
        x_t: Mapping[str, torch.Tensor],
        t: torch.Tensor,
        cond: torch.Tensor,
        step: torch.Tensor | None = None,
    ) -> Tokens:
        config = self.config
        if set(x_t) not in ({*config.latents}, {SHAPE}):
            expected, got = (", ".join(sorted(names)) for names in (config.latents, x_t))
            raise ValueError(
                f"MixtureFlow.x_t: expected {expected} or the {SHAPE} alone, got {got}. Give latents of this"
                " model."
            )
        latents = {name: latent for name, latent in config.latents.items() if name in x_t}
        groups = {group: names for group, names in config.groups.items() if names[0] in x_t}
        for name, one in latents.items():
            check_shape(
                f"MixtureFlow.x_t[{name!r}]",
                x_t[name],
                [len(t), one.tokens, one.in_channels],
                "Give latents of its size.",
            )
        check_shape(
            "MixtureFlow.cond",
            cond,
            [len(t), "L", config.cond_channels],
            "Use embeddings of this model's own embedder.",
        )
        layers: Any = self.latent_mapping
        dtype = blocks.torso_dtype(self.blocks)
        time = embedded_time(self, t, step, config.time_scale)
        if config.share_mod:
            time = self.adaLN_modulation(time)
        time = time.to(dtype)
        cond = cond.to(dtype)
        read = {name: layers[name].read(x_t[name].float()).to(dtype) for name in latents}
        h = {g: torch.cat([read[name] for name in names], 1) for g, names in groups.items()}
        for block in self.blocks:
            h = blocks.run_block(block, h, time, cond, recompute=self.recompute)
        found = Tokens()
        for g, names in groups.items():
            parts = h[g].float().split([latents[name].tokens for name in names], 1)
            found |= {
                name: layers[name].write(part).to(x_t[name].dtype)
                for name, part in zip(names, parts, strict=True)
            }
        return {name: found[name] for name in latents}


def embedded_time(flow: Any, t: torch.Tensor, step: torch.Tensor | None, scale: float) -> torch.Tensor:
    """Times, and the step sizes of a shortcut model (None: 0), [N] each -> [N, C] float32.

    Raises: ValueError for a step size where the model reads none.
    """
    factor = scale / blocks.TIME_SCALE
    shortcut = hasattr(flow, "d_embedder")
    if step is not None and not shortcut:
        raise ValueError(
            f"{type(flow).__name__}: expected no step size, since this model reads none, got {step.tolist()}."
            " Leave it out."
        )
    time = flow.t_embedder(factor * t)
    return (
        time + flow.d_embedder(factor * (torch.zeros_like(t) if step is None else step)) if shortcut else time
    )


# The second flow: TRELLIS's over the latents on voxels, which may read a step size.


@dataclass(frozen=True, kw_only=True)
class VoxelFlowConfig(LatentFlowConfig):
    """What its file says of its network."""

    is_shortcut_model: bool = False  # whether it reads a step size
    time_scale: float = 1000.0  # by which times and step sizes are multiplied before they are embedded


class VoxelFlow(LatentFlow):
    """model(x_t: SparseBatch, t [N] in 0..1, cond [N, L, E], step [N] in 0..1) -> velocity on the same
    voxels.

    Times are the network's own: t = 1 is data. Differentiable in: everything but t and step.
    """

    config: VoxelFlowConfig

    def __init__(self, config: VoxelFlowConfig):
        super().__init__(config)
        if config.is_shortcut_model:
            self.d_embedder = blocks.TimeEmbedder(config.model_channels)

    def time(self, t: torch.Tensor, step: torch.Tensor | None = None) -> torch.Tensor:
        return embedded_time(self, t, step, self.config.time_scale)


# What SAM 3D is told: tokens of a picture, of the object's mask and of a point map, each cut out about the
# object and whole. Pictures and masks go through a DINOv2 each, points through a small transformer over the
# points of a patch. Every kind has a gated feed-forward to the flow's width, and an offset that says whether
# it is of the cutting or the whole; all tokens stand behind each other.


REMAPS = ("linear", "sinh", "exp", "exp_disparity", "sinh_exp")


class Pictures(nn.Module):
    """A DINOv2 under the name that the files give it: pictures, or masks of one channel, [N, ., ., .] of
    0..1 -> tokens [N, L, E].

    Args: size: pixels per side, to which pictures are brought; before_norm: tokens before the last norm,
        normalised without parameters; else the last norm's, without registers; normalised: to DINOv2's mean
        and deviation.
    """

    def __init__(self, config: DinoConfig, size: int, before_norm: bool = False, normalised: bool = True):
        super().__init__()
        if size % config.patch_size:
            raise ValueError(
                f"embedder: expected patches of {config.patch_size} that divide pictures, got pictures of"
                f" {size}. Correct it."
            )
        self.size = size
        self.before_norm = before_norm
        self.normalised = normalised
        self.backbone = Dino(config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[2:] != (self.size, self.size):
            x = F.interpolate(x, (self.size, self.size), mode="bilinear")
        x = x.expand(-1, 3, -1, -1)  # a mask is a grey picture
        x = self.backbone.tokens(standardised(x, self.backbone.layernorm.weight) if self.normalised else x)
        if self.before_norm:
            return F.layer_norm(x, x.shape[-1:])
        x = self.backbone.layernorm(x)
        return torch.cat([x[:, :1], x[:, 1 + self.backbone.config.num_register_tokens :]], 1)


@dataclass(frozen=True, kw_only=True)
class PointConfig:
    """What the file says of the points' network."""

    input_size: int = 256  # points per side, to which maps are brought
    patch_size: int = 8  # p
    embed_dim: int = 768  # E
    num_heads: int = 16
    mlp_ratio: float = 2.0
    depth: int = 1
    remap_output: str = "exp"  # what is done to coordinates first; see remapped

    def __post_init__(self):
        if (
            self.remap_output not in REMAPS
            or self.input_size % self.patch_size
            or self.embed_dim % self.num_heads
        ):
            raise ValueError(
                f"PointConfig: expected remap_output {', '.join(REMAPS)} and sizes that divide, got {self}."
                " Correct the file."
            )


class PointPatches(nn.Module):
    """Point maps [N, 3, ., .], not finite where there is no point -> tokens [N, h^2, E], one for the points
    of each patch.
    """

    def __init__(self, config: PointConfig):
        super().__init__()
        self.config = config
        channels = config.embed_dim
        p = config.patch_size
        side = config.input_size // p
        self.point_proj = nn.Linear(3, channels)
        self.invalid_xyz_token = nn.Parameter(torch.zeros(channels))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, channels))
        self.pos_embed_window = nn.Parameter(torch.zeros(1, 1 + p * p, channels))
        self.pos_embed = nn.Parameter(torch.zeros(1, channels, side, side))
        hidden = int(config.mlp_ratio * channels)
        self.blocks = nn.ModuleList(
            Block(channels, config.num_heads, hidden, eps=1e-6) for _ in range(config.depth)
        )

    def forward(self, points: torch.Tensor) -> torch.Tensor:
        size = self.config.input_size
        p = self.config.patch_size
        points = (
            F.interpolate(points, (size, size), mode="nearest")
            if points.shape[2:] != (size, size)
            else points
        )
        there = points.isfinite().all(1)  # [N, s, s]
        # [N, s, s, 3]
        places = remapped(points.where(there[:, None], 1.0), self.config.remap_output).movedim(1, -1)
        h = torch.where(
            there[..., None], self.point_proj(places.to(self.point_proj.weight.dtype)), self.invalid_xyz_token
        )
        # [N, h^2, p^2, E]
        h = h.unflatten(2, (-1, p)).unflatten(1, (-1, p)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        patches = h.shape[1]
        h = h.flatten(0, 1)
        h = torch.cat([self.cls_token.expand(len(h), -1, -1), h], 1) + self.pos_embed_window
        for block in self.blocks:
            h = block(h)
        return h[:, 0].unflatten(0, (-1, patches)) + self.pos_embed.flatten(2).transpose(1, 2)


def remapped(points: torch.Tensor, how: str) -> torch.Tensor:
    """Coordinates [N, 3, ...]: as they are, or larger ones nearer together."""
    if how == "linear":
        return points
    if how == "sinh":
        return points.asinh()
    flat = points[:, :2]
    z = points[:, 2:]
    kinds = {
        "exp": (flat / (1 + z), z.log1p()),
        "exp_disparity": (flat / z, z.log()),
        "sinh_exp": (flat.asinh(), z.clamp_min(1e-8).log()),
    }
    return torch.cat(kinds[how], 1)


class GatedFeedForward(nn.Module):
    """w2(silu(w1 x) * w3 x)."""

    def __init__(self, channels: int, hidden: int, out_channels: int):
        super().__init__()
        self.w1, self.w3 = (nn.Linear(channels, hidden, bias=False) for _ in range(2))
        self.w2 = nn.Linear(hidden, out_channels, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


# in order (name of an input, frame: whether it is of the cutting or the whole, or neither)
Inputs = Sequence[tuple[str, str | None]]


class Embedder(nn.Module):
    """Pictures, masks and point maps by name [N, ., ., .] -> condition tokens [N, L, W]."""

    def __init__(
        self,
        encoders: Sequence[tuple[nn.Module, int, Inputs]],
        hidden: Sequence[int],
        channels: int,
        pre_norm: bool,
        *,
        random: bool = False,
    ):
        """Args: encoders: with their channels and what goes through each; hidden: of their feed-forwards;
            channels: W.
        random: frames' offsets were drawn, not learnt, which files hold in another shape.
        """
        super().__init__()
        self.inputs = [inputs for _, _, inputs in encoders]
        self.frames = list(
            dict.fromkeys(frame for inputs in self.inputs for _, frame in inputs if frame is not None)
        )
        self.module_list = nn.ModuleList(encoder for encoder, _, _ in encoders)
        self.projection_nets = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(size) if pre_norm else nn.Identity(), GatedFeedForward(size, width, channels)
            )
            for (_, size, _), width in zip(encoders, hidden, strict=True)
        )
        # the last is nobody's
        self.idx_emb = nn.Parameter(torch.zeros(len(self.frames) + 1, *[1] * random, channels))

    @property
    def names(self) -> list[str]:
        """Of what it is told."""
        return [name for inputs in self.inputs for name, _ in inputs]

    def forward(self, given: Mapping[str, torch.Tensor]) -> torch.Tensor:
        missing = [name for name in self.names if name not in given]
        if missing:
            raise ValueError(
                f"conditions: expected {', '.join(self.names)}, got no {', '.join(missing)}. Give them all."
            )
        found = []
        for encoder, project, inputs in zip(self.module_list, self.projection_nets, self.inputs, strict=True):
            for name, frame in inputs:
                tokens = project(encoder(given[name]))
                found.append(tokens if frame is None else tokens + self.idx_emb[self.frames.index(frame)])
        return torch.cat(found, 1)
