"""Exact properties of the online losses, in float64."""

import math

import pytest
import torch

from eg3d_rlhf.models.sparse import collate, feats_of, mean_per_sample, with_feats
from eg3d_rlhf.preferences.losses import preference_loss
from eg3d_rlhf.tuning.flow.base.stage import FlowPath
from eg3d_rlhf.tuning.flow.training.losses import (
    clipped_ratio_loss,
    dgpo_loss,
    dgpo_stopped,
    dppo_dropped,
    dppo_loss,
    goodness,
    group_margin,
    guard_loss,
    guarded_ratio,
    nft_errors,
    nft_loss,
    outside_clip,
)
from eg3d_rlhf.tuning.flow.training.online.snapshot import DECAYS, decay
from eg3d_rlhf.tuning.flow.training.online.steps import ExactStep, divergence, log_density
from tests.tuning.flow.closed_forms import voxels

N = 6
SHAPE = (6, 2, 3, 3, 3)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*(shape or SHAPE), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradient(loss: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(loss.sum(), at)[0]


def error(v, u):
    return mean_per_sample((v - u).square(), v)


TIMES = torch.linspace(0.1, 0.9, N, dtype=torch.float64)
U = normal()
OLD = normal(seed=1)
A = torch.tensor([-6.0, -2.0, 0.0, 0.5, 2.0, 7.0], dtype=torch.float64)


def nft(v, r=None, clip=5.0, b=1.0, **options):
    return nft_loss(
        nft_errors(v, OLD, U, TIMES, b, **options), goodness(A, clip) if r is None else r, clip, b
    )


def at_old() -> torch.Tensor:
    return OLD.clone().requires_grad_(True)


@pytest.mark.parametrize("adaptive", [True, False])
def test_nft_at_the_old_network_pulls_by_the_advantage(adaptive):
    """1, 2: nothing for r = 1/2; else C (2r - 1) t^2 grad e, and over n = t m|u - v_old| it is A t grad
    e / m|u - v_old|.
    """
    v = at_old()
    assert not gradient(nft(v, torch.full([N], 0.5, dtype=torch.float64), adaptive=adaptive), v).any()
    r = goodness(A)
    weight = 5 * (2 * r - 1) * TIMES**2
    if adaptive:
        weight = weight / (TIMES * mean_per_sample((U - OLD).abs(), U))
    wanted = gradient(weight * error(v, U), v)
    torch.testing.assert_close(gradient(nft(v, adaptive=adaptive), v), wanted, rtol=1e-10, atol=1e-14)


def test_nft_without_its_weight_has_a_closed_form():
    """3: its value, its optimum, and that C and b act by their product alone."""
    v = normal(seed=2).requires_grad_(True)
    r = goodness(A)
    b = 0.3
    level = TIMES**2
    d = v - OLD
    inner = mean_per_sample(d * (U - OLD), d)
    wanted = 5 * level * (b * mean_per_sample(d.square(), d) - 2 * (2 * r - 1) * inner + error(U, OLD) / b)
    torch.testing.assert_close(nft(v, b=b, adaptive=False), wanted, rtol=1e-12, atol=1e-12)
    best = (OLD + ((2 * r - 1) / b).view(-1, 1, 1, 1, 1) * (U - OLD)).requires_grad_(True)
    assert gradient(nft(best, b=b, adaptive=False), best).abs().max() < 1e-12
    same = [
        gradient(
            nft_loss(
                nft_errors(v, OLD, U, TIMES, beta, adaptive=False), goodness(A.clamp(-1, 1), clip), clip, beta
            ),
            v,
        )
        for clip, beta in ((5.0, 0.1), (1.0, 0.5))
    ]
    torch.testing.assert_close(*same, rtol=1e-10, atol=1e-14)


def test_nft_with_its_weight_pulls_a_single_sample_to_the_bound():
    """4: along v = v_old + k / b (u - v_old) the gradient is the same for all |k| < 1."""
    r = torch.full([N], 0.6, dtype=torch.float64)
    found = []
    for k in (-0.9, 0.0, 0.4, 0.99):
        v = (OLD + k / 0.5 * (U - OLD)).requires_grad_(True)
        found.append(gradient(nft(v, r, b=0.5), v))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-9, atol=1e-13)
    beyond = (OLD + 1.01 / 0.5 * (U - OLD)).requires_grad_(True)
    assert ((gradient(nft(beyond, r, b=0.5), beyond) * found[0]) <= 0).all()  # and turns there


def test_nft_is_finite_at_both_ends_and_on_voxels():
    """15, and a batch of samples of different sizes."""
    v = at_old()
    ends = torch.tensor([0.0, 1.0] * 3, dtype=torch.float64)
    loss = nft_loss(nft_errors(v, OLD, U, ends), goodness(A))
    assert (
        loss.isfinite().all()
        and gradient(loss, v).isfinite().all()
        and not gradient(nft_errors(v, OLD, U, ends).positive, v)[0].any()
    )
    x = collate([voxels(1, 5), voxels(2, 9)])
    old, u, other = (
        with_feats(x, torch.randn(feats_of(x).shape, generator=torch.Generator().manual_seed(n)))
        for n in (3, 4, 5)
    )
    both = nft_errors(other, old, u, torch.tensor([0.3, 0.8]))
    alone = [
        nft_errors(*(collate([batch.samples()[i]]) for batch in (other, old, u)), torch.tensor([t]))
        for i, t in enumerate((0.3, 0.8))
    ]
    torch.testing.assert_close(both.negative, torch.cat([one.negative for one in alone]))


@pytest.mark.parametrize("name", DECAYS)
def test_decay_schedules_rise_within_bounds(name):
    """14; the recorded tables are compared elsewhere."""
    values = [decay(name, n) for n in range(0, 2000, 25)]
    assert all(0 <= value <= 1 for value in values) and values == sorted(values)


# Losses on steps.


STEP = ExactStep(FlowPath(sigma_min=0.0), 0.7, 0.6, 0.7)
X = normal(seed=5)
DRAWN = normal(seed=6)
TO = STEP.mean(X, OLD) + STEP.std * DRAWN


def of_step(v):
    mean = STEP.mean(X, v)
    mean_old = STEP.mean(X, OLD)
    return (
        log_density(TO, mean, STEP.std),
        log_density(TO, mean_old, STEP.std),
        divergence(mean, mean_old, STEP.std),
        mean,
        mean_old,
    )


def losses(v, advantage=A, limit=1e-3):
    log_p, old, far, *_ = of_step(v)
    guarded = guarded_ratio(log_p, old, far, STEP.std)
    ratio = torch.exp(log_p - old)
    return {
        "grpo": clipped_ratio_loss(torch.exp(log_p - old), advantage, limit),
        "grpo-guard": guard_loss(guarded, advantage, limit, STEP.length),
        "dppo": dppo_loss(ratio, advantage, dppo_dropped(ratio, far, advantage, limit)),
    }


@pytest.mark.parametrize("name", ["grpo", "grpo-guard", "dppo"])
def test_at_the_old_network_all_have_the_gradient_of_the_density(name):
    """6, 7: -A grad log p, of the guard times s / D."""
    v = at_old()
    wanted = gradient(-A * of_step(v)[0], v) * (STEP.std / STEP.length if name == "grpo-guard" else 1)
    torch.testing.assert_close(gradient(losses(v)[name], v), wanted, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("advantage", [2.0, -2.0])
@pytest.mark.parametrize("ratio", [0.5, 0.99, 1.0, 1.01, 2.0])
def test_the_clip_takes_the_gradient_on_the_side_that_the_advantage_asks_for(advantage, ratio):
    log_p = torch.tensor([math.log(ratio)], requires_grad=True)
    old = torch.zeros(1)
    A1 = torch.tensor([advantage])
    loss = clipped_ratio_loss(torch.exp(log_p - old), A1, 0.1)
    assert float(loss.detach()) == pytest.approx(
        -min(ratio * advantage, min(max(ratio, 0.9), 1.1) * advantage), rel=1e-6
    )
    loss.backward()
    cut = (ratio > 1.1 and advantage > 0) or (ratio < 0.9 and advantage < 0)
    found = outside_clip(torch.tensor([ratio]), A1, 0.1)
    assert (
        bool(found.stopped) is cut and bool(found.high) is (ratio > 1.1) and bool(found.low) is (ratio < 0.9)
    )
    assert float(log_p.grad) == pytest.approx(0 if cut else -ratio * advantage, rel=1e-6)


def test_the_guards_exponent_is_linear_in_the_mean_and_so_fair_to_both_sides():
    """7: it is m(z (mu - mu_old)); GRPO's ratio is below 1 in the mean, the guard's log is 0."""
    v = OLD + 0.1 * normal(seed=7)
    log_p, old, far, mean, mean_old = of_step(v)
    exponent = guarded_ratio(log_p, old, far, STEP.std).log()
    torch.testing.assert_close(
        exponent, mean_per_sample(DRAWN * (mean - mean_old), mean), rtol=1e-9, atol=1e-14
    )
    torch.testing.assert_close(log_p - old + far, exponent / STEP.std, rtol=1e-9, atol=1e-14)


def test_dppo_drops_what_moved_far_to_its_own_side_alone():
    """8: below the limit nobody, nor where A = 0, nor who moved against its advantage."""
    ratio = torch.tensor([1.2, 0.8, 1.2, 0.8, 1.2])
    far = torch.tensor([0.1, 0.1, 0.1, 0.1, 1e-4])
    advantage = torch.tensor([1.0, -1.0, -1.0, 1.0, 1.0])
    assert dppo_dropped(ratio, far, advantage, 1e-2).tolist() == [True, True, False, False, False]
    assert (
        not dppo_dropped(ratio, far, torch.zeros(5), 0.0).any()
        and not dppo_dropped(ratio, far, advantage, 1.0).any()
    )


# Losses on groups.


def of_groups(v, K):
    return [error(w, U).view(-1, K) for w in (v, OLD)]


def test_dgpo_is_a_softplus_whose_gradient_is_its_programs():
    """11: mean(sg(sigmoid(S)) A e); half of it at the reference; nothing where all A are 0."""
    v = normal(seed=2).requires_grad_(True)
    advantage = (A - A.mean()).view(2, 3)
    errors, ref = of_groups(v, 3)
    wanted = gradient(
        (group_margin(errors, ref, advantage, 10.0).detach().sigmoid()[:, None] * advantage * errors).mean(),
        v,
    )
    errors, ref = of_groups(v, 3)
    torch.testing.assert_close(
        gradient(dgpo_loss(errors, ref, advantage, 10.0).mean(), v), wanted, rtol=1e-10, atol=1e-14
    )
    start = at_old()
    errors, ref = of_groups(start, 3)
    wanted = gradient((advantage * of_groups(start, 3)[0]).mean() / 2, start)
    torch.testing.assert_close(
        gradient(dgpo_loss(errors, ref, advantage).mean(), start), wanted, rtol=1e-9, atol=1e-14
    )
    errors, ref = of_groups(start, 3)
    assert not gradient(dgpo_loss(errors, ref, torch.zeros(2, 3, dtype=torch.float64)), start).any()
    assert not dgpo_stopped(errors, ref, advantage).any()  # nobody has moved


def test_dgpo_of_two_is_dpo_over_beta():
    v = normal(seed=2).requires_grad_(True)
    B = 20.0
    errors, ref = of_groups(v, 2)
    signs = torch.tensor([[1.0, -1.0]], dtype=torch.float64).expand(3, 2)
    gained = ref - errors
    dpo = preference_loss(gained[:, 0] - gained[:, 1], B / 2) / B
    torch.testing.assert_close(dgpo_loss(errors, ref, signs, B), dpo, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(
        gradient(dgpo_loss(*of_groups(v, 2), signs, B), v), gradient(dpo, v), rtol=1e-10, atol=1e-14
    )


@pytest.mark.parametrize("name", ["nft", "grpo", "grpo-guard", "dppo", "dgpo"])
def test_a_permuted_group_has_permuted_gradients(name):
    """5."""
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    v = (OLD + 0.01 * normal(seed=8)).requires_grad_(True)

    def loss(rows):
        if name == "nft":
            return nft_loss(nft_errors(v[rows], OLD[rows], U[rows], TIMES[rows]), goodness(A[rows]))
        if name == "dgpo":
            errors, ref = (error(w[rows], U[rows]).view(1, -1) for w in (v, OLD))
            return dgpo_loss(errors, ref, A[rows].view(1, -1))
        to = TO[rows]
        means = [STEP.mean(X[rows], w[rows]) for w in (v, OLD)]
        log_p, old = (log_density(to, mean, STEP.std) for mean in means)
        if name == "grpo":
            return clipped_ratio_loss(torch.exp(log_p - old), A[rows], 1e-3)
        ratio = torch.exp(log_p - old)
        far = divergence(*means, STEP.std)
        if name == "dppo":
            return dppo_loss(ratio, A[rows], dppo_dropped(ratio, far, A[rows], 1e-3))
        return guard_loss(guarded_ratio(log_p, old, far, STEP.std), A[rows], 1e-3, STEP.length)

    torch.testing.assert_close(
        gradient(loss(order), v), gradient(loss(torch.arange(N)), v), rtol=1e-9, atol=1e-14
    )
