"""Files of Hunyuan3D-2.1: config.yaml and one checkpoint, in a folder of the released repository.

The checkpoint has the sections model (the flow), vae (the autoencoder) and conditioner (the image encoder).
Nothing is downloaded or run.

Shape letters as in models/hunyuan3d.py.
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
    below,
    content,
    empty,
    fill,
    fingerprint,
    frozen,
    in_types_of,
    rewrite,
    shapes,
)
from eg3d_rlhf.tuning.flow.base.family import Network, Release, Stored
from eg3d_rlhf.tuning.flow.families.folder import mentions
from training.storage import check_fit

CONFIG = "config.yaml"
# Names of the checkpoint, in the order in which they are tried.
CHECKPOINTS = tuple(f"model{half}{ending}" for half in (".fp16", "") for ending in (".ckpt", ".safetensors"))
# Folders of the released repository: all networks of the shape, and the autoencoder alone.
FOLDER = "hunyuan3d-dit-v2-1"
VAE_FOLDER = "hunyuan3d-vae-v2-1"
# Sections of config.yaml and of the checkpoint.
MODEL = "model"
VAE = "vae"
CONDITIONER = "conditioner"
ENCODER = "main_image_encoder.model."  # prefix of DINOv2's names in the section conditioner
ENCODER_HALF = ("encoder.", "pre_kl.")  # prefixes of the encoder's names in the section vae
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
# Defaults of ImageProcessorV2: pixels per side, and the share of a side that stays free around the object.
IMAGE_SIZE = 512
BORDER = 0.15
ENCODER_SIZE = 224  # pixels per side; default of DinoImageEncoder and of a Dinov2Config
# Patterns of files that must be passed on with changed weights.
LICENCES = ("LICENSE*", "License*", "NOTICE*", "Notice*")
NOTICE_FILE = """Changed from the released Hunyuan3D-2.1: {file}: the weights of the flow of shapes \
were tuned on preferences.

It stays under the agreement of the released repository: pass its {papers} on with this folder.
"""
Sections = Mapping[str, Mapping[str, torch.Tensor]]  # section -> tensors by name


@dataclass(frozen=True, kw_only=True)
class ShapeFiles:
    """Settings of config.yaml and the paths of the files."""

    root: Path  # the folder that holds it
    checkpoint: Path
    model: DenoiserConfig
    vae: AutoencoderConfig
    encoder: DinoConfig
    class_token: bool = True  # whether DINOv2's class token is kept
    shift: float = 1.0  # s of the sampler's times
    picture: int = IMAGE_SIZE  # pixels per side of a prepared image
    border: float = BORDER  # share of a side that stays free around the object

    @property
    def tokens(self) -> list[int]:
        """Shape [L, E] of the conditioning tokens of one image."""
        return [self.encoder.tokens - (0 if self.class_token else 1), self.encoder.hidden_size]

    @property
    def preparation(self) -> str:
        """Description of the image preprocessing, which files of embeddings state.

        These files are compared by this text, so it must not change.
        """
        return f"pictures of {self.picture} pixels with a border of {self.border:g}, resized as by OpenCV"


def folder_of(root: Path) -> Path:
    """Return the folder with config.yaml: the given one, or the shape's folder in the whole repository."""
    return root if (root / CONFIG).is_file() or not (root / FOLDER / CONFIG).is_file() else root / FOLDER


def recognises(root: Path) -> bool:
    """Return whether config.yaml exists and names the network of Hunyuan3D.

    Other versions of Hunyuan3D count, too, so that an error can name them.
    """
    return any(mentions(folder_of(root) / CONFIG, name) for name in (TARGETS[MODEL], "Hunyuan3DDiT"))


def read_files(root: Path) -> ShapeFiles:
    """Read config.yaml and find the checkpoint.

    Raises: FileNotFoundError; ValueError for a config that is not Hunyuan3D-2.1's, or that has settings which
        would change the result.
    """
    folder = folder_of(Path(root))
    path = folder / CONFIG
    # The first name that exists, in the order of CHECKPOINTS: half precision is preferred.
    checkpoint = next((folder / name for name in CHECKPOINTS if (folder / name).is_file()), None)
    if not path.is_file() or checkpoint is None:
        raise FileNotFoundError(
            f"Hunyuan3D: expected {CONFIG} and {' or '.join(CHECKPOINTS)} in {folder}, but at least one is"
            " missing. Restore the files."
        )
    # Read as data: nothing that the file names is imported.
    written = read_yaml(path)
    try:
        # Every section must name the class of Hunyuan3D-2.1; another one would compute something else.
        params = {section: _params(written, section, target) for section, target in TARGETS.items()}
        settings = {section: _settings(written, section) for section in SETTINGS}
        encoder, class_token = _image_encoder_config(params[CONDITIONER])
        prepared = settings["image_processor"]
        border = prepared.get("border_ratio")  # null means the default
        result = ShapeFiles(
            root=folder,
            checkpoint=checkpoint,
            model=_build_config(DenoiserConfig, params[MODEL], others=True),
            vae=_build_config(AutoencoderConfig, params[VAE]),
            encoder=encoder,
            class_token=class_token,
            shift=float(settings["scheduler"].get("shift", 1.0)),
            picture=int(prepared.get("size", IMAGE_SIZE)),
            border=BORDER if border is None else float(border),
        )
        if not (result.shift > 0 and result.picture > 0 and 0 <= result.border < 1):
            got = f"{result.shift}, {result.picture}, {result.border}"
            raise ValueError(
                f"expected shift and size above 0 and a border_ratio below 1, got {got}. Restore the file."
            )
    except (TypeError, ValueError) as error:
        # The inner errors name the setting; the name of the file is added here.
        raise ValueError(f"{path}: {error}") from None
    # The three networks must fit each other: tokens and channels of a latent, channels of the conditioning.
    sizes = (result.vae.num_latents, result.vae.embed_dim, result.tokens[1])
    expected = (result.model.input_size, result.model.in_channels, result.model.context_dim)
    if sizes != expected:
        raise ValueError(
            f"{path}: expected latents and conditioning of the same sizes in model, vae and conditioner, got"
            f" {expected} and {sizes}. Restore the file."
        )
    return result


def _params(written: Mapping, section: str, target: str) -> dict:
    """Return the params of a required section. Raises: ValueError for another target."""
    entry = written.get(section)
    # A section that is no mapping is reported like a missing one.
    entry = entry if isinstance(entry, Mapping) else {}
    # "hy3dshape.models...HunYuanDiTPlain": the module path may differ, the class may not.
    named = str(entry.get("target", "")).rpartition(".")[2]
    if named != target or not isinstance(entry.get("params"), Mapping):
        raise ValueError(
            f"expected the section {section} with target {target} and params, got {named or 'none'}. Name the"
            " file of Hunyuan3D-2.1."
        )
    return dict(entry["params"])


def _settings(written: Mapping, section: str) -> dict:
    """Return the params of a section that may be missing.

    Raises: ValueError for another target or unknown params, which would sample or crop in another way.
    """
    target, known = SETTINGS[section]
    # Without the section the original uses its defaults.
    if section not in written:
        return {}
    entry = written[section] if isinstance(written[section], Mapping) else {}
    named = str(entry.get("target", "")).rpartition(".")[2]
    params = entry.get("params") or {}
    # For example the consistency scheduler of distilled models uses other times.
    if named != target:
        raise ValueError(
            f"expected the section {section} with target {target}, got {named or 'none'}, which would give"
            " other results. Name the file of Hunyuan3D-2.1."
        )
    # A section without known params, such as `pipeline`, may have any.
    unknown = sorted(set(params) - set(known)) if isinstance(params, Mapping) and known else []
    if unknown or not isinstance(params, Mapping):
        got = ", ".join(unknown) or repr(params)
        raise ValueError(
            f"expected the section {section} with the params {', '.join(known)}, got {got}. Others may change"
            " the result: leave them out."
        )
    if params.get("use_dynamic_shifting"):
        raise ValueError(
            f"the section {section} has use_dynamic_shifting, which the original's pipeline cannot sample."
            " Set it to false."
        )
    return dict(params)


def _image_encoder_config(params: Mapping) -> tuple[DinoConfig, bool]:
    """Return the settings of the image encoder, and whether its class token is kept."""
    encoder = params.get("main_image_encoder")
    encoder = encoder if isinstance(encoder, Mapping) else {}
    kind = encoder.get("type")
    inner = encoder.get("kwargs")
    inner = inner if isinstance(inner, Mapping) else {}
    if (
        # drop_ratio is the dropout of the conditioning in training.
        kind != "DinoImageEncoder"
        or set(params) - {"main_image_encoder", "drop_ratio"}
        or not isinstance(inner.get("config"), Mapping)
    ):
        raise ValueError(
            f"expected one DinoImageEncoder with its config as conditioner, got {kind!r} in {sorted(params)}."
            " Name the file of Hunyuan3D-2.1."
        )
    # `image_size` of the config is that of training; the one beside it is that of the input images.
    config = {"image_size": ENCODER_SIZE, **inner["config"], "shown": inner.get("image_size", ENCODER_SIZE)}
    return DinoConfig.of(config), bool(inner.get("use_cls_token", True))


def _build_config(kind: Any, params: Mapping, others: bool = False) -> Any:
    """Build a config from its params.

    Args: others: ignore unknown params, as the original's class does.
    """
    known = {field.name for field in fields(kind)}
    unknown = sorted(set(params) - known)
    # An unknown setting might build another network than the file's weights belong to.
    if unknown and not others:
        raise ValueError(
            f"expected the params of {TARGETS[VAE]}, got unknown {', '.join(unknown[:8])}. Name"
            " Hunyuan3D-2.1's file."
        )
    return kind(**{name: value for name, value in params.items() if name in known})


def read_sections(path: Path, needed: Sequence[str] = (MODEL, VAE)) -> dict[str, dict[str, torch.Tensor]]:
    """Read the checkpoint's sections: nested dicts of a .ckpt, or names such as model.x of a .safetensors.

    Raises: ValueError for a damaged or foreign file, one that would run code, or one that lacks a needed
        section.
    """
    held = content(path, "checkpoint")
    if path.suffix == ".safetensors":
        # The part before the first dot is the section; the inner dict removes duplicates and keeps the order.
        held = {
            section: below(held, f"{section}.") for section in {name.partition(".")[0]: None for name in held}
        }
    # An empty section counts as missing.
    lacking = [
        s for s in needed if not (isinstance(held, dict) and isinstance(held.get(s), dict) and held[s])
    ]
    if lacking:
        raise ValueError(
            f"{path}: expected the sections {', '.join(needed)}, but {', '.join(lacking)} is missing. Use the"
            " released checkpoint."
        )
    present = [s for s in TARGETS if s in held]
    # Only the known sections are checked; a file may hold more.
    foreign = [f"{s}.{n}" for s in present for n, x in held[s].items() if not isinstance(x, torch.Tensor)]
    if foreign:
        raise ValueError(
            f"{path}: expected tensors by name, got other values at {', '.join(map(str, foreign[:8]))}. Use"
            " the released checkpoint."
        )
    return held


def denoiser(
    files: ShapeFiles,
    sections: Sections,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
) -> Denoiser:
    """Build the flow's network from the section model, strictly. dtype None keeps the file's dtypes."""
    return _loaded(Denoiser, files.model, sections[MODEL], f"{files.checkpoint}, {MODEL}", dtype, device)


def decoder(files: ShapeFiles, sections: Sections, device: str | torch.device = "cpu") -> ShapeDecoder:
    """Build the decoder of the autoencoder in float32. Other entries of the section are ignored, as in the
    original.
    """
    # In float32, also where the file is in half precision.
    return _loaded(
        ShapeDecoder,
        files.vae,
        decoding_half(files, sections),
        f"{files.checkpoint}, {VAE}",
        torch.float32,
        device,
    )


def decoding_half(files: ShapeFiles, sections: Sections) -> Mapping[str, torch.Tensor]:
    """Return the decoder's tensors. Raises: ValueError for missing or misshapen tensors."""
    expected = empty(lambda: ShapeDecoder(files.vae)).state_dict()
    half = {name: tensor for name, tensor in sections[VAE].items() if not name.startswith(ENCODER_HALF)}
    if expected.keys() <= half.keys():
        # Entries beyond the decoder's are dropped; if any is missing, the check below names it.
        half = {name: half[name] for name in expected}
    check_fit(expected, half, f"{files.checkpoint}, {VAE}")
    return half


def encoder(files: ShapeFiles, sections: Sections, device: str | torch.device = "cpu") -> ShapeEncoder:
    """Build the encoder of the autoencoder in float32.

    It is read from the checkpoint, or else from the autoencoder's own folder beside it.

    Raises: FileNotFoundError if neither holds it.
    """
    path, half = _encoding(files, sections[VAE])
    if not half:
        # The repository has both folders side by side.
        place = files.root.parent / VAE_FOLDER
        raise FileNotFoundError(
            f"{path}: neither this file nor {place} holds the encoder of the autoencoder. Download that"
            " folder."
        )
    return _loaded(ShapeEncoder, files.vae, half, f"{path}, {VAE}", torch.float32, device)


def _encoding(files: ShapeFiles, vae: Mapping[str, torch.Tensor]) -> tuple[Path, Mapping[str, torch.Tensor]]:
    """Return the file and the tensors of the encoder.

    The checkpoint is preferred to the autoencoder's own folder, which is released beside it.
    """
    there = [path for name in CHECKPOINTS if (path := files.root.parent / VAE_FOLDER / name).is_file()]
    in_checkpoint = any(name.startswith(ENCODER_HALF) for name in vae)
    if in_checkpoint or not there:
        path = files.checkpoint
        state = vae
    else:
        # The autoencoder's own file is one flat state dict, without sections.
        path = there[0]
        state = content(path, "checkpoint")
    return path, {name: tensor for name, tensor in state.items() if name.startswith(ENCODER_HALF)}


def image_encoder(files: ShapeFiles, sections: Sections, device: str | torch.device = "cpu") -> Dino:
    """Build the image encoder strictly, in float32."""
    # Weights of another encoder would otherwise be dropped without an error.
    foreign = [name for name in sections[CONDITIONER] if not name.startswith(ENCODER)]
    if foreign:
        where = f"{files.checkpoint}, {CONDITIONER}"
        raise ValueError(
            f"{where}: expected only names that begin with {ENCODER}, got {', '.join(foreign[:8])}. Use the"
            " released checkpoint."
        )
    return load_dino(
        files.encoder,
        below(sections[CONDITIONER], ENCODER),
        f"{files.checkpoint}, {CONDITIONER}",
        device,
    )


def _loaded(
    kind: Any,
    config: Any,
    state: Mapping[str, torch.Tensor],
    who: str,
    dtype: torch.dtype | None,
    device: str | torch.device,
) -> Any:
    """Build a network on the meta device, fill it strictly, freeze it and move it to the device."""
    return frozen(fill(empty(lambda: kind(config)), state, who, types=dtype, device=device), device)


def write_checkpoint(source: Path, target: Path, state: Mapping[str, torch.Tensor]) -> None:
    """Write a copy of the checkpoint in which the flow's network is replaced; every tensor keeps its
    dtype.
    """
    # All sections are read, not only the flow's, so that they are written again.
    sections = read_sections(source, (MODEL,))
    held: dict = {**sections, MODEL: in_types_of(sections[MODEL], state)}
    # This format has no nesting: sections become prefixes again.
    if target.suffix == ".safetensors":
        held = {
            f"{section}.{name}": tensor
            for section, tensors in held.items()
            for name, tensor in tensors.items()
        }
    rewrite(target, held)


def source_of(files: ShapeFiles, sections: Sections) -> str:
    """Describe the encoder and the preprocessing of images, as files of embeddings state them.

    Without the encoder's weights in the checkpoint, only the preprocessing is described.
    """
    # "*" matches any encoder; see `check_source` in base/conditioning.py.
    weights = sections.get(CONDITIONER)
    return f"DINOv2 {fingerprint(weights)}, {files.preparation}" if weights else f"*, {files.preparation}"


def release(root: Path, stages: Sequence[str]) -> Release:
    """Describe the folder to export: the shape's folder, the autoencoder, the licence, and a notice of the
    change.

    The original's loader opens it without an argument if the checkpoint has the released name,
    model.fp16.ckpt.
    """
    files = read_files(root)
    sections = read_sections(files.checkpoint, (MODEL,))
    written = f"{FOLDER}/{files.checkpoint.name}"
    # A flat folder without the released subfolder is its own repository.
    repository = files.root.parent if files.root.name == FOLDER else files.root
    # Licence and notice files of both places; the file names are matched in two spellings.
    papers = [
        path for place in (files.root, repository) for kind in LICENCES for path in sorted(place.glob(kind))
    ]
    # The licence requires a notice of every changed file; an earlier notice is replaced.
    kept = {path.name: path for path in papers if path.is_file() and path.name != "Notice"}
    notice = NOTICE_FILE.format(file=written, papers=", ".join(kept) or "LICENSE").encode()
    vae = {
        f"{VAE_FOLDER}/{path.name}": path for path in (repository / VAE_FOLDER).glob("*") if path.is_file()
    }
    # The network is read and written only when the export runs.
    stored = Stored(
        file=written,
        load=partial(denoiser, files, sections),
        write=partial(write_checkpoint, files.checkpoint),
    )
    config = {f"{FOLDER}/{CONFIG}": files.root / CONFIG}
    return Release(files={**kept, **vae, **config, "Notice": notice}, networks=dict.fromkeys(stages, stored))


def networks(root: Path) -> list[Network]:
    """List all four networks with expected and present tensors; the autoencoder's halves count separately."""
    files = read_files(root)
    # Nothing is required here, so that missing networks are listed instead of raising an error.
    sections = read_sections(files.checkpoint, ())
    vae = sections.get(VAE, {})
    place, encoding = _encoding(files, vae)
    # The section vae holds both halves, which are listed separately.
    decoding = _shapes(lambda: ShapeDecoder(files.vae))
    half = {name: tensor for name, tensor in vae.items() if not name.startswith(ENCODER_HALF)}
    half = {name: half[name] for name in decoding} if decoding.keys() <= half.keys() else half
    encoder_tensors = below(sections.get(CONDITIONER, {}), ENCODER)
    return [
        Network(
            name="flow of shapes",
            file=files.checkpoint,
            expected=_shapes(lambda: Denoiser(files.model)),
            tensors=sections.get(MODEL, {}),
            released=(752, 3_050_758_720),
        ),
        Network(
            name="autoencoder, latents to shapes",
            file=files.checkpoint,
            expected=decoding,
            tensors=half,
            released=(266, 214_212_865),
        ),
        Network(
            name="autoencoder, shapes to latents",
            file=place,
            expected=_shapes(lambda: ShapeEncoder(files.vae)),
            tensors=encoding,
            without="encoding your own meshes as pairs",
            released=(144, 113_533_312),
        ),
        Network(
            name="DINOv2",
            file=files.checkpoint,
            expected=_shapes(lambda: Dino(files.encoder)),
            tensors=encoder_tensors,
            without="embedding images",
            released=(439, 304_368_640),
        ),
    ]


def _shapes(make: Callable[[], nn.Module]) -> dict[str, list[int]]:
    """Return the shapes of a network's tensors by name, without allocating them."""
    return shapes(empty(make).state_dict())
