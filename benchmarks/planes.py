"""Density on a grid from planes that are already there: the separable path, and point by point as EG3D decodes.

Letters: N batch, K planes, C channels, J hidden units, P points, D, H, W = grid points along z, y, x.
"""

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from eg3d_rlhf.sigma import DecoderWeights, SlabSpec, sigma_from_planes
from eg3d_rlhf.sigma.slab import plane_features
from training.rendering.renderer import generate_planes


@dataclass(frozen=True, kw_only=True)
class PlaneSize:
    """What is sampled: the planes, the decoder and the grid."""

    plane: int  # texels per side
    channels: int
    hidden: int
    outputs: int  # density and colour features
    spec: SlabSpec


TINY = PlaneSize(plane=8, channels=4, hidden=8, outputs=5, spec=SlabSpec.cube(8))


def sizes(full: SlabSpec, bundled: SlabSpec) -> dict[str, PlaneSize]:
    """Planes and decoder of both configurations, on these grids."""
    return {
        "full": PlaneSize(plane=256, channels=32, hidden=64, outputs=33, spec=full),
        "bundled": PlaneSize(plane=64, channels=16, hidden=64, outputs=17, spec=bundled),
    }


class PlaneField:
    """Leaves (planes N(0, 1) and the decoder's four tensors), and the two paths from them to sigma_raw [1, D, H, W].

    Args: chunk: points that the point-wise path decodes at once.
    """

    def __init__(self, size: PlaneSize, layout: str, device: str, chunk: int):
        rng = torch.Generator().manual_seed(0)

        def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
            return (torch.randn(shape, generator=rng) * scale).to(device).requires_grad_()

        self.spec, self.axes, self.chunk = size.spec, generate_planes(layout).to(device), chunk
        self.planes = normal(1, 3, size.channels, size.plane, size.plane)
        self.w0, self.b0 = normal(size.hidden, size.channels, scale=size.channels**-0.5), normal(size.hidden, scale=0.1)
        self.w1, self.b1 = normal(size.outputs, size.hidden, scale=size.hidden**-0.5), normal(size.outputs, scale=0.1)
        self.cotangent = torch.randn((1, *size.spec.shape), generator=rng).to(device)

    def separable(self) -> torch.Tensor:
        """The fast path."""
        weights = DecoderWeights(self.w0, self.b0, self.w1[0], self.b1[0])
        return sigma_from_planes(self.planes, self.axes, weights, self.spec, impl="separable")

    def pointwise(self) -> torch.Tensor:
        """The reference: three look-ups, their mean, a hidden layer and all outputs at every point."""
        points = self.spec.points().to(self.planes).reshape(-1, 3)
        return torch.cat([self._decode(part)[0] for part in points.split(self.chunk)], dim=1).view(1, *self.spec.shape)

    def _decode(self, points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """sigma_raw [1, P] and colour features [1, P, outputs - 1], as EG3D's decoder gives them."""
        features = plane_features(self.planes, self.axes, points, 1.0).transpose(1, 2)
        out = F.linear(F.softplus(F.linear(features, self.w0, self.b0)), self.w1, self.b1)
        return out[..., 0], torch.sigmoid(out[..., 1:]) * 1.002 - 0.001

    def forward(self, path: str) -> torch.Tensor:
        """sigma_raw by "separable" or "pointwise", without a graph."""
        with torch.no_grad():
            return getattr(self, path)()

    def train(self, path: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """sigma_raw, and gradients of planes, hidden layer and density row under a random cotangent."""
        sigma = getattr(self, path)()
        gradients = torch.autograd.grad(sigma, [self.planes, self.w0, self.b0, self.w1, self.b1], self.cotangent)
        names = ("planes", "w0", "b0", "w_sigma", "b_sigma")
        return sigma.detach(), dict(zip(names, [*gradients[:3], gradients[3][0], gradients[4][:1]], strict=True))
