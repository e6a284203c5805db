"""DINOv2 and DINOv3: transformers' networks, filled from the published files of either in every layout.

transformers builds the layers from a configuration. This module finds the files on this machine, reads them
strictly and standardises the images. Parameter names are those of transformers. Files of DINOv2 from torch
hub have other names and are renamed when they are read. Nothing is downloaded. transformers is imported only
when a network is built (extra `vision`).

Sources: Oquab et al. 2023 for DINOv2; Darcet et al. 2023 for registers; Simeoni et al. 2025 for DINOv3.

Shape letters: N images, S pixels per side, p pixels per side of a patch, G = S / p, L = 1 + registers + G^2
tokens (class token, registers, patches), E channels of a token.
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from eg3d_rlhf.core.shapes import check_shape
from eg3d_rlhf.models.weights import State, empty, fill, frozen, read, require_extra, to_transformers

# Statistics of ImageNet's images of values 0..1, per channel (R, G, B).
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
HEAD = 64  # channels of a head in every published DINOv2


def standardised(images: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return (images - MEAN) / STD per channel, [N, 3, h, w], in the dtype and on the device of `like`."""
    # [3, 1, 1], broadcast over rows and columns
    mean, std = (like.new_tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return (images.to(like) - mean) / std


def _check_layers(act: str, gated: bool, channels: int) -> None:
    # Other variants would need other layers.
    if act != "gelu" or gated or channels != 3:
        raise ValueError(
            f"expected layers with gelu, no gates and 3 channels, got {act!r}, {gated} and {channels}. Other"
            " variants are not supported: name the weights of a standard DINO."
        )


@dataclass(frozen=True, kw_only=True)
class DinoConfig:
    """Settings of a DINOv2 as its config.json states them. The defaults are those of the large network."""

    hidden_size: int = 1024
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    mlp_ratio: float = 4
    image_size: int = 518  # pixels per side at which the position embeddings were learnt
    patch_size: int = 14  # pixels per side
    num_register_tokens: int = 0
    layer_norm_eps: float = 1e-6
    num_channels: int = 3
    hidden_act: str = "gelu"
    qkv_bias: bool = True
    use_swiglu_ffn: bool = False
    shown: int | None = None  # pixels per side of the input images; None: image_size

    def __post_init__(self):
        _check_layers(self.hidden_act, self.use_swiglu_ffn, self.num_channels)
        # Positions form a grid of whole patches.
        if self.image_size % self.patch_size or self.hidden_size % self.num_attention_heads:
            raise ValueError(
                "DinoConfig: expected an image_size that is a multiple of patch_size and a hidden_size that"
                f" is a multiple of num_attention_heads, got {self}. Correct its config.json."
            )

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> "DinoConfig":
        """Read the content of a config.json. Settings that are no fields of this class are ignored."""
        # Null values count as absent, so that the class's default applies.
        known = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in content.items() if name in known and value is not None})

    @classmethod
    def of_state(cls, state: Mapping[str, torch.Tensor], who: str, shown: int | None = None) -> "DinoConfig":
        """Derive the sizes from a state dict with torch hub's names.

        Without registers, torch hub interpolates the position embeddings in a way of its own. `from_hub`
        applies it once, and image_size is then the size of the input images.

        Args:
            who: name that error messages begin with.
            shown: pixels per side of the input images.
        Raises: ValueError for the state dict of another network.
        """
        try:
            size = state["cls_token"].shape[-1]
            patch = state["patch_embed.proj.weight"].shape[-1]
            # One position is the class token's; the others form a square grid of patches.
            grid = math.isqrt(state["pos_embed"].shape[1] - 1)
            hidden = len(state["blocks.0.mlp.fc1.weight"])
        except (KeyError, IndexError) as error:
            raise ValueError(
                f"{who}: expected a DINOv2 with blocks of two layers, got none of {error}. Name another"
                " checkpoint."
            ) from None
        registers = state["register_tokens"].shape[1] if "register_tokens" in state else 0
        return cls(
            hidden_size=size,
            num_hidden_layers=len({name.split(".")[1] for name in state if name.startswith("blocks.")}),
            # No entry states the number of heads; all published networks have heads of 64 channels
            num_attention_heads=max(1, size // HEAD),
            mlp_ratio=hidden / size,
            # See the docstring: without registers, positions are interpolated to the input images
            image_size=patch * grid if registers or shown is None else shown,
            patch_size=patch,
            num_register_tokens=registers,
            shown=shown,
        )

    @property
    def pixels(self) -> int:
        """S, the number of pixels per side of the input images."""
        return self.shown or self.image_size

    @property
    def tokens(self) -> int:
        """L, the number of tokens for images of this size."""
        return 1 + self.num_register_tokens + (self.pixels // self.patch_size) ** 2


class Dino(nn.Module):
    """DINOv2: images [N, 3, S, S] of values 0..1 -> tokens [N, L, E], before or after the last norm.

    S is the config's `pixels`. Differentiable in the images.
    """

    def __init__(self, config: DinoConfig):
        super().__init__()
        require_extra("DINOv2", "transformers")
        import transformers

        kind = "Dinov2WithRegisters" if config.num_register_tokens else "Dinov2"
        settings = asdict(config)
        # transformers truncates channels * ratio. A ratio derived from shapes may be below by rounding, which
        # would lose a channel.
        settings["mlp_ratio"] += 1e-9
        network = getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**settings))
        self.config = config
        # The parts are kept and not the model itself, because that returns only the output after the last
        # norm.
        self.embeddings = network.embeddings
        self.encoder = network.encoder
        self.layernorm = network.layernorm

    def tokens(self, standard: torch.Tensor) -> torch.Tensor:
        """Return the tokens before the last norm, for images that `standardised` has prepared."""
        return self.encoder(self.embeddings(standard)).last_hidden_state

    def forward(self, images: torch.Tensor, normed: bool = True) -> torch.Tensor:
        size = self.config.pixels
        check_shape("Dino.images", images, ["N", 3, size, size], "Resize the images to this size.")
        x = self.tokens(standardised(images, self.layernorm.weight))  # [N, L, E]
        return self.layernorm(x) if normed else x


HUB = {  # torch hub's name -> that of transformers' weights
    f"dinov2_vit{letter}14{reg}": f"facebook/dinov2{'-with-registers' if reg else ''}-{size}"
    for letter, size in (("s", "small"), ("b", "base"), ("l", "large"))
    for reg in ("", "_reg")
}
HUB_NAMES = (  # torch hub -> transformers, in turn
    (r"^(cls_token|mask_token|register_tokens)$", r"embeddings.\1"),
    (r"^pos_embed$", "embeddings.position_embeddings"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"^blocks\.", "encoder.layer."),
    (r"^norm\.", "layernorm."),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.ls([12])\.gamma$", r".layer_scale\1.lambda1"),
)


def from_hub(state: Mapping[str, torch.Tensor], config: DinoConfig) -> State:
    """Rename a torch hub state dict to transformers' names and interpolate its positions to the config's
    size.
    """
    renamed = to_transformers(state, HUB_NAMES)
    positions = "embeddings.position_embeddings"
    # A missing entry is reported when the network is filled.
    if positions in renamed:
        renamed[positions] = _positions(renamed[positions], config.image_size // config.patch_size)
    return renamed


def _positions(positions: torch.Tensor, side: int) -> torch.Tensor:
    """Interpolate position embeddings [1, 1 + G^2, E] -> [1, 1 + side^2, E] as torch hub's DINOv2 does.

    That is bicubic and not antialiased, by the factor (side + 0.1) / G. The 0.1 shifts where it samples, so
    it must be kept.
    """
    learnt = math.isqrt(positions.shape[1] - 1)
    if side == learnt:
        # Published sizes need no interpolation; even the factor 1 would change the numbers.
        return positions
    # [1, G^2, E] -> [1, E, G, G], without the class token's position
    grid = positions[:, 1:].float().transpose(1, 2).unflatten(2, (learnt, learnt))
    grid = F.interpolate(grid, scale_factor=[(side + 0.1) / learnt] * 2, mode="bicubic")
    # [1, E, side, side] -> [1, side^2, E], with the class token's position in front again
    return torch.cat([positions[:, :1].float(), grid.flatten(2).transpose(1, 2)], 1)


def read_dino(name: str, device: str | torch.device = "cpu") -> Dino:
    """Read a DINOv2 by a torch hub name, from a transformers folder, or from a torch hub checkpoint.

    Args: name: such as dinov2_vitl14_reg, a folder, or a .pth file.
    Returns: the frozen network in float32.
    Raises: FileNotFoundError that lists the places that were searched; ValueError for weights that do not
        fit.
    """
    path = _weights(name)
    state = read(path, name)
    # Only torch hub's files have no config.json beside them: their sizes follow from the shapes.
    if path.suffix == ".pth":
        config = DinoConfig.of_state(state, str(path))
        state = from_hub(state, config)
    else:
        config = _read_config(name, path, "dinov2", _dino)
    return load_dino(config, state, str(path), device)


def _weights(name: str) -> Path:
    places = list(_places(name))
    path = next((p for p in places if p.is_file()), None)
    if path is None:
        looked = ", ".join(map(str, places))
        # The remedy names the repository from which the file can be downloaded.
        hub = HUB.get(name, name)
        fetch = f"hf download {hub} (https://huggingface.co/{hub})"
        raise FileNotFoundError(
            f"{name}: expected its weights on this machine, got none at {looked or 'no place'}. Fetch them:"
            f" {fetch}"
        )
    return path


def load_dino(
    config: DinoConfig, state: Mapping[str, torch.Tensor], who: str, device: str | torch.device = "cpu"
) -> Dino:
    """Build a DINOv2 from a state dict with transformers' names, strictly. Returns it frozen, in float32."""
    return frozen(fill(empty(lambda: Dino(config)), state, who, types=torch.float32, device=device), device)


def _places(name: str) -> Iterator[Path]:
    path = Path(name)
    if path.suffix == ".pth":
        yield path
        return
    # Order of the search: a folder given by path, torch hub's cache, then the Hugging Face cache.
    folders = [path] if path.is_dir() else []
    if name in HUB:
        # The same environment variables and defaults as torch.hub and huggingface_hub use.
        home = Path(
            os.environ.get("TORCH_HOME")
            or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "torch"
        )
        yield (
            home
            / "hub"
            / "checkpoints"
            / f"{name.removesuffix('_reg')}{'_reg4' if name.endswith('_reg') else ''}_pretrain.pth"
        )
    cache = Path(
        os.environ.get("HF_HUB_CACHE")
        or Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface") / "hub"
    )
    folders += sorted((cache / f"models--{HUB.get(name, name).replace('/', '--')}" / "snapshots").glob("*"))
    yield from (folder / "model.safetensors" for folder in folders)


def _read_config(name: str, weights: Path, kind: str, make: Callable[[Mapping[str, Any]], Any]) -> Any:
    path = weights.with_name("config.json")
    if not path.is_file():
        raise FileNotFoundError(
            f"{name}: expected config.json beside {weights.name}, got none. Restore the folder."
        )
    try:
        content = json.loads(path.read_text())
        # "dinov2" also matches dinov2_with_registers.
        if not isinstance(content, dict) or not str(content.get("model_type")).startswith(kind):
            raise ValueError(f"its model_type is not {kind}")
        return make(content)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{path}: this file does not hold the settings of a {kind.replace('dino', 'DINO')}: {error}."
            " Restore the file."
        ) from None


def _dino(content: Mapping[str, Any]) -> DinoConfig:
    # transformers leaves settings at their default out of the file; 4 is its default with registers.
    registers = 4 if content["model_type"] == "dinov2_with_registers" else 0
    return DinoConfig.of({"num_register_tokens": registers, **content})


class Dino3(nn.Module):
    """DINOv3, which has rotary position embeddings: images -> tokens [N, L, E] BEFORE the last norm.

    Images are [N, 3, h, w] of values 0..1 whose sides are multiples of the patch size. Differentiable in the
    images.
    """

    def __init__(self, config: Any):
        """Build the layers of transformers' DINOv3ViTConfig `config`."""
        super().__init__()
        from transformers import DINOv3ViTModel

        network = DINOv3ViTModel(config)
        # The layers are called one by one in `forward`, so the parts are kept instead of the model.
        self.embeddings = network.embeddings
        self.rope_embeddings = network.rope_embeddings
        self.layer = network.layer
        self.norm = network.norm

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        standard = standardised(images, self.norm.weight)
        x = self.embeddings(standard)
        angles = self.rope_embeddings(standard)  # cosines and sines, [G^2, channels of a head] each
        # Layer by layer: what `hidden_states[-1]` holds, before or after the norm, differs between releases
        # of transformers (4.56.2 to 5.23.0), without an error.
        for layer in self.layer:
            x = layer(x, position_embeddings=angles)
        return x


def read_dino3(name: str, device: str | torch.device = "cpu") -> Dino3:
    """Read a DINOv3 from a transformers folder or, by its name, from the Hugging Face cache.

    Returns: the frozen network in float32.
    Raises: as `read_dino`.
    """
    path = _weights(name)
    require_extra(name, "transformers")
    config = _read_config(name, path, "dinov3", _dino3)
    network = empty(lambda: Dino3(config))
    fill(network, read(path, name), str(path), types=torch.float32, device=device)
    # The rotary frequencies are in no file, and `empty` built them on the meta device, without values.
    network.rope_embeddings = type(network.rope_embeddings)(config)
    return frozen(network, device)


def _dino3(content: Mapping[str, Any]) -> Any:
    from transformers import DINOv3ViTConfig

    config = DINOv3ViTConfig.from_dict(dict(content))
    _check_layers(config.hidden_act, config.use_gated_mlp, config.num_channels)
    if config.hidden_size % (4 * config.num_attention_heads):
        # Rotary positions turn pairs of channels, half of them by rows and half by columns.
        raise ValueError(f"{config.hidden_size} channels cannot be divided into heads of a multiple of four")
    return config
