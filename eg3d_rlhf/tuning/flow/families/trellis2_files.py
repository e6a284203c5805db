"""Files of TRELLIS.2: pipeline.json, and for each model a JSON file of its architecture and its weights.

Nothing is downloaded or run. The structure's autoencoder is TRELLIS's and is named by reference into a folder
of TRELLIS. The shape's encoder is named only in texturing_pipeline.json. The encoders of materials and of the
structure are named nowhere, so they are searched for under their usual names.
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
from eg3d_rlhf.tuning.flow.base.stage import DenseGrid, FlowStage, Sampling, SparseVoxels
from eg3d_rlhf.tuning.flow.families import trellis_files as files
from eg3d_rlhf.tuning.flow.families.folder import are_scales

NAME = "Trellis2ImageTo3DPipeline"
TEXTURING = "texturing_pipeline.json"
STRUCTURE, LOW, HIGH, TEXTURE = STAGES = ("structure", "shape_512", "shape_1024", "texture")
_CASCADE = {  # stage -> its model in pipeline.json
    STRUCTURE: "sparse_structure_flow_model",
    LOW: "shape_slat_flow_model_512",
    HIGH: "shape_slat_flow_model_1024",
    TEXTURE: "tex_slat_flow_model_1024",
}
CHAINS = {  # default_pipeline_type -> its stages in order, and their models in pipeline.json
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
USUAL_STEMS = {  # models that no file names -> their published names, without ending
    STRUCTURE_ENCODER: "ss_enc_conv3d_16l8_fp16",
    SHAPE_ENCODER: "shape_enc_next_dc_f16c32_fp16",
    TEXTURE_ENCODER: "tex_enc_next_dc_f16c32_fp16",
}
LOST = {  # encoder -> what cannot be done without it, for `flow check`
    STRUCTURE_ENCODER: "encoding your own meshes, and the loop",
    SHAPE_ENCODER: "encoding your own meshes, and the loop",
    TEXTURE_ENCODER: "encoding materials of assets",
}
RELEASED = {  # number of tensors and of values in the published files
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
# Stage -> its sampler in pipeline.json; both shape stages share one.
SAMPLERS = {
    STRUCTURE: "sparse_structure_sampler",
    LOW: "shape_slat_sampler",
    HIGH: "shape_slat_sampler",
    TEXTURE: "tex_slat_sampler",
}
# Stage -> its normalisation in pipeline.json; the structure has none.
NORMALIZATIONS = {
    LOW: "shape_slat_normalization",
    HIGH: "shape_slat_normalization",
    TEXTURE: "tex_slat_normalization",
}
ENCODER = "facebook/dinov3-vitl16-pretrain-lvd1689m"  # default if pipeline.json names no image encoder
ARCHITECTURES: files.Architectures = {  # published names of classes, without the prefix "Elastic"
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
    """Settings of pipeline.json. Its kind is one of CHAINS; its models are those of both pipelines' files."""

    # Mean and standard deviation per channel, for each stage except the first.
    normalization: Mapping[str, tuple[tuple[float, ...], tuple[float, ...]]]
    usual: ClassVar[Mapping[str, str]] = USUAL_STEMS

    @property
    def flows(self) -> dict[str, str]:
        """Names of the flows' models by stage, in order."""
        return CHAINS[self.kind]


def read_pipeline(root: Path) -> PipelineFile:
    """Read <root>/pipeline.json.

    Raises: FileNotFoundError; ValueError for a file that is not TRELLIS.2's, lacks a model, or whose samplers
        follow another convention.
    """
    root, path = Path(root), Path(root) / "pipeline.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"pipeline: expected TRELLIS.2's pipeline.json, got none in {root}. Name the folder of a"
            " TRELLIS.2 model."
        )
    content = files.read_json(path)
    name = content.get("name")
    args = content.get("args")
    if name != NAME or not isinstance(args, dict) or not isinstance(args.get("models"), dict):
        raise ValueError(
            f"{path}: expected the name {NAME} and args.models, got {name!r}. Name the folder of a TRELLIS.2"
            " model."
        )
    # The default of the original.
    kind = args.get("default_pipeline_type", "1024_cascade")
    if kind not in CHAINS:
        raise ValueError(
            f"{path}: expected default_pipeline_type among {', '.join(CHAINS)}, got {kind!r}. Write one of"
            " them."
        )
    chain = CHAINS[kind]
    models = args["models"]
    missing = [model for model in (*chain.values(), *DECODERS) if model not in models]
    if missing:
        raise ValueError(
            f"{path}: expected all models of {kind!r}, but {', '.join(missing[:8])} is missing. Restore the"
            " file."
        )
    samplers = {stage: _sampler(path, args, SAMPLERS[stage]) for stage in chain}
    image = args.get("image_cond_model") or {}
    # The second file names the shape's encoder; it may be missing.
    beside = root / TEXTURING
    texturing = files.read_json(beside).get("args") if beside.is_file() else None
    named = texturing.get("models") if isinstance(texturing, dict) else None
    return PipelineFile(
        root=root,
        kind=kind,
        # pipeline.json wins where both name a model
        models={**(named or {}), **models},
        encoder=(
            # The entry is a mapping with arguments, or just a name
            str((image.get("args") or {}).get("model_name") or ENCODER)
            if isinstance(image, Mapping)
            else str(image)
        ),
        sampling={stage: sampling for stage, (sampling, _) in samplers.items()},
        sigma_min={stage: sigma_min for stage, (_, sigma_min) in samplers.items()},
        normalization={
            stage: _normalization(path, args, key) for stage, key in NORMALIZATIONS.items() if stage in chain
        },
    )


def _sampler(path: Path, args: Mapping, key: str) -> tuple[Sampling, float]:
    """Read the settings of a sampler and sigma_min. The file's guidance_strength g is 1 + w here."""

    def read(name: str, params: Mapping) -> Sampling:
        foreign = sorted(str(k) for k in params if str(k).startswith("cfg_"))
        if foreign:
            # TRELLIS's files mean w by cfg_strength, TRELLIS.2's mean 1 + w by guidance_strength.
            raise ValueError(
                f"expected guidance_strength, where 1 means no guidance, got {', '.join(foreign)}, where 0"
                " means none. Rename the setting and convert its value."
            )
        strength = float(params.get("guidance_strength", 3.0))
        # Here, too, t = 1 is noise, so the interval needs no conversion.
        low, high = (float(t) for t in params.get("guidance_interval", (0.0, 1.0)))
        if strength < 1:
            raise ValueError(
                f"expected guidance_strength >= 1, got {strength}. Smaller values would guide away from the"
                " prompt. Correct the file."
            )
        return Sampling(
            steps=int(params.get("steps", 50)),
            rescale_t=float(params.get("rescale_t", 1.0)),
            cfg_strength=strength - 1,
            cfg_interval=(low, high),
            cfg_rescale=float(params.get("guidance_rescale", 0.0)),
        )

    return files.sampler_of(path, args.get(key), key, read)


def _normalization(path: Path, args: Mapping, key: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Read the mean and the standard deviation per channel.

    Raises: ValueError for missing or invalid numbers.
    """
    content = args.get(key) or {}
    try:
        mean, std = (tuple(map(float, content[name])) for name in ("mean", "std"))
    except (KeyError, TypeError, ValueError):
        mean = ()
        std = ()
    if not mean or not are_scales(mean, std):
        raise ValueError(
            f"{path}: expected {key} with a finite mean and a std > 0 per channel, got {str(content)[:80]}."
            " Restore it."
        )
    return mean, std


def load_model(
    stem: Path,
    dtype: torch.dtype | None = None,
    *,
    weights: Path | None = None,
    device: str | torch.device = "cpu",
) -> nn.Module:
    """Build a model from <stem>.json and its weights; see `trellis_files.load_model`.

    Raises: ValueError also for a file whose angles of rotary positions (`rope_phases`) do not match its JSON
        file.
    """
    return files.load_model(
        stem, dtype, weights=weights, device=device, architectures=ARCHITECTURES, prepare=prepared
    )


def prepared(model: Any, config: Any, state: State, who: str) -> State:
    """Bring the tensors of a file to the names of this package.

    Names of convolutions are unified. Angles of rotary positions are computed here; if a file holds them, as
    complex numbers of length 1, they are compared and dropped.
    """
    # "conv1.conv.weight" -> "conv1.weight"
    if issubclass(model, VoxelNetwork):
        return {_NESTED.sub(r".\1.\2", name): tensor for name, tensor in state.items()}
    if model is StructureFlow and "rope_phases" in state:
        # Removed, because the network here computes the angles and has no such buffer.
        stored = state.pop("rope_phases")
        angles = angles_of(torch.cartesian_prod(*[torch.arange(config.resolution)] * 3), config.head_channels)
        # Stored angles may have been rounded to half precision, hence the tolerance of 1e-2.
        expected = torch.polar(torch.ones_like(angles), angles)
        if (
            not stored.is_complex()
            or stored.shape != expected.shape
            or not torch.allclose(stored.to(expected), expected, atol=1e-2)
        ):
            form = f"complex {list(expected.shape)}"
            got = f"{stored.dtype} {list(stored.shape)}"
            raise ValueError(
                f"{who}: the stored rope_phases, {got}, are not those of the JSON file's resolution, {form}."
                " Correct the model's JSON file."
            )
    return state


def model_files(file: PipelineFile) -> dict[str, Path]:
    """Return all files that the pipeline is read from, by name; encoders only if they exist.

    Raises: FileNotFoundError.
    """
    paths = {name: file.root / name for name in ("pipeline.json", TEXTURING) if (file.root / name).is_file()}
    # The files identify a problem, so all that is read must be among them.
    models = [*file.flows.values(), *DECODERS, *(name for name in ENCODERS if files.is_there(file, name))]
    return paths | files.paths_of(file, dict(zip(models, models, strict=True)))


DINO3 = {"512": 1029, "1024": 4101}  # pixels per side of the image -> number of DINOv3's tokens


def released_stages() -> list[SizedStage]:
    """Build the stages of TRELLIS.2-4B without weights, with the sizes of its JSON files."""
    made = []
    # Stage, grid cells per axis, channels of the latent, channels of given features, pixels of the image.
    for name, cells, channels, given, edge in (
        ("structure", 16, 8, 0, "512"),
        ("shape_512", 32, 32, 0, "512"),
        ("shape_1024", 64, 32, 0, "1024"),
        ("texture", 64, 32, 32, "1024"),
    ):
        config = FlowConfig(
            resolution=cells,
            in_channels=channels + given,
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
        grid = dict(channels=channels, resolution=cells)
        kind: Any = (
            partial(DenseGrid, **grid) if name == "structure" else partial(SparseVoxels, given=given, **grid)
        )
        make = StructureFlow if name == "structure" else VoxelFlow
        stage = FlowStage(
            name=name,
            model=empty(partial(make, config)),
            latents=kind(),
            sampling=Sampling(steps=12, cfg_strength=6.5),
        )
        made.append(SizedStage(stage=stage, conditioning=[DINO3[edge], 1024]))
    return made
