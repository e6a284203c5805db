"""Vision transformers: DINOv2, with its files in all layouts, DINOv3, BLIP's, and the blocks that others are
built of.

Sources: Dosovitskiy et al. 2021; Oquab et al. 2023 for DINOv2; Darcet et al. 2023 for registers; Simeoni et
al. 2025 for DINOv3. DINOv2's parameters have the names of torch hub; files in those of transformers are
renamed where they are read. Nothing is downloaded.

Shape letters: N pictures, S pixels per side, p pixels per side of a patch, G = S / p, L = 1 + registers + G^2
tokens, E their size.
"""

import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import nn

from eg3d_rlhf.core.shapes import check_shape
from eg3d_rlhf.models.attention import Mlp, SelfAttention, attend, tree
from eg3d_rlhf.models.weights import State, empty, fill, frozen, read

# of pictures in 0..1
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


class Scale(nn.Module):
    """A factor for each channel."""

    def __init__(self, width: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.gamma


class Block(nn.Module):
    """x + attn(norm1(x)), then x + mlp(norm2(x)); in DINOv2 each branch has a factor per channel."""

    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int,
        *,
        scaled: bool = False,
        eps: float = 1e-5,
        qkv_bias: bool = True,
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attn = SelfAttention(width, heads, qkv_bias)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = Mlp(width, hidden)
        if scaled:
            self.ls1 = Scale(width)
            self.ls2 = Scale(width)
        self.scaled = scaled

    def forward(self, x: torch.Tensor, keep: torch.Tensor | None = None) -> torch.Tensor:
        """[N, L, E] -> [N, L, E]; keep [N, 1, 1, L]: which tokens are there."""
        attended = self.attn(self.norm1(x), keep)
        x = x + (self.ls1(attended) if self.scaled else attended)
        fed = self.mlp(self.norm2(x))
        return x + (self.ls2(fed) if self.scaled else fed)


class VisionTransformer(nn.Module):
    """Pictures [N, 3, S, S], normalised -> tokens [N, L, E] behind the last norm; the token of the whole
    comes first, then registers.

    Args:
        side: G of the positions; registers: their number; scaled: as DINOv2, which also has a token for
            masked patches.
        antialias, offset: how positions of other sizes are interpolated: widened when there are fewer; by
            (G' + offset) / G, 0: by size.
    """

    def __init__(
        self,
        width: int,
        depth: int,
        heads: int,
        hidden: int,
        patch: int,
        side: int,
        *,
        registers: int = 0,
        scaled: bool = False,
        eps: float = 1e-6,
        qkv_bias: bool = True,
        antialias: bool = True,
        offset: float = 0.0,
    ):
        super().__init__()
        self.registers = registers
        self.antialias = antialias
        self.offset = offset
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        if scaled:
            self.mask_token = nn.Parameter(torch.zeros(1, width))
        if registers:
            self.register_tokens = nn.Parameter(torch.zeros(1, registers, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + side**2, width))
        self.patch_embed = tree(proj=nn.Conv2d(3, width, patch, patch))
        self.blocks = nn.ModuleList(
            Block(width, heads, hidden, scaled=scaled, eps=eps, qkv_bias=qkv_bias) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width, eps=eps)

    def positions(self, side: int) -> torch.Tensor:
        """Of the whole and of side^2 patches, [1, 1 + side^2, E]; other numbers of patches than learnt by
        bicubic interpolation.
        """
        whole = self.pos_embed[:, :1]
        grid = self.pos_embed[:, 1:]
        learnt = math.isqrt(grid.shape[1])
        if side == learnt:
            return self.pos_embed
        place: dict[str, Any] = (
            {"scale_factor": [(side + self.offset) / learnt] * 2} if self.offset else {"size": (side, side)}
        )
        grid = F.interpolate(
            grid.transpose(1, 2).unflatten(2, (learnt, learnt)),
            mode="bicubic",
            antialias=self.antialias,
            **place,
        )
        return torch.cat([whole, grid.flatten(2).transpose(1, 2)], 1)

    def tokens(self, pictures: torch.Tensor) -> torch.Tensor:
        x = self.patch_embed.proj(pictures)  # [N, E, G, G]
        side = x.shape[-1]
        x = x.flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.positions(side)
        if self.registers:
            x = torch.cat([x[:, :1], self.register_tokens.expand(len(x), -1, -1), x[:, 1:]], 1)
        for block in self.blocks:
            x = block(x)
        return x

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return self.norm(self.tokens(pictures))


HEAD = 64  # channels of a head, of all that are published


@dataclass(frozen=True, kw_only=True)
class _Config:
    """What configs of transformers say of either."""

    GATED: ClassVar[str]  # name of the setting of layers that are not read
    num_channels: int = 3
    hidden_act: str = "gelu"
    num_register_tokens: int = 0

    def __post_init__(self):
        gated = getattr(self, self.GATED)
        if self.hidden_act != "gelu" or gated or self.num_channels != 3:
            got = f"{self.hidden_act!r}, {gated} and {self.num_channels}"
            raise ValueError(
                f"{type(self).__name__}: expected gelu, no {self.GATED} and 3 channels, got {got}. Not read"
                " here."
            )

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> Self:
        """From a config; settings that say nothing of the network, such as dropout, are passed over."""
        return cls(
            **{
                field.name: content[field.name]
                for field in fields(cls)
                if content.get(field.name) is not None
            }
        )


@dataclass(frozen=True, kw_only=True)
class DinoConfig(_Config):
    """What a config of transformers says of a DINOv2; the defaults are those of the large one."""

    GATED: ClassVar[str] = "use_swiglu_ffn"
    hidden_size: int = 1024
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    mlp_ratio: float = 4
    image_size: int = 518  # of the position embeddings
    patch_size: int = 14
    layer_norm_eps: float = 1e-6
    qkv_bias: bool = True
    use_swiglu_ffn: bool = False
    shown: int | None = None  # pixels of the pictures that it is shown; None: image_size
    antialias: bool = True  # see VisionTransformer
    offset: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        if self.image_size % self.patch_size or self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"DinoConfig: expected patches and heads that divide picture and size, got {self}."
                " Correct it."
            )

    @classmethod
    def of_state(cls, state: Mapping[str, torch.Tensor], who: str) -> "DinoConfig":
        """By the shapes of a state dict in torch hub's names. Raises: ValueError for what is no DINOv2."""
        try:
            size = state["cls_token"].shape[-1]
            patch = state["patch_embed.proj.weight"].shape[-1]
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
            num_attention_heads=max(1, size // HEAD),
            mlp_ratio=hidden / size,
            image_size=patch * grid,
            patch_size=patch,
            # as torch hub makes them
            num_register_tokens=registers,
            antialias=bool(registers),
            offset=0.0 if registers else 0.1,
        )

    @property
    def pixels(self) -> int:
        """S of the pictures that it is shown."""
        return self.shown or self.image_size

    @property
    def tokens(self) -> int:
        """L at this size."""
        return 1 + self.num_register_tokens + (self.pixels // self.patch_size) ** 2


class Dino(VisionTransformer):
    """Pictures [N, 3, S, S] of 0..1 -> tokens [N, L, E], before the last norm or after it.
    S is the config's.
    """

    def __init__(self, config: DinoConfig):
        size = config.hidden_size
        hidden = int(config.hidden_size * config.mlp_ratio + 1e-6)
        super().__init__(
            size,
            config.num_hidden_layers,
            config.num_attention_heads,
            hidden,
            config.patch_size,
            config.image_size // config.patch_size,
            registers=config.num_register_tokens,
            scaled=True,
            eps=config.layer_norm_eps,
            qkv_bias=config.qkv_bias,
            antialias=config.antialias,
            offset=config.offset,
        )
        self.config = config

    def normalised(self, pictures: torch.Tensor) -> torch.Tensor:
        pictures = pictures.to(self.norm.weight)
        mean, std = (pictures.new_tensor(values).view(3, 1, 1) for values in (MEAN, STD))
        return (pictures - mean) / std

    def forward(self, pictures: torch.Tensor, normed: bool = True) -> torch.Tensor:
        size = self.config.pixels
        check_shape("Dino.pictures", pictures, ["N", 3, size, size], "Scale them to its size.")
        x = self.tokens(self.normalised(pictures))
        return self.norm(x) if normed else x


HUB = {  # torch hub's name -> that of transformers' weights
    f"dinov2_vit{letter}14{reg}": f"facebook/dinov2{'-with-registers' if reg else ''}-{size}"
    for letter, size in (("s", "small"), ("b", "base"), ("l", "large"))
    for reg in ("", "_reg")
}
RENAMED = (  # transformers -> torch hub, in turn
    (r"^embeddings\.(cls_token|mask_token|register_tokens)$", r"\1"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^encoder\.layer\.", "blocks."),
    (r"^layernorm\.", "norm."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
)
_PART = re.compile(r"(.+)\.attention\.attention\.(query|key|value)\.(weight|bias)")


def hub_names(state: Mapping[str, torch.Tensor]) -> State:
    """A DINOv2 of transformers under the names of torch hub; queries, keys and values in one. Where one of
    them is missing they stay.
    """
    renamed: State = {}
    for name, tensor in state.items():
        part = _PART.fullmatch(name)
        parts = (
            [f"{part[1]}.attention.attention.{which}.{part[3]}" for which in ("query", "key", "value")]
            if part
            else [name]
        )
        if part is not None and all(other in state for other in parts):
            name = f"{part[1]}.attn.qkv.{part[3]}"
            tensor = torch.cat([state[other] for other in parts])
        for theirs, ours in RENAMED:
            name = re.sub(theirs, ours, name)
        renamed[name] = tensor
    return renamed


def read_dino(name: str, device: str | torch.device = "cpu") -> Dino:
    """The network of torch hub's name, of a folder of transformers, or of a checkpoint of torch hub; frozen,
    in float32.

    Raises: FileNotFoundError naming the places; ValueError for weights that do not fit.
    """
    path = _weights(name)
    state = read(path, name)
    if path.suffix == ".pth":
        config = DinoConfig.of_state(state, str(path))
    else:
        state = hub_names(state)
        config = _read_config(name, path, "dinov2", _dino)
    return load_dino(config, state, str(path), device)


def _weights(name: str) -> Path:
    places = list(_places(name))
    path = next((p for p in places if p.is_file()), None)
    if path is None:
        looked = ", ".join(map(str, places))
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
    """The network of a state dict in torch hub's names, strictly; frozen, in float32."""
    return frozen(fill(empty(lambda: Dino(config)), state, who, types=torch.float32, device=device), device)


def _places(name: str) -> Iterator[Path]:
    path = Path(name)
    if path.suffix == ".pth":
        yield path
        return
    folders = [path] if path.is_dir() else []
    if name in HUB:
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
        if not isinstance(content, dict) or not str(content.get("model_type")).startswith(kind):
            raise ValueError(f"its model_type is not {kind}")
        return make(content)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{path}: expected the settings of a {kind.replace('dino', 'DINO')}, got: {error}. Restore the"
            " file."
        ) from None


def _dino(content: Mapping[str, Any]) -> DinoConfig:
    registers = content.get(
        "num_register_tokens", 4 if content["model_type"] == "dinov2_with_registers" else 0
    )
    return DinoConfig.of({**content, "num_register_tokens": registers, "antialias": registers > 0})


# DINOv3: positions are rotary, of the places of patches alone; the names are those of transformers.


@dataclass(frozen=True, kw_only=True)
class Dino3Config(_Config):
    """What a config of transformers says of a DINOv3; the defaults are those of transformers."""

    GATED: ClassVar[str] = "use_gated_mlp"
    hidden_size: int = 384
    intermediate_size: int = 1536
    num_hidden_layers: int = 12
    num_attention_heads: int = 6
    patch_size: int = 16
    layer_norm_eps: float = 1e-5
    rope_theta: float = 100.0
    query_bias: bool = True
    key_bias: bool = False
    value_bias: bool = True
    proj_bias: bool = True
    mlp_bias: bool = True
    use_gated_mlp: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.hidden_size % (4 * self.num_attention_heads):
            raise ValueError(
                f"Dino3Config: expected heads of four channels or a multiple, got {self}. Correct it."
            )


class Dino3Block(nn.Module):
    """As `Block`, with queries and keys of patches turned by their places."""

    def __init__(self, config: Dino3Config):
        super().__init__()
        width = config.hidden_size
        hidden = config.intermediate_size
        self.heads = config.num_attention_heads
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=config.layer_norm_eps) for _ in range(2))
        biases = {"q": config.query_bias, "k": config.key_bias, "v": config.value_bias, "o": config.proj_bias}
        self.attention = tree(
            **{f"{name}_proj": nn.Linear(width, width, bias=bias) for name, bias in biases.items()}
        )
        self.layer_scale1, self.layer_scale2 = (
            nn.ParameterDict({"lambda1": torch.ones(width)}) for _ in range(2)
        )
        self.mlp = tree(
            up_proj=nn.Linear(width, hidden, bias=config.mlp_bias),
            down_proj=nn.Linear(hidden, width, bias=config.mlp_bias),
        )

    def forward(self, x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
        """[N, L, E] -> [N, L, E]; angles: [G^2, D] of the last tokens."""
        attention = self.attention
        given = self.norm1(x)
        q, k, v = (
            layer(given).unflatten(-1, (self.heads, -1))
            for layer in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        attended = attention.o_proj(attend(self.turned(q, angles), self.turned(k, angles), v).flatten(-2))
        x = x + attended * self.layer_scale1.lambda1
        return x + self.mlp.down_proj(F.gelu(self.mlp.up_proj(self.norm2(x)))) * self.layer_scale2.lambda1

    @staticmethod
    def turned(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
        """Heads [N, L, H, D], whose planes are channels i and i + D / 2."""
        whole, patches = x.split([x.shape[1] - len(angles), len(angles)], 1)
        a, b = patches.chunk(2, -1)
        cos = angles.cos()[:, None]
        sin = angles.sin()[:, None]
        return torch.cat([whole, patches * cos + torch.cat([-b, a], -1) * sin], 1)


class Dino3(nn.Module):
    """Pictures [N, 3, h, w] of 0..1, whole patches -> tokens [N, L, E] BEFORE the last norm: of the whole,
    registers, patches.
    """

    def __init__(self, config: Dino3Config):
        super().__init__()
        self.config = config
        width = config.hidden_size
        patch = config.patch_size
        self.embeddings = tree(patch_embeddings=nn.Conv2d(3, width, patch, patch))
        self.embeddings.cls_token, self.embeddings.mask_token = (
            nn.Parameter(torch.zeros(1, 1, width)) for _ in range(2)
        )
        self.embeddings.register_tokens = nn.Parameter(torch.zeros(1, config.num_register_tokens, width))
        self.layer = nn.ModuleList(Dino3Block(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)

    def angles(self, height: int, width: int) -> torch.Tensor:
        """Of patches in rows, [h w, D]: 2 pi of their centres in -1..1, down and across, at D / 4 rates each;
        all twice.
        """
        config = self.config
        like = self.norm.weight
        size = config.hidden_size // config.num_attention_heads
        rates = config.rope_theta ** -torch.arange(0, 1, 4 / size, dtype=torch.float32, device=like.device)
        centres = [
            2 * (torch.arange(n, dtype=torch.float32, device=like.device) + 0.5) / n - 1
            for n in (height, width)
        ]
        places = torch.cartesian_prod(*centres)  # [h w, 2]
        return (2 * math.pi * places[:, :, None] * rates).flatten(1).repeat(1, 2)

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        like = self.norm.weight
        embeddings = self.embeddings
        mean, std = (like.new_tensor(values).view(3, 1, 1) for values in (MEAN, STD))
        x = embeddings.patch_embeddings((pictures.to(like) - mean) / std)  # [N, E, h, w]
        angles = self.angles(*x.shape[2:])
        whole = torch.cat([embeddings.cls_token, embeddings.register_tokens], 1).expand(len(x), -1, -1)
        x = torch.cat([whole, x.flatten(2).transpose(1, 2)], 1)
        for layer in self.layer:
            x = layer(x, angles)
        return x


def read_dino3(name: str, device: str | torch.device = "cpu") -> Dino3:
    """The network of a folder of transformers, or of a name in the hub's cache; frozen, in float32.

    Raises: as `read_dino`.
    """
    path = _weights(name)
    config = _read_config(name, path, "dinov3", Dino3Config.of)
    state = read(path, name)
    return frozen(
        fill(empty(lambda: Dino3(config)), state, str(path), types=torch.float32, device=device), device
    )
