"""Hunyuan3D-2.1: a generator of shapes alone, a flow over a set of latent vectors in one stage.

Its paint stage is a diffusion model of images and no part of this.

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
    embedding,
    even_points,
    read_mesh,
)

SHAPE = "shape"  # name of the stage
MAIN = "main"  # name of the only tensor of a condition
# published: points of time, and s of v_null + s (v_cond - v_null)
STEPS = 50
SCALE = 5.0
LORA_TARGETS = ("to_q", "to_k", "to_v", "out_proj")
# per axis of the grid that a mesh to look at is read from
CELLS = 128
REACH = 2 * 0.9999  # longest side of a mesh that is encoded
NOTICE = (
    "Hunyuan3D-2.1 is under Tencent's community licence, which grants nothing in the European Union, the"
    " United Kingdom and South Korea, limits large services, and forbids to improve other AI models by its"
    " outputs (5.b): read the LICENSE beside its weights."
)


class Unbounded(ValueError):
    """A shape without a surface."""


@dataclass(frozen=True)
class ShapeAsset:
    """A finished shape, read on a grid when it is asked for."""

    latent: torch.Tensor  # [T, C]
    decoder: ShapeDecoder

    @torch.no_grad()
    def surface(self, cells: int) -> tuple[np.ndarray, np.ndarray]:
        """Vertices [V, 3] within +-1.01 and faces [F, 3] counter-clockwise from outside; the grid is read
        block by block.

        Deviates: on a straight grid; published vertices are index / n, not index / (n - 1), of n = cells + 1
        points (a slip). Closed at the border.
        Raises: Unbounded; ValueError for numbers that are not finite.
        """
        axis = torch.linspace(-BOUND, BOUND, cells + 1, device=self.latent.device)
        decoded = self.decoder(self.latent[None])
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
            return extract_mesh_blockwise(sample, [axis.double().cpu()] * 3, 0.0)
        except ValueError:
            if not (math.isfinite(low) and math.isfinite(high)):
                raise
            raise Unbounded(
                f"No surface: all numbers lie between {low:g} and {high:g}; inside is above 0."
            ) from None


def call(
    module: nn.Module, x_t: torch.Tensor, t: torch.Tensor, cond: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """The network's own call; its t is 1 at the data."""
    return module(x_t, t, contexts=dict(cond))


class ShapePipeline(OpenedFolder):
    """See stage.Pipeline; one stage, so nothing is advanced. Both halves of the autoencoder are loaded when
    they are first needed.
    """

    def __init__(
        self,
        file: files.ShapeFiles,
        model: Denoiser,
        conditions: Conditions | None,
        parts: Callable[[str], nn.Module],
        device: str | torch.device = "cpu",
    ):
        """Args: conditions: None where nothing is sampled."""
        super().__init__(conditions, parts, device, {})
        self.file = file
        if conditions is not None:
            conditions.check("conditions", {MAIN: file.tokens}, REMEDY)
        self.stages = [
            FlowStage(
                name=SHAPE,
                model=model,
                latents=TokenSet(tokens=file.model.input_size, channels=file.model.in_channels),
                call=call,
                data_at_one=True,
                path=FlowPath(sigma_min=0.0, schedule="uniform"),
                sampling=sampling(file.shift),
                lora_targets=LORA_TARGETS,
            )
        ]

    def decode(self, x_0: torch.Tensor) -> list[ShapeAsset]:
        """Shapes of latents."""
        check_finite("decode", x_0)
        return [ShapeAsset(latent.detach().float(), self.part(DECODER_HALF)) for latent in x_0]

    def encode(self, assets: Sequence[Mesh]) -> list[dict[str, Any]]:
        """Latents of meshes, the encoder's mean. Each mesh is brought into the cube first; points are drawn,
        always alike.
        """
        network: ShapeEncoder = self.part(ENCODING_HALF)
        made: list[dict[str, Any]] = []
        for mesh in assets:
            draw = torch.Generator().manual_seed(0)
            made.append({SHAPE: network.latents(surface_points(mesh, self.file.vae, draw), draw).cpu()})
        return made


def surface_points(mesh: Mesh, config: AutoencoderConfig, draw: torch.Generator) -> torch.Tensor:
    """Even points of a mesh's surface [P, 3 + f]: place in the cube, the face's normal, where asked for the
    flag of no sharp edge.

    Raises: ValueError for a mesh without area, or a config that asks for points on sharp edges.
    """
    if config.pc_sharpedge_size:
        got = f"{config.pc_sharpedge_size}. How sharp edges are found is not known here: give latents"
        raise ValueError(f"config.yaml, vae: expected pc_sharpedge_size 0 to encode meshes, got {got}.")
    places, normals = even_points(mesh, REACH, config.pc_size, draw)
    flag = torch.zeros(len(places), config.point_feats - 3, dtype=torch.float64)
    return torch.cat([places, normals, flag], 1).float()


def sampling(shift: float = 1.0) -> Sampling:
    """The published sampler in this package's terms.

    Its times are 0 (noise) to 1 in STEPS points, so one step fewer, moved by t' = s t / (1 + (s - 1) t); here
    time runs from 1 down and is moved by r t / (1 + (r - 1) t), the same with r = 1 / s. Its guidance
    v_null + s (v - v_null) is w = s - 1 here, at all times.
    """
    return Sampling(steps=STEPS - 1, cfg_strength=SCALE - 1, cfg_interval=(0.0, 1.0), rescale_t=1 / shift)


DECODER_HALF = "decoder"
ENCODING_HALF = "encoder"
REMEDY = "`eg3d-rlhf flow new`, by the DINOv2 of this checkpoint"
PARTS: dict[str, Callable[..., nn.Module]] = {DECODER_HALF: files.decoder, ENCODING_HALF: files.encoder}


def as_picture(pixels: np.ndarray) -> torch.Tensor:
    """Bytes [h, w, 3] -> [1, 3, h, w] of 0..1."""
    return torch.from_numpy(pixels.astype(np.float32) / 255).permute(2, 0, 1)[None]


def picture_tokens(file: files.ShapeFiles, network: Dino, pictures: torch.Tensor) -> torch.Tensor:
    """Pictures [N, 3, h, w] of 0..1 -> tokens [N, L, E] after the last norm."""
    tokens = network(short_side(pictures, file.encoder.pixels))
    return (tokens if file.class_token else tokens[:, 1:]).float()


class Hunyuan3d(FlowFamily):
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
        """See `FlowFamily.load`. Both halves of the autoencoder are read when they are first needed."""
        file = files.read_files(root)

        def part(name: str) -> nn.Module:
            return PARTS[name](file, files.read_sections(file.checkpoint), device)

        if stages is not None and SHAPE not in stages:
            return ShapePipeline(file, empty(partial(Denoiser, file.model)), conditions, part, device)
        sections = files.read_sections(file.checkpoint)
        if conditions is not None:
            conditions.check_source("conditions", files.source_of(file, sections), REMEDY)
        files.decoding_half(file, sections)  # of names and shapes, before anything is computed
        model = files.denoiser(file, sections, dtype, device)
        model.recompute = True
        return ShapePipeline(file, model, conditions, part, device)

    def condition(self, pipeline: ShapePipeline, stage: str) -> dict[str, list[int]]:
        return {MAIN: pipeline.file.tokens}

    @torch.no_grad()
    def embed_images(self, root: Path, images: Mapping[str, Path], device: torch.device) -> Conditions:
        """Embed images with transparent backgrounds by the checkpoint's own DINOv2."""
        file = files.read_files(root)
        sections = files.read_sections(file.checkpoint, (files.CONDITIONER,))
        network = files.image_encoder(file, sections, device)
        tokens = {}
        for name, path in embedding(images.items(), "picture"):
            pixels, _ = read_cut_out(path, lambda image: on_white(image, file.picture, file.border))
            tokens[name] = {MAIN: picture_tokens(file, network, as_picture(pixels).to(device))[0].cpu()}
        return Conditions(tokens=tokens, encoder=files.source_of(file, sections), zero_null=True)

    def show(self, asset: ShapeAsset, path: Path, cells: int | None = None) -> Path:
        """Write a mesh, .obj; a shape without a surface, such as an untrained network makes, leaves a text
        that says so.

        Raises: ValueError for numbers that are not finite.
        """
        try:
            return save_mesh(path.with_name(path.name + ".obj"), *asset.surface(cells or CELLS))
        except Unbounded as error:
            file = path.with_name(path.name + ".txt")
            file.write_text(f"{error}\n")
            return file

    def released(self) -> dict[str, Callable[[], list[SizedStage]]]:
        return {"Hunyuan3D-2.1": released_stages}


def released_stages() -> list[SizedStage]:
    """Make the stage of Hunyuan3D-2.1 without weights."""
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
