"""Readers of the files of TRELLIS.2: pipeline.json, and for each model a JSON file and a file of weights.

Nothing is downloaded, and no code of the files is run. The structure's autoencoder is the one of TRELLIS;
pipeline.json refers to the repository of TRELLIS for it. The shape's encoder is named only in a second file,
texturing_pipeline.json. No file names the encoders of materials and of the structure, so they are searched
for under their published names.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from eg3d_rlhf.models.trellis.autoencoders import StructureDecoder, StructureEncoder, StructureVAEConfig
from eg3d_rlhf.models.trellis2 import (
    FlowConfig,
    StructureFlow,
    VoxelDecoder,
    VoxelDecoderConfig,
    VoxelEncoder,
    VoxelEncoderConfig,
    VoxelFlow,
    VoxelNetwork,
    angles_of,
)
from eg3d_rlhf.models.weights import State, empty
from eg3d_rlhf.tuning.flow.base.family import SizedStage
from eg3d_rlhf.tuning.flow.base.stage import DenseGrid, FlowStage, LatentKind, Sampling, SparseVoxels
from eg3d_rlhf.tuning.flow.families import trellis_files as files
from eg3d_rlhf.tuning.flow.families.folder import are_scales

NAME = "Trellis2ImageTo3DPipeline"
TEXTURING = "texturing_pipeline.json"
STRUCTURE, LOW, HIGH, TEXTURE = STAGES = ("structure", "shape_512", "shape_1024", "texture")
_CASCADE = {  # stage -> name of its flow in pipeline.json
    STRUCTURE: "sparse_structure_flow_model",
    LOW: "shape_slat_flow_model_512",
    HIGH: "shape_slat_flow_model_1024",
    TEXTURE: "tex_slat_flow_model_1024",
}
CHAINS = {  # default_pipeline_type -> stages in order -> names of their flows in pipeline.json
    "512": {STRUCTURE: _CASCADE[STRUCTURE], LOW: _CASCADE[LOW], TEXTURE: "tex_slat_flow_model_512"},
    "1024": {stage: model for stage, model in _CASCADE.items() if stage != LOW},
    "1024_cascade": _CASCADE,
    "1536_cascade": _CASCADE,
}
STRUCTURE_DECODER, SHAPE_DECODER, TEXTURE_DECODER = DECODERS = (
    "sparse_structure_decoder",
    "shape_slat_decoder",
    "tex_slat_decoder",
)
STRUCTURE_ENCODER, SHAPE_ENCODER, TEXTURE_ENCODER = ENCODERS = (
    "sparse_structure_encoder",
    "shape_slat_encoder",
    "tex_slat_encoder",
)
USUAL_STEMS = {  # model that no file names -> published name of its files, without ending
    STRUCTURE_ENCODER: "ss_enc_conv3d_16l8_fp16",
    SHAPE_ENCODER: "shape_enc_next_dc_f16c32_fp16",
    TEXTURE_ENCODER: "tex_enc_next_dc_f16c32_fp16",
}
OPTIONAL = {  # model that may be missing -> what cannot be done without it, for `flow check`
    STRUCTURE_ENCODER: "encoding your own meshes, and the loop",
    SHAPE_ENCODER: "encoding your own meshes, and the loop",
    TEXTURE_ENCODER: "encoding materials of assets",
}
RELEASED = {  # model -> number of tensors and number of values in its published file
    "sparse_structure_flow_model": (640, 1_292_179_976),
    "shape_slat_flow_model_512": (640, 1_292_253_728),
    "shape_slat_flow_model_1024": (640, 1_292_253_728),
    "tex_slat_flow_model_512": (640, 1_292_302_880),
    "tex_slat_flow_model_1024": (640, 1_292_302_880),
    SHAPE_DECODER: (292, 474_231_463),
    TEXTURE_DECODER: (284, 474_216_006),
    SHAPE_ENCODER: (284, 354_385_392),
    TEXTURE_ENCODER: (284, 354_385_392),
}
# Stage -> name of its sampler in pipeline.json; both shape stages share one.
SAMPLERS = {
    STRUCTURE: "sparse_structure_sampler",
    LOW: "shape_slat_sampler",
    HIGH: "shape_slat_sampler",
    TEXTURE: "tex_slat_sampler",
}
# Stage -> name of its normalisation in pipeline.json; the structure has none.
NORMALIZATIONS = {
    LOW: "shape_slat_normalization",
    HIGH: "shape_slat_normalization",
    TEXTURE: "tex_slat_normalization",
}
ENCODER = "facebook/dinov3-vitl16-pretrain-lvd1689m"  # default if pipeline.json names no image encoder
# Class in the JSON files, without the prefix "Elastic" -> class and configuration in this package.
ARCHITECTURES: files.Architectures = {
    "SparseStructureFlowModel": (StructureFlow, FlowConfig),
    "SLatFlowModel": (VoxelFlow, FlowConfig),
    "SparseStructureDecoder": (StructureDecoder, StructureVAEConfig),
    "SparseStructureEncoder": (StructureEncoder, StructureVAEConfig),
    "FlexiDualGridVaeDecoder": (VoxelDecoder, VoxelDecoderConfig),
    "FlexiDualGridVaeEncoder": (VoxelEncoder, VoxelEncoderConfig),
    "SparseUnetVaeDecoder": (VoxelDecoder, VoxelDecoderConfig),
    "SparseUnetVaeEncoder": (VoxelEncoder, VoxelEncoderConfig),
}
# spconv names a convolution's tensors one level deeper than other backends.
_NESTED = re.compile(r"\.(conv[12]?)\.conv\.(weight|bias)$")


@dataclass(frozen=True, kw_only=True)
class PipelineFile(files.ModelFolder):
    """Settings of pipeline.json.

    `kind` is a key of CHAINS. `models` has the models of pipeline.json and of texturing_pipeline.json.
    """

    # Mean and standard deviation per channel, for each stage except the first.
    normalization: Mapping[str, tuple[tuple[float, ...], tuple[float, ...]]]
    usual: ClassVar[Mapping[str, str]] = USUAL_STEMS
    # The structure's encoder is that of TRELLIS; the others are at the address of the family.
    usual_addresses: ClassVar[Mapping[str, str]] = {STRUCTURE_ENCODER: files.IMAGE_ADDRESS}

    @property
    def flows(self) -> dict[str, str]:
        """Names of the flows in pipeline.json, by stage, in the order of the stages."""
        return CHAINS[self.kind]


def read_pipeline(root: Path) -> PipelineFile:
    """Read <root>/pipeline.json, and the models of <root>/texturing_pipeline.json if it exists.

    Raises: FileNotFoundError if pipeline.json is missing; ValueError if it is not a file of TRELLIS.2, if it
        lacks a model, or if a sampler has unsupported settings.
    """
    root = Path(root)
    path = root / "pipeline.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"--pipeline: there is no file pipeline.json in {root}. Pass the folder of a TRELLIS.2 model."
        )
    pipeline_json = files.read_json(path)
    pipeline_name = pipeline_json.get("name")
    pipeline_args = pipeline_json.get("args")
    if pipeline_name != NAME:
        raise ValueError(
            f"{path}: expected the name {NAME}, got {pipeline_name!r}. Pass the folder of a TRELLIS.2 model."
        )
    if not isinstance(pipeline_args, dict) or not isinstance(pipeline_args.get("models"), dict):
        raise ValueError(f"{path}: the object args.models is missing. Download the file again.")
    # "1024_cascade" is the default of the original.
    pipeline_type = pipeline_args.get("default_pipeline_type", "1024_cascade")
    if pipeline_type not in CHAINS:
        raise ValueError(
            f"{path}: default_pipeline_type must be one of {', '.join(CHAINS)}, got {pipeline_type!r}."
            " Correct it in the file, or download the file again."
        )
    model_by_stage = CHAINS[pipeline_type]
    models = pipeline_args["models"]
    missing_models = [model for model in (*model_by_stage.values(), *DECODERS) if model not in models]
    if missing_models:
        raise ValueError(
            f"{path}: args.models does not name {', '.join(missing_models[:8])}, which {pipeline_type!r}"
            " needs. Download the file again."
        )
    samplers = {stage: _sampler(path, pipeline_args, SAMPLERS[stage]) for stage in model_by_stage}
    image_encoder = pipeline_args.get("image_cond_model") or {}
    # The second file names the shape's encoder. It is optional.
    texturing_path = root / TEXTURING
    texturing_args = files.read_json(texturing_path).get("args") if texturing_path.is_file() else None
    texturing_models = texturing_args.get("models") if isinstance(texturing_args, dict) else None
    return PipelineFile(
        root=root,
        kind=pipeline_type,
        # If both files name a model, the path in pipeline.json is used.
        models={**(texturing_models or {}), **models},
        # The entry is an object with args.model_name, or just a name.
        encoder=(
            str((image_encoder.get("args") or {}).get("model_name") or ENCODER)
            if isinstance(image_encoder, Mapping)
            else str(image_encoder)
        ),
        sampling={stage: sampling for stage, (sampling, _) in samplers.items()},
        sigma_min={stage: sigma_min for stage, (_, sigma_min) in samplers.items()},
        normalization={
            stage: _normalization(path, pipeline_args, key)
            for stage, key in NORMALIZATIONS.items()
            if stage in model_by_stage
        },
    )


def _sampler(path: Path, pipeline_args: Mapping, sampler_name: str) -> tuple[Sampling, float]:
    """Read the settings of the sampler `sampler_name`, and sigma_min, the noise that remains at t = 0.

    guidance_strength in the file is 1 + w, with w the `cfg_strength` of this package: the guided velocity is
    (1 + w) v_cond - w v_null.

    Args:
        path: path of pipeline.json, for messages.
        pipeline_args: object args of pipeline.json.
        sampler_name: name of the sampler's entry in `pipeline_args`.
    """

    def parse_sampler(name: str, params: Mapping) -> Sampling:
        """Convert the params of a sampler to settings. The name of its class is not used."""
        trellis_names = sorted(str(k) for k in params if str(k).startswith("cfg_"))
        if trellis_names:
            # These are settings of TRELLIS, whose cfg_strength is w and not 1 + w.
            raise ValueError(
                f"the sampler has settings of TRELLIS and not of TRELLIS.2: {', '.join(trellis_names)}. Use"
                " guidance_strength = cfg_strength + 1 and guidance_interval instead."
            )
        guidance_strength = float(params.get("guidance_strength", 3.0))
        # t = 1 is noise in the file and in this package, so the interval needs no conversion.
        interval_start, interval_end = (float(t) for t in params.get("guidance_interval", (0.0, 1.0)))
        if guidance_strength < 1:
            raise ValueError(
                f"guidance_strength must be >= 1, got {guidance_strength}. Smaller values would guide away"
                " from the prompt. Set it to 1 for no guidance."
            )
        return Sampling(
            steps=int(params.get("steps", 50)),
            rescale_t=float(params.get("rescale_t", 1.0)),
            cfg_strength=guidance_strength - 1,
            cfg_interval=(interval_start, interval_end),
            cfg_rescale=float(params.get("guidance_rescale", 0.0)),
        )

    return files.sampler_of(path, pipeline_args.get(sampler_name), sampler_name, parse_sampler)


def _normalization(
    path: Path, pipeline_args: Mapping, normalization_name: str
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Read the normalisation `normalization_name`: the mean and the standard deviation per channel.

    Raises: ValueError for missing or invalid numbers.
    """
    normalization_entry = pipeline_args.get(normalization_name) or {}
    try:
        mean, std = (tuple(map(float, normalization_entry[name])) for name in ("mean", "std"))
    except (KeyError, TypeError, ValueError):
        # Reported by the error below.
        mean = ()
        std = ()
    if not mean or not are_scales(mean, std):
        raise ValueError(
            f"{path}: {normalization_name} must have a finite mean and a std > 0 per channel, got"
            f" {str(normalization_entry)[:80]}. Download the file again."
        )
    return mean, std


def load_model(
    stem: Path,
    dtype: torch.dtype | None = None,
    *,
    weights_path: Path | None = None,
    device: str | torch.device = "cpu",
) -> nn.Module:
    """Build a model from <stem>.json and its weights; see `trellis_files.load_model`.

    Raises: FileNotFoundError; ValueError for files that do not fit each other. This includes stored angles of
        rotary position embeddings (`rope_phases`) that do not match the resolution in the JSON file.
    """
    return files.load_model(
        stem,
        dtype,
        weights_path=weights_path,
        device=device,
        architectures=ARCHITECTURES,
        prepare=convert_tensors,
    )


def convert_tensors(model: Any, config: Any, tensors: State, message_prefix: str) -> State:
    """Convert the tensors of a file to the names of this package.

    The tensors of convolutions are renamed. The angles of rotary position embeddings (`rope_phases`, complex
    numbers of length 1) are removed from `tensors`, because this package computes them.

    Args:
        model: class of the model.
        config: configuration of the model.
        tensors: tensors of the file by name.
        message_prefix: beginning of the message of an error.
    Raises: ValueError if stored angles differ from the computed ones.
    """
    # "conv1.conv.weight" -> "conv1.weight"
    if issubclass(model, VoxelNetwork):
        return {_NESTED.sub(r".\1.\2", name): tensor for name, tensor in tensors.items()}
    if model is StructureFlow and "rope_phases" in tensors:
        # Removed, because the network here computes the angles and has no such buffer.
        stored_phases = tensors.pop("rope_phases")
        angles = angles_of(torch.cartesian_prod(*[torch.arange(config.resolution)] * 3), config.head_channels)
        # Stored angles may have been rounded to half precision, hence the tolerance of 1e-2.
        expected_phases = torch.polar(torch.ones_like(angles), angles)
        if (
            not stored_phases.is_complex()
            or stored_phases.shape != expected_phases.shape
            or not torch.allclose(stored_phases.to(expected_phases), expected_phases, atol=1e-2)
        ):
            stored_form_text = f"{stored_phases.dtype} {list(stored_phases.shape)}"
            raise ValueError(
                f"{message_prefix}: the stored rope_phases ({stored_form_text}) differ from those of the"
                f" resolution in the model's JSON file (complex {list(expected_phases.shape)}). Download"
                " both files again."
            )
    return tensors


def model_files(pipeline_file: PipelineFile) -> dict[str, Path]:
    """Return all files from which the pipeline is read, by name. Encoders are included if they exist.

    Raises: FileNotFoundError for a missing flow or decoder.
    """
    paths = {
        name: pipeline_file.root / name
        for name in ("pipeline.json", TEXTURING)
        if (pipeline_file.root / name).is_file()
    }
    # The hashes of these files identify a problem, so every file that is read must be included.
    model_names = [
        *pipeline_file.flows.values(),
        *DECODERS,
        *(name for name in ENCODERS if files.has_model(pipeline_file, name)),
    ]
    return paths | files.paths_of(pipeline_file, dict(zip(model_names, model_names, strict=True)))


# Pixels per side of the image -> number of DINOv3's tokens: 1 class token, 4 registers, (side / 16)^2
# patches.
DINO3 = {"512": 1029, "1024": 4101}


def released_stages() -> list[SizedStage]:
    """Build the stages of TRELLIS.2-4B without weights, for estimates of memory and time.

    The sizes are copied from the published JSON files of the models.
    """
    stages = []
    # Stage, grid cells per axis, channels of the latent, channels of the features that the previous stage
    # provides, pixels per side of the image.
    for name, cells, channels, given_channels, image_side in (
        ("structure", 16, 8, 0, "512"),
        ("shape_512", 32, 32, 0, "512"),
        ("shape_1024", 64, 32, 0, "1024"),
        ("texture", 64, 32, 32, "1024"),
    ):
        config = FlowConfig(
            resolution=cells,
            in_channels=channels + given_channels,
            out_channels=channels,
            model_channels=1536,
            cond_channels=1024,
            num_blocks=30,
            num_heads=12,
            mlp_ratio=5.3334,
            pe_mode="rope",
            share_mod=True,
            qk_rms_norm=True,
            qk_rms_norm_cross=True,
        )
        latent_kwargs = dict(channels=channels, resolution=cells)
        # The structure is a dense grid; all other stages have features on voxels.
        latents: LatentKind = (
            DenseGrid(**latent_kwargs)
            if name == "structure"
            else SparseVoxels(given=given_channels, **latent_kwargs)
        )
        flow_class = StructureFlow if name == "structure" else VoxelFlow
        stage = FlowStage(
            name=name,
            model=empty(partial(flow_class, config)),
            latents=latents,
            sampling=Sampling(steps=12, cfg_strength=6.5),
        )
        stages.append(SizedStage(stage=stage, conditioning=[DINO3[image_side], 1024]))
    return stages
