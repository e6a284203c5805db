"""The networks that read depth maps: the published one on a frozen ResNet-50, and a small one that is trained from scratch.

Letters: N samples, V views, C channels (1, or 2 with the mask), R pixels per edge.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from eg3d_rlhf.core.shapes import check_shape
from eg3d_rlhf.models.resnet50 import FEATURES, load_backbone
from eg3d_rlhf.preferences.losses import LossWeights
from eg3d_rlhf.rewards.networks import Preset, RewardNetwork, register
from eg3d_rlhf.rewards.observations.depth import mirror
from training.networks import state_hash

BACKBONE = "EG3D_RLHF_BACKBONE"  # environment: where the backbone lies now, in place of the path that a reward's file states
INPUT = 224  # pixels per edge of what ResNet-50 reads
WIDTHS = (16, 32, 64, 96)  # channels of the small network's stages
GROUPS = 8  # of its group normalisation
EACH = 128  # features of each view
_EXTERNAL = "external."  # entries of the backbone, which files leave out
_FLOOR = 0.3  # smallest deviation of a pixel, as a share of the mean one: keeps pixels where nothing ever is from being blown up


class PublishedDepth(RewardNetwork):
    """Nearness at 224 pixels, repeated to three channels, through a frozen ResNet-50; 2048 features of each view, side by side.

    2,198,660 trained parameters with one view. The backbone stays in eval mode: its batch statistics are ImageNet's, in training as in use.
    State dicts leave it out, as published ones do; the description states its path and SHA-256.
    Deviates: published code resizes depth before it becomes nearness, here after; the two commute up to rounding.

    Args: backbone: file of its weights; backbone_sha256: what they must be, None to accept them.
    """

    def __init__(self, *, views: int, backbone: str = "", backbone_sha256: str | None = None):
        super().__init__(views * FEATURES, trunk=(512, 512), embedding=512, heads=(256, 128))
        if not backbone:
            raise ValueError("--backbone: expected a file of ResNet-50's weights (torchvision's format), got none. Name one.")
        self.external = load_backbone(os.environ.get(BACKBONE) or backbone, backbone_sha256)
        found = backbone_sha256 or state_hash(self.external)
        self._description: dict[str, Any] = {"views": views, "backbone": backbone, "backbone_sha256": found}
        self.register_state_dict_post_hook(_without_backbone)
        self.register_load_state_dict_post_hook(_not_missing)

    def train(self, mode: bool = True) -> "PublishedDepth":
        """Trunk and heads alone; see the class."""
        super().train(mode)
        self.external.eval()
        return self

    def features(self, observed: torch.Tensor) -> torch.Tensor:
        """See `RewardNetwork`: nearness [N, V, 1, R, R] -> [N, V * 2048]. Differentiable in nearness."""
        check_shape("PublishedDepth(maps)", observed, ("N", "V", 1, "R", "R"), "Pass what its observation gives.")
        maps = F.interpolate(observed.flatten(0, 1), size=(INPUT, INPUT), mode="bilinear", align_corners=False)  # [N * V, 1, 224, 224]
        return self.external(maps.expand(-1, 3, -1, -1)).unflatten(0, observed.shape[:2]).flatten(1)

    def describe(self) -> dict[str, Any]:
        """See `RewardNetwork`."""
        return {"extractor": "resnet50", **self._description}

    def check(self, shape: Sequence[int]) -> None:
        """So many views, without the mask."""
        _check("resnet50", (self._description["views"], 1), shape)


def _without_backbone(module: nn.Module, state: dict[str, Any], prefix: str, _local: object) -> None:
    for name in [name for name in state if name.startswith(f"{prefix}{_EXTERNAL}")]:
        del state[name]


def _not_missing(_module: nn.Module, keys: Any) -> None:
    keys.missing_keys[:] = [name for name in keys.missing_keys if _EXTERNAL not in name]


class Stage(nn.Module):
    """Two 3x3 convolutions, the first of stride 2, with group normalisation, and a shortcut: [N, C, H, W] -> [N, C', H/2, W/2]."""

    def __init__(self, channels: int, out: int):
        super().__init__()
        self.first, self.norm1 = nn.Conv2d(channels, out, 3, 2, 1, bias=False), nn.GroupNorm(GROUPS, out)
        self.second, self.norm2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.GroupNorm(GROUPS, out)
        self.shortcut = nn.Conv2d(channels, out, 1, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm2(self.second(F.silu(self.norm1(self.first(x)))))
        return F.silu(y + self.shortcut(x))


class SmallDepth(RewardNetwork):
    """Maps, standardised at each pixel over the training shapes, through four stages of stride 2; 128 features of each view.

    Positions are kept up to the linear layer: heads of one generator differ little, and pooling forgets where. In eval mode the features
    of the maps and of their mirror image are averaged, so that a score does not depend on handedness.
    """

    mean: torch.Tensor
    scale: torch.Tensor

    def __init__(self, *, views: int, resolution: int = 64, dropout: float = 0.5):
        super().__init__(views * EACH, trunk=(64, 64), embedding=64, heads=(32, 16))
        self._description: dict[str, Any] = {"views": views, "resolution": resolution, "dropout": dropout}
        channels = (2, *WIDTHS)
        self.stages = nn.Sequential(*(Stage(a, b) for a, b in zip(channels, WIDTHS, strict=False)))
        self.dropout = nn.Dropout(dropout)
        side = -(-resolution // 2 ** len(WIDTHS))
        self.each = nn.Linear(WIDTHS[-1] * side**2, EACH)
        self.register_buffer("mean", torch.zeros(self._shape))
        self.register_buffer("scale", torch.ones(self._shape))

    @property
    def _shape(self) -> tuple[int, ...]:
        return (self._description["views"], 2, self._description["resolution"], self._description["resolution"])

    def calibrate(self, take: Callable[[], torch.Tensor]) -> None:
        """See `RewardNetwork`: mean and deviation of each pixel, of the maps and of their mirror images."""
        maps = take()
        maps = torch.cat([maps, mirror(maps)])
        scale = maps.std(dim=0)
        self.mean.copy_(maps.mean(dim=0))
        self.scale.copy_(scale.clamp_min(_FLOOR * float(scale.mean()) + 1e-6))

    def features(self, observed: torch.Tensor) -> torch.Tensor:
        """See `RewardNetwork`: maps [N, V, 2, R, R] -> [N, V * 128]. Differentiable in the maps."""
        check_shape("SmallDepth(maps)", observed, ("N", *self._shape), "Pass what its observation gives.")
        if self.training:
            return self._features(observed)
        return 0.5 * (self._features(observed) + self._features(mirror(observed)))

    def _features(self, observed: torch.Tensor) -> torch.Tensor:
        x = ((observed - self.mean) / self.scale).flatten(0, 1)  # [N * V, 2, R, R]
        each = self.each(self.dropout(self.stages(x).flatten(1)))
        return each.unflatten(0, observed.shape[:2]).flatten(1)

    def describe(self) -> dict[str, Any]:
        """See `RewardNetwork`."""
        return {"extractor": "small", **self._description}

    def check(self, shape: Sequence[int]) -> None:
        """One size is read."""
        _check("small", self._shape, shape)


def _check(name: str, expected: Sequence[int], shape: Sequence[int]) -> None:
    """Raise ValueError where observations of this shape do not begin as expected."""
    if tuple(shape[: len(expected)]) != tuple(expected):
        raise ValueError(f"depth reward ({name}): expected maps of {list(expected)}, got {list(shape)}. Use its own views and size.")


def build(description: Mapping[str, Any]) -> RewardNetwork:
    """The network that a description names. Raises: ValueError for another one's fields."""
    values = dict(description)
    name = values.pop("extractor", None)
    known: dict[str, type[RewardNetwork]] = {"small": SmallDepth, "resnet50": PublishedDepth}
    if name not in known:
        raise ValueError(f"depth reward: expected an extractor {' or '.join(known)}, got {name!r}. Is the file from a later version?")
    try:
        return known[name](**values)
    except TypeError as error:
        raise ValueError(f"depth reward ({name}): expected its own settings, got: {error}. Leave out what it does not have.") from error


_SMALL = {"epochs": 12, "patience": 12, "batch": 8, "lr": 1e-3, "weight_decay": 0.3, "decoupled": True}
_PUBLISHED = {
    "epochs": 10, "patience": 3, "batch": 8, "lr": 1e-5, "cosine": False, "anchors": 1000, "mirror": False,
    "weights": LossWeights(reconstruction=0.0),
}  # fmt: skip
PRESETS = {
    **{
        name: Preset(
            network={"extractor": "small", "views": views, "resolution": size}, train=_SMALL, observe={"resolution": size, "views": views}
        )
        for name, views, size in (("small", 1, 64), ("small-3", 3, 64), ("coarse", 1, 32), ("coarse-3", 3, 32))
    },
    **{
        name: Preset(
            network={"extractor": "resnet50", "views": views, "backbone": ""}, train=_PUBLISHED, observe={"views": views, "published": True}
        )
        for name, views in (("resnet50", 1), ("resnet50-3", 3))
    },
}
register("depth", build, PRESETS)
