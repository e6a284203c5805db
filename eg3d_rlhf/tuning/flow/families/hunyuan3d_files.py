"""Readers and writers of the files of Hunyuan3D-2.1: config.yaml and one checkpoint.

The checkpoint has the sections `model` (the flow), `vae` (the autoencoder) and `conditioner` (the image
encoder). Nothing is downloaded, and no code of the files is run.

Shapes: L number of conditioning tokens of an image, E channels of a token.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from eg3d_rlhf.core.plain_yaml import read_yaml
from eg3d_rlhf.models.dino import Dino, DinoConfig, load_dino
from eg3d_rlhf.models.hunyuan3d import (
    AutoencoderConfig,
    Denoiser,
    DenoiserConfig,
    ShapeDecoder,
    ShapeEncoder,
)
from eg3d_rlhf.models.weights import (
    empty,
    entries_below,
    fill,
    fingerprint,
    freeze,
    in_types_of,
    read_content,
    rewrite,
    shapes,
)
from eg3d_rlhf.tuning.flow.base.family import Network, Release, Stored
from eg3d_rlhf.tuning.flow.families.folder import mentions
from training.storage import check_fit

CONFIG = "config.yaml"
# File names of the checkpoint, in the order in which they are tried.
CHECKPOINTS = ("model.fp16.ckpt", "model.fp16.safetensors", "model.ckpt", "model.safetensors")
# Folders of the released repository: all networks of the shape, and the autoencoder alone.
FOLDER = "hunyuan3d-dit-v2-1"
VAE_FOLDER = "hunyuan3d-vae-v2-1"
# Sections of config.yaml and of the checkpoint.
MODEL = "model"
VAE = "vae"
CONDITIONER = "conditioner"
ENCODER = "main_image_encoder.model."  # prefix of DINOv2's names in the section conditioner
ENCODER_HALF = ("encoder.", "pre_kl.")  # prefixes of the encoder's names in the section vae
# Section of config.yaml -> class that it must name.
TARGETS = {MODEL: "HunYuanDiTPlain", VAE: "ShapeVAE", CONDITIONER: "SingleImageEncoder"}
# Sections of config.yaml that may be missing: section -> class and names of its params.
SETTINGS: dict[str, tuple[str, tuple[str, ...]]] = {
    "scheduler": (
        "FlowMatchEulerDiscreteScheduler",
        ("num_train_timesteps", "shift", "use_dynamic_shifting"),
    ),
    "image_processor": ("ImageProcessorV2", ("size", "border_ratio")),
    "pipeline": ("Hunyuan3DDiTFlowMatchingPipeline", ()),
}
# Defaults of ImageProcessorV2: pixels per side, and the share of a side that stays empty around the object.
IMAGE_SIZE = 512
BORDER = 0.15
ENCODER_SIZE = 224  # pixels per side; default of DinoImageEncoder and of a Dinov2Config
# Patterns of files that the licence requires in every folder with changed weights.
LICENCES = ("LICENSE*", "License*", "NOTICE*", "Notice*")
NOTICE_FILE = """The file {file} was changed from the released Hunyuan3D-2.1: the weights of the flow of \
shapes were tuned on preferences.

The file is under the licence of the released repository. Pass on {papers} together with this folder.
"""
Sections = Mapping[str, Mapping[str, torch.Tensor]]  # section -> tensors by name


@dataclass(frozen=True, kw_only=True)
class ShapeFiles:
    """Settings of Hunyuan3D-2.1's config.yaml, and the paths of its files."""

    root: Path  # folder of config.yaml
    checkpoint: Path
    model: DenoiserConfig
    vae: AutoencoderConfig
    encoder: DinoConfig
    class_token: bool = True  # whether DINOv2's class token is one of the conditioning tokens
    shift: float = 1.0  # shift of the sampler's times; see `hunyuan3d.sampling`
    image_size: int = IMAGE_SIZE  # pixels per side of a prepared image
    border: float = BORDER  # share of a side that stays empty around the object

    @property
    def tokens(self) -> list[int]:
        """Shape [L, E] of the conditioning tokens of one image."""
        return [self.encoder.tokens - (0 if self.class_token else 1), self.encoder.hidden_size]

    @property
    def preparation(self) -> str:
        """Text that describes the image preprocessing.

        Files of embeddings contain this text and are compared by it, so it must not change.
        """
        return f"pictures of {self.image_size} pixels with a border of {self.border:g}, resized as by OpenCV"


def folder_of(root: Path) -> Path:
    """Return the folder that contains config.yaml: `root`, or its subfolder in the released repository.

    If neither contains config.yaml, `root` is returned.
    """
    if not (root / CONFIG).is_file() and (root / FOLDER / CONFIG).is_file():
        return root / FOLDER
    return root


def recognises(root: Path) -> bool:
    """Return True if config.yaml exists and names the network of Hunyuan3D.

    Other versions of Hunyuan3D are recognised, too. `read_files` then raises an error that names the version.
    """
    return any(mentions(folder_of(root) / CONFIG, name) for name in (TARGETS[MODEL], "Hunyuan3DDiT"))


def read_files(root: Path) -> ShapeFiles:
    """Read config.yaml and find the checkpoint.

    Raises: FileNotFoundError if one of the two is missing; ValueError for a config of another model, or with
        settings that are not supported.
    """
    folder = folder_of(Path(root))
    path = folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"Hunyuan3D: the file {path} is missing. Download it again.")
    # The first name that exists, in the order of CHECKPOINTS: half precision is preferred.
    checkpoint = next((folder / name for name in CHECKPOINTS if (folder / name).is_file()), None)
    if checkpoint is None:
        # Other programs distribute the same checkpoint under other names, such as
        # hunyuan_3d_v2.1.safetensors, which differ from the released names only.
        other_names = sorted(
            path.name for ending in (".ckpt", ".safetensors") for path in folder.glob(f"*{ending}")
        )
        remedy = (
            f"If {other_names[0]} is the complete checkpoint, rename it to"
            f" model{Path(other_names[0]).suffix}; otherwise download the checkpoint again."
            if other_names
            else "Download the checkpoint again."
        )
        raise FileNotFoundError(f"Hunyuan3D: {folder} has no checkpoint {' or '.join(CHECKPOINTS)}. {remedy}")
    # The file is read as data: no class that it names is imported.
    yaml_config = read_yaml(path)
    try:
        # Every section must name the class of Hunyuan3D-2.1, because other classes compute something else.
        params_by_section = {
            section: _params(yaml_config, section, target) for section, target in TARGETS.items()
        }
        settings_by_section = {section: _settings(yaml_config, section) for section in SETTINGS}
        encoder, class_token = _image_encoder_config(params_by_section[CONDITIONER])
        image_processor = settings_by_section["image_processor"]
        border = image_processor.get("border_ratio")  # null means the default
        shape_files = ShapeFiles(
            root=folder,
            checkpoint=checkpoint,
            model=_build_config(DenoiserConfig, params_by_section[MODEL], ignore_unknown=True),
            vae=_build_config(AutoencoderConfig, params_by_section[VAE]),
            encoder=encoder,
            class_token=class_token,
            shift=float(settings_by_section["scheduler"].get("shift", 1.0)),
            image_size=int(image_processor.get("size", IMAGE_SIZE)),
            border=BORDER if border is None else float(border),
        )
        if not (shape_files.shift > 0 and shape_files.image_size > 0 and 0 <= shape_files.border < 1):
            raise ValueError(
                "shift and size must be above 0, and border_ratio must be in [0, 1), got shift"
                f" {shape_files.shift}, size {shape_files.image_size} and border_ratio {shape_files.border}."
                " Download the file again."
            )
    except (TypeError, ValueError) as error:
        # The inner errors name the setting; the name of the file is added here.
        raise ValueError(f"{path}: {error}") from None
    # The three networks must fit each other: number and channels of latent vectors, channels of the
    # conditioning.
    flow_sizes = (shape_files.model.input_size, shape_files.model.in_channels, shape_files.model.context_dim)
    other_sizes = (shape_files.vae.num_latents, shape_files.vae.embed_dim, shape_files.tokens[1])
    if other_sizes != flow_sizes:
        raise ValueError(
            f"{path}: the section model states (latent vectors, channels, conditioning channels) ="
            f" {flow_sizes}, but vae and conditioner state {other_sizes}. Download the file again."
        )
    return shape_files


def _params(yaml_config: Mapping, section: str, target: str) -> dict:
    """Return the params of a required section of config.yaml.

    Args:
        yaml_config: content of config.yaml.
        section: name of the section.
        target: name of the class that the section must name.
    Raises: ValueError for another class, or if there are no params.
    """
    section_content = yaml_config.get(section)
    # A section that is no mapping is reported like a missing section.
    section_content = section_content if isinstance(section_content, Mapping) else {}
    # Only the class is compared, without the path of its module, as in "hy3dshape.models.HunYuanDiTPlain".
    class_name = str(section_content.get("target", "")).rpartition(".")[2]
    if class_name != target:
        raise ValueError(
            f"the section {section} must have the target {target}, got {class_name or 'no target'}. Pass the"
            " folder of Hunyuan3D-2.1."
        )
    if not isinstance(section_content.get("params"), Mapping):
        raise ValueError(f"the section {section} has no params. Download the file again.")
    return dict(section_content["params"])


def _settings(yaml_config: Mapping, section: str) -> dict:
    """Return the params of an optional section of config.yaml. A missing section gives an empty dictionary.

    Args:
        yaml_config: content of config.yaml.
        section: name of the section, a key of SETTINGS.
    Raises: ValueError for another class or for unknown params, which would sample or crop in another way.
    """
    target, known_params = SETTINGS[section]
    # Without the section the original uses its defaults.
    if section not in yaml_config:
        return {}
    section_content = yaml_config[section] if isinstance(yaml_config[section], Mapping) else {}
    class_name = str(section_content.get("target", "")).rpartition(".")[2]
    params = section_content.get("params") or {}
    # For example, the consistency scheduler of distilled models uses other times.
    if class_name != target:
        raise ValueError(
            f"the section {section} must have the target {target}, got {class_name or 'no target'}. Pass the"
            " folder of Hunyuan3D-2.1."
        )
    if not isinstance(params, Mapping):
        raise ValueError(
            f"the params of the section {section} must be a mapping, got {params!r}. Download the file again."
        )
    # A section without known params, such as `pipeline`, may have any params.
    unknown_params = sorted(set(params) - set(known_params)) if known_params else []
    if unknown_params:
        raise ValueError(
            f"the section {section} has the unknown params {', '.join(unknown_params)}, which may change the"
            f" result. Remove them. Only {', '.join(known_params)} are supported."
        )
    if params.get("use_dynamic_shifting"):
        raise ValueError(
            f"the section {section} has use_dynamic_shifting, which the original's pipeline cannot sample."
            " Set it to false."
        )
    return dict(params)


def _image_encoder_config(params: Mapping) -> tuple[DinoConfig, bool]:
    """Return the configuration of the image encoder.

    Args: params: params of the section conditioner.
    Returns: configuration, and whether the class token is one of the conditioning tokens.
    Raises: ValueError for an encoder other than a single DINOv2.
    """
    encoder_settings = params.get("main_image_encoder")
    encoder_settings = encoder_settings if isinstance(encoder_settings, Mapping) else {}
    encoder_type = encoder_settings.get("type")
    kwargs = encoder_settings.get("kwargs")
    kwargs = kwargs if isinstance(kwargs, Mapping) else {}
    if (
        encoder_type != "DinoImageEncoder"
        # drop_ratio is the dropout of the conditioning in training; it has no effect on sampling.
        or set(params) - {"main_image_encoder", "drop_ratio"}
        or not isinstance(kwargs.get("config"), Mapping)
    ):
        raise ValueError(
            f"the conditioner must be a single DinoImageEncoder with a config, got {encoder_type!r} with the"
            f" params {sorted(params)}. Pass the folder of Hunyuan3D-2.1."
        )
    # The inner value is the resolution at which DINOv2 was trained, the outer one that of the input images.
    dino_settings = {
        "image_size": ENCODER_SIZE,
        **kwargs["config"],
        "shown": kwargs.get("image_size", ENCODER_SIZE),
    }
    return DinoConfig.from_settings(dino_settings), bool(kwargs.get("use_cls_token", True))


def _build_config(config_class: Any, params: Mapping, ignore_unknown: bool = False) -> Any:
    """Build a configuration from params of config.yaml.

    Args:
        config_class: dataclass of the configuration.
        params: values of its fields by name.
        ignore_unknown: if True, unknown params are ignored, as in the original's class. If False, they are an
            error.
    Raises: ValueError for unknown params.
    """
    field_names = {field.name for field in fields(config_class)}
    unknown_params = sorted(set(params) - field_names)
    # With an unknown setting, the weights in the file may belong to another network.
    if unknown_params and not ignore_unknown:
        raise ValueError(
            f"the section {VAE} has params that {TARGETS[VAE]} does not have:"
            f" {', '.join(unknown_params[:8])}. Pass the folder of Hunyuan3D-2.1."
        )
    return config_class(**{name: value for name, value in params.items() if name in field_names})


def read_sections(
    path: Path, required_sections: Sequence[str] = (MODEL, VAE)
) -> dict[str, dict[str, torch.Tensor]]:
    """Read the sections of a checkpoint.

    A .ckpt file has one dictionary per section. A .safetensors file has names such as "model.x" for the
    tensor x of the section model.

    Args:
        path: path of the checkpoint.
        required_sections: names of sections that must not be missing or empty.
    Returns: tensors by section and name.
    Raises: ValueError for a damaged file, a file of another kind, a file that would run code when it is read,
        or a missing section.
    """
    sections = read_content(path, "checkpoint")
    if path.suffix == ".safetensors":
        # The section is the part of a name before the first dot. dict.fromkeys keeps the order of the file.
        section_names = dict.fromkeys(name.partition(".")[0] for name in sections)
        sections = {section: entries_below(sections, f"{section}.") for section in section_names}
    # An empty section counts as missing, and a file that is no dictionary has no section.
    missing_sections = [
        section
        for section in required_sections
        if not (isinstance(sections, dict) and isinstance(sections.get(section), dict) and sections[section])
    ]
    if missing_sections:
        raise ValueError(
            f"{path}: the checkpoint must have the sections {', '.join(required_sections)}, but"
            f" {', '.join(missing_sections)} is missing. Download the released checkpoint again."
        )
    # Only the sections that are read are checked; a file may have more.
    non_tensors = []
    for section in TARGETS:
        for name, section_entry in sections.get(section, {}).items():
            if not isinstance(section_entry, torch.Tensor):
                non_tensors.append(f"{section}.{name}")
    if non_tensors:
        raise ValueError(
            f"{path}: the values {', '.join(non_tensors[:8])} are no tensors. Download the released"
            " checkpoint again."
        )
    return sections


def denoiser(
    shape_files: ShapeFiles,
    sections: Sections,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
) -> Denoiser:
    """Build the network of the flow from the section model. Names and shapes must match exactly.

    Args:
        shape_files: settings of config.yaml.
        sections: tensors of the checkpoint.
        dtype: dtype of the weights; None keeps the dtypes of the file.
        device: device of the network.
    """
    return _load_network(
        Denoiser, shape_files.model, sections[MODEL], f"{shape_files.checkpoint}, {MODEL}", dtype, device
    )


def decoder(shape_files: ShapeFiles, sections: Sections, device: str | torch.device = "cpu") -> ShapeDecoder:
    """Build the decoder of the autoencoder in float32, also if the checkpoint is in half precision.

    Other tensors of the section vae are ignored, as in the original.

    Args:
        shape_files: settings of config.yaml.
        sections: tensors of the checkpoint.
        device: device of the network.
    """
    return _load_network(
        ShapeDecoder,
        shape_files.vae,
        decoding_half(shape_files, sections),
        f"{shape_files.checkpoint}, {VAE}",
        torch.float32,
        device,
    )


def decoding_half(shape_files: ShapeFiles, sections: Sections) -> Mapping[str, torch.Tensor]:
    """Return the tensors of the decoder.

    Raises: ValueError for missing tensors or tensors of another shape.
    """
    # Built on the meta device, only for the names and shapes of its tensors.
    expected_tensors = empty(lambda: ShapeDecoder(shape_files.vae)).state_dict()
    tensors = {name: tensor for name, tensor in sections[VAE].items() if not name.startswith(ENCODER_HALF)}
    if expected_tensors.keys() <= tensors.keys():
        # Tensors that the decoder does not have are ignored. A missing tensor is reported by the check below.
        tensors = {name: tensors[name] for name in expected_tensors}
    check_fit(expected_tensors, tensors, f"{shape_files.checkpoint}, {VAE}")
    return tensors


def encoder(shape_files: ShapeFiles, sections: Sections, device: str | torch.device = "cpu") -> ShapeEncoder:
    """Build the encoder of the autoencoder in float32.

    It is read from the checkpoint, or from the separate folder of the autoencoder beside it.

    Args:
        shape_files: settings of config.yaml.
        sections: tensors of the checkpoint.
        device: device of the network.
    Raises: FileNotFoundError if neither has the encoder.
    """
    path, tensors = _encoding(shape_files, sections[VAE])
    if not tensors:
        # The released repository has the two folders side by side.
        vae_folder = shape_files.root.parent / VAE_FOLDER
        raise FileNotFoundError(
            f"The encoder of the autoencoder is neither in {path} nor in {vae_folder}. Download the folder"
            f" {VAE_FOLDER} of the released repository to {vae_folder}."
        )
    return _load_network(ShapeEncoder, shape_files.vae, tensors, f"{path}, {VAE}", torch.float32, device)


def _encoding(
    shape_files: ShapeFiles, vae_tensors: Mapping[str, torch.Tensor]
) -> tuple[Path, Mapping[str, torch.Tensor]]:
    """Return the file and the tensors of the autoencoder's encoder.

    The checkpoint is preferred to the separate folder of the autoencoder. If neither has the encoder, the
    checkpoint and no tensors are returned.

    Args:
        shape_files: settings of config.yaml and the paths of the files.
        vae_tensors: tensors of the section vae of the checkpoint.
    """
    vae_folder = shape_files.root.parent / VAE_FOLDER
    vae_files = [vae_folder / name for name in CHECKPOINTS if (vae_folder / name).is_file()]
    is_in_checkpoint = any(name.startswith(ENCODER_HALF) for name in vae_tensors)
    if is_in_checkpoint or not vae_files:
        path = shape_files.checkpoint
        autoencoder_tensors = vae_tensors
    else:
        # The file in the separate folder has no sections, only the tensors of the autoencoder.
        path = vae_files[0]
        autoencoder_tensors = read_content(path, "checkpoint")
    return path, {
        name: tensor for name, tensor in autoencoder_tensors.items() if name.startswith(ENCODER_HALF)
    }


def image_encoder(shape_files: ShapeFiles, sections: Sections, device: str | torch.device = "cpu") -> Dino:
    """Build the image encoder in float32. Names and shapes must match exactly.

    Args:
        shape_files: settings of config.yaml.
        sections: tensors of the checkpoint.
        device: device of the network.
    Raises: ValueError for tensors that do not belong to the image encoder.
    """
    # Without this check, weights of a second encoder would be ignored without an error.
    unknown_names = [name for name in sections[CONDITIONER] if not name.startswith(ENCODER)]
    if unknown_names:
        raise ValueError(
            f"{shape_files.checkpoint}, {CONDITIONER}: all names must begin with {ENCODER}, got"
            f" {', '.join(unknown_names[:8])}. Download the released checkpoint again."
        )
    return load_dino(
        shape_files.encoder,
        entries_below(sections[CONDITIONER], ENCODER),
        f"{shape_files.checkpoint}, {CONDITIONER}",
        device,
    )


def _load_network(
    network_class: Any,
    config: Any,
    tensors: Mapping[str, torch.Tensor],
    message_prefix: str,
    dtype: torch.dtype | None,
    device: str | torch.device,
) -> Any:
    """Build a frozen network from its tensors. Names and shapes must match exactly.

    The network is first built on the meta device, so that its memory is allocated only once.

    Args:
        network_class: class of the network.
        config: configuration of the network, the only argument of the class.
        tensors: tensors by name.
        message_prefix: beginning of error messages.
        dtype: dtype of the weights; None keeps the dtypes of the file.
        device: device of the network.
    """
    network = fill(
        empty(lambda: network_class(config)), tensors, message_prefix, requested_dtypes=dtype, device=device
    )
    return freeze(network, device)


def write_checkpoint(source_path: Path, target_path: Path, tuned_tensors: Mapping[str, torch.Tensor]) -> None:
    """Write a copy of a checkpoint with other weights of the flow. Each tensor has the dtype of the source.

    Args:
        source_path: path of the checkpoint to copy.
        target_path: path of the file to write.
        tuned_tensors: tensors of the flow by name.
    """
    # All sections are read, because all are written to the copy.
    sections = read_sections(source_path, (MODEL,))
    new_sections: dict = {**sections, MODEL: in_types_of(sections[MODEL], tuned_tensors)}
    if target_path.suffix == ".safetensors":
        # This format cannot store nested dictionaries, so sections become prefixes of the names.
        flat_tensors = {}
        for section, tensors in new_sections.items():
            flat_tensors.update({f"{section}.{name}": tensor for name, tensor in tensors.items()})
        new_sections = flat_tensors
    rewrite(target_path, new_sections)


def source_of(shape_files: ShapeFiles, sections: Sections) -> str:
    """Return a text that names the image encoder and the preprocessing of images.

    Files of embeddings contain this text and are compared by it. If the checkpoint lacks the encoder's
    weights, "*" stands for the encoder.
    """
    # "*" matches any encoder; see `check_source` in base/conditioning.py.
    encoder_tensors = sections.get(CONDITIONER)
    return (
        f"DINOv2 {fingerprint(encoder_tensors)}, {shape_files.preparation}"
        if encoder_tensors
        else f"*, {shape_files.preparation}"
    )


def release(root: Path, stages: Sequence[str]) -> Release:
    """Describe the folder to export.

    It has the folder of the shape with the tuned checkpoint, the folder of the autoencoder, the licence, and
    a notice of the change. The original's loader opens it without further arguments if the checkpoint has the
    released name, model.fp16.ckpt.

    Args:
        root: folder of the generator.
        stages: names of the tuned stages.
    """
    shape_files = read_files(root)
    sections = read_sections(shape_files.checkpoint, (MODEL,))
    exported_checkpoint = f"{FOLDER}/{shape_files.checkpoint.name}"
    # If config.yaml is not in the released subfolder, its folder is treated as the repository.
    repository = shape_files.root.parent if shape_files.root.name == FOLDER else shape_files.root
    # Licence and notice files of both folders, by file name.
    licence_files = {}
    for folder in (shape_files.root, repository):
        for pattern in LICENCES:
            for path in sorted(folder.glob(pattern)):
                # The licence requires a notice of every changed file. An earlier "Notice" is replaced below.
                if path.is_file() and path.name != "Notice":
                    licence_files[path.name] = path
    notice = NOTICE_FILE.format(
        file=exported_checkpoint, papers=", ".join(licence_files) or "LICENSE"
    ).encode()
    vae_files = {
        f"{VAE_FOLDER}/{path.name}": path for path in (repository / VAE_FOLDER).glob("*") if path.is_file()
    }
    # The network is read and written only when the export runs.
    stored_network = Stored(
        file=exported_checkpoint,
        load=partial(denoiser, shape_files, sections),
        write=partial(write_checkpoint, shape_files.checkpoint),
    )
    config_files = {f"{FOLDER}/{CONFIG}": shape_files.root / CONFIG}
    return Release(
        files={**licence_files, **vae_files, **config_files, "Notice": notice},
        networks=dict.fromkeys(stages, stored_network),
    )


def networks(root: Path) -> list[Network]:
    """List the four networks with their expected and their stored tensors, for `flow check`.

    They are the flow, the decoder and the encoder of the autoencoder, and the image encoder.
    """
    shape_files = read_files(root)
    # No section is required here, so that missing networks are listed and raise no error.
    sections = read_sections(shape_files.checkpoint, ())
    vae_tensors = sections.get(VAE, {})
    encoder_file, vae_encoder_tensors = _encoding(shape_files, vae_tensors)
    # The section vae has the tensors of decoder and encoder.
    decoder_shapes = _shapes(lambda: ShapeDecoder(shape_files.vae))
    decoder_tensors = {
        name: tensor for name, tensor in vae_tensors.items() if not name.startswith(ENCODER_HALF)
    }
    if decoder_shapes.keys() <= decoder_tensors.keys():
        # Tensors that the decoder does not have are ignored, as in `decoding_half`.
        decoder_tensors = {name: decoder_tensors[name] for name in decoder_shapes}
    image_encoder_tensors = entries_below(sections.get(CONDITIONER, {}), ENCODER)
    return [
        Network(
            name="flow of shapes",
            file=shape_files.checkpoint,
            expected=_shapes(lambda: Denoiser(shape_files.model)),
            tensors=sections.get(MODEL, {}),
            released=(752, 3_050_758_720),
        ),
        Network(
            name="autoencoder, latents to shapes",
            file=shape_files.checkpoint,
            expected=decoder_shapes,
            tensors=decoder_tensors,
            released=(266, 214_212_865),
        ),
        Network(
            name="autoencoder, shapes to latents",
            file=encoder_file,
            expected=_shapes(lambda: ShapeEncoder(shape_files.vae)),
            tensors=vae_encoder_tensors,
            without="encoding your own meshes as pairs",
            released=(144, 113_533_312),
        ),
        Network(
            name="DINOv2",
            file=shape_files.checkpoint,
            expected=_shapes(lambda: Dino(shape_files.encoder)),
            tensors=image_encoder_tensors,
            without="embedding of images",
            embeds=True,
            released=(439, 304_368_640),
        ),
    ]


def _shapes(make_network: Callable[[], nn.Module]) -> dict[str, list[int]]:
    """Return the shapes of a network's tensors by name. The network is built on the meta device."""
    return shapes(empty(make_network).state_dict())
