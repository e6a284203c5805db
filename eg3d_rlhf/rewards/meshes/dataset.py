"""Labelled meshes, which are generated with known defects or read from files of the user.

A label belongs to a single mesh and states whether the mesh is preferred.

A generated mesh with a defect of severity s (0..1) has the score 5 - 4 s. Meshes with a score of 4.0 or more
are preferred, meshes with a score of 3.5 or less are not, and meshes between these thresholds are not used.

| defect | quantity that increases with the severity |
| --- | --- |
| noise | height of waves on the surface |
| holes | radius of a ball that is cut out |
| floaters | number and radius of balls beside the head; box heads leave no space for them |
| second-nose | size of an additional nose: at the back of a head, or on other sides of a box head |
| no-nose | missing part of the nose |

Shapes: N meshes, P patches, F faces of a patch, V vertices of a lattice. A level is a tensor [V] with one
number per vertex of the lattice, which is negative inside a shape.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from eg3d_rlhf.core.interfaces import Mesh, Patches
from eg3d_rlhf.generators.assets.grids import GAIN
from eg3d_rlhf.geometry.files.triangles import drop_unused, may_be_visible, read_triangles
from eg3d_rlhf.preferences import BAD, GOOD
from eg3d_rlhf.preferences.dataset import Splits
from eg3d_rlhf.preferences.labels import jsonl_records
from eg3d_rlhf.preferences.provenance import PEOPLE_ONLY, LabelChoice, check_not_empty
from eg3d_rlhf.preferences.unpaired import SCALE, UnpairedPreference, split_unpaired
from eg3d_rlhf.rewards.box_prompts import PROMPTS
from eg3d_rlhf.rewards.boxes import FLOOR, build, nose_voxels, side_axes
from eg3d_rlhf.rewards.meshes.patches import PatchOptions, compute_mesh_patches, concatenate
from eg3d_rlhf.rewards.meshes.surfaces import Lattice, closed_level, cube, net_mesh, signed_volume
from training.phases import derive_seed

# Generated training shapes, each with one defect of a known severity: smooth heads with one nose, and the box
# heads of the bundled test problem.

# Defects by source
KINDS = {
    "heads": ("noise", "holes", "floaters", "second-nose"),
    "janus": ("second-nose", "no-nose", "noise", "holes"),
}
# Radii of a head along x, y, z, relative to _RADIUS, by prompt
BODIES = {"a round head": (1.0, 1.0, 1.0), "a tall head": (0.9, 1.25, 0.9), "a wide head": (1.2, 0.95, 1.0)}
_RADIUS = 0.27  # mean radius of a head, world units
_BLEND = 0.03  # width of the rounding where nose and head meet, world units
_WAVES = 12  # number of plane waves in the noise
# Function that generates a shape: (lattice, kind of defect, severity, random numbers) -> level [V], prompt
Source = Callable[[Lattice, str, float, torch.Generator], tuple[torch.Tensor, str]]


def head(
    lattice: Lattice, defect_kind: str, severity: float, rng: torch.Generator
) -> tuple[torch.Tensor, str]:
    """Generate a smooth head with a defect, rotated about the upward axis by a random multiple of 90 degrees.

    Args:
        lattice: lattice at whose vertices the level is computed.
        defect_kind: kind of the defect, one of KINDS["heads"].
        severity: severity of the defect, 0..1.
        rng: random numbers of the shape.
    Returns: the level [V], negative inside, and the prompt of the head.
    """
    # Random numbers in [0, 1) of all properties are drawn at once, so that they do not depend on the defect.
    uniform_draws = torch.rand(8, generator=rng)
    prompt = list(BODIES)[int(uniform_draws[0] * len(BODIES))]
    radii = _RADIUS * torch.tensor(BODIES[prompt]) * (0.9 + 0.2 * uniform_draws[1])
    quarter_turns = int(uniform_draws[2] * 4)
    points = lattice.vertices
    # The points of the lattice are rotated, which rotates the head in the opposite direction.
    for _ in range(quarter_turns):
        points = torch.stack([points[:, 2], points[:, 1], -points[:, 0]], dim=1)
    # Approximately the signed distance to an ellipsoid; exact for a sphere.
    level = ((points / radii).norm(dim=1) - 1) * radii.min()
    nose_radius = 0.085 + 0.03 * float(uniform_draws[3])
    nose_height = 0.1 * float(uniform_draws[4]) - 0.05
    # For the defect "no-nose", the nose disappears at a severity of 1 / 1.6.
    front_radius = nose_radius * (max(0.0, 1 - 1.6 * severity) if defect_kind == "no-nose" else 1)
    # Sign of z (1 is the front, -1 the back) and radius of each nose
    noses = [(1, front_radius)]
    if defect_kind == "second-nose":
        noses.append((-1, nose_radius * min(1.0, 1.6 * severity)))
    for z_sign, radius in noses:
        centre = torch.tensor([0.0, nose_height, z_sign * (float(radii[2]) + 0.4 * radius)])
        level = _smooth_union(level, (points - centre).norm(dim=1) - radius)
    return _add_defect(level, points, radii, defect_kind, severity, rng), prompt


def _add_defect(
    level: torch.Tensor,
    points: torch.Tensor,
    radii: torch.Tensor,
    defect_kind: str,
    severity: float,
    rng: torch.Generator,
):
    """Add noise, holes or floaters to the level of a head. For all other defects return the level unchanged.

    Args:
        level: level of the head.
        points: points [V, 3] of the level, in the coordinates of the head.
        radii: radii [3] of the head along x, y, z.
        defect_kind: kind of the defect.
        severity: severity of the defect, 0..1.
        rng: random numbers of the shape.
    Returns: the level [V] with the defect.
    """
    if defect_kind == "noise":
        return level + 0.07 * severity * waves(points, rng)
    if defect_kind == "holes":
        # A ball of radius 0.3 * severity around a point of the surface is removed.
        hole_centre = radii * _random_direction(rng)
        return torch.maximum(level, 0.3 * severity - (points - hole_centre).norm(dim=1))
    if defect_kind == "floaters":
        for _ in range(round(4 * severity - 0.6)):
            distance = 0.43 + 0.05 * float(torch.rand((), generator=rng))
            centre = distance * _random_direction(rng)
            radius = 0.04 + 0.05 * severity
            # The clamp moves the floater inside the cube.
            centre = centre.clamp(-0.49 + radius, 0.49 - radius)
            level = torch.minimum(level, (points - centre).norm(dim=1) - radius)
    return level


def waves(points: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Compute noise [V] at points [V, 3]: a sum of random plane waves with a standard deviation of 1.

    The wavelengths are between a tenth and a fifth of the edge of the unit cube.
    """
    direction = torch.randn(_WAVES, 3, generator=rng)
    wave_vector = (
        2
        * math.pi
        * (5 + 5 * torch.rand(_WAVES, 1, generator=rng))
        * direction
        / direction.norm(dim=1, keepdim=True)
    )
    phase = 2 * math.pi * torch.rand(_WAVES, generator=rng)
    # A cosine with a random phase has a variance of 1/2.
    return (points @ wave_vector.T + phase).cos().sum(dim=1) / math.sqrt(_WAVES / 2)


def _random_direction(rng: torch.Generator) -> torch.Tensor:
    """Return a random vector [3] of length 1. Directions near the z axis, where noses lie, are unlikely."""
    direction = torch.randn(3, generator=rng) * torch.tensor([1.0, 1.0, 0.4])
    return direction / direction.norm()


def _smooth_union(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return the level [V] of the union of two shapes with the levels a, b [V], rounded where they meet.

    The result is a soft minimum of both levels.
    """
    return -_BLEND * torch.logaddexp(-a / _BLEND, -b / _BLEND)


def janus(
    lattice: Lattice, defect_kind: str, severity: float, rng: torch.Generator
) -> tuple[torch.Tensor, str]:
    """Generate a box head of the bundled test problem, finished or unfinished, with a defect.

    One side has a nose; with the defect "second-nose", one to three further sides have a nose as well. Half
    of the heads have partial noses, as at the start of an optimisation, where a nose with a share of the face
    below about 0.4 does not reach the surface. The noses of the other heads are complete but lower, so that a
    reward has a gradient at every height.

    Args:
        lattice: lattice at whose vertices the level is computed.
        defect_kind: kind of the defect, one of KINDS["janus"].
        severity: severity of the defect, 0..1.
        rng: random numbers of the shape.
    Returns: the level [V], negative inside, and the prompt of the head.
    """
    # Random numbers in [0, 1) of all properties are drawn at once, so that they do not depend on the defect.
    uniform_draws = torch.rand(14, generator=rng)
    prompts = [prompt for prompt in PROMPTS if prompt.kind == "janus"]
    prompt = prompts[int(uniform_draws[0] * len(prompts))]
    side_order = torch.randperm(4, generator=rng)  # side_order[0] is the side with the nose
    has_low_noses = bool(uniform_draws[12] < 0.5)
    # [4]: share of the face on each side, first small values on all sides
    face_shares = (0.15 if has_low_noses else 0.3) * uniform_draws[1:5]
    # The side with the nose: almost complete, or reduced by the severity of "no-nose"
    if defect_kind == "no-nose":
        face_shares[side_order[0]] = max(0.0, 1 - (1.1 if has_low_noses else 1.6) * severity)
    else:
        face_shares[side_order[0]] = 0.75 + 0.25 * uniform_draws[5]
    if defect_kind == "second-nose":
        # One to three further sides
        further_sides = side_order[1 : 2 + int(3 * uniform_draws[6])]
        face_shares[further_sides] = min(1.0, 1.1 * severity if has_low_noses else 0.2 + 0.9 * severity)
    solid = 1.2 + 1.8 * float(uniform_draws[7])
    empty = -1 - float(uniform_draws[8])
    # `build` takes shares [A, 4], and here A is 1.
    box_heads = build(prompt, face_shares[None], solid=solid, empty=empty)
    # A low nose is filled from the base up to a height of 3 * share voxels, and the voxel at the top gets a
    # value between solid and empty.
    for side in range(4 if has_low_noses else 0):
        is_nose = nose_voxels(box_heads.resolution, side)
        # The third coordinate of a side points towards its camera. [N, N, N], in voxels
        height_above_base = side_axes(box_heads.resolution, side)[2] - FLOOR
        fill_levels = (3 * face_shares[side] - height_above_base[is_nose]).clamp(-1, 1)
        box_heads.shape[0, is_nose] = torch.where(fill_levels > 0, solid * fill_levels, -empty * fill_levels)
    noise_std = 0.05 + (1.2 * severity if defect_kind == "noise" else 0.15 * float(uniform_draws[9]))
    # Every head has some noise, and heads with the defect "noise" have more.
    box_heads.shape.add_(noise_std * torch.randn(box_heads.shape.shape, generator=rng))
    level = (box_heads.level - box_heads.density(lattice.vertices)[0]) / GAIN
    if defect_kind == "holes":
        # The centre of the hole lies on one of the six faces of a cube with half edge 0.43.
        direction = torch.randn(3, generator=rng)
        hole_centre = 0.43 * direction / direction.abs().max()
        # Division by the distance between voxels converts to the unit of the level.
        hole_level = (0.3 * severity - (lattice.vertices - hole_centre).norm(dim=1)) / box_heads.pitch
        level = torch.maximum(level, hole_level)
    return level, prompt.text


SOURCES: dict[str, Source] = {"heads": head, "janus": janus}


FALL = 4.0  # difference of the scores of a shape without defect and a shape with a defect of severity 1
BETWEEN = 20  # one shape in 20 has a score between the thresholds and is neither preferred nor not preferred
OnShape = Callable[[int], object] | None  # function that is called with 1 after each shape


@dataclass(frozen=True, kw_only=True)
class MeshSet:
    """Meshes as patches, with their labels and prompts. The seed of a label is the index of its mesh."""

    patches: Patches  # patches [N, P, F, ...] of N meshes
    labels: tuple[UnpairedPreference, ...]  # label of each mesh
    prompts: tuple[str, ...]  # prompt of each mesh
    kinds: tuple[str, ...]  # kind of the defect of each mesh; '' for meshes of the user

    def split(
        self, held_out: float, seed: int = 0
    ) -> tuple[list[UnpairedPreference], list[UnpairedPreference]]:
        """Split the labels into training labels and held-out labels.

        Preferred and other meshes are split separately. Labels between the thresholds are not used.

        Args:
            held_out: share of the labels that are held out, 0..1.
            seed: random seed of the split.
        Returns: the training labels, and the held-out labels.
        Raises: ValueError if the training labels or the held-out labels contain fewer than two preferred or
            fewer than two other meshes.
        """
        # There are no pairs, so the labels are split by their shares alone.
        label_splits = split_unpaired(
            self.labels,
            Splits(train=(), val=(), test=(), dropped=0, ties=0),
            (1 - held_out, 0.0, held_out),
            seed,
        )
        for split_name in ("train", "test"):
            preferred_count = sum(label.preferred is True for label in label_splits[split_name])
            other_count = sum(label.preferred is False for label in label_splits[split_name])
            if min(preferred_count, other_count) < 2:
                raise ValueError(
                    f"meshes: expected at least 2 preferred and 2 other meshes in the split {split_name}, got"
                    f" {preferred_count} preferred and {other_count} other meshes. Label more meshes, or"
                    " generate more (--shapes)."
                )
        return list(label_splits["train"]), list(label_splits["test"])

    def select(self, labels: Sequence[UnpairedPreference]) -> tuple[Patches, list[str]]:
        """Return the patches and the prompts of the meshes to which labels belong, in the labels' order."""
        # The seed of a label is the index of its mesh.
        mesh_indices = torch.tensor([label.seed for label in labels])
        return Patches(*(tensor[mesh_indices] for tensor in self.patches)), [
            self.prompts[label.seed] for label in labels
        ]


def severity_of(shape_index: int, uniform_draw: float) -> float:
    """Choose the severity of the defect of a generated shape.

    Preferred and other shapes alternate, and one shape in BETWEEN has a score between the thresholds.

    Args:
        shape_index: index of the shape.
        uniform_draw: random number in 0..1, which chooses the severity within its range.
    Returns: the severity, in 0..1.
    """
    # Severities of the threshold GOOD and of the threshold BAD, from score = 5 - FALL * severity
    good_severity, bad_severity = ((5 - score) / FALL for score in (GOOD, BAD))
    if shape_index % BETWEEN == BETWEEN - 1:
        # 0.1 and 0.8 keep the severity away from both thresholds.
        return good_severity + (bad_severity - good_severity) * (0.1 + 0.8 * uniform_draw)
    return (
        good_severity * uniform_draw
        if shape_index % 2 == 0
        else bad_severity + (1 - bad_severity) * uniform_draw
    )


def generate_meshes(
    source: str,
    mesh_count: int,
    options: PatchOptions,
    resolution: int,
    seed: int = 0,
    on_shape: OnShape = None,
) -> MeshSet:
    """Generate training meshes with defects. Mesh i depends only on the arguments and on i.

    Args:
        source: "heads" or "janus", the name of a function in SOURCES.
        mesh_count: number of meshes.
        options: settings with which meshes are converted to patches.
        resolution: number of cells per edge of the lattice on which meshes are extracted.
        seed: random seed.
        on_shape: function that is called with 1 after each mesh.
    """
    # All shapes share one lattice.
    lattice = cube(resolution)
    mesh_patches = []
    labels = list[UnpairedPreference]()
    prompts = list[str]()
    kinds = list[str]()
    defect_kinds = KINDS[source]
    for mesh_index in range(mesh_count):
        rng = torch.Generator().manual_seed(derive_seed(seed, "mesh", source, mesh_index))
        # Preferred and other shapes alternate, so i // 2 gives both the same kinds of defects.
        defect_kind = defect_kinds[mesh_index // 2 % len(defect_kinds)]
        severity = severity_of(mesh_index, float(torch.rand((), generator=rng)))
        level, prompt = SOURCES[source](lattice, defect_kind, severity, rng)
        mesh_patches.append(compute_mesh_patches([net_mesh(closed_level(level, lattice), lattice)], options))
        labels.append(UnpairedPreference(seed=mesh_index, score=SCALE - FALL * severity))
        prompts.append(prompt)
        kinds.append(defect_kind)
        if on_shape is not None:
            on_shape(1)
    return MeshSet(
        patches=concatenate(mesh_patches), labels=tuple(labels), prompts=tuple(prompts), kinds=tuple(kinds)
    )


def read(
    path: Path, options: PatchOptions, on_shape: OnShape = None, choice: LabelChoice = PEOPLE_ONLY
) -> MeshSet:
    """Read the meshes that a .jsonl file lists.

    A line is, for example, {"mesh": "chair.glb", "prompt": "a chair", "score": 4.5}. Instead of a score, a
    line may state "label": 1 (preferred) or 0 (not preferred). Paths of meshes are relative to the file.
    Labels of judges (`preferences.provenance`) are left out unless `choice` selects them.

    Args:
        path: the .jsonl file.
        options: settings with which meshes are converted to patches.
        on_shape: function that is called with 1 after each mesh.
        choice: selection of the labels by their origin.
    Raises: FileNotFoundError if the file does not exist; ValueError, which names the line, for a line or a
        mesh that is not valid.
    """
    if not path.is_file():
        raise FileNotFoundError(f"--data={path}: this file does not exist. Pass the path of a .jsonl file.")
    mesh_patches = list[Patches]()
    labels = list[UnpairedPreference]()
    prompts = list[str]()
    # Index of each mesh's first line, by file and prompt. Several labels of one mesh have the same index, so
    # that they stay in one split and count as one mesh.
    first_lines: dict[tuple[Path, str], int] = {}
    all_lines = list(jsonl_records(path, "{'mesh': ..., 'prompt': ..., 'score': ...}"))
    selected_lines, use = choice.select(all_lines, lambda numbered_line: numbered_line[1])
    check_not_empty(selected_lines, use, path.name)
    if use.judges or use.unknown:
        print(use.text(), flush=True)
    for line_number, json_object in selected_lines:
        try:
            mesh_path = path.parent / str(json_object.get("mesh", ""))
            prompt = str(json_object.get("prompt", ""))
            mesh_index = first_lines.setdefault((mesh_path.resolve(), prompt), len(labels))
            label = _label(mesh_index, json_object)
            mesh_patches.append(
                compute_mesh_patches([load_mesh(mesh_path)], options)
                if mesh_index == len(labels)
                else mesh_patches[mesh_index]
            )
            labels.append(label)
            prompts.append(prompt)
        except (ValueError, OSError) as error:
            raise ValueError(f"--data: {path.name}, line {line_number}: {error}") from error
        if on_shape is not None:
            on_shape(1)
    if not mesh_patches:
        raise ValueError(
            f"--data={path}: this file lists no mesh. Add a line such as"
            ' {"mesh": "chair.glb", "prompt": "a chair", "score": 4.5} for each mesh.'
        )
    return MeshSet(
        patches=concatenate(mesh_patches),
        labels=tuple(labels),
        prompts=tuple(prompts),
        kinds=("",) * len(labels),
    )


def _label(mesh_index: int, json_object: Mapping) -> UnpairedPreference:
    """Create the label of the mesh with index `mesh_index` from the JSON object of a line.

    Raises: ValueError for a score that is no number, or a label that is not 0 or 1.
    """
    score = json_object.get("score")
    label = json_object.get("label")
    is_wrong_score = isinstance(score, (str, bool, list, dict))
    if label not in (None, 0, 1) or is_wrong_score:
        # The message names the value that is wrong: the line may have a valid one beside it.
        stated_value = score if is_wrong_score else label
        raise ValueError(
            f'expected a "score" from 0 to {SCALE:g}, or a "label" of 1 or 0, got {stated_value!r}. Correct'
            " this entry of the line."
        )
    return UnpairedPreference(
        seed=mesh_index,
        score=None if score is None else float(score),
        label=None if label is None else bool(label),
    )


def load_mesh(path: Path) -> Mesh:
    """Read a triangle mesh of any format that `read_triangles` supports, with all of its parts.

    If the volume is negative, the faces are flipped, so that they point outwards. Vertices and faces that
    cannot be seen are dropped, because encoders scale a mesh by the box around its vertices.

    Raises: FileNotFoundError if the file does not exist; ValueError if it is no mesh of finite triangles.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"the mesh {path} does not exist. Correct its path, which is relative to --data."
        )
    try:
        vertices, faces = read_triangles(path)
    except ValueError as error:
        raise ValueError(f"the mesh {path.name} cannot be read: {error}") from error
    if not len(faces):
        raise ValueError(f"{path.name} contains no faces. Export the surface as triangles.")
    if not np.isfinite(vertices).all():
        raise ValueError(
            f"{path.name} contains vertices whose coordinates are NaN or infinite. Export the surface again."
        )
    vertices, faces = drop_unused(vertices, faces[may_be_visible(vertices, faces)])
    # Vertices of generated meshes are float32, too.
    mesh = Mesh(torch.from_numpy(vertices.astype(np.float32)), torch.from_numpy(faces))
    return mesh if float(signed_volume(mesh)) >= 0 else Mesh(mesh.vertices, mesh.faces.flip(1))


def randomised_labels(labels: Sequence[UnpairedPreference], seed: int) -> list[UnpairedPreference]:
    """Permute scores and labels at random over the meshes. The result is a control without signal."""
    # A separate stream of random numbers (3), so that the order of batches is not changed.
    label_order = np.random.default_rng([seed, 3]).permutation(len(labels))
    return [
        replace(label, score=labels[i].score, label=labels[i].label)
        for label, i in zip(labels, label_order, strict=True)
    ]


def rotated(patches: Patches, quarter_turns: torch.Tensor, is_mirrored: torch.Tensor) -> Patches:
    """Rotate meshes by multiples of 90 degrees about the upward axis, and mirror some of them in x.

    The axis passes through the origin.

    Args:
        patches: patches of N meshes.
        quarter_turns: number of quarter turns of each mesh, int64 [N] in 0..3.
        is_mirrored: bool [N], True for meshes that are mirrored after the rotation.
    """
    # Rotation and mirroring exchange x and z or change their signs, so the result has no rounding errors.
    flips_x = ((quarter_turns == 2) | (quarter_turns == 3)) ^ is_mirrored
    flips_z = (quarter_turns == 1) | (quarter_turns == 2)
    swaps_xz = (quarter_turns % 2 == 1).view(-1, 1, 1)
    # [N, 1, 1, 3], factors of x, y, z after the exchange
    coordinate_signs = torch.stack(
        [1 - 2.0 * flips_x, torch.ones(len(quarter_turns)), 1 - 2.0 * flips_z], dim=1
    )[:, None, None]

    def rotate(vectors: torch.Tensor) -> torch.Tensor:
        """Rotate and mirror vectors [N, P, F, 3]."""
        x, y, z = vectors.unbind(-1)
        return (
            torch.stack([torch.where(swaps_xz, z, x), y, torch.where(swaps_xz, x, z)], dim=-1)
            * coordinate_signs
        )

    # Features 1 to 3 are the normal of a face. The other features do not depend on the orientation.
    features = torch.cat(
        [patches.features[..., :1], rotate(patches.features[..., 1:4]), patches.features[..., 4:]], dim=-1
    )
    return Patches(features, rotate(patches.centres), patches.mask)


def with_permuted_faces(patches: Patches, rng: torch.Generator) -> Patches:
    """Permute the faces of every patch at random, so that the encoder cannot memorise their order."""
    # Sorting random numbers gives a random permutation. [N, P, F, 1]
    face_order = torch.rand(patches.features.shape[:3], generator=rng).argsort(dim=2)[..., None]
    features, centres = (
        tensor.gather(2, face_order.expand(-1, -1, -1, tensor.shape[3]))
        for tensor in (patches.features, patches.centres)
    )
    return Patches(features, centres, patches.mask)


def area_only(patches: Patches) -> Patches:
    """Set the centres of all faces, and all features of faces except the area, to 0.

    The result is the input of a control: a reward that is trained on areas alone must not detect a second
    nose.
    """
    area = patches.features[..., :1]
    shape_features = torch.zeros_like(patches.features[..., 1:])
    return Patches(torch.cat([area, shape_features], dim=-1), torch.zeros_like(patches.centres), patches.mask)
