"""Compute the direct preference optimisation (DPO) loss of one stage: sample times and noises for a batch of
pairs, compute the margin and the loss, and sum the metrics that are logged.

The implicit reward of a flow is the drop of its flow-matching error against a frozen reference
(Wallace et al. 2023, equation 14; Circular-DPO, equations 6 and 7).

Shapes: N samples, V voxels and C channels, as in models/sparse.py; P pairs.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from eg3d_rlhf.models.sparse import Batch, collate, coords_of
from eg3d_rlhf.preferences.losses import preference_loss
from eg3d_rlhf.tuning.flow.base.conditioning import Condition, rows, to_device, twice, where
from eg3d_rlhf.tuning.flow.base.pairs import PreferencePair
from eg3d_rlhf.tuning.flow.base.stage import FlowStage
from eg3d_rlhf.tuning.flow.training.settings import DpoConfig
from training.phases import derive_seed

TIME_BINS = 10  # number of time bins of equal width on 0..1, for the logged metrics
# Names of the metrics that are summed over the pairs of each time bin. "w" and "l" in the keys stand for the
# preferred (winner) and the rejected (loser) sample.
BINNED = ("pairs", "implicit_accuracy", "margin", "w_diff", "l_diff")


@dataclass(frozen=True, kw_only=True)
class PairDraw:
    """A batch of P pairs with a time and a noise for each pair.

    The P preferred samples come first, then the P rejected ones in the same order.
    """

    x_0: Batch  # 2P samples
    eps: Batch  # 2P noises; both samples of a pair have the same noise
    x_t: Batch  # 2P mixtures of x_0 and eps at time t
    t: torch.Tensor  # [2P] in 0..1; both samples of a pair have the same time
    cond: Condition  # 2P rows
    weight: torch.Tensor | None  # [P], w2 of the pairs (loop_pairs.py); None: all pairs count alike


def draw_pairs(
    stage: FlowStage,
    pairs: Sequence[PreferencePair],
    cond: Condition,
    no_cond: Condition | None,
    config: DpoConfig,
    seed: int,
    epoch: int,
    device: torch.device | str = "cpu",
) -> PairDraw:
    """Sample a time and a noise for each pair, and drop the conditioning of some pairs.

    Every random number depends on (seed, id of the pair, epoch) alone and is generated on the CPU. The result
    is therefore the same in every batch and on every device.

    Args:
        stage: stage that all pairs belong to.
        pairs: the P pairs.
        cond: conditioning of the pairs, P rows.
        no_cond: empty conditioning, P rows or 1; read only if config.condition_dropout is above 0.
        config: settings of the loss; only the dropout of the conditioning is read.
        seed: seed of all random numbers.
        epoch: number of the pass over the data; every epoch has other times and noises.
        device: device of the result.

    Raises: ValueError if some pairs have a weight w2 (see circular/loop_pairs.py) and others have none.
    """
    assert all(p.stage == stage.name for p in pairs) and rows(cond) == len(pairs)
    latents = [p.preferred for p in pairs] + [p.rejected for p in pairs]
    x_0 = collate(latents)
    seeds = [derive_seed(seed, p.id, epoch, "noise") for p in pairs]
    # the same seeds twice: both samples of a pair share their noise, so that it cancels in the margin
    eps = stage.noise(seeds + seeds, coords_of(latents))
    # one time for each pair, [P]
    pair_times = torch.cat([stage.path.times(1, _generator(seed, p, epoch, "time")) for p in pairs])
    t = pair_times.repeat(2).to(device)  # [2P], in the order of x_0
    x_0 = x_0.to(device)
    eps = eps.to(device)
    cond = to_device(cond, device)
    if config.condition_dropout:
        assert no_cond is not None
        # [P] in 0..1; one number a pair, since both samples of a pair share their conditioning
        uniform_numbers = torch.stack(
            [torch.rand([], generator=_generator(seed, p, epoch, "condition")) for p in pairs]
        )
        cond = where(uniform_numbers < config.condition_dropout, no_cond, cond)
    has_weight = [p.w2 is not None for p in pairs]
    weight = None
    if any(has_weight):
        # a missing weight must not silently count as 1: w2 has mean 1 over the set that it was made for
        if not all(has_weight):
            unweighted_id = pairs[has_weight.index(False)].id
            raise ValueError(
                f"draw_pairs: pair {unweighted_id} has no weight w2, but other pairs have one. Give all pairs"
                " a weight (loop_pairs.weigh), or give none of them one."
            )
        weight = torch.tensor([p.w2 for p in pairs], device=device)
    # `twice` repeats the conditioning: P rows -> 2P rows
    return PairDraw(x_0=x_0, eps=eps, x_t=stage.path.mix(x_0, t, eps), t=t, cond=twice(cond), weight=weight)


def _generator(seed: int, pair: PreferencePair, epoch: int, stream_name: str) -> torch.Generator:
    # each use has its own random stream, so that a further use does not change the numbers of the others
    return torch.Generator().manual_seed(derive_seed(seed, pair.id, epoch, stream_name))


@dataclass(frozen=True, kw_only=True)
class PairErrors:
    """Flow-matching errors of a batch of pairs, averaged over the elements of each sample, [P] each.

    The errors of the reference carry no gradient. They are None for a loss without a reference.
    """

    preferred: torch.Tensor
    rejected: torch.Tensor
    ref_preferred: torch.Tensor | None = None
    ref_rejected: torch.Tensor | None = None

    @classmethod
    def split(cls, errors: torch.Tensor, ref_errors: torch.Tensor | None = None) -> "PairErrors":
        """Split errors [2P] into those of the P preferred and of the P rejected samples.

        Args:
            errors: errors of the policy [2P], in the order of a PairDraw.
            ref_errors: errors of the reference [2P] in the same order; None for a loss without a reference.
        """
        preferred_errors, rejected_errors = errors.chunk(2)
        if ref_errors is None:
            return cls(preferred=preferred_errors, rejected=rejected_errors)
        # detached: the reference must never receive a gradient
        ref_preferred, ref_rejected = ref_errors.detach().chunk(2)
        return cls(
            preferred=preferred_errors,
            rejected=rejected_errors,
            ref_preferred=ref_preferred,
            ref_rejected=ref_rejected,
        )

    def delta(self, loser_weight: float = 1.0) -> torch.Tensor:
        """Compute the margin (e_ref - e)_preferred - loser_weight (e_ref - e)_rejected of each pair, [P].

        Here e is the error of the policy and e_ref that of the reference. The margin is positive where the
        policy's error fell more on the preferred sample than on the rejected one.
        Differentiable in: the policy's errors.
        """
        assert self.ref_preferred is not None and self.ref_rejected is not None
        return (self.ref_preferred - self.preferred) - loser_weight * (self.ref_rejected - self.rejected)


def pair_loss(errors: PairErrors, config: DpoConfig, weight: torch.Tensor | None = None) -> torch.Tensor:
    """Compute the loss of each pair, [P].

    The kind "sigmoid" is preference_loss of the margin (Circular-DPO, equations 6 and 7). With e the errors,
    "sft" is e_preferred and "dro" is e_preferred - loser_weight e_rejected (both from DSO, Li et al. 2025);
    the weight of the pair multiplies them. sft_weight times e_preferred is added to every kind. The weight of
    the pair does not multiply this added term, which keeps the policy close to the preferred samples.
    Differentiable in: errors, weight.

    Args:
        errors: flow-matching errors of the pairs.
        config: settings of the loss.
        weight: w2 of the pairs, [P]; None: all pairs count alike.
    """
    if config.needs_reference:
        loss = preference_loss(errors.delta(config.loser_weight), config.beta, weight)
    else:
        loss = errors.preferred
        if config.kind == "dro":
            # unbounded below: the rejected error may grow without end (train_stage warns)
            loss = errors.preferred - config.loser_weight * errors.rejected
        if weight is not None:
            loss = weight * loss
    if config.sft_weight:
        loss = loss + config.sft_weight * errors.preferred
    return loss


def pair_stats(errors: PairErrors, delta: torch.Tensor, t: torch.Tensor) -> dict[str, torch.Tensor]:
    """Sum the logged metrics of a batch over the pairs of each time bin, [TIME_BINS] each, by name.

    The values are sums and not means, so that those of passes and ranks can be added. The names are in
    BINNED. implicit_accuracy counts 1 for a positive margin and one half for a margin of 0. w_diff and l_diff
    are the policy's error minus the reference's, of the preferred and of the rejected sample. Not
    differentiable.

    Args:
        errors: flow-matching errors of the pairs, with those of the reference.
        delta: margins of the pairs, [P].
        t: times in 0..1, [P] or [2P] in the order of a PairDraw.
    """
    assert errors.ref_preferred is not None and errors.ref_rejected is not None
    delta = delta.detach()
    metric_values = {
        # before the first update all margins are 0, which gives 0.5 and not 0
        "implicit_accuracy": 0.5 * (1 + delta.sign()),
        "margin": delta,
        "w_diff": (errors.preferred - errors.ref_preferred).detach(),
        "l_diff": (errors.rejected - errors.ref_rejected).detach(),
    }
    # the first P times are those of the pairs; the clamp puts t = 1 into the last bin
    time_bin = (t[: len(delta)] * TIME_BINS).long().clamp(0, TIME_BINS - 1)  # [P]
    # a sum of ones is the number of pairs
    sums = {"pairs": torch.ones_like(delta), **metric_values}
    return {name: delta.new_zeros(TIME_BINS).index_add(0, time_bin, value) for name, value in sums.items()}
