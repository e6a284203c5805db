"""Rendering of one latent from any camera, as uint8 images that depend on seed and camera only.

Letters: L, W = layers and width of ws; H, B = rows and columns of an image.
"""

import contextlib
import dataclasses
import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL.Image
import torch

from eg3d_rlhf.core.field import OWN, CameraFamily, Rendering, RenderOptions, render_each
from eg3d_rlhf.experiments.media.settings import FFHQ_FOV
from eg3d_rlhf.generators import Generator, check_seeds, device_of, latents
from training.progress import tqdm

MOST_SEEDS = 100_000
_LARGEST = 2**32 - 1  # largest seed of numpy's RandomState
_SCALED = 10_000  # larger totals are shown with k and M


def cameras_of(generator: Generator, fov: float = FFHQ_FOV, **place: Any) -> CameraFamily:
    """Return a generator's cameras with another field of view.

    Args: fov: over the diagonal of the image, in degrees; place: overrides radius or pivot.
    Raises: ValueError for a field of view outside 0 < fov < 180.
    """
    if not 0 < fov < 180:
        raise ValueError(
            f"cameras: expected a field of view of 0 < fov < 180 degrees, got {fov:g}. Correct it."
        )
    # EG3D's FOV_to_intrinsics, with its rounded pi and square root of 2
    return dataclasses.replace(generator.cameras, focal=1 / (math.tan(fov * 3.14159 / 360) * 1.414), **place)


def camera(
    cameras: CameraFamily,
    yaw: float = 0.0,
    pitch: float = 0.0,
    n: int = 1,
    device: str | torch.device = "cpu",
) -> torch.Tensor:
    """Make camera labels [n, 25] of a family, at angles in radians from the frontal view.

    Angles are counted as in EG3D's tools: a negative pitch looks from above. Torch's random state is kept.
    """
    # `label` may use the random state; fork_rng needs the CUDA devices by name
    with torch.random.fork_rng(devices=[device] if torch.device(device).type == "cuda" else []):
        return cameras.label(yaw, pitch, n, device)


@torch.no_grad()
def conditioned_ws(
    generator: Generator,
    seeds: Sequence[int],
    cameras: CameraFamily,
    psi: float = 1.0,
    cutoff: int | None = 14,
) -> torch.Tensor:
    """Map seeds to ws [N, L, W], conditioned on the frontal camera of a family, as EG3D's tools do."""
    check_seeds(generator, max(seeds, default=0), "--seeds")
    device = device_of(generator)
    c = camera(cameras, n=len(seeds), device=device)
    return generator.mapping(
        latents(seeds, generator.z_dim).to(device), c, truncation_psi=psi, truncation_cutoff=cutoff
    )


@torch.no_grad()
def render(
    generator: Generator,
    ws: torch.Tensor,
    labels: Sequence[torch.Tensor],
    seed: int = 0,
    noise_mode: str = "const",
    mode: str = "image",
    options: RenderOptions = OWN,
) -> list[np.ndarray]:
    """Render ws [1, L, W] from cameras [1, 25], with one synthesis pass.

    The ray sampler's jitter and the noise come from torch's global generator. It is seeded before every image
    and restored afterwards, so that an image does not depend on earlier ones. The first image continues the
    random numbers of the synthesis, as in EG3D.

    Args: mode: 'image', 'image_raw' (before super-resolution) or 'image_depth'.
    Returns: one array per camera, uint8 [H, B, 3], or `distances` for 'image_depth'.
    """
    with torch.random.fork_rng(devices=[ws.device] if ws.device.type == "cuda" else []):
        torch.manual_seed(seed)
        field = generator.field(ws, noise_mode)
        first = [field.render(label.to(ws.device), options) for label in labels[:1]]
    renderings = first + render_each(field, (label.to(ws.device) for label in labels[1:]), options, seed)
    # mode -> field of Rendering
    maps = {"image": "image", "image_raw": "raw"}
    return [
        distances(out) if mode == "image_depth" else to_uint8(getattr(out, maps[mode])[0].float().cpu())
        for out in renderings
    ]


def to_uint8(image: torch.Tensor) -> np.ndarray:
    """Convert [3, H, B] in -1..1 to uint8 [H, B, 3] as EG3D does: x * 127.5 + 128, clamped and truncated."""
    return (image.permute(1, 2, 0) * 127.5 + 128).clamp(0, 255).to(torch.uint8).numpy()


def png(image: np.ndarray) -> bytes:
    """Encode an image, uint8 [H, B, 3], as PNG."""
    buffer = io.BytesIO()
    PIL.Image.fromarray(image).save(buffer, format="png")
    return buffer.getvalue()


def distances(out: Rendering) -> np.ndarray:
    """Return the distances along the rays, [H, B] float32, infinite where the opacity is below one half.

    Deviates: EG3D shows the mean distance there too, although hardly anything is hit.
    """
    depth = out.depth[0, 0].float()
    opacity = out.opacity[0, 0]
    return torch.where(opacity >= 0.5, depth, torch.full_like(depth, torch.inf)).cpu().numpy()


def shade_depth(depth: np.ndarray) -> np.ndarray:
    """Convert distances [H, B] to grey values, uint8 [H, B, 3].

    Each image ranges from dark grey (far) to white (near); infinite distances are black.
    """
    seen = np.isfinite(depth)  # an image without any hit is black
    low, high = (float(depth[seen].min()), float(depth[seen].max())) if seen.any() else (0.0, 0.0)
    # the guard is for an image whose distances are all equal
    share = (high - np.where(seen, depth, high)) / max(high - low, 1e-12)  # 0 far, 1 near
    grey = np.where(seen, np.rint(32 + 223 * share), 0).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=2)


def tile(images: Sequence[np.ndarray], columns: int) -> np.ndarray:
    """Arrange images [H, B, 3] of one size as one [rows * H, columns * B, 3], row by row."""
    stack = np.stack(images)
    height, width = stack.shape[1:3]
    grid = stack.reshape(-1, columns, height, width, 3)
    # [rows, columns, H, B, 3] -> [rows, H, columns, B, 3]
    return np.ascontiguousarray(grid.transpose(0, 2, 1, 3, 4)).reshape(-1, columns * width, 3)


def parse_seeds(text: str) -> list[int]:
    """Parse a comma-separated list of numbers and inclusive ranges: '0,2-5' -> [0, 2, 3, 4, 5].

    The order is kept. Raises: ValueError for anything else, an empty list, a descending range, a seed above
    2^32 - 1, or more than 100,000 seeds.
    """
    seeds: list[int] = []
    for part in text.split(","):
        first, dash, last = (piece.strip() for piece in part.partition("-"))
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ValueError(
                f"seeds: expected numbers and ranges such as 0,2-5, got {text!r}. Correct {part.strip()!r}."
            )
        start = int(first)
        end = int(last or first)
        if start > end or end > _LARGEST:
            raise ValueError(
                f"seeds: expected ascending ranges up to {_LARGEST}, got {part.strip()!r}. Correct it."
            )
        # checked before the range is expanded, which could need more memory than there is
        if len(seeds) + end - start >= MOST_SEEDS:
            raise ValueError(
                f"seeds: expected at most {MOST_SEEDS} seeds, got more in {text!r}. Run the seeds in parts."
            )
        seeds += range(start, end + 1)
    return seeds


class StageBar(contextlib.AbstractContextManager["StageBar", None]):
    """Progress bar for each stage, with the time left; called with (stage, units done, units in total)."""

    def __init__(self, prefix: str = ""):
        self._prefix = prefix
        self._stage = ""
        self._bar: tqdm | None = None

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Move the stage's bar to `done` of `total`; a new stage closes the bar and starts another."""
        # a bar's total is fixed, so each stage needs another bar
        if self._bar is None or stage != self._stage:
            self.close()
            self._stage = stage
            self._bar = tqdm(total=total, desc=f"{self._prefix}{stage}", unit_scale=total >= _SCALED)
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        """Close the bar, if there is one."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def __exit__(self, *exc: object) -> None:
        self.close()
