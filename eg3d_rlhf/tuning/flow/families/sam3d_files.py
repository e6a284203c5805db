"""Readers and writers of the files of SAM 3D Objects.

They are pipeline.yaml, and a YAML file and a checkpoint for each of two generators (the stages), two decoders
and an encoder. Nothing is downloaded, and no code of the files is run. In a generator's checkpoint, the
flow's network and the embedder of its conditioning have these prefixes:

    _base_models.generator.reverse_fn.backbone.                      the network of the flow
    _base_models.condition_embedder.                                 the embedder, or
    _base_models.generator.reverse_fn.backbone.condition_embedder.   the embedder, inside the network

Other tensors of a checkpoint are ignored. Training settings in the YAML files are ignored, except the
distribution of times and the loss weights. Other unknown settings are an error if they are switched on.
Settings that pipeline.yaml lacks have the defaults of the original's code, which have priority over the
generators' files.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from eg3d_rlhf.core.plain_yaml import read_yaml
from eg3d_rlhf.models.dino import DinoConfig, from_hub
from eg3d_rlhf.models.image_preprocessing import ObjectCut
from eg3d_rlhf.models.sam3d import (
    Embedder,
    ImageEncoder,
    LatentConfig,
    MixtureConfig,
    MixtureFlow,
    PointConfig,
    PointPatches,
    VoxelFlow,
    VoxelFlowConfig,
)
from eg3d_rlhf.models.trellis.autoencoders import (
    GaussianDecoder,
    GaussianDecoderConfig,
    StructureDecoder,
    StructureEncoder,
    StructureVAEConfig,
)
from eg3d_rlhf.models.weights import (
    State,
    empty,
    entries_below,
    fill,
    freeze,
    in_types_of,
    read,
    read_content,
    rewrite,
    shapes,
)
from eg3d_rlhf.tuning.flow.base.family import Network, Release, Stored
from eg3d_rlhf.tuning.flow.base.stage import FlowPath, Sampling
from eg3d_rlhf.tuning.flow.families.folder import are_scales, mentions
from eg3d_rlhf.tuning.flow.families.sam3d_pose import DECODERS, SHIFTED
from eg3d_rlhf.tuning.flow.families.trellis_files import build_from_state

PIPELINE = "pipeline.yaml"
PACKAGE = "sam3d_objects"
# Folders in which pipeline.yaml is searched for: the folder itself, the released repository's folder, and the
# folder to which the original's installation moves it.
FOLDERS = ("", "checkpoints", "checkpoints/hf")
STRUCTURE, LATENT = STAGES = ("structure", "latent")
SHORT = {STRUCTURE: "ss", LATENT: "slat"}  # stage -> its prefix in pipeline.yaml
PARTS = {  # generator or decoder -> its prefix in pipeline.yaml
    STRUCTURE: "ss_generator",
    LATENT: "slat_generator",
    "structure decoder": "ss_decoder",
    "decoder": "slat_decoder_gs",
}
# File name of the encoder without ending. It is released beside the other files, but pipeline.yaml does not
# name it.
ENCODER = "ss_encoder"
ENDINGS = (".safetensors", ".ckpt")  # endings of the encoder's weights, in the order in which they are tried
REPOSITORY = ("checkpoints", "hf")  # names of the folders of a repository that have the files
OWN_SHAPES = "encoding your own meshes as pairs"  # what cannot be done without the encoder, for `flow check`
STRENGTH = {STRUCTURE: 7.0, LATENT: 5.0}  # guidance strength w if pipeline.yaml states none
# Prefixes in a checkpoint: of the network, and the two possible prefixes of the embedder.
FLOW = "_base_models.generator.reverse_fn.backbone."
EMBEDDERS = ("_base_models.condition_embedder.", f"{FLOW}condition_embedder.")
FLOW_MATCHING = "FlowMatching"
GENERATORS = ("ShortCut", FLOW_MATCHING)  # both have their data at t = 1
# Classes that add guidance around the network.
GUIDED = ("ClassifierFreeGuidance", "ClassifierFreeGuidanceWithExternalUnconditionalProbability")
# Transforms that are applied to image, mask and point map together.
CROP, REMBG = CUTTING = ("crop_around_mask_with_padding", "rembg")
# Normalisers of point maps; see `image_preprocessing.moments`.
NORMALISERS = ("ObjectCentricSSI", "SSIPointmapNormalizer", "ObjectApparentSizeSSI")
IGNORED = {  # settings that are ignored, because they concern training or are also stated elsewhere
    "_target_",
    "condition_embedder",
    "attn_mode",
    "pe_mode",
    "initialization",
    "resolution",
    "in_channels",
    "out_channels",
    "patch_size",
    "latent_mapping",
    "pretrained_ckpt_path",
    "freeze_d_time_embedder",
    "freeze_shared_parameters",
    "use_checkpoint",
    "force_zeros_cond",
}


@dataclass(frozen=True, kw_only=True)
class GeneratorFile:
    """Settings of one stage of SAM 3D Objects, read from the stage's YAML file."""

    checkpoint: Path
    config: MixtureConfig | VoxelFlowConfig
    embedder: Mapping  # settings of the embedder, as in the file
    path: FlowPath
    # Weights in the training loss by latent; None if the file has none.
    weights: Mapping[str, float] | None
    single: bool  # True if the original computes sampling times in float32
    guided: bool  # True if the network has an empty conditioning, as guidance needs


@dataclass(frozen=True, kw_only=True)
class PipelineFile:
    """Settings of pipeline.yaml and of the generators' files."""

    root: Path
    generators: Mapping[str, GeneratorFile]  # by stage
    sampling: Mapping[str, Sampling]  # by stage
    mean: tuple[float, ...]  # mean of the second stage's latents, per channel
    std: tuple[float, ...]  # standard deviation of the second stage's latents, per channel
    # distance in voxels for removing inner voxels, see `sam3d.remove_inner_voxels`; 0: none is removed
    prune: int
    cuts: Mapping[str, ObjectCut]  # settings for cropping images, by stage
    pose: str  # name of the pose's decoder, one of sam3d_pose.DECODERS
    files: Mapping[str, Path]  # all files that are read, by name

    @property
    def preparation(self) -> str:
        """Text that describes the image preprocessing.

        Files of embeddings contain this text and are compared by it, so it must not change.
        """
        crops = [
            f"{cut.size} pixels, box {cut.box_size_factor:g}, border"
            f" {cut.padding_factor:g}{', cut out' if cut.rembg else ''}"
            for cut in self.cuts.values()
        ]
        point_settings = self.cuts[STRUCTURE]  # only the first stage reads point maps
        if point_settings.moments_alone:
            normalisation = "as they are"
        else:
            normalisation = (
                f"by {point_settings.normaliser}{'' if point_settings.scene_scale else ' of the object'}"
            )
        # If both stages crop in the same way, dict.fromkeys leaves one description.
        return f"{'; '.join(dict.fromkeys(crops))}, points {normalisation}"


def folder_of(root: Path) -> Path:
    """Return the first of the folders `root`/FOLDERS that has a pipeline.yaml, or `root` if none has."""
    folders = [root / name for name in FOLDERS]
    return next((folder for folder in folders if (folder / PIPELINE).is_file()), root)


def recognises(root: Path) -> bool:
    """Return True if there is a pipeline.yaml that names the package sam3d_objects."""
    return mentions(folder_of(root) / PIPELINE, PACKAGE)


def read_pipeline(root: Path) -> PipelineFile:
    """Read <root>/pipeline.yaml and the YAML files that it names.

    Raises: FileNotFoundError for missing files; ValueError for files of another model, or with settings that
        are not supported.
    """
    root = folder_of(Path(root))
    path = root / PIPELINE
    if not path.is_file():
        raise FileNotFoundError(
            f"--pipeline: there is no file {PIPELINE} in {root}. Pass the folder of the checkpoints of SAM"
            " 3D Objects."
        )
    # The file is read as data: no class that it names is imported.
    pipeline_settings = read_yaml(path)
    paths = {PIPELINE: path}
    for part_prefix in PARTS.values():
        # Paths are relative to the folder of pipeline.yaml.
        for setting_kind in ("config", "ckpt"):
            file_name = pipeline_settings.get(f"{part_prefix}_{setting_kind}_path")
            file = root / str(file_name)
            if not file_name:
                raise FileNotFoundError(
                    f"{path}: the setting {part_prefix}_{setting_kind}_path is missing. Download the file"
                    " again."
                )
            if not file.is_file():
                raise FileNotFoundError(
                    f"{path}: {part_prefix}_{setting_kind}_path states {file_name!r}, but the file {file}"
                    " does not exist. Download it."
                )
            paths[f"{part_prefix}.{setting_kind}"] = file
    # The encoder is optional, because it is needed only to encode meshes.
    encoder_config = root / f"{ENCODER}.yaml"
    encoder_weights = [
        root / f"{ENCODER}{ending}" for ending in ENDINGS if (root / f"{ENCODER}{ending}").is_file()
    ]
    if encoder_config.is_file() and encoder_weights:
        paths |= {f"{ENCODER}.config": encoder_config, f"{ENCODER}.ckpt": encoder_weights[0]}
    generators = {
        stage: _generator(stage, paths[f"{PARTS[stage]}.config"], paths[f"{PARTS[stage]}.ckpt"])
        for stage in STAGES
    }
    try:
        mean, std = (
            tuple(map(float, pipeline_settings[f"slat_{statistic}"])) for statistic in ("mean", "std")
        )
        # Missing or null means 0: nothing is removed.
        prune_distance = int(pipeline_settings.get("downsample_ss_dist") or 0)
    except (KeyError, TypeError, ValueError):
        # Reported by the error below.
        mean = ()
        std = ()
        prune_distance = 0
    if not mean or not are_scales(mean, std) or prune_distance < 0:
        raise ValueError(
            f"{path}: slat_mean must be finite, slat_std > 0, and downsample_ss_dist >= 0, got"
            f" {pipeline_settings.get('slat_mean')}, {pipeline_settings.get('slat_std')} and"
            f" {pipeline_settings.get('downsample_ss_dist')}. Download the file again."
        )
    # The original cannot open a file with `use_stage...`. Input mappings would change the conditioning.
    unsupported_settings = [
        setting_name
        for setting_name in pipeline_settings
        if setting_name.startswith("use_stage")
        or (setting_name.endswith("_condition_input_mapping") and pipeline_settings[setting_name])
    ]
    if unsupported_settings:
        raise ValueError(
            f"{path}: these settings are not supported: {', '.join(unsupported_settings)}. Remove them from"
            " the file. To sample in few steps, use flow sample --set few_steps=N."
        )
    # The name of the decoder decides the units of the pose; see sam3d_pose.py.
    pose_decoder = str(pipeline_settings.get("pose_decoder_name", SHIFTED))
    if pose_decoder not in DECODERS:
        raise ValueError(
            f"{path}: pose_decoder_name must be {' or '.join(DECODERS)}, got {pose_decoder!r}. Download the"
            " file again."
        )
    try:
        cuts = {stage: _cut(pipeline_settings[f"{SHORT[stage]}_preprocessor"], stage) for stage in STAGES}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        error_text = (
            error
            if isinstance(error, ValueError)
            else f"the preprocessors of images cannot be read ({error!r}). Download the file again."
        )
        raise ValueError(f"{path}: {error_text}") from None
    return PipelineFile(
        root=root,
        generators=generators,
        sampling={stage: _sampling(path, pipeline_settings, stage, generators[stage]) for stage in STAGES},
        mean=mean,
        std=std,
        prune=prune_distance,
        cuts=cuts,
        pose=pose_decoder,
        files=paths,
    )


def _cut(preprocessor_settings: Mapping, stage: str) -> ObjectCut:
    """Read the settings by which a preprocessor crops images.

    Args:
        preprocessor_settings: entry of the preprocessor in pipeline.yaml.
        stage: name of the stage that reads the images.
    Raises: ValueError for a preprocessor that does anything else; KeyError or TypeError for missing settings.
    """
    reads_point_map = stage == STRUCTURE  # only the first stage reads point maps
    # Joint transforms are applied to image, mask and point map together. There is one list of them for inputs
    # with point maps and one for inputs without; the other list must be empty.
    if reads_point_map:
        transforms = preprocessor_settings["img_mask_pointmap_joint_transform"]
        unused_transforms = preprocessor_settings.get("img_mask_joint_transform")
    else:
        transforms = preprocessor_settings["img_mask_joint_transform"]
        unused_transforms = preprocessor_settings.get("img_mask_pointmap_joint_transform")
    # By class name. A transform that occurs twice is detected below by the number of steps.
    joint_transforms = {_class_name(transform): transform for transform in transforms}
    sizes = set[int]()
    is_supported = True
    for input_kind in ("img", "mask", *(["pointmap"] if reads_point_map else [])):
        # Exactly two transforms: padding to a square, then resizing.
        pad, resize = preprocessor_settings[f"{input_kind}_transform"]["transforms"]
        # Codes of Pillow: 0 is nearest neighbour, 2 is bilinear, which is the default for images.
        has_right_interpolation = resize.get("interpolation") in ((None, 2) if input_kind == "img" else (0,))
        class_names = (_class_name(pad), _class_name(resize))
        is_supported &= has_right_interpolation and class_names == ("pad_to_square_centered", "Resize")
        sizes.add(int(resize["size"]))
    # resize_all_to_same_size resizes the point map to the image, which `object_inputs` always does.
    unknown_names = set(joint_transforms) - {*CUTTING, "resize_all_to_same_size"}
    is_supported &= not unknown_names and len(transforms) == len(joint_transforms) and not unused_transforms
    crop_settings = {
        name: value
        for name, value in joint_transforms.get(CROP, {}).items()
        if name not in ("_target_", "_partial_")
    }
    if set(crop_settings) != {"box_size_factor", "padding_factor"} or not is_supported:
        transform_names = (
            ", ".join(map(_class_name, [*transforms, *(unused_transforms or ())])) or "no joint transforms"
        )
        raise ValueError(
            f"{SHORT[stage]}_preprocessor: only a crop around the mask, padding to squares and resizing are"
            f" supported, got {transform_names}. Download the file again."
        )
    if len(sizes) != 1:
        raise ValueError(
            f"{SHORT[stage]}_preprocessor: images, masks and point maps must have the same size, got sizes"
            f" {sorted(sizes)}. Download the file again."
        )
    normaliser_settings = preprocessor_settings.get("pointmap_normalizer") or {}
    # Without an entry the original uses SSIPointmapNormalizer.
    normaliser_name = _class_name(normaliser_settings) if normaliser_settings else NORMALISERS[1]
    if normaliser_name not in NORMALISERS:
        raise ValueError(
            f"{SHORT[stage]}_preprocessor: pointmap_normalizer must be one of {', '.join(NORMALISERS)}, got"
            f" {normaliser_name}. Download the file again."
        )
    return ObjectCut(
        size=sizes.pop(),
        rembg=REMBG in joint_transforms,
        normaliser=normaliser_name,
        # Without normalize_pointmap the map is unchanged, but its scale and shift are still computed.
        moments_alone=not preprocessor_settings.get("normalize_pointmap", False),
        scene_scale=bool(normaliser_settings.get("use_scene_scale", True)),
        **{name: float(value) for name, value in crop_settings.items()},
    )


def _class_name(settings: Mapping) -> str:
    """Return the name, without its module, of the class that settings in a YAML file build."""
    return str(settings["_target_"]).rpartition(".")[2]


def _generator(stage: str, path: Path, checkpoint: Path) -> GeneratorFile:
    """Read the YAML file of a generator.

    Args:
        stage: name of the stage.
        path: path of the YAML file.
        checkpoint: path of the checkpoint.
    Raises: ValueError, naming the file, for missing, unknown or unsupported settings.
    """
    try:
        # The settings are nested: generator.backbone is the flow, its reverse_fn adds guidance, and the
        # backbone of that is the network.
        module_settings = read_yaml(path)["module"]
        flow_settings = module_settings["generator"]["backbone"]
        guidance_settings = flow_settings["reverse_fn"]
        network_settings = guidance_settings["backbone"]
        class_paths = [
            str(class_settings["_target_"])
            for class_settings in (flow_settings, guidance_settings, network_settings)
        ]
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: module.generator.backbone, its reverse_fn and its reverse_fn.backbone must each have a"
            f" _target_, but {error} is missing. Pass the folder of SAM 3D Objects."
        ) from None
    for class_path, supported_names in zip(class_paths, (GENERATORS, GUIDED, None), strict=True):
        # Classes of other packages may use another direction of time.
        if not class_path.startswith(PACKAGE) or (
            supported_names and class_path.rpartition(".")[2] not in supported_names
        ):
            expected_class = f"{' or '.join(supported_names or ('a network',))} of {PACKAGE}"
            raise ValueError(
                f"{path}: expected the class {expected_class}, got {class_path}. Pass the folder of SAM 3D"
                " Objects."
            )
    if flow_settings.get("reversed_timestamp"):
        raise ValueError(
            f"{path}: reversed_timestamp is not supported, because it reverses the times of the sampler, but"
            " not of the training path. Set it to false."
        )
    # The defaults are those of the original's code.
    time_sampler = flow_settings.get("training_time_sampler_fn") or {"mean": -1.0, "std": 1.0}
    if "_target_" in time_sampler and _class_name(time_sampler) != "lognorm_sampler":
        raise ValueError(
            f"{path}: training_time_sampler_fn must be lognorm_sampler, got {_class_name(time_sampler)}."
            " Download the file again."
        )
    try:
        # "_target_" names a class and is no weight.
        weights = {
            name: float(setting_value)
            for name, setting_value in (flow_settings.get("loss_weights") or {}).items()
            if name != "_target_"
        }
        # The settings of the embedder are beside those of the network, or inside them.
        embedder_settings = (
            (module_settings.get("condition_embedder") or {}).get("backbone")
            or network_settings.get("condition_embedder")
            or {}
        )
        time_scale_kwargs = {"time_scale": float(flow_settings.get("time_scale", 1000.0))}
        mean = float(time_sampler["mean"])
        std = float(time_sampler["std"])
        if not (
            0 < time_scale_kwargs["time_scale"] < math.inf and 0 < std < math.inf and math.isfinite(mean)
        ):
            raise ValueError(
                f"time_scale and std of the training times must be above 0 and mean must be finite, got"
                f" {time_scale_kwargs['time_scale']}, {std} and {mean}. Download the file again."
            )
        # The second network has one latent, whose sizes are settings of the network itself.
        config: Any = (
            _build_config(
                MixtureConfig, network_settings, latents=_latents(network_settings), **time_scale_kwargs
            )
            if stage == STRUCTURE
            else _build_config(
                VoxelFlowConfig,
                network_settings,
                **{k: network_settings[k] for k in SIZES if k in network_settings},
                **time_scale_kwargs,
            )
        )
        # The original's time is 1 - t of this package, which negates the mean of the logit-normal
        # distribution.
        flow_path = FlowPath(sigma_min=float(flow_settings.get("sigma_min", 0.0)), mean=-mean, std=std)
        if weights and stage == STRUCTURE and set(weights) != set(config.latents):
            raise ValueError(
                f"loss_weights must name {', '.join(config.latents)}, got {', '.join(weights)}. Download the"
                " file again."
            )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{path}: {error}"
            if isinstance(error, ValueError)
            else f"{path}: the sizes of the network cannot be read ({error!r}). Download the file again."
        ) from None
    # The empty conditioning is zeros only with both settings. With unconditional_handling alone, the original
    # leaves the conditioning unchanged, so that guidance has no effect.
    has_empty_conditioning = guidance_settings.get("unconditional_handling") == "add_flag" and bool(
        network_settings.get("force_zeros_cond")
    )
    return GeneratorFile(
        checkpoint=checkpoint,
        config=config,
        embedder=embedder_settings,
        path=flow_path,
        weights=weights or None,
        guided=has_empty_conditioning,
        single=class_paths[0].endswith(FLOW_MATCHING),
    )


# Settings of the second network that describe its only latent. The first network has such settings for each
# latent.
SIZES = ("resolution", "in_channels", "out_channels", "patch_size", "pe_mode")


def _build_config(config_class: Any, file_settings: Mapping, **overrides: Any) -> Any:
    """Build a configuration from settings of a YAML file.

    Args:
        config_class: dataclass of the configuration.
        file_settings: settings of the file.
        overrides: values of fields that have priority over the file.
    Raises: ValueError for unknown settings that are switched on, and for missing settings.
    """
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    # Unknown settings that are null or false change nothing, so they are accepted.
    unknown_settings = sorted(
        name for name, value in file_settings.items() if name not in fields and name not in IGNORED and value
    )
    # Ignored settings are used only if the caller passes their values.
    config_kwargs = {
        name: value for name, value in file_settings.items() if name in fields and name not in IGNORED
    }
    config_kwargs |= overrides
    # A field without any default must be in the file.
    no_default = dataclasses.MISSING
    missing_settings = [
        name
        for name, field in fields.items()
        if field.default is no_default and field.default_factory is no_default and name not in config_kwargs
    ]
    if unknown_settings or missing_settings:
        fault_texts = [
            f"{fault_label} {', '.join(names[:8])}"
            for fault_label, names in (("unknown:", unknown_settings), ("missing:", missing_settings))
            if names
        ]
        raise ValueError(
            f"the settings do not fit {config_class.__name__} ({'; '.join(fault_texts)}). Pass the folder of"
            " SAM 3D Objects."
        )
    return config_class(**config_kwargs)


def _latents(network: Mapping) -> dict[str, LatentConfig]:
    """Read the sizes of the first stage's latents, by name, from the settings of its network."""
    latents = {}
    for latent_name, latent_settings in network["latent_mapping"].items():
        position_settings = latent_settings.get("pos_embedder") or {}
        resolution = position_settings.get("resolution")
        if position_settings.get("patch_size", 1) != 1:
            raise ValueError(
                f"latent_mapping.{latent_name}: patch_size must be 1, got {position_settings['patch_size']}."
                " Download the file again."
            )
        # A latent on a grid has one token per grid point. Other latents state their number of tokens, by
        # default 1.
        token_count = int(resolution) ** 3 if resolution else int(position_settings.get("token_len", 1))
        latents[latent_name] = LatentConfig(
            in_channels=int(latent_settings["in_channels"]), tokens=token_count, resolution=resolution
        )
    return latents


def _sampling(path: Path, pipeline_settings: Mapping, stage: str, generator: GeneratorFile) -> Sampling:
    """Read the settings of a stage's sampler.

    In the file, times are multiplied by time_scale, and 0 is noise. The guided velocity is (1 + w) v_cond - w
    v_null in the file and in this package.

    Args:
        path: path of pipeline.yaml, for messages.
        pipeline_settings: content of pipeline.yaml.
        stage: name of the stage.
        generator: settings of the stage's generator.
    """
    prefix = SHORT[stage]
    time_scale = generator.config.time_scale
    try:
        # Divided by time_scale, and clipped to 1, the end of the path.
        interval_start, interval_end = (
            min(float(t) / time_scale, 1.0) for t in pipeline_settings.get(f"{prefix}_cfg_interval", (0, 500))
        )
        sampling = Sampling(
            steps=int(pipeline_settings.get(f"{prefix}_inference_steps", 25)),
            rescale_t=float(pipeline_settings.get(f"{prefix}_rescale_t", 3.0)),
            cfg_strength=float(pipeline_settings.get(f"{prefix}_cfg_strength", STRENGTH[stage])),
            # Time runs from 1 (noise) to 0 in this package, so the ends of the interval are swapped.
            cfg_interval=(1 - interval_end, 1 - interval_start),
            time_scale=time_scale,
            single=generator.single,
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}, {prefix}: {error}") from None
    # Without an empty conditioning, guidance would compare the prompt with itself.
    if sampling.cfg_strength and not generator.guided:
        raise ValueError(
            f"{path}: {prefix}_cfg_strength is {sampling.cfg_strength:g}, but guidance needs"
            " force_zeros_cond: true and unconditional_handling: add_flag in the generator's file. Set"
            f" {prefix}_cfg_strength to 0, or download the generator's file again."
        )
    return sampling


def load_flow(
    generator_file: GeneratorFile,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    *,
    state: State | None = None,
) -> nn.Module:
    """Build the network of a stage's flow. Names and shapes must match exactly.

    Args:
        generator_file: settings of the generator.
        dtype: dtype of the layers that may be half precision; see `trellis_files.build_from_state`.
        device: device of the network.
        state: content of the checkpoint; None: it is read from its file.
    """
    return build_from_state(
        network_of(generator_file.config),
        generator_file.config,
        flow_state(generator_file, state),
        str(generator_file.checkpoint),
        dtype,
        device,
    )


def network_of(config: MixtureConfig | VoxelFlowConfig) -> Any:
    """Return the class of the network that belongs to a configuration."""
    return MixtureFlow if isinstance(config, MixtureConfig) else VoxelFlow


def flow_state(generator_file: GeneratorFile, state: State | None = None) -> State:
    """Return the tensors of the flow's network in a generator's checkpoint, without their prefix.

    Args:
        generator_file: settings of the generator.
        state: content of the checkpoint; None: it is read from its file.
    """
    # The embedder may be inside the network; its tensors are left out.
    return {
        name: tensor
        for name, tensor in _under(generator_file, (FLOW,), state).items()
        if not name.startswith("condition_embedder.")
    }


def embedder_state(generator_file: GeneratorFile, state: State | None = None) -> State:
    """Return the tensors of the embedder in a generator's checkpoint, without their prefix.

    Args:
        generator_file: settings of the generator.
        state: content of the checkpoint; None: it is read from its file.
    """
    return _under(generator_file, EMBEDDERS, state)


def _under(generator_file: GeneratorFile, prefixes: tuple[str, ...], state: State | None) -> State:
    """Return the tensors whose names begin with a prefix, without the prefix.

    Args:
        generator_file: settings of the generator.
        prefixes: possible prefixes; the first one with any tensor is used.
        state: content of the checkpoint; None: it is read from its file.
    Raises: ValueError if no name begins with a prefix.
    """
    state = read(generator_file.checkpoint, "weights") if state is None else state
    for prefix in prefixes:
        if tensors := entries_below(state, prefix):
            return tensors
    raise ValueError(
        f"{generator_file.checkpoint}: no name of a tensor begins with {' or '.join(prefixes)}. The names are"
        f" {', '.join(sorted(state)[:8])} ... Download the released checkpoint again."
    )


def load_embedder(generator_file: GeneratorFile, device: str | torch.device = "cpu") -> Embedder:
    """Build the embedder of a stage's conditioning, frozen and in float32.

    Names and shapes must match exactly.
    """
    state = embedder_state(generator_file)
    embedder = embedder_of(generator_file, state)
    # The checkpoint has DINOv2's names of torch hub; this package uses those of transformers.
    renamed_tensors = rename_dino_tensors(embedder, state)
    return freeze(
        fill(
            embedder,
            renamed_tensors,
            str(generator_file.checkpoint),
            requested_dtypes=torch.float32,
            device=device,
        ),
        device,
    )


def rename_dino_tensors(embedder: Embedder, state: Mapping[str, torch.Tensor]) -> State:
    """Rename the tensors of the embedder's DINOv2 networks from torch hub's to transformers' names.

    Returns: all tensors of the embedder by name.
    """
    renamed_tensors = dict(state)
    for encoder_index, encoder in enumerate(embedder.module_list):
        if isinstance(encoder, ImageEncoder):
            prefix = f"module_list.{encoder_index}.backbone."
            # from_hub may also interpolate the position embeddings to the size of the input images.
            dino_tensors = from_hub(entries_below(state, prefix), encoder.backbone.config)
            # The old names are removed, because unknown names are an error when the network is filled.
            renamed_tensors = {
                name: tensor for name, tensor in renamed_tensors.items() if not name.startswith(prefix)
            }
            renamed_tensors |= {prefix + name: tensor for name, tensor in dino_tensors.items()}
    return renamed_tensors


def embedder_of(generator_file: GeneratorFile, state: Mapping[str, torch.Tensor]) -> Embedder:
    """Build an embedder without weights. Its widths and its DINOv2 networks are inferred from the tensors.

    Raises: ValueError for tensors that do not belong to an embedder of SAM 3D Objects.
    """
    position_kind = generator_file.embedder.get("use_pos_embedding", "learned")
    if position_kind not in ("learned", "random"):
        raise ValueError(
            f"{generator_file.checkpoint}: use_pos_embedding must be learned or random, got"
            f" {position_kind!r}. Download the generator's YAML file again."
        )
    try:
        encoders = [
            _encoder(i, settings_and_inputs, state)
            for i, settings_and_inputs in enumerate(generator_file.embedder["embedder_list"])
        ]
        projections = [f"projection_nets.{i}" for i in range(len(encoders))]
        # The files state these widths only indirectly, so they are read from the tensors.
        hidden_widths = [len(state[f"{projection}.1.w1.weight"]) for projection in projections]
        has_pre_norm = bool(generator_file.embedder.get("projection_pre_norm", True))
        with torch.device("meta"):
            return Embedder(
                encoders,
                hidden_widths,
                len(state[f"{projections[0]}.1.w2.weight"]),
                has_pre_norm,
                has_random_frames=position_kind == "random",
            )
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(
            f"{generator_file.checkpoint}: the embedder of SAM 3D Objects cannot be built ({error!r})."
            " Download the checkpoint and the generator's YAML file again."
        ) from None


def _encoder(
    encoder_index: int, settings_and_inputs: Any, state: Mapping[str, torch.Tensor]
) -> tuple[nn.Module, int, list[tuple[str, str | None]]]:
    """Build one encoder of the embedder without weights.

    Args:
        encoder_index: index of the encoder in the embedder.
        settings_and_inputs: pair of the encoder's settings and the list of its inputs.
        state: tensors of the embedder.
    Returns: the encoder, its number of channels, and its inputs as pairs (name, coordinate frame or None).
    Raises: ValueError for an unsupported class of encoder.
    """
    encoder_settings, inputs = settings_and_inputs
    class_name = _class_name(encoder_settings)
    encoder_inputs = [(str(name), None if frame is None else str(frame)) for name, frame in inputs]
    with torch.device("meta"):
        if class_name == "Dino":
            image_side = int(encoder_settings.get("input_size", 224))
            # The sizes are inferred from the tensors, because the YAML file does not state them.
            backbone_tensors = entries_below(state, f"module_list.{encoder_index}.backbone.")
            config = DinoConfig.from_state(backbone_tensors, "embedder", shown=image_side)
            has_pre_norm = bool(encoder_settings.get("prenorm_features", False))
            normalises_images = bool(encoder_settings.get("normalize_images", True))
            return (
                ImageEncoder(config, image_side, has_pre_norm, normalises_images),
                config.hidden_size,
                encoder_inputs,
            )
        if class_name == "PointPatchEmbed":
            # Other settings of this encoder concern training and are ignored.
            field_names = {field.name for field in dataclasses.fields(PointConfig)}
            point_config = PointConfig(
                **{name: value for name, value in encoder_settings.items() if name in field_names}
            )
            return PointPatches(point_config), point_config.embed_dim, encoder_inputs
    raise ValueError(
        f"embedder_list: an encoder must be Dino or PointPatchEmbed, got {class_name!r}. Download the"
        " generator's YAML file again."
    )


# Decoder or encoder -> its prefix in pipeline.yaml, its class, and the class of its configuration.
AUTOENCODERS: dict[str, tuple[str, Any, Any]] = {
    "structure decoder": (PARTS["structure decoder"], StructureDecoder, StructureVAEConfig),
    "decoder": (PARTS["decoder"], GaussianDecoder, GaussianDecoderConfig),
    "structure encoder": (ENCODER, StructureEncoder, StructureVAEConfig),
}


def load_part(pipeline_file: PipelineFile, part: str, device: str | torch.device = "cpu") -> nn.Module:
    """Build a decoder or the encoder in float32. They have the architectures of TRELLIS.

    Args:
        pipeline_file: settings of the pipeline.
        part: key of AUTOENCODERS.
        device: device of the network.
    Raises: FileNotFoundError if the encoder is not on this machine.
    """
    network_class, config, checkpoint = part_of(pipeline_file, part)
    return build_from_state(
        network_class, config, read(checkpoint, "weights"), str(checkpoint), torch.float32, device
    )


def part_of(pipeline_file: PipelineFile, part: str) -> tuple[Any, Any, Path]:
    """Return the class, the configuration and the checkpoint of a decoder or of the encoder.

    Args:
        pipeline_file: settings of the pipeline.
        part: key of AUTOENCODERS.
    Raises: FileNotFoundError if its files are missing; ValueError for a configuration that does not fit.
    """
    file_prefix, network_class, config_class = AUTOENCODERS[part]
    if f"{file_prefix}.ckpt" not in pipeline_file.files:
        weights_names = " or ".join(f"{file_prefix}{ending}" for ending in ENDINGS)
        raise FileNotFoundError(
            f"{part}: {file_prefix}.yaml or {weights_names} is missing in {pipeline_file.root}. Download both"
            " files; they are released beside the other checkpoints."
        )
    config_file, checkpoint = (
        pipeline_file.files[f"{file_prefix}.{file_kind}"] for file_kind in ("config", "ckpt")
    )
    config_settings = read_yaml(config_file)
    field_names = {field.name for field in dataclasses.fields(config_class)}
    try:
        # Settings in IGNORED are ignored for generators, but these networks need some of them.
        config = _build_config(
            config_class,
            config_settings,
            **{
                setting_name: config_settings[setting_name]
                for setting_name in field_names & IGNORED & set(config_settings)
            },
        )
        # The network is built on the meta device only to check that its sizes fit each other.
        empty(lambda: network_class(config))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{config_file}: {error}") from None
    return network_class, config, checkpoint


def release(root: Path, stages: Sequence[str]) -> Release:
    """Describe the folder to export: all files of the folder, and the licence of the repository.

    Args:
        root: folder of the generator.
        stages: names of the tuned stages.
    """
    pipeline_file = read_pipeline(root)
    root = Path(root)
    tuned_generators = {stage: pipeline_file.generators[stage] for stage in stages}
    # Checkpoints of tuned networks are written anew; all other files are copied.
    tuned_checkpoints = {generator.checkpoint.resolve() for generator in tuned_generators.values()}
    copied_files = {}
    for path in root.rglob("*"):
        relative_path = path.relative_to(root)
        # Hidden files, such as those of git or of downloads, are not exported.
        is_hidden = any(part.startswith(".") for part in relative_path.parts)
        if path.is_file() and path.resolve() not in tuned_checkpoints and not is_hidden:
            copied_files[str(relative_path)] = path
    # The licence is in the top folder of the repository, one or two levels above the checkpoints.
    licence_files = dict[str, Path]()  # by file name
    if root.resolve().name in REPOSITORY:
        for folder in root.resolve().parents[:2]:
            licence_files |= {path.name: path for path in sorted(folder.glob("LICENSE*")) if path.is_file()}
    return Release(
        files={**licence_files, **copied_files},
        networks={
            stage: Stored(
                file=str(generator.checkpoint.relative_to(root)),
                load=partial(load_flow, generator),
                write=partial(write_checkpoint, generator.checkpoint),
            )
            for stage, generator in tuned_generators.items()
        },
    )


def write_checkpoint(source_path: Path, target_path: Path, tuned_tensors: Mapping[str, torch.Tensor]) -> None:
    """Write a copy of a generator's checkpoint with other weights of the flow.

    Each tensor has the dtype of the source.

    Args:
        source_path: path of the checkpoint to copy.
        target_path: path of the file to write.
        tuned_tensors: tensors of the flow's network by name.
    """
    checkpoint_content = read_content(source_path, "export")
    # Updated in place, so that everything else in the checkpoint is written unchanged.
    tensors = checkpoint_content.get("state_dict", checkpoint_content)
    tensors |= in_types_of(tensors, {FLOW + name: tensor for name, tensor in tuned_tensors.items()})
    rewrite(target_path, checkpoint_content)


def networks(root: Path) -> list[Network]:
    """List the networks with their expected and their stored tensors, for `flow check`.

    They are the flows and embedders of both stages, the decoders and the encoder.
    """
    pipeline_file = read_pipeline(root)
    network_list = []
    # Number of tensors and number of values of the published (flow, embedder), by stage.
    released_sizes = {
        STRUCTURE: ((945, 964_156_437), (914, 634_485_760)),
        LATENT: ((526, 600_432_520), (891, 626_054_144)),
    }
    for stage, generator in pipeline_file.generators.items():
        # One checkpoint at a time is in memory.
        checkpoint_tensors = read(generator.checkpoint, "weights")
        flow_tensors = flow_state(generator, checkpoint_tensors)
        embedder_tensors = embedder_state(generator, checkpoint_tensors)
        flow_network = empty(partial(network_of(generator.config), generator.config))
        embedder_network = embedder_of(generator, embedder_tensors)
        flow_and_embedder = (
            ("flow", flow_network, flow_tensors),
            ("embedder", embedder_network, rename_dino_tensors(embedder_network, embedder_tensors)),
        )
        for (network_kind, network, tensors), released_size in zip(
            flow_and_embedder, released_sizes[stage], strict=True
        ):
            network_list.append(
                Network(
                    name=f"{network_kind} of {stage}",
                    file=generator.checkpoint,
                    expected=shapes(network.state_dict()),
                    tensors=tensors,
                    released=released_size,
                )
            )
    # The published encoder was not available, so its sizes are not stated.
    decoder_counts = {"structure decoder": (74, 73_671_201), "decoder": (101, 85_369_120)}
    for part in AUTOENCODERS:
        try:
            network_class, config, checkpoint = part_of(pipeline_file, part)
        # Only the encoder may be missing; for missing decoders, read_pipeline has raised an error.
        except FileNotFoundError:
            network_list.append(
                Network(
                    name=part,
                    file=pipeline_file.root / f"{ENCODER}.yaml",
                    expected={},
                    tensors={},
                    without=OWN_SHAPES,
                )
            )
            continue
        expected_shapes = shapes(empty(partial(network_class, config)).state_dict())
        missing_ability = OWN_SHAPES if part == "structure encoder" else ""
        network_list.append(
            Network(
                name=part,
                file=checkpoint,
                expected=expected_shapes,
                tensors=read(checkpoint, part),
                without=missing_ability,
                released=decoder_counts.get(part),
            )
        )
    return network_list
