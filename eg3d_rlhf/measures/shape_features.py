"""Compute features of a head's shape, whose Fréchet distance is reported as the shape Fréchet distance.

A normal map is an image that holds the direction of the surface at each pixel. A small network reads normal
maps of synthetic heads from the front, the back and both sides. It was trained on ground-truth heads alone to
regress coordinates of the latent from the maps, and the amount by which a head was blurred. Its training data
contained no generator's shapes and no defective scans. The output of its penultimate layer, standardised over
ground-truth heads, is the feature vector. Only held-out evaluators may use this module, never a simulated
annotator, a reward or an early stop (tests/test_structure.py checks the imports).

Shapes: N shapes, F views, Q features, K ground-truth heads, n grid points along each of x, y and z, S targets
of the training, R pixels per side of a map, B maps of a batch.
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

# Normal maps are computed in orthographic projection from fixed directions, without a renderer, without
# colour, and without the generator's ray sampling. A grid of values is rotated about y. Along each line of
# sight, the first change of sign gives the height of the surface, and the heights of neighbouring pixels give
# normals. Maps of ground-truth heads and of generators are computed from grids of the same size by the same
# functions, so only the shapes differ.


RESOLUTION = 48  # R
# Yaws of the views in radians from frontal: the face, the back, and the back from the left and from the
# right, where scans differ
YAWS = (0.0, 2.1, math.pi, -2.1)
WIDTH = 0.66  # width and height of the box that the maps cover, in world units
LOWEST = -0.30  # y of the lower side of that box, in world units
DEPTH = 0.90  # depth of that box along the line of sight, in world units
STEPS = 58  # number of samples along a line of sight
# Channels of a map: the components of the normal to the view's right, upwards and towards the viewer, and 1
# where the pixel shows a surface
CHANNELS = 4


def scale_to_surface(grid_values: Tensor) -> Tensor:
    """Scale the values of each shape to a slope of about 1 per grid point at its surface, and clamp them.

    The results are in -1..1. The scale is the median difference between neighbouring grid points on different
    sides of the surface. After the scaling, neither the unit of the values nor the slope and the extremes of
    a decoder influence the features.

    Args:
        grid_values: values [N, n, n, n] of shapes, negative inside.

    Returns: the scaled values, float32 of the same shape.
    """
    # Positive infinity and NaN count as far outside, negative infinity as far inside.
    grid_values = grid_values.float().nan_to_num(nan=1e4, posinf=1e4, neginf=-1e4)
    scaled_shapes = []
    for shape in grid_values:
        axis_steps = []
        for axis in range(3):
            # Differences over the pairs of neighbours between which the sign changes
            lower_neighbour = shape.narrow(axis, 0, len(shape) - 1)
            upper_neighbour = shape.narrow(axis, 1, len(shape) - 1)
            is_crossed = (lower_neighbour < 0) != (upper_neighbour < 0)
            axis_steps.append((lower_neighbour - upper_neighbour)[is_crossed].abs())
        surface_steps = torch.cat(axis_steps)
        # A grid without a surface has no such pair; it is only clamped.
        scaled_shapes.append((shape / (surface_steps.median() if len(surface_steps) else 1.0)).clamp(-1, 1))
    return torch.stack(scaled_shapes)


@torch.no_grad()
def normal_maps(grid_values: Tensor, yaws: Sequence[float] = YAWS) -> Tensor:
    """Compute normal maps of shapes in orthographic projection.

    The viewer of yaw a is in the direction (sin a, 0, cos a). A normal is defined where a pixel and its four
    neighbours show a surface; at all other pixels it is 0.

    Args:
        grid_values: grids [N, n, n, n] of shapes over the cube of side 1, negative inside. The axes are x, y
            and z, and the points are the centres of voxels, as in `people_mesh.grid_points`.
        yaws: angles of the F views in radians from frontal.

    Returns: maps [N, F, 4, R, R], see CHANNELS. Rows run downwards, and normals are in the axes of their
        view.
    Raises: ValueError if the grids are not cubes.
    """
    if grid_values.ndim != 4 or len(set(grid_values.shape[1:])) != 1:
        raise ValueError(
            f"normal_maps: values have the shape {list(grid_values.shape)}, but must have [N, n, n, n]. Pass"
            " grids with the same number of points along all axes."
        )
    # [N, 1, z, y, x], the order that grid_sample expects. 1 - values is positive
    # inside. grid_sample pads with 0; since 1 is subtracted again below, points
    # outside the cube get -1, the value that is farthest outside.
    value_volume = (1 - scale_to_surface(grid_values)).permute(0, 3, 2, 1)[:, None]
    pixel_centres = (torch.arange(RESOLUTION, device=grid_values.device) + 0.5) / RESOLUTION * WIDTH
    # Coordinates in the axes of a view: u to its right, v upwards, w towards the viewer, in world units
    u = pixel_centres - WIDTH / 2
    v = (LOWEST + pixel_centres).flip(0)  # the first row of a map is the highest
    w = torch.linspace(DEPTH / 2, -DEPTH / 2, STEPS, device=grid_values.device)  # nearest first
    v, w, u = torch.meshgrid(v, w, u, indexing="ij")  # [R, STEPS, R] each
    maps = []
    for yaw in yaws:
        x = u * math.cos(yaw) + w * math.sin(yaw)
        z = w * math.cos(yaw) - u * math.sin(yaw)
        # The cube spans -1/2..1/2, and grid_sample's coordinates span -1..1.
        coordinates = 2 * torch.stack([x, v, z], dim=-1)  # [R, STEPS, R, 3]
        sampled_values = functional.grid_sample(
            value_volume, coordinates.expand(len(value_volume), -1, -1, -1, -1), align_corners=False
        )
        rotated_values = sampled_values[:, 0] - 1  # without the channel axis; -1 outside, up to 1 inside
        # u and v do not change along w, so its first sample suffices.
        maps.append(_maps(rotated_values, u[:, 0], v[:, 0]))
    return torch.stack(maps, dim=1)


def _maps(rotated_values: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Compute the maps [N, 4, R, R] of one view.

    Args:
        rotated_values: values [N, R, STEPS, R] along v (downwards), w (nearest first) and u, positive inside.
        u: horizontal positions [R, R] of the pixels in world units.
        v: vertical positions [R, R] of the pixels in world units.
    """
    is_inside = rotated_values >= 0
    is_hit = is_inside.any(dim=2)  # [N, R, R]: the line of sight meets the shape
    # First sample inside as seen from the viewer. argmax returns
    # the first of equal values, and 0 without any.
    inside_index = is_inside.to(torch.uint8).argmax(dim=2, keepdim=True)
    outside_index = (inside_index - 1).clamp_min(0)
    inside_value = rotated_values.gather(2, inside_index)
    outside_value = rotated_values.gather(2, outside_index)
    # Linear interpolation of the zero between the last sample outside and the first sample inside, as a share
    # of a step. It is 0 if the first sample of the line is inside already.
    step_share = torch.where(
        inside_index > 0, (-outside_value / (inside_value - outside_value).clamp_min(1e-9)).clamp(0, 1), 0.0
    )[:, :, 0]
    surface_heights = DEPTH / 2 - DEPTH / (STEPS - 1) * (
        outside_index[:, :, 0] + step_share
    )  # [N, R, R] position along w
    points = torch.stack(
        [u.expand_as(surface_heights), v.expand_as(surface_heights), surface_heights], dim=-1
    )  # [N, R, R, 3]
    normal, has_normal = normals_from_points(points, is_hit)
    # Undefined normals are set to 0.
    return torch.cat([(normal * has_normal[..., None]).permute(0, 3, 1, 2), is_hit[:, None].float()], dim=1)


DEFAULT_ASSET = ASSETS / "shape-features.safetensors"
KIND = "shape features"  # kind of file, written into it; a file of another kind is rejected
AT_ONCE = 8  # number of shapes whose maps are computed together
WIDTHS = (CHANNELS, 12, 24, 40, 48)  # channels of the input and of the outputs of the four convolutions
FEATURES = 32  # Q
# Number of leading principal components of a head's shape that are regressed. Maps of few pixels show little
# of the other components.
IDENTITY = 16
TARGETS = IDENTITY + people.HAIR_FIELDS + 1  # S; the last target is the blur


class MapNet(nn.Module):
    """Convolutional network with 42 thousand parameters that regresses coordinates of the latent.

    The network has four strided convolutions, a hidden layer whose output is the feature vector, and a linear
    output layer.
    """

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i in range(4):
            # Only the first convolution has a 5 x 5 kernel. Each one halves the resolution.
            kernel_size = 5 if i == 0 else 3
            layers += [
                nn.Conv2d(WIDTHS[i], WIDTHS[i + 1], kernel_size, stride=2, padding=kernel_size // 2),
                nn.SiLU(),
            ]
        self.trunk = nn.Sequential(*layers)  # [B, 4, R, R] -> [B, 48, R/16, R/16]
        self.hidden = nn.Linear(WIDTHS[-1] * (RESOLUTION // 16) ** 2, FEATURES)
        self.head = nn.Linear(FEATURES, TARGETS)

    def penultimate(self, maps: Tensor) -> Tensor:
        """Compute raw features [B, Q], before standardisation, of normal maps [B, 4, R, R]."""
        return functional.silu(self.hidden(self.trunk(maps).flatten(1)))

    def forward(self, maps: Tensor) -> Tensor:
        """Predict the standardised targets [B, S] of the training from normal maps [B, 4, R, R]."""
        return self.head(self.penultimate(maps))


class ShapeFeatures:
    """Trained network together with its features of ground-truth heads.

    Args:
        net: trained network.
        ground_truth_features: standardised features [K, Q] of ground-truth heads that the training did not
            use.
        feature_scale: mean and standard deviation of raw features of ground-truth heads, [2, Q].
        training_record: training settings and validation results, as JSON values.
    """

    def __init__(
        self, net: MapNet, ground_truth_features: Tensor, feature_scale: Tensor, training_record: dict
    ) -> None:
        self.net = net.eval().requires_grad_(False)
        self.true = ground_truth_features  # [K, Q] standardised features of ground-truth heads
        self.scale = feature_scale  # [2, Q] mean and standard deviation of their raw features
        self.record = training_record

    @torch.no_grad()
    def __call__(self, maps: Tensor) -> Tensor:
        """Compute features [N, Q] of normal maps [N, F, 4, R, R].

        Raw features are averaged over the views, and standardised by those of ground-truth heads.
        """
        # 64 shapes at a time limit the memory. Each view is one image of the network's batch.
        feature_chunks = [
            self.net.penultimate(chunk.float().flatten(0, 1)).unflatten(0, chunk.shape[:2]).mean(dim=1)
            for chunk in maps.split(64)
        ]
        return (torch.cat(feature_chunks) - self.scale[0]) / self.scale[1]

    def of_grids(self, grid_values: np.ndarray) -> np.ndarray:
        """Compute features of shapes, float64 [N, Q].

        Args:
            grid_values: grids [N, n, n, n] of shapes, negative inside, see `normal_maps`.
        """
        # torch.from_numpy rejects arrays with negative strides, such as mirrored ones.
        chunks = torch.from_numpy(np.ascontiguousarray(grid_values)).float().split(AT_ONCE)
        return torch.cat([self(normal_maps(chunk)) for chunk in chunks]).double().numpy()

    def frechet(self, maps: Tensor) -> float:
        """Compute the Fréchet distance between the features of shapes and of ground-truth heads.

        Lower is better.

        Args:
            maps: normal maps [N, F, 4, R, R] of the shapes, N >= 2.
        """
        return (
            FeatureStatistics(FEATURES)
            .update(self(maps))
            .distance(FeatureStatistics(FEATURES).update(self.true))
        )

    def save(self, path: Path) -> None:
        """Write the network and the features of ground-truth heads as a safetensors file.

        The record is written as JSON into a file beside it with the suffix .json.
        """
        storage.write_tensors(
            path, KIND, {**self.net.state_dict(), "true": self.true, "scale": self.scale}, self.record
        )
        storage.write_atomic(
            path.with_suffix(".json"), (json.dumps(self.record, indent=1, sort_keys=True) + "\n").encode()
        )

    @classmethod
    def load(cls, path: Path = DEFAULT_ASSET) -> "ShapeFeatures":
        """Read a file that `save` wrote; the default is the bundled file.

        Raises: FileNotFoundError if the file is missing; ValueError if it is damaged or of another kind.
        """
        tensors, training_record = storage.read_tensors(path, KIND)
        # The file holds these two tensors beside the state dict of the network.
        ground_truth_features = tensors.pop("true")
        feature_scale = tensors.pop("scale")
        net = MapNet()
        storage.load_strict(net, tensors, str(path))
        return cls(net, ground_truth_features, feature_scale, training_record)
