"""Volume rendering of tri-planes with two passes along every ray, as in EG3D (Chan et al. 2022).

The coarse pass samples depths at stratified random positions. The fine pass samples depths by importance,
with the weights of the coarse pass. The samples of both passes are composited by the midpoint rule of
emission and absorption (Max 1995).

Shapes: N is the number of images in a batch, M of rays of an image, and B = N * M. A ray has S samples, which
are those of the coarse pass if there are two passes, and F fine samples. C is the number of channels of
planes or colours, D of decoder features, and P of points. A plane has H x W texels.
"""

from collections.abc import Sequence
from typing import Any

import torch

from torch_utils.ops import implementations
from torch_utils.ops.ray_march import importance_depths, interval_weights, ray_march
from torch_utils.ops.triplane_decode import (
    Blend,
    MergedPlanes,
    Pairs,
    merge_planes,
    projection_axes,
    sample_planes_channels_first,
    triplane_decode,
)
from training.rendering.cameras import ray_limits_box


class MipRayMarcher2(torch.nn.Module):
    """Module that composites the samples of a ray.

    Interval i lies between two neighbouring samples. Its colour c_i, raw density s_i and depth d_i are the
    means of the two samples, and delta_i is its length:

        sigma_i = softplus(s_i - 1)
        alpha_i = 1 - exp(-sigma_i delta_i)
        w_i = alpha_i prod_{j<i} (1 - alpha_j + 1e-10)

    There is no interval from the last sample to infinity.

    Args: symmetric: True: map the composited colours from 0..1 to -1..1, as in EG3D.
    """

    def __init__(self, symmetric: bool = True):
        super().__init__()
        self.symmetric = symmetric

    def forward(
        self, colors: torch.Tensor, densities: torch.Tensor, depths: torch.Tensor, rendering_options: dict
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Composite colour and depth along rays whose samples are sorted by depth.

        Args:
            colors: colours of the samples [N, M, S, C].
            densities: raw densities of the samples [N, M, S, 1].
            depths: depths of the samples [N, M, S, 1] in ascending order, world units.
            rendering_options: options 'clamp_mode' ('softplus' or missing) and 'white_back' (True: add the
                white background 1 - sum(w) to the colour).
        Returns:
            colour: sum(w c) * 2 - 1 if symmetric, else sum(w c), [N, M, C].
            depth: sum(w d) / sum(w), clamped to the smallest and largest depth of the *whole batch*,
                [N, M, 1]. In empty pixels a rendering therefore depends on its batch.
            weights: weights w of the intervals, [N, M, S-1, 1].
        """
        # [N, M, S-1, 1] each
        weights, depths_mid = (
            interval_values.unsqueeze(-1)
            for interval_values in interval_weights(densities.squeeze(-1), depths.squeeze(-1))
        )
        colors_mid = (colors[:, :, :-1] + colors[:, :, 1:]) / 2  # [N, M, S-1, C]
        rgb = (weights * colors_mid).sum(dim=-2)
        depth_range = (depths.min(), depths.max())
        rgb, depth = self.finish(
            rgb, (weights * depths_mid).sum(dim=-2), weights.sum(dim=2), depth_range, rendering_options
        )
        return rgb, depth, weights

    def accumulate(
        self, passes: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Composite the samples of several passes, which may be in any order.

        The result is the same as if all samples were sorted by depth first. The colours, which are the
        largest tensors, are neither sorted nor concatenated, so they are not copied.

        Args:
            passes: (colours [N, M, S, C], raw densities [N, M, S, 1], depths [N, M, S, 1]) of each pass. S
                may differ between passes.
        Returns: sum(w c) [N, M, C], sum(w d) [N, M, 1] and sum(w) [N, M, 1].
        """
        n, m = passes[0][0].shape[:2]
        # [N*M, samples of all passes]
        densities = torch.cat([pass_densities for _, pass_densities, _ in passes], dim=2).reshape(n * m, -1)
        depths = torch.cat([pass_depths for _, _, pass_depths in passes], dim=2).reshape(n * m, -1)
        # Weights of samples, in the order of the input. The weight of an interval is divided between its
        # two samples.
        sample_weights, depth_sum, weight_sum = ray_march(densities, depths)
        rgb: Any = 0
        first_sample = 0
        for colors, _, _ in passes:
            sample_count = colors.shape[2]
            # [N*M, C]
            rgb = rgb + _WeightedSum.apply(
                sample_weights[:, first_sample : first_sample + sample_count],
                colors.reshape(n * m, sample_count, -1),
            )
            first_sample += sample_count
        return rgb.reshape(n, m, -1), depth_sum.reshape(n, m, 1), weight_sum.reshape(n, m, 1)

    def finish(
        self,
        rgb: torch.Tensor,
        depth_sum: torch.Tensor,
        weight_sum: torch.Tensor,
        depth_range: tuple[torch.Tensor, torch.Tensor],
        rendering_options: dict,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute colour [N, M, C] and depth [N, M, 1] from the sums of `accumulate`. See `forward`.

        Args:
            rgb: sum(w c) [N, M, C].
            depth_sum: sum(w d) [N, M, 1].
            weight_sum: sum(w) [N, M, 1].
            depth_range: smallest and largest depth of all samples of the batch, two tensors [].
            rendering_options: see `forward`.
        Raises: ValueError for another clamp_mode than 'softplus'.
        """
        if rendering_options.get("clamp_mode", "softplus") != "softplus":
            raise ValueError(
                "rendering option clamp_mode: expected 'softplus', the only implemented mode, got"
                f" {rendering_options['clamp_mode']!r}. Use a network with 'softplus'."
            )
        # If all weights of a ray are 0, the quotient 0 / 0 would make the gradient NaN, although `where`
        # discards the quotient. Therefore the divisor is replaced, too.
        has_weight = weight_sum > 0
        depth = torch.where(has_weight, depth_sum / torch.where(has_weight, weight_sum, 1), float("inf"))
        if rendering_options.get("white_back", False):
            rgb = rgb + 1 - weight_sum  # the remaining light comes from a white background
        rgb = rgb * 2 - 1 if self.symmetric else rgb
        return rgb, torch.clamp(depth, *depth_range)


class _WeightedSum(torch.autograd.Function):
    """Weighted sum of colours: sum_s v_s c_s for weights v [B, S] and colours c [B, S, C].

    The forward pass is torch's batched matrix product. For the gradient of c, torch would compute a matrix
    product with an inner size of 1. This class multiplies elementwise instead, which is faster.
    """

    @staticmethod
    def forward(ctx, weights, colors):
        ctx.save_for_backward(weights, colors)
        return torch.bmm(weights.unsqueeze(1), colors).squeeze(1)

    @staticmethod
    def backward(ctx, grad):
        weights, colors = ctx.saved_tensors
        grad_weights = (
            torch.bmm(grad.unsqueeze(1), colors.transpose(1, 2)).squeeze(1)
            if ctx.needs_input_grad[0]
            else None
        )
        # [B, S, 1] * [B, 1, C] -> [B, S, C]
        grad_colors = weights.unsqueeze(2) * grad.unsqueeze(1) if ctx.needs_input_grad[1] else None
        return grad_weights, grad_colors


def sample_stratified(
    origins: torch.Tensor,
    ray_start: float | torch.Tensor,
    ray_end: float | torch.Tensor,
    stratum_count: int,
    disparity: bool = False,
) -> torch.Tensor:
    """Sample one random depth in each of S strata of a ray.

    The depths are linspace(start, end, S) + U[0, 1) (end - start) / (S - 1). The last depth can exceed the
    end of the ray, as in EG3D. The function draws from torch's global generator once.

    Args:
        origins: origins of the rays [N, M, 3], of which only the number and the device are used.
        ray_start, ray_end: smallest and largest depth in world units, numbers or tensors [N, M, 1].
        stratum_count: number of strata S, >= 2.
        disparity: True: the strata have equal size in 1/depth instead of depth.
    Returns: depths [N, M, S, 1] in ascending order.
    """
    n, m, _ = origins.shape
    fractions = torch.linspace(0, 1, stratum_count, device=origins.device)
    if disparity:
        disparity_fractions = fractions.reshape(1, 1, stratum_count, 1).repeat(n, m, 1, 1)
        disparity_fractions = disparity_fractions + torch.rand_like(disparity_fractions) * (
            1 / (stratum_count - 1)
        )
        return 1 / (1 / ray_start * (1 - disparity_fractions) + 1 / ray_end * disparity_fractions)
    # Each ray has its own limits, from the option "auto": [N, M, 1] -> [N, M, S, 1].
    if isinstance(ray_start, torch.Tensor):
        ray_lengths = ray_end - ray_start  # [N, M, 1]
        depths = (
            ray_start[:, :, None] + fractions.reshape(1, 1, stratum_count, 1) * ray_lengths[:, :, None]
        ).contiguous()
        return depths + torch.rand_like(depths) * (ray_lengths / (stratum_count - 1))[:, :, None]
    depths = (
        torch.linspace(ray_start, ray_end, stratum_count, device=origins.device)
        .reshape(1, 1, stratum_count, 1)
        .repeat(n, m, 1, 1)
    )
    return depths + torch.rand_like(depths) * ((ray_end - ray_start) / (stratum_count - 1))


def uniform_draws(rays: torch.Tensor, fine_count: int, stratified: bool = False) -> torch.Tensor:
    """Draw the random numbers of the importance pass, from torch's global generator.

    Args:
        rays: any tensor [B, ...] with the number of rays and the device.
        fine_count: number of fine samples F.
        stratified: True: draw one number in each of F equal parts of [0, 1). This halves the noise of renders
            with few samples. Published networks were trained without it.
    Returns: numbers [B, F] in [0, 1).
    """
    random_numbers = torch.rand(len(rays), fine_count, device=rays.device)
    return (
        (random_numbers + torch.arange(fine_count, device=rays.device)) / fine_count
        if stratified
        else random_numbers
    )


# Rendering option for the argument `stratified` of `uniform_draws`. A network without this option has False.
STRATIFIED = "importance_stratified"
# Number of samples of a pass that are decoded in one call on a CPU if no gradient is needed. With 32 colour
# channels they take 8 MB.
_CPU_SAMPLES = 1 << 16

_AXES = {
    # For each plane: the world axes along its width and its height, and the third axis. "eg3d" is
    # (x,y), (x,z), (z,x), as in the released checkpoints; its third plane has the axes of the second in
    # reverse order.
    "eg3d": ("xyz", "xzy", "zxy"),
    "fixed": ("xyz", "xzy", "zyx"),  # (x,y), (x,z), (z,y): three different planes
    "panohead": ("xyz", "xzy", "yzx"),  # (x,y), (x,z), (y,z): PanoHead and the models derived from it
}


def generate_planes(layout: str = "eg3d") -> torch.Tensor:
    """Return the axes of the three planes of a layout.

    Args: layout: 'eg3d' (released checkpoints of EG3D), 'fixed' (three different planes, EG3D issue #67)
        or 'panohead'.
    Returns: matrices [3, 3, 3]. The rows of matrix k are the directions of width, height and depth of plane
        k.
    Raises: ValueError for another layout.
    """
    if layout not in _AXES:
        raise ValueError(
            f"plane_layout: expected one of {', '.join(_AXES)}, got {layout!r}. Use 'eg3d' for released"
            " checkpoints of EG3D."
        )
    identity = torch.eye(3)
    # Rows of the identity matrix in the order of the axes, for each plane.
    return torch.stack([identity[["xyz".index(axis) for axis in axes]] for axes in _AXES[layout]])


# Numbers of slices of the xy plane that a network may have. With two, one half of the plane's channels counts
# in front and the other half at the back.
PLANE_SLICES = (1, 2)
# z coordinates in world units between which the two slices are blended linearly. The face of a head that
# faces +z lies in front of them, and the back of its skull behind them.
SLICE_BLEND = (-0.10, 0.05)


def slice_blend(plane_slices: int) -> Blend | None:
    """Return the z coordinates between which the slices of the xy plane are blended; None for a single slice.

    Args: plane_slices: number of slices of the xy plane.
    Raises: ValueError for another number of slices than 1 or 2.
    """
    if plane_slices not in PLANE_SLICES:
        raise ValueError(
            f"plane_slices: expected 1 or 2, got {plane_slices!r}. Use 1 for released checkpoints of EG3D."
        )
    return SLICE_BLEND if plane_slices == 2 else None


class ImportanceRenderer(torch.nn.Module):
    """Renderer with a coarse stratified pass and a fine importance pass.

    The samples of the two passes are composited together.

    Args:
        plane_layout: layout of the planes, see `generate_planes`.
        plane_slices: number of slices of the xy plane, 1 or 2.
    """

    def __init__(self, plane_layout: str = "eg3d", plane_slices: int = 1):
        super().__init__()
        self.ray_marcher = MipRayMarcher2()
        # An ordinary attribute, not a buffer, because EG3D's state dict does not contain it.
        self.plane_axes = generate_planes(plane_layout)
        # z coordinates between the slices of the xy plane, in world units; None: the plane has no slices.
        self.blend = slice_blend(plane_slices)
        # Cache of `merge`: the axes, torch's version counter of this tensor, and the result for these axes.
        self._cached_pairs: tuple[torch.Tensor | None, int, Pairs | None] = (None, 0, None)

    def forward(
        self,
        planes: torch.Tensor,
        decoder: torch.nn.Module,
        ray_origins: torch.Tensor,
        ray_directions: torch.Tensor,
        rendering_options: dict,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Render features, depth and opacity along rays.

        Args:
            planes: planes [N, 3, C, H, W].
            decoder: decoder of plane features, see `run_model`.
            ray_origins: origins of the rays [N, M, 3], world units.
            ray_directions: unit directions of the rays [N, M, 3].
            rendering_options: EG3D's rendering_kwargs.
        Returns: features [N, M, D] in [-1, 1], of which the first three are RGB; depth [N, M, 1] in world
            units; opacity [N, M, 1] in 0..1.
        """
        options = rendering_options
        ray_start, ray_end = self._ray_limits(ray_origins, ray_directions, options)
        is_disparity = options.get("disparity_space_sampling", False)
        # [N, M, S, 1]
        depths = sample_stratified(ray_origins, ray_start, ray_end, options["depth_resolution"], is_disparity)
        # The ray marcher of another family may need sorted samples.
        is_sorted = implementations.current() == "ref" or type(self.ray_marcher) is not MipRayMarcher2
        render = self._render_sorted if is_sorted else self._render_unsorted
        return render(planes, decoder, ray_origins, ray_directions, depths, options)

    def _render_sorted(
        self, planes, decoder, origins, directions, depths, options
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Render with the samples of both passes sorted by depth, as in EG3D. This is the reference path.

        Arguments and results are those of `forward`, with the depths [N, M, S, 1] of the coarse pass as a
        further argument.
        """
        colors, densities = self._query(planes, decoder, origins, directions, depths, options)
        fine_count = options.get("depth_resolution_importance", 0)
        if fine_count > 0:
            depths_of_rays = depths.flatten(0, 1).squeeze(2)  # [N*M, S]
            random_numbers = uniform_draws(depths_of_rays, fine_count, options.get(STRATIFIED, False))
            fine_depths = importance_depths(
                densities.reshape(depths_of_rays.shape), depths_of_rays, random_numbers, impl="ref"
            ).reshape(*depths.shape[:2], fine_count, 1)
            fine_colors, fine_densities = self._query(
                planes, decoder, origins, directions, fine_depths, options
            )
            # Samples of both passes in the order of their depths: [N, M, S + F, 1].
            depths, depth_order = torch.cat([depths, fine_depths], dim=-2).sort(dim=-2)
            colors = torch.cat([colors, fine_colors], dim=-2)
            colors = colors.gather(-2, depth_order.expand(-1, -1, -1, colors.shape[-1]))
            densities = torch.cat([densities, fine_densities], dim=-2).gather(-2, depth_order)
        rgb, depth, interval_weights_of_rays = self.ray_marcher(colors, densities, depths, options)
        return rgb, depth, interval_weights_of_rays.sum(dim=2)

    def _render_unsorted(
        self, planes, decoder, origins, directions, depths, options
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Compute the same result as `_render_sorted`, but faster.

        Only densities and depths are sorted. Colours, which are larger, are not moved in memory.
        """
        n, m, s, _ = depths.shape
        merged = self.merge(planes)
        fine_count = options.get("depth_resolution_importance", 0)
        has_density_noise = options.get("density_noise", 0) > 0
        is_stratified = options.get(STRATIFIED, False)
        # The random numbers of all rays are drawn at once, before the rays are divided into chunks, so the
        # result does not depend on the chunk size. With density noise, the noise of the coarse pass has to be
        # drawn first, as in the reference path. There is only one chunk then, and its numbers are drawn in
        # the loop below.
        all_random_numbers = None
        if not has_density_noise and fine_count > 0:
            all_random_numbers = uniform_draws(depths.flatten(0, 1), fine_count, is_stratified).reshape(
                n, m, fine_count
            )
        # Number of rays of each image that are rendered together. On a CPU, chunks are so small that their
        # colours remain in the processor's cache. If a graph is recorded, chunks would save no memory.
        chunk_ray_count = m
        is_graph_recorded = torch.is_grad_enabled() and any(
            tensor.requires_grad for tensor in (planes, origins, directions, *decoder.parameters())
        )
        if depths.device.type == "cpu" and not has_density_noise and not is_graph_recorded:
            chunk_ray_count = max(1, min(m, _CPU_SAMPLES // (n * s)))
        sums_of_chunks = []
        smallest_depths = []
        largest_depths = []
        for first_ray in range(0, m, chunk_ray_count):
            ray_slice = slice(first_ray, first_ray + chunk_ray_count)
            chunk_rays = (origins[:, ray_slice], directions[:, ray_slice])
            coarse_depths = depths[:, ray_slice]
            colors, densities = self._query(planes, decoder, *chunk_rays, coarse_depths, options, merged)
            passes = [(colors, densities, coarse_depths)]
            if fine_count > 0:
                depths_of_rays = coarse_depths.flatten(0, 1).squeeze(2)  # [N*rays, S]
                densities_of_rays = densities.flatten(0, 1).squeeze(2)  # [N*rays, S]
                if all_random_numbers is None:
                    chunk_random_numbers = uniform_draws(depths_of_rays, fine_count, is_stratified)
                else:
                    chunk_random_numbers = all_random_numbers[:, ray_slice].flatten(0, 1)
                fine_depths = importance_depths(densities_of_rays, depths_of_rays, chunk_random_numbers)
                fine_depths = fine_depths.reshape(n, -1, fine_count, 1)
                fine_colors, fine_densities = self._query(
                    planes, decoder, *chunk_rays, fine_depths, options, merged
                )
                passes.append((fine_colors, fine_densities, fine_depths))
            sums_of_chunks.append(self.ray_marcher.accumulate(passes))
            for _, _, pass_depths in passes:
                smallest_depths.append(pass_depths.amin())
                largest_depths.append(pass_depths.amax())
        # Depths are clamped to the range of the whole batch, see `MipRayMarcher2.forward`.
        depth_range = (torch.stack(smallest_depths).amin(), torch.stack(largest_depths).amax())
        # One sum per chunk [N, rays, ...] -> all rays [N, M, ...], for each of the three sums.
        rgb, depth_sum, weight_sum = (
            torch.cat(chunk_sums, dim=1) for chunk_sums in zip(*sums_of_chunks, strict=True)
        )
        rgb, depth = self.ray_marcher.finish(rgb, depth_sum, weight_sum, depth_range, options)
        return rgb, depth, weight_sum

    @staticmethod
    def _ray_limits(origins: torch.Tensor, directions: torch.Tensor, options: dict) -> tuple:
        """Return the smallest and largest depth of samples on rays.

        The depths are the numbers of the options ray_start and ray_end. If both options are "auto", they are
        tensors [N, M, 1] with the depths at which each ray enters and leaves the box.
        """
        if options["ray_start"] != "auto" or options["ray_end"] != "auto":
            return options["ray_start"], options["ray_end"]
        near_distance, far_distance = ray_limits_box(origins, directions, options["box_warp"])
        is_hit = far_distance > near_distance
        if is_hit.any():
            # Rays that miss the box need a range, too. As in EG3D, both ends of it come from the *near*
            # depths of the rays that hit the box. If no ray hits it, all rays keep the values -1 and -2.
            smallest_near = near_distance[is_hit].min()
            largest_near = near_distance[is_hit].max()
            near_distance = torch.where(is_hit, near_distance, smallest_near)
            far_distance = torch.where(is_hit, far_distance, largest_near)
        return near_distance, far_distance

    def _query(
        self, planes, decoder, origins, directions, depths, options, merged=None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Decode the samples at depths [N, M, S, 1] along rays.

        Returns: colours [N, M, S, D] and raw densities [N, M, S, 1].
        """
        n, m, s, _ = depths.shape
        # The points of all rays on one axis: [N, M, S, 3] -> [N, M * S, 3].
        coordinates = (origins.unsqueeze(-2) + depths * directions.unsqueeze(-2)).reshape(n, m * s, 3)
        decoder_outputs = self.run_model(planes, decoder, coordinates, None, options, merged=merged)
        return decoder_outputs["rgb"].reshape(n, m, s, -1), decoder_outputs["sigma"].reshape(n, m, s, 1)

    def run_model(
        self,
        planes,
        decoder,
        sample_coordinates,
        sample_directions,
        options,
        *,
        sigma_only: bool = False,
        merged: MergedPlanes | None = None,
    ) -> dict[str, torch.Tensor]:
        """Decode colour and density at points.

        Args:
            planes: planes [N, 3, C, H, W].
            decoder: module with a method `weights` like `training.triplane.OSGDecoder`. A module with only a
                method `decode` is slower.
            sample_coordinates: points [N, P, 3], world units.
            sample_directions: ignored, because colours do not depend on the viewing direction.
            options: rendering options 'box_warp' (edge of the cube in world units) and 'density_noise'
                (standard deviation of normal noise on the density, 0 by default).
            sigma_only: True: decode only the density.
            merged: result of `merge` for these planes, which several calls can share; None: compute it
                if needed.
        Returns: a dict with the colour features 'rgb' [N, P, D] and the raw density 'sigma' [N, P, 1]. With
            sigma_only, it contains only 'sigma'.
        """
        del sample_directions
        decoder_outputs = self._decode_at(
            planes, decoder, sample_coordinates, options["box_warp"], sigma_only, merged
        )
        if sigma_only:
            decoder_outputs = {"sigma": decoder_outputs["sigma"]}
        if options.get("density_noise", 0) > 0:
            decoder_outputs["sigma"] = (
                decoder_outputs["sigma"]
                + torch.randn_like(decoder_outputs["sigma"]) * options["density_noise"]
            )
        return decoder_outputs

    def _decode_at(
        self, planes, decoder, points, box_warp, sigma_only: bool, merged: MergedPlanes | None
    ) -> dict[str, torch.Tensor]:
        """Decode colour and density at points, without density noise. See `run_model` for the arguments.

        Renderers of other families of generators override this method.
        """
        # Direct computation, for the reference implementation and for decoders that are no
        # two-layer perceptron.
        if implementations.current() == "ref" or not hasattr(decoder, "weights"):
            features = sample_planes_channels_first(self.plane_axes, planes, points, box_warp, self.blend)
            # [N, 3, C, P] -> [N, C, P] -> [N, P, C]
            return decoder.decode(features.mean(dim=1).transpose(1, 2))
        decoder_weights = decoder.weights(planes.dtype)
        decoder_weights = decoder_weights.density_only() if sigma_only else decoder_weights
        merged = self.merge(planes) if merged is None else merged
        rgb, sigma = triplane_decode(
            planes,
            self.plane_axes,
            points.to(planes),
            box_warp,
            decoder_weights,
            merged=merged,
            blend=self.blend,
        )
        return {"rgb": rgb, "sigma": sigma}

    def merge(self, planes: torch.Tensor) -> MergedPlanes | None:
        """Convert planes [N, 3, C, H, W] to the memory layout of `triplane_decode`.

        Returns: the converted planes, or None if the planes are not axis-aligned.
        """
        cached_axes, cached_version, axis_pairs = self._cached_pairs
        # The pairs are computed again only if the tensor of axes was replaced or changed in place
        # (`_version`), because on a GPU the computation waits for the device.
        if cached_axes is not self.plane_axes or cached_version != self.plane_axes._version:
            axis_pairs = projection_axes(self.plane_axes)
            self._cached_pairs = (self.plane_axes, self.plane_axes._version, axis_pairs)
        return None if axis_pairs is None else merge_planes(planes, axis_pairs)
