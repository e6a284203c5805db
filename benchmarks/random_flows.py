"""TRELLIS's flows with random weights: what measurements of an update work on."""

from dataclasses import dataclass
from typing import Any

import torch

from eg3d_rlhf.models.trellis.flows import LatentFlow, LatentFlowConfig, StructureFlow, StructureFlowConfig
from eg3d_rlhf.tuning.flow.base.stage import DenseGrid, FlowStage, SparseVoxels

STAGES = ("structure", "latent")
# of a latent; of CLIP's text
CHANNELS = 8
TOKENS = 77
EMBEDDING = 768
HEAD = 64  # channels per head


@dataclass(frozen=True, kw_only=True)
class Size:
    """What is measured; the defaults are TRELLIS text-large."""

    stage: str
    voxels: int = 8000  # of each latent of the second stage
    blocks: int = 24
    width: int = 1024  # a multiple of HEAD
    grid: int = 0  # points per axis of the latent; 0: 16 of the first stage, 64 of the second
    device: str = "cpu"

    @property
    def points(self) -> int:
        return self.grid or (16 if self.stage == "structure" else 64)


class RandomConditions:
    """As much of a pipeline as an update asks for: tokens by name."""

    def conditions(self, names, stage: str) -> torch.Tensor:
        return torch.stack(
            [
                torch.randn(TOKENS, EMBEDDING, generator=torch.Generator().manual_seed(i))
                for i in range(len(names))
            ]
        )


def build_stage(size: Size) -> FlowStage:
    """The flow with random weights, on its device."""
    common: dict[str, Any] = dict(
        resolution=size.points,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        model_channels=size.width,
        cond_channels=EMBEDDING,
        num_blocks=size.blocks,
        num_head_channels=HEAD,
        qk_rms_norm=True,
        use_checkpoint=True,
    )
    with torch.device(size.device):
        if size.stage == "structure":
            model: torch.nn.Module = StructureFlow(StructureFlowConfig(patch_size=1, **common))
        else:
            model = LatentFlow(LatentFlowConfig(patch_size=2, io_block_channels=(size.width // 8,), **common))
    kind = SparseVoxels if size.stage == "latent" else DenseGrid
    return FlowStage(name=size.stage, model=model, latents=kind(channels=CHANNELS, resolution=size.points))
