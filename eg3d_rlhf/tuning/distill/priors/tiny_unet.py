"""Implements a small trained prior of four views, which is conditioned on the prompt and on the cameras.

It is a U-Net with 90,000 parameters for the images of the bundled toy problem. It has the interface
`DiffusionPrior` of large priors. Results with the prior in closed form (gmm.py) can therefore be checked with
a trained prior. builders/view_prior.py trains it in a minute on one core.

Shapes: A = number of assets; V = 4 adjacent views of an asset; B = A V images; C channels; H, W rows and
columns of features; T tokens of a prompt with E entries each; `width` entries of the joint conditioning.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from eg3d_rlhf.core.bundled import VIEW_PRIOR
from eg3d_rlhf.generators.assets.views import DISTANCE, evenly_around, network_cameras
from eg3d_rlhf.rewards.boxes import SIDES
from eg3d_rlhf.tuning.distill.schedule import NoiseSchedule
from eg3d_rlhf.tuning.distill.schedules_by_step import STEPS
from training.storage import load_strict, read_tensors, write_tensors

FILE_KIND = "view-prior"
# Standard deviation of the Gaussian noise that is added to training images, in latents of -1..1.
PIXEL_NOISE = 0.3


class Block(nn.Module):
    """Block of the U-Net: depthwise 3x3 convolution, FiLM, two layers across channels, and a skip connection.

    FiLM scales and shifts the features by the conditioning (Perez et al. 2018).

    Args:
        channels: number C of channels.
        width: number of entries of the conditioning.
    """

    def __init__(self, channels: int, width: int):
        super().__init__()
        # The names of these modules are keys of the bundled file's tensors.
        self.near = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)  # groups=channels: depthwise
        self.norm = nn.GroupNorm(1, channels)
        self.film = nn.Linear(width, 2 * channels)
        self.first = nn.Conv2d(channels, 2 * channels, 1)
        self.second = nn.Conv2d(2 * channels, channels, 1)
        # With zero weights, the block is the identity at the start of the training.
        nn.init.zeros_(self.second.weight)

    def forward(self, x: torch.Tensor, conditioning: torch.Tensor) -> torch.Tensor:
        """Compute the block for features x [B, C, H, W] and a conditioning [B, width]."""
        scale, shift = self.film(conditioning)[:, :, None, None].chunk(2, dim=1)  # [B, C, 1, 1] each
        modulated_features = self.norm(self.near(x)) * (1 + scale) + shift
        return x + self.second(F.silu(self.first(modulated_features)))


class ViewAttention(nn.Module):
    """Attention of every position to all positions of the four views of its asset.

    Args:
        channels: number C of channels.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.norm = nn.GroupNorm(1, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.out.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the attention for features x [B, C, H, W], with a skip connection."""
        # [B, 3 C, H, W] -> [B, 3 C, H W] -> [A, V, 3 C, H W] -> [A, V, H W, 3 C] -> [A, V H W, 3 C]
        tokens = self.qkv(self.norm(x)).flatten(2).unflatten(0, (-1, SIDES)).permute(0, 1, 3, 2).flatten(1, 2)
        # unsqueeze(1): a dimension of attention heads, of which there is one.
        q, k, v = tokens.unsqueeze(1).chunk(3, dim=3)
        # Back from [A, V H W, C] to [B, C, H W].
        attended_features = (
            F.scaled_dot_product_attention(q, k, v)[:, 0]
            .unflatten(1, (SIDES, -1))
            .transpose(2, 3)
            .flatten(0, 1)
        )
        return x + self.out(attended_features.unflatten(2, x.shape[2:]))


@dataclass(frozen=True, kw_only=True)
class TinySizes:
    """Sizes of the layers of `TinyUNet`."""

    # Number of channels at the resolution 8 x 8, at which a position is a patch of 2 x 2 pixels.
    fine: int = 24
    coarse: int = 40  # number of channels at the resolution 4 x 4
    width: int = 44  # number of entries of the joint conditioning of time, prompt and camera
    embedding: int = 32  # number E of entries of a prompt's embedding


class TinyUNet(nn.Module):
    """Network that estimates clean latents x0 from noised latents x_t = a x + s e (see schedule.py).

    The layers compute an estimate m of the noise-free image. The result is x0 = m + k (x_t - a m) with
    k = a n^2 / (a^2 n^2 + s^2), where n is PIXEL_NOISE. This is the posterior mean of x if x has a Gaussian
    distribution about m with the standard deviation n (compare the skip connection of Karras et al. 2022,
    arXiv 2206.00364).

    Args:
        sizes: sizes of the layers.
        prompts: prompts of the training data, which have a row each in the table of embeddings.
    """

    def __init__(self, sizes: TinySizes, prompts: Sequence[str]):
        super().__init__()
        self.sizes = sizes
        self.prompts = tuple(prompts)
        self.schedule = NoiseSchedule()
        width = sizes.width
        # The names of these modules are keys of the bundled file's tensors. Their order determines the
        # initial weights.
        self.table = nn.Embedding(len(prompts) + 1, sizes.embedding)  # the last row is the null prompt
        self.told = nn.Linear(sizes.embedding, width)  # embedding of the prompt -> conditioning
        self.camera = nn.Linear(16, width)  # camera -> conditioning
        # time -> conditioning
        self.time = nn.Sequential(nn.Linear(sizes.embedding, width), nn.SiLU(), nn.Linear(width, width))
        self.enter = nn.Conv2d(4, sizes.fine, 4, stride=2, padding=1)  # from 16 x 16 to 8 x 8
        self.place = nn.Parameter(0.1 * torch.randn(sizes.fine, 8, 8))  # embedding of the position
        self.fine, self.late = Block(sizes.fine, width), Block(sizes.fine, width)
        self.down = nn.Conv2d(sizes.fine, sizes.coarse, 2, stride=2)  # from 8 x 8 to 4 x 4
        self.coarse, self.views = Block(sizes.coarse, width), ViewAttention(sizes.coarse)
        self.up = nn.Conv2d(sizes.coarse, sizes.fine, 1)
        self.seen = nn.Linear(sizes.coarse, width)  # mean of the coarse features -> conditioning
        self.leave = nn.Conv2d(sizes.fine, 16, 1)  # features -> patches of 4 channels x 2 x 2 pixels
        self.sketch = nn.Linear(width, 16 * 8 * 8)  # conditioning -> patches

    def forward(
        self, x_t: torch.Tensor, t: torch.Tensor, cond: torch.Tensor, cameras: torch.Tensor
    ) -> torch.Tensor:
        """Estimate the clean latents x0, [B, 4, 16, 16].

        Args:
            x_t: [B, 4, 16, 16], noised latents.
            t: [B], times.
            cond: [B, T, E], embeddings of the prompts.
            cameras: [B, 16], cam2world matrices in MVDream's convention.
        """
        # Sinusoidal embedding of the time (Vaswani et al. 2017), with frequencies from 1 to about 1 / STEPS.
        frequencies = torch.exp(
            -math.log(STEPS) * torch.arange(self.sizes.embedding // 2).to(x_t) / (self.sizes.embedding // 2)
        )
        angles = t[:, None].to(x_t) * frequencies  # [B, E / 2]
        # [B, width]. The prompt is the mean over its tokens.
        joint_conditioning = (
            self.time(torch.cat([angles.sin(), angles.cos()], dim=1))
            + self.told(cond.mean(dim=1))
            + self.camera(cameras)
        )
        conditioning = F.silu(joint_conditioning)
        # The memory format channels_last halves the time of the convolutions on a CPU.
        fine_features = self.fine(
            self.enter(x_t.contiguous(memory_format=torch.channels_last)) + self.place, conditioning
        )
        coarse_features = self.views(self.coarse(self.down(fine_features), conditioning))
        # The conditioning of the last block contains the coarse features as well, which have seen all four
        # views.
        conditioning = F.silu(joint_conditioning + self.seen(coarse_features.mean(dim=(2, 3))))
        fine_features = self.late(
            fine_features + F.interpolate(self.up(coarse_features), scale_factor=2.0), conditioning
        )
        patches = self.leave(fine_features) + self.sketch(conditioning).unflatten(1, (16, 8, 8))
        m = F.pixel_shuffle(patches, 2)  # [B, 16, 8, 8] to [B, 4, 16, 16]
        # x0 = m + k (x_t - a m), with the k of the class's docstring.
        bar = self.schedule.alpha(t, x_t)
        return m + bar.sqrt() * PIXEL_NOISE**2 / (bar * PIXEL_NOISE**2 + 1 - bar) * (x_t - bar.sqrt() * m)


class TinyPrior:
    """Prior with the interface `DiffusionPrior`, for four views of an asset at a time.

    Latents are 2 images - 1.

    Args:
        network: trained network, which is frozen.
    """

    views = SIDES
    latent_shape = (4, 16, 16)

    def __init__(self, network: TinyUNet):
        self.network = network.eval().requires_grad_(False)
        self.schedule = network.schedule
        self.alphas_cumprod = self.schedule.alphas_cumprod

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Convert images [B, 4, 16, 16] in 0..1 to latents [B, 4, 16, 16] in -1..1."""
        return 2 * images - 1

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Convert latents [B, 4, 16, 16] in -1..1 to images [B, 4, 16, 16] in 0..1."""
        return (latents + 1) / 2

    def embed(self, prompts: list[str], directions: list[str] | None = None) -> torch.Tensor:
        """Return the embeddings of B prompts, [B, 1, E].

        Args:
            prompts: B prompts. "" is the null prompt.
            directions: not used, because the network gets the cameras.
        Raises: ValueError for a prompt that is not in the training data.
        """
        del directions
        row_by_text = {text: row for row, text in enumerate(self.network.prompts)}
        row_by_text[""] = len(self.network.prompts)
        untrained_prompts = [text for text in prompts if text not in row_by_text]
        if untrained_prompts:
            raise ValueError(
                f"--prompt: this prior was not trained on {untrained_prompts[0]!r}. Use a prompt of its"
                f" training data, such as {self.network.prompts[0]!r}."
            )
        return self.network.table.weight[[row_by_text[text] for text in prompts]][:, None]

    def predict_noise(
        self, x_t: torch.Tensor, t: torch.Tensor, cond: torch.Tensor, cameras: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Predict the noise of noised latents, [B, 4, 16, 16].

        Args:
            x_t: [B, 4, 16, 16], noised latents.
            t: [B], times.
            cond: [B, T, E], embeddings of the prompts.
            cameras: [B, 16 or 25], cameras in the convention of this package. None: views of the four sides.
        Raises: ValueError if B is not a multiple of four.
        """
        # The network's attention joins the four views of an asset, so it needs all of them.
        if len(x_t) % SIDES:
            raise ValueError(
                f"--prior: this prior processes {SIDES} views of an asset together, but got {len(x_t)}"
                f" images. Pass a multiple of {SIDES} images."
            )
        view_cameras = (
            evenly_around(len(x_t) // SIDES, SIDES, DISTANCE).cameras if cameras is None else cameras
        )
        clean_latents = self.network(x_t, t.to(x_t.device), cond, network_cameras(view_cameras).to(x_t))
        # The network predicts clean latents, while the interface requires the noise.
        return self.schedule.noise_of_x0(x_t, clean_latents, t)

    def save(self, path: str | Path, training_metadata: dict) -> None:
        """Write the prior to a file.

        Args:
            path: path of the file.
            training_metadata: values for JSON that describe the training.
        """
        # float16 halves the size of the bundled file. The weights are read as float32.
        tensors = {name: weight.half() for name, weight in self.network.state_dict().items()}
        sizes = asdict(self.network.sizes)
        write_tensors(
            path,
            FILE_KIND,
            tensors,
            {"sizes": sizes, "prompts": list(self.network.prompts), "training": training_metadata},
        )


def load_view_prior(path: str | Path = VIEW_PRIOR) -> TinyPrior:
    """Read a `TinyPrior` from a file, by default the bundled file.

    Raises: ValueError if the file contains no such prior.
    """
    tensors, metadata = read_tensors(path, FILE_KIND)
    network = TinyUNet(TinySizes(**metadata["sizes"]), metadata["prompts"])
    load_strict(
        network, {name: weight.float() for name, weight in tensors.items()}, f"view prior {Path(path).name}"
    )
    return TinyPrior(network)
