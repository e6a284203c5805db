"""Preference score distillation on the analytic prior: P2 to P6. P1 is in test_methods.py."""

import functools
import itertools

import pytest
import torch

from eg3d_rlhf.tuning.distill.guidance.dreamreward import DreamReward
from eg3d_rlhf.tuning.distill.guidance.psd import Psd
from eg3d_rlhf.tuning.distill.guidance.settings import DreamRewardSettings, PsdSettings, RankingSettings
from eg3d_rlhf.tuning.distill.schedule import Streams
from eg3d_rlhf.tuning.distill.schedules_by_step import Ramp
from tests.tuning.distill.particles import (
    BRIEF,
    Along,
    Outcome,
    Prefers,
    Towards,
    gain,
    optimise,
    prior,
    sds_outcome,
    some,
)

STREAMS = Streams(seed=1)
ETAS = (0.5, 1.0, 2.0, 5.0)


def psd(made, reward=None, judge=None, views=1, update="none", **settings) -> Psd:
    return Psd(
        made,
        PsdSettings(negative_update=update, **settings),
        views=views,
        streams=STREAMS,
        reward=reward,
        judge=judge,
    )


@pytest.mark.long
@pytest.mark.parametrize(
    ("kind", "low", "high"), [("good", 0.95, 1.0), ("bad", 0.0, 0.05), ("random", 0.4, 0.6)]
)
def test_p2_the_preferred_mode_is_reached(kind, low, high):
    made = prior()
    end = optimise(psd(made, Towards(made, kind)), made, steps=800, lr=0.03)
    print("P2", kind, end, "| sds", sds_outcome(2, 2))
    assert low <= end.share <= high and end.rms <= 1.5 * sds_outcome(2, 2).rms


@functools.cache
def along(eta: float, sign: float = 1.0) -> Outcome:
    """Within one mode, a linear reward."""
    made = prior(1)
    return optimise(psd(made, Along(made, sign), eta=eta), made, **BRIEF)


@pytest.mark.long
def test_p2b_the_sign_within_a_mode():
    print("P2b", gain(along(1.0)), gain(along(1.0, -1.0)))
    assert gain(along(1.0)) > 0.05 and gain(along(1.0, -1.0)) < -0.05


@pytest.mark.long
def test_p3_p5_more_eta_more_reward_and_little_drift():
    ends = [along(eta) for eta in ETAS]
    print(
        "P3, P5",
        [(eta, round(gain(end), 3), round(end.log_p, 2)) for eta, end in zip(ETAS, ends, strict=True)],
        "| sds",
        sds_outcome(1, 2),
    )
    assert all(gain(a) < gain(b) for a, b in itertools.pairwise(ends)) and gain(ends[0]) > gain(
        sds_outcome(1, 2)
    )
    assert all(sds_outcome(1, 2).log_p - end.log_p <= 5 for end in ends)


@pytest.mark.long
@pytest.mark.parametrize("update", ["reward", "preference"])
def test_p4_the_null_embedding_alone(update):
    made = prior()
    for kind in ("good", "bad"):
        guidance = psd(made, Towards(made, kind), update=update, eta=0.0, negative_rate=0.1)
        end = optimise(guidance, made, steps=800, lr=0.03)
        # of the two broad components
        shares = (made.prompts[""] + guidance.moved[:, 0]).softmax(1).mean(0)[2:]
        print("P4", update, kind, end, shares.tolist())
        wanted, other = shares if kind == "good" else shares.flip(0)
        assert other > wanted + 0.05
        if update == "reward":
            assert end.share >= 0.9 if kind == "good" else end.share <= 0.1
        else:
            assert end.share >= 0.6 if kind == "good" else end.share <= 0.4


@pytest.mark.long
def test_p6_a_tenfold_weight_spoils_the_pixel_gradient_and_not_psd():
    made = prior(1)
    drops = {}
    drops["psd"] = [sds_outcome(1, 2).log_p - along(eta).log_p for eta in (0.5, 5.0)]
    for name, balance, weights in (
        ("pixel", "none", (1.0, 10.0)),
        ("balanced", "grad-norm", (0.1, 1.0)),
    ):
        settings = [DreamRewardSettings(weight=Ramp(weight), balance=balance) for weight in weights]
        guidances = [DreamReward(made, s, views=1, streams=STREAMS, reward=Along(made)) for s in settings]
        drops[name] = [
            sds_outcome(1).log_p - optimise(guidance, made, **BRIEF).log_p for guidance in guidances
        ]
    print("P6", drops)
    assert max(drops["psd"]) <= 5 < min(max(drops["pixel"]), max(drops["balanced"]))


@pytest.mark.parametrize("update", ["reward", "preference"])
def test_the_null_embedding_follows_its_schedule_and_ball(update):
    made = prior()
    args = some(4, 2)
    guidance = psd(
        made,
        Towards(made),
        views=2,
        update=update,
        negative_from=4,
        negative_every=4,
        negative_rate=10.0,
        negative_ball=0.2,
    )
    outputs = [guidance(*args[:4], step) for step in range(10)]
    drift = torch.stack([o.terms.get("negative_drift", torch.zeros(4)) for o in outputs])
    assert (
        (drift[:4] == 0).all()
        and (drift[4] > 0).any()
        and torch.equal(drift[4], drift[7])
        and not torch.equal(drift[7], drift[8])
    )
    assert drift.max() <= 0.2 + 1e-5 and guidance.moved.shape == (4, 1, 4)


def test_each_asset_has_its_own_null_embedding():
    made = prior()
    x, t, prompts, *_ = some(6)
    raw = RankingSettings(standardise=False)  # whose spread would be that of all assets
    full, part = (psd(made, Towards(made), update="reward", ranking=raw, negative_rate=0.1) for _ in range(2))
    full(x, t, prompts, None, 0)
    noises = STREAMS.noises(2, x, 0)
    part.denoiser.streams = type("Cut", (), {"noises": lambda self, n, like, step: noises[:, :2]})()
    part(x[:2], t[:2], prompts[:2], None, 0)
    torch.testing.assert_close(full.moved[:2], part.moved)


def test_the_gradient_grows_with_eta_and_opposes_the_loser():
    made = prior()
    args = some(6)
    off, on, more = (psd(made, Towards(made), eta=eta)(*args).grad for eta in (0.0, 1.0, 3.0))
    torch.testing.assert_close(more - off, 3 * (on - off), rtol=1e-3, atol=1e-3)
    gradient = psd(made, Towards(made, "bad"), eta=1.0)(*args).grad
    torch.testing.assert_close(gradient - off, off - on, rtol=1e-3, atol=1e-3)


def test_no_answer_is_distillation_alone():
    made = prior()
    args = some(6)
    silent = psd(made, judge=Prefers(None, silent=True))(*args)
    torch.testing.assert_close(silent.grad, psd(made, Towards(made), eta=0.0)(*args).grad)
    assert silent.one_sided.all()
