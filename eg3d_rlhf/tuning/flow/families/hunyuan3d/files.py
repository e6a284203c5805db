"""Hunyuan3D-2.1's files: config.yaml beside one checkpoint with sections model, vae and conditioner. Nothing is downloaded or run."""

import contextlib
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from eg3d_rlhf.models.dinov2 import Dino, DinoConfig
from eg3d_rlhf.models.hunyuan3d.autoencoder import AutoencoderConfig, ShapeDecoder
from eg3d_rlhf.models.hunyuan3d.denoiser import Denoiser, DenoiserConfig
from eg3d_rlhf.tuning.flow.families import LARGEST, read_yaml
from training.storage import load_strict, write_atomic

CONFIG = "config.yaml"
CHECKPOINTS = tuple(f"model{half}{ending}" for half in (".fp16", "") for ending in (".ckpt", ".safetensors"))
FOLDER = "hunyuan3d-dit-v2-1"  # of the shape's networks in the released repository
MODEL, VAE, CONDITIONER = "model", "vae", "conditioner"
ENCODER = "main_image_encoder.model."  # before the names of DINOv2
UNREAD = ("encoder.", "pre_kl.", "fourier_embedder.", "geo_decoder.fourier_embedder.")  # of the autoencoder: its other half, and constants
TARGETS = {MODEL: "HunYuanDiTPlain", VAE: "ShapeVAE", CONDITIONER: "SingleImageEncoder"}
Sections = Mapping[str, Mapping[str, torch.Tensor]]


@dataclass(frozen=True, kw_only=True)
class ShapeFiles:
    """What config.yaml says."""

    root: Path  # the folder that holds it
    checkpoint: Path
    model: DenoiserConfig
    vae: AutoencoderConfig
    encoder: DinoConfig
    class_token: bool  # whether the token of the whole picture is kept
    shift: float  # of the sampler's times

    @property
    def tokens(self) -> list[int]:
        """Shape of a condition."""
        return [self.encoder.tokens - (0 if self.class_token else 1), self.encoder.hidden_size]


def folder_of(root: Path) -> Path:
    """The folder with config.yaml: the one given, or the shape's in the whole repository."""
    return root if (root / CONFIG).is_file() or not (root / FOLDER / CONFIG).is_file() else root / FOLDER


def recognises(root: Path) -> bool:
    """Whether config.yaml is there and names the network."""
    path = folder_of(root) / CONFIG
    return path.is_file() and path.stat().st_size <= LARGEST and TARGETS[MODEL] in path.read_text(errors="replace")


def read_files(root: Path) -> ShapeFiles:
    """Read config.yaml and find the checkpoint.

    Raises: FileNotFoundError; ValueError for a config that is not Hunyuan3D-2.1's.
    """
    folder = folder_of(Path(root))
    path = folder / CONFIG
    checkpoint = next((folder / name for name in CHECKPOINTS if (folder / name).is_file()), None)
    if not path.is_file() or checkpoint is None:
        raise FileNotFoundError(f"Hunyuan3D: expected {CONFIG} and {' or '.join(CHECKPOINTS)}, got less in {folder}. Restore them.")
    content = read_yaml(path)
    params = {}
    for section, target in TARGETS.items():
        entry = content.get(section)
        entry = entry if isinstance(entry, Mapping) else {}
        named = str(entry.get("target", "")).rpartition(".")[2]
        if named != target or not isinstance(entry.get("params"), Mapping):
            raise ValueError(f"{path}: expected {section} of target {target} with params, got {named or 'none'}. Name Hunyuan3D-2.1's.")
        params[section] = dict(entry["params"])
    encoder = params[CONDITIONER].get("main_image_encoder", {})
    kind, inner = encoder.get("type"), encoder.get("kwargs", {})
    if kind != "DinoImageEncoder" or set(params[CONDITIONER]) - {"main_image_encoder", "drop_ratio"}:
        raise ValueError(f"{path}: expected one DinoImageEncoder as conditioner, got {kind!r} in {sorted(params[CONDITIONER])}.")
    scheduler = (content.get("scheduler") or {}).get("params") or {}
    try:
        dino = DinoConfig.of({**(inner.get("config") or {}), "image_size": inner.get("image_size", 518)})
        made = ShapeFiles(
            root=folder, checkpoint=checkpoint, model=_made(DenoiserConfig, params[MODEL], strict=True),
            vae=_made(AutoencoderConfig, params[VAE]), encoder=dino, class_token=bool(inner.get("use_cls_token", True)),
            shift=float(scheduler.get("shift", 1.0)),
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None
    got = (made.vae.num_latents, made.vae.embed_dim, made.tokens[1])
    expected = (made.model.input_size, made.model.in_channels, made.model.context_dim)
    if got != expected:
        raise ValueError(f"{path}: expected latents and conditions of one size in model, vae and conditioner, got {expected} and {got}.")
    return made


def _made(kind: Any, params: Mapping, strict: bool = False) -> Any:
    """A config of its params; those of the encoder's half are passed over, unless unknown ones are refused."""
    known = {field.name for field in fields(kind)}
    passed = {"decoupled_ca_dim", "decoupled_ca_weight", "additional_cond_hidden_state"}  # of what is refused where it is switched on
    unknown = sorted(set(params) - known - passed)
    if strict and unknown:
        raise ValueError(f"expected the params of {TARGETS[MODEL]}, got unknown {', '.join(unknown[:8])}. Name Hunyuan3D-2.1's file.")
    return kind(**{name: value for name, value in params.items() if name in known})


def read_sections(path: Path) -> dict[str, dict[str, torch.Tensor]]:
    """The checkpoint's sections: nested dicts of a .ckpt, or names such as model.x of a .safetensors.

    Raises: ValueError for a damaged or foreign file, one that would run code, or one without a section.
    """
    try:
        if path.suffix == ".safetensors":
            found: dict[str, dict[str, torch.Tensor]] = {}
            for name, tensor in load_file(path).items():
                section, _, own = name.partition(".")
                found.setdefault(section, {})[own] = tensor
        else:
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (safetensors.SafetensorError, RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise ValueError(f"{path}: expected a checkpoint, got: {reason}. Truncated or foreign? Copy it again.") from None
    lacking = [s for s in TARGETS if not (isinstance(found, dict) and isinstance(found.get(s), dict) and found[s])]
    if lacking:
        raise ValueError(f"{path}: expected sections {', '.join(TARGETS)}, got none for {', '.join(lacking)}. Use the released checkpoint.")
    odd = [f"{s}.{n}" for s in TARGETS for n, x in found[s].items() if not isinstance(x, torch.Tensor)]
    if odd:
        raise ValueError(f"{path}: expected tensors by name, got others at {', '.join(map(str, odd[:8]))}. Use the released checkpoint.")
    return found


def denoiser(files: ShapeFiles, sections: Sections, dtype: torch.dtype | None = None, device: str | torch.device = "cpu") -> Denoiser:
    """The flow's network, strictly; dtype None keeps the file's."""
    return _loaded(Denoiser, files.model, sections[MODEL], f"{files.checkpoint}, {MODEL}", dtype, device)


def decoder(files: ShapeFiles, sections: Sections, device: str | torch.device = "cpu") -> ShapeDecoder:
    """The autoencoder's half that makes shapes, strictly, in float32."""
    own = {name: tensor for name, tensor in sections[VAE].items() if not name.startswith(UNREAD)}
    return _loaded(ShapeDecoder, files.vae, own, f"{files.checkpoint}, {VAE}", torch.float32, device)


def image_encoder(files: ShapeFiles, sections: Sections, device: str | torch.device = "cpu") -> Dino:
    """The pictures' encoder, strictly, in float32."""
    foreign = [name for name in sections[CONDITIONER] if not name.startswith(ENCODER)]
    if foreign:
        where = f"{files.checkpoint}, {CONDITIONER}"
        raise ValueError(f"{where}: expected names that begin with {ENCODER}, got {', '.join(foreign[:8])}. Use the released checkpoint.")
    own = {name.removeprefix(ENCODER): tensor for name, tensor in sections[CONDITIONER].items()}
    return _loaded(Dino, files.encoder, own, f"{files.checkpoint}, {CONDITIONER}", torch.float32, device)


def _loaded(kind: Any, config: Any, state: Mapping[str, torch.Tensor], who: str, dtype: torch.dtype | None, device) -> Any:
    bad = [name for name, tensor in state.items() if tensor.is_floating_point() and not bool(tensor.isfinite().all())]
    if bad:
        raise ValueError(f"{who}: expected finite numbers, got others in {', '.join(bad[:8])}. Copy the file again.")
    with torch.device("meta"):
        model: nn.Module = kind(config)
    types = {name: tensor.dtype if dtype is None else dtype for name, tensor in state.items()}
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(types.get(name, parameter.dtype))
    model = model.to_empty(device=device)
    load_strict(model, dict(state), who)
    return model.eval().requires_grad_(False)


def write_checkpoint(source: Path, target: Path, state: Mapping[str, torch.Tensor]) -> None:
    """The checkpoint again, with the flow's network replaced, every tensor in its old type."""
    sections = read_sections(source)
    new = {name: state[name].detach().cpu().to(old.dtype).contiguous().clone() for name, old in sections[MODEL].items()}
    content = {**sections, MODEL: new}
    unfinished = target.with_name(target.name + ".part")
    try:
        if target.suffix == ".safetensors":
            flat = {f"{section}.{name}": tensor for section, own in content.items() for name, tensor in own.items()}
            save_file(flat, unfinished, metadata={"format": "pt"})
        else:
            torch.save(content, unfinished)
        unfinished.replace(target)
    finally:
        with contextlib.suppress(FileNotFoundError):
            unfinished.unlink()


def copy_config(source: Path, target: Path) -> None:
    """config.yaml as it is."""
    write_atomic(target, source.read_bytes())
