"""The features of the shape Fréchet distance, learnt from pictures of true heads' normals alone.

A small network reads normal maps of heads of people from in front, behind and both sides. It learnt which
coordinates of a latent they show, and by how much a head was blurred; it saw no generator and no damaged
scan. Its penultimate layer, standardised over true heads, is the feature. Judges alone may read this file,
never an annotator, a reward or an early stop (tests/test_structure.py).
Letters: N shapes, F views, Q features, K true heads, n grid points along x, y, z, S targets, R pixels of a
map's edge, B maps of a batch.
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

# Normal maps of a shape's surface, seen from fixed directions without perspective: no renderer, no colour, no
# rays of the generator's. A grid of values is turned about y and cut by columns; a column's first change of
# sign gives a height, the heights give normals. True heads and generators take the same path from grids of
# one size, so that only their shapes tell them apart.


RESOLUTION = 48  # R
# radians from frontal: the face, the back and both sides of it, where scans differ
YAWS = (0.0, 2.1, math.pi, -2.1)
# of the box that is seen, world units: side of the maps, y of its floor, depth along a view
WIDTH = 0.66
LOWEST = -0.30
DEPTH = 0.90
STEPS = 58  # samples along a view
CHANNELS = 4  # normal along the view's right, up and towards the viewer; 1 where there is a surface


def levelled(values: Tensor) -> Tensor:
    """Values [N, n, n, n] over the median step between neighbours across each shape's surface, held within
    -1..1: neither the unit, nor a decoder's slope and extremes, tell one kind of shape from another.
    """
    values = values.float().nan_to_num(nan=1e4, posinf=1e4, neginf=-1e4)
    out = []
    for shape in values:
        steps = []
        for axis in range(3):
            first = shape.narrow(axis, 0, len(shape) - 1)
            second = shape.narrow(axis, 1, len(shape) - 1)
            steps.append((first - second)[(first < 0) != (second < 0)].abs())
        step = torch.cat(steps)
        out.append((shape / (step.median() if len(step) else 1.0)).clamp(-1, 1))
    return torch.stack(out)


@torch.no_grad()
def normal_maps(values: Tensor, yaws: Sequence[float] = YAWS) -> Tensor:
    """Maps [N, F, 4, R, R] of shapes [N, n, n, n] over the cube of side 1, in a view's own axes; rows run
    down. 0 where nothing is known.

    Args: values: axes x, y, z, the middles of voxels, negative inside, as `people_mesh.grid_points` orders
        them.
    The viewer of yaw a stands in direction (sin a, 0, cos a). A normal is known where a pixel and its four
    neighbours show a surface.
    Raises: ValueError for what is no cube.
    """
    if values.ndim != 4 or len(set(values.shape[1:])) != 1:
        raise ValueError(
            f"normal_maps: expected values [N, n, n, n], got {list(values.shape)}. Sample them on a cube."
        )
    # [N, 1, z, y, x]; outside the cube is 0, as far from the surface
    volume = (1 - levelled(values)).permute(0, 3, 2, 1)[:, None]
    line = (torch.arange(RESOLUTION, device=values.device) + 0.5) / RESOLUTION * WIDTH
    u = line - WIDTH / 2
    v = (LOWEST + line).flip(0)
    # towards the viewer, nearest first
    w = torch.linspace(DEPTH / 2, -DEPTH / 2, STEPS, device=values.device)
    v, w, u = torch.meshgrid(v, w, u, indexing="ij")
    maps = []
    for yaw in yaws:
        x = u * math.cos(yaw) + w * math.sin(yaw)
        z = w * math.cos(yaw) - u * math.sin(yaw)
        place = 2 * torch.stack([x, v, z], dim=-1)
        turned = (
            functional.grid_sample(volume, place.expand(len(volume), -1, -1, -1, -1), align_corners=False)[
                :, 0
            ]
            - 1
        )
        maps.append(_maps(turned, u[:, 0], v[:, 0]))
    return torch.stack(maps, dim=1)


def _maps(values: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """One view's maps [N, 4, R, R] of values [N, H, w, u] that are positive inside, nearest w first; u, v
    [R, R]: places of the pixels.
    """
    inside = values >= 0
    hit = inside.any(dim=2)  # [N, H, u]
    index = inside.to(torch.uint8).argmax(dim=2, keepdim=True)
    before = (index - 1).clamp_min(0)
    value = values.gather(2, index)
    previous = values.gather(2, before)
    step = torch.where(index > 0, (-previous / (value - previous).clamp_min(1e-9)).clamp(0, 1), 0.0)[:, :, 0]
    height = DEPTH / 2 - DEPTH / (STEPS - 1) * (before[:, :, 0] + step)  # [N, H, u]
    points = torch.stack([u.expand_as(height), v.expand_as(height), height], dim=-1)  # [N, R, R, 3]
    normal, known = normals_from_points(points, hit)
    return torch.cat([(normal * known[..., None]).permute(0, 3, 1, 2), hit[:, None].float()], dim=1)


DEFAULT_ASSET = ASSETS / "shape-features.safetensors"
KIND = "shape features"
AT_ONCE = 8  # shapes whose maps are drawn together
WIDTHS = (CHANNELS, 12, 24, 40, 48)
FEATURES = 32  # Q
IDENTITY = 16  # leading components of a head's shape: maps of few pixels show little of the others
TARGETS = IDENTITY + people.HAIR_FIELDS + 1  # S; the last is the blur


class MapNet(nn.Module):
    """Four strided convolutions, a hidden layer and a linear output; 42 thousand parameters."""

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
        """[B, Q] of maps [B, 4, R, R]."""
        return functional.silu(self.hidden(self.trunk(maps).flatten(1)))

    def forward(self, maps: Tensor) -> Tensor:
        return self.head(self.penultimate(maps))


class ShapeFeatures:
    """The network, its features of true heads that it did not learn from, and the record of its training."""

    def __init__(self, net: MapNet, true: Tensor, scale: Tensor, record: dict) -> None:
        self.net = net.eval().requires_grad_(False)
        # [K, Q] features of true heads; [2, Q] mean and deviation of their raw ones
        self.true = true
        self.scale = scale
        self.record = record

    @torch.no_grad()
    def __call__(self, maps: Tensor) -> Tensor:
        """Features [N, Q] of maps [N, F, 4, R, R], in deviations of true heads; the mean over views."""
        parts = [
            self.net.penultimate(part.float().flatten(0, 1)).unflatten(0, part.shape[:2]).mean(dim=1)
            for part in maps.split(64)
        ]
        return (torch.cat(parts) - self.scale[0]) / self.scale[1]

    def of_grids(self, values: np.ndarray) -> np.ndarray:
        """Features [N, Q] float64 of shapes [N, n, n, n], negative inside."""
        parts = torch.from_numpy(np.ascontiguousarray(values)).float().split(AT_ONCE)
        return torch.cat([self(normal_maps(part)) for part in parts]).double().numpy()

    def frechet(self, maps: Tensor) -> float:
        """Fréchet distance of shapes' maps [N, F, 4, R, R] to the true heads; lower is better."""
        return (
            FeatureStatistics(FEATURES)
            .update(self(maps))
            .distance(FeatureStatistics(FEATURES).update(self.true))
        )

    def save(self, path: Path) -> None:
        """Write the network and features at `path`, and the record as JSON beside them."""
        storage.write_tensors(
            path, KIND, {**self.net.state_dict(), "true": self.true, "scale": self.scale}, self.record
        )
        storage.write_atomic(
            path.with_suffix(".json"), (json.dumps(self.record, indent=1, sort_keys=True) + "\n").encode()
        )

    @classmethod
    def load(cls, path: Path = DEFAULT_ASSET) -> "ShapeFeatures":
        """Read a file that `save` wrote.

        Raises: FileNotFoundError; ValueError for a damaged or foreign file.
        """
        tensors, record = storage.read_tensors(path, KIND)
        true = tensors.pop("true")
        scale = tensors.pop("scale")
        net = MapNet()
        storage.load_strict(net, tensors, str(path))
        return cls(net, true, scale, record)
