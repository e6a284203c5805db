"""TRELLIS's flows with random weights, and random pairs for them: what measurements of an update work on."""

import math
from dataclasses import dataclass
from typing import Any

import torch

from eg3d_rlhf.models.sparse import SparseSample
from eg3d_rlhf.models.trellis.blocks import convert_torso
from eg3d_rlhf.models.trellis.flows import LatentFlow, LatentFlowConfig, StructureFlow, StructureFlowConfig
from eg3d_rlhf.models.trellis.sparse_conv import Kernel
from eg3d_rlhf.tuning.flow.pairs import PreferencePair
from eg3d_rlhf.tuning.flow.stage import DenseGrid, FlowStage, SparseVoxels

STAGES = ("structure", "latent")
CHANNELS, TOKENS, EMBEDDING = 8, 77, 768  # of a latent; of CLIP's text
HEAD = 64  # channels per head
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Size:
    """What is measured; the defaults are TRELLIS text-large."""

    stage: str
    pairs: int = 1  # per update, in one pass
    steps: int = 1
    voxels: int = 8000  # of each latent of the second stage
    blocks: int = 24
    width: int = 1024
    grid: int = 0  # points per axis of the latent; 0: 16 of the first stage, 64 of the second
    rank: int = 16  # of the adapters
    dtype: str = "float32"  # of the blocks' weights, in which they compute
    device: str = "cpu"

    def __post_init__(self):
        if self.width % HEAD:
            raise ValueError(f"--width: expected a multiple of {HEAD}, got {self.width}. Change it.")

    @property
    def points(self) -> int:
        return self.grid or (16 if self.stage == "structure" else 64)


class RandomConditions:
    """As much of a pipeline as an update asks for: tokens by name."""

    def conditions(self, names, stage: str) -> torch.Tensor:
        return torch.stack([torch.randn(TOKENS, EMBEDDING, generator=torch.Generator().manual_seed(i)) for i in range(len(names))])


def build_stage(size: Size) -> FlowStage:
    """The flow with random weights, on its device."""
    common: dict[str, Any] = dict(
        resolution=size.points, in_channels=CHANNELS, out_channels=CHANNELS, model_channels=size.width, cond_channels=EMBEDDING,
        num_blocks=size.blocks, num_head_channels=HEAD, qk_rms_norm=True, use_checkpoint=True,
    )
    with torch.device(size.device):
        if size.stage == "structure":
            model: torch.nn.Module = StructureFlow(StructureFlowConfig(patch_size=1, **common))
            torso: tuple[str, ...] = ("blocks",)
        else:
            model = LatentFlow(LatentFlowConfig(patch_size=2, io_block_channels=(size.width // 8,), **common))
            torso = ("input_blocks", "blocks", "out_blocks")
    convert_torso((getattr(model, name) for name in torso), DTYPES[size.dtype], (torch.nn.Linear, Kernel))
    kind = SparseVoxels if size.stage == "latent" else DenseGrid
    return FlowStage(name=size.stage, model=model, latents=kind(channels=CHANNELS, resolution=size.points))


def make_pairs(size: Size, stage: FlowStage) -> list[PreferencePair]:
    generator = torch.Generator().manual_seed(0)

    def latent():
        if isinstance(stage.latents, DenseGrid):
            return torch.randn([CHANNELS, *[size.points] * 3], generator=generator)
        coords = shell(size.voxels, size.points, generator)
        return SparseSample(coords, torch.randn(len(coords), CHANNELS, generator=generator))

    names = [f"pair {i}" for i in range(size.pairs)]
    return [PreferencePair(id=n, condition=n, stage=stage.name, preferred=latent(), rejected=latent()) for n in names]


def shell(voxels: int, grid: int, generator: torch.Generator) -> torch.Tensor:
    """The [voxels, 3] int32 cells of a grid that are nearest to the surface of an ellipsoid drawn in it, one voxel thick if it fits."""
    radius = min((voxels / (4 * math.pi)) ** 0.5, 0.45 * grid)  # of a sphere with about one voxel per unit of area
    radii = radius * (0.85 + 0.3 * torch.rand(3, generator=generator))
    cells = torch.cartesian_prod(*[torch.arange(grid)] * 3)
    distance = (((cells + 0.5 - grid / 2) / radii).norm(dim=1) - 1).abs()
    return cells[distance.argsort()[:voxels].sort().values].int()
