"""Test how a batch of pairs is sampled, and the loss of its errors: properties that hold for any network."""

import math
from dataclasses import replace

import pytest
import torch

from eg3d_rlhf.models.sparse import feats_of, separate
from eg3d_rlhf.tuning.flow.base.stage import FlowPath
from eg3d_rlhf.tuning.flow.training.dpo import TIME_BINS, PairErrors, draw_pairs, pair_loss, pair_stats
from eg3d_rlhf.tuning.flow.training.settings import DpoConfig
from tests.rejections import raising
from tests.tuning.flow.closed_forms import PerChannel, pair_of, stage_of, tokens

KINDS = pytest.mark.parametrize("sparse", [False, True], ids=["dense", "voxels"])
CONFIG = DpoConfig(beta=20.0)


def drawn(sparse: bool, pairs=None, config: DpoConfig = CONFIG, seed: int = 0, epoch: int = 0, no_cond=None):
    pairs = pairs or [pair_of(i, sparse) for i in range(4)]
    stage = stage_of(PerChannel(), sparse, path=FlowPath())
    return stage, draw_pairs(stage, pairs, tokens(len(pairs)), no_cond, config, seed, epoch)


def errors_of(stage, draw, model=None) -> torch.Tensor:
    return stage.path.errors((model or stage.model)(draw.x_t, draw.t, draw.cond), draw.x_0, draw.eps)


def some_errors(n: int = 6) -> PairErrors:
    g = torch.Generator().manual_seed(0)
    names = ("preferred", "rejected", "ref_preferred", "ref_rejected")
    return PairErrors(**{name: torch.rand(n, generator=g, dtype=torch.float64) for name in names})


@KINDS
def test_a_pair_shares_time_noise_and_condition(sparse):
    pairs = [pair_of(i, sparse) for i in range(4)]
    stage, draw = drawn(sparse, pairs)
    assert (
        torch.equal(draw.t[:4], draw.t[4:])
        and len(set(draw.t.tolist())) == 4
        and torch.equal(draw.cond[:4], draw.cond[4:])
    )
    eps = separate(draw.eps)
    x_0 = separate(draw.x_0)
    for i, pair in enumerate(pairs):
        for j, latent in ((i, pair.preferred), (i + 4, pair.rejected)):
            assert torch.equal(feats(x_0[j]), feats(latent))
        if sparse:
            shared = common(eps[i], eps[i + 4])
            assert shared and all(a == b for a, b in shared)
        else:
            assert torch.equal(eps[i], eps[i + 4])
    torch.testing.assert_close(feats_of(draw.x_t), feats_of(stage.path.mix(draw.x_0, draw.t, draw.eps)))


def feats(latent) -> torch.Tensor:
    return latent if isinstance(latent, torch.Tensor) else latent.feats


def common(a, b) -> list[tuple]:
    """Return the features of two samples on the voxels that both have."""
    known = dict(zip(map(tuple, a.coords.tolist()), a.feats.tolist(), strict=True))
    return [
        (known[tuple(c)], f)
        for c, f in zip(b.coords.tolist(), b.feats.tolist(), strict=True)
        if tuple(c) in known
    ]


@KINDS
def test_draws_derive_from_seed_id_and_epoch_alone(sparse):
    """Times and noises are the same in another batch, in another order and at a second call.

    They differ for another seed, epoch or id.
    """
    pairs = [pair_of(i, sparse) for i in range(4)]
    stage = stage_of(PerChannel(), sparse)
    config = replace(CONFIG, condition_dropout=0.5)
    cond = tokens(4)
    no_cond = torch.zeros(1, 2, 3)
    whole = draw_pairs(stage, pairs, cond, no_cond, config, 0, 3)
    torch.manual_seed(123)
    part = draw_pairs(stage, [pairs[2], pairs[0]], cond[[2, 0]], no_cond, config, 0, 3)
    for i, j in ((0, 2), (1, 0), (2, 6), (3, 4)):
        assert part.t[i] == whole.t[j] and torch.equal(part.cond[i], whole.cond[j])
        assert torch.equal(feats(separate(part.x_t)[i]), feats(separate(whole.x_t)[j]))
    for other in (
        draw_pairs(stage, pairs, cond, no_cond, config, 1, 3),
        draw_pairs(stage, pairs, cond, no_cond, config, 0, 4),
        draw_pairs(stage, [replace(p, id=p.id + "'") for p in pairs], cond, no_cond, config, 0, 3),
    ):
        assert not (other.t == whole.t).any() and not (feats_of(other.eps) == feats_of(whole.eps)).any()


def test_conditions_are_dropped_for_both_of_a_pair_in_their_share():
    pairs = [replace(pair_of(0), id=f"{i}") for i in range(300)]
    _, draw = drawn(False, pairs, replace(CONFIG, condition_dropout=0.1), no_cond=torch.zeros(1, 2, 3))
    dropped = (draw.cond == 0).flatten(1).all(1)
    assert torch.equal(dropped[:300], dropped[300:]) and 0.05 < dropped.float().mean() < 0.16


@KINDS
def test_identical_pairs_cost_log_two_and_give_no_gradient(sparse):
    """The gradients of the two samples cancel exactly, so the gradient of the weights is only the rounding of
    a sum of zeros.
    """
    stage, draw = drawn(sparse, [pair_of(i, sparse, same=True) for i in range(4)])
    ref = errors_of(stage, draw, PerChannel(seed=1)).detach()
    v = stage.model(draw.x_t, draw.t, draw.cond)
    feats_of(v).retain_grad()
    found = PairErrors.split(stage.path.errors(v, draw.x_0, draw.eps), ref)
    losses = pair_loss(found, CONFIG)
    torch.testing.assert_close(losses, torch.full((4,), math.log(2)))
    losses.mean().backward(retain_graph=True)
    first, second = feats_of(v).grad.chunk(2)
    assert torch.equal(first, -second) and first.abs().max() > 1e-3
    left = max(p.grad.abs().max() for p in stage.model.parameters())
    stage.model.zero_grad()
    pair_loss(replace(found, rejected=found.rejected.detach()), CONFIG).mean().backward()
    assert left < 1e-5 * max(p.grad.abs().max() for p in stage.model.parameters())


def test_delta_is_positive_where_the_policy_gained_more_on_the_preferred():
    e = some_errors()
    torch.testing.assert_close(e.delta(), (e.ref_preferred - e.preferred) - (e.ref_rejected - e.rejected))
    torch.testing.assert_close(
        e.delta(0.5), (e.ref_preferred - e.preferred) - 0.5 * (e.ref_rejected - e.rejected)
    )
    swapped = PairErrors(
        preferred=e.rejected, rejected=e.preferred, ref_preferred=e.ref_rejected, ref_rejected=e.ref_preferred
    )
    torch.testing.assert_close(swapped.delta(), -e.delta())


def test_losses_against_their_formulas():
    e = some_errors()
    w = torch.linspace(0.5, 1.5, 6, dtype=torch.float64)
    z = 20.0 * e.delta(0.5)
    log_sigmoid = torch.nn.functional.logsigmoid
    anchored = replace(CONFIG, loser_weight=0.5, sft_weight=0.3)
    torch.testing.assert_close(pair_loss(e, anchored), -log_sigmoid(z) + 0.3 * e.preferred)
    torch.testing.assert_close(pair_loss(e, anchored, w), -log_sigmoid(w * z) + 0.3 * e.preferred)
    alone = PairErrors(preferred=e.preferred, rejected=e.rejected)
    torch.testing.assert_close(pair_loss(alone, DpoConfig(kind="sft")), e.preferred)
    torch.testing.assert_close(pair_loss(alone, DpoConfig(kind="sft"), w), w * e.preferred)
    torch.testing.assert_close(
        pair_loss(alone, DpoConfig(kind="dro", loser_weight=0.5)), e.preferred - 0.5 * e.rejected
    )


def test_gradients_are_the_derivatives_and_the_reference_gets_none():
    e = some_errors()
    inputs = [getattr(e, name).requires_grad_() for name in ("preferred", "rejected")]

    def loss(preferred, rejected):
        return pair_loss(
            replace(e, preferred=preferred, rejected=rejected),
            replace(CONFIG, loser_weight=0.5, sft_weight=0.2),
        )

    assert torch.autograd.gradcheck(loss, inputs)
    ref = torch.rand(4, requires_grad=True)
    split = PairErrors.split(torch.rand(4), ref)
    assert not split.ref_preferred.requires_grad and torch.equal(split.ref_rejected, ref[2:])


def test_weights_come_with_the_pairs_all_or_none():
    pairs = [replace(pair_of(i), w2=w) for i, w in enumerate((0.5, 1.0, 1.5, 2.0))]
    assert drawn(False, pairs)[1].weight.tolist() == [0.5, 1.0, 1.5, 2.0]
    assert drawn(False)[1].weight is None
    with raising("draw_pairs", "w2", "pair-1"):
        drawn(False, [pairs[0], replace(pairs[1], w2=None)])


def test_statistics_of_a_batch():
    e = PairErrors(
        preferred=torch.tensor([1.0, 2.0, 3.0]),
        rejected=torch.tensor([2.0, 2.0, 2.0]),
        ref_preferred=torch.tensor([1.5, 2.0, 2.0]),
        ref_rejected=torch.tensor([1.0, 2.0, 2.0]),
    )
    stats = pair_stats(e, e.delta(), torch.tensor([0.05, 0.95, 1.0, 0.05, 0.95, 1.0]))
    assert e.delta().tolist() == [1.5, 0, -1]
    expected = {
        "pairs": [1, 2],
        "implicit_accuracy": [1, 0.5],
        "margin": [1.5, -1],
        "w_diff": [-0.5, 1],
        "l_diff": [1, 0],
    }
    for name, (first, last) in expected.items():
        sums = stats[name]
        assert (
            sums.shape == (TIME_BINS,) and sums[0] == first and sums[-1] == last and (sums[1:-1] == 0).all()
        )


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"kind": "ppo"}, ("--loss", "sft", "dro", "ppo")),
        ({"beta": -1.0}, ("beta", "0", "-1.0")),
        ({"loser_weight": -1.0}, ("loser_weight", "0", "-1.0")),
        ({"condition_dropout": 1.5}, ("condition_dropout", "1", "1.5")),
        ({"kind": "sft", "loser_weight": 0.5}, ("loser_weight", "sft", "0.5")),
    ],
)
def test_settings_are_checked(options, names):
    with raising(*names):
        DpoConfig(**options)


def test_a_remedy_names_only_changes_that_are_not_made():
    plain = DpoConfig(beta=20.0).remedy
    assert all(name in plain for name in ("loser_weight", "0.5", "sft_weight", "beta", "20"))
    halved = DpoConfig(loser_weight=0.5, sft_weight=0.5).remedy
    assert "0.25" in halved and "sft_weight" not in halved
    assert "loser_weight" not in DpoConfig(loser_weight=0).remedy
    fine_tuning = DpoConfig(kind="sft").remedy
    assert not any(name in fine_tuning for name in ("loser_weight", "sft_weight", "beta"))
