"""Finished assets of TRELLIS: Gaussian splats in a cube of side 1 about the origin.

This module reads and writes their files, finds the voxels that they fill, and computes the image features
that the encoder of the second stage reads, from renders of geometry/splat_rendering.py.

Shapes: G number of Gaussians, R voxels per axis, v number of voxels, E channels of a feature.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from eg3d_rlhf.core.shapes import check_shape
from eg3d_rlhf.geometry.splat_rendering import render, views_around
from eg3d_rlhf.models.sparse import SparseBatch, SparseSample
from eg3d_rlhf.tuning.flow.families.encoders import ImageEncoder
from eg3d_rlhf.tuning.flow.families.folder import OpenedFolder, check_finite
from training.storage import write_atomic

SH_C0 = 0.28209479177387814  # value of the constant spherical harmonic, 1 / (2 sqrt(pi))
PLY_FIELDS = (  # columns of the common .ply format of Gaussian splats, in order
    *("x", "y", "z", "nx", "ny", "nz"),
    *(f"f_dc_{i}" for i in range(3)),
    "opacity",
    *(f"scale_{i}" for i in range(3)),
    *(f"rot_{i}" for i in range(4)),
)
SHAPES: dict[str, list[int | str]] = {  # field of SplatAsset -> its shape
    "means": ["G", 3],
    "features_dc": ["G", 3],
    "scales": ["G", 3],
    "rotations": ["G", 4],
    "opacities": ["G"],
}


@dataclass(frozen=True, kw_only=True)
class SplatAsset:
    """A finished asset: Gaussians with one colour each, the same from every direction."""

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
        """RGB colours of 0..1, [G, 3]."""
        return (0.5 + SH_C0 * self.features_dc).clamp(0, 1)

    def to(self, device: str | torch.device) -> "SplatAsset":
        """Return the asset on another device."""
        return SplatAsset(**{name: tensor.to(device) for name, tensor in vars(self).items()})


def find_filled_voxels(asset: SplatAsset, resolution: int = 64, share: float = 0.25) -> torch.Tensor:
    """Return the indices of the voxels that an asset fills, [v, 3] int32 on the CPU, sorted.

    The mass of a voxel is the sum of the opacities of the Gaussians with their centres in it. A voxel is
    filled if its mass is at least `share` times the mean mass of all voxels with a mass above 0.

    Deviates: TRELLIS's data tools find the voxels that a mesh's surface passes through. `find_best_share`
        finds the share that comes closest to this.

    Args:
        asset: Gaussians in the cube -0.5..0.5.
        resolution: R, voxels per axis.
        share: share of the mean mass, >= 0.
    Raises: ValueError for an asset that fills no voxel.
    """
    voxel_mass, mean_mass = _mass(asset, resolution)
    # Voxels without mass are never filled, not even for a share of 0.
    flat_index = ((voxel_mass >= share * mean_mass) & (voxel_mass > 0)).nonzero()[:, 0]  # (x R + y) R + z
    return torch.stack(
        [flat_index // resolution**2, flat_index // resolution % resolution, flat_index % resolution], 1
    ).int()


def _mass(asset: SplatAsset, resolution: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the mass of each voxel, that is the sum of the opacities of the Gaussians in it.

    Returns: masses [R^3], and the mean mass of voxels with a mass above 0, a scalar.
    Raises: ValueError if no voxel has a mass above 0.
    """
    # On the CPU, index_add sums in a fixed order; on a GPU the order of threads varies.
    asset = asset.to("cpu")
    cells = ((asset.means + 0.5) * resolution).floor().long()  # [G, 3]
    # Gaussians outside the cube are ignored.
    is_inside = ((cells >= 0) & (cells < resolution)).all(1) & torch.isfinite(asset.opacities)
    x, y, z = cells[is_inside].unbind(1)
    mass = asset.opacities.new_zeros(resolution**3).index_add(
        0, (x * resolution + y) * resolution + z, asset.opacities[is_inside]
    )
    has_mass = mass > 0
    if not has_mass.any():
        raise ValueError(
            "voxels: the asset has no Gaussian with opacity in the cube -0.5..0.5. Scale the asset into"
            " this cube, or remove it from the list of assets."
        )
    return mass, mass[has_mass].mean()


SHARES = tuple(2.0**k for k in range(-8, 3))  # shares that `find_best_share` compares, 1/256..4


def find_best_share(
    assets: Sequence[SplatAsset], voxels: Sequence[torch.Tensor], resolution: int = 64
) -> dict[str, float | list]:
    """Find the argument `share` of `find_filled_voxels` at which assets best match their own voxels.

    An asset's own voxels are those from which it was decoded. TRELLIS places Gaussians on the voxels that a
    surface passes through. These voxels are therefore what its data tools would find for such an asset.

    Args:
        assets: assets that TRELLIS decoded, at least one.
        voxels: voxels of the latents of each asset, [v, 3] integers.
        resolution: R, voxels per axis.
    Returns: a dictionary in JSON types: "share" is the best of SHARES, "iou" the mean intersection over union
        at this share, and "tried" a list of [share, iou] for all of SHARES.
    Raises: ValueError if there are no assets.
    """
    assert len(assets) == len(voxels)
    if not assets:
        raise ValueError(
            "voxel_share: there are no assets to compare. Sample assets first with `eg3d-rlhf flow sample`."
        )
    iou_sums = torch.zeros(len(SHARES), dtype=torch.float64)
    for asset, source_voxels in zip(assets, voxels, strict=True):
        x, y, z = source_voxels.cpu().long().unbind(1)
        is_source = torch.zeros(resolution**3, dtype=torch.bool)
        is_source[(x * resolution + y) * resolution + z] = True
        # The sums are the same for all shares, so they are computed once per asset.
        voxel_mass, mean_mass = _mass(asset, resolution)
        for i, share in enumerate(SHARES):
            is_filled = (voxel_mass >= share * mean_mass) & (
                voxel_mass > 0
            )  # the condition of `find_filled_voxels`
            iou_sums[i] += (is_filled & is_source).sum() / (is_filled | is_source).sum()
    ious = (iou_sums / len(assets)).tolist()  # mean over assets, one per share
    # Index of the largest value; the smallest share if several are equal.
    best_index = max(range(len(SHARES)), key=lambda i: ious[i])
    return {
        "share": SHARES[best_index],
        "iou": ious[best_index],
        "tried": [[share, iou] for share, iou in zip(SHARES, ious, strict=True)],
    }


def write_ply(path: Path, asset: SplatAsset) -> None:
    """Write an asset in the common .ply format of Gaussian splats.

    The format stores opacities as logits and scales as natural logarithms.
    """
    # Clamped, so that opacities of 0 and 1 have finite logits.
    opacity = asset.opacities.clamp(1e-6, 1 - 1e-6).logit()[:, None]
    columns = [
        asset.means,
        # Normals, which the format has but Gaussians do not.
        torch.zeros_like(asset.means),
        asset.features_dc,
        opacity,
        asset.scales.log(),
        asset.rotations,
    ]
    # "<f4" is little-endian float32, as the header below states.
    row_array = torch.cat([c.detach().float().cpu() for c in columns], 1).numpy().astype("<f4")
    properties = "".join(f"property float {name}\n" for name in PLY_FIELDS)
    header = (
        f"ply\nformat binary_little_endian 1.0\nelement vertex {len(row_array)}\n{properties}end_header\n"
    )
    write_atomic(path, header.encode() + row_array.tobytes())


def show(asset: SplatAsset, path: Path) -> Path:
    """Write an asset to <path>.ply, in its own frame, and return the path of the file."""
    # Appended and not replaced as a suffix, because names may contain dots.
    file = path.with_name(path.name + ".ply")
    write_ply(file, asset)
    return file


@torch.no_grad()
def decode_gaussians(pipeline: OpenedFolder, decoder_name: str, x_0: SparseBatch) -> list[SplatAsset]:
    """Decode latents of a pipeline's last stage to assets, one sample at a time.

    Args:
        pipeline: pipeline with the decoder.
        decoder_name: name of the decoder of Gaussians in the pipeline.
        x_0: latents on voxels, in the scale of the stage's flow.
    Raises: ValueError for latents that are not finite.
    """
    check_finite("decode", x_0)
    assets = []
    for sample in x_0.samples():
        latent = SparseSample(sample.coords, pipeline.unnormalised(sample.feats.float()))
        (gaussians,) = pipeline.part(decoder_name)(SparseBatch.join([latent]).to(pipeline.device))
        assets.append(
            SplatAsset(
                means=gaussians.means,
                # [G, 1, 3] -> [G, 3]: only the constant spherical harmonic.
                features_dc=gaussians.features_dc[:, 0],
                scales=gaussians.scales,
                rotations=gaussians.rotations,
                opacities=gaussians.opacities[:, 0],
            )
        )
    return assets


def read_ply(path: Path) -> SplatAsset:
    """Read a .ply file of Gaussian splats, written by `write_ply` or by another program.

    Higher spherical harmonics, which make colours depend on the viewing direction, are ignored.

    Raises: FileNotFoundError for a missing file; ValueError for a file of another kind, or a truncated one.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"asset: the file {path} does not exist. Correct the path of the .ply file of Gaussians."
        )
    ply_bytes = path.read_bytes()
    header_end = ply_bytes.find(b"end_header\n")  # -1, that is no header, for other files
    header_lines = ply_bytes[: max(header_end, 0)].decode("ascii", "replace").splitlines()
    # Lines such as "property float x" and "element vertex 1000".
    properties = [header_line.split() for header_line in header_lines if header_line.startswith("property ")]
    property_names = [line_words[-1] for line_words in properties]
    are_all_float32 = all(line_words[1] in ("float", "float32") for line_words in properties)
    elements = [header_line.split() for header_line in header_lines if header_line.startswith("element ")]
    row_counts = [int(line_words[2]) for line_words in elements if line_words[2].isdigit()]
    if "format binary_little_endian 1.0" not in header_lines:
        raise ValueError(
            f"{path}: the file is not a binary little-endian .ply. Export it again in this format."
        )
    # Normals are always zero, and other programs may leave them out.
    missing_names = sorted(set(PLY_FIELDS) - {"nx", "ny", "nz"} - set(property_names))
    if missing_names:
        raise ValueError(
            f"{path}: the properties {', '.join(missing_names)} of Gaussian splats are missing. Export the"
            " file again as Gaussian splats."
        )
    # With a single element, the Gaussians, and only float32 properties, all rows have the same length.
    if not are_all_float32 or len(row_counts) != 1:
        raise ValueError(
            f"{path}: expected one element with only float32 properties, got {len(row_counts)} elements or"
            " other types. Export the file again as Gaussian splats."
        )
    row_bytes = ply_bytes[header_end + len(b"end_header\n") :]
    expected_byte_count = len(property_names) * 4 * row_counts[0]  # 4 bytes per float32
    if len(row_bytes) != expected_byte_count:
        raise ValueError(
            f"{path}: expected {expected_byte_count} bytes after the header, got {len(row_bytes)}. The file"
            " is truncated or damaged. Export it again."
        )
    row_table = torch.from_numpy(
        np.frombuffer(row_bytes, "<f4").reshape(row_counts[0], -1).astype(np.float32)
    )

    def select_columns(*fields: str) -> torch.Tensor:
        """Return the columns [G, properties] of the named properties."""
        return row_table[:, [property_names.index(name) for name in fields]]

    scales = select_columns("scale_0", "scale_1", "scale_2").exp()
    rotations = select_columns("rot_0", "rot_1", "rot_2", "rot_3")
    return SplatAsset(
        means=select_columns("x", "y", "z"),
        features_dc=select_columns("f_dc_0", "f_dc_1", "f_dc_2"),
        scales=scales,
        # Other programs may write quaternions that are not normalised.
        rotations=torch.nn.functional.normalize(rotations, dim=1),
        opacities=select_columns("opacity")[:, 0].sigmoid(),
    )


@torch.no_grad()
def voxel_features(
    asset: SplatAsset,
    voxels: torch.Tensor,
    encoder: ImageEncoder,
    resolution: int = 64,
    view_count: int = 150,
) -> torch.Tensor:
    """Compute features of voxels from renders of an asset, as TRELLIS does.

    The centre of a voxel is projected to each render. The image encoder's features at this position are
    interpolated between patches, and averaged over all renders, also over those in which the voxel is hidden.

    Args:
        asset: Gaussians.
        voxels: voxels [v, 3] int32.
        encoder: image encoder.
        resolution: R, voxels per axis.
        view_count: number of renders, at least 1.
    Returns: features [v, E] float32.
    """
    centres = (voxels.float() + 0.5) / resolution - 0.5  # [v, 3]
    feature_sum: Any = None
    for view in views_around(view_count):
        patches = encoder.patches(render(asset, view, encoder.size)[None])  # [1, E, 37, 37]
        # grid_sample expects coordinates of -1..1: [1, v, 1, 2] -> [1, E, v, 1] -> [v, E].
        coordinates = (2 * view.project(centres) - 1).to(patches)[None, :, None]
        sampled_features = F.grid_sample(patches, coordinates, mode="bilinear", align_corners=False)[
            0, :, :, 0
        ].T
        feature_sum = sampled_features if feature_sum is None else feature_sum + sampled_features
    assert feature_sum is not None  # holds because view_count >= 1
    return feature_sum / view_count
