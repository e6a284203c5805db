"""The CPU test problem: box heads of 16^3 voxels whose four sides are recessed, and a prior that sees one
side at a time.

A side is *plain*, or a *face*: two painted eyes and a nose that stands in the recess without protruding from
it, so that what one side shows never changes what another camera sees. Two kinds of prompts:

- **mini-Janus**: the prior's modes are face and plain. Each side starts near the face with probability p, and
  the prior keeps what it finds, so the number of noses is binomial: with p = .45, two or more of four are
  P = .609, as DreamFusion's published .61. This tests whether a method removes surplus faces, not whether
  score distillation invents them.
- **mode**: two emblems that are one another's mirror images, transposes or colour permutations; the first is
  preferred. Sides start grey.

Letters: A assets, V = 4 views, B = A V, K modes, N voxels per edge, R = 16 pixels.
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

RESOLUTION = 16
SIDES = 4
FACE_PROBABILITY = 0.45  # of DreamFusion's Janus ratio; .40 gives .525, MVDream's
# `Voxels.shape` of a finished object
SOLID = 3.0
EMPTY = -2.0
# the same at the start: soft enough to change
_STARTED_SOLID = 1.5
_STARTED_EMPTY = -1.2
# how much of a face a side has at the start, where it is near the face and where not
_NEAR = (0.7, 0.95)
_FAR = (0.05, 0.3)
_START_NOISE = 0.1  # deviation of all parameters at the start

# in voxels of 0..15, both ends included; a side's own axes: across, up, towards the camera
_BODY = (1, 14)
_RECESS = (4, 11)
FLOOR = 11
_NOSE = ((6, 9), (6, 9), (12, 13))  # two of the recess's three voxels deep
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

# whether (across, up) of the recess's floor is painted
Inside = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
_EMBLEMS: dict[str, Inside] = {  # 6 x 6 voxels at most: those beside it belong to the next side, too
    "disc": lambda u, v: (u - 7.5) ** 2 + (v - 7.5) ** 2 < 8,
    "upright bar": lambda u, v: ((u - 7.5).abs() < 1.1) & ((v - 7.5).abs() < 2.6),
    "level bar": lambda u, v: ((v - 7.5).abs() < 1.1) & ((u - 7.5).abs() < 2.6),
    "left half": lambda u, v: (u < 7.5) & (u > 4.5) & ((v - 7.5).abs() < 2.6),
    "right half": lambda u, v: (u > 7.5) & (u < 10.5) & ((v - 7.5).abs() < 2.6),
}


@functools.cache
def _coordinates(n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, y, z [N, N, N] of voxels in 0..15, axes z, y, x."""
    axis = torch.linspace(0, 15, n)
    z, y, x = torch.meshgrid(axis, axis, axis, indexing="ij")
    return x, y, z


def side_axes(n: int, side: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(across, up, towards the camera) [N, N, N] of voxels as side 0..3 has them (front, +x, back, -x), in
    0..15; across rises to the camera's right.
    """
    x, y, z = _coordinates(n)
    return ((x, y, z), (15 - z, y, x), (15 - x, y, 15 - z), (z, y, 15 - x))[side]


def _within(axes: Sequence[torch.Tensor], ranges: Sequence[tuple[int, int]]) -> torch.Tensor:
    inside = torch.ones_like(axes[0], dtype=torch.bool)
    for axis, (low, high) in zip(axes, ranges, strict=True):
        inside &= (axis > low - 0.5) & (axis < high + 0.5)
    return inside


def nose_voxels(n: int, side: int) -> torch.Tensor:
    """Mask [N, N, N] of a side's nose."""
    return _within(side_axes(n, side), _NOSE)


def _painted(n: int, side: int, shown: Side) -> list[tuple[torch.Tensor, tuple[float, float, float]]]:
    """Masks [N, N, N] and colours of what a side shows on its floor."""
    across, up, towards = side_axes(n, side)
    floor = (towards - FLOOR).abs() < 0.5
    marks = []
    if shown.nose is not None:
        marks += [(floor & _within((across, up), eye), _DARK) for eye in _EYES]
        marks.append((nose_voxels(n, side), COLOURS[shown.nose]))
    if shown.emblem is not None:
        name, colour = shown.emblem
        marks.append((floor & _EMBLEMS[name](across, up), COLOURS[colour]))
    return marks


def emblem_points(prompt: Prompt, side: int, n: int = RESOLUTION) -> tuple[torch.Tensor, torch.Tensor]:
    """World points [P, 3] of a side's floor at which a prompt's two emblems differ, and the colours [2, P, 3]
    that they have there.
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
    return torch.logit(torch.tensor(colour))[:, None]  # [3, 1]


@torch.no_grad()
def build(
    prompt: Prompt, shares: torch.Tensor, n: int = RESOLUTION, solid: float = SOLID, empty: float = EMPTY
) -> Voxels:
    """Objects [A] of a prompt whose sides lie between their second mode (share 0) and their first (1).

    Args: shares [A, 4] in 0..1; solid, empty: `Voxels.shape` of matter and of nothing.
    """
    voxels = Voxels(len(shares), n).requires_grad_(False)
    body = _within(_coordinates(n), [_BODY] * 3)
    for side in range(SIDES):
        across, up, towards = side_axes(n, side)
        body &= ~(_within((across, up), (_RECESS, _RECESS)) & (towards > FLOOR + 0.5))
    voxels.shape.copy_(torch.where(body, solid, empty).expand_as(voxels.shape))
    voxels.paint.copy_(_logit(COLOURS[prompt.body]).view(3, 1, 1, 1).expand_as(voxels.paint))
    for side in range(SIDES):
        share = shares[:, side].to(voxels.shape)
        for mode, weight in ((1, 1 - share), (0, share)):
            for mask, colour in _painted(n, side, prompt.sides[mode]):
                there = voxels.paint[:, :, mask]  # [A, 3, voxels]
                voxels.paint[:, :, mask] = there + weight[:, None, None] * (
                    _logit(colour) - _logit(COLOURS[prompt.body])
                )
        if prompt.kind == "janus":
            voxels.shape[:, nose_voxels(n, side)] = (empty + share * (solid - empty))[:, None]
    return voxels


@functools.cache
def modes() -> torch.Tensor:
    """Latents [K, 4, R, R] of all modes in -1..1, two of each prompt in the order of `PROMPTS`: RGB and
    inverse depth of a side.
    """
    both = []
    for prompt in PROMPTS:
        made = build(prompt, torch.eye(2)[:, :1].expand(2, SIDES))
        both.append(four_views(made.raw, torch.sigmoid(made.paint), made.pitch)[0][:, 0])
    return torch.cat(both) * 2 - 1


def modes_of(texts: Sequence[str]) -> torch.Tensor:
    """Images [B, 2, 4, R, R] in 0..1 of the two modes of each of B prompts."""
    rows = torch.tensor([PROMPTS.index(prompt_of(text)) for text in texts], dtype=torch.long)
    return (modes().unflatten(0, (-1, 2))[rows] + 1) / 2


@torch.no_grad()
def start(texts: Sequence[str], generators: Sequence[torch.Generator], p: float = FACE_PROBABILITY) -> Voxels:
    """Voxels [A] to begin with, of A prompts with a generator each: whole bodies; each side of a head near
    the face with probability p, emblems half way between both. Raises: ValueError for an unknown prompt.
    """
    started = Voxels(len(texts), RESOLUTION)
    for i, (text, rng) in enumerate(zip(texts, generators, strict=True)):
        prompt = prompt_of(text)
        u = torch.rand(SIDES, generator=rng)
        v = torch.rand(SIDES, generator=rng)
        low, width = (torch.where(u < p, near, far) for near, far in zip(_NEAR, _FAR, strict=True))
        share = torch.lerp(low, width, v) if prompt.kind == "janus" else torch.full((SIDES,), 0.5)
        made = build(prompt, share[None], RESOLUTION, _STARTED_SOLID, _STARTED_EMPTY)
        for into, parameter in zip(started.parameters(), made.parameters(), strict=True):
            into[i] = parameter[0] + _START_NOISE * torch.randn(parameter.shape[1:], generator=rng)
    return started


# How many sides of a box head have a nose: the detector of the test problem. It reads surfaces, never what a
# reward reads. A share of "two or more" (the Janus ratio) alone calls it a success when every nose is gone:
# whoever reports, reports none, one and more. R rays.

_WINDOW = 0.25  # half-width of the part of a side that is searched, in sides of the cube: the recess
_STEP = 0.06  # least height over the floor, in sides of the cube: half of a nose's
_AREA = (0.06, 0.6)  # of the window, that a bump may cover
_FLOOR_QUANTILE = 0.3  # of heights in the window: the floor, under a nose that covers less than two thirds
RAYS = 32  # of a side, along each edge


@torch.no_grad()
def _heights(field: Field) -> torch.Tensor:
    """Heights [A, 4, R, R] of the outermost surface towards front, +x, back, -x, from the cube's middle, in
    sides of the cube; rows are y rising, columns to the camera's right; -1 where nothing is. From where the
    density crosses the level along each axis.
    """
    grid = SlabSpec.of(field.bounds, RAYS)
    solid = field.density_grid(grid) >= field.level  # [A, z, y, x]
    # [A, y, x, z], [A, y, z, x]
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
    """Sides with a nose [A] (0..4) of a field: with at least one connected bump of fitting height and area in
    the recess.
    """
    from scipy import ndimage

    heights = _heights(field)
    window = torch.linspace(-0.5, 0.5, RAYS).abs() <= _WINDOW
    inner = heights[:, :, window][:, :, :, window]  # [A, 4, w, w]
    floor = inner.flatten(2).quantile(_FLOOR_QUANTILE, dim=2)[:, :, None, None]
    raised = (inner > floor + _STEP).cpu().numpy()
    low, high = (share * inner[0, 0].numel() for share in _AREA)
    hits = np.zeros(heights.shape[:2], dtype=bool)
    for index in np.ndindex(hits.shape):
        labels, _ = ndimage.label(raised[index])
        areas = np.bincount(labels.ravel())[1:]
        hits[index] = ((areas >= low) & (areas <= high)).any()
    return torch.from_numpy(hits.sum(axis=1))
