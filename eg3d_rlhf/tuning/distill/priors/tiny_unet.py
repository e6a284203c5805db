"""Implements a small trained prior of four views: a U-Net with 90,000 parameters for the images of the test
problem, conditioned on the prompt and the cameras.

It is a `DiffusionPrior` like the real ones, so results of methods on the analytic prior can be checked with
trained predictions. builders/view_prior.py trains it in a minute on one core. Letters: B = A V images, V = 4
adjacent views, C channels, E entries of a conditioning.
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
# Standard deviation of the noise of the training images, in latents of -1..1, as in the exact prior.
PIXEL_NOISE = 0.3


class Block(nn.Module):
    """Depthwise 3x3 convolution, then two layers across channels, with a skip connection. The conditioning
    [B, E] scales and shifts the features between them (FiLM).
    """

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.near = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)  # groups=channels: depthwise
        self.norm = nn.GroupNorm(1, channels)
        self.film = nn.Linear(width, 2 * channels)
        self.first = nn.Conv2d(channels, 2 * channels, 1)
        self.second = nn.Conv2d(2 * channels, channels, 1)
        # Zero weights: each block begins as the identity.
        nn.init.zeros_(self.second.weight)

    def forward(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        # scale and shift [B, C, 1, 1]
        scale, shift = self.film(condition)[:, :, None, None].chunk(2, dim=1)
        h = self.norm(self.near(x)) * (1 + scale) + shift
        return x + self.second(F.silu(self.first(h)))


class ViewAttention(nn.Module):
    """Attention of every position to all positions of the four views of its asset."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = nn.GroupNorm(1, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.out.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # [A, V H W, 3 C]
        tokens = self.qkv(self.norm(x)).flatten(2).unflatten(0, (-1, SIDES)).permute(0, 1, 3, 2).flatten(1, 2)
        q, k, v = tokens.unsqueeze(1).chunk(3, dim=3)
        # [B, C, H W]
        attended = (
            F.scaled_dot_product_attention(q, k, v)[:, 0]
            .unflatten(1, (SIDES, -1))
            .transpose(2, 3)
            .flatten(0, 1)
        )
        return x + self.out(attended.unflatten(2, x.shape[2:]))


@dataclass(frozen=True, kw_only=True)
class TinySizes:
    """Sizes of the network."""

    fine: int = 24  # channels at 8 x 8, where a position is a patch of 2 x 2 pixels
    coarse: int = 40  # at 4 x 4
    width: int = 44  # width of the joint conditioning
    embedding: int = 32  # E, width of a prompt's embedding


class TinyUNet(nn.Module):
    """Network that estimates clean images x0 [B, 4, 16, 16] from x_t, times t [B], conditioning [B, T, E] and
    cameras [B, 16] (in MVDream's form).

    The network computes m from x_t, and x0 = m + k (x_t - a m) with k = a n^2 / (a^2 n^2 + s^2). This is the
    posterior mean for a Gaussian with standard deviation n about m, where n is the noise of the training
    images (compare the skip connection of Karras et al. 2022).
    """

    def __init__(self, sizes: TinySizes, prompts: Sequence[str]):
        super().__init__()
        self.sizes = sizes
        self.prompts = tuple(prompts)
        self.schedule = NoiseSchedule()
        width = sizes.width
        self.table = nn.Embedding(len(prompts) + 1, sizes.embedding)  # the last row is the null prompt
        self.told = nn.Linear(sizes.embedding, width)
        self.camera = nn.Linear(16, width)
        self.time = nn.Sequential(nn.Linear(sizes.embedding, width), nn.SiLU(), nn.Linear(width, width))
        self.enter = nn.Conv2d(4, sizes.fine, 4, stride=2, padding=1)
        self.place = nn.Parameter(0.1 * torch.randn(sizes.fine, 8, 8))
        self.fine, self.late = Block(sizes.fine, width), Block(sizes.fine, width)
        self.down = nn.Conv2d(sizes.fine, sizes.coarse, 2, stride=2)
        self.coarse, self.views = Block(sizes.coarse, width), ViewAttention(sizes.coarse)
        self.up = nn.Conv2d(sizes.coarse, sizes.fine, 1)
        self.seen = nn.Linear(sizes.coarse, width)
        self.leave = nn.Conv2d(sizes.fine, 16, 1)
        self.sketch = nn.Linear(width, 16 * 8 * 8)

    def forward(
        self, x_t: torch.Tensor, t: torch.Tensor, cond: torch.Tensor, cameras: torch.Tensor
    ) -> torch.Tensor:
        # Sinusoidal embedding of the time, as in Transformers: frequencies from 1 to about 1 / STEPS.
        rates = torch.exp(
            -math.log(STEPS) * torch.arange(self.sizes.embedding // 2).to(x_t) / (self.sizes.embedding // 2)
        )
        # [B, E / 2]
        angles = t[:, None].to(x_t) * rates
        # [B, width]: time, prompt (mean over its tokens) and camera are added.
        joint = (
            self.time(torch.cat([angles.sin(), angles.cos()], dim=1))
            + self.told(cond.mean(dim=1))
            + self.camera(cameras)
        )
        conditioning = F.silu(joint)
        # channels_last halves the time of the convolutions on a CPU.
        fine = self.fine(
            self.enter(x_t.contiguous(memory_format=torch.channels_last)) + self.place, conditioning
        )
        coarse = self.views(self.coarse(self.down(fine), conditioning))
        # The conditioning of the last block also contains a summary of all four views.
        conditioning = F.silu(joint + self.seen(coarse.mean(dim=(2, 3))))
        fine = self.late(fine + F.interpolate(self.up(coarse), scale_factor=2.0), conditioning)
        patches = self.leave(fine) + self.sketch(conditioning).unflatten(1, (16, 8, 8))
        # [B, 16, 8, 8] to [B, 4, 16, 16].
        m = F.pixel_shuffle(patches, 2)
        # x0 = m + k (x_t - a m), with the k of the class's docstring.
        bar = self.schedule.alpha(t, x_t)
        return m + bar.sqrt() * PIXEL_NOISE**2 / (bar * PIXEL_NOISE**2 + 1 - bar) * (x_t - bar.sqrt() * m)


class TinyPrior:
    """`DiffusionPrior` with the network, for four views at a time. Latents are 2 images - 1."""

    views = SIDES
    latent_shape = (4, 16, 16)

    def __init__(self, network: TinyUNet):
        self.network = network.eval().requires_grad_(False)
        self.schedule = network.schedule
        self.alphas_cumprod = self.schedule.alphas_cumprod

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Convert images to latents."""
        return 2 * images - 1

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Convert latents to images."""
        return (latents + 1) / 2

    def embed(self, prompts: list[str], directions: list[str] | None = None) -> torch.Tensor:
        """Return embeddings [B, 1, E]; an empty prompt is the null prompt. Directions are not used, because
        the network gets the cameras.

        Raises: ValueError for an unknown prompt.
        """
        del directions
        # Row of the embedding table for each prompt.
        known = {**{text: i for i, text in enumerate(self.network.prompts)}, "": len(self.network.prompts)}
        other = [text for text in prompts if text not in known]
        if other:
            example = self.network.prompts[0]
            raise ValueError(
                f"--prompt: this prior was not trained on {other[0]!r}. Use a prompt of its training data,"
                f" such as {example!r}."
            )
        return self.network.table.weight[[known[text] for text in prompts]][:, None]

    def predict_noise(
        self, x_t: torch.Tensor, t: torch.Tensor, cond: torch.Tensor, cameras: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Predict the noise, see `DiffusionPrior`. Cameras [B, 16 or 25] have our convention; None means the
        four sides.

        Raises: ValueError for another number of views.
        """
        # Attention joins the four views of an asset, so all must be present.
        if len(x_t) % SIDES:
            raise ValueError(
                f"--prior: expected a multiple of {SIDES} images, got {len(x_t)}, because this prior needs"
                f" {SIDES} views of an asset. Pass all views of each asset."
            )
        poses = evenly_around(len(x_t) // SIDES, SIDES, DISTANCE).cameras if cameras is None else cameras
        clean = self.network(x_t, t.to(x_t.device), cond, network_cameras(poses).to(x_t))
        # The network predicts images; `DiffusionPrior` promises noise.
        return self.schedule.noise_of_x0(x_t, clean, t)

    def save(self, path: str | Path, meta: dict) -> None:
        """Write the prior with half-precision weights. `meta` describes the training."""
        # Half precision halves the bundled file; it is loaded as float32.
        tensors = {name: value.half() for name, value in self.network.state_dict().items()}
        sizes = asdict(self.network.sizes)
        write_tensors(
            path,
            FILE_KIND,
            tensors,
            {"sizes": sizes, "prompts": list(self.network.prompts), "training": meta},
        )


def load_view_prior(path: str | Path = VIEW_PRIOR) -> TinyPrior:
    """Load the prior of a file, by default the bundled one. Raises: ValueError for another kind of file."""
    tensors, meta = read_tensors(path, FILE_KIND)
    network = TinyUNet(TinySizes(**meta["sizes"]), meta["prompts"])
    load_strict(
        network, {name: value.float() for name, value in tensors.items()}, f"view prior {Path(path).name}"
    )
    return TinyPrior(network)
