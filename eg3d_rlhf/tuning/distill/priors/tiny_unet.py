"""A small learned prior of four views: a U-Net of 90,000 parameters on the test problem's pictures, told the
prompt and the cameras.

It is a `DiffusionPrior` as the real ones are, so what is claimed of methods on the analytic prior can be
checked on learned noise. Trained by builders/view_prior.py in a minute on one core. Letters: B = A V
pictures, V = 4 adjacent, C channels, E entries of a condition.
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
PIXEL_NOISE = 0.3  # of the training images, in latents of -1..1, as in the exact prior


class Block(nn.Module):
    """A 3x3 convolution of each channel, then two layers across channels, beside a skip; the condition [B, E]
    scales and shifts between.
    """

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.near = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.norm = nn.GroupNorm(1, channels)
        self.film = nn.Linear(width, 2 * channels)
        self.first = nn.Conv2d(channels, 2 * channels, 1)
        self.second = nn.Conv2d(2 * channels, channels, 1)
        nn.init.zeros_(self.second.weight)

    def forward(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        scale, shift = self.film(condition)[:, :, None, None].chunk(2, dim=1)
        h = self.norm(self.near(x)) * (1 + scale) + shift
        return x + self.second(F.silu(self.first(h)))


class ViewAttention(nn.Module):
    """Every place of an asset's four views attends to all of them."""

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
        seen = (
            F.scaled_dot_product_attention(q, k, v)[:, 0]
            .unflatten(1, (SIDES, -1))
            .transpose(2, 3)
            .flatten(0, 1)
        )
        return x + self.out(seen.unflatten(2, x.shape[2:]))


@dataclass(frozen=True, kw_only=True)
class TinySizes:
    """Of the network."""

    fine: int = 24  # channels at 8 x 8, each place a patch of 2 x 2 pixels
    coarse: int = 40  # at 4 x 4
    width: int = 44  # of the joint condition
    embedding: int = 32  # E, of a prompt


class TinyUNet(nn.Module):
    """Clean pictures x0 [B, 4, 16, 16] behind x_t, of times t [B], conditions [B, T, E] and cameras [B, 16]
    (MVDream's kind).

    The network makes m of x_t, and x0 = m + k (x_t - a m), k = a n^2 / (a^2 n^2 + s^2): the mean of a
    Gaussian of deviation n about m, n the noise of the training pictures (as the skip of Karras et al. 2022).
    """

    def __init__(self, sizes: TinySizes, prompts: Sequence[str]):
        super().__init__()
        self.sizes = sizes
        self.prompts = tuple(prompts)
        self.schedule = NoiseSchedule()
        width = sizes.width
        self.table = nn.Embedding(len(prompts) + 1, sizes.embedding)  # the last is the null condition
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
        rates = torch.exp(
            -math.log(STEPS) * torch.arange(self.sizes.embedding // 2).to(x_t) / (self.sizes.embedding // 2)
        )
        angles = t[:, None].to(x_t) * rates
        joint = (
            self.time(torch.cat([angles.sin(), angles.cos()], dim=1))
            + self.told(cond.mean(dim=1))
            + self.camera(cameras)
        )
        told = F.silu(joint)
        # half the time on a CPU
        fine = self.fine(self.enter(x_t.contiguous(memory_format=torch.channels_last)) + self.place, told)
        coarse = self.views(self.coarse(self.down(fine), told))
        seen_together = F.silu(joint + self.seen(coarse.mean(dim=(2, 3))))
        fine = self.late(fine + F.interpolate(self.up(coarse), scale_factor=2.0), seen_together)
        drawn = self.leave(fine) + self.sketch(seen_together).unflatten(1, (16, 8, 8))
        m = F.pixel_shuffle(drawn, 2)
        bar = self.schedule.alpha(t, x_t)
        return m + bar.sqrt() * PIXEL_NOISE**2 / (bar * PIXEL_NOISE**2 + 1 - bar) * (x_t - bar.sqrt() * m)


class TinyPrior:
    """`DiffusionPrior` around the network, four views at a time; latents are 2 images - 1."""

    views = SIDES
    latent_shape = (4, 16, 16)

    def __init__(self, network: TinyUNet):
        self.network = network.eval().requires_grad_(False)
        self.schedule = network.schedule
        self.alphas_cumprod = self.schedule.alphas_cumprod

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        return 2 * images - 1

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return (latents + 1) / 2

    def embed(self, prompts: list[str], directions: list[str] | None = None) -> torch.Tensor:
        """[B, 1, E]; an empty prompt is the null condition. Directions are not read: cameras are.

        Raises: ValueError for another prompt.
        """
        del directions
        known = {**{text: i for i, text in enumerate(self.network.prompts)}, "": len(self.network.prompts)}
        other = [text for text in prompts if text not in known]
        if other:
            example = self.network.prompts[0]
            raise ValueError(
                f"--prompt: expected one that this prior was trained on, got {other[0]!r}. They are as"
                f" {example!r}."
            )
        return self.network.table.weight[[known[text] for text in prompts]][:, None]

    def predict_noise(
        self, x_t: torch.Tensor, t: torch.Tensor, cond: torch.Tensor, cameras: torch.Tensor | None = None
    ) -> torch.Tensor:
        """See `DiffusionPrior`; cameras [B, 16 or 25] are ours, the four sides where None.

        Raises: ValueError for one view.
        """
        if len(x_t) % SIDES:
            raise ValueError(
                f"--prior: expected a multiple of {SIDES} pictures, got {len(x_t)}. It sees {SIDES} views of"
                " an asset."
            )
        seen = evenly_around(len(x_t) // SIDES, SIDES, DISTANCE).cameras if cameras is None else cameras
        clean = self.network(x_t, t.to(x_t.device), cond, network_cameras(seen).to(x_t))
        return self.schedule.noise_of_x0(x_t, clean, t)

    def save(self, path: str | Path, meta: dict) -> None:
        tensors = {name: value.half() for name, value in self.network.state_dict().items()}
        sizes = asdict(self.network.sizes)
        write_tensors(
            path,
            FILE_KIND,
            tensors,
            {"sizes": sizes, "prompts": list(self.network.prompts), "training": meta},
        )


def load_view_prior(path: str | Path = VIEW_PRIOR) -> TinyPrior:
    """The prior of a file, by default the bundled one. Raises: ValueError for another kind of file."""
    tensors, meta = read_tensors(path, FILE_KIND)
    network = TinyUNet(TinySizes(**meta["sizes"]), meta["prompts"])
    load_strict(
        network, {name: value.float() for name, value in tensors.items()}, f"view prior {Path(path).name}"
    )
    return TinyPrior(network)
