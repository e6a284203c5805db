"""The toy as a pipeline of two stages, and the assets that it makes."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from eg3d_rlhf.flow.path import FlowPath
from eg3d_rlhf.flow.sparse import Latent, SparseBatch, separate
from eg3d_rlhf.flow.stage import FlowStage, Sampling, Voxels
from eg3d_rlhf.flow.toy.shapes import CHANNELS, COLOURS, KEPT, SHAPES, Drafts, R, classes, neighbours

STRUCTURE, VOXELS = "structure", "voxels"
TO_GROW = 2  # growing neighbours that an empty place needs to be filled
PATH = FlowPath(mean=0.0)
GUIDANCE = {STRUCTURE: 1.0, VOXELS: 0.0}  # colours come out right without


@dataclass(frozen=True)
class ToyAsset:
    """A finished object: which voxels are filled, and their colours."""

    occupancy: torch.Tensor  # [R, R, R] bool; at least one voxel is filled
    colours: torch.Tensor  # [R, R, R, 3] in 0..1; 0 where nothing is filled


class ToyPipeline:
    """See stage.Pipeline. Conditions are two tokens, one of the shape's class and one of the colour's; assets live on the CPU."""

    def __init__(self, structure: torch.nn.Module, voxels: torch.nn.Module, device: str | torch.device = "cpu"):
        self.device = torch.device(device)
        self.stages = tuple(
            FlowStage(
                name=name, model=model.to(self.device), channels=channels, resolution=R, sparse=name == VOXELS, path=PATH,
                sampling=Sampling(steps=8, cfg_strength=GUIDANCE[name], cfg_interval=(0.5, 1.0), rescale_t=1.0),
            )
            for name, model, channels in ((STRUCTURE, structure, 1), (VOXELS, voxels, CHANNELS))
        )

    def conditions(self, names: Sequence[str], stage: str) -> torch.Tensor:
        """[N, 2, 16]: the same at both stages."""
        _check_stage(stage)
        shapes, colours = classes(names)
        width = len(SHAPES) + len(COLOURS)
        tokens = torch.stack([F.one_hot(shapes, width), F.one_hot(len(SHAPES) + colours, width)], dim=1)
        return tokens.float().to(self.device)

    def no_condition(self, n: int, stage: str) -> torch.Tensor:
        """[n, 2, 16] of zeros."""
        _check_stage(stage)
        return torch.zeros(n, 2, len(SHAPES) + len(COLOURS), device=self.device)

    def advance(self, stage: str, x_0: torch.Tensor) -> list[Voxels]:
        """The voxels above 0; of a structure without any, its largest."""
        if stage != STRUCTURE:
            raise ValueError(f"advance: expected a stage with another behind it, {STRUCTURE!r}, got {stage!r}. Decode the last one.")
        logits = x_0.detach().flatten(1)
        filled = (logits > 0) | (logits == logits.amax(1, keepdim=True))
        return [one.view(R, R, R).nonzero().int() for one in filled]

    def decode(self, x_0: SparseBatch) -> list[ToyAsset]:
        """Carve, grow, paint."""
        batch = x_0.to("cpu", torch.float32)
        sample, x, y, z = batch.coords.long().unbind(1)
        structure = torch.zeros(batch.size, R, R, R, dtype=torch.bool)
        features = torch.zeros(batch.size, R, R, R, CHANNELS)
        structure[sample, x, y, z] = True
        features[sample, x, y, z] = (batch.feats.detach() + 1) / 2
        return make_assets(Drafts(structure, features))

    def encode(self, assets: Sequence[ToyAsset]) -> list[dict[str, Latent]]:
        """A finished asset as each stage would have made it: all its voxels, none of them carved or growing."""
        found = []
        for asset in assets:
            kept = torch.full((R, R, R, 1), KEPT)
            draft = Drafts(asset.occupancy[None], torch.cat([asset.colours, kept], dim=-1)[None])
            found.append({stage: separate(draft.latents(stage))[0] for stage in (STRUCTURE, VOXELS)})
        return found


def make_assets(drafts: Drafts) -> list[ToyAsset]:
    """Drafts as they turn out: voxels with d < 0 are gone, empty places beside two or more with d > 1 are filled with their colours' mean.

    Where nothing would be left the voxel of largest d stays.
    """
    structure, d, paint = drafts.structure, drafts.features[..., 3], drafts.features[..., :3].clamp(0, 1)
    size = d.masked_fill(~structure, -torch.inf)
    largest = size == size.amax((1, 2, 3), keepdim=True)
    solid = structure & ((d >= 0) | largest)
    growing = structure & (d > 1)
    count = neighbours(growing)
    grown = ~structure & (count >= TO_GROW)
    mixed = neighbours(growing[..., None] * paint) / count.clamp(min=1)[..., None]
    colours = torch.where(grown[..., None], mixed, paint) * (solid | grown)[..., None]
    return [ToyAsset(filled, colour) for filled, colour in zip(solid | grown, colours, strict=True)]


def _check_stage(stage: str) -> None:
    if stage not in (STRUCTURE, VOXELS):
        raise ValueError(f"stage: expected one of {STRUCTURE}, {VOXELS}, got {stage!r}. Name a stage of this pipeline.")
