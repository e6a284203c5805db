"""A stand-in generator with the attributes that eg3d_rlhf.sigma reads, and random planes and decoders."""

from types import SimpleNamespace

import torch

from eg3d_rlhf.generators.eg3d import PlaneField
from eg3d_rlhf.geometry.slab import DecoderWeights
from eg3d_rlhf.rewards.observations import SigmaSlab
from training.rendering.renderer import generate_planes, slice_blend


def random_weights(channels: int, hidden: int, dtype=torch.float32, seed: int = 1) -> DecoderWeights:
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=rng, dtype=dtype)

    return DecoderWeights(normal(hidden, channels) * 2, normal(hidden), normal(hidden), normal(1)[0])


def random_planes(
    samples: int, channels: int, rows: int, columns: int, dtype=torch.float32, seed: int = 0
) -> torch.Tensor:
    return torch.randn(
        samples, 3, channels, rows, columns, generator=torch.Generator().manual_seed(seed), dtype=dtype
    )


class StandIn:
    """Planes are a linear function of ws [N, 2, 3], so that gradients to ws can be checked."""

    def __init__(self, layout: str = "eg3d", box_warp: float = 1.0, plane_slices: int = 1):
        self.basis = random_planes(3, 4, 12, 12, seed=5)  # [3, 3, C, 12, 12]
        self.weights = random_weights(4, 8)
        self.renderer = SimpleNamespace(plane_axes=generate_planes(layout), blend=slice_blend(plane_slices))
        self.decoder = SimpleNamespace(sigma_weights=lambda: tuple(self.weights))
        self.rendering_kwargs = {"box_warp": box_warp}
        self.noise_modes = []  # one entry per synthesis pass

    def planes(self, ws, noise_mode):
        self.noise_modes.append(noise_mode)
        return torch.einsum("nlk,kpchw->npchw", ws, self.basis)


def sigma_grid(G, ws, spec, impl="auto", noise_mode="const"):
    """Raw density [N, D, H, W] of ws on a grid."""
    return PlaneField(G, ws, noise_mode).density_grid(spec, impl)


def sample_slab(G, ws, spec):
    """Return the slab that a reward reads of ws, [N, 1, D, H, W]."""
    return SigmaSlab(spec).observe(PlaneField(G, ws))
