"""What the toy's generator was trained on: shapes with defects, each sample with its own strength of every one.

A draft is what an asset is made from: a structure, and per voxel colour and size d. A voxel with d < 0 is carved away when the asset is
made; one with d > 1 grows into an empty place beside it, if another one grows there too. So d can repair what is wrong with a structure:
drafts do so for some of their floaters and holes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch

from eg3d_rlhf.flow.sparse import Batch, SparseBatch
from eg3d_rlhf.flow.toy.shapes import R, targets

CARVED, KEPT, GROWING = -0.5, 0.5, 1.5  # the sizes d of drafts
CHANNELS = 4  # r, g, b, d
SIZE_JITTER = 0.08  # deviation of d around these


@dataclass(frozen=True, kw_only=True)
class Defects:
    """The most of each defect; a sample's own strength is uniform between none and this."""

    floaters: float = 0.03  # share of the empty places that are filled
    holes: float = 0.15  # share of the shape's voxels that are missing
    unrepaired: float = 1.0  # share of these that d leaves as they are
    wrong: float = 0.08  # share of the shape's voxels that d carves or grows for nothing
    tint: float = 0.15  # deviation of the whole asset's colour, in units of 0..1
    noise: float = 0.25  # deviation of every voxel's colour around that

    def __post_init__(self):
        for item in fields(self):
            if not 0 <= getattr(self, item.name) <= 1:
                raise ValueError(f"Defects.{item.name}: expected 0 to 1, got {getattr(self, item.name)}. Set it.")


@dataclass(frozen=True)
class Drafts:
    """Assets before they are made."""

    structure: torch.Tensor  # [N, R, R, R] bool
    features: torch.Tensor  # [N, R, R, R, 4]: r, g, b in 0..1 before clipping, and d; read at the structure's voxels

    def latents(self, stage: str) -> Batch:
        """The x_0 of a stage: "structure" [N, 1, R, R, R] of -1 and 1; "voxels" all features, scaled from 0..1 to -1..1."""
        if stage == "structure":
            return self.structure[:, None].float() * 2 - 1
        return SparseBatch(self.structure.nonzero().int().contiguous(), self.features[self.structure] * 2 - 1, len(self.structure))


def draw_drafts(conditions: Sequence[str], generator: torch.Generator, defects: Defects | None = None) -> Drafts:
    """One draft per condition, of a random variant of its shape."""
    defects = defects or Defects()
    shapes, colours = targets(conditions)
    n = len(shapes)

    def uniform(*size: int) -> torch.Tensor:
        return torch.rand(*size, generator=generator)

    def strength(most: float) -> torch.Tensor:
        return most * uniform(n, 1, 1, 1)

    shape = shapes[torch.arange(n), torch.randint(shapes.shape[1], (n,), generator=generator)]
    floaters = ~shape & (uniform(*shape.shape) < strength(defects.floaters))
    holes = shape & (uniform(*shape.shape) < strength(defects.holes))
    structure = (shape & ~holes) | floaters
    repaired = uniform(*shape.shape) >= strength(defects.unrepaired)
    wrong = shape & (uniform(*shape.shape) < strength(defects.wrong))
    grows_wrongly = uniform(*shape.shape) < 0.5
    growing = (neighbours(holes & repaired) > 0) | (wrong & grows_wrongly)
    carved = (floaters & repaired) | (wrong & ~grows_wrongly)
    d = torch.full(shape.shape, KEPT).masked_fill(growing & shape, GROWING).masked_fill(carved, CARVED)
    d = d + SIZE_JITTER * torch.randn(shape.shape, generator=generator)
    tint = strength(defects.tint)[..., None] * torch.randn(n, 1, 1, 1, 3, generator=generator)
    noise = strength(defects.noise)[..., None] * torch.randn(n, R, R, R, 3, generator=generator)
    return Drafts(structure, torch.cat([colours + tint + noise, d[..., None]], dim=-1))


def neighbours(grid: torch.Tensor) -> torch.Tensor:
    """Sum over the six face neighbours of every place of [N, R, R, R, ...]; nothing lies outside the grid."""
    values = grid.float()
    total = torch.zeros_like(values)
    for axis in (1, 2, 3):
        for step in (-1, 1):
            start = max(step, 0)
            total.narrow(axis, 1 - start, R - 1).add_(values.narrow(axis, start, R - 1))
    return total
