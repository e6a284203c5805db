"""The field start: before the game, a generator of synthetic heads is taught the field of the head that its latent names
(training/heads/latents.py), at points and without rendering. It stands for the pretraining that real generators have.

    L = mean |sigma - sigma*| / 10 + w mean |colour - colour*|

The step size falls along a cosine to a fiftieth.
"""

import dataclasses
import math
from collections.abc import Iterator

import torch

from training.config import GanConfig
from training.gan_phases import Batch
from training.heads.field_target import draw_points, field_loss
from training.heads.latents import named_heads
from training.phases import Loss, Phase

LAST_SHARE = 0.02  # last step size as a share of the first


@dataclasses.dataclass(frozen=True, kw_only=True)
class FieldStart:
    """How the field is taught; lengths in world units."""

    points_near: int = 3000  # per head, near the surface, half of them about the face
    points_anywhere: int = 1500
    edge: float = 0.015  # depth at which a head is fully dense; twice that in the soft share


def cosine(first: float, progress: float) -> float:
    """Adam's step size after a share `progress` of a stage, which begins with `first`."""
    return first * (LAST_SHARE + (1 - LAST_SHARE) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))


def field_phase(G: torch.nn.Module, config: GanConfig, options: FieldStart = FieldStart()) -> Phase:
    """Gfield, with an optimizer of its own, until the game begins."""
    optimizer = torch.optim.Adam(list(G.parameters()), lr=config.field_lr, betas=(0.9, 0.99))

    def losses(batch: Batch) -> Iterator[Loss]:
        optimizer.param_groups[0]["lr"] = cosine(config.field_lr, batch.cur_nimg / (config.field_kimg * 1000))
        soft = batch.cur_nimg < config.field_soft * config.field_kimg * 1000
        heads = named_heads(batch.gen_z)
        truth = draw_points(
            *heads, options.edge * (2 if soft else 1), options.points_near, options.points_anywhere, G.rendering_kwargs["box_warp"]
        )
        ws = G.mapping(batch.gen_z, torch.zeros_like(batch.gen_c), update_emas=True)
        out = G.renderer.run_model(G.planes(ws), G.decoder, truth.points, None, G.rendering_kwargs)
        density, colour = field_loss(out["sigma"].squeeze(2), out["rgb"][:, : truth.colour.shape[1], :3], truth, config.field_colour)
        yield Loss(density + colour, {"Loss/Gfield/density": density, "Loss/Gfield/colour": colour})

    window = 0, config.field_kimg * 1000
    return Phase(name="Gfield", module=G, optimizer=optimizer, losses=losses, own_optimizer=True, window=window)
