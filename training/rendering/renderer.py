"""Volume rendering of tri-planes with two passes along every ray.

Shapes: N batch, M rays, S samples, C plane channels, P points, H x W plane size.
"""

import torch

from training.rendering.importance import sample_importance, sample_stratified
from training.rendering.marcher import MipRayMarcher2, march_weights
from training.rendering.rays import ray_limits_box

_AXES = {
    # rows are the new basis: row 0 gives the plane's width coordinate, row 1 its height coordinate
    "eg3d": ("xyz", "xzy", "zxy"),  # (x,y), (x,z), (z,x): the released checkpoints; the third repeats the second, transposed
    "fixed": ("xyz", "xzy", "zyx"),  # (x,y), (x,z), (z,y): three different planes
}


def generate_planes(layout: str = "eg3d") -> torch.Tensor:
    """Axes of the three planes.

    Args:
        layout: 'eg3d' (released checkpoints) or 'fixed' (EG3D issue #67).
    Returns: [3, 3, 3], plane k's basis in its rows.
    Raises: ValueError for another layout.
    """
    if layout not in _AXES:
        raise ValueError(f"plane_layout: expected one of {', '.join(_AXES)}, got {layout!r}.")
    eye = torch.eye(3)
    return torch.stack([eye[["xyz".index(a) for a in axes]] for axes in _AXES[layout]])


def project_onto_planes(planes: torch.Tensor, coordinates: torch.Tensor) -> torch.Tensor:
    """(width, height) coordinates of points on every plane: the first two components of coordinates @ inverse(plane).

    Args:
        planes: [K, 3, 3]; coordinates: [N, P, 3].
    Returns: [N*K, P, 2], plane index fastest.
    """
    n, p, _ = coordinates.shape
    inverse = torch.linalg.inv(planes.to(coordinates))  # [K, 3, 3]
    projected = coordinates.unsqueeze(1) @ inverse.unsqueeze(0)  # [N, K, P, 3]
    return projected[..., :2].reshape(n * planes.shape[0], p, 2)


def sample_planes_channels_first(
    plane_axes: torch.Tensor, plane_features: torch.Tensor, coordinates: torch.Tensor, box_warp: float
) -> torch.Tensor:
    """Bilinear plane features at points, zero outside the box.

    Args:
        plane_axes: [3, 3, 3]; plane_features: [N, 3, C, H, W]; coordinates: [N, P, 3] world units; box_warp: side of the box.
    Returns: [N, 3, C, P]. Differentiable in plane_features and coordinates.
    """
    n, k, c, h, w = plane_features.shape
    grid = project_onto_planes(plane_axes, (2 / box_warp) * coordinates).unsqueeze(1)  # [N*3, 1, P, 2]
    features = torch.nn.functional.grid_sample(
        plane_features.reshape(n * k, c, h, w), grid.to(plane_features), mode="bilinear", padding_mode="zeros", align_corners=False
    )
    return features.reshape(n, k, c, -1)


def sample_from_planes(
    plane_axes: torch.Tensor, plane_features: torch.Tensor, coordinates: torch.Tensor, box_warp: float = 1.0
) -> torch.Tensor:
    """As `sample_planes_channels_first`, in the order that decoders take: [N, 3, P, C]."""
    return sample_planes_channels_first(plane_axes, plane_features, coordinates, box_warp).transpose(2, 3)


class ImportanceRenderer(torch.nn.Module):
    """Stratified pass, importance pass, and a march over their union."""

    def __init__(self, plane_layout: str = "eg3d"):
        super().__init__()
        self.ray_marcher = MipRayMarcher2()
        self.plane_axes = generate_planes(plane_layout)  # a plain tensor: not in the state dict, as EG3D has it

    def forward(
        self,
        planes: torch.Tensor,
        decoder: torch.nn.Module,
        ray_origins: torch.Tensor,
        ray_directions: torch.Tensor,
        rendering_options: dict,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Render.

        Args:
            planes: [N, 3, C, H, W]; ray_origins, ray_directions: [N, M, 3].
            rendering_options: EG3D's rendering_kwargs.
        Returns: features [N, M, D] (RGB first, in [-1, 1]), depth [N, M, 1], opacity [N, M, 1].
        """
        options = rendering_options
        start, end = self._ray_limits(ray_origins, ray_directions, options)
        disparity = options.get("disparity_space_sampling", False)
        depths = sample_stratified(ray_origins, start, end, options["depth_resolution"], disparity)  # [N, M, S, 1]
        colors, densities = self._query(planes, decoder, ray_origins, ray_directions, depths, options)
        fine_count = options.get("depth_resolution_importance", 0)
        if fine_count > 0:
            with torch.no_grad():
                weights, _ = march_weights(densities, depths)
            fine = sample_importance(depths, weights, fine_count)
            fine_colors, fine_densities = self._query(planes, decoder, ray_origins, ray_directions, fine, options)
            depths, order = torch.cat([depths, fine], dim=-2).sort(dim=-2)
            colors = torch.cat([colors, fine_colors], dim=-2)
            colors = colors.gather(-2, order.expand(-1, -1, -1, colors.shape[-1]))
            densities = torch.cat([densities, fine_densities], dim=-2).gather(-2, order)
        rgb, depth, weights = self.ray_marcher(colors, densities, depths, options)
        return rgb, depth, weights.sum(dim=2)

    @staticmethod
    def _ray_limits(origins: torch.Tensor, directions: torch.Tensor, options: dict) -> tuple:
        if options["ray_start"] != "auto" or options["ray_end"] != "auto":
            return options["ray_start"], options["ray_end"]
        near, far = ray_limits_box(origins, directions, options["box_warp"])
        valid = far > near
        if valid.any():  # rays that miss the box: EG3D gives them the range of the *starts* of those that hit
            near, far = torch.where(valid, near, near[valid].min()), torch.where(valid, far, near[valid].max())
        return near, far

    def _query(self, planes, decoder, origins, directions, depths, options) -> tuple[torch.Tensor, torch.Tensor]:
        n, m, s, _ = depths.shape
        coordinates = (origins.unsqueeze(-2) + depths * directions.unsqueeze(-2)).reshape(n, m * s, 3)
        out = self.run_model(planes, decoder, coordinates, None, options)
        return out["rgb"].reshape(n, m, s, -1), out["sigma"].reshape(n, m, s, 1)

    def run_model(self, planes, decoder, sample_coordinates, sample_directions, options) -> dict[str, torch.Tensor]:
        """Decode points [N, P, 3] to {'rgb': [N, P, D], 'sigma': [N, P, 1] raw}; directions are not used (no view dependence)."""
        del sample_directions
        features = sample_planes_channels_first(self.plane_axes, planes, sample_coordinates, options["box_warp"])
        out = decoder.decode(features.mean(dim=1).transpose(1, 2))
        if options.get("density_noise", 0) > 0:
            out["sigma"] = out["sigma"] + torch.randn_like(out["sigma"]) * options["density_noise"]
        return out
