"""Preference losses: the one of a per-pair margin, the reward network's terms, and the weighted sum of the
paper. Pure and unreduced.

The margin is a difference of rewards or of flow-matching errors:
    reward model    delta = r_preferred - r_rejected
                    Bradley and Terry (1952)
    flow            delta = (e_ref - e)_preferred - (e_ref - e)_rejected, e the flow-matching errors
                    Circular-DPO, equation 6
The reward network's terms: arXiv 2606.27305 (2026), reward training.

Shape letters: N samples, P pairs given as (better, worse), D, H, W = z, y, x.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F

from eg3d_rlhf.preferences.settings import LossWeights

# How far two sets of embeddings lie apart. Letters: m, n members of the two sets, N samples, M entries of an
# embedding.


ESTIMATORS = ("V", "U")


def cs_divergence(
    x: torch.Tensor, y: torch.Tensor, bandwidth: torch.Tensor | float, estimator: str = "V"
) -> torch.Tensor:
    """log mean k(x, x') + log mean k(y, y') - 2 log mean k(x, y), k(a, b) = exp(-|a - b|^2 / (2
    bandwidth^2)).

    It says how far apart the sets are and not which one is better: exchanging them changes nothing.

    Args: x [m, M], y [n, M]; bandwidth: > 0, in the embeddings' units; estimator: 'V' takes every pair, a
    member with itself included, is at least 0 and too large in many dimensions (by about log((1/m + (1 - 1/m)
    A) / A) of each set, A = mean k of different members); 'U' leaves those pairs out of the first two means,
    has less bias and may be below 0: for measuring, not for training.
    Returns: []. Differentiable in: x, y, bandwidth. Identical sets have gradient 0.
    """
    assert (
        estimator in ESTIMATORS
        and x.ndim == y.ndim == 2
        and min(len(x), len(y)) >= {"V": 1, "U": 2}[estimator]
    )

    def log_mean(a: torch.Tensor, b: torch.Tensor, within: bool = False) -> torch.Tensor:
        # [m, n]; exact for near points, unlike the expanded form
        squares = (a[:, None] - b[None]).square().sum(2)
        exponents = -squares / (2 * bandwidth**2)
        count = squares.numel()
        if within and estimator == "U":
            exponents = exponents[~torch.eye(len(a), dtype=torch.bool, device=a.device)]
            count = count - len(a)
        return torch.logsumexp(exponents.flatten(), 0) - math.log(count)

    between = log_mean(x, y) + log_mean(y, x)  # both ways, so that exchanging the sets keeps the last bit
    return log_mean(x, x, within=True) + log_mean(y, y, within=True) - between


def median_distance(points: torch.Tensor) -> torch.Tensor:
    """Median distance [] between different members of [N, M]; the mean of the two middle ones of an even
    number. Without gradient.
    """
    return F.pdist(points.detach()).quantile(0.5)


def preference_loss(
    delta: torch.Tensor, beta: float = 1.0, weight: torch.Tensor | None = None
) -> torch.Tensor:
    """-log sigmoid(beta weight delta) of each pair's margin, unreduced (Rafailov et al. 2023 and
    Circular-DPO, equation 7 of both).

    Args:
        delta: [P], positive where the preferred one is ahead; beta: > 0, per unit of delta; weight: [P],
            rescales what is asked of a pair.
    Returns: [P]. Differentiable in: delta, weight.

    >>> preference_loss(torch.tensor([0.0, 2.0])).round(decimals=3)
    tensor([0.6930, 0.1270])
    """
    assert weight is None or weight.shape == delta.shape
    z = beta * (delta if weight is None else weight * delta)
    loss = F.softplus(-z)
    return loss


def pair_loss_both_orders(better_first: torch.Tensor, worse_first: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy [P] of the pair head's logits [P, 2] of (better, worse), target 0, and of
    (worse, better), target 1.
    """
    return 0.5 * (_cross_entropy(better_first, 0) + _cross_entropy(worse_first, 1))


def pair_loss_drawn_order(
    better_first: torch.Tensor, worse_first: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """Cross-entropy of one presentation order per pair, drawn with probability one half each, [P]. Arguments
    as above.
    """
    both = torch.stack([_cross_entropy(better_first, 0), _cross_entropy(worse_first, 1)], dim=1)  # [P, 2]
    # [P, 1] on the CPU, whatever the device
    drawn = torch.multinomial(torch.full((both.shape[0], 2), 0.5), 1, generator=generator)
    return both.gather(1, drawn.to(both.device)).squeeze(1)


def _cross_entropy(logits: torch.Tensor, target: int) -> torch.Tensor:
    return -F.log_softmax(logits, dim=1)[:, target]  # [P]


def margin_loss(better: torch.Tensor, worse: torch.Tensor) -> torch.Tensor:
    """-log sigmoid(better - worse), [P] -> [P], of rewards, or of *log* strengths.

    Of strengths it is -log(l_better / (l_better + l_worse)). Deviates: computed from the logarithms'
    difference, without overflow of exp.
    """
    return preference_loss(better - worse)


def reconstruction_loss(reconstruction: torch.Tensor, slab: torch.Tensor) -> torch.Tensor:
    """L1 between a slab and its reconstruction rescaled to the slab's own range, [N, 1, D, H, W]
    twice -> [N].

    r' = (r - min r) / (max r - min r) * (max o - min o) + min o per sample, then mean |r' - o| over its
    voxels.
    Differentiable in: both. Minimum and maximum are in the graph, so an affine map of r gets no gradient.
    Deviates: a constant reconstruction gives r' = min o, where the formula has 0/0.
    """
    # [N, D*H*W]
    r = reconstruction.flatten(1)
    o = slab.flatten(1)
    r_low = r.amin(1, keepdim=True)
    o_low = o.amin(1, keepdim=True)
    span = (r.amax(1, keepdim=True) - r_low).clamp_min(torch.finfo(r.dtype).tiny)
    return ((r - r_low) / span * (o.amax(1, keepdim=True) - o_low) + o_low - o).abs().mean(1)


@dataclass(frozen=True, kw_only=True)
class UnpairedOutput:
    """What the unpaired terms read. Letters: U labels of this process, B of the whole step."""

    scalar: torch.Tensor  # [U] rewards
    target: torch.Tensor  # [U] what they should be
    # [B, M] of the whole step, of length 1; differentiable in this process's rows alone
    embedding: torch.Tensor
    preferred: torch.Tensor  # [B] bool
    bandwidth: float  # of the divergence's kernel, > 0


class PairedOutput(Protocol):
    """Interface of a reward network's output over N samples; `RewardOutput` implements it."""

    @property
    def embedding(self) -> torch.Tensor:
        """[N, M] the trunk's output."""

    @property
    def scalar(self) -> torch.Tensor:
        """[N] rewards."""

    @property
    def log_strength(self) -> torch.Tensor:
        """[N] logarithms of the Bradley-Terry strengths."""

    @property
    def reconstruction(self) -> torch.Tensor | None:
        """The network's input, reconstructed; None if not asked for."""


class PreferenceLoss:
    """The paper's weighted sum, from a reward network's output and index pairs; and the terms of unpaired
    labels.

    Call: (output, better [P], worse [P], pair_logits, observed, epoch, generator) -> dict of weighted scalar
    terms that the loop sums. Pairs are averaged over the batch, samples likewise; a term of weight 0 is
    neither computed nor returned.
    """

    def __init__(self, weights: LossWeights):
        self.weights = weights

    def __call__(
        self,
        output: PairedOutput,
        better: torch.Tensor,
        worse: torch.Tensor,
        *,
        pair_logits: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        observed: torch.Tensor,
        epoch: int,
        generator: torch.Generator,
    ) -> dict[str, torch.Tensor]:
        """Args: `output` a RewardOutput over N samples; `better`, `worse` int64 indices into them;
        `pair_logits` the model's pair head.
        """
        w = self.weights
        terms: dict[str, torch.Tensor] = {}
        if w.pairs:
            first = output.embedding[better]
            second = output.embedding[worse]
            logits = pair_logits(first, second), pair_logits(second, first)
            drawn = epoch >= w.drawn_from_epoch
            per_pair = pair_loss_drawn_order(*logits, generator) if drawn else pair_loss_both_orders(*logits)
            terms["pairs"] = w.pairs * per_pair.mean()
        if w.scalar:
            terms["scalar"] = w.scalar * margin_loss(output.scalar[better], output.scalar[worse]).mean()
        if w.bradley_terry:
            terms["bradley_terry"] = (
                w.bradley_terry * margin_loss(output.log_strength[better], output.log_strength[worse]).mean()
            )
        # L2 norm of all strengths of the batch; detached as in the paper's code: a figure to log, no gradient
        if w.strength:
            terms["strength"] = w.strength * output.log_strength.detach().exp().norm()
        if w.reconstruction and output.reconstruction is not None:
            terms["reconstruction"] = (
                w.reconstruction * reconstruction_loss(output.reconstruction, observed).mean()
            )
        return terms

    def unpaired(self, shapes: UnpairedOutput) -> dict[str, torch.Tensor]:
        """`regression` = w mean (reward - target)^2, and `divergence` = -w D, which is no mean over samples:
        it needs the whole step.
        """
        w = self.weights
        terms: dict[str, torch.Tensor] = {}
        if w.regression:
            terms["regression"] = w.regression * (shapes.scalar - shapes.target).square().mean()
        if w.divergence:
            good = shapes.embedding[shapes.preferred]
            others = shapes.embedding[~shapes.preferred]
            bound = 4 / shapes.bandwidth**2  # of vectors of length 1
            terms["divergence"] = -w.divergence * cs_divergence(good, others, shapes.bandwidth).clamp(
                max=bound
            )
        return terms
