"""SAM 3D Objects' files: pipeline.yaml, and per part a YAML file beside a checkpoint. Nothing is downloaded
or run.

A generator's checkpoint is a larger state dict. Its network and the embedder of its conditioning lie under
prefixes:

    _base_models.generator.reverse_fn.backbone.X      the flow's network
    _base_models.condition_embedder.X                 the embedder; or in the network, under
                                                      condition_embedder.

Other names in it are passed over. What the YAML files say of training is passed over, too, but for times and
weights; other settings that are not known are refused where they are switched on. What pipeline.yaml does not
name has the defaults of the original's code, which overwrite those of the generators' files.
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
# where it lies: in its own folder, in the released one, where the set-up moves it
FOLDERS = ("", "checkpoints", "checkpoints/hf")
STRUCTURE, LATENT = STAGES = ("structure", "latent")
SHORT = {STRUCTURE: "ss", LATENT: "slat"}  # how pipeline.yaml calls the stages
PARTS = {
    STRUCTURE: "ss_generator",
    LATENT: "slat_generator",
    "structure decoder": "ss_decoder",
    "decoder": "slat_decoder_gs",
}
# released beside those; pipeline.yaml does not name it
ENCODER = "ss_encoder"
ENDINGS = (".safetensors", ".ckpt")
REPOSITORY = ("checkpoints", "hf")  # folders of a repository that hold the files
OWN_SHAPES = "pairs of shapes of your own"  # which need the encoder
STRENGTH = {STRUCTURE: 7.0, LATENT: 5.0}  # guidance where pipeline.yaml names none
FLOW = "_base_models.generator.reverse_fn.backbone."
EMBEDDERS = ("_base_models.condition_embedder.", f"{FLOW}condition_embedder.")
PLAIN = "FlowMatching"
GENERATORS = ("ShortCut", PLAIN)  # both have their data at t = 1
GUIDED = ("ClassifierFreeGuidance", "ClassifierFreeGuidanceWithExternalUnconditionalProbability")
# what is done to pictures, masks and maps together
CROP, REMBG = CUTTING = ("crop_around_mask_with_padding", "rembg")
NORMALISERS = ("ObjectCentricSSI", "SSIPointmapNormalizer", "ObjectApparentSizeSSI")
PASSED = {  # settings of networks that concern training, or that others say
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
    """One stage: what its YAML file says."""

    checkpoint: Path
    config: MixtureConfig | VoxelFlowConfig
    embedder: Mapping  # what it says of the embedder
    path: FlowPath
    # of errors, by latent, as the network was trained last; None: it says none
    weights: Mapping[str, float] | None
    single: bool  # the original makes times of sampling in float32
    guided: bool  # guidance has an empty condition


@dataclass(frozen=True, kw_only=True)
class PipelineFile:
    """What pipeline.yaml and the generators' files say."""

    root: Path
    generators: Mapping[str, GeneratorFile]  # by stage
    sampling: Mapping[str, Sampling]  # by stage
    mean: tuple[float, ...]  # of the second stage's latents, per channel
    std: tuple[float, ...]
    prune: int  # voxels on all sides, corners too, that make one inner, which is left out; 0: none is
    cuts: Mapping[str, ObjectCut]  # by stage: how its pictures are cut out
    pose: str  # how the pose is decoded; see pose.py
    files: Mapping[str, Path]  # all that is read, by name

    @property
    def preparation(self) -> str:
        """What is done to pictures, in words that files of conditions state."""
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
    """The folder with pipeline.yaml: the one given, or that of the checkpoints in it."""
    return next((place for place in (root / name for name in FOLDERS) if (place / PIPELINE).is_file()), root)


def recognises(root: Path) -> bool:
    """Whether pipeline.yaml is SAM 3D's."""
    return mentions(folder_of(root) / PIPELINE, PACKAGE)


def read_pipeline(root: Path) -> PipelineFile:
    """Read <root>/pipeline.yaml and the YAML files that it names.

    Raises: FileNotFoundError; ValueError for files that are not SAM 3D's, or of another convention.
    """
    root = folder_of(Path(root))
    path = root / PIPELINE
    if not path.is_file():
        raise FileNotFoundError(
            f"pipeline: expected SAM 3D's {PIPELINE}, got none in {root}. Name the folder of its checkpoints."
        )
    content = read_yaml(path)
    paths = {PIPELINE: path}
    for part in PARTS.values():
        for kind in ("config", "ckpt"):
            name = content.get(f"{part}_{kind}_path")
            file = root / str(name)
            if not name or not file.is_file():
                raise FileNotFoundError(
                    f"{path}: expected {part}_{kind}_path to name a file, got {name!r}. Restore it."
                )
            paths[f"{part}.{kind}"] = file
    encoder = [root / f"{ENCODER}{ending}" for ending in (".yaml", *ENDINGS)]
    if encoder[0].is_file() and (weights := next((file for file in encoder[1:] if file.is_file()), None)):
        paths |= {f"{ENCODER}.config": encoder[0], f"{ENCODER}.ckpt": weights}
    generators = {
        stage: _generator(stage, paths[f"{PARTS[stage]}.config"], paths[f"{PARTS[stage]}.ckpt"])
        for stage in STAGES
    }
    try:
        mean, std = (tuple(map(float, content[f"slat_{name}"])) for name in ("mean", "std"))
        prune = int(content.get("downsample_ss_dist") or 0)
    except (KeyError, TypeError, ValueError):
        mean = ()
        std = ()
        prune = 0
    if not mean or not are_scales(mean, std) or prune < 0:
        raise ValueError(
            f"{path}: expected slat_mean and slat_std per channel, finite and > 0, and downsample_ss_dist >="
            " 0, got others."
        )
    odd = [
        name
        for name in content
        if name.startswith("use_stage") or (name.endswith("_condition_input_mapping") and content[name])
    ]
    if odd:
        got = (
            f"{', '.join(odd)}. The original cannot open it so, or is told otherwise: leave it out; `draw"
            " --few-steps` is for few steps"
        )
        raise ValueError(f"{path}: expected the released settings, got {got}.")
    pose = str(content.get("pose_decoder_name", SHIFTED))
    if pose not in DECODERS:
        raise ValueError(
            f"{path}: expected pose_decoder_name {' or '.join(DECODERS)}, got {pose!r}. Others are not read."
        )
    try:
        cuts = {stage: _cut(content[f"{SHORT[stage]}_preprocessor"], stage) for stage in STAGES}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        said = (
            error
            if isinstance(error, ValueError)
            else f"expected preprocessors of pictures, got none for {error}. Restore them."
        )
        raise ValueError(f"{path}: {said}") from None
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
    """How a preprocessor cuts out.

    Raises: ValueError for one that does anything else; KeyError, TypeError for none.
    """
    maps = stage == STRUCTURE
    steps = content[f"img_mask{'_pointmap' if maps else ''}_joint_transform"]
    joint = {_kind(step): step for step in steps}
    rest = (
        content.get("img_mask_joint_transform") if maps else content.get("img_mask_pointmap_joint_transform")
    )
    sizes = set[int]()
    exact = True
    for kind in ("img", "mask", *(["pointmap"] if maps else [])):
        pad, resize = content[f"{kind}_transform"]["transforms"]
        # of Pillow: 0 nearest, 2 bilinear
        how = resize.get("interpolation") in ((None, 2) if kind == "img" else (0,))
        exact &= how and (_kind(pad), _kind(resize)) == ("pad_to_square_centered", "Resize")
        sizes.add(int(resize["size"]))
    others = set(joint) - {*CUTTING, "resize_all_to_same_size"} or len(steps) > len(joint)
    settings = {
        name: value for name, value in joint.get(CROP, {}).items() if name not in ("_target_", "_partial_")
    }
    if set(settings) != {"box_size_factor", "padding_factor"} or others or rest or not exact:
        got = ", ".join(map(_kind, [*steps, *(rest or ())])) or "nothing"
        raise ValueError(
            f"{SHORT[stage]}_preprocessor: expected a cut about the mask and squares, got {got}. Others are"
            " not read."
        )
    if len(sizes) != 1:
        raise ValueError(
            f"{SHORT[stage]}_preprocessor: expected one size of pictures, masks and maps, got"
            f" {sorted(sizes)}. Correct it."
        )
    normaliser = content.get("pointmap_normalizer") or {}
    named = _kind(normaliser) if normaliser else NORMALISERS[1]
    if named not in NORMALISERS:
        raise ValueError(
            f"{SHORT[stage]}_preprocessor: expected a normaliser {', '.join(NORMALISERS)}, got {named}."
            " Others are not read."
        )
    return ObjectCut(
        size=sizes.pop(),
        rembg=REMBG in joint,
        normaliser=named,
        moments_alone=not content.get("normalize_pointmap", False),
        scene_scale=bool(normaliser.get("use_scene_scale", True)),
        **{name: float(value) for name, value in settings.items()},
    )


def _kind(entry: Mapping) -> str:
    return str(entry["_target_"]).rpartition(".")[2]


def _generator(stage: str, path: Path, checkpoint: Path) -> GeneratorFile:
    """What a generator's file says. Raises: ValueError naming the file."""
    try:
        module = read_yaml(path)["module"]
        flow = module["generator"]["backbone"]
        guided = flow["reverse_fn"]
        network = guided["backbone"]
        kinds = [str(part["_target_"]) for part in (flow, guided, network)]
    except (KeyError, TypeError) as error:
        expected = "module.generator.backbone with reverse_fn.backbone, each with a _target_"
        raise ValueError(f"{path}: expected {expected}, got none for {error}. Name SAM 3D's file.") from None
    for kind, known in zip(kinds, (GENERATORS, GUIDED, None), strict=True):
        if not kind.startswith(PACKAGE) or (known and kind.rpartition(".")[2] not in known):
            expected = f"{' or '.join(known or ('a network',))} of {PACKAGE}"
            raise ValueError(
                f"{path}: expected {expected}, got {kind}. Others are not read: name SAM 3D's file."
            )
    if flow.get("reversed_timestamp"):
        raise ValueError(
            f"{path}: expected data at t = 1, got reversed_timestamp on, which turns the sampler alone."
            " Switch it off."
        )
    drawn = flow.get("training_time_sampler_fn") or {"mean": -1.0, "std": 1.0}
    if "_target_" in drawn and _kind(drawn) != "lognorm_sampler":
        raise ValueError(
            f"{path}: expected times of training by lognorm_sampler, got {_kind(drawn)}. Others are not read."
        )
    try:
        weights = {
            name: float(value)
            for name, value in (flow.get("loss_weights") or {}).items()
            if name != "_target_"
        }
        embedder = (
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
                " Restore them."
            )
        config: Any = (
            _made(MixtureConfig, network, latents=_latents(network), **scale)
            if stage == STRUCTURE
            else _made(VoxelFlowConfig, network, **{k: network[k] for k in SIZES if k in network}, **scale)
        )
        # The normal of the original is of its own time, which runs the other way.
        path_of = FlowPath(sigma_min=float(flow.get("sigma_min", 0.0)), mean=-mean, std=std)
        if weights and stage == STRUCTURE and set(weights) != set(config.latents):
            raise ValueError(
                f"expected loss_weights of {', '.join(config.latents)}, got {', '.join(weights)}. Correct"
                " them."
            )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{path}: {error}" if isinstance(error, ValueError) else f"{path}: expected sizes, got {error!r}."
        ) from None
    zeros = guided.get("unconditional_handling") == "add_flag" and bool(network.get("force_zeros_cond"))
    return GeneratorFile(
        checkpoint=checkpoint,
        config=config,
        embedder=embedder,
        path=path_of,
        weights=weights or None,
        guided=zeros,
        single=kinds[0].endswith(PLAIN),
    )


# of the second network; the first says them of each latent
SIZES = ("resolution", "in_channels", "out_channels", "patch_size", "pe_mode")


def _made(kind: Any, content: Mapping, **more: Any) -> Any:
    """A configuration of settings.

    Raises: ValueError for unknown ones that are switched on, and for missing ones.
    """
    fields = {field.name: field for field in dataclasses.fields(kind)}
    passed = PASSED - set(more)
    unknown = sorted(
        name for name, value in content.items() if name not in fields and name not in PASSED and value
    )
    given = {name: value for name, value in content.items() if name in fields and name not in passed} | more
    nothing = dataclasses.MISSING
    missing = [
        n
        for n, f in fields.items()
        if f.default is nothing and f.default_factory is nothing and n not in given
    ]
    if unknown or missing:
        raise ValueError(
            f"expected the settings of {kind.__name__}, got unknown {unknown[:8]}, missing {missing[:8]}."
            " Name SAM 3D's file."
        )
    return kind(**given)


def _latents(network: Mapping) -> dict[str, LatentConfig]:
    """The first stage's dictionary."""
    latents = {}
    for name, entry in network["latent_mapping"].items():
        places = entry.get("pos_embedder") or {}
        resolution = places.get("resolution")
        if places.get("patch_size", 1) != 1:
            raise ValueError(
                f"latent_mapping.{name}: expected patch_size 1, got {places['patch_size']}. Others are not"
                " read."
            )
        tokens = int(resolution) ** 3 if resolution else int(places.get("token_len", 1))
        latents[name] = LatentConfig(
            in_channels=int(entry["in_channels"]), tokens=tokens, resolution=resolution
        )
    return latents


def _sampling(path: Path, content: Mapping, stage: str, generator: GeneratorFile) -> Sampling:
    """Settings of a stage's sampler: times are there 0 at the noise and scaled, guidance is (1 + w)
    v_cond - w v_null in both.
    """
    short = SHORT[stage]
    scale = generator.config.time_scale
    try:
        low, high = (min(float(t) / scale, 1.0) for t in content.get(f"{short}_cfg_interval", (0, 500)))
        sampling = Sampling(
            steps=int(content.get(f"{short}_inference_steps", 25)),
            rescale_t=float(content.get(f"{short}_rescale_t", 3.0)),
            cfg_strength=float(content.get(f"{short}_cfg_strength", STRENGTH[stage])),
            cfg_interval=(1 - high, 1 - low),
            time_scale=scale,
            single=generator.single,
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}, {short}: {error}") from None
    if sampling.cfg_strength and not generator.guided:
        needs = "force_zeros_cond: true and unconditional_handling: add_flag in the generator's file"
        raise ValueError(
            f"{path}, {short}: expected {needs} with guidance, got others. Set {short}_cfg_strength 0, or"
            " restore them."
        )
    return sampling


def load_flow(
    file: GeneratorFile,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    *,
    state: State | None = None,
) -> nn.Module:
    """A stage's network, strictly by name and shape; dtype as in trellis.files.filled.

    Args: state: all that the checkpoint holds.
    """
    return filled(
        network_of(file.config), file.config, flow_state(file, state), str(file.checkpoint), dtype, device
    )


def network_of(config: MixtureConfig | VoxelFlowConfig) -> Any:
    """The class of a configuration."""
    return MixtureFlow if isinstance(config, MixtureConfig) else VoxelFlow


def flow_state(file: GeneratorFile, state: State | None = None) -> State:
    """The network's tensors in a checkpoint."""
    return {
        name: tensor
        for name, tensor in _under(file, (FLOW,), state).items()
        if not name.startswith("condition_embedder.")
    }


def embedder_state(file: GeneratorFile, state: State | None = None) -> State:
    """The embedder's."""
    return _under(file, EMBEDDERS, state)


def _under(file: GeneratorFile, prefixes: tuple[str, ...], state: State | None) -> State:
    """Tensors under the first prefix that has some, without it."""
    state = read(file.checkpoint, "weights") if state is None else state
    for prefix in prefixes:
        if part := below(state, prefix):
            return part
    got = ", ".join(sorted(state)[:8])
    raise ValueError(
        f"{file.checkpoint}: expected tensors under {' or '.join(prefixes)}, got {got}. Use the released"
        " checkpoint."
    )


def load_embedder(file: GeneratorFile, device: str | torch.device = "cpu") -> Embedder:
    """What turns pictures, masks and point maps into a stage's condition, strictly by name and shape."""
    state = embedder_state(file)
    who = str(file.checkpoint)
    embedder = embedder_of(file, state)
    renamed = of_embedder(embedder, state)
    return frozen(fill(embedder, renamed, who, types=torch.float32, device=device), device)


def of_embedder(embedder: Embedder, state: Mapping[str, torch.Tensor]) -> State:
    """Return the embedder's tensors with those of its DINOv2s under the names of transformers."""
    renamed = dict(state)
    for number, encoder in enumerate(embedder.module_list):
        if isinstance(encoder, Pictures):
            prefix = f"module_list.{number}.backbone."
            part = from_hub(below(state, prefix), encoder.backbone.config)
            renamed = {name: tensor for name, tensor in renamed.items() if not name.startswith(prefix)}
            renamed |= {prefix + name: tensor for name, tensor in part.items()}
    return renamed


def embedder_of(file: GeneratorFile, state: Mapping[str, torch.Tensor]) -> Embedder:
    """An empty one; widths and the DINOv2 are those of its tensors. Raises: ValueError for what is none."""
    who = str(file.checkpoint)
    places = file.embedder.get("use_pos_embedding", "learned")
    if places not in ("learned", "random"):
        raise ValueError(
            f"{who}: expected use_pos_embedding learned or random, got {places!r}. Others are not read."
        )
    try:
        encoders = [_encoder(i, entry, state) for i, entry in enumerate(file.embedder["embedder_list"])]
        nets = [f"projection_nets.{i}" for i in range(len(encoders))]
        hidden = [len(state[f"{net}.1.w1.weight"]) for net in nets]
        normed = bool(file.embedder.get("projection_pre_norm", True))
        with torch.device("meta"):
            return Embedder(
                encoders, hidden, len(state[f"{nets[0]}.1.w2.weight"]), normed, random=places == "random"
            )
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(
            f"{who}: expected the embedder of SAM 3D, got none fit for {error}. Name its files."
        ) from None


def _encoder(
    number: int, entry: Any, state: Mapping[str, torch.Tensor]
) -> tuple[nn.Module, int, list[tuple[str, str | None]]]:
    """One of the embedder's encoders, empty, with its channels and what goes through it."""
    content, inputs = entry
    kind = _kind(content)
    names = [(str(name), None if frame is None else str(frame)) for name, frame in inputs]
    with torch.device("meta"):
        if kind == "Dino":
            size = int(content.get("input_size", 224))
            backbone = below(state, f"module_list.{number}.backbone.")
            config = DinoConfig.of_state(backbone, "embedder", shown=size)
            flags = bool(content.get("prenorm_features", False)), bool(content.get("normalize_images", True))
            return Pictures(config, size, *flags), config.hidden_size, names
        if kind == "PointPatchEmbed":
            known = {field.name for field in dataclasses.fields(PointConfig)}
            points = PointConfig(**{name: value for name, value in content.items() if name in known})
            return PointPatches(points), points.embed_dim, names
    raise ValueError(f"embedder_list: expected Dino or PointPatchEmbed, got {kind!r}. Others are not read.")


AUTOENCODERS: dict[str, tuple[str, Any, Any]] = {
    "structure decoder": (PARTS["structure decoder"], StructureDecoder, StructureVAEConfig),
    "decoder": (PARTS["decoder"], GaussianDecoder, GaussianDecoderConfig),
    "structure encoder": (ENCODER, StructureEncoder, StructureVAEConfig),
}


def load_part(file: PipelineFile, part: str, device: str | torch.device = "cpu") -> nn.Module:
    """A half of an autoencoder, which are TRELLIS's.

    Raises: FileNotFoundError for an encoder that is not there.
    """
    make, config, checkpoint = part_of(file, part)
    return filled(make, config, read(checkpoint, "weights"), str(checkpoint), torch.float32, device)


def part_of(file: PipelineFile, part: str) -> tuple[Any, Any, Path]:
    """Class, configuration and checkpoint."""
    name, make, kind = AUTOENCODERS[part]
    if f"{name}.ckpt" not in file.files:
        got = f"{name}.yaml and {' or '.join(f'{name}{ending}' for ending in ENDINGS)}"
        raise FileNotFoundError(
            f"{part}: expected {got}, got less in {file.root}. Fetch them: they are released beside the"
            " others."
        )
    config_file, checkpoint = (file.files[f"{name}.{which}"] for which in ("config", "ckpt"))
    content = read_yaml(config_file)
    known = {field.name for field in dataclasses.fields(kind)}
    try:
        config = _made(kind, content, **{name: content[name] for name in known & PASSED & set(content)})
        empty(lambda: make(config))  # whose sizes may not fit
    except (TypeError, ValueError) as error:
        raise ValueError(f"{config_file}: {error}") from None
    return make, config, checkpoint


def release(root: Path, stages: Sequence[str]) -> Release:
    """Describe all files of the folder, and the repository's licence."""
    file = read_pipeline(root)
    root = Path(root)
    tuned = {stage: file.generators[stage] for stage in stages}
    changed = {generator.checkpoint.resolve() for generator in tuned.values()}
    there = (path for path in root.rglob("*") if path.is_file() and path.resolve() not in changed)
    kept = {
        str(path.relative_to(root)): path
        for path in there
        if not any(part.startswith(".") for part in path.relative_to(root).parts)
    }
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
    """A generator's checkpoint again, all that it held, with its network replaced, every tensor in its old
    type.
    """
    held = content(source, "export")
    tensors = held.get("state_dict", held)
    tensors |= in_types_of(tensors, {FLOW + name: tensor for name, tensor in state.items()})
    rewrite(target, held)


def networks(root: Path) -> list[Network]:
    """Return both flows with their embedders, and the autoencoders' halves."""
    file = read_pipeline(root)
    made = []
    sizes = {
        STRUCTURE: ((945, 964_156_437), (914, 634_485_760)),
        LATENT: ((526, 600_432_520), (891, 626_054_144)),
    }
    for stage, generator in file.generators.items():
        state = read(generator.checkpoint, "weights")
        flow = flow_state(generator, state)
        embedder = embedder_state(generator, state)
        network = empty(partial(network_of(generator.config), generator.config))
        encoders = embedder_of(generator, embedder)
        both = (("flow", network, flow), ("embedder", encoders, of_embedder(encoders, embedder)))
        for (kind, expected, found), released in zip(both, sizes[stage], strict=True):
            names = shapes(expected.state_dict())
            made.append(
                Network(
                    name=f"{kind} of {stage}",
                    file=generator.checkpoint,
                    expected=names,
                    found=found,
                    released=released,
                )
            )
    counts = {"structure decoder": (74, 73_671_201), "decoder": (101, 85_369_120)}
    for part in AUTOENCODERS:
        try:
            make, config, path = part_of(file, part)
        except FileNotFoundError:
            made.append(
                Network(
                    name=part,
                    file=file.root / f"{ENCODER}.yaml",
                    expected={},
                    found={},
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
                found=read(path, part),
                without=without,
                released=counts.get(part),
            )
        )
    return made
