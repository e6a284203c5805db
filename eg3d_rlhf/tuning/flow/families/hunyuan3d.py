"""Hunyuan3D-2.1 among the families of flow generators: shapes alone, a flow over a set of latent vectors in one stage.

Its files are config.yaml beside one checkpoint with sections model, vae and conditioner. Its paint stage is a diffusion model of pictures
and no part of this. Nothing is downloaded or run.

Shape letters as in models/hunyuan3d.py.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from eg3d_rlhf.geometry.mesh import extract_mesh
from eg3d_rlhf.geometry.mesh_export import save_mesh
from eg3d_rlhf.models.hunyuan3d import BOUND, AutoencoderConfig, Denoiser, DenoiserConfig, ShapeDecoder
from eg3d_rlhf.models.vit import Dino, DinoConfig, hub_names, load_dino
from eg3d_rlhf.models.weights import below, content, empty, fill, in_types_of, rewrite
from eg3d_rlhf.tuning.flow.conditions import Conditions
from eg3d_rlhf.tuning.flow.families import FlowFamily, register
from eg3d_rlhf.tuning.flow.families.folder import mentions, merged, read_yaml
from eg3d_rlhf.tuning.flow.stage import FlowPath, FlowStage, Sampling, TokenSet
from training.storage import write_atomic

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
    return mentions(folder_of(root) / CONFIG, TARGETS[MODEL])


def read_files(root: Path) -> ShapeFiles:
    """Read config.yaml and find the checkpoint.

    Raises: FileNotFoundError; ValueError for a config that is not Hunyuan3D-2.1's.
    """
    folder = folder_of(Path(root))
    path = folder / CONFIG
    checkpoint = next((folder / name for name in CHECKPOINTS if (folder / name).is_file()), None)
    if not path.is_file() or checkpoint is None:
        raise FileNotFoundError(f"Hunyuan3D: expected {CONFIG} and {' or '.join(CHECKPOINTS)}, got less in {folder}. Restore them.")
    written = read_yaml(path)
    params = {}
    for section, target in TARGETS.items():
        entry = written.get(section)
        entry = entry if isinstance(entry, Mapping) else {}
        named = str(entry.get("target", "")).rpartition(".")[2]
        if named != target or not isinstance(entry.get("params"), Mapping):
            raise ValueError(f"{path}: expected {section} of target {target} with params, got {named or 'none'}. Name Hunyuan3D-2.1's.")
        params[section] = dict(entry["params"])
    encoder = params[CONDITIONER].get("main_image_encoder", {})
    kind, inner = encoder.get("type"), encoder.get("kwargs", {})
    if kind != "DinoImageEncoder" or set(params[CONDITIONER]) - {"main_image_encoder", "drop_ratio"}:
        raise ValueError(f"{path}: expected one DinoImageEncoder as conditioner, got {kind!r} in {sorted(params[CONDITIONER])}.")
    scheduler = (written.get("scheduler") or {}).get("params") or {}
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
    held = content(path, "checkpoint")
    if path.suffix == ".safetensors":
        held = {section: below(held, f"{section}.") for section in {name.partition(".")[0]: None for name in held}}
    lacking = [s for s in TARGETS if not (isinstance(held, dict) and isinstance(held.get(s), dict) and held[s])]
    if lacking:
        raise ValueError(f"{path}: expected sections {', '.join(TARGETS)}, got none for {', '.join(lacking)}. Use the released checkpoint.")
    odd = [f"{s}.{n}" for s in TARGETS for n, x in held[s].items() if not isinstance(x, torch.Tensor)]
    if odd:
        raise ValueError(f"{path}: expected tensors by name, got others at {', '.join(map(str, odd[:8]))}. Use the released checkpoint.")
    return held


def denoiser(files: ShapeFiles, sections: Sections, dtype: torch.dtype | None = None, device: str | torch.device = "cpu") -> Denoiser:
    """The flow's network, strictly; dtype None keeps the file's."""
    return _loaded(Denoiser, files.model, sections[MODEL], f"{files.checkpoint}, {MODEL}", dtype, device)


def decoder(files: ShapeFiles, sections: Sections, device: str | torch.device = "cpu") -> ShapeDecoder:
    """The autoencoder's half that makes shapes, strictly, in float32."""
    half = {name: tensor for name, tensor in sections[VAE].items() if not name.startswith(UNREAD)}
    return _loaded(ShapeDecoder, files.vae, half, f"{files.checkpoint}, {VAE}", torch.float32, device)


def image_encoder(files: ShapeFiles, sections: Sections, device: str | torch.device = "cpu") -> Dino:
    """The pictures' encoder, strictly, in float32."""
    foreign = [name for name in sections[CONDITIONER] if not name.startswith(ENCODER)]
    if foreign:
        where = f"{files.checkpoint}, {CONDITIONER}"
        raise ValueError(f"{where}: expected names that begin with {ENCODER}, got {', '.join(foreign[:8])}. Use the released checkpoint.")
    return load_dino(files.encoder, hub_names(below(sections[CONDITIONER], ENCODER)), f"{files.checkpoint}, {CONDITIONER}", device)


def _loaded(kind: Any, config: Any, state: Mapping[str, torch.Tensor], who: str, dtype: torch.dtype | None, device) -> Any:
    types = {} if dtype is None else dict.fromkeys(state, dtype)
    return fill(empty(lambda: kind(config)), state, who, types=types, device=device).eval().requires_grad_(False)


def write_checkpoint(source: Path, target: Path, state: Mapping[str, torch.Tensor]) -> None:
    """The checkpoint again, with the flow's network replaced, every tensor in its old type."""
    sections = read_sections(source)
    held: dict = {**sections, MODEL: in_types_of(sections[MODEL], state)}
    if target.suffix == ".safetensors":
        held = {f"{section}.{name}": tensor for section, tensors in held.items() for name, tensor in tensors.items()}
    rewrite(target, held)


SHAPE = "shape"  # name of the stage
MAIN = "main"  # name of the only tensor of a condition
STEPS, SCALE = 50, 5.0  # published: points of time, and s of v_null + s (v_cond - v_null)
LORA_TARGETS = ("to_q", "to_k", "to_v", "out_proj")
GRID = 128  # points per axis of the grid that a mesh to look at is read from; the published one has 384
PICTURE, BORDER = 512, 0.15  # pixels of a prepared picture, and the share of its side around what it shows
NOTICE = (
    "Hunyuan3D-2.1 is under Tencent's community licence, which grants nothing in the European Union, the United Kingdom and South Korea "
    "and limits large services: read the LICENSE beside its weights."
)


@dataclass(frozen=True)
class ShapeAsset:
    """A finished shape: numbers on a grid, positive inside, read when they are asked for."""

    latent: torch.Tensor  # [T, C]
    decoder: ShapeDecoder

    def volume(self, resolution: int = GRID) -> torch.Tensor:
        """[R, R, R] over x, y, z within +-1.01."""
        return self.decoder.volume(self.latent, resolution)


def call(module: nn.Module, x_t: torch.Tensor, t: torch.Tensor, cond: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The network's own call; its t is 1 at the data."""
    return module(x_t, t, contexts=dict(cond))


class ShapePipeline:
    """See stage.Pipeline; one stage, so nothing is advanced or encoded."""

    def __init__(self, files: ShapeFiles, model: Denoiser, decoder: ShapeDecoder | None, conditions: Conditions | None):
        """Args: decoder and conditions: None where nothing is sampled."""
        self.tokens, self.decoder = conditions, decoder
        if conditions is not None:
            conditions.check("conditions", {MAIN: files.tokens}, "`eg3d-rlhf flow files conditions`, by the DINOv2 of this checkpoint")
        self.stages = [FlowStage(
            name=SHAPE, model=model, latents=TokenSet(tokens=files.model.input_size, channels=files.model.in_channels), call=call,
            data_at_one=True, path=FlowPath(sigma_min=0.0, schedule="uniform"), sampling=sampling(files.shift), lora_targets=LORA_TARGETS,
        )]

    def conditions(self, names: Sequence[str], stage: str):
        """{"main": [N, L, E]}."""
        assert self.tokens is not None
        return self.tokens.of(names)

    def no_condition(self, n: int, stage: str):
        """The same of zeros."""
        assert self.tokens is not None
        return self.tokens.null(n)

    def decode(self, x_0: torch.Tensor) -> list[ShapeAsset]:
        """Shapes of latents."""
        if not bool(torch.isfinite(x_0).all()):
            raise ValueError("decode: expected finite latents, got NaN or infinite ones. Use an earlier checkpoint.")
        assert self.decoder is not None
        return [ShapeAsset(latent.detach().float(), self.decoder) for latent in x_0]


def sampling(shift: float = 1.0) -> Sampling:
    """The published sampler in this package's terms.

    Its times are 0 (noise) to 1 in STEPS points, so one step fewer, moved by t' = s t / (1 + (s - 1) t); here time runs from 1 down and
    is moved by r t / (1 + (r - 1) t), the same with r = 1 / s. Its guidance v_null + s (v - v_null) is w = s - 1 here, at all times.
    """
    return Sampling(steps=STEPS - 1, cfg_strength=SCALE - 1, cfg_interval=(0.0, 1.0), rescale_t=1 / shift)


def load(
    root: Path, conditions: Conditions | None, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> ShapePipeline:
    """From its files; without conditions the flow stays without weights."""
    files = read_files(root)
    if conditions is None:
        with torch.device("meta"):
            model = Denoiser(files.model)
        return ShapePipeline(files, model, None, None)
    sections = read_sections(files.checkpoint)
    model = denoiser(files, sections, dtype, device)
    model.recompute = True
    return ShapePipeline(files, model, decoder(files, sections, device), conditions)


def embed(root: Path, pictures: Mapping[str, Path], device: torch.device) -> Conditions:
    """Tokens of pictures by the checkpoint's own DINOv2, after its last norm."""
    files = read_files(root)
    encoder = image_encoder(files, read_sections(files.checkpoint), device)
    first = 0 if files.class_token else 1
    tokens = {}
    for name, path in pictures.items():
        picture = F.interpolate(prepared(Image.open(path))[None], size=[files.encoder.image_size] * 2, mode="bilinear", antialias=True)
        with torch.no_grad():
            tokens[name] = {MAIN: encoder(picture.to(device))[0, first:].float().cpu()}
    return Conditions(tokens=tokens, encoder=f"DINOv2 of {files.checkpoint.name}", zero_null=True)


def prepared(image: Image.Image) -> torch.Tensor:
    """What a picture with a transparent background shows, in the middle of a white square -> [3, 512, 512] of 0..1.

    The box of all that is not transparent fills 85 % of the square's side. Deviates: resized by PILLOW (box or bilinear, then bicubic), not
    by OpenCV as published; the last bits differ.
    Raises: ValueError for a picture without transparency, or one that shows nothing.
    """
    if image.mode != "RGBA" or image.getchannel("A").getextrema()[0] == 255:
        raise ValueError(f"image: expected a transparent background (RGBA), got {image.mode} without. Remove the background first.")
    box = image.getchannel("A").getbbox()
    if box is None or min(box[2] - box[0], box[3] - box[1]) < 2:
        raise ValueError("image: expected something larger than a pixel that is not transparent, got less. Choose another image.")
    side = max(image.size)
    width, height = box[2] - box[0] - 1, box[3] - box[1] - 1
    scale = int(side * (1 - BORDER)) / max(width, height)
    size = max(1, int(width * scale)), max(1, int(height * scale))
    kind = Image.Resampling.BOX if scale < 1 else Image.Resampling.BILINEAR
    seen = image.crop((box[0], box[1], box[2] - 1, box[3] - 1)).resize(size, kind)
    square = Image.new("RGBA", (side, side))
    square.paste(seen, ((side - size[0]) // 2, (side - size[1]) // 2))
    pixels = np.asarray(square).astype(np.float32) / 255
    white = pixels[..., :3] * pixels[..., 3:] + 1 - pixels[..., 3:]
    final = Image.fromarray((white * 255).clip(0, 255).astype(np.uint8)).resize((PICTURE, PICTURE), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.asarray(final).astype(np.float32) / 255).permute(2, 0, 1).contiguous()


def show(asset: ShapeAsset, path: Path) -> Path:
    """A mesh, .obj; a shape without a surface, such as an untrained network makes, leaves a text that says so.

    Raises: ValueError for numbers that are not finite.
    """
    volume = asset.volume()
    axis = np.linspace(-BOUND, BOUND, len(volume))
    low, high = float(volume.min()), float(volume.max())
    if not low < 0 < high:
        file = path.with_name(path.name + ".txt")
        file.write_text(f"No surface: all numbers lie between {low:g} and {high:g}; inside is above 0.\n")
        return file
    vertices, faces = extract_mesh(volume.permute(2, 1, 0), (axis, axis, axis), 0.0)
    return save_mesh(path.with_name(path.name + ".obj"), vertices, faces)


def export(root: Path, out: Path, tuned: Mapping[str, Path]) -> dict:
    """config.yaml and the checkpoint, with the tuned network merged, in the file's own types.

    Returns: {"tuned": {stage: {"file", "rounding"}}}; rounding: share of the update that merging into those types loses.
    """
    files = read_files(root)
    sections = read_sections(files.checkpoint)
    out.mkdir(parents=True, exist_ok=True)
    state, rounding = merged(lambda dtype: denoiser(files, sections, dtype), tuned[SHAPE])
    write_checkpoint(files.checkpoint, out / files.checkpoint.name, state)
    write_atomic(out / CONFIG, (files.root / CONFIG).read_bytes())
    return {"tuned": {SHAPE: {"file": files.checkpoint.name, "rounding": rounding}}}


def identity(root: Path) -> dict[str, Path]:
    """Its two files."""
    files = read_files(root)
    return {CONFIG: files.root / CONFIG, files.checkpoint.name: files.checkpoint}


register(FlowFamily(
    name="hunyuan3d", layout="config.yaml of Hunyuan3D-2.1's shape and its checkpoint", recognises=recognises, stages=(SHAPE,),
    load=load, files=identity, embed=embed, show=show, export=export, notice=NOTICE,
))
