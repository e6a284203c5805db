"""Where the reward enters an inversion:

    L = L_image + lambda * (-clip(r, -10, 10) / 10) + lambda_sigma * mean |sigma - sigma_pivot|

r is the reward's score, standardised on samples of the untuned generator; sigma_pivot is the density of the latent that the second stage
starts from, over the whole cube, so that the reward cannot trade what the image does not show. Letters: N shapes, D, H, W grid points.
"""

import torch
from torch import Tensor

from eg3d_rlhf.core.field import Field
from eg3d_rlhf.core.seeds import STANDARDISATION
from eg3d_rlhf.core.spec import SlabSpec
from eg3d_rlhf.generators import Generator, camera, device_of, latents
from eg3d_rlhf.rewards.reward import Reward
from eg3d_rlhf.tuning.gan.phase import CUTOFF, Standardised, density_l1

CLIP = 10.0  # of the standardised reward
CUBE = 64  # grid points per edge of the cube that is held to the pivot


class Guidance:
    """The reward of one generator's shapes, frozen and standardised on that generator's samples.

    Args: reward: has been checked against the generator.
    """

    @torch.no_grad()
    def __init__(self, generator: Generator, reward: Reward):
        self.reward = reward.eval().requires_grad_(False).arranged()
        z = latents(STANDARDISATION.all, generator.z_dim).to(device_of(generator))
        scores = []
        for part in z.split(16):
            ws = generator.mapping(part, camera(generator, n=len(part)), truncation_cutoff=CUTOFF)
            scores.append(self.reward.score(generator.field(ws)))
        self.standard = Standardised(torch.cat(scores)).to(z.device)

    def term(self, field: Field) -> tuple[Tensor, Tensor]:
        """-clip(standardised reward) / 10, and the raw reward: [N] each. Differentiable in the field."""
        score = self.reward.score(field)
        return -self.standard.shaped(score).clamp(-CLIP, CLIP) / CLIP, score


def cube_of(generator: Generator) -> SlabSpec:
    """The grid over the generator's whole cube."""
    return SlabSpec.of(generator.bounds, CUBE)


def moved(field: Field, cube: SlabSpec, pivot: Tensor) -> Tensor:
    """Mean absolute change [N] of raw density from the pivot's [N, D, H, W]. Differentiable in the field."""
    return density_l1(field.density_grid(cube), pivot)
