"""Names and shapes of the published networks are ours: built on the meta device, without their numbers."""

import importlib.util
import json

import pytest
import torch

from eg3d_rlhf.models.blip import BlipSizes, from_published
from eg3d_rlhf.models.clip import hpsv2_network
from eg3d_rlhf.models.ldm_names import to_transformers_clip, to_transformers_text
from eg3d_rlhf.models.weights import adopt, empty, entries_below
from eg3d_rlhf.rewards.images.reward3d import Reward3dNetwork
from tests.compat.reference import ROOT

FOLDER = ROOT / "distill" / "params"
pytestmark = pytest.mark.skipif(not FOLDER.exists(), reason="this set has no distill/params")


def published(name: str) -> dict[str, list[int]]:
    """Names and shapes of a table."""
    if not (FOLDER / f"{name}.tsv").is_file():
        pytest.skip(f"this set has no distill/params/{name}.tsv")
    rows = (line.split("\t") for line in (FOLDER / f"{name}.tsv").read_text().splitlines())
    return {name: [int(n) for n in shape.split("x")] if shape else [] for name, shape in rows}


def on_meta(name: str) -> dict[str, torch.Tensor]:
    """A published state dict without its numbers."""
    return {key: torch.empty(shape, device="meta") for key, shape in published(name).items()}


def shapes(module: torch.nn.Module) -> dict[str, list[int]]:
    return {name: list(t.shape) for name, t in module.state_dict().items()}


vision = pytest.mark.skipif(
    not importlib.util.find_spec("transformers"),
    reason="transformers is not installed: pip install 'eg3d-rlhf[vision]'",
)


@vision
@pytest.mark.parametrize("kind", ["Scorer", "CrossViewFusion"])
def test_reward3d(kind):
    wanted = published(f"Reward3D_{kind}")
    assert wanted.pop("blip.text_encoder.embeddings.position_ids") == [1, 512]  # a buffer of old transformers
    state = from_published({name: torch.empty(shape, device="meta") for name, shape in wanted.items()})
    wanted = {name: list(tensor.shape) for name, tensor in state.items()}
    assert shapes(empty(lambda: Reward3dNetwork(kind, BlipSizes()))) == wanted
    network = Reward3dNetwork.from_state_dict(
        on_meta(f"Reward3D_{kind}"), "test"
    )  # sizes from the file's shapes
    assert network.kind == kind and shapes(network) == wanted


@vision
def test_image_reward_is_the_trunk_and_the_mlp():
    state = {n: t for n, t in on_meta("Reward3D_Scorer").items() if not n.startswith("Scorer.")}
    network = Reward3dNetwork.from_state_dict(state, "test")
    assert network.kind == "ImageReward" and {
        *shapes(network),
        "blip.text_encoder.embeddings.position_ids",
    } == set(from_published(state))


def test_open_clips_text_half_is_that_of_stable_diffusion_2():
    # the same encoder; its last layer is not used
    converted = to_transformers_text(on_meta("hpsv2_open_clip_vit_h14"), 23)
    assert {n: list(t.shape) for n, t in converted.items()} == published("sd21_text_encoder")


libraries = pytest.mark.skipif(
    not (importlib.util.find_spec("diffusers") and importlib.util.find_spec("transformers")),
    reason="diffusers and transformers are not installed: pip install 'eg3d-rlhf[sd]'",
)
TEXT = {"sd15": (768, 12, "quick_gelu"), "sd21": (1024, 23, "gelu")}


def text_config(form):
    width, layers, act = TEXT[form]
    return {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,
        "hidden_act": act,
        "projection_dim": width,
    }


@libraries
@pytest.mark.parametrize("form", TEXT)
def test_stable_diffusion_folders(form, tmp_path):
    """config.json as published, so the sizes told before a run are the real ones; the libraries' entries are
    the published ones.
    """
    heads = {"sd15": 8, "sd21": [5, 10, 20, 20]}[form]
    unet = {
        "sample_size": 64,
        "cross_attention_dim": TEXT[form][0],
        "attention_head_dim": heads,
        "use_linear_projection": form == "sd21",
    }
    vae = {
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "layers_per_block": 2,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "latent_channels": 4,
        "scaling_factor": 0.18215,
    }
    for part, config in (("unet", unet), ("vae", vae), ("text_encoder", text_config(form))):
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_text(json.dumps(config))
    from eg3d_rlhf.tuning.distill.priors.latent_diffusion import (
        LatentPrior,
        PriorOptions,
        meta_networks,
        prior_costs,
    )

    options = PriorOptions(device="meta", half=True)
    prior = LatentPrior(meta_networks(tmp_path), None, torch.empty(1000, device="meta"), "epsilon", options)
    assert shapes(prior.unet) == published(f"{form}_unet")
    assert shapes(prior.vae) == published("sd_vae") and shapes(prior.text) == published(
        f"{form}_text_encoder"
    )
    assert prior.latent_shape == (4, 64, 64) and prior.image_size == 512
    costs = prior_costs(tmp_path, 1, PriorOptions(half=True))
    numbers = [round(n / 1e6, 1) for n, _ in costs.weights.values()]
    assert numbers[:2] == [{"sd15": 859.5, "sd21": 865.9}[form], 83.7]
    assert 2.5 < next(iter(costs.stages.values())) / 2**30 < 3.5  # encode one picture of 512^2 and back


@libraries
@pytest.mark.parametrize("form", ["sd15", "sd21_base"])
def test_mvdream_files(form):
    from eg3d_rlhf.tuning.distill.priors.latent_diffusion import OPEN_CLIP, TRANSFORMERS, mvdream_networks

    state = on_meta(f"mvdream_{form}_4view")
    if form == "sd15":
        state |= {f"{TRANSFORMERS}{n}": t for n, t in on_meta("sd15_text_encoder").items()}
    else:
        text = {n: t for n, t in on_meta("hpsv2_open_clip_vit_h14").items() if not n.startswith("visual.")}
        state |= {f"{OPEN_CLIP}{n}": t for n, t in text.items()}
    networks, states = mvdream_networks(state, "test")
    for name, weights in states.items():
        adopt(networks[name], weights, name)  # every entry fits
    assert len(states["unet"]) == len(entries_below(state, "model.diffusion_model."))
    plain = {n: s for n, s in shapes(networks["unet"]).items() if not n.startswith("class_embedding.")}
    assert plain == published({"sd15": "sd15_unet", "sd21_base": "sd21_unet"}[form])
    assert shapes(networks["vae"]) == published("sd_vae")
    assert shapes(networks["text"]) == published(
        {"sd15": "sd15_text_encoder", "sd21_base": "sd21_text_encoder"}[form]
    )
    assert networks["unet"].config.attention_head_dim == (8 if form == "sd15" else (5, 10, 20, 20))


@vision
def test_hpsv2():
    state = on_meta("hpsv2_open_clip_vit_h14")
    network = hpsv2_network(state, "test")
    assert shapes(network) == {
        name: list(tensor.shape) for name, tensor in to_transformers_clip(state).items()
    }
    assert sum(t.numel() for t in network.parameters()) == 986_109_441
