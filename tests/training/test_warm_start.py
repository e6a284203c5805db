"""Geometric initialisation: the generator becomes a solid sphere."""

import pytest
import torch

from training.starts import EMPTY, SOLID, fit_sphere, sphere_target
from training.triplane import TriPlaneGenerator

RENDERING = {
    "superresolution_module": "SuperresolutionHybrid2X", "sr_antialias": True, "c_gen_conditioning_zero": True, "c_scale": 1,
    "superresolution_noise_mode": "none", "box_warp": 1, "ray_start": 2.2, "ray_end": 3.2, "depth_resolution": 4,
    "depth_resolution_importance": 0, "clamp_mode": "softplus",
}


def test_target_is_solid_inside_and_empty_outside():
    points = torch.tensor([[[0.0, 0, 0], [0.25, 0, 0], [0, 0.45, 0]]])
    assert sphere_target(points, 0.25).squeeze().tolist() == [SOLID, (SOLID + EMPTY) / 2, EMPTY]


@pytest.mark.long
def test_fit_makes_a_sphere_and_repeats():
    def fitted() -> TriPlaneGenerator:
        torch.manual_seed(0)
        G = TriPlaneGenerator(
            8, 25, 32, 32, 3, rendering_kwargs=RENDERING, sr_kwargs={"input_resolution": 16, "block_channels": [4, 4]}, plane_resolution=32,
            plane_channels=8, decoder_hidden_dim=16, channel_base=512, channel_max=16, plane_layout="fixed", num_fp16_res=0,
        )
        fit_sphere(G, 0.25, seed=1, steps=500, points=512, progress=False)
        return G.eval()

    G = fitted()
    ws = G.mapping(torch.randn(4, 8), torch.zeros(4, 25))
    points = torch.rand(1, 2000, 3).sub(0.5).expand(4, -1, -1)
    sigma = G.sample_mixed(points, None, ws, noise_mode="const")["sigma"]
    distance = points.norm(dim=-1, keepdim=True)
    assert sigma[distance < 0.15].mean() > 8 and sigma[distance > 0.4].mean() < -2
    assert not any(p.requires_grad for p in G.parameters())
    assert all(torch.equal(a, b) for a, b in zip(G.state_dict().values(), fitted().state_dict().values(), strict=True))
