"""Renderings of one latent from any camera, as uint8 pictures that depend on nothing but the seed and the camera.

Letters: L, W = layers and width of ws; H, B = rows and columns of a picture.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from eg3d_rlhf.generators import latents
from training.rendering.cameras import FOV_to_intrinsics, camera_position, look_at, pack_label
from training.triplane import TriPlaneGenerator

FFHQ_FOV = 18.837  # degrees over the image's diagonal
CAMERAS = {  # by data set: pivot in world units, field of view in degrees
    "FFHQ": {"pivot": (0.0, 0.0, 0.2), "fov": FFHQ_FOV},
    "AFHQ": {"pivot": (0.0, 0.0, -0.06), "fov": FFHQ_FOV},
    "Shapenet": {"pivot": (0.0, 0.0, 0.0), "fov": 45.0},
}
MODES = ("image", "image_depth", "image_raw")


@dataclass(frozen=True, kw_only=True)
class Orbit:
    """Cameras on a sphere about the world's origin."""

    radius: float  # world units, > 0
    pivot: tuple[float, float, float]  # point looked at, world units
    fov: float = FFHQ_FOV  # degrees, of the image's diagonal, 0 < fov < 180

    def __post_init__(self) -> None:
        if not self.radius > 0 or not 0 < self.fov < 180:
            raise ValueError(f"Orbit: expected radius > 0 and 0 < fov < 180, got {self.radius:g} and {self.fov:g}. Correct them.")

    @classmethod
    def of(cls, G: TriPlaneGenerator, **settings) -> "Orbit":
        """The generator's own average radius and pivot; `settings` override fields."""
        own = {
            "radius": float(G.rendering_kwargs.get("avg_camera_radius", 2.7)),
            "pivot": tuple(float(v) for v in G.rendering_kwargs.get("avg_camera_pivot", (0.0, 0.0, 0.0))),
        }
        return cls(**{**own, **settings})

    def label(self, yaw: float = 0.0, pitch: float = 0.0, device: str | torch.device = "cpu") -> torch.Tensor:
        """Camera label [1, 25]; yaw and pitch in radians from frontal, as EG3D's tools count them (negative pitch looks from above)."""
        h, v = (torch.tensor([[math.pi / 2 + angle]], device=device) for angle in (yaw, pitch))
        pose = look_at(camera_position(h, v, self.radius), torch.tensor(self.pivot, device=device))
        return pack_label(pose, FOV_to_intrinsics(self.fov, device=device))


def refine(G: TriPlaneGenerator, sample_mult: float = 1.0, nrr: int | None = None) -> None:
    """Change how G renders, for good: `sample_mult` times the samples per ray in either pass, `nrr` rendered pixels per edge.

    Raises: ValueError for sample_mult <= 0 or nrr < 1.
    """
    if sample_mult <= 0 or (nrr is not None and nrr < 1):
        raise ValueError(f"refine: expected sample_mult > 0 and nrr >= 1, got {sample_mult:g} and {nrr}. Correct them.")
    passes = ("depth_resolution", "depth_resolution_importance")
    G.rendering_kwargs = {**G.rendering_kwargs, **{key: round(G.rendering_kwargs[key] * sample_mult) for key in passes}}
    if nrr is not None:
        G.neural_rendering_resolution = nrr


@torch.no_grad()
def conditioned_ws(G: TriPlaneGenerator, seeds: Sequence[int], orbit: Orbit, psi: float = 1.0, cutoff: int | None = 14) -> torch.Tensor:
    """ws [N, L, W] of seeds, conditioned on the orbit's frontal camera, as EG3D's tools condition them."""
    device = next(G.parameters()).device
    c = orbit.label(device=device).expand(len(seeds), -1)
    return G.mapping(latents(seeds, G.z_dim).to(device), c, truncation_psi=psi, truncation_cutoff=cutoff)


@torch.no_grad()
def render(
    G: TriPlaneGenerator, ws: torch.Tensor, labels: Sequence[torch.Tensor], seed: int = 0, noise_mode: str = "const", mode: str = "image"
) -> list[np.ndarray]:
    """Pictures of ws [1, L, W] from cameras [1, 25], from one synthesis pass.

    The ray sampler's jitter and the noise come from torch's global generator; it is seeded before every picture and its state put back, so
    that a picture depends on nothing that was drawn before.

    Args: mode: 'image', 'image_raw' (before super-resolution) or 'image_depth'.
    Returns: one array per camera, uint8 [H, B, 3], or `distances` for 'image_depth'.
    """
    pictures = []
    cuda = [ws.device] if ws.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=cuda):
            for i, label in enumerate(labels):
                torch.manual_seed(seed)
                out = G.synthesis(ws, label.to(ws.device), noise_mode=noise_mode, cache_backbone=i == 0, use_cached_backbone=i > 0)
                pictures.append(distances(out) if mode == "image_depth" else to_uint8(out[mode][0].float().cpu()))
    finally:
        G._last_planes = None
    return pictures


def to_uint8(image: torch.Tensor) -> np.ndarray:
    """[3, H, B] in -1..1 to uint8 [H, B, 3], as EG3D maps it: x * 127.5 + 128, clamped and cut off."""
    return (image.permute(1, 2, 0) * 127.5 + 128).clamp(0, 255).to(torch.uint8).numpy()


def distances(out: dict[str, torch.Tensor]) -> np.ndarray:
    """Distances along the rays [H, B] float32 of a rendering, infinite where a ray's opacity is under one half.

    Deviates: EG3D shows what the march leaves there, the mean distance of next to nothing.
    """
    depth, opacity = out["image_depth"][0, 0].float(), out["image_opacity"][0, 0]
    return torch.where(opacity >= 0.5, depth, torch.full_like(depth, torch.inf)).cpu().numpy()


def shade_depth(depth: np.ndarray) -> np.ndarray:
    """Distances [H, B] to grey uint8 [H, B, 3], each picture from dark grey (far) to white (near); infinite ones are black."""
    seen = np.isfinite(depth)
    low, high = (float(depth[seen].min()), float(depth[seen].max())) if seen.any() else (0.0, 0.0)
    share = (high - np.where(seen, depth, high)) / max(high - low, 1e-12)  # 0 far, 1 near
    grey = np.where(seen, np.rint(32 + 223 * share), 0).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=2)


def tile(pictures: Sequence[np.ndarray], columns: int) -> np.ndarray:
    """Pictures [H, B, 3] of one size as one [rows * H, columns * B, 3], row by row."""
    stack = np.stack(pictures)
    height, width = stack.shape[1:3]
    grid = stack.reshape(-1, columns, height, width, 3)
    return np.ascontiguousarray(grid.transpose(0, 2, 1, 3, 4)).reshape(-1, columns * width, 3)
