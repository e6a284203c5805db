"""CPU test problem for score distillation: box heads of 16^3 voxels, rendered one side at a time.

A box has four sides, and each side has a recess. A side is *empty*, or it is a *face* with two painted eyes
and a nose. The nose is in the recess and does not protrude from it, so that the features of one side are
never visible to the camera of another side. The prior, which is the diffusion model that is distilled, has
two modes for each prompt: it can generate two images of a side. There are two kinds of prompts:

- **mini-Janus**: the two modes are a face and an empty side. Each side starts near the face with probability
  p, and the prior moves the side to the nearest mode, so the number of noses is binomial. With p = 0.45, the
  probability of two or more noses on four sides is 0.609, close to the Janus ratio of 0.61 that is published
  for DreamFusion (Poole et al. 2022, arXiv 2209.14988). The problem tests whether a method removes surplus
  faces. It does not test whether score distillation creates them.
- **mode**: the two modes are two emblems that are mirror images, transposes or colour permutations of each
  other. The first emblem is preferred. Sides start half way between the two emblems.

Shapes: A is the number of assets, B the number of prompts in a batch, and K the number of modes, twice the
number of all prompts. There are V = 4 views (one per side), N voxels per edge, R = 16 pixels per edge, and P
points.
"""

import functools
from collections.abc import Callable, Sequence

import numpy as np
import torch

from eg3d_rlhf.core.field import Field
from eg3d_rlhf.core.spec import SlabSpec
from eg3d_rlhf.generators.assets.grids import Voxels
from eg3d_rlhf.generators.assets.views import four_views
from eg3d_rlhf.rewards.box_prompts import PROMPTS, Prompt, Side, prompt_of

RESOLUTION = 16  # N and R
SIDES = 4
# Probability that a side of a head starts near the face. It gives DreamFusion's Janus ratio of 0.61; 0.40
# would give 0.525, the ratio of MVDream.
FACE_PROBABILITY = 0.45
# Density parameters (`Voxels.shape`) inside and outside of a finished object
SOLID = 3.0
EMPTY = -2.0
# Density parameters inside and outside at the start. They are closer to 0, so that densities can still
# change.
_STARTED_SOLID = 1.5
_STARTED_EMPTY = -1.2
# Range of a side's initial share of the face: for sides that start near the face, and for all other sides
_NEAR = (0.7, 0.95)
_FAR = (0.05, 0.3)
_START_NOISE = 0.1  # standard deviation of the noise on all parameters at the start

# Positions in voxels 0..15, first and last voxel included, in a side's own axes: across, up, towards the
# camera
_BODY = (1, 14)
_RECESS = (4, 11)
FLOOR = 11
_NOSE = ((6, 9), (6, 9), (12, 13))  # the nose fills two of the three voxels of the recess's depth
_EYES = (((5, 5), (9, 10)), ((10, 10), (9, 10)))

COLOURS = {
    "red": (0.85, 0.15, 0.15),
    "green": (0.15, 0.85, 0.15),
    "blue": (0.15, 0.15, 0.85),
    "yellow": (0.85, 0.85, 0.15),
    "grey": (0.5, 0.5, 0.5),
    "white": (0.85, 0.85, 0.85),
}
_DARK = (0.1, 0.1, 0.1)

# Function that returns a mask of the painted part of a recess's base, from the coordinates across and up
Inside = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
# u is the coordinate across and v the coordinate up; 7.5 is the centre of 0..15. Emblems cover at most 6 x 6
# voxels, because the voxels beside these belong to the next side, too.
_EMBLEMS: dict[str, Inside] = {
    "disc": lambda u, v: (u - 7.5) ** 2 + (v - 7.5) ** 2 < 8,
    "upright bar": lambda u, v: ((u - 7.5).abs() < 1.1) & ((v - 7.5).abs() < 2.6),
    "level bar": lambda u, v: ((v - 7.5).abs() < 1.1) & ((u - 7.5).abs() < 2.6),
    "left half": lambda u, v: (u < 7.5) & (u > 4.5) & ((v - 7.5).abs() < 2.6),
    "right half": lambda u, v: (u > 7.5) & (u < 10.5) & ((v - 7.5).abs() < 2.6),
}


@functools.cache
def _coordinates(n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the coordinates x, y, z of the n^3 voxels, three tensors [N, N, N] with values in 0..15.

    The axes of each tensor are z, y, x.
    """
    coordinates = torch.linspace(0, 15, n)
    z, y, x = torch.meshgrid(coordinates, coordinates, coordinates, indexing="ij")
    return x, y, z


def side_axes(n: int, side: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the coordinates of all voxels in the axes of one side's camera, with values in 0..15.

    Args:
        n: voxels per edge, N.
        side: index of the side: 0 front, 1 right (+x), 2 back, 3 left (-x).
    Returns: three tensors [N, N, N]: the coordinate across the image, which increases to the camera's right,
        the coordinate up, and the coordinate towards the camera.
    """
    x, y, z = _coordinates(n)
    # One row per side. A coordinate is reversed (15 - x) where it points away from that side's camera or to
    # the camera's left.
    return ((x, y, z), (15 - z, y, x), (15 - x, y, 15 - z), (z, y, 15 - x))[side]


def _within(axes: Sequence[torch.Tensor], ranges: Sequence[tuple[int, int]]) -> torch.Tensor:
    """Return a mask [N, N, N] of the voxels whose coordinate on every axis lies in the range of this axis.

    Args:
        axes: coordinates [N, N, N] of the voxels on each axis, in 0..15.
        ranges: first and last coordinate of each axis's range, both included.
    """
    inside = torch.ones_like(axes[0], dtype=torch.bool)
    # Half a voxel of margin, since coordinates of other resolutions are not integers.
    for axis, (low, high) in zip(axes, ranges, strict=True):
        inside &= (axis > low - 0.5) & (axis < high + 0.5)
    return inside


def nose_voxels(n: int, side: int) -> torch.Tensor:
    """Return a mask [N, N, N] of the voxels of a side's nose.

    Args:
        n: voxels per edge, N.
        side: index of the side, see `side_axes`.
    """
    return _within(side_axes(n, side), _NOSE)


def _painted_masks(
    n: int, side: int, features: Side
) -> list[tuple[torch.Tensor, tuple[float, float, float]]]:
    """Return a mask [N, N, N] and an RGB colour for each painted feature of a side, as a list of pairs.

    Eyes and emblems are on the base of the recess. The list is empty for an empty side.

    Args:
        n: voxels per edge, N.
        side: index of the side, see `side_axes`.
        features: features of the side.
    """
    right_axis, up_axis, camera_axis = side_axes(n, side)
    is_on_base = (camera_axis - FLOOR).abs() < 0.5
    painted_features = []
    if features.nose is not None:
        painted_features += [
            (is_on_base & _within((right_axis, up_axis), eye_ranges), _DARK) for eye_ranges in _EYES
        ]
        painted_features.append((nose_voxels(n, side), COLOURS[features.nose]))
    if features.emblem is not None:
        emblem_name, colour = features.emblem
        painted_features.append((is_on_base & _EMBLEMS[emblem_name](right_axis, up_axis), COLOURS[colour]))
    return painted_features


def emblem_points(prompt: Prompt, side: int, n: int = RESOLUTION) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the points on a side's base at which the prompt's two emblems have different colours.

    Args:
        prompt: prompt of a box with emblems.
        side: index of the side, see `side_axes`.
        n: voxels per edge of the grid whose points are returned.
    Returns: the positions [P, 3] of the points in world units, and the RGB colours [2, P, 3] in 0..1 of the
        preferred emblem and of the other emblem at these points.
    """
    body_colour = torch.tensor(COLOURS[prompt.body])
    # [2, N, N, N, 3]: the box in the first and in the second mode, painted on this side only
    colours = torch.stack([body_colour.expand(n, n, n, 3).clone() for _ in prompt.sides])
    for mode, features in enumerate(prompt.sides):
        for mask, colour in _painted_masks(n, side, features):
            colours[mode][mask] = torch.tensor(colour)
    has_different_colours = (colours[0] != colours[1]).any(dim=-1)
    # Voxel coordinates 0..15 become world coordinates -0.5..0.5.
    grid_positions = torch.stack(_coordinates(n), dim=-1) / 15 - 0.5  # [N, N, N, 3]
    return grid_positions[has_different_colours], colours[:, has_different_colours]


def _logit(colour: Sequence[float]) -> torch.Tensor:
    """Return the parameters [3, 1] of `Voxels.paint` that give an RGB colour in 0..1."""
    # Voxels apply a sigmoid to the stored colours, and the logit is its inverse.
    return torch.logit(torch.tensor(colour))[:, None]  # [3, 1]


@torch.no_grad()
def build(
    prompt: Prompt, shares: torch.Tensor, n: int = RESOLUTION, solid: float = SOLID, empty: float = EMPTY
) -> Voxels:
    """Build boxes of one prompt, whose sides are blends of the prompt's two modes.

    Args:
        prompt: prompt of all boxes.
        shares: shares [A, 4] of the first mode for each box and side, in 0..1; a share of 0 gives the second
            mode.
        n: voxels per edge.
        solid: density parameter (`Voxels.shape`) inside the box.
        empty: density parameter (`Voxels.shape`) outside the box.
    Returns: voxels of A boxes, whose parameters have no gradients.
    """
    voxels = Voxels(len(shares), n).requires_grad_(False)
    # A cube, from which the four recesses are removed below
    is_body = _within(_coordinates(n), [_BODY] * 3)
    for side in range(SIDES):
        right_axis, up_axis, camera_axis = side_axes(n, side)
        # Only the first two coordinates are bounded: the recess is open towards the camera.
        is_body &= ~(_within((right_axis, up_axis), (_RECESS, _RECESS)) & (camera_axis > FLOOR + 0.5))
    voxels.shape.copy_(torch.where(is_body, solid, empty).expand_as(voxels.shape))
    voxels.paint.copy_(_logit(COLOURS[prompt.body]).view(3, 1, 1, 1).expand_as(voxels.paint))
    # Blends are linear in the parameters, so a share of 0.5 is half way before the sigmoid.
    for side in range(SIDES):
        # [A]; voxels.shape is a tensor and gives dtype and device
        side_shares = shares[:, side].to(voxels.shape)
        for mode_index, weight in ((1, 1 - side_shares), (0, side_shares)):
            for mask, colour in _painted_masks(n, side, prompt.sides[mode_index]):
                # Colours are blended as logits, in the parameters' own space.
                colours = voxels.paint[:, :, mask]  # [A, 3, voxels]
                voxels.paint[:, :, mask] = colours + weight[:, None, None] * (
                    _logit(colour) - _logit(COLOURS[prompt.body])
                )
        if prompt.kind == "janus":
            # A nose is also geometry: its density follows the share of the face. [A, 1]
            voxels.shape[:, nose_voxels(n, side)] = (empty + side_shares * (solid - empty))[:, None]
    return voxels


@functools.cache
def modes() -> torch.Tensor:
    """Return the images [K, 4, R, R] of the modes of all prompts: RGB and inverse depth, in -1..1.

    These images are the latents of the prior. There are two successive rows per prompt (first mode, second
    mode), in the order of `PROMPTS`. The result is cached and must not be changed.
    """
    mode_latents = []
    for prompt in PROMPTS:
        # One box with all sides in the first mode and one with all sides in the second mode
        first_mode_shares = torch.eye(2)[:, :1].expand(2, SIDES)  # rows of ones and of zeros
        mode_boxes = build(prompt, first_mode_shares)
        images, *_ = four_views(mode_boxes.raw, torch.sigmoid(mode_boxes.paint), mode_boxes.pitch)
        # All four sides are equal, so the front view is enough.
        mode_latents.append(images[:, 0])
    return torch.cat(mode_latents) * 2 - 1


def modes_of(texts: Sequence[str]) -> torch.Tensor:
    """Return images [B, 2, 4, R, R] of the two modes of each prompt: RGB and inverse depth, in 0..1.

    Args: texts: text of each prompt, length B.
    Raises: ValueError for a text that is not a prompt of the test problem.
    """
    prompt_indices = torch.tensor([PROMPTS.index(prompt_of(text)) for text in texts], dtype=torch.long)
    # `modes` has two rows per prompt: [K, ...] -> [K / 2, 2, ...]. Values -1..1 become 0..1.
    return (modes().unflatten(0, (-1, 2))[prompt_indices] + 1) / 2


@torch.no_grad()
def start(texts: Sequence[str], generators: Sequence[torch.Generator], p: float = FACE_PROBABILITY) -> Voxels:
    """Create the initial voxels of assets, each with its own prompt and its own random generator.

    All assets start as boxes with recesses, with noise on all parameters. Each side of a head starts near the
    face with probability p. Sides with emblems start half way between the two emblems.

    Args:
        texts: prompt of each asset, length A.
        generators: generator of random numbers of each asset, length A.
        p: probability that a side of a head starts near the face.
    Returns: voxels of A assets.
    Raises: ValueError for a text that is not a prompt of the test problem.
    """
    started_boxes = Voxels(len(texts), RESOLUTION)
    for asset_index, (text, rng) in enumerate(zip(texts, generators, strict=True)):
        prompt = prompt_of(text)
        range_choice = torch.rand(SIDES, generator=rng)
        range_position = torch.rand(SIDES, generator=rng)
        # [4] each: smallest and largest possible share of each side
        min_shares, max_shares = (
            torch.where(range_choice < p, near, far) for near, far in zip(_NEAR, _FAR, strict=True)
        )
        side_shares = (
            torch.lerp(min_shares, max_shares, range_position)
            if prompt.kind == "janus"
            else torch.full((SIDES,), 0.5)
        )
        # `build` takes shares [A, 4], and here A is 1.
        initial_box = build(prompt, side_shares[None], RESOLUTION, _STARTED_SOLID, _STARTED_EMPTY)
        for batch_parameter, parameter in zip(
            started_boxes.parameters(), initial_box.parameters(), strict=True
        ):
            parameter_noise = torch.randn(parameter.shape[1:], generator=rng)
            batch_parameter[asset_index] = parameter[0] + _START_NOISE * parameter_noise
    return started_boxes


# Detector of the test problem. It counts how many sides of a box head have a nose. It reads surfaces, which
# no reward reads. The share of heads with two or more noses (the Janus ratio) alone would count a head
# without any nose as a success. Reports must therefore state three shares: heads with no nose, with one nose,
# and with more noses. In the shapes below, R is the number of rays per edge.

_WINDOW = 0.25  # half of the edge of the searched square on a side (the recess), in edges of the cube
# Smallest height of a nose above the base, in edges of the cube: half the height of a complete nose
_STEP = 0.06
_AREA = (0.06, 0.6)  # smallest and largest share of the window that a nose covers
# Quantile of the heights in the window that is taken as the height of the base. It is right as long as a nose
# covers less than two thirds of the window.
_BASE_QUANTILE = 0.3
RAYS = 32  # number of rays per side along each edge


@torch.no_grad()
def _heights(field: Field) -> torch.Tensor:
    """Compute the heights [A, 4, R, R] of the outermost surface on the sides front, +x, back and -x.

    A height is the distance of the outermost grid point with a density of at least `field.level` from the
    cube's centre along the side's axis, in edges of the cube. It is -1 for a ray that meets no such point.
    The rows of an image are in the order of increasing y, and its columns run to the camera's right.
    """
    grid = SlabSpec.from_bounds(field.bounds, RAYS)
    is_solid = field.density_grid(grid) >= field.level  # [A, z, y, x]
    # Views along z [A, y, x, z] and along x [A, y, z, x]; flips bring each side into its camera's axes.
    along_z = is_solid.permute(0, 2, 3, 1)
    along_x = is_solid.permute(0, 2, 1, 3)
    side_views = [along_z, along_x.flip(2), along_z.flip(2, 3), along_x.flip(3)]
    point_heights = torch.linspace(-0.5, 0.5, RAYS)
    # A field does not state its device, so one density is computed to learn it.
    side_heights = [
        torch.where(side_view, point_heights.to(field.density(torch.zeros(1, 3)).device), -1).amax(dim=3)
        for side_view in side_views
    ]
    return torch.stack(side_heights, dim=1)


def noses(field: Field) -> torch.Tensor:
    """Count the sides of each asset that have a nose: int64 [A], in 0..4.

    A side has a nose if its recess contains a connected bump that rises more than 0.06 edges of the cube
    above the base of the recess (`_STEP`), and covers 6 to 60 % of the recess (`_AREA`).

    Args: field: field of A shapes.
    """
    from scipy import ndimage

    heights = _heights(field)
    # Only the recess can hold a nose.
    is_in_window = torch.linspace(-0.5, 0.5, RAYS).abs() <= _WINDOW
    # [A, 4, w, w], where w is the number of True entries of `is_in_window`
    recess_heights = heights[:, :, is_in_window][:, :, :, is_in_window]
    base_heights = recess_heights.flatten(2).quantile(_BASE_QUANTILE, dim=2)[:, :, None, None]
    # Connected bumps are searched on the CPU by scipy.
    is_raised = (recess_heights > base_heights + _STEP).cpu().numpy()
    min_area, max_area = (share * recess_heights[0, 0].numel() for share in _AREA)  # pixels
    # [A, 4]: True for each side with a nose
    has_nose = np.zeros(heights.shape[:2], dtype=bool)
    for asset_and_side in np.ndindex(has_nose.shape):
        bump_labels, _ = ndimage.label(is_raised[asset_and_side])
        bump_areas = np.bincount(bump_labels.ravel())[1:]  # label 0 is the background
        has_nose[asset_and_side] = ((bump_areas >= min_area) & (bump_areas <= max_area)).any()
    return torch.from_numpy(has_nose.sum(axis=1))
