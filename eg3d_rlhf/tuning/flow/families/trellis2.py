"""TRELLIS.2, a generator in stages: structure, shape on its voxels, the same again on finer voxels where it
is a cascade, texture.

    structure -> occupancy of a grid, pooled to the shape's
    shape_512 -> (cascade) voxels that its decoder splits into children, joined on the finer grid
    last shape -> its voxels, and its latents as what is given to the texture

Latents of the first stage have no normalisation, others are kept normalised, as their flows see them.

The loop runs on structure and shape. Assets are encoded by way of their dual grids (geometry/dual_grid.py).

Shape letters: N samples, C channels, v voxels of a sample, L tokens of a condition, E their size, W voxels of
an asset.
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
    embedding,
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

# names of a condition's tensors: edges in pixels of the image that they are of
SMALL = "512"
LARGER = "1024"


class Trellis2Pipeline(EncodingFolder):
    """Implements `Pipeline`; assets are `VoxelAsset`. Decoders and encoders are loaded when they are first
    needed.
    """

    def __init__(
        self,
        file: files.PipelineFile,
        flows: Mapping[str, nn.Module],
        conditions: Conditions | None,
        parts: Callable[[str], nn.Module],
        device: str | torch.device = "cpu",
    ):
        """Args: flows by stage name, without the texture's where the shape is all that is wanted; conditions:
        None where nothing is sampled; parts: decoders and encoders by their names in pipeline.json.
        """
        super().__init__(conditions, parts, device, file.normalization)
        self.file = file
        self._last: tuple[Any, int, tuple[DualGrid, torch.Tensor | None]] | None = None
        # FlowConfig of every stage
        self.configs: dict[str, Any] = {name: flows[name].config for name in file.flows if name in flows}
        if conditions is not None:
            conditions.check_source("conditions", source_of(file), "`eg3d-rlhf flow new`")
        # the stage whose latents are the asset's shape
        self.shape = [name for name in self.configs if name in (files.LOW, files.HIGH)][-1]
        self.stages = [self._stage(name, flows[name]) for name in self.configs]
        for name, (mean, _) in file.normalization.items():
            channels = self.configs[name].out_channels if name in self.configs else len(mean)
            if len(mean) != channels:
                key = files.NORMALIZATIONS[name]
                raise ValueError(
                    f"pipeline.json: expected {key} of {channels} channels, got {len(mean)}. Correct it."
                )
        given = (
            self.configs[files.TEXTURE].given
            if files.TEXTURE in self.configs
            else self.configs[self.shape].out_channels
        )
        if given != self.configs[self.shape].out_channels:
            raise ValueError(
                f"stage {files.TEXTURE!r}: expected a model that is given"
                f" {self.configs[self.shape].out_channels} channels, which the shape's has, got {given}. Take"
                " the models of one release."
            )

    def cells(self, stage: str) -> int:
        """Along an axis of a stage's grid, the largest in a cascade that is asked for more. A texture's file
        may say another number.
        """
        name = self.shape if stage == files.TEXTURE else stage
        wider = WIDER if name == files.HIGH and self.file.kind == "1536_cascade" else 1
        return int(self.configs[name].resolution * wider)

    def _stage(self, name: str, model: nn.Module) -> FlowStage:
        config = self.configs[name]
        on_voxels = name != files.STRUCTURE
        self.check_tokens(name, config.cond_channels, f"Embed the pictures with {self.file.encoder}.")
        size = dict(channels=config.out_channels, resolution=self.cells(name))
        kind: LatentKind = SparseVoxels(**size, given=config.given) if on_voxels else DenseGrid(**size)
        path = FlowPath(
            sigma_min=self.file.sigma_min[name], schedule="uniform" if on_voxels else "logit-normal"
        )
        return FlowStage(name=name, model=model, latents=kind, path=path, sampling=self.file.sampling[name])

    def conditioning_key(self, stage: str) -> str:
        """Return which image's tokens a stage reads."""
        fine = stage == files.HIGH or (stage == files.TEXTURE and files.HIGH in self.file.flows)
        return LARGER if fine else SMALL

    @torch.no_grad()
    def advance(self, stage: str, x_0: Batch) -> list[Voxels]:
        """What latents of a stage leave to the next, per sample: voxels [v, 3] int32, and to the texture the
        shape's latents on them.
        """
        names = [s.name for s in self.stages]
        if stage not in names[:-1]:
            raise ValueError(
                f"advance: expected a stage among {', '.join(names[:-1])}, got {stage!r}. Nothing comes after"
                " the last stage."
            )
        after = names[names.index(stage) + 1]
        check_finite("advance", x_0)
        if isinstance(x_0, torch.Tensor):
            return [self._pooled(latent, self.cells(after)) for latent in x_0]
        assert isinstance(x_0, SparseBatch)
        if after == files.TEXTURE:
            return [SparseSample(s.coords, s.feats, cells=s.cells) for s in x_0.samples()]
        return [self._finer(sample, stage) for sample in x_0.samples()]

    def _pooled(self, latent: torch.Tensor, resolution: int) -> torch.Tensor:
        """Voxels of a grid of `resolution` with an occupied one of the decoder's grid in them."""
        # [1, 1, R, R, R]
        logits = self.part(files.STRUCTURE_DECODER)(latent[None].to(self.device, torch.float32))
        logits = never_empty(logits, f"stage {files.STRUCTURE!r}")
        factor, rest = divmod(logits.shape[-1], resolution)
        if rest or not factor:
            got = f"{logits.shape[-1]}. Take models of one release"
            raise ValueError(
                f"structure: expected a grid of a multiple of {resolution} voxels per side, got {got}."
            )
        return voxels_of(nn.functional.max_pool3d(logits, factor))[0]

    def _finer(self, sample: SparseSample, stage: str) -> SparseSample:
        """Voxels of the finer grid that the shape's decoder puts a voxel of the finest grid into."""
        decoder = self._decoder()
        fine, _ = decoder(
            self._unnormalised(sample.coords, sample.feats, stage), levels=len(decoder.config.up_block_type)
        )
        side = self.configs[stage].resolution * decoder.config.finer
        finer = decoder.config.finer
        coords, cells = finer_voxels(
            fine.coords[:, 1:],
            side,
            self.cells(files.HIGH) * finer,
            self.configs[files.HIGH].resolution * finer,
            finer,
        )
        return SparseSample(coords, coords[:, :1].float(), cells=cells)  # features that nobody reads

    def _unnormalised(self, coords: torch.Tensor, feats: torch.Tensor, stage: str) -> SparseBatch:
        """One sample, as decoders read it."""
        return SparseBatch.join([SparseSample(coords, self.unnormalised(feats.float(), stage))]).to(
            self.device
        )

    @torch.no_grad()
    def decode(self, x_0: SparseBatch) -> list[VoxelAsset]:
        """Latents of the texture, given those of the shape, or of a shape alone -> assets."""
        check_finite("decode", x_0)
        coloured = files.TEXTURE in self.configs
        assets = list[VoxelAsset]()
        decoder = self._decoder()
        if coloured and x_0.given is None:
            raise ValueError(
                "decode: expected latents of the texture with those of the shape given, got none given."
                " Sample them together."
            )
        for sample in x_0.samples():  # one by one: millions of voxels each
            resolution = (sample.cells or self.cells(self.shape)) * decoder.config.finer
            latent = sample.given if sample.given is not None else sample.feats
            surface, children = decoder(self._unnormalised(sample.coords, latent, self.shape))
            materials = None
            if coloured:
                texture = self._unnormalised(sample.coords, sample.feats, files.TEXTURE)
                materials, _ = self.part(files.TEXTURE_DECODER)(texture, children)
            assets += assets_of(surface, materials, resolution, decoder.config.voxel_margin)
        return assets

    def _decoder(self) -> VoxelDecoder:
        return self.part(files.SHAPE_DECODER)

    def encodes(self, asset: VoxelAsset | Mesh) -> Sequence[str]:
        """All stages; of what has no materials those of the shape."""
        coloured = isinstance(asset, VoxelAsset) and asset.materials is not None
        return [stage.name for stage in self.stages if coloured or stage.name != files.TEXTURE]

    @torch.no_grad()
    def encode_stage(self, asset: VoxelAsset | Mesh, stage: str) -> Latent:
        """From the dual grid: of a mesh, which is brought into the cube first, or what an asset has of its
        own resolution.

        Raises: FileNotFoundError where an encoder is not there; ValueError for what has no surface.
        """
        if stage == files.STRUCTURE:
            network = self.part(files.STRUCTURE_ENCODER)
            side = self.configs[stage].resolution * 2 ** (len(network.config.channels) - 1)
            resolution = (
                asset.resolution if isinstance(asset, VoxelAsset) else side * self._encoder().config.coarser
            )
            voxels = torch.unique(self._grid(asset, resolution)[0].coords.long() * side // resolution, dim=0)
            return network(grid_of([voxels], side).to(self.device))[0][0].cpu()
        network = self._encoder()
        of_asset = stage in (self.shape, files.TEXTURE) and isinstance(asset, VoxelAsset)
        name = self.shape if stage == files.TEXTURE else stage
        if of_asset:
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
        colours, _ = self.part(files.TEXTURE_ENCODER)(
            given.with_feats(2 * materials.clamp(0, 1).to(self.device) - 1)
        )
        return SparseSample(
            mean.coords[:, 1:].cpu(), self.normalised(colours.feats, stage).cpu(), feats, cells
        )

    def _encoder(self) -> VoxelEncoder:
        return self.part(files.SHAPE_ENCODER)

    def _grid(self, asset: VoxelAsset | Mesh, resolution: int) -> tuple[DualGrid, torch.Tensor | None]:
        """And the materials on it, where it is the asset's own. The last one is kept: several stages ask for
        it.
        """
        known = self._last
        if known is None or known[0] is not asset or known[1] != resolution:
            if not isinstance(asset, VoxelAsset):
                made: Any = dual_grid(*centred(asset), resolution), None
            else:
                made = (
                    dual_grid_of(asset)
                    if asset.resolution == resolution
                    else (dual_grid_at(asset, resolution), None)
                )
            self._last = known = asset, resolution, made
        return known[2]


# 1536 of 1024; by how much the resolution is lowered while there are so many voxels
WIDER = 1.5
SHRINK = 128
TOKENS = 49152


def finer_voxels(
    coords: torch.Tensor, side: int, asked: int, least: int, finer: int, most: int = TOKENS
) -> tuple[torch.Tensor, int]:
    """The cascade: voxels [W, 3] of a grid of `side` -> those of the latents of an asset, sorted, and their
    cells along an axis.

    Args: asked: resolution of the asset, lowered while there are `most` voxels or more, and it is not
        `least`; finer: of a voxel's side.
    """
    while True:
        cells = asked // finer
        voxels = torch.unique(((coords.double() + 0.5) / side * cells).floor().int(), dim=0)
        if len(voxels) < most or asked <= least:
            return voxels, cells
        asked -= SHRINK


# Conditioning: DINOv3's tokens of an image at two sizes. Weights are those on this machine; nothing is
# downloaded.


def source_of(file: files.PipelineFile) -> str:
    """What computes conditions, for their file."""
    return f"{file.encoder} before its last norm, pictures over black before they are resized"


@torch.no_grad()
def picture_tokens(encoder: Dino3, pictures: torch.Tensor) -> torch.Tensor:
    """Pictures [N, 3, h, w] of 0..1 -> tokens [N, L, E] on the CPU, before the last norm, normalised without
    parameters.
    """
    tokens = encoder(pictures.to(encoder.norm.weight.device))
    return F.layer_norm(tokens, tokens.shape[-1:]).cpu()


class Trellis2(FlowFamily):
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
        path = root / "pipeline.json"
        try:
            return path.is_file() and json.loads(path.read_text()).get("name") == files.NAME
        except (ValueError, AttributeError):
            return False

    def files(self, root: Path, stages: Sequence[str] | None = None) -> dict[str, Path]:
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
        """See `FlowFamily.load`; blocks are computed again in the backward pass. A texture that `stages` does
        not name beside others is left out, and the shape is the last stage.
        """
        file = files.read_pipeline(root)
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
            return files.load_model(find_model(file, name), dtype=torch.float32, device=device)

        return Trellis2Pipeline(file, flows, conditions, part, device)

    def condition(self, pipeline: Trellis2Pipeline, stage: str) -> list[int]:
        edge = int(pipeline.conditioning_key(stage))
        return [5 + (edge // 16) ** 2, pipeline.configs[stage].cond_channels]

    def open(self, source: ProblemSource, device: str | torch.device) -> Problem:
        """Open a folder; without pairs of the texture its flow is left out, and the loop can run, since
        colours carry no signal for the stages before them.
        """
        file = files.read_pipeline(Path(source.pipeline))
        if files.TEXTURE in pairs_in(self, source):
            return open_folder(self, source, device, rewards=False)
        lost = [name for name in (files.STRUCTURE_ENCODER, files.SHAPE_ENCODER) if not is_there(file, name)]
        if lost:
            print_notice(f"{', '.join(lost)} not found: stages are tuned one by one, without the loop.")
        shape = [stage for stage in files.STAGES if stage != files.TEXTURE]
        return open_folder(self, source, device, stages=shape, rewards=not lost)

    def embed_images(self, root: Path, images: Mapping[str, Path], device: torch.device) -> Conditions:
        """Embed images with transparent backgrounds at both sizes, by the DINOv3 that pipeline.json names."""
        file = files.read_pipeline(root)
        tokens = {}
        encoder = read_dino3(file.encoder, device)
        sizes = (SMALL, LARGER)
        for name, path in embedding(images.items(), "picture"):
            seen = read_cut_out(path, lambda image: on_black_first(image, tuple(map(int, sizes))))
            tokens[name] = {
                size: picture_tokens(encoder, picture[None])[0]
                for size, picture in zip(sizes, seen, strict=True)
            }
        return Conditions(tokens=tokens, encoder=source_of(file), zero_null=True)

    def networks(self, root: Path) -> list[Network]:
        """Return all that are named; the encoders may be missing."""
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
        """See `release_of`; both pipelines' files, and the encoders."""
        file = files.read_pipeline(root)
        absent = sorted(set(stages) - set(file.flows))
        if absent:
            raise ValueError(
                f"export: expected stages of {file.kind!r}, {', '.join(file.flows)}, got {', '.join(absent)}."
                " Leave it out."
            )
        needed = {*file.flows.values(), *files.DECODERS}
        return release_of(file, stages, file.flows, files.load_model, needed, (files.TEXTURING,))

    def released(self) -> dict[str, Callable[[], list[SizedStage]]]:
        return {"TRELLIS.2-4B": files.released_stages}


FAMILY = register(Trellis2())
