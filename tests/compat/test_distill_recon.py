"""MVDream's reconstruction form against its own code (F3)."""

import torch

from eg3d_rlhf.tuning.distill import gradients
from eg3d_rlhf.tuning.distill.gradients import target_loss
from eg3d_rlhf.tuning.distill.schedule import NoiseSchedule
from tests.compat.distill_reference import StandIn, close, each, entry_of, latent_scale, needs, under

pytestmark = needs("mvdream_recon")
NAME = "mvdream_recon"
F3 = 1e-5
SCHEDULE = NoiseSchedule()


@each(NAME, "case/")
def test_case(case):
    v = under(NAME, case)
    entry = entry_of(NAME, case)
    net = under(NAME, "net")
    config = entry["config"]
    views = config["n_view"] if "camera_input" in v else 1  # without cameras its network sees each view alone
    prior = StandIn(
        {k: a for k, a in net.items() if k not in ("cond", "null")},
        SCHEDULE.alphas_cumprod,
        {},
        views,
        latent_scale(NAME),
    )
    shown = v["input"].clone().requires_grad_()
    x = prior.encode(shown.permute(0, 3, 1, 2)) if "image" in entry["input_is"] else shown
    t = v["t"].expand(len(x))
    with torch.no_grad():
        x_t = SCHEDULE.mix(x, v["noise"], t)
        text, null = (
            prior.predict_noise(x_t, t, net[kind].expand(len(x), -1, -1), v.get("camera_input"))
            for kind in ("cond", "null")
        )
        close(text, v["eps_text"], F3)
        close(null, v["eps_null"], F3)
        x0 = SCHEDULE.x0(x_t, gradients.guided(text, null, config["guidance_scale"]), t)
        target = gradients.reconstruction_target(
            x0, SCHEDULE.x0(x_t, text, t), config["recon_std_rescale"], config["n_view"]
        )
    loss = target_loss(x, gradients.reconstruction(x.detach(), target))
    close(loss, v["loss_sds"], F3)
    close(torch.autograd.grad(loss, shown)[0], v["dloss_dinput"], F3)


def test_the_spread_is_that_of_each_asset():
    x0 = torch.randn(8, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    wide = torch.cat([x0[:4], 3 * x0[4:]])
    target = gradients.reconstruction_target(wide, x0, 1.0, view_count=4)
    torch.testing.assert_close(target, x0)
