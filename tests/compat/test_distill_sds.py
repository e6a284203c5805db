"""SDS, its variants, Perp-Neg and directions against threestudio (F2), from the recorded draws through our
prior interface.
"""

import torch

from eg3d_rlhf.tuning.distill import gradients
from eg3d_rlhf.tuning.distill.gradients import target_loss
from eg3d_rlhf.tuning.distill.guidance.denoiser import DIRECTIONS, mixture, view_direction
from eg3d_rlhf.tuning.distill.schedule import NoiseSchedule
from tests.compat.distill_reference import (
    StandIn,
    close,
    each,
    entry_of,
    latent_scale,
    needs,
    present,
    under,
    values,
)

pytestmark = needs("sds_threestudio")
NAME = "sds_threestudio"
F2 = 2e-5
SCHEDULE = NoiseSchedule()


def test_directions():
    (rows,) = present(values(NAME), "directions/rows")
    for elevation, azimuth, index in rows.tolist():
        assert DIRECTIONS.index(view_direction(elevation, azimuth)) == int(index)


def conditions(config: dict, perp_neg: bool, count: int):
    """text, null [B, T, D], negatives [2, B, T, D] and their weights [B, 2]."""
    v = values(NAME)
    if not config.get("view_dependent_prompting", True):
        return v["prompt/text"].expand(count, -1, -1), v["prompt/null"].expand(count, -1, -1), None, None
    views = list(zip(v["views/elevation"].tolist(), v["views/azimuth"].tolist(), strict=True))
    index = [DIRECTIONS.index(view_direction(*view)) for view in views]
    text = dict(zip(DIRECTIONS, v["prompt/text_vd"], strict=True))
    null = v["prompt/null_vd"][index]
    if not perp_neg:
        return v["prompt/text_vd"][index], null, None, None
    mixed = [mixture(*view) for view in views]
    positive = torch.stack([sum(share * text[d] for d, share in shares.items()) for shares, _, _ in mixed])
    negatives = [
        torch.stack([null[b] if m[1][i] is None else text[m[1][i]] for b, m in enumerate(mixed)])
        for i in range(2)
    ]
    return positive, null, torch.stack(negatives), torch.tensor([weights for *_, weights in mixed])


def prior_of() -> StandIn:
    return StandIn(
        {**under(NAME, "net"), **under(NAME, "vae")}, SCHEDULE.alphas_cumprod, {}, scale=latent_scale(NAME)
    )


@each(NAME, "case/")
def test_case(case):
    v = under(NAME, case)
    entry = entry_of(NAME, case)
    prior = prior_of()
    config = entry["config"]
    perp = "neg_weights" in v
    shown = v["input"].clone().requires_grad_()
    images = shown.permute(0, 3, 1, 2)
    x = prior.encode(images) if "image" in entry["input_is"] else images
    t = v["t"]
    noise = v["noise"]
    text, null, negatives, weights = conditions(config, perp, len(x))
    with torch.no_grad():
        bar = SCHEDULE.alpha(t, x)
        u = ((1 - bar) / bar).sqrt()
        z = x + u * noise
        x_t = z / (1 + u.square()).sqrt() if config.get("use_sjc") else SCHEDULE.mix(x, noise, t)
        p_text = prior.predict_noise(x_t, t, text)
        p_null = prior.predict_noise(x_t, t, null)
        close(torch.cat([p_text, p_null]), v["eps_all"][: 2 * len(x)], F2)
        if perp:
            # b0n0, b0n1, b1n0, ..: but the source repeats pictures as b0, b1, b2, ..
            interleaved = negatives.transpose(0, 1).flatten(0, 1)
            recorded = prior.predict_noise(x_t.repeat(2, 1, 1, 1), t.repeat(2), interleaved)
            close(recorded, v["eps_all"][2 * len(x) :], F2)
            others = recorded.unflatten(0, (-1, 2)).transpose(0, 1)  # [2, B, C, H, W]
            close(weights, v["neg_weights"], F2)
            predicted = gradients.perp_neg(p_text, p_null, others, weights, config["guidance_scale"])
        else:  # this source counts from the conditional prediction
            predicted = gradients.guided(p_text, p_null, config["guidance_scale"] + 1)
        weight = SCHEDULE.weight(t, config.get("weighting_strategy", "sds"), x)
        if config.get("use_sjc"):
            grad = gradients.sjc(x, z, predicted, u, variance_reduced=config.get("var_red", True))
        else:
            grad = gradients.sds(predicted, noise, weight)
    loss = target_loss(x, grad, clamp=entry.get("grad_clip_val"))
    close(torch.autograd.grad(loss, shown, retain_graph=True)[0], v["dloss_dinput"], F2)
    close(loss, v["loss_sds"], F2)
    if config.get("use_img_loss"):
        with torch.no_grad():
            factor = weight * bar.sqrt() / (1 - bar).sqrt()
            on_images = gradients.image_loss(images, prior.decode(SCHEDULE.x0(x_t, predicted, t)), factor)
        close(torch.autograd.grad(target_loss(images, on_images), shown)[0], v["dimg_dinput"], F2)


def test_perpendicular_is_at_right_angles():
    q, p = torch.randn(2, 3, 4, 5, 5, generator=torch.Generator().manual_seed(0)).unbind()
    rest = gradients.perpendicular(q, p)
    assert ((rest * p).flatten(1).sum(1).abs() < 1e-4).all()
    torch.testing.assert_close(gradients.perpendicular(p, p), torch.zeros_like(p), atol=1e-6, rtol=0)
    torch.testing.assert_close(gradients.perpendicular(q, torch.zeros_like(p)), q)


def test_an_azimuth_may_be_turned_round():
    assert [view_direction(0, 359.0), view_direction(0, 540.0), view_direction(0, -450.0)] == [
        "front",
        "back",
        "side",
    ]
