"""Hunyuan3D-2.1, a generator of untextured shapes: one flow over a set of latent vectors.

Its paint stage is a diffusion model of images and is not supported here.

Shape letters as in models/hunyuan3d.py.
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
from eg3d_rlhf.tuning.flow.base.conditioning import Conditions
from eg3d_rlhf.tuning.flow.base.family import FlowFamily, SizedStage
from eg3d_rlhf.tuning.flow.base.stage import FlowPath, FlowStage, Sampling, TokenSet
from eg3d_rlhf.tuning.flow.families import hunyuan3d_files as files
from eg3d_rlhf.tuning.flow.families import register
from eg3d_rlhf.tuning.flow.families.folder import (
    OpenedFolder,
    check_finite,
    embedding_progress,
    even_points,
    read_mesh,
)

SHAPE = "shape"  # name of the stage
MAIN = "main"  # name of the only conditioning tensor
# Published settings of the sampler: points of time, and s in v_null + s (v_cond - v_null).
STEPS = 50
SCALE = 5.0
LORA_TARGETS = ("to_q", "to_k", "to_v", "out_proj")  # linear layers of both attentions
CELLS = 128  # default cells per axis of the grid on which a mesh for viewing is extracted
REACH = 2 * 0.9999  # longest side of a mesh before it is encoded, in the original's units
NOTICE = (
    "Hunyuan3D-2.1 is under Tencent's community licence, which grants nothing in the European Union, the"
    " United Kingdom and South Korea, limits large services, and forbids to improve other AI models by its"
    " outputs (5.b): read the LICENSE beside its weights."
)


class Unbounded(ValueError):
    """Error for a shape without a surface."""


@dataclass(frozen=True)
class ShapeAsset:
    """A finished shape. Its surface is extracted on a grid on demand."""

    latent: torch.Tensor  # [T, C]
    decoder: ShapeDecoder

    @torch.no_grad()
    def surface(self, cells: int) -> tuple[np.ndarray, np.ndarray]:
        """Extract vertices [V, 3] within +-1.01 and faces [F, 3], counter-clockwise seen from outside.

        The grid is evaluated block by block, and the surface is closed at the border.

        Deviates: the grid is regular. Published vertices are index / n instead of index / (n - 1) for n =
            cells + 1 points, which is a mistake in the original.

        Raises: Unbounded; ValueError for values that are not finite.
        """
        axis = torch.linspace(-BOUND, BOUND, cells + 1, device=self.latent.device)
        decoded = self.decoder(self.latent[None])
        # Range of all values, for the error message if there is no surface.
        low = math.inf
        high = -math.inf

        def sample(x: slice) -> torch.Tensor:
            nonlocal low, high
            numbers = self.decoder.slab(decoded, axis, x)
            finite = bool(numbers.isfinite().all())
            low = min(low, float(numbers.min()))
            high = max(high, float(numbers.max())) if finite else math.nan
            return numbers

        try:
            # The surface is at 0; inside is positive.
            return extract_mesh_blockwise(sample, [axis.double().cpu()] * 3, 0.0)
        except ValueError:
            # Values that are not finite have another cause than a missing surface.
            if not (math.isfinite(low) and math.isfinite(high)):
                raise
            raise Unbounded(
                f"The shape has no surface: all values lie between {low:g} and {high:g}, and the surface is"
                " at 0. Use a trained network or another latent."
            ) from None


def call(
    module: nn.Module, x_t: torch.Tensor, t: torch.Tensor, cond: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """Call the network with the original's arguments; its t is 1 at the data."""
    return module(x_t, t, contexts=dict(cond))


class ShapePipeline(OpenedFolder):
    """Pipeline of one stage; implements `Pipeline`, without `advance`.

    Both halves of the autoencoder are read when they are first needed.
    """

    def __init__(
        self,
        file: files.ShapeFiles,
        model: Denoiser,
        conditioning: Conditions | None,
        parts: Callable[[str], nn.Module],
        device: str | torch.device = "cpu",
    ):
        """Build the stage. Args: conditioning: None if nothing is sampled. parts: see `OpenedFolder`."""
        super().__init__(conditioning, parts, device, {})
        self.file = file
        if conditioning is not None:
            conditioning.check("conditioning", {MAIN: file.tokens}, REMEDY)
        self.stages = [
            FlowStage(
                name=SHAPE,
                model=model,
                # A set of tokens without positions
                latents=TokenSet(tokens=file.model.input_size, channels=file.model.in_channels),
                call=call,
                data_at_one=True,
                # As published: no noise at the data, uniform times
                path=FlowPath(sigma_min=0.0, schedule="uniform"),
                sampling=sampling(file.shift),
                lora_targets=LORA_TARGETS,
            )
        ]

    def decode(self, x_0: torch.Tensor) -> list[ShapeAsset]:
        """Decode latents [N, T, C] to shapes."""
        check_finite("decode", x_0)
        return [ShapeAsset(latent.detach().float(), self.part(DECODER_HALF)) for latent in x_0]

    def encode(self, assets: Sequence[Mesh]) -> list[dict[str, Any]]:
        """Encode meshes as latents, the encoder's mean. Each mesh is first fitted into the cube.

        The points on a mesh are random but the same at every call.
        """
        network: ShapeEncoder = self.part(ENCODING_HALF)
        made: list[dict[str, Any]] = []
        for mesh in assets:
            # One generator per mesh: the latent does not depend on the other meshes.
            draw = torch.Generator().manual_seed(0)
            made.append({SHAPE: network.latents(surface_points(mesh, self.file.vae, draw), draw).cpu()})
        return made


def surface_points(mesh: Mesh, config: AutoencoderConfig, draw: torch.Generator) -> torch.Tensor:
    """Sample uniform points on a mesh's surface, [P, 3 + f]: position in the cube, the face's normal, and
    optionally the flag of sharp edges, which is 0.

    Raises: ValueError for a mesh without area, or a config that asks for points on sharp edges.
    """
    if config.pc_sharpedge_size:
        # The original does not publish how it finds sharp edges.
        raise ValueError(
            "config.yaml, vae: expected pc_sharpedge_size 0 to encode meshes, got"
            f" {config.pc_sharpedge_size}. Sampling points on sharp edges is not supported: pass latents."
        )
    places, normals = even_points(mesh, REACH, config.pc_size, draw)
    flag = torch.zeros(len(places), config.point_feats - 3, dtype=torch.float64)
    return torch.cat([places, normals, flag], 1).float()


def sampling(shift: float = 1.0) -> Sampling:
    """Return the published sampler in this package's convention.

    The published times run from 0 (noise) to 1 in STEPS points, which is one step fewer, and are shifted by
    t' = s t / (1 + (s - 1) t). Here time runs from 1 to 0 and is shifted by r t / (1 + (r - 1) t), which is
    the same for r = 1 / s. The published guidance v_null + s (v - v_null) has the strength w = s - 1 here, at
    all times.

    Args: shift: s of the times.
    """
    return Sampling(steps=STEPS - 1, cfg_strength=SCALE - 1, cfg_interval=(0.0, 1.0), rescale_t=1 / shift)


DECODER_HALF = "decoder"
ENCODING_HALF = "encoder"
REMEDY = "`eg3d-rlhf flow new`, by the DINOv2 of this checkpoint"
PARTS: dict[str, Callable[..., nn.Module]] = {DECODER_HALF: files.decoder, ENCODING_HALF: files.encoder}


def as_picture(pixels: np.ndarray) -> torch.Tensor:
    """Convert bytes [h, w, 3] to an image [1, 3, h, w] of values 0..1."""
    return torch.from_numpy(pixels.astype(np.float32) / 255).permute(2, 0, 1)[None]


def picture_tokens(file: files.ShapeFiles, network: Dino, images: torch.Tensor) -> torch.Tensor:
    """Encode images [N, 3, h, w] of values 0..1 as tokens [N, L, E], after the last norm."""
    tokens = network(short_side(images, file.encoder.pixels))
    # The class token is the first one.
    return (tokens if file.class_token else tokens[:, 1:]).float()


class Hunyuan3d(FlowFamily):
    """Family of Hunyuan3D-2.1; see `FlowFamily` for its attributes and methods."""

    name = "hunyuan3d"
    layout = "config.yaml of Hunyuan3D-2.1's shape and its checkpoint"
    stages = (SHAPE,)
    version = "Hunyuan3D-2.1, shapes"
    address = "https://huggingface.co/tencent/Hunyuan3D-2.1"
    notice = NOTICE
    loaded_by = 'Hunyuan3DDiTFlowMatchingPipeline.from_pretrained("{out}")'
    cells = CELLS
    recognises = staticmethod(files.recognises)
    read_asset = staticmethod(read_mesh)
    networks = staticmethod(files.networks)
    release = staticmethod(files.release)

    def files(self, root: Path, stages: Sequence[str] | None = None) -> dict[str, Path]:
        """Return config.yaml and the checkpoint, by name."""
        file = files.read_files(root)
        return {files.CONFIG: file.root / files.CONFIG, file.checkpoint.name: file.checkpoint}

    def load(
        self,
        root: Path,
        conditions: Conditions | None,
        *,
        stages: Sequence[str] | None = None,
        dtype: torch.dtype | None = torch.float32,
        device: str | torch.device = "cpu",
    ) -> ShapePipeline:
        """Read the pipeline; see `FlowFamily.load`. Both halves of the autoencoder are read when they are
        first needed.
        """
        file = files.read_files(root)

        def part(name: str) -> nn.Module:
            return PARTS[name](file, files.read_sections(file.checkpoint), device)

        # Without its stage, the flow stays on the meta device, for encoding and decoding alone.
        if stages is not None and SHAPE not in stages:
            return ShapePipeline(file, empty(partial(Denoiser, file.model)), conditions, part, device)
        sections = files.read_sections(file.checkpoint)
        if conditions is not None:
            conditions.check_source("conditions", files.source_of(file, sections), REMEDY)
        # Checks names and shapes of the decoder now, before anything expensive is computed.
        files.decoding_half(file, sections)
        model = files.denoiser(file, sections, dtype, device)
        # Recomputing blocks saves the memory of their activations.
        model.recompute = True
        return ShapePipeline(file, model, conditions, part, device)

    def condition(self, pipeline: ShapePipeline, stage: str) -> dict[str, list[int]]:
        """Return the shape of the conditioning, [L, E] of the only tensor."""
        return {MAIN: pipeline.file.tokens}

    @torch.no_grad()
    def embed_images(self, root: Path, images: Mapping[str, Path], device: torch.device) -> Conditions:
        """Embed images with transparent backgrounds by the checkpoint's own DINOv2."""
        file = files.read_files(root)
        # Only the image encoder is needed; the flow's section may be missing.
        sections = files.read_sections(file.checkpoint, (files.CONDITIONER,))
        network = files.image_encoder(file, sections, device)
        tokens = {}
        for name, path in embedding_progress(images.items(), "image"):
            # The mask is not used: the network sees the object on white.
            pixels, _ = read_cut_out(path, lambda image: on_white(image, file.picture, file.border))
            tokens[name] = {MAIN: picture_tokens(file, network, as_picture(pixels).to(device))[0].cpu()}
        return Conditions(tokens=tokens, encoder=files.source_of(file, sections), zero_null=True)

    def show(self, asset: ShapeAsset, path: Path, cells: int | None = None) -> Path:
        """Write a mesh as .obj. For a shape without a surface, as of an untrained network, write a text that
        says so.

        Raises: ValueError for values that are not finite.
        """
        try:
            # Appended and not replaced as a suffix, because names may contain dots.
            return save_mesh(path.with_name(path.name + ".obj"), *asset.surface(cells or CELLS))
        except Unbounded as error:
            file = path.with_name(path.name + ".txt")
            file.write_text(f"{error}\n")
            return file

    def released(self) -> dict[str, Callable[[], list[SizedStage]]]:
        """Return the function that builds the published stage, by the generator's name."""
        return {"Hunyuan3D-2.1": released_stages}


def released_stages() -> list[SizedStage]:
    """Build the stage of Hunyuan3D-2.1 without weights, with the sizes of its config.yaml."""
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
    # Only sizes matter for estimates, so the sampler's shift is left at its default.
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
