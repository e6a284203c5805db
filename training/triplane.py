"""Tri-plane generator of EG3D (Chan et al. 2022): backbone, renderer, decoder and super-resolution.

The backbone, a StyleGAN2 generator, outputs three feature planes. A point in space is projected onto each of
them; the decoder turns the mean of the three features into raw density and colour. Rays are rendered from
these, and the super-resolution module enlarges the result.

Shapes: N batch, Z z_dim, K c_dim (25), W w_dim, L num_ws, C plane channels, P points, D decoder features, r
rendered and R final resolution.
"""

import typing

import torch

from torch_utils.ops.triplane_decode import DecoderWeights
from training.layers import FullyConnectedLayer
from training.rendering.cameras import RaySampler
from training.rendering.renderer import ImportanceRenderer
from training.superresolution import module_by_name
from training.synthesis import Generator


class OSGDecoder(torch.nn.Module):
    """Two-layer perceptron from plane features, averaged over planes, to raw density and colour features."""

    def __init__(self, n_features: int, options: dict):
        super().__init__()
        lr_mul = options["decoder_lr_mul"]  # below 1: the decoder learns more slowly than the planes
        self.hidden_dim = options.get("decoder_hidden_dim", 64)
        self.net = torch.nn.Sequential(
            FullyConnectedLayer(n_features, self.hidden_dim, lr_multiplier=lr_mul),
            torch.nn.Softplus(),
            FullyConnectedLayer(self.hidden_dim, 1 + options["decoder_output_dim"], lr_multiplier=lr_mul),
        )

    def forward(
        self, sampled_features: torch.Tensor, ray_directions: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """Decode sampled_features [N, 3, P, C] to {'rgb': [N, P, D], 'sigma': [N, P, 1] raw}."""
        del ray_directions  # part of EG3D's signature; there is no view dependence
        return self.decode(sampled_features.mean(dim=1))

    def decode(self, features: torch.Tensor) -> dict[str, torch.Tensor]:
        """Decode features [N, P, C] that are averaged over planes already; returns the same as `forward`."""
        x = self.net(features)
        # The sigmoid is stretched to [-0.001, 1.001], as in MipNeRF, so that 0 and 1 can be reached exactly.
        return {"rgb": torch.sigmoid(x[..., 1:]) * (1 + 2 * 0.001) - 0.001, "sigma": x[..., :1]}

    def weights(self, dtype: torch.dtype | None = None) -> DecoderWeights:
        """Return the effective weights of both layers. Differentiable.

        Returns: w0 [hidden, C], b0 [hidden], w1 [1 + D, hidden], b1 [1 + D].
        """
        # net[1] is the softplus. The compiled decoder takes weights, not modules.
        first: typing.Any = self.net[0]
        last: typing.Any = self.net[2]
        return DecoderWeights(
            first.effective_weight(dtype),
            first.effective_bias(dtype),
            last.effective_weight(dtype),
            last.effective_bias(dtype),
        )

    def sigma_weights(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the effective weights that the density depends on. Differentiable.

        Returns: w0 [hidden, C], b0 [hidden], w_sigma [hidden], b_sigma [].
        """
        weights = self.weights()
        return weights.w0, weights.b0, weights.w1[0], weights.b1[0]  # output 0 is the density


class TriPlaneGenerator(torch.nn.Module):
    """EG3D's generator.

    It has EG3D's constructor, and arguments for sizes that are constants there: plane_resolution (256),
    plane_channels (32), decoder_features (None: the number of plane channels; the first three features are
    the colour), decoder_hidden_dim (64), and plane_layout ("eg3d" for released checkpoints, "fixed" for three
    different planes).
    """

    # Families of generators that derive from EG3D replace the decoder by their own.
    decoder_class = OSGDecoder

    def __init__(
        self,
        z_dim: int,
        c_dim: int,
        w_dim: int,
        img_resolution: int,  # R, pixels of the final image
        img_channels: int,
        sr_num_fp16_res: int = 0,  # above 0: super-resolution in half precision
        mapping_kwargs: dict | None = None,
        rendering_kwargs: dict | None = None,  # EG3D's rendering options; see training/config.py
        sr_kwargs: dict | None = None,
        plane_resolution: int = 256,
        plane_channels: int = 32,
        plane_layout: str = "eg3d",
        decoder_hidden_dim: int = 64,
        neural_rendering_resolution: int = 64,  # r, pixels
        decoder_features: int | None = None,
        **synthesis_kwargs,
    ):
        super().__init__()
        self.z_dim = z_dim
        self.c_dim = c_dim
        self.w_dim = w_dim
        self.img_resolution = img_resolution
        self.img_channels = img_channels
        self.plane_resolution = plane_resolution
        self.plane_channels = plane_channels
        self.plane_layout = plane_layout
        # A copy: callers change their options after construction.
        self.rendering_kwargs = dict(rendering_kwargs or {})
        self.neural_rendering_resolution = neural_rendering_resolution
        self.renderer = ImportanceRenderer(plane_layout)
        self.ray_sampler = RaySampler()
        # The planes are an image with many channels, for which the backbone is an ordinary StyleGAN2.
        size, channels = self._backbone_output()
        self.backbone = Generator(
            z_dim,
            c_dim,
            w_dim,
            img_resolution=size,
            img_channels=channels,
            mapping_kwargs=mapping_kwargs,
            **synthesis_kwargs,
        )
        # What rays accumulate: the first three features are the raw
        # image, all of them go to super-resolution.
        features = decoder_features or plane_channels
        sr_class = module_by_name(self.rendering_kwargs["superresolution_module"])
        self.superresolution = sr_class(
            channels=features,
            img_resolution=img_resolution,
            sr_num_fp16_res=sr_num_fp16_res,
            sr_antialias=self.rendering_kwargs["sr_antialias"],
            w_dim=w_dim,
            **(sr_kwargs or {}),
        )
        options = {
            "decoder_lr_mul": 1,  # for networks whose rendering_kwargs do not have it
            **self.rendering_kwargs,
            "decoder_output_dim": features,
            "decoder_hidden_dim": decoder_hidden_dim,
        }
        self.decoder = self.decoder_class(plane_channels, options)
        self._last_planes: torch.Tensor | None = None  # see cache_backbone in `synthesis`

    def _backbone_output(self) -> tuple[int, int]:
        """Return resolution and number of channels of the backbone's output."""
        return self.plane_resolution, 3 * self.plane_channels

    @property
    def num_ws(self) -> int:
        """Number of ws of the backbone (14 at plane resolution 256)."""
        return self.backbone.num_ws

    def mapping(
        self,
        z: torch.Tensor,
        c: torch.Tensor,
        truncation_psi: float = 1.0,
        truncation_cutoff: int | None = None,
        update_emas: bool = False,
    ) -> torch.Tensor:
        """Map z [N, Z] and a conditioning camera c [N, K] to ws [N, L, W].

        c is replaced by zeros if the generator is not conditioned on cameras. Otherwise it is scaled by
        rendering_kwargs['c_scale'], which is 0 if missing, as in EG3D.
        """
        if self.rendering_kwargs["c_gen_conditioning_zero"]:
            c = torch.zeros_like(c)  # the mapping network still embeds a label, of zeros
        c = c * self.rendering_kwargs.get("c_scale", 0)
        return self.backbone.mapping(
            z, c, truncation_psi=truncation_psi, truncation_cutoff=truncation_cutoff, update_emas=update_emas
        )

    def planes(self, ws: torch.Tensor, noise_mode: str = "random", **synthesis_kwargs) -> torch.Tensor:
        """Generate planes [N, 3, C, H, W] from ws [N, L, W]."""
        planes = self.backbone.synthesis(ws, noise_mode=noise_mode, **synthesis_kwargs)
        return planes.unflatten(1, (3, self.plane_channels))  # [N, 3C, H, W] -> [N, 3, C, H, W]

    def synthesis(
        self,
        ws: torch.Tensor,
        c: torch.Tensor,
        neural_rendering_resolution: int | None = None,
        update_emas: bool = False,
        cache_backbone: bool = False,
        use_cached_backbone: bool = False,
        **synthesis_kwargs,
    ) -> dict[str, torch.Tensor]:
        """Render from a camera.

        Args:
            ws: [N, L, W].
            c: [N, 25] camera (16 cam2world, 9 intrinsics).
            neural_rendering_resolution: rendered pixels per edge. A value is kept for later calls; None takes
                the last one.
            update_emas: part of EG3D's signature, without effect.
            cache_backbone: keep the planes for a later call.
            use_cached_backbone: reuse the planes of the last call that kept them.
        Returns: 'image' [N, 3, R, R]; 'image_raw' [N, 3, r, r] in (-1, 1); 'image_depth' [N, 1, r, r], the
            distance along the unit ray; 'image_opacity' [N, 1, r, r], the sum of the weights (not in EG3D).
        """
        del update_emas
        # The training loop sets the resolution through this argument; snapshots then store the last one.
        if neural_rendering_resolution is not None:
            self.neural_rendering_resolution = neural_rendering_resolution
        # With use_cached_backbone but nothing cached, as in the first call, the planes are computed.
        planes = self._last_planes if use_cached_backbone else None
        planes = self.planes(ws, **synthesis_kwargs) if planes is None else planes
        if cache_backbone:
            self._last_planes = planes
        return self.render(
            planes, ws, c, self.neural_rendering_resolution, self.rendering_kwargs, **synthesis_kwargs
        )

    def render(
        self,
        planes: torch.Tensor,
        ws: torch.Tensor,
        c: torch.Tensor,
        resolution: int,
        options: dict,
        noise_mode: str = "random",
        **sr_kwargs,
    ) -> dict[str, torch.Tensor]:
        """Render given planes. This changes no state of the network.

        Args:
            planes: [N, 3, C, H, W], made from ws.
            ws: [N, L, W], for super-resolution.
            c: [N, 25] camera.
            resolution: rendered pixels per edge.
            options: like rendering_kwargs.
            noise_mode: for further synthesis networks, which other families have. Super-resolution takes its
                mode from the options.
        Returns: the same as `synthesis`.
        """
        feature_image, depth_image, opacity = self._march(planes, c, resolution, options)
        rgb = feature_image[:, :3]  # [N, D, r, r] -> [N, 3, r, r]
        image = self.superresolution(
            rgb, feature_image, ws, noise_mode=options["superresolution_noise_mode"], **sr_kwargs
        )
        return {"image": image, "image_raw": rgb, "image_depth": depth_image, "image_opacity": opacity}

    def _march(
        self, planes: torch.Tensor, c: torch.Tensor, resolution: int, options: dict
    ) -> list[torch.Tensor]:
        """Render features [N, D, r, r], depth and opacity [N, 1, r, r] from cameras c [N, 25]."""
        # The label is row-major: 16 numbers of the pose, then 9 of the intrinsics.
        cam2world = c[:, :16].reshape(-1, 4, 4)
        intrinsics = c[:, 16:25].reshape(-1, 3, 3)
        origins, directions = self.ray_sampler(cam2world, intrinsics, resolution)
        # Densities reach 50 and more, for which bfloat16 is too coarse.
        with torch.autocast(planes.device.type, enabled=False):
            rendered = self.renderer(planes.float(), self.decoder, origins, directions, options)
        # [N, r * r, D] -> [N, D, r, r]; rays are in row-major order of pixels.
        return [x.transpose(1, 2).unflatten(2, (resolution, resolution)).contiguous() for x in rendered]

    def sample(
        self,
        coordinates,
        directions,
        z,
        c,
        truncation_psi=1.0,
        truncation_cutoff=None,
        update_emas=False,
        **synthesis_kwargs,
    ) -> dict[str, torch.Tensor]:
        """Return colour and raw density at points [N, P, 3] for latents z [N, Z] and conditioning c [N, K].

        Args: as `mapping` and `sample_mixed`.
        """
        ws = self.mapping(
            z, c, truncation_psi=truncation_psi, truncation_cutoff=truncation_cutoff, update_emas=update_emas
        )
        return self.sample_mixed(coordinates, directions, ws, **synthesis_kwargs)

    def sample_mixed(
        self,
        coordinates: torch.Tensor,
        directions: torch.Tensor | None,
        ws: torch.Tensor,
        truncation_psi: float = 1.0,
        truncation_cutoff: int | None = None,
        update_emas: bool = False,
        sigma_only: bool = False,
        **synthesis_kwargs,
    ) -> dict[str, torch.Tensor]:
        """Return colour and raw density at points.

        Args:
            coordinates: [N, P, 3], world units.
            directions: not used: there is no view dependence.
            ws: [N, L, W].
            sigma_only: leave 'rgb' out, which saves time.
        Returns: {'rgb': [N, P, D], 'sigma': [N, P, 1]}.

        The truncation arguments have no effect, as in EG3D: ws are truncated by `mapping`.
        """
        del truncation_psi, truncation_cutoff, update_emas
        # Synthesised anew on each call; the cache of `synthesis` is not used.
        planes = self.planes(ws, **synthesis_kwargs)
        options = self.rendering_kwargs
        return self.renderer.run_model(
            planes, self.decoder, coordinates, directions, options, sigma_only=sigma_only
        )

    def moved_camera(self, z: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        """Return the cameras [N, 25] from which `forward` renders latents z [N, Z]: here c itself."""
        return c

    def forward(
        self,
        z,
        c,
        truncation_psi=1.0,
        truncation_cutoff=None,
        neural_rendering_resolution=None,
        update_emas=False,
        cache_backbone=False,
        use_cached_backbone=False,
        **synthesis_kwargs,
    ) -> dict[str, torch.Tensor]:
        """Map z [N, Z], conditioned on camera c [N, 25], to ws and render them from the same camera.

        Other families may move that camera (`moved_camera`). Arguments and result are those of `synthesis`.
        """
        ws = self.mapping(
            z, c, truncation_psi=truncation_psi, truncation_cutoff=truncation_cutoff, update_emas=update_emas
        )
        return self.synthesis(
            ws,
            self.moved_camera(z, c),
            neural_rendering_resolution=neural_rendering_resolution,
            update_emas=update_emas,
            cache_backbone=cache_backbone,
            use_cached_backbone=use_cached_backbone,
            **synthesis_kwargs,
        )
