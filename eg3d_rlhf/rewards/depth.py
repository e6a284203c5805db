"""Depth maps from one camera or from three cameras, and the reward networks that read these maps.

There are two networks: the published one with a frozen ResNet-50 (arXiv 2606.27305), and a small one that is
trained from scratch. A depth is a distance along the pixel's unit ray. A field is a batch of 3D shapes that
can be rendered (core/field.py).

Shapes: N samples, V views, C channels (1, or 2 with the mask), R pixels per edge.
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

# Yaws of the cameras by number of views, in radians from frontal, in the order of the published code
VIEWS = {1: (0.0,), 3: (1.0, 0.0, -1.0)}
PUBLISHED_RESOLUTION = 128  # pixels per edge of a published map
PUBLISHED_FOCAL = 4.2633910179138184  # from a field of view of 18.837 degrees; FFHQ's labels have 4.2647
_TOLERANCE = 1e-6  # world units; cameras whose values differ by less count as equal


def nearness(depth: torch.Tensor, near: float, far: float) -> torch.Tensor:
    """Compute the nearness 1 - (depth - near) / (far - near) of each element of `depth`. Differentiable.

    The nearness is 1 at the depth `near` and 0 at the depth `far`. It is not clamped to 0..1.

    Args:
        depth: depths of any shape, in the unit of `near` and `far`.
        near: depth at which nearness is 1.
        far: depth at which nearness is 0.
    """
    return 1 - (depth - near) / (far - near)


@observations.register
@dataclass(frozen=True, kw_only=True)
class Depth(observations.Observation):
    """Observation that renders maps [N, V, C, R, R] of the nearness of the surface to the camera.

    Nearness is a linear function of depth: 1 at the near end of the rays, and 0 at the far end.

    If `masked` is True (our addition), nearness is multiplied by the ray's opacity, and opacity is a second
    channel. The background is then 0 in both channels, independently of the other samples of the batch, and
    silhouettes have a gradient. If `masked` is False, the map is the published one: the nearness of the ray
    marcher's depth alone.

    Raises: ValueError unless 0 < near < far and there are at least one pixel and one view.
    """

    kind: ClassVar[str] = "depth"
    ops: ClassVar[str] = "auto"
    yaws: tuple[float, ...] = VIEWS[1]  # yaws of the cameras, radians from frontal
    resolution: int = 64  # R
    samples: int | None = 32  # samples per ray and pass; None uses the generator's number
    masked: bool = True  # multiply by opacity and add it as a channel; see above
    radius: float = CameraFamily.radius  # distance of the cameras from the world's origin, world units
    pivot: tuple[float, float, float] = (0.0, 0.0, 0.2)  # point that the cameras look at, world units
    focal: float = CameraFamily.focal  # focal length in units of the image size
    near: float = 2.25  # depth at which nearness is 1, world units
    far: float = 3.3  # depth at which nearness is 0, world units

    def __post_init__(self) -> None:
        if not 0 < self.near < self.far or self.resolution < 1 or not self.yaws:
            raise ValueError(
                f"depth: expected 0 < near < far, resolution >= 1 and at least one yaw, got near {self.near},"
                f" far {self.far}, resolution {self.resolution} and yaws {self.yaws}. Correct these values in"
                " the observation of the reward's file."
            )

    @classmethod
    def from_generator(  # type: ignore[override]
        cls, generator: "Generator", *, resolution: int | None = None, views: int = 1, published: bool = False
    ) -> Self:
        """Create the observation that uses a generator's own cameras.

        Nearness is 1 at the near end of the generator's rays and 0 at their far end. If the generator does
        not state these ends, the front and the back of its cube are used.

        Args:
            generator: generator whose shapes are observed.
            resolution: pixels per edge; None uses 64, or 128 for published maps.
            views: number of views, 1 or 3.
            published: True for the published field of view, the generator's number of samples per ray, and no
                mask.
        Raises: ValueError for any other number of views, or if the generator's cameras are inside the shape's
            cube.
        """
        if views not in VIEWS:
            raise ValueError(
                f"depth maps: expected {' or '.join(map(str, VIEWS))} views, got {views}. Pass one of these"
                " numbers."
            )
        # The reward reads shapes from the generator's own camera family.
        cameras = generator.cameras
        half_edge = generator.bounds.side / 2
        # Half the cube's diagonal: inside this sphere, a camera may be inside the cube.
        if cameras.radius <= half_edge * 3**0.5:
            raise ValueError(
                "--observation=depth cannot be used with this generator: its cameras are"
                f" {cameras.radius:g} from the origin, and may be inside the shape's cube, whose edge is"
                f" {2 * half_edge:g}. Use another --observation."
            )
        near, far = depth_range(generator)
        render_settings = (
            {"samples": None, "masked": False, "focal": PUBLISHED_FOCAL}
            if published
            else {"focal": cameras.focal}
        )
        # A resolution that the user gave has priority.
        pixels_per_edge = resolution or (PUBLISHED_RESOLUTION if published else cls.resolution)
        return cls(
            yaws=VIEWS[views],
            resolution=pixels_per_edge,
            radius=cameras.radius,
            pivot=cameras.pivot,
            near=near,
            far=far,
            **render_settings,
        )

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape [V, C, R, R] of the observation of one sample."""
        # A mask (True counts as 1) adds a channel.
        return (len(self.yaws), 1 + self.masked, self.resolution, self.resolution)

    def cameras(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """Return the camera labels [V, 25] of the views: 16 values of cam2world and 9 of the intrinsics."""
        camera_family = CameraFamily(self.radius, self.pivot, self.focal)
        # The pose sampler draws random numbers, although they do not change these poses. `fixed_draws`
        # restores torch's global random state.
        with fixed_draws():
            return torch.cat([camera_family.label(yaw, device=device) for yaw in self.yaws])

    def observe(self, field: Field) -> torch.Tensor:
        """Render the maps [N, V, C, R, R] of a field of N shapes. Differentiable in the field.

        The rays of all views get the same random offsets of their samples.
        """
        options = RenderOptions(resolution=self.resolution, samples=self.samples)
        maps = []
        for camera in self.cameras().split(1):
            # Restart the random numbers for each view.
            with fixed_draws():
                rendering = field.render(camera, options)
            nearness_map = nearness(rendering.depth, self.near, self.far)
            # [N, C, R, R]
            maps.append(
                torch.cat([nearness_map * rendering.opacity, rendering.opacity], dim=1)
                if self.masked
                else nearness_map
            )
        return torch.stack(maps, dim=1)

    def augment(self, observations: torch.Tensor, draws: np.ndarray) -> torch.Tensor:
        """Mirror each sample left to right if its random number is below one half.

        The maps are mirrored and the order of the views is reversed.

        Args:
            observations: maps [N, V, C, R, R].
            draws: random numbers [N], uniform in 0..1.
        """
        is_mirrored = torch.from_numpy(draws < 0.5).to(observations.device)
        return torch.where(is_mirrored[:, None, None, None, None], mirror(observations), observations)

    def misfits(self, generator: "Generator") -> list[str]:
        """List the differences between the cameras of this observation and the cameras of a generator.

        Compared are the distance of the cameras from the origin, the point that they look at, and the range
        of depths.

        Returns: one text per difference, for example "camera radius 2.7, got 3.0"; empty if all values agree.
        """
        camera_family = generator.cameras
        # name, value of this observation, value of the generator
        compared_values: list[tuple[str, Any, Any]] = [
            ("camera radius", self.radius, camera_family.radius),
            ("camera pivot", self.pivot, camera_family.pivot),
            ("rays between", (self.near, self.far), depth_range(generator)),
        ]
        return [
            f"{name} {value}, got {generator_value}"
            for name, value, generator_value in compared_values
            if not np.allclose(value, generator_value, rtol=0, atol=_TOLERANCE)
        ]


def depth_range(generator: "Generator") -> tuple[float, float]:
    """Return the smallest and the largest depth on the generator's rays, in world units.

    If the generator does not state the ends of its rays, return the depths of the front and the back of its
    cube for a frontal camera.
    """
    radius = generator.cameras.radius
    half_edge = generator.bounds.side / 2
    return generator.cameras.span or (radius - half_edge, radius + half_edge)


def mirror(observations: torch.Tensor) -> torch.Tensor:
    """Return the maps [N, V, C, R, R] of the mirrored shapes: mirror each map, and reverse the views.

    Yaws are symmetric about the front, so the mirror image of the view at yaw a is the view of the mirrored
    shape at yaw -a.
    """
    # Axis 1 holds the views and axis 4 the columns of pixels.
    return observations.flip(1, 4)


# Environment variable with the path of the backbone's file, which replaces the path in a reward's file
BACKBONE = "EG3D_RLHF_BACKBONE"
INPUT = 224  # pixels per edge of the input of ResNet-50
WIDTHS = (16, 32, 64, 96)  # channels of the small network's stages
GROUPS = 8  # number of groups in the small network's group normalisation
FEATURES_PER_VIEW = 128  # of the small network
# Prefix of the backbone's entries in a state dict; files do not contain these entries
_EXTERNAL = "external."
# Smallest standard deviation of a pixel, as a share of the mean standard deviation of all pixels. Without
# this limit, pixels that are empty in almost all samples would be amplified.
_MIN_SCALE = 0.3


class PublishedDepth(RewardNetwork):
    """Published depth reward, whose features are those of a frozen ResNet-50 (the backbone).

    Maps of nearness are resized to 224 pixels per edge and repeated to three channels. The backbone gives
    2048 features per view, which are concatenated. With one view, 2,198,660 parameters are trained. The
    backbone always stays in eval mode, so that its batch normalisation uses the statistics of ImageNet. As in
    the published files, state dicts do not contain the backbone. The description of the network states the
    backbone's path and SHA-256 instead.

    Deviates: the published code resizes depth maps and then converts them to nearness. This class resizes
        nearness. Both orders agree up to rounding, since resizing is linear.

    Args:
        views: number of views, 1 or 3.
        backbone: path of the file with ResNet-50's weights.
        backbone_sha256: SHA-256 hash of the weights; None accepts any weights.
    Raises: ValueError if `backbone` is empty or the weights have a different hash.
    """

    def __init__(self, *, views: int, backbone: str = "", backbone_sha256: str | None = None):
        super().__init__(views * FEATURES, trunk=(512, 512), embedding=512, heads=(256, 128))
        if not backbone:
            raise ValueError(
                "--backbone: a reward with a ResNet-50 needs the file of its weights in torchvision's"
                " format, but none was given. Pass --backbone=FILE."
            )
        # The environment variable has priority, since the file may have another path on another machine.
        self.external = load_backbone(os.environ.get(BACKBONE) or backbone, backbone_sha256)
        # A new reward records the hash, so that later loads can check the file.
        sha256 = backbone_sha256 or state_hash(self.external)
        self._description: dict[str, Any] = {"views": views, "backbone": backbone, "backbone_sha256": sha256}
        # Saving and loading skip the backbone, so files stay small and have the published names.
        self.register_state_dict_post_hook(_remove_backbone)
        self.register_load_state_dict_post_hook(_ignore_missing_backbone)

    def train(self, mode: bool = True) -> "PublishedDepth":
        """Set the mode of the trained layers; the backbone stays in eval mode."""
        super().train(mode)
        self.external.eval()
        return self

    def features(self, observations: torch.Tensor) -> torch.Tensor:
        """Compute features [N, V * 2048] from maps of nearness [N, V, 1, R, R]. Differentiable in the maps.

        Raises: ValueError for maps of any other shape.
        """
        check_shape(
            "PublishedDepth(maps)",
            observations,
            ("N", "V", 1, "R", "R"),
            "Pass the result of the reward's observation.",
        )
        # [N * V, 1, 224, 224]: views become samples of the backbone
        maps = F.interpolate(
            observations.flatten(0, 1), size=(INPUT, INPUT), mode="bilinear", align_corners=False
        )
        features = self.external(maps.expand(-1, 3, -1, -1))  # [N * V, 2048], from three equal channels
        return features.unflatten(0, observations.shape[:2]).flatten(1)

    def describe(self) -> dict[str, Any]:
        """Return the description from which `build` creates this network."""
        return {"extractor": "resnet50", **self._description}

    def check(self, shape: Sequence[int]) -> None:
        """Raise ValueError unless maps of this shape [V, C, R, R] have the network's views and no mask."""
        _check("resnet50", (self._description["views"], 1), shape)


def _remove_backbone(_module: nn.Module, state_dict: dict[str, Any], prefix: str, _local: object) -> None:
    """Remove the backbone's entries from a state dict, in place.

    This is a hook that torch calls at the end of `state_dict`.
    """
    # The names are collected first, since a dict must not change during iteration.
    backbone_names = [name for name in state_dict if name.startswith(f"{prefix}{_EXTERNAL}")]
    for name in backbone_names:
        del state_dict[name]


def _ignore_missing_backbone(_module: nn.Module, keys: Any) -> None:
    """Remove the backbone's entries from the list of missing keys when a state dict is loaded.

    This is a hook that torch calls at the end of `load_state_dict`.
    """
    # torch reads the same list object after the hook, so the list is changed in place.
    keys.missing_keys[:] = [name for name in keys.missing_keys if _EXTERNAL not in name]


class Stage(nn.Module):
    """Residual block of stride 2, [N, C, H, W] -> [N, C', H/2, W/2].

    The block has two 3x3 convolutions with group normalisation, the first of stride 2, and a 1x1 convolution
    of stride 2 as shortcut.

    Args:
        channels: number of input channels, C.
        out_channels: number of output channels, C'.
    """

    def __init__(self, channels: int, out_channels: int):
        super().__init__()
        # Arguments of Conv2d after the channels: kernel size, stride, padding
        self.first = nn.Conv2d(channels, out_channels, 3, 2, 1, bias=False)
        self.norm1 = nn.GroupNorm(GROUPS, out_channels)
        self.second = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.norm2 = nn.GroupNorm(GROUPS, out_channels)
        self.shortcut = nn.Conv2d(channels, out_channels, 1, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the output [N, C', H/2, W/2] from features [N, C, H, W]."""
        residual = self.norm2(self.second(F.silu(self.norm1(self.first(x)))))
        return F.silu(residual + self.shortcut(x))


class SmallDepth(RewardNetwork):
    """Small depth network: four stages of stride 2 on standardised maps, and 128 features per view.

    Each pixel is standardised over the training shapes. There is no pooling before the linear layer, because
    the samples of one generator of heads differ little, and pooling would discard where the samples differ.
    In eval mode the features of the maps and of their mirror images are averaged, so that a score does not
    change if a shape is mirrored.

    Args:
        views: number of views, 1 or 3.
        resolution: pixels per edge of the maps, R.
        dropout: probability of dropout before the linear layer.
    """

    mean: torch.Tensor
    scale: torch.Tensor

    def __init__(self, *, views: int, resolution: int = 64, dropout: float = 0.5):
        super().__init__(views * FEATURES_PER_VIEW, trunk=(64, 64), embedding=64, heads=(32, 16))
        self._description: dict[str, Any] = {"views": views, "resolution": resolution, "dropout": dropout}
        # Input channels of each stage; the maps have two channels. The last width is no input, so that zip
        # must not be strict.
        in_channels = (2, *WIDTHS)
        self.stages = nn.Sequential(
            *(
                Stage(stage_inputs, stage_outputs)
                for stage_inputs, stage_outputs in zip(in_channels, WIDTHS, strict=False)
            )
        )
        self.dropout = nn.Dropout(dropout)
        # Pixels per edge after the last stage: every stage halves the edge and rounds up, and -(-a // b) is
        # the quotient a / b rounded up.
        final_edge = -(-resolution // 2 ** len(WIDTHS))
        self.each = nn.Linear(WIDTHS[-1] * final_edge**2, FEATURES_PER_VIEW)
        self.register_buffer("mean", torch.zeros(self._shape))
        self.register_buffer("scale", torch.ones(self._shape))

    @property
    def _shape(self) -> tuple[int, ...]:
        """Shape [V, 2, R, R] of the maps of one sample."""
        return (
            self._description["views"],
            2,
            self._description["resolution"],
            self._description["resolution"],
        )

    def calibrate(self, take: Callable[[], torch.Tensor]) -> None:
        """Set mean and standard deviation of each pixel, over the training maps and their mirror images.

        Args: take: function that returns the maps of all training shapes, [N, V, 2, R, R].
        """
        maps = take()
        # With the mirror images the statistics are symmetric.
        maps = torch.cat([maps, mirror(maps)])
        pixel_stds = maps.std(dim=0)
        self.mean.copy_(maps.mean(dim=0))
        # Both are buffers of the state dict, so they are changed in place. 1e-6 avoids a division by 0 if all
        # maps are equal.
        self.scale.copy_(pixel_stds.clamp_min(_MIN_SCALE * float(pixel_stds.mean()) + 1e-6))

    def features(self, observations: torch.Tensor) -> torch.Tensor:
        """Compute features [N, V * 128] of maps [N, V, 2, R, R]. Differentiable in the maps.

        In eval mode the features are the mean over the maps and their mirror images.

        Raises: ValueError for maps of any other shape.
        """
        check_shape(
            "SmallDepth(maps)",
            observations,
            ("N", *self._shape),
            "Pass the result of the reward's observation.",
        )
        # Training mirrors samples at random instead, see `Depth.augment`.
        if self.training:
            return self._features(observations)
        # The mean over both orientations is invariant to mirroring.
        return 0.5 * (self._features(observations) + self._features(mirror(observations)))

    def _features(self, observations: torch.Tensor) -> torch.Tensor:
        """Compute features [N, V * 128] of maps [N, V, 2, R, R], without their mirror images."""
        standardised_maps = ((observations - self.mean) / self.scale).flatten(0, 1)  # [N * V, 2, R, R]
        view_features = self.each(self.dropout(self.stages(standardised_maps).flatten(1)))  # [N * V, 128]
        return view_features.unflatten(0, observations.shape[:2]).flatten(1)

    def describe(self) -> dict[str, Any]:
        """Return the description from which `build` creates this network."""
        return {"extractor": "small", **self._description}

    def check(self, shape: Sequence[int]) -> None:
        """Raise ValueError unless `shape` is the shape [V, 2, R, R] of the maps that this network reads."""
        _check("small", self._shape, shape)


def _check(extractor: str, expected_sizes: Sequence[int], shape: Sequence[int]) -> None:
    """Raise ValueError if the shape of one sample's maps does not begin with the expected sizes.

    Args:
        extractor: name of the network's extractor, for the message.
        expected_sizes: expected first sizes of the shape.
        shape: shape [V, C, R, R] of the maps.
    """
    if tuple(shape[: len(expected_sizes)]) != tuple(expected_sizes):
        raise ValueError(
            f"depth reward ({extractor}): expected maps whose shape [views, channels, height, width] begins"
            f" with {list(expected_sizes)}, got {list(shape)}. Use maps with the reward's number of views,"
            " channels and resolution."
        )


def build(description: Mapping[str, Any]) -> RewardNetwork:
    """Create an untrained network from its description.

    Args:
        description: under "extractor" the name of the network, "small" or "resnet50"; all other entries are
            arguments of its constructor.

    Raises: ValueError for an unknown extractor, or for an argument that is missing or that the constructor
        does not accept.
    """
    # A copy, since the entry is removed below.
    network_settings = dict(description)
    extractor = network_settings.pop("extractor", None)
    network_classes: dict[str, type[RewardNetwork]] = {"small": SmallDepth, "resnet50": PublishedDepth}
    if extractor not in network_classes:
        raise ValueError(
            f"depth reward: expected the extractor {' or '.join(network_classes)}, got {extractor!r}. If a"
            " later version of the package wrote the file, open it with that version."
        )
    try:
        return network_classes[extractor](**network_settings)
    except TypeError as error:
        raise ValueError(
            f"depth reward ({extractor}): the description has a wrong setting: {error}. Correct the network's"
            " settings in the reward's file."
        ) from error


# Settings of the training, see `rewards.settings`
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
            network={"extractor": "small", "views": views, "resolution": resolution},
            train=_SMALL,
            observe={"resolution": resolution, "views": views},
        )
        for name, views, resolution in (
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
