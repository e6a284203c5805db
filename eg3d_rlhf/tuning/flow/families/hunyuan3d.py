"""Hunyuan3D-2.1 among the families of flow generators: shapes alone, a flow over a set of latent vectors in
one stage.

Its files are config.yaml beside one checkpoint with sections model, vae and conditioner, in a folder of the
released repository. Its paint stage is a diffusion model of pictures and no part of this. Nothing is
downloaded or run.

Shape letters as in models/hunyuan3d.py.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from eg3d_rlhf.core.interfaces import Mesh
from eg3d_rlhf.core.plain_yaml import read_yaml
from eg3d_rlhf.geometry.mesh import extract_mesh_blockwise
from eg3d_rlhf.geometry.mesh_export import save_mesh
from eg3d_rlhf.models.dino import Dino, DinoConfig, load_dino
from eg3d_rlhf.models.hunyuan3d import (
    BOUND,
    AutoencoderConfig,
    Denoiser,
    DenoiserConfig,
    ShapeDecoder,
    ShapeEncoder,
)
from eg3d_rlhf.models.pictures import on_white, read_cut_out, short_side
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
from eg3d_rlhf.tuning.flow.base.conditioning import Conditions
from eg3d_rlhf.tuning.flow.base.export import Release, Stored
from eg3d_rlhf.tuning.flow.base.ranking import asset_candidate
from eg3d_rlhf.tuning.flow.base.stage import FlowPath, FlowStage, Sampling, TokenSet
from eg3d_rlhf.tuning.flow.families import FlowFamily, Network, register
from eg3d_rlhf.tuning.flow.families.folder import (
    OpenedFolder,
    check_finite,
    embedding,
    even_points,
    mentions,
    read_mesh,
)
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
        """Shape of a condition."""
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
        _decoding(files, sections),
        f"{files.checkpoint}, {VAE}",
        torch.float32,
        device,
    )


def _decoding(files: ShapeFiles, sections: Sections) -> Mapping[str, torch.Tensor]:
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


SHAPE = "shape"  # name of the stage
MAIN = "main"  # name of the only tensor of a condition
# published: points of time, and s of v_null + s (v_cond - v_null)
STEPS = 50
SCALE = 5.0
LORA_TARGETS = ("to_q", "to_k", "to_v", "out_proj")
# per axis of the grid that a mesh to look at is read from
CELLS = 128
REACH = 2 * 0.9999  # longest side of a mesh that is encoded
NOTICE = (
    "Hunyuan3D-2.1 is under Tencent's community licence, which grants nothing in the European Union, the"
    " United Kingdom and South Korea, limits large services, and forbids to improve other AI models by its"
    " outputs (5.b): read the LICENSE beside its weights."
)
LICENCES = ("LICENSE*", "License*", "NOTICE*", "Notice*")
NOTICE_FILE = """Changed from the released Hunyuan3D-2.1: {file}: the weights of the flow of shapes \
were tuned on preferences.

It stays under the agreement of the released repository: pass its {papers} on with this folder.
"""


class Unbounded(ValueError):
    """A shape without a surface."""


@dataclass(frozen=True)
class ShapeAsset:
    """A finished shape, read on a grid when it is asked for."""

    latent: torch.Tensor  # [T, C]
    decoder: ShapeDecoder

    @torch.no_grad()
    def surface(self, cells: int) -> tuple[np.ndarray, np.ndarray]:
        """Vertices [V, 3] within +-1.01 and faces [F, 3] counter-clockwise from outside; the grid is read
        block by block.

        Deviates: on a straight grid; published vertices are index / n, not index / (n - 1), of n = cells + 1
        points (a slip). Closed at the border.
        Raises: Unbounded; ValueError for numbers that are not finite.
        """
        axis = torch.linspace(-BOUND, BOUND, cells + 1, device=self.latent.device)
        decoded = self.decoder(self.latent[None])
        low = math.inf
        high = -math.inf

        def sample(x: slice) -> torch.Tensor:
            nonlocal low, high
            numbers = self.decoder.slab(decoded, axis, x)
            finite = bool(numbers.isfinite().all())
            low = min(low, float(numbers.min()))
            high = max(high, float(numbers.max())) if finite else math.nan
            return numbers

        try:
            return extract_mesh_blockwise(sample, [axis.double().cpu()] * 3, 0.0)
        except ValueError:
            if not (math.isfinite(low) and math.isfinite(high)):
                raise
            raise Unbounded(
                f"No surface: all numbers lie between {low:g} and {high:g}; inside is above 0."
            ) from None


def call(
    module: nn.Module, x_t: torch.Tensor, t: torch.Tensor, cond: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """The network's own call; its t is 1 at the data."""
    return module(x_t, t, contexts=dict(cond))


class ShapePipeline(OpenedFolder):
    """See stage.Pipeline; one stage, so nothing is advanced. Both halves of the autoencoder are loaded when
    they are first needed.
    """

    def __init__(
        self,
        files: ShapeFiles,
        model: Denoiser,
        conditions: Conditions | None,
        parts: Callable[[str], nn.Module],
        device: str | torch.device = "cpu",
    ):
        """Args: conditions: None where nothing is sampled."""
        super().__init__(conditions, parts, device, {})
        self.files = files
        if conditions is not None:
            conditions.check("conditions", {MAIN: files.tokens}, REMEDY)
        self.stages = [
            FlowStage(
                name=SHAPE,
                model=model,
                latents=TokenSet(tokens=files.model.input_size, channels=files.model.in_channels),
                call=call,
                data_at_one=True,
                path=FlowPath(sigma_min=0.0, schedule="uniform"),
                sampling=sampling(files.shift),
                lora_targets=LORA_TARGETS,
            )
        ]

    def decode(self, x_0: torch.Tensor) -> list[ShapeAsset]:
        """Shapes of latents."""
        check_finite("decode", x_0)
        return [ShapeAsset(latent.detach().float(), self.part(DECODER_HALF)) for latent in x_0]

    def encode(self, assets: Sequence[Mesh]) -> list[dict[str, Any]]:
        """Latents of meshes, the encoder's mean. Each mesh is brought into the cube first; points are drawn,
        always alike.
        """
        network: ShapeEncoder = self.part(ENCODING_HALF)
        made: list[dict[str, Any]] = []
        for mesh in assets:
            draw = torch.Generator().manual_seed(0)
            made.append({SHAPE: network.latents(surface_points(mesh, self.files.vae, draw), draw).cpu()})
        return made


def surface_points(mesh: Mesh, config: AutoencoderConfig, draw: torch.Generator) -> torch.Tensor:
    """Even points of a mesh's surface [P, 3 + f]: place in the cube, the face's normal, where asked for the
    flag of no sharp edge.

    Raises: ValueError for a mesh without area, or a config that asks for points on sharp edges.
    """
    if config.pc_sharpedge_size:
        got = f"{config.pc_sharpedge_size}. How sharp edges are found is not known here: give latents"
        raise ValueError(f"config.yaml, vae: expected pc_sharpedge_size 0 to encode meshes, got {got}.")
    places, normals = even_points(mesh, REACH, config.pc_size, draw)
    flag = torch.zeros(len(places), config.point_feats - 3, dtype=torch.float64)
    return torch.cat([places, normals, flag], 1).float()


def sampling(shift: float = 1.0) -> Sampling:
    """The published sampler in this package's terms.

    Its times are 0 (noise) to 1 in STEPS points, so one step fewer, moved by t' = s t / (1 + (s - 1) t); here
    time runs from 1 down and is moved by r t / (1 + (r - 1) t), the same with r = 1 / s. Its guidance
    v_null + s (v - v_null) is w = s - 1 here, at all times.
    """
    return Sampling(steps=STEPS - 1, cfg_strength=SCALE - 1, cfg_interval=(0.0, 1.0), rescale_t=1 / shift)


DECODER_HALF = "decoder"
ENCODING_HALF = "encoder"
REMEDY = "`eg3d-rlhf flow new`, by the DINOv2 of this checkpoint"
PARTS: dict[str, Callable[..., nn.Module]] = {DECODER_HALF: decoder, ENCODING_HALF: encoder}


def load(
    root: Path,
    conditions: Conditions | None,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> ShapePipeline:
    """From its files; without conditions the flow stays without weights."""
    files = read_files(root)

    def part(name: str) -> nn.Module:
        return PARTS[name](files, read_sections(files.checkpoint), device)

    if conditions is None:
        return ShapePipeline(files, empty(partial(Denoiser, files.model)), None, part, device)
    sections = read_sections(files.checkpoint)
    conditions.check_source("conditions", _source(files, sections), REMEDY)
    _decoding(files, sections)  # of names and shapes, before anything is computed
    model = denoiser(files, sections, dtype, device)
    model.recompute = True
    return ShapePipeline(files, model, conditions, part, device)


def _source(files: ShapeFiles, sections: Sections) -> str:
    """What computes conditions, for their file; without the encoder's weights any of this preparation."""
    weights = sections.get(CONDITIONER)
    return f"DINOv2 {fingerprint(weights)}, {files.preparation}" if weights else f"*, {files.preparation}"


@torch.no_grad()
def embed(root: Path, pictures: Mapping[str, Path], device: torch.device) -> Conditions:
    """Tokens of pictures with transparent backgrounds by the checkpoint's own DINOv2."""
    files = read_files(root)
    sections = read_sections(files.checkpoint, (CONDITIONER,))
    network = image_encoder(files, sections, device)
    tokens = {}
    for name, path in embedding(pictures.items(), "picture"):
        pixels, _ = read_cut_out(path, lambda image: on_white(image, files.picture, files.border))
        tokens[name] = {MAIN: picture_tokens(files, network, as_picture(pixels).to(device))[0].cpu()}
    return Conditions(tokens=tokens, encoder=_source(files, sections), zero_null=True)


def as_picture(pixels: np.ndarray) -> torch.Tensor:
    """Bytes [h, w, 3] -> [1, 3, h, w] of 0..1."""
    return torch.from_numpy(pixels.astype(np.float32) / 255).permute(2, 0, 1)[None]


def picture_tokens(files: ShapeFiles, network: Dino, pictures: torch.Tensor) -> torch.Tensor:
    """Pictures [N, 3, h, w] of 0..1 -> tokens [N, L, E] after the last norm."""
    tokens = network(short_side(pictures, files.encoder.pixels))
    return (tokens if files.class_token else tokens[:, 1:]).float()


def show(asset: ShapeAsset, path: Path, cells: int | None = None) -> Path:
    """A mesh, .obj; a shape without a surface, such as an untrained network makes, leaves a text that says
    so.

    Raises: ValueError for numbers that are not finite.
    """
    try:
        return save_mesh(path.with_name(path.name + ".obj"), *asset.surface(cells or CELLS))
    except Unbounded as error:
        file = path.with_name(path.name + ".txt")
        file.write_text(f"{error}\n")
        return file


def release(root: Path, stages: Sequence[str]) -> Release:
    """The released repository's folder of the shape, its autoencoder, licence, and a notice of the change.

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


def identity(root: Path) -> dict[str, Path]:
    """Its two files."""
    files = read_files(root)
    return {CONFIG: files.root / CONFIG, files.checkpoint.name: files.checkpoint}


def networks(root: Path) -> list[Network]:
    """All four, the autoencoder's halves apart."""
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


register(
    FlowFamily(
        name="hunyuan3d",
        layout="config.yaml of Hunyuan3D-2.1's shape and its checkpoint",
        recognises=recognises,
        stages=(SHAPE,),
        load=load,
        files=identity,
        embed=embed,
        show=show,
        cells=CELLS,
        release=release,
        loaded_by='Hunyuan3DDiTFlowMatchingPipeline.from_pretrained("{out}")',
        encoder=partial(load, conditions=None),
        told=lambda pipeline, stage: {MAIN: pipeline.files.tokens},
        candidate=asset_candidate(read_mesh),
        networks=networks,
        address="https://huggingface.co/tencent/Hunyuan3D-2.1",
        version="Hunyuan3D-2.1, shapes",
        notice=NOTICE,
    )
)
