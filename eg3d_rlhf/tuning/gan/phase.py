"""Reward phase (Grlhf) of the training loop: the losses that tune a generator by a reward.

    L = -lambda_r mean clip(shape(r(o(G(z))))) + lambda_sigma mean h |sigma_G - sigma_ref|

- z is a latent and G the generator that is tuned.
- o is the observation that the reward r reads, such as a grid of densities.
- shape is the shaping, one of `SHAPINGS`.
- clip limits the shaped reward to the bounds of --reward-clip. Outside them it gives no gradient, so the clip
  acts as a trust region.
- The second term is the density-consistency term. sigma_G and sigma_ref are the raw densities of the tuned
  generator and of the frozen reference generator for the same latent.
- h is the per-sample weight of that term. It is 1, except that --consistency-gate below 1 is the weight of
  shapes that scored below the clip's upper bound before tuning. Tuning then preserves shapes that were good
  before, and may change defective shapes.

Two optional terms penalise density in front of the face (`front_growth`, `NoseFloor`). The method is
described in sigma-reward.md, section 4.

Shapes: N batch, M samples of the untuned generator, E entries of an embedding, Z entries of a latent, L ws
per sample, W entries of a w; observation [N, ...] is the reward's input; D, H, W grid points along z, y, x.
"""

import copy
import functools
import warnings
from collections.abc import Callable, Iterator

import torch

from eg3d_rlhf.core.field import Field, RenderOptions, fixed_draws
from eg3d_rlhf.core.seeds import CALIBRATION, STANDARDISATION
from eg3d_rlhf.core.spec import SlabSpec
from eg3d_rlhf.experiments.version_0_1 import drop_comparison_counter
from eg3d_rlhf.generators import Generator, as_generator, camera, device_of, latents, ws_of_seeds
from eg3d_rlhf.rewards.evaluation import Network
from eg3d_rlhf.rewards.reward import Reward
from eg3d_rlhf.tuning.gan.settings import RewardConfig, clip_range
from training.gan_phases import Batch
from training.phases import Loss, Phase

# The published nose limit reads a window of a frontal depth map: rows and columns 53 to 72 of 128 x 128
# pixels.
DEPTH_MAP_SIDE = 128
WINDOW_START = 53  # first row and first column of the window
WINDOW_SIDE = 20
NOSE_PSI = 0.25  # truncation of the untuned samples that determine the nose limit
CUTOFF = 14  # number of ws that are truncated: all ws of the published backbone
WARNING_SHARE = 0.5  # share of untuned scores outside the trust region above which the user is warned


class Shaping(torch.nn.Module):
    """Map from a reward's score to the quantity that the reward phase maximises.

    This base class is the identity, --reward-shaping=none. Its subclasses are the other shapings.
    """

    def forward(
        self, network: Network, observation: torch.Tensor, sample_numbers: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Score observations and shape the scores.

        Args:
            network: the reward's network.
            observation: [N, ...], input of the reward.
            sample_numbers: [N] integers, consecutive numbers of the samples in the run, over all ranks.
        Returns: shaped rewards [N] and raw scores [N]. Differentiable in observation.
        """
        del sample_numbers  # only `ReferenceWins` uses them
        score = network.score(observation)
        return self.shaped(score), score

    def shaped(self, score: torch.Tensor) -> torch.Tensor:
        """Return the shaped rewards [N] of raw scores [N]."""
        return score


class Standardised(Shaping):
    """Shaping that standardises the score: (r - mean) scale, scale = min(1 / max(std, 0.5 |mean|), 10).

    r is the raw score; mean and std are those of the untuned generator's scores (sigma-reward.md, section 4).

    If the reward's training fitted a temperature T, r / T is the log-odds of a label. The scale is then at
    most 1 / T, so that it never amplifies log-odds. This matters for an uninformative reward, whose scores
    hardly vary or whose T is large. Without this limit, its scores would be scaled to a standard deviation of
    1, and it would change shapes as strongly as an informative reward.
    """

    mean: torch.Tensor
    scale: torch.Tensor

    def __init__(self, initial_scores: torch.Tensor, temperature: float | None = None):
        """Compute the mean and the scale from the scores of the untuned generator.

        Args:
            initial_scores: [M], raw scores of samples of the untuned generator. Scores further than 1.5
                interquartile ranges outside the quartiles are left out.
            temperature: temperature T of the reward; None if its training fitted none, as in published
                rewards.
        """
        super().__init__()
        largest_scale = 10.0 if temperature is None else min(10.0, 1 / temperature)
        # Outliers are left out, since they would dominate the standard deviation.
        low, high = widened_quartiles(initial_scores)
        initial_scores = initial_scores[(initial_scores >= low) & (initial_scores <= high)]
        mean = initial_scores.mean()
        std = initial_scores.std()
        # Buffers, so that checkpoints store them: a resumed run must not compute them again from its tuned
        # generator.
        self.register_buffer("mean", mean)
        self.register_buffer(
            "scale",
            # 0.5 |mean| limits the scale if all scores are nearly equal; 1e-8 avoids a division by 0.
            (1 / torch.maximum(std, 0.5 * mean.abs()).clamp_min(1e-8)).clamp_max(largest_scale),
        )

    def shaped(self, score: torch.Tensor) -> torch.Tensor:
        return (score - self.mean) * self.scale


class NegativeSoftplus(Shaping):
    """Shaping -softplus(-2 r) of the raw score r.

    The result is nearly 0 for large scores, so that good samples get hardly any gradient, and nearly linear
    for low scores.
    """

    def shaped(self, score: torch.Tensor) -> torch.Tensor:
        return -torch.nn.functional.softplus(-2 * score)


class ReferenceWins(Shaping):
    """Shaping to the mean probability that a sample wins against reference samples.

    The probability is that of the reward's pair head, which averages both orders of a pair. The references
    are the embeddings of M samples of the untuned generator. The sample with the number i in the run is
    compared with the references i K, ..., i K + K - 1 modulo M, where K is `comparisons`. The choice depends
    only on i, so it is the same for any number of ranks and accumulation rounds.

    Args:
        references: [M, E], embeddings of samples of the untuned generator.
        comparisons: number K of references with which a sample is compared.
    """

    references: torch.Tensor

    def __init__(self, references: torch.Tensor, comparisons: int = 4):
        super().__init__()
        self.comparisons = comparisons
        self.register_buffer("references", references)

    def _load_from_state_dict(self, state_dict, prefix, *load_arguments):
        # Version 0.1 stored a counter of comparisons. This version computes the references from the sample's
        # number.
        drop_comparison_counter(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *load_arguments)

    def forward(
        self, network: Network, observation: torch.Tensor, sample_numbers: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        embedding = network.embed(observation)  # [N, E]
        score = network.score_embedding(embedding)  # [N]
        comparison_count = self.comparisons
        offsets = torch.arange(comparison_count, device=sample_numbers.device)
        reference_numbers = (sample_numbers[:, None] * comparison_count + offsets).flatten()  # [N * count]
        reference_indices = reference_numbers % len(self.references)
        # Each embedding is repeated once for each of its references. The margins are log-odds, [N * count].
        margins = network.pair_margin(
            embedding.repeat_interleave(comparison_count, dim=0), self.references[reference_indices]
        )
        return torch.sigmoid(margins).unflatten(0, (len(embedding), comparison_count)).mean(dim=1), score


# Value of --reward-shaping -> function that makes the shaping. Its arguments are the raw scores [M] and the
# embeddings [M, E] of samples of the untuned generator, and the reward's temperature, or None if none was
# fitted.
SHAPINGS: dict[str, Callable[[torch.Tensor, torch.Tensor, float | None], Shaping]] = {
    "none": lambda scores, embeddings, temperature: Shaping(),
    "standardised": lambda scores, embeddings, temperature: Standardised(scores, temperature),
    "softplus": lambda scores, embeddings, temperature: NegativeSoftplus(),
    "reference": lambda scores, embeddings, temperature: ReferenceWins(embeddings),
}


def widened_quartiles(values: torch.Tensor) -> tuple[float, float]:
    """Return both quartiles of `values` [M], each moved outwards by 1.5 interquartile ranges.

    These bounds are known as Tukey's fences; values outside them are usually called outliers.
    """
    low, high = torch.quantile(values.float(), torch.tensor([0.25, 0.75], device=values.device)).tolist()
    return low - 1.5 * (high - low), high + 1.5 * (high - low)


def clip_bounds(clip_text: str, initial_rewards: torch.Tensor) -> tuple[float, float]:
    """Return the lower and the upper bound of the trust region.

    Args:
        clip_text: value of --reward-clip, see `settings.clip_range`. For "iqr" the bounds are the
            `widened_quartiles`.
        initial_rewards: [M], shaped rewards of samples of the untuned generator.
    Raises: ValueError naming --reward-clip if LOW is not below HIGH.
    """
    if clip_text == "iqr":
        return widened_quartiles(initial_rewards)
    return clip_range(clip_text, lambda share: torch.quantile(initial_rewards.float(), share).item())


# The nose limit is a penalty on faces that come nearer to the frontal camera than any face of the untuned
# generator. A depth reward reads only the front of a head, so a nose that grows towards the camera can raise
# its score without improving the shape. The limit is the smallest depth of the untuned faces. Shapes: h and w
# are the rows and columns of the window of the depth map.


def floor_loss(
    depth: torch.Tensor, min_depth: float | torch.Tensor, only_violators: bool = False
) -> torch.Tensor:
    """Return the mean of max(min_depth - depth, 0) over the pixels of each sample's depth window.

    Args:
        depth: [N, h, w], distance from the camera, in world units.
        min_depth: smallest allowed depth, in world units.
        only_violators: False to take the mean over all pixels. True to take it over the pixels that are
            nearer than the limit only, as in the published method; the number of such pixels then does not
            matter.
    Returns: [N], penalty in world units; 0 if no pixel is nearer than the limit. Differentiable in depth.
    Deviates: the published code takes the mean over the violating pixels of all samples of a batch together.
    """
    # Distance by which each pixel is nearer than the limit; 0 if it is not.
    excess = torch.relu(min_depth - depth).flatten(1)  # [N, h * w]
    if not only_violators:
        return excess.mean(dim=1)
    # clamp_min: without any violating pixel the result is 0 / 1 and not 0 / 0.
    return excess.sum(dim=1) / (excess > 0).sum(dim=1).clamp_min(1)


class NoseFloor(torch.nn.Module):
    """Penalty on faces that come nearer to the frontal camera than any face of the untuned generator.

    The limit `floor` is the smallest depth of untuned faces in a window in the middle of the frontal depth
    map.

    Args:
        generator: the untuned generator.
        ws: [M, L, W], ws of its samples at the truncation NOSE_PSI.
        kind: pixels over which the penalty is averaged, one of NOSE_FLOORS; see `floor_loss`.
    """

    floor: torch.Tensor

    @torch.no_grad()
    def __init__(self, generator: Generator, ws: torch.Tensor, kind: str):
        super().__init__()
        self.kind = kind
        self._camera = window_camera(generator)
        # 16 samples at a time, to bound the memory.
        smallest_depths = [self._depth(generator.field(ws_part)).amin() for ws_part in ws.split(16)]
        # A buffer, so that a resumed run keeps the limit of the untuned generator.
        self.register_buffer("floor", torch.stack(smallest_depths).amin())

    def _depth(self, field: Field) -> torch.Tensor:
        """Render the depth of the window, [N, h, w] in world units."""
        # The renderer samples random depths along rays. With fixed random numbers the penalty does not depend
        # on the state of the run's random generator, and does not change it.
        with fixed_draws():
            return field.render(self._camera, RenderOptions(resolution=WINDOW_SIDE)).depth[:, 0]

    def forward(self, field: Field) -> torch.Tensor:
        """Return the penalty of N samples, [N] in world units."""
        return floor_loss(self._depth(field), self.floor, self.kind == "violators")


def window_camera(generator: Generator) -> torch.Tensor:
    """Return the label [1, 25] of a camera that renders only the window of the frontal depth map.

    The window is rows and columns 53 to 72 of 128.
    """
    # The pose sampler uses random numbers although its standard deviations are 0 here.
    with fixed_draws():
        camera_label = generator.cameras.label()
        crop_scale = DEPTH_MAP_SIDE / WINDOW_SIDE
    # Intrinsics are in units of the image's edge, so a crop of the image changes them.
    # A view of `camera_label`, which the next lines therefore change.
    intrinsics = camera_label[0, 16:25].view(3, 3)
    intrinsics[:2, :2] *= crop_scale  # focal lengths and skew
    intrinsics[:2, 2] = (intrinsics[:2, 2] - WINDOW_START / DEPTH_MAP_SIDE) * crop_scale  # principal point
    return camera_label


class RewardPhaseState(torch.nn.Module):
    """Constants and frozen reference of the reward phase, which checkpoints store.

    Args:
        G_ref: frozen reference generator.
        shaping: shaping of the reward, with the constants that it computed from the untuned generator.
        bounds: lower and upper bound of the trust region.
        nose_floor: nose limit; None without that penalty.
    """

    bounds: torch.Tensor

    def __init__(
        self,
        G_ref: torch.nn.Module,
        shaping: torch.nn.Module,
        bounds: tuple[float, float],
        nose_floor: NoseFloor | None = None,
    ):
        super().__init__()
        self.G_ref = G_ref
        self.shaping = shaping
        self.nose_floor = nose_floor
        self.register_buffer("bounds", torch.tensor(bounds))
        # Nothing of this module is trained.
        self.eval().requires_grad_(False)


class RewardTerms:
    """Loss terms of the reward phase, see the module's docstring.

    Args:
        G: generator that is tuned.
        G_ema: moving average of the untuned generator, of which a frozen copy becomes the reference.
        reward: reward that fits the generator; it is frozen.
        config: settings of the reward phase.
    """

    def __init__(self, G: torch.nn.Module, G_ema: torch.nn.Module, reward: Reward, config: RewardConfig):
        # `as_generator` gives generators of all families the same interface.
        self.generator = as_generator(G)
        self.config = config
        self.reward = reward.eval().requires_grad_(False).channels_last()
        # A copy, because G_ema itself changes during tuning.
        G_ref = copy.deepcopy(G_ema).eval().requires_grad_(False)
        self.reference = as_generator(G_ref)
        # Grid on which the density-consistency term compares densities; it covers the scene's entire cube.
        self.cube = SlabSpec.from_bounds(self.generator.bounds, config.consistency_resolution)
        with torch.no_grad():
            shaping, bounds = self._calibrate()
            nose_penalty = None
            if config.lambda_nose > 0:
                ws = ws_of_seeds(self.reference, CALIBRATION.seeds, NOSE_PSI, CUTOFF)
                nose_penalty = NoseFloor(self.reference, ws, config.nose_floor).to(device_of(self.reference))
        self.state = RewardPhaseState(G_ref, shaping, bounds, nose_penalty)

    def _calibrate(self) -> tuple[Shaping, tuple[float, float]]:
        """Compute the constants of the shaping and the clip bounds from samples of the untuned generator.

        Warns if most rewards lie outside the bounds, or if --consistency-gate applies to all shapes.

        Returns: the shaping, and the lower and the upper bound.
        """
        reference = self.reference
        network = self.reward.network
        observation_batches = []  # inputs of the reward, 16 samples [16, ...] in each entry
        device = device_of(reference)
        # Two sets of latents that no reward was trained on. The shaping "standardised" has a set of its own.
        seeds = STANDARDISATION.seeds if self.config.reward_shaping == "standardised" else CALIBRATION.seeds
        # 16 samples at a time, to bound the memory.
        for z in latents(seeds, reference.z_dim).to(device).split(16):
            ws = reference.mapping(z, camera(reference, n=len(z)), truncation_cutoff=CUTOFF)
            observation_batches.append(self.reward.observation.observe(reference.field(ws)))
        embeddings = torch.cat([network.embed(observation) for observation in observation_batches])
        self.initial_scores = torch.cat([network.score(observation) for observation in observation_batches])
        temperature = self.reward.provenance.get("temperature")  # None for published rewards
        make_shaping = SHAPINGS[self.config.reward_shaping]
        shaping = make_shaping(self.initial_scores, embeddings, temperature).to(device)
        shaped_reward_parts = []
        for observation in observation_batches:
            # The numbers start at 0 in each part, so the shaping "reference" compares all parts with the same
            # reference samples.
            sample_numbers = torch.arange(len(observation), device=device)
            shaped_reward_parts.append(shaping(network, observation, sample_numbers)[0])
        shaped_rewards = torch.cat(shaped_reward_parts)
        low, high = clip_bounds(self.config.reward_clip, shaped_rewards)
        outside_share = ((shaped_rewards < low) | (shaped_rewards > high)).float().mean().item()
        # Warnings and not errors: the run works, but the reward or the consistency term has little effect.
        if outside_share > WARNING_SHARE:
            warnings.warn(
                f"--reward-clip: {outside_share:.0%} of the untuned samples have rewards outside"
                f" {low:g}..{high:g}, which give no gradient. Use --reward-shaping=standardised, or wider"
                " bounds.",
                stacklevel=2,
            )
        if self.config.consistency_gate < 1 and not (shaped_rewards > high).any():
            warnings.warn(
                f"--consistency-gate: no untuned sample has a reward above the bound {high:g} of"
                " --reward-clip, so no shape gets the full weight of the density-consistency term. Lower that"
                " bound, e.g. with --reward-clip=-10,q0.55.",
                stacklevel=2,
            )
        return shaping, (low, high)

    def losses(self, batch: Batch) -> Iterator[Loss]:
        """Yield the reward term for the latents of the batch, and then the density terms for new latents.

        The loop runs backward on the first term before it asks for the second, so only one graph is in
        memory.
        """
        config = self.config
        ws = self.generator.mapping(
            batch.gen_z, batch.gen_c, truncation_psi=config.truncation_psi, truncation_cutoff=CUTOFF
        )
        # The reward and the nose limit both read this field, so the planes are computed once.
        field = self.generator.field(ws)
        observation = self.reward.observation.observe(field)
        shaped_rewards, score = self.state.shaping(self.reward.network, observation, batch.places)
        low, high = self.state.bounds.tolist()
        # clamp() has the gradient 0 outside its bounds, which is the trust region.
        loss = -config.lambda_r * shaped_rewards.clamp(low, high)
        stats = {
            "RLHF/reward": score,
            "RLHF/shaped": shaped_rewards,
            # Share of samples outside the trust region, which get no gradient.
            "RLHF/clipped": ((shaped_rewards < low) | (shaped_rewards > high)).float(),
        }
        if self.state.nose_floor is not None:
            stats["RLHF/nose"] = self.state.nose_floor(field)
            loss = loss + config.lambda_nose * stats["RLHF/nose"]
        yield Loss(loss, {**stats, "Loss/Grlhf/reward": loss})
        # New latents, because these samples have a truncation of their own, `consistency_psi`.
        if any(getattr(config, weight_name) > 0 for weight_name in CONSISTENCY_TERMS):
            yield self._consistency_loss(torch.randn_like(batch.gen_z), batch.gen_c, batch.places)

    def _consistency_loss(self, z: torch.Tensor, c: torch.Tensor, sample_numbers: torch.Tensor) -> Loss:
        """Return the loss that compares densities with the reference's: a weighted sum of terms, [N].

        Args:
            z: [N, Z], latents.
            c: [N, 25], cameras for the mapping networks.
            sample_numbers: [N] integers, consecutive numbers of the samples in the run.
        """
        config = self.config

        def make_field(generator: Generator) -> Field:
            """Return the density field of a generator for the latents, with its own mapping network."""
            return generator.field(
                generator.mapping(z, c, truncation_psi=config.consistency_psi, truncation_cutoff=CUTOFF)
            )

        sigma = make_field(self.generator).density_grid(self.cube)  # [N, D, H, W]
        with torch.no_grad():
            reference_field = make_field(self.reference)
            sigma_ref = reference_field.density_grid(self.cube)
        stats: dict[str, torch.Tensor] = {}
        weighted_terms = []
        for weight_name, (statistic, term) in CONSISTENCY_TERMS.items():
            term_weight = getattr(config, weight_name)
            # density_l1, the term of lambda_sigma, is computed with the weight 0 as well, because it is
            # logged.
            if term_weight == 0 and weight_name != "lambda_sigma":
                continue
            stats[statistic] = term(sigma, sigma_ref, self.generator.level)
            weighted_term = term_weight * stats[statistic]
            if weight_name == "lambda_sigma" and config.consistency_gate < 1:
                stats["RLHF/consistency_weight"] = self._gate(reference_field, sample_numbers)
                weighted_term = weighted_term * stats["RLHF/consistency_weight"]
            weighted_terms.append(weighted_term)
        loss = functools.reduce(torch.add, weighted_terms)
        return Loss(loss, {**stats, "Loss/Grlhf/consistency": loss})

    @torch.no_grad()
    def _gate(self, reference_field: Field, sample_numbers: torch.Tensor) -> torch.Tensor:
        """Return the per-sample weight [N] of the density-consistency term.

        The weight is 1 for shapes whose reward was above the upper clip bound before tuning, and
        --consistency-gate for all other shapes. The reward term gives no gradient to shapes above that bound.

        Args:
            reference_field: N shapes of the reference generator.
            sample_numbers: [N] integers, consecutive numbers of the samples in the run.
        """
        observation = self.reward.observation.observe(reference_field)
        shaped_rewards, _ = self.state.shaping(self.reward.network, observation, sample_numbers)
        return torch.where(shaped_rewards > self.state.bounds[1], 1.0, self.config.consistency_gate)


def density_l1(sigma: torch.Tensor, sigma_ref: torch.Tensor, level: float | None = None) -> torch.Tensor:
    """Compute the mean absolute difference of raw densities for each sample (sigma-reward.md, section 4).

    Args:
        sigma: [N, D, H, W], raw densities of the tuned generator.
        sigma_ref: [N, D, H, W], raw densities of the reference for the same latents.
        level: not used. All functions in `CONSISTENCY_TERMS` have this argument.
    Returns: [N], in units of the raw density. Differentiable in sigma.
    """
    del level
    return (sigma - sigma_ref).abs().mean(dim=[1, 2, 3])


def front_growth(sigma: torch.Tensor, sigma_ref: torch.Tensor, level: float = 10.0) -> torch.Tensor:
    """Compute the mean of max(sigma - sigma_ref, 0) over the voxels in front of the reference surface.

    The frontal camera looks along -z. A voxel is in front of the surface if neither this voxel nor any voxel
    between it and the camera reaches `level` in the reference.

    Args:
        sigma: [N, D, H, W], raw densities of the tuned generator.
        sigma_ref: [N, D, H, W], raw densities of the reference for the same latents.
        level: raw density of the isosurface.
    Returns: [N], in units of the raw density; 0 if no voxel is in front. Differentiable in sigma.
    """
    # cummax runs towards larger indices, and the camera is at the last index along z. The grid is therefore
    # flipped, so that the maximum runs from the camera to the back.
    is_at_or_behind_surface = (sigma_ref >= level).flip(1).cummax(dim=1).values.flip(1)  # [N, D, H, W]
    is_in_front = ~is_at_or_behind_surface
    growth = torch.relu(sigma - sigma_ref) * is_in_front
    # clamp_min: if the reference fills the cube's front face, no voxel is in front, and the result is 0.
    return growth.sum(dim=[1, 2, 3]) / is_in_front.sum(dim=[1, 2, 3]).clamp_min(1)


# Terms that compare the densities of the tuned generator with those of the reference for the same latents.
# Name of the term's weight in `RewardConfig` -> (name of the statistic in the log, function). The function
# takes sigma and sigma_ref [N, D, H, W] and the raw density of the surface, and returns [N].
CONSISTENCY_TERMS: dict[str, tuple[str, Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]]] = {
    "lambda_sigma": ("RLHF/consistency", density_l1),
    "lambda_front": ("RLHF/front_growth", front_growth),
}


def reward_phase(terms: RewardTerms, optimizer: torch.optim.Optimizer) -> Phase:
    """Return the reward phase Grlhf for the training loop.

    The loop runs the phase in every iteration, with an optimiser for G that only this phase uses. Adam
    normalises the scale of the gradient, so with a separate optimiser the size of the reward's step does not
    depend on the adversarial loss.
    """
    return Phase(
        name="Grlhf",
        module=terms.generator.module,
        optimizer=optimizer,
        losses=terms.losses,
        state=terms.state,
        own_optimizer=True,
    )
