"""Steps of stochastic samplers, their densities, and what GRPO, GRPO-Guard and Flow-DPPO make of them,
against their own programs.

Those ran in float32; ours takes the same numbers to float64 first.
"""

import numpy as np
import pytest
import torch

from eg3d_rlhf.models.sparse import mean_per_sample
from eg3d_rlhf.tuning.flow.base.stage import FlowPath
from eg3d_rlhf.tuning.flow.training.losses import (
    clipped_ratio_loss,
    dppo_dropped,
    dppo_loss,
    guard_loss,
    guarded_ratio,
    outside_clip,
)
from eg3d_rlhf.tuning.flow.training.online.steps import KINDS, Step, divergence, log_density
from tests.compat.online_reference import FOLDER, Values, cases, each, gradient, number, options
from tests.compat.reference import arrays

PATH = FlowPath(sigma_min=0.0)
DENSITY = 1e-4  # of values in float32, as the specification has it


def double(values: Values, key: str) -> torch.Tensor:
    return values.tensor(key).double()


def log_p_of(kind: str, step: Step, to: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """As the programs have it: of cps the negative squared distance, for which ours takes the density."""
    return -mean_per_sample((to - mean).square(), to) if kind == "cps" else log_density(to, mean, step.std)


@each("sde_steps")
def test_steps(case):
    if not case:
        return  # the times alone
    given = Values("sde_steps", case.split("/")[0])
    if "/" not in case:
        return
    with arrays(FOLDER / "sde_steps.npz") as stored:
        times = stored["sigmas"].astype(float)
    known = Values("sde_steps", case)
    name = case.split("/")[1]
    kind = next(kind for kind in options("sde_steps")["levels"] if name.startswith(kind))
    steps = [
        KINDS[kind](PATH, t, until, number(kind, name))
        for t, until in zip(times[:-1], times[1:], strict=True)
    ]
    x, v, old, z, to = *(double(given, key) for key in ("x", "v", "v_old", "z")), double(known, "next")
    v.requires_grad_(True)
    rows = [slice(b, b + 1) for b in range(len(x))]
    mean, mean_old = (
        torch.cat([step.mean(x[b], w[b]) for step, b in zip(steps, rows, strict=False)]) for w in (v, old)
    )
    std = torch.tensor([step.std for step in steps[: len(x)]], dtype=torch.float64)
    log_p, log_p_old = (
        torch.cat([log_p_of(kind, step, to[b], m[b]) for step, b in zip(steps, rows, strict=False)])
        for m in (mean, mean_old)
    )
    known.holds("mean", mean)
    known.holds("mean_old", mean_old)
    known.holds("step_std", std)
    known.holds("next", mean_old + std.view(-1, *[1] * (x.ndim - 1)) * z)
    known.holds("log_p", log_p, DENSITY)
    known.holds("log_p_old", log_p_old, DENSITY)
    known.holds("grad_log_p_sum", gradient(log_p.sum(), v), DENSITY)
    known.done()


@each("objectives")
def test_objectives(case):
    given = Values("objectives", case.split("/")[0])
    settings = options("objectives")
    t, until = settings["sigmas"][settings["step"] : settings["step"] + 2]
    step = KINDS["sde"](PATH, t, until, settings["level"])
    x, v, v_old, v_ref, to = (double(given, key) for key in ("x", "v", "v_old", "v_ref", "next"))
    advantage = double(given, "advantages")
    v = v.requires_grad_(True)
    mean = step.mean(x, v)
    mean_old = step.mean(x, v_old)
    log_p = log_density(to, mean, step.std)
    old = log_density(to, mean_old, step.std)
    if "/" not in case:
        for key, got in {"mean": mean, "mean_old": mean_old, "log_p": log_p, "log_p_old": old}.items():
            given.holds(key, got)
        given.holds("sqrt_dt", torch.full_like(old, step.length).sqrt())
        given.holds("std_dev_t", torch.full_like(old, step.std / step.length**0.5))
        return given.done()
    known = Values("objectives", case)
    name = case.split("/")[1]
    cut = advantage.clamp(-settings["adv_clip"], settings["adv_clip"])
    ratio = torch.exp(log_p - old)
    far = divergence(mean, mean_old, step.std)
    if name == "kl_flow_grpo":
        loss = divergence(mean, step.mean(x, v_ref), step.std / step.length**0.5)
    elif name.startswith("clip"):
        limit = number("clip", name)
        loss = clipped_ratio_loss(ratio, cut, limit)
        out = outside_clip(ratio, cut, limit)
        known.holds("clip_share", (out.high | out.low).float().mean())
        known.holds("ratio_mean", ratio.mean())
    elif name.startswith("guard"):
        guarded = guarded_ratio(log_p, old, far, step.std)
        limit = number("guard", name)
        loss = guard_loss(guarded, cut, limit, step.length)
        known.holds("flow_factory_loss", guard_loss(guarded, cut, limit, 1.0).mean())
        # its ratios of all with all
        assert list(known["flow_factory_ratio_shape"]) == [len(x), *[1] * (x.ndim - 2), len(x)]
    else:
        drop = dppo_dropped(ratio, far, advantage, number("dppo", name))
        loss = dppo_loss(ratio, advantage, drop)
        known.holds("masked_share", drop.float().mean())
        known.holds("kl_new_old", far)
    if "per_sample" in known:
        known.holds("per_sample", loss)
    known.holds("loss", loss.mean())
    known.holds("grad", gradient(loss.mean(), v))
    known.done()


@pytest.mark.parametrize("name", sorted({case.split("/")[0] for case in cases("sde_steps")} - {""}))
def test_a_step_of_cps_without_noise_is_the_flows_own(name):
    """On the recorded numbers: x - (t - u) v."""
    given = Values("sde_steps", name)
    x = double(given, "x")
    v = double(given, "v")
    for kind in ("cps", "exact"):
        step = KINDS[kind](PATH, 0.8, 0.6, 0.0)
        np.testing.assert_allclose(step.mean(x, v), x - 0.2 * v, rtol=1e-12, atol=1e-12)
    assert KINDS["cps"](PATH, 0.8, 0.6, 0.0).std == pytest.approx(0)
