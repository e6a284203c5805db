"""Reward phase (Grlhf) of the training loop: the losses that tune a generator by a reward.

    L = -lambda_r mean clip(shape(r(o(G(z))))) + lambda_sigma mean h |sigma_G - sigma_ref| (+ front growth)

Here o is the observation that the reward r reads, and shape is one of `SHAPINGS`. The clip acts as a trust
region: a shaped reward outside its bounds gives no gradient. The second term is the density-consistency term;
sigma_ref is the density of the frozen reference generator. Its per-sample weight h is 1. With
--consistency-gate below 1, h is smaller for shapes that scored below the clip's upper bound before tuning.
Shapes that were good are then kept, and defective shapes may change.

Letters: N batch, M reference samples, E embedding; observed [N, ...] is the reward's input; D, H, W grid
points along z, y, x.
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
from eg3d_rlhf.generators import Generator, camera, device_of, latents, of, ws_of_seeds
from eg3d_rlhf.rewards.evaluation import Network
from eg3d_rlhf.rewards.reward import Reward
from eg3d_rlhf.tuning.gan.settings import RewardConfig, clip_range
from training.gan_phases import Batch
from training.phases import Loss, Phase

# The published nose limit reads rows and columns 53 to 72 of a frontal depth map of 128 x 128 pixels.
PIXELS = 128
FIRST = 53
SIDE = 20
NOSE_PSI = 0.25  # truncation of the untuned samples that set the nose limit
CUTOFF = 14  # truncation cutoff of the method: all ws of the published backbone
MOSTLY = 0.5  # share of untuned scores outside the trust region above which the user is warned


class Shaping(torch.nn.Module):
    """Map from a reward's score to the quantity that the reward phase maximises. This one is the identity."""

    def forward(
        self, network: Network, observed: torch.Tensor, places: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Score and shape observations.

        Args:
            network: the reward's network.
            observed: [N, ...].
            places: [N], running numbers of the samples in the whole run.
        Returns: shaped [N], raw score [N]. Differentiable in observed.
        """
        del places  # only `ReferenceWins` uses them
        score = network.score(observed)
        return self.shaped(score), score

    def shaped(self, score: torch.Tensor) -> torch.Tensor:
        """Return the shaped rewards [N] of raw scores [N]."""
        return score


class Standardised(Shaping):
    """(r - mean) * scale over the initial samples, scale = min(1 / max(std, 0.5 |mean|), 10)
    (sigma-reward.md, 4).

    If the reward's training fitted a temperature T, r / T is the log-odds of a label, and the scale is at
    most 1 / T. Standardising may then reduce log-odds, but never amplifies them. The scores of a reward that
    does not order its validation pairs hardly vary, or its T is large. Scaled to a standard deviation of 1,
    such a reward would push every shape as hard as an informative one.
    """

    mean: torch.Tensor
    scale: torch.Tensor

    def __init__(self, initial_scores: torch.Tensor, temperature: float | None = None):
        """
        Args:
            initial_scores: [M] of the untuned generator. Scores beyond 1.5 interquartile ranges from the
                quartiles are left out.
            temperature: T; None if none was fitted, as in published rewards.
        """
        super().__init__()
        # 10 caps the scale where no temperature is known.
        most = 10.0 if temperature is None else min(10.0, 1 / temperature)
        # Outliers would dominate the standard deviation.
        low, high = widened_quartiles(initial_scores)
        initial_scores = initial_scores[(initial_scores >= low) & (initial_scores <= high)]
        mean = initial_scores.mean()
        std = initial_scores.std()
        # Buffers, so that checkpoints hold them: a resumed run must
        # not calibrate again on its tuned generator.
        self.register_buffer("mean", mean)
        self.register_buffer(
            # 0.5 |mean| bounds the scale where scores are nearly constant.
            "scale",
            (1 / torch.maximum(std, 0.5 * mean.abs()).clamp_min(1e-8)).clamp_max(most),
        )

    def shaped(self, score: torch.Tensor) -> torch.Tensor:
        return (score - self.mean) * self.scale


class NegativeSoftplus(Shaping):
    """-softplus(-2 r): saturates for good samples and is linear for bad ones."""

    def shaped(self, score: torch.Tensor) -> torch.Tensor:
        return -torch.nn.functional.softplus(-2 * score)


class ReferenceWins(Shaping):
    """Mean probability, by the reward's pair head, of winning against `comparisons` reference samples.

    Each comparison averages both orders of the pair. The references are embeddings of samples of the untuned
    generator. Sample i of the run is compared with references i * comparisons and those that follow it,
    cyclically, on whichever rank or accumulation round it is computed.
    """

    references: torch.Tensor

    def __init__(self, references: torch.Tensor, comparisons: int = 4):
        super().__init__()
        self.comparisons = comparisons
        self.register_buffer("references", references)

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        # Version 0.1 stored a counter instead of deriving the references from the sample's place.
        drop_comparison_counter(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def forward(
        self, network: Network, observed: torch.Tensor, places: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        embedding = network.embed(observed)  # [N, E]
        score = network.score_embedding(embedding)
        count = self.comparisons
        # Indices of references, [N * count].
        index = (places[:, None] * count + torch.arange(count, device=places.device)).flatten() % len(
            self.references
        )
        # Each embedding is repeated for its references; margins of the pairs, [N * count].
        margin = network.pair_margin(embedding.repeat_interleave(count, dim=0), self.references[index])
        return torch.sigmoid(margin).unflatten(0, (len(embedding), count)).mean(dim=1), score


# Constructors by name of --reward-shaping. They take the untuned generator's scores [M] and embeddings [M,
# E], and the reward's temperature, if one was fitted.
SHAPINGS: dict[str, Callable[[torch.Tensor, torch.Tensor, float | None], Shaping]] = {
    "none": lambda scores, embeddings, temperature: Shaping(),
    "standardised": lambda scores, embeddings, temperature: Standardised(scores, temperature),
    "softplus": lambda scores, embeddings, temperature: NegativeSoftplus(),
    "reference": lambda scores, embeddings, temperature: ReferenceWins(embeddings),
}


def widened_quartiles(values: torch.Tensor) -> tuple[float, float]:
    """Return the quartiles, each moved outwards by 1.5 interquartile ranges (Tukey's fences)."""
    low, high = torch.quantile(values.float(), torch.tensor([0.25, 0.75], device=values.device)).tolist()
    return low - 1.5 * (high - low), high + 1.5 * (high - low)


def clip_bounds(spec: str, initial_shaped: torch.Tensor) -> tuple[float, float]:
    """Return the bounds of the trust region.

    Args:
        spec: value of --reward-clip. iqr: the quartiles, widened by 1.5 times their range.
        initial_shaped: [M], shaped rewards of the untuned generator.
    Raises: ValueError naming --reward-clip where LOW is not below HIGH.
    """
    if spec == "iqr":  # of the shaped rewards, not of the raw scores
        return widened_quartiles(initial_shaped)
    return clip_range(spec, lambda share: torch.quantile(initial_shaped.float(), share).item())


# The nose limit is a penalty on faces that come nearer to the frontal camera than any untuned face. A depth
# reward reads only one side of a head. The easiest way to a higher score is then a nose that grows towards
# the camera. The limit is the smallest depth of untuned faces. h and w are rows and columns of the window.


def floor_loss(depth: torch.Tensor, limit: float | torch.Tensor, violators: bool = False) -> torch.Tensor:
    """Return the mean of (limit - depth)+ over a window.

    Args:
        depth: [N, h, w], distance from the camera, world units.
        limit: smallest allowed depth.
        violators: take the mean over those pixels only that are nearer than the limit, as in the published
            method. A single pixel then counts as much as a thousand. 0 if there are none.
    Returns: [N], world units. Differentiable in depth.
    Deviates: the published code takes that mean over all samples of a batch together.
    """
    # How much nearer than the limit each pixel is; 0 where it is farther.
    missing = torch.relu(limit - depth).flatten(1)  # [N, h * w]
    # clamp_min covers the case without violators: 0 / 1.
    return missing.sum(dim=1) / (missing > 0).sum(dim=1).clamp_min(1) if violators else missing.mean(dim=1)


class NoseFloor(torch.nn.Module):
    """Smallest depth d* of untuned faces in the middle of the frontal depth map, and the penalty below it.

    Args:
        generator: the untuned generator.
        ws: its samples at truncation NOSE_PSI, [N, L, W].
        kind: one of NOSE_FLOORS, see `floor_loss`.
    """

    floor: torch.Tensor

    @torch.no_grad()
    def __init__(self, generator: Generator, ws: torch.Tensor, kind: str):
        super().__init__()
        self.kind = kind
        self._camera = window_camera(generator)
        # A buffer, so that a resumed run keeps the limit of the untuned generator.
        self.register_buffer(
            "floor", torch.stack([self._depth(generator.field(part)).amin() for part in ws.split(16)]).amin()
        )

    def _depth(self, field: Field) -> torch.Tensor:
        """Render the window's depth [N, h, w]."""
        # Fixed random numbers: neither the penalty nor the run's own random sequence may depend on the other.
        with fixed_draws():
            return field.render(self._camera, RenderOptions(resolution=SIDE)).depth[:, 0]

    def forward(self, field: Field) -> torch.Tensor:
        """Return the penalty [N] of samples."""
        return floor_loss(self._depth(field), self.floor, self.kind == "violators")


def window_camera(generator: Generator) -> torch.Tensor:
    """Return the label [1, 25] of a frontal camera that shows rows and columns 53 to 72 of 128."""
    # The pose sampler uses random numbers even though its standard deviations are 0.
    with fixed_draws():
        label = generator.cameras.label()
        scale = PIXELS / SIDE  # the window is a crop of SIDE of PIXELS pixels
    # Cropping an image rescales its intrinsics, since these are in units of the image.
    intrinsics = label[0, 16:25].view(3, 3)  # a view: the label itself is changed
    intrinsics[:2, :2] *= scale  # focal lengths and skew
    intrinsics[:2, 2] = (intrinsics[:2, 2] - FIRST / PIXELS) * scale
    return label


class RewardPhaseState(torch.nn.Module):
    """Part of the reward phase that checkpoints store.

    It consists of the frozen reference, the constants of the shaping, the clip bounds and the nose limit.
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
        # Part of the phase in checkpoints only; none of it is trained.
        self.eval().requires_grad_(False)


class RewardTerms:
    """Loss terms of the reward phase, Grlhf.

    Args:
        G: the generator that is tuned.
        G_ema: the pretrained moving average, which is copied and frozen as the reference.
        reward: frozen reward, already checked against the generator.
        config: settings of the reward phase.
    """

    def __init__(self, G: torch.nn.Module, G_ema: torch.nn.Module, reward: Reward, config: RewardConfig):
        # The same interface for all families of generators.
        self.generator = of(G)
        self.config = config
        self.reward = reward.eval().requires_grad_(False).arranged()
        # A copy: G_ema itself follows G during tuning.
        G_ref = copy.deepcopy(G_ema).eval().requires_grad_(False)
        self.reference = of(G_ref)
        # Grid of the density-consistency term, over the whole cube.
        self.cube = SlabSpec.of(self.generator.bounds, config.consistency_resolution)
        with torch.no_grad():
            shaping, bounds = self._calibrate()
            nose_limit = None
            if config.lambda_nose > 0:
                ws = ws_of_seeds(self.reference, CALIBRATION.all, NOSE_PSI, CUTOFF)
                nose_limit = NoseFloor(self.reference, ws, config.nose_floor).to(device_of(self.reference))
        self.state = RewardPhaseState(G_ref, shaping, bounds, nose_limit)

    def _calibrate(self) -> tuple[Shaping, tuple[float, float]]:
        """Fit the shaping and the clip bounds to samples of the untuned generator."""
        reference = self.reference
        network = self.reward.network
        observations = []
        device = device_of(reference)
        # Standardising has its own seeds. All of these seeds are held out from the rewards' training.
        seeds = STANDARDISATION.all if self.config.reward_shaping == "standardised" else CALIBRATION.all
        # 16 samples at a time, to bound the memory.
        for part in latents(seeds, reference.z_dim).to(device).split(16):
            ws = reference.mapping(part, camera(reference, n=len(part)), truncation_cutoff=CUTOFF)
            observations.append(self.reward.observation.observe(reference.field(ws)))
        embeddings = torch.cat([network.embed(part) for part in observations])
        self.initial_scores = torch.cat([network.score(part) for part in observations])
        temperature = self.reward.provenance.get("temperature")  # None for published rewards
        shaping = SHAPINGS[self.config.reward_shaping](self.initial_scores, embeddings, temperature).to(
            device
        )
        shaped_parts = [
            shaping(network, part, torch.arange(len(part), device=device))[0] for part in observations
        ]
        shaped = torch.cat(shaped_parts)
        low, high = clip_bounds(self.config.reward_clip, shaped)
        outside = ((shaped < low) | (shaped > high)).float().mean().item()
        # Neither case is an error: the run works, but hardly changes anything, or changes everything.
        if outside > MOSTLY:
            problem = f"{outside:.0%} of untuned scores lie outside {low:g}..{high:g} and give no gradient"
            warnings.warn(
                f"--reward-clip: {problem}. Use --reward-shaping=standardised, or other bounds.", stacklevel=2
            )
        if self.config.consistency_gate < 1 and not (shaped > high).any():
            problem = f"no untuned score lies above {high:g}, so no shape has the full consistency weight"
            warnings.warn(f"--consistency-gate: {problem}. Use e.g. --reward-clip=-10,q0.55.", stacklevel=2)
        return shaping, (low, high)

    def losses(self, batch: Batch) -> Iterator[Loss]:
        """Yield the reward term on the batch's latents, then the density terms on new latents.

        Each of the two runs backward on its own, so only one graph is in memory.
        """
        config = self.config
        ws = self.generator.mapping(
            batch.gen_z, batch.gen_c, truncation_psi=config.truncation_psi, truncation_cutoff=CUTOFF
        )
        # One synthesis: the reward and the nose limit read the same planes.
        field = self.generator.field(ws)
        observed = self.reward.observation.observe(field)
        shaped, score = self.state.shaping(self.reward.network, observed, batch.places)
        low, high = self.state.bounds.tolist()
        # clamp() has gradient 0 outside its bounds: the trust region.
        loss = -config.lambda_r * shaped.clamp(low, high)
        stats = {
            "RLHF/reward": score,
            "RLHF/shaped": shaped,
            # Share of samples outside the trust region, which get no gradient.
            "RLHF/clipped": ((shaped < low) | (shaped > high)).float(),
        }
        if self.state.nose_floor is not None:
            stats["RLHF/nose"] = self.state.nose_floor(field)
            loss = loss + config.lambda_nose * stats["RLHF/nose"]
        yield Loss(loss, {**stats, "Loss/Grlhf/reward": loss})
        # New latents: the consistency term has its own samples, with their own truncation.
        if any(getattr(config, weight) > 0 for weight in CONSISTENCY_TERMS):
            yield self._consistency_loss(torch.randn_like(batch.gen_z), batch.gen_c, batch.places)

    def _consistency_loss(self, z: torch.Tensor, c: torch.Tensor, places: torch.Tensor) -> Loss:
        """Return the loss [N] of the terms that compare densities with the reference's, for z [N, Z]."""
        config = self.config

        # The same latents go through both generators, each with its own mapping network.
        def field(generator: Generator) -> Field:
            return generator.field(
                generator.mapping(z, c, truncation_psi=config.consistency_psi, truncation_cutoff=CUTOFF)
            )

        sigma = field(self.generator).density_grid(self.cube)  # [N, D, H, W]
        with torch.no_grad():
            untuned = field(self.reference)  # no graph: the reference is a constant
            sigma_ref = untuned.density_grid(self.cube)
        stats: dict[str, torch.Tensor] = {}
        parts = []
        for name, (statistic, term) in CONSISTENCY_TERMS.items():
            weight = getattr(config, name)
            # The distance of lambda_sigma is logged at any weight, also at 0.
            if weight == 0 and name != "lambda_sigma":
                continue
            stats[statistic] = term(sigma, sigma_ref, self.generator.level)
            part = weight * stats[statistic]
            if name == "lambda_sigma" and config.consistency_gate < 1:
                stats["RLHF/consistency_weight"] = self._gate(untuned, places)
                part = part * stats["RLHF/consistency_weight"]
            parts.append(part)
        loss = functools.reduce(torch.add, parts)
        return Loss(loss, {**stats, "Loss/Grlhf/consistency": loss})

    @torch.no_grad()
    def _gate(self, untuned: Field, places: torch.Tensor) -> torch.Tensor:
        """Return the per-sample weight [N] of the density-consistency term.

        It is 1 for shapes that scored above the clip before tuning. The reward term gives these no gradient
        either.
        """
        # Scored with the same shaping and bounds as the tuned samples.
        shaped, _ = self.state.shaping(self.reward.network, self.reward.observation.observe(untuned), places)
        return torch.where(shaped > self.state.bounds[1], 1.0, self.config.consistency_gate)


def density_l1(sigma: torch.Tensor, sigma_ref: torch.Tensor, level: float | None = None) -> torch.Tensor:
    """Compute the mean absolute difference of raw densities (sigma-reward.md, section 4).

    Args:
        sigma, sigma_ref: [N, D, H, W].
        level: not used; part of the interface of `CONSISTENCY_TERMS`.
    Returns: [N]. Differentiable in sigma.
    """
    del level
    return (sigma - sigma_ref).abs().mean(dim=[1, 2, 3])


def front_growth(sigma: torch.Tensor, sigma_ref: torch.Tensor, level: float = 10.0) -> torch.Tensor:
    """Compute the mean positive growth of density in front of the reference surface.

    A voxel is in front of the surface if neither it nor any voxel between it and the camera side (+z) reaches
    `level` in the reference.

    Args:
        sigma, sigma_ref: [N, D, H, W] raw.
        level: raw density of the isosurface.
    Returns: [N]. Differentiable in sigma.
    """
    # Running maximum from the camera side, the last index along z, to the back.
    reached = (sigma_ref >= level).flip(1).cummax(dim=1).values.flip(1)
    front = ~reached
    growth = torch.relu(sigma - sigma_ref) * front
    # clamp_min: a reference that fills the cube's front face leaves no voxel in front.
    return growth.sum(dim=[1, 2, 3]) / front.sum(dim=[1, 2, 3]).clamp_min(1)


# Terms that compare densities with those of the untuned generator on the same
# samples. Name of the weight -> name of the statistic, and function from
# sigma, sigma_ref [N, D, H, W] and the raw density of the surface to [N].
CONSISTENCY_TERMS: dict[str, tuple[str, Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]]] = {
    "lambda_sigma": ("RLHF/consistency", density_l1),
    "lambda_front": ("RLHF/front_growth", front_growth),
}


def reward_phase(terms: RewardTerms, optimizer: torch.optim.Optimizer) -> Phase:
    """Return Grlhf as a further phase of the loop, in every iteration, with its own optimiser for G.

    A separate Adam divides the loss's scale out, so the reward's step does not depend on that of the
    adversarial loss.
    """
    return Phase(
        name="Grlhf",
        module=terms.generator.module,
        optimizer=optimizer,
        losses=terms.losses,
        state=terms.state,
        own_optimizer=True,
    )
