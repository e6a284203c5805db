"""Reward3D's heads against the reference values."""

import json

import numpy as np
import pytest
import torch

from eg3d_rlhf.models.blip import BlipSizes
from eg3d_rlhf.rewards.pictures.reward3d import FUSION_STD, MEAN, STD, Reward3dNetwork
from tests.compat.reference import ROOT, relative_error

FILE = ROOT / "distill" / "dreamreward.npz"
pytestmark = pytest.mark.skipif(not FILE.exists(), reason=f"no reference values at {FILE}; set EG3D_RLHF_FIXTURES to their folder")
TINY = BlipSizes(image=32, vision_width=64, vision_layers=1, text_width=48, text_layers=1, text_hidden=64, vocabulary=50, projection=8)
PARTS = {"mlp": "MLP", "Scorer": "Scorer", "cross_view_adapter": "CrossViewFusion"}


def reference(kind):
    """(network with the reference weights, arrays)."""
    recipe = json.loads(FILE.with_suffix(".json").read_text())
    network = Reward3dNetwork(kind, TINY).eval()
    for name, entry in PARTS.items():
        if hasattr(network, name):
            order, base, scale = (recipe[entry][k] for k in ("order", "base", "scale"))
            drawn = {n: np.random.RandomState(base + i).standard_normal(shape) * scale for i, (n, shape) in enumerate(order)}
            state = {n: torch.from_numpy(np.asarray(v, np.float32)) for n, v in drawn.items()}
            getattr(network, name).load_state_dict(state, strict=True)
    return network, {k: torch.from_numpy(v) for k, v in np.load(FILE).items()}


@pytest.mark.parametrize(("kind", "case", "std"), [("Scorer", "scorer", STD), ("CrossViewFusion", "fusion", FUSION_STD)])
def test_rewards_and_gradients_of_the_heads(kind, case, std):
    network, values = reference(kind)
    features = values[f"{case}/features"].clone().requires_grad_()
    reward = network.head(features)
    assert relative_error(reward[:, None], values[f"{case}/reward"]) < 1e-5
    assert relative_error(reward[:, None] * std + MEAN, values[f"{case}/raw"]) < 1e-5
    reward.sum().backward()
    assert relative_error(features.grad, values[f"{case}/dreward_dfeatures"]) < 1e-5


def test_the_parts_in_between():
    network, values = reference("CrossViewFusion")
    assert relative_error(network.mlp(values["mlp/features"]), values["mlp/out"]) < 1e-5
    fused = network.cross_view_adapter(values["fusion/features"].unflatten(0, (-1, 4)))
    assert relative_error(fused, values["fusion/fused"]) < 1e-5
    wide = network.mlp.wide(values["scorer/features"])
    assert relative_error(wide, values["scorer/feature128"]) < 1e-5


def test_dropout_would_show():
    network, values = reference("Scorer")
    calm, live = network.head(values["scorer/features"]), network.train().head(values["scorer/features"])
    assert not torch.allclose(calm, live)  # so eval mode matters
