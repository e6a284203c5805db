"""The member of the true family that is nearest to a shape, to show beside it: fitted to the surface, coloured after the renderings.

Letters: N heads, A appearance parameters, R pixels per edge, P points.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eg3d_rlhf.core.spec import SlabSpec
from eg3d_rlhf.geometry.level_set import LevelSet
from eg3d_rlhf.measures.nearest_head import FitOptions, HeadPose, fit_heads, posed_sdf, resample, surface_points
from training.heads.family import APPEARANCE_NAMES
from training.heads.render import cone_starts, march, pixel_rays, render_heads, shade, union_field
from training.heads.sdf import head_geometry
from training.rendering.cameras import unpack_label

_STEPS, _RATE, _POINTS = 60, 0.06, 800  # of the fit of colours
_CHUNK = 1 << 16  # points at once


@dataclass(frozen=True)
class TrueHead:
    """One head of the family."""

    pose: HeadPose  # of one head
    appearance: Tensor  # [1, A]

    def camera(self, label: Tensor) -> tuple[Tensor, Tensor]:
        """cam2world [1, 4, 4] and intrinsics [1, 3, 3] of a camera [1, 25] as the head stands, before its shift and scale."""
        return _cameras(self.pose, label)

    def image(self, label: Tensor, resolution: int) -> Tensor:
        """[R, R, 3] in 0..1 from a camera [1, 25], on white."""
        return render_heads(self.pose.shape, self.appearance, *self.camera(label), resolution)[0][0].movedim(0, -1)

    @torch.no_grad()
    def surface(self, spec: SlabSpec) -> LevelSet:
        """Its surface, looked for on a grid."""
        def density(points: Tensor) -> Tensor:
            return torch.cat([-posed_sdf(part[None], self.pose)[0] for part in points.split(_CHUNK)])

        cube = density(spec.points().reshape(-1, 3).to(self.appearance)).reshape(spec.shape)
        return LevelSet(cube=cube, spec=spec, level=0.0, density=density)


def _cameras(pose: HeadPose, label: Tensor) -> tuple[Tensor, Tensor]:
    cam2world, intrinsics = (matrix.to(pose.shape).repeat(len(pose.shape), 1, 1) for matrix in unpack_label(label))
    cam2world[:, :3, 3] = (cam2world[:, :3, 3] - pose.shift) / pose.log_scale.exp()
    return cam2world, intrinsics


def nearest(columns: Sequence[Sequence[LevelSet]], images: Tensor, label: Tensor) -> list[TrueHead | None]:
    """For each of N columns, the head nearest to the surfaces of all its shapes together; None where they have none.

    Args: images: [N, 3, R, R] in 0..1 from one camera label [1, 25], whose colours the heads take.
    """
    options = FitOptions()
    points = [torch.cat([surface_points(one.cube.float(), one.spec, options.back, one.level) for one in shapes]) for shapes in columns]
    filled = [i for i, found in enumerate(points) if len(found) >= options.points // 8]
    heads: list[TrueHead | None] = [None] * len(columns)
    if filled:
        pose, _ = fit_heads(torch.stack([resample(points[i], options.points, options.seed) for i in filled]), options)
        appearance = fit_colours(pose, images[filled], label)
        for row, i in enumerate(filled):
            heads[i] = TrueHead(HeadPose(*(value[row : row + 1] for value in pose)), appearance[row : row + 1])
    return heads


def fit_colours(pose: HeadPose, images: Tensor, label: Tensor) -> Tensor:
    """Appearances [N, A] with which posed heads look most like images [N, 3, R, R] in 0..1 where both are seen.

    Adam on the mean absolute difference at points of the heads that the camera sees.
    """
    (cam2world, intrinsics), g = _cameras(pose, label), head_geometry(pose.shape)
    field, resolution = union_field(g), images.shape[-1]
    with torch.no_grad():
        start, far = cone_starts(field, cam2world, intrinsics, resolution)
        origins, directions = pixel_rays(cam2world, intrinsics, resolution)
        t = march(field, origins, directions, start, far)  # [N, R * R]
        seen = torch.multinomial(t.isfinite().float() + 1e-9, _POINTS, replacement=True, generator=torch.Generator().manual_seed(0))
        at = seen[..., None].expand(-1, -1, 3)  # [N, P, 3]
        points = origins[:, None] + t.gather(1, seen)[..., None] * directions.gather(1, at)
        target = images.to(points).flatten(2).mT.gather(1, at)
    x, y, z = (axis.contiguous() for axis in points.unbind(-1))
    low = points.new_tensor([-1.0 if name.startswith("light") else 0.0 for name in APPEARANCE_NAMES])
    appearance = (0.5 * (low + 1)).repeat(len(images), 1).requires_grad_()
    optimiser = torch.optim.Adam([appearance], lr=_RATE)
    with torch.enable_grad():
        for _ in range(_STEPS):
            optimiser.zero_grad()
            colours = shade(field, x, y, z, g, dict(zip(APPEARANCE_NAMES, appearance.unsqueeze(-1).unbind(1), strict=True)))
            (colours - target).abs().mean().backward()
            optimiser.step()
            with torch.no_grad():
                appearance.copy_(appearance.clamp_max(1).maximum(low))
    return appearance.detach()
