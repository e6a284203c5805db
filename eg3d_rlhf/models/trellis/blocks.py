"""Building blocks of the flow models and autoencoders of TRELLIS (Xiang et al. 2024).

Parameters have TRELLIS's names. Tokens are [N, T, C] on a dense grid and [V, C] on voxels. The blocks are the
same for both: an object with the interface `Layout` assigns tokens to samples.

On voxels, self-attention divides the tokens into groups: each sample is a group, or each window of a sample.
Tokens attend only to the tokens of their group. In cross-attention they attend to the conditioning tokens of
their sample. The groups differ in length. All groups of the same length are processed in one call of torch's
fused attention, which never stores the matrix of attention weights. There is therefore no padding and no
mask, and the memory is proportional to the number of voxels. The division into groups depends only on the
coordinates and is stored in the batch's cache.

Shapes: N samples, T tokens of a sample on a dense grid, V voxels of all samples, C channels, H attention
heads, D channels of an attention head, L conditioning tokens, E channels of a conditioning token.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from eg3d_rlhf.core.shapes import check_shape
from eg3d_rlhf.models.attention import attend
from eg3d_rlhf.models.sparse import SparseBatch
from torch_utils.ops.linear import Linear
from torch_utils.ops.transformer import feed_forward, self_attention, tiled

TIME_SCALE = 1000  # factor of times before they are embedded
TIME_FREQUENCIES = 256  # number of entries of the sinusoidal embedding of a time
MAX_PERIOD = 10000  # largest period of sinusoidal embeddings (Vaswani et al. 2017, section 3.5)


@dataclass(frozen=True, kw_only=True)
class HeadsConfig:
    """Settings of the transformer blocks that are common to all networks of TRELLIS."""

    model_channels: int  # C
    num_blocks: int  # number of blocks
    num_heads: int | None = None  # H, attention heads; None: model_channels / num_head_channels
    num_head_channels: int = 64  # D, used if num_heads is None
    mlp_ratio: float = 4  # channels inside the feed-forward layer, as a multiple of model_channels
    use_checkpoint: bool = False  # True: the backward pass computes blocks again, which needs less memory
    qk_rms_norm: bool = False  # True: queries and keys of the self-attention are normalised

    @property
    def heads(self) -> int:
        """Return the number of attention heads H."""
        return self.num_heads or self.model_channels // self.num_head_channels


@dataclass(frozen=True, kw_only=True)
class ConditionedConfig(HeadsConfig):
    """Settings of transformer blocks with cross-attention to conditioning tokens."""

    cond_channels: int  # E, channels of a conditioning token
    share_mod: bool = False  # True: all blocks share the layers that compute the modulation by the time
    qk_rms_norm_cross: bool = False  # True: queries and keys of the cross-attention are normalised

    def blocks(self, block_class: "type[ModulatedBlock]") -> nn.ModuleList:
        """Build the blocks of the transformer, as instances of the class `block_class`."""
        return nn.ModuleList(
            block_class(
                self.model_channels,
                self.cond_channels,
                self.heads,
                self.mlp_ratio,
                share_mod=self.share_mod,
                qk_rms_norm=self.qk_rms_norm,
                qk_rms_norm_cross=self.qk_rms_norm_cross,
            )
            for _ in range(self.num_blocks)
        )


@dataclass(frozen=True, kw_only=True)
class TransformerConfig(HeadsConfig):
    """Settings that the JSON files of all transformers of TRELLIS contain in `args`.

    Raises: ValueError for settings that are not supported or do not fit together.
    """

    resolution: int  # number of grid cells per axis
    pe_mode: str = "ape"  # kind of position embedding; only "ape", the absolute one, is supported
    use_fp16: bool = False  # half precision for new blocks; weights from files have the dtype of the file

    def __post_init__(self):
        who = type(self).__name__
        if self.pe_mode != "ape":
            raise ValueError(
                f"{who}: pe_mode must be 'ape' (absolute positions), got {self.pe_mode!r}, which no released"
                " model uses. Use a released model."
            )
        if self.model_channels % self.heads:
            raise ValueError(
                f"{who}: model_channels must be a multiple of the number of heads, got {self.model_channels}"
                f" and {self.heads}. Download the model's JSON file again."
            )


def check_inputs(
    who: str,
    x_t: torch.Tensor,
    required_shape: list[int | str],
    cond: torch.Tensor,
    sample_count: int,
    channels: int,
) -> None:
    """Raise ValueError if the inputs of a flow model do not have the required shapes.

    Args:
        who: name of the model, for the message.
        x_t: latents.
        required_shape: required shape of the latents.
        cond: conditioning tokens.
        sample_count: required number of samples N of the conditioning.
        channels: required channels E of a conditioning token.
    """
    check_shape(f"{who}.x_t", x_t, required_shape, "Pass latents of this model.")
    remedy = "Use embeddings of the encoder that the model was trained with."
    check_shape(f"{who}.cond", cond, [sample_count, "L", channels], remedy)


class Layout(Protocol):
    """Assignment of the tokens of a batch to its samples."""

    def per_token(self, sample_rows: torch.Tensor) -> torch.Tensor:
        """Expand one row per sample [N, C] to a shape that broadcasts against the tokens."""

    def self_attention(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Compute self-attention within each sample. Arguments and result are [..., H, D]."""

    def cross_attention(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Compute attention from tokens to the conditioning tokens of their sample.

        Args:
            q: queries [..., H, D] of the tokens.
            k: keys [N, L, H, D] of the conditioning tokens.
            v: values [N, L, H, D] of the conditioning tokens.
        """


class DenseLayout:
    """Layout of tokens [N, T, C] on a dense grid.

    Args:
        keep_mask: mask [N, 1, 1, T] bool, True for tokens that may be attended to. None allows all tokens.
        passes: state of a block that the backward pass computes again, see `Passes`; None for other blocks.
    """

    def __init__(self, keep_mask: torch.Tensor | None = None, passes: "Passes | None" = None):
        self.keep_mask = keep_mask
        self.passes = passes

    def per_token(self, sample_rows: torch.Tensor) -> torch.Tensor:
        return sample_rows.unsqueeze(1)  # [N, 1, C]

    def self_attention(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return attend(q, k, v, self.keep_mask)

    def cross_attention(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return attend(q, k, v)


class LayerNorm32(nn.LayerNorm):
    """Layer norm over the last axis that computes in float32 and returns the dtype of its input."""

    def __init__(self, channels: int, affine: bool = False, eps: float = 1e-6):
        super().__init__(channels, eps=eps, elementwise_affine=affine)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.float()).to(x.dtype)

    def modulated(self, x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Compute norm(x) (1 + scale) + shift, for a norm without parameters.

        Args:
            x: tokens [..., C].
            shift: shift of the normalised tokens, in a shape that broadcasts against x.
            scale: scale of the normalised tokens, in the same shape as `shift`.
        """
        # If all tokens have the same scale and shift, one fused call
        # computes them as the norm's weight and bias.
        if x.dtype == scale.dtype == torch.float32 and scale.numel() == x.shape[-1]:
            return F.layer_norm(x, self.normalized_shape, 1 + scale.flatten(), shift.flatten(), self.eps)
        return self(x) * (1 + scale) + shift


class HeadRMSNorm(nn.Module):
    """Root-mean-square norm of the channels of each attention head (Zhang and Sennrich 2019).

    [..., H, D] -> [..., H, D]. The result is x / |x| * gamma * sqrt(D), where gamma [H, D] is trained. It is
    computed in float32.

    Args:
        num_heads: number of heads H.
        head_channels: channels D of an attention head.
    """

    def __init__(self, num_heads: int, head_channels: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(num_heads, head_channels))
        self.scale = head_channels**0.5  # sqrt(D): a normalised vector then has the mean square 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [..., H, D]
        return (F.normalize(x.float(), dim=-1) * self.gamma * self.scale).to(x.dtype)

    def gain(self) -> torch.Tensor:
        """Return the factors [H, D] by which `forward` multiplies vectors of length 1: gamma * sqrt(D)."""
        return self.gamma * self.scale


def time_rates(n_frequencies: int) -> torch.Tensor:
    """Return the n frequencies of a sinusoidal embedding, MAX_PERIOD^(-i / n) for i = 0 .. n - 1.

    They are in radians per unit of scaled time. Released weights were trained with the rounding of float32.
    """
    return torch.exp(-math.log(MAX_PERIOD) * torch.arange(n_frequencies, dtype=torch.float32) / n_frequencies)


class TimeEmbedder(nn.Module):
    """Embedding of times in 0..1: sines and cosines, then two linear layers, [N] -> [N, C] float32."""

    def __init__(self, channels: int):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(TIME_FREQUENCIES, channels), nn.SiLU(), nn.Linear(channels, channels)
        )

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        # [N, TIME_FREQUENCIES / 2]
        angles = (TIME_SCALE * t).float()[:, None] * time_rates(TIME_FREQUENCIES // 2).to(t.device)
        # The order of the trained weights: cosines first
        return self.mlp(torch.cat([angles.cos(), angles.sin()], -1))


def position_embedding(coords: torch.Tensor, channels: int) -> torch.Tensor:
    """Embed coordinates as sines and cosines.

    Args:
        coords: coordinates [V, 3].
        channels: number of channels of the embedding.

    Returns: the embedding [V, channels] float32. The order of its channels is: all sines of axis 1, all
        cosines of axis 1, then the same for axes 2 and 3, then zeros.
    """
    n_frequencies = channels // 3 // 2  # number of frequencies per axis; each has a sine and a cosine
    rates = 1 / MAX_PERIOD ** (
        torch.arange(n_frequencies, dtype=torch.float32, device=coords.device) / n_frequencies
    )
    angles = coords.float()[:, :, None] * rates  # [V, 3, n_frequencies]
    embedded_coords = torch.cat([angles.sin(), angles.cos()], -1).flatten(1)
    # Zeros fill the remaining channels if their number is no multiple of 6.
    return F.pad(embedded_coords, (0, channels - embedded_coords.shape[1]))


class FeedForward(nn.Module):
    """Feed-forward layer: linear layer, GELU (tanh approximation), linear layer, [..., C] -> [..., C].

    Args:
        channels: channels C.
        ratio: channels between the linear layers, as a multiple of C.
    """

    def __init__(self, channels: int, ratio: float):
        super().__init__()
        # Rounded down, as in the original: TRELLIS.2 has 5.3334 x 1536 = 8192.1 channels.
        hidden_channels = int(channels * ratio)
        self.mlp = nn.Sequential(
            Linear(channels, hidden_channels),
            nn.GELU(approximate="tanh"),
            Linear(hidden_channels, channels),
        )

    def forward(self, x: torch.Tensor, skip: bool = False) -> torch.Tensor:
        """Apply the layers.

        Args:
            x: tokens [..., C].
            skip: True if only the gradients of the result are needed, so that its values need not be
                computed.
        """
        input_layer, _, output_layer = self.mlp
        # The fused function takes plain weights, so it cannot be used for layers with adapters.
        if not (type(input_layer) is type(output_layer) is Linear):
            return self.mlp(x)
        return feed_forward(
            x, input_layer.weight, input_layer.bias, output_layer.weight, output_layer.bias, skip=skip
        )


class SelfAttention(nn.Module):
    """Self-attention within the samples or windows of a layout.

    Args:
        channels: channels C of a token.
        num_heads: number of heads H.
        qk_rms_norm: True normalises queries and keys.
    """

    def __init__(self, channels: int, num_heads: int, qk_rms_norm: bool = False):
        super().__init__()
        self.heads = num_heads
        self.to_qkv = Linear(channels, 3 * channels)  # queries, keys, values in this order
        self.q_rms_norm, self.k_rms_norm = (
            HeadRMSNorm(num_heads, channels // num_heads) if qk_rms_norm else nn.Identity() for _ in range(2)
        )
        self.to_out = Linear(channels, channels)

    def forward(self, x: torch.Tensor, layout: Layout) -> torch.Tensor:
        qkv = self.to_qkv(x).unflatten(-1, (3, self.heads, -1))  # [..., 3, H, D]
        # On a CPU, long dense sequences use the tiled implementation,
        # which stores no copies of queries and keys.
        if isinstance(layout, DenseLayout) and layout.keep_mask is None and tiled(qkv):
            norms = (self.q_rms_norm, self.k_rms_norm)
            q_gain, k_gain = (norm.gain() if isinstance(norm, HeadRMSNorm) else None for norm in norms)
            attention_output = self_attention(
                qkv, q_gain, k_gain, None if layout.passes is None else layout.passes.attention
            )
            if layout.passes is not None and layout.passes.keeps_attention:
                # When the backward pass computes the block again, it uses this result.
                layout.passes.attention = attention_output.detach()
        else:
            q, k, v = qkv.unbind(-3)  # [..., H, D]
            attention_output = layout.self_attention(self.q_rms_norm(q), self.k_rms_norm(k), v)
        return self.to_out(attention_output.flatten(-2))


class CrossAttention(nn.Module):
    """Cross-attention from tokens to conditioning tokens.

    Args:
        channels: channels C of a token.
        cond_channels: channels E of a conditioning token.
        num_heads: number of heads H.
        qk_rms_norm: True normalises queries and keys.
    """

    def __init__(self, channels: int, cond_channels: int, num_heads: int, qk_rms_norm: bool = False):
        super().__init__()
        self.heads = num_heads
        self.to_q = Linear(channels, channels)
        self.to_kv = Linear(cond_channels, 2 * channels)  # keys and values in this order
        self.q_rms_norm, self.k_rms_norm = (
            HeadRMSNorm(num_heads, channels // num_heads) if qk_rms_norm else nn.Identity() for _ in range(2)
        )
        self.to_out = Linear(channels, channels)

    def forward(self, x: torch.Tensor, cond: torch.Tensor, layout: Layout) -> torch.Tensor:
        q = self.to_q(x).unflatten(-1, (self.heads, -1))  # [..., H, D]
        k, v = self.to_kv(cond).unflatten(-1, (2, self.heads, -1)).unbind(-3)  # [N, L, H, D]
        return self.to_out(layout.cross_attention(self.q_rms_norm(q), self.k_rms_norm(k), v).flatten(-2))


class ModulatedBlock(nn.Module):
    """Transformer block of a self-attention, a cross-attention and a feed-forward layer.

    This is the block of DiT (Peebles and Xie 2023) with a cross-attention. The time modulates (shifts, scales
    and gates) the self-attention and the feed-forward layer.

    Args:
        channels: channels C of a token.
        cond_channels: channels E of a conditioning token.
        num_heads: number of heads H.
        mlp_ratio: channels inside the feed-forward layer, as a multiple of C.
        share_mod: True if the flow model computes the modulation for all its blocks.
        qk_rms_norm: True normalises queries and keys of the self-attention.
        qk_rms_norm_cross: True normalises queries and keys of the cross-attention.
    """

    def __init__(
        self,
        channels: int,
        cond_channels: int,
        num_heads: int,
        mlp_ratio: float = 4,
        *,
        share_mod: bool = False,
        qk_rms_norm: bool = False,
        qk_rms_norm_cross: bool = False,
    ):
        super().__init__()
        # The modulation by the time replaces the parameters of norm1 and norm3.
        self.norm1 = LayerNorm32(channels)
        self.norm2 = LayerNorm32(channels, affine=True)
        self.norm3 = LayerNorm32(channels)
        self.self_attn = SelfAttention(channels, num_heads, qk_rms_norm)
        self.cross_attn = CrossAttention(channels, cond_channels, num_heads, qk_rms_norm_cross)
        self.mlp = FeedForward(channels, mlp_ratio)
        # With shared modulation, these layers belong to the flow model.
        if not share_mod:
            self.adaLN_modulation = modulation(channels)
        self.share_mod = share_mod

    def forward(
        self, x: torch.Tensor, time: torch.Tensor, cond: torch.Tensor, layout: Layout
    ) -> torch.Tensor:
        """Apply the block.

        Args:
            x: tokens [..., C].
            time: embedded times [N, C], or the modulation [N, 6 C] if all blocks share it.
            cond: conditioning tokens [N, L, E].
            layout: assignment of the tokens to the samples.
        """
        modulations = time if self.share_mod else self.adaLN_modulation(time)
        # [N, 6 C] -> six rows [N, C], which broadcast against the tokens
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = (
            layout.per_token(chunk) for chunk in modulations.chunk(6, -1)
        )
        x = torch.addcmul(x, gate, self.self_attn(self.norm1.modulated(x, shift, scale), layout))
        x = x + self.cross_attn(self.norm2(x), cond, layout)
        is_recomputation = (
            isinstance(layout, DenseLayout) and layout.passes is not None and layout.passes.second
        )
        # A recomputation needs only the gradients of the feed-forward layer, but not its values, except for
        # the gradient of the gate.
        skips_values = is_recomputation and not mlp_gate.requires_grad
        return torch.addcmul(
            x, mlp_gate, self.mlp(self.norm3.modulated(x, mlp_shift, mlp_scale), skips_values)
        )


def modulation(channels: int) -> nn.Sequential:
    """Build the layers that map embedded times [N, C] to a modulation [N, 6 C].

    The modulation consists of shift, scale and gate of the self-attention and of the feed-forward layer.
    """
    return nn.Sequential(nn.SiLU(), nn.Linear(channels, 6 * channels))


class Passes:
    """State of a block that is computed in the forward pass, and again in the backward pass.

    Args:
        keeps_attention: True stores the result of the self-attention for the second computation.
    """

    def __init__(self, keeps_attention: bool):
        self.keeps_attention = keeps_attention
        self.second = False  # True in the second computation
        # Stored result of the self-attention [N, T, H, D]; None if it is not stored
        self.attention: torch.Tensor | None = None


def run_block(block: nn.Module, *args, recompute: bool) -> Any:
    """Apply a block to its arguments.

    Args:
        block: block.
        args: arguments of the block.
        recompute: True computes the block again in the backward pass, so that its intermediate results need
            not be stored.
    """
    # Without gradients no intermediate results are stored anyway.
    if recompute and torch.is_grad_enabled():
        return checkpoint(block, *args, use_reentrant=False)
    return block(*args)


def convert_torso(
    networks: Iterable[nn.Module],
    dtype: torch.dtype,
    layer_classes: tuple[type, ...] = (nn.Linear, nn.Conv3d),
) -> None:
    """Convert layers inside modules to another dtype, in place.

    Args:
        networks: modules to search.
        dtype: new dtype.
        layer_classes: classes of the layers to convert; other layers, such as norms, do not change.
    """
    for network in networks:
        for layer in network.modules():
            if isinstance(layer, layer_classes):
                layer.to(dtype)


def torso_dtype(blocks: nn.Module) -> torch.dtype:
    """Return the dtype in which blocks compute.

    This is the dtype of their first linear layer or convolution, or float32 if there is none. The setting
    use_fp16 is not read, because it applies only to new weights.
    """
    for layer in blocks.modules():
        if isinstance(layer, (nn.Linear, nn.Conv3d)):
            return layer.weight.dtype
    return torch.float32


@dataclass(frozen=True)
class Groups:
    """Groups of rows that attend to each other, as a new order of the rows in which each group is contiguous.

    A row may be in several groups; its result is then taken from one of them.
    """

    # A run consists of consecutive groups with the same number of rows. Its two numbers are the number of
    # groups and the number of rows of each group.
    runs: tuple[tuple[int, int], ...]
    order: torch.Tensor | None = None  # [sum of sizes] rows in the new order; None: the order of the batch
    # [V] position of each row's result in the new order. None if `order` is None.
    inverse: torch.Tensor | None = None

    @property
    def sizes(self) -> list[int]:
        """Return the number of rows of each run, in all its groups."""
        return [group_count * length for group_count, length in self.runs]


class SparseLayout:
    """Layout of tokens [V, C] on voxels.

    Args:
        batch: voxels.
        groups: groups of voxels for the self-attention; None: each sample is a group.
    """

    def __init__(self, batch: SparseBatch, groups: Groups | None = None):
        self.batch = batch
        self.groups = groups or samples(batch)

    def per_token(self, sample_rows: torch.Tensor) -> torch.Tensor:
        """Repeat each sample's row for its voxels, [N, C] -> [V, C]."""
        return sample_rows[self.batch.sample]

    def self_attention(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Compute self-attention within groups. All tensors are [V, H, D]."""
        groups = self.groups
        # One call per run: groups of the same length form a dense batch.
        runs = zip(*(_runs(x, groups) for x in (q, k, v)), strict=True)
        attention_output = torch.cat([attend(*run).flatten(0, 1) for run in runs])
        # Back to the order of the batch
        return attention_output if groups.inverse is None else attention_output[groups.inverse]

    def cross_attention(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Compute attention from voxels to the conditioning tokens of their sample, [V, H, D].

        Args:
            q: queries [V, H, D] of the voxels.
            k: keys [N, L, H, D] of the conditioning tokens.
            v: values [N, L, H, D] of the conditioning tokens.
        """
        groups = samples(self.batch)
        # One call for consecutive samples with the same number of voxels
        sample_counts = [sample_count for sample_count, _ in groups.runs]
        runs = zip(_runs(q, groups), k.split(sample_counts), v.split(sample_counts), strict=True)
        return torch.cat([attend(*run).flatten(0, 1) for run in runs])


def _runs(x: torch.Tensor, groups: Groups) -> list[torch.Tensor]:
    """Reorder rows by groups, and split them into runs (consecutive groups with the same number of rows).

    Args:
        x: rows [V, H, D] in the order of the batch.
        groups: groups of the rows.

    Returns: a list of one tensor [groups, rows of a group, H, D] per run.
    """
    ordered_rows = x if groups.order is None else x[groups.order]
    return [
        run_rows.unflatten(0, run)
        for run_rows, run in zip(ordered_rows.split(groups.sizes), groups.runs, strict=True)
    ]


def samples(batch: SparseBatch) -> Groups:
    """Return the groups for attention within samples: each sample is a group, in the order of the batch."""
    if "samples" not in batch.cache:
        runs: list[tuple[int, int]] = []
        # Only consecutive samples of the same length form a run, so that no reordering is needed.
        for length in batch.lengths.tolist():
            if runs and runs[-1][1] == length:
                runs[-1] = (runs[-1][0] + 1, length)
            else:
                runs.append((1, length))
        batch.cache["samples"] = Groups(tuple(runs))
    return batch.cache["samples"]


def windows(batch: SparseBatch, window_size: int, shift: int = 0) -> Groups:
    """Return the groups for attention within cubic windows: the voxels of a window are a group.

    Voxels of a sample belong to the same window if they have the same value of
    (coordinate + shift) // window_size on every axis.

    Args:
        batch: voxels.
        window_size: side of a window in voxels.
        shift: shift of the coordinates in voxels.
    """
    cache_key = f"windows {window_size} {shift}"
    if cache_key not in batch.cache:
        # One integer per window: sample, then the window's three indices.
        window_cells = (batch.coords[:, 1:].long() + shift) // window_size  # [V, 3]
        windows_per_axis = int(window_cells.max()) + 1  # windows per axis
        window_codes = (
            (batch.sample * windows_per_axis + window_cells[:, 0]) * windows_per_axis + window_cells[:, 1]
        ) * windows_per_axis + window_cells[:, 2]
        _, window_index, lengths = torch.unique(window_codes, return_inverse=True, return_counts=True)
        # Sorted by the length of the window and then by the window, so that windows of equal length are
        # contiguous. The stable sort does not change the order of the rows within a window.
        order = torch.argsort(lengths[window_index] * len(lengths) + window_index, stable=True)
        inverse_order = torch.empty_like(order)
        inverse_order[order] = torch.arange(len(order), device=order.device)
        # Different lengths in ascending order, and the number of windows of each length
        run_lengths, run_counts = (x.tolist() for x in torch.unique(lengths, return_counts=True))
        batch.cache[cache_key] = Groups(
            tuple(zip(run_counts, run_lengths, strict=True)), order, inverse_order
        )
    return batch.cache[cache_key]


def curve_windows(batch: SparseBatch, window_size: int, shift: int = 0, start: int = 0) -> Groups:
    """Return the groups for attention within sections of the Z-order curve through a sample's voxels.

    A sample of n voxels is divided into m = ceil(n / window_size) sections of equal length along the curve.
    If m > 1, the group of a section consists of the `window_size` voxels around its middle. These include
    voxels of the neighbouring sections, since a section has at most `window_size` voxels; the curve is
    treated as closed. Only the results for the voxels of the section itself are used.

    Args:
        batch: voxels.
        window_size: number of voxels of a group.
        shift: shift of the coordinates in voxels, which gives another curve.
        start: number of voxels by which the sections are shifted along the curve.
    """
    cache_key = f"curve {window_size} {shift} {start}"
    if cache_key not in batch.cache:
        curve_positions = z_order(batch.coords[:, 1:] + shift)  # [V], position on the curve
        runs: list[tuple[int, int]] = []
        group_rows: list[torch.Tensor] = []
        inverse_order = torch.empty_like(curve_positions)
        first_row = 0  # first row of the sample
        assigned_rows = 0  # number of rows of the new order that are assigned already
        for n in batch.lengths.tolist():
            # Rows of this sample in the order of the curve
            curve_rows = first_row + torch.argsort(curve_positions[first_row : first_row + n])
            section_count = -(-n // window_size)  # n / window_size, rounded up
            # Rows of a group, and length of a section, which need not be an integer
            group_size, section_length = (n, n) if section_count <= 1 else (window_size, n / section_count)
            for i in range(section_count):
                # Positions on the curve: the section is low..high, and the group starts at group_start.
                if section_count == 1:
                    section_start = 0
                    section_end = n
                    group_start = 0
                else:
                    section_start, section_end = (
                        math.floor((i + k) * section_length + start) for k in (0, 1)
                    )
                    group_start = math.floor((i + 0.5) * section_length + start - 0.5 * window_size)
                positions = torch.arange(group_start, group_start + group_size, device=curve_rows.device)
                group_rows.append(
                    curve_rows[positions % n]
                )  # modulo n, because the curve is treated as closed
                inverse_order[group_rows[-1][section_start - group_start : section_end - group_start]] = (
                    torch.arange(
                        assigned_rows + section_start - group_start,
                        assigned_rows + section_end - group_start,
                        device=curve_rows.device,
                    )
                )
                assigned_rows += group_size
            if section_count:
                runs.append((section_count, group_size))
            first_row += n
        batch.cache[cache_key] = Groups(tuple(runs), torch.cat(group_rows), inverse_order)
    return batch.cache[cache_key]


def z_order(coords: torch.Tensor) -> torch.Tensor:
    """Return the positions of points on the Z-order curve (Morton 1966), [V, 3] -> [V] int64.

    The bits of the three coordinates, 0..1023, are interleaved. In each triple of bits, that of x is the
    highest and that of z the lowest.
    """
    curve_positions = coords.new_zeros(len(coords), dtype=torch.int64)
    # Bit b of x, y, z goes to the bits 3 b + 2, 3 b + 1 and 3 b.
    for bit in range(10):
        for axis in range(3):
            curve_positions |= (coords[:, axis].long() >> bit & 1) << (3 * bit + 2 - axis)
    return curve_positions
