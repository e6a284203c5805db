"""DreamReward's weight and its two guidances against its own code (the guidance part of F6)."""

import pytest
import torch

from eg3d_rlhf.tuning.distill.gradients import digits, distillation_loss
from eg3d_rlhf.tuning.distill.guidance.dreamreward import DreamReward
from eg3d_rlhf.tuning.distill.methods import PRESETS
from tests.compat.distill_reference import (
    Recorded,
    close,
    each,
    entry_of,
    multiview,
    needs,
    present,
    recipe,
    seen_by,
    under,
    values,
    views_of,
)

pytestmark = needs("dreamreward")
NAME = "dreamreward"
F6 = 1e-5


def test_the_weight_of_printed_numbers():
    (rows,) = present(values(NAME), "calculate_weight/rows")
    for loss, reward_loss, weight in rows.tolist():
        assert 10.0 ** (digits(loss) - digits(reward_loss)) == pytest.approx(weight, rel=1e-12)


class Views:
    """Stand-in reward of an asset, linear in the pictures, with a share of the prompts' numbers."""

    modality = "multiview"
    differentiable = True
    view_prompts = True

    def __init__(self, w: torch.Tensor, ids: torch.Tensor, views: int, share: float):
        self.w = w
        self.ids = ids
        self.views = views
        self.share = share
        self.seen = None

    def score(self, pixels, prompts):
        self.seen = pixels.detach()
        linear = (pixels * self.w).sum((1, 2, 3)).unflatten(0, (-1, self.views)).mean(1) / self.w.numel()
        return (linear + self.share * self.ids.sum()).repeat_interleave(self.views)


@each(NAME, "guidance")
def test_guidance(case):
    v = under(NAME, case)
    entry = entry_of(NAME, case)
    views = views_of(NAME, case)
    prior = multiview(NAME, views)
    ids = v.get("prompt_ids", torch.zeros(1)).float()
    reward = Views(values(NAME)["reward/w"], ids, views, recipe(NAME).get("prompt_share", 0.1))
    settings = PRESETS[f"dreamreward-released-{entry['variant']}"]
    guidance = DreamReward(prior, settings, views=views, streams=Recorded(v["noise"]), reward=reward)
    shown = v["input"].clone().requires_grad_()
    images = shown.permute(0, 3, 1, 2)
    x = prior.encode(images)
    output = guidance(
        x, v["t"].expand(len(x)), ["text"] * len(x), seen_by(v["c2w"]), entry["step"], images.detach()
    )
    assert (output.scores is not None) == entry["rewarded"]
    if entry["rewarded"]:
        close(reward.seen, v["reward_image"], F6)
        close(output.scores, v["reward"], F6)
    loss = distillation_loss(x, output, images=images)
    close(torch.autograd.grad(loss, shown)[0], v["dloss_dinput"], F6)
