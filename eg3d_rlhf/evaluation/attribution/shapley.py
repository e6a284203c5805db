"""Compute Shapley values of regions, and the attribution methods that they are compared with.

A reward r scores the slab of a latent before tuning (the original slab x') and after tuning (the tuned slab
x). An attribution divides the difference r(x) - r(x') among the regions of the slab.

Shapley values are defined by coalitions, which are sets of regions. The value v(S) of a coalition S is the
reward of the original slab in which the regions of S are replaced by those of the tuned slab. Both slabs are
already normalised, each by its own range. The mixture is not normalised again, so that a voxel keeps its
value. The Shapley value of region i (Shapley 1953) is
    phi_i = sum over all S without i of |S|! (R - |S| - 1)! / R! * (v(S + i) - v(S)).
The values sum to r(x) - r(x') (efficiency). They are computed exactly from all coalitions, or estimated from
random orders in which the regions join the coalition.

Integrated Gradients (Sundararajan et al. 2017, arXiv 1703.01365, equation 1) attribute the difference to
single voxels, along the straight path from x' to x:
    IG = (x - x') * integral over a in [0, 1] of grad r(x' + a (x - x')).
Their sum is r(x) - r(x') as well (completeness), which is checked.

Shapes: N latents, M coalitions, R regions, P random orders, B slabs in a batch, D, H, W grid points of a slab
along z, y, x.
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
from eg3d_rlhf.evaluation.attribution.regions import MAX_EXACT_REGIONS, region_shape
from eg3d_rlhf.evaluation.attribution.settings import BOUND, MAX_STEPS, STEPS
from eg3d_rlhf.rewards.evaluation import Network

Score = Callable[[torch.Tensor], torch.Tensor]  # slabs [B, 1, D, H, W] -> rewards [B]
Value = Callable[[torch.Tensor], torch.Tensor]  # coalitions, bool [M, R] -> values [M] float64


class CoalitionValues:
    """Function that returns the values of a latent's coalitions. Each value is computed once, and stored.

    Args:
        score_slabs: function that scores slabs.
        original_slab: slab before tuning, [1, D, H, W], or another observation.
        tuned_slab: slab after tuning, of the same shape.
        region_labels: region of each voxel, int64 [D, H, W].
        region_count: number of regions, R.
        batch_size: number of slabs in a batch; a smaller number needs less memory.
    """

    def __init__(
        self,
        score_slabs: Score,
        original_slab: torch.Tensor,
        tuned_slab: torch.Tensor,
        region_labels: torch.Tensor,
        region_count: int,
        batch_size: int = 16,
    ):
        assert original_slab.shape == tuned_slab.shape and region_shape(original_slab.shape) == tuple(
            region_labels.shape
        )
        self.score = score_slabs
        self.regions = region_count
        self.batch = batch_size
        self.original = original_slab
        self.tuned = tuned_slab
        flat_labels = region_labels.flatten().to(original_slab.device)
        # indices of the voxels of each region in the flattened slab
        self.voxels = [
            torch.nonzero(flat_labels == region_index).squeeze(1) for region_index in range(region_count)
        ]
        # A region in which the slabs are equal does not change the value of any coalition.
        self.differs = [
            bool((original_slab.flatten()[indices] != tuned_slab.flatten()[indices]).any())
            for indices in self.voxels
        ]
        self.known: dict[int, float] = {}  # key of a coalition -> its value
        self.evaluations = 0  # number of slabs that were scored

    def keys(self, coalitions: torch.Tensor) -> list[int]:
        """Encode coalitions, bool [M, R], as integers. Bit i is set if region i belongs to the coalition.

        Regions in which the slabs are equal get no bit, since they do not change the value.
        """
        bit_weights = torch.tensor(
            [1 << region_index if has_change else 0 for region_index, has_change in enumerate(self.differs)],
            dtype=torch.int64,
        )
        return (coalitions.cpu().to(torch.int64) * bit_weights).sum(dim=1).tolist()

    def compose_slabs(self, coalition_keys: Sequence[int]) -> torch.Tensor:
        """Return the slabs [B, 1, D, H, W] of coalitions, which are given by their keys.

        Consecutive coalitions mostly share regions. So each slab is a copy of the previous one, in which only
        the regions that differ are replaced.
        """
        slabs = self.original.new_empty(len(coalition_keys), self.original.numel())  # [B, voxels], flattened
        flat_slabs = (self.original.flatten(), self.tuned.flatten())
        previous_row = None
        previous_key = None
        for slab_row, coalition_key in zip(slabs, coalition_keys, strict=True):
            # All regions of the first slab are written, since there is no previous slab.
            changed_regions = list(range(self.regions))
            if previous_key is not None:
                slab_row.copy_(previous_row)
                # The bits of the exclusive or are the regions in which the two coalitions differ.
                changed_regions = [
                    region_index
                    for region_index in changed_regions
                    if (previous_key ^ coalition_key) >> region_index & 1
                ]
            for region_index in changed_regions:
                slab_row[self.voxels[region_index]] = flat_slabs[coalition_key >> region_index & 1][
                    self.voxels[region_index]
                ]
            previous_row = slab_row
            previous_key = coalition_key
        return slabs.reshape(len(coalition_keys), *self.original.shape)

    @torch.no_grad()
    def __call__(self, coalitions: torch.Tensor) -> torch.Tensor:
        """Compute the values [M] float64 of coalitions, bool [M, R]."""
        coalition_keys = self.keys(coalitions)
        # In Gray code order, consecutive coalitions differ in few regions, which makes `compose_slabs` cheap.
        missing_keys = sorted(
            {coalition_key for coalition_key in coalition_keys if coalition_key not in self.known},
            key=_gray_rank,
        )
        for start in range(0, len(missing_keys), self.batch):
            batch_keys = missing_keys[start : start + self.batch]
            batch_values = self.score(self.compose_slabs(batch_keys)).double().cpu().tolist()
            self.evaluations += len(batch_keys)
            self.known.update(zip(batch_keys, batch_values, strict=True))
        return torch.tensor(
            [self.known[coalition_key] for coalition_key in coalition_keys], dtype=torch.float64
        )

    @torch.no_grad()
    def difference(self) -> float:
        """Return r(tuned) - r(original), computed without coalitions.

        This value uses neither regions nor stored values, so it is an independent check of the coalitions'
        values.
        """
        tuned_score, original_score = (
            float(self.score(slab[None]).double()) for slab in (self.tuned, self.original)
        )
        return tuned_score - original_score


def _gray_rank(bit_pattern: int) -> int:
    """Return the position of a bit pattern in the reflected Gray code.

    Consecutive patterns of this code differ in one bit.
    """
    gray_rank = 0
    # The Gray code of k is k ^ (k >> 1). Its inverse is the exclusive or of all right shifts.
    while bit_pattern:
        gray_rank ^= bit_pattern
        bit_pattern >>= 1
    return gray_rank


def all_coalitions(region_count: int) -> torch.Tensor:
    """Return every coalition of R regions, bool [2^R, R]. Row k holds the bits of k, the lowest bit first."""
    coalition_keys = torch.arange(1 << region_count)  # [2^R]
    return (coalition_keys[:, None] >> torch.arange(region_count) & 1).bool()


@dataclass(frozen=True, kw_only=True)
class Attribution:
    """Contribution of each region to the reward difference r_tuned - r_original of a latent."""

    method: str  # one of METHODS
    values: np.ndarray  # [R] float64, in units of the reward
    errors: np.ndarray | None = None  # [R] standard errors of sampling; None for the exact method
    gap: float = 0.0  # efficiency gap: sum of `values` - `difference`
    difference: float = 0.0  # r_tuned - r_original, computed without coalitions

    @property
    def relative_gap(self) -> float:
        """Return the efficiency gap as a share of the reward difference, see the function `relative_gap`."""
        return relative_gap(self.gap, self.difference)


def relative_gap(gap: float, difference: float) -> float:
    """Compute |gap| / |difference|. The result is 0 if the gap is 0, and infinite if only the difference is
    0.
    """
    return 0.0 if gap == 0 else abs(gap) / abs(difference) if difference else math.inf


def exact(coalition_values: Value, region_count: int) -> np.ndarray:
    """Compute Shapley values [R] from all 2^R coalitions.

    Args:
        coalition_values: function that returns the values of coalitions.
        region_count: number of regions, R.
    Raises: ValueError if there are more than MAX_EXACT_REGIONS regions.
    """
    if not 1 <= region_count <= MAX_EXACT_REGIONS:
        raise ValueError(
            f"--method=exact needs 2^R evaluations for R regions, so it is limited to {MAX_EXACT_REGIONS}"
            f" regions, but there are {region_count}. Use --method=antithetic."
        )
    return exact_from_table(coalition_values(all_coalitions(region_count)).numpy())


def exact_from_table(coalition_values: np.ndarray) -> np.ndarray:
    """Compute Shapley values [R] from the values of all coalitions.

    Args: coalition_values: values [2^R]; bit i of an index is set if region i belongs to the coalition.
    """
    region_count = len(coalition_values).bit_length() - 1  # the table has 2^R entries
    coalition_keys = np.arange(1 << region_count)  # [2^R]
    coalition_sizes = np.array([int(coalition_key).bit_count() for coalition_key in coalition_keys])  # |S|
    # |S|! (R - |S| - 1)! / R! = 1 / (R * C(R - 1, |S|)). No region can join the coalition of all regions, so
    # its weight is not used.
    weight_by_coalition = np.array(
        [
            1 / (region_count * math.comb(region_count - 1, joined_count))
            if joined_count < region_count
            else 0.0
            for joined_count in coalition_sizes
        ]
    )
    shapley_values = np.empty(region_count)  # [R]
    for joining_region in range(region_count):
        coalitions_without = coalition_keys[(coalition_keys >> joining_region & 1) == 0]
        # coalition | 1 << region: the same coalition after the region has joined
        shapley_values[joining_region] = np.sum(
            weight_by_coalition[coalitions_without]
            * (
                coalition_values[coalitions_without | 1 << joining_region]
                - coalition_values[coalitions_without]
            )
        )
    return shapley_values


def estimate_by_sampling(
    coalition_values: Value, region_count: int, order_count: int, seed: int, antithetic: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Estimate Shapley values from random orders of the regions (Castro et al. 2009).

    Args:
        coalition_values: function that returns the values of coalitions.
        region_count: number of regions, R.
        order_count: number of random orders.
        seed: seed of the orders.
        antithetic: False if all orders are random. True if half of the orders are random and the other half
            are their reverses (Mitchell et al. 2022, section 4.1). Standard errors are then computed from the
            means of the pairs.

    Returns: means [R] and standard errors [R] of the marginal contributions.
    Raises: ValueError for too few orders, or an odd number of antithetic orders.
    """
    if antithetic and order_count % 2:
        raise ValueError(
            f"--permutations={order_count}: antithetic orders come in pairs, so their number must be even."
            f" Pass --permutations={order_count + 1}."
        )
    sample_count = order_count // 2 if antithetic else order_count
    if sample_count < 2:
        raise ValueError(
            f"--permutations={order_count} is too small: standard errors need at least 2 orders, or 4"
            " antithetic ones. Raise --permutations."
        )
    rng = np.random.default_rng(seed)
    orders = np.stack([rng.permutation(region_count) for _ in range(sample_count)])  # [samples, R]
    # The contributions along an order and its reverse are negatively correlated, so their mean is a single
    # sample of lower variance.
    # [P, R]
    contributions = marginals(
        coalition_values, np.concatenate([orders, orders[:, ::-1]]) if antithetic else orders
    )
    contributions = (
        (contributions[:sample_count] + contributions[sample_count:]) / 2 if antithetic else contributions
    )
    return contributions.mean(axis=0), contributions.std(axis=0, ddof=1) / math.sqrt(sample_count)


def marginals(coalition_values: Value, orders: np.ndarray) -> np.ndarray:
    """Compute by how much each region changes the coalition's value when it joins, along several orders.

    Args:
        coalition_values: function that returns the values of coalitions.
        orders: permutations of the regions, [P, R]. The regions of a row join the coalition in this order.
    Returns: contributions [P, R]; column i belongs to region i.
    """
    order_count, region_count = orders.shape
    joining_step = np.argsort(orders, axis=1)  # [P, R], the step at which each region joins
    joined_counts = np.arange(region_count + 1)  # number of regions that have joined
    # Before step t, the regions whose joining step is smaller than t belong to the coalition.
    coalitions = joining_step[:, None, :] < joined_counts[None, :, None]  # [P, R + 1, R]
    values_along_orders = (
        coalition_values(torch.from_numpy(coalitions.reshape(-1, region_count)))
        .numpy()
        .reshape(order_count, region_count + 1)
    )
    # np.diff gives the contributions in the order of joining; they are sorted by region.
    return np.take_along_axis(np.diff(values_along_orders, axis=1), joining_step, axis=1)


def shapley(
    coalition_values: Value,
    region_count: int,
    difference: float,
    method: str = "exact",
    order_count: int = 64,
    seed: int = 0,
) -> Attribution:
    """Compute Shapley values by one of the three METHODS ("exact", "permutation", "antithetic"), with their
    efficiency gap.

    Args:
        coalition_values: function that returns the values of coalitions.
        region_count: number of regions, R.
        difference: r_tuned - r_original, computed without coalitions.
        method: one of METHODS.
        order_count: number of random orders of the sampled methods.
        seed: seed of the random orders.
    """
    if method == "exact":
        shapley_values = exact(coalition_values, region_count)
        standard_errors = None
    else:
        shapley_values, standard_errors = estimate_by_sampling(
            coalition_values, region_count, order_count, seed, method == "antithetic"
        )
    return Attribution(
        method=method,
        values=shapley_values,
        errors=standard_errors,
        gap=float(shapley_values.sum() - difference),
        difference=difference,
    )


def check_gap(attributions: Sequence[Attribution], seeds: Sequence[int], max_gap: float) -> None:
    """Raise ValueError if the efficiency gap of a latent exceeds `max_gap`, a share of its reward difference.

    The message states the seed of the latent with the largest gap.

    Args:
        attributions: Shapley values of each latent.
        seeds: seeds of the latents, for the message.
        max_gap: largest allowed |gap| / |difference|.
    """
    relative_gaps = [attribution.relative_gap for attribution in attributions]
    worst_index = int(np.argmax(relative_gaps))  # index of the latent
    # "not <=" is used instead of ">", so that NaN is an error, too.
    if not relative_gaps[worst_index] <= max_gap:
        worst_attribution = attributions[worst_index]
        raise ValueError(
            f"--gap-bound={max_gap:g}: the Shapley values of seed {seeds[worst_index]} sum to"
            f" {worst_attribution.values.sum():.6g}, but its reward difference is"
            f" {worst_attribution.difference:.6g}, which is a gap of {relative_gaps[worst_index]:.3g}. Raise"
            " --gap-bound if the difference is almost zero, else use other latents with another --seed."
        )


# Methods with which Shapley values are compared: Integrated Gradients, occlusion, slabs whose change is
# shuffled, and rewards with random weights.


@dataclass(frozen=True, kw_only=True)
class IntegratedGradients:
    """Attribution of a latent's reward difference to every voxel, with its completeness gap."""

    # float64 on the CPU, in units of the reward; [D, H, W] for slabs, else the observation's `region_shape`
    voxels: torch.Tensor
    steps: int  # number of steps of the integral
    gap: float  # sum of `voxels` - `difference`
    difference: float  # r_tuned - r_original
    # (number of steps, gap as a share of the difference) of all integrals that were computed, in order
    tried: tuple[tuple[int, float], ...]

    @property
    def complete(self) -> bool:
        """Return True if the gap is at most the share BOUND of the difference."""
        return relative_gap(self.gap, self.difference) <= BOUND


def integrated_gradients(
    score_slabs: Score,
    original_slab: torch.Tensor,
    tuned_slab: torch.Tensor,
    difference: float,
    step_count: int = STEPS,
    max_step_count: int = MAX_STEPS,
    batch_size: int = 16,
) -> IntegratedGradients:
    """Attribute r(tuned) - r(original) to voxels by Integrated Gradients.

    The number of steps of the integral is doubled until the completeness gap is at most the share BOUND of
    the difference.

    Args:
        score_slabs: function that scores slabs; it must be differentiable.
        original_slab: slab before tuning, [1, D, H, W].
        tuned_slab: slab after tuning, [1, D, H, W].
        difference: r(tuned) - r(original).
        step_count: first number of steps.
        max_step_count: largest number of steps.
        batch_size: number of slabs in a batch, for which gradients are computed.

    Returns: the integral with the most steps. It is not `complete` if `max_step_count` is too small.
    """
    # Imported here, since only this function needs captum.
    from captum.attr import IntegratedGradients as Captum

    captum_method = Captum(score_slabs, multiply_by_inputs=True)
    gap_by_steps = []  # (steps, relative gap) of each integral
    while True:
        voxel_attributions = captum_method.attribute(
            tuned_slab[None],
            baselines=original_slab[None],
            n_steps=step_count,
            method="gausslegendre",
            # Captum evaluates the points of the path in batches of this size.
            internal_batch_size=max(batch_size, 2),
        )
        voxel_attributions = (
            voxel_attributions[0].reshape(region_shape(original_slab.shape)).detach().double().cpu()
        )  # [0]: the only slab
        # Completeness: the attributions sum to the difference, except for the error of the numeric integral.
        gap = float(voxel_attributions.sum()) - difference
        gap_by_steps.append((step_count, relative_gap(gap, difference)))
        # The last entry is the integral that was just computed.
        if gap_by_steps[-1][1] <= BOUND or 2 * step_count > max_step_count:
            return IntegratedGradients(
                voxels=voxel_attributions,
                steps=step_count,
                gap=gap,
                difference=difference,
                tried=tuple(gap_by_steps),
            )
        step_count *= 2


def occlusion(coalition_values: Value, region_count: int) -> np.ndarray:
    """Compute by how much the reward falls if one region of the tuned slab is set back to the original slab,
    [R].

    The attribution of region i is v(all regions) - v(all but i) (occlusion, Zeiler and Fergus 2014), where v
    is `coalition_values`.

    Args:
        coalition_values: function that returns the values of coalitions.
        region_count: number of regions, R.
    """
    # [R + 1, R]: row i contains all regions but i; the last row contains all regions.
    coalitions = torch.ones(region_count + 1, region_count, dtype=torch.bool)
    coalitions[torch.arange(region_count), torch.arange(region_count)] = False
    reward_values = coalition_values(coalitions).numpy()  # [R + 1]
    return reward_values[-1] - reward_values[:-1]


def shuffled_change(
    original_slab: torch.Tensor, tuned_slab: torch.Tensor, region_labels: torch.Tensor, seed: int
) -> torch.Tensor:
    """Return the original slab plus the change tuned - original, shuffled among the voxels of each region.

    Each region has the same changes as before, but at other positions, so the spatial structure is lost. An
    attribution of this slab shows the reward's response to noise of the same size.

    Args:
        original_slab, tuned_slab: slabs, [1, D, H, W].
        region_labels: region of each voxel, [D, H, W].
        seed: seed of the shuffling.
    """
    # The shuffling is done on the CPU, so that it does not depend on the device.
    slab_change = (tuned_slab - original_slab).flatten().cpu()
    flat_labels = region_labels.flatten().cpu()  # [voxels]
    shuffled_slab_change = torch.empty_like(slab_change)
    generator = torch.Generator().manual_seed(seed)
    for region_index in range(int(flat_labels.max()) + 1):
        voxel_indices = torch.nonzero(flat_labels == region_index).squeeze(1)
        shuffled_slab_change[voxel_indices] = slab_change[
            voxel_indices[torch.randperm(len(voxel_indices), generator=generator)]
        ]
    return original_slab + shuffled_slab_change.reshape(original_slab.shape).to(original_slab)


def rank_correlation(
    first_values: np.ndarray, second_values: np.ndarray, correlation_kind: str = "spearman"
) -> float | None:
    """Compute Spearman's rho or Kendall's tau-b of two attributions [R].

    Return None if all values of one attribution are equal, since it has no ranks then.
    Args: correlation_kind: "spearman" or "kendall".
    """
    if np.ptp(first_values) == 0 or np.ptp(second_values) == 0:
        return None
    return float(
        {"spearman": spearmanr, "kendall": kendalltau}[correlation_kind](
            first_values, second_values
        ).statistic
    )


def agreement(attributions_by_method: Mapping[str, np.ndarray]) -> list[dict]:
    """Compute the rank correlations of every pair of methods.

    Args: attributions_by_method: attributions [N, R] by each method.
    Returns: for each pair and each kind of correlation the values by latent ("per_latent"), their mean with a
        bootstrap interval over latents ("mean"), and the correlation of the attributions' means over latents
        ("overall").
    """
    correlations = []
    for (first_name, first_values), (second_name, second_values) in combinations(
        attributions_by_method.items(), 2
    ):
        pair_correlations: dict = {"first": first_name, "second": second_name}
        for correlation_kind in ("spearman", "kendall"):
            per_latent = [
                rank_correlation(first_ranked, second_ranked, correlation_kind)
                for first_ranked, second_ranked in zip(first_values, second_values, strict=True)
            ]
            # Latents without a correlation are left out of the mean.
            defined_correlations = [correlation for correlation in per_latent if correlation is not None]
            mean_interval = (
                bootstrap_mean_interval(defined_correlations)._asdict() if defined_correlations else None
            )
            pair_correlations[correlation_kind] = {
                "per_latent": per_latent,
                "mean": mean_interval,
                "overall": rank_correlation(
                    first_values.mean(axis=0), second_values.mean(axis=0), correlation_kind
                ),
            }
        correlations.append(pair_correlations)
    return correlations


def randomise_weights(network: Network, seed: int) -> Network:
    """Return a copy of a reward with random weights, as a control for attributions (Adebayo et al. 2018).

    The weights are normal, with the mean and the standard deviation of each tensor. A tensor with a single
    entry gets a random sign instead. Buffers, which hold the statistics of the input, are not changed.

    Args:
        network: network of the reward, which is not changed.
        seed: seed of the random weights.
    """
    randomised_reward = copy.deepcopy(network)
    generator = torch.Generator().manual_seed(seed)  # does not change the global random state
    with torch.no_grad():
        for parameter in randomised_reward.parameters():
            # Sampled on the CPU, so that the weights do not depend on the device.
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            # A single entry has no standard deviation.
            if parameter.numel() == 1:
                parameter.copy_(parameter.abs() * noise.sign())
            else:
                parameter.copy_(parameter.mean() + parameter.std() * noise)
    return randomised_reward.eval().requires_grad_(False)
