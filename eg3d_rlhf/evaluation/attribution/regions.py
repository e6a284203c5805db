"""The players of an attribution: a partition of the slab's voxels into named regions.

Letters: R regions, D, H, W = grid points along z, y, x of the slab. A box is (x from, x to, y from, y to, z from, z to).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from eg3d_rlhf.core.spec import SlabSpec

Box = tuple[float, float, float, float, float, float]
OTHER = "other"
MOST_EXACT = 16  # regions up to which 2^R coalitions are reasonable
# In the slab's unit coordinates: x 0 left to 1 right, y 0 chin to 1 forehead, z 0 back to 1 camera; the first box that holds a point wins.
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
    """Every voxel belongs to one region; a region may be empty, which makes it a player that changes nothing."""

    names: tuple[str, ...]
    labels: torch.Tensor  # int64, 0..R-1, [D, H, W] of slabs; of another observation its `region_shape`

    def __post_init__(self) -> None:
        if self.labels.ndim == 0 or self.labels.dtype != torch.int64:
            got = f"{list(self.labels.shape)} {self.labels.dtype}"
            raise ValueError(f"Partition.labels: expected int64 [D, H, W], got {got}. Pass one label per voxel.")
        low, high = int(self.labels.min()), int(self.labels.max())
        if low < 0 or high >= len(self.names):
            raise ValueError(f"Partition.labels: expected 0..{len(self.names) - 1} for {len(self.names)} names, got {low}..{high}.")
        if len(set(self.names)) != len(self.names):
            raise ValueError(f"Partition.names: expected different names, got {list(self.names)}. Rename one.")

    def counts(self) -> list[int]:
        """Voxels per region."""
        return torch.bincount(self.labels.flatten(), minlength=len(self.names)).tolist()

    def sums(self, volume: torch.Tensor) -> torch.Tensor:
        """Sums [..., R] float64 of volumes [..., D, H, W] over the regions."""
        flat = volume.double().flatten(-self.labels.ndim)
        out = flat.new_zeros(*flat.shape[:-1], len(self.names))
        return out.index_add_(-1, self.labels.flatten().to(flat.device), flat)


def region_shape(observed: Sequence[int]) -> tuple[int, ...]:
    """Shape of the labels of one shape's observation: [D, H, W] of a slab [1, D, H, W], else all of its sides."""
    return tuple(observed[1:]) if len(observed) > 1 and observed[0] == 1 else tuple(observed)


def unit_coordinates(spec: SlabSpec) -> torch.Tensor:
    """[D, H, W, 3] float64, components x, y, z of every voxel, 0 at the slab's first point and 1 at its last along each axis."""
    depth, height, width = spec.shape
    z, y, x = (torch.linspace(0, 1, count, dtype=torch.float64) for count in (depth, height, width))
    return torch.stack(torch.meshgrid(z, y, x, indexing="ij")[::-1], dim=-1)


def from_boxes(boxes: Sequence[tuple[str, Box]], coordinates: torch.Tensor) -> Partition:
    """The first box that holds a voxel's coordinates [D, H, W, 3], limits included, wins; what none holds is the last region, 'other'.

    Boxes of one name make one region. Raises: ValueError for a box whose ends are in the wrong order.
    """
    names = list(dict.fromkeys(name for name, _ in boxes))
    labels = torch.full(coordinates.shape[:3], len(names), dtype=torch.int64)
    free = torch.ones(coordinates.shape[:3], dtype=torch.bool)
    for name, box in boxes:
        low, high = coordinates.new_tensor(box[::2]), coordinates.new_tensor(box[1::2])
        if not (low <= high).all():
            raise ValueError(f"from_boxes({name}): expected (x, x, y, y, z, z) with rising ends, got {list(box)}. Swap the ends.")
        inside = ((coordinates >= low - 1e-9) & (coordinates <= high + 1e-9)).all(dim=-1) & free
        labels[inside] = names.index(name)
        free &= ~inside
    return Partition(names=(*names, OTHER), labels=labels)


def face_partition(spec: SlabSpec) -> Partition:
    """The nine regions of FACE_BOXES and the rest."""
    return from_boxes(FACE_BOXES, unit_coordinates(spec))


def read_masks(path: str | Path, shape: Sequence[int]) -> Partition:
    """A user's label volume: .npy, or .npz with the one array or one called 'labels', int of this shape, [D, H, W] = [z, y, x] of a slab.

    Names come from the .json of the same stem: {"0": "background", "1": "nose", ...} or a list in order of the labels.
    Raises: ValueError, FileNotFoundError.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"expected a label volume, got nothing at {path}. Check the path.")
    volume = _read_volume(path)
    if volume.shape != tuple(shape) or not np.issubdtype(volume.dtype, np.integer):
        sides = "[D, H, W] = " if len(shape) == 3 else ""
        raise ValueError(f"{path}: expected integers {sides}{list(shape)}, got {volume.dtype} {list(volume.shape)}. Resample it.")
    names = _read_names(path.with_suffix(".json"))
    found = sorted(int(label) for label in np.unique(volume))
    missing = [label for label in found if label not in names]
    if missing:
        raise ValueError(f"{path.with_suffix('.json')}: expected a name for each label, got none for {missing}. Add them.")
    if len(found) < 2:
        raise ValueError(f"{path}: expected at least two regions, got label {found} alone. There is nothing to divide.")
    return Partition(names=tuple(names[label] for label in found), labels=torch.from_numpy(np.searchsorted(found, volume).astype(np.int64)))


def _read_volume(path: Path) -> np.ndarray:
    try:
        loaded = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{path}: expected .npy or .npz, got: {error}. Save it with numpy.save.") from error
    if isinstance(loaded, np.ndarray):
        return loaded
    with loaded:
        keys = list(loaded.keys())
        key = "labels" if "labels" in keys else keys[0] if len(keys) == 1 else None
        if key is None:
            raise ValueError(f"{path}: expected one array, or one called 'labels', got {keys}. Save the label volume alone.")
        return loaded[key]


def _read_names(path: Path) -> dict[int, str]:
    if not path.is_file():
        raise FileNotFoundError(f"expected the regions' names in {path}, got nothing. Write {{\"0\": \"background\", \"1\": \"nose\"}}.")
    try:
        values = json.loads(path.read_text())
        pairs = values.items() if isinstance(values, Mapping) else enumerate(values)
        return {int(label): str(name) for label, name in pairs}
    except (ValueError, TypeError) as error:
        raise ValueError(f'{path}: expected {{"label": "name"}} or a list of names, got: {error}. Correct the file.') from error
