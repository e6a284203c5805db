"""Search on latents: it raises the reward, its stop and its gate are what the trace says, and samples are
independent of each other.
"""

import dataclasses

import numpy as np
import pytest
import torch

from eg3d_rlhf.generators import load_generator, ws_of_seeds
from eg3d_rlhf.rewards.reward import load_reward
from eg3d_rlhf.tuning.gan.latent_search import Guidance, ascend, best_step, check_heldout, improve, join
from eg3d_rlhf.tuning.gan.search_settings import BUNDLED_GATE, SearchConfig, parse_steps
from tests.rejections import raising
from tests.tiny_runs import state

STEPS = 6
FREE = SearchConfig(steps=STEPS, gate=False)


@pytest.fixture(scope="module")
def generator(tiny_networks):
    return load_generator(tiny_networks).generator


@pytest.fixture(scope="module")
def reward(tiny_reward):
    return load_reward(tiny_reward)


@pytest.fixture(scope="module")
def heldout(tiny_reward):
    """A reward with other weights than `reward`."""
    other = load_reward(tiny_reward)
    torch.manual_seed(8)
    with torch.no_grad():
        for parameter in other.network.parameters():
            parameter.add_(0.3 * parameter.std(unbiased=False) * torch.randn_like(parameter))
    return other


@pytest.fixture(scope="module")
def guidance(generator, reward):
    return Guidance(generator, reward)


@pytest.fixture(scope="module")
def ws(generator):
    return ws_of_seeds(generator, [3, 4, 5])


@pytest.fixture(scope="module")
def free(generator, ws, guidance, heldout):
    """Ungated search of all steps."""
    return ascend(generator, ws, guidance, heldout, FREE)


def test_the_reward_rises_and_is_that_of_the_latents(free, generator, reward, ws):
    assert (free.rewards[:, -1] > free.rewards[:, 0]).all()
    with torch.no_grad():
        assert np.allclose(reward.score(generator.field(free.ws)).numpy(), free.rewards[:, -1], atol=1e-5)
        assert np.allclose(reward.score(generator.field(ws)).numpy(), free.rewards[:, 0], atol=1e-5)


def test_all_layers_of_a_sample_share_one_offset(free, ws):
    offsets = free.ws - ws  # [N, L, W]
    assert torch.allclose(offsets, offsets[:, :1].expand_as(offsets), atol=1e-6)
    assert offsets.abs().amax() > 0


def test_the_first_step_of_adam_has_the_size_of_the_learning_rate(free):
    first = free.path[:, 1].abs()
    assert torch.allclose(first.amax(dim=1), torch.full((3,), FREE.learning_rate), rtol=0.02)


def test_fewer_steps_are_a_prefix(free, generator, ws, guidance, heldout):
    shorter = ascend(generator, ws, guidance, heldout, dataclasses.replace(FREE, steps=2))
    assert torch.equal(shorter.ws, free.ws_at(np.full(3, 2)))
    assert np.array_equal(shorter.rewards, free.rewards[:, :3])


def test_a_batch_gives_each_sample_what_it_gets_alone(free, generator, ws, guidance, heldout):
    alone = join([ascend(generator, part, guidance, heldout, FREE) for part in ws.split(1)])
    assert torch.allclose(alone.ws, free.ws, atol=1e-4)
    assert np.allclose(alone.rewards, free.rewards, atol=1e-4)


def test_auto_keeps_the_best_step_of_the_trace_and_stops_after_patience(
    free, generator, ws, guidance, heldout
):
    config = SearchConfig(gate=False, max_steps=STEPS, patience=1)
    auto = ascend(generator, ws, guidance, heldout, config)
    for index, trace in enumerate(free.heldout):
        best, is_stopped = best_step(trace, 1)
        assert auto.steps[index] == best
        made = int(np.isfinite(auto.rewards[index]).sum()) - 1
        assert made == (best + 1 if is_stopped else STEPS)
    expected_heldout = free.heldout[np.arange(3), auto.steps]
    assert (expected_heldout >= free.heldout[:, 0]).all()
    assert torch.allclose(auto.ws, free.ws_at(auto.steps), atol=1e-4)


@pytest.mark.parametrize(
    ("trace", "patience", "expected"),
    [
        ([5.0, 1.0, 1.0], 2, (0, True)),
        ([0.0, 1.0, 2.0], 2, (2, False)),
        ([0.0, 1.0, 1.0, 1.0], 2, (1, True)),
        ([0.0, -1.0, 3.0, 2.0, 4.0], 2, (4, False)),
        ([0.0], 1, (0, False)),
    ],
)
def test_best_step_by_hand(trace, patience, expected):
    assert best_step(np.array(trace), patience) == expected


def test_the_gate_leaves_high_samples_bitwise(free, generator, ws, guidance, heldout, monkeypatch):
    initial = free.rewards[:, 0]
    threshold = float(np.sort(initial)[1])  # one sample lies above it
    monkeypatch.setattr(guidance, "quantile", lambda share: threshold)
    gated = ascend(generator, ws, guidance, heldout, dataclasses.replace(FREE, gate=True))
    expected = initial > threshold
    assert expected.sum() == 1 and np.array_equal(gated.gated, expected)
    assert torch.equal(gated.ws[expected], ws[expected])
    assert (gated.steps == np.where(expected, 0, STEPS)).all()
    assert torch.allclose(gated.ws[~expected], free.ws[~expected], atol=1e-4)


def test_the_threshold_is_the_quantile_of_the_scores_of_the_generator(guidance):
    scores = guidance.initial_scores.numpy()
    assert BUNDLED_GATE == 0.55
    assert np.isclose(guidance.quantile(BUNDLED_GATE), np.quantile(scores, 0.55), atol=1e-6)


def test_generator_and_rewards_stay(generator, ws, guidance, heldout):
    before = [state(generator.module), state(guidance.reward), state(heldout)]
    ascend(generator, ws[:1], guidance, heldout, dataclasses.replace(FREE, steps=2))
    after = [state(generator.module), state(guidance.reward), state(heldout)]
    for values_before, values_after in zip(before, after, strict=True):
        assert all(torch.equal(values_before[name], values_after[name]) for name in values_before)


def test_improve_is_the_search_in_batches(generator, ws, reward, heldout, guidance):
    batches = []
    result = improve(generator, ws, reward, heldout, steps=2, gate=False, batch=2, on_batch=batches.append)
    expected = join(
        [
            ascend(generator, part, guidance, heldout, dataclasses.replace(FREE, steps=2))
            for part in ws.split(2)
        ]
    )
    assert [len(batch.steps) for batch in batches] == [2, 1]
    assert torch.equal(result.ws, expected.ws) and np.array_equal(result.rewards, expected.rewards)


def test_what_cannot_stop_a_search_is_rejected(generator, ws, reward, heldout):
    check_heldout(reward, heldout)
    with raising("--heldout-reward"):
        improve(generator, ws, reward, steps="auto")
    with raising("--heldout-reward"):
        improve(generator, ws, reward, reward)
    with raising("--steps"):
        parse_steps("0")
    with raising("--steps"):
        SearchConfig(steps=0)
    with raising("improve"):
        improve(generator, ws[:, :1], reward, heldout)
