"""The preset dreamdpo-released against DreamDPO's code (F4): every case through the guidance itself."""

import dataclasses

import torch

from eg3d_rlhf.tuning.distill.gradients import distillation_loss
from eg3d_rlhf.tuning.distill.guidance.dreamdpo import DreamDpo
from eg3d_rlhf.tuning.distill.methods import PRESETS
from tests.compat.distill_reference import (
    Pictures,
    Recorded,
    close,
    each,
    entry_of,
    multiview,
    needs,
    seen_by,
    under,
    values,
    views_of,
)

pytestmark = needs("dreamdpo")
NAME = "dreamdpo"
F4 = 1e-5


class Votes:
    """DreamDPO's count of affirmative answers for each picture; for questions after faults the fewer, the
    better.
    """

    def __init__(self, first: torch.Tensor, second: torch.Tensor, faults: bool):
        self.answers = [
            0 if (a < b if faults else a > b) else 1
            for a, b in zip(first.tolist(), second.tolist(), strict=True)
        ]

    def judge(self, prompts, pairs, shuffle_order=True):
        return self.answers


@each(NAME, "case/")
def test_case(case):
    v = under(NAME, case)
    entry = entry_of(NAME, case)
    views = views_of(NAME, case)
    prior = multiview(NAME, views)
    shown = v["input"].clone().requires_grad_()
    images = shown.permute(0, 3, 1, 2)
    x = prior.encode(images) if "image" in entry["input_is"] else images
    scores = torch.cat([v["score_1"], v["score_2"]])
    linear = entry.get("reward", "linear" if "linear" in case else "recited") == "linear"
    reward = Pictures(values(NAME)["reward/w"]) if linear else Pictures(recited=scores)
    released = PRESETS["dreamdpo-released"]
    settings = dataclasses.replace(
        released,
        tau=entry["tau"],
        prior=dataclasses.replace(released.prior, guidance_scale=entry["guidance_scale"]),
    )
    judge = Votes(v["judge_1"], v["judge_2"], entry.get("neg_prompt", False)) if "judge_1" in v else None
    streams = Recorded(v["noise_1"], v["noise_2"])
    guidance = DreamDpo(prior, settings, views=views, streams=streams, reward=reward, judge=judge)
    output = guidance(x.detach(), v["t"].expand(len(x)), ["text"] * len(x), seen_by(v["c2w"]), 0)
    close(reward.seen, torch.cat([v["x0_image_1"], v["x0_image_2"]]), F4)
    close(output.scores.flatten(), scores, F4)
    loss = distillation_loss(x, output, clamp=entry.get("grad_clip_val"))
    close(loss, v["loss_sds"], F4)
    close(torch.autograd.grad(loss, shown)[0], v["dloss_dinput"], F4)
    first = v["score_1"] >= v["score_2"]
    if judge:
        first |= torch.tensor(judge.answers) == 0
    assert torch.equal(output.winner == 0, first)
    gap = torch.where(first, 1, -1) * (v["score_1"] - v["score_2"])
    assert torch.equal(output.one_sided, gap < entry["tau"])
