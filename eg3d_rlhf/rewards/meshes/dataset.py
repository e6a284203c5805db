"""Meshes with unpaired labels: drawn with known defects, or files of the user's.

A drawn shape of severity s has the score 5 - 4 s. As everywhere with unpaired labels, scores from 4.0 on are
preferred, those up to 3.5 are not, and what lies between is left out.

| defect | what grows with the severity |
| --- | --- |
| noise | height of waves on the surface |
| holes | radius of a ball that is cut out |
| floaters | number and radius of balls beside the body; the test problem's objects have no room for them |
| second-nose | size of a further nose: at the back of a head, on other sides of the test problem's objects |
| no-nose | how much of the nose is missing |

Letters: N meshes, P patches, F faces of a patch, V vertices of a lattice.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from eg3d_rlhf.core.interfaces import Mesh, Patches
from eg3d_rlhf.generators.assets.grids import GAIN
from eg3d_rlhf.geometry.files.triangles import read_triangles
from eg3d_rlhf.preferences import BAD, GOOD
from eg3d_rlhf.preferences.dataset import Splits
from eg3d_rlhf.preferences.labels import jsonl_records
from eg3d_rlhf.preferences.unpaired import SCALE, UnpairedPreference, split_unpaired
from eg3d_rlhf.rewards.box_prompts import PROMPTS
from eg3d_rlhf.rewards.boxes import FLOOR, build, nose_voxels, side_axes
from eg3d_rlhf.rewards.meshes.patches import PatchOptions, patches_of, stacked
from eg3d_rlhf.rewards.meshes.surfaces import Lattice, closed_level, cube, net_mesh, signed_volume
from training.phases import derive_seed

# Shapes to learn from, each with one defect of a known severity: smooth heads with one nose, and the test
# problem's own objects.

# of each source
KINDS = {
    "heads": ("noise", "holes", "floaters", "second-nose"),
    "janus": ("second-nose", "no-nose", "noise", "holes"),
}
# with prompts
BODIES = {"a round head": (1.0, 1.0, 1.0), "a tall head": (0.9, 1.25, 0.9), "a wide head": (1.2, 0.95, 1.0)}
# of a body, world units; rounding where parts meet, world units; waves of the noise
_RADIUS = 0.27
_BLEND = 0.03
_WAVES = 12
Source = Callable[[Lattice, str, float, torch.Generator], tuple[torch.Tensor, str]]


def head(lattice: Lattice, kind: str, severity: float, draw: torch.Generator) -> tuple[torch.Tensor, str]:
    """Level [V], negative inside, of a head with a defect of `severity` 0..1, turned by a random number of
    quarters; and its prompt.
    """
    u = torch.rand(8, generator=draw)
    prompt = list(BODIES)[int(u[0] * len(BODIES))]
    radii = _RADIUS * torch.tensor(BODIES[prompt]) * (0.9 + 0.2 * u[1])
    turn = int(u[2] * 4)
    points = lattice.vertices
    for _ in range(turn):
        points = torch.stack([points[:, 2], points[:, 1], -points[:, 0]], dim=1)
    level = ((points / radii).norm(dim=1) - 1) * radii.min()
    size = 0.085 + 0.03 * float(u[3])
    height = 0.1 * float(u[4]) - 0.05
    radius_in_front = size * (max(0.0, 1 - 1.6 * severity) if kind == "no-nose" else 1)
    noses = [(1, radius_in_front)] + (
        [(-1, size * min(1.0, 1.6 * severity))] if kind == "second-nose" else []
    )
    for side, radius in noses:
        centre = torch.tensor([0.0, height, side * (float(radii[2]) + 0.4 * radius)])
        level = _joined(level, (points - centre).norm(dim=1) - radius)
    return _damaged(level, points, radii, kind, severity, draw), prompt


def _damaged(
    level: torch.Tensor,
    points: torch.Tensor,
    radii: torch.Tensor,
    kind: str,
    severity: float,
    draw: torch.Generator,
):
    if kind == "noise":
        return level + 0.07 * severity * waves(points, draw)
    if kind == "holes":
        return torch.maximum(level, 0.3 * severity - (points - radii * _direction(draw)).norm(dim=1))
    if kind == "floaters":
        for _ in range(round(4 * severity - 0.6)):
            away = (0.43 + 0.05 * float(torch.rand((), generator=draw))) * _direction(draw)
            radius = 0.04 + 0.05 * severity
            level = torch.minimum(
                level, (points - away.clamp(-0.49 + radius, 0.49 - radius)).norm(dim=1) - radius
            )
    return level


def waves(points: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
    """A sum of plane waves of wavelengths from a tenth to a fifth of the cube at points
    [V, 3], deviation 1.
    """
    along = torch.randn(_WAVES, 3, generator=draw)
    along = (
        2
        * math.pi
        * (5 + 5 * torch.rand(_WAVES, 1, generator=draw))
        * along
        / along.norm(dim=1, keepdim=True)
    )
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
    """Level [V] of an object of the test problem's mini-Janus, finished or half made, with a defect of
    `severity` 0..1; and its prompt.

    One side has a nose. Half of the objects have noses that are there in part as at the start of a run, where
    one whose share is below .4 to .45 is not on the surface; those of the others are whole but lower, so that
    a reward has a slope at every height.
    """
    u = torch.rand(14, generator=draw)
    prompts = [prompt for prompt in PROMPTS if prompt.kind == "janus"]
    prompt = prompts[int(u[0] * len(prompts))]
    order = torch.randperm(4, generator=draw)
    low = bool(u[12] < 0.5)
    share = (0.15 if low else 0.3) * u[1:5]
    share[order[0]] = (
        max(0.0, 1 - (1.1 if low else 1.6) * severity) if kind == "no-nose" else 0.75 + 0.25 * u[5]
    )
    if kind == "second-nose":
        share[order[1 : 2 + int(3 * u[6])]] = min(1.0, 1.1 * severity if low else 0.2 + 0.9 * severity)
    solid = 1.2 + 1.8 * float(u[7])
    empty = -1 - float(u[8])
    made = build(prompt, share[None], solid=solid, empty=empty)
    for side in range(4 if low else 0):
        # 1 and 2 voxels
        nose = nose_voxels(made.resolution, side)
        above = side_axes(made.resolution, side)[2] - FLOOR
        inside = (3 * share[side] - above[nose]).clamp(-1, 1)
        made.shape[0, nose] = torch.where(inside > 0, solid * inside, -empty * inside)
    rough = 0.05 + (1.2 * severity if kind == "noise" else 0.15 * float(u[9]))
    made.shape.add_(rough * torch.randn(made.shape.shape, generator=draw))
    level = (made.level - made.density(lattice.vertices)[0]) / GAIN
    if kind == "holes":
        x = torch.randn(3, generator=draw)
        level = torch.maximum(
            level, (0.3 * severity - (lattice.vertices - 0.43 * x / x.abs().max()).norm(dim=1)) / made.pitch
        )
    return level, prompt.text


SOURCES: dict[str, Source] = {"heads": head, "janus": janus}


FALL = 4.0  # of the score from a perfect shape to one of severity 1
BETWEEN = 20  # every so-many-th shape lies between the thresholds
OnShape = Callable[[int], object] | None


@dataclass(frozen=True, kw_only=True)
class MeshSet:
    """Meshes as patches, with their labels: label i is of row i, and its seed is i."""

    patches: Patches  # [N, P, F, ...]
    labels: tuple[UnpairedPreference, ...]
    prompts: tuple[str, ...]
    kinds: tuple[str, ...]  # of the defect; '' where it is not known

    def split(
        self, held_out: float, seed: int = 0
    ) -> tuple[list[UnpairedPreference], list[UnpairedPreference]]:
        """Usable labels to learn from and held-out ones, each kind of label by itself.

        Raises: ValueError where a part lacks a kind.
        """
        parts = split_unpaired(
            self.labels,
            Splits(train=(), val=(), test=(), dropped=0, ties=0),
            (1 - held_out, 0.0, held_out),
            seed,
        )
        for name in ("train", "test"):
            kinds = [sum(label.preferred is kind for label in parts[name]) for kind in (True, False)]
            if min(kinds) < 2:
                raise ValueError(
                    f"meshes: expected at least 2 of both kinds in each part, got {kinds} ({name}). Label"
                    " more meshes."
                )
        return list(parts["train"]), list(parts["test"])

    def of(self, labels: Sequence[UnpairedPreference]) -> tuple[Patches, list[str]]:
        """Patches and prompts of labels."""
        rows = torch.tensor([label.seed for label in labels])
        return Patches(*(part[rows] for part in self.patches)), [self.prompts[label.seed] for label in labels]


def severity_of(index: int, u: float) -> float:
    """Severity of shape `index`: preferred and other ones in turn, and one in BETWEEN that is neither.

    Args: u in 0..1.
    """
    good, bad = ((5 - score) / FALL for score in (GOOD, BAD))
    if index % BETWEEN == BETWEEN - 1:
        return good + (bad - good) * (0.1 + 0.8 * u)
    return good * u if index % 2 == 0 else bad + (1 - bad) * u


def drawn(
    source: str, count: int, options: PatchOptions, resolution: int, seed: int = 0, on_shape: OnShape = None
) -> MeshSet:
    """`count` meshes of a source of SOURCES, on a lattice of `resolution` cells per edge. Shape i depends on
    seed and i alone.
    """
    lattice = cube(resolution)
    patches = []
    labels = list[UnpairedPreference]()
    prompts = list[str]()
    kinds = list[str]()
    known = KINDS[source]
    for i in range(count):
        draw = torch.Generator().manual_seed(derive_seed(seed, "mesh", source, i))
        kind = known[i // 2 % len(known)]
        severity = severity_of(i, float(torch.rand((), generator=draw)))
        level, prompt = SOURCES[source](lattice, kind, severity, draw)
        patches.append(patches_of([net_mesh(closed_level(level, lattice), lattice)], options))
        labels.append(UnpairedPreference(seed=i, score=SCALE - FALL * severity))
        prompts.append(prompt)
        kinds.append(kind)
        if on_shape is not None:
            on_shape(1)
    return MeshSet(patches=stacked(patches), labels=tuple(labels), prompts=tuple(prompts), kinds=tuple(kinds))


def read(path: Path, options: PatchOptions, on_shape: OnShape = None) -> MeshSet:
    """Meshes of a .jsonl file, a line each: {"mesh": "chair.glb", "prompt": "a chair", "score": 4.5}, or
    "label": 1 or 0 for the score.

    Paths are relative to the file. Raises: FileNotFoundError; ValueError with the line.
    """
    if not path.is_file():
        raise FileNotFoundError(f"--data: expected a .jsonl file, got nothing at {path}. Check the path.")
    patches = []
    labels = list[UnpairedPreference]()
    prompts = list[str]()
    for line, record in jsonl_records(path, "{'mesh': ..., 'prompt': ..., 'score': ...}"):
        try:
            labels.append(_label(len(labels), record))
            prompts.append(str(record.get("prompt", "")))
            patches.append(patches_of([load_mesh(path.parent / str(record.get("mesh", "")))], options))
        except (ValueError, OSError) as error:
            raise ValueError(f"--data: {path.name}, line {line}: {error}") from error
        if on_shape is not None:
            on_shape(1)
    if not patches:
        raise ValueError(
            f"--data: {path.name}: expected at least one mesh, got an empty file. Label some meshes."
        )
    return MeshSet(
        patches=stacked(patches), labels=tuple(labels), prompts=tuple(prompts), kinds=("",) * len(labels)
    )


def _label(number: int, record: Mapping) -> UnpairedPreference:
    score = record.get("score")
    label = record.get("label")
    if label not in (None, 0, 1) or isinstance(score, (str, bool, list, dict)):
        got = label if score is None else score
        raise ValueError(
            f"expected a score from 0 to {SCALE:g}, or a label of 1 or 0, got {got!r}. Correct it."
        )
    return UnpairedPreference(
        seed=number,
        score=None if score is None else float(score),
        label=None if label is None else bool(label),
    )


def load_mesh(path: Path) -> Mesh:
    """A triangle mesh of any format that `read_triangles` knows, its parts together; turned inside out where
    its volume is negative.
    """
    if not path.is_file():
        raise FileNotFoundError(f"expected a mesh, got nothing at {path}. Check the path.")
    try:
        vertices, faces = read_triangles(path)
    except ValueError as error:
        raise ValueError(f"{error} in {path.name}. Convert it to .glb, .ply or .obj.") from error
    if not len(faces) or not np.isfinite(vertices).all():
        raise ValueError(
            f"expected finite triangles, got {len(faces)} in {path.name}. Export the surface as triangles."
        )
    mesh = Mesh(torch.from_numpy(vertices.astype(np.float32)), torch.from_numpy(faces))
    return mesh if float(signed_volume(mesh)) >= 0 else Mesh(mesh.vertices, mesh.faces.flip(1))


def shuffled(labels: Sequence[UnpairedPreference], seed: int) -> list[UnpairedPreference]:
    """The labels, their verdicts dealt anew: a control."""
    order = np.random.default_rng([seed, 3]).permutation(len(labels))
    return [
        replace(label, score=labels[i].score, label=labels[i].label)
        for label, i in zip(labels, order, strict=True)
    ]


def turned(patches: Patches, quarters: torch.Tensor, mirrored: torch.Tensor) -> Patches:
    """Meshes turned by quarters [N] about the upward axis through the origin, and then mirrored in x where
    mirrored [N] says so.
    """
    flip_x = ((quarters == 2) | (quarters == 3)) ^ mirrored
    flip_z = (quarters == 1) | (quarters == 2)
    swap = (quarters % 2 == 1).view(-1, 1, 1)
    # [N, 1, 1, 3]
    sign = torch.stack([1 - 2.0 * flip_x, torch.ones(len(quarters)), 1 - 2.0 * flip_z], dim=1)[:, None, None]

    def moved(x: torch.Tensor) -> torch.Tensor:
        a, b, c = x.unbind(-1)
        return torch.stack([torch.where(swap, c, a), b, torch.where(swap, a, c)], dim=-1) * sign

    features = torch.cat(
        [patches.features[..., :1], moved(patches.features[..., 1:4]), patches.features[..., 4:]], dim=-1
    )
    return Patches(features, moved(patches.centres), patches.mask)


def dealt(patches: Patches, draw: torch.Generator) -> Patches:
    """Meshes with the faces of every patch in a random order, which the encoder would otherwise learn by
    heart.
    """
    order = torch.rand(patches.features.shape[:3], generator=draw).argsort(dim=2)[..., None]
    features, centres = (
        part.gather(2, order.expand(-1, -1, -1, part.shape[3]))
        for part in (patches.features, patches.centres)
    )
    return Patches(features, centres, patches.mask)


def area_only(patches: Patches) -> Patches:
    """What is left of patches without shape and place: a control that must not see a second nose."""
    area = patches.features[..., :1]
    others = patches.features[..., 1:]
    return Patches(
        torch.cat([area, torch.zeros_like(others)], dim=-1), torch.zeros_like(patches.centres), patches.mask
    )
