"""SAM 3D Objects' files: pipeline.yaml, and per part a YAML file beside a checkpoint. Nothing is downloaded or run.

A generator's checkpoint is a larger state dict. Its network and the embedder of what it is told lie under prefixes:

    _base_models.generator.reverse_fn.backbone.X      the flow's network
    _base_models.condition_embedder.X                 the embedder; or in the network, under condition_embedder.

Other names in it are passed over. What the YAML files say of training is passed over, too; other settings that are not known are refused
where they are switched on.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from eg3d_rlhf.models.sam3d import (
    Embedder,
    LatentConfig,
    MixtureConfig,
    MixtureFlow,
    Pictures,
    PointConfig,
    PointPatches,
    VoxelFlow,
    VoxelFlowConfig,
)
from eg3d_rlhf.models.trellis.autoencoders import GaussianDecoder, GaussianDecoderConfig, StructureDecoder, StructureVAEConfig
from eg3d_rlhf.models.vit import DinoConfig
from eg3d_rlhf.models.weights import below, empty, fill, read
from eg3d_rlhf.tuning.flow.families.folder import mentions, read_yaml
from eg3d_rlhf.tuning.flow.families.trellis.files import filled
from eg3d_rlhf.tuning.flow.stage import Sampling

PIPELINE, PACKAGE = "pipeline.yaml", "sam3d_objects"
STRUCTURE, LATENT = STAGES = ("structure", "latent")
SHORT = {STRUCTURE: "ss", LATENT: "slat"}  # how pipeline.yaml calls the stages
PARTS = {STRUCTURE: "ss_generator", LATENT: "slat_generator", "structure decoder": "ss_decoder", "decoder": "slat_decoder_gs"}
FLOW = "_base_models.generator.reverse_fn.backbone."
EMBEDDERS = ("_base_models.condition_embedder.", f"{FLOW}condition_embedder.")
GENERATORS = ("ShortCut", "FlowMatching")  # both have their data at t = 1
PASSED = {  # settings of networks that concern training, or that others say
    "_target_", "condition_embedder", "attn_mode", "pe_mode", "initialization", "resolution", "in_channels", "out_channels", "patch_size",
    "latent_mapping", "pretrained_ckpt_path", "freeze_d_time_embedder", "freeze_shared_parameters", "use_checkpoint",
}


@dataclass(frozen=True, kw_only=True)
class GeneratorFile:
    """One stage: what its YAML file says."""

    checkpoint: Path
    config: MixtureConfig | VoxelFlowConfig
    embedder: Mapping  # what it says of the embedder
    sigma_min: float


@dataclass(frozen=True, kw_only=True)
class PipelineFile:
    """What pipeline.yaml and the generators' files say."""

    root: Path
    generators: Mapping[str, GeneratorFile]  # by stage
    sampling: Mapping[str, Sampling]  # by stage
    mean: tuple[float, ...]  # of the second stage's latents, per channel
    std: tuple[float, ...]
    prune: int  # voxels on all six sides that make one inner, which is left out; 0: none is
    files: Mapping[str, Path]  # all that is read, by name


def recognises(root: Path) -> bool:
    """Whether pipeline.yaml is SAM 3D's."""
    return mentions(root / PIPELINE, PACKAGE)


def read_pipeline(root: Path) -> PipelineFile:
    """Read <root>/pipeline.yaml and the YAML files that it names.

    Raises: FileNotFoundError; ValueError for files that are not SAM 3D's, or of another convention.
    """
    root, path = Path(root), Path(root) / PIPELINE
    if not path.is_file():
        raise FileNotFoundError(f"pipeline: expected SAM 3D's {PIPELINE}, got none in {root}. Name the folder of its checkpoints.")
    content, paths = read_yaml(path), {PIPELINE: path}
    for part in PARTS.values():
        for kind in ("config", "ckpt"):
            name = content.get(f"{part}_{kind}_path")
            file = root / str(name)
            if not name or not file.is_file():
                raise FileNotFoundError(f"{path}: expected {part}_{kind}_path to name a file, got {name!r}. Restore it.")
            paths[f"{part}.{kind}"] = file
    generators = {stage: _generator(stage, paths[f"{PARTS[stage]}.config"], paths[f"{PARTS[stage]}.ckpt"]) for stage in STAGES}
    try:
        mean, std = (tuple(map(float, content[f"slat_{name}"])) for name in ("mean", "std"))
        prune = int(content.get("downsample_ss_dist") or 0)
    except (KeyError, TypeError, ValueError):
        mean, std, prune = (), (), 0
    if not mean or len(mean) != len(std) or not all(map(math.isfinite, mean)) or not all(0 < s < math.inf for s in std) or prune < 0:
        raise ValueError(f"{path}: expected slat_mean and slat_std per channel, finite and > 0, and downsample_ss_dist >= 0, got others.")
    scales = {stage: generators[stage].config.time_scale for stage in STAGES}
    sampling = {stage: _sampling(path, content, stage, scales[stage]) for stage in STAGES}
    return PipelineFile(root=root, generators=generators, sampling=sampling, mean=mean, std=std, prune=prune, files=paths)


def _generator(stage: str, path: Path, checkpoint: Path) -> GeneratorFile:
    """What a generator's file says. Raises: ValueError naming the file."""
    try:
        module = read_yaml(path)["module"]
        flow = module["generator"]["backbone"]
        guided = flow["reverse_fn"]
        network = guided["backbone"]
        kinds = [str(part["_target_"]) for part in (flow, network)]
    except (KeyError, TypeError) as error:
        expected = "module.generator.backbone with reverse_fn.backbone, each with a _target_"
        raise ValueError(f"{path}: expected {expected}, got none for {error}. Name SAM 3D's file.") from None
    if not all(kind.startswith(PACKAGE) for kind in kinds) or kinds[0].rpartition(".")[2] not in GENERATORS:
        raise ValueError(f"{path}: expected a generator {' or '.join(GENERATORS)} of {PACKAGE}, got {', '.join(kinds)}. Name its file.")
    if flow.get("reversed_timestamp"):
        raise ValueError(f"{path}: expected data at t = 1, got reversed_timestamp on. What it turns is not known here.")
    scale = {"time_scale": float(flow.get("time_scale", 1000.0))}
    embedder = (module.get("condition_embedder") or {}).get("backbone") or network.get("condition_embedder") or {}
    try:
        config: Any = (
            _made(MixtureConfig, network, latents=_latents(network), **scale) if stage == STRUCTURE
            else _made(VoxelFlowConfig, network, **{k: network[k] for k in SIZES if k in network}, **scale)
        )
        return GeneratorFile(checkpoint=checkpoint, config=config, embedder=embedder, sigma_min=float(flow.get("sigma_min", 0.0)))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}" if isinstance(error, ValueError) else f"{path}: expected sizes, got {error!r}.") from None


SIZES = ("resolution", "in_channels", "out_channels", "patch_size", "pe_mode")  # of the second network; the first says them of each latent


def _made(kind: Any, content: Mapping, **more: Any) -> Any:
    """A configuration of settings. Raises: ValueError for unknown ones that are switched on, and for missing ones."""
    fields = {field.name: field for field in dataclasses.fields(kind)}
    passed = PASSED - set(more)
    unknown = sorted(name for name, value in content.items() if name not in fields and name not in PASSED and value)
    given = {name: value for name, value in content.items() if name in fields and name not in passed} | more
    nothing = dataclasses.MISSING
    missing = [n for n, f in fields.items() if f.default is nothing and f.default_factory is nothing and n not in given]
    if unknown or missing:
        raise ValueError(f"expected the settings of {kind.__name__}, got unknown {unknown[:8]}, missing {missing[:8]}. Name SAM 3D's file.")
    return kind(**given)


def _latents(network: Mapping) -> dict[str, LatentConfig]:
    """The first stage's dictionary."""
    latents = {}
    for name, entry in network["latent_mapping"].items():
        places = entry.get("pos_embedder") or {}
        resolution = places.get("resolution")
        if places.get("patch_size", 1) != 1:
            raise ValueError(f"latent_mapping.{name}: expected patch_size 1, got {places['patch_size']}. Others are not read.")
        tokens = int(resolution) ** 3 if resolution else int(places.get("token_len", 1))
        latents[name] = LatentConfig(in_channels=int(entry["in_channels"]), tokens=tokens, resolution=resolution)
    return latents


def _sampling(path: Path, content: Mapping, stage: str, time_scale: float) -> Sampling:
    """Settings of a stage's sampler: times are there 0 at the noise and scaled, guidance is (1 + w) v_cond - w v_null in both."""
    short, number = SHORT[stage], {STRUCTURE: 1, LATENT: 2}[stage]
    if content.get(f"{short}_cfg_strength_pm"):
        raise ValueError(f"{path}: expected {short}_cfg_strength_pm 0, got another. Guidance away from the point map alone is not read.")
    distilled = bool(content.get(f"use_stage{number}_distillation", False))  # steps of a size that the network is told, without guidance
    try:
        low, high = (float(t) / time_scale for t in content.get(f"{short}_cfg_interval", (0, time_scale / 2)))
        return Sampling(
            steps=int(content.get(f"{short}_inference_steps", 25)), rescale_t=float(content.get(f"{short}_rescale_t", 1.0)),
            cfg_strength=0.0 if distilled else float(content.get(f"{short}_cfg_strength", 0.0)), cfg_interval=(1 - high, 1 - low),
            shortcut=distilled,
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}, {short}: {error}") from None


def load_flow(file: GeneratorFile, dtype: torch.dtype | None = None, device: str | torch.device = "cpu") -> nn.Module:
    """A stage's network, strictly by name and shape; dtype as in trellis.files.filled."""
    state = {name: tensor for name, tensor in _under(file.checkpoint, (FLOW,)).items() if not name.startswith("condition_embedder.")}
    make: Any = MixtureFlow if isinstance(file.config, MixtureConfig) else VoxelFlow
    return filled(make, file.config, state, str(file.checkpoint), dtype, device)


def _under(checkpoint: Path, prefixes: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """Tensors under the first prefix that has some, without it."""
    state = read(checkpoint, "weights")
    for prefix in prefixes:
        if part := below(state, prefix):
            return part
    got = ", ".join(sorted(state)[:8])
    raise ValueError(f"{checkpoint}: expected tensors under {' or '.join(prefixes)}, got {got}. Use the released checkpoint.")


def load_embedder(file: GeneratorFile, device: str | torch.device = "cpu") -> Embedder:
    """What turns pictures, masks and point maps into a stage's condition, strictly by name and shape; sizes are those of its tensors."""
    state, who = _under(file.checkpoint, EMBEDDERS), str(file.checkpoint)
    if file.embedder.get("use_pos_embedding", "learned") != "learned":
        raise ValueError(f"{who}: expected use_pos_embedding 'learned', got {file.embedder['use_pos_embedding']!r}. Others are not read.")
    try:
        encoders = [_encoder(i, entry, state) for i, entry in enumerate(file.embedder["embedder_list"])]
        nets = [f"projection_nets.{i}" for i in range(len(encoders))]
        hidden = [len(state[f"{net}.1.w1.weight"]) for net in nets]
        with torch.device("meta"):
            embedder = Embedder(encoders, hidden, len(state[f"{nets[0]}.1.w2.weight"]), f"{nets[0]}.0.weight" in state)
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{who}: expected the embedder of SAM 3D, got none fit for {error}. Name its files.") from None
    types = dict.fromkeys(state, torch.float32)
    return fill(embedder, state, who, types=types, device=device).eval().requires_grad_(False)


def _encoder(number: int, entry: Any, state: Mapping[str, torch.Tensor]) -> tuple[nn.Module, int, list[tuple[str, str]]]:
    """One of the embedder's encoders, empty, with its channels and what goes through it."""
    content, inputs = entry
    kind, names = str(content["_target_"]).rpartition(".")[2], [(str(name), str(frame)) for name, frame in inputs]
    with torch.device("meta"):
        if kind == "Dino":
            config = DinoConfig.of_state(below(state, f"module_list.{number}.backbone."), "embedder")
            size, before_norm = int(content.get("input_size", 518)), bool(content.get("prenorm_features", False))
            return Pictures(config, size, before_norm), config.hidden_size, names
        if kind == "PointPatchEmbed":
            known = {field.name for field in dataclasses.fields(PointConfig)}
            points = PointConfig(**{name: value for name, value in content.items() if name in known})
            return PointPatches(points), points.embed_dim, names
    raise ValueError(f"embedder_list: expected Dino or PointPatchEmbed, got {kind!r}. Others are not read.")


def load_decoder(file: PipelineFile, part: str, device: str | torch.device = "cpu") -> nn.Module:
    """The structure's decoder or the Gaussians', which are TRELLIS's."""
    config_file, checkpoint = (file.files[f"{PARTS[part]}.{kind}"] for kind in ("config", "ckpt"))
    content = read_yaml(config_file)
    kinds: dict[str, tuple[Any, Any]] = {
        "structure decoder": (StructureDecoder, StructureVAEConfig), "decoder": (GaussianDecoder, GaussianDecoderConfig),
    }
    make, kind = kinds[part]
    known = {field.name for field in dataclasses.fields(kind)}
    try:
        config = _made(kind, content, **{name: content[name] for name in known & PASSED & set(content)})
        empty(lambda: make(config))  # whose sizes may not fit
    except (TypeError, ValueError) as error:
        raise ValueError(f"{config_file}: {error}") from None
    return filled(make, config, read(checkpoint, "weights"), str(checkpoint), torch.float32, device)
