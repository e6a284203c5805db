"""Run the two stages of an inversion, which finds a latent and a generator that reproduce an image.

The stages are those of the projectors of PanoHead and SphereHead. The first stage optimises the latent by
Adam, with one w for each layer, which starts from the mean latent. Its learning rate rises and falls, and
noise is added to the latent that decreases to 0. The second stage tunes all parameters of a copy of the
generator by Adam, with the latent of the first stage, the pivot (pivotal tuning inversion, Roich et al. 2021,
arXiv 2106.05744, without their regulariser). All random numbers of step t are determined by (seed, t), so
a resumed stage is identical to an uninterrupted one.

Deviates: The same ray samples are used in every step, twice as many as in training; the settings `PUBLISHED`
(settings.py) use new ones in every step. The published code uses 3.14 for pi. The default weights differ,
since the features of the bundled network and the latents of the small generator have other scales than those
of the published code.
Shapes: N images or shapes, L layers of ws, W w_dim, R x R or H x W pixels, F features, [N, D, H, W] density
grids.
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
from eg3d_rlhf.core.spec import SlabSpec
from eg3d_rlhf.evaluation.inversion.settings import InversionConfig
from eg3d_rlhf.generators import Generator, as_generator, camera, device_of
from eg3d_rlhf.measures.features import RESOLUTION, HeadFactorFeatures, to_resolution
from eg3d_rlhf.tuning.gan.latent_search import Guidance
from eg3d_rlhf.tuning.gan.phase import density_l1
from training.checkpoint import optimizer_tensors, restore_optimizer

# Perceptual distance of two images: the difference of features of a network, which is the bundled one or that
# of a TorchScript file.


LARGEST = 256  # largest input of a TorchScript network, pixels per edge, as in the published projectors


class Perceptual:
    """Perceptual distance [N] between images [N, 3, H, W] in [-1, 1].

    Args:
        name: name of the network. Distances by networks of different names cannot be compared.
        compute_features: differentiable function from images to features [N, F].
        is_mean: True if the distance is the mean of the squared differences, False if it is their sum.
    """

    def __init__(self, name: str, compute_features: Callable[[Tensor], Tensor], is_mean: bool):
        self.name = name
        self.features = compute_features
        self._mean = is_mean

    def feature_distance(self, features: Tensor, target_features: Tensor) -> Tensor:
        """Compute the squared distance [N] of features [N, F] to target features [N, F] or [1, F].

        Differentiable in both arguments.
        """
        squared_differences = (features - target_features).square()
        return squared_differences.mean(dim=1) if self._mean else squared_differences.sum(dim=1)

    def __call__(self, first_images: Tensor, second_images: Tensor) -> Tensor:
        """Compute the distance [N] of two batches of images."""
        return self.feature_distance(self.features(first_images), self.features(second_images))


def load_perceptual(
    network_path: Path | None, resolution: int, device: torch.device | str = "cpu"
) -> Perceptual:
    """Load the network of a perceptual distance.

    A TorchScript network is called as the projectors of the StyleGAN family call their VGG16:
    network(images, resize_images=False, return_lpips=True) -> [N, F], with images in 0..255 of at most 256
    pixels per edge. If the network does not have these options, it is called as network(images). The distance
    is the sum of the squared differences of its features. For the bundled network it is the mean of the
    squared differences of standardised features.

    Args:
        network_path: file of the network. A .safetensors file is a head-factor network, which has the same
            architecture as the bundled one. Any other file is a TorchScript network. If it is None, the
            bundled head-factor network is loaded.
        resolution: pixels per edge of the images, with which the network is tested.
        device: device of the network.

    Raises: ValueError if the file cannot be loaded, or if its output is not [N, F] or has no gradient.
    """
    if network_path is None or network_path.suffix == ".safetensors":
        head_factors = HeadFactorFeatures.load(network_path, device)

        def features(images: Tensor) -> Tensor:
            # Features are standardised, so that features with large values do not dominate the mean.
            return (
                head_factors.net.penultimate(to_resolution(images, RESOLUTION))
                - head_factors.net.feature_mean
            ) / head_factors.net.feature_std

        return Perceptual(head_factors.name, features, is_mean=True)
    try:
        network = torch.jit.load(str(network_path), map_location=device).eval()
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{network_path} cannot be loaded as TorchScript ({reason}). Pass a TorchScript file, or a"
            " .safetensors file of a head-factor network."
        ) from error
    # The optimisation needs gradients of the images only.
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    # The network is called with those options that its signature contains.
    argument_names = {schema_argument.name for schema_argument in network.forward.schema.arguments}
    call_options = {
        option_name: option_value
        for option_name, option_value in {"resize_images": False, "return_lpips": True}.items()
        if option_name in argument_names
    }

    def scripted_features(images: Tensor) -> Tensor:
        scaled_images = (images + 1) * 127.5  # [-1, 1] -> 0..255
        # Area interpolation averages pixels, which avoids aliasing.
        if max(scaled_images.shape[-2:]) > LARGEST:
            scaled_images = functional.interpolate(scaled_images, (LARGEST, LARGEST), mode="area")
        return network(scaled_images, **call_options)

    _test_network(scripted_features, network_path, resolution, device)
    return Perceptual(f"torchscript-{network_path.stem}", scripted_features, is_mean=False)


def _test_network(
    compute_features: Callable[[Tensor], Tensor],
    network_path: Path,
    resolution: int,
    device: torch.device | str,
) -> None:
    """Call a network once, so that an unsuitable file is found before the optimisation.

    Args:
        compute_features: function from images to features.
        network_path: file of the network, for messages.

    Raises: ValueError if the network fails, or if its output is not [N, F] or has no gradient.
    """
    # Two images are used, so that an output without a batch axis is found.
    images = torch.zeros(2, 3, resolution, resolution, device=device, requires_grad=True)
    try:
        test_features = compute_features(images)
    except RuntimeError as error:
        # The last line of a TorchScript traceback is the error message.
        reason = next(
            (text_line for text_line in str(error).splitlines()[::-1] if text_line.strip()),
            type(error).__name__,
        )
        raise ValueError(
            f"the network of {network_path} cannot be applied to images [N, 3, H, W] ({reason.strip()}). Pass"
            " for example the VGG16 of the StyleGAN projectors."
        ) from None
    if not isinstance(test_features, Tensor) or test_features.ndim != 2 or len(test_features) != 2:
        raise ValueError(
            f"the network of {network_path} returns {getattr(test_features, 'shape', type(test_features))}"
            " for two images, but features [2, F] are needed. Pass a network that returns one vector for each"
            " image."
        )
    if not test_features.requires_grad:
        raise ValueError(
            f"the output of the network of {network_path} has no gradients. Export the network without"
            " torch.no_grad."
        )


# The loss of an inversion with a reward:
#     L = L_image + lambda * (-clip(r, -10, 10) / 10) + lambda_sigma * mean |sigma - sigma_pivot|
# Here r is the reward's score, standardised on samples of the untuned generator, and sigma_pivot is the
# density over the whole cube at the start of the second stage. The last term limits changes of the shape that
# the target image does not show.


CUBE_POINTS = 64  # grid points per edge of the cube on which densities are compared


def cube_grid(generator: Generator) -> SlabSpec:
    """Return the grid over the generator's whole cube on which densities are compared."""
    return SlabSpec.from_bounds(generator.bounds, CUBE_POINTS)


def density_change(field: Field, cube_spec: SlabSpec, pivot_density: Tensor) -> Tensor:
    """Compute the mean absolute change [N] of the raw density since the start of the second stage.

    Differentiable in the field.

    Args:
        cube_spec: grid on which the density is compared.
        pivot_density: raw density at the start of the second stage, [N, D, H, W].
    """
    return density_l1(field.density_grid(cube_spec), pivot_density)


PRIOR_LATENTS = 10_000  # number of latents for the mean and the standard deviation of w
LATENT_SEED = 123  # seed of these latents
# Shares of the steps of the first stage:
FADED = 0.75  # the noise is 0 from here on
RISING = 0.05  # the learning rate rises over this share at the beginning
FALLING = 0.25  # the learning rate falls over this share at the end


def learning_rate(step: int, step_count: int, max_rate: float = 0.1) -> float:
    """Return the learning rate of the first stage.

    It rises linearly from 0 to `max_rate` over the first 5 % of the steps, and falls along a cosine over the
    last 25 %.

    Args:
        step: number of the step, 0 to step_count - 1.
        step_count: number of steps.
        max_rate: largest learning rate.
    """
    progress_share = step / step_count
    return (
        max_rate
        * (0.5 - 0.5 * math.cos(math.pi * min(1.0, (1 - progress_share) / FALLING)))
        * min(1.0, progress_share / RISING)
    )


def noise_scale(step: int, step_count: int, initial_scale: float = 0.05) -> float:
    """Return the standard deviation of the noise on w, in standard deviations of w.

    It is initial_scale * max(0, 1 - t / 0.75)^2, where t = step / step_count.

    Args:
        step: index of the step, 0 to step_count - 1.
        step_count: number of steps.
        initial_scale: standard deviation at step 0, in standard deviations of w.
    """
    return initial_scale * max(0.0, 1 - step / step_count / FADED) ** 2


class Target(NamedTuple):
    """Image that an inversion shall reproduce."""

    image: Tensor  # [1, 3, R, R] in [-1, 1]
    camera: Tensor  # [1, 25]
    mask: Tensor | None = None  # weight of each pixel, [1, 1, R, R] in 0..1; None: all weights are 1


class Prior(NamedTuple):
    """Mean and standard deviation of w over random latents."""

    mean: Tensor  # [1, 1, W]
    standard_deviation: float  # root of the mean squared distance of w to its mean


@torch.no_grad()
def estimate_prior(generator: Generator) -> Prior:
    """Compute the mean and the standard deviation of w over 10,000 latents, with the frontal camera."""
    device = device_of(generator)
    z = torch.from_numpy(
        np.random.RandomState(LATENT_SEED).randn(PRIOR_LATENTS, generator.z_dim).astype(np.float32)
    ).to(device)
    frontal_camera = camera(generator)  # [1, 25]
    # [10000, W]; all layers of the mapping's output are equal, so the first layer is used
    w = torch.cat(
        [
            generator.mapping(z_batch, frontal_camera.expand(len(z_batch), -1))[:, 0]
            for z_batch in z.split(1000)
        ]
    )
    mean_w = w.mean(dim=0)  # [W]
    return Prior(mean_w[None, None], float((w - mean_w).square().sum(dim=1).mean().sqrt()))


class Objective:
    """Loss of an inversion for one target: the image loss, and the term of a reward if there is one."""

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
        # the mean weight of the pixels, by which the squared error is divided
        self.share = 1.0 if target.mask is None else float(target.mask.mean())
        # The target's features are constant, so they are computed once.
        with torch.no_grad():
            self.target_features = perceptual.features(target.image)

    def render(self, field: Field, step: int) -> Tensor:
        """Render a field from the target's camera, [1, 3, R, R], without changing the global random state."""
        # Shifted by 20 bits, so that runs with different seeds have different samples for up to 2^20 steps.
        with fixed_draws((self.config.seed << 20) + (step if self.config.fresh_rays else 0)):
            return field.render(self.target.camera, self.look).image

    def blend_outside_mask(self, image: Tensor) -> Tensor:
        """Replace the part of an image [1, 3, R, R] outside the mask by the target, so that this part has no
        loss.
        """
        target_image = self.target.image
        pixel_weights = self.target.mask
        return image if pixel_weights is None else target_image + pixel_weights * (image - target_image)

    def image_loss(self, image: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the image loss, lambda_mse * mse + perceptual distance.

        The mean squared error (mse) is the mean over the mask.
        Returns: the loss, and a dict with its two unweighted terms, "mse" and "perceptual".
        """
        blended_image = self.blend_outside_mask(image)
        # The mean over all pixels divided by their mean weight is the mean over the mask.
        mse = (blended_image - self.target.image).square().mean() / self.share
        perceptual_distance = self.perceptual.feature_distance(
            self.perceptual.features(blended_image), self.target_features
        )[0]
        return self.config.lambda_mse * mse + perceptual_distance, {
            "mse": mse,
            "perceptual": perceptual_distance,
        }

    def guidance_term(
        self, field: Field, step: int, reward_weight: float
    ) -> tuple[Tensor | float, dict[str, Tensor]]:
        """Compute the reward's term of the loss in one optimisation step.

        Args:
            step: number of the step; the reward is evaluated in every `reward_every`-th step.
            reward_weight: weight of the reward.

        Returns: the term, and the dict {"reward": raw reward}. If the weight is 0, or if the reward is not
            evaluated in this step, the term is 0.0 and the dict is empty.
        """
        if self.guidance is None or reward_weight == 0 or step % self.config.reward_every:
            return 0.0, {}
        reward_term, score = self.guidance.clipped_reward(field)
        # The field holds a single shape, hence [0]. The term is multiplied by the number of steps between two
        # evaluations, so that its mean weight over all steps is `reward_weight`.
        return reward_weight * self.config.reward_every * reward_term[0], {"reward": score[0]}


class LatentStage:
    """First stage: w_steps steps that optimise ws [1, L, W] with the frozen generator."""

    name = "w"

    def __init__(
        self,
        generator: Generator,
        objective: Objective,
        prior: Prior,
        start_ws: Tensor | None = None,
        reward_weight: float = 0.0,
    ):
        """Prepare the first stage from an initial latent.

        Args:
            generator: untuned generator, which is frozen in place.
            objective: loss of the target.
            prior: mean and standard deviation of w.
            start_ws: initial ws, [1, L, W]; None selects the mean latent for every layer.
            reward_weight: weight of the reward in the second half of the stage, if the settings enable it
                there.
        """
        generator.module.eval().requires_grad_(False)
        self.generator = generator
        self.objective = objective
        self.prior = prior
        self.weight = reward_weight
        self.steps = objective.config.w_steps
        # There is one w for each layer; all of them start from the same mean.
        ws = prior.mean.repeat(1, generator.num_ws, 1) if start_ws is None else start_ws
        self.ws = ws.detach().clone().requires_grad_(True)
        self.optimizer = torch.optim.Adam([self.ws], betas=(0.9, 0.999))

    def step(self, step: int) -> dict[str, float]:
        """Make one update, and return the loss and its terms before the update."""
        config = self.objective.config
        noise_std = self.prior.standard_deviation * noise_scale(step, self.steps, config.noise)
        # The noise is sampled on the CPU from (seed, step), so that a resumed stage has the same noise. The
        # seed is shifted as in `Objective.render`.
        noise_generator = torch.Generator().manual_seed((config.seed << 20) + step)
        field = self.generator.field(
            self.ws + noise_std * torch.randn(self.ws.shape, generator=noise_generator).to(self.ws)
        )
        loss, loss_terms = self.objective.image_loss(self.objective.render(field, step))
        # This term keeps w close to the mean latent.
        loss = loss + config.lambda_w * (self.ws - self.prior.mean).square().mean()
        if config.reward_in_w and step >= self.steps // 2:
            reward_term, reward_terms = self.objective.guidance_term(field, step, self.weight)
            loss = loss + reward_term
            loss_terms = {**loss_terms, **reward_terms}
        # Adam has a single group of parameters, whose learning rate is set for this step.
        self.optimizer.param_groups[0]["lr"] = learning_rate(step, self.steps, config.w_lr)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return {"loss": loss.item(), **{term_name: term.item() for term_name, term in loss_terms.items()}}

    def state(self) -> dict[str, Tensor]:
        """Return the tensors that the next steps depend on."""
        return {"ws": self.ws.detach(), **optimizer_tensors("adam", self.optimizer)}

    def restore(self, stage_state: dict[str, Tensor]) -> None:
        """Restore a state that `state` returned."""
        with torch.no_grad():
            self.ws.copy_(stage_state["ws"])
        restore_optimizer("adam", self.optimizer, stage_state)


class PivotalStage:
    """Second stage: pivot_steps steps that tune a copy of the generator, while ws [1, L, W] is fixed."""

    name = "pivot"

    def __init__(self, generator: Generator, objective: Objective, ws: Tensor, reward_weight: float = 0.0):
        # The generator is copied, since other targets need the original.
        tuned_module = copy.deepcopy(generator.module).eval().requires_grad_(True)
        self.generator = as_generator(tuned_module)
        self.objective = objective
        self.ws = ws.detach()
        self.weight = reward_weight
        self.steps = objective.config.pivot_steps
        self.optimizer = torch.optim.Adam(
            tuned_module.parameters(), lr=objective.config.pivot_lr, betas=(0.9, 0.999)
        )
        self.cube = cube_grid(generator)
        # density before the first update, from which `density_change` is measured
        with torch.no_grad():
            self.pivot = generator.field(self.ws).density_grid(self.cube)

    def step(self, step: int) -> dict[str, float]:
        """Make one update, and return the loss and its terms before the update."""
        config = self.objective.config
        field = self.generator.field(self.ws)
        loss, loss_terms = self.objective.image_loss(self.objective.render(field, step))
        reward_term, reward_terms = self.objective.guidance_term(field, step, self.weight)
        # The density is compared only in steps in which the reward is evaluated, with the same factor.
        if reward_terms and config.lambda_sigma > 0:
            reward_terms["moved"] = density_change(field, self.cube, self.pivot)[0]
            reward_term = reward_term + config.lambda_sigma * config.reward_every * reward_terms["moved"]
        loss = loss + reward_term
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return {
            "loss": loss.item(),
            **{term_name: term.item() for term_name, term in {**loss_terms, **reward_terms}.items()},
        }

    def state(self) -> dict[str, Tensor]:
        """Return the tensors that the next steps depend on."""
        network_tensors = {
            f"G.{tensor_name}": tensor for tensor_name, tensor in self.generator.module.state_dict().items()
        }
        return {"ws": self.ws, **network_tensors, **optimizer_tensors("adam", self.optimizer)}

    def restore(self, stage_state: dict[str, Tensor]) -> None:
        """Restore a state that `state` returned."""
        self.generator.module.load_state_dict(
            {
                tensor_name.removeprefix("G."): tensor
                for tensor_name, tensor in stage_state.items()
                if tensor_name.startswith("G.")
            }
        )
        restore_optimizer("adam", self.optimizer, stage_state)
