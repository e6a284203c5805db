"""Run the two stages of an inversion: a latent under a frozen generator, then a copy of the generator around
that latent.

The stages follow the projectors of PanoHead and SphereHead (reward-zoo.md, section 4.1). The first is Adam on
one w per layer from the mean latent, with a learning rate that rises and falls and with noise that fades. The
second is Adam on all parameters (Roich et al. 2021, without their regulariser). All random numbers of step t
follow from (seed, t), so a resumed stage is identical to an uninterrupted one.

Deviates: one set of ray samples throughout, twice as many as in training (`PUBLISHED` draws new ones in every
step); pi is not 3.14. The small generator's 64 features leave more to the squared error, and its latents have
a larger spread, so its default weights differ.
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

# Perceptual distance of two images: by the features of a differentiable network, the bundled one or that of a
# TorchScript file.


LARGEST = 256  # pixels per edge of the largest input to a file's network, as in the published projectors


class Perceptual:
    """Perceptual distance [N] between images [N, 3, H, W] in [-1, 1].

    Args:
        name: names the network; distances under different names are not comparable.
        features: images -> [N, F], differentiable.
        mean: divide the sum of squared differences by F.
    """

    def __init__(self, name: str, features: Callable[[Tensor], Tensor], mean: bool):
        self.name = name
        self.features = features
        self._mean = mean

    def distance(self, features: Tensor, target_features: Tensor) -> Tensor:
        """Compute the squared difference [N] of features [N, F]; target_features may be [1, F].
        Differentiable in both.
        """
        squares = (features - target_features).square()
        return squares.mean(dim=1) if self._mean else squares.sum(dim=1)

    def __call__(self, first: Tensor, second: Tensor) -> Tensor:
        """Compute the distance [N] of two batches of images."""
        return self.distance(self.features(first), self.features(second))


def load_perceptual(path: Path | None, resolution: int, device: torch.device | str = "cpu") -> Perceptual:
    """Load the perceptual distance of a file: None for the bundled head-factor network, .safetensors for
    another of its kind, else TorchScript.

    TorchScript is called as the projectors of the StyleGAN family call their VGG16: net(images in 0..255 of
    at most 256 pixels, resize_images=False, return_lpips=True) -> [N, F], or net(images) if it has no such
    options; its squared differences are summed. The bundled network's standardised features are averaged.

    Args: resolution: pixels per edge of the images to come; the file is tested with this size.
    Raises: ValueError for another file, one with another output, or one without gradients.
    """
    if path is None or path.suffix == ".safetensors":
        head_factors = HeadFactorFeatures.load(path, device)

        def features(images: Tensor) -> Tensor:
            # Standardised, so that no feature dominates the mean by its scale.
            return (
                head_factors.net.penultimate(to_resolution(images, RESOLUTION))
                - head_factors.net.feature_mean
            ) / head_factors.net.feature_std

        return Perceptual(head_factors.name, features, mean=True)
    try:
        net = torch.jit.load(str(path), map_location=device).eval()
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"expected a TorchScript file or .safetensors, got {path} ({reason}). Name another."
        ) from error
    # Gradients go to the images alone.
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    # A network is called with the options that its signature names.
    takes = {argument.name for argument in net.forward.schema.arguments}
    options = {
        name: value for name, value in {"resize_images": False, "return_lpips": True}.items() if name in takes
    }

    def scripted(images: Tensor) -> Tensor:
        pixels = (images + 1) * 127.5  # [-1, 1] -> 0..255
        # Area interpolation averages, so that a reduction does not alias.
        if max(pixels.shape[-2:]) > LARGEST:
            pixels = functional.interpolate(pixels, (LARGEST, LARGEST), mode="area")
        return net(pixels, **options)

    _try(scripted, path, resolution, device)
    return Perceptual(f"torchscript-{path.stem}", scripted, mean=False)


def _try(
    features: Callable[[Tensor], Tensor], path: Path, resolution: int, device: torch.device | str
) -> None:
    """Call a network once, so that a wrong file fails before the optimisation. Raises: ValueError."""
    # Two images, so that a missing batch axis is noticed.
    images = torch.zeros(2, 3, resolution, resolution, device=device, requires_grad=True)
    try:
        output = features(images)
    except RuntimeError as error:
        # The last line of a TorchScript traceback holds the error itself.
        reason = next((line for line in str(error).splitlines()[::-1] if line.strip()), type(error).__name__)
        raise ValueError(
            f"expected a net of images [N, 3, H, W], got {path} ({reason.strip()}). Name the VGG16 of the"
            " StyleGAN projectors."
        ) from None
    if not isinstance(output, Tensor) or output.ndim != 2 or len(output) != 2:
        raise ValueError(
            f"expected features [N, F] from {path}, got {getattr(output, 'shape', type(output))}. Name"
            " another."
        )
    if not output.requires_grad:
        raise ValueError(
            f"expected features that gradients pass through, got none from {path}. Export the network without"
            " no_grad."
        )


# The reward's part in an inversion:
#     L = L_image + lambda * (-clip(r, -10, 10) / 10) + lambda_sigma * mean |sigma - sigma_pivot|
# r is the reward's score, standardised on samples of the untuned generator; sigma_pivot is the density of the
# latent that the second stage starts from, over the whole cube, so that the reward cannot trade what the
# image does not show.


CLIP = 10.0  # largest absolute value of the standardised reward
CUBE = 64  # grid points per edge of the cube whose density is compared with the pivot's


class Guidance:
    """The reward of one generator's shapes, frozen and standardised on that generator's samples.

    Args: reward: a reward that was checked against the generator.
    """

    @torch.no_grad()
    def __init__(self, generator: Generator, reward: Reward):
        self.reward = reward.eval().requires_grad_(False).arranged()
        # Standardised on the untuned generator's samples, so that the weight lambda does not depend on the
        # reward's scale.
        z = latents(STANDARDISATION.all, generator.z_dim).to(device_of(generator))
        scores = []
        for part in z.split(16):
            ws = generator.mapping(part, camera(generator, n=len(part)), truncation_cutoff=CUTOFF)
            scores.append(self.reward.score(generator.field(ws)))
        self.standard = Standardised(torch.cat(scores)).to(z.device)

    def term(self, field: Field) -> tuple[Tensor, Tensor]:
        """Compute -clip(standardised reward) / 10, and the raw reward: [N] each. Differentiable in the
        field.
        """
        score = self.reward.score(field)
        # Clipping ends the gradient where the reward is already extreme.
        return -self.standard.shaped(score).clamp(-CLIP, CLIP) / CLIP, score


def cube_of(generator: Generator) -> SlabSpec:
    """Return the grid over the generator's whole cube."""
    return SlabSpec.of(generator.bounds, CUBE)


def moved(field: Field, cube: SlabSpec, pivot: Tensor) -> Tensor:
    """Compute the mean absolute change [N] of raw density from the pivot's [N, D, H, W]. Differentiable in
    the field.
    """
    return density_l1(field.density_grid(cube), pivot)


# number and seed of the latents for the mean and the standard deviation of w
LATENTS = 10_000
LATENT_SEED = 123
# shares of the steps: the noise fades until FADED, the learning rate rises over RISING and falls over FALLING
FADED = 0.75
RISING = 0.05
FALLING = 0.25


def learning_rate(step: int, steps: int, largest: float = 0.1) -> float:
    """Return the first stage's learning rate in `step` of 0..steps-1.

    It rises from 0 to `largest` over the first 5 % and falls along a cosine over the last 25 %.
    """
    t = step / steps
    return largest * (0.5 - 0.5 * math.cos(math.pi * min(1.0, (1 - t) / FALLING))) * min(1.0, t / RISING)


def noise_scale(step: int, steps: int, first: float = 0.05) -> float:
    """Return the standard deviation of the noise on w over that of w: first * max(0, 1 - t / 0.75)^2."""
    return first * max(0.0, 1 - step / steps / FADED) ** 2


class Target(NamedTuple):
    """Image that an inversion reproduces."""

    image: Tensor  # [1, 3, R, R] in [-1, 1]
    camera: Tensor  # [1, 25]
    mask: Tensor | None = None  # [1, 1, R, R] in 0..1: weight of each pixel


class Prior(NamedTuple):
    """Distribution of w: its mean and spread."""

    mean: Tensor  # [1, 1, W]
    standard_deviation: float  # standard deviation: root of the mean squared distance to the mean


@torch.no_grad()
def prior_of(generator: Generator) -> Prior:
    """Compute the mean and the standard deviation of w over 10,000 latents under the frontal camera."""
    device = device_of(generator)
    z = torch.from_numpy(
        np.random.RandomState(LATENT_SEED).randn(LATENTS, generator.z_dim).astype(np.float32)
    ).to(device)
    front = camera(generator)
    # [10000, W]; all layers of the mapping's output are equal, so the first stands for them
    w = torch.cat([generator.mapping(part, front.expand(len(part), -1))[:, 0] for part in z.split(1000)])
    mean = w.mean(dim=0)  # [W]
    return Prior(mean[None, None], float((w - mean).square().sum(dim=1).mean().sqrt()))


class Objective:
    """Image part of the loss for one target, with the guidance of a reward if there is one."""

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
        # Share of the image that the mask covers
        self.share = 1.0 if target.mask is None else float(target.mask.mean())
        # The target's features are constant, so they are computed once.
        with torch.no_grad():
            self.target_features = perceptual.features(target.image)

    def render(self, field: Field, step: int) -> Tensor:
        """Render the target's view, [1, 3, R, R]; torch's global random state is kept."""
        # The shift by 20 bits keeps the seeds of different runs apart for up to 2^20 steps.
        with fixed_draws((self.config.seed << 20) + (step if self.config.fresh_rays else 0)):
            return field.render(self.target.camera, self.look).image

    def seen(self, image: Tensor) -> Tensor:
        """Blend an image [1, 3, R, R] with the target outside the mask, where it cannot cause a loss."""
        target = self.target.image
        mask = self.target.mask
        return image if mask is None else target + mask * (image - target)

    def image_loss(self, image: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute lambda_mse * mse + perceptual distance; the squared error is the mean over the mask."""
        image = self.seen(image)
        # The mean over all pixels divided by the mask's share is the mean over the mask.
        mse = (image - self.target.image).square().mean() / self.share
        distance = self.perceptual.distance(self.perceptual.features(image), self.target_features)[0]
        return self.config.lambda_mse * mse + distance, {"mse": mse, "perceptual": distance}

    def guided(self, field: Field, step: int, weight: float) -> tuple[Tensor | float, dict[str, Tensor]]:
        """Compute the reward's term in `step`: 0 without a weight, and in the steps between two
        evaluations.
        """
        if self.guidance is None or weight == 0 or step % self.config.reward_every:
            return 0.0, {}
        term, score = self.guidance.term(field)
        # Multiplied by the interval, so that the mean over the steps equals the weight.
        return weight * self.config.reward_every * term[0], {"reward": score[0]}


class LatentStage:
    """First stage: steps 0..w_steps-1 on ws [1, L, W] under the frozen generator."""

    name = "w"

    def __init__(
        self,
        generator: Generator,
        objective: Objective,
        prior: Prior,
        start: Tensor | None = None,
        weight: float = 0.0,
    ):
        """Initialise the stage.

        Args:
            start: ws [1, L, W]; None is the mean latent.
            weight: of the reward in the second half, if the settings enable it there.
        """
        generator.module.eval().requires_grad_(False)
        self.generator = generator
        self.objective = objective
        self.prior = prior
        self.weight = weight
        self.steps = objective.config.w_steps
        # One w per layer: all start from the same mean.
        ws = prior.mean.repeat(1, generator.num_ws, 1) if start is None else start
        self.ws = ws.detach().clone().requires_grad_(True)
        self.optimizer = torch.optim.Adam([self.ws], betas=(0.9, 0.999))

    def step(self, step: int) -> dict[str, float]:
        """Make one update; return the values measured before it."""
        config = self.objective.config
        scale = self.prior.standard_deviation * noise_scale(step, self.steps, config.noise)
        # Drawn on the CPU from (seed, step), so that a resumed stage draws the same noise.
        draws = torch.Generator().manual_seed((config.seed << 20) + step)
        field = self.generator.field(
            self.ws + scale * torch.randn(self.ws.shape, generator=draws).to(self.ws)
        )
        loss, values = self.objective.image_loss(self.objective.render(field, step))
        # Regularises w towards the mean latent.
        loss = loss + config.lambda_w * (self.ws - self.prior.mean).square().mean()
        if config.reward_in_w and step >= self.steps // 2:
            extra, more = self.objective.guided(field, step, self.weight)
            loss = loss + extra
            values = {**values, **more}
        # The schedule sets the learning rate before the step that uses it.
        self.optimizer.param_groups[0]["lr"] = learning_rate(step, self.steps, config.w_lr)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return {"loss": loss.item(), **{name: value.item() for name, value in values.items()}}

    def state(self) -> dict[str, Tensor]:
        """Return the tensors that the next steps depend on."""
        return {"ws": self.ws.detach(), **optimizer_tensors("adam", self.optimizer)}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Restore a state of `state`."""
        with torch.no_grad():
            self.ws.copy_(state["ws"])
        restore_optimizer("adam", self.optimizer, state)


class PivotalStage:
    """Second stage: steps 0..pivot_steps-1 on a copy of the generator's parameters; ws [1, L, W] is fixed."""

    name = "pivot"

    def __init__(self, generator: Generator, objective: Objective, ws: Tensor, weight: float = 0.0):
        # A copy, so that the original serves the next target.
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
        # Density before the first update, the reference of `moved`
        with torch.no_grad():
            self.pivot = generator.field(self.ws).density_grid(self.cube)

    def step(self, step: int) -> dict[str, float]:
        """Make one update; return the values measured before it."""
        config = self.objective.config
        field = self.generator.field(self.ws)
        loss, values = self.objective.image_loss(self.objective.render(field, step))
        extra, more = self.objective.guided(field, step, self.weight)
        # The density is compared only in steps that evaluate the reward, with the same multiplier.
        if more and config.lambda_sigma > 0:
            more["moved"] = moved(field, self.cube, self.pivot)[0]
            extra = extra + config.lambda_sigma * config.reward_every * more["moved"]
        loss = loss + extra
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return {"loss": loss.item(), **{name: value.item() for name, value in {**values, **more}.items()}}

    def state(self) -> dict[str, Tensor]:
        """Return the tensors that the next steps depend on."""
        network = {f"G.{name}": value for name, value in self.generator.module.state_dict().items()}
        return {"ws": self.ws, **network, **optimizer_tensors("adam", self.optimizer)}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Restore a state of `state`."""
        self.generator.module.load_state_dict(
            {k.removeprefix("G."): v for k, v in state.items() if k.startswith("G.")}
        )
        restore_optimizer("adam", self.optimizer, state)
