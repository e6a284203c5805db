"""The toy as a pipeline of two stages: the shapes and colours as they should be, the conditions that name
them ("red ball"), drafts of them with defects, and the assets that these make.

The toy's generator was trained on drafts, each sample with its own strength of every defect. A draft is what
an asset is made from: a structure, and per voxel colour and size d. A voxel with d < 0 is carved away when
the asset is made; one with d > 1 grows into an empty place beside it, if another one grows there too. So d
can repair what is wrong with a structure: drafts do so for some of their floaters and holes.
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
DARKEST = 0.65  # brightness at the bottom, as a share of that at the top

Grid = torch.Tensor


def shapes_at(x: Grid, y: Grid, z: Grid, size: int) -> dict[str, Grid]:
    """Which places belong to every shape, by its name; x to either side."""
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


# small and large, at both heights that a shape may stand at
VARIANTS = tuple((size, lift) for size in (0, 1) for lift in (0, 1))
_PART = {
    f"{colour} {shape}": (5 * i + j) % len(COLOURS)
    for i, shape in enumerate(SHAPES)
    for j, colour in enumerate(COLOURS)
}
TRAINED = tuple(name for name in CONDITIONS if _PART[name] < 4)  # four colours of every shape,
# two that settings and checkpoints are chosen on,
CHOOSING = tuple(name for name in CONDITIONS if 4 <= _PART[name] < 6)
HELD_OUT = tuple(name for name in CONDITIONS if _PART[name] >= 6)  # and six that nothing is


@functools.cache
def canonical_shapes() -> torch.Tensor:
    """Every shape without defects, [shapes, K, R, R, R] bool; K = 4: both sizes at both heights."""
    i, j, k = torch.meshgrid(*[torch.arange(R, dtype=torch.float32)] * 3, indexing="ij")
    x = (i - (R - 1) / 2).abs()
    y = j - (R - 1) / 2
    variants = [
        torch.stack(list(shapes_at(x, y, k - lift, size).values())) & (k >= lift) for size, lift in VARIANTS
    ]
    return torch.stack(variants, 1)


@functools.cache
def canonical_colours() -> torch.Tensor:
    """Every colour without defects, [colours, R, 3] by height: brighter towards the top."""
    brightness = torch.linspace(DARKEST, 1, R)
    return torch.tensor(list(COLOURS.values()))[:, None] * brightness[None, :, None]


def classes(conditions: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers of shape and colour of every condition, two of [N] int64.

    Raises: ValueError for a condition that the toy does not know.
    """
    shapes = list(SHAPES)
    colours = list(COLOURS)
    pairs = []
    for name in conditions:
        colour, _, shape = name.partition(" ")
        if shape not in SHAPES or colour not in COLOURS:
            known = f"one of {', '.join(COLOURS)} and one of {', '.join(SHAPES)}"
            raise ValueError(
                f"condition: expected {known}, as in 'red ball', got {name!r}. Name one of these."
            )
        pairs.append((shapes.index(shape), colours.index(colour)))
    numbers = torch.tensor(pairs, dtype=torch.int64).view(-1, 2)
    return numbers[:, 0], numbers[:, 1]


def targets(conditions: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """What a condition asks for: shapes [N, K, R, R, R] bool, any of which will do, and colours
    [N, R, R, R, 3] of all places.
    """
    shapes, colours = classes(conditions)
    return canonical_shapes()[shapes], canonical_colours()[colours][:, None, None].expand(-1, R, R, -1, -1)


# the sizes d of drafts
CARVED = -0.5
KEPT = 0.5
GROWING = 1.5
CHANNELS = 4  # r, g, b, d
SIZE_JITTER = 0.08  # deviation of d around these


@dataclass(frozen=True, kw_only=True)
class Defects:
    """The most of each defect; a sample's own strength is uniform between none and this."""

    floaters: float = 0.02  # share of the empty places that are filled
    holes: float = 0.1  # share of the shape's voxels that are missing
    unrepaired: float = 1.0  # share of these that d leaves as they are
    wrong: float = 0.03  # share of the shape's voxels that d carves or grows for nothing
    tint: float = 0.05  # deviation of the whole asset's colour, in units of 0..1
    noise: float = 0.1  # deviation of every voxel's colour around that


# of assets that people judged, by their maker
DEFECTS = {"own": Defects(), "others": Defects(floaters=0.04, holes=0.2, wrong=0.06)}


@dataclass(frozen=True)
class Drafts:
    """Assets before they are made."""

    structure: torch.Tensor  # [N, R, R, R] bool
    # [N, R, R, R, 4]: r, g, b in 0..1 before clipping, and d; read at the structure's voxels
    features: torch.Tensor

    def latents(self, stage: str) -> Batch:
        """The x_0 of a stage: "structure" [N, 1, R, R, R] of -1 and 1; "voxels" all features, scaled from
        0..1 to -1..1.
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


TO_GROW = 2  # growing neighbours that an empty place needs to be filled
PATH = FlowPath(mean=0.0)
GUIDANCE = {STRUCTURE: 1.0, VOXELS: 0.0}  # colours come out right without


@dataclass(frozen=True)
class ToyAsset:
    """A finished object: which voxels are filled, and their colours."""

    occupancy: torch.Tensor  # [R, R, R] bool; at least one voxel is filled
    colours: torch.Tensor  # [R, R, R, 3] in 0..1; 0 where nothing is filled


class ToyPipeline:
    """See stage.Pipeline. Conditions are two tokens, one of the shape's class and one of the colour's; assets
    live on the CPU.
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
        """[N, 2, 28]: the same at both stages."""
        shapes, colours = classes(names)
        width = len(SHAPES) + len(COLOURS)
        tokens = torch.stack([F.one_hot(shapes, width), F.one_hot(len(SHAPES) + colours, width)], dim=1)
        return tokens.float().to(self.device)

    def no_condition(self, n: int, stage: str) -> torch.Tensor:
        return torch.zeros(n, 2, len(SHAPES) + len(COLOURS), device=self.device)

    def advance(self, stage: str, x_0: torch.Tensor) -> list[Voxels]:
        """The voxels above 0; of a structure without any, its largest."""
        assert stage == STRUCTURE
        logits = x_0.detach().flatten(1)
        filled = (logits > 0) | (logits == logits.amax(1, keepdim=True))
        return [grid.view(R, R, R).nonzero().int() for grid in filled]

    def decode(self, x_0: SparseBatch) -> list[ToyAsset]:
        batch = x_0.to("cpu", torch.float32)
        sample, x, y, z = batch.coords.long().unbind(1)
        structure = torch.zeros(batch.size, R, R, R, dtype=torch.bool)
        features = torch.zeros(batch.size, R, R, R, CHANNELS)
        structure[sample, x, y, z] = True
        features[sample, x, y, z] = (batch.feats.detach() + 1) / 2
        return make_assets(Drafts(structure, features))

    def encode(self, assets: Sequence[ToyAsset]) -> list[dict[str, Latent]]:
        """A finished asset as each stage would have made it:
        all its voxels, none of them carved or growing.
        """
        encoded = []
        for asset in assets:
            kept = torch.full((R, R, R, 1), KEPT)
            draft = Drafts(asset.occupancy[None], torch.cat([asset.colours, kept], dim=-1)[None])
            encoded.append({stage: separate(draft.latents(stage))[0] for stage in (STRUCTURE, VOXELS)})
        return encoded


def make_assets(drafts: Drafts) -> list[ToyAsset]:
    """Drafts as they turn out: voxels with d < 0 are gone, empty places beside two or more with d > 1 are
    filled with their colours' mean.

    Where nothing would be left the voxel of largest d stays.
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
    mixed = neighbours(growing[..., None] * paint) / count.clamp(min=1)[..., None]
    colours = torch.where(grown[..., None], mixed, paint) * (solid | grown)[..., None]
    return [ToyAsset(filled, colour) for filled, colour in zip(solid | grown, colours, strict=True)]
