"""ImageReward, Reward3D, HPSv2 and CLIP in their published layouts, with tiny random weights and the real
loaders.
"""

import os
import sys

import pytest
import torch

from eg3d_rlhf.core.interfaces import CheckedPrior, RewardModel, check_images, check_views
from eg3d_rlhf.core.memory import Costs
from eg3d_rlhf.models.blip import VISION, BlipSizes
from eg3d_rlhf.models.clip_inputs import clip_preprocess, pad_preprocess
from eg3d_rlhf.models.weights import entries_below
from eg3d_rlhf.rewards.images.from_files import CheckedReward, load_reward, reward_costs
from eg3d_rlhf.rewards.images.reward3d import BlipReward, Reward3dNetwork
from eg3d_rlhf.tuning.distill.priors.latent_diffusion import load_prior, prior_costs
from tests.models.published_names import published
from tests.rejections import raising
from tests.tuning.distill import layouts

pytest.importorskip("transformers", reason="transformers is not installed: pip install 'eg3d-rlhf[vision]'")

KINDS = ("ImageReward", "Scorer", "CrossViewFusion")
LAYOUTS = (*KINDS, "HPSv2", "CLIP")
TINY = BlipSizes(
    image=32,
    vision_width=64,
    vision_layers=1,
    text_width=192,
    text_layers=1,
    text_hidden=64,
    vocabulary=50,
    projection=8,
)


def random_images(n, side=40, seed=0):
    return torch.rand(n, 3, side, side + 8, generator=torch.Generator().manual_seed(seed))


def letters(prompts):
    """Tokenise without a library: letters by number, padded with 0."""
    token_indices = torch.zeros(len(prompts), 16, dtype=torch.long)
    for i, prompt in enumerate(prompts):
        token_indices[i, : len(prompt) + 1] = torch.tensor([1, *(2 + ord(c) % 40 for c in prompt)])
    return token_indices, token_indices > 0


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Write a file or folder of each layout once."""
    root = tmp_path_factory.mktemp("rewards")
    paths = {kind: layouts.write_blip_reward(root / kind, kind) for kind in KINDS}
    return paths | {"HPSv2": layouts.write_hpsv2(root / "hps"), "CLIP": layouts.write_clip(root / "clip")}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_loads_and_its_gradient_raises_the_score(made, name):
    reward = load_reward(made[name] if name != "Scorer" else made[name].parent)
    assert isinstance(reward, RewardModel) and reward.differentiable
    assert (reward.views, reward.modality) == ((4, "multiview") if name in KINDS[1:] else (1, "image"))
    images = 0.2 + 0.6 * random_images(8)
    prompts = ["a fox, front view", "a fox, side view", "a cat", ""] * 2
    with torch.no_grad():
        first = reward.score(images, prompts)
        again = reward.score(images, prompts)
        assert first.shape == (8,) and torch.equal(first, again)  # no dropout
        assert not torch.allclose(first, reward.score(images, [p + " z" for p in prompts]))
        second = reward.score(images[4:], prompts[4:])
    torch.testing.assert_close(second, first[4:], rtol=1e-4, atol=1e-5)  # assets are independent
    leaf = images.clone().requires_grad_()
    score = reward.score(leaf, prompts).sum()
    score.backward()
    with torch.no_grad():
        assert reward.score(images + 0.1 * leaf.grad / leaf.grad.norm(), prompts).sum() > score
    assert torch.equal(images, leaf.detach())


def test_the_image_encoder_equals_that_of_transformers(made):
    from transformers import BlipVisionConfig, BlipVisionModel

    network = load_reward(made["ImageReward"]).reward.network.blip
    vision = BlipVisionModel(
        BlipVisionConfig(
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=32,
            patch_size=16,
            layer_norm_eps=1e-6,
        )
    ).eval()
    vision_state_dict = entries_below(torch.load(made["ImageReward"], weights_only=True), VISION)
    renamed = {
        "embeddings.class_embedding": vision_state_dict.pop("cls_token"),
        "embeddings.position_embedding": vision_state_dict.pop("pos_embed"),
    }
    for old, new in vision_state_dict.items():
        for here, there in (
            ("patch_embed.proj", "embeddings.patch_embedding"),
            ("blocks.", "encoder.layers."),
            ("norm1", "layer_norm1"),
            ("norm2", "layer_norm2"),
            ("attn.proj", "attn.projection"),
            ("attn.", "self_attn."),
        ):
            old = old.replace(here, there)
        renamed["post_layernorm" + old.removeprefix("norm") if old.startswith("norm.") else old] = new
    vision.load_state_dict(renamed, strict=True)
    pixels = clip_preprocess(random_images(2), 32)
    with torch.no_grad():
        seen = vision(pixel_values=pixels).last_hidden_state
        torch.testing.assert_close(network.encode_images(pixels), seen, rtol=1e-4, atol=1e-5)


def test_hpsv2_and_clip_score_are_cosines_of_clip_embeddings(made):
    images = random_images(2)
    words = layouts.clip_words()
    token_rows = [[512, words.index("a"), words.index("b</w>"), 513], [512, words.index("c</w>"), 513]]
    tokens = torch.tensor([row + [513] * (77 - len(row)) for row in token_rows])
    for name, act, prepare in (("HPSv2", "gelu", pad_preprocess), ("CLIP", "quick_gelu", clip_preprocess)):
        model = layouts.clip_model(act)
        with torch.no_grad():
            a = model.get_image_features(prepare(images, 28))
            b = model.get_text_features(tokens)
            expected = torch.nn.functional.cosine_similarity(a, b)
            torch.testing.assert_close(
                load_reward(made[name]).score(images, ["ab", "c"]), expected, rtol=1e-4, atol=1e-5
            )


@pytest.mark.parametrize("name", LAYOUTS)
def test_memory_is_estimated_from_shapes(made, name):
    costs = reward_costs(made[name], 4)
    reward = load_reward(made[name])
    ((numbers, size),) = costs.weights.values()
    held = torch.load(made[name], weights_only=True) if name != "CLIP" else layouts.clip_model().state_dict()
    held = held.get("state_dict", held)
    assert (
        numbers == sum(t.numel() for n, t in held.items() if "position_ids" not in n) and size == 4 * numbers
    )
    twice = costs + Costs(weights={"other": (5, 20)}, stages={"small": 1})
    assert twice.total == costs.total + 20 and "small" in str(twice)
    assert max(reward_costs(made[name], 8).stages.values()) > 1.5 * max(
        costs.stages.values()
    ) > 0 and reward.views in (1, 4)
    assert reward.view_prompts == (reward.views == 4)


def test_long_prompts_are_cut(made):
    with torch.no_grad():
        for name, kept in (("ImageReward", 33), ("Scorer", 98), ("HPSv2", 75)):
            reward = load_reward(made[name])
            images = random_images(4)
            spaced = " ".join("abc"[i % 3] for i in range(kept))
            scores = [reward.score(images, [text] * 4) for text in (spaced, spaced + " d d", spaced[:-2])]
            assert torch.equal(scores[0], scores[1]) and not torch.equal(scores[0], scores[2])


@pytest.mark.parametrize("kind", KINDS)
def test_scores_of_a_view_and_of_four(kind):
    network = layouts.randomise(Reward3dNetwork(kind, TINY))
    reward = CheckedReward(BlipReward(network.train(), letters))
    assert not network.training and not any(p.requires_grad for p in network.parameters())
    images = random_images(8)
    prompts = ["ab", "cd", "ef", "gh", "ab", "cd", "ef", "gh"]
    scores = reward.score(images, prompts)
    if kind == "ImageReward":
        assert len(scores.unique()) == 8
    else:  # one score for the four views, independent of the other asset
        assert torch.equal(scores, scores[::4].repeat_interleave(4)) and scores[0] != scores[4]
        with raising("--reward", "4", "6"):
            reward.score(images[:6], prompts[:6])
    with raising("--reward", "1", "8"):
        reward.score(images, ["ab"])
    with raising("--reward", "0..1", "25"):
        reward.score(images * 255, prompts)
    network.mlp.layers[0].bias.data.fill_(torch.nan)
    with raising("--reward", "8 of 8"):
        reward.score(images, prompts)


class Hostile:
    """Object that calls os.system when it is unpickled."""

    def __reduce__(self):
        return os.system, ("echo ran > ran",)


def tiny_state():
    return published(layouts.randomise(Reward3dNetwork("Scorer", TINY)).state_dict(), VISION)


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (lambda s: s.update(more=Hostile()), ("r.pt", "pickle")),
        (lambda s: s.update({"Scorer.fc3.bias": torch.zeros(3)}), ("misshapen: Scorer",)),
        (lambda s: s.pop("mlp.layers.4.weight"), ("missing: mlp.layers.4",)),
        (lambda s: s.update({"mlp.layers.0.bias": "text"}), ("r.pt", "dict")),
        (
            lambda s: s.update({"blip.text_encoder.more": torch.zeros(1)}),
            ("unexpected: blip.text_encoder.more",),
        ),
        (lambda s: s["mlp.layers.0.bias"].fill_(torch.inf), ("mlp.layers.0.bias", "finite")),
        (lambda s: s.pop("blip.visual_encoder.pos_embed"), ("pos_embed",)),
        (lambda s: [s.pop(n) for n in list(s) if n.startswith("blip.")], ("r.pt", "blip.")),
    ],
)
def test_hostile_and_damaged_files_end_in_one_line(tmp_path, monkeypatch, change, names):
    monkeypatch.chdir(tmp_path)
    state_dict = tiny_state()
    change(state_dict)
    torch.save(state_dict, tmp_path / "r.pt")
    for old in (False, True):
        torch.save(state_dict, tmp_path / "r.pt", _use_new_zipfile_serialization=not old)
        with raising("--reward", *names):
            load_reward(tmp_path / "r.pt")
        assert not (tmp_path / "ran").exists()


def test_missing_files_and_libraries_are_named(tmp_path, monkeypatch):
    for error, path in ((FileNotFoundError, tmp_path / "none.pt"), (ValueError, tmp_path)):
        with raising("--reward", path.name, kind=error):
            load_reward(path)
    torch.save(tiny_state(), tmp_path / "r.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "r.pt").read_bytes()[:5000])
    with raising("--reward", "cut.pt"):
        load_reward(tmp_path / "cut.pt")
    with raising("--reward", "cut.pt, r.pt", str(tmp_path)):
        load_reward(tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with raising("--reward", "transformers", "eg3d-rlhf[vision]"):
        load_reward(tmp_path / "r.pt")


def test_priors_without_the_libraries(tmp_path, monkeypatch):
    (tmp_path / "sd" / "unet").mkdir(parents=True)
    torch.save({}, tmp_path / "m.pt")
    monkeypatch.setitem(sys.modules, "diffusers", None)
    for path in (tmp_path / "sd", tmp_path / "m.pt"):
        for read in (load_prior, lambda path: prior_costs(path, 4)):
            with raising("--prior", "diffusers", "transformers", "eg3d-rlhf[sd]"):
                read(path)
    with raising("--prior", "unet"):
        load_prior(tmp_path / "sd" / "unet")


def test_a_reward_without_its_tokenizer(made, tmp_path):
    (tmp_path / "r.pt").write_bytes(made["ImageReward"].read_bytes())
    with raising("--reward", "vocab.txt", str(tmp_path / "tokenizer")):
        load_reward(tmp_path / "r.pt")
    words = layouts.write_bert_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "vocab.txt").write_text("\n".join(f"w{i}" for i in range(2 * words)))
    with raising("--reward", str(words + 2)):
        load_reward(tmp_path / "r.pt")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with raising("--reward", "model_type", "'bert'"):
        load_reward(tmp_path)


class Prior:
    """Prior of four views whose prediction is given."""

    alphas_cumprod = torch.ones(1000)
    latent_shape = (3, 2, 2)
    views = 4

    def __init__(self, out):
        self.out = out

    def encode(self, images):
        return images

    decode = encode

    def embed(self, prompts, directions=None):
        return torch.zeros(len(prompts), 1, 1)

    def predict_noise(self, x_t, t, cond, cameras=None):
        return x_t + self.out


def test_a_checked_prior():
    x = torch.rand(4, 3, 2, 2)
    t = torch.zeros(4)
    cond = torch.zeros(4, 1, 1)
    prior = CheckedPrior(Prior(0.0))
    assert torch.equal(prior.predict_noise(x, t, cond), x) and torch.equal(prior.encode(x), x)
    for call, names in (
        (lambda: prior.predict_noise(x[:3], t[:3], cond[:3]), ("--", "views=4")),
        (lambda: prior.predict_noise(x, t, cond[:1]), ("1 prompts", "4 latents")),
        (lambda: prior.encode(x * 255), ("0..1", "25")),
        (lambda: prior.encode(x * torch.nan), ("0..1", "nan")),
        (lambda: CheckedPrior(Prior(torch.nan)).predict_noise(x, t, cond), ("48 of 48",)),
        (lambda: check_images(x[:, :1], "--reward"), ("--reward", "[B, 3, h, w]", "[4, 1, 2, 2]")),
        (lambda: check_views(0, 1), ("0",)),
    ):
        with raising(*names):
            call()
