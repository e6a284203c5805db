"""Geometric initialisation: a generator from scratch starts as a solid sphere (as StyleSDF does, Or-El et al. 2022, section 3.1).

Without it a small generator may settle on the hollow-face illusion: the face painted on the inner side of the back of the head, which
explains the images from nearby cameras just as well.

Letters: N batch, P points.
"""

import torch
from tqdm import tqdm

INSIDE, OUTSIDE = 50.0, -10.0  # raw density; the isosurface level 10 lies between; 50 is opaque within two samples of a short ray
EDGE = 0.05  # half the width of the transition, world units


def sphere_target(points: torch.Tensor, radius: float) -> torch.Tensor:
    """Raw density of the sphere: OUTSIDE to INSIDE, linear over 2 EDGE around the surface. points [N, P, 3] -> [N, P, 1]."""
    depth = (radius - points.norm(dim=-1, keepdim=True)) / EDGE
    return (INSIDE + OUTSIDE) / 2 + (INSIDE - OUTSIDE) / 2 * depth.clamp(-1, 1)


def fit_sphere(
    G: torch.nn.Module, radius: float, seed: int, steps: int = 300, batch: int = 4, points: int = 2048, lr: float = 2e-3,
    progress: bool = True,
) -> float:
    """Fit the density of random latents to one sphere, by Adam on all of G's parameters.

    Args:
        radius: world units; seed: of the draws; steps, batch, points, lr: of the fit.
    Returns: mean absolute error of the last step, raw density.
    """
    torch.manual_seed(seed)
    device = next(G.parameters()).device
    box_warp = float(G.rendering_kwargs["box_warp"])
    G.requires_grad_(True)
    optimizer = torch.optim.Adam(G.parameters(), lr=lr, betas=(0.0, 0.99))
    error = float("nan")
    for _ in tqdm(range(steps), desc="sphere initialisation", disable=not progress):
        z, c = torch.randn([batch, G.z_dim], device=device), torch.zeros([batch, G.c_dim], device=device)
        x = (torch.rand([batch, points, 3], device=device) - 0.5) * box_warp
        sigma = G.sample_mixed(x, None, G.mapping(z, c))["sigma"]
        loss = torch.nn.functional.smooth_l1_loss(sigma, sphere_target(x, radius))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        error = float((sigma.detach() - sphere_target(x, radius)).abs().mean())
    optimizer.zero_grad(set_to_none=True)
    G.requires_grad_(False)
    return error
