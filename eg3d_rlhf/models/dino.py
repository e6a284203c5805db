"""Image encoders DINOv2 and DINOv3, read from published files.

The library transformers builds the layers from a configuration. This module finds the files on this machine,
loads their weights and standardises the images. Every parameter must occur in the file and no other.
Parameter names are those of transformers. Files of DINOv2 from torch hub have other names and are renamed
when they are read. Nothing is downloaded. transformers is imported only when a network is built (extra
`vision`).

Sources: Oquab et al. 2023 for DINOv2; Darcet et al. 2023 for registers, which are additional tokens; Simeoni
et al. 2025 for DINOv3.

Shapes: N images, h rows and w columns of pixels, S pixels per side, p pixels per side of a patch, G = S / p
patches per side, L = 1 + registers + G^2 tokens (class token, registers, patches), E channels of a token.
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
from eg3d_rlhf.models.weights import State, empty, fill, freeze, read, require_extra, to_transformers

# Mean and standard deviation of pixel values 0..1 in ImageNet's images, per channel (R, G, B)
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
HEAD = 64  # channels of an attention head in every published DINOv2


def standardised(images: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Standardise images by ImageNet's mean and standard deviation of each channel.

    Args:
        images: images [N, 3, h, w] of values 0..1.
        like: tensor whose dtype and device the result gets.

    Returns: (images - MEAN) / STD, [N, 3, h, w].
    """
    # [3, 1, 1], broadcast over rows and columns
    mean, std = (like.new_tensor(statistics).view(3, 1, 1) for statistics in (MEAN, STD))
    return (images.to(like) - mean) / std


def _check_layers(activation_name: str, has_gates: bool, channels: int) -> None:
    """Raise ValueError for a variant of DINO whose layers this module does not support.

    Args:
        activation_name: name of the activation function.
        has_gates: True if the perceptrons have gates.
        channels: number of channels of an image.
    """
    if activation_name != "gelu" or has_gates or channels != 3:
        raise ValueError(
            "only a DINO with gelu, without gates and with 3 image channels is supported, but its activation"
            f" is {activation_name!r}, it has {'gates' if has_gates else 'no gates'}, and its images have"
            f" {channels} channels. Use the weights of a standard DINO."
        )


@dataclass(frozen=True, kw_only=True)
class DinoConfig:
    """Settings of a DINOv2, with the names of its config.json. The defaults are those of the large network.

    Raises: ValueError for settings that are not supported or do not fit together.
    """

    hidden_size: int = 1024  # E
    num_hidden_layers: int = 24  # number of blocks
    num_attention_heads: int = 16  # number of attention heads, a divisor of hidden_size
    mlp_ratio: float = 4  # channels inside a perceptron, as a multiple of hidden_size
    image_size: int = 518  # pixels per side of the images for which the position embeddings were trained
    patch_size: int = 14  # pixels per side of a patch
    num_register_tokens: int = 0  # number of registers
    layer_norm_eps: float = 1e-6  # constant of the layer norms
    num_channels: int = 3  # channels of an image; only 3 is supported
    hidden_act: str = "gelu"  # activation function; only gelu is supported
    qkv_bias: bool = True  # True: the layers of queries, keys and values have a bias
    use_swiglu_ffn: bool = False  # gates in the perceptrons; only False is supported
    shown: int | None = None  # pixels per side of the input images; None: image_size

    def __post_init__(self):
        _check_layers(self.hidden_act, self.use_swiglu_ffn, self.num_channels)
        # The position embeddings form a grid of patches, so the image consists of complete patches.
        if self.image_size % self.patch_size or self.hidden_size % self.num_attention_heads:
            raise ValueError(
                "DinoConfig: image_size must be a multiple of patch_size, and hidden_size must be a multiple"
                f" of num_attention_heads, got image_size={self.image_size}, patch_size={self.patch_size},"
                f" hidden_size={self.hidden_size}, num_attention_heads={self.num_attention_heads}. Download"
                " config.json again."
            )

    @classmethod
    def from_settings(cls, file_settings: Mapping[str, Any]) -> "DinoConfig":
        """Create the settings from the content of a config.json.

        Settings that are not fields of this class are ignored. A null value selects the default of this
        class.
        """
        field_names = {field.name for field in fields(cls)}
        field_values = {
            name: setting_value
            for name, setting_value in file_settings.items()
            if name in field_names and setting_value is not None
        }
        return cls(**field_values)

    @classmethod
    def from_state(
        cls, state_dict: Mapping[str, torch.Tensor], who: str, shown: int | None = None
    ) -> "DinoConfig":
        """Derive the settings from the shapes of the tensors in a torch hub state dict.

        For a network without registers, torch hub interpolates the position embeddings differently from
        transformers. `from_hub` therefore interpolates them when the file is read. The field image_size is
        then the size of the input images.

        Args:
            state_dict: state dict with torch hub's names.
            who: name that error messages begin with.
            shown: pixels per side of the input images; None: the size for which the network was trained.

        Raises: ValueError if the state dict is that of another network.
        """
        try:
            token_width = state_dict["cls_token"].shape[-1]
            patch_size = state_dict["patch_embed.proj.weight"].shape[-1]
            # One position belongs to the class token. The others form a square grid of patches.
            grid_side = math.isqrt(state_dict["pos_embed"].shape[1] - 1)
            mlp_width = len(state_dict["blocks.0.mlp.fc1.weight"])
        except (KeyError, IndexError) as error:
            raise ValueError(
                f"{who}: this checkpoint cannot be read as a DINOv2 whose blocks have two-layer MLPs"
                f" ({error!r})."
                " Use DINOv2 ViT-S, ViT-B or ViT-L from torch hub; ViT-g has SwiGLU layers and is not"
                " supported."
            ) from None
        register_count = state_dict["register_tokens"].shape[1] if "register_tokens" in state_dict else 0
        return cls(
            hidden_size=token_width,
            # Names of blocks are blocks.NUMBER.PARAMETER.
            num_hidden_layers=len({name.split(".")[1] for name in state_dict if name.startswith("blocks.")}),
            # No entry states the number of attention heads; all published networks have heads of 64 channels.
            num_attention_heads=max(1, token_width // HEAD),
            mlp_ratio=mlp_width / token_width,
            # See the docstring: without registers, positions are interpolated to the input images.
            image_size=patch_size * grid_side if register_count or shown is None else shown,
            patch_size=patch_size,
            num_register_tokens=register_count,
            shown=shown,
        )

    @property
    def pixels(self) -> int:
        """Return the number of pixels per side of the input images, S."""
        return self.shown or self.image_size

    @property
    def tokens(self) -> int:
        """Return the number of tokens of an input image, L."""
        return 1 + self.num_register_tokens + (self.pixels // self.patch_size) ** 2


class Dino(nn.Module):
    """DINOv2, which encodes images [N, 3, S, S] of values 0..1 as tokens [N, L, E].

    S is `config.pixels`. Differentiable in the images. Raises ValueError if the library transformers is
    missing.
    """

    def __init__(self, config: DinoConfig):
        super().__init__()
        require_extra("DINOv2", "transformers")
        import transformers

        class_prefix = "Dinov2WithRegisters" if config.num_register_tokens else "Dinov2"
        config_values = asdict(config)
        # transformers rounds channels * ratio down. A ratio that was derived from shapes may be slightly too
        # small by rounding, which would cost a channel.
        config_values["mlp_ratio"] += 1e-9
        network = getattr(transformers, f"{class_prefix}Model")(
            getattr(transformers, f"{class_prefix}Config")(**config_values)
        )
        self.config = config
        # The parts are stored and not the model itself, because the model returns only the output after the
        # last norm.
        self.embeddings = network.embeddings
        self.encoder = network.encoder
        self.layernorm = network.layernorm

    def tokens(self, standard_images: torch.Tensor) -> torch.Tensor:
        """Return the tokens [N, L, E] before the last norm, for images [N, 3, S, S] from `standardised`."""
        return self.encoder(self.embeddings(standard_images)).last_hidden_state

    def forward(self, images: torch.Tensor, normed: bool = True) -> torch.Tensor:
        # normed: True returns the tokens after the last norm, False the tokens before it.
        side_pixels = self.config.pixels
        check_shape(
            "Dino.images", images, ["N", 3, side_pixels, side_pixels], "Resize the images to this size."
        )
        x = self.tokens(standardised(images, self.layernorm.weight))  # [N, L, E]
        return self.layernorm(x) if normed else x


# Name of a network on torch hub: its name on the Hugging Face hub. Names that end in _reg have registers.
HUB = {
    "dinov2_vits14": "facebook/dinov2-small",
    "dinov2_vits14_reg": "facebook/dinov2-with-registers-small",
    "dinov2_vitb14": "facebook/dinov2-base",
    "dinov2_vitb14_reg": "facebook/dinov2-with-registers-base",
    "dinov2_vitl14": "facebook/dinov2-large",
    "dinov2_vitl14_reg": "facebook/dinov2-with-registers-large",
}
# Pairs of a regular expression of torch hub's names and its
# replacement in transformers' names, applied in order
HUB_NAMES = (
    (r"^(cls_token|mask_token|register_tokens)$", r"embeddings.\1"),
    (r"^pos_embed$", "embeddings.position_embeddings"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"^blocks\.", "encoder.layer."),
    (r"^norm\.", "layernorm."),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.ls([12])\.gamma$", r".layer_scale\1.lambda1"),
)


def from_hub(state_dict: Mapping[str, torch.Tensor], config: DinoConfig) -> State:
    """Convert a torch hub state dict to transformers' names.

    Position embeddings are interpolated to `config.image_size`.

    Args:
        state_dict: state dict with torch hub's names.
        config: settings of the network.
    """
    renamed_state = to_transformers(state_dict, HUB_NAMES)
    positions_name = "embeddings.position_embeddings"
    # If the entry is missing, `fill` reports this later with all other missing entries.
    if positions_name in renamed_state:
        renamed_state[positions_name] = _positions(
            renamed_state[positions_name], config.image_size // config.patch_size
        )
    return renamed_state


def _positions(positions: torch.Tensor, target_side: int) -> torch.Tensor:
    """Interpolate position embeddings as torch hub's DINOv2 does.

    The interpolation is bicubic without antialiasing, by the factor (target_side + 0.1) / G. The 0.1 shifts
    the sampled positions, so it is needed for the same results.

    Args:
        positions: embeddings [1, 1 + G^2, E]; the first one belongs to the class token.
        target_side: number of patches per side of the result.

    Returns: embeddings [1, 1 + target_side^2, E].
    """
    trained_side = math.isqrt(positions.shape[1] - 1)  # G
    if target_side == trained_side:
        # Interpolation by the factor (G + 0.1) / G would change the embeddings.
        return positions
    # [1, G^2, E] -> [1, E, G, G], without the position of the class token
    position_grid = positions[:, 1:].float().transpose(1, 2).unflatten(2, (trained_side, trained_side))
    position_grid = F.interpolate(
        position_grid, scale_factor=[(target_side + 0.1) / trained_side] * 2, mode="bicubic"
    )
    # [1, E, side, side] -> [1, side^2, E], with the position of the class token in front again
    return torch.cat([positions[:, :1].float(), position_grid.flatten(2).transpose(1, 2)], 1)


def read_dino(name: str, device: str | torch.device = "cpu") -> Dino:
    """Read a DINOv2 from this machine.

    Args:
        name: torch hub name such as dinov2_vitl14_reg, which is searched in the caches of torch hub and of
            Hugging Face; a folder of the library transformers; or a .pth checkpoint of torch hub.
        device: device of the network.

    Returns: the network in float32, in evaluation mode and without gradients of its parameters.
    Raises: FileNotFoundError if no weights were found; ValueError if they do not fit the network.
    """
    path, config, state_dict = dino_files(name)
    return load_dino(config, state_dict, str(path), device)


def dino_files(name: str) -> tuple[Path, DinoConfig, State]:
    """Find the files of a DINOv2, and return the path of the weights, the settings and the tensors.

    The tensors have the names of transformers. Arguments and errors are those of `read_dino`.
    """
    path = _find_weights(name)
    state_dict = read(path, name)
    # Checkpoints of torch hub have no config.json beside them. Their settings follow from the shapes.
    if path.suffix == ".pth":
        config = DinoConfig.from_state(state_dict, str(path))
        state_dict = from_hub(state_dict, config)
    else:
        config = _read_config(name, path, "dinov2", _dino_config)
    return path, config, state_dict


def _find_weights(name: str) -> Path:
    """Return the path of the weights of a DINO, see `read_dino`.

    Raises: FileNotFoundError that lists all paths if none of them is a file.
    """
    candidate_paths = list(_weight_paths(name))
    weights_path = next(
        (candidate_path for candidate_path in candidate_paths if candidate_path.is_file()), None
    )
    if weights_path is None:
        searched_paths = ", ".join(map(str, candidate_paths))
        # The message names the repository from which the file can be downloaded.
        repository = HUB.get(name, name)
        raise FileNotFoundError(
            f"{name}: no weights were found on this machine (searched:"
            f" {searched_paths or 'the cache of Hugging Face, which has no such network'}). Check the name,"
            f" or download a network of the Hugging Face hub with hf download {repository}"
            f" (https://huggingface.co/{repository})."
        )
    return weights_path


def load_dino(
    config: DinoConfig, state_dict: Mapping[str, torch.Tensor], who: str, device: str | torch.device = "cpu"
) -> Dino:
    """Build a DINOv2 from a state dict with transformers' names.

    Args:
        config: settings of the network.
        state_dict: state dict.
        who: name that error messages begin with.
        device: device of the network.

    Returns: the network in float32, in evaluation mode and without gradients of its parameters.
    Raises: ValueError if an entry is missing, superfluous or of another shape.
    """
    # `empty` builds the layers without values, and `fill` takes the tensors of the state dict.
    return freeze(
        fill(empty(lambda: Dino(config)), state_dict, who, requested_dtypes=torch.float32, device=device),
        device,
    )


def _weight_paths(name: str) -> Iterator[Path]:
    """Yield the paths at which the weights of a DINO may lie, see `read_dino`, in the order of the search."""
    named_path = Path(name)
    if named_path.suffix == ".pth":
        yield named_path
        return
    # Order of the search: a folder given by path, torch hub's cache, then the Hugging Face cache.
    folders = [named_path] if named_path.is_dir() else []
    if name in HUB:
        # The same environment variables and defaults as torch.hub and huggingface_hub use.
        torch_home = Path(
            os.environ.get("TORCH_HOME")
            or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "torch"
        )
        # Files of networks with registers end in _reg4_pretrain.pth, since they have four registers.
        file_suffix = "_reg4_pretrain.pth" if name.endswith("_reg") else "_pretrain.pth"
        yield torch_home / "hub" / "checkpoints" / (name.removesuffix("_reg") + file_suffix)
    cache_folder = Path(
        os.environ.get("HF_HUB_CACHE")
        or Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface") / "hub"
    )
    # The cache has one folder per network and, below it, one folder per downloaded revision.
    folders += sorted(
        (cache_folder / f"models--{HUB.get(name, name).replace('/', '--')}" / "snapshots").glob("*")
    )
    yield from (folder / "model.safetensors" for folder in folders)


def _read_config(
    name: str, weights_path: Path, model_type: str, config_from_content: Callable[[Mapping[str, Any]], Any]
) -> Any:
    """Read the settings of a network from the config.json beside its weights.

    Args:
        name: name that error messages begin with.
        weights_path: file of the weights.
        model_type: 'dinov2' or 'dinov3', the beginning of the setting model_type.
        config_from_content: function that creates the settings from the content of the file.

    Raises: FileNotFoundError if the file is missing; ValueError if its content is that of another network.
    """
    config_path = weights_path.with_name("config.json")
    if not config_path.is_file():
        raise FileNotFoundError(
            f"{name}: config.json is missing beside {weights_path.name}. Download both files again."
        )
    try:
        file_settings = json.loads(config_path.read_text())
        # "dinov2" also matches dinov2_with_registers.
        if not isinstance(file_settings, dict) or not str(file_settings.get("model_type")).startswith(
            model_type
        ):
            raise ValueError(f"its model_type does not begin with {model_type}")
        return config_from_content(file_settings)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{config_path}: this file does not contain the settings of a supported"
            f" {model_type.replace('dino', 'DINO')}: {str(error).removesuffix('.')}. Download the file again."
        ) from None


def _dino_config(file_settings: Mapping[str, Any]) -> DinoConfig:
    """Create the settings of a DINOv2 from the content of its config.json."""
    # transformers does not write settings that have their default
    # value. Its default number of registers is 4.
    register_count = 4 if file_settings["model_type"] == "dinov2_with_registers" else 0
    return DinoConfig.from_settings({"num_register_tokens": register_count, **file_settings})


class Dino3(nn.Module):
    """DINOv3, which encodes images [N, 3, h, w] of values 0..1 as tokens [N, L, E] before the last norm.

    h and w must be multiples of the patch size. Position embeddings are rotary. Differentiable in the images.
    """

    def __init__(self, config: Any):
        """Build the layers.

        Args:
            config: settings, a DINOv3ViTConfig of the library transformers.
        """
        super().__init__()
        from transformers import DINOv3ViTModel

        network = DINOv3ViTModel(config)
        # `forward` calls the layers one by one, so the parts are stored and not the model.
        self.embeddings = network.embeddings
        self.rope_embeddings = network.rope_embeddings
        self.layer = network.layer
        self.norm = network.norm

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        standard_images = standardised(images, self.norm.weight)
        x = self.embeddings(standard_images)
        angles = self.rope_embeddings(standard_images)  # cosines and sines, [G^2, channels of a head] each
        # The model's output `hidden_states[-1]` is taken before the norm in some releases of transformers and
        # after it in others (4.56.2 to 5.23.0). Calling the layers gives the same result in all of them.
        for layer in self.layer:
            x = layer(x, position_embeddings=angles)
        return x


def read_dino3(name: str, device: str | torch.device = "cpu") -> Dino3:
    """Read a DINOv3 from this machine.

    Args:
        name: folder of the library transformers, or a name on the Hugging Face hub, which is searched in the
            local cache.
        device: device of the network.

    Returns: the network in float32, in evaluation mode and without gradients of its parameters.
    Raises: FileNotFoundError if no weights were found; ValueError if they do not fit the network, or if the
        library transformers is missing.
    """
    path, config, state_dict = dino3_files(name)
    network = empty(lambda: Dino3(config))
    fill(network, state_dict, str(path), requested_dtypes=torch.float32, device=device)
    # The rotary frequencies are not part of the weights, and `empty` created them without values.
    network.rope_embeddings = type(network.rope_embeddings)(config)
    return freeze(network, device)


def dino3_files(name: str) -> tuple[Path, Any, State]:
    """Find the files of a DINOv3, and return the path of the weights, the settings and the tensors.

    Arguments and errors are those of `read_dino3`.
    """
    path = _find_weights(name)
    require_extra(name, "transformers")
    return path, _read_config(name, path, "dinov3", _dino3_config), read(path, name)


def address_of(name: str) -> str:
    """Return the address at which a DINO of this name can be downloaded."""
    return f"https://huggingface.co/{HUB.get(name, name)}"


def _dino3_config(file_settings: Mapping[str, Any]) -> Any:
    """Create transformers' settings of a DINOv3 from the content of its config.json.

    Raises: ValueError for a variant that is not supported.
    """
    from transformers import DINOv3ViTConfig

    config = DINOv3ViTConfig.from_dict(dict(file_settings))
    _check_layers(config.hidden_act, config.use_gated_mlp, config.num_channels)
    if config.hidden_size % (4 * config.num_attention_heads):
        # Rotary embeddings rotate pairs of channels: half of the
        # pairs by the row, the other half by the column.
        raise ValueError(
            f"hidden_size {config.hidden_size} cannot be divided into {config.num_attention_heads} attention"
            " heads whose number of channels is a multiple of four"
        )
    return config
