"""Write an image of fixed latents during the training of a generator of heads, next to the ground truth.

Shapes: N number of latents, R pixels per side of an image.
"""

import functools
import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch

from eg3d_rlhf.core.field import RenderOptions
from eg3d_rlhf.core.seeds import BUILDER
from eg3d_rlhf.core.spec import SlabSpec
from eg3d_rlhf.experiments.media.sheet import shade
from eg3d_rlhf.generators import as_generator, camera, latents
from training.heads.people import normalise_latents
from training.heads.people_flaws import flaw_amounts
from training.heads.people_mesh import ground_truth_grids
from training.storage import write_atomic

VIEWS = (
    0.0,
    math.pi / 2,
    0.86 * math.pi,
)  # yaw of the views: front, side, and oblique from the back, radians
LATENT_COUNT = 8  # N
PIXELS = 160  # R
POINTS = 112  # grid points per edge of the densities that are shaded
CANDIDATES = 100  # latents among which those of each kind are selected


@functools.cache
def fixed_latents() -> torch.Tensor:
    """Return latents [N, 64]: two heads each without flaws, with a flat back, a swelling, and both."""
    z = torch.from_numpy(normalise_latents(latents(BUILDER.take(CANDIDATES), 64))).float()
    amounts = flaw_amounts(z)
    selected_rows = []
    for flat, swelling in ((0, 0), (1, 0), (0, 1), (1, 1)):
        is_of_kind = (amounts[:, 0] == flat) & (amounts[:, 1] == swelling)
        selected_rows += torch.nonzero(is_of_kind).flatten().tolist()[: LATENT_COUNT // 4]
    return z[selected_rows]


@functools.cache
def _ground_truth() -> torch.Tensor:
    """Return the densities [N, D, H, W] of the intact heads of the fixed latents, up to a factor."""
    grids = torch.from_numpy(ground_truth_grids(fixed_latents(), 64))
    return -grids.permute(0, 3, 2, 1).contiguous()  # axes x, y, z -> z, y, x


@torch.no_grad()
def write_renders(G_ema: Any, path: Path) -> None:
    """Write one PNG with a column for each of the fixed latents.

    The first row shows the colours from the front. Then follow, for the front, the side and the
    back, a row of the generator's shapes and a row of the ground-truth heads without flaws.

    Args:
        G_ema: network of the generator.
        path: path of the image, whose folder is made.
    """
    generator = as_generator(G_ema)
    z = fixed_latents()
    field = generator.field(generator.mapping(z, camera(generator, n=len(z))))
    colours = field.render(camera(generator, n=len(z)), RenderOptions(resolution=PIXELS)).raw
    rows = [_row((colours / 2 + 0.5).clamp(0, 1))]
    densities = field.density_grid(SlabSpec.cube(POINTS))  # [N, D, H, W]
    for yaw in VIEWS:
        rows.append(_row(shade(densities, yaw, PIXELS, field.level).expand(-1, 3, -1, -1)))
        # The grids hold distances, whose level is 0.
        rows.append(_row(shade(_ground_truth(), yaw, PIXELS, 0.0).expand(-1, 3, -1, -1)))
    image = np.round(255 * np.concatenate(rows)).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    PIL.Image.fromarray(image).save(buffer, format="png")
    write_atomic(path, buffer.getvalue())


def _row(images: torch.Tensor) -> np.ndarray:
    """Join images [N, 3, R, R] of 0..1 to a row [R, N R, 3]."""
    return torch.cat(images.permute(0, 2, 3, 1).unbind(), dim=1).numpy()
