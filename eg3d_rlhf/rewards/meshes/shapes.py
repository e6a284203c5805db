"""Shapes to learn from, each with one defect of a known severity: smooth heads with one nose, and the test problem's own objects.

| kind | what grows with the severity |
| --- | --- |
| noise | height of waves on the surface |
| holes | radius of a ball that is cut out |
| floaters | number and radius of balls beside the body; the test problem's objects have no room for them |
| second-nose | size of a further nose: at the back of a head, on the other sides of the test problem's objects |
| no-nose | how much of the nose is missing |

Letters: V vertices of a lattice.
"""

import math
from collections.abc import Callable

import torch

from eg3d_rlhf.generators.assets.voxels import GAIN
from eg3d_rlhf.rewards.boxes import FLOOR, PROMPTS, build, nose_voxels, side_axes
from eg3d_rlhf.rewards.meshes.meshing.lattice import Lattice

KINDS = {"heads": ("noise", "holes", "floaters", "second-nose"), "janus": ("second-nose", "no-nose", "noise", "holes")}  # of each source
BODIES = {"a round head": (1.0, 1.0, 1.0), "a tall head": (0.9, 1.25, 0.9), "a wide head": (1.2, 0.95, 1.0)}  # with prompts
_RADIUS, _BLEND, _WAVES = 0.27, 0.03, 12  # of a body, world units; rounding where parts meet, world units; waves of the noise
Source = Callable[[Lattice, str, float, torch.Generator], tuple[torch.Tensor, str]]


def head(lattice: Lattice, kind: str, severity: float, draw: torch.Generator) -> tuple[torch.Tensor, str]:
    """Level [V], negative inside, of a head with a defect of `severity` 0..1, turned by a random number of quarters; and its prompt."""
    u = torch.rand(8, generator=draw)
    prompt = list(BODIES)[int(u[0] * len(BODIES))]
    radii = _RADIUS * torch.tensor(BODIES[prompt]) * (0.9 + 0.2 * u[1])
    turn = int(u[2] * 4)
    points = lattice.vertices
    for _ in range(turn):
        points = torch.stack([points[:, 2], points[:, 1], -points[:, 0]], dim=1)
    level = ((points / radii).norm(dim=1) - 1) * radii.min()
    size, height = 0.085 + 0.03 * float(u[3]), 0.1 * float(u[4]) - 0.05
    own = size * (max(0.0, 1 - 1.6 * severity) if kind == "no-nose" else 1)
    noses = [(1, own)] + ([(-1, size * min(1.0, 1.6 * severity))] if kind == "second-nose" else [])
    for side, radius in noses:
        centre = torch.tensor([0.0, height, side * (float(radii[2]) + 0.4 * radius)])
        level = _joined(level, (points - centre).norm(dim=1) - radius)
    return _damaged(level, points, radii, kind, severity, draw), prompt


def _damaged(level: torch.Tensor, points: torch.Tensor, radii: torch.Tensor, kind: str, severity: float, draw: torch.Generator):
    if kind == "noise":
        return level + 0.07 * severity * waves(points, draw)
    if kind == "holes":
        return torch.maximum(level, 0.3 * severity - (points - radii * _direction(draw)).norm(dim=1))
    if kind == "floaters":
        for _ in range(round(4 * severity - 0.6)):
            away = (0.43 + 0.05 * float(torch.rand((), generator=draw))) * _direction(draw)
            radius = 0.04 + 0.05 * severity
            level = torch.minimum(level, (points - away.clamp(-0.49 + radius, 0.49 - radius)).norm(dim=1) - radius)
    return level


def waves(points: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
    """A sum of plane waves of wavelengths from a tenth to a fifth of the cube at points [V, 3], deviation 1."""
    along = torch.randn(_WAVES, 3, generator=draw)
    along = 2 * math.pi * (5 + 5 * torch.rand(_WAVES, 1, generator=draw)) * along / along.norm(dim=1, keepdim=True)
    phase = 2 * math.pi * torch.rand(_WAVES, generator=draw)
    return (points @ along.T + phase).cos().sum(dim=1) / math.sqrt(_WAVES / 2)


def _direction(draw: torch.Generator) -> torch.Tensor:
    """A direction [3] away from the noses."""
    x = torch.randn(3, generator=draw) * torch.tensor([1.0, 1.0, 0.4])
    return x / x.norm()


def _joined(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Union of two levels, rounded where they meet."""
    return -_BLEND * torch.logaddexp(-a / _BLEND, -b / _BLEND)


def janus(lattice: Lattice, kind: str, severity: float, draw: torch.Generator) -> tuple[torch.Tensor, str]:
    """Level [V] of an object of the test problem's mini-Janus, finished or half made, with a defect of `severity` 0..1; and its prompt.

    One side has a nose. Half of the objects have noses that are there in part as at the start of a run, where one whose share is below .4
    to .45 is not on the surface; those of the others are whole but lower, so that a reward has a slope at every height.
    """
    u = torch.rand(14, generator=draw)
    prompts = [prompt for prompt in PROMPTS if prompt.kind == "janus"]
    prompt, order = prompts[int(u[0] * len(prompts))], torch.randperm(4, generator=draw)
    low = bool(u[12] < 0.5)
    share = (0.15 if low else 0.3) * u[1:5]
    share[order[0]] = max(0.0, 1 - (1.1 if low else 1.6) * severity) if kind == "no-nose" else 0.75 + 0.25 * u[5]
    if kind == "second-nose":
        share[order[1 : 2 + int(3 * u[6])]] = min(1.0, 1.1 * severity if low else 0.2 + 0.9 * severity)
    solid, empty = 1.2 + 1.8 * float(u[7]), -1 - float(u[8])
    made = build(prompt, share[None], solid=solid, empty=empty)
    for side in range(4 if low else 0):
        nose, above = nose_voxels(made.resolution, side), side_axes(made.resolution, side)[2] - FLOOR  # 1 and 2 voxels
        inside = (3 * share[side] - above[nose]).clamp(-1, 1)
        made.shape[0, nose] = torch.where(inside > 0, solid * inside, -empty * inside)
    rough = 0.05 + (1.2 * severity if kind == "noise" else 0.15 * float(u[9]))
    made.shape.add_(rough * torch.randn(made.shape.shape, generator=draw))
    level = (made.level - made.density(lattice.vertices)[0]) / GAIN
    if kind == "holes":
        x = torch.randn(3, generator=draw)
        level = torch.maximum(level, (0.3 * severity - (lattice.vertices - 0.43 * x / x.abs().max()).norm(dim=1)) / made.pitch)
    return level, prompt.text


SOURCES: dict[str, Source] = {"heads": head, "janus": janus}
