"""Readers of the files of TRELLIS: pipeline.json, and for each model a JSON file and a file of weights.

pipeline.json states the models, the settings of the samplers and the normalisation of the latents. The JSON
file of a model states its class and its arguments. Nothing is downloaded, and no code of the files is run.

In this module a *stem* is the path of a model's two files without their endings .json and .safetensors.
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

from eg3d_rlhf.models.policies import PREFIX
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
from eg3d_rlhf.models.weights import (
    State,
    empty,
    fill,
    in_types_of,
    read,
    shapes,
    unmerged_layers,
    unmerged_message,
    write,
)
from eg3d_rlhf.tuning.flow.base.family import Network, Release, SizedStage, Stored
from eg3d_rlhf.tuning.flow.base.stage import DenseGrid, FlowStage, Sampling, SparseVoxels
from eg3d_rlhf.tuning.flow.families import ADDRESSES
from eg3d_rlhf.tuning.flow.families.folder import are_scales, read_json

# Names of the stages.
STRUCTURE = "structure"
LATENT = "latent"
FLOWS = {
    STRUCTURE: "sparse_structure_flow_model",
    LATENT: "slat_flow_model",
}  # stage -> name in pipeline.json
# Stage -> its sampler in pipeline.json.
SAMPLERS = {STRUCTURE: "sparse_structure_sampler", LATENT: "slat_sampler"}
STRUCTURE_DECODER = "sparse_structure_decoder"
GAUSSIAN_DECODER = "slat_decoder_gs"
STRUCTURE_ENCODER = "sparse_structure_encoder"
LATENT_ENCODER = "slat_encoder"
# Models that the tuning loop needs besides the flows.
NEEDED = (STRUCTURE_DECODER, GAUSSIAN_DECODER, STRUCTURE_ENCODER)
# Encoder -> published name of its files, without ending. pipeline.json does not name the encoders.
USUAL_STEMS = {STRUCTURE_ENCODER: "ss_enc_conv3d_16l8_fp16", LATENT_ENCODER: "slat_enc_swin8_B_64l8_fp16"}
# Repository with the encoders of both kinds of pipelines.
IMAGE_ADDRESS = ADDRESSES["trellis"]
WEIGHTS = (".safetensors", ".pt")  # endings of files of weights, in the order in which they are tried
# Kind of prompt -> TRELLIS's default settings of the samplers.
KINDS = {"text": Sampling(cfg_strength=7.5, cfg_interval=(0.5, 0.95)), "image": Sampling()}
# Kind of prompt -> number of conditioning tokens: 77 of CLIP; 1 + 4 + 37^2 of DINOv2 with registers.
TOKENS = {"text": 77, "image": 1374}
# Kind of prompt -> default encoder.
ENCODERS = {"text": "openai/clip-vit-large-patch14", "image": "dinov2_vitl14_reg"}
NORMALIZATION = {  # mean and std per channel of the released latents, used if pipeline.json has none
    "mean": (-2.16875, -0.00435, -0.13352, -0.08418, -0.52712, 0.72387, -1.14145, 1.20394),
    "std": (2.37765, 2.38639, 2.12442, 2.17486, 2.66394, 2.37119, 2.62174, 2.68452),
}


@dataclass(frozen=True, kw_only=True)
class ModelFolder:
    """Settings of a pipeline.json, of TRELLIS or of its successors."""

    root: Path  # the folder of pipeline.json
    kind: str  # variant of the pipeline; see the subclasses
    # Name of a model -> path of its stem relative to `root`, or "owner/repo/<path>" in another repository.
    models: Mapping[str, str]
    sampling: Mapping[str, Sampling]  # settings of the sampler, by stage
    sigma_min: Mapping[str, float]  # standard deviation of the noise at the data, by stage
    encoder: str  # name of the network that embeds prompts or images
    # Model that pipeline.json does not name -> published name of its files, without ending.
    usual: ClassVar[Mapping[str, str]] = USUAL_STEMS
    # Model that pipeline.json does not name -> address at which its files are published.
    usual_addresses: ClassVar[Mapping[str, str]] = dict.fromkeys(USUAL_STEMS, IMAGE_ADDRESS)


@dataclass(frozen=True, kw_only=True)
class PipelineFile(ModelFolder):
    """Settings of TRELLIS's pipeline.json. Settings that the file lacks have TRELLIS's defaults.

    `kind` is the kind of prompts that the pipeline is conditioned on, "text" or "image".
    """

    mean: tuple[float, ...]  # mean of the second stage's latents, per channel
    std: tuple[float, ...]  # standard deviation of the second stage's latents, per channel

    def __post_init__(self):
        if not are_scales(self.mean, self.std):
            raise ValueError(
                f"{self.root.name}/pipeline.json: slat_normalization must have a finite mean and a std > 0"
                f" per channel, got mean {list(self.mean)} and std {list(self.std)}. Download the file again."
            )


def read_pipeline(root: Path) -> PipelineFile:
    """Read <root>/pipeline.json.

    Raises: FileNotFoundError if the file is missing; ValueError if it is not a file of TRELLIS, if it lacks
        the model of a stage, or if a sampler has unsupported settings.
    """
    root = Path(root)
    path = root / "pipeline.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"--pipeline: there is no file pipeline.json in {root}. Pass the folder of a TRELLIS model."
        )
    pipeline_json = read_json(path)
    pipeline_name = pipeline_json.get("name", "")
    pipeline_args = pipeline_json.get("args")
    # The kind is part of the name, such as TrellisTextTo3DPipeline.
    prompt_kind = next((k for k in KINDS if f"{k}to3d" in str(pipeline_name).lower()), None)
    if prompt_kind is None:
        raise ValueError(
            f"{path}: expected the name TrellisTextTo3DPipeline or TrellisImageTo3DPipeline, got"
            f" {pipeline_name!r}. Pass the folder of a TRELLIS model."
        )
    if not isinstance(pipeline_args, dict) or not isinstance(pipeline_args.get("models"), dict):
        raise ValueError(f"{path}: the object args.models is missing. Download the file again.")
    missing_models = [model for model in FLOWS.values() if model not in pipeline_args["models"]]
    if missing_models:
        raise ValueError(
            f"{path}: args.models does not name the model {' and '.join(missing_models)}. Download the file"
            " again."
        )
    samplers = {
        stage: _sampler(path, pipeline_args.get(key), key, KINDS[prompt_kind])
        for stage, key in SAMPLERS.items()
    }
    normalization_values = {**NORMALIZATION, **(pipeline_args.get("slat_normalization") or {})}
    return PipelineFile(
        root=root,
        kind=prompt_kind,
        models=dict(pipeline_args["models"]),
        encoder=pipeline_args.get(f"{prompt_kind}_cond_model") or ENCODERS[prompt_kind],
        sampling={stage: sampling for stage, (sampling, _) in samplers.items()},
        sigma_min={stage: sigma_min for stage, (_, sigma_min) in samplers.items()},
        mean=tuple(map(float, normalization_values["mean"])),
        std=tuple(map(float, normalization_values["std"])),
    )


def normalization(pipeline_file: PipelineFile, stage: str) -> dict | None:
    """Return the mean and the std by which a stage's latents are normalised, in JSON types.

    The first stage's latents are not normalised; None is returned.
    """
    return {"mean": list(pipeline_file.mean), "std": list(pipeline_file.std)} if stage == LATENT else None


def _sampler(
    path: Path, sampler_entry: dict | None, sampler_name: str, default_sampling: Sampling
) -> tuple[Sampling, float]:
    """Read the settings of a stage's sampler, and sigma_min, the noise that remains at t = 0.

    Args:
        path: path of pipeline.json, for messages.
        sampler_entry: entry of the sampler in pipeline.json, or None if there is no entry.
        sampler_name: name of the entry, for messages.
        default_sampling: values of settings that the entry lacks.
    Returns: settings of the sampler, and sigma_min.
    """

    def parse_sampler(class_name: str, params: Mapping) -> Sampling:
        """Convert the class name and the params of a sampler to settings."""
        # The class of the sampler decides about guidance. Classes without "GuidanceInterval" in their name
        # use guidance at all times; FlowEulerSampler uses no guidance.
        guidance_interval = params.get(
            "cfg_interval", default_sampling.cfg_interval if "GuidanceInterval" in class_name else (0.0, 1.0)
        )
        return Sampling(
            steps=int(params.get("steps", default_sampling.steps)),
            rescale_t=float(params.get("rescale_t", default_sampling.rescale_t)),
            cfg_strength=(
                float(params.get("cfg_strength", default_sampling.cfg_strength))
                if class_name != "FlowEulerSampler"
                else 0.0
            ),
            cfg_interval=(float(guidance_interval[0]), float(guidance_interval[1])),
        )

    return sampler_of(path, sampler_entry, sampler_name, parse_sampler)


def sampler_of(
    path: Path,
    sampler_entry: Mapping | None,
    sampler_name: str,
    parse_params: Callable[[str, Mapping], Sampling],
) -> tuple[Sampling, float]:
    """Read the settings of a sampler in a pipeline.json, and sigma_min, the noise that remains at t = 0.

    Args:
        path: path of pipeline.json, for messages.
        sampler_entry: entry of the sampler in the file, or None if there is no entry.
        sampler_name: name of the entry.
        parse_params: function that parses the sampler's class name and its params. It may raise ValueError,
            TypeError or IndexError.
    Returns: result of `parse_params`, and sigma_min.
    """
    # Without an entry, the sampler has its published class and default settings.
    sampler_entry = sampler_entry or {}
    class_name = str(sampler_entry.get("name", "FlowEulerGuidanceIntervalSampler"))
    if not class_name.startswith("FlowEuler"):
        raise ValueError(
            f"{path}: expected a FlowEuler sampler for {sampler_name} (t = 1 is noise), got {class_name!r}."
            " Other conventions are not supported. Download the file again."
        )
    try:
        return parse_params(class_name, sampler_entry.get("params") or {}), float(
            (sampler_entry.get("args") or {}).get("sigma_min", 1e-5)
        )
    except (TypeError, ValueError, IndexError) as error:
        raise ValueError(f"{path}, {sampler_name}: {error}") from None


def find_model(model_folder: ModelFolder, model: str) -> Path:
    """Find the files of a model on this machine and return their stem.

    The files are searched for in the folder of pipeline.json. If pipeline.json states "owner/repo/path", they
    are also searched for in a folder repo or owner/repo beside that folder, and in the local cache of the
    Hugging Face hub. Encoders that pipeline.json does not name are searched for under their published names,
    in the folders of the models that it names.

    Raises: FileNotFoundError, naming the model and all paths that were searched.
    """
    stems = (
        list(_possible_stems(model_folder, model_folder.models[model]))
        if model in model_folder.models
        else []
    )
    if model in model_folder.usual:
        folders = [model_folder.root / "ckpts"]
        for model_path in model_folder.models.values():
            folders += [stem.parent for stem in _possible_stems(model_folder, model_path)]
        # dict.fromkeys removes duplicates and keeps the order.
        stems += [folder / model_folder.usual[model] for folder in dict.fromkeys(folders)]
    for stem in stems:
        if with_ending(stem, ".json").is_file() and find_weights(stem) is not None:
            return stem
    if not stems:
        raise FileNotFoundError(
            f"{model}: {model_folder.root}/pipeline.json does not name this model. Download pipeline.json"
            " again."
        )
    searched_paths = ", ".join(dict.fromkeys(map(str, stems)))
    address = address_of(model_folder, model)
    address_text = f" from {address}" if address else ""
    ending_text = " or ".join(WEIGHTS)
    raise FileNotFoundError(
        f"{model}: no file .json with a file {ending_text} beside it was found. Searched paths, without"
        f" endings: {searched_paths}. Download the model's files{address_text} to one of these paths."
    )


def address_of(model_folder: ModelFolder, model: str) -> str:
    """Return the address at which a model is published, or "" if it is that of the family.

    A model that pipeline.json names as "owner/repo/path" is published in that repository. Encoders that it
    does not name are published at the address in `ModelFolder.usual_addresses`.
    """
    if model not in model_folder.models:
        return model_folder.usual_addresses.get(model, "")
    owner, repo, *path_parts = [*Path(model_folder.models[model]).parts, "", ""]
    has_repository = any(path_parts) and not (model_folder.root / owner).is_dir()
    return f"https://huggingface.co/{owner}/{repo}" if has_repository else ""


def has_model(model_folder: ModelFolder, model: str) -> bool:
    """Return True if `find_model` finds the files of a model."""
    try:
        find_model(model_folder, model)
    except FileNotFoundError:
        return False
    return True


def paths_of(model_folder: ModelFolder, model_by_name: Mapping[str, str]) -> dict[str, Path]:
    """Return the files of several models.

    Args:
        model_folder: settings of pipeline.json.
        model_by_name: name of a model in this package -> its name in pipeline.json.
    Returns: dictionary from the name in this package to the file of weights, and from this name with the
    ending ".json" to the JSON file.
    Raises: FileNotFoundError for a model whose files are not on this machine.
    """
    stem_by_name = {name: find_model(model_folder, model) for name, model in model_by_name.items()}
    path_by_name = {}
    for name, stem in stem_by_name.items():
        path_by_name[f"{name}.json"] = with_ending(stem, ".json")
        # find_model has checked that there are weights; `or stem` only satisfies the type checker.
        path_by_name[name] = find_weights(stem) or stem
    return path_by_name


def find_weights(stem: Path) -> Path | None:
    """Return the file of weights of a model, or None if there is none. Safetensors are preferred to .pt."""
    return next((p for ending in WEIGHTS if (p := with_ending(stem, ending)).is_file()), None)


def _possible_stems(model_folder: ModelFolder, model_path: str):
    """Yield the stems at which the files of a model may be.

    Args:
        model_folder: settings of pipeline.json.
        model_path: value of the model in pipeline.json, "ckpts/<stem>" or "owner/repo/<path>".
    """
    yield model_folder.root / model_path
    # Padded by empty parts, so that a value with less than two parts can be unpacked, too.
    owner, repo, *path_parts = [*Path(model_path).parts, "", ""]
    path_in_repo = "/".join(part for part in path_parts if part)
    # A value with less than three parts is no path in another repository.
    if not path_in_repo:
        return
    parent_folder = model_folder.root.parent
    yield from (
        parent_folder / repo / path_in_repo,
        parent_folder / owner / repo / path_in_repo,
        parent_folder / path_in_repo,
    )
    # Environment variables and folders of the Hugging Face hub's cache.
    cache_folder = Path(
        os.environ.get("HF_HUB_CACHE")
        or Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface") / "hub"
    )
    # Sorted, so that the choice does not depend on the order of the file system.
    for snapshot in sorted((cache_folder / f"models--{owner}--{repo}" / "snapshots").glob("*")):
        yield snapshot / path_in_repo


def with_ending(stem: Path, ending: str) -> Path:
    """Append an ending, such as ".json", to a path.

    Path.with_suffix would replace the part of a name after its last dot.
    """
    return stem.with_name(stem.name + ending)


# Class in the JSON files -> class and configuration in this package. The files also have the names with the
# prefix "Elastic", which only concerns memory in the original's training; the prefix is removed.
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
    model_json: Mapping, message_prefix: str, architectures: Architectures = ARCHITECTURES
) -> tuple[type[nn.Module], Any]:
    """Return the class and the configuration of the model that a JSON file describes.

    Args:
        model_json: content of the file, {"name": class, "args": {...}}.
        message_prefix: beginning of messages, such as the path of the file.
        architectures: supported classes by name.
    Raises: ValueError for an unknown class, and for unknown or missing arguments.
    """
    class_name = model_json.get("name")
    model_args = model_json.get("args")
    supported_classes = architectures.get(str(class_name).removeprefix("Elastic"))
    if supported_classes is None:
        raise ValueError(
            f"{message_prefix}: expected a model among {', '.join(architectures)}, got {class_name!r}. Pass"
            " the folder of a supported generator."
        )
    if not isinstance(model_args, Mapping):
        raise ValueError(f"{message_prefix}: the object 'args' is missing. Download the file again.")
    model_class, config_class = supported_classes
    fields = dataclasses.fields(config_class)
    no_default = dataclasses.MISSING
    field_names = {field.name for field in fields}
    # Some classes of the original ignore unknown arguments.
    if getattr(model_class, "passes_over", False):
        model_args = {key: value for key, value in model_args.items() if key in field_names}
    unknown_args = sorted(set(model_args) - field_names)
    missing_args = sorted(
        f.name
        for f in fields
        if f.default is no_default and f.default_factory is no_default and f.name not in model_args
    )
    if unknown_args or missing_args:
        fault_texts = [
            f"{fault_label} {', '.join(names)}"
            for fault_label, names in (("unknown:", unknown_args), ("missing:", missing_args))
            if names
        ]
        raise ValueError(
            f"{message_prefix}: the args do not fit {class_name} ({'; '.join(fault_texts)}). Download the"
            " file again, or pass the folder of a supported generator."
        )
    return model_class, config_class(**model_args)


def build_model(
    model_json: Mapping, message_prefix: str, architectures: Architectures = ARCHITECTURES
) -> nn.Module:
    """Build an untrained model from the content of its JSON file; see `architecture` for the arguments."""
    model_class, config = architecture(model_json, message_prefix, architectures)
    return model_class(config)


def load_model(
    stem: Path,
    dtype: torch.dtype | None = None,
    *,
    weights_path: Path | None = None,
    device: str | torch.device = "cpu",
    architectures: Architectures = ARCHITECTURES,
    prepare: Callable[[Any, Any, State, str], State] | None = None,
) -> nn.Module:
    """Build a model from <stem>.json and its weights, in eval mode.

    Args:
        stem: path of the model's files without endings.
        dtype: dtype of the layers that may be half precision; see `build_from_state`.
        weights_path: file of weights to read instead, such as a training checkpoint (.pt). None: the file of
            weights at the stem.
        device: device of the model.
        architectures: supported classes by name.
        prepare: function that renames or removes tensors of the file, called with the class, the
            configuration, the tensors and the path of the file. None: they are used unchanged.
    Raises: FileNotFoundError for a missing file; ValueError for files that do not fit each other, and for
        weights that are not finite.
    """
    json_file = with_ending(stem, ".json")
    weights_path = weights_path or find_weights(stem)
    if not json_file.is_file() or weights_path is None:
        raise FileNotFoundError(
            f"{stem.name}: {json_file} or the file of weights beside it is missing. Download both files"
            " again."
        )
    tensors = base_state(weights_path)
    model_class, config = architecture(read_json(json_file), str(json_file), architectures)
    if prepare is not None:
        tensors = prepare(model_class, config, tensors, str(weights_path))
    return build_from_state(model_class, config, tensors, str(weights_path), dtype, device)


def networks_of(
    model_folder: ModelFolder,
    models: Iterable[str],
    optional_models: Mapping[str, str],
    *,
    released_sizes: Mapping[str, tuple[int, int]] | None = None,
    architectures: Architectures = ARCHITECTURES,
    prepare: Callable[[Any, Any, State, str], State] | None = None,
) -> list[Network]:
    """List the networks of a folder with their expected and their stored tensors, for `flow check`.

    Args:
        model_folder: settings of pipeline.json.
        models: names of the models in pipeline.json.
        optional_models: model that may be missing -> description of what cannot be done without it.
        released_sizes: model -> number of tensors and number of values in its published file.
        architectures: supported classes by name; see `load_model`.
        prepare: function that renames or removes tensors; see `load_model`.
    """
    network_list = []
    for model_name in models:
        missing_ability = optional_models.get(model_name, "")
        if missing_ability and not has_model(model_folder, model_name):
            network_list.append(
                Network(
                    name=model_name,
                    file=model_folder.root / model_folder.usual[model_name],
                    expected={},
                    tensors={},
                    without=missing_ability,
                    address=address_of(model_folder, model_name),
                )
            )
            continue
        stem = find_model(model_folder, model_name)
        json_file = with_ending(stem, ".json")
        weights_path = find_weights(stem)
        assert weights_path is not None  # find_model has checked it
        model_class, config = architecture(read_json(json_file), str(json_file), architectures)
        # Adapters are no error here, because the caller lists them beside the other faults.
        tensors = stored_state(weights_path)
        tensors = tensors if prepare is None else prepare(model_class, config, tensors, str(weights_path))
        expected_shapes = shapes(empty(partial(model_class, config)).state_dict())
        released_counts = (released_sizes or {}).get(model_name)
        network_list.append(
            Network(
                name=model_name,
                file=weights_path,
                expected=expected_shapes,
                tensors=tensors,
                without=missing_ability,
                released=released_counts,
            )
        )
    return network_list


def conditioning_widths(
    model_folder: ModelFolder, models: Iterable[str], architectures: Architectures = ARCHITECTURES
) -> set[int]:
    """Return the numbers of channels of the conditioning tokens that flows read, from their JSON files.

    Args:
        model_folder: settings of pipeline.json.
        models: names of the flows in pipeline.json.
        architectures: supported classes by name.
    """
    json_files = [with_ending(find_model(model_folder, model), ".json") for model in models]
    return {architecture(read_json(path), str(path), architectures)[1].cond_channels for path in json_files}


def flows_of(
    stems: Mapping[str, Path],
    dtype: torch.dtype | None,
    device: str | torch.device,
    stages: Collection[str] | None = None,
    load: Callable[..., nn.Module] = load_model,
    architectures: Architectures = ARCHITECTURES,
) -> dict[str, nn.Module]:
    """Build the flows of all stages.

    Args:
        stems: path of the model's files without endings, by stage.
        dtype: dtype of the weights; None means the dtypes of the files.
        device: device of the flows whose weights are read.
        stages: names of the stages whose weights are read; None means all. Flows of other stages are built on
            the meta device, without weights.
        load: function that reads a model.
        architectures: supported classes by name.
    """
    return {
        stage: (
            load(stem, dtype=dtype, device=device)
            if stages is None or stage in stages
            else empty(partial(build_model, read_json(with_ending(stem, ".json")), stem.name, architectures))
        )
        for stage, stem in stems.items()
    }


def build_from_state(
    model_class: Callable[[Any], nn.Module],
    config: Any,
    state: State,
    message_prefix: str,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
) -> nn.Module:
    """Build a model with the tensors of a file, in eval mode. Names and shapes must match exactly.

    Args:
        model_class: class of the model.
        config: configuration of the model, the only argument of the class.
        state: tensors by name.
        message_prefix: beginning of error messages, such as the path of the file.
        dtype: dtype of the layers that the original computes in half precision. Other layers are float32.
            None keeps the dtypes of the file for all layers.
        device: device of the model.
    Raises: ValueError for missing or unexpected tensors, and for tensors of another shape.
    """
    dtype_by_name: dict[str, torch.dtype] = {}
    if dtype is not None:
        # Which layers the original converts is known only to its classes. Their switch is use_fp16 in TRELLIS
        # and dtype in TRELLIS.2. A second network without memory therefore states the dtype of each tensor.
        half_setting = {"dtype": "float16"} if hasattr(config, "dtype") else {"use_fp16": True}
        half_state = empty(lambda: model_class(dataclasses.replace(config, **half_setting))).state_dict()
        for name in state:
            is_half = name in half_state and half_state[name].dtype in (torch.float16, torch.bfloat16)
            dtype_by_name[name] = dtype if is_half else torch.float32
    return fill(
        empty(lambda: model_class(config)),
        state,
        message_prefix,
        requested_dtypes=dtype_by_name,
        device=device,
    ).eval()


def base_state(path: Path) -> State:
    """Read the tensors of a model from a .safetensors file or a training checkpoint.

    Raises: FileNotFoundError for a missing file; ValueError for a damaged file, for weights that are not
        finite, and for a file of adapters (LoRA) instead of a model.
    """
    state = stored_state(path)
    layers_with_adapters = unmerged_layers(state)
    if layers_with_adapters:
        raise ValueError(unmerged_message(str(path), layers_with_adapters))
    return state


def stored_state(path: Path) -> State:
    """Read the tensors of a file, without the prefixes that distributed training and PEFT add."""
    return {
        name.removeprefix("module.").removeprefix(PREFIX): tensor
        for name, tensor in read(path, "weights").items()
    }


def release_of(
    model_folder: ModelFolder,
    stages: Collection[str],
    flows: Mapping[str, str],
    load: Callable[..., nn.Module],
    required_models: Container[str],
    other_pipeline_files: tuple[str, ...] = (),
) -> Release:
    """Describe the folder to export: pipeline.json and all models that are on this machine.

    Models in another repository ("owner/repo/path") that were not found on this machine stay references in
    pipeline.json. Models that pipeline.json does not name, such as encoders, are exported if they were found.

    Args:
        model_folder: settings of pipeline.json.
        stages: names of the tuned stages.
        flows: stage -> name of its model in pipeline.json.
        load: function that reads a model, called with its stem and a dtype.
        required_models: names of models that must be on this machine.
        other_pipeline_files: names of further files with the form of pipeline.json. Those that exist are
            exported.
    Raises: FileNotFoundError for a missing model; ValueError if two models have the same file name.
    """
    export_stems = dict[str, str]()  # name of a model -> its stem in the exported folder
    exported_files = dict[str, Path | bytes]()  # path in the exported folder -> source file, or content
    networks = dict[str, Stored]()  # tuned networks by stage
    missing_models = []  # names of models that are not on this machine
    stem_by_name: dict[str, Path] = {}  # last part of a stem -> stem
    stage_by_tuned_model = {flows[stage]: stage for stage in stages}
    for model_name in dict.fromkeys([*model_folder.models, *model_folder.usual]):
        try:
            stem = find_model(model_folder, model_name)
        except FileNotFoundError:
            if model_name in required_models or model_name in stage_by_tuned_model:
                raise
            missing_models.append(model_name)
            continue
        # All models are written to one folder, so their names must differ.
        if stem_by_name.setdefault(stem.name, stem) != stem:
            raise ValueError(
                f"export: the models {stem} and {stem_by_name[stem.name]} have the same file name. Rename the"
                " files of one of them, and its value in pipeline.json."
            )
        export_stems[model_name] = f"ckpts/{stem.name}"
        base_weights = find_weights(stem)
        assert base_weights is not None  # find_model has checked it
        exported_files[f"{export_stems[model_name]}.json"] = with_ending(stem, ".json")
        if model_name in stage_by_tuned_model:
            # The tuned network is read and written only when the export runs.
            networks[stage_by_tuned_model[model_name]] = Stored(
                file=f"{export_stems[model_name]}.safetensors",
                load=partial(load, stem),
                write=partial(_write_tuned, base_weights),
            )
        else:
            exported_files[export_stems[model_name] + base_weights.suffix] = base_weights
    for path in (model_folder.root / file_name for file_name in ("pipeline.json", *other_pipeline_files)):
        if path.is_file():
            pipeline_json = read_json(path)
            # Exported models get their path in the exported folder; others stay references.
            pipeline_json["args"]["models"] = {
                model_name: export_stems.get(model_name, model_path)
                for model_name, model_path in pipeline_json["args"]["models"].items()
            }
            exported_files[path.name] = (json.dumps(pipeline_json, indent=4) + "\n").encode()
    return Release(files=exported_files, networks=networks, elsewhere=missing_models)


def _write_tuned(base_path: Path, target_path: Path, state: State) -> None:
    """Write tuned tensors to `target_path`, each in the dtype that it has in the file `base_path`."""
    write(target_path, in_types_of(base_state(base_path), state))


def released_stages(kind: str, width: int) -> list[SizedStage]:
    """Build the stages of a published generator without weights, for estimates of memory and time.

    The sizes are copied from the published JSON files of the models.

    Args:
        kind: kind of prompt, "text" or "image".
        width: channels of the conditioning tokens, 768 for CLIP and 1024 for DINOv2.
    """
    network_kwargs: dict[str, Any] = dict(
        in_channels=8,
        out_channels=8,
        model_channels=1024,
        cond_channels=width,
        num_blocks=24,
        num_head_channels=64,
        qk_rms_norm=True,
    )
    structure_config = StructureFlowConfig(resolution=16, patch_size=1, **network_kwargs)
    latent_config = LatentFlowConfig(resolution=64, patch_size=2, io_block_channels=(128,), **network_kwargs)
    stage_rows = (
        ("structure", partial(StructureFlow, structure_config), DenseGrid(channels=8, resolution=16)),
        ("latent", partial(LatentFlow, latent_config), SparseVoxels(channels=8, resolution=64)),
    )
    return [
        SizedStage(
            conditioning=[TOKENS[kind], width],
            stage=FlowStage(name=name, model=empty(make_network), latents=latents, sampling=KINDS[kind]),
        )
        for name, make_network, latents in stage_rows
    ]
