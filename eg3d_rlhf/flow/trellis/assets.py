"""TRELLIS's finished assets: Gaussians in a cube of side 1 about the origin, their files, and the voxels that they fill.

Shape letters: G Gaussians, v voxels, R voxels per axis.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from eg3d_rlhf.shapes import check_shape
from training.storage import write_atomic

SH_C0 = 0.28209479177387814  # value of the constant spherical harmonic
PLY_FIELDS = (
    *("x", "y", "z", "nx", "ny", "nz"), *(f"f_dc_{i}" for i in range(3)), "opacity", *(f"scale_{i}" for i in range(3)),
    *(f"rot_{i}" for i in range(4)),
)
SHAPES: dict[str, list[int | str]] = {
    "means": ["G", 3], "features_dc": ["G", 3], "scales": ["G", 3], "rotations": ["G", 4], "opacities": ["G"],
}


@dataclass(frozen=True, kw_only=True)
class SplatAsset:
    """One asset."""

    means: torch.Tensor  # [G, 3], centres
    features_dc: torch.Tensor  # [G, 3], colours as the constant spherical harmonic: colour = 0.5 + 0.282 f
    scales: torch.Tensor  # [G, 3], standard deviations along their axes, > 0
    rotations: torch.Tensor  # [G, 4], unit quaternions, real part first
    opacities: torch.Tensor  # [G], 0..1

    def __post_init__(self):
        for name, shape in SHAPES.items():
            check_shape(f"SplatAsset.{name}", getattr(self, name), shape, "Give one row per Gaussian.")

    @property
    def colours(self) -> torch.Tensor:
        """[G, 3] of 0..1, from every side."""
        return (0.5 + SH_C0 * self.features_dc).clamp(0, 1)

    def to(self, device: str | torch.device) -> "SplatAsset":
        """On another device."""
        return SplatAsset(**{name: tensor.to(device) for name, tensor in vars(self).items()})


def voxels_filled(asset: SplatAsset, resolution: int = 64, share: float = 0.25) -> torch.Tensor:
    """Voxels of an asset, [v, 3] int32 on the CPU, sorted.

    Those whose Gaussians' opacities add up to at least `share` of the mean over voxels that hold a Gaussian's centre.

    Deviates: TRELLIS's data tools voxelise a mesh's surface. Not calibrated against them: `share` is a setting.
    Raises: ValueError for an asset that fills none.
    """
    asset = asset.to("cpu")  # sums there do not depend on the order of threads
    cells = ((asset.means + 0.5) * resolution).floor().long()  # [G, 3]
    inside = ((cells >= 0) & (cells < resolution)).all(1) & torch.isfinite(asset.opacities)
    x, y, z = cells[inside].unbind(1)
    mass = asset.opacities.new_zeros(resolution**3).index_add(0, (x * resolution + y) * resolution + z, asset.opacities[inside])
    filled = mass > 0
    if not filled.any():
        raise ValueError("voxels: expected an asset with something within the cube -0.5..0.5, got nothing. Leave it out.")
    places = (mass >= share * mass[filled].mean()).logical_and(filled).nonzero()[:, 0]
    return torch.stack([places // resolution**2, places // resolution % resolution, places % resolution], 1).int()


def write_ply(path: Path, asset: SplatAsset) -> None:
    """The usual file of Gaussian splats: opacities as logits, scales as logarithms."""
    opacity = asset.opacities.clamp(1e-6, 1 - 1e-6).logit()[:, None]
    columns = [asset.means, torch.zeros_like(asset.means), asset.features_dc, opacity, asset.scales.log(), asset.rotations]
    rows = torch.cat([c.detach().float().cpu() for c in columns], 1).numpy().astype("<f4")
    properties = "".join(f"property float {name}\n" for name in PLY_FIELDS)
    header = f"ply\nformat binary_little_endian 1.0\nelement vertex {len(rows)}\n{properties}end_header\n"
    write_atomic(path, header.encode() + rows.tobytes())


def read_ply(path: Path) -> SplatAsset:
    """Inverse of `write_ply`; higher spherical harmonics, which change colours with the direction of view, are left out.

    Raises: FileNotFoundError; ValueError for another kind of file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"asset: expected a .ply file of Gaussians, got none at {path}. Check the path.")
    data = path.read_bytes()
    end = data.find(b"end_header\n")
    lines = data[: max(end, 0)].decode("ascii", "replace").splitlines()
    names = [line.split()[-1] for line in lines if line.startswith("property ")]
    floats = all(line.split()[1] in ("float", "float32") for line in lines if line.startswith("property "))
    counts = [int(line.split()[2]) for line in lines if line.startswith("element ") and line.split()[2].isdigit()]
    rows = data[end + len(b"end_header\n") :]
    expected = len(names) * 4 * counts[0] if len(counts) == 1 else -1
    needed = set(PLY_FIELDS) - {"nx", "ny", "nz"}
    if "format binary_little_endian 1.0" not in lines or not floats or not needed <= set(names) or len(rows) != expected:
        raise ValueError(f"{path}: expected a binary .ply of Gaussian splats, got another or a truncated one. Export it again.")
    table = torch.from_numpy(np.frombuffer(rows, "<f4").reshape(counts[0], -1).astype(np.float32))

    def columns(*wanted: str) -> torch.Tensor:
        return table[:, [names.index(name) for name in wanted]]

    scales, rotations = columns("scale_0", "scale_1", "scale_2").exp(), columns("rot_0", "rot_1", "rot_2", "rot_3")
    return SplatAsset(
        means=columns("x", "y", "z"), features_dc=columns("f_dc_0", "f_dc_1", "f_dc_2"), scales=scales,
        rotations=torch.nn.functional.normalize(rotations, dim=1), opacities=columns("opacity")[:, 0].sigmoid(),
    )
