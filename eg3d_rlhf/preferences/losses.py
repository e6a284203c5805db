"""Preference losses: of a margin per pair, the terms of the reward network, and their weighted sum. Pure
functions, unreduced.

The margin is a difference of rewards or of flow-matching errors:
    reward model    delta = r_preferred - r_rejected
                    Bradley and Terry (1952)
    flow            delta = (e_ref - e)_preferred - (e_ref - e)_rejected, e the flow-matching errors
                    Circular-DPO, equation 6
Terms of the reward network: arXiv 2606.27305 (2026), reward training.

Letters: N samples, P pairs given as (better, worse), D, H, W = z, y, x.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F

from eg3d_rlhf.preferences.settings import LossWeights

# Divergence of two sets of embeddings. Letters: m, n members of the two sets, N samples, M entries of an
# embedding.


ESTIMATORS = ("V", "U")


def cs_divergence(
    x: torch.Tensor, y: torch.Tensor, bandwidth: torch.Tensor | float, estimator: str = "V"
) -> torch.Tensor:
    """Compute the Cauchy-Schwarz divergence of two sets of embeddings.

    log mean k(x, x') + log mean k(y, y') - 2 log mean k(x, y), k(a, b) = exp(-|a - b|^2 / (2 bandwidth^2)).

    It measures the distance between the sets and not which one is better: it is symmetric.

    Args:
        x, y: [m, M], [n, M].
        bandwidth: > 0, in units of the embeddings.
        estimator: 'V' takes every pair, including a member with itself. It is at least 0, and too large in
            many dimensions: by about log((1/m + (1 - 1/m) A) / A) for each set, with A = mean k of different
            members. 'U' leaves those pairs out of the first two means. It has less bias and may be negative;
            use it to measure, not to train.
    Returns: [].
    Differentiable in x, y and bandwidth. Identical sets have gradient 0.
    """
    assert (
        estimator in ESTIMATORS
        and x.ndim == y.ndim == 2
        and min(len(x), len(y)) >= {"V": 1, "U": 2}[estimator]
    )

    def log_mean(a: torch.Tensor, b: torch.Tensor, within: bool = False) -> torch.Tensor:
        """Return log mean k(a, b). `within`: both are the same set."""
        # [m, n]. The expanded form |a|^2 - 2 a b + |b|^2 would lose precision for close points.
        squares = (a[:, None] - b[None]).square().sum(2)
        exponents = -squares / (2 * bandwidth**2)
        count = squares.numel()
        if within and estimator == "U":
            # Members paired with themselves have k = 1, which biases the mean upwards.
            exponents = exponents[~torch.eye(len(a), dtype=torch.bool, device=a.device)]
            count = count - len(a)
        return torch.logsumexp(exponents.flatten(), 0) - math.log(count)

    # Both orders, so that exchanging the sets gives a bitwise identical result.
    between = log_mean(x, y) + log_mean(y, x)
    return log_mean(x, x, within=True) + log_mean(y, y, within=True) - between


def median_distance(points: torch.Tensor) -> torch.Tensor:
    """Compute the median distance [] between different members of [N, M], without gradient.

    For an even number of distances it is the mean of the two middle ones.
    """
    return F.pdist(points.detach()).quantile(0.5)


def preference_loss(
    delta: torch.Tensor, beta: float = 1.0, weight: torch.Tensor | None = None
) -> torch.Tensor:
    """Compute -log sigmoid(beta weight delta) of each pair's margin, unreduced.

    Rafailov et al. (2023), equation 7; Circular-DPO, equation 7.

    Args:
        delta: [P], positive if the preferred sample is ahead.
        beta: > 0, per unit of delta.
        weight: [P], scales the margin of a pair.
    Returns: [P]. Differentiable in delta and weight.

    >>> preference_loss(torch.tensor([0.0, 2.0])).round(decimals=3)
    tensor([0.6930, 0.1270])
    """
    assert weight is None or weight.shape == delta.shape
    z = beta * (delta if weight is None else weight * delta)
    # -log sigmoid(z) = softplus(-z), without overflow
    loss = F.softplus(-z)
    return loss


def pair_loss_both_orders(better_first: torch.Tensor, worse_first: torch.Tensor) -> torch.Tensor:
    """Compute the cross-entropy [P] of the pair head, averaged over both presentation orders.

    Args: better_first, worse_first: logits [P, 2] of (better, worse), target 0, and of (worse, better),
    target 1.
    """
    return 0.5 * (_cross_entropy(better_first, 0) + _cross_entropy(worse_first, 1))


def pair_loss_drawn_order(
    better_first: torch.Tensor, worse_first: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """Compute the cross-entropy [P] of one presentation order per pair, chosen at random with equal
    probability.

    Arguments as in `pair_loss_both_orders`.
    """
    both = torch.stack([_cross_entropy(better_first, 0), _cross_entropy(worse_first, 1)], dim=1)  # [P, 2]
    # [P, 1], sampled on the CPU so that all devices use the same orders
    order = torch.multinomial(torch.full((both.shape[0], 2), 0.5), 1, generator=generator)
    return both.gather(1, order.to(both.device)).squeeze(1)


def _cross_entropy(logits: torch.Tensor, target: int) -> torch.Tensor:
    """Compute -log softmax of the target class: [P, 2] -> [P]."""
    return -F.log_softmax(logits, dim=1)[:, target]  # [P]


def margin_loss(better: torch.Tensor, worse: torch.Tensor) -> torch.Tensor:
    """Compute -log sigmoid(better - worse), [P] -> [P], of rewards or of *log* strengths.

    For strengths l this is -log(l_better / (l_better + l_worse)).
    Deviates: computed from the difference of the logarithms, without overflow of exp.
    """
    return preference_loss(better - worse)


def reconstruction_loss(reconstruction: torch.Tensor, slab: torch.Tensor) -> torch.Tensor:
    """Compute the L1 error between a slab and its reconstruction, after rescaling to the range of the slab.

    r' = (r - min r) / (max r - min r) * (max o - min o) + min o per sample, then the mean of |r' - o| over
    voxels.

    Args: reconstruction, slab: [N, 1, D, H, W].
    Returns: [N].
    Differentiable in both. Minimum and maximum are in the graph, so an affine change of r has no gradient.
    Deviates: a constant reconstruction gives r' = min o, where the formula has 0/0.
    """
    # [N, D H W]
    r = reconstruction.flatten(1)
    o = slab.flatten(1)
    # Range of the reconstruction and of the slab, per sample.
    r_low = r.amin(1, keepdim=True)
    o_low = o.amin(1, keepdim=True)
    # A constant reconstruction has no range; the smallest normal number avoids 0 / 0.
    span = (r.amax(1, keepdim=True) - r_low).clamp_min(torch.finfo(r.dtype).tiny)
    return ((r - r_low) / span * (o.amax(1, keepdim=True) - o_low) + o_low - o).abs().mean(1)


@dataclass(frozen=True, kw_only=True)
class UnpairedOutput:
    """Inputs of the unpaired terms. Letters: U labels of this process, B labels of all processes in a
    step.
    """

    scalar: torch.Tensor  # [U] rewards
    target: torch.Tensor  # [U] desired rewards
    # [B, M], unit length; differentiable only in the rows of this process
    embedding: torch.Tensor
    preferred: torch.Tensor  # [B] bool
    bandwidth: float  # bandwidth of the divergence's kernel, > 0


class PairedOutput(Protocol):
    """Interface of a reward network's output over N samples; `RewardOutput` implements it."""

    @property
    def embedding(self) -> torch.Tensor:
        """Return the output of the trunk [N, M]."""

    @property
    def scalar(self) -> torch.Tensor:
        """Return the rewards [N]."""

    @property
    def log_strength(self) -> torch.Tensor:
        """Return the logarithms of the Bradley-Terry strengths [N]."""

    @property
    def reconstruction(self) -> torch.Tensor | None:
        """Return the reconstructed input of the network; None if it was not requested."""


class PreferenceLoss:
    """The paper's weighted sum, from a reward network's output and pairs of indices, and the terms of
    unpaired labels.

    A call returns a dict of weighted scalar terms, which the training loop sums. Pairs are averaged over the
    batch, and so are samples. A term of weight 0 is neither computed nor returned.
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
        """Compute the terms of paired labels.

        Args:
            output: over N samples.
            better, worse: [P] int64, indices of samples.
            pair_logits: the model's pair head.
            observed: the input of the network.
            epoch: 0-based.
            generator: of random presentation orders.
        """
        w = self.weights
        terms: dict[str, torch.Tensor] = {}
        if w.pairs:
            first = output.embedding[better]
            second = output.embedding[worse]
            logits = pair_logits(first, second), pair_logits(second, first)
            one_order = epoch >= w.drawn_from_epoch
            per_pair = (
                pair_loss_drawn_order(*logits, generator) if one_order else pair_loss_both_orders(*logits)
            )
            terms["pairs"] = w.pairs * per_pair.mean()
        # No presentation order: the scalar reward does not depend on it.
        if w.scalar:
            terms["scalar"] = w.scalar * margin_loss(output.scalar[better], output.scalar[worse]).mean()
        if w.bradley_terry:
            terms["bradley_terry"] = (
                w.bradley_terry * margin_loss(output.log_strength[better], output.log_strength[worse]).mean()
            )
        # L2 norm of all strengths of the batch, detached as in the paper's code: it is logged and has no
        # gradient.
        if w.strength:
            terms["strength"] = w.strength * output.log_strength.detach().exp().norm()
        # The network returns a reconstruction only if it was requested.
        if w.reconstruction and output.reconstruction is not None:
            terms["reconstruction"] = (
                w.reconstruction * reconstruction_loss(output.reconstruction, observed).mean()
            )
        return terms

    def unpaired(self, shapes: UnpairedOutput) -> dict[str, torch.Tensor]:
        """Compute `regression` = w mean (reward - target)^2 and `divergence` = -w D.

        The divergence is no mean over samples, so it needs the samples of all processes.
        """
        w = self.weights
        terms: dict[str, torch.Tensor] = {}
        if w.regression:
            terms["regression"] = w.regression * (shapes.scalar - shapes.target).square().mean()
        # With its minus sign below, training increases the divergence between the sets.
        if w.divergence:
            preferred_set = shapes.embedding[shapes.preferred]
            other_set = shapes.embedding[~shapes.preferred]
            # The largest possible value. Unit vectors have a squared distance of at most 4, so each of the
            # three log mean k is at least -2 / bandwidth^2.
            bound = 4 / shapes.bandwidth**2
            terms["divergence"] = -w.divergence * cs_divergence(
                preferred_set, other_set, shapes.bandwidth
            ).clamp(max=bound)
        return terms
