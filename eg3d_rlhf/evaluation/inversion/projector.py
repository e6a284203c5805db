"""The two stages of an inversion, step by step: a latent under a frozen generator, then a copy of the
generator around that latent.

As the projectors of PanoHead and SphereHead have them (reward-zoo.md, section 4.1): Adam on one w per layer
from the mean latent, with a learning rate that rises and falls and with noise that fades; then Adam on all
parameters (Roich et al. 2021, without their regulariser). Whatever is random in step t follows from
(seed, t), so a stage goes on from its state as if it had never stopped.

Deviates: one set of ray samples throughout, twice as many as in training (`PUBLISHED` draws others in every
step); pi is not 3.14; the small generator's 64 features leave more to the squared error, and its latents lie
wider, so its own weights differ.
Letters: N images or shapes, L layers of ws, W w_dim, R, H, W pixels, F features, D, H, W grid points.
"""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from eg3d_rlhf.core.field import Field, RenderOptions, fixed_draws
from eg3d_rlhf.core.seeds import STANDARDISATION
from eg3d_rlhf.core.spec import SlabSpec
from eg3d_rlhf.evaluation.inversion.settings import InversionConfig
from eg3d_rlhf.generators import Generator, camera, device_of, latents, of
from eg3d_rlhf.measures.features import RESOLUTION, HeadFactorFeatures, to_resolution
from eg3d_rlhf.rewards.reward import Reward
from eg3d_rlhf.tuning.gan.phase import CUTOFF, Standardised, density_l1
from training.checkpoint import optimizer_tensors, restore_optimizer

# How far apart two images look: a network's features that gradients pass through, the bundled ones or a
# TorchScript file's.


LARGEST = 256  # pixels per edge that a file's network is shown at most, as the published projectors have it


class Perceptual:
    """A distance [N] between images [N, 3, H, W] in [-1, 1]; `name` says whose, and distances under different
    names never compare.

    Args: features: images -> [N, F], differentiable; mean: divide the sum of squared differences by F.
    """

    def __init__(self, name: str, features: Callable[[Tensor], Tensor], mean: bool):
        self.name = name
        self.features = features
        self._mean = mean

    def distance(self, seen: Tensor, wanted: Tensor) -> Tensor:
        """Squared difference [N] of features [N, F]; wanted may be [1, F]. Differentiable in both."""
        squares = (seen - wanted).square()
        return squares.mean(dim=1) if self._mean else squares.sum(dim=1)

    def __call__(self, first: Tensor, second: Tensor) -> Tensor:
        """Distance [N] of two batches of images."""
        return self.distance(self.features(first), self.features(second))


def load_perceptual(path: Path | None, resolution: int, device: torch.device | str = "cpu") -> Perceptual:
    """The distance of a file: None for the bundled head-factor network, .safetensors for another of its kind,
    else TorchScript.

    TorchScript is called as the projectors of the StyleGAN family call their VGG16: net(images in 0..255 of
    at most 256 pixels, resize_images=False, return_lpips=True) -> [N, F], or net(images) where it takes no
    such options; its squared differences are summed. The bundled network's standardised features are
    averaged.

    Args: resolution: pixels per edge of the images to come, with which the file is tried.
    Raises: ValueError for another file, one that gives something else, or one that lets no gradient through.
    """
    if path is None or path.suffix == ".safetensors":
        own = HeadFactorFeatures.load(path, device)

        def features(images: Tensor) -> Tensor:
            return (
                own.net.penultimate(to_resolution(images, RESOLUTION)) - own.net.feature_mean
            ) / own.net.feature_std

        return Perceptual(own.name, features, mean=True)
    try:
        net = torch.jit.load(str(path), map_location=device).eval()
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"expected a TorchScript file or .safetensors, got {path} ({reason}). Name another."
        ) from error
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    takes = {argument.name for argument in net.forward.schema.arguments}
    options = {
        name: value for name, value in {"resize_images": False, "return_lpips": True}.items() if name in takes
    }

    def scripted(images: Tensor) -> Tensor:
        pixels = (images + 1) * 127.5
        if max(pixels.shape[-2:]) > LARGEST:
            pixels = functional.interpolate(pixels, (LARGEST, LARGEST), mode="area")
        return net(pixels, **options)

    _try(scripted, path, resolution, device)
    return Perceptual(f"torchscript-{path.stem}", scripted, mean=False)


def _try(
    features: Callable[[Tensor], Tensor], path: Path, resolution: int, device: torch.device | str
) -> None:
    images = torch.zeros(2, 3, resolution, resolution, device=device, requires_grad=True)
    try:
        found = features(images)
    except RuntimeError as error:
        reason = next((line for line in str(error).splitlines()[::-1] if line.strip()), type(error).__name__)
        raise ValueError(
            f"expected a net of images [N, 3, H, W], got {path} ({reason.strip()}). Name a VGG16 of"
            " projectors."
        ) from None
    if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != 2:
        raise ValueError(
            f"expected features [N, F] from {path}, got {getattr(found, 'shape', type(found))}. Name another."
        )
    if not found.requires_grad:
        raise ValueError(
            f"expected features that gradients pass through, got none from {path}. Export the network without"
            " no_grad."
        )


# Where the reward enters an inversion:
#     L = L_image + lambda * (-clip(r, -10, 10) / 10) + lambda_sigma * mean |sigma - sigma_pivot|
# r is the reward's score, standardised on samples of the untuned generator; sigma_pivot is the density of the
# latent that the second stage starts from, over the whole cube, so that the reward cannot trade what the
# image does not show.


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


# behind mean and standard deviation of w
LATENTS = 10_000
LATENT_SEED = 123
# shares of the steps: noise, and the learning rate's two ramps
FADED = 0.75
RISING = 0.05
FALLING = 0.25


def learning_rate(step: int, steps: int, largest: float = 0.1) -> float:
    """Of the first stage in `step` of 0..steps-1: from 0 to `largest` over the first 5 %, down along a cosine
    over the last 25 %.
    """
    t = step / steps
    return largest * (0.5 - 0.5 * math.cos(math.pi * min(1.0, (1 - t) / FALLING))) * min(1.0, t / RISING)


def noise_scale(step: int, steps: int, first: float = 0.05) -> float:
    """Return the standard deviation of the noise on w over that of w: first * max(0, 1 - t / 0.75)^2."""
    return first * max(0.0, 1 - step / steps / FADED) ** 2


class Target(NamedTuple):
    """What is to be reproduced."""

    image: Tensor  # [1, 3, R, R] in [-1, 1]
    camera: Tensor  # [1, 25]
    mask: Tensor | None = None  # [1, 1, R, R] in 0..1: what counts


class Prior(NamedTuple):
    """Where latents lie."""

    mean: Tensor  # [1, 1, W]
    deviation: float  # root of the mean squared distance to it


@torch.no_grad()
def prior_of(generator: Generator) -> Prior:
    """Compute the mean and the standard deviation of w over 10,000 latents under the frontal camera."""
    device = device_of(generator)
    z = torch.from_numpy(
        np.random.RandomState(LATENT_SEED).randn(LATENTS, generator.z_dim).astype(np.float32)
    ).to(device)
    front = camera(generator)
    # [10000, W]
    w = torch.cat([generator.mapping(part, front.expand(len(part), -1))[:, 0] for part in z.split(1000)])
    mean = w.mean(dim=0)
    return Prior(mean[None, None], float((w - mean).square().sum(dim=1).mean().sqrt()))


class Objective:
    """The image part of the loss for one target, and the guidance where there is one."""

    def __init__(
        self,
        config: InversionConfig,
        target: Target,
        perceptual: Perceptual,
        guidance: Guidance | None = None,
    ):
        self.config = config
        self.target = target
        self.perceptual = perceptual
        self.guidance = guidance
        self.look = RenderOptions(sample_mult=config.sample_mult)
        self.share = 1.0 if target.mask is None else float(target.mask.mean())
        with torch.no_grad():
            self.wanted = perceptual.features(target.image)

    def render(self, field: Field, step: int) -> Tensor:
        """What the target's camera sees, [1, 3, R, R]; torch's own random state stays."""
        with fixed_draws((self.config.seed << 20) + (step if self.config.fresh_rays else 0)):
            return field.render(self.target.camera, self.look).image

    def seen(self, image: Tensor) -> Tensor:
        """An image [1, 3, R, R]; outside the mask the target's own."""
        target = self.target.image
        mask = self.target.mask
        return image if mask is None else target + mask * (image - target)

    def image_loss(self, image: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """lambda_mse * mse + perceptual distance; the error is the mean over the mask."""
        image = self.seen(image)
        mse = (image - self.target.image).square().mean() / self.share
        distance = self.perceptual.distance(self.perceptual.features(image), self.wanted)[0]
        return self.config.lambda_mse * mse + distance, {"mse": mse, "perceptual": distance}

    def guided(self, field: Field, step: int, weight: float) -> tuple[Tensor | float, dict[str, Tensor]]:
        """The reward's part in `step`: 0 without a weight, and in the steps between."""
        if self.guidance is None or weight == 0 or step % self.config.reward_every:
            return 0.0, {}
        term, score = self.guidance.term(field)
        return weight * self.config.reward_every * term[0], {"reward": score[0]}


class LatentStage:
    """Steps 0..w_steps-1 on ws [1, L, W] under the frozen generator."""

    name = "w"

    def __init__(
        self,
        generator: Generator,
        objective: Objective,
        prior: Prior,
        start: Tensor | None = None,
        weight: float = 0.0,
    ):
        """Args: start: ws [1, L, W]; None is the mean latent. weight: of the reward in the second half, where
        the settings want it.
        """
        generator.module.eval().requires_grad_(False)
        self.generator = generator
        self.objective = objective
        self.prior = prior
        self.weight = weight
        self.steps = objective.config.w_steps
        ws = prior.mean.repeat(1, generator.num_ws, 1) if start is None else start
        self.ws = ws.detach().clone().requires_grad_(True)
        self.optimizer = torch.optim.Adam([self.ws], betas=(0.9, 0.999))

    def step(self, step: int) -> dict[str, float]:
        """One update; returns what was measured before it."""
        config = self.objective.config
        scale = self.prior.deviation * noise_scale(step, self.steps, config.noise)
        draws = torch.Generator().manual_seed((config.seed << 20) + step)
        field = self.generator.field(
            self.ws + scale * torch.randn(self.ws.shape, generator=draws).to(self.ws)
        )
        loss, found = self.objective.image_loss(self.objective.render(field, step))
        loss = loss + config.lambda_w * (self.ws - self.prior.mean).square().mean()
        if config.reward_in_w and step >= self.steps // 2:
            extra, more = self.objective.guided(field, step, self.weight)
            loss = loss + extra
            found = {**found, **more}
        self.optimizer.param_groups[0]["lr"] = learning_rate(step, self.steps, config.w_lr)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return {"loss": loss.item(), **{name: value.item() for name, value in found.items()}}

    def state(self) -> dict[str, Tensor]:
        """Everything that the next steps depend on."""
        return {"ws": self.ws.detach(), **optimizer_tensors("adam", self.optimizer)}

    def restore(self, state: dict[str, Tensor]) -> None:
        with torch.no_grad():
            self.ws.copy_(state["ws"])
        restore_optimizer("adam", self.optimizer, state)


class PivotalStage:
    """Steps 0..pivot_steps-1 on a copy of the generator's parameters, ws [1, L, W] held."""

    name = "pivot"

    def __init__(self, generator: Generator, objective: Objective, ws: Tensor, weight: float = 0.0):
        module = copy.deepcopy(generator.module).eval().requires_grad_(True)
        self.generator = of(module)
        self.objective = objective
        self.ws = ws.detach()
        self.weight = weight
        self.steps = objective.config.pivot_steps
        self.optimizer = torch.optim.Adam(
            module.parameters(), lr=objective.config.pivot_lr, betas=(0.9, 0.999)
        )
        self.cube = cube_of(generator)
        with torch.no_grad():
            self.pivot = generator.field(self.ws).density_grid(self.cube)

    def step(self, step: int) -> dict[str, float]:
        """One update; returns what was measured before it."""
        config = self.objective.config
        field = self.generator.field(self.ws)
        loss, found = self.objective.image_loss(self.objective.render(field, step))
        extra, more = self.objective.guided(field, step, self.weight)
        if more and config.lambda_sigma > 0:
            more["moved"] = moved(field, self.cube, self.pivot)[0]
            extra = extra + config.lambda_sigma * config.reward_every * more["moved"]
        loss = loss + extra
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return {"loss": loss.item(), **{name: value.item() for name, value in {**found, **more}.items()}}

    def state(self) -> dict[str, Tensor]:
        """Everything that the next steps depend on."""
        network = {f"G.{name}": value for name, value in self.generator.module.state_dict().items()}
        return {"ws": self.ws, **network, **optimizer_tensors("adam", self.optimizer)}

    def restore(self, state: dict[str, Tensor]) -> None:
        self.generator.module.load_state_dict(
            {k.removeprefix("G."): v for k, v in state.items() if k.startswith("G.")}
        )
        restore_optimizer("adam", self.optimizer, state)
