"""Test problem: its prompts and objects, the detector of noses on any surface, and a prior that sees one
side.
"""

import math

import pytest
import torch

from eg3d_rlhf.core.interfaces import DiffusionPrior
from eg3d_rlhf.generators.assets.views import FourViews
from eg3d_rlhf.rewards import box_prompts
from eg3d_rlhf.rewards import boxes as problem
from eg3d_rlhf.rewards.boxes import noses
from eg3d_rlhf.tuning.distill.schedule import Streams
from tests.rejections import raising
from tests.tuning.distill.problem_runs import BLACK, exact_prior, heads, shares

HEAD = box_prompts.PROMPTS[0]
BOX = box_prompts.PROMPTS[14]
FACES = torch.tensor(
    [[0, 0, 0, 0], [0, 1, 0, 0], [1, 0, 1, 0], [0, 1, 1, 1], [1, 1, 1, 1]], dtype=torch.float32
)


def render(asset):
    return FourViews().render(asset, FourViews().draw(len(asset), torch.Generator()), BLACK).images


def test_first_pairs_are_of_both_kinds_and_unknown_prompts_are_rejected():
    kinds = [box_prompts.prompt_of(text).kind for text, _ in box_prompts.pairs()]
    assert kinds.count("janus") == kinds.count("mode") == 55 and kinds[:6].count("janus") == 3
    with raising("--prompt"):
        box_prompts.prompt_of("a cat")


def test_a_side_does_not_change_the_views_of_other_sides():
    for prompt in (HEAD, BOX):
        seen = render(problem.build(prompt, FACES)).unflatten(0, (-1, 4))
        both = problem.modes_of([prompt.text])[0]
        for asset, sides in zip(seen, FACES, strict=True):
            for view, face in zip(asset, sides, strict=True):
                # a little of the next side is visible
                assert torch.allclose(view, both[0 if face else 1], atol=0.06)
    assert float((both[0] - both[1]).abs().max()) > 0.3


@pytest.mark.parametrize("resolution", [16, 24])
def test_the_detector_counts_on_voxels_of_any_resolution(resolution):
    assert noses(problem.build(HEAD, FACES, resolution)).tolist() == [0, 1, 2, 3, 4]
    assert noses(problem.build(BOX, FACES, resolution)).tolist() == [0] * 5  # paint does not count as a nose


def test_the_detector_ignores_walls_specks_and_low_bumps():
    head = problem.build(HEAD, FACES[:1])
    wall, speck, deep = (head.select([0]) for _ in range(3))
    _, _, towards = problem.side_axes(16, 0)
    wall.shape[:, towards > 12.5] = 3.0  # the recess is closed
    speck.shape[0, 13, 8, 8] = 3.0  # one voxel floats
    deep.shape[:, problem.nose_voxels(16, 0) & (towards < 12.5)] = 3.0  # a low bump of one voxel
    assert [int(noses(shape)) for shape in (wall, speck)] == [0, 0] and int(noses(deep)) in (0, 1)


def test_the_start_is_binomial():
    theory = 1 - 0.55**4 - 4 * 0.45 * 0.55**3
    assert theory == pytest.approx(0.609, abs=1e-3)
    draws = [Streams(seed=seed).generator("start", 0) for seed in range(150)]
    started = problem.start(heads(150), draws)
    counted = shares(noses(started))
    assert counted.two_or_more == pytest.approx(theory, abs=3 * math.sqrt(theory * (1 - theory) / 150))
    assert counted.none == pytest.approx(0.55**4, abs=0.08)
    again = problem.start(heads(2), [Streams(seed=seed).generator("start", 0) for seed in range(2)])
    assert torch.equal(again.shape, started.shape[:2])


def test_the_prior_depends_on_the_prompt_and_on_one_side():
    prior = exact_prior()
    assert isinstance(prior, DiffusionPrior) and prior.views == 1 and prior.latent_shape == (4, 16, 16)
    head = render(problem.build(HEAD, FACES))
    x = prior.encode(head)
    fits, other = (
        prior.log_prob(x, prior.embed([prompt.text] * len(x))) for prompt in (HEAD, box_prompts.PROMPTS[7])
    )
    assert (fits > other + 20).all() and torch.allclose(prior.decode(x), head, atol=1e-6)
    t = torch.full((len(x),), 300)
    noise = prior.predict_noise(x, t, prior.embed([HEAD.text] * len(x)))
    # The other assets of the batch do not change the prediction.
    assert torch.allclose(noise[:1], prior.predict_noise(x[:1], t[:1], prior.embed([HEAD.text])), atol=1e-5)
