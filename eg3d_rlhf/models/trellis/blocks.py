"""Building blocks of TRELLIS's flows and autoencoders; parameters have TRELLIS's names.

Tokens are [N, T, C] on a dense grid and [V, C] on voxels. A `Layout` hides the difference from the blocks.

On voxels, self-attention stays within each sample, or within windows of each sample, and cross-attention goes
to the sample's conditioning tokens. Groups of tokens differ in length. All groups of one length are processed
in one call of torch's fused attention, which never stores the matrix of weights. There is therefore no
padding and no mask, and memory is linear in the number of voxels. The division into groups depends only on
the coordinates and is kept in the batch's cache.

Shape letters: N samples, T tokens or voxels of a dense batch, V voxels of a sparse one, C channels, H heads,
D channels of a head, L conditioning tokens, E channels of a conditioning token.
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
MAX_PERIOD = 10000  # of sinusoidal embeddings (Vaswani et al. 2017, section 3.5)


@dataclass(frozen=True, kw_only=True)
class HeadsConfig:
    """Settings of the blocks that the files of all these transformers have."""

    model_channels: int  # C
    num_blocks: int
    num_heads: int | None = None  # None: model_channels / num_head_channels
    num_head_channels: int = 64
    mlp_ratio: float = 4  # hidden channels of the feed-forward layer, in model channels
    use_checkpoint: bool = False  # recompute blocks in the backward pass
    qk_rms_norm: bool = False  # normalise queries and keys of the self-attention

    @property
    def heads(self) -> int:
        """Number of heads of every attention."""
        return self.num_heads or self.model_channels // self.num_head_channels


@dataclass(frozen=True, kw_only=True)
class ConditionedConfig(HeadsConfig):
    """Settings that the files of flows have besides: blocks that read conditioning tokens."""

    cond_channels: int  # E, channels of a conditioning token
    share_mod: bool = False  # one modulation for all blocks
    qk_rms_norm_cross: bool = False

    def blocks(self, kind: "type[ModulatedBlock]") -> nn.ModuleList:
        """Build the blocks of the transformer."""
        # All flows have the same blocks; they differ in what is before and after.
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
    """Settings that the JSON files of all TRELLIS transformers have in `args`."""

    resolution: int  # grid cells per axis
    pe_mode: str = "ape"  # kind of position embedding; "ape" is absolute
    use_fp16: bool = False  # half precision for new blocks; loaded files keep their own dtype

    def __post_init__(self):
        who = type(self).__name__
        # Another value would need another position embedding.
        if self.pe_mode != "ape":
            raise ValueError(
                f"{who}: expected pe_mode 'ape', got {self.pe_mode!r}. Rotary positions are not supported: no"
                " released model uses them. Name a released model."
            )
        if self.model_channels % self.heads:
            got = f"{self.model_channels} / {self.heads}"
            raise ValueError(
                f"{who}: expected model_channels to be a multiple of the number of heads, got {got}. Correct"
                " the model's JSON file."
            )


def check_inputs(
    who: str, x_t: torch.Tensor, shape: list[int | str], cond: torch.Tensor, samples: int, channels: int
) -> None:
    """Raise ValueError unless x_t has this shape and the conditioning is [samples, L, channels]."""
    check_shape(f"{who}.x_t", x_t, shape, "Give latents of this model's size.")
    remedy = "Use embeddings of the encoder it was trained with."
    check_shape(f"{who}.cond", cond, [samples, "L", channels], remedy)


class Layout(Protocol):
    """Assignment of the tokens of a batch to its samples."""

    def per_token(self, values: torch.Tensor) -> torch.Tensor:
        """Expand one row per sample [N, C] to a shape that broadcasts against the tokens."""

    def self_attention(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Attend among the tokens of each sample. Arguments and result are [..., H, D]."""

    def cross_attention(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Attend from tokens [..., H, D] to their sample's conditioning tokens, k and v [N, L, H, D]."""


class DenseLayout:
    """Layout of tokens [N, T, C].

    Args:
        keep: [N, 1, 1, T] bool, True for tokens that exist; None: all of them.
        passes: state of a block that is run twice; see `Passes`.
    """

    def __init__(self, keep: torch.Tensor | None = None, passes: "Passes | None" = None):
        self.keep = keep
        self.passes = passes

    def per_token(self, values: torch.Tensor) -> torch.Tensor:
        return values.unsqueeze(1)  # [N, 1, C]

    def self_attention(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return attend(q, k, v, self.keep)

    def cross_attention(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return attend(q, k, v)


class LayerNorm32(nn.LayerNorm):
    """Layer norm that computes in float32 and returns the dtype of its input."""

    def __init__(self, channels: int, affine: bool = False, eps: float = 1e-6):
        super().__init__(channels, eps=eps, elementwise_affine=affine)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.float()).to(x.dtype)

    def modulated(self, x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Compute norm(x) (1 + scale) + shift for a norm without parameters.

        It is one fused call if scale and shift are one row [1, 1, C] for all tokens.
        """
        # One row for all tokens, so scale and shift can stand in for the norm's weight and bias.
        if x.dtype == scale.dtype == torch.float32 and scale.numel() == x.shape[-1]:
            return F.layer_norm(x, self.normalized_shape, 1 + scale.flatten(), shift.flatten(), self.eps)
        return self(x) * (1 + scale) + shift


class HeadRMSNorm(nn.Module):
    """Normalise each head's vector: x / |x| * gamma * sqrt(D), in float32 (Zhang and Sennrich 2019)."""

    def __init__(self, heads: int, size: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(heads, size))
        self.scale = size**0.5  # sqrt(D): a normalised vector then has the mean square 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [..., H, D]
        return (F.normalize(x.float(), dim=-1) * self.gamma * self.scale).to(x.dtype)

    def gain(self) -> torch.Tensor:
        """Return the factors [H, D] of the normalised vectors."""
        return self.gamma * self.scale


def time_rates(count: int) -> torch.Tensor:
    """Return angles per unit of scaled time, MAX_PERIOD^(-i / count), [count] float32.

    They are computed in float32, because released weights were trained so.
    """
    return torch.exp(-math.log(MAX_PERIOD) * torch.arange(count, dtype=torch.float32) / count)


class TimeEmbedder(nn.Module):
    """Sinusoidal embedding of times in 0..1 and two linear layers, [N] -> [N, C], float32."""

    def __init__(self, channels: int):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(TIME_FREQUENCIES, channels), nn.SiLU(), nn.Linear(channels, channels)
        )

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        # [N, TIME_FREQUENCIES / 2]; cosines come first in TRELLIS.
        angles = (TIME_SCALE * t).float()[:, None] * time_rates(TIME_FREQUENCIES // 2).to(t.device)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], -1))


def position_embedding(coords: torch.Tensor, channels: int) -> torch.Tensor:
    """Embed coordinates [V, 3] by sines and cosines, [V, channels] float32.

    Per axis come all sines, then all cosines; zeros fill up the rest.
    """
    count = channels // 3 // 2  # frequencies per axis; a sine and a cosine for each
    rates = 1 / MAX_PERIOD ** (torch.arange(count, dtype=torch.float32, device=coords.device) / count)
    angles = coords.float()[:, :, None] * rates  # [V, 3, count]
    embedded = torch.cat([angles.sin(), angles.cos()], -1).flatten(1)
    # channels need not be a multiple of 6
    return F.pad(embedded, (0, channels - embedded.shape[1]))


class FeedForward(nn.Module):
    """Linear layer, GELU (tanh form), linear layer."""

    def __init__(self, channels: int, ratio: float):
        super().__init__()
        # Truncated, as in the original: TRELLIS.2 has 5.3334 x 1536 = 8192.1 channels.
        hidden = int(channels * ratio)
        self.mlp = nn.Sequential(
            Linear(channels, hidden), nn.GELU(approximate="tanh"), Linear(hidden, channels)
        )

    def forward(self, x: torch.Tensor, skip: bool = False) -> torch.Tensor:
        """Apply the layers to tokens [..., C].

        Args: skip: the caller does not read the result, only its gradients, so it need not be computed.
        """
        first, _, last = self.mlp
        # Layers with adapters are no plain matrices; the fused function cannot take them.
        if not (type(first) is type(last) is Linear):
            return self.mlp(x)
        return feed_forward(x, first.weight, first.bias, last.weight, last.bias, skip=skip)


class SelfAttention(nn.Module):
    """Self-attention among the tokens of a layout."""

    def __init__(self, channels: int, heads: int, qk_rms_norm: bool = False):
        super().__init__()
        self.heads = heads
        self.to_qkv = Linear(channels, 3 * channels)  # queries, keys, values in this order
        self.q_rms_norm, self.k_rms_norm = (
            HeadRMSNorm(heads, channels // heads) if qk_rms_norm else nn.Identity() for _ in range(2)
        )
        self.to_out = Linear(channels, channels)

    def forward(self, x: torch.Tensor, layout: Layout) -> torch.Tensor:
        qkv = self.to_qkv(x).unflatten(-1, (3, self.heads, -1))  # [..., 3, H, D]
        # Long dense sequences on a CPU take the tiled implementation, which keeps no copy of q and k.
        if isinstance(layout, DenseLayout) and layout.keep is None and tiled(qkv):
            norms = (self.q_rms_norm, self.k_rms_norm)
            q_gain, k_gain = (norm.gain() if isinstance(norm, HeadRMSNorm) else None for norm in norms)
            out = self_attention(
                qkv, q_gain, k_gain, None if layout.passes is None else layout.passes.attention
            )
            if layout.passes is not None and layout.passes.keep:
                # The recomputation in the backward pass then finds the result instead of attending again.
                layout.passes.attention = out.detach()
        else:
            q, k, v = qkv.unbind(-3)  # [..., H, D]
            out = layout.self_attention(self.q_rms_norm(q), self.k_rms_norm(k), v)
        return self.to_out(out.flatten(-2))


class CrossAttention(nn.Module):
    """Cross-attention from tokens to the conditioning tokens."""

    def __init__(self, channels: int, cond_channels: int, heads: int, qk_rms_norm: bool = False):
        super().__init__()
        self.heads = heads
        self.to_q = Linear(channels, channels)
        self.to_kv = Linear(cond_channels, 2 * channels)  # keys, then values
        self.q_rms_norm, self.k_rms_norm = (
            HeadRMSNorm(heads, channels // heads) if qk_rms_norm else nn.Identity() for _ in range(2)
        )
        self.to_out = Linear(channels, channels)

    def forward(self, x: torch.Tensor, cond: torch.Tensor, layout: Layout) -> torch.Tensor:
        q = self.to_q(x).unflatten(-1, (self.heads, -1))  # [..., H, D]
        k, v = self.to_kv(cond).unflatten(-1, (2, self.heads, -1)).unbind(-3)  # [N, L, H, D]
        return self.to_out(layout.cross_attention(self.q_rms_norm(q), self.k_rms_norm(k), v).flatten(-2))


class ModulatedBlock(nn.Module):
    """Transformer block with self-attention, cross-attention and feed-forward layer (DiT, Peebles and Xie
    2023).

    The time shifts, scales and gates the first and the last of the three.
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
        # norm1 and norm3 are modulated by the time, so they have no parameters of their own.
        self.norm1 = LayerNorm32(channels)
        self.norm2 = LayerNorm32(channels, affine=True)
        self.norm3 = LayerNorm32(channels)
        self.self_attn = SelfAttention(channels, heads, qk_rms_norm)
        self.cross_attn = CrossAttention(channels, cond_channels, heads, qk_rms_norm_cross)
        self.mlp = FeedForward(channels, mlp_ratio)
        # With shared modulation the flow itself holds these layers.
        if not share_mod:
            self.adaLN_modulation = modulation(channels)
        self.share_mod = share_mod

    def forward(
        self, x: torch.Tensor, time: torch.Tensor, cond: torch.Tensor, layout: Layout
    ) -> torch.Tensor:
        """Apply the block.

        Args:
            x: tokens [..., C].
            time: [N, C], or [N, 6 C] with shared modulation.
            cond: conditioning tokens [N, L, E].
        """
        values = time if self.share_mod else self.adaLN_modulation(time)
        # [N, 6 C] -> six rows per sample, which broadcast against the tokens.
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = (
            layout.per_token(v) for v in values.chunk(6, -1)
        )
        x = torch.addcmul(x, gate, self.self_attn(self.norm1.modulated(x, shift, scale), layout))
        x = x + self.cross_attn(self.norm2(x), cond, layout)
        again = isinstance(layout, DenseLayout) and layout.passes is not None and layout.passes.second
        # In the second pass only gradients are needed. The gate's own gradient reads the result, so it may be
        # skipped only if the gate needs none.
        skip = again and not mlp_gate.requires_grad
        return torch.addcmul(x, mlp_gate, self.mlp(self.norm3.modulated(x, mlp_shift, mlp_scale), skip))


def modulation(channels: int) -> nn.Sequential:
    """Build the layers that map a time [N, C] to shift, scale and gate of both branches, [N, 6 C]."""
    return nn.Sequential(nn.SiLU(), nn.Linear(channels, 6 * channels))


class Passes:
    """State of a block that is run twice: in the forward pass, and again in the backward pass.

    With `keep` the first run leaves its attention to the second.
    """

    def __init__(self, keep: bool):
        self.keep = keep
        self.second = False
        self.attention: torch.Tensor | None = None  # [N, T, H, D]


def run_block(block: nn.Module, *args, recompute: bool) -> Any:
    """Run a block. With `recompute`, its inside is computed again in the backward pass instead of being
    stored.
    """
    if recompute and torch.is_grad_enabled():
        # Without gradients there is nothing to store, so the block simply runs.
        return checkpoint(block, *args, use_reentrant=False)
    return block(*args)


def convert_torso(
    modules: Iterable[nn.Module], dtype: torch.dtype, kinds: tuple[type, ...] = (nn.Linear, nn.Conv3d)
) -> None:
    """Convert linear layers and convolutions inside these modules to another dtype, in place.

    Norms keep theirs.
    """
    for module in modules:
        for part in module.modules():
            if isinstance(part, kinds):
                part.to(dtype)


def torso_dtype(blocks: nn.Module) -> torch.dtype:
    """Return the dtype in which blocks compute: that of their first linear layer or convolution.

    It is read from the weights, so that no setting can contradict them.
    """
    for part in blocks.modules():
        if isinstance(part, (nn.Linear, nn.Conv3d)):
            return part.weight.dtype
    return torch.float32


@dataclass(frozen=True)
class Groups:
    """Rows of a batch, reordered so that the groups that attend to each other are contiguous.

    A row may be in several groups; its result is then taken from one of them.
    """

    # Pairs (number of groups, rows of each group), one for every stretch of groups of the same length.
    runs: tuple[tuple[int, int], ...]
    order: torch.Tensor | None = None  # [sum of sizes], rows in the new order; None: unchanged
    inverse: torch.Tensor | None = None  # [V], position of each row's result in the new order

    @property
    def sizes(self) -> list[int]:
        """Number of rows of each run."""
        return [count * length for count, length in self.runs]


class SparseLayout:
    """Layout of tokens [V, C] of a sparse batch.

    Self-attention stays within `groups` of voxels; by default each sample is one group.
    """

    def __init__(self, batch: SparseBatch, groups: Groups | None = None):
        self.batch = batch
        self.groups = groups or samples(batch)

    def per_token(self, values: torch.Tensor) -> torch.Tensor:
        """Repeat each sample's row for its voxels, [N, C] -> [V, C]."""
        return values[self.batch.sample]

    def self_attention(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Attend within groups; all tensors are [V, H, D]."""
        groups = self.groups
        # One call per run: groups of one length form a dense batch.
        parts = zip(*(_runs(x, groups) for x in (q, k, v)), strict=True)
        out = torch.cat([attend(*part).flatten(0, 1) for part in parts])
        # Back to the batch's order; a row that is in several groups takes one of its results.
        return out if groups.inverse is None else out[groups.inverse]

    def cross_attention(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Attend from q [V, H, D] to k and v [N, L, H, D] of the same sample: [V, H, D]."""
        groups = samples(self.batch)
        # Consecutive samples with the same number of voxels share a call; k and v are split likewise.
        counts = [count for count, _ in groups.runs]
        parts = zip(_runs(q, groups), k.split(counts), v.split(counts), strict=True)
        return torch.cat([attend(*part).flatten(0, 1) for part in parts])


def _runs(x: torch.Tensor, groups: Groups) -> list[torch.Tensor]:
    """Reorder rows [V, H, D] and split them into runs, each [groups, rows of a group, H, D]."""
    ordered = x if groups.order is None else x[groups.order]
    return [
        part.unflatten(0, run) for part, run in zip(ordered.split(groups.sizes), groups.runs, strict=True)
    ]


def samples(batch: SparseBatch) -> Groups:
    """Return the groups in which each sample is one group. The rows are in this order already."""
    if "samples" not in batch.cache:
        runs: list[tuple[int, int]] = []
        # Only neighbours of the same length share a run, so that no reordering is needed.
        for length in batch.lengths.tolist():
            if runs and runs[-1][1] == length:
                runs[-1] = (runs[-1][0] + 1, length)
            else:
                runs.append((1, length))
        batch.cache["samples"] = Groups(tuple(runs))
    return batch.cache["samples"]


def windows(batch: SparseBatch, window: int, shift: int = 0) -> Groups:
    """Return one group per window that contains voxels.

    A window holds the voxels of a sample with the same value of (coordinate + shift) // window on every axis.
    """
    name = f"windows {window} {shift}"
    if name not in batch.cache:
        # One integer per window: sample, then the window's three indices.
        cells = (batch.coords[:, 1:].long() + shift) // window  # [V, 3]
        side = int(cells.max()) + 1  # windows per axis
        codes = ((batch.sample * side + cells[:, 0]) * side + cells[:, 1]) * side + cells[:, 2]
        _, group, lengths = torch.unique(codes, return_inverse=True, return_counts=True)
        # Short windows come first, so that windows of equal length are contiguous. The sort is stable, which
        # keeps the rows of a window as they were.
        order = torch.argsort(lengths[group] * len(lengths) + group, stable=True)
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(len(order), device=order.device)
        length, count = (x.tolist() for x in torch.unique(lengths, return_counts=True))
        batch.cache[name] = Groups(tuple(zip(count, length, strict=True)), order, inverse)
    return batch.cache[name]


def curve_windows(batch: SparseBatch, window: int, shift: int = 0, start: int = 0) -> Groups:
    """Return groups that are stretches of the Z-order curve through each sample's voxels.

    A sample of n voxels is cut into m = ceil(n / window) parts of equal length along the curve. If there are
    several, each part attends to the `window` voxels around its middle, beyond its own ends and cyclically
    around those of the curve. Results are kept only for the part itself.

    Args:
        window: number of voxels.
        shift: added to coordinates, which moves the curve.
        start: voxels by which the cuts move along the curve.
    """
    name = f"curve {window} {shift} {start}"
    if name not in batch.cache:
        code = z_order(batch.coords[:, 1:] + shift)  # [V], position on the curve
        runs: list[tuple[int, int]] = []
        order: list[torch.Tensor] = []
        inverse = torch.empty_like(code)
        first = 0  # row at which the sample begins
        done = 0  # rows of the new order that are assigned
        for n in batch.lengths.tolist():
            # This sample's rows in the order of the curve.
            along = first + torch.argsort(code[first : first + n])
            count = -(-n // window)  # rounded up
            # Rows that a part attends to, and rows that it keeps; the latter need not be an integer.
            size, length = (n, n) if count <= 1 else (window, n / count)
            for i in range(count):
                # The part keeps low..high and attends to `size` rows from `left` on, modulo n.
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
    """Return positions on the Z-order curve (Morton 1966), [V, 3] of 0..1023 -> [V] int64.

    The bits of x, y and z are interleaved, x's above y's above z's.
    """
    code = coords.new_zeros(len(coords), dtype=torch.int64)
    # Bit b of x, y, z goes to the bits 3 b + 2, 3 b + 1 and 3 b.
    for bit in range(10):
        for axis in range(3):
            code |= (coords[:, axis].long() >> bit & 1) << (3 * bit + 2 - axis)
    return code
