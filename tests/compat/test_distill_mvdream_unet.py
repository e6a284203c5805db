"""MVDream's U-Net, converted to diffusers, against the original's values."""

import re

import pytest
import torch

from eg3d_rlhf.models.ldm_names import to_diffusers_unet, unet_config
from eg3d_rlhf.models.weights import adopt, empty
from eg3d_rlhf.tuning.distill.priors.latent_diffusion import join_views
from tests.compat.distill_reference import close, each, entry_of, filled, needs, recipe, under

NAME = "mvdream_unet"
BOUND = 2e-5
pytestmark = needs(NAME)


def original(case: str, side: int):
    """U-Net with the reference weights, of latents of `side` pixels."""
    if case not in recipe(NAME):
        pytest.skip(f"this set has no {case} in {NAME}.json")
    entry = recipe(NAME)[case]
    state = filled(entry)
    heads = entry["config"]
    config = unet_config(state, "test", side)
    widths = config["block_out_channels"]
    assert widths == tuple(heads["model_channels"] * m for m in heads["channel_mult"])
    assert config["layers_per_block"] == heads["num_res_blocks"]
    assert config["use_linear_projection"] == heads.get("use_linear_in_transformer", False)
    assert config["cross_attention_dim"] == heads["context_dim"]
    per_head = heads.get("num_head_channels")  # the reference networks are narrower than the published ones
    config["attention_head_dim"] = tuple(w // per_head for w in widths) if per_head else heads["num_heads"]
    from diffusers import UNet2DConditionModel

    unet = empty(lambda: UNet2DConditionModel(**config))
    adopt(unet, to_diffusers_unet(state), "test")
    return unet.eval()


@each(NAME)
def test_the_converted_network_is_the_original(case):
    pytest.importorskip("diffusers", reason="diffusers is not installed: pip install 'eg3d-rlhf[sd]'")
    v = under(NAME, case)
    entry = entry_of(NAME, case)
    said = re.search(r"num_frames (\d+)", entry.get("what", ""))
    views = entry["num_frames"] if said is None else int(said[1])
    unet = original(case, v["x"].shape[-1])
    x = v["x"].clone().requires_grad_()
    context = v["context"].clone().requires_grad_()
    joined = join_views(unet, views)
    out = joined(x, v["t"], context, class_labels=v["camera"]).sample
    close(out, v["out"], BOUND)
    dx, dcontext = torch.autograd.grad((out * v["weight"]).sum(), [x, context])
    close(dx, v["dsum_dx"], BOUND)
    close(dcontext, v["dsum_dcontext"], BOUND)
    with torch.no_grad():
        if "out_no_camera" in v:
            close(joined(x, v["t"], context, class_labels=None).sample, v["out_no_camera"], BOUND)
        if "out_one_view" in v:
            close(
                join_views(unet, 1)(x, v["t"], context, class_labels=v["camera"]).sample,
                v["out_one_view"],
                BOUND,
            )
