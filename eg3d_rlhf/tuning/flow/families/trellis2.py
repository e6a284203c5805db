"""TRELLIS.2, a generator in stages: structure, shape, in a cascade the shape on finer voxels, and texture.

    structure -> occupancy of a grid, pooled to the resolution of the shape
    shape_512 -> (cascade) voxels into which its decoder splits the shape, merged to the finer grid
    last shape -> its voxels, and its latents as given features of the texture

Latents of the first stage are not normalised. Others are stored normalised, in the scale of their flows.

The loop runs on structure and shape. Assets are encoded by their dual grids (geometry/dual_grid.py).

Shape letters: N samples, C channels, v voxels of a sample, L conditioning tokens, E channels of a token, W
voxels of an asset.
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
from eg3d_rlhf.tuning.flow.base.conditioning import Conditions
from eg3d_rlhf.tuning.flow.base.family import FlowFamily, Network, Release, SizedStage
from eg3d_rlhf.tuning.flow.base.problem import Problem
from eg3d_rlhf.tuning.flow.base.settings import ProblemSource
from eg3d_rlhf.tuning.flow.base.stage import DenseGrid, FlowPath, FlowStage, LatentKind, SparseVoxels, Voxels
from eg3d_rlhf.tuning.flow.families import print_notice, register
from eg3d_rlhf.tuning.flow.families import trellis2_files as files
from eg3d_rlhf.tuning.flow.families.folder import (
    EncodingFolder,
    check_finite,
    embedding_progress,
    never_empty,
    spare_memory,
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
    find_model,
    flows_of,
    is_there,
    networks_of,
    release_of,
)

# Names of the two conditioning tensors: pixels per side of the image from which they were computed.
SMALL = "512"
LARGER = "1024"


class Trellis2Pipeline(EncodingFolder):
    """Pipeline of all stages; implements `Pipeline`. Assets are `VoxelAsset`.

    Decoders and encoders are loaded when they are first needed.
    """

    def __init__(
        self,
        file: files.PipelineFile,
        flows: Mapping[str, nn.Module],
        conditioning: Conditions | None,
        parts: Callable[[str], nn.Module],
        device: str | torch.device = "cpu",
    ):
        """Build the stages.

        Args:
            flows: networks by stage name, without that of the texture if only the shape is used.
            conditioning: None if nothing is sampled.
            parts: reads a decoder or an encoder by its name in pipeline.json.
        """
        super().__init__(conditioning, parts, device, file.normalization)
        self.file = file
        # The last asset, its resolution and its dual grid; see `_grid`.
        self._last: tuple[Any, int, tuple[DualGrid, torch.Tensor | None]] | None = None
        # FlowConfig of every stage.
        self.configs: dict[str, Any] = {name: flows[name].config for name in file.flows if name in flows}
        if conditioning is not None:
            conditioning.check_source("conditions", source_of(file), "`eg3d-rlhf flow new`")
        # The last shape stage: its latents are those that are decoded.
        self.shape = [name for name in self.configs if name in (files.LOW, files.HIGH)][-1]
        self.stages = [self._stage(name, flows[name]) for name in self.configs]
        for name, (mean, _) in file.normalization.items():
            channels = self.configs[name].out_channels if name in self.configs else len(mean)
            if len(mean) != channels:
                key = files.NORMALIZATIONS[name]
                raise ValueError(
                    f"pipeline.json: expected {key} of {channels} channels, got {len(mean)}. Correct it."
                )
        # The texture's flow must read exactly the latents of the shape.
        given = (
            self.configs[files.TEXTURE].given
            if files.TEXTURE in self.configs
            else self.configs[self.shape].out_channels
        )
        if given != self.configs[self.shape].out_channels:
            raise ValueError(
                f"stage {files.TEXTURE!r}: the model reads {given} channels of the shape, but the shape has"
                f" {self.configs[self.shape].out_channels}. Use models of one release."
            )

    def cells(self, stage: str) -> int:
        """Return the grid cells per axis of a stage; for a cascade that lowers the resolution, the largest
        number.

        The texture uses the shape's grid, because its file may state another number.
        """
        name = self.shape if stage == files.TEXTURE else stage
        wider = WIDER if name == files.HIGH and self.file.kind == "1536_cascade" else 1
        return int(self.configs[name].resolution * wider)

    def _stage(self, name: str, model: nn.Module) -> FlowStage:
        """Build a stage around its network."""
        config = self.configs[name]
        on_voxels = name != files.STRUCTURE
        self.check_tokens(name, config.cond_channels, f"Embed the images with {self.file.encoder}.")
        size = dict(channels=config.out_channels, resolution=self.cells(name))
        kind: LatentKind = SparseVoxels(**size, given=config.given) if on_voxels else DenseGrid(**size)
        # Training times as published: logit-normal for the structure, uniform on voxels.
        path = FlowPath(
            sigma_min=self.file.sigma_min[name], schedule="uniform" if on_voxels else "logit-normal"
        )
        return FlowStage(name=name, model=model, latents=kind, path=path, sampling=self.file.sampling[name])

    def conditioning_key(self, stage: str) -> str:
        """Return the name of the image size whose tokens a stage reads."""
        # The 1024 flows read tokens of the larger image, and so does the texture after one of them.
        fine = stage == files.HIGH or (stage == files.TEXTURE and files.HIGH in self.file.flows)
        return LARGER if fine else SMALL

    @torch.no_grad()
    def advance(self, stage: str, x_0: Batch) -> list[Voxels]:
        """Return what the latents of a stage leave to the next stage, per sample.

        This is voxels [v, 3] int32 and, for the texture, the shape's latents on them.
        """
        names = [s.name for s in self.stages]
        if stage not in names[:-1]:
            raise ValueError(
                f"advance: expected a stage among {', '.join(names[:-1])}, got {stage!r}. No stage follows"
                " the last one."
            )
        after = names[names.index(stage) + 1]
        check_finite("advance", x_0)
        # The structure: a dense latent.
        if isinstance(x_0, torch.Tensor):
            return [self._pooled(latent, self.cells(after)) for latent in x_0]
        assert isinstance(x_0, SparseBatch)
        # The texture lies on exactly the shape's voxels, and reads its normalised latents.
        if after == files.TEXTURE:
            return [SparseSample(s.coords, s.feats, cells=s.cells) for s in x_0.samples()]
        return [self._finer(sample, stage) for sample in x_0.samples()]

    def _pooled(self, latent: torch.Tensor, resolution: int) -> torch.Tensor:
        """Return the voxels of a grid of `resolution` that contain an occupied voxel of the decoder's
        grid.
        """
        # One sample at a time: [1, 1, R, R, R].
        logits = self.part(files.STRUCTURE_DECODER)(latent[None].to(self.device, torch.float32))
        logits = never_empty(logits, f"stage {files.STRUCTURE!r}")
        # voxels of the decoder's grid per voxel, along an axis
        factor, rest = divmod(logits.shape[-1], resolution)
        if rest or not factor:
            raise ValueError(
                f"structure: expected a grid whose voxels per side are a multiple of {resolution}, got"
                f" {logits.shape[-1]}. Use models of one release."
            )
        # The largest logit is positive if any of the pooled voxels is occupied.
        return voxels_of(nn.functional.max_pool3d(logits, factor))[0]

    def _finer(self, sample: SparseSample, stage: str) -> SparseSample:
        """Return the voxels of the finer grid that contain a finest voxel of the shape's decoder."""
        decoder = self._decoder()
        # Stop after the last split, before the blocks that follow it.
        fine, _ = decoder(
            self._unnormalised(sample.coords, sample.feats, stage), levels=len(decoder.config.up_block_type)
        )
        # voxels per axis of the decoder's finest grid
        side = self.configs[stage].resolution * decoder.config.finer
        finer = decoder.config.finer
        coords, cells = finer_voxels(
            fine.coords[:, 1:],
            side,
            self.cells(files.HIGH) * finer,
            self.configs[files.HIGH].resolution * finer,
            finer,
        )
        # A sample must have features; the next stage starts from noise and does not read these.
        return SparseSample(coords, coords[:, :1].float(), cells=cells)

    def _unnormalised(self, coords: torch.Tensor, feats: torch.Tensor, stage: str) -> SparseBatch:
        """Build a batch of one sample in the decoders' scale."""
        return SparseBatch.join([SparseSample(coords, self.unnormalised(feats.float(), stage))]).to(
            self.device
        )

    @torch.no_grad()
    def decode(self, x_0: SparseBatch) -> list[VoxelAsset]:
        """Decode assets from latents of the texture with the shape's latents given, or from the shape's
        latents alone.
        """
        check_finite("decode", x_0)
        coloured = files.TEXTURE in self.configs
        assets = list[VoxelAsset]()
        decoder = self._decoder()
        if coloured and x_0.given is None:
            raise ValueError(
                "decode: expected latents of the texture with those of the shape, got only the texture's."
                " Sample both stages together."
            )
        # One sample at a time, because each decodes to millions of voxels.
        for sample in x_0.samples():
            # A cascade may have lowered the resolution of this sample.
            resolution = (sample.cells or self.cells(self.shape)) * decoder.config.finer
            latent = sample.given if sample.given is not None else sample.feats
            surface, children = decoder(self._unnormalised(sample.coords, latent, self.shape))
            materials = None
            if coloured:
                texture = self._unnormalised(sample.coords, sample.feats, files.TEXTURE)
                # Shape and materials must have the same voxels, so the shape's children are used again.
                materials, _ = self.part(files.TEXTURE_DECODER)(texture, children)
            assets += assets_of(surface, materials, resolution, decoder.config.voxel_margin)
        return assets

    def _decoder(self) -> VoxelDecoder:
        return self.part(files.SHAPE_DECODER)

    def encodes(self, asset: VoxelAsset | Mesh) -> Sequence[str]:
        """Return the names of all stages; without materials, only those of structure and shape."""
        coloured = isinstance(asset, VoxelAsset) and asset.materials is not None
        return [stage.name for stage in self.stages if coloured or stage.name != files.TEXTURE]

    @torch.no_grad()
    def encode_stage(self, asset: VoxelAsset | Mesh, stage: str) -> Latent:
        """Encode an asset, or a mesh after it was fitted into the cube, as a stage's latent, by its dual
        grid.

        Raises: FileNotFoundError if an encoder is not on this machine; ValueError for an asset without a
            surface.
        """
        if stage == files.STRUCTURE:
            network = self.part(files.STRUCTURE_ENCODER)
            # Each level after the first halves the resolution of the encoder's input.
            side = self.configs[stage].resolution * 2 ** (len(network.config.channels) - 1)
            resolution = (
                asset.resolution if isinstance(asset, VoxelAsset) else side * self._encoder().config.coarser
            )
            voxels = torch.unique(self._grid(asset, resolution)[0].coords.long() * side // resolution, dim=0)
            return network(grid_of([voxels], side).to(self.device))[0][0].cpu()
        network = self._encoder()
        at_asset_resolution = stage in (self.shape, files.TEXTURE) and isinstance(asset, VoxelAsset)
        name = self.shape if stage == files.TEXTURE else stage
        if at_asset_resolution:
            # An asset keeps its resolution, which a cascade may have lowered.
            resolution = asset.resolution  # type: ignore[union-attr]
        else:
            resolution = self.configs[name].resolution * network.config.coarser
        grid, materials = self._grid(asset, resolution)
        given = encoded_shape(grid.coords, grid.vertices, grid.crossed).to(self.device)
        mean, _ = network(given)
        cells = (
            resolution // network.config.coarser
            if self.file.kind == "1536_cascade" and name == files.HIGH
            else None
        )
        feats = self.normalised(mean.feats, name).cpu()
        if stage != files.TEXTURE:
            return SparseSample(mean.coords[:, 1:].cpu(), feats, cells=cells)
        assert materials is not None
        # Materials of 0..1 become the encoder's range -1..1.
        colours, _ = self.part(files.TEXTURE_ENCODER)(
            given.with_feats(2 * materials.clamp(0, 1).to(self.device) - 1)
        )
        return SparseSample(
            mean.coords[:, 1:].cpu(), self.normalised(colours.feats, stage).cpu(), feats, cells
        )

    def _encoder(self) -> VoxelEncoder:
        return self.part(files.SHAPE_ENCODER)

    def _grid(self, asset: VoxelAsset | Mesh, resolution: int) -> tuple[DualGrid, torch.Tensor | None]:
        """Return the dual grid of an asset, and its materials if the grid has the asset's own resolution.

        The last grid is cached, because several stages request the same one.
        """
        known = self._last
        # Compared by identity: assets are large and are not modified.
        if known is None or known[0] is not asset or known[1] != resolution:
            if not isinstance(asset, VoxelAsset):
                # A mesh has no materials.
                made: Any = dual_grid(*centred(asset), resolution), None
            else:
                made = (
                    dual_grid_of(asset)
                    if asset.resolution == resolution
                    else (dual_grid_at(asset, resolution), None)
                )
            self._last = known = asset, resolution, made
        return known[2]


WIDER = 1.5  # resolution of "1536_cascade" in that of the 1024 flow
SHRINK = 128  # by which a cascade lowers the resolution while there are TOKENS voxels or more
TOKENS = 49152


def finer_voxels(
    coords: torch.Tensor, side: int, asked: int, least: int, finer: int, most: int = TOKENS
) -> tuple[torch.Tensor, int]:
    """Map the voxels [W, 3] of a grid of `side` to the sorted voxels of an asset's latents, for the cascade.

    Args:
        asked: requested resolution of the asset; it is lowered while there are `most` voxels or more and it
            is above `least`.
        finer: side of a latent's voxel in voxels of the asset.
    Returns: voxels [v, 3] int32, and grid cells per axis.
    """
    while True:
        cells = asked // finer  # grid cells per axis of the latents
        # Centres of the voxels, rescaled to the new grid; float64, so that no centre falls on a border.
        voxels = torch.unique(((coords.double() + 0.5) / side * cells).floor().int(), dim=0)
        if len(voxels) < most or asked <= least:
            return voxels, cells
        asked -= SHRINK


# Conditioning: DINOv3's tokens of an image at two sizes, with weights on this machine. Nothing is downloaded.


def source_of(file: files.PipelineFile) -> str:
    """Describe the encoder and the preprocessing of images, as files of embeddings state them.

    These files are compared by this text, so it must not change.
    """
    return f"{file.encoder} before its last norm, pictures over black before they are resized"


@torch.no_grad()
def picture_tokens(encoder: Dino3, images: torch.Tensor) -> torch.Tensor:
    """Encode images [N, 3, h, w] of values 0..1 as tokens [N, L, E] on the CPU.

    The tokens are those before the last norm, normalised without parameters.
    """
    tokens = encoder(images.to(encoder.norm.weight.device))
    return F.layer_norm(tokens, tokens.shape[-1:]).cpu()


class Trellis2(FlowFamily):
    """Family of TRELLIS.2; see `FlowFamily` for its attributes and methods."""

    name = "trellis2"
    layout = f"pipeline.json of {files.NAME}"
    stages = files.STAGES
    version = "TRELLIS.2-4B, of images"
    address = "https://huggingface.co/microsoft/TRELLIS.2-4B"
    up = "z"
    read_asset = staticmethod(read_asset)
    show = staticmethod(show)
    fit_reward = staticmethod(RewardOfPairs)

    def recognises(self, root: Path) -> bool:
        """Return whether pipeline.json names TRELLIS.2's pipeline."""
        path = root / "pipeline.json"
        try:
            # Content that is no JSON object is not TRELLIS.2's.
            return path.is_file() and json.loads(path.read_text()).get("name") == files.NAME
        except (ValueError, AttributeError):
            return False

    def files(self, root: Path, stages: Sequence[str] | None = None) -> dict[str, Path]:
        """Return all files that the pipeline is read from, by name."""
        return files.model_files(files.read_pipeline(root))

    def load(
        self,
        root: Path,
        conditions: Conditions | None,
        *,
        stages: Sequence[str] | None = None,
        dtype: torch.dtype | None = torch.float32,
        device: str | torch.device = "cpu",
    ) -> Trellis2Pipeline:
        """Read the pipeline; see `FlowFamily.load`. Blocks are recomputed in the backward pass.

        If `stages` names other stages but not the texture, the texture is left out and the shape is the last
        stage.
        """
        file = files.read_pipeline(root)
        # With an empty list (estimates) the texture is kept, on the meta device.
        coloured = not stages or files.TEXTURE in stages
        named = {stage: model for stage, model in file.flows.items() if coloured or stage != files.TEXTURE}
        stems = {name: find_model(file, name) for name in (*named.values(), *files.DECODERS)}
        flows = flows_of(
            {stage: stems[model] for stage, model in named.items()},
            dtype,
            device,
            stages,
            files.load_model,
            files.ARCHITECTURES,
        )
        for stage, flow in flows.items():
            # Both kinds of flows have the same parameter names, so a swapped entry could load unnoticed.
            if isinstance(flow, files.StructureFlow) != (stage == files.STRUCTURE):
                got = type(flow).__name__
                raise ValueError(
                    f"{file.flows[stage]}: expected a model of stage {stage!r}, got a {got}. Correct"
                    " pipeline.json."
                )
            if isinstance(flow, Flow):
                flow.recompute = True
        spare_memory(flows.values(), device)

        def part(name: str) -> nn.Module:
            # Autoencoders always compute in float32.
            return files.load_model(find_model(file, name), dtype=torch.float32, device=device)

        return Trellis2Pipeline(file, flows, conditions, part, device)

    def condition(self, pipeline: Trellis2Pipeline, stage: str) -> list[int]:
        """Return the shape [L, E] of a stage's conditioning."""
        # Class token, 4 registers, and one token per patch of 16 pixels.
        edge = int(pipeline.conditioning_key(stage))
        return [5 + (edge // 16) ** 2, pipeline.configs[stage].cond_channels]

    def open(self, source: ProblemSource, device: str | torch.device) -> Problem:
        """Open a folder as a problem.

        Without pairs of the texture, its flow is left out and the loop can run, because colours carry no
        signal for the stages before them.
        """
        file = files.read_pipeline(Path(source.pipeline))
        # Stages are then tuned one by one, the texture among them.
        if files.TEXTURE in pairs_in(self, source):
            # The loop would need rewards of materials, which are not fitted here.
            return open_folder(self, source, device, rewards=False)
        lost = [name for name in (files.STRUCTURE_ENCODER, files.SHAPE_ENCODER) if not is_there(file, name)]
        if lost:
            print_notice(f"{', '.join(lost)} not found. The stages are tuned one by one, without the loop.")
        shape = [stage for stage in files.STAGES if stage != files.TEXTURE]
        return open_folder(self, source, device, stages=shape, rewards=not lost)

    def embed_images(self, root: Path, images: Mapping[str, Path], device: torch.device) -> Conditions:
        """Embed images with transparent backgrounds at both sizes, by the DINOv3 that pipeline.json names."""
        file = files.read_pipeline(root)
        tokens = {}
        # One network for both sizes: rotary positions adapt to the number of patches.
        encoder = read_dino3(file.encoder, device)
        sizes = (SMALL, LARGER)
        for name, path in embedding_progress(images.items(), "image"):
            resized = read_cut_out(path, lambda image: on_black_first(image, tuple(map(int, sizes))))
            tokens[name] = {
                size: picture_tokens(encoder, image[None])[0]
                for size, image in zip(sizes, resized, strict=True)
            }
        return Conditions(tokens=tokens, encoder=source_of(file), zero_null=True)

    def networks(self, root: Path) -> list[Network]:
        """List all networks that pipeline.json names; the encoders may be missing."""
        file = files.read_pipeline(root)
        return networks_of(
            file,
            (*file.flows.values(), *files.DECODERS, *files.ENCODERS),
            files.LOST,
            released=files.RELEASED,
            architectures=files.ARCHITECTURES,
            prepare=files.prepared,
        )

    def release(self, root: Path, stages: Sequence[str]) -> Release:
        """Describe the folder to export; see `release_of`. It includes both pipelines' files and the
        encoders.
        """
        file = files.read_pipeline(root)
        absent = sorted(set(stages) - set(file.flows))
        if absent:
            raise ValueError(
                f"export: the pipeline {file.kind!r} has the stages {', '.join(file.flows)}, but not"
                f" {', '.join(absent)}. Leave these out."
            )
        # Encoders are exported only if they exist.
        needed = {*file.flows.values(), *files.DECODERS}
        return release_of(file, stages, file.flows, files.load_model, needed, (files.TEXTURING,))

    def released(self) -> dict[str, Callable[[], list[SizedStage]]]:
        """Return the function that builds the published stages, by the generator's name."""
        return {"TRELLIS.2-4B": files.released_stages}


FAMILY = register(Trellis2())
