"""A ball of density as a field that the project's own renderer renders, so that positions are known
exactly.
"""

import torch

from eg3d_rlhf.core.field import DEFAULT_OPTIONS, Bounds, CameraFamily, Rendering
from training.rendering.cameras import RaySampler
from training.rendering.renderer import ImportanceRenderer

OPTIONS = {"ray_start": "auto", "ray_end": "auto", "box_warp": 1.0, "importance_stratified": True}


class Renderer(ImportanceRenderer):
    """Renderer of the density 60 exp(-|p - c|^2 / (2 s^2)) - 15 at points [N, P, 3]."""

    def __init__(self, centres: torch.Tensor, size: float):
        super().__init__()
        self.centres = centres
        self.size = size

    def run_model(self, planes, decoder, sample_coordinates, *_args, **_options):
        distance = (sample_coordinates - self.centres[:, None]).square().sum(dim=2, keepdim=True)
        sigma = 60 * torch.exp(-distance / (2 * self.size**2)) - 15
        return {"sigma": sigma, "rgb": torch.zeros_like(sigma).expand(-1, -1, 3)}

    def merge(self, planes):
        return None


class Ball:
    """N balls with centres [N, 3]."""

    bounds = Bounds()
    level = 10.0
    cameras = CameraFamily()

    def __init__(self, centres: torch.Tensor, size: float = 0.15):
        self.centres = centres
        self.size = size

    def __len__(self):
        return len(self.centres)

    def render(self, cameras, options=DEFAULT_OPTIONS):
        n = len(self)
        r = options.resolution
        cameras = cameras.expand(n, -1).float()
        origins, directions = RaySampler()(
            cameras[:, :16].reshape(-1, 4, 4), cameras[:, 16:].reshape(-1, 3, 3), r
        )
        samples = {"depth_resolution": options.samples, "depth_resolution_importance": options.samples}
        renderer = Renderer(self.centres, self.size)
        rendered = renderer(
            torch.zeros(n, 3, 1, 2, 2), torch.nn.Identity(), origins, directions, {**OPTIONS, **samples}
        )
        rgb, depth, opacity = (part.transpose(1, 2).reshape(n, -1, r, r) for part in rendered)
        return Rendering(rgb, rgb, depth, opacity)
