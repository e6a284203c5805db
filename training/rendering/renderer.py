"""Volume rendering of tri-planes with two passes along every ray.

The coarse pass samples depths at stratified random positions. The fine pass samples them by importance, from
the weights of the coarse pass. The samples of both are composited by the midpoint rule of emission and
absorption (Max 1995), as in EG3D.

Shapes: N batch, M rays, S samples along a ray (of the coarse pass where there are two), F fine samples, C
plane or colour channels, D decoder features, P points, H x W plane size, B = N*M.
"""

from collections.abc import Sequence
from typing import Any

import torch

from torch_utils.ops import implementations
from torch_utils.ops.ray_march import importance_depths, interval_weights, ray_march
from torch_utils.ops.triplane_decode import (
    MergedPlanes,
    Pairs,
    merge_planes,
    projection_axes,
    sample_planes_channels_first,
    triplane_decode,
)
from training.rendering.cameras import ray_limits_box


class MipRayMarcher2(torch.nn.Module):
    """Compositing of samples that are sorted by depth.

    With midpoint colour c_i, raw density s_i and depth d_i of neighbouring samples, and interval length
    delta_i:

        sigma_i = softplus(s_i - 1)
        alpha_i = 1 - exp(-sigma_i delta_i)
        w_i = alpha_i prod_{j<i} (1 - alpha_j + 1e-10)

    There is no interval from the last sample to infinity. With `symmetric`, colours are mapped from 0..1 to
    -1..1 at the end, as in EG3D.
    """

    def __init__(self, symmetric: bool = True):
        super().__init__()
        self.symmetric = symmetric

    def forward(
        self, colors: torch.Tensor, densities: torch.Tensor, depths: torch.Tensor, rendering_options: dict
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Composite colour and depth along rays.

        Args:
            colors: [N, M, S, C].
            densities: [N, M, S, 1], raw.
            depths: [N, M, S, 1], ascending.
            rendering_options: 'clamp_mode' must be 'softplus'. 'white_back' adds 1 - sum(w) to the colour.
        Returns:
            colour [N, M, C]: sum(w c) * 2 - 1, or sum(w c) if not symmetric.
            depth [N, M, 1]: sum(w d) / sum(w), clamped to the smallest and largest depth of the *whole
                batch*. In empty pixels a rendering therefore depends on its batch.
            weights [N, M, S-1, 1].
        """
        weights, depths_mid = (
            x.unsqueeze(-1) for x in interval_weights(densities.squeeze(-1), depths.squeeze(-1))
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
        """Composite the union of passes whose samples are in any order.

        The result is that of sorting all samples. Colours are neither sorted nor concatenated, which would
        copy the largest tensors.

        Args:
            passes: (colors [N, M, S, C], densities [N, M, S, 1] raw, depths [N, M, S, 1]) of each pass; S may
                differ between passes.
        Returns: sum(w c) [N, M, C], sum(w d) [N, M, 1], sum(w) [N, M, 1].
        """
        n, m = passes[0][0].shape[:2]
        # [N*M, S of all passes together]
        densities, depths = (
            torch.cat([part[i] for part in passes], dim=2).reshape(n * m, -1) for i in (1, 2)
        )
        # Sample weights v in the order of the input, half of each of the two intervals that meet at a sample.
        weights, depth_sum, total = ray_march(densities, depths)
        rgb: Any = 0
        start = 0
        for colors, _, _ in passes:
            count = colors.shape[2]
            # [N*M, C]
            rgb = rgb + _WeightedSum.apply(
                weights[:, start : start + count], colors.reshape(n * m, count, -1)
            )
            start += count
        return rgb.reshape(n, m, -1), depth_sum.reshape(n, m, 1), total.reshape(n, m, 1)

    def finish(
        self,
        rgb: torch.Tensor,
        depth_sum: torch.Tensor,
        total: torch.Tensor,
        depth_range: tuple[torch.Tensor, torch.Tensor],
        rendering_options: dict,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return colour [N, M, C] and depth [N, M, 1] as `forward` does, from the sums of `accumulate`.

        Args:
            rgb, depth_sum, total: sum(w c), sum(w d) and sum(w).
            depth_range: smallest and largest depth [] of all samples of the batch.
        """
        if rendering_options.get("clamp_mode", "softplus") != "softplus":
            raise ValueError(
                f"rendering option clamp_mode: expected 'softplus', got {rendering_options['clamp_mode']!r}."
                " No other mode is implemented. Use a network with 'softplus'."
            )
        # Where all weights are 0, the quotient 0 / 0 would make the gradient NaN even though `where` discards
        # it. Therefore the divisor is replaced as well.
        seen = total > 0
        depth = torch.where(seen, depth_sum / torch.where(seen, total, 1), float("inf"))
        if rendering_options.get("white_back", False):
            rgb = rgb + 1 - total  # the rest of the light comes from a white background
        return rgb * 2 - 1 if self.symmetric else rgb, torch.clamp(depth, *depth_range)


class _WeightedSum(torch.autograd.Function):
    """sum_s v_s c_s of weights v [B, S] and colours c [B, S, C].

    The forward pass is torch's matrix product. The gradient for c would be a product with an inner size of 1;
    here it is an elementwise multiplication, which is faster.
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
        return grad_weights, weights.unsqueeze(2) * grad.unsqueeze(1) if ctx.needs_input_grad[1] else None


def sample_stratified(
    origins: torch.Tensor,
    ray_start: float | torch.Tensor,
    ray_end: float | torch.Tensor,
    count: int,
    disparity: bool = False,
) -> torch.Tensor:
    """Return jittered depths, one in each of S strata.

    depth = linspace(start, end, S) + U[0, 1) (end - start) / (S - 1). The last sample can exceed ray_end, as
    in EG3D.

    Args:
        origins: [N, M, 3], for shape and device.
        ray_start, ray_end: world units, numbers or [N, M, 1].
        count: S.
        disparity: space the strata evenly in 1/depth instead.
    Returns: depths [N, M, S, 1], ascending. Uses torch's global generator once.
    """
    n, m, _ = origins.shape
    steps = torch.linspace(0, 1, count, device=origins.device)
    if disparity:
        t = steps.reshape(1, 1, count, 1).repeat(n, m, 1, 1)
        t = t + torch.rand_like(t) * (1 / (count - 1))
        return 1 / (1 / ray_start * (1 - t) + 1 / ray_end * t)
    # Limits per ray, from "auto": [N, M, 1] -> [N, M, S, 1].
    if isinstance(ray_start, torch.Tensor):
        span = ray_end - ray_start  # [N, M, 1]
        depths = (ray_start[:, :, None] + steps.reshape(1, 1, count, 1) * span[:, :, None]).contiguous()
        return depths + torch.rand_like(depths) * (span / (count - 1))[:, :, None]
    depths = (
        torch.linspace(ray_start, ray_end, count, device=origins.device)
        .reshape(1, 1, count, 1)
        .repeat(n, m, 1, 1)
    )
    return depths + torch.rand_like(depths) * ((ray_end - ray_start) / (count - 1))


def uniform_draws(rays: torch.Tensor, count: int, stratified: bool = False) -> torch.Tensor:
    """Return the random numbers of the importance pass, [B, F] in [0, 1), from torch's global generator.

    Args:
        rays: [B, ...], for the number of rays and the device.
        count: F.
        stratified: draw one number in each of F equal parts. This halves the speckle of small sample counts.
            Published networks were trained without it.
    """
    draws = torch.rand(len(rays), count, device=rays.device)
    return (draws + torch.arange(count, device=rays.device)) / count if stratified else draws


STRATIFIED = "importance_stratified"  # rendering option, False where it is missing: see `uniform_draws`
# Samples of one pass that are decoded together on a CPU if
# no gradient is needed. With 32 colours they take 8 MB.
_CPU_SAMPLES = 1 << 16

_AXES = {
    # The rows of a plane's basis: row 0 gives the plane's width coordinate,
    # row 1 its height coordinate. "eg3d" is (x,y), (x,z), (z,x), as in the
    # released checkpoints: the third plane repeats the second, transposed.
    "eg3d": ("xyz", "xzy", "zxy"),
    "fixed": ("xyz", "xzy", "zyx"),  # (x,y), (x,z), (z,y): three different planes
    "panohead": ("xyz", "xzy", "yzx"),  # (x,y), (x,z), (y,z): PanoHead and the models derived from it
}


def generate_planes(layout: str = "eg3d") -> torch.Tensor:
    """Return the axes of the three planes.

    Args:
        layout: 'eg3d' (released checkpoints), 'fixed' (EG3D issue #67) or 'panohead'.
    Returns: [3, 3, 3]; the rows of matrix k are the basis of plane k.
    Raises: ValueError for another layout.
    """
    if layout not in _AXES:
        raise ValueError(
            f"plane_layout: expected one of {', '.join(_AXES)}, got {layout!r}. Choose one of them."
        )
    eye = torch.eye(3)
    return torch.stack([eye[["xyz".index(a) for a in axes]] for axes in _AXES[layout]])


class ImportanceRenderer(torch.nn.Module):
    """Renderer of a stratified pass, an importance pass, and a march over their union."""

    def __init__(self, plane_layout: str = "eg3d"):
        super().__init__()
        self.ray_marcher = MipRayMarcher2()
        # An ordinary attribute, not a buffer: EG3D's state dict does not contain it.
        self.plane_axes = generate_planes(plane_layout)
        # Axes for which `merge` last looked for axis-aligned projections, their version, and the result.
        self._known_axes: tuple[torch.Tensor | None, int, Pairs | None] = (None, 0, None)

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
            planes: [N, 3, C, H, W].
            decoder: see `run_model`.
            ray_origins, ray_directions: [N, M, 3].
            rendering_options: EG3D's rendering_kwargs.
        Returns: features [N, M, D] (RGB first, in [-1, 1]), depth [N, M, 1], opacity [N, M, 1].
        """
        options = rendering_options
        start, end = self._ray_limits(ray_origins, ray_directions, options)
        disparity = options.get("disparity_space_sampling", False)
        # [N, M, S, 1]
        depths = sample_stratified(ray_origins, start, end, options["depth_resolution"], disparity)
        # Another family's ray marcher may need sorted samples, so it gets the reference path.
        is_sorted = implementations.current() == "ref" or type(self.ray_marcher) is not MipRayMarcher2
        render = self._render_sorted if is_sorted else self._render_unsorted
        return render(planes, decoder, ray_origins, ray_directions, depths, options)

    def _render_sorted(
        self, planes, decoder, origins, directions, depths, options
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Render by sorting colours and densities of both passes by depth. This is the reference path."""
        colors, densities = self._query(planes, decoder, origins, directions, depths, options)
        fine_count = options.get("depth_resolution_importance", 0)
        if fine_count > 0:
            flat = depths.flatten(0, 1).squeeze(2)  # [N*M, S]
            draws = uniform_draws(flat, fine_count, options.get(STRATIFIED, False))
            fine = importance_depths(densities.reshape(flat.shape), flat, draws, impl="ref").reshape(
                *depths.shape[:2], fine_count, 1
            )
            fine_colors, fine_densities = self._query(planes, decoder, origins, directions, fine, options)
            # Depths of the two passes interleave: [N, M, S + F, 1].
            depths, order = torch.cat([depths, fine], dim=-2).sort(dim=-2)
            colors = torch.cat([colors, fine_colors], dim=-2)
            colors = colors.gather(-2, order.expand(-1, -1, -1, colors.shape[-1]))
            densities = torch.cat([densities, fine_densities], dim=-2).gather(-2, order)
        rgb, depth, weights = self.ray_marcher(colors, densities, depths, options)
        return rgb, depth, weights.sum(dim=2)

    def _render_unsorted(
        self, planes, decoder, origins, directions, depths, options
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Render the same result faster: only densities and depths are sorted, colours stay in place."""
        n, m, s, _ = depths.shape
        merged = self.merge(planes)
        fine_count = options.get("depth_resolution_importance", 0)
        noisy = options.get("density_noise", 0) > 0
        even = options.get(STRATIFIED, False)
        # The random numbers of all rays are drawn at once, before the rays are divided into chunks, so the
        # result does not depend on the chunk size. With density noise they have to follow the noise of the
        # coarse pass, and there is then only one chunk.
        u = (
            None
            if noisy or fine_count == 0
            else uniform_draws(depths.flatten(0, 1), fine_count, even).reshape(n, m, fine_count)
        )
        # Rays of each sample that are rendered together. On a CPU they are so few that their colours stay in
        # the same, cached memory. With a graph to record, chunks would save nothing.
        count = m
        recorded = torch.is_grad_enabled() and any(
            x.requires_grad for x in (planes, origins, directions, *decoder.parameters())
        )
        if depths.device.type == "cpu" and not noisy and not recorded:
            count = max(1, min(m, _CPU_SAMPLES // (n * s)))
        sums = []
        ranges = []
        for start in range(0, m, count):
            rays = slice(start, start + count)
            where = (origins[:, rays], directions[:, rays])
            coarse = depths[:, rays]
            passes = [(*self._query(planes, decoder, *where, coarse, options, merged), coarse)]
            if fine_count > 0:
                flat = coarse.flatten(0, 1).squeeze(2)  # [N*rays, S]
                densities = passes[0][1].flatten(0, 1).squeeze(2)
                # u is None with density noise: the draws then come after that of the coarse pass.
                draws = uniform_draws(flat, fine_count, even) if u is None else u[:, rays].flatten(0, 1)
                fine = importance_depths(densities, flat, draws).reshape(n, -1, fine_count, 1)
                passes.append((*self._query(planes, decoder, *where, fine, options, merged), fine))
            sums.append(self.ray_marcher.accumulate(passes))
            ranges.append([(d.amin(), d.amax()) for _, _, d in passes])
        # Extremes over all chunks: the depth is clamped to the range of the whole batch.
        low, high = (torch.stack([extremes[i] for part in ranges for extremes in part]) for i in (0, 1))
        rgb, depth_sum, total = (torch.cat(parts, dim=1) for parts in zip(*sums, strict=True))
        rgb, depth = self.ray_marcher.finish(rgb, depth_sum, total, (low.amin(), high.amax()), options)
        return rgb, depth, total

    @staticmethod
    def _ray_limits(origins: torch.Tensor, directions: torch.Tensor, options: dict) -> tuple:
        """Return the depths at which rays start and end: numbers, or tensors [N, M, 1] if they are "auto"."""
        if options["ray_start"] != "auto" or options["ray_end"] != "auto":
            return options["ray_start"], options["ray_end"]
        near, far = ray_limits_box(origins, directions, options["box_warp"])
        valid = far > near
        if valid.any():
            # Rays that miss the box need some range as well. As in EG3D, it is that of the *starts* of the
            # rays that hit the box. If no ray hits it, all keep -1 and -2.
            near, far = (
                torch.where(valid, near, near[valid].min()),
                torch.where(valid, far, near[valid].max()),
            )
        return near, far

    def _query(
        self, planes, decoder, origins, directions, depths, options, merged=None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return colours [N, M, S, D] and raw densities [N, M, S, 1] at depths [N, M, S, 1] along rays."""
        n, m, s, _ = depths.shape
        # Points of all rays as one list: [N, M, S, 3] -> [N, M * S, 3].
        coordinates = (origins.unsqueeze(-2) + depths * directions.unsqueeze(-2)).reshape(n, m * s, 3)
        out = self.run_model(planes, decoder, coordinates, None, options, merged=merged)
        return out["rgb"].reshape(n, m, s, -1), out["sigma"].reshape(n, m, s, 1)

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
        """Decode points.

        Args:
            planes: [N, 3, C, H, W].
            decoder: module with `weights` like `training.triplane.OSGDecoder`, or, more slowly, any module
                with `decode`.
            sample_coordinates: [N, P, 3], world units.
            sample_directions: not used: there is no view dependence.
            options: 'box_warp', and 'density_noise', the standard deviation of normal noise on the density.
            sigma_only: leave the colours out.
            merged: result of `merge` for these planes, if several calls share it.
        Returns: {'rgb': [N, P, D], 'sigma': [N, P, 1] raw}, or 'sigma' alone.
        """
        del sample_directions
        out = self._decode_at(planes, decoder, sample_coordinates, options["box_warp"], sigma_only, merged)
        if sigma_only:
            out = {"sigma": out["sigma"]}
        if options.get("density_noise", 0) > 0:
            out["sigma"] = out["sigma"] + torch.randn_like(out["sigma"]) * options["density_noise"]
        return out

    def _decode_at(
        self, planes, decoder, points, box_warp, sigma_only: bool, merged: MergedPlanes | None
    ) -> dict[str, torch.Tensor]:
        """Decode points without noise. Other families override this method; see `run_model`."""
        # The definition, for the reference implementation and for
        # decoders that are not a two-layer perceptron.
        if implementations.current() == "ref" or not hasattr(decoder, "weights"):
            features = sample_planes_channels_first(self.plane_axes, planes, points, box_warp)
            # [N, 3, C, P] -> [N, C, P] -> [N, P, C]
            return decoder.decode(features.mean(dim=1).transpose(1, 2))
        weights = decoder.weights(planes.dtype)
        weights = weights.density_only() if sigma_only else weights
        merged = self.merge(planes) if merged is None else merged
        rgb, sigma = triplane_decode(
            planes, self.plane_axes, points.to(planes), box_warp, weights, merged=merged
        )
        return {"rgb": rgb, "sigma": sigma}

    def merge(self, planes: torch.Tensor) -> MergedPlanes | None:
        """Return planes [N, 3, C, H, W] in the form of fast look-ups; None if they are not axis-aligned."""
        known, version, pairs = self._known_axes
        # Found once per tensor of axes: on a GPU the search waits for the device.
        if known is not self.plane_axes or version != self.plane_axes._version:
            pairs = projection_axes(self.plane_axes)
            self._known_axes = (self.plane_axes, self.plane_axes._version, pairs)
        return None if pairs is None else merge_planes(planes, pairs)
