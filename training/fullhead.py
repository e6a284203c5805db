"""Full-head generators derived from EG3D: PanoHead (An et al. 2023), SphereHead (Li et al. 2024), HyPlaneHead
(Li et al. 2025).

They share a decoder whose colours may remain features, a background from a separate network, raw colours from
a style layer, a mask, and a camera that forward() moves depending on the latent. They differ in how features
are stored: tri-grids (PanoHead), two balls of spherical planes (SphereHead), three planes and a sphere
(HyPlaneHead). Modules have the names of the published networks, so that their tensors can be loaded.

Sizes and switches are in rendering_kwargs, as in the published networks: triplane_size, triplane_depth,
decoder_activation, use_torgb_raw, use_background, and HyPlaneHead's flags. Two are ours and absent in
published networks: triplane_extent (see `sample_tri_grid`) and side_margin (see `HeadRenderer`).

Shapes: N batch, Z z_dim, K c_dim (25), L num_ws, W w_dim, C plane channels, F decoded features, D slices, r
rendered pixels per edge, H x W texels, P points; q = 2 p / box_warp.
"""

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch.nn import functional
from torch.nn.functional import grid_sample

from training.config import check_choice
from training.layers import Conv2dLayer, MappingNetwork
from training.rendering.renderer import ImportanceRenderer, MipRayMarcher2
from training.synthesis import SynthesisNetwork, ToRGBLayer
from training.triplane import OSGDecoder, TriPlaneGenerator

EPSILON = 1e-8  # of SphereHead and HyPlaneHead, in sums of weights and under roots
_ROOT8 = 2 * math.sqrt(2)


def sample_tri_grid(
    axes: torch.Tensor, planes: torch.Tensor, points: torch.Tensor, box_warp: float, extent: float = 1.0
) -> torch.Tensor:
    """Read K stacks of D slices at points, by trilinear interpolation with zeros outside
    (align_corners=False).

    With D = 1 a value fades by 1 - |t| / 2 along the third axis, so this differs from EG3D's plane. With D =
    3 the slices lie at t = -2/3, 0, 2/3.

    Args:
        axes: [K, 3, 3]; its rows give the coordinates along width, height and slices.
        planes: [N, K, C, D, H, W].
        points: [N, P, 3], world units.
        box_warp: side of the box, world units.
        extent: length of a stack over the side of the box; 1 in published networks.
    Returns: [N, K, P, C].
    """
    # Coordinates along width, height and slices, [N, K, P, 3].
    coordinates = torch.einsum("kij,npj->nkpi", axes.to(points), points * (2 / box_warp))
    grid = coordinates * coordinates.new_tensor([1.0, 1.0, 1.0 / extent])
    return _read(planes, grid.unsqueeze(2).unsqueeze(2))  # [N, K, 1, 1, P, 3]


def _read(planes: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    """Read planes [N, K, C, (D,) H, W] at grid [N, K, (1,) 1, P, 2 or 3]; returns [N, K, P, C]."""
    read = grid_sample(
        planes.flatten(0, 1),
        grid.flatten(0, 1).to(planes),
        mode="bilinear",
        padding_mode="zeros",
        align_corners=False,
    )
    # [N * K, C, (1,) 1, P] -> [N, K, P, C]
    return read.flatten(2).unflatten(0, planes.shape[:2]).transpose(2, 3)


def _angle(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Return atan2(y, x), with value and gradient 0 where both are 0.

    There, torch's gradient is NaN, and its value depends on the sign of the zero.
    """
    nowhere = (x == 0) & (y == 0)
    return torch.atan2(y.masked_fill(nowhere, 0.0), x.masked_fill(nowhere, 1.0))


def spherical(p: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the polar angle from the third axis in 0..pi and the azimuth in -pi..pi of points [..., 3]."""
    x, y, z = p.unbind(-1)
    return _angle(torch.linalg.vector_norm(p[..., :2], dim=-1), z), _angle(y, x)


def sample_balls(planes: torch.Tensor, points: torch.Tensor, box_warp: float) -> torch.Tensor:
    """Read two balls of spherical planes and fuse them.

    Ball A reads (q_z, q_y, -q_x): its seam is at the back, its poles are at the ears. Ball B reads (-q_z,
    -q_x, q_y): its seam is in front. In a ball, r = 2 |q| / sqrt 3 - 1, theta = 2 polar / pi - 1, phi =
    azimuth / pi, and its planes read (theta, phi), (theta, r), (phi, r). With the weight w = (1 + cos pi
    theta) / 2 (1 + cos pi phi) / 2, a feature is (A w_A + B w_B) / (w_A + w_B + 1e-8).

    Args:
        planes: [N, 2, 3, C, H, W].
        points: [N, P, 3], world units.
        box_warp: side of the box, world units.
    Returns: [N, 3, P, C].
    """
    x, y, z = (points * (2 / box_warp)).unbind(-1)
    # Both weights can be 0 at one point; EPSILON makes the quotient 0 there.
    total = torch.zeros([], device=planes.device)
    weights = torch.full([], EPSILON, device=planes.device)
    for ball, rotated in zip(planes.unbind(1), ((z, y, -x), (-z, -x, y)), strict=True):
        q = torch.stack(rotated, dim=-1)  # [N, P, 3]
        polar, azimuth = spherical(q)
        r = torch.linalg.vector_norm(q, dim=-1) * (2 / math.sqrt(3)) - 1
        theta = polar * (2 / math.pi) - 1
        phi = azimuth / math.pi
        # The three planes of the ball, [N, 3, P, 2].
        grid = torch.stack(
            [torch.stack(pair, dim=-1) for pair in ((theta, phi), (theta, r), (phi, r))], dim=1
        )
        # 0 at the ball's own seam and poles, where the other ball has its largest weight. [N, 1, P, 1].
        weight = ((1 + torch.cos(math.pi * theta)) * (1 + torch.cos(math.pi * phi)) / 4)[:, None, :, None]
        total = total + _read(ball, grid.unsqueeze(2)) * weight
        weights = weights + weight
    return total / weights


def equal_area_square(p: torch.Tensor) -> torch.Tensor:
    """Map directions of points [..., 3] to the square [-1, 1]^2, [..., 2].

    Lambert's equal-area projection maps the sphere to a disc about the top of the head, with the neck at its
    rim. The elliptical map then takes the disc to the square.
    """
    x, y, z = p.unbind(-1)
    polar, azimuth = spherical(torch.stack([x, z, -y], dim=-1))
    radius = torch.cos(polar / 2)
    # The projection's angle is -azimuth.
    a = radius * torch.cos(azimuth)
    b = -radius * torch.sin(azimuth)
    s = a.square() - b.square()

    def half(signed: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        """Return one coordinate of the elliptical map from disc to square."""
        # EPSILON and the clamp keep the roots real and their gradients finite at the rim.
        plus = 2 + signed + _ROOT8 * c + EPSILON
        minus = 2 + signed - _ROOT8 * c + EPSILON
        return (plus.clamp_min(0).sqrt() - minus.clamp_min(0).sqrt()) / 2

    return torch.stack([half(s, a), half(-s, b)], dim=-1)


def sample_hybrid(
    axes: torch.Tensor, planes: torch.Tensor, points: torch.Tensor, box_warp: float, equal_area: bool
) -> torch.Tensor:
    """Read three planes bilinearly, and a fourth map over directions, which is constant along rays from the
    origin.

    Args:
        axes: [3, 3, 3].
        planes: [N, 4, C, H, W], the sphere's last.
        points: [N, P, 3], world units.
        box_warp: side of the box, world units.
        equal_area: map directions by `equal_area_square`; otherwise by both angles of SphereHead's ball A.
    Returns: [N, 4, P, C].
    """
    q = points * (2 / box_warp)
    flat = torch.einsum("kij,npj->nkpi", axes[:, :2].to(q), q)  # [N, 3, P, 2]
    if equal_area:
        around = equal_area_square(q)
    else:
        x, y, z = q.unbind(-1)
        polar, azimuth = spherical(torch.stack([z, y, -x], dim=-1))
        around = torch.stack([polar * (2 / math.pi) - 1, azimuth / math.pi], dim=-1)
    return _read(planes, torch.cat([flat, around[:, None]], dim=1).unsqueeze(2))


EMPTY = -1000.0  # raw density of space that is cut away
# Last activations of decoded colours, by the option decoder_activation.
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "none": lambda x: x,
    "sigmoid": lambda x: torch.sigmoid(x) * (1 + 2 * 0.001) - 0.001,
    "lrelu": lambda x: functional.leaky_relu(x, 0.2) * math.sqrt(2),
}
# Arguments of the backbone that the background network shares.
_CONVOLUTIONS = (
    "channel_base",
    "channel_max",
    "num_fp16_res",
    "conv_clamp",
    "fused_modconv_default",
    "use_noise",
    "fp16_channels_last",
)
_BALL_FEATURES = 512, 256  # channels of SphereHead's backbone, and between the two convolutions of a ball


class FeatureDecoder(OSGDecoder):
    """EG3D's decoder with a selectable last activation of the colours."""

    def __init__(self, n_features: int, options: dict):
        super().__init__(n_features, options)
        self.activation = options["decoder_activation"]
        check_choice("decoder_activation", self.activation, ACTIVATIONS)

    def decode(self, features: torch.Tensor) -> dict[str, torch.Tensor]:
        """Decode features [N, P, C] that are averaged over planes already; see `OSGDecoder`."""
        x = self.net(features)
        return {"rgb": ACTIVATIONS[self.activation](x[..., 1:]), "sigma": x[..., :1]}


class HeadRenderer(ImportanceRenderer):
    """EG3D's renderer for features that `read(axes, planes, points, box_warp)` returns as [N, K, P, C].

    Colours are not mapped to -1..1. While rendering, density is removed where |x| or |z| comes within the
    option side_margin of the box (world units; 0.1 if missing, None for none). Densities at points, for
    instance for a mesh, keep what renders hide, as in the published code.
    """

    def __init__(self, read: Callable[..., torch.Tensor], plane_layout: str):
        super().__init__(plane_layout)
        self.read = read
        self.ray_marcher = MipRayMarcher2(symmetric=False)

    def _decode_at(self, planes, decoder, points, box_warp, sigma_only, merged) -> dict[str, torch.Tensor]:
        """Decode points without noise; see `ImportanceRenderer.run_model`."""
        # [N, K, P, C] -> [N, P, C]
        features = self.read(self.plane_axes, planes, points.to(planes), box_warp).mean(dim=1)
        if not sigma_only:
            return decoder.decode(features)
        # The density alone needs one row of the last layer.
        w0, b0, w_sigma, b_sigma = (weight.to(features) for weight in decoder.sigma_weights())
        hidden = functional.softplus(functional.linear(features, w0, b0))
        return {"sigma": functional.linear(hidden, w_sigma[None], b_sigma[None])}

    def _query(
        self, planes, decoder, origins, directions, depths, options, merged=None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return colours and raw densities along rays, with the margin at the sides of the box cut away."""
        colours, densities = super()._query(planes, decoder, origins, directions, depths, options, merged)
        if (margin := options.get("side_margin", 0.1)) is not None:
            # x and z of the samples, [N, M, S, 2]; there is no limit along y.
            sideways = (origins.unsqueeze(-2) + depths * directions.unsqueeze(-2))[..., [0, 2]]
            outside = (sideways.abs() > options["box_warp"] / 2 - margin).any(dim=-1, keepdim=True)
            densities = densities.masked_fill(outside, EMPTY)
        return colours, densities

    def merge(self, planes: torch.Tensor) -> None:
        """Return None: these features have no merged form."""


class FullHeadGenerator(TriPlaneGenerator, ABC):
    """Base class of the three generators.

    Its arguments are those of `TriPlaneGenerator`, with further switches in rendering_kwargs.
    """

    decoder_class = FeatureDecoder

    def __init__(
        self,
        *,
        rendering_kwargs: dict,
        mapping_kwargs: dict | None = None,
        plane_layout: str = "panohead",
        **kwargs,
    ):
        size = rendering_kwargs["triplane_size"]
        super().__init__(
            rendering_kwargs=rendering_kwargs,
            mapping_kwargs=mapping_kwargs,
            plane_layout=plane_layout,
            plane_resolution=size,
            **kwargs,
        )
        # Replaces the renderer that the base class built.
        self.renderer = HeadRenderer(self._reader(), plane_layout)
        features = kwargs.get("decoder_features") or self.plane_channels
        if rendering_kwargs["use_torgb_raw"]:
            self.torgb = ToRGBLayer(features, 3, self.w_dim)
        if rendering_kwargs["use_background"]:
            convolutions = {k: v for k, v in kwargs.items() if k in _CONVOLUTIONS}
            # The background network is half as wide as the backbone.
            convolutions["channel_base"] = kwargs.get("channel_base", 32768) // 2
            self.bcg_synthesis = SynthesisNetwork(
                self.w_dim, self.superresolution.input_resolution, features, **convolutions
            )
        # Maps a latent and a camera to a translation [3] of that camera.
        moving = {**(mapping_kwargs or {}), "lr_multiplier": 1.0, "last_activation": "linear"}
        self.t_mapping = MappingNetwork(self.z_dim, self.c_dim, 3, num_ws=1, **moving)

    @abstractmethod
    def _reader(self) -> Callable[..., torch.Tensor]:
        """Return the function that reads features at points: see `HeadRenderer`."""

    def moved_camera(self, z: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        """Return cameras c [N, 25] moved by the output of `t_mapping` for them and latents z [N, Z].

        The movement is in world units and is never truncated.
        """
        moved = c.clone()
        moved[:, [3, 7, 11]] += self.t_mapping(z, c)[:, 0]  # translation column of the row-major 4x4 pose
        return moved

    def render(
        self, planes, ws, c, resolution, options, noise_mode="random", **sr_kwargs
    ) -> dict[str, torch.Tensor]:
        """Render given planes; see `TriPlaneGenerator.render`.

        The result also has 'image_mask' [N, 1, r, r], the share of the ray that is not background.
        """
        features, depth, opacity = self._march(planes, c, resolution, options)
        features = self.scaled(features)  # before the background is added, which is not scaled
        if options["use_background"]:
            # The background fills the light that the head lets through.
            features = features + (1 - opacity) * self._background(
                ws, resolution, options["sr_antialias"], noise_mode
            )
        raw = self.to_rgb(features, ws)
        image = self.superresolution(
            raw, features, ws, noise_mode=options["superresolution_noise_mode"], **sr_kwargs
        )
        mask = opacity * (1 + 2 * 0.001) - 0.001  # stretched like colours of a sigmoid
        return {
            "image": image,
            "image_raw": raw,
            "image_depth": depth,
            "image_opacity": opacity,
            "image_mask": mask,
        }

    def scaled(self, features: torch.Tensor) -> torch.Tensor:
        """Return decoded features as renders use them: in -1..1 if they come from a sigmoid."""
        return features * 2 - 1 if self.decoder.activation == "sigmoid" else features

    def to_rgb(self, features: torch.Tensor, ws: torch.Tensor) -> torch.Tensor:
        """Return raw colours [N, 3, H, W], about -1..1, of scaled features [N, F, H, W]."""
        return (
            self.torgb(features, ws[:, -1], fused_modconv=False)
            if self.rendering_kwargs["use_torgb_raw"]
            else features[:, :3]
        )

    def _background(
        self, ws: torch.Tensor, resolution: int, antialias: bool, noise_mode: str
    ) -> torch.Tensor:
        """Return background features [N, F, r, r].

        The network's ws are those of the backbone: the first ones, or all with the last one repeated.
        """
        lacking = max(self.bcg_synthesis.num_ws - ws.shape[1], 0)
        ws = torch.cat([ws, ws[:, -1:].expand(-1, lacking, -1)], dim=1)[:, : self.bcg_synthesis.num_ws]
        image = self.bcg_synthesis(ws, noise_mode=noise_mode)
        return functional.interpolate(
            image, size=(resolution, resolution), mode="bilinear", align_corners=False, antialias=antialias
        )


class PanoHeadGenerator(FullHeadGenerator):
    """PanoHead's generator with a tri-grid: three stacks of `triplane_depth` planes.

    Channel c of slice d of a stack is the backbone's output c D + d of that stack.
    """

    def _backbone_output(self) -> tuple[int, int]:
        return self.plane_resolution, 3 * self.plane_channels * self.rendering_kwargs["triplane_depth"]

    def _reader(self) -> Callable[..., torch.Tensor]:
        return functools.partial(sample_tri_grid, extent=self.extent)

    @property
    def extent(self) -> float:
        """Length of a stack over the side of the box."""
        return self.rendering_kwargs.get("triplane_extent", 1.0)

    def planes(self, ws: torch.Tensor, noise_mode: str = "random", **synthesis_kwargs) -> torch.Tensor:
        """Generate planes [N, 3, C, D, H, W] from ws [N, L, W]."""
        return self.backbone.synthesis(ws, noise_mode=noise_mode, **synthesis_kwargs).unflatten(
            1, (3, self.plane_channels, -1)
        )


class SphereHeadGenerator(FullHeadGenerator):
    """SphereHead's generator: two balls of three spherical planes each, see `sample_balls`."""

    ConvA: torch.nn.Sequential
    ConvB: torch.nn.Sequential

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        wide, narrow = _BALL_FEATURES
        channels = self.plane_channels * kwargs["rendering_kwargs"]["triplane_depth"]
        if kwargs["rendering_kwargs"]["triplane_depth"] != 3:
            raise ValueError(
                "triplane_depth: expected 3, the number of planes of a ball, got"
                f" {kwargs['rendering_kwargs']['triplane_depth']}. Set it to 3."
            )
        for name in ("ConvA", "ConvB"):
            layers = Conv2dLayer(wide, narrow, 1, bias=False), Conv2dLayer(narrow, channels, 1, bias=False)
            setattr(self, name, torch.nn.Sequential(*layers))

    def _backbone_output(self) -> tuple[int, int]:
        return self.plane_resolution, _BALL_FEATURES[0]

    def _reader(self) -> Callable[..., torch.Tensor]:
        return lambda axes, planes, points, box_warp: sample_balls(planes, points, box_warp)

    def planes(self, ws: torch.Tensor, noise_mode: str = "random", **synthesis_kwargs) -> torch.Tensor:
        """Generate planes [N, 2, 3, C, H, W] of both balls from ws [N, L, W]."""
        features = self.backbone.synthesis(ws, noise_mode=noise_mode, **synthesis_kwargs)
        # Two heads on one backbone: [N, 2, 3 C, H, W] -> [N, 2, 3, C, H, W].
        return torch.stack([self.ConvA(features), self.ConvB(features)], dim=1).unflatten(2, (3, -1))


class HyPlaneHeadGenerator(FullHeadGenerator):
    """HyPlaneHead's generator: one map of features, cut into quadrants: three planes and a sphere."""

    def __init__(self, **kwargs):
        # Of the published variants, only this one is implemented.
        options = kwargs["rendering_kwargs"]
        supported = {"multiplane_num": 1, "triplane_depth": 1, "render_mode": "TriPlane_SingSph_flatten"}
        for name, value in supported.items():
            if options[name] != value:
                raise ValueError(
                    f"{name}: expected {value!r}, got {options[name]!r}. Other values are not implemented."
                )
        if options["sph2cir_flag"] != options["cir2squ_flag"]:
            raise ValueError(
                "sph2cir_flag, cir2squ_flag: expected both or neither, got one of them. Set them to the same"
                " value."
            )
        super().__init__(**kwargs)

    def _backbone_output(self) -> tuple[int, int]:
        return 2 * self.plane_resolution, self.plane_channels

    def _reader(self) -> Callable[..., torch.Tensor]:
        return functools.partial(sample_hybrid, equal_area=self.rendering_kwargs["sph2cir_flag"])

    def planes(self, ws: torch.Tensor, noise_mode: str = "random", **synthesis_kwargs) -> torch.Tensor:
        """Generate planes [N, 4, C, H, W], the sphere's last, from ws [N, L, W]."""
        features = self.backbone.synthesis(ws, noise_mode=noise_mode, **synthesis_kwargs)  # [N, C, 2 H, 2 W]
        # Quadrants in row-major order: [N, 4, C, H, W].
        return torch.stack(
            [part for half in features.chunk(2, dim=2) for part in half.chunk(2, dim=3)], dim=1
        )
