"""Partitions of the slab's voxels into named regions, the players of an attribution.

Letters: R regions, D, H, W = grid points along z, y, x of the slab. A box is (x from, x to, y from, y to, z
from, z to).
"""

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.spatial import cKDTree

from eg3d_rlhf.core.spec import SlabSpec
from training.heads import people

Box = tuple[float, float, float, float, float, float]
OTHER = "other"
MOST_EXACT = 16  # largest number of regions for which all 2^R coalitions are evaluated
# In the slab's unit coordinates: x 0 left to 1 right, y 0 chin to 1 forehead, z 0 back to 1 camera; the first
# box that holds a point wins.
FACE_BOXES: tuple[tuple[str, Box], ...] = (
    ("brow", (0.25, 0.75, 0.70, 0.88, 0.45, 0.82)),
    ("left eye orbit", (0.14, 0.38, 0.50, 0.72, 0.52, 0.86)),
    ("right eye orbit", (0.62, 0.86, 0.50, 0.72, 0.52, 0.86)),
    ("nose", (0.38, 0.62, 0.38, 0.68, 0.60, 0.94)),
    ("left cheek", (0.08, 0.34, 0.28, 0.58, 0.46, 0.82)),
    ("right cheek", (0.66, 0.92, 0.28, 0.58, 0.46, 0.82)),
    ("mouth", (0.32, 0.68, 0.20, 0.40, 0.54, 0.88)),
    ("chin and jaw", (0.18, 0.82, 0.02, 0.20, 0.40, 0.82)),
)


@dataclass(frozen=True, kw_only=True)
class Partition:
    """Partition of the voxels; every voxel belongs to one region.

    A region may be empty. It is then a player that changes nothing, and its attribution is 0.
    """

    names: tuple[str, ...]
    labels: torch.Tensor  # int64, 0..R-1; [D, H, W] for slabs, else the observation's `region_shape`

    def __post_init__(self) -> None:
        assert (
            self.labels.dtype == torch.int64
            and 0 <= self.labels.min()
            and self.labels.max() < len(self.names)
        )
        if len(set(self.names)) != len(self.names):
            raise ValueError(
                f"Partition.names: expected different names, got {list(self.names)}. Rename one."
            )

    def counts(self) -> list[int]:
        """Count the voxels of each region, R integers."""
        return torch.bincount(self.labels.flatten(), minlength=len(self.names)).tolist()

    def sums(self, volume: torch.Tensor) -> torch.Tensor:
        """Sums [..., R] float64 of volumes [..., D, H, W] over the regions."""
        # Flatten the grid axes alone: leading batch axes stay.
        flat = volume.double().flatten(-self.labels.ndim)
        out = flat.new_zeros(*flat.shape[:-1], len(self.names))
        # index_add_ in float64: the sum over a slab's voxels would lose digits in float32.
        return out.index_add_(-1, self.labels.flatten().to(flat.device), flat)


def region_shape(observed: Sequence[int]) -> tuple[int, ...]:
    """Return the shape of the labels of one observation: [D, H, W] of a slab [1, D, H, W], else all axes."""
    return tuple(observed[1:]) if len(observed) > 1 and observed[0] == 1 else tuple(observed)


def unit_coordinates(spec: SlabSpec) -> torch.Tensor:
    """Return coordinates [D, H, W, 3] float64 (x, y, z), 0 at the slab's first point and 1 at its last along
    each axis.
    """
    depth, height, width = spec.shape
    z, y, x = (torch.linspace(0, 1, count, dtype=torch.float64) for count in (depth, height, width))
    # Axes of the grid are z, y, x; the components are reversed into x, y, z.
    return torch.stack(torch.meshgrid(z, y, x, indexing="ij")[::-1], dim=-1)


def from_boxes(boxes: Sequence[tuple[str, Box]], coordinates: torch.Tensor) -> Partition:
    """Label each voxel with the first box that contains its coordinates [D, H, W, 3], limits included.

    Voxels outside all boxes are the last region, 'other'. Boxes of the same name make one region.
    """
    # Names in the order of their first box; labels index into them.
    names = list(dict.fromkeys(name for name, _ in boxes))
    labels = torch.full(coordinates.shape[:3], len(names), dtype=torch.int64)
    free = torch.ones(coordinates.shape[:3], dtype=torch.bool)
    for name, box in boxes:
        low = coordinates.new_tensor(box[::2])
        high = coordinates.new_tensor(box[1::2])
        assert (low <= high).all()
        # The tolerance keeps voxels on a box's face, whose coordinates are rounded. `free` makes the first
        # box win.
        inside = ((coordinates >= low - 1e-9) & (coordinates <= high + 1e-9)).all(dim=-1) & free
        labels[inside] = names.index(name)
        free &= ~inside
    return Partition(names=(*names, OTHER), labels=labels)


def face_partition(spec: SlabSpec) -> Partition:
    """Divide the slab into the fixed FACE_BOXES."""
    return from_boxes(FACE_BOXES, unit_coordinates(spec))


def read_masks(path: str | Path, shape: Sequence[int]) -> Partition:
    """Read a user's label volume (.npy): integers of this shape, [D, H, W] = [z, y, x] of a slab.

    Names come from the .json of the same stem: {"0": "background", "1": "nose", ...} or a list in order of
    the labels.
    Raises: ValueError, FileNotFoundError.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"expected a label volume, got nothing at {path}. Check the path.")
    # allow_pickle=False: a pickle could run code.
    try:
        volume = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{path}: expected .npy, got: {error}. Save it with numpy.save.") from error
    if (
        not isinstance(volume, np.ndarray)
        or volume.shape != tuple(shape)
        or not np.issubdtype(volume.dtype, np.integer)
    ):
        sides = "[D, H, W] = " if len(shape) == 3 else ""
        raise ValueError(
            f"{path}: expected integers {sides}{list(shape)}, got {getattr(volume, 'dtype', type(volume))}"
            f" {list(getattr(volume, 'shape', []))}. Save an integer array of this shape with numpy.save."
        )
    names = _read_names(path.with_suffix(".json"))
    present_labels = sorted(int(label) for label in np.unique(volume))
    missing = [label for label in present_labels if label not in names]
    if missing:
        raise ValueError(
            f"{path.with_suffix('.json')}: expected a name for each label, got none for {missing}. Add them."
        )
    if len(present_labels) < 2:
        raise ValueError(
            f"{path}: expected at least two regions, got only label {present_labels}. Label another region."
        )
    # The labels may have gaps; searchsorted maps them to 0..R-1.
    return Partition(
        names=tuple(names[label] for label in present_labels),
        labels=torch.from_numpy(np.searchsorted(present_labels, volume).astype(np.int64)),
    )


def _read_names(path: Path) -> dict[int, str]:
    """Read the names of labels from a JSON object or list. Raises: ValueError, FileNotFoundError."""
    if not path.is_file():
        raise FileNotFoundError(
            f'expected the regions\' names in {path}, got nothing. Write {{"0": "background", "1": "nose"}}.'
        )
    try:
        values = json.loads(path.read_text())
        pairs = values.items() if isinstance(values, Mapping) else enumerate(values)
        return {int(label): str(name) for label, name in pairs}
    except (ValueError, TypeError) as error:
        raise ValueError(
            f'{path}: expected {{"label": "name"}} or a list of names, got: {error}. Correct the file.'
        ) from error


# Regions defined by the 98 landmarks of WFLW (Wu et al. 2018, "Look at Boundary"): boxes around groups of
# them.


COUNT = 98
BACKGROUND = "background"  # voxels outside all boxes
# margins of a box, in units of the scene cube's side: in x and y, towards the back, to the camera
SIDE = 0.015
DEPTH_MARGIN = 0.12
FRONT = 0.03
LEAST_VALID = 0.05  # share of the depth map's pixels that must show a surface
# WFLW: 0-32 contour from the image's left ear over the chin to the right, 33-41 and 42-50 brows, 51-54
# bridge of the nose, 55-59 base, 60-67 and 68-75 eyes, 76-87 outer and 88-95 inner lips, 96 and 97 pupils. In
# the order in which boxes win.
GROUPS: tuple[tuple[str, tuple[int, ...]], ...] = (
    ("nose", tuple(range(51, 60))),
    ("mouth", tuple(range(76, 96))),
    ("left eye", (*range(60, 68), 96)),
    ("right eye", (*range(68, 76), 97)),
    ("brows", tuple(range(33, 51))),
    ("left cheek", (*range(2, 10), 55, 66, 76)),
    ("right cheek", (*range(23, 31), 59, 74, 82)),
    ("chin and jaw", tuple(range(9, 24))),
)
CONTOUR = tuple(range(33))
BROWS = tuple(range(33, 51))


@dataclass(frozen=True)
class PixelLandmarks:
    """A user's landmarks in the frontal view, in pixels."""

    size: float  # edge in pixels of the square image that the landmarks refer to
    shared: np.ndarray | None  # [L, 2] (x right, y down) for all latents
    by_seed: Mapping[int, np.ndarray]  # seed -> [L, 2]

    def of(self, seed: int) -> np.ndarray:
        """Return the landmarks [L, 2] of a latent. Raises: ValueError if there are none."""
        # Points of a seed take precedence over those for all latents.
        points = self.by_seed.get(seed, self.shared)
        if points is None:
            known = ", ".join(str(s) for s in sorted(self.by_seed)[:8])
            raise ValueError(
                f"--landmarks: expected points for seed {seed}, got points for seeds {known} only. Add this"
                " seed, or give 'points' for all latents."
            )
        return points


def read_landmarks(path: str | Path) -> PixelLandmarks:
    """Read landmarks: JSON {"image_size": 512, "points": [[x, y] * 98]} for all latents, or {"image_size":
    512, "seeds": {"200000": [[x, y] * 98], ...}}.

    Points are pixel coordinates in the frontal view; (0, 0) is the upper left corner of the image.
    Raises: ValueError, FileNotFoundError.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"expected a file of landmarks, got nothing at {path}. Check the path.")
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON, got: {error}. Correct the file.") from error
    if not isinstance(values, Mapping) or "image_size" not in values or not {"points", "seeds"} & set(values):
        raise ValueError(
            f'{path}: expected {{"image_size": 512, "points": [[x, y], ...]}} (or "seeds"), got other JSON.'
            " Write the file in this form."
        )
    size = values["image_size"]
    # `true` is an int in Python; it is not a size.
    if isinstance(size, bool) or not isinstance(size, (int, float)) or size <= 0:
        raise ValueError(
            f"{path}: expected image_size in pixels, got {size!r}. Write the edge length of the image."
        )
    shared = _points(path, "points", values["points"], size) if "points" in values else None
    seeds = {}
    for seed, points in dict(values.get("seeds", {})).items():
        if not str(seed).isdigit():
            raise ValueError(
                f"{path}: expected seeds as keys of 'seeds', got {seed!r}. Use the latents' seeds as keys."
            )
        seeds[int(seed)] = _points(path, f"seeds[{seed}]", points, size)
    return PixelLandmarks(float(size), shared, seeds)


def _points(path: Path, where: str, values: object, size: float) -> np.ndarray:
    """Check the points of one latent, [L, 2] float64. Raises: ValueError naming the file and the place."""
    try:
        points = np.asarray(values, dtype=np.float64)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: expected numbers in {where}, got: {error}. Correct the file.") from error
    if points.shape != (COUNT, 2) or not np.isfinite(points).all():
        raise ValueError(
            f"{path}: expected {COUNT} finite [x, y] in {where}, got shape {list(points.shape)}. Give all"
            f" {COUNT} points of WFLW."
        )
    if points.min() < 0 or points.max() > size:
        raise ValueError(
            f"{path}: expected points of {where} inside 0..{size:g}, got {points.min():g}..{points.max():g}."
            " Correct image_size or the points."
        )
    return points


def back_project(pixels: np.ndarray, size: float, points: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Lift landmarks [L, 2] to world positions [L, 3] through a frontal depth map.

    Each landmark gets the surface point of the nearest valid pixel: landmarks on the contour may fall just
    beside the head.

    Args:
        size: edge of the image that `pixels` refer to.
        points: [R, R, 3], world positions of the depth map's pixels.
        valid: [R, R] bool, pixels that show a surface.
    Raises: ValueError if the map shows almost no surface.
    """
    if valid.mean() < LEAST_VALID:
        raise ValueError(
            f"expected a face in the frontal depth map, got a surface in {valid.mean():.1%} of it. Use"
            " --regions=boxes."
        )
    # [P] valid pixels
    rows, columns = np.nonzero(valid)
    at = pixels / size * len(valid) - 0.5  # the centre of pixel i lies at i
    # [L, P] squared pixel distances -> [L] index of the nearest
    nearest = ((columns[None] - at[:, :1]) ** 2 + (rows[None] - at[:, 1:]) ** 2).argmin(axis=1)
    return points[rows[nearest], columns[nearest]]


def landmark_boxes(landmarks: np.ndarray, box_warp: float = 1.0) -> list[tuple[str, Box]]:
    """Return boxes in world coordinates around the groups of landmarks [L, 3], and about the face: forehead,
    ears, front of camera.

    The forehead reaches as far above the brows as the chin lies below the base of the nose. The ears reach
    from the brows to the mouth, outside the contour. In front of all landmarks' margin is air, which can only
    contain floaters. Everything else is the background.
    """
    # Margins scale with the scene cube's side.
    side = SIDE * box_warp
    depth_margin = DEPTH_MARGIN * box_warp
    front = FRONT * box_warp
    boxes = []
    for name, group in GROUPS:
        low = landmarks[list(group)].min(axis=0)
        high = landmarks[list(group)].max(axis=0)
        boxes.append((name, _box(low - [side, side, depth_margin], high + [side, side, front])))
    brows = landmarks[list(BROWS)]
    contour = landmarks[list(CONTOUR)]
    top = brows[:, 1].max()
    base = landmarks[57, 1]  # 57: middle of the base of the nose
    chin = contour[:, 1].min()
    # At least twice the margin, also if the landmarks give a very short chin.
    rise = max(base - chin, 2 * side)
    low = [brows[:, 0].min() - side, top, brows[:, 2].min() - depth_margin]
    high = [brows[:, 0].max() + side, top + rise, brows[:, 2].max() + front]
    boxes.append(("forehead", _box(low, high)))
    mouth = landmarks[76:88, 1].mean()
    # 0 and 32 are the ends of the contour, at the ears.
    depth = contour[[0, 32], 2].mean()
    # An ear's box reaches 8 % of the cube outwards from the contour and one margin inwards.
    reach = 0.08 * box_warp
    for edge, inner, outer in ((contour[:, 0].min(), side, reach), (contour[:, 0].max(), -side, -reach)):
        x = sorted((edge + inner, edge - outer))
        boxes.append(("ears", (x[0], x[1], mouth, max(top, mouth), depth - depth_margin, depth + front)))
    # `far` lies outside the scene on every side.
    far = 10 * box_warp
    boxes.append(("front of camera", (-far, far, -far, far, landmarks[:, 2].max() + front, far)))
    return boxes


def head_boxes(landmarks: np.ndarray, box_warp: float = 1.0) -> list[tuple[str, Box]]:
    """Return boxes in world coordinates that divide the whole scene coarsely about the landmarks [L, 3] into
    eight parts; the face is one of them.

    The face lies in front of the ears, brows and chin (less a margin), inside the contour, up to the top of
    the forehead. Above it is the crown, to the rear the back of the head, beside it the sides (hair,
    ears), below it neck and shoulders, which are separated by the width of the contour.
    """
    side = SIDE * box_warp
    front = FRONT * box_warp
    far = 10 * box_warp
    contour = landmarks[list(CONTOUR)]
    left = contour[:, 0].min() - side
    right = contour[:, 0].max() + side
    chin = contour[:, 1].min() - side
    # The same rise above the brows as in `landmark_boxes`.
    top = landmarks[list(BROWS), 1].max() + max(landmarks[57, 1] - contour[:, 1].min(), 2 * side)
    # The rearmost of ears, brows and chin (landmark 16), less a margin.
    depth = min(contour[[0, 32], 2].mean(), landmarks[list(BROWS), 2].min(), landmarks[16, 2]) - front
    air = landmarks[:, 2].max() + front
    # The order matters: the first box that contains a voxel wins, and the last one contains all.
    return [
        ("front of camera", (-far, far, -far, far, air, far)),
        ("crown", (-far, far, top, far, -far, far)),
        ("neck and chest", (left, right, -far, chin, -far, far)),
        ("shoulders", (-far, far, -far, chin, -far, far)),
        ("left side", (-far, left, chin, top, -far, far)),
        ("right side", (right, far, chin, top, -far, far)),
        ("face", (left, right, chin, top, depth, far)),
        ("back of the head", (-far, far, -far, far, -far, far)),
    ]


def _box(low: Sequence[float], high: Sequence[float]) -> Box:
    """Return the box between two corners [3]."""
    # (low, high) corners -> x from, x to, y from, y to, z from, z to
    return (float(low[0]), float(high[0]), float(low[1]), float(high[1]), float(low[2]), float(high[2]))


def landmark_partition(landmarks: np.ndarray, spec: SlabSpec) -> Partition:
    """Divide the reward's slab into the twelve regions about landmarks [L, 3] in world coordinates."""
    partition = from_boxes(landmark_boxes(landmarks, spec.box_warp), spec.points().double())
    # Only the name of the remainder changes.
    return Partition(names=(*partition.names[:-1], BACKGROUND), labels=partition.labels)


def head_partition(landmarks: np.ndarray, spec: SlabSpec) -> Partition:
    """Divide the reward's slab into the eight parts of `head_boxes`; no voxel is left over."""
    partition = from_boxes(head_boxes(landmarks, spec.box_warp), spec.points().double())
    # The last name, the remainder, has no voxels.
    return Partition(names=partition.names[:-1], labels=partition.labels)


# Parts of heads of people, by the segmentation of their basis.

# The first mask above one half wins.
PARTS = ("ears", "lips", "eyes", "brows", "back", "scalp", "face", "neck", "torso")


@functools.cache
def parts_of_vertices() -> np.ndarray:
    """Return the index into PARTS of each vertex [V] of the basis.

    The few vertices outside all masks get the part of the nearest vertex inside one.
    """
    basis = people.load_basis()
    held = np.stack([basis.masks[name] for name in PARTS]) > 0.5  # [parts, V]
    part = held.argmax(axis=0)  # the first part that holds the vertex
    known = held.any(axis=0)
    part[~known] = part[known][cKDTree(basis.mean[known]).query(basis.mean[~known])[1]]
    return part


def people_partition(head: people.Head, spec: SlabSpec) -> Partition:
    """Assign each voxel to the part of the nearest vertex of its latent's ground-truth head.

    The sample may lack this part.
    """
    # [D * H * W, 3] positions in world coordinates
    nearest = cKDTree(head.vertices).query(spec.points().reshape(-1, 3).numpy())[1]
    return Partition(names=PARTS, labels=torch.from_numpy(parts_of_vertices()[nearest].reshape(spec.shape)))
