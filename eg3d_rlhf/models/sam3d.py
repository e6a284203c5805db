"""SAM 3D's networks: the flow of shape and pose, the flow on the shape's voxels, and their image embedder.

The first flow is a mixture of transformers: the tokens of the shape and those of the pose go through one
transformer with separate layers for each. Its latent is a dictionary of tensors. Each tensor has its own
input layer, positions and output layer; tensors that share a transformer form one group of tokens.
Self-attention covers the tokens of all groups, with one exception. The shape attends only to itself, and the
others read its keys and values without gradient. The shape therefore does not depend on the pose, and errors
of the pose send no gradient into it (Chen et al. 2025, SAM 3D; Liang et al. 2024, Mixture-of-Transformers).
The step size d of a shortcut model (Frans et al. 2024) is embedded as the time is and added to it; d = 0 is
the ordinary flow.

Shape letters as in trellis/blocks.py; T_g tokens of a group g, S tokens of a tensor of the dictionary, A
channels of such a tensor. In the embedder: N samples, E channels of an encoder, W channels of a conditioning
token, p pixels per side of a patch, h patches per side, L tokens.
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

SHAPE = "shape"  # the tensor of the dictionary that does not depend on the others; a group by itself
Tokens = dict[str, torch.Tensor]  # group -> [N, T_g, C], or name in the dictionary -> [N, S, A]


@dataclass(frozen=True, kw_only=True)
class LatentConfig:
    """Size of one tensor of the dictionary."""

    in_channels: int  # A
    tokens: int  # S
    # Points per axis of the grid on which the tokens lie. None: there is no grid, and positions are learnt.
    resolution: int | None = None

    def __post_init__(self):
        # On a grid there is one token per point.
        if min(self.in_channels, self.tokens) < 1 or (
            self.resolution is not None and self.resolution**3 != self.tokens
        ):
            raise ValueError(
                "LatentConfig: expected in_channels and tokens >= 1, and tokens = resolution^3 on a grid, got"
                f" {self}. Correct the file of the generator."
            )


@dataclass(frozen=True, kw_only=True)
class MixtureConfig(blocks.ConditionedConfig):
    """Settings of the first flow's network, as its file states them."""

    latents: Mapping[str, LatentConfig]  # by name; the order is that of the tokens
    # Group -> names of its tensors. A tensor that is in no list forms a group by itself.
    latent_share_transformer: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    is_shortcut_model: bool = False  # whether the network reads a step size
    use_fp16: bool = False  # half precision for new blocks; loaded files keep their own dtype
    time_scale: float = 1000.0  # factor of times and step sizes before they are embedded

    def __post_init__(self):
        inside = [name for names in self.latent_share_transformer.values() for name in names]
        if not self.latents or set(inside) - set(self.latents) or len(set(inside)) < len(inside):
            got = f"{', '.join(self.latents) or 'none'} in {dict(self.latent_share_transformer)}"
            raise ValueError(
                f"MixtureConfig: expected latents, each in one group at most, got {got}. Correct the file."
            )
        # Attention treats the shape apart from all other groups, so it must be one by itself.
        if self.groups.get(SHAPE) != (SHAPE,) or self.model_channels % self.heads or not self.qk_rms_norm:
            got = f"{self.groups}, {self.model_channels} / {self.heads}, qk_rms_norm {self.qk_rms_norm}"
            raise ValueError(
                f"MixtureConfig: expected a latent {SHAPE!r} in no list, channels that heads divide and"
                f" qk_rms_norm, got {got}. Correct it."
            )

    @property
    def groups(self) -> dict[str, tuple[str, ...]]:
        """Names of the dictionary's tensors by group, in the order of the tokens."""
        shared = {name: group for group, names in self.latent_share_transformer.items() for name in names}
        groups: dict[str, tuple[str, ...]] = {}
        for name in self.latents:
            # A group stands where its first tensor stands.
            group = shared.get(name, name)
            groups.setdefault(group, tuple(self.latent_share_transformer.get(group, (name,))))
        return groups


class LatentLayers(nn.Module):
    """Input layer, positions and output layer of one tensor of the dictionary."""

    def __init__(self, config: LatentConfig, channels: int):
        super().__init__()
        self.input_layer = nn.Linear(config.in_channels, channels)
        self.out_layer = nn.Linear(channels, config.in_channels)
        if config.resolution is None:
            self.pos_emb = nn.Parameter(torch.randn(config.tokens, channels) / channels**0.5)  # [S, C]
        else:
            # Fixed sines and cosines of the grid's points. Checkpoints hold them nevertheless, so they are a
            # buffer of the state dict.
            points = torch.cartesian_prod(*[torch.arange(config.resolution)] * 3)
            self.register_buffer("pos_emb", blocks.position_embedding(points, channels))

    def read(self, x: torch.Tensor) -> torch.Tensor:
        """Embed a tensor of the dictionary [N, S, A] as tokens [N, S, C]."""
        return self.input_layer(x) + self.pos_emb

    def write(self, h: torch.Tensor) -> torch.Tensor:
        """Project tokens [N, S, C] to the tensor's channels [N, S, A]."""
        # The last norm has no parameters, and torch's default eps of 1e-5, as in the original.
        return self.out_layer(F.layer_norm(h, h.shape[-1:]).to(self.out_layer.weight.dtype))


class MixedAttention(nn.Module):
    """Self-attention over several groups of tokens, with separate linear layers for each group."""

    def __init__(self, channels: int, heads: int, groups: tuple[str, ...]):
        super().__init__()
        self.heads = heads
        self.to_qkv = nn.ModuleDict({g: nn.Linear(channels, 3 * channels) for g in groups})
        # The normalisation is always there: MixtureConfig requires it.
        self.q_rms_norm, self.k_rms_norm = (
            nn.ModuleDict({g: blocks.HeadRMSNorm(heads, channels // heads) for g in groups}) for _ in range(2)
        )
        self.to_out = nn.ModuleDict({g: nn.Linear(channels, channels) for g in groups})

    def forward(self, x: Tokens) -> Tokens:
        q = Tokens()
        k = Tokens()
        v = Tokens()
        for g, h in x.items():
            # [N, T_g, 3 C] -> three times [N, T_g, H, D]
            q[g], k[g], v[g] = self.to_qkv[g](h).unflatten(-1, (3, self.heads, -1)).unbind(-3)
            q[g] = self.q_rms_norm[g](q[g])
            k[g] = self.k_rms_norm[g](k[g])
        # The shape attends to itself alone.
        attended = {SHAPE: attend(q[SHAPE], k[SHAPE], v[SHAPE])}
        others = [g for g in x if g != SHAPE]
        if others:
            # All other groups attend to each other and to the shape, without gradient into the shape. The
            # order of keys is that of the original.
            keys, values = (
                torch.cat([*[part[g] for g in others], part[SHAPE].detach()], 1) for part in (k, v)
            )
            attended |= {g: attend(q[g], keys, values) for g in others}
        # [N, T_g, H, D] -> [N, T_g, C]
        return {g: self.to_out[g](attended[g].flatten(-2)) for g in x}


class MixedBlock(nn.Module):
    """Like `blocks.ModulatedBlock`, with separate layers for each group.

    The modulation by the time is the same for all groups.
    """

    def __init__(self, config: MixtureConfig):
        super().__init__()
        channels = config.model_channels
        heads = config.heads
        groups = tuple(config.groups)
        layout = dict(qk_rms_norm=config.qk_rms_norm_cross)
        # Before cross-attention; the only layer norm with parameters.
        self.norm2 = nn.ModuleDict({g: blocks.LayerNorm32(channels, affine=True) for g in groups})
        self.self_attn = MixedAttention(channels, heads, groups)
        self.cross_attn = nn.ModuleDict(
            {g: blocks.CrossAttention(channels, config.cond_channels, heads, **layout) for g in groups}
        )
        self.mlp = nn.ModuleDict({g: blocks.FeedForward(channels, config.mlp_ratio) for g in groups})
        # This norm has no parameters, so one object serves both places and all groups.
        self.norm = blocks.LayerNorm32(channels)
        if not config.share_mod:
            self.adaLN_modulation = blocks.modulation(channels)
        self.share_mod = config.share_mod

    def forward(self, x: Tokens, time: torch.Tensor, cond: torch.Tensor) -> Tokens:
        """Apply the block to tokens by group.

        Args:
            x: group -> [N, T_g, C].
            time: [N, C], or [N, 6 C] with shared modulation.
            cond: conditioning tokens [N, L, E].
        Returns: tokens by group, like x.
        """
        layout = blocks.DenseLayout()
        # [N, 6 C]: shift, scale and gate of the attention, then of the perceptron.
        values = time if self.share_mod else self.adaLN_modulation(time)
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = (
            layout.per_token(v) for v in values.chunk(6, -1)
        )
        attended = self.self_attn({g: self.norm(h) * (1 + scale) + shift for g, h in x.items()})
        output = Tokens()
        for g, h in x.items():
            h = h + gate * attended[g]
            # Cross-attention has neither modulation nor gate.
            h = h + self.cross_attn[g](self.norm2[g](h), cond, layout)
            output[g] = h + mlp_gate * self.mlp[g](self.norm(h) * (1 + mlp_scale) + mlp_shift)
        return output


class MixtureFlow(nn.Module):
    """First flow: predict the velocities of shape and pose.

        model(x_t by name [N, S, A], t [N] in 0..1, cond [N, L, E], step [N] in 0..1) -> velocities, like x_t

    t = 1 is data, as in the original. The shape may be passed alone: its velocity is then bitwise the same.

    Differentiable in: everything except t and step; the shape's velocity only in what belongs to the shape.
    """

    def __init__(self, config: MixtureConfig):
        super().__init__()
        self.config = config
        self.recompute = config.use_checkpoint
        channels = config.model_channels
        self.t_embedder = blocks.TimeEmbedder(channels)
        # The step size has an embedder of its own.
        if config.is_shortcut_model:
            self.d_embedder = blocks.TimeEmbedder(channels)
        if config.share_mod:
            self.adaLN_modulation = blocks.modulation(channels)
        self.latent_mapping = nn.ModuleDict(
            {name: LatentLayers(latent, channels) for name, latent in config.latents.items()}
        )
        self.blocks = nn.ModuleList(MixedBlock(config) for _ in range(config.num_blocks))
        # Only linear layers inside the blocks; embedders and norms stay in float32.
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
                f"MixtureFlow.x_t: expected {expected}, or only {SHAPE}, got {got}. Pass latents of this"
                " model."
            )
        # Only the tensors that were passed; the shape alone leaves out the groups of the pose.
        latents = {name: latent for name, latent in config.latents.items() if name in x_t}
        groups = {group: names for group, names in config.groups.items() if names[0] in x_t}
        for name, latent in latents.items():
            check_shape(
                f"MixtureFlow.x_t[{name!r}]",
                x_t[name],
                [len(t), latent.tokens, latent.in_channels],
                "Pass latents of this model's size.",
            )
        check_shape(
            "MixtureFlow.cond",
            cond,
            [len(t), "L", config.cond_channels],
            "Use the embedder that belongs to this model.",
        )
        # Any: nn.ModuleDict is not generic, so the type checker would see plain modules.
        layers: Any = self.latent_mapping
        dtype = blocks.torso_dtype(self.blocks)
        time = embedded_time(self, t, step, config.time_scale)  # [N, C]
        if config.share_mod:
            time = self.adaLN_modulation(time)
        time = time.to(dtype)
        cond = cond.to(dtype)
        # Input and output layers are float32; only the blocks compute in `dtype`.
        tokens = {name: layers[name].read(x_t[name].float()).to(dtype) for name in latents}
        # Tensors of a group are concatenated along the tokens: [N, T_g, C].
        h = {g: torch.cat([tokens[name] for name in names], 1) for g, names in groups.items()}
        for block in self.blocks:
            h = blocks.run_block(block, h, time, cond, recompute=self.recompute)
        velocities = Tokens()
        for g, names in groups.items():
            parts = h[g].float().split([latents[name].tokens for name in names], 1)
            velocities |= {
                name: layers[name].write(part).to(x_t[name].dtype)
                for name, part in zip(names, parts, strict=True)
            }
        # In the order of the latents, not in that of the groups.
        return {name: velocities[name] for name in latents}


def embedded_time(flow: Any, t: torch.Tensor, step: torch.Tensor | None, scale: float) -> torch.Tensor:
    """Embed times and, for a shortcut model, step sizes (None: 0), [N] each -> [N, C] float32.

    Args: scale: factor of times and step sizes before they are embedded.
    Raises: ValueError for a step size if the model reads none.
    """
    # The embedder multiplies by TIME_SCALE itself.
    factor = scale / blocks.TIME_SCALE
    shortcut = hasattr(flow, "d_embedder")
    if step is not None and not shortcut:
        raise ValueError(
            f"{type(flow).__name__}: got the step size {step.tolist()}, but this model reads none. Leave it"
            " out."
        )
    time = flow.t_embedder(factor * t)
    if not shortcut:
        return time
    # A step size of 0 is embedded, too: the embedding of 0 is not 0.
    return time + flow.d_embedder(factor * (torch.zeros_like(t) if step is None else step))


# The second flow is TRELLIS's flow over latents on voxels; it may also read a step size.


@dataclass(frozen=True, kw_only=True)
class VoxelFlowConfig(LatentFlowConfig):
    """Settings of the second flow's network, as its file states them."""

    is_shortcut_model: bool = False  # whether the network reads a step size
    time_scale: float = 1000.0  # factor of times and step sizes before they are embedded


class VoxelFlow(LatentFlow):
    """Second flow: predict the velocity of latents on voxels.

        model(x_t: SparseBatch, t [N] in 0..1, cond [N, L, E], step [N] in 0..1) -> velocity on the same
        voxels

    t = 1 is data, as in the original.

    Differentiable in: everything except t and step.
    """

    config: VoxelFlowConfig

    def __init__(self, config: VoxelFlowConfig):
        super().__init__(config)
        if config.is_shortcut_model:
            self.d_embedder = blocks.TimeEmbedder(config.model_channels)

    def time(self, t: torch.Tensor, step: torch.Tensor | None = None) -> torch.Tensor:
        """Embed times and step sizes [N] as the blocks read them, [N, C] float32."""
        return embedded_time(self, t, step, self.config.time_scale)


# SAM 3D's conditioning: tokens of an image, of the object's mask and of a point map, each cropped around the
# object and of the full frame. Images and masks go through a DINOv2 each, points through a small transformer
# over the points of a patch. Every encoder is followed by a gated feed-forward to the flow's width and a
# learnt offset that distinguishes the crop from the full frame. All tokens are concatenated.


# Transforms of coordinates before the network; see `remapped`.
REMAPS = ("linear", "sinh", "exp", "exp_disparity", "sinh_exp")


class Pictures(nn.Module):
    """DINOv2 under the parameter names of SAM 3D's files, for images or for masks of one channel.

    [N, 3 or 1, h, w] of values 0..1 -> tokens [N, L, E].

    Args:
        size: pixels per side to which images are resized.
        before_norm: return the tokens before the last norm, normalised without parameters; otherwise after
            the last norm, without registers.
        normalised: standardise images to DINOv2's mean and standard deviation.
    """

    def __init__(self, config: DinoConfig, size: int, before_norm: bool = False, normalised: bool = True):
        super().__init__()
        # The image must consist of whole patches.
        if size % config.patch_size:
            raise ValueError(
                f"embedder: expected an image size that is a multiple of {config.patch_size} pixels, got"
                f" {size}. Correct the file of the generator."
            )
        self.size = size
        self.before_norm = before_norm
        self.normalised = normalised
        self.backbone = Dino(config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Bilinear without antialiasing, as in the original.
        if x.shape[2:] != (self.size, self.size):
            x = F.interpolate(x, (self.size, self.size), mode="bilinear")
        x = x.expand(-1, 3, -1, -1)  # a mask of one channel is treated as a grey image
        x = self.backbone.tokens(standardised(x, self.backbone.layernorm.weight) if self.normalised else x)
        # A norm without parameters, with torch's default eps of 1e-5.
        if self.before_norm:
            return F.layer_norm(x, x.shape[-1:])
        # Class token and patches remain: [N, 1 + h^2, E].
        x = self.backbone.layernorm(x)
        return torch.cat([x[:, :1], x[:, 1 + self.backbone.config.num_register_tokens :]], 1)


@dataclass(frozen=True, kw_only=True)
class PointConfig:
    """Settings of the point map's network, as the file states them."""

    input_size: int = 256  # points per side to which maps are resized
    patch_size: int = 8  # p, points per side
    embed_dim: int = 768  # E
    num_heads: int = 16
    mlp_ratio: float = 2.0
    depth: int = 1
    remap_output: str = "exp"  # how coordinates are transformed first; see `remapped`

    def __post_init__(self):
        # Patches must tile the map, and heads must tile the channels.
        if (
            self.remap_output not in REMAPS
            or self.input_size % self.patch_size
            or self.embed_dim % self.num_heads
        ):
            raise ValueError(
                f"PointConfig: expected remap_output among {', '.join(REMAPS)}, an input_size that patch_size"
                f" divides and an embed_dim that num_heads divides, got {self}. Correct the file."
            )


class PointPatches(nn.Module):
    """Encoder of point maps: [N, 3, h', w'], not finite where there is no point -> tokens [N, h^2, E], one
    per patch.
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
        # Position of a point within its patch, with one more for the class token.
        self.pos_embed_window = nn.Parameter(torch.zeros(1, 1 + p * p, channels))
        # Position of the patch in the map.
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
        valid = points.isfinite().all(1)  # [N, s, s]
        # Missing points are set to 1 first, so that the transform stays finite. [N, s, s, 3]
        places = remapped(points.where(valid[:, None], 1.0), self.config.remap_output).movedim(1, -1)
        # A learnt token stands for every missing point. [N, s, s, E]
        h = torch.where(
            valid[..., None], self.point_proj(places.to(self.point_proj.weight.dtype)), self.invalid_xyz_token
        )
        # Group the points by patch: [N, h^2, p^2, E]
        h = h.unflatten(2, (-1, p)).unflatten(1, (-1, p)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        patches = h.shape[1]  # h^2
        # Each patch is a sequence of its own: [N h^2, 1 + p^2, E] with a class token in front.
        h = h.flatten(0, 1)
        h = torch.cat([self.cls_token.expand(len(h), -1, -1), h], 1) + self.pos_embed_window
        for block in self.blocks:
            h = block(h)
        # Only the class token of each patch is kept; it gets the patch's position.
        return h[:, 0].unflatten(0, (-1, patches)) + self.pos_embed.flatten(2).transpose(1, 2)


def remapped(points: torch.Tensor, how: str) -> torch.Tensor:
    """Transform coordinates [N, 3, ...] so that large values are compressed; "linear" leaves them as they
    are.
    """
    if how == "linear":
        return points
    if how == "sinh":
        return points.asinh()
    # The other kinds treat the depth z differently from x and y.
    flat = points[:, :2]
    z = points[:, 2:]
    kinds = {
        "exp": (flat / (1 + z), z.log1p()),
        "exp_disparity": (flat / z, z.log()),
        "sinh_exp": (flat.asinh(), z.clamp_min(1e-8).log()),
    }
    return torch.cat(kinds[how], 1)


class GatedFeedForward(nn.Module):
    """Gated feed-forward layer (SwiGLU, Shazeer 2020): w2(silu(w1 x) * w3 x)."""

    def __init__(self, channels: int, hidden: int, out_channels: int):
        super().__init__()
        self.w1, self.w3 = (nn.Linear(channels, hidden, bias=False) for _ in range(2))
        self.w2 = nn.Linear(hidden, out_channels, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


# Pairs in order: name of an input, and its frame (cropped or full), or None if it has no offset.
Inputs = Sequence[tuple[str, str | None]]


class Embedder(nn.Module):
    """Embedder of images, masks and point maps, [N, ., ., .] by name -> conditioning tokens [N, L, W]."""

    def __init__(
        self,
        encoders: Sequence[tuple[nn.Module, int, Inputs]],
        hidden: Sequence[int],
        channels: int,
        pre_norm: bool,
        *,
        random: bool = False,
    ):
        """Build the embedder from its encoders.

        Args:
            encoders: each with its channels and its inputs.
            hidden: hidden channels of their feed-forwards.
            channels: W.
            pre_norm: normalise tokens before the feed-forward.
            random: the offsets of frames were random and not learnt; files hold these in another shape.
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
        # Files hold one row more than there are frames; the original does not use it.
        self.idx_emb = nn.Parameter(torch.zeros(len(self.frames) + 1, *[1] * random, channels))

    @property
    def names(self) -> list[str]:
        """Names of the inputs, in order."""
        return [name for inputs in self.inputs for name, _ in inputs]

    def forward(self, given: Mapping[str, torch.Tensor]) -> torch.Tensor:
        missing = [name for name in self.names if name not in given]
        if missing:
            raise ValueError(
                f"conditioning: expected the inputs {', '.join(self.names)}, but {', '.join(missing)} is"
                " missing. Pass all of them."
            )
        parts = []
        for encoder, project, inputs in zip(self.module_list, self.projection_nets, self.inputs, strict=True):
            for name, frame in inputs:
                tokens = project(encoder(given[name]))
                # An encoder may serve several inputs; the frame's offset distinguishes them.
                parts.append(tokens if frame is None else tokens + self.idx_emb[self.frames.index(frame)])
        return torch.cat(parts, 1)
