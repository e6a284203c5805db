"""TRELLIS.2 as a generator in stages: structure, shape on its voxels, the same again on finer voxels where it is a cascade, texture.

    structure -> occupancy of a grid, pooled to the shape's       latents of the first stage have no normalisation, others are kept
    shape_512 -> (cascade) voxels that its decoder splits into     normalised, as their flows see them
                 children, joined on the finer grid
    last shape -> its voxels, and its latents as what is given to the texture

Shape letters: N samples, C channels, v voxels of a sample, L tokens of a condition, E their size.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from eg3d_rlhf.models.sparse import Batch, Latent, SparseBatch, SparseSample
from eg3d_rlhf.models.trellis.structure_vae import voxels_of
from eg3d_rlhf.models.trellis2.voxel_decoder import VoxelAsset, VoxelDecoder, assets_of
from eg3d_rlhf.tuning.flow.conditions import Conditions
from eg3d_rlhf.tuning.flow.families import OpenedFolder, normalised, unnormalised
from eg3d_rlhf.tuning.flow.families.trellis.files import find_model, return_freed_memory
from eg3d_rlhf.tuning.flow.families.trellis.pipeline import LARGE, check_finite
from eg3d_rlhf.tuning.flow.families.trellis2 import files
from eg3d_rlhf.tuning.flow.stage import DenseGrid, FlowPath, FlowStage, LatentKind, SparseVoxels, Voxels

SMALL, LARGER = "512", "1024"  # names of a condition's tensors: edges in pixels of the picture that they are of


class Trellis2Pipeline(OpenedFolder):
    """Implements `Pipeline`; assets are `VoxelAsset`. Decoders are loaded when they are first needed; there are no encoders."""

    def __init__(
        self, file: files.PipelineFile, flows: Mapping[str, nn.Module], conditions: Conditions | None, parts: Callable[[str], nn.Module],
        device: str | torch.device = "cpu",
    ):
        """Args: flows by stage name; conditions: None where nothing is sampled; parts: decoders by their names in pipeline.json."""
        super().__init__(conditions, parts, device)
        self.file = file
        self.configs: dict[str, Any] = {name: flows[name].config for name in file.flows}  # FlowConfig of every stage
        self.stages = [self._stage(name, flows[name]) for name in file.flows]
        for name, (mean, _) in file.normalization.items():
            channels = self.configs[name].out_channels
            if len(mean) != channels:
                key = files.NORMALIZATIONS[name]
                raise ValueError(f"pipeline.json: expected {key} of {channels} channels, got {len(mean)}. Correct it.")
        shape, texture = (self.configs[stage.name] for stage in self.stages[-2:])
        if (texture.given, texture.resolution) != (shape.out_channels, shape.resolution):
            got = f"{texture.given} on {texture.resolution}^3"
            raise ValueError(
                f"stage {files.TEXTURE!r}: expected a model that is given {shape.out_channels} channels on {shape.resolution}^3, which the "
                f"shape's has, got {got}. Take the models of one release."
            )

    def _stage(self, name: str, model: nn.Module) -> FlowStage:
        config = self.configs[name]
        if self.tokens is not None:
            form, key = self.tokens.form, self._size(name)
            channels = form[key][-1] if isinstance(form, Mapping) and key in form and len(form[key]) == 2 else None
            if channels != config.cond_channels:
                source = f" of {self.tokens.encoder}" if self.tokens.encoder else ""
                raise ValueError(
                    f"conditions: expected tokens [L, {config.cond_channels}] named {key!r} for stage {name!r}, got {form}{source}. Embed "
                    f"the pictures with {self.file.encoder}."
                )
        size = dict(channels=config.out_channels, resolution=config.resolution)
        kind: LatentKind = DenseGrid(**size) if name == files.STRUCTURE else SparseVoxels(**size, given=config.given)
        return FlowStage(
            name=name, model=model, latents=kind, path=FlowPath(sigma_min=self.file.sigma_min[name]), sampling=self.file.sampling[name]
        )

    def _size(self, stage: str) -> str:
        """Which picture a stage is told of."""
        fine = stage == files.HIGH or (stage == files.TEXTURE and files.HIGH in self.file.flows)
        return LARGER if fine else SMALL

    def conditions(self, names: Sequence[str], stage: str) -> torch.Tensor:
        """[N, L, E]."""
        return self.embedded(names, self._size(stage))

    def no_condition(self, n: int, stage: str) -> torch.Tensor:
        """[n, L, E] of zeros."""
        return self.embedded(n, self._size(stage))

    @torch.no_grad()
    def advance(self, stage: str, x_0: Batch) -> list[Voxels]:
        """What latents of a stage leave to the next, per sample: voxels [v, 3] int32, and to the texture the shape's latents on them."""
        names = [s.name for s in self.stages]
        if stage not in names[:-1]:
            raise ValueError(f"advance: expected a stage among {', '.join(names[:-1])}, got {stage!r}. Nothing comes after the last stage.")
        after = names[names.index(stage) + 1]
        resolution = self.configs[after].resolution
        check_finite("advance", x_0)
        if isinstance(x_0, torch.Tensor):
            return [self._pooled(one, resolution) for one in x_0]
        assert isinstance(x_0, SparseBatch)
        if after == files.TEXTURE:
            return [SparseSample(s.coords, s.feats) for s in x_0.samples()]
        return [self._finer(sample, stage, resolution) for sample in x_0.samples()]

    def _pooled(self, latent: torch.Tensor, resolution: int) -> torch.Tensor:
        """Voxels of a grid of `resolution` with an occupied one of the decoder's grid in them; of an empty structure its likeliest."""
        logits = self.part(files.STRUCTURE_DECODER)(latent[None].to(self.device, torch.float32))  # [1, 1, R, R, R]
        logits = logits.where(logits != logits.amax(), logits.amax().clamp_min(1.0))
        factor, rest = divmod(logits.shape[-1], resolution)
        if rest or not factor:
            got = f"{logits.shape[-1]}. Take models of one release"
            raise ValueError(f"structure: expected a grid of a multiple of {resolution} voxels per side, got {got}.")
        return voxels_of(nn.functional.max_pool3d(logits, factor))[0]

    def _finer(self, sample: SparseSample, stage: str, resolution: int) -> torch.Tensor:
        """Voxels of the finer grid that the shape's decoder puts a voxel of the finest grid into."""
        decoder = self._shape_decoder()
        latent = SparseBatch.join([SparseSample(sample.coords, self.unnormalised(sample.feats.float(), stage))]).to(self.device)
        levels = len(decoder.config.up_block_type)
        fine, _ = decoder(latent, levels=levels)
        side = self.configs[stage].resolution * 2**levels
        places = (fine.coords[:, 1:].double() + 0.5) / side * resolution
        return torch.unique(places.floor().int(), dim=0)

    @torch.no_grad()
    def decode(self, x_0: SparseBatch) -> list[VoxelAsset]:
        """Latents of the texture, given those of the shape -> assets."""
        check_finite("decode", x_0)
        if x_0.given is None:
            raise ValueError("decode: expected latents of the texture with those of the shape given, got none given. Sample them together.")
        shape_stage, found = self.stages[-2].name, list[VoxelAsset]()
        shape_decoder, texture_decoder = self._shape_decoder(), self.part(files.TEXTURE_DECODER)
        resolution = self.configs[files.TEXTURE].resolution * 2 ** len(shape_decoder.config.up_block_type)
        for sample in x_0.samples():  # one by one: millions of voxels each
            shape, texture = (
                SparseBatch.join([SparseSample(sample.coords, self.unnormalised(feats.float(), stage))]).to(self.device)
                for feats, stage in ((sample.given, shape_stage), (sample.feats, files.TEXTURE)) if feats is not None
            )
            surface, children = shape_decoder(shape)
            materials, _ = texture_decoder(texture, children)
            found += assets_of(surface, materials, resolution, shape_decoder.config.voxel_margin)
        return found

    def encode(self, assets: Sequence[VoxelAsset]) -> Sequence[Mapping[str, Latent]]:
        """Not there: the release's encoders are of no use to sampling, and are not read."""
        raise ValueError("TRELLIS.2: expected no assets to encode, got some. Its stages are tuned one by one, without the loop.")

    def normalised(self, feats: torch.Tensor, stage: str) -> torch.Tensor:
        """Latents [v, C] as decoders read them -> as the flow of a stage sees them."""
        return normalised(feats, *self.file.normalization[stage])

    def unnormalised(self, feats: torch.Tensor, stage: str) -> torch.Tensor:
        """Inverse of `normalised`."""
        return unnormalised(feats, *self.file.normalization[stage])

    def _shape_decoder(self) -> VoxelDecoder:
        decoder: Any = self.part(files.SHAPE_DECODER)
        return decoder


def load_pipeline(
    root: Path, conditions: Conditions | None, *, also: Sequence[Path] = (), dtype: torch.dtype | None = torch.float32,
    device: str | torch.device = "cpu",
) -> Trellis2Pipeline:
    """A pipeline from TRELLIS.2's files.

    Args: also: further folders to look for models in; dtype: of the flows' weights; None keeps the file's. Decoders are float32.
    Raises: FileNotFoundError or ValueError for files that are missing or do not fit; nothing is downloaded.
    """
    file = files.read_pipeline(root)
    stems = {name: find_model(file, name, also) for name in (*file.flows.values(), *files.DECODERS)}
    flows = {stage: files.load_model(stems[model], dtype=dtype, device=device) for stage, model in file.flows.items()}
    for stage, flow in flows.items():
        if isinstance(flow, files.StructureFlow) != (stage == files.STRUCTURE):
            got = type(flow).__name__
            raise ValueError(f"{file.flows[stage]}: expected a model of stage {stage!r}, got a {got}. Correct pipeline.json.")
    if torch.device(device).type == "cpu" and max(sum(p.numel() for p in flow.parameters()) for flow in flows.values()) > LARGE:
        return_freed_memory()
    return Trellis2Pipeline(
        file, flows, conditions, lambda name: files.load_model(stems[name], dtype=torch.float32, device=device), device
    )
