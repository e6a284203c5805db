"""Family of Hunyuan3D-2.1, a generator of untextured shapes: one flow over a set of latent vectors.

The paint stage of the published generator is a diffusion model of images. It is not supported.

Shapes: N number of samples, T latent vectors of a sample, C channels of a latent vector, L number of
conditioning tokens, E channels of a token, P points on a mesh, f further features of a point, V vertices,
F faces.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from eg3d_rlhf.core.interfaces import Mesh
from eg3d_rlhf.geometry.mesh import extract_mesh_blockwise
from eg3d_rlhf.geometry.mesh_export import save_mesh
from eg3d_rlhf.models.dino import Dino
from eg3d_rlhf.models.hunyuan3d import (
    BOUND,
    AutoencoderConfig,
    Denoiser,
    DenoiserConfig,
    ShapeDecoder,
    ShapeEncoder,
)
from eg3d_rlhf.models.image_preprocessing import on_white, read_cut_out, short_side
from eg3d_rlhf.models.weights import empty
from eg3d_rlhf.tuning.flow.base.conditioning import Conditioning
from eg3d_rlhf.tuning.flow.base.family import FlowFamily, SizedStage
from eg3d_rlhf.tuning.flow.base.stage import FlowPath, FlowStage, Sampling, TokenSet
from eg3d_rlhf.tuning.flow.families import ADDRESSES, register
from eg3d_rlhf.tuning.flow.families import hunyuan3d_files as files
from eg3d_rlhf.tuning.flow.families.folder import (
    OpenedFolder,
    check_finite,
    embedding_progress,
    read_mesh,
    sample_surface_points,
)

SHAPE = "shape"  # name of the stage
MAIN = "main"  # name of the only conditioning tensor
# Published settings of the sampler: number of points of time, and the strength s of guidance, where the
# guided velocity is v_null + s (v_cond - v_null).
STEPS = 50
SCALE = 5.0
LORA_TARGETS = ("to_q", "to_k", "to_v", "out_proj")  # linear layers of both attentions
CELLS = 128  # default cells per axis of the grid on which a mesh for viewing is extracted
LONGEST_SIDE = 2 * 0.9999  # longest side of a mesh before it is encoded, in the original's units
NOTICE = (
    "Hunyuan3D-2.1 is under Tencent's community licence, which grants nothing in the European Union, the"
    " United Kingdom and South Korea, limits large services, and does not allow to improve other AI models"
    " with its outputs (5.b). Read the file LICENSE beside its weights."
)


class Unbounded(ValueError):
    """Error that is raised for a shape without a surface."""


@dataclass(frozen=True)
class ShapeAsset:
    """Finished shape: a latent with its decoder, from which `surface` extracts a mesh."""

    latent: torch.Tensor  # [T, C]
    decoder: ShapeDecoder

    @torch.no_grad()
    def surface(self, cells: int) -> tuple[np.ndarray, np.ndarray]:
        """Extract the surface as a triangle mesh.

        The grid is evaluated block by block, and the surface is closed at the border of the grid.

        Args:
            cells: number of cells per axis of the grid.
        Returns: vertices [V, 3] within +-1.01, and faces [F, 3], counter-clockwise seen from outside.

        Deviates: the grid is regular. Published vertices are index / n instead of index / (n - 1) for n =
            cells + 1 points, which is a mistake in the original.

        Raises: Unbounded if the shape has no surface; ValueError for values that are not finite.
        """
        # n cells have n + 1 grid points; the axes x, y and z are equal.
        grid_coordinates = torch.linspace(-BOUND, BOUND, cells + 1, device=self.latent.device)
        decoded_latents = self.decoder(self.latent[None])
        # Range of all values, for the error message if there is no surface. NaN marks values that are not
        # finite.
        low = math.inf
        high = -math.inf

        def evaluate_slab(x_slice: slice) -> torch.Tensor:
            """Evaluate the grid points of a range of indices along x, and update the range of values."""
            nonlocal low, high
            slab_values = self.decoder.slab(decoded_latents, grid_coordinates, x_slice)
            is_finite = bool(slab_values.isfinite().all())
            low = min(low, float(slab_values.min()))
            high = max(high, float(slab_values.max())) if is_finite else math.nan
            return slab_values

        try:
            # The surface is where the value is 0; values inside the shape are positive.
            return extract_mesh_blockwise(evaluate_slab, [grid_coordinates.double().cpu()] * 3, 0.0)
        except ValueError:
            # Values that are not finite have another cause than a missing surface.
            if not (math.isfinite(low) and math.isfinite(high)):
                raise
            raise Unbounded(
                f"The shape has no surface: all values are between {low:g} and {high:g}, and the surface"
                " would be at 0. Use a trained network or another seed."
            ) from None


def call(
    network: nn.Module, x_t: torch.Tensor, t: torch.Tensor, cond: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """Call the network as the original program does, where t = 1 is data and t = 0 is noise.

    Args:
        network: network of the flow.
        x_t: noisy latents [N, T, C].
        t: times [N] in 0..1.
        cond: conditioning tensors by name.
    """
    return network(x_t, t, contexts=dict(cond))


class ShapePipeline(OpenedFolder):
    """Pipeline of the only stage; implements `Pipeline` without `advance`.

    Decoder and encoder are read when they are first needed.
    """

    def __init__(
        self,
        shape_files: files.ShapeFiles,
        model: Denoiser,
        conditioning: Conditioning | None,
        parts: Callable[[str], nn.Module],
        device: str | torch.device = "cpu",
    ):
        """Build the stage.

        Args:
            shape_files: settings of config.yaml.
            model: network of the flow.
            conditioning: embeddings of the images, or None if nothing is sampled.
            parts: function that reads the decoder or the encoder by its name.
            device: device of decoder and encoder.
        Raises: ValueError if the conditioning does not fit the model.
        """
        super().__init__(conditioning, parts, device, {})
        self.file = shape_files
        if conditioning is not None:
            conditioning.check("conditioning", {MAIN: shape_files.tokens}, REMEDY)
        self.stages = [
            FlowStage(
                name=SHAPE,
                model=model,
                # A set of latent vectors without positions.
                latents=TokenSet(tokens=shape_files.model.input_size, channels=shape_files.model.in_channels),
                call=call,
                data_at_one=True,
                # As published: no noise is added to data, and training times are uniform.
                path=FlowPath(sigma_min=0.0, schedule="uniform"),
                sampling=sampling(shape_files.shift),
                lora_targets=LORA_TARGETS,
            )
        ]

    def decode(self, x_0: torch.Tensor) -> list[ShapeAsset]:
        """Decode latents [N, T, C] to N shapes. Raises: ValueError for latents that are not finite."""
        check_finite("decode", x_0)
        return [ShapeAsset(latent.detach().float(), self.part(DECODER_HALF)) for latent in x_0]

    def encode(self, assets: Sequence[Mesh]) -> list[dict[str, Any]]:
        """Encode meshes as latents. Each mesh is first moved and scaled to fit into the cube.

        The encoder reads random points on a mesh, which are the same at every call.

        Returns: for each mesh, a dictionary with the latent [T, C] of the stage.
        """
        encoder: ShapeEncoder = self.part(ENCODING_HALF)
        latents: list[dict[str, Any]] = []
        for mesh in assets:
            # A new generator per mesh, so that a latent does not depend on the other meshes.
            generator = torch.Generator().manual_seed(0)
            points = surface_points(mesh, self.file.vae, generator)
            latents.append({SHAPE: encoder.latents(points, generator).cpu()})
        return latents


def surface_points(mesh: Mesh, config: AutoencoderConfig, generator: torch.Generator) -> torch.Tensor:
    """Sample points uniformly on a mesh's surface, as input of the encoder.

    Args:
        mesh: triangle mesh; it is moved and scaled to fit into the cube.
        config: configuration with the number P of points, and the number f of columns besides the position.
        generator: random generator on the CPU.
    Returns: points [P, 3 + f] float32. The columns are the position, the normal of the face and, if the
        config has it, a flag for points on sharp edges, which is 0.
    Raises: ValueError for a mesh without area, or for a config that requires points on sharp edges.
    """
    if config.pc_sharpedge_size:
        # The original does not publish how it finds sharp edges.
        raise ValueError(
            f"config.yaml, vae: pc_sharpedge_size is {config.pc_sharpedge_size}, but meshes can only be"
            " encoded with 0, because sampling points on sharp edges is not supported. Pass latents instead"
            " of meshes."
        )
    positions, normals = sample_surface_points(mesh, LONGEST_SIDE, config.pc_size, generator)
    # point_feats counts the normal and the flag: 3 without the flag, 4 with it.
    sharp_edge_flag = torch.zeros(len(positions), config.point_feats - 3, dtype=torch.float64)
    return torch.cat([positions, normals, sharp_edge_flag], 1).float()


def sampling(shift: float = 1.0) -> Sampling:
    """Return the settings of the published sampler in the convention of this package.

    The published times are 50 points from 0 (noise) to 1 (data), which gives 49 steps. They are shifted by
    t' = a t / (1 + (a - 1) t). In this package, time runs from 1 (noise) to 0 (data) and is shifted by
    t' = r t / (1 + (r - 1) t), which is the same for r = 1 / a. The published guidance v_null + s (v_cond -
    v_null) has the strength w = s - 1 in this package, at all times.

    Args: shift: a in the formula of the published times, > 0.
    """
    return Sampling(steps=STEPS - 1, cfg_strength=SCALE - 1, cfg_interval=(0.0, 1.0), rescale_t=1 / shift)


DECODER_HALF = "decoder"
ENCODING_HALF = "encoder"
REMEDY = "`eg3d-rlhf flow new`, by the DINOv2 of this checkpoint"
PARTS: dict[str, Callable[..., nn.Module]] = {DECODER_HALF: files.decoder, ENCODING_HALF: files.encoder}


def as_image(pixels: np.ndarray) -> torch.Tensor:
    """Convert an image of bytes [h, w, 3] to an image [1, 3, h, w] of values 0..1."""
    return torch.from_numpy(pixels.astype(np.float32) / 255).permute(2, 0, 1)[None]


def image_tokens(shape_files: files.ShapeFiles, encoder: Dino, images: torch.Tensor) -> torch.Tensor:
    """Encode images [N, 3, h, w] of values 0..1 as tokens [N, L, E], after the last norm.

    Args:
        shape_files: settings of config.yaml.
        encoder: DINOv2 network.
        images: images [N, 3, h, w].
    """
    tokens = encoder(short_side(images, shape_files.encoder.pixels))
    # The class token is the first token. Some configurations remove it.
    return (tokens if shape_files.class_token else tokens[:, 1:]).float()


class Hunyuan3d(FlowFamily):
    """Family of Hunyuan3D-2.1; see `FlowFamily` for its attributes and methods."""

    name = "hunyuan3d"
    layout = "config.yaml of Hunyuan3D-2.1's shape and its checkpoint"
    stages = (SHAPE,)
    version = "Hunyuan3D-2.1, shapes"
    address = ADDRESSES["hunyuan3d"]
    notice = NOTICE
    loaded_by = (
        "from hy3dshape.pipelines import Hunyuan3DDiTFlowMatchingPipeline;"
        ' Hunyuan3DDiTFlowMatchingPipeline.from_pretrained("{out}")'
    )
    cells = CELLS
    recognises = staticmethod(files.recognises)
    read_asset = staticmethod(read_mesh)
    networks = staticmethod(files.networks)
    release = staticmethod(files.release)

    def files(self, root: Path, stages: Sequence[str] | None = None) -> dict[str, Path]:
        """Return config.yaml and the checkpoint, by file name. `stages` is not used."""
        shape_files = files.read_files(root)
        return {
            files.CONFIG: shape_files.root / files.CONFIG,
            shape_files.checkpoint.name: shape_files.checkpoint,
        }

    def load(
        self,
        root: Path,
        conditioning: Conditioning | None,
        *,
        stages: Sequence[str] | None = None,
        dtype: torch.dtype | None = torch.float32,
        device: str | torch.device = "cpu",
    ) -> ShapePipeline:
        """Read the pipeline; see `FlowFamily.load`.

        Decoder and encoder are read when they are first needed.
        """
        shape_files = files.read_files(root)

        def read_part(name: str) -> nn.Module:
            """Read a decoder or an encoder by its name."""
            return PARTS[name](shape_files, files.read_sections(shape_files.checkpoint), device)

        # If the flow is not needed, as for encoding and decoding, it stays on the meta device without
        # weights.
        if stages is not None and SHAPE not in stages:
            return ShapePipeline(
                shape_files, empty(partial(Denoiser, shape_files.model)), conditioning, read_part, device
            )
        sections = files.read_sections(shape_files.checkpoint)
        if conditioning is not None:
            conditioning.check_source("conditioning", files.source_of(shape_files, sections), REMEDY)
        # Names and shapes of the decoder are checked now, before anything expensive is computed.
        files.decoding_half(shape_files, sections)
        model = files.denoiser(shape_files, sections, dtype, device)
        # Recomputing blocks saves the memory of their activations.
        model.recompute = True
        return ShapePipeline(shape_files, model, conditioning, read_part, device)

    def condition(self, pipeline: ShapePipeline, stage: str) -> dict[str, list[int]]:
        """Return the shape [L, E] of the only conditioning tensor, by its name."""
        return {MAIN: pipeline.file.tokens}

    @torch.no_grad()
    def embed_images(self, root: Path, images: Mapping[str, Path], device: torch.device) -> Conditioning:
        """Embed images with transparent backgrounds by the DINOv2 model in the checkpoint."""
        shape_files = files.read_files(root)
        # Only the image encoder is needed; the flow's section may be missing.
        sections = files.read_sections(shape_files.checkpoint, (files.CONDITIONER,))
        encoder = files.image_encoder(shape_files, sections, device)
        tokens = {}
        for name, path in embedding_progress(images.items(), "image"):
            # The second value is the object's mask. Only the image over white is encoded.
            pixels, _ = read_cut_out(
                path, lambda image: on_white(image, shape_files.image_size, shape_files.border)
            )
            tokens[name] = {MAIN: image_tokens(shape_files, encoder, as_image(pixels).to(device))[0].cpu()}
        return Conditioning(tokens=tokens, encoder=files.source_of(shape_files, sections), zero_null=True)

    def show(self, asset: ShapeAsset, path: Path, cells: int | None = None) -> Path:
        """Write the surface of a shape to <path>.obj.

        For a shape without a surface, as of an untrained network, the reason is written to <path>.txt.

        Args:
            asset: shape.
            path: path of the file without ending.
            cells: cells per axis of the grid on which the surface is extracted; None means 128.
        Returns: path of the file.
        Raises: ValueError for values that are not finite.
        """
        try:
            # The ending is appended and does not replace a suffix, because names may contain dots.
            return save_mesh(path.with_name(path.name + ".obj"), *asset.surface(cells or CELLS))
        except Unbounded as error:
            reason_file = path.with_name(path.name + ".txt")
            reason_file.write_text(f"{error}\n")
            return reason_file

    def released(self) -> dict[str, Callable[[], list[SizedStage]]]:
        """Return the function that builds the published stage, by the generator's name."""
        return {"Hunyuan3D-2.1": released_stages}


def released_stages() -> list[SizedStage]:
    """Build the stage of Hunyuan3D-2.1 without weights, for estimates of memory and time.

    The sizes are copied from the published config.yaml.
    """
    config = DenoiserConfig(
        input_size=4096,
        in_channels=64,
        hidden_size=2048,
        context_dim=1024,
        depth=21,
        num_heads=16,
        text_len=1370,
        qk_norm=True,
        qkv_bias=False,
        num_moe_layers=6,
        num_experts=8,
        moe_top_k=2,
        use_attention_pooling=False,
    )
    # The sampler's shift has its default, because estimates depend only on sizes.
    stage = FlowStage(
        name=SHAPE,
        model=empty(partial(Denoiser, config)),
        latents=TokenSet(tokens=4096, channels=64),
        call=call,
        data_at_one=True,
        sampling=sampling(),
        lora_targets=LORA_TARGETS,
    )
    return [SizedStage(stage=stage, conditioning={MAIN: [1370, 1024]})]


FAMILY = register(Hunyuan3d())
