"""What a prior is shown of assets: the test problem's four orthographic views of voxels, all at once, or perspective views of any field.

Letters: A assets, V views of each, B = A * V with an asset's views adjacent, N voxels per edge, R pixels per edge.
"""

from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F

from eg3d_rlhf.core.field import RenderOptions
from eg3d_rlhf.generators.assets.asset import Asset
from eg3d_rlhf.generators.assets.views import CameraDraws, Views, evenly_around
from eg3d_rlhf.generators.assets.voxels import Voxels

DISTANCE = 1.5  # of the orthographic cameras from the centre, in sides of the cube
ORTHOGRAPHIC = 4


class Pictures(NamedTuple):
    """What V cameras see of each of A assets."""

    images: torch.Tensor  # [B, C, R, R] in 0..1: RGB, and inverse depth where C is 4
    opacity: torch.Tensor  # [B, 1, R, R]


class Renderer(Protocol):
    """Draws cameras and renders; the loop knows nothing else of views."""

    def draw(self, assets: int, rng: torch.Generator) -> Views:
        """Cameras of one step."""

    def render(self, asset: Asset, views: Views, background: torch.Tensor) -> Pictures:
        """What they see, over a background [3] or [B, 3] in 0..1. Differentiable in the asset."""


def nearness(depth: torch.Tensor, near: float, far: float) -> torch.Tensor:
    """Inverse depth from 1 at `near` to 0 at `far`."""
    return (1 / depth - 1 / far) / (1 / near - 1 / far)


def four_views(raw: torch.Tensor, colours: torch.Tensor, pitch: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Voxels seen along z and x from both ends: front (+z), +x, back, -x. Rays run through the voxels' centres, so nothing is sampled.

        tau_i = softplus(raw_i - 1) pitch,  w_i = (1 - exp(-tau_i)) exp(-sum of tau in front of i),  channel = sum_i w_i c_i

    Both ends share tau and its running sum. Args: raw [A, N, N, N] and colours [A, 3, N, N, N], axes z, y, x; pitch: world units.
    Returns: channels [A, 4, 4, N, N] (view, channel; RGB and inverse depth, premultiplied by opacity) and opacity [A, 4, 1, N, N];
    rows from the top. Differentiable in raw and colours.
    """
    n = raw.shape[-1]
    tau = F.softplus(raw - 1) * pitch
    alpha = -torch.expm1(-tau)
    side = pitch * (n - 1)
    across = torch.linspace(-0.5, 0.5, n).to(raw) * side  # coordinate along a ray, rising
    disparity = nearness(DISTANCE * side - across, (DISTANCE - 0.5) * side, (DISTANCE + 0.5) * side)
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for axis, ends in ((1, ("back", "front")), (3, ("left", "right"))):
        behind = tau.cumsum(dim=axis)  # inclusive, from the low end
        total = behind.narrow(axis, n - 1, 1)
        shape = [1, 1, 1, 1]
        shape[axis] = n
        for end, before, near in zip(ends, (behind - tau, total - behind), (disparity.flip(0), disparity), strict=True):
            weights = alpha * torch.exp(-before)  # [A, N, N, N]
            rgb = (weights.unsqueeze(1) * colours).sum(dim=axis + 1)  # [A, 3, N, N]
            depth = (weights * near.view(shape)).sum(dim=axis).unsqueeze(1)
            seen[end] = torch.cat([rgb, depth], dim=1), weights.sum(dim=axis).unsqueeze(1)
    # along z pictures are [y, x], along x [z, y]; rows from the top, columns to the camera's right
    turned = {
        "front": lambda p: p.flip(2), "right": lambda p: p.transpose(2, 3).flip(2, 3),
        "back": lambda p: p.flip(2, 3), "left": lambda p: p.transpose(2, 3).flip(2),
    }  # fmt: skip
    channels, opacity = zip(*([turned[end](part) for part in seen[end]] for end in turned), strict=True)
    return torch.stack(channels, dim=1), torch.stack(opacity, dim=1)


class FourViews:
    """`Renderer` of the test problem: RGB and inverse depth of voxels from four sides, every camera the same in every step."""

    def __init__(self, resolution: int = 16):
        self.resolution = resolution

    def draw(self, assets: int, rng: torch.Generator) -> Views:
        """The four sides; draws nothing."""
        del rng
        return evenly_around(assets, ORTHOGRAPHIC, DISTANCE)

    def render(self, asset: Asset, views: Views, background: torch.Tensor) -> Pictures:
        """See `Renderer`. Inverse depth is over 0. Raises: ValueError for another field than voxels, or other views."""
        if not isinstance(asset, Voxels) or len(views.cameras) != ORTHOGRAPHIC * len(asset):
            raise ValueError(
                f"FourViews: expected voxels and {ORTHOGRAPHIC} views of each, got {type(asset).__name__} and {len(views.cameras)} "
                f"views of {len(asset)}. Use PerspectiveViews."
            )
        channels, opacity = (part.flatten(0, 1) for part in four_views(asset.raw, torch.sigmoid(asset.paint), asset.pitch))
        below = F.pad(background.to(channels).expand(len(channels), 3), (0, 1))  # [B, 4]
        images = channels + (1 - opacity) * below[:, :, None, None]
        if asset.resolution != self.resolution:
            images, opacity = (F.adaptive_avg_pool2d(part, self.resolution) for part in (images, opacity))
        return Pictures(images, opacity)


class Cameras(Protocol):
    """Where the cameras of a step stand."""

    def draw(self, assets: int, rng: torch.Generator) -> Views:
        """As many of each asset."""


class PerspectiveViews:
    """`Renderer` of perspective pictures: RGB of any field, from cameras drawn as public text-to-3D draws them unless it says otherwise."""

    def __init__(self, resolution: int = 64, cameras: Cameras | None = None, samples: int | None = None):
        self.options = RenderOptions(resolution=resolution, samples=samples)
        self.cameras: Cameras = cameras or CameraDraws()

    def draw(self, assets: int, rng: torch.Generator) -> Views:
        """See `CameraDraws.draw`."""
        return self.cameras.draw(assets, rng)

    def render(self, asset: Asset, views: Views, background: torch.Tensor) -> Pictures:
        """See `Renderer`: one view of every asset after the other."""
        each = views.cameras.unflatten(0, (len(asset), -1)).unbind(1)  # V of [A, 25]
        seen = [asset.render(cameras, self.options) for cameras in each]
        raw, opacity = (torch.stack(parts, dim=1).flatten(0, 1) for parts in zip(*((s.raw, s.opacity) for s in seen), strict=True))
        below = background.to(raw).expand(len(raw), 3)[:, :, None, None]
        return Pictures((raw + 1) / 2 + (1 - opacity) * below, opacity)
