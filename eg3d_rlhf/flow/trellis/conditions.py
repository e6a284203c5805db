"""Embeddings of conditions: cached in files, or computed by CLIP or DINOv2 where transformers and their weights are on this machine.

Nothing is downloaded. Shape letters: N conditions, L tokens, E their size.
"""

import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file

from training.storage import read_tensors, write_tensors

KIND = "conditions"
CONDITIONS = "conditions.safetensors"  # usual name of the file of `write_conditions`
NULL = ""  # name of the empty condition, where a file has one
SUFFIXES = (".pt", ".npy", ".npz", ".safetensors")


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """Tokens by name. Images have a null of zeros; a text's null is the embedding of '' and must be among them."""

    tokens: Mapping[str, torch.Tensor]  # [L, E] float32 each, all alike
    encoder: str = ""  # what computed them; "" where it is unknown
    zero_null: bool = False  # the empty condition is zeros
    names: tuple[str, ...] = field(init=False)  # all but the empty one

    def __post_init__(self):
        object.__setattr__(self, "names", tuple(name for name in self.tokens if name != NULL))
        shapes = {tuple(t.shape) for t in self.tokens.values()}
        if not self.names or len(shapes) != 1 or len(next(iter(shapes))) != 2:
            raise ValueError(f"conditions: expected embeddings [L, E], all alike, got shapes {sorted(shapes)}. Use one encoder.")
        bad = next((name for name, t in self.tokens.items() if not torch.isfinite(t).all()), None)
        if bad is not None:
            raise ValueError(f"conditions: expected finite embeddings, got others for {bad!r}. Embed it again.")
        if not self.zero_null and NULL not in self.tokens:
            raise ValueError("conditions: expected the embedding of the empty text, named '', for guidance, got none. Embed '' as well.")

    @property
    def size(self) -> int:
        """E."""
        return next(iter(self.tokens.values())).shape[1]

    def of(self, names: Sequence[str]) -> torch.Tensor:
        """[N, L, E]. Raises: ValueError for names without an embedding."""
        missing = sorted({name for name in names if name not in self.tokens})
        if missing:
            raise ValueError(f"conditions: expected embeddings of all names, got none for {_listed(missing)}. Embed them too.")
        return torch.stack([self.tokens[name] for name in names])

    def null(self, n: int) -> torch.Tensor:
        """[n, L, E] of the empty condition."""
        one = torch.zeros_like(next(iter(self.tokens.values()))) if self.zero_null else self.tokens[NULL]
        return one.expand(n, -1, -1)


def write_conditions(path: Path, conditions: Conditions) -> None:
    """One file of all embeddings."""
    names = list(conditions.tokens)
    meta = {"names": names, "encoder": conditions.encoder, "zero_null": conditions.zero_null}
    write_tensors(path, KIND, {f"tokens.{i}": conditions.tokens[name] for i, name in enumerate(names)}, meta)


def read_conditions(path: Path, zero_null: bool = True) -> Conditions:
    """A file of `write_conditions`, its folder, or one of <name>.pt, .npy, .npz or .safetensors with one tensor [L, E] or [1, L, E] each.

    Args:
        zero_null: for a folder: the empty condition is zeros, as for images, rather than the embedding of '' in a file named null.
    Raises: FileNotFoundError; ValueError for what is not an embedding.
    """
    path = Path(path)
    path = path / CONDITIONS if (path / CONDITIONS).is_file() else path
    if path.is_file():
        tensors, meta = read_tensors(path, KIND)
        tokens = {name: tensors[f"tokens.{i}"] for i, name in enumerate(meta["names"])}
        return Conditions(tokens=tokens, encoder=meta["encoder"], zero_null=meta["zero_null"])
    files = sorted(p for p in path.glob("*") if p.suffix in SUFFIXES)
    if not files:
        endings = ", ".join(SUFFIXES)
        raise FileNotFoundError(f"conditions: expected a file or a folder of {endings}, got none at {path}. Embed the conditions first.")
    named = {p.stem: read_embedding(p) for p in files}
    if not zero_null and "null" in named:
        named[NULL] = named.pop("null")
    return Conditions(tokens=named, zero_null=zero_null)


def read_embedding(path: Path) -> torch.Tensor:
    """One condition's tokens [L, E] as float32."""
    found = read_array(path)
    if found.ndim == 3 and len(found) == 1:
        found = found[0]
    if found.ndim != 2:
        raise ValueError(f"{path}: expected tokens [L, E], got {list(found.shape)}. Save one condition per file.")
    return found.float()


def read_array(path: Path, key: str | None = None) -> torch.Tensor:
    """The one array of a .pt, .npy, .npz or .safetensors file, or the one called `key` in a file of several.

    Raises: FileNotFoundError; ValueError for a damaged file, one that would run code, or one without that array.
    """
    if not path.is_file():
        raise FileNotFoundError(f"array: expected a file, got none at {path}. Check the path.")
    try:
        found = _READERS[path.suffix](path)
    except KeyError:
        raise ValueError(f"{path}: expected one of {', '.join(SUFFIXES)}. Convert it.") from None
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise ValueError(f"{path}: expected an array, got a damaged or foreign file ({reason}). Restore it.") from None
    if isinstance(found, Mapping):
        names = list(found)
        chosen = key if key in names else names[0] if len(names) == 1 else None
        if chosen is None:
            raise ValueError(f"{path}: expected an array {key or ''} alone, got {_listed(names)}. Save it under that name.")
        found = found[chosen]
    if not isinstance(found, torch.Tensor):
        raise ValueError(f"{path}: expected an array, got {type(found).__name__}. Save the tensor alone.")
    return found


def _npz(path: Path) -> dict[str, torch.Tensor]:
    with np.load(path) as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


_READERS = {
    ".pt": lambda path: torch.load(path, map_location="cpu", weights_only=True), ".npz": _npz,
    ".npy": lambda path: torch.from_numpy(np.load(path)), ".safetensors": load_file,
}


def _listed(names: Sequence[str]) -> str:
    return ", ".join(repr(n) for n in names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


IMAGE_SIZE = 518  # pixels; 37 patches of 14
PATCHES = 37
REGISTERS = 4
TEXT_TOKENS = 77
MARGIN = 1.2  # side of the square cut out, in sides of what the image shows
HUB = {"dinov2_vitl14_reg": "facebook/dinov2-with-registers-large"}  # torch hub's name -> that of the transformers weights
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def _load(kind: str, name: str):
    """Class and weights from the local cache."""
    try:
        import transformers
    except ImportError:
        raise ValueError(
            f"{name}: expected the transformers package to embed conditions, got none. Install it, or give embeddings in files."
        ) from None
    try:
        return getattr(transformers, kind).from_pretrained(HUB.get(name, name), local_files_only=True)
    except (OSError, ValueError) as error:
        first = (str(error).splitlines() or [""])[0][:100]
        raise ValueError(
            f"{name}: expected its weights on this machine, got none ({first}). Fetch them once yourself, or give embeddings in files."
        ) from None


class TextEncoder:
    """CLIP's last hidden states of texts, padded to 77 tokens, with no attention mask."""

    def __init__(self, name: str, device: str | torch.device = "cpu"):
        self.name = name
        self.tokenizer = _load("AutoTokenizer", name)
        self.model = _load("CLIPTextModel", name).eval().to(device)

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> torch.Tensor:
        """[N, 77, E] float32 on the CPU."""
        ids = self.tokenizer(list(texts), max_length=TEXT_TOKENS, padding="max_length", truncation=True, return_tensors="pt")["input_ids"]
        return self.model(input_ids=ids.to(self.model.device)).last_hidden_state.float().cpu()

    def conditions(self, texts: Sequence[str]) -> Conditions:
        """Of texts by themselves, and of the empty one."""
        names = list(dict.fromkeys([*texts, NULL]))
        return Conditions(tokens={name: self([name])[0] for name in names}, encoder=self.name)


class ImageEncoder:
    """DINOv2's tokens of images before its last norm: 1 for the whole, 4 registers, 37 x 37 patches."""

    def __init__(self, name: str = "dinov2_vitl14_reg", device: str | torch.device = "cpu"):
        self.name = name
        self.model = _load("AutoModel", name).eval().to(device)

    @torch.no_grad()
    def tokens(self, images: torch.Tensor) -> torch.Tensor:
        """Images [N, 3, 518, 518] of 0..1 -> [N, L, E] float32, before the last norm."""
        mean, std = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in (MEAN, STD))
        pixels = ((images - mean) / std).to(self.model.device, next(self.model.parameters()).dtype)
        return self.model(pixel_values=pixels, output_hidden_states=True).hidden_states[-1].float()

    def patches(self, images: torch.Tensor) -> torch.Tensor:
        """[N, E, 37, 37] of the patches alone."""
        return self.tokens(images)[:, 1 + REGISTERS :].transpose(1, 2).unflatten(2, (PATCHES, PATCHES))

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Condition tokens [N, L, E] on the CPU: normalised without parameters."""
        tokens = self.tokens(images)
        return F.layer_norm(tokens, tokens.shape[-1:]).cpu()

    def conditions(self, images: dict[str, Image.Image]) -> Conditions:
        """Of images by name."""
        tokens = {name: self(cut_out(image)[None])[0] for name, image in images.items()}
        return Conditions(tokens=tokens, encoder=self.name, zero_null=True)


def cut_out(image: Image.Image) -> torch.Tensor:
    """What an image with a transparent background shows, in the middle of a black square -> [3, 518, 518] of 0..1, in steps of 1/255.

    As TRELLIS's pipeline: with (l, t) and (r, b) the first and the last pixel of an opacity above 0.8, the square about their middle has
    sides of 2 floor(floor(1.2 max(r - l, b - t)) / 2), its corners rounded to the nearest pixel, halves to the even one. Resized by
    Lanczos, its colours are multiplied by opacity and cut down, not rounded, to 8 bits.
    Raises: ValueError for an image without transparency: backgrounds are removed elsewhere; or one that shows a pixel or two.
    """
    if image.mode != "RGBA" or image.getextrema()[3][0] == 255:
        raise ValueError(f"image: expected a transparent background (RGBA), got {image.mode} without. Remove the background first.")
    box = image.getchannel("A").point(lambda a: 255 if a > 0.8 * 255 else 0).getbbox()
    if box is None:
        raise ValueError("image: expected something that is not transparent, got nothing. Choose another image.")
    left, top, right, bottom = box[0], box[1], box[2] - 1, box[3] - 1
    half = int(max(right - left, bottom - top) * MARGIN) // 2
    if half < 1:
        raise ValueError("image: expected something larger than two pixels, got less. Choose another image.")
    x, y = (left + right) / 2, (top + bottom) / 2
    square = image.crop((round(x - half), round(y - half), round(x + half), round(y + half)))
    square = square.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.LANCZOS)
    pixels = np.asarray(square).astype(np.float32) / 255
    seen = (pixels[..., :3] * pixels[..., 3:] * 255).astype(np.uint8)
    return torch.from_numpy(seen.astype(np.float32) / 255).permute(2, 0, 1).contiguous()
