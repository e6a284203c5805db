"""SAM 3D's second flow: TRELLIS's over the latents on voxels, which may read a step size."""

from dataclasses import dataclass

import torch

from eg3d_rlhf.models.sam3d.mixture import embedded_time
from eg3d_rlhf.models.trellis import blocks
from eg3d_rlhf.models.trellis.flows import LatentFlow, LatentFlowConfig


@dataclass(frozen=True, kw_only=True)
class VoxelFlowConfig(LatentFlowConfig):
    """What its file says of its network."""

    is_shortcut_model: bool = False  # whether it reads a step size
    time_scale: float = 1000.0  # by which times and step sizes are multiplied before they are embedded


class VoxelFlow(LatentFlow):
    """model(x_t: SparseBatch, t [N] in 0..1, cond [N, L, E], step [N] in 0..1) -> velocity on the same voxels.

    Times are the network's own: t = 1 is data. Differentiable in: everything but t and step.
    """

    config: VoxelFlowConfig

    def __init__(self, config: VoxelFlowConfig):
        super().__init__(config)
        if config.is_shortcut_model:
            self.d_embedder = blocks.TimeEmbedder(config.model_channels)

    def time(self, t: torch.Tensor, step: torch.Tensor | None = None) -> torch.Tensor:
        return embedded_time(self, t, step, self.config.time_scale)
