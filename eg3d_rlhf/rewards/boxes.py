"""CPU test problem for score distillation: box heads of 16^3 voxels, seen one side at a time.

A box has four sides with a recess each. A side is *empty*, or a *face*: two painted eyes and a nose. The nose
stands in the recess and does not protrude from it, so a side's features never change what another side's
camera sees. There are two kinds of prompts:

- **mini-Janus**: the prior's modes are face and empty. Each side starts near the face with probability p, and
  the prior preserves the mode that is nearest, so the number of noses is binomial. With p = .45, the
  probability of two or more noses on four sides is .609, close to DreamFusion's published .61. The problem
  tests whether a method removes surplus faces. It does not test whether score distillation creates them.
- **mode**: the modes are two emblems that are mirror images, transposes or colour permutations of each other;
  the first one is preferred. Sides start grey.

Letters: A assets, V = 4 views, B = A V, K modes, N voxels per edge, R = 16 pixels, P points.
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
FACE_PROBABILITY = 0.45  # gives DreamFusion's Janus ratio; .40 gives .525, the ratio of MVDream
# Values of `Voxels.shape` of a finished object, inside and outside
SOLID = 3.0
EMPTY = -2.0
# The same at the start, where densities are softer, so that they can still change
_STARTED_SOLID = 1.5
_STARTED_EMPTY = -1.2
# Range of a side's initial share of the face, if the side starts near the face and if it does not
_NEAR = (0.7, 0.95)
_FAR = (0.05, 0.3)
_START_NOISE = 0.1  # standard deviation of the noise on all parameters at the start

# Positions are in voxels 0..15, both ends included, in a side's own axes: across, up, towards the camera
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

# Function of (across, up) that returns where the base of the recess is painted
Inside = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
# Emblems cover at most 6 x 6 voxels, because the voxels beside these belong to the next side, too.
_EMBLEMS: dict[str, Inside] = {
    "disc": lambda u, v: (u - 7.5) ** 2 + (v - 7.5) ** 2 < 8,
    "upright bar": lambda u, v: ((u - 7.5).abs() < 1.1) & ((v - 7.5).abs() < 2.6),
    "level bar": lambda u, v: ((v - 7.5).abs() < 1.1) & ((u - 7.5).abs() < 2.6),
    "left half": lambda u, v: (u < 7.5) & (u > 4.5) & ((v - 7.5).abs() < 2.6),
    "right half": lambda u, v: (u > 7.5) & (u < 10.5) & ((v - 7.5).abs() < 2.6),
}


@functools.cache
def _coordinates(n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return x, y, z [N, N, N] of the voxels in 0..15; array axes are z, y, x."""
    axis = torch.linspace(0, 15, n)
    z, y, x = torch.meshgrid(axis, axis, axis, indexing="ij")
    return x, y, z


def side_axes(n: int, side: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return coordinates [N, N, N] of voxels in the axes of side 0..3 (front, +x, back, -x), in 0..15.

    They are (across, up, towards the camera); across increases to the camera's right.
    """
    x, y, z = _coordinates(n)
    return ((x, y, z), (15 - z, y, x), (15 - x, y, 15 - z), (z, y, 15 - x))[side]


def _within(axes: Sequence[torch.Tensor], ranges: Sequence[tuple[int, int]]) -> torch.Tensor:
    """Return a mask of where each coordinate lies in its range, both ends included."""
    inside = torch.ones_like(axes[0], dtype=torch.bool)
    # Half a voxel of margin, since coordinates of other resolutions are not integers.
    for axis, (low, high) in zip(axes, ranges, strict=True):
        inside &= (axis > low - 0.5) & (axis < high + 0.5)
    return inside


def nose_voxels(n: int, side: int) -> torch.Tensor:
    """Return a mask [N, N, N] of a side's nose."""
    return _within(side_axes(n, side), _NOSE)


def _painted(n: int, side: int, shown: Side) -> list[tuple[torch.Tensor, tuple[float, float, float]]]:
    """Return masks [N, N, N] and colours of a side's features; eyes and emblems lie on the base of the
    recess.
    """
    across, up, towards = side_axes(n, side)
    base = (towards - FLOOR).abs() < 0.5
    marks = []
    if shown.nose is not None:
        marks += [(base & _within((across, up), eye), _DARK) for eye in _EYES]
        marks.append((nose_voxels(n, side), COLOURS[shown.nose]))
    if shown.emblem is not None:
        name, colour = shown.emblem
        marks.append((base & _EMBLEMS[name](across, up), COLOURS[colour]))
    return marks


def emblem_points(prompt: Prompt, side: int, n: int = RESOLUTION) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the points on a side's base where a prompt's two emblems differ.

    Returns: world points [P, 3], and the colours [2, P, 3] of both emblems there.
    """
    body = torch.tensor(COLOURS[prompt.body])
    painted = torch.stack([body.expand(n, n, n, 3).clone() for _ in prompt.sides])
    for mode, shown in enumerate(prompt.sides):
        for mask, colour in _painted(n, side, shown):
            painted[mode][mask] = torch.tensor(colour)
    differ = (painted[0] != painted[1]).any(dim=-1)
    points = torch.stack(_coordinates(n), dim=-1) / 15 - 0.5  # [N, N, N, 3]
    return points[differ], painted[:, differ]


def _logit(colour: Sequence[float]) -> torch.Tensor:
    """Return the parameters [3, 1] of a colour in 0..1."""
    # Voxels store colours before a sigmoid.
    return torch.logit(torch.tensor(colour))[:, None]  # [3, 1]


@torch.no_grad()
def build(
    prompt: Prompt, shares: torch.Tensor, n: int = RESOLUTION, solid: float = SOLID, empty: float = EMPTY
) -> Voxels:
    """Build objects [A] of a prompt.

    Each side is a blend of its second mode (share 0) and its first mode (1).

    Args: shares: [A, 4] in 0..1; solid, empty: `Voxels.shape` inside and outside of the object.
    """
    voxels = Voxels(len(shares), n).requires_grad_(False)
    # A cube, from which the four recesses are removed below
    body = _within(_coordinates(n), [_BODY] * 3)
    for side in range(SIDES):
        across, up, towards = side_axes(n, side)
        body &= ~(_within((across, up), (_RECESS, _RECESS)) & (towards > FLOOR + 0.5))
    voxels.shape.copy_(torch.where(body, solid, empty).expand_as(voxels.shape))
    voxels.paint.copy_(_logit(COLOURS[prompt.body]).view(3, 1, 1, 1).expand_as(voxels.paint))
    # Blends are linear in the parameters, so a share of 0.5 is half way before the sigmoid.
    for side in range(SIDES):
        share = shares[:, side].to(voxels.shape)
        for mode, weight in ((1, 1 - share), (0, share)):
            for mask, colour in _painted(n, side, prompt.sides[mode]):
                # Colours are blended as logits, in the parameters' own space.
                colours = voxels.paint[:, :, mask]  # [A, 3, voxels]
                voxels.paint[:, :, mask] = colours + weight[:, None, None] * (
                    _logit(colour) - _logit(COLOURS[prompt.body])
                )
        if prompt.kind == "janus":
            voxels.shape[:, nose_voxels(n, side)] = (empty + share * (solid - empty))[:, None]
    return voxels


@functools.cache
def modes() -> torch.Tensor:
    """Return the latents [K, 4, R, R] of all modes in -1..1: RGB and inverse depth of a side.

    They are two modes per prompt, in the order of `PROMPTS`.
    """
    latents = []
    for prompt in PROMPTS:
        # One object with all sides in the first mode and one with all sides in the second mode
        objects = build(prompt, torch.eye(2)[:, :1].expand(2, SIDES))
        latents.append(four_views(objects.raw, torch.sigmoid(objects.paint), objects.pitch)[0][:, 0])
    return torch.cat(latents) * 2 - 1


def modes_of(texts: Sequence[str]) -> torch.Tensor:
    """Return images [B, 2, 4, R, R] in 0..1 of the two modes of each of B prompts."""
    # `modes` has two rows per prompt.
    rows = torch.tensor([PROMPTS.index(prompt_of(text)) for text in texts], dtype=torch.long)
    return (modes().unflatten(0, (-1, 2))[rows] + 1) / 2


@torch.no_grad()
def start(texts: Sequence[str], generators: Sequence[torch.Generator], p: float = FACE_PROBABILITY) -> Voxels:
    """Create the initial voxels [A] of A prompts, each with its own random generator.

    Bodies are complete. Each side of a head starts near the face with probability p; emblems start half way
    between both modes.
    Raises: ValueError for an unknown prompt.
    """
    started = Voxels(len(texts), RESOLUTION)
    for i, (text, rng) in enumerate(zip(texts, generators, strict=True)):
        prompt = prompt_of(text)
        u = torch.rand(SIDES, generator=rng)
        v = torch.rand(SIDES, generator=rng)
        # u selects the range of a side's share, and v the place in the range.
        low, width = (torch.where(u < p, near, far) for near, far in zip(_NEAR, _FAR, strict=True))
        share = torch.lerp(low, width, v) if prompt.kind == "janus" else torch.full((SIDES,), 0.5)
        initial = build(prompt, share[None], RESOLUTION, _STARTED_SOLID, _STARTED_EMPTY)
        for into, parameter in zip(started.parameters(), initial.parameters(), strict=True):
            into[i] = parameter[0] + _START_NOISE * torch.randn(parameter.shape[1:], generator=rng)
    return started


# Detector of the test problem, which counts how many sides of a box head have a nose. It reads surfaces,
# which no reward reads. The share of heads with two or more noses (the Janus ratio) alone would count a head
# without any nose as a success, so reports must state the shares of none, one, and more. R rays.

_WINDOW = 0.25  # half-width of the searched part of a side, in edges of the cube: the recess
_STEP = 0.06  # least height above the base, in edges of the cube: half the height of a nose
_AREA = (0.06, 0.6)  # share of the window that a bump may cover to count as a nose
_BASE_QUANTILE = 0.3  # of heights in the window: the base, if a nose covers less than two thirds of it
RAYS = 32  # per side and edge


@torch.no_grad()
def _heights(field: Field) -> torch.Tensor:
    """Compute heights [A, 4, R, R] of the outermost surface towards front, +x, back and -x.

    Heights are measured from the cube's centre in edges of the cube, where the density crosses the level
    along each axis; -1 where there is no surface. Rows are increasing y, and columns run to the camera's
    right.
    """
    grid = SlabSpec.of(field.bounds, RAYS)
    solid = field.density_grid(grid) >= field.level  # [A, z, y, x]
    # Views along z [A, y, x, z] and along x [A, y, z, x]; flips bring each side into its camera's axes.
    along_z = solid.permute(0, 2, 3, 1)
    along_x = solid.permute(0, 2, 1, 3)
    sides = [along_z, along_x.flip(2), along_z.flip(2, 3), along_x.flip(3)]
    height = torch.linspace(-0.5, 0.5, RAYS)
    return torch.stack(
        [
            torch.where(side, height.to(field.density(torch.zeros(1, 3)).device), -1).amax(dim=3)
            for side in sides
        ],
        dim=1,
    )


def noses(field: Field) -> torch.Tensor:
    """Count the sides with a nose, [A] in 0..4.

    A side has a nose if its recess contains at least one connected bump of suitable height and area.
    """
    from scipy import ndimage

    heights = _heights(field)
    # Only the recess can hold a nose.
    window = torch.linspace(-0.5, 0.5, RAYS).abs() <= _WINDOW
    inner = heights[:, :, window][:, :, :, window]  # [A, 4, w, w]
    base = inner.flatten(2).quantile(_BASE_QUANTILE, dim=2)[:, :, None, None]
    # Connected bumps are searched on the CPU by scipy.
    raised = (inner > base + _STEP).cpu().numpy()
    low, high = (share * inner[0, 0].numel() for share in _AREA)  # pixels
    # [A, 4]
    hits = np.zeros(heights.shape[:2], dtype=bool)
    for index in np.ndindex(hits.shape):
        labels, _ = ndimage.label(raised[index])
        areas = np.bincount(labels.ravel())[1:]  # label 0 is the background
        hits[index] = ((areas >= low) & (areas <= high)).any()
    return torch.from_numpy(hits.sum(axis=1))
