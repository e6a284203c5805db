"""Depth rewards against the reference values: cameras, preparation, ResNet-50, heads, gradients; the nose
floor. Cases are discovered.
"""

import functools
import json
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from eg3d_rlhf.models.resnet50 import ResNet50
from eg3d_rlhf.rewards import depth
from eg3d_rlhf.rewards.depth import nearness
from tests.compat.reference import ROOT, close, crc_random, hold, of_set, weight_of

ZOO = ROOT / "reward_zoo"
CASES = sorted(path.stem for path in ZOO.glob("depth_resnet*.json"))
VIEWED = [  # (case, views): those whose rewards a set holds
    (case, int(match[1]))
    for case in CASES
    for name in np.load(ZOO / f"{case}.npz")
    if (match := re.fullmatch(r"v(\d)_scalar", name))
]
# depth that becomes 1, and how far behind it becomes 0: the published preparation
NEAREST = 2.25
SPAN = 1.05
# relative; observed float32 deviation of the scalar at most 6e-6
VALUES = 2.5e-5
GRADIENTS = 3e-4
# of the gradient's norm: rounding moves a few pixels across ReLUs and maxima; the same sums in float64 are
# 1.4 % away
KINKS = 0.03
pytestmark = pytest.mark.skipif(
    not CASES, reason=f"no reference values of depth rewards at {ZOO}; set EG3D_RLHF_FIXTURES to their folder"
)


def rows(file) -> dict[str, list[int]]:
    """Names and shapes of a tsv."""
    lines = [line.split("\t") for line in file.read_text().splitlines()[1:]]
    return {
        name: [] if shape == "scalar" else [int(n) for n in shape.split("x")] for _, name, shape, *_ in lines
    }


def depth_maps(about: dict, views: int) -> torch.Tensor:
    """The recipe of the JSON, [B, V, 1, H, W]."""
    height, width = (int(side) for side in re.search(r"\[(\d+),(\d+)\]", about["depth"]).groups())
    y, x = np.meshgrid(np.linspace(-1, 1, height), np.linspace(-1, 1, width), indexing="ij")

    def depth_map(seed, view):
        c = np.random.RandomState(1000 * seed + view).random_sample(6)
        d = 2.75 - 0.30 * np.exp(
            -((x - 0.2 * (c[0] - 0.5)) ** 2 / 0.30 + (y - 0.2 * (c[1] - 0.5)) ** 2 / 0.45)
        )
        d -= 0.08 * (0.5 + c[2]) * np.exp(-(x**2 + y**2) / 0.02)
        d += 0.02 * np.sin(6 * x + 6 * c[3]) * np.sin(5 * y + 6 * c[4]) + 0.3 * (x**2 + y**2 > 1.2)
        return d.astype(np.float32)

    return torch.from_numpy(
        np.stack([np.stack([depth_map(s, v) for v in range(views)]) for s in about["seeds"]])
    )[:, :, None]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """Name of a case -> its JSON and arrays, and a file of the backbone's weights as torchvision writes them,
    with the classifier.
    """

    @functools.cache
    def load(name: str):
        about = json.loads((ZOO / f"{name}.json").read_text())
        prefix, gain = re.search(r"prefix '(.*?)'.*?gain ([\d.]+)", about["common"]).groups()
        state = {
            entry.removeprefix("resnet50."): weight_of(entry, shape, float(gain), about["salt"] + prefix)
            for entry, shape in rows(ZOO / "depth_resnet50_state_dict.tsv").items()
        }
        file = tmp_path_factory.mktemp("backbone") / "resnet50.pth"
        torch.save(state, file)
        return about, dict(np.load(ZOO / f"{name}.npz")), file

    return load


@pytest.fixture(params=CASES)
def case(request, loaded):
    return loaded(request.param)


def thinned(value: torch.Tensor, kept: np.ndarray) -> torch.Tensor:
    """Every so many pixels, as the reference has kept them."""
    return value[..., :: value.shape[-2] // kept.shape[-2], :: value.shape[-1] // kept.shape[-1]]


def network(about, file, views: int) -> depth.PublishedDepth:
    # which must not change the backbone
    model = depth.PublishedDepth(views=views, backbone=str(file)).train()
    gain = float(re.search(r"heads have .*?gain ([\d]+(?:\.\d+)?)", about["common"])[1])
    model.load_state_dict(
        {
            name: weight_of(name, value.shape, gain, about["salt"])
            for name, value in model.state_dict().items()
        }
    )
    return model.train()


def test_names_and_shapes(case):
    about, _, file = case
    heads = {name: list(value.shape) for name, value in network(about, file, 1).state_dict().items()}
    assert list(heads.items()) == list(rows(ZOO / "depth_heads_state_dict.tsv").items()), (
        "the backbone is left out"
    )
    backbone = {f"resnet50.{name}": list(value.shape) for name, value in ResNet50().state_dict().items()}
    published = {
        name: shape
        for name, shape in rows(ZOO / "depth_resnet50_state_dict.tsv").items()
        if ".fc." not in name
    }
    assert list(backbone.items()) == list(published.items())
    assert sum(p.numel() for p in network(about, file, 1).parameters() if p.requires_grad) == 2_198_660


@pytest.mark.parametrize(("name", "views"), VIEWED)
def test_preparation_network_and_gradients(loaded, name, views):
    about, reference, file = loaded(name)
    v = f"v{views}_"
    maps = depth_maps(about, views).requires_grad_()
    with torch.no_grad():
        prepared = F.interpolate(maps[:, 0], size=(224, 224), mode="bilinear", align_corners=False)
        prepared = nearness(prepared, NEAREST, NEAREST + SPAN)
    model = network(about, file, views)
    observed = nearness(maps, NEAREST, NEAREST + SPAN)
    out = model(observed)
    feature = model.features(observed.detach())
    out.scalar.sum().backward()

    def statistics(wanted):
        assert [prepared.min(), prepared.max(), prepared.sum()] == pytest.approx(wanted.tolist(), rel=VALUES)

    def input_gradient(wanted):
        off = thinned(maps.grad, wanted) - torch.from_numpy(wanted)
        assert off.abs().median() < GRADIENTS * np.abs(wanted).max() and off.norm() < KINKS * np.linalg.norm(
            wanted
        )

    def input_statistics(wanted):
        assert [maps.grad.norm(), maps.grad.abs().max()] == pytest.approx(wanted[[0, 2]].tolist(), rel=KINKS)

    def near(value):
        return lambda wanted: close(value, wanted, VALUES)

    hold(
        reference,
        {
            "dmap_check": lambda wanted: close(thinned(maps[:, 0, 0], wanted), wanted, 5e-7),
            f"{v}prep_sub": lambda wanted: close(thinned(prepared, wanted), wanted, VALUES),
            f"{v}prep_stats": statistics,
            f"{v}feature": near(feature),
            f"{v}feat": near(out.embedding),
            f"{v}scalar": near(out.scalar),
            f"f64_{v}scalar": near(out.scalar),
            f"{v}bt_log": near(out.log_strength),
            f"{v}pairs": near(model.pair_logits(out.embedding[:1], out.embedding[1:2])),
            f"{v}input_grad_sub": input_gradient,
            f"{v}input_grad_stats": input_statistics,
        },
    )
    assert all(p.grad is None for p in model.external.parameters())
    parameters = dict(model.named_parameters())
    for entry, (norm, projection, largest) in zip(
        *of_set(reference, f"{v}grad_names", f"{v}grad"), strict=True
    ):
        gradient = parameters[entry].grad
        if np.isnan(norm):
            assert gradient is None, entry
            continue
        assert [gradient.norm(), gradient.abs().max()] == pytest.approx([norm, largest], rel=GRADIENTS), entry
        along = float((gradient * torch.from_numpy(crc_random(f"proj:{entry}", gradient.shape))).sum())
        assert along == pytest.approx(projection, abs=GRADIENTS * norm), entry


def test_a_backbone_that_trains_gives_the_other_vector(case):
    """Fault of the published training: its batch norms used the statistics of the batch."""
    about, reference, file = case
    (wanted,) = of_set(reference, "v1_feature_if_batchnorm_trains_sub")
    model = network(about, file, 1)
    observed = nearness(depth_maps(about, 1), NEAREST, NEAREST + SPAN)
    before = model.features(observed)
    model.external.train()
    other = model.features(observed)
    close(other[:, :: other.shape[1] // wanted.shape[1]], wanted, 1e-3)
    model.train()
    assert not torch.allclose(other, before, rtol=0.1), (
        "train() brought it back to eval; its buffers have drifted, which is the fault"
    )
