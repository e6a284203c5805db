"""The networks that read clouds of points: PointNet, PointNet++ and CurveNet as published, and variants of ours without their faults.

Ours normalise each point by itself (a score depends on no other sample, and a batch may be one), start farthest points wherever the order
puts the one farthest from the centroid, and mix CurveNet's curves with their own weights.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from eg3d_rlhf.preferences.losses import LossWeights
from eg3d_rlhf.rewards.networks import Preset, register
from eg3d_rlhf.rewards.points.arch import PointArch, PointNetwork, one_of
from eg3d_rlhf.rewards.points.curvenet import CurveNet, CurveNetArch
from eg3d_rlhf.rewards.points.pointnet import PointNet, PointNetArch
from eg3d_rlhf.rewards.points.pointnet2 import PointNet2, PointNet2Arch

_NETWORKS: Mapping[str, tuple[type[PointArch], Any]] = {
    arch.network: (arch, network)
    for arch, network in ((PointNetArch, PointNet), (PointNet2Arch, PointNet2), (CurveNetArch, CurveNet))
}
_HEAD = (0.16, 0.16, 0.26, 0.20, 0.24, 0.25)  # head and face of the bundled heads without their shoulders
_CURVE_BLOCKS = (
    (32, 128, 0.15, 1, True), (32, 128, 0.15, 2, True), (64, 64, 0.25, 1, True), (64, 64, 0.25, 2, True), (96, 32, 0.35, 2, False),
)  # fmt: skip


def build(description: Mapping[str, Any]) -> PointNetwork:
    """A network from its description. Raises: ValueError for an unknown one, or unknown fields."""
    values = dict(description)
    name = str(values.pop("network", None))
    one_of("reward network", name, tuple(_NETWORKS))
    arch, network = _NETWORKS[name]
    return network(arch.from_dict(values))


def _ours(inputs: int, observe: Mapping[str, Any]) -> dict[str, Preset]:
    """Networks for a few thousand pairs and one core."""
    small: dict[str, Any] = {"inputs": inputs, "norm": "layer", "trunk": (64, 64), "embedding": 64, "heads": (32, 16)}
    archs = {
        "pointnet": PointNetArch(widths=(32, 64, 128), pool="max-mean", **small),
        "pointnet2": PointNet2Arch(
            ratios=(0.25, 0.25), radii=(0.15, 0.35), limit=16, first=(16, 16, 32), second=(32, 32, 64), whole=(64, 128), start="farthest",
            **small,
        ),
        "curvenet": CurveNetArch(
            first=16, blocks=_CURVE_BLOCKS, last=128, k=12, curves=16, steps=5, mix="transposed", start="farthest", **small
        ),
    }  # fmt: skip
    train = {"epochs": 20, "patience": 20, "batch": 16, "lr": 1e-3, "weight_decay": 0.1, "decoupled": True}
    slow = {"epochs": 10, "patience": 10}  # a step of it takes five times as long
    return {
        name: Preset(network=arch.to_dict(), train={**train, **(slow if name == "curvenet" else {})}, observe=observe)
        for name, arch in archs.items()
    }


def _published() -> dict[str, Preset]:
    """The published networks and training: batches of 4, 2 and 2 items, anchors for PointNet alone."""
    presets = {}
    for arch, batch, anchors in ((PointNetArch(), 4, 1000), (PointNet2Arch(), 2, 0), (CurveNetArch(), 2, 0)):
        train = {
            "epochs": 10, "patience": 3, "batch": batch, "lr": 1e-5, "cosine": False, "anchors": anchors,
            "weights": replace(LossWeights(), reconstruction=0.0),
        }  # fmt: skip
        presets[f"paper-{arch.network}"] = Preset(network=arch.to_dict(), train=train, observe={"resolution": 128})
    return presets


register("points", build, _ours(6, {"resolution": 64, "crop": _HEAD}))
register("lifted-points", build, _ours(3, {"resolution": 64}))
register("published-points", build, _published())
