"""RewardSDS against its own code (F5): strategies, the 3D guidance, and the parts of the 2D experiment."""

import dataclasses

import pytest
import torch

from eg3d_rlhf.tuning.distill import gradients
from eg3d_rlhf.tuning.distill.gradients import distillation_loss, target_loss
from eg3d_rlhf.tuning.distill.guidance.rewardsds import RewardSds
from eg3d_rlhf.tuning.distill.guidance.settings import NoiseWeighting
from eg3d_rlhf.tuning.distill.methods import PRESETS
from eg3d_rlhf.tuning.distill.schedule import NoiseSchedule, ddim_times
from eg3d_rlhf.tuning.distill.schedules_by_step import STEPS
from tests.compat.absent import some
from tests.compat.distill_reference import (
    Pictures,
    Recorded,
    close,
    each,
    entry_of,
    members,
    multiview,
    needs,
    seen_by,
    under,
    values,
    views_of,
)

pytestmark = needs("rewardsds")
NAME = "rewardsds"
F5 = 2e-5
SCHEDULE = NoiseSchedule()
STRATEGIES = [
    (count, name)
    for count in members(NAME, "strategy3d")
    for name in members(NAME, f"strategy3d/{count}")
    if f"strategy3d/{count}/{name}/weights" in values(NAME)
]


def weighting_of(name: str) -> NoiseWeighting:
    """As cases are named: best, best3, min-max, minmax_WEIGHT_WEIGHT_BEST_WORST, weighted, none."""
    kind, *numbers = name.split("_")
    if kind == "minmax":
        best_weight, worst_weight = map(float, numbers[:2])
        best, worst = map(int, numbers[2:])
        return NoiseWeighting(best_weight=best_weight, worst_weight=worst_weight, best=best, worst=worst)
    return (
        NoiseWeighting(strategy="best", best=int(kind[4:] or 1))
        if kind.startswith("best")
        else NoiseWeighting(strategy=kind)
    )


@pytest.mark.parametrize(
    ("count", "name"), some(STRATEGIES, f"this set has no strategy3d/COUNT/NAME/weights in {NAME}.npz", 2)
)
def test_strategies(count, name):
    v = under(NAME, f"strategy3d/{count}")
    weights = weighting_of(name)(v["rewards"][:, None])[:, 0]
    close(weights, v[f"{name}/weights"], F5)
    close((weights * v["losses"]).sum(), v[f"{name}/loss"], F5)
    close((weights * v["grad_norms"]).sum(), v[f"{name}/logged_norm"], F5)


@each(NAME, "full3d/")
def test_the_guidance_in_3d(case):
    v = under(NAME, case)
    entry = entry_of(NAME, case)
    views = views_of(NAME, case)
    prior = multiview(NAME, views)
    released = PRESETS["rewardsds-released"]
    reward = Pictures(values(NAME)["reward/w"])
    form = {} if entry["recon_loss"] else {"form": "sds"}
    settings = dataclasses.replace(
        released,
        noises=entry.get("noises") or int(case.split("_")[1]),
        explore_steps=entry.get("exploration_steps", released.explore_steps),
        until=entry["reward_until"],
        weighting=strategy_of(case),
        prior=dataclasses.replace(released.prior, guidance_scale=entry["guidance_scale"], **form),
    )
    shown = v["input"].clone().requires_grad_()
    x = shown
    t = v["t"].expand(len(shown))
    guidance = RewardSds(prior, settings, views=views, streams=Recorded(*v["noise"]), reward=reward)
    decode = prior.decode
    explored = []
    prior.decode = lambda latents: decode(explored.append(latents) or latents)
    output = guidance(x.detach(), t, ["text"] * len(x), seen_by(v["c2w"]), entry["step"])
    close(torch.autograd.grad(distillation_loss(x, output), shown)[0], v["dloss_dinput"], F5)
    asked = [int(call[0]) for call in prior.calls]
    per_noise = v["timesteps_of_calls"].tolist()
    assert sorted(asked * len(v["noise"])) == sorted(per_noise)  # ours asks for all noises at once
    if "rewards" in v:
        close(output.scores[:, 0], v["rewards"], F5)
        close(torch.stack(explored), v["explored"], F5)  # of up to 4.6e6, clamped to 0..1 when decoded:
        close(reward.seen, v["images"].flatten(0, 1), 20 * F5)
        assert torch.equal(output.winner, v["rewards"].argmax()[None])


def strategy_of(case: str) -> NoiseWeighting:
    """Return the strategy that the case's JSON states, else the first word of the case's name."""
    return weighting_of(entry_of(NAME, case).get("strategy", case.split("/")[1].split("_")[0]))


@each(NAME, "full2d/")
def test_the_parts_in_2d(case):
    """Its chain starts at the schedule's first step <= t though the latent is at t, and each loss is divided
    by the number kept.
    """
    v = under(NAME, case)
    entry = entry_of(NAME, case)
    prior = multiview(NAME, views=1)
    x = v["input"]
    t = v["t"]
    noise = v["noise"]
    count = len(noise)
    text, null = (prior.embed([name]).expand(count, -1, -1) for name in ("text", ""))
    asked = []

    def predict(x_t, now, scale):
        asked.append(int(now[0]))
        return gradients.guided(*(prior.predict_noise(x_t, now, c) for c in (text, null)), scale)

    x_t = torch.cat([SCHEDULE.mix(x, e[None], t) for e in noise])
    weights = torch.ones(1)
    if count > 1:
        steps = entry["exploration_steps"]
        times = [time for time in ddim_times(steps) if time <= int(t)]
        falling = [torch.full((count,), time) for time in [*times, times[-1] - STEPS // steps]]
        end = SCHEDULE.ddim_chain(
            x_t, falling, lambda latents, now: predict(latents, now, entry["exploration_cfg"])
        )
        images = prior.decode(end)
        close(images, v["images"], F5)
        rewards = (images * values(NAME)["reward/w"]).mean((1, 2, 3))
        close(rewards, v["rewards"], F5)
        weights = strategy_of(case)(rewards[:, None])[:, 0]
    grads = SCHEDULE.weight(t, "sds", x) * (predict(x_t, t.expand(count), entry["cfg_scale"]) - noise)
    kept = weights.nonzero()[:, 0]
    grad = (weights[:, None, None, None] * grads).sum(0, keepdim=True) / len(kept)
    shown = x.clone().requires_grad_()
    assert asked == v["timesteps_of_calls"].tolist()
    close(torch.autograd.grad(target_loss(shown, grad), shown)[0], v["dloss_dinput"], F5)
