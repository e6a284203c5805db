"""Family of TRELLIS (Xiang et al. 2024), a generator in two stages that is conditioned on texts or images.

The first stage samples a structure, which is decoded to occupied voxels. The second stage samples latents on
these voxels, which are decoded to Gaussian splats.

Shapes: N number of samples, C channels, R grid points per axis, v voxels of a sample, L number of
conditioning tokens, E channels of a token.
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
from eg3d_rlhf.tuning.flow.base.conditioning import Conditioning, read_array
from eg3d_rlhf.tuning.flow.base.family import FlowFamily, Network, Release, SizedStage
from eg3d_rlhf.tuning.flow.base.problem import Problem
from eg3d_rlhf.tuning.flow.base.settings import EncodingSource, ProblemSource
from eg3d_rlhf.tuning.flow.base.stage import DenseGrid, FlowPath, FlowStage, SparseVoxels, Voxels, stage_of
from eg3d_rlhf.tuning.flow.families import ADDRESSES, register
from eg3d_rlhf.tuning.flow.families import trellis_files as files
from eg3d_rlhf.tuning.flow.families.encoders import (
    ImageEncoder,
    TextEncoder,
    image_encoder_network,
    text_encoder_network,
)
from eg3d_rlhf.tuning.flow.families.folder import (
    EncodingFolder,
    check_finite,
    occupy_best_voxel,
    return_memory_if_large,
)
from eg3d_rlhf.tuning.flow.families.learned_evaluators import RewardOfPairs
from eg3d_rlhf.tuning.flow.families.opening import open_folder
from eg3d_rlhf.tuning.flow.families.trellis_assets import (
    SplatAsset,
    decode_gaussians,
    find_best_share,
    find_filled_voxels,
    read_ply,
    show,
    voxel_features,
)
from eg3d_rlhf.tuning.flow.families.trellis_pairs import candidate, read_dso, write_latent

MAX_CALIBRATED = 32  # largest number of assets to which the share of opacity is fitted


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """Settings by which finished assets are encoded as latents."""

    # A voxel counts as filled from this share of the mean opacity of voxels that contain a Gaussian.
    share: float = 0.25
    views: int = 150  # renders per asset over which features are averaged
    # DINOv2 model whose features are the input of the second stage's encoder.
    image_model: str = "dinov2_vitl14_reg"


class TrellisPipeline(EncodingFolder):
    """Pipeline of both stages of TRELLIS; implements `Pipeline`. Its assets are `SplatAsset`.

    Decoders and encoders are loaded when they are first needed. Latents of the first stage are not
    normalised. Latents of the second stage are stored normalised, in the scale of its flow.
    """

    def __init__(
        self,
        pipeline_file: files.PipelineFile,
        flows: Mapping[str, Any],
        conditioning: Conditioning | None,
        parts: Callable[[str], nn.Module],
        device: str | torch.device = "cpu",
        encoding: Encoding | None = None,
    ):
        """Build the stages.

        Args:
            pipeline_file: settings of pipeline.json.
            flows: networks by stage name.
            conditioning: embeddings of the prompts, or None if nothing is sampled.
            parts: function that reads a decoder or an encoder by its name in pipeline.json.
            device: device of decoders and encoders.
            encoding: settings for encoding assets; None means the defaults.
        Raises: ValueError if the conditioning or pipeline.json does not fit the networks.
        """
        super().__init__(conditioning, parts, device, {files.LATENT: (pipeline_file.mean, pipeline_file.std)})
        self.file = pipeline_file
        self.encoding = encoding or Encoding()
        self._image_encoder: ImageEncoder | None = None
        self.stages = [self._make_stage(name, flows[name]) for name in (files.STRUCTURE, files.LATENT)]
        channels = flows[files.LATENT].config.in_channels
        self.resolution = flows[files.LATENT].config.resolution
        # The scales are from pipeline.json and the channels from the model's own JSON file, so they may
        # differ.
        if len(pipeline_file.mean) != channels:
            raise ValueError(
                f"pipeline.json: slat_normalization has {len(pipeline_file.mean)} channels, but the model of"
                f" stage {files.LATENT!r} has {channels}. Use pipeline.json and models of one release."
            )

    def _make_stage(self, name: str, model: Any) -> FlowStage:
        """Build the stage `name` with its network. Raises: ValueError if the conditioning does not fit it."""
        config = model.config
        self.check_tokens(name, config.cond_channels, f"Embed them with {self.file.encoder}.")
        # The first stage is a dense grid, the second has features on voxels.
        latent_kind: Any = SparseVoxels if name == files.LATENT else DenseGrid
        return FlowStage(
            name=name,
            model=model,
            latents=latent_kind(channels=config.in_channels, resolution=config.resolution),
            path=FlowPath(sigma_min=self.file.sigma_min[name]),
            sampling=self.file.sampling[name],
        )

    @torch.no_grad()
    def advance(self, stage: str, x_0: Batch) -> list[Voxels]:
        """Decode structures [N, C, R, R, R] to their occupied voxels, [v, 3] int32 per sample.

        If a structure has no occupied voxel, its most probable voxel is returned.

        Args:
            stage: name of the first stage; no other stage has a next stage.
            x_0: structures.
        Raises: ValueError for structures that are not finite; EmptyStructure for a structure without occupied
            voxels within the context `rejecting_empty`.
        """
        assert stage == files.STRUCTURE
        check_finite("advance", x_0)
        assert isinstance(x_0, torch.Tensor)  # latents of the first stage are dense
        decoder = self.part(files.STRUCTURE_DECODER)
        voxels: list[Voxels] = []
        # One sample at a time, because the decoder needs 64^3 x 128 floats for each.
        for latent in x_0:
            logits = decoder(latent[None].to(self.device, torch.float32))  # [1, 1, 64, 64, 64]
            # An empty structure would leave the next stage without voxels, so its most probable voxel is
            # occupied.
            voxels += voxels_of(occupy_best_voxel(logits, f"stage {stage!r}"))
        return voxels

    def decode(self, x_0: SparseBatch) -> list[SplatAsset]:
        """Decode latents on voxels to one asset of Gaussians per sample."""
        return decode_gaussians(self, files.GAUSSIAN_DECODER, x_0)

    def encodes(self, asset: SplatAsset) -> Sequence[str]:
        """Return the names of both stages, because every asset can be encoded for both."""
        return (files.STRUCTURE, files.LATENT)

    @torch.no_grad()
    def encode_stage(self, asset: SplatAsset, stage: str) -> Latent:
        """Encode an asset as the latent of a stage, in the scale of the stage's flow.

        Returns: a grid [C, R, R, R] for the first stage, and latents on voxels for the second stage.
        Raises: FileNotFoundError or ValueError if the encoder or DINOv2 is not on this machine.
        """
        voxels = self.voxels(asset)
        resolution = self.resolution
        if stage == files.STRUCTURE:
            # The encoder returns (mean, log variance) for a batch; the mean of the only sample is the latent.
            return self.part(files.STRUCTURE_ENCODER)(grid_of([voxels], resolution).to(self.device))[0][0]
        encoder = self.part(files.LATENT_ENCODER)
        # DINOv2 is loaded only if an asset is encoded for the second stage.
        if self._image_encoder is None:
            self._image_encoder = ImageEncoder(self.encoding.image_model, self.device)
        features = voxel_features(
            asset.to(self.device),
            voxels.to(self.device),
            self._image_encoder,
            resolution,
            self.encoding.views,
        )
        latent, _ = encoder(SparseBatch.join([SparseSample(voxels.to(self.device), features)]))
        return SparseSample(voxels, self.normalised(latent.feats).to(voxels.device))

    def voxels(self, asset: SplatAsset) -> torch.Tensor:
        """Return the voxels [v, 3] int32 that an asset fills; see `find_filled_voxels`."""
        return find_filled_voxels(asset, self.resolution, self.encoding.share)


@dataclass(frozen=True)
class Trellis(FlowFamily):
    """Family of TRELLIS. Its options are the settings for encoding finished assets."""

    encoding: Encoding = Encoding()
    # True: the empty conditioning is zeros (images). False: it is the embedding of the empty text (texts).
    zero_null: bool = True

    name = "trellis"
    layout = "pipeline.json of TrellisTextTo3DPipeline or TrellisImageTo3DPipeline"
    stages = tuple(files.FLOWS)
    version = "TRELLIS, of texts or images"
    address = ADDRESSES["trellis"]
    loaded_by = (
        "from trellis.pipelines import TrellisImageTo3DPipeline;"
        ' TrellisImageTo3DPipeline.from_pretrained("{out}")'
        " (of texts: TrellisTextTo3DPipeline)"
    )
    up = "z"
    options = ("voxel_share", "views")
    candidate = staticmethod(candidate)
    read_asset = staticmethod(read_ply)
    read_samples = staticmethod(read_dso)
    show = staticmethod(show)
    fit_reward = staticmethod(RewardOfPairs)

    def recognises(self, root: Path) -> bool:
        """Return True if pipeline.json names a pipeline of TRELLIS, or is not a JSON object.

        For a damaged file, `load` then raises an error that names the file.
        """
        path = root / "pipeline.json"
        if not path.is_file():
            return False
        try:
            pipeline_name = json.loads(path.read_text()).get("name", "")
        except (ValueError, AttributeError):
            return True
        # Compared without regard to case, as in `read_pipeline`.
        return any(str(pipeline_name).lower() == f"trellis{kind}to3dpipeline" for kind in files.KINDS)

    def files(self, root: Path, stages: Sequence[str] | None = None) -> dict[str, Path]:
        """Return pipeline.json and the files of the flows, by name.

        If all stages have pairs, the files that the tuning loop needs are returned, too.

        Args:
            root: folder of the generator.
            stages: names of the stages that have pairs; None means all stages.
        Raises: FileNotFoundError for missing files.
        """
        pipeline_file = files.read_pipeline(root)
        # The tuning loop can run only with pairs of both stages.
        can_loop = stages is None or len(stages) == len(files.FLOWS)
        model_by_name = files.FLOWS | {name: name for name in files.NEEDED if can_loop}
        return {"pipeline.json": root / "pipeline.json", **files.paths_of(pipeline_file, model_by_name)}

    def load(
        self,
        root: Path,
        conditioning: Conditioning | None,
        *,
        stages: Sequence[str] | None = None,
        dtype: torch.dtype | None = torch.float32,
        device: str | torch.device = "cpu",
    ) -> TrellisPipeline:
        """Read the pipeline; see `FlowFamily.load`. Blocks are recomputed in the backward pass.

        This needs less memory and more time. Decoders and encoders are float32 and are read when they are
        first needed.
        """
        pipeline_file = files.read_pipeline(root)
        stem_by_stage = {
            stage: files.find_model(pipeline_file, model) for stage, model in files.FLOWS.items()
        }
        flows = files.flows_of(stem_by_stage, dtype, device, stages)
        for flow in flows.values():
            # Saves the memory of the activations; without gradients, as in sampling, it has no effect.
            flow.recompute = True  # type: ignore[assignment]
        # Called after all flows are built, because the size of the largest flow decides.
        return_memory_if_large(flows.values(), device)

        def read_part(name: str) -> nn.Module:
            """Read a decoder or an encoder by its name."""
            return files.load_model(files.find_model(pipeline_file, name), dtype=torch.float32, device=device)

        return TrellisPipeline(pipeline_file, flows, conditioning, read_part, device, self.encoding)

    def condition(self, pipeline: TrellisPipeline, stage: str) -> list[int]:
        """Return the shape [L, E] of the conditioning tokens of one sample."""
        model: Any = stage_of(pipeline, stage).model
        return [files.TOKENS[pipeline.file.kind], model.config.cond_channels]

    def configured(self, source: EncodingSource) -> "Trellis":
        """Return a copy of the family with the encoding settings of `source`."""
        return replace(self, encoding=Encoding(share=source.voxel_share, views=source.views))

    def open(self, source: ProblemSource, device: str | torch.device) -> Problem:
        """Open a folder and its preference pairs as a problem; see `open_folder`."""
        # One family reads pipelines of texts and of images; pipeline.json states which kind the folder has.
        zero_null = files.read_pipeline(Path(source.pipeline)).kind == "image"
        family = replace(self.configured(source), zero_null=zero_null)
        problem = open_folder(family, source, device)
        # The loop's latents depend on how assets are encoded.
        return replace(problem, identity={**problem.identity, "encoding": vars(family.encoding)})

    def check_pairs(self, pipeline: TrellisPipeline, folder: Path, stage: str, meta: Mapping) -> None:
        """Raise ValueError if the latents of the pairs are not normalised as pipeline.json states.

        Args:
            pipeline: pipeline to which the pairs must belong.
            folder: folder of the pairs, for the message.
            stage: name of the stage.
            meta: content of meta.json.
        """
        # Training on latents in another scale would raise no error, but give a wrong flow.
        if meta.get("normalization") != files.normalization(pipeline.file, stage):
            raise ValueError(
                f"{folder}: the latents of the pairs are not normalised as"
                f" {pipeline.file.root.name}/pipeline.json states. The pairs belong to another model. Make"
                " them again for this model with `eg3d-rlhf flow tune WORK --pairs-only`."
            )

    def pair_meta(self, pipeline: TrellisPipeline, stage: str, report: Mapping) -> Mapping:
        """Return the entries that the family adds to the meta.json of pairs.

        They are the normalisation of the latents, and the report of the import.
        """
        return {"normalization": files.normalization(pipeline.file, stage), "report": report}

    def embed_images(self, root: Path, images: Mapping[str, Path], device: torch.device) -> Conditioning:
        """Embed images with transparent backgrounds by DINOv2. Raises: ValueError for a pipeline of texts."""
        return ImageEncoder(_of_kind(root, "image").encoder, device).embed(images)

    def embed_texts(self, root: Path, texts: Sequence[str], device: torch.device) -> Conditioning:
        """Embed texts by CLIP. Raises: ValueError for a pipeline of images."""
        return TextEncoder(_of_kind(root, "text").encoder, device).embed(texts)

    def write_latent(self, path: Path, pipeline: TrellisPipeline, stage: str, latent: Latent) -> None:
        """Write a latent in the format of TRELLIS's data tools; see `trellis_pairs.write_latent`."""
        write_latent(path, pipeline, latent)

    def remark(self, folder: Path, lines: Sequence[Mapping], pipeline: TrellisPipeline) -> str:
        """Return a message with the share of opacity that should be used to encode assets.

        It is the share at which sampled assets best fill the voxels from which they were sampled; see
        `find_best_share`.

        Args:
            folder: folder of the sampled assets.
            lines: entries of the list of sampled assets.
            pipeline: pipeline that sampled them.
        """
        # A few assets suffice, because only eleven shares are compared.
        calibrated_lines = lines[:MAX_CALIBRATED]
        assets = [read_ply(folder / asset_line["look_at"]) for asset_line in calibrated_lines]
        voxels = [read_array(folder / asset_line[files.LATENT], "coords") for asset_line in calibrated_lines]
        share_report = find_best_share(assets, voxels, pipeline.resolution)
        return (
            f"With voxel_share={share_report['share']:g}, assets best match the voxels from which they were"
            f" sampled (mean intersection over union {share_report['iou']:.2f} over {len(assets)} assets)."
            f" Use this value with `eg3d-rlhf flow tune --loop --set voxel_share={share_report['share']:g}`."
        )

    def networks(self, root: Path) -> list[Network]:
        """List all networks that the tuning loop needs, and the encoder of prompts or images.

        The encoders of the second stage and of prompts or images may be missing.
        """
        pipeline_file = files.read_pipeline(root)
        models = (*files.FLOWS.values(), *files.NEEDED, files.LATENT_ENCODER)
        optional_models = {files.LATENT_ENCODER: "encoding your own assets, and the loop"}
        find_encoder = image_encoder_network if pipeline_file.kind == "image" else text_encoder_network
        return [
            *files.networks_of(pipeline_file, models, optional_models),
            find_encoder(
                pipeline_file.encoder, files.conditioning_widths(pipeline_file, files.FLOWS.values())
            ),
        ]

    def release(self, root: Path, stages: Sequence[str]) -> Release:
        """Describe the folder to export; see `trellis_files.release_of`.

        Args:
            root: folder of the generator.
            stages: names of the tuned stages.
        Raises: FileNotFoundError for a model that is missing, although the folder that pipeline.json states
            for it exists.
        """
        pipeline_file = files.read_pipeline(root)
        # Models whose stated folder does not exist are references to other repositories.
        required_models = {
            name
            for name, model_path in pipeline_file.models.items()
            if (pipeline_file.root / model_path).parent.is_dir()
        }
        return files.release_of(pipeline_file, stages, files.FLOWS, files.load_model, required_models)

    def released(self) -> dict[str, Callable[[], list[SizedStage]]]:
        """Return functions that build the stages of the published generators, by the generators' names."""
        return {
            "TRELLIS-text-large": partial(files.released_stages, "text", 768),
            "TRELLIS-image-large": partial(files.released_stages, "image", 1024),
        }


def _of_kind(root: Path, kind: str) -> files.PipelineFile:
    """Read pipeline.json of a pipeline that is conditioned on `kind`, "text" or "image".

    Raises: ValueError if the pipeline is of the other kind.
    """
    pipeline_file = files.read_pipeline(root)
    if pipeline_file.kind != kind:
        # Flag of `eg3d-rlhf flow new` for each kind of prompt.
        flag_by_kind = {"image": "--images", "text": "--prompts"}
        raise ValueError(
            f"{flag_by_kind[kind]} does not apply, because {root}/pipeline.json is a pipeline of"
            f" {pipeline_file.kind}s. Pass {flag_by_kind[pipeline_file.kind]} instead."
        )
    return pipeline_file


FAMILY = register(Trellis())
