"""Build the networks and inputs of the benchmark.

The networks are those of the ffhq512-128 configuration, with random weights that are changed such that the
density has a head-like shape; and tiny networks for the warm-up.
Shapes: N batch, L num_ws, W w_dim, K c_dim (25).
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
_FADED = 10**7  # training length in images at which blur and camera swapping have ended


def resolve_settings(*flags: str) -> Settings:
    """Return the settings of `train.py` with these flags."""
    with GAN.command.make_context("train.py", list(flags)) as context:
        return resolve(context.params)


def build(tiny: bool, device: str) -> tuple[networks.Networks, GanConfig]:
    """Build new networks, and return them with their GAN settings.

    Args:
        tiny: False for images of 512 pixels, rendered at 128; True for images of 32 pixels, rendered at 8.
        device: device of the networks.
    """
    if tiny:
        gan_config = GanConfig(gamma=1.0, nrr_initial=8)
        generator_kwargs, discriminator_kwargs = networks_for(
            NetworkConfig(cbase=256, cmax=8, sr_num_fp16_res=0, d_num_fp16_res=0), 32, gan_config
        )
        # small sizes, since the tiny networks are only for the warm-up
        generator_kwargs["rendering_kwargs"].update(depth_resolution=4, depth_resolution_importance=4)
        generator_kwargs["sr_kwargs"]["block_channels"] = [8, 8]
        generator_kwargs.update(
            z_dim=8,
            w_dim=16,
            plane_resolution=16,
            plane_channels=8,
            decoder_hidden_dim=8,
            neural_rendering_resolution=8,
        )
        torch.manual_seed(0)
        nets = networks.build(generator_kwargs, discriminator_kwargs, {"name": "tiny", "resolution": 32})
    else:
        run_settings = resolve_settings(*FULL_FLAGS)
        gan_config = run_settings.gan
        nets = open_networks(run_settings, 512)
    nets.to(device)
    torch.manual_seed(0)  # `shape_as_head` samples a latent
    # Only the generators get a head-like density; D stays random.
    for generator in (nets.G, nets.G_ema):
        shape_as_head(generator)
    return nets, gan_config


@torch.no_grad()
def shape_as_head(G: TriPlaneGenerator) -> None:
    """Change the weights of an untrained generator such that its density has a head-like level set.

    The density crosses level 10 on a single closed, slightly rough surface, whose height is about 0.6 of the
    box. The ToRGB layers are scaled so that the planes have unit variance. Channel 0 of every plane is
    replaced by a bowl u^2 + v^2. The hidden units 0 and 1 of the decoder map the bowl to a density that falls
    from about 45 at the centre to about -20 outside. All other units read the random planes.
    """
    device = next(G.parameters()).device
    ws = G.mapping(torch.randn([1, G.z_dim], device=device), torch.zeros([1, G.c_dim], device=device))
    plane_std = G.planes(ws, noise_mode="const").std().item()
    synthesis = G.backbone.synthesis
    for resolution in synthesis.block_resolutions:
        torgb_weight = getattr(synthesis, f"b{resolution}").torgb.weight
        torgb_weight /= plane_std
        torgb_weight[:: G.plane_channels] = 0
    # [plane_resolution]; -1 and 1 are the two ends of a plane
    texel_positions = torch.linspace(-1, 1, G.plane_resolution, device=device)
    bowl = torch.zeros(3, G.plane_channels, G.plane_resolution, G.plane_resolution, device=device)
    bowl[:, 0] = texel_positions.square() + texel_positions.square()[:, None]
    synthesis.register_forward_hook(lambda module, inputs, planes: planes + bowl.flatten(0, 1))
    hidden_layer = G.decoder.net[0]
    output_layer = G.decoder.net[2]
    slope = 20.0  # slope of hidden unit 0 in the bowl, and of the density in hidden unit 0
    surface_bowl = (
        0.12  # mean of the three bowls at the surface, (3 x^2 + y^2 + 2 z^2) / 3 in units of half the box
    )
    hidden_layer.weight[:2] = 0.0
    hidden_layer.weight[:2, 0] = slope / hidden_layer.weight_gain
    hidden_layer.bias[1] = -4.0  # where unit 1 becomes active, it cancels the increase of unit 0
    output_layer.weight[0, 0], output_layer.weight[0, 1] = (
        -slope / output_layer.weight_gain,
        slope / output_layer.weight_gain,
    )
    output_layer.bias[0] = 10.0 + slope * math.log1p(math.exp(slope * surface_bowl))


def make_batch(G: TriPlaneGenerator, device: str, image_count: int = 1) -> Batch:
    """Return random images, latents and nearly frontal cameras for a training step late in a run."""
    rng = torch.Generator().manual_seed(1)  # on the CPU, so that all devices get the same inputs
    images = torch.rand([image_count, 3, G.img_resolution, G.img_resolution], generator=rng) * 2 - 1
    z = torch.randn([image_count, G.z_dim], generator=rng)
    # yaw and pitch in radians from frontal
    real_c = camera(G, yaw=0.2, n=image_count)
    gen_c = camera(G, yaw=-0.3, pitch=0.1, n=image_count)
    return Batch(images.to(device), real_c.contiguous(), z.to(device), gen_c.contiguous(), cur_nimg=_FADED)


def sample_latent(G: TriPlaneGenerator, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ws [1, L, W] of a latent, and a camera [1, K]."""
    z = torch.randn([1, G.z_dim], generator=torch.Generator().manual_seed(2)).to(device)
    camera_label = camera(G, yaw=0.3).contiguous()  # a little to the right of the front
    with torch.no_grad():
        return G.mapping(z, camera_label, truncation_psi=0.7, truncation_cutoff=14), camera_label


def copy_states(*modules: torch.nn.Module) -> list[dict[str, torch.Tensor]]:
    """Return copies of the modules' states, for `restore_states`."""
    return [copy.deepcopy(module.state_dict()) for module in modules]


@torch.no_grad()
def restore_states(modules: tuple[torch.nn.Module, ...], states: list[dict[str, torch.Tensor]]) -> None:
    """Restore the states of modules in place, and remove their gradients."""
    for module, state_dict in zip(modules, states, strict=True):
        module.load_state_dict(state_dict)
        module.zero_grad(set_to_none=True)
