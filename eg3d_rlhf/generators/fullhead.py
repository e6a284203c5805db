"""What the families of full heads share: fields whose points are decoded one by one, and a generator around them."""

import dataclasses
from typing import Any

import torch

from eg3d_rlhf.core.field import CameraFamily
from eg3d_rlhf.core.spec import SlabSpec
from eg3d_rlhf.generators.eg3d import EG3D, PlaneField

_POINT_CHUNK = 1 << 16  # points decoded at once where no gradient is recorded


class HeadField(PlaneField):
    """The fields of ws [N, L, W]. Differentiable as `PlaneField` is."""

    def __init__(self, G: Any, ws: torch.Tensor, noise_mode: str = "const"):
        super().__init__(G, ws, noise_mode)
        self.planes = self._wide(self.planes)

    def density(self, points: torch.Tensor) -> torch.Tensor:
        """See `Field`."""
        points = points.to(self.planes).expand(len(self), -1, -1)  # [N, P, 3]
        recorded = any(tensor.requires_grad for tensor in (self.planes, points, *self._G.decoder.parameters()))
        parts = (points,) if torch.is_grad_enabled() and recorded else points.split(_POINT_CHUNK, dim=1)
        return torch.cat([self._decoded(part, sigma_only=True)["sigma"].squeeze(2) for part in parts], dim=1)

    def density_grid(self, grid: SlabSpec, impl: str = "auto") -> torch.Tensor:
        """See `Field`: every point on its own. Raises: ValueError for an impl other than 'auto' or 'pointwise'."""
        if impl not in ("auto", "pointwise"):
            raise ValueError(f"density_grid: expected impl='auto' or 'pointwise' for {type(self._G).__name__}, got {impl!r}. Use 'auto'.")
        return self.density(grid.points().reshape(-1, 3)).unflatten(1, grid.shape)

    def separable(self, x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> None:
        """None: see `SeparableField`."""

    def _colours(self, points: torch.Tensor) -> torch.Tensor:
        """Colours of points [N, P, 3] as raw pictures show them, before super-resolution."""
        features = self._G.scaled(self._decoded(points)["rgb"]).transpose(1, 2).unsqueeze(3)  # [N, F, P, 1]
        return (self._G.to_rgb(features, self.ws).squeeze(3).transpose(1, 2) + 1) / 2


class FullHead(EG3D):
    """`Generator` around a full-head network."""

    field_class: type[HeadField] = HeadField

    @property
    def cameras(self) -> CameraFamily:
        """They look at the origin, where these heads are, whatever avg_camera_pivot says."""
        return dataclasses.replace(super().cameras, pivot=(0.0, 0.0, 0.0))

    def field(self, ws: torch.Tensor, noise_mode: str = "const") -> Any:
        """See `Generator`."""
        return self.field_class(self.module, ws, noise_mode)
