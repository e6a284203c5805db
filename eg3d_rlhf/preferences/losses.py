"""Preference losses of reward networks and of flows.

`preference_loss` is a function of the margin delta of each pair:

    reward network  delta = r_preferred - r_rejected (Bradley and Terry 1952)
    flow            delta = (e_ref - e)_preferred - (e_ref - e)_rejected (Circular-DPO, equation 6)

A reward network has the reward r. A flow has the flow-matching error e, and the reference flow, from which
the training started, has the error e_ref.

The terms of the reward network are those of arXiv 2606.27305, reward training. `PreferenceLoss` is their
weighted sum. All other functions are pure and return one value per pair or per sample.

Shapes: N samples, P pairs, D, H, W = grid points along z, y, x.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F

from eg3d_rlhf.preferences.settings import LossWeights

# Divergence of two sets of embeddings. Shapes: m and n embeddings in the two sets, M entries of an embedding.


ESTIMATORS = ("V", "U")  # values of `estimator` of `cs_divergence`


def cs_divergence(
    x: torch.Tensor, y: torch.Tensor, bandwidth: torch.Tensor | float, estimator: str = "V"
) -> torch.Tensor:
    """Compute the Cauchy-Schwarz divergence [] of two sets of embeddings (Jenssen et al. 2006).

    The divergence is log mean k(x, x') + log mean k(y, y') - 2 log mean k(x, y), with the kernel k(a, b) =
    exp(-|a - b|^2 / (2 bandwidth^2)). It is symmetric: it measures the distance between the sets, and not
    which set is better. Differentiable in x, y and bandwidth. Identical sets have gradient 0.

    Args:
        x: embeddings [m, M] of the first set.
        y: embeddings [n, M] of the second set.
        bandwidth: bandwidth of the kernel, > 0, in units of the embeddings.
        estimator: "V" averages over all pairs, including an embedding with itself. The result is at least 0,
            and too large in many dimensions: by about log((1/m + (1 - 1/m) c) / c) for each set, where c is
            the mean of k over pairs of different embeddings of the set. "U" leaves out the pairs of an
            embedding with itself. It has a smaller bias and may be negative. It is meant for measurements,
            and not for training.
    """
    assert (
        estimator in ESTIMATORS
        and x.ndim == y.ndim == 2
        and min(len(x), len(y)) >= {"V": 1, "U": 2}[estimator]
    )

    def log_mean(a: torch.Tensor, b: torch.Tensor, is_same_set: bool = False) -> torch.Tensor:
        """Return log mean k(a, b); `is_same_set` is True if a and b are the same set."""
        # [m, n]. The expanded form |a|^2 - 2 a b + |b|^2 would lose precision for close points.
        squared_distances = (a[:, None] - b[None]).square().sum(2)
        exponents = -squared_distances / (2 * bandwidth**2)
        pair_count = squared_distances.numel()
        if is_same_set and estimator == "U":
            # The kernel of an embedding with itself is 1, which makes the mean too large.
            exponents = exponents[~torch.eye(len(a), dtype=torch.bool, device=a.device)]
            pair_count = pair_count - len(a)
        return torch.logsumexp(exponents.flatten(), 0) - math.log(pair_count)

    # The sum over both orders is bitwise identical if the sets are exchanged.
    cross_terms = log_mean(x, y) + log_mean(y, x)
    return log_mean(x, x, is_same_set=True) + log_mean(y, y, is_same_set=True) - cross_terms


def median_distance(points: torch.Tensor) -> torch.Tensor:
    """Compute the median distance [] between different points of [N, M], without gradient.

    For an even number of distances the median is the mean of the two middle distances.
    """
    return F.pdist(points.detach()).quantile(0.5)


def preference_loss(
    delta: torch.Tensor, beta: float = 1.0, weight: torch.Tensor | None = None
) -> torch.Tensor:
    """Compute the loss -log sigmoid(beta weight delta) [P] of the margins of pairs.

    This is equation 7 of DPO (Rafailov et al. 2023, arXiv 2305.18290) and of Circular-DPO. Differentiable in
    delta and weight.

    Args:
        delta: margins [P], positive if the preferred sample is better.
        beta: factor of the margins, > 0.
        weight: factors [P] of the margins; None for 1.

    >>> preference_loss(torch.tensor([0.0, 2.0])).round(decimals=3)
    tensor([0.6930, 0.1270])
    """
    assert weight is None or weight.shape == delta.shape
    z = beta * (delta if weight is None else weight * delta)
    # -log sigmoid(z) = softplus(-z), without overflow
    loss = F.softplus(-z)
    return loss


def pair_loss_both_orders(
    better_first_logits: torch.Tensor, worse_first_logits: torch.Tensor
) -> torch.Tensor:
    """Compute the cross-entropy [P] of the pair head, averaged over both presentation orders.

    Args:
        better_first_logits: logits [P, 2] of the pair head for (better, worse), whose target is class 0.
        worse_first_logits: logits [P, 2] of the pair head for (worse, better), whose target is class 1.
    """
    return 0.5 * (_cross_entropy(better_first_logits, 0) + _cross_entropy(worse_first_logits, 1))


def pair_loss_drawn_order(
    better_first_logits: torch.Tensor, worse_first_logits: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """Compute the cross-entropy [P] of the pair head for one random presentation order of each pair.

    Args:
        better_first_logits: logits [P, 2] of the pair head for (better, worse), whose target is class 0.
        worse_first_logits: logits [P, 2] of the pair head for (worse, better), whose target is class 1.
        generator: random numbers, on the CPU.
    """
    # [P, 2]: losses of both presentation orders
    order_losses = torch.stack(
        [_cross_entropy(better_first_logits, 0), _cross_entropy(worse_first_logits, 1)], dim=1
    )
    # [P, 1]; the orders are sampled on the CPU, so that they are the same on all devices.
    drawn_orders = torch.multinomial(torch.full((order_losses.shape[0], 2), 0.5), 1, generator=generator)
    return order_losses.gather(1, drawn_orders.to(order_losses.device)).squeeze(1)


def _cross_entropy(logits: torch.Tensor, target: int) -> torch.Tensor:
    """Compute the cross-entropy, -log softmax of the target class: [P, 2] -> [P]."""
    return -F.log_softmax(logits, dim=1)[:, target]  # [P]


def margin_loss(better_scores: torch.Tensor, worse_scores: torch.Tensor) -> torch.Tensor:
    """Compute the loss -log sigmoid(better - worse) [P] of pairs.

    If the arguments are logarithms of strengths s, the loss is -log(s_better / (s_better + s_worse)).

    Deviates: the published formula uses strengths, whose exponential can overflow. This function uses the
        difference of their logarithms.

    Args:
        better_scores: rewards [P] or logarithms of strengths [P] of the preferred samples.
        worse_scores: rewards [P] or logarithms of strengths [P] of the rejected samples.
    """
    return preference_loss(better_scores - worse_scores)


def reconstruction_loss(reconstruction: torch.Tensor, slab: torch.Tensor) -> torch.Tensor:
    """Compute the L1 error [N] of reconstructed slabs, which are first rescaled to the range of the slabs.

    With the reconstruction r and the slab o of a sample, the error is the mean of |r' - o| over the voxels,
    where r' = (r - min r) / (max r - min r) * (max o - min o) + min o.

    Differentiable in both arguments. Minimum and maximum are differentiated, too, so that an affine change of
    r changes neither the error nor the gradient.

    Deviates: for a constant reconstruction, where the formula has 0/0, r' is min o.

    Args:
        reconstruction: reconstructed slabs [N, 1, D, H, W].
        slab: slabs [N, 1, D, H, W].
    """
    # [N, D H W]
    r = reconstruction.flatten(1)
    o = slab.flatten(1)
    r_min = r.amin(1, keepdim=True)
    o_min = o.amin(1, keepdim=True)
    # The smallest normal number avoids 0 / 0 for a constant reconstruction.
    r_range = (r.amax(1, keepdim=True) - r_min).clamp_min(torch.finfo(r.dtype).tiny)
    return ((r - r_min) / r_range * (o.amax(1, keepdim=True) - o_min) + o_min - o).abs().mean(1)


@dataclass(frozen=True, kw_only=True)
class UnpairedOutput:
    """Inputs of the loss terms on labels of single shapes.

    Shapes: U labels of this process and B labels of all processes in a training step, M entries of an
        embedding.
    """

    scalar: torch.Tensor  # rewards [U]
    target: torch.Tensor  # rewards [U] that the labels require, 0..1
    # Embeddings [B, M] of length 1, differentiable only in the rows of this process
    embedding: torch.Tensor
    preferred: torch.Tensor  # bool [B], True for preferred shapes
    bandwidth: float  # bandwidth of the divergence's kernel, > 0


class PairedOutput(Protocol):
    """Interface to the output of a reward network for N samples. `RewardOutput` implements it."""

    @property
    def embedding(self) -> torch.Tensor:
        """Embeddings [N, M], the output of the trunk."""

    @property
    def scalar(self) -> torch.Tensor:
        """Rewards [N]."""

    @property
    def log_strength(self) -> torch.Tensor:
        """Logarithms of the Bradley-Terry strengths [N]."""

    @property
    def reconstruction(self) -> torch.Tensor | None:
        """Reconstructed input of the network [N, ...], or None if it was not requested."""


class PreferenceLoss:
    """Weighted loss terms of a reward network, for labels of pairs and for labels of single shapes.

    The terms of pairs are those of arXiv 2606.27305. Both methods return a dict of weighted terms [], which
    the training loop sums. Each term except the strength and the divergence is a mean over pairs or samples.
    A term of weight 0 is neither computed nor returned.

    Args: weights: weights of the terms.
    """

    def __init__(self, weights: LossWeights):
        self.weights = weights

    def __call__(
        self,
        network_output: PairedOutput,
        better_indices: torch.Tensor,
        worse_indices: torch.Tensor,
        *,
        pair_logits: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        network_input: torch.Tensor,
        epoch: int,
        generator: torch.Generator,
    ) -> dict[str, torch.Tensor]:
        """Compute the weighted loss terms of labelled pairs, by name.

        Args:
            network_output: output of the network for N samples.
            better_indices: index of the preferred sample of each pair, int64 [P].
            worse_indices: index of the rejected sample of each pair, int64 [P].
            pair_logits: pair head of the network, a function of two batches of embeddings.
            network_input: input of the network [N, ...], which is compared with its reconstruction.
            epoch: index of the epoch, from 0.
            generator: random numbers of the presentation orders.
        """
        w = self.weights
        terms: dict[str, torch.Tensor] = {}
        if w.pairs:
            better_embedding = network_output.embedding[better_indices]
            worse_embedding = network_output.embedding[worse_indices]
            better_first_logits = pair_logits(better_embedding, worse_embedding)
            worse_first_logits = pair_logits(worse_embedding, better_embedding)
            if epoch >= w.drawn_from_epoch:
                pair_losses = pair_loss_drawn_order(better_first_logits, worse_first_logits, generator)
            else:
                pair_losses = pair_loss_both_orders(better_first_logits, worse_first_logits)
            terms["pairs"] = w.pairs * pair_losses.mean()
        # The rewards and strengths below do not depend on a presentation order.
        if w.scalar:
            terms["scalar"] = (
                w.scalar
                * margin_loss(
                    network_output.scalar[better_indices], network_output.scalar[worse_indices]
                ).mean()
            )
        if w.bradley_terry:
            terms["bradley_terry"] = (
                w.bradley_terry
                * margin_loss(
                    network_output.log_strength[better_indices], network_output.log_strength[worse_indices]
                ).mean()
            )
        # L2 norm of all strengths of the batch. As in the paper's code it is detached: it is logged, and has
        # no gradient.
        if w.strength:
            terms["strength"] = w.strength * network_output.log_strength.detach().exp().norm()
        # The network returns a reconstruction only if it was requested.
        if w.reconstruction and network_output.reconstruction is not None:
            terms["reconstruction"] = (
                w.reconstruction * reconstruction_loss(network_output.reconstruction, network_input).mean()
            )
        return terms

    def unpaired(self, unpaired_output: UnpairedOutput) -> dict[str, torch.Tensor]:
        """Compute the weighted loss terms of labels of single shapes, by name.

        The terms are "regression" = w mean (reward - target)^2 and "divergence" = -w D, where D is the
        Cauchy-Schwarz divergence between the embeddings of preferred shapes and of all other shapes. D is not
        a mean over samples, so its inputs contain the shapes of all processes.

        Args: unpaired_output: inputs of the terms.
        """
        w = self.weights
        terms: dict[str, torch.Tensor] = {}
        if w.regression:
            terms["regression"] = (
                w.regression * (unpaired_output.scalar - unpaired_output.target).square().mean()
            )
        if w.divergence:
            preferred_embeddings = unpaired_output.embedding[unpaired_output.preferred]
            other_embeddings = unpaired_output.embedding[~unpaired_output.preferred]
            # The largest possible value of D. Embeddings of length 1 have a squared distance of at most 4, so
            # log mean k is between -2 / bandwidth^2 and 0, and D contains -2 log mean k(x, y).
            bound = 4 / unpaired_output.bandwidth**2
            # Because of the minus sign, training increases the divergence.
            terms["divergence"] = -w.divergence * cs_divergence(
                preferred_embeddings, other_embeddings, unpaired_output.bandwidth
            ).clamp(max=bound)
        return terms
