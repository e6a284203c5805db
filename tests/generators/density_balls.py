"""A generator of balls with known densities, and networks whose tri-planes hold a known ellipsoid."""

import copy
import math
from functools import cache

import torch

from eg3d_rlhf.core.field import Bounds, CameraFamily, Field
from training import networks
from training.config import GanConfig, NetworkConfig, networks_for


class Balls(Field):
    """Shapes whose raw density is peak - slope * |p - centre|, so that they are balls around one point."""

    bounds = Bounds()
    level = 10.0

    def __init__(self, generator: "BallGenerator", count: int):
        self.generator = generator
        self.bounds = generator.bounds
        self.level = generator.level
        self.count = count

    def __len__(self) -> int:
        return self.count

    def density(self, points):
        distance = (points - points.new_tensor(self.generator.centre)).norm(dim=-1)
        sigma = self.generator.peak - self.generator.slope * distance
        return sigma.expand(self.count, *sigma.shape[-1:])

    def colour(self, points):
        return torch.full((self.count, len(points), 3), 0.5)


class BallGenerator:
    """Generator of equal balls. The density at the centre is `peak`, and falls by `slope` per world unit."""

    architecture = "balls"
    z_dim = w_dim = 4
    num_ws = 1
    img_resolution = 8
    conditioned = False
    cameras = CameraFamily()

    def __init__(self, centre=(0.0, 0.0, 0.0), radius=0.2, level=10.0, peak=60.0, bounds=None):
        self.module = torch.nn.Linear(1, 1)
        self.centre = centre
        self.level = level
        self.peak = peak
        self.slope = (peak - 10.0) / radius
        self.bounds = bounds or Bounds()

    def mapping(self, z, c, truncation_psi=1.0, truncation_cutoff=None):
        return z[:, None]

    def field(self, ws, noise_mode="const"):
        return Balls(self, len(ws))


def ellipsoid_planes(G: torch.nn.Module, centre, axes, slope: float = 100.0) -> None:
    """Set the weights of an EG3D network in place, so that every sample is one ellipsoid at the level 10.

    The raw density is 10 + slope (1 - Q(p)) with Q(p) = sum_i ((p_i - centre_i) / axes_i)^2. The plane (x, y)
    holds the terms of x and y, and the plane (x, z) the term of z. Both patterns enter as the constant
    noise of the last two layers, so that the network has the sizes and names of a released one.
    """
    synthesis = G.backbone.synthesis
    block = getattr(synthesis, f"b{synthesis.img_resolution}")
    texels = (2 * torch.arange(synthesis.img_resolution) + 1) / synthesis.img_resolution - 1
    terms = [
        ((texels * G.rendering_kwargs["box_warp"] / 2 - middle) / axis) ** 2
        for middle, axis in zip(centre, axes, strict=True)
    ]
    channel_count = block.conv1.weight.shape[0]
    with torch.no_grad():
        for name, parameter in synthesis.named_parameters():
            # styles of 1 for every latent, no image of coarser blocks
            if ".affine." in name:
                parameter.fill_(1.0 if name.endswith("bias") else 0.0)
            elif ".torgb." in name or f"b{synthesis.img_resolution}." in name:
                parameter.zero_()
        block.conv0.noise_strength.fill_(1)
        block.conv1.noise_strength.fill_(1)
        # Rows of a plane are its second coordinate: z for the plane (x, z), y for the plane (x, y).
        block.conv0.noise_const.copy_(terms[2][:, None].expand_as(block.conv0.noise_const))
        block.conv1.noise_const.copy_(terms[1][:, None] + terms[0][None])
        block.conv1.weight[0, 0, 1, 1] = 1  # channel 0 sees both patterns, the other channels the second one
        scale = math.sqrt(channel_count)
        # Activations are multiplied by sqrt(2): channel 0 is 2 P0 + sqrt(2) P1, channel 1 is sqrt(2) P1. The
        # renderer averages three planes, hence the factor 3.
        block.torgb.weight[0, 1] = 3 * scale / math.sqrt(2)
        block.torgb.weight[32, 0] = 3 * scale / 2
        block.torgb.weight[32, 1] = -3 * scale / 2
        first = G.decoder.net[0]
        second = G.decoder.net[2]
        for layer in (first, second):
            layer.weight.zero_()
            layer.bias.zero_()
        # softplus(20 + Q) = 20 + Q to within 2e-9
        first.weight[0, 0] = math.sqrt(first.weight.shape[1])
        first.bias[0] = 20
        second.weight[0, 0] = -slope * math.sqrt(second.weight.shape[1])
        second.bias[0] = 10 + 21 * slope


@cache
def ellipsoid_networks(cfg: str, centre, axes, resolution: int = 512, **sizes: int) -> networks.Networks:
    """Return networks with the sizes, names and rendering options of a released checkpoint, see above.

    Args:
        cfg: 'ffhq', 'afhq' or 'shapenet'.
        centre, axes: of the ellipsoid, in world units.
        resolution: pixels per edge of the images.
        sizes: changes of NetworkConfig, for smaller networks.
    """
    gan = GanConfig(gen_pose_cond=True)
    G_kwargs, D_kwargs = networks_for(NetworkConfig(cfg=cfg, plane_layout="eg3d", **sizes), resolution, gan)
    torch.manual_seed(0)
    nets = networks.build(G_kwargs, D_kwargs, {})
    for G in (nets.G, nets.G_ema):
        ellipsoid_planes(G, centre, axes)
    return copy.copy(nets)
