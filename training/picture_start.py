"""The picture start: a generator of synthetic heads is taught the pictures of the heads that its latents name, by rendering them.

    L = mean |x - x*| + mean |grad x - grad x*| + w mean |sigma - sigma_0| / 10

x, x* in 0..1 are G's picture and the head's from the same camera. With a weight w the density is held: pictures teach colour alone (no
gradient of a picture reaches the density), and sigma_0 is the density of the network that the stage began with, asked near its surface and
anywhere. So pictures can be made right over whatever shape there is. The step size falls as the field start's.
"""

import copy
import dataclasses
from collections.abc import Iterator

import torch

from training.config import GanConfig
from training.field_start import cosine
from training.gan_phases import Batch, schedule
from training.heads.field_target import LEVEL
from training.heads.latents import named_heads
from training.heads.render import render_heads
from training.phases import Loss, Phase
from training.rendering.renderer import DETACHED


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeldPoints:
    """Where the density is compared with what it was."""

    candidates: int = 6000  # per head, even over the cube
    near: int = 1200  # of these, nearest to the surface in density
    anywhere: int = 600


def picture_error(image: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Mean absolute error of values and of differences between neighbours. [N, 3, R, R] both -> [N]. Differentiable in both."""
    error = image - truth
    steps = error.diff(dim=2).abs().mean(dim=[1, 2, 3]) + error.diff(dim=3).abs().mean(dim=[1, 2, 3])
    return error.abs().mean(dim=[1, 2, 3]) + steps


def density(G: torch.nn.Module, planes: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Raw density [N, P] of planes at points [N, P, 3]."""
    return G.renderer.run_model(planes, G.decoder, points, None, G.rendering_kwargs, sigma_only=True)["sigma"].squeeze(2)


@torch.no_grad()
def held_density(G: torch.nn.Module, z: torch.Tensor, where: HeldPoints) -> tuple[torch.Tensor, torch.Tensor]:
    """Points [N, P, 3] of the cube, most of them near the surface of latents z [N, Z], and the raw density [N, P] there."""
    side = G.rendering_kwargs["box_warp"]
    points = (torch.rand(len(z), where.candidates, 3, device=z.device) - 0.5) * side
    values = density(G, G.planes(G.mapping(z, z.new_zeros(len(z), G.c_dim))), points)
    near = (values - LEVEL).abs().topk(where.near, dim=1, largest=False, sorted=False).indices
    chosen = torch.cat([near, torch.arange(where.anywhere, device=z.device).expand(len(z), -1)], dim=1)
    return points.gather(1, chosen.unsqueeze(-1).expand(-1, -1, 3)), values.gather(1, chosen)


def picture_phase(G: torch.nn.Module, config: GanConfig, where: HeldPoints = HeldPoints()) -> Phase:
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
            points, before = held_density(held, batch.gen_z, where)
            moved = (density(G, planes, points) - before).abs().mean(dim=1) / 10
            stats["Loss/Gpicture/density"] = moved
            error = error + config.picture_hold * moved
        yield Loss(error, stats)

    return Phase(name="Gpicture", module=G, optimizer=optimizer, losses=losses, own_optimizer=True, window=(begin, end), state=held)
