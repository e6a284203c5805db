"""Networks of SAM 3D Objects: the flow model of shape and pose, the flow model on voxels, and the embedder.

The first flow model is a mixture of transformers (Chen et al. 2025, SAM 3D; Liang et al. 2024,
Mixture-of-Transformers). Its latent is a dictionary of tensors, such as the shape and the pose. Each tensor
has its own input layer, position embedding and output layer. Tensors that share their transformer layers form
a group of tokens; the layers of different groups are separate. In self-attention, the tokens of the shape
attend only to each other. The tokens of all other groups attend to the tokens of all groups, but no gradient
flows from them into the shape. The shape therefore does not depend on the pose. A shortcut model (Frans et
al. 2024) also has a step size d as input, which is embedded in the same way as the time and added to it. With
d = 0 it gives the velocity of an ordinary flow model. The embedder computes conditioning tokens from an
image, a mask and a point map.

Shapes: N samples, C channels of a token, H attention heads, D channels of an attention head, L conditioning
tokens, E channels of a conditioning token; T_g tokens of a group g, tokens (number S) and channels (number A)
of a tensor of the dictionary. The embedder has E channels of an encoder, W channels of a conditioning token,
p pixels per side of a patch, h patches per side, and s pixels per side of a point map.
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

SHAPE = "shape"  # name of the shape's tensor, which forms a group alone and does not depend on other tensors
Tokens = dict[str, torch.Tensor]  # tokens [N, T_g, C] by group, or tensors [N, S, A] by name


@dataclass(frozen=True, kw_only=True)
class LatentConfig:
    """Size of one tensor of the latent, which is a dictionary of tensors such as the shape and the pose.

    Raises: ValueError for sizes that do not fit together.
    """

    in_channels: int  # A
    tokens: int  # S
    # Points per axis of the cubic grid on which the tokens lie. None:
    # there is no grid, and the position embedding is trained.
    resolution: int | None = None

    def __post_init__(self):
        # On a grid there is one token per point.
        if min(self.in_channels, self.tokens) < 1 or (
            self.resolution is not None and self.resolution**3 != self.tokens
        ):
            raise ValueError(
                "LatentConfig: in_channels and tokens must be >= 1, and tokens must be resolution^3 on a"
                f" grid, got in_channels={self.in_channels}, tokens={self.tokens} and"
                f" resolution={self.resolution}. Download the generator's file again."
            )


@dataclass(frozen=True, kw_only=True)
class MixtureConfig(blocks.ConditionedConfig):
    """Settings of the first flow model, with the names of its file.

    Raises: ValueError for settings that are not supported or do not fit together.
    """

    latents: Mapping[str, LatentConfig]  # tensors of the latent by name, in the order of their tokens
    # Names of the tensors of each group. A tensor that occurs in no group forms a group alone.
    latent_share_transformer: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    is_shortcut_model: bool = False  # True: the network has a step size as input
    use_fp16: bool = False  # half precision for new blocks; weights from files have the dtype of the file
    time_scale: float = 1000.0  # factor of times and step sizes before they are embedded

    def __post_init__(self):
        grouped_names = [
            latent_name
            for latent_names in self.latent_share_transformer.values()
            for latent_name in latent_names
        ]
        unknown_names = set(grouped_names) - set(self.latents)
        if not self.latents or unknown_names or len(set(grouped_names)) < len(grouped_names):
            raise ValueError(
                "MixtureConfig: there must be at least one latent, and each latent may be in at most one"
                f" group, got the latents {', '.join(self.latents) or '(none)'} and the grouped"
                f" latents {', '.join(grouped_names) or '(none)'}. Download the generator's file again."
            )
        # Attention treats the shape differently from all other groups.
        if self.groups.get(SHAPE) != (SHAPE,):
            raise ValueError(
                f"MixtureConfig: there must be a latent {SHAPE!r} that forms a group alone, got the groups"
                f" {', '.join(map(repr, self.groups))}. Download the generator's file again."
            )
        if self.model_channels % self.heads or not self.qk_rms_norm:
            raise ValueError(
                "MixtureConfig: model_channels must be a multiple of the number of heads, and qk_rms_norm"
                f" must be true, got {self.model_channels}, {self.heads} and qk_rms_norm={self.qk_rms_norm}."
                " Download the generator's file again."
            )

    @property
    def groups(self) -> dict[str, tuple[str, ...]]:
        """Return the names of the tensors of each group, in the order of the tokens."""
        group_of_name: dict[str, str] = {}
        for group_name, latent_names in self.latent_share_transformer.items():
            group_of_name |= dict.fromkeys(latent_names, group_name)
        names_by_group: dict[str, tuple[str, ...]] = {}
        for latent_name in self.latents:
            # A group has the position of its first tensor.
            group_name = group_of_name.get(latent_name, latent_name)
            names_by_group.setdefault(
                group_name, tuple(self.latent_share_transformer.get(group_name, (latent_name,)))
            )
        return names_by_group


class LatentLayers(nn.Module):
    """Input layer, position embedding and output layer of one tensor of the latent.

    Args:
        config: size of the tensor.
        channels: channels C of a token.
    """

    def __init__(self, config: LatentConfig, channels: int):
        super().__init__()
        self.input_layer = nn.Linear(config.in_channels, channels)
        self.out_layer = nn.Linear(channels, config.in_channels)
        if config.resolution is None:
            self.pos_emb = nn.Parameter(torch.randn(config.tokens, channels) / channels**0.5)  # [S, C]
        else:
            # Fixed sines and cosines of the grid's points. Checkpoints contain them, so they are a buffer.
            points = torch.cartesian_prod(*[torch.arange(config.resolution)] * 3)
            self.register_buffer("pos_emb", blocks.position_embedding(points, channels))

    def read(self, x: torch.Tensor) -> torch.Tensor:
        """Embed a tensor of the dictionary [N, S, A] as tokens [N, S, C]."""
        return self.input_layer(x) + self.pos_emb

    def write(self, h: torch.Tensor) -> torch.Tensor:
        """Project tokens [N, S, C] to the channels of the tensor, [N, S, A]."""
        # As in the original, the last norm has no parameters and torch's default constant 1e-5.
        return self.out_layer(F.layer_norm(h, h.shape[-1:]).to(self.out_layer.weight.dtype))


class MixedAttention(nn.Module):
    """Self-attention over several groups of tokens, with separate linear layers for each group.

    Args:
        channels: channels C of a token.
        num_heads: number of heads H.
        group_names: names of the groups.
    """

    def __init__(self, channels: int, num_heads: int, group_names: tuple[str, ...]):
        super().__init__()
        self.heads = num_heads
        self.to_qkv = nn.ModuleDict({g: nn.Linear(channels, 3 * channels) for g in group_names})
        # Not optional, because MixtureConfig requires qk_rms_norm.
        self.q_rms_norm, self.k_rms_norm = (
            nn.ModuleDict({g: blocks.HeadRMSNorm(num_heads, channels // num_heads) for g in group_names})
            for _ in range(2)
        )
        self.to_out = nn.ModuleDict({g: nn.Linear(channels, channels) for g in group_names})

    def forward(self, x: Tokens) -> Tokens:
        q = Tokens()
        k = Tokens()
        v = Tokens()
        for g, h in x.items():
            # [N, T_g, 3 C] -> three times [N, T_g, H, D]
            q[g], k[g], v[g] = self.to_qkv[g](h).unflatten(-1, (3, self.heads, -1)).unbind(-3)
            q[g] = self.q_rms_norm[g](q[g])
            k[g] = self.k_rms_norm[g](k[g])
        # The tokens of the shape attend only to each other.
        attended_by_group = {SHAPE: attend(q[SHAPE], k[SHAPE], v[SHAPE])}
        other_groups = [g for g in x if g != SHAPE]
        if other_groups:
            # All other tokens attend to the tokens of all groups. detach() stops gradients into the shape.
            # The order of the keys is that of the original, so that the result is bitwise the same.
            joint_keys, joint_values = (
                torch.cat([*[tokens[g] for g in other_groups], tokens[SHAPE].detach()], 1)
                for tokens in (k, v)
            )
            attended_by_group |= {g: attend(q[g], joint_keys, joint_values) for g in other_groups}
        # [N, T_g, H, D] -> [N, T_g, C]
        return {g: self.to_out[g](attended_by_group[g].flatten(-2)) for g in x}


class MixedBlock(nn.Module):
    """Transformer block like `blocks.ModulatedBlock`, but with separate layers for each group of tokens.

    The modulation by the time is the same for all groups.
    """

    def __init__(self, config: MixtureConfig):
        super().__init__()
        channels = config.model_channels
        num_heads = config.heads
        group_names = tuple(config.groups)
        # The norm before the cross-attention is the only layer norm with parameters.
        self.norm2 = nn.ModuleDict({g: blocks.LayerNorm32(channels, affine=True) for g in group_names})
        self.self_attn = MixedAttention(channels, num_heads, group_names)
        self.cross_attn = nn.ModuleDict(
            {
                g: blocks.CrossAttention(channels, config.cond_channels, num_heads, config.qk_rms_norm_cross)
                for g in group_names
            }
        )
        self.mlp = nn.ModuleDict({g: blocks.FeedForward(channels, config.mlp_ratio) for g in group_names})
        # This norm has no parameters, so one object is used before the self-attention and before the
        # perceptron, for all groups.
        self.norm = blocks.LayerNorm32(channels)
        if not config.share_mod:
            self.adaLN_modulation = blocks.modulation(channels)
        self.share_mod = config.share_mod

    def forward(self, x: Tokens, time: torch.Tensor, cond: torch.Tensor) -> Tokens:
        """Apply the block to tokens.

        Args:
            x: tokens [N, T_g, C] by group.
            time: embedded times [N, C], or the modulation [N, 6 C] if all blocks share it.
            cond: conditioning tokens [N, L, E].

        Returns: tokens [N, T_g, C] by group.
        """
        layout = blocks.DenseLayout()
        # [N, 6 C]: shift, scale and gate of the attention, then of the perceptron
        modulation = time if self.share_mod else self.adaLN_modulation(time)
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = (
            layout.per_token(chunk) for chunk in modulation.chunk(6, -1)
        )
        attended_by_group = self.self_attn({g: self.norm(h) * (1 + scale) + shift for g, h in x.items()})
        new_tokens = Tokens()
        for g, h in x.items():
            h = h + gate * attended_by_group[g]
            # Cross-attention has neither modulation nor gate.
            h = h + self.cross_attn[g](self.norm2[g](h), cond, layout)
            new_tokens[g] = h + mlp_gate * self.mlp[g](self.norm(h) * (1 + mlp_scale) + mlp_shift)
        return new_tokens


class MixtureFlow(nn.Module):
    """First flow model, which predicts the velocities of the shape and the pose.

    The velocities lead from noise (t = 0) to data (t = 1).

    Usage: velocities = model(x_t, t, cond, step), with latents x_t [N, S, A] by name, times t [N] in 0..1,
    conditioning tokens cond [N, L, E] and, for a shortcut model, step sizes [N] in 0..1. The velocities have
    the names and shapes of x_t. The shape may be passed alone; its velocity is bitwise the same as with the
    pose.

    Differentiable in: x_t and cond. The velocity of the shape has no gradient with respect to other tensors.
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
        # Only linear layers inside the blocks are converted. Embedders and norms stay in float32.
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
            raise ValueError(
                f"MixtureFlow.x_t: the latents must be {', '.join(sorted(config.latents))}, or only {SHAPE},"
                f" got {', '.join(sorted(x_t)) or '(none)'}. Pass latents of this model."
            )
        # Only the tensors that were passed. If the shape is passed alone, other groups are not computed.
        latents = {
            latent_name: latent for latent_name, latent in config.latents.items() if latent_name in x_t
        }
        names_by_group = {
            group_name: latent_names
            for group_name, latent_names in config.groups.items()
            if latent_names[0] in x_t
        }
        for latent_name, latent in latents.items():
            check_shape(
                f"MixtureFlow.x_t[{latent_name!r}]",
                x_t[latent_name],
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
        layers_by_latent: Any = self.latent_mapping
        dtype = blocks.torso_dtype(self.blocks)
        time = embedded_time(self, t, step, config.time_scale)  # [N, C]
        if config.share_mod:
            time = self.adaLN_modulation(time)
        time = time.to(dtype)
        cond = cond.to(dtype)
        # Input and output layers are float32; only the blocks compute in `dtype`.
        tokens_by_latent = {
            latent_name: layers_by_latent[latent_name].read(x_t[latent_name].float()).to(dtype)
            for latent_name in latents
        }
        # Tensors of a group are concatenated along the tokens: [N, T_g, C].
        tokens_by_group = {
            g: torch.cat([tokens_by_latent[latent_name] for latent_name in latent_names], 1)
            for g, latent_names in names_by_group.items()
        }
        for block in self.blocks:
            tokens_by_group = blocks.run_block(block, tokens_by_group, time, cond, recompute=self.recompute)
        velocity_by_name = Tokens()
        for g, latent_names in names_by_group.items():
            latent_tokens = (
                tokens_by_group[g]
                .float()
                .split([latents[latent_name].tokens for latent_name in latent_names], 1)
            )
            velocity_by_name |= {
                latent_name: layers_by_latent[latent_name].write(name_tokens).to(x_t[latent_name].dtype)
                for latent_name, name_tokens in zip(latent_names, latent_tokens, strict=True)
            }
        # In the order of the latents, and not of the groups
        return {latent_name: velocity_by_name[latent_name] for latent_name in latents}


def embedded_time(flow: Any, t: torch.Tensor, step: torch.Tensor | None, scale: float) -> torch.Tensor:
    """Embed times and, for a shortcut model, step sizes, as [N, C] float32.

    Args:
        flow: flow model with t_embedder and, if it is a shortcut model, d_embedder.
        t: times [N] in 0..1.
        step: step sizes [N] in 0..1; None means 0 for a shortcut model.
        scale: factor of times and step sizes before they are embedded.

    Raises: ValueError if a step size is passed to a model that is not a shortcut model.
    """
    # The embedder itself multiplies by TIME_SCALE.
    factor = scale / blocks.TIME_SCALE
    is_shortcut_model = hasattr(flow, "d_embedder")
    if step is not None and not is_shortcut_model:
        raise ValueError(
            f"{type(flow).__name__}: a step size ({step.tolist()}) was passed, but this model is no shortcut"
            " model. Call the model without a step size."
        )
    time = flow.t_embedder(factor * t)
    if not is_shortcut_model:
        return time
    # The embedding of a step size of 0 is not 0, so it has to be added, too.
    return time + flow.d_embedder(factor * (torch.zeros_like(t) if step is None else step))


# The second flow model is the one of TRELLIS over latents on voxels. It may be a shortcut model.


@dataclass(frozen=True, kw_only=True)
class VoxelFlowConfig(LatentFlowConfig):
    """Settings of the second flow model, with the names of its file."""

    is_shortcut_model: bool = False  # True: the network has a step size as input
    time_scale: float = 1000.0  # factor of times and step sizes before they are embedded


class VoxelFlow(LatentFlow):
    """Second flow model, which predicts the velocity of latents on voxels from noise (t = 0) to data (t = 1).

    Usage: velocity = model(x_t, t, cond, step), with a SparseBatch x_t, times t [N] in 0..1, conditioning
    tokens cond [N, L, E] and, for a shortcut model, step sizes [N] in 0..1. The velocity is on the voxels of
    x_t.

    Differentiable in: the features of x_t and cond.
    """

    config: VoxelFlowConfig

    def __init__(self, config: VoxelFlowConfig):
        super().__init__(config)
        if config.is_shortcut_model:
            self.d_embedder = blocks.TimeEmbedder(config.model_channels)

    def time(self, t: torch.Tensor, step: torch.Tensor | None = None) -> torch.Tensor:
        """Embed times and step sizes [N] for the blocks, [N, C] float32. A step size of None means 0."""
        return embedded_time(self, t, step, self.config.time_scale)


# The conditioning of SAM 3D consists of the tokens of an image, of the object's mask and of a point map. Each
# of these inputs exists twice: cropped around the object, and as the full frame. Images and masks are encoded
# by a DINOv2 each, and point maps by a small transformer over the points of each patch. A feed-forward
# layer with a gate then changes the number of channels to W. A trained vector is added that distinguishes the
# crop from the full frame. All tokens are concatenated.


# Names of the transforms of coordinates in `remapped`
REMAPS = ("linear", "sinh", "exp", "exp_disparity", "sinh_exp")


class ImageEncoder(nn.Module):
    """DINOv2 for images [N, 3, h, w] or masks [N, 1, h, w] of values 0..1, which returns tokens [N, L, E].

    Parameters have the names of SAM 3D's files.

    Args:
        config: settings of the DINOv2.
        side_pixels: pixels per side to which images are resized, a multiple of the patch size.
        before_norm: True returns all tokens, with a norm without parameters in place of DINOv2's last norm.
            False returns the tokens after the last norm, without the registers.
        normalised: True standardises images by ImageNet's mean and standard deviation.

    Raises: ValueError if `side_pixels` is not a multiple of the patch size.
    """

    def __init__(
        self, config: DinoConfig, side_pixels: int, before_norm: bool = False, normalised: bool = True
    ):
        super().__init__()
        if side_pixels % config.patch_size:
            raise ValueError(
                f"embedder: the image size must be a multiple of the patch size, {config.patch_size} pixels,"
                f" got {side_pixels}. Download the generator's file again."
            )
        self.size = side_pixels
        self.before_norm = before_norm
        self.normalised = normalised
        self.backbone = Dino(config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # As in the original, the interpolation is bilinear without antialiasing.
        if x.shape[2:] != (self.size, self.size):
            x = F.interpolate(x, (self.size, self.size), mode="bilinear")
        x = x.expand(-1, 3, -1, -1)  # a mask of one channel is treated as a grey image
        x = self.backbone.tokens(standardised(x, self.backbone.layernorm.weight) if self.normalised else x)
        if self.before_norm:
            # As in the original, this norm has torch's default constant 1e-5.
            return F.layer_norm(x, x.shape[-1:])
        x = self.backbone.layernorm(x)
        # Tokens are ordered [class token, registers, patches]. Without the registers: [N, 1 + h^2, E]
        return torch.cat([x[:, :1], x[:, 1 + self.backbone.config.num_register_tokens :]], 1)


@dataclass(frozen=True, kw_only=True)
class PointConfig:
    """Settings of the encoder of point maps, with the names of the file.

    Raises: ValueError for settings that are not supported or do not fit together.
    """

    input_size: int = 256  # s, points per side to which maps are resized; a multiple of patch_size
    patch_size: int = 8  # p, points per side of a patch
    embed_dim: int = 768  # E, a multiple of num_heads
    num_heads: int = 16  # number of attention heads
    mlp_ratio: float = 2.0  # channels inside the perceptrons, as a multiple of embed_dim
    depth: int = 1  # number of blocks
    remap_output: str = "exp"  # transform of the coordinates before the network, one of REMAPS

    def __post_init__(self):
        if self.remap_output not in REMAPS:
            raise ValueError(
                f"PointConfig: remap_output must be one of {', '.join(REMAPS)}, got {self.remap_output!r}."
                " Download the generator's file again."
            )
        if self.input_size % self.patch_size or self.embed_dim % self.num_heads:
            raise ValueError(
                "PointConfig: input_size must be a multiple of patch_size, and embed_dim a multiple of"
                f" num_heads, got {self.input_size}, {self.patch_size}, {self.embed_dim} and"
                f" {self.num_heads}. Download the generator's file again."
            )


class PointPatches(nn.Module):
    """Encoder of point maps [N, 3, rows, columns], which returns one token per patch, [N, h^2, E].

    Missing points have coordinates that are not finite.
    """

    def __init__(self, config: PointConfig):
        super().__init__()
        self.config = config
        channels = config.embed_dim
        p = config.patch_size
        patches_per_side = config.input_size // p
        self.point_proj = nn.Linear(3, channels)
        self.invalid_xyz_token = nn.Parameter(torch.zeros(channels))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, channels))
        # Embedding of a point's position within its patch; the first entry belongs to the class token.
        self.pos_embed_window = nn.Parameter(torch.zeros(1, 1 + p * p, channels))
        # Embedding of the patch's position in the map
        self.pos_embed = nn.Parameter(torch.zeros(1, channels, patches_per_side, patches_per_side))
        hidden_channels = int(config.mlp_ratio * channels)
        self.blocks = nn.ModuleList(
            Block(channels, config.num_heads, hidden_channels, eps=1e-6) for _ in range(config.depth)
        )

    def forward(self, points: torch.Tensor) -> torch.Tensor:
        side_points = self.config.input_size
        p = self.config.patch_size
        points = (
            F.interpolate(points, (side_points, side_points), mode="nearest")
            if points.shape[2:] != (side_points, side_points)
            else points
        )
        is_valid = points.isfinite().all(1)  # [N, s, s]
        # Missing points are set to 1, so that the transform stays finite. [N, s, s, 3]
        coordinates = remapped(points.where(is_valid[:, None], 1.0), self.config.remap_output).movedim(1, -1)
        # The token of a missing point is a trained vector. [N, s, s, E]
        tokens = torch.where(
            is_valid[..., None],
            self.point_proj(coordinates.to(self.point_proj.weight.dtype)),
            self.invalid_xyz_token,
        )
        # [N, h, p, h, p, E], with the rows and columns of patches before those of points: [N, h, h, p, p, E]
        tokens = tokens.unflatten(2, (-1, p)).unflatten(1, (-1, p)).transpose(2, 3)
        tokens = tokens.flatten(3, 4).flatten(1, 2)  # [N, h^2, p^2, E]
        patch_count = tokens.shape[1]  # h^2
        # Each patch is a sequence with a class token in front: [N h^2, 1 + p^2, E]
        tokens = tokens.flatten(0, 1)
        tokens = torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], 1) + self.pos_embed_window
        for block in self.blocks:
            tokens = block(tokens)
        # The class token (index 0) represents the patch. The embedding of the patch's position is added to
        # it.
        return tokens[:, 0].unflatten(0, (-1, patch_count)) + self.pos_embed.flatten(2).transpose(1, 2)


def remapped(points: torch.Tensor, transform_name: str) -> torch.Tensor:
    """Transform the coordinates of a point map, in most cases to reduce large values.

    Args:
        points: coordinates [N, 3, ...].
        transform_name: name of the transform, one of REMAPS; "linear" returns the coordinates unchanged.
    """
    if transform_name == "linear":
        return points
    if transform_name == "sinh":
        return points.asinh()
    # The other transforms treat the depth z differently from x and y.
    xy = points[:, :2]
    z = points[:, 2:]
    remapped_by_transform = {
        "exp": (xy / (1 + z), z.log1p()),
        "exp_disparity": (xy / z, z.log()),
        "sinh_exp": (xy.asinh(), z.clamp_min(1e-8).log()),
    }
    return torch.cat(remapped_by_transform[transform_name], 1)


class GatedFeedForward(nn.Module):
    """Feed-forward layer with a gate (SwiGLU, Shazeer 2020): w2(silu(w1 x) * w3 x).

    Args:
        channels: channels of the input.
        hidden_channels: channels between the layers.
        out_channels: channels of the output.
    """

    def __init__(self, channels: int, hidden_channels: int, out_channels: int):
        super().__init__()
        self.w1, self.w3 = (nn.Linear(channels, hidden_channels, bias=False) for _ in range(2))
        self.w2 = nn.Linear(hidden_channels, out_channels, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


# Inputs of an encoder, in order, as pairs: name of the input, and name of its frame (cropped or full), or
# None if no frame vector is added
Inputs = Sequence[tuple[str, str | None]]


class Embedder(nn.Module):
    """Embedder of images, masks and point maps, which returns conditioning tokens [N, L, W].

    It is called with the inputs by name, see `names`. Raises ValueError if one of them is missing.
    """

    def __init__(
        self,
        encoders: Sequence[tuple[nn.Module, int, Inputs]],
        hidden_widths: Sequence[int],
        channels: int,
        has_pre_norm: bool,
        *,
        has_random_frames: bool = False,
    ):
        """Build the embedder from its encoders.

        Args:
            encoders: triples of an encoder, its number of output channels, and its inputs.
            hidden_widths: channels inside the feed-forward layer after each encoder.
            channels: channels W of a conditioning token.
            has_pre_norm: True normalises the tokens before the feed-forward layer.
            has_random_frames: True if the vectors that distinguish the crop from the full frame were random
                and not trained. Files then store them with one more axis.
        """
        super().__init__()
        self.inputs = [inputs for _, _, inputs in encoders]
        # Names of all frames, each once, in the order of their first occurrence
        frames = [frame for inputs in self.inputs for _, frame in inputs]
        self.frames = list(dict.fromkeys(frame for frame in frames if frame is not None))
        self.module_list = nn.ModuleList(encoder for encoder, _, _ in encoders)
        self.projection_nets = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(encoder_channels) if has_pre_norm else nn.Identity(),
                GatedFeedForward(encoder_channels, hidden_channels, channels),
            )
            for (_, encoder_channels, _), hidden_channels in zip(encoders, hidden_widths, strict=True)
        )
        # Files contain one row more than there are frames. The original does not use the last row. A list
        # times False is empty, so the additional axis of length 1 exists only if has_random_frames is True.
        self.idx_emb = nn.Parameter(torch.zeros(len(self.frames) + 1, *[1] * has_random_frames, channels))

    @property
    def names(self) -> list[str]:
        """Return the names of the inputs, in the order of their tokens."""
        return [name for inputs in self.inputs for name, _ in inputs]

    def forward(self, inputs_by_name: Mapping[str, torch.Tensor]) -> torch.Tensor:
        missing_inputs = [input_name for input_name in self.names if input_name not in inputs_by_name]
        if missing_inputs:
            raise ValueError(
                f"conditioning: the inputs {', '.join(missing_inputs)} are missing. Pass all of"
                f" {', '.join(self.names)}."
            )
        input_tokens = []
        for encoder, project, inputs in zip(self.module_list, self.projection_nets, self.inputs, strict=True):
            for input_name, frame in inputs:
                tokens = project(encoder(inputs_by_name[input_name]))
                # One encoder may have several inputs. The vector of the frame distinguishes their tokens.
                input_tokens.append(
                    tokens if frame is None else tokens + self.idx_emb[self.frames.index(frame)]
                )
        return torch.cat(input_tokens, 1)
