"""Files of SAM 3D Objects: pipeline.yaml, and for each part a YAML file and a checkpoint.

Nothing is downloaded or run. A generator's checkpoint is a larger state dict. Its network and the embedder of
its conditioning have these prefixes:

    _base_models.generator.reverse_fn.backbone.X      the flow's network
    _base_models.condition_embedder.X                 the embedder; or in the network, under
                                                      condition_embedder.

Other names in it are ignored. Training settings in the YAML files are ignored, too, except for times and loss
weights. Other unknown settings are rejected with an error if they are switched on. What pipeline.yaml does
not name has the defaults of the original's code, which override those of the generators' files.
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
    LatentConfig,
    MixtureConfig,
    MixtureFlow,
    Pictures,
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
    below,
    content,
    empty,
    fill,
    frozen,
    in_types_of,
    read,
    rewrite,
    shapes,
)
from eg3d_rlhf.tuning.flow.base.family import Network, Release, Stored
from eg3d_rlhf.tuning.flow.base.stage import FlowPath, Sampling
from eg3d_rlhf.tuning.flow.families.folder import are_scales, mentions
from eg3d_rlhf.tuning.flow.families.sam3d_pose import DECODERS, SHIFTED
from eg3d_rlhf.tuning.flow.families.trellis_files import filled

PIPELINE = "pipeline.yaml"
PACKAGE = "sam3d_objects"
# Places of pipeline.yaml: in the given folder, in the released repository, and where its set-up moves it.
FOLDERS = ("", "checkpoints", "checkpoints/hf")
STRUCTURE, LATENT = STAGES = ("structure", "latent")
SHORT = {STRUCTURE: "ss", LATENT: "slat"}  # stage -> its prefix in pipeline.yaml
PARTS = {  # network -> its prefix in pipeline.yaml
    STRUCTURE: "ss_generator",
    LATENT: "slat_generator",
    "structure decoder": "ss_decoder",
    "decoder": "slat_decoder_gs",
}
# The encoder is released beside those files, but pipeline.yaml does not name it.
ENCODER = "ss_encoder"
ENDINGS = (".safetensors", ".ckpt")
REPOSITORY = ("checkpoints", "hf")  # folders of a repository that hold the files
OWN_SHAPES = "encoding your own meshes as pairs"  # what needs the encoder, for `flow check`
STRENGTH = {STRUCTURE: 7.0, LATENT: 5.0}  # guidance strength if pipeline.yaml names none
# Prefixes in a checkpoint: of the network, and of the embedder in either place.
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
PASSED = {  # settings that are ignored: they concern training, or are stated elsewhere as well
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
    """Settings of one stage from its YAML file."""

    checkpoint: Path
    config: MixtureConfig | VoxelFlowConfig
    embedder: Mapping  # settings of the embedder, unparsed
    path: FlowPath
    # Loss weights by latent, as in the last training of the network; None: the file has none.
    weights: Mapping[str, float] | None
    single: bool  # the original computes sampling times in float32
    guided: bool  # the network has an empty conditioning for guidance


@dataclass(frozen=True, kw_only=True)
class PipelineFile:
    """Settings of pipeline.yaml and of the generators' files."""

    root: Path
    generators: Mapping[str, GeneratorFile]  # by stage
    sampling: Mapping[str, Sampling]  # by stage
    mean: tuple[float, ...]  # of the second stage's latents, per channel
    std: tuple[float, ...]  # likewise
    prune: int  # voxels on all sides that make a voxel an inner one, which is removed; 0: none is
    cuts: Mapping[str, ObjectCut]  # by stage: how its images are cropped
    pose: str  # how the pose is decoded; see sam3d_pose.py
    files: Mapping[str, Path]  # all files that are read, by name

    @property
    def preparation(self) -> str:
        """Description of the image preprocessing, which files of embeddings state.

        These files are compared by this text, so it must not change.
        """
        # Both stages may crop alike; then one description is enough (dict.fromkeys below).
        parts = [
            f"{cut.size} pixels, box {cut.box_size_factor:g}, border"
            f" {cut.padding_factor:g}{', cut out' if cut.rembg else ''}"
            for cut in self.cuts.values()
        ]
        points = self.cuts[STRUCTURE]
        how = (
            "as they are"
            if points.moments_alone
            else f"by {points.normaliser}{'' if points.scene_scale else ' of the object'}"
        )
        return f"{'; '.join(dict.fromkeys(parts))}, points {how}"


def folder_of(root: Path) -> Path:
    """Return the folder with pipeline.yaml: the given one, or that of the checkpoints in it."""
    return next((place for place in (root / name for name in FOLDERS) if (place / PIPELINE).is_file()), root)


def recognises(root: Path) -> bool:
    """Return whether pipeline.yaml is SAM 3D's."""
    return mentions(folder_of(root) / PIPELINE, PACKAGE)


def read_pipeline(root: Path) -> PipelineFile:
    """Read <root>/pipeline.yaml and the YAML files that it names.

    Raises: FileNotFoundError; ValueError for files that are not SAM 3D's, or that follow another convention.
    """
    root = folder_of(Path(root))
    path = root / PIPELINE
    if not path.is_file():
        raise FileNotFoundError(
            f"pipeline: expected SAM 3D's {PIPELINE}, got none in {root}. Name the folder of the checkpoints."
        )
    # Read as data: no class that the file names is imported.
    content = read_yaml(path)
    paths = {PIPELINE: path}
    for part in PARTS.values():
        # Paths are relative to the folder of pipeline.yaml.
        for kind in ("config", "ckpt"):
            name = content.get(f"{part}_{kind}_path")
            file = root / str(name)
            if not name or not file.is_file():
                raise FileNotFoundError(
                    f"{path}: expected {part}_{kind}_path to name a file, got {name!r}. Restore it."
                )
            paths[f"{part}.{kind}"] = file
    # The encoder is optional: it is needed only to encode meshes.
    encoder = [root / f"{ENCODER}{ending}" for ending in (".yaml", *ENDINGS)]
    if encoder[0].is_file() and (weights := next((file for file in encoder[1:] if file.is_file()), None)):
        paths |= {f"{ENCODER}.config": encoder[0], f"{ENCODER}.ckpt": weights}
    generators = {
        stage: _generator(stage, paths[f"{PARTS[stage]}.config"], paths[f"{PARTS[stage]}.ckpt"])
        for stage in STAGES
    }
    try:
        mean, std = (tuple(map(float, content[f"slat_{name}"])) for name in ("mean", "std"))
        # Missing or null means 0: nothing is removed.
        prune = int(content.get("downsample_ss_dist") or 0)
    except (KeyError, TypeError, ValueError):
        # Reported by the common error below.
        mean = ()
        std = ()
        prune = 0
    if not mean or not are_scales(mean, std) or prune < 0:
        raise ValueError(
            f"{path}: expected slat_mean and slat_std per channel, finite and > 0, and downsample_ss_dist >="
            " 0, got others."
        )
    # The original cannot open a file with `use_stage...`; input mappings would change the conditioning.
    unsupported = [
        name
        for name in content
        if name.startswith("use_stage") or (name.endswith("_condition_input_mapping") and content[name])
    ]
    if unsupported:
        raise ValueError(
            f"{path}: {', '.join(unsupported)} is not supported. Leave it out; to sample in few steps, use"
            " --few-steps."
        )
    # The decoder decides whether the pose is in units of the point map's scale and shift.
    pose = str(content.get("pose_decoder_name", SHIFTED))
    if pose not in DECODERS:
        raise ValueError(
            f"{path}: expected pose_decoder_name {' or '.join(DECODERS)}, got {pose!r}. Others are not"
            " supported: restore the file."
        )
    try:
        cuts = {stage: _cut(content[f"{SHORT[stage]}_preprocessor"], stage) for stage in STAGES}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = (
            error
            if isinstance(error, ValueError)
            else f"expected preprocessors of images, but {error} is missing. Restore the file."
        )
        raise ValueError(f"{path}: {reason}") from None
    return PipelineFile(
        root=root,
        generators=generators,
        sampling={stage: _sampling(path, content, stage, generators[stage]) for stage in STAGES},
        mean=mean,
        std=std,
        prune=prune,
        cuts=cuts,
        pose=pose,
        files=paths,
    )


def _cut(content: Mapping, stage: str) -> ObjectCut:
    """Read how a preprocessor crops images.

    Raises: ValueError for a preprocessor that does anything else; KeyError or TypeError for a missing one.
    """
    maps = stage == STRUCTURE  # only the first stage reads point maps
    steps = content[f"img_mask{'_pointmap' if maps else ''}_joint_transform"]
    # By class name; a transform that occurs twice is detected below by the lengths.
    joint = {_kind(step): step for step in steps}
    # The entry of the other form of input must be empty.
    rest = (
        content.get("img_mask_joint_transform") if maps else content.get("img_mask_pointmap_joint_transform")
    )
    sizes = set[int]()
    exact = True
    for kind in ("img", "mask", *(["pointmap"] if maps else [])):
        # Exactly two transforms: padding to a square, then resizing.
        pad, resize = content[f"{kind}_transform"]["transforms"]
        # Codes of Pillow: 0 is nearest, 2 is bilinear; colours default to bilinear.
        how = resize.get("interpolation") in ((None, 2) if kind == "img" else (0,))
        exact &= how and (_kind(pad), _kind(resize)) == ("pad_to_square_centered", "Resize")
        sizes.add(int(resize["size"]))
    # resize_all_to_same_size resizes the point map to the image, which `object_inputs` always does.
    others = set(joint) - {*CUTTING, "resize_all_to_same_size"} or len(steps) > len(joint)
    settings = {
        name: value for name, value in joint.get(CROP, {}).items() if name not in ("_target_", "_partial_")
    }
    if set(settings) != {"box_size_factor", "padding_factor"} or others or rest or not exact:
        got = ", ".join(map(_kind, [*steps, *(rest or ())])) or "nothing"
        raise ValueError(
            f"{SHORT[stage]}_preprocessor: expected a crop around the mask and padding to squares, got {got}."
            " Other transforms are not supported: restore the file."
        )
    if len(sizes) != 1:
        raise ValueError(
            f"{SHORT[stage]}_preprocessor: expected one size of images, masks and point maps, got"
            f" {sorted(sizes)}. Correct the file."
        )
    normaliser = content.get("pointmap_normalizer") or {}
    # Without an entry the original uses SSIPointmapNormalizer.
    named = _kind(normaliser) if normaliser else NORMALISERS[1]
    if named not in NORMALISERS:
        raise ValueError(
            f"{SHORT[stage]}_preprocessor: expected a normaliser among {', '.join(NORMALISERS)}, got {named}."
            " Others are not supported: restore the file."
        )
    return ObjectCut(
        size=sizes.pop(),
        rembg=REMBG in joint,
        normaliser=named,
        # Without normalize_pointmap the map is unchanged, but scale and shift are still computed
        moments_alone=not content.get("normalize_pointmap", False),
        scene_scale=bool(normaliser.get("use_scene_scale", True)),
        **{name: float(value) for name, value in settings.items()},
    )


def _kind(entry: Mapping) -> str:
    """Return the name of the class that an entry of a YAML file builds."""
    return str(entry["_target_"]).rpartition(".")[2]


def _generator(stage: str, path: Path, checkpoint: Path) -> GeneratorFile:
    """Read a generator's YAML file. Raises: ValueError naming the file."""
    try:
        # Generator -> path and times; reverse_fn -> guidance; backbone -> the network.
        module = read_yaml(path)["module"]
        flow = module["generator"]["backbone"]
        guided = flow["reverse_fn"]
        network = guided["backbone"]
        kinds = [str(part["_target_"]) for part in (flow, guided, network)]
    except (KeyError, TypeError) as error:
        expected = "module.generator.backbone with reverse_fn.backbone, each with a _target_"
        raise ValueError(
            f"{path}: expected {expected}, but {error} is missing. Name the file of SAM 3D Objects."
        ) from None
    for kind, known in zip(kinds, (GENERATORS, GUIDED, None), strict=True):
        # Classes of other packages may use another convention of the time.
        if not kind.startswith(PACKAGE) or (known and kind.rpartition(".")[2] not in known):
            expected = f"{' or '.join(known or ('a network',))} of {PACKAGE}"
            raise ValueError(
                f"{path}: expected {expected}, got {kind}. Others are not supported: name the file of SAM 3D"
                " Objects."
            )
    if flow.get("reversed_timestamp"):
        raise ValueError(
            f"{path}: reversed_timestamp is on, which would reverse only the sampler's times and not the"
            " path's. Switch it off."
        )
    # The defaults of the original's code.
    drawn = flow.get("training_time_sampler_fn") or {"mean": -1.0, "std": 1.0}
    if "_target_" in drawn and _kind(drawn) != "lognorm_sampler":
        raise ValueError(
            f"{path}: expected training times by lognorm_sampler, got {_kind(drawn)}. Others are not"
            " supported: restore the file."
        )
    try:
        # Entries with an underscore belong to the file's own syntax.
        weights = {
            name: float(value)
            for name, value in (flow.get("loss_weights") or {}).items()
            if name != "_target_"
        }
        embedder = (
            # The embedder's settings are beside the network's, or inside them.
            (module.get("condition_embedder") or {}).get("backbone")
            or network.get("condition_embedder")
            or {}
        )
        scale = {"time_scale": float(flow.get("time_scale", 1000.0))}
        mean = float(drawn["mean"])
        std = float(drawn["std"])
        if not (0 < scale["time_scale"] < math.inf and 0 < std < math.inf and math.isfinite(mean)):
            raise ValueError(
                f"expected a time_scale and a std of times above 0, got {scale['time_scale']} and {std}."
                " Restore the file."
            )
        # The second network has one latent, whose sizes are settings of the network itself.
        config: Any = (
            _build_config(MixtureConfig, network, latents=_latents(network), **scale)
            if stage == STRUCTURE
            else _build_config(
                VoxelFlowConfig, network, **{k: network[k] for k in SIZES if k in network}, **scale
            )
        )
        # The original's logit-normal is in its own time, 1 - t of this package, which negates the mean.
        path_of = FlowPath(sigma_min=float(flow.get("sigma_min", 0.0)), mean=-mean, std=std)
        if weights and stage == STRUCTURE and set(weights) != set(config.latents):
            raise ValueError(
                f"expected loss_weights for {', '.join(config.latents)}, got {', '.join(weights)}. Correct"
                " the file."
            )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{path}: {error}"
            if isinstance(error, ValueError)
            else f"{path}: expected the sizes of the network, got {error!r}. Restore the file."
        ) from None
    # Only with both settings are the tokens of the empty conditioning zeros; with the flag alone the original
    # leaves them unchanged and guidance has no effect.
    zeros = guided.get("unconditional_handling") == "add_flag" and bool(network.get("force_zeros_cond"))
    return GeneratorFile(
        checkpoint=checkpoint,
        config=config,
        embedder=embedder,
        path=path_of,
        weights=weights or None,
        guided=zeros,
        single=kinds[0].endswith(FLOW_MATCHING),
    )


# Settings of the second network's latent; the first network states them for each latent.
SIZES = ("resolution", "in_channels", "out_channels", "patch_size", "pe_mode")


def _build_config(kind: Any, content: Mapping, **more: Any) -> Any:
    """Build a configuration from settings.

    Raises: ValueError for unknown settings that are switched on, and for missing ones.
    """
    fields = {field.name: field for field in dataclasses.fields(kind)}
    passed = PASSED - set(more)
    # Unknown settings that are null or false change nothing, so they are accepted.
    unknown = sorted(
        name for name, value in content.items() if name not in fields and name not in PASSED and value
    )
    given = {name: value for name, value in content.items() if name in fields and name not in passed} | more
    # A field without any default must be in the file.
    nothing = dataclasses.MISSING
    missing = [
        n
        for n, f in fields.items()
        if f.default is nothing and f.default_factory is nothing and n not in given
    ]
    if unknown or missing:
        raise ValueError(
            f"expected the settings of {kind.__name__}; unknown are {unknown[:8]}, missing are"
            f" {missing[:8]}. Name the file of SAM 3D Objects."
        )
    return kind(**given)


def _latents(network: Mapping) -> dict[str, LatentConfig]:
    """Read the sizes of the first stage's latents."""
    latents = {}
    for name, entry in network["latent_mapping"].items():
        places = entry.get("pos_embedder") or {}
        resolution = places.get("resolution")
        if places.get("patch_size", 1) != 1:
            raise ValueError(
                f"latent_mapping.{name}: expected patch_size 1, got {places['patch_size']}. Others are not"
                " supported: restore the file."
            )
        # With a grid, one token per point; otherwise a stated number, by default 1.
        tokens = int(resolution) ** 3 if resolution else int(places.get("token_len", 1))
        latents[name] = LatentConfig(
            in_channels=int(entry["in_channels"]), tokens=tokens, resolution=resolution
        )
    return latents


def _sampling(path: Path, content: Mapping, stage: str, generator: GeneratorFile) -> Sampling:
    """Read the settings of a stage's sampler.

    In the file, times are scaled and 0 at the noise. Guidance is (1 + w) v_cond - w v_null in both
    conventions.
    """
    short = SHORT[stage]
    scale = generator.config.time_scale
    try:
        # Interval in scaled time, 0 at the noise; clipped to the end of the path.
        low, high = (min(float(t) / scale, 1.0) for t in content.get(f"{short}_cfg_interval", (0, 500)))
        sampling = Sampling(
            steps=int(content.get(f"{short}_inference_steps", 25)),
            rescale_t=float(content.get(f"{short}_rescale_t", 3.0)),
            cfg_strength=float(content.get(f"{short}_cfg_strength", STRENGTH[stage])),
            # Here time runs the other way, so the ends of the interval are swapped
            cfg_interval=(1 - high, 1 - low),
            time_scale=scale,
            single=generator.single,
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}, {short}: {error}") from None
    # Guidance would otherwise compare the prompt with itself.
    if sampling.cfg_strength and not generator.guided:
        needs = "force_zeros_cond: true and unconditional_handling: add_flag in the generator's file"
        raise ValueError(
            f"{path}, {short}: guidance needs {needs}. Set {short}_cfg_strength to 0, or restore the"
            " generator's file."
        )
    return sampling


def load_flow(
    file: GeneratorFile,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    *,
    state: State | None = None,
) -> nn.Module:
    """Build a stage's network, strictly by name and shape.

    Args:
        dtype: as in trellis_files.filled.
        state: the content of the checkpoint, if it was read already.
    """
    return filled(
        network_of(file.config), file.config, flow_state(file, state), str(file.checkpoint), dtype, device
    )


def network_of(config: MixtureConfig | VoxelFlowConfig) -> Any:
    """Return the class of network for a configuration."""
    return MixtureFlow if isinstance(config, MixtureConfig) else VoxelFlow


def flow_state(file: GeneratorFile, state: State | None = None) -> State:
    """Return the network's tensors in a checkpoint."""
    # The embedder may lie inside the network.
    return {
        name: tensor
        for name, tensor in _under(file, (FLOW,), state).items()
        if not name.startswith("condition_embedder.")
    }


def embedder_state(file: GeneratorFile, state: State | None = None) -> State:
    """Return the embedder's tensors in a checkpoint."""
    return _under(file, EMBEDDERS, state)


def _under(file: GeneratorFile, prefixes: tuple[str, ...], state: State | None) -> State:
    """Return the tensors under the first of several prefixes that occurs, without the prefix."""
    state = read(file.checkpoint, "weights") if state is None else state
    for prefix in prefixes:
        # The first prefix with any tensor wins.
        if part := below(state, prefix):
            return part
    got = ", ".join(sorted(state)[:8])
    raise ValueError(
        f"{file.checkpoint}: expected tensors under {' or '.join(prefixes)}, got {got}. Use the released"
        " checkpoint."
    )


def load_embedder(file: GeneratorFile, device: str | torch.device = "cpu") -> Embedder:
    """Build the embedder of a stage's conditioning, strictly by name and shape, frozen, in float32."""
    state = embedder_state(file)
    who = str(file.checkpoint)
    embedder = embedder_of(file, state)
    # Only DINOv2's names differ between torch hub and transformers.
    renamed = of_embedder(embedder, state)
    return frozen(fill(embedder, renamed, who, types=torch.float32, device=device), device)


def of_embedder(embedder: Embedder, state: Mapping[str, torch.Tensor]) -> State:
    """Rename the tensors of the embedder's DINOv2 networks to transformers' names."""
    renamed = dict(state)
    for number, encoder in enumerate(embedder.module_list):
        if isinstance(encoder, Pictures):
            prefix = f"module_list.{number}.backbone."
            # Positions may also be interpolated to the size of the input images.
            part = from_hub(below(state, prefix), encoder.backbone.config)
            # The old names are removed, because filling is strict.
            renamed = {name: tensor for name, tensor in renamed.items() if not name.startswith(prefix)}
            renamed |= {prefix + name: tensor for name, tensor in part.items()}
    return renamed


def embedder_of(file: GeneratorFile, state: Mapping[str, torch.Tensor]) -> Embedder:
    """Build an embedder without weights; its widths and DINOv2 networks follow from the tensors.

    Raises: ValueError for tensors that are not an embedder's.
    """
    who = str(file.checkpoint)
    places = file.embedder.get("use_pos_embedding", "learned")
    if places not in ("learned", "random"):
        raise ValueError(
            f"{who}: expected use_pos_embedding learned or random, got {places!r}. Others are not supported:"
            " restore the file."
        )
    try:
        encoders = [_encoder(i, entry, state) for i, entry in enumerate(file.embedder["embedder_list"])]
        nets = [f"projection_nets.{i}" for i in range(len(encoders))]
        # The files state these widths only indirectly, so they are read from the tensors.
        hidden = [len(state[f"{net}.1.w1.weight"]) for net in nets]
        normed = bool(file.embedder.get("projection_pre_norm", True))
        with torch.device("meta"):
            return Embedder(
                encoders, hidden, len(state[f"{nets[0]}.1.w2.weight"]), normed, random=places == "random"
            )
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(
            f"{who}: expected the embedder of SAM 3D, but {error} is missing or does not fit. Name the files"
            " of SAM 3D Objects."
        ) from None


def _encoder(
    number: int, entry: Any, state: Mapping[str, torch.Tensor]
) -> tuple[nn.Module, int, list[tuple[str, str | None]]]:
    """Build one encoder of the embedder without weights; returns it with its channels and its inputs."""
    # An entry is a pair: settings of the encoder, and its inputs with their frames.
    content, inputs = entry
    kind = _kind(content)
    names = [(str(name), None if frame is None else str(frame)) for name, frame in inputs]
    with torch.device("meta"):
        if kind == "Dino":
            size = int(content.get("input_size", 224))
            # The sizes follow from the tensors and not from the YAML file.
            backbone = below(state, f"module_list.{number}.backbone.")
            config = DinoConfig.of_state(backbone, "embedder", shown=size)
            flags = bool(content.get("prenorm_features", False)), bool(content.get("normalize_images", True))
            return Pictures(config, size, *flags), config.hidden_size, names
        if kind == "PointPatchEmbed":
            # Training settings of this encoder are ignored.
            known = {field.name for field in dataclasses.fields(PointConfig)}
            points = PointConfig(**{name: value for name, value in content.items() if name in known})
            return PointPatches(points), points.embed_dim, names
    raise ValueError(
        f"embedder_list: expected Dino or PointPatchEmbed, got {kind!r}. Others are not supported: restore"
        " the file."
    )


# Part -> its prefix in pipeline.yaml, its class and the class of its configuration.
AUTOENCODERS: dict[str, tuple[str, Any, Any]] = {
    "structure decoder": (PARTS["structure decoder"], StructureDecoder, StructureVAEConfig),
    "decoder": (PARTS["decoder"], GaussianDecoder, GaussianDecoderConfig),
    "structure encoder": (ENCODER, StructureEncoder, StructureVAEConfig),
}


def load_part(file: PipelineFile, part: str, device: str | torch.device = "cpu") -> nn.Module:
    """Build a half of an autoencoder; these are TRELLIS's networks.

    Raises: FileNotFoundError for an encoder that is not on this machine.
    """
    make, config, checkpoint = part_of(file, part)
    return filled(make, config, read(checkpoint, "weights"), str(checkpoint), torch.float32, device)


def part_of(file: PipelineFile, part: str) -> tuple[Any, Any, Path]:
    """Return class, configuration and checkpoint of a half of an autoencoder."""
    name, make, kind = AUTOENCODERS[part]
    if f"{name}.ckpt" not in file.files:
        got = f"{name}.yaml and {' or '.join(f'{name}{ending}' for ending in ENDINGS)}"
        raise FileNotFoundError(
            f"{part}: expected {got} in {file.root}, but at least one is missing. Download them: they are"
            " released beside the others."
        )
    config_file, checkpoint = (file.files[f"{name}.{which}"] for which in ("config", "ckpt"))
    content = read_yaml(config_file)
    known = {field.name for field in dataclasses.fields(kind)}
    try:
        # Settings in PASSED are ignored in generators, but these networks need some of them.
        config = _build_config(
            kind, content, **{name: content[name] for name in known & PASSED & set(content)}
        )
        # Building reports sizes that do not fit, with the file's name.
        empty(lambda: make(config))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{config_file}: {error}") from None
    return make, config, checkpoint


def release(root: Path, stages: Sequence[str]) -> Release:
    """Describe the folder to export: all its files, and the repository's licence."""
    file = read_pipeline(root)
    root = Path(root)
    tuned = {stage: file.generators[stage] for stage in stages}
    # Files of tuned networks are written anew; all others stay.
    changed = {generator.checkpoint.resolve() for generator in tuned.values()}
    there = (path for path in root.rglob("*") if path.is_file() and path.resolve() not in changed)
    # Hidden files, such as those of git or of downloads, are not exported.
    kept = {
        str(path.relative_to(root)): path
        for path in there
        if not any(part.startswith(".") for part in path.relative_to(root).parts)
    }
    # The licence lies at the top of the repository, above its folder of checkpoints.
    above = root.resolve().parents[:2] if root.resolve().name in REPOSITORY else ()
    papers = {path.name: path for place in above for path in sorted(place.glob("LICENSE*")) if path.is_file()}
    return Release(
        files={**papers, **kept},
        networks={
            stage: Stored(
                file=str(generator.checkpoint.relative_to(root)),
                load=partial(load_flow, generator),
                write=partial(write_checkpoint, generator.checkpoint),
            )
            for stage, generator in tuned.items()
        },
    )


def write_checkpoint(source: Path, target: Path, state: Mapping[str, torch.Tensor]) -> None:
    """Write a copy of a generator's checkpoint in which its network is replaced; every tensor keeps its
    dtype.
    """
    held = content(source, "export")
    # Updated in place, so that everything else in the checkpoint is written unchanged.
    tensors = held.get("state_dict", held)
    tensors |= in_types_of(tensors, {FLOW + name: tensor for name, tensor in state.items()})
    rewrite(target, held)


def networks(root: Path) -> list[Network]:
    """List both flows, their embedders and the autoencoders' halves with expected and present tensors."""
    file = read_pipeline(root)
    made = []
    # Tensors and numbers of the published networks: (flow, embedder) by stage.
    sizes = {
        STRUCTURE: ((945, 964_156_437), (914, 634_485_760)),
        LATENT: ((526, 600_432_520), (891, 626_054_144)),
    }
    for stage, generator in file.generators.items():
        # One checkpoint at a time is in memory.
        state = read(generator.checkpoint, "weights")
        flow = flow_state(generator, state)
        embedder = embedder_state(generator, state)
        network = empty(partial(network_of(generator.config), generator.config))
        encoders = embedder_of(generator, embedder)
        both = (("flow", network, flow), ("embedder", encoders, of_embedder(encoders, embedder)))
        for (kind, expected, present), released in zip(both, sizes[stage], strict=True):
            names = shapes(expected.state_dict())
            made.append(
                Network(
                    name=f"{kind} of {stage}",
                    file=generator.checkpoint,
                    expected=names,
                    tensors=present,
                    released=released,
                )
            )
    # Published encoders were not available, so their sizes are not stated.
    counts = {"structure decoder": (74, 73_671_201), "decoder": (101, 85_369_120)}
    for part in AUTOENCODERS:
        try:
            make, config, path = part_of(file, part)
        # Only the encoder may be missing; the others raise in read_pipeline.
        except FileNotFoundError:
            made.append(
                Network(
                    name=part,
                    file=file.root / f"{ENCODER}.yaml",
                    expected={},
                    tensors={},
                    without=OWN_SHAPES,
                )
            )
            continue
        names = shapes(empty(partial(make, config)).state_dict())
        without = OWN_SHAPES if part == "structure encoder" else ""
        made.append(
            Network(
                name=part,
                file=path,
                expected=names,
                tensors=read(path, part),
                without=without,
                released=counts.get(part),
            )
        )
    return made
