"""Decode the pose of an object of SAM 3D Objects from the latents of the first stage.

A point p of the object's own frame, a row vector with z up, is mapped to (s p) R + T in the camera's space,
where x points left, y up and z forward. The flow predicts six numbers for the rotation R (Zhou et al. 2019),
normalised by a published mean and standard deviation. The translation T and the size s are predicted in units
of the point map on which the flow is conditioned. The scale and the shift of the point map are stored beside
its tokens.

Shapes: N number of samples.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

# Name of the rotation's latent if its six numbers are normalised. Under the name "6drotation" they are not.
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
# Names of decoders of a pose in pipeline.yaml. With SHIFTED, T and s are in units of the point map's scale,
# and T is relative to its shift. With ApparentSize, T and s are also multiplied by a predicted scale.
SHIFTED = "ScaleShiftInvariant"
DECODERS = (SHIFTED, "ApparentSize")


@dataclass(frozen=True)
class Pose:
    """Poses of N objects in the camera's space; see the module's docstring."""

    rotation: torch.Tensor  # R, [N, 3, 3]
    translation: torch.Tensor  # T, [N, 3]
    scale: torch.Tensor  # s, [N, 3], the same along all axes

    @property
    def quaternion(self) -> torch.Tensor:
        """Unit quaternions of R, [N, 4], real part first and not negative."""
        # In float64, because squares of small components are differences of large numbers.
        r = self.rotation.double()
        xx, yy, zz = r.diagonal(dim1=1, dim2=2).unbind(1)
        # 4 q_i^2 for the components w, x, y, z of the quaternion q (Shepperd 1978).
        squares = torch.stack([1 + xx + yy + zz, 1 + xx - yy - zz, 1 - xx + yy - zz, 1 - xx - yy + zz], 1)
        # 4 q_i q_j of different components, from the antisymmetric and the symmetric part of R, times 2.
        antisymmetric_part = r - r.mT
        symmetric_part = r + r.mT
        wx = antisymmetric_part[:, 2, 1]
        wy = antisymmetric_part[:, 0, 2]
        wz = antisymmetric_part[:, 1, 0]
        xy = symmetric_part[:, 0, 1]
        xz = symmetric_part[:, 0, 2]
        yz = symmetric_part[:, 1, 2]
        w, x, y, z = squares.unbind(1)
        scaled_quaternions = torch.stack(
            [
                torch.stack(row_elements, 1)
                for row_elements in ((w, wx, wy, wz), (wx, x, xy, xz), (wy, xy, y, yz), (wz, xz, yz, z))
            ],
            1,
        )
        # Each row is 4 q_i times the quaternion. The row of the largest component is the most accurate,
        # because its length is never close to 0.
        longest_row = scaled_quaternions[torch.arange(len(scaled_quaternions)), squares.argmax(1)]
        unit_quaternions = longest_row / longest_row.norm(dim=1, keepdim=True)
        # q and -q are the same rotation; the sign is fixed by the real part.
        return torch.where(unit_quaternions[:, :1] < 0, -unit_quaternions, unit_quaternions).float()


def decode_pose(
    latents: Mapping[str, torch.Tensor],
    decoder_name: str,
    scale: torch.Tensor,
    shift: torch.Tensor,
    shrink_factor: float = 1.0,
) -> Pose:
    """Decode poses from the latents of the first stage.

    Args:
        latents: latents by name; those of the pose are [N, 1, channels].
        decoder_name: name of the decoder, one of DECODERS.
        scale: scales of the point maps, [N, 3].
        shift: shifts of the point maps, [N, 3].
        shrink_factor: factor by which the shape was shrunk before the second stage; see
            `sam3d.reduce_voxels`. The size is multiplied by it.
    Raises: ValueError if a latent of the pose is missing.
    """
    rotation_name = NORMALISED if NORMALISED in latents else NORMALISED.partition("_")[0]
    missing_names = sorted({rotation_name, "translation", "scale", "translation_scale"} - set(latents))
    if missing_names:
        raise ValueError(
            f"pose: the latents {', '.join(missing_names)} are missing, so there is no pose. Use the"
            " generator's files of SAM 3D Objects."
        )
    # Each latent of the pose is a single token: [N, 1, channels] -> [N, channels].
    rotation_6d, translation, log_size, log_translation_scale = (
        latents[latent_name][:, 0].float()
        for latent_name in (rotation_name, "translation", "scale", "translation_scale")
    )
    if rotation_name == NORMALISED:
        rotation_6d = rotation_6d * rotation_6d.new_tensor(STD) + rotation_6d.new_tensor(MEAN)
    # Gram-Schmidt: the six numbers are the first two columns of R before normalisation (Zhou et al. 2019).
    column_1 = torch.nn.functional.normalize(rotation_6d[:, :3], dim=1)
    projection = (column_1 * rotation_6d[:, 3:]).sum(1, keepdim=True) * column_1
    column_2 = torch.nn.functional.normalize(rotation_6d[:, 3:] - projection, dim=1)
    rotation = torch.stack([column_1, column_2, torch.linalg.cross(column_1, column_2)], 2)
    # Length of a unit of the latents in the camera's space, [N, 3].
    unit_length = scale if decoder_name == SHIFTED else scale * log_translation_scale.exp()
    translation = translation * unit_length
    if decoder_name == SHIFTED:
        translation = translation + shift
    # As in the original, the mean over the axes is the size along all axes.
    object_size = (log_size.exp() * unit_length).mean(1, keepdim=True).expand(-1, 3)
    return Pose(rotation, translation, shrink_factor * object_size)
