"""Shapley values of regions, exact or from sampled permutations (in antithetic pairs), and the methods that
they are compared with.

The value of a coalition of regions is the reward of the original slab with those regions replaced by the
tuned slab's. Both slabs are normalised already, each on its own scale; the mixture is not normalised again,
so that a voxel keeps its value.
Shapley (1953): phi_i = sum over coalitions S without i of |S|! (R - |S| - 1)! / R! (v(S + i) - v(S)).
Integrated Gradients run along the straight path from the original slab to the tuned one (Sundararajan et al.
2017):
IG = (x - x') * integral over a in [0, 1] of grad r(x' + a (x - x')); its sum is r(x) - r(x'), which is
checked.
Letters: N latents, K draws, M coalitions, R regions, P permutations, B slabs at once, V voxels, D, H, W = z,
y, x.
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch
from scipy.stats import kendalltau, spearmanr

from eg3d_rlhf.core.statistics import bootstrap_mean_interval
from eg3d_rlhf.evaluation.attribution.regions import MOST_EXACT, region_shape
from eg3d_rlhf.evaluation.attribution.settings import BOUND, MOST_STEPS, STEPS
from eg3d_rlhf.rewards.evaluation import Network

Score = Callable[[torch.Tensor], torch.Tensor]  # slabs [B, 1, D, H, W] -> rewards [B]
Value = Callable[[torch.Tensor], torch.Tensor]  # coalitions, bool [M, R] -> values [M] float64


class CoalitionValues:
    """Values of the coalitions of one latent; each is computed once, in batches.

    Args:
        score: the reward.
        original, tuned: the reward's input of one shape each, [1, D, H, W] for slabs.
        labels: int64, the region of each of its values, [D, H, W].
        regions: R.
        batch: slabs at once; it bounds the memory, B slabs and the reward's activations.
    """

    def __init__(
        self,
        score: Score,
        original: torch.Tensor,
        tuned: torch.Tensor,
        labels: torch.Tensor,
        regions: int,
        batch: int = 16,
    ):
        assert original.shape == tuned.shape and region_shape(original.shape) == tuple(labels.shape)
        self.score = score
        self.regions = regions
        self.batch = batch
        self.original = original
        self.tuned = tuned
        flat = labels.flatten().to(original.device)
        # flat voxel indices of each region
        self.voxels = [torch.nonzero(flat == region).squeeze(1) for region in range(regions)]
        # A region without any change is a null player: coalitions that differ in it alone have the same
        # value.
        self.differs = [bool((original.flatten()[v] != tuned.flatten()[v]).any()) for v in self.voxels]
        self.known: dict[int, float] = {}  # key of a coalition -> value
        self.evaluations = 0  # slabs that the reward has read so far

    def keys(self, coalitions: torch.Tensor) -> list[int]:
        """Encode each coalition as one integer.

        Regions in which the slabs are equal get no bit: they do not change the value.
        """
        weights = torch.tensor([1 << i if d else 0 for i, d in enumerate(self.differs)], dtype=torch.int64)
        return (coalitions.cpu().to(torch.int64) * weights).sum(dim=1).tolist()

    def mixed(self, keys: Sequence[int]) -> torch.Tensor:
        """Compose the slabs [B, 1, D, H, W] of coalitions.

        Neighbours in the list mostly share regions, so each slab starts as a copy of the previous one, and
        only the regions that differ are overwritten.
        """
        slabs = self.original.new_empty(len(keys), self.original.numel())
        sources = (self.original.flatten(), self.tuned.flatten())
        before = None
        last = None
        for row, key in zip(slabs, keys, strict=True):
            # The first slab has no predecessor: all of its regions are written.
            changed = list(range(self.regions))
            if last is not None:
                row.copy_(before)
                # XOR marks the regions in which this coalition differs from the previous one.
                changed = [i for i in changed if (last ^ key) >> i & 1]
            for i in changed:
                row[self.voxels[i]] = sources[key >> i & 1][self.voxels[i]]
            before = row
            last = key
        return slabs.reshape(len(keys), *self.original.shape)

    @torch.no_grad()
    def __call__(self, coalitions: torch.Tensor) -> torch.Tensor:
        """Compute the values [M] float64 of coalitions, bool [M, R]."""
        keys = self.keys(coalitions)
        # Gray code order: neighbours differ in few regions, which makes `mixed` cheap.
        todo = sorted({key for key in keys if key not in self.known}, key=_gray_rank)
        for start in range(0, len(todo), self.batch):
            part = todo[start : start + self.batch]
            values = self.score(self.mixed(part)).double().cpu().tolist()
            self.evaluations += len(part)
            self.known.update(zip(part, values, strict=True))
        return torch.tensor([self.known[key] for key in keys], dtype=torch.float64)

    @torch.no_grad()
    def difference(self) -> float:
        """Compute the reward of the tuned slab minus that of the original one, from the slabs alone.

        It uses no regions, masks or cache, so it checks the coalitions' values independently.
        """
        tuned, original = (float(self.score(slab[None]).double()) for slab in (self.tuned, self.original))
        return tuned - original


def _gray_rank(key: int) -> int:
    """Return the position of a bit pattern in the reflected Gray code, in which neighbours differ in one
    bit.
    """
    rank = 0
    # The inverse of k -> k ^ (k >> 1): the XOR of all right shifts.
    while key:
        rank ^= key
        key >>= 1
    return rank


def all_coalitions(regions: int) -> torch.Tensor:
    """Every coalition, bool [2^R, R]; row k holds the bits of k, the lowest first."""
    k = torch.arange(1 << regions)
    return (k[:, None] >> torch.arange(regions) & 1).bool()


@dataclass(frozen=True, kw_only=True)
class Attribution:
    """Contribution of each region to a reward difference."""

    method: str
    values: np.ndarray  # [R] float64, in units of the reward
    errors: np.ndarray | None = None  # [R] standard errors of sampling; None where nothing was sampled
    gap: float = 0.0  # sum of values - (r_tuned - r_original), the latter from the slabs themselves
    difference: float = 0.0  # r_tuned - r_original

    @property
    def relative_gap(self) -> float:
        """|gap| as a share of |difference|; infinite where the difference is 0 and the gap is not."""
        return relative_gap(self.gap, self.difference)


def relative_gap(gap: float, difference: float) -> float:
    """Return |gap| / |difference|; 0 if the gap is 0, infinite if only the difference is 0."""
    return 0.0 if gap == 0 else abs(gap) / abs(difference) if difference else math.inf


def exact(value: Value, regions: int) -> np.ndarray:
    """Compute Shapley values [R] from all 2^R coalitions. Raises: ValueError for more regions than
    MOST_EXACT.
    """
    if not 1 <= regions <= MOST_EXACT:
        raise ValueError(
            f"--method=exact: expected 1 to {MOST_EXACT} regions, got {regions}, for 2^{regions} evaluations."
            " Use --method=antithetic."
        )
    return exact_from_table(value(all_coalitions(regions)).numpy())


def exact_from_table(table: np.ndarray) -> np.ndarray:
    """Compute Shapley values [R] of a game given as the values [2^R] of all coalitions.

    Bit i of the index is set if player i takes part.
    """
    regions = len(table).bit_length() - 1
    index = np.arange(1 << regions)
    size = np.array([int(k).bit_count() for k in index])  # |S|
    # |S|! (R - |S| - 1)! / R! = 1 / (R * C(R - 1, |S|)); the full coalition has no player left to join it.
    weight = np.array([1 / (regions * math.comb(regions - 1, s)) if s < regions else 0.0 for s in size])
    out = np.empty(regions)
    for i in range(regions):
        without = index[(index >> i & 1) == 0]
        out[i] = np.sum(weight[without] * (table[without | 1 << i] - table[without]))
    return out


def sampled(
    value: Value, regions: int, samples: int, seed: int, antithetic: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Estimate Shapley values from `samples` random orders (Castro et al. 2009).

    Args: antithetic: orders in pairs, each with its reverse (Mitchell et al. 2022, section 4.1); the errors
        come from the pairs' means.
    Returns: means and standard errors [R] of the marginal contributions.
    """
    if antithetic and samples % 2:
        raise ValueError(
            f"--permutations: expected an even number of permutations for antithetic pairs, got {samples}."
            " Add one."
        )
    count = samples // 2 if antithetic else samples
    if count < 2:
        raise ValueError(
            f"--permutations: expected at least 2 permutations (4 for antithetic pairs), got {samples}."
            " Raise it: standard errors need at least two values."
        )
    rng = np.random.default_rng(seed)
    orders = np.stack([rng.permutation(regions) for _ in range(count)])
    # An order and its reverse are negatively correlated; their mean is one sample of lower variance.
    along = marginals(value, np.concatenate([orders, orders[:, ::-1]]) if antithetic else orders)  # [P, R]
    along = (along[:count] + along[count:]) / 2 if antithetic else along
    return along.mean(axis=0), along.std(axis=0, ddof=1) / math.sqrt(count)


def marginals(value: Value, orders: np.ndarray) -> np.ndarray:
    """Compute the contribution [P, R] of each region when it joins, along orders [P, R] of joining."""
    samples, regions = orders.shape
    joined = np.argsort(orders, axis=1)  # [P, R], the step at which each region joins
    steps = np.arange(regions + 1)
    # Before step t exactly the regions with a smaller step have joined.
    coalitions = joined[:, None, :] < steps[None, :, None]  # [P, R + 1, R]
    values = value(torch.from_numpy(coalitions.reshape(-1, regions))).numpy().reshape(samples, regions + 1)
    # Differences along an order, re-sorted by region
    return np.take_along_axis(np.diff(values, axis=1), joined, axis=1)


def shapley(
    value: Value, regions: int, difference: float, method: str = "exact", samples: int = 64, seed: int = 0
) -> Attribution:
    """Compute Shapley values by one of METHODS, with their efficiency gap.

    Args: difference: r_tuned - r_original, computed apart from the coalitions; samples: permutations of the
        sampled methods.
    """
    if method == "exact":
        values = exact(value, regions)
        errors = None
    else:
        values, errors = sampled(value, regions, samples, seed, method == "antithetic")
    return Attribution(
        method=method,
        values=values,
        errors=errors,
        gap=float(values.sum() - difference),
        difference=difference,
    )


def check_gap(attributions: Sequence[Attribution], seeds: Sequence[int], bound: float) -> None:
    """Raise ValueError if an efficiency gap is above `bound`, as a share of the reward difference.

    The error names the worst latent.
    """
    gaps = [a.relative_gap for a in attributions]
    worst = int(np.argmax(gaps))
    # `not <=` instead of `>`: a NaN gap is an error, too.
    if not gaps[worst] <= bound:
        a = attributions[worst]
        raise ValueError(
            f"--gap-bound: expected an efficiency gap of at most {bound:g} of the reward difference, got"
            f" {gaps[worst]:.3g} for seed {seeds[worst]} (sum {a.values.sum():.6g}, difference"
            f" {a.difference:.6g}). The attribution does not add up: raise the bound if the difference is"
            " almost zero, else leave that seed out with another --seed."
        )


# Methods that Shapley values are compared with: Integrated Gradients, occlusion, noise of the change's size,
# rewards with re-drawn weights.


@dataclass(frozen=True, kw_only=True)
class IntegratedGradients:
    """Attribution of every voxel, with its completeness gap."""

    # float64 on the CPU, in units of the reward; [D, H, W] for slabs, else the observation's `region_shape`
    voxels: torch.Tensor
    steps: int  # of the last integral
    gap: float  # sum of voxels - difference
    difference: float  # r_tuned - r_original
    tried: tuple[tuple[int, float], ...]  # (steps, gap as a share of the difference), in order

    @property
    def complete(self) -> bool:
        """Return True if the gap is at most BOUND of the difference."""
        return relative_gap(self.gap, self.difference) <= BOUND


def integrated_gradients(
    score: Score,
    original: torch.Tensor,
    tuned: torch.Tensor,
    difference: float,
    steps: int = STEPS,
    most_steps: int = MOST_STEPS,
    batch: int = 16,
) -> IntegratedGradients:
    """Attribute r(tuned) - r(original) to voxels; the step count doubles until the gap is within 1 % of the
    difference.

    Args: original, tuned: [1, D, H, W]; difference: computed from the slabs alone; batch: slabs with
        gradients at once.
    Returns: the integral with the most steps; `complete` is False if `most_steps` did not suffice.
    """
    # Imported here: captum is needed by this function alone.
    from captum.attr import IntegratedGradients as Captum

    method = Captum(score, multiply_by_inputs=True)
    tried = []
    while True:
        voxels = method.attribute(
            tuned[None],
            baselines=original[None],
            n_steps=steps,
            method="gausslegendre",
            # Captum evaluates the path's points in batches of this size.
            internal_batch_size=max(batch, 2),
        )
        voxels = voxels[0].reshape(region_shape(original.shape)).detach().double().cpu()
        # Completeness: the attributions sum to the difference, up to the quadrature's error.
        gap = float(voxels.sum()) - difference
        tried.append((steps, relative_gap(gap, difference)))
        if tried[-1][1] <= BOUND or 2 * steps > most_steps:
            return IntegratedGradients(
                voxels=voxels, steps=steps, gap=gap, difference=difference, tried=tuple(tried)
            )
        steps *= 2


def occlusion(value: Value, regions: int) -> np.ndarray:
    """Compute the loss of value when one region of the tuned slab is set back to the original, [R]: v(all) -
    v(all but i) (Zeiler and Fergus 2014).
    """
    # [R + 1, R]: row i leaves region i out, the last row leaves none out
    everything = torch.ones(regions + 1, regions, dtype=torch.bool)
    everything[torch.arange(regions), torch.arange(regions)] = False
    values = value(everything).numpy()
    return values[-1] - values[:-1]


def shuffled_change(
    original: torch.Tensor, tuned: torch.Tensor, labels: torch.Tensor, seed: int
) -> torch.Tensor:
    """Shuffle the change tuned - original [1, D, H, W] among the voxels of each region [D, H, W], and add it
    to the original.

    Regions and the amount of change in each stay, the spatial structure is lost. An attribution of this slab
    is the reward's response to noise of the same energy.
    """
    # On the CPU, so that the random permutation does not depend on the device.
    change = (tuned - original).flatten().cpu()
    flat = labels.flatten().cpu()
    out = torch.empty_like(change)
    generator = torch.Generator().manual_seed(seed)
    for region in range(int(flat.max()) + 1):
        voxels = torch.nonzero(flat == region).squeeze(1)
        out[voxels] = change[voxels[torch.randperm(len(voxels), generator=generator)]]
    return original + out.reshape(original.shape).to(original)


def rank_correlation(first: np.ndarray, second: np.ndarray, kind: str = "spearman") -> float | None:
    """Compute Spearman's rho or Kendall's tau-b of two attributions [R]; None if one is constant and has no
    ranks.
    """
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return None
    return float({"spearman": spearmanr, "kendall": kendalltau}[kind](first, second).statistic)


def agreement(methods: Mapping[str, np.ndarray]) -> list[dict]:
    """Compute the rank correlation of every pair of methods, each [N, R].

    Returns: per pair and kind: per-latent values, their mean with a bootstrap interval over latents, and the
    correlation of the mean attributions ("overall").
    """
    out = []
    for (first_name, a), (second_name, b) in combinations(methods.items(), 2):
        entry: dict = {"first": first_name, "second": second_name}
        for kind in ("spearman", "kendall"):
            per_latent = [rank_correlation(x, y, kind) for x, y in zip(a, b, strict=True)]
            # Constant attributions have no ranks and are left out of the mean.
            known = [v for v in per_latent if v is not None]
            mean = bootstrap_mean_interval(known)._asdict() if known else None
            entry[kind] = {
                "per_latent": per_latent,
                "mean": mean,
                "overall": rank_correlation(a.mean(axis=0), b.mean(axis=0), kind),
            }
        out.append(entry)
    return out


def redrawn(reward: Network, seed: int) -> Network:
    """Copy a reward and draw its parameters anew: normal, with each tensor's mean and standard deviation
    (Adebayo et al. 2018).

    Buffers (the slab's statistics) are kept, so that only the learned weights are lost, not the input's
    scale. A tensor of one entry gets a random sign.
    """
    other = copy.deepcopy(reward)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            # Drawn on the CPU, so that the weights do not depend on the device.
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            # One entry has no standard deviation.
            if parameter.numel() == 1:
                parameter.copy_(parameter.abs() * noise.sign())
            else:
                parameter.copy_(parameter.mean() + parameter.std() * noise)
    return other.eval().requires_grad_(False)
