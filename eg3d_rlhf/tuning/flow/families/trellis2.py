"""Family of TRELLIS.2, a generator in three or four stages that is conditioned on images.

The stages are structure, shape and texture. In a *cascade*, the shape is sampled twice: shape_512 on coarse
voxels, and shape_1024 on finer voxels. Each stage determines the voxels of the next stage:

    structure    its decoder gives the occupancy of a grid, which is pooled to the resolution of the shape
    shape_512    in a cascade, its decoder divides voxels into finer ones, which are merged to the grid of
                 shape_1024
    last shape   the texture has the same voxels as the last shape stage, and reads its latents

Latents of the structure are not normalised. Other latents are stored normalised, in the scale of their flows.
The tuning loop trains structure and shape. Assets are encoded by their dual grids (geometry/dual_grid.py).

Shapes: N number of samples, C channels, R grid points per axis, v voxels of a sample, L number of
conditioning tokens, E channels of a token, W voxels of an asset.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from eg3d_rlhf.core.interfaces import Mesh
from eg3d_rlhf.geometry.dual_grid import DualGrid, dual_grid
from eg3d_rlhf.models.dino import Dino3, read_dino3
from eg3d_rlhf.models.image_preprocessing import on_black_first, read_cut_out
from eg3d_rlhf.models.sparse import Batch, Latent, SparseBatch, SparseSample
from eg3d_rlhf.models.trellis.autoencoders import grid_of, voxels_of
from eg3d_rlhf.models.trellis2 import Flow, VoxelAsset, VoxelDecoder, VoxelEncoder, assets_of
from eg3d_rlhf.tuning.flow.base.conditioning import Conditioning
from eg3d_rlhf.tuning.flow.base.family import FlowFamily, Network, Release, SizedStage
from eg3d_rlhf.tuning.flow.base.problem import Problem
from eg3d_rlhf.tuning.flow.base.settings import ProblemSource
from eg3d_rlhf.tuning.flow.base.stage import DenseGrid, FlowPath, FlowStage, LatentKind, SparseVoxels, Voxels
from eg3d_rlhf.tuning.flow.families import ADDRESSES, print_notice, register
from eg3d_rlhf.tuning.flow.families import trellis2_files as files
from eg3d_rlhf.tuning.flow.families.encoders import image_encoder_network
from eg3d_rlhf.tuning.flow.families.folder import (
    EncodingFolder,
    check_finite,
    embedding_progress,
    occupy_best_voxel,
    return_memory_if_large,
)
from eg3d_rlhf.tuning.flow.families.learned_evaluators import RewardOfPairs
from eg3d_rlhf.tuning.flow.families.opening import open_folder, pairs_in
from eg3d_rlhf.tuning.flow.families.trellis2_assets import (
    centred,
    dual_grid_at,
    dual_grid_of,
    encoded_shape,
    read_asset,
    show,
)
from eg3d_rlhf.tuning.flow.families.trellis_files import (
    conditioning_widths,
    find_model,
    flows_of,
    has_model,
    networks_of,
    release_of,
)

# Names of the two conditioning tensors. A name is the number of pixels per side of the encoded image.
SMALL = "512"
LARGER = "1024"


class Trellis2Pipeline(EncodingFolder):
    """Pipeline of all stages of TRELLIS.2; implements `Pipeline`. Its assets are `VoxelAsset`.

    Decoders and encoders are loaded when they are first needed.
    """

    def __init__(
        self,
        pipeline_file: files.PipelineFile,
        flows: Mapping[str, nn.Module],
        conditioning: Conditioning | None,
        parts: Callable[[str], nn.Module],
        device: str | torch.device = "cpu",
    ):
        """Build the stages.

        Args:
            pipeline_file: settings of pipeline.json.
            flows: networks by stage name. The texture's network may be missing; the shape is then the last
                stage.
            conditioning: embeddings of the images, or None if nothing is sampled.
            parts: function that reads a decoder or an encoder by its name in pipeline.json.
            device: device of decoders and encoders.
        Raises: ValueError if conditioning, pipeline.json and networks do not fit each other.
        """
        super().__init__(conditioning, parts, device, pipeline_file.normalization)
        self.file = pipeline_file
        # The most recent asset, the resolution, and its dual grid with materials; see `_grid`.
        self._cached_grid: tuple[Any, int, tuple[DualGrid, torch.Tensor | None]] | None = None
        # FlowConfig of every stage.
        self.configs: dict[str, Any] = {
            name: flows[name].config for name in pipeline_file.flows if name in flows
        }
        if conditioning is not None:
            conditioning.check_source("conditioning", source_of(pipeline_file), "`eg3d-rlhf flow new`")
        # Name of the last shape stage, whose latents are decoded.
        self.shape = [name for name in self.configs if name in (files.LOW, files.HIGH)][-1]
        self.stages = [self._make_stage(name, flows[name]) for name in self.configs]
        for name, (mean, _) in pipeline_file.normalization.items():
            channels = self.configs[name].out_channels if name in self.configs else len(mean)
            if len(mean) != channels:
                normalization_name = files.NORMALIZATIONS[name]
                raise ValueError(
                    f"pipeline.json: {normalization_name} has {len(mean)} channels, but the model of stage"
                    f" {name!r} has {channels}. Use pipeline.json and models of one release."
                )
        # The texture's flow must read as many channels as the shape's latents have.
        shape_channels = self.configs[self.shape].out_channels
        if files.TEXTURE in self.configs and self.configs[files.TEXTURE].given != shape_channels:
            raise ValueError(
                f"stage {files.TEXTURE!r}: the model reads {self.configs[files.TEXTURE].given} channels of"
                f" the shape, but the shape has {shape_channels}. Use models of one release."
            )

    def cells(self, stage: str) -> int:
        """Return the number of grid cells per axis of a stage's latents.

        A cascade may lower the resolution of a sample; the largest number is returned.
        """
        # The texture uses the shape's grid; the resolution in the file of its model may differ.
        latent_stage = self.shape if stage == files.TEXTURE else stage
        # The pipeline "1536_cascade" uses the flow of resolution 1024 on a finer grid.
        resolution_factor = (
            CASCADE_1536_FACTOR if latent_stage == files.HIGH and self.file.kind == "1536_cascade" else 1
        )
        return int(self.configs[latent_stage].resolution * resolution_factor)

    def _make_stage(self, name: str, model: nn.Module) -> FlowStage:
        """Build the stage `name` with its network. Raises: ValueError if the conditioning does not fit it."""
        config = self.configs[name]
        uses_voxels = name != files.STRUCTURE
        self.check_tokens(name, config.cond_channels, f"Embed the images with {self.file.encoder}.")
        latent_kwargs = dict(channels=config.out_channels, resolution=self.cells(name))
        latents: LatentKind = (
            SparseVoxels(**latent_kwargs, given=config.given) if uses_voxels else DenseGrid(**latent_kwargs)
        )
        # The published distributions of training times: logit-normal for the structure, uniform for others.
        path = FlowPath(
            sigma_min=self.file.sigma_min[name], schedule="uniform" if uses_voxels else "logit-normal"
        )
        return FlowStage(
            name=name, model=model, latents=latents, path=path, sampling=self.file.sampling[name]
        )

    def conditioning_key(self, stage: str) -> str:
        """Return "512" or "1024", the size of the image whose tokens a stage reads."""
        # shape_1024 and the texture that follows it read tokens of the larger image.
        reads_larger = stage == files.HIGH or (stage == files.TEXTURE and files.HIGH in self.file.flows)
        return LARGER if reads_larger else SMALL

    @torch.no_grad()
    def advance(self, stage: str, x_0: Batch) -> list[Voxels]:
        """Compute the voxels of the next stage from the latents of a stage.

        Args:
            stage: name of any stage but the last one.
            x_0: latents of the stage.
        Returns: for each sample, voxels [v, 3] int32. If the next stage is the texture, the voxels have the
            shape's latents as features.
        Raises: ValueError for the last stage, or for latents that are not finite.
        """
        stage_names = [s.name for s in self.stages]
        if stage not in stage_names[:-1]:
            raise ValueError(
                f"advance: expected one of the stages {', '.join(stage_names[:-1])}, got {stage!r}. The last"
                " stage has no next stage; call decode for it."
            )
        next_stage = stage_names[stage_names.index(stage) + 1]
        check_finite("advance", x_0)
        # Latents of the structure are a dense tensor.
        if isinstance(x_0, torch.Tensor):
            return [self._decode_structure(latent, self.cells(next_stage)) for latent in x_0]
        assert isinstance(x_0, SparseBatch)
        # The texture has the same voxels as the shape, and reads the shape's normalised latents.
        if next_stage == files.TEXTURE:
            return [SparseSample(s.coords, s.feats, cells=s.cells) for s in x_0.samples()]
        return [self._upsample(sample, stage) for sample in x_0.samples()]

    def _decode_structure(self, latent: torch.Tensor, resolution: int) -> torch.Tensor:
        """Decode a structure [C, R, R, R] to occupied voxels [v, 3] of a coarser grid.

        A voxel of this grid is occupied if it contains an occupied voxel of the decoder's grid.

        Args:
            latent: latent of one structure.
            resolution: voxels per axis of the coarser grid.
        Raises: ValueError if the decoder's resolution is not a multiple of `resolution`; EmptyStructure for a
            structure without occupied voxels within the context `rejecting_empty`.
        """
        # A batch of one sample; the logits are [1, 1, side, side, side].
        logits = self.part(files.STRUCTURE_DECODER)(latent[None].to(self.device, torch.float32))
        # An empty structure would leave the next stage without voxels, so its most probable voxel is
        # occupied. Within `rejecting_empty` an empty structure is an error instead.
        logits = occupy_best_voxel(logits, f"stage {files.STRUCTURE!r}")
        # Voxels of the decoder's grid per voxel of the coarser grid, along an axis.
        pooling_factor, remainder = divmod(logits.shape[-1], resolution)
        # A resolution above the decoder's leaves a remainder, too.
        if remainder:
            raise ValueError(
                f"stage {files.STRUCTURE!r}: the decoder's resolution must be a multiple of {resolution}, got"
                f" {logits.shape[-1]}. Use models of one release."
            )
        # The largest logit is positive if any of the pooled voxels is occupied.
        return voxels_of(nn.functional.max_pool3d(logits, pooling_factor))[0]

    def _upsample(self, sample: SparseSample, stage: str) -> SparseSample:
        """Return the voxels on which shape_1024 is sampled after shape_512.

        They are the voxels of the grid of shape_1024 that contain a voxel of the decoder's finest grid.

        Args:
            sample: latents [v, C] of shape_512 on its voxels, in the scale of the flow.
            stage: name of the stage shape_512.
        Returns: voxels with features that are not used.
        """
        decoder = self._decoder()
        # `levels` stops the decoder after its last division of voxels; features are not needed.
        finest_voxels, _ = decoder(
            self._unnormalised(sample.coords, sample.feats, stage),
            split_count=len(decoder.config.up_block_type),
        )
        # Voxels of the decoder's finest grid per voxel of the latents, along an axis.
        voxels_per_latent = decoder.config.finer
        coords, cells = finer_voxels(
            # Without the first column, the index of the sample in the batch.
            finest_voxels.coords[:, 1:],
            self.configs[stage].resolution * voxels_per_latent,
            self.cells(files.HIGH) * voxels_per_latent,
            self.configs[files.HIGH].resolution * voxels_per_latent,
            voxels_per_latent,
        )
        # A sample must have features. These are arbitrary, because the next stage starts from noise.
        return SparseSample(coords, coords[:, :1].float(), cells=cells)

    def _unnormalised(self, coords: torch.Tensor, feats: torch.Tensor, stage: str) -> SparseBatch:
        """Build a batch of one sample, with its latents in the decoder's scale.

        Args:
            coords: voxels [v, 3] of the sample.
            feats: latents [v, C], in the scale of the flow.
            stage: name of the stage, whose scale is removed.
        """
        return SparseBatch.join([SparseSample(coords, self.unnormalised(feats.float(), stage))]).to(
            self.device
        )

    @torch.no_grad()
    def decode(self, x_0: SparseBatch) -> list[VoxelAsset]:
        """Decode latents of the last stage to one asset per sample.

        Args:
            x_0: latents of the texture, with the shape's latents as given features. In a pipeline without
                texture, latents of the shape; the assets then have no materials.
        Raises: ValueError for latents that are not finite, or for a texture without the shape's latents.
        """
        check_finite("decode", x_0)
        has_texture = files.TEXTURE in self.configs
        assets = list[VoxelAsset]()
        decoder = self._decoder()
        if has_texture and x_0.given is None:
            raise ValueError(
                "decode: the latents of the texture lack the latents of the shape. Use the voxels that"
                " `advance` returned to sample the texture."
            )
        # One sample at a time, because each decodes to millions of voxels.
        for sample in x_0.samples():
            # A cascade may have lowered the resolution of this sample.
            resolution = (sample.cells or self.cells(self.shape)) * decoder.config.finer
            latent = sample.given if sample.given is not None else sample.feats
            surface, voxel_children = decoder(self._unnormalised(sample.coords, latent, self.shape))
            materials = None
            if has_texture:
                texture = self._unnormalised(sample.coords, sample.feats, files.TEXTURE)
                # Shape and materials must have the same voxels, so voxels are divided as for the shape.
                materials, _ = self.part(files.TEXTURE_DECODER)(texture, voxel_children)
            assets += assets_of(surface, materials, resolution, decoder.config.voxel_margin)
        return assets

    def _decoder(self) -> VoxelDecoder:
        """Return the decoder of the shape. Unlike `part`, this method states its type."""
        return self.part(files.SHAPE_DECODER)

    def encodes(self, asset: VoxelAsset | Mesh) -> Sequence[str]:
        """Return the names of all stages; for an asset without materials, of all stages but the texture."""
        has_materials = isinstance(asset, VoxelAsset) and asset.materials is not None
        return [stage.name for stage in self.stages if has_materials or stage.name != files.TEXTURE]

    @torch.no_grad()
    def encode_stage(self, asset: VoxelAsset | Mesh, stage: str) -> Latent:
        """Encode an asset or a mesh as the latent of a stage, through its dual grid.

        A mesh is first moved and scaled to fit into the cube.

        Raises: FileNotFoundError if an encoder is not on this machine; ValueError for a mesh without a
            surface.
        """
        if stage == files.STRUCTURE:
            encoder = self.part(files.STRUCTURE_ENCODER)
            # Voxels per axis of the encoder's input: each level after the first halves the resolution.
            input_side = self.configs[stage].resolution * 2 ** (len(encoder.config.channels) - 1)
            resolution = (
                asset.resolution
                if isinstance(asset, VoxelAsset)
                else input_side * self._encoder().config.coarser
            )
            # Voxels of the dual grid, pooled to the resolution of the encoder's input.
            voxels = torch.unique(
                self._grid(asset, resolution)[0].coords.long() * input_side // resolution, dim=0
            )
            # The encoder returns (mean, log variance) for a batch; the mean of the only sample is the latent.
            return encoder(grid_of([voxels], input_side).to(self.device))[0][0].cpu()
        encoder = self._encoder()
        uses_asset_resolution = stage in (self.shape, files.TEXTURE) and isinstance(asset, VoxelAsset)
        shape_stage = self.shape if stage == files.TEXTURE else stage
        if uses_asset_resolution:
            # An asset keeps its resolution, which a cascade may have lowered.
            resolution = asset.resolution  # type: ignore[union-attr]
        else:
            resolution = self.configs[shape_stage].resolution * encoder.config.coarser
        grid, materials = self._grid(asset, resolution)
        encoder_input = encoded_shape(grid.coords, grid.vertices, grid.crossed).to(self.device)
        mean, _ = encoder(encoder_input)
        # Only "1536_cascade" has samples of different resolutions, which state their grid cells.
        cells = (
            resolution // encoder.config.coarser
            if self.file.kind == "1536_cascade" and shape_stage == files.HIGH
            else None
        )
        feats = self.normalised(mean.feats, shape_stage).cpu()
        if stage != files.TEXTURE:
            # Without the first column of the coordinates, the index of the sample in the batch.
            return SparseSample(mean.coords[:, 1:].cpu(), feats, cells=cells)
        assert materials is not None
        # Materials of 0..1 are converted to the encoder's range, -1..1.
        texture_mean, _ = self.part(files.TEXTURE_ENCODER)(
            encoder_input.with_feats(2 * materials.clamp(0, 1).to(self.device) - 1)
        )
        return SparseSample(
            mean.coords[:, 1:].cpu(), self.normalised(texture_mean.feats, stage).cpu(), feats, cells
        )

    def _encoder(self) -> VoxelEncoder:
        """Return the encoder of the shape. Unlike `part`, this method states its type."""
        return self.part(files.SHAPE_ENCODER)

    def _grid(self, asset: VoxelAsset | Mesh, resolution: int) -> tuple[DualGrid, torch.Tensor | None]:
        """Compute the dual grid of an asset at a resolution.

        The most recent grid is cached, because several stages request the same one.

        Returns: dual grid; and materials, or None if the asset has no materials or another resolution.
        """
        cached_grid = self._cached_grid
        # Assets are compared by identity, because they are large and are not modified.
        if cached_grid is None or cached_grid[0] is not asset or cached_grid[1] != resolution:
            grid: tuple[DualGrid, torch.Tensor | None]
            if not isinstance(asset, VoxelAsset):
                grid = dual_grid(*centred(asset), resolution), None
            elif asset.resolution == resolution:
                grid = dual_grid_of(asset)
            else:
                # Materials are on the asset's own voxels, so they do not fit another resolution.
                grid = dual_grid_at(asset, resolution), None
            self._cached_grid = cached_grid = asset, resolution, grid
        return cached_grid[2]


CASCADE_1536_FACTOR = 1.5  # resolution of the last shape in "1536_cascade", over the resolution of its flow
VOXEL_LIMIT = 49152  # number of voxels from which a cascade lowers the resolution
RESOLUTION_STEP = 128  # voxels per axis by which the resolution is lowered at a time


def finer_voxels(
    coords: torch.Tensor,
    side: int,
    resolution: int,
    lowest_resolution: int,
    voxels_per_latent: int,
    voxel_limit: int = VOXEL_LIMIT,
) -> tuple[torch.Tensor, int]:
    """Compute the voxels of shape_1024's latents from the finest voxels of shape_512's decoder.

    The resolution is lowered in steps of 128 while there are `voxel_limit` voxels or more, and the resolution
    is above `lowest_resolution`.

    Args:
        coords: voxels [W, 3] of the decoder's finest grid.
        side: voxels per axis of this grid.
        resolution: requested voxels per axis of the asset.
        lowest_resolution: resolution that is not lowered further.
        voxels_per_latent: voxels of the asset per voxel of the latents, along an axis.
        voxel_limit: number of voxels from which the resolution is lowered.
    Returns: voxels [v, 3] int32 of the latents, sorted, and grid cells per axis of the latents.
    """
    while True:
        cells = resolution // voxels_per_latent  # grid cells per axis of the latents
        # Centres of the voxels, rescaled to the new grid; float64, so that no centre falls on a border.
        voxels = torch.unique(((coords.double() + 0.5) / side * cells).floor().int(), dim=0)
        if len(voxels) < voxel_limit or resolution <= lowest_resolution:
            return voxels, cells
        resolution -= RESOLUTION_STEP


# Conditioning: DINOv3's tokens of an image at two sizes, with weights on this machine. Nothing is downloaded.


def source_of(pipeline_file: files.PipelineFile) -> str:
    """Return a text that names the image encoder and the preprocessing of images.

    Files of embeddings contain this text and are compared by it, so it must not change.
    """
    return f"{pipeline_file.encoder} before its last norm, pictures over black before they are resized"


@torch.no_grad()
def image_tokens(encoder: Dino3, images: torch.Tensor) -> torch.Tensor:
    """Encode images [N, 3, h, w] of values 0..1 as tokens [N, L, E] on the CPU.

    The tokens are taken before the network's last norm. They are normalised by a layer norm without
    parameters.
    """
    tokens = encoder(images.to(encoder.norm.weight.device))
    return F.layer_norm(tokens, tokens.shape[-1:]).cpu()


class Trellis2(FlowFamily):
    """Family of TRELLIS.2; see `FlowFamily` for its attributes and methods."""

    name = "trellis2"
    layout = f"pipeline.json of {files.NAME}"
    stages = files.STAGES
    textures = (files.TEXTURE,)
    version = "TRELLIS.2-4B, of images"
    address = ADDRESSES["trellis2"]
    loaded_by = (
        "from trellis2.pipelines import Trellis2ImageTo3DPipeline;"
        ' Trellis2ImageTo3DPipeline.from_pretrained("{out}")'
    )
    up = "z"
    read_asset = staticmethod(read_asset)
    show = staticmethod(show)
    fit_reward = staticmethod(RewardOfPairs)

    def recognises(self, root: Path) -> bool:
        """Return True if pipeline.json names the pipeline of TRELLIS.2."""
        path = root / "pipeline.json"
        try:
            # Content that is no JSON object is not TRELLIS.2's.
            return path.is_file() and json.loads(path.read_text()).get("name") == files.NAME
        except (ValueError, AttributeError):
            return False

    def stages_in(self, root: Path) -> tuple[str, ...]:
        """Return the stages that the pipeline type in pipeline.json has."""
        return tuple(files.read_pipeline(root).flows)

    def files(self, root: Path, stages: Sequence[str] | None = None) -> dict[str, Path]:
        """Return all files from which the pipeline is read, by name. `stages` is not used."""
        return files.model_files(files.read_pipeline(root))

    def load(
        self,
        root: Path,
        conditioning: Conditioning | None,
        *,
        stages: Sequence[str] | None = None,
        dtype: torch.dtype | None = torch.float32,
        device: str | torch.device = "cpu",
    ) -> Trellis2Pipeline:
        """Read the pipeline; see `FlowFamily.load`. Blocks are recomputed in the backward pass.

        If `stages` is not empty and does not name the texture, the pipeline has no texture, and the shape is
        the last stage.
        """
        pipeline_file = files.read_pipeline(root)
        # An empty list, as for estimates, keeps the texture on the meta device.
        has_texture = not stages or files.TEXTURE in stages
        flow_models = {
            stage: model
            for stage, model in pipeline_file.flows.items()
            if has_texture or stage != files.TEXTURE
        }
        # Decoders are searched for now, so that a missing one is reported before the flows are read.
        stem_by_model = {
            name: find_model(pipeline_file, name) for name in (*flow_models.values(), *files.DECODERS)
        }
        flows = flows_of(
            {stage: stem_by_model[model] for stage, model in flow_models.items()},
            dtype,
            device,
            stages,
            files.load_model,
            files.ARCHITECTURES,
        )
        for stage, flow in flows.items():
            # Both classes of flows have the same parameter names, so a wrong entry could load without an
            # error.
            if isinstance(flow, files.StructureFlow) != (stage == files.STRUCTURE):
                raise ValueError(
                    f"pipeline.json, {pipeline_file.flows[stage]}: a {type(flow).__name__} is no model of"
                    f" stage {stage!r}. Correct the path of this model, or download pipeline.json again."
                )
            # Recomputing blocks in the backward pass saves the memory of their activations.
            if isinstance(flow, Flow):
                flow.recompute = True
        return_memory_if_large(flows.values(), device)

        def read_part(name: str) -> nn.Module:
            """Read a decoder or an encoder by its name."""
            # Autoencoders always compute in float32.
            return files.load_model(find_model(pipeline_file, name), dtype=torch.float32, device=device)

        return Trellis2Pipeline(pipeline_file, flows, conditioning, read_part, device)

    def condition(self, pipeline: Trellis2Pipeline, stage: str) -> list[int]:
        """Return the shape [L, E] of a stage's conditioning."""
        image_side = int(pipeline.conditioning_key(stage))  # pixels
        # A class token, 4 registers, and one token per patch of 16 x 16 pixels.
        return [5 + (image_side // 16) ** 2, pipeline.configs[stage].cond_channels]

    def open(self, source: ProblemSource, device: str | torch.device) -> Problem:
        """Open a folder and its preference pairs as a problem.

        If the texture has pairs, the stages are tuned one by one, without the tuning loop. Otherwise the
        texture is left out. The loop then tunes structure and shape, if their encoders are on this machine.
        """
        pipeline_file = files.read_pipeline(Path(source.pipeline))
        if files.TEXTURE in pairs_in(self, source):
            # The loop would need rewards of materials, which `fit_reward` does not support.
            return open_folder(self, source, device, fits_rewards=False)
        missing_encoders = [
            name
            for name in (files.STRUCTURE_ENCODER, files.SHAPE_ENCODER)
            if not has_model(pipeline_file, name)
        ]
        if missing_encoders:
            print_notice(
                f"The encoders {', '.join(missing_encoders)} were not found. Stages are tuned one by one,"
                " without the tuning loop."
            )
        stages = [stage for stage in files.STAGES if stage != files.TEXTURE]
        # Without rewards the loop does not run.
        return open_folder(self, source, device, stages=stages, fits_rewards=not missing_encoders)

    def embed_images(self, root: Path, images: Mapping[str, Path], device: torch.device) -> Conditioning:
        """Embed images with transparent backgrounds by the DINOv3 model that pipeline.json names.

        Each image is encoded at the sizes SMALL and LARGER.
        """
        pipeline_file = files.read_pipeline(root)
        tokens = {}
        # One network for both sizes: rotary positions adapt to the number of patches.
        encoder = read_dino3(pipeline_file.encoder, device)
        image_sizes = (SMALL, LARGER)
        for name, path in embedding_progress(images.items(), "image"):
            resized_images = read_cut_out(
                path, lambda image: on_black_first(image, tuple(map(int, image_sizes)))
            )
            tokens[name] = {
                image_size: image_tokens(encoder, image[None])[0]
                for image_size, image in zip(image_sizes, resized_images, strict=True)
            }
        return Conditioning(tokens=tokens, encoder=source_of(pipeline_file), zero_null=True)

    def networks(self, root: Path) -> list[Network]:
        """List all networks of the pipeline, and DINOv3, for `flow check`. The encoders may be missing."""
        pipeline_file = files.read_pipeline(root)
        flow_models = pipeline_file.flows.values()
        return [
            *networks_of(
                pipeline_file,
                (*flow_models, *files.DECODERS, *files.ENCODERS),
                files.OPTIONAL,
                released_sizes=files.RELEASED,
                architectures=files.ARCHITECTURES,
                prepare=files.convert_tensors,
            ),
            image_encoder_network(
                pipeline_file.encoder,
                conditioning_widths(pipeline_file, flow_models, files.ARCHITECTURES),
                dino3=True,
            ),
        ]

    def release(self, root: Path, stages: Sequence[str]) -> Release:
        """Describe the folder to export; see `trellis_files.release_of`.

        It includes texturing_pipeline.json and the encoders, if they exist.

        Raises: ValueError for tuned stages that the pipeline does not have.
        """
        pipeline_file = files.read_pipeline(root)
        unknown_stages = sorted(set(stages) - set(pipeline_file.flows))
        if unknown_stages:
            raise ValueError(
                f"export: the pipeline {pipeline_file.kind!r} has no stage {', '.join(unknown_stages)}, only"
                f" {', '.join(pipeline_file.flows)}. Remove the tuned weights of the other stages from the"
                " command."
            )
        # Encoders are not among them: they are exported only if they exist.
        required_models = {*pipeline_file.flows.values(), *files.DECODERS}
        return release_of(
            pipeline_file, stages, pipeline_file.flows, files.load_model, required_models, (files.TEXTURING,)
        )

    def released(self) -> dict[str, Callable[[], list[SizedStage]]]:
        """Return the function that builds the published stages, by the generator's name."""
        return {"TRELLIS.2-4B": files.released_stages}


FAMILY = register(Trellis2())
