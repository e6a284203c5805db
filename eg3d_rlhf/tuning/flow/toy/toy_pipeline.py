"""The toy's generator as a `Pipeline` of two stages, with its prompts, its training data and its decoder.

A prompt such as "red ball" names a shape and a colour. The generator was trained on drafts, which are inputs
of the decoder with random defects. A draft consists of a structure, which is a set of voxels, and of a colour
and a size d for each voxel. The decoder removes a voxel with d < 0. It fills an empty cell beside at least
two voxels with d > 1. The sizes can thus correct defects of the structure, and in drafts they correct some of
the floaters and holes.

Shapes: see the package's docstring.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from eg3d_rlhf.models.sparse import Batch, Latent, SparseBatch, separate
from eg3d_rlhf.tuning.flow.base.stage import DenseGrid, FlowPath, FlowStage, Sampling, SparseVoxels, Voxels
from eg3d_rlhf.tuning.flow.toy.names import COLOURS, PROMPTS, SHAPES, STRUCTURE, VOXELS

R = 8  # grid points per axis
DARKEST = 0.65  # brightness at the bottom, as a share of the brightness at the top

Grid = torch.Tensor  # [R, R, R]


def shapes_at(x: Grid, y: Grid, z: Grid, variant_index: int) -> dict[str, Grid]:
    """Return the occupied cells of every shape: name of a shape -> [R, R, R] bool.

    Args:
        x: distance of each cell from the plane of symmetry.
        y: second coordinate of each cell, 0 in the middle of the grid.
        z: height of each cell above the bottom of the shape.
        variant_index: 0 for the small and 1 for the large variant; it indexes the pairs of numbers below.
    """
    max_distance = torch.maximum(x, y.abs())
    min_distance = torch.minimum(x, y.abs())
    # Half of the width of chairs and tables, which is also the height of the seat or of the top.
    chair_half_width = (2, 3)[variant_index]
    table_half_width = (3, 4)[variant_index]
    return {
        "ball": x**2 + y**2 + (z - 2.5) ** 2 <= (5.3, 7.3)[variant_index],
        "box": (x < (2, 3)[variant_index]) & (y.abs() < 2) & (z < 4),
        "pyramid": max_distance < (3, 4)[variant_index] - z,
        "pillar": (x**2 + y**2 < (2.6, 4.6)[variant_index]) & (z < (5, 6)[variant_index]),
        "table": (max_distance < table_half_width)
        & ((z == table_half_width) | ((min_distance > table_half_width - 1) & (z < table_half_width))),
        "chair": (
            (max_distance < chair_half_width)
            & (
                (z == chair_half_width)
                | ((min_distance > chair_half_width - 1) & (z < chair_half_width))
                | ((y < 1 - chair_half_width) & (z > chair_half_width) & (z <= 2 * chair_half_width))
            )
        ),
        "arch": (x < (3, 4)[variant_index]) & (y.abs() < 2) & ((z == 4) | ((z < 4) & (x > 2))),
        "cross": (y.abs() < (1, 2)[variant_index])
        & (z < 7)
        & ((x < 1) | ((x < (3, 4)[variant_index]) & (z >= 3) & (z <= 4))),
        "stairs": (x < (1, 2)[variant_index]) & (z <= (y + 4).clamp(max=(5, 6)[variant_index])),
        "cup": (max_distance < chair_half_width)
        & (z < (4, 6)[variant_index])
        & ((z < 1) | (max_distance > chair_half_width - 1)),
        "ring": (y.abs() < (1, 2)[variant_index]) & ((x**2 + (z - 3) ** 2 - 7.5).abs() <= 4.6),
        "tower": (z < (6, 7)[variant_index])
        & (max_distance < 1 + (z < (4, 5)[variant_index]).float() + (z < (1, 3)[variant_index]).float()),
        "mushroom": (
            (x**2 + y**2 < 2) & (z < (3, 4)[variant_index])
            | (x**2 + y**2 < (7, 13)[variant_index])
            & (z >= (3, 4)[variant_index])
            & (z < (5, 6)[variant_index])
        ),
        "hammer": (y.abs() < 1)
        & ((x < 1) | (z >= (5, 4)[variant_index]))
        & (x < (3, 4)[variant_index])
        & (z < 7),
        "sofa": (
            (x < (3, 4)[variant_index])
            & (y.abs() < 2)
            & ((z < 2) | ((z < (4, 5)[variant_index]) & ((x > (2, 3)[variant_index]) | (y < -1))))
        ),
        "bridge": (x < 4) & (y.abs() < (1, 2)[variant_index]) & (z < 6) & ((z >= 4) | (x**2 + z**2 > 12)),
    }


# (size, lift) of the K variants of a shape: small and large, on the ground and one cell above it.
VARIANTS = tuple((size, lift) for size in (0, 1) for lift in (0, 1))
# Prompt -> a number 0 to 11 that is different for the twelve colours of a shape, and by which prompts are
# split.
_PART = {
    f"{colour} {shape}": (5 * i + j) % len(COLOURS)
    for i, shape in enumerate(SHAPES)
    for j, colour in enumerate(COLOURS)
}
# Prompts to train on: four colours of every shape.
TRAINED = tuple(name for name in PROMPTS if _PART[name] < 4)
# Prompts to choose settings and checkpoints on: two colours of every shape.
CHOOSING = tuple(name for name in PROMPTS if 4 <= _PART[name] < 6)
# Held-out prompts, for the results table only: six colours of every shape.
HELD_OUT = tuple(name for name in PROMPTS if _PART[name] >= 6)


@functools.cache
def canonical_shapes() -> torch.Tensor:
    """Return the K variants of every target shape, without defects, [shapes, K, R, R, R] bool."""
    i, j, k = torch.meshgrid(*[torch.arange(R, dtype=torch.float32)] * 3, indexing="ij")
    # The plane of symmetry is between the two middle cells. The absolute value makes every shape symmetric.
    x = (i - (R - 1) / 2).abs()
    y = j - (R - 1) / 2
    variants = [
        torch.stack(list(shapes_at(x, y, k - lift, size_index).values())) & (k >= lift)
        for size_index, lift in VARIANTS
    ]
    return torch.stack(variants, 1)


@functools.cache
def canonical_colours() -> torch.Tensor:
    """Return the target colours at each height, [colours, R, 3]; they are brighter towards the top."""
    brightness = torch.linspace(DARKEST, 1, R)
    return torch.tensor(list(COLOURS.values()))[:, None] * brightness[None, :, None]


def classes(prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the class numbers of the shapes and of the colours of N prompts, two int64 tensors [N].

    Raises: ValueError for a prompt that the toy does not have.
    """
    shapes = list(SHAPES)
    colours = list(COLOURS)
    class_pairs = []
    for prompt in prompts:
        colour, _, shape = prompt.partition(" ")
        if shape not in SHAPES or colour not in COLOURS:
            raise ValueError(
                f"prompt: {prompt!r} is not a prompt of the toy. Write one of {', '.join(COLOURS)} and one of"
                f" {', '.join(SHAPES)}, as in 'red ball'."
            )
        class_pairs.append((shapes.index(shape), colours.index(colour)))
    class_numbers = torch.tensor(class_pairs, dtype=torch.int64).view(-1, 2)
    return class_numbers[:, 0], class_numbers[:, 1]


def targets(prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the correct shapes and colours of N prompts.

    Any of the K variants of a shape is correct. Colours are defined for all cells, also for empty cells.

    Returns: two tensors. The first is the occupancy of the K variants, [N, K, R, R, R] bool. The second is
    the colours, [N, R, R, R, 3].
    """
    shapes, colours = classes(prompts)
    # Colours depend on the height only: [N, R, 3] -> [N, 1, 1, R, 3] -> [N, R, R, R, 3].
    return canonical_shapes()[shapes], canonical_colours()[colours][:, None, None].expand(-1, R, R, -1, -1)


# Sizes d of a draft's voxels. The thresholds of the decoder are 0 and 1.
CARVED = -0.5  # the decoder removes the voxel
KEPT = 0.5  # the decoder keeps the voxel
GROWING = 1.5  # the decoder keeps the voxel, and uses it to fill empty cells beside it
CHANNELS = 4  # red, green, blue, d
SIZE_JITTER = 0.08  # standard deviation of d around these sizes


@dataclass(frozen=True, kw_only=True)
class Defects:
    """Largest strength of each defect; each sample's strength is drawn uniformly from 0 to the largest."""

    floaters: float = 0.02  # share of the empty cells that are filled
    holes: float = 0.1  # share of the shape's voxels that are missing
    unrepaired: float = 1.0  # share of floaters and holes that d does not correct
    wrong: float = 0.03  # share of the shape's voxels that d removes or grows by mistake
    tint: float = 0.05  # standard deviation of the asset's mean colour, in units of 0..1
    noise: float = 0.1  # standard deviation of a voxel's colour around the mean


# Source of the labelled assets (setting `labelled`) -> their defects.
DEFECTS = {"own": Defects(), "others": Defects(floaters=0.04, holes=0.2, wrong=0.06)}


@dataclass(frozen=True)
class Drafts:
    """Inputs of the decoder for N assets."""

    structure: torch.Tensor  # [N, R, R, R] bool, True at voxels
    # [N, R, R, R, 4]: red, green, blue in 0..1 before clipping, and the size d. Only the values at voxels are
    # used.
    features: torch.Tensor

    def latents(self, stage: str) -> Batch:
        """Return the latents of a stage in the scale of the generator.

        For the stage "structure", these are the voxels as a grid [N, 1, R, R, R] of -1 and 1. For the stage
        "voxels", these are the features [V, 4], scaled from 0..1 to -1..1.
        """
        if stage == "structure":
            return self.structure[:, None].float() * 2 - 1
        return SparseBatch(
            self.structure.nonzero().int().contiguous(),
            self.features[self.structure] * 2 - 1,
            len(self.structure),
        )


def draw_drafts(prompts: Sequence[str], generator: torch.Generator, defects: Defects | None = None) -> Drafts:
    """Sample one draft for each of N prompts: a random variant of the prompt's shape, with random defects.

    Args:
        prompts: N prompts.
        generator: random generator. The order of the random numbers in this function must not change, because
            it determines the drafts of a seed.
        defects: largest strengths of the defects; None uses the defaults of `Defects`.
    """
    defects = defects or Defects()
    shapes, colours = targets(prompts)
    sample_count = len(shapes)

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator)

    def strength(max_strength: float) -> torch.Tensor:
        # [N, 1, 1, 1]: one strength for all cells of a sample.
        return max_strength * uniform(sample_count, 1, 1, 1)

    chosen_shapes = shapes[
        torch.arange(sample_count), torch.randint(shapes.shape[1], (sample_count,), generator=generator)
    ]
    is_floater = ~chosen_shapes & (uniform(*chosen_shapes.shape) < strength(defects.floaters))
    is_hole = chosen_shapes & (uniform(*chosen_shapes.shape) < strength(defects.holes))
    structure = (chosen_shapes & ~is_hole) | is_floater
    is_corrected = uniform(*chosen_shapes.shape) >= strength(defects.unrepaired)
    is_wrong = chosen_shapes & (uniform(*chosen_shapes.shape) < strength(defects.wrong))
    grows_wrongly = uniform(*chosen_shapes.shape) < 0.5
    # The neighbours of a corrected hole grow, so that the decoder fills the hole.
    is_growing = (neighbours(is_hole & is_corrected) > 0) | (is_wrong & grows_wrongly)
    is_carved = (is_floater & is_corrected) | (is_wrong & ~grows_wrongly)
    # CARVED is set last, so that a corrected floater beside a hole is removed and does not grow.
    d = (
        torch.full(chosen_shapes.shape, KEPT)
        .masked_fill(is_growing & chosen_shapes, GROWING)
        .masked_fill(is_carved, CARVED)
    )
    d = d + SIZE_JITTER * torch.randn(chosen_shapes.shape, generator=generator)
    tint = strength(defects.tint)[..., None] * torch.randn(sample_count, 1, 1, 1, 3, generator=generator)
    noise = strength(defects.noise)[..., None] * torch.randn(sample_count, R, R, R, 3, generator=generator)
    return Drafts(structure, torch.cat([colours + tint + noise, d[..., None]], dim=-1))


def neighbours(grid: torch.Tensor) -> torch.Tensor:
    """Sum the six face neighbours of each cell of a grid [N, R, R, R, ...], float; cells outside count 0."""
    cell_values = grid.float()
    neighbour_sums = torch.zeros_like(cell_values)
    for axis in (1, 2, 3):
        for step in (-1, 1):
            start_index = max(step, 0)
            # Adds the grid shifted by one cell. Unlike roll, this does not wrap around at the edges.
            shifted_values = cell_values.narrow(axis, start_index, R - 1)
            neighbour_sums.narrow(axis, 1 - start_index, R - 1).add_(shifted_values)
    return neighbour_sums


TO_GROW = 2  # number of growing neighbours with which the decoder fills an empty cell
PATH = FlowPath(mean=0.0)
GUIDANCE = {
    STRUCTURE: 1.0,
    VOXELS: 0.0,
}  # stage -> strength of guidance; colours are correct without guidance


@dataclass(frozen=True)
class ToyAsset:
    """Finished asset of the toy: occupied voxels and their colours."""

    occupancy: torch.Tensor  # [R, R, R] bool; at least one voxel is filled
    colours: torch.Tensor  # [R, R, R, 3] in 0..1; 0 where nothing is filled


class ToyPipeline:
    """Generator of the toy with the interface `stage.Pipeline`.

    The conditioning is two one-hot tokens, one for the shape and one for the colour. Assets are on the CPU.

    Args:
        structure: network of the stage "structure".
        voxels: network of the stage "voxels".
        device: device of the networks.
    """

    def __init__(
        self, structure: torch.nn.Module, voxels: torch.nn.Module, device: str | torch.device = "cpu"
    ):
        self.device = torch.device(device)
        self.stages = tuple(
            FlowStage(
                name=name,
                model=model.to(self.device),
                latents=latent_kind_class(channels=channels, resolution=R),
                path=PATH,
                sampling=Sampling(
                    steps=8, cfg_strength=GUIDANCE[name], cfg_interval=(0.5, 1.0), rescale_t=1.0
                ),
            )
            for name, model, latent_kind_class, channels in (
                (STRUCTURE, structure, DenseGrid, 1),
                (VOXELS, voxels, SparseVoxels, CHANNELS),
            )
        )

    def conditioning(self, names: Sequence[str], stage: str) -> torch.Tensor:
        """Return the conditioning tokens of N prompts, [N, 2, 28]; both stages have the same tokens."""
        shapes, colours = classes(names)
        width = len(SHAPES) + len(COLOURS)
        # Both tokens have one vocabulary: first the 16 shapes, then the 12 colours.
        tokens = torch.stack([F.one_hot(shapes, width), F.one_hot(len(SHAPES) + colours, width)], dim=1)
        return tokens.float().to(self.device)

    def null_conditioning(self, n: int, stage: str) -> torch.Tensor:
        return torch.zeros(n, 2, len(SHAPES) + len(COLOURS), device=self.device)

    def advance(self, stage: str, x_0: torch.Tensor) -> list[Voxels]:
        """Return the voxels of each structure: the cells above 0, and the cell with the largest value."""
        assert stage == STRUCTURE
        logits = x_0.detach().flatten(1)
        # With the largest value, no structure is empty.
        is_filled = (logits > 0) | (logits == logits.amax(1, keepdim=True))
        return [grid.view(R, R, R).nonzero().int() for grid in is_filled]

    def decode(self, x_0: SparseBatch) -> list[ToyAsset]:
        """Decode the features of voxels to assets, see `make_assets`."""
        batch = x_0.to("cpu", torch.float32)  # on the CPU, because the oracles use numpy and scipy
        sample_index, x, y, z = batch.coords.long().unbind(1)
        structure = torch.zeros(batch.size, R, R, R, dtype=torch.bool)
        features = torch.zeros(batch.size, R, R, R, CHANNELS)
        structure[sample_index, x, y, z] = True
        # From -1..1 to 0..1, the inverse of Drafts.latents.
        features[sample_index, x, y, z] = (batch.feats.detach() + 1) / 2
        return make_assets(Drafts(structure, features))

    def encode(self, assets: Sequence[ToyAsset]) -> list[dict[str, Latent]]:
        """Encode finished assets to a dictionary each, stage -> latent. Every voxel gets the size KEPT."""
        encoded_assets = []
        for asset in assets:
            sizes = torch.full((R, R, R, 1), KEPT)
            draft = Drafts(asset.occupancy[None], torch.cat([asset.colours, sizes], dim=-1)[None])
            encoded_assets.append({stage: separate(draft.latents(stage))[0] for stage in (STRUCTURE, VOXELS)})
        return encoded_assets


def make_assets(drafts: Drafts) -> list[ToyAsset]:
    """Decode drafts to assets.

    Voxels with a size d < 0 are removed. Empty cells beside at least TO_GROW voxels with d > 1 are filled,
    with the mean colour of these voxels. The voxel with the largest d is never removed, so that an asset has
    at least one voxel.
    """
    structure = drafts.structure
    d = drafts.features[..., 3]
    draft_colours = drafts.features[..., :3].clamp(0, 1)
    occupied_d = d.masked_fill(~structure, -torch.inf)
    is_largest = occupied_d == occupied_d.amax((1, 2, 3), keepdim=True)
    is_kept = structure & ((d >= 0) | is_largest)
    is_growing = structure & (d > 1)
    growing_counts = neighbours(is_growing)
    is_grown = ~structure & (growing_counts >= TO_GROW)
    # Mean colour of the growing neighbours. clamp avoids 0 / 0 for cells without such neighbours.
    mixed_colours = neighbours(is_growing[..., None] * draft_colours) / growing_counts.clamp(min=1)[..., None]
    colours = torch.where(is_grown[..., None], mixed_colours, draft_colours) * (is_kept | is_grown)[..., None]
    return [
        ToyAsset(occupancy, colour) for occupancy, colour in zip(is_kept | is_grown, colours, strict=True)
    ]
