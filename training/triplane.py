"""Tri-plane generator of EG3D (Chan et al. 2022): backbone, renderer, decoder and super-resolution.

The backbone, a StyleGAN2 generator, outputs three feature planes. A point in space is projected onto each of
them. The decoder maps the mean of the three features to raw density and colour. The renderer accumulates
these along rays, and the super-resolution module enlarges the rendered image.

Shapes: N is the number of images in a batch, Z is z_dim, K is c_dim (25), W is w_dim, L is num_ws, C is the
number of plane channels, P of points, and D of decoder features. A plane has H x W texels; r and R are the
numbers of rendered and of final pixels per edge.
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
    """Two-layer perceptron that maps plane features to raw density and colour features.

    Args:
        n_features: number of input features C.
        options: decoder_lr_mul (factor on the learning rate), decoder_hidden_dim (number of hidden units, 64
            if missing) and decoder_output_dim (number of colour features D).
    """

    def __init__(self, n_features: int, options: dict):
        super().__init__()
        lr_mul = options["decoder_lr_mul"]
        self.hidden_dim = options.get("decoder_hidden_dim", 64)
        self.net = torch.nn.Sequential(
            FullyConnectedLayer(n_features, self.hidden_dim, lr_multiplier=lr_mul),
            torch.nn.Softplus(),
            FullyConnectedLayer(self.hidden_dim, 1 + options["decoder_output_dim"], lr_multiplier=lr_mul),
        )

    def forward(
        self, sampled_features: torch.Tensor, ray_directions: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """Decode plane features.

        Args:
            sampled_features: features of the three planes at points, [N, 3, P, C].
            ray_directions: argument of EG3D's signature without effect.
        Returns: a dict with the colour features 'rgb' [N, P, D] in -0.001..1.001, and the raw density 'sigma'
            [N, P, 1].
        """
        del ray_directions
        return self.decode(sampled_features.mean(dim=1))

    def decode(self, features: torch.Tensor) -> dict[str, torch.Tensor]:
        """Decode features [N, P, C] that are averaged over planes. Return the same dict as `forward`."""
        decoder_outputs = self.net(features)
        # As in MipNeRF, the sigmoid is stretched to [-0.001, 1.001], so that 0 and 1 can be reached exactly.
        return {
            "rgb": torch.sigmoid(decoder_outputs[..., 1:]) * (1 + 2 * 0.001) - 0.001,
            "sigma": decoder_outputs[..., :1],
        }

    def weights(self, dtype: torch.dtype | None = None) -> DecoderWeights:
        """Return the scaled weights of both layers, for `triplane_decode`. Differentiable in the parameters.

        Args: dtype: dtype of the result; None: the dtype of the parameters.
        Returns: a tuple of four tensors: the weight [hidden, C] and the bias [hidden] of the first layer, and
            the weight [1 + D, hidden] and the bias [1 + D] of the last layer.
        """
        # net[1] is the softplus, which has no weights.
        first_layer: typing.Any = self.net[0]
        last_layer: typing.Any = self.net[2]
        return DecoderWeights(
            first_layer.effective_weight(dtype),
            first_layer.effective_bias(dtype),
            last_layer.effective_weight(dtype),
            last_layer.effective_bias(dtype),
        )

    def sigma_weights(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the scaled weights that the density depends on. Differentiable in the parameters.

        Returns: a tuple of four tensors: the weight [hidden, C] and the bias [hidden] of the first layer, and
            the weight [hidden] and the bias [] of the density output.
        """
        decoder_weights = self.weights()
        # Output 0 is the density.
        return decoder_weights.w0, decoder_weights.b0, decoder_weights.w1[0], decoder_weights.b1[0]


class TriPlaneGenerator(torch.nn.Module):
    """EG3D's generator.

    The constructor has EG3D's arguments, and further arguments for sizes that are constant in EG3D.

    Args:
        z_dim: number of entries of a latent Z.
        c_dim: number of entries of a camera label K.
        w_dim: number of entries of a style vector W.
        img_resolution: final pixels per edge R.
        img_channels: number of channels of the final image.
        sr_num_fp16_res: any number above 0: super-resolution in half precision on CUDA.
        mapping_kwargs: further arguments of `MappingNetwork`.
        rendering_kwargs: EG3D's rendering options, see training/config.py.
        sr_kwargs: further arguments of the super-resolution module.
        plane_resolution: texels per edge of a plane; 256 in EG3D.
        plane_channels: number of channels of a plane C; 32 in EG3D.
        plane_layout: "eg3d" for released checkpoints, "fixed" for three different planes.
        plane_slices: 2: one half of the xy plane's channels counts in front and the other half at the back,
            see `training.rendering.renderer.SLICE_BLEND`; 1: all count everywhere, as in released
            checkpoints. The weights have the same names and shapes in both cases.
        decoder_hidden_dim: number of hidden units of the decoder; 64 in EG3D.
        neural_rendering_resolution: rendered pixels per edge r.
        decoder_features: number of decoder features D, of which the first three are RGB;
            None: plane_channels.
        synthesis_kwargs: further arguments of `SynthesisNetwork`.
    """

    # Subclasses for other families of generators have other decoders.
    decoder_class = OSGDecoder

    def __init__(
        self,
        z_dim: int,
        c_dim: int,
        w_dim: int,
        img_resolution: int,
        img_channels: int,
        sr_num_fp16_res: int = 0,
        mapping_kwargs: dict | None = None,
        rendering_kwargs: dict | None = None,
        sr_kwargs: dict | None = None,
        plane_resolution: int = 256,
        plane_channels: int = 32,
        plane_layout: str = "eg3d",
        plane_slices: int = 1,
        decoder_hidden_dim: int = 64,
        neural_rendering_resolution: int = 64,
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
        self.plane_slices = plane_slices
        # A copy, because callers may change their options later.
        self.rendering_kwargs = dict(rendering_kwargs or {})
        self.neural_rendering_resolution = neural_rendering_resolution
        self.renderer = ImportanceRenderer(plane_layout, plane_slices)
        self.ray_sampler = RaySampler()
        # For the backbone, an ordinary StyleGAN2 generator, the planes are an image with many channels.
        backbone_resolution, backbone_channels = self._backbone_output()
        self.backbone = Generator(
            z_dim,
            c_dim,
            w_dim,
            img_resolution=backbone_resolution,
            img_channels=backbone_channels,
            mapping_kwargs=mapping_kwargs,
            **synthesis_kwargs,
        )
        # Number of features that are accumulated along rays. The first three are the raw image, and all of
        # them are the input of super-resolution.
        feature_count = decoder_features or plane_channels
        sr_class = module_by_name(self.rendering_kwargs["superresolution_module"])
        self.superresolution = sr_class(
            channels=feature_count,
            img_resolution=img_resolution,
            sr_num_fp16_res=sr_num_fp16_res,
            sr_antialias=self.rendering_kwargs["sr_antialias"],
            w_dim=w_dim,
            **(sr_kwargs or {}),
        )
        decoder_options = {
            "decoder_lr_mul": 1,  # default for networks whose rendering_kwargs do not contain it
            **self.rendering_kwargs,
            "decoder_output_dim": feature_count,
            "decoder_hidden_dim": decoder_hidden_dim,
        }
        self.decoder = self.decoder_class(plane_channels, decoder_options)
        # Planes that `synthesis` stored with cache_backbone=True.
        self._last_planes: torch.Tensor | None = None

    def _backbone_output(self) -> tuple[int, int]:
        """Return the resolution and the number of channels of the backbone's output."""
        return self.plane_resolution, 3 * self.plane_channels

    @property
    def num_ws(self) -> int:
        """Number of style vectors L of the backbone, which is 14 for planes of 256 texels."""
        return self.backbone.num_ws

    def mapping(
        self,
        z: torch.Tensor,
        c: torch.Tensor,
        truncation_psi: float = 1.0,
        truncation_cutoff: int | None = None,
        update_emas: bool = False,
    ) -> torch.Tensor:
        """Map latents to style vectors ws [N, L, W].

        Args:
            z: latents [N, Z].
            c: camera labels [N, K] that the mapping network is conditioned on. The labels are multiplied by
                the rendering option c_scale (0 if missing, as in EG3D). If the generator is not conditioned
                on cameras, the labels have no effect.
            truncation_psi, truncation_cutoff, update_emas: see `MappingNetwork.forward`.
        """
        if self.rendering_kwargs["c_gen_conditioning_zero"]:
            # The mapping network always embeds a label.
            c = torch.zeros_like(c)
        c = c * self.rendering_kwargs.get("c_scale", 0)
        return self.backbone.mapping(
            z, c, truncation_psi=truncation_psi, truncation_cutoff=truncation_cutoff, update_emas=update_emas
        )

    def planes(self, ws: torch.Tensor, noise_mode: str = "random", **synthesis_kwargs) -> torch.Tensor:
        """Generate planes [N, 3, C, H, W] from style vectors ws [N, L, W]."""
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
        """Synthesise planes and render them from cameras.

        Args:
            ws: style vectors [N, L, W].
            c: camera labels [N, 25]: 16 numbers of cam2world, 9 of the intrinsics.
            neural_rendering_resolution: rendered pixels per edge r, also for later calls; None: the value of
                the last call.
            update_emas: argument of EG3D's signature without effect.
            cache_backbone: True: store the planes for a later call.
            use_cached_backbone: True: use the stored planes if there are any.
            synthesis_kwargs: further arguments of `SynthesisBlock.forward`, such as noise_mode.
        Returns: a dict with 'image' [N, 3, R, R]; 'image_raw' [N, 3, r, r] in (-1, 1); 'image_depth' [N, 1,
            r, r], the distance from the camera along the ray; 'image_opacity' [N, 1, r, r], the sum of the
            ray's weights (not in EG3D).
        """
        del update_emas
        # The training loop passes the resolution of its schedule. Snapshots contain the last one.
        if neural_rendering_resolution is not None:
            self.neural_rendering_resolution = neural_rendering_resolution
        # In the first call with use_cached_backbone there are no stored planes, so they are computed.
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
        """Render planes from cameras, without any change of the network's state.

        Args:
            planes: planes [N, 3, C, H, W] that were generated from ws.
            ws: style vectors [N, L, W], which the super-resolution module needs.
            c: camera labels [N, 25].
            resolution: rendered pixels per edge r.
            options: rendering options, like rendering_kwargs.
            noise_mode: noise of further synthesis networks, which other families have. The noise mode of
                super-resolution is an option.
            sr_kwargs: further arguments of the super-resolution module.
        Returns: the same dict as `synthesis`.
        """
        feature_image, depth_image, opacity = self._march(planes, c, resolution, options)
        raw_image = feature_image[:, :3]  # [N, D, r, r] -> [N, 3, r, r]; the first three features are RGB
        image = self.superresolution(
            raw_image, feature_image, ws, noise_mode=options["superresolution_noise_mode"], **sr_kwargs
        )
        return {"image": image, "image_raw": raw_image, "image_depth": depth_image, "image_opacity": opacity}

    def _march(
        self, planes: torch.Tensor, c: torch.Tensor, resolution: int, options: dict
    ) -> list[torch.Tensor]:
        """Render planes from cameras c [N, 25].

        Returns: features [N, D, r, r], depth [N, 1, r, r] and opacity [N, 1, r, r].
        """
        # The label is row-major: 16 numbers of the pose, then 9 of the intrinsics.
        cam2world = c[:, :16].reshape(-1, 4, 4)
        intrinsics = c[:, 16:25].reshape(-1, 3, 3)
        origins, directions = self.ray_sampler(cam2world, intrinsics, resolution)
        # Raw densities exceed 50, for which bfloat16 is not precise enough.
        with torch.autocast(planes.device.type, enabled=False):
            rendered_tensors = self.renderer(planes.float(), self.decoder, origins, directions, options)
        # [N, r * r, D] -> [N, D, r, r]; rays are in row-major order of pixels.
        return [
            rendered_tensor.transpose(1, 2).unflatten(2, (resolution, resolution)).contiguous()
            for rendered_tensor in rendered_tensors
        ]

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
        """Return colour and raw density at points, for latents.

        Args:
            coordinates, directions, synthesis_kwargs: see `sample_mixed`.
            z, c, truncation_psi, truncation_cutoff, update_emas: see `mapping`.
        Returns: the same dict as `sample_mixed`.
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
        """Return colour and raw density at points, for style vectors.

        Args:
            coordinates: points [N, P, 3], world units.
            directions: ignored, because colours do not depend on the viewing direction.
            ws: style vectors [N, L, W].
            truncation_psi, truncation_cutoff, update_emas: arguments of EG3D's signature without effect.
                `mapping` truncates ws.
            sigma_only: True: leave out 'rgb', which saves time.
            synthesis_kwargs: further arguments of `SynthesisBlock.forward`, such as noise_mode.
        Returns: a dict with the colour features 'rgb' [N, P, D] and the raw density 'sigma' [N, P, 1].
        """
        del truncation_psi, truncation_cutoff, update_emas
        # The planes are generated in each call; planes that `synthesis` stored are not used.
        planes = self.planes(ws, **synthesis_kwargs)
        rendering_options = self.rendering_kwargs
        return self.renderer.run_model(
            planes, self.decoder, coordinates, directions, rendering_options, sigma_only=sigma_only
        )

    def moved_camera(self, z: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        """Return the cameras [N, 25] from which `forward` renders.

        Here they are the cameras c themselves. Subclasses may move the cameras depending on the latents.

        Args: z: latents [N, Z]; c: camera labels [N, 25].
        """
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
        """Map latents to images. The cameras c are the conditioning and also the cameras of the render.

        Subclasses may move the cameras of the render (`moved_camera`).

        Args:
            z: latents [N, Z].
            c: camera labels [N, 25].
            truncation_psi, truncation_cutoff, update_emas: see `mapping`.
            neural_rendering_resolution, cache_backbone, use_cached_backbone, synthesis_kwargs:
                see `synthesis`.
        Returns: the same dict as `synthesis`.
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
