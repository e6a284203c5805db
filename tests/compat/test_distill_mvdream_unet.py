"""MVDream's U-Net, converted to diffusers, against the original's values; its cameras."""

import json

import numpy as np
import pytest
import torch

from eg3d_rlhf.generators.assets.views import evenly_around, network_cameras
from eg3d_rlhf.models.ldm_names import to_diffusers_unet, unet_config
from eg3d_rlhf.models.local_files import build_on_meta, load_strict
from eg3d_rlhf.tuning.distill.priors.mvdream import join_views
from tests.compat.reference import ROOT

FILE = ROOT / "distill" / "mvdream_unet.npz"
CASES = list(json.loads(FILE.with_suffix(".json").read_text())["cases"]) if FILE.exists() else []
needs_values = pytest.mark.skipif(not CASES, reason=f"no reference values at {FILE}; set EG3D_RLHF_FIXTURES to their folder")


def close(value, reference, bound=2e-5):
    assert (value.detach() - reference).abs().max() <= bound * reference.abs().max()


def reference(name):
    """(U-Net with the reference weights, arrays)."""
    recipe, state = json.loads(FILE.with_suffix(".json").read_text())[name], {}
    for i, (key, shape) in enumerate(recipe["order"]):
        z = np.random.RandomState(recipe["base"] + i).standard_normal(shape)
        z = z / np.sqrt(np.prod(shape[1:])) if len(shape) > 1 else (1 + 0.1 * z if key.endswith("weight") else 0.1 * z)
        state[key] = torch.from_numpy(np.asarray(z, np.float32))
    config, heads = unet_config(state, "test", 8), recipe["config"]
    widths = config["block_out_channels"]
    assert widths == tuple(heads["model_channels"] * m for m in heads["channel_mult"])
    assert config["layers_per_block"] == heads["num_res_blocks"]
    assert config["use_linear_projection"] == heads.get("use_linear_in_transformer", False)
    assert config["cross_attention_dim"] == heads["context_dim"]
    per_head = heads.get("num_head_channels")  # the reference networks are narrower than the published ones
    config["attention_head_dim"] = tuple(w // per_head for w in widths) if per_head else heads["num_heads"]
    from diffusers import UNet2DConditionModel

    unet = build_on_meta(lambda: UNet2DConditionModel(**config))
    load_strict(unet, to_diffusers_unet(state), "test")
    prefix = f"{name}/"
    return unet.eval(), {k.removeprefix(prefix): torch.from_numpy(v) for k, v in np.load(FILE).items() if k.startswith(prefix)}


@needs_values
@pytest.mark.parametrize("name", CASES)
def test_the_converted_network_is_the_original(name):
    pytest.importorskip("diffusers", reason="diffusers is not installed: pip install 'eg3d-rlhf[sd]'")
    unet, values = reference(name)
    x, context = values["x"].requires_grad_(), values["context"].requires_grad_()
    joined = join_views(unet)
    out = joined(x, values["t"], context, class_labels=values["camera"]).sample
    close(out, values["out"])
    dx, dcontext = torch.autograd.grad((out * values["weight"]).sum(), [x, context])
    close(dx, values["dsum_dx"])
    close(dcontext, values["dsum_dcontext"])
    with torch.no_grad():
        close(joined(x, values["t"], context, class_labels=None).sample, values["out_no_camera"])
        close(join_views(unet, 1)(x, values["t"], context, class_labels=values["camera"]).sample, values["out_one_view"])


@pytest.mark.skipif(not (ROOT / "distill" / "schedules.npz").exists(), reason="no reference values; set EG3D_RLHF_FIXTURES to their folder")
def test_our_front_is_the_networks_front():
    """MVDream's table counts azimuth from -y; the front, +x, is at its 90 degrees. In turn: front, +x of ours to +y of its, ..."""
    theirs = torch.from_numpy(np.load(ROOT / "distill" / "schedules.npz")["camera/n4_e15_a90_s360/blender"])
    ours = evenly_around(1, elevation=15, distance=2.7).cameras
    before = ours.clone()
    assert theirs[0].view(4, 4)[0, 3] > 0.9
    torch.testing.assert_close(network_cameras(ours), theirs, rtol=1e-5, atol=1e-5)
    assert torch.equal(ours, before)
