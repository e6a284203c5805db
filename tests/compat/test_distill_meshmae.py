"""MeshMAE's face features and encoder against the reference values."""

import json

import numpy as np
import pytest
import torch

from eg3d_rlhf.core.interfaces import Mesh, Patches
from eg3d_rlhf.rewards.meshes.encoder import EncoderOptions, MeshEncoder, load_meshmae, masked_max
from eg3d_rlhf.rewards.meshes.meshing.features import face_features, placed
from eg3d_rlhf.rewards.meshes.meshing.maps import subdivided
from tests.compat.reference import ROOT

PATH = ROOT / "distill" / "meshmae.npz"
NAMES = list(np.load(PATH)) if PATH.is_file() else []
MESHES = sorted(name.removesuffix("/face_index") for name in NAMES if name.endswith("/face_index"))
pytestmark = pytest.mark.skipif(not NAMES, reason=f"no reference values at {PATH}; set EG3D_RLHF_FIXTURES to their folder")


@pytest.fixture(scope="module")
def reference():
    with np.load(PATH) as arrays:
        return {name: torch.as_tensor(arrays[name]) for name in arrays}


@pytest.fixture(scope="module")
def recipe():
    return json.loads(PATH.with_suffix(".json").read_text())["encoder"]


@pytest.mark.parametrize("mesh", MESHES)
def test_features_and_centres(reference, mesh):
    own = {name.removeprefix(f"{mesh}/"): value for name, value in reference.items() if name.startswith(f"{mesh}/")}
    features, centres = face_features(own["vertices"], own["faces"].long(), "raw")
    pick = own["face_index"].long()
    assert float((features[pick].permute(2, 0, 1) - own["feats"]).abs().max()) <= 1e-5
    assert float((centres[pick] - own["centers"]).abs().max()) <= 1e-5
    assert float((placed(Mesh(own["vertices"], own["faces"].long()), "box") - own["normalised"]).abs().max()) <= 1e-6
    patches = len(pick)
    assert torch.equal(pick, torch.arange(patches)[:, None] + patches * torch.arange(64)), "the order of our maps"


def test_subdivision_leaves_the_published_order():
    points = np.random.RandomState(0).standard_normal((5, 3))
    faces = np.array([[0, 1, 2], [0, 2, 3], [0, 3, 4]])
    once = subdivided(points, faces)
    places, found = subdivided(*once)
    assert len(found) == 48
    for child, row in enumerate(found):  # every child lies in the plane and inside of its ancestor, face child % 3
        corner = points[faces[child % 3]]
        weights = np.linalg.lstsq(np.concatenate([corner.T, np.ones((1, 3))]), np.append(places[row].mean(0), 1), rcond=None)[0]
        assert weights.min() > 0 and np.allclose(weights @ corner, places[row].mean(0))


def filled(recipe) -> dict[str, torch.Tensor]:
    """The weights of the fill rule."""
    made = {}
    for i, (name, shape) in enumerate(recipe["order"]):
        z = np.random.RandomState(recipe["base"] + i).standard_normal(shape)
        if len(shape) > 1:
            z = z / np.sqrt(np.prod(shape[1:]))
        else:
            z = 1 + 0.1 * z if name.endswith("weight") else 0.1 * z
        made[name] = torch.as_tensor(z, dtype=torch.float32)
    return made


def test_encoder(reference, recipe):
    config, weights = recipe["config"], filled(recipe)
    encoder = MeshEncoder(
        EncoderOptions(faces=64, width=config["embed_dim"], depth=config["encoder_depth"], heads=config["num_heads"])
    ).eval()
    left = load_meshmae(encoder, weights)
    assert "cls_token" in left and not any(name.startswith(("blocks", "norm", "to_patch", "pos_")) for name in left)
    features, centres = reference["encoder/feats"].permute(0, 2, 3, 1), reference["encoder/centers"]  # [A, P, F, 10], [A, P, F, 3]
    whole = torch.ones(features.shape[:2], dtype=torch.bool)
    with torch.no_grad():
        tokens = encoder(Patches(features, centres, whole))
    scale = float(reference["encoder/tokens"].abs().max())
    assert float((tokens - reference["encoder/tokens"]).abs().max()) <= 2e-5 * scale
    published = masked_max(tokens, whole).clamp_min(0)  # zero tokens behind the real ones, which take part in its maximum
    found = torch.nn.functional.linear(published, weights["head.weight"], weights["head.bias"])
    assert float((found - reference["encoder/out40"]).abs().max()) <= 2e-5 * float(reference["encoder/out40"].abs().max())


def test_missing_patches_change_nothing_where_the_published_padding_does(reference, recipe):
    config = recipe["config"]
    encoder = MeshEncoder(
        EncoderOptions(faces=64, width=config["embed_dim"], depth=config["encoder_depth"], heads=config["num_heads"])
    ).eval()
    weights = filled(recipe)
    load_meshmae(encoder, weights)
    features, centres = reference["encoder/feats"].permute(0, 2, 3, 1)[:1], reference["encoder/centers"][:1]
    padding = 236
    padded = Patches(
        torch.cat([features, torch.zeros(1, padding, 64, 10)], 1), torch.cat([centres, torch.zeros(1, padding, 64, 3)], 1),
        torch.arange(20 + padding)[None] < 20,
    )
    with torch.no_grad():
        plain = encoder(Patches(features, centres, torch.ones(1, 20, dtype=torch.bool)))
        masked = encoder(padded)
        attended = encoder(padded._replace(mask=torch.ones(1, 20 + padding, dtype=torch.bool)))
    torch.testing.assert_close(masked[:, :20], plain)
    torch.testing.assert_close(masked_max(masked, padded.mask), masked_max(plain, torch.ones(1, 20, dtype=torch.bool)))
    head = [torch.nn.functional.linear(one.amax(1), weights["head.weight"], weights["head.bias"]) for one in (attended, plain)]
    wanted = reference["encoder/out40_zero_padded"]
    assert float((head[0] - wanted).abs().max()) <= 2e-5 * float(wanted.abs().max())
    assert float((head[0] - head[1]).abs().max()) > 0.5
