"""What teaches a generator of synthetic heads before the game, in place of real pretraining: the field and then the pictures of the heads
that latents name.

    field      L = mean |sigma - sigma*| / 10 + w mean |colour - colour*|, at points and without rendering
    pictures   L = mean |x - x*| + mean |grad x - grad x*| + w mean |sigma - sigma_0| / 10, by rendering

sigma* = clamp(LEVEL - slope * sdf, OUTSIDE, INSIDE), slope = (INSIDE - LEVEL) / edge, so that the level set of the target is the head's
surface whatever the edge; colour* is the shaded one of the rendered images, near the surface. x, x* in 0..1 are G's picture and the head's
from the same camera. With a weight w the pictures' density is held: they teach colour alone (no gradient of a picture reaches the density),
and sigma_0 is the density of the network that the stage began with, asked near its surface and anywhere. So pictures can be made right over
whatever shape there is. Step sizes fall along a cosine to a fiftieth.

Shape letters: N heads or latents, Z z_dim, P points, K of them near the surface, S shape and A appearance parameters.
"""

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.special import ndtr

from training.config import GanConfig
from training.gan_phases import Batch, schedule
from training.heads.family import APPEARANCE_NAMES, draw_parameters
from training.heads.render import render_heads, shade, union_field
from training.heads.sdf import head_geometry
from training.phases import Loss, Phase
from training.rendering.renderer import DETACHED

# Density and colour of heads, at points

LEVEL, INSIDE, OUTSIDE = 10.0, 60.0, -10.0  # raw density of the surface, and its bounds
FACE = ((-0.11, 0.11), (-0.15, 0.06), (0.08, 0.24))  # world box (x, y, z) that holds eyes, nose and mouth
OUTER = 0.12  # world units beyond the cube in which points are taught to be empty, too: there a tri-plane decoder reads zeros


@dataclass(frozen=True)
class FieldPoints:
    """What a generator is asked for, and what it should say."""

    points: torch.Tensor  # [N, P, 3] world; the first K are near the surface
    density: torch.Tensor  # [N, P] raw
    colour: torch.Tensor  # [N, K, 3] in 0..1


def density_of(sdf: torch.Tensor, edge: float) -> torch.Tensor:
    """Raw density of signed distances [...], world units; `edge` is the depth at which it is full."""
    return (LEVEL - sdf * ((INSIDE - LEVEL) / edge)).clamp(OUTSIDE, INSIDE)


@torch.no_grad()
def draw_points(shape: torch.Tensor, appearance: torch.Tensor, edge: float, near: int, anywhere: int, side: float = 1.0) -> FieldPoints:
    """Points of heads and the truth there, from torch's global generator.

    Args:
        shape: [N, S]; appearance: [N, A]; edge: world units; side: of the generator's cube, world units.
        near: K, half of them about the face, taken as the third of the candidates that is nearest to the surface; anywhere: the others,
            even over the cube and a margin around it.
    """
    n, device = len(shape), shape.device
    g = head_geometry(shape)
    field = union_field(g)
    low, high = torch.tensor(FACE, device=device).T
    face = low + torch.rand(n, 3 * (near // 2), 3, device=device) * (high - low)
    body = (torch.rand(n, 3 * (near - near // 2), 3, device=device) - 0.5) * side
    chosen, sdfs = [], []
    for candidates in (face, body):
        sdf = field(*(x.contiguous() for x in candidates.unbind(-1)))
        nearest = sdf.abs().topk(candidates.shape[1] // 3, dim=1, largest=False, sorted=False).indices
        chosen.append(candidates.gather(1, nearest.unsqueeze(-1).expand(-1, -1, 3)))
        sdfs.append(sdf.gather(1, nearest))
    rest = (torch.rand(n, anywhere, 3, device=device) - 0.5) * (side + 2 * OUTER)
    close = torch.cat(chosen, dim=1)
    a = dict(zip(APPEARANCE_NAMES, appearance.unsqueeze(-1).unbind(1), strict=True))
    x, y, z = (coordinate.contiguous() for coordinate in close.unbind(-1))
    colour = shade(field, x, y, z, g, a).clamp(0, 1)
    beyond = field(*(x.contiguous() for x in rest.unbind(-1)))
    return FieldPoints(torch.cat([close, rest], dim=1), density_of(torch.cat([*sdfs, beyond], dim=1), edge), colour)


def field_loss(density: torch.Tensor, colour: torch.Tensor, truth: FieldPoints, colour_weight: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean absolute errors of density (in tenths of the raw scale) and of colour near the surface.

    Args: density [N, P] raw; colour [N, K, 3] in 0..1.
    Returns: [N] each, the second weighted. Differentiable in density and colour.
    """
    shape = (density - truth.density).abs().mean(dim=1) / 10
    return shape, colour_weight * (colour - truth.colour).abs().mean(dim=[1, 2])


# Latents that name heads: each coordinate of z takes the place of one random number that a head of the family is drawn from. Normal draws
# are the coordinates themselves, uniform ones come through the normal distribution function, choices through its quantiles; so normal
# latents give exactly the family's heads.


class _Coordinates:
    """The coordinates of one latent in turn, where `draw_parameters` expects a random generator."""

    def __init__(self, z: np.ndarray):
        self._rest = iter(z.tolist())

    def standard_normal(self, size: int | None = None):
        return next(self._rest) if size is None else np.array([next(self._rest) for _ in range(size)])

    def random(self) -> float:
        return float(ndtr(next(self._rest)))

    def uniform(self, low=0.0, high=1.0):
        if np.ndim(low) == 0:
            return low + (high - low) * self.random()
        return np.array([self.uniform(a, b) for a, b in zip(low, high, strict=True)])

    def integers(self, high: int) -> int:
        return min(int(self.random() * high), high - 1)

    def choice(self, count: int, p) -> int:
        return min(int(np.searchsorted(np.cumsum(p), self.random(), side="right")), count - 1)


def named_heads(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The heads that latents z [N, Z] name: shape [N, S] and appearance [N, A], float32.

    Latents are scaled to unit root mean square first, as the mapping network does; coordinates beyond those of the draws name nothing.
    Raises: ValueError where Z is too small.
    """
    scaled = torch.nn.functional.normalize(z.double(), dim=1).mul(z.shape[1] ** 0.5).cpu().numpy()
    try:
        drawn = [draw_parameters(_Coordinates(row)) for row in scaled]
    except StopIteration:
        raise ValueError(f"named_heads: expected latents of at least 48 coordinates, got {z.shape[1]}. Use a wider z.") from None
    shape, appearance = (torch.from_numpy(np.stack(values)) for values in zip(*drawn, strict=True))
    return shape.to(z.device), appearance.to(z.device)


LAST_SHARE = 0.02  # last step size as a share of the first


POINTS_NEAR, POINTS_ANYWHERE = 3000, 1500  # per head, near the surface, half of them about the face; over the cube
FIELD_EDGE = 0.015  # depth at which a head is fully dense, world units; twice that in the soft share


def cosine(first: float, progress: float) -> float:
    """Adam's step size after a share `progress` of a stage, which begins with `first`."""
    return first * (LAST_SHARE + (1 - LAST_SHARE) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))


def field_phase(G: Any, config: GanConfig) -> Phase:
    """Gfield, with an optimizer of its own, until the game begins."""
    optimizer = torch.optim.Adam(list(G.parameters()), lr=config.field_lr, betas=(0.9, 0.99))

    def losses(batch: Batch) -> Iterator[Loss]:
        optimizer.param_groups[0]["lr"] = cosine(config.field_lr, batch.cur_nimg / (config.field_kimg * 1000))
        soft = batch.cur_nimg < config.field_soft * config.field_kimg * 1000
        heads = named_heads(batch.gen_z)
        truth = draw_points(*heads, FIELD_EDGE * (2 if soft else 1), POINTS_NEAR, POINTS_ANYWHERE, G.rendering_kwargs["box_warp"])
        ws = G.mapping(batch.gen_z, torch.zeros_like(batch.gen_c), update_emas=True)
        out = G.renderer.run_model(G.planes(ws), G.decoder, truth.points, None, G.rendering_kwargs)
        density, colour = field_loss(out["sigma"].squeeze(2), out["rgb"][:, : truth.colour.shape[1], :3], truth, config.field_colour)
        yield Loss(density + colour, {"Loss/Gfield/density": density, "Loss/Gfield/colour": colour})

    window = 0, config.field_kimg * 1000
    return Phase(name="Gfield", module=G, optimizer=optimizer, losses=losses, own_optimizer=True, window=window)


# Pictures


CANDIDATES, HELD_NEAR, HELD_ANYWHERE = 6000, 1200, 600  # per head, even over the cube; of these, nearest to the surface in density; others


def picture_error(image: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Mean absolute error of values and of differences between neighbours. [N, 3, R, R] both -> [N]. Differentiable in both."""
    error = image - truth
    steps = error.diff(dim=2).abs().mean(dim=[1, 2, 3]) + error.diff(dim=3).abs().mean(dim=[1, 2, 3])
    return error.abs().mean(dim=[1, 2, 3]) + steps


def raw_density(G: Any, planes: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Raw density [N, P] of planes at points [N, P, 3]."""
    return G.renderer.run_model(planes, G.decoder, points, None, G.rendering_kwargs, sigma_only=True)["sigma"].squeeze(2)


@torch.no_grad()
def held_density(G: Any, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Points [N, P, 3] of the cube, most of them near the surface of latents z [N, Z], and the raw density [N, P] there."""
    side = G.rendering_kwargs["box_warp"]
    points = (torch.rand(len(z), CANDIDATES, 3, device=z.device) - 0.5) * side
    values = raw_density(G, G.planes(G.mapping(z, z.new_zeros(len(z), G.c_dim))), points)
    near = (values - LEVEL).abs().topk(HELD_NEAR, dim=1, largest=False, sorted=False).indices
    chosen = torch.cat([near, torch.arange(HELD_ANYWHERE, device=z.device).expand(len(z), -1)], dim=1)
    return points.gather(1, chosen.unsqueeze(-1).expand(-1, -1, 3)), values.gather(1, chosen)


def picture_phase(G: Any, config: GanConfig) -> Phase:
    """Gpicture, with an optimizer of its own, after the field start and before the game; it carries the first network where one is held."""
    optimizer = torch.optim.Adam(list(G.parameters()), lr=config.picture_lr, betas=(0.9, 0.99))
    begin, end = config.field_kimg * 1000, config.game_from
    held = copy.deepcopy(G).requires_grad_(False) if config.picture_hold > 0 else None

    def losses(batch: Batch) -> Iterator[Loss]:
        optimizer.param_groups[0]["lr"] = cosine(config.picture_lr, (batch.cur_nimg - begin) / (end - begin))
        poses, intrinsics = batch.gen_c[:, :16].reshape(-1, 4, 4), batch.gen_c[:, 16:25].reshape(-1, 3, 3)
        truth, _ = render_heads(*named_heads(batch.gen_z), poses, intrinsics, G.img_resolution)
        ws = G.mapping(batch.gen_z, torch.zeros_like(batch.gen_c), update_emas=True)
        planes = G.planes(ws)
        options = {**G.rendering_kwargs, DETACHED: held is not None}
        image = G.render(planes, ws, batch.gen_c, schedule(config, batch.cur_nimg).neural_rendering_resolution, options)["image"]
        error = picture_error(image / 2 + 0.5, truth)
        stats = {"Loss/Gpicture/picture": error}
        if held is not None:
            points, before = held_density(held, batch.gen_z)
            moved = (raw_density(G, planes, points) - before).abs().mean(dim=1) / 10
            stats["Loss/Gpicture/density"] = moved
            error = error + config.picture_hold * moved
        yield Loss(error, stats)

    return Phase(name="Gpicture", module=G, optimizer=optimizer, losses=losses, own_optimizer=True, window=(begin, end), state=held)
