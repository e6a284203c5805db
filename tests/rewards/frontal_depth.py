"""Example of a plugin: a reward on the distance of the surface from the frontal camera, with three
convolutions.

    EG3D_RLHF_PLUGINS=tests/rewards/frontal_depth.py python tools/train_reward.py --observation=frontal-depth
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from eg3d_rlhf.core.field import CameraFamily, RenderOptions
from eg3d_rlhf.rewards import networks, observations
from eg3d_rlhf.rewards.presets import Preset


@observations.register
@dataclass(frozen=True, kw_only=True)
class FrontalDepth(observations.Observation):
    """Depth maps [N, 1, r, r]: 0 at the camera's pivot, 1 at `reach` from it towards the camera, 0 in the
    background.
    """

    kind: ClassVar[str] = "frontal-depth"
    resolution: int = 16  # r, pixels
    samples: int = 12  # per ray and pass
    radius: float = CameraFamily.radius  # of the camera, world units
    pivot: tuple[float, float, float] = (0.0, 0.0, 0.0)  # point that the camera looks at
    focal: float = CameraFamily.focal  # in units of the image size
    reach: float = 0.5  # world units that are mapped to 0..1

    @classmethod
    def from_generator(cls, generator, *, resolution=16):
        """Create the observation with the generator's cameras."""
        cameras = generator.cameras
        return cls(resolution=resolution, radius=cameras.radius, pivot=cameras.pivot, focal=cameras.focal)

    @property
    def shape(self):
        """Shape of one sample's map, (1, r, r)."""
        return (1, self.resolution, self.resolution)

    def observe(self, field):
        """Render the maps, see `Observation`."""
        with torch.random.fork_rng(devices=[]):  # the jitter of rays is the same in every call
            torch.manual_seed(0)
            camera = CameraFamily(self.radius, self.pivot, self.focal).label()
            seen = field.render(camera, RenderOptions(resolution=self.resolution, samples=self.samples))
        return (self.radius - seen.depth) / self.reach * seen.opacity

    def augment(self, observed, draws):
        """Mirror maps with probability one half."""
        mirrored = torch.from_numpy(draws < 0.5).to(observed.device)
        return torch.where(mirrored[:, None, None, None], observed.flip(-1), observed)

    def misfits(self, generator):
        """List differences between this camera and the generator's."""
        camera = CameraFamily(self.radius, self.pivot, self.focal)
        expected = generator.cameras
        return [
            f"{name} {getattr(camera, name)}, got {getattr(expected, name)}"
            for name in ("radius", "pivot", "focal")
            if getattr(camera, name) != getattr(expected, name)
        ]


class DepthNetwork(networks.RewardNetwork):
    """Three convolutions of stride 2, followed by the trunk and heads of all reward networks."""

    def __init__(self, resolution: int, channels: int = 8):
        super().__init__(4 * channels * (resolution // 8) ** 2, trunk=(32, 32), embedding=32)
        self.arguments = {"resolution": resolution, "channels": channels}
        sizes = (1, channels, 2 * channels, 4 * channels)
        self.layers = nn.Sequential(
            *(
                layer
                for a, b in zip(sizes, sizes[1:], strict=False)
                for layer in (nn.Conv2d(a, b, 4, stride=2, padding=1), nn.SiLU())
            )
        )

    def features(self, observed):
        """Return features of maps [N, 1, r, r], see `RewardNetwork`."""
        return self.layers(observed).flatten(1)

    def describe(self):
        """Return the arguments of the network, see `RewardNetwork`."""
        return self.arguments

    def check(self, shape):
        """Raise ValueError for maps of another resolution."""
        if tuple(shape) != (1, self.arguments["resolution"], self.arguments["resolution"]):
            raise ValueError(
                f"reward: expected depth maps of {self.arguments['resolution']} pixels, got {list(shape)}."
                " Use maps of the reward's resolution."
            )


PRESETS = {
    "depth": Preset(network={"resolution": 16}, train={"epochs": 8, "batch": 8}, observe={"resolution": 16})
}
networks.register("frontal-depth", lambda description: DepthNetwork(**description), PRESETS)
