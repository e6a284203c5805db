"""Depth maps of a field from one camera or three, and the reward networks that read them (arXiv 2606.27305).

The networks are the published one, with a frozen ResNet-50, and a small one that is trained from scratch.
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

VIEWS = {1: (0.0,), 3: (1.0, 0.0, -1.0)}  # radians from frontal, in the order of the published code
PUBLISHED_RESOLUTION = 128  # pixels per edge of a published map
PUBLISHED_FOCAL = 4.2633910179138184  # from a field of view of 18.837 degrees; FFHQ's labels have 4.2647
_MATCHES = 1e-6  # world units; cameras that differ by less are equal


def nearness(depth: torch.Tensor, near: float, far: float) -> torch.Tensor:
    """Compute 1 - (depth - near) / (far - near): 1 at `near`, 0 at `far`, not clamped. Differentiable."""
    return 1 - (depth - near) / (far - near)


@observations.register
@dataclass(frozen=True, kw_only=True)
class Depth(observations.Observation):
    """Maps [N, V, C, R, R] of the nearness of the surface: 1 at the near end of the rays and 0 at the far
    end.

    `masked` (our addition) multiplies nearness by the ray's opacity and adds opacity as a second channel.
    Background is then 0 in both channels, independent of the rest of the batch, and silhouettes have a
    gradient. Without it, the map is the published one: the depth of the ray marcher alone.
    """

    kind: ClassVar[str] = "depth"
    ops: ClassVar[str] = "auto"
    yaws: tuple[float, ...] = VIEWS[1]  # of the cameras, radians from frontal
    resolution: int = 64  # R
    samples: int | None = 32  # per ray and pass; None uses the generator's number
    masked: bool = True
    radius: float = CameraFamily.radius  # of the cameras, world units
    pivot: tuple[float, float, float] = (0.0, 0.0, 0.2)  # point that the cameras look at, world units
    focal: float = CameraFamily.focal  # in units of the image size
    near: float = 2.25  # world units along the ray, where nearness is 1
    far: float = 3.3  # world units along the ray, where nearness is 0

    def __post_init__(self) -> None:
        if not 0 < self.near < self.far or self.resolution < 1 or not self.yaws:
            raise ValueError(
                f"depth: expected 0 < near < far, at least one pixel and one view, got {self}. Correct the"
                " reward's file."
            )

    @classmethod
    def of(  # type: ignore[override]
        cls, generator: "Generator", *, resolution: int | None = None, views: int = 1, published: bool = False
    ) -> Self:
        """Create an observation from the generator's cameras.

        Depths lie between the ends of its rays or, if these are not known, between front and back of its
        cube.

        Args: resolution: pixels per edge, by default 64, or 128 for published maps; views: 1 or 3; published:
            use the published field of view, the generator's number of samples, and no mask.
        Raises: ValueError for another number of views, or if the generator's cameras are inside the shape's
            cube.
        """
        if views not in VIEWS:
            raise ValueError(
                f"depth: expected {' or '.join(map(str, VIEWS))} views, got {views}. Choose one of these"
                " numbers."
            )
        # The reward reads shapes from the generator's own camera family.
        cameras = generator.cameras
        half = generator.bounds.side / 2
        # Half the cube's diagonal: inside this sphere, a camera may stand inside the cube.
        if cameras.radius <= half * 3**0.5:
            raise ValueError(
                "--observation=depth: expected cameras outside the shape's cube with an edge of"
                f" {2 * half:g}, got cameras {cameras.radius:g} from its centre. This generator has no"
                " depth maps. Use another observation."
            )
        near, far = reach(generator)
        kind = (
            {"samples": None, "masked": False, "focal": PUBLISHED_FOCAL}
            if published
            else {"focal": cameras.focal}
        )
        # The user's resolution goes first.
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
        """Shape of one sample's observation, [V, C, R, R]."""
        return (len(self.yaws), 1 + self.masked, self.resolution, self.resolution)

    def cameras(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """Return the camera labels [V, 25]."""
        family = CameraFamily(self.radius, self.pivot, self.focal)
        # The pose sampler uses random numbers, though they do not change these poses; keep the global state.
        with fixed_draws():
            return torch.cat([family.label(yaw, device=device) for yaw in self.yaws])

    def observe(self, field: Field) -> torch.Tensor:
        """Render the maps; see `Observation`.

        All views use the same planes of the field, and the rays of each view get the same jitter.
        """
        options = RenderOptions(resolution=self.resolution, samples=self.samples)
        maps = []
        for camera in self.cameras().split(1):
            # Restart the random numbers for each view.
            with fixed_draws():
                seen = field.render(camera, options)
            near = nearness(seen.depth, self.near, self.far)
            # [N, C, R, R]
            maps.append(torch.cat([near * seen.opacity, seen.opacity], dim=1) if self.masked else near)
        return torch.stack(maps, dim=1)

    def augment(self, observed: torch.Tensor, draws: np.ndarray) -> torch.Tensor:
        """Exchange left and right with probability one half: maps are mirrored, and views change places."""
        mirrored = torch.from_numpy(draws < 0.5).to(observed.device)
        return torch.where(mirrored[:, None, None, None, None], mirror(observed), observed)

    def misfits(self, generator: "Generator") -> list[str]:
        """List differences between these cameras and the generator's: position, and range of the rays."""
        family = generator.cameras
        pairs: list[tuple[str, Any, Any]] = [
            ("camera radius", self.radius, family.radius),
            ("camera pivot", self.pivot, family.pivot),
        ]
        pairs.append(("rays between", (self.near, self.far), reach(generator)))
        return [
            f"{name} {value}, got {expected}"
            for name, value, expected in pairs
            if not np.allclose(value, expected, rtol=0, atol=_MATCHES)
        ]


def reach(generator: "Generator") -> tuple[float, float]:
    """Return the least and the greatest depth: the ends of the generator's rays.

    If these are not known, use the front and the back of its cube, as seen from the front.
    """
    radius = generator.cameras.radius
    half = generator.bounds.side / 2
    return generator.cameras.span or (radius - half, radius + half)


def mirror(observed: torch.Tensor) -> torch.Tensor:
    """Mirror maps [N, V, C, R, R] left to right.

    Views are reversed, too, since yaws are symmetric about the front.
    """
    return observed.flip(1, 4)


# Environment variable with the path of the backbone's file, which replaces the path in a reward's file
BACKBONE = "EG3D_RLHF_BACKBONE"
INPUT = 224  # pixels per edge of the input of ResNet-50
WIDTHS = (16, 32, 64, 96)  # channels of the small network's stages
GROUPS = 8  # of its group normalisation
EACH = 128  # features per view
_EXTERNAL = "external."  # prefix of the backbone's entries in a state dict, which files do not contain
# Least standard deviation of a pixel, as a share of the mean one. Without it, pixels that are always empty
# would be amplified.
_LEAST_SCALE = 0.3


class PublishedDepth(RewardNetwork):
    """Published depth reward: a frozen ResNet-50 reads nearness at 224 pixels, repeated to three channels.

    It gives 2048 features per view, which are concatenated. With one view, 2,198,660 parameters are trained.
    The backbone stays in eval mode: its batch statistics are those of ImageNet, in training as in use. State
    dicts do not contain the backbone, as published ones do not; the description states its path and SHA-256.
    Deviates: the published code resizes depth before it is converted to nearness, and this class afterwards.
        Both
    agree up to rounding, since resizing is linear.

    Args: views: 1 or 3; backbone: file of its weights; backbone_sha256: their hash, or None to accept any
        weights.
    """

    def __init__(self, *, views: int, backbone: str = "", backbone_sha256: str | None = None):
        super().__init__(views * FEATURES, trunk=(512, 512), embedding=512, heads=(256, 128))
        if not backbone:
            raise ValueError(
                "--backbone: expected a file of ResNet-50's weights (torchvision's format), got none. Pass"
                " --backbone=FILE."
            )
        # The environment wins, since files move between machines.
        self.external = load_backbone(os.environ.get(BACKBONE) or backbone, backbone_sha256)
        # A new reward records the hash, so that later loads can check the file.
        digest = backbone_sha256 or state_hash(self.external)
        self._description: dict[str, Any] = {"views": views, "backbone": backbone, "backbone_sha256": digest}
        # Saving and loading skip the backbone, so files stay small and have the published names.
        self.register_state_dict_post_hook(_without_backbone)
        self.register_load_state_dict_post_hook(_not_missing)

    def train(self, mode: bool = True) -> "PublishedDepth":
        """Set the mode of trunk and heads; the backbone stays in eval mode."""
        super().train(mode)
        self.external.eval()
        return self

    def features(self, observed: torch.Tensor) -> torch.Tensor:
        """Compute features [N, V * 2048] of nearness [N, V, 1, R, R]; see `RewardNetwork`.

        Differentiable in nearness.
        """
        check_shape(
            "PublishedDepth(maps)",
            observed,
            ("N", "V", 1, "R", "R"),
            "Pass the result of the reward's observation.",
        )
        # [N * V, 1, 224, 224]: views become samples of the backbone
        maps = F.interpolate(
            observed.flatten(0, 1), size=(INPUT, INPUT), mode="bilinear", align_corners=False
        )
        return self.external(maps.expand(-1, 3, -1, -1)).unflatten(0, observed.shape[:2]).flatten(1)

    def describe(self) -> dict[str, Any]:
        """Return the arguments of `build`."""
        return {"extractor": "resnet50", **self._description}

    def check(self, shape: Sequence[int]) -> None:
        """Raise ValueError unless the maps have this network's number of views and no mask."""
        _check("resnet50", (self._description["views"], 1), shape)


def _without_backbone(module: nn.Module, state: dict[str, Any], prefix: str, _local: object) -> None:
    """Remove the backbone's entries from a state dict, in place."""
    # The names are collected first, since a dict must not change during iteration.
    for name in [name for name in state if name.startswith(f"{prefix}{_EXTERNAL}")]:
        del state[name]


def _not_missing(_module: nn.Module, keys: Any) -> None:
    """Do not report the backbone's entries as missing when a state dict is loaded."""
    # torch reads this very list after the hook, so it is changed in place.
    keys.missing_keys[:] = [name for name in keys.missing_keys if _EXTERNAL not in name]


class Stage(nn.Module):
    """Residual block of stride 2, [N, C, H, W] -> [N, C', H/2, W/2].

    It has two 3x3 convolutions with group normalisation, the first of stride 2, and a 1x1 shortcut.
    """

    def __init__(self, channels: int, out: int):
        super().__init__()
        self.first = nn.Conv2d(channels, out, 3, 2, 1, bias=False)
        self.norm1 = nn.GroupNorm(GROUPS, out)
        self.second = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.norm2 = nn.GroupNorm(GROUPS, out)
        self.shortcut = nn.Conv2d(channels, out, 1, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return [N, C', H/2, W/2]."""
        y = self.norm2(self.second(F.silu(self.norm1(self.first(x)))))
        return F.silu(y + self.shortcut(x))


class SmallDepth(RewardNetwork):
    """Small depth network: four stages of stride 2 on standardised maps, with 128 features per view.

    Each pixel is standardised over the training shapes. Positions are kept up to the linear layer: heads of
    one generator differ little, and pooling would discard where they differ. In eval mode the features of the
    maps and of their mirror image are averaged, so a score does not change if a shape is mirrored.
    """

    mean: torch.Tensor
    scale: torch.Tensor

    def __init__(self, *, views: int, resolution: int = 64, dropout: float = 0.5):
        super().__init__(views * EACH, trunk=(64, 64), embedding=64, heads=(32, 16))
        self._description: dict[str, Any] = {"views": views, "resolution": resolution, "dropout": dropout}
        channels = (2, *WIDTHS)
        self.stages = nn.Sequential(*(Stage(a, b) for a, b in zip(channels, WIDTHS, strict=False)))
        self.dropout = nn.Dropout(dropout)
        side = -(-resolution // 2 ** len(WIDTHS))  # each stage rounds up, as its padding does
        self.each = nn.Linear(WIDTHS[-1] * side**2, EACH)
        self.register_buffer("mean", torch.zeros(self._shape))
        self.register_buffer("scale", torch.ones(self._shape))

    @property
    def _shape(self) -> tuple[int, ...]:
        """Shape of one sample's maps, [V, 2, R, R]."""
        return (
            self._description["views"],
            2,
            self._description["resolution"],
            self._description["resolution"],
        )

    def calibrate(self, take: Callable[[], torch.Tensor]) -> None:
        """Set mean and standard deviation of each pixel, over maps and their mirror images."""
        maps = take()
        # Makes the statistics symmetric.
        maps = torch.cat([maps, mirror(maps)])
        scale = maps.std(dim=0)
        self.mean.copy_(maps.mean(dim=0))
        # In place, because both are buffers that the state dict holds.
        self.scale.copy_(scale.clamp_min(_LEAST_SCALE * float(scale.mean()) + 1e-6))

    def features(self, observed: torch.Tensor) -> torch.Tensor:
        """Compute features [N, V * 128] of maps [N, V, 2, R, R]; see `RewardNetwork`.

        Differentiable in the maps.
        """
        check_shape(
            "SmallDepth(maps)", observed, ("N", *self._shape), "Pass the result of the reward's observation."
        )
        # Training mirrors samples at random instead, see `Depth.augment`.
        if self.training:
            return self._features(observed)
        # The mean over both orientations is invariant to mirroring.
        return 0.5 * (self._features(observed) + self._features(mirror(observed)))

    def _features(self, observed: torch.Tensor) -> torch.Tensor:
        """Compute features [N, V * 128] of maps in one orientation."""
        x = ((observed - self.mean) / self.scale).flatten(0, 1)  # [N * V, 2, R, R]
        each = self.each(self.dropout(self.stages(x).flatten(1)))  # [N * V, 128]
        return each.unflatten(0, observed.shape[:2]).flatten(1)

    def describe(self) -> dict[str, Any]:
        """Return the arguments of `build`."""
        return {"extractor": "small", **self._description}

    def check(self, shape: Sequence[int]) -> None:
        """Raise ValueError unless the maps have the size of this network."""
        _check("small", self._shape, shape)


def _check(name: str, expected: Sequence[int], shape: Sequence[int]) -> None:
    """Raise ValueError if the shape of observations does not begin as expected."""
    if tuple(shape[: len(expected)]) != tuple(expected):
        raise ValueError(
            f"depth reward ({name}): expected maps of {list(expected)}, got {list(shape)}. Use maps with the"
            " reward's number of views and resolution."
        )


def build(description: Mapping[str, Any]) -> RewardNetwork:
    """Create the network of a description. Raises: ValueError if it has fields of another network."""
    # A copy, since the entry is removed below.
    values = dict(description)
    name = values.pop("extractor", None)
    known: dict[str, type[RewardNetwork]] = {"small": SmallDepth, "resnet50": PublishedDepth}
    if name not in known:
        raise ValueError(
            f"depth reward: expected an extractor {' or '.join(known)}, got {name!r}. Check the file; a later"
            " version may have written it."
        )
    try:
        return known[name](**values)
    except TypeError as error:
        raise ValueError(
            f"depth reward ({name}): the description has settings that this network does not have: {error}."
            " Remove them."
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
