"""TRELLIS's encoder of an object: image features on its voxels to latents on the same.

Shape letters: V voxels, F features of the image network, C channels of the latent.
"""

from dataclasses import dataclass

from eg3d_rlhf.flow.sparse import SparseBatch
from eg3d_rlhf.flow.trellis.sparse_swin import SwinConfig, SwinTransformer


@dataclass(frozen=True, kw_only=True)
class LatentEncoderConfig(SwinConfig):
    """What its JSON file calls args."""

    in_channels: int  # F; 1024 of DINOv2


class LatentEncoder(SwinTransformer):
    """Mean image features of every voxel [V, F] -> a normal distribution of latents [V, C]."""

    def __init__(self, config: LatentEncoderConfig):
        super().__init__(config, config.in_channels, 2 * config.latent_channels)

    def forward(self, x: SparseBatch) -> tuple[SparseBatch, SparseBatch]:
        """Mean and logarithm of the variance. Differentiable in: feats and parameters."""
        mean, logvar = self.transform(x).feats.chunk(2, -1)
        return x.with_feats(mean), x.with_feats(logvar)

    def encode(self, x: SparseBatch) -> SparseBatch:
        """Latents as the flow's data are made of, not normalised yet: the mean."""
        return self(x)[0]
