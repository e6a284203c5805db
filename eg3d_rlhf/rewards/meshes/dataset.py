"""Meshes with unpaired labels: generated with known defects, or read from files of the user.

A generated shape of severity s has the score 5 - 4 s. As everywhere with unpaired labels, shapes with a score
of 4.0 or more are preferred, those with 3.5 or less are not, and those in between are not used.

| defect | quantity that increases with the severity |
| --- | --- |
| noise | height of waves on the surface |
| holes | radius of a ball that is cut out |
| floaters | number and radius of balls beside the body; the test problem's objects leave no space for them |
| second-nose | size of an additional nose: at the back of a head, or on other sides of the test problem's
objects | | no-nose | missing part of the nose |

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
from eg3d_rlhf.rewards.meshes.patches import PatchOptions, concatenate, patches_of
from eg3d_rlhf.rewards.meshes.surfaces import Lattice, closed_level, cube, net_mesh, signed_volume
from training.phases import derive_seed

# Generated training shapes, each with one defect of a known severity: smooth heads with one nose, and the
# objects of the test problem.

# Defects of each source
KINDS = {
    "heads": ("noise", "holes", "floaters", "second-nose"),
    "janus": ("second-nose", "no-nose", "noise", "holes"),
}
# Radii of a head along x, y, z, relative to _RADIUS, by prompt
BODIES = {"a round head": (1.0, 1.0, 1.0), "a tall head": (0.9, 1.25, 0.9), "a wide head": (1.2, 0.95, 1.0)}
_RADIUS = 0.27  # of a body, world units
_BLEND = 0.03  # width of the rounding where parts meet, world units
_WAVES = 12  # number of plane waves in the noise
# (lattice, kind, severity, random generator) -> level [V], prompt
Source = Callable[[Lattice, str, float, torch.Generator], tuple[torch.Tensor, str]]


def head(lattice: Lattice, kind: str, severity: float, rng: torch.Generator) -> tuple[torch.Tensor, str]:
    """Generate a head with a defect of `severity` 0..1, rotated by a random number of quarter turns.

    Returns: the level [V], negative inside, and the head's prompt.
    """
    # All random numbers of the head are taken at once, so that they do not depend on the kind of defect.
    u = torch.rand(8, generator=rng)
    # u < 1, so the index is valid.
    prompt = list(BODIES)[int(u[0] * len(BODIES))]
    radii = _RADIUS * torch.tensor(BODIES[prompt]) * (0.9 + 0.2 * u[1])
    turn = int(u[2] * 4)
    points = lattice.vertices
    # The lattice's points are rotated, which rotates the head in the opposite direction.
    for _ in range(turn):
        points = torch.stack([points[:, 2], points[:, 1], -points[:, 0]], dim=1)
    # About the signed distance to an ellipsoid, exact for a sphere.
    level = ((points / radii).norm(dim=1) - 1) * radii.min()
    size = 0.085 + 0.03 * float(u[3])
    height = 0.1 * float(u[4]) - 0.05
    # The nose disappears at a severity of 1 / 1.6.
    radius_in_front = size * (max(0.0, 1 - 1.6 * severity) if kind == "no-nose" else 1)
    noses = [(1, radius_in_front)] + (
        [(-1, size * min(1.0, 1.6 * severity))] if kind == "second-nose" else []
    )
    for side, radius in noses:
        centre = torch.tensor([0.0, height, side * (float(radii[2]) + 0.4 * radius)])
        level = _joined(level, (points - centre).norm(dim=1) - radius)
    return _damaged(level, points, radii, kind, severity, rng), prompt


def _damaged(
    level: torch.Tensor,
    points: torch.Tensor,
    radii: torch.Tensor,
    kind: str,
    severity: float,
    rng: torch.Generator,
):
    """Add noise, holes or floaters to a level [V]; the other kinds of defects leave it unchanged."""
    if kind == "noise":
        return level + 0.07 * severity * waves(points, rng)
    if kind == "holes":
        return torch.maximum(level, 0.3 * severity - (points - radii * _direction(rng)).norm(dim=1))
    if kind == "floaters":
        for _ in range(round(4 * severity - 0.6)):
            offset = (0.43 + 0.05 * float(torch.rand((), generator=rng))) * _direction(rng)
            radius = 0.04 + 0.05 * severity
            # The clamp keeps a floater inside the cube.
            level = torch.minimum(
                level, (points - offset.clamp(-0.49 + radius, 0.49 - radius)).norm(dim=1) - radius
            )
    return level


def waves(points: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Sum plane waves at points [V, 3], with wavelengths from a tenth to a fifth of the cube.

    Returns [V] with a standard deviation of 1.
    """
    along = torch.randn(_WAVES, 3, generator=rng)
    along = (
        2 * math.pi * (5 + 5 * torch.rand(_WAVES, 1, generator=rng)) * along / along.norm(dim=1, keepdim=True)
    )
    phase = 2 * math.pi * torch.rand(_WAVES, generator=rng)
    # A cosine has a variance of 1/2.
    return (points @ along.T + phase).cos().sum(dim=1) / math.sqrt(_WAVES / 2)


def _direction(rng: torch.Generator) -> torch.Tensor:
    """Return a random direction [3] that tends to point away from the noses, which lie along z."""
    x = torch.randn(3, generator=rng) * torch.tensor([1.0, 1.0, 0.4])
    return x / x.norm()


def _joined(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return the union of two levels, rounded where they meet (soft minimum)."""
    return -_BLEND * torch.logaddexp(-a / _BLEND, -b / _BLEND)


def janus(lattice: Lattice, kind: str, severity: float, rng: torch.Generator) -> tuple[torch.Tensor, str]:
    """Generate an object of the test problem's mini-Janus, finished or incomplete, with a defect of
    `severity` 0..1.

    One side has a nose. Half of the objects have partial noses, as at the start of a run, where a nose with a
    share below .4 to .45 does not reach the surface. The noses of the other half are complete, but lower, so
    that a reward has a gradient at every height.
    Returns: the level [V], negative inside, and the prompt.
    """
    u = torch.rand(14, generator=rng)
    prompts = [prompt for prompt in PROMPTS if prompt.kind == "janus"]
    prompt = prompts[int(u[0] * len(prompts))]
    order = torch.randperm(4, generator=rng)  # order[0] is the side with the nose
    low = bool(u[12] < 0.5)  # complete but low noses
    share = (0.15 if low else 0.3) * u[1:5]
    # The side with a nose: complete, or reduced by the severity of no-nose.
    share[order[0]] = (
        max(0.0, 1 - (1.1 if low else 1.6) * severity) if kind == "no-nose" else 0.75 + 0.25 * u[5]
    )
    if kind == "second-nose":
        share[order[1 : 2 + int(3 * u[6])]] = min(1.0, 1.1 * severity if low else 0.2 + 0.9 * severity)
    solid = 1.2 + 1.8 * float(u[7])
    empty = -1 - float(u[8])
    # [None]: one object
    objects = build(prompt, share[None], solid=solid, empty=empty)
    # A low nose is filled from its base up to 3 * share voxels; the partial voxel gets a value in between.
    for side in range(4 if low else 0):
        # Height above the base of the recess: 1 and 2 voxels
        nose = nose_voxels(objects.resolution, side)
        above = side_axes(objects.resolution, side)[2] - FLOOR
        inside = (3 * share[side] - above[nose]).clamp(-1, 1)
        objects.shape[0, nose] = torch.where(inside > 0, solid * inside, -empty * inside)
    rough = 0.05 + (1.2 * severity if kind == "noise" else 0.15 * float(u[9]))
    # Every object has some noise; those with the defect `noise` have more.
    objects.shape.add_(rough * torch.randn(objects.shape.shape, generator=rng))
    level = (objects.level - objects.density(lattice.vertices)[0]) / GAIN
    if kind == "holes":
        # A hole in one of the six sides of the box
        x = torch.randn(3, generator=rng)
        level = torch.maximum(
            level,
            (0.3 * severity - (lattice.vertices - 0.43 * x / x.abs().max()).norm(dim=1)) / objects.pitch,
        )
    return level, prompt.text


SOURCES: dict[str, Source] = {"heads": head, "janus": janus}


FALL = 4.0  # decrease of the score from a perfect shape to one of severity 1
BETWEEN = 20  # one shape in 20 lies between the thresholds, so that it has no preference
OnShape = Callable[[int], object] | None  # called with the number of finished shapes


@dataclass(frozen=True, kw_only=True)
class MeshSet:
    """Meshes as patches, with their labels. Label i belongs to row i, and its seed is i."""

    patches: Patches  # [N, P, F, ...]
    labels: tuple[UnpairedPreference, ...]
    prompts: tuple[str, ...]
    kinds: tuple[str, ...]  # defect of each mesh; '' if it is not known

    def split(
        self, held_out: float, seed: int = 0
    ) -> tuple[list[UnpairedPreference], list[UnpairedPreference]]:
        """Split usable labels into training and held-out ones, separately for both kinds of labels.

        Args: held_out: share of the held-out ones, 0..1.
        Raises: ValueError if a part has fewer than two labels of a kind.
        """
        # Without pairs, all labels are split by their fractions, and nothing is dropped.
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
                    f"meshes: expected at least 2 preferred and 2 other meshes in each part, got {kinds}"
                    f" ({name}). Label more meshes."
                )
        return list(parts["train"]), list(parts["test"])

    def select(self, labels: Sequence[UnpairedPreference]) -> tuple[Patches, list[str]]:
        """Return the patches and prompts that belong to labels."""
        # A label's seed is the row of its mesh.
        rows = torch.tensor([label.seed for label in labels])
        return Patches(*(part[rows] for part in self.patches)), [self.prompts[label.seed] for label in labels]


def severity_of(index: int, u: float) -> float:
    """Return the severity of shape `index`, from a random number u in 0..1.

    Preferred and other shapes alternate, and one in BETWEEN lies between the thresholds.
    """
    # Severities of the two thresholds, from score = 5 - FALL * severity
    good, bad = ((5 - score) / FALL for score in (GOOD, BAD))
    if index % BETWEEN == BETWEEN - 1:
        return good + (bad - good) * (0.1 + 0.8 * u)
    return good * u if index % 2 == 0 else bad + (1 - bad) * u


def generate_meshes(
    source: str, count: int, options: PatchOptions, resolution: int, seed: int = 0, on_shape: OnShape = None
) -> MeshSet:
    """Generate `count` meshes of one of SOURCES, on a lattice of `resolution` cells per edge.

    Shape i depends only on the seed and i.
    """
    # All shapes share one lattice.
    lattice = cube(resolution)
    patches = []
    labels = list[UnpairedPreference]()
    prompts = list[str]()
    kinds = list[str]()
    known = KINDS[source]
    for i in range(count):
        rng = torch.Generator().manual_seed(derive_seed(seed, "mesh", source, i))
        kind = known[i // 2 % len(known)]  # i // 2, since preferred and other shapes alternate
        severity = severity_of(i, float(torch.rand((), generator=rng)))
        level, prompt = SOURCES[source](lattice, kind, severity, rng)
        patches.append(patches_of([net_mesh(closed_level(level, lattice), lattice)], options))
        labels.append(UnpairedPreference(seed=i, score=SCALE - FALL * severity))
        prompts.append(prompt)
        kinds.append(kind)
        if on_shape is not None:
            on_shape(1)
    return MeshSet(
        patches=concatenate(patches), labels=tuple(labels), prompts=tuple(prompts), kinds=tuple(kinds)
    )


def read(path: Path, options: PatchOptions, on_shape: OnShape = None) -> MeshSet:
    """Read the meshes that a .jsonl file lists.

    A line is {"mesh": "chair.glb", "prompt": "a chair", "score": 4.5}, or has "label": 1 or 0 in place of the
    score. Paths are relative to the file.
    Raises: FileNotFoundError; ValueError that names the line.
    """
    if not path.is_file():
        raise FileNotFoundError(f"--data: expected a .jsonl file, found none at {path}. Check the path.")
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
            f"--data: {path.name}: expected at least one mesh, got an empty file. Add meshes to the file."
        )
    return MeshSet(
        patches=concatenate(patches), labels=tuple(labels), prompts=tuple(prompts), kinds=("",) * len(labels)
    )


def _label(number: int, record: Mapping) -> UnpairedPreference:
    """Create the label of mesh `number` from a line's record."""
    score = record.get("score")
    label = record.get("label")
    if label not in (None, 0, 1) or isinstance(score, (str, bool, list, dict)):
        got = label if score is None else score
        raise ValueError(
            f"expected a score from 0 to {SCALE:g}, or a label of 1 or 0, got {got!r}. Correct the line."
        )
    return UnpairedPreference(
        seed=number,
        score=None if score is None else float(score),
        label=None if label is None else bool(label),
    )


def load_mesh(path: Path) -> Mesh:
    """Read a triangle mesh of any format that `read_triangles` supports, with all of its parts.

    If the volume is negative, the faces are flipped, so that they point outwards.
    """
    if not path.is_file():
        raise FileNotFoundError(f"expected a mesh, found none at {path}. Check the path.")
    try:
        vertices, faces = read_triangles(path)
    except ValueError as error:
        raise ValueError(f"{error} in {path.name}. Convert it to .glb, .ply or .obj.") from error
    if not len(faces) or not np.isfinite(vertices).all():
        raise ValueError(
            f"expected finite triangles, got {len(faces)} faces in {path.name}. Export the surface as"
            " triangles."
        )
    # float32 as generated meshes have
    mesh = Mesh(torch.from_numpy(vertices.astype(np.float32)), torch.from_numpy(faces))
    return mesh if float(signed_volume(mesh)) >= 0 else Mesh(mesh.vertices, mesh.faces.flip(1))


def randomised_labels(labels: Sequence[UnpairedPreference], seed: int) -> list[UnpairedPreference]:
    """Permute scores and labels at random over the shapes, as a control."""
    # A stream of its own, so that the order of batches is not changed.
    order = np.random.default_rng([seed, 3]).permutation(len(labels))
    return [
        replace(label, score=labels[i].score, label=labels[i].label)
        for label, i in zip(labels, order, strict=True)
    ]


def rotated(patches: Patches, quarters: torch.Tensor, mirrored: torch.Tensor) -> Patches:
    """Rotate meshes by quarter turns [N] about the upward axis through the origin, and then mirror some in x.

    Args: mirrored: [N] bool, the meshes that are mirrored.
    """
    # Rotation and mirroring exchange x and z or change their signs, which is exact.
    flip_x = ((quarters == 2) | (quarters == 3)) ^ mirrored
    flip_z = (quarters == 1) | (quarters == 2)
    swap = (quarters % 2 == 1).view(-1, 1, 1)
    # [N, 1, 1, 3]
    sign = torch.stack([1 - 2.0 * flip_x, torch.ones(len(quarters)), 1 - 2.0 * flip_z], dim=1)[:, None, None]

    def moved(x: torch.Tensor) -> torch.Tensor:
        a, b, c = x.unbind(-1)
        return torch.stack([torch.where(swap, c, a), b, torch.where(swap, a, c)], dim=-1) * sign

    # Numbers 1-3 are the normal; the other numbers do not depend on the orientation.
    features = torch.cat(
        [patches.features[..., :1], moved(patches.features[..., 1:4]), patches.features[..., 4:]], dim=-1
    )
    return Patches(features, moved(patches.centres), patches.mask)


def with_permuted_faces(patches: Patches, rng: torch.Generator) -> Patches:
    """Permute the faces of every patch at random. Otherwise the encoder would memorise their order."""
    order = torch.rand(patches.features.shape[:3], generator=rng).argsort(dim=2)[..., None]
    features, centres = (
        part.gather(2, order.expand(-1, -1, -1, part.shape[3]))
        for part in (patches.features, patches.centres)
    )
    return Patches(features, centres, patches.mask)


def area_only(patches: Patches) -> Patches:
    """Remove shape and position from patches, as a control that must not detect a second nose."""
    area = patches.features[..., :1]
    others = patches.features[..., 1:]
    return Patches(
        torch.cat([area, torch.zeros_like(others)], dim=-1), torch.zeros_like(patches.centres), patches.mask
    )
