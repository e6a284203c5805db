"""Files of TRELLIS: pipeline.json, and for each model a JSON file of its architecture and its weights.

Nothing is downloaded or run.
"""

import dataclasses
import json
import os
from collections.abc import Callable, Collection, Container, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from eg3d_rlhf.models.policies import split_state
from eg3d_rlhf.models.trellis.autoencoders import (
    GaussianDecoder,
    GaussianDecoderConfig,
    LatentEncoder,
    LatentEncoderConfig,
    StructureDecoder,
    StructureEncoder,
    StructureVAEConfig,
)
from eg3d_rlhf.models.trellis.flows import LatentFlow, LatentFlowConfig, StructureFlow, StructureFlowConfig
from eg3d_rlhf.models.weights import State, empty, fill, in_types_of, read, shapes, write
from eg3d_rlhf.tuning.flow.base.family import Network, Release, SizedStage, Stored
from eg3d_rlhf.tuning.flow.base.stage import DenseGrid, FlowStage, Sampling, SparseVoxels
from eg3d_rlhf.tuning.flow.families.folder import are_scales, read_json

# Names of the stages.
STRUCTURE = "structure"
LATENT = "latent"
FLOWS = {STRUCTURE: "sparse_structure_flow_model", LATENT: "slat_flow_model"}  # their names in pipeline.json
# Stage -> its sampler in pipeline.json.
SAMPLERS = {STRUCTURE: "sparse_structure_sampler", LATENT: "slat_sampler"}
STRUCTURE_DECODER = "sparse_structure_decoder"
GAUSSIAN_DECODER = "slat_decoder_gs"
STRUCTURE_ENCODER = "sparse_structure_encoder"
LATENT_ENCODER = "slat_encoder"
NEEDED = (STRUCTURE_DECODER, GAUSSIAN_DECODER, STRUCTURE_ENCODER)  # what the loop needs besides the flows
# Encoders, which pipeline.json leaves out -> their published names, without ending.
USUAL_STEMS = {STRUCTURE_ENCODER: "ss_enc_conv3d_16l8_fp16", LATENT_ENCODER: "slat_enc_swin8_B_64l8_fp16"}
WEIGHTS = (".safetensors", ".pt")  # endings, in the order in which they are tried
# What a pipeline is conditioned on -> TRELLIS's default sampling.
KINDS = {"text": Sampling(cfg_strength=7.5, cfg_interval=(0.5, 0.95)), "image": Sampling()}
TOKENS = {"text": 77, "image": 1374}  # conditioning tokens: of CLIP, and of DINOv2 with registers
ENCODERS = {"text": "openai/clip-vit-large-patch14", "image": "dinov2_vitl14_reg"}  # defaults
NORMALIZATION = {  # statistics of the released latents, if pipeline.json has none
    "mean": (-2.16875, -0.00435, -0.13352, -0.08418, -0.52712, 0.72387, -1.14145, 1.20394),
    "std": (2.37765, 2.38639, 2.12442, 2.17486, 2.66394, 2.37119, 2.62174, 2.68452),
}


@dataclass(frozen=True, kw_only=True)
class ModelFolder:
    """Settings of a pipeline.json, of TRELLIS or of its successors."""

    root: Path  # the folder of pipeline.json
    kind: str  # variant of the pipeline; see the subclasses
    models: Mapping[str, str]  # model -> "ckpts/<stem>", or "owner/repo/<path>"
    sampling: Mapping[str, Sampling]  # by stage
    sigma_min: Mapping[str, float]  # by stage
    encoder: str  # name of the network that embeds prompts or images
    usual: ClassVar[Mapping[str, str]] = USUAL_STEMS  # models that no file names -> their published names


@dataclass(frozen=True, kw_only=True)
class PipelineFile(ModelFolder):
    """Settings of TRELLIS's pipeline.json, with TRELLIS's defaults for missing ones.

    Its kind is what the pipeline is conditioned on, "text" or "image".
    """

    mean: tuple[float, ...]  # of the second stage's latents, per channel
    std: tuple[float, ...]  # likewise

    def __post_init__(self):
        if not are_scales(self.mean, self.std):
            raise ValueError(
                f"{self.root.name}/pipeline.json: expected slat_normalization with a finite mean and a std >"
                f" 0 per channel, got {list(self.mean)} and {list(self.std)}. Correct it."
            )


def read_pipeline(root: Path) -> PipelineFile:
    """Read <root>/pipeline.json.

    Raises: FileNotFoundError; ValueError for a file that is not TRELLIS's, lacks a stage, or whose sampler
        follows another convention.
    """
    root = Path(root)
    path = root / "pipeline.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"pipeline: expected TRELLIS's pipeline.json, got none in {root}. Name the folder of a TRELLIS"
            " model."
        )
    content = read_json(path)
    name = content.get("name", "")
    args = content.get("args")
    kind = next((k for k in KINDS if f"{k}to3d" in str(name).lower()), None)
    if kind is None or not isinstance(args, dict) or not isinstance(args.get("models"), dict):
        raise ValueError(
            f"{path}: expected the name TrellisTextTo3DPipeline or TrellisImageTo3DPipeline and args.models,"
            f" got {name!r}. Name the folder of a TRELLIS model."
        )
    missing = [stage for stage, model in FLOWS.items() if model not in args["models"]]
    if missing:
        raise ValueError(
            f"{path}: expected both stages, but {', '.join(missing)} is missing ({FLOWS[missing[0]]})."
            " Restore the file."
        )
    samplers = {stage: _sampler(path, args.get(key), key, KINDS[kind]) for stage, key in SAMPLERS.items()}
    norm = {**NORMALIZATION, **(args.get("slat_normalization") or {})}
    return PipelineFile(
        root=root,
        kind=kind,
        models=dict(args["models"]),
        encoder=args.get(f"{kind}_cond_model") or ENCODERS[kind],
        sampling={stage: sampling for stage, (sampling, _) in samplers.items()},
        sigma_min={stage: sigma_min for stage, (_, sigma_min) in samplers.items()},
        mean=tuple(map(float, norm["mean"])),
        std=tuple(map(float, norm["std"])),
    )


def normalization(file: PipelineFile, stage: str) -> dict | None:
    """Return how a stage's latents are normalised, in JSON types, or None if they are not."""
    return {"mean": list(file.mean), "std": list(file.std)} if stage == LATENT else None


def _sampler(path: Path, content: dict | None, key: str, default: Sampling) -> tuple[Sampling, float]:
    """Read the settings of a stage's sampler and sigma_min; `default` fills in missing settings."""

    def read(name: str, params: Mapping) -> Sampling:
        # The class of the sampler decides about guidance: one without "GuidanceInterval" guides at all times,
        # and FlowEulerSampler not at all.
        interval = params.get(
            "cfg_interval", default.cfg_interval if "GuidanceInterval" in name else (0.0, 1.0)
        )
        return Sampling(
            steps=int(params.get("steps", default.steps)),
            rescale_t=float(params.get("rescale_t", default.rescale_t)),
            cfg_strength=(
                float(params.get("cfg_strength", default.cfg_strength)) if name != "FlowEulerSampler" else 0.0
            ),
            cfg_interval=(float(interval[0]), float(interval[1])),
        )

    return sampler_of(path, content, key, read)


def sampler_of(
    path: Path, content: Mapping | None, key: str, read: Callable[[str, Mapping], Sampling]
) -> tuple[Sampling, float]:
    """Read the settings of a sampler in a pipeline.json, and sigma_min.

    Args:
        key: name of the sampler in the file.
        read: parses the sampler's class name and params; may raise ValueError, TypeError or IndexError.
    """
    content = content or {}
    name = str(content.get("name", "FlowEulerGuidanceIntervalSampler"))
    if not name.startswith("FlowEuler"):
        raise ValueError(
            f"{path}: expected a FlowEuler sampler for {key} (t = 1 is noise), got {name!r}. Other"
            " conventions are not supported: restore the file."
        )
    try:
        return read(name, content.get("params") or {}), float(
            (content.get("args") or {}).get("sigma_min", 1e-5)
        )
    except (TypeError, ValueError, IndexError) as error:
        raise ValueError(f"{path}, {key}: {error}") from None


def find_model(file: ModelFolder, model: str) -> Path:
    """Find a model and return the path of its JSON file and weights, without ending.

    The search covers the root. For "owner/repo/path" it also covers the folder beside the root (as repo or
    owner/repo) and the local cache of the Hugging Face hub. The encoders, which pipeline.json leaves out, are
    searched for under their published names beside the models that it names.

    Raises: FileNotFoundError naming the model and every place that was searched.
    """
    places = list(_places(file, file.models[model])) if model in file.models else []
    if model in file.usual:
        folders = [
            file.root / "ckpts",
            *(place.parent for value in file.models.values() for place in _places(file, value)),
        ]
        places += [folder / file.usual[model] for folder in dict.fromkeys(folders)]
    for place in places:
        if with_ending(place, ".json").is_file() and find_weights(place) is not None:
            return place
    searched = ", ".join(dict.fromkeys(str(p) for p in places)) or "no place: pipeline.json does not name it"
    endings = " or ".join(WEIGHTS)
    raise FileNotFoundError(
        f"{model}: found no .json with {endings} beside it. Searched: {searched}. Put the files there, or"
        " name their folder."
    )


def is_there(file: ModelFolder, model: str) -> bool:
    """Return whether `find_model` finds a model."""
    try:
        find_model(file, model)
    except FileNotFoundError:
        return False
    return True


def paths_of(file: ModelFolder, models: Mapping[str, str]) -> dict[str, Path]:
    """Return both files of models, by their names here and "<name>.json". Raises: FileNotFoundError."""
    stems = {name: find_model(file, model) for name, model in models.items()}
    return {
        key: path
        for name, stem in stems.items()
        for key, path in ((f"{name}.json", with_ending(stem, ".json")), (name, find_weights(stem) or stem))
    }


def find_weights(stem: Path) -> Path | None:
    """Return the file of a model's weights, or None."""
    return next((p for ending in WEIGHTS if (p := with_ending(stem, ending)).is_file()), None)


def _places(file: ModelFolder, value: str):
    """Yield the places, without ending, where the value of a model in pipeline.json may lie."""
    yield file.root / value
    # Padded by empty parts, so that a short value can be unpacked, too.
    owner, repo, *rest = [*Path(value).parts, "", ""]
    inner = "/".join(part for part in rest if part)
    if not inner:
        return
    beside = file.root.parent
    yield from (beside / repo / inner, beside / owner / repo / inner, beside / inner)
    cache = Path(
        os.environ.get("HF_HUB_CACHE")
        or Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface") / "hub"
    )
    for snapshot in sorted((cache / f"models--{owner}--{repo}" / "snapshots").glob("*")):
        yield snapshot / inner


def with_ending(stem: Path, ending: str) -> Path:
    """Append an ending to a path. Path.with_suffix would cut names that contain dots."""
    return stem.with_name(stem.name + ending)


# TRELLIS's names of classes. It also writes them with the prefix "Elastic", which makes no difference here.
ARCHITECTURES = {
    "SparseStructureFlowModel": (StructureFlow, StructureFlowConfig),
    "SparseStructureEncoder": (StructureEncoder, StructureVAEConfig),
    "SparseStructureDecoder": (StructureDecoder, StructureVAEConfig),
    "SLatFlowModel": (LatentFlow, LatentFlowConfig),
    "SLatEncoder": (LatentEncoder, LatentEncoderConfig),
    "SLatGaussianDecoder": (GaussianDecoder, GaussianDecoderConfig),
}


Architectures = Mapping[str, tuple[type[nn.Module], type]]  # name of a class -> model and its configuration


def architecture(
    content: Mapping, who: str, architectures: Architectures = ARCHITECTURES
) -> tuple[type[nn.Module], Any]:
    """Return class and configuration of the model that a JSON file describes: {"name": class, "args": {...}}.

    Raises: ValueError for an unknown class, or arguments that it does not have.
    """
    name = content.get("name")
    args = content.get("args")
    entry = architectures.get(str(name).removeprefix("Elastic"))
    if entry is None or not isinstance(args, Mapping):
        raise ValueError(
            f"{who}: expected a name among {', '.join(architectures)} and args, got {name!r}. Name the file"
            " of a supported model."
        )
    model, config = entry
    fields = dataclasses.fields(config)
    missing = dataclasses.MISSING
    known = {field.name for field in fields}
    # Some classes of the original ignore unknown arguments.
    if getattr(model, "passes_over", False):
        args = {key: value for key, value in args.items() if key in known}
    foreign = sorted(set(args) - known)
    needed = sorted(
        f.name for f in fields if f.default is missing and f.default_factory is missing and f.name not in args
    )
    if foreign or needed:
        raise ValueError(
            f"{who}: expected the args of {name}; unknown are {foreign}, missing are {needed}. Name the file"
            " of a supported model."
        )
    return model, config(**args)


def build_model(content: Mapping, who: str, architectures: Architectures = ARCHITECTURES) -> nn.Module:
    """Build an untrained model; see `architecture`."""
    model, config = architecture(content, who, architectures)
    return model(config)


def load_model(
    stem: Path,
    dtype: torch.dtype | None = None,
    *,
    weights: Path | None = None,
    device: str | torch.device = "cpu",
    architectures: Architectures = ARCHITECTURES,
    prepare: Callable[[Any, Any, State, str], State] | None = None,
) -> nn.Module:
    """Build a model from <stem>.json and its weights, in eval mode.

    Args:
        stem: path without ending.
        weights: another file of weights, such as a training checkpoint (.pt).
        dtype: see `filled`.
        prepare: converts (class, configuration, tensors of the file, name of the file) to the model's
            tensors.
    Raises: FileNotFoundError; ValueError for files that do not fit each other, and for weights that are not
        finite.
    """
    json_file = with_ending(stem, ".json")
    weights = weights or find_weights(stem)
    if not json_file.is_file() or weights is None:
        raise FileNotFoundError(
            f"{stem.name}: expected {json_file} and weights beside it, but at least one is missing. Restore"
            " the files."
        )
    state = base_state(weights)
    model, config = architecture(read_json(json_file), str(json_file), architectures)
    if prepare is not None:
        state = prepare(model, config, state, str(weights))
    return filled(model, config, state, str(weights), dtype, device)


def networks_of(
    file: ModelFolder,
    models: Iterable[str],
    lost: Mapping[str, str],
    *,
    released: Mapping[str, tuple[int, int]] | None = None,
    architectures: Architectures = ARCHITECTURES,
    prepare: Callable[[Any, Any, State, str], State] | None = None,
) -> list[Network]:
    """List models with expected and present tensors, for `flow check`.

    Args:
        lost: model that may be missing -> what cannot be done without it.
        released: see `Network`.
        Others: as `load_model`.
    """
    made = []
    for name in models:
        without = lost.get(name, "")
        if without and not is_there(file, name):
            made.append(
                Network(
                    name=name, file=file.root / file.usual[name], expected={}, tensors={}, without=without
                )
            )
            continue
        stem = find_model(file, name)
        json_file = with_ending(stem, ".json")
        weights = find_weights(stem)
        assert weights is not None  # find_model has checked it
        model, config = architecture(read_json(json_file), str(json_file), architectures)
        state = base_state(weights)
        state = state if prepare is None else prepare(model, config, state, str(weights))
        expected = shapes(empty(partial(model, config)).state_dict())
        counts = (released or {}).get(name)
        made.append(
            Network(
                name=name, file=weights, expected=expected, tensors=state, without=without, released=counts
            )
        )
    return made


def flows_of(
    stems: Mapping[str, Path],
    dtype: torch.dtype | None,
    device: str | torch.device,
    stages: Collection[str] | None = None,
    load: Callable[..., nn.Module] = load_model,
    architectures: Architectures = ARCHITECTURES,
) -> dict[str, nn.Module]:
    """Build the networks of stages from their paths without ending.

    Args: stages: those whose weights are read; other networks stay on the meta device. None: all.
    """
    return {
        stage: (
            load(stem, dtype=dtype, device=device)
            if stages is None or stage in stages
            else empty(partial(build_model, read_json(with_ending(stem, ".json")), stem.name, architectures))
        )
        for stage, stem in stems.items()
    }


def filled(
    make: Callable[[Any], nn.Module],
    config: Any,
    state: State,
    who: str,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
) -> nn.Module:
    """Build a model with the tensors of a file, strictly by name and shape, in eval mode.

    Args: dtype: for layers that the model computes in half precision; other layers are float32. None keeps
        the file's dtypes.
    Raises: ValueError, beginning with `who`, for missing, unexpected or misshapen tensors.
    """
    types: dict[str, torch.dtype] = {}
    if dtype is not None:
        # A half-precision model without memory shows which layers are converted.
        halves = {"dtype": "float16"} if hasattr(config, "dtype") else {"use_fp16": True}
        half = empty(lambda: make(dataclasses.replace(config, **halves))).state_dict()
        types = {
            n: dtype if n in half and half[n].dtype in (torch.float16, torch.bfloat16) else torch.float32
            for n in state
        }
    return fill(empty(lambda: make(config)), state, who, types=types, device=device).eval()


def base_state(path: Path) -> State:
    """Read the tensors of a model without adapters, from a .safetensors file or a training checkpoint.

    Raises: FileNotFoundError; ValueError for a damaged file, adapters, or weights that are not finite.
    """
    state, adapters = split_state(read(path, "weights"), path.name)
    if adapters:
        raise ValueError(
            f"{path}: expected the weights of a model, got adapters. Pass them as tuned weights, beside their"
            " base."
        )
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}


def release_of(
    file: ModelFolder,
    stages: Collection[str],
    flows: Mapping[str, str],
    load: Callable[..., nn.Module],
    needed: Container[str],
    also: tuple[str, ...] = (),
) -> Release:
    """Describe the folder to export: pipeline.json and all models on this machine.

    Models that are elsewhere ("owner/repo/path") and were not found stay references. Models that no file
    names, such as the encoders for the loop, are included if they were found.

    Args:
        stages: those that are tuned.
        flows: stage -> name of its model.
        load: called with (path without ending, dtype).
        needed: models that must exist.
        also: further files like pipeline.json, if they exist.
    """
    placed = dict[str, str]()
    kept = dict[str, Path | bytes]()
    networks = dict[str, Stored]()
    elsewhere = []
    sources: dict[str, Path] = {}  # by stem
    tuned = {flows[stage]: stage for stage in stages}
    for name in dict.fromkeys([*file.models, *file.usual]):
        try:
            stem = find_model(file, name)
        except FileNotFoundError:
            if name in needed or name in tuned:
                raise
            elsewhere.append(name)
            continue
        # All models are written to one folder, so their names must differ.
        if sources.setdefault(stem.name, stem) != stem:
            raise ValueError(
                f"export: the models {stem} and {sources[stem.name]} have the same name. Rename one of them."
            )
        placed[name] = f"ckpts/{stem.name}"
        base = find_weights(stem)
        assert base is not None  # find_model has checked it
        kept[f"{placed[name]}.json"] = with_ending(stem, ".json")
        if name in tuned:
            networks[tuned[name]] = Stored(
                file=f"{placed[name]}.safetensors", load=partial(load, stem), write=partial(_rewritten, base)
            )
        else:
            kept[placed[name] + base.suffix] = base
    for path in (file.root / name for name in ("pipeline.json", *also)):
        if path.is_file():
            content = read_json(path)
            # Copied models are named by their place in the exported folder.
            content["args"]["models"] = {
                name: placed.get(name, value) for name, value in content["args"]["models"].items()
            }
            kept[path.name] = (json.dumps(content, indent=4) + "\n").encode()
    return Release(files=kept, networks=networks, elsewhere=elsewhere)


def _rewritten(base: Path, path: Path, state: State) -> None:
    """Write tuned tensors in the dtypes of the base's file."""
    write(path, in_types_of(base_state(base), state))


def released_stages(kind: str, width: int) -> list[SizedStage]:
    """Build the stages of the published generators without weights, with the sizes of their JSON files.

    Args:
        kind: "text" or "image".
        width: channels of the conditioning tokens.
    """
    common: dict[str, Any] = dict(
        in_channels=8,
        out_channels=8,
        model_channels=1024,
        cond_channels=width,
        num_blocks=24,
        num_head_channels=64,
        qk_rms_norm=True,
    )
    structure = StructureFlowConfig(resolution=16, patch_size=1, **common)
    latent = LatentFlowConfig(resolution=64, patch_size=2, io_block_channels=(128,), **common)
    stages = (
        ("structure", partial(StructureFlow, structure), DenseGrid(channels=8, resolution=16)),
        ("latent", partial(LatentFlow, latent), SparseVoxels(channels=8, resolution=64)),
    )
    return [
        SizedStage(
            conditioning=[TOKENS[kind], width],
            stage=FlowStage(name=name, model=empty(make), latents=latents, sampling=KINDS[kind]),
        )
        for name, make, latents in stages
    ]
