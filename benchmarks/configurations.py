"""Networks of the benchmark: the ffhq512-128 configuration with random weights that hold a head-like shape,
and tiny ones.

Letters: N batch, K c_dim (25), C plane channels, R pixels per edge.
"""

import copy
import math

import torch

from eg3d_rlhf.generators import camera
from eg3d_rlhf.modes.gan import GAN, resolve
from eg3d_rlhf.tuning.gan.reward_run import open_networks
from eg3d_rlhf.tuning.gan.settings import Settings
from training import networks
from training.config import GanConfig, NetworkConfig, networks_for
from training.gan_phases import Batch
from training.triplane import TriPlaneGenerator

FULL_FLAGS = (
    "--cfg=ffhq",
    "--data=random",
    "--gamma=1",
    "--batch=1",
    "--gen-pose-cond=True",
    "--nrr-initial=128",
    "--init=scratch",
    "--seed=0",
    "--device=cpu",
)
_FADED = 10**7  # images after which the blur and the swapping of cameras have faded


def settings(*flags: str) -> Settings:
    """The resolved settings of `train.py` with these flags."""
    with GAN.command.make_context("train.py", list(flags)) as context:
        return resolve(context.params)


def build(tiny: bool, device: str) -> tuple[networks.Networks, GanConfig]:
    """Fresh networks of the full size (512 pixels, rendered at 128), or tiny ones (32 pixels, rendered at 8),
    and their GAN settings.
    """
    if tiny:
        gan = GanConfig(gamma=1.0, nrr_initial=8)
        G, D = networks_for(NetworkConfig(cbase=256, cmax=8, sr_num_fp16_res=0, d_num_fp16_res=0), 32, gan)
        G["rendering_kwargs"].update(depth_resolution=4, depth_resolution_importance=4)
        G["sr_kwargs"]["block_channels"] = [8, 8]
        G.update(
            z_dim=8,
            w_dim=16,
            plane_resolution=16,
            plane_channels=8,
            decoder_hidden_dim=8,
            neural_rendering_resolution=8,
        )
        torch.manual_seed(0)
        nets = networks.build(G, D, {"name": "tiny", "resolution": 32})
    else:
        s = settings(*FULL_FLAGS)
        gan = s.gan
        nets = open_networks(s, 512)
    nets.to(device)
    torch.manual_seed(0)
    for module in (nets.G, nets.G_ema):
        shape_as_head(module)
    return nets, gan


@torch.no_grad()
def shape_as_head(G: TriPlaneGenerator) -> None:
    """Make the density of an untrained generator cross level 10 on one closed, slightly rough surface about
    0.6 of the box high.

    ToRGB is scaled so that planes have unit variance, but for channel 0, which holds a bowl u^2 + v^2 in
    every plane. Hidden units 0 and 1 of the decoder turn that into a density that falls from about 45 at the
    centre to about -20 outside; all others read the random planes.
    """
    device = next(G.parameters()).device
    ws = G.mapping(torch.randn([1, G.z_dim], device=device), torch.zeros([1, G.c_dim], device=device))
    spread = G.planes(ws, noise_mode="const").std().item()
    synthesis = G.backbone.synthesis
    for resolution in synthesis.block_resolutions:
        weight = getattr(synthesis, f"b{resolution}").torgb.weight
        weight /= spread
        weight[:: G.plane_channels] = 0
    steps = torch.linspace(-1, 1, G.plane_resolution, device=device)
    bowl = torch.zeros(3, G.plane_channels, G.plane_resolution, G.plane_resolution, device=device)
    bowl[:, 0] = steps.square() + steps.square()[:, None]
    synthesis.register_forward_hook(lambda module, inputs, planes: planes + bowl.flatten(0, 1))
    first = G.decoder.net[0]
    last = G.decoder.net[2]
    steep = 20.0  # of unit 0 in the bowl, and of the density in unit 0
    rim = 0.12  # the mean bowl, (3 x^2 + y^2 + 2 z^2)/3 in units of half the box, at the surface
    first.weight[:2] = 0.0
    first.weight[:2, 0] = steep / first.weight_gain
    first.bias[1] = -4.0  # from here on unit 1 takes back what unit 0 adds
    last.weight[0, 0], last.weight[0, 1] = -steep / last.weight_gain, steep / last.weight_gain
    last.bias[0] = 10.0 + steep * math.log1p(math.exp(steep * rim))


def batch(G: TriPlaneGenerator, device: str, n: int = 1) -> Batch:
    """Random images, latents and nearly frontal cameras of one training step late in a run."""
    rng = torch.Generator().manual_seed(1)
    images = torch.rand([n, 3, G.img_resolution, G.img_resolution], generator=rng) * 2 - 1
    z = torch.randn([n, G.z_dim], generator=rng)
    real_c = camera(G, yaw=0.2, n=n)
    gen_c = camera(G, yaw=-0.3, pitch=0.1, n=n)
    return Batch(images.to(device), real_c.contiguous(), z.to(device), gen_c.contiguous(), cur_nimg=_FADED)


def latent(G: TriPlaneGenerator, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """ws [1, L, W] of one latent, and a camera [1, K]."""
    z = torch.randn([1, G.z_dim], generator=torch.Generator().manual_seed(2)).to(device)
    c = camera(G, yaw=0.3).contiguous()
    with torch.no_grad():
        return G.mapping(z, c, truncation_psi=0.7, truncation_cutoff=14), c


def state_of(*modules: torch.nn.Module) -> list[dict[str, torch.Tensor]]:
    """Copies of the modules' states, for `restore`."""
    return [copy.deepcopy(module.state_dict()) for module in modules]


@torch.no_grad()
def restore(modules: tuple[torch.nn.Module, ...], states: list[dict[str, torch.Tensor]]) -> None:
    """Bring modules back to their states, in place, without gradients."""
    for module, state in zip(modules, states, strict=True):
        module.load_state_dict(state)
        module.zero_grad(set_to_none=True)
