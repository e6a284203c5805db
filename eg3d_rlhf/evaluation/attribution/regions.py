"""Partitions of a slab's voxels into named regions, among which an attribution divides the change of the
reward.

A box is (smallest x, largest x, smallest y, largest y, smallest z, largest z).
Shapes: R regions, L landmarks, V vertices, D, H, W grid points of the slab along z, y, x.
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
from training.text_files import read_text

Box = tuple[float, float, float, float, float, float]
OTHER = "other"  # region of the voxels outside all boxes
MAX_EXACT_REGIONS = 16  # largest number of regions for which all 2^R coalitions are evaluated
# Boxes in coordinates 0 to 1 of the slab: x from left to right, y from the chin to the forehead, z from the
# back to the camera. A voxel belongs to the first box that contains it.
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
    """Partition of the voxels of a slab. Every voxel belongs to exactly one region.

    A region may have no voxels; its attribution is then 0.
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
                f"The names of the regions are not unique: {list(self.names)}. Give each region its own name."
            )

    def counts(self) -> list[int]:
        """Return the number of voxels of each region, as a list of R integers."""
        return torch.bincount(self.labels.flatten(), minlength=len(self.names)).tolist()

    def sums(self, voxel_values: torch.Tensor) -> torch.Tensor:
        """Return the sums of volumes [..., D, H, W] over each region, [..., R] float64."""
        # Only the axes of the grid are flattened, not the batch axes before them.
        flat_volume = voxel_values.double().flatten(-self.labels.ndim)
        region_sums = flat_volume.new_zeros(*flat_volume.shape[:-1], len(self.names))  # [..., R], float64
        # The sum is computed in float64, since a sum over many voxels would lose digits in float32.
        return region_sums.index_add_(-1, self.labels.flatten().to(flat_volume.device), flat_volume)


def region_shape(observation_shape: Sequence[int]) -> tuple[int, ...]:
    """Return the shape of the labels that divide one observation into regions.

    It is [D, H, W] for a slab [1, D, H, W], whose channel axis has no labels. For other observations it is
    the shape of the observation.
    """
    return (
        tuple(observation_shape[1:])
        if len(observation_shape) > 1 and observation_shape[0] == 1
        else tuple(observation_shape)
    )


def unit_coordinates(spec: SlabSpec) -> torch.Tensor:
    """Return the coordinates (x, y, z) of the slab's grid points, [D, H, W, 3] float64.

    Along each axis they are 0 at the first point and 1 at the last point.
    """
    depth, height, width = spec.shape
    z, y, x = (
        torch.linspace(0, 1, point_count, dtype=torch.float64) for point_count in (depth, height, width)
    )
    # The grid has the axes z, y, x; [::-1] changes the order of the components to x, y, z.
    return torch.stack(torch.meshgrid(z, y, x, indexing="ij")[::-1], dim=-1)


def partition_from_boxes(boxes: Sequence[tuple[str, Box]], coordinates: torch.Tensor) -> Partition:
    """Assign each voxel to the first box that contains it.

    Voxels outside all boxes belong to the last region, OTHER. Boxes of the same name make one region.

    Args:
        boxes: name and box of each region; the limits belong to a box.
        coordinates: coordinates of the voxels, [D, H, W, 3].
    """
    # Names in the order of their first box. Labels are indices into them.
    region_names = list(dict.fromkeys(region_name for region_name, _ in boxes))
    # at first, all voxels belong to OTHER
    region_indices = torch.full(coordinates.shape[:3], len(region_names), dtype=torch.int64)
    is_free = torch.ones(coordinates.shape[:3], dtype=torch.bool)  # True for voxels outside the boxes so far
    for region_name, box in boxes:
        low_corner = coordinates.new_tensor(box[::2])
        high_corner = coordinates.new_tensor(box[1::2])
        assert (low_corner <= high_corner).all()
        # The tolerance includes voxels on the faces of a box, whose coordinates are rounded. Voxels of
        # earlier boxes are not free.
        is_inside = ((coordinates >= low_corner - 1e-9) & (coordinates <= high_corner + 1e-9)).all(
            dim=-1
        ) & is_free
        region_indices[is_inside] = region_names.index(region_name)
        is_free &= ~is_inside
    return Partition(names=(*region_names, OTHER), labels=region_indices)


def face_partition(spec: SlabSpec) -> Partition:
    """Divide the slab into the fixed boxes FACE_BOXES and the remaining voxels."""
    return partition_from_boxes(FACE_BOXES, unit_coordinates(spec))


def read_masks(label_path: str | Path, label_shape: Sequence[int]) -> Partition:
    """Read a partition from a user's label volume.

    The names of the labels are read from the .json file of the same stem. It contains an object, for example
    {"0": "background", "1": "nose"}, or a list of names in the order of the labels.

    Args:
        label_path: .npy file of integers.
        label_shape: shape of the labels, [D, H, W] along z, y, x for a slab.

    Raises: ValueError or FileNotFoundError if a file is missing or does not have the described content.
    """
    label_path = Path(label_path)
    if not label_path.is_file():
        raise FileNotFoundError(
            f"there is no label volume at {label_path}. Pass the path of a .npy file, or one of boxes,"
            " landmarks, head and people."
        )
    # allow_pickle=False, since a pickle could run code.
    try:
        label_volume = np.load(label_path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(
            f"{label_path} cannot be read as .npy: {error}. Save the array with numpy.save."
        ) from error
    if (
        not isinstance(label_volume, np.ndarray)
        or label_volume.shape != tuple(label_shape)
        or not np.issubdtype(label_volume.dtype, np.integer)
    ):
        axes_text = "[D, H, W] = " if len(label_shape) == 3 else ""
        raise ValueError(
            f"{label_path} holds {getattr(label_volume, 'dtype', type(label_volume))} of shape"
            f" {list(getattr(label_volume, 'shape', []))}, but integers of shape"
            f" {axes_text}{list(label_shape)} are needed. Save such an array with numpy.save."
        )
    name_by_label = _read_names(label_path.with_suffix(".json"))
    present_labels = sorted(int(label) for label in np.unique(label_volume))  # labels that occur, ascending
    unnamed_labels = [label for label in present_labels if label not in name_by_label]
    if unnamed_labels:
        raise ValueError(
            f"{label_path.with_suffix('.json')}: the labels {unnamed_labels} of the volume have no names."
            " Add their names to this file."
        )
    if len(present_labels) < 2:
        raise ValueError(
            f"{label_path}: all voxels have the label {present_labels[0]}, but at least two regions are"
            " needed. Give some voxels another label."
        )
    # The user's labels need not be consecutive; searchsorted maps them to 0..R-1.
    return Partition(
        names=tuple(name_by_label[label] for label in present_labels),
        labels=torch.from_numpy(np.searchsorted(present_labels, label_volume).astype(np.int64)),
    )


def _read_names(names_path: Path) -> dict[int, str]:
    """Read the names of labels from a JSON object or list, see `read_masks`.

    Raises: ValueError or FileNotFoundError if the file is missing or does not have this form.
    """
    if not names_path.is_file():
        raise FileNotFoundError(
            f"the file {names_path} with the names of the regions is missing. Write it, for example"
            ' {"0": "background", "1": "nose"}.'
        )
    try:
        json_value = json.loads(read_text(names_path))
        # A list names the labels 0, 1, 2, ... in this order.
        labels_with_names = json_value.items() if isinstance(json_value, Mapping) else enumerate(json_value)
        return {int(label): str(name) for label, name in labels_with_names}
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{names_path} does not hold the names of labels: {error}. Write an object, for example"
            ' {"0": "background", "1": "nose"}, or a list of names.'
        ) from error


# Regions that are boxes around groups of the 98 landmarks of WFLW (Wu et al. 2018, "Look at Boundary",
# arXiv 1805.10483).


COUNT = 98  # number of landmarks
BACKGROUND = "background"  # region of the voxels outside all boxes
SIDE = 0.015  # margin of a box in x and y, in units of the scene cube's side
DEPTH_MARGIN = 0.12  # margin of a box towards the back, in the same units
FRONT = 0.03  # margin of a box towards the camera, in the same units
MIN_VALID_SHARE = 0.05  # smallest share of the depth map's pixels that must show a surface
# Landmarks of WFLW: 0-32 contour from the ear at the left of the image over the chin to the other ear, 33-41
# and 42-50 brows, 51-54 bridge of the nose, 55-59 base of the nose, 60-67 and 68-75 eyes, 76-87 outer and
# 88-95 inner lips, 96 and 97 pupils. A voxel belongs to the first group whose box contains it.
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
    """Landmarks in the frontal view, in pixels, which the user has passed."""

    size: float  # pixels per edge of the square image in which the landmarks are given
    shared: np.ndarray | None  # landmarks [L, 2] (x right, y down) of all latents
    by_seed: Mapping[int, np.ndarray]  # seed -> landmarks [L, 2] of this latent

    def landmarks_of_seed(self, seed: int) -> np.ndarray:
        """Return the landmarks [L, 2] of a latent.

        Raises: ValueError if the file has no landmarks for it.
        """
        # The landmarks of a seed are used, if given, instead of those for all latents.
        landmark_pixels = self.by_seed.get(seed, self.shared)
        if landmark_pixels is None:
            known_seeds = ", ".join(str(known_seed) for known_seed in sorted(self.by_seed)[:8])
            raise ValueError(
                f"--landmarks: the file has no points for seed {seed}, only for seeds {known_seeds}. Add the"
                " points of this seed to 'seeds', or add 'points' for all latents."
            )
        return landmark_pixels


def read_landmarks(landmarks_path: str | Path) -> PixelLandmarks:
    """Read a JSON file of landmarks.

    The file holds {"image_size": 512, "points": [[x, y], ...]} with 98 points for all latents, or
    {"image_size": 512, "seeds": {"200000": [[x, y], ...], ...}} with 98 points for each seed, or both. Points
    are pixel coordinates in the frontal view; (0, 0) is the upper left corner of the image.

    Raises: ValueError or FileNotFoundError if the file is missing or does not have this content.
    """
    landmarks_path = Path(landmarks_path)
    if not landmarks_path.is_file():
        raise FileNotFoundError(
            f"there is no file of landmarks at {landmarks_path}. Pass the path of an existing JSON file."
        )
    try:
        json_value = json.loads(read_text(landmarks_path))
    except ValueError as error:
        raise ValueError(
            f"{landmarks_path} is not valid JSON: {error}. Correct the file at this position."
        ) from error
    example_text = '{"image_size": 512, "points": [[x, y], ...]}'
    if not isinstance(json_value, Mapping):
        raise ValueError(
            f"{landmarks_path} does not contain a JSON object. Write for example {example_text}."
        )
    if "image_size" not in json_value:
        raise ValueError(
            f'{landmarks_path} has no "image_size". Add the pixels per edge of the image, for example'
            f" {example_text}."
        )
    if not {"points", "seeds"} & set(json_value):
        raise ValueError(
            f'{landmarks_path} has neither "points" nor "seeds". Add the landmarks, for example'
            f" {example_text}."
        )
    image_size = json_value["image_size"]
    # bool is a subclass of int in Python, but `true` is not a size.
    if isinstance(image_size, bool) or not isinstance(image_size, (int, float)) or image_size <= 0:
        raise ValueError(
            f'{landmarks_path}: "image_size" is {image_size!r}, but a number > 0 is needed. Write the pixels'
            " per edge of the image."
        )
    shared_points = (
        _points(landmarks_path, "points", json_value["points"], image_size)
        if "points" in json_value
        else None
    )
    points_by_seed = {}
    for seed, point_lists in dict(json_value.get("seeds", {})).items():
        if not str(seed).isdigit():
            raise ValueError(
                f"{landmarks_path}: the key {seed!r} of 'seeds' is not a seed. Use the latents' seeds as"
                ' keys, for example "200000".'
            )
        points_by_seed[int(seed)] = _points(landmarks_path, f"seeds[{seed}]", point_lists, image_size)
    return PixelLandmarks(float(image_size), shared_points, points_by_seed)


def _points(landmarks_path: Path, entry_name: str, json_value: object, image_size: float) -> np.ndarray:
    """Return the points of a latent, [L, 2] float64, after checking them.

    Args:
        landmarks_path: file of the landmarks, for messages.
        entry_name: name of the entry in the file, for messages.
        json_value: value of the entry.
        image_size: pixels per edge of the image.

    Raises: ValueError if the entry is not a list of 98 points inside the image.
    """
    try:
        landmark_pixels = np.asarray(json_value, dtype=np.float64)  # [L, 2]
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{landmarks_path}: {entry_name} is not a list of [x, y]: {error}. Write {COUNT} pairs of"
            " numbers."
        ) from error
    if landmark_pixels.shape != (COUNT, 2):
        raise ValueError(
            f"{landmarks_path}: {entry_name} has the shape {list(landmark_pixels.shape)}, but [{COUNT}, 2]"
            f" is needed. Write the {COUNT} points [x, y] of WFLW."
        )
    if not np.isfinite(landmark_pixels).all():
        raise ValueError(
            f"{landmarks_path}: {entry_name} contains a coordinate that is not finite. Replace it by the"
            " position of the landmark in pixels."
        )
    # Points outside the image mean that "image_size" does not belong to them.
    if landmark_pixels.min() < 0 or landmark_pixels.max() > image_size:
        raise ValueError(
            f"{landmarks_path}: the coordinates in {entry_name} range over"
            f" {landmark_pixels.min():g}..{landmark_pixels.max():g}, outside"
            f' the image, 0..{image_size:g}. Correct the points or "image_size".'
        )
    return landmark_pixels


def back_project(
    landmark_pixels: np.ndarray, image_size: float, surface_points: np.ndarray, is_valid: np.ndarray
) -> np.ndarray:
    """Return the world positions [L, 3] of landmarks, by a frontal depth map.

    Each landmark gets the surface point of the nearest valid pixel, since landmarks on the contour may lie
    just beside the head.

    Args:
        landmark_pixels: landmarks in pixels, [L, 2].
        image_size: pixels per edge of the image in which `landmark_pixels` are given.
        surface_points: world positions of the depth map's pixels, [resolution, resolution, 3].
        is_valid: mask of the pixels that show a surface, [resolution, resolution].

    Raises: ValueError if less than MIN_VALID_SHARE of the depth map shows a surface.
    """
    if is_valid.mean() < MIN_VALID_SHARE:
        raise ValueError(
            f"only {is_valid.mean():.1%} of a frontal depth map show a surface, so landmarks cannot be placed"
            " on a face. Use --regions=boxes."
        )
    # rows and columns of the P valid pixels, [P] each
    valid_rows, valid_columns = np.nonzero(is_valid)
    # in pixels of the depth map, whose pixel i has its centre at i
    pixel_positions = landmark_pixels / image_size * len(is_valid) - 0.5
    # squared distances in pixels [L, P] -> index of the nearest valid pixel [L]
    nearest_indices = (
        (valid_columns[None] - pixel_positions[:, :1]) ** 2 + (valid_rows[None] - pixel_positions[:, 1:]) ** 2
    ).argmin(axis=1)
    return surface_points[valid_rows[nearest_indices], valid_columns[nearest_indices]]


def landmark_boxes(landmarks: np.ndarray, box_warp: float = 1.0) -> list[tuple[str, Box]]:
    """Return boxes in world coordinates around groups of landmarks, and of the forehead, ears and air.

    The forehead extends as far above the brows as the chin is below the base of the nose. The ears extend
    from the brows to the mouth, outside the contour. The region "front of camera" is in front of all
    landmarks, where only floaters can be. All other voxels are background.

    Args:
        landmarks: world positions, [98, 3].
        box_warp: side of the scene cube.
    """
    # Margins are proportional to the side of the scene cube.
    side_margin = SIDE * box_warp
    depth_margin = DEPTH_MARGIN * box_warp
    front_margin = FRONT * box_warp
    boxes = []
    for region_name, landmark_indices in GROUPS:
        low_corner = landmarks[list(landmark_indices)].min(axis=0)  # [3]
        high_corner = landmarks[list(landmark_indices)].max(axis=0)  # [3]
        boxes.append(
            (
                region_name,
                _box(
                    low_corner - [side_margin, side_margin, depth_margin],
                    high_corner + [side_margin, side_margin, front_margin],
                ),
            )
        )
    brows = landmarks[list(BROWS)]  # [18, 3]
    contour = landmarks[list(CONTOUR)]  # [33, 3]
    brow_top = brows[:, 1].max()  # y of the highest landmark of the brows
    nose_base = landmarks[57, 1]  # 57: middle of the base of the nose
    chin_bottom = contour[:, 1].min()  # y of the lowest landmark
    # The forehead is at least twice the margin high, also if the landmarks have a very short chin.
    forehead_height = max(nose_base - chin_bottom, 2 * side_margin)
    low_corner = [brows[:, 0].min() - side_margin, brow_top, brows[:, 2].min() - depth_margin]
    high_corner = [
        brows[:, 0].max() + side_margin,
        brow_top + forehead_height,
        brows[:, 2].max() + front_margin,
    ]
    boxes.append(("forehead", _box(low_corner, high_corner)))
    mouth_height = landmarks[76:88, 1].mean()  # y; 76 to 87 are the outer lips
    # Landmarks 0 and 32 are the ends of the contour, at the ears.
    ear_depth = contour[[0, 32], 2].mean()
    # The box of an ear extends from the contour by 8 % of the cube outwards, and by one margin inwards.
    ear_width = 0.08 * box_warp
    for contour_end, inward_width, outward_width in (
        (contour[:, 0].min(), side_margin, ear_width),
        (contour[:, 0].max(), -side_margin, -ear_width),
    ):
        x_range = sorted((contour_end + inward_width, contour_end - outward_width))
        boxes.append(
            (
                "ears",
                (
                    x_range[0],
                    x_range[1],
                    mouth_height,
                    max(brow_top, mouth_height),
                    ear_depth - depth_margin,
                    ear_depth + front_margin,
                ),
            )
        )
    # `beyond_scene` is outside the scene in every direction.
    beyond_scene = 10 * box_warp
    boxes.append(
        (
            "front of camera",
            (
                -beyond_scene,
                beyond_scene,
                -beyond_scene,
                beyond_scene,
                landmarks[:, 2].max() + front_margin,
                beyond_scene,
            ),
        )
    )
    return boxes


def head_boxes(landmarks: np.ndarray, box_warp: float = 1.0) -> list[tuple[str, Box]]:
    """Return boxes in world coordinates that divide the scene into eight parts, of which the face is one.

    The face is in front of the ears, brows and chin (less a margin), inside the contour, and below the top of
    the forehead. The crown is above the face. The sides with hair and ears are left and right of the face,
    and the rest of the head is its back. Neck and shoulders are below the face, and are separated by the
    width of the contour.

    Args:
        landmarks: world positions, [98, 3].
        box_warp: side of the scene cube.
    """
    side_margin = SIDE * box_warp
    front_margin = FRONT * box_warp
    beyond_scene = 10 * box_warp
    contour = landmarks[list(CONTOUR)]  # [33, 3]
    left_edge = contour[:, 0].min() - side_margin  # x
    right_edge = contour[:, 0].max() + side_margin  # x
    chin_bottom = contour[:, 1].min() - side_margin  # y
    # The forehead has the same height above the brows as in `landmark_boxes`.
    forehead_top = landmarks[list(BROWS), 1].max() + max(
        landmarks[57, 1] - contour[:, 1].min(), 2 * side_margin
    )
    # The face begins at the rearmost of ears, brows and chin (landmark 16), less a margin.
    face_depth = (
        min(contour[[0, 32], 2].mean(), landmarks[list(BROWS), 2].min(), landmarks[16, 2]) - front_margin
    )
    air_start = landmarks[:, 2].max() + front_margin  # z
    # The order matters: a voxel belongs to the first box that contains it. The last box contains all voxels.
    return [
        (
            "front of camera",
            (-beyond_scene, beyond_scene, -beyond_scene, beyond_scene, air_start, beyond_scene),
        ),
        ("crown", (-beyond_scene, beyond_scene, forehead_top, beyond_scene, -beyond_scene, beyond_scene)),
        ("neck and chest", (left_edge, right_edge, -beyond_scene, chin_bottom, -beyond_scene, beyond_scene)),
        ("shoulders", (-beyond_scene, beyond_scene, -beyond_scene, chin_bottom, -beyond_scene, beyond_scene)),
        ("left side", (-beyond_scene, left_edge, chin_bottom, forehead_top, -beyond_scene, beyond_scene)),
        ("right side", (right_edge, beyond_scene, chin_bottom, forehead_top, -beyond_scene, beyond_scene)),
        ("face", (left_edge, right_edge, chin_bottom, forehead_top, face_depth, beyond_scene)),
        (
            "back of the head",
            (-beyond_scene, beyond_scene, -beyond_scene, beyond_scene, -beyond_scene, beyond_scene),
        ),
    ]


def _box(low_corner: Sequence[float], high_corner: Sequence[float]) -> Box:
    """Return the box between the corner with the smallest x, y, z and the corner with the largest x, y, z."""
    return (
        float(low_corner[0]),
        float(high_corner[0]),
        float(low_corner[1]),
        float(high_corner[1]),
        float(low_corner[2]),
        float(high_corner[2]),
    )


def landmark_partition(landmarks: np.ndarray, spec: SlabSpec) -> Partition:
    """Divide the reward's slab into twelve regions, see `landmark_boxes`.

    Args: landmarks: world positions, [98, 3].
    """
    partition = partition_from_boxes(landmark_boxes(landmarks, spec.box_warp), spec.points().double())
    # The region of the remaining voxels gets another name.
    return Partition(names=(*partition.names[:-1], BACKGROUND), labels=partition.labels)


def head_partition(landmarks: np.ndarray, spec: SlabSpec) -> Partition:
    """Divide the reward's slab into the eight parts of `head_boxes`, which contain all voxels.

    Args: landmarks: world positions, [98, 3].
    """
    partition = partition_from_boxes(head_boxes(landmarks, spec.box_warp), spec.points().double())
    # The region of the remaining voxels is empty, so its name is dropped.
    return Partition(names=partition.names[:-1], labels=partition.labels)


# Parts of synthetic heads, by the masks of their mesh model.

# A vertex belongs to the first part whose mask exceeds one half.
PARTS = ("ears", "lips", "eyes", "brows", "back", "scalp", "face", "neck", "torso")


@functools.cache
def part_of_vertices() -> np.ndarray:
    """Return the index into PARTS of each vertex of the mesh model, [V].

    The few vertices outside all masks get the part of the nearest vertex inside a mask.
    """
    basis = people.load_basis()
    is_in_part = np.stack([basis.masks[part_name] for part_name in PARTS]) > 0.5  # [parts, V]
    part_indices = is_in_part.argmax(axis=0)  # argmax is the first True
    has_part = is_in_part.any(axis=0)
    # query(...)[1]: for each vertex without a part the index of the nearest vertex that has one
    part_indices[~has_part] = part_indices[has_part][
        cKDTree(basis.mean[has_part]).query(basis.mean[~has_part])[1]
    ]
    return part_indices


def people_partition(head: people.Head, spec: SlabSpec) -> Partition:
    """Assign each voxel to the part of the head to which the nearest vertex of the head's mesh belongs.

    Args: head: ground-truth head of the latent. The generator's sample may lack a part of it.
    """
    # positions of all voxels, [D * H * W, 3]; [1]: the indices of the nearest vertices
    nearest_vertices = cKDTree(head.vertices).query(spec.points().reshape(-1, 3).numpy())[1]
    return Partition(
        names=PARTS, labels=torch.from_numpy(part_of_vertices()[nearest_vertices].reshape(spec.shape))
    )
