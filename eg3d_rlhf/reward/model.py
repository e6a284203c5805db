"""The reward network: density slab in, one score per sample out.

Shape letters: N samples, P pairs, M entries of a vector, D, H, W = z, y, x (see eg3d_rlhf/shapes.py).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from eg3d_rlhf.reward.config import PAPER, RewardArch
from eg3d_rlhf.reward.heads import MLP
from eg3d_rlhf.reward.pooling import grid_feature, slice_max_feature
from eg3d_rlhf.reward.strided import StridedConv3d
from eg3d_rlhf.reward.unet3d import UNet3d
from eg3d_rlhf.shapes import check_shape


@dataclass(frozen=True, kw_only=True)
class RewardOutput:
    """All that the training losses read, for one batch of slabs."""

    embedding: torch.Tensor  # [N, M] the trunk's output
    scalar: torch.Tensor  # [N] the reward
    log_strength: torch.Tensor  # [N] logarithm of the Bradley-Terry strength
    reconstruction: torch.Tensor | None  # [N, 1, D, H, W], None when not asked for


class RewardModel(nn.Module):
    """U-Net features, a trunk MLP and three heads; `score` is the reward used downstream.

    The samples of a batch never influence each other (group normalisation only), so a batch equals its items one by one.
    Deviates: published code loops over the batch; this runs it at once, with equal results.

    Args: `arch`, see RewardArch; the default is the paper's network, 12,686,699 parameters.
    """

    def __init__(self, arch: RewardArch = PAPER):
        super().__init__()
        self.arch = arch
        self.MLP = MLP(arch.feature_size, arch.trunk, arch.embedding)
        self.scalar_rwd_head_BT = MLP(arch.embedding, arch.heads, 1)
        self.scalar_rwd_head = MLP(arch.embedding, arch.heads, 1)
        self.scalar_rwd_head_pairs = MLP(2 * arch.embedding, arch.heads, 2)
        if arch.extractor == "strided":
            self.extractor = StridedConv3d(arch.feature_maps[0], arch.slab_shape, arch.dropout)
            return
        out_channels = arch.recon_channels + arch.feature_channels
        self.Conv3DModule = UNet3d(arch.patch**3, arch.feature_maps, out_channels, arch.groups)

    def _maps(self, slab: torch.Tensor):
        check_shape("RewardModel(slab)", slab, ("N", 1, "D", "H", "W"), "Pass normalised slabs from sample_slab.")
        least = self.arch.smallest_side
        if min(slab.shape[2:]) < least:
            raise ValueError(
                f"RewardModel(slab): expected sides of at least {least} voxels, got {list(slab.shape[2:])}. "
                "Raise the slab's resolution or use fewer feature_maps."
            )
        return self.Conv3DModule(_to_patches(slab * self.arch.input_scale if self.arch.input_scale != 1 else slab, self.arch.patch))

    def _pool(self, maps) -> torch.Tensor:
        response = maps.final[:, self.arch.recon_channels :]  # [N, C, D, H, W]
        if self.arch.pooling == "slice_max":
            return slice_max_feature(response, self.arch.pool_size)
        cells = (self.arch.final_cells, self.arch.bottleneck_cells)
        return torch.cat([grid_feature(response, cells[0]), grid_feature(maps.bottleneck, cells[1])], dim=1)

    def _reconstruct(self, maps, size: torch.Size) -> torch.Tensor:
        strongest = maps.final[:, : self.arch.recon_channels].max(dim=1, keepdim=True).values
        out = self.Conv3DModule.conv3d_for_recon(strongest)  # [N, 1, D/p, H/p, W/p]
        if self.arch.patch > 1:
            out = F.interpolate(out, scale_factor=self.arch.patch, mode="nearest")
        return out[:, :, : size[2], : size[3], : size[4]]

    def features(self, slab: torch.Tensor) -> torch.Tensor:
        """Global feature vector before the trunk: slab [N, 1, D, H, W] in [0, 100] -> [N, arch.feature_size]."""
        if self.arch.extractor == "strided":
            check_shape("RewardModel(slab)", slab, ("N", 1, "D", "H", "W"), "Pass normalised slabs from sample_slab.")
            return self.extractor(slab)
        return self._pool(self._maps(slab))

    def embed(self, slab: torch.Tensor) -> torch.Tensor:
        """Trunk output, which all heads read: slab [N, 1, D, H, W] -> [N, arch.embedding]."""
        return self.MLP(self.features(slab))

    def score(self, slab: torch.Tensor) -> torch.Tensor:
        """The reward: slab [N, 1, D, H, W] in [0, 100] -> [N], higher is better. Differentiable in: slab and parameters."""
        return self.score_embedding(self.embed(slab))

    def score_embedding(self, embedding: torch.Tensor) -> torch.Tensor:
        """The reward of embeddings [N, arch.embedding] -> [N]."""
        return self.scalar_rwd_head(embedding).squeeze(1)

    def pair_logits(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """Pair head on embeddings [P, M] and [P, M] -> [P, 2]; index 0 says "the first is better". The order matters."""
        return self.scalar_rwd_head_pairs(torch.cat([first, second], dim=1))

    def pair_margin(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """Order-free logit that `first` is better, [P]: half the difference of both orders' logits. Swapping the pair negates it."""
        forward, backward = self.pair_logits(first, second), self.pair_logits(second, first)
        return 0.5 * ((forward[:, 0] - forward[:, 1]) - (backward[:, 0] - backward[:, 1]))

    def forward(self, slab: torch.Tensor, reconstruct: bool = False) -> RewardOutput:
        """Everything the training losses read: slab [N, 1, D, H, W] in [0, 100] -> RewardOutput."""
        if self.arch.extractor == "strided":
            if reconstruct:
                raise ValueError("RewardModel: expected a U-Net to reconstruct, got the strided extractor. Use --reconstruction=0.")
            maps, embedding = None, self.embed(slab)
        else:
            maps = self._maps(slab)
            embedding = self.MLP(self._pool(maps))
        return RewardOutput(
            embedding=embedding,
            scalar=self.scalar_rwd_head(embedding).squeeze(1),
            log_strength=self.scalar_rwd_head_BT(embedding).squeeze(1),
            reconstruction=self._reconstruct(maps, slab.shape) if reconstruct else None,
        )


def _to_patches(slab: torch.Tensor, patch: int) -> torch.Tensor:
    """Cut [N, 1, D, H, W] into patch^3 channels, [N, patch^3, D/p, H/p, W/p]; a short last patch repeats its edge."""
    if patch == 1:
        return slab
    missing = [-size % patch for size in slab.shape[2:]]
    if any(missing):
        slab = F.pad(slab, (0, missing[2], 0, missing[1], 0, missing[0]), mode="replicate")
    n, _, d, h, w = slab.shape
    cut = slab.reshape(n, d // patch, patch, h // patch, patch, w // patch, patch)
    return cut.permute(0, 2, 4, 6, 1, 3, 5).reshape(n, patch**3, d // patch, h // patch, w // patch)
