"""The reward phase (Grlhf): L = -lambda_r mean clip(shape(r(o(G(z))))) + lambda_sigma mean h
|sigma_G - sigma_ref| (+ front growth).

o is what the reward observes, shape one of `SHAPINGS`, and the clip acts as a trust region. h is 1, and with
a gated anchor less for shapes that scored below the clip before tuning: what is good is held, what is not may
move.
Letters: N batch, M reference samples, E embedding; observed [N, ...] is what the reward reads; D, H, W grid
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

# of the published frontal map that the nose floor reads: its edge; rows and columns 53..72
PIXELS = 128
FIRST = 53
SIDE = 20
NOSE_PSI = 0.25  # truncation of the untuned samples that set the nose floor
CUTOFF = 14  # truncation cutoff of the method: all ws of the published backbone
MOSTLY = 0.5  # share of untuned scores outside the trust region from which the user is warned


class Shaping(torch.nn.Module):
    """Turns what a reward reads into the quantity that the reward phase maximises. This one is the score
    itself.
    """

    def forward(
        self, network: Network, observed: torch.Tensor, places: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """observed [N, ...], places [N] of the samples in the whole run -> shaped [N], raw score [N].
        Differentiable in observed.
        """
        del places
        score = network.score(observed)
        return self.shaped(score), score

    def shaped(self, score: torch.Tensor) -> torch.Tensor:
        return score


class Standardised(Shaping):
    """(r - mean) * scale over the initial samples, with scale = min(1 / max(std, 0.5 |mean|), 10)
    (sigma-reward.md, section 4).

    Where training fitted a temperature T, r / T is the log odds that a label falls so, and the scale is at
    most 1 / T: standardising may shrink log odds and never magnifies them. A reward that does not order its
    validation pairs has scores that hardly vary, or a large T; blown up to a deviation of 1 it would push
    every shape as hard as a reward that knows.
    """

    mean: torch.Tensor
    scale: torch.Tensor

    def __init__(self, initial_scores: torch.Tensor, temperature: float | None = None):
        """
        Args:
            initial_scores: [M] of the untuned generator; those beyond 1.5 interquartile ranges of the
                quartiles are left out.
            temperature: T; None where none was fitted, as in published rewards.
        """
        super().__init__()
        most = 10.0 if temperature is None else min(10.0, 1 / temperature)
        low, high = widened_quartiles(initial_scores)
        initial_scores = initial_scores[(initial_scores >= low) & (initial_scores <= high)]
        mean = initial_scores.mean()
        std = initial_scores.std()
        self.register_buffer("mean", mean)
        self.register_buffer(
            "scale", (1 / torch.maximum(std, 0.5 * mean.abs()).clamp_min(1e-8)).clamp_max(most)
        )

    def shaped(self, score: torch.Tensor) -> torch.Tensor:
        return (score - self.mean) * self.scale


class NegativeSoftplus(Shaping):
    """-softplus(-2 r): saturates for good samples, linear for bad ones."""

    def shaped(self, score: torch.Tensor) -> torch.Tensor:
        return -torch.nn.functional.softplus(-2 * score)


class ReferenceWins(Shaping):
    """Mean probability, by the pairs head, of winning against `comparisons` reference samples, in both
    orders.

    The references are embeddings of samples of the untuned generator. The run's sample i meets references
    i * comparisons, and those after it, cyclically: whichever rank or accumulation round it falls to.
    """

    references: torch.Tensor

    def __init__(self, references: torch.Tensor, comparisons: int = 4):
        super().__init__()
        self.comparisons = comparisons
        self.register_buffer("references", references)

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        drop_comparison_counter(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def forward(
        self, network: Network, observed: torch.Tensor, places: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        embedding = network.embed(observed)  # [N, E]
        score = network.score_embedding(embedding)
        count = self.comparisons
        # [N * count]
        index = (places[:, None] * count + torch.arange(count, device=places.device)).flatten() % len(
            self.references
        )
        # [N * count]
        margin = network.pair_margin(embedding.repeat_interleave(count, dim=0), self.references[index])
        return torch.sigmoid(margin).unflatten(0, (len(embedding), count)).mean(dim=1), score


SHAPINGS: dict[str, Callable[[torch.Tensor, torch.Tensor, float | None], Shaping]] = {
    # from the untuned generator's scores [M] and embeddings [M, E], and the reward's temperature, if one was
    # fitted
    "none": lambda scores, embeddings, temperature: Shaping(),
    "standardised": lambda scores, embeddings, temperature: Standardised(scores, temperature),
    "softplus": lambda scores, embeddings, temperature: NegativeSoftplus(),
    "reference": lambda scores, embeddings, temperature: ReferenceWins(embeddings),
}


def widened_quartiles(values: torch.Tensor) -> tuple[float, float]:
    low, high = torch.quantile(values.float(), torch.tensor([0.25, 0.75], device=values.device)).tolist()
    return low - 1.5 * (high - low), high + 1.5 * (high - low)


def clip_bounds(spec: str, initial_shaped: torch.Tensor) -> tuple[float, float]:
    """Bounds of the trust region from the untuned generator's shaped rewards [M]; iqr: their quartiles,
    widened by 1.5 times their range.

    Raises: ValueError naming --reward-clip where LOW is not below HIGH.
    """
    if spec == "iqr":
        return widened_quartiles(initial_shaped)
    return clip_range(spec, lambda share: torch.quantile(initial_shaped.float(), share).item())


# The nose floor: a penalty on faces that come nearer to the frontal camera than any untuned one does. A depth
# reward sees one side of a head, and a nose that grows towards the camera is the nearest way to a higher
# score. h, w: rows and columns of the window.


def floor_loss(depth: torch.Tensor, floor: float | torch.Tensor, violators: bool = False) -> torch.Tensor:
    """Mean of (floor - depth)+ over a window, [N, h, w] -> [N], world units. Differentiable in depth.

    Args: violators: the published mean, over those pixels alone that are nearer than the floor, so that one
    counts as much as a thousand; 0 where there are none.
    Deviates: published code takes that mean over all samples of a batch at once.
    """
    missing = torch.relu(floor - depth).flatten(1)  # [N, h * w]
    return missing.sum(dim=1) / (missing > 0).sum(dim=1).clamp_min(1) if violators else missing.mean(dim=1)


class NoseFloor(torch.nn.Module):
    """Least depth d* of untuned faces in the middle of the frontal map, and the loss below it.

    Args: generator: the untuned one; ws: its samples at NOSE_PSI, in batches [N, L, W]; kind: of NOSE_FLOORS,
        see `floor_loss`.
    """

    floor: torch.Tensor

    @torch.no_grad()
    def __init__(self, generator: Generator, ws: torch.Tensor, kind: str):
        super().__init__()
        self.kind = kind
        self._camera = window_camera(generator)
        self.register_buffer(
            "floor", torch.stack([self._depth(generator.field(part)).amin() for part in ws.split(16)]).amin()
        )

    def _depth(self, field: Field) -> torch.Tensor:
        with fixed_draws():
            return field.render(self._camera, RenderOptions(resolution=SIDE)).depth[:, 0]

    def forward(self, field: Field) -> torch.Tensor:
        return floor_loss(self._depth(field), self.floor, self.kind == "violators")


def window_camera(generator: Generator) -> torch.Tensor:
    """Label [1, 25] of a frontal camera whose pixels are rows and columns 53..72 of a picture of 128."""
    with fixed_draws():  # the pose sampler draws, though to no effect
        label = generator.cameras.label()
        scale = PIXELS / SIDE
    intrinsics = label[0, 16:25].view(3, 3)
    intrinsics[:2, :2] *= scale
    intrinsics[:2, 2] = (intrinsics[:2, 2] - FIRST / PIXELS) * scale
    return label


class RewardPhaseState(torch.nn.Module):
    """What the phase carries through a checkpoint: the frozen reference, the shaping's constants, the clip
    bounds, the nose floor.
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
        self.eval().requires_grad_(False)


class RewardTerms:
    """Losses of Grlhf.

    Args:
        G: the generator being tuned; G_ema: the pretrained moving average, copied and frozen as the
            reference.
        reward: frozen; it has been checked against the generator.
    """

    def __init__(self, G: torch.nn.Module, G_ema: torch.nn.Module, reward: Reward, config: RewardConfig):
        self.generator = of(G)
        self.config = config
        self.reward = reward.eval().requires_grad_(False).arranged()
        G_ref = copy.deepcopy(G_ema).eval().requires_grad_(False)
        self.reference = of(G_ref)
        self.cube = SlabSpec.of(self.generator.bounds, config.consistency_resolution)
        with torch.no_grad():
            shaping, bounds = self._calibrate()
            floor = None
            if config.lambda_nose > 0:
                ws = ws_of_seeds(self.reference, CALIBRATION.all, NOSE_PSI, CUTOFF)
                floor = NoseFloor(self.reference, ws, config.nose_floor).to(device_of(self.reference))
        self.state = RewardPhaseState(G_ref, shaping, bounds, floor)

    def _calibrate(self) -> tuple[Shaping, tuple[float, float]]:
        reference = self.reference
        network = self.reward.network
        seen = []
        device = device_of(reference)
        seeds = STANDARDISATION.all if self.config.reward_shaping == "standardised" else CALIBRATION.all
        for part in latents(seeds, reference.z_dim).to(device).split(16):
            ws = reference.mapping(part, camera(reference, n=len(part)), truncation_cutoff=CUTOFF)
            seen.append(self.reward.observation.observe(reference.field(ws)))
        embeddings = torch.cat([network.embed(s) for s in seen])
        self.initial_scores = torch.cat([network.score(s) for s in seen])
        temperature = self.reward.provenance.get("temperature")
        shaping = SHAPINGS[self.config.reward_shaping](self.initial_scores, embeddings, temperature).to(
            device
        )
        shaped = torch.cat([shaping(network, s, torch.arange(len(s), device=device))[0] for s in seen])
        low, high = clip_bounds(self.config.reward_clip, shaped)
        outside = ((shaped < low) | (shaped > high)).float().mean().item()
        if outside > MOSTLY:
            found = f"{outside:.0%} of untuned scores lie outside {low:g}..{high:g} and give no gradient"
            warnings.warn(
                f"--reward-clip: {found}. Use --reward-shaping=standardised, or other bounds.", stacklevel=2
            )
        if self.config.consistency_gate < 1 and not (shaped > high).any():
            found = f"no untuned score lies above {high:g}, so that no shape is held with full weight"
            warnings.warn(f"--consistency-gate: {found}. Use e.g. --reward-clip=-10,q0.55.", stacklevel=2)
        return shaping, (low, high)

    def losses(self, batch: Batch) -> Iterator[Loss]:
        """The reward on the batch's latents, then the anchors on fresh ones;
        each runs backward on its own.
        """
        config = self.config
        ws = self.generator.mapping(
            batch.gen_z, batch.gen_c, truncation_psi=config.truncation_psi, truncation_cutoff=CUTOFF
        )
        field = self.generator.field(ws)  # one synthesis for all that looks at it
        observed = self.reward.observation.observe(field)
        shaped, score = self.state.shaping(self.reward.network, observed, batch.places)
        low, high = self.state.bounds.tolist()
        loss = -config.lambda_r * shaped.clamp(low, high)
        stats = {
            "RLHF/reward": score,
            "RLHF/shaped": shaped,
            "RLHF/clipped": ((shaped < low) | (shaped > high)).float(),
        }
        if self.state.nose_floor is not None:
            stats["RLHF/nose"] = self.state.nose_floor(field)
            loss = loss + config.lambda_nose * stats["RLHF/nose"]
        yield Loss(loss, {**stats, "Loss/Grlhf/reward": loss})
        if any(getattr(config, weight) > 0 for weight in ANCHORS):
            yield self._anchors(torch.randn_like(batch.gen_z), batch.gen_c, batch.places)

    def _anchors(self, z: torch.Tensor, c: torch.Tensor, places: torch.Tensor) -> Loss:
        config = self.config

        def field(generator: Generator) -> Field:
            return generator.field(
                generator.mapping(z, c, truncation_psi=config.consistency_psi, truncation_cutoff=CUTOFF)
            )

        sigma = field(self.generator).density_grid(self.cube)
        with torch.no_grad():
            untuned = field(self.reference)
            sigma_ref = untuned.density_grid(self.cube)
        stats: dict[str, torch.Tensor] = {}
        parts = []
        for name, (statistic, term) in ANCHORS.items():
            weight = getattr(config, name)
            if weight == 0 and name != "lambda_sigma":  # whose distance is logged at any weight
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
        """Share [N] of the consistency weight: 1 for shapes that scored above the clip before tuning, which
        get no push either.
        """
        shaped, _ = self.state.shaping(self.reward.network, self.reward.observation.observe(untuned), places)
        return torch.where(shaped > self.state.bounds[1], 1.0, self.config.consistency_gate)


def density_l1(sigma: torch.Tensor, sigma_ref: torch.Tensor, level: float | None = None) -> torch.Tensor:
    """Compute the mean absolute difference of raw densities (sigma-reward.md, section 4).

    Args: sigma, sigma_ref: [N, D, H, W]; level: not used. Returns: [N].
    """
    del level
    return (sigma - sigma_ref).abs().mean(dim=[1, 2, 3])


def front_growth(sigma: torch.Tensor, sigma_ref: torch.Tensor, level: float = 10.0) -> torch.Tensor:
    """Mean positive growth of density in front of the reference surface.

    A voxel is in front where neither it nor any voxel between it and the camera side (+z) reaches `level` in
    the reference.

    Args:
        sigma, sigma_ref: [N, D, H, W] raw; level: isosurface level.
    Returns: [N]. Differentiable in sigma.
    """
    reached = (sigma_ref >= level).flip(1).cummax(dim=1).values.flip(1)
    front = ~reached
    growth = torch.relu(sigma - sigma_ref) * front
    return growth.sum(dim=[1, 2, 3]) / front.sum(dim=[1, 2, 3]).clamp_min(1)


# Terms that compare the density with the untuned generator's on the same samples: name of the weight ->
# statistic, and function of sigma, sigma_ref [N, D, H, W] and the raw density of the surface -> [N].
ANCHORS: dict[str, tuple[str, Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]]] = {
    "lambda_sigma": ("RLHF/consistency", density_l1),
    "lambda_front": ("RLHF/front_growth", front_growth),
}


def reward_phase(terms: RewardTerms, optimizer: torch.optim.Optimizer) -> Phase:
    """Grlhf as one more phase of the loop, every iteration, with its own optimizer on G."""
    return Phase(
        name="Grlhf",
        module=terms.generator.module,
        optimizer=optimizer,
        losses=terms.losses,
        state=terms.state,
        own_optimizer=True,
    )
