"""The reward phase (Grlhf): L = -lambda_r mean clip(shape(r(slab(G(z))))) + lambda_sigma mean |sigma_G - sigma_ref| (+ front growth).

Letters: N batch, Z z_dim, K c_dim, L num_ws, W w_dim; slabs [N, 1, D, H, W].
"""

import copy
import dataclasses
from collections.abc import Iterator

import torch

from eg3d_rlhf.generators import camera, latents
from eg3d_rlhf.reward.files import Reward
from eg3d_rlhf.rlhf import consistency
from eg3d_rlhf.rlhf.shaping import SHAPINGS, clip_bounds, make_shaping, parse_clip
from eg3d_rlhf.seeds import CALIBRATION
from eg3d_rlhf.sigma.slab import sample_slab, sigma_grid
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
        reward: frozen reward network; spec: the slab that it reads.
    """

    def __init__(
        self, G: torch.nn.Module, G_ema: torch.nn.Module, reward: Reward, spec: SlabSpec, config: RewardConfig
    ):
        self.G, self.spec, self.config = G, spec, config
        self.reward = reward.eval().requires_grad_(False).to(memory_format=torch.channels_last_3d)  # a tenth faster, same values
        G_ref = copy.deepcopy(G_ema).eval().requires_grad_(False)
        self.cube = SlabSpec.cube(config.anchor_resolution, G.rendering_kwargs["box_warp"])
        scores, shaped, shaping = self._calibrate(G_ref)
        self.state = RewardPhaseState(G_ref, shaping, clip_bounds(config.reward_clip, shaped))
        self.initial_scores = scores

    @torch.no_grad()
    def _calibrate(self, G_ref: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor, torch.nn.Module]:
        device = next(G_ref.parameters()).device
        z = latents(CALIBRATION.all, G_ref.z_dim).to(device)
        slabs = [
            sample_slab(G_ref, G_ref.mapping(part, camera(G_ref, n=len(part)), truncation_cutoff=CUTOFF), self.spec) for part in z.split(16)
        ]
        embeddings = torch.cat([self.reward.embed(s) for s in slabs])
        scores = torch.cat([self.reward.score(s) for s in slabs])
        shaping = make_shaping(self.config.reward_shaping, scores, embeddings).to(device)
        shaped = torch.cat([copy.deepcopy(shaping)(self.reward, s)[0] for s in slabs])
        return scores, shaped, shaping

    def losses(self, batch: Batch) -> Iterator[Loss]:
        """The reward on the batch's latents, then the anchors on fresh ones; each runs backward on its own."""
        config = self.config
        ws = self.G.mapping(batch.gen_z, batch.gen_c, truncation_psi=config.truncation_psi, truncation_cutoff=CUTOFF)
        slab = sample_slab(self.G, ws, self.spec, noise_mode="const")
        shaped, score = self.state.shaping(self.reward, slab)
        low, high = self.state.bounds.tolist()
        loss = -config.lambda_r * shaped.clamp(low, high)
        clipped = ((shaped < low) | (shaped > high)).float()
        yield Loss(loss, {"RLHF/reward": score, "RLHF/shaped": shaped, "RLHF/clipped": clipped, "Loss/Grlhf/reward": loss})
        if config.lambda_sigma > 0 or config.lambda_front > 0:
            yield self._anchors(torch.randn_like(batch.gen_z), batch.gen_c)

    def _anchors(self, z: torch.Tensor, c: torch.Tensor) -> Loss:
        config = self.config
        regime = {"truncation_psi": config.anchor_psi, "truncation_cutoff": CUTOFF}
        sigma = sigma_grid(self.G, self.G.mapping(z, c, **regime), self.cube)
        with torch.no_grad():
            G_ref = self.state.G_ref
            sigma_ref = sigma_grid(G_ref, G_ref.mapping(z, c, **regime), self.cube)
        distance = consistency.density_l1(sigma, sigma_ref)
        loss = config.lambda_sigma * distance
        stats = {"RLHF/consistency": distance}
        if config.lambda_front > 0:
            growth = consistency.front_growth(sigma, sigma_ref)
            loss = loss + config.lambda_front * growth
            stats["RLHF/front_growth"] = growth
        return Loss(loss, {**stats, "Loss/Grlhf/anchors": loss})


def reward_phase(terms: RewardTerms, optimizer: torch.optim.Optimizer) -> Phase:
    """Grlhf as one more phase of the loop, every iteration, with its own optimizer on G."""
    return Phase(
        name="Grlhf", module=terms.G, optimizer=optimizer, losses=terms.losses, state=terms.state, own_optimizer=True,
    )
