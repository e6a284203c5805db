"""TRELLIS.2's flows: one transformer over the cells of a grid, one over the voxels of an object. Neither has convolutions or patches.

Against TRELLIS: positions are rotary; one modulation of the time is shared by all blocks, each of which adds a vector of its own to it;
queries and keys are normalised in both attentions; a stage may read features on its voxels beside the latent ("concat_cond"), which
makes the input layer wider and nothing else.

Shape letters as in trellis/blocks.py; R grid points per axis, T = R^3, K channels of the features beside the latent.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from eg3d_rlhf.core.shapes import check_shape
from eg3d_rlhf.models.sparse import SparseBatch
from eg3d_rlhf.models.trellis import blocks
from eg3d_rlhf.models.trellis2.rotary import RotaryLayout, angles_of

DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class FlowConfig:
    """What a flow's JSON file calls args."""

    resolution: int
    in_channels: int  # of the latent and of what is read beside it
    model_channels: int
    cond_channels: int
    out_channels: int
    num_blocks: int
    num_heads: int | None = None  # or model_channels / num_head_channels
    num_head_channels: int = 64
    mlp_ratio: float = 4
    pe_mode: str = "rope"
    rope_freq: tuple[float, float] = (1.0, 10000.0)  # f_0 and f_1 of rotary.py
    dtype: str = "float32"  # of the blocks as built; files bring their own
    use_checkpoint: bool = False  # compute blocks again in the backward pass
    share_mod: bool = False
    initialization: str = "vanilla"  # of weights that training starts from: no concern of trained ones
    qk_rms_norm: bool = False
    qk_rms_norm_cross: bool = False
    rope_adjacent: bool = True  # in no file that is known here: see rotary.rotate

    def __post_init__(self):
        object.__setattr__(self, "rope_freq", tuple(self.rope_freq))
        who = type(self).__name__
        if self.pe_mode != "rope" or self.dtype not in DTYPES:
            got = f"{self.pe_mode!r} and {self.dtype!r}"
            raise ValueError(f"{who}: expected pe_mode 'rope' and dtype {', '.join(DTYPES)}, got {got}. Others are in no released model.")
        if self.model_channels % self.heads or self.given < 0:
            got = f"{self.model_channels} / {self.heads}, {self.in_channels} and {self.out_channels}"
            expected = "model_channels to divide by heads and in_channels >= out_channels"
            raise ValueError(f"{who}: expected {expected}, got {got}. Correct the model's JSON file.")
        if self.head_channels % 2 or self.head_channels < 6 or len(self.rope_freq) != 2:
            got = f"{self.head_channels} channels and {self.rope_freq}"
            raise ValueError(f"{who}: expected heads of an even number of channels, 6 or more, and two rope_freq, got {got}. Correct it.")

    @property
    def heads(self) -> int:
        """Of every attention."""
        return self.num_heads or self.model_channels // self.num_head_channels

    @property
    def head_channels(self) -> int:
        """D."""
        return self.model_channels // self.heads

    @property
    def given(self) -> int:
        """K."""
        return self.in_channels - self.out_channels

    def angles(self, coords: torch.Tensor) -> torch.Tensor:
        """By which tokens at coordinates [V, 3] turn the planes of a head, [V, P]."""
        return angles_of(coords, self.head_channels, self.rope_freq)


class Block(blocks.ModulatedBlock):
    """TRELLIS's block with a vector of its own, `modulation` [6 C], on top of the modulation that all blocks share."""

    def __init__(self, channels: int, *args, **kwargs):
        super().__init__(channels, *args, share_mod=True, **kwargs)
        self.modulation = nn.Parameter(torch.randn(6 * channels) / channels**0.5)

    def forward(self, x: torch.Tensor, time: torch.Tensor, cond: torch.Tensor, layout: blocks.Layout) -> torch.Tensor:
        return super().forward(x, (time + self.modulation).to(time.dtype), cond, layout)


class Flow(nn.Module):
    """What both flows have in common: layers, their names, and the way of tokens through them."""

    def __init__(self, config: FlowConfig):
        super().__init__()
        self.config = config
        self.recompute = config.use_checkpoint
        channels, kind = config.model_channels, Block if config.share_mod else blocks.ModulatedBlock
        self.t_embedder = blocks.TimeEmbedder(channels)
        if config.share_mod:
            self.adaLN_modulation = blocks.modulation(channels)
        self.input_layer = nn.Linear(config.in_channels, channels)
        self.blocks = nn.ModuleList(
            kind(channels, config.cond_channels, config.heads, config.mlp_ratio, qk_rms_norm=config.qk_rms_norm,
                 qk_rms_norm_cross=config.qk_rms_norm_cross)
            for _ in range(config.num_blocks)
        )
        self.out_layer = nn.Linear(channels, config.out_channels)
        blocks.convert_torso(self.blocks, getattr(torch, config.dtype))

    def transform(
        self, x: torch.Tensor, t: torch.Tensor, cond: torch.Tensor, coords: torch.Tensor, layout: blocks.Layout
    ) -> torch.Tensor:
        """Tokens [..., in_channels] at coordinates [V, 3] (or [T, 3]), t [N], cond [N, L, E] -> [..., out_channels], in x's type."""
        config, dtype = self.config, blocks.torso_dtype(self.blocks)
        time = self.t_embedder(t)
        if config.share_mod:
            time = self.adaLN_modulation(time)
        h = self.input_layer(x.float()).to(dtype)
        time, cond = time.to(dtype), cond.to(dtype)
        layout = RotaryLayout(layout, config.angles(coords), config.rope_adjacent)
        for block in self.blocks:
            h = blocks.run_block(block, h, time, cond, layout, recompute=self.recompute)
        h = F.layer_norm(h.to(x.dtype), h.shape[-1:])
        return self.out_layer(h.to(self.out_layer.weight.dtype)).to(x.dtype)


class StructureFlow(Flow):
    """model(x_t [N, C, R, R, R], t [N] in 0..1, cond [N, L, E]) -> velocity, like x_t. Differentiable in: everything but t."""

    def __init__(self, config: FlowConfig):
        super().__init__(config)
        if config.given:
            got = f"{config.in_channels} and {config.out_channels}"
            raise ValueError(f"StructureFlow: expected in_channels = out_channels, got {got}. Correct the model's JSON file.")

    def places(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """Of the tokens, [T, 3]."""
        return torch.cartesian_prod(*[torch.arange(self.config.resolution, device=device)] * 3)

    def forward(self, x_t: torch.Tensor, t: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
        config = self.config
        check_shape("StructureFlow.x_t", x_t, ["N", config.in_channels, *[config.resolution] * 3], "Give latents of this model's size.")
        check_shape("StructureFlow.cond", cond, [len(x_t), "L", config.cond_channels], "Use embeddings of the encoder it was trained with.")
        v = self.transform(x_t.flatten(2).transpose(1, 2), t, cond, self.places(x_t.device), blocks.DenseLayout())
        return v.transpose(1, 2).unflatten(2, [config.resolution] * 3)


class VoxelFlow(Flow):
    """model(x_t: SparseBatch, t [N] in 0..1, cond [N, L, E]) -> velocity on the same voxels. Differentiable in: everything but t.

    What is given on the voxels, [V, K], stands beside the latent in the input layer; it is neither noised nor predicted.
    """

    def forward(self, x_t: SparseBatch, t: torch.Tensor, cond: torch.Tensor) -> SparseBatch:
        config = self.config
        check_shape("VoxelFlow.x_t", x_t.feats, ["V", config.out_channels], "Give latents of this model's size.")
        check_shape("VoxelFlow.cond", cond, [x_t.size, "L", config.cond_channels], "Use embeddings of the encoder it was trained with.")
        x, width = x_t.feats, 0 if x_t.given is None else x_t.given.shape[1]
        if width != config.given:
            remedy = "Give the features that the stage before leaves, where the model reads some."
            raise ValueError(f"VoxelFlow.x_t: expected {config.given} given features beside the latent, got {width}. {remedy}")
        if x_t.given is not None:
            x = torch.cat([x, x_t.given.to(x)], 1)
        return x_t.with_feats(self.transform(x, t, cond, x_t.coords[:, 1:], blocks.SparseLayout(x_t)))
