"""Depth rewards against the reference values: cameras, preparation, ResNet-50, heads, gradients; the nose floor. Cases are discovered."""

import json
import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from eg3d_rlhf.models.resnet50 import ResNet50
from eg3d_rlhf.rewards import depth
from eg3d_rlhf.rewards.observations.depth import PUBLISHED_FOCAL, VIEWS, Depth, nearness
from eg3d_rlhf.tuning.gan.nose import floor_loss
from tests.compat.reference import ROOT, crc_random

ZOO = ROOT / "reward_zoo"
CASES = sorted(path.stem for path in ZOO.glob("depth_resnet*.json"))
VALUES, GRADIENTS = 5e-5, 3e-4  # relative; observed float32 deviation of the scalar at most 6e-6
KINKS = 0.03  # of the gradient's norm: rounding moves a few pixels across ReLUs and maxima; the same sums in float64 are 1.4 % away
pytestmark = pytest.mark.skipif(not CASES, reason=f"no reference values of depth rewards at {ZOO}; set EG3D_RLHF_FIXTURES to their folder")


def recipe(name: str, shape, gain: float, key: str) -> torch.Tensor:
    """The weights that a name determines, float32."""
    if name.endswith("num_batches_tracked"):
        return torch.tensor(0)
    n = crc_random(key + name, tuple(shape))
    if len(shape) >= 2:
        n = gain * n / math.sqrt(math.prod(shape[1:]))
    elif name.endswith("running_var"):
        n = 1 + 0.2 * np.abs(n)
    else:
        n = 1 + 0.1 * n if name.endswith(".weight") else 0.1 * n
    return torch.from_numpy(np.asarray(n, np.float32))


def rows(file) -> dict[str, list[int]]:
    """Names and shapes of a tsv."""
    lines = [line.split("\t") for line in file.read_text().splitlines()[1:]]
    return {name: [] if shape == "scalar" else [int(n) for n in shape.split("x")] for _, name, shape, *_ in lines}


def depth_maps(seeds, views: int) -> torch.Tensor:
    """The recipe of the JSON, [B, V, 1, 128, 128]."""
    y, x = np.meshgrid(np.linspace(-1, 1, 128), np.linspace(-1, 1, 128), indexing="ij")

    def one(seed, view):
        c = np.random.RandomState(1000 * seed + view).random_sample(6)
        d = 2.75 - 0.30 * np.exp(-((x - 0.2 * (c[0] - 0.5)) ** 2 / 0.30 + (y - 0.2 * (c[1] - 0.5)) ** 2 / 0.45))
        d -= 0.08 * (0.5 + c[2]) * np.exp(-(x**2 + y**2) / 0.02)
        d += 0.02 * np.sin(6 * x + 6 * c[3]) * np.sin(5 * y + 6 * c[4]) + 0.3 * (x**2 + y**2 > 1.2)
        return d.astype(np.float32)

    return torch.from_numpy(np.stack([np.stack([one(s, v) for v in range(views)]) for s in seeds]))[:, :, None]


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    """Its JSON, its arrays, and a file of the backbone's weights as torchvision writes them, with the classifier."""
    about, key = json.loads((ZOO / f"{request.param}.json").read_text()), "E:"
    named = rows(ZOO / "depth_resnet50_state_dict.tsv")
    state = {name.removeprefix("resnet50."): recipe(name, shape, 1.4, about["salt"] + key) for name, shape in named.items()}
    file = tmp_path_factory.mktemp("backbone") / "resnet50.pth"
    torch.save(state, file)
    return about, np.load(ZOO / f"{request.param}.npz"), file


def views_of(arrays) -> list[int]:
    return sorted(int(found[1]) for name in arrays if (found := re.fullmatch(r"v(\d)_scalar", name)))


def close(got, want, tolerance=VALUES):
    want = np.asarray(want, np.float64)
    np.testing.assert_allclose(np.asarray(got.detach(), np.float64).reshape(want.shape), want, rtol=0, atol=tolerance * np.abs(want).max())


def network(about, file, views: int) -> depth.PublishedDepth:
    found = depth.PublishedDepth(views=views, backbone=str(file)).train()  # which must not change the backbone
    state = {name: recipe(name, value.shape, 1.0, about["salt"]) for name, value in found.state_dict().items()}
    found.load_state_dict(state)
    return found.train()


def test_there_are_one_and_three_views(case):
    assert views_of(case[1]) == [1, 3]


def test_names_and_shapes(case):
    about, _, file = case
    one = {name: list(value.shape) for name, value in network(about, file, 1).state_dict().items()}
    assert list(one.items()) == list(rows(ZOO / "depth_heads_state_dict.tsv").items()), "the backbone is left out"
    own = {f"resnet50.{name}": list(value.shape) for name, value in ResNet50().state_dict().items()}
    published = {name: shape for name, shape in rows(ZOO / "depth_resnet50_state_dict.tsv").items() if ".fc." not in name}
    assert list(own.items()) == list(published.items())
    assert sum(p.numel() for p in network(about, file, 1).parameters() if p.requires_grad) == 2_198_660


@pytest.mark.parametrize("views", [1, 3])
def test_preparation_network_and_gradients(case, views):
    about, reference, file = case
    v = f"v{views}_"
    maps = depth_maps(about["seeds"], views).requires_grad_()
    with torch.no_grad():
        close(maps[:, 0, 0, ::16, ::16], reference["dmap_check"], 1e-6)
        prepared = nearness(F.interpolate(maps[:, 0], size=(224, 224), mode="bilinear", align_corners=False), 2.25, 3.3)
        close(prepared[..., ::8, ::8], reference[f"{v}prep_sub"])
        assert [prepared.min(), prepared.max(), prepared.sum()] == pytest.approx(reference[f"{v}prep_stats"].tolist(), rel=VALUES)
    model = network(about, file, views)
    observed = nearness(maps, 2.25, 3.3)
    out, feature = model(observed), model.features(observed.detach())
    close(feature, reference[f"{v}feature"])
    close(out.embedding, reference[f"{v}feat"])
    close(out.scalar, reference[f"{v}scalar"])
    close(out.scalar, reference[f"f64_{v}scalar"])
    close(out.log_strength, reference[f"{v}bt_log"])
    close(model.pair_logits(out.embedding[:1], out.embedding[1:]), reference[f"{v}pairs"])
    out.scalar.sum().backward()
    wanted = torch.from_numpy(reference[f"{v}input_grad_sub"])
    off = maps.grad[..., ::4, ::4] - wanted
    assert off.abs().median() < GRADIENTS * wanted.abs().max() and off.norm() < KINKS * wanted.norm()
    assert [maps.grad.norm(), maps.grad.abs().max()] == pytest.approx(reference[f"{v}input_grad_stats"][[0, 2]].tolist(), rel=KINKS)
    found = dict(model.named_parameters())
    for name, (norm, projection, largest) in zip(reference[f"{v}grad_names"], reference[f"{v}grad"], strict=True):
        gradient = found[name].grad
        if np.isnan(norm):
            assert gradient is None, name
            continue
        assert [gradient.norm(), gradient.abs().max()] == pytest.approx([norm, largest], rel=GRADIENTS), name
        along = float((gradient * torch.from_numpy(crc_random(f"proj:{name}", gradient.shape))).sum())
        assert along == pytest.approx(projection, abs=GRADIENTS * norm), name
    assert all(p.grad is None for p in model.external.parameters())


def test_a_backbone_that_trains_gives_the_other_vector(case):
    """Fault of the published training: its batch norms used the statistics of the batch."""
    about, reference, file = case
    model, observed = network(about, file, 1), nearness(depth_maps(about["seeds"], 1), 2.25, 3.3)
    before = model.features(observed)
    model.external.train()
    other = model.features(observed)
    step = other.shape[1] // reference["v1_feature_if_batchnorm_trains_sub"].shape[1]
    close(other[:, ::step], reference["v1_feature_if_batchnorm_trains_sub"], 1e-3)
    model.train()
    assert not torch.allclose(other, before, rtol=0.1), "train() brought it back to eval; its buffers have drifted, which is the fault"


MISC = sorted(ZOO.glob("misc*.npz"))


@pytest.mark.parametrize("file", MISC, ids=lambda file: file.stem)
def test_cameras(file):
    wanted = np.load(file)["triple_cameras"]
    observation = Depth(yaws=VIEWS[3], focal=PUBLISHED_FOCAL)
    np.testing.assert_array_equal(observation.cameras(), wanted)
    np.testing.assert_array_equal(Depth(focal=PUBLISHED_FOCAL).cameras()[0], wanted[1])
    assert PUBLISHED_FOCAL == pytest.approx(1 / (math.tan(math.radians(18.837) / 2) * math.sqrt(2)), rel=1e-3)


@pytest.mark.parametrize("file", MISC, ids=lambda file: file.stem)
def test_nose_floor(file):
    reference = np.load(file)
    maps, floor = torch.from_numpy(reference["depth"])[None].requires_grad_(), float(reference["nose_floor"])
    loss = floor_loss(maps, floor, violators=True)
    loss.sum().backward()
    assert loss.item() == pytest.approx(float(reference["nose_loss"]), rel=1e-5)
    np.testing.assert_allclose(maps.grad[0], reference["nose_grad"], rtol=1e-5, atol=1e-8)
    share = float((maps < floor).float().mean())
    assert floor_loss(maps, floor).item() == pytest.approx(share * float(reference["nose_loss"]), rel=1e-5), "ours counts all pixels"
