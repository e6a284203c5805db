"""DiffusionNFT, DGPO and Flow-DPO on clean latents against what their own programs computed."""

import numpy as np
import torch

from eg3d_rlhf.models.sparse import mean_per_sample
from eg3d_rlhf.preferences.losses import preference_loss
from eg3d_rlhf.tuning.flow.training.losses import (
    dgpo_loss,
    dgpo_stopped,
    goodness,
    group_margin,
    nft_errors,
    nft_loss,
)
from eg3d_rlhf.tuning.flow.training.online.snapshot import decay
from tests.compat.online_reference import GRADIENT, LOSS, Values, each, gradient, number, options

DECAYS = {"type0": "copy", "type1": "slow", "type2": "late"}


def of_set(name: str, case: str) -> tuple[Values, torch.Tensor]:
    """Latents and velocities of the set that a case belongs to, and the target velocity."""
    given = Values(name, case.split("/")[0])
    return given, given.tensor("eps") - given.tensor("x0")


def error(v: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    return mean_per_sample((v - u).square(), v)


@each("nft")
def test_nft(case):
    known = Values("nft", case)
    if case == "decay":
        for kind in set(known) - {"step"}:
            known.holds(kind, [decay(DECAYS[kind], int(n)) for n in known["step"]])
        return known.done()
    clip = options("nft")["adv_clip_max"]
    if case == "r_modes":
        if "continuous" in known:  # this project has no other
            known.holds("continuous", goodness(known.tensor("advantages"), clip))
        return
    given, u = of_set("nft", case)
    if "/" not in case:
        return  # what the set's cases are made of
    curvature = number("beta", case)
    plain = "plain" in case
    v = given.tensor("new").requires_grad_(True)
    old = given.tensor("old")
    reference = given.tensor("ref")
    r = goodness(given.tensor("advantages"), clip)
    errors = nft_errors(v, old, u, given.tensor("t"), curvature, adaptive=not plain)
    policy = nft_loss(errors, r, clip, curvature)
    known.holds("per_sample_policy", policy, LOSS)
    if plain:
        known.holds("grad_of_sum", gradient(policy.sum(), v), GRADIENT)
        return known.done()
    kl = error(v, reference)
    loss = policy.mean() + number("kl", case) * kl.mean()
    for key, got in {
        "loss": loss,
        "r": r,
        "positive": errors.positive,
        "negative": errors.negative,
        "kl": kl.mean(),
        "old_deviate": error(v, old).mean(),
    }.items():
        known.holds(key, got, LOSS)
    known.holds("grad", gradient(loss, v), GRADIENT)
    known.done()


def sizes(numbers: np.ndarray) -> np.ndarray:
    """Of the groups that samples have the numbers of."""
    return np.unique(numbers, return_counts=True)[1]


@each("dgpo")
def test_dgpo(case):
    given, u = of_set("dgpo", case)
    if "/" not in case:
        numbers = given["group"]
        # groups stand together, and are of one size
        assert (np.diff(numbers) >= 0).all() and len(set(sizes(numbers))) == 1
        return
    known = Values("dgpo", case)
    beta = number("beta", case)
    size = int(sizes(given["group"])[0])
    v = given.tensor("new").requires_grad_(True)
    errors, ref_errors, old_errors = (
        error(x, u).view(-1, size) for x in (v, given.tensor("ref"), given.tensor("old"))
    )
    advantage = given.tensor("advantages").view(-1, size)
    known.holds("errors", errors.flatten())
    known.holds(
        "loss",
        (group_margin(errors, ref_errors, advantage, beta).sigmoid()[:, None] * advantage * errors).mean(),
        LOSS,
    )
    if case.endswith("clip"):
        far = dgpo_stopped(errors, old_errors, advantage, options("dgpo")["clip"])
        known.holds("clipped", far.flatten())
        errors = torch.where(far, errors.detach(), errors)
    known.holds("grad", gradient(dgpo_loss(errors, ref_errors, advantage, beta).mean(), v), GRADIENT)
    known.done()


@each("awm_dpo")
def test_flow_dpo(case):
    given, u = of_set("awm_dpo", case)
    if "dpo" not in case:  # the set's latents, and a loss that this project does not have
        return
    known = Values("awm_dpo", case)
    v = given.tensor("new").requires_grad_(True)
    # rows are chosen and rejected in turn
    margin = (error(given.tensor("ref"), u) - error(v, u)).view(-1, 2)
    loss = preference_loss(margin[:, 0] - margin[:, 1], number("dpo", case) / 2).mean()
    known.holds("loss", loss, LOSS)
    known.holds("grad", gradient(loss, v), GRADIENT)
    known.done()
