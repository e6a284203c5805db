"""The reward phase (Grlhf): L = -lambda_r mean clip(shape(r(o(G(z))))) + lambda_sigma mean |sigma_G - sigma_ref| (+ front growth).

o is what the reward observes. Letters: N batch, Z z_dim, K c_dim, L num_ws, W w_dim; D, H, W grid points along z, y, x.
"""

import copy
import dataclasses
from collections.abc import Iterator

import torch

from eg3d_rlhf.generators import Generator, camera, device_of, latents, of
from eg3d_rlhf.reward.reward import Reward
from eg3d_rlhf.rlhf.shaping import SHAPINGS, Shaping, clip_bounds, make_shaping, parse_clip
from eg3d_rlhf.seeds import CALIBRATION
from eg3d_rlhf.sigma.spec import SlabSpec
from training.config import check_knobs, knob
from training.gan_phases import Batch
from training.phases import Loss, Phase

REWARD = "Reward fine-tuning"  # title of its flags
CUTOFF = 14  # truncation cutoff of the method: all ws of the published backbone


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """Settings of the reward phase."""

    lambda_r: float = knob(10.0, "Reward weight; 0 is the GAN run, bit for bit.", REWARD, low=0)
    lambda_sigma: float = knob(0.01, "Density consistency weight.", REWARD, low=0)
    lambda_front: float = knob(0.0, "Front-growth penalty weight.", REWARD, low=0)
    reward_clip: str = knob("-10,10", "Trust region of the shaped reward.", REWARD, metavar="LOW,HIGH|iqr|none")
    reward_shaping: str = knob("none", "How the score enters the loss.", REWARD, choices=SHAPINGS)
    anchor_resolution: int = knob(64, "Grid points per edge of the whole cube that is held to the reference.", REWARD, low=2, flag=False)
    truncation_psi: float = 1.0  # of the samples that are scored
    anchor_psi: float = 0.7  # of the samples that are held to the reference

    def __post_init__(self):
        check_knobs(self)
        parse_clip(self.reward_clip)


class RewardPhaseState(torch.nn.Module):
    """What the phase carries through a checkpoint: the frozen reference, the shaping's constants and the clip bounds."""

    bounds: torch.Tensor

    def __init__(self, G_ref: torch.nn.Module, shaping: torch.nn.Module, bounds: tuple[float, float]):
        super().__init__()
        self.G_ref = G_ref
        self.shaping = shaping
        self.register_buffer("bounds", torch.tensor(bounds))
        self.eval().requires_grad_(False)


class RewardTerms:
    """Losses of Grlhf.

    Args:
        G: the generator being tuned; G_ema: its pretrained moving average, copied and frozen as the reference.
        reward: frozen; it has been checked against the generator.
    """

    def __init__(self, G: torch.nn.Module, G_ema: torch.nn.Module, reward: Reward, config: RewardConfig):
        self.generator, self.config = of(G), config
        self.reward = reward.eval().requires_grad_(False).arranged()
        G_ref = copy.deepcopy(G_ema).eval().requires_grad_(False)
        self.reference = of(G_ref)
        self.cube = SlabSpec.of(self.generator.bounds, config.anchor_resolution)
        scores, shaped, shaping = self._calibrate(self.reference)
        self.state = RewardPhaseState(G_ref, shaping, clip_bounds(config.reward_clip, shaped))
        self.initial_scores = scores

    @torch.no_grad()
    def _calibrate(self, reference: Generator) -> tuple[torch.Tensor, torch.Tensor, Shaping]:
        device, observe = device_of(reference), self.reward.observation.observe
        z = latents(CALIBRATION.all, reference.z_dim).to(device)
        seen = []
        for part in z.split(16):
            ws = reference.mapping(part, camera(reference, n=len(part)), truncation_cutoff=CUTOFF)
            seen.append(observe(reference.field(ws)))
        embeddings = torch.cat([self.reward.embed(s) for s in seen])
        scores = torch.cat([self.reward.score_observed(s) for s in seen])
        shaping = make_shaping(self.config.reward_shaping, scores, embeddings).to(device)
        shaped = torch.cat([shaping(self.reward, s, torch.arange(len(s), device=device))[0] for s in seen])
        return scores, shaped, shaping

    def losses(self, batch: Batch) -> Iterator[Loss]:
        """The reward on the batch's latents, then the anchors on fresh ones; each runs backward on its own."""
        config = self.config
        ws = self.generator.mapping(batch.gen_z, batch.gen_c, truncation_psi=config.truncation_psi, truncation_cutoff=CUTOFF)
        observed = self.reward.observation.observe(self.generator.field(ws))
        shaped, score = self.state.shaping(self.reward, observed, batch.places)
        low, high = self.state.bounds.tolist()
        loss = -config.lambda_r * shaped.clamp(low, high)
        clipped = ((shaped < low) | (shaped > high)).float()
        yield Loss(loss, {"RLHF/reward": score, "RLHF/shaped": shaped, "RLHF/clipped": clipped, "Loss/Grlhf/reward": loss})
        if config.lambda_sigma > 0 or config.lambda_front > 0:
            yield self._anchors(torch.randn_like(batch.gen_z), batch.gen_c)

    def _anchors(self, z: torch.Tensor, c: torch.Tensor) -> Loss:
        config = self.config

        def density(generator: Generator) -> torch.Tensor:
            ws = generator.mapping(z, c, truncation_psi=config.anchor_psi, truncation_cutoff=CUTOFF)
            return generator.field(ws).density_grid(self.cube)

        sigma = density(self.generator)
        with torch.no_grad():
            sigma_ref = density(self.reference)
        distance = density_l1(sigma, sigma_ref)
        loss = config.lambda_sigma * distance
        stats = {"RLHF/consistency": distance}
        if config.lambda_front > 0:
            growth = front_growth(sigma, sigma_ref, self.generator.level)
            loss = loss + config.lambda_front * growth
            stats["RLHF/front_growth"] = growth
        return Loss(loss, {**stats, "Loss/Grlhf/anchors": loss})


def density_l1(sigma: torch.Tensor, sigma_ref: torch.Tensor) -> torch.Tensor:
    """Mean absolute difference of raw densities (sigma-reward.md, section 4). sigma, sigma_ref [N, D, H, W] -> [N]."""
    return (sigma - sigma_ref).abs().mean(dim=[1, 2, 3])


def front_growth(sigma: torch.Tensor, sigma_ref: torch.Tensor, level: float = 10.0) -> torch.Tensor:
    """Mean positive growth of density in front of the reference surface.

    A voxel is in front where neither it nor any voxel between it and the camera side (+z) reaches `level` in the reference.

    Args:
        sigma, sigma_ref: [N, D, H, W] raw; level: isosurface level.
    Returns: [N]. Differentiable in sigma.
    """
    reached = (sigma_ref >= level).flip(1).cummax(dim=1).values.flip(1)
    front = ~reached
    growth = torch.relu(sigma - sigma_ref) * front
    return growth.sum(dim=[1, 2, 3]) / front.sum(dim=[1, 2, 3]).clamp_min(1)


def reward_phase(terms: RewardTerms, optimizer: torch.optim.Optimizer) -> Phase:
    """Grlhf as one more phase of the loop, every iteration, with its own optimizer on G."""
    return Phase(
        name="Grlhf", module=terms.generator.module, optimizer=optimizer, losses=terms.losses, state=terms.state, own_optimizer=True,
    )
