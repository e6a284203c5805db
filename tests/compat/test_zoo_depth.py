"""Depth rewards against the reference values: cameras, preparation, ResNet-50, heads, gradients; the nose
floor. Cases are discovered; what a JSON says in words is read from its words.
"""

import functools
import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from eg3d_rlhf.models.resnet50 import ResNet50
from eg3d_rlhf.rewards import depth
from eg3d_rlhf.rewards.depth import nearness
from tests.compat.absent import some
from tests.compat.reference import (
    ROOT,
    array_names,
    close,
    crc_random,
    existing,
    hold,
    of_set,
    read_json,
    thinned,
    weight_of,
)

ZOO = ROOT / "reward_zoo"
CASES = [path.stem for path in sorted(ZOO.glob("depth_*.json")) if path.with_suffix(".npz").is_file()]
NONE = "this set has no reward_zoo/depth_*.json with its .npz"
VIEWED = [  # (case, views): those whose rewards a set holds
    (case, int(match[1]))
    for case in CASES
    for name in array_names(ZOO / f"{case}.npz")
    if (match := re.fullmatch(r"v(\d+)_scalar", name))
]
DRIFTED = [  # (case, views): those with the feature of a backbone that trains
    (case, int(match[1]))
    for case in CASES
    for name in array_names(ZOO / f"{case}.npz")
    if (match := re.fullmatch(r"v(\d+)_feature_if_batchnorm_trains_sub", name))
]


def quick(cases: list[tuple[str, int]]) -> list:
    """Return (case, views) as parameters. Of a case with one view, several views are for the slow tests."""
    slow = {(case, views) for case, views in cases if views > 1 and (case, 1) in cases}
    return [pytest.param(*case, marks=pytest.mark.long if case in slow else ()) for case in cases]


NUMBER = r"(\d+(?:\.\d+)?)"
CLASSIFIER = {"fc.weight": (1000, depth.FEATURES), "fc.bias": (1000,)}  # of torchvision's file, not used
# relative; observed float32 deviation of the scalar at most 6e-6
VALUES = 2.5e-5
GRADIENTS = 3e-4
# of the gradient's norm: rounding moves a few pixels across ReLUs and maxima; the same sums in float64 are
# 1.4 % away
KINKS = 0.03


def rows(file) -> dict[str, list[int]]:
    """Read names and shapes of a tsv; skip the test where a set has left it out."""
    lines = [line.split("\t") for line in existing(file).read_text().splitlines()[1:]]
    return {
        name: [] if shape == "scalar" else [int(n) for n in shape.split("x")] for _, name, shape, *_ in lines
    }


def preparation(about: dict) -> tuple[int, float, float]:
    """Read the pixels of ResNet-50's input, the depth that becomes 1 and the one that becomes 0.

    The published ones count where a JSON does not state them.
    """
    words = about.get("common", "")
    pixels = re.search(r"resize (\d+)", words)
    ramp = re.search(rf"\(d-{NUMBER}\)/{NUMBER}", words)
    near, span = map(float, ramp.groups()) if ramp else (2.25, 1.05)
    return int(pixels[1]) if pixels else depth.INPUT, near, near + span


def depth_maps(about: dict, views: int) -> torch.Tensor:
    """The recipe of the JSON, [B, V, 1, H, W]."""
    height, width = (int(side) for side in re.search(r"\[(\d+), ?(\d+)\]", about["depth"]).groups())
    step = re.search(r"RandomState\((\d+)\*s\+v\)", about["depth"])
    apart = int(step[1]) if step else 1000
    y, x = np.meshgrid(np.linspace(-1, 1, height), np.linspace(-1, 1, width), indexing="ij")

    def depth_map(seed, view):
        c = np.random.RandomState(apart * seed + view).random_sample(6)
        d = 2.75 - 0.30 * np.exp(
            -((x - 0.2 * (c[0] - 0.5)) ** 2 / 0.30 + (y - 0.2 * (c[1] - 0.5)) ** 2 / 0.45)
        )
        d -= 0.08 * (0.5 + c[2]) * np.exp(-(x**2 + y**2) / 0.02)
        d += 0.02 * np.sin(6 * x + 6 * c[3]) * np.sin(5 * y + 6 * c[4]) + 0.3 * (x**2 + y**2 > 1.2)
        return d.astype(np.float32)

    return torch.from_numpy(
        np.stack([np.stack([depth_map(s, v) for v in range(views)]) for s in about["seeds"]])
    )[:, :, None]


def write_backbone(about: dict, file) -> None:
    """Write the recipe's backbone, with the classifier, in torchvision's form."""
    prefix, gain = re.search(rf"prefix '(.*?)'.*?gain {NUMBER}", about["common"]).groups()
    shapes = {name: tuple(value.shape) for name, value in ResNet50().state_dict().items()} | CLASSIFIER
    state = {
        name: weight_of(f"resnet50.{name}", shape, float(gain), about["salt"] + prefix)
        for name, shape in shapes.items()
    }
    torch.save(state, file)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """Load, by a case's name, its JSON and arrays, and a file of its backbone's weights."""

    @functools.cache
    def load(name: str):
        about = read_json(ZOO / f"{name}.json")
        file = tmp_path_factory.mktemp("backbone") / "resnet50.pth"
        write_backbone(about, file)
        return about, dict(np.load(ZOO / f"{name}.npz")), file

    return load


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


@pytest.mark.parametrize("name", some(CASES, NONE))
def test_names_and_shapes(loaded, name):
    about, _, file = loaded(name)
    compared = 0
    for table in sorted(ZOO.glob("depth_*heads*_state_dict.tsv")):
        published = rows(table)
        views = published["MLP.input_layer.weight"][1] // depth.FEATURES
        model = network(about, file, views)
        heads = {entry: list(value.shape) for entry, value in model.state_dict().items()}
        assert list(heads.items()) == list(published.items()), "the backbone is left out"
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert trained == sum(map(math.prod, published.values()))
        compared += 1
    for table in sorted(ZOO.glob("depth_*resnet50*_state_dict.tsv")):
        backbone = {
            f"resnet50.{entry}": list(value.shape) for entry, value in ResNet50().state_dict().items()
        }
        published = {entry: shape for entry, shape in rows(table).items() if ".fc." not in entry}
        assert list(backbone.items()) == list(published.items())
        compared += 1
    if not compared:
        pytest.skip("this set has no reward_zoo/depth_*heads*_state_dict.tsv and none of resnet50")


@pytest.mark.parametrize(("name", "views"), some(quick(VIEWED), f"{NONE} and v..._scalar", width=2))
def test_preparation_network_and_gradients(loaded, name, views):
    about, reference, file = loaded(name)
    v = f"v{views}_"
    pixels, *ends = preparation(about)
    maps = depth_maps(about, views).requires_grad_()
    with torch.no_grad():
        prepared = F.interpolate(maps[:, 0], size=(pixels, pixels), mode="bilinear", align_corners=False)
        prepared = nearness(prepared, *ends)
    model = network(about, file, views)
    observed = nearness(maps, *ends)
    out = model(observed)
    feature = model.features(observed.detach())
    out.scalar.sum().backward()

    def statistics(wanted):
        assert [prepared.min(), prepared.max(), prepared.sum()] == pytest.approx(wanted.tolist(), rel=VALUES)

    def input_gradient(wanted):
        off = np.abs(thinned(maps.grad, wanted) - wanted)
        assert np.median(off) < GRADIENTS * np.abs(wanted).max()
        assert np.linalg.norm(off) < KINKS * np.linalg.norm(wanted)

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


@pytest.mark.parametrize(
    ("name", "views"), some(quick(DRIFTED), f"{NONE} and v..._if_batchnorm_trains", width=2)
)
def test_a_backbone_that_trains_gives_the_other_vector(loaded, name, views):
    """Fault of the published training: its batch norms used the statistics of the batch."""
    about, reference, file = loaded(name)
    wanted = reference[f"v{views}_feature_if_batchnorm_trains_sub"]
    model = network(about, file, views)
    observed = nearness(depth_maps(about, views), *preparation(about)[1:])
    before = model.features(observed)
    model.external.train()
    # the published code runs view after view, each with statistics of its own
    other = torch.cat([model.features(view) for view in observed.split(1, dim=1)], dim=1)
    close(thinned(other, wanted), wanted, 1e-3)
    model.train()
    assert not torch.allclose(other, before, rtol=0.1), (
        "train() brought it back to eval; its buffers have drifted, which is the fault"
    )
