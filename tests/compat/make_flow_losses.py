"""Write values of the online losses by this project's own code; see make_set."""

import itertools
import json
import random
from pathlib import Path

import numpy as np
import torch

from eg3d_rlhf.models.sparse import mean_per_sample
from eg3d_rlhf.preferences.losses import preference_loss
from eg3d_rlhf.tuning.flow.base.stage import FlowPath
from eg3d_rlhf.tuning.flow.training.losses import (
    clipped_ratio_loss,
    dgpo_loss,
    dgpo_stopped,
    dppo_dropped,
    dppo_loss,
    goodness,
    group_margin,
    guard_loss,
    guarded_ratio,
    nft_errors,
    nft_loss,
    outside_clip,
)
from eg3d_rlhf.tuning.flow.training.online.advantages import Gate, Scale, advantages, combine_rewards
from eg3d_rlhf.tuning.flow.training.online.settings import progressive_window, random_window
from eg3d_rlhf.tuning.flow.training.online.snapshot import decay
from eg3d_rlhf.tuning.flow.training.online.steps import KINDS, divergence, log_density

PATH = FlowPath(sigma_min=0.0)


def make(root: Path, seed: int) -> None:
    """Write all files; some lack their second kinds: steps of cps, r_modes and the trap are left out."""
    folder = root / "flow_losses"
    folder.mkdir(parents=True, exist_ok=True)
    for name, of in WRITTEN.items():
        recipe, values = of(np.random.default_rng([seed, len(name)]))
        (folder / f"{name}.json").write_text(json.dumps({"source": "make_set", **recipe}, indent=1))
        np.savez(folder / f"{name}.npz", **values)


def error(v: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    return mean_per_sample((v - u).square(), v)


def gradient(loss: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(loss, at, retain_graph=True)[0]


def stored(values: dict) -> dict[str, np.ndarray]:
    return {
        name: value.detach().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
        for name, value in values.items()
    }


def below(prefix: str, values: dict) -> dict[str, np.ndarray]:
    return {f"{prefix}/{name}": value for name, value in stored(values).items()}


def latents(draw, shape: list[int]) -> dict[str, torch.Tensor]:
    """Sample clean latents, noise, and velocities of three networks near the target's."""
    made = {name: torch.from_numpy(draw.standard_normal(shape)) for name in ("x0", "eps")}
    made["t"] = torch.from_numpy(draw.uniform(0.1, 0.95, shape[0]))
    u = made["eps"] - made["x0"]
    made |= {name: u + 0.1 * torch.from_numpy(draw.standard_normal(shape)) for name in ("old", "new", "ref")}
    made["advantages"] = 3 * torch.from_numpy(draw.standard_normal(shape[0]))
    return made


def advantage_files(draw) -> tuple[dict, dict]:
    groups = 3
    size = 5
    weights = [0.25, 1.5]
    rewards = torch.from_numpy(draw.standard_normal((2, groups, size)))
    rewards[0, 1] = 0.3
    total = sum(weight * one for weight, one in zip(weights, rewards, strict=True))
    values = {"rewards": rewards}
    # [whether over the whole batch]
    flags = {"True": "raw", "False": "group"}
    for flag, over in flags.items():
        values |= {
            f"flow_grpo/global_std_{flag}": advantages(rewards[0], Scale(over=over)),
            f"unirl/global_std_{flag}": advantages(rewards[0], Scale(over=over, correction=1, plus=1e-8)),
            f"flow_factory/sum_global_std_{flag}": advantages(total, Scale(over=over, plus=0.0, least=1e-6)),
        }
    values["verl/no_std"] = advantages(rewards[0], Scale(over="none", plus=0.0))
    values["flow_factory/gdpo"] = combine_rewards(rewards, weights, Scale(plus=0.0, least=1e-6))
    values["gdpo_trl/advantages"] = combine_rewards(rewards, weights, Scale(correction=1))
    gate = Gate(share=0.15)
    masks = []
    shares = []
    for number in range(3):
        given = torch.from_numpy(draw.standard_normal((3, 41))).float()
        values[f"gardo/rewards{number}"] = given
        turned = -given.double()
        masks.append(gate(turned[0], turned[1:]))
        shares.append(gate.share)
    values |= {
        "gardo/gate": torch.stack(masks),
        "gardo/share": np.array(shares),
    }
    return {"groups": groups, "group": size, "weights": weights, "gate": {"share": 0.15}}, stored(values)


def window_files(_draw) -> tuple[dict, dict]:
    size = 3
    steps = 12
    cases: dict[str, object] = {}
    for name, overlap, stride, again in (
        ("a", False, 1, False),
        ("b", True, 2, False),
        ("c", True, 5, True),
    ):
        settings = {"iters_per_group": 3, "group_size": size, "max_timesteps": steps, "roll_back": again}
        settings |= {"prog_overlap": True, "prog_overlap_step": stride} if overlap else {}
        windows = [
            list(
                progressive_window(
                    i, size, 0, steps, stride=stride if overlap else size, rounds=3, repeat=again
                )
            )
            for i in range(25)
        ]
        cases[f"mixgrpo_{name}"] = {"settings": settings, "windows": windows}
    settings = {"iters_per_group": 3, "group_size": size, "max_timesteps": steps, "sample_strategy": "random"}
    drawn = [list(range(size))]
    for seed in range(7, 15):
        begin = int(np.random.default_rng(seed).integers(0, steps - size + 1))
        drawn.append(list(range(begin, begin + size)))
    cases["mixgrpo_random"] = {"settings": settings, "windows": drawn, "seed": 7}
    picked = []
    for seed in range(3):
        window = random_window(4, 2, 11, random.Random(seed).randint)
        picked.append({"size": 4, "range": [2, 11], "seed": seed, "window": [window.start, window.stop]})
    return {"cases": {**cases, "picked": picked}}, {"none": np.zeros(0)}


def nft_files(draw) -> tuple[dict, dict]:
    values = {}
    clip = 3
    shapes = [[4, 7, 2]]
    betas = [0.25, 2.0]
    for number, shape in enumerate(shapes):
        given = latents(draw, shape)
        values |= below(f"s{number}", given)
        u = given["eps"] - given["x0"]
        for beta, kl, plain in itertools.product(betas, (0.0, 0.02), (False, True)):
            v = given["new"].clone().requires_grad_(True)
            r = goodness(given["advantages"], clip)
            errors = nft_errors(v, given["old"], u, given["t"], beta, adaptive=not plain)
            policy = nft_loss(errors, r, clip, beta)
            if plain:
                made = {"per_sample_policy": policy, "grad_of_sum": gradient(policy.sum(), v)}
                values |= below(f"s{number}/beta{beta}_unirl_plain", made)
                continue
            far = error(v, given["ref"]).mean()
            loss = policy.mean() + kl * far
            made = {
                "loss": loss,
                "grad": gradient(loss, v),
                "r": r,
                "per_sample_policy": policy,
                "positive": errors.positive,
                "negative": errors.negative,
                "kl": far,
                "old_deviate": error(v, given["old"]).mean(),
            }
            values |= below(f"s{number}/beta{beta}_kl{kl}", made)
    steps = [0, 3, 50, 900]
    values |= below("decay", {"step": steps, "type2": [decay("late", n) for n in steps]})
    return {"adv_clip_max": clip, "betas": betas, "shapes": shapes}, values


def dgpo_files(draw) -> tuple[dict, dict]:
    values = {}
    clip = 0.03
    for number, (groups, size, *rest) in enumerate(([2, 5, 3, 2], [3, 2, 4])):
        given = latents(draw, [groups * size, *rest])
        del given["t"]
        u = given["eps"] - given["x0"]
        values |= below(f"s{number}", given | {"group": torch.arange(groups).repeat_interleave(size)})
        for beta, kind in itertools.product((3.0, 40.0), ("plain", "clip")):
            v = given["new"].clone().requires_grad_(True)
            errors, ref, old = (error(x, u).view(-1, size) for x in (v, given["ref"], given["old"]))
            advantage = given["advantages"].view(-1, size)
            made = {
                "errors": errors.flatten(),
                "loss": (
                    group_margin(errors, ref, advantage, beta).sigmoid()[:, None] * advantage * errors
                ).mean(),
            }
            if kind == "clip":
                far = dgpo_stopped(errors, old, advantage, clip)
                made["clipped"] = far.flatten()
                errors = torch.where(far, errors.detach(), errors)
            made["grad"] = gradient(dgpo_loss(errors, ref, advantage, beta).mean(), v)
            values |= below(f"s{number}/beta{beta}_{kind}", made)
    return {"clip": clip, "betas": [3.0, 40.0], "K": [5, 2]}, values


def dpo_files(draw) -> tuple[dict, dict]:
    given = latents(draw, [8, 3, 5])
    values = below("s0", given)
    u = given["eps"] - given["x0"]
    v = given["new"].clone().requires_grad_(True)
    errors = error(v, u)
    margin = (error(given["ref"], u) - errors).view(-1, 2)
    loss = preference_loss(margin[:, 0] - margin[:, 1], 25.0).mean()
    values |= below("s0/dpo50.0", {"loss": loss.float(), "grad": gradient(loss, v).float()})
    return {"betas": [50.0]}, values


def step_files(draw) -> tuple[dict, dict]:
    sigmas = np.array([0.97, 0.8, 0.45, 0.3, 0.1])
    levels = {"sde": [0.4], "dance": [0.6, 0.2]}
    values = {"sigmas": sigmas}
    shape = [4, 3, 3, 2]
    given = {name: torch.from_numpy(draw.standard_normal(shape)) for name in ("x", "v", "z")}
    given["v_old"] = given["v"] + 0.1 * torch.from_numpy(draw.standard_normal(shape))
    values |= below("s0", given)
    column = (-1, *[1] * (len(shape) - 1))
    for kind, level in [(kind, level) for kind, of_kind in levels.items() for level in of_kind]:
        steps = [KINDS[kind](PATH, t, u, level) for t, u in itertools.pairwise(sigmas.tolist())]
        v = given["v"].clone().requires_grad_(True)
        mean, mean_old = (
            torch.cat([step.mean(given["x"][b : b + 1], w[b : b + 1]) for b, step in enumerate(steps)])
            for w in (v, given["v_old"])
        )
        std = torch.tensor([step.std for step in steps], dtype=torch.float64)
        to = mean_old + std.view(column) * given["z"]
        log_p, old = (
            torch.cat([log_density(to[b : b + 1], m[b : b + 1], step.std) for b, step in enumerate(steps)])
            for m in (mean, mean_old)
        )
        made = {
            "mean": mean,
            "mean_old": mean_old,
            "step_std": std,
            "next": to,
            "log_p": log_p,
            "log_p_old": old,
            "grad_log_p_sum": gradient(log_p.sum(), v),
        }
        values |= below(f"s0/{kind}{level}", made)
    return {"levels": levels, "shapes": [shape]}, values


def objective_files(draw) -> tuple[dict, dict]:
    recipe = {"sigmas": [1.0, 0.85, 0.6, 0.2], "step": 1, "level": 0.5, "adv_clip": 1.5}
    step = KINDS["sde"](PATH, 0.85, 0.6, 0.5)
    values = {}
    for number, shape in enumerate(([5, 4, 3], [3, 2, 2, 2])):
        x, v, z = (torch.from_numpy(draw.standard_normal(shape)) for _ in range(3))
        v_old, v_ref = (v + 0.02 * torch.from_numpy(draw.standard_normal(shape)) for _ in range(2))
        v.requires_grad_(True)
        advantage = 2 * torch.from_numpy(draw.standard_normal(shape[0]))
        mean = step.mean(x, v)
        mean_old = step.mean(x, v_old)
        to = mean_old + step.std * z
        log_p = log_density(to, mean, step.std)
        old = log_density(to, mean_old, step.std)
        given = {"x": x, "v": v, "v_old": v_old, "v_ref": v_ref, "next": to, "advantages": advantage}
        given |= {"mean": mean, "mean_old": mean_old, "log_p": log_p, "log_p_old": old}
        given["sqrt_dt"] = torch.full_like(old, step.length).sqrt()
        given["std_dev_t"] = torch.full_like(old, step.std / step.length**0.5)
        values |= below(f"s{number}", given)
        cut = advantage.clamp(-1.5, 1.5)
        ratio = (log_p - old).exp()
        far = divergence(mean, mean_old, step.std)
        guarded = guarded_ratio(log_p, old, far, step.std)
        out = outside_clip(ratio, cut, 0.01)
        drop = dppo_dropped(ratio, far, advantage, 0.0002)
        losses = {
            "kl_flow_grpo": divergence(mean, step.mean(x, v_ref), step.std / step.length**0.5),
            "clip0.01": clipped_ratio_loss(ratio, cut, 0.01),
            "guard0.003": guard_loss(guarded, cut, 0.003, step.length),
            "dppo0.0002": dppo_loss(ratio, advantage, drop),
        }
        more = {
            "clip0.01": {"clip_share": (out.high | out.low).double().mean(), "ratio_mean": ratio.mean()},
            "guard0.003": {
                "flow_factory_loss": guard_loss(guarded, cut, 0.003, 1.0).mean(),
                "flow_factory_ratio_shape": [len(x), *[1] * (x.ndim - 2), len(x)],
            },
            "dppo0.0002": {"masked_share": drop.double().mean(), "kl_new_old": far},
        }
        for name, loss in losses.items():
            made = {"loss": loss.mean(), "grad": gradient(loss.mean(), v), **more.get(name, {})}
            values |= below(f"s{number}/{name}", made | {"per_sample": loss})
    return recipe, values


WRITTEN = {
    "advantages": advantage_files,
    "windows": window_files,
    "nft": nft_files,
    "dgpo": dgpo_files,
    "awm_dpo": dpo_files,
    "sde_steps": step_files,
    "objectives": objective_files,
}
