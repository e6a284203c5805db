"""GAN loss terms: pure, unreduced functions of tensors. The loop reduces, scales and runs backward.

Shapes: N batch, C channels, R final and r raw resolution, P points.
"""

import math

import torch

from torch_utils.ops import upfirdn2d

REG_TYPES = ("l1", "monotonic-detach", "monotonic-fixed")


def generator_loss(fake_logits: torch.Tensor) -> torch.Tensor:
    """Non-saturating logistic loss softplus(-D(fake)) (Goodfellow et al. 2014). fake_logits [N, 1] -> [N]."""
    return torch.nn.functional.softplus(-fake_logits).squeeze(1)


def discriminator_fake_loss(fake_logits: torch.Tensor) -> torch.Tensor:
    """softplus(D(fake)). fake_logits [N, 1] -> [N]."""
    return torch.nn.functional.softplus(fake_logits).squeeze(1)


def discriminator_real_loss(real_logits: torch.Tensor) -> torch.Tensor:
    """softplus(-D(real)). real_logits [N, 1] -> [N]."""
    return torch.nn.functional.softplus(-real_logits).squeeze(1)


def r1_penalty(real_logits: torch.Tensor, *fed: torch.Tensor) -> torch.Tensor:
    """Squared gradient norm of D at real images (Mescheder et al. 2018), summed over pixels and over all `fed` tensors.

    Args:
        real_logits: [N, 1]; fed: the tensors that the discriminator was given, after blur and augmentation, each [N, C, H, W].
    Returns: [N]. Differentiable in the discriminator's parameters (second order).
    """
    gradients = torch.autograd.grad(outputs=[real_logits.sum()], inputs=list(fed), create_graph=True, only_inputs=True)
    return sum(g.square().sum(dim=[1, 2, 3]) for g in gradients)


def density_l1(sigma: torch.Tensor) -> torch.Tensor:
    """Mean |sigma(x) - sigma(x + e)| of raw densities.

    Args:
        sigma: [N, 2P, 1], the points in the first half and their perturbed copies in the second.
    Returns: [N].
    """
    first, second = sigma.chunk(2, dim=1)
    return (first - second).abs().mean(dim=[1, 2])


def density_monotonic(sigma: torch.Tensor, detach_front: bool) -> torch.Tensor:
    """Mean relu(sigma(front) - sigma(behind)): density should not fall from front to back.

    Args:
        sigma: [N, 2P, 1], front points first, the points one voxel behind them second; detach_front: gradient to the points behind only.
    Returns: [N].
    """
    front, behind = sigma.chunk(2, dim=1)
    if detach_front:
        front = front.detach()
    return torch.relu(front - behind).mean(dim=[1, 2])


def blur(image: torch.Tensor, sigma: float) -> torch.Tensor:
    """Gaussian-like blur exp2(-(k/sigma)^2), |k| <= floor(3 sigma), zero-padded; nothing below a third of a pixel.

    Args:
        image: [N, C, H, W]; sigma: pixels.
    Returns: as image. Differentiable in image.
    """
    radius = math.floor(sigma * 3)
    if radius <= 0:
        return image
    taps = torch.arange(-radius, radius + 1, device=image.device).div(sigma).square().neg().exp2()
    return upfirdn2d.filter2d(image, taps / taps.sum())
