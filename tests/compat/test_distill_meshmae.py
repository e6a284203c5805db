"""MeshMAE's face features and encoder against the reference values."""

import pytest
import torch

from eg3d_rlhf.core.interfaces import Mesh, Patches
from eg3d_rlhf.rewards.meshes.model import NUMBERS, MeshEncoder, load_meshmae, masked_max
from eg3d_rlhf.rewards.meshes.patchifiers import face_features, to_frame
from eg3d_rlhf.rewards.meshes.settings import EncoderOptions
from tests.compat.absent import some
from tests.compat.distill_reference import close, filled, needs, present, recipe, under

NAME = "meshmae"
PADDED = recipe(NAME).get("padded", 256)  # patches up to which the published code pads
needs_values = needs(NAME)
MESHES = [case for case, entry in recipe(NAME)["cases"].items() if "patches" in entry]


@needs_values
@pytest.mark.parametrize("case", some(MESHES, f"this set has no case with patches in {NAME}.json"))
def test_features_and_centres(case):
    v = under(NAME, case)
    patches = recipe(NAME)["cases"][case]["patches"]
    vertices = v["vertices"]
    faces = v["faces"].long()
    pick = v["face_index"].long()
    features, centres = face_features(vertices, faces, "raw")
    torch.testing.assert_close(
        features[pick].permute(2, 0, 1), v["feats"], rtol=0, atol=1e-5, check_dtype=False
    )
    torch.testing.assert_close(centres[pick], v["centers"], rtol=0, atol=1e-5, check_dtype=False)
    torch.testing.assert_close(
        to_frame(Mesh(vertices, faces), "box"), v["normalised"], rtol=0, atol=1e-6, check_dtype=False
    )
    assert torch.equal(pick, torch.arange(patches)[:, None] + patches * torch.arange(pick.shape[1])), (
        "the order of our maps"
    )


@pytest.fixture(scope="module")
def network():
    """Encoder with the reference weights, all weights, and its patches [A, P, F, 10], [A, P, F, 3]."""
    if "encoder" not in recipe(NAME):
        pytest.skip("this set has no encoder")
    entry = recipe(NAME)["encoder"]
    v = under(NAME, "encoder")
    weights = filled(entry)
    config = entry["config"]
    features, centres = present(v, "feats", "centers")
    features = features.permute(0, 2, 3, 1)
    assert features.shape[3] == config["channels"] == NUMBERS
    options = EncoderOptions(
        faces=features.shape[2],
        width=config["embed_dim"],
        depth=config["encoder_depth"],
        heads=config["num_heads"],
    )
    encoder = MeshEncoder(options).eval()
    left = load_meshmae(encoder, weights)
    assert "cls_token" in left and not any(
        name.startswith(("blocks", "norm", "to_patch", "pos_")) for name in left
    )
    return encoder, weights, Patches(features, centres, torch.ones(features.shape[:2], dtype=torch.bool))


@needs_values
@torch.no_grad()
def test_encoder(network):
    encoder, weights, patches = network
    tokens = encoder(patches)
    close(tokens, under(NAME, "encoder")["tokens"], 2e-5)
    # zero tokens behind the real ones, which take part in its maximum
    published = masked_max(tokens, patches.mask).clamp_min(0)
    out = torch.nn.functional.linear(published, weights["head.weight"], weights["head.bias"])
    close(out, under(NAME, "encoder")["out40"], 2e-5)


@needs_values
@torch.no_grad()
def test_missing_patches_change_nothing_where_the_published_padding_does(network):
    encoder, weights, patches = network
    (wanted,) = present(under(NAME, "encoder"), "out40_zero_padded")
    count = patches.features.shape[1]
    features, centres = (
        torch.cat([part[:1], part.new_zeros(1, PADDED - count, *part.shape[2:])], 1) for part in patches[:2]
    )
    padded = Patches(features, centres, torch.arange(PADDED)[None] < count)
    plain = encoder(Patches(*(part[:1] for part in patches)))
    masked = encoder(padded)
    attended = encoder(padded._replace(mask=torch.ones(1, PADDED, dtype=torch.bool)))
    torch.testing.assert_close(masked[:, :count], plain)
    torch.testing.assert_close(masked_max(masked, padded.mask), plain.amax(1))
    out = [
        torch.nn.functional.linear(tokens.amax(1), weights["head.weight"], weights["head.bias"])
        for tokens in (attended, plain)
    ]
    close(out[0], wanted, 2e-5)
    assert float((out[0] - out[1]).abs().max()) > 0.01 * float(wanted.abs().max())
