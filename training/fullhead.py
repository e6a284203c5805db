"""Full-head generators after EG3D: PanoHead (An et al. 2023), SphereHead (Li et al. 2024), HyPlaneHead
(Li et al. 2025).

They share a decoder whose colours may stay features, a background from a network of its own, raw colours by a
style layer, a mask, and a camera that forward() moves as the latent asks. They differ in where features are
read: tri-grids, two balls of spherical planes, three planes with a sphere. Modules have their names, so that
their tensors fit.

Sizes and switches stand in rendering_kwargs, as theirs do: triplane_size, triplane_depth, decoder_activation,
use_torgb_raw, use_background, and HyPlaneHead's flags. Ours, absent in published networks: triplane_extent
(of `sample_tri_grid`) and side_margin (of `HeadRenderer`).

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

EPSILON = 1e-8
_ROOT8 = 2 * math.sqrt(2)


def sample_tri_grid(
    axes: torch.Tensor, planes: torch.Tensor, points: torch.Tensor, box_warp: float, extent: float = 1.0
) -> torch.Tensor:
    """Trilinear reads, zeros outside, of K stacks of D slices (align_corners=False).

    With D = 1 a read fades by 1 - |t| / 2 along the third axis, so this is not EG3D's plane; with D = 3
    slices lie at t = -2/3, 0, 2/3.

    Args:
        axes: [K, 3, 3], rows give the coordinates along width, height and slices; planes: [N, K, C, D, H, W];
            points: [N, P, 3];
        extent: half the length of a stack over half the box, 1 in published networks.
    Returns: [N, K, P, C].
    """
    # width, height, slices
    coordinates = torch.einsum("kij,npj->nkpi", axes.to(points), points * (2 / box_warp))
    grid = coordinates * coordinates.new_tensor([1.0, 1.0, 1.0 / extent])
    return _read(planes, grid.unsqueeze(2).unsqueeze(2))


def _read(planes: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    """planes [N, K, C, (D,) H, W] at grid [N, K, (1,) 1, P, 2 or 3] -> [N, K, P, C]."""
    read = grid_sample(
        planes.flatten(0, 1),
        grid.flatten(0, 1).to(planes),
        mode="bilinear",
        padding_mode="zeros",
        align_corners=False,
    )
    return read.flatten(2).unflatten(0, planes.shape[:2]).transpose(2, 3)


def _angle(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """atan2, with value and gradient 0 where both are 0 (there torch's gradient is NaN, and the value hangs
    on the sign of the zero).
    """
    nowhere = (x == 0) & (y == 0)
    return torch.atan2(y.masked_fill(nowhere, 0.0), x.masked_fill(nowhere, 1.0))


def spherical(p: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Polar angle from the third axis in 0..pi, and azimuth in -pi..pi, of points [..., 3]."""
    x, y, z = p.unbind(-1)
    return _angle(torch.linalg.vector_norm(p[..., :2], dim=-1), z), _angle(y, x)


def sample_balls(planes: torch.Tensor, points: torch.Tensor, box_warp: float) -> torch.Tensor:
    """Two balls fused. Ball A sees (q_z, q_y, -q_x), its seam at the back and its poles at the ears; B
    (-q_z, -q_x, q_y), seam in front.

    In a ball r = 2 |q| / sqrt 3 - 1, theta = 2 polar / pi - 1, phi = azimuth / pi, and its planes read
    (theta, phi), (theta, r), (phi, r). With the weight w = (1 + cos pi theta) / 2 (1 + cos pi phi) / 2 a
    feature is (A w_A + B w_B) / (w_A + w_B + 1e-8).

    Args: planes: [N, 2, 3, C, H, W]; points: [N, P, 3]. Returns: [N, 3, P, C].
    """
    x, y, z = (points * (2 / box_warp)).unbind(-1)
    total = torch.zeros([], device=planes.device)
    weights = torch.full([], EPSILON, device=planes.device)
    for ball, turned in zip(planes.unbind(1), ((z, y, -x), (-z, -x, y)), strict=True):
        q = torch.stack(turned, dim=-1)  # [N, P, 3]
        polar, azimuth = spherical(q)
        r = torch.linalg.vector_norm(q, dim=-1) * (2 / math.sqrt(3)) - 1
        theta = polar * (2 / math.pi) - 1
        phi = azimuth / math.pi
        # [N, 3, P, 2]
        grid = torch.stack(
            [torch.stack(pair, dim=-1) for pair in ((theta, phi), (theta, r), (phi, r))], dim=1
        )
        weight = ((1 + torch.cos(math.pi * theta)) * (1 + torch.cos(math.pi * phi)) / 4)[:, None, :, None]
        total = total + _read(ball, grid.unsqueeze(2)) * weight
        weights = weights + weight
    return total / weights


def equal_area_square(p: torch.Tensor) -> torch.Tensor:
    """Directions of points [..., 3] on the square -1..1 [..., 2]: Lambert's disc about the top of the head,
    the neck on its rim, then the elliptical map from disc to square.
    """
    x, y, z = p.unbind(-1)
    polar, azimuth = spherical(torch.stack([x, z, -y], dim=-1))
    radius = torch.cos(polar / 2)
    # the angle is -azimuth
    a = radius * torch.cos(azimuth)
    b = -radius * torch.sin(azimuth)
    s = a.square() - b.square()

    def half(signed: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        plus = 2 + signed + _ROOT8 * c + EPSILON
        minus = 2 + signed - _ROOT8 * c + EPSILON
        return (plus.clamp_min(0).sqrt() - minus.clamp_min(0).sqrt()) / 2

    return torch.stack([half(s, a), half(-s, b)], dim=-1)


def sample_hybrid(
    axes: torch.Tensor, planes: torch.Tensor, points: torch.Tensor, box_warp: float, equal_area: bool
) -> torch.Tensor:
    """Three planes, bilinear, and one over directions alone: constant along rays from the origin.

    Args: axes: [3, 3, 3]; planes: [N, 4, C, H, W], the sphere's last; points: [N, P, 3]; equal_area: by
    `equal_area_square`, else by both angles, as ball A sees them.
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


EMPTY = -1000.0  # raw density of what is cut away
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {  # of decoded colours
    "none": lambda x: x,
    "sigmoid": lambda x: torch.sigmoid(x) * (1 + 2 * 0.001) - 0.001,
    "lrelu": lambda x: functional.leaky_relu(x, 0.2) * math.sqrt(2),
}
_CONVOLUTIONS = (
    "channel_base",
    "channel_max",
    "num_fp16_res",
    "conv_clamp",
    "fused_modconv_default",
    "use_noise",
    "fp16_channels_last",
)
_BALL_FEATURES = 512, 256  # of SphereHead's backbone, and between the two convolutions of a ball


class FeatureDecoder(OSGDecoder):
    """EG3D's decoder with another last activation of the colours."""

    def __init__(self, n_features: int, options: dict):
        super().__init__(n_features, options)
        self.activation = options["decoder_activation"]
        check_choice("decoder_activation", self.activation, ACTIVATIONS)

    def decode(self, features: torch.Tensor) -> dict[str, torch.Tensor]:
        """See `OSGDecoder`."""
        x = self.net(features)
        return {"rgb": ACTIVATIONS[self.activation](x[..., 1:]), "sigma": x[..., :1]}


class HeadRenderer(ImportanceRenderer):
    """EG3D's rendering of features that `read(axes, planes, points, box_warp)` finds, [N, K, P, C].

    Colours stay as they are decoded. While rendering, density is cut where |x| or |z| comes within the option
    side_margin (0.1 world units where it is missing, None for none) of the box; densities at points keep what
    pictures hide, as theirs do.
    """

    def __init__(self, read: Callable[..., torch.Tensor], plane_layout: str):
        super().__init__(plane_layout)
        self.read = read
        self.ray_marcher = MipRayMarcher2(symmetric=False)

    def _decode_at(self, planes, decoder, points, box_warp, sigma_only, merged) -> dict[str, torch.Tensor]:
        features = self.read(self.plane_axes, planes, points.to(planes), box_warp).mean(dim=1)  # [N, P, C]
        if not sigma_only:
            return decoder.decode(features)
        w0, b0, w_sigma, b_sigma = (weight.to(features) for weight in decoder.sigma_weights())
        hidden = functional.softplus(functional.linear(features, w0, b0))
        return {"sigma": functional.linear(hidden, w_sigma[None], b_sigma[None])}

    def _query(
        self, planes, decoder, origins, directions, depths, options, merged=None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        colours, densities = super()._query(planes, decoder, origins, directions, depths, options, merged)
        if (margin := options.get("side_margin", 0.1)) is not None:
            # [N, M, S, 2]
            sideways = (origins.unsqueeze(-2) + depths * directions.unsqueeze(-2))[..., [0, 2]]
            outside = (sideways.abs() > options["box_warp"] / 2 - margin).any(dim=-1, keepdim=True)
            densities = densities.masked_fill(outside, EMPTY)
        return colours, densities

    def merge(self, planes: torch.Tensor) -> None:
        """There is no merged form."""


class FullHeadGenerator(TriPlaneGenerator, ABC):
    """What the three have in common; `TriPlaneGenerator`'s arguments,
    with the switches in rendering_kwargs.
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
        self.renderer = HeadRenderer(self._reader(), plane_layout)
        features = kwargs.get("decoder_features") or self.plane_channels
        if rendering_kwargs["use_torgb_raw"]:
            self.torgb = ToRGBLayer(features, 3, self.w_dim)
        if rendering_kwargs["use_background"]:
            convolutions = {k: v for k, v in kwargs.items() if k in _CONVOLUTIONS}
            convolutions["channel_base"] = kwargs.get("channel_base", 32768) // 2
            self.bcg_synthesis = SynthesisNetwork(
                self.w_dim, self.superresolution.input_resolution, features, **convolutions
            )
        moving = {**(mapping_kwargs or {}), "lr_multiplier": 1.0, "last_activation": "linear"}
        self.t_mapping = MappingNetwork(self.z_dim, self.c_dim, 3, num_ws=1, **moving)

    @abstractmethod
    def _reader(self) -> Callable[..., torch.Tensor]:
        """How features are read: see `HeadRenderer`."""

    def moved_camera(self, z: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        """Cameras c [N, 25] moved by what `t_mapping` makes of them and of latents z [N, Z], never truncated:
        world units.
        """
        moved = c.clone()
        moved[:, [3, 7, 11]] += self.t_mapping(z, c)[:, 0]
        return moved

    def render(
        self, planes, ws, c, resolution, options, noise_mode="random", **sr_kwargs
    ) -> dict[str, torch.Tensor]:
        """See `TriPlaneGenerator.render`; also 'image_mask' [N, 1, r, r], the share of the ray that is no
        background.
        """
        features, depth, opacity = self._march(planes, c, resolution, options)
        features = self.scaled(features)
        if options["use_background"]:
            features = features + (1 - opacity) * self._background(
                ws, resolution, options["sr_antialias"], noise_mode
            )
        raw = self.to_rgb(features, ws)
        image = self.superresolution(
            raw, features, ws, noise_mode=options["superresolution_noise_mode"], **sr_kwargs
        )
        mask = opacity * (1 + 2 * 0.001) - 0.001
        return {
            "image": image,
            "image_raw": raw,
            "image_depth": depth,
            "image_opacity": opacity,
            "image_mask": mask,
        }

    def scaled(self, features: torch.Tensor) -> torch.Tensor:
        """Decoded features as pictures use them: in -1..1 where they came from a sigmoid."""
        return features * 2 - 1 if self.decoder.activation == "sigmoid" else features

    def to_rgb(self, features: torch.Tensor, ws: torch.Tensor) -> torch.Tensor:
        """Raw colours [N, 3, H, W], about -1..1, of scaled features [N, F, H, W]."""
        return (
            self.torgb(features, ws[:, -1], fused_modconv=False)
            if self.rendering_kwargs["use_torgb_raw"]
            else features[:, :3]
        )

    def _background(
        self, ws: torch.Tensor, resolution: int, antialias: bool, noise_mode: str
    ) -> torch.Tensor:
        """Features [N, F, r, r] behind the head; its ws are the backbone's, cut or the last one repeated."""
        lacking = max(self.bcg_synthesis.num_ws - ws.shape[1], 0)
        ws = torch.cat([ws, ws[:, -1:].expand(-1, lacking, -1)], dim=1)[:, : self.bcg_synthesis.num_ws]
        image = self.bcg_synthesis(ws, noise_mode=noise_mode)
        return functional.interpolate(
            image, size=(resolution, resolution), mode="bilinear", align_corners=False, antialias=antialias
        )


class PanoHeadGenerator(FullHeadGenerator):
    """Tri-grid: three stacks of `triplane_depth` planes;
    channel c, slice d of a stack is its output c D + d.
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
        """ws [N, L, W] -> planes [N, 3, C, D, H, W]."""
        return self.backbone.synthesis(ws, noise_mode=noise_mode, **synthesis_kwargs).unflatten(
            1, (3, self.plane_channels, -1)
        )


class SphereHeadGenerator(FullHeadGenerator):
    """Two balls of three spherical planes each, fused where the other has its seam."""

    ConvA: torch.nn.Sequential
    ConvB: torch.nn.Sequential

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        wide, narrow = _BALL_FEATURES
        channels = self.plane_channels * kwargs["rendering_kwargs"]["triplane_depth"]
        if kwargs["rendering_kwargs"]["triplane_depth"] != 3:
            raise ValueError(
                "triplane_depth: expected 3, the planes of a ball, got"
                f" {kwargs['rendering_kwargs']['triplane_depth']}."
            )
        for name in ("ConvA", "ConvB"):
            layers = Conv2dLayer(wide, narrow, 1, bias=False), Conv2dLayer(narrow, channels, 1, bias=False)
            setattr(self, name, torch.nn.Sequential(*layers))

    def _backbone_output(self) -> tuple[int, int]:
        return self.plane_resolution, _BALL_FEATURES[0]

    def _reader(self) -> Callable[..., torch.Tensor]:
        return lambda axes, planes, points, box_warp: sample_balls(planes, points, box_warp)

    def planes(self, ws: torch.Tensor, noise_mode: str = "random", **synthesis_kwargs) -> torch.Tensor:
        """ws [N, L, W] -> planes [N, 2, 3, C, H, W] of both balls."""
        features = self.backbone.synthesis(ws, noise_mode=noise_mode, **synthesis_kwargs)
        return torch.stack([self.ConvA(features), self.ConvB(features)], dim=1).unflatten(2, (3, -1))


class HyPlaneHeadGenerator(FullHeadGenerator):
    """One map of features cut into quadrants: three planes and a sphere."""

    def __init__(self, **kwargs):
        options = kwargs["rendering_kwargs"]
        one_by_one = {"multiplane_num": 1, "triplane_depth": 1, "render_mode": "TriPlane_SingSph_flatten"}
        for name, value in one_by_one.items():
            if options[name] != value:
                raise ValueError(f"{name}: expected {value!r}, got {options[name]!r}.")
        if options["sph2cir_flag"] != options["cir2squ_flag"]:
            raise ValueError("sph2cir_flag, cir2squ_flag: expected both or neither, got one of them.")
        super().__init__(**kwargs)

    def _backbone_output(self) -> tuple[int, int]:
        return 2 * self.plane_resolution, self.plane_channels

    def _reader(self) -> Callable[..., torch.Tensor]:
        return functools.partial(sample_hybrid, equal_area=self.rendering_kwargs["sph2cir_flag"])

    def planes(self, ws: torch.Tensor, noise_mode: str = "random", **synthesis_kwargs) -> torch.Tensor:
        """ws [N, L, W] -> planes [N, 4, C, H, W], the sphere's last."""
        whole = self.backbone.synthesis(ws, noise_mode=noise_mode, **synthesis_kwargs)  # [N, C, 2 H, 2 W]
        return torch.stack([part for half in whole.chunk(2, dim=2) for part in half.chunk(2, dim=3)], dim=1)
