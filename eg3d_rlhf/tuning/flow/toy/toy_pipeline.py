"""The toy as a pipeline of two stages: target shapes and colours, prompts, drafts with defects, and assets.

A prompt such as "red ball" names a shape and a colour. The toy's generator was trained on drafts, each with
its own strength of every defect. A draft is the input of the decoder: a structure, and per voxel a colour and
a size d. The decoder removes a voxel with d < 0. It fills an empty place beside at least two voxels with d >
1. So d can correct defects of a structure, and does so in drafts for some of their floaters and holes.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from eg3d_rlhf.models.sparse import Batch, Latent, SparseBatch, separate
from eg3d_rlhf.tuning.flow.base.stage import DenseGrid, FlowPath, FlowStage, Sampling, SparseVoxels, Voxels
from eg3d_rlhf.tuning.flow.toy.names import COLOURS, CONDITIONS, SHAPES, STRUCTURE, VOXELS

R = 8  # grid points per axis
DARKEST = 0.65  # brightness at the bottom, as a share of the brightness at the top

Grid = torch.Tensor


def shapes_at(x: Grid, y: Grid, z: Grid, size: int) -> dict[str, Grid]:
    """Compute the filled places of every shape, by name. Args: x: distance from the mirror plane."""
    side = torch.maximum(x, y.abs())
    inner = torch.minimum(x, y.abs())
    # half their width, and height of the seat or top
    chair = (2, 3)[size]
    table = (3, 4)[size]
    return {
        "ball": x**2 + y**2 + (z - 2.5) ** 2 <= (5.3, 7.3)[size],
        "box": (x < (2, 3)[size]) & (y.abs() < 2) & (z < 4),
        "pyramid": side < (3, 4)[size] - z,
        "pillar": (x**2 + y**2 < (2.6, 4.6)[size]) & (z < (5, 6)[size]),
        "table": (side < table) & ((z == table) | ((inner > table - 1) & (z < table))),
        "chair": (
            (side < chair)
            & (
                (z == chair)
                | ((inner > chair - 1) & (z < chair))
                | ((y < 1 - chair) & (z > chair) & (z <= 2 * chair))
            )
        ),
        "arch": (x < (3, 4)[size]) & (y.abs() < 2) & ((z == 4) | ((z < 4) & (x > 2))),
        "cross": (y.abs() < (1, 2)[size]) & (z < 7) & ((x < 1) | ((x < (3, 4)[size]) & (z >= 3) & (z <= 4))),
        "stairs": (x < (1, 2)[size]) & (z <= (y + 4).clamp(max=(5, 6)[size])),
        "cup": (side < chair) & (z < (4, 6)[size]) & ((z < 1) | (side > chair - 1)),
        "ring": (y.abs() < (1, 2)[size]) & ((x**2 + (z - 3) ** 2 - 7.5).abs() <= 4.6),
        "tower": (z < (6, 7)[size]) & (side < 1 + (z < (4, 5)[size]).float() + (z < (1, 3)[size]).float()),
        "mushroom": (
            (x**2 + y**2 < 2) & (z < (3, 4)[size])
            | (x**2 + y**2 < (7, 13)[size]) & (z >= (3, 4)[size]) & (z < (5, 6)[size])
        ),
        "hammer": (y.abs() < 1) & ((x < 1) | (z >= (5, 4)[size])) & (x < (3, 4)[size]) & (z < 7),
        "sofa": (
            (x < (3, 4)[size])
            & (y.abs() < 2)
            & ((z < 2) | ((z < (4, 5)[size]) & ((x > (2, 3)[size]) | (y < -1))))
        ),
        "bridge": (x < 4) & (y.abs() < (1, 2)[size]) & (z < 6) & ((z >= 4) | (x**2 + z**2 > 12)),
    }


# (size, lift): small and large, on the ground and one place above it
VARIANTS = tuple((size, lift) for size in (0, 1) for lift in (0, 1))
_PART = {
    f"{colour} {shape}": (5 * i + j) % len(COLOURS)
    for i, shape in enumerate(SHAPES)
    for j, colour in enumerate(COLOURS)
}
# of the twelve colours of every shape: four to train on,
TRAINED = tuple(name for name in CONDITIONS if _PART[name] < 4)
# two to choose settings and checkpoints on,
CHOOSING = tuple(name for name in CONDITIONS if 4 <= _PART[name] < 6)
# and six for the final table only
HELD_OUT = tuple(name for name in CONDITIONS if _PART[name] >= 6)


@functools.cache
def canonical_shapes() -> torch.Tensor:
    """Make every shape without defects, [shapes, K, R, R, R] bool; K = 4: both sizes at both heights."""
    i, j, k = torch.meshgrid(*[torch.arange(R, dtype=torch.float32)] * 3, indexing="ij")
    # the mirror plane lies between the two middle places; |x| makes every shape symmetric
    x = (i - (R - 1) / 2).abs()
    y = j - (R - 1) / 2
    variants = [
        torch.stack(list(shapes_at(x, y, k - lift, size).values())) & (k >= lift) for size, lift in VARIANTS
    ]
    return torch.stack(variants, 1)


@functools.cache
def canonical_colours() -> torch.Tensor:
    """Make every colour without defects, [colours, R, 3] by height: brighter towards the top."""
    brightness = torch.linspace(DARKEST, 1, R)
    return torch.tensor(list(COLOURS.values()))[:, None] * brightness[None, :, None]


def classes(conditions: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the class numbers (shape, colour) of N prompts, [N] int64 each.

    Raises: ValueError for a prompt that is not among the toy's.
    """
    shapes = list(SHAPES)
    colours = list(COLOURS)
    pairs = []
    for name in conditions:
        colour, _, shape = name.partition(" ")
        if shape not in SHAPES or colour not in COLOURS:
            known = f"one of {', '.join(COLOURS)} and one of {', '.join(SHAPES)}"
            raise ValueError(f"prompt: expected {known}, as in 'red ball', got {name!r}. Name one of these.")
        pairs.append((shapes.index(shape), colours.index(colour)))
    numbers = torch.tensor(pairs, dtype=torch.int64).view(-1, 2)
    return numbers[:, 0], numbers[:, 1]


def targets(conditions: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the targets of N prompts: shapes [N, K, R, R, R] bool and colours [N, R, R, R, 3].

    Any of the K variants of a shape is correct. Colours are given for all places, filled or not.
    """
    shapes, colours = classes(conditions)
    # colours depend on the height alone: [N, R, 3] -> [N, 1, 1, R, 3] -> [N, R, R, R, 3]
    return canonical_shapes()[shapes], canonical_colours()[colours][:, None, None].expand(-1, R, R, -1, -1)


# sizes d of a draft's voxels; the decoder's thresholds are 0 and 1
CARVED = -0.5  # the decoder removes the voxel
KEPT = 0.5
GROWING = 1.5  # the voxel helps to fill empty places beside it
CHANNELS = 4  # red, green, blue, d
SIZE_JITTER = 0.08  # standard deviation of d around these sizes


@dataclass(frozen=True, kw_only=True)
class Defects:
    """Largest strength of each defect; a sample's strength is uniform between 0 and this."""

    floaters: float = 0.02  # share of the empty places that are filled
    holes: float = 0.1  # share of the shape's voxels that are missing
    unrepaired: float = 1.0  # share of floaters and holes that d does not correct
    wrong: float = 0.03  # share of the shape's voxels that d removes or grows by mistake
    tint: float = 0.05  # standard deviation of the asset's mean colour, in units of 0..1
    noise: float = 0.1  # standard deviation of a voxel's colour around the mean


# defects of the labelled assets, by their source
DEFECTS = {"own": Defects(), "others": Defects(floaters=0.04, holes=0.2, wrong=0.06)}


@dataclass(frozen=True)
class Drafts:
    """Inputs of the decoder for N assets."""

    structure: torch.Tensor  # [N, R, R, R] bool
    # [N, R, R, R, 4]: r, g, b in 0..1 before clipping, and d; read at the structure's voxels
    features: torch.Tensor

    def latents(self, stage: str) -> Batch:
        """Return the x_0 of a stage.

        "structure": [N, 1, R, R, R] of -1 and 1; "voxels": the features [V, 4], scaled from 0..1 to -1..1.
        """
        if stage == "structure":
            return self.structure[:, None].float() * 2 - 1
        return SparseBatch(
            self.structure.nonzero().int().contiguous(),
            self.features[self.structure] * 2 - 1,
            len(self.structure),
        )


def draw_drafts(
    conditions: Sequence[str], generator: torch.Generator, defects: Defects | None = None
) -> Drafts:
    """Sample one draft per prompt, of a random variant of its shape.

    The order of the calls to `generator` fixes the drafts of a seed.
    """
    defects = defects or Defects()
    shapes, colours = targets(conditions)
    n = len(shapes)

    def uniform(*size: int) -> torch.Tensor:
        return torch.rand(*size, generator=generator)

    def strength(most: float) -> torch.Tensor:
        # [N, 1, 1, 1]: one strength per sample, shared by its places
        return most * uniform(n, 1, 1, 1)

    shape = shapes[torch.arange(n), torch.randint(shapes.shape[1], (n,), generator=generator)]
    floaters = ~shape & (uniform(*shape.shape) < strength(defects.floaters))
    holes = shape & (uniform(*shape.shape) < strength(defects.holes))
    structure = (shape & ~holes) | floaters
    corrected = uniform(*shape.shape) >= strength(defects.unrepaired)
    wrong = shape & (uniform(*shape.shape) < strength(defects.wrong))
    grows_wrongly = uniform(*shape.shape) < 0.5
    # the neighbours of a corrected hole grow, so that the decoder fills it
    growing = (neighbours(holes & corrected) > 0) | (wrong & grows_wrongly)
    carved = (floaters & corrected) | (wrong & ~grows_wrongly)
    # carving comes last: a floater beside a hole is removed
    d = torch.full(shape.shape, KEPT).masked_fill(growing & shape, GROWING).masked_fill(carved, CARVED)
    d = d + SIZE_JITTER * torch.randn(shape.shape, generator=generator)
    tint = strength(defects.tint)[..., None] * torch.randn(n, 1, 1, 1, 3, generator=generator)
    noise = strength(defects.noise)[..., None] * torch.randn(n, R, R, R, 3, generator=generator)
    return Drafts(structure, torch.cat([colours + tint + noise, d[..., None]], dim=-1))


def neighbours(grid: torch.Tensor) -> torch.Tensor:
    """Sum a grid [N, R, R, R, ...] over the six face neighbours of every place; 0 outside the grid."""
    values = grid.float()
    total = torch.zeros_like(values)
    for axis in (1, 2, 3):
        for step in (-1, 1):
            start = max(step, 0)
            # adds the grid shifted by one place; nothing wraps around at the edges
            total.narrow(axis, 1 - start, R - 1).add_(values.narrow(axis, start, R - 1))
    return total


TO_GROW = 2  # growing neighbours that an empty place needs to be filled
PATH = FlowPath(mean=0.0)
GUIDANCE = {STRUCTURE: 1.0, VOXELS: 0.0}  # cfg_strength by stage; colours are right without guidance


@dataclass(frozen=True)
class ToyAsset:
    """Finished asset: filled voxels and their colours."""

    occupancy: torch.Tensor  # [R, R, R] bool; at least one voxel is filled
    colours: torch.Tensor  # [R, R, R, 3] in 0..1; 0 where nothing is filled


class ToyPipeline:
    """Pipeline of the toy, see stage.Pipeline.

    The conditioning is two one-hot tokens, one for the shape and one for the colour. Assets are on the CPU.
    """

    def __init__(
        self, structure: torch.nn.Module, voxels: torch.nn.Module, device: str | torch.device = "cpu"
    ):
        self.device = torch.device(device)
        self.stages = tuple(
            FlowStage(
                name=name,
                model=model.to(self.device),
                latents=kind(channels=channels, resolution=R),
                path=PATH,
                sampling=Sampling(
                    steps=8, cfg_strength=GUIDANCE[name], cfg_interval=(0.5, 1.0), rescale_t=1.0
                ),
            )
            for name, model, kind, channels in (
                (STRUCTURE, structure, DenseGrid, 1),
                (VOXELS, voxels, SparseVoxels, CHANNELS),
            )
        )

    def conditions(self, names: Sequence[str], stage: str) -> torch.Tensor:
        """Return the tokens of N prompts, [N, 2, 28], which are the same for both stages."""
        shapes, colours = classes(names)
        width = len(SHAPES) + len(COLOURS)
        # one vocabulary for both tokens: 16 shapes, then 12 colours
        tokens = torch.stack([F.one_hot(shapes, width), F.one_hot(len(SHAPES) + colours, width)], dim=1)
        return tokens.float().to(self.device)

    def no_condition(self, n: int, stage: str) -> torch.Tensor:
        return torch.zeros(n, 2, len(SHAPES) + len(COLOURS), device=self.device)

    def advance(self, stage: str, x_0: torch.Tensor) -> list[Voxels]:
        """Return the voxels above 0, or the largest one of a structure without any."""
        assert stage == STRUCTURE
        logits = x_0.detach().flatten(1)
        # the largest is always included, so that no structure is empty
        filled = (logits > 0) | (logits == logits.amax(1, keepdim=True))
        return [grid.view(R, R, R).nonzero().int() for grid in filled]

    def decode(self, x_0: SparseBatch) -> list[ToyAsset]:
        batch = x_0.to("cpu", torch.float32)  # oracles use numpy and scipy
        sample, x, y, z = batch.coords.long().unbind(1)
        structure = torch.zeros(batch.size, R, R, R, dtype=torch.bool)
        features = torch.zeros(batch.size, R, R, R, CHANNELS)
        structure[sample, x, y, z] = True
        # from -1..1 to 0..1, the inverse of Drafts.latents
        features[sample, x, y, z] = (batch.feats.detach() + 1) / 2
        return make_assets(Drafts(structure, features))

    def encode(self, assets: Sequence[ToyAsset]) -> list[dict[str, Latent]]:
        """Encode a finished asset for both stages: all its voxels, each with the size d of a kept one."""
        encoded = []
        for asset in assets:
            kept = torch.full((R, R, R, 1), KEPT)
            draft = Drafts(asset.occupancy[None], torch.cat([asset.colours, kept], dim=-1)[None])
            encoded.append({stage: separate(draft.latents(stage))[0] for stage in (STRUCTURE, VOXELS)})
        return encoded


def make_assets(drafts: Drafts) -> list[ToyAsset]:
    """Decode drafts to assets.

    Voxels with d < 0 are removed. Empty places beside at least TO_GROW voxels with d > 1 are filled with the
    mean of their colours. If no voxel would be left, the one of largest d is kept.
    """
    structure = drafts.structure
    d = drafts.features[..., 3]
    paint = drafts.features[..., :3].clamp(0, 1)
    size = d.masked_fill(~structure, -torch.inf)
    largest = size == size.amax((1, 2, 3), keepdim=True)
    solid = structure & ((d >= 0) | largest)
    growing = structure & (d > 1)
    count = neighbours(growing)
    grown = ~structure & (count >= TO_GROW)
    # mean colour of the growing neighbours; the clamp avoids 0 / 0 where there are none
    mixed = neighbours(growing[..., None] * paint) / count.clamp(min=1)[..., None]
    colours = torch.where(grown[..., None], mixed, paint) * (solid | grown)[..., None]
    return [ToyAsset(filled, colour) for filled, colour in zip(solid | grown, colours, strict=True)]
