"""DreamDPO on the analytic prior: T1, T2, T4, T5, and what its settings mean. T3 is
tests/compat/test_distill_dreamdpo.py.
"""

import itertools
import math

import pytest
import torch

from eg3d_rlhf.tuning.distill.guidance.dreamdpo import DreamDpo
from eg3d_rlhf.tuning.distill.guidance.settings import DreamDpoSettings, RankingSettings
from eg3d_rlhf.tuning.distill.schedule import Streams
from tests.rejections import raising
from tests.tuning.distill.particles import (
    BRIEF,
    PROMPT,
    Along,
    Prefers,
    Towards,
    gain,
    optimise,
    prior,
    sds_outcome,
    some,
)

STREAMS = Streams(seed=1)
RAW = RankingSettings(standardise=False)


def dpo(made, reward=None, judge=None, views=1, **settings) -> DreamDpo:
    return DreamDpo(
        made, DreamDpoSettings(**settings), views=views, streams=STREAMS, reward=reward, judge=judge
    )


@pytest.mark.parametrize(
    ("kind", "low", "high"), [("good", 0.95, 1.0), ("bad", 0.0, 0.05), ("random", 0.4, 0.6)]
)
def test_t1_the_preferred_mode_is_reached(kind, low, high):
    made = prior()
    end = optimise(dpo(made, Towards(made, kind)), made, **BRIEF)
    print("T1", kind, end, "| sds", sds_outcome())
    assert low <= end.share <= high and end.rms <= 2 * sds_outcome().rms


@pytest.mark.long
def test_t2_a_larger_tau_trades_reward_for_likelihood():
    made = prior(1)
    ends = [
        optimise(dpo(made, Along(made), tau=tau, ranking=RAW), made, **BRIEF)
        for tau in (0.001, 0.1, 0.3, math.inf)
    ]
    print(
        "T2",
        [(round(gain(end), 2), round(end.log_p, 2)) for end in ends],
        "| sds",
        gain(sds_outcome(1)),
        sds_outcome(1),
    )
    assert all(gain(a) > gain(b) and a.log_p < b.log_p for a, b in itertools.pairwise(ends))
    assert gain(ends[-1]) > gain(sds_outcome(1)) + 0.1
    inverted = optimise(dpo(made, Along(made, -1.0), ranking=RAW), made, **BRIEF)
    assert gain(inverted) == pytest.approx(-gain(ends[0]), rel=0.15)


@pytest.mark.long
def test_t4_a_judge_of_signs_does_what_the_reward_does():
    made = prior()
    shares = [
        optimise(guidance, made, **BRIEF).share
        for guidance in (dpo(made, Towards(made)), dpo(made, judge=Prefers(Towards(made))))
    ]
    print("T4", shares)
    assert abs(shares[0] - shares[1]) <= 0.05 and min(shares) >= 0.95


@pytest.mark.long
def test_t5_one_guidance_scale_for_both_diverges():
    made = prior()
    with pytest.warns(UserWarning, match=r"lose_guidance_scale.*\b7\.5\b"):
        guidance = dpo(made, Towards(made), lose_guidance_scale=None)
    end = optimise(guidance, made, steps=800, lr=0.05)
    print("T5", end)
    assert end.log_p < sds_outcome().log_p - 100


def test_an_infinite_tau_pulls_alone():
    made = prior()
    args = some()
    output = dpo(made, Towards(made), tau=math.inf)(*args)
    far = dpo(made, Towards(made), tau=0.0)(*args)
    assert output.one_sided.all() and not far.one_sided.any() and torch.equal(output.winner, far.winner)
    x, t = args[:2]
    d = dpo(made, Towards(made)).denoiser
    noise = STREAMS.noises(2, x, 3)
    x_t = d.noised(x, noise, t)
    prediction = d.predict(x_t, t, d.conditioning([PROMPT] * 4, None), None)
    b = torch.arange(4)
    pulled = (d.schedule.weight(t, "sds", x) * (prediction.guided(7.5) - noise))[output.winner, b]
    torch.testing.assert_close(output.grad, pulled)
    pushed = (d.schedule.weight(t, "sds", x) * (prediction.text - noise))[1 - output.winner, b]
    torch.testing.assert_close(far.grad, pulled - pushed)


def test_views_of_an_asset_have_one_winner_unless_ranked_alone():
    made = prior()
    args = some(assets=3, views=4)
    together = dpo(made, Towards(made), views=4)(*args)
    alone = dpo(made, Towards(made), views=4, ranking=RankingSettings(pair_level="view"))(*args)
    assert together.winner.shape == (3,) and together.scores.shape == (2, 3) and alone.winner.shape == (12,)
    single = dpo(made, Towards(made))(*args)
    torch.testing.assert_close(alone.grad, single.grad)
    assert not torch.allclose(together.grad, alone.grad)


def test_a_quantile_as_tau_splits_the_gaps():
    made = prior()
    args = some(assets=64)
    sided = dpo(made, Towards(made), tau=0.75, tau_mode="quantile")(*args).one_sided
    assert 0.7 <= float(sided.float().mean()) <= 0.8


def test_a_judge_replaces_or_promotes():
    made = prior()
    args = some(assets=16)
    by_reward = dpo(made, Towards(made))(*args)
    opposite = Prefers(Towards(made, "bad"))
    assert torch.equal(dpo(made, Towards(made), opposite)(*args).winner, 1 - by_reward.winner)
    promoted = dpo(made, Towards(made), opposite, ranking=RankingSettings(judge_mode="or"))(*args)
    assert (promoted.winner == 0).all()  # one of the two always says so
    assert torch.equal(promoted.one_sided, by_reward.winner == 1)  # a negative gap
    silent = dpo(made, Towards(made), Prefers(None, silent=True))(*args)
    assert (silent.winner == -1).all() and silent.one_sided.all()


def test_a_reward_or_judge_that_answers_nonsense():
    made = prior()
    args = some()

    class Bad(Towards):
        def score(self, pixels, prompts):
            return torch.full((len(pixels),), math.nan)

    class Short(Towards):
        def score(self, pixels, prompts):
            return torch.zeros(3)

    with raising("--reward", "NaN"):
        dpo(made, Bad(made))(*args)
    with raising("--reward", "[3]", "[8]"):
        dpo(made, Short(made))(*args)
    judge = Prefers(Towards(made))
    judge.judge = lambda prompts, pairs: [2] * len(pairs)
    with raising("--judge", "4", "0, 1 or -1"):
        dpo(made, judge=judge)(*args)
