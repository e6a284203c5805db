"""Volume rendering of tri-planes with two passes along every ray: where to sample, stratified first and then
by importance, and how samples are composited, by the midpoint rule of emission-absorption (Max 1995, as EG3D
uses it).

Shapes: N batch, M rays, S samples along a ray (of the coarse pass where there are two), F fine samples, C
plane or colour channels, P points, H x W plane size, B = N*M.
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
    """Composite samples that are sorted by depth.

    With mid-point colour c_i, raw density s_i and depth d_i of neighbouring samples, and interval length
    delta_i:
    sigma_i = softplus(s_i - 1), alpha_i = 1 - exp(-sigma_i delta_i), w_i = alpha_i prod_{j<i}
    (1 - alpha_j + 1e-10).
    There is no interval from the last sample to infinity. `symmetric` colours go from 0..1 to -1..1 at the
    end, as EG3D's do.
    """

    def __init__(self, symmetric: bool = True):
        super().__init__()
        self.symmetric = symmetric

    def forward(
        self, colors: torch.Tensor, densities: torch.Tensor, depths: torch.Tensor, rendering_options: dict
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """March.

        Args:
            colors: [N, M, S, C]; densities: [N, M, S, 1] raw; depths: [N, M, S, 1] ascending.
            rendering_options: 'clamp_mode' must be 'softplus'; 'white_back' adds 1 - sum(w) to the colour.
        Returns: colour sum(w c) * 2 - 1, or sum(w c) where not symmetric [N, M, C]; depth sum(w d)/sum(w),
            clamped to the smallest and largest depth of the *whole batch* (so a rendering depends on its
            batch in empty pixels) [N, M, 1]; weights [N, M, S-1, 1].
        """
        weights, depths_mid = (
            x.unsqueeze(-1) for x in interval_weights(densities.squeeze(-1), depths.squeeze(-1))
        )
        colors_mid = (colors[:, :, :-1] + colors[:, :, 1:]) / 2
        rgb = (weights * colors_mid).sum(dim=-2)
        depth_range = (depths.min(), depths.max())
        rgb, depth = self.finish(
            rgb, (weights * depths_mid).sum(dim=-2), weights.sum(dim=2), depth_range, rendering_options
        )
        return rgb, depth, weights

    def accumulate(
        self, passes: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """March the union of passes whose samples are in any order; colours are neither sorted nor put
        together.

        Args:
            passes: (colors [N, M, S, C], densities [N, M, S, 1] raw, depths [N, M, S, 1]) of each; S may
                differ.
        Returns: sum(w c) [N, M, C], sum(w d) [N, M, 1], sum(w) [N, M, 1].
        """
        n, m = passes[0][0].shape[:2]
        # [N*M, S of all]
        densities, depths = (
            torch.cat([part[i] for part in passes], dim=2).reshape(n * m, -1) for i in (1, 2)
        )
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
        """Colour [N, M, C] and depth [N, M, 1] as `forward` returns them, from what `accumulate` returns.

        depth_range: smallest and largest depth [] of all samples of the batch.
        """
        if rendering_options.get("clamp_mode", "softplus") != "softplus":
            raise ValueError(
                f"rendering option clamp_mode: expected 'softplus', got {rendering_options['clamp_mode']!r}."
            )
        seen = total > 0  # where nothing is, 0 / 0 would make the gradient NaN
        depth = torch.where(seen, depth_sum / torch.where(seen, total, 1), float("inf"))
        if rendering_options.get("white_back", False):
            rgb = rgb + 1 - total
        return rgb * 2 - 1 if self.symmetric else rgb, torch.clamp(depth, *depth_range)


class _WeightedSum(torch.autograd.Function):
    """sum_s v_s c_s of weights v [B, S] and colours c [B, S, C].

    As torch's matrix product, but its gradient for c, a product with an inner size of 1, is a plain
    multiplication, which is faster.
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
        return grad_weights, weights.unsqueeze(2) * grad.unsqueeze(1) if ctx.needs_input_grad[1] else None


def sample_stratified(
    origins: torch.Tensor,
    ray_start: float | torch.Tensor,
    ray_end: float | torch.Tensor,
    count: int,
    disparity: bool = False,
) -> torch.Tensor:
    """Jittered depths, one per stratum: linspace(start, end, S) + U[0,1) (end-start)/(S-1); samples can
    exceed ray_end.

    Args:
        origins: [N, M, 3], for shape and device; ray_start, ray_end: world units, numbers or [N, M, 1].
        count: S; disparity: even in 1/depth instead.
    Returns: depths [N, M, S, 1], ascending. Draws once from torch's global generator.
    """
    n, m, _ = origins.shape
    steps = torch.linspace(0, 1, count, device=origins.device)
    if disparity:
        t = steps.reshape(1, 1, count, 1).repeat(n, m, 1, 1)
        t = t + torch.rand_like(t) * (1 / (count - 1))
        return 1 / (1 / ray_start * (1 - t) + 1 / ray_end * t)
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
    """The draws of the importance pass, [B, F] in [0, 1) for rays [B, ...], from torch's global generator.

    Args: stratified: one in each of F equal parts, which halves the speckle of small sample counts; not what
        published networks had.
    """
    draws = torch.rand(len(rays), count, device=rays.device)
    return (draws + torch.arange(count, device=rays.device)) / count if stratified else draws


STRATIFIED = "importance_stratified"  # rendering option, off where it is missing: see `uniform_draws`
# samples of one pass that are decoded at once on a CPU where no gradient is asked for: 8 MB of 32 colours
_CPU_SAMPLES = 1 << 16

_AXES = {
    # rows are the new basis: row 0 gives the plane's width coordinate, row 1 its height coordinate
    # (x,y), (x,z), (z,x): the released checkpoints; the third repeats the second, transposed
    "eg3d": ("xyz", "xzy", "zxy"),
    "fixed": ("xyz", "xzy", "zyx"),  # (x,y), (x,z), (z,y): three different planes
    "panohead": ("xyz", "xzy", "yzx"),  # (x,y), (x,z), (y,z): PanoHead and what follows it
}


def generate_planes(layout: str = "eg3d") -> torch.Tensor:
    """Axes of the three planes.

    Args:
        layout: 'eg3d' (released checkpoints), 'fixed' (EG3D issue #67) or 'panohead'.
    Returns: [3, 3, 3], plane k's basis in its rows.
    Raises: ValueError for another layout.
    """
    if layout not in _AXES:
        raise ValueError(f"plane_layout: expected one of {', '.join(_AXES)}, got {layout!r}.")
    eye = torch.eye(3)
    return torch.stack([eye[["xyz".index(a) for a in axes]] for axes in _AXES[layout]])


class ImportanceRenderer(torch.nn.Module):
    """Stratified pass, importance pass, and a march over their union."""

    def __init__(self, plane_layout: str = "eg3d"):
        super().__init__()
        self.ray_marcher = MipRayMarcher2()
        # a plain tensor: not in the state dict, as EG3D has it
        self.plane_axes = generate_planes(plane_layout)
        self._known_axes: tuple[torch.Tensor | None, int, Pairs | None] = (None, 0, None)

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
        # [N, M, S, 1]
        depths = sample_stratified(ray_origins, start, end, options["depth_resolution"], disparity)
        plain = implementations.current() == "ref" or type(self.ray_marcher) is not MipRayMarcher2
        render = self._render_sorted if plain else self._render_unsorted
        return render(planes, decoder, ray_origins, ray_directions, depths, options)

    def _render_sorted(
        self, planes, decoder, origins, directions, depths, options
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Sort colours and densities of both passes by depth, then march: the definition."""
        colors, densities = self._query(planes, decoder, origins, directions, depths, options)
        fine_count = options.get("depth_resolution_importance", 0)
        if fine_count > 0:
            flat = depths.flatten(0, 1).squeeze(2)  # [N*M, S]
            draws = uniform_draws(flat, fine_count, options.get(STRATIFIED, False))
            fine = importance_depths(densities.reshape(flat.shape), flat, draws, impl="ref").reshape(
                *depths.shape[:2], fine_count, 1
            )
            fine_colors, fine_densities = self._query(planes, decoder, origins, directions, fine, options)
            depths, order = torch.cat([depths, fine], dim=-2).sort(dim=-2)
            colors = torch.cat([colors, fine_colors], dim=-2)
            colors = colors.gather(-2, order.expand(-1, -1, -1, colors.shape[-1]))
            densities = torch.cat([densities, fine_densities], dim=-2).gather(-2, order)
        rgb, depth, weights = self.ray_marcher(colors, densities, depths, options)
        return rgb, depth, weights.sum(dim=2)

    def _render_unsorted(
        self, planes, decoder, origins, directions, depths, options
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The same from scalars: only densities and depths are sorted, and the weights go back to where the
        colours are.
        """
        n, m, s, _ = depths.shape
        merged = self.merge(planes)
        fine_count = options.get("depth_resolution_importance", 0)
        noisy = options.get("density_noise", 0) > 0
        even = options.get(STRATIFIED, False)
        u = (
            None
            if noisy or fine_count == 0
            else uniform_draws(depths.flatten(0, 1), fine_count, even).reshape(n, m, fine_count)
        )
        # rays of each sample that are rendered together: on a CPU so few that their colours keep reusing the
        # same memory
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
                # [N*rays, S]
                flat = coarse.flatten(0, 1).squeeze(2)
                densities = passes[0][1].flatten(0, 1).squeeze(2)
                # after the noise, if there is any
                draws = uniform_draws(flat, fine_count, even) if u is None else u[:, rays].flatten(0, 1)
                fine = importance_depths(densities, flat, draws).reshape(n, -1, fine_count, 1)
                passes.append((*self._query(planes, decoder, *where, fine, options, merged), fine))
            sums.append(self.ray_marcher.accumulate(passes))
            ranges.append([(d.amin(), d.amax()) for _, _, d in passes])
        low, high = (torch.stack([extremes[i] for part in ranges for extremes in part]) for i in (0, 1))
        rgb, depth_sum, total = (torch.cat(parts, dim=1) for parts in zip(*sums, strict=True))
        rgb, depth = self.ray_marcher.finish(rgb, depth_sum, total, (low.amin(), high.amax()), options)
        return rgb, depth, total

    @staticmethod
    def _ray_limits(origins: torch.Tensor, directions: torch.Tensor, options: dict) -> tuple:
        if options["ray_start"] != "auto" or options["ray_end"] != "auto":
            return options["ray_start"], options["ray_end"]
        near, far = ray_limits_box(origins, directions, options["box_warp"])
        valid = far > near
        if valid.any():  # rays that miss the box: EG3D gives them the range of the *starts* of those that hit
            near, far = (
                torch.where(valid, near, near[valid].min()),
                torch.where(valid, far, near[valid].max()),
            )
        return near, far

    def _query(
        self, planes, decoder, origins, directions, depths, options, merged=None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        n, m, s, _ = depths.shape
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
            planes: [N, 3, C, H, W]; sample_coordinates: [N, P, 3]; sample_directions: not used
                (no view dependence).
            decoder: with `weights` as `training.triplane.OSGDecoder` has it, or any module with `decode`,
                which is slower.
            options: 'box_warp', and 'density_noise', the deviation of normal noise that is added to the
                density.
            sigma_only: leave the colours out.
            merged: what `merge` makes of the planes, where several calls share it.
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
        """Planes read at points and decoded, without noise: what other families replace. See `run_model`."""
        if implementations.current() == "ref" or not hasattr(decoder, "weights"):
            features = sample_planes_channels_first(self.plane_axes, planes, points, box_warp)
            return decoder.decode(features.mean(dim=1).transpose(1, 2))
        weights = decoder.weights(planes.dtype)
        weights = weights.density_only() if sigma_only else weights
        merged = self.merge(planes) if merged is None else merged
        rgb, sigma = triplane_decode(
            planes, self.plane_axes, points.to(planes), box_warp, weights, merged=merged
        )
        return {"rgb": rgb, "sigma": sigma}

    def merge(self, planes: torch.Tensor) -> MergedPlanes | None:
        """Planes [N, 3, C, H, W] as fast look-ups read them; None where they are not axis-aligned."""
        known, version, pairs = self._known_axes
        # once for each tensor: on a GPU it waits for the device
        if known is not self.plane_axes or version != self.plane_axes._version:
            pairs = projection_axes(self.plane_axes)
            self._known_axes = (self.plane_axes, self.plane_axes._version, pairs)
        return None if pairs is None else merge_planes(planes, pairs)
