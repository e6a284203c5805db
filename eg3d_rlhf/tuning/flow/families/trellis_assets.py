"""Finished assets of TRELLIS: Gaussians in a cube of side 1 about the origin.

This module reads and writes their files, finds the voxels that they fill, renders them in plain PyTorch
(slow, exact, on any device), and computes the image features that the encoder of the second stage reads.

Shape letters: G Gaussians, R voxels per axis, S pixels per side, P pixels of a tile, K Gaussians that reach
the tile, v voxels, E channels of a feature.
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

SH_C0 = 0.28209479177387814  # value of the constant spherical harmonic, 1 / (2 sqrt(pi))
PLY_FIELDS = (  # columns of the usual file of Gaussian splats, in order
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
    """A finished asset: Gaussians with one colour each."""

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
        """Colours of 0..1, [G, 3], the same from every direction."""
        return (0.5 + SH_C0 * self.features_dc).clamp(0, 1)

    def to(self, device: str | torch.device) -> "SplatAsset":
        """Return the asset on another device."""
        return SplatAsset(**{name: tensor.to(device) for name, tensor in vars(self).items()})


def voxels_filled(asset: SplatAsset, resolution: int = 64, share: float = 0.25) -> torch.Tensor:
    """Return the voxels that an asset fills, [v, 3] int32 on the CPU, sorted.

    A voxel is filled if the opacities of the Gaussians in it add up to at least `share` of the mean over
    voxels that hold the centre of a Gaussian.

    Deviates: TRELLIS's data tools voxelise a mesh's surface; `calibrated` finds the share that comes closest.

    Raises: ValueError for an asset that fills no voxel.
    """
    mass, usual = _mass(asset, resolution)
    # Voxels without opacity never count, also for a share of 0. Flat index = (x R + y) R + z.
    places = ((mass >= share * usual) & (mass > 0)).nonzero()[:, 0]
    return torch.stack(
        [places // resolution**2, places // resolution % resolution, places % resolution], 1
    ).int()


def _mass(asset: SplatAsset, resolution: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum the opacities in each voxel, [R^3], and average them over voxels that hold any, []."""
    # On the CPU, index_add sums in a fixed order; on a GPU the order of threads varies.
    asset = asset.to("cpu")
    cells = ((asset.means + 0.5) * resolution).floor().long()  # [G, 3]
    # Gaussians outside the cube are ignored
    inside = ((cells >= 0) & (cells < resolution)).all(1) & torch.isfinite(asset.opacities)
    x, y, z = cells[inside].unbind(1)
    mass = asset.opacities.new_zeros(resolution**3).index_add(
        0, (x * resolution + y) * resolution + z, asset.opacities[inside]
    )
    filled = mass > 0
    if not filled.any():
        raise ValueError(
            "voxels: the asset has no visible Gaussian within the cube -0.5..0.5. Leave the asset out."
        )
    return mass, mass[filled].mean()


SHARES = tuple(2.0**k for k in range(-8, 3))  # tried by `calibrated`


def calibrated(
    assets: Sequence[SplatAsset], voxels: Sequence[torch.Tensor], resolution: int = 64
) -> dict[str, float | list]:
    """Find the share at which assets best match the voxels that they were made on.

    TRELLIS makes Gaussians on the voxels of a mesh's surface, so these voxels are what its data tools would
    find for such an asset.

    Args: voxels: [v, 3] of each asset.
    Returns: {"share", "iou": mean intersection over union at this share, "tried": [[share, iou], ...]}, in
        JSON types.
    """
    assert len(assets) == len(voxels)
    if not assets:
        raise ValueError("--list: the list holds no assets. Sample some.")
    overlaps = torch.zeros(len(SHARES), dtype=torch.float64)
    for asset, source_voxels in zip(assets, voxels, strict=True):
        x, y, z = source_voxels.cpu().long().unbind(1)
        target = torch.zeros(resolution**3, dtype=torch.bool)
        target[(x * resolution + y) * resolution + z] = True
        # The sums are the same for all shares, so they are computed once per asset.
        mass, usual = _mass(asset, resolution)
        for i, share in enumerate(SHARES):
            filled = (mass >= share * usual) & (mass > 0)
            overlaps[i] += (filled & target).sum() / (filled | target).sum()
    ious = (overlaps / len(assets)).tolist()  # mean over assets, one per share
    best = max(range(len(SHARES)), key=lambda i: ious[i])
    return {
        "share": SHARES[best],
        "iou": ious[best],
        "tried": [[share, iou] for share, iou in zip(SHARES, ious, strict=True)],
    }


def write_ply(path: Path, asset: SplatAsset) -> None:
    """Write the usual file of Gaussian splats, with opacities as logits and scales as logarithms."""
    # Clamped, so that opacities of 0 and 1 have finite logits.
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
    """Write an asset as .ply, in its own frame."""
    file = path.with_name(path.name + ".ply")
    write_ply(file, asset)
    return file


@torch.no_grad()
def decoded(pipeline: OpenedFolder, decoder: str, x_0: SparseBatch) -> list[SplatAsset]:
    """Decode latents of a pipeline's last stage to assets, one by one.

    Args: decoder: name of the part that decodes Gaussians.
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
    """Read a file of `write_ply`, or of another program.

    Higher spherical harmonics, which make colours depend on the viewing direction, are ignored.

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
    # Exactly one element, the vertices, and float32 columns alone: then rows have a fixed length.
    expected = len(names) * 4 * counts[0] if len(counts) == 1 else -1
    # Normals are always zero and other programs may leave them out.
    needed = set(PLY_FIELDS) - {"nx", "ny", "nz"}
    if (
        "format binary_little_endian 1.0" not in lines
        or not floats
        or not needed <= set(names)
        or len(rows) != expected
    ):
        raise ValueError(
            f"{path}: expected a binary little-endian .ply of Gaussian splats; the file is of another kind or"
            " truncated. Export it again."
        )
    table = torch.from_numpy(np.frombuffer(rows, "<f4").reshape(counts[0], -1).astype(np.float32))

    def columns(*fields: str) -> torch.Tensor:
        return table[:, [names.index(name) for name in fields]]

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
# Pixels^2 added to every Gaussian's variance on screen. Its opacity is lowered to match (Yu et al. 2024,
# Mip-Splatting).
BLUR = 0.1
REACH = 3  # standard deviations beyond which a Gaussian is cut off
NEAR = 0.1  # smallest depth in front of the camera that is rendered
MAX_ALPHA = 0.99  # largest opacity of a Gaussian at a pixel (Kerbl et al. 2023)


@dataclass(frozen=True)
class View:
    """Pinhole camera with x to the right, y down and z forward."""

    rotation: torch.Tensor  # [3, 3], world to camera
    position: torch.Tensor  # [3], camera centre in the world
    focal: float  # focal length in sides of the image

    def camera(self, xyz: torch.Tensor) -> torch.Tensor:
        """Transform points [G, 3] from the world to the camera's frame."""
        return (xyz - self.position.to(xyz)) @ self.rotation.to(xyz).T

    def project(self, xyz: torch.Tensor) -> torch.Tensor:
        """Project points [G, 3] to the image, [G, 2] of 0..1 from its upper left corner."""
        in_camera = self.camera(xyz)
        return self.focal * in_camera[:, :2] / in_camera[:, 2:] + 0.5


def views_around(count: int, radius: float = 2.0, fov: float = 40.0) -> list[View]:
    """Place cameras evenly on a sphere around the origin, looking at it, with z up.

    Args:
        radius: distance from the origin.
        fov: field of view in degrees.
    """
    views = []
    for i in range(count):
        # Fibonacci sphere: even heights, and turns by the golden angle.
        height = 1 - (2 * i + 1) / count
        turn = i * math.pi * (3 - math.sqrt(5))
        ring = math.sqrt(1 - height**2)  # radius of the circle at this height
        position = torch.tensor([ring * math.cos(turn), ring * math.sin(turn), height])
        forward = -position
        # At the poles z is the viewing direction, so another axis must be up.
        up = torch.tensor([0.0, 0.0, 1.0]) if abs(height) < 0.999 else torch.tensor([0.0, 1.0, 0.0])
        right = torch.nn.functional.normalize(torch.linalg.cross(forward, up), dim=0)
        rotation = torch.stack([right, torch.linalg.cross(forward, right), forward])
        views.append(View(rotation, radius * position, 0.5 / math.tan(math.radians(fov) / 2)))
    return views


@torch.no_grad()
def render(asset: SplatAsset, view: View, size: int) -> torch.Tensor:
    """Render an asset over black, [3, S, S] of 0..1. Not differentiable."""
    means, conics, alphas, reach, order = _on_screen(asset, view, size)
    colours = asset.colours[order]
    # Bounding boxes on screen, [G, 2] each.
    low = means - reach[:, None]
    high = means + reach[:, None]
    image = means.new_zeros(3, size, size)
    for top in range(0, size, TILE):
        row = ((low[:, 1] < top + TILE) & (high[:, 1] > top)).nonzero()[:, 0]
        for left in range(0, size, TILE):
            # Gaussians that reach this tile, still in the order of depth.
            near = row[(low[row, 0] < left + TILE) & (high[row, 0] > left)]
            if len(near):
                # Pixel centres; the last tiles may be cut off by the border.
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
    """Project the Gaussians in front of the camera.

    Returns: centres in pixels, inverse covariances, opacities, reach in pixels, and the order from front to
        back.
    """
    in_camera = view.camera(asset.means.float())
    order = in_camera[:, 2].argsort()
    order = order[in_camera[order, 2] > NEAR]
    x, y, z = in_camera[order].unbind(1)
    f = view.focal * size  # focal length in pixels
    zero = torch.zeros_like(z)
    # Jacobian of the projection at the centre (Zwicker et al. 2001, EWA splatting): [G, 2, 3].
    jacobian = torch.stack([f / z, zero, -f * x / z**2, zero, f / z, -f * y / z**2], 1).view(-1, 2, 3)
    axes = (
        jacobian
        @ view.rotation.to(in_camera)
        @ _rotations(asset.rotations[order].float())
        * asset.scales[order, None].float()
    )
    sharp = axes @ axes.mT  # covariance on screen before the blur, [G, 2, 2]
    covariance = sharp + BLUR * torch.eye(2, device=in_camera.device)
    determinant = covariance.det()
    a = covariance[:, 0, 0]
    b = covariance[:, 0, 1]
    d = covariance[:, 1, 1]
    # Inverse of [[a, b], [b, d]] as its three numbers, and its largest eigenvalue.
    conics = torch.stack([d, -b, a], 1) / determinant[:, None]
    largest = (a + d) / 2 + ((a - d).square() / 4 + b.square()).sqrt()
    alphas = asset.opacities[order].float() * (sharp.det().clamp_min(0) / determinant).sqrt()
    # In pixels; the image's centre is on the optical axis.
    means = torch.stack([f * x / z, f * y / z], 1) + size / 2
    return means, conics, alphas, REACH * largest.sqrt(), order


def _tile(
    pixels: torch.Tensor,
    means: torch.Tensor,
    conics: torch.Tensor,
    alphas: torch.Tensor,
    colours: torch.Tensor,
) -> torch.Tensor:
    """Blend Gaussians, ordered from front to back, to the colours [P, 3] of pixels [P, 2]."""
    dx, dy = (pixels[:, None] - means).unbind(-1)  # [P, K] each
    a, b, d = conics.unbind(1)
    alpha = (alphas * torch.exp(-0.5 * (a * dx * dx + d * dy * dy) - b * dx * dy)).clamp_max(MAX_ALPHA)
    # Light that passes the Gaussians in front (Kerbl et al. 2023, equation 3): an exclusive product.
    passed = torch.cumprod(1 - alpha, 1)
    transmittance = torch.cat([torch.ones_like(passed[:, :1]), passed[:, :-1]], 1)
    return (alpha * transmittance) @ colours


def _rotations(quaternions: torch.Tensor) -> torch.Tensor:
    """Convert quaternions [G, 4], real part first, to rotation matrices [G, 3, 3]."""
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
    """Compute features [v, E] float32 of voxels: image features at the projections of their centres.

    Features are interpolated between patches and averaged over views, whether the voxel is visible or not, as
    TRELLIS does.
    """
    centres = (voxels.float() + 0.5) / resolution - 0.5  # [v, 3]
    total: Any = None
    for view in views_around(views):
        patches = encoder.patches(render(asset, view, encoder.size)[None])  # [1, E, 37, 37]
        # grid_sample expects coordinates of -1..1: [1, v, 1, 2] -> [1, E, v, 1] -> [v, E].
        places = (2 * view.project(centres) - 1).to(patches)[None, :, None]
        sampled = F.grid_sample(patches, places, mode="bilinear", align_corners=False)[0, :, :, 0].T
        total = sampled if total is None else total + sampled
    assert total is not None  # there is a view
    return total / views
