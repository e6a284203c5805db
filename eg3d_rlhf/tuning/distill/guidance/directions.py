"""From which side a camera looks, in words for the prompt, and Perp-Neg's mixture of prompts (Armandpour et al. 2023).

Letters: B pictures, Q = 2 negatives. Degrees; azimuth 0 is the front, elevation up.
"""

import math

import torch

from eg3d_rlhf.core.interfaces import RewardModel

DIRECTIONS = ("side", "front", "back", "overhead")
# weight -(a exp(-b r) + c) of a negative prompt, r the share of the nearer view: (a, b, c)
FRONT_OF_FRONT_SIDE = SIDE_OF_FRONT_SIDE = (4.0, 0.5, -2.426)
SIDE_OF_SIDE_BACK, FRONT_OF_SIDE_BACK = (1.0, 0.5, -0.606), (1.0, 0.5, 0.967)


def angles_of(cameras: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Elevation and azimuth [B] in degrees of cameras [B, 16], cam2world with y up that look at the origin; azimuth 0 is +z, 90 is +x."""
    x, y, z = cameras.view(-1, 4, 4)[:, :3, 3].unbind(1)
    return torch.rad2deg(torch.atan2(y, torch.hypot(x, z))), torch.rad2deg(torch.atan2(x, z))


def _turned(azimuth: float) -> float:
    """The same azimuth in -180..180."""
    return (azimuth + 180) % 360 - 180


def direction_of(elevation: float, azimuth: float, *, front: float = 45, back: float = 45, overhead: float = 60) -> str:
    """side, unless within `front` of 0, `back` of 180, or more than `overhead` up; the later one wins. MVDream's family: 30, 30, 60."""
    turned = abs(_turned(azimuth))
    if elevation > overhead:
        return "overhead"
    if turned > 180 - back:
        return "back"
    return "front" if turned < front else "side"


def told(reward: RewardModel, prompts: list[str], cameras: torch.Tensor | None) -> list[str]:
    """What a reward is told of pictures [B]: their prompts, and the side where it was trained so, as Reward3D was (MVDream's thresholds).

    Raises: ValueError where prompts should name the side and no cameras [B, 16] are given.
    """
    if not getattr(reward, "view_prompts", False):
        return prompts
    if cameras is None:
        raise ValueError("--reward: expected cameras of the pictures, whose side it is told, got none. Give cameras.")
    angles = zip(*(angle.tolist() for angle in angles_of(cameras)), strict=True)
    return [f"{prompt}, {direction_of(*view, front=30, back=30)} view" for prompt, view in zip(prompts, angles, strict=True)]


def mixture(elevation: float, azimuth: float, overhead: float = 60) -> tuple[dict[str, float], list[str | None], list[float]]:
    """Perp-Neg of one view: shares of directions in the prompt, those of two negatives (None: the null one), their weights <= 0."""
    if elevation > overhead:
        return {"overhead": 1.0}, [None, None], [0.0, 0.0]
    turned = abs(_turned(azimuth))
    r = 1 - turned / 90 if turned < 90 else 2 - turned / 90
    if turned < 90:
        decays = _decay(FRONT_OF_FRONT_SIDE, r), _decay(SIDE_OF_FRONT_SIDE, 1 - r)
        return {"front": r, "side": 1 - r}, ["front", "side"], [-d for d in decays]
    decays = _decay(SIDE_OF_SIDE_BACK, r), _decay(FRONT_OF_SIDE_BACK, r)
    return {"side": r, "back": 1 - r}, ["side", "front"], [-d for d in decays]


def _decay(constants: tuple[float, float, float], r: float) -> float:
    a, b, c = constants
    return a * math.exp(-b * r) + c
