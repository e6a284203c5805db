"""Stable Diffusion and MVDream in their published layouts, tiny and random: through the real loaders, then
one step each.
"""

import json
import os
import shutil

import pytest
import torch

pytest.importorskip("diffusers", reason="diffusers is not installed: pip install 'eg3d-rlhf[sd]'")
pytest.importorskip("transformers", reason="transformers is not installed: pip install 'eg3d-rlhf[sd]'")

from eg3d_rlhf.core.interfaces import DiffusionPrior  # noqa: E402
from eg3d_rlhf.generators.assets.views import evenly_around, network_cameras  # noqa: E402
from eg3d_rlhf.models.weights import print_once  # noqa: E402
from eg3d_rlhf.tuning.distill.gradients import guided, sds, target_loss  # noqa: E402
from eg3d_rlhf.tuning.distill.priors.latent_diffusion import (  # noqa: E402
    PriorOptions,
    join_views,
    load_prior,
    prior_costs,
)
from tests.rejections import raising
from tests.tuning.distill import layouts  # noqa: E402

FORMS = ("1.5", "2.1")


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def four_cameras():
    return evenly_around(1).cameras[:, :16]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folder or file of each layout, written once."""
    root = tmp_path_factory.mktemp("priors")
    paths = {("sd", form): layouts.write_stable_diffusion(root / f"sd{form}", form) for form in FORMS}
    return paths | {("mvdream", form): layouts.write_mvdream(root / f"mvdream{form}", form) for form in FORMS}


def one_sds_step(prior, count):
    """Return the gradient on the images, and the expected one by the chain rule."""
    images = drawn(count, 3, 24, 24).sigmoid().requires_grad_()
    x = prior.encode(images)
    t = torch.full((count,), 500)
    noise = drawn(*x.shape, seed=1)
    alpha = prior.alphas_cumprod[t].view(-1, 1, 1, 1)
    x_t = (alpha.sqrt() * x + (1 - alpha).sqrt() * noise).detach()
    cameras = four_cameras() if prior.views == 4 else None
    with torch.no_grad():
        text = prior.predict_noise(x_t, t, prior.embed(["a red fox"] * count), cameras)
        null = prior.predict_noise(x_t, t, prior.embed([""] * count), cameras)
    assert not torch.allclose(text, null)  # the prompt counts
    grad = sds(guided(text, null, 7.5), noise, 1 - alpha)
    target_loss(x, grad).backward()
    expected = torch.autograd.grad(prior.encode(images), images, grad / images)[0]
    return images.grad, expected


@pytest.mark.parametrize(("kind", "form"), [(kind, form) for kind in ("sd", "mvdream") for form in FORMS])
def test_every_layout_loads_and_drives_a_step(made, kind, form, capsys):
    print_once.cache_clear()
    prior = load_prior(made[kind, form])
    load_prior(made[kind, form])
    output = capsys.readouterr().out
    assert isinstance(prior, DiffusionPrior) and prior.views == (4 if kind == "mvdream" else 1)
    assert output.count("\n") == 1 and (
        "MVDream" in output if kind == "mvdream" else "OpenRAIL" in output
    )  # once
    grad, expected = one_sds_step(prior, 4)
    assert grad.abs().max() > 0
    torch.testing.assert_close(grad, expected, rtol=1e-3, atol=1e-6)
    assert prior.decode(prior.encode(torch.rand(4, 3, 24, 24))).aminmax().min >= 0
    inner = prior.prior
    assert not any(p.requires_grad for net in (inner.unet, inner.vae, inner.text) for p in net.parameters())


@pytest.mark.parametrize("form", FORMS)
def test_stable_diffusion_is_what_its_parts_say(made, form):
    prior = load_prior(made["sd", form])
    unet, vae, text = layouts.latent_networks(form)
    images = drawn(2, 3, 16, 16).sigmoid()
    x = drawn(2, 4, 8, 8)
    t = torch.tensor([20, 980])
    with torch.no_grad():
        torch.testing.assert_close(
            prior.encode(images), 0.18215 * vae.encode(2 * images - 1).latent_dist.mean
        )
        torch.testing.assert_close(prior.decode(x), (vae.decode(x / 0.18215).sample / 2 + 0.5).clamp(0, 1))
        cond = prior.embed(["ab", ""], directions=["front", "back"])
        letters = [layouts.clip_words().index(w) for w in ("a", "b</w>", ",</w>")]
        view = [
            layouts.clip_words().index(w)
            for word in ("front", "view")
            for w in (*word[:-1], word[-1] + "</w>")
        ]
        pad = 0 if form == "2.1" else 513
        ids = [512, *letters, *view, 513]
        tokens = torch.tensor([ids + [pad] * (77 - len(ids)), [512, 513] + [pad] * 75])
        torch.testing.assert_close(cond, text(tokens).last_hidden_state)
        out = unet(x, t, encoder_hidden_states=cond).sample
        alpha = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2).cumprod(0)[t].view(-1, 1, 1, 1)
        noise = alpha.sqrt() * out + (1 - alpha).sqrt() * x if form == "2.1" else out
        torch.testing.assert_close(prior.predict_noise(x, t, cond), noise)


@pytest.mark.parametrize("form", FORMS)
def test_mvdream_is_what_was_written(made, form):
    prior = load_prior(made["mvdream", form].parent)
    unet, vae, text = layouts.latent_networks(form, cameras=True)
    x = drawn(4, 4, 32, 32)
    t = torch.full((4,), 300)
    cameras = four_cameras()
    with torch.no_grad():
        cond = prior.embed(["ab"] * 4, directions=["front"] * 4)
        ids = [512, layouts.clip_words().index("a"), layouts.clip_words().index("b</w>"), 513]
        tokens = torch.tensor([ids + [0 if form == "2.1" else 513] * (77 - len(ids))])
        torch.testing.assert_close(cond, text(tokens).last_hidden_state.expand(4, -1, -1))
        expected = join_views(unet)(
            x, t, encoder_hidden_states=cond, class_labels=network_cameras(cameras)
        ).sample
        got = prior.predict_noise(x, t, cond, cameras)
        torch.testing.assert_close(got, expected)
        assert not torch.allclose(got, prior.predict_noise(x, t, cond, cameras.roll(1, 0)))  # cameras count
        other = torch.cat([x[:3], x[3:] + 1])
        # and so do the other views
        assert not torch.allclose(got[:3], prior.predict_noise(other, t, cond, cameras)[:3])
        images = drawn(1, 3, 64, 64).sigmoid()
        torch.testing.assert_close(
            prior.encode(images.expand(4, -1, -1, -1))[:1],
            0.18215 * vae.encode(2 * images - 1).latent_dist.mean,
        )


def test_options_change_what_they_say(made):
    path = made["sd", "1.5"]
    images = drawn(2, 3, 16, 16).sigmoid()
    x = drawn(2, 4, 8, 8)
    t = torch.tensor([100, 700])
    stored = load_prior(path, PriorOptions(checkpointing=False))
    results = []
    for prior in (stored, load_prior(path)):
        leaf = images.clone().requires_grad_()
        latents = prior.encode(leaf)
        results.append((latents.detach(), *torch.autograd.grad(latents.sin().sum(), leaf)))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)  # checkpointing changes memory alone
    half = load_prior(path, PriorOptions(half=True))
    assert half.prior.unet.dtype == torch.float16 and half.prior.vae.dtype == torch.float32
    with torch.no_grad():
        cond = stored.embed(["a", "b"])
        full, low = (prior.predict_noise(x, t, cond) for prior in (stored, half))
    assert low.dtype == torch.float32 and 0 < (full - low).abs().max() < 0.02 * full.abs().max()


def test_conditions_can_be_learned(made):
    prior = load_prior(made["sd", "2.1"])
    cond = prior.embed(["a"]).requires_grad_()
    x = drawn(1, 4, 8, 8).requires_grad_()
    for grad in torch.autograd.grad(
        prior.predict_noise(x, torch.tensor([400]), cond).square().sum(), [cond, x]
    ):
        assert grad.isfinite().all() and grad.abs().sum() > 0


def swap_for_pickle(folder):
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    torch.save({}, folder / "diffusion_pytorch_model.bin")


def changed(name, **values):
    """A change of a folder's JSON."""

    def change(folder):
        (folder / name).write_text(json.dumps({**json.loads((folder / name).read_text()), **values}))

    return change


def fewer_entries(folder):
    from safetensors.torch import load_file, save_file

    state = load_file(folder / "model.safetensors")
    state.pop("text_model.final_layer_norm.bias")
    save_file(state, folder / "model.safetensors")


def cut_short(file):
    file.write_bytes(file.read_bytes()[:500])


@pytest.mark.parametrize(
    ("part", "change", "names"),
    [
        ("unet", swap_for_pickle, ("unet", ".safetensors")),
        ("unet", changed("config.json", cross_attention_dim=32), ("unet",)),
        ("vae", shutil.rmtree, ("vae",)),
        ("text_encoder", fewer_entries, ("text_model.final_layer_norm.bias",)),
        (
            "scheduler",
            changed("scheduler_config.json", prediction_type="sample"),
            ("epsilon", "v_prediction", "sample"),
        ),
        ("tokenizer", lambda folder: (folder / "merges.txt").unlink(), ("tokenizer", "merges.txt")),
        ("vae/config.json", lambda file: file.write_text("{"), ("vae",)),
        ("vae/diffusion_pytorch_model.safetensors", cut_short, ("vae",)),
    ],
)
def test_damaged_folders_end_in_one_line(made, tmp_path, part, change, names):
    folder = shutil.copytree(made["sd", "1.5"], tmp_path / "sd")
    change(folder / part)
    with raising("--prior", *names, kind=(ValueError, OSError)):
        load_prior(folder)


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (lambda s: s.pop("model.diffusion_model.out.2.bias"), ("missing: conv_out.bias",)),
        (lambda s: s.update({"model.diffusion_model.extra": torch.zeros(1)}), ("unexpected: extra",)),
        (
            lambda s: s.update({"model.diffusion_model.out.2.bias": torch.zeros(5)}),
            ("misshapen: conv_out.bias",),
        ),
        (
            lambda s: s["first_stage_model.quant_conv.bias"].fill_(torch.nan),
            ("quant_conv.bias", "finite"),
        ),
        (lambda s: s.pop("alphas_cumprod"), ("alphas_cumprod",)),
        (lambda s: s.update(alphas_cumprod=torch.ones(10)), ("alphas_cumprod", "1000", "10.")),
        (lambda s: [s.pop(n) for n in list(s) if n.startswith("cond")], ("cond_stage_model",)),
        (lambda s: s.pop("cond_stage_model.model.ln_final.bias"), ("final_layer_norm.bias",)),
    ],
)
def test_damaged_mvdream_files_end_in_one_line(made, tmp_path, change, names):
    state = torch.load(made["mvdream", "2.1"], weights_only=True)
    change(state)
    torch.save(state, tmp_path / "m.pt")
    layouts.write_clip_tokenizer(tmp_path / "tokenizer")
    with raising("--prior", "m.pt", *names):
        load_prior(tmp_path)


def test_a_prior_that_wants_more_than_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    class Hostile:
        def __reduce__(self):
            return os.system, ("echo ran > ran",)

    torch.save({"alphas_cumprod": torch.ones(1000), "more": Hostile()}, tmp_path / "m.pt")
    for read in (load_prior, lambda path: prior_costs(path, 4)):
        with raising("--prior", "m.pt", "pickle"):
            read(tmp_path / "m.pt")
    assert not (tmp_path / "ran").exists()
