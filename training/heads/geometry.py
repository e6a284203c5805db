"""Dimensions of heads, in world units, from their normalised shape parameters.

Shape letters: N heads, S shape parameters.
"""

from dataclasses import dataclass

import torch

from training.heads.family import SHAPE_COUNT, SHAPE_NAMES

Radii = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # INVERSE radii along x, y, z, each [N, 1]

JAW_Y, BROW_Y, NOSE_TOP, NOSE_LENGTH, NECK_Y = -0.055, 0.050, 0.045, 0.090, -0.25


@dataclass(frozen=True, kw_only=True)
class HeadGeometry:
    """Sizes and places of the parts; every tensor is [N, 1], lengths in world units. Differentiable in the parameters."""

    skull: Radii
    jaw: Radii
    jaw_y: torch.Tensor
    chin_y: torch.Tensor
    chin_z: torch.Tensor
    cheek_x: torch.Tensor
    cheek_radius: torch.Tensor
    brow_z: torch.Tensor
    brow_bend: torch.Tensor  # lowering of the painted eyebrow
    eye_x: torch.Tensor
    eye_y: float
    eye_z: torch.Tensor
    eye_radius: torch.Tensor
    socket: Radii
    lid_opening: Radii
    nose_reach: torch.Tensor  # how far the tip lies before the root
    nose_scale: torch.Tensor
    wing: torch.Tensor  # radius of the nostril wings
    wing_z: torch.Tensor
    ear: Radii
    ear_x: torch.Tensor
    neck_radius: torch.Tensor
    upper_lip: Radii
    lower_lip: Radii
    cap: Radii  # hair over the skull
    mane: Radii  # hair behind and beside the face
    mane_y: torch.Tensor
    window: Radii  # the opening for the face

    @property
    def heads(self) -> int:
        """N."""
        return len(self.eye_x)


def _radii(x, y, z, like: torch.Tensor) -> Radii:
    return tuple(1 / (like * 0 + r) for r in (x, y, z))


def named_shape(shape: torch.Tensor) -> dict[str, torch.Tensor]:
    """Columns of shape [N, S] by name, each [N, 1] so that it broadcasts against points [N, P].

    Raises:
        ValueError: when the trailing dimension is not S.
    """
    if shape.ndim != 2 or shape.shape[1] != SHAPE_COUNT:
        raise ValueError(
            f"named_shape: expected shape parameters [N, {SHAPE_COUNT}], got {list(shape.shape)}. "
            "heads.family.SHAPE_NAMES lists them in order."
        )
    return dict(zip(SHAPE_NAMES, shape.unsqueeze(-1).unbind(1), strict=True))


def _face(s: dict[str, torch.Tensor], wide: torch.Tensor, deep: torch.Tensor) -> dict:
    one = torch.ones_like(wide)
    chin, brow = 0.02 * s["chin"], 0.008 * s["brow"]
    nose, ears = 1 + 0.25 * s["nose_width"], 1 + 0.25 * s["ears"]
    full = 0.0105 + 0.0035 * s["lips"]
    reach = 0.022 * s["nose_length"]
    return {
        "jaw": _radii(0.108 * wide * (1 + 0.16 * s["jaw_width"]), 0.142 + 0.5 * chin, 0.112, one),
        "jaw_y": JAW_Y - 0.4 * chin,
        "chin_y": -0.160 - chin,
        "chin_z": 0.118 + 0.5 * chin,
        "cheek_x": 0.066 * wide,
        "cheek_radius": 0.036 + 0.010 * s["cheeks"],
        "brow_z": 0.142 + brow,
        "brow_bend": 0.5 * brow,
        "eye_x": 0.060 * (1 + 0.05 * s["head_width"]) + 0.009 * s["eye_spacing"],
        "eye_y": 0.012,
        "eye_z": 0.121 + 0.010 * s["head_depth"],
        "eye_radius": 0.0315 * (1 + 0.14 * s["eye_size"]),
        "socket": _radii(0.040, 0.026, 0.030 + 0.4 * brow, one),
        "lid_opening": _radii(0.033, 0.0185 * (1 + 0.25 * s["eye_size"]), 0.035, one),
        "nose_reach": 0.052 + reach,
        "nose_scale": nose,
        "wing": 0.0125 * nose,
        "wing_z": 0.160 + 0.5 * reach,
        "ear": _radii(0.013, 0.048 * ears, 0.030 * ears, one),
        "ear_x": 0.138 * wide - 0.0025,
        "neck_radius": 0.074 * (1 + 0.16 * s["neck_width"]),
        "upper_lip": _radii(0.043, full, 0.017, one),
        "lower_lip": _radii(0.038, 1.2 * full, 0.018, one),
    }


def head_geometry(shape: torch.Tensor) -> HeadGeometry:
    """Dimensions of the heads with parameters shape [N, S], each in [-1, 1]. Differentiable in shape."""
    s = named_shape(shape)
    wide, tall, deep = (1 + k * s[name] for k, name in ((0.09, "head_width"), (0.08, "head_height"), (0.08, "head_depth")))
    thick = 0.020 + 0.012 * s["hair_volume"]
    bottom = 0.145 + 0.125 * s["hair_length"]  # depth of the mane's lower end below y = 0
    return HeadGeometry(
        skull=_radii(0.145 * wide, 0.160 * tall, 0.178 * deep, wide),
        cap=_radii(0.145 * wide + thick, 0.160 * tall + thick, 0.176 * deep + thick, wide),
        mane=_radii(0.150 * wide + thick, 0.5 * (0.20 + bottom), 0.110 + thick, wide),
        mane_y=0.5 * (0.06 - bottom),
        window=_radii(0.128 * wide, 0.222 * tall, 0.190, wide),
        **_face(s, wide, deep),
    )
