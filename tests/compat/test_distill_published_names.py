"""Names and shapes of the published networks are ours: built on the meta device, without their numbers."""

import pytest
import torch

from eg3d_rlhf.distill.local_files import build_on_meta
from eg3d_rlhf.distill.rewards.blip import BlipSizes
from eg3d_rlhf.distill.rewards.reward3d import Reward3dNetwork
from tests.compat.reference import ROOT

FOLDER = ROOT / "distill" / "params"
pytestmark = pytest.mark.skipif(not FOLDER.exists(), reason=f"no reference values at {FOLDER}; set EG3D_RLHF_FIXTURES to their folder")


def published(name: str) -> dict[str, list[int]]:
    """Names and shapes of a table."""
    rows = (line.split("\t") for line in (FOLDER / f"{name}.tsv").read_text().splitlines())
    return {name: [int(n) for n in shape.split("x")] if shape else [] for name, shape in rows}


def on_meta(name: str) -> dict[str, torch.Tensor]:
    """A published state dict without its numbers."""
    return {key: torch.empty(shape, device="meta") for key, shape in published(name).items()}


def shapes(module: torch.nn.Module) -> dict[str, list[int]]:
    return {name: list(t.shape) for name, t in module.state_dict().items()}


@pytest.mark.parametrize("kind", ["Scorer", "CrossViewFusion"])
def test_reward3d(kind):
    wanted = published(f"Reward3D_{kind}")
    assert wanted.pop("blip.text_encoder.embeddings.position_ids") == [1, 512]  # a buffer of old transformers
    assert shapes(build_on_meta(lambda: Reward3dNetwork(kind, BlipSizes()))) == wanted
    found = Reward3dNetwork.of(on_meta(f"Reward3D_{kind}"), "test")  # sizes as the file tells
    assert found.kind == kind and shapes(found) == wanted


def test_image_reward_is_the_trunk_and_the_mlp():
    state = {n: t for n, t in on_meta("Reward3D_Scorer").items() if not n.startswith("Scorer.")}
    network = Reward3dNetwork.of(state, "test")
    assert network.kind == "ImageReward" and {*shapes(network), "blip.text_encoder.embeddings.position_ids"} == set(state)
