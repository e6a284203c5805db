"""The pieces that both of TRELLIS's flows are built of; parameters bear its names.

Tokens are [N, T, C] on a dense grid and [V, C] on voxels. What a block needs to know of the difference is a
`Layout`.

On voxels attention is within each sample, within windows of each sample, and to each sample's condition.
Groups of tokens have lengths of their own. Groups of one length are attended to in one call of torch's fused
attention, which keeps no matrix of weights; hence no padding, no mask, and memory linear in the number of
voxels. Which rows go together depends on the coordinates alone and is kept in the batch's cache.

Shape letters: N samples, T tokens or voxels of a dense batch, V voxels of a sparse one, C channels, H heads,
D channels of a head, L tokens of a condition, E their size.
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

TIME_SCALE = 1000  # the networks read 1000 t
TIME_FREQUENCIES = 256  # entries of the sinusoidal embedding of a time
MAX_PERIOD = 10000


@dataclass(frozen=True, kw_only=True)
class HeadsConfig:
    """What the files of all these transformers say of their blocks."""

    model_channels: int
    num_blocks: int
    num_heads: int | None = None  # or model_channels / num_head_channels
    num_head_channels: int = 64
    mlp_ratio: float = 4
    use_checkpoint: bool = False  # compute blocks again in the backward pass
    qk_rms_norm: bool = False

    @property
    def heads(self) -> int:
        """Of every attention."""
        return self.num_heads or self.model_channels // self.num_head_channels


@dataclass(frozen=True, kw_only=True)
class ConditionedConfig(HeadsConfig):
    """What those of flows say besides."""

    cond_channels: int
    share_mod: bool = False
    qk_rms_norm_cross: bool = False

    def blocks(self, kind: "type[ModulatedBlock]") -> nn.ModuleList:
        """The transformer's."""
        return nn.ModuleList(
            kind(
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
    """What the JSON files of TRELLIS's transformers call args, as far as all have it."""

    resolution: int
    pe_mode: str = "ape"
    use_fp16: bool = False  # type of the blocks as built; files bring their own

    def __post_init__(self):
        who = type(self).__name__
        if self.pe_mode != "ape":
            raise ValueError(
                f"{who}: expected pe_mode 'ape', got {self.pe_mode!r}. Rotary positions are in no released"
                " model."
            )
        if self.model_channels % self.heads:
            got = f"{self.model_channels} / {self.heads}"
            raise ValueError(
                f"{who}: expected model_channels to divide by heads, got {got}. Correct the model's JSON"
                " file."
            )


def check_inputs(
    who: str, x_t: torch.Tensor, shape: list[int | str], cond: torch.Tensor, samples: int, channels: int
) -> None:
    """Raise ValueError unless latents have this shape, and the conditioning [samples, L, channels]."""
    check_shape(f"{who}.x_t", x_t, shape, "Give latents of this model's size.")
    remedy = "Use embeddings of the encoder it was trained with."
    check_shape(f"{who}.cond", cond, [samples, "L", channels], remedy)


class Layout(Protocol):
    """How the tokens of a batch belong to samples."""

    def per_token(self, values: torch.Tensor) -> torch.Tensor:
        """One row per sample [N, C] in a shape that broadcasts against the tokens."""

    def self_attention(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Attention among the tokens of each sample; all [..., H, D], as are the results."""

    def cross_attention(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Attention from tokens [..., H, D] to their sample's condition, k and v [N, L, H, D]."""


class DenseLayout:
    """Tokens [N, T, C], of which only those of `keep` [N, 1, 1, T] are there; None: all. Maybe of a block
    that is passed twice.
    """

    def __init__(self, keep: torch.Tensor | None = None, passes: "Passes | None" = None):
        self.keep = keep
        self.passes = passes

    def per_token(self, values: torch.Tensor) -> torch.Tensor:
        return values.unsqueeze(1)

    def self_attention(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return attend(q, k, v, self.keep)

    def cross_attention(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return attend(q, k, v)


class LayerNorm32(nn.LayerNorm):
    """Layer norm computed in float32 whatever the type of its input. Parameters only with
    `elementwise_affine`.
    """

    def __init__(self, channels: int, affine: bool = False, eps: float = 1e-6):
        super().__init__(channels, eps=eps, elementwise_affine=affine)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.float()).to(x.dtype)

    def modulated(self, x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """norm(x) (1 + scale) + shift, of a norm without parameters; in one pass where that is one row
        [1, 1, C] for all.
        """
        if x.dtype == scale.dtype == torch.float32 and scale.numel() == x.shape[-1]:
            return F.layer_norm(x, self.normalized_shape, 1 + scale.flatten(), shift.flatten(), self.eps)
        return self(x) * (1 + scale) + shift


class HeadRMSNorm(nn.Module):
    """x / |x| * gamma * sqrt(D), per head; in float32."""

    def __init__(self, heads: int, size: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(heads, size))
        self.scale = size**0.5

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [..., H, D]
        return (F.normalize(x.float(), dim=-1) * self.gamma * self.scale).to(x.dtype)

    def gain(self) -> torch.Tensor:
        """[H, D], what normalised vectors are multiplied by."""
        return self.gamma * self.scale


def time_rates(count: int) -> torch.Tensor:
    """Angles per unit of scaled time, MAX_PERIOD^(-i / count) [count] float32: in float32 as released weights
    were trained with.
    """
    return torch.exp(-math.log(MAX_PERIOD) * torch.arange(count, dtype=torch.float32) / count)


class TimeEmbedder(nn.Module):
    """Times in 0..1 [N] -> [N, C], float32."""

    def __init__(self, channels: int):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(TIME_FREQUENCIES, channels), nn.SiLU(), nn.Linear(channels, channels)
        )

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        # [N, half]
        angles = (TIME_SCALE * t).float()[:, None] * time_rates(TIME_FREQUENCIES // 2).to(t.device)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], -1))


def position_embedding(coords: torch.Tensor, channels: int) -> torch.Tensor:
    """Sines and cosines of coordinates, [V, 3] -> [V, channels] float32: per axis all sines, then all
    cosines; zeros fill up the rest.
    """
    count = channels // 3 // 2
    rates = 1 / MAX_PERIOD ** (torch.arange(count, dtype=torch.float32, device=coords.device) / count)
    angles = coords.float()[:, :, None] * rates  # [V, 3, count]
    embedded = torch.cat([angles.sin(), angles.cos()], -1).flatten(1)
    return F.pad(embedded, (0, channels - embedded.shape[1]))


class FeedForward(nn.Module):
    """Linear, GELU (tanh form), linear."""

    def __init__(self, channels: int, ratio: float):
        super().__init__()
        hidden = int(channels * ratio)
        self.mlp = nn.Sequential(
            Linear(channels, hidden), nn.GELU(approximate="tanh"), Linear(hidden, channels)
        )

    def forward(self, x: torch.Tensor, skip: bool = False) -> torch.Tensor:
        """Tokens [..., C]; skip: nobody reads the result, as long as it has its gradients."""
        first, _, last = self.mlp
        if not (type(first) is type(last) is Linear):  # adapters
            return self.mlp(x)
        return feed_forward(x, first.weight, first.bias, last.weight, last.bias, skip=skip)


class SelfAttention(nn.Module):
    """Attention among tokens."""

    def __init__(self, channels: int, heads: int, qk_rms_norm: bool = False):
        super().__init__()
        self.heads = heads
        self.to_qkv = Linear(channels, 3 * channels)
        self.q_rms_norm, self.k_rms_norm = (
            HeadRMSNorm(heads, channels // heads) if qk_rms_norm else nn.Identity() for _ in range(2)
        )
        self.to_out = Linear(channels, channels)

    def forward(self, x: torch.Tensor, layout: Layout) -> torch.Tensor:
        qkv = self.to_qkv(x).unflatten(-1, (3, self.heads, -1))
        if isinstance(layout, DenseLayout) and layout.keep is None and tiled(qkv):
            norms = (self.q_rms_norm, self.k_rms_norm)
            q_gain, k_gain = (norm.gain() if isinstance(norm, HeadRMSNorm) else None for norm in norms)
            out = self_attention(
                qkv, q_gain, k_gain, None if layout.passes is None else layout.passes.attention
            )
            if layout.passes is not None and layout.passes.keep:
                layout.passes.attention = out.detach()
        else:
            q, k, v = qkv.unbind(-3)  # [..., H, D]
            out = layout.self_attention(self.q_rms_norm(q), self.k_rms_norm(k), v)
        return self.to_out(out.flatten(-2))


class CrossAttention(nn.Module):
    """Attention from tokens to a condition's."""

    def __init__(self, channels: int, cond_channels: int, heads: int, qk_rms_norm: bool = False):
        super().__init__()
        self.heads = heads
        self.to_q = Linear(channels, channels)
        self.to_kv = Linear(cond_channels, 2 * channels)
        self.q_rms_norm, self.k_rms_norm = (
            HeadRMSNorm(heads, channels // heads) if qk_rms_norm else nn.Identity() for _ in range(2)
        )
        self.to_out = Linear(channels, channels)

    def forward(self, x: torch.Tensor, cond: torch.Tensor, layout: Layout) -> torch.Tensor:
        q = self.to_q(x).unflatten(-1, (self.heads, -1))  # [..., H, D]
        k, v = self.to_kv(cond).unflatten(-1, (2, self.heads, -1)).unbind(-3)  # [N, L, H, D]
        return self.to_out(layout.cross_attention(self.q_rms_norm(q), self.k_rms_norm(k), v).flatten(-2))


class ModulatedBlock(nn.Module):
    """Self-attention, cross-attention and feed-forward; the time shifts, scales and gates the first and the
    last.
    """

    def __init__(
        self,
        channels: int,
        cond_channels: int,
        heads: int,
        mlp_ratio: float = 4,
        *,
        share_mod: bool = False,
        qk_rms_norm: bool = False,
        qk_rms_norm_cross: bool = False,
    ):
        super().__init__()
        self.norm1 = LayerNorm32(channels)
        self.norm2 = LayerNorm32(channels, affine=True)
        self.norm3 = LayerNorm32(channels)
        self.self_attn = SelfAttention(channels, heads, qk_rms_norm)
        self.cross_attn = CrossAttention(channels, cond_channels, heads, qk_rms_norm_cross)
        self.mlp = FeedForward(channels, mlp_ratio)
        if not share_mod:
            self.adaLN_modulation = modulation(channels)
        self.share_mod = share_mod

    def forward(
        self, x: torch.Tensor, time: torch.Tensor, cond: torch.Tensor, layout: Layout
    ) -> torch.Tensor:
        """Tokens [..., C], time [N, C] (shared modulation: [N, 6 C]) and cond [N, L, E] -> tokens."""
        values = time if self.share_mod else self.adaLN_modulation(time)
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = (
            layout.per_token(v) for v in values.chunk(6, -1)
        )
        x = torch.addcmul(x, gate, self.self_attn(self.norm1.modulated(x, shift, scale), layout))
        x = x + self.cross_attn(self.norm2(x), cond, layout)
        again = isinstance(layout, DenseLayout) and layout.passes is not None and layout.passes.second
        skip = again and not mlp_gate.requires_grad  # a gate's gradient reads what it gates
        return torch.addcmul(x, mlp_gate, self.mlp(self.norm3.modulated(x, mlp_shift, mlp_scale), skip))


def modulation(channels: int) -> nn.Sequential:
    """Time embedding [N, C] -> shift, scale and gate of both branches [N, 6 C]."""
    return nn.Sequential(nn.SiLU(), nn.Linear(channels, 6 * channels))


class Passes:
    """A block's pass, and the second one through it in the backward pass, to which the first may leave its
    attention.
    """

    def __init__(self, keep: bool):
        self.keep = keep
        self.second = False
        self.attention: torch.Tensor | None = None  # [N, T, H, D]


def run_block(block: nn.Module, *args, recompute: bool) -> Any:
    """A block's result; with `recompute` its inside is computed again in the backward pass instead of being
    kept.
    """
    if recompute and torch.is_grad_enabled():
        return checkpoint(block, *args, use_reentrant=False)
    return block(*args)


def convert_torso(
    modules: Iterable[nn.Module], dtype: torch.dtype, kinds: tuple[type, ...] = (nn.Linear, nn.Conv3d)
) -> None:
    """Give linear layers and convolutions inside these modules another type, in place; norms keep theirs."""
    for module in modules:
        for part in module.modules():
            if isinstance(part, kinds):
                part.to(dtype)


def torso_dtype(blocks: nn.Module) -> torch.dtype:
    """The type that blocks compute in: that of the first linear layer or convolution. Read off, so that no
    flag can disagree with it.
    """
    for part in blocks.modules():
        if isinstance(part, (nn.Linear, nn.Conv3d)):
            return part.weight.dtype
    return torch.float32


@dataclass(frozen=True)
class Groups:
    """Rows of a batch, put in order such that groups are contiguous. A row may be in several: its result is
    then that of one of them.
    """

    # (number of groups, rows of each), one entry per stretch of groups of one length
    runs: tuple[tuple[int, int], ...]
    order: torch.Tensor | None = None  # [sum of sizes] rows in that order; None: as they are
    inverse: torch.Tensor | None = None  # [V] where each row's result is

    @property
    def sizes(self) -> list[int]:
        """Rows of each run."""
        return [count * length for count, length in self.runs]


class SparseLayout:
    """The `Layout` of blocks.py for tokens [V, C] of a sparse batch.

    Self-attention stays within `groups` of its voxels; by default each sample is one.
    """

    def __init__(self, batch: SparseBatch, groups: Groups | None = None):
        self.batch = batch
        self.groups = groups or samples(batch)

    def per_token(self, values: torch.Tensor) -> torch.Tensor:
        """[N, C] -> [V, C]."""
        return values[self.batch.sample]

    def self_attention(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """All [V, H, D] -> [V, H, D]."""
        groups = self.groups
        parts = zip(*(_runs(x, groups) for x in (q, k, v)), strict=True)
        out = torch.cat([attend(*part).flatten(0, 1) for part in parts])
        return out if groups.inverse is None else out[groups.inverse]

    def cross_attention(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """q [V, H, D], k and v [N, L, H, D] -> [V, H, D]."""
        groups = samples(self.batch)
        counts = [count for count, _ in groups.runs]
        parts = zip(_runs(q, groups), k.split(counts), v.split(counts), strict=True)
        return torch.cat([attend(*part).flatten(0, 1) for part in parts])


def _runs(x: torch.Tensor, groups: Groups) -> list[torch.Tensor]:
    """[V, H, D] -> per run [groups, rows of each, H, D]."""
    ordered = x if groups.order is None else x[groups.order]
    return [
        part.unflatten(0, run) for part, run in zip(ordered.split(groups.sizes), groups.runs, strict=True)
    ]


def samples(batch: SparseBatch) -> Groups:
    """One group per sample; the rows are in order already."""
    if "samples" not in batch.cache:
        runs: list[tuple[int, int]] = []
        for length in batch.lengths.tolist():
            if runs and runs[-1][1] == length:
                runs[-1] = (runs[-1][0] + 1, length)
            else:
                runs.append((1, length))
        batch.cache["samples"] = Groups(tuple(runs))
    return batch.cache["samples"]


def windows(batch: SparseBatch, window: int, shift: int = 0) -> Groups:
    """One group per window that has voxels: those of a sample with one value of (coordinate + shift) //
    window on every axis.
    """
    name = f"windows {window} {shift}"
    if name not in batch.cache:
        cells = (batch.coords[:, 1:].long() + shift) // window  # [V, 3]
        side = int(cells.max()) + 1
        codes = ((batch.sample * side + cells[:, 0]) * side + cells[:, 1]) * side + cells[:, 2]
        _, group, lengths = torch.unique(codes, return_inverse=True, return_counts=True)
        order = torch.argsort(lengths[group] * len(lengths) + group, stable=True)  # short windows first
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(len(order), device=order.device)
        length, count = (x.tolist() for x in torch.unique(lengths, return_counts=True))
        batch.cache[name] = Groups(tuple(zip(count, length, strict=True)), order, inverse)
    return batch.cache[name]


def curve_windows(batch: SparseBatch, window: int, shift: int = 0, start: int = 0) -> Groups:
    """Stretches of the Z-order curve through each sample's voxels.

    A sample of n voxels is cut into m = ceil(n / window) parts of equal length along the curve. Each of
    several sees the `window` voxels about its middle, over its own ends and round those of the curve; results
    are kept of the part alone.
    Args: window: voxels; shift: added to coordinates, which moves the curve; start: voxels by which the cuts
        move along it.
    """
    name = f"curve {window} {shift} {start}"
    if name not in batch.cache:
        code = z_order(batch.coords[:, 1:] + shift)
        runs: list[tuple[int, int]] = []
        order: list[torch.Tensor] = []
        inverse = torch.empty_like(code)
        first = 0
        done = 0
        for n in batch.lengths.tolist():
            # this sample's rows in the order of the curve
            along = first + torch.argsort(code[first : first + n])
            count = -(-n // window)
            # rows seen and kept; the latter need not be whole
            size, length = (n, n) if count <= 1 else (window, n / count)
            for i in range(count):
                low, high = (0, n) if count == 1 else (math.floor((i + k) * length + start) for k in (0, 1))
                left = 0 if count == 1 else math.floor((i + 0.5) * length + start - 0.5 * window)
                order.append(along[torch.arange(left, left + size, device=along.device) % n])
                inverse[order[-1][low - left : high - left]] = torch.arange(
                    done + low - left, done + high - left, device=along.device
                )
                done += size
            if count:
                runs.append((count, size))
            first += n
        batch.cache[name] = Groups(tuple(runs), torch.cat(order), inverse)
    return batch.cache[name]


def z_order(coords: torch.Tensor) -> torch.Tensor:
    """Places on the Z-order curve, [V, 3] of 0..1023 -> [V] int64: the bits of x, y and z in turn, x's above
    y's above z's.
    """
    code = coords.new_zeros(len(coords), dtype=torch.int64)
    for bit in range(10):
        for axis in range(3):
            code |= (coords[:, axis].long() >> bit & 1) << (3 * bit + 2 - axis)
    return code
