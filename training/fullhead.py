"""Full-head generators derived from EG3D: PanoHead (An et al. 2023), SphereHead (Li et al. 2024), HyPlaneHead
(Li et al. 2025).

All three have a decoder with a selectable last activation, a separate network for the background, a layer
that converts features to raw colours, a mask, and a camera that is moved depending on the latent. They differ
in the storage of features: tri-grids (PanoHead), two balls of spherical planes (SphereHead), or three planes
and a map over directions (HyPlaneHead). Modules have the names of the published networks, so that their
tensors can be loaded.

Sizes and switches are options in rendering_kwargs, as in the published networks: triplane_size,
triplane_depth, decoder_activation, use_torgb_raw, use_background, and HyPlaneHead's flags. Two further
options exist only in this project: triplane_extent (see `sample_tri_grid`) and side_margin (see
`HeadRenderer`).

Shapes: N is the number of images in a batch, Z is z_dim, K is the number of stacks or planes, L is num_ws, W
is w_dim, C is the number of plane channels, F of decoded features, D of slices, r of rendered pixels per
edge, and P of points. A plane has H x W texels. A point p has the normalised coordinates q = 2 p / box_warp,
which are in -1..1 inside the box.
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

EPSILON = 1e-8  # added to sums of weights and under roots, as in the code of SphereHead and HyPlaneHead
_ROOT8 = 2 * math.sqrt(2)


def sample_tri_grid(
    axes: torch.Tensor, planes: torch.Tensor, points: torch.Tensor, box_warp: float, extent: float = 1.0
) -> torch.Tensor:
    """Interpolate a tri-grid, which consists of K stacks of D feature slices, at points.

    The interpolation is trilinear, with zeros outside of a stack (align_corners=False). Let t in -1..1 be the
    coordinate along the slices. With D = 3, the slices lie at t = -2/3, 0, 2/3. With D = 1, a value is
    multiplied by 1 - |t| / 2, so a stack of one slice differs from EG3D's plane.

    Args:
        axes: bases of the stacks [K, 3, 3]; the rows give the coordinates along width, height and slices.
        planes: features [N, K, C, D, H, W].
        points: points [N, P, 3], world units.
        box_warp: side of the box, world units.
        extent: length of a stack along its slices, in sides of the box; 1 in published networks.
    Returns: features [N, K, P, C].
    """
    # Coordinates along width, height and slices, [N, K, P, 3].
    coordinates = torch.einsum("kij,npj->nkpi", axes.to(points), points * (2 / box_warp))
    # grid_sample expects -1..1 over the length of a stack, which is `extent` sides of the box.
    grid = coordinates * coordinates.new_tensor([1.0, 1.0, 1.0 / extent])
    return _read(planes, grid.unsqueeze(2).unsqueeze(2))  # [N, K, 1, 1, P, 3]


def _read(planes: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    """Interpolate planes or stacks of slices at normalised coordinates, with zeros outside.

    Args:
        planes: planes [N, K, C, H, W], or stacks of slices [N, K, C, D, H, W].
        grid: coordinates in -1..1, [N, K, 1, P, 2] for planes, [N, K, 1, 1, P, 3] for stacks.
    Returns: features [N, K, P, C].
    """
    features = grid_sample(
        planes.flatten(0, 1),
        grid.flatten(0, 1).to(planes),
        mode="bilinear",
        padding_mode="zeros",
        align_corners=False,
    )
    # [N * K, C, 1, P] or [N * K, C, 1, 1, P] -> [N, K, P, C]
    return features.flatten(2).unflatten(0, planes.shape[:2]).transpose(2, 3)


def _angle(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Return atan2(y, x). If x and y are 0, the value and the gradient are 0.

    In this case the gradient of torch.atan2 is NaN, and the value of torch.atan2 depends on the signs of the
    zeros.
    """
    is_origin = (x == 0) & (y == 0)
    return torch.atan2(y.masked_fill(is_origin, 0.0), x.masked_fill(is_origin, 1.0))


def spherical(p: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the polar angle [...] from the third axis in 0..pi, and the azimuth [...] in -pi..pi.

    Args: p: points [..., 3].
    """
    x, y, z = p.unbind(-1)
    return _angle(torch.linalg.vector_norm(p[..., :2], dim=-1), z), _angle(y, x)


def sample_balls(planes: torch.Tensor, points: torch.Tensor, box_warp: float) -> torch.Tensor:
    """Interpolate two balls of spherical planes at points, and fuse their features (Li et al. 2024).

    Ball A has the coordinates (q_z, q_y, -q_x): its seam is at the back of the head, its poles are at the
    ears. Ball B has the coordinates (-q_z, -q_x, q_y): its seam is at the front. The spherical coordinates of
    a ball are r = 2 |q| / sqrt 3 - 1, theta = 2 polar / pi - 1 and phi = azimuth / pi, all in -1..1. Its
    three planes span (theta, phi), (theta, r) and (phi, r). With the weight w = (1 + cos pi theta) / 2 * (1 +
    cos pi phi) / 2 of each ball, and the features A and B of the two, the result is (A w_A + B w_B) / (w_A +
    w_B + 1e-8).

    Args:
        planes: features [N, 2, 3, C, H, W] of both balls.
        points: points [N, P, 3], world units.
        box_warp: side of the box, world units.
    Returns: features [N, 3, P, C].
    """
    x, y, z = (points * (2 / box_warp)).unbind(-1)
    # At some points the weights of the two balls are 0. With EPSILON in the denominator, the result is 0
    # there.
    weighted_features = torch.zeros([], device=planes.device)
    weight_sum = torch.full([], EPSILON, device=planes.device)
    for ball, ball_coordinates in zip(planes.unbind(1), ((z, y, -x), (-z, -x, y)), strict=True):
        q = torch.stack(ball_coordinates, dim=-1)  # [N, P, 3]
        polar, azimuth = spherical(q)
        r = torch.linalg.vector_norm(q, dim=-1) * (2 / math.sqrt(3)) - 1
        theta = polar * (2 / math.pi) - 1
        phi = azimuth / math.pi
        # Coordinates on the three planes of the ball, [N, 3, P, 2].
        coordinate_pairs = ((theta, phi), (theta, r), (phi, r))
        grid = torch.stack(
            [torch.stack(coordinate_pair, dim=-1) for coordinate_pair in coordinate_pairs], dim=1
        )
        # [N, 1, P, 1]. The weight is 0 at the seam and the poles of the ball, where the planes are distorted.
        ball_weight = ((1 + torch.cos(math.pi * theta)) * (1 + torch.cos(math.pi * phi)) / 4)[
            :, None, :, None
        ]
        weighted_features = weighted_features + _read(ball, grid.unsqueeze(2)) * ball_weight
        weight_sum = weight_sum + ball_weight
    return weighted_features / weight_sum


def equal_area_square(p: torch.Tensor) -> torch.Tensor:
    """Map the directions of points [..., 3] to points [..., 2] of the square [-1, 1]^2.

    Lambert's equal-area projection maps the sphere of directions to a disc. Its centre is the top of the
    head, and its rim is the direction of the neck. The elliptical map then maps the disc to the square (Li et
    al. 2025).
    """
    x, y, z = p.unbind(-1)
    polar, azimuth = spherical(torch.stack([x, z, -y], dim=-1))
    radius = torch.cos(polar / 2)
    # Coordinates (a, b) on the disc. The angle on the disc is -azimuth.
    a = radius * torch.cos(azimuth)
    b = -radius * torch.sin(azimuth)
    squared_difference = a.square() - b.square()

    def square_coordinate(signed_difference: torch.Tensor, disc_coordinate: torch.Tensor) -> torch.Tensor:
        """Return one coordinate of the elliptical map from the disc to the square."""
        # EPSILON and the clamp keep the roots real and their gradients finite at the rim.
        plus_term = 2 + signed_difference + _ROOT8 * disc_coordinate + EPSILON
        minus_term = 2 + signed_difference - _ROOT8 * disc_coordinate + EPSILON
        return (plus_term.clamp_min(0).sqrt() - minus_term.clamp_min(0).sqrt()) / 2

    return torch.stack(
        [square_coordinate(squared_difference, a), square_coordinate(-squared_difference, b)], dim=-1
    )


def sample_hybrid(
    axes: torch.Tensor, planes: torch.Tensor, points: torch.Tensor, box_warp: float, equal_area: bool
) -> torch.Tensor:
    """Interpolate three planes and a map over directions at points (HyPlaneHead, Li et al. 2025).

    The features of the map depend only on the direction of a point from the origin.

    Args:
        axes: bases of the three planes [3, 3, 3].
        planes: features [N, 4, C, H, W]; the last of the four is the map over directions.
        points: points [N, P, 3], world units.
        box_warp: side of the box, world units.
        equal_area: True: convert directions to coordinates by `equal_area_square`. False: use the two angles
            of SphereHead's ball A.
    Returns: features [N, 4, P, C].
    """
    q = points * (2 / box_warp)
    plane_coordinates = torch.einsum("kij,npj->nkpi", axes[:, :2].to(q), q)  # [N, 3, P, 2]
    if equal_area:
        direction_coordinates = equal_area_square(q)
    else:
        x, y, z = q.unbind(-1)
        polar, azimuth = spherical(torch.stack([z, y, -x], dim=-1))
        direction_coordinates = torch.stack([polar * (2 / math.pi) - 1, azimuth / math.pi], dim=-1)
    grid = torch.cat([plane_coordinates, direction_coordinates[:, None]], dim=1)  # [N, 4, P, 2]
    return _read(planes, grid.unsqueeze(2))


EMPTY = -1000.0  # raw density of empty space
# Value of the option decoder_activation -> last activation of the decoded colours.
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "none": lambda x: x,
    "sigmoid": lambda x: torch.sigmoid(x) * (1 + 2 * 0.001) - 0.001,
    "lrelu": lambda x: functional.leaky_relu(x, 0.2) * math.sqrt(2),
}
# Constructor arguments of the backbone that the background network gets, too.
_CONVOLUTIONS = (
    "channel_base",
    "channel_max",
    "num_fp16_res",
    "conv_clamp",
    "fused_modconv_default",
    "use_noise",
    "fp16_channels_last",
)
# Number of output channels of SphereHead's backbone, and of channels between the two convolutions of a ball.
_BALL_FEATURES = 512, 256


class FeatureDecoder(OSGDecoder):
    """EG3D's decoder with a selectable last activation of the colours.

    Args: n_features: number of input features C; options: rendering options with decoder_activation, see
        `OSGDecoder`.
    """

    def __init__(self, n_features: int, options: dict):
        super().__init__(n_features, options)
        self.activation = options["decoder_activation"]
        check_choice("decoder_activation", self.activation, ACTIVATIONS)

    def decode(self, features: torch.Tensor) -> dict[str, torch.Tensor]:
        """Decode features [N, P, C] that are averaged over planes. See `OSGDecoder.decode` for the result."""
        decoder_outputs = self.net(features)
        return {
            "rgb": ACTIVATIONS[self.activation](decoder_outputs[..., 1:]),
            "sigma": decoder_outputs[..., :1],
        }


class HeadRenderer(ImportanceRenderer):
    """EG3D's renderer with another function that interpolates features at points.

    Colours are not mapped to -1..1. In renders, a point is empty space if its distance along x or z to a face
    of the box is less than the option side_margin (world units; 0.1 if the option is missing; None: no
    margin). Densities at points, for example for a mesh, are not changed, as in the published code.

    Args:
        read: function (axes, planes, points, box_warp) -> features [N, K, P, C].
        plane_layout: layout of the planes, see `generate_planes`.
    """

    def __init__(self, read: Callable[..., torch.Tensor], plane_layout: str):
        super().__init__(plane_layout)
        self.read = read
        self.ray_marcher = MipRayMarcher2(symmetric=False)

    def _decode_at(self, planes, decoder, points, box_warp, sigma_only, merged) -> dict[str, torch.Tensor]:
        """Decode colour and density at points, without noise. See `ImportanceRenderer.run_model`."""
        # [N, K, P, C] -> [N, P, C]
        features = self.read(self.plane_axes, planes, points.to(planes), box_warp).mean(dim=1)
        if not sigma_only:
            return decoder.decode(features)
        # The density needs only one row of the last layer.
        w0, b0, w_sigma, b_sigma = (weight.to(features) for weight in decoder.sigma_weights())
        hidden_units = functional.softplus(functional.linear(features, w0, b0))
        return {"sigma": functional.linear(hidden_units, w_sigma[None], b_sigma[None])}

    def _query(
        self, planes, decoder, origins, directions, depths, options, merged=None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return colours and raw densities along rays, where the margin at the sides of the box is empty."""
        colours, densities = super()._query(planes, decoder, origins, directions, depths, options, merged)
        side_margin = options.get("side_margin", 0.1)
        if side_margin is not None:
            # x and z of the samples, [N, M, S, 2]; the margin does not apply to y.
            sample_positions = (origins.unsqueeze(-2) + depths * directions.unsqueeze(-2))[..., [0, 2]]
            is_in_margin = (sample_positions.abs() > options["box_warp"] / 2 - side_margin).any(
                dim=-1, keepdim=True
            )
            densities = densities.masked_fill(is_in_margin, EMPTY)
        return colours, densities

    def merge(self, planes: torch.Tensor) -> None:
        """Return None, because `triplane_decode` does not support these features."""


class FullHeadGenerator(TriPlaneGenerator, ABC):
    """Base class of the three full-head generators.

    The arguments are those of `TriPlaneGenerator`. The rendering_kwargs contain the options that the module
    docstring lists.
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
        if kwargs.get("plane_slices", 1) != 1:
            raise ValueError(
                f"{type(self).__name__}: plane_slices must be 1 for generators of full heads, got"
                f" {kwargs['plane_slices']}. Only EG3D's tri-planes can have slices."
            )
        plane_resolution = rendering_kwargs["triplane_size"]
        super().__init__(
            rendering_kwargs=rendering_kwargs,
            mapping_kwargs=mapping_kwargs,
            plane_layout=plane_layout,
            plane_resolution=plane_resolution,
            **kwargs,
        )
        # This replaces the renderer that the base class has built.
        self.renderer = HeadRenderer(self._reader(), plane_layout)
        feature_count = kwargs.get("decoder_features") or self.plane_channels
        if rendering_kwargs["use_torgb_raw"]:
            self.torgb = ToRGBLayer(feature_count, 3, self.w_dim)
        if rendering_kwargs["use_background"]:
            background_kwargs = {
                argument_name: argument_value
                for argument_name, argument_value in kwargs.items()
                if argument_name in _CONVOLUTIONS
            }
            # The background network has half as many channels as the backbone.
            background_kwargs["channel_base"] = kwargs.get("channel_base", 32768) // 2
            self.bcg_synthesis = SynthesisNetwork(
                self.w_dim, self.superresolution.input_resolution, feature_count, **background_kwargs
            )
        # Network that maps a latent and a camera to a translation [3] of this camera.
        camera_kwargs = {**(mapping_kwargs or {}), "lr_multiplier": 1.0, "last_activation": "linear"}
        self.t_mapping = MappingNetwork(self.z_dim, self.c_dim, 3, num_ws=1, **camera_kwargs)

    @abstractmethod
    def _reader(self) -> Callable[..., torch.Tensor]:
        """Return the function that interpolates features at points, see `HeadRenderer`."""

    def moved_camera(self, z: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        """Return the cameras [N, 25] from which `forward` renders.

        The network `t_mapping` predicts a translation of each camera in world units. Truncation of the
        latents does not change it.

        Args: z: latents [N, Z]; c: camera labels [N, 25].
        """
        translated_cameras = c.clone()
        # Entries 3, 7 and 11 are the translation column of the row-major 4 x 4 pose. [:, 0] removes the axis
        # L = 1.
        translated_cameras[:, [3, 7, 11]] += self.t_mapping(z, c)[:, 0]
        return translated_cameras

    def render(
        self, planes, ws, c, resolution, options, noise_mode="random", **sr_kwargs
    ) -> dict[str, torch.Tensor]:
        """Render planes from cameras, see `TriPlaneGenerator.render`.

        The result has a further key 'image_mask' [N, 1, r, r], the opacity of the head, stretched
        to -0.001..1.001.
        """
        features, depth, opacity = self._march(planes, c, resolution, options)
        # The features of the background are not scaled, so the scaling comes first.
        features = self.scaled(features)
        if options["use_background"]:
            # The background is visible where the head is transparent.
            features = features + (1 - opacity) * self._background(
                ws, resolution, options["sr_antialias"], noise_mode
            )
        raw_image = self.to_rgb(features, ws)
        image = self.superresolution(
            raw_image, features, ws, noise_mode=options["superresolution_noise_mode"], **sr_kwargs
        )
        image_mask = opacity * (1 + 2 * 0.001) - 0.001  # stretched like the colours of EG3D's sigmoid
        return {
            "image": image,
            "image_raw": raw_image,
            "image_depth": depth,
            "image_opacity": opacity,
            "image_mask": image_mask,
        }

    def scaled(self, features: torch.Tensor) -> torch.Tensor:
        """Map decoded features from 0..1 to -1..1 if they come from a sigmoid, else return them unchanged."""
        return features * 2 - 1 if self.decoder.activation == "sigmoid" else features

    def to_rgb(self, features: torch.Tensor, ws: torch.Tensor) -> torch.Tensor:
        """Convert scaled features [N, F, H, W] to raw colours [N, 3, H, W], which are about in -1..1."""
        return (
            self.torgb(features, ws[:, -1], fused_modconv=False)
            if self.rendering_kwargs["use_torgb_raw"]
            else features[:, :3]
        )

    def _background(
        self, ws: torch.Tensor, resolution: int, antialias: bool, noise_mode: str
    ) -> torch.Tensor:
        """Return the features of the background [N, F, r, r].

        Args:
            ws: style vectors [N, L, W] of the backbone. The background network uses the first of them. If it
                needs more than L, the last one is repeated.
            resolution: pixels per edge r.
            antialias: True: resize with antialiasing.
            noise_mode: noise of the background network: "random", "const" or "none".
        """
        missing_count = max(self.bcg_synthesis.num_ws - ws.shape[1], 0)
        ws = torch.cat([ws, ws[:, -1:].expand(-1, missing_count, -1)], dim=1)[:, : self.bcg_synthesis.num_ws]
        background_features = self.bcg_synthesis(ws, noise_mode=noise_mode)
        return functional.interpolate(
            background_features,
            size=(resolution, resolution),
            mode="bilinear",
            align_corners=False,
            antialias=antialias,
        )


class PanoHeadGenerator(FullHeadGenerator):
    """PanoHead's generator with a tri-grid: three stacks of D = triplane_depth slices (An et al. 2023).

    Channel c of slice d of a stack is the output channel c D + d of the backbone for this stack.
    """

    def _backbone_output(self) -> tuple[int, int]:
        """Return the resolution and the number of channels of the backbone's output."""
        return self.plane_resolution, 3 * self.plane_channels * self.rendering_kwargs["triplane_depth"]

    def _reader(self) -> Callable[..., torch.Tensor]:
        """Return `sample_tri_grid` with the extent of this network."""
        return functools.partial(sample_tri_grid, extent=self.extent)

    @property
    def extent(self) -> float:
        """Length of a stack along its slices, in sides of the box. It is 1 in published networks."""
        return self.rendering_kwargs.get("triplane_extent", 1.0)

    def planes(self, ws: torch.Tensor, noise_mode: str = "random", **synthesis_kwargs) -> torch.Tensor:
        """Generate the slices of the three stacks, [N, 3, C, D, H, W], from ws [N, L, W]."""
        return self.backbone.synthesis(ws, noise_mode=noise_mode, **synthesis_kwargs).unflatten(
            1, (3, self.plane_channels, -1)
        )


class SphereHeadGenerator(FullHeadGenerator):
    """SphereHead's generator (Li et al. 2024), whose features are two balls of three spherical planes each.

    See `sample_balls`.
    """

    ConvA: torch.nn.Sequential
    ConvB: torch.nn.Sequential

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        backbone_channels, inner_channels = _BALL_FEATURES
        ball_channels = self.plane_channels * kwargs["rendering_kwargs"]["triplane_depth"]
        if kwargs["rendering_kwargs"]["triplane_depth"] != 3:
            raise ValueError(
                "triplane_depth: expected 3, the number of planes of a ball of SphereHead, got"
                f" {kwargs['rendering_kwargs']['triplane_depth']}. Set the rendering option triplane_depth to"
                " 3."
            )
        for convolution_name in ("ConvA", "ConvB"):
            layers = (
                Conv2dLayer(backbone_channels, inner_channels, 1, bias=False),
                Conv2dLayer(inner_channels, ball_channels, 1, bias=False),
            )
            setattr(self, convolution_name, torch.nn.Sequential(*layers))

    def _backbone_output(self) -> tuple[int, int]:
        """Return the resolution and the number of channels of the backbone's output."""
        return self.plane_resolution, _BALL_FEATURES[0]

    def _reader(self) -> Callable[..., torch.Tensor]:
        """Return `sample_balls` with the signature that `HeadRenderer` expects. Balls need no plane axes."""
        return lambda axes, planes, points, box_warp: sample_balls(planes, points, box_warp)

    def planes(self, ws: torch.Tensor, noise_mode: str = "random", **synthesis_kwargs) -> torch.Tensor:
        """Generate the planes of both balls, [N, 2, 3, C, H, W], from ws [N, L, W]."""
        features = self.backbone.synthesis(ws, noise_mode=noise_mode, **synthesis_kwargs)
        # Convolutions for each ball on the output of one backbone: [N, 2, 3 C, H, W] -> [N, 2, 3, C, H, W].
        return torch.stack([self.ConvA(features), self.ConvB(features)], dim=1).unflatten(2, (3, -1))


class HyPlaneHeadGenerator(FullHeadGenerator):
    """HyPlaneHead's generator with three planes and a map over directions (Li et al. 2025).

    The backbone outputs one feature map, whose four quadrants are the three planes and the map
    over directions.
    """

    def __init__(self, **kwargs):
        # Only this variant of the published ones is implemented.
        rendering_options = kwargs["rendering_kwargs"]
        supported_options = {
            "multiplane_num": 1,
            "triplane_depth": 1,
            "render_mode": "TriPlane_SingSph_flatten",
        }
        for option_name, supported_value in supported_options.items():
            if rendering_options[option_name] != supported_value:
                raise ValueError(
                    f"{option_name}: only {supported_value!r} is implemented, got"
                    f" {rendering_options[option_name]!r}. Use a network with the rendering option"
                    f" {option_name}={supported_value!r}."
                )
        if rendering_options["sph2cir_flag"] != rendering_options["cir2squ_flag"]:
            raise ValueError(
                f"sph2cir_flag, cir2squ_flag: expected equal values, got {rendering_options['sph2cir_flag']}"
                f" and {rendering_options['cir2squ_flag']}. Set both rendering options to the same value."
            )
        super().__init__(**kwargs)

    def _backbone_output(self) -> tuple[int, int]:
        """Return the resolution and the number of channels of the backbone's output."""
        return 2 * self.plane_resolution, self.plane_channels

    def _reader(self) -> Callable[..., torch.Tensor]:
        """Return `sample_hybrid` with the map over directions of this network."""
        return functools.partial(sample_hybrid, equal_area=self.rendering_kwargs["sph2cir_flag"])

    def planes(self, ws: torch.Tensor, noise_mode: str = "random", **synthesis_kwargs) -> torch.Tensor:
        """Generate the planes and the map over directions, [N, 4, C, H, W], from ws [N, L, W].

        The map over directions is the last of the four.
        """
        features = self.backbone.synthesis(ws, noise_mode=noise_mode, **synthesis_kwargs)  # [N, C, 2 H, 2 W]
        upper_half, lower_half = features.chunk(2, dim=2)
        # The quadrants in row-major order.
        return torch.stack([*upper_half.chunk(2, dim=3), *lower_half.chunk(2, dim=3)], dim=1)
