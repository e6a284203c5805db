"""TRELLIS's finished assets: Gaussians in a cube of side 1 about the origin, their files, and the voxels that
they fill; their images in plain PyTorch, slow, exact, on any device; and what the encoder of the second stage
reads off these.

Shape letters: G Gaussians, R voxels per axis, S pixels per side, P pixels of a tile, K Gaussians that reach
it, v voxels, E entries of a feature.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from eg3d_rlhf.core.shapes import check_shape
from eg3d_rlhf.models.sparse import SparseBatch, SparseSample
from eg3d_rlhf.tuning.flow.families.encoders import ImageEncoder
from eg3d_rlhf.tuning.flow.families.folder import OpenedFolder, check_finite
from training.storage import write_atomic

SH_C0 = 0.28209479177387814  # value of the constant spherical harmonic
PLY_FIELDS = (
    *("x", "y", "z", "nx", "ny", "nz"),
    *(f"f_dc_{i}" for i in range(3)),
    "opacity",
    *(f"scale_{i}" for i in range(3)),
    *(f"rot_{i}" for i in range(4)),
)
SHAPES: dict[str, list[int | str]] = {
    "means": ["G", 3],
    "features_dc": ["G", 3],
    "scales": ["G", 3],
    "rotations": ["G", 4],
    "opacities": ["G"],
}


@dataclass(frozen=True, kw_only=True)
class SplatAsset:
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
        return SplatAsset(**{name: tensor.to(device) for name, tensor in vars(self).items()})


def voxels_filled(asset: SplatAsset, resolution: int = 64, share: float = 0.25) -> torch.Tensor:
    """Voxels of an asset, [v, 3] int32 on the CPU, sorted.

    Those whose Gaussians' opacities add up to at least `share` of the mean over voxels that hold a Gaussian's
    centre.

    Deviates: TRELLIS's data tools voxelise a mesh's surface; see `calibrated` for the share that comes
    nearest.
    Raises: ValueError for an asset that fills none.
    """
    mass, usual = _mass(asset, resolution)
    places = ((mass >= share * usual) & (mass > 0)).nonzero()[:, 0]
    return torch.stack(
        [places // resolution**2, places // resolution % resolution, places % resolution], 1
    ).int()


def _mass(asset: SplatAsset, resolution: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Opacity in each voxel, [R^3], and its mean over voxels that hold any, []."""
    asset = asset.to("cpu")  # sums there do not depend on the order of threads
    cells = ((asset.means + 0.5) * resolution).floor().long()  # [G, 3]
    inside = ((cells >= 0) & (cells < resolution)).all(1) & torch.isfinite(asset.opacities)
    x, y, z = cells[inside].unbind(1)
    mass = asset.opacities.new_zeros(resolution**3).index_add(
        0, (x * resolution + y) * resolution + z, asset.opacities[inside]
    )
    filled = mass > 0
    if not filled.any():
        raise ValueError(
            "voxels: expected an asset with something within the cube -0.5..0.5, got nothing. Leave it out."
        )
    return mass, mass[filled].mean()


SHARES = tuple(2.0**k for k in range(-8, 3))  # tried by `calibrated`


def calibrated(
    assets: Sequence[SplatAsset], voxels: Sequence[torch.Tensor], resolution: int = 64
) -> dict[str, float | list]:
    """The share at which assets fill the voxels that they were made on, as nearly as it can be had.

    TRELLIS makes Gaussians on the voxels of a mesh's surface, so those voxels are what its data tools would
    find for such an asset.
    Args: voxels: [v, 3] of each asset.
    Returns: {"share", "iou": mean intersection over union at it, "tried": [[share, iou], ...]}, JSON types.
    """
    assert len(assets) == len(voxels)
    if not assets:
        raise ValueError("--list: expected assets, got none. Draw some.")
    overlaps = torch.zeros(len(SHARES), dtype=torch.float64)
    for asset, own in zip(assets, voxels, strict=True):
        x, y, z = own.cpu().long().unbind(1)
        wanted = torch.zeros(resolution**3, dtype=torch.bool)
        wanted[(x * resolution + y) * resolution + z] = True
        mass, usual = _mass(asset, resolution)
        for i, share in enumerate(SHARES):
            filled = (mass >= share * usual) & (mass > 0)
            overlaps[i] += (filled & wanted).sum() / (filled | wanted).sum()
    ious = (overlaps / len(assets)).tolist()
    best = max(range(len(SHARES)), key=lambda i: ious[i])
    return {
        "share": SHARES[best],
        "iou": ious[best],
        "tried": [[share, iou] for share, iou in zip(SHARES, ious, strict=True)],
    }


def write_ply(path: Path, asset: SplatAsset) -> None:
    """The usual file of Gaussian splats: opacities as logits, scales as logarithms."""
    opacity = asset.opacities.clamp(1e-6, 1 - 1e-6).logit()[:, None]
    columns = [
        asset.means,
        torch.zeros_like(asset.means),
        asset.features_dc,
        opacity,
        asset.scales.log(),
        asset.rotations,
    ]
    rows = torch.cat([c.detach().float().cpu() for c in columns], 1).numpy().astype("<f4")
    properties = "".join(f"property float {name}\n" for name in PLY_FIELDS)
    header = f"ply\nformat binary_little_endian 1.0\nelement vertex {len(rows)}\n{properties}end_header\n"
    write_atomic(path, header.encode() + rows.tobytes())


def show(asset: SplatAsset, path: Path) -> Path:
    """Gaussian splats in the asset's own frame, .ply."""
    file = path.with_name(path.name + ".ply")
    write_ply(file, asset)
    return file


@torch.no_grad()
def decoded(pipeline: OpenedFolder, decoder: str, x_0: SparseBatch) -> list[SplatAsset]:
    """Latents of a pipeline's last stage -> assets, one by one.

    Args: decoder: name of the part that makes Gaussians of them.
    """
    check_finite("decode", x_0)
    assets = []
    for sample in x_0.samples():
        latent = SparseSample(sample.coords, pipeline.unnormalised(sample.feats.float()))
        (gaussians,) = pipeline.part(decoder)(SparseBatch.join([latent]).to(pipeline.device))
        assets.append(
            SplatAsset(
                means=gaussians.means,
                features_dc=gaussians.features_dc[:, 0],
                scales=gaussians.scales,
                rotations=gaussians.rotations,
                opacities=gaussians.opacities[:, 0],
            )
        )
    return assets


def read_ply(path: Path) -> SplatAsset:
    """Inverse of `write_ply`; higher spherical harmonics, which change colours with the direction of view,
    are left out.

    Raises: FileNotFoundError; ValueError for another kind of file.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"asset: expected a .ply file of Gaussians, got none at {path}. Check the path."
        )
    data = path.read_bytes()
    end = data.find(b"end_header\n")
    lines = data[: max(end, 0)].decode("ascii", "replace").splitlines()
    names = [line.split()[-1] for line in lines if line.startswith("property ")]
    floats = all(line.split()[1] in ("float", "float32") for line in lines if line.startswith("property "))
    counts = [
        int(line.split()[2]) for line in lines if line.startswith("element ") and line.split()[2].isdigit()
    ]
    rows = data[end + len(b"end_header\n") :]
    expected = len(names) * 4 * counts[0] if len(counts) == 1 else -1
    needed = set(PLY_FIELDS) - {"nx", "ny", "nz"}
    if (
        "format binary_little_endian 1.0" not in lines
        or not floats
        or not needed <= set(names)
        or len(rows) != expected
    ):
        raise ValueError(
            f"{path}: expected a binary .ply of Gaussian splats, got another or a truncated one. Export it"
            " again."
        )
    table = torch.from_numpy(np.frombuffer(rows, "<f4").reshape(counts[0], -1).astype(np.float32))

    def columns(*wanted: str) -> torch.Tensor:
        return table[:, [names.index(name) for name in wanted]]

    scales = columns("scale_0", "scale_1", "scale_2").exp()
    rotations = columns("rot_0", "rot_1", "rot_2", "rot_3")
    return SplatAsset(
        means=columns("x", "y", "z"),
        features_dc=columns("f_dc_0", "f_dc_1", "f_dc_2"),
        scales=scales,
        rotations=torch.nn.functional.normalize(rotations, dim=1),
        opacities=columns("opacity")[:, 0].sigmoid(),
    )


TILE = 14  # pixels per side
# pixels^2 added to every Gaussian's variance on screen; its opacity is lowered to match (Yu et al. 2024,
# Mip-Splatting)
BLUR = 0.1
REACH = 3  # standard deviations beyond which a Gaussian is cut off
NEAR = 0.1
MAX_ALPHA = 0.99


@dataclass(frozen=True)
class View:
    """A pinhole camera; x to the right, y down, z forward."""

    rotation: torch.Tensor  # [3, 3], world to camera
    position: torch.Tensor  # [3], of the camera in the world
    focal: float  # in sides of the image

    def camera(self, xyz: torch.Tensor) -> torch.Tensor:
        """Points [G, 3] as the camera has them."""
        return (xyz - self.position.to(xyz)) @ self.rotation.to(xyz).T

    def project(self, xyz: torch.Tensor) -> torch.Tensor:
        """Points [G, 3] -> [G, 2] on the image, 0..1 from its upper left corner."""
        seen = self.camera(xyz)
        return self.focal * seen[:, :2] / seen[:, 2:] + 0.5


def views_around(count: int, radius: float = 2.0, fov: float = 40.0) -> list[View]:
    """Cameras spread evenly over a sphere, looking at its centre, z up; fov in degrees."""
    views = []
    for i in range(count):
        height = 1 - (2 * i + 1) / count
        turn = i * math.pi * (3 - math.sqrt(5))
        ring = math.sqrt(1 - height**2)
        position = torch.tensor([ring * math.cos(turn), ring * math.sin(turn), height])
        forward = -position
        up = torch.tensor([0.0, 0.0, 1.0]) if abs(height) < 0.999 else torch.tensor([0.0, 1.0, 0.0])
        right = torch.nn.functional.normalize(torch.linalg.cross(forward, up), dim=0)
        rotation = torch.stack([right, torch.linalg.cross(forward, right), forward])
        views.append(View(rotation, radius * position, 0.5 / math.tan(math.radians(fov) / 2)))
    return views


@torch.no_grad()
def render(asset: SplatAsset, view: View, size: int) -> torch.Tensor:
    """An image over black, [3, S, S] of 0..1. Not differentiable."""
    means, conics, alphas, reach, order = _on_screen(asset, view, size)
    colours = asset.colours[order]
    # [G, 2], boxes on screen
    low = means - reach[:, None]
    high = means + reach[:, None]
    image = means.new_zeros(3, size, size)
    for top in range(0, size, TILE):
        row = ((low[:, 1] < top + TILE) & (high[:, 1] > top)).nonzero()[:, 0]
        for left in range(0, size, TILE):
            near = row[(low[row, 0] < left + TILE) & (high[row, 0] > left)]
            if len(near):
                y, x = (
                    torch.arange(start, min(start + TILE, size), device=means.device) + 0.5
                    for start in (top, left)
                )
                tile = _tile(
                    torch.cartesian_prod(y, x).flip(1), means[near], conics[near], alphas[near], colours[near]
                )
                image[:, top : top + TILE, left : left + TILE] = tile.T.unflatten(1, (len(y), len(x)))
    return image


def _on_screen(asset: SplatAsset, view: View, size: int) -> tuple[torch.Tensor, ...]:
    """Centres, inverse covariances and reach in pixels, opacities, and the order from front to back of those
    in front of the camera.
    """
    seen = view.camera(asset.means.float())
    order = seen[:, 2].argsort()
    order = order[seen[order, 2] > NEAR]
    x, y, z = seen[order].unbind(1)
    f = view.focal * size
    zero = torch.zeros_like(z)
    # of the projection
    jacobian = torch.stack([f / z, zero, -f * x / z**2, zero, f / z, -f * y / z**2], 1).view(-1, 2, 3)
    axes = (
        jacobian
        @ view.rotation.to(seen)
        @ _rotations(asset.rotations[order].float())
        * asset.scales[order, None].float()
    )
    sharp = axes @ axes.mT  # [G, 2, 2]
    covariance = sharp + BLUR * torch.eye(2, device=seen.device)
    determinant = covariance.det()
    a = covariance[:, 0, 0]
    b = covariance[:, 0, 1]
    d = covariance[:, 1, 1]
    conics = torch.stack([d, -b, a], 1) / determinant[:, None]
    largest = (a + d) / 2 + ((a - d).square() / 4 + b.square()).sqrt()
    alphas = asset.opacities[order].float() * (sharp.det().clamp_min(0) / determinant).sqrt()
    means = torch.stack([f * x / z, f * y / z], 1) + size / 2
    return means, conics, alphas, REACH * largest.sqrt(), order


def _tile(
    pixels: torch.Tensor,
    means: torch.Tensor,
    conics: torch.Tensor,
    alphas: torch.Tensor,
    colours: torch.Tensor,
) -> torch.Tensor:
    """Colours [P, 3] of pixels [P, 2] behind Gaussians in order."""
    dx, dy = (pixels[:, None] - means).unbind(-1)  # [P, K] each
    a, b, d = conics.unbind(1)
    alpha = (alphas * torch.exp(-0.5 * (a * dx * dx + d * dy * dy) - b * dx * dy)).clamp_max(MAX_ALPHA)
    passed = torch.cumprod(1 - alpha, 1)
    left = torch.cat([torch.ones_like(passed[:, :1]), passed[:, :-1]], 1)
    return (alpha * left) @ colours


def _rotations(quaternions: torch.Tensor) -> torch.Tensor:
    """[G, 4] -> [G, 3, 3]."""
    w, x, y, z = torch.nn.functional.normalize(quaternions, dim=1).unbind(1)
    rows = [
        1 - 2 * (y * y + z * z),
        2 * (x * y - w * z),
        2 * (x * z + w * y),
        2 * (x * y + w * z),
        1 - 2 * (x * x + z * z),
        2 * (y * z - w * x),
        2 * (x * z - w * y),
        2 * (y * z + w * x),
        1 - 2 * (x * x + y * y),
    ]
    return torch.stack(rows, 1).view(-1, 3, 3)


@torch.no_grad()
def voxel_features(
    asset: SplatAsset, voxels: torch.Tensor, encoder: ImageEncoder, resolution: int = 64, views: int = 150
) -> torch.Tensor:
    """[v, E] float32: features of the patches that a voxel's centre falls on, interpolated, mean over views,
    hidden or not.
    """
    centres = (voxels.float() + 0.5) / resolution - 0.5  # [v, 3]
    total: Any = None
    for view in views_around(views):
        patches = encoder.patches(render(asset, view, encoder.size)[None])  # [1, E, 37, 37]
        places = (2 * view.project(centres) - 1).to(patches)[None, :, None]  # [1, v, 1, 2]
        seen = F.grid_sample(patches, places, mode="bilinear", align_corners=False)[0, :, :, 0].T
        total = seen if total is None else total + seen
    assert total is not None  # there is a view
    return total / views
