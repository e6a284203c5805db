"""Renderer of Gaussian splats in plain PyTorch, which is slow, exact, and runs on any device.

Rendering follows Kerbl et al. 2023 (3D Gaussian Splatting), with the projection of Zwicker et al. 2001 (EWA
Splatting) and the blur of Yu et al. 2024 (Mip-Splatting).

Shapes: G number of Gaussians, S pixels per side of an image, P pixels of a tile, K number of Gaussians that
overlap the tile.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch


class Gaussians(Protocol):
    """Interface to Gaussians with one colour each, the same from every direction."""

    @property
    def means(self) -> torch.Tensor:
        """Centres [G, 3]."""

    @property
    def scales(self) -> torch.Tensor:
        """Standard deviations [G, 3] along their axes, > 0."""

    @property
    def rotations(self) -> torch.Tensor:
        """Quaternions [G, 4], real part first."""

    @property
    def opacities(self) -> torch.Tensor:
        """Opacities [G] in 0..1."""

    @property
    def colours(self) -> torch.Tensor:
        """Colours [G, C] that are blended, usually RGB in 0..1."""


TILE = 14  # pixels per side of the tiles in which an image is rendered
# Variance in pixels^2 that is added to every Gaussian on screen. Its opacity is lowered, so that its total
# brightness stays the same (Yu et al. 2024, Mip-Splatting).
BLUR = 0.1
REACH = 3  # standard deviations beyond which a Gaussian is cut off
NEAR = 0.1  # smallest depth in front of the camera that is rendered
MAX_ALPHA = 0.99  # largest opacity of a Gaussian at a pixel (Kerbl et al. 2023)


@dataclass(frozen=True)
class View:
    """Pinhole camera with x to the right, y down and z forward."""

    rotation: torch.Tensor  # [3, 3], world to camera
    position: torch.Tensor  # [3], camera centre in the world
    focal: float  # focal length in sides of the image

    def camera(self, xyz: torch.Tensor) -> torch.Tensor:
        """Transform points [G, 3] from the world to the camera's frame."""
        return (xyz - self.position.to(xyz)) @ self.rotation.to(xyz).T

    def project(self, xyz: torch.Tensor) -> torch.Tensor:
        """Project points [G, 3] to image coordinates [G, 2].

        The coordinates are 0..1, to the right and down from the upper left corner.
        """
        camera_points = self.camera(xyz)
        return self.focal * camera_points[:, :2] / camera_points[:, 2:] + 0.5


def views_around(camera_count: int, radius: float = 2.0, fov: float = 40.0) -> list[View]:
    """Place cameras evenly on a sphere around the origin, looking at the origin, with z up.

    Args:
        camera_count: number of cameras, at least 1.
        radius: distance of the cameras from the origin.
        fov: field of view in degrees.
    """
    views = []
    for i in range(camera_count):
        # Fibonacci sphere: heights are evenly spaced in -1..1, and each camera is rotated about the z axis by
        # the golden angle, pi (3 - sqrt(5)), against the previous one.
        height = 1 - (2 * i + 1) / camera_count
        azimuth = i * math.pi * (3 - math.sqrt(5))
        ring = math.sqrt(1 - height**2)  # radius of the circle at this height
        position = torch.tensor([ring * math.cos(azimuth), ring * math.sin(azimuth), height])
        forward = -position
        # At the poles z is parallel to the viewing direction, so the y axis is used as up.
        up = torch.tensor([0.0, 0.0, 1.0]) if abs(height) < 0.999 else torch.tensor([0.0, 1.0, 0.0])
        right = torch.nn.functional.normalize(torch.linalg.cross(forward, up), dim=0)
        # The rows are the camera's axes in the world, so the matrix takes the world to the camera.
        rotation = torch.stack([right, torch.linalg.cross(forward, right), forward])
        # Half an image side over the tangent of half the field of view is the focal length.
        views.append(View(rotation, radius * position, 0.5 / math.tan(math.radians(fov) / 2)))
    return views


@torch.no_grad()
def render(asset: Gaussians, view: View, image_side: int) -> torch.Tensor:
    """Render an asset over a black background. Not differentiable.

    Args:
        asset: Gaussians.
        view: camera.
        image_side: S, pixels per side of the image.
    Returns: image [C, S, S] in the range of the colours.
    """
    means, conics, alphas, radii, depth_order = _on_screen(asset, view, image_side)
    colours = asset.colours[depth_order]
    # Bounding boxes on screen, [G, 2] each.
    box_min = means - radii[:, None]
    box_max = means + radii[:, None]
    image = means.new_zeros(colours.shape[1], image_side, image_side)
    for top in range(0, image_side, TILE):
        # Gaussians that overlap this row of tiles.
        row_indices = ((box_min[:, 1] < top + TILE) & (box_max[:, 1] > top)).nonzero()[:, 0]
        for left in range(0, image_side, TILE):
            # Gaussians that overlap this tile, still ordered by depth.
            tile_indices = row_indices[
                (box_min[row_indices, 0] < left + TILE) & (box_max[row_indices, 0] > left)
            ]
            if len(tile_indices):
                # Pixel centres are at + 0.5; tiles at the right and lower border may be smaller.
                y, x = (
                    torch.arange(start, min(start + TILE, image_side), device=means.device) + 0.5
                    for start in (top, left)
                )
                # cartesian_prod gives (y, x) row by row; flipped to (x, y), [P, 2].
                pixels = torch.cartesian_prod(y, x).flip(1)
                tile = _tile(
                    pixels,
                    means[tile_indices],
                    conics[tile_indices],
                    alphas[tile_indices],
                    colours[tile_indices],
                )
                image[:, top : top + TILE, left : left + TILE] = tile.T.unflatten(1, (len(y), len(x)))
    return image


def _on_screen(asset: Gaussians, view: View, image_side: int) -> tuple[torch.Tensor, ...]:
    """Project the Gaussians in front of the camera to the image.

    Args:
        asset: Gaussians.
        view: camera.
        image_side: S, pixels per side of the image.
    Returns: centres [G, 2] in pixels, inverse covariances [G, 3], opacities [G], radii [G] in pixels beyond
        which a Gaussian is cut off, and the indices [G] of the Gaussians from front to back. All are in this
        order, without the Gaussians that are nearer than NEAR.
    """
    camera_points = view.camera(asset.means.float())
    # One order for the whole image, by the depths of the centres (Kerbl et al. 2023).
    depth_order = camera_points[:, 2].argsort()
    depth_order = depth_order[camera_points[depth_order, 2] > NEAR]
    x, y, z = camera_points[depth_order].unbind(1)
    f = view.focal * image_side  # focal length in pixels
    zeros = torch.zeros_like(z)
    # Jacobian of the projection at the centre (Zwicker et al. 2001, EWA splatting): [G, 2, 3].
    jacobian = torch.stack([f / z, zeros, -f * x / z**2, zeros, f / z, -f * y / z**2], 1).view(-1, 2, 3)
    # Covariance = axes axes^T, with the rotated axes of a Gaussian scaled by its standard deviations.
    axes = (
        jacobian
        @ view.rotation.to(camera_points)
        @ _rotations(asset.rotations[depth_order].float())
        * asset.scales[depth_order, None].float()  # [G, 1, 3] scales the columns
    )
    covariance_before_blur = axes @ axes.mT  # on screen, [G, 2, 2]
    covariance = covariance_before_blur + BLUR * torch.eye(2, device=camera_points.device)
    determinant = covariance.det()
    a = covariance[:, 0, 0]
    b = covariance[:, 0, 1]
    d = covariance[:, 1, 1]
    # Inverse of the covariance [[a, b], [b, d]] as three numbers, and the covariance's largest eigenvalue.
    conics = torch.stack([d, -b, a], 1) / determinant[:, None]
    largest_eigenvalue = (a + d) / 2 + ((a - d).square() / 4 + b.square()).sqrt()
    # Square root of the ratio of the determinants: the ratio of the areas without and with the blur.
    alphas = (
        asset.opacities[depth_order].float()
        * (covariance_before_blur.det().clamp_min(0) / determinant).sqrt()
    )
    # In pixels; the optical axis meets the image in its centre, image_side / 2.
    means = torch.stack([f * x / z, f * y / z], 1) + image_side / 2
    return means, conics, alphas, REACH * largest_eigenvalue.sqrt(), depth_order


def _tile(
    pixels: torch.Tensor,
    means: torch.Tensor,
    conics: torch.Tensor,
    alphas: torch.Tensor,
    colours: torch.Tensor,
) -> torch.Tensor:
    """Blend Gaussians to the colours of the pixels of a tile.

    Args:
        pixels: centres of the pixels, [P, 2].
        means: centres of the Gaussians from front to back, [K, 2] in pixels.
        conics: inverse covariances [K, 3], the entries a, b, d of [[a, b], [b, d]].
        alphas: opacities [K].
        colours: colours [K, C].
    Returns: colours [P, C] of the pixels.
    """
    dx, dy = (pixels[:, None] - means).unbind(-1)  # [P, K] each
    a, b, d = conics.unbind(1)
    alpha = (alphas * torch.exp(-0.5 * (a * dx * dx + d * dy * dy) - b * dx * dy)).clamp_max(MAX_ALPHA)
    # Transmittance of the Gaussians in front (Kerbl et al. 2023, equation 3): the product over all Gaussians
    # before this one. It is the cumulative product, shifted by one.
    cumulative_product = torch.cumprod(1 - alpha, 1)
    transmittance = torch.cat([torch.ones_like(cumulative_product[:, :1]), cumulative_product[:, :-1]], 1)
    return (alpha * transmittance) @ colours


def _rotations(quaternions: torch.Tensor) -> torch.Tensor:
    """Convert quaternions [G, 4], real part first, to rotation matrices [G, 3, 3]."""
    # Optimised and quantised quaternions do not have length 1, which the formula needs.
    w, x, y, z = torch.nn.functional.normalize(quaternions, dim=1).unbind(1)
    matrix_entries = [
        1 - 2 * (y * y + z * z),
        2 * (x * y - w * z),
        2 * (x * z + w * y),
        2 * (x * y + w * z),
        1 - 2 * (x * x + z * z),
        2 * (y * z - w * x),
        2 * (x * z - w * y),
        2 * (y * z + w * x),
        1 - 2 * (x * x + y * y),
    ]
    return torch.stack(matrix_entries, 1).view(-1, 3, 3)
