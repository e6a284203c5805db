"""Reward3D's heads against the reference values."""

import pytest

from eg3d_rlhf.models.blip import BlipSizes
from eg3d_rlhf.rewards.images.reward3d import FUSION_STD, MEAN, STD, VIEWS, Reward3dNetwork
from tests.compat.distill_reference import filled, needs, present, recipe, values
from tests.compat.reference import relative_error

NAME = "dreamreward"
pytestmark = needs(NAME)
PARTS = {"mlp": "MLP", "Scorer": "Scorer", "cross_view_adapter": "CrossViewFusion"}


def reference(kind: str):
    """(network with the reference weights, arrays)."""
    if "MLP" not in recipe(NAME):
        pytest.skip(f"this set has no MLP in {NAME}.json")
    width = recipe(NAME)["MLP"]["order"][0][1][1]  # of the features
    sizes = BlipSizes(
        image=32,
        vision_width=64,
        vision_layers=1,
        text_width=width,
        text_layers=1,
        text_hidden=64,
        vocabulary=50,
        projection=8,
    )
    network = Reward3dNetwork(kind, sizes).eval()
    for name, entry in PARTS.items():
        if hasattr(network, name):
            if entry not in recipe(NAME):
                pytest.skip(f"this set has no {entry} in {NAME}.json")
            getattr(network, name).load_state_dict(filled(recipe(NAME)[entry]), strict=True)
    return network, values(NAME)


@pytest.mark.parametrize(
    ("kind", "case", "std"), [("Scorer", "scorer", STD), ("CrossViewFusion", "fusion", FUSION_STD)]
)
def test_rewards_and_gradients_of_the_heads(kind, case, std):
    network, arrays = reference(kind)
    features, rewards, raw, slope = present(
        arrays, *(f"{case}/{name}" for name in ("features", "reward", "raw", "dreward_dfeatures"))
    )
    features = features.clone().requires_grad_()
    reward = network.head(features)
    assert relative_error(reward[:, None], rewards) < 1e-5
    assert relative_error(reward[:, None] * std + MEAN, raw) < 1e-5
    reward.sum().backward()
    assert relative_error(features.grad, slope) < 1e-5


@pytest.mark.parametrize(
    ("case", "entry", "wanted"),
    [
        ("mlp", "features", "out"),
        ("fusion", "features", "fused"),
        ("scorer", "features", "feature128"),
    ],
)
def test_the_parts_in_between(case, entry, wanted):
    network, arrays = reference("CrossViewFusion" if case == "fusion" else "Scorer")
    features, out = present(arrays, f"{case}/{entry}", f"{case}/{wanted}")
    part = {
        "mlp": network.mlp,
        "scorer": network.mlp.hidden,
        "fusion": lambda x: network.cross_view_adapter(x.unflatten(0, (-1, VIEWS))),
    }[case]
    assert relative_error(part(features), out) < 1e-5
