"""Direct preference optimisation of one stage: what is drawn for a batch of pairs, the margin, the loss, and
what is logged of it.

Shape letters as in sparse.py and stage.py; P pairs.
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

TIME_BINS = 10  # of equal width on 0..1, in what is logged
# logged as sums over the pairs of each time bin
BINNED = ("pairs", "implicit_accuracy", "margin", "w_diff", "l_diff")


@dataclass(frozen=True, kw_only=True)
class PairDraw:
    """A batch of pairs at one time and noise each: the preferred ones first, then the rejected, in the same
    order.
    """

    x_0: Batch  # 2P samples
    eps: Batch
    x_t: Batch
    t: torch.Tensor  # [2P]; a pair's two are equal
    cond: Condition  # 2P rows
    weight: torch.Tensor | None  # [P], w2 of the pairs


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
    """Time, noise and dropped conditions of pairs, each from (seed, pair's id, epoch) alone and on the CPU:
    in any batch, on any device.

    Args:
        cond: P rows; no_cond: P rows or 1, read only where config.condition_dropout is above 0.
    Raises: ValueError for some pairs with w2 and some without.
    """
    assert all(p.stage == stage.name for p in pairs) and rows(cond) == len(pairs)
    latents = [p.preferred for p in pairs] + [p.rejected for p in pairs]
    x_0 = collate(latents)
    seeds = [derive_seed(seed, p.id, epoch, "noise") for p in pairs]
    eps = stage.noise(seeds + seeds, coords_of(latents))
    t = (
        torch.cat([stage.path.times(1, _generator(seed, p, epoch, "time")) for p in pairs])
        .repeat(2)
        .to(device)
    )
    x_0 = x_0.to(device)
    eps = eps.to(device)
    cond = to_device(cond, device)
    if config.condition_dropout:
        assert no_cond is not None
        # [P]
        drawn = torch.stack(
            [torch.rand([], generator=_generator(seed, p, epoch, "condition")) for p in pairs]
        )
        cond = where(drawn < config.condition_dropout, no_cond, cond)
    weighed = [p.w2 is not None for p in pairs]
    weight = None
    if any(weighed):
        if not all(weighed):
            missing = pairs[weighed.index(False)].id
            raise ValueError(
                f"draw_pairs: expected w2 on all pairs or on none, got none on {missing}. Weigh the whole set"
                " at once."
            )
        weight = torch.tensor([p.w2 for p in pairs], device=device)
    return PairDraw(x_0=x_0, eps=eps, x_t=stage.path.mix(x_0, t, eps), t=t, cond=twice(cond), weight=weight)


def _generator(seed: int, pair: PreferencePair, epoch: int, what: str) -> torch.Generator:
    return torch.Generator().manual_seed(derive_seed(seed, pair.id, epoch, what))


@dataclass(frozen=True, kw_only=True)
class PairErrors:
    """Flow-matching errors, mean per sample, [P] each; those of the reference carry no gradient and may be
    missing where none is needed.
    """

    preferred: torch.Tensor
    rejected: torch.Tensor
    ref_preferred: torch.Tensor | None = None
    ref_rejected: torch.Tensor | None = None

    @classmethod
    def split(cls, errors: torch.Tensor, ref_errors: torch.Tensor | None = None) -> "PairErrors":
        """From errors [2P] in the order of a PairDraw."""
        ref = (None, None) if ref_errors is None else ref_errors.detach().chunk(2)
        preferred, rejected = errors.chunk(2)
        return cls(preferred=preferred, rejected=rejected, ref_preferred=ref[0], ref_rejected=ref[1])

    def delta(self, loser_weight: float = 1.0) -> torch.Tensor:
        """(e_ref - e)_preferred - loser_weight (e_ref - e)_rejected, [P]: positive where the policy gained
        more on the preferred.
        """
        assert self.ref_preferred is not None and self.ref_rejected is not None
        return (self.ref_preferred - self.preferred) - loser_weight * (self.ref_rejected - self.rejected)


def pair_loss(errors: PairErrors, config: DpoConfig, weight: torch.Tensor | None = None) -> torch.Tensor:
    """Loss of each pair, [P]: preference_loss of the margin (Circular-DPO, equations 6 and 7), plus
    sft_weight times the preferred's error.

    With e the errors, "sft" is e_preferred and "dro" e_preferred - loser_weight e_rejected (both of DSO),
    which a weight multiplies. The sft term of the other kinds carries no weight: it holds the policy to the
    preferred ones, however clear the pair.
    Differentiable in: errors, weight.
    """
    if config.needs_reference:
        loss = preference_loss(errors.delta(config.loser_weight), config.beta, weight)
    else:
        loss = (
            errors.preferred
            if config.kind == "sft"
            else errors.preferred - config.loser_weight * errors.rejected
        )
        loss = loss if weight is None else weight * loss
    return loss + config.sft_weight * errors.preferred if config.sft_weight else loss


def pair_stats(errors: PairErrors, delta: torch.Tensor, t: torch.Tensor) -> dict[str, torch.Tensor]:
    """What to log of a batch, by the names of BINNED: sums over the pairs of each time bin, [TIME_BINS], so
    that batches and ranks add up.

    implicit_accuracy: a positive margin counts 1, zero half; w_diff, l_diff: policy's minus reference's error
    of the preferred and of the rejected. Without gradient.
    Args: `delta` [P] as in the loss; `t` [P] or [2P] in the order of a PairDraw.
    """
    assert errors.ref_preferred is not None and errors.ref_rejected is not None
    delta = delta.detach()
    values = {
        "implicit_accuracy": 0.5 * (1 + delta.sign()),
        "margin": delta,
        "w_diff": (errors.preferred - errors.ref_preferred).detach(),
        "l_diff": (errors.rejected - errors.ref_rejected).detach(),
    }
    place = (t[: len(delta)] * TIME_BINS).long().clamp(0, TIME_BINS - 1)  # [P]
    sums = {"pairs": torch.ones_like(delta), **values}
    return {name: delta.new_zeros(TIME_BINS).index_add(0, place, value) for name, value in sums.items()}
