"""TRELLIS: a generator in two stages, structure, then latents on its voxels, of texts or of images.

Shape letters: N samples, C channels, R grid points per axis, L tokens of a condition, E their size.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from eg3d_rlhf.models.sparse import Batch, Latent, SparseBatch, SparseSample
from eg3d_rlhf.models.trellis.autoencoders import grid_of, voxels_of
from eg3d_rlhf.tuning.flow.base.conditioning import Conditions, read_array
from eg3d_rlhf.tuning.flow.base.family import FlowFamily, Network, Release, SizedStage
from eg3d_rlhf.tuning.flow.base.problem import Problem
from eg3d_rlhf.tuning.flow.base.settings import EncodingSource, ProblemSource
from eg3d_rlhf.tuning.flow.base.stage import DenseGrid, FlowPath, FlowStage, SparseVoxels, Voxels, stage_of
from eg3d_rlhf.tuning.flow.families import register
from eg3d_rlhf.tuning.flow.families import trellis_files as files
from eg3d_rlhf.tuning.flow.families.encoders import ImageEncoder, TextEncoder
from eg3d_rlhf.tuning.flow.families.folder import EncodingFolder, check_finite, never_empty, spare_memory
from eg3d_rlhf.tuning.flow.families.learned_evaluators import RewardOfPairs
from eg3d_rlhf.tuning.flow.families.opening import open_folder
from eg3d_rlhf.tuning.flow.families.trellis_assets import (
    SplatAsset,
    calibrated,
    decoded,
    read_ply,
    show,
    voxel_features,
    voxels_filled,
)
from eg3d_rlhf.tuning.flow.families.trellis_pairs import candidate, read_dso, write_latent

LOOKED_AT = 32  # assets that the share of opacity is fitted to


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """How finished assets become latents again."""

    share: float = 0.25  # of the mean opacity of filled voxels, above which a voxel counts as filled
    views: int = 150  # images per asset that features are averaged over
    image_model: str = "dinov2_vitl14_reg"  # whose features the encoder of the second stage reads


class TrellisPipeline(EncodingFolder):
    """Implements `Pipeline`; assets are `SplatAsset`. Decoders and encoders are loaded when they are first
    needed.

    Structures have no latent normalisation; the second stage's latents are kept normalised, as its flow sees
    them.
    """

    def __init__(
        self,
        file: files.PipelineFile,
        flows: Mapping[str, Any],
        conditions: Conditions | None,
        parts: Callable[[str], nn.Module],
        device: str | torch.device = "cpu",
        encoding: Encoding | None = None,
    ):
        """Args: flows by stage name; conditions: None where nothing is sampled; parts: decoders and encoders
        by TRELLIS's names of them.
        """
        super().__init__(conditions, parts, device, {files.LATENT: (file.mean, file.std)})
        self.file = file
        self.encoding = encoding or Encoding()
        self._image_encoder: ImageEncoder | None = None
        self.stages = [self._stage(name, flows[name]) for name in (files.STRUCTURE, files.LATENT)]
        channels = flows[files.LATENT].config.in_channels
        self.resolution = flows[files.LATENT].config.resolution
        if len(file.mean) != channels:
            raise ValueError(
                f"pipeline.json: expected slat_normalization of {channels} channels, got {len(file.mean)}."
                " Correct it."
            )

    def _stage(self, name: str, model: Any) -> FlowStage:
        config = model.config
        self.check_tokens(name, config.cond_channels, f"Embed them with {self.file.encoder}.")
        kind: Any = SparseVoxels if name == files.LATENT else DenseGrid
        return FlowStage(
            name=name,
            model=model,
            latents=kind(channels=config.in_channels, resolution=config.resolution),
            path=FlowPath(sigma_min=self.file.sigma_min[name]),
            sampling=self.file.sampling[name],
        )

    @torch.no_grad()
    def advance(self, stage: str, x_0: Batch) -> list[Voxels]:
        """Structures [N, C, R, R, R] -> the voxels of each, [v, 3] int32; of a structure without any, its
        likeliest.
        """
        assert stage == files.STRUCTURE
        check_finite("advance", x_0)
        assert isinstance(x_0, torch.Tensor)
        decoder = self.part(files.STRUCTURE_DECODER)
        voxels: list[Voxels] = []
        for latent in x_0:  # one by one: 64^3 x 128 floats each
            logits = decoder(latent[None].to(self.device, torch.float32))
            voxels += voxels_of(never_empty(logits, f"stage {stage!r}"))
        return voxels

    def decode(self, x_0: SparseBatch) -> list[SplatAsset]:
        return decoded(self, files.GAUSSIAN_DECODER, x_0)

    def encodes(self, asset: SplatAsset) -> Sequence[str]:
        """Return the names of both stages."""
        return (files.STRUCTURE, files.LATENT)

    @torch.no_grad()
    def encode_stage(self, asset: SplatAsset, stage: str) -> Latent:
        """Encode an asset as a stage's latent; the second stage's is normalised.

        Raises: FileNotFoundError or ValueError where the encoder or DINOv2 are not on this machine.
        """
        voxels = self.voxels(asset)
        size = self.resolution
        if stage == files.STRUCTURE:
            return self.part(files.STRUCTURE_ENCODER)(grid_of([voxels], size).to(self.device))[0][0]
        encoder = self.part(files.LATENT_ENCODER)
        if self._image_encoder is None:
            self._image_encoder = ImageEncoder(self.encoding.image_model, self.device)
        features = voxel_features(
            asset.to(self.device), voxels.to(self.device), self._image_encoder, size, self.encoding.views
        )
        latent, _ = encoder(SparseBatch.join([SparseSample(voxels.to(self.device), features)]))
        return SparseSample(voxels, self.normalised(latent.feats).to(voxels.device))

    def voxels(self, asset: SplatAsset) -> torch.Tensor:
        return voxels_filled(asset, self.resolution, self.encoding.share)


@dataclass(frozen=True)
class Trellis(FlowFamily):
    """The family; its options say how finished assets are encoded."""

    encoding: Encoding = Encoding()
    zero_null: bool = True  # of images; texts have an embedding of ''

    name = "trellis"
    layout = "pipeline.json of TrellisTextTo3DPipeline or TrellisImageTo3DPipeline"
    stages = tuple(files.FLOWS)
    version = "TRELLIS, of texts or images"
    address = "https://huggingface.co/microsoft/TRELLIS-image-large"
    loaded_by = 'TrellisImageTo3DPipeline or TrellisTextTo3DPipeline.from_pretrained("{out}")'
    up = "z"
    options = ("voxel_share", "views")
    candidate = staticmethod(candidate)
    read_asset = staticmethod(read_ply)
    read_samples = staticmethod(read_dso)
    show = staticmethod(show)
    fit_reward = staticmethod(RewardOfPairs)

    def recognises(self, root: Path) -> bool:
        """Return whether pipeline.json is TRELLIS's, or no JSON at all, which the reader then rejects."""
        path = root / "pipeline.json"
        if not path.is_file():
            return False
        try:
            name = json.loads(path.read_text()).get("name", "")
        except (ValueError, AttributeError):
            return True
        return any(str(name).lower() == f"trellis{kind}to3dpipeline" for kind in files.KINDS)

    def files(self, root: Path, stages: Sequence[str] | None = None) -> dict[str, Path]:
        """Return the flows' files by stage; of all stages those that the loop needs besides."""
        file = files.read_pipeline(root)
        loop = stages is None or len(stages) == len(files.FLOWS)
        models = files.FLOWS | {name: name for name in files.NEEDED if loop}
        return {"pipeline.json": root / "pipeline.json", **files.paths_of(file, models)}

    def load(
        self,
        root: Path,
        conditions: Conditions | None,
        *,
        stages: Sequence[str] | None = None,
        dtype: torch.dtype | None = torch.float32,
        device: str | torch.device = "cpu",
    ) -> TrellisPipeline:
        """See `FlowFamily.load`. Decoders and encoders are float32, and read when they are first needed."""
        file = files.read_pipeline(root)
        stems = {stage: files.find_model(file, model) for stage, model in files.FLOWS.items()}
        flows = files.flows_of(stems, dtype, device, stages)
        spare_memory(flows.values(), device)

        def part(name: str) -> nn.Module:
            return files.load_model(files.find_model(file, name), dtype=torch.float32, device=device)

        return TrellisPipeline(file, flows, conditions, part, device, self.encoding)

    def condition(self, pipeline: TrellisPipeline, stage: str) -> list[int]:
        model: Any = stage_of(pipeline, stage).model
        return [files.TOKENS[pipeline.file.kind], model.config.cond_channels]

    def configured(self, source: EncodingSource) -> "Trellis":
        return replace(self, encoding=Encoding(share=source.voxel_share, views=source.views))

    def open(self, source: ProblemSource, device: str | torch.device) -> Problem:
        """Open a folder as any other's; blocks are computed again in the backward pass, for less memory."""
        zero_null = files.read_pipeline(Path(source.pipeline)).kind == "image"
        family = replace(self.configured(source), zero_null=zero_null)
        problem = open_folder(family, source, device)
        for stage in problem.pipeline.stages:
            stage.model.recompute = True  # type: ignore[assignment]
        return replace(problem, identity={**problem.identity, "encoding": vars(family.encoding)})

    def check_pairs(self, pipeline: TrellisPipeline, folder: Path, stage: str, meta: Mapping) -> None:
        """Raise ValueError for latents that are normalised in another way."""
        if meta.get("normalization") != files.normalization(pipeline.file, stage):
            raise ValueError(
                f"{folder}: expected latents normalised as {pipeline.file.root.name}/pipeline.json says, got"
                " those of another model. Make the pairs again for this one."
            )

    def pair_meta(self, pipeline: TrellisPipeline, stage: str, report: Mapping) -> Mapping:
        return {"normalization": files.normalization(pipeline.file, stage), "report": report}

    def embed_images(self, root: Path, images: Mapping[str, Path], device: torch.device) -> Conditions:
        return ImageEncoder(_of_kind(root, "image").encoder, device).conditions(images)

    def embed_texts(self, root: Path, texts: Sequence[str], device: torch.device) -> Conditions:
        return TextEncoder(_of_kind(root, "text").encoder, device).conditions(texts)

    def write_latent(self, path: Path, pipeline: TrellisPipeline, stage: str, latent: Latent) -> None:
        write_latent(path, pipeline, latent)

    def remark(self, folder: Path, lines: Sequence[Mapping], pipeline: TrellisPipeline) -> str:
        """Return the share of opacity at which the first assets fill the voxels that they were made on."""
        lines = lines[:LOOKED_AT]
        assets = [read_ply(folder / line["look_at"]) for line in lines]
        voxels = [read_array(folder / line[files.LATENT], "coords") for line in lines]
        best = calibrated(assets, voxels, pipeline.resolution)
        how = (
            f"a share of opacity of {best['share']:g} (intersection over union {best['iou']:.2f}, of"
            f" {len(assets)})"
        )
        return (
            f"assets fill the voxels that they were made on best at {how}: flow tune --loop --set"
            f" voxel_share={best['share']:g}"
        )

    def networks(self, root: Path) -> list[Network]:
        """Return all that the loop needs; the second stage's encoder may be missing."""
        models = (*files.FLOWS.values(), *files.NEEDED, files.LATENT_ENCODER)
        lost = {files.LATENT_ENCODER: "assets of your own, no loop"}
        return files.networks_of(files.read_pipeline(root), models, lost)

    def release(self, root: Path, stages: Sequence[str]) -> Release:
        """See `files.release_of`. What pipeline.json names in a folder that is there must be there."""
        file = files.read_pipeline(root)
        needed = {name for name, value in file.models.items() if (file.root / value).parent.is_dir()}
        return files.release_of(file, stages, files.FLOWS, files.load_model, needed)

    def released(self) -> dict[str, Callable[[], list[SizedStage]]]:
        return {
            "TRELLIS-text-large": partial(files.released_stages, "text", 768),
            "TRELLIS-image-large": partial(files.released_stages, "image", 1024),
        }


def _of_kind(root: Path, kind: str) -> files.PipelineFile:
    file = files.read_pipeline(root)
    if file.kind != kind:
        wanted, got = ({"image": "images", "text": "prompts"}[each] for each in (file.kind, kind))
        raise ValueError(
            f"conditioning: expected --{wanted} for a pipeline of {wanted}, got --{got}. Correct the call."
        )
    return file


FAMILY = register(Trellis())
