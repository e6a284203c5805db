"""TRELLIS as a generator in two stages: structure, then latents on its voxels.

Shape letters: N samples, C channels, R grid points per axis, L tokens of a condition, E their size.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from eg3d_rlhf.models.sparse import Batch, Latent, SparseBatch, SparseSample
from eg3d_rlhf.models.trellis.autoencoders import grid_of, voxels_of
from eg3d_rlhf.tuning.flow.base.conditioning import Conditions
from eg3d_rlhf.tuning.flow.base.stage import DenseGrid, FlowPath, FlowStage, SparseVoxels, Voxels, stage_of
from eg3d_rlhf.tuning.flow.families import trellis_files as files
from eg3d_rlhf.tuning.flow.families.encoders import ImageEncoder
from eg3d_rlhf.tuning.flow.families.folder import EncodingFolder, check_finite, never_empty, spare_memory
from eg3d_rlhf.tuning.flow.families.trellis_assets import SplatAsset, decoded, voxel_features, voxels_filled


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

    def width(self, stage: str) -> int:
        """E of what a stage is told."""
        return stage_of(self, stage).model.config.cond_channels  # type: ignore[union-attr, return-value]

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
        """Both."""
        return (files.STRUCTURE, files.LATENT)

    @torch.no_grad()
    def encode_stage(self, asset: SplatAsset, stage: str) -> Latent:
        """The second stage's is normalised.

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


def load_pipeline(
    root: Path,
    conditions: Conditions | None,
    *,
    dtype: torch.dtype | None = torch.float32,
    device: str | torch.device = "cpu",
    encoding: Encoding | None = None,
    whole: bool = True,
    sampled: bool = True,
) -> TrellisPipeline:
    """A pipeline from TRELLIS's files.

    Args:
        dtype: of the flows' weights; None keeps the file's. Decoders and encoders are float32.
        sampled: False leaves the flows without weights: to encode and decode alone.
        whole: refuse at once if a decoder or the structure's encoder is missing, rather than when it is
            needed.
    Raises: FileNotFoundError or ValueError for files that are missing or do not fit; nothing is downloaded.
    """
    file = files.read_pipeline(root)
    stems = {stage: files.find_model(file, model) for stage, model in files.FLOWS.items()}
    for name in files.NEEDED if whole else ():
        files.find_model(file, name)
    flows = files.flows_of(stems, dtype, device, sampled)
    spare_memory(flows.values(), device)
    return TrellisPipeline(
        file,
        flows,
        conditions,
        lambda name: files.load_model(files.find_model(file, name), dtype=torch.float32, device=device),
        device,
        encoding,
    )
