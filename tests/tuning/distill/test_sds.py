"""Score distillation on the analytic prior (B1), its forms, and bad input."""

import math

import pytest
import torch

from eg3d_rlhf.tuning.distill.gradients import distillation_loss, target_loss
from eg3d_rlhf.tuning.distill.guidance.sds import Sds
from eg3d_rlhf.tuning.distill.guidance.settings import DenoiserSettings, SdsSettings
from eg3d_rlhf.tuning.distill.schedule import Streams, draw_times
from eg3d_rlhf.tuning.distill.schedules_by_step import Ramp, TimeWindow
from tests.rejections import raising
from tests.tuning.distill.particles import PROMPT, optimise, prior

STREAMS = Streams(seed=0)


def sds(made, **more) -> Sds:
    chosen = {key: more.pop(key) for key in ("samples", "image_loss") if key in more}
    return Sds(made, SdsSettings(prior=DenoiserSettings(**more), **chosen), views=1, streams=STREAMS)


def some(n: int = 6, seed: int = 0):
    draws = torch.Generator().manual_seed(seed)
    return (
        torch.randn(n, 1, 4, 4, generator=draws),
        torch.randint(20, 980, (n,), generator=draws),
        [PROMPT] * n,
    )


@pytest.mark.parametrize("modes", [pytest.param(1, marks=pytest.mark.long), 2])
def test_particles_reach_the_modes_of_the_prior(modes):
    made = prior(modes)
    end = optimise(sds(made), made, steps=800, lr=0.03)
    assert end.rms < 0.15 and end.near >= 0.95, end
    assert modes == 1 or abs(end.share - 0.5) < 0.1, end


def test_samples_are_averaged():
    made = prior()
    x, t, prompts = some()

    class Only(Streams):
        """Noise number `seed` of the common draws."""

        def noises(self, count, like, step):
            return STREAMS.noises(3, like, step)[self.seed : self.seed + count]

    singles = [
        Sds(made, SdsSettings(), views=1, streams=Only(seed=k))(x, t, prompts, None, 5).grad for k in range(3)
    ]
    torch.testing.assert_close(
        sds(made, samples=3)(x, t, prompts, None, 5).grad, torch.stack(singles).mean(0)
    )


def test_the_chained_jacobian_is_sds_with_equal_weights():
    made = prior()
    x, t, prompts = some()
    chained, equal = (
        sds(made, **more)(x, t, prompts, None, 0).grad for more in ({"form": "sjc"}, {"weighting": "uniform"})
    )
    torch.testing.assert_close(chained, equal, rtol=1e-3, atol=1e-4)
    reference = sds(made, form="sjc-plain")(x, t, prompts, None, 0).grad
    torch.testing.assert_close(reference - equal, STREAMS.noises(1, x, 0)[0], rtol=1e-3, atol=1e-4)


def test_the_reconstruction_form_is_sds_weighted_by_the_noise_ratio():
    made = prior()
    x, t, prompts = some()
    guidance = sds(made, weighting="uniform")
    bar = guidance.denoiser.schedule.alpha(t, x)
    recon = sds(made, form="recon", rescale=0.0)(x, t, prompts, None, 0).grad
    torch.testing.assert_close(
        recon, ((1 - bar) / bar).sqrt() * guidance(x, t, prompts, None, 0).grad, rtol=1e-3, atol=1e-4
    )


def test_the_loss_on_images():
    made = prior()
    x, t, prompts = some()
    images = made.decode(x).requires_grad_()
    output = sds(made, image_loss=1.0)(x, t, prompts, None, 0, images.detach())
    reference = sds(made)(x, t, prompts, None, 0)
    assert torch.equal(output.grad, reference.grad)  # beside the other term
    # (a / s) w (image - decoded x0) = w (p - e) / (2 scale), as decoding halves and divides
    torch.testing.assert_close(output.image_grad, reference.grad / (2 * made.scale), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(
        torch.autograd.grad(distillation_loss(x, output, images=images), images)[0],
        output.image_grad / len(x),
    )
    assert not distillation_loss(x, reference, images=images).requires_grad


def test_the_target_rule():
    x = torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    grad = torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(
        torch.autograd.grad(target_loss(x, grad), x)[0], grad / 4, rtol=1e-5, atol=1e-6
    )
    grad[0, 0, 0, 0], grad[1, 0, 0, 0] = math.nan, math.inf
    got = torch.autograd.grad(target_loss(x, grad, clamp=0.5), x)[0]
    assert (
        got[0, 0, 0, 0] == 0
        and got[1, 0, 0, 0] == pytest.approx(0.125, abs=1e-6)
        and got.abs().max() <= 0.125 + 1e-6
    )


def test_draws_depend_on_seed_stream_and_step_alone():
    x = torch.zeros(2, 1, 4, 4)
    state = torch.random.get_rng_state()
    two = STREAMS.noises(2, x, 7)
    three = STREAMS.noises(3, x, 7)
    assert torch.equal(two, three[:2]) and not torch.equal(three[0], three[1])
    assert not torch.equal(two, STREAMS.noises(2, x, 8)) and not torch.equal(
        two, Streams(seed=1).noises(2, x, 7)
    )
    assert torch.equal(state, torch.random.get_rng_state())


def test_times():
    draws = torch.Generator().manual_seed(0)
    window = TimeWindow(low=Ramp(0.02), high=Ramp((0, 0.98, 0.04, 10)))
    late = torch.cat([draw_times(window, 10, 50, 4, draws) for _ in range(20)])
    # both ends count
    assert (late.view(-1, 4) == late.view(-1, 4)[:, :1]).all() and late.unique().tolist() == list(
        range(20, 41)
    )
    assert len(draw_times(window, 0, 2, 100, draws, shared=False).unique()) > 50
    with raising("TimeWindow", "t_min", "t_max", "500", "20", "10"):
        TimeWindow(low=Ramp(0.5), high=Ramp((0, 0.98, 0.02, 10))).at(10)


class Failing:
    """A prior that answers NaN."""

    def __init__(self, made):
        self.made = made

    def __getattr__(self, name):
        return getattr(self.made, name)

    def predict_noise(self, x_t, t, cond, cameras=None):
        return torch.full_like(x_t, math.nan)


def test_hostile_priors_and_settings():
    made = prior()
    x, t, prompts = some()
    with raising("--prior", "NaN"):
        sds(Failing(made))(x, t, prompts, None, 0)
    four = Failing(made)
    four.views = 4
    with raising("--set views=6", "4"):
        Sds(four, SdsSettings(), views=6, streams=STREAMS)
    with raising("--set view_prompts=True", "cameras"):
        sds(made, view_prompts=True)(x, t, prompts, None, 0)
    with raising("Ramp", "(0, 1.0, 2.0, 3, 4.0)"):
        Ramp((0, 1.0, 2.0, 3, 4.0))
    with raising("TimeWindow", "high", "[1.0]"):
        TimeWindow(high=Ramp(1.0))
