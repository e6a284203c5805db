"""Pose of an object from the first stage's latents, in the camera's space: x left, y up, z forward.

Points of the object's own frame, with z up, are rows p. They are mapped to (s p) R + T. The flow predicts six
numbers for the rotation, normalised by the original's mean and standard deviation. T and s are in units of
the conditioning's point map, whose scale and shift are stored beside its tokens.

Shape letters: N samples.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

# Name of the rotation's latent if its numbers are normalised. Under any other name they are used unchanged.
NORMALISED = "6drotation_normalized"
# Published statistics of the six numbers.
MEAN = (
    -0.06366084883674913,
    0.008438224692279752,
    0.00017084786438302483,
    0.0007126610473540038,
    -0.0030916726538816417,
    0.5166093753457688,
)
STD = (
    0.6656971967514863,
    0.6787012271867754,
    0.30345010594844524,
    0.4394504420678794,
    0.39817973931717104,
    0.6176286868761914,
)
# Ways to decode a pose: in units of the point map, shifted, or by the apparent size.
SHIFTED = "ScaleShiftInvariant"
DECODERS = (SHIFTED, "ApparentSize")


@dataclass(frozen=True)
class Pose:
    """Poses of N objects."""

    rotation: torch.Tensor  # [N, 3, 3] R
    translation: torch.Tensor  # [N, 3] T
    scale: torch.Tensor  # [N, 3] s, the same along all axes

    @property
    def quaternion(self) -> torch.Tensor:
        """Unit quaternions of R, [N, 4], real part first and not negative."""
        # In float64, because squares of small components are differences of large numbers.
        r = self.rotation.double()
        xx, yy, zz = r.diagonal(dim1=1, dim2=2).unbind(1)
        # 4 q_i^2 for w, x, y, z (Shepperd 1978).
        squares = torch.stack([1 + xx + yy + zz, 1 + xx - yy - zz, 1 - xx + yy - zz, 1 - xx - yy + zz], 1)
        mixed = r - r.mT, r + r.mT  # antisymmetric and symmetric part, times 2
        # 4 q_i q_j of different components, from the antisymmetric and the symmetric part of R.
        wx = mixed[0][:, 2, 1]
        wy = mixed[0][:, 0, 2]
        wz = mixed[0][:, 1, 0]
        xy = mixed[1][:, 0, 1]
        xz = mixed[1][:, 0, 2]
        yz = mixed[1][:, 1, 2]
        w, x, y, z = squares.unbind(1)
        rows = torch.stack(
            [
                torch.stack(row, 1)
                for row in ((w, wx, wy, wz), (wx, x, xy, xz), (wy, xy, y, yz), (wz, xz, yz, z))
            ],
            1,
        )
        # Each row is 4 q_i times the quaternion. The row of the largest component is the most accurate,
        # because its length is never close to 0.
        best = rows[torch.arange(len(rows)), squares.argmax(1)]
        unit = best / best.norm(dim=1, keepdim=True)
        # q and -q are the same rotation; the sign is fixed by the real part.
        return torch.where(unit[:, :1] < 0, -unit, unit).float()


def decoded(
    latents: Mapping[str, torch.Tensor],
    how: str,
    scale: torch.Tensor,
    shift: torch.Tensor,
    factor: float = 1.0,
) -> Pose:
    """Decode the pose from latents [N, 1, .] by name.

    Args:
        how: one of DECODERS.
        scale, shift: [N, 3], of the point maps.
        factor: by how much the shape was shrunk before the second stage; see `sam3d.thinned`.
    Raises: ValueError for latents without a pose.
    """
    name = NORMALISED if NORMALISED in latents else NORMALISED.partition("_")[0]
    missing = sorted({name, "translation", "scale", "translation_scale"} - set(latents))
    if missing:
        raise ValueError(
            f"pose: expected the latents of a pose, but {', '.join(missing)} is missing. Use the files of"
            " SAM 3D Objects."
        )
    six, place, size, apparent = (
        latents[key][:, 0].float() for key in (name, "translation", "scale", "translation_scale")
    )
    if name == NORMALISED:
        six = six * six.new_tensor(STD) + six.new_tensor(MEAN)
    # Gram-Schmidt: the six numbers are two columns of R (Zhou et al. 2019).
    first = torch.nn.functional.normalize(six[:, :3], dim=1)
    second = torch.nn.functional.normalize(
        six[:, 3:] - (first * six[:, 3:]).sum(1, keepdim=True) * first, dim=1
    )
    rotation = torch.stack([first, second, torch.linalg.cross(first, second)], 2)
    # length of a unit of the latents in the camera's space
    unit = scale if how == SHIFTED else scale * apparent.exp()
    # The size is a logarithm; one mean for all axes, as in the original.
    sizes = (size.exp() * unit).mean(1, keepdim=True).expand(-1, 3)
    return Pose(rotation, place * unit + shift if how == SHIFTED else place * unit, factor * sizes)
