"""Hunyuan3D-2.1's files: config.yaml beside one checkpoint with sections model, vae and conditioner, in a
folder of the released repository. Nothing is downloaded or run.

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
CHECKPOINTS = tuple(f"model{half}{ending}" for half in (".fp16", "") for ending in (".ckpt", ".safetensors"))
# of the shape's networks, and of the autoencoder alone, as released
FOLDER = "hunyuan3d-dit-v2-1"
VAE_FOLDER = "hunyuan3d-vae-v2-1"
MODEL = "model"
VAE = "vae"
CONDITIONER = "conditioner"
ENCODER = "main_image_encoder.model."  # before the names of DINOv2
ENCODER_HALF = ("encoder.", "pre_kl.")  # of the autoencoder
TARGETS = {MODEL: "HunYuanDiTPlain", VAE: "ShapeVAE", CONDITIONER: "SingleImageEncoder"}
# sections that may be missing: target, and the params that it takes
SETTINGS: dict[str, tuple[str, tuple[str, ...]]] = {
    "scheduler": (
        "FlowMatchEulerDiscreteScheduler",
        ("num_train_timesteps", "shift", "use_dynamic_shifting"),
    ),
    "image_processor": ("ImageProcessorV2", ("size", "border_ratio")),
    "pipeline": ("Hunyuan3DDiTFlowMatchingPipeline", ()),
}
# defaults of ImageProcessorV2: pixels, and the share of a side around what is shown
PICTURE = 512
BORDER = 0.15
SHOWN = 224  # default of DinoImageEncoder, and of a Dinov2Config: pixels
LICENCES = ("LICENSE*", "License*", "NOTICE*", "Notice*")
NOTICE_FILE = """Changed from the released Hunyuan3D-2.1: {file}: the weights of the flow of shapes \
were tuned on preferences.

It stays under the agreement of the released repository: pass its {papers} on with this folder.
"""
Sections = Mapping[str, Mapping[str, torch.Tensor]]


@dataclass(frozen=True, kw_only=True)
class ShapeFiles:
    """What config.yaml says."""

    root: Path  # the folder that holds it
    checkpoint: Path
    model: DenoiserConfig
    vae: AutoencoderConfig
    encoder: DinoConfig
    class_token: bool = True  # whether the token of the whole picture is kept
    shift: float = 1.0  # of the sampler's times
    picture: int = PICTURE
    border: float = BORDER

    @property
    def tokens(self) -> list[int]:
        """The shape of a condition."""
        return [self.encoder.tokens - (0 if self.class_token else 1), self.encoder.hidden_size]

    @property
    def preparation(self) -> str:
        """What is done to pictures, in words that files of conditions state."""
        return f"pictures of {self.picture} pixels with a border of {self.border:g}, resized as by OpenCV"


def folder_of(root: Path) -> Path:
    """The folder with config.yaml: the one given, or the shape's in the whole repository."""
    return root if (root / CONFIG).is_file() or not (root / FOLDER / CONFIG).is_file() else root / FOLDER


def recognises(root: Path) -> bool:
    """Whether config.yaml is there and names the network, or that of another version, which is then refused
    by name.
    """
    return any(mentions(folder_of(root) / CONFIG, name) for name in (TARGETS[MODEL], "Hunyuan3DDiT"))


def read_files(root: Path) -> ShapeFiles:
    """Read config.yaml and find the checkpoint.

    Raises: FileNotFoundError; ValueError for a config that is not Hunyuan3D-2.1's, or has settings that would
        change the result.
    """
    folder = folder_of(Path(root))
    path = folder / CONFIG
    checkpoint = next((folder / name for name in CHECKPOINTS if (folder / name).is_file()), None)
    if not path.is_file() or checkpoint is None:
        raise FileNotFoundError(
            f"Hunyuan3D: expected {CONFIG} and {' or '.join(CHECKPOINTS)}, got less in {folder}. Restore"
            " them."
        )
    written = read_yaml(path)
    try:
        params = {section: _params(written, section, target) for section, target in TARGETS.items()}
        settings = {section: _settings(written, section) for section in SETTINGS}
        encoder, class_token = _picture_encoder(params[CONDITIONER])
        prepared = settings["image_processor"]
        border = prepared.get("border_ratio")  # null: the pipeline's own
        made = ShapeFiles(
            root=folder,
            checkpoint=checkpoint,
            model=_made(DenoiserConfig, params[MODEL], others=True),
            vae=_made(AutoencoderConfig, params[VAE]),
            encoder=encoder,
            class_token=class_token,
            shift=float(settings["scheduler"].get("shift", 1.0)),
            picture=int(prepared.get("size", PICTURE)),
            border=BORDER if border is None else float(border),
        )
        if not (made.shift > 0 and made.picture > 0 and 0 <= made.border < 1):
            got = f"{made.shift}, {made.picture}, {made.border}"
            raise ValueError(
                f"expected shift and size above 0 and a border_ratio below 1, got {got}. Restore them."
            )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None
    sizes = (made.vae.num_latents, made.vae.embed_dim, made.tokens[1])
    expected = (made.model.input_size, made.model.in_channels, made.model.context_dim)
    if sizes != expected:
        raise ValueError(
            f"{path}: expected latents and conditions of one size in model, vae and conditioner, got"
            f" {expected} and {sizes}."
        )
    return made


def _params(written: Mapping, section: str, target: str) -> dict:
    entry = written.get(section)
    entry = entry if isinstance(entry, Mapping) else {}
    named = str(entry.get("target", "")).rpartition(".")[2]
    if named != target or not isinstance(entry.get("params"), Mapping):
        raise ValueError(
            f"expected {section} of target {target} with params, got {named or 'none'}. Name Hunyuan3D-2.1's."
        )
    return dict(entry["params"])


def _settings(written: Mapping, section: str) -> dict:
    """Params of a section that may be missing; other targets and other params would sample or cut out another
    way.
    """
    target, known = SETTINGS[section]
    if section not in written:
        return {}
    entry = written[section] if isinstance(written[section], Mapping) else {}
    named = str(entry.get("target", "")).rpartition(".")[2]
    params = entry.get("params") or {}
    if named != target:
        raise ValueError(
            f"expected {section} of target {target}, got {named or 'none'}. It samples another way: name"
            " Hunyuan3D-2.1's."
        )
    odd = sorted(set(params) - set(known)) if isinstance(params, Mapping) and known else []
    if odd or not isinstance(params, Mapping):
        got = ", ".join(odd) or repr(params)
        raise ValueError(
            f"expected {section} with params {', '.join(known)}, got {got}. They may change the result: leave"
            " them out."
        )
    if params.get("use_dynamic_shifting"):
        raise ValueError(
            f"expected {section} without use_dynamic_shifting, which its pipeline cannot sample, got it."
            " Switch it off."
        )
    return dict(params)


def _picture_encoder(params: Mapping) -> tuple[DinoConfig, bool]:
    """And whether the token of the whole picture is kept."""
    encoder = params.get("main_image_encoder")
    encoder = encoder if isinstance(encoder, Mapping) else {}
    kind = encoder.get("type")
    inner = encoder.get("kwargs")
    inner = inner if isinstance(inner, Mapping) else {}
    if (
        kind != "DinoImageEncoder"
        or set(params) - {"main_image_encoder", "drop_ratio"}
        or not isinstance(inner.get("config"), Mapping)
    ):
        raise ValueError(
            f"expected one DinoImageEncoder with its config as conditioner, got {kind!r} in {sorted(params)}."
            " Name its file."
        )
    config = {"image_size": SHOWN, **inner["config"], "shown": inner.get("image_size", SHOWN)}
    return DinoConfig.of(config), bool(inner.get("use_cls_token", True))


def _made(kind: Any, params: Mapping, others: bool = False) -> Any:
    """A config of its params. Args: others: pass over unknown ones, as the class does."""
    known = {field.name for field in fields(kind)}
    unknown = sorted(set(params) - known)
    if unknown and not others:
        raise ValueError(
            f"expected the params of {TARGETS[VAE]}, got unknown {', '.join(unknown[:8])}. Name"
            " Hunyuan3D-2.1's file."
        )
    return kind(**{name: value for name, value in params.items() if name in known})


def read_sections(path: Path, needed: Sequence[str] = (MODEL, VAE)) -> dict[str, dict[str, torch.Tensor]]:
    """The checkpoint's sections: nested dicts of a .ckpt, or names such as model.x of a .safetensors.

    Raises: ValueError for a damaged or foreign file, one that would run code, or one without a section that
        is needed.
    """
    held = content(path, "checkpoint")
    if path.suffix == ".safetensors":
        held = {
            section: below(held, f"{section}.") for section in {name.partition(".")[0]: None for name in held}
        }
    lacking = [
        s for s in needed if not (isinstance(held, dict) and isinstance(held.get(s), dict) and held[s])
    ]
    if lacking:
        raise ValueError(
            f"{path}: expected sections {', '.join(needed)}, got none for {', '.join(lacking)}. Use the"
            " released checkpoint."
        )
    there = [s for s in TARGETS if s in held]
    odd = [f"{s}.{n}" for s in there for n, x in held[s].items() if not isinstance(x, torch.Tensor)]
    if odd:
        raise ValueError(
            f"{path}: expected tensors by name, got others at {', '.join(map(str, odd[:8]))}. Use the"
            " released checkpoint."
        )
    return held


def denoiser(
    files: ShapeFiles,
    sections: Sections,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
) -> Denoiser:
    """The flow's network, strictly; dtype None keeps the file's."""
    return _loaded(Denoiser, files.model, sections[MODEL], f"{files.checkpoint}, {MODEL}", dtype, device)


def decoder(files: ShapeFiles, sections: Sections, device: str | torch.device = "cpu") -> ShapeDecoder:
    """The autoencoder's half that makes shapes, in float32. What else the section holds is passed over, as in
    the original.
    """
    return _loaded(
        ShapeDecoder,
        files.vae,
        decoding_half(files, sections),
        f"{files.checkpoint}, {VAE}",
        torch.float32,
        device,
    )


def decoding_half(files: ShapeFiles, sections: Sections) -> Mapping[str, torch.Tensor]:
    """The tensors of this half. Raises: ValueError for missing or misshapen ones."""
    expected = empty(lambda: ShapeDecoder(files.vae)).state_dict()
    half = {name: tensor for name, tensor in sections[VAE].items() if not name.startswith(ENCODER_HALF)}
    if expected.keys() <= half.keys():
        half = {name: half[name] for name in expected}
    check_fit(expected, half, f"{files.checkpoint}, {VAE}")
    return half


def encoder(files: ShapeFiles, sections: Sections, device: str | torch.device = "cpu") -> ShapeEncoder:
    """The half that makes latents of surfaces, in float32: of the checkpoint, or of the autoencoder's own
    folder beside it.

    Raises: FileNotFoundError where neither has it.
    """
    path, half = _encoding(files, sections[VAE])
    if not half:
        place = files.root.parent / VAE_FOLDER
        raise FileNotFoundError(
            f"{path}: expected the autoencoder's encoder in it or in {place}, got neither. Fetch that folder."
        )
    return _loaded(ShapeEncoder, files.vae, half, f"{path}, {VAE}", torch.float32, device)


def _encoding(files: ShapeFiles, vae: Mapping[str, torch.Tensor]) -> tuple[Path, Mapping[str, torch.Tensor]]:
    """File and tensors of that half: of the checkpoint, else of the autoencoder's own, which is released in a
    folder beside it.
    """
    there = [path for name in CHECKPOINTS if (path := files.root.parent / VAE_FOLDER / name).is_file()]
    own = any(name.startswith(ENCODER_HALF) for name in vae) or not there
    path, state = (files.checkpoint, vae) if own else (there[0], content(there[0], "checkpoint"))
    return path, {name: tensor for name, tensor in state.items() if name.startswith(ENCODER_HALF)}


def image_encoder(files: ShapeFiles, sections: Sections, device: str | torch.device = "cpu") -> Dino:
    """The pictures' encoder, strictly, in float32."""
    foreign = [name for name in sections[CONDITIONER] if not name.startswith(ENCODER)]
    if foreign:
        where = f"{files.checkpoint}, {CONDITIONER}"
        raise ValueError(
            f"{where}: expected names that begin with {ENCODER}, got {', '.join(foreign[:8])}. Use the"
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
    return frozen(fill(empty(lambda: kind(config)), state, who, types=dtype, device=device), device)


def write_checkpoint(source: Path, target: Path, state: Mapping[str, torch.Tensor]) -> None:
    """The checkpoint again, with the flow's network replaced, every tensor in its old type."""
    sections = read_sections(source, (MODEL,))
    held: dict = {**sections, MODEL: in_types_of(sections[MODEL], state)}
    if target.suffix == ".safetensors":
        held = {
            f"{section}.{name}": tensor
            for section, tensors in held.items()
            for name, tensor in tensors.items()
        }
    rewrite(target, held)


def source_of(files: ShapeFiles, sections: Sections) -> str:
    """Describe what computes conditions, for their file; without the encoder's weights, the preparation."""
    weights = sections.get(CONDITIONER)
    return f"DINOv2 {fingerprint(weights)}, {files.preparation}" if weights else f"*, {files.preparation}"


def release(root: Path, stages: Sequence[str]) -> Release:
    """Describe the released repository's folder of the shape, its autoencoder, licence, and a notice of the
    change.

    The original's loader opens it without an argument where the checkpoint has the released name,
    model.fp16.ckpt.
    """
    files = read_files(root)
    sections = read_sections(files.checkpoint, (MODEL,))
    written = f"{FOLDER}/{files.checkpoint.name}"
    repository = files.root.parent if files.root.name == FOLDER else files.root
    papers = [
        path for place in (files.root, repository) for kind in LICENCES for path in sorted(place.glob(kind))
    ]
    kept = {path.name: path for path in papers if path.is_file() and path.name != "Notice"}
    notice = NOTICE_FILE.format(file=written, papers=", ".join(kept) or "LICENSE").encode()
    vae = {
        f"{VAE_FOLDER}/{path.name}": path for path in (repository / VAE_FOLDER).glob("*") if path.is_file()
    }
    stored = Stored(
        file=written,
        load=partial(denoiser, files, sections),
        write=partial(write_checkpoint, files.checkpoint),
    )
    config = {f"{FOLDER}/{CONFIG}": files.root / CONFIG}
    return Release(files={**kept, **vae, **config, "Notice": notice}, networks=dict.fromkeys(stages, stored))


def networks(root: Path) -> list[Network]:
    """Return all four networks, the autoencoder's halves apart."""
    files = read_files(root)
    sections = read_sections(files.checkpoint, ())
    vae = sections.get(VAE, {})
    place, encoding = _encoding(files, vae)
    decoding = _shapes(lambda: ShapeDecoder(files.vae))
    half = {name: tensor for name, tensor in vae.items() if not name.startswith(ENCODER_HALF)}
    half = {name: half[name] for name in decoding} if decoding.keys() <= half.keys() else half
    pictures = below(sections.get(CONDITIONER, {}), ENCODER)
    return [
        Network(
            name="flow of shapes",
            file=files.checkpoint,
            expected=_shapes(lambda: Denoiser(files.model)),
            found=sections.get(MODEL, {}),
            released=(752, 3_050_758_720),
        ),
        Network(
            name="autoencoder, latents to shapes",
            file=files.checkpoint,
            expected=decoding,
            found=half,
            released=(266, 214_212_865),
        ),
        Network(
            name="autoencoder, shapes to latents",
            file=place,
            expected=_shapes(lambda: ShapeEncoder(files.vae)),
            found=encoding,
            without="pairs of meshes of your own",
            released=(144, 113_533_312),
        ),
        Network(
            name="DINOv2",
            file=files.checkpoint,
            expected=_shapes(lambda: Dino(files.encoder)),
            found=pictures,
            without="conditions of pictures",
            released=(439, 304_368_640),
        ),
    ]


def _shapes(make: Callable[[], nn.Module]) -> dict[str, list[int]]:
    return shapes(empty(make).state_dict())
