"""Compute the features of the shape Fréchet distance with a network trained only on normal maps of
ground-truth heads.

The small network reads normal maps of heads of people from the front, the back and both sides. It was trained
to regress the coordinates of a latent that the maps show, and the amount by which a head was blurred. Its
training data contained no generator's shapes and no defective scans. Its penultimate layer, standardised over
ground-truth heads, is the feature. Only held-out evaluators may read this file, never a simulated annotator,
a reward or an early stop (tests/test_structure.py).
Letters: N shapes, F views, Q features, K ground-truth heads, n grid points along x, y, z, S targets, R pixels
of a map's edge, B maps of a batch.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from eg3d_rlhf.core.cli import ASSETS
from eg3d_rlhf.measures.distances import FeatureStatistics
from eg3d_rlhf.measures.views import normals_from_points
from training import storage
from training.heads import people

# Normal maps of a shape's surface, seen from fixed directions in orthographic projection: without a renderer,
# without colour, and without the generator's ray sampling. A grid of values is rotated about y and read
# column by column. The first change of sign in a column gives a height, and the heights give normals.
# Ground-truth heads and generators take the same path from grids of one size, so that only their shapes
# differ.


RESOLUTION = 48  # R
# Radians from frontal: the face, the back, and both sides of the back, where scans differ
YAWS = (0.0, 2.1, math.pi, -2.1)
# The box that the maps cover, in world units: side of the maps, lowest y, and depth along a view
WIDTH = 0.66
LOWEST = -0.30
DEPTH = 0.90
STEPS = 58  # samples along a view
CHANNELS = 4  # the normal along the view's right, up and towards the viewer, and 1 where there is a surface


def levelled(values: Tensor) -> Tensor:
    """Divide values [N, n, n, n] by the median step between neighbours across each shape's surface, and clamp
    them to -1..1.

    Neither the unit of the values nor the slope and the extremes of a decoder then influence the features.
    """
    # Not finite values count as far outside or far inside, as their sign says.
    values = values.float().nan_to_num(nan=1e4, posinf=1e4, neginf=-1e4)
    out = []
    for shape in values:
        steps = []
        for axis in range(3):
            # Differences over the pairs of neighbours between which the sign changes
            first = shape.narrow(axis, 0, len(shape) - 1)
            second = shape.narrow(axis, 1, len(shape) - 1)
            steps.append((first - second)[(first < 0) != (second < 0)].abs())
        step = torch.cat(steps)
        # A grid without a surface has no such pair; it is only clamped.
        out.append((shape / (step.median() if len(step) else 1.0)).clamp(-1, 1))
    return torch.stack(out)


@torch.no_grad()
def normal_maps(values: Tensor, yaws: Sequence[float] = YAWS) -> Tensor:
    """Compute maps [N, F, 4, R, R] of shapes [N, n, n, n] over the cube of side 1, in each view's own axes.

    Rows run downwards. The viewer of yaw a stands in direction (sin a, 0, cos a). A normal is known where a
    pixel and its four neighbours show a surface; elsewhere it is 0.

    Args: values: axes x, y, z, at the centres of voxels, negative inside, in the order of
        `people_mesh.grid_points`.
    Raises: ValueError if the grids are not cubes.
    """
    if values.ndim != 4 or len(set(values.shape[1:])) != 1:
        raise ValueError(
            f"normal_maps: expected values [N, n, n, n], got {list(values.shape)}. Sample them on a cube."
        )
    # [N, 1, z, y, x], the order that grid_sample expects. grid_sample pads with 0; since 1 is subtracted
    # again below, a place outside the cube gets -1, which is as far outside the shape as a value can be.
    volume = (1 - levelled(values)).permute(0, 3, 2, 1)[:, None]
    line = (torch.arange(RESOLUTION, device=values.device) + 0.5) / RESOLUTION * WIDTH  # centres of pixels
    u = line - WIDTH / 2
    v = (LOWEST + line).flip(0)  # the first row is the highest
    # Towards the viewer, nearest first
    w = torch.linspace(DEPTH / 2, -DEPTH / 2, STEPS, device=values.device)
    v, w, u = torch.meshgrid(v, w, u, indexing="ij")  # [R, STEPS, R] each
    maps = []
    for yaw in yaws:
        x = u * math.cos(yaw) + w * math.sin(yaw)
        z = w * math.cos(yaw) - u * math.sin(yaw)
        # The cube spans -1/2..1/2, and grid_sample's coordinates span -1..1.
        place = 2 * torch.stack([x, v, z], dim=-1)  # [R, STEPS, R, 3]
        rotated = (
            functional.grid_sample(volume, place.expand(len(volume), -1, -1, -1, -1), align_corners=False)[
                :, 0
            ]
            - 1
        )
        maps.append(_maps(rotated, u[:, 0], v[:, 0]))
    return torch.stack(maps, dim=1)


def _maps(values: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Compute the maps [N, 4, R, R] of one view.

    Args: values: [N, H, w, u], positive inside, nearest w first; u, v: positions [R, R] of the pixels.
    """
    inside = values >= 0
    hit = inside.any(dim=2)  # [N, H, u]
    index = inside.to(torch.uint8).argmax(dim=2, keepdim=True)  # the first sample inside, from the viewer
    before = (index - 1).clamp_min(0)
    value = values.gather(2, index)
    previous = values.gather(2, before)
    # Linear interpolation of the zero between the last sample outside and the first one inside
    step = torch.where(index > 0, (-previous / (value - previous).clamp_min(1e-9)).clamp(0, 1), 0.0)[:, :, 0]
    height = DEPTH / 2 - DEPTH / (STEPS - 1) * (before[:, :, 0] + step)  # [N, H, u]
    points = torch.stack([u.expand_as(height), v.expand_as(height), height], dim=-1)  # [N, R, R, 3]
    normal, known = normals_from_points(points, hit)
    # Normals that are not known are set to 0.
    return torch.cat([(normal * known[..., None]).permute(0, 3, 1, 2), hit[:, None].float()], dim=1)


DEFAULT_ASSET = ASSETS / "shape-features.safetensors"
KIND = "shape features"  # kind of file, stored in it
AT_ONCE = 8  # shapes whose maps are computed together
WIDTHS = (CHANNELS, 12, 24, 40, 48)
FEATURES = 32  # Q
# leading components of a head's shape that are regressed; maps of few pixels show little of others
IDENTITY = 16
TARGETS = IDENTITY + people.HAIR_FIELDS + 1  # S; the last one is the blur


class MapNet(nn.Module):
    """Convolutional regressor of latent coordinates with 42 thousand parameters.

    It has four strided convolutions, a hidden layer, whose output is the feature, and a linear output.
    """

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i in range(4):
            size = 5 if i == 0 else 3
            layers += [nn.Conv2d(WIDTHS[i], WIDTHS[i + 1], size, stride=2, padding=size // 2), nn.SiLU()]
        self.trunk = nn.Sequential(*layers)  # [B, 4, R, R] -> [B, 48, R/16, R/16]
        self.hidden = nn.Linear(WIDTHS[-1] * (RESOLUTION // 16) ** 2, FEATURES)
        self.head = nn.Linear(FEATURES, TARGETS)

    def penultimate(self, maps: Tensor) -> Tensor:
        """Return raw features [B, Q] of maps [B, 4, R, R]."""
        return functional.silu(self.hidden(self.trunk(maps).flatten(1)))

    def forward(self, maps: Tensor) -> Tensor:
        """Return standardised targets [B, S] of maps [B, 4, R, R]."""
        return self.head(self.penultimate(maps))


class ShapeFeatures:
    """The network, its features of unseen ground-truth heads, and its training record."""

    def __init__(self, net: MapNet, true: Tensor, scale: Tensor, record: dict) -> None:
        self.net = net.eval().requires_grad_(False)
        self.true = true  # [K, Q] standardised features of ground-truth heads
        self.scale = scale  # [2, Q] mean and standard deviation of their raw features
        self.record = record

    @torch.no_grad()
    def __call__(self, maps: Tensor) -> Tensor:
        """Return features [N, Q] of maps [N, F, 4, R, R]: the mean over views, standardised over
        ground-truth heads.
        """
        # In parts of 64 shapes; each view is one image of the network's batch.
        parts = [
            self.net.penultimate(part.float().flatten(0, 1)).unflatten(0, part.shape[:2]).mean(dim=1)
            for part in maps.split(64)
        ]
        return (torch.cat(parts) - self.scale[0]) / self.scale[1]

    def of_grids(self, values: np.ndarray) -> np.ndarray:
        """Compute features [N, Q] in float64 of shapes [N, n, n, n], which are negative inside."""
        parts = torch.from_numpy(np.ascontiguousarray(values)).float().split(AT_ONCE)
        return torch.cat([self(normal_maps(part)) for part in parts]).double().numpy()

    def frechet(self, maps: Tensor) -> float:
        """Compute the Fréchet distance between shapes' maps [N, F, 4, R, R] and the ground-truth heads.

        Lower is better.
        """
        return (
            FeatureStatistics(FEATURES)
            .update(self(maps))
            .distance(FeatureStatistics(FEATURES).update(self.true))
        )

    def save(self, path: Path) -> None:
        """Write the network and its features at `path`, and the record as JSON beside the file."""
        storage.write_tensors(
            path, KIND, {**self.net.state_dict(), "true": self.true, "scale": self.scale}, self.record
        )
        storage.write_atomic(
            path.with_suffix(".json"), (json.dumps(self.record, indent=1, sort_keys=True) + "\n").encode()
        )

    @classmethod
    def load(cls, path: Path = DEFAULT_ASSET) -> "ShapeFeatures":
        """Read a file that `save` wrote.

        Raises: FileNotFoundError if the file is missing; ValueError if it is damaged or of another kind.
        """
        tensors, record = storage.read_tensors(path, KIND)
        true = tensors.pop("true")
        scale = tensors.pop("scale")
        net = MapNet()
        storage.load_strict(net, tensors, str(path))
        return cls(net, true, scale, record)
