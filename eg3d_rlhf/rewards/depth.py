"""Depth maps of a field, from one camera or three, what the depth rewards of arXiv 2606.27305 read; and the
networks that read them: the published one on a frozen ResNet-50, and a small one that is trained from
scratch.

Letters: N samples, V views, C channels (1, or 2 with the mask), R pixels per edge. A depth is a distance
along the pixel's unit ray.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from eg3d_rlhf.core.field import CameraFamily, Field, RenderOptions, fixed_draws
from eg3d_rlhf.core.shapes import check_shape
from eg3d_rlhf.models.resnet50 import FEATURES, load_backbone
from eg3d_rlhf.preferences.settings import LossWeights
from eg3d_rlhf.rewards import networks, observations
from eg3d_rlhf.rewards.networks import RewardNetwork
from eg3d_rlhf.rewards.presets import Preset
from training.networks import state_hash

if TYPE_CHECKING:
    from eg3d_rlhf.generators import Generator

VIEWS = {1: (0.0,), 3: (1.0, 0.0, -1.0)}  # radians from frontal, in the published order
PUBLISHED_RESOLUTION = 128  # pixels per edge of a published map
PUBLISHED_FOCAL = 4.2633910179138184  # of a field of view of 18.837 degrees; FFHQ's labels have 4.2647
_MATCHES = 1e-6  # world units


def nearness(depth: torch.Tensor, near: float, far: float) -> torch.Tensor:
    """1 - (depth - near) / (far - near), of the same shape: 1 at `near`, 0 at `far`, not clamped.
    Differentiable.
    """
    return 1 - (depth - near) / (far - near)


@observations.register
@dataclass(frozen=True, kw_only=True)
class Depth(observations.Observation):
    """Maps [N, V, C, R, R] of how near the surface is, 1 at the near end of the generator's rays and 0 at the
    far end.

    `masked` (ours) multiplies nearness by the ray's opacity and adds opacity as a second channel, so that
    what lies beside the shape is 0 in both whatever shares its batch, and silhouettes have a gradient.
    Without it, the published map: the marcher's depth alone.
    """

    kind: ClassVar[str] = "depth"
    ops: ClassVar[str] = "auto"
    yaws: tuple[float, ...] = VIEWS[1]  # of the cameras, radians from frontal
    resolution: int = 64  # R
    samples: int | None = 32  # per ray and pass; None: the generator's own
    masked: bool = True
    radius: float = CameraFamily.radius  # of the cameras, world units
    pivot: tuple[float, float, float] = (0.0, 0.0, 0.2)  # point that they look at
    focal: float = CameraFamily.focal  # over the image size
    near: float = 2.25  # world units along the ray
    far: float = 3.3

    def __post_init__(self) -> None:
        if not 0 < self.near < self.far or self.resolution < 1 or not self.yaws:
            raise ValueError(
                f"depth: expected 0 < near < far, pixels and views, got {self}. Correct the reward's file."
            )

    @classmethod
    def of(  # type: ignore[override]
        cls, generator: "Generator", *, resolution: int | None = None, views: int = 1, published: bool = False
    ) -> Self:
        """As the generator's own cameras see it, between the ends of its own rays, or else the front and the
        back of its cube.

        Args: resolution: pixels per edge, 64, or 128 for published maps; views: 1 or 3; published: their
        field of view, the generator's own samples, no mask.
        Raises: ValueError for another number of views, and a generator whose cameras stand inside the shape.
        """
        if views not in VIEWS:
            raise ValueError(
                f"depth: expected {' or '.join(map(str, VIEWS))} views, got {views}. Choose one of them."
            )
        cameras = generator.cameras
        half = generator.bounds.side / 2
        if cameras.radius <= half * 3**0.5:
            raise ValueError(
                f"--observation=depth: expected cameras outside the shape's cube of side {2 * half:g}, got"
                f" {cameras.radius:g} from its middle. Such a generator has no depth maps; use another"
                " observation."
            )
        near, far = reach(generator)
        kind = (
            {"samples": None, "masked": False, "focal": PUBLISHED_FOCAL}
            if published
            else {"focal": cameras.focal}
        )
        size = resolution or (PUBLISHED_RESOLUTION if published else cls.resolution)
        return cls(
            yaws=VIEWS[views],
            resolution=size,
            radius=cameras.radius,
            pivot=cameras.pivot,
            near=near,
            far=far,
            **kind,
        )

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.yaws), 1 + self.masked, self.resolution, self.resolution)

    def cameras(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """Labels [V, 25]."""
        family = CameraFamily(self.radius, self.pivot, self.focal)
        with fixed_draws():  # the pose sampler draws, though to no effect
            return torch.cat([family.label(yaw, device=device) for yaw in self.yaws])

    def observe(self, field: Field) -> torch.Tensor:
        """See `Observation`. The field's planes are those it was made with, for all views; each view's rays
        are jittered alike.
        """
        options = RenderOptions(resolution=self.resolution, samples=self.samples)
        maps = []
        for camera in self.cameras().split(1):
            with fixed_draws():
                seen = field.render(camera, options)
            near = nearness(seen.depth, self.near, self.far)
            # [N, C, R, R]
            maps.append(torch.cat([near * seen.opacity, seen.opacity], dim=1) if self.masked else near)
        return torch.stack(maps, dim=1)

    def augment(self, observed: torch.Tensor, draws: np.ndarray) -> torch.Tensor:
        """Left and right are exchanged with probability one half:
        maps are mirrored, and views change places.
        """
        mirrored = torch.from_numpy(draws < 0.5).to(observed.device)
        return torch.where(mirrored[:, None, None, None, None], mirror(observed), observed)

    def misfits(self, generator: "Generator") -> list[str]:
        """The camera must stand where the generator's do, and its rays reach as far."""
        theirs = generator.cameras
        pairs: list[tuple[str, Any, Any]] = [
            ("camera radius", self.radius, theirs.radius),
            ("camera pivot", self.pivot, theirs.pivot),
        ]
        pairs.append(("rays between", (self.near, self.far), reach(generator)))
        return [
            f"{name} {mine}, got {theirs}"
            for name, mine, theirs in pairs
            if not np.allclose(mine, theirs, rtol=0, atol=_MATCHES)
        ]


def reach(generator: "Generator") -> tuple[float, float]:
    """Least and greatest depth: the ends of the generator's rays, or its cube's front and back as seen from
    the front.
    """
    radius = generator.cameras.radius
    half = generator.bounds.side / 2
    return generator.cameras.span or (radius - half, radius + half)


def mirror(observed: torch.Tensor) -> torch.Tensor:
    """Maps [N, V, C, R, R] of the shape exchanged left and right; yaws are symmetric about the front."""
    return observed.flip(1, 4)


# environment: where the backbone lies now, in place of the path that a reward's file states
BACKBONE = "EG3D_RLHF_BACKBONE"
INPUT = 224  # pixels per edge of what ResNet-50 reads
WIDTHS = (16, 32, 64, 96)  # channels of the small network's stages
GROUPS = 8  # of its group normalisation
EACH = 128  # features of each view
_EXTERNAL = "external."  # entries of the backbone, which files leave out
# smallest deviation of a pixel, as a share of the mean one: keeps pixels where nothing ever is from being
# blown up
_FLOOR = 0.3


class PublishedDepth(RewardNetwork):
    """Nearness at 224 pixels, repeated to three channels, through a frozen ResNet-50; 2048 features of each
    view, side by side.

    2,198,660 trained parameters with one view. The backbone stays in eval mode: its batch statistics are
    ImageNet's, in training as in use. State dicts leave it out, as published ones do; the description states
    its path and SHA-256.
    Deviates: published code resizes depth before it becomes nearness, here after; the two commute up to
    rounding.

    Args: backbone: file of its weights; backbone_sha256: what they must be, None to accept them.
    """

    def __init__(self, *, views: int, backbone: str = "", backbone_sha256: str | None = None):
        super().__init__(views * FEATURES, trunk=(512, 512), embedding=512, heads=(256, 128))
        if not backbone:
            raise ValueError(
                "--backbone: expected a file of ResNet-50's weights (torchvision's format), got none. Name"
                " one."
            )
        self.external = load_backbone(os.environ.get(BACKBONE) or backbone, backbone_sha256)
        digest = backbone_sha256 or state_hash(self.external)
        self._description: dict[str, Any] = {"views": views, "backbone": backbone, "backbone_sha256": digest}
        self.register_state_dict_post_hook(_without_backbone)
        self.register_load_state_dict_post_hook(_not_missing)

    def train(self, mode: bool = True) -> "PublishedDepth":
        """Trunk and heads alone; see the class."""
        super().train(mode)
        self.external.eval()
        return self

    def features(self, observed: torch.Tensor) -> torch.Tensor:
        """See `RewardNetwork`: nearness [N, V, 1, R, R] -> [N, V * 2048]. Differentiable in nearness."""
        check_shape(
            "PublishedDepth(maps)", observed, ("N", "V", 1, "R", "R"), "Pass what its observation gives."
        )
        # [N * V, 1, 224, 224]
        maps = F.interpolate(
            observed.flatten(0, 1), size=(INPUT, INPUT), mode="bilinear", align_corners=False
        )
        return self.external(maps.expand(-1, 3, -1, -1)).unflatten(0, observed.shape[:2]).flatten(1)

    def describe(self) -> dict[str, Any]:
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
    """Two 3x3 convolutions, the first of stride 2, with group normalisation, and a shortcut:
    [N, C, H, W] -> [N, C', H/2, W/2].
    """

    def __init__(self, channels: int, out: int):
        super().__init__()
        self.first = nn.Conv2d(channels, out, 3, 2, 1, bias=False)
        self.norm1 = nn.GroupNorm(GROUPS, out)
        self.second = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.norm2 = nn.GroupNorm(GROUPS, out)
        self.shortcut = nn.Conv2d(channels, out, 1, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm2(self.second(F.silu(self.norm1(self.first(x)))))
        return F.silu(y + self.shortcut(x))


class SmallDepth(RewardNetwork):
    """Maps, standardised at each pixel over the training shapes, through four stages of stride 2; 128
    features of each view.

    Positions are kept up to the linear layer: heads of one generator differ little, and pooling forgets
    where. In eval mode the features of the maps and of their mirror image are averaged, so that a score does
    not depend on handedness.
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
        return (
            self._description["views"],
            2,
            self._description["resolution"],
            self._description["resolution"],
        )

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
        return {"extractor": "small", **self._description}

    def check(self, shape: Sequence[int]) -> None:
        """One size is read."""
        _check("small", self._shape, shape)


def _check(name: str, expected: Sequence[int], shape: Sequence[int]) -> None:
    """Raise ValueError where observations of this shape do not begin as expected."""
    if tuple(shape[: len(expected)]) != tuple(expected):
        raise ValueError(
            f"depth reward ({name}): expected maps of {list(expected)}, got {list(shape)}. Use its own views"
            " and size."
        )


def build(description: Mapping[str, Any]) -> RewardNetwork:
    """The network that a description names. Raises: ValueError for another one's fields."""
    values = dict(description)
    name = values.pop("extractor", None)
    known: dict[str, type[RewardNetwork]] = {"small": SmallDepth, "resnet50": PublishedDepth}
    if name not in known:
        raise ValueError(
            f"depth reward: expected an extractor {' or '.join(known)}, got {name!r}. Is the file from a"
            " later version?"
        )
    try:
        return known[name](**values)
    except TypeError as error:
        raise ValueError(
            f"depth reward ({name}): expected its own settings, got: {error}. Leave out what it does not"
            " have."
        ) from error


_SMALL = {"epochs": 12, "patience": 12, "batch": 8, "lr": 1e-3, "weight_decay": 0.3, "decoupled": True}
_PUBLISHED = {
    "epochs": 10,
    "patience": 3,
    "batch": 8,
    "lr": 1e-5,
    "cosine": False,
    "reference_samples": 1000,
    "mirror": False,
    "weights": LossWeights(reconstruction=0.0),
}
PRESETS = {
    **{
        name: Preset(
            network={"extractor": "small", "views": views, "resolution": size},
            train=_SMALL,
            observe={"resolution": size, "views": views},
        )
        for name, views, size in (
            ("small", 1, 64),
            ("small-3", 3, 64),
            ("coarse", 1, 32),
            ("coarse-3", 3, 32),
        )
    },
    **{
        name: Preset(
            network={"extractor": "resnet50", "views": views, "backbone": ""},
            train=_PUBLISHED,
            observe={"views": views, "published": True},
        )
        for name, views in (("resnet50", 1), ("resnet50-3", 3))
    },
}
networks.register("depth", build, PRESETS)
