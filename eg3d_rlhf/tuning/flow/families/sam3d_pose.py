"""The pose of an object from the first stage's latents, in the camera's space: x left, y up, z forward.

Points of the object's own frame, z up, are rows p; they go to (s p) R + T. The flow gives six numbers of the
rotation, whose mean and standard deviation are the original's, T and s in units of the point map of its
conditioning, of which scale and shift are kept beside its tokens.

Shape letters: N samples.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

# the rotation's name where its numbers are normalised; else they are taken as they are
NORMALISED = "6drotation_normalized"
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
SHIFTED = "ScaleShiftInvariant"
DECODERS = (SHIFTED, "ApparentSize")


@dataclass(frozen=True)
class Pose:
    """Of N objects."""

    rotation: torch.Tensor  # [N, 3, 3] R
    translation: torch.Tensor  # [N, 3] T
    scale: torch.Tensor  # [N, 3] s, the same along all axes

    @property
    def quaternion(self) -> torch.Tensor:
        """[N, 4] of R, the real part first and not negative."""
        r = self.rotation.double()
        xx, yy, zz = r.diagonal(dim1=1, dim2=2).unbind(1)
        # 4 q^2
        squares = torch.stack([1 + xx + yy + zz, 1 + xx - yy - zz, 1 - xx + yy - zz, 1 - xx - yy + zz], 1)
        mixed = r - r.mT, r + r.mT
        # 4 q_i q_j
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
        # the row with the largest number: nothing is divided by almost 0
        best = rows[torch.arange(len(rows)), squares.argmax(1)]
        unit = best / best.norm(dim=1, keepdim=True)
        return torch.where(unit[:, :1] < 0, -unit, unit).float()


def decoded(
    latents: Mapping[str, torch.Tensor],
    how: str,
    scale: torch.Tensor,
    shift: torch.Tensor,
    factor: float = 1.0,
) -> Pose:
    """What latents [N, 1, .] by name say.

    Args: how: one of DECODERS; scale, shift: [N, 3] of the point maps; factor: by how much the shape was made
        small to be drawn.
    Raises: ValueError for latents without a pose.
    """
    name = NORMALISED if NORMALISED in latents else NORMALISED.partition("_")[0]
    missing = sorted({name, "translation", "scale", "translation_scale"} - set(latents))
    if missing:
        raise ValueError(
            f"pose: expected the latents of a pose, got no {', '.join(missing)}. Name SAM 3D's files."
        )
    six, place, size, apparent = (
        latents[key][:, 0].float() for key in (name, "translation", "scale", "translation_scale")
    )
    if name == NORMALISED:
        six = six * six.new_tensor(STD) + six.new_tensor(MEAN)
    first = torch.nn.functional.normalize(six[:, :3], dim=1)
    second = torch.nn.functional.normalize(
        six[:, 3:] - (first * six[:, 3:]).sum(1, keepdim=True) * first, dim=1
    )
    rotation = torch.stack([first, second, torch.linalg.cross(first, second)], 2)
    unit = scale if how == SHIFTED else scale * apparent.exp()
    sizes = (size.exp() * unit).mean(1, keepdim=True).expand(-1, 3)
    return Pose(rotation, place * unit + shift if how == SHIFTED else place * unit, factor * sizes)
