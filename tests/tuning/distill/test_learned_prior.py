"""The claims about DreamDPO (T1, T5) and PSD (P2, P5) on the analytic prior, tested on learned noise: the
bundled U-Net.

Images of boxes, four views of each, are optimised directly from grey noise. A prompt's two emblems are one
another's permutations; the reward likes the first, and likes more of it than there is. The
exact prior of the same images measures the outcome.
"""

import functools
from typing import NamedTuple, cast

import pytest
import torch

from eg3d_rlhf.core.interfaces import RewardModel
from eg3d_rlhf.rewards import box_prompts
from eg3d_rlhf.rewards import boxes as problem
from eg3d_rlhf.rewards.images.analytic import Inverted, ModeDistance, Random
from eg3d_rlhf.tuning.distill.guidance.dreamdpo import DreamDpo
from eg3d_rlhf.tuning.distill.guidance.psd import Psd
from eg3d_rlhf.tuning.distill.guidance.sds import Sds
from eg3d_rlhf.tuning.distill.guidance.settings import (
    DenoiserSettings,
    DreamDpoSettings,
    PsdSettings,
    SdsSettings,
)
from eg3d_rlhf.tuning.distill.priors.tiny_unet import load_view_prior
from eg3d_rlhf.tuning.distill.schedule import Streams
from eg3d_rlhf.tuning.distill.schedules_by_step import Ramp, TimeWindow
from tests.tuning.distill.particles import optimise
from tests.tuning.distill.problem_runs import exact_prior

pytestmark = pytest.mark.long

BOXES = [prompt.text for prompt in box_prompts.PROMPTS if prompt.kind == "mode"] * 3  # 33 assets
VIEWS = [text for text in BOXES for _ in range(problem.SIDES)]  # 132 images
SCALE = 1.5
STEPS = 200
RATE = 0.05
FALLING = TimeWindow(high=Ramp((0, 0.98, 0.15, 0.6 * STEPS)))  # as the mode has it
SEED = 0  # settings were chosen on seed 11
REWARDS = {"good": ModeDistance, "bad": lambda: Inverted(cast(RewardModel, ModeDistance())), "random": Random}
MODE = {"tau_mode": "quantile", "tau": 0.5}  # as the mode has it with its bundled priors


def missed(*values, why: str):
    """A case that misses its bound by a known figure."""
    return pytest.param(*values, marks=pytest.mark.xfail(strict=True, reason=why))


class End(NamedTuple):
    """Figures of one run."""

    share: float  # of images nearer to the first emblem
    rms: float  # root mean square distance per entry to the nearest mode, whose entries are in -1..1
    log_p: float  # median of the exact prior, in nats, against that of the mode itself

    def __str__(self):
        return f"share {self.share:.3f} rms {self.rms:.3f} log p {self.log_p:.1f}"


def measure(x: torch.Tensor, made) -> End:
    """Return the figures of images [B, 4, 16, 16]."""
    del made
    exact = exact_prior()
    both = 2 * problem.modes_of(VIEWS) - 1
    cond = exact.embed(VIEWS)
    square = (x[:, None] - both).square().flatten(2).mean(2)  # [B, 2]
    log_p = exact.log_prob(x, cond) - exact.log_prob(both[:, 0], cond)
    return End(
        float((square[:, 0] < square[:, 1]).float().mean()),
        float(square.amin(1).mean().sqrt()),
        float(log_p.median()),
    )


@functools.cache
def end_of(method: str, kind: str = "", **settings) -> End:
    """Return the outcome of one arm."""
    prior = load_view_prior()
    denoiser = DenoiserSettings(guidance_scale=SCALE)
    common = {"views": prior.views, "streams": Streams(seed=SEED + 1000)}
    if method == "sds":
        guidance = Sds(prior, SdsSettings(prior=denoiser, **settings), **common)
    elif method == "dreamdpo":
        guidance = DreamDpo(
            prior, DreamDpoSettings(prior=denoiser, **settings), reward=REWARDS[kind](), **common
        )
    else:
        guidance = Psd(
            prior,
            PsdSettings(prior=denoiser, negative_update="none", **settings),
            reward=REWARDS[kind](),
            **common,
        )
    return optimise(
        guidance, prior, steps=STEPS, lr=RATE, seed=SEED, window=FALLING, prompts=VIEWS, measure=measure
    )


@pytest.mark.parametrize(
    ("kind", "low", "high"), [("good", 0.95, 1.0), ("bad", 0.0, 0.05), ("random", 0.4, 0.6)]
)
def test_t1_dreamdpo_reaches_the_preferred_mode(kind, low, high):
    end = end_of("dreamdpo", kind, **MODE)
    print("T1", kind, end, "| sds", end_of("sds"))
    assert end.rms <= 2 * end_of("sds").rms and low <= end.share <= high


def test_t5_one_guidance_scale_for_both_diverges():
    with pytest.warns(UserWarning, match=r"lose_guidance_scale.*\b1\.5\b"):
        end = end_of("dreamdpo", "good", lose_guidance_scale=None)
    print("T5", end, "| the loser at 1", end_of("dreamdpo", "good"), "| sds", end_of("sds"))
    assert end.log_p < end_of("sds").log_p - 100


@pytest.mark.parametrize(
    ("kind", "low", "high"), [("good", 0.95, 1.0), ("bad", 0.0, 0.05), ("random", 0.4, 0.6)]
)
def test_p2_psd_reaches_the_preferred_mode(kind, low, high):
    end = end_of("psd", kind, eta=1.0)
    print("P2", kind, end, "| sds", end_of("sds", samples=2))
    assert end.rms <= 1.5 * end_of("sds", samples=2).rms and low <= end.share <= high


@pytest.mark.parametrize(
    "eta", [0.5, 1.0, missed(2.0, why="log p drops 7.9"), missed(5.0, why="log p drops 35")]
)
def test_p5_more_eta_costs_little_likelihood(eta):
    sds_end = end_of("sds", samples=2)
    end = end_of("psd", "good", eta=eta)
    print("P5", eta, end, "| sds", sds_end)
    assert sds_end.log_p - end.log_p <= 5
