"""Page with a slider over the strength of a steering: samples of eight held-out latents, in one file."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eg3d_rlhf.core.seeds import STEERING
from eg3d_rlhf.core.spec import SlabSpec
from eg3d_rlhf.experiments.media.rendering import png, to_uint8
from eg3d_rlhf.experiments.media.sheet import shade
from eg3d_rlhf.experiments.pages import data_uri, fill, script_json
from eg3d_rlhf.generators import Generator, camera, device_of, latents
from eg3d_rlhf.tuning.gan.steering import CUTOFF, Direction
from eg3d_rlhf.tuning.gan.steering_settings import GRID
from torch_utils.ops.implementations import implementation
from training.storage import write_atomic

LATENTS = 8  # samples on the page
PIXELS = 96  # edge of an image on the page
VIEWS = ("image from the front", "surface of the back")
_GRID_POINTS = 48  # grid points per axis of the surface seen from the back
_CANDIDATES = 24  # held-out latents from which those of the page are chosen


def choose_latents(coordinates: np.ndarray) -> list[int]:
    """Return the indices of the samples on the page, in ascending order of their coordinates.

    They are spread evenly over the ranks of the coordinates, so that the page shows samples which every
    strength moves and samples which hardly any strength moves.

    Args: coordinates: coordinates along the direction, [N].
    """
    # Even in ranks and not in coordinates, which are dense near 0 and sparse at both ends.
    ranks = np.linspace(0, len(coordinates) - 1, min(LATENTS, len(coordinates))).round().astype(int)
    return [int(index) for index in np.argsort(coordinates)[ranks]]


@torch.no_grad()
def render_views(generator: Generator, ws: torch.Tensor) -> list[np.ndarray]:
    """Render one sample [1, L, W] from the front, and its back surface: uint8 [H, H, 3] each."""
    # the jitter of the rays, so that images of one latent differ by the steering alone
    torch.manual_seed(0)
    field = generator.field(ws)
    image = field.render(camera(generator)).image[0].float().cpu()
    # Antialiased, since a plain bilinear reduction skips pixels. [1, 3, H, H]
    image = torch.nn.functional.interpolate(
        image[None], (PIXELS, PIXELS), mode="bilinear", antialias=True, align_corners=False
    )[0]
    # No crop: the page shows the complete shape, and not only the slab that rewards read.
    density = field.density_grid(SlabSpec.from_bounds(field.bounds, _GRID_POINTS, crop=(0.0,) * 6))
    # An angle of pi would show the back alone. The offset of 0.4 radians shows the side as well.
    grey = shade(density.float().cpu(), torch.pi - 0.4, PIXELS, field.level)[0, 0].numpy()
    # [H, H] -> [H, H, 3]
    surface = (grey[..., None] * 255).round().astype(np.uint8).repeat(3, axis=2)
    return [to_uint8(image), surface]


@torch.no_grad()
def write_page(
    generator: Generator,
    direction: Direction,
    report: Mapping[str, Any],
    path: Path,
    layers: int | None = None,
    on_rendered: Callable[[int], None] = lambda count: None,
) -> Path:
    """Render eight samples at every strength, and write the page. Return its path.

    Args:
        generator: generator without steering.
        direction: direction of the moves.
        report: report of the steering, whose frontier the page lists.
        path: file to write.
        layers: space w: number of first layers that are moved; None: all.
        on_rendered: function that is called with 1 after each latent.
    """
    z_dim = generator.z_dim
    # Strength 0 is the first column: the sample as it is.
    strengths = [0.0, *(strength for strength in GRID if strength**2 < z_dim)]
    # the last seeds of the range; the first ones are those of the comparison
    seeds = STEERING.seeds[-_CANDIDATES:]
    z = latents(seeds, z_dim).to(device_of(generator))

    def map_latents(latent: torch.Tensor) -> torch.Tensor:
        """Map latents [N, Z] to style vectors [N, L, W]."""
        return generator.mapping(
            latent, camera(generator, n=len(latent)), truncation_psi=report["psi"], truncation_cutoff=CUTOFF
        )

    # the strength does not matter for coordinates
    steering = direction.to_steering(0.5).to(z.device)
    # The first style vector of each sample stands for all layers, [N, L, W] -> [N, W].
    coordinates = steering.coordinates(z if direction.space == "z" else map_latents(z)[:, 0]).cpu().numpy()
    chosen_indices = choose_latents(coordinates)
    # one row of the sprite for each latent and view, one column for each strength
    rows: list[np.ndarray] = []
    # `render_views` sets the global seed. The fork restores the state of the caller afterwards.
    with torch.random.fork_rng(devices=[z.device] if z.device.type == "cuda" else []), implementation("auto"):
        for index in chosen_indices:
            latent = z[index : index + 1]
            plain_ws = map_latents(latent)
            previous_ws = None
            columns: list[list[np.ndarray]] = []
            for strength in strengths:
                ws = plain_ws
                if strength > 0:
                    steering = direction.to_steering(strength, layers).to(z.device)
                    # Only the move in the steering's space changes anything, so both can be applied.
                    ws = steering.move_ws(map_latents(steering.move_z(latent)))
                # A sample that the strength does not move is not rendered again.
                is_unchanged = previous_ws is not None and torch.equal(ws, previous_ws)
                columns.append(columns[-1] if is_unchanged else render_views(generator, ws))
                previous_ws = ws
            # One row: all strengths of one view side by side, [H, H strengths, 3].
            rows += [
                np.concatenate([images[view] for images in columns], axis=1) for view in range(len(VIEWS))
            ]
            on_rendered(1)
    table_columns = ("strength", "reward", "held-out reward", "harmed")
    chosen_strength = report["strength"] or 0.0
    data = {
        "strengths": strengths,
        "coordinates": [float(coordinates[index]) for index in chosen_indices],
        "views": len(VIEWS),
        "sprite": data_uri(png(np.concatenate(rows)), "image/png"),
    }
    page = fill(
        "steering",
        title="Steering by labels",
        introduction=(
            f"A direction in the space {direction.space} of the generator's latents, from {report['labels']}"
            f" labels. Samples whose coordinate is below the strength are moved to it; the others stay as"
            f" they are. The written network has the strength {chosen_strength:g}; at 0 the samples are as"
            " the generator made them. Each sample is shown from the front, and its surface from the back."
        ),
        seeds=[seeds[index] for index in chosen_indices],
        views=VIEWS,
        strengths=strengths,
        # The slider starts at the strength that is closest to that of the written network.
        start=int(np.argmin([abs(strength - chosen_strength) for strength in strengths])),
        caption=(
            "Mean rewards of held-out latents by strength, with 60 % of the labels; the held-out reward was"
            " fitted to the other 40 %."
        ),
        columns=table_columns,
        rows=[
            [
                f"{entry['strength']:g}",
                f"{entry['reward']:.3f}",
                f"{entry['heldout']:.3f}",
                f"{entry['harmed']:.1%}",
            ]
            for entry in report["frontier"]
        ],
        data=script_json(data),
    )
    write_atomic(path, page.encode())
    return path
