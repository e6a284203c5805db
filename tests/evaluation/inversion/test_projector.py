"""One inversion, step by step: what each stage may change, what guides it, and that it arrives."""

import dataclasses

import pytest
import torch

from eg3d_rlhf.evaluation.inversion import projector
from eg3d_rlhf.evaluation.inversion.targets import case_from_seed
from eg3d_rlhf.generators import camera, load_generator
from eg3d_rlhf.rewards.reward import load_reward
from eg3d_rlhf.tuning.gan.latent_search import CLIP, Guidance
from tests.evaluation.inversion.conftest import CONFIG
from tests.rejections import raising
from tests.tiny_runs import assert_same, state


def walk(stage, first=0, last=None):
    return [stage.step(step) for step in range(first, stage.steps if last is None else last)]


@pytest.fixture
def objective(cases, perceptual):
    def make(config=CONFIG, guidance=None, **target):
        return projector.Objective(config, cases[0].target._replace(**target), perceptual, guidance)

    return make


def test_a_stage_goes_on_from_its_state_as_if_it_had_never_stopped(generator, objective, prior, guidance):
    makers = {
        "w": lambda: projector.LatentStage(generator, objective(guidance=guidance), prior),
        "pivot": lambda: projector.PivotalStage(
            generator, objective(guidance=guidance), prior.mean.repeat(1, generator.num_ws, 1), 0.3
        ),
    }
    for make in makers.values():
        straight = make()
        first = make()
        second = make()
        whole = walk(straight)
        part = walk(first, 0, 3)
        second.restore({name: value.clone() for name, value in first.state().items()})
        assert part + walk(second, 3) == whole
        assert_same(second.state(), straight.state())


def test_weight_0_is_the_plain_projector_bit_for_bit(generator, objective, prior, guidance):
    ws = prior.mean.repeat(1, generator.num_ws, 1)
    pairs = ((None, 0.0), (guidance, 0.0), (guidance, 0.3))
    plain, zero, guided = (
        projector.PivotalStage(generator, objective(guidance=one), ws, weight) for one, weight in pairs
    )
    assert walk(plain) == walk(zero)
    assert_same(plain.state(), zero.state())
    walk(guided)
    moved = [name for name, value in plain.state().items() if not torch.equal(value, guided.state()[name])]
    assert any(name.startswith("G.decoder") for name in moved)


def test_the_reward_gets_no_gradient_and_does_not_change(generator, objective, prior, tiny_reward):
    guidance = Guidance(generator, load_reward(tiny_reward).requires_grad_(True))
    before = state(guidance.reward)
    stage = projector.PivotalStage(
        generator, objective(guidance=guidance), prior.mean.repeat(1, generator.num_ws, 1), 1.0
    )
    walk(stage)
    assert [p.grad for p in guidance.reward.parameters() if p.grad is not None] == []
    assert_same(state(guidance.reward), before)


def test_the_given_generator_stays_and_the_latent_is_held(generator, objective, prior):
    before = state(generator.module)
    ws = prior.mean.repeat(1, generator.num_ws, 1)
    stage = projector.PivotalStage(generator, objective(), ws)
    walk(stage)
    assert_same(state(generator.module), before)
    assert torch.equal(stage.ws, ws) and any(
        not torch.equal(a, b) for a, b in zip(stage.state().values(), before.values(), strict=False)
    )


def test_the_reward_enters_every_second_step_and_counts_twice(generator, objective, prior, guidance):
    stage = projector.PivotalStage(
        generator, objective(guidance=guidance), prior.mean.repeat(1, generator.num_ws, 1), 0.3
    )
    result = walk(stage)
    assert ["reward" in one for one in result] == [True, False, True, False, True]
    one = result[0]
    term = -float(guidance.standard.shaped(torch.tensor(one["reward"])).clamp(-CLIP, CLIP)) / CLIP
    image = CONFIG.lambda_mse * one["mse"] + one["perceptual"]
    assert one["moved"] == 0 and one["loss"] == pytest.approx(image + 2 * 0.3 * term, rel=1e-5)
    assert result[2]["moved"] > 0


def test_consistency_holds_the_density(generator, objective, prior, guidance):
    ws = prior.mean.repeat(1, generator.num_ws, 1)
    moved = []
    for held in (0.0, 100.0):
        config = dataclasses.replace(
            CONFIG, pivot_steps=12, lambda_sigma=held or 1e-12, reward_every=1, pivot_lr=1e-3
        )
        moved.append(
            walk(projector.PivotalStage(generator, objective(config, guidance), ws, 1.0))[-1]["moved"]
        )
    assert moved[1] < 0.7 * moved[0]


def test_outside_the_mask_nothing_counts(generator, objective, prior, cases):
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., 8:24, 8:24] = 1
    image = cases[0].target.image
    other = torch.where(mask > 0, image, -image)
    masked = [objective(mask=mask, image=one) for one in (image, other)]
    seen = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0), requires_grad=True)
    mse = [one.image_loss(seen)[1]["mse"] for one in masked]
    inside = (seen.detach() - image)[..., 8:24, 8:24].square().mean()
    assert mse[0] == mse[1] and float(mse[0].detach()) == pytest.approx(float(inside), rel=1e-5)
    masked[0].image_loss(seen)[0].backward()
    slope = seen.grad.abs()
    assert float(slope[..., :8, :].max()) == 0 and float(slope[..., 8:24, 8:24].max()) > 0
    whole = objective(mask=torch.ones(1, 1, 32, 32))
    plain = objective()
    assert float(whole.image_loss(seen.detach())[0]) == pytest.approx(
        float(plain.image_loss(seen.detach())[0]), rel=1e-5
    )


def test_the_mean_latent_and_the_standard_deviation(generator, prior):
    w = generator.mapping(
        torch.randn(4000, generator.z_dim, generator=torch.Generator().manual_seed(1)),
        camera(generator, n=4000),
    )[:, 0]
    assert prior.standard_deviation == pytest.approx(
        float((w - w.mean(dim=0)).norm(dim=1).square().mean().sqrt()), rel=0.03
    )
    assert float((prior.mean[0, 0] - w.mean(dim=0)).norm()) < 0.05 * prior.standard_deviation


class Lpips(torch.nn.Module):
    """Called as the projectors' VGG16."""

    def forward(
        self, images: torch.Tensor, resize_images: bool = True, return_lpips: bool = False
    ) -> torch.Tensor:
        assert return_lpips and not resize_images and float(images.max()) <= 255
        return images.mean(dim=2).flatten(1) / 255


def test_a_torchscript_file_gives_the_features(tmp_path):
    torch.jit.script(Lpips()).save(tmp_path / "vgg.pt")
    net = projector.load_perceptual(tmp_path / "vgg.pt", 32)
    a = torch.full((1, 3, 32, 32), 1.0)
    b = torch.full((1, 3, 32, 32), -1.0)
    assert net.name == "torchscript-vgg" and float(net(a, b)) == pytest.approx(3 * 32)
    large = torch.full((1, 3, 512, 512), 1.0)
    assert net.features(large).shape == (1, 3 * 256)


class Blind(torch.nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.detach().flatten(1)


def test_features_without_a_gradient_are_rejected(tmp_path):
    torch.jit.script(Blind()).save(tmp_path / "blind.pt")
    with raising("blind.pt", "gradients"):
        projector.load_perceptual(tmp_path / "blind.pt", 32)
    (tmp_path / "text.pt").write_text("none")
    with raising("text.pt", "TorchScript"):
        projector.load_perceptual(tmp_path / "text.pt", 32)


@pytest.mark.long
def test_from_the_true_latent_the_bundled_generator_reproduces_its_image(perceptual):
    own = load_generator().generator
    case = case_from_seed(own, 3, camera(own))
    config = projector.InversionConfig(w_steps=100)
    objective = projector.Objective(config, case.target, perceptual)
    first = projector.LatentStage(own, objective, projector.estimate_prior(own), case.truth.ws)
    walk(first)
    second = projector.PivotalStage(own, objective, first.ws)
    walk(second)
    errors = []
    with torch.no_grad():
        for generator in (own, second.generator):
            errors.append(
                float(objective.image_loss(objective.render(generator.field(first.ws), 0))[1]["mse"])
            )
    assert errors[1] < errors[0] <= 1e-4
