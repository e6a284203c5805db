"""DiffusionNFT: a flow is taught, on finished samples, to move towards the good ones and away from the bad
(Zheng et al. 2025).

With u = (1 - s) eps - x_0 the target velocity at x_t, v the policy's, v_old that of the network that drew
x_0, sigma = s + (1 - s) t, and r in 0..1 how good x_0 is,

    v+ = v_old + b (v - v_old)        v- = v_old - b (v - v_old)
    a  = sigma (u - v±), the error of the x_0 that v± speaks of
    L  = C / b [r m(a+^2) / n+ + (1 - r) m(a-^2) / n-]        n± = max(m|a±|, FLOOR), without gradient

m being the mean over a sample's numbers. It needs the sampler's finished samples alone: any sampler will do,
and no density.

At v = v_old its gradient is C (2r - 1) sigma^2 grad m((v - u)^2) / n: nothing for r = 1/2. Without n
("plain") the optimum is v - v_old = (2r - 1) / b (u - v_old), and C and b act only by their product; with n
the same holds of the mean over many u at one x_t, while a single sample is pulled to the full bound
v - v_old = ±(u - v_old) / b, however clear it is.

Defaults: C 5, b 1 (the paper's), for offline labels C 1, b .3 and an old network that is never refreshed:
each refresh multiplies u - v_old by 1 - (2r - 1) / b. Deviates: sigma_min s is kept, where published code has
0.

Shape letters as in sparse.py; r and sigma are [N].
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from eg3d_rlhf.models.sparse import Batch, feats_of, mean_per_sample, spread

FLOOR = 1e-5  # of the mean error that divides; absolute, so that latents should be about 1 in size
ADVANTAGE_CLIP = 5.0  # C
CURVATURE = 1.0  # b

# over a sample's numbers; of a path that weighs its tensors, its own
Mean = Callable[[torch.Tensor, Batch], torch.Tensor]


def goodness(advantage: torch.Tensor, clip: float = ADVANTAGE_CLIP, mode: str = "continuous") -> torch.Tensor:
    """r = 1/2 + clip(A, ±C) / (2 C), of advantages of any shape.

    Args: mode: "positive_only" and "negative_only" take A of the other sign as 0; "one_only" takes 1 where
        A > 0 and 0 elsewhere, "binary" its sign; these are divided by 2 C as well, as published code does,
        and so stay close to 1/2.

    >>> goodness(torch.tensor([-7.0, -2.5, 0.0, 1.0]))
    tensor([0.0000, 0.2500, 0.5000, 0.6000])
    """
    bounded = advantage.clamp(-clip, clip)
    bounded = {
        "continuous": lambda: bounded,
        "positive_only": lambda: bounded.clamp(min=0),
        "negative_only": lambda: bounded.clamp(max=0),
        "one_only": lambda: (bounded > 0).to(bounded),
        "binary": bounded.sign,
    }[mode]()
    return (0.5 + bounded / (2 * clip)).clamp(0, 1)


class Errors(NamedTuple):
    """m(a±^2) / n± of both sides, [N]; differentiable in: v."""

    positive: torch.Tensor
    negative: torch.Tensor


def nft_errors(
    v: Batch,
    old: Batch,
    target: Batch,
    sigma: torch.Tensor,
    curvature: float = CURVATURE,
    adaptive: bool = True,
    mean: Mean = mean_per_sample,
) -> Errors:
    """The two errors of a batch.

    Args: v: of the policy; old: of the network that drew the samples; target: u; sigma: noise at x_t;
        curvature: b; adaptive: divided by n, which turns the weight sigma^2 into about sigma.
    """
    step = curvature * (feats_of(v) - feats_of(old).detach())
    missing = feats_of(target) - feats_of(old).detach()
    level = spread(sigma, v)
    sides = []
    for sign in (1, -1):
        error = level * (missing - sign * step)
        weight = torch.ones_like(sigma)
        if adaptive:
            weight = mean(error.detach().double().abs(), v).clamp(min=FLOOR).to(error.dtype)
        sides.append(mean(error.square(), v) / weight)
    return Errors(*sides)


def nft_loss(
    errors: Errors, r: torch.Tensor, clip: float = ADVANTAGE_CLIP, curvature: float = CURVATURE
) -> torch.Tensor:
    """C / b [r e+ + (1 - r) e-], [N]. Differentiable in: the errors' v, r.

    A weight times m((v - v_ref)^2) is added by whoever trains: the bound around `old` is none around the
    network that training began with.
    Args: clip: C, the one that r was made with; offline, where r comes from labels, 1; curvature: as in the
        errors.
    """
    return clip / curvature * (r * errors.positive + (1 - r) * errors.negative)
